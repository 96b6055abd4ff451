//! A socket that is read in large pieces, whatever its reader asks for.
//!
//! rustls asks for 4 KiB at a time, a quarter of a record: without this a fast stream costs a system
//! call for each. What was read ahead is held only until it is taken, so that an idle connection
//! holds nothing.

use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Two TLS records.
const PIECE: usize = 32 * 1024;

/// See the module.
pub struct ReadAhead<S> {
    inner: S,
    held: Bytes,
}

impl<S> ReadAhead<S> {
    pub fn new(inner: S) -> Self {
        let held = Bytes::new();
        Self { inner, held }
    }

    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ReadAhead<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.held.is_empty() {
            if buffer.remaining() >= PIECE {
                return Pin::new(&mut self.inner).poll_read(cx, buffer);
            }
            let mut space = [MaybeUninit::uninit(); PIECE];
            let mut piece = ReadBuf::uninit(&mut space);
            ready!(Pin::new(&mut self.inner).poll_read(cx, &mut piece))?;
            let (now, later) = piece
                .filled()
                .split_at(piece.filled().len().min(buffer.remaining()));
            buffer.put_slice(now);
            if !later.is_empty() {
                self.held = Bytes::copy_from_slice(later);
            }
            return Poll::Ready(Ok(()));
        }
        let length = self.held.len().min(buffer.remaining());
        buffer.put_slice(&self.held[..length]);
        self.held.advance(length);
        if self.held.is_empty() {
            self.held = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ReadAhead<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// Counts how often it is read.
    struct Counting<S>(S, usize);

    impl<S: AsyncRead + Unpin> AsyncRead for Counting<S> {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buffer: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            self.1 += 1;
            Pin::new(&mut self.0).poll_read(cx, buffer)
        }
    }

    #[tokio::test]
    async fn small_reads_take_from_one_large_one_and_lose_nothing() {
        let (mut peer, socket) = tokio::io::duplex(PIECE);
        let sent: Vec<u8> = (0..PIECE).map(|n| (n % 251) as u8).collect();
        peer.write_all(&sent).await.unwrap();
        drop(peer);
        let mut ahead = ReadAhead::new(Counting(socket, 0));
        let (mut got, mut small) = (Vec::new(), [0; 1000]);
        loop {
            let length = ahead.read(&mut small).await.unwrap();
            if length == 0 {
                break;
            }
            got.extend_from_slice(&small[..length]);
        }
        assert_eq!(got, sent);
        assert_eq!(ahead.get_mut().1, 2, "one for the bytes, one for the end");
        assert_eq!(ahead.held.len(), 0);
    }

    #[tokio::test]
    async fn a_large_reader_is_given_the_socket_itself() {
        let (mut peer, socket) = tokio::io::duplex(64);
        peer.write_all(b"word").await.unwrap();
        let mut ahead = ReadAhead::new(socket);
        let mut large = vec![0; PIECE];
        assert_eq!(ahead.read(&mut large).await.unwrap(), 4);
        assert_eq!(&large[..4], b"word");
    }
}
