//! The session protocol as two state machines, [`edge::EdgeSession`] and [`cloud::CloudSession`].
//!
//! Owns: what is in flight. Takes: messages and the word that something changed. Gives: messages
//! to send and events to act on. Never: sockets, clocks, disks. What an end holds is read through
//! [`edge::EdgeState`] and [`cloud::CloudView`]; both machines die with the connection, and a new
//! pair begins from what is durable.

pub mod cloud;
pub mod edge;

use std::collections::{BTreeMap, VecDeque};

use crate::hub::proto;
use crate::ids::{Kind, NameError};
use crate::object::Digest;

/// Up to which resourceVersion each kind is reflected.
pub type Marks = BTreeMap<Kind, u64>;

/// The peer broke the protocol: the session ends, nothing is lost.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    #[error("the peer sent {0} where the session was {1}")]
    OutOfPlace(&'static str, &'static str),
    #[error("the peer speaks protocol version {0}, this side speaks up to {max}", max = super::PROTOCOL_VERSION)]
    Version(u32),
    #[error("{0} has {1} bytes, expected 16")]
    Length(&'static str, usize),
    #[error("the peer named an object that cannot be")]
    Key(#[from] NameError),
    #[error("the peer acknowledged batch {0}, which is not in flight")]
    UnknownBatch(u64),
    #[error("an inventory named {keys} keys and {hashes} bytes of hashes")]
    Inventory { keys: usize, hashes: usize },
    #[error("the peer's inventory names more than {0} objects")]
    TooMany(usize),
    #[error("one message carries {0} bytes of reports")]
    TooMuch(usize),
}

/// More objects than any node can need: 500 Pods with 60 references each.
pub const MAX_OBJECTS: usize = 30_000;

/// A Pod's status with 20 containers and full termination messages (12 KiB a Pod) is below 64 KiB:
/// a report of more than this is refused before it is decoded.
pub const MAX_REPORT: usize = 256 << 10;

/// How far a machine is, in words for its errors.
trait Stage: Copy + PartialEq {
    fn word(self) -> &'static str;

    /// Refuses `what` unless the machine is at this stage.
    fn require(self, stage: Self, what: &'static str) -> Result<(), ProtocolError> {
        if self == stage {
            Ok(())
        } else {
            Err(ProtocolError::OutOfPlace(what, self.word()))
        }
    }
}

/// The next of a queue; an empty one holds no memory, since most sessions rest.
pub(crate) fn pop_from<T>(queue: &mut VecDeque<T>) -> Option<T> {
    let front = queue.pop_front();
    if queue.is_empty() {
        *queue = VecDeque::new();
    }
    front
}

pub(crate) fn id16(what: &'static str, bytes: &[u8]) -> Result<[u8; 16], ProtocolError> {
    bytes
        .try_into()
        .map_err(|_| ProtocolError::Length(what, bytes.len()))
}

impl From<Digest> for proto::SetDigest {
    fn from(d: Digest) -> Self {
        Self {
            count: d.count,
            root: d.root.to_vec(),
        }
    }
}

impl TryFrom<&proto::SetDigest> for Digest {
    type Error = ProtocolError;
    fn try_from(d: &proto::SetDigest) -> Result<Self, ProtocolError> {
        Ok(Self {
            count: d.count,
            root: id16("a digest's root", &d.root)?,
        })
    }
}

pub(crate) fn digest_or_empty(d: Option<&proto::SetDigest>) -> Result<Digest, ProtocolError> {
    d.map_or(Ok(Digest::default()), Digest::try_from)
}

pub fn marks_to_wire(marks: &Marks) -> Vec<proto::Mark> {
    let mark = |(kind, revision): (&Kind, &u64)| proto::Mark {
        kind: u32::from(kind.number()),
        revision: *revision,
    };
    marks.iter().map(mark).collect()
}

pub fn marks_from_wire(marks: &[proto::Mark]) -> Marks {
    let known = |m: &proto::Mark| Some((Kind::from_number(u8::try_from(m.kind).ok()?), m.revision));
    marks.iter().filter_map(known).collect()
}

/// The first kind in which `view` is older than `committed`.
pub fn behind(view: &Marks, committed: &Marks) -> Option<Kind> {
    let older = |(kind, have): &(&Kind, &u64)| view.get(kind).copied().unwrap_or(0) < **have;
    committed.iter().find(older).map(|(kind, _)| *kind)
}
