//! The model of the edge's store: what it holds is durable, unless the adversary rolls it back.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use common::hub::proto;
use common::hub::session::Marks;
use common::hub::session::edge::{EdgeState, HeldReport, HelloFacts};
use common::ids::ObjectKey;
use common::object::{ContentHash, Digest, Object};

use super::cluster::Objects;

/// The edge's disk, borrowed for each look.
pub(super) struct DiskCell(pub(super) RefCell<Disk>);

impl DiskCell {
    pub(super) fn borrow(&self) -> std::cell::Ref<'_, Disk> {
        self.0.borrow()
    }
    pub(super) fn borrow_mut(&self) -> std::cell::RefMut<'_, Disk> {
        self.0.borrow_mut()
    }
}

#[derive(Clone)]
pub(super) struct Disk {
    pub(super) incarnation: u64,
    pub(super) epoch: Option<[u8; 16]>,
    pub(super) marks: Marks,
    pub(super) objects: Objects,
    pub(super) digest: Digest,
    pub(super) ever_complete: bool,
    pub(super) reports: BTreeMap<ObjectKey, (u64, Arc<[u8]>, bool)>,
    pub(super) next_report: u64,
    pub(super) events: VecDeque<proto::Event>,
    pub(super) next_event: u64,
}

impl EdgeState for DiskCell {
    fn hello(&self) -> HelloFacts {
        let d = self.borrow();
        let leaves: Vec<_> = d
            .reports
            .iter()
            .map(|(k, (seq, ..))| (k, ContentHash::of_sequence(*seq)))
            .collect();
        HelloFacts {
            agent_version: "sim".into(),
            incarnation: u128::from(d.incarnation).to_be_bytes(),
            epoch: d.epoch,
            marks: d.marks.clone(),
            reports: Digest::of(leaves.iter().map(|(k, h)| (*k, h))),
            ..Default::default()
        }
    }
    fn desired_digest(&self) -> Digest {
        self.borrow().digest
    }
    fn object(&self, key: &ObjectKey) -> Option<Object> {
        self.borrow().objects.get(key).cloned()
    }
    fn inventory(&self) -> Vec<(ObjectKey, ContentHash)> {
        self.borrow()
            .objects
            .iter()
            .map(|(k, o)| (k.clone(), o.hash))
            .collect()
    }
    fn pending_reports(&self) -> Vec<HeldReport> {
        self.all_reports()
            .into_iter()
            .filter(|r| !self.borrow().reports[&r.key].2)
            .collect()
    }
    fn all_reports(&self) -> Vec<HeldReport> {
        let held =
            |(key, (sequence, bytes, _)): (&ObjectKey, &(u64, Arc<[u8]>, bool))| HeldReport {
                key: key.clone(),
                sequence: *sequence,
                bytes: bytes.clone(),
                gone: false,
            };
        self.borrow().reports.iter().map(held).collect()
    }
    fn events_after(&self, sequence: u64, max: usize) -> Vec<proto::Event> {
        let d = self.borrow();
        d.events
            .iter()
            .filter(|e| e.sequence > sequence)
            .take(max)
            .cloned()
            .collect()
    }
}
