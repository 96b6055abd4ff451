//! The atomic writer: a directory of files that a reader sees changed all at once.
//!
//! ```text
//! VOLUME/..2026_11_23_03_03_00.000000001/a   the files
//! VOLUME/..data -> ..2026_11_23_03_03_00...  swapped by rename(2)
//! VOLUME/a      -> ..data/a                  what the container opens
//! ```
//!
//! Owns everything in the volume whose name begins with `..` and every link into `..data`; leaves
//! alone what others put there (mount points). Equal content is not written again. After a power
//! cut a half-written directory differs from what is wanted, and is replaced.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::unistd::{Gid, Uid, chown};

/// One file of a volume. Not `Debug`: it may be a Secret's.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct FileEntry {
    /// Permission bits.
    pub(super) mode: u32,
    /// Owner; root where unset.
    pub(super) owner: Option<u32>,
    pub(super) data: Vec<u8>,
}

/// Files by their path in the volume.
pub(super) type Payload = BTreeMap<String, FileEntry>;

const DATA: &str = "..data";
const DATA_NEW: &str = "..data_tmp";

/// Why these paths cannot be files of one volume, if so.
pub(super) fn invalid_path(payload: &Payload) -> Option<String> {
    let mut parents: BTreeSet<&Path> = BTreeSet::new();
    for path in payload.keys() {
        let parts: Vec<_> = Path::new(path).components().collect();
        let plain = parts.iter().all(|c| matches!(c, Component::Normal(_)));
        if path.is_empty() || path.len() > 4095 || !plain || path.ends_with('/') {
            return Some(format!("{path:?} must be a relative path without \"..\""));
        }
        if path.starts_with("..") {
            return Some(format!("{path:?} must not begin with \"..\""));
        }
        parents.extend(Path::new(path).ancestors().skip(1));
    }
    let both = payload.keys().find(|p| parents.contains(Path::new(p)));
    both.map(|p| format!("{p:?} is a file and a directory at once"))
}

/// Brings the volume to exactly these files; with `keep_old`, files that are there and not among
/// them stay. Tells whether anything changed. `group` is the Pod's fsGroup.
pub(super) fn write(
    volume: &Path,
    mut payload: Payload,
    keep_old: bool,
    group: Option<u32>,
) -> io::Result<bool> {
    let old_dir = current(volume);
    let old = old_dir.as_ref().map(|d| read_tree(d)).transpose()?;
    if group.is_some() {
        // A member of the fsGroup may read each file; these volumes are read-only.
        payload.values_mut().for_each(|f| f.mode |= 0o440);
    }
    if let (true, Some(old)) = (keep_old, &old) {
        for (path, file) in old {
            payload.entry(path.clone()).or_insert_with(|| file.clone());
        }
    }
    // The directory of an interrupted write.
    remove_leftovers(volume, old_dir.as_deref())?;
    if old.as_ref() == Some(&normalised(&payload)) {
        link_names(volume, &payload)?;
        return Ok(false);
    }
    let fresh = fresh_dir(volume, group)?;
    for (path, file) in &payload {
        write_file(&fresh, path, file, group)?;
    }
    swap(volume, &fresh)?;
    link_names(volume, &payload)?;
    unlink_stale(volume, &payload)?;
    remove_leftovers(volume, Some(&fresh))?;
    Ok(true)
}

/// What `read_tree` finds after these files were written.
fn normalised(payload: &Payload) -> Payload {
    let root = nix::unistd::geteuid().as_raw();
    let entry = |(path, file): (&String, &FileEntry)| {
        let owner = Some(file.owner.unwrap_or(root));
        (
            path.clone(),
            FileEntry {
                owner,
                ..file.clone()
            },
        )
    };
    payload.iter().map(entry).collect()
}

/// The directory that `..data` names; `None` if there is none or it is broken.
fn current(volume: &Path) -> Option<PathBuf> {
    let target = fs::read_link(volume.join(DATA)).ok()?;
    let name = target
        .to_str()
        .filter(|t| t.starts_with("..") && !t.contains('/'))?;
    let dir = volume.join(name);
    dir.symlink_metadata().ok()?.is_dir().then_some(dir)
}

fn read_tree(dir: &Path) -> io::Result<Payload> {
    let mut payload = Payload::new();
    let mut todo = vec![dir.to_path_buf()];
    while let Some(next) = todo.pop() {
        for entry in fs::read_dir(&next)? {
            let path = entry?.path();
            let meta = path.symlink_metadata()?;
            if meta.is_dir() {
                todo.push(path);
            } else if let Some(name) = path.strip_prefix(dir).ok().and_then(Path::to_str) {
                let file = FileEntry {
                    mode: meta.mode() & 0o7777,
                    owner: Some(meta.uid()),
                    data: fs::read(&path)?,
                };
                payload.insert(name.to_owned(), file);
            }
        }
    }
    Ok(payload)
}

/// A new directory named by the time, as tools that look inside expect.
fn fresh_dir(volume: &Path, group: Option<u32>) -> io::Result<PathBuf> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let stamp = i64::try_from(now.as_secs())
        .ok()
        .and_then(|s| jiff::Timestamp::from_second(s).ok())
        .map(|t| t.strftime("%Y_%m_%d_%H_%M_%S").to_string())
        .unwrap_or_default();
    // The clock may stand still or jump back: the number makes the name free.
    for number in 0..1000_u32 {
        let name = format!("..{stamp}.{:09}", now.subsec_nanos().wrapping_add(number));
        let dir = volume.join(name);
        match fs::create_dir(&dir) {
            Ok(()) => {
                set(&dir, 0o755, None, group)?;
                return Ok(dir);
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

fn set(path: &Path, mode: u32, owner: Option<u32>, group: Option<u32>) -> io::Result<()> {
    if owner.is_some() || group.is_some() {
        chown(path, owner.map(Uid::from_raw), group.map(Gid::from_raw))?;
    }
    // After chown, which clears set-id bits.
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

fn write_file(dir: &Path, name: &str, file: &FileEntry, group: Option<u32>) -> io::Result<()> {
    let path = dir.join(name);
    let mut parent = dir.to_path_buf();
    let parts = Path::new(name)
        .parent()
        .into_iter()
        .flat_map(Path::components);
    for part in parts {
        parent.push(part);
        match fs::create_dir(&parent) {
            Ok(()) => set(&parent, 0o755, None, group)?,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
    }
    let mut options = fs::OpenOptions::new();
    // Nobody may open it before its owner and mode are right.
    let options = options.write(true).create_new(true).mode(0o600);
    io::Write::write_all(&mut options.open(&path)?, &file.data)?;
    set(&path, file.mode, file.owner, group)
}

fn swap(volume: &Path, fresh: &Path) -> io::Result<()> {
    let name = fresh.file_name().unwrap_or_default();
    let link = volume.join(DATA_NEW);
    match fs::remove_file(&link) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => symlink(name, &link)?,
    }
    fs::rename(link, volume.join(DATA))
}

/// The names at the volume's top.
fn top(payload: &Payload) -> BTreeSet<&str> {
    payload.keys().filter_map(|p| p.split('/').next()).collect()
}

fn link_names(volume: &Path, payload: &Payload) -> io::Result<()> {
    for name in top(payload) {
        let link = volume.join(name);
        let target = Path::new(DATA).join(name);
        match link.symlink_metadata() {
            Ok(meta) if meta.is_symlink() && fs::read_link(&link)? == target => {}
            Ok(_) => {
                let message = format!("{} is in the way of a key of that name", link.display());
                return Err(io::Error::other(message));
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => symlink(target, link)?,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Links into `..data` whose file is gone.
fn unlink_stale(volume: &Path, payload: &Payload) -> io::Result<()> {
    let wanted = top(payload);
    for entry in fs::read_dir(volume)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let ours = !name.starts_with("..")
            && entry.file_type()?.is_symlink()
            && fs::read_link(entry.path())?.starts_with(DATA);
        if ours && !wanted.contains(name.as_ref()) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Directories of earlier or interrupted writes.
fn remove_leftovers(volume: &Path, keep: Option<&Path>) -> io::Result<()> {
    for entry in fs::read_dir(volume)? {
        let entry = entry?;
        let ours = entry.file_name().to_string_lossy().starts_with("..");
        if ours && entry.file_type()?.is_dir() && Some(entry.path().as_path()) != keep {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn payload(files: &[(&str, &str)]) -> Payload {
        let file = |(path, data): &(&str, &str)| {
            let entry = FileEntry {
                mode: 0o644,
                owner: None,
                data: data.as_bytes().to_vec(),
            };
            ((*path).to_owned(), entry)
        };
        files.iter().map(file).collect()
    }

    fn read(dir: &Path, name: &str) -> Option<String> {
        fs::read_to_string(dir.join(name)).ok()
    }

    #[test]
    fn files_appear_change_and_vanish() {
        let dir = tempfile::tempdir().unwrap();
        let v = dir.path();
        assert!(
            write(
                v,
                payload(&[("a", "1"), ("d/x", "2"), ("d/y", "3")]),
                false,
                None
            )
            .unwrap()
        );
        assert_eq!(read(v, "a").as_deref(), Some("1"));
        assert_eq!(read(v, "d/y").as_deref(), Some("3"));
        assert!(write(v, payload(&[("a", "9"), ("b", "4")]), false, None).unwrap());
        assert_eq!(read(v, "a").as_deref(), Some("9"));
        assert_eq!(read(v, "b").as_deref(), Some("4"));
        assert!(
            v.join("d").symlink_metadata().is_err(),
            "a vanished name stayed"
        );
        let mut names: Vec<_> = fs::read_dir(v)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        names.retain(|n| n.to_string_lossy().starts_with(".."));
        assert_eq!(names.len(), 2, "..data and one directory: {names:?}");
    }

    #[test]
    fn equal_content_is_not_written_again() {
        let dir = tempfile::tempdir().unwrap();
        let files = payload(&[("a", "1"), ("d/x", "2")]);
        assert!(write(dir.path(), files.clone(), false, None).unwrap());
        let before = fs::read_link(dir.path().join(DATA)).unwrap();
        assert!(!write(dir.path(), files, false, None).unwrap());
        assert_eq!(fs::read_link(dir.path().join(DATA)).unwrap(), before);
    }

    #[test]
    fn modes_are_exact_whatever_the_umask() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = payload(&[("a", "1"), ("b", "2")]);
        files.get_mut("a").unwrap().mode = 0o666;
        files.get_mut("b").unwrap().mode = 0o400;
        write(dir.path(), files, false, None).unwrap();
        let mode = |n: &str| fs::metadata(dir.path().join(n)).unwrap().mode() & 0o777;
        assert_eq!((mode("a"), mode("b")), (0o666, 0o400));
    }

    #[test]
    fn what_an_absent_source_gave_stays() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), payload(&[("a", "1"), ("b", "2")]), false, None).unwrap();
        assert!(write(dir.path(), payload(&[("a", "9")]), true, None).unwrap());
        assert_eq!(read(dir.path(), "a").as_deref(), Some("9"));
        assert_eq!(read(dir.path(), "b").as_deref(), Some("2"));
        assert!(!write(dir.path(), payload(&[]), true, None).unwrap());
    }

    #[test]
    fn an_interrupted_write_is_cleaned_and_a_foreign_mount_point_stays() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), payload(&[("a", "1")]), false, None).unwrap();
        fs::create_dir(dir.path().join("..2020_01_01_00_00_00.1")).unwrap();
        symlink("..nowhere", dir.path().join(DATA_NEW)).unwrap();
        fs::create_dir(dir.path().join("nested")).unwrap();
        write(dir.path(), payload(&[("b", "1")]), false, None).unwrap();
        assert!(!dir.path().join("..2020_01_01_00_00_00.1").exists());
        assert!(dir.path().join("nested").is_dir());
        assert!(!dir.path().join("a").exists());
    }

    #[test]
    fn a_path_that_leaves_the_volume_is_refused() {
        for bad in ["", "/a", "../a", "a/../b", "..data", "..x/y", "a/", "./a"] {
            assert!(invalid_path(&payload(&[(bad, "")])).is_some(), "{bad:?}");
        }
        assert!(invalid_path(&payload(&[("a", ""), ("a/b", "")])).is_some());
        assert!(invalid_path(&payload(&[("a.b", ""), ("a/b", ""), (".x", "")])).is_none());
    }

    /// Two files that always say the same are read through one open directory while they change.
    #[test]
    fn a_reader_never_sees_half_an_update() {
        let dir = tempfile::tempdir().unwrap();
        let v = dir.path().to_path_buf();
        write(&v, payload(&[("a", "0"), ("b", "0")]), false, None).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let reader = std::thread::spawn({
            let (v, stop) = (v.clone(), stop.clone());
            move || {
                let mut seen = 0_u32;
                while !stop.load(Ordering::Relaxed) {
                    // A whole name never fails to open: one link leads to complete directories.
                    let one = fs::read_to_string(v.join("a"));
                    let pair = fs::canonicalize(v.join(DATA)).and_then(|d| {
                        Ok((
                            fs::read_to_string(d.join("a"))?,
                            fs::read_to_string(d.join("b"))?,
                        ))
                    });
                    if let Ok(text) = one {
                        assert!(!text.is_empty(), "an empty file was visible");
                    }
                    // The directory may be removed between the two reads, never half-filled.
                    if let Ok((a, b)) = pair {
                        assert_eq!(a, b);
                        seen += 1;
                    }
                }
                seen
            }
        });
        for n in 1..400 {
            let text = n.to_string();
            write(&v, payload(&[("a", &text), ("b", &text)]), false, None).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        assert!(reader.join().unwrap() > 0, "the reader saw no state at all");
    }
}
