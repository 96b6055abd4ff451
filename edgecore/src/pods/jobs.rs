//! Carries out one step of a plan: the thin part, with all the I/O and none of the decisions.
//!
//! Each step is one future that ends in an [`Outcome`]; it holds what it needs and shares nothing
//! with the worker that began it, so that a worker can drop it at any await.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::ids::ObjectKey;
use common::tasks::beside;
use k8s_openapi::api::core::v1::{Container, Pod};

use super::admit::Room;
use super::cgroups::{self, Cgroups};
use super::env::{self, ConfigError, EnvContext};
use super::images::{self, Resolved};
use super::ledger::{Ledger, NoGrant};
use super::plan::{self, Step, Waiting};
use super::volumes::{MountError, Volumes};
use super::{dns, hosts, lifecycle, rotate, security};
use crate::cri::{CriError, Runtime, api, convert};
use crate::node::environment::Environment;
use crate::store::desired::Desired;
use crate::store::events::{EventType, Events, PodEvent};

/// Directories and files of the device that the Pod manager uses.
#[derive(Debug, Clone)]
pub struct Paths {
    /// Logs of Pods, usually `/var/log/pods`.
    pub pod_logs: PathBuf,
    /// Symbolic links to them by container, usually `/var/log/containers`.
    pub container_logs: PathBuf,
    pub resolv_conf: PathBuf,
    pub hosts: PathBuf,
}

impl Default for Paths {
    fn default() -> Self {
        Self {
            pod_logs: "/var/log/pods".into(),
            container_logs: "/var/log/containers".into(),
            resolv_conf: "/etc/resolv.conf".into(),
            hosts: "/etc/hosts".into(),
        }
    }
}

impl Paths {
    /// The directory of a Pod's logs.
    pub fn logs_of(&self, pod: &Pod) -> PathBuf {
        self.pod_logs.join(convert::log_directory_name(pod))
    }
}

/// What every step of one Pod works with.
#[derive(Clone)]
pub struct Job {
    pub cri: Runtime,
    pub desired: Desired,
    pub events: Events,
    pub volumes: Arc<Volumes>,
    pub cgroups: Arc<Cgroups>,
    pub ledger: Arc<Ledger>,
    pub room: Room,
    pub paths: Arc<Paths>,
    pub environment: Arc<Environment>,
    pub key: ObjectKey,
    pub pod: Arc<Pod>,
    /// Of the sandbox that is up.
    pub pod_ips: Vec<IpAddr>,
    pub sandbox_attempt: u32,
    /// For [`Step::Start`]: the container's image.
    pub image: Option<Resolved>,
    /// For [`Step::Start`]: the container whose processes an ephemeral one shares.
    pub target: Option<String>,
    /// For [`Step::Stop`]: the time left, and whether a preStop hook is still to run.
    pub grace: Duration,
    pub pre_stop: bool,
}

/// How a step ended.
#[derive(Debug)]
pub enum Outcome {
    Done,
    Volumes {
        next_refresh: Option<Duration>,
    },
    Image {
        container: String,
        resolved: Resolved,
    },
    Started {
        container: String,
        id: String,
    },
    NotGranted(NoGrant),
    Failed(Trouble),
}

/// A step that failed.
#[derive(Debug, Default)]
pub struct Trouble {
    /// What the container's status says until it works.
    pub waiting: Option<(String, Waiting)>,
    /// The first wait before another try, and the longest.
    pub first: Duration,
    pub longest: Duration,
}

impl Trouble {
    fn soon() -> Self {
        Self {
            waiting: None,
            first: Duration::from_secs(1),
            longest: Duration::from_secs(15),
        }
    }
}

impl Job {
    fn emit(&self, container: Option<&str>, kind: EventType, reason: &str, message: String) {
        let mut event = PodEvent::new(&self.key, container, kind, reason, message);
        if let Some(name) = container {
            event.field_path = plan::field_path(&self.pod, name);
        }
        self.events.emit(event);
    }

    fn spec_of(&self, name: &str) -> Option<Container> {
        let regular = plan::inits(&self.pod).iter().chain(plan::mains(&self.pod));
        let found = regular.into_iter().find(|c| c.name == name).cloned();
        found.or_else(|| {
            plan::ephemerals(&self.pod)
                .into_iter()
                .find(|c| c.name == name)
        })
    }

    fn log_directory(&self) -> PathBuf {
        self.paths.logs_of(&self.pod)
    }

    /// Where the runtime writes the log of one instance of a container.
    pub fn log_file(&self, container: &str, attempt: u32) -> PathBuf {
        self.log_directory()
            .join(convert::log_path(container, attempt))
    }

    fn link(&self, container: &str, id: &str) -> PathBuf {
        let (namespace, name, _) = convert::identity(&self.pod);
        self.paths
            .container_logs
            .join(format!("{name}_{namespace}_{container}-{id}.log"))
    }

    /// Carries the step out.
    pub async fn run(self, step: Step) -> Outcome {
        match step {
            Step::Grant => self.grant().await,
            Step::Volumes => self.mount().await,
            Step::Image { container } => self.image(&container).await,
            Step::RunSandbox { attempt } => self.run_sandbox(attempt).await,
            Step::Start {
                container,
                attempt,
                sandbox,
            } => self.start(&container, attempt, sandbox).await,
            Step::PostStart { container, id } => self.post_start(&container, &id).await,
            Step::Stop { container, id, .. } => self.stop(&container, &id).await,
            Step::RemoveContainer { id } => {
                let removed = self.cri.remove_container(&id).await;
                if removed.is_ok() {
                    let links = self.paths.container_logs.clone();
                    beside(move || remove_log_of(&links, &id)).await;
                }
                self.checked(removed)
            }
            Step::StopSandbox { id } => self.checked(self.cri.stop_sandbox(&id).await),
            Step::RemoveSandbox { id } => self.checked(self.cri.remove_sandbox(&id).await),
            Step::Cleanup => self.clean_up().await,
            Step::RemoveLogs => beside(move || self.remove_logs()).await,
        }
    }

    async fn grant(self) -> Outcome {
        beside(
            move || match self.ledger.grant(&self.key.uid, &self.pod, self.room) {
                Ok(()) => Outcome::Done,
                Err(refusal) => Outcome::NotGranted(refusal),
            },
        )
        .await
    }

    fn checked(&self, result: Result<(), CriError>) -> Outcome {
        match result {
            Ok(()) => Outcome::Done,
            Err(e) => {
                tracing::warn!(pod = %self.key, error = %e, "a step of taking a Pod away failed");
                self.emit(
                    None,
                    EventType::Warning,
                    "FailedKillPod",
                    format!("error killing pod: {e}"),
                );
                Outcome::Failed(Trouble::soon())
            }
        }
    }

    async fn mount(&self) -> Outcome {
        match self.volumes.ensure(&self.pod, &self.environment).await {
            Ok(mounted) => Outcome::Volumes {
                next_refresh: mounted.next_refresh,
            },
            Err(MountError::Unknown { .. }) => Outcome::Failed(Trouble::soon()),
            Err(e) => {
                let cause = std::error::Error::source(&e).map(|s| format!(": {s}"));
                let message = format!("{e}{}", cause.unwrap_or_default());
                self.emit(None, EventType::Warning, "FailedMount", message);
                Outcome::Failed(Trouble {
                    longest: Duration::from_secs(120),
                    ..Trouble::soon()
                })
            }
        }
    }

    async fn image(&self, name: &str) -> Outcome {
        let Some(container) = self.spec_of(name) else {
            return Outcome::Done;
        };
        let ctx = images::Context {
            cri: &*self.cri,
            desired: &self.desired,
            events: &self.events,
            key: &self.key,
            pod: &self.pod,
            sandbox: None,
        };
        match images::ensure(&ctx, &container).await {
            Ok(resolved) => Outcome::Image {
                container: name.to_owned(),
                resolved,
            },
            Err(trouble) => Outcome::Failed(Trouble {
                waiting: Some((name.to_owned(), trouble.waiting)),
                first: Duration::from_secs(10),
                longest: Duration::from_secs(300),
            }),
        }
    }

    fn sandbox_config(&self, attempt: u32) -> Result<api::PodSandboxConfig, String> {
        let host = std::fs::read_to_string(&self.paths.resolv_conf).unwrap_or_default();
        let dns = dns::dns_config(&self.pod, &self.environment, &host);
        let hostname = dns::hostname(&self.pod, &self.environment);
        if let Some(problem) = &hostname.problem {
            return Err(problem.clone());
        }
        Ok(convert::sandbox_config(convert::SandboxInput {
            pod: &self.pod,
            node: &self.environment.node_name,
            attempt,
            hostname: &hostname,
            dns,
            log_directory: self.log_directory().to_string_lossy().into_owned(),
            cgroup_parent: self.cgroups.parent(&self.pod),
            security: security::sandbox(&self.pod),
        }))
    }

    fn tell_of_dns(&self) {
        let host = std::fs::read_to_string(&self.paths.resolv_conf).unwrap_or_default();
        let dns = dns::dns_config(&self.pod, &self.environment, &host);
        if let Some((kind, reason, message)) = dns.remark {
            self.emit(None, kind, reason, message);
        }
    }

    async fn run_sandbox(&self, attempt: u32) -> Outcome {
        let made = async {
            std::fs::create_dir_all(self.log_directory()).map_err(|e| {
                format!(
                    "cannot make the log directory {:?}: {e}",
                    self.log_directory()
                )
            })?;
            self.cgroups
                .ensure(&self.pod)
                .map_err(|e| format!("cannot make the Pod's cgroup: {e}"))?;
            let config = self.sandbox_config(attempt)?;
            self.tell_of_dns();
            let handler = self.runtime_handler();
            self.cri
                .run_sandbox(config, handler)
                .await
                .map_err(|e| e.message)
        };
        match made.await {
            Ok(_) => Outcome::Done,
            Err(why) => {
                let message = format!("Failed to create pod sandbox: {why}");
                self.emit(None, EventType::Warning, "FailedCreatePodSandBox", message);
                Outcome::Failed(Trouble::soon())
            }
        }
    }

    /// A RuntimeClass is named after its handler here; the object itself does not come down.
    fn runtime_handler(&self) -> String {
        let spec = self.pod.spec.as_ref();
        spec.and_then(|s| s.runtime_class_name.clone())
            .unwrap_or_default()
    }

    fn refused(&self, container: &str, reason: &str, message: String) -> Outcome {
        let text = format!("Error: {message}");
        self.emit(Some(container), EventType::Warning, "Failed", text);
        let waiting = Waiting {
            reason: reason.into(),
            message,
        };
        Outcome::Failed(Trouble {
            waiting: Some((container.to_owned(), waiting)),
            first: Duration::from_secs(2),
            ..Trouble::soon()
        })
    }

    async fn start(&self, name: &str, attempt: u32, sandbox: String) -> Outcome {
        let (Some(container), Some(image)) = (self.spec_of(name), self.image.clone()) else {
            return Outcome::Done;
        };
        // Mounts, and a hostPath may be on a file system that does not answer.
        let (job, spec) = (self.clone(), container.clone());
        let config = beside(move || job.container_config(&spec, attempt, image)).await;
        let config = match config {
            Ok(config) => config,
            // Not an error of anybody's: it comes from the cloud.
            Err(ConfigError::Unknown { .. }) => return Outcome::Failed(Trouble::soon()),
            Err(e) => return self.refused(name, "CreateContainerConfigError", e.to_string()),
        };
        let sandbox_config = match self.sandbox_config(self.sandbox_attempt) {
            Ok(config) => config,
            Err(e) => return self.refused(name, "CreateContainerError", e),
        };
        if let Some(dir) = self.log_file(name, attempt).parent() {
            // The runtime makes it too; one that cannot says so itself.
            let _ = std::fs::create_dir_all(dir);
        }
        let request = api::CreateContainerRequest {
            pod_sandbox_id: sandbox,
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        };
        let id = match self.cri.create_container(request).await {
            Ok(id) => id,
            Err(e) => return self.refused(name, "CreateContainerError", e.message),
        };
        self.emit(
            Some(name),
            EventType::Normal,
            "Created",
            format!("Created container: {name}"),
        );
        if let Err(e) = self.cri.start_container(&id).await {
            return self.refused(name, "RunContainerError", e.message);
        }
        self.emit(
            Some(name),
            EventType::Normal,
            "Started",
            format!("Started container {name}"),
        );
        // Log collectors find containers by this link; the Pod runs without it.
        let _ = std::fs::create_dir_all(&self.paths.container_logs);
        let _ = std::os::unix::fs::symlink(self.log_file(name, attempt), self.link(name, &id));
        Outcome::Started {
            container: name.to_owned(),
            id,
        }
    }

    fn container_config(
        &self,
        container: &Container,
        attempt: u32,
        image: Resolved,
    ) -> Result<api::ContainerConfig, ConfigError> {
        let invalid = |message: String| ConfigError::Invalid { message };
        let ctx = EnvContext {
            environment: &self.environment,
            desired: &self.desired,
            pod_ips: &self.pod_ips,
        };
        let made = env::container_env(&self.pod, container, &ctx)?;
        if !made.invalid_names.is_empty() {
            let message = format!(
                "Keys [{}] from the EnvFrom sources were skipped since they are considered invalid \
                 environment variable names.",
                made.invalid_names.join(", ")
            );
            let reason = "InvalidEnvironmentVariableNames";
            self.emit(Some(&container.name), EventType::Warning, reason, message);
        }
        let security = security::effective(&self.pod, container, image.user)?;
        let sandbox_security = security::sandbox(&self.pod);
        let host_file = std::fs::read_to_string(&self.paths.hosts).unwrap_or_default();
        let content =
            hosts::hosts_file_content(&self.pod, &self.pod_ips, &host_file, &self.environment);
        let hosts_file = self
            .volumes
            .write_hosts(&self.pod, &content)
            .map_err(|e| invalid(format!("cannot write the Pod's hosts file: {e}")))?;
        let mounts = self.volumes.container_mounts(
            &self.pod,
            container,
            &made.vars,
            Some(&hosts_file),
            attempt,
        )?;
        let expand = |list: &Option<Vec<String>>| -> Vec<String> {
            let words = list.iter().flatten();
            words.map(|w| env::expand(w, &made.vars)).collect()
        };
        Ok(convert::container_config(convert::ContainerInput {
            pod: &self.pod,
            node: &self.environment.node_name,
            container,
            attempt,
            image_ref: image.id,
            command: expand(&container.command),
            args: expand(&container.args),
            env: made.vars.clone(),
            mounts,
            resources: cgroups::linux_resources(&self.pod, container, &self.environment),
            security,
            sandbox_security: &sandbox_security,
            target: self.target.clone(),
        }))
    }

    fn place<'a>(&'a self, container: &'a Container, id: &'a str) -> lifecycle::Place<'a> {
        lifecycle::Place {
            cri: &*self.cri,
            container,
            id,
            pod_ip: self.pod_ips.first().copied(),
        }
    }

    async fn post_start(&self, name: &str, id: &str) -> Outcome {
        let Some(container) = self.spec_of(name) else {
            return Outcome::Done;
        };
        let hook = container
            .lifecycle
            .as_ref()
            .and_then(|l| l.post_start.as_ref());
        let Some(hook) = hook else {
            return Outcome::Done;
        };
        // A hook has no limit of its own; one that hangs for a day is as good as one that failed.
        let limit = Duration::from_secs(24 * 3600);
        let Err(why) = lifecycle::run(&self.place(&container, id), hook, limit).await else {
            return Outcome::Done;
        };
        let message = format!("PostStartHook failed: {why}");
        self.emit(
            Some(name),
            EventType::Warning,
            "FailedPostStartHook",
            message.clone(),
        );
        self.emit(
            Some(name),
            EventType::Normal,
            "Killing",
            format!("FailedPostStartHook: container {name} is killed"),
        );
        let grace = plan::grace(&self.pod, plan::Intent::Run);
        if let Err(error) = self.cri.stop_container(id, grace).await {
            tracing::warn!(pod = %self.key, %error, "a container whose postStart hook failed was not stopped");
        }
        Outcome::Failed(Trouble {
            waiting: Some((
                name.to_owned(),
                Waiting {
                    reason: "PostStartHookError".into(),
                    message,
                },
            )),
            ..Trouble::soon()
        })
    }

    async fn stop(&self, name: &str, id: &str) -> Outcome {
        let began = Instant::now();
        let message = format!("Stopping container {name}");
        self.emit(Some(name), EventType::Normal, "Killing", message);
        let container = self.spec_of(name);
        let hook = container
            .as_ref()
            .and_then(|c| c.lifecycle.as_ref()?.pre_stop.as_ref());
        if let (Some(hook), Some(container), true) = (hook, &container, self.pre_stop)
            && let Err(why) = lifecycle::run(&self.place(container, id), hook, self.grace).await
        {
            let message = format!("PreStopHook failed: {why}");
            self.emit(Some(name), EventType::Warning, "FailedPreStopHook", message);
        }
        // Every container gets time for its stop signal, even where a hook used up the grace.
        let floor = self
            .grace
            .min(Duration::from_secs(2))
            .max(Duration::from_secs(1));
        let left = self.grace.saturating_sub(began.elapsed()).max(floor);
        self.checked(self.cri.stop_container(id, whole_seconds(left)).await)
    }

    async fn clean_up(&self) -> Outcome {
        let (_, _, uid) = convert::identity(&self.pod);
        if let Err(e) = self.volumes.teardown(uid).await {
            self.emit(None, EventType::Warning, "FailedUnMount", e.to_string());
            return Outcome::Failed(Trouble::soon());
        }
        match self.cgroups.remove(uid, cgroups::qos(&self.pod)) {
            Ok(()) => Outcome::Done,
            Err(error) => {
                tracing::warn!(pod = %self.key, %error, "the Pod's cgroup is not gone yet");
                Outcome::Failed(Trouble {
                    first: Duration::from_millis(100),
                    ..Trouble::soon()
                })
            }
        }
    }

    fn remove_logs(&self) -> Outcome {
        let dir = self.log_directory();
        match std::fs::remove_dir_all(&dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(pod = %self.key, path = ?dir, error = %e, "logs could not be removed");
                Outcome::Failed(Trouble::soon())
            }
            Ok(()) | Err(_) => Outcome::Done,
        }
    }
}

/// Removes the log link of a container that is gone, found by its ID, and the logs behind it unless
/// they are the last of their name.
pub(super) fn remove_log_of(links: &Path, id: &str) {
    let end = format!("-{id}.log");
    for entry in std::fs::read_dir(links).into_iter().flatten().flatten() {
        if !entry.file_name().to_string_lossy().ends_with(&end) {
            continue;
        }
        if let Ok(log) = std::fs::read_link(entry.path()) {
            rotate::remove_instance(&log);
        }
        let _ = std::fs::remove_file(entry.path());
    }
}

/// The runtime counts in seconds: rounded to the nearest, so that a grace of one second that is a
/// millisecond old stays one.
fn whole_seconds(time: Duration) -> Duration {
    Duration::from_secs((time + Duration::from_millis(500)).as_secs())
}
