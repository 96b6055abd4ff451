//! The main path on the oldest control plane that is supported.

use anyhow::Result;
use testbed::cluster::Options;
use testbed::programs::K8S_1_33;
use testbed::world::World;

use crate::{pods, streams};

#[test]
fn the_main_path_holds_on_kubernetes_1_33() -> Result<()> {
    let world = World::start(Options::impatient(K8S_1_33))?;
    pods::deployment_comes_and_goes(&world, "old-deploy")?;
    pods::configmap_reaches_the_file(&world, "old-config")?;
    pods::secret_is_mounted(&world, "old-secret")?;
    streams::logs_and_exec(&world, "old-streams")?;
    let mut edge = world.edge("old-revoke")?;
    edge.kill();
    edge.start()?;
    world.node_ready(&mut edge)?;
    world.cloud().revoke("old-revoke").map(drop)
}
