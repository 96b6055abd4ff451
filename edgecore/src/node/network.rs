//! The network that Pods on this device are born into: a CNI configuration where there is none, the
//! cluster's API and DNS addresses on `lo`, and the DNS forwarder behind the latter.
//!
//! Waits for the cloud only on the very first start, when nothing is known of the cluster; later
//! starts use what the store kept.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::hub::proto::NodeEnvironment;
use common::ids::{Kind, ObjectKey};
use common::telemetry::chain;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::addresses;
use super::dns::{DnsConfig, Forwarder, held_addresses};
use super::environment::Environment;
use crate::pods::network::{
    self, Network, NetworkConfig, NetworkError, Range, RangeInputs, RangeKeeper,
};
use crate::store::Store;
use crate::store::desired::{Desired, Lookup};

/// A missing plugin or a taken address is mended by people: looked at again at this pace.
const AGAIN: Duration = Duration::from_secs(30);

const RANGE: &str = "pod-range";
const HELD: &str = "held-addresses";

/// What the task works with.
pub struct Deps {
    pub store: Store,
    pub desired: Desired,
    pub node_name: String,
    pub pod_cidr: Option<String>,
    pub cni_config_dir: PathBuf,
    pub cni_bin_dir: Option<PathBuf>,
    pub from_cloud: watch::Receiver<Option<NodeEnvironment>>,
    pub environment: watch::Receiver<Option<Environment>>,
}

/// See the module.
pub struct Task {
    deps: Deps,
    dns: Option<(SocketAddr, JoinHandle<()>)>,
    told: Option<String>,
}

struct KeptRange<'a>(&'a Store);

impl RangeKeeper for KeptRange<'_> {
    fn kept(&self) -> Option<String> {
        let bytes = self.0.meta().get(RANGE).ok().flatten()?;
        String::from_utf8(bytes).ok()
    }

    fn keep(&self, range: &str) -> Result<(), String> {
        self.0
            .meta()
            .put(RANGE, range.as_bytes())
            .map_err(|e| chain(&e))
    }
}

impl Task {
    pub fn build(deps: Deps) -> Self {
        Self {
            deps,
            dns: None,
            told: None,
        }
    }

    /// Until shutdown. Pods keep their addresses after it.
    pub async fn run(mut self, shutdown: CancellationToken) {
        loop {
            self.pod_network();
            self.cluster_addresses(&shutdown).await;
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                _ = self.deps.environment.changed() => {}
                () = tokio::time::sleep(AGAIN) => {}
            }
        }
    }

    fn pod_network(&mut self) {
        let cloud = self.deps.from_cloud.borrow().clone();
        let first = KeptRange(&self.deps.store).kept().is_none();
        if first && self.deps.pod_cidr.is_none() && cloud.is_none() {
            return;
        }
        let result = self.ensure(&cloud.unwrap_or_default());
        let text = match &result {
            Ok(Network::Foreign { file }) => {
                format!("CNI configuration {} is used", file.display())
            }
            Ok(Network::Own { range, .. }) => format!("Pods get addresses from {range}"),
            Err(error) => format!("Pods have no network: {}", chain(error)),
        };
        if self.told.as_ref() != Some(&text) {
            match result {
                Ok(_) => info!("{text}"),
                Err(_) => warn!("{text}"),
            }
            self.told = Some(text);
        }
    }

    fn ensure(&self, cloud: &NodeEnvironment) -> Result<Network, NetworkError> {
        let config = NetworkConfig {
            conf_dir: self.deps.cni_config_dir.clone(),
            ..NetworkConfig::default()
        };
        let config = match &self.deps.cni_bin_dir {
            Some(dir) => NetworkConfig {
                bin_dirs: vec![dir.clone()],
                ..config
            },
            None => config,
        };
        let routes = std::fs::read_to_string("/proc/net/route").unwrap_or_default();
        let addresses = [cloud.api_host.parse().ok(), cloud.cluster_dns.parse().ok()];
        let mut cluster = network::cluster_ranges(addresses.into_iter().flatten());
        cluster.extend(
            cloud
                .cluster_ranges
                .iter()
                .filter_map(|r| r.parse::<Range>().ok()),
        );
        let inputs = RangeInputs {
            configured: self.deps.pod_cidr.as_deref().map(str::parse).transpose()?,
            pod_cidr: self.node_range(),
            routes: network::device_routes(&routes, &config.bridge),
            cluster,
        };
        network::ensure(&config, &inputs, &KeptRange(&self.deps.store))
    }

    /// The Node's `spec.podCIDR`, where the cluster gave one already.
    fn node_range(&self) -> Option<Range> {
        let key = ObjectKey::named(Kind::Node, "", &self.deps.node_name);
        let Lookup::Present(bytes) = self.deps.desired.lookup(&key) else {
            return None;
        };
        let node: serde_json::Value = serde_json::from_slice(&bytes).ok()?;
        node.pointer("/spec/podCIDR")?.as_str()?.parse().ok()
    }

    async fn cluster_addresses(&mut self, shutdown: &CancellationToken) {
        let Some(environment) = self.deps.environment.borrow_and_update().clone() else {
            return;
        };
        let api = environment.api_service.map(|(ip, _)| ip);
        let wanted = held_addresses(api, environment.cluster_dns);
        if let Err(error) = self.hold(&wanted) {
            warn!(error = %chain(&error), "Pods cannot reach the cluster's addresses");
            return;
        }
        let Some(dns) = environment.cluster_dns else {
            return;
        };
        let listen = SocketAddr::new(dns, 53);
        if self
            .dns
            .as_ref()
            .is_some_and(|(at, task)| *at == listen && !task.is_finished())
        {
            return;
        }
        let config = DnsConfig {
            listen,
            cluster_domain: environment.cluster_domain,
            api_service: api,
            resolv_conf: Path::new("/etc/resolv.conf").into(),
            upstream_port: 53,
        };
        match Forwarder::bind(config, self.deps.desired.clone()).await {
            Ok(forwarder) => {
                if let Some((_, old)) = self.dns.take() {
                    old.abort();
                }
                info!(%listen, "answering Pods' DNS questions");
                let task = tokio::spawn(forwarder.run(shutdown.clone()));
                self.dns = Some((listen, task));
            }
            Err(error) => {
                warn!(%listen, %error, "cannot answer Pods' DNS questions; trying again");
            }
        }
    }

    fn hold(&self, wanted: &[IpAddr]) -> Result<(), addresses::AddressError> {
        let meta = self.deps.store.meta();
        let before = meta.get(HELD).ok().flatten().unwrap_or_default();
        let before: Vec<IpAddr> = serde_json::from_slice(&before).unwrap_or_default();
        addresses::hold("lo", wanted, &before)?;
        if before != wanted
            && let Ok(bytes) = serde_json::to_vec(wanted)
            && let Err(error) = meta.put(HELD, &bytes)
        {
            warn!(error = %chain(&error), "the addresses held on lo were not noted");
        }
        Ok(())
    }
}
