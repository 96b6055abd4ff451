//! What Pods and containers may have of the device (pure): QoS, shares, limits, OOM scores.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::node::environment::Environment;
use crate::pods::quantity::{millis, units};

/// A Pod's quality of service class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Qos {
    Guaranteed,
    Burstable,
    BestEffort,
}

impl Qos {
    /// The word of `status.qosClass`.
    pub fn as_str(self) -> &'static str {
        match self {
            Qos::Guaranteed => "Guaranteed",
            Qos::Burstable => "Burstable",
            Qos::BestEffort => "BestEffort",
        }
    }

    /// The cgroup between kubepods and the Pod's; Guaranteed has none.
    pub(super) fn tier(self) -> Option<&'static str> {
        match self {
            Qos::Guaranteed => None,
            Qos::Burstable => Some("burstable"),
            Qos::BestEffort => Some("besteffort"),
        }
    }
}

/// A container's share of the device, in the units of CRI's `LinuxContainerResources`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LinuxResources {
    pub cpu_shares: i64,
    /// Microseconds a period; 0 is no limit.
    pub cpu_quota: i64,
    pub cpu_period: i64,
    /// Bytes; 0 is no limit.
    pub memory_limit: i64,
    pub oom_score_adj: i64,
}

pub(super) const CPU_PERIOD: i64 = 100_000;
pub(super) const MIN_SHARES: i64 = 2;
pub(super) const MAX_SHARES: i64 = 262_144;
/// The kernel refuses a smaller quota.
const MIN_QUOTA: i64 = 1000;
/// Priorities from here on are the system's own (system-node-critical and its kin).
const CRITICAL_PRIORITY: i32 = 2_000_000_000;

pub(super) fn shares(cpu_millis: i64) -> i64 {
    (cpu_millis.saturating_mul(1024) / 1000).clamp(MIN_SHARES, MAX_SHARES)
}

fn quota(cpu_millis: i64) -> i64 {
    if cpu_millis <= 0 {
        return 0;
    }
    (cpu_millis.saturating_mul(CPU_PERIOD) / 1000).max(MIN_QUOTA)
}

/// cgroup v2's weight for v1's shares, by the mapping that Kubernetes documents.
pub(super) fn weight(shares: i64) -> i64 {
    1 + ((shares - MIN_SHARES) * 9999) / (MAX_SHARES - MIN_SHARES)
}

type Amounts = BTreeMap<String, Quantity>;

fn side(list: Option<&Amounts>, name: &str) -> Option<i64> {
    let quantity = list?.get(name)?;
    let amount = if name == "cpu" {
        millis(quantity)
    } else {
        units(quantity)
    };
    amount.filter(|a| *a > 0)
}

fn limit(r: Option<&ResourceRequirements>, name: &str) -> Option<i64> {
    side(r?.limits.as_ref(), name)
}

fn request(r: Option<&ResourceRequirements>, name: &str) -> Option<i64> {
    side(r?.requests.as_ref(), name)
}

/// The Pod's quality of service class.
pub fn qos(pod: &Pod) -> Qos {
    let Some(spec) = &pod.spec else {
        return Qos::BestEffort;
    };
    let init = spec.init_containers.iter().flatten();
    let containers = spec.containers.iter().chain(init);
    let all: Vec<_> = match &spec.resources {
        // Resources of the Pod as a whole decide alone.
        Some(pod) => vec![Some(pod)],
        None => containers.map(|c| c.resources.as_ref()).collect(),
    };
    let named = ["cpu", "memory"];
    let says = |r: &Option<&ResourceRequirements>| {
        named
            .iter()
            .any(|n| limit(*r, n).or(request(*r, n)).is_some())
    };
    let bounded = |r: &Option<&ResourceRequirements>| {
        named.iter().all(|n| match (limit(*r, n), request(*r, n)) {
            (Some(limit), Some(request)) => limit == request,
            (Some(_), None) => true,
            (None, _) => false,
        })
    };
    if !all.iter().any(says) {
        Qos::BestEffort
    } else if all.iter().all(bounded) {
        Qos::Guaranteed
    } else {
        Qos::Burstable
    }
}

/// What the runtime is told to hold the container to.
pub fn linux_resources(
    pod: &Pod,
    container: &Container,
    environment: &Environment,
) -> LinuxResources {
    let own = container.resources.as_ref();
    let cpu_limit = limit(own, "cpu");
    let cpu = request(own, "cpu").or(cpu_limit);
    LinuxResources {
        cpu_shares: shares(cpu.unwrap_or(0)),
        cpu_quota: quota(cpu_limit.unwrap_or(0)),
        cpu_period: CPU_PERIOD,
        memory_limit: limit(own, "memory").unwrap_or(0),
        oom_score_adj: oom_score_adj(pod, container, environment),
    }
}

/// The less memory a container asked for, the sooner the kernel ends it.
fn oom_score_adj(pod: &Pod, container: &Container, environment: &Environment) -> i64 {
    let spec = pod.spec.as_ref();
    let critical = spec
        .and_then(|s| s.priority)
        .is_some_and(|p| p >= CRITICAL_PRIORITY);
    match qos(pod) {
        _ if critical => -997,
        Qos::Guaranteed => -997,
        Qos::BestEffort => 1000,
        Qos::Burstable => {
            let own = burstable_score(container, environment);
            let sidecar = container.restart_policy.as_deref() == Some("Always");
            // A sidecar goes no sooner than the containers that it serves.
            let served = spec.iter().flat_map(|s| s.containers.iter());
            let served = served.map(|c| burstable_score(c, environment)).min();
            served.filter(|_| sidecar).map_or(own, |s| s.min(own))
        }
    }
}

fn burstable_score(container: &Container, environment: &Environment) -> i64 {
    let own = container.resources.as_ref();
    let asked = request(own, "memory").or(limit(own, "memory")).unwrap_or(0);
    let capacity = i64::try_from(environment.allocatable_memory_bytes).unwrap_or(i64::MAX);
    let part = asked.saturating_mul(1000) / capacity.max(1);
    (1000 - part).clamp(3, 999)
}

/// What the Pod's own cgroup is held to: sums, and limits only where every container has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PodLimits {
    pub(super) shares: i64,
    pub(super) quota: i64,
    pub(super) memory: i64,
}

pub(super) fn pod_limits(pod: &Pod) -> PodLimits {
    let Some(spec) = &pod.spec else {
        return PodLimits {
            shares: MIN_SHARES,
            quota: 0,
            memory: 0,
        };
    };
    let is_sidecar = |c: &&Container| c.restart_policy.as_deref() == Some("Always");
    let init: Vec<&Container> = spec.init_containers.iter().flatten().collect();
    let sidecars = init.iter().copied().filter(is_sidecar);
    let steady: Vec<_> = spec.containers.iter().chain(sidecars).collect();
    let overhead = |name: &str| side(spec.overhead.as_ref(), name).unwrap_or(0);
    let of_pod = spec.resources.as_ref();
    let cpu = |c: &Container| {
        let r = c.resources.as_ref();
        request(r, "cpu").or(limit(r, "cpu")).unwrap_or(0)
    };
    let asked: i64 = steady.iter().map(|c| cpu(c)).sum();
    let asked = init.iter().map(|c| cpu(c)).fold(asked, i64::max);
    let asked = request(of_pod, "cpu").unwrap_or(asked) + overhead("cpu");
    let bound = |name: &str| {
        let whole = limit(of_pod, name);
        let of = |c: &&Container| limit(c.resources.as_ref(), name);
        let steady: Option<i64> = steady.iter().map(of).sum();
        let first: Option<i64> = init
            .iter()
            .map(of)
            .try_fold(0, |most, l| Some(l?.max(most)));
        let parts = steady.zip(first).map(|(sum, most)| sum.max(most));
        whole.or(parts).map_or(0, |l| l + overhead(name))
    };
    PodLimits {
        shares: shares(asked),
        quota: quota(bound("cpu")),
        memory: bound("memory"),
    }
}

/// What runs side by side at most: all regular containers beside the sidecars, or the largest init
/// container beside the sidecars that were started before it. Millicores or bytes.
fn side_by_side(spec: &PodSpec, of: impl Fn(&Container) -> i64) -> i64 {
    let (mut sidecars, mut most) = (0_i64, 0_i64);
    for c in spec.init_containers.iter().flatten() {
        let beside = sidecars.saturating_add(of(c));
        most = most.max(beside);
        if c.restart_policy.as_deref() == Some("Always") {
            sidecars = beside;
        }
    }
    let mains = spec.containers.iter().map(of);
    mains.fold(sidecars, i64::saturating_add).max(most)
}

/// What the scheduler counts for the Pod. Millicores or bytes.
pub fn requested(pod: &Pod, name: &str) -> i64 {
    let Some(spec) = &pod.spec else { return 0 };
    let parts = side_by_side(spec, |c| {
        let r = c.resources.as_ref();
        request(r, name).or(limit(r, name)).unwrap_or(0)
    });
    let whole = request(spec.resources.as_ref(), name).unwrap_or(parts);
    whole.saturating_add(side(spec.overhead.as_ref(), name).unwrap_or(0))
}

/// What a container may have of a resource. Millicores or bytes.
pub fn limit_of(container: &Container, name: &str) -> Option<i64> {
    limit(container.resources.as_ref(), name)
}

/// What the containers that are limited may have together, and the Pod's overhead; nothing where
/// none is. Millicores or bytes.
pub fn limited(pod: &Pod, name: &str) -> Option<i64> {
    let spec = pod.spec.as_ref()?;
    let parts = side_by_side(spec, |c| limit_of(c, name).unwrap_or(0));
    let overhead = side(spec.overhead.as_ref(), name).unwrap_or(0);
    (parts > 0).then(|| parts.saturating_add(overhead))
}

#[cfg(test)]
pub(super) mod testing {
    use k8s_openapi::api::core::v1::Pod;
    use serde_json::{Value, json};

    use crate::pods::testing::pod;

    pub(in crate::pods::cgroups) fn the_pod(containers: Value) -> Pod {
        pod(json!({"metadata": {"uid": "a-b"}, "spec": {"containers": containers}}))
    }

    pub(in crate::pods::cgroups) fn resources(requests: Value, limits: Value) -> Value {
        json!({"name": "c", "resources": {"requests": requests, "limits": limits}})
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{resources, the_pod};
    use super::*;
    use crate::pods::testing::{environment, pod};
    use serde_json::json;

    #[test]
    fn a_pod_asks_for_what_runs_side_by_side() {
        let c = |cpu: &str| json!({"name": "c", "resources": {"requests": {"cpu": cpu}}});
        let sidecar = |cpu: &str| {
            let mut c = c(cpu);
            c["restartPolicy"] = json!("Always");
            c
        };
        for (spec, want) in [
            (json!({"containers": [{"name": "c"}]}), 0),
            (json!({"containers": [c("100m"), c("0.2")]}), 300),
            (
                json!({"containers": [c("100m")], "initContainers": [c("1")]}),
                1000,
            ),
            (
                json!({"containers": [c("100m")], "initContainers": [sidecar("50m"), c("1")]}),
                1050,
            ),
            (
                json!({"containers": [c("100m")], "initContainers": [c("1"), sidecar("50m")]}),
                1000,
            ),
            (
                json!({"containers": [c("2")], "overhead": {"cpu": "10m"}}),
                2010,
            ),
            (
                json!({"containers": [{"name": "c", "resources": {"limits": {"cpu": "3"}}}]}),
                3000,
            ),
        ] {
            assert_eq!(
                requested(&pod(json!({ "spec": spec })), "cpu"),
                want,
                "{spec}"
            );
        }
    }

    #[test]
    fn quality_of_service() {
        let both = json!({"cpu": "1", "memory": "1Mi"});
        let full = resources(both.clone(), both.clone());
        for (containers, want) in [
            (json!([{"name": "c"}]), Qos::BestEffort),
            (
                json!([resources(json!({"cpu": "0"}), json!({}))]),
                Qos::BestEffort,
            ),
            (
                json!([resources(json!({"ephemeral-storage": "1Gi"}), json!({}))]),
                Qos::BestEffort,
            ),
            (json!([full]), Qos::Guaranteed),
            (json!([resources(json!({}), both.clone())]), Qos::Guaranteed),
            (
                json!([resources(
                    json!({"cpu": "1000m", "memory": "1Mi"}),
                    both.clone()
                )]),
                Qos::Guaranteed,
            ),
            (
                json!([resources(json!({"cpu": "500m"}), both.clone())]),
                Qos::Burstable,
            ),
            (json!([resources(both.clone(), json!({}))]), Qos::Burstable),
            (
                json!([resources(json!({}), json!({"cpu": "1"}))]),
                Qos::Burstable,
            ),
            (json!([full, {"name": "d"}]), Qos::Burstable),
        ] {
            assert_eq!(qos(&the_pod(containers.clone())), want, "{containers}");
        }
        let mut with_init = the_pod(json!([full]));
        let bare: Container = serde_json::from_value(json!({"name": "i"})).unwrap();
        with_init.spec.as_mut().unwrap().init_containers = Some(vec![bare]);
        assert_eq!(qos(&with_init), Qos::Burstable);
    }

    #[test]
    fn what_a_container_is_held_to() {
        let row = |cpu_shares, cpu_quota, memory_limit, oom_score_adj| LinuxResources {
            cpu_shares,
            cpu_quota,
            cpu_period: 100_000,
            memory_limit,
            oom_score_adj,
        };
        for (container, want) in [
            (json!({"name": "c"}), row(2, 0, 0, 1000)),
            (
                resources(json!({"cpu": "250m"}), json!({"cpu": "500m"})),
                row(256, 50_000, 0, 999),
            ),
            (
                resources(json!({}), json!({"cpu": "5m"})),
                row(5, 1000, 0, 999),
            ),
            (
                resources(json!({"cpu": "1m"}), json!({})),
                row(2, 0, 0, 999),
            ),
            (
                resources(json!({"memory": "1G"}), json!({})),
                row(2, 0, 0, 750),
            ),
            (
                resources(json!({"memory": "4G"}), json!({})),
                row(2, 0, 0, 3),
            ),
            (
                resources(json!({}), json!({"cpu": "2", "memory": "64Mi"})),
                row(2048, 200_000, 67_108_864, -997),
            ),
        ] {
            let pod = the_pod(json!([container]));
            let c = &pod.spec.as_ref().unwrap().containers[0];
            assert_eq!(
                linux_resources(&pod, c, &environment()),
                want,
                "{container}"
            );
        }
        let mut critical = the_pod(json!([{"name": "c"}]));
        critical.spec.as_mut().unwrap().priority = Some(2_000_001_000);
        let c = critical.spec.as_ref().unwrap().containers[0].clone();
        assert_eq!(
            linux_resources(&critical, &c, &environment()).oom_score_adj,
            -997
        );
    }

    #[test]
    fn a_sidecar_goes_no_sooner_than_what_it_serves() {
        let mut pod = the_pod(json!([resources(json!({"memory": "1G"}), json!({}))]));
        let sidecar: Container =
            serde_json::from_value(json!({"name": "s", "restartPolicy": "Always"})).unwrap();
        pod.spec.as_mut().unwrap().init_containers = Some(vec![sidecar.clone()]);
        assert_eq!(
            linux_resources(&pod, &sidecar, &environment()).oom_score_adj,
            750
        );
    }

    #[test]
    fn the_pods_limits_are_sums() {
        let a = resources(
            json!({"cpu": "100m"}),
            json!({"cpu": "200m", "memory": "1Mi"}),
        );
        let b = resources(json!({"cpu": "300m"}), json!({"memory": "2Mi"}));
        let limits = pod_limits(&the_pod(json!([a, b])));
        assert_eq!(
            (limits.shares, limits.quota, limits.memory),
            (409, 0, 3 << 20)
        );
        let mut with_init = the_pod(json!([a]));
        let init: Container = serde_json::from_value(resources(
            json!({"cpu": "1"}),
            json!({"cpu": "2", "memory": "9Mi"}),
        ))
        .unwrap();
        with_init.spec.as_mut().unwrap().init_containers = Some(vec![init]);
        let limits = pod_limits(&with_init);
        assert_eq!(
            (limits.shares, limits.quota, limits.memory),
            (1024, 200_000, 9 << 20)
        );
    }
}
