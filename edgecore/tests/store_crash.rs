//! A process that writes as fast as it can is killed at random points; what it acknowledged must be
//! there when the store is opened again, and nothing must be half there. Then the same with files
//! that were damaged, and with a database that is older than the snapshot, as a power cut leaves it.
//!
//! The child is this test binary itself, told by an environment variable. It prints a line for each
//! write *after* the write returned; the parent believes only what it has read.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking and prints what it measured"
)]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use common::ids::{Kind, ObjectKey};
use common::object::{Digest, Object};
use edgecore::store::desired::{Batch, Desired, Lookup};
use edgecore::store::reports::{PodReport, Reports};
use edgecore::store::{Opened, Recovery, Store};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;

const DIR: &str = "STORE_CRASH_DIR";

/// Each desired batch writes all of these with the same number: they must always agree.
const TWINS: u64 = 5;
/// A Pod comes with each number and goes this many numbers later.
const PODS: u64 = 4;

fn twin(i: u64, n: u64) -> Object {
    // From a few bytes to several pieces, so that a value changes its number of pieces too.
    let len = 20 + (n * 7919 + i * 104_729) % 7000;
    let text = format!("{n}:{}", "x".repeat(len as usize));
    let key = ObjectKey::named(Kind::Secret, "ns", &format!("twin-{i}"));
    Object::present(key, text.into_bytes())
}

fn pod_key(n: u64) -> ObjectKey {
    ObjectKey::pod("ns", "web", &format!("uid-{n}"))
}

fn pod(n: u64) -> Object {
    Object::present(pod_key(n), format!("{{\"n\":{n}}}").into_bytes())
}

fn batch(n: u64) -> Batch {
    Batch {
        puts: (0..TWINS).map(|i| twin(i, n)).chain([pod(n)]).collect(),
        removes: n.checked_sub(PODS).map(pod_key).into_iter().collect(),
        complete: n.is_multiple_of(7),
        epoch: Some([1; 16]),
        marks: BTreeMap::from([(Kind::Pod, n)]),
    }
}

/// The set as batch `n` leaves it.
fn expected(n: u64) -> BTreeMap<ObjectKey, Object> {
    let twins = (0..TWINS).map(|i| twin(i, n));
    let pods = (n.saturating_sub(PODS - 1).max(1)..=n).map(pod);
    let all = twins.chain(pods).filter(|_| n > 0);
    all.map(|o| (o.key.clone(), o)).collect()
}

/// The number of the last batch in the set.
fn desired_number(desired: &Desired) -> u64 {
    let Lookup::Present(bytes) = desired.lookup(&twin(0, 0).key) else {
        return 0;
    };
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    text.split_once(':').unwrap().0.parse().unwrap()
}

fn meta_number(store: &Store) -> u64 {
    let left = store.meta().get("left").unwrap();
    assert_eq!(left, store.meta().get("right").unwrap(), "a half batch");
    left.map_or(0, |v| String::from_utf8(v).unwrap().parse().unwrap())
}

fn report_number(reports: &Reports) -> u64 {
    let report = reports.pod(&pod_key(0));
    report.map_or(0, |r| r.status["n"].as_u64().unwrap())
}

fn put_meta(store: &Store, n: u64) {
    let value = n.to_string();
    let pair = [("left", value.as_bytes()), ("right", value.as_bytes())];
    store.meta().put_all(&pair).unwrap();
}

fn put_report(reports: &Reports, n: u64) {
    let report = PodReport {
        status: json!({ "n": n }),
        gone: n.is_multiple_of(3),
    };
    reports.put_pod(&pod_key(0), report);
}

fn say(line: &str) {
    static OUT: Mutex<()> = Mutex::new(());
    let _one_at_a_time = OUT.lock().unwrap();
    let mut out = std::io::stdout().lock();
    // The parent's death ends the storm.
    if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}

/// The child's part; does nothing in a normal test run.
#[test]
fn storm() {
    let Some(dir) = std::env::var_os(DIR) else {
        return;
    };
    let (store, _) = Store::open(Path::new(&dir)).unwrap();
    let desired = Desired::load(&store).unwrap();
    let reports = Reports::load(&store).unwrap();
    say("open 0");
    std::thread::scope(|s| {
        s.spawn(|| {
            for n in desired_number(&desired) + 1.. {
                desired.commit(batch(n)).unwrap();
                n.checked_sub(PODS + 2)
                    .into_iter()
                    .for_each(|old| desired.forget(&pod_key(old)));
                say(&format!("desired {n}"));
            }
        });
        s.spawn(|| {
            for n in meta_number(&store) + 1.. {
                put_meta(&store, n);
                say(&format!("meta {n}"));
            }
        });
        s.spawn(|| {
            for n in report_number(&reports) + 1.. {
                put_report(&reports, n);
                // That a Pod is gone is shown to the session when it is durable.
                while reports.all().is_empty() {
                    std::thread::sleep(Duration::from_micros(200));
                }
                if n.is_multiple_of(3) {
                    say(&format!("gone {n}"));
                }
                say(&format!("seq {}", reports.all()[0].seq));
                std::thread::sleep(Duration::from_millis(1));
            }
        });
    });
}

fn start(dir: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["storm", "--exact", "--nocapture", "--test-threads=1"])
        .env(DIR, dir)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// The highest number the child said of each kind before it died.
#[derive(Debug, Default)]
struct Said(BTreeMap<String, u64>);

impl Said {
    /// The test harness speaks on the same pipe: a line that is no word and number is not ours.
    fn hear(&mut self, line: &str) {
        if let Some((what, n)) = line.rsplit_once(' ')
            && let Ok(n) = n.parse::<u64>()
        {
            let highest = self.0.entry(what.into()).or_default();
            *highest = n.max(*highest);
        }
    }

    fn of(&self, what: &str) -> u64 {
        self.0.get(what).copied().unwrap_or(0)
    }
}

fn kill_after(mut child: Child, acks: usize, pause: Duration) -> Said {
    let mut said = Said::default();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    let mut heard = 0;
    while heard < acks && out.read_line(&mut line).unwrap() > 0 {
        said.hear(line.trim_end());
        line.clear();
        heard += 1;
    }
    std::thread::sleep(pause);
    child.kill().unwrap();
    // What was said before the kill counts also when it is read after it; a cut last line does not.
    while out.read_line(&mut line).unwrap() > 0 && line.ends_with('\n') {
        said.hear(line.trim_end());
        line.clear();
    }
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!errors.contains("panicked"), "{errors}");
    said
}

fn judge_set(desired: &Desired) -> u64 {
    let n = desired_number(desired);
    let set = expected(n);
    let digest = Digest::of(set.values().map(|o| (&o.key, &o.hash)));
    assert_eq!(desired.digest(), digest, "batch {n} is half there");
    for (key, object) in &set {
        assert_eq!(desired.object(key).as_ref(), Some(object), "{key}");
    }
    assert_eq!(desired.marks().get(&Kind::Pod).copied().unwrap_or(0), n);
    n
}

/// Holds what was opened against what the child said.
fn judge(store: &Store, opened: &Opened, said: &Said) {
    let n = judge_set(&Desired::load(store).unwrap());
    assert!(n >= said.of("desired"), "desired {n}, {said:?}");
    let meta = meta_number(store);
    assert!(meta >= said.of("meta"), "meta {meta}, {said:?}");
    let reports = Reports::load(store).unwrap();
    let report = report_number(&reports);
    assert!(report >= said.of("gone"), "report {report}, {said:?}");
    if !opened.clean {
        // No number that anybody saw is given to another value.
        for r in reports.all() {
            assert!(r.seq > said.of("seq"), "{} was used, {said:?}", r.seq);
        }
    }
    if let Some(recovery) = &opened.recovered {
        // Being killed twice in a row while opening looks like a database that kills.
        assert!(recovery.to_string().contains("died"), "{recovery}");
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        match path.is_dir() {
            true => copy(&path, &target),
            false => drop(std::fs::copy(&path, &target).unwrap()),
        }
    }
}

/// The rounds end early on a slow machine, but never below the least.
const TIME: Duration = Duration::from_secs(40);
const ROUNDS: u32 = 400;
const LEAST: u32 = 200;

#[test]
fn no_acknowledged_write_is_lost_when_the_process_is_killed() {
    let began = Instant::now();
    let mut rng = StdRng::seed_from_u64(0x5704E);
    let dir = tempfile::tempdir().unwrap();
    let (mut rounds, mut acks, mut rebuilt) = (0, 0, 0);
    while rounds < ROUNDS && (rounds < LEAST || began.elapsed() < TIME) {
        rounds += 1;
        let lines = match rng.random_range(0..20) {
            // Now and then in the middle of opening, or late enough for compactions.
            0 => 0,
            1 => 600,
            _ => rng.random_range(1..120),
        };
        let pause = Duration::from_micros(rng.random_range(0..3000));
        let said = kill_after(start(dir.path()), lines, pause);
        acks += said.0.len();
        // Half of the time the next child meets the directory as this one left it: then a copy is
        // judged.
        let beside = tempfile::tempdir().unwrap();
        let judged = match rng.random_bool(0.5) {
            true => dir.path(),
            false => {
                copy(dir.path(), beside.path());
                beside.path()
            }
        };
        let (store, opened) = Store::open(judged).unwrap();
        judge(&store, &opened, &said);
        rebuilt += u32::from(opened.recovered.is_some());
    }
    let (store, _) = Store::open(dir.path()).unwrap();
    let n = desired_number(&Desired::load(&store).unwrap());
    println!(
        "{rounds} rounds, {n} batches, {rebuilt} rebuilt, {:?}",
        began.elapsed()
    );
    assert!(acks > rounds as usize && n > u64::from(rounds));
}

/// A store with a history, closed in order; returns its last number.
fn history(dir: &Path) -> (u64, Opened) {
    let (store, opened) = Store::open(dir).unwrap();
    let desired = Desired::load(&store).unwrap();
    let reports = Reports::load(&store).unwrap();
    for n in 1..=40 {
        desired.commit(batch(n)).unwrap();
        put_meta(&store, n);
        put_report(&reports, n);
    }
    (40, opened)
}

/// All of the history is there, and (incarnation, number) of a report is never used twice.
fn judge_history(dir: &Path, n: u64, before: &Opened) -> Option<Recovery> {
    let (store, opened) = Store::open(dir).unwrap();
    let desired = Desired::load(&store).unwrap();
    assert_eq!(judge_set(&desired), n);
    assert!(desired.complete());
    assert_eq!(meta_number(&store), n);
    assert_eq!(report_number(&Reports::load(&store).unwrap()), n);
    let renewed = opened.incarnation != before.incarnation;
    assert_eq!(renewed, opened.recovered.is_some());
    opened.recovered
}

fn damage(path: &Path, rng: &mut StdRng, round: u32) {
    let mut bytes = std::fs::read(path).unwrap();
    // sled and the snapshot fill their files with zeroes: the tail of the data is meant.
    let end = bytes.iter().rposition(|b| *b != 0).unwrap() + 1;
    match round % 4 {
        0 => bytes.truncate(end - rng.random_range(1..4096).min(end)),
        1 => rng.fill(&mut bytes[end.saturating_sub(4096)..end]),
        2 => bytes.truncate(rng.random_range(0..end)),
        _ => bytes.clear(),
    }
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_damaged_database_comes_back_from_the_snapshot() {
    let mut rng = StdRng::seed_from_u64(1);
    let origin = tempfile::tempdir().unwrap();
    let (n, before) = history(origin.path());
    let mut rebuilt = 0;
    for round in 0..40 {
        let dir = tempfile::tempdir().unwrap();
        copy(origin.path(), dir.path());
        damage(&dir.path().join("database/db"), &mut rng, round);
        match judge_history(dir.path(), n, &before) {
            None => {}
            Some(Recovery::Database { why }) => {
                println!("round {round}: {why}");
                rebuilt += 1;
                assert!(dir.path().join("database.damaged").is_dir());
            }
            Some(other) => panic!("{other}"),
        }
        // Repaired for good.
        let (_, again) = Store::open(dir.path()).unwrap();
        assert_eq!(again.recovered, None);
    }
    println!("{rebuilt} of 40 rebuilt");
    // A cut that only takes what the snapshot has anyway is no damage; an emptied file always is.
    assert!(rebuilt >= 10, "{rebuilt}");
}

#[test]
fn a_damaged_snapshot_comes_back_from_the_database() {
    let mut rng = StdRng::seed_from_u64(2);
    let origin = tempfile::tempdir().unwrap();
    let (n, before) = history(origin.path());
    for round in 0..40 {
        let dir = tempfile::tempdir().unwrap();
        copy(origin.path(), dir.path());
        let snapshot = dir.path().join("snapshot");
        match round % 5 {
            4 => std::fs::remove_file(&snapshot).unwrap(),
            kind => damage(&snapshot, &mut rng, kind),
        }
        let recovery = judge_history(dir.path(), n, &before);
        assert!(
            matches!(recovery, Some(Recovery::Snapshot { .. })),
            "{recovery:?}"
        );
        let (_, again) = Store::open(dir.path()).unwrap();
        assert_eq!(again.recovered, None);
    }
}

/// Both at once is more than two copies can bear: the store opens with a part, and with nothing by
/// which anything would be removed.
#[test]
fn with_both_copies_damaged_the_store_opens_and_nothing_counts_as_complete() {
    let mut rng = StdRng::seed_from_u64(3);
    let origin = tempfile::tempdir().unwrap();
    let (_, before) = history(origin.path());
    for round in 0..12 {
        let dir = tempfile::tempdir().unwrap();
        copy(origin.path(), dir.path());
        std::fs::write(dir.path().join("database/db"), b"nothing").unwrap();
        let snapshot = dir.path().join("snapshot");
        let mut bytes = std::fs::read(&snapshot).unwrap();
        // In the header or in the base.
        bytes[round % 48] ^= 1;
        std::fs::write(&snapshot, bytes).unwrap();
        rng.random::<u8>();
        let (store, opened) = Store::open(dir.path()).unwrap();
        let both = matches!(opened.recovered, Some(Recovery::Both { .. }));
        assert!(both, "{:?}", opened.recovered);
        assert_ne!(opened.incarnation, before.incarnation);
        let desired = Desired::load(&store).unwrap();
        assert!(!desired.complete() && desired.marks().is_empty());
        desired.commit(batch(1)).unwrap();
    }
}

/// After a power cut the snapshot is as it was synced, and the database is as old, or as torn, as
/// the disk pleases: any earlier state of its directory, whole or cut, with the last snapshot.
#[test]
fn after_a_power_cut_any_older_database_will_do() {
    let mut rng = StdRng::seed_from_u64(4);
    let dir = tempfile::tempdir().unwrap();
    let olds = tempfile::tempdir().unwrap();
    let (store, before) = Store::open(dir.path()).unwrap();
    let desired = Desired::load(&store).unwrap();
    let reports = Reports::load(&store).unwrap();
    let old = |i: u64| olds.path().join(i.to_string());
    // Long enough for compactions, so that some of these databases are older than the base.
    for n in 1..=60 {
        if n % 4 == 0 {
            copy(&dir.path().join("database"), &old(n / 4));
        }
        desired.commit(batch(n)).unwrap();
        put_meta(&store, n);
        put_report(&reports, n);
    }
    store.flush().unwrap();
    let at_cut = tempfile::tempdir().unwrap();
    std::fs::copy(dir.path().join("snapshot"), at_cut.path().join("snapshot")).unwrap();
    for round in 0..45 {
        let dir = tempfile::tempdir().unwrap();
        copy(at_cut.path(), dir.path());
        copy(
            &old(1 + u64::from(round) % 15),
            &dir.path().join("database"),
        );
        if round >= 15 {
            damage(&dir.path().join("database/db"), &mut rng, round);
        }
        let recovery = judge_history(dir.path(), 60, &before);
        let fits = matches!(recovery, None | Some(Recovery::Database { .. }));
        assert!(fits, "{recovery:?}");
    }
}
