//! Parts of the cloud end and come back; the edges do not mind.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use testbed::edge::Edge;
use testbed::wait::wait_for;
use testbed::world::{SOON, World};

use crate::world;

#[test]
fn killing_cloudcore_and_the_api_server_restarts_nothing() -> Result<()> {
    let world = world()?;
    let _alone = world.alone();
    let mut edge = world.edge("recover")?;
    world.sleeper("recover-1", "recover")?;
    let before = world.pod_running(&edge, "recover-1")?;

    world.cloud().kill();
    world.sleeper("recover-2", "recover")?;
    let begun = Instant::now();
    world.cloud().resume()?;
    world.pod_running(&edge, "recover-2")?;
    println!(
        "cloudcore restarted to a waiting Pod running: {:?}",
        begun.elapsed()
    );

    world.cluster().kill_api();
    world.cluster().start_api()?;
    world.sleeper("recover-3", "recover")?;
    world.pod_running(&edge, "recover-3")?;
    world.node_ready(&mut edge)?;
    world.same_container(&edge, &before).map(drop)
}

#[test]
fn a_runtime_that_comes_late_is_reported_and_then_used() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let mut edge = Edge::bare(&world.backbone, "late-runtime")?;
    let invitation = world.cloud().invite(&[])?;
    edge.join(&invitation)?;
    says_no_runtime(world, &mut edge)?;
    edge.start_runtime()?;
    world.node_ready(&mut edge)?;
    world.sleeper("late-pod", "late-runtime")?;
    world.pod_running(&edge, "late-pod")?;
    Ok(())
}

#[test]
fn a_runtime_that_goes_away_is_reported_and_the_pods_go_on() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let mut edge = world.edge("lost-runtime")?;
    world.sleeper("stays-1", "lost-runtime")?;
    let before = world.pod_running(&edge, "stays-1")?;
    edge.containerd.as_mut().context("a runtime")?.kill();
    says_no_runtime(world, &mut edge)?;
    edge.start_runtime()?;
    world.node_ready(&mut edge)?;
    world.sleeper("stays-2", "lost-runtime")?;
    world.pod_running(&edge, "stays-2")?;
    world.same_container(&edge, &before).map(drop)
}

#[test]
fn the_admin_endpoint_shows_every_session_and_its_figures() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let edge = world.edge("shown")?;
    let admin = world.cloud().admin;
    let fetch = |path: &str| get(admin, path);
    for path in ["/healthz", "/readyz"] {
        let said = fetch(path)?;
        ensure!(said.ends_with("ok") || said.ends_with("ok\n"), "{said}");
    }
    wait_for("the session", SOON, || {
        let said = fetch("/sessions")?;
        ensure!(said.contains("\"node\":\"shown\""), "{said}");
        Ok(())
    })
    .with_context(|| world.story(&edge))?;
    let metrics = fetch("/metrics")?;
    for name in [
        "cloudcore_sessions{transport=\"quic\"}",
        "cloudcore_hub_bytes_total{direction=\"sent\",class=\"status\"}",
        "cloudcore_hub_frames_total{direction=\"received\",class=\"control\"}",
        "cloudcore_resume_bytes_sum",
        "cloudcore_hub_queued_bytes",
        "cloudcore_upstream_queued",
    ] {
        let value = metrics
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .with_context(|| format!("no {name}: {metrics}"))?;
        let _: f64 = value.trim().parse().context("a figure")?;
    }
    // It only looks: nothing can be changed by it.
    let answer = ask(
        admin,
        "POST /sessions HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n",
    )?;
    ensure!(!answer.starts_with("HTTP/1.1 2"), "{answer}");
    Ok(())
}

/// The Node is not Ready, for want of its runtime.
fn says_no_runtime(world: &World, edge: &mut Edge) -> Result<()> {
    wait_for("a Node that says that its runtime is away", SOON, || {
        edge.ensure_running()?;
        let node = world.kubectl.json(&["get", "node", &edge.name])?;
        let conditions = node["status"]["conditions"].as_array();
        let ready = conditions
            .into_iter()
            .flatten()
            .find(|condition| condition["type"] == "Ready")
            .context("no condition")?;
        ensure!(ready["status"] == "False", "{ready}");
        let told = ready["message"].as_str().unwrap_or_default();
        ensure!(told.contains("runtime"), "{ready}");
        Ok(())
    })
    .with_context(|| world.story(edge))
}

/// The answer, head included.
#[test]
fn askers_that_stay_keep_nobody_from_the_admin_endpoint() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let at = world.cloud().admin;
    // As many as it serves at once, which were answered and do not go.
    let mut staying = Vec::new();
    for _ in 0..32 {
        let mut stream = TcpStream::connect(at)?;
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")?;
        staying.push(stream);
    }
    let begun = Instant::now();
    get(at, "/healthz")?;
    ensure!(begun.elapsed() < Duration::from_secs(5), "it came late");
    Ok(())
}

fn get(at: SocketAddr, path: &str) -> Result<String> {
    let answer = ask(at, &format!("GET {path} HTTP/1.1\r\nHost: a\r\n"))?;
    ensure!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
    Ok(answer)
}

fn ask(at: SocketAddr, head: &str) -> Result<String> {
    let mut stream = TcpStream::connect(at)?;
    stream.set_read_timeout(Some(SOON))?;
    stream.write_all(format!("{head}Connection: close\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
