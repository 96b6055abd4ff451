//! What an API server hands on as it came from the client: WebSockets, turned into the SPDY that
//! runtimes speak.
//!
//! A node that declares `ExtendWebSocketsToKubelet` gets the client's own WebSocket. Two kinds need
//! an end here, since a runtime has none: version 5 of a remote command, which can say that a stream
//! has ended, and the tunnel of a port-forward. All else is joined to the runtime untouched.
//!
//! ```text
//! remote command   message [channel, bytes…]  ⇄  SPDY stream of the channel
//!                  message [255, channel]     →  the stream's end
//! port-forward     message [bytes…]           ⇄  bytes of a SPDY connection
//! ```
//!
//! `Translated` is the asker as the runtime would see one that speaks SPDY: the splice joins both
//! as it joins any two. It holds one piece for each direction.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, Bytes, BytesMut};
use common::stream::BUFFER;
use common::stream::request::{Streams, Target};
use http::header::{
    CONNECTION, HeaderMap, HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY,
    SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::{spdy, websocket};

/// The name by which a node says that it takes WebSockets.
pub const FEATURE: &str = "ExtendWebSocketsToKubelet";

const COMMAND: &str = "v5.channel.k8s.io";
const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";

const SPDY: &str = "SPDY/3.1";
const STREAM_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
/// What both say to the runtime.
const RUNTIME_COMMAND: &str = "v4.channel.k8s.io";
const RUNTIME_TUNNEL: &str = "portforward.k8s.io";

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
/// Another channel's end.
const END: u8 = 255;

/// What a runtime calls the channels, in the order in which it is asked for them.
const STREAMS: [(u8, &str); 5] = [
    (ERROR, "error"),
    (STDIN, "stdin"),
    (STDOUT, "stdout"),
    (STDERR, "stderr"),
    (RESIZE, "resize"),
];
/// The asker hears these.
const HEARD: [u8; 3] = [STDOUT, STDERR, ERROR];

/// What is read of the asker at once. What is written is what the splice gives: each message costs
/// the asker, so they are as large as can be.
const PIECE: usize = 16 * 1024;

/// How a request's WebSocket is ended here.
#[derive(Debug)]
pub(super) struct Translation {
    protocol: &'static str,
    accept: String,
    dialect: Dialect,
}

/// A request that asks for a WebSocket and cannot have one.
#[derive(Debug, thiserror::Error)]
#[error("the WebSocket handshake is incomplete: {0}")]
pub struct Incomplete(&'static str);

impl Translation {
    /// `None` where the request is for the runtime as it is.
    pub(super) fn of(
        target: &Target,
        headers: &HeaderMap,
        query: &str,
    ) -> Result<Option<Self>, super::Refusal> {
        let is = |name: HeaderName, wanted: &str| {
            let values = headers.get_all(name).into_iter();
            let words = values
                .filter_map(|v| v.to_str().ok())
                .flat_map(|v| v.split(','));
            words
                .map(str::trim)
                .any(|word| word.eq_ignore_ascii_case(wanted))
        };
        let offers = |protocol| is(SEC_WEBSOCKET_PROTOCOL, protocol);
        if !is(UPGRADE, "websocket") {
            return Ok(None);
        }
        let (protocol, dialect) = match target {
            Target::Exec { .. } | Target::Attach { .. } if offers(COMMAND) => (
                COMMAND,
                Dialect::Command(Command::new(&Streams::parse(query)?)),
            ),
            Target::PortForward { .. } if offers(TUNNEL) => (TUNNEL, Dialect::Tunnel),
            _ => return Ok(None),
        };
        if !is(SEC_WEBSOCKET_VERSION, "13") {
            return Err(Incomplete("it is not of version 13").into());
        }
        let key = headers.get(SEC_WEBSOCKET_KEY);
        let key = key.ok_or(Incomplete("it has no key"))?;
        Ok(Some(Self {
            protocol,
            accept: derive_accept_key(key.as_bytes()),
            dialect,
        }))
    }

    /// For an asker that is here, speaks as a client of version 5 and wants no handshake.
    pub(super) fn of_command(streams: &Streams) -> Self {
        Self {
            protocol: COMMAND,
            accept: String::new(),
            dialect: Dialect::Command(Command::new(streams)),
        }
    }

    /// What the runtime is asked instead.
    pub(super) fn asks(&self) -> HeaderMap {
        let protocol = match self.dialect {
            Dialect::Command(_) => RUNTIME_COMMAND,
            Dialect::Tunnel => RUNTIME_TUNNEL,
        };
        let mut headers = HeaderMap::new();
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static(SPDY));
        headers.insert(STREAM_PROTOCOL, HeaderValue::from_static(protocol));
        headers
    }

    /// What the asker hears once the runtime has agreed.
    pub(super) fn answers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
        let protocol = HeaderValue::from_static(self.protocol);
        headers.insert(SEC_WEBSOCKET_PROTOCOL, protocol);
        if let Ok(accept) = HeaderValue::try_from(&self.accept) {
            headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
        }
        headers
    }

    pub(super) fn join<I>(self, asker: I) -> Translated<I> {
        let mut there = BytesMut::new();
        if let Dialect::Command(command) = &self.dialect {
            command.begin(&mut there);
        }
        Translated {
            io: asker,
            dialect: self.dialect,
            frames: websocket::Decoder::default(),
            there,
            back: BytesMut::new(),
            left: false,
            said_goodbye: false,
            reader: None,
        }
    }
}

#[derive(Debug)]
enum Dialect {
    Command(Command),
    Tunnel,
}

/// The streams of a command, by channel, and what is under way.
#[derive(Debug)]
struct Command {
    streams: [Option<u32>; 5],
    /// Streams that the runtime has not answered for: it throws away what comes before.
    awaited: usize,
    frames: spdy::Decoder,
    /// The channel of the message that is under way.
    channel: u8,
}

impl Command {
    fn new(wanted: &Streams) -> Self {
        let is_wanted = |channel| match channel {
            STDIN => wanted.stdin,
            STDOUT => wanted.stdout,
            STDERR => wanted.stderr,
            RESIZE => wanted.tty,
            _ => true,
        };
        let mut streams = [None; 5];
        let channels = STREAMS.iter().map(|(channel, _)| *channel);
        let wanted = channels.filter(|channel| is_wanted(*channel));
        for (channel, number) in wanted.zip((1_u32..).step_by(2)) {
            streams[usize::from(channel)] = Some(number);
        }
        Self {
            streams,
            awaited: streams.iter().flatten().count(),
            frames: spdy::Decoder::default(),
            channel: END,
        }
    }

    /// Opens the streams.
    fn begin(&self, there: &mut BytesMut) {
        for (channel, name) in STREAMS {
            if let Some(number) = self.stream(channel) {
                spdy::open(there, number, number == 1, ("streamtype", name));
            }
        }
    }

    /// One stream more is there; tells the asker, by nothing on its first stream, when all are. Not
    /// before: a client that has just been answered may not know its own streams yet.
    fn replied(&mut self, back: &mut BytesMut) {
        let last = self.awaited == 1;
        self.awaited = self.awaited.saturating_sub(1);
        let first = HEARD.iter().find(|c| self.stream(**c).is_some());
        if let Some(channel) = first.filter(|_| last) {
            websocket::message(back, &[*channel], &[]);
        }
    }

    fn stream(&self, channel: u8) -> Option<u32> {
        *self.streams.get(usize::from(channel))?
    }

    /// Of streams that are not there, or took their end, nothing goes on.
    fn said(&mut self, first: bool, mut bytes: Bytes, there: &mut BytesMut) {
        if first && !bytes.is_empty() {
            self.channel = bytes.get_u8();
        }
        match self.channel {
            STDIN | RESIZE => {
                if let Some(stream) = self.stream(self.channel)
                    && !bytes.is_empty()
                {
                    spdy::data(there, stream, &bytes);
                }
            }
            END => {
                for channel in bytes {
                    let stream = match channel {
                        STDIN | RESIZE => self.streams[usize::from(channel)].take(),
                        _ => None,
                    };
                    if let Some(stream) = stream {
                        spdy::finish(there, stream);
                    }
                }
            }
            _ => {}
        }
    }

    /// What the runtime says, as messages; what it wants to hear at once goes `there`.
    fn answered(
        &mut self,
        mut bytes: &[u8],
        there: &mut BytesMut,
        back: &mut BytesMut,
    ) -> Result<(), spdy::Malformed> {
        while let Some(event) = self.frames.next(&mut bytes)? {
            match event {
                spdy::Event::Data { stream, bytes } => {
                    let of_stream = |c: &&u8| self.stream(**c) == Some(stream);
                    if let Some(channel) = HEARD.iter().find(of_stream) {
                        websocket::message(back, &[*channel], bytes);
                    }
                }
                spdy::Event::Replied => self.replied(back),
                spdy::Event::Reset(stream) => {
                    for channel in [STDIN, RESIZE] {
                        let place = &mut self.streams[usize::from(channel)];
                        *place = place.filter(|number| *number != stream);
                    }
                }
                spdy::Event::Ping(number) => spdy::pong(there, number),
            }
        }
        Ok(())
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Translated<I> {
    io: I,
    dialect: Dialect,
    frames: websocket::Decoder,
    /// For the runtime.
    there: BytesMut,
    /// For the asker.
    back: BytesMut,
    /// The asker has said its last.
    left: bool,
    said_goodbye: bool,
    /// Waits for what a write may bring.
    reader: Option<Waker>,
}

impl<I: AsyncRead + AsyncWrite + Unpin> Translated<I> {
    /// Writes what waits for the asker.
    fn poll_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.back.is_empty() {
            let length = ready!(Pin::new(&mut self.io).poll_write(cx, &self.back))?;
            if length == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.back.advance(length);
        }
        Poll::Ready(Ok(()))
    }

    fn listens(&self) -> bool {
        match &self.dialect {
            Dialect::Command(command) => command.awaited == 0,
            Dialect::Tunnel => true,
        }
    }

    /// Takes what the asker sent; an end of its connection is its last word too.
    fn heard(&mut self, bytes: &[u8]) -> Result<(), websocket::Malformed> {
        self.left |= bytes.is_empty();
        self.frames.push(bytes);
        while let Some(event) = self.frames.next()? {
            match event {
                websocket::Event::Data { first, bytes } => match &mut self.dialect {
                    Dialect::Command(command) => command.said(first, bytes, &mut self.there),
                    Dialect::Tunnel => self.there.extend_from_slice(&bytes),
                },
                // Whoever asks and does not read is not answered for ever.
                websocket::Event::Ping(bytes) if self.back.len() < PIECE => {
                    websocket::pong(&mut self.back, &bytes);
                }
                websocket::Event::Ping(_) => {}
                websocket::Event::Close => {
                    self.left = true;
                    break;
                }
            }
        }
        Ok(())
    }
}

fn malformed(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncRead for Translated<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if !this.there.is_empty() {
                let length = this.there.len().min(buffer.remaining());
                buffer.put_slice(&this.there.split_to(length));
                return Poll::Ready(Ok(()));
            }
            if this.left {
                return Poll::Ready(Ok(()));
            }
            this.reader = Some(cx.waker().clone());
            // An answer to a ping: what waits is else written with what follows.
            if let Poll::Ready(Err(error)) = this.poll_out(cx) {
                return Poll::Ready(Err(error));
            }
            if !this.listens() {
                return Poll::Pending;
            }
            let mut space = [std::mem::MaybeUninit::uninit(); PIECE];
            let mut piece = ReadBuf::uninit(&mut space);
            ready!(Pin::new(&mut this.io).poll_read(cx, &mut piece))?;
            this.heard(piece.filled()).map_err(malformed)?;
        }
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Translated<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        // What was taken before goes first, so that no more than a piece is held.
        ready!(this.poll_out(cx))?;
        let piece = &bytes[..bytes.len().min(BUFFER)];
        let deaf = !this.listens();
        match &mut this.dialect {
            Dialect::Command(command) => {
                let done = command.answered(piece, &mut this.there, &mut this.back);
                done.map_err(malformed)?;
            }
            Dialect::Tunnel => websocket::message(&mut this.back, &[], piece),
        }
        let news = !this.there.is_empty() || deaf && this.listens();
        if let Some(reader) = this.reader.take_if(|_| news) {
            reader.wake();
        }
        match this.poll_out(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(piece.len())),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_out(cx))?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if !std::mem::replace(&mut this.said_goodbye, true) {
            websocket::close(&mut this.back);
        }
        ready!(this.poll_out(cx))?;
        Pin::new(&mut this.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
