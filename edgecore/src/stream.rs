//! The node's kubelet API: logs, statistics and metrics.

pub mod logs;
pub mod metrics;
pub mod stats;
