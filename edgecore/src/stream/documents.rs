//! The documents of the node's API: what should run, what does, and how the node is set.

use std::collections::BTreeMap;

use common::ids::Kind;
use serde_json::{Map, Value, json};

use super::{Deps, Refusal};
use crate::cri::{api, convert};
use crate::store::desired::DesiredPod;

/// `/pods`: every Pod that should run here or is on its way out, with what was last said of it.
pub(super) fn pods(deps: &Deps) -> String {
    let all = deps.desired.pods().into_iter();
    let pods = all.filter(|p| p.key.kind == Kind::Pod);
    list(pods.filter_map(|p| pod(deps, &p)).collect())
}

fn list(items: Vec<Value>) -> String {
    json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items}).to_string()
}

/// Nothing for an object that cannot be read: the Pod manager has said so.
fn pod(deps: &Deps, desired: &DesiredPod) -> Option<Value> {
    let mut pod: Map<String, Value> = serde_json::from_slice(&desired.json).ok()?;
    // In a list the kubelet leaves the kind out.
    pod.shift_remove("kind");
    pod.shift_remove("apiVersion");
    if let Some(report) = deps.reports.pod(&desired.key) {
        let theirs = pod.shift_remove("status").unwrap_or_default();
        pod.insert("status".into(), merged(theirs, report.status));
    }
    Some(Value::Object(pod))
}

/// The node's own status over what others have written in the cloud (pure).
fn merged(theirs: Value, ours: Value) -> Value {
    let (Value::Object(mut status), Value::Object(ours)) = (theirs, ours.clone()) else {
        return ours;
    };
    let others = status.shift_remove("conditions");
    status.extend(ours);
    let mine = status.get("conditions").and_then(Value::as_array);
    let mut conditions = mine.cloned().unwrap_or_default();
    let known: Vec<Value> = conditions.iter().map(|c| c["type"].clone()).collect();
    let others = others.as_ref().and_then(Value::as_array);
    let more = others.into_iter().flatten();
    conditions.extend(more.filter(|c| !known.contains(&c["type"])).cloned());
    if !conditions.is_empty() {
        status.insert("conditions".into(), conditions.into());
    }
    Value::Object(status)
}

/// `/runningpods/`: the Pods that the runtime runs a container of, whoever made them.
pub(super) async fn running_pods(deps: &Deps) -> Result<String, Refusal> {
    let containers = deps.cri.list_containers(None).await?;
    let running = i32::from(api::ContainerState::ContainerRunning);
    let mut pods: BTreeMap<&str, (Value, Vec<Value>)> = BTreeMap::new();
    for container in containers.iter().filter(|c| c.state == running) {
        let label = |key: &str| container.labels.get(key).map_or("", String::as_str);
        let uid = label(convert::POD_UID);
        let metadata = json!({
            "name": label(convert::POD_NAME),
            "namespace": label(convert::POD_NAMESPACE),
            "uid": uid,
        });
        let image = container.image.as_ref().map_or("", |i| i.image.as_str());
        let shown = json!({
            "name": label(convert::CONTAINER_NAME), "image": image, "resources": {},
        });
        let entry = pods.entry(uid).or_insert_with(|| (metadata, Vec::new()));
        entry.1.push(shown);
    }
    let items = pods.into_values().map(|(metadata, containers)| {
        json!({"metadata": metadata, "spec": {"containers": containers}, "status": {}})
    });
    Ok(list(items.collect()))
}

/// `/configz`: the keys of `KubeletConfiguration` (kubelet.config.k8s.io/v1beta1) that this node
/// has a value for.
pub(super) fn configz(deps: &Deps) -> String {
    let settings = &deps.settings;
    let environment = deps.environment.borrow().clone();
    let mut config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": settings.cri,
        "maxPods": settings.most_pods,
        "podLogsDir": settings.pod_logs,
    });
    if let Some(environment) = environment {
        config["clusterDomain"] = environment.cluster_domain.into();
        let dns: Vec<String> = environment
            .cluster_dns
            .iter()
            .map(|ip| ip.to_string())
            .collect();
        config["clusterDNS"] = dns.into();
    }
    json!({"kubeletconfig": config}).to_string()
}

/// `/healthz`: that it is answered shows that tasks run; the state's sender ends with the Pod manager.
pub(super) fn healthz(deps: &Deps) -> Result<&'static str, Refusal> {
    match deps.runtime.has_changed() {
        Ok(_) => Ok("ok"),
        Err(_) => Err(Refusal::Unwell),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_wrote_in_the_cloud_stays_beside_the_nodes_own_words() {
        let theirs = json!({
            "phase": "Pending", "resourceClaimStatuses": [{"name": "a"}],
            "conditions": [{"type": "Ready", "status": "False"}, {"type": "gate", "status": "True"}],
        });
        let ours = json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]});
        let merged = merged(theirs, ours);
        assert_eq!(merged["phase"], "Running");
        assert_eq!(merged["resourceClaimStatuses"][0]["name"], "a");
        let conditions = merged["conditions"].as_array().unwrap();
        assert_eq!(conditions.len(), 2);
        assert_eq!(conditions[0]["status"], "True");
        assert_eq!(conditions[1]["type"], "gate");
    }
}
