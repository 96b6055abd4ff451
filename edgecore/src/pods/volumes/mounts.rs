//! Mount points below a Pod's directory (adapter over mount(2) and /proc/self/mountinfo).
//!
//! Owns making and finding them. Never follows a symbolic link at a mount target.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Mounts a tmpfs for an emptyDir of `size` bytes, sticky as the kernel makes them.
pub(super) fn memory(target: &Path, size: u64) -> io::Result<()> {
    tmpfs(target, MsFlags::empty(), &format!("mode=1777,size={size}"))
}

/// Mounts a tmpfs for files of the API, among them Secrets: never swapped out to a disk where the
/// kernel can promise that (6.4 and newer).
pub(super) fn files(target: &Path) -> io::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    tmpfs(target, flags, "mode=0777,noswap").or_else(|_| tmpfs(target, flags, "mode=0777"))
}

fn tmpfs(target: &Path, flags: MsFlags, options: &str) -> io::Result<()> {
    mount(Some("tmpfs"), target, Some("tmpfs"), flags, Some(options))?;
    Ok(())
}

/// Binds what the descriptor stands for, whatever its path has become meanwhile.
pub(super) fn bind(source: BorrowedFd<'_>, target: &Path) -> io::Result<()> {
    let source = format!("/proc/self/fd/{}", source.as_raw_fd());
    let none = None::<&str>;
    mount(Some(source.as_str()), target, none, MsFlags::MS_BIND, none)?;
    Ok(())
}

/// Whether something is mounted exactly there.
pub(super) fn is_mounted(target: &Path) -> io::Result<bool> {
    Ok(below(target)?.iter().any(|p| p == target))
}

/// Unmounts all that is mounted at and below the directory, the deepest first. What a process
/// still uses is detached: it goes when the process goes.
pub(super) fn unmount_all(dir: &Path) -> io::Result<()> {
    let mut points = below(dir)?;
    // The newest last in mountinfo: a mount over another goes first.
    points.reverse();
    points.sort_by_key(|p| std::cmp::Reverse(p.components().count()));
    for point in &points {
        match umount2(point, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH) {
            Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    match below(dir)?.as_slice() {
        [] => Ok(()),
        [left, ..] => Err(io::Error::other(format!(
            "{} is still mounted",
            left.display()
        ))),
    }
}

/// The mount points at and below a directory, in the order in which they were made.
fn below(dir: &Path) -> io::Result<Vec<PathBuf>> {
    Ok(points(&fs::read("/proc/self/mountinfo")?, dir))
}

/// The fifth field of each mountinfo line that is at or below `dir` (proc_pid_mountinfo(5)).
fn points(mountinfo: &[u8], dir: &Path) -> Vec<PathBuf> {
    let lines = mountinfo.split(|b| *b == b'\n');
    let fields = lines.filter_map(|l| l.split(|b| *b == b' ').nth(4));
    let paths = fields.map(|f| PathBuf::from(unescape(f)));
    paths.filter(|p| p.starts_with(dir)).collect()
}

/// mountinfo writes space, tab, newline and backslash as `\` and three octal digits.
fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&b, after)) = rest.split_first() {
        let digits = after
            .get(..3)
            .filter(|d| d.iter().all(|c| (b'0'..b'8').contains(c)));
        match digits {
            Some([a, m, z]) if b == b'\\' => {
                // Three octal digits reach 511; the kernel writes at most 255.
                out.push((a - b'0').wrapping_mul(64) | (m - b'0') << 3 | (z - b'0'));
                rest = &after[3..];
            }
            _ => {
                out.push(b);
                rest = after;
            }
        }
    }
    OsString::from_vec(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_below_a_directory_are_found_with_their_escapes() {
        let info = b"22 1 0:20 / /sys rw - sysfs sysfs rw\n\
            30 1 0:31 / /r/pods/u/v\\040w rw shared:1 - tmpfs tmpfs rw\n\
            31 1 0:32 / /r/pods/u2 rw - tmpfs tmpfs rw\n\
            32 1 0:33 /x /r/pods/u rw - ext4 /dev/vda rw\n";
        assert_eq!(
            points(info, Path::new("/r/pods/u")),
            [PathBuf::from("/r/pods/u/v w"), PathBuf::from("/r/pods/u")]
        );
    }
}
