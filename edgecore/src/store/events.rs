//! Events of Pods on their way to the cloud: bounded, merged, the oldest dropped first.
//!
//! Equal Events that wait merge into one with a count; it takes a new number, so that a session
//! that has sent the old one sends it again. Count and first time are absolute for an Event and its
//! first time: a receiver replaces, it does not add. What is dropped is counted in a [`Gap`].
//! Everything here is late and never blocks: an Event is worth less than the Pod.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use common::ids::ObjectKey;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::schema::{Table, Write};
use super::sequence::Sequence;
use super::{Store, StoreError};

/// Ten Pods that fail in ten ways each, twice over: an outage of days merges into these.
const MAX_EVENTS: usize = 256;
/// What they may take in memory and, at worst, on the disk again at each drop.
const MAX_BYTES: usize = 128 << 10;
/// The API server refuses a longer message (core/v1 Event validation).
const MAX_MESSAGE: usize = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum EventType {
    Normal,
    Warning,
}

/// One Event about a Pod (core/v1 Event: reason, message, `involvedObject.fieldPath`).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PodEvent {
    /// The Pod as `Pod/NAMESPACE/NAME/UID`.
    pub pod: String,
    /// The field of the Pod it speaks of, such as `spec.containers{web}`; empty for the whole Pod.
    pub field_path: String,
    pub kind: EventType,
    /// A word of the kubelet's: Pulled, Created, Started, Killing, BackOff, Failed, FailedMount, …
    pub reason: String,
    pub message: String,
}

impl PodEvent {
    pub fn new(
        pod: &ObjectKey,
        container: Option<&str>,
        kind: EventType,
        reason: &str,
        message: impl Into<String>,
    ) -> Self {
        Self {
            pod: pod.to_string(),
            field_path: container
                .map(|c| format!("spec.containers{{{c}}}"))
                .unwrap_or_default(),
            kind,
            reason: reason.into(),
            message: message.into(),
        }
    }

    fn cut_message(mut self) -> Self {
        if self.message.len() > MAX_MESSAGE {
            let end = self
                .message
                .floor_char_boundary(MAX_MESSAGE - '…'.len_utf8());
            self.message.truncate(end);
            self.message.push('…');
        }
        self
    }
}

/// An Event as it waits for the cloud.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventRecord {
    pub seq: u64,
    pub event: PodEvent,
    /// How often it was emitted since `first_ms`.
    pub count: u32,
    /// Wall clock, milliseconds since 1970, as the device knew it.
    pub first_ms: i64,
    pub last_ms: i64,
}

impl EventRecord {
    fn size(&self) -> usize {
        let e = &self.event;
        64 + e.pod.len() + e.field_path.len() + e.reason.len() + e.message.len()
    }
}

/// Events that were dropped unseen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// All of them had numbers up to this.
    pub through: u64,
    pub count: u64,
}

/// What waits behind a number.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Page {
    pub gap: Option<Gap>,
    pub events: Vec<EventRecord>,
}

/// A shared handle; cheap to clone.
#[derive(Clone)]
pub struct Events {
    inner: Arc<Inner>,
}

struct Inner {
    store: Store,
    state: Mutex<State>,
    changed: watch::Sender<u64>,
}

struct State {
    waiting: BTreeMap<u64, EventRecord>,
    bytes: usize,
    gap: Gap,
    sequence: Sequence,
}

const GAP: &str = "events-gap";

/// Fixed width, so that the order of keys is the order of numbers.
fn key(seq: u64) -> String {
    format!("{seq:016x}")
}

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("texts and numbers are always JSON")
}

impl State {
    fn insert(&mut self, record: EventRecord) -> Write {
        self.bytes += record.size();
        let write = Write::put(Table::Events, key(record.seq), json(&record));
        self.waiting.insert(record.seq, record);
        write
    }

    fn remove(&mut self, seq: u64) -> Option<(EventRecord, Write)> {
        let record = self.waiting.remove(&seq)?;
        self.bytes -= record.size();
        Some((record, Write::remove(Table::Events, key(seq))))
    }

    fn equal(&self, event: &PodEvent) -> Option<u64> {
        let mut newest_first = self.waiting.values().rev();
        newest_first.find(|r| r.event == *event).map(|r| r.seq)
    }

    fn drop_oldest(&mut self, writes: &mut Vec<Write>) {
        while self.waiting.len() > MAX_EVENTS || self.bytes > MAX_BYTES {
            let Some(oldest) = self.waiting.keys().next().copied() else {
                return;
            };
            if let Some((record, write)) = self.remove(oldest) {
                self.gap.through = oldest;
                self.gap.count += u64::from(record.count);
                writes.extend([write, Write::put(Table::State, GAP, json(&self.gap))]);
            }
        }
    }
}

impl Events {
    /// Reads what waits. Blocks for the read and one sync. A record that cannot be read is skipped.
    pub fn load(store: &Store) -> Result<Self, StoreError> {
        let gap = store.get(Table::State, GAP.as_bytes())?;
        let mut state = State {
            waiting: BTreeMap::new(),
            bytes: 0,
            gap: gap
                .and_then(|b| serde_json::from_slice(&b).ok())
                .unwrap_or_default(),
            sequence: Sequence::load(store, "events")?,
        };
        for (_, value) in store.scan(Table::Events, &[])? {
            if let Ok(record) = serde_json::from_slice(&value) {
                state.insert(record);
            }
        }
        Ok(Self {
            inner: Arc::new(Inner {
                store: store.clone(),
                state: Mutex::new(state),
                changed: watch::Sender::new(0),
            }),
        })
    }

    pub fn in_memory() -> Self {
        Self::load(&Store::in_memory()).expect("an empty store in memory has nothing malformed")
    }

    fn state(&self) -> MutexGuard<'_, State> {
        let state = self.inner.state.lock();
        state.unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues an Event; never blocks and never fails: an Event is worth less than the Pod.
    pub fn emit(&self, event: PodEvent) {
        self.emit_at(event, jiff::Timestamp::now().as_millisecond());
    }

    /// As [`Self::emit`], at a given wall-clock time in milliseconds since 1970.
    pub fn emit_at(&self, event: PodEvent, now_ms: i64) {
        let event = event.cut_message();
        let mut writes = Vec::new();
        let mut state = self.state();
        let mut record = EventRecord {
            seq: state.sequence.take(&self.inner.store),
            event,
            count: 1,
            first_ms: now_ms,
            last_ms: now_ms,
        };
        let merged = state.equal(&record.event).and_then(|seq| state.remove(seq));
        if let Some((old, write)) = merged {
            record.count = old.count.saturating_add(1);
            record.first_ms = old.first_ms;
            writes.push(write);
        }
        writes.push(state.insert(record));
        state.drop_oldest(&mut writes);
        self.inner.store.later(writes);
        drop(state);
        self.inner.changed.send_modify(|n| *n += 1);
    }

    /// At most `max` Events with numbers above `seq`, oldest first, and what was dropped there.
    pub fn after(&self, seq: u64, max: usize) -> Page {
        let state = self.state();
        let behind = state.waiting.range(seq.saturating_add(1)..).take(max);
        Page {
            gap: (state.gap.through > seq).then_some(state.gap),
            events: behind.map(|(_, record)| record.clone()).collect(),
        }
    }

    /// The cloud holds all Events up to this number, and the gap up to it.
    pub fn ack(&self, seq: u64) {
        let mut state = self.state();
        let done: Vec<u64> = state.waiting.range(..=seq).map(|(n, _)| *n).collect();
        let removed = done.into_iter().filter_map(|n| state.remove(n));
        let mut writes: Vec<Write> = removed.map(|(_, write)| write).collect();
        if state.gap.count > 0 && state.gap.through <= seq {
            state.gap = Gap::default();
            writes.push(Write::remove(Table::State, GAP));
        }
        self.inner.store.later(writes);
    }

    /// Wakes after every Event.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changed.subscribe()
    }

    /// What has been queued, for tests of what emits.
    pub fn drain(&self) -> Vec<PodEvent> {
        let page = self.after(0, usize::MAX);
        self.ack(u64::MAX);
        page.events.into_iter().map(|r| r.event).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(pod: &str, message: &str) -> PodEvent {
        let key = ObjectKey::pod("ns", pod, "1");
        PodEvent::new(&key, Some("c"), EventType::Warning, "BackOff", message)
    }

    fn shown(page: &Page) -> Vec<(&str, u32, i64, i64)> {
        let events = page.events.iter();
        events
            .map(|r| (r.event.message.as_str(), r.count, r.first_ms, r.last_ms))
            .collect()
    }

    #[test]
    fn equal_events_that_wait_are_one_with_a_count() {
        let events = Events::in_memory();
        events.emit_at(event("a", "x"), 10);
        events.emit_at(event("a", "y"), 20);
        let sent = events.after(0, 1).events[0].seq;
        events.emit_at(event("a", "x"), 30);
        events.emit_at(event("b", "x"), 40);
        let page = events.after(0, 10);
        let expected = [("y", 1, 20, 20), ("x", 2, 10, 30), ("x", 1, 40, 40)];
        assert_eq!(shown(&page), expected);
        // The merged one is sent again: the answer to the old number does not cover it.
        events.ack(sent);
        assert_eq!(events.after(sent, 10), page);
        events.ack(page.events[1].seq);
        assert_eq!(shown(&events.after(0, 10)), expected[2..]);
        events.ack(u64::MAX);
        events.emit_at(event("a", "x"), 50);
        assert_eq!(shown(&events.after(0, 10)), [("x", 1, 50, 50)]);
    }

    #[test]
    fn what_is_dropped_is_counted_until_the_gap_is_acknowledged() {
        for (len, message) in [(MAX_EVENTS, 1), (MAX_BYTES / 1200, 1024)] {
            let events = Events::in_memory();
            let many = MAX_EVENTS + 100;
            for n in 0..many {
                let text = format!("{n:05}{}", "x".repeat(message));
                events.emit_at(event("a", &text), n as i64);
            }
            let page = events.after(0, usize::MAX);
            let gap = page.gap.unwrap();
            assert!(
                page.events.len().abs_diff(len) < 20,
                "{}",
                page.events.len()
            );
            assert_eq!(gap.count as usize + page.events.len(), many);
            assert!(gap.through < page.events[0].seq);
            assert_eq!(events.after(gap.through, 1).gap, None);
            events.ack(gap.through);
            assert_eq!(events.after(0, 1).gap, None);
        }
    }

    #[test]
    fn what_waits_survives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(dir.path()).unwrap();
        let events = Events::load(&store).unwrap();
        for n in 0..MAX_EVENTS + 3 {
            events.emit_at(event("a", &n.to_string()), 1);
        }
        events.ack(events.after(0, 5).events[4].seq);
        let mut page = events.after(0, 500);
        drop((events, store));
        let (store, _) = Store::open(dir.path()).unwrap();
        let events = Events::load(&store).unwrap();
        assert_eq!(events.after(0, 500), page);
        events.emit_at(event("a", "new"), 2);
        let newest = events.after(0, 500).events.pop().unwrap();
        assert!(newest.seq > page.events.pop().unwrap().seq);
    }

    #[test]
    fn a_message_is_cut_at_a_character() {
        let long = event("a", &"ä".repeat(1000)).cut_message().message;
        assert!(long.len() <= MAX_MESSAGE && long.ends_with("ä…"));
    }
}
