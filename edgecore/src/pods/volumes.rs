//! A Pod's volumes on disk.
//!
//! Owns `ROOT/pods`: makes, updates and removes what is below, and nothing outside it but what a
//! hostPath asks to be made. Takes the Pod, the committed objects and tokens; gives bind mounts.
//! Never removes a directory while something is mounted in it, for that could be the device's own
//! data. One Pod is changed by one caller at a time; a lock holds it where a caller was dropped.
//!
//! ```text
//! ROOT/pods/UID/volumes/kubernetes.io~PLUGIN/NAME         the volume
//! ROOT/pods/UID/volume-subpaths/NAME/CONTAINER/INDEX      a subPath, bound
//! ROOT/pods/UID/containers/CONTAINER/ATTEMPT              a termination message
//! ROOT/pods/UID/etc-hosts
//! ```

mod atomic;
mod content;
mod local;
mod mounts;
mod subpath;
mod termination;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use common::ids::ObjectKey;
use common::tasks::beside;
use k8s_openapi::api::core::v1::{Container, Pod, Volume, VolumeMount};

pub use local::is_on_disk;

use super::env::{ConfigError, expand_strictly};
use super::tokens::{Token, TokenRequest, Tokens};
use crate::node::environment::Environment;
use crate::store::desired::Desired;

/// Where volumes live.
#[derive(Debug, Clone)]
pub struct VolumesConfig {
    /// Pods' directories are `ROOT/pods/UID`. Short, so that Unix sockets in volumes fit into the
    /// 108 bytes of their addresses.
    pub root: PathBuf,
    /// PEM of the per-node CA, appended to every mounted `kube-root-ca.crt`; `None` where no local
    /// API needs it, and then one that was appended before is taken out again.
    pub node_ca_pem: Option<String>,
}

/// All of a Pod's volumes are in place.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Mounted {
    /// When to call `ensure` again though nothing changed: a token's refresh.
    pub next_refresh: Option<Duration>,
}

/// Why a volume is not in place.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// Wait for the cloud, without an Event.
    #[error("{key} has not arrived from the cloud yet")]
    Unknown { key: ObjectKey },
    /// For a FailedMount Event; retried.
    #[error("MountVolume.SetUp failed for volume {volume:?} : {message}")]
    Volume { volume: String, message: String },
    /// The Pod's UID cannot be a directory's name.
    #[error("the Pod's uid {uid:?} is malformed")]
    Uid { uid: String },
    #[error("cannot {what} {path}")]
    Io {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

/// How mounts made later on one side reach the other (`mountPropagation`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    Private,
    HostToContainer,
    Bidirectional,
}

/// One bind mount of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeMountPlan {
    pub container_path: String,
    pub host_path: PathBuf,
    pub readonly: bool,
    /// Mounts below it are read-only too (`recursiveReadOnly: Enabled`).
    pub recursive_readonly: bool,
    pub propagation: Propagation,
}

/// While a token could not be renewed, this long until the next try: well below the fifth of a
/// life that is left when the first try fails, and rare enough for a metered link.
const TOKEN_RETRY: Duration = Duration::from_secs(60);

/// Cheap to clone.
#[derive(Clone)]
pub struct Volumes {
    inner: Arc<Inner>,
}

struct Inner {
    config: VolumesConfig,
    pods: PathBuf,
    desired: Desired,
    tokens: Tokens,
    /// Held while directories change: work that outlives a dropped `ensure` ends before the next.
    writing: Mutex<()>,
}

type Answers = BTreeMap<TokenRequest, Result<Token, String>>;

impl Volumes {
    pub fn new(config: VolumesConfig, desired: Desired, tokens: Tokens) -> Self {
        let pods = config.root.join("pods");
        // Mount points are known by their real path. Where the directory cannot be made, the first
        // `ensure` says why.
        let made = fs::create_dir_all(&pods).and_then(|()| fs::canonicalize(&pods));
        let inner = Inner {
            pods: made.unwrap_or(pods),
            config,
            desired,
            tokens,
            writing: Mutex::new(()),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// Makes what is missing and brings content up to date; idempotent.
    pub async fn ensure(
        &self,
        pod: &Pod,
        environment: &Environment,
    ) -> Result<Mounted, MountError> {
        let dir = self.inner.pod_dir(uid(pod))?;
        let mut answers = Answers::new();
        for request in used(pod).flat_map(|v| content::token_requests(pod, v)) {
            if let Entry::Vacant(vacant) = answers.entry(request) {
                let answer = self.inner.tokens.token(vacant.key()).await;
                vacant.insert(answer);
            }
        }
        let refresh = answers.values().map(|answer| match answer {
            Ok(token) if token.refresh_in_seconds > 0 => {
                Duration::from_secs(token.refresh_in_seconds)
            }
            Ok(_) | Err(_) => TOKEN_RETRY,
        });
        let next_refresh = refresh.min();
        let (inner, pod, environment) = (self.inner.clone(), pod.clone(), environment.clone());
        beside(move || inner.set_up(&dir, &pod, &environment, &answers)).await?;
        Ok(Mounted { next_refresh })
    }

    /// The bind mounts of one container, with /etc/hosts and the termination log. `ensure` came
    /// before; `env` is the container's final environment.
    pub fn container_mounts(
        &self,
        pod: &Pod,
        container: &Container,
        env: &[(String, String)],
        hosts_file: Option<&Path>,
        attempt: u32,
    ) -> Result<Vec<VolumeMountPlan>, ConfigError> {
        let message = |e: MountError| ConfigError::Invalid {
            message: e.to_string(),
        };
        let dir = self.inner.pod_dir(uid(pod)).map_err(message)?;
        if !is_name(&container.name) {
            let message = format!("the container name {:?} is malformed", container.name);
            return Err(ConfigError::Invalid { message });
        }
        let mut plans = Vec::new();
        for (index, mount) in container.volume_mounts.iter().flatten().enumerate() {
            let place = dir
                .join("volume-subpaths")
                .join(&mount.name)
                .join(&container.name)
                .join(index.to_string());
            plans.push(self.inner.plan(&dir, pod, mount, env, &place)?);
        }
        let taken = |path: &str, plans: &[VolumeMountPlan]| {
            plans
                .iter()
                .any(|p| p.container_path.trim_end_matches('/') == path)
        };
        if let Some(file) = hosts_file.filter(|_| !taken("/etc/hosts", &plans)) {
            plans.push(writable("/etc/hosts", file.to_owned()));
        }
        let path = termination_path(container);
        if !path.is_empty() && !taken(path, &plans) {
            let file = termination::prepare(&containers(&dir, container), attempt);
            let file = file.map_err(|e| ConfigError::Invalid {
                message: format!("cannot make the termination log of {}: {e}", container.name),
            })?;
            plans.push(writable(path, file));
        }
        Ok(plans)
    }

    /// Writes the Pod's /etc/hosts and tells where it is. In place: running containers hold it.
    pub fn write_hosts(&self, pod: &Pod, content: &str) -> io::Result<PathBuf> {
        let dir = self.inner.pod_dir(uid(pod)).map_err(io::Error::other)?;
        fs::create_dir_all(&dir)?;
        let path = dir.join("etc-hosts");
        if fs::read(&path).ok().as_deref() != Some(content.as_bytes()) {
            fs::write(&path, content)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644))?;
        }
        Ok(path)
    }

    /// What the container left as its last words (`terminationMessagePolicy`), at most 4096 bytes;
    /// `log` is its log file.
    pub fn read_termination_message(
        &self,
        uid: &str,
        container: &Container,
        attempt: u32,
        exit_code: i32,
        log: &Path,
    ) -> String {
        let dir = self.inner.pod_dir(uid);
        let file = dir.map(|d| termination::file(&containers(&d, container), attempt));
        let said = file.map(|f| termination::message(&f)).unwrap_or_default();
        let policy = container.termination_message_policy.as_deref();
        if said.is_empty() && exit_code != 0 && policy == Some("FallbackToLogsOnError") {
            return termination::log_tail(log);
        }
        said
    }

    /// Unmounts and removes the Pod's directory; idempotent.
    pub async fn teardown(&self, uid: &str) -> Result<(), MountError> {
        let dir = self.inner.pod_dir(uid)?;
        let inner = self.inner.clone();
        beside(move || inner.remove(&dir)).await
    }

    /// The Pod is gone for good: nothing that was made for it alone is kept.
    pub async fn forget(&self, pod: &ObjectKey) {
        let (tokens, pod) = (self.inner.tokens.clone(), pod.clone());
        beside(move || tokens.forget(&pod)).await;
    }

    /// Where the Pod's emptyDirs on the disk are, by their names.
    pub fn empty_dirs(&self, pod: &Pod) -> Vec<(String, PathBuf)> {
        let Ok(dir) = self.inner.pod_dir(uid(pod)) else {
            return Vec::new();
        };
        let mine = used(pod).filter(|v| v.empty_dir.as_ref().is_some_and(is_on_disk));
        let places = mine.filter_map(|v| Some((v.name.clone(), Inner::place(&dir, v).ok()?)));
        places.collect()
    }

    /// The Pods that have a directory here, to find those that nobody knows any more.
    pub fn known_uids(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.inner.pods)
            .into_iter()
            .flatten()
            .flatten();
        let names = entries.filter_map(|e| e.file_name().into_string().ok());
        names.filter(|n| is_name(n)).collect()
    }
}

fn uid(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap_or_default()
}

/// One path component that can do no harm: UIDs, volume and container names are all such.
fn is_name(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    (1..=253).contains(&text.len()) && !text.starts_with('.') && text.bytes().all(plain)
}

fn termination_path(container: &Container) -> &str {
    let path = container.termination_message_path.as_deref();
    path.unwrap_or("/dev/termination-log")
}

fn containers(dir: &Path, container: &Container) -> PathBuf {
    dir.join("containers").join(&container.name)
}

fn writable(container_path: &str, host_path: PathBuf) -> VolumeMountPlan {
    VolumeMountPlan {
        container_path: container_path.to_owned(),
        host_path,
        readonly: false,
        recursive_readonly: false,
        propagation: Propagation::Private,
    }
}

/// The volume mounts of each container, ephemeral ones too.
fn volume_mounts(pod: &Pod) -> impl Iterator<Item = &[VolumeMount]> {
    let spec = pod.spec.iter();
    spec.flat_map(|s| {
        let init = s.init_containers.iter().flatten();
        let own = init.chain(&s.containers).map(|c| &c.volume_mounts);
        let ephemeral = s.ephemeral_containers.iter().flatten();
        own.chain(ephemeral.map(|c| &c.volume_mounts))
    })
    .map(|m| m.as_deref().unwrap_or_default())
}

/// The volumes that some container mounts; others are never made.
fn used(pod: &Pod) -> impl Iterator<Item = &Volume> {
    let names: BTreeSet<&str> = volume_mounts(pod)
        .flatten()
        .map(|m| m.name.as_str())
        .collect();
    let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
    volumes.filter(move |v| names.contains(v.name.as_str()))
}

/// What a volume is made from.
enum Plugin {
    /// The name of its directory, and whether it is in memory.
    Files(&'static str, bool),
    EmptyDir,
    HostPath,
    /// The field of the volume's spec that names its kind.
    Unsupported(String),
}

impl Plugin {
    fn of(volume: &Volume) -> Self {
        if volume.config_map.is_some() {
            Self::Files("kubernetes.io~configmap", false)
        } else if volume.secret.is_some() {
            Self::Files("kubernetes.io~secret", true)
        } else if volume.downward_api.is_some() {
            Self::Files("kubernetes.io~downward-api", true)
        } else if volume.projected.is_some() {
            Self::Files("kubernetes.io~projected", true)
        } else if volume.empty_dir.is_some() {
            Self::EmptyDir
        } else if volume.host_path.is_some() {
            Self::HostPath
        } else {
            let json = serde_json::to_value(volume).unwrap_or_default();
            let mut fields = json.as_object().into_iter().flatten().map(|(k, _)| k);
            let kind = fields.find(|k| k.as_str() != "name");
            Self::Unsupported(
                kind.cloned()
                    .unwrap_or_else(|| "(newer than this edgecore)".into()),
            )
        }
    }

    fn unsupported(kind: &str) -> String {
        format!("volumes of type {kind} are not supported on an edge node")
    }
}

impl Inner {
    fn pod_dir(&self, uid: &str) -> Result<PathBuf, MountError> {
        if is_name(uid) {
            Ok(self.pods.join(uid))
        } else {
            Err(MountError::Uid {
                uid: uid.to_owned(),
            })
        }
    }

    /// Where a volume is on the device.
    fn place(dir: &Path, volume: &Volume) -> Result<PathBuf, String> {
        let plugin = match Plugin::of(volume) {
            Plugin::Files(name, _) => name,
            Plugin::EmptyDir => "kubernetes.io~empty-dir",
            Plugin::HostPath => {
                let path = volume.host_path.as_ref().map(|h| h.path.as_str());
                return Ok(PathBuf::from(path.unwrap_or_default()));
            }
            Plugin::Unsupported(kind) => return Err(Plugin::unsupported(&kind)),
        };
        if !is_name(&volume.name) {
            return Err("its name is malformed".into());
        }
        Ok(dir.join("volumes").join(plugin).join(&volume.name))
    }

    fn set_up(
        &self,
        dir: &Path,
        pod: &Pod,
        environment: &Environment,
        answers: &Answers,
    ) -> Result<(), MountError> {
        for volume in used(pod) {
            let failed = |message: String| MountError::Volume {
                volume: volume.name.clone(),
                message,
            };
            let place = Self::place(dir, volume).map_err(failed)?;
            // Outside the lock: a hostPath may hang on a dead network file system.
            if let Some(source) = &volume.host_path {
                local::host_path(source).map_err(failed)?;
                continue;
            }
            let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
            self.private_root().map_err(|e| failed(e.to_string()))?;
            match (Plugin::of(volume), &volume.empty_dir) {
                (Plugin::EmptyDir, Some(source)) => {
                    local::empty_dir(&place, source, pod, environment).map_err(failed)?;
                }
                (Plugin::Files(_, memory), _) => {
                    self.write_files(&place, memory, volume, pod, environment, answers)?;
                    nested_mount_points(&place, volume, pod).map_err(|e| failed(e.to_string()))?;
                }
                (Plugin::EmptyDir | Plugin::HostPath | Plugin::Unsupported(_), _) => {}
            }
        }
        Ok(())
    }

    /// Other users of the device may pass through to a volume's files, not list Pods.
    fn private_root(&self) -> io::Result<()> {
        fs::create_dir_all(&self.pods)?;
        fs::set_permissions(&self.pods, fs::Permissions::from_mode(0o750))
    }

    fn write_files(
        &self,
        place: &Path,
        memory: bool,
        volume: &Volume,
        pod: &Pod,
        environment: &Environment,
        answers: &Answers,
    ) -> Result<(), MountError> {
        let failed = |message: String| MountError::Volume {
            volume: volume.name.clone(),
            message,
        };
        let io = |what: &'static str| {
            move |e: io::Error| failed(format!("cannot {what} {}: {e}", place.display()))
        };
        let inputs = content::Inputs {
            pod,
            environment,
            desired: &self.desired,
            tokens: answers,
            node_ca_pem: self.config.node_ca_pem.as_deref(),
            populated: place.join("..data").exists(),
        };
        let content = match content::files(volume, &inputs) {
            Ok(found) => found.unwrap_or_default(),
            Err(ConfigError::Unknown { key }) => return Err(MountError::Unknown { key }),
            Err(e @ (ConfigError::Missing { .. } | ConfigError::Invalid { .. })) => {
                return Err(failed(e.to_string()));
            }
        };
        fs::create_dir_all(place).map_err(io("make"))?;
        if memory && !mounts::is_mounted(place).map_err(io("look at"))? {
            mounts::files(place).map_err(io("mount"))?;
        }
        // As an emptyDir below: containers of any user find their files.
        fs::set_permissions(place, fs::Permissions::from_mode(0o777)).map_err(io("open up"))?;
        let group = local::fs_group(pod);
        atomic::write(place, content.payload, content.keep_old, group).map_err(io("write"))?;
        Ok(())
    }

    /// One volume mount of a container; `place` is where a subPath is bound.
    fn plan(
        &self,
        dir: &Path,
        pod: &Pod,
        mount: &VolumeMount,
        env: &[(String, String)],
        place: &Path,
    ) -> Result<VolumeMountPlan, ConfigError> {
        let invalid = |message: String| ConfigError::Invalid {
            message: format!("volume mount {:?}: {message}", mount.name),
        };
        let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
        let volume = volumes.into_iter().find(|v| v.name == mount.name);
        let volume = volume.filter(|v| is_name(&v.name));
        let volume = volume.ok_or_else(|| invalid("the Pod has no such volume".into()))?;
        let mut host_path = Self::place(dir, volume).map_err(invalid)?;
        let sub = match (&mount.sub_path_expr, &mount.sub_path) {
            (Some(expr), _) if !expr.is_empty() => expand_strictly(expr, env)?,
            (_, Some(path)) => path.clone(),
            (_, None) => String::new(),
        };
        if !sub.is_empty() {
            let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
            bind_subpath(&host_path, &sub, place)
                .map_err(|e| invalid(format!("cannot use subPath {sub:?}: {e}")))?;
            host_path = place.to_owned();
        }
        let readonly =
            mount.read_only == Some(true) || matches!(Plugin::of(volume), Plugin::Files(..));
        Ok(VolumeMountPlan {
            container_path: absolute(&mount.mount_path),
            host_path,
            readonly,
            recursive_readonly: readonly && mount.recursive_read_only.as_deref() == Some("Enabled"),
            propagation: match mount.mount_propagation.as_deref() {
                Some("HostToContainer") => Propagation::HostToContainer,
                Some("Bidirectional") => Propagation::Bidirectional,
                _ => Propagation::Private,
            },
        })
    }

    fn remove(&self, dir: &Path) -> Result<(), MountError> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let io = |what| {
            move |source| MountError::Io {
                what,
                path: dir.to_owned(),
                source,
            }
        };
        // What is still mounted afterwards is an error here, and nothing is removed.
        mounts::unmount_all(dir).map_err(io("unmount"))?;
        match fs::remove_dir_all(dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io("remove")(e)),
            _ => Ok(()),
        }
    }
}

fn absolute(path: &str) -> String {
    if path.starts_with('/') {
        path.to_owned()
    } else {
        format!("/{path}")
    }
}

/// Binds what the path within the volume is at this moment; an earlier attempt's bind goes first,
/// so that a restarted container sees a file's newest version.
fn bind_subpath(volume: &Path, sub: &str, place: &Path) -> io::Result<()> {
    let sub = Path::new(sub);
    if sub.is_absolute() || sub.components().any(|c| c.as_os_str() == "..") {
        return Err(io::Error::other("it must be relative and without \"..\""));
    }
    let source = subpath::open_within(volume, sub)?;
    if place.symlink_metadata().is_ok() {
        mounts::unmount_all(place)?;
    }
    let parent = place.parent().ok_or(io::ErrorKind::InvalidInput)?;
    fs::create_dir_all(parent)?;
    let is_dir = subpath::is_dir(&source)?;
    match place.symlink_metadata() {
        Ok(meta) if meta.is_dir() == is_dir => {}
        Ok(meta) if meta.is_dir() => fs::remove_dir(place)?,
        Ok(_) => fs::remove_file(place)?,
        Err(_) => {}
    }
    if is_dir {
        fs::create_dir_all(place)?;
    } else {
        fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(place)?;
    }
    mounts::bind(std::os::fd::AsFd::as_fd(&source), place)
}

/// A container may mount another volume inside a read-only one: the runtime cannot make that mount
/// point, so it is made here.
fn nested_mount_points(place: &Path, volume: &Volume, pod: &Pod) -> io::Result<()> {
    for mounts in volume_mounts(pod) {
        let whole = |m: &&VolumeMount| {
            let sub = |p: &Option<String>| p.as_ref().is_none_or(String::is_empty);
            m.name == volume.name && sub(&m.sub_path) && sub(&m.sub_path_expr)
        };
        for outer in mounts.iter().filter(whole) {
            let outer = Path::new(&outer.mount_path);
            let inside = mounts
                .iter()
                .filter_map(|m| Path::new(&m.mount_path).strip_prefix(outer).ok());
            for point in inside.filter(|p| !p.as_os_str().is_empty()) {
                if point
                    .components()
                    .any(|c| c.as_os_str().as_encoded_bytes().starts_with(b".."))
                {
                    return Err(io::Error::other("a mount path must not hold \"..\""));
                }
                if !place.join(point).exists() {
                    fs::create_dir_all(place.join(point))?;
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
