//! `testbed`: builds a control plane, brings the quickstart up and down, and holds the namespaces
//! of the machines (the commands that `--help` does not show).

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand, ValueEnum};
use testbed::cluster::Options;
use testbed::holder::{self, MachineSpec};
use testbed::programs::{self, K8S_1_33, K8S_1_37, METRICS_SERVER, Release};
use testbed::{bed, bench, e2e, quickstart};

#[derive(Parser)]
#[command(about = "A real control plane and real edge machines on one computer")]
struct Cli {
    #[command(subcommand)]
    command: Word,
}

#[derive(Subcommand)]
enum Word {
    /// Build the programs of a control plane that are neither installed nor in the cache.
    Build {
        #[arg(long, value_enum, default_value_t = Minor::Newest)]
        k8s: Minor,
        /// Also the kubelet and the containerd that the benchmark compares with.
        #[arg(long)]
        peers: bool,
        /// Also what the tests of kubectl's streams use: an old kubectl and the metrics-server.
        #[arg(long)]
        streams: bool,
    },
    /// Start a control plane (unless KUBECONFIG names one), cloudcore, one edge and an example.
    Up(Place),
    /// Remove everything that `up` made.
    Down(Place),
    /// Measure what the specification promises, beside a stock kubelet in the same run.
    Bench(bench::Flags),
    /// Run the upstream end-to-end suite on a node of ours, and what fails there on a stock kubelet.
    E2e(e2e::Flags),
    #[command(hide = true)]
    Guard {
        #[arg(long)]
        number: u8,
        #[arg(long)]
        state: PathBuf,
    },
    #[command(hide = true)]
    Hold {
        #[arg(long)]
        network: bool,
        #[command(flatten)]
        machine: MachineFlags,
    },
    #[command(hide = true)]
    MachineInit(MachineFlags),
    #[command(hide = true)]
    Enter {
        #[arg(long)]
        target: i32,
        #[arg(long)]
        cgroup: Option<String>,
        #[arg(long)]
        pid_file: Option<PathBuf>,
        #[arg(last = true)]
        argv: Vec<String>,
    },
}

#[derive(Args)]
struct Place {
    /// Where everything is kept while it runs.
    #[arg(long, default_value = "/var/lib/edge-quickstart")]
    state: PathBuf,
    /// The manifest that is applied in the end.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/examples/hello.yaml"))]
    example: PathBuf,
}

#[derive(Args)]
struct MachineFlags {
    #[arg(long, default_value = "")]
    name: String,
    #[arg(long, default_value = "/")]
    dir: PathBuf,
    #[arg(long, default_value = "/")]
    state: PathBuf,
    #[arg(long, default_value = "")]
    cgroup: String,
}

#[derive(Clone, Copy, ValueEnum)]
enum Minor {
    #[value(name = "1.37")]
    Newest,
    #[value(name = "1.33")]
    Oldest,
}

impl Minor {
    fn release(self) -> Release {
        match self {
            Minor::Newest => K8S_1_37,
            Minor::Oldest => K8S_1_33,
        }
    }
}

impl From<MachineFlags> for MachineSpec {
    fn from(flags: MachineFlags) -> MachineSpec {
        MachineSpec {
            name: flags.name,
            dir: flags.dir,
            state: flags.state,
            cgroup: flags.cgroup,
        }
    }
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Err(error) => {
            eprintln!("testbed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(word: Word) -> Result<i32> {
    match word {
        Word::Build {
            k8s,
            peers,
            streams,
        } => {
            quickstart::build(Options::new(k8s.release()), peers)?;
            if streams {
                programs::ensure_debian_kubectl()?;
                programs::ensure("metrics-server", METRICS_SERVER)?;
            }
        }
        Word::Up(place) => quickstart::up(&place.state, &place.example)?,
        Word::Down(place) => quickstart::down(&place.state, &place.example)?,
        Word::Bench(flags) => return bench::run(&flags),
        Word::E2e(flags) => return e2e::run(&flags),
        Word::Guard { number, state } => bed::guard(number, &state)?,
        Word::Hold { network: true, .. } => holder::hold_network()?,
        Word::Hold { machine, .. } => holder::hold_machine(&machine.into())?,
        Word::MachineInit(machine) => holder::machine_init(&machine.into())?,
        Word::Enter {
            target,
            cgroup,
            pid_file,
            argv,
        } => {
            return holder::enter(target, cgroup.as_deref(), pid_file.as_deref(), &argv);
        }
    }
    Ok(0)
}
