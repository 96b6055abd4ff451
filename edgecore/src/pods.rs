//! The Pod manager: one task a Pod, a pure planner, thin application.

pub mod admit;
pub mod cgroups;
pub mod dns;
pub mod env;
pub mod evict;
mod fields;
pub mod gc;
pub mod hosts;
pub mod images;
pub mod jobs;
pub mod ledger;
pub mod lifecycle;
pub mod manager;
pub mod network;
pub mod observe;
pub mod plan;
pub mod quantity;
pub mod restart;
pub mod rotate;
pub mod security;
pub mod seen;
pub(crate) mod sources;
pub mod status;
pub mod tokens;
pub mod volumes;
pub mod worker;

#[cfg(test)]
pub(crate) mod testing;
