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
use tracing::{error, info, warn};

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
    pub bridge: String,
    pub from_cloud: watch::Receiver<Option<NodeEnvironment>>,
    pub environment: watch::Receiver<Option<Environment>>,
}

/// See the module.
pub struct Task {
    deps: Deps,
    dns: Option<(DnsConfig, JoinHandle<()>)>,
    told: Told,
}

/// What was said last of each matter: it is looked at every half minute, and said once.
#[derive(Default)]
struct Told {
    network: String,
    addresses: String,
    dns: String,
}

/// Whether it was not said last.
fn news(told: &mut String, text: &str) -> bool {
    let new = told != text;
    if new {
        text.clone_into(told);
    }
    new
}

struct KeptRange(Store);

impl RangeKeeper for KeptRange {
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
            told: Told::default(),
        }
    }

    /// Until shutdown. Pods keep their addresses after it.
    pub async fn run(mut self, shutdown: CancellationToken) {
        loop {
            self.pod_network().await;
            self.cluster_addresses(&shutdown).await;
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                _ = self.deps.environment.changed() => {}
                () = tokio::time::sleep(AGAIN) => {}
            }
        }
    }

    async fn pod_network(&mut self) {
        let cloud = self.deps.from_cloud.borrow().clone();
        let keeper = KeptRange(self.deps.store.clone());
        let first = keeper.kept().is_none();
        if first && self.deps.pod_cidr.is_none() && cloud.is_none() {
            return;
        }
        let config = self.config();
        let configured = self.deps.pod_cidr.clone();
        let node_range = self.node_range();
        let ensured = tokio::task::spawn_blocking(move || {
            let inputs = inputs(&config, configured, node_range, &cloud.unwrap_or_default())?;
            network::ensure(&config, &inputs, &keeper)
        });
        let result = match ensured.await {
            Ok(result) => result,
            Err(error) => return error!(%error, "looking after the Pods' network panicked"),
        };
        let text = match &result {
            Ok(Network::Foreign { file }) => {
                format!("CNI configuration {} is used", file.display())
            }
            Ok(Network::Own { range, .. }) => format!("Pods get addresses from {range}"),
            Err(error) => format!("Pods have no network: {}", chain(error)),
        };
        if news(&mut self.told.network, &text) {
            match result {
                Ok(_) => info!("{text}"),
                Err(_) => warn!("{text}"),
            }
        }
    }

    fn config(&self) -> NetworkConfig {
        let usual = NetworkConfig::default();
        NetworkConfig {
            conf_dir: self.deps.cni_config_dir.clone(),
            bin_dirs: match &self.deps.cni_bin_dir {
                Some(dir) => vec![dir.clone()],
                None => usual.bin_dirs,
            },
            bridge: self.deps.bridge.clone(),
        }
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
        if let Err(error) = self.hold(&wanted).await {
            if news(&mut self.told.addresses, &error) {
                warn!(error, "Pods cannot reach the cluster's addresses");
            }
            return;
        }
        self.told.addresses.clear();
        let Some(dns) = environment.cluster_dns else {
            return;
        };
        let listen = SocketAddr::new(dns, 53);
        let config = DnsConfig {
            listen,
            cluster_domain: environment.cluster_domain,
            api_service: api,
            resolv_conf: Path::new("/etc/resolv.conf").into(),
            upstream_port: 53,
        };
        if let Some((serving, task)) = self.dns.take() {
            if serving == config && !task.is_finished() {
                self.dns = Some((serving, task));
                return;
            }
            // The sockets are free when it has ended.
            task.abort();
            if let Err(error) = task.await
                && error.is_panic()
            {
                error!(%error, "answering Pods' DNS questions panicked");
            }
        }
        let told = &mut self.told.dns;
        match Forwarder::bind(config.clone(), self.deps.desired.clone()).await {
            Ok(forwarder) => {
                told.clear();
                info!(%listen, "answering Pods' DNS questions");
                let task = tokio::spawn(forwarder.run(shutdown.clone()));
                self.dns = Some((config, task));
            }
            Err(error) => {
                if news(told, &error.to_string()) {
                    warn!(
                        %listen, %error,
                        "cannot answer Pods' DNS questions (another edgecore on this device may); trying again"
                    );
                }
            }
        }
    }

    /// What is held is noted first: an address that nobody remembers is never let go of.
    async fn hold(&self, wanted: &[IpAddr]) -> Result<(), String> {
        let meta = self.deps.store.meta();
        let before = meta.get(HELD).ok().flatten().unwrap_or_default();
        let before: Vec<IpAddr> = serde_json::from_slice(&before).unwrap_or_default();
        let note = async |held: &[IpAddr]| {
            let (meta, bytes) = (meta.clone(), serde_json::to_vec(held));
            let bytes = bytes.map_err(|e| e.to_string())?;
            let noted = tokio::task::spawn_blocking(move || meta.put(HELD, &bytes)).await;
            noted
                .map_err(|e| e.to_string())?
                .map_err(|e| format!("they could not be noted: {}", chain(&e)))
        };
        if before == wanted {
            return addresses::hold("lo", wanted, &before).map_err(|e| chain(&e));
        }
        let mut both: Vec<IpAddr> = before.clone();
        both.extend(wanted.iter().filter(|a| !before.contains(a)));
        if both != before {
            note(&both).await?;
        }
        addresses::hold("lo", wanted, &before).map_err(|e| chain(&e))?;
        if both != wanted {
            note(wanted).await?;
        }
        Ok(())
    }
}

fn inputs(
    config: &NetworkConfig,
    configured: Option<String>,
    node_range: Option<Range>,
    cloud: &NodeEnvironment,
) -> Result<RangeInputs, NetworkError> {
    let routes = std::fs::read_to_string("/proc/net/route").unwrap_or_default();
    let addresses = [cloud.api_host.parse().ok(), cloud.cluster_dns.parse().ok()];
    let mut cluster = network::cluster_ranges(addresses.into_iter().flatten());
    let said = cloud.cluster_ranges.iter();
    cluster.extend(said.filter_map(|r| r.parse::<Range>().ok()));
    Ok(RangeInputs {
        configured: configured.as_deref().map(str::parse).transpose()?,
        pod_cidr: node_range,
        routes: network::device_routes(&routes, &config.bridge),
        cluster,
    })
}

#[cfg(test)]
mod tests;
