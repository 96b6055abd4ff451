//! Both halves of a stream as one reader and writer, for what speaks over it: HTTP, and after an
//! upgrade anything.
//!
//! A stream that moves much is sent behind those that move little: it starts as it was opened, goes
//! to [`Class::Bulk`] once it has carried [`BURST`] within [`WINDOW`], and comes back when it has
//! been quiet for as long. So a large copy delays no keystroke, whichever command it came with.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use super::{Class, RecvStream, SendStream, TransportError};

/// A full screen redrawn several times a second is below it.
const BURST: usize = 128 * 1024;
const WINDOW: Duration = Duration::from_secs(1);

/// See the module. Dropped before [`AsyncWrite::poll_shutdown`], it resets the stream.
pub struct Duplex {
    send: SendStream,
    recv: RecvStream,
    opened: Class,
    since: Instant,
    moved: usize,
}

impl Duplex {
    pub fn new(send: SendStream, recv: RecvStream) -> Self {
        Self {
            opened: send.class,
            send,
            recv,
            since: Instant::now(),
            moved: 0,
        }
    }

    fn moved(&mut self, bytes: usize) {
        let now = Instant::now();
        if now.duration_since(self.since) >= WINDOW {
            if self.moved < BURST && self.send.class != self.opened {
                self.send.classify(self.opened);
            }
            self.since = now;
            self.moved = 0;
        }
        self.moved = self.moved.saturating_add(bytes);
        if self.moved >= BURST && self.send.class < Class::Bulk {
            self.send.classify(Class::Bulk);
        }
    }
}

fn broken(error: TransportError) -> io::Error {
    let kind = match &error {
        TransportError::Stopped { .. } | TransportError::Reset { .. } => {
            io::ErrorKind::ConnectionReset
        }
        TransportError::Timeout(_) => io::ErrorKind::TimedOut,
        TransportError::Refused(_)
        | TransportError::Trust(_)
        | TransportError::ClosedByPeer { .. }
        | TransportError::ClosedHere
        | TransportError::CutShort
        | TransportError::TooLarge { .. }
        | TransportError::Protocol(_)
        | TransportError::Unusable(_) => io::ErrorKind::ConnectionAborted,
    };
    io::Error::new(kind, error)
}

impl AsyncRead for Duplex {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.recv.poll_read(cx, buffer).map_err(broken)
    }
}

impl AsyncWrite for Duplex {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = self.send.poll_write(cx, bytes).map_err(broken);
        if let Poll::Ready(Ok(length)) = &written {
            self.moved(*length);
        }
        written
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Written means on its way.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.send.ended {
            self.send.finish();
        }
        Poll::Ready(Ok(()))
    }
}
