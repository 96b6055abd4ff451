//! An edge device: a machine behind NAT with containerd, and edgecore running in it.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cloud::{Invitation, product};
use crate::containerd::{Containerd, Flavour, SOCKET};
use crate::netns::{Backbone, Inside, Machine};

/// How edgecore may reach the cloud.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Transport {
    #[default]
    Auto,
    Quic,
    Websocket,
}

impl Transport {
    fn word(self) -> &'static str {
        match self {
            Transport::Auto => "auto",
            Transport::Quic => "quic",
            Transport::Websocket => "websocket",
        }
    }
}

/// An edge. Dropping it pulls the machine's plug.
pub struct Edge {
    /// The Node's name; the machine's own at first, a test may set another.
    pub name: String,
    pub machine: Machine,
    pub containerd: Option<Containerd>,
    pub transport: Transport,
    flavour: Flavour,
    program: PathBuf,
    process: Option<Inside>,
}

impl Edge {
    /// A machine with a running containerd and nothing else.
    pub fn prepare(backbone: &Backbone, name: &str, flavour: Flavour) -> Result<Edge> {
        let mut edge = Edge::bare(backbone, name)?;
        edge.containerd = Some(Containerd::start(
            &edge.machine,
            flavour,
            edge.images_dir()?,
        )?);
        Ok(edge)
    }

    /// A machine without a container runtime.
    pub fn bare(backbone: &Backbone, name: &str) -> Result<Edge> {
        let machine = backbone.machine(name)?;
        fs::create_dir_all(machine.dir.join("edgecore"))?;
        Ok(Edge {
            name: name.to_owned(),
            machine,
            containerd: None,
            transport: Transport::Auto,
            flavour: Flavour::Packaged,
            program: product("edgecore")?,
            process: None,
        })
    }

    /// Power fails and comes back; the runtime is started, edgecore is not.
    pub fn power_cycle(&mut self) -> Result<()> {
        self.machine.reboot()?;
        self.kill();
        match self.containerd.take() {
            Some(_) => self.start_runtime(),
            None => Ok(()),
        }
    }

    /// Starts containerd on the machine's disk.
    pub fn start_runtime(&mut self) -> Result<()> {
        let images = self.images_dir()?;
        self.containerd = Some(Containerd::start(&self.machine, self.flavour, images)?);
        Ok(())
    }

    /// Where edgecore keeps what must survive; readable from the host at the same path.
    pub fn data_dir(&self) -> PathBuf {
        self.machine.dir.join("edgecore")
    }

    /// Starts edgecore with the invitation and leaves it running.
    pub fn join(&mut self, invitation: &Invitation) -> Result<()> {
        self.launch(&["--join", &invitation.join, "--token", &invitation.token])
    }

    /// Starts edgecore on what its data directory holds.
    pub fn start(&mut self) -> Result<()> {
        self.launch(&[])
    }

    /// Starts edgecore with a join that is to fail; gives its exit code and what it wrote.
    pub fn join_refused(&mut self, join: &str, token: &str) -> Result<(i32, String)> {
        let before = self.text().len();
        self.launch(&["--join", join, "--token", token])?;
        let mut process = self.process.take().context("edgecore was started")?;
        let code = process
            .wait(Duration::from_secs(60))
            .with_context(|| process.tail(20));
        // Between two looks a character of several bytes may have been half written.
        let text = process.text();
        let said = text.get(before..).unwrap_or(&text).to_owned();
        if code.is_err() {
            process.kill();
        }
        Ok((code?, said))
    }

    fn launch(&mut self, words: &[&str]) -> Result<()> {
        let program = self
            .program
            .to_str()
            .context("path of edgecore")?
            .to_owned();
        let data = self.data_dir();
        let (name, transport) = (&self.name, self.transport.word());
        let process = self.machine.spawn(&program, |command| {
            command
                .args(words)
                .args(["--name", name, "--transport", transport]);
            command.args(["--cri", &format!("unix://{SOCKET}")]);
            command.arg("--data-dir").arg(&data);
        })?;
        self.process = Some(process);
        Ok(())
    }

    /// `kill -9` of edgecore alone.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
    }

    /// SIGTERM, and its exit code.
    pub fn stop(&mut self) -> Result<i32> {
        let Some(mut process) = self.process.take() else {
            return Ok(0);
        };
        process.signal(nix::sys::signal::Signal::SIGTERM);
        process.wait(Duration::from_secs(30))
    }

    /// Waits until edgecore ends by itself.
    pub fn wait_end(&mut self, limit: Duration) -> Result<i32> {
        self.process
            .as_mut()
            .context("edgecore does not run")?
            .wait(limit)
    }

    pub fn ensure_running(&mut self) -> Result<()> {
        self.process
            .as_mut()
            .context("edgecore does not run")?
            .ensure_running()
    }

    /// edgecore's process id on the host.
    pub fn pid(&self) -> Option<i32> {
        self.process.as_ref().map(|process| process.pid)
    }

    /// Everything edgecore has written since the machine was made.
    pub fn text(&self) -> String {
        let log = self
            .machine
            .dir
            .join("../../log")
            .join(format!("{}-edgecore.log", self.name));
        String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).into_owned()
    }

    pub fn tail(&self, lines: usize) -> String {
        let text = self.text();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// The image archive is made once for all machines of a testbed.
    pub fn images_dir(&self) -> Result<&std::path::Path> {
        self.machine
            .dir
            .parent()
            .context("directory of the machines")
    }
}
