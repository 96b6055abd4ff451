//! A stock kubelet on a machine of the testbed: the peer that figures are compared with.
//!
//! Its API server must listen where the machine can reach it: `Options::bind` of the cluster is
//! the testbed's host address then. And it must reach the kubelet: its port is open at the outside
//! address of the machine's router, which is the node's InternalIP, and
//! `Options::address_types` says InternalIP first, since no resolver knows the node's name.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::json;

use crate::cluster::Cluster;
use crate::containerd::{Containerd, Flavour, SOCKET};
use crate::netns::{Backbone, Inside, Machine};
use crate::programs::{self, Release};

/// Where every kubelet listens.
const KUBELET_PORT: u16 = 10250;

/// A kubelet on a machine of its own. Dropping it pulls the machine's plug.
pub struct Peer {
    pub name: String,
    pub machine: Machine,
    pub containerd: Containerd,
    pub kubelet: Inside,
}

impl Peer {
    pub fn start(
        backbone: &Backbone,
        cluster: &Cluster,
        name: &str,
        release: Release,
        flavour: Flavour,
    ) -> Result<Peer> {
        let machine = backbone.machine(name)?;
        let images = machine
            .dir
            .parent()
            .context("directory of the machines")?
            .to_owned();
        let containerd = Containerd::start(&machine, flavour, &images)?;
        let kubeconfig = cluster.user(&format!("system:node:{name}"), &["system:nodes"])?;
        let dir = machine.dir.join("kubelet");
        fs::create_dir_all(&dir)?;
        let config = write_config(&dir, cluster)?;
        write_network(&machine)?;
        let address = machine.expose(KUBELET_PORT)?;
        let program = programs::ensure("kubelet", release)?;
        let program = program.to_str().context("path of the kubelet")?.to_owned();
        let kubelet = machine.spawn(&program, |command| {
            command
                .arg("--config")
                .arg(&config)
                .arg("--kubeconfig")
                .arg(&kubeconfig);
            command.arg(format!("--hostname-override={name}"));
            command.arg(format!("--node-ip={address}"));
        })?;
        Ok(Peer {
            name: name.to_owned(),
            machine,
            containerd,
            kubelet,
        })
    }
}

/// The defaults, but for what this machine cannot do or a test does not want to wait for.
fn write_config(dir: &std::path::Path, cluster: &Cluster) -> Result<PathBuf> {
    let config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": cluster.ca_file()},
        },
        "authorization": {"mode": "Webhook"},
        "cgroupDriver": "cgroupfs",
        "failCgroupV1": false,
        "failSwapOn": false,
        "containerRuntimeEndpoint": format!("unix://{SOCKET}"),
        "evictionHard": {"memory.available": "0%", "nodefs.available": "0%", "imagefs.available": "0%"},
        "imageGCHighThresholdPercent": 100,
        "resolvConf": "/etc/resolv.conf",
        "clusterDomain": "cluster.local",
        "clusterDNS": ["10.96.0.10"],
    });
    let path = dir.join("config.json");
    fs::write(&path, serde_json::to_vec_pretty(&config)?)?;
    Ok(path)
}

/// The bridge network that a cluster's network plugin would have set up.
fn write_network(machine: &Machine) -> Result<()> {
    let network = json!({
        "cniVersion": "0.4.0",
        "name": "testbed",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": true,
                "ipMasq": true,
                "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": "10.244.250.0/24"}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    });
    let file = machine.dir.join("10-testbed.conflist");
    fs::write(&file, serde_json::to_vec_pretty(&network)?)?;
    let from = file
        .to_str()
        .context("path of the network's configuration")?;
    machine
        .exec(&["cp", from, "/etc/cni/net.d/10-testbed.conflist"])
        .map(drop)
}
