//! What streams cost: the time of an exec, the speed of copies, the memory of very many tunnels.
//!
//! Execs and copies take turns with the stock kubelet's, sample by sample.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use super::Flags;
use super::pods::{Turn, resting_pod};
use super::quiet::pss;
use super::rig::{Node, Rig, Side};
use super::table::{Row, milliseconds, p50, quantile, show_bytes, show_ms};
use crate::bed::{lock, progress};
use crate::forward::Forward;
use crate::kubectl::Kubectl;
use crate::kubelet::{Body, Kubelet, Protocol, endpoint};
use crate::wait::wait_for;

/// A big file, and how long one copy of it may take.
const BIG: u64 = 256 << 20;
const COPY: Duration = Duration::from_secs(120);
/// Copies of each kind on each side; the median counts.
const COPIES: usize = 3;

/// Callers at once, well below a node's limit of tunnels.
const CALLERS: usize = 8;
/// One tunnel of so many is an exec that runs a process, the others a question to the agent.
const EXEC_OF: u32 = 10;
/// Before the first reading, so that caches and the allocator hold what they hold for good.
const WARM: u32 = 200;
/// Before each reading: what the last tunnels left is gone.
const SETTLE: Duration = Duration::from_secs(30);

// Execs

/// Round trips of `true` on every node in turn.
pub fn execs(flags: &Flags, rig: &Rig) -> Vec<Row> {
    let (measure, bar) = ("exec of true", "<= 1.3 x the peer's");
    match timed(flags, rig).with_context(|| rig.story()) {
        Ok(found) => exec_rows(flags, bar, &found),
        Err(error) => vec![Row::broken(measure, bar, &error)],
    }
}

fn exec_rows(flags: &Flags, bar: &str, found: &[(Side, Vec<f64>)]) -> Vec<Row> {
    let peer = found.iter().find(|(side, _)| *side == Side::Peer);
    let peer = peer.and_then(|(_, samples)| p50(samples));
    let mut rows = Vec::new();
    for (side, samples) in found {
        if *side == Side::Peer && !flags.peer_only {
            continue;
        }
        let name = format!("exec of true, p50 of {}, {}", flags.execs, side.word());
        let ours = p50(samples).filter(|_| *side != Side::Peer);
        let ratio = ours.zip(peer).map(|(ours, peer)| ours / peer);
        let slow = quantile(samples, 0.99).map(show_ms).unwrap_or_default();
        let row = Row::new(&name, bar).beside(ours, peer, show_ms);
        rows.push(row.judged(ratio, 1.3).noted(format!("p99 {slow}")));
    }
    rows
}

fn timed(flags: &Flags, rig: &Rig) -> Result<Vec<(Side, Vec<f64>)>> {
    let admin = rig.cluster.certificate("bench-exec", &["system:masters"])?;
    let api = Kubelet::new(rig.cluster.api_address(), Some(&admin))?;
    let mut sides = Vec::new();
    for node in rig.nodes() {
        sides.push((node.side, resting(rig, node, "exec")?, Vec::new()));
    }
    // The first round fills caches on all sides and is not counted.
    for round in 0..=flags.execs {
        for (_, pod, samples) in &mut sides {
            let took = round_trip(&api, pod)?;
            if round > 0 {
                samples.push(milliseconds(took));
            }
        }
    }
    Ok(sides
        .into_iter()
        .map(|(side, _, samples)| (side, samples))
        .collect())
}

/// A Pod that does nothing, running.
fn resting(rig: &Rig, node: Node<'_>, what: &str) -> Result<String> {
    let mut api = rig.api()?;
    let name = format!("{what}-{}", node.name);
    let pod = resting_pod(&name, node.name, json!(["sleep", "86400"]));
    Turn::build(&api, node)?.create(&mut api, &pod)?;
    Ok(name)
}

/// As a new kubectl asks, on a connection that is ready: from the request to the command's success.
fn round_trip(api: &Kubelet, pod: &str) -> Result<Duration> {
    let path =
        format!("/api/v1/namespaces/default/pods/{pod}/exec?command=true&stdout=true&stderr=true");
    let fresh = api.connect()?;
    let begun = Instant::now();
    match api.upgrade_on(fresh, "GET", &path, Protocol::WebsocketV5)? {
        Ok(body) => succeeds(body)?,
        Err(answer) => bail!("exec in {pod}: {answer:?}"),
    }
    Ok(begun.elapsed())
}

/// Reads a remote command's stream until its status, which must be a success.
fn succeeds(mut body: Body) -> Result<()> {
    let (mut seen, mut buffer) = (Vec::new(), [0; 1024]);
    loop {
        let size = body.read(&mut buffer)?;
        seen.extend_from_slice(&buffer[..size]);
        let text = String::from_utf8_lossy(&seen);
        if text.contains(r#""status":"Success""#) {
            return Ok(());
        }
        ensure!(
            size > 0 && !text.contains("Failure"),
            "the exec failed: {text}"
        );
    }
}

// Copies

/// One way of moving many bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    FromPod,
    ToPod,
    Forwarded,
}

const WAYS: [Way; 3] = [Way::FromPod, Way::ToPod, Way::Forwarded];

impl Way {
    fn word(self) -> &'static str {
        match self {
            Way::FromPod => "kubectl cp from a Pod",
            Way::ToPod => "kubectl cp to a Pod",
            Way::Forwarded => "port-forward from a Pod",
        }
    }
}

/// Bytes a second of each way, on every node in turn.
pub fn copies(rig: &Rig) -> Vec<Row> {
    let bar = ">= 150 MB/s or 0.7 x the peer's";
    let mut rows = Vec::new();
    for way in WAYS {
        progress(&format!("    {}", way.word()));
        let found = match copied(rig, way).with_context(|| rig.story()) {
            Ok(found) => found,
            Err(error) => {
                rows.push(Row::broken(way.word(), bar, &error));
                continue;
            }
        };
        let of = |wanted| {
            let side = found.iter().find(|(side, _)| *side == wanted);
            side.and_then(|(_, rates)| p50(rates))
        };
        let peer = of(Side::Peer);
        for side in [Side::Quic, Side::Websocket] {
            let name = format!("{}, {} MiB, {}", way.word(), BIG >> 20, side.word());
            rows.push(Row::new(&name, bar).rated(of(side), peer, 150e6, 0.7));
        }
    }
    rows
}

fn copied(rig: &Rig, way: Way) -> Result<Vec<(Side, Vec<f64>)>> {
    let kubectl = &rig.cluster.kubectl;
    let dir = rig.kubeconfig.with_file_name("copies");
    fs::create_dir_all(&dir)?;
    let file = dir.join("big");
    fs::File::create(&file)?.set_len(BIG)?;
    let mut sides = Vec::new();
    for node in rig.nodes() {
        sides.push((node.side, with_big_file(rig, node, way)?, Vec::new()));
    }
    for _ in 0..COPIES {
        for (_, pod, rates) in &mut sides {
            let took = moved(kubectl, pod, way, &file)?;
            rates.push(BIG as f64 / took.as_secs_f64());
        }
    }
    for (_, pod, _) in &sides {
        kubectl.ok(&["delete", "pod", pod, "--wait=false"])?;
    }
    fs::remove_dir_all(&dir)?;
    let rates = sides.into_iter().map(|(side, _, rates)| (side, rates));
    Ok(rates.collect())
}

/// A Pod that has the file, and sends it to whoever connects.
fn with_big_file(rig: &Rig, node: Node<'_>, way: Way) -> Result<String> {
    let mut api = rig.api()?;
    let number = WAYS.iter().position(|one| *one == way).unwrap_or_default();
    let name = format!("big-{number}-{}", node.name);
    let script = format!(
        "dd if=/dev/zero of=/tmp/big bs=1M count={} && touch /tmp/up && \
         exec nc -ll -p 7003 -e cat /tmp/big",
        BIG >> 20
    );
    let pod = resting_pod(&name, node.name, json!(["/bin/sh", "-c", script]));
    Turn::build(&api, node)?.create(&mut api, &pod)?;
    wait_for("the big file", COPY, || {
        let words = ["exec", &name, "--", "ls", "/tmp/up"];
        rig.cluster.kubectl.ok(&words)
    })?;
    Ok(name)
}

fn moved(kubectl: &Kubectl, pod: &str, way: Way, file: &Path) -> Result<Duration> {
    let local = file.to_str().context("path of the file")?;
    let copy = |from: &str, to: &str| {
        let begun = Instant::now();
        kubectl.start(&["cp", from, to])?.end(COPY)?.ok()?;
        Ok(begun.elapsed())
    };
    match way {
        Way::FromPod => copy(&format!("{pod}:/tmp/big"), local),
        Way::ToPod => copy(local, &format!("{pod}:/tmp/copied")),
        Way::Forwarded => {
            let forward = Forward::start(kubectl, pod, &[7003])?;
            let mut stream = forward.dial(0)?;
            let begun = Instant::now();
            let size = std::io::copy(&mut stream, &mut std::io::sink())?;
            ensure!(size == BIG, "{size} bytes came");
            Ok(begun.elapsed())
        }
    }
}

// Tunnels

/// Opens and closes very many, and reads the memory of both ends before and after.
pub fn leaks(flags: &Flags, rig: &Rig) -> Vec<Row> {
    let mut rows = Vec::new();
    for side in [Side::Quic, Side::Websocket] {
        progress(&format!("    {} tunnels, {}", flags.tunnels, side.word()));
        let bar = "<= 1.05 x before";
        match leaked(flags, rig, side).with_context(|| rig.story()) {
            Ok(found) => rows.extend(found.map(|(who, before, after)| {
                let name = format!("{who} after {} tunnels, {}", flags.tunnels, side.word());
                let row = Row::new(&name, bar).beside(Some(after), None, show_bytes);
                row.judged(Some(after / before), 1.05)
                    .noted(format!("{} before", show_bytes(before)))
            })),
            Err(error) => rows.push(Row::broken("memory after tunnels", bar, &error)),
        }
    }
    rows
}

fn leaked(flags: &Flags, rig: &Rig, side: Side) -> Result<[(&'static str, f64, f64); 2]> {
    let node = rig.node(side)?;
    let cloud = rig.cloud.as_ref().and_then(|cloud| cloud.pid());
    let pids = [
        cloud.context("cloudcore does not run")?,
        node.pid.context("edgecore does not run")?,
    ];
    let memory = || {
        std::thread::sleep(SETTLE);
        Ok::<_, anyhow::Error>([pss(pids[0])?, pss(pids[1])?])
    };
    let pod = resting(rig, node, "leak")?;
    let object = rig.cluster.kubectl.json(&["get", "node", node.name])?;
    let kubelet = Kubelet::new(endpoint(&object)?, Some(rig.cluster.kubelet_client()))?;
    open_and_close(&kubelet, &pod, WARM)?;
    let before = memory()?;
    open_and_close(&kubelet, &pod, flags.tunnels)?;
    let after = memory()?;
    Ok([
        ("cloudcore", before[0], after[0]),
        ("edgecore", before[1], after[1]),
    ])
}

/// So many tunnels, a few at a time, each to its end.
fn open_and_close(kubelet: &Kubelet, pod: &str, count: u32) -> Result<()> {
    let next = AtomicU32::new(0);
    let failed = Mutex::new(None);
    let call = || {
        while lock(&failed).is_none() {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return;
            }
            if let Err(error) = tunnel(kubelet, pod, number) {
                *lock(&failed) = Some(error);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..CALLERS {
            scope.spawn(call);
        }
    });
    match lock(&failed).take() {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

fn tunnel(kubelet: &Kubelet, pod: &str, number: u32) -> Result<()> {
    let exec = format!("/exec/default/{pod}/main?command=true&output=1&error=1");
    loop {
        let refused = match number % EXEC_OF {
            0 => match kubelet.upgrade("GET", &exec, Protocol::Websocket)? {
                Ok(body) => return succeeds(body),
                Err(answer) => answer,
            },
            _ => match kubelet.ask("GET", "/healthz")? {
                answer if answer.status == 200 => return Ok(()),
                answer => answer,
            },
        };
        // Faster than a node's tunnels may open: that is kept, and does not count.
        ensure!(refused.status == 429, "tunnel {number}: {refused:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
