//! One Pod's task: look, decide, act, say, wait.
//!
//! Owns everything of one Pod UID in the runtime and on disk; nobody else touches it. Takes the
//! Pod's desired state and wakes; gives reports and Events. All decisions are `plan`'s and
//! `status`'s, all I/O is `jobs`'; steps run beside each other as tasks that this worker owns, so a
//! long pull never keeps it from seeing that its Pod was deleted.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use common::ids::ObjectKey;
use common::object::ContentHash;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use tokio::sync::{Semaphore, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use super::admit::{Refusal, Room};
use super::cgroups::Cgroups;
use super::env;
use super::evict::{Disk, Limits};
use super::images::Resolved;
use super::jobs::{Job, Outcome, Paths, Trouble};
use super::ledger::{Ledger, NoGrant};
use super::manager::RuntimeState;
use super::observe::{self, Cache, Waker, Wakers};
use super::plan::{self, Input, Intent, Memory, Now, Plan, Retry, Step, Waiting, has_post_start};
use super::seen::{ContainerSeen, Observed, Run};
use super::status::{self, EVICTED, Failed, is_terminal};
use super::volumes::Volumes;
use crate::cri::{Failure, Runtime};
use crate::node::environment::Environment;
use crate::store::desired::{Desired, DesiredPod};
use crate::store::events::{EventType, Events, PodEvent};
use crate::store::reports::{PodReport, Reports};

mod reading;
mod waits;

use reading::{contents, deadline_left, intent, last_words, references, restless, volatile};

/// Where the time comes from; tests bring their own.
pub type Clock = Arc<dyn Fn() -> Now + Send + Sync>;

/// What all workers share.
pub struct Shared {
    pub cri: Runtime,
    pub desired: Desired,
    pub reports: Reports,
    pub events: Events,
    pub volumes: Arc<Volumes>,
    /// Set once the runtime has said which driver it uses.
    pub cgroups: Arc<OnceLock<Arc<Cgroups>>>,
    pub environment: watch::Receiver<Option<Environment>>,
    pub runtime: watch::Receiver<RuntimeState>,
    pub ledger: Arc<Ledger>,
    /// The kubelet's `maxPods`.
    pub most_pods: usize,
    pub wakers: Wakers,
    pub paths: Arc<Paths>,
    pub clock: Clock,
    /// One Pod at a time is counted.
    pub counting: Arc<Semaphore>,
}

/// The task of one Pod.
pub struct Worker {
    shared: Arc<Shared>,
    key: ObjectKey,
    wanted: watch::Receiver<DesiredPod>,
    waker: Arc<Waker>,
    memory: Memory,
    cache: Cache,
    images: BTreeMap<String, Resolved>,
    jobs: JoinSet<(Step, Outcome)>,
    aborts: BTreeMap<Step, AbortHandle>,
    /// The status that was last put into a report.
    said: Option<PodStatus>,
    failed: Option<Failed>,
    /// Counts what a Pod with limits keeps on the disk; ends when it is too much.
    counts: JoinSet<String>,
    /// What the Pod's references looked like when its volumes were last brought up to date.
    references: Vec<ContentHash>,
    /// What else of the Pod its volumes were last made with; see [`volatile`].
    made_with: ContentHash,
    /// The Pod's references, as its spec names them.
    refers_to: Vec<ObjectKey>,
    /// Something that the Pod refers to has not come yet.
    waits_for_objects: bool,
    /// The cloud was told that all is gone.
    said_gone: bool,
    refresh_at: Option<Duration>,
    first_look: bool,
    complained: bool,
}

/// What a look led to.
enum Next {
    /// Look again at a wake, or after this long.
    Wait(Option<Duration>),
    /// Nothing of the Pod is left and nobody wants it.
    Over,
}

impl Worker {
    pub fn new(
        shared: Arc<Shared>,
        wanted: watch::Receiver<DesiredPod>,
        waker: Arc<Waker>,
    ) -> Self {
        let key = wanted.borrow().key.clone();
        let report = shared.reports.pod(&key);
        let said_gone = report.as_ref().is_some_and(|r| r.gone);
        let said = report.and_then(|r| serde_json::from_value(r.status).ok());
        Self {
            shared,
            key,
            wanted,
            waker,
            memory: Memory::default(),
            cache: Cache::default(),
            images: BTreeMap::new(),
            jobs: JoinSet::new(),
            aborts: BTreeMap::new(),
            said,
            failed: None,
            counts: JoinSet::new(),
            references: Vec::new(),
            made_with: ContentHash::default(),
            refers_to: Vec::new(),
            waits_for_objects: false,
            said_gone,
            refresh_at: None,
            first_look: true,
            complained: false,
        }
    }

    /// Runs until the Pod is gone. At shutdown the Pod keeps running.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut environment = self.shared.environment.clone();
        let mut runtime = self.shared.runtime.clone();
        let mut releases = self.shared.ledger.releases();
        loop {
            let next = tokio::select! {
                biased;
                // A runtime that does not answer must not hold the end up.
                () = shutdown.cancelled() => return,
                next = self.look_and_act() => next,
            };
            let wait = match next {
                Next::Over => return,
                Next::Wait(wait) => wait,
            };
            let timer = tokio::time::sleep(wait.unwrap_or(Duration::ZERO));
            tokio::pin!(timer);
            loop {
                tokio::select! {
                    biased;
                    () = shutdown.cancelled() => return,
                    changed = self.wanted.changed() => {
                        if changed.is_err() {
                            return;
                        }
                        // Whatever failed was asked of another version of the Pod.
                        self.memory.retries.clear();
                    }
                    Some(ended) = self.jobs.join_next_with_id() => self.ended(ended),
                    Some(counted) = self.counts.join_next() => self.evict(counted),
                    () = self.waker.wake.notified() => {}
                    // Most objects are not this Pod's: that is seen without asking the runtime.
                    () = self.waker.objects.notified() => if !self.concerned() { continue },
                    () = changed(&mut environment) => {}
                    () = changed(&mut runtime) => {}
                    () = changed(&mut releases), if !self.memory.granted => {
                        self.memory.retries.clear();
                    }
                    () = &mut timer, if wait.is_some() => {}
                }
                break;
            }
        }
    }

    /// Whether something that the Pod refers to is not what it was.
    fn concerned(&self) -> bool {
        self.waits_for_objects || contents(&self.refers_to, &self.shared.desired) != self.references
    }

    fn now(&self) -> Now {
        (self.shared.clock)()
    }

    fn emit(&self, container: Option<&str>, kind: EventType, reason: &str, message: &str) {
        self.shared
            .events
            .emit(PodEvent::new(&self.key, container, kind, reason, message));
    }

    async fn look_and_act(&mut self) -> Next {
        self.collect_ended();
        let wanted = self.wanted.borrow_and_update().clone();
        let pod: Pod = match serde_json::from_slice(&wanted.json) {
            Ok(pod) => pod,
            Err(error) => {
                if !std::mem::replace(&mut self.complained, true) {
                    let message = format!("The Pod cannot be read and is not run: {error}");
                    self.emit(None, EventType::Warning, "FailedValidation", &message);
                }
                return if wanted.removed {
                    self.over().await
                } else {
                    Next::Wait(None)
                };
            }
        };
        let environment = self.shared.environment.borrow().clone();
        let (Some(environment), Some(cgroups)) = (environment, self.shared.cgroups.get().cloned())
        else {
            // Both come: the one with the first welcome, the other with the runtime.
            return Next::Wait(None);
        };
        let observed = match self.look(&pod).await {
            Ok(observed) => observed,
            Err(wait) => return Next::Wait(Some(wait)),
        };
        let base = intent(&wanted, &pod);
        let now = self.now();
        self.check_deadline(&pod, base, now);
        let (intent, status) =
            self.judge(&pod, base, &observed, &environment, now, &BTreeMap::new());
        if intent.ends() {
            self.counts = JoinSet::new();
            self.begin_ending(intent, now);
        } else if self.memory.ending_since.is_some() {
            self.come_back().await;
        }
        if intent == Intent::Run && self.memory.volumes {
            self.count(&pod);
        }
        let plan = plan::next_steps(&Input {
            pod: &pod,
            intent,
            observed: &observed,
            previous: self.said.as_ref(),
            memory: &self.memory,
            now,
        });
        let waiting = self.waiting(&pod, &plan, now);
        let status = if waiting.is_empty() {
            status
        } else {
            self.judge(&pod, base, &observed, &environment, now, &waiting)
                .1
        };
        let mut wait = plan.retry_in;
        let mut shorten = |by: Duration| wait = Some(wait.map_or(by, |w: Duration| w.min(by)));
        self.act(&pod, intent, &plan, &observed, environment, cgroups, now);
        self.pending_times(&pod, intent, now, &mut shorten);
        // What was said to be gone is not taken back because this agent has just started.
        let empty = observed.containers.is_empty() && observed.sandboxes.is_empty();
        let gone = intent == Intent::Delete && (plan.gone || self.said_gone && empty);
        // The first word of a Pod is whether it was admitted: it is known in a moment.
        if self.said.is_some() || !self.memory.underway.contains(&Step::Grant) {
            self.say(status, gone);
        }
        if let Some(settles) = self.set_lively(&pod, intent, &observed, &plan, now) {
            wait = Some(wait.map_or(settles, |w| w.min(settles)));
        }
        if plan.gone {
            self.release().await;
            if intent == Intent::Remove {
                return self.over().await;
            }
        }
        Next::Wait(wait)
    }

    /// The record of the Pod goes last: whatever is cut off before it is done again.
    async fn over(&self) -> Next {
        self.release().await;
        self.shared.volumes.forget(&self.key).await;
        self.shared.reports.forget_pod(&self.key);
        self.shared.desired.forget(&self.key);
        Next::Over
    }

    async fn release(&self) {
        if !self.shared.ledger.holds(&self.key.uid) {
            return;
        }
        let (ledger, uid) = (self.shared.ledger.clone(), self.key.uid.to_string());
        if let Err(error) = tokio::task::spawn_blocking(move || ledger.release(&uid)).await {
            tracing::error!(pod = %self.key, %error, "a Pod's grant was not released");
        }
    }

    /// What the runtime holds, or when to try again.
    async fn look(&mut self, pod: &Pod) -> Result<Observed, Duration> {
        let volumes = self.shared.volumes.clone();
        let paths = self.shared.paths.clone();
        let last_words = |c: &ContainerSeen| last_words(&volumes, &paths, pod, c);
        let uid = self.key.uid.clone();
        let seen = observe::look(&*self.shared.cri, &uid, &mut self.cache, last_words).await;
        let mut observed = seen.map_err(|e| match e.failure {
            Failure::Unavailable => {
                self.shared.wakers.doubt();
                // A runtime that is known to be away wakes everybody when it is back.
                let known = !self.shared.runtime.borrow().ready;
                Duration::from_secs(if known { 60 } else { 1 })
            }
            Failure::NotFound | Failure::Unimplemented | Failure::Deadline | Failure::Refused => {
                tracing::warn!(pod = %self.key, error = %e, "the runtime could not be asked about a Pod");
                Duration::from_secs(2)
            }
        })?;
        observed.runtime_name = self.shared.runtime.borrow().name.clone();
        if std::mem::take(&mut self.first_look) {
            // What runs already was started by an agent before this one: its hooks are over.
            let running = observed.containers.iter().filter(|c| c.run == Run::Running);
            self.memory.hooked.extend(running.map(|c| c.id.clone()));
        }
        Ok(observed)
    }

    /// Whether the Pod has been active for longer than it may.
    fn check_deadline(&mut self, pod: &Pod, base: Intent, now: Now) {
        let Some(left) = deadline_left(pod, self.said.as_ref(), now.wall) else {
            return;
        };
        if base != Intent::Run || left > Duration::ZERO || self.failed.is_some() {
            return;
        }
        if self
            .said
            .as_ref()
            .is_some_and(|s| is_terminal(s.phase.as_deref()))
        {
            return;
        }
        let message = "Pod was active on the node longer than the specified deadline";
        self.emit(None, EventType::Normal, "DeadlineExceeded", message);
        self.failed = Some(Failed {
            reason: "DeadlineExceeded".into(),
            message: message.into(),
        });
    }

    /// Counts on while the Pod runs.
    fn count(&mut self, pod: &Pod) {
        if !self.counts.is_empty() {
            return;
        }
        let limits = Limits::of(pod);
        if limits.is_empty() {
            return;
        }
        let shared = &self.shared;
        let disk = Disk {
            cri: shared.cri.clone(),
            uid: self.key.uid.to_string(),
            volumes: shared.volumes.empty_dirs(pod),
            logs: shared.paths.logs_of(pod),
            turn: shared.counting.clone(),
        };
        self.counts.spawn(disk.watch(limits));
    }

    fn evict(&mut self, counted: Result<String, tokio::task::JoinError>) {
        // A count that panicked is begun anew at the next look.
        if let Ok(message) = counted
            && self.memory.ending_since.is_none()
        {
            self.emit(None, EventType::Warning, EVICTED, &message);
            self.memory.evicted = true;
            let reason = EVICTED.into();
            self.failed = Some(Failed { reason, message });
        }
    }

    /// The status, and the intent that follows from it: a Pod whose phase is final is finished.
    fn judge(
        &self,
        pod: &Pod,
        base: Intent,
        observed: &Observed,
        environment: &Environment,
        now: Now,
        waiting: &BTreeMap<String, Waiting>,
    ) -> (Intent, PodStatus) {
        let of = |intent| {
            status::pod_status(&status::Input {
                pod,
                observed,
                previous: self.said.as_ref(),
                waiting,
                hooked: &self.memory.hooked,
                intent,
                failed: self.failed.as_ref(),
                node_ip: Some(environment.node_ip),
                now: now.wall,
            })
        };
        let status = of(base);
        if base == Intent::Run && is_terminal(status.phase.as_deref()) {
            return (Intent::Finish, of(Intent::Finish));
        }
        (base, status)
    }

    /// The cloud names the Pod again before it was gone: what was taken away is made again.
    async fn come_back(&mut self) {
        self.release().await;
        let memory = &mut self.memory;
        memory.ending_since = None;
        memory.granted = false;
        memory.volumes = false;
        memory.cleaned = false;
        memory.logs_removed = false;
    }

    fn begin_ending(&mut self, intent: Intent, now: Now) {
        self.memory.ending_since.get_or_insert(now.mono);
        if intent != Intent::Finish {
            self.shared.ledger.ending(&self.key.uid);
        }
        // What would only be made to be thrown away; sandboxes and containers that are being made
        // are waited for, since a runtime may finish them after the call was dropped.
        for (step, abort) in &self.aborts {
            if matches!(
                step,
                Step::Volumes | Step::Image { .. } | Step::PostStart { .. }
            ) {
                abort.abort();
            }
        }
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of one look, each used once"
    )]
    fn act(
        &mut self,
        pod: &Pod,
        intent: Intent,
        plan: &Plan,
        observed: &Observed,
        environment: Environment,
        cgroups: Arc<Cgroups>,
        now: Now,
    ) {
        self.refers_to = references(pod);
        let known = intent.ends() || env::references_known(pod, &self.shared.desired).is_ok();
        self.waits_for_objects = !known;
        self.refresh_volumes(pod, intent, now);
        let mut steps = plan.steps.clone();
        if intent == Intent::Run && self.memory.granted && !self.memory.volumes {
            // `refresh_volumes` may have asked for them after the plan was made.
            steps.push(Step::Volumes);
        }
        self.tell_crashes(pod, plan, observed);
        let pod = Arc::new(pod.clone());
        let environment = Arc::new(environment);
        for step in steps {
            if self.memory.underway.contains(&step) {
                continue;
            }
            match &step {
                // Nothing is begun with a reference that may exist and has not come down yet.
                Step::Volumes
                | Step::Image { .. }
                | Step::RunSandbox { .. }
                | Step::Start { .. }
                    if !known =>
                {
                    continue;
                }
                Step::Volumes => {
                    if let Some(retry) = self.memory.retries.get(&step)
                        && retry.not_before > now.mono
                    {
                        continue;
                    }
                    self.references = contents(&self.refers_to, &self.shared.desired);
                    self.made_with = volatile(&pod);
                }
                Step::Start { container, .. } => {
                    if let Some(crashes) = plan.crashes.get(container) {
                        self.memory.crashes.insert(container.clone(), *crashes);
                    }
                }
                Step::Grant
                | Step::Image { .. }
                | Step::RunSandbox { .. }
                | Step::PostStart { .. }
                | Step::Stop { .. }
                | Step::RemoveContainer { .. }
                | Step::StopSandbox { .. }
                | Step::RemoveSandbox { .. }
                | Step::Cleanup
                | Step::RemoveLogs => {}
            }
            let job = self.job(&step, &pod, observed, &environment, &cgroups, now);
            self.begin(step, job);
        }
    }

    fn begin(&mut self, step: Step, job: Job) {
        let mine = step.clone();
        let abort = self.jobs.spawn(async move {
            let began = tokio::time::Instant::now();
            let pod = job.key.clone();
            let outcome = job.run(mine.clone()).await;
            tracing::debug!(%pod, step = ?mine, took = ?began.elapsed(), "a step ended");
            (mine, outcome)
        });
        self.memory.underway.insert(step.clone());
        self.aborts.insert(step, abort);
    }

    fn job(
        &self,
        step: &Step,
        pod: &Arc<Pod>,
        observed: &Observed,
        environment: &Arc<Environment>,
        cgroups: &Arc<Cgroups>,
        now: Now,
    ) -> Job {
        let up = observed.sandbox();
        let host_network = up.is_some_and(|s| s.host_network);
        let mut job = Job {
            cri: self.shared.cri.clone(),
            desired: self.shared.desired.clone(),
            events: self.shared.events.clone(),
            volumes: self.shared.volumes.clone(),
            cgroups: cgroups.clone(),
            ledger: self.shared.ledger.clone(),
            room: Room::new(self.shared.most_pods, environment),
            paths: self.shared.paths.clone(),
            environment: environment.clone(),
            key: self.key.clone(),
            pod: pod.clone(),
            pod_ips: match up {
                Some(_) if host_network => vec![environment.node_ip],
                Some(sandbox) => sandbox.ips.clone(),
                None => Vec::new(),
            },
            sandbox_attempt: up.map_or(0, |s| s.attempt),
            image: None,
            target: None,
            grace: Duration::ZERO,
            pre_stop: false,
        };
        if let Step::Start { container, .. } = step {
            job.image = self.images.get(container).cloned();
            let target = plan::target(pod, container);
            let target = target.and_then(|name| observed.within(up, name));
            job.target = target
                .filter(|c| c.run == Run::Running)
                .map(|c| c.id.clone());
        }
        if let Step::Stop { id, deadline, .. } = step {
            job.grace = deadline.saturating_sub(now.mono);
            let mut others = self.memory.underway.iter();
            job.pre_stop =
                !others.any(|s| matches!(s, Step::Stop { id: other, .. } if other == id));
        }
        job
    }

    fn refused(&mut self, refusal: NoGrant, now: Now) {
        match refusal {
            NoGrant::Refused(Refusal::Never(failed)) => {
                self.emit(None, EventType::Warning, &failed.reason, &failed.message);
                self.failed = Some(failed);
            }
            // A release wakes this worker.
            NoGrant::Refused(Refusal::WaitFor(_)) => {
                self.delay(Step::Grant, now, Duration::from_secs(30))
            }
            NoGrant::NotStored(error) => {
                tracing::warn!(pod = %self.key, error, "a grant could not be written down");
                self.delay(Step::Grant, now, Duration::from_secs(1));
            }
        }
    }

    fn delay(&mut self, step: Step, now: Now, delay: Duration) {
        let retry = Retry {
            not_before: now.mono + delay,
            delay,
        };
        self.memory.retries.insert(step, retry);
    }

    /// Volumes are brought up to date when what the Pod refers to changed or what they show of
    /// itself, when another one is mounted, or a token is due.
    fn refresh_volumes(&mut self, pod: &Pod, intent: Intent, now: Now) {
        if intent != Intent::Run || !self.memory.volumes {
            return;
        }
        let due = self.refresh_at.is_some_and(|at| at <= now.mono);
        if due || self.concerned() || volatile(pod) != self.made_with {
            self.memory.volumes = false;
            self.refresh_at = None;
            // What waited for an object need not wait any longer.
            self.memory.retries.clear();
        }
    }

    /// Times at which something is due though nothing changes.
    fn pending_times(
        &self,
        pod: &Pod,
        intent: Intent,
        now: Now,
        shorten: &mut impl FnMut(Duration),
    ) {
        if intent == Intent::Run {
            if let Some(at) = self.refresh_at {
                shorten(at.saturating_sub(now.mono));
            }
            if let Some(left) = deadline_left(pod, self.said.as_ref(), now.wall) {
                shorten(left);
            }
        }
        let retries = self.memory.retries.iter();
        for (step, retry) in retries {
            let pull = matches!(step, Step::Image { .. });
            let failed = retry.not_before.saturating_sub(retry.delay);
            if pull && now.mono < failed + Duration::from_secs(1) {
                shorten(failed + Duration::from_secs(1) - now.mono);
            }
            if retry.not_before > now.mono && (pull || *step == Step::Volumes) {
                shorten(retry.not_before - now.mono);
            }
        }
    }

    fn say(&mut self, status: PodStatus, gone: bool) {
        if self.said.as_ref() == Some(&status) && self.said_gone == gone {
            return;
        }
        self.said_gone = gone;
        match serde_json::to_value(&status) {
            Ok(value) => self.shared.reports.put_pod(
                &self.key,
                PodReport {
                    status: value,
                    gone,
                },
            ),
            Err(error) => tracing::warn!(pod = %self.key, %error, "a status could not be written"),
        }
        self.said = Some(status);
    }

    /// Says whether the Pod is at rest; gives when to look whether it has come to rest.
    fn set_lively(
        &self,
        pod: &Pod,
        intent: Intent,
        observed: &Observed,
        plan: &Plan,
        now: Now,
    ) -> Option<Duration> {
        let restless = restless(pod, intent, observed, plan, now);
        self.shared
            .wakers
            .set_lively(&self.waker, restless.is_some());
        restless.flatten()
    }

    fn collect_ended(&mut self) {
        while let Some(ended) = self.jobs.try_join_next_with_id() {
            self.ended(ended);
        }
    }

    fn ended(&mut self, ended: Result<(tokio::task::Id, (Step, Outcome)), tokio::task::JoinError>) {
        match ended {
            Ok((_, (step, outcome))) => {
                self.memory.underway.remove(&step);
                self.aborts.remove(&step);
                self.remember(step, outcome);
            }
            Err(error) => {
                let id = error.id();
                let step = self
                    .aborts
                    .iter()
                    .find(|(_, a)| a.id() == id)
                    .map(|(s, _)| s.clone());
                let Some(step) = step else { return };
                self.aborts.remove(&step);
                self.memory.underway.remove(&step);
                if error.is_panic() {
                    tracing::error!(pod = %self.key, ?step, "a step panicked");
                    let now = self.now();
                    self.delay(step, now, Duration::from_secs(15));
                }
            }
        }
    }

    fn remember(&mut self, step: Step, outcome: Outcome) {
        let now = self.now();
        match outcome {
            Outcome::Failed(trouble) => {
                self.failed_step(step, trouble, now);
                return;
            }
            Outcome::NotGranted(refusal) => {
                self.refused(refusal, now);
                return;
            }
            Outcome::Done => {}
            Outcome::Volumes { next_refresh } => {
                self.memory.volumes = true;
                self.refresh_at = next_refresh.map(|d| now.mono + d.max(Duration::from_secs(1)));
            }
            Outcome::Image {
                container,
                resolved,
            } => {
                self.memory.trouble.remove(&container);
                self.memory.images.insert(container.clone());
                self.images.insert(container, resolved);
            }
            Outcome::Started { container, id } => {
                // The next start looks at the image again: its policy may ask for a pull.
                self.memory.images.remove(&container);
                self.memory.trouble.remove(&container);
                if !self.has_hook(&container) {
                    self.memory.hooked.insert(id);
                }
            }
        }
        match &step {
            Step::PostStart { id, .. } => {
                self.memory.hooked.insert(id.clone());
            }
            // One that was asked for before the Pod ended and came back may be released already.
            Step::Grant => self.memory.granted = self.shared.ledger.holds(&self.key.uid),
            Step::Cleanup => self.memory.cleaned = true,
            Step::RemoveLogs => self.memory.logs_removed = true,
            Step::Volumes
            | Step::Image { .. }
            | Step::RunSandbox { .. }
            | Step::Start { .. }
            | Step::Stop { .. }
            | Step::RemoveContainer { .. }
            | Step::StopSandbox { .. }
            | Step::RemoveSandbox { .. } => {}
        }
        self.memory.retries.remove(&step);
    }

    fn has_hook(&self, container: &str) -> bool {
        let wanted = self.wanted.borrow();
        let pod: Result<Pod, _> = serde_json::from_slice(&wanted.json);
        pod.is_ok_and(|pod| {
            let mut all = plan::inits(&pod).iter().chain(plan::mains(&pod));
            all.any(|c| c.name == container && has_post_start(c).is_some())
        })
    }

    fn failed_step(&mut self, step: Step, trouble: Trouble, now: Now) {
        if let Some((container, waiting)) = trouble.waiting {
            self.memory.trouble.insert(container, waiting);
        }
        let before = self.memory.retries.get(&step).map(|r| r.delay * 2);
        let delay = before.unwrap_or(trouble.first).min(trouble.longest);
        self.delay(step, now, delay);
    }
}

/// Waits for a change; for ever where nobody can make one any more.
async fn changed<T>(receiver: &mut watch::Receiver<T>) {
    if receiver.changed().await.is_err() {
        std::future::pending().await
    }
}

#[cfg(test)]
mod device;
#[cfg(test)]
mod storage;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod trouble;
