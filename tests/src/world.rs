//! Everything at once: a control plane, cloudcore, and a network that edges are plugged into.

use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::bed::Bed;
use crate::cloud::Cloud;
use crate::cluster::{Cluster, Options};
use crate::containerd::Flavour;
use crate::edge::{Edge, Transport};
use crate::kubectl::Kubectl;
use crate::netns::Backbone;
use crate::wait::wait_for;

/// How long a thing may take that normally takes a second or two: the machine is shared.
pub const SOON: Duration = Duration::from_secs(60);

/// Fields are dropped in this order: the testbed, which sweeps the rest, goes last.
pub struct World {
    pub backbone: Backbone,
    cloud: RwLock<Cloud>,
    pub kubectl: Kubectl,
    cluster: RwLock<Cluster>,
    pub bed: Arc<Bed>,
}

impl World {
    /// Starts all of it: some 12 s when every program is in the cache.
    pub fn start(options: Options) -> Result<World> {
        let bed = Arc::new(Bed::scratch()?);
        let backbone = Backbone::build(&bed)?;
        let cluster = Cluster::start(&bed, options)?;
        let cloud = Cloud::start(&bed, &cluster.kubeconfig)?;
        Ok(World {
            backbone,
            kubectl: cluster.kubectl.clone(),
            cloud: RwLock::new(cloud),
            cluster: RwLock::new(cluster),
            bed,
        })
    }

    /// cloudcore, for a test that leaves it alone. Held as long as the test relies on that.
    pub fn cloud(&self) -> RwLockReadGuard<'_, Cloud> {
        self.cloud.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// cloudcore, for a test that stops it: no other test runs meanwhile.
    pub fn cloud_alone(&self) -> RwLockWriteGuard<'_, Cloud> {
        self.cloud.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The control plane, for a test that stops parts of it: take [`World::cloud_alone`] first.
    pub fn cluster_alone(&self) -> RwLockWriteGuard<'_, Cluster> {
        self.cluster.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// An edge with containerd that has joined and whose Node is Ready.
    pub fn edge(&self, name: &str) -> Result<Edge> {
        self.edge_with(name, Transport::Auto)
    }

    pub fn edge_with(&self, name: &str, transport: Transport) -> Result<Edge> {
        let mut edge = Edge::prepare(&self.backbone, name, Flavour::Packaged)?;
        edge.transport = transport;
        let invitation = self.cloud().invite(&[])?;
        edge.join(&invitation)?;
        self.node_ready(&mut edge)?;
        Ok(edge)
    }

    /// Waits until the Node of a running edge is Ready.
    pub fn node_ready(&self, edge: &mut Edge) -> Result<Value> {
        let name = edge.name.clone();
        let ready = wait_for(&format!("Node {name} Ready"), SOON, || {
            edge.ensure_running()?;
            let node = self.kubectl.json(&["get", "node", &name])?;
            match condition(&node, "Ready") {
                Some("True") => Ok(node),
                other => bail!("Ready is {other:?}"),
            }
        });
        ready.with_context(|| self.story(edge))
    }

    /// Waits until a Pod is Running with all its containers ready.
    pub fn pod_running(&self, edge: &Edge, pod: &str) -> Result<Value> {
        let running = wait_for(&format!("Pod {pod} Running"), SOON, || {
            let object = self.kubectl.json(&["get", "pod", pod])?;
            ensure!(object["status"]["phase"] == "Running", "status {}", object["status"]);
            ensure!(condition(&object, "Ready") == Some("True"), "status {}", object["status"]);
            Ok(object)
        });
        running.with_context(|| self.story(edge))
    }

    /// The ends of the logs, for a test that failed.
    pub fn story(&self, edge: &Edge) -> String {
        format!(
            "--- cloudcore\n{}\n--- edgecore {}\n{}",
            self.cloud.try_read().map(|cloud| cloud.tail(40)).unwrap_or_default(),
            edge.name,
            edge.tail(40)
        )
    }
}

/// The status of an object's condition.
pub fn condition<'a>(object: &'a Value, kind: &str) -> Option<&'a str> {
    object["status"]["conditions"]
        .as_array()?
        .iter()
        .find(|condition| condition["type"] == kind)?["status"]
        .as_str()
}

/// A Pod on a certain node that runs a shell script in busybox.
pub fn shell_pod(name: &str, node: &str, script: &str) -> Value {
    serde_json::json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "labels": {"app": name}},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "main",
                "image": crate::images::BUSYBOX,
                "command": ["/bin/sh", "-c", script],
            }],
        },
    })
}
