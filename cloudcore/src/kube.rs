//! The API server's client: whom CloudCore acts as, over which connections.
//!
//! - Owns: the connections to the API server, CloudCore's own token, and the knowledge of how this
//!   server lets it act as a node.
//! - Takes: a kubeconfig or the in-cluster files ([`Access`]).
//! - Gives: clients. [`KubeClients::own`] acts as the ServiceAccount `edge-system/cloudcore`;
//!   [`KubeClients::as_node`] acts as one node where the server has constrained impersonation, and
//!   as the ServiceAccount under its direct role where it has not. The `_watch` forms use
//!   connections of their own, so that thousands of watches never stand before a write.
//! - Never: works as the user of a kubeconfig. That user asks for the ServiceAccount's token and
//!   does what the subcommands `install`, `token` and `node` do, nothing else.
//!
//! ```text
//!   Mode::Unproven ──proof──► Constrained ◄──two proofs after a 403──► Direct
//! ```

pub mod access;
pub mod auth;
pub mod epoch;
#[cfg(test)]
pub(crate) mod fake;
pub mod install;
pub mod mode;
mod pool;
mod service;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use rand::Rng;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use common::ids::NodeName;

pub use access::Access;
pub use mode::{Impersonation, Mode};

use auth::TokenSource;
use pool::Lane;
use service::ApiService;

/// The namespace of everything that CloudCore keeps in the cluster.
pub const NAMESPACE: &str = "edge-system";
/// The ServiceAccount that CloudCore acts as.
pub const SERVICE_ACCOUNT: &str = "cloudcore";
/// The field manager of everything that CloudCore applies.
pub const FIELD_MANAGER: &str = "cloudcore";

/// What went wrong between CloudCore and the API server.
#[derive(Debug, thiserror::Error)]
pub enum KubeError {
    #[error(
        "no way to the API server: give --kubeconfig FILE (or KUBECONFIG), or run in a cluster with a ServiceAccount"
    )]
    NoAccess(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("kubeconfig {path} cannot be used")]
    Kubeconfig {
        path: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error(
        "kubeconfig {path} names a proxy-url, which is not supported: give one that reaches the API server directly"
    )]
    Proxy { path: String },
    #[error("TLS to the API server {server} cannot be set up")]
    Tls {
        server: String,
        #[source]
        source: kube::Error,
    },
    #[error("the token file {path} cannot be used")]
    TokenFile {
        path: String,
        #[source]
        source: std::io::Error,
    },
    #[error(
        "ServiceAccount {NAMESPACE}/{SERVICE_ACCOUNT} does not exist: run `cloudcore install` with the same kubeconfig first"
    )]
    NotInstalled,
    #[error("no token for ServiceAccount {NAMESPACE}/{SERVICE_ACCOUNT}")]
    TokenRequest(#[source] Fault),
    #[error("{what} failed")]
    Api {
        what: String,
        #[source]
        source: Fault,
    },
    #[error("{what}: the API server did not answer within {} s", .after.as_secs())]
    Silent { what: String, after: Duration },
    #[error("{what} holds something else than CloudCore wrote there: {why}")]
    Malformed { what: String, why: String },
    #[error(
        "the API server does not let ServiceAccount {NAMESPACE}/{SERVICE_ACCOUNT} act as a node: its roles are missing; run `cloudcore install` with a cluster administrator's kubeconfig"
    )]
    NoRole,
    #[error(
        "the API server has no constrained impersonation (Kubernetes 1.36 and newer have it): use --impersonation auto or direct"
    )]
    NoConstrainedImpersonation,
}

/// A request that failed, told in the API server's own words where it answered.
#[derive(Debug)]
pub struct Fault(pub kube::Error);

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            kube::Error::Api(status) => {
                let (code, words) = (status.code, &status.message);
                write!(f, "the API server answered {code}: {words}")
            }
            other => other.fmt(f),
        }
    }
}

impl std::error::Error for Fault {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.0 {
            // Below the answer there is only the same once more, spelt out field by field.
            kube::Error::Api(_) => None,
            other => other.source(),
        }
    }
}

impl KubeError {
    pub(crate) fn api(what: impl Into<String>) -> impl FnOnce(kube::Error) -> Self {
        let what = what.into();
        move |source| Self::Api {
            what,
            source: Fault(source),
        }
    }
}

/// How long a watch that broke waits before it begins again: half a second, twice as long each time
/// up to five seconds, apart from one another. An API server that is back must not be kept waiting
/// for by a cloud that has a handful of watches of its own.
pub(crate) struct WatchBackoff(Duration);

impl Default for WatchBackoff {
    fn default() -> Self {
        Self(Duration::from_millis(500))
    }
}

impl Iterator for WatchBackoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let wait = self.0;
        self.0 = (wait * 2).min(Duration::from_secs(5));
        Some(wait.mul_f64(rand::rng().random_range(0.7..1.0)))
    }
}

impl kube::runtime::utils::Backoff for WatchBackoff {
    fn reset(&mut self) {
        *self = Self::default();
    }
}

/// The HTTP status that the API server answered with, if it answered.
pub fn status_code(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}

/// Somebody else wrote in between: read again and decide again.
pub fn is_conflict(error: &kube::Error) -> bool {
    status_code(error) == Some(409)
}

/// The object does not exist.
pub fn is_absent(error: &kube::Error) -> bool {
    status_code(error) == Some(404)
}

/// The clients of one CloudCore. Cheap to clone.
#[derive(Clone)]
pub struct KubeClients {
    shared: Arc<Shared>,
    own: Client,
    own_watch: Client,
}

/// What all clients of one CloudCore share.
pub(crate) struct Shared {
    base: http::Uri,
    work: pool::Pool,
    watches: pool::Pool,
    token: TokenSource,
    mode: watch::Sender<Mode>,
    /// A request for a node was forbidden: the mode may have changed under us.
    doubted: Notify,
    choice: Impersonation,
}

impl KubeClients {
    /// Connects and proves the mode. The task renews the token and proves the mode again after a
    /// 403; the caller runs it.
    pub async fn build(
        access: &Access,
        choice: Impersonation,
    ) -> Result<(Self, KubeTask), KubeError> {
        let token = TokenSource::build(access).await?;
        let clients = Self::connect(access, choice, token)?;
        mode::settle(&clients).await?;
        let task = KubeTask {
            clients: clients.clone(),
        };
        Ok((clients, task))
    }

    /// Clients whose mode is not yet proven: until then they act as a node by impersonation.
    pub(crate) fn connect(
        access: &Access,
        choice: Impersonation,
        token: TokenSource,
    ) -> Result<Self, KubeError> {
        let shared = Arc::new(Shared {
            base: access.server().clone(),
            work: pool::Pool::build(access, Lane::Work)?,
            watches: pool::Pool::build(access, Lane::Watch)?,
            token,
            mode: watch::Sender::new(Mode::Unproven),
            doubted: Notify::new(),
            choice,
        });
        let client = |lane| Client::new(ApiService::own(shared.clone(), lane), NAMESPACE);
        Ok(Self {
            own: client(Lane::Work),
            own_watch: client(Lane::Watch),
            shared,
        })
    }

    /// Acts as CloudCore's ServiceAccount: reads and writes.
    pub fn own(&self) -> Client {
        self.own.clone()
    }

    /// Acts as CloudCore's ServiceAccount: lists and watches.
    pub fn own_watch(&self) -> Client {
        self.own_watch.clone()
    }

    /// Acts as one node: reads and writes. It costs a small task: keep it for a session's length.
    pub fn as_node(&self, node: &NodeName) -> Client {
        self.node_client(node, Lane::Work)
    }

    /// Acts as one node: lists and watches.
    pub fn as_node_watch(&self, node: &NodeName) -> Client {
        self.node_client(node, Lane::Watch)
    }

    /// How this server lets CloudCore act as a node, as proven last.
    pub fn mode(&self) -> watch::Receiver<Mode> {
        self.shared.mode.subscribe()
    }

    /// Marks one request so that [`Self::own`] sends it as this node: for callers with one request
    /// for each of thousands of nodes, to whom a client for each would cost too much.
    pub fn mark_as_node<B>(request: &mut http::Request<B>, node: &NodeName) {
        request
            .extensions_mut()
            .insert(service::AsNode(node.clone()));
    }

    fn node_client(&self, node: &NodeName, lane: Lane) -> Client {
        let service = ApiService::node(self.shared.clone(), lane, node.clone());
        Client::new(service, NAMESPACE)
    }
}

/// Keeps the token fresh and the mode true.
pub struct KubeTask {
    clients: KubeClients,
}

impl KubeTask {
    /// Ends with the token.
    pub async fn run(self, shutdown: CancellationToken) {
        let shared = &self.clients.shared;
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {}
            () = shared.token.keep_fresh() => {}
            () = mode::keep_true(&self.clients) => {}
        }
    }
}

#[cfg(test)]
mod tests;
