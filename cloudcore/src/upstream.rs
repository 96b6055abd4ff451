//! What the nodes tell, on its way to the API server.
//!
//! - Owns: the last report of each Pod UID and of the Node, per node; the one writer of statuses.
//! - Takes: reports, Events and token questions of sessions ([`NodeUpstream`]); word from the
//!   watches that something of a node changed ([`Upstream::changed`]).
//! - Gives: statuses, deletes, Events and tokens in the API, each made as the node; to the session
//!   what was acknowledged, after the write.
//! - Never: writes while the session's claim on the node is not fresh; lets a report move another
//!   node's Pod; gives an object up before the API server said for good that it is no more.
//!
//! ```text
//!  session ──report──► reports ──mark──► queue ──turn──► flight: compare ─► patch ─► delete
//!                         ▲                ▲               │          (pods, nodes: pure)
//!                         │             changed            ▼
//!                         └───────────── watches        ApiWriter ──answer──► acknowledged
//! ```
//!
//! A comparison is level-triggered: whatever wakes it, it looks at the latest report and the latest
//! known object. So a Pod that somebody else made NotReady is repaired by the same path that brings
//! a new report, and nothing is lost when a wake-up falls into another.

mod api;
mod difference;
mod events;
#[cfg(test)]
mod fake;
mod flight;
mod nodes;
mod patcher;
mod pods;
mod queue;
mod reports;
mod requests;
mod shared;
#[cfg(test)]
mod tests;
mod views;
mod writer;

use std::sync::Arc;

use common::hub::proto;
use common::ids::{NodeName, ObjectKey};
use common::object::{Content, ContentHash, Digest};
use tokio::sync::{Mutex, Notify};

pub use api::{KubeWriter, Mark};
pub use patcher::Task;
pub use reports::ReportError;
pub use shared::{Metrics, WallClock};
pub use views::{Endpoint, Endpoints, Fresh, NodeView, NodeViews, PodView, PodViews};
pub use writer::{ApiWriter, Call, Retry, WriteError};

use queue::{Limits, Queue};
use shared::Shared;

#[derive(Debug, Clone)]
pub struct Config {
    /// Status writes in flight for all nodes. The API server gives the priority level of nodes
    /// about 70 seats by default and real kubelets may share them; 48 writes of 5 ms each are
    /// more than an etcd commits.
    pub in_flight: usize,
    /// Status writes in flight for one node: enough that one slow write does not hold up the rest,
    /// little enough that a node with 110 changed Pods leaves room for others.
    pub per_node: usize,
    /// Events and token requests in flight for all nodes, apart from the statuses.
    pub aside: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            in_flight: 48,
            per_node: 4,
            aside: 24,
        }
    }
}

/// What the upstream side stands on.
pub struct Deps {
    pub writer: Arc<dyn ApiWriter>,
    pub pods: Arc<dyn PodViews>,
    pub nodes: Arc<dyn NodeViews>,
    /// Where the API server reaches the nodes; without it a node's own addresses go up.
    pub endpoints: Option<Arc<dyn Endpoints>>,
    pub clock: WallClock,
}

/// Builds the upstream side; the caller runs the task.
pub fn build(config: &Config, deps: Deps) -> (Upstream, Task) {
    let limits = Limits {
        in_flight: config.in_flight,
        per_node: config.per_node,
    };
    let shared = Arc::new(Shared::new(deps, Queue::new(limits), config.aside));
    (
        Upstream {
            shared: shared.clone(),
        },
        Task { shared },
    )
}

/// The handle of the upstream side; cheap to clone.
#[derive(Clone)]
pub struct Upstream {
    shared: Arc<Shared>,
}

impl Upstream {
    /// A session of this node begins; an older one of the same node can do nothing any more.
    /// Reports of a session shortly before are still held and are compared at once.
    pub fn node(&self, node: NodeName, claim: Arc<dyn Fresh>) -> NodeUpstream {
        let (session, wake) = self.shared.begin(&node, claim.clone());
        NodeUpstream {
            shared: self.shared.clone(),
            node,
            session,
            claim,
            wake,
            correlator: Arc::default(),
        }
    }

    /// The watches saw a change of this Node or of a Pod bound to it: what is held is compared.
    pub fn changed(&self, node: &NodeName) {
        self.shared.changed(node, false);
    }

    /// The endpoint of this node changed: its Node is compared.
    pub fn endpoint_changed(&self, node: &NodeName) {
        self.shared.changed(node, true);
    }

    /// The watches began anew: every node is compared.
    pub fn all_changed(&self) {
        self.shared
            .present()
            .iter()
            .for_each(|node| self.shared.changed(node, true));
    }

    pub fn metrics(&self) -> Metrics {
        self.shared.metrics()
    }
}

/// A report whose content is in the API, or whose object is no more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acked {
    pub key: ObjectKey,
    pub sequence: u64,
}

/// The upstream side of one session. When it is dropped, what was not written is abandoned.
pub struct NodeUpstream {
    shared: Arc<Shared>,
    node: NodeName,
    session: u64,
    claim: Arc<dyn Fresh>,
    wake: Arc<Notify>,
    correlator: Arc<Mutex<events::Correlator>>,
}

impl NodeUpstream {
    /// Takes a Pod's report: the latest of a Pod replaces what was held. `status` is the JSON of
    /// `PodStatus` as it came, for it is also the base of the next delta. `gone`: nothing of the
    /// Pod is left on the device; it is acknowledged when its API object is deleted.
    pub fn pod_report(
        &self,
        key: &ObjectKey,
        sequence: u64,
        status: Arc<[u8]>,
        gone: bool,
    ) -> Result<(), ReportError> {
        reports::checked_pod(key, &status)?;
        self.shared
            .accept(&self.node, self.session, key, (sequence, status, gone))
    }

    /// Takes the Node's report: the JSON of `NodeStatus`.
    pub fn node_report(&self, sequence: u64, status: Arc<[u8]>) -> Result<(), ReportError> {
        let key = reports::node_key();
        reports::checked(&key, &status)?;
        self.shared
            .accept(&self.node, self.session, &key, (sequence, status, false))
    }

    /// What was acknowledged since the last call, as soon as there is any; empty when the session
    /// was replaced. Can be cancelled: nothing is lost.
    pub async fn acked(&mut self) -> Vec<Acked> {
        loop {
            match self.shared.acks(&self.node, self.session) {
                Some(acks) if acks.is_empty() => self.wake.notified().await,
                acks => {
                    let all = acks.into_iter().flatten();
                    return all.map(|(key, sequence)| Acked { key, sequence }).collect();
                }
            }
        }
    }

    /// Over (key, sequence) of the reports held, also of those that came in a session before.
    pub fn held(&self) -> Digest {
        self.shared.reports(&self.node, |r| r.digest())
    }

    /// Forgets what is held, before all reports are asked for: what the edge does not hold any
    /// more must not be compared for ever.
    pub fn forget(&self) {
        self.shared.forget(&self.node, self.session);
    }

    /// The bytes of the last report of an object: what an upward delta starts from.
    pub fn report_bytes(&self, key: &ObjectKey) -> Option<(ContentHash, Arc<[u8]>)> {
        let bytes = self
            .shared
            .reports(&self.node, |r| Some(r.held.get(key)?.status.clone()))?;
        Some((ContentHash::of(&Content::Present(bytes.clone())), bytes))
    }

    /// Writes Events in their order, as far as the API server takes them. Gives the sequence up to
    /// which all are in the API or were dropped for good; 0 when the session ended before the
    /// first. It may take as long as the API server is away.
    pub fn events(&self, events: Vec<proto::Event>) -> impl Future<Output = u64> + Send + 'static {
        let writer = events::Writer {
            shared: self.shared.clone(),
            node: self.node.clone(),
            session: self.session,
            claim: self.claim.clone(),
            correlator: self.correlator.clone(),
        };
        writer.write(events)
    }

    /// Answers a question for a token; the future is the caller's to run beside the session.
    pub fn token(
        &self,
        ask: proto::TokenAsk,
    ) -> impl Future<Output = proto::response::Body> + Send + 'static {
        let (shared, node, claim) = (self.shared.clone(), self.node.clone(), self.claim.clone());
        async move { requests::token(&shared, &node, claim.as_ref(), &ask).await }
    }
}

impl Drop for NodeUpstream {
    fn drop(&mut self) {
        self.shared.end(&self.node, self.session);
    }
}
