//! An index, what is told to it, and what it said, in words.

use std::collections::BTreeSet;

use common::object::Content;
use serde_json::json;

use super::super::*;

/// An index and everything that came out of it.
pub(super) struct World {
    pub(super) index: Index,
    pub(super) commands: Vec<Command>,
    /// How many of them a test has looked at.
    pub(super) looked_at: usize,
    pub(super) changed: BTreeSet<NodeName>,
    pub(super) viewed: BTreeSet<NodeName>,
    pub(super) malformed: Vec<Malformed>,
}

pub(super) fn node(name: &str) -> NodeName {
    NodeName::parse(name).unwrap()
}

pub(super) fn config(name: &str) -> ObjectKey {
    ObjectKey::named(Kind::ConfigMap, "ns", name)
}

pub(super) fn answer(content: &str, revision: u64, view: u64) -> Answer {
    Answer {
        content: Content::Present(content.as_bytes().into()),
        revision,
        view,
    }
}

pub(super) fn absent(view: u64) -> Answer {
    Answer {
        content: Content::Absent,
        revision: view,
        view,
    }
}

/// A Pod with a UID, on a node, at a revision, that names these ConfigMaps.
pub(super) fn pod(uid: &str, on: &str, revision: u64, configs: &[&str]) -> Value {
    let volumes: Vec<Value> = configs
        .iter()
        .map(|c| json!({"name": c, "configMap": {"name": c}}))
        .collect();
    json!({
        "metadata": {"name": format!("p-{uid}"), "namespace": "ns", "uid": uid,
                     "resourceVersion": revision.to_string()},
        "spec": {"nodeName": on, "volumes": volumes},
        "status": {"phase": "Pending"},
    })
}

pub(super) fn with(mut object: Value, path: &str, value: Value) -> Value {
    let (parent, field) = path.rsplit_once('/').unwrap();
    object.pointer_mut(parent).unwrap()[field] = value;
    object
}

impl World {
    /// Edge nodes `a` and `b`, everything listed once at revision 10, nothing there.
    pub(super) fn new() -> Self {
        let mut world = Self {
            index: Index::default(),
            commands: Vec::new(),
            looked_at: 0,
            changed: BTreeSet::new(),
            viewed: BTreeSet::new(),
            malformed: Vec::new(),
        };
        world.index.edge_nodes(&[node("a"), node("b")].into());
        world.list_pods(10, &[]);
        world.index.node_list_ends(&Covered::All, 10);
        world.index.service_list_ends(10);
        world.drain();
        world.changed.clear();
        world
    }

    pub(super) fn list_pods(&mut self, revision: u64, pods: &[Value]) {
        self.index.pod_list_begins(&Covered::All, revision);
        pods.iter()
            .for_each(|p| self.index.apply_pod(p, Origin::List));
        self.index.pod_list_ends(&Covered::All, revision);
        self.drain();
    }

    pub(super) fn watch_pod(&mut self, pod: &Value) {
        self.index.apply_pod(pod, Origin::Watch);
        self.index.pod_progress(revision(pod).unwrap_or_default());
        self.drain();
    }

    pub(super) fn drain(&mut self) {
        let changes = self.index.take();
        self.commands.extend(changes.commands);
        self.changed.extend(changes.nodes);
        self.viewed.extend(changes.live);
        self.malformed.extend(changes.malformed);
    }

    /// The commands since the last look, in words.
    pub(super) fn said(&mut self) -> Vec<String> {
        let word = |command: &Command| match command {
            Command::Read {
                reference, node, ..
            } => format!("read {} as {node}", reference.name),
            Command::StopReading { reference, node } => {
                format!("stop reading {} as {node}", reference.name)
            }
            Command::Watch {
                reference,
                node,
                from,
                ..
            } => {
                format!("watch {} as {node} from {from}", reference.name)
            }
            Command::Unwatch { reference } => format!("unwatch {}", reference.name),
        };
        let said = self.commands[self.looked_at..].iter().map(word).collect();
        self.looked_at = self.commands.len();
        said
    }

    /// Answers the newest read of `name` as `on`.
    pub(super) fn answer(&mut self, name: &str, on: &str, answer: &Answer) {
        let ticket = self.ticket(|c| match c {
            Command::Read {
                reference,
                node,
                ticket,
            } => (&*reference.name == name && node.as_str() == on).then_some(*ticket),
            _ => None,
        });
        assert!(self.index.read(&config(name), &node(on), ticket, answer));
        self.drain();
    }

    pub(super) fn watch_ticket(&self, name: &str) -> u64 {
        self.ticket(|c| match c {
            Command::Watch {
                reference, ticket, ..
            } if &*reference.name == name => Some(*ticket),
            _ => None,
        })
    }

    pub(super) fn ticket(&self, find: impl Fn(&Command) -> Option<u64>) -> u64 {
        self.commands
            .iter()
            .rev()
            .find_map(find)
            .expect("such a command was given")
    }

    /// What the node gets, in words: kind, name and content, Pods by UID.
    pub(super) fn set(&self, on: &str) -> (Vec<String>, bool) {
        let Some(desired) = self.index.desired(&node(on)) else {
            return (Vec::new(), false);
        };
        let word = |versioned: &Arc<Versioned>| {
            let object = &versioned.object;
            let key = &object.key;
            match (&key.kind, &object.content) {
                (Kind::Pod, _) => format!("pod {}", key.uid),
                (Kind::Services, Content::Present(b)) => {
                    format!("services {} {}", key.namespace, String::from_utf8_lossy(b))
                }
                (_, Content::Absent) => format!("{} absent", key.name),
                (_, Content::Present(b)) => {
                    format!("{} {}", key.name, String::from_utf8_lossy(b))
                }
            }
        };
        let words = desired.objects.values().map(word);
        (
            words.filter(|w| !w.starts_with("services ")).collect(),
            desired.complete,
        )
    }

    pub(super) fn pods(&self, on: &str) -> (Vec<String>, bool) {
        let (words, complete) = self.set(on);
        (
            words
                .into_iter()
                .filter(|w| w.starts_with("pod "))
                .collect(),
            complete,
        )
    }
}
