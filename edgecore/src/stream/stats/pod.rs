//! What the kernel says of a Pod (adapter: its cgroup, its network namespace, its log files).

use std::fs;
use std::path::Path;

use jiff::Timestamp;

use super::{Cpu, Memory, PodStats, Spec, Used, node};
use crate::pods::cgroups::{Cgroups, Usage};

/// Adds to what the runtime said. Without a cgroup a Pod is the sum of its containers.
pub(super) fn measure(
    pod: &mut PodStats,
    spec: Option<&Spec>,
    cgroups: Option<&Cgroups>,
    logs: &Path,
    at: Timestamp,
) {
    if let (Some(spec), Some(cgroups)) = (spec, cgroups) {
        let usage = cgroups.pod_usage(&pod.uid, spec.qos);
        (pod.cpu, pod.memory) = figures(&usage, at);
        pod.processes = usage.processes;
        pod.cgroup = usage.path;
        if !spec.host_network {
            let process = cgroups.a_process(&pod.uid, spec.qos);
            pod.network = process.map(node::interfaces).unwrap_or_default();
        }
    }
    pod.cpu = pod.cpu.or_else(|| sum_cpu(pod));
    pod.memory = pod.memory.or_else(|| sum_memory(pod));
    let dir = logs.join(format!("{}_{}_{}", pod.namespace, pod.name, pod.uid));
    for container in &mut pod.containers {
        container.logs = files_in(&dir.join(&container.name));
    }
}

/// A cgroup's use as figures; none when it is gone.
pub(super) fn figures(usage: &Usage, at: Timestamp) -> (Option<Cpu>, Option<Memory>) {
    let cpu = usage.cpu_nanos.map(|nanos| Cpu {
        at,
        nanos,
        nano_cores: None,
    });
    let memory = usage.working_set_bytes().map(|working_set| Memory {
        at,
        working_set,
        available: None,
        usage: usage.memory_bytes,
        rss: usage.rss_bytes,
        page_faults: usage.page_faults,
        major_page_faults: usage.major_page_faults,
    });
    (cpu, memory)
}

fn sum_cpu(pod: &PodStats) -> Option<Cpu> {
    let all = pod.containers.iter().filter_map(|c| c.cpu);
    all.reduce(|a, b| Cpu {
        at: a.at.max(b.at),
        nanos: a.nanos.saturating_add(b.nanos),
        nano_cores: a.nano_cores.zip(b.nano_cores).map(|(a, b)| a + b),
    })
}

fn sum_memory(pod: &PodStats) -> Option<Memory> {
    let plus = |a: Option<u64>, b: Option<u64>| a.zip(b).map(|(a, b)| a + b);
    let all = pod.containers.iter().filter_map(|c| c.memory);
    all.reduce(|a, b| Memory {
        at: a.at.max(b.at),
        working_set: a.working_set.saturating_add(b.working_set),
        available: None,
        usage: plus(a.usage, b.usage),
        rss: plus(a.rss, b.rss),
        page_faults: plus(a.page_faults, b.page_faults),
        major_page_faults: plus(a.major_page_faults, b.major_page_faults),
    })
}

fn files_in(dir: &Path) -> Used {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let sizes = entries.filter_map(|e| Some(e.metadata().ok()?.len()));
    let (bytes, count) = sizes.fold((0, 0), |(bytes, count), size| (bytes + size, count + 1));
    Used {
        bytes,
        inodes: Some(count),
    }
}
