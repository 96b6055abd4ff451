//! What two statuses differ in, over the fields that a node owns and the way the API server keeps
//! them: the shared body of the Pod's and the Node's comparison.
//!
//! - Takes: the status that the API server holds, the status that the node reports, the time.
//! - Gives: pieces of a strategic merge patch; a fingerprint of a difference that would not go away.
//! - Never: looks at a clock, or lets a difference through that is none: the server writes empty
//!   strings, nulls and `{}` where a report leaves the field out, and cuts times to whole seconds.

use common::object::{Content, ContentHash};
use jiff::Timestamp;
use serde_json::{Map, Value, json};

/// How a field of a status is compared and sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rule {
    /// The whole value replaces what is there.
    Whole,
    /// A list that a strategic merge would merge by key: sent with `$patch: replace`.
    KeyedList,
    /// An object whose named members are set; members of others stay.
    Members,
    /// Set once, never changed: the server or an earlier report has it.
    Once,
}

/// One field that a node owns.
#[derive(Debug, Clone, Copy)]
pub(super) struct Field {
    pub(super) name: &'static str,
    pub(super) rule: Rule,
    /// A report without it removes it from the API.
    pub(super) removable: bool,
}

/// Whose conditions a report speaks for.
pub(super) struct Conditions {
    pub(super) owned: fn(&str) -> bool,
    /// Removed when the report leaves them out.
    pub(super) removable: &'static [&'static str],
}

/// Fields that hold a `metav1.Time`, which has whole seconds.
const TIMES: &[&str] = &[
    "startTime",
    "startedAt",
    "finishedAt",
    "lastTransitionTime",
    "lastProbeTime",
    "lastHeartbeatTime",
];
/// Present or absent is the message here, also when the object is empty.
const STATES: &[&str] = &["running", "waiting", "terminated"];
/// What says when something was looked at, not what was seen.
const CONDITION_TIMES: &[&str] = &["lastTransitionTime", "lastProbeTime", "lastHeartbeatTime"];

/// A time as the API server writes it.
pub(super) fn rfc3339(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// The form in which two values are compared; `None` is what counts as not there.
pub(super) fn tidy(key: &str, value: &Value) -> Option<Value> {
    match value {
        Value::Null => None,
        Value::String(text) if text.is_empty() => None,
        Value::String(text) if TIMES.contains(&key) => {
            let cut = text.parse().map_or_else(|_| text.clone(), rfc3339);
            Some(Value::String(cut))
        }
        Value::Array(items) if items.is_empty() => None,
        Value::Array(items) => {
            let tidied = items.iter().map(|v| tidy("", v).unwrap_or(Value::Null));
            Some(Value::Array(tidied.collect()))
        }
        Value::Object(members) => {
            let tidied: Map<_, _> = members
                .iter()
                .filter_map(|(k, v)| Some((k.clone(), tidy(k, v)?)))
                .collect();
            (!tidied.is_empty() || STATES.contains(&key)).then_some(Value::Object(tidied))
        }
        Value::Bool(_) | Value::Number(_) | Value::String(_) => Some(value.clone()),
    }
}

/// The part of a patch for one owned field; `None` when the server has it already.
pub(super) fn field(field: Field, current: &Value, report: &Value) -> Option<Value> {
    let there = current.get(field.name).and_then(|v| tidy(field.name, v));
    let said = report.get(field.name).and_then(|v| tidy(field.name, v));
    match (there, said) {
        (None, None) => None,
        (Some(_), None) => field.removable.then_some(Value::Null),
        (Some(a), Some(b)) if a == b => None,
        (there, Some(said)) => match field.rule {
            Rule::Whole => Some(replaced(there.as_ref(), &report[field.name])),
            Rule::Once => there.is_none().then(|| report[field.name].clone()),
            Rule::Members => members(there.as_ref(), &said),
            Rule::KeyedList => {
                let items = report[field.name].as_array().cloned().unwrap_or_default();
                let replace = std::iter::once(json!({"$patch": "replace"}));
                Some(replace.chain(items).collect())
            }
        },
    }
}

/// A value that replaces another whole: a strategic merge would merge an object into the old one.
fn replaced(there: Option<&Value>, value: &Value) -> Value {
    match (there, value) {
        (Some(Value::Object(_)), Value::Object(members)) => {
            let mut members = members.clone();
            members.insert("$patch".into(), "replace".into());
            Value::Object(members)
        }
        _ => value.clone(),
    }
}

/// The members of `said` that differ, as deep as objects go.
fn members(there: Option<&Value>, said: &Value) -> Option<Value> {
    let Value::Object(said) = said else {
        return Some(said.clone());
    };
    let differing = said.iter().filter_map(|(name, value)| {
        let old = there.and_then(|t| t.get(name));
        let part = match (old, value) {
            (Some(old), value) if old == value => None,
            (old, Value::Object(_)) => members(old, value),
            (_, value) => Some(value.clone()),
        };
        Some((name.clone(), part?))
    });
    let differing: Map<_, _> = differing.collect();
    (!differing.is_empty()).then_some(Value::Object(differing))
}

/// The conditions to send, merged by type, so that conditions of others stay as they are.
///
/// `lastTransitionTime` moves only when the condition's status does, and never backwards: a node
/// that repeats an old report after somebody else flipped the condition gets the cloud's time.
pub(super) fn conditions(
    whose: &Conditions,
    current: &Value,
    report: &Value,
    now: Timestamp,
) -> Vec<Value> {
    let said = listed(report);
    let mut parts: Vec<Value> = Vec::new();
    for (at, (kind, condition)) in said.iter().enumerate() {
        let repeated = said[at + 1..].iter().any(|(later, _)| later == kind);
        if repeated || !(whose.owned)(kind) {
            continue;
        }
        let there = find(current, kind);
        if there.map(judged) != Some(judged(condition)) {
            parts.push(merged(there, condition, now));
        }
    }
    // A report without the list says nothing of conditions; an empty list says that there is none.
    let silent = report.get("conditions").is_none_or(Value::is_null);
    for kind in whose.removable.iter().filter(|_| !silent) {
        let is_said = said.iter().any(|(k, _)| k == kind);
        if !is_said && find(current, kind).is_some() {
            parts.push(json!({"type": kind, "$patch": "delete"}));
        }
    }
    parts
}

/// The conditions of a status with their types; what has no type is no condition.
pub(super) fn listed(status: &Value) -> Vec<(&str, &Map<String, Value>)> {
    let all = status.get("conditions").and_then(Value::as_array);
    all.into_iter()
        .flatten()
        .filter_map(|c| {
            let map = c.as_object()?;
            let kind = map.get("type")?.as_str().filter(|k| !k.is_empty())?;
            Some((kind, map))
        })
        .collect()
}

fn find<'a>(status: &'a Value, kind: &str) -> Option<&'a Map<String, Value>> {
    let all = listed(status);
    all.into_iter().find(|(k, _)| *k == kind).map(|(_, c)| c)
}

/// A condition without its times: what is compared.
fn judged(condition: &Map<String, Value>) -> Map<String, Value> {
    condition
        .iter()
        .filter(|(k, _)| !CONDITION_TIMES.contains(&k.as_str()))
        .filter_map(|(k, v)| Some((k.clone(), tidy(k, v)?)))
        .collect()
}

fn merged(there: Option<&Map<String, Value>>, said: &Map<String, Value>, now: Timestamp) -> Value {
    let time = |c: &Map<String, Value>| -> Option<Timestamp> {
        c.get("lastTransitionTime")?.as_str()?.parse().ok()
    };
    let status = |c: &Map<String, Value>| c.get("status").cloned();
    let changed = match there {
        None => time(said).unwrap_or(now),
        Some(old) if status(old) == status(said) => time(old).or(time(said)).unwrap_or(now),
        Some(old) => match (time(old), time(said)) {
            (old, Some(said)) if old.is_none_or(|old| said > old) => said,
            (_, Some(_) | None) => now,
        },
    };
    let mut part = judged(said);
    for name in there
        .into_iter()
        .flat_map(|old| judged(old).into_iter().map(|(k, _)| k))
    {
        part.entry(name).or_insert(Value::Null);
    }
    part.insert("lastTransitionTime".into(), rfc3339(changed).into());
    Value::Object(part)
}

/// Stands for a difference that is still there after the server took the patch: the fields that it
/// drops or rewrites. The same difference over the same state is not sent again.
pub(super) fn fingerprint(patch: &Value, current: &Value) -> ContentHash {
    let mut seen = Map::new();
    let named = patch.as_object().into_iter().flatten();
    for (name, _) in named.clone().filter(|(name, _)| *name != "conditions") {
        let value = current.get(name).and_then(|v| tidy(name, v));
        seen.insert(name.clone(), value.unwrap_or(Value::Null));
    }
    let parts = listed(patch);
    let of_current: Map<_, _> = parts
        .iter()
        .filter_map(|(kind, _)| Some((kind.to_string(), judged(find(current, kind)?).into())))
        .collect();
    let of_patch: Vec<Value> = parts
        .iter()
        .map(|(_, c)| Value::Object(judged(c)))
        .collect();
    let rest: Map<_, _> = named
        .filter(|(name, _)| *name != "conditions")
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect();
    let mut all = json!([rest, of_patch, seen, of_current]);
    all.sort_all_objects();
    ContentHash::of(&Content::Present(all.to_string().into_bytes().into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_server_writes_for_nothing_counts_as_nothing() {
        for (key, value, want) in [
            ("reason", json!(""), None),
            ("x", json!(null), None),
            ("x", json!([]), None),
            ("lastState", json!({}), None),
            (
                "state",
                json!({"waiting": {}}),
                Some(json!({"waiting": {}})),
            ),
            ("ready", json!(false), Some(json!(false))),
            ("restartCount", json!(0), Some(json!(0))),
            (
                "a",
                json!({"b": "", "c": 1, "d": null}),
                Some(json!({"c": 1})),
            ),
            (
                "startTime",
                json!("2026-11-23T10:00:00.987654321Z"),
                Some(json!("2026-11-23T10:00:00Z")),
            ),
            (
                "startTime",
                json!("2026-11-23T12:00:00+02:00"),
                Some(json!("2026-11-23T10:00:00Z")),
            ),
            ("startTime", json!("yesterday"), Some(json!("yesterday"))),
            (
                "message",
                json!("2026-11-23T10:00:00.5Z"),
                Some(json!("2026-11-23T10:00:00.5Z")),
            ),
        ] {
            assert_eq!(tidy(key, &value), want, "{key} {value}");
        }
    }

    #[test]
    fn a_fingerprint_tells_states_apart_and_forgets_order_and_times() {
        let patch = json!({"a": {"x": 1, "y": 2}, "conditions": [
            {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}]});
        let again = json!({"a": {"y": 2, "x": 1}, "conditions": [
            {"type": "Ready", "status": "True", "lastTransitionTime": "2026-02-02T00:00:00Z"}]});
        let current = json!({"b": 1, "conditions": [{"type": "Other", "status": "True"}]});
        let same = json!({"b": 2, "conditions": []});
        assert_eq!(fingerprint(&patch, &current), fingerprint(&again, &same));
        let moved = json!({"a": {"x": 9}});
        let flipped = json!({"conditions": [{"type": "Ready", "status": "False"}]});
        assert_ne!(fingerprint(&patch, &current), fingerprint(&patch, &moved));
        assert_ne!(fingerprint(&patch, &current), fingerprint(&patch, &flipped));
        assert_ne!(fingerprint(&patch, &current), fingerprint(&moved, &current));
    }
}
