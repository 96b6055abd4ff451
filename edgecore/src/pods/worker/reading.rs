//! What a worker reads off its Pod and off the desired set.

use std::collections::BTreeSet;
use std::time::Duration;

use common::ids::{Kind, ObjectKey};
use common::object::{Content, ContentHash};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};

use crate::cri::convert;
use crate::pods::env;
use crate::pods::jobs::Paths;
use crate::pods::plan::{self, Intent, Now, Plan};
use crate::pods::restart::Policy;
use crate::pods::seen::{ContainerSeen, Observed, Run};
use crate::pods::volumes::Volumes;
use crate::store::desired::{Desired, DesiredPod, Lookup};

/// A container that started less than this ago may well end again soon.
const SETTLED: Duration = Duration::from_secs(30);

/// What is wanted of the Pod before its containers are asked.
pub(super) fn intent(wanted: &DesiredPod, pod: &Pod) -> Intent {
    if wanted.removed {
        Intent::Remove
    } else if pod.metadata.deletion_timestamp.is_some() {
        Intent::Delete
    } else {
        Intent::Run
    }
}

/// `Some` while something of the Pod is expected to change by itself, with the time after which it
/// may have come to rest.
pub(super) fn restless(
    pod: &Pod,
    intent: Intent,
    observed: &Observed,
    plan: &Plan,
    now: Now,
) -> Option<Option<Duration>> {
    if intent.ends() {
        return observed.any_running().then_some(None);
    }
    if plan::policy(pod) != Policy::Always || !plan.steps.is_empty() {
        return Some(None);
    }
    let mut youngest = Duration::MAX;
    for c in plan::mains(pod) {
        let running = observed.newest(&c.name).filter(|n| n.run == Run::Running);
        let Some(running) = running else {
            return Some(None);
        };
        let started = Timestamp::from_nanosecond(i128::from(running.started_at));
        let age = now.wall.duration_since(started.unwrap_or(now.wall));
        youngest = youngest.min(Duration::try_from(age).unwrap_or_default());
    }
    (youngest < SETTLED).then(|| Some(SETTLED - youngest))
}

/// What is left of `activeDeadlineSeconds`; `None` where there is none.
pub(super) fn deadline_left(
    pod: &Pod,
    said: Option<&PodStatus>,
    now: Timestamp,
) -> Option<Duration> {
    let seconds = pod.spec.as_ref()?.active_deadline_seconds?;
    let limit = Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
    let started = said
        .and_then(|s| s.start_time.as_ref())
        .map_or(now, |t| t.0);
    let active = Duration::try_from(now.duration_since(started)).unwrap_or_default();
    Some(limit.saturating_sub(active))
}

/// The ConfigMaps and Secrets that the Pod names. Services count at a container's start only.
pub(super) fn references(pod: &Pod) -> Vec<ObjectKey> {
    let mut keys = env::references(pod);
    keys.retain(|k| k.kind != Kind::Services);
    keys.sort();
    keys.dedup();
    keys
}

/// What these objects look like now.
pub(super) fn contents(keys: &[ObjectKey], desired: &Desired) -> Vec<ContentHash> {
    let content = |key| match desired.lookup(key) {
        Lookup::Unknown => ContentHash::default(),
        Lookup::Absent => ContentHash::of(&Content::Absent),
        Lookup::Present(bytes) => ContentHash::of(&Content::Present(bytes)),
    };
    keys.iter().map(content).collect()
}

/// What decides over a Pod's volumes and may change while it runs: what the downward API shows, and
/// which volumes ephemeral containers bring into use.
pub(super) fn volatile(pod: &Pod) -> ContentHash {
    let spec = pod.spec.iter();
    let ephemeral = spec.flat_map(|s| s.ephemeral_containers.iter().flatten());
    let mounts = ephemeral.flat_map(|e| e.volume_mounts.iter().flatten());
    let mounted: BTreeSet<&str> = mounts.map(|m| m.name.as_str()).collect();
    let shown = (&pod.metadata.labels, &pod.metadata.annotations, mounted);
    let bytes = serde_json::to_vec(&shown).unwrap_or_default();
    ContentHash::of(&Content::Present(bytes.into()))
}

pub(super) fn last_words(volumes: &Volumes, paths: &Paths, pod: &Pod, c: &ContainerSeen) -> String {
    let all = plan::inits(pod).iter().chain(plan::mains(pod));
    let spec = all.into_iter().find(|s| s.name == c.name).cloned();
    let spec = spec.or_else(|| plan::ephemerals(pod).into_iter().find(|s| s.name == c.name));
    let Some(spec) = spec else {
        return String::new();
    };
    let (_, _, uid) = convert::identity(pod);
    let log = paths
        .logs_of(pod)
        .join(convert::log_path(&c.name, c.attempt));
    volumes.read_termination_message(uid, &spec, c.attempt, c.exit_code, &log)
}

/// A time as Go prints it, which is how people know this message: `1m20s`.
pub(super) fn go_duration(time: Duration) -> String {
    match (time.as_secs() / 60, time.as_secs() % 60) {
        (0, s) => format!("{s}s"),
        (m, s) => format!("{m}m{s}s"),
    }
}
