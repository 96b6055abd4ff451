//! The three lanes of a session over one connection: frames in, frames out. An adapter.
//!
//! Owns one task that writes, which ends when this is dropped; reading happens in whoever receives.
//! A slow bulk lane delays neither of the others.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use futures::task::AtomicWaker;
use prost::Message as _;
use tokio::task::coop;
use tokio_util::task::AbortOnDropHandle;
use tracing::trace;

use crate::hub::frame::{self, FrameReader};
use crate::hub::proto::message::Body;
use crate::hub::session::pop_from;
use crate::hub::transport::{Class, Connection, RecvStream, SendStream, TransportError};
use crate::hub::{Lane, proto};

/// What may wait to be written before the peer counts as stalled. The session's own windows keep
/// honest traffic far below: two batches, 256 KiB of reports, one inventory of 30,000 keys.
const MAX_QUEUED: usize = 8 << 20;

const READ_CHUNK: usize = 16 << 10;

/// How long a new connection may take to open its lanes.
const OPENING: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum LaneError {
    #[error("the connection ended")]
    Transport(#[from] TransportError),
    #[error("the {0:?} lane carries no protocol frames")]
    Frame(Lane, #[source] frame::FrameError),
    #[error("the peer closed its {0:?} lane")]
    Closed(Lane),
    #[error("the peer has not read for so long that {MAX_QUEUED} bytes wait")]
    Stalled,
    #[error("the peer did not open the session's lanes within {} s", OPENING.as_secs())]
    NotOpened,
    #[error("the peer opened a stream that is no lane, or a lane twice")]
    NoLane,
}

type Received = Result<(Lane, Box<proto::Message>), LaneError>;

/// See the module.
pub struct Lanes {
    outbox: Arc<Outbox>,
    readers: [Reader; 3],
    /// Whose turn it is to be looked at first.
    turn: usize,
    _writer: AbortOnDropHandle<()>,
}

struct Reader {
    lane: Lane,
    recv: RecvStream,
    frames: FrameReader,
}

/// What waits to be written. No channels: an idle one would set aside room for thirty-two messages.
#[derive(Default)]
struct Outbox {
    waiting: Mutex<[VecDeque<Bytes>; 3]>,
    /// Bytes in `waiting`, and in what is being written.
    queued: AtomicUsize,
    writer: AtomicWaker,
    /// Why the writer ended, for whoever receives.
    failed: Mutex<Option<TransportError>>,
    receiver: AtomicWaker,
}

impl Outbox {
    /// False when too much waits already. What comes after the writer's end goes nowhere: whoever
    /// receives is told.
    fn push(&self, lane: Lane, bytes: Bytes) -> bool {
        if lock(&self.failed).is_some() {
            return true;
        }
        let size = bytes.len();
        let waiting = self.queued.fetch_add(size, Ordering::Relaxed) + size;
        if waiting > MAX_QUEUED {
            self.queued.fetch_sub(size, Ordering::Relaxed);
            return false;
        }
        lock(&self.waiting)[lane as usize].push_back(bytes);
        self.writer.wake();
        true
    }

    fn pop(&self, lane: usize) -> Option<Bytes> {
        pop_from(&mut lock(&self.waiting)[lane])
    }
}

/// A panic under these locks leaves queues that are whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn class(lane: Lane) -> Class {
    match lane {
        Lane::Control => Class::Control,
        Lane::Status => Class::Status,
        Lane::Bulk => Class::Bulk,
    }
}

fn lane_of(kind: proto::StreamKind) -> Option<Lane> {
    Lane::ALL.into_iter().find(|l| l.stream_kind() == kind)
}

impl Lanes {
    /// The edge opens.
    pub async fn open(connection: &Connection) -> Result<Self, LaneError> {
        let mut streams = Vec::with_capacity(3);
        for lane in Lane::ALL {
            let head = proto::StreamHead {
                kind: lane.stream_kind().into(),
                ..Default::default()
            };
            streams.push((lane, connection.open(class(lane), &head).await?));
        }
        Ok(Self::over(streams, FrameReader::default))
    }

    /// The cloud accepts.
    pub async fn accept(connection: &Connection) -> Result<Self, LaneError> {
        let all = async {
            let mut streams: Vec<(Lane, (SendStream, RecvStream))> = Vec::with_capacity(3);
            while streams.len() < 3 {
                let stream = connection.accept().await?;
                let lane = lane_of(stream.head.kind()).ok_or(LaneError::NoLane)?;
                if streams.iter().any(|(l, _)| *l == lane) {
                    return Err(LaneError::NoLane);
                }
                streams.push((lane, (stream.send, stream.recv)));
            }
            streams.sort_by_key(|(lane, _)| *lane);
            Ok(Self::over(streams, FrameReader::upward))
        };
        tokio::time::timeout(OPENING, all)
            .await
            .unwrap_or(Err(LaneError::NotOpened))
    }

    fn over(streams: Vec<(Lane, (SendStream, RecvStream))>, frames: fn() -> FrameReader) -> Self {
        let outbox = Arc::<Outbox>::default();
        let (mut writers, mut readers) = (Vec::with_capacity(3), Vec::with_capacity(3));
        for (lane, (send, recv)) in streams {
            writers.push(send);
            let frames = frames();
            readers.push(Reader { lane, recv, frames });
        }
        let writer = tokio::spawn(write(outbox.clone(), writers));
        let Ok(readers) = readers.try_into() else {
            unreachable!("one stream for each of the three lanes");
        };
        Self {
            outbox,
            readers,
            turn: 0,
            _writer: AbortOnDropHandle::new(writer),
        }
    }

    /// Queues a message; the writer sends it.
    pub fn send(&self, lane: Lane, message: &proto::Message) -> Result<(), LaneError> {
        let bytes = frame::encode(message);
        trace!(?lane, message = name(message), bytes = bytes.len(), "sent");
        if self.outbox.push(lane, bytes) {
            Ok(())
        } else {
            Err(LaneError::Stalled)
        }
    }

    /// Bytes that wait to be written.
    pub fn queued(&self) -> usize {
        self.outbox.queued.load(Ordering::Relaxed)
    }

    /// The next message of any lane, or why there is none. Cancel safe. What is not received is held
    /// back by the transport's flow control.
    pub async fn recv(&mut self) -> Received {
        let received = poll_fn(|cx| self.poll_recv(cx)).await;
        if let Ok((lane, message)) = &received {
            trace!(
                ?lane,
                message = name(message),
                bytes = message.encoded_len(),
                "received"
            );
        }
        received
    }

    fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Received> {
        // A peer that floods leaves room for the others on its thread.
        let budget = ready!(coop::poll_proceed(cx));
        self.outbox.receiver.register(cx.waker());
        // What had arrived before the end is still given, on whichever lane: a GoAway says why.
        let mut end = lock(&self.outbox.failed).clone().map(LaneError::from);
        for n in 0..self.readers.len() {
            let turn = (self.turn + n) % self.readers.len();
            match self.readers[turn].poll_next(cx) {
                Poll::Pending => {}
                Poll::Ready(Err(error @ (LaneError::Transport(_) | LaneError::Closed(_)))) => {
                    end.get_or_insert(error);
                }
                Poll::Ready(received) => {
                    budget.made_progress();
                    self.turn = turn + 1;
                    return Poll::Ready(received);
                }
            }
        }
        match end {
            Some(error) => Poll::Ready(Err(error)),
            None => Poll::Pending,
        }
    }
}

impl Reader {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Received> {
        loop {
            match self.frames.next_message() {
                Ok(Some(message)) => return Poll::Ready(Ok((self.lane, Box::new(message)))),
                Ok(None) => {}
                Err(error) => return Poll::Ready(Err(LaneError::Frame(self.lane, error))),
            }
            match ready!(self.recv.poll_bytes(cx, READ_CHUNK))? {
                Some(bytes) => self.frames.feed(&bytes),
                None => return Poll::Ready(Err(LaneError::Closed(self.lane))),
            }
        }
    }
}

/// What a message is, for logs: never what it says.
fn name(message: &proto::Message) -> &'static str {
    match &message.body {
        Some(Body::Hello(_)) => "Hello",
        Some(Body::Welcome(_)) => "Welcome",
        Some(Body::WelcomeAck(_)) => "WelcomeAck",
        Some(Body::Batch(_)) => "Batch",
        Some(Body::BatchAck(_)) => "BatchAck",
        Some(Body::WantInventory(_)) => "WantInventory",
        Some(Body::Inventory(_)) => "Inventory",
        Some(Body::Reports(_)) => "Reports",
        Some(Body::ReportAcks(_)) => "ReportAcks",
        Some(Body::WantReports(_)) => "WantReports",
        Some(Body::Events(_)) => "Events",
        Some(Body::EventsAck(_)) => "EventsAck",
        Some(Body::Request(_)) => "Request",
        Some(Body::Response(_)) => "Response",
        Some(Body::GoAway(_)) => "GoAway",
        None => "of a later version",
    }
}

/// Writes for as long as the lanes live, or until a stream fails.
async fn write(outbox: Arc<Outbox>, mut streams: Vec<SendStream>) {
    let mut partly: [Bytes; 3] = Default::default();
    let error = poll_fn(|cx| {
        outbox.writer.register(cx.waker());
        for (lane, send) in streams.iter_mut().enumerate() {
            if let Poll::Ready(error) = poll_write(cx, &outbox, lane, send, &mut partly[lane]) {
                return Poll::Ready(error);
            }
        }
        Poll::Pending
    })
    .await;
    *lock(&outbox.failed) = Some(error);
    outbox.receiver.wake();
}

/// Writes what one lane has to say; ready when it cannot any more. A lane that is full delays none
/// of the others.
fn poll_write(
    cx: &mut Context<'_>,
    outbox: &Outbox,
    lane: usize,
    send: &mut SendStream,
    partly: &mut Bytes,
) -> Poll<TransportError> {
    loop {
        if partly.is_empty() {
            match outbox.pop(lane) {
                Some(bytes) => *partly = bytes,
                None => return Poll::Pending,
            }
        }
        match ready!(send.poll_write(cx, partly)) {
            Ok(length) => {
                partly.advance(length);
                outbox.queued.fetch_sub(length, Ordering::Relaxed);
            }
            Err(error) => return Poll::Ready(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::testing::Cloud;
    use crate::hub::transport::TransportKind;

    fn message(body: Body) -> proto::Message {
        proto::Message { body: Some(body) }
    }

    #[tokio::test]
    async fn what_was_said_before_the_end_is_heard_whichever_lane_is_looked_at_first() {
        for kind in [TransportKind::Quic, TransportKind::WebSocket] {
            let mut cloud = Cloud::start().await;
            let (edge, served) = cloud.pair(kind).await;
            let (opened, accepted) = tokio::join!(Lanes::open(&edge), Lanes::accept(&served));
            let (mut lanes, said) = (opened.unwrap(), accepted.unwrap());
            // After this the others are looked at first.
            let first = message(Body::BatchAck(proto::BatchAck::default()));
            said.send(Lane::Control, &first).unwrap();
            assert_eq!(lanes.recv().await.unwrap().0, Lane::Control, "{kind}");
            let goodbye = message(Body::GoAway(proto::GoAway::default()));
            said.send(Lane::Control, &goodbye).unwrap();
            tokio::time::sleep(Duration::from_millis(200)).await;
            served.close(1, "ended");
            edge.closed().await;
            let (lane, last) = lanes.recv().await.unwrap();
            assert_eq!((lane, *last), (Lane::Control, goodbye), "{kind}");
            assert!(matches!(
                lanes.recv().await,
                Err(LaneError::Transport(_) | LaneError::Closed(_))
            ));
        }
    }
}
