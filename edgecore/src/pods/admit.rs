//! Whether this node can run a Pod that was bound to it (pure).
//!
//! The scheduler has judged already; what is left is what it cannot know (another operating
//! system, a Pod bound by hand, two Pods that want one port of the device).

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;
use serde::{Deserialize, Serialize};

use super::cgroups::requested;
use super::security;
use super::status::Failed;
use crate::cri::convert;
use crate::node::environment::Environment;

/// What Pods may have of the node in all; 0 where it is not known, and then nothing is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    pub pods: usize,
    pub cpu_millis: i64,
    pub memory_bytes: i64,
}

impl Room {
    pub fn new(pods: usize, environment: &Environment) -> Self {
        let amount = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        Self {
            pods,
            cpu_millis: amount(environment.allocatable_cpu_millis),
            memory_bytes: amount(environment.allocatable_memory_bytes),
        }
    }
}

/// A port of the device that a Pod holds.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct HostPort {
    /// Empty for every address.
    pub ip: String,
    pub protocol: String,
    pub port: i32,
}

impl HostPort {
    fn clashes(&self, other: &HostPort) -> bool {
        let any = |ip: &str| ip.is_empty() || ip == "0.0.0.0" || ip == "::";
        self.port == other.port
            && self.protocol == other.protocol
            && (any(&self.ip) || any(&other.ip) || self.ip == other.ip)
    }
}

/// What one Pod was given of the node.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Grant {
    pub ports: Vec<HostPort>,
    /// Requests. A grant of an agent that did not count them says 0.
    #[serde(default)]
    pub cpu_millis: i64,
    #[serde(default)]
    pub memory_bytes: i64,
    /// The Pod is being ended: what it holds comes back soon.
    #[serde(skip)]
    pub ending: bool,
}

/// Why a Pod cannot have what it asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The Pod with this UID holds it and is ending.
    WaitFor(String),
    /// It never can here.
    Never(Failed),
}

/// The ports of the device that a Pod asks for.
pub fn host_ports(pod: &Pod) -> Vec<HostPort> {
    let ports = convert::host_ports(pod).map(|p| HostPort {
        ip: p.host_ip.clone().unwrap_or_default(),
        protocol: p.protocol.clone().unwrap_or_else(|| "TCP".into()),
        port: p.host_port.unwrap_or(0),
    });
    ports.collect()
}

fn never(reason: &str, message: impl Into<String>) -> Refusal {
    Refusal::Never(Failed {
        reason: reason.into(),
        message: message.into(),
    })
}

/// Decides over one Pod beside those that hold a grant, by UID.
pub fn admit(pod: &Pod, granted: &BTreeMap<String, Grant>, room: Room) -> Result<Grant, Refusal> {
    let spec = pod.spec.as_ref();
    let os = spec.and_then(|s| s.os.as_ref()).map(|o| o.name.as_str());
    if let Some(os) = os.filter(|os| *os != "linux") {
        let message = format!(
            "Failed to admit pod as the OS field doesn't match node OS: {os}, this node is linux"
        );
        return Err(never("PodOSNotSupported", message));
    }
    let selector = spec.and_then(|s| s.node_selector.as_ref());
    let selected = selector.and_then(|s| s.get("kubernetes.io/os"));
    if selected.is_some_and(|os| os != "linux") {
        let message =
            "Failed to admit pod as the `kubernetes.io/os` label doesn't match node label";
        return Err(never("PodOSSelectorNodeLabelDoesNotMatch", message));
    }
    if let Some(message) = security::forbidden_sysctl(pod) {
        return Err(never("SysctlForbidden", message));
    }
    let ports = host_ports(pod);
    for (uid, other) in granted {
        let taken = ports
            .iter()
            .find(|p| other.ports.iter().any(|o| o.clashes(p)));
        match taken {
            Some(_) if other.ending => return Err(Refusal::WaitFor(uid.clone())),
            Some(port) => {
                let message = format!(
                    "Predicate NodePorts failed: node didn't have free ports for the requested \
                     pod ports (host port {} is held by another Pod)",
                    port.port
                );
                return Err(never("NodePorts", message));
            }
            None => {}
        }
    }
    let live = granted.values().filter(|g| !g.ending).count();
    if live >= room.pods {
        let most = room.pods;
        let message = format!(
            "Node didn't have enough resource: pods, requested: 1, used: {live}, capacity: {most}"
        );
        return Err(never("OutOfpods", message));
    }
    let cpu_millis = requested(pod, "cpu");
    fits("cpu", cpu_millis, room.cpu_millis, granted, |g| {
        g.cpu_millis
    })?;
    let memory_bytes = requested(pod, "memory");
    fits("memory", memory_bytes, room.memory_bytes, granted, |g| {
        g.memory_bytes
    })?;
    Ok(Grant {
        ports,
        cpu_millis,
        memory_bytes,
        ending: false,
    })
}

/// Whether a request fits beside what is granted; what a Pod that is ending holds is waited for.
fn fits(
    name: &str,
    asked: i64,
    capacity: i64,
    granted: &BTreeMap<String, Grant>,
    of: impl Fn(&Grant) -> i64,
) -> Result<(), Refusal> {
    if asked == 0 || capacity == 0 {
        return Ok(());
    }
    let sum = |all: &mut dyn Iterator<Item = &Grant>| all.map(&of).fold(0, i64::saturating_add);
    let used = sum(&mut granted.values());
    if asked <= capacity.saturating_sub(used) {
        return Ok(());
    }
    let staying = sum(&mut granted.values().filter(|g| !g.ending));
    let mut ending = granted.iter().filter(|(_, g)| g.ending && of(g) > 0);
    match ending.next() {
        Some((uid, _)) if asked <= capacity.saturating_sub(staying) => {
            Err(Refusal::WaitFor(uid.clone()))
        }
        Some(_) | None => {
            let message = format!(
                "Node didn't have enough resource: {name}, requested: {asked}, used: {used}, \
                 capacity: {capacity}"
            );
            Err(never(&format!("OutOf{name}"), message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(json: serde_json::Value) -> Pod {
        serde_json::from_value(serde_json::json!({ "spec": json })).unwrap()
    }

    fn room(pods: usize) -> Room {
        Room {
            pods,
            cpu_millis: 1000,
            memory_bytes: 1 << 30,
        }
    }

    fn asking(cpu: &str, memory: &str) -> Pod {
        let requests = serde_json::json!({"cpu": cpu, "memory": memory});
        pod(serde_json::json!({"containers": [{"name": "c", "resources": {"requests": requests}}]}))
    }

    #[test]
    fn processors_and_memory_are_given_away_once() {
        let grant = |cpu, memory, ending| {
            let mut grant = admit(&asking(cpu, memory), &BTreeMap::new(), room(9)).unwrap();
            grant.ending = ending;
            grant
        };
        for (held, asked, want) in [
            (vec![grant("600m", "1Mi", false)], ("400m", "1Mi"), Ok(())),
            (
                vec![grant("600m", "1Mi", false)],
                ("401m", "1Mi"),
                Err("OutOfcpu"),
            ),
            (
                vec![grant("1m", "1Gi", false)],
                ("1m", "1Mi"),
                Err("OutOfmemory"),
            ),
            (vec![grant("1m", "1Gi", false)], ("1m", "0"), Ok(())),
            (vec![grant("1m", "1Gi", true)], ("1m", "1Mi"), Err("wait")),
            (
                vec![grant("600m", "1Mi", false), grant("400m", "1Mi", true)],
                ("500m", "1Mi"),
                Err("OutOfcpu"),
            ),
        ] {
            let granted = held.into_iter().enumerate();
            let granted = granted.map(|(n, grant)| (n.to_string(), grant)).collect();
            let said = match admit(&asking(asked.0, asked.1), &granted, room(9)) {
                Ok(_) => Ok(()),
                Err(Refusal::WaitFor(_)) => Err("wait".to_owned()),
                Err(Refusal::Never(failed)) => Err(failed.reason),
            };
            assert_eq!(said, want.map_err(str::to_owned), "{asked:?} {granted:?}");
        }
        let unknown = Room {
            cpu_millis: 0,
            memory_bytes: 0,
            pods: 9,
        };
        assert!(admit(&asking("64", "1Ti"), &BTreeMap::new(), unknown).is_ok());
    }

    #[test]
    fn a_sysctl_that_is_not_the_pods_own_is_refused() {
        let with = |name: &str| {
            pod(serde_json::json!({
                "containers": [],
                "securityContext": {"sysctls": [{"name": name, "value": "1"}]},
            }))
        };
        assert!(admit(&with("net.ipv4.tcp_syncookies"), &BTreeMap::new(), room(9)).is_ok());
        match admit(&with("kernel.panic"), &BTreeMap::new(), room(9)) {
            Err(Refusal::Never(failed)) => assert_eq!(failed.reason, "SysctlForbidden"),
            other => panic!("{other:?}"),
        }
    }

    fn ports(list: &[(&str, &str, i32)]) -> Pod {
        let ports: Vec<_> = list
            .iter()
            .map(|(ip, protocol, port)| {
                serde_json::json!({"containerPort": 80, "hostPort": port, "hostIP": ip, "protocol": protocol})
            })
            .collect();
        pod(serde_json::json!({"containers": [{"name": "c", "ports": ports}]}))
    }

    fn holding(pod: &Pod, ending: bool) -> BTreeMap<String, Grant> {
        let grant = Grant {
            ports: host_ports(pod),
            ending,
            ..Grant::default()
        };
        BTreeMap::from([("other".to_owned(), grant)])
    }

    #[test]
    fn another_operating_system_is_refused() {
        for (spec, reason) in [
            (
                serde_json::json!({"containers": [], "os": {"name": "windows"}}),
                "PodOSNotSupported",
            ),
            (
                serde_json::json!({"containers": [], "nodeSelector": {"kubernetes.io/os": "windows"}}),
                "PodOSSelectorNodeLabelDoesNotMatch",
            ),
        ] {
            match admit(&pod(spec), &BTreeMap::new(), room(110)) {
                Err(Refusal::Never(failed)) => assert_eq!(failed.reason, reason),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_port_of_the_device_belongs_to_one_pod() {
        for (mine, theirs, clash) in [
            (("", "TCP", 80), ("", "TCP", 80), true),
            (("", "TCP", 80), ("", "UDP", 80), false),
            (("", "TCP", 80), ("", "TCP", 81), false),
            (("10.0.0.1", "TCP", 80), ("10.0.0.2", "TCP", 80), false),
            (("10.0.0.1", "TCP", 80), ("0.0.0.0", "TCP", 80), true),
        ] {
            let granted = holding(&ports(&[theirs]), false);
            let refused = admit(&ports(&[mine]), &granted, room(110)).is_err();
            assert_eq!(refused, clash, "{mine:?} {theirs:?}");
        }
    }

    #[test]
    fn a_successor_waits_for_the_port_of_a_pod_that_is_ending_and_for_nothing_else() {
        let web = ports(&[("", "TCP", 80)]);
        let granted = holding(&web, true);
        assert_eq!(
            admit(&web, &granted, room(1)),
            Err(Refusal::WaitFor("other".into()))
        );
        assert!(admit(&ports(&[("", "TCP", 81)]), &granted, room(1)).is_ok());
    }

    #[test]
    fn a_full_node_refuses() {
        let granted = holding(&ports(&[]), false);
        assert!(admit(&ports(&[]), &granted, room(2)).is_ok());
        assert!(matches!(
            admit(&ports(&[]), &granted, room(1)),
            Err(Refusal::Never(Failed { reason, .. })) if reason == "OutOfpods"
        ));
    }
}
