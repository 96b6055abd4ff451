//! Pods on an edge node outlive its absence: no eviction, no duplicate elsewhere.
//!
//! The API server gives each Pod two tolerations that end after 300 s (not-ready, unreachable).
//! CloudCore takes the end from those of Pods bound to an edge node, unless the Node's label
//! `edge.cloudcore.io/autonomy` says `disabled`. Nothing restarts; adding a toleration beside them
//! would not help, since the first that matches counts.
//!
//! A Pod that is young is left alone while its node is here: the change is a write and a new
//! `metadata.generation`, and many Pods (those of Jobs) are gone before it could matter. Once the node
//! is away it is made at once: docs/decisions/0008-tolerations-late.md.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use common::ids::NodeName;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, Toleration};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::kube::{Fault, is_absent, is_conflict, status_code};

/// The Node's label that turns autonomy off, and its value.
pub const AUTONOMY: (&str, &str) = ("edge.cloudcore.io/autonomy", "disabled");

const ABSENCE: [&str; 2] = [
    "node.kubernetes.io/not-ready",
    "node.kubernetes.io/unreachable",
];
const RETRY: Duration = Duration::from_secs(5);
/// The longest that a Pod is young.
const YOUNG: Duration = Duration::from_secs(600);
/// How often it is seen whether the nodes of young Pods are here. A node's Lease lives longer.
const LOOK: Duration = Duration::from_secs(10);

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

/// How long a Pod with those tolerations is left alone: twice the shortest.
fn grace(tolerations: &[Toleration]) -> Duration {
    let ends = tolerations.iter().filter_map(|t| t.toleration_seconds);
    let shortest = ends.min().and_then(|seconds| u64::try_from(seconds).ok());
    YOUNG.min(Duration::from_secs(shortest.unwrap_or(0)).saturating_mul(2))
}

/// How much of its grace a Pod still has. A clock that is behind the API server's adds nothing.
fn left(pod: &BoundPod<'_>, now: Timestamp) -> Duration {
    let grace = grace(pod.tolerations);
    let created = pod.created.and_then(|text| text.parse::<Timestamp>().ok());
    let age = created.map_or(YOUNG, |created| {
        Duration::try_from(now.duration_since(created)).unwrap_or(Duration::ZERO)
    });
    grace.saturating_sub(age)
}

/// What of a Pod that is bound to an edge node decides.
#[derive(Debug, Clone, Copy)]
pub struct BoundPod<'a> {
    pub node: &'a NodeName,
    pub namespace: &'a str,
    pub name: &'a str,
    pub uid: &'a str,
    pub resource_version: &'a str,
    /// RFC 3339, as the API server wrote it.
    pub created: Option<&'a str>,
    pub deleting: bool,
    pub tolerations: &'a [Toleration],
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

/// A patch, and when it is due unless the node goes away before.
struct Waiting {
    node: NodeName,
    due: Instant,
    patch: Value,
}

/// Whether the node is here: has a session.
pub type IsHere = Box<dyn Fn(&NodeName) -> bool + Send + Sync>;

#[derive(Default)]
struct Inner {
    /// Coalesced by Pod, so that it is bounded by the Pods on edge nodes.
    waiting: Mutex<BTreeMap<PodKey, Waiting>>,
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
    is_here: IsHere,
}

impl Tolerations {
    /// `client` acts as CloudCore: a node may not change a Pod's spec.
    pub fn build(client: Client, is_here: IsHere) -> (Self, TolerationsTask) {
        let handle = Self::default();
        let task = TolerationsTask {
            inner: handle.inner.clone(),
            client,
            is_here,
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
                let due = Instant::now() + left(pod, Timestamp::now());
                let node = pod.node.clone();
                waiting.insert(key, Waiting { node, due, patch });
                self.inner.wake.notify_one();
            }
            None => {
                waiting.remove(&key);
            }
        }
    }
}

/// What there is to do.
enum Next {
    Due(PodKey, Waiting),
    /// Something may be due then.
    At(Instant),
    Nothing,
}

impl TolerationsTask {
    /// Ends with the token. One patch at a time: a thousand new Pods take some seconds, and there
    /// are five minutes.
    pub async fn run(self, shutdown: CancellationToken) {
        loop {
            let (key, waits) = match self.next() {
                Next::Due(key, waits) => (key, waits),
                Next::At(due) => tokio::select! {
                    biased;
                    () = shutdown.cancelled() => return,
                    () = self.inner.wake.notified() => continue,
                    () = tokio::time::sleep_until(due) => continue,
                },
                Next::Nothing => tokio::select! {
                    biased;
                    () = shutdown.cancelled() => return,
                    () = self.inner.wake.notified() => continue,
                },
            };
            let sent = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                sent = self.send(&key, &waits.patch) => sent,
            };
            if let Err(error) = sent {
                tracing::warn!(pod = %format!("{}/{}", key.0, key.1), error = %crate::chain(&Fault(error)), "the Pod's tolerations were not changed");
                self.put_back(key, waits);
                tokio::select! {
                    biased;
                    () = shutdown.cancelled() => return,
                    () = tokio::time::sleep(RETRY) => {}
                }
            }
        }
    }

    /// A patch that is due, by its time or because its node is away.
    fn next(&self) -> Next {
        let now = Instant::now();
        let mut waiting = self
            .inner
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let is_due = |w: &Waiting| w.due <= now || !(self.is_here)(&w.node);
        let due = waiting.iter().find(|(_, waits)| is_due(waits));
        if let Some(key) = due.map(|(key, _)| key.clone()) {
            return match waiting.remove(&key) {
                Some(waits) => Next::Due(key, waits),
                None => Next::Nothing,
            };
        }
        let soonest = waiting.values().map(|waits| waits.due).min();
        soonest.map_or(Next::Nothing, |due| Next::At(due.min(now + LOOK)))
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
    fn put_back(&self, key: PodKey, waits: Waiting) {
        let mut waiting = self
            .inner
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let due = Instant::now();
        waiting.entry(key).or_insert(Waiting { due, ..waits });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicBool, Ordering};

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

    static NODE: LazyLock<NodeName> = LazyLock::new(|| NodeName::parse("a").unwrap());

    fn seen<'a>(pod: &'a Pod, created: Option<&'a str>) -> BoundPod<'a> {
        BoundPod {
            node: &NODE,
            namespace: "n",
            name: "p",
            uid: pod.metadata.uid.as_deref().unwrap(),
            resource_version: pod.metadata.resource_version.as_deref().unwrap(),
            created,
            deleting: false,
            tolerations: pod.spec.as_ref().unwrap().tolerations.as_deref().unwrap(),
        }
    }

    #[test]
    fn a_pod_that_ends_is_left_alone() {
        let bound = pod(vec![toleration(ABSENCE[0], "NoExecute", Some(300))]);
        let bound = seen(&bound, None);
        let sent = patch(&bound).unwrap();
        assert_eq!(
            sent["metadata"],
            json!({"uid": "u", "resourceVersion": "5"})
        );
        let ending = BoundPod {
            deleting: true,
            ..bound
        };
        assert!(patch(&ending).is_none());
    }

    #[test]
    fn a_young_pod_has_twice_what_it_tolerates_and_ten_minutes_at_most() {
        let now: Timestamp = "2026-11-27T12:00:10Z".parse().unwrap();
        for (seconds, created, want) in [
            (300, Some("2026-11-27T12:00:10Z"), 600),
            (300, Some("2026-11-27T12:00:00Z"), 590),
            (300, Some("2026-11-27T11:00:00Z"), 0),
            (5, Some("2026-11-27T12:00:10Z"), 10),
            (9000, Some("2026-11-27T12:00:10Z"), 600),
            // The cloud's clock is behind.
            (300, Some("2026-11-27T12:30:00Z"), 600),
            (0, Some("2026-11-27T12:00:10Z"), 0),
            (300, Some("yesterday"), 0),
            (300, None, 0),
        ] {
            let pod = pod(vec![toleration(ABSENCE[0], "NoExecute", Some(seconds))]);
            let left = left(&seen(&pod, created), now);
            assert_eq!(left, Duration::from_secs(want), "{seconds} {created:?}");
        }
    }

    /// How many patches were sent to a Pod that has just been made, `after` so long, when its node
    /// goes away after `gone`.
    async fn sent(gone: Option<Duration>, after: Duration) -> usize {
        let fake = FakeApi::new();
        let path = "/api/v1/namespaces/n/pods/p";
        let pod = pod(vec![toleration(ABSENCE[0], "NoExecute", Some(300))]);
        fake.put(path, serde_json::to_value(pod).unwrap());
        let given: Pod = serde_json::from_value(fake.get(path).unwrap()).unwrap();
        let here = Arc::new(AtomicBool::new(true));
        let is_here = here.clone();
        let is_here: IsHere = Box::new(move |_| is_here.load(Ordering::Relaxed));
        let (handle, task) = Tolerations::build(fake.client(), is_here);
        let stop = CancellationToken::new();
        let running = tokio::spawn(task.run(stop.clone()));
        let now = Timestamp::now().to_string();
        handle.observe(&seen(&given, Some(&now)));
        if let Some(gone) = gone {
            tokio::time::sleep(gone).await;
            here.store(false, Ordering::Relaxed);
        }
        tokio::time::sleep(after - gone.unwrap_or_default()).await;
        stop.cancel();
        running.await.unwrap();
        fake.requests().len()
    }

    #[tokio::test(start_paused = true)]
    async fn a_young_pod_is_changed_when_it_is_no_longer_or_its_node_goes_away() {
        let minutes = |n: u64| Duration::from_secs(60 * n);
        assert_eq!(sent(None, minutes(9)).await, 0);
        assert_eq!(sent(None, minutes(11)).await, 1);
        assert_eq!(sent(Some(minutes(1)), minutes(1) + LOOK * 2).await, 1);
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
        let given: Pod = serde_json::from_value(fake.get(path).unwrap()).unwrap();
        let mut failures = 1;
        fake.intercept(move |_, _| (std::mem::take(&mut failures) > 0).then_some(500));
        let (handle, task) = Tolerations::build(fake.client(), Box::new(|_| true));
        let stop = CancellationToken::new();
        let running = tokio::spawn(task.run(stop.clone()));
        handle.observe(&seen(&given, None));
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
