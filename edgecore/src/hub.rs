//! The way to the cloud: always dialled from here, always dialled again.
//!
//! ```text
//! Offline --dial--> Session --ends--> Offline (waits: jittered, doubling, reset by a session in
//!                                              which the cloud proved itself)
//! ```
//!
//! Owns the connection and what is asked over it. Pods never wait for it.

pub mod clock;
pub mod identity;
pub mod pace;
pub mod session;
pub mod state;
pub mod tokens;

use std::time::Duration;

use common::hub::dial::{self, DialError, DialOptions, Preference};
use common::hub::proto;
use common::hub::tls::ClientIdentity;
use common::hub::transport::{Connection, Refusal, TransportError, TransportKind};
use common::telemetry::chain;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::join::{self, Enrolment};
use crate::store::desired::Desired;
use crate::store::events::Events;
use crate::store::reports::Reports;
use crate::store::{Store, StoreError};
use crate::stream::tunnels::Tunnels;
use identity::{Identity, IdentityError, Renewal};
use pace::{Deadlines, Pace, UNWANTED_WAIT};
use session::{SessionDeps, SessionEnd, kept};
use state::{Facts, StoreState};
use tokens::Ask;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("the link record of this device is damaged; join again with a new token")]
    Link(#[from] common::pki::PkiError),
    #[error(transparent)]
    Dial(#[from] DialError),
}

impl LinkError {
    fn expired(&self) -> bool {
        match self {
            LinkError::Link(_) => false,
            LinkError::Dial(error) => matches!(
                error.most_telling(),
                Some(TransportError::Refused(Refusal::Expired))
            ),
        }
    }
}

fn no_session(error: &dyn std::error::Error, wait: Duration) {
    warn!(error = %chain(error), retry_in = ?wait, "no session with the cloud");
}

/// A session and what else its connection carries, which ends with it.
async fn beside<T>(session: impl Future<Output = T>, rest: impl Future<Output = ()>) -> T {
    let rest = async {
        rest.await;
        std::future::pending().await
    };
    tokio::select! {
        biased;
        end = session => end,
        never = rest => never,
    }
}

/// What the task is made of.
pub struct Deps {
    pub store: Store,
    pub incarnation: [u8; 16],
    pub desired: Desired,
    pub reports: Reports,
    pub events: Events,
    pub asks: mpsc::Receiver<Ask>,
    pub connected: watch::Sender<bool>,
    pub environment: watch::Sender<Option<proto::NodeEnvironment>>,
    /// Outlives a connection by what its tunnels need to end.
    pub tunnels: Tunnels,
    pub transport: Preference,
    /// The silence after which the link is dead; the cloud's where nothing is set.
    pub dead_after: Option<Duration>,
    /// What a token asks that this device has not used.
    pub enrolment: Option<Enrolment>,
}

/// See the module.
pub struct Task {
    deps: Deps,
    pace: Pace,
    remembered: Option<TransportKind>,
    /// When a certificate may be asked for again over a session.
    renew_from: Instant,
}

impl Task {
    pub fn build(deps: Deps) -> Self {
        Self {
            deps,
            pace: Pace::default(),
            remembered: None,
            renew_from: Instant::now(),
        }
    }

    /// Until shutdown.
    pub async fn run(mut self, shutdown: CancellationToken) {
        loop {
            let wait = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                wait = self.once(&shutdown) => wait,
            };
            debug!(?wait, "dialling again after a wait");
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// One dial and, if it succeeds, one session. Gives the wait before the next.
    async fn once(&mut self, shutdown: &CancellationToken) -> Duration {
        if let Some(enrolment) = self.deps.enrolment.take() {
            self.deps.enrolment = enrolment.mend(&self.deps.store).await;
        }
        let identity = match Identity::load(&self.deps.store) {
            Ok(Some(identity)) => identity,
            Ok(None) => return UNWANTED_WAIT,
            Err(error) => return self.lost(&error),
        };
        if identity.expired(&self.deps.store) {
            return self.replace_certificate(&identity).await;
        }
        let deadlines = match self.deadlines() {
            Ok(deadlines) => deadlines,
            Err(error) => return self.lost(&error),
        };
        let connection = match self.dial(&identity, deadlines).await {
            Ok(connection) => connection,
            Err(error) if error.expired() => return self.replace_certificate(&identity).await,
            Err(error) => return self.lost(&error),
        };
        info!(transport = %connection.kind(), remote = %connection.remote_address(), "connected");
        self.remembered = Some(connection.kind());
        let mut renewal = Renewal::new(self.deps.store.clone(), &identity, self.renew_from);
        let state = match self.state(&identity) {
            Ok(state) => state,
            Err(error) => return self.lost(&error),
        };
        let deps = SessionDeps {
            store: &self.deps.store,
            identity: &identity,
            state,
            deadlines,
            asks: &mut self.deps.asks,
            connected: &self.deps.connected,
            environment: &self.deps.environment,
            renewal: &mut renewal,
            shutdown,
        };
        let tunnels = self.deps.tunnels.serve(&connection);
        let session = session::run(&connection, deps);
        let (end, proved) = beside(session, tunnels).await;
        if proved {
            // The enrolment needs no mending.
            self.deps.enrolment = None;
        }
        if matches!(end, SessionEnd::Renewed) {
            self.renew_from = Instant::now() + identity.renewal_pause();
        }
        // With TLS 1.3 the cloud judges the certificate after this end is connected.
        if end.expired() {
            return self.replace_certificate(&identity).await;
        }
        self.ended(&end, proved)
    }

    /// Gives the wait before the next dial: never none, or a device whose clock is wrong would ask
    /// for certificates without end.
    async fn replace_certificate(&mut self, identity: &Identity) -> Duration {
        info!(node = %identity.node, "the certificate has run out; asking for another");
        match join::again(&self.deps.store, identity).await {
            Ok(()) => self.pace.wait(),
            Err(error) => self.lost(&error),
        }
    }

    fn deadlines(&self) -> Result<Deadlines, StoreError> {
        let said = self.deps.store.meta().get(kept::DEAD_AFTER)?;
        let said = said.and_then(|ms| Some(u32::from_be_bytes(ms.try_into().ok()?)));
        let said = said.map(|ms| Duration::from_millis(ms.into()));
        Ok(Deadlines::new(self.deps.dead_after, said))
    }

    async fn dial(
        &self,
        identity: &Identity,
        deadlines: Deadlines,
    ) -> Result<Connection, LinkError> {
        let target = identity.target()?;
        let shown = ClientIdentity {
            chain: identity.chain.clone(),
            key: identity.key.private_key(),
        };
        let options = DialOptions {
            preference: self.deps.transport,
            remembered: self.remembered,
            link: deadlines.link(),
            ..DialOptions::new(identity::dial_clock(&self.deps.store))
        };
        Ok(dial::dial(&target, &shown, &options).await?)
    }

    fn state(&self, identity: &Identity) -> Result<StoreState, IdentityError> {
        let meta = self.deps.store.meta();
        let environment = meta.get(kept::ENVIRONMENT)?.unwrap_or_default();
        Ok(StoreState {
            desired: self.deps.desired.clone(),
            reports: self.deps.reports.clone(),
            events: self.deps.events.clone(),
            facts: Facts {
                incarnation: self.deps.incarnation,
                continuation: meta.get(kept::CONTINUATION)?.unwrap_or_default(),
                link_version: identity.link.version,
                boot_id: clock::boot_id(),
                clock_synchronised: clock::synchronised(),
                environment_hash: common::hub::environment_hash(&environment),
            },
        })
    }

    fn lost(&mut self, error: &dyn std::error::Error) -> Duration {
        let wait = self.pace.wait();
        no_session(error, wait);
        wait
    }

    fn ended(&mut self, end: &SessionEnd, proved: bool) -> Duration {
        let wait = self.pace.after(end, proved);
        match end {
            SessionEnd::Stopping | SessionEnd::Renewed | SessionEnd::Deadlines => {}
            SessionEnd::GoAway {
                reason, message, ..
            } => {
                warn!(?reason, message, retry_in = ?wait, "the cloud ended the session");
            }
            SessionEnd::Lanes(_) | SessionEnd::Protocol(_) | SessionEnd::Store(_) => {
                no_session(end, wait);
            }
        }
        wait
    }
}
