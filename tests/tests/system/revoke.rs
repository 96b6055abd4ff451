//! Ending an enrolment ends everything that it allowed.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testbed::wait::{holds_for, wait_for};
use testbed::world::SOON;

use crate::world;

#[test]
fn a_revoked_device_is_out_until_it_has_a_new_token() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let mut edge = world.edge("revoked")?;
    world.cloud().revoke("revoked")?;
    wait_for("end of the Node", SOON, || {
        world.kubectl.ensure_gone("node", "revoked")
    })
    .with_context(|| world.story(&edge))?;

    // Its certificate opens nothing any more, neither from the running agent nor from a new one.
    edge.kill();
    edge.start()?;
    holds_for("the device stays out", Duration::from_secs(10), || {
        world.kubectl.ensure_gone("node", "revoked")
    })?;

    edge.kill();
    world.join(&mut edge, &[])?;
    let list = world.cloud().command(&["node", "list"])?;
    ensure!(list.contains("revoked"), "{list}");
    Ok(())
}
