//! The hub's door: UDP and TCP on one address and port, and the limits for those who knock.
//!
//! Owns both sockets. Gives authenticated sessions and join requests; never anything of a peer that
//! has not completed its handshake. Before that a peer is limited in bytes, in time and in number,
//! all of them and each source. Who the certificate names, and whether it is revoked, is for the
//! taker to ask.
//!
//! ```text
//! UDP ─ QUIC handshake (ALPN edge-hub/1) ──────────────────────┐
//! TCP ─ ClientHello ┬ edge-hub/1: client certificate ─ upgrade ┴▶ Accepted::Session
//!                   └ edge-join/1: one JoinRequest ─────────────▶ Accepted::Join
//! ```

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use prost::Message;
use quinn_proto::Incoming;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_rustls::LazyConfigAcceptor;
use tokio_util::sync::CancellationToken;

use super::proto::{JoinAnswer, JoinRequest};
use super::quic::QuicLink;
use super::tls::{ALPN_HUB, ALPN_JOIN, ServerTls};
use super::transport::{Connection, LinkConfig, TransportError};
use super::ws::socket::Socket;
use super::{quic, ws};

mod gate;

pub use gate::Refused;
use gate::{Gate, Pass};

/// A CSR, an expired certificate and a few words stay far below.
pub const JOIN_REQUEST_LIMIT: usize = 16 * 1024;
/// A chain of certificates and a link with several roots and endpoints.
pub const JOIN_ANSWER_LIMIT: usize = 64 * 1024;
/// What is read of a TCP peer before it is authenticated: hello, chain and join request, with
/// room for large hellos.
const ALLOWANCE: usize = 64 * 1024;
/// Completed handshakes that wait for a taker: as many as one wake-up can bring; more wait in
/// their own tasks, which count as handshakes.
const READY: usize = 32;

/// What a stranger may cost.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Handshakes and joins under way, all sources together. Each costs some 30 KB and half a
    /// millisecond of a core.
    pub handshakes: usize,
    /// Of one IPv4 address or one IPv6 /64. Shops put many devices behind one address.
    pub per_source: usize,
    /// From the first packet to the session, or to the join request.
    pub deadline: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            handshakes: 512,
            per_source: 64,
            deadline: Duration::from_secs(10),
        }
    }
}

#[derive(Debug, Clone)]
pub struct ListenConfig {
    pub address: SocketAddr,
    pub link: LinkConfig,
    pub limits: Limits,
    /// Shared by the replicas of one cloud and kept over restarts; see `pki::Ca::derive`.
    pub reset_key: [u8; 32],
}

#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("cannot listen on {address} ({what}): is another process using the port?")]
    Bind {
        address: SocketAddr,
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot use the TLS configuration for QUIC")]
    Tls(#[source] TransportError),
}

/// Who came in.
#[derive(Debug)]
pub enum Accepted {
    /// Authenticated by a certificate of our roots.
    Session(Connection),
    Join(JoinStream),
}

/// What the taker holds.
pub struct Listener {
    accepted: mpsc::Receiver<Accepted>,
    shared: Arc<Shared>,
    address: SocketAddr,
}

/// Runs until shutdown, or until its socket cannot be read any more; then handshakes under way are
/// dropped, sessions live on.
pub struct ListenTask {
    tcp: TcpListener,
    strangers: quic::Strangers,
    shared: Arc<Shared>,
    accepted: mpsc::Sender<Accepted>,
}

struct Shared {
    endpoint: Arc<quic::Endpoint>,
    tls: RwLock<ServerTls>,
    link: LinkConfig,
    limits: Limits,
    gate: Arc<Gate>,
}

/// Binds both sockets. Port 0 takes any port that is free for both.
pub async fn bind(
    config: ListenConfig,
    tls: ServerTls,
) -> Result<(Listener, ListenTask), ListenError> {
    let (tcp, udp, address) = bind_pair(config.address).await?;
    let server = quic::server_config(tls.hub.clone(), &config.link).map_err(ListenError::Tls)?;
    let (endpoint, strangers) =
        quic::listen(udp, &config.reset_key, server).map_err(bind_error(address, "QUIC"))?;
    let gate = Gate::new(config.limits.handshakes, config.limits.per_source);
    let shared = Arc::new(Shared {
        endpoint,
        tls: RwLock::new(tls),
        link: config.link,
        limits: config.limits,
        gate: Arc::new(gate),
    });
    let (sender, accepted) = mpsc::channel(READY);
    let listener = Listener {
        accepted,
        shared: shared.clone(),
        address,
    };
    let task = ListenTask {
        tcp,
        strangers,
        shared,
        accepted: sender,
    };
    Ok((listener, task))
}

async fn bind_pair(
    address: SocketAddr,
) -> Result<(TcpListener, std::net::UdpSocket, SocketAddr), ListenError> {
    // Port 0: the port that TCP was given may be taken for UDP; a few tries suffice.
    let tries = if address.port() == 0 { 16 } else { 1 };
    let mut last = None;
    for _ in 0..tries {
        let tcp = TcpListener::bind(address)
            .await
            .map_err(bind_error(address, "TCP"))?;
        let bound = tcp.local_addr().map_err(bind_error(address, "TCP"))?;
        match std::net::UdpSocket::bind(bound) {
            Ok(udp) => return Ok((tcp, udp, bound)),
            Err(source) => last = Some(source),
        }
    }
    let source = last.unwrap_or_else(|| std::io::ErrorKind::AddrInUse.into());
    Err(bind_error(address, "UDP")(source))
}

fn bind_error(address: SocketAddr, what: &'static str) -> impl Fn(std::io::Error) -> ListenError {
    move |source| ListenError::Bind {
        address,
        what,
        source,
    }
}

impl Listener {
    /// The next peer, or nothing after the task has ended. Cancel-safe.
    pub async fn accept(&mut self) -> Option<Accepted> {
        self.accepted.recv().await
    }

    /// The address bound, with its port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on shows other credentials, or trusts other roots. Running sessions stay.
    pub fn replace_tls(&self, tls: ServerTls) -> Result<(), ListenError> {
        let server =
            quic::server_config(tls.hub.clone(), &self.shared.link).map_err(ListenError::Tls)?;
        self.shared.endpoint.set_server_config(Some(server));
        *self
            .shared
            .tls
            .write()
            .unwrap_or_else(PoisonError::into_inner) = tls;
        Ok(())
    }

    /// Waits until the last words of closed QUIC sessions have left, at most `limit`. Before the
    /// process ends.
    pub async fn drain(&self, limit: Duration) {
        // Whoever has not acknowledged by then learns it from silence.
        drop(tokio::time::timeout(limit, self.shared.endpoint.idle()).await);
    }

    /// How many were turned away, by reason.
    pub fn refused(&self) -> Refused {
        self.shared.gate.refused()
    }
}

impl ListenTask {
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut handshakes = JoinSet::new();
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                // Reaps what has ended; a panic inside ends that handshake alone.
                Some(_) = handshakes.join_next() => {}
                stranger = self.strangers.recv() => {
                    let Some(stranger) = stranger else {
                        tracing::error!("the UDP socket is not read any more");
                        break;
                    };
                    if let Some((link, pass)) = self.shared.admit_quic(stranger) {
                        handshakes.spawn(self.door().quic(link, pass));
                    }
                }
                tcp = self.tcp.accept() => match tcp {
                    Ok((tcp, remote)) => {
                        if let Some(pass) = self.shared.admit(remote) {
                            handshakes.spawn(self.door().tcp(tcp, remote, pass));
                        }
                    }
                    Err(error) => {
                        // Out of file descriptors, most likely: without a pause this would spin.
                        tracing::warn!(%error, "cannot accept a TCP connection");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
            }
        }
        // New QUIC connections are refused; the endpoint serves those that exist.
        self.shared.endpoint.set_server_config(None);
        self.strangers.close();
        while let Ok(stranger) = self.strangers.try_recv() {
            self.shared.endpoint.refuse(stranger);
        }
    }

    fn door(&self) -> Door {
        Door {
            shared: self.shared.clone(),
            accepted: self.accepted.clone(),
        }
    }
}

impl Shared {
    fn admit(&self, remote: SocketAddr) -> Option<Pass> {
        self.gate.enter(remote.ip())
    }

    fn admit_quic(&self, stranger: Incoming) -> Option<(QuicLink, Pass)> {
        let remote = stranger.remote_address();
        // Addresses of UDP can be forged: when it gets crowded, each must answer once first.
        if self.gate.is_crowded() && stranger.may_retry() && !stranger.remote_address_validated() {
            self.endpoint.retry(stranger);
            return None;
        }
        let Some(pass) = self.gate.enter(remote.ip()) else {
            self.endpoint.refuse(stranger);
            return None;
        };
        match self.endpoint.admit(stranger) {
            Ok(link) => Some((link, pass)),
            Err(error) => {
                self.gate.failed(remote, &error.into());
                None
            }
        }
    }
}

/// One handshake's way in.
struct Door {
    shared: Arc<Shared>,
    accepted: mpsc::Sender<Accepted>,
}

impl Door {
    async fn quic(self, link: QuicLink, pass: Pass) {
        let remote = link.remote_address();
        let shake = async { Ok(Accepted::Session(quic::accept(link).await?)) };
        self.enter(remote, pass, Box::pin(shake)).await;
    }

    async fn tcp(self, tcp: TcpStream, remote: SocketAddr, pass: Pass) {
        let shared = self.shared.clone();
        // Boxed, so that what stays of the handshake is small.
        let shake = Box::pin(async move { shared.shake(tcp, remote).await });
        self.enter(remote, pass, shake).await;
    }

    async fn enter(
        self,
        remote: SocketAddr,
        pass: Pass,
        shake: impl Future<Output = Result<Accepted, TransportError>>,
    ) {
        let deadline = self.shared.limits.deadline;
        let result = tokio::time::timeout(deadline, shake).await;
        let accepted = match result {
            Ok(Ok(Accepted::Join(join))) => Accepted::Join(JoinStream {
                // A join counts until it is answered, since the answer costs API requests.
                pass: Some(pass),
                ..join
            }),
            Ok(Ok(Accepted::Session(connection))) => {
                // The taker may be slow; the handshake counts until it has been taken.
                if self
                    .accepted
                    .send(Accepted::Session(connection))
                    .await
                    .is_err()
                {
                    tracing::debug!(%remote, "nobody takes sessions any more");
                }
                drop(pass);
                return;
            }
            Ok(Err(error)) => return self.shared.gate.failed(remote, &error),
            Err(_) => {
                let error = TransportError::Timeout("the handshake took too long");
                return self.shared.gate.failed(remote, &error);
            }
        };
        if self.accepted.send(accepted).await.is_err() {
            tracing::debug!(%remote, "nobody takes joins any more");
        }
    }
}

impl Shared {
    async fn shake(&self, tcp: TcpStream, remote: SocketAddr) -> Result<Accepted, TransportError> {
        let socket = Socket::new(tcp, self.link.dead_after, Some(ALLOWANCE))
            .map_err(TransportError::unusable)?;
        let acceptor = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), socket);
        let start = acceptor.await.map_err(TransportError::from_io)?;
        let tls = self
            .tls
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let face = start.client_hello().alpn().and_then(|mut offered| {
            offered.find_map(|p| match p {
                ALPN_HUB => Some(Face::Hub),
                ALPN_JOIN => Some(Face::Join),
                _another_protocol => None,
            })
        });
        match face {
            Some(Face::Hub) => {
                let mut stream = start
                    .into_stream(tls.hub)
                    .await
                    .map_err(TransportError::from_io)?;
                stream.get_mut().0.trust();
                Ok(Accepted::Session(
                    ws::accept(stream, remote, &self.link).await?,
                ))
            }
            Some(Face::Join) => {
                let stream = start
                    .into_stream(tls.join)
                    .await
                    .map_err(TransportError::from_io)?;
                Ok(Accepted::Join(JoinStream::read(stream, remote).await?))
            }
            None => Err(TransportError::Protocol(
                "neither a session nor a join was asked for".into(),
            )),
        }
    }
}

enum Face {
    Hub,
    Join,
}

/// A device that asks to join. It has shown nothing yet but its request.
pub struct JoinStream {
    request: Box<JoinRequest>,
    remote: SocketAddr,
    /// Boxed: a join waits in the same queue as sessions, which are a few words.
    stream: Box<tokio_rustls::server::TlsStream<Socket>>,
    pass: Option<Pass>,
}

impl JoinStream {
    async fn read(
        mut stream: tokio_rustls::server::TlsStream<Socket>,
        remote: SocketAddr,
    ) -> Result<Self, TransportError> {
        let bytes = read_framed(&mut stream, JOIN_REQUEST_LIMIT).await?;
        let request = Box::new(decode_request(&bytes)?);
        Ok(Self {
            request,
            remote,
            stream: Box::new(stream),
            pass: None,
        })
    }

    /// What it asks. Holds the token's secret: never log it whole.
    pub fn request(&self) -> &JoinRequest {
        &self.request
    }

    pub fn remote_address(&self) -> SocketAddr {
        self.remote
    }

    /// Answers and hangs up; within 10 s, or the device is left without.
    pub async fn answer(mut self, answer: &JoinAnswer) -> Result<(), TransportError> {
        let write = async {
            write_framed(&mut self.stream, &answer.encode_to_vec()).await?;
            self.stream
                .shutdown()
                .await
                .map_err(TransportError::from_io)?;
            // The device hangs up when it has read; a reset must not overtake the answer.
            let mut rest = [0; 64];
            while self.stream.read(&mut rest).await.is_ok_and(|n| n > 0) {}
            Ok(())
        };
        let written = tokio::time::timeout(Duration::from_secs(10), write).await;
        drop(self.pass.take());
        written.unwrap_or(Err(TransportError::Timeout(
            "the device does not take its answer",
        )))
    }
}

impl std::fmt::Debug for JoinStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JoinStream")
            .field("remote", &self.remote)
            .finish_non_exhaustive()
    }
}

/// Reads a join request as it came in.
pub fn decode_request(bytes: &[u8]) -> Result<JoinRequest, TransportError> {
    JoinRequest::decode(bytes)
        .map_err(|_| TransportError::Protocol("the join request is unreadable".into()))
}

pub(super) async fn read_framed(
    stream: &mut (impl tokio::io::AsyncRead + Unpin),
    limit: usize,
) -> Result<Vec<u8>, TransportError> {
    let size = stream.read_u32().await.map_err(TransportError::from_io)?;
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    if size > limit {
        return Err(TransportError::TooLarge { size, limit });
    }
    let mut bytes = vec![0; size];
    stream
        .read_exact(&mut bytes)
        .await
        .map_err(TransportError::from_io)?;
    Ok(bytes)
}

pub(super) async fn write_framed(
    stream: &mut (impl tokio::io::AsyncWrite + Unpin),
    bytes: &[u8],
) -> Result<(), TransportError> {
    let length = u32::try_from(bytes.len()).map_err(|_| TransportError::TooLarge {
        size: bytes.len(),
        limit: u32::MAX as usize,
    })?;
    let mut framed = Vec::with_capacity(4 + bytes.len());
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(bytes);
    stream
        .write_all(&framed)
        .await
        .map_err(TransportError::from_io)?;
    stream.flush().await.map_err(TransportError::from_io)
}

#[cfg(test)]
#[path = "listen/tests.rs"]
mod tests;
