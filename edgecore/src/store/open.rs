//! Opening the two copies: reads both, asks [`super::plan`] what to do, does it.
//!
//! Gives records and a snapshot that agree. A crash at any line leaves a directory that the next
//! start opens: a database under repair says so (its batch number is 0), and the snapshot is
//! replaced by a rename only when the database is durable.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use super::database::{self, Damage, Records};
use super::engine::write_snapshot;
use super::plan::{DatabaseState, Plan, plan};
use super::schema::{self, Migration, Table, VERSION, Write};
use super::snapshot::{self, Found, Snapshot};
use super::{Recovery, StoreError, desired};

type Copies = (Records, Snapshot, Option<Recovery>);

/// A database at which the process died this often in a row counts as unusable: a panic on a thread
/// of the engine's own ends the process, and there is no other way to notice. Once may be a power cut.
const TRIES: usize = 2;

pub(super) fn copies(dir: &Path) -> Result<Copies, StoreError> {
    let found = read_snapshot(dir, |_, _| Ok(()))?.map(|(_, found)| found);
    if let Some(found) = found.filter(|f| f.head.version > VERSION) {
        schema::path_from(found.head.version)?;
    }
    let (mut records, mut log, recovered) = open_both(dir, found)?;
    let steps = schema::path_from(records.about().version)?;
    if migrate(&mut records, steps).map_err(|why| damaged(dir, why))? {
        log = settle(dir, &mut records)?;
    }
    protect(dir).map_err(|e| StoreError::io("set the permissions of", dir, e))?;
    remove_if_there(&dir.join("opening"))?;
    Ok((records, log, recovered))
}

fn open_both(dir: &Path, found: Option<Found>) -> Result<Copies, StoreError> {
    let database = open_database(dir)?;
    let state = match &database {
        Err(why) => DatabaseState::Unusable(why.clone()),
        Ok(records) => state_of(records)?,
    };
    let fresh_snapshot = |mut records: Records, recovered| {
        let seq = records.about().seq + 1;
        begin_incarnation(&mut records, seq, Vec::new()).map_err(|why| damaged(dir, why))?;
        let log = settle(dir, &mut records)?;
        Ok((records, log, recovered))
    };
    let why = match (plan(state, found), database) {
        (Plan::Fresh, Ok(records)) => return fresh_snapshot(records, None),
        (Plan::Rewrite(why), Ok(records)) => {
            return fresh_snapshot(records, Some(Recovery::Snapshot { why }));
        }
        (Plan::Replay, Ok(records)) => match replay(dir, records)? {
            Ok((records, log)) => return Ok((records, log, None)),
            Err(why) => why,
        },
        (Plan::Rebuild(why) | Plan::Salvage(why), _) => why,
        (Plan::Fresh | Plan::Rewrite(_) | Plan::Replay, Err(why)) => why,
    };
    rebuild(dir, found, why)
}

fn damaged(dir: &Path, why: Damage) -> StoreError {
    StoreError::Database {
        dir: dir.to_owned(),
        why,
    }
}

fn state_of(records: &Records) -> Result<DatabaseState, StoreError> {
    let about = records.about();
    schema::path_from(about.version)?;
    Ok(match about.seq {
        0 if records.is_empty() => DatabaseState::Empty,
        0 => DatabaseState::Unusable("its repair was cut off".into()),
        seq => DatabaseState::Intact {
            seq,
            incarnation: about.incarnation,
        },
    })
}

fn open_database(dir: &Path) -> Result<Result<Records, Damage>, StoreError> {
    let marker = dir.join("opening");
    let tries = std::fs::metadata(&marker).map_or(0, |m| m.len() as usize);
    if tries >= TRIES {
        return Ok(Err(format!("edgecore died {tries} times while opening it")));
    }
    let mark = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(&marker)
        .and_then(|mut f| f.write_all(b"."));
    mark.map_err(|e| StoreError::io("write", &marker, e))?;
    Ok(Records::open(dir))
}

fn read_snapshot(
    dir: &Path,
    mut apply: impl FnMut(u64, Vec<Write>) -> Result<(), Damage>,
) -> Result<Option<(Snapshot, Found)>, StoreError> {
    let mut result = Ok(());
    let read = Snapshot::open(dir, |seq, writes| {
        if result.is_ok() {
            result = apply(seq, writes);
        }
    });
    let read = read.map_err(|e| StoreError::io("read", &snapshot::path_in(dir), e))?;
    result.map_err(|why| damaged(dir, why))?;
    Ok(read)
}

/// The batches that only the snapshot has. The inner error is a reason to rebuild.
fn replay(
    dir: &Path,
    mut records: Records,
) -> Result<Result<(Records, Snapshot), Damage>, StoreError> {
    let from = records.about().seq;
    let read = read_snapshot(dir, |seq, writes| match seq > from {
        true => records.apply(seq, writes),
        false => Ok(()),
    });
    match read {
        Ok(Some((log, _))) => Ok(desired::verify(&records).map(|()| (records, log))),
        Ok(None) => Ok(Err("its snapshot vanished".into())),
        Err(StoreError::Database { why, .. }) => Ok(Err(why)),
        Err(other) => Err(other),
    }
}

/// A new database from what is intact of the snapshot. The damaged one stays beside it, for whoever
/// wants to know what happened, until the next damage.
fn rebuild(dir: &Path, found: Option<Found>, why: Damage) -> Result<Copies, StoreError> {
    let aside = dir.join("database.damaged");
    remove_if_there(&aside)?;
    match std::fs::rename(database::path_in(dir), &aside) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(StoreError::io("move aside", &database::path_in(dir), e));
        }
        Ok(()) | Err(_) => {}
    }
    let mut records = Records::open(dir).map_err(|why| damaged(dir, why))?;
    read_snapshot(dir, |_, writes| records.apply(0, writes))?;
    let whole = found.is_some_and(|f| !f.base_broken) && desired::verify(&records).is_ok();
    let finish = |records: &mut Records| {
        let repair = match whole {
            true => Vec::new(),
            false => desired::salvage(records)?,
        };
        let (version, last) = found.map_or((VERSION, 0), |f| (f.head.version, f.last_seq));
        records.set_version(version);
        begin_incarnation(records, last + 1, repair)
    };
    finish(&mut records).map_err(|why| damaged(dir, why))?;
    let log = settle(dir, &mut records)?;
    let recovery = match whole {
        true => Recovery::Database { why },
        false => Recovery::Both { why },
    };
    Ok((records, log, Some(recovery)))
}

fn begin_incarnation(records: &mut Records, seq: u64, writes: Vec<Write>) -> Result<(), Damage> {
    records.set_incarnation(rand::random());
    records.apply(seq, writes)
}

/// Makes the records durable, then the snapshot of them.
fn settle(dir: &Path, records: &mut Records) -> Result<Snapshot, StoreError> {
    let settled = records.settle().and_then(|()| records.checkpoint());
    settled.map_err(|why| damaged(dir, why))?;
    let sync = |path: &Path| File::open(path).and_then(|f| f.sync_all());
    let path = database::path_in(dir);
    // The names of new files are durable only with their directories.
    for path in [&path.join("conf"), &path, &dir.to_owned()] {
        sync(path).map_err(|e| StoreError::io("sync", path, e))?;
    }
    write_snapshot(dir, records)
}

/// Takes the records to [`VERSION`], a step a batch. Says whether there was anything to do; the
/// caller then writes a new snapshot, as the old one's batches are of the old version.
fn migrate(records: &mut Records, steps: &[Migration]) -> Result<bool, Damage> {
    for step in steps {
        let mut writes = Vec::new();
        for table in Table::ALL {
            records.each(table, &[], |key, value| {
                writes.extend(step(table, key, value));
                Ok(())
            })?;
        }
        let about = records.about();
        let (version, seq) = (about.version + 1, about.seq + 1);
        records.set_version(version);
        records.apply(seq, writes)?;
        records.settle()?;
    }
    Ok(!steps.is_empty())
}

fn remove_if_there(path: &Path) -> Result<(), StoreError> {
    let removed = match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(StoreError::io("remove", path, e)),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// The directory is closed to others already; this is for copies that are made of it.
fn protect(path: &Path) -> io::Result<()> {
    let is_dir = std::fs::symlink_metadata(path)?.is_dir();
    let mode = if is_dir { 0o700 } else { 0o600 };
    std::fs::set_permissions(path, Permissions::from_mode(mode))?;
    if is_dir {
        for entry in std::fs::read_dir(path)? {
            protect(&entry?.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;

    /// As a later version would: one more field in front of each small value.
    fn step(table: Table, key: &[u8], value: &[u8]) -> Vec<Write> {
        match table == Table::Meta {
            true => vec![Write::put(table, key, [b"2:", value].concat())],
            false => Vec::new(),
        }
    }

    fn put(records: &mut Records, seq: u64, key: &str) {
        records
            .apply(seq, vec![Write::put(Table::Meta, key, *b"v")])
            .unwrap();
    }

    #[test]
    fn a_migration_takes_every_record_a_version_further_in_one_batch() {
        let dir = tempfile::tempdir().unwrap();
        let mut records = Records::open(dir.path()).unwrap();
        put(&mut records, 1, "a");
        put(&mut records, 2, "b");
        assert!(migrate(&mut records, &[step, step]).unwrap());
        let about = records.about().clone();
        assert_eq!((about.version, about.seq), (VERSION + 2, 4));
        let found = records.scan(Table::Meta, &[]).unwrap();
        assert_eq!(found[1], (b"b".to_vec(), b"2:2:v".to_vec()));
        assert!(!migrate(&mut records, &[]).unwrap());
    }

    #[test]
    fn a_store_of_a_newer_version_is_left_alone() {
        for newer_snapshot in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            drop(Store::open(dir.path()).unwrap());
            let mut records = Records::open(dir.path()).unwrap();
            let seq = records.about().seq + 1;
            records.set_version(VERSION + 1);
            records.apply(seq, Vec::new()).unwrap();
            records.settle().unwrap();
            records.checkpoint().unwrap();
            if newer_snapshot {
                write_snapshot(dir.path(), &records).unwrap();
            }
            drop(records);
            let refused = Store::open(dir.path()).map(drop).unwrap_err();
            assert!(matches!(refused, StoreError::Version { found, .. } if found == VERSION + 1));
            let records = Records::open(dir.path()).unwrap();
            assert_eq!(
                (records.about().version, records.about().seq),
                (VERSION + 1, seq)
            );
            assert!(!dir.path().join("database.damaged").exists());
        }
    }

    #[test]
    fn a_database_that_kills_whoever_opens_it_is_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let (store, before) = Store::open(dir.path()).unwrap();
        store.meta().put("a", b"1").unwrap();
        drop(store);
        for (tries, rebuilt) in [("", false), (".", false), ("..", true)] {
            std::fs::write(dir.path().join("opening"), tries).unwrap();
            let (store, opened) = Store::open(dir.path()).unwrap();
            assert_eq!(opened.recovered.is_some(), rebuilt, "{tries:?}");
            assert_eq!(opened.incarnation != before.incarnation, rebuilt);
            assert_eq!(store.meta().get("a").unwrap(), Some(b"1".to_vec()));
            assert!(!dir.path().join("opening").exists());
        }
    }
}
