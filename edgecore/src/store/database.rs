//! The records, queried by key: sled 0.34.7, or a map for a store that lives in memory only.
//!
//! Owns the directory `database`. What makes a commit durable is the snapshot's frame, not this:
//! sled's `flush` leaves data in the disk's cache, so [`Records::checkpoint`] adds a `sync_data` on
//! the database file, and only behind a checkpoint may the snapshot forget a batch.
//!
//! Beside the records lives one that describes them all: version, incarnation, the number of the
//! last batch, and a digest over every record. Each batch changes it in the same sled batch, and
//! opening computes it again, since sled opens a truncated file without a word and with data gone.
//!
//! ```text
//! key    table:u8 key 0 piece:u16          the record about all records: a single 0
//! value  piece 0 begins with the whole length:u32
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ring::digest;

use super::schema::{Table, VERSION, Write};

/// sled writes a page that is longer than a quarter of a segment into a file of its own, which the
/// `sync_data` on the database file does not cover. A leaf holds up to 16 items before it splits,
/// and up to 3 more come from a merge; 24 pieces with the longest keys stay below 64 KiB.
const SEGMENT: usize = 256 << 10;
const PIECE: usize = 2048;
pub(super) const MAX_KEY: usize = 512;
const _: () = assert!(24 * (PIECE + MAX_KEY + 16) < SEGMENT / 4);

/// The smallest cache that holds the hot pages of a node with tens of Pods.
const CACHE: u64 = 2 << 20;

/// sled writes and waits for the disk twice in each of its batches. This much is collected in
/// memory, coalesced by key, before it gets one; all of it is in the snapshot already.
const PENDING: usize = 256 << 10;

const ABOUT: [u8; 1] = [0];

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct About {
    pub(super) version: u32,
    pub(super) incarnation: [u8; 16],
    /// The last batch that is in the records. 0 while they are being rebuilt.
    pub(super) seq: u64,
    count: u64,
    root: u128,
}

impl About {
    pub(super) fn new(incarnation: [u8; 16]) -> Self {
        Self {
            version: VERSION,
            incarnation,
            seq: 0,
            count: 0,
            root: 0,
        }
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = self.version.to_be_bytes().to_vec();
        out.extend_from_slice(&self.incarnation);
        out.extend_from_slice(&self.seq.to_be_bytes());
        out.extend_from_slice(&self.count.to_be_bytes());
        out.extend_from_slice(&self.root.to_be_bytes());
        out
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            version: u32::from_be_bytes(*bytes.first_chunk()?),
            incarnation: *bytes.get(4..)?.first_chunk()?,
            seq: u64::from_be_bytes(*bytes.get(20..)?.first_chunk()?),
            count: u64::from_be_bytes(*bytes.get(28..)?.first_chunk()?),
            root: u128::from_be_bytes(*bytes.get(36..)?.first_chunk()?),
        })
    }

    fn add(&mut self, leaf: u128) {
        self.count = self.count.wrapping_add(1);
        self.root = self.root.wrapping_add(leaf);
    }

    fn remove(&mut self, leaf: u128) {
        self.count = self.count.wrapping_sub(1);
        self.root = self.root.wrapping_sub(leaf);
    }
}

fn leaf(table: Table, key: &[u8], value: &[u8]) -> u128 {
    let mut ctx = digest::Context::new(&digest::SHA256);
    ctx.update(&[table.number()]);
    ctx.update(&(key.len() as u32).to_be_bytes());
    ctx.update(key);
    ctx.update(value);
    let full = ctx.finish();
    let first = full.as_ref().first_chunk().expect("a SHA-256 has 32 bytes");
    u128::from_be_bytes(*first)
}

/// Why the database cannot be used, in words for the log.
pub(super) type Damage = String;
pub(super) type Record = (Vec<u8>, Vec<u8>);

type Take<'a> = dyn FnMut(&[u8], &[u8]) -> Result<(), Damage> + 'a;

pub(super) struct Records {
    /// What the place holds, but for `seq`, which counts what is pending too.
    about: About,
    /// As the place describes itself.
    placed: About,
    place: Place,
    /// Applied and not yet in the place, by key, so that a record that changes often reaches the
    /// disk once. Bounded by [`PENDING`].
    pending: BTreeMap<(Table, Vec<u8>), Option<Vec<u8>>>,
    pending_bytes: usize,
}

enum Place {
    Memory(BTreeMap<(Table, Vec<u8>), Vec<u8>>),
    Disk { db: sled::Db, file: File },
}

pub(super) fn path_in(dir: &Path) -> PathBuf {
    dir.join("database")
}

impl Records {
    pub(super) fn in_memory() -> Self {
        Self {
            about: About::new([0; 16]),
            placed: About::new([0; 16]),
            place: Place::Memory(BTreeMap::new()),
            pending: BTreeMap::new(),
            pending_bytes: 0,
        }
    }

    /// Opens or makes the database and checks all of it. A panic of the engine counts as
    /// damage.
    pub(super) fn open(dir: &Path) -> Result<Self, Damage> {
        let path = path_in(dir);
        std::panic::catch_unwind(AssertUnwindSafe(|| Self::open_checked(&path)))
            .unwrap_or_else(|_| Err("the engine panicked on it".into()))
    }

    fn open_checked(path: &Path) -> Result<Self, Damage> {
        let db = open_sled(path)?;
        let file = File::open(path.join("db")).map_err(|e| e.to_string())?;
        let about = db.get(ABOUT).map_err(|e| e.to_string())?;
        let about = match about {
            Some(bytes) => About::decode(&bytes).ok_or("its description is malformed")?,
            None if db.is_empty() => About::new([0; 16]),
            None => return Err("its description is missing".into()),
        };
        let records = Self {
            placed: about.clone(),
            about,
            place: Place::Disk { db, file },
            pending: BTreeMap::new(),
            pending_bytes: 0,
        };
        // A newer version may describe its records in another way: its own program judges them.
        if records.about.version <= VERSION {
            records.check()?;
        }
        Ok(records)
    }

    fn check(&self) -> Result<(), Damage> {
        let mut seen = About::new([0; 16]);
        for table in Table::ALL {
            self.each(table, &[], |key, value| {
                seen.add(leaf(table, key, value));
                Ok(())
            })?;
        }
        let (has, should) = (seen.count, self.about.count);
        if (has, seen.root) == (should, self.about.root) {
            return Ok(());
        }
        Err(format!(
            "its digest does not fit: {has} records of {should}"
        ))
    }

    pub(super) fn about(&self) -> &About {
        &self.about
    }

    pub(super) fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, Damage> {
        let id = (table, key.to_vec());
        if let Some(value) = self.pending.get(&id) {
            return Ok(value.clone());
        }
        match &self.place {
            Place::Memory(map) => Ok(map.get(&id).cloned()),
            Place::Disk { db, .. } => read(db, table, key),
        }
    }

    /// Calls `take` for each record whose key begins with `prefix`, in the order of keys.
    pub(super) fn each(
        &self,
        table: Table,
        prefix: &[u8],
        mut take: impl FnMut(&[u8], &[u8]) -> Result<(), Damage>,
    ) -> Result<(), Damage> {
        let pending = self.pending.range((table, prefix.to_vec())..);
        let mut pending = pending
            .map(|((t, key), value)| (*t, key, value))
            .take_while(|(t, key, _)| *t == table && key.starts_with(prefix))
            .peekable();
        self.each_placed(table, prefix, &mut |key, value| {
            while let Some((_, before, new)) = pending.next_if(|(_, k, _)| k.as_slice() < key) {
                new.as_ref().map_or(Ok(()), |new| take(before, new))?;
            }
            match pending.next_if(|(_, k, _)| k.as_slice() == key) {
                None => take(key, value),
                Some((_, _, new)) => new.as_ref().map_or(Ok(()), |new| take(key, new)),
            }
        })?;
        for (_, key, new) in pending {
            new.as_ref().map_or(Ok(()), |new| take(key, new))?;
        }
        Ok(())
    }

    fn each_placed(&self, table: Table, prefix: &[u8], take: &mut Take<'_>) -> Result<(), Damage> {
        match &self.place {
            Place::Memory(map) => map
                .range((table, prefix.to_vec())..)
                .take_while(|((t, k), _)| *t == table && k.starts_with(prefix))
                .try_for_each(|((_, k), v)| take(k, v)),
            Place::Disk { db, .. } => {
                let mut from = vec![table.number()];
                from.extend_from_slice(prefix);
                let mut joined = Joined::default();
                for item in db.scan_prefix(from) {
                    let (key, value) = item.map_err(|e| e.to_string())?;
                    if let Some(record) = joined.push(&key, &value)? {
                        take(&record.0, &record.1)?;
                    }
                }
                joined.finish()
            }
        }
    }

    pub(super) fn scan(&self, table: Table, prefix: &[u8]) -> Result<Vec<Record>, Damage> {
        let mut all = Vec::new();
        self.each(table, prefix, |k, v| {
            all.push((k.to_vec(), v.to_vec()));
            Ok(())
        })?;
        Ok(all)
    }

    /// Applies one batch: readable when it returns, durable behind [`Self::settle`] and
    /// [`Self::checkpoint`]; after a crash all of it is there or nothing. `seq` 0 marks records that are being rebuilt.
    pub(super) fn apply(&mut self, seq: u64, writes: Vec<Write>) -> Result<(), Damage> {
        self.about.seq = seq;
        for w in writes {
            self.pending_bytes += w.key.len() + w.value.as_ref().map_or(0, Vec::len);
            self.pending.insert((w.table, w.key), w.value);
        }
        let in_memory = matches!(self.place, Place::Memory(_));
        match in_memory || self.pending_bytes > PENDING {
            true => self.settle(),
            false => Ok(()),
        }
    }

    /// Puts what is pending into the place, in one batch.
    pub(super) fn settle(&mut self) -> Result<(), Damage> {
        if self.pending.is_empty() && self.about == self.placed {
            return Ok(());
        }
        let pending = std::mem::take(&mut self.pending);
        self.pending_bytes = 0;
        let mut about = self.about.clone();
        let mut batch = sled::Batch::default();
        for ((table, key), value) in &pending {
            let old = self.get(*table, key)?;
            if let Some(old) = &old {
                about.remove(leaf(*table, key, old));
            }
            if let Some(new) = value {
                about.add(leaf(*table, key, new));
            }
            if matches!(self.place, Place::Disk { .. }) {
                split(&mut batch, *table, key, value.as_deref(), old.as_deref());
            }
        }
        match &mut self.place {
            Place::Disk { db, .. } => {
                batch.insert(&ABOUT, about.encode());
                db.apply_batch(batch).map_err(|e| e.to_string())?;
            }
            Place::Memory(map) => {
                for (id, value) in pending {
                    match value {
                        Some(value) => drop(map.insert(id, value)),
                        None => drop(map.remove(&id)),
                    }
                }
            }
        }
        self.placed = about.clone();
        self.about = about;
        Ok(())
    }

    /// Takes effect with the next batch, in the same step.
    pub(super) fn set_version(&mut self, version: u32) {
        self.about.version = version;
    }

    /// Takes effect with the next batch, in the same step.
    pub(super) fn set_incarnation(&mut self, incarnation: [u8; 16]) {
        self.about.incarnation = incarnation;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.about.count == 0
    }

    /// When this returns, all that was settled survives a power cut.
    pub(super) fn checkpoint(&self) -> Result<(), Damage> {
        match &self.place {
            Place::Memory(_) => Ok(()),
            Place::Disk { db, file } => {
                db.flush().map_err(|e| e.to_string())?;
                file.sync_data().map_err(|e| e.to_string())
            }
        }
    }
}

/// The caller holds the lock of the whole directory: only the engine's own threads, ending after an
/// earlier store of this process, can hold this one, and not for long.
fn open_sled(path: &Path) -> Result<sled::Db, Damage> {
    let config = sled::Config::new()
        .path(path)
        .mode(sled::Mode::LowSpace)
        .cache_capacity(CACHE)
        .segment_size(SEGMENT)
        .flush_every_ms(None);
    let mut tries = 0;
    loop {
        match config.open() {
            Err(e) if tries < 100 && e.to_string().contains("acquire lock") => {
                tries += 1;
                std::thread::sleep(Duration::from_millis(20));
            }
            other => return other.map_err(|e| e.to_string()),
        }
    }
}

fn piece_key(table: Table, key: &[u8], piece: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(key.len() + 4);
    out.push(table.number());
    out.extend_from_slice(key);
    out.push(0);
    out.extend_from_slice(&(piece as u16).to_be_bytes());
    out
}

fn pieces(len: usize) -> usize {
    len.div_ceil(PIECE).max(1)
}

fn split(
    batch: &mut sled::Batch,
    table: Table,
    key: &[u8],
    new: Option<&[u8]>,
    old: Option<&[u8]>,
) {
    let had = old.map_or(0, |v| pieces(v.len()));
    let has = new.map_or(0, |v| pieces(v.len()));
    for piece in has..had {
        batch.remove(piece_key(table, key, piece));
    }
    let Some(value) = new else { return };
    for piece in 0..has {
        let part = &value[piece * PIECE..value.len().min((piece + 1) * PIECE)];
        let mut bytes = Vec::with_capacity(part.len() + 4);
        if piece == 0 {
            bytes.extend_from_slice(&(value.len() as u32).to_be_bytes());
        }
        bytes.extend_from_slice(part);
        batch.insert(piece_key(table, key, piece), bytes);
    }
}

fn read(db: &sled::Db, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, Damage> {
    let get = |piece| {
        db.get(piece_key(table, key, piece))
            .map_err(|e| e.to_string())
    };
    let mut joined = Joined::default();
    let mut piece = 0;
    while let Some(value) = get(piece)? {
        if let Some(record) = joined.push(&piece_key(table, key, piece), &value)? {
            return Ok(Some(record.1));
        }
        piece += 1;
    }
    joined.finish()?;
    Ok(None)
}

/// Puts the pieces of records together again; a gap is damage.
#[derive(Default)]
struct Joined {
    open: Option<Open>,
}

struct Open {
    key: Vec<u8>,
    value: Vec<u8>,
    whole: usize,
    next: usize,
}

impl Joined {
    fn push(&mut self, key: &[u8], bytes: &[u8]) -> Result<Option<Record>, Damage> {
        let bad = || "a record lacks a piece".to_owned();
        let (rest, piece) = key.split_last_chunk::<2>().ok_or_else(bad)?;
        let piece = usize::from(u16::from_be_bytes(*piece));
        let name = rest
            .split_first()
            .and_then(|(_, k)| k.strip_suffix(&[0]))
            .ok_or_else(bad)?;
        let mut open = match (self.open.take(), piece) {
            (None, 0) => {
                let (len, part) = bytes.split_first_chunk::<4>().ok_or_else(bad)?;
                Open {
                    key: name.to_vec(),
                    value: part.to_vec(),
                    whole: u32::from_be_bytes(*len) as usize,
                    next: 1,
                }
            }
            (Some(mut open), n) if n == open.next && open.key == name => {
                open.value.extend_from_slice(bytes);
                open.next += 1;
                open
            }
            (None, _) | (Some(_), _) => return Err(bad()),
        };
        if open.value.len() >= open.whole {
            let fits = open.value.len() == open.whole;
            return fits
                .then(|| Some((std::mem::take(&mut open.key), open.value)))
                .ok_or_else(bad);
        }
        self.open = Some(open);
        Ok(None)
    }

    fn finish(self) -> Result<(), Damage> {
        match self.open {
            None => Ok(()),
            Some(open) => Err(format!("a record lacks piece {}", open.next)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &str, value: Vec<u8>) -> Write {
        Write::put(Table::Meta, key, value)
    }

    /// The values and keys that press hardest on a page: sled would put a page that is too long
    /// into a file of its own, where no sync reaches it.
    #[test]
    fn no_page_becomes_a_file_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let mut records = Records::open(dir.path()).unwrap();
        let long = "k".repeat(MAX_KEY - 4);
        for n in 0..60_u64 {
            let writes = (0..6)
                .map(|i| {
                    let mut key = format!("{:03}", (n * 7 + i * 13) % 200);
                    // Keys that share no prefix, so that none is compressed away.
                    key.push_str(&long.replace('k', &key[..1]));
                    put(
                        &key,
                        vec![n as u8; 1 + (n as usize * 997 + i as usize * 3001) % 9000],
                    )
                })
                .collect();
            records.apply(n + 1, writes).unwrap();
            records.settle().unwrap();
        }
        records.checkpoint().unwrap();
        let blobs = std::fs::read_dir(path_in(dir.path()).join("blobs"));
        assert_eq!(blobs.unwrap().count(), 0);
        drop(records);
        assert_eq!(Records::open(dir.path()).unwrap().about().seq, 60);
    }

    #[test]
    fn a_value_of_any_length_comes_back_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let mut disk = Records::open(dir.path()).unwrap();
        let mut memory = Records::in_memory();
        for (n, len) in [0, 1, PIECE - 1, PIECE, PIECE + 1, 100_000, 3, 0]
            .into_iter()
            .enumerate()
        {
            let value: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
            for r in [&mut disk, &mut memory] {
                r.apply(
                    n as u64 + 1,
                    vec![put("a", value.clone()), put("ab", vec![1])],
                )
                .unwrap();
                assert_eq!(r.get(Table::Meta, b"a").unwrap(), Some(value.clone()));
                let scan = r.scan(Table::Meta, b"a").unwrap();
                assert_eq!(
                    scan,
                    [(b"a".to_vec(), value.clone()), (b"ab".to_vec(), vec![1])]
                );
                assert_eq!(r.scan(Table::Meta, b"ab").unwrap().len(), 1);
                r.settle().unwrap();
                assert_eq!(r.scan(Table::Meta, b"a").unwrap(), scan);
                r.check().unwrap();
            }
            assert_eq!(disk.about, memory.about);
        }
        disk.apply(9, vec![Write::remove(Table::Meta, *b"a")])
            .unwrap();
        assert_eq!(disk.get(Table::Meta, b"a").unwrap(), None);
        assert_eq!(disk.scan(Table::Meta, b"").unwrap().len(), 1);
        disk.settle().unwrap();
        disk.check().unwrap();
    }

    #[test]
    fn what_is_pending_and_what_is_placed_read_as_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut disk = Records::open(dir.path()).unwrap();
        let old = ["b", "d", "f", "g"].map(|k| put(k, vec![1]));
        disk.apply(1, old.to_vec()).unwrap();
        disk.settle().unwrap();
        let mut new = ["a", "d", "e", "h"].map(|k| put(k, vec![2])).to_vec();
        new.push(Write::remove(Table::Meta, *b"f"));
        disk.apply(2, new).unwrap();
        let read = |disk: &Records| {
            let found = disk.scan(Table::Meta, b"").unwrap().into_iter();
            found
                .map(|(k, v)| format!("{}{}", k[0] as char, v[0]))
                .collect::<String>()
        };
        assert_eq!(read(&disk), "a2b1d2e2g1h2");
        disk.settle().unwrap();
        assert_eq!(read(&disk), "a2b1d2e2g1h2");
        disk.check().unwrap();
    }

    #[test]
    fn the_last_write_to_a_key_of_one_batch_wins() {
        let dir = tempfile::tempdir().unwrap();
        let mut disk = Records::open(dir.path()).unwrap();
        disk.apply(1, vec![put("a", vec![1; 5000]), put("a", vec![2])])
            .unwrap();
        disk.settle().unwrap();
        assert_eq!(disk.get(Table::Meta, b"a").unwrap(), Some(vec![2]));
        disk.check().unwrap();
    }

    #[test]
    fn a_record_that_vanished_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let mut disk = Records::open(dir.path()).unwrap();
        disk.apply(1, vec![put("a", vec![1; 5000]), put("b", vec![2])])
            .unwrap();
        disk.settle().unwrap();
        let Place::Disk { db, .. } = &disk.place else {
            panic!()
        };
        db.remove(piece_key(Table::Meta, b"a", 1)).unwrap();
        assert!(disk.check().is_err());
        assert!(disk.get(Table::Meta, b"a").is_err());
        let Place::Disk { db, .. } = &disk.place else {
            panic!()
        };
        (0..3).for_each(|n| drop(db.remove(piece_key(Table::Meta, b"a", n)).unwrap()));
        let said = disk.check().unwrap_err();
        assert!(said.contains("1 records of 2"), "{said}");
    }
}
