//! containerd inside a machine: its own root, state and socket, with the images of `images.rs`.
//!
//! Either the distribution's (1.6 on Debian 12) or the one built from the module in
//! `controlplane/containerd`, for figures beside a stock kubelet.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::bed::run;
use crate::images;
use crate::netns::{Inside, Machine};
use crate::programs::{self, CONTAINERD};
use crate::wait::wait_for;

/// Where the socket is, inside the machine. `/run` is the machine's own.
pub const SOCKET: &str = "/run/containerd/containerd.sock";

/// Whose containerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Flavour {
    /// The distribution's package.
    #[default]
    Packaged,
    /// The newest, built here.
    Built,
}

pub struct Containerd {
    process: Inside,
    ctr: PathBuf,
    socket: String,
}

impl Containerd {
    /// Starts it, waits until it answers, imports the images.
    pub fn start(machine: &Machine, flavour: Flavour, images_dir: &Path) -> Result<Containerd> {
        Containerd::start_as(machine, flavour, images_dir, "containerd")
    }

    /// As [`Containerd::start`], with a name of its own: one beside another on one machine.
    pub fn start_as(
        machine: &Machine,
        flavour: Flavour,
        images_dir: &Path,
        name: &str,
    ) -> Result<Containerd> {
        let (daemon, ctr) = match flavour {
            Flavour::Packaged => (programs::on_path("containerd")?, programs::on_path("ctr")?),
            Flavour::Built => {
                programs::ensure("containerd-shim-runc-v2", CONTAINERD)?;
                let daemon = programs::ensure("containerd", CONTAINERD)?;
                (daemon, programs::ensure("ctr", CONTAINERD)?)
            }
        };
        let home = machine.dir.join(name);
        fs::create_dir_all(&home)?;
        let config = home.join("config.toml");
        let run_dir = format!("/run/{name}");
        fs::write(&config, configuration(&home.join("root"), &run_dir))?;
        let program = daemon.to_str().context("path of containerd")?;
        let path = search_path(&daemon)?;
        let process = machine.spawn(program, |command| {
            command.arg("--config").arg(&config).env("PATH", path);
        })?;
        let socket = format!("{run_dir}/containerd.sock");
        let mut containerd = Containerd {
            process,
            ctr,
            socket,
        };
        wait_for("containerd", Duration::from_secs(30), || {
            containerd.process.ensure_running()?;
            containerd.ctr(machine, &["version"])
        })?;
        let archive = images::archive(images_dir)?;
        let archive = archive.to_str().context("path of the images")?;
        containerd.ctr(machine, &["images", "import", archive])?;
        Ok(containerd)
    }

    /// Runs `ctr` in the namespace of the CRI.
    pub fn ctr(&self, machine: &Machine, words: &[&str]) -> Result<String> {
        let program = self.ctr.to_str().context("path of ctr")?;
        let mut command = machine.command(program)?;
        command.args(["--address", &self.socket, "-n", "k8s.io"]);
        run(command.args(words))
    }

    /// Where it listens, as `--cri` takes it.
    pub fn endpoint(&self) -> String {
        format!("unix://{}", self.socket)
    }

    /// Kills the daemon. Containers go on under their shims.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Its log, for a failed test.
    pub fn tail(&self, lines: usize) -> String {
        self.process.tail(lines)
    }
}

/// A version 2 file: 1.6 reads it, 2.x migrates it by itself.
///
/// `restrict_oom_score_adj`: without CAP_SYS_RESOURCE no sandbox starts (its first process ends
/// before it says its id), and plain `ctr run` does not show why.
fn configuration(root: &Path, run_dir: &str) -> String {
    format!(
        r#"version = 2
root = "{root}"
state = "{run_dir}/state"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs"]

[grpc]
  address = "{run_dir}/containerd.sock"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  max_container_log_line_size = 16384

[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "overlayfs"
  default_runtime_name = "runc"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "{cni}"
  conf_dir = "/etc/cni/net.d"
"#,
        root = root.display(),
        pause = images::PAUSE,
        cni = cni_plugins(),
    )
}

/// Debian's place for the CNI plugins, or everybody else's.
pub fn cni_plugins() -> &'static str {
    match Path::new("/usr/lib/cni/bridge").exists() {
        true => "/usr/lib/cni",
        false => "/opt/cni/bin",
    }
}

/// The daemon looks for its shim on the PATH, and a built one lies beside it. (The programs of one
/// release are each in a directory of their own.)
fn search_path(daemon: &Path) -> Result<std::ffi::OsString> {
    let usual = std::env::var_os("PATH").unwrap_or_default();
    let own = daemon.parent().context("directory of containerd")?;
    let shim = own.with_file_name(
        own.file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default()
            .replace("containerd-", "containerd-shim-runc-v2-"),
    );
    let sbin = PathBuf::from("/usr/sbin");
    let dirs = [shim, own.to_owned(), sbin]
        .into_iter()
        .chain(std::env::split_paths(&usual));
    Ok(std::env::join_paths(dirs)?)
}
