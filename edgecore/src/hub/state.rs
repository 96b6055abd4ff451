//! What the store holds, as the session's state machine reads it.

use common::hub::proto;
use common::hub::session::edge::{EdgeState, HeldReport, HelloFacts};
use common::ids::ObjectKey;
use common::object::{ContentHash, Digest, Object};

use crate::store::desired::Desired;
use crate::store::events::{EventRecord, EventType, Events};
use crate::store::reports::{Report, Reports};

/// Read on every message; holds handles only.
#[derive(Clone)]
pub struct StoreState {
    pub desired: Desired,
    pub reports: Reports,
    pub events: Events,
    /// What does not change while a session lives.
    pub facts: Facts,
}

#[derive(Debug, Clone, Default)]
pub struct Facts {
    pub incarnation: [u8; 16],
    pub continuation: Vec<u8>,
    pub link_version: u64,
    pub boot_id: String,
    pub clock_synchronised: bool,
    pub environment_hash: String,
}

impl EdgeState for StoreState {
    fn hello(&self) -> HelloFacts {
        let facts = self.facts.clone();
        HelloFacts {
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            incarnation: facts.incarnation,
            continuation: facts.continuation,
            epoch: self.desired.epoch(),
            marks: self.desired.marks(),
            reports: self.reports.digest(),
            link_version: facts.link_version,
            boot_id: facts.boot_id,
            clock_synchronised: facts.clock_synchronised,
            environment_hash: facts.environment_hash,
        }
    }

    fn desired_digest(&self) -> Digest {
        self.desired.digest()
    }

    fn object(&self, key: &ObjectKey) -> Option<Object> {
        self.desired.object(key)
    }

    fn inventory(&self) -> Vec<(ObjectKey, ContentHash)> {
        self.desired.inventory()
    }

    fn pending_reports(&self) -> Vec<HeldReport> {
        self.reports.pending().into_iter().map(held).collect()
    }

    fn all_reports(&self) -> Vec<HeldReport> {
        self.reports.all().into_iter().map(held).collect()
    }

    fn events_after(&self, sequence: u64, max: usize) -> Vec<proto::Event> {
        self.events
            .after(sequence, max)
            .events
            .into_iter()
            .map(event)
            .collect()
    }
}

fn held(report: Report) -> HeldReport {
    HeldReport {
        key: report.key,
        sequence: report.seq,
        bytes: report.bytes,
        gone: report.gone,
    }
}

fn event(record: EventRecord) -> proto::Event {
    proto::Event {
        sequence: record.seq,
        pod: record.event.pod,
        field_path: record.event.field_path,
        warning: match record.event.kind {
            EventType::Warning => true,
            EventType::Normal => false,
        },
        reason: record.event.reason,
        message: record.event.message,
        count: record.count,
        first_ms: record.first_ms,
        last_ms: record.last_ms,
    }
}
