//! The figures in Prometheus' text format (pure), under the names that a kubelet gives them.
//!
//! A family has its samples together and its labels sorted, as Go's writer has them. Samples that
//! were measured carry the time of that, in milliseconds.

use std::fmt::{Display, Write as _};

use jiff::Timestamp;

use super::stats::{ContainerStats, Interface, PodStats, Snapshot};

/// `/metrics/probes` while no probe was made: a document with no family.
pub const PROBES: &str = "";

/// What the agent's store holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    pub objects: u64,
    /// The cloud has said at least once that it has named everything.
    pub complete: bool,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Counter,
    Gauge,
}

#[derive(Default)]
struct Document {
    text: String,
    family: &'static str,
}

impl Document {
    fn family(&mut self, kind: Kind, name: &'static str, help: &str) {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
        };
        self.family = name;
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, labels: &[(&str, &str)], value: impl Display, at: Option<Timestamp>) {
        self.text.push_str(self.family);
        for (n, (name, value)) in labels.iter().enumerate() {
            let begin = if n == 0 { '{' } else { ',' };
            let _ = write!(self.text, "{begin}{name}=\"{}\"", escaped(value));
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        let _ = write!(self.text, " {value}");
        if let Some(at) = at {
            let _ = write!(self.text, " {}", at.as_millisecond());
        }
        self.text.push('\n');
    }
}

fn escaped(value: &str) -> String {
    let escaped = value.replace('\\', "\\\\").replace('"', "\\\"");
    escaped.replace('\n', "\\n")
}

fn seconds(nanos: u64) -> f64 {
    nanos as f64 / 1e9
}

fn since_epoch(at: Timestamp) -> f64 {
    at.as_millisecond() as f64 / 1e3
}

type Each<'a> = (&'a PodStats, &'a ContainerStats);

fn containers(s: &Snapshot) -> impl Iterator<Item = Each<'_>> {
    let pods = s.pods.iter();
    pods.flat_map(|pod| pod.containers.iter().map(move |c| (pod, c)))
}

/// `/metrics/resource`, which metrics-server 0.6 and newer reads.
pub fn resource(s: &Snapshot) -> String {
    let mut doc = Document::default();
    resource_of_containers(&mut doc, s);
    doc.family(
        Kind::Counter,
        "node_cpu_usage_seconds_total",
        "[STABLE] Cumulative cpu time consumed by the node in core-seconds",
    );
    if let Some(cpu) = s.node.cpu {
        doc.sample(&[], seconds(cpu.nanos), Some(cpu.at));
    }
    doc.family(
        Kind::Gauge,
        "node_memory_working_set_bytes",
        "[STABLE] Current working set of the node in bytes",
    );
    if let Some(memory) = s.node.memory {
        doc.sample(&[], memory.working_set, Some(memory.at));
    }
    resource_of_pods(&mut doc, s);
    // The newer name, and the one that older readers know.
    for name in ["resource_scrape_error", "scrape_error"] {
        doc.family(
            Kind::Gauge,
            name,
            "1 if there was an error while getting container metrics, 0 otherwise",
        );
        doc.sample(&[], u8::from(s.failed), None);
    }
    doc.text
}

fn resource_of_containers(doc: &mut Document, s: &Snapshot) {
    doc.family(
        Kind::Counter,
        "container_cpu_usage_seconds_total",
        "[STABLE] Cumulative cpu time consumed by the container in core-seconds",
    );
    for (pod, c) in containers(s) {
        if let Some(cpu) = c.cpu {
            doc.sample(&named(pod, c), seconds(cpu.nanos), Some(cpu.at));
        }
    }
    doc.family(
        Kind::Gauge,
        "container_memory_working_set_bytes",
        "[STABLE] Current working set of the container in bytes",
    );
    for (pod, c) in containers(s) {
        if let Some(memory) = c.memory {
            doc.sample(&named(pod, c), memory.working_set, Some(memory.at));
        }
    }
    doc.family(
        Kind::Gauge,
        "container_start_time_seconds",
        "[STABLE] Start time of the container since unix epoch in seconds",
    );
    for (pod, c) in containers(s) {
        doc.sample(&named(pod, c), since_epoch(c.started), Some(s.at));
    }
}

fn resource_of_pods(doc: &mut Document, s: &Snapshot) {
    doc.family(
        Kind::Counter,
        "pod_cpu_usage_seconds_total",
        "[STABLE] Cumulative cpu time consumed by the pod in core-seconds",
    );
    for pod in &s.pods {
        if let Some(cpu) = pod.cpu {
            doc.sample(&whose(pod), seconds(cpu.nanos), Some(cpu.at));
        }
    }
    doc.family(
        Kind::Gauge,
        "pod_memory_working_set_bytes",
        "[STABLE] Current working set of the pod in bytes",
    );
    for pod in &s.pods {
        if let Some(memory) = pod.memory {
            doc.sample(&whose(pod), memory.working_set, Some(memory.at));
        }
    }
}

fn named<'a>(pod: &'a PodStats, c: &'a ContainerStats) -> [(&'static str, &'a str); 3] {
    [
        ("container", &c.name),
        ("namespace", &pod.namespace),
        ("pod", &pod.name),
    ]
}

fn whose(pod: &PodStats) -> [(&'static str, &str); 2] {
    [("namespace", &pod.namespace), ("pod", &pod.name)]
}

/// Of whom cAdvisor's series speak: the node, a Pod, or a container.
#[derive(Clone, Copy)]
enum Of<'a> {
    Node,
    Pod(&'a PodStats),
    Container(Each<'a>),
}

impl<'a> Of<'a> {
    /// Everyone that has series, the node first.
    fn all(s: &'a Snapshot) -> impl Iterator<Item = Of<'a>> {
        let pods = s.pods.iter().flat_map(|pod| {
            let inside = pod.containers.iter().map(move |c| Of::Container((pod, c)));
            std::iter::once(Of::Pod(pod)).chain(inside)
        });
        std::iter::once(Of::Node).chain(pods)
    }

    fn sample(self, doc: &mut Document, value: impl Display, at: Timestamp) {
        let (container, id, image, name, namespace, pod) = match self {
            Of::Node => ("", "/".to_owned(), "", "", "", ""),
            Of::Pod(p) => ("", p.cgroup.clone(), "", "", &*p.namespace, &*p.name),
            Of::Container((p, c)) => {
                let id = format!("{}/{}", p.cgroup, c.id);
                (&*c.name, id, &*c.image, &*c.id, &*p.namespace, &*p.name)
            }
        };
        let labels = [
            ("container", container),
            ("id", &*id),
            ("image", image),
            ("name", name),
            ("namespace", namespace),
            ("pod", pod),
        ];
        doc.sample(&labels, value, Some(at));
    }
}

/// `/metrics/cadvisor`: what dashboards use most of cAdvisor's series.
pub fn cadvisor(s: &Snapshot) -> String {
    let mut doc = Document::default();
    doc.family(
        Kind::Counter,
        "container_cpu_usage_seconds_total",
        "Cumulative cpu time consumed in seconds.",
    );
    for of in Of::all(s) {
        let cpu = match of {
            Of::Node => s.node.cpu,
            Of::Pod(pod) => pod.cpu,
            Of::Container((_, c)) => c.cpu,
        };
        if let Some(cpu) = cpu {
            of.sample(&mut doc, seconds(cpu.nanos), cpu.at);
        }
    }
    cadvisor_memory(&mut doc, s);
    cadvisor_containers(&mut doc, s);
    cadvisor_network(&mut doc, s);
    doc.family(
        Kind::Gauge,
        "machine_cpu_cores",
        "Number of logical CPU cores.",
    );
    doc.sample(&[], s.node.cpus, None);
    doc.family(
        Kind::Gauge,
        "machine_memory_bytes",
        "Amount of memory installed on the machine.",
    );
    doc.sample(&[], s.node.memory_bytes, None);
    doc.text
}

fn cadvisor_memory(doc: &mut Document, s: &Snapshot) {
    type Figure = fn(&super::stats::Memory) -> Option<u64>;
    let families: [(&'static str, &str, Figure); 3] = [
        (
            "container_memory_working_set_bytes",
            "Current working set in bytes.",
            |m| Some(m.working_set),
        ),
        (
            "container_memory_usage_bytes",
            "Current memory usage in bytes, including all memory regardless of when it was accessed",
            |m| m.usage,
        ),
        ("container_memory_rss", "Size of RSS in bytes.", |m| m.rss),
    ];
    for (name, help, figure) in families {
        doc.family(Kind::Gauge, name, help);
        for of in Of::all(s) {
            let memory = match of {
                Of::Node => s.node.memory,
                Of::Pod(pod) => pod.memory,
                Of::Container((_, c)) => c.memory,
            };
            if let Some((memory, value)) = memory.and_then(|m| Some((m, figure(&m)?))) {
                of.sample(doc, value, memory.at);
            }
        }
    }
}

fn cadvisor_containers(doc: &mut Document, s: &Snapshot) {
    doc.family(
        Kind::Gauge,
        "container_fs_usage_bytes",
        "Number of bytes that are consumed by the container on this filesystem.",
    );
    for each in containers(s) {
        if let Some(used) = each.1.writable {
            Of::Container(each).sample(doc, used.bytes, s.at);
        }
    }
    doc.family(
        Kind::Gauge,
        "container_spec_memory_limit_bytes",
        "Memory limit for the container.",
    );
    for each in containers(s) {
        // cAdvisor's 0 is no limit.
        Of::Container(each).sample(doc, each.1.memory_limit.unwrap_or(0), s.at);
    }
    doc.family(
        Kind::Gauge,
        "container_start_time_seconds",
        "Start time of the container since unix epoch in seconds.",
    );
    for each in containers(s) {
        Of::Container(each).sample(doc, since_epoch(each.1.started), s.at);
    }
    doc.family(
        Kind::Gauge,
        "container_last_seen",
        "Last time a container was seen by the exporter",
    );
    for of in Of::all(s) {
        of.sample(doc, s.at.as_second(), s.at);
    }
}

fn cadvisor_network(doc: &mut Document, s: &Snapshot) {
    type Figure = fn(&Interface) -> u64;
    let families: [(&'static str, &str, Figure); 8] = [
        (
            "container_network_receive_bytes_total",
            "Cumulative count of bytes received",
            |i| i.rx_bytes,
        ),
        (
            "container_network_receive_errors_total",
            "Cumulative count of errors encountered while receiving",
            |i| i.rx_errors,
        ),
        (
            "container_network_receive_packets_dropped_total",
            "Cumulative count of packets dropped while receiving",
            |i| i.rx_dropped,
        ),
        (
            "container_network_receive_packets_total",
            "Cumulative count of packets received",
            |i| i.rx_packets,
        ),
        (
            "container_network_transmit_bytes_total",
            "Cumulative count of bytes transmitted",
            |i| i.tx_bytes,
        ),
        (
            "container_network_transmit_errors_total",
            "Cumulative count of errors encountered while transmitting",
            |i| i.tx_errors,
        ),
        (
            "container_network_transmit_packets_dropped_total",
            "Cumulative count of packets dropped while transmitting",
            |i| i.tx_dropped,
        ),
        (
            "container_network_transmit_packets_total",
            "Cumulative count of packets transmitted",
            |i| i.tx_packets,
        ),
    ];
    for (name, help, figure) in families {
        doc.family(Kind::Counter, name, help);
        let mut all = |id: &str, namespace: &str, pod: &str, interfaces: &[Interface]| {
            for i in interfaces {
                let labels = [
                    ("container", ""),
                    ("id", id),
                    ("image", ""),
                    ("interface", &i.name),
                    ("name", ""),
                    ("namespace", namespace),
                    ("pod", pod),
                ];
                doc.sample(&labels, figure(i), Some(s.at));
            }
        };
        all("/", "", "", &s.node.interfaces);
        for pod in &s.pods {
            all(&pod.cgroup, &pod.namespace, &pod.name, &pod.network);
        }
    }
}

/// `/metrics`: the agent itself.
pub fn agent(s: &Snapshot, held: &Held) -> String {
    let mut doc = Document::default();
    doc.family(Kind::Gauge, "edgecore_build_info", "What runs here.");
    doc.sample(&[("version", env!("CARGO_PKG_VERSION"))], 1, None);
    doc.family(
        Kind::Gauge,
        "edgecore_desired_objects",
        "Objects that the cloud wants on this node, as committed",
    );
    doc.sample(&[], held.objects, None);
    doc.family(
        Kind::Gauge,
        "edgecore_desired_complete",
        "1 if the cloud has named all that it wants here",
    );
    doc.sample(&[], u8::from(held.complete), None);
    doc.family(
        Kind::Gauge,
        "kubelet_running_containers",
        "[ALPHA] Number of containers currently running",
    );
    let running = containers(s).count();
    doc.sample(&[("container_state", "running")], running, None);
    doc.family(
        Kind::Gauge,
        "kubelet_running_pods",
        "[ALPHA] Number of pods that have a running pod sandbox",
    );
    doc.sample(&[], s.pods.len(), None);
    own_process(&mut doc, s);
    doc.text
}

fn own_process(doc: &mut Document, s: &Snapshot) {
    doc.family(
        Kind::Counter,
        "process_cpu_seconds_total",
        "Total user and system CPU time spent in seconds.",
    );
    if let Some(cpu) = s.agent.cpu {
        doc.sample(&[], seconds(cpu.nanos), None);
    }
    doc.family(
        Kind::Gauge,
        "process_open_fds",
        "Number of open file descriptors.",
    );
    doc.sample(&[], s.agent.open_files, None);
    doc.family(
        Kind::Gauge,
        "process_resident_memory_bytes",
        "Resident memory size in bytes.",
    );
    if let Some(rss) = s.agent.memory.and_then(|m| m.rss) {
        doc.sample(&[], rss, None);
    }
    doc.family(
        Kind::Gauge,
        "process_start_time_seconds",
        "Start time of the process since unix epoch in seconds.",
    );
    doc.sample(&[], since_epoch(s.agent.started), None);
}

#[cfg(test)]
mod tests;
