//! A path inside a volume, opened so that nothing in the volume can lead out of it.
//!
//! A container may change its volume while we look (CVE-2017-1002101, CVE-2021-25741), so each
//! component is opened from the descriptor of the one before, without following links; a link's
//! text is walked the same way, and ".." goes back along the descriptors we hold, never by name.
//! An absolute link or one that climbs above the volume is refused.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat, readlinkat};
use nix::sys::stat::{Mode, SFlag, fstat, mkdirat};

/// As the kernel's own limit on links in one path.
const MAX_LINKS: u32 = 40;

/// Opens `path` below `volume` (as with O_PATH), making directories that are missing with the
/// volume's own mode.
pub(super) fn open_within(volume: &Path, path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    let mut held = vec![open(volume, flags, Mode::empty())?];
    let mut links = 0;
    let mut todo: VecDeque<OsString> = parts(path)?;
    while let Some(name) = todo.pop_front() {
        if name == ".." {
            held.pop();
            if held.is_empty() {
                return Err(outside(path));
            }
            continue;
        }
        let here = held.last().ok_or_else(|| outside(path))?;
        let next = enter(here, &held[0], &name)?;
        if kind(&next)? == SFlag::S_IFLNK {
            links += 1;
            if links > MAX_LINKS {
                return Err(Errno::ELOOP.into());
            }
            let target = readlinkat(&next, "")?;
            for part in parts(Path::new(&target))?.into_iter().rev() {
                todo.push_front(part);
            }
        } else {
            held.push(next);
        }
    }
    held.pop().ok_or_else(|| outside(path))
}

/// Whether the descriptor is a directory's.
pub(super) fn is_dir(fd: &OwnedFd) -> io::Result<bool> {
    Ok(kind(fd)? == SFlag::S_IFDIR)
}

fn kind(fd: &OwnedFd) -> io::Result<SFlag> {
    Ok(SFlag::from_bits_truncate(
        fstat(fd)?.st_mode & SFlag::S_IFMT.bits(),
    ))
}

fn outside(path: &Path) -> io::Error {
    let message = format!(
        "subPath {:?} leads out of its volume",
        path.display().to_string()
    );
    io::Error::new(io::ErrorKind::PermissionDenied, message)
}

/// The components of a relative path; the "." ones are dropped.
fn parts(path: &Path) -> io::Result<VecDeque<OsString>> {
    let mut out = VecDeque::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => out.push_back(name.to_owned()),
            Component::ParentDir => out.push_back("..".into()),
            Component::CurDir => {}
            Component::RootDir | Component::Prefix(_) => return Err(outside(path)),
        }
    }
    Ok(out)
}

/// One component below a directory that we hold; a missing one becomes a directory.
fn enter(here: &OwnedFd, volume: &OwnedFd, name: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    match openat(here.as_fd(), name, flags, Mode::empty()) {
        Err(Errno::ENOENT) => {}
        opened => return Ok(opened?),
    }
    let mode = Mode::from_bits_truncate(fstat(volume)?.st_mode & 0o7777);
    match mkdirat(here.as_fd(), name, mode) {
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(errno) => return Err(errno.into()),
    }
    let made = openat(here.as_fd(), name, flags, Mode::empty())?;
    if is_dir(&made)? {
        // The umask took bits from it. O_PATH descriptors cannot be changed but by their magic
        // link, which leads to what we hold and nowhere else.
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&made));
        std::fs::set_permissions(
            path,
            std::os::unix::fs::PermissionsExt::from_mode(mode.bits()),
        )?;
    }
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn inode(fd: &OwnedFd) -> u64 {
        fstat(fd).unwrap().st_ino
    }

    #[test]
    fn links_inside_are_followed_and_links_out_refused() {
        let dir = tempfile::tempdir().unwrap();
        let v = dir.path().join("v");
        fs::create_dir_all(v.join("a/b")).unwrap();
        fs::write(v.join("a/file"), "x").unwrap();
        fs::write(dir.path().join("secret"), "x").unwrap();
        symlink("a", v.join("inside")).unwrap();
        symlink("../a/file", v.join("a/back")).unwrap();
        symlink("/etc", v.join("absolute")).unwrap();
        symlink("../secret", v.join("up")).unwrap();
        symlink("a/../../secret", v.join("up2")).unwrap();
        symlink("loop", v.join("loop")).unwrap();
        let file = fs::metadata(v.join("a/file")).unwrap().ino();
        for good in ["a/file", "inside/file", "a/back", "./a/./file"] {
            let fd = open_within(&v, Path::new(good)).unwrap();
            assert_eq!(inode(&fd), file, "{good}");
        }
        for bad in [
            "absolute",
            "up",
            "up2",
            "loop",
            "../secret",
            "/etc",
            "a/file/x",
            "inside/../..",
        ] {
            assert!(open_within(&v, Path::new(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn missing_directories_get_the_volumes_mode() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o2777)).unwrap();
        let fd = open_within(dir.path(), Path::new("x/y")).unwrap();
        assert!(is_dir(&fd).unwrap());
        let mode = fs::metadata(dir.path().join("x/y")).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o2777);
    }

    /// The attack: a directory is swapped with a link to the outside, again and again, while the
    /// path through it is opened. What is opened must never be the outside's.
    #[test]
    fn a_swapped_link_never_leads_out() {
        let dir = tempfile::tempdir().unwrap();
        let v = dir.path().join("v");
        fs::create_dir_all(v.join("d")).unwrap();
        fs::write(v.join("d/f"), "mine").unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        fs::write(dir.path().join("outside/f"), "theirs").unwrap();
        let theirs = fs::metadata(dir.path().join("outside/f")).unwrap().ino();
        symlink(dir.path().join("outside"), v.join("evil")).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let attacker = std::thread::spawn({
            let (v, stop) = (v.clone(), stop.clone());
            move || {
                let fd = open(&v, OFlag::O_DIRECTORY, Mode::empty()).unwrap();
                let flag = nix::fcntl::RenameFlags::RENAME_EXCHANGE;
                while !stop.load(Ordering::Relaxed) {
                    nix::fcntl::renameat2(&fd, "d", &fd, "evil", flag).unwrap();
                }
            }
        });
        let (mut opened, mut refused) = (0, 0);
        for _ in 0..20_000 {
            match open_within(&v, Path::new("d/f")) {
                Ok(fd) => {
                    assert_ne!(inode(&fd), theirs, "the attacker got out");
                    opened += 1;
                }
                Err(_) => refused += 1,
            }
        }
        stop.store(true, Ordering::Relaxed);
        attacker.join().unwrap();
        assert!(
            opened > 0 && refused > 0,
            "no race: {opened} opened, {refused} refused"
        );
    }
}
