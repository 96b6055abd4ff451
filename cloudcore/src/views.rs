//! Where the halves of CloudCore meet: the watches' live state as the upstream writer reads it, the
//! word that something changed, and what each Pod event sets off.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use common::ids::{NodeName, ObjectKey};
use k8s_openapi::api::core::v1::Toleration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::downstream::{self, Downstream, Malformed};
use crate::kube::KubeClients;
use crate::nodes::claim::Claim;
use crate::nodes::keeper::EdgeNodes;
use crate::nodes::tolerations::{BoundPod, Tolerations};
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

    fn doubt(&self) {
        Claim::doubt(self);
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

/// Follows the watches and passes on what they show.
pub struct Watchers {
    pub downstream: Downstream,
    pub upstream: Upstream,
    pub names: watch::Receiver<Arc<BTreeSet<NodeName>>>,
    pub edge_nodes: EdgeNodes,
    pub tolerations: Tolerations,
    pub ready: watch::Sender<bool>,
    pub kube: KubeClients,
    pub malformed: mpsc::Receiver<Malformed>,
}

impl Watchers {
    /// Until shutdown: one small follower for each enrolled node.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut followers: BTreeMap<NodeName, JoinHandle<()>> = BTreeMap::new();
        loop {
            let names = self.names.borrow_and_update().clone();
            followers.retain(|node, follower| {
                let stays = names.contains(node);
                if !stays {
                    follower.abort();
                }
                stays
            });
            for node in names.iter() {
                let follower = followers.get(node);
                if follower.is_none_or(tokio::task::JoinHandle::is_finished) {
                    followers.insert(node.clone(), tokio::spawn(self.follower(node.clone())));
                }
            }
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                changed = self.names.changed() => if changed.is_err() { break },
                () = self.downstream.listed(), if !*self.ready.borrow() => {
                    self.ready.send_replace(true);
                }
                Some(malformed) = self.malformed.recv() => self.tell(malformed).await,
            }
        }
        followers.into_values().for_each(|f| f.abort());
    }

    fn follower(&self, node: NodeName) -> impl Future<Output = ()> + Send + 'static {
        let mut views = self.downstream.pod_views(&node);
        let (upstream, edge_nodes) = (self.upstream.clone(), self.edge_nodes.clone());
        let tolerations = self.tolerations.clone();
        async move {
            loop {
                if edge_nodes.is_autonomous(&node) {
                    views
                        .snapshot()
                        .values()
                        .for_each(|pod| outlive(&tolerations, pod));
                }
                upstream.changed(&node);
                views.changed().await;
            }
        }
    }

    async fn tell(&self, malformed: Malformed) {
        let key = ObjectKey::named(malformed.kind, &malformed.namespace, &malformed.name);
        tracing::warn!(%key, problem = malformed.message, "an object cannot be used");
        crate::nodes::event::warn(&self.kube.own(), &malformed).await;
    }
}

/// Lets the Pod outlive its node's absence.
fn outlive(tolerations: &Tolerations, pod: &downstream::PodView) {
    let Some(ending) = pod.ending_tolerations() else {
        return;
    };
    match serde_json::from_value::<Vec<Toleration>>(ending) {
        Ok(ending) => tolerations.observe(&BoundPod {
            node: &pod.node,
            namespace: &pod.namespace,
            name: &pod.name,
            uid: &pod.uid,
            resource_version: &pod.resource_version,
            created: pod.creation_timestamp.as_deref(),
            deleting: pod.deletion_timestamp.is_some(),
            tolerations: &ending,
        }),
        Err(error) => tracing::warn!(pod = &*pod.name, %error, "tolerations that cannot be read"),
    }
}
