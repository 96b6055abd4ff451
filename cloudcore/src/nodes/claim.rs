//! One holder a node: a session is claimed and fenced through the node's Lease.
//!
//! - Owns: the Leases in `kube-node-lease` of the nodes whose sessions are here.
//! - Takes: a node's name when its session begins.
//! - Gives: a [`Claim`] that says whether it still holds, and renews the Lease while it lives.
//! - Never: gives an epoch twice; counts a silent API server as a lost claim.
//!
//! `leaseTransitions` is the session epoch, an annotation names the replica and session; the
//! `holderIdentity` stays the node's name, as Kubernetes expects. The newest claim wins: it swaps
//! the Lease by its resourceVersion, and the older one finds that out at its next renewal or write.
//! While the API server is away nobody else can claim either, so a claim is then merely not fresh.
//!
//! ```text
//!   claim ─► live ──renewal──► live ──another session in the Lease──► lost
//!                  └ 15 s without one: not fresh (no status is written) ─► live again
//! ```

mod lease;

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use kube::Client;
use kube::api::PostParams;
use kube::core::params::GetParams;
use kube::core::request;
use rand::Rng;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use common::ids::NodeName;

use crate::enroll::record;
use crate::kube::{Fault, KubeClients, KubeError, is_absent, is_conflict};
use crate::nodes;

use lease::next_epoch;
pub use lease::{Held, NAMESPACE};

const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases";

const RENEW_EVERY: Duration = Duration::from_secs(10);
/// After this long without a renewal no status is written: the others count a Lease as lapsed only
/// after 40 s, and a write that is on its way then has 25 s to arrive.
const FRESH: Duration = Duration::from_secs(15);
const RETRY: Duration = Duration::from_secs(2);
/// Renewals at once: 32 in 10 ms each renew 30,000 nodes in 10 s.
const AT_ONCE: usize = 32;
/// Each lost swap means that another session claimed the node in between.
const TRIES: usize = 8;
/// Epochs that one write of the enrolment record covers.
const RESERVE: i32 = 64;

/// Why a node was not claimed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    #[error("{0} is not enrolled")]
    NotEnrolled(NodeName),
    #[error("{0} was claimed by another session {TRIES} times in a row")]
    Contended(NodeName),
    #[error("the Lease of {0} was not claimed")]
    Lease(NodeName, #[source] Fault),
    #[error("{0} was not claimed")]
    Kube(NodeName, #[source] KubeError),
}

struct Live {
    node: NodeName,
    session: String,
    epoch: i32,
    acquired: Timestamp,
    lost: CancellationToken,
    moving: Mutex<Moving>,
}

/// What of a claim moves.
struct Moving {
    revision: Option<String>,
    renewed: Instant,
    /// When it is renewed next; `None` while it is being renewed.
    due: Option<Instant>,
    /// The Node was made again while a renewal was under way: once more at once.
    again: bool,
}

impl Live {
    fn moving(&self) -> MutexGuard<'_, Moving> {
        self.moving.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Default)]
struct Table {
    live: HashMap<NodeName, Arc<Live>>,
    queue: BTreeSet<(Instant, NodeName)>,
}

struct Inner {
    client: Client,
    replica: String,
    table: Mutex<Table>,
    owners: Mutex<HashMap<NodeName, String>>,
    wake: Notify,
}

/// Claims nodes for sessions. Cheap to clone.
#[derive(Clone)]
pub struct Claims {
    inner: Arc<Inner>,
}

/// Renews all live claims.
pub struct ClaimsTask {
    inner: Arc<Inner>,
}

/// The right to speak for a node, for as long as it is neither lost nor dropped.
pub struct Claim {
    live: Arc<Live>,
    inner: Arc<Inner>,
}

impl Claim {
    pub fn node(&self) -> &NodeName {
        &self.live.node
    }

    /// Grows with each session of the node, whichever replica has it.
    pub fn epoch(&self) -> u64 {
        u64::try_from(self.live.epoch).unwrap_or(0)
    }

    /// Cancelled when another session has the node: this one ends.
    pub fn lost(&self) -> CancellationToken {
        self.live.lost.clone()
    }

    /// Whether the last renewal is recent enough to write for the node.
    pub fn fresh(&self) -> bool {
        !self.live.lost.is_cancelled() && self.live.moving().renewed.elapsed() < FRESH
    }

    /// A write was refused because somebody else wrote: the Lease is asked at once who holds the
    /// node, instead of at the next renewal.
    pub fn doubt(&self) {
        self.inner.hurry(&self.live.node);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.inner.forget(&self.live);
    }
}

impl Claims {
    /// `client` is [`KubeClients::own`]; `replica` names this CloudCore among its peers.
    pub fn build(client: Client, replica: String) -> (Self, ClaimsTask) {
        let inner = Arc::new(Inner {
            client,
            replica,
            table: Mutex::default(),
            owners: Mutex::default(),
            wake: Notify::new(),
        });
        let task = ClaimsTask {
            inner: inner.clone(),
        };
        (Self { inner }, task)
    }

    /// Takes the node for a new session, from whoever holds it.
    pub async fn claim(&self, node: &NodeName) -> Result<Claim, ClaimError> {
        let number: u64 = rand::rng().random();
        let session = format!("{}/{number:016x}", self.inner.replica);
        for _ in 0..TRIES {
            let started = Instant::now();
            let (present, epoch) = self.inner.next(node).await?;
            let acquired = Timestamp::now();
            let lease = self.inner.lease(node, &session, epoch, acquired).await?;
            match self.inner.write(node, lease, present.as_deref()).await {
                Ok(revision) => {
                    let live = Live {
                        node: node.clone(),
                        session,
                        epoch,
                        acquired,
                        lost: CancellationToken::new(),
                        moving: Mutex::new(Moving {
                            revision,
                            renewed: started,
                            due: None,
                            again: false,
                        }),
                    };
                    return Ok(self.inner.admit(live));
                }
                Err(e) if is_conflict(&e) || is_absent(&e) => {}
                Err(e) => return Err(ClaimError::Lease(node.clone(), Fault(e))),
            }
        }
        Err(ClaimError::Contended(node.clone()))
    }

    /// The Node was made (again): its Lease follows it at once.
    pub(crate) fn owner(&self, node: &NodeName, uid: &str) {
        let mut owners = self.inner.owners();
        let before = owners.insert(node.clone(), uid.to_string());
        drop(owners);
        if before.as_deref() != Some(uid) {
            self.inner.hurry(node);
        }
    }

    /// The Node is gone.
    pub(crate) fn no_owner(&self, node: &NodeName) {
        self.inner.owners().remove(node);
    }
}

impl Inner {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn owners(&self) -> MutexGuard<'_, HashMap<NodeName, String>> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The revision of the present Lease and the epoch to claim, covered by the record's floor.
    async fn next(&self, node: &NodeName) -> Result<(Option<String>, i32), ClaimError> {
        let present = self
            .read(node)
            .await
            .map_err(|e| ClaimError::Lease(node.clone(), Fault(e)))?;
        let held = present
            .as_ref()
            .and_then(|l| Held::read(l, Timestamp::now()));
        let mut epoch = 0;
        let covered = record::change(&self.client, node, |spec| {
            epoch = next_epoch(held.as_ref(), spec.session_epoch_floor);
            let short = epoch > spec.session_epoch_floor;
            if short {
                spec.session_epoch_floor = epoch.saturating_add(RESERVE - 1);
            }
            short
        });
        let covered = covered
            .await
            .map_err(|e| ClaimError::Kube(node.clone(), e))?;
        if !covered.is_some_and(|record| record.spec.is_active()) {
            return Err(ClaimError::NotEnrolled(node.clone()));
        }
        Ok((present.and_then(|l| l.metadata.resource_version), epoch))
    }

    async fn lease(
        &self,
        node: &NodeName,
        session: &str,
        epoch: i32,
        acquired: Timestamp,
    ) -> Result<Lease, ClaimError> {
        let known = self.owners().get(node).cloned();
        let uid = match known {
            Some(uid) => Some(uid),
            None => nodes::find(&self.client, node)
                .await
                .map_err(|e| ClaimError::Kube(node.clone(), e))?
                .and_then(|found| found.metadata.uid),
        };
        let times = (acquired, Timestamp::now());
        Ok(lease::build(node, session, epoch, times, uid))
    }

    fn admit(self: &Arc<Self>, live: Live) -> Claim {
        let live = Arc::new(live);
        let mut table = self.table();
        if let Some(older) = table.live.insert(live.node.clone(), live.clone()) {
            unqueue(&mut table, &older);
            older.lost.cancel();
        }
        // Sessions that begin together, after a restart, are renewed apart.
        let first = rand::rng().random_range(RENEW_EVERY / 2..RENEW_EVERY);
        enqueue(&mut table, &live, Instant::now() + first);
        drop(table);
        self.wake.notify_one();
        Claim {
            live,
            inner: self.clone(),
        }
    }

    fn forget(&self, live: &Arc<Live>) {
        let mut table = self.table();
        if table
            .live
            .get(&live.node)
            .is_some_and(|held| Arc::ptr_eq(held, live))
        {
            table.live.remove(&live.node);
            unqueue(&mut table, live);
        }
    }

    fn hurry(&self, node: &NodeName) {
        let mut table = self.table();
        let Some(live) = table.live.get(node).cloned() else {
            return;
        };
        if live.moving().due.is_some() {
            unqueue(&mut table, &live);
            enqueue(&mut table, &live, Instant::now());
            drop(table);
            self.wake.notify_one();
        } else {
            live.moving().again = true;
        }
    }

    /// The next claim whose renewal is due, taken from the queue; or when the next one is.
    fn take_due(&self) -> Result<Arc<Live>, Option<Instant>> {
        let mut table = self.table();
        match table.queue.first() {
            Some((due, _)) if *due > Instant::now() => Err(Some(*due)),
            Some((_, node)) => {
                let live = table.live.get(node).cloned();
                let live = live.expect("only live claims are queued");
                unqueue(&mut table, &live);
                Ok(live)
            }
            None => Err(None),
        }
    }

    async fn renew(&self, live: Arc<Live>) {
        let wait = match self.try_renew(&live).await {
            Ok(true) => RENEW_EVERY.mul_f64(rand::rng().random_range(0.9..1.0)),
            Ok(false) => {
                tracing::info!(node = %live.node, epoch = live.epoch, "another session has the node");
                live.lost.cancel();
                self.forget(&live);
                return;
            }
            Err(error) => {
                tracing::warn!(node = %live.node, error = %crate::chain(&error), "the node's Lease was not renewed");
                RETRY
            }
        };
        let mut table = self.table();
        if table
            .live
            .get(&live.node)
            .is_some_and(|held| Arc::ptr_eq(held, &live))
        {
            let again = std::mem::take(&mut live.moving().again);
            let wait = if again { Duration::ZERO } else { wait };
            enqueue(&mut table, &live, Instant::now() + wait);
        }
    }

    /// True when renewed, false when another session is in the Lease.
    async fn try_renew(&self, live: &Live) -> Result<bool, ClaimError> {
        for _ in 0..TRIES {
            let started = Instant::now();
            let lease = self
                .lease(&live.node, &live.session, live.epoch, live.acquired)
                .await?;
            let revision = live.moving().revision.clone();
            match self.write(&live.node, lease, revision.as_deref()).await {
                Ok(revision) => {
                    let mut moving = live.moving();
                    moving.revision = revision;
                    moving.renewed = started;
                    return Ok(true);
                }
                Err(e) if is_conflict(&e) || is_absent(&e) => {}
                Err(e) => return Err(ClaimError::Lease(live.node.clone(), Fault(e))),
            }
            let present = self.read(&live.node).await;
            let present = present.map_err(|e| ClaimError::Lease(live.node.clone(), Fault(e)))?;
            if let Some(held) = present
                .as_ref()
                .and_then(|l| Held::read(l, Timestamp::now()))
                && held.session != live.session
            {
                return Ok(false);
            }
            // Gone (the garbage collector), or touched by somebody who claims nothing.
            live.moving().revision = present.and_then(|l| l.metadata.resource_version);
        }
        Err(ClaimError::Contended(live.node.clone()))
    }

    async fn read(&self, node: &NodeName) -> Result<Option<Lease>, kube::Error> {
        let request = request::Request::new(LEASES).get(node.as_str(), &GetParams::default());
        match self.send(node, request).await {
            Ok(lease) => Ok(Some(lease)),
            Err(e) if is_absent(&e) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Writes over the given revision, or creates; gives the new revision.
    async fn write(
        &self,
        node: &NodeName,
        mut lease: Lease,
        over: Option<&str>,
    ) -> Result<Option<String>, kube::Error> {
        lease.metadata.resource_version = over.map(str::to_string);
        let body = serde_json::to_vec(&lease).map_err(kube::Error::SerdeError)?;
        let (target, params) = (request::Request::new(LEASES), PostParams::default());
        let request = match over {
            Some(_) => target.replace(node.as_str(), &params, body),
            None => target.create(&params, body),
        };
        Ok(self.send(node, request).await?.metadata.resource_version)
    }

    async fn send(
        &self,
        node: &NodeName,
        request: Result<http::Request<Vec<u8>>, request::Error>,
    ) -> Result<Lease, kube::Error> {
        let mut request = request.map_err(kube::Error::BuildRequest)?;
        KubeClients::mark_as_node(&mut request, node);
        self.client.request(request).await
    }
}

fn enqueue(table: &mut Table, live: &Live, due: Instant) {
    live.moving().due = Some(due);
    table.queue.insert((due, live.node.clone()));
}

fn unqueue(table: &mut Table, live: &Live) {
    if let Some(due) = live.moving().due.take() {
        table.queue.remove(&(due, live.node.clone()));
    }
}

impl ClaimsTask {
    /// Ends with the token. The Leases then lapse by themselves, or another replica claims them.
    pub async fn run(self, shutdown: CancellationToken) {
        let inner = self.inner;
        let mut running = FuturesUnordered::new();
        loop {
            let mut next = None;
            while running.len() < AT_ONCE {
                match inner.take_due() {
                    Ok(live) => running.push(inner.renew(live)),
                    Err(due) => {
                        next = due;
                        break;
                    }
                }
            }
            let due = async {
                match next {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                Some(()) = running.next() => {}
                () = inner.wake.notified() => {}
                () = due => {}
            }
        }
    }
}

#[cfg(test)]
mod tests;
