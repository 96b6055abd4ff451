//! The file that makes a commit durable, and from which an offline boot can rebuild everything.
//!
//! Owns `snapshot` in the store's directory: a base (every record of the tables that are kept,
//! written when the file was made) and behind it each batch committed since, in order. One
//! `fdatasync` per group of batches is the durability point of the whole store. When the tail has
//! outgrown the base, a new file with a new base is written, synced and renamed over the old one.
//!
//! ```text
//! header  "EDGESTOR" version:u32 incarnation:[16] base_seq:u64 base_end:u64 crc:u32   (48 bytes)
//! frame   length:u32 crc:u32 payload                    length 0: nothing behind this point
//! payload seq:u64 (table:u8 key_len:u16 value_len:u32 key value)*    value_len MAX: removed
//! ```
//! Numbers are big-endian. The file grows by zeroes in steps, so that a commit changes data blocks
//! and not the file's size: else the file system writes its journal for each.
//! Gives the state as far as it is intact. Never: an answer made of a frame whose checksum is wrong.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::schema::{Table, VERSION, Write};

const MAGIC: &[u8; 8] = b"EDGESTOR";
const HEADER: u64 = 48;
const FRAME: u64 = 8;

/// One batch, encoded. A Kubernetes object is at most 1.5 MiB and the hub sends batches far below
/// this; it bounds what a damaged length can make a reader allocate.
pub(super) const MAX_BATCH: usize = 16 << 20;

/// How much the file grows at a time: 16 blocks of zeroes for some 300 small batches.
const GROW: u64 = 64 << 10;

/// The tail may always grow to this before a compaction: below it, rewriting costs more flash than
/// it saves.
const MIN_TAIL: u64 = 256 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    /// The version of the whole store; the header's own layout never changes.
    pub(super) version: u32,
    pub(super) incarnation: [u8; 16],
    /// The base holds the state after this batch.
    pub(super) base_seq: u64,
}

/// What reading found besides the records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) head: Head,
    pub(super) last_seq: u64,
    /// The base is not intact: what was read is a part of it.
    pub(super) base_broken: bool,
    /// Bytes that are no frame follow the last one: a commit was cut off, or the file was damaged.
    pub(super) torn: bool,
}

pub(super) struct Snapshot {
    path: PathBuf,
    file: File,
    /// Where the next frame goes.
    end: u64,
    /// How far the file is filled, with zeroes behind `end`.
    grown: u64,
    base_end: u64,
}

pub(super) fn path_in(dir: &Path) -> PathBuf {
    dir.join("snapshot")
}

/// Appends one batch to `out` as a frame.
pub(super) fn encode(seq: u64, writes: &[Write], out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(&[0; FRAME as usize]);
    out.extend_from_slice(&seq.to_be_bytes());
    for w in writes {
        out.push(w.table.number());
        out.extend_from_slice(&(w.key.len() as u16).to_be_bytes());
        let len = w.value.as_ref().map_or(u32::MAX, |v| v.len() as u32);
        out.extend_from_slice(&len.to_be_bytes());
        out.extend_from_slice(&w.key);
        out.extend_from_slice(w.value.as_deref().unwrap_or_default());
    }
    let payload = start + FRAME as usize;
    let len = ((out.len() - payload) as u32).to_be_bytes();
    let crc = crc32fast::hash(&out[payload..]).to_be_bytes();
    out[start..start + 4].copy_from_slice(&len);
    out[start + 4..payload].copy_from_slice(&crc);
}

/// `None` when the payload is not what [`encode`] writes. Tables of a later version are skipped.
fn decode(mut rest: &[u8]) -> Option<(u64, Vec<Write>)> {
    let seq = u64::from_be_bytes(*rest.split_off(..8)?.first_chunk()?);
    let mut writes = Vec::new();
    while !rest.is_empty() {
        let head = rest.split_off(..7)?;
        let key_len = u16::from_be_bytes([head[1], head[2]]) as usize;
        let len = u32::from_be_bytes([head[3], head[4], head[5], head[6]]);
        let key = rest.split_off(..key_len)?.to_vec();
        let value = match len {
            u32::MAX => None,
            len => Some(rest.split_off(..len as usize)?.to_vec()),
        };
        if let Some(table) = Table::from_number(head[0]) {
            writes.push(Write { table, key, value });
        }
    }
    Some((seq, writes))
}

fn header(head: &Head, base_end: u64) -> [u8; HEADER as usize] {
    let mut out = [0; HEADER as usize];
    out[..8].copy_from_slice(MAGIC);
    out[8..12].copy_from_slice(&head.version.to_be_bytes());
    out[12..28].copy_from_slice(&head.incarnation);
    out[28..36].copy_from_slice(&head.base_seq.to_be_bytes());
    out[36..44].copy_from_slice(&base_end.to_be_bytes());
    let crc = crc32fast::hash(&out[..44]).to_be_bytes();
    out[44..].copy_from_slice(&crc);
    out
}

fn parse_header(bytes: &[u8; HEADER as usize]) -> Option<(Head, u64)> {
    let number = |at: usize| Some(u64::from_be_bytes(*bytes[at..].first_chunk()?));
    let intact = crc32fast::hash(&bytes[..44]).to_be_bytes() == bytes[44..];
    (intact && &bytes[..8] == MAGIC).then_some(())?;
    let head = Head {
        version: u32::from_be_bytes(*bytes[8..].first_chunk()?),
        incarnation: *bytes[12..].first_chunk()?,
        base_seq: number(28)?,
    };
    Some((head, number(36)?))
}

/// One frame; `None` at the first byte that is not part of an intact one.
fn read_frame(from: &mut impl Read, left: u64) -> io::Result<Option<(u64, u64, Vec<Write>)>> {
    let mut head = [0; FRAME as usize];
    if left < FRAME {
        return Ok(None);
    }
    from.read_exact(&mut head)?;
    let len = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as u64;
    let crc = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
    if len == 0 || len > (MAX_BATCH as u64 + 64).min(left - FRAME) {
        return Ok(None);
    }
    let mut payload = vec![0; len as usize];
    from.read_exact(&mut payload)?;
    if crc32fast::hash(&payload) != crc {
        return Ok(None);
    }
    Ok(decode(&payload).map(|(seq, writes)| (FRAME + len, seq, writes)))
}

impl Snapshot {
    /// Reads the file and hands each intact batch to `apply`, in order. `Ok(None)`: there is no
    /// file. A header that cannot be read counts as a broken base with nothing in it.
    pub(super) fn open(
        dir: &Path,
        mut apply: impl FnMut(u64, Vec<Write>),
    ) -> io::Result<Option<(Self, Found)>> {
        let path = path_in(dir);
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let size = file.metadata()?.len();
        let mut reader = BufReader::with_capacity(64 << 10, &file);
        let mut bytes = [0; HEADER as usize];
        let head = match size >= HEADER {
            true => reader
                .read_exact(&mut bytes)
                .map(|()| parse_header(&bytes))?,
            false => None,
        };
        let (head, base_end) = head.unwrap_or((
            Head {
                version: VERSION,
                incarnation: [0; 16],
                base_seq: 0,
            },
            u64::MAX,
        ));
        let mut end = HEADER.min(size);
        let mut last_seq = head.base_seq;
        let readable = base_end != u64::MAX;
        while readable && let Some((len, seq, writes)) = read_frame(&mut reader, size - end)? {
            // A base frame carries the base's number, each batch behind it the next one.
            let expected = last_seq + u64::from(end >= base_end);
            if seq != expected {
                break;
            }
            apply(seq, writes);
            (end, last_seq) = (end + len, seq);
        }
        let torn = !rest_is_zero(&file, end, size)?;
        let found = Found {
            head,
            last_seq,
            base_broken: end < base_end,
            torn,
        };
        let mut log = Self {
            path,
            file,
            end,
            grown: size,
            base_end,
        };
        if torn && !found.base_broken {
            log.cut_back()?;
        }
        Ok(Some((log, found)))
    }

    /// Writes a file whose base is `records`, and puts it in the place of an older one.
    pub(super) fn create<E: From<io::Error>>(
        dir: &Path,
        head: &Head,
        records: impl Iterator<Item = Result<Write, E>>,
    ) -> Result<Self, E> {
        let fresh = dir.join("snapshot.new");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&fresh)?;
        let mut out = BufWriter::with_capacity(64 << 10, &file);
        out.seek(SeekFrom::Start(HEADER))?;
        let (mut base_end, mut frame) = (HEADER, Vec::new());
        for record in records {
            frame.clear();
            encode(head.base_seq, std::slice::from_ref(&record?), &mut frame);
            out.write_all(&frame)?;
            base_end += frame.len() as u64;
        }
        out.flush()?;
        drop(out);
        let grown = base_end.next_multiple_of(GROW);
        fill(&file, base_end, grown)?;
        file.write_all_at(&header(head, base_end), 0)?;
        file.sync_all()?;
        let path = path_in(dir);
        std::fs::rename(&fresh, &path)?;
        File::open(dir)?.sync_all()?;
        Ok(Self {
            path,
            file,
            end: base_end,
            grown,
            base_end,
        })
    }

    /// Appends encoded frames; when this returns, they survive a power cut. On an error nothing of
    /// them is in the file, unless that fails too: then `Err(Fatal)`.
    pub(super) fn append(&mut self, frames: &[u8]) -> Result<(), AppendError> {
        let written = self.write(frames);
        let synced = written.and_then(|()| self.file.sync_data().map_err(AppendError::Fatal));
        match synced {
            Ok(()) => {
                self.end += frames.len() as u64;
                Ok(())
            }
            Err(AppendError::Refused(why)) => match self.cut_back() {
                Ok(()) => Err(AppendError::Refused(why)),
                Err(_) => Err(AppendError::Fatal(why)),
            },
            Err(fatal) => Err(fatal),
        }
    }

    fn write(&mut self, frames: &[u8]) -> Result<(), AppendError> {
        let end = self.end + frames.len() as u64;
        // Room for one more frame head, so that a reader finds a zero length there.
        if end + FRAME > self.grown {
            let grown = (end + FRAME).next_multiple_of(GROW);
            fill(&self.file, self.grown, grown).map_err(AppendError::Refused)?;
            self.grown = grown;
        }
        self.file
            .write_all_at(frames, self.end)
            .map_err(AppendError::Refused)
    }

    /// Nothing may follow the last intact frame: a remnant could be taken for a batch later.
    fn cut_back(&mut self) -> io::Result<()> {
        self.file.set_len(self.end)?;
        self.grown = self.end;
        self.file.sync_data()
    }

    /// Whether the tail has outgrown what a new base would hold.
    pub(super) fn wants_compaction(&self) -> bool {
        self.end - self.base_end.min(self.end) > MIN_TAIL.max(self.base_end)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

#[derive(Debug)]
pub(super) enum AppendError {
    /// Nothing was written; the next append may succeed (the disk was full).
    Refused(io::Error),
    /// What is on disk is unknown: after a failed sync the kernel may have dropped the pages.
    Fatal(io::Error),
}

/// Zeroes, a block at a time: a file system keeps what one call wrote as one piece in its cache and
/// would count all of the piece as written again at each small change in it.
fn fill(file: &File, mut at: u64, end: u64) -> io::Result<()> {
    let block = [0; 4096];
    while at < end {
        let next = (at + 1).next_multiple_of(4096).min(end);
        file.write_all_at(&block[..(next - at) as usize], at)?;
        at = next;
    }
    Ok(())
}

fn rest_is_zero(file: &File, mut at: u64, size: u64) -> io::Result<bool> {
    let mut block = vec![0; 4096];
    while at < size {
        let want = (size - at).min(4096) as usize;
        file.read_exact_at(&mut block[..want], at)?;
        if block[..want].iter().any(|b| *b != 0) {
            return Ok(false);
        }
        at += want as u64;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: Head = Head {
        version: VERSION,
        incarnation: [7; 16],
        base_seq: 40,
    };

    fn base() -> Vec<Write> {
        vec![
            Write::put(Table::Meta, *b"a", *b"1"),
            Write::put(Table::Meta, *b"b", vec![9; 5000]),
        ]
    }

    fn make(dir: &Path) -> Snapshot {
        Snapshot::create::<io::Error>(dir, &HEAD, base().into_iter().map(Ok)).unwrap()
    }

    fn append(log: &mut Snapshot, seq: u64) {
        let mut frame = Vec::new();
        encode(
            seq,
            &[Write::put(Table::Local, *b"k", seq.to_be_bytes())],
            &mut frame,
        );
        log.append(&frame).unwrap();
    }

    fn read(dir: &Path) -> (Found, Vec<(u64, Vec<Write>)>) {
        let mut all = Vec::new();
        let (_, found) = Snapshot::open(dir, |s, w| all.push((s, w)))
            .unwrap()
            .unwrap();
        (found, all)
    }

    #[test]
    fn what_was_appended_is_read_back_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = make(dir.path());
        (41..=43).for_each(|s| append(&mut log, s));
        drop(log);
        let (found, all) = read(dir.path());
        assert_eq!((found.head, found.last_seq), (HEAD, 43));
        assert!(!found.torn && !found.base_broken);
        assert_eq!(all.len(), 5);
        assert_eq!(all[1].1, base()[1..]);
    }

    /// Cut anywhere in the tail: all whole frames before the cut come back, and a batch appended
    /// afterwards is read back too.
    #[test]
    fn a_cut_tail_loses_only_the_cut_frames() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = make(dir.path());
        (41..=43).for_each(|s| append(&mut log, s));
        let (first, end) = (log.base_end, log.end);
        drop(log);
        let whole = std::fs::read(path_in(dir.path())).unwrap();
        let frame = (end - first) / 3;
        for cut in first..end {
            std::fs::write(path_in(dir.path()), &whole[..cut as usize]).unwrap();
            let (mut log, found) = Snapshot::open(dir.path(), |_, _| {}).unwrap().unwrap();
            assert_eq!(found.last_seq, 40 + (cut - first) / frame, "cut at {cut}");
            append(&mut log, found.last_seq + 1);
            drop(log);
            let (again, _) = read(dir.path());
            assert_eq!((again.last_seq, again.torn), (found.last_seq + 1, false));
        }
    }

    #[test]
    fn no_flipped_byte_is_believed() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = make(dir.path());
        append(&mut log, 41);
        let (base_end, end) = (log.base_end as usize, log.end as usize);
        drop(log);
        let whole = std::fs::read(path_in(dir.path())).unwrap();
        let (_, truth) = read(dir.path());
        for at in (0..end).step_by(7) {
            let mut bad = whole.clone();
            bad[at] ^= 0x10;
            std::fs::write(path_in(dir.path()), &bad).unwrap();
            let (found, all) = read(dir.path());
            assert_eq!(found.base_broken, at < base_end, "flip at {at}");
            assert!(truth.starts_with(&all) && all.len() < truth.len());
        }
    }
}
