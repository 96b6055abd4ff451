//! What a directory tree holds on its disk, as `du` counts it.

use std::io;
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, fstat, open, openat, statat};

/// What lies deeper is not counted: each level is a descriptor that is open.
const DEPTH: usize = 64;

/// The kernel's unit in `st_blocks`.
const BLOCK: u64 = 512;

/// Bytes of all that is in `root` on its own file system. Containers may change it meanwhile: no
/// link is followed, and what vanished is not counted.
pub(super) fn bytes(root: &Path) -> io::Result<u64> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = open(root, flags, Mode::empty())?;
    let device = fstat(&root)?.st_dev;
    let mut above = vec![Dir::new(root)?];
    let mut sum = 0_u64;
    loop {
        let depth = above.len();
        let Some(here) = above.last_mut() else {
            return Ok(sum);
        };
        let Some(Ok(entry)) = here.read() else {
            above.pop();
            continue;
        };
        let name = entry.file_name();
        let directory = here.fd()?;
        if name == c"." || name == c".." {
            continue;
        }
        let Ok(meta) = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) else {
            continue;
        };
        if meta.st_dev != device {
            continue;
        }
        let is_dir = FileType::from_raw_mode(meta.st_mode) == FileType::Directory;
        let own = u64::try_from(meta.st_blocks).unwrap_or(0) * BLOCK;
        // A file of several names is met once for each of them.
        #[allow(clippy::useless_conversion, reason = "32 bits on other architectures")]
        let names = u64::from(meta.st_nlink.max(1));
        let names = if is_dir { 1 } else { names };
        sum = sum.saturating_add(own / names);
        if is_dir
            && depth < DEPTH
            && let Ok(below) = openat(directory, name, flags, Mode::empty())
        {
            above.push(Dir::new(below)?);
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
        let before = bytes(&tree).unwrap();
        fs::write(tree.join("a/b/file"), vec![1; MIB]).unwrap();
        fs::hard_link(tree.join("a/b/file"), tree.join("second")).unwrap();
        symlink(&outside, tree.join("link")).unwrap();
        symlink(outside.join("big"), tree.join("a/link")).unwrap();
        // Long, and nothing on the disk.
        let sparse = fs::File::create(tree.join("sparse")).unwrap();
        sparse.set_len(1 << 30).unwrap();
        let grown = bytes(&tree).unwrap() - before;
        let least = MIB as u64;
        assert!((least..least + 64 * 1024).contains(&grown), "{grown}");
    }

    #[test]
    fn depth_has_an_end() {
        let dir = tempfile::tempdir().unwrap();
        let mut deep = dir.path().to_owned();
        for _ in 0..2 * DEPTH {
            deep.push("d");
        }
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("file"), vec![1; MIB]).unwrap();
        assert!(bytes(dir.path()).unwrap() < MIB as u64);
    }
}
