//! What a Node is made with. Pure: the enrolment record in, the Node object out, and back: what of
//! a Node is worth keeping when somebody deletes it.
//!
//! All of it is in the create call, because some of it counts only from the start: a taint after
//! the scheduler has looked is too late, and a providerID cannot be changed.

use std::collections::BTreeMap;

use common::ids::NodeName;
use common::pki::ClusterId;
use k8s_openapi::api::core::v1::{Node, NodeSpec, Taint};
use kube::api::ObjectMeta;

use crate::enroll::record::{EnrolmentSpec, NodeTaint};

/// Keeps a deleted Node until its content is in the enrolment record.
pub const FINALIZER: &str = "fleet.cloudcore.io/enrolment";
/// The role by which edge nodes are found.
pub const EDGE_LABEL: &str = "node-role.kubernetes.io/edge";
const AGENT_LABEL: &str = "node-role.kubernetes.io/agent";
const HOSTNAME: &str = "kubernetes.io/hostname";
/// A foreign providerID breaks the target groups of cloud load balancers.
const NO_BALANCER: &str = "node.kubernetes.io/exclude-from-external-load-balancers";
/// The attach-detach controller looks after the node's volumes.
const ATTACH_DETACH: &str = "volumes.kubernetes.io/controller-managed-attach-detach";

/// The taint that keeps what was not meant for an edge away from it.
pub fn edge_taint() -> NodeTaint {
    NodeTaint {
        key: EDGE_LABEL.into(),
        value: String::new(),
        effect: "NoSchedule".into(),
    }
}

/// `spec.providerID` of a Node that this cluster's CloudCore made.
pub fn provider_id(cluster: &ClusterId, node: &NodeName) -> String {
    format!("edge://{cluster}/{node}")
}

/// Whether this cluster's CloudCore made the Node: its providerID, which cannot be changed, says.
pub fn is_ours(node: &Node, cluster: &ClusterId) -> bool {
    let Some(name) = node
        .metadata
        .name
        .as_deref()
        .and_then(|n| NodeName::parse(n).ok())
    else {
        return false;
    };
    let provider = node.spec.as_ref().and_then(|s| s.provider_id.as_deref());
    provider == Some(provider_id(cluster, &name).as_str())
}

/// The Node of an enrolled device.
pub fn node(name: &NodeName, record: &EnrolmentSpec, cluster: &ClusterId) -> Node {
    let mut labels = record.labels.clone();
    labels.extend(birth_labels(name, record));
    let mut annotations = record.annotations.clone();
    annotations.insert(ATTACH_DETACH.into(), "true".into());
    Node {
        metadata: ObjectMeta {
            name: Some(name.as_str().into()),
            labels: Some(labels),
            annotations: Some(annotations),
            finalizers: Some(vec![FINALIZER.into()]),
            ..ObjectMeta::default()
        },
        spec: Some(NodeSpec {
            provider_id: Some(provider_id(cluster, name)),
            taints: Some(record.taints.iter().map(Taint::from).collect()),
            unschedulable: Some(record.unschedulable).filter(|u| *u),
            ..NodeSpec::default()
        }),
        status: None,
    }
}

fn birth_labels(name: &NodeName, record: &EnrolmentSpec) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::from([
        (EDGE_LABEL.to_string(), String::new()),
        (AGENT_LABEL.into(), String::new()),
        // Never the device's own hostname: cloned images share it.
        (HOSTNAME.into(), name.as_str().into()),
        (NO_BALANCER.into(), "true".into()),
    ]);
    for (key, value) in [("os", &record.os), ("arch", &record.arch)] {
        if !value.is_empty() {
            labels.insert(format!("kubernetes.io/{key}"), value.clone());
            labels.insert(format!("beta.kubernetes.io/{key}"), value.clone());
        }
    }
    labels
}

/// Keeps in the record what people wrote on the Node; what CloudCore or a controller writes anew by
/// itself is left out. True when the record changed.
pub fn keep(record: &mut EnrolmentSpec, name: &NodeName, node: &Node) -> bool {
    let birth = birth_labels(name, record);
    let controllers_taint = |key: &str| {
        key.starts_with("node.kubernetes.io/")
            || key.starts_with("node.cloudprovider.kubernetes.io/")
    };
    let controllers_annotation =
        |key: &str| key == ATTACH_DETACH || key.starts_with("node.alpha.kubernetes.io/");
    let spec = node.spec.clone().unwrap_or_default();
    let next = EnrolmentSpec {
        labels: kept(&node.metadata.labels, |key| birth.contains_key(key)),
        annotations: kept(&node.metadata.annotations, controllers_annotation),
        taints: spec
            .taints
            .iter()
            .flatten()
            .filter(|t| !controllers_taint(&t.key))
            .map(NodeTaint::from)
            .collect(),
        unschedulable: spec.unschedulable.unwrap_or(false),
        ..record.clone()
    };
    let changed = next != *record;
    *record = next;
    changed
}

fn kept(
    map: &Option<BTreeMap<String, String>>,
    left_out: impl Fn(&str) -> bool,
) -> BTreeMap<String, String> {
    let all = map.iter().flatten().filter(|(key, _)| !left_out(key));
    all.map(|(k, v)| (k.clone(), v.clone())).collect()
}

/// The architecture as Kubernetes names it.
pub fn kubernetes_arch(arch: &str) -> &str {
    match arch {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster() -> ClusterId {
        ClusterId::parse("c1").unwrap()
    }

    fn name() -> NodeName {
        NodeName::parse("a").unwrap()
    }

    fn record() -> EnrolmentSpec {
        EnrolmentSpec {
            os: "linux".into(),
            arch: "arm64".into(),
            labels: BTreeMap::from([
                ("topology.kubernetes.io/zone".into(), "berlin".into()),
                (HOSTNAME.into(), "liar".into()),
            ]),
            annotations: BTreeMap::from([("team".into(), "x".into())]),
            taints: vec![edge_taint()],
            unschedulable: true,
            ..EnrolmentSpec::default()
        }
    }

    #[test]
    fn a_node_is_made_whole() {
        let node = node(&name(), &record(), &cluster());
        let labels = node.metadata.labels.clone().unwrap();
        for (key, value) in [
            ("node-role.kubernetes.io/edge", ""),
            ("node-role.kubernetes.io/agent", ""),
            ("kubernetes.io/hostname", "a"),
            ("kubernetes.io/os", "linux"),
            ("kubernetes.io/arch", "arm64"),
            ("beta.kubernetes.io/os", "linux"),
            ("beta.kubernetes.io/arch", "arm64"),
            (
                "node.kubernetes.io/exclude-from-external-load-balancers",
                "true",
            ),
            ("topology.kubernetes.io/zone", "berlin"),
        ] {
            assert_eq!(labels.get(key).map(String::as_str), Some(value), "{key}");
        }
        let annotations = node.metadata.annotations.clone().unwrap();
        assert_eq!(
            annotations["volumes.kubernetes.io/controller-managed-attach-detach"],
            "true"
        );
        assert_eq!(
            node.metadata.finalizers.as_deref(),
            Some(&[FINALIZER.to_string()][..])
        );
        let spec = node.spec.clone().unwrap();
        assert_eq!(spec.provider_id.as_deref(), Some("edge://c1/a"));
        assert_eq!(spec.taints.unwrap()[0].key, "node-role.kubernetes.io/edge");
        assert_eq!(spec.unschedulable, Some(true));
        assert!(is_ours(&node, &cluster()));
        assert!(!is_ours(&node, &ClusterId::parse("c2").unwrap()));
    }

    #[test]
    fn what_people_wrote_on_a_node_survives_its_deletion() {
        let mut record = record();
        let mut made = node(&name(), &record, &cluster());
        let labels = made.metadata.labels.as_mut().unwrap();
        labels.insert("people".into(), "wrote".into());
        labels.remove("topology.kubernetes.io/zone");
        made.metadata.annotations.as_mut().unwrap().extend([
            ("note".to_string(), "kept".to_string()),
            ("node.alpha.kubernetes.io/ttl".into(), "0".into()),
        ]);
        let spec = made.spec.as_mut().unwrap();
        spec.unschedulable = None;
        let taint = |key: &str| Taint {
            key: key.into(),
            effect: "NoExecute".into(),
            ..Taint::default()
        };
        spec.taints = Some(vec![taint("mine"), taint("node.kubernetes.io/unreachable")]);
        assert!(keep(&mut record, &name(), &made));
        assert_eq!(
            record.labels,
            BTreeMap::from([("people".into(), "wrote".into())])
        );
        assert_eq!(
            record.annotations,
            BTreeMap::from([("note".into(), "kept".into()), ("team".into(), "x".into())])
        );
        assert_eq!(record.taints.len(), 1);
        assert_eq!(record.taints[0].key, "mine");
        assert!(!record.unschedulable);
        assert!(
            !keep(&mut record, &name(), &made),
            "the second time changes nothing"
        );
    }

    #[test]
    fn architectures_have_their_kubernetes_names() {
        for (from, to) in [
            ("x86_64", "amd64"),
            ("aarch64", "arm64"),
            ("arm", "arm"),
            ("riscv64", "riscv64"),
        ] {
            assert_eq!(kubernetes_arch(from), to);
        }
    }
}
