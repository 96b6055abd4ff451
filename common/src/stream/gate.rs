//! A body that rests while what it gave is not written.
//!
//! hyper takes of a body as much as the longest head that it would read, whether or not the
//! connection takes any of it: for a reader that stands still, that is most of what a tunnel holds.
//! Here a body gives its next piece only when little of those before waits.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Buf;
use futures::task::AtomicWaker;
use http_body::{Body, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What is written around a piece at most. Counted too much is put right when all is written.
const FRAMING: usize = 16;

/// With so much waiting a body rests.
const ENOUGH: usize = 16 * 1024;

#[derive(Default)]
struct State {
    /// What the body gave since the connection had nothing to write, less what was written.
    waiting: AtomicUsize,
    body: AtomicWaker,
}

impl State {
    fn rests(&self) -> bool {
        self.waiting.load(Ordering::Acquire) >= ENOUGH
    }

    fn wrote(&self, length: usize) {
        let less = |waiting: usize| Some(waiting.saturating_sub(length));
        let before = self
            .waiting
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, less);
        if before.is_ok_and(|before| before >= ENOUGH) && !self.rests() {
            self.body.wake();
        }
    }
}

/// A connection that counts what it writes of the bodies behind it.
pub struct Gated<I> {
    io: I,
    state: Arc<State>,
}

/// What makes bodies rest; of one connection.
#[derive(Clone)]
pub struct Gate(Arc<State>);

/// See the module.
pub struct Resting<B> {
    body: B,
    state: Arc<State>,
}

/// Both ends of a gate before a connection.
pub fn gate<I>(io: I) -> (Gated<I>, Gate) {
    let state = Arc::<State>::default();
    let gate = Gate(state.clone());
    (Gated { io, state }, gate)
}

impl Gate {
    pub fn before<B>(&self, body: B) -> Resting<B> {
        let state = self.0.clone();
        Resting { body, state }
    }
}

impl<I> Gated<I> {
    fn wrote(&self, written: &Poll<io::Result<usize>>) {
        if let Poll::Ready(Ok(length)) = written {
            self.state.wrote(*length);
        }
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Gated<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Gated<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, bytes);
        self.wrote(&written);
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, slices);
        self.wrote(&written);
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    /// Called when there is nothing left to write.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.state.wrote(usize::MAX);
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

impl<B: Body + Unpin> Body for Resting<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        if self.state.rests() {
            self.state.body.register(cx.waker());
            // Written between the two.
            if self.state.rests() {
                return Poll::Pending;
            }
        }
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        let given = frame.as_ref().and_then(|f| f.as_ref().ok()?.data_ref());
        let length = given.map_or(0, |data| data.remaining() + FRAMING);
        self.state.waiting.fetch_add(length, Ordering::AcqRel);
        Poll::Ready(frame)
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
    use std::convert::Infallible;

    use bytes::Bytes;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    const PIECE: usize = ENOUGH / 4;

    struct Endless;

    impl Body for Endless {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&[7; PIECE])))))
        }
    }

    #[tokio::test]
    async fn a_body_rests_while_enough_waits_and_goes_on_as_it_is_written() {
        let (mut reader, io) = tokio::io::duplex(PIECE);
        let (mut io, gate) = gate(io);
        let mut body = gate.before(Endless);
        let mut next = async || {
            std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx))
                .await
                .map(|frame| frame.unwrap().into_data().unwrap())
        };
        for _ in 0..4 {
            assert_eq!(next().await.unwrap().len(), PIECE);
        }
        let mut resting = std::pin::pin!(next());
        assert!(futures::poll!(&mut resting).is_pending());
        io.write_all(&[7; PIECE]).await.unwrap();
        assert!(resting.await.is_some());
        let mut resting = std::pin::pin!(next());
        assert!(futures::poll!(&mut resting).is_pending());
        // All of it is written, and a head that was no body's.
        let write = async {
            io.write_all(&[7; 4 * PIECE + 100]).await.unwrap();
            io.flush().await.unwrap();
        };
        let mut read = vec![0; 5 * PIECE + 100];
        tokio::join!(write, async { reader.read_exact(&mut read).await.unwrap() });
        assert!(resting.await.is_some());
        for _ in 0..3 {
            assert!(next().await.is_some());
        }
        assert!(futures::poll!(std::pin::pin!(next())).is_pending());
    }
}
