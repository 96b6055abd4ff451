//! What the cloud wants on this node, as committed: the hinge between the session and the Pods.
//!
//! Owns the desired set and the Pods whose removal is under way. The session commits batches; the
//! Pod manager reads, and says when a removed Pod has left nothing behind. A batch is durable
//! before anybody can see it, and nobody is woken earlier.
//!
//! Each batch stores count and root of the whole set beside it; opening the store computes them
//! again from the bytes.
//!
//! In memory: key and hash of every object, and the bytes of Pods, which the manager reads at each
//! change. The bytes of Secrets, ConfigMaps and the rest stay on disk: they are read when a Pod
//! starts or a volume changes, in microseconds, and a Secret is not kept in a process for longer
//! than it is used.
//!
//! Never: a removal that a batch does not name; a complete set that is older than what is held.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use common::ids::{Kind, ObjectKey};
use common::object::{Content, ContentHash, Digest, Object};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tracing::error;

use super::database::{Damage, Records};
use super::schema::{Table, Write};
use super::{Store, StoreError};

/// A Pod that should run here, or that must be taken away.
#[derive(Debug, Clone)]
pub struct DesiredPod {
    pub key: ObjectKey,
    pub hash: ContentHash,
    /// The Pod's JSON. Kept after a removal, because ending a Pod needs its spec.
    pub json: Arc<[u8]>,
    /// The cloud no longer names this Pod: end it, clean up, then call [`Desired::forget`].
    pub removed: bool,
}

/// The answer to "what is this object?": a Pod never starts with an unknown reference, and an
/// absent one never erases what is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lookup {
    Unknown,
    Absent,
    Present(Arc<[u8]>),
}

/// One commit from the cloud. Removals are applied before puts.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    pub puts: Vec<Object>,
    pub removes: Vec<ObjectKey>,
    /// The set after this batch is all that the cloud wants here. Nothing is removed by it that
    /// `removes` does not name.
    pub complete: bool,
    /// The cluster's epoch; another one than the committed one resets the marks. `None`: the
    /// committed one.
    pub epoch: Option<[u8; 16]>,
    /// The resourceVersion of each kind up to which the batch holds what the cluster held.
    pub marks: BTreeMap<Kind, u64>,
}

/// Why a batch was not committed. Nothing of it was.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    #[error(
        "the complete set is older than what this node holds: {kind:?} at resourceVersion {got}, \
         committed is {have}; the sender must list again"
    )]
    Stale { kind: Kind, have: u64, got: u64 },
    #[error("the content of {0} does not fit its hash; the sender must send it again")]
    Hash(ObjectKey),
    #[error("the object key {0} does not survive its own text; the sender must not send it")]
    Key(ObjectKey),
    #[error("cannot store a batch of the desired set")]
    Store(#[from] StoreError),
}

/// A shared handle; cheap to clone.
#[derive(Clone)]
pub struct Desired {
    inner: Arc<Inner>,
}

struct Inner {
    store: Store,
    /// Held through a whole commit, so that each is decided on what the one before left; readers
    /// take `state` alone and never wait for the disk.
    writer: Mutex<()>,
    state: Mutex<State>,
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<ObjectKey, Held>,
    removing: BTreeMap<ObjectKey, Held>,
    about: About,
}

#[derive(Debug, Clone)]
struct Held {
    hash: ContentHash,
    body: Body,
}

#[derive(Debug, Clone)]
enum Body {
    Absent,
    Kept(Arc<[u8]>),
    OnDisk,
}

/// The record beside the set; fields are only added.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct About {
    count: u64,
    root: [u8; 16],
    complete: bool,
    #[serde(default)]
    epoch: Option<[u8; 16]>,
    /// By kind number.
    #[serde(default)]
    marks: BTreeMap<u8, u64>,
}

const ABOUT: &[u8] = b"desired";

impl About {
    fn digest(&self) -> Digest {
        Digest {
            count: self.count,
            root: self.root,
        }
    }

    fn set_digest(&mut self, digest: Digest) {
        (self.count, self.root) = (digest.count, digest.root);
    }

    fn write(&self) -> Write {
        let json = serde_json::to_vec(self).expect("numbers, arrays and flags are always JSON");
        Write::put(Table::State, ABOUT, json)
    }

    fn parse(bytes: Option<Vec<u8>>) -> Result<Self, Damage> {
        bytes.map_or(Ok(Self::default()), |b| {
            serde_json::from_slice(&b).map_err(|e| format!("State/desired: {e}"))
        })
    }
}

impl Held {
    fn of(object: &Object) -> Self {
        let body = match &object.content {
            Content::Absent => Body::Absent,
            Content::Present(bytes) if object.key.kind == Kind::Pod => Body::Kept(bytes.clone()),
            Content::Present(_) => Body::OnDisk,
        };
        Self {
            hash: object.hash,
            body,
        }
    }
}

/// `flag:u8 hash:[16] bytes`; the flag is 1 for a present object.
fn encode(hash: &ContentHash, content: Option<&[u8]>) -> Vec<u8> {
    let mut out = vec![u8::from(content.is_some())];
    out.extend_from_slice(&hash.0);
    out.extend_from_slice(content.unwrap_or_default());
    out
}

/// The object of a record, if key, flag and hash are what [`encode`] wrote.
fn decode(key: &[u8], value: &[u8]) -> Option<Object> {
    let key = ObjectKey::parse(std::str::from_utf8(key).ok()?).ok()?;
    let (flag, rest) = value.split_first()?;
    let (hash, bytes) = rest.split_at_checked(16)?;
    let content = match flag {
        0 => Content::Absent,
        1 => Content::Present(bytes.into()),
        _ => return None,
    };
    let object = Object::new(key, content);
    (object.hash == ContentHash::from_slice(hash)?).then_some(object)
}

fn key_of(key: &ObjectKey) -> Vec<u8> {
    key.to_string().into_bytes()
}

/// Whether count and root of the stored objects, computed from their bytes, are those of the last
/// batch.
pub(super) fn verify(records: &Records) -> Result<(), Damage> {
    let mut seen = Digest::default();
    records.each(Table::Desired, &[], |key, value| {
        let object = decode(key, value).ok_or("an object of the desired set is damaged")?;
        seen.add(&object.key, &object.hash);
        Ok(())
    })?;
    let about = About::parse(records.get(Table::State, ABOUT)?)?;
    match seen == about.digest() {
        true => Ok(()),
        false => Err(format!(
            "the desired set has {} objects of {} or another root",
            seen.count, about.count
        )),
    }
}

/// What makes the stored set consistent again after a part of it was lost: objects that cannot be
/// read go, and the set is neither complete nor of any epoch, so that nothing is removed by it.
pub(super) fn salvage(records: &Records) -> Result<Vec<Write>, Damage> {
    let (mut seen, mut writes) = (Digest::default(), Vec::new());
    for table in [Table::Desired, Table::Removing] {
        records.each(table, &[], |key, value| {
            match decode(key, value) {
                Some(o) if table == Table::Desired => seen.add(&o.key, &o.hash),
                Some(_) => {}
                None => writes.push(Write::remove(table, key)),
            }
            Ok(())
        })?;
    }
    let mut about = About::default();
    about.set_digest(seen);
    writes.push(about.write());
    Ok(writes)
}

/// What a batch does to the set: the writes, and the same for what is held in memory.
#[derive(Default)]
struct Change {
    about: About,
    writes: Vec<Write>,
    objects: BTreeMap<ObjectKey, Option<Held>>,
    removing: BTreeMap<ObjectKey, Option<Held>>,
}

impl Change {
    fn decide(state: &State, batch: Batch) -> Result<Self, CommitError> {
        let mut change = Self {
            about: next_about(&state.about, &batch)?,
            ..Self::default()
        };
        let mut digest = state.about.digest();
        for key in batch.removes {
            change.remove(state, &mut digest, key);
        }
        for object in batch.puts {
            change.put(state, &mut digest, object)?;
        }
        change.about.set_digest(digest);
        if change.about != state.about {
            change.writes.push(change.about.write());
        }
        Ok(change)
    }

    fn held<'a>(&'a self, state: &'a State, key: &ObjectKey) -> Option<&'a Held> {
        match self.objects.get(key) {
            Some(changed) => changed.as_ref(),
            None => state.objects.get(key),
        }
    }

    fn is_removing(&self, state: &State, key: &ObjectKey) -> bool {
        match self.removing.get(key) {
            Some(changed) => changed.is_some(),
            None => state.removing.contains_key(key),
        }
    }

    fn remove(&mut self, state: &State, digest: &mut Digest, key: ObjectKey) {
        let Some(held) = self.held(state, &key).cloned() else {
            return;
        };
        digest.remove(&key, &held.hash);
        self.writes
            .push(Write::remove(Table::Desired, key_of(&key)));
        if let Body::Kept(bytes) = &held.body {
            let record = encode(&held.hash, Some(bytes));
            self.writes
                .push(Write::put(Table::Removing, key_of(&key), record));
            self.removing.insert(key.clone(), Some(held));
        }
        self.objects.insert(key, None);
    }

    fn put(
        &mut self,
        state: &State,
        digest: &mut Digest,
        object: Object,
    ) -> Result<(), CommitError> {
        if ContentHash::of(&object.content) != object.hash {
            return Err(CommitError::Hash(object.key));
        }
        let text = object.key.to_string();
        if ObjectKey::parse(&text).as_ref() != Ok(&object.key) {
            return Err(CommitError::Key(object.key));
        }
        if let Some(old) = self.held(state, &object.key) {
            if old.hash == object.hash {
                return Ok(());
            }
            digest.remove(&object.key, &old.hash);
        }
        digest.add(&object.key, &object.hash);
        if self.is_removing(state, &object.key) {
            // The same UID came back before its removal was finished: it is wanted again.
            self.writes
                .push(Write::remove(Table::Removing, text.as_bytes()));
            self.removing.insert(object.key.clone(), None);
        }
        let content = match &object.content {
            Content::Absent => None,
            Content::Present(bytes) => Some(&bytes[..]),
        };
        let record = encode(&object.hash, content);
        self.writes.push(Write::put(Table::Desired, text, record));
        let held = Held::of(&object);
        self.objects.insert(object.key, Some(held));
        Ok(())
    }
}

/// Epoch, marks and completeness after the batch; the digest is left for the caller.
fn next_about(old: &About, batch: &Batch) -> Result<About, CommitError> {
    let mut about = old.clone();
    if batch.epoch.is_some() && batch.epoch != old.epoch {
        about.epoch = batch.epoch;
        about.marks.clear();
    }
    for (kind, got) in &batch.marks {
        let have = about.marks.entry(kind.number()).or_insert(*got);
        if batch.complete && got < have {
            return Err(CommitError::Stale {
                kind: *kind,
                have: *have,
                got: *got,
            });
        }
        *have = (*have).max(*got);
    }
    about.complete |= batch.complete;
    Ok(about)
}

fn overlay(onto: &mut BTreeMap<ObjectKey, Held>, changes: BTreeMap<ObjectKey, Option<Held>>) {
    for (key, change) in changes {
        match change {
            Some(held) => drop(onto.insert(key, held)),
            None => drop(onto.remove(&key)),
        }
    }
}

impl Desired {
    /// Reads the committed set. Blocks for the read.
    pub fn load(store: &Store) -> Result<Self, StoreError> {
        let malformed = |why: Damage| StoreError::Record {
            key: "State/desired".into(),
            why,
        };
        let mut state = State {
            about: About::parse(store.get(Table::State, ABOUT)?).map_err(malformed)?,
            ..State::default()
        };
        for table in [Table::Desired, Table::Removing] {
            for (key, value) in store.scan(table, &[])? {
                let object = decode(&key, &value).ok_or_else(|| StoreError::Record {
                    key: format!("{table:?}/{}", String::from_utf8_lossy(&key)),
                    why: "its content does not fit its hash".into(),
                })?;
                let held = Held::of(&object);
                match table == Table::Desired {
                    true => state.objects.insert(object.key, held),
                    false => state.removing.insert(object.key, held),
                };
            }
        }
        Ok(Self {
            inner: Arc::new(Inner {
                store: store.clone(),
                writer: Mutex::default(),
                state: Mutex::new(state),
                changed: watch::Sender::new(0),
            }),
        })
    }

    /// A set that lives in memory only, for tests of what reads it.
    pub fn in_memory() -> Self {
        Self::load(&Store::in_memory()).expect("an empty store in memory has nothing malformed")
    }

    fn state(&self) -> MutexGuard<'_, State> {
        let state = self.inner.state.lock();
        state.unwrap_or_else(PoisonError::into_inner)
    }

    /// Every Pod that should run here, and every one whose removal is not finished.
    pub fn pods(&self) -> Vec<DesiredPod> {
        let state = self.state();
        let pod = |removed: bool| {
            move |(key, held): (&ObjectKey, &Held)| match &held.body {
                Body::Kept(json) => Some(DesiredPod {
                    key: key.clone(),
                    hash: held.hash,
                    json: json.clone(),
                    removed,
                }),
                Body::Absent | Body::OnDisk => None,
            }
        };
        let wanted = state.objects.iter().filter_map(pod(false));
        wanted
            .chain(state.removing.iter().filter_map(pod(true)))
            .collect()
    }

    /// An object that cannot be read from the disk counts as unknown: nothing starts with it, and
    /// nothing that is mounted is touched.
    pub fn lookup(&self, key: &ObjectKey) -> Lookup {
        match self.object(key).map(|o| o.content) {
            None => Lookup::Unknown,
            Some(Content::Absent) => Lookup::Absent,
            Some(Content::Present(bytes)) => Lookup::Present(bytes),
        }
    }

    /// The object as committed: what the cloud's next delta is made against.
    pub fn object(&self, key: &ObjectKey) -> Option<Object> {
        let held = self.state().objects.get(key).cloned()?;
        let content = match held.body {
            Body::Absent => Content::Absent,
            Body::Kept(bytes) => Content::Present(bytes),
            Body::OnDisk => return self.read(key),
        };
        Some(Object {
            key: key.clone(),
            content,
            hash: held.hash,
        })
    }

    /// The record may be newer than what is held in memory; it is committed all the same.
    fn read(&self, key: &ObjectKey) -> Option<Object> {
        let text = key_of(key);
        match self.inner.store.get(Table::Desired, &text) {
            Ok(value) => {
                let object = decode(&text, &value?);
                if object.is_none() {
                    error!(%key, "a stored object does not fit its hash");
                }
                object
            }
            Err(e) => {
                error!(%key, error = %e, "a stored object cannot be read");
                None
            }
        }
    }

    /// Key and hash of every object: what a resume compares when the digests differ.
    pub fn inventory(&self) -> Vec<(ObjectKey, ContentHash)> {
        let state = self.state();
        let objects = state.objects.iter();
        objects.map(|(k, held)| (k.clone(), held.hash)).collect()
    }

    /// Whether the cloud has ever said that the set is complete. Until then a running container
    /// without a record stays.
    pub fn complete(&self) -> bool {
        self.state().about.complete
    }

    /// The epoch of the last batch that named one.
    pub fn epoch(&self) -> Option<[u8; 16]> {
        self.state().about.epoch
    }

    /// The highest resourceVersion of each kind committed in this epoch.
    pub fn marks(&self) -> BTreeMap<Kind, u64> {
        let state = self.state();
        let marks = state.about.marks.iter();
        marks
            .map(|(n, mark)| (Kind::from_number(*n), *mark))
            .collect()
    }

    /// Wakes after every commit that changed something. The number has no meaning but that it
    /// changed.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changed.subscribe()
    }

    /// The removed Pod has left nothing behind: its record goes. Late, and never blocks: a record
    /// that survives a power cut is found to have left nothing behind once more.
    pub fn forget(&self, key: &ObjectKey) {
        let mut state = self.state();
        if state.removing.remove(key).is_none() {
            return;
        }
        // Staged under the lock, so that it cannot come after a later removal of the same Pod.
        let gone = Write::remove(Table::Removing, key_of(key));
        self.inner.store.later(vec![gone]);
        drop(state);
        self.inner.changed.send_modify(|n| *n += 1);
    }

    pub fn digest(&self) -> Digest {
        self.state().about.digest()
    }

    /// Commits a batch; when this returns, it is durable and visible. Blocks for one sync.
    pub fn commit(&self, batch: Batch) -> Result<Digest, CommitError> {
        let writer = self.inner.writer.lock();
        let _writer = writer.unwrap_or_else(PoisonError::into_inner);
        let change = Change::decide(&self.state(), batch)?;
        if change.writes.is_empty() {
            return Ok(change.about.digest());
        }
        self.inner.store.commit(change.writes)?;
        let mut state = self.state();
        overlay(&mut state.objects, change.objects);
        overlay(&mut state.removing, change.removing);
        state.about = change.about;
        let digest = state.about.digest();
        drop(state);
        self.inner.changed.send_modify(|n| *n += 1);
        Ok(digest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: &str, json: &str) -> Object {
        Object::present(ObjectKey::pod("ns", "web", uid), json.as_bytes())
    }

    fn secret(name: &str, json: &str) -> Object {
        Object::present(ObjectKey::named(Kind::Secret, "ns", name), json.as_bytes())
    }

    fn puts(objects: &[Object]) -> Batch {
        Batch {
            puts: objects.to_vec(),
            ..Batch::default()
        }
    }

    fn removes(objects: &[&Object]) -> Batch {
        Batch {
            removes: objects.iter().map(|o| o.key.clone()).collect(),
            ..Batch::default()
        }
    }

    fn removed(set: &Desired) -> Vec<(String, bool)> {
        let pods = set.pods().into_iter();
        pods.map(|p| (p.key.uid.to_string(), p.removed)).collect()
    }

    #[test]
    fn all_of_it_is_there_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(dir.path()).unwrap();
        let set = Desired::load(&store).unwrap();
        let absent = Object::absent(ObjectKey::named(Kind::ConfigMap, "ns", "none"));
        let all = [
            pod("1", "{}"),
            pod("2", "{}"),
            secret("s", &"x".repeat(9000)),
            absent,
        ];
        set.commit(puts(&all)).unwrap();
        set.commit(removes(&[&all[1]])).unwrap();
        let (digest, inventory) = (set.digest(), set.inventory());
        drop((set, store));
        let (store, _) = Store::open(dir.path()).unwrap();
        let set = Desired::load(&store).unwrap();
        assert_eq!((set.digest(), set.inventory()), (digest, inventory));
        assert_eq!(removed(&set), [("1".into(), false), ("2".into(), true)]);
        assert_eq!(set.object(&all[2].key), Some(all[2].clone()));
        assert_eq!(set.lookup(&all[3].key), Lookup::Absent);
        assert_eq!(set.lookup(&all[1].key), Lookup::Unknown);
        set.forget(&all[1].key);
        drop((set, store));
        let (store, _) = Store::open(dir.path()).unwrap();
        assert_eq!(
            removed(&Desired::load(&store).unwrap()),
            [("1".into(), false)]
        );
    }

    #[test]
    fn a_removal_is_a_state_until_it_is_forgotten() {
        let set = Desired::in_memory();
        let (one, two) = (pod("1", "{}"), pod("2", "{}"));
        let s = secret("s", "{}");
        set.commit(puts(&[one.clone(), s.clone()])).unwrap();
        set.commit(Batch {
            removes: vec![one.key.clone(), s.key.clone()],
            puts: vec![two.clone()],
            ..Batch::default()
        })
        .unwrap();
        assert_eq!(removed(&set), [("2".into(), false), ("1".into(), true)]);
        assert_eq!(set.digest(), Digest::of([(&two.key, &two.hash)]));
        set.forget(&one.key);
        set.forget(&two.key);
        assert_eq!(removed(&set), [("2".into(), false)]);
    }

    #[test]
    fn a_pod_that_comes_back_before_its_removal_is_finished_is_wanted_again() {
        let set = Desired::in_memory();
        let one = pod("1", "{}");
        for batch in [puts(std::slice::from_ref(&one)), removes(&[&one])] {
            set.commit(batch).unwrap();
        }
        set.commit(puts(std::slice::from_ref(&one))).unwrap();
        assert_eq!(removed(&set), [("1".into(), false)]);
        // Taken away and given back in one batch: it was never gone.
        set.commit(Batch {
            puts: vec![one.clone()],
            ..removes(&[&one])
        })
        .unwrap();
        assert_eq!(removed(&set), [("1".into(), false)]);
        assert_eq!(set.digest().count, 1);
    }

    #[test]
    fn a_pod_that_comes_back_is_one_pod_with_its_new_content_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(dir.path()).unwrap();
        let set = Desired::load(&store).unwrap();
        let (old, new) = (pod("1", "{}"), pod("1", r#"{"a":1}"#));
        set.commit(puts(std::slice::from_ref(&old))).unwrap();
        set.commit(removes(&[&old])).unwrap();
        set.commit(puts(std::slice::from_ref(&new))).unwrap();
        for _ in 0..2 {
            // Its worker may have been about to say that nothing is left of it.
            set.forget(&old.key);
            assert_eq!(removed(&set), [("1".into(), false)]);
        }
        drop((set, store));
        let (store, _) = Store::open(dir.path()).unwrap();
        let set = Desired::load(&store).unwrap();
        let pods = set.pods();
        assert_eq!(pods.len(), 1);
        assert_eq!((pods[0].hash, pods[0].removed), (new.hash, false));
    }

    #[test]
    fn no_complete_set_takes_the_node_back_in_time() {
        let (a, b) = (Some([1; 16]), Some([2; 16]));
        // epoch, complete, marks of Pods and Secrets -> refused, marks afterwards
        let steps: [(_, _, &[_], _, &[_]); 9] = [
            (a, true, &[(Kind::Pod, 10)], None, &[(Kind::Pod, 10)]),
            (
                a,
                false,
                &[(Kind::Secret, 7)],
                None,
                &[(Kind::Pod, 10), (Kind::Secret, 7)],
            ),
            (
                a,
                false,
                &[(Kind::Pod, 8)],
                None,
                &[(Kind::Pod, 10), (Kind::Secret, 7)],
            ),
            (
                a,
                true,
                &[(Kind::Pod, 9)],
                Some((Kind::Pod, 10, 9)),
                &[(Kind::Pod, 10), (Kind::Secret, 7)],
            ),
            (
                None,
                true,
                &[(Kind::Pod, 9)],
                Some((Kind::Pod, 10, 9)),
                &[(Kind::Pod, 10), (Kind::Secret, 7)],
            ),
            (
                a,
                true,
                &[(Kind::Pod, 11), (Kind::Secret, 6)],
                Some((Kind::Secret, 7, 6)),
                &[(Kind::Pod, 10), (Kind::Secret, 7)],
            ),
            (
                a,
                true,
                &[(Kind::Pod, 10), (Kind::Secret, 8)],
                None,
                &[(Kind::Pod, 10), (Kind::Secret, 8)],
            ),
            (b, true, &[(Kind::Pod, 3)], None, &[(Kind::Pod, 3)]),
            (a, true, &[(Kind::Pod, 4)], None, &[(Kind::Pod, 4)]),
        ];
        let set = Desired::in_memory();
        for (n, (epoch, complete, marks, refused, after)) in steps.into_iter().enumerate() {
            let before = set.digest();
            let batch = Batch {
                epoch,
                complete,
                marks: marks.iter().copied().collect(),
                ..puts(&[secret("s", &n.to_string())])
            };
            let stale = match set.commit(batch) {
                Ok(_) => None,
                Err(CommitError::Stale { kind, have, got }) => Some((kind, have, got)),
                Err(other) => panic!("{other}"),
            };
            assert_eq!(stale, refused, "step {n}");
            assert_eq!(stale.is_some(), set.digest() == before, "step {n}");
            assert_eq!(set.marks(), after.iter().copied().collect(), "step {n}");
        }
        assert!(set.complete());
        assert_eq!(set.epoch(), a);
    }

    #[test]
    fn a_complete_batch_removes_nothing_that_it_does_not_name() {
        let set = Desired::in_memory();
        set.commit(puts(&[pod("1", "{}")])).unwrap();
        set.commit(Batch {
            complete: true,
            ..Batch::default()
        })
        .unwrap();
        assert_eq!(removed(&set), [("1".into(), false)]);
    }

    #[test]
    fn what_changes_nothing_writes_nothing_and_wakes_nobody() {
        let set = Desired::in_memory();
        let all = [pod("1", "{}"), secret("s", "{}")];
        set.commit(puts(&all)).unwrap();
        let mut changes = set.changes();
        changes.mark_unchanged();
        set.commit(puts(&all)).unwrap();
        assert!(!changes.has_changed().unwrap());
        set.commit(puts(&[secret("s", "[]")])).unwrap();
        assert!(changes.has_changed().unwrap());
    }

    #[test]
    fn an_object_that_does_not_fit_its_hash_or_key_spoils_the_whole_batch() {
        let set = Desired::in_memory();
        let mut wrong = secret("s", "{}");
        wrong.hash = ContentHash([0; 16]);
        let batch = puts(&[pod("1", "{}"), wrong]);
        assert!(matches!(set.commit(batch), Err(CommitError::Hash(_))));
        let odd = Object::absent(ObjectKey::named(Kind::Secret, "a/b/c", "d"));
        assert!(matches!(set.commit(puts(&[odd])), Err(CommitError::Key(_))));
        assert_eq!(set.digest(), Digest::default());
    }
}
