//! Reads a container's log for somebody who asked for it.
//!
//! Owns the way through the files that the runtime writes: the file that is read, how far, and the
//! watch on its directory. Takes which log, which part of it, and a future that ends with the
//! container; gives a stream of bytes. `entry` reads the format, `tail` finds the last lines.
//!
//! ```text
//!            bytes                      nothing more, not followed
//! reading ───────────► reading   reading ─────────────────────────► over
//! reading ── nothing more ──► waiting ── a change, or the container ended ──► reading
//! reading ── nothing more, and the file has a successor ──► reading (the successor)
//! reading ── nothing more since the container ended ──► over
//! ```
//!
//! A follower stays on a file that was renamed until the runtime writes to its successor, so no
//! line is lost to a rotation; one so slow that the log is rotated twice meanwhile goes on with the
//! newest file, as the kubelet's does. Never more than a block of the file is held; a reader that does not
//! take bytes stops the reading.

use std::fs::File;
use std::future::Future;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use common::stream::request::{LogOptions, Since};
use futures::Stream;
use jiff::{SignedDuration, Timestamp};
use tokio::task::spawn_blocking;

mod entry;
mod instance;
mod tail;
mod watch;

use entry::{Decoder, Wanted};
pub use instance::{Log, container_ended};
use tail::Tail;
use watch::Watch;

/// Read at a time; with what is made of it, less than 32 KiB are held.
const BLOCK: usize = 12 << 10;

/// A log that is being renamed has no file for a moment: tries, and the time between two.
const TRIES: u32 = 10;
const BETWEEN_TRIES: Duration = Duration::from_millis(50);

/// A part of a log was asked for that makes no sense; answered with 400.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("sinceTime {0:?} is not a time such as 2026-11-23T03:03:00Z")]
pub struct BadSince(String);

/// Which part of a log is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    wanted: Wanted,
    tail: Tail,
}

impl Part {
    /// `now` is what `sinceSeconds` counts back from.
    pub fn new(options: &LogOptions, now: Timestamp) -> Result<Self, BadSince> {
        let since = match &options.since {
            None => None,
            Some(Since::Seconds(seconds)) => Some(before(now, *seconds)),
            Some(Since::Time(text)) => Some(text.parse().map_err(|_| BadSince(text.clone()))?),
        };
        let sources = entry::wanted(options.stream);
        Ok(Self {
            wanted: Wanted {
                timestamps: options.timestamps,
                since,
                limit: options.limit,
                sources,
            },
            tail: Tail {
                lines: options.tail,
                sources,
                follow: options.follow,
            },
        })
    }
}

fn before(now: Timestamp, seconds: u64) -> Timestamp {
    let ago = SignedDuration::from_secs(i64::try_from(seconds).unwrap_or(i64::MAX));
    now.checked_sub(ago).unwrap_or(Timestamp::MIN)
}

/// Opens a log, so that one that is missing is known before the first byte is answered. `ended` is
/// only looked at when the log is followed.
pub async fn read(
    log: &Log,
    part: Part,
    ended: impl Future<Output = ()> + Send + 'static,
) -> io::Result<impl Stream<Item = io::Result<Bytes>> + Send + 'static> {
    let reader = Reader::open(log, part, Box::pin(ended)).await?;
    Ok(futures::stream::try_unfold(reader, |mut reader| async {
        let bytes = reader.next().await?;
        Ok(bytes.map(|bytes| (bytes, reader)))
    }))
}

struct Reader {
    log: Log,
    path: PathBuf,
    follow: bool,
    decoder: Decoder,
    file: Arc<File>,
    at: u64,
    /// Where reading stops when it is not followed: a container may write faster than its log is
    /// read.
    end: u64,
    watch: Option<Watch>,
    ended: Ended,
    /// The file has a successor that is written to; what there is of it is all there will be.
    leaving: bool,
    complained: bool,
}

enum Ended {
    NotYet(Pin<Box<dyn Future<Output = ()> + Send>>),
    Yes,
}

impl Reader {
    async fn open(
        log: &Log,
        part: Part,
        ended: Pin<Box<dyn Future<Output = ()> + Send>>,
    ) -> io::Result<Self> {
        let path = log.path();
        let mut tries = TRIES;
        let (file, end, starts) = loop {
            let (path, tail) = (path.clone(), part.tail);
            match beside(move || begin(&path, tail)).await {
                Err(e) if e.kind() == io::ErrorKind::NotFound && tries > 0 => tries -= 1,
                opened => break opened?,
            }
            tokio::time::sleep(BETWEEN_TRIES).await;
        };
        let decoder = Decoder::new(part.wanted, starts);
        Ok(Self {
            log: log.clone(),
            path,
            follow: part.tail.follow,
            file: Arc::new(file),
            at: decoder.start(),
            decoder,
            end,
            watch: None,
            ended: Ended::NotYet(ended),
            leaving: false,
            complained: false,
        })
    }

    /// The next bytes; `None` when there will be none.
    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        while !self.decoder.full() {
            let block = self.block().await?;
            if block.is_empty() {
                if !self.follow || !self.more().await? {
                    return Ok(None);
                }
                continue;
            }
            self.at += block.len() as u64;
            let mut out = Vec::with_capacity(block.len() + block.len() / 8);
            self.decoder.feed(&block, &mut out);
            self.complain();
            if !out.is_empty() {
                return Ok(Some(out.into()));
            }
        }
        Ok(None)
    }

    async fn block(&mut self) -> io::Result<Vec<u8>> {
        let left = usize::try_from(self.end.saturating_sub(self.at)).unwrap_or(BLOCK);
        let length = if self.follow { BLOCK } else { BLOCK.min(left) };
        let (file, at) = (self.file.clone(), self.at);
        beside(move || {
            let mut block = vec![0; length];
            let read = file.read_at(&mut block, at)?;
            block.truncate(read);
            Ok(block)
        })
        .await
    }

    /// At the end of a file that is followed: waits until there may be more, false when there will
    /// be none.
    async fn more(&mut self) -> io::Result<bool> {
        let Some(watch) = &mut self.watch else {
            self.watch = Some(Watch::on(&self.log.dir));
            // What came before the watch has to be read again.
            return Ok(true);
        };
        let (file, path) = (self.file.clone(), self.path.clone());
        let fate = beside(move || fate(&file, &path)).await?;
        let ended = matches!(self.ended, Ended::Yes);
        match fate {
            Fate::Same { length } if length < self.at => {
                // Somebody emptied it.
                self.at = 0;
                self.decoder.restart();
                return Ok(true);
            }
            Fate::Renamed { written } if written || ended => {
                if self.leaving {
                    return self.succeed().await;
                }
                // What the runtime wrote to it between our last look and its successor's first
                // line.
                self.leaving = true;
                return Ok(true);
            }
            Fate::Same { .. } | Fate::Renamed { .. } | Fate::Gone => {}
        }
        let Ended::NotYet(end) = &mut self.ended else {
            return Ok(false);
        };
        tokio::select! {
            biased;
            changed = watch.changed() => changed?,
            () = end => self.ended = Ended::Yes,
        }
        Ok(true)
    }

    async fn succeed(&mut self) -> io::Result<bool> {
        let path = self.path.clone();
        match beside(move || File::open(path)).await {
            Ok(file) => self.file = Arc::new(file),
            // Renamed again: its successor is on its way.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(true),
            Err(e) => return Err(e),
        }
        self.at = 0;
        self.leaving = false;
        self.decoder.restart();
        Ok(true)
    }

    fn complain(&mut self) {
        if self.decoder.garbage() > 0 && !self.complained {
            self.complained = true;
            tracing::warn!(path = ?self.path, "a log has lines that no runtime wrote: they are skipped");
        }
    }
}

fn begin(path: &Path, tail: Tail) -> io::Result<(File, u64, [u64; 2])> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let starts = tail::starts(&file, length, tail)?;
    Ok((file, length, starts))
}

/// What became of a file at its path.
enum Fate {
    Same {
        length: u64,
    },
    /// Another one has its name; is anything in that?
    Renamed {
        written: bool,
    },
    Gone,
}

fn fate(file: &File, path: &Path) -> io::Result<Fate> {
    let own = file.metadata()?;
    let named = match std::fs::metadata(path) {
        Ok(named) => named,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Fate::Gone),
        Err(e) => return Err(e),
    };
    Ok(if (named.dev(), named.ino()) == (own.dev(), own.ino()) {
        Fate::Same { length: own.len() }
    } else {
        Fate::Renamed {
            written: named.len() > 0,
        }
    })
}

/// Runs what waits for a disk on a thread of its own.
async fn beside<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    spawn_blocking(work).await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests;
