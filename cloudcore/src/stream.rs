//! kubectl on edge nodes: the kubelet's API, served in the cloud for each node on a port of its own.
//!
//! - Owns: the listening ports, the certificate they show, the tunnels through the hub.
//! - Takes: requests of the API server and of scrapers; the sessions of this replica.
//! - Gives: to each node's Node the address and port that lead here ([`NodeEndpoints`]); to a
//!   request the answer of the node's edgecore.
//! - Never: takes anything but the port for the node; answers before the API server has said that
//!   the caller may; looks into what an upgraded connection carries.
//!
//! ```text
//! API server ─TLS─► server ─► auth (client CA, TokenReview, SubjectAccessReview)
//!                      │ the port's node
//!                      └────► tunnel ─► registry ─► hub connection ─► edgecore
//! endpoint, ports, address: what Nodes report · sweep, replicas: Nodes of lost ones · serving: TLS
//! ```

mod address;
mod audit;
mod auth;
mod endpoint;
mod metrics;
mod ports;
mod replicas;
mod server;
mod serving;
mod sweep;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod tunnel;

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use common::ids::NodeName;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{info, warn};

use crate::downstream::Downstream;
use crate::enroll::authority::Authority;
use crate::enroll::cache::Enrolments;
use crate::hub::registry::Registry;
use crate::kube::KubeClients;
use crate::upstream::Upstream;

pub use address::{AddressType, NoAddress};
pub use endpoint::{EndpointError, NodeEndpoints};
pub use metrics::{Metrics, Numbers, Reason};
pub use ports::PortRange;
pub use serving::{Serving, ServingError};

use auth::{Auth, ClientCa, ClientCaTask, Reviews};
use endpoint::Change;
use server::Server;
use serving::ServingTask;
use sweep::Sweep;
use tunnel::Tunnels;

/// What the endpoints are told.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the API server reaches this replica; found out when not set.
    pub address: Option<IpAddr>,
    /// The hub's, which serves as a hint.
    pub listen: IpAddr,
    pub kind: AddressType,
    pub ports: PortRange,
    pub serving: Serving,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            address: None,
            listen: Ipv4Addr::UNSPECIFIED.into(),
            kind: AddressType::default(),
            ports: PortRange::default(),
            serving: Serving::default(),
        }
    }
}

/// What the endpoints stand on.
pub struct Deps {
    pub kube: KubeClients,
    pub authority: Arc<Authority>,
    pub registry: Registry,
    pub enrolments: Enrolments,
    pub downstream: Downstream,
    pub upstream: Upstream,
}

/// Serves all endpoints and keeps them true.
pub struct StreamTask {
    endpoints: NodeEndpoints,
    server: Arc<Server>,
    metrics: Metrics,
    client_ca: ClientCaTask,
    serving: ServingTask,
    sweep: Sweep,
}

/// Builds the serving side of `endpoints`, which upstream has been given.
pub fn build(
    config: &Config,
    endpoints: NodeEndpoints,
    deps: Deps,
) -> Result<(Metrics, StreamTask), ServingError> {
    let metrics = Metrics::default();
    let (client_ca, client_ca_task) = ClientCa::build(deps.kube.own_watch());
    let (tls, serving) = serving::build(
        deps.authority,
        endpoints.address(),
        config.serving,
        deps.kube.own(),
    )?;
    let auth = Auth::new(client_ca, Reviews::new(deps.kube.own()));
    let tunnels = Tunnels::new(deps.registry.clone(), metrics.clone());
    let task = StreamTask {
        server: Arc::new(Server::new(tls, auth, tunnels, metrics.clone())),
        metrics: metrics.clone(),
        client_ca: client_ca_task,
        serving,
        sweep: Sweep {
            endpoints: endpoints.clone(),
            client: deps.kube.own(),
            registry: deps.registry,
            enrolments: deps.enrolments,
            downstream: deps.downstream,
            upstream: deps.upstream,
        },
        endpoints,
    };
    Ok((metrics, task))
}

impl StreamTask {
    /// Until shutdown; all connections end with it.
    pub async fn run(self, shutdown: CancellationToken) {
        info!(
            address = %self.endpoints.address(),
            kind = %self.endpoints.kind(),
            "kubelet endpoints are served"
        );
        let listening = listening(self.endpoints, self.server, self.metrics);
        tokio::join!(
            self.client_ca.run(shutdown.clone()),
            self.serving.run(shutdown.clone()),
            self.sweep.run(shutdown.clone()),
            shutdown.run_until_cancelled(listening),
        );
    }
}

/// One small task for each endpoint.
async fn listening(endpoints: NodeEndpoints, server: Arc<Server>, metrics: Metrics) {
    let mut listeners: HashMap<NodeName, AbortOnDropHandle<()>> = HashMap::new();
    // At shutdown this comes before any of them ends.
    let closing = CancellationToken::new();
    let _closes = closing.clone().drop_guard();
    loop {
        for change in endpoints.changes().await {
            match change {
                Change::Opened(node, socket) => match registered(socket) {
                    Ok(listener) => {
                        let server = server.clone();
                        let task = server.listen(node.clone(), listener, closing.child_token());
                        let task = AbortOnDropHandle::new(tokio::spawn(task));
                        listeners.insert(node, task);
                    }
                    Err(error) => {
                        warn!(%node, %error, "the node's kubelet endpoint cannot be served");
                        endpoints.release(&node);
                    }
                },
                Change::Closed(node) => {
                    listeners.remove(&node);
                }
            }
        }
        metrics.endpoints(listeners.len());
    }
}

fn registered(socket: std::net::TcpListener) -> std::io::Result<TcpListener> {
    socket.set_nonblocking(true)?;
    TcpListener::from_std(socket)
}
