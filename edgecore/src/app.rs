//! Builds every component of EdgeCore, starts every long-lived task, and fixes the order in which
//! they stop: read this first.
//!
//! ```text
//! store ── desired ──► pods (manager, workers) ──► cri
//!   ▲         ▲          │ reports, events
//!   │       commit       ▼
//!   └──── hub (dial, session) ◄── reports, events, tokens ── node (status, environment)
//!              │ tunnels
//!              ▼
//! admin ──► stream (the node's kubelet API) ──► cri, desired, reports
//! ```
//!
//! No network call stands between the start and the Pods: what the store holds is enough.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::hub::proto::NodeEnvironment;
use common::signals::stop_on_signals;
use common::tasks::{PartEnded, Tasks};
use prost::Message as _;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::admin::{self, Shown};
use crate::config::Config;
use crate::cri::{self, Runtime};
use crate::hub::identity::{Identity, IdentityError};
use crate::hub::session::kept;
use crate::hub::tokens::{ASKS, SessionTokens};
use crate::hub::{self, clock};
use crate::join::{self, Enrolment, Join, JoinError};
use crate::node::ca::{self, CaError};
use crate::node::status::NodeConfig;
use crate::node::{network, reporter};
use crate::pods::jobs::Paths;
use crate::pods::ledger::LedgerStore;
use crate::pods::manager::{self, PodManager};
use crate::pods::tokens::Tokens;
use crate::pods::volumes::{Volumes, VolumesConfig};
use crate::store::desired::Desired;
use crate::store::events::Events;
use crate::store::reports::Reports;
use crate::store::{Store, StoreError};
use crate::stream::leftover::Leftovers;
use crate::stream::stats::{self, Gatherer};
use crate::stream::tunnels::Tunnels;
use crate::stream::{self, NodeApi};

/// Why edgecore did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    #[error("cannot start the runtime of tasks")]
    Tokio(#[source] std::io::Error),
    #[error("cannot use the data directory {0}")]
    DataDir(PathBuf, #[source] std::io::Error),
    #[error("cannot open the store in {0}")]
    Store(PathBuf, #[source] StoreError),
    #[error(transparent)]
    Join(#[from] JoinError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(
        "--name {asked} was given, but the data directory belongs to node {is}: give it another --data-dir"
    )]
    OtherNode { asked: String, is: String },
    #[error(transparent)]
    Cri(#[from] cri::client::BadEndpoint),
    #[error(transparent)]
    NodeCa(#[from] CaError),
    #[error("edgecore stops")]
    PartEnded(#[from] PartEnded),
}

impl AppError {
    /// What the process exits with; see `docs/operations/join.md`.
    pub fn exit_code(&self) -> u8 {
        match self {
            AppError::Join(error) => error.exit_code(),
            AppError::OtherNode { .. } | AppError::Cri(_) => 3,
            AppError::Store(..) | AppError::DataDir(..) | AppError::Identity(_) => 5,
            AppError::Tokio(_) | AppError::NodeCa(_) | AppError::PartEnded(_) => 1,
        }
    }
}

/// Threads for what blocks: the store's commits and a Pod's files. Idle ones end.
const BLOCKING_THREADS: usize = 8;

/// Runs edgecore until it is told to stop.
pub fn start(config: Config) -> Result<(), AppError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .build()
        .map_err(AppError::Tokio)?;
    runtime.block_on(run(config))
}

async fn run(config: Config) -> Result<(), AppError> {
    let shutdown = CancellationToken::new();
    stop_on_signals(shutdown.clone()).map_err(AppError::Tokio)?;
    let store = open(&config.data_dir)?;
    let ask = config.join.as_deref().map(|address| Join {
        address,
        token: config.token.as_deref(),
        name: config.name.as_deref(),
    });
    let enrolment = join::ensure(&store.store, ask).await?;
    let identity = Identity::load(&store.store)?.ok_or(JoinError::NeverJoined)?;
    if let Some(asked) = config
        .name
        .as_deref()
        .filter(|n| *n != identity.node.as_str())
    {
        let (asked, is) = (asked.to_owned(), identity.node.to_string());
        return Err(AppError::OtherNode { asked, is });
    }
    info!(node = %identity.node, cluster = identity.link.cluster_id, "edgecore starts");
    let result = assemble(&config, store, &identity, enrolment, shutdown).await;
    info!("edgecore stops; Pods keep running");
    result
}

struct Opened {
    store: Store,
    incarnation: [u8; 16],
}

fn open(data_dir: &Path) -> Result<Opened, AppError> {
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder
        .create(data_dir)
        .map_err(|e| AppError::DataDir(data_dir.into(), e))?;
    let failed = |e| AppError::Store(data_dir.into(), e);
    let (store, opened) = Store::open(&data_dir.join("store")).map_err(failed)?;
    if let Some(recovery) = opened.recovered {
        warn!(%recovery, "the store was damaged and has been repaired");
    }
    Ok(Opened {
        store,
        incarnation: opened.incarnation,
    })
}

/// The ledger's record in the store.
struct KeptLedger(Store);

const LEDGER: &str = "ledger";

impl LedgerStore for KeptLedger {
    fn load(&self) -> Option<Vec<u8>> {
        self.0.meta().get(LEDGER).ok().flatten()
    }

    fn save(&self, bytes: &[u8]) -> Result<(), String> {
        self.0
            .meta()
            .put(LEDGER, bytes)
            .map_err(|e| common::telemetry::chain(&e))
    }
}

async fn assemble(
    config: &Config,
    Opened { store, incarnation }: Opened,
    identity: &Identity,
    enrolment: Option<Enrolment>,
    shutdown: CancellationToken,
) -> Result<(), AppError> {
    let failed = |e| AppError::Store(config.data_dir.clone(), e);
    let desired = Desired::load(&store).map_err(failed)?;
    let reports = Reports::load(&store).map_err(failed)?;
    let events = Events::load(&store).map_err(failed)?;
    let (asks, asked) = mpsc::channel(ASKS);
    let connected = watch::Sender::new(false);
    let from_cloud = watch::Sender::new(kept_environment(&store));
    let environment = watch::Sender::new(None);

    let boot_id = clock::boot_id();
    let tokens: Tokens = Arc::new(SessionTokens::new(
        store.clone(),
        asks,
        connected.subscribe(),
        boot_id,
    ));
    let volumes = VolumesConfig {
        root: config.data_dir.clone(),
        node_ca_pem: config
            .node_ca
            .then(|| ca::ensure(&config.data_dir, identity.node.as_str()))
            .transpose()?,
    };
    let volumes = Arc::new(Volumes::new(volumes, desired.clone(), tokens));
    let runtime: Runtime = Arc::new(cri::client::Client::build(&config.cri)?);
    let paths = Paths {
        pod_logs: config.pod_logs_dir.clone(),
        ..Paths::default()
    };
    let (pods, pods_task) = PodManager::build(
        manager::Config {
            paths: paths.clone(),
            logs: config.log_rotation,
            ..manager::Config::default()
        },
        manager::Deps {
            cri: runtime.clone(),
            desired: desired.clone(),
            reports: reports.clone(),
            events: events.clone(),
            volumes,
            environment: environment.subscribe(),
            ledger: Arc::new(KeptLedger(store.clone())),
            clock: None,
        },
    );
    let (leftovers, leftover_task) = Leftovers::build();
    let stats = Gatherer::new(stats::Deps {
        cri: runtime.clone(),
        cgroups: pods.cgroups(),
        desired: desired.clone(),
        paths: paths.clone(),
        data_dir: config.data_dir.clone(),
        node: identity.node.to_string(),
    });
    let api = NodeApi::build(stream::Deps {
        stats,
        cri: runtime.clone(),
        desired: desired.clone(),
        reports: reports.clone(),
        runtime: pods.runtime.clone(),
        environment: environment.subscribe(),
        leftovers,
        settings: stream::Settings {
            node: identity.node.to_string(),
            cri: config.cri.clone(),
            pod_logs: config.pod_logs_dir.clone(),
            most_pods: manager::Config::default().most_pods,
        },
    });
    let node_task = reporter::Task::build(reporter::Deps {
        config: NodeConfig::new(identity.node.as_str()),
        data_dir: config.data_dir.clone(),
        reports: reports.clone(),
        cri: runtime,
        runtime: pods.runtime.clone(),
        from_cloud: from_cloud.subscribe(),
        environment: environment.clone(),
    });
    let network_task = network::Task::build(network::Deps {
        store: store.clone(),
        desired: desired.clone(),
        node_name: identity.node.to_string(),
        pod_cidr: config.pod_cidr.clone(),
        cni_config_dir: config.cni_config_dir.clone(),
        cni_bin_dir: config.cni_bin_dir.clone(),
        bridge: config.bridge.clone(),
        from_cloud: from_cloud.subscribe(),
        environment: environment.subscribe(),
    });
    let shown = Shown {
        node: identity.node.to_string(),
        desired: desired.clone(),
        reports: reports.clone(),
        connected: connected.subscribe(),
        runtime: pods.runtime.clone(),
    };
    let hub_task = hub::Task::build(hub::Deps {
        store: store.clone(),
        incarnation,
        desired,
        reports,
        events,
        asks: asked,
        connected,
        environment: from_cloud,
        tunnels: Tunnels::build(api.clone()),
        transport: config.transport,
        dead_after: config.dead_after,
        enrolment,
    });

    let mut tasks = Tasks::default();
    tasks.spawn("the Pod manager", pods_task.run(shutdown.clone()));
    tasks.spawn("the node's status", node_task.run(shutdown.clone()));
    tasks.spawn("the Pods' network", network_task.run(shutdown.clone()));
    tasks.spawn("the hub", hub_task.run(shutdown.clone()));
    let admin = admin::run(config.admin.clone(), shown, api, shutdown.clone());
    tasks.spawn_spare("the admin socket", admin);
    tasks.spawn(
        "the end of what execs leave",
        leftover_task.run(shutdown.clone()),
    );
    tasks.supervise(shutdown, |_| {}).await?;
    store.close().map_err(failed)
}

fn kept_environment(store: &Store) -> Option<NodeEnvironment> {
    let bytes = store.meta().get(kept::ENVIRONMENT).ok().flatten()?;
    NodeEnvironment::decode(&bytes[..]).ok()
}
