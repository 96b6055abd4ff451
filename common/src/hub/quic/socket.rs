//! A UDP socket by which quinn holds no more memory than it was told to.
//!
//! Of what comes: the kernel gives up to 64 datagrams of a sender as one. quinn keeps them in one
//! piece of memory until the last byte of the last is read, and counts against a stream's window
//! only what that stream has of them: beside streams that are read, one that stands still would hold
//! ten times its window. So it gets each by itself.
//!
//! Of what leaves: a listener offers to send many datagrams at once only while many are sent. quinn
//! gives a connection room for as many as the socket takes at once when it first sends two, as each
//! does in its handshake, and never takes it back: 12 KiB for each device that rests from then on.
//! What gains from it, a tunnel that carries much, gets it within two windows, and even more at once
//! than quinn gives: see [`train`](super::train).

use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use quinn::udp::{BATCH_SIZE, RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};

use super::train::Platform;

const WINDOW: Duration = Duration::from_millis(50);

/// Datagrams of a window from which on they are many: 10 MB/s. A thousand devices that resume in
/// one second stay below.
const MANY: u32 = 400;

/// The most that the kernel gives as one.
const TOGETHER: usize = 64 * 1024;

pub(in crate::hub) struct Sparing {
    socket: Arc<dyn AsyncUdpSocket>,
    platform: Platform,
    /// `None` where many datagrams may always leave at once.
    pace: Option<Pace>,
    /// Only quinn's one receiver takes it.
    came: Mutex<Came>,
}

/// Both are made within a runtime.
impl Sparing {
    /// For a listener.
    pub(in crate::hub) fn of_many(socket: Arc<dyn AsyncUdpSocket>) -> Self {
        let pace = Some(Pace::new(Instant::now()));
        Self {
            pace,
            ..Self::of_one(socket)
        }
    }

    /// For a dialler.
    pub(in crate::hub) fn of_one(socket: Arc<dyn AsyncUdpSocket>) -> Self {
        Self {
            platform: Platform::new(socket.clone()),
            socket,
            pace: None,
            came: Mutex::default(),
        }
    }
}

/// What the kernel gave, until quinn has taken all of it.
struct Came {
    /// As many times [`TOGETHER`] as there are `metas`; pages that nothing came in cost nothing.
    bytes: Box<[u8]>,
    metas: [RecvMeta; BATCH_SIZE],
    filled: usize,
    /// What is taken next: in which of the filled, and from which byte on.
    next: (usize, usize),
}

impl Default for Came {
    fn default() -> Self {
        Self {
            bytes: vec![0; BATCH_SIZE * TOGETHER].into(),
            metas: [RecvMeta::default(); BATCH_SIZE],
            filled: 0,
            next: (0, 0),
        }
    }
}

impl Came {
    fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        socket: &dyn AsyncUdpSocket,
    ) -> Poll<io::Result<()>> {
        let mut parts = self.bytes.chunks_mut(TOGETHER);
        let mut buffers: [IoSliceMut<'_>; BATCH_SIZE] =
            std::array::from_fn(|_| IoSliceMut::new(parts.next().unwrap_or_default()));
        self.filled = ready!(socket.poll_recv(cx, &mut buffers, &mut self.metas))?;
        self.next = (0, 0);
        Poll::Ready(Ok(()))
    }

    /// Gives each datagram by itself, as many as there is room for.
    fn take(&mut self, buffers: &mut [IoSliceMut<'_>], metas: &mut [RecvMeta]) -> usize {
        let mut taken = 0;
        for (buffer, place) in buffers.iter_mut().zip(metas) {
            let (which, from) = self.next;
            if which >= self.filled {
                break;
            }
            let meta = self.metas[which];
            // An empty one is given as well: quinn counts what it is given against its turn.
            let end = meta.len.min(from + meta.stride.max(1));
            // What is longer than was agreed on is cut, as the kernel would.
            let length = (end - from).min(buffer.len());
            let bytes = &self.bytes[which * TOGETHER + from..][..length];
            buffer[..length].copy_from_slice(bytes);
            *place = RecvMeta {
                len: length,
                stride: length,
                ..meta
            };
            self.next = match end < meta.len {
                true => (which, end),
                false => (which + 1, 0),
            };
            taken += 1;
        }
        taken
    }
}

/// How many datagrams leave. Only a hint: it may be late by a window.
struct Pace {
    begun: Instant,
    /// The number of the window that is counted.
    window: AtomicU64,
    sent: AtomicU32,
    /// The window before had many.
    many: AtomicBool,
}

impl Pace {
    fn new(begun: Instant) -> Self {
        Self {
            begun,
            window: AtomicU64::new(0),
            sent: AtomicU32::new(0),
            many: AtomicBool::new(false),
        }
    }

    fn window(&self, now: Instant) -> u64 {
        let passed = now.duration_since(self.begun).as_millis() / WINDOW.as_millis();
        u64::try_from(passed).unwrap_or(u64::MAX)
    }

    fn count(&self, now: Instant, datagrams: u32) {
        let window = self.window(now);
        let before = self.window.fetch_max(window, Ordering::Relaxed);
        if before < window {
            let sent = self.sent.swap(0, Ordering::Relaxed);
            let many = sent >= MANY && before + 1 == window;
            self.many.store(many, Ordering::Relaxed);
        }
        self.sent.fetch_add(datagrams, Ordering::Relaxed);
    }

    fn is_high(&self, now: Instant) -> bool {
        self.many.load(Ordering::Relaxed)
            && self.window(now) <= self.window.load(Ordering::Relaxed) + 1
    }
}

impl fmt::Debug for Sparing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.socket.fmt(f)
    }
}

impl AsyncUdpSocket for Sparing {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.socket.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.platform.try_send(transmit)?;
        if let Some(pace) = &self.pace {
            let each = transmit.segment_size.unwrap_or(transmit.contents.len());
            let datagrams = transmit.contents.len().div_ceil(each.max(1));
            let datagrams = u32::try_from(datagrams).unwrap_or(u32::MAX);
            pace.count(Instant::now(), datagrams);
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut came = self.came.lock().unwrap_or_else(PoisonError::into_inner);
        if came.next.0 >= came.filled {
            ready!(came.poll_fill(cx, &*self.socket))?;
        }
        Poll::Ready(Ok(came.take(buffers, meta)))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        match &self.pace {
            Some(pace) if !pace.is_high(Instant::now()) => 1,
            _ => self.socket.max_transmit_segments(),
        }
    }

    fn max_receive_segments(&self) -> usize {
        1
    }

    fn may_fragment(&self) -> bool {
        self.socket.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What came, as the kernel gives it: so many bytes each, of datagrams so long.
    fn came(groups: &[(usize, usize)]) -> Came {
        let mut came = Came::default();
        let mut number = 0;
        for (which, (len, stride)) in groups.iter().copied().enumerate() {
            let meta = RecvMeta::default();
            came.metas[which] = RecvMeta {
                len,
                stride,
                ..meta
            };
            let bytes = &mut came.bytes[which * TOGETHER..][..len];
            for datagram in bytes.chunks_mut(stride.max(1)) {
                datagram.fill(number);
                number += 1;
            }
        }
        came.filled = groups.len();
        came
    }

    #[test]
    fn what_came_together_is_given_one_by_one_however_little_room_there_is() {
        for room in [1, 2, 3, BATCH_SIZE] {
            let mut came = came(&[(100, 100), (0, 0), (250, 100), (0, 100), (2, 1)]);
            let mut given = Vec::new();
            loop {
                let mut space = vec![[0; 100]; room];
                let mut buffers: Vec<_> = space.iter_mut().map(|s| IoSliceMut::new(s)).collect();
                let mut metas = vec![RecvMeta::default(); room];
                let taken = came.take(&mut buffers, &mut metas);
                for (bytes, meta) in space.iter().zip(&metas).take(taken) {
                    assert_eq!(meta.len, meta.stride);
                    assert!(bytes[..meta.len].iter().all(|b| *b == bytes[0]));
                    given.push((bytes[0], meta.len));
                }
                if came.next.0 >= came.filled {
                    break;
                }
            }
            let all = [
                (0, 100),
                (0, 0),
                (1, 100),
                (2, 100),
                (3, 50),
                (0, 0),
                (4, 1),
                (5, 1),
            ];
            assert_eq!(given, all, "room for {room}");
        }
    }

    #[test]
    fn a_datagram_that_is_too_long_is_cut_and_the_next_begins_where_it_does() {
        let mut came = came(&[(300, 200)]);
        let (mut first, mut second) = ([9; 150], [9; 150]);
        let mut buffers = [IoSliceMut::new(&mut first), IoSliceMut::new(&mut second)];
        let mut metas = [RecvMeta::default(); 2];
        assert_eq!(came.take(&mut buffers, &mut metas), 2);
        assert_eq!((metas[0].len, metas[1].len), (150, 100));
        assert_eq!((first, second[0], second[99]), ([0; 150], 1, 1));
    }

    #[test]
    fn many_datagrams_go_together_only_after_a_window_of_many() {
        let begun = Instant::now();
        let pace = Pace::new(begun);
        let at = |windows: u32| begun + WINDOW * windows;
        for n in 0..3 {
            pace.count(at(n), MANY - 1);
            assert!(!pace.is_high(at(n)), "few in window {n}");
        }
        pace.count(at(3), MANY);
        assert!(!pace.is_high(at(3)), "the window is not over");
        pace.count(at(4), 1);
        assert!(pace.is_high(at(4)) && pace.is_high(at(5)));
        assert!(!pace.is_high(at(6)), "nothing was sent since");
        pace.count(at(9), MANY);
        pace.count(at(11), 1);
        assert!(!pace.is_high(at(11)), "a window without any lies between");
    }
}
