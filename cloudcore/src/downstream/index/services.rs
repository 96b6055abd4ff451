//! The Services of each namespace, as the environment of a Pod needs them.
//!
//! Pure. Holds one line per Service of the cluster (name, address, ports), and one object per
//! namespace that a node uses. `default` exists twice: whole for nodes with Pods there, and with
//! nothing but `kubernetes`, which every Pod's environment has, for all others.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use common::ids::{Kind, NodeName, ObjectKey};
use common::object::Object;
use common::trim;
use serde_json::Value;

use crate::downstream::versioned::Versioned;

/// The namespace whose `kubernetes` Service is in every Pod's environment.
const DEFAULT: &str = "default";
const API_SERVICE: &str = "kubernetes";

#[derive(Default)]
pub(super) struct Services {
    /// Namespace, name, line: text, since a parsed line takes five times its bytes.
    lines: BTreeMap<Arc<str>, BTreeMap<Box<str>, Box<str>>>,
    /// For each namespace in use, how many Pods of which node use it.
    users: BTreeMap<Arc<str>, BTreeMap<NodeName, usize>>,
    objects: BTreeMap<Arc<str>, Arc<Versioned>>,
    api_only: Option<Arc<Versioned>>,
    /// The names seen by the list that is under way.
    listing: BTreeSet<(Arc<str>, Box<str>)>,
    listed: bool,
}

/// Which nodes see a change.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Affected {
    Nobody,
    Nodes(Vec<NodeName>),
    /// `kubernetes` itself changed.
    All,
}

impl Services {
    pub(super) fn apply(&mut self, object: &Value, listing: bool, revision: u64) -> Affected {
        let Some((namespace, name)) = identity(object) else {
            return Affected::Nobody;
        };
        if listing {
            self.listing.insert((namespace.clone(), name.clone()));
        }
        let line = trim::service(object).map(|line| {
            String::from_utf8_lossy(&trim::bytes(line))
                .into_owned()
                .into()
        });
        self.set(&namespace, &name, line, revision)
    }

    pub(super) fn remove(&mut self, object: &Value, revision: u64) -> Affected {
        match identity(object) {
            Some((namespace, name)) => self.set(&namespace, &name, None, revision),
            None => Affected::Nobody,
        }
    }

    pub(super) fn list_begins(&mut self) {
        self.listing.clear();
    }

    /// The list is whole: what it did not hold is gone. Every node may have waited for it.
    pub(super) fn list_ends(&mut self, revision: u64) -> Affected {
        let seen = std::mem::take(&mut self.listing);
        let mut gone = Vec::new();
        for (namespace, lines) in &self.lines {
            let missing = lines
                .keys()
                .filter(|n| !seen.contains(&(namespace.clone(), (*n).clone())));
            gone.extend(missing.map(|name| (namespace.clone(), name.clone())));
        }
        let mut affected = Vec::new();
        for (namespace, name) in gone {
            match self.set(&namespace, &name, None, revision) {
                Affected::Nobody => {}
                Affected::Nodes(nodes) => affected.extend(nodes),
                Affected::All => return self.first_list(revision),
            }
        }
        if self.listed {
            Affected::Nodes(affected)
        } else {
            self.first_list(revision)
        }
    }

    pub(super) fn is_listed(&self) -> bool {
        self.listed
    }

    /// One Pod more of `node` in `namespace`.
    pub(super) fn want(&mut self, namespace: &Arc<str>, node: &NodeName, revision: u64) {
        let users = self.users.entry(namespace.clone()).or_default();
        *users.entry(node.clone()).or_default() += 1;
        if !self.objects.contains_key(namespace) {
            self.build(namespace, revision);
        }
    }

    /// One Pod fewer of `node` in `namespace`.
    pub(super) fn release(&mut self, namespace: &Arc<str>, node: &NodeName) {
        let Some(users) = self.users.get_mut(namespace) else {
            return;
        };
        if let Some(pods) = users.get_mut(node) {
            *pods -= 1;
            if *pods == 0 {
                users.remove(node);
            }
        }
        if users.is_empty() {
            self.users.remove(namespace);
            self.objects.remove(namespace);
        }
    }

    /// What a node with Pods in `namespaces` gets. Nothing before the first list: an empty list of
    /// Services is an answer, and this would not be one.
    pub(super) fn of<'a>(
        &'a self,
        namespaces: &'a BTreeSet<Arc<str>>,
    ) -> impl Iterator<Item = &'a Arc<Versioned>> {
        let own = namespaces.iter().filter_map(|n| self.objects.get(n));
        let api = (!namespaces.contains(DEFAULT)).then_some(&self.api_only);
        let all = own.chain(api.into_iter().flatten());
        all.filter(|_| self.listed)
    }

    fn first_list(&mut self, revision: u64) -> Affected {
        self.listed = true;
        self.build_api_only(revision);
        Affected::All
    }

    fn set(
        &mut self,
        namespace: &Arc<str>,
        name: &str,
        line: Option<Box<str>>,
        revision: u64,
    ) -> Affected {
        let lines = self.lines.entry(namespace.clone()).or_default();
        let before = match line {
            Some(line) => {
                let same = lines.get(name) == Some(&line);
                lines.insert(name.into(), line);
                !same
            }
            None => lines.remove(name).is_some(),
        };
        if lines.is_empty() {
            self.lines.remove(namespace);
        }
        if !before {
            return Affected::Nobody;
        }
        if self.users.contains_key(namespace) {
            self.build(namespace, revision);
        }
        if namespace.as_ref() == DEFAULT && name == API_SERVICE {
            self.build_api_only(revision);
            return Affected::All;
        }
        let users = self.users.get(namespace);
        Affected::Nodes(users.into_iter().flat_map(|u| u.keys().cloned()).collect())
    }

    fn build(&mut self, namespace: &Arc<str>, revision: u64) {
        let object = object(
            namespace,
            self.lines
                .get(namespace)
                .into_iter()
                .flat_map(|l| l.values()),
        );
        let next = match self.objects.get(namespace) {
            Some(old) => Versioned::after(old, object, revision),
            None => Versioned::first(object, revision),
        };
        self.objects.insert(namespace.clone(), next);
    }

    fn build_api_only(&mut self, revision: u64) {
        let line = self.lines.get(DEFAULT).and_then(|l| l.get(API_SERVICE));
        let object = object(DEFAULT, line);
        self.api_only = Some(match &self.api_only {
            Some(old) => Versioned::after(old, object, revision),
            None => Versioned::first(object, revision),
        });
    }
}

/// The lines in the order of their names.
fn object<'a>(namespace: &str, lines: impl IntoIterator<Item = &'a Box<str>>) -> Object {
    let lines: Vec<&str> = lines.into_iter().map(|l| &**l).collect();
    let bytes = format!("[{}]", lines.join(",")).into_bytes();
    Object::present(ObjectKey::named(Kind::Services, namespace, ""), bytes)
}

fn identity(object: &Value) -> Option<(Arc<str>, Box<str>)> {
    let text = |path| object.pointer(path).and_then(Value::as_str);
    Some((
        text("/metadata/namespace")?.into(),
        text("/metadata/name")?.into(),
    ))
}
