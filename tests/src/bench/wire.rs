//! Bytes on the wire for one event: a changed key, a reconnect.
//!
//! Whole frames at the router's outside. What happens anyway meanwhile is taken off: for a key, the
//! median of equally long windows in which nothing was changed, in turn with those in which
//! something was.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::Flags;
use super::admin;
use super::pods::{Reader, Turn, fresh_value};
use super::rig::{Node, Rig, Side};
use super::table::{Row, p50, show_bytes};
use crate::bed::progress;
use crate::netns::{Machine, Traffic};
use crate::wait::wait_every;

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
struct Resume {
    side: Side,
    /// IP bytes, handshake included.
    packets: f64,
    /// Bytes of the new session's streams in both directions, as cloudcore counts them, from its
    /// begin until it fell silent: nothing of TLS, QUIC, TCP or IP.
    session: f64,
    /// Of these, until the edge had said that it holds all it should.
    resumed: f64,
}

/// Cuts the links of all our nodes for a while, and counts what follows.
pub fn resumes(flags: &Flags, rig: &Rig) -> Vec<Row> {
    let bar = "<= 2 KB beyond the handshake";
    match cut_and_resume(rig).with_context(|| rig.story()) {
        Ok(found) => found
            .iter()
            .map(|one| resume_row(flags, bar, one))
            .collect(),
        Err(error) => vec![Row::broken("resume with nothing changed", bar, &error)],
    }
}

fn resume_row(flags: &Flags, bar: &str, found: &Resume) -> Row {
    let transport = match found.side {
        Side::Websocket => "WebSocket",
        Side::Quic | Side::Peer => "QUIC",
    };
    let measure = format!(
        "resume with nothing changed, {} Pods, {transport}",
        flags.pods
    );
    let row = Row::new(&measure, bar).beside(Some(found.session), None, show_bytes);
    row.judged(Some(found.session), 2000.0).noted(format!(
        "all frames of the new session until it fell silent, {} of them until it was in sync; IP \
         packets, handshake included: {}",
        show_bytes(found.resumed),
        show_bytes(found.packets)
    ))
}

fn cut_and_resume(rig: &Rig) -> Result<Vec<Resume>> {
    progress(&format!("    cutting our links for {} s", CUT.as_secs()));
    let mut nodes = rig.nodes();
    nodes.retain(|node| node.side != Side::Peer);
    for node in &nodes {
        node.machine.cut()?;
    }
    std::thread::sleep(CUT);
    nodes.into_iter().map(|node| resumed(rig, node)).collect()
}

fn resumed(rig: &Rig, node: Node<'_>) -> Result<Resume> {
    let before = total(node.machine.forwarded()?);
    ensure!(
        session(rig, node.name)?.is_none(),
        "cloudcore has not noticed the cut"
    );
    node.machine.restore()?;
    let pause = Duration::from_millis(200);
    wait_every(
        &format!("session of {}", node.name),
        Duration::from_secs(180),
        pause,
        || {
            let session = session(rig, node.name)?.context("no session yet")?;
            ensure!(session["inSyncMs"].as_u64() > Some(0), "not in sync yet");
            Ok(())
        },
    )?;
    silence(node.machine)?;
    let session = session(rig, node.name)?.context("the session has ended again")?;
    let bytes = |value: &Value| value.as_f64().context("no byte count in /sessions");
    Ok(Resume {
        side: node.side,
        packets: total(node.machine.forwarded()?) - before,
        session: bytes(&session["sent"]["bytes"])? + bytes(&session["received"]["bytes"])?,
        resumed: bytes(&session["resumeBytes"])?,
    })
}

/// What cloudcore says of a node's session, if there is one.
fn session(rig: &Rig, node: &str) -> Result<Option<Value>> {
    let admin = rig.cloud.as_ref().context("no cloudcore runs")?.admin;
    let all: Value = serde_json::from_str(&admin::fetch(admin, "/sessions")?)?;
    let mut all = all.as_array().into_iter().flatten();
    Ok(all.find(|session| session["node"] == node).cloned())
}

/// Waits until nothing has crossed the link for a while.
fn silence(machine: &Machine) -> Result<()> {
    let (mut last, mut since) = (total(machine.forwarded()?), Instant::now());
    wait_every(
        "silence on the link",
        Duration::from_secs(60),
        SILENCE / 10,
        || {
            let seen = total(machine.forwarded()?);
            if seen != last {
                (last, since) = (seen, Instant::now());
            }
            ensure!(since.elapsed() >= SILENCE, "it is in use");
            Ok(())
        },
    )
}
