//! Bytes on the wire for one event: a changed key, a reconnect.
//!
//! Whole frames at the router's outside. What happens anyway meanwhile is taken off: for a key, the
//! median of equally long windows in which nothing was changed, in turn with those in which
//! something was.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::Flags;
use super::api::Api;
use super::metrics;
use super::pods::{Reader, Turn, fresh_value};
use super::rig::{Node, Rig, Side};
use super::table::{Row, Verdict, p50, show_bytes};
use crate::bed::progress;
use crate::netns::{Machine, Traffic};
use crate::wait::wait_every;
use crate::world::condition;

/// Long against an answer, short against a keep-alive.
const WINDOW: Duration = Duration::from_secs(3);

const KEYS: u32 = 10;

/// Longer than it takes either end to notice that the link is dead (45 s).
const CUT: Duration = Duration::from_secs(60);

/// A link on which nothing was sent for this long has said all it had to say.
const SILENCE: Duration = Duration::from_secs(3);

fn total(traffic: Traffic) -> f64 {
    (traffic.up + traffic.down) as f64
}

/// One key of a 2 KB ConfigMap, changed again and again.
pub fn key(flags: &Flags, rig: &Rig) -> Vec<Row> {
    let mut peer = None;
    let mut rows = Vec::new();
    let bar = "<= 500 B";
    let mut nodes = rig.nodes();
    // The peer's figure stands beside each of ours.
    nodes.sort_by_key(|node| node.side != Side::Peer);
    for node in nodes {
        progress(&format!("    changing one key, {}", node.side.word()));
        let measure = match node.side {
            Side::Quic => "wire for one key of a 2 KB ConfigMap, QUIC",
            Side::Websocket => "wire for one key of a 2 KB ConfigMap, WebSocket",
            Side::Peer => "wire for one key of a 2 KB ConfigMap",
        };
        match keyed(rig, node).with_context(|| rig.story()) {
            Ok(found) if node.side == Side::Peer => peer = Some(found),
            Ok(found) => {
                let row = Row::new(measure, bar).beside(Some(found), peer, show_bytes);
                rows.push(row.judged(Some(found), 500.0));
            }
            Err(error) => rows.push(Row::broken(measure, bar, &error)),
        }
    }
    if flags.peer_only {
        rows.push(
            Row::new("wire for one key of a 2 KB ConfigMap", bar).beside(None, peer, show_bytes),
        );
    }
    rows
}

fn keyed(rig: &Rig, node: Node<'_>) -> Result<f64> {
    let mut api = rig.api()?;
    let turn = Turn::build(&api, node)?;
    let reader = Reader::start(&mut api, &turn)?;
    std::thread::sleep(4 * WINDOW);
    let (mut still, mut changed) = (Vec::new(), Vec::new());
    for seed in 0..KEYS {
        still.push(window(node.machine, || Ok(()))?);
        let value = fresh_value(&format!("{}-wire-{seed}", node.name));
        changed.push(window(node.machine, || reader.patch(&mut api, &value))?);
    }
    reader.end(&mut api, &turn)?;
    let (still, changed) = (p50(&still), p50(&changed));
    Ok(changed.context("no samples")? - still.context("no samples")?)
}

/// The bytes of one window that begins with an act.
fn window(machine: &Machine, act: impl FnOnce() -> Result<()>) -> Result<f64> {
    let before = machine.traffic()?;
    let end = Instant::now() + WINDOW;
    act()?;
    std::thread::sleep(end.saturating_duration_since(Instant::now()));
    Ok(total(machine.traffic()?) - total(before))
}

/// What one reconnect cost.
#[derive(Debug, Clone, Copy)]
pub struct Resume {
    pub side: Side,
    /// IP bytes, handshake included.
    packets: f64,
    /// Bytes of the session's frames as cloudcore counted them, where it does.
    frames: Option<f64>,
}

/// Cuts the links of all our nodes for a while, and counts what follows.
pub fn resumes(rig: &Rig) -> Result<Vec<Resume>> {
    progress("    cutting our links for a minute");
    let mut nodes = rig.nodes();
    nodes.retain(|node| node.side != Side::Peer);
    for node in &nodes {
        node.machine.cut()?;
    }
    std::thread::sleep(CUT);
    let mut found = Vec::new();
    // One after the other, so that cloudcore's counters are one node's.
    for node in nodes {
        found.push(resumed(rig, node).with_context(|| rig.story())?);
    }
    Ok(found)
}

fn resumed(rig: &Rig, node: Node<'_>) -> Result<Resume> {
    let mut api = rig.api()?;
    let (packets, frames) = (node.machine.forwarded()?, frame_bytes(rig, node.name));
    node.machine.restore()?;
    ready(&mut api, node.name)?;
    silence(node.machine)?;
    let after = frame_bytes(rig, node.name);
    Ok(Resume {
        side: node.side,
        packets: total(node.machine.forwarded()?) - total(packets),
        frames: frames.zip(after).map(|(before, after)| after - before),
    })
}

/// Waits until cloudcore says that the node is connected: its Node is Ready, and something has
/// crossed the link.
fn ready(api: &mut Api, node: &str) -> Result<()> {
    let path = format!("/api/v1/nodes/{node}");
    let pause = Duration::from_millis(200);
    wait_every(
        &format!("Node {node} Ready"),
        Duration::from_secs(120),
        pause,
        || {
            let node: Value = api.call("GET", &path, None)?;
            ensure!(condition(&node, "Ready") == Some("True"), "not Ready");
            Ok(())
        },
    )
}

/// Waits until the link was used and then fell silent.
fn silence(machine: &Machine) -> Result<()> {
    let first = total(machine.forwarded()?);
    let (mut last, mut since, mut used) = (first, Instant::now(), false);
    wait_every(
        "silence on the link",
        Duration::from_secs(180),
        SILENCE / 10,
        || {
            let seen = total(machine.forwarded()?);
            if seen != last {
                (last, since, used) = (seen, Instant::now(), true);
            }
            ensure!(used && since.elapsed() >= SILENCE, "it is in use");
            Ok(())
        },
    )
}

/// The bytes of a node's frames so far, both directions.
fn frame_bytes(rig: &Rig, _node: &str) -> Option<f64> {
    let admin = rig.cloud.as_ref()?.admin;
    metrics::sum(&metrics::fetch(admin, "/metrics").ok()?, FRAME_BYTES, &[])
}

/// cloudcore's counter of frame bytes by direction and class.
const FRAME_BYTES: &str = "cloudcore_session_bytes_total";

/// The reconnects with Pods, judged beside those without.
pub fn resume_rows(flags: &Flags, rig: &Rig, empty: Result<Vec<Resume>>) -> Vec<Row> {
    let bar = "<= 2.0 KB beyond the handshake";
    let found = empty.and_then(|empty| Ok((empty, resumes(rig)?)));
    let (empty, full) = match found {
        Ok(found) => found,
        Err(error) => return vec![Row::broken("resume with nothing changed", bar, &error)],
    };
    full.iter()
        .zip(&empty)
        .map(|(full, empty)| resume_row(flags, bar, full, empty))
        .collect()
}

fn resume_row(flags: &Flags, bar: &str, full: &Resume, empty: &Resume) -> Row {
    let transport = match full.side {
        Side::Websocket => "WebSocket",
        Side::Quic | Side::Peer => "QUIC",
    };
    let measure = format!(
        "resume with nothing changed, {} Pods, {transport}",
        flags.pods
    );
    let row = Row::new(&measure, bar);
    match full.frames {
        Some(frames) => row
            .beside(Some(frames), None, show_bytes)
            .judged(Some(frames), 2000.0)
            .noted(format!(
                "frames as cloudcore counts them; IP packets, handshake included: {}",
                show_bytes(full.packets)
            )),
        None => {
            let beyond = full.packets - empty.packets;
            let row = row.beside(Some(beyond), None, show_bytes).noted(format!(
                "IP packets beyond those of the same resume without Pods ({}): cloudcore gave no \
                 count of frames",
                show_bytes(empty.packets)
            ));
            Row {
                verdict: Verdict::of(beyond <= 2000.0),
                ..row
            }
        }
    }
}
