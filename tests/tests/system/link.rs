//! The one connection: through NAT, without UDP, with another address, quiet at rest.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testbed::edge::Transport;
use testbed::wait::wait_for;

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
