//! The whole system on a real control plane: real kube-apiserver, real containerd, edges behind
//! NAT. One control plane serves all tests of this program; each test has an edge of its own.
//!
//! Needs root, and the programs that `deploy/quickstart.sh` installs. It fails without them; it
//! never passes by doing nothing.
#![expect(
    clippy::print_stdout,
    reason = "figures on the way, shown with --nocapture"
)]

#[path = "system/autonomy.rs"]
mod autonomy;
#[path = "system/beside.rs"]
mod beside;
#[path = "system/birth.rs"]
mod birth;
#[path = "system/commands.rs"]
mod commands;
#[path = "system/compat.rs"]
mod compat;
#[path = "system/fences.rs"]
mod fences;
#[path = "system/join.rs"]
mod join;
#[path = "system/life.rs"]
mod life;
#[path = "system/link.rs"]
mod link;
#[path = "system/pods.rs"]
mod pods;
#[path = "system/recovery.rs"]
mod recovery;
#[path = "system/revoke.rs"]
mod revoke;
#[path = "system/streams.rs"]
mod streams;
#[path = "system/trust.rs"]
mod trust;

use std::sync::OnceLock;

use anyhow::{Result, anyhow};
use testbed::cluster::Options;
use testbed::programs::K8S_1_37;
use testbed::world::World;

/// The control plane that the tests share. If it does not come up, every test says why. It is
/// removed by the testbed's guard when this program ends, however it ends.
fn world() -> Result<&'static World> {
    static WORLD: OnceLock<Result<World, String>> = OnceLock::new();
    WORLD
        .get_or_init(|| {
            World::start(Options::impatient(K8S_1_37)).map_err(|error| format!("{error:#}"))
        })
        .as_ref()
        .map_err(|reason| anyhow!("no control plane: {reason}"))
}
