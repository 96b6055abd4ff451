//! The command line: what scripts and people call. Names and forms are fixed.

mod node;
mod table;
mod token;

use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use common::ids::NodeName;

use crate::config::{Config, HostPort, Settings, dead_after, duration};
use crate::enroll::authority::Authority;
use crate::kube::{Access, Impersonation, Mode, install};
use crate::stream::{AddressType, PortRange, Serving};

/// The cloud side: runs beside the Kubernetes API and serves the edge nodes.
#[derive(Debug, Parser)]
#[command(name = "cloudcore", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: RunFlags,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve edge nodes (the default).
    Run(RunFlags),
    /// Apply namespace, ServiceAccount, RBAC and CRDs; again is harmless.
    Install(InstallFlags),
    /// Look at enrolled devices, or end an enrolment.
    #[command(subcommand)]
    Node(NodeCommand),
    /// Make, look at or end join tokens.
    #[command(subcommand)]
    Token(TokenCommand),
}

#[derive(Debug, Args, Default)]
struct RunFlags {
    /// Configuration file (YAML).
    #[arg(long, value_name = "FILE", env = "CLOUDCORE_CONFIG")]
    config: Option<PathBuf>,
    /// Way to the API server; absent in a cluster.
    #[arg(long, value_name = "FILE", env = "CLOUDCORE_KUBECONFIG")]
    kubeconfig: Option<PathBuf>,
    /// Where the hub listens, UDP and TCP [default: 0.0.0.0:10000].
    #[arg(long, value_name = "ADDR:PORT", env = "CLOUDCORE_LISTEN")]
    listen: Option<SocketAddr>,
    /// Where devices reach the hub; several with commas between.
    #[arg(
        long,
        value_name = "HOST:PORT",
        env = "CLOUDCORE_ADVERTISE",
        value_delimiter = ','
    )]
    advertise: Option<Vec<HostPort>>,
    /// Where health, metrics and the session dump are served [default: 127.0.0.1:10080].
    #[arg(long, value_name = "ADDR:PORT", env = "CLOUDCORE_ADMIN")]
    admin: Option<SocketAddr>,
    /// How to act as a node: auto, constrained or direct [default: auto].
    #[arg(long, env = "CLOUDCORE_IMPERSONATION")]
    impersonation: Option<Impersonation>,
    /// Give new Nodes the taint node-role.kubernetes.io/edge:NoSchedule [default: true].
    #[arg(long, value_name = "BOOL", env = "CLOUDCORE_TAINT_NODES")]
    taint_nodes: Option<bool>,
    /// Silence after which a link is dead; devices take it over [default: 45s].
    #[arg(long, value_name = "TIME", env = "CLOUDCORE_DEAD_AFTER", value_parser = dead_after)]
    dead_after: Option<std::time::Duration>,
    /// Life of a device's certificate [default: 90d].
    #[arg(long, value_name = "TIME", env = "CLOUDCORE_CERTIFICATE_LIFETIME", value_parser = duration)]
    certificate_lifetime: Option<std::time::Duration>,
    /// How long an expired certificate still gets a new one [default: 180d].
    #[arg(long, value_name = "TIME", env = "CLOUDCORE_REENROL_GRACE", value_parser = duration)]
    reenrol_grace: Option<std::time::Duration>,
    /// The cluster's DNS domain [default: cluster.local].
    #[arg(long, env = "CLOUDCORE_CLUSTER_DOMAIN")]
    cluster_domain: Option<String>,
    /// The cluster's DNS address [default: that of Service kube-system/kube-dns].
    #[arg(long, value_name = "IP", env = "CLOUDCORE_CLUSTER_DNS")]
    cluster_dns: Option<std::net::IpAddr>,
    /// Ranges that nodes must not give to their Pods, with commas between.
    #[arg(long, value_name = "CIDR", env = "CLOUDCORE_CLUSTER_RANGES")]
    cluster_ranges: Option<String>,
    /// Where the API server reaches the nodes' kubelet endpoints [default: POD_IP, or found out].
    #[arg(long, value_name = "IP", env = "CLOUDCORE_KUBELET_ADDRESS")]
    kubelet_address: Option<std::net::IpAddr>,
    /// How Nodes report that address: InternalIP or Hostname [default: InternalIP].
    #[arg(long, value_name = "TYPE", env = "CLOUDCORE_KUBELET_ADDRESS_TYPE")]
    kubelet_address_type: Option<AddressType>,
    /// Ports of the kubelet endpoints, one for each node [default: 20000-29999].
    #[arg(long, value_name = "FIRST-LAST", env = "CLOUDCORE_KUBELET_PORTS")]
    kubelet_ports: Option<PortRange>,
    /// Who signs the kubelet endpoints' certificate: auto, own or cluster [default: auto].
    #[arg(
        long,
        value_name = "SIGNER",
        env = "CLOUDCORE_KUBELET_SERVING_CERTIFICATE"
    )]
    kubelet_serving_certificate: Option<Serving>,
    /// What is logged, as in info,cloudcore=debug [default: info].
    #[arg(long, value_name = "FILTER", env = "CLOUDCORE_LOG")]
    log: Option<String>,
}

#[derive(Debug, Args)]
struct Kubeconfig {
    /// Way to the API server; its user makes the change.
    #[arg(long, value_name = "FILE", env = "CLOUDCORE_KUBECONFIG")]
    kubeconfig: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct InstallFlags {
    #[command(flatten)]
    kubeconfig: Kubeconfig,
    /// How CloudCore will act as a node: auto, constrained or direct.
    #[arg(long, env = "CLOUDCORE_IMPERSONATION", default_value = "auto")]
    impersonation: Impersonation,
}

#[derive(Debug, Subcommand)]
enum NodeCommand {
    /// List the enrolled devices.
    List(Kubeconfig),
    /// End an enrolment: its session, its certificate and its Node.
    Revoke {
        #[command(flatten)]
        kubeconfig: Kubeconfig,
        /// The node's name.
        #[arg(value_parser = node_name)]
        name: NodeName,
    },
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// Make a token and print the line to paste on the device.
    Create(token::CreateFlags),
    /// List the tokens; their secrets are not kept.
    List(Kubeconfig),
    /// End a token; devices that joined with it stay.
    Revoke {
        #[command(flatten)]
        kubeconfig: Kubeconfig,
        /// The token's id, as `token list` shows it.
        id: String,
    },
}

fn node_name(text: &str) -> Result<NodeName, String> {
    NodeName::parse(text).map_err(|e| e.to_string())
}

impl RunFlags {
    fn config(self) -> anyhow::Result<Config> {
        let file = match &self.config {
            Some(path) => Settings::read(path)?,
            None => Settings::default(),
        };
        let ranges = self.cluster_ranges.as_deref().map(crate::config::ranges);
        let flags = Settings {
            kubeconfig: self.kubeconfig,
            listen: self.listen,
            advertise: self.advertise,
            admin: self.admin,
            impersonation: self.impersonation,
            taint_nodes: self.taint_nodes,
            dead_after: self.dead_after,
            certificate_lifetime: self.certificate_lifetime,
            reenrol_grace: self.reenrol_grace,
            cluster_domain: self.cluster_domain,
            cluster_dns: self.cluster_dns,
            cluster_ranges: ranges.transpose().map_err(anyhow::Error::msg)?,
            kubelet_address: self.kubelet_address,
            kubelet_address_type: self.kubelet_address_type,
            kubelet_ports: self.kubelet_ports,
            kubelet_serving_certificate: self.kubelet_serving_certificate,
            log: self.log,
        };
        Ok(flags.or(file).complete())
    }
}

/// Parses the arguments and does what they say.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match start(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say_error(&format!("cloudcore: {}", crate::chain(error.as_ref())));
            ExitCode::FAILURE
        }
    }
}

fn start(cli: Cli) -> anyhow::Result<()> {
    let command = cli.command.unwrap_or(Command::Run(cli.run));
    if matches!(command, Command::Run(_)) {
        keep_to_one_arena();
        open_as_many_files_as_may_be();
    }
    // Fails when it is installed already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("the runtime cannot start")?;
    runtime.block_on(dispatch(command))
}

/// How glibc is told; it looks once, before anything of ours runs.
const ARENAS: &str = "MALLOC_ARENA_MAX";

/// Starts the program again, in its own place, with one pool of memory for all threads: datagrams that
/// one thread read and another let go of left holes in each thread's own, 60 KB for each tunnel whose
/// reader stands still. Whoever sets the variable decides otherwise.
fn keep_to_one_arena() {
    if std::env::var_os(ARENAS).is_some() {
        return;
    }
    let Ok(program) = std::env::current_exe() else {
        return;
    };
    let mut words = std::env::args_os();
    let mut again = std::process::Command::new(program);
    if let Some(name) = words.next() {
        again.arg0(name);
    }
    // Returns only when it failed: then this goes on, with more memory.
    let _failed = again.args(words).env(ARENAS, "1").exec();
}

/// Shells and supervisors start programs with few (1024), and let those that ask have more. Each node
/// takes one for its endpoint.
fn open_as_many_files_as_may_be() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return;
    };
    // With fewer it runs too, and says so where it matters.
    let _refused = setrlimit(Resource::RLIMIT_NOFILE, most, most);
}

async fn dispatch(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Run(flags) => {
            let config = flags.config()?;
            log_to_stderr(&config.log)?;
            crate::app::run(config).await
        }
        Command::Install(flags) => run_install(&flags).await,
        Command::Node(NodeCommand::List(at)) => node::list(&user(&at).await?).await,
        Command::Node(NodeCommand::Revoke { kubeconfig, name }) => {
            node::revoke(&user(&kubeconfig).await?, &name).await
        }
        Command::Token(TokenCommand::Create(flags)) => {
            let client = user(flags.kubeconfig()).await?;
            token::create(&client, &flags).await
        }
        Command::Token(TokenCommand::List(at)) => token::list(&user(&at).await?).await,
        Command::Token(TokenCommand::Revoke { kubeconfig, id }) => {
            token::revoke(&user(&kubeconfig).await?, &id).await
        }
    }
}

async fn user(at: &Kubeconfig) -> anyhow::Result<kube::Client> {
    Ok(access(at.kubeconfig.as_deref()).await?.user()?)
}

async fn access(kubeconfig: Option<&Path>) -> anyhow::Result<Access> {
    Ok(Access::find(kubeconfig).await?)
}

async fn run_install(flags: &InstallFlags) -> anyhow::Result<()> {
    let access = access(flags.kubeconfig.kubeconfig.as_deref()).await?;
    let mode = install::install(&access, flags.impersonation, &mut |line| say(&line)).await?;
    let authority = Authority::ensure(&access.user()?).await?;
    say(&format!(
        "cluster {}: the CA is in place",
        authority.cluster
    ));
    say(match mode {
        Mode::Constrained => "CloudCore acts as each node by constrained impersonation",
        Mode::Direct | Mode::Unproven => {
            "CloudCore acts for nodes under its own direct role: this API server has no constrained impersonation, or it was not wanted"
        }
    });
    Ok(())
}

fn log_to_stderr(filter: &str) -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_env_filter(common::telemetry::filter(filter)?)
        .with_writer(std::io::stderr)
        .init();
    Ok(())
}

#[expect(clippy::print_stdout, reason = "what a command says is its result")]
fn say(line: &str) {
    println!("{line}");
}

#[expect(
    clippy::print_stderr,
    reason = "the last word of a command that failed"
)]
fn say_error(line: &str) {
    eprintln!("{line}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Cli {
        let words = std::iter::once("cloudcore").chain(line.split_whitespace());
        Cli::try_parse_from(words).unwrap_or_else(|e| panic!("{line}: {e}"))
    }

    #[test]
    fn as_many_files_may_be_open_as_the_system_lets() {
        use nix::sys::resource::{Resource, getrlimit, setrlimit};
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, soft.min(hard - 1), hard).unwrap();
        open_as_many_files_as_may_be();
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE), Ok((hard, hard)));
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn running_needs_no_word() {
        for line in [
            "--listen 127.0.0.1:1 --taint-nodes false",
            "run --listen 127.0.0.1:1 --taint-nodes false",
        ] {
            let cli = parse(line);
            let flags = match cli.command {
                Some(Command::Run(flags)) => flags,
                None => cli.run,
                Some(other) => panic!("{line}: {other:?}"),
            };
            let config = flags.config().unwrap();
            assert_eq!(config.listen.to_string(), "127.0.0.1:1");
            assert_eq!(config.advertise[0].to_string(), "127.0.0.1:1");
            assert!(!config.taint_nodes);
        }
    }

    #[test]
    fn the_fixed_forms_parse() {
        for line in [
            "",
            "--config f --kubeconfig k --listen 0.0.0.0:1 --advertise h:2,[::1]:3 --admin 127.0.0.1:4",
            "install --kubeconfig k",
            "node list --kubeconfig k",
            "node revoke --kubeconfig k edge-1",
            "node revoke edge-1",
            "token create",
            "token create --kubeconfig k --ttl 24h --uses 1 --node a --labels a=b,c=d --taints k=v:NoSchedule",
            "token list --kubeconfig k",
            "token revoke --kubeconfig k abc",
        ] {
            parse(line);
        }
    }

    #[test]
    fn every_flag_has_its_environment_variable() {
        for command in [Cli::command()]
            .iter()
            .flat_map(|c| std::iter::once(c.clone()).chain(c.get_subcommands().cloned()))
        {
            for arg in command.get_arguments().filter(|a| a.get_long().is_some()) {
                let long = arg.get_long().unwrap();
                if ["help", "version"].contains(&long) {
                    continue;
                }
                let want = format!("CLOUDCORE_{}", long.to_uppercase().replace('-', "_"));
                assert_eq!(
                    arg.get_env().and_then(|e| e.to_str()),
                    Some(want.as_str()),
                    "{long}"
                );
            }
        }
    }

    #[test]
    fn the_file_gives_what_no_flag_says() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.yaml");
        std::fs::write(&path, "listen: 127.0.0.1:7\nlog: debug\n").unwrap();
        let cli = parse(&format!("--config {} --log trace", path.display()));
        let config = cli.run.config().unwrap();
        assert_eq!((config.listen.port(), config.log.as_str()), (7, "trace"));
    }
}
