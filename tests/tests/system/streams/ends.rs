//! Tunnels whose one end goes: kubectl, the link, cloudcore, edgecore, the enrolment.
//!
//! A kubectl comes to its end then, within a bound; that it was no good end is in cloudcore's audit
//! line. What a kubectl exits with is not demanded: an API server that speaks SPDY with a node takes
//! the loss of a stream for its end and tells the client of a success, whoever serves the node (a
//! stock kubelet too; tried with kubectl 1.20 and 1.37 and a kubelet that was killed).

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use testbed::cloud::product;
use testbed::edge::{Edge, Transport};
use testbed::kubectl::Kubectl;
use testbed::running::Running;
use testbed::wait::{wait_every, wait_for};
use testbed::world::SOON;

use super::{MOMENT, odd_time, own_edge, place, runs};
use crate::world;

/// Half-dead links are noticed within 45 s; the rest is what this machine takes.
const NOTICED: Duration = Duration::from_secs(75);

/// An exec that runs until somebody ends it, and the time that its process sleeps.
fn long_exec(kubectl: &Kubectl, pod: &str) -> Result<(Running, String)> {
    let marker = odd_time();
    let script = format!("echo here; sleep {marker}");
    let mut exec = kubectl.start(&["exec", pod, "--", "sh", "-c", &script])?;
    exec.sees("here", MOMENT)?;
    wait_for("the process", MOMENT, || {
        ensure!(runs(&["sleep", &marker]), "it does not run");
        Ok(())
    })?;
    Ok((exec, marker))
}

/// kubectl comes to an end by itself.
fn ends(mut exec: Running, limit: Duration) -> Result<()> {
    exec.end(limit).map(drop)
}

/// cloudcore says of an exec on that node that it was broken off.
fn told_broken(node: &str) -> Result<()> {
    wait_for("the audit line of the broken exec", SOON, || {
        let log = world()?.cloud().text();
        let mut lines = log.lines();
        let broken = |line: &&str| {
            line.contains("a tunnel closed")
                && line.contains(node)
                && line.contains("exec")
                && !line.contains("complete")
        };
        lines.find(broken).map(drop).context("there is none")
    })
}

fn process_ends(marker: &str, limit: Duration) -> Result<()> {
    let pause = Duration::from_millis(20);
    wait_every("end of the process in the container", limit, pause, || {
        ensure!(!runs(&["sleep", marker]), "it runs");
        Ok(())
    })
}

#[test]
fn a_kubectl_that_is_killed_leaves_no_process_in_the_container() -> Result<()> {
    for transport in [Transport::Quic, Transport::Websocket] {
        let place = place(transport)?;
        let pod = place.shell("left", "sleep 1000")?;
        // The shell's child is the one that goes on sleeping, and nothing is written that could fail.
        let (mut exec, marker) = long_exec(&place.kubectl, &pod)?;
        exec.kill();
        process_ends(&marker, Duration::from_secs(3)).with_context(|| place.story())?;

        let marker = odd_time();
        let words = ["exec", &pod, "--", "sleep", &marker];
        let mut exec = place.kubectl.start(&words)?;
        wait_for("the process", MOMENT, || {
            ensure!(runs(&["sleep", &marker]), "it does not run");
            Ok(())
        })?;
        exec.kill();
        process_ends(&marker, Duration::from_secs(3)).with_context(|| place.story())?;
        // The container's own process is none of theirs.
        place.kubectl.ok(&["exec", &pod, "--", "true"])?;
    }
    Ok(())
}

#[test]
fn a_cut_link_ends_what_runs_and_the_device_can_be_asked_at_itself() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let edges = [
        own_edge("cut-exec-quic", Transport::Quic)?,
        own_edge("cut-exec-ws", Transport::Websocket)?,
    ];
    let mut running = Vec::new();
    for (edge, pod) in &edges {
        running.push(long_exec(&world.kubectl, pod).with_context(|| world.story(edge))?);
    }
    let begun = Instant::now();
    for (edge, _) in &edges {
        edge.machine.cut()?;
    }
    for (edge, pod) in &edges {
        asks_itself(edge, pod).with_context(|| edge.tail(20))?;
    }
    for ((edge, _), (exec, marker)) in edges.iter().zip(running) {
        ends(exec, NOTICED).with_context(|| world.story(edge))?;
        println!("{} after {:?}", edge.name, begun.elapsed());
        told_broken(&edge.name)?;
        process_ends(&marker, NOTICED).with_context(|| edge.tail(20))?;
    }
    // Whoever asks now is told what is wrong, and not left to wait.
    let (edge, pod) = &edges[0];
    let begun = Instant::now();
    for words in [&["exec", pod, "--", "true"][..], &["logs", pod]] {
        let said = world.kubectl.run(words)?;
        ensure!(
            said.code != 0
                && said.stderr.contains(&edge.name)
                && said.stderr.contains("not connected"),
            "{words:?}: {said:?}"
        );
    }
    ensure!(
        begun.elapsed() < Duration::from_secs(15),
        "{:?}",
        begun.elapsed()
    );
    for (edge, _) in &edges {
        edge.machine.restore()?;
    }
    for (_, pod) in &edges {
        wait_for("an exec over the new link", NOTICED, || {
            world.kubectl.ok(&["exec", pod, "--", "true"])
        })?;
    }
    Ok(())
}

/// `edgecore ctl` on the device.
fn asks_itself(edge: &Edge, pod: &str) -> Result<()> {
    let program = product("edgecore")?;
    let program = program.to_str().context("path of edgecore")?;
    let socket = edge.data_dir().join("admin.sock");
    let socket = socket.to_str().context("path of the socket")?;
    let ctl = |words: &[&str]| {
        let fixed = [program, "ctl", "--admin", socket];
        edge.machine.output(&[&fixed[..], words].concat())
    };
    let said = ctl(&["get", "pods"])?;
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    ensure!(said.status.success(), "{said:?}");
    ensure!(
        text.lines()
            .any(|row| row.contains(pod) && row.contains("Running")),
        "{text}"
    );
    let said = ctl(&[
        "exec",
        pod,
        "--",
        "sh",
        "-c",
        "hostname; echo noted >/proc/1/fd/1; exit 3",
    ])?;
    let text = String::from_utf8_lossy(&said.stdout);
    ensure!(
        text.trim() == pod && said.status.code() == Some(3),
        "{said:?}"
    );
    let said = ctl(&["logs", pod])?;
    ensure!(
        said.status.success() && said.stdout == b"noted\n",
        "{said:?}"
    );
    let said = ctl(&["logs", "no-such-pod"])?;
    ensure!(
        !said.status.success() && !said.stderr.is_empty(),
        "{said:?}"
    );
    Ok(())
}

#[test]
fn an_edgecore_that_is_killed_ends_its_tunnels_and_the_next_one_serves() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    for (name, transport) in [
        ("killed-quic", Transport::Quic),
        ("killed-ws", Transport::Websocket),
    ] {
        let (mut edge, pod) = own_edge(name, transport)?;
        let (exec, _) = long_exec(&world.kubectl, &pod)?;
        edge.kill();
        edge.start()?;
        ends(exec, MOMENT).with_context(|| world.story(&edge))?;
        told_broken(name)?;
        // Of what the killed one had started nobody knows any more, as with a kubelet.
        wait_for("an exec by the next one", SOON, || {
            world.kubectl.ok(&["exec", &pod, "--", "true"])
        })
        .with_context(|| world.story(&edge))?;
    }
    Ok(())
}

#[test]
fn a_node_that_is_revoked_loses_its_tunnels() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let (edge, pod) = own_edge("revoked-exec", Transport::Quic)?;
    let (exec, marker) = long_exec(&world.kubectl, &pod)?;
    world.cloud().revoke(&edge.name)?;
    ends(exec, MOMENT).with_context(|| world.story(&edge))?;
    told_broken(&edge.name)?;
    process_ends(&marker, MOMENT).with_context(|| world.story(&edge))
}

#[test]
fn a_cloudcore_that_is_killed_ends_its_tunnels_and_comes_back_with_the_same_ports() -> Result<()> {
    let world = world()?;
    let _alone = world.alone();
    let edges = [
        own_edge("ports-quic", Transport::Quic)?,
        own_edge("ports-ws", Transport::Websocket)?,
    ];
    let mut running = Vec::new();
    for (_, pod) in &edges {
        running.push(long_exec(&world.kubectl, pod)?);
    }
    let before = ports()?;
    world.cloud().kill();
    let all_end = || {
        for ((edge, _), (exec, marker)) in edges.iter().zip(running) {
            ends(exec, MOMENT).with_context(|| edge.tail(20))?;
            process_ends(&marker, NOTICED).with_context(|| edge.tail(20))?;
        }
        Ok::<_, anyhow::Error>(())
    };
    let ended = all_end();
    // Whatever came of it: the other tests need it.
    world.cloud().resume()?;
    ended?;
    for (edge, pod) in &edges {
        wait_for("an exec by way of the new one", NOTICED, || {
            let said = world.kubectl.ok(&["exec", pod, "--", "hostname"])?;
            ensure!(said.trim() == pod, "{said}");
            Ok(())
        })
        .with_context(|| world.story(edge))?;
    }
    for (node, port) in ports()? {
        let old = before.iter().find(|(name, _)| *name == node);
        ensure!(
            old.is_none_or(|(_, old)| *old == port),
            "{node} had {old:?} and has {port}"
        );
    }
    Ok(())
}

/// The kubelet port of every Node that has one.
fn ports() -> Result<Vec<(String, u64)>> {
    let nodes = world()?.kubectl.json(&["get", "nodes"])?;
    let nodes = nodes["items"].as_array().context("a list")?;
    let port = |node: &serde_json::Value| {
        let port = node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"].as_u64()?;
        Some((node["metadata"]["name"].as_str()?.to_owned(), port))
    };
    let found: Vec<(String, u64)> = nodes.iter().filter_map(port).collect();
    let mut numbers: Vec<u64> = found.iter().map(|(_, port)| *port).collect();
    numbers.sort_unstable();
    numbers.dedup();
    ensure!(
        numbers.len() == found.len(),
        "two Nodes share a port: {found:?}"
    );
    Ok(found)
}

#[test]
fn a_new_address_outside_is_nothing_to_an_exec_over_quic_and_an_end_over_websocket() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let (quic, quic_pod) = own_edge("moves-quic", Transport::Quic)?;
    let (websocket, websocket_pod) = own_edge("moves-ws", Transport::Websocket)?;
    let mut stays = world
        .kubectl
        .start(&["exec", "-i", &quic_pod, "--", "cat"])?;
    stays.say("before\n")?;
    stays.sees("before\n", MOMENT)?;
    let (mut goes, _) = long_exec(&world.kubectl, &websocket_pod)?;
    let mut follows = world.kubectl.start(&["logs", "-f", &websocket_pod])?;

    quic.machine.change_address(251)?;
    websocket.machine.change_address(252)?;
    stays.say("after\n")?;
    stays
        .sees("after\n", MOMENT)
        .with_context(|| world.story(&quic))?;
    stays.close_input();
    stays.end(MOMENT)?.ok()?;
    let ended = goes.end(NOTICED);
    let ended = ended.with_context(|| world.story(&websocket))?;
    ensure!(ended.code != 0 && !ended.stderr.is_empty(), "{ended}");
    // A log is asked for again by a new kubectl; an older one ends with an error.
    let line = [
        "exec",
        &websocket_pod,
        "--",
        "sh",
        "-c",
        "echo again >/proc/1/fd/1",
    ];
    wait_for("an exec over the new session", NOTICED, || {
        world.kubectl.ok(&line)
    })?;
    if follows.sees("again", MOMENT).is_err() {
        let ended = follows.end(MOMENT)?;
        ensure!(ended.code != 0 && !ended.stderr.is_empty(), "{ended}");
    }
    told_broken(&websocket.name)
}
