//! A judged request on its way through the hub: one stream, one request, its answer.
//!
//! - Owns: the open tunnels of this replica, their number and their pace.
//! - Takes: a node (the port said which), the user, the request.
//! - Gives: the edge's answer; after `101` the joined connections, to be run by the asker's task.
//! - Never: passes on who asked or through whom, but the name in the stream's head; outlives either
//!   side: what carries a tunnel is held by the answer's body or by its splice, and dropping that
//!   resets the stream.
//!
//! ```text
//! asker ─request─► open ─► head ─► answer ─┬─ body ──────────► counted, closed
//!                                          └─ 101 ─► Splice ─► bytes both ways, closed
//! ```

mod places;

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use common::hub::proto::{StreamHead, StreamKind, Tunnel};
use common::hub::transport::{Class, Duplex};
use common::ids::NodeName;
use common::stream::request::Target;
use common::stream::{BUFFER, carried, splice};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http1;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::audit::{self, End, Opened};
use super::auth::User;
use super::metrics::{Metrics, Reason};
use crate::hub::registry::Registry;
use places::{Full as NoPlace, Place, Places, TUNNELS};

/// A stream is there at once, unless the link is dying.
const OPEN: Duration = Duration::from_secs(10);
/// From the request to the head of its answer: statistics of a busy board take seconds.
const ANSWER: Duration = Duration::from_secs(30);
/// A runtime under load takes long to begin a command.
const ANSWER_OF_ACTS: Duration = Duration::from_secs(60);
/// Both ends have said `101`: what is left is a wake-up.
const UPGRADE: Duration = Duration::from_secs(10);

pub(super) type BoxError = Box<dyn std::error::Error + Send + Sync>;
pub(super) type AnswerBody = UnsyncBoxBody<Bytes, BoxError>;
pub(super) type Answer = Response<AnswerBody>;

/// Why there is no answer of the edge.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoAnswer {
    #[error("node {0} is not connected: its device is off, or has no link to this CloudCore")]
    NotConnected(NodeName),
    #[error(
        "node {0} has {TUNNELS} streams open, the most that it may have: end some (kubectl logs -f, exec, port-forward), then try again"
    )]
    TooMany(NodeName),
    #[error("too many streams to node {0} in a short time: try again in a moment")]
    TooFast(NodeName, Duration),
    #[error("the link to node {0} ended")]
    Link(NodeName, #[source] BoxError),
    #[error("node {0} did not take the request in time: its link is busy or dying")]
    NotTaken(NodeName),
    #[error(
        "node {0} did not answer within {1:?}: its edgecore may be too old for this request, or busy"
    )]
    Silent(NodeName, Duration),
    #[error("node {0} broke off before it answered: its edgecore may be too old for this request")]
    Broke(NodeName, #[source] BoxError),
}

impl NoAnswer {
    pub(super) fn status(&self) -> StatusCode {
        match self {
            NoAnswer::NotConnected(_) => StatusCode::SERVICE_UNAVAILABLE,
            NoAnswer::TooMany(_) | NoAnswer::TooFast(..) => StatusCode::TOO_MANY_REQUESTS,
            NoAnswer::Link(..) | NoAnswer::Broke(..) => StatusCode::BAD_GATEWAY,
            NoAnswer::NotTaken(_) | NoAnswer::Silent(..) => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    pub(super) fn reason(&self) -> Reason {
        match self {
            NoAnswer::NotConnected(_) => Reason::NotConnected,
            NoAnswer::TooMany(_) | NoAnswer::TooFast(..) => Reason::Limit,
            NoAnswer::Link(..)
            | NoAnswer::NotTaken(_)
            | NoAnswer::Silent(..)
            | NoAnswer::Broke(..) => Reason::NoAnswer,
        }
    }

    /// Whole seconds, where waiting helps.
    pub(super) fn retry_after(&self) -> Option<u64> {
        match self {
            NoAnswer::TooMany(_) => Some(5),
            NoAnswer::TooFast(_, wait) => Some(wait.as_secs() + 1),
            NoAnswer::NotConnected(_)
            | NoAnswer::Link(..)
            | NoAnswer::NotTaken(_)
            | NoAnswer::Silent(..)
            | NoAnswer::Broke(..) => None,
        }
    }
}

/// See the module. Cheap to clone.
#[derive(Clone)]
pub(super) struct Tunnels {
    registry: Registry,
    places: Places,
    metrics: Metrics,
    last: Arc<AtomicU64>,
}

/// What an answer leaves to be run when its head is out.
pub(super) type Left = Option<Splice>;

impl Tunnels {
    pub(super) fn new(registry: Registry, metrics: Metrics) -> Self {
        Self {
            registry,
            places: Places::default(),
            metrics,
            // The numbers of two runs are told apart in one log.
            last: Arc::new(AtomicU64::new(u64::from(rand::random::<u32>()) << 20)),
        }
    }

    /// Carries one request to the node and brings its answer.
    pub(super) async fn carry(
        &self,
        node: &NodeName,
        user: &User,
        target: &Target,
        mut request: Request<Incoming>,
    ) -> Result<(Answer, Left), NoAnswer> {
        let entry = self.registry.get(node);
        let entry = entry.ok_or_else(|| NoAnswer::NotConnected(node.clone()))?;
        let place = self.places.take(node, Instant::now());
        let place = place.map_err(|full| match full {
            NoPlace::Open => NoAnswer::TooMany(node.clone()),
            NoPlace::Rate(wait) => NoAnswer::TooFast(node.clone(), wait),
        })?;
        let id = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let head = StreamHead {
            kind: StreamKind::StreamTunnel.into(),
            tunnel: Some(Tunnel {
                id,
                principal: user.name.clone(),
            }),
        };
        let opened = timeout(OPEN, entry.connection.open(Class::Interactive, &head)).await;
        let opened = opened.map_err(|_| NoAnswer::NotTaken(node.clone()))?;
        let (send, recv) = opened.map_err(|e| NoAnswer::Link(node.clone(), e.into()))?;
        let mut record = Opened::new(
            id,
            &user.name,
            node,
            request.method(),
            target,
            self.metrics.clone(),
        );
        let asker = hyper::upgrade::on(&mut request);
        let asked = ask(Duplex::new(send, recv), node, target, request, &record).await;
        match asked {
            Ok((answer, driver)) => {
                record.status = answer.status().as_u16();
                Ok(split(
                    answer,
                    asker,
                    Held {
                        record,
                        _driver: driver,
                        _place: place,
                    },
                ))
            }
            Err(error) => {
                record.status = error.status().as_u16();
                record.end = End::Broken(crate::chain(&error));
                Err(error)
            }
        }
    }
}

/// Sends the request and waits for the head of its answer.
async fn ask(
    stream: Duplex,
    node: &NodeName,
    target: &Target,
    request: Request<Incoming>,
    record: &Opened,
) -> Result<(Response<Incoming>, AbortOnDropHandle<()>), NoAnswer> {
    let broke = |e: hyper::Error| NoAnswer::Broke(node.clone(), e.into());
    let (mut sender, connection) = http1::Builder::new()
        // What is held of an answer on its way; a head is smaller.
        .max_buf_size(BUFFER / 4)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(broke)?;
    let driver = AbortOnDropHandle::new(tokio::spawn(async move {
        // Its error is the request's or the body's as well.
        let _ = connection.with_upgrades().await;
    }));
    let within = if target.acts() {
        ANSWER_OF_ACTS
    } else {
        ANSWER
    };
    let answer = sender.send_request(to_edge(node, request, record));
    let answer = timeout(within, answer).await;
    let answer = answer.map_err(|_| NoAnswer::Silent(node.clone(), within))?;
    Ok((answer.map_err(broke)?, driver))
}

/// The request as it crosses: what was asked, and the headers that are the edge's business.
fn to_edge(
    node: &NodeName,
    request: Request<Incoming>,
    record: &Opened,
) -> Request<Counted<Incoming>> {
    let (parts, body) = request.into_parts();
    let mut crossing = Request::new(Counted {
        body,
        bytes: record.bytes.clone(),
        back: false,
        held: None,
    });
    *crossing.method_mut() = parts.method;
    let path = parts.uri.path_and_query().cloned();
    *crossing.uri_mut() = path.map_or_else(Default::default, http::Uri::from);
    *crossing.headers_mut() = carried(&parts.headers);
    // A name is made of what a host is made of.
    if let Ok(host) = HeaderValue::from_str(node.as_str()) {
        crossing.headers_mut().insert(header::HOST, host);
    }
    crossing
}

/// What carries a tunnel; dropped, the stream is reset and its end is in the log.
struct Held {
    record: Opened,
    _driver: AbortOnDropHandle<()>,
    _place: Place,
}

/// The answer as the asker gets it; of an upgrade the other half.
fn split(answer: Response<Incoming>, asker: OnUpgrade, held: Held) -> (Answer, Left) {
    let (parts, body) = answer.into_parts();
    let mut response = Response::new(empty());
    *response.status_mut() = parts.status;
    *response.headers_mut() = to_asker(&parts.headers);
    if parts.status == StatusCode::SWITCHING_PROTOCOLS {
        let mut upgraded = Response::new(body);
        *upgraded.extensions_mut() = parts.extensions;
        let edge = hyper::upgrade::on(upgraded);
        return (response, Some(Splice { asker, edge, held }));
    }
    let mut counted = Counted {
        bytes: held.record.bytes.clone(),
        back: true,
        held: Some(held),
        body,
    };
    if counted.body.is_end_stream() {
        counted.ended(End::Complete);
    }
    *response.body_mut() = counted.boxed_unsync();
    (response, None)
}

fn to_asker(headers: &HeaderMap) -> HeaderMap {
    let mut headers = carried(headers);
    // A log is text that a Pod chose: no browser behind `kubectl proxy` may take it for a page.
    headers.insert(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    headers
}

pub(super) fn empty() -> AnswerBody {
    text(String::new())
}

pub(super) fn text(words: String) -> AnswerBody {
    let body = Full::new(Bytes::from(words));
    body.map_err(|never| match never {}).boxed_unsync()
}

/// Two upgraded connections to be joined.
pub(super) struct Splice {
    asker: OnUpgrade,
    edge: OnUpgrade,
    held: Held,
}

impl Splice {
    /// Until either end has ended; dropped, both are closed.
    pub(super) async fn run(self) {
        let Splice {
            asker,
            edge,
            mut held,
        } = self;
        let both = timeout(UPGRADE, async { tokio::try_join!(asker, edge) });
        let (asker, edge) = match both.await {
            Ok(Ok(both)) => both,
            Ok(Err(error)) => {
                held.record.end = End::Broken(crate::chain(&error));
                return;
            }
            Err(_) => return,
        };
        let outcome = splice::splice(TokioIo::new(asker), TokioIo::new(edge)).await;
        let bytes = &held.record.bytes;
        bytes.there.store(outcome.there, Ordering::Relaxed);
        bytes.back.store(outcome.back, Ordering::Relaxed);
        held.record.end = match outcome.error {
            Some(error) => End::Broken(crate::chain(&error)),
            None if outcome.left => End::AskerGone,
            None => End::Complete,
        };
    }
}

/// A body whose bytes are counted; an answer's holds what carries it.
struct Counted<B> {
    body: B,
    bytes: Arc<audit::Bytes>,
    back: bool,
    held: Option<Held>,
}

impl<B> Counted<B> {
    fn ended(&mut self, end: End) {
        if let Some(mut held) = self.held.take() {
            held.record.end = end;
        }
    }
}

impl<B: Body<Data = Bytes, Error = hyper::Error> + Unpin> Body for Counted<B> {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
            Some(Ok(frame)) => {
                let count = frame.data_ref().map_or(0, Bytes::len) as u64;
                let bytes = &self.bytes;
                let direction = if self.back { &bytes.back } else { &bytes.there };
                direction.fetch_add(count, Ordering::Relaxed);
                // Of an answer whose length was told nobody asks for more.
                if self.body.is_end_stream() {
                    self.ended(End::Complete);
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                self.ended(End::Broken(crate::chain(&error)));
                Poll::Ready(Some(Err(error.into())))
            }
            None => {
                self.ended(End::Complete);
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
