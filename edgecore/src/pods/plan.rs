//! What to do next for one Pod (pure).
//!
//! Takes what is wanted, what the runtime was seen to hold, what the worker remembers and the time;
//! gives the steps that may run now, side by side, and when to look again though nothing happened.
//! The same input gives the same plan, so a worker that lost its memory does the right thing too:
//! what runs is left running, what is half done is finished.
//!
//! ```text
//!   grant ─► volumes ┐
//!          ─► sandbox ┼─► init containers ─► containers ─► (restarts)
//!          ─► images ┘          one by one      in order
//!                     └─► ephemeral containers, each once
//!   ending: containers ─► sidecars, last first ─► sandbox ─► all removed ─► logs
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod, PodStatus};

use super::restart::{self, Crashes, Policy, Verdict};
use super::seen::{ContainerSeen, Observed, Run, SandboxSeen};
use super::status::EVICTED;
use crate::cri::convert;

/// The two clocks: `wall` is for what people read and what the runtime stamped, `mono` for waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    pub wall: Timestamp,
    pub mono: Duration,
}

/// What becomes of the Pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Intent {
    Run,
    /// Its phase is final: containers stay, dead, for their logs.
    Finish,
    /// The API waits for the agent: all goes, then the object.
    Delete,
    /// The object is gone already: all goes, logs too.
    Remove,
}

impl Intent {
    pub fn ends(self) -> bool {
        self != Intent::Run
    }
}

/// One thing to do. Equal steps are the same work: one that runs is not begun again.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Reserve what the node has only once, and write it down before anything is made.
    Grant,
    Volumes,
    Image {
        container: String,
    },
    RunSandbox {
        attempt: u32,
    },
    Start {
        container: String,
        attempt: u32,
        sandbox: String,
    },
    PostStart {
        container: String,
        id: String,
    },
    /// Stop with the time left until `deadline`, by the monotonic clock.
    Stop {
        container: String,
        id: String,
        deadline: Duration,
    },
    RemoveContainer {
        id: String,
    },
    StopSandbox {
        id: String,
    },
    RemoveSandbox {
        id: String,
    },
    /// Volumes and the cgroup.
    Cleanup,
    RemoveLogs,
}

/// What a container waits for, as its status says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    pub reason: String,
    pub message: String,
}

/// A step that failed: not again before `not_before`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retry {
    pub not_before: Duration,
    /// The wait that led there, so that the next is longer.
    pub delay: Duration,
}

/// What a worker remembers between two looks. All of it may be lost with the process.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    pub granted: bool,
    pub volumes: bool,
    /// Containers whose image is here, by name.
    pub images: BTreeSet<String>,
    pub crashes: BTreeMap<String, Crashes>,
    /// Containers whose postStart hook has ended, by ID.
    pub hooked: BTreeSet<String>,
    /// Why a container could not be started, by name.
    pub trouble: BTreeMap<String, Waiting>,
    pub underway: BTreeSet<Step>,
    pub retries: BTreeMap<Step, Retry>,
    /// When ending began, by the monotonic clock.
    pub ending_since: Option<Duration>,
    pub cleaned: bool,
    pub logs_removed: bool,
    /// The Pod ends for what it kept on the disk.
    pub evicted: bool,
}

/// All that a decision rests on.
pub struct Input<'a> {
    pub pod: &'a Pod,
    pub intent: Intent,
    pub observed: &'a Observed,
    pub previous: Option<&'a PodStatus>,
    pub memory: &'a Memory,
    pub now: Now,
}

/// What follows from an [`Input`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    pub steps: Vec<Step>,
    /// Look again after this long though nothing happened.
    pub retry_in: Option<Duration>,
    /// Containers held back after a crash, by name.
    pub crash_looping: BTreeMap<String, Duration>,
    /// Ephemeral containers that are held back until the container whose processes they share
    /// runs: its name, by theirs.
    pub untargeted: BTreeMap<String, String>,
    /// To remember when the step to start the container is taken.
    pub crashes: BTreeMap<String, Crashes>,
    /// Ending is over: nothing of the Pod is left but, for [`Intent::Finish`], dead containers.
    pub gone: bool,
}

impl Plan {
    fn push(&mut self, input: &Input<'_>, step: Step) {
        let memory = input.memory;
        if memory.underway.contains(&step) {
            return;
        }
        match memory.retries.get(&step) {
            Some(retry) if retry.not_before > input.now.mono => {
                self.wake_in(retry.not_before - input.now.mono);
            }
            Some(_) | None => self.steps.push(step),
        }
    }

    fn wake_in(&mut self, wait: Duration) {
        self.retry_in = Some(self.retry_in.map_or(wait, |old| old.min(wait)));
    }
}

/// Whether an init container is a sidecar: it runs beside the others and is restarted always.
pub fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

/// The Pod's restart policy.
pub fn policy(pod: &Pod) -> Policy {
    Policy::parse(pod.spec.as_ref().and_then(|s| s.restart_policy.as_deref()))
}

/// Init containers in order.
pub fn inits(pod: &Pod) -> &[Container] {
    let spec = pod.spec.as_ref();
    spec.and_then(|s| s.init_containers.as_deref())
        .unwrap_or_default()
}

/// Regular containers in order.
pub fn mains(pod: &Pod) -> &[Container] {
    pod.spec
        .as_ref()
        .map(|s| &*s.containers)
        .unwrap_or_default()
}

/// The field of the Pod that an Event about this container speaks of.
pub fn field_path(pod: &Pod, name: &str) -> String {
    let list = if inits(pod).iter().any(|c| c.name == name) {
        "initContainers"
    } else if mains(pod).iter().any(|c| c.name == name) {
        "containers"
    } else {
        "ephemeralContainers"
    };
    format!("spec.{list}{{{name}}}")
}

/// Ephemeral containers, as containers.
pub fn ephemerals(pod: &Pod) -> Vec<Container> {
    let spec = pod.spec.iter();
    let all = spec.flat_map(|s| s.ephemeral_containers.iter().flatten());
    all.map(convert::ephemeral).collect()
}

/// The container whose processes an ephemeral container asks to share. Where all of the Pod share
/// theirs, or the device's, it sees them anyway.
pub fn target<'a>(pod: &'a Pod, ephemeral: &str) -> Option<&'a str> {
    let spec = pod.spec.as_ref()?;
    if spec.host_pid == Some(true) || spec.share_process_namespace == Some(true) {
        return None;
    }
    let mut all = spec.ephemeral_containers.iter().flatten();
    let found = all.find(|e| e.name == ephemeral)?;
    found
        .target_container_name
        .as_deref()
        .filter(|t| !t.is_empty())
}

/// An evicted Pod may not go on writing.
const EVICTION_GRACE: Duration = Duration::from_secs(1);

/// How long a container may take to end.
///
/// A deletion's own grace counts; a container gets at least two seconds, but no more than was
/// asked for where somebody asked for one.
pub fn grace(pod: &Pod, intent: Intent) -> Duration {
    let spec = pod.spec.as_ref();
    let own = spec.and_then(|s| s.termination_grace_period_seconds);
    let asked = match intent {
        Intent::Run | Intent::Finish => own,
        Intent::Delete | Intent::Remove => pod.metadata.deletion_grace_period_seconds.or(own),
    };
    Duration::from_secs(u64::try_from(asked.unwrap_or(30)).unwrap_or(0)).max(Duration::from_secs(1))
}

/// Decides.
pub fn next_steps(input: &Input<'_>) -> Plan {
    if input.intent.ends() {
        end(input)
    } else {
        run(input)
    }
}

fn run(input: &Input<'_>) -> Plan {
    let mut plan = Plan::default();
    if !input.memory.granted {
        plan.push(input, Step::Grant);
        return plan;
    }
    let sandbox = input.observed.sandbox();
    if stop_strays(input, sandbox, &mut plan) {
        return plan;
    }
    let wanted = wanted(input, sandbox, &mut plan);
    if !input.memory.volumes {
        plan.push(input, Step::Volumes);
    }
    for container in wanted
        .iter()
        .filter(|w| !input.memory.images.contains(&w.name))
    {
        plan.push(
            input,
            Step::Image {
                container: container.name.clone(),
            },
        );
    }
    match sandbox {
        None if !sandbox_underway(input) => {
            let newest = input.observed.sandboxes.first();
            let attempt = newest.map_or(0, |s| s.attempt + 1);
            plan.push(input, Step::RunSandbox { attempt });
        }
        None => {}
        Some(sandbox) => start_next(input, sandbox, wanted, &mut plan),
    }
    tidy(input, sandbox, &mut plan);
    plan
}

/// Ends what runs outside the current sandbox; true when the rest has to wait for it.
fn stop_strays(input: &Input<'_>, sandbox: Option<&SandboxSeen>, plan: &mut Plan) -> bool {
    let current = sandbox.map(|s| s.id.as_str());
    let deadline = input.now.mono + grace(input.pod, Intent::Run);
    let mut waits = false;
    for c in &input.observed.containers {
        if c.may_run() && Some(c.sandbox.as_str()) != current {
            waits = true;
            stop(input, c, deadline, plan);
        }
    }
    for s in &input.observed.sandboxes {
        if s.ready && Some(s.id.as_str()) != current {
            waits = true;
            // A sandbox that is just coming up has no address yet: its own step ends first.
            if !waits_for_containers(input, s) && !sandbox_underway(input) {
                plan.push(input, Step::StopSandbox { id: s.id.clone() });
            }
        }
    }
    waits
}

fn waits_for_containers(input: &Input<'_>, sandbox: &SandboxSeen) -> bool {
    let mut containers = input.observed.containers.iter();
    containers.any(|c| c.sandbox == sandbox.id && c.may_run())
}

fn sandbox_underway(input: &Input<'_>) -> bool {
    let mut steps = input.memory.underway.iter();
    steps.any(|s| matches!(s, Step::RunSandbox { .. }))
}

fn being_stopped(input: &Input<'_>, sandbox: &str) -> bool {
    let mut steps = input.memory.underway.iter();
    steps.any(|s| matches!(s, Step::StopSandbox { id } if id == sandbox))
}

fn stopping(input: &Input<'_>, id: &str) -> Option<Duration> {
    let steps = input.memory.underway.iter();
    let deadlines = steps.filter_map(|s| match s {
        Step::Stop {
            id: other,
            deadline,
            ..
        } if other == id => Some(*deadline),
        Step::Grant
        | Step::Volumes
        | Step::Image { .. }
        | Step::RunSandbox { .. }
        | Step::Start { .. }
        | Step::PostStart { .. }
        | Step::Stop { .. }
        | Step::RemoveContainer { .. }
        | Step::StopSandbox { .. }
        | Step::RemoveSandbox { .. }
        | Step::Cleanup
        | Step::RemoveLogs => None,
    });
    deadlines.min()
}

/// Stops a container, unless a stop that ends as early is under way.
fn stop(input: &Input<'_>, c: &ContainerSeen, deadline: Duration, plan: &mut Plan) {
    if stopping(input, &c.id).is_none_or(|earlier| deadline < earlier) {
        let step = Step::Stop {
            container: c.name.clone(),
            id: c.id.clone(),
            deadline,
        };
        // A stop that failed is tried again under whatever deadline it has by then.
        let failed = input
            .memory
            .retries
            .iter()
            .find(|(s, _)| matches!(s, Step::Stop { id, .. } if *id == c.id));
        match failed {
            Some((_, retry)) if retry.not_before > input.now.mono => {
                plan.wake_in(retry.not_before - input.now.mono);
            }
            Some(_) | None => plan.push(input, step),
        }
    }
}

fn starting(input: &Input<'_>, name: &str) -> bool {
    let mut steps = input.memory.underway.iter();
    steps.any(|s| matches!(s, Step::Start { container, .. } if container == name))
}

/// When a container that should be started may be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// After the postStart hooks of those before it.
    InOrder,
    /// Whatever the others wait for.
    Any,
    /// Not yet; its image is fetched all the same.
    Held,
}

/// A container that should be started, sandbox and image permitting.
struct Wanted {
    name: String,
    attempt: u32,
    crashes: Option<Crashes>,
    turn: Turn,
}

impl Wanted {
    fn regular(c: &Container, attempt: u32, crashes: Option<Crashes>) -> Self {
        Self {
            name: c.name.clone(),
            attempt,
            crashes,
            turn: Turn::InOrder,
        }
    }
}

/// The containers to start, in order: ephemeral ones, and then at most one of the init containers,
/// or any of the others.
fn wanted(input: &Input<'_>, sandbox: Option<&SandboxSeen>, plan: &mut Plan) -> Vec<Wanted> {
    let mut out = Vec::new();
    if let Some(sandbox) = sandbox {
        want_ephemerals(input, sandbox, plan, &mut out);
    }
    if !initialise(input, sandbox, plan, &mut out) {
        return out;
    }
    let policy = policy(input.pod);
    for c in mains(input.pod) {
        want(input, sandbox, c, policy, plan, &mut out);
    }
    out
}

/// Ephemeral containers start once, also while init containers run, and never again.
fn want_ephemerals(
    input: &Input<'_>,
    sandbox: &SandboxSeen,
    plan: &mut Plan,
    out: &mut Vec<Wanted>,
) {
    let spec = input.pod.spec.iter();
    for e in spec.flat_map(|s| s.ephemeral_containers.iter().flatten()) {
        match input.observed.newest(&e.name) {
            _ if starting(input, &e.name) => continue,
            // The agent that made it did not come to starting it: a name is free only once.
            Some(made) if made.run == Run::Created => {
                let id = made.id.clone();
                plan.push(input, Step::RemoveContainer { id });
                continue;
            }
            Some(_) => continue,
            None if has_begun(input.previous, &e.name) => continue,
            None => {}
        }
        let mut turn = Turn::Any;
        if let Some(target) = target(input.pod, &e.name) {
            let seen = input.observed.within(Some(sandbox), target);
            if seen.is_none_or(|t| t.run != Run::Running) {
                plan.untargeted.insert(e.name.clone(), target.to_owned());
                turn = Turn::Held;
            }
        }
        out.push(Wanted {
            name: e.name.clone(),
            attempt: 0,
            crashes: None,
            turn,
        });
    }
}

/// Whether an ephemeral container was ever started, though the runtime has nothing of it.
fn has_begun(previous: Option<&PodStatus>, name: &str) -> bool {
    let all = previous.and_then(|p| p.ephemeral_container_statuses.as_ref());
    let mut all = all.into_iter().flatten();
    all.any(|s| {
        let state = s.state.as_ref();
        s.name == name && state.is_some_and(|s| s.running.is_some() || s.terminated.is_some())
    })
}

/// Goes through the init containers; true when the regular ones may start.
fn initialise(
    input: &Input<'_>,
    sandbox: Option<&SandboxSeen>,
    plan: &mut Plan,
    out: &mut Vec<Wanted>,
) -> bool {
    let inits = inits(input.pod);
    let seen = |c: &Container| input.observed.within(sandbox, &c.name);
    let begun = mains(input.pod).iter().any(|c| seen(c).is_some());
    for (i, c) in inits.iter().enumerate() {
        let later = begun || inits.iter().skip(i + 1).any(|c| seen(c).is_some());
        let mine = seen(c);
        if is_sidecar(c) {
            want(input, sandbox, c, Policy::Always, plan, out);
            let started = mine.is_some_and(|m| m.run == Run::Running && hook_done(input, c, m));
            if !started && !later {
                return false;
            }
        } else {
            match mine {
                Some(m) if m.run == Run::Exited && m.exit_code == 0 => {}
                // Its instance was removed, but what comes after it has begun: it had ended well.
                _ if later => {}
                Some(_) | None => {
                    // Here it has not ended well yet, so it runs whatever the policy: with Never
                    // the Pod's phase is final once it failed.
                    want(input, sandbox, c, Policy::Always, plan, out);
                    return false;
                }
            }
        }
    }
    true
}

fn hook_done(input: &Input<'_>, c: &Container, seen: &ContainerSeen) -> bool {
    has_post_start(c).is_none_or(|()| input.memory.hooked.contains(&seen.id))
}

/// Whether the container has a hook that holds it back from counting as started.
pub fn has_post_start(c: &Container) -> Option<()> {
    let lifecycle = c.lifecycle.as_ref()?;
    lifecycle.post_start.as_ref().map(|_| ())
}

/// Adds the container to what should start, if it should.
fn want(
    input: &Input<'_>,
    sandbox: Option<&SandboxSeen>,
    c: &Container,
    policy: Policy,
    plan: &mut Plan,
    out: &mut Vec<Wanted>,
) {
    if starting(input, &c.name) {
        return;
    }
    let newest = input.observed.newest(&c.name);
    let reported = restarts_reported(input.previous, &c.name);
    let attempt = newest
        .map(|n| n.attempt + 1)
        .or(reported.map(|n| n + 1))
        .unwrap_or(0);
    let Some(newest) = newest else {
        out.push(Wanted::regular(c, attempt, None));
        return;
    };
    let here = sandbox.is_some_and(|s| s.id == newest.sandbox);
    let changed = !newest.hash.is_empty() && newest.hash != convert::container_hash(c);
    match newest.run {
        Run::Running | Run::Unknown if here => {
            if changed || newest.run == Run::Unknown {
                let deadline = input.now.mono + grace(input.pod, Intent::Run);
                stop(input, newest, deadline, plan);
            }
        }
        // One of another sandbox is being stopped.
        Run::Running | Run::Unknown => {}
        // A change of the image starts over, whatever happened before: its crashes are none of the
        // new one's.
        Run::Exited if changed && policy != Policy::Never => {
            let clean = Crashes::none(input.now.wall);
            out.push(Wanted::regular(c, attempt, Some(clean)));
        }
        // In a new sandbox all begin again, but what had succeeded and is not to be repeated.
        Run::Exited if !here && (policy == Policy::Always || newest.exit_code != 0) => {
            out.push(Wanted::regular(c, attempt, None));
        }
        Run::Exited if policy.restarts(newest.exit_code) => {
            again(input, c, newest, attempt, plan, out);
        }
        Run::Exited => {}
        // Created and never started: its start failed, or the agent died in between.
        Run::Created => again(input, c, newest, attempt, plan, out),
    }
}

/// A container that ended is started again when its wait is over.
fn again(
    input: &Input<'_>,
    c: &Container,
    newest: &ContainerSeen,
    attempt: u32,
    plan: &mut Plan,
    out: &mut Vec<Wanted>,
) {
    let stamp = |ns: i64| Timestamp::from_nanosecond(i128::from(ns)).unwrap_or(input.now.wall);
    let finished = stamp(newest.finished_at.max(newest.created_at));
    let remembered = input.memory.crashes.get(&c.name).copied();
    let started = stamp(newest.started_at.max(newest.created_at));
    let crashes = remembered.or_else(|| restart::assumed(newest.attempt, started));
    match restart::decide(crashes, finished, input.now.wall) {
        Verdict::Start(crashes) => out.push(Wanted::regular(c, attempt, Some(crashes))),
        Verdict::Wait { left, delay } => {
            plan.wake_in(left);
            plan.crash_looping.insert(c.name.clone(), delay);
        }
    }
}

fn restarts_reported(previous: Option<&PodStatus>, name: &str) -> Option<u32> {
    let previous = previous?;
    let lists = [
        &previous.init_container_statuses,
        &previous.container_statuses,
    ];
    let mut all = lists.into_iter().flatten().flatten();
    let status = all.find(|s| s.name == name && s.container_id.is_some())?;
    u32::try_from(status.restart_count).ok()
}

/// Starts the first that is ready, one at a time: a postStart hook holds the next one back.
fn start_next(input: &Input<'_>, sandbox: &SandboxSeen, wanted: Vec<Wanted>, plan: &mut Plan) {
    let all = inits(input.pod).iter().chain(mains(input.pod));
    let mut hooks_pending = false;
    for c in all.filter(|c| has_post_start(c).is_some()) {
        let seen = input.observed.within(Some(sandbox), &c.name);
        if let Some(seen) = seen.filter(|s| s.run == Run::Running && !hook_done(input, c, s)) {
            hooks_pending = true;
            let (container, id) = (c.name.clone(), seen.id.clone());
            plan.push(input, Step::PostStart { container, id });
        }
    }
    let mut underway = input.memory.underway.iter();
    let busy = underway.any(|s| matches!(s, Step::Start { .. }));
    if busy || !input.memory.volumes {
        return;
    }
    let may = |w: &Wanted| match w.turn {
        Turn::InOrder => !hooks_pending,
        Turn::Any => true,
        Turn::Held => false,
    };
    for w in wanted.into_iter().filter(may) {
        let step = Step::Start {
            container: w.name.clone(),
            attempt: w.attempt,
            sandbox: sandbox.id.clone(),
        };
        if !input.memory.images.contains(&w.name) {
            continue;
        }
        let before = plan.steps.len();
        plan.push(input, step);
        if plan.steps.len() > before {
            plan.crashes.extend(w.crashes.map(|c| (w.name, c)));
            return;
        }
    }
}

/// Removes what nobody will ask for: of each container all but the last two instances, and
/// sandboxes that are down and empty.
fn tidy(input: &Input<'_>, sandbox: Option<&SandboxSeen>, plan: &mut Plan) {
    let mut kept: BTreeMap<&str, usize> = BTreeMap::new();
    for c in &input.observed.containers {
        let count = kept.entry(c.name.as_str()).or_default();
        *count += 1;
        if *count > 2 && !c.may_run() {
            plan.push(input, Step::RemoveContainer { id: c.id.clone() });
        }
    }
    let Some(current) = sandbox else { return };
    for s in input
        .observed
        .sandboxes
        .iter()
        .filter(|s| !s.ready && s.id != current.id)
    {
        let mut containers = input.observed.containers.iter();
        if !containers.any(|c| c.sandbox == s.id) && !being_stopped(input, &s.id) {
            plan.push(input, Step::RemoveSandbox { id: s.id.clone() });
        }
    }
}

fn is_evicted(said: &PodStatus) -> bool {
    said.reason.as_deref() == Some(EVICTED)
}

fn end(input: &Input<'_>) -> Plan {
    let mut plan = Plan::default();
    let since = input.memory.ending_since.unwrap_or(input.now.mono);
    let evicted = input.memory.evicted || input.previous.is_some_and(is_evicted);
    let grace = if evicted {
        EVICTION_GRACE
    } else {
        grace(input.pod, input.intent)
    };
    let deadline = since + grace;
    let mut underway = input.memory.underway.iter();
    let making = underway.any(|s| {
        matches!(
            s,
            Step::Grant | Step::RunSandbox { .. } | Step::Start { .. }
        )
    });
    stop_in_order(input, deadline, &mut plan);
    if making || input.observed.any_running() {
        return plan;
    }
    // A sandbox that is being stopped may look down already, with its network still there.
    let mut up = false;
    let still = |s: &&SandboxSeen| s.ready || being_stopped(input, &s.id);
    for s in input.observed.sandboxes.iter().filter(still) {
        up = true;
        plan.push(input, Step::StopSandbox { id: s.id.clone() });
    }
    // What an evicted Pod keeps is what it was evicted for.
    let takes_all = evicted || matches!(input.intent, Intent::Delete | Intent::Remove);
    if takes_all {
        for c in &input.observed.containers {
            plan.push(input, Step::RemoveContainer { id: c.id.clone() });
        }
    }
    if up {
        return plan;
    }
    if takes_all && input.observed.containers.is_empty() {
        for s in &input.observed.sandboxes {
            plan.push(input, Step::RemoveSandbox { id: s.id.clone() });
        }
    }
    if !input.memory.cleaned {
        plan.push(input, Step::Cleanup);
        return plan;
    }
    let empty = input.observed.containers.is_empty() && input.observed.sandboxes.is_empty();
    let takes_logs = evicted || input.intent == Intent::Remove;
    if takes_logs && empty && !input.memory.logs_removed {
        plan.push(input, Step::RemoveLogs);
        return plan;
    }
    plan.gone = !takes_all || empty;
    plan
}

/// Regular containers first and together; then the sidecars, the last first, each after the one
/// that was started after it; when the time is up, all at once.
fn stop_in_order(input: &Input<'_>, deadline: Duration, plan: &mut Plan) {
    let running: Vec<_> = input
        .observed
        .containers
        .iter()
        .filter(|c| c.may_run())
        .collect();
    let sidecars: Vec<_> = inits(input.pod).iter().filter(|c| is_sidecar(c)).collect();
    let rank = |c: &ContainerSeen| sidecars.iter().position(|s| s.name == c.name);
    let (mut later, mut first): (Vec<_>, Vec<_>) =
        running.into_iter().partition(|c| rank(c).is_some());
    if input.now.mono >= deadline {
        first.append(&mut later);
    } else if first.is_empty() {
        let last = later.iter().copied().filter_map(rank).max();
        first.extend(later.iter().copied().filter(|c| rank(c) == last));
        later.retain(|c| rank(c) != last);
    }
    for c in first {
        stop(input, c, deadline, plan);
    }
    if !later.is_empty() && deadline > input.now.mono {
        plan.wake_in(deadline - input.now.mono);
    }
}

#[cfg(test)]
mod tests;
