//! Processes that an exec started and whose asker left.
//!
//! A runtime lets a process run on when the connection to its streaming server breaks. Nobody could
//! hear it any more, so it is ended: the hang-up of a lost terminal and a request to end, and a
//! moment later a kill. Owns the claims of the execs that live.
//!
//! ```text
//! claim ── settle ──► forgotten          the runtime ended first: so did the process
//!       └─ drop ────► looked for ──► HUP, TERM ──► KILL
//! ```
//!
//! CRI tells no process IDs. The process is known by what an exec'd process is: in the container's
//! cgroup with a parent outside of it, started after the exec was asked for, with its command line
//! or, where a shell or script took another one, alone in being new. When two could be meant,
//! neither is touched.

mod table;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

pub use table::{Process, Started, Ticks, Verdict, started_by, with_children};

/// As many as tunnels may end at once, and some.
const QUEUE: usize = 128;
/// When to look: the runtime may be about to start the process when its asker leaves.
const LOOKS: [Duration; 4] = [
    Duration::ZERO,
    Duration::from_millis(150),
    Duration::from_millis(400),
    Duration::from_millis(1500),
];
/// Between the request to end and the kill: with the splice's own grace, within a second.
const GRACE: Duration = Duration::from_millis(400);
/// Between two looks at whether all have ended.
const POLL: Duration = Duration::from_millis(50);
/// At the end of edgecore, for those that are being ended.
const DRAIN: Duration = Duration::from_secs(2);

/// Where execs claim the process they start; cheap to clone.
#[derive(Clone)]
pub struct Leftovers {
    shared: Arc<Shared>,
}

struct Shared {
    next: AtomicU64,
    claims: Mutex<Vec<Started>>,
    queue: mpsc::Sender<Started>,
}

impl Shared {
    fn claims(&self) -> MutexGuard<'_, Vec<Started>> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget(&self, id: u64) {
        self.claims().retain(|c| c.id != id);
    }

    /// The other execs into the same container.
    fn others(&self, mine: &Started) -> Vec<Started> {
        let all = self.claims();
        let others = all.iter();
        others
            .filter(|c| c.id != mine.id && c.container == mine.container)
            .cloned()
            .collect()
    }
}

/// One exec's claim. Dropped without [`Claim::settle`], the process is looked for and ended.
pub struct Claim {
    started: Option<Started>,
    shared: Arc<Shared>,
}

impl Claim {
    /// The process has ended by itself, or was never started.
    pub fn settle(mut self) {
        if let Some(started) = self.started.take() {
            self.shared.forget(started.id);
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let Some(started) = self.started.take() else {
            return;
        };
        if let Err(error) = self.shared.queue.try_send(started) {
            let (mpsc::error::TrySendError::Full(lost) | mpsc::error::TrySendError::Closed(lost)) =
                error;
            self.shared.forget(lost.id);
            warn!(
                container = lost.container,
                "a process whose asker left may run on"
            );
        }
    }
}

impl Leftovers {
    pub fn build() -> (Self, Task) {
        let (queue, left) = mpsc::channel(QUEUE);
        let shared = Arc::new(Shared {
            next: AtomicU64::new(0),
            claims: Mutex::default(),
            queue,
        });
        let task = Task {
            left,
            shared: shared.clone(),
        };
        (Self { shared }, task)
    }

    /// To be made before the runtime hears of the exec.
    pub fn claim(&self, container: &str, command: &[String]) -> Claim {
        let started = Started {
            id: self.shared.next.fetch_add(1, Ordering::Relaxed),
            container: container.to_owned(),
            command: command.to_vec(),
            asked: Ticks::now(),
        };
        self.shared.claims().push(started.clone());
        Claim {
            started: Some(started),
            shared: self.shared.clone(),
        }
    }
}

/// Ends what is left. Its own task, so that a tunnel that is dropped needs no time for it.
pub struct Task {
    left: mpsc::Receiver<Started>,
    shared: Arc<Shared>,
}

impl Task {
    /// Until shutdown, and then until those at hand are ended.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut work = JoinSet::new();
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                Some(_) = work.join_next(), if !work.is_empty() => {}
                Some(started) = self.left.recv() => {
                    work.spawn(end(started, self.shared.clone()));
                }
            }
        }
        let drain = async {
            loop {
                tokio::select! {
                    biased;
                    Some(started) = self.left.recv() => {
                        work.spawn(end(started, self.shared.clone()));
                    }
                    ended = work.join_next() => if ended.is_none() && self.shared.claims().is_empty() {
                        return;
                    } else if ended.is_none() {
                        // Tunnels that are about to be dropped.
                        tokio::time::sleep(POLL).await;
                    }
                }
            }
        };
        let _ = tokio::time::timeout(DRAIN, drain).await;
    }
}

/// Looks for one process until it is found or cannot come any more, and ends it.
async fn end(started: Started, shared: Arc<Shared>) {
    let mut waited = Duration::ZERO;
    for after in LOOKS {
        tokio::time::sleep(after - waited).await;
        waited = after;
        let processes = look(&started.container).await;
        match started_by(&started, &shared.others(&started), &processes) {
            Verdict::None => {}
            Verdict::Unclear(count) => {
                warn!(
                    container = started.container,
                    count, "which process an exec left behind is not clear: it may run on"
                );
                break;
            }
            Verdict::Found(root) => {
                finish(&started, root).await;
                break;
            }
        }
    }
    shared.forget(started.id);
}

/// Ends a process and all that came of it.
async fn finish(started: &Started, root: Process) {
    info!(
        container = started.container,
        pid = root.pid,
        "ending a process whose asker left"
    );
    let mut alive = with_children(&root, &look(&started.container).await);
    for signal in [Signal::SIGHUP, Signal::SIGTERM, Signal::SIGCONT] {
        send(&alive, signal);
    }
    let deadline = tokio::time::Instant::now() + GRACE;
    while !alive.is_empty() && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(POLL).await;
        let now = look(&started.container).await;
        alive.retain(|p| now.iter().any(|n| n.is(p)));
    }
    if !alive.is_empty() {
        debug!(count = alive.len(), "killing what did not end");
        send(&alive, Signal::SIGKILL);
    }
}

/// To processes that were there a moment ago; one that ended meanwhile needs none.
fn send(to: &[Process], signal: Signal) {
    for process in to {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(process.pid), signal);
    }
}

/// The container's processes. Reading `/proc` takes milliseconds where there are hundreds.
async fn look(container: &str) -> Vec<Process> {
    let container = container.to_owned();
    let read = tokio::task::spawn_blocking(move || table::read(&container));
    read.await.unwrap_or_default()
}
