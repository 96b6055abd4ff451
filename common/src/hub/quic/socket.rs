//! The UDP socket beneath QUIC: many datagrams a call, each a piece of memory of its own.
//!
//! The kernel gives up to 64 datagrams of a sender as one. A stream keeps what it got until its
//! reader takes it, and its window counts only that: cut out of one piece, a few bytes that nobody
//! reads would keep all that came with them, ten times the window. So each is copied by itself.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io::{self, IoSliceMut};
use std::task::{Poll, ready};

use quinn_proto::{EcnCodepoint, Transmit};
use quinn_udp::{RecvMeta, UdpSocketState};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::UdpSocket;

/// What may wait in the kernel until we read it: with its default of about a hundred packets a fast
/// tunnel loses some whenever we are not scheduled for a moment. The kernel gives less where
/// `net.core.rmem_max` says so, and takes memory only for what waits.
const UNREAD: usize = 2 << 20;

/// The most that the kernel gives as one, and how many of these we take at once.
const TOGETHER: usize = 64 * 1024;
const BATCH: usize = 8;

/// What leaves as one: what the kernel takes, and two thirds of a stream's window, so that something
/// of it is under way meanwhile. Each call goes all the way to the network, through routes, filters
/// and queues to a process that wakes up: with ten datagrams at once, calls take a third of a
/// tunnel's time.
const AT_ONCE: usize = 65_000;

thread_local! {
    /// What is about to leave. One for each thread, since one for each session is a kilobyte that
    /// rests with it.
    static LEAVING: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

pub(super) struct Socket {
    io: UdpSocket,
    udp: UdpSocketState,
}

impl Socket {
    /// Within a runtime.
    pub(super) fn new(socket: std::net::UdpSocket) -> io::Result<Self> {
        let options = SockRef::from(&socket);
        // One that may not be enlarged only loses more.
        drop(options.set_recv_buffer_size(UNREAD));
        drop(options.set_send_buffer_size(UNREAD));
        Ok(Self {
            udp: UdpSocketState::new((&socket).into())?,
            io: UdpSocket::from_std(socket)?,
        })
    }

    pub(super) fn may_fragment(&self) -> bool {
        self.udp.may_fragment()
    }

    /// How many datagrams of a length one call may send.
    pub(super) fn at_once(&self, length: u16) -> usize {
        let most = AT_ONCE / usize::from(length.max(1));
        self.udp.max_gso_segments().min(most).max(1)
    }

    /// False when there is no room now. What cannot be sent for another reason is lost, as any
    /// datagram may be.
    #[must_use]
    pub(super) fn send(&self, transmit: &Transmit, bytes: &[u8]) -> bool {
        let datagrams = quinn_udp::Transmit {
            destination: transmit.destination,
            ecn: transmit.ecn.and_then(marked),
            contents: &bytes[..transmit.size],
            segment_size: transmit.segment_size,
            src_ip: transmit.src_ip,
        };
        let sent = self.io.try_io(Interest::WRITABLE, || {
            self.udp.send((&self.io).into(), &datagrams)
        });
        !sent.is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock)
    }

    /// Waits for room.
    pub(super) async fn room(&self) {
        // A socket that is broken says so where it is read.
        drop(self.io.writable().await);
    }

    /// Waits for datagrams. For one task alone.
    pub(super) async fn receive(&self, into: &mut Received) -> io::Result<()> {
        into.filled = 0;
        let mut parts = into.bytes.chunks_mut(TOGETHER);
        let mut buffers: [IoSliceMut<'_>; BATCH] =
            std::array::from_fn(|_| IoSliceMut::new(parts.next().unwrap_or_default()));
        into.filled = poll_fn(|cx| {
            loop {
                ready!(self.io.poll_recv_ready(cx))?;
                let received = self.io.try_io(Interest::READABLE, || {
                    self.udp
                        .recv((&self.io).into(), &mut buffers, &mut into.metas)
                });
                match received {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    // Of a datagram that we sent to somebody; anybody can make it up.
                    Err(e) if e.kind() == io::ErrorKind::ConnectionReset => {}
                    done => return Poll::Ready(done),
                }
            }
        })
        .await?;
        Ok(())
    }
}

/// Lends a buffer for what is about to leave. Not for two at once.
pub(super) fn with_buffer<T>(f: impl FnOnce(&mut Vec<u8>) -> T) -> T {
    LEAVING.with_borrow_mut(|buffer| {
        buffer.clear();
        f(buffer)
    })
}

fn marked(ecn: EcnCodepoint) -> Option<quinn_udp::EcnCodepoint> {
    quinn_udp::EcnCodepoint::from_bits(ecn as u8)
}

/// What the kernel gave at once.
pub(super) struct Received {
    /// As many times [`TOGETHER`] as there are `metas`; pages that nothing came in cost nothing.
    bytes: Box<[u8]>,
    metas: [RecvMeta; BATCH],
    filled: usize,
}

impl Default for Received {
    fn default() -> Self {
        Self {
            bytes: vec![0; BATCH * TOGETHER].into(),
            metas: [RecvMeta::default(); BATCH],
            filled: 0,
        }
    }
}

/// Where it came from, how it was marked, what it is.
pub(super) type Datagram<'a> = (&'a RecvMeta, Option<EcnCodepoint>, &'a [u8]);

impl Received {
    /// Each datagram by itself. Empty ones mean nothing.
    pub(super) fn datagrams(&self) -> impl Iterator<Item = Datagram<'_>> {
        let parts = self.bytes.chunks(TOGETHER);
        let filled = self.metas[..self.filled].iter().zip(parts);
        filled.flat_map(|(meta, bytes)| {
            let ecn = meta.ecn.and_then(|ecn| EcnCodepoint::from_bits(ecn as u8));
            let each = bytes[..meta.len].chunks(meta.stride.max(1));
            each.map(move |datagram| (meta, ecn, datagram))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_together_is_given_one_by_one() {
        let mut received = Received::default();
        // Bytes and stride of what the kernel gave; each datagram is filled with its number.
        let came = [(250, 100), (0, 0), (100, 100), (0, 100), (3, 1)];
        let mut number = 0;
        for (which, (len, stride)) in came.into_iter().enumerate() {
            received.metas[which] = RecvMeta {
                len,
                stride,
                ..RecvMeta::default()
            };
            for datagram in received.bytes[which * TOGETHER..][..len].chunks_mut(stride.max(1)) {
                datagram.fill(number);
                number += 1;
            }
        }
        received.filled = came.len();
        let given: Vec<_> = received
            .datagrams()
            .map(|(_, _, bytes)| {
                assert!(bytes.iter().all(|b| *b == bytes[0]));
                (bytes[0], bytes.len())
            })
            .collect();
        let all = [
            (0, 100),
            (1, 100),
            (2, 50),
            (3, 100),
            (4, 1),
            (5, 1),
            (6, 1),
        ];
        assert_eq!(given, all);
    }

    #[test]
    fn marks_of_congestion_are_carried_both_ways() {
        for ecn in [EcnCodepoint::Ect0, EcnCodepoint::Ect1, EcnCodepoint::Ce] {
            let there = marked(ecn).expect("each has one");
            assert_eq!(EcnCodepoint::from_bits(there as u8), Some(ecn));
        }
    }

    #[tokio::test]
    async fn datagrams_that_leave_as_one_come_in_their_order() {
        let bind = || std::net::UdpSocket::bind(("127.0.0.1", 0)).expect("loopback");
        let (here, there) = (bind(), bind());
        let to = there.local_addr().expect("bound");
        let (here, there) = (Socket::new(here).unwrap(), Socket::new(there).unwrap());
        let bytes: Vec<u8> = (0..10u8).flat_map(|n| [n; 1200]).collect();
        let transmit = Transmit {
            destination: to,
            ecn: Some(EcnCodepoint::Ect0),
            size: 9 * 1200 + 7,
            segment_size: Some(1200),
            src_ip: None,
        };
        assert!(here.at_once(1200) >= 10, "this kernel sends one by one");
        assert_eq!(here.at_once(u16::MAX), 1);
        here.room().await;
        assert!(here.send(&transmit, &bytes));
        let (mut received, mut given) = (Received::default(), Vec::new());
        while given.len() < 10 {
            there.receive(&mut received).await.unwrap();
            for (_, ecn, bytes) in received.datagrams() {
                assert_eq!(ecn, Some(EcnCodepoint::Ect0));
                given.push((bytes[0], bytes.len()));
            }
        }
        let all: Vec<_> = (0..9).map(|n| (n, 1200)).chain([(9, 7)]).collect();
        assert_eq!(given, all);
    }
}
