//! The figures as `/stats/summary` gives them (pure): `stats/v1alpha1` of the kubelet.

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::{ContainerStats, Cpu, Disk, Interface, Memory, PodStats, Snapshot, Used};

pub(super) fn render(s: &Snapshot, only_cpu_and_memory: bool) -> Value {
    let mut node = Object::new();
    node.put("nodeName", &*s.node_name);
    node.put("systemContainers", systems(s));
    node.put("startTime", time(s.node.booted));
    node.add("cpu", s.node.cpu.map(cpu));
    node.add("memory", s.node.memory.map(memory));
    if !only_cpu_and_memory {
        node.add(
            "network",
            network(&s.node.interfaces, &s.node.default_interface, s.at),
        );
        node.add("fs", s.disk.map(|d| disk(d, in_use(d), s.at)));
        let images = s
            .images
            .map(|(d, used)| json!({"imageFs": disk(d, used, s.at)}));
        node.add("runtime", images);
        let (most, now) = (s.node.most_processes, s.node.processes);
        node.put(
            "rlimit",
            json!({"time": time(s.at), "maxpid": most, "curproc": now}),
        );
    }
    let pods: Vec<_> = s
        .pods
        .iter()
        .map(|p| pod(p, s, only_cpu_and_memory))
        .collect();
    json!({ "node": node.0, "pods": pods })
}

#[derive(Default)]
struct Object(Map<String, Value>);

impl Object {
    fn new() -> Self {
        Self::default()
    }

    fn put(&mut self, key: &str, value: impl Into<Value>) {
        self.0.insert(key.to_owned(), value.into());
    }

    fn add(&mut self, key: &str, value: Option<impl Into<Value>>) {
        if let Some(value) = value {
            self.put(key, value);
        }
    }
}

impl From<Object> for Value {
    fn from(object: Object) -> Self {
        Value::Object(object.0)
    }
}

/// What runs beside the Pods, by the names that clients know.
fn systems(s: &Snapshot) -> Vec<Value> {
    let system = |name: &str, start: Timestamp, (c, m): (Option<Cpu>, Option<Memory>)| {
        let mut out = Object::new();
        out.put("name", name);
        out.put("startTime", time(start));
        out.add("cpu", c.map(cpu));
        out.add("memory", m.map(memory));
        Value::from(out)
    };
    vec![
        system("kubelet", s.agent.started, (s.agent.cpu, s.agent.memory)),
        system("pods", s.node.booted, s.all_pods),
    ]
}

fn pod(pod: &PodStats, s: &Snapshot, only_cpu_and_memory: bool) -> Value {
    let mut out = Object::new();
    out.put(
        "podRef",
        json!({"name": pod.name, "namespace": pod.namespace, "uid": pod.uid}),
    );
    out.put("startTime", time(pod.started));
    let containers = pod.containers.iter();
    let containers: Vec<_> = containers
        .map(|c| container(c, s, only_cpu_and_memory))
        .collect();
    out.put("containers", containers);
    out.add("cpu", pod.cpu.map(cpu));
    out.add("memory", pod.memory.map(memory));
    if only_cpu_and_memory {
        return out.into();
    }
    let default = pod
        .network
        .iter()
        .find(|i| i.name == "eth0")
        .or(pod.network.first());
    let default = default.map(|i| i.name.clone()).unwrap_or_default();
    out.add("network", network(&pod.network, &default, s.at));
    out.add(
        "ephemeral-storage",
        s.disk.map(|d| disk(d, ephemeral(pod), s.at)),
    );
    let processes = pod.processes.map(|n| json!({"process_count": n}));
    out.add("process_stats", processes);
    out.into()
}

/// What the Pod's containers wrote to their own file systems and logs. Volumes are not in it: to
/// measure them is to walk them.
fn ephemeral(pod: &PodStats) -> Used {
    let parts = pod
        .containers
        .iter()
        .flat_map(|c| [c.writable, Some(c.logs)]);
    parts.flatten().fold(Used::default(), |sum, part| Used {
        bytes: sum.bytes.saturating_add(part.bytes),
        inodes: part
            .inodes
            .map_or(sum.inodes, |n| Some(sum.inodes.unwrap_or(0) + n)),
    })
}

fn container(c: &ContainerStats, s: &Snapshot, only_cpu_and_memory: bool) -> Value {
    let mut out = Object::new();
    out.put("name", &*c.name);
    out.put("startTime", time(c.started));
    out.add("cpu", c.cpu.map(cpu));
    out.add("memory", c.memory.map(memory));
    if !only_cpu_and_memory {
        let rootfs = s.images.zip(c.writable);
        out.add("rootfs", rootfs.map(|((d, _), used)| disk(d, used, s.at)));
        out.add("logs", s.disk.map(|d| disk(d, c.logs, s.at)));
    }
    out.into()
}

fn cpu(cpu: Cpu) -> Value {
    let mut out = Object::new();
    out.put("time", time(cpu.at));
    out.add("usageNanoCores", cpu.nano_cores);
    out.put("usageCoreNanoSeconds", cpu.nanos);
    out.into()
}

fn memory(memory: Memory) -> Value {
    let mut out = Object::new();
    out.put("time", time(memory.at));
    out.add("availableBytes", memory.available);
    out.add("usageBytes", memory.usage);
    out.put("workingSetBytes", memory.working_set);
    out.add("rssBytes", memory.rss);
    out.add("pageFaults", memory.page_faults);
    out.add("majorPageFaults", memory.major_page_faults);
    out.into()
}

fn network(interfaces: &[Interface], default: &str, at: Timestamp) -> Option<Value> {
    if interfaces.is_empty() {
        return None;
    }
    let one = |i: &Interface| {
        json!({
            "name": i.name,
            "rxBytes": i.rx_bytes, "rxErrors": i.rx_errors,
            "txBytes": i.tx_bytes, "txErrors": i.tx_errors,
        })
    };
    let mut out = Object::new();
    out.put("time", time(at));
    if let Some(default) = interfaces.iter().find(|i| i.name == default) {
        let Value::Object(default) = one(default) else {
            return None;
        };
        out.0.extend(default);
    }
    let all: Vec<_> = interfaces.iter().map(one).collect();
    out.put("interfaces", all);
    Some(out.into())
}

fn in_use(disk: Disk) -> Used {
    Used {
        bytes: disk.capacity.saturating_sub(disk.available),
        inodes: Some(disk.inodes.saturating_sub(disk.inodes_free)),
    }
}

fn disk(disk: Disk, used: Used, at: Timestamp) -> Value {
    let mut out = Object::new();
    out.put("time", time(at));
    out.put("availableBytes", disk.available);
    out.put("capacityBytes", disk.capacity);
    out.put("usedBytes", used.bytes);
    out.put("inodesFree", disk.inodes_free);
    out.put("inodes", disk.inodes);
    out.add("inodesUsed", used.inodes);
    out.into()
}

/// As `metav1.Time` is written: whole seconds.
fn time(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}
