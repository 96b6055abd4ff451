//! The Pod manager: reads what is wanted, and gives each Pod a task of its own.
//!
//! Owns the set of workers, one a Pod UID, and the watch over the runtime. Takes the desired set at
//! every change and at start: a restart is the same path. Gives the runtime's state for the Node's
//! conditions. Never talks to the cloud, and needs no session: it runs from the desired set alone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{Semaphore, watch};
use tokio::task::{self, JoinSet};
use tokio_util::sync::CancellationToken;

use super::cgroups::{CgroupDriver, Cgroups};
use super::gc;
use super::jobs::Paths;
use super::ledger::{Ledger, LedgerStore};
use super::observe::{Wakers, Watcher};
use super::plan::Now;
use super::rotate;
use super::volumes::Volumes;
use super::worker::{Clock, Shared, Worker};
use crate::cri::{CriError, Failure, Runtime, api};
use crate::node::environment::Environment;
use crate::store::desired::{Desired, DesiredPod};
use crate::store::events::Events;
use crate::store::reports::Reports;

/// Between two looks at a runtime that is well.
const WELL: Duration = Duration::from_secs(30);
/// Between two looks at a runtime that is missing or not ready.
const UNWELL: Duration = Duration::from_secs(1);

/// A worker that panicked is started again after this.
const AFTER_PANIC: Duration = Duration::from_secs(10);

/// What an operator may set.
#[derive(Debug, Clone)]
pub struct Config {
    /// The kubelet's `maxPods`.
    pub most_pods: usize,
    pub paths: Paths,
    pub logs: rotate::Config,
    /// Instead of asking the runtime; for runtimes that do not say, and for tests.
    pub cgroups: Option<Cgroups>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            most_pods: 110,
            paths: Paths::default(),
            logs: rotate::Config::default(),
            cgroups: None,
        }
    }
}

/// What the Pod manager works with.
pub struct Deps {
    pub cri: Runtime,
    pub desired: Desired,
    pub reports: Reports,
    pub events: Events,
    pub volumes: Arc<Volumes>,
    pub environment: watch::Receiver<Option<Environment>>,
    pub ledger: Arc<dyn LedgerStore>,
    /// `None` for the device's own clocks.
    pub clock: Option<Clock>,
}

/// The container runtime as the Node's conditions show it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RuntimeState {
    pub ready: bool,
    pub network_ready: bool,
    /// Why one of them is not; empty when all is well.
    pub message: String,
    /// `containerd`, as before container IDs.
    pub name: String,
    pub version: String,
}

/// What others see of the Pod manager; cheap to clone.
#[derive(Clone)]
pub struct Handle {
    pub runtime: watch::Receiver<RuntimeState>,
    shared: Arc<Shared>,
}

impl Handle {
    /// The cgroups above Pods, once the runtime has said who makes them.
    pub fn cgroups(&self) -> Arc<OnceLock<Arc<Cgroups>>> {
        self.shared.cgroups.clone()
    }
}

/// The Pod manager itself.
pub struct Task {
    shared: Arc<Shared>,
    config: Config,
    runtime: watch::Sender<RuntimeState>,
    workers: BTreeMap<String, watch::Sender<DesiredPod>>,
    tasks: JoinSet<String>,
    /// Whose each task is, so that one that panicked can be told.
    whose: BTreeMap<task::Id, String>,
}

/// The Pod manager; nothing runs until its task does.
pub struct PodManager;

impl PodManager {
    pub fn build(config: Config, deps: Deps) -> (Handle, Task) {
        let (sender, runtime) = watch::channel(RuntimeState {
            message: "the container runtime has not answered yet".into(),
            ..Default::default()
        });
        let shared = Arc::new(Shared {
            cri: deps.cri,
            desired: deps.desired,
            reports: deps.reports,
            events: deps.events,
            volumes: deps.volumes,
            cgroups: Arc::new(OnceLock::new()),
            environment: deps.environment,
            runtime: runtime.clone(),
            ledger: Arc::new(Ledger::open(deps.ledger)),
            most_pods: config.most_pods,
            wakers: Wakers::default(),
            paths: Arc::new(config.paths.clone()),
            clock: deps.clock.unwrap_or_else(device_clock),
            counting: Arc::new(Semaphore::new(1)),
        });
        let handle = Handle {
            runtime,
            shared: shared.clone(),
        };
        let task = Task {
            shared,
            config,
            runtime: sender,
            workers: BTreeMap::new(),
            tasks: JoinSet::new(),
            whose: BTreeMap::new(),
        };
        (handle, task)
    }
}

fn device_clock() -> Clock {
    let start = tokio::time::Instant::now();
    Arc::new(move || Now {
        wall: Timestamp::now(),
        mono: start.elapsed(),
    })
}

impl Task {
    /// Runs until shutdown; Pods keep running after it.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let stop = shutdown.child_token();
        let _ends_with_me = stop.clone().drop_guard();
        let (strangers, mut seen_strangers) = watch::channel(0);
        let watcher = Watcher {
            cri: self.shared.cri.clone(),
            wakers: self.shared.wakers.clone(),
            strangers,
        };
        let mut helpers = JoinSet::new();
        helpers.spawn(watcher.run(stop.clone()));
        let health = Health {
            shared: self.shared.clone(),
            given: self.config.cgroups.take(),
            runtime: self.runtime.clone(),
        };
        helpers.spawn(health.run(stop.clone()));
        helpers.spawn(gc::run(self.shared.clone(), stop.clone()));
        let logs = rotate::run(self.shared.clone(), self.config.logs, stop.clone());
        helpers.spawn(logs);

        let mut changes = self.shared.desired.changes();
        let mut runtime = self.runtime.subscribe();
        loop {
            changes.borrow_and_update();
            seen_strangers.borrow_and_update();
            self.reconcile(&stop);
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                changed = changes.changed() => if changed.is_err() { break },
                Some(ended) = self.tasks.join_next_with_id() => self.worker_ended(ended),
                _ = seen_strangers.changed() => {}
                _ = runtime.changed() => {}
                Some(ended) = helpers.join_next() => {
                    // Without its helpers the manager would be blind: the process must say so.
                    tracing::error!(?ended, "a task of the Pod manager ended");
                    break;
                }
            }
        }
        stop.cancel();
        while self.tasks.join_next().await.is_some() {}
    }

    /// Gives every Pod its worker and every worker its Pod.
    fn reconcile(&mut self, stop: &CancellationToken) {
        let mut pods = self.shared.desired.pods();
        // One that is wanted again while its removal goes on is wanted.
        pods.sort_by_key(|p| p.removed);
        let mut seen = BTreeSet::new();
        for pod in pods {
            if !seen.insert(pod.key.uid.clone()) {
                continue;
            }
            let uid = pod.key.uid.to_string();
            match self.workers.get(&uid) {
                Some(worker) => {
                    worker.send_if_modified(|old| {
                        let changed = old.hash != pod.hash || old.removed != pod.removed;
                        if changed {
                            *old = pod;
                        }
                        changed
                    });
                }
                None => self.hire(uid, pod, stop),
            }
        }
        // A ConfigMap or Secret may have changed: each worker looks at its own references.
        self.shared.wakers.objects_changed();
    }

    fn hire(&mut self, uid: String, pod: DesiredPod, stop: &CancellationToken) {
        let (sender, wanted) = watch::channel(pod);
        let waker = self.shared.wakers.add(&uid);
        let worker = Worker::new(self.shared.clone(), wanted, waker);
        let stop = stop.clone();
        self.workers.insert(uid.clone(), sender);
        let name = uid.clone();
        let task = self.tasks.spawn(async move {
            worker.run(stop).await;
            uid
        });
        self.whose.insert(task.id(), name);
    }

    fn worker_ended(&mut self, ended: Result<(task::Id, String), task::JoinError>) {
        match ended {
            Ok((id, uid)) => {
                self.whose.remove(&id);
                self.workers.remove(&uid);
                self.shared.wakers.remove(&uid);
            }
            Err(error) => {
                let Some(uid) = self.whose.remove(&error.id()) else {
                    return;
                };
                tracing::error!(uid, %error, "a Pod's worker panicked and will be started again");
                // It stays listed for a while, so that what makes it panic at once does not spin.
                self.tasks.spawn(async move {
                    tokio::time::sleep(AFTER_PANIC).await;
                    uid
                });
            }
        }
    }
}

/// Watches over the runtime itself.
struct Health {
    shared: Arc<Shared>,
    given: Option<Cgroups>,
    runtime: watch::Sender<RuntimeState>,
}

impl Health {
    async fn run(mut self, shutdown: CancellationToken) {
        loop {
            let mut state = self.look().await;
            if state.ready
                && let Err(why) = self.learn_driver().await
            {
                state.ready = false;
                state.message = format!("container runtime is down: {why}");
            }
            let well = state.ready && state.network_ready;
            tell(&self.runtime.borrow(), &state);
            self.runtime.send_if_modified(|old| {
                let changed = *old != state;
                *old = state;
                changed
            });
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(if well { WELL } else { UNWELL }) => {}
                // One that is known to be unwell is looked at often enough.
                () = self.shared.wakers.doubted(), if well => {}
            }
        }
    }

    /// Once.
    async fn learn_driver(&mut self) -> Result<(), String> {
        if self.shared.cgroups.get().is_some() {
            return Ok(());
        }
        let cgroups = match self.given.take() {
            Some(given) => given,
            None => Cgroups::detect(named(self.shared.cri.runtime_config().await)?),
        };
        // Set once: nobody else does.
        let _ = self.shared.cgroups.set(Arc::new(cgroups));
        Ok(())
    }

    async fn look(&self) -> RuntimeState {
        let before = self.runtime.borrow().clone();
        let status = match self.shared.cri.status().await {
            Ok(status) => status,
            Err(e) => {
                return RuntimeState {
                    ready: false,
                    network_ready: false,
                    message: format!("container runtime is down: {}", e.message),
                    ..before
                };
            }
        };
        let mut state = RuntimeState {
            name: before.name,
            version: before.version,
            ..judge(&status)
        };
        // The version may be another one after the runtime was away.
        if state.name.is_empty() || !before.ready {
            match self.shared.cri.version().await {
                Ok(v) => (state.name, state.version) = (v.runtime_name, v.runtime_version),
                Err(e) => {
                    state.ready = false;
                    state.message = format!("container runtime is down: {}", e.message);
                }
            }
        }
        state
    }
}

/// Tells operators what changed, from the first look on.
fn tell(before: &RuntimeState, now: &RuntimeState) {
    let (name, version) = (&now.name, &now.version);
    if now.ready && !before.ready {
        tracing::info!(name, version, "the container runtime is ready");
    }
    if !now.message.is_empty() && now.message != before.message {
        tracing::warn!(why = now.message, "Pods cannot be started");
    } else if now.network_ready && !before.network_ready {
        tracing::info!(name, "the network of the container runtime is ready");
    }
}

fn judge(status: &api::StatusResponse) -> RuntimeState {
    let conditions = status
        .status
        .as_ref()
        .map(|s| s.conditions.as_slice())
        .unwrap_or_default();
    let find = |kind: &str| conditions.iter().find(|c| c.r#type == kind);
    let (runtime, network) = (find("RuntimeReady"), find("NetworkReady"));
    let complaint = |word: &str, c: Option<&api::RuntimeCondition>| match c {
        Some(c) if c.status => None,
        Some(c) => Some(format!("{word}: reason:{} message:{}", c.reason, c.message)),
        None => Some(format!("{word}: the runtime does not say")),
    };
    let complaints = [
        complaint("container runtime not ready", runtime),
        complaint("container runtime network not ready", network),
    ];
    let complaints: Vec<_> = complaints.into_iter().flatten().collect();
    RuntimeState {
        ready: runtime.is_some_and(|c| c.status),
        network_ready: network.is_some_and(|c| c.status),
        message: complaints.join("; "),
        ..Default::default()
    }
}

/// The driver that the runtime names, if it can say: one that did not answer is asked again, for a
/// wrong driver is wrong until the next start.
fn named(
    answer: Result<api::RuntimeConfigResponse, CriError>,
) -> Result<Option<CgroupDriver>, String> {
    match answer {
        Ok(answer) => Ok(answer.linux.map(|l| driver(l.cgroup_driver))),
        Err(e) => match e.failure {
            Failure::Unimplemented | Failure::Refused | Failure::NotFound => Ok(None),
            Failure::Unavailable | Failure::Deadline => Err(e.message),
        },
    }
}

fn driver(number: i32) -> CgroupDriver {
    match api::CgroupDriver::try_from(number) {
        Ok(api::CgroupDriver::Systemd) => CgroupDriver::Systemd,
        Ok(api::CgroupDriver::Cgroupfs) | Err(_) => CgroupDriver::Cgroupfs,
    }
}

/// The UIDs that have a record, wanted or on their way out.
pub(super) fn recorded(desired: &Desired) -> BTreeSet<String> {
    desired
        .pods()
        .iter()
        .map(|p| p.key.uid.to_string())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_runtime_that_cannot_name_its_cgroup_driver_is_guessed_at() {
        let failed = |failure| {
            named(Err(CriError {
                call: "RuntimeConfig",
                failure,
                message: "no".into(),
            }))
        };
        assert_eq!(failed(Failure::Unimplemented), Ok(None));
        assert_eq!(failed(Failure::Refused), Ok(None));
        assert_eq!(failed(Failure::Deadline), Err("no".into()));
        assert_eq!(failed(Failure::Unavailable), Err("no".into()));
        let systemd = api::RuntimeConfigResponse {
            linux: Some(api::LinuxRuntimeConfiguration {
                cgroup_driver: api::CgroupDriver::Systemd.into(),
            }),
        };
        assert_eq!(named(Ok(systemd)), Ok(Some(CgroupDriver::Systemd)));
    }
}
