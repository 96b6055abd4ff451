//! The hub: how a cloud and an edge keep one another's state, over one connection.
//!
//! What crosses is "the object with this key now has this content", latest value wins, in both
//! directions. A reconnect is a set difference; when nothing changed it is one digest.
//!
//! ```text
//! edge                                   cloud
//!  | Hello (what I hold: one digest)  --> |   claim the node's Lease
//!  | <-- Welcome (time, link, environment)|
//!  |   commit, WelcomeAck             --> |   equal digest: one empty complete Batch
//!  | <-- WantInventory   (only if not)    |
//!  |     Inventory                    --> |
//!  | <-- Batch (puts as deltas, removes)  |
//!  |   commit, BatchAck               --> |
//!  |     Reports, Events, Request     --> |   to the API server
//!  | <-- ReportAcks, EventsAck, Response  |
//! ```
//!
//! `session` holds both state machines, without sockets and clock; `frame` and `delta` are the
//! bytes; the transports carry them.

pub mod delta;
pub mod dial;
pub mod frame;
pub mod fuzz;
pub mod lanes;
pub mod listen;
pub mod mux;
mod quic;
mod redacted;
pub mod session;
#[cfg(test)]
mod testing;
pub mod tls;
pub mod transport;
mod ws;

/// Generated from `proto/hub.proto`.
#[path = "gen/hub.rs"]
pub mod proto;

/// The version of the session protocol that this code speaks.
pub const PROTOCOL_VERSION: u32 = 1;

/// The lanes of a session: each delivers in order, and none waits for a later one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lane {
    Control,
    Status,
    Bulk,
}

impl Lane {
    pub const ALL: [Lane; 3] = [Lane::Control, Lane::Status, Lane::Bulk];

    pub fn stream_kind(self) -> proto::StreamKind {
        match self {
            Lane::Control => proto::StreamKind::StreamControl,
            Lane::Status => proto::StreamKind::StreamStatus,
            Lane::Bulk => proto::StreamKind::StreamBulk,
        }
    }
}

/// Stands for a `NodeEnvironment` as its bytes lie in the edge's store; empty for none.
pub fn environment_hash(bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return String::new();
    }
    let content = crate::object::Content::Present(bytes.into());
    let hash = crate::object::ContentHash::of(&content);
    hash.0.iter().map(|b| format!("{b:02x}")).collect()
}
