//! The Pod manager: one task a Pod, a pure planner, thin application.

pub mod cgroups;
pub mod dns;
pub mod env;
mod fields;
pub mod hosts;
pub mod network;
pub mod quantity;
pub mod security;
pub(crate) mod sources;
pub mod tokens;
pub mod volumes;

#[cfg(test)]
pub(crate) mod testing;
