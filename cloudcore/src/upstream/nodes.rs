//! What to write to the API server about a Node, given what it holds and what the node reports.
//!
//! - Takes: the last report, the Node as known, the endpoint where the API server reaches the node.
//! - Gives: a strategic merge patch of `nodes/status`, or nothing when nothing but time went by:
//!   liveness is the Lease's work, there are no heartbeats.
//! - Never: does I/O; removes resources or conditions that others put there (the kubelet leaves
//!   extended resources of others alone as well).

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::difference::{self, Conditions, Field, Rule, rfc3339};
use super::views::Endpoint;

const fn field(name: &'static str, rule: Rule) -> Field {
    Field {
        name,
        rule,
        removable: false,
    }
}

/// What a node owns of `NodeStatus`; `volumesAttached` is the attach-detach controller's.
const FIELDS: &[Field] = &[
    field("capacity", Rule::Members),
    field("allocatable", Rule::Members),
    field("addresses", Rule::KeyedList),
    field("daemonEndpoints", Rule::Members),
    field("nodeInfo", Rule::Members),
    field("images", Rule::Whole),
    field("volumesInUse", Rule::Whole),
    field("runtimeHandlers", Rule::Whole),
    field("features", Rule::Members),
    field("declaredFeatures", Rule::Whole),
];

const CONDITIONS: Conditions = Conditions {
    // A node may report what conditions it likes, but the network's is a route controller's.
    owned: |kind| kind != "NetworkUnavailable",
    removable: &[],
};

/// The report as it goes up: with an endpoint, the addresses and the port that lead to it.
pub(super) fn with_endpoint(mut report: Value, endpoint: Option<&Endpoint>) -> Value {
    if let (Some(endpoint), Some(members)) = (endpoint, report.as_object_mut()) {
        members.insert("addresses".into(), endpoint.addresses.clone().into());
        let port = json!({"kubeletEndpoint": {"Port": endpoint.kubelet_port}});
        members.insert("daemonEndpoints".into(), port);
    }
    report
}

/// The patch of `status` that makes `current` say what `report` says. When anything differs, every
/// condition of the report gets `now` as its `lastHeartbeatTime`; when nothing does, there is none.
pub(super) fn status_patch(current: &Value, report: &Value, now: Timestamp) -> Option<Value> {
    let mut patch = Map::new();
    for one in FIELDS {
        if let Some(part) = difference::field(*one, current, report) {
            patch.insert(one.name.into(), part);
        }
    }
    let mut conditions = difference::conditions(&CONDITIONS, current, report, now);
    if patch.is_empty() && conditions.is_empty() {
        return None;
    }
    let kind = |c: &Value| c.get("type").and_then(Value::as_str).map(str::to_string);
    for (same, _) in difference::listed(report) {
        let sent = conditions.iter().any(|c| kind(c).as_deref() == Some(same));
        if !sent && (CONDITIONS.owned)(same) {
            conditions.push(json!({"type": same}));
        }
    }
    for condition in &mut conditions {
        condition["lastHeartbeatTime"] = rfc3339(now).into();
    }
    if !conditions.is_empty() {
        patch.insert("conditions".into(), conditions.into());
    }
    Some(Value::Object(patch))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: &str = "2026-11-23T12:00:00Z";
    const T1: &str = "2026-11-23T10:00:00Z";

    fn patch(current: &Value, report: &Value) -> Option<Value> {
        status_patch(current, report, NOW.parse().unwrap())
    }

    fn condition(kind: &str, status: &str, reason: &str) -> Value {
        json!({"type": kind, "status": status, "reason": reason, "lastTransitionTime": T1,
            "lastHeartbeatTime": T1})
    }

    #[test]
    fn nothing_is_sent_for_time_alone() {
        let report = json!({"conditions": [condition("Ready", "True", "KubeletReady")],
            "addresses": [{"type": "Hostname", "address": "a"}], "capacity": {"cpu": "4"}});
        let mut later = report.clone();
        later["conditions"][0]["lastHeartbeatTime"] = NOW.into();
        assert_eq!(patch(&report, &later), None);
    }

    #[test]
    fn a_lapsed_lease_is_repaired_with_the_clouds_times() {
        let report = json!({"conditions": [
            condition("MemoryPressure", "False", "KubeletHasSufficientMemory"),
            condition("Ready", "True", "KubeletReady")]});
        let lapsed = json!({"conditions": [
            condition("NetworkUnavailable", "False", "RouteCreated"),
            condition("MemoryPressure", "False", "KubeletHasSufficientMemory"),
            condition("Ready", "Unknown", "NodeStatusUnknown")]});
        let want = json!({"conditions": [
            {"type": "Ready", "status": "True", "reason": "KubeletReady",
                "lastTransitionTime": NOW, "lastHeartbeatTime": NOW},
            {"type": "MemoryPressure", "lastHeartbeatTime": NOW},
        ]});
        assert_eq!(patch(&lapsed, &report), Some(want));
    }

    #[test]
    fn addresses_are_replaced_not_merged_by_type() {
        let current = json!({"addresses": [{"type": "InternalIP", "address": "10.0.0.1"}]});
        let report = json!({"addresses": [{"type": "InternalIP", "address": "10.0.0.2"}]});
        let want = json!({"addresses": [{"$patch": "replace"},
            {"type": "InternalIP", "address": "10.0.0.2"}]});
        assert_eq!(patch(&current, &report), Some(want));
    }

    #[test]
    fn members_are_set_and_those_of_others_stay() {
        let current = json!({"capacity": {"cpu": "4", "example.com/dongle": "3"},
            "volumesAttached": [{"name": "v"}], "nodeInfo": {"osImage": "a", "swap": {"capacity": 1}}});
        let report = json!({"capacity": {"cpu": "8"}, "nodeInfo": {"osImage": "b", "swap": {"capacity": 2}}});
        let want = json!({"capacity": {"cpu": "8"}, "nodeInfo": {"osImage": "b", "swap": {"capacity": 2}}});
        assert_eq!(patch(&current, &report), Some(want));
    }

    #[test]
    fn a_node_made_again_gets_everything() {
        let report = json!({"capacity": {"cpu": "8"}, "images": [{"names": ["x"]}],
            "conditions": [condition("Ready", "True", "KubeletReady")]});
        let got = patch(&json!({}), &report).unwrap();
        for part in ["capacity", "images", "conditions"] {
            assert!(got.get(part).is_some(), "{part}");
        }
        assert_eq!(got["conditions"][0]["lastTransitionTime"], T1);
    }

    #[test]
    fn an_endpoint_takes_the_place_of_the_devices_own_addresses() {
        let report = json!({"addresses": [{"type": "InternalIP", "address": "192.168.1.5"}]});
        let endpoint = Endpoint {
            addresses: vec![json!({"type": "InternalIP", "address": "10.244.0.9"})],
            kubelet_port: 20001,
        };
        let got = with_endpoint(report.clone(), Some(&endpoint));
        assert_eq!(
            got["addresses"],
            json!([{"type": "InternalIP", "address": "10.244.0.9"}])
        );
        assert_eq!(
            got["daemonEndpoints"],
            json!({"kubeletEndpoint": {"Port": 20001}})
        );
        assert_eq!(with_endpoint(report.clone(), None), report);
    }
}
