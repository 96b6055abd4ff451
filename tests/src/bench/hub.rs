//! What an idle session costs the cloud in memory, measured on cloudcore itself with thousands of
//! hollow edges: the same nodes, enrolled before, without and with their sessions.

use std::time::Duration;

use anyhow::{Context, Result};
use tokio::task::LocalSet;

use super::Flags;
use super::hollow::{Hollow, Preference};
use super::quiet::pss;
use super::rig::Rig;
use super::table::{Row, show_bytes};
use crate::bed::progress;
use crate::cloud::{Cloud, Invitation};

/// Nodes that one token lets in: each use is written to the token's record, which must stay small.
const USES: u32 = 25;

/// Dials under way at once. Handshakes need memory that an allocator keeps: few at a time show
/// what sessions cost, not what a stampede does. Below the listener's limit for one source.
const AT_ONCE: usize = 8;

/// After the last session: until what handshakes and first reports left behind is settled.
const SETTLE: Duration = Duration::from_secs(30);

pub fn sessions(flags: &Flags, rig: &Rig) -> Vec<Row> {
    let measure = |name: &str| {
        format!(
            "hub memory (PSS) for each idle session of {}, {name}",
            flags.sessions
        )
    };
    let bars = [("WebSocket", 25e3), ("QUIC", 40e3)];
    match measured(flags.sessions, rig).with_context(|| rig.story()) {
        Ok(found) => bars
            .iter()
            .zip(found.each)
            .map(|((name, limit), each)| {
                let row = Row::new(&measure(name), &format!("<= {}", show_bytes(*limit)));
                let row = row
                    .beside(Some(each), None, show_bytes)
                    .judged(Some(each), *limit);
                row.noted(format!(
                    "cloudcore: {} with {} enrolled nodes and no session of theirs; {} before they \
                     were enrolled",
                    show_bytes(found.enrolled),
                    2 * flags.sessions,
                    show_bytes(found.empty)
                ))
            })
            .collect(),
        Err(error) => vec![Row::broken(
            &measure("each transport"),
            "<= 25 / 40 KB",
            &error,
        )],
    }
}

/// Bytes.
struct Found {
    empty: f64,
    enrolled: f64,
    /// WebSocket, QUIC.
    each: [f64; 2],
}

fn measured(count: u32, rig: &Rig) -> Result<Found> {
    let cloud = rig.cloud.as_ref().context("no cloudcore runs")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let local = LocalSet::new();
    local.block_on(&runtime, run(count, cloud))
}

async fn run(count: u32, cloud: &Cloud) -> Result<Found> {
    let memory = || pss(cloud.pid().context("cloudcore does not run")?);
    let empty = memory()?;
    progress(&format!("    enrolling {} hollow edges", 2 * count));
    let mut edges = enrol(2 * count, cloud).await?;
    tokio::time::sleep(SETTLE).await;
    let enrolled = memory()?;
    let mut each = [0.0; 2];
    let mut before = enrolled;
    for (slot, preference) in each
        .iter_mut()
        .zip([Preference::WebSocket, Preference::Quic])
    {
        progress(&format!("    {count} sessions, {preference:?}"));
        let some = edges.split_off(edges.len() - count as usize);
        connect(some, preference).await?;
        tokio::time::sleep(SETTLE).await;
        let after = memory()?;
        *slot = (after - before) / f64::from(count);
        before = after;
    }
    Ok(Found {
        empty,
        enrolled,
        each,
    })
}

/// Joins them, a token for some each; tokens are made one after the other.
async fn enrol(count: u32, cloud: &Cloud) -> Result<Vec<Hollow>> {
    let mut edges = Vec::new();
    let uses = USES.to_string();
    let mut groups = (0..count).step_by(USES as usize).peekable();
    while groups.peek().is_some() {
        let mut tasks = tokio::task::JoinSet::new();
        for first in groups.by_ref().take(AT_ONCE) {
            let invitation = cloud.invite(&["--uses", &uses])?;
            let last = count.min(first + USES);
            tasks.spawn_local(async move { group(&invitation, first..last).await });
        }
        while let Some(joined) = tasks.join_next().await {
            edges.extend(joined??);
        }
    }
    Ok(edges)
}

/// One after the other: two at once would fight for the token's record.
async fn group(invitation: &Invitation, numbers: std::ops::Range<u32>) -> Result<Vec<Hollow>> {
    let mut edges = Vec::new();
    for number in numbers {
        edges.push(Hollow::join(invitation, &format!("hollow-{number}")).await?);
    }
    Ok(edges)
}

/// Connects them all and leaves them to serve for as long as the benchmark's runtime lives. One
/// that is lost is told, since it falsifies the figure.
async fn connect(edges: Vec<Hollow>, preference: Preference) -> Result<()> {
    let mut waiting = edges.into_iter();
    let mut dials = tokio::task::JoinSet::new();
    loop {
        while dials.len() < AT_ONCE
            && let Some(edge) = waiting.next()
        {
            dials.spawn_local(async move { edge.connect(preference).await });
        }
        let Some(idle) = dials.join_next().await else {
            return Ok(());
        };
        let idle = idle??;
        tokio::task::spawn_local(async move {
            let error = idle.serve().await;
            progress(&format!("    a hollow session ended: {error:#}"));
        });
    }
}
