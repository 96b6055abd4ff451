//! What an edge never needs is dropped here, and what is left is written the same way each time.
//!
//! Takes an object as the API server gave it, gives the bytes that cross the hub. Two rules make
//! the bytes worth hashing:
//!
//! - what changes without the edge having to know is outside: `resourceVersion`, `managedFields`,
//!   and all of a Pod's status that the edge writes itself, so that its own report does not come
//!   back to it as a change;
//! - the same object gives the same bytes, whether it came from a list or a watch (a list's items
//!   carry no `apiVersion` and `kind`) and whichever server wrote its keys in which order.
//!
//! A Pod's spec is passed on field by unknown field: an older agent keeps what it cannot read.
//! Never: I/O, a clock, a typed struct that would lose a field newer than itself.

use serde_json::{Map, Value, json};

/// Annotations of tools, large and of no use on a node.
const NOISE: &[&str] = &["kubectl.kubernetes.io/last-applied-configuration"];

/// Metadata of a Pod that only controllers in the cloud read. `generation` stays: the edge reports
/// it back as `status.observedGeneration`, and no status write changes it.
const POD_METADATA_DROPPED: &[&str] = &[
    "managedFields",
    "resourceVersion",
    "selfLink",
    "finalizers",
    "generateName",
];

/// Tolerations matter to the scheduler and the taint manager. CloudCore edits them on a bound Pod,
/// and that edit must not wake the device.
const POD_SPEC_DROPPED: &[&str] = &["tolerations"];

/// Written by controllers and the API server, read by the node: dynamic resource claims, and the
/// resize state that the API server still sets on 1.33.
const POD_STATUS_OF_OTHERS: &[&str] = &[
    "resourceClaimStatuses",
    "extendedResourceClaimStatus",
    "resize",
];

/// Conditions that the node itself writes; naming one of them as a readiness gate does not make it
/// somebody else's.
const CONDITIONS_OF_THE_NODE: &[&str] = &[
    "PodScheduled",
    "Initialized",
    "ContainersReady",
    "Ready",
    "PodReadyToStartContainers",
    "PodResizePending",
    "PodResizeInProgress",
];

/// Annotations of a Node that its own agent reads; those of controllers (`node.alpha.kubernetes.io/ttl`
/// changes with the size of the cluster) stay in the cloud.
const NODE_ANNOTATIONS: &[&str] = &["volumes.kubernetes.io/controller-managed-attach-detach"];

/// The bytes of a Pod as its node gets them.
pub fn pod(object: &Value) -> Vec<u8> {
    let mut metadata = section(object, "metadata");
    POD_METADATA_DROPPED.iter().for_each(|f| {
        metadata.remove(*f);
    });
    drop_noise(&mut metadata);
    let mut spec = section(object, "spec");
    POD_SPEC_DROPPED.iter().for_each(|f| {
        spec.remove(*f);
    });
    let mut out = Map::new();
    let status = pod_status(object);
    out.insert("metadata".into(), Value::Object(metadata));
    out.insert("spec".into(), Value::Object(spec));
    if !status.is_empty() {
        out.insert("status".into(), Value::Object(status));
    }
    bytes(Value::Object(out))
}

/// Whether the API already holds a Pod's end: such a Pod never starts again.
pub fn is_terminal(pod: &Value) -> bool {
    matches!(
        pod.pointer("/status/phase").and_then(Value::as_str),
        Some("Succeeded" | "Failed")
    )
}

fn pod_status(object: &Value) -> Map<String, Value> {
    let status = section(object, "status");
    let mut out = Map::new();
    let mut keep = |field: &str| {
        if let Some(value) = status.get(field) {
            out.insert(field.into(), value.clone());
        }
    };
    POD_STATUS_OF_OTHERS.iter().copied().for_each(&mut keep);
    if is_terminal(object) {
        keep("phase");
        keep("reason");
    }
    let gates = gate_conditions(object, &status);
    if !gates.is_empty() {
        out.insert("conditions".into(), Value::Array(gates));
    }
    out
}

/// Of the conditions that the Pod's readiness gates name, the type and the status: the times and
/// messages of a probe elsewhere decide nothing on the node.
fn gate_conditions(object: &Value, status: &Map<String, Value>) -> Vec<Value> {
    let gates: Vec<&str> = list(object.pointer("/spec/readinessGates"))
        .filter_map(|gate| gate.get("conditionType").and_then(Value::as_str))
        .filter(|gate| !CONDITIONS_OF_THE_NODE.contains(gate))
        .collect();
    let mut found: Vec<(&str, &str)> = list(status.get("conditions"))
        .filter_map(|c| Some((c.get("type")?.as_str()?, c.get("status")?.as_str()?)))
        .filter(|(kind, _)| gates.contains(kind))
        .collect();
    found.sort_unstable();
    found
        .into_iter()
        .map(|(kind, status)| json!({ "type": kind, "status": status }))
        .collect()
}

/// The bytes of a Secret: what a volume or an environment can be made from.
pub fn secret(object: &Value) -> Vec<u8> {
    named(object, &["type", "immutable", "data", "stringData"])
}

/// The bytes of a ConfigMap: what a volume or an environment can be made from.
pub fn config_map(object: &Value) -> Vec<u8> {
    named(object, &["immutable", "data", "binaryData"])
}

/// The bytes of the node's own Node object.
pub fn node(object: &Value) -> Vec<u8> {
    let metadata = section(object, "metadata");
    let mut kept = Map::new();
    copy(&metadata, &mut kept, &["name", "labels"]);
    let annotations: Map<String, Value> = metadata
        .get("annotations")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .filter(|(k, _)| NODE_ANNOTATIONS.contains(&k.as_str()))
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect();
    if !annotations.is_empty() {
        kept.insert("annotations".into(), Value::Object(annotations));
    }
    let mut spec = Map::new();
    copy(
        &section(object, "spec"),
        &mut spec,
        &["podCIDR", "podCIDRs", "unschedulable"],
    );
    bytes(json!({ "metadata": kept, "spec": spec }))
}

/// One line of a namespace's Services (the element described at `Kind::Services`), or `None` for a
/// Service that gives no environment: headless, without an address yet, or a name of something
/// outside.
pub fn service(object: &Value) -> Option<Value> {
    let name = object.pointer("/metadata/name")?.as_str()?;
    let ip = object.pointer("/spec/clusterIP")?.as_str()?;
    if ip.is_empty() || ip == "None" {
        return None;
    }
    // In the order of the spec: the first port is the one that `NAME_SERVICE_PORT` names.
    let ports: Vec<Value> = list(object.pointer("/spec/ports"))
        .filter_map(|port| {
            Some(json!({
                "name": port.get("name").and_then(Value::as_str).unwrap_or(""),
                "port": port.get("port")?.as_u64()?,
                "protocol": port.get("protocol").and_then(Value::as_str).unwrap_or("TCP"),
            }))
        })
        .collect();
    Some(json!({ "name": name, "ip": ip, "ports": ports }))
}

/// Bytes that depend on the content alone: keys sorted at every depth.
pub fn bytes(mut value: Value) -> Vec<u8> {
    value.sort_all_objects();
    value.to_string().into_bytes()
}

fn named(object: &Value, fields: &[&str]) -> Vec<u8> {
    let mut metadata = Map::new();
    copy(
        &section(object, "metadata"),
        &mut metadata,
        &["name", "namespace"],
    );
    let mut out = Map::new();
    out.insert("metadata".into(), Value::Object(metadata));
    if let Some(all) = object.as_object() {
        copy(all, &mut out, fields);
    }
    bytes(Value::Object(out))
}

fn copy(from: &Map<String, Value>, to: &mut Map<String, Value>, fields: &[&str]) {
    for field in fields {
        if let Some(value) = from.get(*field) {
            to.insert((*field).into(), value.clone());
        }
    }
}

fn section(object: &Value, name: &str) -> Map<String, Value> {
    let section = object.get(name).and_then(Value::as_object);
    section.cloned().unwrap_or_default()
}

fn list(value: Option<&Value>) -> impl Iterator<Item = &Value> {
    value.and_then(Value::as_array).into_iter().flatten()
}

fn drop_noise(metadata: &mut Map<String, Value>) {
    let Some(Value::Object(annotations)) = metadata.get_mut("annotations") else {
        return;
    };
    annotations.retain(|key, _| !NOISE.contains(&key.as_str()));
    if annotations.is_empty() {
        metadata.remove("annotations");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn created() -> Value {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": "web", "namespace": "shop", "uid": "u1", "resourceVersion": "10",
                "generation": 1, "creationTimestamp": "2026-01-01T00:00:00Z",
                "managedFields": [{"manager": "kubectl"}],
                "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}"},
            },
            "spec": {
                "nodeName": "edge-1", "aFieldOf2031": {"b": 1, "a": 2},
                "containers": [{"name": "c", "image": "i"}],
                "readinessGates": [{"conditionType": "lb/ready"}],
                "tolerations": [{"key": "node.kubernetes.io/not-ready", "tolerationSeconds": 300}],
            },
            "status": {"phase": "Pending", "qosClass": "BestEffort"},
        })
    }

    fn text(bytes: Vec<u8>) -> String {
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn a_status_that_the_edge_wrote_does_not_come_back_to_it() {
        let before = pod(&created());
        let mut patched = created();
        patched["metadata"]["resourceVersion"] = json!("11");
        patched["metadata"]["managedFields"] = json!([{"manager": "cloudcore", "time": "now"}]);
        patched["status"] = json!({
            "phase": "Running", "podIP": "10.0.0.7", "startTime": "2026-01-01T00:00:01Z",
            "observedGeneration": 1,
            "conditions": [
                {"type": "Ready", "status": "True"}, {"type": "ContainersReady", "status": "True"},
                {"type": "Initialized", "status": "True"}, {"type": "PodScheduled", "status": "True"},
                {"type": "PodReadyToStartContainers", "status": "True"},
            ],
            "containerStatuses": [{"name": "c", "ready": true, "restartCount": 1}],
        });
        assert_eq!(text(pod(&patched)), text(before));
    }

    #[test]
    fn a_list_and_a_watch_and_another_order_of_keys_give_the_same_bytes() {
        let mut listed = created();
        let map = listed.as_object_mut().unwrap();
        map.shift_remove("kind");
        map.shift_remove("apiVersion");
        let status = map.shift_remove("status").unwrap();
        map.shift_insert(0, "status".into(), status);
        listed["spec"]["aFieldOf2031"] = json!({"a": 2, "b": 1});
        assert_eq!(text(pod(&listed)), text(pod(&created())));
    }

    #[test]
    fn what_others_write_into_a_status_goes_down() {
        let cases = [
            (
                json!({"phase": "Failed", "reason": "Evicted", "message": "m", "podIP": "1"}),
                json!({"phase": "Failed", "reason": "Evicted"}),
            ),
            (json!({"phase": "Succeeded"}), json!({"phase": "Succeeded"})),
            (
                json!({"conditions": [
                   {"type": "lb/ready", "status": "True", "lastProbeTime": "t", "message": "m"},
                   {"type": "DisruptionTarget", "status": "True"},
                ]}),
                json!({"conditions": [{"status": "True", "type": "lb/ready"}]}),
            ),
            (
                json!({"resourceClaimStatuses": [{"name": "gpu", "resourceClaimName": "x"}], "resize": "Proposed"}),
                json!({"resize": "Proposed", "resourceClaimStatuses": [{"name": "gpu", "resourceClaimName": "x"}]}),
            ),
        ];
        for (status, want) in cases {
            let mut object = created();
            object["status"] = status;
            let out: Value = serde_json::from_slice(&pod(&object)).unwrap();
            assert_eq!(out.get("status"), Some(&want));
        }
    }

    #[test]
    fn a_pod_keeps_unknown_fields_and_loses_only_noise() {
        let mut object = created();
        object["metadata"]["annotations"]["shop/owner"] = json!("ann");
        object["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:01:00Z");
        object["metadata"]["deletionGracePeriodSeconds"] = json!(1);
        let out: Value = serde_json::from_slice(&pod(&object)).unwrap();
        assert_eq!(
            out["metadata"],
            json!({
                "annotations": {"shop/owner": "ann"}, "creationTimestamp": "2026-01-01T00:00:00Z",
                "deletionGracePeriodSeconds": 1, "deletionTimestamp": "2026-01-01T00:01:00Z",
                "generation": 1, "name": "web", "namespace": "shop", "uid": "u1",
            })
        );
        assert_eq!(out["spec"]["aFieldOf2031"], json!({"a": 2, "b": 1}));
        assert_eq!(out["spec"]["tolerations"], Value::Null);
    }

    #[test]
    fn a_secret_and_a_config_map_are_their_data() {
        let object = json!({
            "kind": "Secret", "type": "Opaque", "immutable": true, "data": {"b": "MQ==", "a": ""},
            "binaryData": {"x": "AA=="},
            "metadata": {"name": "s", "namespace": "n", "uid": "u", "resourceVersion": "3",
                         "labels": {"a": "b"}, "annotations": {"c": "d"}},
        });
        assert_eq!(
            text(secret(&object)),
            r#"{"data":{"a":"","b":"MQ=="},"immutable":true,"metadata":{"name":"s","namespace":"n"},"type":"Opaque"}"#
        );
        assert_eq!(
            text(config_map(&object)),
            r#"{"binaryData":{"x":"AA=="},"data":{"a":"","b":"MQ=="},"immutable":true,"metadata":{"name":"s","namespace":"n"}}"#
        );
    }

    #[test]
    fn a_node_is_its_labels_and_its_range() {
        let object = json!({
            "metadata": {"name": "e", "uid": "u", "resourceVersion": "9", "labels": {"z": "1", "a": "2"},
                "annotations": {"node.alpha.kubernetes.io/ttl": "0",
                    "volumes.kubernetes.io/controller-managed-attach-detach": "true"}},
            "spec": {"podCIDR": "10.0.0.0/24", "podCIDRs": ["10.0.0.0/24"], "providerID": "edge://x",
                     "taints": [{"key": "k"}], "unschedulable": true},
            "status": {"images": []},
        });
        assert_eq!(
            text(node(&object)),
            r#"{"metadata":{"annotations":{"volumes.kubernetes.io/controller-managed-attach-detach":"true"},"labels":{"a":"2","z":"1"},"name":"e"},"spec":{"podCIDR":"10.0.0.0/24","podCIDRs":["10.0.0.0/24"],"unschedulable":true}}"#
        );
    }

    #[test]
    fn a_service_is_a_line_unless_it_gives_no_environment() {
        let of = |spec: Value| service(&json!({"metadata": {"name": "db"}, "spec": spec}));
        assert_eq!(
            of(
                json!({"clusterIP": "10.0.0.1", "ports": [{"port": 81}, {"name": "b", "port": 80, "protocol": "UDP"}]})
            ),
            Some(json!({"name": "db", "ip": "10.0.0.1", "ports": [
                {"name": "", "port": 81, "protocol": "TCP"},
                {"name": "b", "port": 80, "protocol": "UDP"}]}))
        );
        for none in [
            json!({"clusterIP": "None"}),
            json!({"clusterIP": ""}),
            json!({}),
        ] {
            assert_eq!(of(none), None);
        }
    }

    #[test]
    fn a_malformed_object_is_trimmed_to_nothing_rather_than_trusted() {
        for odd in [
            json!(null),
            json!([]),
            json!({"metadata": 1, "spec": "x", "status": []}),
        ] {
            assert_eq!(text(pod(&odd)), r#"{"metadata":{},"spec":{}}"#);
            assert_eq!(service(&odd), None);
        }
    }
}
