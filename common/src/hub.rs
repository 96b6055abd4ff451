//! The hub: how a cloud and an edge keep one another's state, over one connection.

/// Generated from `proto/hub.proto`.
#[allow(unreachable_pub, missing_docs, clippy::all, clippy::pedantic)]
#[path = "gen/hub.rs"]
pub mod proto;

pub mod dial;
pub mod fuzz;
pub mod listen;
pub mod mux;
mod quic;
pub mod tls;
pub mod transport;
mod ws;

#[cfg(test)]
mod testing;
