//! A container's last words: the file it may write them to, and what is read from it.

use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The most that is read of the file (`terminationMessagePath`), from its end.
const MAX_MESSAGE: u64 = 4096;
/// The most of a log that stands in for it: lines and bytes, whichever is less.
const MAX_LOG_LINES: usize = 80;
const MAX_LOG_MESSAGE: usize = 2048;
/// What is read of a log to find them: lines carry a time and a tag, and may be long.
const MAX_LOG_READ: u64 = 64 * 1024;

/// The file of one attempt below a container's directory.
pub(super) fn file(dir: &Path, attempt: u32) -> PathBuf {
    dir.join(attempt.to_string())
}

/// Makes the file, writable by any user; removes those of attempts before the last.
pub(super) fn prepare(dir: &Path, attempt: u32) -> io::Result<PathBuf> {
    fs::create_dir_all(dir)?;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let number = entry
            .file_name()
            .to_str()
            .and_then(|n| n.parse::<u32>().ok());
        if number.is_some_and(|n| n.saturating_add(1) < attempt) {
            fs::remove_file(entry.path())?;
        }
    }
    let path = file(dir, attempt);
    let mut options = fs::OpenOptions::new();
    options
        .create(true)
        .append(true)
        .custom_flags(nix::libc::O_NOFOLLOW)
        .open(&path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666))?;
    Ok(path)
}

/// The end of the file; empty if there is none.
pub(super) fn message(path: &Path) -> String {
    let bytes = tail(path, MAX_MESSAGE).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The last lines of a container's log (the CRI format), without times and tags.
pub(super) fn log_tail(path: &Path) -> String {
    let bytes = tail(path, MAX_LOG_READ).unwrap_or_default();
    log_message(&String::from_utf8_lossy(&bytes))
}

/// `TIME STREAM TAG TEXT`; a tag `P` says that the line goes on in the next record.
fn log_message(records: &str) -> String {
    let mut text = String::new();
    for record in records.lines() {
        let mut fields = record.splitn(4, ' ');
        let (time, stream, tag) = (fields.next(), fields.next(), fields.next());
        let whole = time.is_some() && matches!(stream, Some("stdout" | "stderr"));
        // The first record may be cut.
        let (true, Some(tag)) = (whole, tag) else {
            continue;
        };
        text.push_str(fields.next().unwrap_or_default());
        if !tag.starts_with('P') {
            text.push('\n');
        }
    }
    let lines: Vec<_> = text.split_inclusive('\n').collect();
    let last = lines.len().saturating_sub(MAX_LOG_LINES);
    let text = lines[last..].concat();
    let mut from = text.len().saturating_sub(MAX_LOG_MESSAGE);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    text[from..].to_owned()
}

/// The last bytes of a file, at most `max`.
fn tail(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    let flags = nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK;
    let mut file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)?;
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(max)))?;
    let mut bytes = Vec::new();
    file.take(max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn the_file_is_anybodys_to_write_and_only_two_attempts_stay() {
        let dir = tempfile::tempdir().unwrap();
        for attempt in 0..4 {
            let path = prepare(dir.path(), attempt).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o666);
            fs::write(path, attempt.to_string()).unwrap();
        }
        let said = |n| message(&file(dir.path(), n));
        assert_eq!([said(0), said(1), said(2), said(3)], ["", "", "2", "3"]);
        // The same attempt again keeps what was said.
        prepare(dir.path(), 3).unwrap();
        assert_eq!(said(3), "3");
    }

    #[test]
    fn a_long_message_is_read_from_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m");
        fs::write(&path, format!("{}END", "x".repeat(9000))).unwrap();
        let said = message(&path);
        assert_eq!(said.len(), 4096);
        assert!(said.ends_with("xEND"));
    }

    #[test]
    fn a_log_gives_its_last_lines_without_times() {
        let t = "2026-11-23T03:03:00.166994322Z";
        let log = format!(
            "cut off\n{t} stdout F one\n{t} stderr P two \n{t} stderr F halves\n{t} stdout F \n"
        );
        assert_eq!(log_message(&log), "one\ntwo halves\n\n");
        let many: String = (0..200).map(|n| format!("{t} stdout F {n}\n")).collect();
        let said = log_message(&many);
        assert_eq!(said.lines().count(), 80);
        assert!(said.starts_with("120\n"));
        let long = format!("{t} stdout F {}\n", "é".repeat(3000));
        assert!(log_message(&long).len() <= 2048);
    }
}
