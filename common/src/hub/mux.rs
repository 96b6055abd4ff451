//! Many streams over one ordered byte pipe: credits for each stream, strict classes between them.
//!
//! Sans-IO: owns the streams' buffers and states and nothing else. Takes whole messages from the
//! peer and calls from the application; gives messages to send, best class first, and events that
//! say who may try again. Never blocks, reads no clock, grows no queue beyond its bound.
//!
//! ```text
//!  send half                              receive half
//!  open ──finish──▶ finishing ─▶ done     open ──fin──▶ ended ──(read out)──▶ done
//!   └──reset / peer's stop ─────▶ done     └──peer's reset / stop ──────────▶ done
//! ```
//! A stream leaves the table when both halves are done and the application let go of both.
//! Frames for a stream that has left are dropped: the peer could not know.

use std::collections::{BTreeMap, VecDeque};

use bytes::{Bytes, BytesMut};

use crate::hub::transport::Class;

pub mod frame;
mod halves;

use frame::DATA_OVERHEAD;
pub use frame::{Frame, FrameError, MAX_MESSAGE};
use halves::{RecvHalf, RecvState, SendHalf, SendState};

/// What each stream may receive before its reader takes anything: part of the protocol, since the
/// opener writes before it hears from the peer.
pub const INITIAL_WINDOW: u32 = 64 * 1024;
/// What a stream may receive beyond its reader in the cloud once that took as much as the first
/// window: more is under way where it is read. A device keeps to the first.
pub const GROWN_WINDOW: u32 = 96 * 1024;
/// The code of a stream that was refused because too many are open.
pub const CODE_TOO_MANY_STREAMS: u32 = 1;
/// Answers to a flood of opens that wait for the pipe: more means that the peer does not read.
const MAX_CONTROL: usize = 512;
/// Below this there is no sense in starting another data frame in a message.
const LEAST_DATA: usize = 64;

/// Which end this is; it decides the numbers of the streams it opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Opens 1, 3, 5, ...
    Dialler,
    /// Opens 2, 4, 6, ...
    Listener,
}

/// The peer broke the protocol: the connection ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("stream {0} was opened out of turn")]
    OpenOrder(u32),
    #[error("stream {0} was never opened")]
    NeverOpened(u32),
    #[error("stream {0} carries more bytes than were granted")]
    OverCredit(u32),
    #[error("stream {0} was granted more credit than there is room to count")]
    CreditOverflow(u32),
    #[error("stream {0} carries bytes after its end")]
    AfterEnd(u32),
    #[error("too many frames await an answer")]
    Flood,
}

/// How the other side ended a half of a stream before its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamEnd {
    Reset(u32),
    Stopped(u32),
    /// Finished, reset or let go by ourselves.
    Gone,
}

/// What a read gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Read {
    Bytes(Bytes),
    End,
    /// Nothing at hand: an [`Event::Readable`] follows.
    Blocked,
}

/// Somebody may try again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    Readable(u32),
    Writable(u32),
    /// A stream of the peer waits to be accepted.
    Incoming,
    /// A place for another stream of ours became free.
    Slot,
    /// The peer answered the ping with this id.
    Pong(u32),
}

struct Stream {
    class: Class,
    send: SendHalf,
    recv: RecvHalf,
    /// In its class's queue.
    scheduled: bool,
    /// In `windows`.
    window_due: bool,
}

/// One end of a multiplexed connection.
pub struct Mux {
    side: Side,
    max_local: usize,
    max_remote: usize,
    /// Boxed: a map's node has room for eleven, and a resting connection has three.
    streams: BTreeMap<u32, Box<Stream>>,
    next_local: u32,
    last_remote: u32,
    local_open: usize,
    remote_open: usize,
    /// A caller of `open` was told to wait.
    slot_wanted: bool,
    incoming: VecDeque<u32>,
    /// Opens, resets and stops, in order. Bounded: each stream adds a few, refusals are counted.
    control: VecDeque<Frame>,
    /// Streams whose reader took enough for a new grant.
    windows: VecDeque<u32>,
    ready: [VecDeque<u32>; Class::COUNT],
    ping: Option<u32>,
    /// Only the newest unanswered ping is answered.
    pong: Option<u32>,
    close: Option<(u32, String)>,
    /// The close was said: nothing follows it.
    silent: bool,
    closed_by_peer: Option<(u32, String)>,
    events: VecDeque<Event>,
}

impl Mux {
    /// How many streams of ours may be open at once, and how many of the peer's. Of those twice as
    /// many are let in, since the two ends see a stream's end at different times.
    pub fn new(side: Side, ours: usize, theirs: usize) -> Self {
        Self {
            side,
            max_local: ours,
            max_remote: theirs.saturating_mul(2),
            streams: BTreeMap::new(),
            next_local: match side {
                Side::Dialler => 1,
                Side::Listener => 2,
            },
            last_remote: 0,
            local_open: 0,
            remote_open: 0,
            slot_wanted: false,
            incoming: VecDeque::new(),
            control: VecDeque::new(),
            windows: VecDeque::new(),
            ready: Default::default(),
            ping: None,
            pong: None,
            close: None,
            silent: false,
            closed_by_peer: None,
            events: VecDeque::new(),
        }
    }

    // ---- The application's side ------------------------------------------------------------

    /// A new stream, or nothing while as many as allowed are open; [`Event::Slot`] follows.
    pub fn open(&mut self, class: Class) -> Option<u32> {
        // Numbers end after two thousand million streams; the connection is long gone by then.
        if self.local_open >= self.max_local || self.next_local > u32::MAX - 2 {
            self.slot_wanted = true;
            return None;
        }
        let id = self.next_local;
        self.next_local += 2;
        self.local_open += 1;
        self.insert(id, class);
        self.control.push_back(Frame::Open { stream: id, class });
        Some(id)
    }

    /// The next stream that the peer opened.
    pub fn accept(&mut self) -> Option<(u32, Class)> {
        while let Some(id) = self.incoming.pop_front() {
            if let Some(stream) = self.streams.get(&id) {
                return Some((id, stream.class));
            }
        }
        None
    }

    /// Takes from the front of `bytes` what there is room for, which may be nothing; then an
    /// [`Event::Writable`] follows.
    pub fn write(&mut self, id: u32, bytes: &mut Bytes) -> Result<(), StreamEnd> {
        let stream = self.streams.get_mut(&id).ok_or(StreamEnd::Gone)?;
        stream.send.write(bytes)?;
        self.schedule(id);
        Ok(())
    }

    /// From here on this end sends the stream's bytes in another class; the peer's end keeps its own.
    pub fn classify(&mut self, id: u32, class: Class) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        if stream.class != class && stream.scheduled {
            self.ready[stream.class.index()].retain(|waiting| *waiting != id);
            self.ready[class.index()].push_back(id);
        }
        stream.class = class;
    }

    /// How much a write would take now.
    pub fn room(&self, id: u32) -> usize {
        self.streams.get(&id).map_or(0, |stream| stream.send.room())
    }

    /// No more bytes follow; what was written is still sent.
    pub fn finish(&mut self, id: u32) {
        if let Some(stream) = self.streams.get_mut(&id)
            && stream.send.finish()
        {
            self.schedule(id);
        }
    }

    /// Drops what is not yet sent and tells the peer so.
    pub fn reset(&mut self, id: u32, code: u32) {
        if let Some(stream) = self.streams.get_mut(&id)
            && stream.send.abandon(StreamEnd::Gone)
        {
            self.control.push_back(Frame::Reset { stream: id, code });
        }
    }

    pub fn read(&mut self, id: u32, max: usize) -> Result<Read, StreamEnd> {
        let stream = self.streams.get_mut(&id).ok_or(StreamEnd::Gone)?;
        let read = stream.recv.read(max)?;
        if stream.recv.grant_due() && !stream.window_due {
            stream.window_due = true;
            self.windows.push_back(id);
        }
        Ok(read)
    }

    /// Nothing more is wanted of this stream.
    pub fn stop(&mut self, id: u32, code: u32) {
        if let Some(stream) = self.streams.get_mut(&id)
            && stream.recv.stop()
        {
            self.control.push_back(Frame::Stop { stream: id, code });
        }
    }

    /// The application let go of the sending half: unfinished means reset.
    pub fn release_send(&mut self, id: u32) {
        self.reset(id, 0);
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.send.released = true;
        }
        self.sweep(id);
    }

    /// The application let go of the receiving half: not read to the end means stop.
    pub fn release_recv(&mut self, id: u32) {
        self.stop(id, 0);
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.recv.released = true;
        }
        self.sweep(id);
    }

    pub fn ping(&mut self, id: u32) {
        self.ping = Some(id);
    }

    /// The last words of this end; nothing else is sent any more.
    pub fn close(&mut self, code: u32, reason: &str) {
        if self.close.is_none() && !self.silent {
            self.close = Some((code, reason.to_owned()));
        }
    }

    pub fn closed_by_peer(&self) -> Option<&(u32, String)> {
        self.closed_by_peer.as_ref()
    }

    pub fn next_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// There is something for [`Mux::transmit`].
    pub fn has_output(&self) -> bool {
        let urgent = self.ping.is_some() || self.pong.is_some() || !self.control.is_empty();
        let rest = !self.windows.is_empty() || self.ready.iter().any(|q| !q.is_empty());
        self.close.is_some() || (!self.silent && (urgent || rest))
    }

    /// This end has said or will say its last words.
    pub fn is_closing(&self) -> bool {
        self.close.is_some() || self.silent
    }

    /// Streams in the table, for metrics and tests.
    pub fn open_streams(&self) -> usize {
        self.streams.len()
    }

    // ---- The peer's side -------------------------------------------------------------------

    /// Takes one message from the peer.
    pub fn receive(&mut self, mut message: Bytes) -> Result<(), Violation> {
        if message.len() > MAX_MESSAGE {
            return Err(FrameError::Long(message.len()).into());
        }
        while !message.is_empty() {
            match Frame::decode(&mut message)? {
                Frame::Open { stream, class } => self.on_open(stream, class)?,
                Frame::Data { stream, bytes } => self.on_data(stream, &bytes)?,
                Frame::Fin { stream } => self.on_end(stream, RecvState::Ended)?,
                Frame::Reset { stream, code } => self.on_end(stream, RecvState::Reset(code))?,
                Frame::Stop { stream, code } => self.on_stop(stream, code)?,
                Frame::Window { stream, credit } => self.on_window(stream, credit)?,
                Frame::Ping { id } => self.pong = Some(id),
                Frame::Pong { id } => self.on_pong(id),
                Frame::Close { code, reason } => {
                    self.closed_by_peer.get_or_insert((code, reason));
                }
            }
        }
        Ok(())
    }

    fn on_open(&mut self, id: u32, class: Class) -> Result<(), Violation> {
        if self.is_local(id) || id == 0 || id <= self.last_remote {
            return Err(Violation::OpenOrder(id));
        }
        self.last_remote = id;
        if self.remote_open >= self.max_remote {
            if self.control.len() + 2 > MAX_CONTROL {
                return Err(Violation::Flood);
            }
            let code = CODE_TOO_MANY_STREAMS;
            self.control.push_back(Frame::Reset { stream: id, code });
            self.control.push_back(Frame::Stop { stream: id, code });
            return Ok(());
        }
        self.remote_open += 1;
        self.insert(id, class);
        self.incoming.push_back(id);
        self.events.push_back(Event::Incoming);
        Ok(())
    }

    fn on_data(&mut self, id: u32, bytes: &[u8]) -> Result<(), Violation> {
        let Some(stream) = self.known(id)? else {
            return Ok(());
        };
        if stream.recv.receive(id, bytes)? {
            self.events.push_back(Event::Readable(id));
        }
        Ok(())
    }

    fn on_end(&mut self, id: u32, end: RecvState) -> Result<(), Violation> {
        if let Some(stream) = self.known(id)? {
            if stream.recv.end(end) {
                self.events.push_back(Event::Readable(id));
            }
            self.sweep(id);
        }
        Ok(())
    }

    fn on_stop(&mut self, id: u32, code: u32) -> Result<(), Violation> {
        if let Some(stream) = self.known(id)? {
            let blocked = std::mem::take(&mut stream.send.blocked);
            if stream.send.abandon(StreamEnd::Stopped(code)) {
                self.control.push_back(Frame::Reset { stream: id, code });
                if blocked {
                    self.events.push_back(Event::Writable(id));
                }
            }
            self.sweep(id);
        }
        Ok(())
    }

    fn on_window(&mut self, id: u32, credit: u32) -> Result<(), Violation> {
        if let Some(stream) = self.known(id)? {
            stream.send.credit = stream
                .send
                .credit
                .checked_add(credit)
                .ok_or(Violation::CreditOverflow(id))?;
            self.schedule(id);
        }
        Ok(())
    }

    fn on_pong(&mut self, id: u32) {
        // One is enough: answers to pings that nobody waits for are worth nothing.
        if !matches!(self.events.back(), Some(Event::Pong(_))) {
            self.events.push_back(Event::Pong(id));
        }
    }

    // ---- What to send ----------------------------------------------------------------------

    /// The next message, or nothing. What is urgent comes first; within a class the streams take
    /// turns, one frame each.
    pub fn transmit(&mut self) -> Option<Bytes> {
        let mut out = BytesMut::new();
        if let Some((code, reason)) = self.close.take() {
            self.silent = true;
            Frame::Close { code, reason }.encode(&mut out);
            return Some(out.freeze());
        }
        if self.silent {
            return None;
        }
        if let Some(id) = self.pong.take() {
            Frame::Pong { id }.encode(&mut out);
        }
        if let Some(id) = self.ping.take() {
            Frame::Ping { id }.encode(&mut out);
        }
        self.fill_control(&mut out);
        while out.len() + DATA_OVERHEAD + LEAST_DATA <= MAX_MESSAGE && self.fill_stream(&mut out) {}
        (!out.is_empty()).then(|| out.freeze())
    }

    fn fill_control(&mut self, out: &mut BytesMut) {
        // The longest of these frames is 11 bytes.
        while out.len() + 11 <= MAX_MESSAGE
            && let Some(frame) = self.control.pop_front()
        {
            frame.encode(out);
        }
        while out.len() + 11 <= MAX_MESSAGE
            && let Some(id) = self.windows.pop_front()
        {
            if let Some(stream) = self.streams.get_mut(&id) {
                stream.window_due = false;
                if let Some(credit) = stream.recv.grant() {
                    Frame::Window { stream: id, credit }.encode(out);
                }
            }
        }
    }

    /// One frame of the best stream that has something to say.
    fn fill_stream(&mut self, out: &mut BytesMut) -> bool {
        let Some(id) = self.ready.iter_mut().find_map(VecDeque::pop_front) else {
            return false;
        };
        let Some(stream) = self.streams.get_mut(&id) else {
            return true;
        };
        stream.scheduled = false;
        let room = MAX_MESSAGE - out.len() - DATA_OVERHEAD;
        if let Some(bytes) = stream.send.take(room) {
            Frame::Data { stream: id, bytes }.encode(out);
            if stream.send.has_room() && std::mem::take(&mut stream.send.blocked) {
                self.events.push_back(Event::Writable(id));
            }
        }
        // A fin takes up to 6 bytes; without room it waits for the next message.
        if stream.send.fin_due() && out.len() + 6 <= MAX_MESSAGE {
            stream.send.state = SendState::Done(StreamEnd::Gone);
            Frame::Fin { stream: id }.encode(out);
        }
        self.schedule(id);
        self.sweep(id);
        true
    }

    // ---- The table -------------------------------------------------------------------------

    fn insert(&mut self, id: u32, class: Class) {
        let most = match self.side {
            Side::Dialler => INITIAL_WINDOW,
            Side::Listener => GROWN_WINDOW,
        };
        self.streams.insert(id, Box::new(Stream::new(class, most)));
    }

    fn schedule(&mut self, id: u32) {
        if let Some(stream) = self.streams.get_mut(&id)
            && !stream.scheduled
            && stream.send.has_work()
        {
            stream.scheduled = true;
            self.ready[stream.class.index()].push_back(id);
        }
    }

    fn is_local(&self, id: u32) -> bool {
        (id % 2 == 1) == (self.side == Side::Dialler)
    }

    /// The stream, nothing if it has left the table, or a violation if it was never there.
    fn known(&mut self, id: u32) -> Result<Option<&mut Stream>, Violation> {
        let opened = if self.is_local(id) {
            id != 0 && id < self.next_local
        } else {
            id != 0 && id <= self.last_remote
        };
        if !opened {
            return Err(Violation::NeverOpened(id));
        }
        Ok(self.streams.get_mut(&id).map(Box::as_mut))
    }

    fn sweep(&mut self, id: u32) {
        let Some(stream) = self.streams.get(&id) else {
            return;
        };
        let finished = stream.send.is_done() && stream.recv.is_done();
        if !(finished && stream.send.released && stream.recv.released) {
            return;
        }
        self.streams.remove(&id);
        if self.is_local(id) {
            self.local_open -= 1;
            if std::mem::take(&mut self.slot_wanted) {
                self.events.push_back(Event::Slot);
            }
        } else {
            self.remote_open -= 1;
        }
    }
}

impl Stream {
    fn new(class: Class, most: u32) -> Self {
        Self {
            class,
            send: SendHalf::new(INITIAL_WINDOW),
            recv: RecvHalf::new(INITIAL_WINDOW, most),
            scheduled: false,
            window_due: false,
        }
    }
}

#[cfg(test)]
#[path = "mux/tests.rs"]
mod tests;
