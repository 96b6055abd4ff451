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
//! or, where a shell or script took another one, alone in being new. When two could be meant and the
//! asker of one is still there, neither is touched; the claim is put aside until another one into
//! the container is over. Execs of hooks make claims too, by [`ours`]: theirs are never ended here.

mod table;
#[cfg(test)]
mod tests;

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
/// When to look: the runtime may be about to start the process when its asker leaves, and which it
/// is may become clear.
const LOOKS: [Duration; 4] = [
    Duration::ZERO,
    Duration::from_millis(150),
    Duration::from_millis(400),
    LAST_LOOK,
];
const LAST_LOOK: Duration = Duration::from_millis(1500);
/// Between the request to end and the kill: with the splice's own grace, within a second.
const GRACE: Duration = Duration::from_millis(400);
/// Between two looks at whether all have ended.
const POLL: Duration = Duration::from_millis(50);
/// Claims put aside, and ended processes, that are remembered.
const REMEMBERED: usize = 256;
/// At the end of edgecore, for those that are being ended.
const DRAIN: Duration = Duration::from_secs(2);

/// Where execs claim the process they start; cheap to clone.
#[derive(Clone)]
pub struct Leftovers {
    shared: Arc<Shared>,
}

struct Shared {
    known: Mutex<Known>,
    queue: mpsc::Sender<Started>,
    device: Box<dyn Device>,
}

#[derive(Default)]
struct Known {
    /// Their askers are there, or they are being looked for.
    claims: Vec<Started>,
    /// Looked for in vain: which process is meant was not clear.
    aside: Vec<Started>,
    /// Ended or being ended, and so nobody's any more.
    ended: Vec<(i32, Ticks)>,
}

impl Known {
    fn ended<'a>(&mut self, processes: impl IntoIterator<Item = &'a Process>) {
        let ids = processes.into_iter().map(|p| (p.pid, p.began));
        self.ended.extend(ids);
        shorten(&mut self.ended);
    }
}

/// To the latest.
fn shorten<T>(list: &mut Vec<T>) {
    let excess = list.len().saturating_sub(REMEMBERED);
    list.drain(..excess);
}

/// What the kernel knows; a script in tests.
trait Device: Send + Sync {
    fn now(&self) -> Ticks;
    /// A container's processes. Reading `/proc` takes milliseconds where there are hundreds.
    fn processes(&self, container: &str) -> Vec<Process>;
    /// To a process that was there a moment ago; one that ended meanwhile needs none.
    fn send(&self, to: &Process, signal: Signal);
}

struct Kernel;

impl Device for Kernel {
    fn now(&self) -> Ticks {
        Ticks::now()
    }

    fn processes(&self, container: &str) -> Vec<Process> {
        table::read(container)
    }

    fn send(&self, to: &Process, signal: Signal) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(to.pid), signal);
    }
}

static NEXT: AtomicU64 = AtomicU64::new(0);
/// One list for the device, as there is one `/proc`: hooks know no [`Leftovers`].
static OURS: Mutex<Vec<Started>> = Mutex::new(Vec::new());

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An exec whose output the runtime answers with; until dropped.
pub struct Ours(u64);

/// Claims the process of an exec that the runtime itself ends: by its answer, at the call's deadline
/// or when the call is dropped. No other claim takes it for its own.
pub fn ours(container: &str, command: &[String]) -> Ours {
    let started = started(container, command, Ticks::now());
    let id = started.id;
    lock(&OURS).push(started);
    Ours(id)
}

#[cfg(test)]
pub(crate) fn count_ours(container: &str) -> usize {
    let ours = lock(&OURS);
    ours.iter().filter(|c| c.container == container).count()
}

impl Drop for Ours {
    fn drop(&mut self) {
        lock(&OURS).retain(|c| c.id != self.0);
    }
}

fn started(container: &str, command: &[String], asked: Ticks) -> Started {
    Started {
        id: NEXT.fetch_add(1, Ordering::Relaxed),
        container: container.to_owned(),
        command: command.to_vec(),
        asked,
        left: None,
    }
}

impl Shared {
    /// Which process is meant. One that is found is nobody else's from here on, and its claim over;
    /// one that is not clear at the `last` look is put aside.
    fn judge(&self, mine: &Started, table: &[Process], last: bool) -> Verdict {
        let mut known = lock(&self.known);
        let ours = lock(&OURS);
        let all = known.claims.iter().chain(&known.aside).chain(&*ours);
        let others: Vec<Started> = all
            .filter(|c| c.id != mine.id && c.container == mine.container)
            .cloned()
            .collect();
        drop(ours);
        let verdict = started_by(mine, &others, table, &known.ended);
        match &verdict {
            Verdict::Found(root) => {
                known.ended([root]);
                self.over(&mut known, mine);
            }
            Verdict::None if last => self.over(&mut known, mine),
            Verdict::Unclear(_) if last => {
                known.claims.retain(|c| c.id != mine.id);
                known.aside.push(mine.clone());
                shorten(&mut known.aside);
            }
            Verdict::None | Verdict::Unclear(_) => {}
        }
        verdict
    }

    /// Forgets a claim; what was not clear may be so now.
    fn over(&self, known: &mut Known, mine: &Started) {
        known.claims.retain(|c| c.id != mine.id);
        let aside = std::mem::take(&mut known.aside);
        for started in aside {
            if started.container == mine.container && self.queue.try_send(started.clone()).is_ok() {
                known.claims.push(started);
            } else {
                known.aside.push(started);
            }
        }
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
            let mut known = lock(&self.shared.known);
            self.shared.over(&mut known, &started);
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let Some(mut started) = self.started.take() else {
            return;
        };
        started.left = Some(self.shared.device.now());
        let mut known = lock(&self.shared.known);
        for claim in &mut known.claims {
            if claim.id == started.id {
                claim.left = started.left;
            }
        }
        if let Err(error) = self.shared.queue.try_send(started) {
            let (mpsc::error::TrySendError::Full(lost) | mpsc::error::TrySendError::Closed(lost)) =
                error;
            known.claims.retain(|c| c.id != lost.id);
            warn!(
                container = lost.container,
                "a process whose asker left may run on"
            );
        }
    }
}

impl Leftovers {
    pub fn build() -> (Self, Task) {
        Self::on(Box::new(Kernel))
    }

    fn on(device: Box<dyn Device>) -> (Self, Task) {
        let (queue, left) = mpsc::channel(QUEUE);
        let shared = Arc::new(Shared {
            known: Mutex::default(),
            queue,
            device,
        });
        let task = Task {
            left,
            shared: shared.clone(),
        };
        (Self { shared }, task)
    }

    #[cfg(test)]
    pub(super) fn count_claims(&self) -> usize {
        lock(&self.shared.known).claims.len()
    }

    /// To be made before the runtime hears of the exec.
    pub fn claim(&self, container: &str, command: &[String]) -> Claim {
        let started = started(container, command, self.shared.device.now());
        lock(&self.shared.known).claims.push(started.clone());
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
                    ended = work.join_next() => if ended.is_none() && lock(&self.shared.known).claims.is_empty() {
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
        let processes = look(&shared, &started.container).await;
        let last = after == LAST_LOOK;
        match shared.judge(&started, &processes, last) {
            Verdict::Unclear(count) if last => warn!(
                container = started.container,
                count, "which process an exec left behind is not clear: it may run on"
            ),
            Verdict::None | Verdict::Unclear(_) => {}
            Verdict::Found(root) => return finish(&started, root, &shared).await,
        }
    }
}

/// Ends a process and all that came of it.
async fn finish(started: &Started, root: Process, shared: &Arc<Shared>) {
    info!(
        container = started.container,
        pid = root.pid,
        "ending a process whose asker left"
    );
    let mut alive = with_children(&root, &look(shared, &started.container).await);
    lock(&shared.known).ended(&alive);
    for signal in [Signal::SIGHUP, Signal::SIGTERM, Signal::SIGCONT] {
        send(shared, &alive, signal);
    }
    let deadline = tokio::time::Instant::now() + GRACE;
    while !alive.is_empty() && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(POLL).await;
        let now = look(shared, &started.container).await;
        alive.retain(|p| now.iter().any(|n| n.is(p)));
    }
    if !alive.is_empty() {
        debug!(count = alive.len(), "killing what did not end");
        send(shared, &alive, Signal::SIGKILL);
    }
}

fn send(shared: &Shared, to: &[Process], signal: Signal) {
    for process in to {
        shared.device.send(process, signal);
    }
}

async fn look(shared: &Arc<Shared>, container: &str) -> Vec<Process> {
    let (shared, container) = (shared.clone(), container.to_owned());
    let read = tokio::task::spawn_blocking(move || shared.device.processes(&container));
    read.await.unwrap_or_default()
}
