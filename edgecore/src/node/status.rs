//! The Node's status (pure): what `kubectl get node` and the scheduler see of this device.
//!
//! Takes facts, the runtime's state and what was said before; gives `NodeStatus` as JSON. Only
//! fields that the node owns are in it: `daemonEndpoints` and the address that leads to CloudCore
//! are the cloud's.
//!
//! Heartbeats: the Lease is the cloud's to renew, so nothing crosses the link to say "still here".
//! `lastHeartbeatTime` is the time at which a status was last made that differed in something else;
//! [`same`] ignores it, and who reports sends nothing while statuses are the same.

use serde_json::{Map, Value, json};

use super::facts::Facts;
use crate::stream::translate;

/// The version that the API server and `kubectl` show for this agent.
///
/// Skew checks of tools read it as a semantic version: the first part is the oldest API that this
/// agent is made for, so that it is never newer than a supported server. Ours stands behind a `+`,
/// as build metadata that is ignored when versions are ordered; behind a `-` it would make a
/// pre-release, which sorts below 1.33.0 and fails "at least 1.33" checks.
pub const KUBELET_VERSION: &str = concat!("v1.33.0+edgecore.", env!("CARGO_PKG_VERSION"));

/// What the operator decides about this node.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    pub node_name: String,
    pub max_pods: u32,
    /// Kept from Pods for the device itself.
    pub reserved_cpu_millis: u64,
    pub reserved_memory_bytes: u64,
}

impl NodeConfig {
    /// The kubelet's own defaults.
    pub fn new(node_name: &str) -> Self {
        Self {
            node_name: node_name.to_owned(),
            max_pods: 110,
            reserved_cpu_millis: 0,
            reserved_memory_bytes: 0,
        }
    }
}

/// What the container runtime says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RuntimeState {
    /// Such as `containerd` and `1.6.20`; empty until the runtime answered once.
    pub name: String,
    pub version: String,
    /// CRI's RuntimeReady, answered lately.
    pub ready: bool,
    /// CRI's NetworkReady.
    pub network_ready: bool,
    /// Sentences for the Ready condition: why the runtime or its network is not ready.
    pub problems: Vec<String>,
    pub images: Vec<Image>,
}

/// An image that the runtime has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Image {
    /// References with a digest first, then those with a tag.
    pub names: Vec<String>,
    pub size_bytes: u64,
}

/// Below these the node is under pressure: the kubelet's hard eviction thresholds.
const MEMORY_LEAST: u64 = 100 << 20;
const DISK_LEAST_PERCENT: u64 = 10;
const INODES_LEAST_PERCENT: u64 = 5;
/// Process numbers that must stay free, of a hundred.
const PIDS_LEAST_PERCENT: u64 = 5;
/// What a list of images may hold, and each entry's names.
const MAX_IMAGES: usize = 50;
const MAX_IMAGE_NAMES: usize = 5;

/// What Pods may have in all: capacity without what is reserved and what must stay free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocatable {
    pub cpu_millis: u64,
    pub memory_bytes: u64,
    pub ephemeral_bytes: u64,
}

/// What the scheduler may give to Pods here; the same numbers belong into the `Environment`.
pub fn allocatable(facts: &Facts, config: &NodeConfig) -> Allocatable {
    let huge: u64 = facts.hugepages.iter().map(|h| h.total_bytes).sum();
    let kept = config.reserved_memory_bytes + MEMORY_LEAST + huge;
    Allocatable {
        cpu_millis: (u64::from(facts.cpus) * 1000).saturating_sub(config.reserved_cpu_millis),
        memory_bytes: facts.memory_bytes.saturating_sub(kept),
        ephemeral_bytes: facts.disk_bytes - facts.disk_bytes / 100 * DISK_LEAST_PERCENT,
    }
}

/// The status; `now` is RFC 3339 in whole seconds, `previous` what was last made, also before a
/// restart, so that `lastTransitionTime` stays true.
pub fn node_status(
    facts: &Facts,
    runtime: &RuntimeState,
    config: &NodeConfig,
    previous: Option<&Value>,
    now: &str,
) -> Value {
    let mut status = json!({
        "addresses": addresses(facts, config),
        "capacity": capacity(facts, config),
        "allocatable": allocatable_json(facts, config),
        "conditions": conditions(facts, runtime, previous, now),
        "nodeInfo": node_info(facts, runtime),
        // The API server (1.36 and newer) then hands the client's WebSocket on.
        "declaredFeatures": [translate::FEATURE],
    });
    let images = images(&runtime.images);
    if !images.is_empty() {
        status["images"] = Value::Array(images);
    }
    status
}

/// The status as the body of a strategic merge patch. Addresses are merged by type, which would
/// keep an old one beside the new: the list is replaced.
pub fn as_patch(status: &Value) -> Value {
    let mut status = status.clone();
    if let Some(list) = status.get_mut("addresses").and_then(Value::as_array_mut) {
        list.push(json!({"$patch": "replace"}));
    }
    json!({"status": status})
}

/// Whether two statuses say the same but for heartbeats.
pub fn same(a: &Value, b: &Value) -> bool {
    still(a) == still(b)
}

fn still(status: &Value) -> Value {
    let mut status = status.clone();
    let conditions = status.get_mut("conditions").and_then(Value::as_array_mut);
    for condition in conditions
        .into_iter()
        .flatten()
        .filter_map(Value::as_object_mut)
    {
        condition.remove("lastHeartbeatTime");
    }
    status
}

fn addresses(facts: &Facts, config: &NodeConfig) -> Value {
    let internal = facts
        .node_ip
        .iter()
        .map(|ip| json!({"type": "InternalIP", "address": ip}));
    let name = json!({"type": "Hostname", "address": config.node_name});
    internal.chain([name]).collect()
}

fn capacity(facts: &Facts, config: &NodeConfig) -> Value {
    let mut list = json!({
        "cpu": facts.cpus.to_string(),
        "memory": format!("{}Ki", facts.memory_bytes / 1024),
        "ephemeral-storage": format!("{}Ki", facts.disk_bytes / 1024),
        "pods": config.max_pods.to_string(),
    });
    for pages in &facts.hugepages {
        list[pages.resource()] = json!(pages.total_bytes.to_string());
    }
    list
}

fn allocatable_json(facts: &Facts, config: &NodeConfig) -> Value {
    let free = allocatable(facts, config);
    let cpu = match free.cpu_millis {
        whole if whole % 1000 == 0 => (whole / 1000).to_string(),
        millis => format!("{millis}m"),
    };
    let mut list = json!({
        "cpu": cpu,
        "memory": format!("{}Ki", free.memory_bytes / 1024),
        "ephemeral-storage": free.ephemeral_bytes.to_string(),
        "pods": config.max_pods.to_string(),
    });
    for pages in &facts.hugepages {
        list[pages.resource()] = json!(pages.total_bytes.to_string());
    }
    list
}

fn node_info(facts: &Facts, runtime: &RuntimeState) -> Value {
    let runtime_version = match runtime.name.as_str() {
        "" => String::new(),
        name => format!("{name}://{}", runtime.version.trim_start_matches('v')),
    };
    let mut info = json!({
        "machineID": facts.machine_id,
        "systemUUID": facts.system_uuid,
        "bootID": facts.boot_id,
        "kernelVersion": facts.kernel_version,
        "osImage": facts.os_image,
        "containerRuntimeVersion": runtime_version,
        "kubeletVersion": KUBELET_VERSION,
        "kubeProxyVersion": "",
        "operatingSystem": "linux",
        "architecture": facts.architecture,
    });
    if facts.swap_bytes > 0 {
        info["swap"] = json!({"capacity": facts.swap_bytes});
    }
    info
}

/// The largest first, and only so many: a hint for the scheduler, not an inventory.
fn images(all: &[Image]) -> Vec<Value> {
    let mut all: Vec<_> = all.iter().filter(|i| !i.names.is_empty()).collect();
    all.sort_by(|a, b| {
        b.size_bytes
            .cmp(&a.size_bytes)
            .then_with(|| a.names.cmp(&b.names))
    });
    let one = |i: &&Image| {
        let names = i.names.get(..MAX_IMAGE_NAMES).unwrap_or(&i.names);
        json!({"names": names, "sizeBytes": i.size_bytes})
    };
    all.iter().take(MAX_IMAGES).map(one).collect()
}

/// One condition before its times are known.
struct Judgement {
    kind: &'static str,
    holds: bool,
    reason: &'static str,
    message: String,
}

/// Ready stands last, as old controllers expect.
fn conditions(
    facts: &Facts,
    runtime: &RuntimeState,
    previous: Option<&Value>,
    now: &str,
) -> Vec<Value> {
    let before = |kind: &str| {
        let list = previous
            .and_then(|p| p.get("conditions"))
            .and_then(Value::as_array);
        list.into_iter().flatten().find(|c| c["type"] == kind)
    };
    let pressed = |kind: &str| before(kind).is_some_and(|c| c["status"] == "True");
    let judged = [
        memory(facts, pressed("MemoryPressure")),
        disk(facts, pressed("DiskPressure")),
        pids(facts, pressed("PIDPressure")),
        ready(runtime, facts),
    ];
    let condition = |j: Judgement| {
        let status = if j.holds { "True" } else { "False" };
        let since = before(j.kind).filter(|c| c["status"] == status);
        let since = since
            .and_then(|c| c["lastTransitionTime"].as_str())
            .unwrap_or(now);
        let mut condition = Map::new();
        for (field, text) in [
            ("type", j.kind),
            ("status", status),
            ("lastHeartbeatTime", now),
            ("lastTransitionTime", since),
            ("reason", j.reason),
            ("message", &j.message),
        ] {
            condition.insert(field.into(), text.into());
        }
        Value::Object(condition)
    };
    judged.into_iter().map(condition).collect()
}

/// Under the least, or, once under it, not clearly above yet: a quarter more. A node that hovers
/// at the mark would otherwise report itself again and again.
fn scarce(free: u64, least: u64, already: bool) -> bool {
    free < least || (already && free < least + least / 4)
}

fn memory(facts: &Facts, already: bool) -> Judgement {
    let holds = scarce(facts.memory_available_bytes, MEMORY_LEAST, already);
    Judgement {
        kind: "MemoryPressure",
        holds,
        reason: if holds {
            "KubeletHasInsufficientMemory"
        } else {
            "KubeletHasSufficientMemory"
        },
        message: if holds {
            "kubelet has insufficient memory available".into()
        } else {
            "kubelet has sufficient memory available".into()
        },
    }
}

fn disk(facts: &Facts, already: bool) -> Judgement {
    let bytes = scarce(
        facts.disk_available_bytes,
        facts.disk_bytes / 100 * DISK_LEAST_PERCENT,
        already,
    );
    // File systems that make inodes as they go say 0 of 0.
    let inodes = facts.disk_inodes > 0
        && scarce(
            facts.disk_inodes_available,
            facts.disk_inodes / 100 * INODES_LEAST_PERCENT,
            already,
        );
    let holds = bytes || inodes;
    Judgement {
        kind: "DiskPressure",
        holds,
        reason: if holds {
            "KubeletHasDiskPressure"
        } else {
            "KubeletHasNoDiskPressure"
        },
        message: if holds {
            "kubelet has disk pressure".into()
        } else {
            "kubelet has no disk pressure".into()
        },
    }
}

fn pids(facts: &Facts, already: bool) -> Judgement {
    let free = facts.pids_max.saturating_sub(facts.pids);
    let holds = scarce(free, facts.pids_max / 100 * PIDS_LEAST_PERCENT, already);
    Judgement {
        kind: "PIDPressure",
        holds,
        reason: if holds {
            "KubeletHasInsufficientPID"
        } else {
            "KubeletHasSufficientPID"
        },
        message: if holds {
            "kubelet has insufficient PID available".into()
        } else {
            "kubelet has sufficient PID available".into()
        },
    }
}

fn ready(runtime: &RuntimeState, facts: &Facts) -> Judgement {
    let mut why = Vec::new();
    if !runtime.ready {
        why.push("container runtime is down".to_owned());
    } else if !runtime.network_ready {
        why.push("container runtime network not ready".to_owned());
    }
    if facts.memory_bytes == 0 || facts.cpus == 0 {
        why.push("the device's capacity is not known".to_owned());
    }
    why.extend(runtime.problems.iter().cloned());
    let holds = runtime.ready && runtime.network_ready && why.is_empty();
    Judgement {
        kind: "Ready",
        holds,
        reason: if holds {
            "KubeletReady"
        } else {
            "KubeletNotReady"
        },
        message: if holds {
            "kubelet is posting ready status".into()
        } else {
            why.join("; ")
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::facts::HugePages;

    fn facts() -> Facts {
        Facts {
            node_ip: Some("192.0.2.7".parse().unwrap()),
            cpus: 4,
            memory_bytes: 4 << 30,
            memory_available_bytes: 2 << 30,
            swap_bytes: 0,
            hugepages: vec![HugePages {
                page_kib: 2048,
                total_bytes: 8 << 20,
            }],
            disk_bytes: 100 << 30,
            disk_available_bytes: 50 << 30,
            disk_inodes: 1000,
            disk_inodes_available: 900,
            pids: 100,
            pids_max: 32768,
            machine_id: "m".into(),
            system_uuid: "s".into(),
            boot_id: "b".into(),
            kernel_version: "6.1.0".into(),
            os_image: "Debian GNU/Linux 12 (bookworm)".into(),
            architecture: "arm64".into(),
        }
    }

    fn runtime() -> RuntimeState {
        RuntimeState {
            name: "containerd".into(),
            version: "v1.6.20".into(),
            ready: true,
            network_ready: true,
            ..RuntimeState::default()
        }
    }

    fn status(facts: &Facts, runtime: &RuntimeState, previous: Option<&Value>, now: &str) -> Value {
        let config = NodeConfig {
            reserved_cpu_millis: 100,
            ..NodeConfig::new("edge-1")
        };
        node_status(facts, runtime, &config, previous, now)
    }

    fn condition<'a>(status: &'a Value, kind: &str) -> &'a Value {
        let list = status["conditions"].as_array().unwrap();
        list.iter().find(|c| c["type"] == kind).unwrap()
    }

    const T1: &str = "2026-11-23T10:00:00Z";
    const T2: &str = "2026-11-23T11:00:00Z";

    #[test]
    fn a_healthy_node() {
        let status = status(&facts(), &runtime(), None, T1);
        assert_eq!(
            status["addresses"],
            json!([{"type": "InternalIP", "address": "192.0.2.7"},
                {"type": "Hostname", "address": "edge-1"}])
        );
        assert_eq!(
            status["capacity"],
            json!({"cpu": "4", "memory": "4194304Ki", "ephemeral-storage": "104857600Ki",
                "pods": "110", "hugepages-2Mi": "8388608"})
        );
        let memory = (4_u64 << 20) - (108 << 10);
        assert_eq!(
            status["allocatable"],
            json!({"cpu": "3900m", "memory": format!("{memory}Ki"),
                "ephemeral-storage": "96636764160", "pods": "110", "hugepages-2Mi": "8388608"})
        );
        let kinds: Vec<_> = status["conditions"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| &c["type"])
            .collect();
        assert_eq!(
            kinds,
            ["MemoryPressure", "DiskPressure", "PIDPressure", "Ready"]
        );
        assert_eq!(condition(&status, "Ready")["reason"], "KubeletReady");
        assert_eq!(
            condition(&status, "DiskPressure")["reason"],
            "KubeletHasNoDiskPressure"
        );
        assert_eq!(
            status["nodeInfo"]["containerRuntimeVersion"],
            "containerd://1.6.20"
        );
        assert_eq!(status["nodeInfo"]["kubeProxyVersion"], "");
        let version = status["nodeInfo"]["kubeletVersion"].as_str().unwrap();
        assert!(version.starts_with("v1.33.0+edgecore."), "{version}");
        assert!(
            status.get("daemonEndpoints").is_none(),
            "the kubelet port is the cloud's"
        );
        assert_eq!(
            as_patch(&status)["status"]["addresses"][2],
            json!({"$patch": "replace"})
        );
    }

    #[test]
    fn each_pressure_has_its_reason() {
        for (kind, reason, change) in [
            (
                "MemoryPressure",
                "KubeletHasInsufficientMemory",
                (|f| f.memory_available_bytes = 50 << 20) as fn(&mut Facts),
            ),
            ("DiskPressure", "KubeletHasDiskPressure", |f| {
                f.disk_available_bytes = 9 << 30
            }),
            ("DiskPressure", "KubeletHasDiskPressure", |f| {
                f.disk_inodes_available = 40
            }),
            ("PIDPressure", "KubeletHasInsufficientPID", |f| {
                f.pids = 32_000
            }),
        ] {
            let mut facts = facts();
            change(&mut facts);
            let status = status(&facts, &runtime(), None, T1);
            let found = condition(&status, kind);
            assert_eq!(
                (&found["status"], &found["reason"]),
                (&json!("True"), &json!(reason))
            );
            assert_eq!(condition(&status, "Ready")["status"], "True");
        }
    }

    #[test]
    fn a_node_at_the_mark_does_not_flap() {
        let mut facts = facts();
        facts.memory_available_bytes = 99 << 20;
        let under = status(&facts, &runtime(), None, T1);
        facts.memory_available_bytes = 110 << 20;
        let hovering = status(&facts, &runtime(), Some(&under), T2);
        assert_eq!(condition(&hovering, "MemoryPressure")["status"], "True");
        assert!(same(&under, &hovering));
        let fresh = status(&facts, &runtime(), None, T2);
        assert_eq!(condition(&fresh, "MemoryPressure")["status"], "False");
        facts.memory_available_bytes = 130 << 20;
        let over = status(&facts, &runtime(), Some(&hovering), T2);
        assert_eq!(condition(&over, "MemoryPressure")["status"], "False");
    }

    #[test]
    fn what_is_not_ready_is_told() {
        let mut down = runtime();
        down.ready = false;
        down.network_ready = false;
        down.problems = vec!["the socket /run/x.sock is missing".into()];
        let status = status(&facts(), &down, None, T1);
        let ready = condition(&status, "Ready");
        assert_eq!(
            (&ready["status"], &ready["reason"]),
            (&json!("False"), &json!("KubeletNotReady"))
        );
        assert_eq!(
            ready["message"],
            "container runtime is down; the socket /run/x.sock is missing"
        );
    }

    #[test]
    fn only_heartbeats_move_while_nothing_changes() {
        let first = status(&facts(), &runtime(), None, T1);
        let second = status(&facts(), &runtime(), Some(&first), T2);
        assert_ne!(first, second);
        assert!(same(&first, &second));
        assert_eq!(condition(&second, "Ready")["lastHeartbeatTime"], T2);
        assert_eq!(condition(&second, "Ready")["lastTransitionTime"], T1);
        let mut down = runtime();
        down.network_ready = false;
        let third = status(&facts(), &down, Some(&second), T2);
        assert!(!same(&second, &third));
        assert_eq!(condition(&third, "Ready")["lastTransitionTime"], T2);
        assert_eq!(
            condition(&third, "MemoryPressure")["lastTransitionTime"],
            T1
        );
    }

    #[test]
    fn images_are_the_largest_and_few() {
        let mut runtime = runtime();
        runtime.images = (0..80)
            .map(|n| Image {
                names: (0..9).map(|i| format!("img{n}:{i}")).collect(),
                size_bytes: n,
            })
            .collect();
        let status = status(&facts(), &runtime, None, T1);
        let images = status["images"].as_array().unwrap();
        assert_eq!(images.len(), 50);
        assert_eq!(images[0]["sizeBytes"], 79);
        assert_eq!(images[0]["names"].as_array().unwrap().len(), 5);
    }
}
