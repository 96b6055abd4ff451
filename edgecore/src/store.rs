//! The one module that writes to disk: what is committed here survives a power cut.
//!
//! Owns a directory (0700, files 0600) with two copies of the node's state: `snapshot`, a
//! checksummed log that is synced before a commit returns, and `database`, the records by key.
//! Opening checks both; from whichever is whole the other is made again, and the store then begins
//! a new incarnation, under which the cloud asks for every report anew.
//!
//! Gives handles per concern: [`desired`], [`reports`], [`events`], [`small`]. Nothing outside this
//! module knows which engine it is. `docs/decisions/0001-store.md` says why it is built like this.
//!
//! **Blocking**: a commit takes one sync of the disk, 5 to 50 ms on an SD card. Calls that say
//! "durable when it returns" block for it; an async caller puts them into `spawn_blocking` where
//! other work shares its thread. Reads take microseconds. Without commits nothing is written and
//! no timer runs.
//!
//! Never: a value of a Secret or token in a log line or `Debug`.

use std::fmt;
use std::fs::{DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use tracing::warn;

mod database;
pub mod desired;
mod engine;
pub mod events;
mod open;
mod plan;
pub mod reports;
mod schema;
mod sequence;
pub mod small;
mod snapshot;

use database::Records;
use engine::{CLOSED, Engine, Then};
use schema::{Table, Write};

/// Why the store could not do what it was asked to.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    #[error(
        "the data directory {} is in use by another edgecore; stop that one or choose another --data-dir",
        dir.display()
    )]
    Locked { dir: PathBuf },
    #[error(
        "the store has format version {found}, newer than this edgecore knows ({supported}); \
         install the version that wrote it, or a later one; nothing was changed"
    )]
    Version { found: u32, supported: u32 },
    #[error("cannot {what} {}", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        source: Arc<io::Error>,
    },
    #[error("the database in {} failed: {why}; restart edgecore to check and repair it", dir.display())]
    Database { dir: PathBuf, why: String },
    #[error("a batch of {bytes} bytes is over the limit of {limit}; nothing of it was stored")]
    TooLarge { bytes: usize, limit: usize },
    #[error("the key {key:?} is longer than {limit} bytes or holds a zero byte")]
    Key { key: String, limit: usize },
    #[error("the stored record {key} is malformed: {why}")]
    Record { key: String, why: String },
}

impl StoreError {
    fn io(what: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            what,
            path: path.to_owned(),
            source: Arc::new(source),
        }
    }
}

/// What opening found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opened {
    /// Random; another one after each recovery, since sequence numbers may then repeat.
    pub incarnation: [u8; 16],
    pub recovered: Option<Recovery>,
    /// The last run closed the store in order: nothing that was late is missing.
    pub clean: bool,
}

/// One of the two copies was damaged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recovery {
    /// The database is made again from the snapshot; only queued Events are gone.
    Database { why: String },
    /// The snapshot is made again from the database. The last commits may be missing.
    Snapshot { why: String },
    /// Both were damaged. What was intact is kept, and the desired set counts as incomplete.
    Both { why: String },
}

impl fmt::Display for Recovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Recovery::Database { why } => {
                write!(f, "the database was made again from the snapshot: {why}")
            }
            Recovery::Snapshot { why } => {
                write!(f, "the snapshot was made again from the database: {why}")
            }
            Recovery::Both { why } => write!(
                f,
                "database and snapshot were damaged, what was intact is kept: {why}"
            ),
        }
    }
}

/// A shared handle; cheap to clone. When the last one goes, the store is closed in order.
#[derive(Clone)]
pub struct Store {
    owner: Arc<Owner>,
}

struct Owner {
    engine: Arc<Engine>,
    thread: Option<JoinHandle<()>>,
    /// Sequence numbers go on without a gap only after a clean close in the same incarnation.
    continues: bool,
    _lock: Option<File>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.engine.stop();
        if let Some(thread) = self.thread.take()
            // A callback on the background thread may hold the last handle.
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

impl Store {
    /// Opens or makes the store in `dir`, checks it and repairs what can be repaired. Blocks: it
    /// reads all records, some milliseconds for a node with tens of Pods.
    pub fn open(dir: &Path) -> Result<(Self, Opened), StoreError> {
        make_dir(dir)?;
        let lock = take_lock(dir)?;
        let (records, snapshot, recovered) = open::copies(dir)?;
        let incarnation = records.about().incarnation;
        let clean = records
            .get(Table::State, CLOSED)
            .map_err(|why| damaged(dir, why))?
            .is_some();
        if let Some(recovery) = &recovered {
            warn!(dir = %dir.display(), %recovery, "the store was damaged");
        }
        let engine = Arc::new(Engine::new(dir, records, Some(snapshot), clean));
        let thread = std::thread::Builder::new()
            .name("store".into())
            .spawn({
                let engine = engine.clone();
                move || engine.run()
            })
            .map_err(|e| StoreError::io("start the background thread for", dir, e))?;
        let owner = Owner {
            engine,
            thread: Some(thread),
            continues: clean && recovered.is_none(),
            _lock: Some(lock),
        };
        let store = Self {
            owner: Arc::new(owner),
        };
        let opened = Opened {
            incarnation,
            recovered,
            clean,
        };
        Ok((store, opened))
    }

    /// A store that lives in memory only, for tests of what uses it.
    pub fn in_memory() -> Self {
        let engine = Engine::new(Path::new(""), Records::in_memory(), None, false);
        Self {
            owner: Arc::new(Owner {
                engine: Arc::new(engine),
                thread: None,
                continues: true,
                _lock: None,
            }),
        }
    }

    /// Blocks until everything that is late is durable.
    pub fn flush(&self) -> Result<(), StoreError> {
        self.owner.engine.flush()
    }

    /// The last step of an orderly stop: all is durable in both copies, and the next start knows.
    /// Dropping the last handle does the same, without an answer.
    pub fn close(&self) -> Result<(), StoreError> {
        self.owner.engine.close()
    }

    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.owner.engine.get(table, key)
    }

    fn scan(&self, table: Table, prefix: &[u8]) -> Result<Vec<database::Record>, StoreError> {
        self.owner.engine.scan(table, prefix)
    }

    fn commit(&self, writes: Vec<Write>) -> Result<(), StoreError> {
        self.owner.engine.commit(writes)
    }

    fn later(&self, writes: Vec<Write>) {
        self.owner.engine.later(writes);
    }

    fn soon(&self, writes: Vec<Write>, then: Then) {
        self.owner.engine.soon(writes, then);
    }

    fn unstage(&self, table: Table, prefix: &[u8]) {
        self.owner.engine.unstage(table, prefix);
    }

    fn continues(&self) -> bool {
        self.owner.continues
    }
}

fn damaged(dir: &Path, why: String) -> StoreError {
    StoreError::Database {
        dir: dir.to_owned(),
        why,
    }
}

fn make_dir(dir: &Path) -> Result<(), StoreError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .and_then(|()| std::fs::set_permissions(dir, Permissions::from_mode(0o700)))
        .map_err(|e| StoreError::io("make the data directory", dir, e))
}

fn take_lock(dir: &Path) -> Result<File, StoreError> {
    let path = dir.join("lock");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|e| StoreError::io("open", &path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StoreError::Locked {
            dir: dir.to_owned(),
        }),
        Err(TryLockError::Error(e)) => Err(StoreError::io("lock", &path, e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn two_agents_cannot_open_one_directory() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(dir.path()).unwrap();
        let said = Store::open(dir.path()).map(drop).unwrap_err().to_string();
        assert!(said.contains(&dir.path().display().to_string()), "{said}");
        drop(store);
        Store::open(dir.path()).unwrap();
    }

    #[test]
    fn nobody_else_may_read_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("data");
        DirBuilder::new().mode(0o755).create(&dir).unwrap();
        drop(Store::open(&dir).unwrap());
        let (_store, _) = Store::open(&dir).unwrap();
        assert_eq!(mode(&dir), 0o700);
        let mut todo = vec![dir];
        while let Some(at) = todo.pop() {
            for entry in std::fs::read_dir(at).unwrap() {
                let path = entry.unwrap().path();
                let want = if path.is_dir() { 0o700 } else { 0o600 };
                assert_eq!(mode(&path), want, "{}", path.display());
                todo.extend(path.is_dir().then_some(path));
            }
        }
    }

    #[test]
    fn an_orderly_stop_is_known_at_the_next_start_and_keeps_the_incarnation() {
        let dir = tempfile::tempdir().unwrap();
        let (store, first) = Store::open(dir.path()).unwrap();
        assert!(!first.clean);
        store.later(vec![Write::put(Table::Meta, *b"a", *b"1")]);
        drop(store);
        let (store, second) = Store::open(dir.path()).unwrap();
        assert_eq!(store.get(Table::Meta, b"a").unwrap(), Some(b"1".to_vec()));
        assert_eq!(second.incarnation, first.incarnation);
        assert!(second.clean && second.recovered.is_none());
        store
            .commit(vec![Write::remove(Table::Meta, *b"a")])
            .unwrap();
        assert_eq!(store.get(Table::State, CLOSED).unwrap(), None);
    }

    #[test]
    fn an_idle_store_writes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(dir.path()).unwrap();
        store
            .commit(vec![Write::put(Table::Meta, *b"a", *b"1")])
            .unwrap();
        store.close().unwrap();
        let state = || {
            let of = |name: &str| {
                let meta = std::fs::metadata(dir.path().join(name)).unwrap();
                (meta.len(), meta.modified().unwrap())
            };
            (of("snapshot"), of("database/db"))
        };
        let before = state();
        std::thread::sleep(std::time::Duration::from_millis(700));
        assert_eq!(state(), before);
        store.close().unwrap();
        assert_eq!(state(), before);
    }
}
