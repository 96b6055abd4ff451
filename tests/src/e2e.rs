//! The upstream end-to-end suite, unmodified, with a node of ours as the only one; and the cases that
//! fail there once more with a stock kubelet as the only one. The verdict is the difference.
//!
//! Owns: one testbed after the other, and the reports of the runs. There is no cluster DNS and no
//! kube-proxy: cases that need them fail on both.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use serde_json::Value;

use crate::bed::{progress, run as output};
use crate::bench::rig::{Parts, Rig, Side};
use crate::programs::{self, AGNHOST, E2E, GINKGO};

mod images;

/// The groups that a node is judged by here.
const CASES: &str = r"\[sig-(node|storage|apps|cli)\] (ConfigMap|Secrets|Projected|Downward API|EmptyDir|InitContainer|Containers|Variable Expansion|Pods|Deployment|Job|[Kk]ubectl)";
/// Cases of features that are not on by default, that break the node on purpose, or that are known
/// to fail upstream.
const LEFT_OUT: &str = r"\[Feature:|\[FeatureGate:|\[Flaky\]|\[Disruptive\]|\[Deprecated\]";
/// A whole run, far above what it takes.
const LIMIT: &str = "3h";

#[derive(Debug, Clone, Args)]
pub struct Flags {
    /// The cases: a regular expression that their full text matches.
    #[arg(long, default_value = CASES)]
    pub focus: String,
    /// Cases to leave out: likewise.
    #[arg(long, default_value = LEFT_OUT)]
    pub skip: String,
    /// Cases at a time.
    #[arg(long, default_value_t = 6)]
    pub procs: u32,
    /// Which node runs them first.
    #[arg(long, value_enum, default_value_t = Node::Quic)]
    pub node: Node,
    /// Do not run again on a stock kubelet what failed.
    #[arg(long)]
    pub no_peer: bool,
    /// Where the logs and reports go.
    #[arg(long, default_value = "/tmp/edge-e2e")]
    pub reports: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Node {
    /// Ours, over QUIC.
    Quic,
    /// Ours, over WebSocket.
    Websocket,
    /// The stock kubelet.
    Stock,
}

impl Node {
    fn side(self) -> Side {
        match self {
            Node::Quic => Side::Quic,
            Node::Websocket => Side::Websocket,
            Node::Stock => Side::Peer,
        }
    }
}

/// The cases that ran, by name, and why those failed that did.
type Outcome = BTreeMap<String, Option<String>>;

/// Runs and prints; the exit code is 0 when a stock kubelet does no better.
pub fn run(flags: &Flags) -> Result<i32> {
    let suite = Suite::build(&flags.reports)?;
    let side = flags.node.side();
    let found = suite.judge(side, &flags.focus, flags)?;
    let failed: Vec<&str> = failures(&found).map(|(name, _)| name).collect();
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", summary(side, &found))?;
    let compares = !flags.no_peer && side != Side::Peer;
    let alone = if failed.is_empty() || !compares {
        failed
    } else {
        let peer = suite.judge(Side::Peer, &exactly(&failed), flags)?;
        writeln!(out, "{}", summary(Side::Peer, &peer))?;
        let passes = |name: &&str| matches!(peer.get(*name), Some(None));
        failed.into_iter().filter(passes).collect()
    };
    let count = alone.len();
    let compared = match compares {
        true => " where a stock kubelet's pass",
        false => "",
    };
    writeln!(out, "{count} of {} cases fail{compared}", found.len())?;
    for name in &alone {
        writeln!(out, "  {name}")?;
    }
    Ok(i32::from(count > 0))
}

fn failures(found: &Outcome) -> impl Iterator<Item = (&str, &str)> {
    let all = found.iter();
    all.filter_map(|(name, why)| Some((name.as_str(), why.as_deref()?)))
}

fn summary(side: Side, found: &Outcome) -> String {
    let failed = failures(found).count();
    let mut text = format!(
        "{}: {} of {} cases pass",
        side.word(),
        found.len() - failed,
        found.len()
    );
    for (name, why) in failures(found) {
        let first = why.lines().next().unwrap_or_default();
        text += &format!("\n  failed: {name}\n          {first}");
    }
    text
}

/// A regular expression for these names and no others.
fn exactly(names: &[&str]) -> String {
    let escaped = names.iter().map(|name| {
        let mut text = String::new();
        for letter in name.chars() {
            if r"\.+*?()|[]{}^$".contains(letter) {
                text.push('\\');
            }
            text.push(letter);
        }
        text
    });
    escaped.collect::<Vec<_>>().join("|")
}

/// What a run needs beside its cluster.
struct Suite {
    runner: PathBuf,
    program: PathBuf,
    images: PathBuf,
    reports: PathBuf,
}

impl Suite {
    fn build(reports: &Path) -> Result<Suite> {
        fs::create_dir_all(reports).with_context(|| format!("create {}", reports.display()))?;
        let runner = programs::ensure("ginkgo", GINKGO)?;
        let agnhost = programs::ensure("agnhost", AGNHOST)?;
        let program = programs::ensure("e2e.test", E2E)?;
        let names = output(Command::new(&program).arg("--list-images"))?;
        let images = images::archive(reports, &agnhost, &names)?;
        Ok(Suite {
            runner,
            program,
            images,
            reports: reports.to_owned(),
        })
    }

    /// Runs the cases with that node as the only one.
    fn judge(&self, side: Side, focus: &str, flags: &Flags) -> Result<Outcome> {
        progress(&format!("starting a control plane with {}", side.word()));
        let rig = Rig::start(Parts {
            cloud: side != Side::Peer,
            quic: side == Side::Quic,
            websocket: side == Side::Websocket,
            peer: side == Side::Peer,
        })?;
        rig.import(side, &self.images)?;
        let name = rig.node(side)?.name;
        let (log, report) = (format!("{name}.log"), format!("{name}.json"));
        let log = self.reports.join(log);
        progress(&format!("running the cases; the log is {}", log.display()));
        let kubectl = &rig.cluster.kubectl;
        if side != Side::Peer {
            // The suite waits for a node that takes any Pod.
            let taint = "node-role.kubernetes.io/edge:NoSchedule-";
            kubectl.ok(&["taint", "node", name, taint])?;
        }
        let mut command = Command::new(&self.runner);
        command
            .arg(format!("--procs={}", flags.procs))
            .arg(format!("--focus={focus}"))
            .arg(format!("--skip={}", flags.skip))
            .args(["--no-color", "--keep-going"])
            .arg(format!("--timeout={LIMIT}"))
            .arg(format!("--output-dir={}", self.reports.display()))
            .arg(format!("--json-report={report}"))
            .arg(&self.program)
            .arg("--")
            .arg(format!("--kubeconfig={}", kubectl.kubeconfig.display()))
            .arg(format!("--kubectl-path={}", kubectl.program.display()))
            .args(["--provider=local", "--disable-log-dump"]);
        follow(&mut command, &log)?;
        let outcome = read_report(&self.reports.join(report))?;
        ensure!(
            !outcome.is_empty(),
            "no case matched {focus:?}: {}",
            log.display()
        );
        Ok(outcome)
    }
}

/// Runs it to its end, with a word on how far it is every minute. Its exit code says nothing that the
/// report does not.
fn follow(command: &mut Command, log: &Path) -> Result<()> {
    let file = File::create(log).with_context(|| format!("create {}", log.display()))?;
    let mut child = command
        .stdin(Stdio::null())
        .stderr(file.try_clone()?)
        .stdout(file)
        .spawn()
        .with_context(|| format!("start {command:?}"))?;
    let (begun, mut shown) = (Instant::now(), Instant::now());
    while child.try_wait()?.is_none() {
        std::thread::sleep(Duration::from_secs(1));
        if shown.elapsed() >= Duration::from_secs(60) {
            shown = Instant::now();
            let text = String::from_utf8_lossy(&fs::read(log)?).into_owned();
            let ended = text.matches('•').count();
            let failed = text.matches("• [FAILED]").count();
            let minutes = begun.elapsed().as_secs() / 60;
            progress(&format!(
                "    {minutes} min, {ended} ended, {failed} of them failed"
            ));
        }
    }
    Ok(())
}

/// The cases of a report of ginkgo's, but for those that were left out.
fn read_report(path: &Path) -> Result<Outcome> {
    let bytes = fs::read(path).with_context(|| {
        format!(
            "the run left no report {}: see its log beside it",
            path.display()
        )
    })?;
    let suites: Value = serde_json::from_slice(&bytes)?;
    let mut outcome = Outcome::new();
    for spec in suites[0]["SpecReports"].as_array().into_iter().flatten() {
        let why = match spec["State"].as_str().unwrap_or_default() {
            "passed" => None,
            "skipped" | "pending" => continue,
            state => Some(
                spec["Failure"]["Message"]
                    .as_str()
                    .unwrap_or(state)
                    .to_owned(),
            ),
        };
        let words = spec["ContainerHierarchyTexts"]
            .as_array()
            .into_iter()
            .flatten();
        let words = words
            .chain([&spec["LeafNodeText"]])
            .filter_map(Value::as_str);
        let name = words.collect::<Vec<_>>().join(" ");
        if spec["LeafNodeType"] == "It" || why.is_some() {
            outcome.insert(name, why);
        }
    }
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_becomes_an_expression_that_matches_it_as_it_is() {
        assert_eq!(
            exactly(&["[sig-node] Pods (a.b)", "x"]),
            r"\[sig-node\] Pods \(a\.b\)|x"
        );
    }

    #[test]
    fn a_report_gives_what_ran_and_why_it_failed() -> Result<()> {
        let path = std::env::temp_dir().join(format!("e2e-report-{}.json", std::process::id()));
        let spec = |state: &str, leaf: &str| {
            serde_json::json!({"State": state, "LeafNodeType": "It", "LeafNodeText": leaf,
                "ContainerHierarchyTexts": ["[sig-node] Pods"], "Failure": {"Message": "late\nmore"}})
        };
        let report = serde_json::json!([{"SpecReports":
            [spec("passed", "a"), spec("skipped", "b"), spec("failed", "c")]}]);
        fs::write(&path, report.to_string())?;
        let outcome = read_report(&path)?;
        fs::remove_file(&path)?;
        let want = [("a", None), ("c", Some("late\nmore".to_owned()))];
        let want = want.map(|(leaf, why)| (format!("[sig-node] Pods {leaf}"), why));
        assert_eq!(outcome, Outcome::from(want));
        let text = summary(Side::Quic, &outcome);
        assert!(
            text.contains("1 of 2 cases pass") && text.contains("          late"),
            "{text}"
        );
        Ok(())
    }
}
