//! What a directory tree holds on its disk, as `du` counts it.

use std::io;
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, fstat, open, openat, statat};
use rustix::io::Errno;
use tokio_util::sync::CancellationToken;

/// Each level is a descriptor that is open. Whoever goes deeper hides what cannot be counted.
pub(super) const DEPTH: usize = 128;

/// The kernel's unit in `st_blocks`.
const BLOCK: u64 = 512;

/// Why there is no count.
#[derive(Debug, thiserror::Error)]
pub(super) enum Uncounted {
    #[error("directories are nested deeper than {DEPTH}")]
    Deep,
    #[error("it is not wanted any more")]
    Stopped,
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<Errno> for Uncounted {
    fn from(error: Errno) -> Self {
        Self::Io(error.into())
    }
}

/// Bytes of all that is in `root` on its own file system; nothing where there is no `root`.
/// Containers may change it meanwhile: no link is followed, and what vanished is not counted.
pub(super) fn bytes(root: &Path, stop: &CancellationToken) -> Result<u64, Uncounted> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = match open(root, flags, Mode::empty()) {
        Ok(root) => root,
        Err(Errno::NOENT) => return Ok(0),
        Err(error) => return Err(error.into()),
    };
    let device = fstat(&root)?.st_dev;
    let mut above = vec![Dir::new(root)?];
    let mut sum = 0_u64;
    loop {
        if stop.is_cancelled() {
            return Err(Uncounted::Stopped);
        }
        let depth = above.len();
        let Some(here) = above.last_mut() else {
            return Ok(sum);
        };
        let Some(entry) = here.read() else {
            above.pop();
            continue;
        };
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let directory = here.fd()?;
        let meta = match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(meta) if meta.st_dev == device => meta,
            Ok(_) | Err(Errno::NOENT) => continue,
            Err(error) => return Err(error.into()),
        };
        let own = u64::try_from(meta.st_blocks).unwrap_or(0) * BLOCK;
        if FileType::from_raw_mode(meta.st_mode) != FileType::Directory {
            // A file of several names is met once for each of them.
            #[allow(clippy::useless_conversion, reason = "32 bits on other architectures")]
            let names = u64::from(meta.st_nlink.max(1));
            sum = sum.saturating_add(own / names);
            continue;
        }
        sum = sum.saturating_add(own);
        if depth == DEPTH {
            return Err(Uncounted::Deep);
        }
        match openat(directory, name, flags, Mode::empty()) {
            Ok(below) => above.push(Dir::new(below)?),
            // Gone, or another thing by now.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn a_tree_is_counted_once_and_no_link_leads_out_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, outside) = (dir.path().join("tree"), dir.path().join("outside"));
        fs::create_dir_all(tree.join("a/b")).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("big"), vec![1; 8 * MIB]).unwrap();
        let go_on = CancellationToken::new();
        let before = bytes(&tree, &go_on).unwrap();
        fs::write(tree.join("a/b/file"), vec![1; MIB]).unwrap();
        fs::hard_link(tree.join("a/b/file"), tree.join("second")).unwrap();
        symlink(&outside, tree.join("link")).unwrap();
        symlink(outside.join("big"), tree.join("a/link")).unwrap();
        // Long, and nothing on the disk.
        let sparse = fs::File::create(tree.join("sparse")).unwrap();
        sparse.set_len(1 << 30).unwrap();
        let grown = bytes(&tree, &go_on).unwrap() - before;
        let least = MIB as u64;
        assert!((least..least + 64 * 1024).contains(&grown), "{grown}");
    }

    #[test]
    fn what_cannot_be_counted_is_said_and_nothing_is_made_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let go_on = CancellationToken::new();
        assert_eq!(bytes(&dir.path().join("none"), &go_on).unwrap(), 0);
        let mut deep = dir.path().to_owned();
        deep.extend(std::iter::repeat_n("d", DEPTH - 1));
        fs::create_dir_all(&deep).unwrap();
        assert!(bytes(dir.path(), &go_on).is_ok());
        fs::create_dir(deep.join("d")).unwrap();
        let found = bytes(dir.path(), &go_on);
        assert!(matches!(found, Err(Uncounted::Deep)), "{found:?}");
        go_on.cancel();
        let found = bytes(dir.path(), &go_on);
        assert!(matches!(found, Err(Uncounted::Stopped)), "{found:?}");
    }
}
