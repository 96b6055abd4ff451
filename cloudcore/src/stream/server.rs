//! The kubelet's API over TLS, on one port for each node.
//!
//! - Owns: the connections of its ports; they end with their listener.
//! - Takes: whoever dials. The port alone says which node is meant.
//! - Gives: requests to `auth` and, when they may, to `tunnel`; answers and refusals.
//! - Never: waits for a handshake or an idle connection without end; takes a name, a host or a path
//!   for the node.
//!
//! A client certificate is asked for and not demanded, and TLS checks only that the client holds its
//! key: a wrong one then gets `401` with words, as of a kubelet, and not a broken connection.

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
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tracing::debug;

use super::auth::{Auth, Refused, attributes};
use super::metrics::{Metrics, Reason};
use super::serving::ServingTls;
use super::tunnel::{Answer, Left, NoAnswer, Splice, Tunnels, text};

const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes under way on all ports, and on one: whoever stalls there holds up one node's callers,
/// for ten seconds.
const ALL_HANDSHAKES: usize = 512;
const HANDSHAKES: usize = 32;
/// Of one node: its tunnels, as many idle ones of API servers and scrapers.
const CONNECTIONS: usize = 128;
/// Of all nodes, at about 30 KB when idle.
const ALL_CONNECTIONS: usize = 4096;
/// For a head to come in whole, and between two requests.
const IDLE: Duration = Duration::from_secs(60);
/// A peer whose machine vanished is noticed within two minutes, also in the middle of a silent
/// `logs -f`.
const PROBE: Duration = Duration::from_secs(30);

/// What all ports share.
pub(super) struct Server {
    tls: ServingTls,
    auth: Auth,
    tunnels: Tunnels,
    metrics: Metrics,
    handshakes: Semaphore,
    connections: Semaphore,
}

impl Server {
    pub(super) fn new(tls: ServingTls, auth: Auth, tunnels: Tunnels, metrics: Metrics) -> Self {
        Self {
            tls,
            auth,
            tunnels,
            metrics,
            handshakes: Semaphore::new(ALL_HANDSHAKES),
            connections: Semaphore::new(ALL_CONNECTIONS),
        }
    }

    /// Serves one node's port; dropped, its connections and tunnels end.
    pub(super) async fn listen(self: Arc<Self>, node: NodeName, listener: TcpListener) {
        let here = Arc::new(Semaphore::new(CONNECTIONS));
        let shaking = Arc::new(Semaphore::new(HANDSHAKES));
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                biased;
                Some(_) = connections.join_next(), if !connections.is_empty() => {}
                (place, accepted) = async {
                    let place = here.clone().acquire_owned().await.ok();
                    (place, listener.accept().await)
                } => match accepted {
                    Ok((stream, _)) => {
                        let (server, node) = (self.clone(), node.clone());
                        let shaking = shaking.clone();
                        connections.spawn(async move {
                            server.connection(&node, stream, &shaking).await;
                            drop(place);
                        });
                    }
                    // Out of file descriptors, most likely: without a pause this would spin.
                    Err(error) => {
                        debug!(%node, %error, "a connection was not accepted");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
            }
        }
    }

    async fn connection(&self, node: &NodeName, stream: TcpStream, shaking: &Semaphore) {
        let Ok(_place) = self.connections.try_acquire() else {
            self.metrics.refused(Reason::Handshake);
            return;
        };
        let stream = match timeout(HANDSHAKE, self.handshake(stream, shaking)).await {
            Ok(Some(stream)) => stream,
            Ok(None) | Err(_) => {
                self.metrics.refused(Reason::Handshake);
                return;
            }
        };
        if let Some(splice) = self.serve(node, stream).await {
            splice.run().await;
        }
    }

    async fn handshake(
        &self,
        stream: TcpStream,
        shaking: &Semaphore,
    ) -> Option<TlsStream<ReadAhead<TcpStream>>> {
        let probes = TcpKeepalive::new().with_time(PROBE).with_interval(PROBE);
        // Without them the connection only lives longer.
        let _ = SockRef::from(&stream).set_tcp_keepalive(&probes);
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
    async fn serve(
        &self,
        node: &NodeName,
        stream: TlsStream<ReadAhead<TcpStream>>,
    ) -> Option<Splice> {
        let chain = stream.get_ref().1.peer_certificates();
        let chain: Vec<CertificateDer<'static>> = chain.unwrap_or_default().to_vec();
        let left = Mutex::new(None);
        let (stream, gate) = gate(stream);
        let service = service_fn(|request| async {
            let (answer, splice) = self.answer(node, &chain, request).await;
            *left.lock().unwrap_or_else(PoisonError::into_inner) = splice;
            Ok::<_, std::convert::Infallible>(answer.map(|body| gate.before(body)))
        });
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(IDLE)
            .max_buf_size(LONGEST_HEAD)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades()
            .await;
        if let Err(error) = served {
            debug!(%node, %error, "a connection ended early");
        }
        left.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    async fn answer(
        &self,
        node: &NodeName,
        chain: &[CertificateDer<'static>],
        request: Request<Incoming>,
    ) -> (Answer, Left) {
        match self.judged(node, chain, request).await {
            Ok(carried) => carried,
            Err(refusal) => {
                self.metrics.refused(refusal.reason());
                if let Refusal::Auth(error) = &refusal {
                    debug!(%node, error = %crate::chain(error), "a request was refused");
                }
                (refusal.answer(), None)
            }
        }
    }

    async fn judged(
        &self,
        node: &NodeName,
        chain: &[CertificateDer<'static>],
        request: Request<Incoming>,
    ) -> Result<(Answer, Left), Refusal> {
        let user = self.auth.authenticate(chain, request.headers()).await?;
        let target = Target::parse(request.uri().path());
        let asked = attributes(request.method(), target.as_ref())?;
        self.auth.authorize(&user, node, asked).await?;
        let target = target.ok_or(Refusal::UnknownPath)?;
        Ok(self.tunnels.carry(node, &user, &target, request).await?)
    }
}

/// Why a request goes no further.
enum Refusal {
    Auth(Refused),
    UnknownPath,
    NoAnswer(NoAnswer),
}

impl From<Refused> for Refusal {
    fn from(refused: Refused) -> Self {
        Refusal::Auth(refused)
    }
}

impl From<NoAnswer> for Refusal {
    fn from(none: NoAnswer) -> Self {
        Refusal::NoAnswer(none)
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
            Refusal::NoAnswer(none) => none.reason(),
        }
    }

    fn answer(&self) -> Answer {
        let (status, words, retry_after) = match self {
            Refusal::Auth(refused) => (refused.status(), refused.to_string(), None),
            Refusal::UnknownPath => (StatusCode::NOT_FOUND, "404 page not found".to_owned(), None),
            Refusal::NoAnswer(none) => (none.status(), none.to_string(), none.retry_after()),
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
        answer
    }
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
