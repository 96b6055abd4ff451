//! Which object is written next: coalescing, fair between nodes, paced by the API server's health.
//!
//! - Owns: for each object with something to compare, one entry, whether it waits for its turn, is
//!   in flight or backs off. An idle node has no entry at all.
//! - Takes: marks ("compare this"), ends of flights, the time since start.
//! - Gives: the next object, and when to look again.
//! - Never: holds content, so that the latest report is what a flight reads; looks at a clock.
//!
//! ```text
//!            mark                take                 done(Finished), not marked meanwhile
//!   (none) ───────► Ready ─────────────► Flying ───────────────────────────► (none)
//!                     ▲                    │ done(Wait)
//!                     └──── due ─────── Waiting ◄──┘     a mark while Flying: Ready again at once
//! ```

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::Duration;

use common::ids::{NodeName, ObjectKey};

use super::writer::Retry;

/// Time since the queue was built.
pub(super) type Moment = Duration;

/// One Lease renewal away; a node whose claim is not fresh is looked at no more often.
const NOT_FRESH_FOR: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Writes in flight for all nodes.
    pub(super) in_flight: usize,
    /// Writes in flight for one node.
    pub(super) per_node: usize,
}

/// How a flight ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Finished,
    /// Not done: once more after this long. `until_change`: or as soon as it is marked.
    Wait {
        delay: Duration,
        until_change: bool,
    },
}

/// An object in flight; given back to [`Queue::done`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Taken {
    pub(super) node: NodeName,
    pub(super) key: ObjectKey,
    /// How often it has been put back since it was last finished.
    pub(super) tries: u32,
    lane: u64,
}

#[derive(Debug)]
enum Job {
    Ready {
        tries: u32,
    },
    Flying {
        tries: u32,
        again: bool,
    },
    Waiting {
        tries: u32,
        until: Moment,
        until_change: bool,
    },
}

#[derive(Debug)]
struct Lane {
    id: u64,
    ready: VecDeque<ObjectKey>,
    jobs: HashMap<ObjectKey, Job>,
    flying: usize,
    in_rota: bool,
    held_until: Option<Moment>,
}

#[derive(Debug)]
pub(super) struct Queue {
    limits: Limits,
    /// Halved by each sign that the API server is in trouble, one more for each success.
    window: usize,
    in_flight: usize,
    lanes: BTreeMap<NodeName, Lane>,
    /// Nodes with something ready: each turn takes one object of the first.
    rota: VecDeque<NodeName>,
    timers: BTreeSet<(Moment, NodeName, Option<ObjectKey>)>,
    next_lane: u64,
}

impl Queue {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            window: limits.in_flight,
            in_flight: 0,
            lanes: BTreeMap::new(),
            rota: VecDeque::new(),
            timers: BTreeSet::new(),
            next_lane: 0,
        }
    }

    /// The object must be compared. Returns false when that was going to happen anyway.
    pub(super) fn mark(&mut self, node: &NodeName, key: &ObjectKey) -> bool {
        let lane = match self.lanes.get_mut(node) {
            Some(lane) => lane,
            None => {
                self.next_lane += 1;
                self.lanes.entry(node.clone()).or_insert(Lane {
                    id: self.next_lane,
                    ready: VecDeque::new(),
                    jobs: HashMap::new(),
                    flying: 0,
                    in_rota: false,
                    held_until: None,
                })
            }
        };
        let tries = match lane.jobs.get_mut(key) {
            None => 0,
            Some(Job::Ready { .. }) => return false,
            Some(Job::Flying { again, .. }) => return !std::mem::replace(again, true),
            Some(Job::Waiting {
                until_change: false,
                ..
            }) => return false,
            Some(Job::Waiting { tries, until, .. }) => {
                self.timers
                    .remove(&(*until, node.clone(), Some(key.clone())));
                *tries
            }
        };
        self.make_ready(node, key, tries);
        true
    }

    /// The next object to compare, if the limits let one start. A node that is not `fresh` is
    /// passed over and looked at again later.
    pub(super) fn take(&mut self, now: Moment, fresh: impl Fn(&NodeName) -> bool) -> Option<Taken> {
        self.wake_due(now);
        if self.in_flight >= self.window {
            return None;
        }
        while let Some(node) = self.rota.pop_front() {
            let Some(lane) = self.lanes.get_mut(&node) else {
                continue;
            };
            lane.in_rota = false;
            if !fresh(&node) {
                let until = now + NOT_FRESH_FOR;
                lane.held_until = Some(until);
                self.timers.insert((until, node, None));
                continue;
            }
            let Some(key) = lane.ready.pop_front() else {
                continue;
            };
            let Some(job) = lane.jobs.get_mut(&key) else {
                continue;
            };
            let tries = match job {
                Job::Ready { tries } | Job::Flying { tries, .. } | Job::Waiting { tries, .. } => {
                    *tries
                }
            };
            *job = Job::Flying {
                tries,
                again: false,
            };
            lane.flying += 1;
            self.in_flight += 1;
            let taken = Taken {
                node: node.clone(),
                key,
                tries,
                lane: lane.id,
            };
            self.line_up(&node);
            return Some(taken);
        }
        None
    }

    pub(super) fn done(&mut self, taken: &Taken, verdict: Verdict, now: Moment) {
        self.in_flight = self.in_flight.saturating_sub(1);
        let Some(lane) = self
            .lanes
            .get_mut(&taken.node)
            .filter(|l| l.id == taken.lane)
        else {
            return;
        };
        lane.flying = lane.flying.saturating_sub(1);
        let again = matches!(
            lane.jobs.get(&taken.key),
            Some(Job::Flying { again: true, .. })
        );
        match verdict {
            Verdict::Finished if again => self.make_ready(&taken.node, &taken.key, 0),
            Verdict::Finished => {
                lane.jobs.remove(&taken.key);
            }
            Verdict::Wait {
                until_change: true, ..
            } if again => {
                self.make_ready(&taken.node, &taken.key, taken.tries);
            }
            Verdict::Wait {
                delay,
                until_change,
            } => {
                let until = now + delay;
                let tries = taken.tries.saturating_add(1);
                let job = Job::Waiting {
                    tries,
                    until,
                    until_change,
                };
                lane.jobs.insert(taken.key.clone(), job);
                self.timers
                    .insert((until, taken.node.clone(), Some(taken.key.clone())));
            }
        }
        self.line_up(&taken.node);
        if self
            .lanes
            .get(&taken.node)
            .is_some_and(|l| l.jobs.is_empty())
        {
            self.lanes.remove(&taken.node);
        }
    }

    /// Nothing of this node is written any more. What is in flight ends by itself and counts
    /// against the window until then.
    pub(super) fn clear(&mut self, node: &NodeName) {
        let Some(lane) = self.lanes.remove(node) else {
            return;
        };
        for (key, job) in lane.jobs {
            if let Job::Waiting { until, .. } = job {
                self.timers.remove(&(until, node.clone(), Some(key)));
            }
        }
        if let Some(until) = lane.held_until {
            self.timers.remove(&(until, node.clone(), None));
        }
        self.rota.retain(|n| n != node);
    }

    /// The API server answered.
    pub(super) fn speed_up(&mut self) {
        self.window = self.limits.in_flight.min(self.window + 1);
    }

    /// The API server is busy, or is not there.
    pub(super) fn slow_down(&mut self) {
        self.window = 1.max(self.window / 2);
    }

    /// When something will be ready that is not now.
    pub(super) fn next_due(&self) -> Option<Moment> {
        self.timers.first().map(|(at, ..)| *at)
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Objects that wait for their turn, fly or back off.
    pub(super) fn len(&self) -> usize {
        self.lanes.values().map(|l| l.jobs.len()).sum()
    }

    fn make_ready(&mut self, node: &NodeName, key: &ObjectKey, tries: u32) {
        if let Some(lane) = self.lanes.get_mut(node) {
            lane.jobs.insert(key.clone(), Job::Ready { tries });
            lane.ready.push_back(key.clone());
            self.line_up(node);
        }
    }

    fn line_up(&mut self, node: &NodeName) {
        let Some(lane) = self.lanes.get_mut(node) else {
            return;
        };
        let may = !lane.ready.is_empty()
            && lane.flying < self.limits.per_node
            && lane.held_until.is_none();
        if may && !lane.in_rota {
            lane.in_rota = true;
            self.rota.push_back(node.clone());
        }
    }

    fn wake_due(&mut self, now: Moment) {
        while self.timers.first().is_some_and(|(at, ..)| *at <= now) {
            let Some((_, node, key)) = self.timers.pop_first() else {
                return;
            };
            let Some(lane) = self.lanes.get_mut(&node) else {
                continue;
            };
            match key {
                None => {
                    lane.held_until = None;
                    self.line_up(&node);
                }
                Some(key) => {
                    if let Some(Job::Waiting { tries, .. }) = lane.jobs.get(&key) {
                        let tries = *tries;
                        self.make_ready(&node, &key, tries);
                    }
                }
            }
        }
    }
}

/// How long an object waits after an error, or `None` when it need not be tried again so.
///
/// Doubles from 200 ms. At most 5 s while the API server is in doubt, because the whole fleet
/// should be right again within 5 s of its return, and the window guards it against a rush; at
/// most 30 s for an object of its own trouble. `jitter` in 0..1 takes up to half of it off, or is
/// added to what the server itself demanded.
pub(super) fn back_off(retry: Retry, tries: u32, jitter: f64) -> Option<Duration> {
    let doubled = |most: Duration| {
        let delay = Duration::from_millis(200).saturating_mul(1 << tries.min(12));
        delay.min(most).mul_f64(1.0 - jitter / 2.0)
    };
    match retry {
        Retry::Never | Retry::Reread => None,
        Retry::Later => Some(doubled(Duration::from_secs(30))),
        Retry::SlowDown { at_least } => {
            let own = doubled(Duration::from_secs(5));
            // A server that asks for longer than a minute is not obeyed to the letter: status
            // would be stale for as long as a mistaken header says.
            let asked = at_least.unwrap_or_default().min(Duration::from_secs(60));
            Some(own.max(asked.mul_f64(1.0 + jitter / 4.0)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: fn(u64) -> Moment = Duration::from_millis;

    fn node(n: &str) -> NodeName {
        NodeName::parse(n).unwrap()
    }

    fn pod(n: &str) -> ObjectKey {
        ObjectKey::pod("d", n, n)
    }

    fn queue(in_flight: usize, per_node: usize) -> Queue {
        Queue::new(Limits {
            in_flight,
            per_node,
        })
    }

    fn wait(ms: u64, until_change: bool) -> Verdict {
        Verdict::Wait {
            delay: AT(ms),
            until_change,
        }
    }

    fn order(q: &mut Queue, n: usize) -> Vec<String> {
        let taken: Vec<_> = (0..n).map_while(|_| q.take(AT(0), |_| true)).collect();
        taken
            .iter()
            .map(|t| format!("{}{}", t.node, t.key.name))
            .collect()
    }

    #[test]
    fn marks_of_one_object_are_one_entry_and_a_mark_in_flight_is_one_more_flight() {
        let (mut q, n) = (queue(8, 8), node("a"));
        assert!(q.mark(&n, &pod("1")));
        assert!(!q.mark(&n, &pod("1")));
        let first = q.take(AT(0), |_| true).unwrap();
        assert_eq!(q.take(AT(0), |_| true), None);
        assert!(q.mark(&n, &pod("1")));
        assert!(!q.mark(&n, &pod("1")));
        assert_eq!(q.take(AT(0), |_| true), None, "never twice in flight");
        q.done(&first, Verdict::Finished, AT(1));
        let second = q.take(AT(1), |_| true).unwrap();
        q.done(&second, Verdict::Finished, AT(2));
        assert_eq!(q.take(AT(2), |_| true), None);
        assert_eq!((q.len(), q.in_flight()), (0, 0));
    }

    #[test]
    fn nodes_take_turns() {
        let mut q = queue(10, 10);
        for i in 0..4 {
            q.mark(&node("a"), &pod(&i.to_string()));
        }
        q.mark(&node("b"), &pod("0"));
        q.mark(&node("c"), &pod("0"));
        assert_eq!(order(&mut q, 10), ["a0", "b0", "c0", "a1", "a2", "a3"]);
    }

    #[test]
    fn both_limits_hold() {
        let mut q = queue(3, 2);
        for n in ["a", "b"] {
            for i in 0..4 {
                q.mark(&node(n), &pod(&i.to_string()));
            }
        }
        assert_eq!(order(&mut q, 10), ["a0", "b0", "a1"]);
        let mut q = queue(10, 2);
        for i in 0..4 {
            q.mark(&node("a"), &pod(&i.to_string()));
        }
        assert_eq!(order(&mut q, 10).len(), 2);
    }

    #[test]
    fn the_window_halves_in_trouble_and_grows_with_success() {
        let mut q = queue(8, 8);
        for i in 0..20 {
            q.mark(&node("a"), &pod(&i.to_string()));
        }
        (0..10).for_each(|_| q.slow_down());
        assert_eq!(order(&mut q, 20).len(), 1);
        q.speed_up();
        assert_eq!(order(&mut q, 20).len(), 1);
        (0..100).for_each(|_| q.speed_up());
        assert_eq!(order(&mut q, 20).len(), 6);
    }

    #[test]
    fn a_back_off_is_kept_but_one_until_change_ends_with_a_mark() {
        let (mut q, n) = (queue(8, 8), node("a"));
        for (until_change, want) in [(false, false), (true, true)] {
            q.mark(&n, &pod("1"));
            let taken = q.take(AT(0), |_| true).unwrap();
            q.done(&taken, wait(500, until_change), AT(0));
            assert_eq!(q.next_due(), Some(AT(500)));
            q.mark(&n, &pod("1"));
            assert_eq!(q.take(AT(10), |_| true).is_some(), want);
            let again = q.take(AT(500), |_| true);
            assert_eq!(again.as_ref().map(|t| t.tries), (!want).then_some(1));
            q.clear(&n);
            assert_eq!(q.next_due(), None);
        }
    }

    #[test]
    fn a_node_that_is_not_fresh_is_passed_over_and_tried_again() {
        let mut q = queue(8, 8);
        q.mark(&node("a"), &pod("1"));
        q.mark(&node("b"), &pod("1"));
        let only_b = |n: &NodeName| n.as_str() == "b";
        assert_eq!(q.take(AT(0), only_b).unwrap().node, node("b"));
        assert_eq!(q.take(AT(0), |_| true), None, "held for a while");
        assert_eq!(q.take(AT(1000), |_| true).unwrap().node, node("a"));
    }

    #[test]
    fn a_flight_of_an_ended_session_does_not_touch_the_next_ones() {
        let (mut q, n) = (queue(8, 8), node("a"));
        q.mark(&n, &pod("1"));
        let old = q.take(AT(0), |_| true).unwrap();
        q.clear(&n);
        q.mark(&n, &pod("1"));
        let new = q.take(AT(0), |_| true).unwrap();
        assert_eq!(q.in_flight(), 2);
        q.done(&old, Verdict::Finished, AT(1));
        assert!(q.mark(&n, &pod("1")), "the new flight still counts as one");
        q.done(&new, Verdict::Finished, AT(1));
        assert!(q.take(AT(1), |_| true).is_some());
    }

    #[test]
    fn back_off_grows_is_bounded_and_obeys_the_server() {
        let ms = |retry, tries, jitter| back_off(retry, tries, jitter).map(|d| d.as_millis());
        let slow = |s: Option<u64>| Retry::SlowDown {
            at_least: s.map(Duration::from_secs),
        };
        for (retry, tries, jitter, want) in [
            (Retry::Later, 0, 0.0, Some(200)),
            (Retry::Later, 3, 0.0, Some(1600)),
            (Retry::Later, 3, 1.0, Some(800)),
            (Retry::Later, 4_000_000, 0.0, Some(30_000)),
            (slow(None), 40, 0.0, Some(5_000)),
            (slow(Some(7)), 0, 0.0, Some(7_000)),
            (slow(Some(7)), 0, 1.0, Some(8_750)),
            (slow(Some(1)), 40, 0.0, Some(5_000)),
            (slow(Some(86_400)), 0, 0.0, Some(60_000)),
            (Retry::Never, 0, 0.0, None),
            (Retry::Reread, 0, 0.0, None),
        ] {
            assert_eq!(ms(retry, tries, jitter), want, "{retry:?} {tries} {jitter}");
        }
    }
}
