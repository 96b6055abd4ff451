//! A Pod's volumes on disk.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::ids::ObjectKey;
use k8s_openapi::api::core::v1::{Container, Pod};

use super::env::ConfigError;
use super::tokens::Tokens;
use crate::node::environment::Environment;
use crate::store::desired::Desired;

/// Where volumes live.
#[derive(Debug, Clone)]
pub struct VolumesConfig {
    /// Pods' directories are `ROOT/pods/UID`. Short, so that Unix sockets in volumes fit.
    pub root: PathBuf,
    /// PEM of the per-node CA, appended to every mounted `kube-root-ca.crt`.
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
    #[error("MountVolume.SetUp failed for volume {volume:?}: {message}")]
    Volume { volume: String, message: String },
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
    /// Mounts below it are read-only too (`recursiveReadOnly`).
    pub recursive_readonly: bool,
    pub propagation: Propagation,
}

/// Owns `ROOT/pods`.
pub struct Volumes {
    config: VolumesConfig,
}

impl Volumes {
    pub fn new(config: VolumesConfig, _desired: Desired, _tokens: Tokens) -> Self {
        Self { config }
    }

    /// Makes what is missing and brings content up to date; idempotent.
    pub async fn ensure(
        &self,
        pod: &Pod,
        _environment: &Environment,
    ) -> Result<Mounted, MountError> {
        let spec = pod.spec.as_ref();
        match spec.and_then(|s| s.volumes.as_deref()).unwrap_or_default() {
            [] => Ok(Mounted::default()),
            [first, ..] => Err(MountError::Volume {
                volume: first.name.clone(),
                message: "volumes are not supported".into(),
            }),
        }
    }

    /// The bind mounts of one container, with /etc/hosts and the termination log.
    pub fn container_mounts(
        &self,
        _pod: &Pod,
        _container: &Container,
        _env: &[(String, String)],
        hosts_file: Option<&Path>,
        _attempt: u32,
    ) -> Result<Vec<VolumeMountPlan>, ConfigError> {
        let hosts = hosts_file.map(|path| VolumeMountPlan {
            container_path: "/etc/hosts".into(),
            host_path: path.into(),
            readonly: false,
            recursive_readonly: false,
            propagation: Propagation::Private,
        });
        Ok(hosts.into_iter().collect())
    }

    /// Writes the Pod's /etc/hosts and tells where it is.
    pub fn write_hosts(&self, pod: &Pod, content: &str) -> io::Result<PathBuf> {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let dir = self.config.root.join("pods").join(uid);
        std::fs::create_dir_all(&dir)?;
        std::fs::write(dir.join("etc-hosts"), content)?;
        Ok(dir.join("etc-hosts"))
    }

    /// What the container left as its last words (`terminationMessagePolicy`).
    pub fn read_termination_message(
        &self,
        _uid: &str,
        _container: &Container,
        _attempt: u32,
        _exit_code: i32,
        _log: &Path,
    ) -> String {
        String::new()
    }

    /// Unmounts and removes the Pod's directory; idempotent.
    pub async fn teardown(&self, uid: &str) -> Result<(), MountError> {
        let path = self.config.root.join("pods").join(uid);
        match std::fs::remove_dir_all(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(MountError::Io {
                what: "remove",
                path,
                source,
            }),
            _ => Ok(()),
        }
    }

    /// The Pods that have a directory here.
    pub fn known_uids(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.config.root.join("pods"));
        let names = entries.into_iter().flatten().flatten();
        names
            .filter_map(|e| e.file_name().into_string().ok())
            .collect()
    }
}
