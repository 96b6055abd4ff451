//! Bytes and writes by direction and class; relaxed counters, read for metrics.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Class;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    Sent,
    Received,
}

/// How much of one class went one way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Volume {
    pub bytes: u64,
    /// Writes handed to the transport, or pieces taken from it.
    pub frames: u64,
}

/// A connection's volumes, indexed by [`Class::index`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    pub sent: [Volume; Class::COUNT],
    pub received: [Volume; Class::COUNT],
}

#[derive(Debug, Default)]
pub(in crate::hub) struct Tally {
    sent: [Cell; Class::COUNT],
    received: [Cell; Class::COUNT],
}

#[derive(Debug, Default)]
struct Cell {
    bytes: AtomicU64,
    frames: AtomicU64,
}

impl Cell {
    fn read(&self) -> Volume {
        Volume {
            bytes: self.bytes.load(Ordering::Relaxed),
            frames: self.frames.load(Ordering::Relaxed),
        }
    }
}

impl Tally {
    pub(super) fn count(&self, direction: Direction, class: Class, bytes: usize) {
        let cells = match direction {
            Direction::Sent => &self.sent,
            Direction::Received => &self.received,
        };
        let cell = &cells[class.index()];
        cell.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        cell.frames.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> Counters {
        Counters {
            sent: self.sent.each_ref().map(Cell::read),
            received: self.received.each_ref().map(Cell::read),
        }
    }
}
