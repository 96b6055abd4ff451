//! What this node tells the cloud about its Pods and itself: the latest value of each, durable,
//! kept until the Pod it speaks of is forgotten.
//!
//! Each change gets the next number of one sequence; (incarnation, number) never stands for two
//! values. A status may be sent before it is durable and becomes durable within 100 ms, together
//! with others: what a power cut takes is observed again, and a start that does not follow an
//! orderly stop numbers every report anew, so that the cloud takes the older value for what it is,
//! the node's word of now. `gone` is different. The cloud deletes the Pod on that word, so it is
//! durable before the session sees it.
//!
//! In memory: the bytes of each report, not parsed. Never: the same report written twice in a row.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use common::ids::ObjectKey;
use common::object::{ContentHash, Digest};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tracing::error;

use super::schema::{Table, Write};
use super::sequence::Sequence;
use super::{Store, StoreError};

/// What the node says of one Pod.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PodReport {
    /// The Pod's status as the node sees it (`PodStatus` of core/v1, only fields the node owns).
    pub status: serde_json::Value,
    /// Containers, volumes and cgroups are gone: the API object may be deleted.
    pub gone: bool,
}

/// One report as the session sends it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The Pod, or [`node_key`].
    pub key: ObjectKey,
    pub seq: u64,
    /// JSON: a Pod's status, or what [`Reports::put_node`] was given.
    pub bytes: Arc<[u8]>,
    pub gone: bool,
}

/// The key of the Node's own report. It carries no name: there is one Node per store.
pub fn node_key() -> ObjectKey {
    ObjectKey::own_node()
}

/// A shared handle; cheap to clone. Equal reports are not written twice.
#[derive(Clone)]
pub struct Reports {
    inner: Arc<Inner>,
}

struct Inner {
    store: Store,
    state: Mutex<State>,
    changed: watch::Sender<u64>,
}

struct State {
    entries: BTreeMap<ObjectKey, Entry>,
    sequence: Sequence,
}

#[derive(Clone)]
struct Entry {
    seq: u64,
    /// The highest number of this key that the cloud acknowledged.
    acked: u64,
    gone: bool,
    bytes: Arc<[u8]>,
    /// The session may see it.
    visible: bool,
}

impl Entry {
    fn report(&self, key: &ObjectKey) -> Report {
        Report {
            key: key.clone(),
            seq: self.seq,
            bytes: self.bytes.clone(),
            gone: self.gone,
        }
    }

    /// `seq:u64 gone:u8 bytes`
    fn write(&self, key: &ObjectKey) -> Write {
        let mut value = self.seq.to_be_bytes().to_vec();
        value.push(u8::from(self.gone));
        value.extend_from_slice(&self.bytes);
        Write::put(Table::Reports, key.to_string(), value)
    }

    fn parse(value: &[u8], acked: u64) -> Option<Self> {
        let (seq, rest) = value.split_first_chunk()?;
        let (gone, bytes) = rest.split_first()?;
        Some(Self {
            seq: u64::from_be_bytes(*seq),
            acked,
            gone: *gone != 0,
            bytes: bytes.into(),
            visible: true,
        })
    }
}

fn load_entry(store: &Store, key: &[u8], value: &[u8]) -> Result<(ObjectKey, Entry), StoreError> {
    let malformed = |why: &str| StoreError::Record {
        key: format!("Reports/{}", String::from_utf8_lossy(key)),
        why: why.into(),
    };
    let acked = store.get(Table::Acks, key)?.unwrap_or_default();
    let acked = acked.first_chunk().map_or(0, |b| u64::from_be_bytes(*b));
    let text = std::str::from_utf8(key).map_err(|_| malformed("its key is no text"))?;
    let parsed = ObjectKey::parse(text).map_err(|_| malformed("its key is no object key"))?;
    let entry = Entry::parse(value, acked).ok_or_else(|| malformed("it is too short"))?;
    Ok((parsed, entry))
}

impl Reports {
    /// Reads what was last said. Blocks for the read and one sync.
    pub fn load(store: &Store) -> Result<Self, StoreError> {
        let mut sequence = Sequence::load(store, "reports")?;
        let mut entries = BTreeMap::new();
        for (key, value) in store.scan(Table::Reports, &[])? {
            let (key, mut entry) = load_entry(store, &key, &value)?;
            if !store.continues() {
                entry.seq = sequence.take(store);
                store.later(vec![entry.write(&key)]);
            }
            entries.insert(key, entry);
        }
        let inner = Inner {
            store: store.clone(),
            state: Mutex::new(State { entries, sequence }),
            changed: watch::Sender::new(0),
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    pub fn in_memory() -> Self {
        Self::load(&Store::in_memory()).expect("an empty store in memory has nothing malformed")
    }

    fn state(&self) -> MutexGuard<'_, State> {
        let state = self.inner.state.lock();
        state.unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        self.inner.changed.send_modify(|n| *n += 1);
    }

    /// Replaces what is said of this Pod. Never blocks.
    pub fn put_pod(&self, key: &ObjectKey, report: PodReport) {
        self.put(key, &report.status, report.gone);
    }

    /// Replaces what is said of the Node. Never blocks.
    pub fn put_node(&self, json: &serde_json::Value) {
        self.put(&node_key(), json, false);
    }

    fn put(&self, key: &ObjectKey, json: &serde_json::Value, gone: bool) {
        let bytes: Arc<[u8]> = match serde_json::to_vec(json) {
            Ok(bytes) => bytes.into(),
            Err(e) => return error!(%key, error = %e, "a report cannot be written as JSON"),
        };
        let store = &self.inner.store;
        let mut state = self.state();
        let old = state.entries.get(key);
        if old.is_some_and(|e| e.bytes == bytes && e.gone == gone) {
            return;
        }
        let acked = old.map_or(0, |e| e.acked);
        let seq = state.sequence.take(store);
        let entry = Entry {
            seq,
            acked,
            gone,
            bytes,
            visible: !gone,
        };
        // Staged under the lock, so that a later report of another thread cannot come before it.
        store.later(vec![entry.write(key)]);
        state.entries.insert(key.clone(), entry);
        drop(state);
        if gone {
            self.show_when_durable(key.clone(), seq);
        } else {
            self.wake();
        }
    }

    fn show_when_durable(&self, key: ObjectKey, seq: u64) {
        // Weak: a callback that waits for a full disk must not keep the store open.
        let inner = Arc::downgrade(&self.inner);
        let then = move || {
            let Some(inner) = inner.upgrade() else { return };
            let reports = Reports { inner };
            if let Some(entry) = reports.state().entries.get_mut(&key)
                && entry.seq == seq
            {
                entry.visible = true;
            }
            reports.wake();
        };
        self.inner.store.soon(Vec::new(), Box::new(then));
    }

    /// What was last said of this Pod, also before a restart.
    pub fn pod(&self, key: &ObjectKey) -> Option<PodReport> {
        let entry = self.state().entries.get(key).cloned()?;
        let status = serde_json::from_slice(&entry.bytes);
        Some(PodReport {
            status: status
                .inspect_err(|e| error!(%key, error = %e, "a stored report is malformed"))
                .ok()?,
            gone: entry.gone,
        })
    }

    /// The cloud holds this report, or a later one, of this Pod. Never blocks.
    pub fn ack_pod(&self, key: &ObjectKey, seq: u64) {
        let mut state = self.state();
        let Some(entry) = state.entries.get_mut(key) else {
            return;
        };
        // An answer to a number that was never sent is no answer.
        let seq = seq.min(entry.seq);
        if seq <= entry.acked {
            return;
        }
        entry.acked = seq;
        let finished = entry.gone && seq == entry.seq;
        let write = Write::put(Table::Acks, key.to_string(), seq.to_be_bytes());
        self.inner.store.later(vec![write]);
        drop(state);
        if finished {
            self.wake();
        }
    }

    pub fn ack_node(&self, seq: u64) {
        self.ack_pod(&node_key(), seq);
    }

    /// Whether the cloud holds that this Pod is gone: its records may be forgotten. `changes` wakes
    /// when this becomes true.
    pub fn gone_acknowledged(&self, key: &ObjectKey) -> bool {
        let state = self.state();
        let entry = state.entries.get(key);
        entry.is_some_and(|e| e.gone && e.acked >= e.seq)
    }

    fn select(&self, wanted: impl Fn(&Entry) -> bool) -> Vec<Report> {
        let state = self.state();
        let entries = state.entries.iter();
        let shown = entries.filter(|(_, e)| e.visible && wanted(e));
        let mut reports: Vec<Report> = shown.map(|(key, e)| e.report(key)).collect();
        reports.sort_by_key(|r| r.seq);
        reports
    }

    /// What the cloud has not acknowledged, the longest waiting first.
    pub fn pending(&self) -> Vec<Report> {
        self.select(|e| e.acked < e.seq)
    }

    /// Every report, for a cloud that holds none.
    pub fn all(&self) -> Vec<Report> {
        self.select(|_| true)
    }

    /// Stands for key and number of every report that [`Self::all`] gives: a leaf's hash is eight
    /// zero bytes and the number, big-endian.
    pub fn digest(&self) -> Digest {
        let mut digest = Digest::default();
        for report in self.all() {
            digest.add(&report.key, &ContentHash::of_sequence(report.seq));
        }
        digest
    }

    /// The Pod's record goes. Late, and never blocks.
    pub fn forget_pod(&self, key: &ObjectKey) {
        let mut state = self.state();
        if state.entries.remove(key).is_some() {
            let text = key.to_string();
            let report = Write::remove(Table::Reports, text.clone());
            let ack = Write::remove(Table::Acks, text);
            self.inner.store.later(vec![report, ack]);
            drop(state);
            self.wake();
        }
    }

    /// Wakes when there is something to send, something was forgotten, or a Pod's end was
    /// acknowledged.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changed.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::time::{Duration, Instant};

    fn key(uid: &str) -> ObjectKey {
        ObjectKey::pod("ns", "web", uid)
    }

    fn report(phase: &str, gone: bool) -> PodReport {
        PodReport {
            status: json!({ "phase": phase }),
            gone,
        }
    }

    fn wait(what: impl Fn() -> bool) {
        let end = Instant::now() + Duration::from_secs(10);
        while !what() {
            assert!(Instant::now() < end, "it did not come");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn what_is_acknowledged_is_not_pending_until_it_changes() {
        let reports = Reports::in_memory();
        reports.put_node(&json!({"a": 1}));
        reports.put_pod(&key("1"), report("Pending", false));
        let first = reports.pending();
        assert_eq!(first.len(), 2);
        assert_eq!(first[0].key, node_key());
        first.iter().for_each(|r| reports.ack_pod(&r.key, r.seq));
        assert_eq!(reports.pending(), []);
        let digest = reports.digest();
        reports.put_pod(&key("1"), report("Pending", false));
        assert_eq!((reports.pending(), reports.digest()), (vec![], digest));
        reports.put_pod(&key("1"), report("Running", false));
        let second = reports.pending();
        assert_eq!(second.len(), 1);
        assert!(second[0].seq > first[1].seq);
        assert_ne!(reports.digest(), digest);
        // A late answer to the first does not count for the second.
        reports.ack_pod(&key("1"), first[1].seq);
        assert_eq!(reports.pending().len(), 1);
        reports.forget_pod(&key("1"));
        assert_eq!(reports.all().len(), 1);
    }

    #[test]
    fn reports_and_acknowledgements_survive_an_orderly_restart() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(dir.path()).unwrap();
        let reports = Reports::load(&store).unwrap();
        reports.put_pod(&key("1"), report("Running", false));
        reports.put_pod(&key("2"), report("Running", false));
        reports.ack_pod(&key("1"), reports.all()[0].seq);
        let (all, pending, digest) = (reports.all(), reports.pending(), reports.digest());
        drop((reports, store));
        let (store, _) = Store::open(dir.path()).unwrap();
        let reports = Reports::load(&store).unwrap();
        assert_eq!((reports.all(), reports.pending()), (all.clone(), pending));
        assert_eq!(reports.digest(), digest);
        assert_eq!(reports.pod(&key("1")), Some(report("Running", false)));
        reports.put_pod(&key("1"), report("Failed", false));
        assert!(
            reports
                .all()
                .iter()
                .all(|r| all.contains(r) || r.seq > all[1].seq)
        );
    }

    /// Without an orderly stop a report on disk may be older than the one that was sent: it must
    /// not hide behind a number that the cloud knows.
    #[test]
    fn after_a_crash_everything_is_said_again_under_new_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let copy = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(dir.path()).unwrap();
        let reports = Reports::load(&store).unwrap();
        reports.put_pod(&key("1"), report("Running", false));
        store.flush().unwrap();
        std::fs::copy(dir.path().join("snapshot"), copy.path().join("snapshot")).unwrap();
        reports.put_pod(&key("1"), report("Failed", false));
        let sent = reports.all()[0].seq;
        let (store, opened) = Store::open(copy.path()).unwrap();
        assert!(!opened.clean);
        let reports = Reports::load(&store).unwrap();
        let again = reports.pending();
        assert_eq!(reports.pod(&key("1")), Some(report("Running", false)));
        assert!(again[0].seq > sent, "{} after {sent}", again[0].seq);
    }

    #[test]
    fn that_a_pod_is_gone_is_said_only_when_it_is_durable() {
        let dir = tempfile::tempdir().unwrap();
        let copy = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(dir.path()).unwrap();
        let reports = Reports::load(&store).unwrap();
        let mut changes = reports.changes();
        for n in 0..5 {
            let key = key(&n.to_string());
            changes.mark_unchanged();
            reports.put_pod(&key, report("Succeeded", true));
            wait(|| changes.has_changed().unwrap());
            let shown = reports.all();
            assert!(shown.iter().any(|r| r.key == key && r.gone));
            // Whatever is on disk at the moment it is shown must hold it.
            std::fs::copy(dir.path().join("snapshot"), copy.path().join("snapshot")).unwrap();
            let mut found = false;
            let text = key.to_string().into_bytes();
            super::super::snapshot::Snapshot::open(copy.path(), |_, writes| {
                found |= writes
                    .iter()
                    .any(|w| w.table == Table::Reports && w.key == text);
            })
            .unwrap();
            assert!(found);
            assert!(!reports.gone_acknowledged(&key));
            reports.ack_pod(&key, u64::MAX);
            assert!(reports.gone_acknowledged(&key));
        }
    }
}
