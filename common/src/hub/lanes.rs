//! The three lanes of a session over one connection: frames in, frames out. An adapter.
//!
//! Owns a reader and a writer task for each lane; they end when this is dropped. A slow bulk lane
//! delays neither of the others.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tracing::trace;

use crate::hub::frame::{self, FrameReader};
use crate::hub::proto::message::Body;
use crate::hub::transport::{Class, Connection, RecvStream, SendStream, TransportError};
use crate::hub::{Lane, proto};

/// What may wait to be written before the peer counts as stalled. The session's own windows keep
/// honest traffic far below: two batches, 256 KiB of reports, one inventory of 30,000 keys.
const MAX_QUEUED: usize = 8 << 20;

/// Frames read and not yet handled; with it full, the transport's flow control holds the peer.
const INCOMING: usize = 8;

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
    writers: [mpsc::UnboundedSender<Bytes>; 3],
    queued: Arc<AtomicUsize>,
    incoming: mpsc::Receiver<Received>,
    _tasks: JoinSet<()>,
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
        let queued = Arc::new(AtomicUsize::new(0));
        let (received, incoming) = mpsc::channel(INCOMING);
        let mut tasks = JoinSet::new();
        let mut writer = |send, lane| {
            let (queue, waiting) = mpsc::unbounded_channel();
            tasks.spawn(write(send, waiting, queued.clone(), lane, received.clone()));
            queue
        };
        let mut readers = Vec::with_capacity(3);
        let mut writers = Vec::with_capacity(3);
        for (lane, (send, recv)) in streams {
            writers.push(writer(send, lane));
            readers.push((lane, recv));
        }
        for (lane, recv) in readers {
            tasks.spawn(read(recv, lane, frames(), received.clone()));
        }
        let writers = writers
            .try_into()
            .expect("one stream for each of the three lanes");
        Self {
            writers,
            queued,
            incoming,
            _tasks: tasks,
        }
    }

    /// Queues a message; the lane's writer sends it.
    pub fn send(&self, lane: Lane, message: &proto::Message) -> Result<(), LaneError> {
        let bytes = frame::encode(message);
        trace!(?lane, message = name(message), bytes = bytes.len(), "sent");
        let waiting = self.queued.fetch_add(bytes.len(), Ordering::Relaxed) + bytes.len();
        if waiting > MAX_QUEUED {
            return Err(LaneError::Stalled);
        }
        // A writer that ended has said why through `incoming`.
        let _ = self.writers[lane as usize].send(bytes);
        Ok(())
    }

    /// Bytes that wait to be written.
    pub fn queued(&self) -> usize {
        self.queued.load(Ordering::Relaxed)
    }

    /// The next message of any lane, or why there is none. Cancel safe.
    pub async fn recv(&mut self) -> Received {
        let received = self.incoming.recv().await;
        if let Some(Ok((lane, message))) = &received {
            trace!(
                ?lane,
                message = name(message),
                bytes = message.encoded_len(),
                "received"
            );
        }
        received.unwrap_or(Err(LaneError::Closed(Lane::Control)))
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

async fn write(
    mut send: SendStream,
    mut waiting: mpsc::UnboundedReceiver<Bytes>,
    queued: Arc<AtomicUsize>,
    _lane: Lane,
    failed: mpsc::Sender<Received>,
) {
    while let Some(bytes) = waiting.recv().await {
        let size = bytes.len();
        if let Err(error) = send.write_all(bytes).await {
            let _ = failed.send(Err(error.into())).await;
            return;
        }
        queued.fetch_sub(size, Ordering::Relaxed);
    }
    send.finish();
}

async fn read(
    mut recv: RecvStream,
    lane: Lane,
    mut frames: FrameReader,
    received: mpsc::Sender<Received>,
) {
    loop {
        let result = match recv.read(READ_CHUNK).await {
            Ok(Some(bytes)) => {
                frames.feed(&bytes);
                Ok(())
            }
            Ok(None) => Err(LaneError::Closed(lane)),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = result {
            let _ = received.send(Err(error)).await;
            return;
        }
        loop {
            let next = match frames.next_message() {
                Ok(Some(message)) => Ok((lane, Box::new(message))),
                Ok(None) => break,
                Err(error) => Err(LaneError::Frame(lane, error)),
            };
            let lost = next.is_err();
            if received.send(next).await.is_err() || lost {
                return;
            }
        }
    }
}
