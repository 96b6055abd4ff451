//! What to write to the API server about one Pod, given what it holds and what the node reports.
//!
//! - Takes: the last report, the Pod as known (watch or last answer, whichever is newer), the time.
//! - Gives: one [`Step`] at a time; after its answer the next one is decided anew.
//! - Never: does I/O, moves a terminal phase back, touches conditions that a node does not own, or
//!   deletes anything but a Pod that is being deleted and of which nothing is left on the device.
//!
//! ```text
//!  report ─► unknown? ── Ask ──► differs? ── Patch ──► gone and being deleted? ── Delete ──► Settled
//! ```

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::difference::{self, Conditions, Field, Rule};

const fn field(name: &'static str, rule: Rule, removable: bool) -> Field {
    Field {
        name,
        rule,
        removable,
    }
}

/// What a node owns of `PodStatus`. Container statuses are never removed: a node that says nothing
/// of them has nothing to say.
const FIELDS: &[Field] = &[
    field("phase", Rule::Whole, false),
    field("reason", Rule::Whole, true),
    field("message", Rule::Whole, true),
    field("observedGeneration", Rule::Whole, false),
    field("hostIP", Rule::Whole, false),
    field("hostIPs", Rule::KeyedList, false),
    field("podIP", Rule::Whole, true),
    field("podIPs", Rule::KeyedList, true),
    field("startTime", Rule::Whole, false),
    // Immutable: the API server computes it when the Pod is created.
    field("qosClass", Rule::Once, false),
    field("initContainerStatuses", Rule::Whole, false),
    field("containerStatuses", Rule::Whole, false),
    field("ephemeralContainerStatuses", Rule::Whole, false),
    field("resize", Rule::Whole, true),
    field("allocatedResources", Rule::Whole, true),
    field("resources", Rule::Whole, true),
];
const CONTAINER_LISTS: &[&str] = &[
    "initContainerStatuses",
    "containerStatuses",
    "ephemeralContainerStatuses",
];

/// The kubelet's condition types; those of the first list go when the node no longer says them.
/// `PodScheduled` is also the scheduler's and `DisruptionTarget` also a controller's: they stay.
const OWN: &[&str] = &[
    "PodReadyToStartContainers",
    "Initialized",
    "ContainersReady",
    "Ready",
    "PodResizePending",
    "PodResizeInProgress",
    "AllContainersRestarting",
];
const SHARED: &[&str] = &["PodScheduled", "DisruptionTarget"];

const CONDITIONS: Conditions = Conditions {
    owned: |kind| OWN.contains(&kind) || SHARED.contains(&kind),
    removable: OWN,
};

/// The strategic merge patch of `status` that makes `current` say what `report` says, or `None`
/// when it does already.
///
/// Only fields and conditions that a node owns are compared and sent. `now` is the cloud's time,
/// for a transition that the report does not date.
pub(super) fn status_patch(current: &Value, report: &Value, now: Timestamp) -> Option<Value> {
    let mut patch = Map::new();
    let backwards = is_terminal(current) && phase(current) != phase(report);
    for one in FIELDS {
        let frozen = backwards && ["phase", "reason", "message"].contains(&one.name);
        let revived = CONTAINER_LISTS.contains(&one.name)
            && is_terminal(current)
            && revives(&current[one.name], &report[one.name]);
        if frozen || revived {
            continue;
        }
        if let Some(part) = difference::field(*one, current, report) {
            patch.insert(one.name.into(), part);
        }
    }
    // A late report of a Pod that ended cannot make it Ready again.
    let stale = backwards && !is_terminal(report);
    let conditions = difference::conditions(&CONDITIONS, current, report, now);
    if !conditions.is_empty() && !stale {
        patch.insert("conditions".into(), conditions.into());
    }
    (!patch.is_empty()).then_some(Value::Object(patch))
}

fn phase(status: &Value) -> Option<&str> {
    status.get("phase")?.as_str()
}

fn is_terminal(status: &Value) -> bool {
    matches!(phase(status), Some("Succeeded" | "Failed"))
}

/// Whether a container that has ended would run or wait again.
fn revives(current: &Value, report: &Value) -> bool {
    let ended = |c: &Value| c.pointer("/state/terminated").is_some_and(|t| !t.is_null());
    let list = |v: &Value| v.as_array().cloned().unwrap_or_default();
    let said = list(report);
    list(current).iter().filter(|c| ended(c)).any(|old| {
        let same = |c: &&Value| c.get("name") == old.get("name");
        said.iter().find(same).is_some_and(|c| !ended(c))
    })
}

/// What the node says of one Pod.
#[derive(Debug, Clone, Copy)]
pub(super) struct Said<'a> {
    pub(super) uid: &'a str,
    pub(super) status: &'a Value,
    pub(super) gone: bool,
}

/// A Pod as the API server holds it, as far as this replica has seen.
#[derive(Debug, Clone, Copy)]
pub(super) struct Known<'a> {
    pub(super) resource_version: u64,
    pub(super) deleting: bool,
    pub(super) status: &'a Value,
}

/// The next thing to do about a Pod.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Step {
    /// A patch that changes nothing: its answer is the Pod, 404, or 422 for another UID. A node may
    /// send it where it may not read the Pod, and it is never behind.
    Ask(Value),
    Patch(Value),
    Delete,
    /// The API server holds what the report says. `finished`: nothing will follow.
    Settled {
        finished: bool,
    },
}

/// `dropped` says whether this very difference, over this very state, is what was left after the
/// last write: what the server does not keep is not sent again.
pub(super) fn next(
    said: Said<'_>,
    known: Option<Known<'_>>,
    deleted: bool,
    dropped: impl Fn(&Value, &Value) -> bool,
    now: Timestamp,
) -> Step {
    let Some(known) = known else {
        return Step::Ask(json!({"metadata": {"uid": said.uid}}));
    };
    let patch = status_patch(known.status, said.status, now);
    if let Some(status) = patch.filter(|p| !dropped(p, known.status)) {
        let revision = known.resource_version.to_string();
        let body = json!({
            "metadata": {"uid": said.uid, "resourceVersion": revision},
            "status": status,
        });
        return Step::Patch(body);
    }
    match (said.gone, known.deleting) {
        (true, true) if !deleted => Step::Delete,
        (true, true) => Step::Settled { finished: true },
        // The device has cleaned up a Pod that the API has not begun to delete, or of which this
        // replica has not seen it yet: the report is held until the deletion shows.
        (true, false) | (false, _) => Step::Settled { finished: false },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: &str = "2026-11-23T12:00:00Z";

    fn now() -> Timestamp {
        NOW.parse().unwrap()
    }

    fn patch(current: Value, report: Value) -> Option<Value> {
        status_patch(&current, &report, now())
    }

    fn ready(status: &str, at: &str) -> Value {
        json!({"type": "Ready", "status": status, "lastProbeTime": null, "lastTransitionTime": at})
    }

    const T1: &str = "2026-11-23T10:00:00Z";
    const T2: &str = "2026-11-23T11:00:00Z";

    #[test]
    fn plain_fields() {
        let one_ip = json!([{"ip": "10.0.0.1"}]);
        let table = [
            ("nothing said, nothing there", json!({}), json!({}), None),
            (
                "a first report",
                json!({"phase": "Pending", "qosClass": "BestEffort"}),
                json!({"phase": "Running", "qosClass": "BestEffort", "hostIP": "1.2.3.4"}),
                Some(json!({"phase": "Running", "hostIP": "1.2.3.4"})),
            ),
            (
                "equal but for empties and fractions",
                json!({"phase": "Running", "startTime": T1, "message": "",
                    "containerStatuses": [{"name": "a", "lastState": {}, "imageID": ""}]}),
                json!({"phase": "Running", "startTime": "2026-11-23T10:00:00.5Z",
                    "containerStatuses": [{"name": "a"}], "podIPs": []}),
                None,
            ),
            (
                "reason and message go",
                json!({"phase": "Running", "reason": "a", "message": "b"}),
                json!({"phase": "Running"}),
                Some(json!({"reason": null, "message": null})),
            ),
            (
                "start time, phase, host and containers stay when the report is silent",
                json!({"phase": "Running", "startTime": T1, "hostIP": "1.1.1.1",
                    "containerStatuses": [{"name": "a"}]}),
                json!({}),
                None,
            ),
            (
                "the QoS class is the server's",
                json!({"qosClass": "Burstable"}),
                json!({"qosClass": "BestEffort"}),
                None,
            ),
            (
                "but sent once",
                json!({}),
                json!({"qosClass": "Burstable"}),
                Some(json!({"qosClass": "Burstable"})),
            ),
            (
                "fields of others are never sent nor removed",
                json!({"nominatedNodeName": "x", "resourceClaimStatuses": [{"name": "c"}]}),
                json!({"nominatedNodeName": "y", "resourceClaimStatuses": [], "unheardOf": 1}),
                None,
            ),
            (
                "observedGeneration",
                json!({"observedGeneration": 1}),
                json!({"observedGeneration": 2}),
                Some(json!({"observedGeneration": 2})),
            ),
            (
                "Pod addresses replace the list that a merge would keep",
                json!({"podIP": "10.0.0.1", "podIPs": one_ip, "hostIPs": [{"ip": "1.1.1.1"}]}),
                json!({"podIP": "10.0.0.2", "podIPs": [{"ip": "10.0.0.2"}],
                    "hostIPs": [{"ip": "2.2.2.2"}]}),
                Some(json!({
                    "hostIPs": [{"$patch": "replace"}, {"ip": "2.2.2.2"}],
                    "podIP": "10.0.0.2",
                    "podIPs": [{"$patch": "replace"}, {"ip": "10.0.0.2"}],
                })),
            ),
            (
                "a Pod that lost its sandbox has no address",
                json!({"podIP": "10.0.0.1", "podIPs": one_ip}),
                json!({"podIP": "", "podIPs": []}),
                Some(json!({"podIP": null, "podIPs": null})),
            ),
        ];
        for (name, current, report, want) in table {
            assert_eq!(patch(current, report), want, "{name}");
        }
    }

    #[test]
    fn container_lists_are_replaced_whole() {
        let a = json!({"name": "a", "ready": true, "state": {"running": {"startedAt": T1}}});
        let b = json!({"name": "b", "ready": false, "state": {"waiting": {"reason": "x"}}});
        let b2 = json!({"name": "b", "ready": true, "state": {"running": {"startedAt": T1}}});
        for list in CONTAINER_LISTS {
            let got = patch(json!({*list: [a, b]}), json!({*list: [a, b2]}));
            assert_eq!(got, Some(json!({*list: [a, b2]})), "{list}");
            assert_eq!(patch(json!({*list: [a, b]}), json!({*list: [a, b]})), None);
        }
    }

    #[test]
    fn conditions_merge_by_type() {
        let gate = json!({"type": "example.com/gate", "status": "True"});
        let target = json!({"type": "DisruptionTarget", "status": "True", "reason": "Eviction"});
        let scheduled = json!({"type": "PodScheduled", "status": "True"});
        let cond = |all: Value| json!({"conditions": all});
        let table = [
            (
                "the same",
                json!([ready("True", T1)]),
                json!([ready("True", T2)]),
                None,
            ),
            (
                "those of others stay, and none of theirs is sent",
                json!([gate, target, scheduled, ready("True", T1)]),
                json!([ready("True", T1), {"type": "example.com/gate", "status": "False"}]),
                None,
            ),
            (
                "a change takes the report's time when it is later",
                json!([ready("False", T1)]),
                json!([ready("True", T2)]),
                Some(json!([{"type": "Ready", "status": "True", "lastTransitionTime": T2}])),
            ),
            (
                "flipped by NodeLifecycle after the report: repaired with the cloud's time",
                json!([ready("False", T2)]),
                json!([ready("True", T1)]),
                Some(json!([{"type": "Ready", "status": "True", "lastTransitionTime": NOW}])),
            ),
            (
                "the transition stays when only the reason changes, and an old reason goes",
                json!([{"type": "Ready", "status": "False", "reason": "A", "message": "m",
                    "lastTransitionTime": T1}]),
                json!([{"type": "Ready", "status": "False", "reason": "B",
                    "lastTransitionTime": T2}]),
                Some(
                    json!([{"type": "Ready", "status": "False", "reason": "B", "message": null,
                    "lastTransitionTime": T1}]),
                ),
            ),
            (
                "a new one, undated",
                json!([]),
                json!([{"type": "Initialized", "status": "True"}]),
                Some(json!([{"type": "Initialized", "status": "True", "lastTransitionTime": NOW}])),
            ),
            (
                "the node's own go when it no longer says them",
                json!([{"type": "PodResizePending", "status": "True"}, target, scheduled]),
                json!([]),
                Some(json!([{"type": "PodResizePending", "$patch": "delete"}])),
            ),
            (
                "observedGeneration counts as content",
                json!([{"type": "Ready", "status": "True", "observedGeneration": 1,
                    "lastTransitionTime": T1}]),
                json!([{"type": "Ready", "status": "True", "observedGeneration": 2}]),
                Some(
                    json!([{"type": "Ready", "status": "True", "observedGeneration": 2,
                    "lastTransitionTime": T1}]),
                ),
            ),
            (
                "said twice: the last one counts",
                json!([ready("True", T1)]),
                json!([ready("False", T1), ready("True", T1)]),
                None,
            ),
            (
                "malformed ones are passed over",
                json!([]),
                json!([1, {"status": "True"}, null]),
                None,
            ),
        ];
        for (name, current, report, want) in table {
            let want = want.map(cond);
            assert_eq!(patch(cond(current), cond(report)), want, "{name}");
        }
    }

    #[test]
    fn a_terminal_phase_never_moves_back() {
        let ended = json!([{"name": "a", "state": {"terminated": {"exitCode": 0}}}]);
        let runs = json!([{"name": "a", "state": {"running": {"startedAt": T1}}}]);
        let current = json!({"phase": "Succeeded", "reason": "r", "containerStatuses": ended,
            "conditions": [ready("False", T1)]});
        let late = json!({"phase": "Running", "containerStatuses": runs,
            "conditions": [ready("True", T2)]});
        assert_eq!(patch(current.clone(), late), None);
        assert_eq!(
            patch(current, json!({"phase": "Failed", "reason": "x"})),
            None
        );
        // Somebody else ended it; how its containers ended is still told.
        let failed = json!({"phase": "Failed", "reason": "Evicted", "containerStatuses": runs});
        let told = json!({"phase": "Succeeded", "containerStatuses": ended});
        assert_eq!(
            patch(failed, told),
            Some(json!({"containerStatuses": ended}))
        );
        // Going there is allowed.
        let got = patch(
            json!({"phase": "Running"}),
            json!({"phase": "Failed", "reason": "E"}),
        );
        assert_eq!(got, Some(json!({"phase": "Failed", "reason": "E"})));
    }

    #[test]
    fn an_object_that_replaces_another_is_not_merged_into_it() {
        let current = json!({"resources": {"limits": {"cpu": "1", "memory": "1Gi"}}});
        let report = json!({"resources": {"limits": {"cpu": "1"}}});
        let want = json!({"resources": {"limits": {"cpu": "1"}, "$patch": "replace"}});
        assert_eq!(patch(current, report), Some(want));
    }

    #[test]
    fn applying_the_patch_ends_the_difference() {
        // A loop of patches would be one that does not end in itself being none.
        let current = json!({"phase": "Pending", "conditions": [ready("False", T1)]});
        let report = json!({"phase": "Running", "conditions": [ready("True", T2)],
            "containerStatuses": [{"name": "a", "ready": true}]});
        let got = patch(current, report.clone()).unwrap();
        assert_eq!(patch(got, report), None);
    }

    fn step(known: Option<(bool, Value)>, gone: bool, deleted: bool, dropped: bool) -> Step {
        let status = json!({"phase": "Failed"});
        let said = Said {
            uid: "u1",
            status: &status,
            gone,
        };
        let known = known.as_ref().map(|(deleting, status)| Known {
            resource_version: 7,
            deleting: *deleting,
            status,
        });
        next(said, known, deleted, |_, _| dropped, now())
    }

    #[test]
    fn one_step_at_a_time() {
        let same = || json!({"phase": "Failed"});
        let behind = || json!({"phase": "Running"});
        let patch = Step::Patch(json!({
            "metadata": {"uid": "u1", "resourceVersion": "7"},
            "status": {"phase": "Failed"},
        }));
        let settled = |finished| Step::Settled { finished };
        let ask = Step::Ask(json!({"metadata": {"uid": "u1"}}));
        for (name, known, gone, deleted, dropped, want) in [
            ("not known: ask", None, true, false, false, ask),
            (
                "differs",
                Some((false, behind())),
                false,
                false,
                false,
                patch.clone(),
            ),
            (
                "the status before the delete",
                Some((true, behind())),
                true,
                false,
                false,
                patch,
            ),
            (
                "then the delete",
                Some((true, same())),
                true,
                false,
                false,
                Step::Delete,
            ),
            (
                "with finalizers: once",
                Some((true, same())),
                true,
                true,
                false,
                settled(true),
            ),
            (
                "cleaned up, not deleted",
                Some((false, same())),
                true,
                false,
                false,
                settled(false),
            ),
            (
                "deleted, not cleaned up",
                Some((true, same())),
                false,
                false,
                false,
                settled(false),
            ),
            (
                "what the server drops",
                Some((false, behind())),
                false,
                false,
                true,
                settled(false),
            ),
        ] {
            assert_eq!(step(known, gone, deleted, dropped), want, "{name}");
        }
    }
}
