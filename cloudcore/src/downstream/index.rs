//! The index: objects of the cluster in, changes per node out.
//!
//! Pure: no I/O and no clock. It holds what the feeds saw and answers, for each edge node, which
//! objects it must have (`desired`). What must be read or watched next comes out as commands, and
//! which nodes to look at again as a set of names.
//!
//! A Pod goes down (is *shown*) once each Secret and ConfigMap that it names was read as its node,
//! at a revision not below the Pod's own: then the API server itself said that the node may have
//! it, and an edit made before the Pod was is in what the Pod sees. Until then the node's set is
//! not `complete`. A newer version of a shown Pod waits the same way behind the older one. A Pod
//! that is being deleted or has ended waits for nothing, since nothing of it will be started.
//!
//! Never: a Pod of a node that is not an edge's, a mirror Pod on the way down, an object that no
//! Pod names.

pub mod live;
mod pod;
mod services;
mod shared;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use common::ids::{Kind, NodeName, ObjectKey};
use common::object::Object;
use common::trim;
use serde_json::Value;

use self::live::{Live, NodeLive};
use self::pod::Pod;
use self::services::{Affected, Services};
pub use self::shared::Answer;
use self::shared::Shared;
use super::references;
use super::versioned::Versioned;

/// How an object came: its place in a list, or a watch's event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    List,
    Watch,
}

/// What a list covered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Covered {
    All,
    /// The Pods of these nodes.
    Nodes(BTreeSet<NodeName>),
}

/// What the feeds must do next. A ticket comes back with each answer: an answer with another one
/// belongs to a question that was withdrawn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Read the object once, as this node, until the answer is not a refusal.
    Read {
        reference: ObjectKey,
        node: NodeName,
        ticket: u64,
    },
    StopReading {
        reference: ObjectKey,
        node: NodeName,
    },
    /// Watch the object from this revision on, as this node, instead of whatever watch it has.
    Watch {
        reference: ObjectKey,
        node: NodeName,
        ticket: u64,
        from: u64,
        /// How often in a row the server refused it: the back-off to begin with.
        refusals: u32,
    },
    Unwatch {
        reference: ObjectKey,
    },
}

/// An object that cannot be sent as it is, for an Event on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Malformed {
    /// The Event's reason: one word, for programs.
    pub reason: &'static str,
    pub kind: Kind,
    pub namespace: String,
    pub name: String,
    pub uid: String,
    /// What is wrong and what happens because of it, for people. Never content.
    pub message: String,
}

/// What a call to the index brought about, until `take`.
#[derive(Debug, Default)]
pub struct Changes {
    /// Nodes whose desired set may differ.
    pub nodes: BTreeSet<NodeName>,
    /// Nodes whose live state changed.
    pub live: BTreeSet<NodeName>,
    pub commands: Vec<Command>,
    pub malformed: Vec<Malformed>,
    /// The cluster went back in time.
    pub rewound: bool,
    /// Every cluster-wide feed must list again: one of them saw the cluster go back.
    pub list_again: bool,
}

#[derive(Debug, Default)]
struct Orders {
    commands: Vec<Command>,
    last_ticket: u64,
}

impl Orders {
    fn push(&mut self, command: Command) {
        self.commands.push(command);
    }

    fn ticket(&mut self) -> u64 {
        self.last_ticket += 1;
        self.last_ticket
    }
}

/// How far each cluster-wide feed has seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Marks {
    pub pods: u64,
    pub nodes: u64,
    pub services: u64,
}

/// What a node must have.
#[derive(Debug, Clone, Default)]
pub struct Desired {
    pub objects: BTreeMap<ObjectKey, Arc<Versioned>>,
    /// Whether that is everything: nothing waits, every feed has listed once.
    pub complete: bool,
    /// Whether every feed has listed once: what is neither in `objects` nor held back is not the
    /// node's.
    pub all_listed: bool,
    /// What the node must have but does not get yet.
    pub held_back: BTreeSet<ObjectKey>,
    /// The revisions of the last lists of its Pods and of its Node object: its own marks, where
    /// they are above those of the feeds.
    pub listed: Listed,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Listed {
    pub pods: u64,
    pub node: u64,
}

/// The state of one edge node.
#[derive(Default)]
struct Edge {
    pods: BTreeSet<Arc<str>>,
    /// The revision of the last list that covered its Pods; a watch's event below it is old news.
    listed: Option<u64>,
    /// The same for its Node object.
    node_listed: Option<u64>,
}

#[derive(Default)]
pub struct Index {
    edges: BTreeMap<NodeName, Edge>,
    pods: BTreeMap<Arc<str>, Pod>,
    nodes: BTreeMap<NodeName, Arc<Versioned>>,
    live_nodes: BTreeMap<NodeName, Arc<NodeLive>>,
    services: Services,
    shared: Shared,
    marks: Marks,
    nodes_listed: bool,
    listing_pods: BTreeSet<Arc<str>>,
    listing_nodes: BTreeSet<NodeName>,
    orders: Orders,
    changes: Changes,
}

impl Index {
    /// What happened since the last call.
    pub fn take(&mut self) -> Changes {
        let mut changes = std::mem::take(&mut self.changes);
        changes.commands = std::mem::take(&mut self.orders.commands);
        changes
    }

    pub fn marks(&self) -> Marks {
        self.marks
    }

    /// Which nodes are edge nodes. Gives those that are new: their Pods must be listed.
    pub fn edge_nodes(&mut self, names: &BTreeSet<NodeName>) -> BTreeSet<NodeName> {
        let gone: Vec<NodeName> = self
            .edges
            .keys()
            .filter(|n| !names.contains(n))
            .cloned()
            .collect();
        for node in gone {
            let pods = self
                .edges
                .get(&node)
                .map(|e| e.pods.clone())
                .unwrap_or_default();
            pods.iter().for_each(|uid| self.drop_pod(uid));
            self.edges.remove(&node);
            self.live_nodes.remove(&node);
            self.changes.nodes.insert(node.clone());
            self.changes.live.insert(node);
        }
        let new: BTreeSet<NodeName> = names
            .iter()
            .filter(|n| !self.edges.contains_key(*n))
            .cloned()
            .collect();
        for node in &new {
            self.edges.insert(node.clone(), Edge::default());
            self.changes.nodes.insert(node.clone());
        }
        new
    }

    /// A list of Pods, made at `revision`, begins; its objects follow with `Origin::List`.
    pub fn pod_list_begins(&mut self, covered: &Covered, revision: u64) {
        self.listing_pods.clear();
        if *covered == Covered::All && revision < self.marks.pods {
            self.rewind(revision);
        }
    }

    pub fn apply_pod(&mut self, object: &Value, origin: Origin) {
        // A Pod that was understood once must not vanish because a newer version is not.
        if let (Origin::List, Some(uid)) = (origin, pod::uid(object)) {
            self.listing_pods.insert(uid.into());
        }
        let seen = match pod::Seen::parse(object) {
            Ok(seen) => seen,
            Err(malformed) => return self.changes.malformed.push(malformed),
        };
        let Some(edge) = self.edges.get_mut(&seen.node) else {
            return;
        };
        let old_news = edge.listed.is_none_or(|listed| seen.revision <= listed);
        if origin == Origin::Watch && old_news {
            return;
        }
        edge.pods.insert(seen.uid.clone());
        self.place_pod(seen, object);
    }

    /// A watch's deletion.
    pub fn remove_pod(&mut self, object: &Value) {
        let (Some(uid), Some(revision)) = (pod::uid(object), revision(object)) else {
            return;
        };
        let Some(pod) = self.pods.get(uid) else {
            return;
        };
        let listed = self.edges.get(&pod.view.node).and_then(|e| e.listed);
        if listed.is_some_and(|listed| revision > listed) {
            self.drop_pod(uid);
        }
    }

    /// A list of Pods is whole: of what it covered, all that it did not hold is gone.
    pub fn pod_list_ends(&mut self, covered: &Covered, revision: u64) {
        let seen = std::mem::take(&mut self.listing_pods);
        let names: Vec<NodeName> = match covered {
            Covered::All => self.edges.keys().cloned().collect(),
            Covered::Nodes(nodes) => nodes.iter().cloned().collect(),
        };
        for node in names {
            let Some(edge) = self.edges.get_mut(&node) else {
                continue;
            };
            edge.listed = Some(revision);
            let gone: Vec<Arc<str>> = edge.pods.difference(&seen).cloned().collect();
            gone.iter().for_each(|uid| self.drop_pod(uid));
            self.changes.nodes.insert(node);
        }
        if *covered == Covered::All {
            self.marks.pods = revision;
        }
    }

    /// The Pod watch has seen everything up to `revision`.
    pub fn pod_progress(&mut self, revision: u64) {
        self.marks.pods = self.marks.pods.max(revision);
    }

    pub fn node_list_begins(&mut self) {
        self.listing_nodes.clear();
    }

    pub fn apply_node(&mut self, object: &Value, origin: Origin) {
        let Some((name, revision)) = node_identity(object) else {
            return self.changes.malformed.push(Malformed {
                reason: pod::MALFORMED,
                kind: Kind::Node,
                namespace: String::new(),
                name: text(object, "/metadata/name").unwrap_or_default().into(),
                uid: String::new(),
                message: "the Node has no name or resourceVersion; it is ignored".into(),
            });
        };
        match origin {
            Origin::List => {
                self.listing_nodes.insert(name.clone());
            }
            Origin::Watch if self.is_old_news(&name, revision) => return,
            Origin::Watch => {}
        }
        if let Some(view) = NodeLive::of(object) {
            self.live_nodes.insert(name.clone(), Arc::new(view));
            self.changes.live.insert(name.clone());
        }
        let key = ObjectKey::named(Kind::Node, "", name.as_str());
        let trimmed = Object::present(key, trim::node(object));
        let next = match self.nodes.get(&name) {
            Some(old) => Versioned::after(old, trimmed, revision),
            None => Versioned::first(trimmed, revision),
        };
        let before = self.nodes.insert(name.clone(), next.clone());
        if before.is_none_or(|old| !Arc::ptr_eq(&old, &next)) {
            self.node_changed(name);
        }
    }

    pub fn remove_node(&mut self, object: &Value) {
        if let Some((name, revision)) = node_identity(object)
            && !self.is_old_news(&name, revision)
            && self.nodes.contains_key(&name)
        {
            self.drop_node(name);
        }
    }

    pub fn node_list_ends(&mut self, covered: &Covered, revision: u64) {
        let seen = std::mem::take(&mut self.listing_nodes);
        let asked = |name: &NodeName| match covered {
            Covered::All => true,
            Covered::Nodes(nodes) => nodes.contains(name),
        };
        let gone = self.nodes.keys().filter(|n| asked(n) && !seen.contains(*n));
        for name in gone.cloned().collect::<Vec<_>>() {
            self.drop_node(name);
        }
        for (name, edge) in self.edges.iter_mut().filter(|(name, _)| asked(name)) {
            edge.node_listed = Some(revision);
            self.changes.nodes.insert(name.clone());
        }
        if *covered == Covered::All {
            self.nodes_listed = true;
            self.changes.list_again |= revision < self.marks.nodes;
            self.marks.nodes = revision;
        }
    }

    pub fn node_progress(&mut self, revision: u64) {
        self.marks.nodes = self.marks.nodes.max(revision);
    }

    pub fn service_list_begins(&mut self) {
        self.services.list_begins();
    }

    pub fn apply_service(&mut self, object: &Value, origin: Origin) {
        let at = revision(object).unwrap_or_default();
        let affected = self.services.apply(object, origin == Origin::List, at);
        self.services_changed(affected);
    }

    pub fn remove_service(&mut self, object: &Value) {
        let at = revision(object).unwrap_or_default();
        let affected = self.services.remove(object, at);
        self.services_changed(affected);
    }

    pub fn service_list_ends(&mut self, revision: u64) {
        let affected = self.services.list_ends(revision);
        self.services_changed(affected);
        if self.marks.services == 0 {
            self.all_changed();
        }
        self.changes.list_again |= revision < self.marks.services;
        self.marks.services = revision;
    }

    pub fn service_progress(&mut self, revision: u64) {
        self.marks.services = self.marks.services.max(revision);
    }

    /// The answer to `Command::Read`. False when the question was withdrawn meanwhile.
    pub fn read(
        &mut self,
        reference: &ObjectKey,
        node: &NodeName,
        ticket: u64,
        answer: &Answer,
    ) -> bool {
        let Some(changed) = self
            .shared
            .read(reference, node, ticket, answer, &mut self.orders)
        else {
            return false;
        };
        if changed {
            self.reference_changed(reference);
        }
        // Also when no Pod waited: the node may have this object from now on.
        self.changes.nodes.insert(node.clone());
        self.release_waiting(reference, node);
        true
    }

    /// A change that `Command::Watch` delivered.
    pub fn observe(&mut self, reference: &ObjectKey, ticket: u64, answer: &Answer) {
        if self.shared.observe(reference, ticket, answer) {
            self.reference_changed(reference);
        }
    }

    /// The watch saw everything up to `view`.
    pub fn progress(&mut self, reference: &ObjectKey, ticket: u64, view: u64) {
        self.shared.progress(reference, ticket, view);
    }

    /// The server refused the watch to the node that carries it.
    pub fn refuse(&mut self, reference: &ObjectKey, ticket: u64) {
        self.shared.refused(reference, ticket, &mut self.orders);
    }

    /// The server keeps refusing `reference` to `node`: says so of each Pod that waits for it.
    pub fn stuck(&mut self, reference: &ObjectKey, node: &NodeName) {
        let uids = self.edges.get(node).into_iter().flat_map(|e| &e.pods);
        let pods = uids.filter_map(|uid| self.pods.get(uid));
        let waiting = pods.filter(|p| p.waits_for(reference));
        self.changes
            .malformed
            .extend(waiting.map(|p| p.refused(reference)));
    }

    /// Asks for everything that the node's Pods name once more. Gives what was asked for.
    pub fn read_again(&mut self, node: &NodeName) -> Vec<ObjectKey> {
        self.shared.read_again(node, &mut self.orders)
    }

    /// What the node must have, as of everything that was applied. `None` while its Pods are not
    /// known: it is no edge's node, or not listed yet. That is no empty set, and takes nothing away.
    pub fn desired(&self, node: &NodeName) -> Option<Desired> {
        let edge = self.edges.get(node).filter(|e| e.listed.is_some())?;
        let Marks {
            nodes, services, ..
        } = self.marks;
        let seen = nodes > 0 && services > 0;
        let all_listed = seen && self.nodes_listed && self.services.is_listed();
        let mut desired = Desired {
            complete: all_listed,
            all_listed,
            listed: Listed {
                pods: edge.listed.unwrap_or_default(),
                node: edge.node_listed.unwrap_or_default(),
            },
            ..Desired::default()
        };
        let mut namespaces = BTreeSet::new();
        let pods = edge.pods.iter().filter_map(|uid| self.pods.get(uid));
        for pod in pods.filter(|p| p.goes_down()) {
            namespaces.insert(pod.view.namespace.clone());
            desired.complete &= pod.is_current();
            desired.add(pod.key(), pod.shown());
            for reference in pod.references() {
                desired.add(reference, self.shared.granted(reference, node));
                desired.complete &= self.shared.is_granted_at(reference, node, 1);
            }
        }
        let services = self.services.of(&namespaces);
        for object in services.chain(self.nodes.get(node)) {
            desired.add(&object.object.key, Some(object));
        }
        Some(desired)
    }

    /// The live state of the node, for whoever writes its statuses.
    pub fn live(&self, node: &NodeName) -> Live {
        let uids = self.edges.get(node).into_iter().flat_map(|e| &e.pods);
        let pods = uids.filter_map(|uid| Some((uid.clone(), self.pods.get(uid)?.view.clone())));
        Live {
            pods: Arc::new(pods.collect()),
            node: self.live_nodes.get(node).cloned(),
        }
    }

    /// Whether a Pod of `node` names `reference`.
    pub fn is_wanted(&self, reference: &ObjectKey, node: &NodeName) -> bool {
        self.shared.is_wanted(reference, node)
    }

    pub fn is_edge(&self, node: &NodeName) -> bool {
        self.edges.contains_key(node)
    }

    /// How many Secrets and ConfigMaps are held.
    pub fn references_held(&self) -> usize {
        self.shared.len()
    }

    /// How many Pods are held.
    pub fn pods_held(&self) -> usize {
        self.pods.len()
    }

    fn place_pod(&mut self, seen: pod::Seen, object: &Value) {
        let (uid, node, revision) = (seen.uid.clone(), seen.node.clone(), seen.revision);
        let known = self.pods.remove(&uid);
        let is_new = known.is_none();
        let (mut pod, diff) = Pod::next(known, seen, object);
        self.changes.live.insert(node.clone());
        if is_new && pod.goes_down() {
            self.services.want(&pod.view.namespace, &node, revision);
        }
        // New wishes first: an object that both name keeps its watch.
        for reference in &diff.added {
            self.shared
                .want(reference, &node, revision, &mut self.orders);
        }
        for reference in &diff.dropped {
            self.shared.release(reference, &node, &mut self.orders);
        }
        pod.answer(|reference, least| self.shared.is_granted_at(reference, &node, least));
        pod.show_if_ready();
        if is_new || diff.content_changed {
            self.changes.malformed.extend(diff.malformed);
            self.changes.nodes.insert(node);
        }
        self.pods.insert(uid, pod);
    }

    fn drop_pod(&mut self, uid: &str) {
        let Some(pod) = self.pods.remove(uid) else {
            return;
        };
        let node = &pod.view.node;
        for reference in pod.references() {
            self.shared.release(reference, node, &mut self.orders);
        }
        if pod.goes_down() {
            self.services.release(&pod.view.namespace, node);
        }
        if let Some(edge) = self.edges.get_mut(node) {
            edge.pods.remove(uid);
        }
        self.changes.nodes.insert(node.clone());
        self.changes.live.insert(node.clone());
    }

    /// Shows what waited for this answer.
    fn release_waiting(&mut self, reference: &ObjectKey, node: &NodeName) {
        let Some(edge) = self.edges.get(node) else {
            return;
        };
        for uid in &edge.pods {
            let Some(pod) = self.pods.get_mut(uid).filter(|p| p.waits_for(reference)) else {
                continue;
            };
            pod.answer(|r, least| self.shared.is_granted_at(r, node, least));
            pod.show_if_ready();
            self.changes.nodes.insert(node.clone());
        }
    }

    fn reference_changed(&mut self, reference: &ObjectKey) {
        self.changes
            .nodes
            .extend(self.shared.nodes_wanting(reference).cloned());
    }

    /// Whether a list of this Node object reached at least as far as a watch's event.
    fn is_old_news(&self, name: &NodeName, revision: u64) -> bool {
        let listed = self.edges.get(name).and_then(|e| e.node_listed);
        listed.is_some_and(|listed| revision <= listed)
    }

    fn drop_node(&mut self, name: NodeName) {
        self.nodes.remove(&name);
        self.live_nodes.remove(&name);
        self.changes.live.insert(name.clone());
        self.node_changed(name);
    }

    fn node_changed(&mut self, name: NodeName) {
        if self.is_edge(&name) {
            self.changes.nodes.insert(name);
        }
    }

    fn services_changed(&mut self, affected: Affected) {
        match affected {
            Affected::Nobody => {}
            Affected::Nodes(nodes) => self.changes.nodes.extend(nodes),
            Affected::All => self.all_changed(),
        }
    }

    fn all_changed(&mut self) {
        self.changes.nodes.extend(self.edges.keys().cloned());
    }

    /// A consistent list at `revision` is below what was seen: the cluster was restored from a
    /// backup. Nothing is taken away, and nothing is complete before it was seen again.
    fn rewind(&mut self, revision: u64) {
        self.pods.values_mut().for_each(Pod::rewind);
        self.shared.rewind(&mut self.orders);
        // A feed that has noticed by itself may have listed the restored cluster already.
        let forget = |mark: &mut u64| *mark = if *mark > revision { 0 } else { *mark };
        self.marks.pods = 0;
        forget(&mut self.marks.nodes);
        forget(&mut self.marks.services);
        for edge in self.edges.values_mut() {
            edge.listed = edge.listed.map(|_| 0);
            edge.node_listed = edge.node_listed.filter(|listed| *listed <= revision);
        }
        self.all_changed();
        self.changes.rewound = true;
        self.changes.list_again = true;
    }
}

impl Desired {
    fn add(&mut self, key: &ObjectKey, object: Option<&Arc<Versioned>>) {
        match object {
            Some(object) => {
                self.objects.insert(key.clone(), object.clone());
            }
            None => {
                self.held_back.insert(key.clone());
            }
        }
    }
}

fn text<'a>(object: &'a Value, path: &str) -> Option<&'a str> {
    object.pointer(path).and_then(Value::as_str)
}

/// The object's resourceVersion. Kubernetes compares them as numbers since 1.35 (KEP-5504), and
/// etcd has never given anything else.
pub fn revision(object: &Value) -> Option<u64> {
    text(object, "/metadata/resourceVersion")?.parse().ok()
}

fn node_identity(object: &Value) -> Option<(NodeName, u64)> {
    let name = NodeName::parse(text(object, "/metadata/name")?).ok()?;
    Some((name, revision(object)?))
}

/// Whether this is a name that Kubernetes gives to an object of a namespace.
fn is_name(name: &str) -> bool {
    references::is_subdomain(name)
}

#[cfg(test)]
mod tests;
