//! The one module that writes to disk: what is committed here survives a power cut.
//!
//! Nothing outside this module knows which engine it is.

pub mod desired;
pub mod events;
pub mod reports;
