//! cloudcore as an operator runs it: `install`, then `run` beside the control plane.

use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::bed::{Bed, Proc, run, testbed_program};
use crate::kubectl::Said;
use crate::wait::wait_for;

/// The port that edges dial, UDP and TCP.
pub const PORT: u16 = 10000;

/// A cloudcore on the host, reachable from the edges at the backbone's host address.
pub struct Cloud {
    bed: Arc<Bed>,
    /// Names its log.
    name: &'static str,
    program: PathBuf,
    kubeconfig: PathBuf,
    flags: Vec<String>,
    /// Where it listens.
    pub address: SocketAddr,
    /// Where edges look for it.
    advertised: SocketAddr,
    /// Its admin endpoint.
    pub admin: SocketAddr,
    process: Option<Proc>,
}

/// What `cloudcore token create` printed, taken apart.
#[derive(Debug, Clone)]
pub struct Invitation {
    /// The whole line: `edgecore --join HOST:PORT --token TOKEN`.
    pub line: String,
    pub join: String,
    pub token: String,
}

impl Cloud {
    /// Installs into the cluster and starts; waits until it listens.
    pub fn start(bed: &Arc<Bed>, kubeconfig: &Path) -> Result<Cloud> {
        let mut cloud = Cloud::prepared(bed, kubeconfig)?;
        cloud.command(&["install"])?;
        cloud.resume()?;
        Ok(cloud)
    }

    /// One that does not run: for its commands.
    pub fn prepared(bed: &Arc<Bed>, kubeconfig: &Path) -> Result<Cloud> {
        Ok(Cloud {
            bed: bed.clone(),
            name: "cloudcore",
            program: product("cloudcore")?,
            kubeconfig: kubeconfig.to_owned(),
            flags: Vec::new(),
            address: SocketAddr::from((bed.host_address(), PORT)),
            advertised: SocketAddr::from((bed.host_address(), PORT)),
            admin: SocketAddr::from((bed.loopback(), PORT + 1)),
            process: None,
        })
    }

    /// A second replica for the same cluster, with ports of its own and, as behind a load balancer,
    /// the first one's address for edges; it does not run yet.
    pub fn replica(&self) -> Result<Cloud> {
        let mut other = Cloud::prepared(&self.bed, &self.kubeconfig)?;
        other.name = "cloudcore-replica";
        other.address.set_port(PORT + 10);
        other.admin.set_port(PORT + 11);
        Ok(other)
    }

    /// Further flags of `cloudcore run`, from its next start on.
    pub fn set_flags(&mut self, flags: &[&str]) {
        self.flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
    }

    /// Starts `cloudcore run` and waits until it listens.
    pub fn resume(&mut self) -> Result<()> {
        let mut command = self.bed.command(&self.program);
        command
            .arg("run")
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .args([
                format!("--listen={}", self.address),
                format!("--advertise={}", self.advertised),
                format!("--admin={}", self.admin),
            ]);
        command.args(&self.flags);
        let process = self
            .process
            .insert(self.bed.spawn(self.name, &mut command)?);
        wait_for("cloudcore", Duration::from_secs(60), || {
            process.ensure_running()?;
            Ok(TcpStream::connect_timeout(
                &self.address,
                Duration::from_secs(1),
            )?)
        })?;
        Ok(())
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
    }

    /// Asks it to end and waits.
    pub fn stop(&mut self) -> Result<()> {
        let Some(mut process) = self.process.take() else {
            return Ok(());
        };
        process.terminate();
        process.wait(Duration::from_secs(40)).map(drop)
    }

    /// Runs `cloudcore WORDS --kubeconfig …`; it must succeed. Gives its standard output.
    pub fn command(&self, words: &[&str]) -> Result<String> {
        let said = self.said(words)?;
        ensure!(
            said.code == 0,
            "cloudcore {} ended with {}: {}{}",
            words.join(" "),
            said.code,
            said.stdout,
            said.stderr
        );
        Ok(said.stdout)
    }

    /// As [`Cloud::command`], whatever its end.
    pub fn said(&self, words: &[&str]) -> Result<Said> {
        let mut command = self.bed.command(&self.program);
        let output = command
            .args(words)
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .output()?;
        Ok(Said {
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            code: output.status.code().unwrap_or(-1),
        })
    }

    /// `cloudcore token create FLAGS`.
    pub fn invite(&self, flags: &[&str]) -> Result<Invitation> {
        let words: Vec<&str> = ["token", "create"]
            .into_iter()
            .chain(flags.iter().copied())
            .collect();
        Invitation::parse(&self.command(&words)?)
    }

    /// `cloudcore node revoke NAME`.
    pub fn revoke(&self, node: &str) -> Result<String> {
        self.command(&["node", "revoke", node])
    }

    /// The last lines of its log.
    pub fn tail(&self, lines: usize) -> String {
        self.process
            .as_ref()
            .map(|process| process.tail(lines))
            .unwrap_or_default()
    }

    /// Everything it has logged, earlier runs included.
    pub fn text(&self) -> String {
        self.process.as_ref().map(Proc::text).unwrap_or_default()
    }

    /// Its process id, for figures.
    pub fn pid(&self) -> Option<i32> {
        self.process.as_ref().map(Proc::pid)
    }
}

impl Invitation {
    fn parse(said: &str) -> Result<Invitation> {
        let line = said.trim();
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["edgecore", "--join", join, "--token", token] => Ok(Invitation {
                line: line.to_owned(),
                join: join.to_owned(),
                token: token.to_owned(),
            }),
            _ => bail!("not one line `edgecore --join HOST:PORT --token TOKEN`: {said:?}"),
        }
    }
}

/// The path of `cloudcore` or `edgecore`, of the same build as this program. The first call makes
/// sure that they are up to date. `EDGE_PRODUCTS` names another directory to take them from.
pub fn product(name: &str) -> Result<PathBuf> {
    static BUILT: OnceLock<Result<(), String>> = OnceLock::new();
    if let Some(dir) = std::env::var_os("EDGE_PRODUCTS") {
        let path = PathBuf::from(dir).join(name);
        ensure!(path.is_file(), "EDGE_PRODUCTS has no {name}");
        return Ok(path);
    }
    let dir = testbed_program()?
        .parent()
        .context("directory of this program")?
        .to_owned();
    BUILT
        .get_or_init(|| build_products(&dir).map_err(|error| format!("{error:#}")))
        .clone()
        .map_err(|error| anyhow!(error))?;
    let path = dir.join(name);
    ensure!(
        path.is_file(),
        "{} is not built: cargo build --workspace",
        path.display()
    );
    Ok(path)
}

/// `cargo test` builds the programs of its own package only: cargo is asked for the others, which
/// costs nothing when they are fresh.
fn build_products(dir: &Path) -> Result<()> {
    let cargo = std::env::var_os("CARGO");
    let Some(cargo) = cargo.filter(|_| dir.ends_with("debug")) else {
        return Ok(());
    };
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    run(Command::new(cargo)
        .current_dir(workspace)
        .args(["build", "--workspace", "--bins", "--target-dir"])
        .arg(dir.parent().context("target directory")?))
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invitation_is_exactly_one_line() {
        let found = Invitation::parse("edgecore --join h:10000 --token abc\n").expect("parses");
        assert_eq!(
            (found.join.as_str(), found.token.as_str()),
            ("h:10000", "abc")
        );
        assert!(Invitation::parse("warning\nedgecore --join h:1 --token a\n").is_err());
        assert!(Invitation::parse("").is_err());
    }
}
