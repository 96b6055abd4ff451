//! Parts of the cloud end and come back; the edges do not mind.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use testbed::wait::wait_for;
use testbed::world::{SOON, container_id, shell_pod};

use crate::world;

#[test]
fn killing_cloudcore_and_the_api_server_restarts_nothing() -> Result<()> {
    let world = world()?;
    let _alone = world.alone();
    let mut edge = world.edge("recover")?;
    world
        .kubectl
        .apply(&shell_pod("recover-1", "recover", "sleep 1000").to_string())?;
    let before = world.pod_running(&edge, "recover-1")?;

    world.cloud().kill();
    world
        .kubectl
        .apply(&shell_pod("recover-2", "recover", "sleep 1000").to_string())?;
    let begun = Instant::now();
    world.cloud().resume()?;
    world.pod_running(&edge, "recover-2")?;
    println!(
        "cloudcore restarted to a waiting Pod running: {:?}",
        begun.elapsed()
    );

    world.cluster().kill_api();
    world.cluster().start_api()?;
    world
        .kubectl
        .apply(&shell_pod("recover-3", "recover", "sleep 1000").to_string())?;
    world.pod_running(&edge, "recover-3")?;
    world.node_ready(&mut edge)?;
    let after = world.pod_running(&edge, "recover-1")?;
    ensure!(
        container_id(&before)? == container_id(&after)?,
        "the container was replaced"
    );
    Ok(())
}

#[test]
fn a_runtime_that_comes_late_is_reported_and_then_used() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let mut edge = testbed::edge::Edge::bare(&world.backbone, "late-runtime")?;
    let invitation = world.cloud().invite(&[])?;
    edge.join(&invitation)?;
    wait_for("a Node that says it has no runtime", SOON, || {
        edge.ensure_running()?;
        let node = world.kubectl.json(&["get", "node", "late-runtime"])?;
        let ready = testbed::world::condition(&node, "Ready");
        ensure!(ready == Some("False"), "{}", node["status"]["conditions"]);
        Ok(())
    })
    .with_context(|| world.story(&edge))?;
    edge.start_runtime()?;
    world.node_ready(&mut edge)?;
    world
        .kubectl
        .apply(&shell_pod("late-pod", "late-runtime", "sleep 1000").to_string())?;
    world.pod_running(&edge, "late-pod")?;
    Ok(())
}
