//! The model of the cloud: a cluster with all its revisions, and replicas whose caches lag.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use common::hub::session::Marks;
use common::hub::session::cloud::{CloudSession, CloudView};
use common::hub::{Lane, delta, proto};
use common::ids::{Kind, ObjectKey};
use common::object::{Content, ContentHash, Digest, Object};

use super::upstream::Upstream;

/// xorshift: the same seed is the same history on every machine.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub(super) fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % sides
    }
    pub(super) fn one_in(&mut self, n: u64) -> bool {
        self.roll(n) == 0
    }
}

pub(super) type Objects = BTreeMap<ObjectKey, Object>;

/// etcd: every revision's content, so that a cache or a backup is a revision number.
#[derive(Clone)]
pub(super) struct Cluster {
    pub(super) history: Vec<Objects>,
    pub(super) epoch: u64,
    pub(super) next_uid: u64,
}

impl Cluster {
    pub(super) fn revision(&self) -> u64 {
        self.history.len() as u64 - 1
    }
    pub(super) fn now(&self) -> &Objects {
        &self.history[self.history.len() - 1]
    }

    /// Whether the object is there and was at every revision from this one on.
    pub(super) fn has_had(&self, key: &ObjectKey, from: u64) -> bool {
        let from = (from as usize).min(self.history.len() - 1);
        self.history[from..].iter().all(|o| o.contains_key(key))
    }

    pub(super) fn change(&mut self, dice: &mut Dice) {
        let mut objects = self.now().clone();
        let body = |dice: &mut Dice| {
            let size = if dice.one_in(5) {
                9_000 + dice.roll(90_000)
            } else {
                dice.roll(300)
            };
            let noise: Vec<u8> = (0..size).map(|_| dice.roll(256) as u8).collect();
            noise
        };
        match dice.roll(6) {
            0 | 1 => {
                // One name, a new UID each time: successors share names.
                self.next_uid += 1;
                let name = format!("web-{}", dice.roll(3));
                let old: Vec<_> = objects
                    .keys()
                    .filter(|k| *k.name == *name)
                    .cloned()
                    .collect();
                old.iter().for_each(|k| drop(objects.remove(k)));
                let key = ObjectKey::pod("default", &name, &format!("uid-{}", self.next_uid));
                objects.insert(key.clone(), Object::present(key, body(dice)));
            }
            2 => {
                let pods: Vec<_> = objects
                    .keys()
                    .filter(|k| k.kind == Kind::Pod)
                    .cloned()
                    .collect();
                if !pods.is_empty() {
                    objects.remove(&pods[dice.roll(pods.len() as u64) as usize]);
                }
            }
            3 => {
                let keys: Vec<_> = objects.keys().cloned().collect();
                if !keys.is_empty() {
                    let key = keys[dice.roll(keys.len() as u64) as usize].clone();
                    objects.insert(key.clone(), Object::present(key, body(dice)));
                }
            }
            4 => {
                let key = ObjectKey::named(Kind::ConfigMap, "default", &dice.roll(3).to_string());
                objects.insert(key.clone(), Object::present(key, body(dice)));
            }
            _ => {
                let key = ObjectKey::named(Kind::Secret, "default", &dice.roll(3).to_string());
                objects.insert(key.clone(), Object::absent(key));
            }
        }
        self.history.push(objects);
    }
}

/// One CloudCore: a cache that lags, what it writes upwards, and the session that it hosts.
#[derive(Default)]
pub(super) struct Replica {
    pub(super) cached: u64,
    pub(super) epoch: u64,
    /// Some feed has not listed: nothing is known to be gone.
    pub(super) unlisted: bool,
    /// Wanted, and held back until what it refers to was read.
    pub(super) held_back: BTreeSet<ObjectKey>,
    pub(super) upstream: Upstream,
    /// The incarnation that the reports held belong to.
    pub(super) incarnation: [u8; 16],
    pub(super) hosted: Option<Hosted>,
}

impl Replica {
    /// Sees all that the cluster is now.
    pub(super) fn list(&mut self, cluster: &Cluster) {
        self.cached = cluster.revision();
        self.epoch = cluster.epoch;
        self.unlisted = false;
    }

    pub(super) fn complete(&self) -> bool {
        !self.unlisted && self.held_back.is_empty()
    }

    /// What is shown of the cluster; `last` is the revision that the edge was shown before.
    pub(super) fn view<'a>(&'a self, cluster: &'a Cluster, last: Option<u64>) -> View<'a> {
        let at = self.cached.min(cluster.revision());
        View {
            objects: &cluster.history[at as usize],
            older: last.and_then(|r| cluster.history.get(r as usize)),
            replica: self,
        }
    }
}

pub(super) type Lanes = BTreeMap<Lane, VecDeque<proto::Message>>;

/// A session at the cloud's end. It may outlive its connection: the edge has moved on, and what
/// the edge sent before is still being handled.
#[derive(Default)]
pub(super) struct Hosted {
    pub(super) machine: CloudSession,
    pub(super) up: Lanes,
    pub(super) last_view: Option<u64>,
    /// The edge could not commit, or disagreed: when to try again.
    pub(super) retry: Option<u64>,
    /// That was so, and nothing was sent since.
    pub(super) failed: bool,
    /// The edge has left; then the connection is found dead.
    pub(super) dead_at: Option<u64>,
}

pub(super) struct View<'a> {
    objects: &'a Objects,
    older: Option<&'a Objects>,
    replica: &'a Replica,
}

impl View<'_> {
    fn object(&self, key: &ObjectKey) -> Option<&Object> {
        self.objects
            .get(key)
            .filter(|_| !self.replica.held_back.contains(key))
    }

    pub(super) fn complete(&self) -> bool {
        self.replica.complete()
    }
}

pub(super) fn marks(revision: u64) -> Marks {
    let kinds = [Kind::Pod, Kind::ConfigMap, Kind::Secret];
    kinds.map(|kind| (kind, revision)).into()
}

pub(super) fn epoch_id(n: u64) -> [u8; 16] {
    u128::from(n + 1).to_be_bytes()
}

impl CloudView for View<'_> {
    fn epoch(&self) -> [u8; 16] {
        epoch_id(self.replica.epoch)
    }
    fn marks(&self) -> Marks {
        marks(self.replica.cached)
    }
    fn revision(&self, _: &ObjectKey) -> u64 {
        self.replica.cached
    }
    fn each(&self, visit: &mut dyn FnMut(&ObjectKey, &ContentHash)) {
        let hidden = &self.replica.held_back;
        let shown = self.objects.iter().filter(|(k, _)| !hidden.contains(k));
        shown.for_each(|(k, o)| visit(k, &o.hash));
    }
    fn hash(&self, key: &ObjectKey) -> Option<ContentHash> {
        self.object(key).map(|o| o.hash)
    }
    fn put(&self, key: &ObjectKey, base: Option<ContentHash>) -> Option<proto::Put> {
        let object = self.object(key)?;
        let mut put = proto::Put {
            key: key.to_string(),
            hash: object.hash.0.to_vec(),
            ..Default::default()
        };
        match &object.content {
            Content::Absent => put.absent = true,
            Content::Present(bytes) => {
                let old = self
                    .older
                    .and_then(|o| o.get(key))
                    .filter(|o| Some(o.hash) == base);
                let old = old.and_then(|o| match &o.content {
                    Content::Present(b) => Some((o.hash, b.clone())),
                    Content::Absent => None,
                });
                let (encoding, payload) = delta::encode(old.as_ref().map(|o| &o.1[..]), bytes);
                put.set_encoding(encoding);
                put.payload = payload;
                put.size = bytes.len() as u32;
            }
        }
        Some(put)
    }
    fn may_remove(&self, key: &ObjectKey) -> bool {
        !self.replica.unlisted && !self.objects.contains_key(key)
    }
    fn complete(&self) -> bool {
        self.replica.complete()
    }
    fn report_base(&self, key: &ObjectKey) -> Option<(ContentHash, Arc<[u8]>)> {
        let bytes = &self.replica.upstream.held.get(key)?.bytes;
        Some((
            ContentHash::of(&Content::Present(bytes.clone())),
            bytes.clone(),
        ))
    }
    fn reports_held(&self, incarnation: &[u8; 16]) -> Digest {
        if *incarnation != self.replica.incarnation {
            return Digest::default();
        }
        self.replica.upstream.digest()
    }
}
