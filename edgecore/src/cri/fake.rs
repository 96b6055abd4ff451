//! A container runtime in memory, with faults: for tests, and for edges that only pretend.
//!
//! Containers run as their [`Program`] says, by tokio's clock, so a test with paused time sees
//! hours pass. Every call is recorded; any call can be made to fail or to take long.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use jiff::Timestamp;
use tokio::sync::{Notify, broadcast};
use tokio::time::{Instant, sleep};

use super::{Changed, Cri, CriError, CriFuture, Failure, api, convert};

/// What a container does once started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Program {
    /// Ends by itself after this, with this code.
    pub ends: Option<(Duration, i32)>,
    /// Goes on when it is asked to stop.
    pub stubborn: bool,
}

impl Default for Program {
    /// Runs until it is asked to stop.
    fn default() -> Self {
        Self {
            ends: None,
            stubborn: false,
        }
    }
}

/// What containers of one name have used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    pub cpu_nanos: u64,
    pub working_set_bytes: u64,
    /// Of the layer that is the container's own.
    pub written_bytes: u64,
}

#[derive(Debug, Clone)]
struct Sandbox {
    config: api::PodSandboxConfig,
    ready: bool,
    created_at: i64,
    ip: String,
}

#[derive(Debug, Clone)]
struct Container {
    sandbox: String,
    config: api::ContainerConfig,
    created_at: i64,
    started: Option<(Instant, i64)>,
    ended: Option<(i64, i32)>,
    program: Program,
}

#[derive(Default)]
struct State {
    sandboxes: BTreeMap<String, Sandbox>,
    containers: BTreeMap<String, Container>,
    images: BTreeMap<String, api::Image>,
    /// What a registry would give.
    remote: BTreeMap<String, Option<String>>,
    programs: BTreeMap<String, Program>,
    faults: Vec<(&'static str, CriError)>,
    delays: BTreeMap<&'static str, Duration>,
    usage: BTreeMap<String, Usage>,
    calls: Vec<String>,
    events: Option<broadcast::Sender<String>>,
    looks: usize,
    down: bool,
    no_network: bool,
    next: u32,
}

/// The runtime.
pub struct Fake {
    state: Mutex<State>,
    changed: Notify,
    epoch: (Instant, Timestamp),
}

impl Fake {
    /// An empty runtime whose wall clock reads `now`; needs a tokio runtime.
    pub fn new(now: Timestamp) -> Self {
        Self {
            state: Mutex::default(),
            changed: Notify::new(),
            epoch: (Instant::now(), now),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This runtime's wall clock.
    pub fn now(&self) -> Timestamp {
        self.epoch.1 + self.epoch.0.elapsed()
    }

    fn stamp(&self) -> i64 {
        i64::try_from(self.now().as_nanosecond()).unwrap_or(i64::MAX)
    }

    /// Puts an image on the device.
    pub fn add_image(&self, name: &str) {
        self.state().images.insert(name.to_owned(), image(name));
    }

    /// Lets an image be pulled, by anybody or with this user name only.
    pub fn publish(&self, name: &str, user: Option<&str>) {
        self.state()
            .remote
            .insert(name.to_owned(), user.map(str::to_owned));
    }

    /// What containers of this name do when they are started next.
    pub fn program(&self, container: &str, program: Program) {
        self.state().programs.insert(container.to_owned(), program);
    }

    /// What containers of this name have used by now.
    pub fn uses(&self, container: &str, usage: Usage) {
        self.state().usage.insert(container.to_owned(), usage);
    }

    /// Makes the next call of this name fail.
    pub fn fail_next(&self, call: &'static str, failure: Failure, message: &str) {
        let message = message.to_owned();
        self.state().faults.push((
            call,
            CriError {
                call,
                failure,
                message,
            },
        ));
    }

    /// Makes every call of this name take this long.
    pub fn delay(&self, call: &'static str, time: Duration) {
        self.state().delays.insert(call, time);
    }

    /// Gives events from now on, as newer runtimes do.
    pub fn with_events(&self) {
        // More than the few containers of a test change between two looks.
        self.state().events = Some(broadcast::channel(64).0);
    }

    /// Lets the time do what the programs say, and tells it as events.
    pub fn tick(&self) {
        let stamp = self.stamp();
        let mut state = self.state();
        let state = &mut *state;
        for c in state.containers.values_mut().filter(|c| c.is_running()) {
            c.advance(stamp);
            let uid = c.config.labels.get(convert::POD_UID).cloned();
            if let (Some(events), Some(uid), false) = (&state.events, uid, c.is_running()) {
                // Nobody may be listening.
                let _ = events.send(uid);
            }
        }
    }

    /// Takes the socket away, or brings it back; containers go on.
    pub fn set_down(&self, down: bool) {
        self.state().down = down;
    }

    pub fn set_network(&self, ready: bool) {
        self.state().no_network = !ready;
    }

    /// Kills a sandbox as a reboot would: all in it is dead.
    pub fn lose_sandbox(&self, uid: &str) {
        let stamp = self.stamp();
        let mut state = self.state();
        let state = &mut *state;
        for (id, sandbox) in &mut state.sandboxes {
            if sandbox
                .config
                .metadata
                .as_ref()
                .is_some_and(|m| m.uid == uid)
            {
                sandbox.ready = false;
                let inside = state.containers.values_mut().filter(|c| c.sandbox == *id);
                inside.for_each(|c| c.end(stamp, 137));
            }
        }
    }

    /// The calls that changed something, in order: `StartContainer main/0`.
    pub fn calls(&self) -> Vec<String> {
        self.state().calls.clone()
    }

    pub fn forget_calls(&self) {
        self.state().calls.clear();
    }

    /// How many calls of any kind were made since this was last asked.
    pub fn count_looks(&self) -> usize {
        std::mem::take(&mut self.state().looks)
    }

    /// Containers that run, as `NAME/ATTEMPT`.
    pub fn running(&self) -> Vec<String> {
        let stamp = self.stamp();
        let mut state = self.state();
        state.containers.values_mut().for_each(|c| c.advance(stamp));
        let running = state.containers.values().filter(|c| c.is_running());
        running.map(Container::label).collect()
    }

    /// Nothing of any Pod is left.
    pub fn is_empty(&self) -> bool {
        let state = self.state();
        state.sandboxes.is_empty() && state.containers.is_empty()
    }

    /// The configuration of the newest container of this name.
    pub fn config_of(&self, name: &str) -> Option<api::ContainerConfig> {
        let state = self.state();
        let named = state.containers.values().filter(|c| c.name() == name);
        named.max_by_key(|c| c.attempt()).map(|c| c.config.clone())
    }

    async fn enter(&self, call: &'static str) -> Result<(), CriError> {
        let delay = self.state().delays.get(call).copied();
        if let Some(delay) = delay {
            sleep(delay).await;
        }
        let mut state = self.state();
        state.looks += 1;
        if state.down {
            return Err(error(call, Failure::Unavailable, "the socket is missing"));
        }
        match state.faults.iter().position(|(c, _)| *c == call) {
            Some(at) => Err(state.faults.remove(at).1),
            None => Ok(()),
        }
    }

    fn record(&self, call: &str, what: &str) {
        self.state().calls.push(format!("{call} {what}"));
        self.changed.notify_waiters();
    }

    fn fresh_id(&self, kind: &str) -> String {
        let mut state = self.state();
        state.next += 1;
        format!("{kind}-{}", state.next)
    }

    fn container(&self, call: &'static str, id: &str) -> Result<Container, CriError> {
        let stamp = self.stamp();
        let mut state = self.state();
        let found = state.containers.get_mut(id);
        let found = found.ok_or_else(|| error(call, Failure::NotFound, "no such container"))?;
        found.advance(stamp);
        Ok(found.clone())
    }

    fn end(&self, id: &str, code: i32) {
        let stamp = self.stamp();
        if let Some(c) = self.state().containers.get_mut(id) {
            c.end(stamp, code);
        }
        self.changed.notify_waiters();
    }
}

fn error(call: &'static str, failure: Failure, message: &str) -> CriError {
    CriError {
        call,
        failure,
        message: message.to_owned(),
    }
}

fn image(name: &str) -> api::Image {
    api::Image {
        id: format!("sha256:{name}"),
        repo_tags: vec![name.to_owned()],
        size: 1 << 20,
        ..Default::default()
    }
}

fn selects(selector: Option<&str>, labels: &HashMap<String, String>) -> bool {
    selector.is_none_or(|uid| labels.get(convert::POD_UID).is_some_and(|u| u == uid))
}

impl Container {
    fn name(&self) -> &str {
        self.config.metadata.as_ref().map_or("", |m| &m.name)
    }

    fn attempt(&self) -> u32 {
        self.config.metadata.as_ref().map_or(0, |m| m.attempt)
    }

    fn label(&self) -> String {
        format!("{}/{}", self.name(), self.attempt())
    }

    fn is_running(&self) -> bool {
        self.started.is_some() && self.ended.is_none()
    }

    fn end(&mut self, stamp: i64, code: i32) {
        if self.is_running() {
            self.ended = Some((stamp, code));
        }
    }

    /// Lets the time do what the program says.
    fn advance(&mut self, stamp: i64) {
        if let (Some((began, _)), Some((after, code))) = (self.started, self.program.ends)
            && began.elapsed() >= after
        {
            let late = began.elapsed() - after;
            let ended = stamp - i64::try_from(late.as_nanos()).unwrap_or(0);
            self.end(ended, code);
        }
    }

    fn stats(&self, id: &str, timestamp: i64, usage: Option<&Usage>) -> api::ContainerStats {
        let value = |value| Some(api::UInt64Value { value });
        api::ContainerStats {
            attributes: Some(api::ContainerAttributes {
                id: id.to_owned(),
                metadata: self.config.metadata.clone(),
                labels: self.config.labels.clone(),
            }),
            cpu: usage.map(|usage| api::CpuUsage {
                timestamp,
                usage_core_nano_seconds: value(usage.cpu_nanos),
                usage_nano_cores: None,
            }),
            memory: usage.map(|usage| api::MemoryUsage {
                timestamp,
                working_set_bytes: value(usage.working_set_bytes),
                ..Default::default()
            }),
            writable_layer: usage.map(|usage| api::FilesystemUsage {
                timestamp,
                used_bytes: value(usage.written_bytes),
                ..Default::default()
            }),
        }
    }

    fn state(&self) -> i32 {
        let state = match (self.started, self.ended) {
            (None, _) => api::ContainerState::ContainerCreated,
            (Some(_), None) => api::ContainerState::ContainerRunning,
            (Some(_), Some(_)) => api::ContainerState::ContainerExited,
        };
        state.into()
    }
}

/// Calls that the Pod manager does not make of it.
fn unimplemented<'a, T: Send + 'a>(call: &'static str) -> CriFuture<'a, T> {
    Box::pin(async move { Err(error(call, Failure::Unimplemented, "not in this runtime")) })
}

impl Cri for Fake {
    fn version(&self) -> CriFuture<'_, api::VersionResponse> {
        Box::pin(async {
            self.enter("Version").await?;
            Ok(api::VersionResponse {
                runtime_name: "fake".into(),
                runtime_version: "1".into(),
                ..Default::default()
            })
        })
    }

    fn status(&self) -> CriFuture<'_, api::StatusResponse> {
        Box::pin(async {
            self.enter("Status").await?;
            let network = !self.state().no_network;
            let condition = |kind: &str, status| api::RuntimeCondition {
                r#type: kind.into(),
                status,
                reason: if status { "" } else { "NetworkPluginNotReady" }.into(),
                message: String::new(),
            };
            let conditions = vec![
                condition("RuntimeReady", true),
                condition("NetworkReady", network),
            ];
            Ok(api::StatusResponse {
                status: Some(api::RuntimeStatus { conditions }),
                ..Default::default()
            })
        })
    }

    fn runtime_config(&self) -> CriFuture<'_, api::RuntimeConfigResponse> {
        unimplemented("RuntimeConfig")
    }

    fn update_runtime_config(&self, _: String) -> CriFuture<'_, ()> {
        unimplemented("UpdateRuntimeConfig")
    }

    fn run_sandbox(&self, config: api::PodSandboxConfig, _: String) -> CriFuture<'_, String> {
        Box::pin(async move {
            self.enter("RunPodSandbox").await?;
            let id = self.fresh_id("sandbox");
            let attempt = config.metadata.as_ref().map_or(0, |m| m.attempt);
            let created_at = self.stamp();
            let mut state = self.state();
            let ip = format!("10.0.0.{}", state.next);
            let sandbox = Sandbox {
                config,
                ready: true,
                created_at,
                ip,
            };
            state.sandboxes.insert(id.clone(), sandbox);
            drop(state);
            self.record("RunPodSandbox", &attempt.to_string());
            Ok(id)
        })
    }

    fn stop_sandbox<'a>(&'a self, id: &'a str) -> CriFuture<'a, ()> {
        Box::pin(async move {
            self.enter("StopPodSandbox").await?;
            let stamp = self.stamp();
            let mut state = self.state();
            if let Some(sandbox) = state.sandboxes.get_mut(id) {
                sandbox.ready = false;
            }
            let inside = state.containers.values_mut().filter(|c| c.sandbox == id);
            inside.for_each(|c| c.end(stamp, 137));
            drop(state);
            self.record("StopPodSandbox", id);
            Ok(())
        })
    }

    fn remove_sandbox<'a>(&'a self, id: &'a str) -> CriFuture<'a, ()> {
        Box::pin(async move {
            self.enter("RemovePodSandbox").await?;
            let mut state = self.state();
            state.sandboxes.remove(id);
            state.containers.retain(|_, c| c.sandbox != id);
            drop(state);
            self.record("RemovePodSandbox", id);
            Ok(())
        })
    }

    fn sandbox_status<'a>(&'a self, id: &'a str) -> CriFuture<'a, api::PodSandboxStatus> {
        Box::pin(async move {
            self.enter("PodSandboxStatus").await?;
            let state = self.state();
            let sandbox = state.sandboxes.get(id);
            let sandbox =
                sandbox.ok_or_else(|| error("PodSandboxStatus", Failure::NotFound, "gone"))?;
            let linux = sandbox.config.linux.as_ref();
            let options = linux
                .and_then(|l| l.security_context.as_ref())
                .and_then(|s| s.namespace_options.clone());
            Ok(api::PodSandboxStatus {
                id: id.to_owned(),
                metadata: sandbox.config.metadata.clone(),
                state: i32::from(!sandbox.ready),
                created_at: sandbox.created_at,
                network: Some(api::PodSandboxNetworkStatus {
                    ip: sandbox.ip.clone(),
                    additional_ips: Vec::new(),
                }),
                linux: Some(api::LinuxPodSandboxStatus {
                    namespaces: Some(api::Namespace { options }),
                }),
            })
        })
    }

    fn list_sandboxes<'a>(&'a self, uid: Option<&'a str>) -> CriFuture<'a, Vec<api::PodSandbox>> {
        Box::pin(async move {
            self.enter("ListPodSandbox").await?;
            let state = self.state();
            let all = state.sandboxes.iter();
            let mine = all.filter(|(_, s)| selects(uid, &s.config.labels));
            Ok(mine
                .map(|(id, s)| api::PodSandbox {
                    id: id.clone(),
                    metadata: s.config.metadata.clone(),
                    state: i32::from(!s.ready),
                    created_at: s.created_at,
                    labels: s.config.labels.clone(),
                    annotations: s.config.annotations.clone(),
                })
                .collect())
        })
    }

    fn create_container(&self, request: api::CreateContainerRequest) -> CriFuture<'_, String> {
        Box::pin(async move {
            self.enter("CreateContainer").await?;
            let id = self.fresh_id("container");
            let config = request.config.unwrap_or_default();
            let created_at = self.stamp();
            let mut state = self.state();
            let up = state
                .sandboxes
                .get(&request.pod_sandbox_id)
                .is_some_and(|s| s.ready);
            if !up {
                return Err(error(
                    "CreateContainer",
                    Failure::Refused,
                    "the sandbox is not up",
                ));
            }
            let name = config.metadata.as_ref().map_or("", |m| &m.name);
            let program = state.programs.get(name).copied().unwrap_or_default();
            let container = Container {
                sandbox: request.pod_sandbox_id,
                config,
                created_at,
                started: None,
                ended: None,
                program,
            };
            let label = container.label();
            state.containers.insert(id.clone(), container);
            drop(state);
            self.record("CreateContainer", &label);
            Ok(id)
        })
    }

    fn start_container<'a>(&'a self, id: &'a str) -> CriFuture<'a, ()> {
        Box::pin(async move {
            self.enter("StartContainer").await?;
            let label = self.container("StartContainer", id)?.label();
            let stamp = self.stamp();
            if let Some(c) = self.state().containers.get_mut(id) {
                c.started = Some((Instant::now(), stamp));
            }
            self.record("StartContainer", &label);
            Ok(())
        })
    }

    fn stop_container<'a>(&'a self, id: &'a str, grace: Duration) -> CriFuture<'a, ()> {
        Box::pin(async move {
            self.enter("StopContainer").await?;
            let Ok(found) = self.container("StopContainer", id) else {
                return Ok(());
            };
            self.record(
                "StopContainer",
                &format!("{} {}s", found.label(), grace.as_secs()),
            );
            let kill_at = Instant::now() + grace;
            if !found.program.stubborn {
                self.end(id, 143);
            }
            loop {
                let changed = self.changed.notified();
                let alive = self
                    .container("StopContainer", id)
                    .is_ok_and(|c| c.is_running());
                if !alive {
                    return Ok(());
                }
                tokio::select! {
                    () = tokio::time::sleep_until(kill_at) => self.end(id, 137),
                    () = changed => {}
                }
            }
        })
    }

    fn remove_container<'a>(&'a self, id: &'a str) -> CriFuture<'a, ()> {
        Box::pin(async move {
            self.enter("RemoveContainer").await?;
            let removed = self.state().containers.remove(id);
            if let Some(removed) = removed {
                self.record("RemoveContainer", &removed.label());
            }
            Ok(())
        })
    }

    fn container_status<'a>(&'a self, id: &'a str) -> CriFuture<'a, api::ContainerStatus> {
        Box::pin(async move {
            self.enter("ContainerStatus").await?;
            let c = self.container("ContainerStatus", id)?;
            Ok(api::ContainerStatus {
                id: id.to_owned(),
                metadata: c.config.metadata.clone(),
                state: c.state(),
                created_at: c.created_at,
                started_at: c.started.map_or(0, |(_, stamp)| stamp),
                finished_at: c.ended.map_or(0, |(stamp, _)| stamp),
                exit_code: c.ended.map_or(0, |(_, code)| code),
                image: c.config.image.clone(),
                image_ref: c.config.image.clone().map(|i| i.image).unwrap_or_default(),
                labels: c.config.labels.clone(),
                annotations: c.config.annotations,
                ..Default::default()
            })
        })
    }

    fn list_containers<'a>(&'a self, uid: Option<&'a str>) -> CriFuture<'a, Vec<api::Container>> {
        Box::pin(async move {
            self.enter("ListContainers").await?;
            let stamp = self.stamp();
            let mut state = self.state();
            let all = state.containers.iter_mut();
            let mine = all.filter(|(_, c)| selects(uid, &c.config.labels));
            Ok(mine
                .map(|(id, c)| {
                    c.advance(stamp);
                    api::Container {
                        id: id.clone(),
                        pod_sandbox_id: c.sandbox.clone(),
                        metadata: c.config.metadata.clone(),
                        image: c.config.image.clone(),
                        image_ref: String::new(),
                        state: c.state(),
                        created_at: c.created_at,
                        labels: c.config.labels.clone(),
                        annotations: c.config.annotations.clone(),
                    }
                })
                .collect())
        })
    }

    fn update_resources(&self, _: api::UpdateContainerResourcesRequest) -> CriFuture<'_, ()> {
        unimplemented("UpdateContainerResources")
    }

    fn reopen_log<'a>(&'a self, id: &'a str) -> CriFuture<'a, ()> {
        Box::pin(async move {
            self.enter("ReopenContainerLog").await?;
            let label = self.container("ReopenContainerLog", id)?.label();
            self.record("ReopenContainerLog", &label);
            Ok(())
        })
    }

    fn container_events(&self) -> CriFuture<'_, BoxStream<'static, Result<Changed, CriError>>> {
        Box::pin(async {
            self.enter("GetContainerEvents").await?;
            let Some(sender) = self.state().events.clone() else {
                let why = "not in this runtime";
                return Err(error("GetContainerEvents", Failure::Unimplemented, why));
            };
            let receiver = sender.subscribe();
            let events = futures::stream::unfold(receiver, |mut receiver| async {
                let uid = receiver.recv().await.ok()?;
                Some((Ok(Some(uid)), receiver))
            });
            Ok(events.boxed())
        })
    }

    fn exec_sync<'a>(
        &'a self,
        id: &'a str,
        command: Vec<String>,
        _: Duration,
    ) -> CriFuture<'a, api::ExecSyncResponse> {
        Box::pin(async move {
            self.enter("ExecSync").await?;
            let label = self.container("ExecSync", id)?.label();
            self.record("ExecSync", &format!("{label} {}", command.join(" ")));
            Ok(api::ExecSyncResponse::default())
        })
    }

    fn exec(&self, _: api::ExecRequest) -> CriFuture<'_, String> {
        unimplemented("Exec")
    }

    fn attach(&self, _: api::AttachRequest) -> CriFuture<'_, String> {
        unimplemented("Attach")
    }

    fn port_forward(&self, _: api::PortForwardRequest) -> CriFuture<'_, String> {
        unimplemented("PortForward")
    }

    fn image_status<'a>(&'a self, name: &'a str) -> CriFuture<'a, Option<api::Image>> {
        Box::pin(async move {
            self.enter("ImageStatus").await?;
            let state = self.state();
            let by_id = || state.images.values().find(|i| i.id == name);
            Ok(state.images.get(name).or_else(by_id).cloned())
        })
    }

    fn pull_image(&self, request: api::PullImageRequest) -> CriFuture<'_, String> {
        Box::pin(async move {
            self.enter("PullImage").await?;
            let name = request.image.map(|i| i.image).unwrap_or_default();
            let user = request.auth.map(|a| a.username);
            self.record(
                "PullImage",
                &format!("{name} {}", user.as_deref().unwrap_or("-")),
            );
            let mut state = self.state();
            match state.remote.get(&name) {
                Some(None) => {}
                Some(wanted) if *wanted == user => {}
                Some(_) => return Err(error("PullImage", Failure::Refused, "unauthorized")),
                None => return Err(error("PullImage", Failure::Refused, "not found")),
            }
            let image = image(&name);
            let id = image.id.clone();
            state.images.insert(name, image);
            Ok(id)
        })
    }

    fn list_images(&self) -> CriFuture<'_, Vec<api::Image>> {
        Box::pin(async {
            self.enter("ListImages").await?;
            Ok(self.state().images.values().cloned().collect())
        })
    }

    fn remove_image<'a>(&'a self, name: &'a str) -> CriFuture<'a, ()> {
        Box::pin(async move {
            self.enter("RemoveImage").await?;
            self.state().images.remove(name);
            Ok(())
        })
    }

    fn image_fs_info(&self) -> CriFuture<'_, Vec<api::FilesystemUsage>> {
        unimplemented("ImageFsInfo")
    }

    fn container_stats<'a>(&'a self, id: &'a str) -> CriFuture<'a, Option<api::ContainerStats>> {
        Box::pin(async move {
            self.enter("ContainerStats").await?;
            let stamp = self.stamp();
            let state = self.state();
            let container = state.containers.get(id).filter(|c| c.is_running());
            Ok(container.map(|c| c.stats(id, stamp, state.usage.get(c.name()))))
        })
    }

    fn list_container_stats(&self) -> CriFuture<'_, Vec<api::ContainerStats>> {
        Box::pin(async {
            self.enter("ListContainerStats").await?;
            let stamp = self.stamp();
            let state = self.state();
            let running = state.containers.iter().filter(|(_, c)| c.is_running());
            Ok(running
                .map(|(id, c)| c.stats(id, stamp, state.usage.get(c.name())))
                .collect())
        })
    }

    fn list_sandbox_stats(&self) -> CriFuture<'_, Vec<api::PodSandboxStats>> {
        unimplemented("ListPodSandboxStats")
    }
}
