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

use std::io;
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
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
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
    #[error(
        "node {0} broke off before it answered: its link ended, try again; or its edgecore is too old for this request"
    )]
    Broke(NodeName, #[source] BoxError),
    #[error("node {0} switched protocols, which this request does not do")]
    Switched(NodeName),
}

impl NoAnswer {
    pub(super) fn status(&self) -> StatusCode {
        match self {
            NoAnswer::NotConnected(_) => StatusCode::SERVICE_UNAVAILABLE,
            NoAnswer::TooMany(_) | NoAnswer::TooFast(..) => StatusCode::TOO_MANY_REQUESTS,
            NoAnswer::Link(..) | NoAnswer::Broke(..) | NoAnswer::Switched(_) => {
                StatusCode::BAD_GATEWAY
            }
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
            | NoAnswer::Broke(..)
            | NoAnswer::Switched(_) => Reason::NoAnswer,
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
            | NoAnswer::Broke(..)
            | NoAnswer::Switched(_) => None,
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
        closing: &CancellationToken,
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
            closing.clone(),
            self.metrics.clone(),
        );
        let asker = hyper::upgrade::on(&mut request);
        let asked = ask(Duplex::new(send, recv), node, target, request, &record).await;
        match asked {
            Ok((answer, driver)) => {
                record.status = readable(target, answer.status()).as_u16();
                Ok(split(
                    target,
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
                record.status = readable(target, error.status()).as_u16();
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
    let may_switch = target.switches() && request.headers().contains_key(header::UPGRADE);
    let answer = sender.send_request(to_edge(node, request, record));
    let answer = timeout(within, answer).await;
    let answer = answer.map_err(|_| NoAnswer::Silent(node.clone(), within))?;
    let answer = answer.map_err(broke)?;
    if answer.status() == StatusCode::SWITCHING_PROTOCOLS && !may_switch {
        return Err(NoAnswer::Switched(node.clone()));
    }
    Ok((answer, driver))
}

/// The status by which a reader gets an answer's words. Of `pods/log` the API server throws them
/// away when the status is one of these (`GenericHttpResponseChecker`), and hands them on with 500.
pub(super) fn readable(target: &Target, status: StatusCode) -> StatusCode {
    match (target, status) {
        (
            Target::Logs { .. },
            StatusCode::TOO_MANY_REQUESTS
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT,
        ) => StatusCode::INTERNAL_SERVER_ERROR,
        (_, status) => status,
    }
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
fn split(
    target: &Target,
    answer: Response<Incoming>,
    asker: OnUpgrade,
    held: Held,
) -> (Answer, Left) {
    let (parts, body) = answer.into_parts();
    let mut response = Response::new(empty());
    *response.status_mut() = readable(target, parts.status);
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
    // What a Pod or a stolen device chose to say: no browser behind `kubectl proxy` may take it for
    // a page, which would act there with its reader's rights.
    let kind = harmless(headers.get(header::CONTENT_TYPE));
    headers.insert(header::CONTENT_TYPE, kind);
    headers.insert(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    headers
}

/// The kinds of content that pass as they are: what a kubelet's API has, and nothing that runs.
const KINDS: &[&str] = &[
    "text/plain",
    "application/json",
    "application/openmetrics-text",
    "application/vnd.google.protobuf",
];

/// A kind of content that no browser runs: the device's own where it is one, else plain text.
fn harmless(kind: Option<&HeaderValue>) -> HeaderValue {
    let passes = |kind: &&HeaderValue| {
        let text = kind.to_str().unwrap_or_default();
        let essence = text.split(';').next().unwrap_or_default().trim();
        // Of a list a browser takes the last.
        !text.contains(',')
            && KINDS
                .iter()
                .any(|known| essence.eq_ignore_ascii_case(known))
    };
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    kind.filter(passes).cloned().unwrap_or(plain)
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
        let counted = |io, back| Written {
            io: TokioIo::new(io),
            bytes: held.record.bytes.clone(),
            back,
        };
        let outcome = splice::splice(counted(asker, true), counted(edge, false)).await;
        held.record.end = match outcome.error {
            Some(error) => End::Broken(crate::chain(&error)),
            None if outcome.left => End::AskerGone,
            None => End::Complete,
        };
    }
}

/// A connection that counts what is written to it as it is: whoever drops a splice has the number.
struct Written<I> {
    io: I,
    bytes: Arc<audit::Bytes>,
    back: bool,
}

impl<I: AsyncRead + Unpin> AsyncRead for Written<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Written<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.io).poll_write(cx, bytes))?;
        self.bytes.passed(self.back, written);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
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
                let count = frame.data_ref().map_or(0, Bytes::len);
                self.bytes.passed(self.back, count);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_browser_runs_reaches_an_asker() {
        const PLAIN: &str = "text/plain; charset=utf-8";
        for (said, want) in [
            (&[][..], PLAIN),
            (&["text/plain"], "text/plain"),
            (&["Text/Plain; version=0.0.4"], "Text/Plain; version=0.0.4"),
            (&["application/json"], "application/json"),
            (
                &["application/openmetrics-text; version=1.0.0"],
                "application/openmetrics-text; version=1.0.0",
            ),
            (
                &["application/vnd.google.protobuf; encoding=delimited"],
                "application/vnd.google.protobuf; encoding=delimited",
            ),
            (&["text/html"], PLAIN),
            (&["text/html; charset=utf-8"], PLAIN),
            (&["image/svg+xml"], PLAIN),
            (&["application/xhtml+xml"], PLAIN),
            (&["text/javascript"], PLAIN),
            (&["text/plain, text/html"], PLAIN),
            (&["text/plain; a=b, text/html"], PLAIN),
            (&["text/plain", "text/html"], "text/plain"),
            (&[""], PLAIN),
            (&["text/plain\u{ff}"], PLAIN),
        ] {
            let mut headers = HeaderMap::new();
            for kind in said {
                let kind = HeaderValue::from_bytes(kind.as_bytes()).unwrap();
                headers.append(header::CONTENT_TYPE, kind);
            }
            let passed = to_asker(&headers);
            let kinds: Vec<_> = passed.get_all(header::CONTENT_TYPE).iter().collect();
            assert_eq!(kinds, [want], "{said:?}");
            assert_eq!(passed[header::X_CONTENT_TYPE_OPTIONS], "nosniff");
        }
    }

    #[test]
    fn a_logs_refusal_has_a_status_whose_words_the_api_server_hands_on() {
        for (path, status, want) in [
            ("/containerLogs/a/b/c", 429, 500),
            ("/containerLogs/a/b/c", 503, 500),
            ("/containerLogs/a/b/c", 504, 500),
            ("/containerLogs/a/b/c", 502, 502),
            ("/containerLogs/a/b/c", 404, 404),
            ("/containerLogs/a/b/c", 200, 200),
            ("/exec/a/b/c", 503, 503),
            ("/pods", 429, 429),
            ("/metrics", 504, 504),
        ] {
            let target = Target::parse(path).unwrap();
            let got = readable(&target, StatusCode::from_u16(status).unwrap());
            assert_eq!(got.as_u16(), want, "{path} {status}");
        }
    }

    #[test]
    fn only_what_is_spliced_may_switch_protocols() {
        for (path, may) in [
            ("/exec/a/b/c", true),
            ("/attach/a/b/c", true),
            ("/portForward/a/b", true),
            ("/run/a/b/c", false),
            ("/containerLogs/a/b/c", false),
            ("/pods", false),
            ("/metrics/cadvisor", false),
        ] {
            assert_eq!(Target::parse(path).unwrap().switches(), may, "{path}");
        }
    }
}
