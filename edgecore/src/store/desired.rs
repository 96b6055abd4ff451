//! What the cloud wants on this node, as committed: the hinge between the session and the Pods.
//!
//! Owns the desired set and the Pods whose removal is under way. The session commits batches; the
//! Pod manager reads, and says when a removed Pod has left nothing behind.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use common::ids::{Kind, ObjectKey};
use common::object::{Content, ContentHash, Digest, Object};
use tokio::sync::watch;

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

/// One commit from the cloud.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    pub puts: Vec<Object>,
    pub removes: Vec<ObjectKey>,
    /// The set after this batch is all that the cloud wants here.
    pub complete: bool,
}

/// A shared handle; cheap to clone.
#[derive(Clone)]
pub struct Desired {
    inner: Arc<Inner>,
}

struct Inner {
    state: Mutex<State>,
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<ObjectKey, Object>,
    removing: BTreeMap<ObjectKey, Object>,
    digest: Digest,
    complete: bool,
}

impl Desired {
    /// A set that lives in memory only, for tests of what reads it.
    pub fn in_memory() -> Self {
        Self {
            inner: Arc::new(Inner {
                state: Mutex::default(),
                changed: watch::Sender::new(0),
            }),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.inner
            .state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Every Pod that should run here, and every one whose removal is not finished.
    pub fn pods(&self) -> Vec<DesiredPod> {
        let state = self.state();
        let pod = |removed: bool| {
            move |o: &Object| match &o.content {
                Content::Present(json) if o.key.kind == Kind::Pod => Some(DesiredPod {
                    key: o.key.clone(),
                    hash: o.hash,
                    json: json.clone(),
                    removed,
                }),
                Content::Present(_) | Content::Absent => None,
            }
        };
        let wanted = state.objects.values().filter_map(pod(false));
        wanted
            .chain(state.removing.values().filter_map(pod(true)))
            .collect()
    }

    pub fn lookup(&self, key: &ObjectKey) -> Lookup {
        match self.state().objects.get(key).map(|o| o.content.clone()) {
            None => Lookup::Unknown,
            Some(Content::Absent) => Lookup::Absent,
            Some(Content::Present(bytes)) => Lookup::Present(bytes),
        }
    }

    /// Whether the cloud has ever said that the set is complete. Until then a running container
    /// without a record stays.
    pub fn complete(&self) -> bool {
        self.state().complete
    }

    /// Wakes after every commit. The number has no meaning but that it changed.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changed.subscribe()
    }

    /// The removed Pod has left nothing behind: its record goes.
    pub fn forget(&self, key: &ObjectKey) {
        self.state().removing.remove(key);
        self.inner.changed.send_modify(|n| *n += 1);
    }

    pub fn digest(&self) -> Digest {
        self.state().digest
    }

    /// Commits a batch; when this returns, it is durable.
    pub fn commit(&self, batch: Batch) -> Digest {
        let mut state = self.state();
        for key in batch.removes {
            if let Some(old) = state.objects.remove(&key) {
                state.digest.remove(&old.key, &old.hash);
                if key.kind == Kind::Pod {
                    state.removing.insert(key, old);
                }
            }
        }
        for object in batch.puts {
            state.digest.add(&object.key, &object.hash);
            if let Some(old) = state.objects.insert(object.key.clone(), object) {
                state.digest.remove(&old.key, &old.hash);
            }
        }
        state.complete |= batch.complete;
        let digest = state.digest;
        drop(state);
        self.inner.changed.send_modify(|n| *n += 1);
        digest
    }
}
