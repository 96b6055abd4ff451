//! The kubelet's API over TLS, on one port for each node.
//!
//! - Owns: the connections of its ports; they end with their listener.
//! - Takes: whoever dials. The port alone says which node is meant.
//! - Gives: requests to `auth` and, when they may, to `tunnel`; answers and refusals.
//! - Never: waits for a handshake, a stranger or an idle connection without end; takes a name, a
//!   host or a path for the node.
//!
//! A client certificate is asked for and not demanded, and TLS checks only that the client holds its
//! key: a wrong one then gets `401` with words, as of a kubelet, and not a broken connection.

mod connections;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use common::ahead::ReadAhead;
use common::ids::NodeName;
use common::stream::request::Target;
use common::stream::{BUFFER, LONGEST_HEAD, gate::gate};
use http::{HeaderValue, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::AlertDescription;
use rustls::pki_types::CertificateDer;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::auth::{Auth, Refused, attributes};
use super::metrics::{Metrics, Reason};
use super::serving::ServingTls;
use super::tunnel::{Answer, Left, NoAnswer, Splice, Tunnels, readable, text};
use connections::{Connections, OF_A_NODE};

const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes under way on all ports, and on one: whoever stalls there holds up one node's callers,
/// for ten seconds.
const ALL_HANDSHAKES: usize = 512;
const HANDSHAKES: usize = 32;
/// For a connection's first head: until then it is a stranger's. Whose request then turns out to be
/// nobody's loses the connection with the answer.
const STRANGER: Duration = Duration::from_secs(10);
/// For a head to come in whole, and between two requests.
const IDLE: Duration = Duration::from_secs(60);
/// A peer whose machine vanished is noticed within two minutes, also in the middle of a silent
/// `logs -f`. While bytes are on their way to it the kernel's retransmissions take the place of
/// these, and give up within a quarter of an hour. `TCP_USER_TIMEOUT` would be sooner, but ends
/// readers that stand still and answer every probe as well (seen on Linux 6.18).
const PROBE: Duration = Duration::from_secs(30);
const PROBES: u32 = 3;

/// What all ports share.
pub(super) struct Server {
    tls: ServingTls,
    auth: Auth,
    tunnels: Tunnels,
    metrics: Metrics,
    handshakes: Semaphore,
    connections: Connections,
}

/// What the connections of one port share.
struct Port {
    node: NodeName,
    shaking: Semaphore,
    /// Cancelled when its listener ends.
    closing: CancellationToken,
}

impl Server {
    pub(super) fn new(tls: ServingTls, auth: Auth, tunnels: Tunnels, metrics: Metrics) -> Self {
        Self {
            tls,
            auth,
            tunnels,
            metrics,
            handshakes: Semaphore::new(ALL_HANDSHAKES),
            connections: Connections::of_this_process(),
        }
    }

    /// Serves one node's port; dropped, its connections and tunnels end. `closing` may be cancelled
    /// before that: what then ends is known to end by us.
    pub(super) async fn listen(
        self: Arc<Self>,
        node: NodeName,
        listener: TcpListener,
        closing: CancellationToken,
    ) {
        let here = Arc::new(Semaphore::new(OF_A_NODE));
        let port = Arc::new(Port {
            node,
            shaking: Semaphore::new(HANDSHAKES),
            closing,
        });
        let mut connections = JoinSet::new();
        // Dropped before the connections are.
        let _closes = port.closing.clone().drop_guard();
        loop {
            tokio::select! {
                biased;
                Some(_) = connections.join_next(), if !connections.is_empty() => {}
                (place, accepted) = async {
                    if here.available_permits() == 0 {
                        self.connections.node_is_full(&port.node);
                    }
                    let place = here.clone().acquire_owned().await.ok();
                    (place, listener.accept().await)
                } => match accepted {
                    Ok((stream, _)) => {
                        let (server, port) = (self.clone(), port.clone());
                        connections.spawn(async move {
                            server.connection(&port, stream).await;
                            drop(place);
                        });
                    }
                    // Out of file descriptors, most likely: without a pause this would spin.
                    Err(error) => {
                        debug!(node = %port.node, %error, "a connection was not accepted");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
            }
        }
    }

    async fn connection(&self, port: &Port, stream: TcpStream) {
        let Some(_place) = self.connections.take(self.metrics.endpoints_now()) else {
            self.metrics.refused(Reason::Handshake);
            return;
        };
        let stream = match timeout(HANDSHAKE, self.handshake(stream, &port.shaking)).await {
            Ok(Some(stream)) => stream,
            Ok(None) | Err(_) => {
                self.metrics.refused(Reason::Handshake);
                return;
            }
        };
        if let Some(splice) = self.serve(port, stream).await {
            splice.run().await;
        }
    }

    async fn handshake(
        &self,
        stream: TcpStream,
        shaking: &Semaphore,
    ) -> Option<TlsStream<ReadAhead<TcpStream>>> {
        probe(&stream);
        let _ = stream.set_nodelay(true);
        let _here = shaking.acquire().await;
        let _place = self.handshakes.acquire().await;
        let acceptor = TlsAcceptor::from(self.tls.config());
        let accepted = acceptor.accept_with(ReadAhead::new(stream), |tls| {
            tls.set_buffer_limit(Some(BUFFER))
        });
        match accepted.await {
            Ok(stream) => Some(stream),
            Err(error) => {
                debug!(%error, "a handshake failed");
                if is_mistrust(&error) {
                    self.tls.mistrusted();
                }
                None
            }
        }
    }

    /// Answers the connection's requests; what an upgrade leaves is given back.
    async fn serve(&self, port: &Port, stream: TlsStream<ReadAhead<TcpStream>>) -> Option<Splice> {
        let node = &port.node;
        let chain = stream.get_ref().1.peer_certificates();
        let chain: Vec<CertificateDer<'static>> = chain.unwrap_or_default().to_vec();
        let left = Mutex::new(None);
        let came = Notify::new();
        let (stream, gate) = gate(stream);
        let service = service_fn(|request| async {
            came.notify_one();
            let (answer, splice) = self.answer(port, &chain, request).await;
            *left.lock().unwrap_or_else(PoisonError::into_inner) = splice;
            Ok::<_, std::convert::Infallible>(answer.map(|body| gate.before(body)))
        });
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(IDLE)
            .max_buf_size(LONGEST_HEAD)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        let stays_strange = async {
            if timeout(STRANGER, came.notified()).await.is_ok() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            served = served => if let Err(error) = served {
                debug!(%node, %error, "a connection ended early");
            },
            () = stays_strange => {
                self.metrics.refused(Reason::Unauthenticated);
                debug!(%node, "a connection asked nothing");
            }
        }
        left.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    async fn answer(
        &self,
        port: &Port,
        chain: &[CertificateDer<'static>],
        request: Request<Incoming>,
    ) -> (Answer, Left) {
        match self.judged(port, chain, request).await {
            Ok(carried) => carried,
            Err(refusal) => {
                self.metrics.refused(refusal.reason());
                if let Refusal::Auth(error) = &refusal {
                    debug!(node = %port.node, error = %crate::chain(error), "a request was refused");
                }
                (refusal.answer(), None)
            }
        }
    }

    async fn judged(
        &self,
        port: &Port,
        chain: &[CertificateDer<'static>],
        request: Request<Incoming>,
    ) -> Result<(Answer, Left), Refusal> {
        let node = &port.node;
        let user = self.auth.authenticate(chain, request.headers()).await?;
        let target = Target::parse(request.uri().path());
        let asked = attributes(request.method(), target.as_ref())?;
        self.auth.authorize(&user, node, asked).await?;
        let target = target.ok_or(Refusal::UnknownPath)?;
        let carried = self
            .tunnels
            .carry(node, &user, &target, &port.closing, request);
        carried
            .await
            .map_err(|none| Refusal::NoAnswer(none, target))
    }
}

/// Why a request goes no further.
enum Refusal {
    Auth(Refused),
    UnknownPath,
    NoAnswer(NoAnswer, Target),
}

impl From<Refused> for Refusal {
    fn from(refused: Refused) -> Self {
        Refusal::Auth(refused)
    }
}

impl Refusal {
    fn reason(&self) -> Reason {
        match self {
            Refusal::Auth(refused) => match refused {
                Refused::NoCredentials | Refused::BadCredentials(_) => Reason::Unauthenticated,
                Refused::Forbidden { .. } | Refused::Method(_) => Reason::Forbidden,
                Refused::NotJudged { .. } | Refused::NotAuthenticated(_) | Refused::NoClientCa => {
                    Reason::NotJudged
                }
            },
            Refusal::UnknownPath => Reason::UnknownPath,
            Refusal::NoAnswer(none, _) => none.reason(),
        }
    }

    fn answer(&self) -> Answer {
        let (status, words, retry_after) = match self {
            Refusal::Auth(refused) => (refused.status(), refused.to_string(), None),
            Refusal::UnknownPath => (StatusCode::NOT_FOUND, "404 page not found".to_owned(), None),
            Refusal::NoAnswer(none, target) => {
                let status = readable(target, none.status());
                (status, none.to_string(), none.retry_after())
            }
        };
        let mut answer = Response::new(text(format!("{words}\n")));
        *answer.status_mut() = status;
        let headers = answer.headers_mut();
        let plain = HeaderValue::from_static("text/plain; charset=utf-8");
        headers.insert(header::CONTENT_TYPE, plain);
        let nosniff = HeaderValue::from_static("nosniff");
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, nosniff);
        if let Some(seconds) = retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if matches!(self, Refusal::Auth(refused) if refused.is_stranger()) {
            // A place is not kept for nobody.
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        answer
    }
}

/// Without it the connection only lives longer.
fn probe(stream: &TcpStream) {
    let probes = TcpKeepalive::new()
        .with_time(PROBE)
        .with_interval(PROBE)
        .with_retries(PROBES);
    let _ = SockRef::from(stream).set_tcp_keepalive(&probes);
}

/// The peer does not believe our certificate: an API server that was given
/// `--kubelet-certificate-authority`.
fn is_mistrust(error: &std::io::Error) -> bool {
    let inner = error.get_ref().and_then(|e| e.downcast_ref());
    matches!(
        inner,
        Some(rustls::Error::AlertReceived(
            AlertDescription::BadCertificate
                | AlertDescription::UnsupportedCertificate
                | AlertDescription::CertificateUnknown
                | AlertDescription::UnknownCA
        ))
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_peer_that_vanished_is_noticed_within_two_minutes() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await;
        let stream = stream.unwrap();
        probe(&stream);
        let socket = SockRef::from(&stream);
        let (time, interval) = (socket.tcp_keepalive_time(), socket.tcp_keepalive_interval());
        let retries = socket.tcp_keepalive_retries().unwrap();
        let noticed = time.unwrap() + interval.unwrap() * retries;
        assert!(socket.keepalive().unwrap());
        assert!(noticed <= Duration::from_secs(120), "{noticed:?}");
    }
}
