//! The model of the cloud: a cluster with all its revisions, and replicas whose caches lag.

use std::collections::BTreeMap;
use std::sync::Arc;

use common::hub::session::Marks;
use common::hub::session::cloud::CloudView;
use common::hub::{delta, proto};
use common::ids::{Kind, ObjectKey};
use common::object::{Content, ContentHash, Digest, Object};

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

/// One CloudCore: a cache that lags, and the last reports it was told.
pub(super) struct Replica {
    pub(super) cached: u64,
    pub(super) epoch: u64,
    pub(super) reports: BTreeMap<ObjectKey, (u64, Arc<[u8]>)>,
    pub(super) incarnation: [u8; 16],
}

pub(super) struct View<'a> {
    pub(super) objects: &'a Objects,
    pub(super) older: Option<&'a Objects>,
    pub(super) revision: u64,
    pub(super) epoch: u64,
    pub(super) complete: bool,
    pub(super) reports: &'a BTreeMap<ObjectKey, (u64, Arc<[u8]>)>,
    pub(super) incarnation: [u8; 16],
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
        epoch_id(self.epoch)
    }
    fn marks(&self) -> Marks {
        marks(self.revision)
    }
    fn revision(&self, _: &ObjectKey) -> u64 {
        self.revision
    }
    fn each(&self, visit: &mut dyn FnMut(&ObjectKey, &ContentHash)) {
        self.objects.iter().for_each(|(k, o)| visit(k, &o.hash));
    }
    fn hash(&self, key: &ObjectKey) -> Option<ContentHash> {
        self.objects.get(key).map(|o| o.hash)
    }
    fn put(&self, key: &ObjectKey, base: Option<ContentHash>) -> Option<proto::Put> {
        let object = self.objects.get(key)?;
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
    fn may_remove(&self, _: &ObjectKey) -> bool {
        self.complete
    }
    fn complete(&self) -> bool {
        self.complete
    }
    fn report_base(&self, key: &ObjectKey) -> Option<(ContentHash, Arc<[u8]>)> {
        let (_, bytes) = self.reports.get(key)?;
        Some((
            ContentHash::of(&Content::Present(bytes.clone())),
            bytes.clone(),
        ))
    }
    fn reports_held(&self, incarnation: &[u8; 16]) -> Digest {
        if *incarnation != self.incarnation {
            return Digest::default();
        }
        let leaves: Vec<_> = self
            .reports
            .iter()
            .map(|(k, (seq, _))| (k, ContentHash::of_sequence(*seq)))
            .collect();
        Digest::of(leaves.iter().map(|(k, h)| (*k, h)))
    }
}
