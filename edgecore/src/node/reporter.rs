//! Says how this node does: looks at the device and the runtime, and reports when something other
//! than a heartbeat changed. Also makes what Pods are born with, from the cloud's welcome and the
//! device's own numbers.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use common::hub::proto::NodeEnvironment;
use jiff::Timestamp;
use serde_json::Value;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use super::environment::Environment;
use super::facts::{self, Facts};
use super::status::{self, Image, NodeConfig, RuntimeState};
use crate::cri::Runtime;
use crate::pods::manager;
use crate::store::reports::{Reports, node_key};

/// Between two looks at memory, disk and addresses: pressure grows in minutes, and each look wakes
/// the board. The runtime's state wakes this at once.
const LOOK: Duration = Duration::from_secs(30);

/// What the task works with.
pub struct Deps {
    pub config: NodeConfig,
    pub data_dir: PathBuf,
    pub reports: Reports,
    pub cri: Runtime,
    pub runtime: watch::Receiver<manager::RuntimeState>,
    /// From the welcome, persisted.
    pub from_cloud: watch::Receiver<Option<NodeEnvironment>>,
    pub environment: watch::Sender<Option<Environment>>,
}

/// See the module.
pub struct Task {
    deps: Deps,
    said: Option<Value>,
}

impl Task {
    pub fn build(deps: Deps) -> Self {
        let said = deps.reports.all().into_iter().find(|r| r.key == node_key());
        let said = said.and_then(|r| serde_json::from_slice(&r.bytes).ok());
        Self { deps, said }
    }

    /// Until shutdown.
    pub async fn run(mut self, shutdown: CancellationToken) {
        loop {
            let facts = facts::observe(&self.deps.data_dir);
            self.environment(&facts);
            tokio::select! {
                biased;
                // A runtime that does not answer must not hold the end up.
                () = shutdown.cancelled() => return,
                () = self.report(&facts) => {}
            }
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                _ = self.deps.runtime.changed() => {}
                _ = self.deps.from_cloud.changed() => {}
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    fn environment(&mut self, facts: &Facts) {
        let Some(cloud) = self.deps.from_cloud.borrow_and_update().clone() else {
            return;
        };
        let environment = build_environment(&cloud, facts, &self.deps.config);
        self.deps.environment.send_if_modified(|held| {
            let changed = held.as_ref() != Some(&environment);
            if changed {
                info!(node_ip = %environment.node_ip, dns = ?environment.cluster_dns, "what Pods are born with is known");
                *held = Some(environment);
            }
            changed
        });
    }

    async fn report(&mut self, facts: &Facts) {
        let state = self.deps.runtime.borrow_and_update().clone();
        let images = if state.ready {
            self.images().await
        } else {
            Vec::new()
        };
        let runtime = RuntimeState {
            name: state.name,
            version: state.version,
            ready: state.ready,
            network_ready: state.network_ready,
            problems: if state.message.is_empty() {
                Vec::new()
            } else {
                vec![state.message]
            },
            images,
        };
        let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let status =
            status::node_status(facts, &runtime, &self.deps.config, self.said.as_ref(), &now);
        if self
            .said
            .as_ref()
            .is_some_and(|said| status::same(said, &status))
        {
            return;
        }
        debug!("the node's status changed");
        self.deps.reports.put_node(&status);
        self.said = Some(status);
    }

    async fn images(&self) -> Vec<Image> {
        let answer = self.deps.cri.list_images().await;
        let by_id: BTreeMap<String, Image> = answer
            .unwrap_or_default()
            .into_iter()
            .map(|i| {
                let names = i.repo_digests.into_iter().chain(i.repo_tags).collect();
                (
                    i.id,
                    Image {
                        names,
                        size_bytes: i.size,
                    },
                )
            })
            .collect();
        by_id.into_values().collect()
    }
}

fn build_environment(cloud: &NodeEnvironment, facts: &Facts, config: &NodeConfig) -> Environment {
    let allocatable = status::allocatable(facts, config);
    let port = u16::try_from(cloud.api_port).unwrap_or(443);
    Environment {
        node_name: config.node_name.clone(),
        node_ip: facts.node_ip.unwrap_or(IpAddr::from([127, 0, 0, 1])),
        cluster_dns: cloud.cluster_dns.parse().ok(),
        cluster_domain: cloud.cluster_domain.clone(),
        api_service: cloud.api_host.parse().ok().map(|ip| (ip, port)),
        allocatable_cpu_millis: allocatable.cpu_millis,
        allocatable_memory_bytes: allocatable.memory_bytes,
        allocatable_ephemeral_bytes: allocatable.ephemeral_bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_born_with_the_clusters_real_addresses() {
        let cloud = NodeEnvironment {
            cluster_dns: "10.96.0.10".into(),
            cluster_domain: "cluster.local".into(),
            api_host: "10.96.0.1".into(),
            api_port: 443,
            ..Default::default()
        };
        let facts = Facts {
            cpus: 2,
            ..Facts::default()
        };
        let environment = build_environment(&cloud, &facts, &NodeConfig::new("n"));
        assert_eq!(environment.api_service, Some(([10, 96, 0, 1].into(), 443)));
        assert_eq!(environment.cluster_dns, Some([10, 96, 0, 10].into()));
        assert_eq!(environment.allocatable_cpu_millis, 2000);
        let none = NodeEnvironment {
            cluster_dns: String::new(),
            ..cloud
        };
        assert_eq!(
            build_environment(&none, &facts, &NodeConfig::new("n")).cluster_dns,
            None
        );
    }
}
