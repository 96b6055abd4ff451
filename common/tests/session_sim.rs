//! The session protocol under every history we can think of: both machines, a model store at the
//! edge, a model cluster with replicas whose caches lag, lanes that deliver in order each but in
//! any order together, and an adversary that disconnects, crashes, rolls disks and clusters back.
//!
//! After each history the adversary rests, and both sides must converge. On the way these hold:
//! - a Pod UID that the edge has removed never comes back while the cluster epoch is the same;
//! - the edge never drops a Pod that the cluster still has, in an epoch it has followed;
//! - the edge acts on nothing that is not committed (the model applies commits only);
//! - the cloud never takes an older report of a Pod after a newer one of the same incarnation.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "session_sim/cluster.rs"]
mod cluster;
#[path = "session_sim/disk.rs"]
mod disk;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use common::hub::session::cloud::{CloudEvent, CloudSession};
use common::hub::session::edge::{Commit, EdgeEvent, EdgeSession, Outcome};
use common::hub::session::{Marks, behind};
use common::hub::{Lane, frame, proto};
use common::ids::{Kind, ObjectKey};
use common::object::{Digest, Object};

use cluster::{Cluster, Dice, Objects, Replica, View, epoch_id, marks};
use disk::{Disk, DiskCell};

/// One connection: both machines and the bytes between them, on three lanes each way.
struct Wire {
    edge: EdgeSession,
    cloud: CloudSession,
    replica: usize,
    down: BTreeMap<Lane, VecDeque<proto::Message>>,
    up: BTreeMap<Lane, VecDeque<proto::Message>>,
    commit: Option<Commit>,
    welcome: bool,
    last_view: Option<u64>,
}

struct World {
    dice: Dice,
    seed: u64,
    cluster: Cluster,
    replicas: Vec<Replica>,
    disk: DiskCell,
    wire: Option<Wire>,
    /// Pods that left the disk by a removal, in the epoch of that removal.
    removed: BTreeSet<(Option<[u8; 16]>, ObjectKey)>,
    /// Reports as the API server shows them.
    api: BTreeMap<ObjectKey, (u64, u64, Arc<[u8]>)>,
    events_seen: BTreeSet<(u64, u64)>,
    in_sync: bool,
    /// Bytes of the frames that both sides have sent.
    sent: usize,
}

/// Through the real bytes, so that the codec is part of every history.
fn over_the_wire(message: &proto::Message, sent: &mut usize) -> proto::Message {
    let mut reader = frame::FrameReader::default();
    let bytes = frame::encode(message);
    *sent += bytes.len();
    reader.feed(&bytes);
    reader.next_message().unwrap().unwrap()
}

impl World {
    fn new(seed: u64) -> Self {
        let dice = Dice::new(seed);
        let cluster = Cluster {
            history: vec![Objects::new()],
            epoch: 0,
            next_uid: 0,
        };
        let replica = || Replica {
            cached: 0,
            epoch: 0,
            reports: BTreeMap::new(),
            incarnation: [0; 16],
        };
        let disk = Disk {
            incarnation: 1,
            epoch: None,
            marks: Marks::new(),
            objects: Objects::new(),
            digest: Digest::default(),
            ever_complete: false,
            reports: BTreeMap::new(),
            next_report: 1,
            events: VecDeque::new(),
            next_event: 1,
        };
        Self {
            dice,
            seed,
            cluster,
            replicas: vec![replica(), replica()],
            disk: DiskCell(RefCell::new(disk)),
            wire: None,
            removed: BTreeSet::new(),
            api: BTreeMap::new(),
            events_seen: BTreeSet::new(),
            in_sync: false,
            sent: 0,
        }
    }

    /// Runs `act` on the cloud's machine with the view of its replica.
    fn cloud<R>(&mut self, act: impl FnOnce(&mut CloudSession, &View<'_>) -> R) -> Option<R> {
        let wire = self.wire.as_mut()?;
        let replica = &self.replicas[wire.replica];
        let at = replica.cached.min(self.cluster.revision());
        let view = View {
            objects: &self.cluster.history[at as usize],
            older: wire
                .last_view
                .and_then(|r| self.cluster.history.get(r as usize)),
            revision: replica.cached,
            epoch: replica.epoch,
            complete: true,
            reports: &replica.reports,
            incarnation: replica.incarnation,
        };
        let result = act(&mut wire.cloud, &view);
        if wire.last_view != Some(at) && wire.cloud.batches_in_flight() == 0 {
            wire.last_view = Some(at);
        }
        Some(result)
    }

    fn connect(&mut self) {
        let replica = self.dice.roll(self.replicas.len() as u64) as usize;
        self.in_sync = false;
        self.wire = Some(Wire {
            edge: EdgeSession::new(&self.disk),
            cloud: CloudSession::default(),
            replica,
            down: BTreeMap::new(),
            up: BTreeMap::new(),
            commit: None,
            welcome: false,
            last_view: None,
        });
    }

    fn collect(&mut self) {
        let Some(wire) = self.wire.as_mut() else {
            return;
        };
        while let Some((lane, m)) = wire.edge.poll_message() {
            let m = over_the_wire(&m, &mut self.sent);
            wire.up.entry(lane).or_default().push_back(m);
        }
        while let Some((lane, m)) = wire.cloud.poll_message() {
            let m = over_the_wire(&m, &mut self.sent);
            wire.down.entry(lane).or_default().push_back(m);
        }
    }

    /// One step of whatever is possible; false when nothing is.
    fn step(&mut self) -> bool {
        self.collect();
        self.edge_events();
        self.cloud_events();
        self.collect();
        let Some(wire) = self.wire.as_mut() else {
            self.connect();
            return true;
        };
        let mut choices: Vec<(u8, Lane)> = Vec::new();
        let ready = |q: &BTreeMap<Lane, VecDeque<_>>| -> Vec<Lane> {
            q.iter()
                .filter(|(_, q)| !q.is_empty())
                .map(|(l, _)| *l)
                .collect()
        };
        choices.extend(ready(&wire.up).into_iter().map(|l| (0, l)));
        choices.extend(ready(&wire.down).into_iter().map(|l| (1, l)));
        if wire.commit.is_some() {
            choices.push((2, Lane::Control));
        }
        if wire.welcome {
            choices.push((3, Lane::Control));
        }
        if choices.is_empty() {
            return false;
        }
        let (what, lane) = choices[self.dice.roll(choices.len() as u64) as usize];
        let take = |q: &mut BTreeMap<Lane, VecDeque<proto::Message>>| {
            q.get_mut(&lane).and_then(VecDeque::pop_front).unwrap()
        };
        match what {
            0 => {
                let message = take(&mut wire.up);
                self.cloud(|c, v| c.handle(message, v)).unwrap().unwrap();
            }
            1 => {
                let message = take(&mut wire.down);
                wire.edge.handle(lane, message, &self.disk).unwrap();
            }
            2 => self.commit(),
            _ => {
                wire.welcome = false;
                wire.edge.welcome_committed(&self.disk);
            }
        }
        true
    }

    fn commit(&mut self) {
        let wire = self.wire.as_mut().unwrap();
        let commit = wire.commit.take().unwrap();
        let mut disk = self.disk.borrow_mut();
        let same_epoch = disk.epoch == Some(commit.epoch);
        let outcome = if same_epoch && behind(&commit.marks, &disk.marks).is_some() {
            Outcome::Stale {
                marks: disk.marks.clone(),
            }
        } else {
            if !same_epoch {
                disk.epoch = Some(commit.epoch);
                disk.marks.clear();
            }
            for (kind, revision) in commit.marks {
                let mark = disk.marks.entry(kind).or_default();
                *mark = revision.max(*mark);
            }
            let epoch = disk.epoch;
            for key in commit.removes {
                if let Some(old) = disk.objects.remove(&key) {
                    disk.digest.remove(&key, &old.hash);
                    if key.kind == Kind::Pod {
                        let still = self.cluster.now().contains_key(&key)
                            && epoch == Some(epoch_id(self.cluster.epoch));
                        assert!(
                            !still,
                            "seed {}: {key} is wanted and was removed: epoch {epoch:?}, marks {:?}, \
                             cluster at {}, replicas at {:?}",
                            self.seed,
                            disk.marks,
                            self.cluster.revision(),
                            self.replicas
                                .iter()
                                .map(|r| (r.epoch, r.cached))
                                .collect::<Vec<_>>()
                        );
                        disk.reports.remove(&key);
                        wire.edge.forget_report(&key);
                        self.removed.insert((epoch, key));
                    }
                }
            }
            for object in commit.puts {
                assert!(
                    !self.removed.contains(&(epoch, object.key.clone())),
                    "seed {}: {} was removed and came back",
                    self.seed,
                    object.key
                );
                disk.digest.add(&object.key, &object.hash);
                if let Some(old) = disk.objects.insert(object.key.clone(), object) {
                    disk.digest.remove(&old.key, &old.hash);
                }
            }
            disk.ever_complete |= commit.complete;
            Outcome::Committed {
                desired: disk.digest,
            }
        };
        drop(disk);
        wire.edge.committed(outcome, &self.disk).unwrap();
    }

    fn edge_events(&mut self) {
        let Some(wire) = self.wire.as_mut() else {
            return;
        };
        while let Some(event) = wire.edge.poll_event() {
            match event {
                EdgeEvent::Welcomed(_) => wire.welcome = true,
                EdgeEvent::Commit(commit) => {
                    assert!(wire.commit.is_none(), "one commit at a time");
                    wire.commit = Some(commit);
                }
                EdgeEvent::ReportAcked { key, sequence } => {
                    let mut disk = self.disk.borrow_mut();
                    if let Some(report) = disk.reports.get_mut(&key)
                        && report.0 == sequence
                    {
                        report.2 = true;
                    }
                }
                EdgeEvent::EventsAcked { sequence } => {
                    self.disk
                        .borrow_mut()
                        .events
                        .retain(|e| e.sequence > sequence);
                }
                EdgeEvent::Answered(_) | EdgeEvent::GoAway(_) => {}
            }
        }
    }

    fn cloud_events(&mut self) {
        while let Some(Some(event)) = self.cloud(|c, _| c.poll_event()) {
            let incarnation = self.wire.as_ref().unwrap().cloud.incarnation();
            let replica = self.wire.as_ref().unwrap().replica;
            match event {
                CloudEvent::Greeted(_) => {
                    let r = &mut self.replicas[replica];
                    if r.incarnation != incarnation {
                        r.incarnation = incarnation;
                        r.reports.clear();
                    }
                    self.cloud(|c, _| c.welcome(proto::Welcome::default()));
                }
                CloudEvent::Behind { committed } => {
                    // A consistent list; if that is older too, the cluster was restored.
                    let now = self.cluster.revision();
                    if behind(&marks(now), &committed).is_some() {
                        self.cluster.epoch += 1;
                    }
                    let r = &mut self.replicas[replica];
                    r.cached = now;
                    r.epoch = self.cluster.epoch;
                    self.cloud(|c, v| c.listed(v));
                }
                CloudEvent::Report {
                    key,
                    sequence,
                    bytes,
                    ..
                } => {
                    let incarnation = u128::from_be_bytes(incarnation) as u64;
                    let kept = self.replicas[replica].reports.get(&key).map(|r| r.0);
                    assert!(
                        kept <= Some(sequence),
                        "seed {}: {key} went back",
                        self.seed
                    );
                    self.api
                        .insert(key.clone(), (incarnation, sequence, bytes.clone()));
                    self.replicas[replica]
                        .reports
                        .insert(key.clone(), (sequence, bytes));
                    self.cloud(|c, _| c.ack_reports([(key, sequence, false)]));
                }
                CloudEvent::Events(events) => {
                    let last = events.last().unwrap().sequence;
                    for event in events {
                        self.events_seen
                            .insert((u128::from_be_bytes(incarnation) as u64, event.sequence));
                    }
                    self.cloud(|c, _| c.ack_events(last));
                }
                CloudEvent::InSync => self.in_sync = true,
                CloudEvent::TooLarge { key, bytes } => panic!("{key} of {bytes} bytes"),
                CloudEvent::EdgeCannotCommit | CloudEvent::Disagreed => {
                    self.cloud(|c, v| c.resume(v));
                }
                CloudEvent::Live | CloudEvent::Asked(_) => {}
            }
        }
    }

    fn report_something(&mut self) {
        let mut disk = self.disk.borrow_mut();
        let keys: Vec<_> = disk
            .objects
            .keys()
            .filter(|k| k.kind == Kind::Pod)
            .cloned()
            .collect();
        if keys.is_empty() {
            return;
        }
        let key = keys[self.dice.roll(keys.len() as u64) as usize].clone();
        let sequence = disk.next_report;
        disk.next_report += 1;
        let bytes: Vec<u8> = format!("status of {key} number {sequence} ")
            .repeat(20)
            .into();
        disk.reports.insert(key, (sequence, bytes.into(), false));
        let sequence = disk.next_event;
        disk.next_event += 1;
        disk.events.push_back(proto::Event {
            sequence,
            ..Default::default()
        });
        drop(disk);
        if let Some(wire) = self.wire.as_mut() {
            wire.edge.pump(&self.disk);
        }
    }

    fn mischief(&mut self) {
        match self.dice.roll(20) {
            0..=6 => self.cluster.change(&mut self.dice),
            7..=9 => {
                // A watch delivers, to one replica, up to some revision.
                let replica = self.dice.roll(self.replicas.len() as u64) as usize;
                let now = self.cluster.revision();
                let r = &mut self.replicas[replica];
                if r.epoch == self.cluster.epoch && r.cached < now {
                    r.cached += 1 + self.dice.roll(now - r.cached);
                    self.cloud(|c, v| c.pump(v));
                }
            }
            10..=12 => self.report_something(),
            13 | 14 => self.wire = None,
            15 => {
                // The edge's process or power dies: what is committed stays, the session goes.
                self.wire = None;
            }
            16 => {
                // A replica dies and comes back with a consistent list and no reports.
                let i = self.dice.roll(self.replicas.len() as u64) as usize;
                if self.wire.as_ref().is_some_and(|w| w.replica == i) {
                    self.wire = None;
                }
                let r = &mut self.replicas[i];
                r.reports.clear();
                r.incarnation = [0; 16];
                r.cached = self.cluster.revision();
                r.epoch = self.cluster.epoch;
            }
            17 if self.dice.one_in(4) => {
                // The cluster is restored from a backup: every replica starts anew on it.
                let keep = 1 + self.dice.roll(self.cluster.history.len() as u64) as usize;
                self.cluster.history.truncate(keep);
                // A restored cluster that has grown past the marks cannot be told from one that
                // was never restored; what it wants is wanted.
                self.removed.clear();
                self.wire = None;
                for r in &mut self.replicas {
                    r.cached = self.cluster.revision();
                    r.epoch = self.cluster.epoch;
                }
            }
            18 if self.dice.one_in(4) => {
                // The store lost its tail: recovered from the copy, a new incarnation.
                self.wire = None;
                let mut disk = self.disk.borrow_mut();
                disk.incarnation += 1;
                disk.epoch = None;
                disk.marks.clear();
                let victim = disk.objects.keys().next().cloned();
                if let Some(key) = victim
                    && let Some(old) = disk.objects.remove(&key)
                {
                    disk.digest.remove(&key, &old.hash);
                }
            }
            _ => {}
        }
    }

    fn settle(&mut self) {
        for r in &mut self.replicas {
            r.cached = self.cluster.revision();
            r.epoch = self.cluster.epoch;
        }
        self.cloud(|c, v| c.pump(v));
        for _ in 0..20_000 {
            if !self.step() {
                if self.settled() {
                    return;
                }
                for r in &mut self.replicas {
                    r.cached = self.cluster.revision();
                    r.epoch = self.cluster.epoch;
                }
                self.cloud(|c, v| c.pump(v));
                self.collect();
            }
        }
        panic!(
            "seed {}: not settled: disk {:?} cluster {:?}",
            self.seed,
            self.disk.borrow().objects.keys().collect::<Vec<_>>(),
            self.cluster.now().keys().collect::<Vec<_>>()
        );
    }

    fn settled(&self) -> bool {
        let disk = self.disk.borrow();
        let pending = disk.reports.values().any(|r| !r.2) || !disk.events.is_empty();
        disk.objects == *self.cluster.now() && self.in_sync && !pending
    }

    fn check_settled(&self) {
        let disk = self.disk.borrow();
        assert!(disk.ever_complete);
        for (key, (sequence, bytes, _)) in &disk.reports {
            let (_, at_api, shown) = &self.api[key];
            assert_eq!(
                (at_api, shown),
                (sequence, bytes),
                "seed {}: {key}",
                self.seed
            );
        }
    }
}

fn run(seed: u64) {
    let mut world = World::new(seed);
    let steps = 50 + world.dice.roll(150);
    for _ in 0..steps {
        if world.dice.one_in(3) {
            world.mischief();
        }
        world.step();
    }
    world.settle();
    world.check_settled();
}

#[test]
fn both_sides_converge_after_any_history() {
    let seeds = std::env::var("SIM_SEEDS")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(4_000);
    let first = std::env::var("SIM_FIRST")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(0);
    for seed in first..first + seeds {
        run(seed);
    }
}

#[test]
fn a_resume_with_nothing_changed_costs_a_constant_number_of_bytes() {
    let mut sizes = Vec::new();
    for pods in [10, 200] {
        let mut world = World::new(7);
        for _ in 0..pods {
            let mut objects = world.cluster.now().clone();
            let n = objects.len();
            let key = ObjectKey::pod("default", &format!("p{n}"), &format!("u{n}"));
            objects.insert(key.clone(), Object::present(key, vec![b'x'; 1500]));
            world.cluster.history.push(objects);
        }
        world.settle();
        world.connect();
        // The replica of the settled session and the other hold the same reports: none.
        world.sent = 0;
        while !world.settled() {
            world.step();
        }
        sizes.push(world.sent);
    }
    assert!(sizes.iter().all(|s| *s < 600), "{sizes:?}");
}

/// Leaves room for what carries the two frames below 500 bytes on the wire: three packets with their
/// headers take 220 over QUIC and 290 over WebSocket.
#[test]
fn one_key_of_a_two_kilobyte_config_map_crosses_in_two_small_frames() {
    let mut world = World::new(7);
    let key = ObjectKey::named(Kind::ConfigMap, "default", "settings-of-the-shop");
    for value in ["3f2a9c51d07be648", "a81c64d2059fe7b3"] {
        let filler: String = (0..90)
            .map(|i| format!("\"key-{i}\":\"value {}\",", i * 7919))
            .collect();
        let text = format!("{{\"data\":{{{filler}\"edited\":\"{value}{value}\"}}}}");
        assert!(text.len() > 1800);
        let mut objects = world.cluster.now().clone();
        objects.insert(key.clone(), Object::present(key.clone(), text.into_bytes()));
        world.cluster.history.push(objects);
        world.sent = 0;
        world.settle();
    }
    assert!(world.sent < 190, "{} bytes", world.sent);
}
