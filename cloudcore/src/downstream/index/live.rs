//! The live state of Pods and Nodes: what the API server holds, for whoever writes statuses.
//!
//! Nothing of it goes down. Statuses are kept as bytes, since a parsed one takes five times that:
//! 1 to 4 KB a Pod, 2 to 15 KB a Node (its images). The API server bounds each object at 1.5 MiB;
//! a node's 110 Pods bound their number, and only edge nodes' are kept.

use std::collections::BTreeMap;
use std::sync::Arc;

use common::ids::NodeName;
use serde_json::Value;

use super::{revision, text};

/// A static Pod's image in the API, written by its own node: the node never gets it back.
const MIRROR: &str = "kubernetes.io/config.mirror";

/// A Pod of an edge node as the watch saw it last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodView {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub uid: Arc<str>,
    pub resource_version: Arc<str>,
    pub node: NodeName,
    /// RFC 3339, as the API server wrote it; so is the next.
    pub creation_timestamp: Option<Arc<str>>,
    pub deletion_timestamp: Option<Arc<str>>,
    /// `spec.serviceAccountName`; empty when the Pod has none.
    pub service_account: Arc<str>,
    /// The hash in the annotation of a mirror Pod, by which its static Pod is known.
    pub mirror: Option<Arc<str>>,
    status: Arc<[u8]>,
    tolerations: Option<Arc<[u8]>>,
}

impl PodView {
    pub(super) fn of(
        object: &Value,
        namespace: &str,
        name: &str,
        uid: &Arc<str>,
        node: &NodeName,
        resource_version: u64,
    ) -> Self {
        let tolerations = object
            .pointer("/spec/tolerations")
            .and_then(Value::as_array);
        let ends = |t: &Value| t.get("tolerationSeconds").is_some_and(|s| !s.is_null());
        let annotations = object.pointer("/metadata/annotations");
        let mirror = annotations.and_then(|a| a.get(MIRROR)?.as_str());
        Self {
            namespace: namespace.into(),
            name: name.into(),
            uid: uid.clone(),
            resource_version: resource_version.to_string().into(),
            node: node.clone(),
            creation_timestamp: text(object, "/metadata/creationTimestamp").map(Into::into),
            deletion_timestamp: text(object, "/metadata/deletionTimestamp").map(Into::into),
            service_account: text(object, "/spec/serviceAccountName")
                .unwrap_or_default()
                .into(),
            mirror: mirror.map(Into::into),
            status: status(object),
            tolerations: tolerations
                .filter(|all| all.iter().any(ends))
                .map(|all| Value::from(all.clone()).to_string().into_bytes().into()),
        }
    }

    /// The whole status, JSON; an empty object when the Pod has none.
    pub fn status_bytes(&self) -> Arc<[u8]> {
        self.status.clone()
    }

    /// The same, parsed.
    pub fn status(&self) -> Value {
        serde_json::from_slice(&self.status).unwrap_or_else(|_| Value::Object(Default::default()))
    }

    /// The Pod's tolerations, if one of them ends after some seconds: what autonomy edits.
    pub fn ending_tolerations(&self) -> Option<Value> {
        serde_json::from_slice(self.tolerations.as_deref()?).ok()
    }
}

/// The Node of an edge node as the watch saw it last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeLive {
    pub uid: Arc<str>,
    pub resource_version: Arc<str>,
    /// The whole status, JSON.
    pub status: Arc<[u8]>,
}

impl NodeLive {
    /// `None` for a Node without a status: the feed takes it from Nodes that are no edge's.
    pub(super) fn of(object: &Value) -> Option<Self> {
        object.get("status")?;
        Some(Self {
            uid: text(object, "/metadata/uid").unwrap_or_default().into(),
            resource_version: revision(object)?.to_string().into(),
            status: status(object),
        })
    }
}

/// The live state of one node: its Pods by UID, mirror Pods included, and its Node.
#[derive(Debug, Clone, Default)]
pub struct Live {
    pub pods: Arc<BTreeMap<Arc<str>, Arc<PodView>>>,
    pub node: Option<Arc<NodeLive>>,
}

fn status(object: &Value) -> Arc<[u8]> {
    let text = object
        .get("status")
        .map_or_else(|| "{}".to_owned(), Value::to_string);
    text.into_bytes().into()
}
