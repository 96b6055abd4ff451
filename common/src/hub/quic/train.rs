//! Datagrams of a tunnel that leave together.
//!
//! quinn gives the kernel at most ten at once, and each such call goes all the way to the network:
//! routes, filters, queues, a process that wakes up. Where much is sent, four calls become one.
//!
//! ```text
//! quinn ──ten──► wait ──ten more, three times──► leave as one
//!                  └── nothing more by the time its task had a turn ──► leave
//! ```

use std::future::poll_fn;
use std::io;
use std::mem;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, ready};

use quinn::AsyncUdpSocket;
use quinn::udp::{EcnCodepoint, Transmit};
use tokio::sync::Notify;
use tokio_util::task::AbortOnDropHandle;

/// quinn's own most.
const AT_ONCE: usize = 10;
/// Few enough that something of a stream's window, some fifty, is under way meanwhile.
const MOST: usize = 4 * AT_ONCE;
/// What the kernel takes as one: 64 datagrams, and a UDP length.
const MOST_BYTES: usize = 65_000;

/// What datagrams must have in common to leave as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Way {
    destination: SocketAddr,
    source: Option<IpAddr>,
    ecn: Option<EcnCodepoint>,
    /// Bytes of each but the last.
    each: usize,
}

impl Way {
    fn of(transmit: &Transmit<'_>) -> Option<Self> {
        Some(Self {
            destination: transmit.destination,
            source: transmit.src_ip,
            ecn: transmit.ecn,
            each: transmit.segment_size?,
        })
    }

    /// Bytes that may leave as one.
    fn most(&self) -> usize {
        self.each * MOST.min(MOST_BYTES / self.each.max(1))
    }
}

/// A socket's way out. See the module.
pub(super) struct Platform {
    shared: Arc<Shared>,
    _task: AbortOnDropHandle<()>,
}

struct Shared {
    socket: Arc<dyn AsyncUdpSocket>,
    train: Mutex<Train>,
    waits: Notify,
}

impl Platform {
    /// Within a runtime.
    pub(super) fn new(socket: Arc<dyn AsyncUdpSocket>) -> Self {
        let shared = Arc::new(Shared {
            socket,
            train: Mutex::default(),
            waits: Notify::new(),
        });
        let task = tokio::spawn(shared.clone().run());
        Self {
            shared,
            _task: AbortOnDropHandle::new(task),
        }
    }

    /// As the socket's own; what goes to one peer leaves in its order.
    pub(super) fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let shared = &self.shared;
        let mut train = shared.train();
        if !train.takes(transmit) {
            // What goes elsewhere may overtake it.
            let begins = Train::is_begun_by(transmit);
            if begins || train.is_for(transmit.destination) {
                shared.leave(&mut train)?;
            }
            if !begins {
                drop(train);
                return shared.socket.try_send(transmit);
            }
        }
        if !train.add(transmit) || shared.leave(&mut train).is_err() {
            shared.waits.notify_one();
        }
        Ok(())
    }
}

impl Shared {
    /// A panic under this lock leaves datagrams, some of which may be lost as any may.
    fn train(&self) -> MutexGuard<'_, Train> {
        self.train.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what waits; it goes on waiting only while the socket has no room.
    fn leave(&self, train: &mut Train) -> io::Result<()> {
        let Some(transmit) = train.as_transmit() else {
            return Ok(());
        };
        let sent = self.socket.try_send(&transmit);
        if !is_full(&sent) {
            train.clear();
        }
        sent
    }

    async fn run(self: Arc<Self>) {
        let mut room = self.socket.clone().create_io_poller();
        loop {
            self.waits.notified().await;
            let mut turn = true;
            poll_fn(|cx| {
                // quinn goes first, with what it still has.
                if mem::take(&mut turn) {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                while is_full(&self.leave(&mut self.train())) {
                    if ready!(room.as_mut().poll_writable(cx)).is_err() {
                        break;
                    }
                }
                Poll::Ready(())
            })
            .await;
        }
    }
}

fn is_full(sent: &io::Result<()>) -> bool {
    sent.as_ref()
        .is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock)
}

/// What waits for more.
#[derive(Debug, Default)]
struct Train {
    way: Option<Way>,
    bytes: Vec<u8>,
}

impl Train {
    /// More of the same follow at once, most likely.
    fn is_begun_by(transmit: &Transmit<'_>) -> bool {
        let each = transmit.segment_size;
        each.is_some_and(|each| transmit.contents.len() == each * AT_ONCE)
    }

    fn is_for(&self, destination: SocketAddr) -> bool {
        self.way.is_some_and(|way| way.destination == destination)
    }

    /// Whether these go with those that wait.
    fn takes(&self, transmit: &Transmit<'_>) -> bool {
        let Some(way) = self.way else {
            return false;
        };
        // After a shorter one, which found no room to leave, nothing can follow in the same piece.
        let goes_on = self.bytes.len().is_multiple_of(way.each);
        let together = self.bytes.len() + transmit.contents.len();
        goes_on && Way::of(transmit) == Some(way) && together <= way.most()
    }

    /// Adds what it takes, or what begins it; true when it must leave now.
    fn add(&mut self, transmit: &Transmit<'_>) -> bool {
        self.way = Way::of(transmit);
        self.bytes.extend_from_slice(transmit.contents);
        let more = self.bytes.len() + transmit.contents.len();
        // Only the last datagram of all may be shorter than the others.
        self.way.is_none_or(|way| more > way.most()) || !Self::is_begun_by(transmit)
    }

    fn as_transmit(&self) -> Option<Transmit<'_>> {
        let way = self.way?;
        Some(Transmit {
            destination: way.destination,
            ecn: way.ecn,
            contents: &self.bytes,
            segment_size: Some(way.each),
            src_ip: way.source,
        })
    }

    fn clear(&mut self) {
        self.way = None;
        self.bytes.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quinn::udp::RecvMeta;
    use std::pin::Pin;
    use std::task::Context;

    const EACH: usize = 1200;

    fn transmit(contents: &[u8]) -> Transmit<'_> {
        Transmit {
            destination: ([127, 0, 0, 1], 1).into(),
            ecn: None,
            contents,
            segment_size: Some(EACH),
            src_ip: None,
        }
    }

    #[test]
    fn four_full_calls_are_one() {
        let (first, second) = ([1; EACH * AT_ONCE], [2; EACH * AT_ONCE]);
        let mut train = Train::default();
        assert!(Train::is_begun_by(&transmit(&first)) && !train.takes(&transmit(&first)));
        for _ in 1..MOST / AT_ONCE {
            assert!(!train.add(&transmit(&first)), "more may come");
            assert!(train.takes(&transmit(&second)));
        }
        assert!(train.add(&transmit(&second)), "no more may come");
        assert!(!train.takes(&transmit(&first)));
        let all = train.as_transmit().unwrap();
        assert_eq!(
            (all.contents.len(), all.segment_size),
            (EACH * MOST, Some(EACH))
        );
        train.clear();
        assert!(train.as_transmit().is_none());
    }

    #[test]
    fn long_datagrams_leave_before_they_are_more_than_the_kernel_takes() {
        const LONG: usize = 3000;
        let bytes = [1; LONG * AT_ONCE];
        let long = Transmit {
            segment_size: Some(LONG),
            ..transmit(&bytes)
        };
        let mut train = Train::default();
        assert!(!train.add(&long) && train.takes(&long));
        assert!(train.add(&long) && !train.takes(&long));
    }

    #[test]
    fn a_shorter_datagram_is_the_last() {
        let (first, rest) = ([1; EACH * AT_ONCE], [2; EACH + 5]);
        let mut train = Train::default();
        train.add(&transmit(&first));
        assert!(!Train::is_begun_by(&transmit(&rest)));
        assert!(train.takes(&transmit(&rest)) && train.add(&transmit(&rest)));
        assert!(!train.takes(&transmit(&first)) && !train.takes(&transmit(&rest)));
    }

    #[test]
    fn what_goes_another_way_does_not_go_along() {
        let bytes = [1; EACH * AT_ONCE];
        let mut train = Train::default();
        train.add(&transmit(&bytes));
        let way = transmit(&bytes);
        for other in [
            Transmit {
                destination: ([127, 0, 0, 2], 1).into(),
                ..way.clone()
            },
            Transmit {
                ecn: Some(EcnCodepoint::Ect0),
                ..way.clone()
            },
            Transmit {
                segment_size: Some(EACH / 2),
                ..way.clone()
            },
            Transmit {
                segment_size: None,
                ..way.clone()
            },
            Transmit {
                src_ip: Some([127, 0, 0, 9].into()),
                ..way
            },
        ] {
            assert!(!train.takes(&other), "{other:?}");
        }
    }

    /// Remembers what left: how many bytes, and the first of each call.
    #[derive(Debug, Default)]
    struct Ramp {
        left: Mutex<Vec<(usize, u8)>>,
        /// Calls that find no room.
        full: Mutex<u32>,
    }

    impl quinn::UdpPoller for Ramp {
        fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncUdpSocket for Ramp {
        fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn quinn::UdpPoller>> {
            Box::pin(Ramp::default())
        }

        fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
            let mut full = self.full.lock().unwrap();
            if *full > 0 {
                *full -= 1;
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let contents = transmit.contents;
            self.left
                .lock()
                .unwrap()
                .push((contents.len(), contents[0]));
            Ok(())
        }

        fn poll_recv(
            &self,
            _: &mut Context<'_>,
            _: &mut [io::IoSliceMut<'_>],
            _: &mut [RecvMeta],
        ) -> Poll<io::Result<usize>> {
            Poll::Pending
        }

        fn local_addr(&self) -> io::Result<SocketAddr> {
            Ok(([127, 0, 0, 1], 1).into())
        }
    }

    const FULL: usize = EACH * AT_ONCE;

    #[tokio::test]
    async fn what_is_sent_leaves_in_its_order_and_none_waits_for_ever() {
        let ramp = Arc::new(Ramp::default());
        let platform = Platform::new(ramp.clone());
        let left = || mem::take(&mut *ramp.left.lock().unwrap());
        let send = |bytes: &[u8]| platform.try_send(&transmit(bytes));
        let small = |n| Transmit {
            segment_size: None,
            ..transmit(n)
        };

        platform.try_send(&small(&[1])).unwrap();
        assert_eq!(left(), [(1, 1)], "a datagram alone does not wait");
        send(&[2; FULL]).unwrap();
        send(&[2; FULL]).unwrap();
        send(&[2; FULL]).unwrap();
        assert_eq!(left(), []);
        send(&[3; FULL]).unwrap();
        assert_eq!(left(), [(4 * FULL, 2)]);
        send(&[4; FULL]).unwrap();
        let elsewhere = Transmit {
            destination: ([127, 0, 0, 2], 1).into(),
            ..small(&[7])
        };
        platform.try_send(&elsewhere).unwrap();
        platform.try_send(&small(&[5])).unwrap();
        assert_eq!(left(), [(1, 7), (FULL, 4), (1, 5)]);
        send(&[6; FULL]).unwrap();
        while ramp.left.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        assert_eq!(left(), [(FULL, 6)]);
    }

    #[tokio::test]
    async fn without_room_what_was_taken_is_kept_and_no_more_is_taken() {
        let ramp = Arc::new(Ramp::default());
        let platform = Platform::new(ramp.clone());
        let send = |bytes: &[u8]| platform.try_send(&transmit(bytes));
        *ramp.full.lock().unwrap() = 2;
        for n in 1..=4 {
            send(&[n; FULL]).unwrap();
        }
        assert!(is_full(&send(&[5; FULL])));
        while ramp.left.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        send(&[6; EACH]).unwrap();
        let left = ramp.left.lock().unwrap();
        assert_eq!(*left, [(4 * FULL, 1), (EACH, 6)]);
    }
}
