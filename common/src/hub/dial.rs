//! The device's way to its cloud: which endpoint, which transport, and what went wrong.
//!
//! Takes endpoints, trust, identity and what is known of the time; gives one authenticated
//! connection, or the answer to a join request. Keeps nothing: what worked is remembered by the
//! caller.
//!
//! ```text
//! auto:  QUIC ──(head start)──┬── QUIC      first to be ready wins, the other is dropped;
//!                             └── WebSocket  the remembered transport takes the head start
//! ```

use std::net::SocketAddr;
use std::pin::pin;
use std::time::Duration;

use prost::Message;
use rustls_pki_types::CertificateDer;
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

use super::listen::{JOIN_ANSWER_LIMIT, read_framed, write_framed};
use super::proto::join_answer::Answer;
use super::proto::{self, JoinAnswer, JoinRequest, Joined};
use super::tls::{ClientIdentity, ClientTls, Clock, TlsError, Trust};
use super::transport::{Connection, LinkConfig, TransportError, TransportKind};
use super::{quic, ws};
use crate::pki::token::Endpoint;
use crate::pki::{ClusterId, JoinToken, PkiError};

/// Resolvers give many addresses for a load balancer; a few prove the point.
const MAX_ADDRESSES: usize = 4;
/// A resolver that cannot reach its servers is silent for minutes.
const RESOLVE: Duration = Duration::from_secs(5);
/// With several addresses the next one gets its turn after this.
const ADDRESS_TURN: Duration = Duration::from_secs(4);
/// The cloud asks the API server several things before it answers.
const JOIN_ANSWER: Duration = Duration::from_secs(60);

/// Where to dial and whom to believe.
#[derive(Debug, Clone)]
pub struct Target {
    pub endpoints: Vec<Endpoint>,
    pub cluster: ClusterId,
    pub trust: Trust,
}

impl Target {
    /// What a device keeps of its cloud.
    pub fn from_link(link: &proto::Link) -> Result<Self, PkiError> {
        let roots = link
            .roots
            .iter()
            .map(|r| CertificateDer::from(r.clone()))
            .collect();
        Ok(Self {
            endpoints: link
                .endpoints
                .iter()
                .filter_map(Endpoint::from_proto)
                .collect(),
            cluster: ClusterId::parse(&link.cluster_id)?,
            trust: Trust::Roots(roots),
        })
    }

    /// What an operator pasted.
    pub fn from_token(token: &JoinToken) -> Self {
        Self {
            endpoints: token.endpoints.clone(),
            cluster: token.cluster.clone(),
            trust: Trust::Pins(token.pins.clone()),
        }
    }
}

/// What the operator said about transports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preference {
    #[default]
    Auto,
    Quic,
    WebSocket,
}

#[derive(Debug, Clone)]
pub struct DialOptions {
    pub preference: Preference,
    /// What carried the last session: it gets the head start.
    pub remembered: Option<TransportKind>,
    pub clock: Clock,
    pub link: LinkConfig,
    /// How long the first transport is alone. Two round trips over a satellite fit; where UDP is
    /// silent a session still stands within 3 s.
    pub head_start: Duration,
    /// For one transport at one endpoint.
    pub deadline: Duration,
}

impl DialOptions {
    pub fn new(clock: Clock) -> Self {
        Self {
            preference: Preference::Auto,
            remembered: None,
            clock,
            link: LinkConfig::default(),
            head_start: Duration::from_millis(1500),
            deadline: Duration::from_secs(10),
        }
    }
}

/// One try that failed.
#[derive(Debug, Clone)]
pub struct Attempt {
    pub endpoint: Endpoint,
    /// None while the name was looked up.
    pub kind: Option<TransportKind>,
    pub error: TransportError,
}

#[derive(Debug, thiserror::Error)]
pub enum DialError {
    #[error("no endpoint is known that speaks the chosen transport")]
    NoEndpoint,
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("cannot reach the cloud: {}", list(.0))]
    Failed(Vec<Attempt>),
}

impl DialError {
    /// The failure that says most: that the cloud is there and does not want us, or is not ours,
    /// outranks silence.
    pub fn most_telling(&self) -> Option<&TransportError> {
        match self {
            DialError::NoEndpoint | DialError::Tls(_) => None,
            DialError::Failed(attempts) => {
                attempts.iter().map(|a| &a.error).min_by_key(|e| rank(e))
            }
        }
    }
}

fn rank(error: &TransportError) -> u8 {
    match error {
        TransportError::ClosedByPeer { .. } => 0,
        TransportError::Refused(_) => 1,
        TransportError::Trust(_) => 2,
        TransportError::Protocol(_) | TransportError::TooLarge { .. } => 3,
        TransportError::Unusable(_) | TransportError::CutShort => 4,
        TransportError::Reset { .. } | TransportError::Stopped { .. } => 5,
        TransportError::Timeout(_) | TransportError::ClosedHere => 6,
    }
}

fn list(attempts: &[Attempt]) -> String {
    let one = |a: &Attempt| {
        let kind = a.kind.map_or("lookup".into(), |k| k.to_string());
        format!("{} by {kind}: {}", a.endpoint, a.error.explain())
    };
    attempts.iter().map(one).collect::<Vec<_>>().join("; ")
}

/// Connects to the first endpoint that answers. Each endpoint is tried in its order.
pub async fn dial(
    target: &Target,
    identity: &ClientIdentity,
    options: &DialOptions,
) -> Result<Connection, DialError> {
    let tls = || {
        ClientTls::new(
            target.trust.clone(),
            &target.cluster,
            options.clock,
            Some(identity.clone()),
        )
    };
    let mut failed = Vec::new();
    for endpoint in &target.endpoints {
        let kinds = kinds(endpoint, options);
        if kinds.is_empty() {
            continue;
        }
        let addresses = match resolve(endpoint).await {
            Ok(addresses) => addresses,
            Err(attempt) => {
                failed.push(attempt);
                continue;
            }
        };
        let mut tries = Vec::new();
        for kind in kinds {
            // Each has its own verifier, so that each failure has its own reason.
            tries.push(Try {
                endpoint,
                kind,
                addresses: &addresses,
                tls: tls()?,
                options,
            });
        }
        match race(tries, options.head_start).await {
            Ok(connection) => return Ok(connection),
            Err(attempts) => failed.extend(attempts),
        }
    }
    Err(if failed.is_empty() {
        DialError::NoEndpoint
    } else {
        DialError::Failed(failed)
    })
}

/// The transports to try, best first.
fn kinds(endpoint: &Endpoint, options: &DialOptions) -> Vec<TransportKind> {
    use TransportKind::{Quic, WebSocket};
    let order = match (options.preference, options.remembered) {
        (Preference::Quic, _) => vec![Quic],
        (Preference::WebSocket, _) => vec![WebSocket],
        (Preference::Auto, Some(WebSocket)) => vec![WebSocket, Quic],
        (Preference::Auto, Some(Quic) | None) => vec![Quic, WebSocket],
    };
    let speaks = |kind: &TransportKind| match kind {
        Quic => endpoint.quic,
        WebSocket => endpoint.websocket,
    };
    order.into_iter().filter(speaks).collect()
}

async fn resolve(endpoint: &Endpoint) -> Result<Vec<SocketAddr>, Attempt> {
    let lookup = tokio::net::lookup_host((endpoint.host.as_str(), endpoint.port));
    let result = match timeout(RESOLVE, lookup).await {
        Ok(Ok(addresses)) => {
            let addresses: Vec<_> = addresses.take(MAX_ADDRESSES).collect();
            if addresses.is_empty() {
                Err(TransportError::unusable("the name has no address"))
            } else {
                Ok(addresses)
            }
        }
        Ok(Err(e)) => Err(TransportError::unusable(e)),
        Err(_) => Err(TransportError::Timeout("the name could not be looked up")),
    };
    result.map_err(|error| Attempt {
        endpoint: endpoint.clone(),
        kind: None,
        error,
    })
}

/// One transport at one endpoint.
struct Try<'a> {
    endpoint: &'a Endpoint,
    kind: TransportKind,
    addresses: &'a [SocketAddr],
    tls: ClientTls,
    options: &'a DialOptions,
}

impl Try<'_> {
    async fn run(self) -> Result<Connection, Attempt> {
        let turn = if self.addresses.len() > 1 {
            ADDRESS_TURN.min(self.options.deadline)
        } else {
            self.options.deadline
        };
        let mut last = TransportError::Timeout("no address was tried");
        for address in self.addresses {
            let dial = async {
                match self.kind {
                    TransportKind::Quic => {
                        quic::dial(*address, &self.tls, &self.options.link).await
                    }
                    TransportKind::WebSocket => {
                        ws::dial(*address, &self.tls, &self.options.link).await
                    }
                }
            };
            match timeout(turn, dial).await {
                Ok(Ok(connection)) => return Ok(connection),
                Ok(Err(error)) => last = error,
                Err(_) => last = TransportError::Timeout("the handshake did not complete"),
            }
        }
        Err(Attempt {
            endpoint: self.endpoint.clone(),
            kind: Some(self.kind),
            error: last,
        })
    }
}

/// The first of one or two tries has a head start; a failure ends it early.
async fn race(tries: Vec<Try<'_>>, head_start: Duration) -> Result<Connection, Vec<Attempt>> {
    let mut tries = tries.into_iter();
    let Some(first) = tries.next() else {
        return Err(Vec::new());
    };
    let mut first = pin!(first.run());
    let Some(second) = tries.next() else {
        return first.await.map_err(|attempt| vec![attempt]);
    };
    let early = match timeout(head_start, &mut first).await {
        Ok(Ok(connection)) => return Ok(connection),
        Ok(Err(attempt)) => Some(attempt),
        Err(_) => None,
    };
    let mut second = pin!(second.run());
    if let Some(attempt) = early {
        return second.await.map_err(|other| vec![attempt, other]);
    }
    tokio::select! {
        biased;
        result = &mut first => match result {
            Ok(connection) => Ok(connection),
            Err(attempt) => second.await.map_err(|other| vec![attempt, other]),
        },
        result = &mut second => match result {
            Ok(connection) => Ok(connection),
            Err(other) => first.await.map_err(|attempt| vec![attempt, other]),
        },
    }
}

/// What the cloud said to a join request.
#[derive(Debug)]
pub enum JoinOutcome {
    Joined(Joined),
    Refused(proto::Refused),
}

/// Asks to join (or, with an expired certificate in the request, to be enrolled again) at the
/// first endpoint that answers. Asking twice is harmless: the same key gets the same answer.
pub async fn join(
    target: &Target,
    request: &JoinRequest,
    options: &DialOptions,
) -> Result<JoinOutcome, DialError> {
    // A pin proves the cloud whatever the time; a device that joins may never have known it.
    let clock = match &target.trust {
        Trust::Pins(_) => Clock::Unsynchronised(None),
        Trust::Roots(_) => options.clock,
    };
    let mut failed = Vec::new();
    for endpoint in &target.endpoints {
        let addresses = match resolve(endpoint).await {
            Ok(addresses) => addresses,
            Err(attempt) => {
                failed.push(attempt);
                continue;
            }
        };
        for address in addresses {
            let tls = ClientTls::new(target.trust.clone(), &target.cluster, clock, None)?;
            match ask(address, &tls, request, options).await {
                Ok(outcome) => return Ok(outcome),
                Err(error) => failed.push(Attempt {
                    endpoint: endpoint.clone(),
                    kind: Some(TransportKind::WebSocket),
                    error,
                }),
            }
        }
    }
    Err(if failed.is_empty() {
        DialError::NoEndpoint
    } else {
        DialError::Failed(failed)
    })
}

async fn ask(
    address: SocketAddr,
    tls: &ClientTls,
    request: &JoinRequest,
    options: &DialOptions,
) -> Result<JoinOutcome, TransportError> {
    let mut stream = timeout(options.deadline, ws::connect(address, tls, &options.link))
        .await
        .unwrap_or(Err(TransportError::Timeout(
            "the handshake did not complete",
        )))?;
    let exchange = async {
        write_framed(&mut stream, &request.encode_to_vec()).await?;
        read_framed(&mut stream, JOIN_ANSWER_LIMIT).await
    };
    let bytes = timeout(JOIN_ANSWER, exchange)
        .await
        .unwrap_or(Err(TransportError::Timeout(
            "the cloud did not answer the join request",
        )))?;
    // The answer is here; a failing goodbye changes nothing.
    drop(stream.shutdown().await);
    let answer = JoinAnswer::decode(bytes.as_slice())
        .map_err(|_| TransportError::Protocol("the join answer is unreadable".into()))?;
    match answer.answer {
        Some(Answer::Joined(joined)) => Ok(JoinOutcome::Joined(joined)),
        Some(Answer::Refused(refused)) => Ok(JoinOutcome::Refused(refused)),
        None => Err(TransportError::Protocol(
            "the join answer is of a kind that this version does not know".into(),
        )),
    }
}

#[cfg(test)]
#[path = "dial/tests.rs"]
mod tests;
