//! The Pod manager: one task a Pod, a pure planner, thin application.

pub mod admit;
pub mod gc;
pub mod images;
pub mod jobs;
pub mod ledger;
pub mod lifecycle;
pub mod manager;
pub mod observe;
pub mod plan;
pub mod restart;
pub mod seen;
pub mod status;
pub mod tokens;
pub mod worker;
