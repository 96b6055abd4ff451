//! The Node that this device is: its object and status, and what Pods on it are born with.

pub mod addresses;
pub mod ca;
pub mod dns;
pub mod environment;
pub mod facts;
pub mod network;
pub mod reporter;
pub mod status;
