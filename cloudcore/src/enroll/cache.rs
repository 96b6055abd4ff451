//! All enrolments as one watch shows them: who is enrolled, and who no longer is.
//!
//! A yes comes from memory; a no is never told from memory alone, since the watch may be behind a
//! join that another replica decided a moment ago.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, PoisonError, RwLock};

use futures::{StreamExt, TryStreamExt};
use kube::Client;
use kube::runtime::{WatchStreamExt, watcher};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

use common::ids::NodeName;
use common::pki::{ClusterId, NodeIdentity};

use super::record::{Enrolment, records};
use crate::kube::{KubeError, WatchBackoff};

/// More changes than this between two looks of a reader, and it is told that it missed some.
const CHANGES: usize = 1024;

type Map = HashMap<NodeName, Arc<Enrolment>>;

/// Why an identity may not hold a session.
#[derive(Debug, thiserror::Error)]
pub enum NotAllowed {
    #[error("{node} shows a certificate of cluster {shown}")]
    OtherCluster { node: NodeName, shown: ClusterId },
    #[error("{0} is not enrolled")]
    NotEnrolled(NodeName),
    #[error("the enrolment of {0} was ended")]
    Revoked(NodeName),
    #[error("{0} is enrolled with another key")]
    OtherKey(NodeName),
    #[error("the enrolment of {0} cannot be read at present")]
    Unavailable(NodeName, #[source] KubeError),
}

struct Inner {
    client: Client,
    cluster: ClusterId,
    map: RwLock<Map>,
    names: watch::Sender<Arc<BTreeSet<NodeName>>>,
    synced: watch::Sender<bool>,
    revocations: broadcast::Sender<NodeName>,
    changes: broadcast::Sender<NodeName>,
}

/// Reads the enrolments. Cheap to clone.
#[derive(Clone)]
pub struct Enrolments {
    inner: Arc<Inner>,
}

/// Keeps [`Enrolments`] true.
pub struct EnrolmentsTask {
    inner: Arc<Inner>,
    watch: Client,
}

impl Enrolments {
    /// `client` reads a single record, `watch` carries the watch; both act as CloudCore.
    pub fn build(client: Client, watch: Client, cluster: ClusterId) -> (Self, EnrolmentsTask) {
        let inner = Arc::new(Inner {
            client,
            cluster,
            map: RwLock::default(),
            names: watch::Sender::default(),
            synced: watch::Sender::new(false),
            revocations: broadcast::Sender::new(CHANGES),
            changes: broadcast::Sender::new(CHANGES),
        });
        let task = EnrolmentsTask {
            inner: inner.clone(),
            watch,
        };
        (Self { inner }, task)
    }

    /// Whether this identity may hold a session now.
    pub async fn allowed(&self, identity: &NodeIdentity) -> Result<Arc<Enrolment>, NotAllowed> {
        if identity.cluster != self.inner.cluster {
            return Err(NotAllowed::OtherCluster {
                node: identity.node.clone(),
                shown: identity.cluster.clone(),
            });
        }
        if let Some(known) = self.find(&identity.node)
            && judge(&known, identity).is_ok()
        {
            return Ok(known);
        }
        let node = &identity.node;
        let read = records(&self.inner.client).get_opt(node.as_str()).await;
        let reading = KubeError::api("reading an enrolment");
        let read = read.map_err(|e| NotAllowed::Unavailable(node.clone(), reading(e)))?;
        let found = read.ok_or_else(|| NotAllowed::NotEnrolled(node.clone()))?;
        judge(&found, identity)?;
        Ok(Arc::new(found))
    }

    /// The record of a node, ended or not, as the watch showed it last.
    pub fn find(&self, node: &NodeName) -> Option<Arc<Enrolment>> {
        let map = self
            .inner
            .map
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        map.get(node).cloned()
    }

    /// The names of all nodes whose enrolment holds. Empty until the first list.
    pub fn names(&self) -> watch::Receiver<Arc<BTreeSet<NodeName>>> {
        self.inner.names.subscribe()
    }

    /// Nodes whose enrolment ended: their sessions end. A reader that lags asks
    /// [`Self::allowed`] again for each session it has.
    pub fn revocations(&self) -> broadcast::Receiver<NodeName> {
        self.inner.revocations.subscribe()
    }

    /// Nodes whose record changed in any way.
    pub(crate) fn changes(&self) -> broadcast::Receiver<NodeName> {
        self.inner.changes.subscribe()
    }

    /// Waits for the first complete list.
    pub async fn synced(&self) {
        let mut synced = self.inner.synced.subscribe();
        // The sender lives as long as `self`: an error cannot come.
        let _ = synced.wait_for(|synced| *synced).await;
    }
}

fn judge(record: &Enrolment, identity: &NodeIdentity) -> Result<(), NotAllowed> {
    let node = || identity.node.clone();
    if !record.spec.is_active() {
        return Err(NotAllowed::Revoked(node()));
    }
    if !record.spec.knows(identity.key_id) {
        return Err(NotAllowed::OtherKey(node()));
    }
    Ok(())
}

impl EnrolmentsTask {
    /// Ends with the token; a watch that breaks is begun again with backoff.
    pub async fn run(self, shutdown: CancellationToken) {
        let events = watcher(records(&self.watch), watcher::Config::default())
            .backoff(WatchBackoff::default());
        let mut events = events.inspect_err(|error| {
            tracing::warn!(error = %crate::chain(error), "the watch of enrolments broke; it begins again");
        }).boxed();
        let mut listed = Map::new();
        loop {
            let event = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                event = events.next() => event,
            };
            match event {
                Some(Ok(event)) => self.inner.apply(event, &mut listed),
                // The stream waits by itself before the next try.
                Some(Err(_)) => {}
                None => return,
            }
        }
    }
}

impl Inner {
    fn apply(&self, event: watcher::Event<Enrolment>, listed: &mut Map) {
        match event {
            watcher::Event::Init => listed.clear(),
            watcher::Event::InitApply(record) => {
                if let Some(name) = name_of(&record) {
                    listed.insert(name, kept(record));
                }
            }
            watcher::Event::InitDone => {
                self.replace(std::mem::take(listed));
                self.synced.send_replace(true);
            }
            watcher::Event::Apply(record) => {
                if let Some(name) = name_of(&record) {
                    let old = self.edit(|map| map.insert(name.clone(), kept(record)));
                    self.tell(&name, old.as_deref());
                }
            }
            watcher::Event::Delete(record) => {
                if let Some(name) = name_of(&record) {
                    let old = self.edit(|map| map.remove(&name));
                    self.tell(&name, old.as_deref());
                }
            }
        }
    }

    fn edit<T>(&self, change: impl FnOnce(&mut Map) -> T) -> T {
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        change(&mut map)
    }

    fn replace(&self, new: Map) {
        let touched: BTreeSet<_> = new.keys().cloned().collect();
        let old = self.edit(|map| std::mem::replace(map, new));
        let all: BTreeSet<_> = old.keys().cloned().chain(touched).collect();
        for name in all {
            self.tell(&name, old.get(&name).map(Arc::as_ref));
        }
    }

    /// Tells the readers what the change of one record means.
    fn tell(&self, name: &NodeName, old: Option<&Enrolment>) {
        let active = self.edit(|map| map.get(name).is_some_and(|r| r.spec.is_active()));
        let was_active = old.is_some_and(|r| r.spec.is_active());
        if active != was_active {
            self.names.send_modify(|names| {
                let names = Arc::make_mut(names);
                if active {
                    names.insert(name.clone());
                } else {
                    names.remove(name);
                }
            });
        }
        // No reader is no error: both streams may be without one.
        if was_active && !active {
            let _ = self.revocations.send(name.clone());
        }
        let _ = self.changes.send(name.clone());
    }
}

/// Without who wrote which field: more than the record itself, for each node of the fleet.
fn kept(mut record: Enrolment) -> Arc<Enrolment> {
    record.metadata.managed_fields = None;
    Arc::new(record)
}

fn name_of(record: &Enrolment) -> Option<NodeName> {
    let name = record.metadata.name.as_deref()?;
    let parsed = NodeName::parse(name);
    if parsed.is_err() {
        tracing::warn!(
            name,
            "an enrolment whose name cannot be a node's is passed over"
        );
    }
    parsed.ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::enroll::record::{EnrolmentSpec, Key, record};
    use crate::kube::fake::FakeApi;
    use common::pki::KeyId;
    use jiff::Timestamp;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use rustls::pki_types::UnixTime;

    fn name(n: &str) -> NodeName {
        NodeName::parse(n).unwrap()
    }

    fn enrolment(n: &str, key: u8, revoked: bool) -> Enrolment {
        let now = Timestamp::UNIX_EPOCH;
        let spec = EnrolmentSpec {
            keys: vec![Key::build(KeyId([key; 32]), now)],
            enrolled: Some(Time(now)),
            revoked: revoked.then_some(Time(now)),
            ..EnrolmentSpec::default()
        };
        record(&name(n), spec, None)
    }

    fn identity(n: &str, key: u8) -> NodeIdentity {
        NodeIdentity {
            node: name(n),
            cluster: ClusterId::parse("c1").unwrap(),
            key_id: KeyId([key; 32]),
            not_before: UnixTime::now(),
            not_after: UnixTime::now(),
            serial: vec![1],
        }
    }

    fn cache(fake: &FakeApi) -> Enrolments {
        Enrolments::build(
            fake.client(),
            fake.client(),
            ClusterId::parse("c1").unwrap(),
        )
        .0
    }

    fn feed(cache: &Enrolments, events: Vec<watcher::Event<Enrolment>>) {
        let mut listed = Map::new();
        for event in events {
            cache.inner.apply(event, &mut listed);
        }
    }

    #[tokio::test]
    async fn only_the_enrolled_key_of_an_enrolment_that_holds_is_allowed() {
        let fake = FakeApi::new();
        for (n, revoked) in [("a", false), ("b", true)] {
            let path =
                format!("/apis/fleet.cloudcore.io/v1alpha1/namespaces/edge-system/enrolments/{n}");
            fake.put(
                &path,
                serde_json::to_value(enrolment(n, 1, revoked)).unwrap(),
            );
        }
        let cache = cache(&fake);
        assert!(cache.allowed(&identity("a", 1)).await.is_ok());
        let refused = async |n, key| cache.allowed(&identity(n, key)).await.unwrap_err();
        assert!(matches!(refused("a", 2).await, NotAllowed::OtherKey(_)));
        assert!(matches!(refused("b", 1).await, NotAllowed::Revoked(_)));
        assert!(matches!(refused("c", 1).await, NotAllowed::NotEnrolled(_)));
        let mut stranger = identity("a", 1);
        stranger.cluster = ClusterId::parse("c2").unwrap();
        assert!(matches!(
            cache.allowed(&stranger).await.unwrap_err(),
            NotAllowed::OtherCluster { .. }
        ));
        fake.intercept(|_, _| Some(500));
        assert!(matches!(refused("a", 1).await, NotAllowed::Unavailable(..)));
    }

    #[tokio::test]
    async fn a_yes_comes_from_memory() {
        let fake = FakeApi::new();
        let cache = cache(&fake);
        feed(
            &cache,
            vec![watcher::Event::Apply(enrolment("a", 1, false))],
        );
        assert!(cache.allowed(&identity("a", 1)).await.is_ok());
        assert!(fake.requests().is_empty());
    }

    #[tokio::test]
    async fn an_ended_or_vanished_enrolment_is_told_once_and_leaves_the_names() {
        let cache = cache(&FakeApi::new());
        let mut revoked = cache.revocations();
        let names = cache.names();
        use watcher::Event::{Apply, Delete, Init, InitApply, InitDone};
        feed(
            &cache,
            vec![
                Init,
                InitApply(enrolment("a", 1, false)),
                InitApply(enrolment("b", 1, false)),
                InitApply(enrolment("c", 1, false)),
                InitDone,
            ],
        );
        assert_eq!(names.borrow().len(), 3);
        assert!(revoked.try_recv().is_err());
        feed(
            &cache,
            vec![
                Apply(enrolment("a", 1, true)),
                Apply(enrolment("a", 1, true)),
            ],
        );
        feed(&cache, vec![Delete(enrolment("b", 1, false))]);
        // A list after a gap in which "c" went.
        feed(
            &cache,
            vec![Init, InitApply(enrolment("a", 1, true)), InitDone],
        );
        for n in ["a", "b", "c"] {
            assert_eq!(revoked.try_recv().unwrap(), name(n));
        }
        assert!(revoked.try_recv().is_err());
        assert!(names.borrow().is_empty());
    }

    #[tokio::test]
    async fn an_unfinished_list_ends_nothing() {
        let cache = cache(&FakeApi::new());
        feed(
            &cache,
            vec![watcher::Event::Apply(enrolment("a", 1, false))],
        );
        let mut revoked = cache.revocations();
        feed(&cache, vec![watcher::Event::Init]);
        assert!(revoked.try_recv().is_err());
        assert!(cache.find(&name("a")).is_some());
    }
}
