//! The Pod manager: one task a Pod, a pure planner, thin application.

pub mod tokens;
