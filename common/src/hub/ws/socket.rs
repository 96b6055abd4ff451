//! A TCP socket with the options that the hub needs, and an allowance of bytes for peers who have
//! not yet proved who they are.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::ahead::ReadAhead;

/// Unsent bytes in the kernel beyond this make writes wait. What is urgent can only overtake what
/// has not been handed to the kernel.
const UNSENT: u32 = 16 * 1024;
/// The same where bytes leave as soon as they come.
const UNSENT_FAST: u32 = 128 * 1024;

pub(in crate::hub) struct Socket {
    tcp: ReadAhead<TcpStream>,
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
        options.set_tcp_notsent_lowat(UNSENT)?;
        // Bytes that nobody acknowledges for so long mean a dead link, also when nothing is read.
        options.set_tcp_user_timeout(Some(dead_after))?;
        Ok(Self {
            tcp: ReadAhead::new(tcp),
            allowance,
        })
    }

    /// The link takes what it is given at once, or does so no longer.
    pub(in crate::hub) fn set_fast(&mut self, fast: bool) {
        let most = if fast { UNSENT_FAST } else { UNSENT };
        // Without it the link is only slower, or what is urgent waits a little longer.
        drop(SockRef::from(&*self.tcp.get_mut()).set_tcp_notsent_lowat(most));
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
