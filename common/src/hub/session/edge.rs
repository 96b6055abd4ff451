//! The edge's half of a session.
//!
//! ```text
//! Greeting --Welcome--> Committing --welcome_committed()--> Live --GoAway or error--> (dropped)
//! ```
//!
//! Batches are committed one at a time in the order they came: while [`EdgeEvent::Commit`] is out,
//! later ones wait in a queue that the cloud bounds to one for each lane.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::{Marks, ProtocolError, Stage, id16, marks_from_wire, marks_to_wire};
use crate::hub::proto::message::Body;
use crate::hub::{Lane, PROTOCOL_VERSION, delta, proto};
use crate::ids::ObjectKey;
use crate::object::{Content, ContentHash, Digest, Object};

/// Reports that may be on their way without an acknowledgement: enough for a node's Pods at once,
/// little enough that a stalled cloud costs no memory.
const REPORT_WINDOW: usize = 256 << 10;

/// Events on their way: they are bulk, and wait for one another.
const EVENT_WINDOW: usize = 32;

/// One page of an inventory.
const INVENTORY_PAGE: usize = 512;

/// A report that the edge holds, with its bytes.
#[derive(Debug, Clone)]
pub struct HeldReport {
    pub key: ObjectKey,
    pub sequence: u64,
    pub bytes: Arc<[u8]>,
    pub gone: bool,
}

/// What the edge holds durably, as the session reads it.
pub trait EdgeState {
    fn hello(&self) -> HelloFacts;
    fn desired_digest(&self) -> Digest;
    fn object(&self, key: &ObjectKey) -> Option<Object>;
    fn inventory(&self) -> Vec<(ObjectKey, ContentHash)>;
    /// Reports that no cloud has acknowledged in this incarnation.
    fn pending_reports(&self) -> Vec<HeldReport>;
    /// Every report held.
    fn all_reports(&self) -> Vec<HeldReport>;
    fn events_after(&self, sequence: u64, max: usize) -> Vec<proto::Event>;
}

/// What a Hello says beside the digest of the desired set.
#[derive(Debug, Clone, Default)]
pub struct HelloFacts {
    pub agent_version: String,
    pub incarnation: [u8; 16],
    pub continuation: Vec<u8>,
    pub epoch: Option<[u8; 16]>,
    pub marks: Marks,
    pub reports: Digest,
    pub link_version: u64,
    pub boot_id: String,
    pub clock_synchronised: bool,
    pub environment_hash: String,
}

/// A batch to commit, decoded and checked.
#[derive(Debug, Clone)]
pub struct Commit {
    pub sequence: u64,
    pub epoch: [u8; 16],
    pub marks: Marks,
    pub puts: Vec<Object>,
    pub removes: Vec<ObjectKey>,
    /// The set after this batch is all that the cloud wants; proven by its digest.
    pub complete: bool,
}

/// What became of a commit.
#[derive(Debug, Clone)]
pub enum Outcome {
    Committed {
        desired: Digest,
    },
    /// Nothing applied: a mark is below these.
    Stale {
        marks: Marks,
    },
    /// Nothing applied: the store could not.
    Failed,
}

/// What the driver must act on.
#[derive(Debug)]
pub enum EdgeEvent {
    /// Make durable, then call [`EdgeSession::welcome_committed`].
    Welcomed(Box<proto::Welcome>),
    /// Make durable, then call [`EdgeSession::committed`].
    Commit(Commit),
    ReportAcked {
        key: ObjectKey,
        sequence: u64,
    },
    EventsAcked {
        sequence: u64,
    },
    Answered(proto::Response),
    GoAway(proto::GoAway),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Greeting,
    Committing,
    Live,
}

impl Stage for Phase {
    fn word(self) -> &'static str {
        match self {
            Phase::Greeting => "waiting for the welcome",
            Phase::Committing => "committing the welcome",
            Phase::Live => "live",
        }
    }
}

struct Waiting {
    batch: proto::Batch,
    lane: Lane,
}

struct Committing {
    sequence: u64,
    lane: Lane,
    unusable: Vec<String>,
    /// The digest after the batch is the one that the cloud said.
    agreed: bool,
}

struct SentReport {
    sequence: u64,
    size: usize,
    bytes: Arc<[u8]>,
}

/// See the module.
pub struct EdgeSession {
    phase: Phase,
    out: VecDeque<(Lane, proto::Message)>,
    events: VecDeque<EdgeEvent>,
    batches: VecDeque<Waiting>,
    committing: Option<Committing>,
    sent: BTreeMap<ObjectKey, SentReport>,
    /// What the cloud has acknowledged in this session: the base of the next delta.
    acked: BTreeMap<ObjectKey, (u64, Arc<[u8]>)>,
    in_flight: usize,
    resend_all: bool,
    events_sent: u64,
    events_acked: u64,
    next_request: u64,
}

impl EdgeSession {
    /// Begins with a Hello.
    pub fn new(state: &dyn EdgeState) -> Self {
        let mut session = Self {
            phase: Phase::Greeting,
            out: VecDeque::new(),
            events: VecDeque::new(),
            batches: VecDeque::new(),
            committing: None,
            sent: BTreeMap::new(),
            acked: BTreeMap::new(),
            in_flight: 0,
            resend_all: false,
            events_sent: 0,
            events_acked: 0,
            next_request: 1,
        };
        let facts = state.hello();
        session.send(
            Lane::Control,
            Body::Hello(proto::Hello {
                version: PROTOCOL_VERSION,
                agent_version: facts.agent_version,
                incarnation: facts.incarnation.to_vec(),
                continuation: facts.continuation,
                epoch: facts.epoch.map(|e| e.to_vec()).unwrap_or_default(),
                marks: marks_to_wire(&facts.marks),
                desired: Some(state.desired_digest().into()),
                reports: Some(facts.reports.into()),
                link_version: facts.link_version,
                boot_id: facts.boot_id,
                clock_synchronised: facts.clock_synchronised,
                environment_hash: facts.environment_hash,
            }),
        );
        session
    }

    fn send(&mut self, lane: Lane, body: Body) {
        self.out
            .push_back((lane, proto::Message { body: Some(body) }));
    }

    pub fn poll_message(&mut self) -> Option<(Lane, proto::Message)> {
        self.out.pop_front()
    }

    pub fn poll_event(&mut self) -> Option<EdgeEvent> {
        self.events.pop_front()
    }

    pub fn live(&self) -> bool {
        self.phase == Phase::Live
    }

    /// Takes one message from the cloud.
    pub fn handle(
        &mut self,
        lane: Lane,
        message: proto::Message,
        state: &dyn EdgeState,
    ) -> Result<(), ProtocolError> {
        // A message of a later version.
        let Some(body) = message.body else {
            return Ok(());
        };
        match body {
            Body::Welcome(welcome) => {
                self.phase.require(Phase::Greeting, "a Welcome")?;
                if welcome.version == 0 || welcome.version > PROTOCOL_VERSION {
                    return Err(ProtocolError::Version(welcome.version));
                }
                self.phase = Phase::Committing;
                self.events
                    .push_back(EdgeEvent::Welcomed(Box::new(welcome)));
            }
            Body::GoAway(go) => self.events.push_back(EdgeEvent::GoAway(go)),
            Body::Batch(batch) => {
                self.phase.require(Phase::Live, "a Batch")?;
                if self.batches.len() >= Lane::ALL.len() {
                    return Err(ProtocolError::OutOfPlace("too many Batches", "committing"));
                }
                self.batches.push_back(Waiting { batch, lane });
                self.next_commit(state)?;
            }
            Body::WantInventory(_) => {
                self.phase.require(Phase::Live, "a WantInventory")?;
                self.send_inventory(state);
            }
            Body::ReportAcks(acks) => {
                self.phase.require(Phase::Live, "ReportAcks")?;
                for ack in acks.acks {
                    self.report_acked(ack)?;
                }
                self.pump(state);
            }
            Body::WantReports(_) => {
                self.phase.require(Phase::Live, "a WantReports")?;
                self.resend_all = true;
                self.acked.clear();
                self.pump(state);
            }
            Body::EventsAck(ack) => {
                self.events_acked = ack.sequence.min(self.events_sent);
                self.events.push_back(EdgeEvent::EventsAcked {
                    sequence: self.events_acked,
                });
                self.pump(state);
            }
            Body::Response(response) => self.events.push_back(EdgeEvent::Answered(response)),
            Body::Hello(_)
            | Body::WelcomeAck(_)
            | Body::BatchAck(_)
            | Body::Inventory(_)
            | Body::Reports(_)
            | Body::Events(_)
            | Body::Request(_) => {
                return Err(ProtocolError::OutOfPlace(
                    "an edge's message",
                    self.phase.word(),
                ));
            }
        }
        Ok(())
    }

    /// The welcome is durable.
    pub fn welcome_committed(&mut self, state: &dyn EdgeState) {
        if self.phase == Phase::Committing {
            self.phase = Phase::Live;
            self.send(Lane::Control, Body::WelcomeAck(proto::WelcomeAck {}));
            self.pump(state);
        }
    }

    fn next_commit(&mut self, state: &dyn EdgeState) -> Result<(), ProtocolError> {
        if self.committing.is_some() {
            return Ok(());
        }
        let Some(Waiting { batch, lane }) = self.batches.pop_front() else {
            return Ok(());
        };
        let mut unusable = Vec::new();
        let mut puts = Vec::with_capacity(batch.puts.len());
        for put in batch.puts {
            match decode_put(&put, state)? {
                Some(object) => puts.push(object),
                None => unusable.push(put.key),
            }
        }
        let parse = |k: &String| ObjectKey::parse(k).map_err(ProtocolError::from);
        let removes = batch
            .removes
            .iter()
            .map(parse)
            .collect::<Result<Vec<_>, _>>()?;
        let complete = match &batch.complete {
            Some(said) => {
                unusable.is_empty() && after(state, &puts, &removes) == Digest::try_from(said)?
            }
            None => false,
        };
        // What a batch does not say is as it was committed last.
        let facts = state.hello();
        let epoch = match (batch.epoch.is_empty(), facts.epoch) {
            (true, Some(epoch)) => epoch,
            (true, None) | (false, _) => id16("a cluster epoch", &batch.epoch)?,
        };
        let mut marks = marks_from_wire(&batch.marks);
        if batch.epoch.is_empty() {
            for (kind, revision) in facts.marks {
                marks.entry(kind).or_insert(revision);
            }
        }
        self.committing = Some(Committing {
            sequence: batch.sequence,
            lane,
            unusable,
            agreed: complete,
        });
        self.events.push_back(EdgeEvent::Commit(Commit {
            sequence: batch.sequence,
            epoch,
            marks,
            puts,
            removes,
            complete,
        }));
        Ok(())
    }

    /// The commit that [`EdgeEvent::Commit`] asked for is done.
    pub fn committed(
        &mut self,
        outcome: Outcome,
        state: &dyn EdgeState,
    ) -> Result<(), ProtocolError> {
        let Some(Committing {
            sequence,
            lane,
            unusable,
            agreed,
        }) = self.committing.take()
        else {
            return Ok(());
        };
        let mut ack = proto::BatchAck {
            sequence,
            unusable,
            ..Default::default()
        };
        match outcome {
            Outcome::Committed { desired } => {
                ack.set_outcome(proto::BatchOutcome::BatchCommitted);
                // An agreement needs no proof on the wire.
                ack.desired = (!agreed).then(|| desired.into());
            }
            Outcome::Stale { marks } => {
                ack.set_outcome(proto::BatchOutcome::BatchStale);
                ack.marks = marks_to_wire(&marks);
            }
            Outcome::Failed => ack.set_outcome(proto::BatchOutcome::BatchFailed),
        }
        self.send(lane, Body::BatchAck(ack));
        self.next_commit(state)
    }

    fn send_inventory(&mut self, state: &dyn EdgeState) {
        let all = state.inventory();
        let mut pages = all.chunks(INVENTORY_PAGE).peekable();
        if pages.peek().is_none() {
            self.send(
                Lane::Control,
                Body::Inventory(proto::Inventory {
                    last: true,
                    ..Default::default()
                }),
            );
        }
        while let Some(page) = pages.next() {
            let inventory = proto::Inventory {
                keys: page.iter().map(|(k, _)| k.to_string()).collect(),
                hashes: page.iter().flat_map(|(_, h)| h.0).collect(),
                last: pages.peek().is_none(),
            };
            self.send(Lane::Control, Body::Inventory(inventory));
        }
    }

    fn report_acked(&mut self, ack: proto::ReportAck) -> Result<(), ProtocolError> {
        let key = ObjectKey::parse(&ack.key)?;
        if self
            .sent
            .get(&key)
            .is_none_or(|s| s.sequence != ack.sequence)
        {
            // A later report of the same Pod is on its way.
            return Ok(());
        }
        let Some(sent) = self.sent.remove(&key) else {
            return Ok(());
        };
        self.in_flight -= sent.size;
        if ack.want_full {
            // Sent again from the pending ones, without a base.
            self.acked.remove(&key);
        } else {
            self.acked.insert(key.clone(), (sent.sequence, sent.bytes));
            self.events.push_back(EdgeEvent::ReportAcked {
                key,
                sequence: ack.sequence,
            });
        }
        Ok(())
    }

    /// Sends what is due: call when reports or Events changed.
    pub fn pump(&mut self, state: &dyn EdgeState) {
        if self.phase != Phase::Live {
            return;
        }
        self.pump_reports(state);
        self.pump_events(state);
    }

    fn pump_reports(&mut self, state: &dyn EdgeState) {
        let due = if self.resend_all {
            state.all_reports()
        } else {
            state.pending_reports()
        };
        let mut reports = Vec::new();
        for report in due {
            let sent = self.sent.get(&report.key).map(|s| s.sequence);
            let acked = self.acked.get(&report.key).map(|a| a.0);
            if sent >= Some(report.sequence) || acked >= Some(report.sequence) {
                continue;
            }
            if self.in_flight > 0 && self.in_flight + report.bytes.len() > REPORT_WINDOW {
                // Acknowledgements pump again.
                self.flush_reports(reports);
                return;
            }
            reports.push(self.report(report));
        }
        self.resend_all = false;
        self.flush_reports(reports);
    }

    fn flush_reports(&mut self, reports: Vec<proto::Report>) {
        if !reports.is_empty() {
            self.send(Lane::Status, Body::Reports(proto::Reports { reports }));
        }
    }

    fn report(&mut self, held: HeldReport) -> proto::Report {
        let base = self.acked.get(&held.key).map(|(_, bytes)| bytes.clone());
        let (encoding, payload) = delta::encode(base.as_deref(), &held.bytes);
        let hash_of = |b: &Arc<[u8]>| ContentHash::of(&Content::Present(b.clone())).0.to_vec();
        let report = proto::Report {
            key: held.key.to_string(),
            sequence: held.sequence,
            hash: hash_of(&held.bytes),
            encoding: encoding.into(),
            payload,
            size: u32::try_from(held.bytes.len()).unwrap_or(u32::MAX),
            gone: held.gone,
        };
        let size = held.bytes.len();
        self.in_flight += size;
        let sent = SentReport {
            sequence: held.sequence,
            size,
            bytes: held.bytes,
        };
        if let Some(older) = self.sent.insert(held.key, sent) {
            self.in_flight -= older.size;
        }
        report
    }

    fn pump_events(&mut self, state: &dyn EdgeState) {
        if self.events_sent > self.events_acked {
            return;
        }
        let events = state.events_after(self.events_sent, EVENT_WINDOW);
        if let Some(last) = events.last() {
            self.events_sent = last.sequence;
            self.send(Lane::Bulk, Body::Events(proto::Events { events }));
        }
    }

    /// The Pod is forgotten: nothing of its reports is kept.
    pub fn forget_report(&mut self, key: &ObjectKey) {
        self.acked.remove(key);
        if let Some(sent) = self.sent.remove(key) {
            self.in_flight -= sent.size;
        }
    }

    /// Asks the cloud; the answer comes as [`EdgeEvent::Answered`] with this id.
    pub fn request(&mut self, body: proto::request::Body) -> u64 {
        let id = self.next_request;
        self.next_request += 1;
        self.send(
            Lane::Status,
            Body::Request(proto::Request {
                id,
                body: Some(body),
            }),
        );
        id
    }
}

/// `None` when the put cannot be used and must come again in full.
fn decode_put(put: &proto::Put, state: &dyn EdgeState) -> Result<Option<Object>, ProtocolError> {
    let key = ObjectKey::parse(&put.key)?;
    let hash = ContentHash(id16("a content hash", &put.hash)?);
    // Whatever is held is the base: the content's hash tells whether it was the right one.
    let base = match (put.encoding(), state.object(&key)) {
        (
            proto::Encoding::ZstdDelta,
            Some(Object {
                content: Content::Present(bytes),
                ..
            }),
        ) => Some(bytes),
        (proto::Encoding::ZstdDelta, Some(_) | None) => return Ok(None),
        (
            proto::Encoding::Raw | proto::Encoding::Zstd | proto::Encoding::ZstdDictionary1,
            Some(_) | None,
        ) => None,
    };
    let object = if put.absent {
        Object::absent(key)
    } else {
        match delta::decode(
            put.encoding,
            &put.payload,
            put.size as usize,
            base.as_deref(),
        ) {
            Ok(bytes) => Object::present(key, bytes),
            Err(_) => return Ok(None),
        }
    };
    Ok((object.hash == hash).then_some(object))
}

/// The digest of the desired set once this batch is applied: removals first, then puts.
fn after(state: &dyn EdgeState, puts: &[Object], removes: &[ObjectKey]) -> Digest {
    let mut digest = state.desired_digest();
    let mut held: BTreeMap<&ObjectKey, Option<ContentHash>> = BTreeMap::new();
    let changes = removes.iter().map(|k| (k, None));
    for (key, new) in changes.chain(puts.iter().map(|o| (&o.key, Some(o.hash)))) {
        let old = *held
            .entry(key)
            .or_insert_with(|| state.object(key).map(|o| o.hash));
        if let Some(old) = old {
            digest.remove(key, &old);
        }
        if let Some(new) = new {
            digest.add(key, &new);
        }
        held.insert(key, new);
    }
    digest
}
