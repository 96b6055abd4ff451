//! The only writer of statuses to the API server: starts flights as the queue lets them.
//!
//! - Owns: the flights under way.
//! - Takes: marks through the queue that it shares with the sessions' handles.
//! - Gives: statuses in the API, acknowledgements to the sessions.
//! - Never: starts more flights than the window has room for, or two of one object.
//!
//! At shutdown no flight is started any more; those under way get a moment to end.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::flight::fly;
use super::queue::{Taken, Verdict};
use super::shared::Shared;

const SWEEP_EVERY: Duration = Duration::from_secs(60);
/// A healthy API server answers in milliseconds; what is cut here is compared again by whoever
/// holds the node next.
const DRAIN: Duration = Duration::from_secs(2);
/// After a flight that panicked: a fault of ours, tried again without haste.
const AFTER_PANIC: Verdict = Verdict::Wait {
    delay: Duration::from_secs(30),
    until_change: false,
};

/// Runs the flights; see [`super::build`].
pub struct Task {
    pub(super) shared: Arc<Shared>,
}

impl Task {
    /// Ends with the token, after the flights under way or two seconds.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut flights = JoinSet::new();
        let mut sweep = Instant::now() + SWEEP_EVERY;
        loop {
            while let Some(taken) = self.shared.take() {
                flights.spawn(flight(self.shared.clone(), taken));
            }
            let due = self.shared.next_due().map_or(sweep, |due| due.min(sweep));
            // Each branch can be cut: what is ready stays in the queue.
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                Some(_) = flights.join_next() => {}
                () = self.shared.wake.notified() => {}
                () = sleep_until(due) => {}
            }
            if Instant::now() >= sweep {
                self.shared.sweep();
                sweep = Instant::now() + SWEEP_EVERY;
            }
        }
        let drained = async { while flights.join_next().await.is_some() {} };
        // What is cut after that is dropped with the set.
        let _ = timeout(DRAIN, drained).await;
    }
}

async fn flight(shared: Arc<Shared>, taken: Taken) {
    let mut landing = Landing {
        shared: &shared,
        taken: &taken,
        verdict: AFTER_PANIC,
    };
    landing.verdict = fly(&shared, &taken).await;
}

/// Gives the object back to the queue also when the flight panics.
struct Landing<'a> {
    shared: &'a Shared,
    taken: &'a Taken,
    verdict: Verdict,
}

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        self.shared.done(self.taken, self.verdict);
    }
}
