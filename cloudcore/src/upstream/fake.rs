//! An API server in memory for the tests of this module: Pods and one Node with resourceVersions,
//! strategic merge of statuses, UIDs that are checked, faults on demand, and a watch that may lag.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use common::ids::NodeName;
use futures::FutureExt;
use futures::future::BoxFuture;
use serde_json::{Map, Value, json};
use tokio::sync::watch;

use super::views::{Fresh, NodeView, NodeViews, PodView, PodViews};
use super::writer::{ApiWriter, Call, WriteError};

pub(super) const NODE: &str = "edge-1";

#[derive(Default)]
struct State {
    revision: u64,
    /// By name; the namespace is always the same.
    pods: BTreeMap<String, Value>,
    node: Option<Value>,
    events: BTreeMap<String, Value>,
    /// What the watch shows, by UID, and of the Node.
    seen: BTreeMap<String, Value>,
    node_seen: Option<Value>,
    faults: VecDeque<WriteError>,
    /// Answers every call while set.
    down: Option<WriteError>,
    calls: Vec<Call>,
    /// Fields of a status that this server does not know.
    drops: Vec<&'static str>,
}

pub(super) struct FakeApi {
    state: Mutex<State>,
    /// Calls wait here while it is false.
    pub(super) open: watch::Sender<bool>,
}

impl FakeApi {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            open: watch::Sender::new(true),
        })
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(super) fn put_pod(&self, name: &str, uid: &str, node: &str, status: Value) {
        let pod = json!({"metadata": {"name": name, "namespace": "shop", "uid": uid},
            "spec": {"nodeName": node}, "status": status});
        let mut state = self.state();
        let pod = state.stamped(pod);
        state.pods.insert(name.into(), pod);
    }

    pub(super) fn put_node(&self, uid: &str, status: Value) {
        let mut state = self.state();
        let node = state.stamped(json!({"metadata": {"uid": uid}, "status": status}));
        state.node = Some(node);
    }

    pub(super) fn remove_node(&self) {
        self.state().node = None;
    }

    /// Somebody else changes a Pod.
    pub(super) fn edit(&self, name: &str, edit: impl FnOnce(&mut Value)) {
        let mut state = self.state();
        let mut pod = state.pods[name].clone();
        edit(&mut pod);
        let pod = state.stamped(pod);
        state.pods.insert(name.into(), pod);
    }

    pub(super) fn edit_node(&self, edit: impl FnOnce(&mut Value)) {
        let mut state = self.state();
        let mut node = state.node.clone().unwrap();
        edit(&mut node);
        state.node = Some(state.stamped(node));
    }

    pub(super) fn remove_pod(&self, name: &str) {
        self.state().pods.remove(name);
    }

    pub(super) fn pod_status(&self, name: &str) -> Value {
        self.state().pods[name]["status"].clone()
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.state().pods.contains_key(name)
    }

    pub(super) fn node_status(&self) -> Value {
        self.state().node.as_ref().unwrap()["status"].clone()
    }

    pub(super) fn events(&self) -> Vec<Value> {
        self.state().events.values().cloned().collect()
    }

    pub(super) fn forget_events(&self) {
        self.state().events.clear();
    }

    /// The watch catches up.
    pub(super) fn sync(&self) {
        let mut state = self.state();
        let uid = |p: &Value| p["metadata"]["uid"].as_str().unwrap().to_string();
        state.seen = state.pods.values().map(|p| (uid(p), p.clone())).collect();
        state.node_seen = state.node.clone();
    }

    pub(super) fn fail(&self, faults: impl IntoIterator<Item = WriteError>) {
        self.state().faults.extend(faults);
    }

    pub(super) fn down(&self, error: Option<WriteError>) {
        self.state().down = error;
    }

    pub(super) fn drop_field(&self, field: &'static str) {
        self.state().drops.push(field);
    }

    pub(super) fn calls(&self) -> Vec<Call> {
        self.state().calls.clone()
    }

    /// What was called, a word each, since the last look.
    pub(super) fn verbs(&self) -> Vec<&'static str> {
        let calls = std::mem::take(&mut self.state().calls);
        let word = |c: &Call| match c {
            Call::PatchPodStatus { body, .. } if body.get("status").is_none() => "ask",
            Call::PatchNodeStatus { body } if body.get("status").is_none() => "ask-node",
            Call::PatchPodStatus { .. } => "patch",
            Call::DeletePod { .. } => "delete",
            Call::PatchNodeStatus { .. } => "patch-node",
            Call::CreateEvent { .. } => "event",
            Call::PatchEvent { .. } => "count",
            Call::RequestToken { .. } => "token",
        };
        calls.iter().map(word).collect()
    }
}

impl State {
    fn stamped(&mut self, mut object: Value) -> Value {
        self.revision += 1;
        object["metadata"]["resourceVersion"] = self.revision.to_string().into();
        object
    }

    fn serve(&mut self, call: Call) -> Result<Value, WriteError> {
        match call {
            Call::PatchPodStatus { name, body, .. } => {
                let pod = self.pods.get(&name).cloned().ok_or(WriteError::Missing)?;
                let pod = self.patched(pod, &body)?;
                self.pods.insert(name, pod.clone());
                Ok(pod)
            }
            Call::PatchNodeStatus { body } => {
                let node = self.node.clone().ok_or(WriteError::Missing)?;
                let node = self.patched(node, &body)?;
                self.node = Some(node.clone());
                Ok(node)
            }
            Call::DeletePod { name, uid, .. } => {
                let pod = self.pods.get(&name).cloned().ok_or(WriteError::Missing)?;
                if pod["metadata"]["uid"] != uid {
                    return Err(WriteError::AnotherObject);
                }
                if pod["metadata"]["finalizers"].is_null() {
                    self.pods.remove(&name);
                }
                Ok(pod)
            }
            Call::CreateEvent { body, .. } => {
                let name = body["metadata"]["name"].as_str().unwrap().to_string();
                if self.events.insert(name, body.clone()).is_some() {
                    return Err(WriteError::Exists);
                }
                Ok(body)
            }
            Call::PatchEvent { name, body, .. } => {
                let event = self.events.get_mut(&name).ok_or(WriteError::Missing)?;
                for (k, v) in body.as_object().unwrap() {
                    event[k] = v.clone();
                }
                Ok(event.clone())
            }
            Call::RequestToken { body, .. } => Ok(json!({
                "spec": body["spec"], "status": {"token": "the-secret"}
            })),
        }
    }

    fn patched(&mut self, mut object: Value, body: &Value) -> Result<Value, WriteError> {
        let said = |field: &str| body["metadata"].get(field).filter(|v| !v.is_null());
        if said("uid").is_some_and(|uid| *uid != object["metadata"]["uid"]) {
            return Err(WriteError::AnotherObject);
        }
        let revision = &object["metadata"]["resourceVersion"];
        if said("resourceVersion").is_some_and(|r| r != revision) {
            return Err(WriteError::Conflict);
        }
        let Some(patch) = body.get("status") else {
            return Ok(object);
        };
        let mut patch = patch.clone();
        for field in &self.drops {
            drop_from(&mut patch, field);
        }
        let before = object["status"].clone();
        merge(&mut object["status"], &patch);
        Ok(if object["status"] == before {
            object
        } else {
            self.stamped(object)
        })
    }
}

/// Removes `FIELD`, or `LIST/FIELD` from each element.
fn drop_from(value: &mut Value, path: &str) {
    match path.split_once('/') {
        None => {
            value.as_object_mut().map(|members| members.remove(path));
        }
        Some((list, rest)) => {
            let elements = value.get_mut(list).and_then(Value::as_array_mut);
            elements
                .into_iter()
                .flatten()
                .for_each(|e| drop_from(e, rest));
        }
    }
}

/// A strategic merge patch, as far as these statuses need it.
fn merge(into: &mut Value, patch: &Value) {
    if !into.is_object() {
        *into = Value::Object(Map::new());
    }
    let into = into.as_object_mut().unwrap();
    for (field, part) in patch.as_object().unwrap() {
        match part {
            Value::Null => {
                into.remove(field);
            }
            Value::Array(items) if field == "conditions" => {
                let list = into.entry(field.clone()).or_insert(json!([]));
                items
                    .iter()
                    .for_each(|item| merge_condition(list.as_array_mut().unwrap(), item));
            }
            Value::Array(items) => {
                let plain = items.iter().filter(|i| i.get("$patch").is_none());
                into.insert(field.clone(), plain.cloned().collect());
            }
            Value::Object(_) => merge(into.entry(field.clone()).or_insert(json!({})), part),
            Value::Bool(_) | Value::Number(_) | Value::String(_) => {
                into.insert(field.clone(), part.clone());
            }
        }
    }
}

fn merge_condition(list: &mut Vec<Value>, item: &Value) {
    let at = list.iter().position(|c| c["type"] == item["type"]);
    match (at, item.get("$patch")) {
        (Some(at), Some(_)) => {
            list.remove(at);
        }
        (Some(at), None) => merge(&mut list[at], item),
        (None, Some(_)) => {}
        (None, None) => list.push(item.clone()),
    }
}

impl ApiWriter for FakeApi {
    fn send<'a>(
        &'a self,
        node: &'a NodeName,
        call: Call,
    ) -> BoxFuture<'a, Result<Value, WriteError>> {
        assert_eq!(node.as_str(), NODE);
        async move {
            self.state().calls.push(call.clone());
            let mut open = self.open.subscribe();
            open.wait_for(|open| *open).await.unwrap();
            let mut state = self.state();
            let fault = state.down.clone().or_else(|| state.faults.pop_front());
            fault.map_or_else(|| state.serve(call), Err)
        }
        .boxed()
    }
}

fn revision(object: &Value) -> u64 {
    object["metadata"]["resourceVersion"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap()
}

impl PodViews for FakeApi {
    fn pod(&self, uid: &str) -> Option<PodView> {
        let state = self.state();
        let pod = state.seen.get(uid)?;
        let text = |v: &Value| v.as_str().unwrap().into();
        Some(PodView {
            namespace: text(&pod["metadata"]["namespace"]),
            name: text(&pod["metadata"]["name"]),
            uid: uid.into(),
            resource_version: revision(pod),
            node: NodeName::parse(pod["spec"]["nodeName"].as_str().unwrap()).unwrap(),
            deleting: !pod["metadata"]["deletionTimestamp"].is_null(),
            service_account: "web".into(),
            status: pod["status"].to_string().into_bytes().into(),
        })
    }
}

impl NodeViews for FakeApi {
    fn node(&self, _: &NodeName) -> Option<NodeView> {
        let state = self.state();
        let node = state.node_seen.as_ref()?;
        Some(NodeView {
            uid: node["metadata"]["uid"].as_str().unwrap().into(),
            resource_version: revision(node),
            status: node["status"].to_string().into_bytes().into(),
        })
    }
}

/// A claim that a test holds and lets go.
#[derive(Default)]
pub(super) struct FakeClaim {
    fresh: AtomicBool,
    pub(super) doubts: AtomicUsize,
}

impl FakeClaim {
    pub(super) fn new(fresh: bool) -> Arc<Self> {
        let claim = Self::default();
        claim.set(fresh);
        Arc::new(claim)
    }

    pub(super) fn set(&self, fresh: bool) {
        self.fresh.store(fresh, Ordering::Relaxed);
    }
}

impl Fresh for FakeClaim {
    fn fresh(&self) -> bool {
        self.fresh.load(Ordering::Relaxed)
    }

    fn doubt(&self) {
        self.doubts.fetch_add(1, Ordering::Relaxed);
    }
}
