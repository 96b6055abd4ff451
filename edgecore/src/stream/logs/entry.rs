//! The runtime's log format and its reading forwards (pure): bytes of a file in, the bytes asked
//! for out.
//!
//! ```text
//! file   = *( entry LF )
//! entry  = RFC3339Nano SP ("stdout" / "stderr") SP ("P" / "F") SP content
//! ```
//!
//! `P` entries are joined with what follows them on the same stream, up to its `F`. A content is
//! never held: however long a line is, it passes through. Only the head of an entry is gathered,
//! and what has none within [`MOST_HEAD`] bytes is skipped to its end of line.

use common::stream::request::LogStream;
use jiff::Timestamp;

/// A time with nanoseconds and an offset is 35 bytes long, a stream 6, tags a few.
pub(super) const MOST_HEAD: usize = 128;

/// Which of a container's streams an entry came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    Stdout,
    Stderr,
}

impl Source {
    pub(super) fn index(self) -> usize {
        match self {
            Source::Stdout => 0,
            Source::Stderr => 1,
        }
    }
}

/// Whether each stream is asked for, by [`Source::index`].
pub(super) fn wanted(stream: LogStream) -> [bool; 2] {
    match stream {
        LogStream::All => [true, true],
        LogStream::Stdout => [true, false],
        LogStream::Stderr => [false, true],
    }
}

/// What stands before an entry's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head<'a> {
    /// As the runtime wrote it.
    pub(super) time: &'a str,
    pub(super) at: Timestamp,
    pub(super) source: Source,
    /// The line goes on with the next entry of its stream.
    pub(super) partial: bool,
    /// Where the content begins.
    pub(super) len: usize,
}

/// An entry's beginning, as far as it is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Begun<'a> {
    Head(Head<'a>),
    /// More bytes are needed to tell.
    Unfinished,
    /// No runtime wrote this.
    Malformed,
}

/// Reads the head of an entry, which ends at the first line feed.
pub(super) fn head(bytes: &[u8]) -> Begun<'_> {
    let bytes = &bytes[..bytes.len().min(MOST_HEAD)];
    let line = bytes.split(|b| *b == b'\n').next().unwrap_or_default();
    let mut parts = line.splitn(4, |b| *b == b' ');
    let (time, source, tags) = (parts.next(), parts.next(), parts.next());
    let (Some(time), Some(source), Some(tags), Some(_)) = (time, source, tags, parts.next()) else {
        let over = line.len() < bytes.len() || bytes.len() == MOST_HEAD;
        return if over {
            Begun::Malformed
        } else {
            Begun::Unfinished
        };
    };
    parse(time, source, tags).map_or(Begun::Malformed, Begun::Head)
}

fn parse<'a>(time: &'a [u8], source: &[u8], tags: &[u8]) -> Option<Head<'a>> {
    let len = time.len() + source.len() + tags.len() + 3;
    let time = std::str::from_utf8(time).ok()?;
    // The first tag says it; more may follow behind colons.
    let partial = match tags.split(|b| *b == b':').next()? {
        b"P" => true,
        b"F" => false,
        _ => return None,
    };
    let source = match source {
        b"stdout" => Source::Stdout,
        b"stderr" => Source::Stderr,
        _ => return None,
    };
    Some(Head {
        time,
        at: time.parse().ok()?,
        source,
        partial,
        len,
    })
}

/// What is asked of the entries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) timestamps: bool,
    pub(super) since: Option<Timestamp>,
    /// Bytes.
    pub(super) limit: Option<u64>,
    pub(super) sources: [bool; 2],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// In an entry's head, gathered so far.
    Head,
    Content {
        write: bool,
        source: Source,
        partial: bool,
    },
    /// In what is no entry.
    Garbage,
}

/// Turns the bytes of log files into what was asked for.
#[derive(Debug)]
pub(super) struct Decoder {
    wanted: Wanted,
    state: State,
    head: Vec<u8>,
    /// Where in the file the next byte is, and the entry that it belongs to.
    at: u64,
    entry_at: u64,
    /// Entries of each stream before this are not wanted.
    starts: [u64; 2],
    /// What was written last of each stream ended within a line.
    within_line: [bool; 2],
    left: u64,
    garbage: u64,
}

impl Decoder {
    /// Takes bytes from the smaller of the wanted streams' starts on.
    pub(super) fn new(wanted: Wanted, starts: [u64; 2]) -> Self {
        let left = wanted.limit.unwrap_or(u64::MAX);
        let mut decoder = Self {
            wanted,
            state: State::Head,
            head: Vec::new(),
            at: 0,
            entry_at: 0,
            starts,
            within_line: [false; 2],
            left,
            garbage: 0,
        };
        decoder.at = decoder.start();
        decoder.entry_at = decoder.at;
        decoder
    }

    /// Where in the file to begin.
    pub(super) fn start(&self) -> u64 {
        let starts = self.starts.iter().zip(self.wanted.sources);
        let wanted = starts
            .filter(|(_, wanted)| *wanted)
            .map(|(start, _)| *start);
        wanted.min().unwrap_or(0)
    }

    /// Goes on with another file, or the same one from its beginning.
    pub(super) fn restart(&mut self) {
        self.state = State::Head;
        self.head.clear();
        (self.at, self.entry_at, self.starts) = (0, 0, [0; 2]);
    }

    /// As many bytes were written as were asked for.
    pub(super) fn full(&self) -> bool {
        self.left == 0
    }

    /// How many lines were no entries.
    pub(super) fn garbage(&self) -> u64 {
        self.garbage
    }

    /// Takes the file's next bytes. Writes at most as many as it takes, and for each entry 16 more:
    /// a time written in full.
    pub(super) fn feed(&mut self, mut bytes: &[u8], out: &mut Vec<u8>) {
        while !bytes.is_empty() && !self.full() {
            let taken = match self.state {
                State::Head => self.take_head(bytes, out),
                State::Content {
                    write,
                    source,
                    partial,
                } => self.take_content(bytes, out, write.then_some((source, partial))),
                State::Garbage => self.take_content(bytes, out, None),
            };
            self.at += taken as u64;
            bytes = &bytes[taken..];
        }
    }

    fn take_head(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> usize {
        let before = self.head.len();
        let taken = bytes.len().min(MOST_HEAD - before);
        self.head.extend_from_slice(&bytes[..taken]);
        // Taken out so that what it says can be acted on.
        let gathered = std::mem::take(&mut self.head);
        match head(&gathered) {
            Begun::Unfinished => {
                self.head = gathered;
                taken
            }
            Begun::Malformed => {
                // What was gathered may hold the end of the line.
                self.state = State::Garbage;
                self.garbage += u64::from(gathered.first() != Some(&b'\n'));
                gathered
                    .iter()
                    .position(|b| *b == b'\n')
                    .unwrap_or(gathered.len())
                    .saturating_sub(before)
            }
            Begun::Head(head) => {
                let write = self.wants(&head);
                if write && self.wanted.timestamps && !self.within_line[head.source.index()] {
                    let time = in_full(head.time);
                    self.write(time.as_bytes(), out);
                    self.write(b" ", out);
                }
                self.state = State::Content {
                    write,
                    source: head.source,
                    partial: head.partial,
                };
                head.len - before
            }
        }
    }

    fn wants(&self, head: &Head<'_>) -> bool {
        let source = head.source.index();
        self.wanted.sources[source]
            && self.entry_at >= self.starts[source]
            && self.wanted.since.is_none_or(|since| head.at >= since)
    }

    fn take_content(
        &mut self,
        bytes: &[u8],
        out: &mut Vec<u8>,
        write: Option<(Source, bool)>,
    ) -> usize {
        let end = bytes.iter().position(|b| *b == b'\n');
        let taken = end.map_or(bytes.len(), |at| at + 1);
        if let Some((source, partial)) = write {
            // The line feed after a part is the format's, not the container's.
            let text = end.map_or(taken, |at| at + usize::from(!partial));
            self.write(&bytes[..text], out);
            self.within_line[source.index()] = end.is_none() || partial;
        }
        if end.is_some() {
            self.state = State::Head;
            self.entry_at = self.at + taken as u64;
        }
        taken
    }

    fn write(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        let fits = usize::try_from(self.left).unwrap_or(usize::MAX);
        let bytes = &bytes[..bytes.len().min(fits)];
        out.extend_from_slice(bytes);
        self.left -= bytes.len() as u64;
    }
}

/// A time with all nine digits of its nanoseconds, as the kubelet writes it.
fn in_full(time: &str) -> String {
    let zone = time.find(['Z', 'z', '+']).or_else(|| time.rfind('-'));
    let (number, zone) = time.split_at(zone.unwrap_or(time.len()));
    let (seconds, nanos) = number.split_once('.').unwrap_or((number, ""));
    format!("{seconds}.{nanos:0<9}{zone}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn everything() -> Wanted {
        Wanted {
            timestamps: false,
            since: None,
            limit: None,
            sources: [true, true],
        }
    }

    fn decode(wanted: Wanted, file: &[u8], chunk: usize) -> String {
        let mut decoder = Decoder::new(wanted, [0, 0]);
        let mut out = Vec::new();
        for bytes in file.chunks(chunk) {
            decoder.feed(bytes, &mut out);
        }
        String::from_utf8(out).unwrap()
    }

    const FILE: &str = "2026-11-23T03:03:00.166994322Z stdout F one\n\
        2026-11-23T03:03:01.5Z stderr P tw\n\
        2026-11-23T03:03:01.6Z stdout F \n\
        2026-11-23T03:03:02+02:00 stderr F:x o\n";

    #[test]
    fn entries_become_lines_however_they_are_cut() {
        for chunk in [1, 2, 7, 50, 1000] {
            let all = decode(everything(), FILE.as_bytes(), chunk);
            assert_eq!(all, "one\ntw\no\n");
            let stderr = Wanted {
                sources: wanted(LogStream::Stderr),
                timestamps: true,
                ..everything()
            };
            let stderr = decode(stderr, FILE.as_bytes(), chunk);
            assert_eq!(stderr, "2026-11-23T03:03:01.500000000Z two\n");
        }
    }

    #[test]
    fn times_are_written_in_full() {
        for (short, full) in [
            ("2026-11-23T03:03:00Z", "2026-11-23T03:03:00.000000000Z"),
            ("2026-11-23T03:03:00.5Z", "2026-11-23T03:03:00.500000000Z"),
            (
                "2026-11-23T03:03:00.123456789-07:00",
                "2026-11-23T03:03:00.123456789-07:00",
            ),
            (
                "2026-11-23T03:03:00.1+02:00",
                "2026-11-23T03:03:00.100000000+02:00",
            ),
        ] {
            assert_eq!(in_full(short), full);
        }
    }

    #[test]
    fn a_limit_is_exact_and_counts_times() {
        for limit in 1..60_u64 {
            let wanted = Wanted {
                timestamps: true,
                limit: Some(limit),
                ..everything()
            };
            let whole = decode(
                Wanted {
                    limit: None,
                    ..wanted.clone()
                },
                FILE.as_bytes(),
                9,
            );
            let cut = decode(wanted, FILE.as_bytes(), 9);
            assert_eq!(cut, whole[..limit as usize]);
        }
    }

    #[test]
    fn garbage_is_skipped_and_counted() {
        let long = "x".repeat(1000);
        let file = format!(
            "\nnonsense\n{long}\n2026-11-23T03:03:00Z stdout Q no\n2026-11-23T03:03:00Z stdout\n\
             yesterday stdout F no\n2026-11-23T03:03:00Z stdout F yes\n\0\u{fe}\n"
        );
        for chunk in [1, 5, 127, 128, 129, 5000] {
            let mut decoder = Decoder::new(everything(), [0, 0]);
            let mut out = Vec::new();
            for bytes in file.as_bytes().chunks(chunk) {
                decoder.feed(bytes, &mut out);
            }
            assert_eq!(out, b"yes\n", "{chunk}");
            assert_eq!(decoder.garbage(), 6, "{chunk}");
        }
    }

    #[test]
    fn a_line_of_any_length_passes_through() {
        let long = "y".repeat(3 << 20);
        let file = format!("2026-11-23T03:03:00Z stdout F {long}\n");
        let mut decoder = Decoder::new(everything(), [0, 0]);
        let mut length = 0;
        for bytes in file.as_bytes().chunks(16 << 10) {
            let mut out = Vec::new();
            decoder.feed(bytes, &mut out);
            assert!(out.len() <= 16 << 10);
            length += out.len();
        }
        assert_eq!(length, long.len() + 1);
    }
}
