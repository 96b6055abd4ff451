//! The one connection: through NAT, without UDP, with another address, quiet at rest.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testbed::edge::{Edge, Transport};
use testbed::wait::{holds_for, wait_for};
use testbed::world::World;

use crate::world;

#[test]
fn two_devices_with_the_same_private_address_serve_behind_their_own_nat() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let edges = [world.edge("nat-1")?, world.edge("nat-2")?];
    for edge in &edges {
        let address = edge
            .machine
            .exec(&["ip", "-4", "-o", "address", "show", "eth0"])?;
        ensure!(address.contains(testbed::netns::EDGE_ADDRESS), "{address}");
        let name = format!("{}-pod", edge.name);
        world.sleeper(&name, &edge.name)?;
    }
    for edge in &edges {
        world.pod_running(edge, &format!("{}-pod", edge.name))?;
    }
    Ok(())
}

#[test]
fn without_udp_the_websocket_serves() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let mut edge = world.machine("no-udp")?;
    edge.machine.drop_udp()?;
    world.join(&mut edge, &[])?;
    world.sleeper("no-udp-pod", "no-udp")?;
    world.pod_running(&edge, "no-udp-pod")?;
    let sockets = edge.machine.exec(&["busybox", "netstat", "-tn"])?;
    let port = format!(":{}", testbed::cloud::PORT);
    ensure!(
        sockets
            .lines()
            .any(|line| line.contains(&port) && line.contains("ESTABLISHED")),
        "no TCP connection to the cloud: {sockets}"
    );
    Ok(())
}

#[test]
fn udp_that_stops_in_mid_session_is_replaced_by_the_websocket() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let edge = world.edge("lost-udp")?;
    edge.machine.drop_udp()?;
    world.sleeper("lost-udp-pod", "lost-udp")?;
    // 45 s until the dead link is noticed, and then a dial.
    wait_for(
        "the Pod over the other transport",
        Duration::from_secs(100),
        || {
            let pod = world.kubectl.json(&["get", "pod", "lost-udp-pod"])?;
            ensure!(pod["status"]["phase"] == "Running", "{}", pod["status"]);
            Ok(())
        },
    )
    .with_context(|| world.story(&edge))
}

#[test]
fn each_transport_can_be_asked_for() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    for (name, transport) in [
        ("by-quic", Transport::Quic),
        ("by-websocket", Transport::Websocket),
    ] {
        let mut edge = world.machine(name)?;
        edge.transport = transport;
        world.join(&mut edge, &[])?;
        let pod = format!("{name}-pod");
        world.sleeper(&pod, name)?;
        world.pod_running(&edge, &pod)?;
    }
    Ok(())
}

#[test]
fn a_new_address_outside_is_survived() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let mut edge = world.edge("moved")?;
    edge.machine.change_address(250)?;
    world.sleeper("moved-pod", "moved")?;
    wait_for("a Pod after the move", Duration::from_secs(100), || {
        let pod = world.kubectl.json(&["get", "pod", "moved-pod"])?;
        ensure!(pod["status"]["phase"] == "Running", "{}", pod["status"]);
        Ok(())
    })
    .with_context(|| world.story(&edge))?;
    world.node_ready(&mut edge)?;
    Ok(())
}

#[test]
fn a_device_at_rest_keeps_to_the_deadline_that_the_cloud_sets() -> Result<()> {
    let world = world()?;
    let _alone = world.alone();
    let restart = |flags: &[&str]| {
        let mut cloud = world.cloud();
        cloud.set_flags(flags);
        cloud.stop()?;
        cloud.resume()
    };
    restart(&["--dead-after", "8s"])?;
    let rested = rest(world);
    restart(&[])?;
    rested
}

/// Two devices join and say nothing for three times the deadline.
fn rest(world: &World) -> Result<()> {
    let mut edges = [world.machine("rests-quic")?, world.machine("rests-ws")?];
    for (edge, transport) in edges
        .iter_mut()
        .zip([Transport::Quic, Transport::Websocket])
    {
        edge.transport = transport;
        world.join(edge, &[])?;
    }
    // The first session brought the deadline, and gave way to one that keeps it.
    std::thread::sleep(Duration::from_secs(3));
    let epochs = || {
        let epoch = |edge: &Edge| {
            let lease = ["-n", "kube-node-lease", "get", "lease", &edge.name];
            let lease = world.kubectl.json(&lease)?;
            lease["spec"]["leaseTransitions"]
                .as_i64()
                .context("an epoch")
        };
        edges.iter().map(epoch).collect::<Result<Vec<_>>>()
    };
    let before = epochs()?;
    holds_for("the sessions", Duration::from_secs(25), || {
        let now = epochs()?;
        ensure!(now == before, "{before:?} became {now:?}");
        Ok(())
    })
    .with_context(|| world.story(&edges[0]))
}
