//! Where the halves of CloudCore meet: the watches' live state as the upstream writer reads it, the
//! word that something changed, and what each Pod event sets off.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use common::ids::{NodeName, ObjectKey};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::downstream::{self, Downstream, Malformed};
use crate::kube::KubeClients;
use crate::nodes::claim::Claim;
use crate::nodes::keeper::EdgeNodes;
use crate::nodes::tolerations::Tolerations;
use crate::upstream::{Fresh, NodeView, NodeViews, PodView, PodViews, Upstream};

/// The API server for the watches.
#[derive(Clone)]
pub struct Clients(pub KubeClients);

impl downstream::Clients for Clients {
    fn own(&self) -> kube::Client {
        self.0.own()
    }

    fn own_watch(&self) -> kube::Client {
        self.0.own_watch()
    }

    fn mark_as_node(request: &mut http::Request<kube::client::Body>, node: &NodeName) {
        KubeClients::mark_as_node(request, node);
    }
}

impl Fresh for Claim {
    fn fresh(&self) -> bool {
        Claim::fresh(self)
    }
}

/// Pods and Nodes as the watches saw them last.
pub struct LiveState(pub Downstream);

impl PodViews for LiveState {
    fn pod(&self, uid: &str) -> Option<PodView> {
        let pod = self.0.pod(uid)?;
        Some(PodView {
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            uid: pod.uid.clone(),
            resource_version: pod.resource_version.parse().ok()?,
            node: pod.node.clone(),
            deleting: pod.deletion_timestamp.is_some(),
            service_account: pod.service_account.clone(),
            status: pod.status_bytes(),
        })
    }
}

impl NodeViews for LiveState {
    fn node(&self, name: &NodeName) -> Option<NodeView> {
        let node = self.0.node(name)?;
        Some(NodeView {
            uid: node.uid.clone(),
            resource_version: node.resource_version.parse().ok()?,
            status: node.status.clone(),
        })
    }
}
