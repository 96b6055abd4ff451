//! The Secrets and ConfigMaps that Pods name: who wants each, who may have it, who carries its watch.
//!
//! Pure. Each object is held once however many nodes want it. A node gets it only after it was read
//! once *as that node*, and one of the nodes that want it carries the one watch:
//!
//! ```text
//!  nobody wants it ──want──▶ read as the node ──answer──▶ watched as that node ─┐
//!         ▲                    (others: read, too)           │    carrier leaves │
//!         └──────────────── last node leaves ◀───────────────┘◀── another's ◀────┘
//! ```
//!
//! The carrier changes with the references because an open watch goes on delivering after the
//! right to it is gone: nothing at the server would end it.

use std::collections::BTreeMap;
use std::sync::Arc;

use common::ids::{NodeName, ObjectKey};
use common::object::{Content, Object};

use super::{Command, Orders};
use crate::downstream::versioned::Versioned;

/// An answer about one object: its content, at which revision it took it, and how far the answer
/// looked (a list's own resourceVersion; for a watch event that of the object).
#[derive(Debug, Clone)]
pub struct Answer {
    pub content: Content,
    pub revision: u64,
    pub view: u64,
}

#[derive(Default)]
pub(super) struct Shared {
    entries: BTreeMap<ObjectKey, Entry>,
}

#[derive(Default)]
struct Entry {
    current: Option<Arc<Versioned>>,
    wants: BTreeMap<NodeName, Want>,
    /// As whom the object is watched, and the ticket of that watch.
    carrier: Option<(NodeName, u64)>,
    /// Consecutive refusals of the watch, whoever carried it: the back-off of the next attempt.
    refusals: u32,
}

/// What one node's Pods ask of one object.
#[derive(Default)]
struct Want {
    pods: usize,
    /// The least revision that its Pods must see: an edit made before a Pod was is in the Pod.
    least: u64,
    /// The view of the last read as this node that was not refused.
    granted: Option<u64>,
    /// The ticket of the read that is under way.
    reading: Option<u64>,
}

impl Want {
    fn satisfied(&self) -> bool {
        self.granted.is_some_and(|view| view >= self.least)
    }

    fn read_if_due(&mut self, reference: &ObjectKey, node: &NodeName, out: &mut Orders) {
        if !self.satisfied() && self.reading.is_none() {
            self.read(reference, node, out);
        }
    }

    /// A read from now on; one that is under way may have been answered before the question.
    fn read(&mut self, reference: &ObjectKey, node: &NodeName, out: &mut Orders) {
        self.stop_reading(reference, node, out);
        let ticket = out.ticket();
        self.reading = Some(ticket);
        out.push(Command::Read {
            reference: reference.clone(),
            node: node.clone(),
            ticket,
        });
    }

    fn stop_reading(&mut self, reference: &ObjectKey, node: &NodeName, out: &mut Orders) {
        if self.reading.take().is_some() {
            out.push(Command::StopReading {
                reference: reference.clone(),
                node: node.clone(),
            });
        }
    }
}

impl Entry {
    /// Takes an answer unless a newer one is held. True when the content changed.
    fn take(&mut self, key: &ObjectKey, answer: &Answer) -> bool {
        let object = Object::new(key.clone(), answer.content.clone());
        let Some(current) = &self.current else {
            let first = Versioned::first(object, answer.revision);
            first.view.raise(answer.view);
            self.current = Some(first);
            return true;
        };
        if answer.view < current.view.get() {
            return false;
        }
        let next = Versioned::after(current, object, answer.revision);
        next.view.raise(answer.view);
        let changed = !Arc::ptr_eq(&next, current);
        self.current = Some(next);
        changed
    }

    fn watch(&mut self, key: &ObjectKey, node: NodeName, out: &mut Orders) {
        let ticket = out.ticket();
        self.carrier = Some((node.clone(), ticket));
        out.push(Command::Watch {
            reference: key.clone(),
            node,
            ticket,
            from: self.current.as_ref().map_or(0, |c| c.view.get()),
            refusals: self.refusals,
        });
    }

    /// The node that carries the watch after `last`: the next in order that was granted the object.
    fn next_carrier(&self, last: &NodeName) -> Option<NodeName> {
        let granted = |(node, want): (&NodeName, &Want)| {
            (want.granted.is_some() && node != last).then(|| node.clone())
        };
        let after = self.wants.range(last.clone()..).find_map(granted);
        after.or_else(|| self.wants.iter().find_map(granted))
    }
}

impl Shared {
    /// One more Pod of `node` names `key`, and must see at least revision `least` of it.
    pub(super) fn want(&mut self, key: &ObjectKey, node: &NodeName, least: u64, out: &mut Orders) {
        let entry = self.entries.entry(key.clone()).or_default();
        let want = entry.wants.entry(node.clone()).or_default();
        want.pods += 1;
        want.least = want.least.max(least);
        want.read_if_due(key, node, out);
    }

    /// One Pod of `node` fewer names `key`.
    pub(super) fn release(&mut self, key: &ObjectKey, node: &NodeName, out: &mut Orders) {
        let Some(entry) = self.entries.get_mut(key) else {
            return;
        };
        let Some(want) = entry.wants.get_mut(node) else {
            return;
        };
        want.pods = want.pods.saturating_sub(1);
        if want.pods > 0 {
            return;
        }
        want.stop_reading(key, node, out);
        entry.wants.remove(node);
        if entry
            .carrier
            .as_ref()
            .is_some_and(|(carrier, _)| carrier == node)
        {
            entry.carrier = None;
            entry.refusals = 0;
            match entry.next_carrier(node) {
                Some(next) => entry.watch(key, next, out),
                None => out.push(Command::Unwatch {
                    reference: key.clone(),
                }),
            }
        }
        if entry.wants.is_empty() {
            self.entries.remove(key);
        }
    }

    /// The answer to a read as `node`; `None` when it answers no open question, else whether the
    /// content changed.
    pub(super) fn read(
        &mut self,
        key: &ObjectKey,
        node: &NodeName,
        ticket: u64,
        answer: &Answer,
        out: &mut Orders,
    ) -> Option<bool> {
        let entry = self.entries.get_mut(key)?;
        let want = entry.wants.get_mut(node)?;
        if want.reading != Some(ticket) {
            return None;
        }
        want.reading = None;
        want.granted = want.granted.max(Some(answer.view));
        want.read_if_due(key, node, out);
        let changed = entry.take(key, answer);
        if entry.carrier.is_none() {
            entry.watch(key, node.clone(), out);
        }
        Some(changed)
    }

    /// What the watch delivered. True when the content changed.
    pub(super) fn observe(&mut self, key: &ObjectKey, ticket: u64, answer: &Answer) -> bool {
        let Some(entry) = self.watched_with(key, ticket) else {
            return false;
        };
        entry.refusals = 0;
        entry.take(key, answer)
    }

    /// The watch saw everything up to `view`, and nothing of this object in it.
    pub(super) fn progress(&mut self, key: &ObjectKey, ticket: u64, view: u64) {
        if let Some(entry) = self.watched_with(key, ticket) {
            entry.refusals = 0;
            if let Some(current) = &entry.current {
                current.view.raise(view);
            }
        }
    }

    /// The server refused the watch to its carrier: another one carries it, if there is one.
    pub(super) fn refused(&mut self, key: &ObjectKey, ticket: u64, out: &mut Orders) {
        let Some(entry) = self.watched_with(key, ticket) else {
            return;
        };
        entry.refusals = entry.refusals.saturating_add(1);
        let Some((refused, _)) = entry.carrier.clone() else {
            return;
        };
        if let Some(next) = entry.next_carrier(&refused) {
            entry.watch(key, next, out);
        }
    }

    /// The entry, if its watch still is the one with this ticket: a watch that was moved may have
    /// left words in the queue.
    fn watched_with(&mut self, key: &ObjectKey, ticket: u64) -> Option<&mut Entry> {
        let entry = self.entries.get_mut(key)?;
        let same = entry.carrier.as_ref().is_some_and(|(_, t)| *t == ticket);
        same.then_some(entry)
    }

    /// Reads all that `node` wants once more, whatever is held. Gives what was asked for.
    pub(super) fn read_again(&mut self, node: &NodeName, out: &mut Orders) -> Vec<ObjectKey> {
        let mut asked = Vec::new();
        for (key, entry) in &mut self.entries {
            if let Some(want) = entry.wants.get_mut(node) {
                want.read(key, node, out);
                asked.push(key.clone());
            }
        }
        asked
    }

    /// The cluster went back in time: what is held stays, but no revision of it counts any more,
    /// and everything is read and watched anew.
    pub(super) fn rewind(&mut self, out: &mut Orders) {
        for (key, entry) in &mut self.entries {
            if let Some(current) = &entry.current {
                current.view.set(0);
            }
            if entry.carrier.take().is_some() {
                out.push(Command::Unwatch {
                    reference: key.clone(),
                });
            }
            for (node, want) in &mut entry.wants {
                want.least = 0;
                // Still granted, so that nothing is taken from the node; at no revision that counts.
                want.granted = want.granted.map(|_| 0);
                want.read(key, node, out);
            }
        }
    }

    /// The object, once `node` was granted it.
    pub(super) fn granted(&self, key: &ObjectKey, node: &NodeName) -> Option<&Arc<Versioned>> {
        let entry = self.entries.get(key)?;
        entry.wants.get(node)?.granted?;
        entry.current.as_ref()
    }

    /// Whether `node` was granted `key` at `least` or later.
    pub(super) fn is_granted_at(&self, key: &ObjectKey, node: &NodeName, least: u64) -> bool {
        let want = self.entries.get(key).and_then(|e| e.wants.get(node));
        want.and_then(|w| w.granted)
            .is_some_and(|view| view >= least)
    }

    pub(super) fn is_wanted(&self, key: &ObjectKey, node: &NodeName) -> bool {
        self.entries
            .get(key)
            .is_some_and(|e| e.wants.contains_key(node))
    }

    pub(super) fn nodes_wanting(&self, key: &ObjectKey) -> impl Iterator<Item = &NodeName> {
        self.entries
            .get(key)
            .into_iter()
            .flat_map(|e| e.wants.keys())
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }
}
