//! The cloud's half of a session.
//!
//! ```text
//! Expecting --Hello--> Claiming --welcome()--> Welcomed --WelcomeAck--> Live
//!                                                                       |  digest equal: known = view
//!                                                                       |  else: Inventory -> known
//!                                                                       v
//!                                              at most one batch in flight on each of two lanes
//! ```
//!
//! `known` is what the edge has said or acknowledged that it holds. Whatever differs from the view
//! is sent; whatever the view no longer has is removed, but only when the view says that it is
//! sure. Nothing is sent from a view older than what the edge has committed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use prost::Message as _;

use super::{
    MAX_OBJECTS, MAX_REPORT, Marks, ProtocolError, Stage, behind, digest_or_empty, id16,
    marks_from_wire, marks_to_wire, pop_from,
};
use crate::hub::proto::message::Body;
use crate::hub::{Lane, PROTOCOL_VERSION, delta, proto};
use crate::ids::{Kind, ObjectKey};
use crate::object::{Content, ContentHash, Digest};

/// A put of at most this encoded size travels on the control lane, where nothing large delays it.
const SMALL_PUT: usize = 8 << 10;

/// Puts of one batch, so that a thin link shows progress and an edge commits in small steps.
const BATCH_BYTES: usize = 64 << 10;

/// An edge sends its reports, Events and requests right behind its WelcomeAck, on lanes of their
/// own: one message of each, and a request for each token that a Pod waits for.
const EARLY: usize = 256;
/// And of these bytes: a window of reports, a window of Events and the requests.
const EARLY_BYTES: usize = 2 << 20;

/// Content of one message's reports. The edge's window is 256 KiB; each byte may have come as a
/// thousandth of one, so what is decoded is bounded and not what is read.
const REPORTS_BYTES: usize = 1 << 20;

/// Events of one message: eight times what an edge sends before it waits.
const EVENTS_AT_ONCE: usize = 256;

/// What should be at the edge, as the session reads it.
pub trait CloudView {
    /// The cluster epoch this view belongs to.
    fn epoch(&self) -> [u8; 16];
    fn marks(&self) -> Marks;
    /// The resourceVersion of an object of the view: it may be above its kind's mark.
    fn revision(&self, key: &ObjectKey) -> u64;
    /// Every object that the node should hold.
    fn each(&self, visit: &mut dyn FnMut(&ObjectKey, &ContentHash));
    fn hash(&self, key: &ObjectKey) -> Option<ContentHash>;
    /// The object as a put, as a delta from `base` when that content is still at hand.
    fn put(&self, key: &ObjectKey, base: Option<ContentHash>) -> Option<proto::Put>;
    /// The view knows that the node should not hold this: it is not merely held back.
    fn may_remove(&self, key: &ObjectKey) -> bool;
    /// The view holds all that the node should.
    fn complete(&self) -> bool;
    /// The bytes of the last report of this key, the base of a delta upward.
    fn report_base(&self, key: &ObjectKey) -> Option<(ContentHash, Arc<[u8]>)>;
    /// Over (key, sequence) of the reports held for this node and incarnation.
    fn reports_held(&self, incarnation: &[u8; 16]) -> Digest;
}

/// What the driver must act on.
#[derive(Debug)]
pub enum CloudEvent {
    /// Claim the node, then call [`CloudSession::welcome`].
    Greeted(Box<proto::Hello>),
    /// The edge has committed the welcome.
    Live,
    /// The view is older than what the edge committed: list consistently, then call
    /// [`CloudSession::listed`], with a new cluster epoch if the consistent list itself is older.
    Behind {
        committed: Marks,
    },
    /// The edge's store cannot commit: pump again later.
    EdgeCannotCommit,
    /// What was sent does not arrive as it is, again and again: pump again later.
    Disagreed,
    /// A report that no Pod can need: acknowledged and not taken.
    TooLarge {
        key: ObjectKey,
        bytes: usize,
    },
    /// The edge holds exactly the view: said once for each change.
    InSync,
    Report {
        key: ObjectKey,
        sequence: u64,
        bytes: Arc<[u8]>,
        gone: bool,
    },
    Events(Vec<proto::Event>),
    Asked(proto::Request),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Expecting,
    Claiming,
    Welcomed,
    Live,
}

impl Stage for Phase {
    fn word(self) -> &'static str {
        match self {
            Phase::Expecting => "waiting for a Hello",
            Phase::Claiming => "claiming the node",
            Phase::Welcomed => "waiting for the welcome to be committed",
            Phase::Live => "live",
        }
    }
}

#[derive(Default)]
struct InFlight {
    sequence: u64,
    puts: Vec<(ObjectKey, ContentHash)>,
    removes: Vec<ObjectKey>,
    complete: Option<Digest>,
    epoch: [u8; 16],
    marks: Marks,
}

/// What the edge holds, as far as it is known.
enum Known {
    Nothing,
    /// An inventory is on its way; these pages have come.
    Asking(BTreeMap<ObjectKey, ContentHash>),
    Is(BTreeMap<ObjectKey, ContentHash>),
}

/// See the module.
pub struct CloudSession {
    phase: Phase,
    hello: Option<Box<proto::Hello>>,
    incarnation: [u8; 16],
    /// The epoch and marks that the edge committed.
    committed_epoch: Option<[u8; 16]>,
    committed: Marks,
    /// What the edge's marks are after all that was sent: the committed ones, raised by the view's
    /// and by each object's own revision, so that no older view of an object can follow it.
    floor: Marks,
    /// The epoch and marks that the edge has acknowledged: what a batch need not say again.
    acked_epoch: Option<[u8; 16]>,
    acked_marks: Marks,
    known: Known,
    /// Objects whose delta the edge could not use: sent without a base.
    in_full: BTreeSet<ObjectKey>,
    /// Boxed: at rest there is none.
    in_flight: [Option<Box<InFlight>>; 2],
    next_sequence: u64,
    /// The digest that the edge last acknowledged as complete.
    completed: Option<Digest>,
    paused: bool,
    /// Complete batches in a row whose digest did not come out.
    disagreements: u32,
    told_behind: bool,
    /// The edge is new or has lost its marks: only a consistent list may be sent.
    unmarked: bool,
    /// What overtook the WelcomeAck on another lane.
    early: Vec<Body>,
    early_bytes: usize,
    /// What would overtake the Welcome on another lane: said once the edge is live.
    held: Vec<(Lane, Body)>,
    out: VecDeque<(Lane, proto::Message)>,
    events: VecDeque<CloudEvent>,
}

impl Default for CloudSession {
    fn default() -> Self {
        Self {
            phase: Phase::Expecting,
            hello: None,
            incarnation: [0; 16],
            committed_epoch: None,
            committed: Marks::new(),
            floor: Marks::new(),
            acked_epoch: None,
            acked_marks: Marks::new(),
            known: Known::Nothing,
            in_full: BTreeSet::new(),
            in_flight: [None, None],
            next_sequence: 1,
            completed: None,
            paused: false,
            disagreements: 0,
            told_behind: false,
            unmarked: false,
            early: Vec::new(),
            early_bytes: 0,
            held: Vec::new(),
            out: VecDeque::new(),
            events: VecDeque::new(),
        }
    }
}

/// The lanes that carry batches, in the order of `in_flight`.
const BATCH_LANES: [Lane; 2] = [Lane::Control, Lane::Bulk];

impl CloudSession {
    fn send(&mut self, lane: Lane, body: Body) {
        self.out
            .push_back((lane, proto::Message { body: Some(body) }));
    }

    /// Reports of an earlier session are written, and acknowledged, before this one is live.
    fn send_to_live(&mut self, lane: Lane, body: Body) {
        match self.phase {
            Phase::Live => self.send(lane, body),
            Phase::Expecting | Phase::Claiming | Phase::Welcomed => self.held.push((lane, body)),
        }
    }

    pub fn poll_message(&mut self) -> Option<(Lane, proto::Message)> {
        pop_from(&mut self.out)
    }

    pub fn poll_event(&mut self) -> Option<CloudEvent> {
        pop_from(&mut self.events)
    }

    pub fn live(&self) -> bool {
        self.phase == Phase::Live
    }

    /// Random, new whenever the edge's store was lost or rebuilt; zero before the Hello.
    pub fn incarnation(&self) -> [u8; 16] {
        self.incarnation
    }

    /// Batches that wait for an acknowledgement.
    pub fn batches_in_flight(&self) -> usize {
        self.in_flight.iter().flatten().count()
    }

    /// Takes one message from the edge.
    pub fn handle(
        &mut self,
        message: proto::Message,
        view: &dyn CloudView,
    ) -> Result<(), ProtocolError> {
        let bytes = message.encoded_len();
        let Some(body) = message.body else {
            return Ok(());
        };
        if self.phase == Phase::Welcomed && !matches!(body, Body::WelcomeAck(_)) {
            self.early_bytes += bytes;
            if self.early.len() >= EARLY || self.early_bytes > EARLY_BYTES {
                return Err(ProtocolError::OutOfPlace("so much", self.phase.word()));
            }
            self.early.push(body);
            return Ok(());
        }
        self.take(body, view)
    }

    fn take(&mut self, body: Body, view: &dyn CloudView) -> Result<(), ProtocolError> {
        match body {
            Body::Hello(hello) => {
                self.phase.require(Phase::Expecting, "a Hello")?;
                self.greeted(hello)?;
            }
            Body::WelcomeAck(_) => {
                self.phase.require(Phase::Welcomed, "a WelcomeAck")?;
                self.go_live(view)?;
                for body in std::mem::take(&mut self.early) {
                    self.take(body, view)?;
                }
            }
            Body::BatchAck(ack) => {
                self.phase.require(Phase::Live, "a BatchAck")?;
                self.batch_acked(ack)?;
                self.pump(view);
            }
            Body::Inventory(page) => {
                self.phase.require(Phase::Live, "an Inventory")?;
                self.inventory(page)?;
                self.pump(view);
            }
            Body::Reports(reports) => {
                self.phase.require(Phase::Live, "Reports")?;
                check_size(&reports.reports)?;
                for report in reports.reports {
                    self.report(report, view)?;
                }
            }
            Body::Events(events) => {
                self.phase.require(Phase::Live, "Events")?;
                if events.events.len() > EVENTS_AT_ONCE {
                    return Err(ProtocolError::OutOfPlace("so many Events", "live"));
                }
                self.events.push_back(CloudEvent::Events(events.events));
            }
            Body::Request(request) => {
                self.phase.require(Phase::Live, "a Request")?;
                self.events.push_back(CloudEvent::Asked(request));
            }
            Body::GoAway(_) => {}
            Body::Welcome(_)
            | Body::Batch(_)
            | Body::WantInventory(_)
            | Body::ReportAcks(_)
            | Body::WantReports(_)
            | Body::EventsAck(_)
            | Body::Response(_) => {
                return Err(ProtocolError::OutOfPlace(
                    "a cloud's message",
                    self.phase.word(),
                ));
            }
        }
        Ok(())
    }

    fn greeted(&mut self, hello: proto::Hello) -> Result<(), ProtocolError> {
        if hello.version == 0 || hello.version > PROTOCOL_VERSION {
            return Err(ProtocolError::Version(hello.version));
        }
        self.incarnation = id16("an incarnation", &hello.incarnation)?;
        digest_or_empty(hello.desired.as_ref())?;
        if hello.epoch.is_empty() {
            self.unmarked = true;
        } else {
            self.committed_epoch = Some(id16("a cluster epoch", &hello.epoch)?);
            self.committed = marks_from_wire(&hello.marks);
            self.floor = self.committed.clone();
            self.acked_epoch = self.committed_epoch;
            self.acked_marks = self.committed.clone();
        }
        self.phase = Phase::Claiming;
        self.events
            .push_back(CloudEvent::Greeted(Box::new(hello.clone())));
        self.hello = Some(Box::new(hello));
        Ok(())
    }

    /// The node is claimed: answer its Hello.
    pub fn welcome(&mut self, mut welcome: proto::Welcome) {
        if self.phase == Phase::Claiming {
            welcome.version = PROTOCOL_VERSION;
            self.phase = Phase::Welcomed;
            self.send(Lane::Control, Body::Welcome(welcome));
        }
    }

    fn go_live(&mut self, view: &dyn CloudView) -> Result<(), ProtocolError> {
        self.phase = Phase::Live;
        self.events.push_back(CloudEvent::Live);
        for (lane, body) in std::mem::take(&mut self.held) {
            self.send(lane, body);
        }
        let Some(hello) = self.hello.take() else {
            return Ok(());
        };
        let theirs = digest_or_empty(hello.desired.as_ref())?;
        if theirs.count == 0 {
            self.known = Known::Is(BTreeMap::new());
        } else if theirs == digest_of(view) {
            let mut held = BTreeMap::new();
            view.each(&mut |key, hash| {
                held.insert(key.clone(), *hash);
            });
            self.known = Known::Is(held);
        } else {
            self.ask_inventory();
        }
        if digest_or_empty(hello.reports.as_ref())? != view.reports_held(&self.incarnation) {
            self.send(Lane::Status, Body::WantReports(proto::WantReports {}));
        }
        self.pump(view);
        Ok(())
    }

    fn ask_inventory(&mut self) {
        self.known = Known::Asking(BTreeMap::new());
        self.send(Lane::Control, Body::WantInventory(proto::WantInventory {}));
    }

    fn inventory(&mut self, page: proto::Inventory) -> Result<(), ProtocolError> {
        let Known::Asking(held) = &mut self.known else {
            return Err(ProtocolError::OutOfPlace(
                "an Inventory",
                "not asking for one",
            ));
        };
        if page.hashes.len() != page.keys.len() * 16 {
            let (keys, hashes) = (page.keys.len(), page.hashes.len());
            return Err(ProtocolError::Inventory { keys, hashes });
        }
        for (key, hash) in page.keys.iter().zip(page.hashes.chunks_exact(16)) {
            held.insert(ObjectKey::parse(key)?, ContentHash(id16("a hash", hash)?));
        }
        if held.len() > MAX_OBJECTS {
            return Err(ProtocolError::TooMany(MAX_OBJECTS));
        }
        if page.last {
            self.known = Known::Is(std::mem::take(held));
        }
        Ok(())
    }

    fn batch_acked(&mut self, ack: proto::BatchAck) -> Result<(), ProtocolError> {
        let outcome = ack.outcome();
        let slot = self
            .in_flight
            .iter_mut()
            .find(|s| s.as_ref().is_some_and(|f| f.sequence == ack.sequence))
            .ok_or(ProtocolError::UnknownBatch(ack.sequence))?;
        let Some(flight) = slot.take() else {
            return Ok(());
        };
        match outcome {
            proto::BatchOutcome::BatchCommitted => self.batch_committed(*flight, &ack)?,
            proto::BatchOutcome::BatchStale => {
                self.committed = marks_from_wire(&ack.marks);
                self.floor = self.committed.clone();
                self.told_behind = false;
            }
            proto::BatchOutcome::BatchFailed => {
                self.paused = true;
                self.events.push_back(CloudEvent::EdgeCannotCommit);
            }
        }
        Ok(())
    }

    fn batch_committed(
        &mut self,
        flight: InFlight,
        ack: &proto::BatchAck,
    ) -> Result<(), ProtocolError> {
        let parse = |k: &String| ObjectKey::parse(k).map_err(ProtocolError::from);
        let unusable = ack
            .unusable
            .iter()
            .map(parse)
            .collect::<Result<BTreeSet<_>, _>>()?;
        let mut again = false;
        if let Known::Is(known) = &mut self.known {
            for key in flight.removes {
                known.remove(&key);
            }
            for (key, hash) in flight.puts {
                if unusable.contains(&key) {
                    known.remove(&key);
                    // It was whole already: sending it at once again would not end.
                    again |= !self.in_full.insert(key);
                } else {
                    self.in_full.remove(&key);
                    known.insert(key, hash);
                }
            }
        }
        if again {
            self.pause_disagreed();
        }
        if self.acked_epoch != Some(flight.epoch) {
            self.acked_marks.clear();
        }
        self.acked_epoch = Some(flight.epoch);
        for (kind, revision) in flight.marks {
            let mark = self.acked_marks.entry(kind).or_default();
            *mark = revision.max(*mark);
        }
        let Some(said) = flight.complete else {
            return Ok(());
        };
        let agreed = match &ack.desired {
            None => true,
            Some(theirs) => Digest::try_from(theirs)? == said,
        };
        if agreed {
            self.disagreements = 0;
            self.completed = Some(said);
            self.events.push_back(CloudEvent::InSync);
        } else if unusable.is_empty() {
            // The two disagree on what is there: look again, and if that did not help, later.
            self.disagreements += 1;
            if self.disagreements > 1 {
                self.pause_disagreed();
            }
            self.ask_inventory();
        }
        Ok(())
    }

    fn pause_disagreed(&mut self) {
        if !self.paused {
            self.paused = true;
            self.events.push_back(CloudEvent::Disagreed);
        }
    }

    fn report(&mut self, report: proto::Report, view: &dyn CloudView) -> Result<(), ProtocolError> {
        let key = ObjectKey::parse(&report.key)?;
        let size = report.size as usize;
        if size > MAX_REPORT {
            self.ack_reports([(key.clone(), report.sequence, false)]);
            self.events
                .push_back(CloudEvent::TooLarge { key, bytes: size });
            return Ok(());
        }
        // Whatever is held is the base: the content's hash tells whether it was the right one.
        let delta = report.encoding() == proto::Encoding::ZstdDelta;
        let base = view
            .report_base(&key)
            .filter(|_| delta)
            .map(|(_, bytes)| bytes);
        if delta && base.is_none() {
            self.ack_reports([(key, report.sequence, true)]);
            return Ok(());
        }
        let decoded = delta::decode(report.encoding, &report.payload, size, base.as_deref())
            .map(Arc::<[u8]>::from)
            .ok()
            .filter(|b| ContentHash::of(&Content::Present(b.clone())).0[..] == report.hash[..]);
        match decoded {
            Some(bytes) => self.events.push_back(CloudEvent::Report {
                key,
                sequence: report.sequence,
                bytes,
                gone: report.gone,
            }),
            None if base.is_some() => self.ack_reports([(key, report.sequence, true)]),
            None => return Err(ProtocolError::OutOfPlace("an undecodable report", "live")),
        }
        Ok(())
    }

    /// The reports are in the API (or refused for good); `true` asks for one again, in full.
    pub fn ack_reports(&mut self, acks: impl IntoIterator<Item = (ObjectKey, u64, bool)>) {
        let ack = |(key, sequence, want_full): (ObjectKey, u64, bool)| proto::ReportAck {
            key: key.to_string(),
            sequence,
            want_full,
        };
        let acks: Vec<_> = acks.into_iter().map(ack).collect();
        if !acks.is_empty() {
            self.send_to_live(Lane::Status, Body::ReportAcks(proto::ReportAcks { acks }));
        }
    }

    /// Events up to here are in the API, or were refused for good.
    pub fn ack_events(&mut self, sequence: u64) {
        self.send_to_live(Lane::Bulk, Body::EventsAck(proto::EventsAck { sequence }));
    }

    pub fn respond(&mut self, response: proto::Response) {
        self.send(Lane::Status, Body::Response(response));
    }

    pub fn go_away(&mut self, go_away: proto::GoAway) {
        self.send(Lane::Control, Body::GoAway(go_away));
    }

    /// After [`CloudEvent::EdgeCannotCommit`], when it is time to try again.
    pub fn resume(&mut self, view: &dyn CloudView) {
        self.paused = false;
        self.pump(view);
    }

    /// After [`CloudEvent::Behind`]: the view is from a consistent list.
    pub fn listed(&mut self, view: &dyn CloudView) {
        self.unmarked = false;
        self.told_behind = false;
        self.pump(view);
    }

    /// Sends what the edge lacks: call when the view changed.
    pub fn pump(&mut self, view: &dyn CloudView) {
        if self.phase != Phase::Live || self.paused || !matches!(self.known, Known::Is(_)) {
            return;
        }
        if self.behind(view) {
            if !self.told_behind {
                self.told_behind = true;
                let committed = self.committed.clone();
                self.events.push_back(CloudEvent::Behind { committed });
            }
            return;
        }
        self.told_behind = false;
        let due = self.due(view);
        if self.in_flight[0].is_none() && !(due.small.is_empty() && due.removes.is_empty()) {
            self.send_batch(
                0,
                due.small,
                due.removes,
                due.fits_all && due.bulk.is_empty(),
                view,
            );
        } else if self.in_flight[1].is_none() && !due.bulk.is_empty() {
            let alone = due.fits_all && due.small.is_empty() && due.removes.is_empty();
            self.send_batch(1, due.bulk, Vec::new(), alone, view);
        } else if due.nothing()
            && self.in_flight.iter().all(Option::is_none)
            && view.complete()
            && self.completed != Some(digest_of(view))
        {
            self.send_batch(0, Vec::new(), Vec::new(), true, view);
        } else {
            return;
        }
        self.pump(view);
    }

    fn behind(&self, view: &dyn CloudView) -> bool {
        let same_epoch = self.committed_epoch == Some(view.epoch());
        self.unmarked || (same_epoch && behind(&view.marks(), &self.committed).is_some())
    }

    fn due(&self, view: &dyn CloudView) -> Due {
        let Known::Is(known) = &self.known else {
            return Due::default();
        };
        let flying = |key: &ObjectKey, hash: &ContentHash| {
            self.in_flight.iter().flatten().any(|f| {
                f.removes.contains(key) || f.puts.iter().any(|(k, h)| k == key && h == hash)
            })
        };
        // An object that is in flight in an older version waits for its acknowledgement: the two
        // lanes do not keep their order to one another.
        let busy = |key: &ObjectKey| {
            self.in_flight
                .iter()
                .flatten()
                .any(|f| f.removes.contains(key) || f.puts.iter().any(|(k, _)| k == key))
        };
        let mut wanted = Vec::new();
        let mut due = Due {
            fits_all: true,
            ..Due::default()
        };
        view.each(&mut |key, hash| {
            if known.get(key) != Some(hash) && !flying(key, hash) {
                if busy(key) {
                    due.fits_all = false;
                } else {
                    wanted.push(key.clone());
                }
            }
        });
        // What Pods refer to goes before the Pods.
        wanted.sort_by_key(|k| k.kind == Kind::Pod);
        let (mut small, mut bulk) = (0, 0);
        for key in wanted {
            let base = known
                .get(&key)
                .filter(|_| !self.in_full.contains(&key))
                .copied();
            let Some(put) = view.put(&key, base) else {
                continue;
            };
            let (room, list) = if put.payload.len() <= SMALL_PUT {
                (&mut small, &mut due.small)
            } else {
                (&mut bulk, &mut due.bulk)
            };
            // With its key: the answer "absent" has no payload, and is no frame without end.
            let weight = put.encoded_len();
            if *room > 0 && *room + weight > BATCH_BYTES {
                due.fits_all = false;
                continue;
            }
            *room += weight;
            list.push((key, put));
        }
        let mut room = 0;
        for key in known.keys() {
            if view.hash(key).is_none() && !busy(key) && view.may_remove(key) {
                if room > BATCH_BYTES {
                    due.fits_all = false;
                    break;
                }
                room += key.namespace.len() + key.name.len() + key.uid.len();
                due.removes.push(key.clone());
            }
        }
        due
    }

    fn send_batch(
        &mut self,
        slot: usize,
        puts: Vec<(ObjectKey, proto::Put)>,
        removes: Vec<ObjectKey>,
        last: bool,
        view: &dyn CloudView,
    ) {
        let alone = self.in_flight.iter().all(Option::is_none);
        let complete = (last && alone && view.complete()).then(|| digest_of(view));
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        self.raise_floor(&puts, view);
        let hash_of = |put: &proto::Put| ContentHash::from_slice(&put.hash).unwrap_or_default();
        let flight = InFlight {
            sequence,
            puts: puts.iter().map(|(k, p)| (k.clone(), hash_of(p))).collect(),
            removes: removes.clone(),
            complete,
            epoch: view.epoch(),
            marks: self.floor.clone(),
        };
        self.in_flight[slot] = Some(Box::new(flight));
        let (epoch, marks) = self.news(view.epoch());
        let batch = proto::Batch {
            sequence,
            epoch,
            marks,
            puts: puts.into_iter().map(|(_, p)| p).collect(),
            removes: removes.iter().map(ToString::to_string).collect(),
            complete: complete.map(Into::into),
        };
        // Once it has seen this epoch, the edge refuses what is older.
        self.committed_epoch = Some(view.epoch());
        self.committed = view.marks();
        self.send(BATCH_LANES[slot], Body::Batch(batch));
    }

    /// Epoch and marks as a batch says them: nothing that the edge has acknowledged before.
    fn news(&self, epoch: [u8; 16]) -> (Vec<u8>, Vec<proto::Mark>) {
        if self.acked_epoch != Some(epoch) {
            return (epoch.to_vec(), marks_to_wire(&self.floor));
        }
        let mut raised = self.floor.clone();
        raised.retain(|kind, revision| self.acked_marks.get(kind) < Some(revision));
        (Vec::new(), marks_to_wire(&raised))
    }

    fn raise_floor(&mut self, puts: &[(ObjectKey, proto::Put)], view: &dyn CloudView) {
        if self.committed_epoch != Some(view.epoch()) {
            // Marks count from the epoch's beginning.
            self.floor.clear();
        }
        for (kind, revision) in view.marks() {
            let mark = self.floor.entry(kind).or_default();
            *mark = revision.max(*mark);
        }
        for (key, _) in puts {
            // Of a kind that the view does not mark, no view could ever be new enough.
            if let Some(mark) = self.floor.get_mut(&key.kind) {
                *mark = view.revision(key).max(*mark);
            }
        }
    }
}

#[derive(Default)]
struct Due {
    small: Vec<(ObjectKey, proto::Put)>,
    bulk: Vec<(ObjectKey, proto::Put)>,
    removes: Vec<ObjectKey>,
    /// Nothing was left out for want of room.
    fits_all: bool,
}

impl Due {
    fn nothing(&self) -> bool {
        self.small.is_empty() && self.bulk.is_empty() && self.removes.is_empty() && self.fits_all
    }
}

/// Before anything is decoded: what the reports of one message come to.
fn check_size(reports: &[proto::Report]) -> Result<(), ProtocolError> {
    let taken = reports.iter().map(|r| r.size as usize);
    let bytes = taken.filter(|size| *size <= MAX_REPORT).sum();
    if bytes > REPORTS_BYTES {
        return Err(ProtocolError::TooMuch(bytes));
    }
    Ok(())
}

fn digest_of(view: &dyn CloudView) -> Digest {
    let mut digest = Digest::default();
    view.each(&mut |key, hash| digest.add(key, hash));
    digest
}

#[cfg(test)]
mod tests;
