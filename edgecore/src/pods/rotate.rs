//! Keeps container logs from filling the disk.
//!
//! Every ten seconds, the current log of each container that has grown too large is renamed, and
//! the runtime opens a new one; older ones are compressed, and only so many are kept. As the
//! kubelet does it: the newest renamed file stays uncompressed.
//!
//! ```text
//! N.log ── rename ──► N.log.20261123-030300 ── the next time ──► N.log.20261123-030300.gz ──► removed
//! ```
//!
//! A round at rest reads one directory and looks at one file for each container of this node's
//! Pods, and asks the runtime nothing. No line is lost: a log that the runtime does not reopen gets
//! its name back, and a file goes only when its compressed copy is on the disk.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use jiff::Timestamp;
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;

use super::seen::Run;
use super::worker::Shared;
use crate::cri::{Cri, CriError, convert};

/// Between two rounds, the kubelet's `containerLogMonitorInterval`.
const EVERY: Duration = Duration::from_secs(10);

const COMPRESSED: &str = ".gz";
/// What is being compressed; of no use when the agent died over it.
const UNFINISHED: &str = ".tmp";

/// What an operator may set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// The kubelet's `containerLogMaxSize`, in bytes.
    pub most_bytes: u64,
    /// The kubelet's `containerLogMaxFiles`: of one container, with the one that is written to.
    pub most_files: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            most_bytes: 10 << 20,
            most_files: 5,
        }
    }
}

/// Why a container's log was not rotated.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("cannot rename the log {0:?}")]
    Rename(PathBuf, #[source] io::Error),
    #[error("cannot remove the old log {0:?}")]
    Remove(PathBuf, #[source] io::Error),
    #[error("cannot compress the old log {0:?}")]
    Compress(PathBuf, #[source] io::Error),
    #[error("the runtime does not reopen the log {0:?}")]
    Reopen(PathBuf, #[source] CriError),
}

/// Goes round until shutdown.
pub async fn run(shared: Arc<Shared>, config: Config, shutdown: CancellationToken) {
    let mut rotation = Rotation::default();
    loop {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
        rotation.round(&shared, config).await;
    }
}

/// A container's log that wants something done.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Due {
    uid: String,
    container: String,
    attempt: u32,
    path: PathBuf,
    what: What,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Rotate,
    /// It was renamed, and the agent died before the runtime heard of it.
    Reopen,
}

/// What is remembered between rounds.
#[derive(Debug, Default)]
struct Rotation {
    /// Logs of which an operator knows that something is wrong.
    told: BTreeSet<PathBuf>,
    /// Containers whose runtime may still write to the renamed file.
    unopened: BTreeSet<String>,
}

impl Rotation {
    async fn round(&mut self, shared: &Shared, config: Config) {
        self.open_again(&*shared.cri).await;
        let root = shared.paths.pod_logs.clone();
        let pods = shared.desired.pods();
        let looked = spawn_blocking(move || {
            let keys = pods.into_iter().map(|pod| pod.key);
            keys.flat_map(|key| {
                let dir = root.join(format!("{}_{}_{}", key.namespace, key.name, key.uid));
                due_in(&dir, &key.uid, config.most_bytes)
            })
            .collect::<Vec<_>>()
        });
        let Ok(due) = looked.await else { return };
        for due in due {
            let done = self
                .serve(&*shared.cri, &due, config, (shared.clock)().wall)
                .await;
            self.tell(&due.path, done);
        }
    }

    async fn open_again(&mut self, cri: &dyn Cri) {
        for id in std::mem::take(&mut self.unopened) {
            match cri.reopen_log(&id).await {
                Ok(()) => {}
                Err(e) if e.not_found() => {}
                Err(_) => {
                    self.unopened.insert(id);
                }
            }
        }
    }

    async fn serve(
        &mut self,
        cri: &dyn Cri,
        due: &Due,
        config: Config,
        now: Timestamp,
    ) -> Result<(), Error> {
        let failed = |e| Error::Reopen(due.path.clone(), e);
        let running = running(cri, due).await.map_err(failed)?;
        // What a dead container wrote stays as it is.
        let Some(id) = running else { return Ok(()) };
        match due.what {
            What::Reopen => cri.reopen_log(&id).await.map_err(failed),
            What::Rotate => {
                let path = due.path.clone();
                let renamed = spawn_blocking(move || {
                    // A disk that is full keeps nobody from the rename, which needs no room.
                    let tidied = tidy(&path, config.most_files);
                    rename(&path, now).map(|renamed| (renamed, tidied))
                });
                let panicked = |e| Error::Rename(due.path.clone(), io::Error::other(e));
                let (renamed, tidied) = renamed.await.map_err(panicked)??;
                if let Err(e) = cri.reopen_log(&id).await {
                    self.take_back(&renamed, &due.path, id);
                    return Err(failed(e));
                }
                tidied
            }
        }
    }

    /// The runtime writes to the renamed file, or it opened a new one and could not say so: a new
    /// one is never written over.
    fn take_back(&mut self, renamed: &Path, path: &Path, id: String) {
        let back = fs::hard_link(renamed, path).and_then(|()| fs::remove_file(renamed));
        if back.is_err() {
            self.unopened.insert(id);
        }
    }

    /// Once for each log, until it works again.
    fn tell(&mut self, path: &Path, done: Result<(), Error>) {
        match done {
            Ok(()) => {
                self.told.remove(path);
            }
            Err(error) if self.told.insert(path.to_owned()) => {
                let error = common::telemetry::chain(&error);
                tracing::warn!(
                    ?path,
                    error,
                    "a container's log was not rotated: it grows on"
                );
            }
            Err(_) => {}
        }
        self.told
            .retain(|path| path.parent().is_some_and(Path::exists));
    }
}

async fn running(cri: &dyn Cri, due: &Due) -> Result<Option<String>, CriError> {
    let containers = cri.list_containers(Some(&due.uid)).await?;
    let seen = containers.iter().map(convert::container_seen);
    let mut running = seen.filter(|c| c.run == Run::Running);
    let found = running.find(|c| c.name == due.container && c.attempt == due.attempt);
    Ok(found.map(|c| c.id))
}

/// What is due in one Pod's directory.
fn due_in(dir: &Path, uid: &str, most_bytes: u64) -> Vec<Due> {
    let containers = fs::read_dir(dir).into_iter().flatten().flatten();
    let due = containers.filter_map(|entry| {
        let container = entry.file_name().into_string().ok()?;
        let newest = newest(&entry.path())?;
        let path = entry.path().join(format!("{newest}.log"));
        let what = match fs::metadata(&path) {
            Ok(file) if file.len() > most_bytes => What::Rotate,
            Ok(_) => return None,
            Err(e) if e.kind() == io::ErrorKind::NotFound => What::Reopen,
            Err(_) => return None,
        };
        Some(Due {
            uid: uid.to_owned(),
            container,
            attempt: newest,
            path,
            what,
        })
    });
    due.collect()
}

/// The number of the instance that ran last, by the names of its logs.
fn newest(dir: &Path) -> Option<u32> {
    let names = fs::read_dir(dir).ok()?.flatten();
    let numbers = names.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let (number, rest) = name.split_once(".log")?;
        (rest.is_empty() || rest.starts_with('.')).then(|| number.parse().ok())?
    });
    numbers.max()
}

/// Makes room for one more old log: all but the newest are compressed, and the oldest go.
fn tidy(path: &Path, most_files: usize) -> Result<(), Error> {
    let mut old = old_logs(path);
    for unfinished in old.iter().filter(|p| ends_with(p, UNFINISHED)) {
        remove(unfinished)?;
    }
    old.retain(|p| !ends_with(p, UNFINISHED));
    // One is written to, and one is about to become old.
    let excess = old.len().saturating_sub(most_files.saturating_sub(2));
    for gone in old.drain(..excess) {
        remove(&gone)?;
    }
    for plain in old.iter().filter(|p| !ends_with(p, COMPRESSED)) {
        compress(plain).map_err(|e| Error::Compress(plain.clone(), e))?;
    }
    Ok(())
}

/// A container's old logs, the oldest first: their names are times.
fn old_logs(path: &Path) -> Vec<PathBuf> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name().and_then(|n| n.to_str())) else {
        return Vec::new();
    };
    let begin = format!("{name}.");
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let old = entries.filter(|e| e.file_name().to_string_lossy().starts_with(&begin));
    let mut old: Vec<_> = old.map(|e| e.path()).collect();
    old.sort();
    old
}

fn ends_with(path: &Path, end: &str) -> bool {
    path.as_os_str().to_string_lossy().ends_with(end)
}

fn remove(path: &Path) -> Result<(), Error> {
    fs::remove_file(path).map_err(|e| Error::Remove(path.to_owned(), e))
}

fn with(path: &Path, end: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(end);
    name.into()
}

/// Puts the compressed copy in the file's place. Nothing is changed when that fails.
fn compress(plain: &Path) -> io::Result<()> {
    let unfinished = with(plain, UNFINISHED);
    let done = write_compressed(plain, &unfinished)
        .and_then(|()| fs::rename(&unfinished, with(plain, COMPRESSED)));
    if done.is_err() {
        // It holds room that the disk may be short of.
        let _ = fs::remove_file(&unfinished);
    }
    done?;
    fs::remove_file(plain)
}

fn write_compressed(plain: &Path, to: &Path) -> io::Result<()> {
    let mut from = File::open(plain)?;
    // The fastest: text shrinks to a tenth all the same, and the board has other work.
    let mut encoder = GzEncoder::new(File::create(to)?, Compression::fast());
    io::copy(&mut from, &mut encoder)?;
    let mut file = encoder.finish()?;
    file.flush()?;
    file.sync_data()
}

/// The file's new name, which no other has.
fn rename(path: &Path, now: Timestamp) -> Result<PathBuf, Error> {
    let stamp = now.strftime("%Y%m%d-%H%M%S").to_string();
    let to = with(path, &format!(".{stamp}"));
    let taken = [to.clone(), with(&to, COMPRESSED)]
        .iter()
        .any(|p| p.exists());
    let failed = |e| Error::Rename(path.to_owned(), e);
    if taken {
        // The clock was set back; there will be another second.
        return Err(failed(io::ErrorKind::AlreadyExists.into()));
    }
    fs::rename(path, &to).map_err(failed)?;
    Ok(to)
}

/// Removes the logs of an instance that is gone, if there is a newer one: the last stay as long as
/// their Pod.
pub(super) fn remove_instance(path: &Path) {
    let number = path.file_stem().and_then(|n| n.to_str()?.parse().ok());
    let (Some(number), Some(dir)) = (number, path.parent()) else {
        return;
    };
    if newest(dir).is_none_or(|newest| newest <= number) {
        return;
    }
    for gone in std::iter::once(path.to_owned()).chain(old_logs(path)) {
        if let Err(error) = fs::remove_file(&gone)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = ?gone, %error, "an old log was not removed");
        }
    }
}

#[cfg(test)]
mod tests;
