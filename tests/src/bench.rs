//! The figures that `docs/SPECIFICATION.md` promises, measured: ours and a stock kubelet's side by
//! side in one run, on equal machines with equal container runtimes.
//!
//! Owns: one testbed with a control plane, cloudcore, up to two edges (one a transport) and a
//! stock kubelet. Takes release builds from `EDGE_PRODUCTS`; makes them itself only with
//! `--build`. Gives one table. Each measure runs alone when it is named.
//!
//! ```text
//!  Running, delete, edit ──► ten Pods on ──► rest: traffic, ──► one key, resume ──► execs, copies,
//!  (in turn with the peer)   each node       then memory                            tunnels ──► a thin
//!                                                                                   link ──► hub with
//!                                                                                   hollow edges
//! ```

use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};

use crate::bed::progress;

pub mod admin;
pub mod api;
pub mod busy;
pub mod hollow;
pub mod hub;
pub mod pods;
pub mod quiet;
pub mod rig;
pub mod streams;
pub mod table;
pub mod wire;

use rig::{Parts, Rig};
use table::{Row, Verdict, render};

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Measure {
    /// Resident memory (PSS) with Pods, after a quiet time.
    Memory,
    /// The size of the program file.
    Binary,
    /// Bytes on the wire of a node at rest.
    Idle,
    /// Bytes on the wire for one changed key of a ConfigMap.
    Key,
    /// Bytes on the wire for a reconnect with nothing changed.
    Resume,
    /// From the create call to Running in the API.
    Running,
    /// From the delete call to the object's end.
    Delete,
    /// From a ConfigMap's edit to the file in the Pod.
    Edit,
    /// The round trip of an exec of `true`.
    Exec,
    /// Bytes a second of `kubectl cp` and `kubectl port-forward`.
    Copy,
    /// Memory after very many tunnels.
    Leak,
    /// How late a Pod's status is while a copy fills a thin link.
    Busy,
    /// cloudcore's memory for each idle session.
    Hub,
}

#[derive(Debug, Args)]
pub struct Flags {
    /// What to measure; all of it when nothing is named.
    #[arg(value_enum)]
    pub measures: Vec<Measure>,
    /// Pods on each node while it is at rest.
    #[arg(long, default_value_t = 10)]
    pub pods: u32,
    /// Minutes of rest before memory is read and traffic is counted.
    #[arg(long, default_value_t = 10.0)]
    pub idle: f64,
    /// Minutes over which the traffic of a resting node is counted.
    #[arg(long, default_value_t = 10.0)]
    pub window: f64,
    /// Pods created and deleted on each side, one after the other.
    #[arg(long, default_value_t = 30)]
    pub rounds: u32,
    /// ConfigMap edits on our side.
    #[arg(long, default_value_t = 20)]
    pub edits: u32,
    /// ConfigMap edits on the peer's, which takes about a minute for each.
    #[arg(long, default_value_t = 3)]
    pub peer_edits: u32,
    /// Hollow edges on each transport for the hub's memory.
    #[arg(long, default_value_t = 1000)]
    pub sessions: u32,
    /// Execs of `true` on each side, in turn.
    #[arg(long, default_value_t = 100)]
    pub execs: u32,
    /// Tunnels opened and closed on each transport before memory is read again.
    #[arg(long, default_value_t = 10_000)]
    pub tunnels: u32,
    /// Pods on each transport whose end is timed while a copy fills the link: about one a second.
    #[arg(long, default_value_t = 75)]
    pub statuses: u32,
    /// Measure the stock kubelet alone.
    #[arg(long, conflicts_with = "no_peer")]
    pub peer_only: bool,
    /// Measure ours alone.
    #[arg(long)]
    pub no_peer: bool,
    /// Make the release build first and measure that.
    #[arg(long, conflicts_with = "peer_only")]
    pub build: bool,
}

impl Flags {
    fn wants(&self, measure: Measure) -> bool {
        self.measures.is_empty() || self.measures.contains(&measure)
    }

    fn wants_any(&self, measures: &[Measure]) -> bool {
        measures.iter().any(|measure| self.wants(*measure))
    }

    fn parts(&self) -> Parts {
        use Measure::{Busy, Copy, Delete, Edit, Exec, Idle, Key, Leak, Memory, Resume, Running};
        let beside =
            self.wants_any(&[Running, Delete, Edit, Memory, Idle, Key, Resume, Exec, Copy]);
        let both = self.wants_any(&[Idle, Key, Resume, Exec, Copy, Leak, Busy]);
        Parts {
            cloud: !self.peer_only,
            quic: !self.peer_only && (beside || both),
            websocket: !self.peer_only && both,
            peer: !self.no_peer && beside,
        }
    }
}

pub(crate) fn minutes(value: f64) -> Duration {
    Duration::from_secs_f64((value * 60.0).max(0.0))
}

/// Measures and prints; the exit code is 0 when every judged figure holds.
pub fn run(flags: &Flags) -> Result<i32> {
    if flags.build {
        return build_and_run();
    }
    let mut rows = Vec::new();
    if flags.wants(Measure::Binary) {
        rows.push(quiet::binary(flags));
    }
    if flags.measures.iter().any(|m| *m != Measure::Binary) || flags.measures.is_empty() {
        progress("starting a control plane and the machines");
        let mut rig = Rig::start(flags.parts())?;
        measured(flags, &mut rig, &mut rows);
    }
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", heading(flags))?;
    write!(out, "{}", render(&rows))?;
    let missed = |row: &Row| matches!(row.verdict, Verdict::Fail | Verdict::Broken(_));
    Ok(i32::from(rows.iter().any(missed)))
}

/// The order matters: what needs empty nodes first, then what needs them full, and last what keeps
/// the control plane busy.
fn measured(flags: &Flags, rig: &mut Rig, rows: &mut Vec<Row>) {
    let mut add = |new: Vec<Row>| {
        // At once, so that a long run that is cut short has said what it knew.
        for row in &new {
            progress(&row.line());
        }
        rows.extend(new);
    };
    if flags.wants_any(&[Measure::Running, Measure::Delete]) {
        add(pods::churn(flags, rig));
    }
    if flags.wants(Measure::Edit) {
        add(pods::edits(flags, rig));
    }
    let full = [
        Measure::Idle,
        Measure::Memory,
        Measure::Key,
        Measure::Resume,
    ];
    if flags.wants_any(&full) {
        match quiet::fill(flags, rig) {
            Ok(()) => at_rest(flags, rig, &mut add),
            Err(error) => add(vec![Row::broken(
                "Pods on each node",
                "all Running",
                &error,
            )]),
        }
    }
    if flags.wants(Measure::Exec) {
        add(streams::execs(flags, rig));
    }
    if flags.wants(Measure::Copy) {
        add(streams::copies(rig));
    }
    if flags.wants(Measure::Leak) && !flags.peer_only {
        add(streams::leaks(flags, rig));
    }
    // Both nodes stay behind a thin link afterwards.
    if flags.wants(Measure::Busy) && !flags.peer_only {
        add(busy::statuses(flags, rig));
    }
    if flags.wants(Measure::Hub) && !flags.peer_only {
        add(hub::sessions(flags, rig));
    }
}

fn at_rest(flags: &Flags, rig: &mut Rig, add: &mut impl FnMut(Vec<Row>)) {
    if flags.wants_any(&[Measure::Idle, Measure::Memory]) {
        add(quiet::rest(flags, rig));
    }
    if flags.wants(Measure::Key) {
        add(wire::key(flags, rig));
    }
    if flags.wants(Measure::Resume) && !flags.peer_only {
        add(wire::resumes(flags, rig));
    }
}

fn heading(flags: &Flags) -> String {
    let build = match std::env::var_os("EDGE_PRODUCTS") {
        Some(_) => "the programs in EDGE_PRODUCTS",
        None => "the debug build, which no promise is about: set EDGE_PRODUCTS",
    };
    format!(
        "edge {} ({build}), kubelet {}, containerd {}, {} Pods at rest",
        env!("CARGO_PKG_VERSION"),
        crate::programs::K8S_1_37.version,
        crate::programs::CONTAINERD.version,
        flags.pods
    )
}

/// Builds the release programs and starts this program again with them.
fn build_and_run() -> Result<i32> {
    progress("building the release programs");
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let me = std::env::current_exe()?;
    let target = me
        .parent()
        .and_then(Path::parent)
        .context("target directory")?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .current_dir(workspace)
        .args([
            "build",
            "--release",
            "--package",
            "cloudcore",
            "--package",
            "edgecore",
        ])
        .arg("--target-dir")
        .arg(target)
        .status()
        .context("start cargo")?;
    ensure!(status.success(), "the release build failed");
    let words = std::env::args().skip(1).filter(|word| word != "--build");
    let status = Command::new(&me)
        .args(words)
        .env("EDGE_PRODUCTS", target.join("release"))
        .status()?;
    Ok(status.code().unwrap_or(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        flags: Flags,
    }

    fn parsed(words: &[&str]) -> Flags {
        Line::parse_from([&["bench"], words].concat()).flags
    }

    #[test]
    fn nothing_named_means_everything() {
        let flags = parsed(&[]);
        assert!(flags.wants(Measure::Memory) && flags.wants(Measure::Edit));
        let flags = parsed(&["binary", "idle"]);
        assert!(flags.wants(Measure::Idle) && !flags.wants(Measure::Running));
    }

    #[test]
    fn the_second_edge_runs_only_where_transports_differ() {
        assert!(!parsed(&["running"]).parts().websocket);
        assert!(parsed(&["idle"]).parts().websocket);
        let parts = parsed(&["idle", "--peer-only"]).parts();
        assert!(parts.peer && !parts.cloud && !parts.quic && !parts.websocket);
        let parts = parsed(&["hub"]).parts();
        assert!(parts.cloud && !parts.quic && !parts.peer);
        let parts = parsed(&["busy"]).parts();
        assert!(parts.quic && parts.websocket && !parts.peer);
        assert!(parsed(&["exec"]).parts().peer);
    }
}
