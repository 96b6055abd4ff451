//! What is said of a Pod to the API (pure).
//!
//! Takes the Pod, what the runtime holds, why containers wait, and what was said before; gives the
//! whole `PodStatus`. What cannot be seen any more (a finished init container that was removed, the
//! last address) is carried over from what was said before. Times are whole seconds, as the API
//! keeps them, and a condition's time changes only with its status.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Container, ContainerState, ContainerStateRunning, ContainerStateTerminated,
    ContainerStateWaiting, ContainerStatus, ContainerUser, HostIP, LinuxContainerUser, Pod,
    PodCondition, PodIP, PodStatus, ResourceRequirements, VolumeMount, VolumeMountStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::cgroups;
use super::plan::{self, Intent, Waiting, has_post_start, is_sidecar};
use super::restart::Policy;
use super::seen::{ContainerSeen, Observed, Run, UserSeen};

/// Why the node itself ended a Pod: it overrides what its containers did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed {
    pub reason: String,
    pub message: String,
}

/// The reason of a Pod that the node ended for what it kept on the disk. It failed by itself: a
/// condition `DisruptionTarget` is for Pods that others are to blame for.
pub const EVICTED: &str = "Evicted";

/// All that a status is made from.
pub struct Input<'a> {
    pub pod: &'a Pod,
    pub observed: &'a Observed,
    pub previous: Option<&'a PodStatus>,
    /// Why containers that are not running wait, by name.
    pub waiting: &'a BTreeMap<String, Waiting>,
    /// Containers whose postStart hook has ended, by ID.
    pub hooked: &'a BTreeSet<String>,
    pub intent: Intent,
    pub failed: Option<&'a Failed>,
    pub node_ip: Option<IpAddr>,
    pub now: Timestamp,
}

/// Whether a phase is one that a Pod never leaves.
pub fn is_terminal(phase: Option<&str>) -> bool {
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// The whole status.
pub fn pod_status(input: &Input<'_>) -> PodStatus {
    let previous = input.previous;
    let inits = plan::inits(input.pod);
    let mains = plan::mains(input.pod);
    let ephemerals = plan::ephemerals(input.pod);
    let prev = |pick: fn(&PodStatus) -> &Option<Vec<ContainerStatus>>, name: &str| {
        let list = pick(previous?).as_ref()?;
        list.iter().find(|s| s.name == name)
    };
    let init_statuses: Vec<_> = inits
        .iter()
        .map(|c| {
            container_status(
                input,
                c,
                prev(|p| &p.init_container_statuses, &c.name),
                "PodInitializing",
                Role::Init,
            )
        })
        .collect();
    let blocked = !initialised(inits, &init_statuses);
    let default = if blocked {
        "PodInitializing"
    } else {
        "ContainerCreating"
    };
    let mut statuses: Vec<_> = mains
        .iter()
        .map(|c| {
            container_status(
                input,
                c,
                prev(|p| &p.container_statuses, &c.name),
                default,
                Role::Regular,
            )
        })
        .collect();
    statuses.sort_by(|a, b| a.name.cmp(&b.name));
    let ephemeral_statuses: Vec<_> = ephemerals
        .iter()
        .map(|c| {
            let before = prev(|p| &p.ephemeral_container_statuses, &c.name);
            container_status(input, c, before, "ContainerCreating", Role::Ephemeral)
        })
        .collect();

    let verdict = phase(input, &init_statuses, &statuses);
    let held = held_back(input, &verdict);
    let failed = input.failed.filter(|_| held.is_none());
    let phase = held.unwrap_or(verdict);
    let mut out = PodStatus {
        phase: Some(phase.clone()),
        observed_generation: input.pod.metadata.generation,
        qos_class: Some(cgroups::qos(input.pod).as_str().to_owned()),
        start_time: previous
            .and_then(|p| p.start_time.clone())
            .or_else(|| Some(Time(whole(input.now)))),
        init_container_statuses: some(init_statuses),
        container_statuses: some(statuses),
        ephemeral_container_statuses: some(ephemeral_statuses),
        ..Default::default()
    };
    addresses(input, &mut out);
    (out.reason, out.message) = match (failed, previous) {
        (Some(f), _) => (Some(f.reason.clone()), Some(f.message.clone())),
        (None, Some(p)) if is_terminal(p.phase.as_deref()) => (p.reason.clone(), p.message.clone()),
        (None, _) => (None, None),
    };
    out.conditions = Some(conditions(input, &out));
    let spoken_of = previous.is_some_and(|p| p.container_statuses.is_some());
    let over = |p: &PodStatus| is_terminal(p.phase.as_deref());
    let refused = failed.is_some() || previous.is_some_and(over);
    if refused && input.observed.containers.is_empty() && !spoken_of {
        // A Pod that was refused has no containers that could be "creating": `kubectl get` would
        // show that instead of the reason.
        out.init_container_statuses = None;
        out.container_statuses = None;
        out.ephemeral_container_statuses = None;
    }
    out
}

fn some<T>(list: Vec<T>) -> Option<Vec<T>> {
    (!list.is_empty()).then_some(list)
}

fn whole(time: Timestamp) -> Timestamp {
    Timestamp::from_second(time.as_second()).unwrap_or(time)
}

fn time(ns: i64) -> Option<Time> {
    let stamp = Timestamp::from_nanosecond(i128::from(ns)).ok()?;
    (ns > 0).then(|| Time(whole(stamp)))
}

fn addresses(input: &Input<'_>, out: &mut PodStatus) {
    let node = input.node_ip.map(|ip| ip.to_string());
    out.host_ip = node.clone();
    out.host_ips = node.clone().map(|ip| vec![HostIP { ip }]);
    let spec = input.pod.spec.as_ref();
    let host_network = spec.and_then(|s| s.host_network).unwrap_or(false);
    let up = input.observed.sandboxes.iter().find(|s| s.ready);
    let mut ips: Vec<String> = match up {
        Some(_) if host_network => node.into_iter().collect(),
        Some(s) => s.ips.iter().take(2).map(ToString::to_string).collect(),
        None => Vec::new(),
    };
    if ips.is_empty() {
        let before = input.previous.and_then(|p| p.pod_ips.as_ref());
        ips = before.into_iter().flatten().map(|p| p.ip.clone()).collect();
    }
    out.pod_ip = ips.first().cloned();
    out.pod_ips = some(ips.into_iter().map(|ip| PodIP { ip }).collect());
}

fn terminated(observed: &Observed, c: &ContainerSeen) -> ContainerStateTerminated {
    let reason = match (c.reason.as_str(), c.exit_code) {
        ("", 0) => "Completed",
        ("", _) => "Error",
        (reason, _) => reason,
    };
    ContainerStateTerminated {
        container_id: Some(container_id(observed, c)),
        exit_code: c.exit_code,
        finished_at: time(c.finished_at),
        message: (!c.message.is_empty()).then(|| c.message.clone()),
        reason: Some(reason.to_owned()),
        signal: None,
        started_at: time(c.started_at),
    }
}

fn container_id(observed: &Observed, c: &ContainerSeen) -> String {
    format!("{}://{}", observed.runtime_name, c.id)
}

/// What is said of a container that ran and that the runtime no longer has.
fn lost(before: &ContainerStatus) -> ContainerState {
    let running = before.state.as_ref().and_then(|s| s.running.as_ref());
    ContainerState {
        terminated: Some(ContainerStateTerminated {
            container_id: before.container_id.clone(),
            exit_code: 137,
            reason: Some("ContainerStatusUnknown".into()),
            message: Some("The container could not be located when the pod was terminated".into()),
            started_at: running.and_then(|r| r.started_at.clone()),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn waiting_state(reason: &str, message: &str) -> ContainerState {
    ContainerState {
        waiting: Some(ContainerStateWaiting {
            reason: Some(reason.to_owned()),
            message: (!message.is_empty()).then(|| message.to_owned()),
        }),
        ..Default::default()
    }
}

/// What a container is to its Pod.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Init,
    Regular,
    /// Neither started a second time nor ever ready.
    Ephemeral,
}

/// The instance that the status is of: the newest, unless it was only made yet and there is one that
/// ran. A restart counts, and ends what was waited for, with its start.
fn shown<'a>(input: &Input<'a>, name: &'a str) -> Option<&'a ContainerSeen> {
    let mut all = input.observed.instances(name);
    let newest = all.next()?;
    let starts = newest.run == Run::Created && !input.intent.ends();
    Some(all.next().filter(|_| starts).unwrap_or(newest))
}

fn container_status(
    input: &Input<'_>,
    c: &Container,
    before: Option<&ContainerStatus>,
    default_reason: &str,
    role: Role,
) -> ContainerStatus {
    let observed = input.observed;
    let mut out = ContainerStatus {
        name: c.name.clone(),
        image: c.image.clone().unwrap_or_default(),
        volume_mounts: c.volume_mounts.as_deref().map(mounted).and_then(some),
        ..Default::default()
    };
    let newest = shown(input, &c.name);
    let ended_for_good = input.intent.ends()
        || role == Role::Ephemeral && newest.is_some_and(|n| n.run == Run::Exited);
    let waiting = input.waiting.get(&c.name).filter(|_| !ended_for_good);
    if let Some(seen) = newest {
        out.restart_count = i32::try_from(seen.attempt).unwrap_or(i32::MAX);
        out.container_id = Some(container_id(observed, seen));
        out.image_id = seen.image_id.clone();
        if !seen.image.is_empty() && !seen.image.starts_with("sha256:") {
            out.image = seen.image.clone();
        }
        out.user = seen.user.as_ref().map(user);
    } else if let Some(before) = before {
        out.restart_count = before.restart_count;
        out.container_id = before.container_id.clone();
        out.image_id = before.image_id.clone();
    }
    let mut older = observed
        .instances(&c.name)
        .skip_while(|o| newest.is_some_and(|n| n.id != o.id))
        .skip(1);
    let older = older.find(|o| o.run == Run::Exited);
    let last = older.map(|o| ContainerState {
        terminated: Some(terminated(observed, o)),
        ..Default::default()
    });
    let kept = before.and_then(|b| b.last_state.clone());
    out.last_state = last.or_else(|| kept.filter(|s| s.terminated.is_some()));
    held_to(c, before, &mut out);
    let again = !input.intent.ends() && role != Role::Ephemeral;
    let (state, moved) = match newest {
        Some(seen) => state(input, seen, before, waiting, default_reason),
        None => gone(again, before, waiting, default_reason),
    };
    out.state = Some(state);
    if let Some(moved) = moved {
        out.last_state = Some(moved);
    }
    let state = out.state.as_ref();
    let running = state.is_some_and(|s| s.running.is_some());
    let hook =
        has_post_start(c).is_none_or(|()| newest.is_some_and(|n| input.hooked.contains(&n.id)));
    let ended_well = state
        .and_then(|s| s.terminated.as_ref())
        .is_some_and(|t| t.exit_code == 0);
    out.started = (role != Role::Ephemeral).then_some(running && hook);
    out.ready = match role {
        Role::Init if !is_sidecar(c) => ended_well,
        Role::Init | Role::Regular => running && hook && !input.intent.ends(),
        Role::Ephemeral => false,
    };
    out
}

fn user(seen: &UserSeen) -> ContainerUser {
    ContainerUser {
        linux: Some(LinuxContainerUser {
            uid: seen.uid,
            gid: seen.gid,
            supplemental_groups: some(seen.supplemental_groups.clone()),
        }),
    }
}

/// How the container's volumes are mounted. What is not mounted read-only all the way down says so.
fn mounted(mounts: &[VolumeMount]) -> Vec<VolumeMountStatus> {
    let one = |m: &VolumeMount| {
        let read_only = m.read_only == Some(true);
        VolumeMountStatus {
            name: m.name.clone(),
            mount_path: m.mount_path.clone(),
            read_only: read_only.then_some(true),
            recursive_read_only: read_only.then(|| "Disabled".to_owned()),
        }
    };
    mounts.iter().map(one).collect()
}

/// What the container was given of the device: the spec's words at the time it was made. A resize
/// of the spec is none of a container that runs, since this agent resizes none.
fn held_to(c: &Container, before: Option<&ContainerStatus>, out: &mut ContainerStatus) {
    let same = before.filter(|b| b.container_id.is_some() && b.container_id == out.container_id);
    if let Some(same) = same.filter(|b| b.resources.is_some()) {
        out.resources = same.resources.clone();
        out.allocated_resources = same.allocated_resources.clone();
        return;
    }
    let asked = c.resources.clone().unwrap_or_default();
    out.allocated_resources = asked.requests.clone().filter(|r| !r.is_empty());
    // Claims are the Pod's business; an empty object says that there are no bounds.
    out.resources = Some(ResourceRequirements {
        claims: None,
        ..asked
    });
}

/// The state, and what becomes the last state because of it.
fn state(
    input: &Input<'_>,
    seen: &ContainerSeen,
    before: Option<&ContainerStatus>,
    waiting: Option<&Waiting>,
    default_reason: &str,
) -> (ContainerState, Option<ContainerState>) {
    let held = |w: &Waiting| waiting_state(&w.reason, &w.message);
    let fresh = || waiting.map_or_else(|| waiting_state(default_reason, ""), held);
    match seen.run {
        Run::Running => {
            let running = ContainerStateRunning {
                started_at: time(seen.started_at),
            };
            let state = ContainerState {
                running: Some(running),
                ..Default::default()
            };
            (state, None)
        }
        Run::Exited => {
            let ended = ContainerState {
                terminated: Some(terminated(input.observed, seen)),
                ..Default::default()
            };
            match waiting {
                Some(w) => (held(w), Some(ended)),
                None => (ended, None),
            }
        }
        Run::Unknown => (
            before.map_or_else(|| waiting_state(default_reason, ""), lost),
            None,
        ),
        Run::Created if input.intent.ends() => {
            // Made and never started: it never will be.
            let ended = before
                .and_then(|b| b.state.clone())
                .filter(|s| s.terminated.is_some());
            (
                ended.unwrap_or_else(|| waiting_state(default_reason, "")),
                None,
            )
        }
        Run::Created => (fresh(), None),
    }
}

/// The state of a container of which the runtime has nothing; `again` where it will be started.
fn gone(
    again: bool,
    before: Option<&ContainerStatus>,
    waiting: Option<&Waiting>,
    default_reason: &str,
) -> (ContainerState, Option<ContainerState>) {
    let fresh = || {
        waiting.map_or_else(
            || waiting_state(default_reason, ""),
            |w| waiting_state(&w.reason, &w.message),
        )
    };
    let Some(before) = before else {
        return (fresh(), None);
    };
    let state = before.state.as_ref();
    if state.is_some_and(|s| s.terminated.is_some()) {
        return (state.cloned().unwrap_or_default(), None);
    }
    if state.is_some_and(|s| s.running.is_some()) {
        return if again {
            (fresh(), Some(lost(before)))
        } else {
            (lost(before), None)
        };
    }
    (fresh(), None)
}

fn is_running(s: &ContainerStatus) -> bool {
    s.state.as_ref().is_some_and(|s| s.running.is_some())
}

fn ended(s: &ContainerStatus) -> Option<&ContainerStateTerminated> {
    s.state.as_ref().and_then(|s| s.terminated.as_ref())
}

fn last_ended(s: &ContainerStatus) -> Option<&ContainerStateTerminated> {
    s.last_state.as_ref().and_then(|s| s.terminated.as_ref())
}

fn initialised(inits: &[Container], statuses: &[ContainerStatus]) -> bool {
    inits.iter().zip(statuses).all(|(c, s)| {
        if is_sidecar(c) {
            s.started == Some(true)
        } else {
            s.ready
        }
    })
}

/// The phase of before, while a Pod that is to end finally still has something running: whoever
/// reads a final phase gives the Pod's place to another.
fn held_back(input: &Input<'_>, verdict: &str) -> Option<String> {
    let runs = input.intent.ends() && input.observed.any_running();
    let before = input.previous.and_then(|p| p.phase.as_deref());
    before
        .filter(|before| runs && is_terminal(Some(verdict)) && !is_terminal(Some(before)))
        .map(str::to_owned)
}

/// The phase that follows from the containers, unless it is final already.
fn phase(input: &Input<'_>, inits: &[ContainerStatus], mains: &[ContainerStatus]) -> String {
    if input.failed.is_some() {
        return "Failed".into();
    }
    let own = input.pod.status.as_ref().and_then(|s| s.phase.as_deref());
    let said = input.previous.and_then(|p| p.phase.as_deref());
    for before in [said, own] {
        if let Some(phase) = before.filter(|_| is_terminal(before)) {
            return phase.to_owned();
        }
    }
    computed(input, inits, mains).to_owned()
}

fn computed(
    input: &Input<'_>,
    inits: &[ContainerStatus],
    mains: &[ContainerStatus],
) -> &'static str {
    let policy = plan::policy(input.pod);
    let (mut pending, mut failed, mut sidecar_pending) = (false, false, false);
    for (c, s) in plan::inits(input.pod).iter().zip(inits) {
        let bad_before = last_ended(s).is_some_and(|t| t.exit_code != 0);
        if is_sidecar(c) {
            let waits = ended(s).is_none() && s.started != Some(true);
            sidecar_pending |= waits;
        } else if let Some(t) = ended(s) {
            failed |= t.exit_code != 0;
            pending |= t.exit_code != 0 && policy != Policy::Never;
        } else if is_running(s) || !bad_before {
            pending = true;
        } else {
            failed = true;
            pending = true;
        }
    }
    let running = mains.iter().filter(|s| is_running(s)).count();
    let stopped: Vec<_> = mains
        .iter()
        .filter(|s| !is_running(s))
        .filter_map(|s| ended(s).or_else(|| last_ended(s)))
        .collect();
    let waiting = mains.len() - running - stopped.len();
    let ever_started = running + stopped.len() > 0;
    let ending = input.intent.ends();
    // A Pod that is ended before it ran has no outcome of its own: it failed.
    if failed && policy == Policy::Never {
        return "Failed";
    }
    if ending && !input.observed.any_running() && running == 0 {
        let all_well =
            waiting == 0 && !mains.is_empty() && stopped.iter().all(|t| t.exit_code == 0);
        return if all_well { "Succeeded" } else { "Failed" };
    }
    if (pending || sidecar_pending) && !ever_started || waiting > 0 {
        return "Pending";
    }
    if running > 0 {
        return "Running";
    }
    match policy {
        Policy::Always => "Running",
        Policy::OnFailure | Policy::Never if stopped.iter().all(|t| t.exit_code == 0) => {
            "Succeeded"
        }
        Policy::Never => "Failed",
        Policy::OnFailure => "Running",
    }
}

struct Condition {
    kind: &'static str,
    status: bool,
    reason: Option<&'static str>,
    message: Option<String>,
}

impl Condition {
    fn yes(kind: &'static str) -> Self {
        Self {
            kind,
            status: true,
            reason: None,
            message: None,
        }
    }

    fn no(kind: &'static str, reason: &'static str, message: Option<String>) -> Self {
        Self {
            kind,
            status: false,
            reason: Some(reason),
            message,
        }
    }
}

fn conditions(input: &Input<'_>, status: &PodStatus) -> Vec<PodCondition> {
    let ready = containers_ready(status, "ContainersReady", plan::inits(input.pod));
    let pod_ready = pod_ready(input, status);
    let sandbox = Condition {
        kind: "PodReadyToStartContainers",
        status: input.observed.sandbox().is_some(),
        reason: None,
        message: None,
    };
    let all = [
        sandbox,
        initialised_condition(input, status),
        pod_ready,
        ready,
        Condition::yes("PodScheduled"),
    ];
    all.into_iter().map(|c| stamped(input, c)).collect()
}

fn stamped(input: &Input<'_>, c: Condition) -> PodCondition {
    let status = if c.status { "True" } else { "False" };
    let before = input.previous.and_then(|p| p.conditions.as_ref());
    let same = before
        .into_iter()
        .flatten()
        .find(|b| b.type_ == c.kind && b.status == status);
    PodCondition {
        type_: c.kind.to_owned(),
        status: status.to_owned(),
        reason: c.reason.map(str::to_owned),
        message: c.message,
        observed_generation: input.pod.metadata.generation,
        last_probe_time: None,
        last_transition_time: same
            .and_then(|b| b.last_transition_time.clone())
            .or_else(|| Some(Time(whole(input.now)))),
    }
}

fn initialised_condition(input: &Input<'_>, status: &PodStatus) -> Condition {
    const KIND: &str = "Initialized";
    if status.phase.as_deref() == Some("Succeeded") {
        return Condition {
            reason: Some("PodCompleted"),
            ..Condition::yes(KIND)
        };
    }
    let mut mains = status.container_statuses.iter().flatten();
    if mains.any(|s| is_running(s) || ended(s).is_some() || last_ended(s).is_some()) {
        return Condition::yes(KIND);
    }
    let inits = plan::inits(input.pod);
    let statuses = status.init_container_statuses.iter().flatten();
    let incomplete: Vec<_> = inits
        .iter()
        .zip(statuses)
        .filter(|(c, s)| {
            if is_sidecar(c) {
                s.started != Some(true)
            } else {
                !s.ready
            }
        })
        .map(|(c, _)| c.name.as_str())
        .collect();
    if incomplete.is_empty() {
        return Condition::yes(KIND);
    }
    let message = format!(
        "containers with incomplete status: [{}]",
        incomplete.join(" ")
    );
    Condition::no(KIND, "ContainersNotInitialized", Some(message))
}

fn containers_ready(status: &PodStatus, kind: &'static str, inits: &[Container]) -> Condition {
    match status.phase.as_deref() {
        Some("Succeeded") => return Condition::no(kind, "PodCompleted", None),
        Some("Failed") => return Condition::no(kind, "PodFailed", None),
        Some(_) | None => {}
    }
    let init_statuses = status.init_container_statuses.iter().flatten();
    let sidecars = inits
        .iter()
        .zip(init_statuses)
        .filter(|(c, _)| is_sidecar(c));
    let mains = status.container_statuses.iter().flatten();
    let unready: Vec<_> = sidecars
        .map(|(_, s)| s)
        .chain(mains)
        .filter(|s| !s.ready)
        .map(|s| s.name.as_str())
        .collect();
    if unready.is_empty() {
        return Condition::yes(kind);
    }
    let message = format!("containers with unready status: [{}]", unready.join(" "));
    Condition::no(kind, "ContainersNotReady", Some(message))
}

fn pod_ready(input: &Input<'_>, status: &PodStatus) -> Condition {
    const KIND: &str = "Ready";
    let containers = containers_ready(status, KIND, plan::inits(input.pod));
    if !containers.status {
        return containers;
    }
    let others = input
        .pod
        .status
        .as_ref()
        .and_then(|s| s.conditions.as_ref());
    let gates = input
        .pod
        .spec
        .iter()
        .flat_map(|s| s.readiness_gates.iter().flatten());
    let closed: Vec<_> = gates
        .filter_map(|gate| {
            let name = &gate.condition_type;
            let found = others.into_iter().flatten().find(|c| c.type_ == *name);
            match found {
                None => Some(format!(
                    "corresponding condition of pod readiness gate {name:?} does not exist."
                )),
                Some(c) if c.status != "True" => Some(format!(
                    "the status of pod readiness gate {name:?} is not \"True\", but {}",
                    c.status
                )),
                Some(_) => None,
            }
        })
        .collect();
    if closed.is_empty() {
        return Condition::yes(KIND);
    }
    Condition::no(KIND, "ReadinessGatesNotReady", Some(closed.join(", ")))
}

#[cfg(test)]
mod tests;
