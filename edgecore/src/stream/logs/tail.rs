//! Where the last lines of a log begin: a scan from its end, block by block.
//!
//! Two streams share the file, and a line of one may have its parts on both sides of lines of the
//! other. So each stream gets a start of its own, and entries before it do not count.

use std::io;
use std::os::unix::fs::FileExt;

use super::entry::{self, Begun, MOST_HEAD};

/// Read at a time.
const BLOCK: u64 = 16 << 10;

/// What to look for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tail {
    /// `None` for all.
    pub(super) lines: Option<u64>,
    pub(super) sources: [bool; 2],
    /// An entry whose end is not written yet will be read again when it is: it is none of the last.
    pub(super) follow: bool,
}

/// For each stream the offset from which on its entries are among the last lines of the `len` bytes.
pub(super) fn starts(file: &impl FileExt, len: u64, tail: Tail) -> io::Result<[u64; 2]> {
    match tail.lines {
        None => Ok([0; 2]),
        Some(lines) => starts_in_blocks(file, len, lines, tail, BLOCK),
    }
}

fn starts_in_blocks(
    file: &impl FileExt,
    len: u64,
    lines: u64,
    tail: Tail,
    block: u64,
) -> io::Result<[u64; 2]> {
    let mut scan = Scan::new(lines, tail.sources, len);
    let mut end = len;
    // The first bytes of the entry that begins before `end`.
    let mut carry = Vec::new();
    let mut buffer = Vec::new();
    let mut unended = true;
    while end > 0 {
        let begin = end.saturating_sub(block);
        buffer.resize(usize::try_from(end - begin).unwrap_or(0), 0);
        file.read_exact_at(&mut buffer, begin)?;
        let mut right = buffer.len();
        while let Some(feed) = buffer[..right].iter().rposition(|b| *b == b'\n') {
            let at = begin + feed as u64 + 1;
            let head = beginning(&buffer[feed + 1..right], &carry);
            carry.clear();
            if scan.step(at, &head, unended && tail.follow) {
                return Ok(scan.starts);
            }
            unended = false;
            right = feed;
        }
        carry = beginning(&buffer[..right], &carry);
        end = begin;
    }
    scan.step(0, &carry, unended && tail.follow);
    Ok(scan
        .starts
        .map(|start| if start == OPEN { 0 } else { start }))
}

fn beginning(bytes: &[u8], more: &[u8]) -> Vec<u8> {
    bytes.iter().chain(more).take(MOST_HEAD).copied().collect()
}

/// A stream whose start is not found yet.
const OPEN: u64 = u64::MAX;

struct Scan {
    lines: u64,
    counted: u64,
    starts: [u64; 2],
    /// An entry of the stream is among the last lines.
    seen: [bool; 2],
    /// Where the entry behind the next one begins.
    behind: u64,
}

impl Scan {
    fn new(lines: u64, sources: [bool; 2], len: u64) -> Self {
        Self {
            lines,
            counted: 0,
            starts: sources.map(|wanted| if wanted { OPEN } else { len }),
            seen: [false; 2],
            behind: len,
        }
    }

    /// Takes the entry before the last one that was taken; true when all is known.
    fn step(&mut self, at: u64, head: &[u8], unended: bool) -> bool {
        if unended {
            self.behind = at;
        } else if let Begun::Head(head) = entry::head(head) {
            self.count(head.source.index(), head.partial);
        }
        self.behind = at;
        if self.counted == self.lines {
            // What was not seen yet is all before this.
            for (start, seen) in self.starts.iter_mut().zip(self.seen) {
                if *start == OPEN && !seen {
                    *start = at;
                }
            }
        }
        self.starts.iter().all(|start| *start != OPEN)
    }

    fn count(&mut self, source: usize, partial: bool) {
        if self.starts[source] != OPEN {
            return;
        }
        // A part with nothing behind it is a line that goes on.
        let ends_a_line = !partial || !self.seen[source];
        if ends_a_line && self.counted == self.lines {
            self.starts[source] = self.behind;
            return;
        }
        self.seen[source] = true;
        self.counted += u64::from(ends_a_line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: &str = "2026-11-23T03:03:00Z";

    fn tail(lines: u64, follow: bool) -> Tail {
        Tail {
            lines: Some(lines),
            sources: [true, true],
            follow,
        }
    }

    fn found(text: &str, tail: Tail, block: u64) -> [u64; 2] {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
        let lines = tail.lines.unwrap();
        starts_in_blocks(&file, text.len() as u64, lines, tail, block).unwrap()
    }

    #[test]
    fn the_last_lines_begin_at_the_same_place_whatever_the_blocks() {
        let entries: Vec<_> = (0..40)
            .map(|n| format!("{T} stdout F line {n:02}\n"))
            .collect();
        let text = entries.concat();
        let entry = entries[0].len();
        for block in 1..200 {
            for lines in [0, 1, 2, 39, 40, 41] {
                let first = entries.len().saturating_sub(lines as usize);
                let want = (first * entry) as u64;
                assert_eq!(
                    found(&text, tail(lines, false), block),
                    [want; 2],
                    "{block}"
                );
            }
        }
    }

    #[test]
    fn parts_belong_to_their_line_across_the_other_stream() {
        let parts = [
            format!("{T} stdout F old\n"),
            format!("{T} stdout P a\n"),
            format!("{T} stderr F between\n"),
            format!("{T} stdout F b\n"),
        ];
        let text = parts.concat();
        let at = |n: usize| parts[..n].iter().map(String::len).sum::<usize>() as u64;
        // The line "ab", and not the one that ended between its parts.
        assert_eq!(found(&text, tail(1, false), 7), [at(1), at(3)]);
        // Parts of the line on stderr may be anywhere before it.
        assert_eq!(found(&text, tail(2, false), 7), [at(1), 0]);
        assert_eq!(found(&text, tail(3, false), 7), [0, 0]);
    }

    #[test]
    fn a_follower_begins_where_an_entry_does() {
        let whole = format!("{T} stdout F whole\n");
        let text = format!("{whole}{T} stdout F ha");
        let begun = whole.len() as u64;
        assert_eq!(found(&text, tail(0, true), 5), [begun; 2]);
        assert_eq!(found(&text, tail(1, true), 5), [0; 2]);
        assert_eq!(found(&text, tail(1, false), 5), [begun; 2]);
        let end = text.len() as u64;
        assert_eq!(found(&text, tail(0, false), 5), [end, begun]);
    }
}
