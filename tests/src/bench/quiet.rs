//! A node at rest: what it sends, what it holds in memory, how big its program is.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;

use super::pods::{Turn, resting_pod};
use super::rig::{Rig, Side};
use super::table::{Row, show_bytes};
use super::{Flags, Measure, minutes};
use crate::bed::progress;
use crate::cloud::product;
use crate::netns::Traffic;
use crate::programs::{self, K8S_1_37};

/// After the last Pod runs: until statuses have settled on both sides.
const SETTLE_MINUTES: f64 = 1.0;

const DAY: f64 = 24.0 * 60.0 * 60.0;

/// Starts the Pods that rest on every node.
pub fn fill(flags: &Flags, rig: &Rig) -> Result<()> {
    let mut api = rig.api()?;
    for node in rig.nodes() {
        progress(&format!("    {} Pods, {}", flags.pods, node.side.word()));
        let turn = Turn::build(&api, node)?;
        for n in 0..flags.pods {
            let name = format!("rest-{}-{n}", node.name);
            let pod = resting_pod(&name, node.name, json!(["sleep", "86400"]));
            turn.create(&mut api, &pod).with_context(|| rig.story())?;
        }
    }
    std::thread::sleep(minutes(SETTLE_MINUTES));
    Ok(())
}

/// A rest, the memory at its end, and then the traffic over its window.
pub fn rest(flags: &Flags, rig: &mut Rig) -> Vec<Row> {
    match rested(flags, rig) {
        Ok(rows) => rows,
        Err(error) => vec![Row::broken("traffic and memory at rest", "-", &error)],
    }
}

/// What one node did.
#[derive(Debug, Clone, Copy, Default)]
struct Rest {
    frames: f64,
    packets_up: f64,
    packets_down: f64,
    memory: f64,
}

fn rested(flags: &Flags, rig: &mut Rig) -> Result<Vec<Row>> {
    let (idle, window) = (minutes(flags.idle), minutes(flags.window));
    let mut rests: Vec<(Side, Rest)> = rig
        .nodes()
        .iter()
        .map(|node| (node.side, Rest::default()))
        .collect();
    // In their first ten minutes Pods get their tolerations, once: that is no rest yet.
    progress(&format!("    resting for {:.1} minutes", flags.idle));
    std::thread::sleep(idle);
    if flags.wants(Measure::Memory) {
        for ((_, rest), node) in rests.iter_mut().zip(rig.nodes()) {
            rest.memory = pss(node.pid.context("the agent does not run")?)?;
        }
    }
    if flags.wants(Measure::Idle) {
        progress(&format!(
            "    counting traffic for {:.1} minutes",
            flags.window
        ));
        let before = counters(rig)?;
        std::thread::sleep(window);
        let after = counters(rig)?;
        // Of one node, not of all: each has its own router.
        for ((rest, (old, old_ip)), (new, new_ip)) in rests
            .iter_mut()
            .map(|(_, rest)| rest)
            .zip(before)
            .zip(after)
        {
            let scale = DAY / window.as_secs_f64();
            rest.frames = (new.up + new.down - old.up - old.down) as f64 * scale;
            rest.packets_up = (new_ip.up - old_ip.up) as f64 * scale;
            rest.packets_down = (new_ip.down - old_ip.down) as f64 * scale;
        }
    }
    rig.ensure_running()?;
    Ok(rest_rows(flags, &rests))
}

/// For each node: whole frames, and IP packets.
fn counters(rig: &Rig) -> Result<Vec<(Traffic, Traffic)>> {
    let read = |machine: &crate::netns::Machine| Ok((machine.traffic()?, machine.forwarded()?));
    rig.nodes().iter().map(|node| read(node.machine)).collect()
}

fn rest_rows(flags: &Flags, rests: &[(Side, Rest)]) -> Vec<Row> {
    let of = |side| {
        rests
            .iter()
            .find(|(found, _)| *found == side)
            .map(|(_, rest)| *rest)
    };
    let (quic, websocket, peer) = (of(Side::Quic), of(Side::Websocket), of(Side::Peer));
    let mut rows = Vec::new();
    if flags.wants(Measure::Memory) {
        let measure = format!(
            "agent memory (PSS), {} Pods, {} min idle",
            flags.pods, flags.idle
        );
        let ours = quic.map(|rest| rest.memory);
        let row = Row::new(&measure, "<= 12 MB");
        let row = row.beside(ours, peer.map(|rest| rest.memory), show_bytes);
        let also = websocket.map(|rest| format!("over WebSocket {}", show_bytes(rest.memory)));
        rows.push(row.judged(ours, 12e6).noted(also.unwrap_or_default()));
    }
    if flags.wants(Measure::Idle) {
        for (name, ours, limit) in [("QUIC", quic, 1e6), ("WebSocket", websocket, 2e6)] {
            let measure = format!("wire at rest a day, {} Pods, {name}", flags.pods);
            let row = Row::new(&measure, &format!("<= {}", show_bytes(limit)));
            // What a metered link carries. ARP and Ethernet headers are of the test's own segment.
            let packets = |rest: Rest| rest.packets_up + rest.packets_down;
            let measured = ours.map(packets);
            let row = row.beside(measured, peer.map(packets), show_bytes);
            let note = ours.or(peer).map(|rest| {
                format!(
                    "whole IP packets over {} min: {} up, {} down; as Ethernet frames with ARP {}",
                    flags.window,
                    show_bytes(rest.packets_up),
                    show_bytes(rest.packets_down),
                    show_bytes(rest.frames)
                )
            });
            rows.push(row.judged(measured, limit).noted(note.unwrap_or_default()));
        }
    }
    rows
}

/// A process's proportional set size in bytes.
pub fn pss(pid: i32) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    parse_pss(&text).with_context(|| format!("no Pss in {path}"))
}

fn parse_pss(text: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    let kib: f64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024.0)
}

/// The program files beside one another.
pub fn binary(flags: &Flags) -> Row {
    let (measure, bar) = ("edgecore program, release, stripped", "<= 15 MB");
    let size = |path: &Path| Ok::<_, anyhow::Error>(fs::metadata(path)?.len() as f64);
    let found = || {
        let ours = match flags.peer_only {
            true => None,
            false => Some(product("edgecore")?),
        };
        let peer = match flags.no_peer {
            true => None,
            false => Some(size(&programs::ensure("kubelet", K8S_1_37)?)?),
        };
        let stripped = ours
            .as_deref()
            .map(is_stripped)
            .transpose()?
            .unwrap_or(true);
        let ours = ours.as_deref().map(size).transpose()?;
        Ok((ours, peer, stripped))
    };
    match found() {
        Ok((ours, peer, stripped)) => {
            let row = Row::new(measure, bar)
                .beside(ours, peer, show_bytes)
                .judged(ours, 15e6);
            match stripped {
                true => row,
                false => row.noted("it carries symbols: not a release build"),
            }
        }
        Err(error) => Row::broken(measure, bar, &error),
    }
}

/// Whether an ELF file has no symbol table.
fn is_stripped(path: &Path) -> Result<bool> {
    let bytes = fs::read(path)?;
    let kinds = section_kinds(&bytes).with_context(|| format!("{}: no ELF", path.display()))?;
    Ok(!kinds.contains(&SYMBOL_TABLE))
}

/// `SHT_SYMTAB`.
const SYMBOL_TABLE: u32 = 2;

/// The types of all sections of a 64-bit little-endian ELF file (elf(5): `e_shoff`, `e_shentsize`,
/// `e_shnum` in its header, `sh_type` in each section's).
fn section_kinds(bytes: &[u8]) -> Option<Vec<u32>> {
    let number = |at: usize, size: usize| {
        let field = bytes.get(at..at.checked_add(size)?)?;
        let value = field
            .iter()
            .rev()
            .fold(0u64, |value, byte| value << 8 | u64::from(*byte));
        usize::try_from(value).ok()
    };
    bytes.starts_with(b"\x7fELF\x02\x01").then_some(())?;
    let (first, size, count) = (number(0x28, 8)?, number(0x3a, 2)?, number(0x3c, 2)?);
    let kind = |n: usize| u32::try_from(number(first + n * size + 4, 4)?).ok();
    (0..count).map(kind).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pss_is_read_in_bytes_and_not_its_parts() {
        let text = "5000-6000 ---p 0 00:00 0 [rollup]\nRss: 90 kB\nPss: 12 kB\nPss_Anon: 7 kB\n";
        assert_eq!(parse_pss(text), Some(12.0 * 1024.0));
        assert_eq!(parse_pss("Rss: 1 kB\n"), None);
    }

    #[test]
    fn this_very_test_is_not_stripped() {
        let me = std::env::current_exe().expect("a path");
        assert!(!is_stripped(&me).expect("readable"));
        assert!(section_kinds(b"#!/bin/sh").is_none());
        assert!(section_kinds(b"\x7fELF\x02\x01").is_none());
    }
}
