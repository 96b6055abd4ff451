//! The endpoint of each node: this replica's address and a port of the node's own.
//!
//! - Owns: the ports and, until a listener takes them, the sockets bound to them.
//! - Takes: names, from sessions (through `upstream`) and from the sweep; what Nodes reported, and
//!   which ports rested, when this process began.
//! - Gives: what a Node reports ([`Endpoints`]); the sockets to the task that serves them.
//! - Never: gives a node's port to another one, also across restarts, before it has rested; reports
//!   a port that nobody listens on.

use std::collections::HashSet;
use std::net::{IpAddr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use common::ids::NodeName;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::api::ListParams;
use kube::{Api, Client};
use serde::Deserialize;
use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::warn;

use super::Config;
use super::address::{AddressType, Known, NoAddress};
use super::ports::{PortRange, Ports};
use super::replicas;
use crate::kube::KubeError;
use crate::nodes::birth::EDGE_LABEL;
use crate::upstream::{Endpoint, Endpoints};

/// Nodes with their images are about 15 KB each.
const PAGE: u32 = 200;

/// Why there are no endpoints.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    #[error(transparent)]
    Address(#[from] NoAddress),
    #[error("the ports that nodes have already are not known")]
    Kube(#[from] KubeError),
}

/// What a Node says of its endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Reported {
    /// Type and address.
    pub(super) addresses: Vec<(String, String)>,
    pub(super) port: u16,
}

impl Reported {
    /// Of a Node's status as JSON; `None` when it reports no address yet.
    pub(super) fn read(status: &[u8]) -> Option<Self> {
        let status: Status = serde_json::from_slice(status).ok()?;
        let addresses: Vec<_> = status
            .addresses
            .into_iter()
            .map(|a| (a.kind, a.address))
            .collect();
        let port = status.daemon_endpoints.kubelet_endpoint.port;
        (!addresses.is_empty()).then_some(Self { addresses, port })
    }

    /// It leads to this address and port, and nowhere else.
    pub(super) fn is(&self, kind: AddressType, address: IpAddr, port: Option<u16>) -> bool {
        let want = (kind.as_str(), address.to_string());
        let same =
            |(kind, address): &(String, String)| (kind.as_str(), address) == (want.0, &want.1);
        self.addresses.len() == 1 && self.addresses.iter().all(same) && port == Some(self.port)
    }

    pub(super) fn names(&self, address: IpAddr) -> bool {
        let address = address.to_string();
        self.addresses.iter().any(|(_, a)| *a == address)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    #[serde(default)]
    addresses: Vec<Address>,
    #[serde(default)]
    daemon_endpoints: DaemonEndpoints,
}

#[derive(Deserialize)]
struct Address {
    #[serde(rename = "type")]
    kind: String,
    address: String,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
struct DaemonEndpoints {
    #[serde(default)]
    kubelet_endpoint: KubeletEndpoint,
}

#[derive(Deserialize, Default)]
struct KubeletEndpoint {
    #[serde(rename = "Port", default)]
    port: u16,
}

/// What became of an endpoint, for the task that listens.
pub(super) enum Change {
    Opened(NodeName, TcpListener),
    Closed(NodeName),
}

struct State {
    ports: Ports,
    open: HashSet<NodeName>,
    /// At most two for each node until they are fetched.
    changes: Vec<Change>,
}

struct Inner {
    address: IpAddr,
    /// The address itself where it is this machine's, else all of them: behind a translation.
    bind: IpAddr,
    kind: AddressType,
    range: PortRange,
    state: Mutex<State>,
    changed: Notify,
}

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct NodeEndpoints {
    inner: Arc<Inner>,
}

impl NodeEndpoints {
    /// Finds this replica's address and keeps the ports that Nodes already report together with it.
    pub async fn find(
        config: &Config,
        server: &http::Uri,
        client: &Client,
    ) -> Result<Self, EndpointError> {
        let known = Known::find(config.address, config.listen, server).await;
        let endpoints = Self::at(known.choose()?, config.kind, config.ports);
        endpoints.adopt(client).await?;
        endpoints.rest(client).await?;
        Ok(endpoints)
    }

    pub(super) fn at(address: IpAddr, kind: AddressType, range: PortRange) -> Self {
        let own = TcpListener::bind((address, 0)).is_ok();
        let any: IpAddr = match address {
            IpAddr::V4(_) => [0; 4].into(),
            IpAddr::V6(_) => [0_u16; 8].into(),
        };
        let state = State {
            ports: Ports::new(range),
            open: HashSet::new(),
            changes: Vec::new(),
        };
        Self {
            inner: Arc::new(Inner {
                address,
                bind: if own { address } else { any },
                kind,
                range,
                state: Mutex::new(state),
                changed: Notify::new(),
            }),
        }
    }

    async fn adopt(&self, client: &Client) -> Result<(), KubeError> {
        let nodes: Api<Node> = Api::all(client.clone());
        let mut params = ListParams::default().labels(EDGE_LABEL).limit(PAGE);
        loop {
            let page = nodes.list(&params).await;
            let page = page.map_err(KubeError::api("listing edge Nodes"))?;
            for node in &page.items {
                self.adopt_one(node);
            }
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(&token),
                None => return Ok(()),
            }
        }
    }

    /// Ports that were released shortly before a restart.
    async fn rest(&self, client: &Client) -> Result<(), KubeError> {
        let data = replicas::read(client.clone()).await?;
        let resting = replicas::resting(&data, self.inner.address, Timestamp::now());
        let (mut state, now) = (self.state(), Instant::now());
        for (port, left) in resting {
            state.ports.rest(port, now, left);
        }
        Ok(())
    }

    fn adopt_one(&self, node: &Node) {
        let name = node.metadata.name.as_deref();
        let name = name.and_then(|name| NodeName::parse(name).ok());
        let status = serde_json::to_vec(&node.status).unwrap_or_default();
        if let (Some(name), Some(reported)) = (name, Reported::read(&status))
            && reported.names(self.inner.address)
        {
            self.state().ports.adopt(&name, reported.port);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        let state = &self.inner.state;
        state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn address(&self) -> IpAddr {
        self.inner.address
    }

    pub(super) fn kind(&self) -> AddressType {
        self.inner.kind
    }

    pub(super) fn port(&self, node: &NodeName) -> Option<u16> {
        self.state().ports.port(node)
    }

    /// All nodes that have a port here.
    pub(super) fn nodes(&self) -> Vec<NodeName> {
        self.state().ports.nodes().cloned().collect()
    }

    /// The ports that rest, and for how long from now on.
    pub(super) fn resting(&self) -> Vec<(u16, Duration)> {
        self.state().ports.resting(Instant::now()).collect()
    }

    /// The node's port; from now on somebody listens on it.
    pub(super) fn ensure(&self, node: &NodeName) -> Option<u16> {
        let mut state = self.state();
        let State {
            ports,
            open,
            changes,
        } = &mut *state;
        if open.contains(node) {
            return ports.port(node);
        }
        let bind = |port| TcpListener::bind((self.inner.bind, port)).ok();
        let assigned = ports.assign(node, Instant::now(), bind);
        let Some((port, listener)) = assigned else {
            drop(state);
            warn!(
                %node,
                range = %self.inner.range,
                "there is no port left for the node's kubelet endpoint, so that kubectl cannot reach it: widen --kubelet-ports, or allow more open files"
            );
            return None;
        };
        open.insert(node.clone());
        changes.push(Change::Opened(node.clone(), listener));
        drop(state);
        self.inner.changed.notify_one();
        Some(port)
    }

    /// The node has no endpoint here any more; its port rests.
    pub(super) fn release(&self, node: &NodeName) {
        let mut state = self.state();
        state.ports.release(node, Instant::now());
        if state.open.remove(node) {
            state.changes.push(Change::Closed(node.clone()));
            drop(state);
            self.inner.changed.notify_one();
        }
    }

    /// What changed since the last call, as soon as anything has. Cancel safe.
    pub(super) async fn changes(&self) -> Vec<Change> {
        loop {
            let changes = std::mem::take(&mut self.state().changes);
            if !changes.is_empty() {
                return changes;
            }
            self.inner.changed.notified().await;
        }
    }
}

impl Endpoints for NodeEndpoints {
    /// Without a port the Node reports no address at all: the device's own would lead the API
    /// server to whatever has it in the data centre's network.
    fn endpoint(&self, node: &NodeName) -> Option<Endpoint> {
        let port = self.ensure(node);
        let entry = self.inner.kind.entry(self.inner.address);
        Some(Endpoint {
            addresses: port.map(|_| entry).into_iter().collect(),
            kubelet_port: port.unwrap_or(0),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::kube::fake::FakeApi;

    const LOOPBACK: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn node(name: &str) -> NodeName {
        NodeName::parse(name).unwrap()
    }

    fn reporting(addresses: Value, port: u16) -> Value {
        json!({
            "metadata": {"labels": {EDGE_LABEL: ""}},
            "status": {"addresses": addresses,
                "daemonEndpoints": {"kubeletEndpoint": {"Port": port}}},
        })
    }

    #[tokio::test]
    async fn ports_that_nodes_report_with_our_address_stay_theirs_across_a_restart() {
        let fake = FakeApi::new();
        let ours = json!([{"type": "InternalIP", "address": "127.0.0.1"}]);
        let other = json!([{"type": "InternalIP", "address": "192.0.2.7"}]);
        fake.put("/api/v1/nodes/a", reporting(ours, 28_411));
        fake.put("/api/v1/nodes/b", reporting(other, 28_412));
        let config = Config {
            address: Some(LOOPBACK),
            ..Config::default()
        };
        let server = http::Uri::from_static("https://127.0.0.1:6443");
        let client = fake.client();
        let endpoints = NodeEndpoints::find(&config, &server, &client).await;
        let endpoints = endpoints.unwrap();
        assert_eq!(endpoints.nodes(), [node("a")]);
        assert_eq!(endpoints.port(&node("a")), Some(28_411));
        let endpoint = endpoints.endpoint(&node("a")).unwrap();
        assert_eq!(endpoint.kubelet_port, 28_411);
        let entry = json!({"type": "InternalIP", "address": "127.0.0.1"});
        assert_eq!(endpoint.addresses, [entry]);
    }

    #[tokio::test]
    async fn a_port_that_was_released_shortly_before_a_restart_still_rests() {
        let fake = FakeApi::new();
        let resting = vec![(28_441, Duration::from_secs(60))];
        let told = replicas::told(LOOPBACK, resting, Timestamp::now());
        let maps = "/api/v1/namespaces/edge-system/configmaps";
        fake.put(&format!("{maps}/{}", replicas::MAP), json!({"data": told}));
        let config = Config {
            address: Some(LOOPBACK),
            ports: "28441-28442".parse().unwrap(),
            ..Config::default()
        };
        let server = http::Uri::from_static("https://127.0.0.1:6443");
        let client = fake.client();
        let endpoints = NodeEndpoints::find(&config, &server, &client).await;
        let endpoints = endpoints.unwrap();
        assert_eq!(endpoints.ensure(&node("a")), Some(28_442));
        assert_eq!(endpoints.ensure(&node("b")), None);
    }

    #[tokio::test]
    async fn an_endpoint_is_opened_once_and_closed_when_it_is_released() {
        let range: PortRange = "28421-28429".parse().unwrap();
        let endpoints = NodeEndpoints::at(LOOPBACK, AddressType::default(), range);
        let port = endpoints.ensure(&node("a")).unwrap();
        assert_eq!(endpoints.ensure(&node("a")), Some(port));
        let changes = endpoints.changes().await;
        let [Change::Opened(name, listener)] = &changes[..] else {
            panic!("one socket");
        };
        assert_eq!(*name, node("a"));
        assert_eq!(listener.local_addr().unwrap().port(), port);
        endpoints.release(&node("a"));
        let changes = endpoints.changes().await;
        assert!(matches!(&changes[..], [Change::Closed(name)] if *name == node("a")));
        let again = endpoints.ensure(&node("a")).unwrap();
        assert_ne!(again, port, "the port rests");
    }

    #[tokio::test]
    async fn a_node_without_a_port_reports_no_address_rather_than_its_own() {
        // A port that is held already: there is none left.
        let held = TcpListener::bind((LOOPBACK, 0)).unwrap();
        let port = held.local_addr().unwrap().port();
        let range: PortRange = format!("{port}-{port}").parse().unwrap();
        let endpoints = NodeEndpoints::at(LOOPBACK, AddressType::default(), range);
        let endpoint = endpoints.endpoint(&node("a")).unwrap();
        assert!(endpoint.addresses.is_empty());
    }

    #[test]
    fn what_a_node_reports_is_compared_whole() {
        let status = |addresses: Value, port: u16| {
            let node = reporting(addresses, port);
            Reported::read(node["status"].to_string().as_bytes())
        };
        let internal = json!({"type": "InternalIP", "address": "127.0.0.1"});
        let named = json!({"type": "Hostname", "address": "a"});
        let is = |reported: Option<Reported>| {
            let reported = reported.unwrap();
            reported.is(AddressType::InternalIp, LOOPBACK, Some(20_001))
        };
        assert!(is(status(json!([internal]), 20_001)));
        assert!(!is(status(json!([internal]), 20_002)));
        assert!(!is(status(json!([named, internal]), 20_001)));
        assert!(!is(status(json!([named]), 20_001)));
        assert_eq!(status(json!([]), 20_001), None);
        assert_eq!(Reported::read(b"{}"), None);
        assert_eq!(Reported::read(b"nonsense"), None);
    }
}
