//! What the one writer publishes and the sessions read.
//!
//! Owns a cell per node with its desired set and the live state of its Pods. The downstream task
//! writes, everybody else reads levels: a reader that slept finds the newest, never a queue. A mark
//! is stored after the sets that it vouches for and read before them, so that a snapshot never
//! claims to be newer than it is.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, RwLock};

use common::ids::{Kind, NodeName, ObjectKey};
use tokio::sync::watch;

use super::index::live::{Live, NodeLive, PodView};
use super::index::{Desired, Listed, Marks};
use super::versioned::{Versioned, View};

/// All that one node must have, at one moment.
#[derive(Debug, Clone)]
pub struct NodeSnapshot {
    pub objects: Arc<BTreeMap<ObjectKey, Arc<Versioned>>>,
    /// Whether that is everything: the digest of `objects` may be called complete.
    pub complete: bool,
    /// For each kind, the resourceVersion up to which this snapshot is known to hold everything.
    ///
    /// It belongs to a complete digest. Pods, the Node and Services have one feed each. Secrets and
    /// ConfigMaps have a watch each, so their mark is the least of them; a node without any has
    /// the Pods' mark, since it is the Pods that name none. A batch of changes carries no less
    /// than the `revision` of each object in it (the session sees to that).
    pub marks: BTreeMap<Kind, u64>,
    held_back: Arc<BTreeSet<ObjectKey>>,
    all_listed: bool,
}

impl NodeSnapshot {
    /// Whether the node is known to have no business with `key`, complete or not: every feed has
    /// listed, and the object is neither in the set nor held back until it was read. So a Pod that
    /// waits for a refused Secret does not keep the others from being removed.
    pub fn may_remove(&self, key: &ObjectKey) -> bool {
        self.all_listed && !self.objects.contains_key(key) && !self.held_back.contains(key)
    }
}

#[derive(Debug, Default, Clone)]
struct Set {
    objects: Arc<BTreeMap<ObjectKey, Arc<Versioned>>>,
    held_back: Arc<BTreeSet<ObjectKey>>,
    all_listed: bool,
    complete: bool,
    listed: Listed,
}

#[derive(Debug)]
struct Cell {
    set: watch::Sender<Set>,
    live: watch::Sender<Arc<Live>>,
}

#[derive(Debug, Default)]
struct Feeds {
    pods: View,
    nodes: View,
    services: View,
}

#[derive(Debug, Default)]
pub(super) struct Published {
    cells: RwLock<HashMap<NodeName, Arc<Cell>>>,
    pods: RwLock<HashMap<Arc<str>, Arc<PodView>>>,
    feeds: Feeds,
    /// Each cluster-wide feed has listed once.
    listed: watch::Sender<bool>,
}

/// A node's desired set, as it changes.
#[derive(Debug)]
pub struct NodeFeed {
    published: Arc<Published>,
    set: watch::Receiver<Set>,
}

impl NodeFeed {
    pub fn snapshot(&self) -> NodeSnapshot {
        // Before the objects: see the head of this file.
        let mut marks = self.published.marks();
        let set = self.set.borrow().clone();
        let (objects, complete) = (set.objects, set.complete);
        for (kind, listed) in [(Kind::Pod, set.listed.pods), (Kind::Node, set.listed.node)] {
            marks.entry(kind).and_modify(|m| *m = listed.max(*m));
        }
        for object in objects.values() {
            match object.object.key.kind {
                kind @ (Kind::ConfigMap | Kind::Secret) => {
                    let view = object.view.get();
                    marks
                        .entry(kind)
                        .and_modify(|m| *m = view.min(*m))
                        .or_insert(view);
                }
                Kind::Pod | Kind::Node | Kind::Services | Kind::Unknown(_) => {}
            }
        }
        let pods = marks.get(&Kind::Pod).copied().unwrap_or_default();
        for kind in [Kind::ConfigMap, Kind::Secret] {
            marks.entry(kind).or_insert(pods);
        }
        NodeSnapshot {
            objects,
            complete,
            marks,
            held_back: set.held_back,
            all_listed: set.all_listed,
        }
    }

    /// Waits until the set differs from what it was at the last call (or at the start). Never
    /// returns once the downstream task ended.
    pub async fn changed(&mut self) {
        if self.set.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// The live state of one node's Pods, as it changes.
#[derive(Debug)]
pub struct PodViews(watch::Receiver<Arc<Live>>);

impl PodViews {
    /// By UID; mirror Pods included.
    pub fn snapshot(&self) -> Arc<BTreeMap<Arc<str>, Arc<PodView>>> {
        self.0.borrow().pods.clone()
    }

    /// Waits until a Pod of the node, or its Node, changed in the API, whatever changed in it.
    /// Changes that come together are one. Never returns once the downstream task ended.
    pub async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Published {
    pub(super) fn feed(self: &Arc<Self>, node: &NodeName) -> NodeFeed {
        NodeFeed {
            published: self.clone(),
            set: self.cell(node).set.subscribe(),
        }
    }

    pub(super) fn pod_views(&self, node: &NodeName) -> PodViews {
        PodViews(self.cell(node).live.subscribe())
    }

    pub(super) fn node(&self, node: &NodeName) -> Option<Arc<NodeLive>> {
        let cell = read(&self.cells).get(node).cloned()?;
        let live = cell.live.borrow();
        live.node.clone()
    }

    pub(super) fn listed(&self) -> watch::Receiver<bool> {
        self.listed.subscribe()
    }

    pub(super) fn pod(&self, uid: &str) -> Option<Arc<PodView>> {
        read(&self.pods).get(uid).cloned()
    }

    /// Stores a node's set and wakes its readers. False when nothing differs. `None` is no set: the
    /// objects stay, since whoever follows takes what is missing for removed, but completeness ends.
    pub(super) fn set(&self, node: &NodeName, desired: Option<Desired>) -> bool {
        self.cell(node).set.send_if_modified(|set| {
            let Some(desired) = desired else {
                set.all_listed = false;
                return std::mem::replace(&mut set.complete, false);
            };
            let pairs = || set.objects.values().zip(desired.objects.values());
            let same = set.complete == desired.complete
                && set.all_listed == desired.all_listed
                && *set.held_back == desired.held_back
                && set.objects.len() == desired.objects.len()
                && pairs().all(|(a, b)| Arc::ptr_eq(a, b));
            // A later list of the same is not worth waking anybody.
            set.listed = desired.listed;
            if !same {
                *set = Set {
                    objects: Arc::new(desired.objects),
                    held_back: Arc::new(desired.held_back),
                    all_listed: desired.all_listed,
                    complete: desired.complete,
                    listed: desired.listed,
                };
            }
            !same
        })
    }

    pub(super) fn set_live(&self, node: &NodeName, live: Live) {
        let cell = self.cell(node);
        let before = cell.live.borrow().clone();
        {
            let mut pods = write(&self.pods);
            for uid in before
                .pods
                .keys()
                .filter(|uid| !live.pods.contains_key(*uid))
            {
                pods.remove(uid);
            }
            let all = live.pods.iter();
            pods.extend(all.map(|(uid, view)| (uid.clone(), view.clone())));
        }
        cell.live.send_replace(Arc::new(live));
    }

    /// After the sets that these marks vouch for.
    pub(super) fn set_marks(&self, marks: Marks) {
        self.feeds.pods.set(marks.pods);
        self.feeds.nodes.set(marks.nodes);
        self.feeds.services.set(marks.services);
        let all = marks.pods > 0 && marks.nodes > 0 && marks.services > 0;
        self.listed
            .send_if_modified(|listed| all && !std::mem::replace(listed, true));
    }

    /// Forgets nodes that are no edge's any more and that nobody follows.
    pub(super) fn prune(&self, edges: &BTreeSet<NodeName>) {
        let followed = |c: &Cell| c.set.receiver_count() + c.live.receiver_count() > 0;
        write(&self.cells).retain(|node, cell| edges.contains(node) || followed(cell));
    }

    fn marks(&self) -> BTreeMap<Kind, u64> {
        BTreeMap::from([
            (Kind::Pod, self.feeds.pods.get()),
            (Kind::Node, self.feeds.nodes.get()),
            (Kind::Services, self.feeds.services.get()),
        ])
    }

    fn cell(&self, node: &NodeName) -> Arc<Cell> {
        if let Some(cell) = read(&self.cells).get(node) {
            return cell.clone();
        }
        let new = || {
            Arc::new(Cell {
                set: watch::Sender::new(Set::default()),
                live: watch::Sender::default(),
            })
        };
        write(&self.cells)
            .entry(node.clone())
            .or_insert_with(new)
            .clone()
    }
}

/// A panic while a map was locked leaves a map that is still whole: each call changes it once.
fn read<T>(lock: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    lock.read()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> std::sync::RwLockWriteGuard<'_, T> {
    lock.write()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
