//! The Pod manager: one task a Pod, a pure planner, thin application.

pub mod cgroups;
pub mod dns;
pub mod env;
pub mod hosts;
pub mod network;
pub mod security;
pub mod tokens;
pub mod volumes;
