//! Commits: groups what many threads commit into one sync, keeps both copies in step.
//!
//! Owns the snapshot and the records; nobody else writes to them. A commit goes
//! `queue → snapshot (synced) → records → the caller`. Whoever finds no leader leads: it takes all
//! that waits, writes it with one sync, and wakes the others with their answers.
//!
//! What may be late is staged by key and committed by one background thread within [`LATE`], which
//! also makes a checkpoint of the records [`CHECKPOINT`] after the first commit that lacks one. A
//! store without commits has no timer and writes nothing.
//!
//! Lock order: log, staged, queue, records. Never: a callback under a lock.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tracing::warn;

use super::StoreError;
use super::database::{MAX_KEY, Record, Records};
use super::schema::{Table, Write};
use super::snapshot::{self, AppendError, Head, MAX_BATCH, Snapshot};

/// Long enough to put the statuses of Pods that start together into one sync; short against what a
/// power cut takes, since a status is observed again at the next start.
const LATE: Duration = Duration::from_millis(100);

/// Bounds how much is in one copy only, at the price of at most one flush of the records a minute.
const CHECKPOINT: Duration = Duration::from_secs(60);

/// The record that says that the store was closed in order; the first commit removes it.
pub(super) const CLOSED: &[u8] = b"closed";

/// What cannot be written (the disk is full) is tried again after this.
const RETRY: Duration = Duration::from_secs(5);

pub(super) type Then = Box<dyn FnOnce() + Send>;

pub(super) struct Engine {
    dir: PathBuf,
    records: RwLock<Records>,
    log: Mutex<Log>,
    queue: Mutex<Queue>,
    turn: Condvar,
    staged: Mutex<Staged>,
    wake: Condvar,
    /// Nothing is late, and there is no background thread.
    in_memory: bool,
}

struct Log {
    /// None: a store in memory.
    snapshot: Option<Snapshot>,
    /// The records hold [`CLOSED`].
    closed: bool,
    /// A failed compaction is tried again after this many more groups.
    compaction_pause: u32,
}

/// Bounded by the callers: each thread has at most one batch of at most [`MAX_BATCH`] in it.
#[derive(Default)]
struct Queue {
    pending: Vec<Vec<Write>>,
    next: u64,
    done: u64,
    leading: bool,
    errors: BTreeMap<u64, StoreError>,
    /// Set once, when it is unknown what is on disk.
    failed: Option<StoreError>,
}

/// Bounded by its keys: the tables whose writes may be late hold a bounded number of records.
#[derive(Default)]
struct Staged {
    writes: BTreeMap<(Table, Vec<u8>), Option<Vec<u8>>>,
    then: Vec<Then>,
    due: Option<Instant>,
    checkpoint: Option<Instant>,
    stop: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Engine {
    pub(super) fn new(
        dir: &Path,
        records: Records,
        snapshot: Option<Snapshot>,
        closed: bool,
    ) -> Self {
        let in_memory = snapshot.is_none();
        Self {
            dir: dir.to_owned(),
            records: RwLock::new(records),
            log: Mutex::new(Log {
                snapshot,
                closed,
                compaction_pause: 0,
            }),
            queue: Mutex::default(),
            turn: Condvar::new(),
            staged: Mutex::default(),
            wake: Condvar::new(),
            in_memory,
        }
    }

    fn damage(&self, what: String) -> StoreError {
        StoreError::Database {
            dir: self.dir.clone(),
            why: what,
        }
    }

    pub(super) fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let records = self.records.read().unwrap_or_else(PoisonError::into_inner);
        records.get(table, key).map_err(|e| self.damage(e))
    }

    pub(super) fn scan(&self, table: Table, prefix: &[u8]) -> Result<Vec<Record>, StoreError> {
        let records = self.records.read().unwrap_or_else(PoisonError::into_inner);
        records.scan(table, prefix).map_err(|e| self.damage(e))
    }

    /// Blocks until all of `writes` survive a power cut.
    pub(super) fn commit(&self, writes: Vec<Write>) -> Result<(), StoreError> {
        check(&writes)?;
        if writes.is_empty() {
            return Ok(());
        }
        let mut staged = lock(&self.staged);
        for w in &writes {
            // A late value that is older must not come after this one.
            staged.writes.remove(&(w.table, w.key.clone()));
        }
        let ticket = self.enqueue(writes);
        drop(staged);
        self.wait(ticket)
    }

    /// The writes become durable within [`LATE`]; a later write to the same key replaces them.
    pub(super) fn later(&self, writes: Vec<Write>) {
        self.stage(writes, LATE, None);
    }

    /// As [`Self::later`], at once; `then` is called when they and all that was staged before are
    /// durable. It is not called when the store fails for good.
    pub(super) fn soon(&self, writes: Vec<Write>, then: Then) {
        self.stage(writes, Duration::ZERO, Some(then));
    }

    fn stage(&self, writes: Vec<Write>, delay: Duration, then: Option<Then>) {
        if self.in_memory {
            self.say(self.commit(writes));
            return then.into_iter().for_each(|then| then());
        }
        if let Err(e) = check(&writes) {
            return self.say(Err(e));
        }
        let mut staged = lock(&self.staged);
        for w in writes {
            staged.writes.insert((w.table, w.key), w.value);
        }
        staged.then.extend(then);
        let due = Instant::now() + delay;
        if staged.due.is_none_or(|d| due < d) {
            staged.due = Some(due);
            self.wake.notify_one();
        }
    }

    fn say(&self, result: Result<(), StoreError>) {
        if let Err(e) = result {
            warn!(error = %e, why = e.source(), "records were not stored");
        }
    }

    /// Blocks until what was staged is durable.
    pub(super) fn flush(&self) -> Result<(), StoreError> {
        self.commit_staged(lock(&self.staged))
    }

    fn commit_staged(&self, mut staged: MutexGuard<'_, Staged>) -> Result<(), StoreError> {
        let taken = std::mem::take(&mut staged.writes);
        let then = std::mem::take(&mut staged.then);
        staged.due = None;
        let write = |((table, key), value): (&(Table, Vec<u8>), &Option<Vec<u8>>)| Write {
            table: *table,
            key: key.clone(),
            value: value.clone(),
        };
        let ticket = match taken.is_empty() {
            true => lock(&self.queue).next,
            false => self.enqueue(taken.iter().map(write).collect()),
        };
        drop(staged);
        match self.wait(ticket) {
            Ok(()) => then.into_iter().for_each(|then| then()),
            Err(e) => {
                self.stage_again(taken, then);
                return Err(e);
            }
        }
        Ok(())
    }

    fn stage_again(&self, taken: BTreeMap<(Table, Vec<u8>), Option<Vec<u8>>>, then: Vec<Then>) {
        if lock(&self.queue).failed.is_some() {
            return;
        }
        let mut staged = lock(&self.staged);
        for (key, value) in taken {
            staged.writes.entry(key).or_insert(value);
        }
        staged.then.extend(then);
        staged.due = Some(Instant::now() + RETRY);
        self.wake.notify_one();
    }

    /// Forgets what is staged under a prefix, and waits until what is being committed is readable.
    pub(super) fn unstage(&self, table: Table, prefix: &[u8]) {
        let mut staged = lock(&self.staged);
        let under = |t: Table, key: &[u8]| t == table && key.starts_with(prefix);
        staged.writes.retain(|(t, key), _| !under(*t, key));
        let mut queue = lock(&self.queue);
        drop(staged);
        let last = queue.next;
        while queue.done < last {
            queue = self
                .turn
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn enqueue(&self, writes: Vec<Write>) -> u64 {
        let mut queue = lock(&self.queue);
        queue.pending.push(writes);
        queue.next += 1;
        queue.next
    }

    fn wait(&self, ticket: u64) -> Result<(), StoreError> {
        let mut queue = lock(&self.queue);
        loop {
            if queue.done >= ticket {
                return queue.errors.remove(&ticket).map_or(Ok(()), Err);
            }
            if queue.leading {
                queue = self
                    .turn
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            queue.leading = true;
            let (group, last) = (std::mem::take(&mut queue.pending), queue.next);
            let failed = queue.failed.clone();
            drop(queue);
            let result = failed.map_or_else(|| self.write_group(group), |e| Err((e, true)));
            queue = lock(&self.queue);
            queue.leading = false;
            if let Err((error, fatal)) = result {
                for t in queue.done + 1..=last {
                    queue.errors.insert(t, error.clone());
                }
                queue.failed = queue.failed.take().or(fatal.then_some(error));
            }
            queue.done = last;
            self.turn.notify_all();
        }
    }

    /// One sync for all batches of the group. The flag says that no later commit can succeed.
    fn write_group(&self, mut group: Vec<Vec<Write>>) -> Result<(), (StoreError, bool)> {
        let mut log = lock(&self.log);
        for batch in &mut group {
            if log.closed {
                batch.insert(0, Write::remove(Table::State, CLOSED));
            }
            log.closed = batch.last().is_some_and(is_closed_mark);
        }
        let first = self.seq() + 1;
        if let Some(snapshot) = &mut log.snapshot {
            let mut frames = Vec::new();
            for (seq, batch) in (first..).zip(&group) {
                snapshot::encode(seq, batch, &mut frames);
            }
            snapshot.append(&frames).map_err(|e| match e {
                AppendError::Refused(source) => (self.io("append to", snapshot, source), false),
                AppendError::Fatal(source) => (self.io("sync", snapshot, source), true),
            })?;
        }
        let mut records = self.records.write().unwrap_or_else(PoisonError::into_inner);
        for (seq, batch) in (first..).zip(group) {
            let applied = records.apply(seq, batch);
            applied.map_err(|e| (self.damage(e), true))?;
        }
        drop(records);
        self.after_group(&mut log);
        Ok(())
    }

    fn io(&self, what: &'static str, snapshot: &Snapshot, source: std::io::Error) -> StoreError {
        StoreError::io(what, snapshot.path(), source)
    }

    fn seq(&self) -> u64 {
        let records = self.records.read().unwrap_or_else(PoisonError::into_inner);
        records.about().seq
    }

    fn after_group(&self, log: &mut Log) {
        let Some(snapshot) = &log.snapshot else {
            return;
        };
        if !snapshot.wants_compaction() {
            return self.plan_checkpoint();
        }
        if log.compaction_pause > 0 {
            log.compaction_pause -= 1;
            return;
        }
        match self.compact(log) {
            Ok(()) => lock(&self.staged).checkpoint = None,
            Err(e) => {
                // Every batch is in the old file: nothing is lost by waiting, but it grows.
                log.compaction_pause = 1000;
                warn!(error = %e, "the snapshot was not compacted");
            }
        }
    }

    /// The old file goes only when the records are durable: they alone hold what it drops.
    fn compact(&self, log: &mut Log) -> Result<(), StoreError> {
        self.settle_and_sync()?;
        let records = self.records.read().unwrap_or_else(PoisonError::into_inner);
        log.snapshot = Some(write_snapshot(&self.dir, &records)?);
        Ok(())
    }

    /// The caller holds the log. Readers wait for the first half only, which needs no disk.
    fn settle_and_sync(&self) -> Result<(), StoreError> {
        let mut records = self.records.write().unwrap_or_else(PoisonError::into_inner);
        records.settle().map_err(|e| self.damage(e))?;
        drop(records);
        let records = self.records.read().unwrap_or_else(PoisonError::into_inner);
        records.checkpoint().map_err(|e| self.damage(e))
    }

    fn plan_checkpoint(&self) {
        let mut staged = lock(&self.staged);
        if staged.checkpoint.is_none() {
            staged.checkpoint = Some(Instant::now() + CHECKPOINT);
            self.wake.notify_one();
        }
    }

    pub(super) fn checkpoint(&self) -> Result<(), StoreError> {
        let _log = lock(&self.log);
        self.settle_and_sync()
    }

    /// Makes all durable in both copies and says so on disk. Commits may follow; they take it back.
    pub(super) fn close(&self) -> Result<(), StoreError> {
        self.flush()?;
        let already = lock(&self.log).closed;
        if !already {
            self.commit(vec![Write::put(Table::State, CLOSED, *b"1")])?;
        }
        lock(&self.staged).checkpoint = None;
        self.checkpoint()
    }

    pub(super) fn stop(&self) {
        lock(&self.staged).stop = true;
        self.wake.notify_one();
    }

    /// The background thread: ends after [`Self::stop`], having closed the store.
    pub(super) fn run(self: Arc<Self>) {
        let mut staged = lock(&self.staged);
        while !staged.stop {
            let now = Instant::now();
            if staged.due.is_some_and(|t| t <= now) {
                self.say(self.commit_staged(staged));
                staged = lock(&self.staged);
            } else if staged.checkpoint.is_some_and(|t| t <= now) {
                staged.checkpoint = None;
                drop(staged);
                self.say(self.checkpoint());
                staged = lock(&self.staged);
            } else {
                let next = staged.due.into_iter().chain(staged.checkpoint).min();
                staged = self.sleep(staged, next.map(|t| t - now));
            }
        }
        drop(staged);
        self.say(self.close());
    }

    fn sleep<'a>(
        &self,
        staged: MutexGuard<'a, Staged>,
        time: Option<Duration>,
    ) -> MutexGuard<'a, Staged> {
        match time {
            None => self
                .wake
                .wait(staged)
                .unwrap_or_else(PoisonError::into_inner),
            Some(t) => {
                let woken = self.wake.wait_timeout(staged, t);
                woken.unwrap_or_else(PoisonError::into_inner).0
            }
        }
    }
}

fn is_closed_mark(w: &Write) -> bool {
    w.table == Table::State && w.key == CLOSED && w.value.is_some()
}

fn check(writes: &[Write]) -> Result<(), StoreError> {
    let size = |w: &Write| w.key.len() + w.value.as_ref().map_or(0, Vec::len) + 7;
    let bytes: usize = writes.iter().map(size).sum();
    if bytes > MAX_BATCH {
        return Err(StoreError::TooLarge {
            bytes,
            limit: MAX_BATCH,
        });
    }
    let bad = |w: &&Write| w.key.len() > MAX_KEY || w.key.contains(&0);
    match writes.iter().find(bad) {
        None => Ok(()),
        Some(w) => Err(StoreError::Key {
            key: String::from_utf8_lossy(&w.key).chars().take(100).collect(),
            limit: MAX_KEY,
        }),
    }
}

/// Writes a new snapshot whose base is what the records hold.
pub(super) fn write_snapshot(dir: &Path, records: &Records) -> Result<Snapshot, StoreError> {
    let about = records.about();
    let head = Head {
        version: about.version,
        incarnation: about.incarnation,
        base_seq: about.seq,
    };
    let kept = Table::ALL.into_iter().filter(|t| t.in_snapshot());
    // One table at a time: the largest holds a few MiB, and only while this runs.
    let all = kept.flat_map(|table| {
        let (found, error) = match records.scan(table, &[]) {
            Ok(found) => (found, None),
            Err(why) => (Vec::new(), Some(std::io::Error::other(why))),
        };
        let puts = found
            .into_iter()
            .map(move |(k, v)| Ok(Write::put(table, k, v)));
        puts.chain(error.map(Err))
    });
    Snapshot::create(dir, &head, all)
        .map_err(|e: std::io::Error| StoreError::io("rewrite", &snapshot::path_in(dir), e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &str, value: &[u8]) -> Write {
        Write::put(Table::Meta, key, value)
    }

    fn engine(dir: &Path) -> Arc<Engine> {
        let mut records = Records::open(dir).unwrap();
        records.apply(1, Vec::new()).unwrap();
        records.settle().unwrap();
        let snapshot = write_snapshot(dir, &records).unwrap();
        Arc::new(Engine::new(dir, records, Some(snapshot), false))
    }

    fn frames(dir: &Path) -> usize {
        let mut n = 0;
        Snapshot::open(dir, |_, _| n += 1).unwrap();
        n
    }

    #[test]
    fn committers_from_many_threads_all_get_their_answer() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(dir.path());
        std::thread::scope(|s| {
            for t in 0..8 {
                let engine = &engine;
                s.spawn(move || {
                    for n in 0..20 {
                        let key = format!("{t}-{n}");
                        engine.commit(vec![put(&key, b"x")]).unwrap();
                        assert!(engine.get(Table::Meta, key.as_bytes()).unwrap().is_some());
                    }
                });
            }
        });
        assert_eq!(frames(dir.path()), 160);
        assert_eq!(engine.seq(), 161);
    }

    #[test]
    fn late_writes_coalesce_and_never_overtake_a_commit() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(dir.path());
        (0..50_u8).for_each(|n| engine.later(vec![put("a", &[n]), put("b", &[n])]));
        engine.commit(vec![put("a", b"newer")]).unwrap();
        engine.flush().unwrap();
        assert_eq!(frames(dir.path()), 2);
        let get = |k: &[u8]| engine.get(Table::Meta, k).unwrap().unwrap();
        assert_eq!((get(b"a"), get(b"b")), (b"newer".to_vec(), vec![49]));
    }

    #[test]
    fn the_background_thread_commits_what_is_late_and_closes_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(dir.path());
        let thread = std::thread::spawn({
            let engine = engine.clone();
            move || engine.run()
        });
        let (tx, rx) = std::sync::mpsc::channel();
        engine.later(vec![put("a", b"1")]);
        engine.soon(vec![put("b", b"2")], Box::new(move || tx.send(()).unwrap()));
        assert_eq!(rx.recv_timeout(Duration::from_secs(10)), Ok(()));
        assert!(engine.get(Table::Meta, b"a").unwrap().is_some());
        engine.later(vec![put("c", b"3")]);
        engine.stop();
        thread.join().unwrap();
        assert!(engine.get(Table::Meta, b"c").unwrap().is_some());
        assert!(engine.get(Table::State, CLOSED).unwrap().is_some());
        engine.commit(vec![put("d", b"4")]).unwrap();
        assert_eq!(engine.get(Table::State, CLOSED).unwrap(), None);
    }

    #[test]
    fn the_snapshot_stays_within_a_bound_of_what_is_live() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(dir.path());
        for n in 0..40_u8 {
            engine.commit(vec![put("a", &vec![n; 60_000])]).unwrap();
        }
        let size = std::fs::metadata(snapshot::path_in(dir.path()))
            .unwrap()
            .len();
        assert!(size < 600_000, "{size}");
        assert_eq!(
            engine.get(Table::Meta, b"a").unwrap(),
            Some(vec![39; 60_000])
        );
    }

    #[test]
    fn a_key_or_batch_that_the_format_cannot_hold_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(dir.path());
        assert!(engine.commit(vec![put("a\0b", b"")]).is_err());
        assert!(engine.commit(vec![put(&"k".repeat(513), b"")]).is_err());
        assert!(engine.commit(vec![put("k", &vec![0; MAX_BATCH])]).is_err());
        engine.soon(
            vec![put("a\0b", b"")],
            Box::new(|| panic!("it is not durable")),
        );
        engine.flush().unwrap();
        assert_eq!(frames(dir.path()), 0);
    }
}
