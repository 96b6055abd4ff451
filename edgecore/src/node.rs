//! The Node that this device is: its object and status, and what Pods on it are born with.

pub mod environment;
