//! How many connections all endpoints have together, and who is told when there is no place.
//!
//! A scraper keeps one to each node, so that there are as many as endpoints and some: no more than
//! the open files of this process leave room for.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::ids::NodeName;
use nix::sys::resource::{Resource, getrlimit};
use tokio::time::Instant;
use tracing::warn;

use crate::hub::pace::Pace;

/// Of one node: its tunnels, as many idle ones of API servers and scrapers.
pub(super) const OF_A_NODE: usize = 128;
/// Of all nodes, at about 30 KB when idle; and one more for each endpoint.
const OF_ALL: usize = 4096;
/// One in three open files: the endpoints have one each, and so have sessions over WebSocket.
const OF_FILES: usize = 3;
/// Between two warnings of the same kind.
const WARN_EVERY: Duration = Duration::from_secs(60);

/// See the module.
pub(super) struct Connections {
    open: AtomicUsize,
    files: usize,
    /// By node; of all together without one.
    warned: Pace<Option<NodeName>>,
}

/// One connection's place; free again when dropped.
pub(super) struct Place<'a>(&'a AtomicUsize);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Connections {
    /// As many files may be open as the kernel lets; without an answer only the other limit holds.
    pub(super) fn of_this_process() -> Self {
        let files = getrlimit(Resource::RLIMIT_NOFILE).ok();
        let soft = files.and_then(|(soft, _)| usize::try_from(soft).ok());
        Self::with(soft.unwrap_or(usize::MAX))
    }

    fn with(files: usize) -> Self {
        Self {
            open: AtomicUsize::new(0),
            files,
            warned: Pace::new(1, WARN_EVERY),
        }
    }

    /// A place, while so many endpoints are served. Without one the log says what to do.
    pub(super) fn take(&self, endpoints: usize) -> Option<Place<'_>> {
        let most = most(endpoints, self.files);
        let more = |open: usize| (open < most).then(|| open + 1);
        let taken = self
            .open
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        if taken.is_err() && self.warned.take(None, Instant::now()).is_ok() {
            warn!(
                most,
                files = self.files,
                "the kubelet endpoints have all connections that they may have, and further ones are closed: run more replicas, allow more open files (ulimit -n), or find out who keeps so many open (ss -tn)"
            );
        }
        taken.is_ok().then(|| Place(&self.open))
    }

    /// A node's endpoint has all the connections that it may have.
    pub(super) fn node_is_full(&self, node: &NodeName) {
        if self.warned.take(Some(node.clone()), Instant::now()).is_ok() {
            warn!(
                %node,
                most = OF_A_NODE,
                "the node's kubelet endpoint has all connections that it may have, and further ones wait: end some streams (kubectl logs -f, exec, port-forward), or find out who keeps so many open (ss -tn)"
            );
        }
    }
}

fn most(endpoints: usize, files: usize) -> usize {
    OF_ALL.saturating_add(endpoints).min(files / OF_FILES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_as_many_as_endpoints_and_some_as_far_as_open_files_go() {
        for (endpoints, files, want) in [
            (0, usize::MAX, 4096),
            (10_000, usize::MAX, 14_096),
            (10_000, 65_536, 14_096),
            (10_000, 30_000, 10_000),
            (0, 1024, 341),
        ] {
            assert_eq!(most(endpoints, files), want, "{endpoints} of {files}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_is_free_again_when_its_connection_ends_and_a_warning_comes_once_a_minute() {
        let connections = Connections::with(2 * OF_FILES);
        let first = connections.take(0);
        let second = connections.take(0);
        assert!(first.is_some() && second.is_some());
        assert!(connections.take(0).is_none());
        let warned = || connections.warned.take(None, Instant::now()).is_err();
        assert!(warned(), "it was said a moment ago");
        drop(second);
        assert!(connections.take(0).is_some());
        tokio::time::advance(WARN_EVERY).await;
        assert!(!warned());
    }
}
