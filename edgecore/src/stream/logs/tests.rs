//! Whole reads of real files, beside a naive reading of the same bytes.

use std::fs;
use std::io::Write as _;

use common::stream::request::LogStream;
use futures::StreamExt as _;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::*;

struct Container {
    dir: tempfile::TempDir,
    log: Log,
}

impl Container {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let log = Log {
            dir: dir.path().to_owned(),
            attempt: 0,
        };
        Self { dir, log }
    }

    fn with(text: impl AsRef<[u8]>) -> Self {
        let container = Self::new();
        fs::write(container.log.path(), text).unwrap();
        container
    }

    fn append(&self, name: &str, text: &str) {
        let path = self.dir.path().join(name);
        let file = fs::OpenOptions::new().create(true).append(true).open(path);
        file.unwrap().write_all(text.as_bytes()).unwrap();
    }

    async fn all(&self, options: &LogOptions) -> Vec<u8> {
        let part = Part::new(options, Timestamp::now()).unwrap();
        let stream = read(&self.log, part, std::future::pending()).await.unwrap();
        let chunks: Vec<_> = stream.map(Result::unwrap).collect().await;
        assert!(chunks.iter().all(|chunk| chunk.len() <= 16 << 10));
        chunks.concat()
    }

    /// Follows in a task of its own: what is read, and how to end the container.
    async fn followed(&self, options: LogOptions) -> Follower {
        let part = Part::new(&options, Timestamp::now()).unwrap();
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let ended = async {
            let _ = ended.await;
        };
        let stream = read(&self.log, part, ended).await.unwrap();
        let (sender, bytes) = mpsc::channel(1);
        tokio::spawn(async move {
            let mut stream = Box::pin(stream);
            while let Some(chunk) = stream.next().await {
                if sender.send(chunk.unwrap()).await.is_err() {
                    return;
                }
            }
        });
        Follower { bytes, end }
    }
}

struct Follower {
    bytes: mpsc::Receiver<Bytes>,
    end: tokio::sync::oneshot::Sender<()>,
}

impl Follower {
    /// Reads until exactly this has come.
    async fn reads(&mut self, want: &str) {
        let mut got = String::new();
        while got.len() < want.len() {
            let more = timeout(Duration::from_secs(10), self.bytes.recv()).await;
            let more = more.unwrap_or_else(|_| panic!("only {got:?} came"));
            got += std::str::from_utf8(&more.expect("the log goes on")).unwrap();
        }
        assert_eq!(got, want);
    }

    async fn ends(mut self) {
        let _ = self.end.send(());
        let over = timeout(Duration::from_secs(10), self.bytes.recv()).await;
        assert_eq!(over.expect("a log ends with its container"), None);
    }
}

fn line(stream: &str, tag: &str, text: &str) -> String {
    format!("2026-11-23T03:03:00.1Z {stream} {tag} {text}\n")
}

fn out(text: &str) -> String {
    line("stdout", "F", text)
}

fn follow() -> LogOptions {
    LogOptions {
        follow: true,
        ..LogOptions::default()
    }
}

#[tokio::test]
async fn a_follower_reads_what_comes_until_the_container_ends() {
    let container = Container::with(out("one"));
    let mut follower = container.followed(follow()).await;
    follower.reads("one\n").await;
    container.append("0.log", &out("two"));
    follower.reads("two\n").await;
    // An entry in pieces, and a line in parts.
    let entry = line("stdout", "P", "thr");
    let (first, second) = entry.split_at(30);
    container.append("0.log", first);
    container.append("0.log", second);
    follower.reads("thr").await;
    container.append("0.log", &out("ee"));
    follower.reads("ee\n").await;
    container.append("0.log", &out("last"));
    follower.reads("last\n").await;
    follower.ends().await;
}

#[tokio::test]
async fn a_line_is_there_a_tenth_of_a_second_after_it_was_written() {
    let container = Container::with(out("one"));
    let mut follower = container.followed(follow()).await;
    follower.reads("one\n").await;
    let mut quickest = Duration::MAX;
    for _ in 0..5 {
        let began = std::time::Instant::now();
        container.append("0.log", &out("two"));
        follower.reads("two\n").await;
        quickest = quickest.min(began.elapsed());
    }
    assert!(quickest < Duration::from_millis(100), "{quickest:?}");
}

#[tokio::test]
async fn what_was_written_before_the_end_is_read_after_it() {
    let container = Container::with("");
    let follower = container.followed(follow()).await;
    let Follower { mut bytes, end } = follower;
    container.append("0.log", &out("last words"));
    end.send(()).unwrap();
    let mut got = Vec::new();
    while let Some(more) = timeout(Duration::from_secs(10), bytes.recv())
        .await
        .unwrap()
    {
        got.extend_from_slice(&more);
    }
    assert_eq!(got, b"last words\n");
}

#[tokio::test]
async fn a_follower_crosses_rotations_and_loses_nothing() {
    let container = Container::with(out("one"));
    let path = |name: &str| container.dir.path().join(name);
    let mut follower = container.followed(follow()).await;
    follower.reads("one\n").await;
    for round in 0..3 {
        let old = format!("0.log.{round}");
        fs::rename(path("0.log"), path(&old)).unwrap();
        // The runtime has not heard of it yet.
        container.append(&old, &out("renamed"));
        follower.reads("renamed\n").await;
        container.append("0.log", "");
        container.append(&old, &out("late"));
        follower.reads("late\n").await;
        container.append(&old, &line("stdout", "P", "ha"));
        container.append("0.log", &out("lf"));
        follower.reads("half\n").await;
    }
    follower.ends().await;
}

#[tokio::test]
async fn a_container_that_ends_in_a_rotation_is_read_to_its_end() {
    let container = Container::with(out("one"));
    let path = |name: &str| container.dir.path().join(name);
    let mut follower = container.followed(follow()).await;
    follower.reads("one\n").await;
    fs::rename(path("0.log"), path("0.log.x")).unwrap();
    container.append("0.log", "");
    follower.ends().await;
}

#[tokio::test]
async fn a_log_that_is_being_renamed_is_waited_for() {
    let container = Container::new();
    let options = LogOptions::default();
    let reading = container.all(&options);
    let writing = async {
        tokio::time::sleep(Duration::from_millis(80)).await;
        fs::write(container.dir.path().join("x"), out("here")).unwrap();
        fs::rename(container.dir.path().join("x"), container.log.path()).unwrap();
    };
    assert_eq!(tokio::join!(reading, writing).0, b"here\n");
    let never = Container::new();
    let part = Part::new(&LogOptions::default(), Timestamp::now()).unwrap();
    let error = read(&never.log, part, std::future::pending()).await.err();
    assert_eq!(error.unwrap().kind(), io::ErrorKind::NotFound);
}

#[tokio::test]
async fn a_log_that_was_emptied_is_read_from_its_beginning() {
    let container = Container::with(out("a long first line"));
    let mut follower = container.followed(follow()).await;
    follower.reads("a long first line\n").await;
    fs::write(container.log.path(), "").unwrap();
    // Until it was seen to be empty, its length may be the old one again.
    tokio::time::sleep(Duration::from_millis(50)).await;
    container.append("0.log", &out("new"));
    follower.reads("new\n").await;
    follower.ends().await;
}

#[tokio::test]
async fn a_follower_of_the_last_lines_goes_on_with_new_ones_up_to_its_limit() {
    let container = Container::with([out("one"), out("two")].concat());
    let options = LogOptions {
        tail: Some(1),
        limit: Some(8),
        ..follow()
    };
    let mut follower = container.followed(options).await;
    follower.reads("two\n").await;
    container.append("0.log", &out("three"));
    follower.reads("thre").await;
    let over = timeout(Duration::from_secs(10), follower.bytes.recv()).await;
    assert_eq!(over.unwrap(), None);
}

#[test]
fn a_time_that_is_none_is_refused() {
    let options = LogOptions {
        since: Some(Since::Time("yesterday".into())),
        ..LogOptions::default()
    };
    let error = Part::new(&options, Timestamp::now()).unwrap_err();
    assert!(error.to_string().contains("yesterday"));
    let options = LogOptions {
        since: Some(Since::Seconds(u64::MAX)),
        ..LogOptions::default()
    };
    let part = Part::new(&options, Timestamp::now()).unwrap();
    assert_eq!(part.wanted.since, Some(Timestamp::MIN));
}

/// An entry as the tests made it.
#[derive(Debug, Clone)]
struct Made {
    second: i64,
    stderr: bool,
    partial: bool,
    text: String,
}

impl Made {
    fn time(&self) -> Timestamp {
        Timestamp::from_second(self.second).unwrap()
    }

    fn entry(&self) -> String {
        let stream = if self.stderr { "stderr" } else { "stdout" };
        let tag = if self.partial { "P" } else { "F" };
        format!("{} {stream} {tag} {}\n", self.time(), self.text)
    }
}

/// What was asked for, from the whole list at once.
fn naively(made: &[Made], options: &LogOptions) -> Vec<u8> {
    let wanted = |m: &Made| match options.stream {
        LogStream::All => true,
        LogStream::Stdout => !m.stderr,
        LogStream::Stderr => m.stderr,
    };
    let made: Vec<_> = made.iter().filter(|m| wanted(m)).collect();
    // The number of each entry's line, counted by where lines end.
    let mut lines = vec![0; made.len()];
    let mut ends = 0_usize;
    for at in 0..made.len() {
        let goes_on = |later: &&Made| later.stderr == made[at].stderr;
        if !made[at].partial || !made[at + 1..].iter().copied().any(|l| goes_on(&l)) {
            ends += 1;
            for before in (0..=at).rev() {
                if made[before].stderr == made[at].stderr && lines[before] == 0 {
                    lines[before] = ends;
                }
            }
        }
    }
    let first = options
        .tail
        .map_or(0, |tail| ends.saturating_sub(tail as usize));
    let since = match &options.since {
        Some(Since::Time(text)) => text.parse().unwrap(),
        _ => Timestamp::MIN,
    };
    let mut text = String::new();
    let mut within = [false; 2];
    for (m, line) in made.iter().zip(lines) {
        if line <= first || m.time() < since {
            continue;
        }
        let stream = usize::from(m.stderr);
        if options.timestamps && !within[stream] {
            text += &m
                .time()
                .strftime("%Y-%m-%dT%H:%M:%S.000000000Z ")
                .to_string();
        }
        text += &m.text;
        if !m.partial {
            text.push('\n');
        }
        within[stream] = m.partial;
    }
    text.truncate(
        options
            .limit
            .map_or(text.len(), |l| text.len().min(l as usize)),
    );
    text.into_bytes()
}

fn some_entries(random: &mut StdRng) -> Vec<Made> {
    let count = random.random_range(0..60);
    let long = random.random_bool(0.2);
    (0..count)
        .map(|n| Made {
            second: 1_800_000_000 + n,
            stderr: random.random_bool(0.3),
            partial: random.random_bool(0.3),
            text: {
                let most = if long { 9000 } else { 40 };
                let length = random.random_range(0..most);
                (0..length)
                    .map(|_| random.random_range('a'..='z'))
                    .collect()
            },
        })
        .collect()
}

fn some_options(random: &mut StdRng, made: &[Made]) -> LogOptions {
    let streams = [LogStream::All, LogStream::Stdout, LogStream::Stderr];
    let since = random.random_range(0..=made.len() as i64);
    let since = Timestamp::from_second(1_800_000_000 + since).unwrap();
    LogOptions {
        timestamps: random.random(),
        since: random
            .random_bool(0.3)
            .then(|| Since::Time(since.to_string())),
        tail: random.random_bool(0.6).then(|| random.random_range(0..70)),
        limit: random
            .random_bool(0.3)
            .then(|| random.random_range(1..3000)),
        stream: streams[random.random_range(0..3)],
        ..LogOptions::default()
    }
}

#[tokio::test]
async fn any_part_of_any_log_is_what_a_naive_reading_gives() {
    for seed in 0..400 {
        let mut random = StdRng::seed_from_u64(seed);
        let made = some_entries(&mut random);
        let text: String = made
            .iter()
            .map(|m| {
                let garbage = if random.random_bool(0.05) {
                    "garbage\n"
                } else {
                    ""
                };
                format!("{}{garbage}", m.entry())
            })
            .collect();
        let container = Container::with(&text);
        for _ in 0..4 {
            let options = some_options(&mut random, &made);
            let got = container.all(&options).await;
            let want = naively(&made, &options);
            assert!(
                got == want,
                "seed {seed}: {options:?}\n{text}\ngot  {:?}\nwant {:?}",
                String::from_utf8_lossy(&got),
                String::from_utf8_lossy(&want)
            );
        }
    }
}
