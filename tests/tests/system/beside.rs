//! Two edgecores on one device: another name, another data directory, another runtime.

use anyhow::{Context, Result, ensure};
use testbed::cloud::product;
use testbed::containerd::{Containerd, Flavour};
use testbed::wait::{holds_for, wait_for};
use testbed::world::{SOON, condition, container_id, restarts};

use crate::world;

#[test]
fn two_edgecores_serve_beside_each_other_on_one_device() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let edge = world.edge("beside-1")?;
    world.sleeper("beside-pod-1", "beside-1")?;
    let first = world.pod_running(&edge, "beside-pod-1")?;

    let runtime = Containerd::start_as(
        &edge.machine,
        Flavour::Packaged,
        edge.images_dir()?,
        "containerd-2",
    )?;
    let invitation = world.cloud().invite(&["--node", "beside-2"])?;
    let program = product("edgecore")?;
    let program = program.to_str().context("path of edgecore")?;
    let data = edge.machine.dir.join("edgecore-2");
    let second = || {
        edge.machine.spawn(program, |command| {
            command.args(["--join", &invitation.join, "--token", &invitation.token]);
            command.args(["--name", "beside-2", "--cri", &runtime.endpoint()]);
            command.arg("--data-dir").arg(&data);
        })
    };
    let mut process = second()?;
    wait_for("the second Node", SOON, || {
        process.ensure_running()?;
        let node = world.kubectl.json(&["get", "node", "beside-2"])?;
        ensure!(
            condition(&node, "Ready") == Some("True"),
            "{}",
            node["status"]
        );
        Ok(())
    })
    .with_context(|| process.tail(40))?;
    world.sleeper("beside-pod-2", "beside-2")?;
    let pod = world.pod_running(&edge, "beside-pod-2")?;

    // Each in its own runtime, and with an address that the other has not.
    let (one, two) = (container_id(&first)?, container_id(&pod)?);
    let own = runtime.ctr(&edge.machine, &["containers", "ls", "-q"])?;
    ensure!(own.contains(&two) && !own.contains(&one), "{own}");
    ensure!(
        first["status"]["podIP"] != pod["status"]["podIP"],
        "{}",
        pod["status"]
    );

    // The end of one agent is nothing to the other, nor to any Pod.
    process.kill();
    process = second()?;
    holds_for("both Pods", std::time::Duration::from_secs(8), || {
        for (name, id) in [("beside-pod-1", &one), ("beside-pod-2", &two)] {
            let pod = world.kubectl.json(&["get", "pod", name])?;
            ensure!(container_id(&pod)? == *id, "{name} was replaced");
            ensure!(restarts(&pod) == Some(0), "{}", pod["status"]);
        }
        Ok(())
    })?;
    process.ensure_running()?;
    world
        .kubectl
        .ok(&["delete", "pod", "beside-pod-2", "--wait=false"])?;
    world.pod_gone(&edge, "beside-pod-2")
}
