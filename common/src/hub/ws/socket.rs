//! A TCP socket with the options that the hub needs, and an allowance of bytes for peers who have
//! not yet proved who they are.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// Unsent bytes in the kernel beyond this make writes wait. What is urgent can only overtake what
/// has not been handed to the kernel.
const NOTSENT_LOWAT: u32 = 16 * 1024;

pub(in crate::hub) struct Socket {
    tcp: TcpStream,
    /// Bytes that may still be read; none means without limit.
    allowance: Option<usize>,
}

impl Socket {
    /// With an allowance until [`Socket::trust`].
    pub(in crate::hub) fn new(
        tcp: TcpStream,
        dead_after: Duration,
        allowance: Option<usize>,
    ) -> io::Result<Self> {
        tcp.set_nodelay(true)?;
        let options = SockRef::from(&tcp);
        options.set_tcp_notsent_lowat(NOTSENT_LOWAT)?;
        // Bytes that nobody acknowledges for so long mean a dead link, also when nothing is read.
        options.set_tcp_user_timeout(Some(dead_after))?;
        Ok(Self { tcp, allowance })
    }

    /// The peer is authenticated: the protocol's own limits take over.
    pub(in crate::hub) fn trust(&mut self) {
        self.allowance = None;
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.tcp).poll_read(cx, buf))?;
        let read = buf.filled().len() - before;
        if let Some(left) = &mut self.allowance {
            *left = left.checked_sub(read).ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    "too many bytes before authentication",
                )
            })?;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}
