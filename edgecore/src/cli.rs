//! The command line. Each flag has an environment variable and a key in the configuration file.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

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
    /// Look at this device's Pods and into them, also while the cloud is away.
    Ctl(CtlArgs),
}

#[derive(Debug, Args)]
pub struct CtlArgs {
    /// The admin socket of the edgecore to ask.
    #[arg(
        long,
        global = true,
        env = "EDGECORE_ADMIN",
        default_value = "/var/lib/edgecore/admin.sock"
    )]
    pub admin: PathBuf,
    #[command(subcommand)]
    pub command: CtlCommand,
}

#[derive(Debug, Subcommand)]
pub enum CtlCommand {
    /// List what this device has.
    Get(GetArgs),
    /// Print a container's log.
    Logs(LogsArgs),
    /// Run a command in a container; ends with the command's exit code.
    Exec(ExecArgs),
}

#[derive(Debug, Args)]
pub struct GetArgs {
    pub resource: Resource,
    #[command(flatten)]
    pub namespace: Namespace,
    /// Of every namespace.
    #[arg(short = 'A', long)]
    pub all_namespaces: bool,
    /// As more columns or as JSON.
    #[arg(short, long, value_name = "FORMAT")]
    pub output: Option<Output>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Resource {
    #[value(alias = "pod", alias = "po")]
    Pods,
    #[value(alias = "device")]
    Devices,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Wide,
    Json,
}

#[derive(Debug, Args)]
pub struct Namespace {
    #[arg(short, long, default_value = "default")]
    pub namespace: String,
}

#[derive(Debug, Args)]
pub struct LogsArgs {
    pub pod: String,
    #[command(flatten)]
    pub namespace: Namespace,
    /// The Pod's default container otherwise, or its first.
    #[arg(short, long)]
    pub container: Option<String>,
    /// Go on as the container writes.
    #[arg(short, long)]
    pub follow: bool,
    /// Of the run before the last restart.
    #[arg(short, long)]
    pub previous: bool,
    /// Only so many lines from the end.
    #[arg(long, value_name = "LINES")]
    pub tail: Option<u64>,
    /// Only what is younger, such as 90s, 10m or 2h.
    #[arg(long, value_name = "DURATION", value_parser = crate::ctl::logs::seconds)]
    pub since: Option<u64>,
    /// With the time of each line.
    #[arg(long)]
    pub timestamps: bool,
}

#[derive(Debug, Args)]
pub struct ExecArgs {
    pub pod: String,
    #[command(flatten)]
    pub namespace: Namespace,
    /// The Pod's default container otherwise, or its first.
    #[arg(short, long)]
    pub container: Option<String>,
    /// Pass the standard input on.
    #[arg(short = 'i', long)]
    pub stdin: bool,
    /// Give the command a terminal.
    #[arg(short, long)]
    pub tty: bool,
    #[arg(last = true, required = true)]
    pub command: Vec<String>,
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
    /// Local socket for `edgecore status` and `ctl` [default: DATA-DIR/admin.sock].
    #[arg(long, value_name = "SOCKET", env = "EDGECORE_ADMIN")]
    pub admin: Option<PathBuf>,
    /// What to log, such as `info` or `edgecore=debug` [default: info].
    #[arg(long, env = "EDGECORE_LOG")]
    pub log: Option<String>,
}
