//! What readers that stand still may cost the others, and the limit of tunnels.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use testbed::bench::quiet::pss;
use testbed::edge::{Edge, Transport};
use testbed::kubelet::{Body, Kubelet, endpoint};
use testbed::wait::wait_for;
use testbed::world::{SOON, shell_pod};

use super::own_edge;
use crate::world;

/// More than the windows and buffers of the whole way hold, and less than is rotated.
const LINES: u32 = 120_000;

/// What one tunnel may hold at either end.
const HELD: f64 = 256.0 * 1024.0;

#[test]
fn readers_that_stand_still_delay_nobody_over_quic() -> Result<()> {
    stands_still("still-quic", Transport::Quic)
}

#[test]
fn readers_that_stand_still_delay_nobody_over_websocket() -> Result<()> {
    stands_still("still-ws", Transport::Websocket)
}

fn stands_still(name: &str, transport: Transport) -> Result<()> {
    let world = world()?;
    // What others do meanwhile would count as held.
    let _alone = world.alone();
    let (edge, quick) = own_edge(name, transport)?;
    let chatty = format!("{name}-chatty");
    let script = format!("seq 1 {LINES} | awk '{{ printf \"%060d\\n\", $1 }}'; sleep 86400");
    world
        .kubectl
        .apply(&shell_pod(&chatty, name, &script).to_string())?;
    world.pod_running(&edge, &chatty)?;
    wait_for("the whole log", SOON, || {
        let said = world.kubectl.ok(&["logs", &chatty, "--tail=1"])?;
        ensure!(
            said.trim_start_matches('0').trim() == LINES.to_string(),
            "{said}"
        );
        Ok(())
    })?;
    let node = world.kubectl.json(&["get", "node", name])?;
    let pair = world.cluster().kubelet_client().clone();
    let kubelet = Kubelet::new(endpoint(&node)?, Some(&pair))?;

    let before = memory(&edge)?;
    let mut still = open_all(&kubelet, &chatty).with_context(|| world.story(&edge))?;
    println!("{name}: {} readers stand still", still.len());
    // The command of an operator who comes now says what is wrong.
    let said = world.kubectl.run(&["exec", &quick, "--", "true"])?;
    ensure!(
        said.code != 0 && said.stderr.contains("streams"),
        "{said:?}"
    );

    // All but one of them: the place is somebody else's.
    still.pop();
    wait_for("an exec beside them", SOON, || {
        world.kubectl.ok(&["exec", &quick, "--", "true"])
    })
    .with_context(|| world.story(&edge))?;
    let begun = Instant::now();
    world.kubectl.ok(&["exec", &quick, "--", "true"])?;
    let exec = begun.elapsed();
    let begun = Instant::now();
    let pod = format!("{name}-new");
    world
        .kubectl
        .apply(&shell_pod(&pod, name, "sleep 1000").to_string())?;
    world.pod_running(&edge, &pod)?;
    let status = begun.elapsed();
    println!("{name}: beside them an exec takes {exec:?}, a Pod {status:?}");
    ensure!(exec < Duration::from_secs(5), "an exec took {exec:?}");
    ensure!(status < Duration::from_secs(15), "a Pod took {status:?}");

    let after = memory(&edge)?;
    for (who, before, after) in [
        ("edgecore", before.0, after.0),
        ("cloudcore", before.1, after.1),
    ] {
        let each = (after - before) / still.len() as f64;
        println!("{name}: {who} holds {each:.0} bytes for each");
        ensure!(each <= HELD, "{who} holds {each:.0} bytes for each");
    }
    drop(still);
    wait_for("the places", SOON, || open_all(&kubelet, &chatty).map(drop))
        .with_context(|| world.story(&edge))
}

/// PSS of edgecore and cloudcore.
fn memory(edge: &Edge) -> Result<(f64, f64)> {
    let cloud = world()?.cloud().pid().context("cloudcore does not run")?;
    Ok((
        pss(edge.pid().context("edgecore does not run")?)?,
        pss(cloud)?,
    ))
}

/// As many readers as are let in, none of whom reads; at least half of what a node is meant to have.
fn open_all(kubelet: &Kubelet, pod: &str) -> Result<Vec<Body>> {
    let path = format!("/containerLogs/default/{pod}/main?follow=true");
    let mut open = Vec::new();
    loop {
        match kubelet.open(&path)? {
            Ok(body) => open.push(body),
            Err(refused) => {
                // The words of a 429 would not reach a reader of logs.
                ensure!(refused.status == 500, "{refused:?}");
                ensure!(refused.body.contains("streams"), "{refused:?}");
                ensure!(open.len() >= 60, "only {} are let in", open.len());
                return Ok(open);
            }
        }
        ensure!(open.len() <= 256, "there is no limit");
    }
}
