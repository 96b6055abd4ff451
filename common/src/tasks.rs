//! The long-lived tasks of a process (adapter): each has a name, an owner and an end.
//!
//! - Owns: every task that was spawned here; dropping [`Tasks`] stops them all.
//! - Gives: the name of the part that ended without being asked to, panics included. Whoever
//!   supervises the process starts it again, and what it looks after never noticed.

use std::collections::HashMap;

use tokio::task::{Id, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::error;

/// A part of the process ended while the process was to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} ended by itself")]
pub struct PartEnded(pub &'static str);

#[derive(Debug, Clone, Copy)]
struct Part {
    name: &'static str,
    needed: bool,
}

/// See the module.
#[derive(Default)]
pub struct Tasks {
    running: JoinSet<()>,
    parts: HashMap<Id, Part>,
}

impl Tasks {
    /// Starts a part without which the process cannot go on.
    pub fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.start(Part { name, needed: true }, task);
    }

    /// Starts a part without which the rest works: it says itself why it ended.
    pub fn spawn_spare(
        &mut self,
        name: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        let needed = false;
        self.start(Part { name, needed }, task);
    }

    fn start(&mut self, part: Part, task: impl Future<Output = ()> + Send + 'static) {
        let id = self.running.spawn(task).id();
        self.parts.insert(id, part);
    }

    /// Waits until all have ended; `ended` hears of each by its name. A needed part that ends
    /// before `stop` is cancelled, and any that panics, cancels it.
    pub async fn supervise(
        mut self,
        stop: CancellationToken,
        mut ended: impl FnMut(&'static str),
    ) -> Result<(), PartEnded> {
        let mut fault = None;
        while let Some(end) = self.running.join_next_with_id().await {
            let (id, panic) = match end {
                Ok((id, ())) => (id, None),
                Err(error) => (error.id(), Some(error)),
            };
            let Some(Part { name, needed }) = self.parts.remove(&id) else {
                continue;
            };
            if let Some(panic) = &panic {
                error!(part = name, %panic, "a part panicked");
            }
            if (needed || panic.is_some()) && !stop.is_cancelled() {
                fault = Some(PartEnded(name));
                stop.cancel();
            }
            ended(name);
        }
        fault.map_or(Ok(()), Err)
    }
}

/// Runs what waits for a disk on a thread of its own, beside all other tasks. A panic in it is the
/// caller's.
pub async fn beside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(ended) => match ended.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The process is ending: nobody will look at this any more.
            Err(_) => std::future::pending().await,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn until(stop: CancellationToken) {
        stop.cancelled().await;
    }

    #[tokio::test]
    async fn parts_that_end_after_the_stop_are_no_fault_and_are_all_waited_for() {
        let stop = CancellationToken::new();
        let mut tasks = Tasks::default();
        tasks.spawn("a", until(stop.clone()));
        tasks.spawn("b", until(stop.clone()));
        stop.cancel();
        let mut names = Vec::new();
        assert_eq!(tasks.supervise(stop, |name| names.push(name)).await, Ok(()));
        names.sort_unstable();
        assert_eq!(names, ["a", "b"]);
    }

    #[tokio::test]
    async fn a_needed_part_that_ends_or_panics_stops_the_others_and_is_named() {
        for panics in [true, false] {
            let stop = CancellationToken::new();
            let mut tasks = Tasks::default();
            tasks.spawn("goes on", until(stop.clone()));
            tasks.spawn("at fault", async move {
                assert!(!panics, "on purpose");
            });
            let end = tasks.supervise(stop.clone(), |_| {}).await;
            assert_eq!(end, Err(PartEnded("at fault")));
            assert!(stop.is_cancelled());
        }
    }

    #[tokio::test]
    async fn a_spare_part_that_ends_stops_nothing() {
        let stop = CancellationToken::new();
        let mut tasks = Tasks::default();
        tasks.spawn("goes on", until(stop.clone()));
        tasks.spawn_spare("spare", async {});
        let mut running_at = Vec::new();
        let end = tasks.supervise(stop.clone(), |name| {
            running_at.push((name, !stop.is_cancelled()));
            stop.cancel();
        });
        assert_eq!(end.await, Ok(()));
        assert_eq!(running_at, [("spare", true), ("goes on", false)]);
    }
}
