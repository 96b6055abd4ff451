//! WebSocket over TLS: the fallback where UDP does not pass. Carries the frames of [`super::mux`].
//!
//! Owns one socket and one small task a connection (the driver); the handles share the mux with it
//! behind a short lock that nothing awaits under. The dialling side pings; each side has its own
//! deadline, so that a link that is dead in one direction is noticed at both ends.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use futures::task::AtomicWaker;
use rustls_pki_types::CertificateDer;
use tokio::io::ReadBuf;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio_rustls::{TlsConnector, TlsStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tokio_tungstenite::tungstenite::http::{HeaderValue, StatusCode, header};
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{self, error::ProtocolError};

use super::mux::{Event, MAX_MESSAGE, Mux, Read, Side};
use super::tls::ClientTls;
use super::transport::{Class, Connection, Link, LinkConfig, Tally, TransportError};

mod driver;
pub(super) mod socket;

use socket::Socket;

/// Where the listener takes upgrades.
const PATH: &str = "/hub";
/// Names the frames inside, so that a later mux can stand beside this one.
const SUBPROTOCOL: &str = "edge-mux.1";

type Wire = WebSocketStream<TlsStream<Socket>>;

/// What is handed to TLS, and so to the kernel, at once at most. A connection that was busy keeps a
/// buffer of this.
const TOGETHER: usize = 64 * 1024;

/// The library's defaults cost 128 KiB a connection; frames are bounded before allocation. A resting
/// connection keeps its read buffer; what is longer is read into a buffer of its own length.
fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(512)
        .write_buffer_size(TOGETHER)
        .max_write_buffer_size(TOGETHER + 2 * MAX_MESSAGE)
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE))
}

/// Dials one address and upgrades.
pub(super) async fn dial(
    address: SocketAddr,
    tls: &ClientTls,
    link: &LinkConfig,
) -> Result<Connection, TransportError> {
    let stream = connect(address, tls, link).await?;
    let mut request = format!("wss://{}{PATH}", tls.name.to_str())
        .into_client_request()
        .map_err(TransportError::unusable)?;
    let protocol = HeaderValue::from_static(SUBPROTOCOL);
    request
        .headers_mut()
        .insert(header::SEC_WEBSOCKET_PROTOCOL, protocol);
    let stream = TlsStream::Client(stream);
    let (ws, _) = tokio_tungstenite::client_async_with_config(request, stream, Some(config()))
        .await
        .map_err(upgrade_error)?;
    Ok(start(ws, address, Side::Dialler, link))
}

/// TCP and TLS to one address; for a session and for joining.
pub(super) async fn connect(
    address: SocketAddr,
    tls: &ClientTls,
    link: &LinkConfig,
) -> Result<tokio_rustls::client::TlsStream<Socket>, TransportError> {
    // The place where an HTTP proxy (CONNECT) comes in: it hands back a connected stream.
    let tcp = TcpStream::connect(address)
        .await
        .map_err(TransportError::unusable)?;
    let socket = Socket::new(tcp, link.dead_after, None).map_err(TransportError::unusable)?;
    let connector = TlsConnector::from(tls.config.clone());
    connector
        .connect(tls.name.clone(), socket)
        .await
        .map_err(|e| match tls.verdict() {
            Some(verdict) => TransportError::Trust(verdict),
            None => TransportError::from_io(e),
        })
}

/// Takes the upgrade of an authenticated client.
pub(super) async fn accept(
    stream: tokio_rustls::server::TlsStream<Socket>,
    remote: SocketAddr,
    link: &LinkConfig,
) -> Result<Connection, TransportError> {
    let stream = TlsStream::Server(stream);
    let ws = tokio_tungstenite::accept_hdr_async_with_config(stream, check, Some(config()))
        .await
        .map_err(upgrade_error)?;
    Ok(start(ws, remote, Side::Listener, link))
}

#[expect(clippy::result_large_err, reason = "the signature is the library's")]
fn check(request: &Request, mut response: Response) -> Result<Response, ErrorResponse> {
    let refuse = |status| {
        let mut refusal = ErrorResponse::new(None);
        *refusal.status_mut() = status;
        Err(refusal)
    };
    if request.uri().path() != PATH {
        return refuse(StatusCode::NOT_FOUND);
    }
    let asked = request.headers().get(header::SEC_WEBSOCKET_PROTOCOL);
    if asked.and_then(|v| v.to_str().ok()) != Some(SUBPROTOCOL) {
        return refuse(StatusCode::BAD_REQUEST);
    }
    let protocol = HeaderValue::from_static(SUBPROTOCOL);
    response
        .headers_mut()
        .insert(header::SEC_WEBSOCKET_PROTOCOL, protocol);
    Ok(response)
}

fn upgrade_error(error: tungstenite::Error) -> TransportError {
    use tungstenite::Error as E;
    match error {
        E::Io(e) => TransportError::from_io(e),
        E::Http(answer) => TransportError::Protocol(format!(
            "the WebSocket upgrade was answered with HTTP status {}",
            answer.status()
        )),
        other => TransportError::unusable(other),
    }
}

/// What ends a running connection.
fn wire_error(error: tungstenite::Error) -> TransportError {
    use tungstenite::Error as E;
    match error {
        E::Io(e) => TransportError::from_io(e),
        E::Capacity(e) => TransportError::Protocol(e.to_string()),
        E::Protocol(ProtocolError::ResetWithoutClosingHandshake) => TransportError::gone(),
        E::Protocol(e) => TransportError::Protocol(e.to_string()),
        E::ConnectionClosed | E::AlreadyClosed => TransportError::gone(),
        other => TransportError::unusable(other),
    }
}

fn start(ws: Wire, remote: SocketAddr, side: Side, link: &LinkConfig) -> Connection {
    let peer: Vec<CertificateDer<'static>> = ws
        .get_ref()
        .get_ref()
        .1
        .peer_certificates()
        .map(<[_]>::to_vec)
        .unwrap_or_default();
    let (ours, theirs) = link.streams(side);
    let core = Arc::new(Core {
        state: Mutex::new(State {
            mux: Mux::new(side, usize::from(ours), usize::from(theirs)),
            wakers: BTreeMap::new(),
            ended: None,
            ponged: false,
        }),
        driver: AtomicWaker::new(),
        changed: Notify::new(),
        remote,
    });
    let driver = Box::new(driver::Driver::new(ws, core.clone(), side, link));
    // The connection's own task, as quinn has one; it ends with the connection.
    tokio::spawn(driver.run());
    let handle = Arc::new(Handle { core });
    let link = Link::WebSocket(WsLink { handle });
    Connection::new(link, peer, Arc::new(Tally::default()))
}

/// What the handles and the driver share.
struct Core {
    state: Mutex<State>,
    driver: AtomicWaker,
    /// A stream came in, a place became free, or the connection ended.
    changed: Notify,
    remote: SocketAddr,
}

struct State {
    mux: Mux,
    /// Who waits on which stream: reader and writer. At most one entry a stream.
    wakers: BTreeMap<u32, [Option<Waker>; 2]>,
    ended: Option<TransportError>,
    /// The peer answered a ping since the driver looked.
    ponged: bool,
}

const READER: usize = 0;
const WRITER: usize = 1;

impl Core {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic under the lock leaves a mux that is whole at each step: go on.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls the mux and sees to those whom it concerns.
    fn with<T>(&self, call: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let result = call(&mut state);
        let mut changed = false;
        let mut woken = Vec::new();
        while let Some(event) = state.mux.next_event() {
            match event {
                Event::Readable(id) => woken.extend(state.take_waker(id, READER)),
                Event::Writable(id) => woken.extend(state.take_waker(id, WRITER)),
                Event::Incoming | Event::Slot => changed = true,
                Event::Pong(_) => state.ponged = true,
            }
        }
        drop(state);
        woken.into_iter().for_each(Waker::wake);
        if changed {
            self.changed.notify_waiters();
        }
        result
    }

    /// A handle's call: the driver is woken when there is something to send.
    fn call<T>(&self, call: impl FnOnce(&mut State) -> T) -> T {
        let (result, output) = self.with(|state| {
            let result = call(state);
            (result, state.mux.has_output())
        });
        if output {
            self.driver.wake();
        }
        result
    }

    fn end(&self, why: TransportError) {
        let mut state = self.lock();
        state.ended.get_or_insert(why);
        let wakers = std::mem::take(&mut state.wakers);
        drop(state);
        wakers
            .into_values()
            .flatten()
            .flatten()
            .for_each(Waker::wake);
        self.changed.notify_waiters();
    }

    /// Waits until `attempt` gives something or the connection has ended.
    async fn until<T>(
        &self,
        mut attempt: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T, TransportError> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(end) = self.lock().ended.clone() {
                return Err(end);
            }
            if let Some(result) = self.call(&mut attempt) {
                return Ok(result);
            }
            changed.await;
        }
    }
}

impl State {
    fn take_waker(&mut self, id: u32, which: usize) -> Option<Waker> {
        self.wakers.get_mut(&id).and_then(|pair| pair[which].take())
    }

    fn read(
        &mut self,
        id: u32,
        max: usize,
        cx: &Context<'_>,
    ) -> Poll<Result<Option<Bytes>, TransportError>> {
        // What had arrived before the end of the connection is still given.
        match self.mux.read(id, max) {
            Ok(Read::Bytes(bytes)) => return Poll::Ready(Ok(Some(bytes))),
            Ok(Read::End) => return Poll::Ready(Ok(None)),
            Ok(Read::Blocked) => {}
            Err(end) => return Poll::Ready(Err(end.into())),
        }
        if let Some(end) = &self.ended {
            return Poll::Ready(Err(end.clone()));
        }
        self.park(id, READER, cx);
        Poll::Pending
    }

    fn park(&mut self, id: u32, which: usize, cx: &Context<'_>) {
        self.wakers.entry(id).or_default()[which] = Some(cx.waker().clone());
    }

    /// Nobody waits on this half any more.
    fn unpark(&mut self, id: u32, which: usize) {
        if let Some(pair) = self.wakers.get_mut(&id) {
            pair[which] = None;
            if pair.iter().all(Option::is_none) {
                self.wakers.remove(&id);
            }
        }
    }
}

/// Dropped with the last handle of connection and streams.
struct Handle {
    core: Arc<Core>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.core.call(|s| s.mux.close(0, ""));
    }
}

#[derive(Clone)]
pub(super) struct WsLink {
    handle: Arc<Handle>,
}

impl WsLink {
    fn core(&self) -> &Core {
        &self.handle.core
    }

    pub(super) async fn open(&self, class: Class) -> Result<(WsSend, WsRecv), TransportError> {
        let id = self.core().until(|s| s.mux.open(class)).await?;
        Ok(self.halves(id))
    }

    pub(super) async fn accept(&self) -> Result<(Class, WsSend, WsRecv), TransportError> {
        let (id, class) = self.core().until(|s| s.mux.accept()).await?;
        let (send, recv) = self.halves(id);
        Ok((class, send, recv))
    }

    fn halves(&self, id: u32) -> (WsSend, WsRecv) {
        let (send, recv) = (self.handle.clone(), self.handle.clone());
        (WsSend { id, handle: send }, WsRecv { id, handle: recv })
    }

    pub(super) fn close(&self, code: u32, reason: &str) {
        self.core().call(|s| s.mux.close(code, reason));
    }

    pub(super) async fn closed(&self) -> TransportError {
        let core = self.core();
        loop {
            let changed = core.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(end) = core.lock().ended.clone() {
                return end;
            }
            changed.await;
        }
    }

    /// Streams in the table, and waiting wakers.
    #[cfg(test)]
    pub(super) fn held(&self) -> (usize, usize) {
        let state = self.core().lock();
        (state.mux.open_streams(), state.wakers.len())
    }

    pub(super) fn remote_address(&self) -> SocketAddr {
        self.core().remote
    }
}

pub(super) struct WsSend {
    id: u32,
    handle: Arc<Handle>,
}

impl WsSend {
    pub(super) async fn write_all(&mut self, mut bytes: Bytes) -> Result<(), TransportError> {
        let (id, core) = (self.id, &self.handle.core);
        std::future::poll_fn(|cx| {
            core.call(|state| {
                if let Some(end) = &state.ended {
                    return Poll::Ready(Err(end.clone()));
                }
                if let Err(end) = state.mux.write(id, &mut bytes) {
                    return Poll::Ready(Err(end.into()));
                }
                if bytes.is_empty() {
                    return Poll::Ready(Ok(()));
                }
                state.park(id, WRITER, cx);
                Poll::Pending
            })
        })
        .await
    }

    /// Takes what there is room for, at least one byte.
    pub(super) fn poll_write(
        &mut self,
        cx: &Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize, TransportError>> {
        let (id, core) = (self.id, &self.handle.core);
        core.call(|state| {
            if let Some(end) = &state.ended {
                return Poll::Ready(Err(end.clone()));
            }
            // Only what is taken is copied: a piece holds all that was copied with it. A byte that
            // is not taken asks to be told when there is room.
            let offered = &bytes[..bytes.len().min(state.mux.room(id).max(1))];
            let mut left = Bytes::copy_from_slice(offered);
            if let Err(end) = state.mux.write(id, &mut left) {
                return Poll::Ready(Err(end.into()));
            }
            let taken = offered.len() - left.len();
            if taken > 0 || offered.is_empty() {
                return Poll::Ready(Ok(taken));
            }
            state.park(id, WRITER, cx);
            Poll::Pending
        })
    }

    pub(super) fn classify(&self, class: Class) {
        self.handle.core.call(|s| s.mux.classify(self.id, class));
    }

    pub(super) fn finish(&mut self) {
        self.handle.core.call(|s| s.mux.finish(self.id));
    }

    pub(super) fn reset(&mut self, code: u32) {
        self.handle.core.call(|s| s.mux.reset(self.id, code));
    }
}

impl Drop for WsSend {
    fn drop(&mut self) {
        self.handle.core.call(|state| {
            state.mux.release_send(self.id);
            state.unpark(self.id, WRITER);
        });
    }
}

pub(super) struct WsRecv {
    id: u32,
    handle: Arc<Handle>,
}

impl WsRecv {
    pub(super) fn poll_read(
        &mut self,
        cx: &Context<'_>,
        max: usize,
    ) -> Poll<Result<Option<Bytes>, TransportError>> {
        self.handle.core.call(|state| state.read(self.id, max, cx))
    }

    /// Fills what there is room for with what has arrived; nothing at the end.
    pub(super) fn poll_read_buf(
        &mut self,
        cx: &Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<Result<(), TransportError>> {
        self.handle.core.call(|state| {
            let Some(bytes) = ready!(state.read(self.id, buffer.remaining(), cx))? else {
                return Poll::Ready(Ok(()));
            };
            buffer.put_slice(&bytes);
            while buffer.remaining() > 0
                && let Ok(Read::Bytes(bytes)) = state.mux.read(self.id, buffer.remaining())
            {
                buffer.put_slice(&bytes);
            }
            Poll::Ready(Ok(()))
        })
    }

    pub(super) fn stop(&mut self, code: u32) {
        self.handle.core.call(|s| s.mux.stop(self.id, code));
    }
}

impl Drop for WsRecv {
    fn drop(&mut self) {
        self.handle.core.call(|state| {
            state.mux.release_recv(self.id);
            state.unpark(self.id, READER);
        });
    }
}
