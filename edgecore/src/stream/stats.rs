//! What the node, its Pods and their containers use.
//!
//! Owns one gathering, which everybody who asks within a second shares, and the sample before it,
//! from which rates are computed. Takes containers' figures from the runtime, Pods' from their
//! cgroups and the network namespace of one of their processes, the node's from /proc. Gives the
//! documents that a kubelet's clients read. Nothing is measured while nobody asks.
//!
//! A figure that cannot be had is left out, never made up.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::metrics;
use crate::cri::{Runtime, api, convert};
use crate::pods::cgroups::{self, Cgroups, Qos};
use crate::pods::jobs::Paths;
use crate::pods::quantity;
use crate::pods::seen::Run;
use crate::store::desired::Desired;

mod node;
mod pod;
mod rates;
mod summary;

pub use node::{Interface, Node, Process};
use rates::Rates;

/// Those who ask within this get the same figures.
const SHARED_FOR: Duration = Duration::from_secs(1);

/// What is measured, and through what.
pub struct Deps {
    pub cri: Runtime,
    /// Set once the runtime has said who makes cgroups.
    pub cgroups: Arc<OnceLock<Arc<Cgroups>>>,
    pub desired: Desired,
    pub paths: Paths,
    /// The node's file system is the one that this is on.
    pub data_dir: PathBuf,
    pub node: String,
}

/// Processor time, of all processors together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cpu {
    pub at: Timestamp,
    pub nanos: u64,
    /// Billionths of a processor, over the time since the sample before.
    pub nano_cores: Option<u64>,
}

/// Bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    pub at: Timestamp,
    pub working_set: u64,
    pub available: Option<u64>,
    pub usage: Option<u64>,
    pub rss: Option<u64>,
    pub page_faults: Option<u64>,
    pub major_page_faults: Option<u64>,
}

/// A file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Disk {
    pub capacity: u64,
    pub available: u64,
    pub inodes: u64,
    pub inodes_free: u64,
}

/// What something has on a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Used {
    pub bytes: u64,
    pub inodes: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerStats {
    pub id: String,
    pub name: String,
    pub image: String,
    pub started: Timestamp,
    pub cpu: Option<Cpu>,
    pub memory: Option<Memory>,
    /// Bytes; `None` is no limit.
    pub memory_limit: Option<u64>,
    pub writable: Option<Used>,
    pub logs: Used,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodStats {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub started: Timestamp,
    /// Its path; empty when it is not known.
    pub cgroup: String,
    pub cpu: Option<Cpu>,
    pub memory: Option<Memory>,
    /// Of a Pod with a network of its own.
    pub network: Vec<Interface>,
    pub processes: Option<u64>,
    /// By name.
    pub containers: Vec<ContainerStats>,
}

/// All that was measured at one time.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    pub at: Timestamp,
    pub node_name: String,
    pub node: Node,
    /// All Pods together.
    pub all_pods: (Option<Cpu>, Option<Memory>),
    pub agent: Process,
    pub disk: Option<Disk>,
    pub images: Option<(Disk, Used)>,
    /// By namespace and name.
    pub pods: Vec<PodStats>,
    /// The runtime did not answer: there are no Pods in here.
    pub failed: bool,
}

/// Measures for whoever asks; cheap to clone.
#[derive(Clone)]
pub struct Gatherer {
    inner: Arc<Inner>,
}

struct Inner {
    deps: Deps,
    /// Held through a gathering, so that those who ask meanwhile share it.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    last: Option<(Instant, Arc<Snapshot>)>,
    rates: Rates,
}

impl Gatherer {
    pub fn new(deps: Deps) -> Self {
        let state = Mutex::default();
        Self {
            inner: Arc::new(Inner { deps, state }),
        }
    }

    /// `/stats/summary`: `stats/v1alpha1`.
    pub async fn summary(&self, only_cpu_and_memory: bool) -> Value {
        summary::render(&*self.snapshot().await, only_cpu_and_memory)
    }

    /// `/metrics/resource`.
    pub async fn resource(&self) -> String {
        metrics::resource(&*self.snapshot().await)
    }

    /// `/metrics/cadvisor`.
    pub async fn cadvisor(&self) -> String {
        metrics::cadvisor(&*self.snapshot().await)
    }

    /// `/metrics`, of the agent itself.
    pub async fn agent(&self) -> String {
        let desired = &self.inner.deps.desired;
        let held = metrics::Held {
            objects: desired.digest().count,
            complete: desired.complete(),
        };
        metrics::agent(&*self.snapshot().await, &held)
    }

    async fn snapshot(&self) -> Arc<Snapshot> {
        let mut state = self.inner.state.lock().await;
        if let Some((at, snapshot)) = &state.last
            && at.elapsed() < SHARED_FOR
        {
            return snapshot.clone();
        }
        let mut snapshot = gather(&self.inner.deps).await;
        state.rates.add(&mut snapshot);
        let snapshot = Arc::new(snapshot);
        state.last = Some((Instant::now(), snapshot.clone()));
        snapshot
    }
}

/// What the desired set says of a Pod, as far as figures need it.
#[derive(Debug, Clone)]
struct Spec {
    qos: Qos,
    host_network: bool,
    /// Bytes, by container.
    memory_limits: BTreeMap<String, u64>,
}

impl Spec {
    fn of(pod: &Pod) -> Self {
        let spec = pod.spec.as_ref();
        let containers = spec.into_iter().flat_map(|spec| {
            let inits = spec.init_containers.iter().flatten();
            spec.containers.iter().chain(inits)
        });
        let limit = |c: &k8s_openapi::api::core::v1::Container| {
            let limits = c.resources.as_ref()?.limits.as_ref()?;
            u64::try_from(quantity::units(limits.get("memory")?)?).ok()
        };
        Self {
            qos: cgroups::qos(pod),
            host_network: spec.and_then(|spec| spec.host_network).unwrap_or(false),
            memory_limits: containers
                .filter_map(|c| Some((c.name.clone(), limit(c)?)))
                .collect(),
        }
    }
}

fn specs(desired: &Desired) -> BTreeMap<String, Spec> {
    let pods = desired.pods().into_iter();
    let parsed = pods.filter_map(|pod| {
        let parsed: Pod = serde_json::from_slice(&pod.json).ok()?;
        Some((pod.key.uid.to_string(), Spec::of(&parsed)))
    });
    parsed.collect()
}

async fn gather(deps: &Deps) -> Snapshot {
    let cri = &deps.cri;
    let (sandboxes, containers, stats, images) = tokio::join!(
        cri.list_sandboxes(None),
        cri.list_containers(None),
        cri.list_container_stats(),
        cri.image_fs_info(),
    );
    let (answers, failed) = match (sandboxes, containers, stats) {
        (Ok(sandboxes), Ok(containers), Ok(stats)) => ((sandboxes, containers, stats), false),
        (Err(error), ..) | (_, Err(error), _) | (.., Err(error)) => {
            // Those who ask are told, and the Pod manager has warned of the runtime.
            tracing::debug!(%error, "Pods cannot be measured: the runtime does not say");
            (Default::default(), true)
        }
    };
    let specs = specs(&deps.desired);
    let mut pods = pods_of(&deps.node, answers, &specs);
    let cgroups = deps.cgroups.get().cloned();
    let (logs, data_dir) = (deps.paths.pod_logs.clone(), deps.data_dir.clone());
    let at = Timestamp::now();
    let node_name = deps.node.clone();
    // Files of the kernel, and directories on a disk that may be slow.
    let measured = tokio::task::spawn_blocking(move || {
        let cgroups = cgroups.as_deref();
        for pod in &mut pods {
            pod::measure(pod, specs.get(&pod.uid), cgroups, &logs, at);
        }
        Snapshot {
            at,
            node_name,
            node: node::observe(at),
            all_pods: pod::figures(
                &cgroups.map(Cgroups::all_pods_usage).unwrap_or_default(),
                at,
            ),
            agent: node::own_process(at),
            disk: node::disk(&data_dir),
            images: images.ok().and_then(|list| image_disk(&list)),
            pods,
            failed,
        }
    });
    match measured.await {
        Ok(snapshot) => snapshot,
        Err(ended) => std::panic::resume_unwind(ended.into_panic()),
    }
}

fn image_disk(list: &[api::FilesystemUsage]) -> Option<(Disk, Used)> {
    let first = list.first()?;
    let mount = PathBuf::from(&first.fs_id.as_ref()?.mountpoint);
    Some((node::disk(&mount)?, used(first)))
}

fn used(usage: &api::FilesystemUsage) -> Used {
    Used {
        bytes: usage.used_bytes.map_or(0, |v| v.value),
        inodes: usage.inodes_used.map(|v| v.value),
    }
}

fn time(nanos: i64) -> Timestamp {
    Timestamp::from_nanosecond(nanos.into()).unwrap_or(Timestamp::UNIX_EPOCH)
}

type Answers = (
    Vec<api::PodSandbox>,
    Vec<api::Container>,
    Vec<api::ContainerStats>,
);

/// The Pods of this node that are up, with what the runtime says of their containers.
fn pods_of(
    node: &str,
    (sandboxes, containers, stats): Answers,
    specs: &BTreeMap<String, Spec>,
) -> Vec<PodStats> {
    let ready = i32::from(api::PodSandboxState::SandboxReady);
    let ours = |s: &api::PodSandbox| {
        s.state == ready && s.labels.get(convert::NODE).is_some_and(|n| n == node)
    };
    let mut pods: BTreeMap<String, PodStats> = sandboxes
        .into_iter()
        .filter(ours)
        .map(|sandbox| (sandbox.id.clone(), pod_of(sandbox)))
        .collect();
    let mut stats: BTreeMap<String, api::ContainerStats> = stats
        .into_iter()
        .filter_map(|s| Some((s.attributes.as_ref()?.id.clone(), s)))
        .collect();
    for item in containers {
        let seen = convert::container_seen(&item);
        let Some(pod) = pods.get_mut(&seen.sandbox) else {
            continue;
        };
        if seen.run != Run::Running {
            continue;
        }
        let stats = stats.remove(&seen.id).unwrap_or_default();
        let limits = specs.get(&pod.uid).map(|spec| &spec.memory_limits);
        pod.containers.push(ContainerStats {
            memory_limit: limits.and_then(|limits| limits.get(&seen.name).copied()),
            cpu: stats.cpu.as_ref().and_then(cpu),
            memory: stats.memory.as_ref().and_then(memory),
            writable: stats.writable_layer.as_ref().map(used),
            logs: Used::default(),
            started: time(seen.created_at),
            id: seen.id,
            name: seen.name,
            image: seen.image,
        });
    }
    let mut pods: Vec<_> = pods.into_values().collect();
    pods.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    for pod in &mut pods {
        pod.containers.sort_by(|a, b| a.name.cmp(&b.name));
    }
    pods
}

fn pod_of(sandbox: api::PodSandbox) -> PodStats {
    let metadata = sandbox.metadata.unwrap_or_default();
    PodStats {
        namespace: metadata.namespace,
        name: metadata.name,
        uid: metadata.uid,
        started: time(sandbox.created_at),
        cgroup: String::new(),
        cpu: None,
        memory: None,
        network: Vec::new(),
        processes: None,
        containers: Vec::new(),
    }
}

fn cpu(usage: &api::CpuUsage) -> Option<Cpu> {
    Some(Cpu {
        at: time(usage.timestamp),
        nanos: usage.usage_core_nano_seconds?.value,
        // Older runtimes do not compute it.
        nano_cores: usage.usage_nano_cores.map(|v| v.value),
    })
}

fn memory(usage: &api::MemoryUsage) -> Option<Memory> {
    // Older runtimes send zeros for what they do not know.
    let known = |v: Option<api::UInt64Value>| v.map(|v| v.value).filter(|v| *v > 0);
    Some(Memory {
        at: time(usage.timestamp),
        working_set: usage.working_set_bytes?.value,
        available: known(usage.available_bytes),
        usage: known(usage.usage_bytes),
        rss: known(usage.rss_bytes),
        page_faults: known(usage.page_faults),
        major_page_faults: known(usage.major_page_faults),
    })
}

#[cfg(test)]
mod tests;

#[cfg(test)]
pub(crate) mod testing;
