//! The two halves of a stream: what is queued, what is granted, how it ended.

use std::collections::VecDeque;

use bytes::{Buf, Bytes, BytesMut};

use super::{Read, StreamEnd, Violation};

/// What a writer may queue ahead of the pipe: enough to keep it busy between two turns of the
/// writer, little enough that a stream costs little while it waits.
pub(super) const SEND_BUFFER: usize = 32 * 1024;
/// What is received is not grown beyond this, but followed by another.
const RECV_PIECE: usize = 8 * 1024;
/// Many tiny writes cost by the piece.
const SEND_PIECES: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SendState {
    Open,
    /// The end is said after what is queued.
    Finishing,
    Done(StreamEnd),
}

pub(super) struct SendHalf {
    pub(super) state: SendState,
    queue: VecDeque<Bytes>,
    queued: usize,
    /// Bytes that the peer takes still.
    pub(super) credit: u32,
    /// A writer waits for room.
    pub(super) blocked: bool,
    pub(super) released: bool,
}

impl SendHalf {
    pub(super) fn new(credit: u32) -> Self {
        Self {
            state: SendState::Open,
            queue: VecDeque::new(),
            queued: 0,
            credit,
            blocked: false,
            released: false,
        }
    }

    pub(super) fn write(&mut self, bytes: &mut Bytes) -> Result<(), StreamEnd> {
        match self.state {
            SendState::Open => {}
            SendState::Finishing => return Err(StreamEnd::Gone),
            SendState::Done(end) => return Err(end),
        }
        let piece = bytes.split_to(bytes.len().min(self.room()));
        if !piece.is_empty() {
            self.queued += piece.len();
            self.queue.push_back(piece);
        }
        self.blocked = !bytes.is_empty();
        Ok(())
    }

    pub(super) fn room(&self) -> usize {
        match self.queue.len() < SEND_PIECES {
            true => SEND_BUFFER.saturating_sub(self.queued),
            false => 0,
        }
    }

    pub(super) fn has_room(&self) -> bool {
        self.room() > 0
    }

    /// Whether there is something to say as a result.
    pub(super) fn finish(&mut self) -> bool {
        let open = self.state == SendState::Open;
        if open {
            self.state = SendState::Finishing;
        }
        open
    }

    /// Drops what is queued; whether the peer has to be told.
    pub(super) fn abandon(&mut self, end: StreamEnd) -> bool {
        // What was finished is still delivered: only an open half is cut by its own side.
        let cut = match (self.state, end) {
            (SendState::Open, _) | (SendState::Finishing, StreamEnd::Stopped(_)) => true,
            (SendState::Finishing | SendState::Done(_), _) => false,
        };
        if cut {
            self.state = SendState::Done(end);
            self.queue = VecDeque::new();
            self.queued = 0;
        }
        cut
    }

    /// Something can go on the wire.
    pub(super) fn has_work(&self) -> bool {
        (self.queued > 0 && self.credit > 0) || self.fin_due()
    }

    pub(super) fn fin_due(&self) -> bool {
        self.state == SendState::Finishing && self.queued == 0
    }

    /// The next bytes for the wire, at most `room`.
    pub(super) fn take(&mut self, room: usize) -> Option<Bytes> {
        let credit = usize::try_from(self.credit).unwrap_or(usize::MAX);
        let front = self.queue.front_mut()?;
        let length = front.len().min(room).min(credit);
        if length == 0 {
            return None;
        }
        let bytes = front.split_to(length);
        if !front.has_remaining() {
            self.queue.pop_front();
        }
        self.queued -= length;
        // `length` is at most the credit, so it fits.
        self.credit -= u32::try_from(length).unwrap_or(self.credit);
        if self.queue.is_empty() {
            self.queue = VecDeque::new();
        }
        Some(bytes)
    }

    pub(super) fn is_done(&self) -> bool {
        match self.state {
            SendState::Open | SendState::Finishing => false,
            SendState::Done(_) => true,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RecvState {
    Open,
    /// The peer said the end; buffered bytes may be left.
    Ended,
    Reset(u32),
    Stopped,
}

/// What arrived and was not read: in pieces, so that it is held once and not moved as it grows.
/// Copied, so that a small piece never holds a whole message's memory.
#[derive(Default)]
struct Arrived {
    whole: VecDeque<Bytes>,
    last: BytesMut,
}

impl Arrived {
    fn push(&mut self, bytes: &[u8]) {
        let room = self.last.capacity() - self.last.len();
        if bytes.len() > room && self.last.len() >= RECV_PIECE {
            self.whole
                .push_back(std::mem::take(&mut self.last).freeze());
        }
        self.last.extend_from_slice(bytes);
    }

    fn pop(&mut self, max: usize) -> Option<Bytes> {
        let mut front = match self.whole.pop_front() {
            Some(front) => front,
            // The whole allocation goes with it: an idle stream holds none.
            None => {
                self.whole = VecDeque::new();
                std::mem::take(&mut self.last).freeze()
            }
        };
        if front.is_empty() {
            return None;
        }
        if front.len() > max {
            self.whole.push_front(front.split_off(max));
        }
        Some(front)
    }
}

pub(super) struct RecvHalf {
    state: RecvState,
    arrived: Arrived,
    /// What may come beyond the reader: the first, and the most once that was read.
    window: u32,
    most: u32,
    /// What the peer may send still.
    credit: u32,
    /// Read since the last grant.
    taken: u32,
    /// Read and granted while the window is the first.
    granted: u32,
    /// A reader waits.
    blocked: bool,
    pub(super) released: bool,
}

impl RecvHalf {
    pub(super) fn new(window: u32, most: u32) -> Self {
        Self {
            state: RecvState::Open,
            arrived: Arrived::default(),
            window,
            most,
            credit: window,
            taken: 0,
            granted: 0,
            blocked: false,
            released: false,
        }
    }

    /// Whether a reader is to be woken.
    pub(super) fn receive(&mut self, id: u32, bytes: &[u8]) -> Result<bool, Violation> {
        match self.state {
            RecvState::Open => {}
            // On its way when we said stop.
            RecvState::Stopped => return Ok(false),
            RecvState::Ended | RecvState::Reset(_) => return Err(Violation::AfterEnd(id)),
        }
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        self.credit = self
            .credit
            .checked_sub(length)
            .ok_or(Violation::OverCredit(id))?;
        self.arrived.push(bytes);
        Ok(!bytes.is_empty() && std::mem::take(&mut self.blocked))
    }

    /// Whether a reader is to be woken.
    pub(super) fn end(&mut self, end: RecvState) -> bool {
        match (self.state, end) {
            (RecvState::Open, _) => self.state = end,
            // A reset overtakes an end that was not read out yet.
            (RecvState::Ended, RecvState::Reset(_)) => self.state = end,
            (RecvState::Ended | RecvState::Reset(_) | RecvState::Stopped, _) => return false,
        }
        if matches!(self.state, RecvState::Reset(_)) {
            self.arrived = Arrived::default();
        }
        std::mem::take(&mut self.blocked)
    }

    pub(super) fn read(&mut self, max: usize) -> Result<Read, StreamEnd> {
        let Some(bytes) = self.arrived.pop(max) else {
            return match self.state {
                RecvState::Open => {
                    self.blocked = true;
                    Ok(Read::Blocked)
                }
                RecvState::Ended => Ok(Read::End),
                RecvState::Reset(code) => Err(StreamEnd::Reset(code)),
                RecvState::Stopped => Err(StreamEnd::Gone),
            };
        };
        self.taken += u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        Ok(Read::Bytes(bytes))
    }

    /// A quarter of the window was read: often enough to keep the peer sending, seldom enough not
    /// to answer each frame.
    pub(super) fn grant_due(&self) -> bool {
        self.state == RecvState::Open && self.taken >= self.window / 4
    }

    pub(super) fn grant(&mut self) -> Option<u32> {
        if self.state != RecvState::Open || self.taken == 0 {
            return None;
        }
        let mut credit = std::mem::take(&mut self.taken);
        if self.window < self.most {
            self.granted += credit;
            if self.granted >= self.window {
                credit += self.most - self.window;
                self.window = self.most;
            }
        }
        self.credit += credit;
        Some(credit)
    }

    /// Whether the peer has to be told.
    pub(super) fn stop(&mut self) -> bool {
        let open = self.state == RecvState::Open;
        if open {
            self.state = RecvState::Stopped;
        }
        self.arrived = Arrived::default();
        open
    }

    pub(super) fn is_done(&self) -> bool {
        match self.state {
            RecvState::Open => false,
            RecvState::Ended | RecvState::Reset(_) | RecvState::Stopped => true,
        }
    }
}
