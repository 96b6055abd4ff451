//! What the sessions' handles and the patcher share, behind one short lock.
//!
//! - Owns: each node's reports, its session if there is one, the queue, the counters.
//! - Takes: reports and session starts and ends from handles, results from flights.
//! - Gives: to a flight what it works on; to a session its acknowledgements.
//! - Never: awaits or does I/O under the lock.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use common::ids::{Kind, NodeName, ObjectKey};
use jiff::Timestamp;
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;

use super::queue::{Moment, Queue, Taken, Verdict};
use super::reports::{Held, NodeReports, ReportError, to_forget};
use super::views::{Endpoints, Fresh, NodeViews, PodViews};
use super::writer::{ApiWriter, Retry};

/// The cloud's wall clock.
pub type WallClock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// How long the reports of a node without a session are kept: an access network that is rebuilt
/// or a device that restarts is back within it.
const KEPT_FOR: Duration = Duration::from_secs(600);
/// And of how many such nodes, at about 20 KB each.
const KEPT_NODES: usize = 2000;

/// Numbers for the metrics endpoint; each only grows, but for the last two.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Metrics {
    pub reports: u64,
    /// Reports and changes that fell into one comparison with another.
    pub coalesced: u64,
    pub patches: u64,
    pub deletes: u64,
    pub conflicts: u64,
    pub retries: u64,
    /// Pods that were found not to exist any more.
    pub gone: u64,
    /// Reports of other nodes' Pods, and statuses that the API server refuses.
    pub refused: u64,
    /// Writes held back because the claim was not fresh.
    pub not_fresh: u64,
    pub events_written: u64,
    pub events_dropped: u64,
    pub tokens_given: u64,
    pub tokens_refused: u64,
    pub waiting: u64,
    pub in_flight: u64,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Counter {
    Reports,
    Coalesced,
    Patches,
    Deletes,
    Conflicts,
    Retries,
    Gone,
    Refused,
    NotFresh,
    EventsWritten,
    EventsDropped,
    TokensGiven,
    TokensRefused,
}

const COUNTERS: usize = Counter::TokensRefused as usize + 1;

pub(super) struct Shared {
    pub(super) writer: Arc<dyn ApiWriter>,
    pub(super) pods: Arc<dyn PodViews>,
    pub(super) nodes: Arc<dyn NodeViews>,
    pub(super) endpoints: Option<Arc<dyn Endpoints>>,
    pub(super) wake: Notify,
    /// Events and token requests under way, of all nodes.
    pub(super) aside: Semaphore,
    clock: WallClock,
    started: Instant,
    state: Mutex<State>,
    counters: [AtomicU64; COUNTERS],
}

struct State {
    nodes: BTreeMap<NodeName, NodeState>,
    queue: Queue,
    last_session: u64,
}

#[derive(Default)]
struct NodeState {
    reports: NodeReports,
    session: Option<Session>,
    ended: Moment,
}

struct Session {
    id: u64,
    claim: Arc<dyn Fresh>,
    /// Not yet fetched; at most one for each object held or refused.
    acks: BTreeMap<ObjectKey, u64>,
    wake: Arc<Notify>,
}

/// What a flight works on: the report as it is now, and whose session it is.
pub(super) struct Sitting {
    pub(super) held: Held,
    pub(super) claim: Arc<dyn Fresh>,
    session: u64,
}

impl Shared {
    pub(super) fn new(deps: super::Deps, queue: Queue, aside: usize) -> Self {
        Self {
            writer: deps.writer,
            pods: deps.pods,
            nodes: deps.nodes,
            endpoints: deps.endpoints,
            wake: Notify::new(),
            aside: Semaphore::new(aside),
            clock: deps.clock,
            started: Instant::now(),
            state: Mutex::new(State {
                nodes: BTreeMap::new(),
                queue,
                last_session: 0,
            }),
            counters: Default::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn now(&self) -> Timestamp {
        (self.clock)()
    }

    pub(super) fn moment(&self) -> Moment {
        self.started.elapsed()
    }

    pub(super) fn count(&self, counter: Counter) {
        self.counters[counter as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn metrics(&self) -> Metrics {
        let of = |counter: Counter| self.counters[counter as usize].load(Ordering::Relaxed);
        let state = self.state();
        let (waiting, in_flight) = (state.queue.len() as u64, state.queue.in_flight() as u64);
        drop(state);
        Metrics {
            reports: of(Counter::Reports),
            coalesced: of(Counter::Coalesced),
            patches: of(Counter::Patches),
            deletes: of(Counter::Deletes),
            conflicts: of(Counter::Conflicts),
            retries: of(Counter::Retries),
            gone: of(Counter::Gone),
            refused: of(Counter::Refused),
            not_fresh: of(Counter::NotFresh),
            events_written: of(Counter::EventsWritten),
            events_dropped: of(Counter::EventsDropped),
            tokens_given: of(Counter::TokensGiven),
            tokens_refused: of(Counter::TokensRefused),
            waiting,
            in_flight,
        }
    }

    // ---- Sessions ----

    /// A session begins: it replaces another of the same node, and everything held is compared.
    pub(super) fn begin(&self, node: &NodeName, claim: Arc<dyn Fresh>) -> (u64, Arc<Notify>) {
        let wake = Arc::new(Notify::new());
        let mut state = self.state();
        state.last_session += 1;
        let id = state.last_session;
        state.queue.clear(node);
        let session = Session {
            id,
            claim,
            acks: BTreeMap::new(),
            wake: wake.clone(),
        };
        state.nodes.entry(node.clone()).or_default().session = Some(session);
        drop(state);
        self.changed(node, true);
        (id, wake)
    }

    /// A session ends: what it had not written is abandoned, its reports stay for a while.
    pub(super) fn end(&self, node: &NodeName, session: u64) {
        let now = self.moment();
        let mut state = self.state();
        let state = &mut *state;
        if let Some(of_node) = state.nodes.get_mut(node).filter(|n| n.is(session)) {
            of_node.session = None;
            of_node.ended = now;
            state.queue.clear(node);
        }
    }

    /// Forgets the reports of nodes that have been away for too long, and looks again at what is
    /// not acknowledged: a wake-up that was missed costs a minute, never correctness.
    pub(super) fn sweep(&self) {
        let oldest = self.moment().saturating_sub(KEPT_FOR);
        let mut state = self.state();
        let state = &mut *state;
        let ended = state.nodes.iter().filter(|(_, n)| n.session.is_none());
        let ended = ended.map(|(node, n)| (node.clone(), n.ended));
        for node in to_forget(ended, oldest, KEPT_NODES) {
            state.nodes.remove(&node);
        }
        for (node, of_node) in state.nodes.iter().filter(|(_, n)| n.session.is_some()) {
            for (key, _) in of_node.reports.held.iter().filter(|(_, h)| !h.acknowledged) {
                state.queue.mark(node, key);
            }
        }
        self.wake.notify_one();
    }

    /// Something of this node changed in the API: what the watch shows at another resourceVersion
    /// than the one compared last is compared. `all`: everything, whatever the watch shows.
    pub(super) fn changed(&self, node: &NodeName, all: bool) {
        let compared: Vec<_> = self.reports(node, |reports| {
            let compared = |h: &Held| h.compared.map(|(revision, _)| revision);
            reports
                .held
                .iter()
                .map(|(k, h)| (k.clone(), compared(h)))
                .collect()
        });
        // The views have locks of their own: never asked under ours.
        let differing: Vec<ObjectKey> = compared
            .into_iter()
            .filter(|(key, revision)| {
                let seen = self.seen(node, key);
                all || revision.is_none() || seen.is_none() || seen != *revision
            })
            .map(|(key, _)| key)
            .collect();
        let mut state = self.state();
        let state = &mut *state;
        if state.nodes.get(node).is_none_or(|n| n.session.is_none()) {
            return;
        }
        for key in &differing {
            if !state.queue.mark(node, key) {
                self.count(Counter::Coalesced);
            }
        }
        self.wake.notify_one();
    }

    /// The resourceVersion at which the watch shows an object.
    fn seen(&self, node: &NodeName, key: &ObjectKey) -> Option<u64> {
        match key.kind {
            Kind::Node => self.nodes.node(node).map(|n| n.resource_version),
            Kind::Pod | Kind::ConfigMap | Kind::Secret | Kind::Services | Kind::Unknown(_) => {
                self.pods.pod(&key.uid).map(|p| p.resource_version)
            }
        }
    }

    /// The nodes that have a session.
    pub(super) fn present(&self) -> Vec<NodeName> {
        let state = self.state();
        let present = state.nodes.iter().filter(|(_, n)| n.session.is_some());
        present.map(|(node, _)| node.clone()).collect()
    }

    // ---- Reports ----

    pub(super) fn accept(
        &self,
        node: &NodeName,
        session: u64,
        key: &ObjectKey,
        report: (u64, Arc<[u8]>, bool),
    ) -> Result<(), ReportError> {
        let (sequence, status, gone) = report;
        let mut state = self.state();
        let state = &mut *state;
        let of_node = state.nodes.get_mut(node).filter(|n| n.is(session));
        let of_node = of_node.ok_or(ReportError::Ended)?;
        of_node.reports.accept(key, sequence, status, gone)?;
        self.count(Counter::Reports);
        if !state.queue.mark(node, key) {
            self.count(Counter::Coalesced);
        }
        self.wake.notify_one();
        Ok(())
    }

    /// What a look at this node's reports gives, also when the session is another's by now.
    pub(super) fn reports<T>(&self, node: &NodeName, look: impl FnOnce(&NodeReports) -> T) -> T {
        match self.state().nodes.get(node) {
            Some(of_node) => look(&of_node.reports),
            None => look(&NodeReports::default()),
        }
    }

    pub(super) fn forget(&self, node: &NodeName, session: u64) {
        let mut state = self.state();
        let state = &mut *state;
        if let Some(of_node) = state.nodes.get_mut(node).filter(|n| n.is(session)) {
            of_node.reports.clear();
            state.queue.clear(node);
        }
    }

    /// The acknowledgements not yet fetched; `None` when the session is over.
    pub(super) fn acks(&self, node: &NodeName, session: u64) -> Option<BTreeMap<ObjectKey, u64>> {
        let mut state = self.state();
        let of_node = state.nodes.get_mut(node)?;
        let session = of_node.session.as_mut().filter(|s| s.id == session)?;
        Some(std::mem::take(&mut session.acks))
    }

    pub(super) fn is_current(&self, node: &NodeName, session: u64) -> bool {
        self.state().nodes.get(node).is_some_and(|n| n.is(session))
    }

    // ---- Flights ----

    pub(super) fn take(&self) -> Option<Taken> {
        let now = self.moment();
        let mut state = self.state();
        let State { nodes, queue, .. } = &mut *state;
        let claim = |node: &NodeName| nodes.get(node)?.session.as_ref().map(|s| &s.claim);
        queue.take(now, |node| {
            let fresh = claim(node).is_some_and(|c| c.fresh());
            if !fresh {
                self.count(Counter::NotFresh);
            }
            fresh
        })
    }

    pub(super) fn done(&self, taken: &Taken, verdict: Verdict) {
        let now = self.moment();
        self.state().queue.done(taken, verdict, now);
        self.wake.notify_one();
    }

    pub(super) fn next_due(&self) -> Option<Instant> {
        Some(self.started + self.state().queue.next_due()?)
    }

    /// The report as it is now; `None` when there is no session or no report any more.
    ///
    /// What a write returned counts until the watch has caught up with it, and only within its own
    /// flight when the watch does not know the object: it may have been deleted since.
    pub(super) fn sitting(&self, taken: &Taken, first: bool) -> Option<Sitting> {
        let seen = self.seen(&taken.node, &taken.key);
        let mut state = self.state();
        let of_node = state.nodes.get_mut(&taken.node)?;
        let session = of_node.session.as_ref()?;
        let held = of_node.reports.held.get_mut(&taken.key)?;
        let returned = held.returned.as_ref().map_or(0, |r| r.resource_version);
        if seen.map_or(first, |seen| seen >= returned) {
            held.returned = None;
        }
        Some(Sitting {
            held: Held::clone(held),
            claim: session.claim.clone(),
            session: session.id,
        })
    }

    /// Notes something about the object, if the session is still the one of the flight.
    pub(super) fn held(&self, taken: &Taken, sitting: &Sitting, note: impl FnOnce(&mut Held)) {
        let mut state = self.state();
        let of_node = state
            .nodes
            .get_mut(&taken.node)
            .filter(|n| n.is(sitting.session));
        if let Some(held) = of_node.and_then(|n| n.reports.held.get_mut(&taken.key)) {
            note(held);
        }
    }

    /// The API server holds what the report of this sitting says.
    pub(super) fn settled(&self, taken: &Taken, sitting: &Sitting, finished: bool, revision: u64) {
        if finished {
            return self.finished(taken, sitting);
        }
        let sequence = sitting.held.sequence;
        let mut acknowledge = false;
        self.held(taken, sitting, |held| {
            if held.sequence == sequence {
                held.compared = Some((revision, sequence));
                // What has left nothing on the device is acknowledged when its API object goes.
                acknowledge = !held.gone && !held.acknowledged;
                held.acknowledged |= acknowledge;
            }
        });
        if acknowledge {
            self.acknowledge(taken, sitting);
        }
    }

    /// Nothing will follow for the object: its report goes, unless there is a later one.
    pub(super) fn finished(&self, taken: &Taken, sitting: &Sitting) {
        let mut state = self.state();
        let of_node = state
            .nodes
            .get_mut(&taken.node)
            .filter(|n| n.is(sitting.session));
        if let Some(of_node) = of_node {
            let held = of_node.reports.held.get(&taken.key);
            if held.is_some_and(|h| h.sequence == sitting.held.sequence) {
                of_node.reports.remove(&taken.key);
            }
        }
        drop(state);
        self.acknowledge(taken, sitting);
    }

    fn acknowledge(&self, taken: &Taken, sitting: &Sitting) {
        let mut state = self.state();
        let of_node = state.nodes.get_mut(&taken.node);
        let session = of_node.and_then(|n| n.session.as_mut());
        if let Some(session) = session.filter(|s| s.id == sitting.session) {
            session
                .acks
                .insert(taken.key.clone(), sitting.held.sequence);
            session.wake.notify_one();
        }
    }

    /// Takes an answer's word on how the API server is.
    pub(super) fn paced(&self, error: Option<Retry>) {
        let mut state = self.state();
        match error {
            Some(Retry::SlowDown { .. }) => state.queue.slow_down(),
            Some(Retry::Reread | Retry::Later | Retry::Never) | None => state.queue.speed_up(),
        }
    }
}

impl NodeState {
    fn is(&self, session: u64) -> bool {
        self.session.as_ref().is_some_and(|s| s.id == session)
    }
}
