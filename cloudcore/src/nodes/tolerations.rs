//! Pods on an edge node outlive its absence: no eviction, no duplicate elsewhere.
//!
//! The API server gives each Pod two tolerations that end after 300 s (not-ready, unreachable).
//! CloudCore takes the end from those of Pods bound to an edge node, unless the Node's label
//! `edge.cloudcore.io/autonomy` says `disabled`. Nothing restarts; adding a toleration beside them
//! would not help, since the first that matches counts.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, Toleration};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::kube::{Fault, is_absent, is_conflict, status_code};

/// The Node's label that turns autonomy off, and its value.
pub const AUTONOMY: (&str, &str) = ("edge.cloudcore.io/autonomy", "disabled");

const ABSENCE: [&str; 2] = [
    "node.kubernetes.io/not-ready",
    "node.kubernetes.io/unreachable",
];
const RETRY: Duration = Duration::from_secs(5);

/// The tolerations without the two ends, if one of them has one.
pub fn endless(tolerations: &[Toleration]) -> Option<Vec<Toleration>> {
    let ends = |t: &Toleration| {
        let key = t.key.as_deref().unwrap_or("");
        // What an operator wrote with another effect or operator is theirs.
        t.toleration_seconds.is_some()
            && ABSENCE.contains(&key)
            && t.operator.as_deref() == Some("Exists")
            && t.effect.as_deref() == Some("NoExecute")
    };
    if !tolerations.iter().any(ends) {
        return None;
    }
    let without = |t: &Toleration| Toleration {
        toleration_seconds: t.toleration_seconds.filter(|_| !ends(t)),
        ..t.clone()
    };
    Some(tolerations.iter().map(without).collect())
}

/// What of a Pod that is bound to an edge node decides.
#[derive(Debug, Clone, Copy)]
pub struct BoundPod<'a> {
    pub namespace: &'a str,
    pub name: &'a str,
    pub uid: &'a str,
    pub resource_version: &'a str,
    pub deleting: bool,
    pub tolerations: &'a [Toleration],
}

impl<'a> BoundPod<'a> {
    /// `None` for a Pod that is bound nowhere.
    pub fn read(pod: &'a Pod) -> Option<Self> {
        let (meta, spec) = (&pod.metadata, pod.spec.as_ref()?);
        spec.node_name.as_ref()?;
        Some(Self {
            namespace: meta.namespace.as_deref()?,
            name: meta.name.as_deref()?,
            uid: meta.uid.as_deref()?,
            resource_version: meta.resource_version.as_deref()?,
            deleting: meta.deletion_timestamp.is_some(),
            tolerations: spec.tolerations.as_deref().unwrap_or_default(),
        })
    }
}

/// The patch that makes a bound Pod outlive its node's absence; `None` when nothing is to change.
/// It holds for the Pod as it was seen: another UID or a later change refuses it.
pub fn patch(pod: &BoundPod<'_>) -> Option<Value> {
    if pod.deleting {
        return None;
    }
    let tolerations = endless(pod.tolerations)?;
    Some(json!({
        "metadata": {"uid": pod.uid, "resourceVersion": pod.resource_version},
        "spec": {"tolerations": tolerations},
    }))
}

type PodKey = (String, String);

#[derive(Default)]
struct Inner {
    /// Coalesced by Pod, so that it is bounded by the Pods on edge nodes.
    waiting: Mutex<BTreeMap<PodKey, Value>>,
    wake: Notify,
}

/// Takes Pods as the watch shows them. Cheap to clone.
#[derive(Clone, Default)]
pub struct Tolerations {
    inner: Arc<Inner>,
}

/// Sends the patches.
pub struct TolerationsTask {
    inner: Arc<Inner>,
    client: Client,
}

impl Tolerations {
    /// `client` acts as CloudCore: a node may not change a Pod's spec.
    pub fn build(client: Client) -> (Self, TolerationsTask) {
        let handle = Self::default();
        let task = TolerationsTask {
            inner: handle.inner.clone(),
            client,
        };
        (handle, task)
    }

    /// Looks at a Pod that is bound to an edge node with autonomy. Called at every event of it: a
    /// Pod that needs nothing costs nothing.
    pub fn observe(&self, pod: &BoundPod<'_>) {
        let key = (pod.namespace.to_string(), pod.name.to_string());
        let mut waiting = self
            .inner
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match patch(pod) {
            Some(patch) => {
                waiting.insert(key, patch);
                self.inner.wake.notify_one();
            }
            None => {
                waiting.remove(&key);
            }
        }
    }
}

impl TolerationsTask {
    /// Ends with the token. One patch at a time: a thousand new Pods take some seconds, and there
    /// are five minutes.
    pub async fn run(self, shutdown: CancellationToken) {
        loop {
            let next = {
                let mut waiting = self
                    .inner
                    .waiting
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                waiting.pop_first()
            };
            let Some((key, patch)) = next else {
                tokio::select! {
                    biased;
                    () = shutdown.cancelled() => return,
                    () = self.inner.wake.notified() => continue,
                }
            };
            let sent = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                sent = self.send(&key, &patch) => sent,
            };
            if let Err(error) = sent {
                tracing::warn!(pod = %format!("{}/{}", key.0, key.1), error = %crate::chain(&Fault(error)), "the Pod's tolerations were not changed");
                self.put_back(key, patch);
                tokio::select! {
                    biased;
                    () = shutdown.cancelled() => return,
                    () = tokio::time::sleep(RETRY) => {}
                }
            }
        }
    }

    async fn send(&self, (namespace, name): &PodKey, patch: &Value) -> Result<(), kube::Error> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let sent = pods
            .patch(name, &PatchParams::default(), &Patch::Merge(patch))
            .await;
        match sent {
            Ok(_) => Ok(()),
            // The Pod went, changed or was succeeded: its next event is looked at again.
            Err(e) if is_absent(&e) || is_conflict(&e) => Ok(()),
            // An admission rule of the cluster forbids it: that is its operator's decision.
            Err(e) if matches!(status_code(&e), Some(403 | 422)) => {
                tracing::warn!(pod = %format!("{namespace}/{name}"), error = %crate::chain(&Fault(e)), "the Pod keeps its default tolerations");
                Ok(())
            }
            Err(e) => Err(e),
        }
    }

    /// Unless a later event has brought a newer patch.
    fn put_back(&self, key: PodKey, patch: Value) {
        let mut waiting = self
            .inner
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        waiting.entry(key).or_insert(patch);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube::fake::FakeApi;

    fn toleration(key: &str, effect: &str, seconds: Option<i64>) -> Toleration {
        Toleration {
            key: Some(key.into()),
            operator: Some("Exists".into()),
            effect: Some(effect.into()),
            toleration_seconds: seconds,
            value: None,
        }
    }

    fn pod(tolerations: Vec<Toleration>) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u", "resourceVersion": "5"},
            "spec": {"nodeName": "a", "containers": [], "tolerations": tolerations},
        }))
        .unwrap()
    }

    #[test]
    fn only_the_ends_of_the_two_default_tolerations_go() {
        let own = toleration("example.com/x", "NoExecute", Some(5));
        let other_effect = toleration(ABSENCE[0], "NoSchedule", Some(5));
        let given = vec![
            own.clone(),
            toleration(ABSENCE[0], "NoExecute", Some(300)),
            toleration(ABSENCE[1], "NoExecute", Some(300)),
            other_effect.clone(),
        ];
        let want = vec![
            own,
            toleration(ABSENCE[0], "NoExecute", None),
            toleration(ABSENCE[1], "NoExecute", None),
            other_effect,
        ];
        assert_eq!(endless(&given), Some(want.clone()));
        assert_eq!(endless(&want), None, "the second look changes nothing");
        assert_eq!(endless(&[]), None);
    }

    #[test]
    fn a_pod_that_ends_or_is_bound_nowhere_is_left_alone() {
        let bound = pod(vec![toleration(ABSENCE[0], "NoExecute", Some(300))]);
        let sent = patch(&BoundPod::read(&bound).unwrap()).unwrap();
        assert_eq!(
            sent["metadata"],
            json!({"uid": "u", "resourceVersion": "5"})
        );
        let mut unbound = bound.clone();
        unbound.spec.as_mut().unwrap().node_name = None;
        assert!(BoundPod::read(&unbound).is_none());
        let ending = BoundPod {
            deleting: true,
            ..BoundPod::read(&bound).unwrap()
        };
        assert!(patch(&ending).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_patch_is_sent_once_and_again_after_a_failure() {
        let fake = FakeApi::new();
        let path = "/api/v1/namespaces/n/pods/p";
        fake.put(
            path,
            serde_json::to_value(pod(vec![toleration(ABSENCE[0], "NoExecute", Some(300))]))
                .unwrap(),
        );
        let seen: Pod = serde_json::from_value(fake.get(path).unwrap()).unwrap();
        let mut failures = 1;
        fake.intercept(move |_, _| (std::mem::take(&mut failures) > 0).then_some(500));
        let (handle, task) = Tolerations::build(fake.client());
        let stop = CancellationToken::new();
        let running = tokio::spawn(task.run(stop.clone()));
        handle.observe(&BoundPod::read(&seen).unwrap());
        tokio::time::sleep(RETRY * 2).await;
        let after: Pod = serde_json::from_value(fake.get(path).unwrap()).unwrap();
        assert_eq!(
            after.spec.unwrap().tolerations.unwrap()[0].toleration_seconds,
            None
        );
        assert_eq!(fake.requests().len(), 2);
        stop.cancel();
        running.await.unwrap();
    }
}
