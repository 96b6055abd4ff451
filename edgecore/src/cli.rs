//! The command line. Each flag has an environment variable and a key in the configuration file.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Keeps a device's Pods running, with and without the cloud.
#[derive(Debug, Parser)]
#[command(name = "edgecore", version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub run: RunArgs,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Join if needed, then run (the default).
    Run(RunArgs),
    /// Show what a running edgecore is doing.
    Status {
        /// The admin socket of the edgecore to ask.
        #[arg(
            long,
            env = "EDGECORE_ADMIN",
            default_value = "/var/lib/edgecore/admin.sock"
        )]
        admin: PathBuf,
    },
}

#[derive(Debug, Default, Args)]
pub struct RunArgs {
    /// YAML file; its keys are the long flags in camelCase.
    #[arg(long, env = "EDGECORE_CONFIG")]
    pub config: Option<PathBuf>,
    /// Join the cloud at HOST:PORT; needs --token the first time.
    #[arg(long, value_name = "HOST:PORT", env = "EDGECORE_JOIN")]
    pub join: Option<String>,
    /// What `cloudcore token create` printed. Every user of the device sees a command line:
    /// EDGECORE_TOKEN and the file's `token` hide it.
    #[arg(long, env = "EDGECORE_TOKEN", hide_env_values = true)]
    pub token: Option<String>,
    /// The Node's name; the host's name by default.
    #[arg(long, env = "EDGECORE_NAME")]
    pub name: Option<String>,
    /// The container runtime's socket [default: unix:///run/containerd/containerd.sock].
    #[arg(long, env = "EDGECORE_CRI")]
    pub cri: Option<String>,
    /// Everything that must survive [default: /var/lib/edgecore].
    #[arg(long, env = "EDGECORE_DATA_DIR")]
    pub data_dir: Option<PathBuf>,
    /// auto, quic or websocket [default: auto].
    #[arg(long, env = "EDGECORE_TRANSPORT")]
    pub transport: Option<String>,
    /// Local socket for `edgecore status` [default: DATA-DIR/admin.sock].
    #[arg(long, value_name = "SOCKET", env = "EDGECORE_ADMIN")]
    pub admin: Option<PathBuf>,
    /// What to log, such as `info` or `edgecore=debug` [default: info].
    #[arg(long, env = "EDGECORE_LOG")]
    pub log: Option<String>,
}
