//! The seams to what CloudCore's watches know: Pods and Nodes as they were seen last.
//!
//! A view may be older than what a write returned; whoever compares takes the newer of the two.

use std::sync::Arc;

use common::ids::NodeName;
use serde_json::Value;

/// A Pod of an edge node as the watch saw it last.
#[derive(Debug, Clone, PartialEq)]
pub struct PodView {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub uid: Arc<str>,
    pub resource_version: u64,
    pub node: NodeName,
    /// `metadata.deletionTimestamp` is set.
    pub deleting: bool,
    /// `spec.serviceAccountName`.
    pub service_account: Arc<str>,
    /// The whole status, JSON; empty when the Pod has none.
    pub status: Arc<[u8]>,
}

/// A Node as the watch saw it last.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeView {
    pub uid: Arc<str>,
    pub resource_version: u64,
    /// The whole status, JSON.
    pub status: Arc<[u8]>,
}

/// Looks Pods up by UID. `None` means only that this watch does not know it.
pub trait PodViews: Send + Sync + 'static {
    fn pod(&self, uid: &str) -> Option<PodView>;
}

/// Looks Nodes up by name.
pub trait NodeViews: Send + Sync + 'static {
    fn node(&self, name: &NodeName) -> Option<NodeView>;
}

/// The session's claim on its node.
pub trait Fresh: Send + Sync + 'static {
    /// The Lease was renewed so lately that nobody else can hold the node.
    fn fresh(&self) -> bool;
    /// A write met somebody else's: it may be another holder of the node, worth a look at the
    /// Lease before its next renewal. Must not block.
    fn doubt(&self);
}

/// Where the API server reaches a node's kubelet endpoint.
pub trait Endpoints: Send + Sync + 'static {
    fn endpoint(&self, node: &NodeName) -> Option<Endpoint>;
}

#[derive(Debug, Clone, PartialEq)]
pub struct Endpoint {
    /// `status.addresses` of core/v1, whole.
    pub addresses: Vec<Value>,
    pub kubelet_port: u16,
}

/// Bytes of a watch or an answer as JSON; what is none counts as an empty status.
pub(super) fn parsed(status: &[u8]) -> Value {
    serde_json::from_slice(status).unwrap_or_else(|_| Value::Object(Default::default()))
}
