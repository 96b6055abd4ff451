//! What the benchmark runs on: one control plane that everybody reaches over the same network,
//! and a machine behind NAT for each node.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::api::Api;
use crate::bed::{Bed, progress};
use crate::cloud::Cloud;
use crate::cluster::{Cluster, Options};
use crate::containerd::{Containerd, Flavour};
use crate::edge::{Edge, Transport};
use crate::netns::{Backbone, Machine};
use crate::peer::Peer;
use crate::programs::K8S_1_37;
use crate::relay::{Relay, Shape};
use crate::wait::wait_for;
use crate::world::condition;

/// Which nodes are needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parts {
    pub cloud: bool,
    pub quic: bool,
    pub websocket: bool,
    pub peer: bool,
}

/// Whose node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Quic,
    Websocket,
    Peer,
}

impl Side {
    pub fn word(self) -> &'static str {
        match self {
            Side::Quic => "ours over QUIC",
            Side::Websocket => "ours over WebSocket",
            Side::Peer => "the stock kubelet",
        }
    }
}

/// A node as a measure sees it.
#[derive(Clone, Copy)]
pub struct Node<'a> {
    pub side: Side,
    pub name: &'a str,
    pub machine: &'a Machine,
    /// The agent's process.
    pub pid: Option<i32>,
}

/// Fields are dropped in this order: the testbed, which sweeps the rest, goes last.
pub struct Rig {
    quic: Option<Edge>,
    websocket: Option<Edge>,
    peer: Option<Peer>,
    pub cloud: Option<Cloud>,
    pub cluster: Cluster,
    pub kubeconfig: PathBuf,
    _backbone: Backbone,
    _bed: Arc<Bed>,
}

impl Rig {
    pub fn start(parts: Parts) -> Result<Rig> {
        let bed = Arc::new(Bed::scratch()?);
        let backbone = Backbone::build(&bed)?;
        let mut options = Options::new(K8S_1_37);
        // A kubelet dials the API server itself, so that must be where its machine can reach it.
        options.bind = Some(bed.host_address());
        // And it dials the kubelet, whose name no resolver knows.
        options.address_types = Some("InternalIP,Hostname".to_owned());
        let cluster = Cluster::start(&bed, options)?;
        let mut rig = Rig {
            quic: None,
            websocket: None,
            peer: None,
            cloud: None,
            kubeconfig: cluster.kubeconfig.clone(),
            cluster,
            _backbone: backbone,
            _bed: bed.clone(),
        };
        if parts.peer {
            progress("starting a stock kubelet");
            let release = K8S_1_37;
            let peer = Peer::start(
                &rig._backbone,
                &rig.cluster,
                "stock",
                release,
                Flavour::Built,
            )?;
            rig.peer = Some(peer);
        }
        if parts.cloud {
            progress("starting cloudcore");
            let mut cloud = Cloud::prepared(&bed, &rig.kubeconfig)?;
            if parts.quic != parts.websocket {
                // A node that is the only one may have the port that some cases of the suite ask
                // by number.
                cloud.set_flags(&["--kubelet-ports", "10250-10250"]);
            }
            cloud.command(&["install"])?;
            cloud.resume()?;
            rig.cloud = Some(cloud);
        }
        if parts.quic {
            progress("joining");
            rig.quic = Some(rig.joined("edge-quic", Transport::Quic)?);
        }
        if parts.websocket {
            rig.websocket = Some(rig.joined("edge-ws", Transport::Websocket)?);
        }
        rig.wait_ready()?;
        Ok(rig)
    }

    fn joined(&self, name: &str, transport: Transport) -> Result<Edge> {
        let cloud = self.cloud.as_ref().context("no cloudcore runs")?;
        let mut edge = Edge::prepare(&self._backbone, name, Flavour::Built)?;
        edge.transport = transport;
        edge.join(&cloud.invite(&[])?)?;
        Ok(edge)
    }

    fn wait_ready(&mut self) -> Result<()> {
        let kubectl = self.cluster.kubectl.clone();
        let names: Vec<String> = self
            .nodes()
            .iter()
            .map(|node| node.name.to_owned())
            .collect();
        for name in names {
            let ready = wait_for(
                &format!("Node {name} Ready"),
                Duration::from_secs(90),
                || {
                    self.ensure_running()?;
                    let node = kubectl.json(&["get", "node", &name])?;
                    ensure!(condition(&node, "Ready") == Some("True"), "not Ready");
                    Ok(())
                },
            );
            ready.with_context(|| self.story())?;
        }
        Ok(())
    }

    /// Puts a link of that shape before one of our nodes, whose agent dials anew over it. The link is
    /// there for as long as the relay, and the agent has no other one afterwards.
    pub fn slow_down(&mut self, side: Side, shape: Shape) -> Result<Relay> {
        let cloud = self.cloud.as_ref().context("no cloudcore runs")?.address;
        let relay = Relay::start(self._bed.host_address(), cloud, shape)?;
        let edge = match side {
            Side::Quic => self.quic.as_mut(),
            Side::Websocket => self.websocket.as_mut(),
            Side::Peer => None,
        };
        let edge = edge.context("no such node of ours")?;
        edge.machine.divert(cloud, relay.address())?;
        edge.stop()?;
        edge.start()?;
        let path = format!("/api/v1/nodes/{}/proxy/healthz", edge.name);
        let kubectl = &self.cluster.kubectl;
        wait_for("the node behind its link", Duration::from_secs(90), || {
            ensure!(relay.carried().up > 0, "nothing crosses the link");
            kubectl.ok(&["get", "--raw", &path])
        })
        .with_context(|| self.story())?;
        Ok(relay)
    }

    /// Imports further images on the node of that side.
    pub fn import(&self, side: Side, archive: &Path) -> Result<()> {
        fn ours(edge: Option<&Edge>) -> Option<(&Containerd, &Machine)> {
            let edge = edge?;
            Some((edge.containerd.as_ref()?, &edge.machine))
        }
        let found = match side {
            Side::Quic => ours(self.quic.as_ref()),
            Side::Websocket => ours(self.websocket.as_ref()),
            Side::Peer => self
                .peer
                .as_ref()
                .map(|peer| (&peer.containerd, &peer.machine)),
        };
        let (containerd, machine) =
            found.with_context(|| format!("{} does not run", side.word()))?;
        let archive = archive.to_str().context("path of the images")?;
        containerd
            .ctr(machine, &["images", "import", archive])
            .map(drop)
    }

    /// The node of that side, if it runs.
    pub fn node(&self, side: Side) -> Result<Node<'_>> {
        let mut nodes = self.nodes().into_iter();
        nodes
            .find(|node| node.side == side)
            .with_context(|| format!("{} does not run", side.word()))
    }

    /// Fails with the log of the first agent that has ended.
    pub fn ensure_running(&mut self) -> Result<()> {
        for edge in [&mut self.quic, &mut self.websocket].into_iter().flatten() {
            edge.ensure_running()?;
        }
        match &mut self.peer {
            Some(peer) => peer.kubelet.ensure_running(),
            None => Ok(()),
        }
    }

    /// Every node, ours first.
    pub fn nodes(&self) -> Vec<Node<'_>> {
        fn ours(side: Side, edge: &Edge) -> Node<'_> {
            Node {
                side,
                name: &edge.name,
                machine: &edge.machine,
                pid: edge.pid(),
            }
        }
        let quic = self.quic.as_ref().map(|edge| ours(Side::Quic, edge));
        let websocket = self
            .websocket
            .as_ref()
            .map(|edge| ours(Side::Websocket, edge));
        let peer = self.peer.as_ref().map(|peer| Node {
            side: Side::Peer,
            name: &peer.name,
            machine: &peer.machine,
            pid: Some(peer.kubelet.pid),
        });
        [quic, websocket, peer].into_iter().flatten().collect()
    }

    /// One of ours and the peer: for what does not differ by transport.
    pub fn pair(&self) -> Vec<Node<'_>> {
        let mut nodes = self.nodes();
        nodes.retain(|node| node.side != Side::Websocket);
        nodes
    }

    pub fn api(&self) -> Result<Api> {
        Api::new(&self.kubeconfig)
    }

    /// The ends of the logs, for a measure that failed.
    pub fn story(&self) -> String {
        let mut text = String::new();
        if let Some(cloud) = &self.cloud {
            text += &format!("--- cloudcore\n{}\n", cloud.tail(20));
        }
        for edge in [&self.quic, &self.websocket].into_iter().flatten() {
            text += &format!("--- edgecore {}\n{}\n", edge.name, edge.tail(20));
        }
        if let Some(peer) = &self.peer {
            text += &format!("--- kubelet\n{}\n", peer.kubelet.tail(10));
        }
        text
    }
}
