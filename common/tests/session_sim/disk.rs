//! The model of the edge's store. What a commit brought is durable; reports and Events are late, so
//! a power cut takes the last of them. A damaged store is made again, as a new incarnation: all the
//! commits are still there, or only some of what they brought.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use common::hub::proto;
use common::hub::session::Marks;
use common::hub::session::edge::{EdgeState, HeldReport, HelloFacts};
use common::ids::ObjectKey;
use common::object::{ContentHash, Digest, Object};

use super::cluster::{Dice, Objects};

/// As the product's: a start goes on behind all numbers that may have been used.
const BLOCK: u64 = 1024;

pub(super) type Reports = BTreeMap<ObjectKey, (u64, Arc<[u8]>, bool)>;

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
    pub(super) reports: Reports,
    pub(super) next_report: u64,
    pub(super) events: VecDeque<proto::Event>,
    pub(super) next_event: u64,
    /// The reports and the last Event that a power cut leaves.
    pub(super) durable: (Reports, u64),
    /// Nothing can be committed.
    pub(super) full: bool,
}

impl Disk {
    pub(super) fn new() -> Self {
        Self {
            incarnation: 1,
            epoch: None,
            marks: Marks::new(),
            objects: Objects::new(),
            digest: Digest::default(),
            ever_complete: false,
            reports: Reports::new(),
            next_report: 1,
            events: VecDeque::new(),
            next_event: 1,
            durable: (Reports::new(), 0),
            full: false,
        }
    }

    /// All that was late is durable.
    pub(super) fn sync(&mut self) {
        self.durable = (self.reports.clone(), self.next_event - 1);
    }

    /// What was late is gone, and what is left is said anew under numbers that were never used.
    pub(super) fn cut(&mut self) {
        let (reports, last_event) = std::mem::take(&mut self.durable);
        self.reports = reports;
        self.events.retain(|e| e.sequence <= last_event);
        self.next_report += BLOCK;
        self.next_event += BLOCK;
        self.renumber();
    }

    /// The database was damaged and is made again from its copy: all commits, no Events, and
    /// numbers that may repeat.
    pub(super) fn rebuild(&mut self, dice: &mut Dice) {
        self.cut();
        self.incarnation += 1;
        self.events.clear();
        self.next_report = 1 + dice.roll(self.next_report);
        self.next_event = 1 + dice.roll(self.next_event);
        self.renumber();
    }

    /// Both copies were damaged: some of the objects and reports, and no word of how new they are.
    pub(super) fn salvage(&mut self, dice: &mut Dice) {
        self.reports.retain(|_, _| dice.one_in(2));
        self.sync();
        self.rebuild(dice);
        self.objects.retain(|_, _| dice.one_in(2));
        self.digest = Digest::of(self.objects.iter().map(|(k, o)| (k, &o.hash)));
        self.epoch = None;
        self.marks.clear();
        self.ever_complete = false;
        self.drop_orphans();
    }

    fn renumber(&mut self) {
        self.drop_orphans();
        for (sequence, _, acked) in self.reports.values_mut() {
            (*sequence, *acked) = (self.next_report, false);
            self.next_report += 1;
        }
        self.sync();
    }

    /// Reports of Pods that are not here any more.
    fn drop_orphans(&mut self) {
        let objects = &self.objects;
        self.reports.retain(|key, _| objects.contains_key(key));
    }
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
