//! kubectl's streams: logs, exec, attach, cp, port-forward, top, debug.
//!
//! The cases that ask only what any kubelet does ([`logs`], [`exec`], [`bytes`], [`node`]) run on a
//! [`Place`], which is one of two edges that all of them share, one for each transport. With
//! `STREAMS_ON=kubelet` in the environment the place is a stock kubelet: what the cases demand is
//! then what it does, or the case is wrong. One demands more: a kubelet (1.37.2) that follows a log
//! may lose what is written after its rotation.

#[path = "streams/bytes.rs"]
mod bytes;
#[path = "streams/clusters.rs"]
mod clusters;
#[path = "streams/ends.rs"]
mod ends;
#[path = "streams/exec.rs"]
mod exec;
#[path = "streams/limits.rs"]
mod limits;
#[path = "streams/logs.rs"]
mod logs;
#[path = "streams/node.rs"]
mod node;
#[path = "streams/replicas.rs"]
mod replicas;
#[path = "streams/rights.rs"]
mod rights;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock, RwLockReadGuard};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};
use testbed::bed::Bed;
use testbed::cluster::{Cluster, Options};
use testbed::containerd::Flavour;
use testbed::edge::{Edge, Transport};
use testbed::kubectl::Kubectl;
use testbed::metrics::MetricsServer;
use testbed::netns::{Backbone, Machine};
use testbed::peer::Peer;
use testbed::programs::{self, K8S_1_33, K8S_1_37};
use testbed::wait::wait_for;
use testbed::world::{SOON, condition, shell_pod};

pub(crate) use clusters::logs_and_exec;

use crate::world;

/// How long one kubectl may take that has little to do: the machine is shared.
const MOMENT: Duration = Duration::from_secs(30);

/// A node that cases run on, whoever serves it.
pub(crate) struct Place {
    pub(crate) kubectl: Kubectl,
    pub(crate) node: String,
    /// The machine's `/var/log/pods`, as the host sees it.
    pub(crate) log_dir: PathBuf,
    story: Told<String>,
    metrics_server: Told<Result<MetricsServer>>,
}

/// What a place knows by way of its control plane or its agent.
type Told<T> = Box<dyn Fn() -> T + Send + Sync>;

/// A place that nobody takes the cloud away from while this lives.
pub(crate) struct Stay {
    place: &'static Place,
    _peace: Option<RwLockReadGuard<'static, ()>>,
}

impl std::ops::Deref for Stay {
    type Target = Place;

    fn deref(&self) -> &Place {
        self.place
    }
}

/// The shared node of that transport, answering. For a second one see [`found`].
fn place(transport: Transport) -> Result<Stay> {
    let peace = match on_stock() {
        true => None,
        false => Some(world()?.in_peace()),
    };
    Ok(Stay {
        place: found(transport)?,
        _peace: peace,
    })
}

fn on_stock() -> bool {
    std::env::var("STREAMS_ON").is_ok_and(|what| what == "kubelet")
}

/// The same for who is in peace already: who takes that twice may wait for himself.
fn found(transport: Transport) -> Result<&'static Place> {
    static QUIC: OnceLock<Result<Place, String>> = OnceLock::new();
    static WEBSOCKET: OnceLock<Result<Place, String>> = OnceLock::new();
    static STOCK: OnceLock<Result<Place, String>> = OnceLock::new();
    let (cell, name) = match transport {
        _ if on_stock() => (&STOCK, "stock"),
        Transport::Websocket => (&WEBSOCKET, "streams-websocket"),
        Transport::Quic | Transport::Auto => (&QUIC, "streams-quic"),
    };
    let made = cell.get_or_init(|| {
        let place = match on_stock() {
            true => stock_place(name),
            false => edge_place(name, transport),
        };
        place.map_err(|error| format!("{error:#}"))
    });
    let place = made
        .as_ref()
        .map_err(|reason| anyhow!("no node for the streams: {reason}"))?;
    place.answers()?;
    Ok(place)
}

fn edge_place(name: &str, transport: Transport) -> Result<Place> {
    let world = world()?;
    let mut edge = world.machine(name)?;
    edge.transport = transport;
    world.join(&mut edge, &[])?;
    Ok(Place {
        kubectl: world.kubectl.clone(),
        node: name.to_owned(),
        log_dir: log_dir(&edge.machine),
        story: Box::new(move || world.story(&edge)),
        metrics_server: Box::new(|| MetricsServer::start(&world.bed, &world.cluster())),
    })
}

fn stock_place(name: &str) -> Result<Place> {
    let bed = Arc::new(Bed::scratch()?);
    let backbone = Backbone::build(&bed)?;
    let mut options = Options::new(K8S_1_37);
    options.bind = Some(bed.host_address());
    options.address_types = Some("InternalIP,Hostname".to_owned());
    let cluster = Cluster::start(&bed, options)?;
    let peer = Peer::start(&backbone, &cluster, name, K8S_1_37, Flavour::Packaged)?;
    let kubectl = cluster.kubectl.clone();
    wait_for("the stock kubelet's Node", SOON, || {
        let node = kubectl.json(&["get", "node", name])?;
        ensure!(condition(&node, "Ready") == Some("True"), "not Ready");
        Ok(())
    })
    .with_context(|| peer.kubelet.tail(20))?;
    let log_dir = log_dir(&peer.machine);
    let whole = Arc::new((peer, cluster, backbone, bed));
    let other = whole.clone();
    Ok(Place {
        kubectl,
        node: name.to_owned(),
        log_dir,
        story: Box::new(move || whole.0.kubelet.tail(20)),
        metrics_server: Box::new(move || MetricsServer::start(&other.3, &other.1)),
    })
}

fn log_dir(machine: &Machine) -> PathBuf {
    machine.dir.join("var-log/pods")
}

impl Place {
    /// Waits until the API server reaches the node's kubelet API.
    fn answers(&self) -> Result<()> {
        let path = format!("/api/v1/nodes/{}/proxy/healthz", self.node);
        wait_for(&format!("{path} to answer"), SOON, || {
            let said = self.kubectl.ok(&["get", "--raw", &path])?;
            ensure!(said.trim() == "ok", "{said}");
            Ok(())
        })
        .with_context(|| self.story())
    }

    fn story(&self) -> String {
        (self.story)()
    }

    /// A Pod of one container that runs a script here. A number completes its name: on a stock
    /// kubelet both transports are the same node.
    fn pod(&self, name: &str, script: &str) -> Value {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        shell_pod(&format!("{name}-{number}"), &self.node, script)
    }

    /// Creates a Pod, waits until it is ready and gives its name.
    fn start(&self, pod: &Value) -> Result<String> {
        let name = self.create(pod)?;
        wait_for(&format!("Pod {name} ready"), SOON, || {
            let object = self.kubectl.json(&["get", "pod", &name])?;
            let ready = condition(&object, "Ready") == Some("True");
            ensure!(ready, "{}", object["status"]);
            Ok(())
        })
        .with_context(|| self.story())?;
        Ok(name)
    }

    fn create(&self, pod: &Value) -> Result<String> {
        self.kubectl.apply(&pod.to_string())?;
        let name = pod["metadata"]["name"].as_str();
        Ok(name.context("a Pod has a name")?.to_owned())
    }

    /// A Pod of that name and script, ready.
    fn shell(&self, name: &str, script: &str) -> Result<String> {
        self.start(&self.pod(name, script))
    }

    /// Asks the node's kubelet API by way of the API server.
    fn proxied(&self, path: &str) -> Result<String> {
        let path = format!("/api/v1/nodes/{}/proxy/{path}", self.node);
        self.kubectl.ok(&["get", "--raw", &path])
    }
}

/// Every kubectl that must work with the same kubeconfig: by WebSocket the new one, by SPDY the
/// others (1.33 knows both).
fn clients(kubectl: &Kubectl) -> Result<Vec<(&'static str, Kubectl)>> {
    let of = |program: PathBuf| Kubectl::new(&program, &kubectl.kubeconfig);
    let new = of(programs::ensure("kubectl", K8S_1_37)?);
    Ok(vec![
        ("1.33", of(programs::ensure("kubectl", K8S_1_33)?)),
        ("Debian's 1.20", of(programs::ensure_debian_kubectl()?)),
        (
            "1.37 without WebSocket",
            new.with_variable("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", "false")
                .with_variable("KUBECTL_PORT_FORWARD_WEBSOCKETS", "false"),
        ),
        ("1.37", new),
    ])
}

/// Bytes that no layer compresses away, the same for the same seed (xorshift64; Marsaglia, 2003).
fn noise(size: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}

/// Whether a process with exactly this command line runs on this computer, in whatever container.
fn runs(argv: &[&str]) -> bool {
    let wanted: Vec<u8> = argv
        .iter()
        .flat_map(|word| [word.as_bytes(), b"\0"].concat())
        .collect();
    let dirs = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut lines = dirs.filter_map(|dir| std::fs::read(dir.path().join("cmdline")).ok());
    lines.any(|line| line == wanted)
}

/// A time in seconds that nobody else sleeps, to find a process by.
fn odd_time() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("6{:07}{number:03}", std::process::id())
}

/// A further container of a Pod, a shell like the first.
fn shell_container(name: &str, script: &str) -> Value {
    json!({
        "name": name,
        "image": testbed::images::BUSYBOX,
        "command": ["/bin/sh", "-c", script],
    })
}

/// An edge of a test's own with a Pod that sleeps, by that transport.
fn own_edge(name: &str, transport: Transport) -> Result<(Edge, String)> {
    let world = world()?;
    let mut edge = world.machine(name)?;
    edge.transport = transport;
    world.join(&mut edge, &[])?;
    let pod = format!("{name}-pod");
    world
        .kubectl
        .apply(&shell_pod(&pod, name, "sleep 86400").to_string())?;
    world.pod_running(&edge, &pod)?;
    Ok((edge, pod))
}
