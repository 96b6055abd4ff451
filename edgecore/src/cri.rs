//! The container runtime, spoken to over CRI v1.
//!
//! Owns the seam between the Pod manager and a runtime: the trait [`Cri`], with a client for a real
//! runtime's socket and an in-memory runtime for tests. Takes and gives the CRI's own messages.
//! Never anything that only one runtime has.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::BoxStream;

pub mod client;
pub mod convert;
pub mod fake;

pub use crate::r#gen::cri as api;

/// What a failed call means for whoever made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The runtime has no such thing: for a removal that is success.
    NotFound,
    /// The runtime does not answer: wait and try again.
    Unavailable,
    /// The runtime does not know this call: use another way.
    Unimplemented,
    /// The call took longer than it may.
    Deadline,
    /// The runtime tried and could not; its message says why.
    Refused,
}

/// A call to the runtime that failed.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{call}: {message}")]
pub struct CriError {
    pub call: &'static str,
    pub failure: Failure,
    /// The runtime's own words.
    pub message: String,
}

impl CriError {
    pub fn not_found(&self) -> bool {
        self.failure == Failure::NotFound
    }
}

pub type CriFuture<'a, T> = BoxFuture<'a, Result<T, CriError>>;

/// A Pod whose containers changed, by UID; `None` when the runtime did not say whose.
pub type Changed = Option<String>;

/// What the agent asks of a runtime. Every call has a deadline of its own; removals and stops of
/// what is gone succeed.
pub trait Cri: Send + Sync {
    fn version(&self) -> CriFuture<'_, api::VersionResponse>;
    fn status(&self) -> CriFuture<'_, api::StatusResponse>;
    fn runtime_config(&self) -> CriFuture<'_, api::RuntimeConfigResponse>;
    /// Tells the runtime the Pod range, for those that write their CNI configuration from it.
    fn update_runtime_config(&self, pod_cidr: String) -> CriFuture<'_, ()>;

    fn run_sandbox(&self, config: api::PodSandboxConfig, handler: String) -> CriFuture<'_, String>;
    fn stop_sandbox<'a>(&'a self, id: &'a str) -> CriFuture<'a, ()>;
    fn remove_sandbox<'a>(&'a self, id: &'a str) -> CriFuture<'a, ()>;
    fn sandbox_status<'a>(&'a self, id: &'a str) -> CriFuture<'a, api::PodSandboxStatus>;
    /// All sandboxes, or those of one Pod.
    fn list_sandboxes<'a>(&'a self, uid: Option<&'a str>) -> CriFuture<'a, Vec<api::PodSandbox>>;

    fn create_container(&self, request: api::CreateContainerRequest) -> CriFuture<'_, String>;
    fn start_container<'a>(&'a self, id: &'a str) -> CriFuture<'a, ()>;
    /// Sends the stop signal, and kills after `grace`.
    fn stop_container<'a>(&'a self, id: &'a str, grace: Duration) -> CriFuture<'a, ()>;
    fn remove_container<'a>(&'a self, id: &'a str) -> CriFuture<'a, ()>;
    fn container_status<'a>(&'a self, id: &'a str) -> CriFuture<'a, api::ContainerStatus>;
    /// All containers, or those of one Pod.
    fn list_containers<'a>(&'a self, uid: Option<&'a str>) -> CriFuture<'a, Vec<api::Container>>;
    fn update_resources(&self, request: api::UpdateContainerResourcesRequest) -> CriFuture<'_, ()>;
    fn reopen_log<'a>(&'a self, id: &'a str) -> CriFuture<'a, ()>;
    /// Whose containers change, as it happens. Ends with the connection.
    fn container_events(&self) -> CriFuture<'_, BoxStream<'static, Result<Changed, CriError>>>;

    fn exec_sync<'a>(
        &'a self,
        id: &'a str,
        command: Vec<String>,
        timeout: Duration,
    ) -> CriFuture<'a, api::ExecSyncResponse>;
    /// A URL on the runtime's own streaming server, as are the two after it.
    fn exec(&self, request: api::ExecRequest) -> CriFuture<'_, String>;
    fn attach(&self, request: api::AttachRequest) -> CriFuture<'_, String>;
    fn port_forward(&self, request: api::PortForwardRequest) -> CriFuture<'_, String>;

    /// `None` when the image is not here.
    fn image_status<'a>(&'a self, image: &'a str) -> CriFuture<'a, Option<api::Image>>;
    /// The reference to run the image by.
    fn pull_image(&self, request: api::PullImageRequest) -> CriFuture<'_, String>;
    fn list_images(&self) -> CriFuture<'_, Vec<api::Image>>;
    fn remove_image<'a>(&'a self, image: &'a str) -> CriFuture<'a, ()>;
    fn image_fs_info(&self) -> CriFuture<'_, Vec<api::FilesystemUsage>>;

    fn container_stats<'a>(&'a self, id: &'a str) -> CriFuture<'a, Option<api::ContainerStats>>;
    fn list_container_stats(&self) -> CriFuture<'_, Vec<api::ContainerStats>>;
    fn list_sandbox_stats(&self) -> CriFuture<'_, Vec<api::PodSandboxStats>>;
}

/// A shared runtime.
pub type Runtime = Arc<dyn Cri>;

/// A label selector for everything of one Pod; nothing for everything.
pub(crate) fn pod_selector(uid: Option<&str>) -> HashMap<String, String> {
    uid.map(|uid| (convert::POD_UID.to_owned(), uid.to_owned()))
        .into_iter()
        .collect()
}

/// Values of environment variables may be a Secret's.
impl fmt::Debug for api::KeyValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}=…", self.key)
    }
}

impl fmt::Debug for api::AuthConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "credentials for {:?}", self.server_address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_of_a_request_has_no_secret_in_it() {
        let request = api::PullImageRequest {
            auth: Some(api::AuthConfig {
                password: "hunter2".into(),
                server_address: "r.example".into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let config = api::ContainerConfig {
            envs: vec![api::KeyValue {
                key: "TOKEN".into(),
                value: "hunter2".into(),
            }],
            ..Default::default()
        };
        let printed = format!("{request:?} {config:?}");
        assert!(!printed.contains("hunter2"));
        assert!(printed.contains("r.example") && printed.contains("TOKEN"));
    }
}
