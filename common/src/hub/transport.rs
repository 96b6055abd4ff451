//! The seam between the session and what carries it: authenticated connections with streams.
//!
//! Owns the common shape of QUIC and WebSocket connections: classes, stream heads, length-prefixed
//! messages, counters and errors. Nothing above knows which of the two it runs on. An enum and not
//! a trait object, because there are two and both are ours.
//!
//! ```text
//! session ── Connection ──┬── quic  (quinn's protocol, its streams, its flow control)
//!                         └── ws    (TLS, WebSocket, and our mux)
//! stream  = u16 length, StreamHead, then bytes; over QUIC one byte of class in front
//! message = u32 length, bytes
//! ```

use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use prost::Message;
use rustls_pki_types::CertificateDer;
use tokio::io::ReadBuf;
use tokio::sync::Mutex;

use super::mux::Side;
use super::proto::StreamHead;
use super::{quic, ws};
use crate::pki::{NodeIdentity, PkiError};

mod counters;
mod duplex;
mod error;

pub(super) use counters::Tally;
pub use counters::{Counters, Direction, Volume};
pub use duplex::Duplex;
pub(super) use error::code;
pub use error::{Refusal, TransportError};

/// Strict priority: nothing of a lower class is sent while a higher one has something to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    Control,
    Status,
    Interactive,
    Bulk,
}

impl Class {
    pub const COUNT: usize = 4;
    pub const ALL: [Class; Class::COUNT] = [
        Class::Control,
        Class::Status,
        Class::Interactive,
        Class::Bulk,
    ];

    /// The number on the wire.
    pub fn number(self) -> u8 {
        match self {
            Class::Control => 0,
            Class::Status => 1,
            Class::Interactive => 2,
            Class::Bulk => 3,
        }
    }

    /// A class that this version does not know is served last.
    pub fn from_number(n: u32) -> Self {
        match n {
            0 => Class::Control,
            1 => Class::Status,
            2 => Class::Interactive,
            _bulk_or_newer => Class::Bulk,
        }
    }

    pub fn index(self) -> usize {
        usize::from(self.number())
    }
}

/// What carries a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TransportKind {
    Quic,
    WebSocket,
}

impl std::fmt::Display for TransportKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            TransportKind::Quic => "quic",
            TransportKind::WebSocket => "websocket",
        })
    }
}

/// How a connection behaves; the same at both ends unless said otherwise.
#[derive(Debug, Clone)]
pub struct LinkConfig {
    /// QUIC, dialling side only: NAT bindings for UDP last about half a minute.
    pub keep_alive: Duration,
    /// WebSocket, dialling side only: two pings fit into `dead_after`.
    pub ping_every: Duration,
    /// A link on which nothing arrives for this long is dead.
    pub dead_after: Duration,
    /// Streams that the cloud may have open: 64 tunnels and a few of the session's own.
    pub cloud_streams: u16,
    /// Streams that the device may have open: its lanes, and room to grow. Fewer, because quinn
    /// sets aside room at the cloud for each that may come.
    pub device_streams: u16,
    /// QUIC only: what a stream may carry beyond a reader in the cloud. The connection's window is
    /// more than this times all streams of both sides, so that stalled streams never stop the others.
    pub cloud_window: u32,
    /// The same beyond a reader on the device, which holds less of a tunnel besides.
    pub device_window: u32,
    /// QUIC only: probes cost an idle link bytes.
    pub mtu_discovery: bool,
}

impl LinkConfig {
    /// Seconds that `dead_after` may be set to: less would end links that are only slow, more is a
    /// slip.
    pub const DEAD_AFTER: std::ops::RangeInclusive<u64> = 5..=3600;

    /// How many streams an end may open, and how many its peer.
    pub(super) fn streams(&self, side: Side) -> (u16, u16) {
        match side {
            Side::Dialler => (self.device_streams, self.cloud_streams),
            Side::Listener => (self.cloud_streams, self.device_streams),
        }
    }

    /// What a stream may carry beyond a reader at an end, and at its peer's.
    pub(super) fn windows(&self, side: Side) -> (u32, u32) {
        match side {
            Side::Dialler => (self.device_window, self.cloud_window),
            Side::Listener => (self.cloud_window, self.device_window),
        }
    }
}

impl Default for LinkConfig {
    fn default() -> Self {
        Self {
            keep_alive: Duration::from_secs(15),
            ping_every: Duration::from_secs(20),
            dead_after: Duration::from_secs(45),
            cloud_streams: 72,
            device_streams: 8,
            cloud_window: 96 * 1024,
            device_window: 128 * 1024,
            mtu_discovery: false,
        }
    }
}

/// A stream's head is small; a command line of `exec` is the longest thing in it.
const HEAD_LIMIT: usize = 16 * 1024;
/// The head follows the opening at once; a peer that leaves it out loses the stream.
const HEAD_DEADLINE: Duration = Duration::from_secs(10);
/// The code of a stream whose head was missing or unreadable.
pub const CODE_BAD_HEAD: u32 = 2;

/// An authenticated connection. Dropping the last handle and the last stream closes it.
#[derive(Clone)]
pub struct Connection {
    link: Link,
    shared: Arc<Shared>,
}

#[derive(Clone)]
pub(super) enum Link {
    Quic(quic::QuicLink),
    WebSocket(ws::WsLink),
}

struct Shared {
    peer: Vec<CertificateDer<'static>>,
    tally: Arc<Tally>,
    /// Streams whose head is on its way. Bounded by the streams that the peer may open.
    heads: Mutex<FuturesUnordered<BoxFuture<'static, Option<Incoming>>>>,
}

/// A stream that the peer opened.
pub struct Incoming {
    pub head: StreamHead,
    pub class: Class,
    pub send: SendStream,
    pub recv: RecvStream,
}

impl Connection {
    pub(super) fn new(link: Link, peer: Vec<CertificateDer<'static>>, tally: Arc<Tally>) -> Self {
        let shared = Shared {
            peer,
            tally,
            heads: Mutex::new(FuturesUnordered::new()),
        };
        Self {
            link,
            shared: Arc::new(shared),
        }
    }

    /// Opens a stream and says what it is for. Waits while as many as allowed are open.
    pub async fn open(
        &self,
        class: Class,
        head: &StreamHead,
    ) -> Result<(SendStream, RecvStream), TransportError> {
        let encoded = head.encode_to_vec();
        let size = encoded.len();
        let length = u16::try_from(size).ok().filter(|_| size <= HEAD_LIMIT);
        let length = length.ok_or(TransportError::TooLarge {
            size,
            limit: HEAD_LIMIT,
        })?;
        let mut first = BytesMut::with_capacity(3 + size);
        let (raw_send, raw_recv) = match &self.link {
            Link::Quic(link) => {
                first.put_u8(class.number());
                let (send, recv) = link.open(class).await?;
                (RawSend::Quic(send), RawRecv::Quic(recv))
            }
            Link::WebSocket(link) => {
                let (send, recv) = link.open(class).await?;
                (RawSend::WebSocket(send), RawRecv::WebSocket(recv))
            }
        };
        first.put_u16(length);
        first.put_slice(&encoded);
        let (mut send, recv) = self.streams(class, raw_send, raw_recv);
        send.write_all(first.freeze()).await?;
        Ok((send, recv))
    }

    /// The next stream that the peer opened. Cancel-safe. A stream whose head is late holds up no
    /// other.
    pub async fn accept(&self) -> Result<Incoming, TransportError> {
        let mut heads = self.shared.heads.lock().await;
        loop {
            tokio::select! {
                biased;
                Some(done) = heads.next() => if let Some(incoming) = done {
                    return Ok(incoming);
                },
                raw = self.accept_raw() => heads.push(raw?),
            }
        }
    }

    async fn accept_raw(&self) -> Result<BoxFuture<'static, Option<Incoming>>, TransportError> {
        let (class, raw_send, raw_recv) = match &self.link {
            Link::Quic(link) => {
                let (send, recv) = link.accept().await?;
                (None, RawSend::Quic(send), RawRecv::Quic(recv))
            }
            Link::WebSocket(link) => {
                let (class, send, recv) = link.accept().await?;
                (
                    Some(class),
                    RawSend::WebSocket(send),
                    RawRecv::WebSocket(recv),
                )
            }
        };
        let (send, recv) = self.streams(class.unwrap_or(Class::Bulk), raw_send, raw_recv);
        Ok(Box::pin(read_head(class, send, recv)))
    }

    fn streams(&self, class: Class, send: RawSend, recv: RawRecv) -> (SendStream, RecvStream) {
        let tally = self.shared.tally.clone();
        let send = SendStream {
            raw: send,
            class,
            tally: tally.clone(),
            ended: false,
        };
        let recv = RecvStream {
            raw: recv,
            class,
            tally,
            partial: BytesMut::new(),
        };
        (send, recv)
    }

    /// Ends the connection at once; what is not yet sent is lost.
    pub fn close(&self, code: u32, reason: &str) {
        match &self.link {
            Link::Quic(link) => link.close(code, reason),
            Link::WebSocket(link) => link.close(code, reason),
        }
    }

    /// Waits for the end and says why.
    pub async fn closed(&self) -> TransportError {
        match &self.link {
            Link::Quic(link) => link.closed().await,
            Link::WebSocket(link) => link.closed().await,
        }
    }

    /// The peer's chain as verified, leaf first.
    pub fn peer_certificates(&self) -> &[CertificateDer<'static>] {
        &self.shared.peer
    }

    /// Who the peer is by its certificate; for the cloud's end.
    pub fn identity(&self) -> Result<NodeIdentity, PkiError> {
        let leaf = self.shared.peer.first();
        let leaf = leaf.ok_or(PkiError::NotANode("the peer showed no certificate"))?;
        NodeIdentity::from_certificate(leaf)
    }

    /// Over QUIC it may change while the connection lives.
    pub fn remote_address(&self) -> SocketAddr {
        match &self.link {
            Link::Quic(link) => link.remote_address(),
            Link::WebSocket(link) => link.remote_address(),
        }
    }

    #[cfg(test)]
    pub(super) fn link(&self) -> &Link {
        &self.link
    }

    pub fn kind(&self) -> TransportKind {
        match &self.link {
            Link::Quic(_) => TransportKind::Quic,
            Link::WebSocket(_) => TransportKind::WebSocket,
        }
    }

    /// Bytes and writes of streams by direction and class, heads included.
    pub fn counters(&self) -> Counters {
        self.shared.tally.read()
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("kind", &self.kind())
            .field("remote", &self.remote_address())
            .finish_non_exhaustive()
    }
}

/// Nothing when the head is late, too long or unreadable: the stream is then reset.
async fn read_head(
    class: Option<Class>,
    mut send: SendStream,
    mut recv: RecvStream,
) -> Option<Incoming> {
    let read = async {
        let class = match class {
            Some(class) => class,
            None => Class::from_number(recv.fill(1).await?[0].into()),
        };
        let length = recv.fill(2).await?;
        let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
        if length > HEAD_LIMIT {
            return Err(TransportError::TooLarge {
                size: length,
                limit: HEAD_LIMIT,
            });
        }
        let head = StreamHead::decode(recv.fill(length).await?)
            .map_err(|e| TransportError::Protocol(format!("a stream's head is unreadable: {e}")))?;
        Ok((class, head))
    };
    match tokio::time::timeout(HEAD_DEADLINE, read).await {
        Ok(Ok((class, head))) => {
            send.classify(class);
            recv.class = class;
            Some(Incoming {
                head,
                class,
                send,
                recv,
            })
        }
        Ok(Err(_)) | Err(_) => {
            send.reset(CODE_BAD_HEAD);
            recv.stop(CODE_BAD_HEAD);
            None
        }
    }
}

enum RawSend {
    Quic(quic::SendStream),
    WebSocket(ws::WsSend),
}

enum RawRecv {
    Quic(quic::RecvStream),
    WebSocket(ws::WsRecv),
}

/// The writing half. Dropped before [`SendStream::finish`], it resets the stream, so that a
/// broken-off transfer never looks complete.
pub struct SendStream {
    raw: RawSend,
    class: Class,
    tally: Arc<Tally>,
    ended: bool,
}

impl SendStream {
    /// Waits for room as the reader makes it. Not cancel-safe: a part may have been written.
    pub async fn write_all(&mut self, bytes: Bytes) -> Result<(), TransportError> {
        self.tally.count(Direction::Sent, self.class, bytes.len());
        match &mut self.raw {
            RawSend::Quic(send) => send.write_all(bytes).await,
            RawSend::WebSocket(send) => send.write_all(bytes).await,
        }
    }

    /// Writes one message behind its length.
    pub async fn write_message(&mut self, message: &[u8]) -> Result<(), TransportError> {
        let length = u32::try_from(message.len()).map_err(|_| TransportError::TooLarge {
            size: message.len(),
            limit: u32::MAX as usize,
        })?;
        let mut framed = BytesMut::with_capacity(4 + message.len());
        framed.put_u32(length);
        framed.put_slice(message);
        self.write_all(framed.freeze()).await
    }

    /// No more bytes follow; what was written is delivered.
    pub fn finish(&mut self) {
        self.ended = true;
        match &mut self.raw {
            RawSend::Quic(send) => send.finish(),
            RawSend::WebSocket(send) => send.finish(),
        }
    }

    /// Breaks off: what is not yet delivered is lost, and the reader sees the code.
    pub fn reset(&mut self, code: u32) {
        self.ended = true;
        match &mut self.raw {
            RawSend::Quic(send) => send.reset(code),
            RawSend::WebSocket(send) => send.reset(code),
        }
    }

    /// From here on this end's bytes go in another class.
    pub fn classify(&mut self, class: Class) {
        self.class = class;
        match &mut self.raw {
            RawSend::Quic(send) => send.prioritise(class),
            RawSend::WebSocket(send) => send.classify(class),
        }
    }

    /// Takes what there is room for.
    pub(super) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize, TransportError>> {
        let written = match &mut self.raw {
            RawSend::Quic(send) => send.poll_write(cx, bytes),
            RawSend::WebSocket(send) => send.poll_write(cx, bytes),
        };
        if let Poll::Ready(Ok(length)) = written {
            self.tally.count(Direction::Sent, self.class, length);
        }
        written
    }
}

impl Drop for SendStream {
    fn drop(&mut self) {
        if !self.ended {
            self.reset(0);
        }
    }
}

/// The reading half. Dropped before its end, it tells the writer to stop.
pub struct RecvStream {
    raw: RawRecv,
    class: Class,
    tally: Arc<Tally>,
    /// What was read of the next message; keeps the reading methods cancel-safe.
    partial: BytesMut,
}

impl RecvStream {
    /// The next bytes, at most `max`; nothing at the end. Cancel-safe.
    pub async fn read(&mut self, max: usize) -> Result<Option<Bytes>, TransportError> {
        poll_fn(|cx| self.poll_bytes(cx, max)).await
    }

    /// [`RecvStream::read`], for whoever waits for several things.
    pub(super) fn poll_bytes(
        &mut self,
        cx: &mut Context<'_>,
        max: usize,
    ) -> Poll<Result<Option<Bytes>, TransportError>> {
        if !self.partial.is_empty() {
            let length = self.partial.len().min(max);
            return Poll::Ready(Ok(Some(self.partial.split_to(length).freeze())));
        }
        self.poll_raw(cx, max)
    }

    fn poll_raw(
        &mut self,
        cx: &mut Context<'_>,
        max: usize,
    ) -> Poll<Result<Option<Bytes>, TransportError>> {
        let bytes = match &mut self.raw {
            RawRecv::Quic(recv) => ready!(recv.poll_read(cx, max))?,
            RawRecv::WebSocket(recv) => ready!(recv.poll_read(cx, max))?,
        };
        if let Some(bytes) = &bytes {
            self.tally
                .count(Direction::Received, self.class, bytes.len());
        }
        Poll::Ready(Ok(bytes))
    }

    /// Fills what there is room for; nothing at the end.
    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<Result<(), TransportError>> {
        let max = buffer.remaining();
        if !self.partial.is_empty() {
            let length = self.partial.len().min(max);
            buffer.put_slice(&self.partial.split_to(length));
            return Poll::Ready(Ok(()));
        }
        let before = buffer.filled().len();
        match &mut self.raw {
            RawRecv::Quic(recv) => ready!(recv.poll_read_buf(cx, buffer))?,
            RawRecv::WebSocket(recv) => ready!(recv.poll_read_buf(cx, buffer))?,
        }
        let length = buffer.filled().len() - before;
        self.tally.count(Direction::Received, self.class, length);
        Poll::Ready(Ok(()))
    }

    /// Exactly `length` bytes. Cancel-safe: what has arrived is kept for the next call.
    pub async fn read_exact(&mut self, length: usize) -> Result<Bytes, TransportError> {
        self.fill(length).await
    }

    /// One message, or nothing if the stream ends before one begins. The limit is checked before
    /// anything is allocated. Cancel-safe.
    pub async fn read_message(&mut self, limit: usize) -> Result<Option<Bytes>, TransportError> {
        while self.partial.len() < 4 {
            if !self.grow(4).await? {
                return if self.partial.is_empty() {
                    Ok(None)
                } else {
                    Err(TransportError::CutShort)
                };
            }
        }
        let p = &self.partial;
        let size = u32::from_be_bytes([p[0], p[1], p[2], p[3]]);
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        if size > limit {
            return Err(TransportError::TooLarge { size, limit });
        }
        let whole = self.fill(4 + size).await?;
        Ok(Some(whole.slice(4..)))
    }

    async fn fill(&mut self, length: usize) -> Result<Bytes, TransportError> {
        while self.partial.len() < length {
            if !self.grow(length).await? {
                return Err(TransportError::CutShort);
            }
        }
        if self.partial.len() == length {
            return Ok(std::mem::take(&mut self.partial).freeze());
        }
        Ok(self.partial.split_to(length).freeze())
    }

    /// Reads on towards `length` bytes; false at the end of the stream.
    async fn grow(&mut self, length: usize) -> Result<bool, TransportError> {
        let missing = length - self.partial.len();
        match poll_fn(|cx| self.poll_raw(cx, missing)).await? {
            Some(bytes) => {
                self.partial.extend_from_slice(&bytes);
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// Nothing more is wanted; the writer sees the code.
    pub fn stop(&mut self, code: u32) {
        match &mut self.raw {
            RawRecv::Quic(recv) => recv.stop(code),
            RawRecv::WebSocket(recv) => recv.stop(code),
        }
    }
}

#[cfg(test)]
#[path = "transport/tests.rs"]
mod tests;
