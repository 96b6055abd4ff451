//! One edge's session: an actor that owns the connection, the claim on the node and the protocol's
//! state machine.
//!
//! ```text
//! admit (enrolled? not revoked?) -> lanes -> Hello -> claim the Lease -> Welcome -> serve -> end
//! ```
//!
//! It ends when the link does, when its claim is lost, when a newer session of the node takes
//! over, when the enrolment is ended, and when CloudCore drains.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use common::hub::lanes::{LaneError, Lanes};
use common::hub::proto::{self, GoAwayReason};
use common::hub::session::cloud::{CloudEvent, CloudSession};
use common::hub::session::{Marks, ProtocolError, behind};
use common::hub::transport::Connection;
use common::ids::{Kind, NodeName, ObjectKey};
use common::pki::NodeIdentity;
use common::telemetry::chain;
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::registry::{Ending, SessionEntry};
use super::view::SessionView;
use super::{Answer, HubDeps};
use crate::downstream::{NodeFeed, NodeSnapshot};
use crate::enroll::cache::NotAllowed;
use crate::enroll::record::Enrolment;
use crate::nodes::claim::Claim;
use crate::upstream::NodeUpstream;

/// From the connection to a Hello.
const HELLO: Duration = Duration::from_secs(15);

/// From the Hello to a committed Welcome: an edge with a slow disk commits within seconds. One that
/// never does would hold the node's Lease, and its Node would look Ready.
const LIVE_WITHIN: Duration = Duration::from_secs(60);

/// Before an edge that could not be judged dials again.
const JUDGE_AGAIN_MS: u32 = 2_000;

/// After an edge said that its disk is full.
const COMMIT_AGAIN: Duration = Duration::from_secs(15);

/// When the API server cannot list, the next try.
const LIST_AGAIN: Duration = Duration::from_secs(2);

/// Requests and Events of one session that are being answered. An edge that asks for more waits.
const ANSWERING: usize = 64;

/// A drained edge dials again somewhere within this, so that not all come at once.
const DRAIN_SPREAD_MS: u32 = 3_000;

/// Why a session was not begun or has ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error("the certificate does not name a node")]
    Identity(#[from] common::pki::PkiError),
    #[error("the node may not have a session")]
    NotAllowed(#[from] NotAllowed),
    #[error("the link failed")]
    Lanes(#[from] LaneError),
    #[error("the edge broke the protocol")]
    Protocol(#[from] ProtocolError),
    #[error("the node could not be claimed")]
    Claim(#[from] crate::nodes::claim::ClaimError),
    #[error("no Hello within {} s", HELLO.as_secs())]
    NoHello,
    #[error("the edge did not commit its Welcome within {} s", LIVE_WITHIN.as_secs())]
    NotLive,
    #[error("newer connections of the same device have taken its place")]
    Overtaken,
    #[error("the edge says again and again that it has seen more than the cluster ever held")]
    Marks,
    #[error("the session was ended: {0}")]
    Ended(String),
}

/// Runs one session to its end.
pub async fn serve(
    connection: Connection,
    deps: Arc<HubDeps>,
    shutdown: CancellationToken,
) -> Result<(), SessionError> {
    let certificate = connection.peer_certificates().first().map(|c| c.to_vec());
    let identity = NodeIdentity::from_certificate(&certificate.unwrap_or_default())?;
    let span = tracing::info_span!("session", node = %identity.node);
    let result = tracing::Instrument::instrument(
        admitted(&connection, &identity, &deps, shutdown),
        span.clone(),
    )
    .await;
    let _in = span.enter();
    match &result {
        Ok(()) => connection.close(0, "drained"),
        Err(SessionError::NotAllowed(_) | SessionError::Overtaken) => connection.close(1, "ended"),
        Err(error) => {
            info!(reason = %chain(error), "the session ended");
            connection.close(1, "ended");
        }
    }
    result
}

async fn admitted(
    connection: &Connection,
    identity: &NodeIdentity,
    deps: &Arc<HubDeps>,
    shutdown: CancellationToken,
) -> Result<(), SessionError> {
    let arrival = deps.registry.arrive(identity.key_id);
    // Boxed, as is what else a session goes through once: the rest of its life is much smaller.
    let (mut lanes, enrolment) = tokio::select! {
        biased;
        () = arrival.overtaken().cancelled() => return Err(SessionError::Overtaken),
        arrived = Box::pin(arrived(connection, identity, deps)) => arrived?,
    };
    let entry = deps
        .registry
        .enter(identity.node.clone(), connection.clone(), now_ms());
    drop(arrival);
    // With one key there is none that ends by this session.
    let rotates = enrolment.spec.keys.len() > 1;
    let result = begun(&mut lanes, identity, rotates, deps, &entry, shutdown).await;
    deps.registry.leave(&entry);
    result
}

/// Opens the lanes, waits for the device's turn and asks whether it may come in.
async fn arrived(
    connection: &Connection,
    identity: &NodeIdentity,
    deps: &HubDeps,
) -> Result<(Lanes, Arc<Enrolment>), SessionError> {
    let lanes = Lanes::accept(connection).await?;
    while let Err(wait) = deps.paces.sessions.take(identity.key_id, Instant::now()) {
        debug!(?wait, "too many sessions of this device; this one waits");
        tokio::time::sleep(wait).await;
    }
    let refusal = match deps.enrolments.allowed(identity).await {
        Ok(enrolment) => return Ok((lanes, enrolment)),
        Err(refusal) => refusal,
    };
    let peer = connection.remote_address();
    if deps
        .paces
        .refusals
        .take(identity.key_id, Instant::now())
        .is_ok()
    {
        warn!(%peer, refusal = %chain(&refusal), "refused a session");
    } else {
        debug!(%peer, refusal = %chain(&refusal), "refused a session");
    }
    say_goodbye(&lanes, refused(&refusal)).await;
    Err(refusal.into())
}

/// What a device is told that may not come in. Only what is known for sure makes it wait for long.
fn refused(refusal: &NotAllowed) -> proto::GoAway {
    let mut go = proto::GoAway {
        message: refusal.to_string(),
        ..Default::default()
    };
    match refusal {
        NotAllowed::OtherCluster { .. }
        | NotAllowed::NotEnrolled(_)
        | NotAllowed::Revoked(_)
        | NotAllowed::OtherKey(_) => go.set_reason(GoAwayReason::GoAwayRevoked),
        NotAllowed::Unavailable(..) => go.retry_after_ms = JUDGE_AGAIN_MS,
    }
    go
}

async fn begun(
    lanes: &mut Lanes,
    identity: &NodeIdentity,
    rotates: bool,
    deps: &Arc<HubDeps>,
    entry: &Arc<SessionEntry>,
    shutdown: CancellationToken,
) -> Result<(), SessionError> {
    let mut ending = entry.ending();
    let (hello, claim) = tokio::select! {
        biased;
        Ending { reason, message } = told(&mut ending) => {
            say_goodbye(lanes, go_away(reason, message.clone())).await;
            return Err(SessionError::Ended(message));
        }
        greeted = Box::pin(greeted(lanes, &identity.node, deps)) => greeted?,
    };
    let claim = Arc::new(claim);
    entry.epoch.store(claim.epoch(), Ordering::Relaxed);
    if rotates && let Err(error) = Box::pin(deps.enroller.first_session(identity)).await {
        // The older key stays valid a little longer.
        warn!(error = %chain(&error), "the first session of a certificate was not recorded");
    }
    let upstream = deps.upstream.node(identity.node.clone(), claim.clone());
    let feed = deps.downstream.feed(&identity.node);
    let mut actor = Actor {
        node: identity.node.clone(),
        snapshot: feed.snapshot(),
        feed,
        epoch: *deps.epoch.borrow(),
        incarnation: [0; 16],
        session: CloudSession::default(),
        lanes,
        upstream,
        claim,
        answers: FuturesUnordered::new(),
        entry,
        deps,
        retry: None,
        live_by: Some(Instant::now() + LIVE_WITHIN),
    };
    actor.handle(*hello)?;
    actor.run(shutdown).await
}

/// The Hello, and the claim on the node: nothing is written for whoever says something else.
async fn greeted(
    lanes: &mut Lanes,
    node: &NodeName,
    deps: &HubDeps,
) -> Result<(Box<proto::Message>, Claim), SessionError> {
    let (lane, hello) = tokio::time::timeout(HELLO, lanes.recv())
        .await
        .map_err(|_| SessionError::NoHello)??;
    debug!(?lane, "greeted");
    if !matches!(hello.body, Some(proto::message::Body::Hello(_))) {
        let instead = ProtocolError::OutOfPlace("something else", "waiting for a Hello");
        return Err(instead.into());
    }
    let claim = deps.claims.claim(node).await?;
    Ok((hello, claim))
}

struct Actor<'a> {
    node: NodeName,
    feed: NodeFeed,
    snapshot: NodeSnapshot,
    epoch: [u8; 16],
    incarnation: [u8; 16],
    session: CloudSession,
    lanes: &'a mut Lanes,
    upstream: NodeUpstream,
    claim: Arc<Claim>,
    answers: FuturesUnordered<Answer>,
    entry: &'a Arc<SessionEntry>,
    deps: &'a Arc<HubDeps>,
    /// When an edge or the API server could not, the next try.
    retry: Option<Instant>,
    /// Until the edge has committed its Welcome: when that takes too long.
    live_by: Option<Instant>,
}

/// What a finished answer brings.
pub enum Answered {
    Events(u64),
    Response(Box<proto::Response>),
    Listed {
        committed: Marks,
        marks: Option<Marks>,
        epoch: [u8; 16],
    },
    /// The node's word alone begins no further cluster epoch.
    NotBelieved,
}

impl Actor<'_> {
    async fn run(&mut self, shutdown: CancellationToken) -> Result<(), SessionError> {
        let mut ending = self.entry.ending();
        let lost = self.claim.lost();
        loop {
            self.flush()?;
            tokio::select! {
                biased;
                () = shutdown.cancelled() => {
                    let spread = rand::random::<u32>() % DRAIN_SPREAD_MS;
                    self.say(GoAwayReason::GoAwayDraining, "this CloudCore is stopping", spread)
                        .await;
                    return Ok(());
                }
                Ending { reason, message } = told(&mut ending) => {
                    self.say(reason, &message, 0).await;
                    return Err(SessionError::Ended(message));
                }
                () = lost.cancelled() => {
                    let message = "this CloudCore lost its hold of the node's Lease";
                    self.say(GoAwayReason::GoAwayLostClaim, message, 0).await;
                    return Err(SessionError::Ended(message.to_owned()));
                }
                received = self.lanes.recv(), if self.answers.len() < ANSWERING => {
                    let (_, message) = received?;
                    self.handle(*message)?;
                }
                Some(answered) = self.answers.next(), if !self.answers.is_empty() => {
                    self.answered(answered)?;
                }
                acked = self.upstream.acked() => {
                    let acks = acked.into_iter().map(|a| (a.key, a.sequence, false));
                    self.session.ack_reports(acks);
                }
                () = self.feed.changed() => {
                    self.snapshot = self.feed.snapshot();
                    self.with_view(|session, view| session.pump(view));
                }
                () = at(self.live_by) => return Err(SessionError::NotLive),
                () = at(self.retry) => {
                    self.retry = None;
                    self.snapshot = self.feed.snapshot();
                    self.with_view(|session, view| session.resume(view));
                }
            }
        }
    }

    fn with_view<R>(&mut self, act: impl FnOnce(&mut CloudSession, &SessionView<'_>) -> R) -> R {
        let view = SessionView {
            snapshot: &self.snapshot,
            epoch: self.epoch,
            upstream: &self.upstream,
            incarnation: self.incarnation,
        };
        act(&mut self.session, &view)
    }

    fn handle(&mut self, message: proto::Message) -> Result<(), ProtocolError> {
        self.with_view(|session, view| session.handle(message, view))
    }

    /// Acts on what the machine says and queues what it wants sent.
    fn flush(&mut self) -> Result<(), LaneError> {
        while let Some(event) = self.session.poll_event() {
            self.act(event);
        }
        while let Some((lane, message)) = self.session.poll_message() {
            self.lanes.send(lane, &message)?;
        }
        self.entry
            .queued_bytes
            .store(self.lanes.queued(), Ordering::Relaxed);
        Ok(())
    }

    fn act(&mut self, event: CloudEvent) {
        match event {
            CloudEvent::Greeted(hello) => {
                let version = &self.entry.agent_version;
                *version
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner) =
                    hello.agent_version.chars().take(64).collect();
                let incarnation = self.session.incarnation();
                if self
                    .deps
                    .registry
                    .is_new_incarnation(&self.node, incarnation)
                {
                    self.upstream.forget();
                }
                self.incarnation = incarnation;
                let welcome = self
                    .deps
                    .welcome(&hello, self.claim.epoch(), self.epoch, now_ms());
                self.session.welcome(welcome);
            }
            CloudEvent::Live => {
                self.live_by = None;
                info!(epoch = self.claim.epoch(), "the session is live");
            }
            CloudEvent::Behind { committed } => self.list_again(committed),
            CloudEvent::EdgeCannotCommit => {
                self.warn("the edge's store cannot commit; its disk may be full");
                self.retry = Some(Instant::now() + COMMIT_AGAIN);
            }
            CloudEvent::Disagreed => {
                self.warn("the edge does not hold what it was sent, again and again");
                self.retry = Some(Instant::now() + COMMIT_AGAIN);
            }
            CloudEvent::TooLarge { key, bytes } => {
                self.warn(&format!("a report of {key} with {bytes} bytes was refused"));
            }
            CloudEvent::InSync => {
                if let Some(bytes) = self.entry.in_sync(now_ms()) {
                    self.deps.registry.resumed(bytes);
                }
            }
            CloudEvent::Report {
                key,
                sequence,
                bytes,
                gone,
            } => {
                self.report(key, sequence, bytes, gone);
            }
            CloudEvent::Events(events) => {
                let (pace, now) = (&self.deps.paces.events, Instant::now());
                let waits = events.iter().map(|_| pace.reserve(self.node.clone(), now));
                let wait = waits.max().unwrap_or_default();
                let done = self.upstream.events(events);
                self.answers.push(Box::pin(async move {
                    tokio::time::sleep(wait).await;
                    Answered::Events(done.await)
                }));
            }
            CloudEvent::Asked(request) => {
                let answer = self.deps.answer(&self.upstream, self.entry, request);
                self.answers.push(answer);
            }
        }
    }

    fn report(&mut self, key: ObjectKey, sequence: u64, bytes: Arc<[u8]>, gone: bool) {
        let taken = match key.kind {
            Kind::Pod => self.upstream.pod_report(&key, sequence, bytes, gone),
            Kind::Node => self.upstream.node_report(sequence, bytes),
            // A kind of a later version.
            Kind::ConfigMap | Kind::Secret | Kind::Services | Kind::Unknown(_) => {
                self.session.ack_reports([(key, sequence, false)]);
                return;
            }
        };
        if let Err(error) = taken {
            // Acknowledged, or it would come again for ever.
            self.warn(&format!("a report was refused: {}", chain(&error)));
            self.session.ack_reports([(key, sequence, false)]);
        }
    }

    /// Warns, but not of everything that a device makes happen in a loop.
    fn warn(&self, what: &str) {
        let pace = &self.deps.paces.warnings;
        if pace.take(self.node.clone(), Instant::now()).is_ok() {
            warn!("{what}");
        }
    }

    fn list_again(&mut self, committed: Marks) {
        debug!(
            ?committed,
            "the edge has seen more than this replica; listing again"
        );
        let (downstream, node) = (self.deps.downstream.clone(), self.node.clone());
        let deps = self.deps.clone();
        let epoch = self.epoch;
        self.answers.push(Box::pin(async move {
            let marks = match downstream.consistent(&node).await {
                Ok(marks) => marks,
                Err(error) => {
                    warn!(error = %chain(&error), "the API server could not be listed");
                    return Answered::Listed {
                        committed,
                        marks: None,
                        epoch,
                    };
                }
            };
            if behind(&marks, &committed).is_none() {
                return Answered::Listed {
                    committed,
                    marks: Some(marks),
                    epoch,
                };
            }
            if deps.paces.epochs.take(node, Instant::now()).is_err() {
                return Answered::NotBelieved;
            }
            match deps.begin_epoch(epoch).await {
                Some(epoch) => Answered::Listed {
                    committed,
                    marks: Some(marks),
                    epoch,
                },
                // Again after a while.
                None => Answered::Listed {
                    committed,
                    marks: None,
                    epoch,
                },
            }
        }));
    }

    fn answered(&mut self, answered: Answered) -> Result<(), SessionError> {
        match answered {
            Answered::NotBelieved => return Err(SessionError::Marks),
            Answered::Events(sequence) => self.session.ack_events(sequence),
            Answered::Response(response) => self.session.respond(*response),
            Answered::Listed {
                committed,
                marks: None,
                ..
            } => {
                let (downstream, node) = (self.deps.downstream.clone(), self.node.clone());
                let epoch = self.epoch;
                self.answers.push(Box::pin(async move {
                    tokio::time::sleep(LIST_AGAIN).await;
                    let marks = downstream.consistent(&node).await.ok();
                    Answered::Listed {
                        committed,
                        marks,
                        epoch,
                    }
                }));
            }
            Answered::Listed {
                marks: Some(_),
                epoch,
                ..
            } => {
                self.epoch = epoch;
                self.snapshot = self.feed.snapshot();
                self.with_view(|session, view| session.listed(view));
            }
        }
        Ok(())
    }

    async fn say(&mut self, reason: GoAwayReason, message: &str, retry_after_ms: u32) {
        let go = proto::GoAway {
            retry_after_ms,
            ..go_away(reason, message.to_owned())
        };
        self.session.go_away(go);
        // A link that cannot take it is closed all the same.
        let _ = self.flush();
        settle().await;
    }
}

/// A moment for the last words to leave before the connection is closed.
async fn settle() {
    tokio::time::sleep(Duration::from_millis(100)).await;
}

fn go_away(reason: GoAwayReason, message: String) -> proto::GoAway {
    proto::GoAway {
        reason: reason.into(),
        message,
        retry_after_ms: 0,
    }
}

async fn say_goodbye(lanes: &Lanes, go: proto::GoAway) {
    let message = proto::Message {
        body: Some(proto::message::Body::GoAway(go)),
    };
    // The peer may be gone already.
    let _ = lanes.send(common::hub::Lane::Control, &message);
    settle().await;
}

/// Waits until somebody asks the session to end; for ever when nobody can any more.
async fn told(ending: &mut watch::Receiver<Option<Ending>>) -> Ending {
    let told = ending
        .wait_for(Option::is_some)
        .await
        .ok()
        .and_then(|e| e.clone());
    match told {
        Some(ending) => ending,
        None => std::future::pending().await,
    }
}

async fn at(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when).await,
        None => std::future::pending().await,
    }
}

pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube::KubeError;

    #[test]
    fn only_who_is_known_to_be_unwanted_is_told_so() {
        let node = || NodeName::parse("a").unwrap();
        let unreadable = KubeError::Malformed {
            what: "an answer".into(),
            why: "it is none".into(),
        };
        for (refusal, reason) in [
            (NotAllowed::NotEnrolled(node()), GoAwayReason::GoAwayRevoked),
            (NotAllowed::Revoked(node()), GoAwayReason::GoAwayRevoked),
            (NotAllowed::OtherKey(node()), GoAwayReason::GoAwayRevoked),
            // An edge that is told that it is unwanted stays away for minutes.
            (
                NotAllowed::Unavailable(node(), unreadable),
                GoAwayReason::GoAwayUnspecified,
            ),
        ] {
            let go = refused(&refusal);
            assert_eq!(go.reason(), reason, "{refusal}");
            assert!(go.message.contains('a'));
        }
    }
}
