//! The listener's UDP socket, which offers to send many datagrams at once only while many are sent.
//!
//! quinn gives a connection room for as many datagrams as the socket takes at once when it first
//! sends two, as each does in its handshake, and never takes it back: 12 KiB for each device that
//! rests from then on. What gains from it, a tunnel that carries much, gets it within two windows.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};

const WINDOW: Duration = Duration::from_millis(50);

/// Datagrams of a window from which on they are many: 10 MB/s. A thousand devices that resume in
/// one second stay below.
const MANY: u32 = 400;

pub(in crate::hub) struct Sparing {
    socket: Arc<dyn AsyncUdpSocket>,
    pace: Pace,
}

impl Sparing {
    pub(in crate::hub) fn new(socket: Arc<dyn AsyncUdpSocket>) -> Self {
        let pace = Pace::new(Instant::now());
        Self { socket, pace }
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
        let each = transmit.segment_size.unwrap_or(transmit.contents.len());
        let datagrams = transmit.contents.len().div_ceil(each.max(1));
        let datagrams = u32::try_from(datagrams).unwrap_or(u32::MAX);
        self.socket.try_send(transmit)?;
        self.pace.count(Instant::now(), datagrams);
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.socket.poll_recv(cx, buffers, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        if self.pace.is_high(Instant::now()) {
            self.socket.max_transmit_segments()
        } else {
            1
        }
    }

    fn max_receive_segments(&self) -> usize {
        self.socket.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.socket.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
