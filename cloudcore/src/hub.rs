//! Where edges come in: the listener, joining, and one actor a session.
//!
//! Owns the tasks of all sessions; they end with it. Takes connections that TLS has let in; gives
//! what they report to `upstream` and what they need from `downstream`.

pub mod pace;
pub mod registry;
pub mod session;
pub mod view;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use common::hub::listen::{Accepted, JoinStream, Listener};
use common::hub::proto;
use common::ids::NodeName;
use common::pki::KeyId;
use common::telemetry::chain;
use rand::RngCore as _;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::downstream::Downstream;
use crate::enroll::Enroller;
use crate::enroll::cache::Enrolments;
use crate::enroll::record::Enrolment;
use crate::kube::KubeClients;
use crate::kube::epoch::begin_epoch;
use crate::nodes::claim::Claims;
use crate::upstream::{NodeUpstream, Upstream};
use pace::Pace;
use registry::{Ending, Registry, SessionEntry};
use session::Answered;

/// Something that a session waits for without holding its actor.
pub type Answer = Pin<Box<dyn Future<Output = Answered> + Send>>;

/// How long sessions get to say goodbye when CloudCore stops.
const DRAIN: Duration = Duration::from_secs(3);

/// How much one device may cost the others, however it behaves. Each is far above what an honest
/// one does.
pub struct Paces {
    /// Sessions of a key: each costs the API server a read and a write of the Lease, and reads of
    /// the enrolment. A link that flaps comes back eight times before it has to wait.
    pub sessions: Pace<KeyId>,
    /// Lines that say that a key was refused: one at once and one a minute.
    pub refusals: Pace<KeyId>,
    /// Certificates of a node: each costs a signature and a write of the enrolment.
    pub renewals: Pace<NodeName>,
    /// ServiceAccount tokens of a node, each a signature of the API server: a restart of a full
    /// node asks for some hundreds at once.
    pub tokens: Pace<NodeName>,
    /// Events of a node, in all its sessions. Each Pod's are limited by themselves, but a node may
    /// invent Pods and reasons without end, and each Event is a write.
    pub events: Pace<NodeName>,
    /// Cluster epochs that one node's word begins. A restored cluster is found by whichever node
    /// comes first; a node that lies must not take the protection of the marks from all others
    /// again and again.
    pub epochs: Pace<NodeName>,
    /// Warnings about what one node's session does.
    pub warnings: Pace<NodeName>,
}

impl Default for Paces {
    fn default() -> Self {
        Self {
            sessions: Pace::new(8, Duration::from_secs(2)),
            refusals: Pace::new(1, Duration::from_secs(60)),
            renewals: Pace::new(4, Duration::from_secs(60)),
            tokens: Pace::new(500, Duration::from_millis(100)),
            events: Pace::new(500, Duration::from_millis(200)),
            epochs: Pace::new(2, Duration::from_secs(1800)),
            warnings: Pace::new(10, Duration::from_secs(10)),
        }
    }
}

/// What every session uses.
pub struct HubDeps {
    pub paces: Paces,
    pub registry: Registry,
    pub downstream: Downstream,
    pub upstream: Upstream,
    pub claims: Claims,
    pub enroller: Enroller,
    pub enrolments: Enrolments,
    pub epoch: watch::Sender<[u8; 16]>,
    pub kube: KubeClients,
    /// What a Pod is born with; read from the cluster at start.
    pub environment: watch::Receiver<proto::NodeEnvironment>,
    pub link: proto::Link,
    /// After this much silence either end takes the link for dead.
    pub dead_after: Duration,
}

impl HubDeps {
    /// The answer to a Hello: only what the edge does not have yet.
    fn welcome(
        &self,
        hello: &proto::Hello,
        session_epoch: u64,
        cluster_epoch: [u8; 16],
        now_ms: u64,
    ) -> proto::Welcome {
        let environment = self.environment.borrow().clone();
        let link = self.link.clone();
        let mut continuation = vec![0; 16];
        rand::rng().fill_bytes(&mut continuation);
        let same = common::hub::environment_hash(&prost::Message::encode_to_vec(&environment))
            == hello.environment_hash;
        proto::Welcome {
            version: common::hub::PROTOCOL_VERSION,
            session_epoch,
            cluster_epoch: cluster_epoch.to_vec(),
            now_ms,
            continuation,
            link: (link.version > hello.link_version).then_some(link),
            environment: (!same).then_some(environment),
            dead_after_ms: u32::try_from(self.dead_after.as_millis()).unwrap_or(u32::MAX),
            max_frame: u32::try_from(common::hub::frame::MAX_UPWARD).unwrap_or(u32::MAX),
        }
    }

    /// Another cluster epoch, unless a colleague has begun one already.
    async fn begin_epoch(&self, old: [u8; 16]) -> Option<[u8; 16]> {
        warn!("the cluster is older than what an edge has seen: it was restored from a backup");
        match begin_epoch(&self.kube.own(), &old).await {
            Ok(new) => {
                self.epoch.send_replace(new);
                Some(new)
            }
            Err(error) => {
                warn!(error = %chain(&error), "a new cluster epoch could not be begun");
                None
            }
        }
    }

    fn answer(
        self: &Arc<Self>,
        upstream: &NodeUpstream,
        entry: &SessionEntry,
        request: proto::Request,
    ) -> Answer {
        let id = request.id;
        let respond = move |body| {
            Answered::Response(Box::new(proto::Response {
                id,
                body: Some(body),
            }))
        };
        match request.body {
            Some(proto::request::Body::Token(ask)) => {
                let given = upstream.token(ask);
                let wait = self
                    .paces
                    .tokens
                    .reserve(entry.node.clone(), Instant::now());
                // The session has a bounded number of these: who asks too fast waits for himself.
                Box::pin(async move {
                    tokio::time::sleep(wait).await;
                    respond(given.await)
                })
            }
            Some(proto::request::Body::Renew(ask)) => {
                let deps = self.clone();
                let certificate = entry
                    .connection
                    .peer_certificates()
                    .first()
                    .map(|c| c.to_vec());
                Box::pin(async move {
                    respond(deps.renew(&certificate.unwrap_or_default(), &ask.csr).await)
                })
            }
            None => Box::pin(async move {
                respond(proto::response::Body::Failure(proto::Failure {
                    message: "this CloudCore does not know that request".to_owned(),
                    retry: false,
                }))
            }),
        }
    }

    fn too_often(&self, identity: &common::pki::NodeIdentity) -> bool {
        let node = identity.node.clone();
        self.paces.renewals.take(node, Instant::now()).is_err()
    }

    async fn renew(&self, certificate: &[u8], csr: &[u8]) -> proto::response::Body {
        let renewed = match common::pki::NodeIdentity::from_certificate(certificate) {
            Ok(identity) if self.too_often(&identity) => {
                Err("this node asks for certificates too often; ask again in a minute".to_owned())
            }
            Ok(identity) => self
                .enroller
                .renew(&identity, csr)
                .await
                .map_err(|e| chain(&e)),
            Err(error) => Err(error.to_string()),
        };
        match renewed {
            Ok(certificates) => proto::response::Body::Renew(proto::RenewGiven {
                chain: certificates.iter().map(|c| c.to_vec()).collect(),
            }),
            Err(message) => proto::response::Body::Failure(proto::Failure {
                message,
                retry: true,
            }),
        }
    }
}

/// See the module.
pub struct Hub {
    listener: Listener,
    deps: Arc<HubDeps>,
}

impl Hub {
    pub fn build(listener: Listener, deps: Arc<HubDeps>) -> Self {
        Self { listener, deps }
    }

    /// Until shutdown; then each session is told to come back, and gets a moment to hear it.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut tasks = JoinSet::new();
        let mut revocations = self.deps.enrolments.revocations();
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                // Before those who knock, who can be without end.
                revoked = revocations.recv() => match revoked {
                    Ok(node) => self.revoked(&node),
                    // Too many at once: each session is checked by name.
                    Err(_) => self.check_all(),
                },
                Some(_) = tasks.join_next(), if !tasks.is_empty() => {}
                accepted = self.listener.accept() => match accepted {
                    None => break,
                    Some(Accepted::Session(connection)) => {
                        tasks.spawn(session(connection, self.deps.clone(), shutdown.clone()));
                    }
                    Some(Accepted::Join(stream)) => {
                        tasks.spawn(join(stream, self.deps.clone()));
                    }
                },
            }
        }
        let all = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(DRAIN, all).await.is_err() {
            debug!("some sessions did not take their goodbye");
        }
    }

    fn revoked(&self, node: &NodeName) {
        if let Some(entry) = self.deps.registry.get(node) {
            entry.end(Ending {
                reason: proto::GoAwayReason::GoAwayRevoked,
                message: format!("the enrolment of node {node} was ended; join with a new token"),
            });
        }
    }

    fn check_all(&self) {
        for entry in self.deps.registry.all() {
            if has_ended(self.deps.enrolments.find(&entry.node).as_deref()) {
                self.revoked(&entry.node);
            }
        }
    }
}

/// The record of an enrolment that was ended stays, and says so.
fn has_ended(record: Option<&Enrolment>) -> bool {
    record.is_none_or(|r| !r.spec.is_active())
}

async fn session(
    connection: common::hub::transport::Connection,
    deps: Arc<HubDeps>,
    shutdown: CancellationToken,
) {
    // The actor has said why it ended.
    let _ = session::serve(connection, deps, shutdown).await;
}

async fn join(stream: JoinStream, deps: Arc<HubDeps>) {
    let peer = stream.remote_address();
    let answer = match deps.enroller.join(stream.request(), peer).await {
        Ok(joined) => proto::join_answer::Answer::Joined(joined),
        Err(refused) => proto::join_answer::Answer::Refused(refused),
    };
    let answer = proto::JoinAnswer {
        answer: Some(answer),
    };
    if let Err(error) = stream.answer(&answer).await {
        info!(%peer, error = %chain(&error), "a device did not take its answer; it may ask again");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::enroll::record::EnrolmentSpec;

    #[test]
    fn a_session_ends_with_its_enrolment_also_while_the_record_stays() {
        let mut record = Enrolment::new("a", EnrolmentSpec::default());
        assert!(!has_ended(Some(&record)));
        let now = jiff::Timestamp::UNIX_EPOCH;
        record.spec.revoked = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(now));
        assert!(has_ended(Some(&record)));
        assert!(has_ended(None));
    }

    #[test]
    fn an_honest_device_meets_no_pace() {
        let paces = Paces::default();
        let (now, key) = (Instant::now(), KeyId([1; 32]));
        let node = NodeName::parse("a").unwrap();
        // A link that comes and goes within seconds; a full node that restarts.
        assert!((0..8).all(|_| paces.sessions.take(key, now).is_ok()));
        assert!((0..500).all(|_| paces.tokens.reserve(node.clone(), now).is_zero()));
        assert!(paces.epochs.take(node.clone(), now).is_ok());
        // And one that asks without end is held to a rate.
        assert!(paces.sessions.take(key, now).is_err());
        assert!(!paces.tokens.reserve(node, now).is_zero());
    }
}
