//! One object's flight: compare, make at most a few calls, take what came back, until the API
//! server holds what the node reports or an error says to come again later.
//!
//! - Takes: an object whose turn it is. Reads the latest report and the latest view before each
//!   call, so that what came meanwhile is part of it.
//! - Gives: a [`Verdict`] for the queue; acknowledgements to the session.
//! - Never: sends anything while the session's claim is not fresh, or for a session that ended.

use std::sync::Arc;
use std::time::Duration;

use common::ids::{Kind, ObjectKey};
use serde_json::{Value, json};
use tracing::{debug, warn};

use super::difference::fingerprint;
use super::nodes;
use super::pods::{self, Known, Said, Step};
use super::queue::{Taken, Verdict, back_off};
use super::reports::{Held, Returned};
use super::shared::{Counter, Shared, Sitting};
use super::views::parsed;
use super::writer::{Call, Retry, WriteError};

/// Ask, status, delete and a conflict at each: what needs more meets a writer as busy as itself.
const STEPS: usize = 8;
/// Two renewals of a Lease that comes every 10 s fit into the claim's 15 s; a second is near
/// enough to the moment when it is fresh again.
const NOT_FRESH: Duration = Duration::from_secs(1);
/// A Node that does not exist is made again by CloudCore itself, and that shows in the watch; this
/// is for the case that the watch missed it.
const NO_NODE: Duration = Duration::from_secs(10);

/// What to do next about the object.
enum Act {
    /// The report is not this node's to make.
    Refuse(&'static str),
    Send(Box<Sending>),
    Settled {
        finished: bool,
        revision: u64,
    },
}

struct Sending {
    call: Call,
    purpose: Purpose,
    /// The report and the known state that the call was computed from.
    report: Value,
    current: Value,
    revision: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Ask,
    Status,
    Delete,
}

pub(super) async fn fly(shared: &Shared, taken: &Taken) -> Verdict {
    for step in 0..STEPS {
        let Some(sitting) = shared.sitting(taken, step == 0) else {
            return Verdict::Finished;
        };
        if !sitting.claim.fresh() {
            shared.count(Counter::NotFresh);
            return Verdict::Wait {
                delay: NOT_FRESH,
                until_change: false,
            };
        }
        let act = match taken.key.kind {
            Kind::Node => node_act(shared, taken, &sitting.held),
            Kind::Pod | Kind::ConfigMap | Kind::Secret | Kind::Services | Kind::Unknown(_) => {
                pod_act(shared, taken, &sitting.held)
            }
        };
        let sending = match act {
            Act::Refuse(why) => return refuse(shared, taken, &sitting, why),
            Act::Settled { finished, revision } => {
                shared.settled(taken, &sitting, finished, revision);
                return Verdict::Finished;
            }
            Act::Send(sending) => sending,
        };
        let answer = shared.writer.send(&taken.node, sending.call.clone()).await;
        shared.paced(answer.as_ref().err().map(WriteError::retry));
        let ended = match answer {
            Ok(object) => took(shared, taken, &sitting, &sending, &object),
            Err(error) => failed(shared, taken, &sitting, &sending, error),
        };
        if let Some(verdict) = ended {
            return verdict;
        }
    }
    again(shared, taken, Retry::Later)
}

fn refuse(shared: &Shared, taken: &Taken, sitting: &Sitting, why: &str) -> Verdict {
    warn!(node = %taken.node, key = %taken.key, why, "a report is refused");
    shared.count(Counter::Refused);
    shared.finished(taken, sitting);
    Verdict::Finished
}

fn again(shared: &Shared, taken: &Taken, retry: Retry) -> Verdict {
    shared.count(Counter::Retries);
    let delay = back_off(retry, taken.tries, rand::random());
    Verdict::Wait {
        delay: delay.unwrap_or(NOT_FRESH),
        until_change: false,
    }
}

/// The newer of what the watch shows and what the last write returned, unless a conflict has
/// shown that it is behind: (resourceVersion, being deleted, status).
fn newest(view: Option<(u64, bool, Arc<[u8]>)>, held: &Held) -> Option<(u64, bool, Arc<[u8]>)> {
    let returned = held
        .returned
        .clone()
        .map(|r| (r.resource_version, r.deleting, r.status));
    let known = match (view, returned) {
        (Some(view), Some(returned)) if returned.0 > view.0 => Some(returned),
        (Some(view), _) => Some(view),
        (None, returned) => returned,
    };
    known.filter(|(revision, ..)| *revision > held.stale)
}

fn pod_act(shared: &Shared, taken: &Taken, held: &Held) -> Act {
    let key = &taken.key;
    let view = shared.pods.pod(&key.uid);
    if let Some(view) = &view {
        if view.node != taken.node {
            return Act::Refuse("the Pod is bound to another node");
        }
        if view.namespace != key.namespace || view.name != key.name {
            return Act::Refuse("the Pod of this UID has another name");
        }
    }
    let view = view.map(|v| (v.resource_version, v.deleting, v.status));
    let known = newest(view, held);
    let revision = known.as_ref().map_or(0, |(revision, ..)| *revision);
    let finishes = held.gone && known.as_ref().is_some_and(|(_, deleting, _)| *deleting);
    if held.compared == Some((revision, held.sequence)) && !finishes && known.is_some() {
        return Act::Settled {
            finished: false,
            revision,
        };
    }
    let report = parsed(&held.status);
    let current = known
        .as_ref()
        .map_or(Value::Null, |(.., status)| parsed(status));
    let said = Said {
        uid: &key.uid,
        status: &report,
        gone: held.gone,
    };
    let known = known.map(|(resource_version, deleting, _)| Known {
        resource_version,
        deleting,
        status: &current,
    });
    let dropped = |patch: &Value, current: &Value| {
        held.residue
            .is_some_and(|residue| residue == fingerprint(patch, current))
    };
    let (namespace, name) = (key.namespace.to_string(), key.name.to_string());
    let patch = |namespace, name, body| Call::PatchPodStatus {
        namespace,
        name,
        body,
    };
    let (call, purpose) = match pods::next(said, known, held.deleted, dropped, shared.now()) {
        Step::Ask(body) => (patch(namespace, name, body), Purpose::Ask),
        Step::Patch(body) => (patch(namespace, name, body), Purpose::Status),
        Step::Delete => {
            let uid = key.uid.to_string();
            (
                Call::DeletePod {
                    namespace,
                    name,
                    uid,
                },
                Purpose::Delete,
            )
        }
        Step::Settled { finished } => return Act::Settled { finished, revision },
    };
    Act::Send(Box::new(Sending {
        call,
        purpose,
        report,
        current,
        revision,
    }))
}

fn node_act(shared: &Shared, taken: &Taken, held: &Held) -> Act {
    let view = shared.nodes.node(&taken.node);
    let endpoint = shared
        .endpoints
        .as_ref()
        .and_then(|e| e.endpoint(&taken.node));
    let report = nodes::with_endpoint(parsed(&held.status), endpoint.as_ref());
    let view = view.map(|v| (v.resource_version, false, v.status));
    let Some((revision, _, status)) = newest(view, held) else {
        let call = Call::PatchNodeStatus {
            body: json!({"metadata": {}}),
        };
        let current = Value::Null;
        return Act::Send(Box::new(Sending {
            call,
            purpose: Purpose::Ask,
            report,
            current,
            revision: 0,
        }));
    };
    let current = parsed(&status);
    let patch = nodes::status_patch(&current, &report, shared.now())
        .filter(|patch| held.residue != Some(fingerprint(patch, &current)));
    let Some(patch) = patch else {
        return Act::Settled {
            finished: false,
            revision,
        };
    };
    let metadata = json!({"resourceVersion": revision.to_string()});
    let call = Call::PatchNodeStatus {
        body: json!({"metadata": metadata, "status": patch}),
    };
    Act::Send(Box::new(Sending {
        call,
        purpose: Purpose::Status,
        report,
        current,
        revision,
    }))
}

/// What still differs between a state and a report.
fn difference(key: &ObjectKey, shared: &Shared, current: &Value, report: &Value) -> Option<Value> {
    match key.kind {
        Kind::Node => nodes::status_patch(current, report, shared.now()),
        Kind::Pod | Kind::ConfigMap | Kind::Secret | Kind::Services | Kind::Unknown(_) => {
            pods::status_patch(current, report, shared.now())
        }
    }
}

/// The API server did it. `None`: go on with the next step.
fn took(
    shared: &Shared,
    taken: &Taken,
    sitting: &Sitting,
    sending: &Sending,
    object: &Value,
) -> Option<Verdict> {
    if sending.purpose == Purpose::Delete {
        shared.count(Counter::Deletes);
        shared.held(taken, sitting, |held| held.deleted = true);
        return None;
    }
    let revision = object
        .pointer("/metadata/resourceVersion")
        .and_then(Value::as_str);
    let Some(resource_version) = revision.and_then(|r| r.parse().ok()) else {
        warn!(node = %taken.node, key = %taken.key, "the API server's answer has no resourceVersion");
        return Some(again(shared, taken, Retry::Later));
    };
    let bound = object.pointer("/spec/nodeName").and_then(Value::as_str);
    if taken.key.kind == Kind::Pod && bound != Some(taken.node.as_str()) {
        let why = "the Pod is bound to another node";
        return Some(refuse(shared, taken, sitting, why));
    }
    let deletion = object.pointer("/metadata/deletionTimestamp");
    let empty = json!({});
    let status = object.get("status").unwrap_or(&empty);
    let residue = match sending.purpose {
        Purpose::Status => {
            shared.count(Counter::Patches);
            difference(&taken.key, shared, status, &sending.report)
                .map(|left| fingerprint(&left, status))
        }
        Purpose::Ask | Purpose::Delete => sitting.held.residue,
    };
    let returned = Returned {
        resource_version,
        deleting: deletion.is_some_and(|d| !d.is_null()),
        status: status.to_string().into_bytes().into(),
    };
    shared.held(taken, sitting, |held| {
        held.returned = Some(returned);
        held.residue = residue;
    });
    None
}

/// The API server did not do it. `None`: go on with the next step.
fn failed(
    shared: &Shared,
    taken: &Taken,
    sitting: &Sitting,
    sending: &Sending,
    error: WriteError,
) -> Option<Verdict> {
    let is_node = taken.key.kind == Kind::Node;
    debug!(node = %taken.node, key = %taken.key, call = ?sending.call, %error, "a write failed");
    match &error {
        WriteError::Conflict => {
            shared.count(Counter::Conflicts);
            sitting.claim.doubt();
            shared.held(taken, sitting, |held| {
                held.stale = held.stale.max(sending.revision);
                held.returned = None;
            });
            None
        }
        WriteError::Missing if is_node => Some(Verdict::Wait {
            delay: NO_NODE,
            until_change: true,
        }),
        WriteError::Missing | WriteError::AnotherObject if !is_node => {
            shared.count(Counter::Gone);
            shared.finished(taken, sitting);
            Some(Verdict::Finished)
        }
        WriteError::Invalid(why) if sending.purpose == Purpose::Status => {
            warn!(node = %taken.node, key = %taken.key, why, "the API server refuses a reported status");
            shared.count(Counter::Refused);
            let left = difference(&taken.key, shared, &sending.current, &sending.report);
            let residue = left.map(|left| fingerprint(&left, &sending.current));
            shared.held(taken, sitting, |held| held.residue = residue);
            None
        }
        WriteError::Missing
        | WriteError::AnotherObject
        | WriteError::Invalid(_)
        | WriteError::Exists
        | WriteError::NamespaceEnding => Some(again(shared, taken, Retry::Later)),
        WriteError::Forbidden(_) | WriteError::Busy { .. } | WriteError::Unavailable(_) => {
            Some(again(shared, taken, error.retry()))
        }
    }
}
