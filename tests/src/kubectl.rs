//! The real kubectl, as an operator runs it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::running::{Ended, Running};

/// What a kubectl said.
#[derive(Debug, Clone)]
pub struct Said {
    pub stdout: String,
    pub stderr: String,
    pub code: i32,
}

/// A kubectl of a certain version with a certain kubeconfig.
#[derive(Debug, Clone)]
pub struct Kubectl {
    pub program: PathBuf,
    pub kubeconfig: PathBuf,
    /// Its environment beside what it inherits.
    pub variables: Vec<(&'static str, &'static str)>,
}

impl Kubectl {
    pub fn new(program: &Path, kubeconfig: &Path) -> Kubectl {
        Kubectl {
            program: program.to_owned(),
            kubeconfig: kubeconfig.to_owned(),
            variables: Vec::new(),
        }
    }

    /// The same with another variable, such as one that turns a protocol off.
    pub fn with_variable(&self, name: &'static str, value: &'static str) -> Kubectl {
        let mut other = self.clone();
        other.variables.push((name, value));
        other
    }

    /// A command with the kubeconfig set, for callers that stream.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .args(words)
            .envs(self.variables.iter().copied())
            .stdin(Stdio::null());
        command
    }

    /// Starts it and leaves it running.
    pub fn start(&self, words: &[&str]) -> Result<Running> {
        Running::start(&mut self.command(words))
    }

    /// Runs it to its end, which must come within `limit`, with bytes on its standard input.
    pub fn pipe(&self, words: &[&str], input: Vec<u8>, limit: Duration) -> Result<Ended> {
        let mut running = self.start(words)?;
        running.feed(input)?;
        running.end(limit)
    }

    /// Runs it and gives what it said, whatever that is.
    pub fn run(&self, words: &[&str]) -> Result<Said> {
        self.run_with(words, "")
    }

    /// As [`Kubectl::run`], with `input` on its standard input.
    pub fn run_with(&self, words: &[&str], input: &str) -> Result<Said> {
        let mut child = self
            .command(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {}", self.program.display()))?;
        if let Some(mut pipe) = child.stdin.take() {
            let _ = pipe.write_all(input.as_bytes());
        }
        let output = child.wait_with_output()?;
        Ok(Said {
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            code: output.status.code().unwrap_or(-1),
        })
    }

    /// Runs it; it must succeed.
    pub fn ok(&self, words: &[&str]) -> Result<String> {
        self.ok_with(words, "")
    }

    pub fn ok_with(&self, words: &[&str], input: &str) -> Result<String> {
        let said = self.run_with(words, input)?;
        ensure!(
            said.code == 0,
            "kubectl {}: {}{}",
            words.join(" "),
            said.stdout,
            said.stderr
        );
        Ok(said.stdout)
    }

    /// An object, or a list of them.
    pub fn json(&self, words: &[&str]) -> Result<Value> {
        let mut all = words.to_vec();
        all.extend(["-o", "json"]);
        serde_json::from_str(&self.ok(&all)?).context("kubectl's JSON")
    }

    pub fn apply(&self, manifest: &str) -> Result<()> {
        self.ok_with(&["apply", "-f", "-"], manifest).map(drop)
    }

    /// Fails unless the object is gone.
    pub fn ensure_gone(&self, kind: &str, name: &str) -> Result<()> {
        let left = self.ok(&["get", kind, name, "--ignore-not-found", "-o", "name"])?;
        match left.trim() {
            "" => Ok(()),
            left => bail!("{left} is there"),
        }
    }
}
