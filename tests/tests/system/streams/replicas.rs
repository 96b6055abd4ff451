//! A node that moves from one CloudCore to another, and back when that one is lost.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testbed::cloud::Cloud;
use testbed::edge::{Edge, Transport};
use testbed::wait::wait_for;
use testbed::world::World;

use super::{own_edge, shell_pod};
use crate::world;

/// A lost replica is noticed within 45 s, and its node dials again.
const MOVED: Duration = Duration::from_secs(120);

/// Of the second replica: none that the first one gives.
const PORTS: std::ops::RangeInclusive<u64> = 19_000..=19_099;

#[test]
fn a_node_that_moves_to_another_replica_is_reached_there_and_back_again() -> Result<()> {
    let world = world()?;
    let _alone = world.alone();
    let (mut edge, pod) = own_edge("moves-replica", Transport::Auto)?;
    let first = world.cloud().address;
    let mut second = world.cloud().replica()?;
    second.set_flags(&["--kubelet-ports", "19000-19099"]);
    second.resume()?;

    let seen = moves(world, &mut edge, &pod, &mut second);
    let back = edge.machine.lead_back(first, second.address);
    seen.with_context(|| second.tail(30))?;
    back?;
    let serves_again = || {
        is_served(world, &edge, &pod, false)?;
        works(world, &edge, "moved-back")
    };
    serves_again().with_context(|| world.story(&edge))
}

/// To the second replica, which serves and is lost.
fn moves(world: &World, edge: &mut Edge, pod: &str, second: &mut Cloud) -> Result<()> {
    is_served(world, edge, pod, false)?;
    edge.machine.divert(world.cloud().address, second.address)?;
    // A device that has lost its connection dials from a new port; what is open stays where it is.
    edge.kill();
    edge.start()?;
    is_served(world, edge, pod, true)?;
    works(world, edge, "moved-there")?;
    let log = second.text();
    ensure!(
        log.lines()
            .any(|line| line.contains("a tunnel closed") && line.contains(&edge.name)),
        "the exec left no line at the second replica"
    );
    second.kill();
    Ok(())
}

/// The Node has a port of the one or the other replica, and kubectl reaches its Pod there.
fn is_served(world: &World, edge: &Edge, pod: &str, by_second: bool) -> Result<()> {
    wait_for("an exec by way of the right replica", MOVED, || {
        let node = world.kubectl.json(&["get", "node", &edge.name])?;
        let port = node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"].as_u64();
        let is_seconds = port.is_some_and(|port| PORTS.contains(&port));
        ensure!(is_seconds == by_second, "the Node has port {port:?}");
        let said = world.kubectl.ok(&["exec", pod, "--", "hostname"])?;
        ensure!(said.trim() == pod, "{said}");
        Ok(())
    })
}

/// What is asked for in the cluster reaches the device, and what becomes of it the cluster.
fn works(world: &World, edge: &Edge, pod: &str) -> Result<()> {
    let asked = shell_pod(pod, &edge.name, "sleep 1000");
    world.kubectl.apply(&asked.to_string())?;
    world.pod_running(edge, pod)?;
    world
        .kubectl
        .ok(&["delete", "pod", pod, "--grace-period=1", "--wait=false"])?;
    world.pod_gone(edge, pod)
}
