//! Two lines for each tunnel: who opened what, and how it ended. Never a command's words, never
//! what was carried.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::ids::NodeName;
use common::stream::request::Target;
use http::Method;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::metrics::Metrics;

/// How a tunnel ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    /// The asker's connection went before the answer had ended; or CloudCore closed it, where it
    /// was closing the endpoint.
    AskerGone,
    /// The node said all.
    Complete,
    /// The node did not answer, or its link or its stream ended before the answer had.
    Broken(String),
}

/// Bytes of both directions, counted where they pass.
#[derive(Debug, Default)]
pub(super) struct Bytes {
    pub(super) there: AtomicU64,
    pub(super) back: AtomicU64,
}

impl Bytes {
    pub(super) fn passed(&self, back: bool, count: usize) {
        let direction = if back { &self.back } else { &self.there };
        direction.fetch_add(count as u64, Ordering::Relaxed);
    }
}

/// An open tunnel: says so when made, and how it ended when dropped.
pub(super) struct Opened {
    id: u64,
    metrics: Metrics,
    since: Instant,
    node: NodeName,
    verb: &'static str,
    /// Cancelled when CloudCore closes the node's endpoint, or stops.
    closing: CancellationToken,
    pub(super) status: u16,
    pub(super) end: End,
    pub(super) bytes: Arc<Bytes>,
}

impl Opened {
    pub(super) fn new(
        id: u64,
        principal: &str,
        node: &NodeName,
        method: &Method,
        target: &Target,
        closing: CancellationToken,
        metrics: Metrics,
    ) -> Self {
        let (pod, verb) = (target.pod(), target.verb());
        info!(
            target: "audit",
            tunnel = id,
            principal,
            verb,
            %node,
            %method,
            namespace = pod.map(|p| p.namespace.as_str()),
            pod = pod.map(|p| p.name.as_str()),
            container = target.container(),
            "a tunnel opened"
        );
        metrics.opened(verb);
        Self {
            id,
            metrics,
            since: Instant::now(),
            node: node.clone(),
            verb,
            closing,
            status: 0,
            end: End::AskerGone,
            bytes: Arc::default(),
        }
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        let there = self.bytes.there.load(Ordering::Relaxed);
        let back = self.bytes.back.load(Ordering::Relaxed);
        self.metrics.closed(there, back);
        let end = match &self.end {
            End::AskerGone if self.closing.is_cancelled() => "cloudcore closed the endpoint",
            End::AskerGone => "the asker left",
            End::Complete => "complete",
            End::Broken(why) => why,
        };
        info!(
            target: "audit",
            tunnel = self.id,
            verb = self.verb,
            node = %self.node,
            status = self.status,
            bytes_there = there,
            bytes_back = back,
            ms = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX),
            end,
            "a tunnel closed"
        );
    }
}
