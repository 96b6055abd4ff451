//! The model of what goes up: the API server with the node's Lease and the Pods' statuses, and at
//! each replica the claim, the reports held, and the writes (cloudcore's `nodes/claim.rs` and
//! `upstream/`). The newest claim wins at once; an older holder goes on until its next renewal, a
//! conflict, or until it is not fresh.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use common::ids::ObjectKey;
use common::object::{ContentHash, Digest};

use super::cluster::Dice;

const RENEW_EVERY: u64 = 10;
/// After a renewal that was not answered.
const RETRY: u64 = 2;
/// Without a renewal for this long nothing is written.
const FRESH: u64 = 15;

pub(super) const REFUSED: &str = "a write from an older revision was refused";
pub(super) const OLDER_HOLDER: &str = "an older holder wrote over a newer one's status";
pub(super) const OLDER_REPORT: &str = "a newer holder wrote an older report than there was";

/// (incarnation, sequence): later words are greater.
type Said = (u64, u64);

/// A Pod's status as the API server shows it.
#[derive(Clone)]
pub(super) struct Status {
    revision: u64,
    pub(super) bytes: Arc<[u8]>,
    said: Said,
    /// Who wrote it: the epoch of the Lease, and when that was claimed.
    holder: (u64, u64),
}

#[derive(Default)]
pub(super) struct Api {
    /// `leaseTransitions`, which also stands for the session's name.
    epoch: u64,
    pub(super) statuses: BTreeMap<ObjectKey, Status>,
    writes: u64,
}

/// Of a Pod that has no status yet.
const CREATED: u64 = 1;

/// What a write came to.
#[derive(PartialEq)]
enum Answer {
    Done,
    Conflict,
}

/// The right to speak for the node, as its holder believes.
pub(super) struct Claim {
    epoch: u64,
    claimed: u64,
    renewed: u64,
    due: u64,
}

impl Claim {
    fn fresh(&self, now: u64) -> bool {
        now - self.renewed < FRESH
    }

    /// False when another session is in the Lease.
    fn renew(&mut self, api: &Api, now: u64, answered: bool) -> bool {
        if !answered {
            self.due = now + RETRY;
            return true;
        }
        if self.epoch != api.epoch {
            return false;
        }
        (self.renewed, self.due) = (now, now + RENEW_EVERY);
        true
    }
}

impl Api {
    /// Takes the node from whoever holds it.
    fn claim(&mut self, now: u64) -> Claim {
        self.epoch += 1;
        Claim {
            epoch: self.epoch,
            claimed: now,
            renewed: now,
            due: now + RENEW_EVERY,
        }
    }

    fn revision_of(&self, key: &ObjectKey) -> u64 {
        self.statuses.get(key).map_or(CREATED, |s| s.revision)
    }

    /// A patch that carries the revision it was computed from.
    fn patch(&mut self, key: &ObjectKey, from: u64, status: Status) -> Answer {
        if from != self.revision_of(key) {
            return Answer::Conflict;
        }
        self.writes += 1;
        let revision = CREATED + self.writes;
        let status = Status { revision, ..status };
        self.statuses.insert(key.clone(), status);
        Answer::Done
    }
}

/// One report and its way.
pub(super) struct Held {
    pub(super) sequence: u64,
    pub(super) bytes: Arc<[u8]>,
    acknowledged: bool,
    /// What the API server returned last: revision and bytes.
    returned: Option<(u64, Arc<[u8]>)>,
    /// A write from this revision was a conflict.
    stale: u64,
    compared: Option<u64>,
}

/// What a step of a write came to.
pub(super) enum Flown {
    /// Not over; or it was not allowed to begin.
    On,
    /// The API server holds the report, or the Pod is no more.
    Acked(ObjectKey, u64),
    Over,
}

/// One replica's half.
#[derive(Default)]
pub(super) struct Upstream {
    /// The session's, if there is one.
    pub(super) claim: Option<Claim>,
    pub(super) held: BTreeMap<ObjectKey, Held>,
    /// To be compared.
    marked: BTreeSet<ObjectKey>,
    /// What the watch has shown: revision and bytes.
    seen: BTreeMap<ObjectKey, (u64, Arc<[u8]>)>,
    /// Until then the API server does not answer its renewals.
    pub(super) unanswered_until: u64,
}

/// Where and when a write is made.
pub(super) struct Now<'a> {
    pub(super) api: &'a mut Api,
    pub(super) time: u64,
    pub(super) incarnation: u64,
    pub(super) seed: u64,
    pub(super) exists: &'a dyn Fn(&ObjectKey) -> bool,
    pub(super) count: &'a mut dyn FnMut(&'static str),
}

impl Upstream {
    /// A session begins: everything held is compared.
    pub(super) fn begin(&mut self, api: &mut Api, now: u64) {
        self.claim = Some(api.claim(now));
        self.marked = self.held.keys().cloned().collect();
    }

    /// It ends: what was not written is abandoned, the reports stay.
    pub(super) fn end(&mut self) {
        self.claim = None;
        self.marked.clear();
    }

    pub(super) fn forget(&mut self) {
        self.held.clear();
        self.marked.clear();
    }

    pub(super) fn digest(&self) -> Digest {
        let mut digest = Digest::default();
        for (key, held) in &self.held {
            digest.add(key, &ContentHash::of_sequence(held.sequence));
        }
        digest
    }

    /// Takes a report; false when it is older than what is held.
    pub(super) fn accept(&mut self, key: ObjectKey, sequence: u64, bytes: Arc<[u8]>) -> bool {
        let old = self.held.remove(&key);
        let in_order = old.as_ref().is_none_or(|h| h.sequence <= sequence);
        let (returned, stale) = old.map_or((None, 0), |h| (h.returned, h.stale));
        let held = Held {
            sequence,
            bytes,
            acknowledged: false,
            returned,
            stale,
            compared: None,
        };
        self.marked.insert(key.clone());
        self.held.insert(key, held);
        in_order
    }

    /// The watch catches up; what it shows at another revision than the one compared is compared.
    pub(super) fn watch(&mut self, api: &Api, exists: impl Fn(&ObjectKey) -> bool) {
        let shown = |k: &ObjectKey, s: &Status| (k.clone(), (s.revision, s.bytes.clone()));
        let there = api.statuses.iter().filter(|(k, _)| exists(k));
        self.seen = there.map(|(k, s)| shown(k, s)).collect();
        if self.claim.is_none() {
            return;
        }
        for (key, held) in &self.held {
            let seen = self.seen.get(key).map(|(revision, _)| *revision);
            if seen.is_none() || seen != held.compared {
                self.marked.insert(key.clone());
            }
        }
    }

    /// False when the claim is found to be lost.
    pub(super) fn renew(&mut self, api: &Api, now: u64) -> bool {
        let answered = now >= self.unanswered_until;
        let claim = self.claim.as_mut().filter(|c| now >= c.due);
        claim.is_none_or(|claim| claim.renew(api, now, answered))
    }

    pub(super) fn has_work(&self, now: u64) -> bool {
        !self.marked.is_empty() && self.claim.as_ref().is_some_and(|c| c.fresh(now))
    }

    /// One call for one object, or the finding that none is needed.
    pub(super) fn fly(&mut self, dice: &mut Dice, now: &mut Now<'_>) -> Flown {
        let turn = dice.roll(self.marked.len() as u64) as usize;
        let Some(key) = self.marked.iter().nth(turn).cloned() else {
            return Flown::Over;
        };
        let Some(held) = self.held.get_mut(&key) else {
            self.marked.remove(&key);
            return Flown::Over;
        };
        let seen = self.seen.get(&key).cloned();
        let behind = |seen: &(u64, _)| held.returned.as_ref().is_some_and(|r| r.0 > seen.0);
        if !seen.as_ref().is_some_and(behind) && seen.is_some() {
            held.returned = None;
        }
        let known = held.returned.clone().or(seen);
        let Some((revision, bytes)) = known.filter(|k| k.0 > held.stale) else {
            return self.ask(&key, now);
        };
        if bytes == held.bytes {
            held.compared = Some(revision);
            self.marked.remove(&key);
            let first = !std::mem::replace(&mut held.acknowledged, true);
            return match first {
                true => Flown::Acked(key, held.sequence),
                false => Flown::Over,
            };
        }
        if !(now.exists)(&key) {
            return self.gone(&key);
        }
        self.write(&key, revision, now)
    }

    fn gone(&mut self, key: &ObjectKey) -> Flown {
        self.marked.remove(key);
        match self.held.remove(key) {
            Some(held) => Flown::Acked(key.clone(), held.sequence),
            None => Flown::Over,
        }
    }

    /// A patch that changes nothing: its answer is the object.
    fn ask(&mut self, key: &ObjectKey, now: &Now<'_>) -> Flown {
        if !(now.exists)(key) {
            return self.gone(key);
        }
        if let Some(held) = self.held.get_mut(key) {
            let status = now.api.statuses.get(key);
            let bytes = status.map_or_else(|| b"".as_slice().into(), |s| s.bytes.clone());
            held.returned = Some((now.api.revision_of(key), bytes));
        }
        Flown::On
    }

    fn write(&mut self, key: &ObjectKey, from: u64, now: &mut Now<'_>) -> Flown {
        let (Some(held), Some(claim)) = (self.held.get_mut(key), self.claim.as_mut()) else {
            return Flown::Over;
        };
        let status = Status {
            revision: 0,
            bytes: held.bytes.clone(),
            said: (now.incarnation, held.sequence),
            holder: (claim.epoch, claim.claimed),
        };
        check_write(key, &status, now);
        if now.api.patch(key, from, status) == Answer::Conflict {
            (now.count)(REFUSED);
            held.stale = held.stale.max(from);
            held.returned = None;
            // In doubt who holds the node: the Lease is asked.
            claim.due = now.time;
        } else {
            held.returned = Some((now.api.revision_of(key), held.bytes.clone()));
        }
        Flown::On
    }
}

/// No holder takes its own word back; an older one takes a newer one's back only while it is fresh
/// without having been renewed since.
fn check_write(key: &ObjectKey, new: &Status, now: &mut Now<'_>) {
    let Some(old) = now.api.statuses.get(key) else {
        return;
    };
    let since = now.time - old.holder.1;
    match new.holder.0.cmp(&old.holder.0) {
        Ordering::Equal => assert!(
            new.said >= old.said,
            "seed {}: {key} went back from {:?} to {:?}",
            now.seed,
            old.said,
            new.said
        ),
        Ordering::Less => {
            (now.count)(OLDER_HOLDER);
            assert!(
                since < FRESH,
                "seed {}: {key} was written by an older holder, {since} s after the claim",
                now.seed
            );
        }
        Ordering::Greater if new.said < old.said => {
            (now.count)(OLDER_REPORT);
        }
        Ordering::Greater => {}
    }
}
