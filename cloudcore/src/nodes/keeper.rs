//! Keeps the Node objects true to the enrolments: one watch, one decision, thin steps.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use k8s_openapi::api::core::v1::Node;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::core::PartialObjectMeta;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use serde_json::json;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use common::ids::NodeName;
use common::pki::ClusterId;

use super::birth::{self, EDGE_LABEL, FINALIZER};
use super::claim::Claims;
use super::tolerations::AUTONOMY;
use super::{carries_finalizer, ensure, find, release};
use crate::enroll::cache::Enrolments;
use crate::enroll::record::{self, records};
use crate::kube::{KubeError, WatchBackoff, is_absent, is_conflict};

/// Nodes put right at once: a fleet whose Nodes were all deleted comes back at some hundred a
/// second and leaves the API server room.
const AT_ONCE: usize = 8;
const RETRY: Duration = Duration::from_secs(3);
/// Everything is looked at again: a missed event costs this long, never correctness.
const ALL_AGAIN: Duration = Duration::from_secs(300);

/// What the watch shows of a Node.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    uid: String,
    deleting: bool,
    finalizer: bool,
    autonomous: bool,
}

/// What a Node needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Enrolled, and no Node: make it.
    Make,
    /// Enrolled, and somebody deletes the Node: keep its content, let it go, make it again.
    Rescue,
    /// Enrolled, and a Node without our finalizer: take it into care, if we made it.
    Adopt,
    /// Not enrolled (any more): the Node goes.
    Remove,
}

fn next_step(enrolled: bool, node: Option<&Seen>) -> Option<Step> {
    match (enrolled, node) {
        (true, None) => Some(Step::Make),
        (true, Some(seen)) if seen.deleting && seen.finalizer => Some(Step::Rescue),
        // It goes by itself; its end is the next event.
        (true, Some(seen)) if seen.deleting => None,
        (true, Some(seen)) if !seen.finalizer => Some(Step::Adopt),
        (true, Some(_)) => None,
        (false, Some(seen)) if seen.finalizer => Some(Step::Remove),
        (false, Some(_) | None) => None,
    }
}

type Map = HashMap<NodeName, Seen>;
type Running = BoxFuture<'static, (NodeName, Result<(), KubeError>)>;

/// What is known of edge Nodes. Cheap to clone.
#[derive(Clone, Default)]
pub struct EdgeNodes {
    seen: Arc<RwLock<Map>>,
}

impl EdgeNodes {
    /// Whether Pods of this node stay when it is away: yes, unless its label says no.
    pub fn is_autonomous(&self, node: &NodeName) -> bool {
        self.read(|map| map.get(node).is_none_or(|seen| seen.autonomous))
    }

    /// The UID of the Node as the watch showed it last.
    pub fn uid(&self, node: &NodeName) -> Option<String> {
        self.read(|map| map.get(node).map(|seen| seen.uid.clone()))
    }

    fn read<T>(&self, look: impl FnOnce(&Map) -> T) -> T {
        look(&self.seen.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn edit<T>(&self, change: impl FnOnce(&mut Map) -> T) -> T {
        change(&mut self.seen.write().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Runs the watch and the steps.
pub struct KeeperTask {
    keeper: Keeper,
    watch: Client,
    claims: Claims,
    nodes: EdgeNodes,
}

/// What a step needs.
#[derive(Clone)]
struct Keeper {
    client: Client,
    enrolments: Enrolments,
    cluster: ClusterId,
}

/// Builds the keeper; both clients act as CloudCore.
pub fn build(
    client: Client,
    watch: Client,
    enrolments: Enrolments,
    cluster: ClusterId,
    claims: Claims,
) -> (EdgeNodes, KeeperTask) {
    let nodes = EdgeNodes::default();
    let task = KeeperTask {
        keeper: Keeper {
            client,
            enrolments,
            cluster,
        },
        watch,
        claims,
        nodes: nodes.clone(),
    };
    (nodes, task)
}

impl KeeperTask {
    /// Ends with the token. Decides nothing before both lists are complete.
    pub async fn run(mut self, shutdown: CancellationToken) {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {}
            () = self.keep() => {}
        }
    }

    async fn keep(&mut self) {
        let mut changes = self.keeper.enrolments.changes();
        self.keeper.enrolments.synced().await;
        let api: Api<PartialObjectMeta<Node>> = Api::all(self.watch.clone());
        let config = watcher::Config::default().labels(EDGE_LABEL);
        let mut events = watcher(api, config)
            .backoff(WatchBackoff::default())
            .boxed();
        let (mut listed, mut complete) = (Map::new(), false);
        let mut due: BTreeMap<NodeName, Instant> = BTreeMap::new();
        let mut running: FuturesUnordered<Running> = FuturesUnordered::new();
        let mut all_again = tokio::time::interval(ALL_AGAIN);
        loop {
            if complete {
                self.start(&mut due, &mut running);
            }
            let next = due
                .values()
                .min()
                .copied()
                .filter(|_| complete && running.len() < AT_ONCE);
            let wait = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                Some((name, done)) = running.next() => {
                    if let Err(error) = done {
                        tracing::warn!(node = %name, error = %crate::chain(&error), "the Node is not as it should be; trying again");
                        due.insert(name, Instant::now() + RETRY);
                    }
                }
                event = events.next() => match event {
                    Some(Ok(event)) => {
                        complete |= matches!(event, watcher::Event::InitDone);
                        let at = Instant::now() + settle(&event);
                        let touched = self.apply(event, &mut listed);
                        due.extend(touched.into_iter().map(|name| (name, at)));
                    }
                    Some(Err(error)) => {
                        tracing::warn!(error = %crate::chain(&error), "the watch of edge Nodes broke; it begins again");
                    }
                    None => return,
                },
                changed = changes.recv() => match changed {
                    Ok(name) => { due.insert(name, Instant::now()); }
                    Err(RecvError::Lagged(_)) => self.all(&mut due),
                    Err(RecvError::Closed) => return,
                },
                _ = all_again.tick() => self.all(&mut due),
                () = wait => {}
            }
        }
    }

    fn all(&self, due: &mut BTreeMap<NodeName, Instant>) {
        let enrolled = self.keeper.enrolments.names().borrow().clone();
        let seen: Vec<_> = self.nodes.read(|map| map.keys().cloned().collect());
        let now = Instant::now();
        due.extend(enrolled.iter().cloned().chain(seen).map(|name| (name, now)));
    }

    /// Begins the steps whose time has come. A name is stepped by one future at a time because a
    /// retry is put back only when it has ended, and each step looks at the truth by itself.
    fn start(
        &self,
        due: &mut BTreeMap<NodeName, Instant>,
        running: &mut FuturesUnordered<Running>,
    ) {
        let now = Instant::now();
        while running.len() < AT_ONCE {
            let Some(name) = due
                .iter()
                .find(|(_, at)| **at <= now)
                .map(|(name, _)| name.clone())
            else {
                return;
            };
            due.remove(&name);
            let enrolled = self
                .keeper
                .enrolments
                .find(&name)
                .is_some_and(|r| r.spec.is_active());
            let seen = self.nodes.read(|map| map.get(&name).cloned());
            if let Some(step) = next_step(enrolled, seen.as_ref()) {
                running.push(self.keeper.clone().run(name, step).boxed());
            }
        }
    }

    fn apply(
        &self,
        event: watcher::Event<PartialObjectMeta<Node>>,
        listed: &mut Map,
    ) -> Vec<NodeName> {
        match event {
            watcher::Event::Init => {
                listed.clear();
                Vec::new()
            }
            watcher::Event::InitApply(node) => {
                listed.extend(look(&node));
                Vec::new()
            }
            watcher::Event::InitDone => {
                let new = std::mem::take(listed);
                for (name, seen) in &new {
                    self.claims.owner(name, &seen.uid);
                }
                let old = self.nodes.edit(|map| std::mem::replace(map, new.clone()));
                for gone in old.keys().filter(|name| !new.contains_key(name)) {
                    self.claims.no_owner(gone);
                }
                let enrolled = self.keeper.enrolments.names().borrow().clone();
                let all = old
                    .into_keys()
                    .chain(new.into_keys())
                    .chain(enrolled.iter().cloned());
                all.collect()
            }
            watcher::Event::Apply(node) => {
                let Some((name, seen)) = look(&node) else {
                    return Vec::new();
                };
                self.claims.owner(&name, &seen.uid);
                let before = self
                    .nodes
                    .edit(|map| map.insert(name.clone(), seen.clone()));
                // A status that changed is no work here.
                if before.as_ref() == Some(&seen) {
                    Vec::new()
                } else {
                    vec![name]
                }
            }
            watcher::Event::Delete(node) => {
                let Some((name, seen)) = look(&node) else {
                    return Vec::new();
                };
                let gone = self.nodes.edit(|map| {
                    let same = map.get(&name).is_some_and(|now| now.uid == seen.uid);
                    if same {
                        map.remove(&name);
                    }
                    same
                });
                if gone {
                    self.claims.no_owner(&name);
                }
                vec![name]
            }
        }
    }
}

/// A Node that went is mostly being made again by the step that let it go: its successor's event
/// is waited for.
fn settle(event: &watcher::Event<PartialObjectMeta<Node>>) -> Duration {
    match event {
        watcher::Event::Delete(_) => Duration::from_millis(250),
        watcher::Event::Init
        | watcher::Event::InitApply(_)
        | watcher::Event::InitDone
        | watcher::Event::Apply(_) => Duration::ZERO,
    }
}

fn look(node: &PartialObjectMeta<Node>) -> Option<(NodeName, Seen)> {
    let meta = &node.metadata;
    let name = NodeName::parse(meta.name.as_deref()?).ok()?;
    let autonomy = meta
        .labels
        .as_ref()
        .and_then(|labels| labels.get(AUTONOMY.0));
    let seen = Seen {
        uid: meta.uid.clone()?,
        deleting: meta.deletion_timestamp.is_some(),
        finalizer: node.finalizers().iter().any(|f| f == FINALIZER),
        autonomous: autonomy.is_none_or(|value| value != AUTONOMY.1),
    };
    Some((name, seen))
}

impl Keeper {
    async fn run(self, name: NodeName, step: Step) -> (NodeName, Result<(), KubeError>) {
        let done = match step {
            Step::Make => self.make(&name).await,
            Step::Rescue => self.rescue(&name).await,
            Step::Adopt => self.adopt(&name).await,
            Step::Remove => self.remove(&name).await,
        };
        (name, done)
    }

    /// The record as the API server has it now, if it holds.
    async fn record(&self, name: &NodeName) -> Result<Option<record::Enrolment>, KubeError> {
        let found = records(&self.client).get_opt(name.as_str()).await;
        let found = found.map_err(KubeError::api(format!("reading the enrolment of {name}")))?;
        Ok(found.filter(|r| r.spec.is_active()))
    }

    async fn make(&self, name: &NodeName) -> Result<(), KubeError> {
        let Some(record) = self.record(name).await? else {
            return Ok(());
        };
        if ensure(&self.client, name, &record.spec, &self.cluster).await? {
            tracing::info!(node = %name, "the Node of an enrolled device was missing and is made again");
            return Ok(());
        }
        // It exists and the watch does not show it: somebody took the label by which it is found.
        self.adopt(name).await
    }

    /// Puts our finalizer and label back on a Node that we made.
    async fn adopt(&self, name: &NodeName) -> Result<(), KubeError> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        while let Some(node) = find(&self.client, name).await? {
            if node.metadata.deletion_timestamp.is_some() {
                return Ok(());
            }
            if !birth::is_ours(&node, &self.cluster) {
                tracing::warn!(node = %name, "a Node of an enrolled device's name exists that CloudCore did not make; it is left alone");
                return Ok(());
            }
            if carries_finalizer(&node) && node.labels().contains_key(EDGE_LABEL) {
                return Ok(());
            }
            let mut finalizers = node.finalizers().to_vec();
            if !carries_finalizer(&node) {
                finalizers.push(FINALIZER.into());
            }
            let patch = json!({"metadata": {
                "finalizers": finalizers,
                "labels": {EDGE_LABEL: ""},
                "uid": node.metadata.uid,
                "resourceVersion": node.metadata.resource_version,
            }});
            let params = PatchParams::default();
            match nodes
                .patch(name.as_str(), &params, &Patch::Merge(&patch))
                .await
            {
                Ok(_) => return Ok(()),
                Err(e) if is_absent(&e) => return Ok(()),
                // Its status changes all the time: each loss is somebody's progress.
                Err(e) if is_conflict(&e) => {}
                Err(e) => return Err(KubeError::api(format!("taking Node {name} into care"))(e)),
            }
        }
        Ok(())
    }

    async fn rescue(&self, name: &NodeName) -> Result<(), KubeError> {
        let Some(node) = find(&self.client, name).await? else {
            return self.make(name).await;
        };
        if node.metadata.deletion_timestamp.is_none() {
            return Ok(());
        }
        if birth::is_ours(&node, &self.cluster) {
            record::change(&self.client, name, |spec| birth::keep(spec, name, &node)).await?;
        }
        release(&self.client, name).await?;
        tracing::info!(node = %name, "somebody deleted the Node of an enrolled device");
        self.make(name).await
    }

    async fn remove(&self, name: &NodeName) -> Result<(), KubeError> {
        if self.record(name).await?.is_some() {
            return Ok(());
        }
        let nodes: Api<Node> = Api::all(self.client.clone());
        match nodes.delete(name.as_str(), &DeleteParams::default()).await {
            Ok(_) => tracing::info!(node = %name, "the Node goes with its enrolment"),
            Err(e) if is_absent(&e) || is_conflict(&e) => {}
            Err(e) => return Err(KubeError::api(format!("deleting Node {name}"))(e)),
        }
        release(&self.client, name).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::enroll::record::{EnrolmentSpec, record};
    use crate::kube::fake::FakeApi;

    const NODE: &str = "/api/v1/nodes/a";
    const RECORD: &str = "/apis/fleet.cloudcore.io/v1alpha1/namespaces/edge-system/enrolments/a";

    fn a() -> NodeName {
        NodeName::parse("a").unwrap()
    }

    fn keeper(fake: &FakeApi) -> Keeper {
        let cluster = ClusterId::parse("c1").unwrap();
        let (enrolments, _) = Enrolments::build(fake.client(), fake.client(), cluster.clone());
        Keeper {
            client: fake.client(),
            enrolments,
            cluster,
        }
    }

    fn enrol(fake: &FakeApi) {
        let spec = EnrolmentSpec {
            os: "linux".into(),
            arch: "arm64".into(),
            ..EnrolmentSpec::default()
        };
        fake.put(
            RECORD,
            serde_json::to_value(record(&a(), spec, None)).unwrap(),
        );
    }

    #[test]
    fn a_node_lives_and_goes_with_its_enrolment() {
        let seen = |deleting, finalizer| Seen {
            uid: "u".into(),
            deleting,
            finalizer,
            autonomous: true,
        };
        for (enrolled, node, want) in [
            (true, None, Some(Step::Make)),
            (true, Some(seen(false, true)), None),
            (true, Some(seen(true, true)), Some(Step::Rescue)),
            (true, Some(seen(true, false)), None),
            (true, Some(seen(false, false)), Some(Step::Adopt)),
            (false, None, None),
            (false, Some(seen(false, true)), Some(Step::Remove)),
            (false, Some(seen(true, true)), Some(Step::Remove)),
            (false, Some(seen(false, false)), None),
        ] {
            assert_eq!(
                next_step(enrolled, node.as_ref()),
                want,
                "{enrolled} {node:?}"
            );
        }
    }

    #[tokio::test]
    async fn a_node_that_somebody_deleted_comes_back_as_it_was() {
        let fake = FakeApi::new();
        enrol(&fake);
        let keeper = keeper(&fake);
        keeper.make(&a()).await.unwrap();
        let mut node = fake.get(NODE).unwrap();
        let first = node["metadata"]["uid"].clone();
        node["metadata"]["labels"]["site"] = json!("berlin");
        node["spec"]["unschedulable"] = json!(true);
        node["metadata"]["deletionTimestamp"] = json!("2026-01-02T00:00:00Z");
        fake.put(NODE, node);
        keeper.rescue(&a()).await.unwrap();
        let again = fake.get(NODE).unwrap();
        assert_ne!(again["metadata"]["uid"], first);
        assert!(again["metadata"].get("deletionTimestamp").is_none());
        assert_eq!(again["metadata"]["labels"]["site"], "berlin");
        assert_eq!(again["spec"]["unschedulable"], true);
    }

    #[tokio::test]
    async fn a_node_goes_only_when_the_record_itself_says_so() {
        let fake = FakeApi::new();
        enrol(&fake);
        let keeper = keeper(&fake);
        keeper.make(&a()).await.unwrap();
        keeper.remove(&a()).await.unwrap();
        assert!(
            fake.get(NODE).is_some(),
            "a cache that is behind must not delete a Node"
        );
        crate::enroll::revoke::revoke(&fake.client(), &a())
            .await
            .unwrap();
        assert!(fake.get(NODE).is_none());
        keeper.make(&a()).await.unwrap();
        assert!(fake.get(NODE).is_none(), "an ended enrolment makes no Node");
    }

    #[tokio::test]
    async fn our_node_gets_finalizer_and_label_back_and_a_foreign_one_nothing() {
        let fake = FakeApi::new();
        enrol(&fake);
        let keeper = keeper(&fake);
        keeper.make(&a()).await.unwrap();
        let mut node = fake.get(NODE).unwrap();
        node["metadata"]["finalizers"] = json!([]);
        node["metadata"]["labels"] = json!({});
        fake.put(NODE, node);
        keeper.make(&a()).await.unwrap();
        let node = fake.get(NODE).unwrap();
        assert_eq!(node["metadata"]["finalizers"], json!([FINALIZER]));
        assert_eq!(node["metadata"]["labels"][EDGE_LABEL], "");
        let foreign = json!({"metadata": {}, "spec": {"providerID": "aws:///x"}});
        fake.put(NODE, foreign);
        keeper.make(&a()).await.unwrap();
        assert!(
            fake.get(NODE).unwrap()["metadata"]
                .get("finalizers")
                .is_none()
        );
    }
}
