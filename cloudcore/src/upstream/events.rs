//! Events of Pods: from what an edge tells to core/v1 Events, merged as a kubelet merges them.
//!
//! - Owns: per session, which Event stands for what (so that a repetition is a count), which are
//!   similar, and the budget of each (Pod, reason).
//! - Takes: the edge's Events in their order; the Pods that the watch knows.
//! - Gives: creates and patches; the sequence up to which everything is in the API or was refused
//!   for good.
//! - Never: lets an Event stand in the way of a status: it has a window of its own, and is dropped
//!   where a status would be tried again.
//!
//! `source.component` and `reportingComponent` are `kubelet`, because tools and upstream's tests
//! select a Pod's Events from its node by `source=kubelet`; `source.host` is the node.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use common::hub::proto::Event;
use common::ids::{Kind, NodeName, ObjectKey};
use jiff::Timestamp;
use ring::digest;
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tracing::{debug, warn};

use super::difference::rfc3339;
use super::queue::{Moment, back_off};
use super::shared::{Counter, Shared};
use super::views::{Fresh, PodView};
use super::writer::{Call, Retry, WriteError};

const COMPONENT: &str = "kubelet";

/// Events of one session that can still be counted up, about 150 bytes each: the kubelet's 4096
/// are for 110 Pods of one process; what falls out begins a new Event, no more.
const REMEMBERED: usize = 64;
/// Budgets and similar Events remembered, about 100 bytes each.
const BUDGETS: usize = 128;
/// The API server forgets an Event after an hour; a patch to it would be a 404.
const EVENT_TTL: Duration = Duration::from_secs(3500);

/// The kubelet's spam filter: 25 at once, then one in five minutes.
const BURST: f64 = 25.0;
const REFILL: Duration = Duration::from_secs(300);
/// The kubelet's aggregation: from the tenth different message in ten minutes on, one Event
/// stands for all that follow.
const SIMILAR: usize = 10;
const SIMILAR_WITHIN: Duration = Duration::from_secs(600);
const COMBINED: &str = "(combined from similar events): ";

/// Longer ones are cut: the API server bounds an object, not an edge's eloquence.
const MAX_MESSAGE: usize = 4096;
const MAX_REASON: usize = 128;
const MAX_FIELD_PATH: usize = 512;
/// An Event that is refused this often, other than by a server in trouble, is dropped.
const MAX_TRIES: u32 = 5;

type Hash = [u8; 16];

fn hash(parts: &[&str]) -> Hash {
    let mut context = digest::Context::new(&digest::SHA256);
    for part in parts {
        context.update(&(part.len() as u64).to_be_bytes());
        context.update(part.as_bytes());
    }
    let mut out = [0; 16];
    out.copy_from_slice(&context.finish().as_ref()[..16]);
    out
}

fn cut(text: &str, most: usize) -> &str {
    &text[..text.floor_char_boundary(most)]
}

/// An Event in the API that a repetition is counted on.
#[derive(Debug, Clone)]
struct Remembered {
    name: String,
    count: u64,
    /// How many of `count` the edge has told since `first_ms`: its own count is since then.
    since_first: (i64, u64),
    /// (sequence, last_ms) of what was counted last: the same again is the same.
    last: (u64, i64),
    at: Moment,
}

impl Remembered {
    /// The count with this Event in it.
    fn counted(&self, event: &Event) -> u64 {
        let (first_ms, known) = self.since_first;
        let known = if first_ms == event.first_ms { known } else { 0 };
        self.count + u64::from(event.count.max(1)).saturating_sub(known)
    }
}

struct Budget {
    left: f64,
    at: Moment,
}

struct Alike {
    messages: Vec<Hash>,
    since: Moment,
}

/// What to do about one Event of an edge.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Plan {
    /// Over its budget.
    Drop,
    /// Sent again because its acknowledgement was lost.
    Counted,
    Create {
        slot: Hash,
        name: String,
        body: Value,
    },
    Count {
        slot: Hash,
        name: String,
        body: Value,
    },
}

/// The memory of one session.
#[derive(Default)]
pub(super) struct Correlator {
    remembered: HashMap<Hash, Remembered>,
    budgets: HashMap<Hash, Budget>,
    alike: HashMap<Hash, Alike>,
}

impl Correlator {
    /// Decides about an Event. Spends its budget, so it is called once for each.
    fn admit(&mut self, key: &ObjectKey, event: &Event, now: Moment) -> bool {
        let slot = hash(&[&key.uid, &event.reason]);
        evict(&mut self.budgets, BUDGETS, &slot, |b| b.at);
        let budget = self.budgets.entry(slot).or_insert(Budget {
            left: BURST,
            at: now,
        });
        let refilled = now.saturating_sub(budget.at).as_secs_f64() / REFILL.as_secs_f64();
        budget.left = (budget.left + refilled).min(BURST);
        budget.at = now;
        let admitted = budget.left >= 1.0;
        if admitted {
            budget.left -= 1.0;
        }
        admitted
    }

    /// The message that the Event is known by: its own, or the one of all that are alike.
    fn combined(&mut self, key: &ObjectKey, event: &Event, now: Moment) -> bool {
        let slot = hash(&[&key.uid, warning(event), &event.reason]);
        evict(&mut self.alike, BUDGETS, &slot, |a| a.since);
        let alike = self.alike.entry(slot).or_insert(Alike {
            messages: Vec::new(),
            since: now,
        });
        if now.saturating_sub(alike.since) > SIMILAR_WITHIN {
            *alike = Alike {
                messages: Vec::new(),
                since: now,
            };
        }
        let message = hash(&[&event.message]);
        if alike.messages.contains(&message) {
            return false;
        }
        if alike.messages.len() + 1 < SIMILAR {
            alike.messages.push(message);
            return false;
        }
        true
    }

    /// What to do about an Event of a Pod; `clock` bounds what a wrong clock of the edge says.
    pub(super) fn plan(
        &mut self,
        about: &About<'_>,
        event: &Event,
        now: Moment,
        clock: Timestamp,
    ) -> Plan {
        let key = about.key;
        let combined = self.combined(key, event, now);
        let text = cut(&event.message, MAX_MESSAGE);
        let message = if combined {
            format!("{COMBINED}{text}")
        } else {
            text.to_string()
        };
        let known_by = if combined { COMBINED } else { text };
        let path = event.field_path.as_str();
        let slot = hash(&[&key.uid, path, warning(event), &event.reason, known_by]);
        let is_same = |r: &Remembered| r.last == (event.sequence, event.last_ms);
        let old = self
            .remembered
            .get(&slot)
            .filter(|r| now.saturating_sub(r.at) < EVENT_TTL);
        match old {
            Some(old) if is_same(old) => return Plan::Counted,
            Some(_) | None => {}
        }
        if !self.admit(key, event, now) {
            return Plan::Drop;
        }
        match self
            .remembered
            .get(&slot)
            .filter(|r| now.saturating_sub(r.at) < EVENT_TTL)
        {
            Some(old) => {
                let body = json!({
                    "count": old.counted(event),
                    "lastTimestamp": time(event.last_ms, clock),
                    "message": message,
                });
                Plan::Count {
                    slot,
                    name: old.name.clone(),
                    body,
                }
            }
            None => {
                let name = name(key, &slot, event);
                let body = object(about, event, &name, &message, clock);
                Plan::Create { slot, name, body }
            }
        }
    }

    /// The API server has it.
    pub(super) fn written(&mut self, slot: Hash, name: String, event: &Event, now: Moment) {
        evict(&mut self.remembered, REMEMBERED, &slot, |r| r.at);
        let count = u64::from(event.count.max(1));
        let since_first = (event.first_ms, count);
        let last = (event.sequence, event.last_ms);
        match self.remembered.get_mut(&slot).filter(|r| r.name == name) {
            Some(old) => {
                old.count = old.counted(event);
                old.since_first = since_first;
                old.last = last;
                old.at = now;
            }
            None => {
                self.remembered.insert(
                    slot,
                    Remembered {
                        name,
                        count,
                        since_first,
                        last,
                        at: now,
                    },
                );
            }
        }
    }

    /// The Event that stood for this is gone from the API.
    pub(super) fn lost(&mut self, slot: &Hash) {
        self.remembered.remove(slot);
    }
}

/// Makes room for one more: the oldest goes.
fn evict<T>(map: &mut HashMap<Hash, T>, most: usize, slot: &Hash, at: impl Fn(&T) -> Moment) {
    if map.len() >= most && !map.contains_key(slot) {
        let oldest = map.iter().min_by_key(|(_, v)| at(v)).map(|(k, _)| *k);
        oldest.and_then(|k| map.remove(&k));
    }
}

fn warning(event: &Event) -> &'static str {
    if event.warning { "Warning" } else { "Normal" }
}

/// Unique, and the same for the same Event of an edge: a create whose answer was lost and that is
/// made again finds itself.
fn name(key: &ObjectKey, slot: &Hash, event: &Event) -> String {
    let text = format!("{}.{}.{}", event.sequence, event.first_ms, event.last_ms);
    let once = hash(&[&key.uid, &text]);
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    // A name has at most 253 characters, and no part of it may end with a dot or hyphen.
    let pod = cut(&key.name, 220).trim_end_matches(['.', '-']);
    format!("{pod}.{}{}", hex(&slot[..4]), hex(&once[..6]))
}

/// The edge's time of an Event; the cloud's when the edge has none or is ahead.
fn time(ms: i64, clock: Timestamp) -> String {
    let said = Timestamp::from_millisecond(ms)
        .ok()
        .filter(|t| ms > 0 && *t <= clock);
    rfc3339(said.unwrap_or(clock))
}

/// Whom an Event speaks of, and who speaks.
pub(super) struct About<'a> {
    pub(super) key: &'a ObjectKey,
    pub(super) node: &'a NodeName,
    /// The Pod's resourceVersion; 0 when the watch does not know it.
    pub(super) revision: u64,
}

fn object(about: &About<'_>, event: &Event, name: &str, message: &str, clock: Timestamp) -> Value {
    let key = about.key;
    let mut involved = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "namespace": key.namespace,
        "name": key.name,
        "uid": key.uid,
    });
    if about.revision > 0 {
        involved["resourceVersion"] = about.revision.to_string().into();
    }
    if !event.field_path.is_empty() {
        involved["fieldPath"] = cut(&event.field_path, MAX_FIELD_PATH).into();
    }
    json!({
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": key.namespace},
        "involvedObject": involved,
        "type": warning(event),
        "reason": cut(&event.reason, MAX_REASON),
        "message": message,
        "source": {"component": COMPONENT, "host": about.node},
        "reportingComponent": COMPONENT,
        "reportingInstance": about.node,
        "firstTimestamp": time(event.first_ms, clock),
        "lastTimestamp": time(event.last_ms, clock),
        "count": event.count.max(1),
    })
}

/// Whether the node may speak of this Pod: it is bound there, or was when it reported it.
pub(super) fn may_speak(
    node: &NodeName,
    key: &ObjectKey,
    view: Option<&PodView>,
    held: bool,
) -> bool {
    let pod = key.kind == Kind::Pod && !key.uid.is_empty();
    pod && match view {
        Some(view) => {
            view.node == *node && view.namespace == key.namespace && view.name == key.name
        }
        None => held,
    }
}

/// Writes a session's Events in their order.
pub(super) struct Writer {
    pub(super) shared: Arc<Shared>,
    pub(super) node: NodeName,
    pub(super) session: u64,
    pub(super) claim: Arc<dyn Fresh>,
    pub(super) correlator: Arc<Mutex<Correlator>>,
}

impl Writer {
    /// The sequence up to which all are in the API or dropped; 0 when none is. Ends early when the
    /// session does.
    pub(super) async fn write(self, events: Vec<Event>) -> u64 {
        // One batch at a time: their order is the Events' order.
        let mut correlator = self.correlator.lock().await;
        let mut done = 0;
        for event in &events {
            let Some(key) = self.key(event) else {
                self.shared.count(Counter::EventsDropped);
                done = event.sequence;
                continue;
            };
            if !self.one(&mut correlator, &key, event).await {
                break;
            }
            done = event.sequence;
        }
        done
    }

    fn key(&self, event: &Event) -> Option<ObjectKey> {
        let key = ObjectKey::parse(&event.pod).ok()?;
        let view = self.shared.pods.pod(&key.uid);
        let held = self
            .shared
            .reports(&self.node, |r| r.held.contains_key(&key));
        may_speak(&self.node, &key, view.as_ref(), held).then_some(key)
    }

    /// False when the session has ended.
    async fn one(&self, correlator: &mut Correlator, key: &ObjectKey, event: &Event) -> bool {
        let shared = &self.shared;
        let revision = shared.pods.pod(&key.uid).map_or(0, |p| p.resource_version);
        let about = About {
            key,
            node: &self.node,
            revision,
        };
        let mut plan = correlator.plan(&about, event, shared.moment(), shared.now());
        let mut tries = 0;
        loop {
            let (slot, name, call, creates) = match plan.clone() {
                Plan::Counted => return true,
                Plan::Drop => {
                    shared.count(Counter::EventsDropped);
                    return true;
                }
                Plan::Create { slot, name, body } => {
                    let namespace = key.namespace.to_string();
                    (slot, name, Call::CreateEvent { namespace, body }, true)
                }
                Plan::Count { slot, name, body } => {
                    let namespace = key.namespace.to_string();
                    (
                        slot,
                        name.clone(),
                        Call::PatchEvent {
                            namespace,
                            name,
                            body,
                        },
                        false,
                    )
                }
            };
            let Some(answer) = self.send(call).await else {
                return false;
            };
            let error = match answer {
                Ok(_) => None,
                // The answer to an earlier try was lost.
                Err(WriteError::Exists) if creates => None,
                Err(error) => Some(error),
            };
            let Some(error) = error else {
                correlator.written(slot, name, event, shared.moment());
                shared.count(Counter::EventsWritten);
                return true;
            };
            if error == WriteError::Missing && !creates {
                correlator.lost(&slot);
                let again = correlator.plan(&about, event, shared.moment(), shared.now());
                plan = again;
                continue;
            }
            match self.after(key, &error, tries) {
                None => {
                    shared.count(Counter::EventsDropped);
                    return true;
                }
                Some(delay) => tokio::time::sleep(delay).await,
            }
            tries += 1;
        }
    }

    /// How long to wait before the next try; `None` drops the Event.
    fn after(&self, key: &ObjectKey, error: &WriteError, tries: u32) -> Option<Duration> {
        let retry = match error {
            WriteError::Busy { .. } | WriteError::Unavailable(_) => error.retry(),
            WriteError::Forbidden(_) | WriteError::Conflict if tries < MAX_TRIES => Retry::Later,
            WriteError::Invalid(why) => {
                warn!(node = %self.node, %key, why, "the API server refuses an Event");
                return None;
            }
            WriteError::Forbidden(_)
            | WriteError::Conflict
            | WriteError::Missing
            | WriteError::NamespaceEnding
            | WriteError::AnotherObject
            | WriteError::Exists => {
                debug!(node = %self.node, %key, %error, "an Event is dropped");
                return None;
            }
        };
        back_off(retry, tries, rand::random())
    }

    /// `None` when the session has ended.
    async fn send(&self, call: Call) -> Option<Result<Value, WriteError>> {
        loop {
            if !self.shared.is_current(&self.node, self.session) {
                return None;
            }
            if self.claim.fresh() {
                break;
            }
            self.shared.count(Counter::NotFresh);
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let _permit = self.shared.aside.acquire().await.ok()?;
        Some(self.shared.writer.send(&self.node, call).await)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: &str = "2026-11-23T12:00:00Z";

    fn clock() -> Timestamp {
        NOW.parse().unwrap()
    }

    fn key() -> ObjectKey {
        ObjectKey::pod("shop", "web-0", "u-1")
    }

    fn event(sequence: u64, message: &str) -> Event {
        Event {
            sequence,
            pod: key().to_string(),
            field_path: "spec.containers{web}".into(),
            warning: true,
            reason: "BackOff".into(),
            message: message.into(),
            count: 2,
            first_ms: 1_700_000_000_000 + sequence as i64,
            last_ms: 1_700_000_001_000 + sequence as i64,
        }
    }

    fn at(seconds: u64) -> Moment {
        Duration::from_secs(seconds)
    }

    fn plan(c: &mut Correlator, e: &Event, now: Moment) -> Plan {
        let node = NodeName::parse("edge-1").unwrap();
        let about = About {
            key: &key(),
            node: &node,
            revision: 42,
        };
        c.plan(&about, e, now, clock())
    }

    /// Plans and writes; gives the verb.
    fn write(c: &mut Correlator, e: &Event, now: Moment) -> &'static str {
        match plan(c, e, now) {
            Plan::Drop => "drop",
            Plan::Counted => "counted",
            Plan::Create { slot, name, .. } => {
                c.written(slot, name, e, now);
                "create"
            }
            Plan::Count { slot, name, .. } => {
                c.written(slot, name, e, now);
                "count"
            }
        }
    }

    #[test]
    fn an_event_is_what_a_kubelet_would_have_written() {
        let Plan::Create { name, body, .. } =
            plan(&mut Correlator::default(), &event(1, "m"), at(0))
        else {
            panic!("not created");
        };
        assert!(
            name.starts_with("web-0.") && name.len() == "web-0.".len() + 20,
            "{name}"
        );
        let want = json!({
            "apiVersion": "v1", "kind": "Event",
            "metadata": {"name": name, "namespace": "shop"},
            "involvedObject": {"apiVersion": "v1", "kind": "Pod", "namespace": "shop",
                "name": "web-0", "uid": "u-1", "resourceVersion": "42",
                "fieldPath": "spec.containers{web}"},
            "type": "Warning", "reason": "BackOff", "message": "m",
            "source": {"component": "kubelet", "host": "edge-1"},
            "reportingComponent": "kubelet", "reportingInstance": "edge-1",
            "firstTimestamp": "2023-11-14T22:13:20Z", "lastTimestamp": "2023-11-14T22:13:21Z",
            "count": 2,
        });
        assert_eq!(body, want);
    }

    #[test]
    fn the_same_again_is_counted() {
        let mut c = Correlator::default();
        assert_eq!(write(&mut c, &event(1, "m"), at(0)), "create");
        let Plan::Count { body, .. } = plan(&mut c, &event(2, "m"), at(1)) else {
            panic!("not counted");
        };
        assert_eq!(
            body,
            json!({"count": 4, "lastTimestamp": "2023-11-14T22:13:21Z", "message": "m"})
        );
        assert_eq!(write(&mut c, &event(2, "m"), at(1)), "count");
        assert_eq!(
            write(&mut c, &event(2, "m"), at(2)),
            "counted",
            "its acknowledgement was lost"
        );
        assert_eq!(write(&mut c, &event(3, "other"), at(2)), "create");
        assert_eq!(
            write(&mut c, &event(4, "m"), at(4000)),
            "create",
            "the API has forgotten it"
        );
    }

    /// An edge merges an Event into one that waits for its acknowledgement, also when that was
    /// sent: the same occurrences come again in the greater count.
    #[test]
    fn what_an_edge_counts_again_is_counted_once() {
        let mut c = Correlator::default();
        let told = |sequence, count, first_ms| Event {
            count,
            first_ms,
            last_ms: first_ms + i64::try_from(sequence).unwrap(),
            ..event(sequence, "m")
        };
        for (event, want) in [
            (told(1, 1, 1_700_000_000_000), None),
            (told(2, 2, 1_700_000_000_000), Some(2)),
            (told(3, 5, 1_700_000_000_000), Some(5)),
            // Acknowledged in between: the edge counts anew.
            (told(4, 1, 1_700_000_100_000), Some(6)),
            (told(5, 3, 1_700_000_100_000), Some(8)),
        ] {
            let count = match plan(&mut c, &event, at(1)) {
                Plan::Count { body, .. } => body["count"].as_u64(),
                Plan::Create { .. } | Plan::Drop | Plan::Counted => None,
            };
            assert_eq!(count, want, "{event:?}");
            write(&mut c, &event, at(1));
        }
    }

    #[test]
    fn names_are_unique_and_repeatable() {
        let name = |e: &Event| match plan(&mut Correlator::default(), e, at(0)) {
            Plan::Create { name, .. } => name,
            other => panic!("{other:?}"),
        };
        assert_eq!(name(&event(1, "m")), name(&event(1, "m")));
        assert_ne!(name(&event(1, "m")), name(&event(2, "m")));
        assert_ne!(name(&event(1, "m")), name(&event(1, "n")));
    }

    #[test]
    fn spam_is_dropped_for_each_pod_and_reason() {
        let mut c = Correlator::default();
        let verbs: Vec<_> = (0..27)
            .map(|n| write(&mut c, &event(n, "m"), at(0)))
            .collect();
        assert_eq!(verbs[24..], ["count", "drop", "drop"]);
        let mut other = event(50, "m");
        other.reason = "Failed".into();
        assert_eq!(write(&mut c, &other, at(0)), "create");
        assert_eq!(write(&mut c, &event(60, "m"), at(300)), "count");
        assert_eq!(write(&mut c, &event(61, "m"), at(300)), "drop");
    }

    #[test]
    fn many_similar_ones_become_one() {
        let mut c = Correlator::default();
        for n in 0..9 {
            assert_eq!(write(&mut c, &event(n, &format!("m{n}")), at(0)), "create");
        }
        let Plan::Create { body, .. } = plan(&mut c, &event(9, "m9"), at(1)) else {
            panic!("not created");
        };
        assert_eq!(body["message"], format!("{COMBINED}m9"));
        assert_eq!(write(&mut c, &event(9, "m9"), at(1)), "create");
        assert_eq!(write(&mut c, &event(10, "m10"), at(1)), "count");
        assert_eq!(
            write(&mut c, &event(11, "m3"), at(1)),
            "count",
            "its own, not the combined"
        );
        assert_eq!(write(&mut c, &event(12, "m12"), at(700)), "create");
    }

    #[test]
    fn memory_is_bounded() {
        let mut c = Correlator::default();
        for n in 0..500 {
            let mut e = event(n, &n.to_string());
            e.reason = n.to_string();
            write(&mut c, &e, at(n));
        }
        assert_eq!(c.remembered.len(), REMEMBERED);
        assert_eq!((c.budgets.len(), c.alike.len()), (BUDGETS, BUDGETS));
        assert_eq!(
            write(
                &mut c,
                &{
                    let mut e = event(900, "499");
                    e.reason = "499".into();
                    e
                },
                at(500)
            ),
            "count"
        );
    }

    #[test]
    fn a_wrong_clock_is_bounded_by_the_clouds() {
        for (ms, want) in [
            (0, NOW),
            (-5, NOW),
            (i64::MAX, NOW),
            (4_000_000_000_000, NOW),
            (1_700_000_000_999, "2023-11-14T22:13:20Z"),
        ] {
            assert_eq!(time(ms, clock()), want);
        }
    }

    #[test]
    fn a_node_speaks_of_its_own_pods() {
        let node = NodeName::parse("edge-1").unwrap();
        let view = |node: &str, name: &str| PodView {
            namespace: "shop".into(),
            name: name.into(),
            uid: "u-1".into(),
            resource_version: 1,
            node: NodeName::parse(node).unwrap(),
            deleting: false,
            service_account: "default".into(),
            status: Arc::from(*b"{}"),
        };
        for (view, held, want) in [
            (Some(view("edge-1", "web-0")), false, true),
            (Some(view("edge-2", "web-0")), true, false),
            (Some(view("edge-1", "web-1")), true, false),
            (None, true, true),
            (None, false, false),
        ] {
            assert_eq!(may_speak(&node, &key(), view.as_ref(), held), want);
        }
        let secret = ObjectKey::named(Kind::Secret, "shop", "x");
        assert!(!may_speak(&node, &secret, None, true));
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        let mut e = event(1, &"ä".repeat(5000));
        e.reason = "R".repeat(500);
        let Plan::Create { body, .. } = plan(&mut Correlator::default(), &e, at(0)) else {
            panic!("not created");
        };
        assert_eq!(body["message"].as_str().unwrap().len(), MAX_MESSAGE);
        assert_eq!(body["reason"].as_str().unwrap().len(), MAX_REASON);
    }
}
