//! How many connections all endpoints have together, and who is told when there is no place.
//!
//! A scraper keeps one to each node, so that there are as many as endpoints and some: no more than
//! the open files of this process leave room for.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::ids::NodeName;
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
    /// Asks the kernel how many files this process may have open.
    pub(super) fn of_this_process() -> Self {
        let limits = std::fs::read_to_string("/proc/self/limits");
        Self::with(open_files(&limits.unwrap_or_default()))
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

/// The soft limit of open files in `/proc/self/limits`; where it is not told, only the other limit
/// holds.
fn open_files(limits: &str) -> usize {
    let line = limits
        .lines()
        .find_map(|l| l.strip_prefix("Max open files"));
    let soft = line.and_then(|line| line.split_whitespace().next());
    soft.and_then(|soft| soft.parse().ok())
        .unwrap_or(usize::MAX)
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

    #[test]
    fn the_kernel_tells_how_many_files_may_be_open() {
        let head =
            "Limit                     Soft Limit           Hard Limit           Units     \n";
        for (line, want) in [
            (
                "Max open files            1024                 524288               files     \n",
                1024,
            ),
            (
                "Max open files            unlimited            unlimited            files     \n",
                usize::MAX,
            ),
            (
                "Max processes             7                    7                    processes \n",
                usize::MAX,
            ),
            ("", usize::MAX),
        ] {
            assert_eq!(open_files(&format!("{head}{line}")), want, "{line:?}");
        }
        assert!(Connections::of_this_process().files < usize::MAX);
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
