//! One session over one connection: the state machine, the store and the lanes put together.
//!
//! Takes: a connection. Gives: how it ended, and whether the cloud proved itself. Commits run on a
//! blocking thread, one at a time; nothing else here blocks.

use std::collections::HashMap;
use std::time::Duration;

use common::hub::lanes::{LaneError, Lanes};
use common::hub::proto;
use common::hub::session::ProtocolError;
use common::hub::session::edge::{Commit, EdgeEvent, EdgeSession, Outcome};
use common::hub::transport::{Connection, Refusal, TransportError};
use common::tasks::beside;
use common::telemetry::chain;
use prost::Message as _;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::identity::{Identity, new_link, time_record};
use super::pace::Deadlines;
use super::state::StoreState;
use super::tokens::Ask;
use crate::store::desired::{Batch, CommitError};
use crate::store::{Store, StoreError};

/// Names of what the welcome leaves in the store.
pub mod kept {
    pub const CONTINUATION: &str = "continuation";
    pub const LINK: &str = "link";
    pub const ENVIRONMENT: &str = "environment";
    /// Milliseconds, as a big-endian u32.
    pub const DEAD_AFTER: &str = "dead-after";
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionEnd {
    #[error("edgecore is stopping")]
    Stopping,
    #[error("the cloud ended the session ({reason:?}): {message}")]
    GoAway {
        reason: proto::GoAwayReason,
        message: String,
        retry_after: Duration,
    },
    #[error("the link failed")]
    Lanes(#[from] LaneError),
    #[error("the cloud broke the protocol")]
    Protocol(#[from] ProtocolError),
    #[error("the store failed")]
    Store(#[from] StoreError),
    #[error("a new certificate is in use from the next session on")]
    Renewed,
    #[error("the cloud's deadline is kept from the next session on")]
    Deadlines,
}

impl SessionEnd {
    /// Whether the cloud found this device's certificate to have run out.
    pub fn expired(&self) -> bool {
        let mut next: Option<&(dyn std::error::Error + 'static)> = Some(self);
        while let Some(error) = next {
            if let Some(TransportError::Refused(refusal)) = error.downcast_ref() {
                return *refusal == Refusal::Expired;
            }
            next = error.source();
        }
        false
    }
}

/// What a session reads and wakes on.
pub struct SessionDeps<'a> {
    pub store: &'a Store,
    pub identity: &'a Identity,
    pub state: StoreState,
    /// What the connection was made with.
    pub deadlines: Deadlines,
    pub asks: &'a mut mpsc::Receiver<Ask>,
    pub connected: &'a watch::Sender<bool>,
    pub environment: &'a watch::Sender<Option<proto::NodeEnvironment>>,
    /// Fires when the certificate should be renewed: the request to send, once.
    pub renewal: &'a mut super::identity::Renewal,
    pub shutdown: &'a CancellationToken,
}

/// Runs until the connection or the process ends. The flag says whether the cloud proved itself:
/// it welcomed us, and what it sent was committed.
pub async fn run(connection: &Connection, deps: SessionDeps<'_>) -> (SessionEnd, bool) {
    let lanes = match Lanes::open(connection).await {
        Ok(lanes) => lanes,
        Err(error) => return (error.into(), false),
    };
    let mut driver = Driver {
        session: EdgeSession::new(&deps.state),
        lanes,
        answers: HashMap::new(),
        renewing: None,
        commit: None,
        proved: false,
        deps,
    };
    let end = driver.run().await;
    driver.deps.connected.send_replace(false);
    let reason = match &end {
        SessionEnd::Stopping => "edgecore stops",
        SessionEnd::Renewed => "new certificate",
        SessionEnd::Deadlines => "new deadlines",
        SessionEnd::GoAway { .. } | SessionEnd::Lanes(_) => "ended",
        SessionEnd::Protocol(_) => "protocol error",
        SessionEnd::Store(_) => "store failed",
    };
    connection.close(0, reason);
    // It goes on by itself: the next Hello must say what it leaves, or what the cloud answers is about
    // a state that is gone.
    if driver.commit.is_some() {
        driver.proved |= matches!(
            finished(&mut driver.commit).await,
            Ok(Outcome::Committed { .. })
        );
    }
    (end, driver.proved)
}

struct Driver<'a> {
    session: EdgeSession,
    lanes: Lanes,
    answers: HashMap<u64, oneshot::Sender<proto::Response>>,
    renewing: Option<u64>,
    commit: Option<JoinHandle<Result<Outcome, StoreError>>>,
    proved: bool,
    deps: SessionDeps<'a>,
}

impl Driver<'_> {
    async fn run(&mut self) -> SessionEnd {
        match self.serve().await {
            Ok(end) | Err(end) => end,
        }
    }

    async fn serve(&mut self) -> Result<SessionEnd, SessionEnd> {
        let mut reports = self.deps.state.reports.changes();
        let mut events = self.deps.state.events.changes();
        loop {
            if let Some(end) = self.flush().await? {
                return Ok(end);
            }
            tokio::select! {
                biased;
                () = self.deps.shutdown.cancelled() => return Ok(SessionEnd::Stopping),
                done = finished(&mut self.commit) => self.committed(done?)?,
                received = self.lanes.recv() => {
                    let (lane, message) = received?;
                    self.session.handle(lane, *message, &self.deps.state)?;
                }
                _ = reports.changed() => self.session.pump(&self.deps.state),
                _ = events.changed() => self.session.pump(&self.deps.state),
                Some(ask) = self.deps.asks.recv(), if self.session.live() => {
                    // A mount that no longer waits for its token has dropped the other end.
                    self.answers.retain(|_, a| !a.is_closed());
                    let id = self.session.request(ask.body);
                    self.answers.insert(id, ask.answer);
                }
                request = self.deps.renewal.due(), if self.session.live() && self.renewing.is_none() => {
                    self.renewing = Some(self.session.request(proto::request::Body::Renew(request)));
                }
            }
        }
    }

    /// Acts on what the machine says and queues what it wants sent.
    async fn flush(&mut self) -> Result<Option<SessionEnd>, SessionEnd> {
        while let Some(event) = self.session.poll_event() {
            match event {
                EdgeEvent::Welcomed(welcome) => {
                    let said = Duration::from_millis(welcome.dead_after_ms.into());
                    self.welcomed(*welcome).await?;
                    if self.deps.deadlines.told(said) != self.deps.deadlines {
                        return Ok(Some(SessionEnd::Deadlines));
                    }
                }
                EdgeEvent::Commit(commit) => self.commit = Some(self.start(commit)),
                EdgeEvent::ReportAcked { key, sequence } => {
                    if key == crate::store::reports::node_key() {
                        self.deps.state.reports.ack_node(sequence);
                    } else {
                        self.deps.state.reports.ack_pod(&key, sequence);
                    }
                }
                EdgeEvent::EventsAcked { sequence } => self.deps.state.events.ack(sequence),
                EdgeEvent::Answered(response) => {
                    if let Some(end) = self.answered(response).await? {
                        return Ok(Some(end));
                    }
                }
                EdgeEvent::GoAway(go) => {
                    return Ok(Some(SessionEnd::GoAway {
                        reason: go.reason(),
                        message: go.message,
                        retry_after: Duration::from_millis(go.retry_after_ms.into()),
                    }));
                }
            }
        }
        while let Some((lane, message)) = self.session.poll_message() {
            self.lanes.send(lane, &message)?;
        }
        Ok(None)
    }

    async fn welcomed(&mut self, welcome: proto::Welcome) -> Result<(), SessionEnd> {
        info!(
            session_epoch = welcome.session_epoch,
            "the cloud took the session"
        );
        let mut values: Vec<(&'static str, Vec<u8>)> =
            vec![(kept::CONTINUATION, welcome.continuation.clone())];
        match welcome
            .link
            .as_ref()
            .map(|link| new_link(link, self.deps.identity))
        {
            Some(Ok(records)) => values.extend(records),
            Some(Err(error)) => {
                warn!(error = %chain(&error), "the cloud's new link record is of no use; the old one stays");
            }
            None => {}
        }
        values.push(time_record(welcome.now_ms));
        values.push((kept::DEAD_AFTER, welcome.dead_after_ms.to_be_bytes().into()));
        if let Some(environment) = &welcome.environment {
            values.push((kept::ENVIRONMENT, environment.encode_to_vec()));
        }
        let meta = self.deps.store.meta();
        beside(move || {
            let values: Vec<(&str, &[u8])> = values.iter().map(|(n, v)| (*n, &v[..])).collect();
            meta.put_all(&values)
        })
        .await?;
        if welcome.environment.is_some() {
            self.deps.environment.send_replace(welcome.environment);
        }
        self.session.welcome_committed(&self.deps.state);
        self.deps.connected.send_replace(true);
        Ok(())
    }

    fn start(&self, commit: Commit) -> JoinHandle<Result<Outcome, StoreError>> {
        let desired = self.deps.state.desired.clone();
        debug!(
            sequence = commit.sequence,
            puts = commit.puts.len(),
            removes = commit.removes.len(),
            complete = commit.complete,
            "committing a batch"
        );
        tokio::task::spawn_blocking(move || {
            let batch = Batch {
                puts: commit.puts,
                removes: commit.removes,
                complete: commit.complete,
                epoch: Some(commit.epoch),
                marks: commit.marks,
            };
            match desired.commit(batch) {
                Ok(digest) => Ok(Outcome::Committed { desired: digest }),
                Err(error @ CommitError::Stale { .. }) => {
                    info!(%error, "refused a batch");
                    Ok(Outcome::Stale {
                        marks: desired.marks(),
                    })
                }
                Err(CommitError::Store(error)) => {
                    warn!(error = %common::telemetry::chain(&error), "a batch was not committed");
                    Ok(Outcome::Failed)
                }
                Err(error @ (CommitError::Hash(_) | CommitError::Key(_))) => {
                    warn!(%error, "a batch was not committed");
                    Ok(Outcome::Failed)
                }
            }
        })
    }

    fn committed(&mut self, outcome: Outcome) -> Result<(), SessionEnd> {
        self.proved |= matches!(outcome, Outcome::Committed { .. });
        self.session.committed(outcome, &self.deps.state)?;
        Ok(())
    }

    async fn answered(
        &mut self,
        response: proto::Response,
    ) -> Result<Option<SessionEnd>, SessionEnd> {
        if self.renewing == Some(response.id) {
            self.renewing = None;
            let renewed = self.deps.renewal.answered(response).await?;
            return Ok(renewed.then_some(SessionEnd::Renewed));
        }
        if let Some(answer) = self.answers.remove(&response.id) {
            // A mount that no longer waits has dropped the other end.
            let _ = answer.send(response);
        }
        Ok(None)
    }
}

/// Waits for the commit in progress; for ever when there is none. Cancel safe: the handle stays.
async fn finished(
    commit: &mut Option<JoinHandle<Result<Outcome, StoreError>>>,
) -> Result<Outcome, StoreError> {
    let Some(handle) = commit else {
        return std::future::pending().await;
    };
    let result = handle.await;
    *commit = None;
    result.unwrap_or_else(|panic| {
        // It must not be taken for a commit.
        error!(%panic, "committing a batch panicked");
        Ok(Outcome::Failed)
    })
}
