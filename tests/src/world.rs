//! Everything at once: a control plane, cloudcore, and a network that edges are plugged into.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::bed::{Bed, lock};
use crate::cloud::Cloud;
use crate::cluster::{Cluster, Options};
use crate::containerd::Flavour;
use crate::edge::Edge;
use crate::kubectl::Kubectl;
use crate::netns::Backbone;
use crate::wait::wait_for;

/// How long a thing may take that normally takes a second or two: the machine is shared.
pub const SOON: Duration = Duration::from_secs(60);

/// Fields are dropped in this order: the testbed, which sweeps the rest, goes last.
pub struct World {
    pub backbone: Backbone,
    cloud: Mutex<Cloud>,
    pub kubectl: Kubectl,
    cluster: Mutex<Cluster>,
    peace: RwLock<()>,
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
            cloud: Mutex::new(cloud),
            cluster: Mutex::new(cluster),
            peace: RwLock::new(()),
            bed,
        })
    }

    /// Held by a test that wants cloudcore and the control plane to be left alone.
    pub fn in_peace(&self) -> RwLockReadGuard<'_, ()> {
        self.peace.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Held by a test that stops parts of the cloud, or measures them: no other test runs meanwhile.
    pub fn alone(&self) -> RwLockWriteGuard<'_, ()> {
        self.peace.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// cloudcore, for one call or one step.
    pub fn cloud(&self) -> MutexGuard<'_, Cloud> {
        lock(&self.cloud)
    }

    /// The control plane, for one call or one step.
    pub fn cluster(&self) -> MutexGuard<'_, Cluster> {
        lock(&self.cluster)
    }

    /// An edge with containerd that has joined and whose Node is Ready.
    pub fn edge(&self, name: &str) -> Result<Edge> {
        let mut edge = self.machine(name)?;
        self.join(&mut edge, &[])?;
        Ok(edge)
    }

    /// An edge with containerd that has not joined.
    pub fn machine(&self, name: &str) -> Result<Edge> {
        Edge::prepare(&self.backbone, name, Flavour::Packaged)
    }

    /// Joins with a token of these flags and waits until the Node is Ready.
    pub fn join(&self, edge: &mut Edge, flags: &[&str]) -> Result<Value> {
        let invitation = self.cloud().invite(flags)?;
        edge.join(&invitation)?;
        self.node_ready(edge)
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

    /// Asks for a Pod on this node that does nothing for a while.
    pub fn sleeper(&self, pod: &str, node: &str) -> Result<()> {
        let pod = shell_pod(pod, node, "sleep 1000");
        self.kubectl.apply(&pod.to_string())
    }

    /// Fails unless the Pod is Running and its first container is the one that it was.
    pub fn same_container(&self, edge: &Edge, before: &Value) -> Result<Value> {
        let name = before["metadata"]["name"].as_str().context("a Pod")?;
        let after = self.pod_running(edge, name)?;
        ensure!(
            container_id(before)? == container_id(&after)?,
            "the container was replaced"
        );
        Ok(after)
    }

    /// Waits until a Pod is Running with all its containers ready.
    pub fn pod_running(&self, edge: &Edge, pod: &str) -> Result<Value> {
        let running = wait_for(&format!("Pod {pod} Running"), SOON, || {
            let object = self.kubectl.json(&["get", "pod", pod])?;
            ensure!(
                object["status"]["phase"] == "Running",
                "status {}",
                object["status"]
            );
            ensure!(
                condition(&object, "Ready") == Some("True"),
                "status {}",
                object["status"]
            );
            Ok(object)
        });
        running.with_context(|| self.story(edge))
    }

    /// Waits until the Pod's object is gone.
    pub fn pod_gone(&self, edge: &Edge, pod: &str) -> Result<()> {
        wait_for(&format!("end of Pod {pod}"), SOON, || {
            self.kubectl.ensure_gone("pod", pod)
        })
        .with_context(|| self.story(edge))
    }

    /// Runs a command in the first container of a Pod, by way of the node's runtime, and gives
    /// its standard output.
    pub fn in_pod(&self, edge: &Edge, pod: &str, argv: &[&str]) -> Result<String> {
        let object = self.kubectl.json(&["get", "pod", pod])?;
        let id = container_id(&object)?;
        // A number of its own, since the runtime keeps an exec's name until it is deleted.
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let exec = format!("test-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let words = ["tasks", "exec", "--exec-id", &exec, &id];
        let runtime = edge
            .containerd
            .as_ref()
            .context("the edge has no containerd")?;
        runtime.ctr(&edge.machine, &[&words[..], argv].concat())
    }

    /// The ends of the logs, for a test that failed.
    pub fn story(&self, edge: &Edge) -> String {
        format!(
            "--- cloudcore\n{}\n--- edgecore {}\n{}",
            self.cloud
                .try_lock()
                .map(|cloud| cloud.tail(40))
                .unwrap_or_default(),
            edge.name,
            edge.tail(40)
        )
    }
}

/// The runtime's id of a Pod's first container, without the runtime's name.
pub fn container_id(pod: &Value) -> Result<String> {
    let id = pod["status"]["containerStatuses"][0]["containerID"]
        .as_str()
        .unwrap_or_default();
    let (_, id) = id
        .split_once("://")
        .with_context(|| format!("no container yet: {pod}"))?;
    Ok(id.to_owned())
}

/// How often a Pod's first container was restarted.
pub fn restarts(pod: &Value) -> Option<u64> {
    pod["status"]["containerStatuses"][0]["restartCount"].as_u64()
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
