//! One Pod of an edge node in the index: what its node is shown, and what of it the cloud sees.
//!
//! Pure. Memory of a Pod: its trimmed bytes (2 to 5 KB), at most two older versions of them, and
//! its live state.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use common::ids::{Kind, NodeName, ObjectKey};
use common::object::Object;
use common::trim;
use serde_json::Value;

use super::live::PodView;
use super::{Malformed, is_name, revision, text};
use crate::downstream::references;
use crate::downstream::versioned::Versioned;

/// The reason of an Event on an object that cannot be understood.
pub(super) const MALFORMED: &str = "Malformed";
const REFUSED: &str = "ReferenceRefused";

/// What every Pod must have to be placed.
pub(super) struct Seen {
    pub(super) uid: Arc<str>,
    pub(super) node: NodeName,
    pub(super) revision: u64,
    namespace: Arc<str>,
    name: Arc<str>,
}

impl Seen {
    pub(super) fn parse(object: &Value) -> Result<Self, Malformed> {
        let field = |path| text(object, path).unwrap_or_default();
        let (namespace, name) = (field("/metadata/namespace"), field("/metadata/name"));
        let wrong = |message: &str| report(MALFORMED, namespace, name, uid(object), message);
        let uid = uid(object)
            .ok_or_else(|| wrong("not sent to its edge node: metadata.uid is not valid"))?;
        if !is_name(namespace) || !is_name(name) {
            return Err(wrong(
                "not sent to its edge node: its name or namespace is not valid",
            ));
        }
        let node = NodeName::parse(field("/spec/nodeName"))
            .map_err(|_| wrong("not sent to any node: spec.nodeName is not a node's name"))?;
        let revision = revision(object).ok_or_else(|| {
            wrong("not sent to its edge node: its resourceVersion is not a number")
        })?;
        Ok(Self {
            uid: uid.into(),
            node,
            revision,
            namespace: namespace.into(),
            name: name.into(),
        })
    }
}

/// The UID of a Pod, if it is one: letters, digits and hyphens.
pub(super) fn uid(object: &Value) -> Option<&str> {
    let uid = text(object, "/metadata/uid")?;
    let fits = !uid.is_empty() && uid.len() <= 128;
    let plain = uid.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    (fits && plain).then_some(uid)
}

fn report(
    reason: &'static str,
    namespace: &str,
    name: &str,
    uid: Option<&str>,
    message: &str,
) -> Malformed {
    let cut = |text: &str| text.chars().take(253).collect();
    Malformed {
        reason,
        kind: Kind::Pod,
        namespace: cut(namespace),
        name: cut(name),
        uid: uid.map(cut).unwrap_or_default(),
        message: message.into(),
    }
}

/// What a new version of a Pod changed.
#[derive(Debug, Default)]
pub(super) struct Diff {
    pub(super) added: Vec<ObjectKey>,
    pub(super) dropped: Vec<ObjectKey>,
    pub(super) content_changed: bool,
    pub(super) malformed: Option<Malformed>,
}

pub(super) struct Pod {
    pub(super) view: Arc<PodView>,
    latest: Arc<Versioned>,
    shown: Option<Arc<Versioned>>,
    references: BTreeSet<ObjectKey>,
    /// References not yet read, each with the least revision that the answer must reach.
    pending: BTreeMap<ObjectKey, u64>,
    /// Whether it may be started, and so waits for what it names.
    starts: bool,
}

impl Pod {
    pub(super) fn next(known: Option<Self>, seen: Seen, object: &Value) -> (Self, Diff) {
        let key = ObjectKey::pod(&seen.namespace, &seen.name, &seen.uid);
        let view = Arc::new(PodView::of(
            object,
            &seen.namespace,
            &seen.name,
            &seen.uid,
            &seen.node,
            seen.revision,
        ));
        let trimmed = Object::present(key, trim::pod(object));
        let ended = trim::is_terminal(object);
        let is_mirror = view.mirror.is_some();
        let named = if ended || is_mirror {
            references::Named::default()
        } else {
            references::named(Kind::Pod, &seen.namespace, object)
        };
        let starts = !ended && !is_mirror && view.deletion_timestamp.is_none();
        let mut diff = Diff {
            malformed: impossible(&view, &named.impossible),
            ..Diff::default()
        };
        let pod = match known {
            None => {
                diff.content_changed = true;
                diff.added = named.references.iter().cloned().collect();
                let pending = diff
                    .added
                    .iter()
                    .map(|r| (r.clone(), seen.revision))
                    .collect();
                Self {
                    view,
                    latest: Versioned::first(trimmed, seen.revision),
                    shown: None,
                    references: named.references,
                    pending,
                    starts,
                }
            }
            Some(old) => {
                diff.added = named
                    .references
                    .difference(&old.references)
                    .cloned()
                    .collect();
                diff.dropped = old
                    .references
                    .difference(&named.references)
                    .cloned()
                    .collect();
                let latest = Versioned::after(&old.latest, trimmed, seen.revision);
                diff.content_changed = !Arc::ptr_eq(&latest, &old.latest) || starts != old.starts;
                let mut pending = old.pending;
                pending.retain(|r, _| named.references.contains(r));
                pending.extend(diff.added.iter().map(|r| (r.clone(), seen.revision)));
                Self {
                    view,
                    latest,
                    shown: old.shown,
                    references: named.references,
                    pending,
                    starts,
                }
            }
        };
        (pod, diff)
    }

    pub(super) fn goes_down(&self) -> bool {
        self.view.mirror.is_none()
    }

    pub(super) fn references(&self) -> impl Iterator<Item = &ObjectKey> {
        self.references.iter()
    }

    pub(super) fn shown(&self) -> Option<&Arc<Versioned>> {
        self.shown.as_ref()
    }

    /// The key under which the node knows it.
    pub(super) fn key(&self) -> &ObjectKey {
        &self.latest.object.key
    }

    /// Whether the node is shown the newest version.
    pub(super) fn is_current(&self) -> bool {
        self.shown
            .as_ref()
            .is_some_and(|s| Arc::ptr_eq(s, &self.latest))
    }

    pub(super) fn waits_for(&self, reference: &ObjectKey) -> bool {
        self.pending.contains_key(reference)
    }

    /// Forgets what `answered` says was read.
    pub(super) fn answer(&mut self, answered: impl Fn(&ObjectKey, u64) -> bool) {
        self.pending
            .retain(|reference, least| !answered(reference, *least));
    }

    pub(super) fn show_if_ready(&mut self) {
        if self.goes_down() && (self.pending.is_empty() || !self.starts) {
            self.shown = Some(self.latest.clone());
        }
    }

    /// The report that this Pod waits because `reference` is refused to its node.
    pub(super) fn refused(&self, reference: &ObjectKey) -> Malformed {
        let view = &self.view;
        let message = format!(
            "waits for {reference}: the API server refuses it to node {}; check that CloudCore's \
             role covers it in this namespace (tried again by itself)",
            view.node
        );
        report(
            REFUSED,
            &view.namespace,
            &view.name,
            Some(&view.uid),
            &message,
        )
    }

    /// The cluster went back in time: any answer from now on will do.
    pub(super) fn rewind(&mut self) {
        self.pending.values_mut().for_each(|least| *least = 1);
    }
}

fn impossible(view: &PodView, names: &BTreeSet<String>) -> Option<Malformed> {
    if names.is_empty() {
        return None;
    }
    let shown: Vec<&str> = names.iter().take(5).map(String::as_str).collect();
    let message = format!(
        "names {shown:?} as a Secret or ConfigMap, but no object can have such a name; \
         correct the Pod's template"
    );
    Some(report(
        MALFORMED,
        &view.namespace,
        &view.name,
        Some(&view.uid),
        &message,
    ))
}
