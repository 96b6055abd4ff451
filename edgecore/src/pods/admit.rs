//! Whether this node can run a Pod that was bound to it (pure).
//!
//! The scheduler has judged already; what is left is what it cannot know (another operating
//! system, a Pod bound by hand, two Pods that want one port of the device).

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;
use serde::{Deserialize, Serialize};

use super::status::Failed;
use crate::cri::convert;

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
pub fn admit(
    pod: &Pod,
    granted: &BTreeMap<String, Grant>,
    most_pods: usize,
) -> Result<Grant, Refusal> {
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
    if live >= most_pods {
        let message = format!(
            "Node didn't have enough resource: pods, requested: 1, used: {live}, capacity: {most_pods}"
        );
        return Err(never("OutOfpods", message));
    }
    Ok(Grant {
        ports,
        ending: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(json: serde_json::Value) -> Pod {
        serde_json::from_value(serde_json::json!({ "spec": json })).unwrap()
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
            match admit(&pod(spec), &BTreeMap::new(), 110) {
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
            let refused = admit(&ports(&[mine]), &granted, 110).is_err();
            assert_eq!(refused, clash, "{mine:?} {theirs:?}");
        }
    }

    #[test]
    fn a_successor_waits_for_the_port_of_a_pod_that_is_ending_and_for_nothing_else() {
        let web = ports(&[("", "TCP", 80)]);
        let granted = holding(&web, true);
        assert_eq!(
            admit(&web, &granted, 1),
            Err(Refusal::WaitFor("other".into()))
        );
        assert!(admit(&ports(&[("", "TCP", 81)]), &granted, 1).is_ok());
    }

    #[test]
    fn a_full_node_refuses() {
        let granted = holding(&ports(&[]), false);
        assert!(admit(&ports(&[]), &granted, 2).is_ok());
        assert!(matches!(
            admit(&ports(&[]), &granted, 1),
            Err(Refusal::Never(Failed { reason, .. })) if reason == "OutOfpods"
        ));
    }
}
