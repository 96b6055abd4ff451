//! CRI over a runtime's Unix socket.
//!
//! Owns one HTTP/2 connection, dialled at the first call and again after it breaks. Gives every
//! call a deadline and every answer a size limit. Never retries: what failed is seen again by the
//! next look at the runtime.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status};

use super::api::image_service_client::ImageServiceClient;
use super::api::runtime_service_client::RuntimeServiceClient;
use super::{Changed, Cri, CriError, CriFuture, Failure, api, pod_selector};

/// A list of 110 Pods with several containers and long annotations is well below it.
const LARGEST_ANSWER: usize = 16 << 20;
/// A container configuration with many large environment variables is well below it.
const LARGEST_REQUEST: usize = 8 << 20;
/// Answers from the runtime's memory.
const LOOK: Duration = Duration::from_secs(20);
/// The runtime forks, mounts and calls CNI plugins.
const CHANGE: Duration = Duration::from_secs(120);
/// A sandbox also waits for the network plugin, and under gVisor or Kata for a guest to boot.
const SANDBOX: Duration = Duration::from_secs(240);
/// Large images come over slow links; the runtime itself gives up on a pull that makes no progress.
const PULL: Duration = Duration::from_secs(6 * 3600);

/// Why a client cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("runtime endpoint {0:?} is not of the form unix:///path/to/socket")]
pub struct BadEndpoint(String);

/// A runtime behind a Unix socket; cheap to clone.
#[derive(Clone)]
pub struct Client {
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
}

impl Client {
    /// Needs a running tokio runtime, but no running container runtime.
    pub fn build(endpoint: &str) -> Result<Self, BadEndpoint> {
        let path = endpoint.strip_prefix("unix://").unwrap_or(endpoint);
        if !path.starts_with('/') {
            return Err(BadEndpoint(endpoint.chars().take(200).collect()));
        }
        let path = PathBuf::from(path);
        let connect = tower::service_fn(move |_| {
            let path = path.clone();
            async move {
                let connected = UnixStream::connect(&path).await.map(TokioIo::new);
                connected.map_err(|e| {
                    let text = format!("cannot connect to {}: {e}", path.display());
                    io::Error::new(e.kind(), text)
                })
            }
        });
        // The authority only fills a header: the connector knows where to go.
        let channel =
            Endpoint::from_static("http://localhost").connect_with_connector_lazy(connect);
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone())
                .max_decoding_message_size(LARGEST_ANSWER)
                .max_encoding_message_size(LARGEST_REQUEST),
            images: ImageServiceClient::new(channel)
                .max_decoding_message_size(LARGEST_ANSWER)
                .max_encoding_message_size(LARGEST_REQUEST),
        })
    }
}

fn error(call: &'static str, status: &Status) -> CriError {
    let failure = match status.code() {
        Code::NotFound => Failure::NotFound,
        Code::Unavailable => Failure::Unavailable,
        Code::Unimplemented => Failure::Unimplemented,
        Code::DeadlineExceeded => Failure::Deadline,
        // A lazy connection that could not be made.
        Code::Unknown if status.message().contains("transport error") => Failure::Unavailable,
        _ => Failure::Refused,
    };
    let message = match failure {
        Failure::Unavailable => {
            let why = io_error(status).map_or(String::new(), |e| format!(": {e}"));
            format!("the container runtime does not answer on its socket{why}")
        }
        Failure::NotFound | Failure::Unimplemented | Failure::Deadline | Failure::Refused => {
            status.message().chars().take(4096).collect()
        }
    };
    CriError {
        call,
        failure,
        message,
    }
}

/// What the socket said, under the layers of the transport.
fn io_error(status: &Status) -> Option<&io::Error> {
    let mut next = std::error::Error::source(status);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

async fn call<T>(
    name: &'static str,
    limit: Duration,
    work: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, CriError> {
    match tokio::time::timeout(limit, work).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(error(name, &status)),
        Err(_) => Err(CriError {
            call: name,
            failure: Failure::Deadline,
            message: format!("no answer within {} s", limit.as_secs()),
        }),
    }
}

/// What is gone already was removed.
fn gone_is_done<T>(result: Result<T, CriError>) -> Result<(), CriError> {
    match result {
        Ok(_) => Ok(()),
        Err(e) if e.not_found() => Ok(()),
        Err(e) => Err(e),
    }
}

fn empty(name: &'static str) -> CriError {
    CriError {
        call: name,
        failure: Failure::Refused,
        message: "the runtime answered without a status".into(),
    }
}

fn image_spec(image: &str) -> Option<api::ImageSpec> {
    Some(api::ImageSpec {
        image: image.to_owned(),
        ..Default::default()
    })
}

impl Cri for Client {
    fn version(&self) -> CriFuture<'_, api::VersionResponse> {
        let mut c = self.runtime.clone();
        let request = api::VersionRequest {
            version: "0.1.0".into(),
        };
        Box::pin(async move { call("Version", LOOK, c.version(request)).await })
    }

    fn status(&self) -> CriFuture<'_, api::StatusResponse> {
        let mut c = self.runtime.clone();
        let request = api::StatusRequest { verbose: false };
        Box::pin(async move { call("Status", LOOK, c.status(request)).await })
    }

    fn runtime_config(&self) -> CriFuture<'_, api::RuntimeConfigResponse> {
        let mut c = self.runtime.clone();
        let request = api::RuntimeConfigRequest {};
        Box::pin(async move { call("RuntimeConfig", LOOK, c.runtime_config(request)).await })
    }

    fn update_runtime_config(&self, pod_cidr: String) -> CriFuture<'_, ()> {
        let mut c = self.runtime.clone();
        let request = api::UpdateRuntimeConfigRequest {
            runtime_config: Some(api::RuntimeConfig {
                network_config: Some(api::NetworkConfig { pod_cidr }),
            }),
        };
        Box::pin(async move {
            let work = c.update_runtime_config(request);
            call("UpdateRuntimeConfig", LOOK, work).await.map(drop)
        })
    }

    fn run_sandbox(&self, config: api::PodSandboxConfig, handler: String) -> CriFuture<'_, String> {
        let mut c = self.runtime.clone();
        let request = api::RunPodSandboxRequest {
            config: Some(config),
            runtime_handler: handler,
        };
        Box::pin(async move {
            let answer = call("RunPodSandbox", SANDBOX, c.run_pod_sandbox(request)).await?;
            Ok(answer.pod_sandbox_id)
        })
    }

    fn stop_sandbox<'a>(&'a self, id: &'a str) -> CriFuture<'a, ()> {
        let mut c = self.runtime.clone();
        let request = api::StopPodSandboxRequest {
            pod_sandbox_id: id.to_owned(),
        };
        Box::pin(async move {
            gone_is_done(call("StopPodSandbox", CHANGE, c.stop_pod_sandbox(request)).await)
        })
    }

    fn remove_sandbox<'a>(&'a self, id: &'a str) -> CriFuture<'a, ()> {
        let mut c = self.runtime.clone();
        let request = api::RemovePodSandboxRequest {
            pod_sandbox_id: id.to_owned(),
        };
        Box::pin(async move {
            gone_is_done(call("RemovePodSandbox", CHANGE, c.remove_pod_sandbox(request)).await)
        })
    }

    fn sandbox_status<'a>(&'a self, id: &'a str) -> CriFuture<'a, api::PodSandboxStatus> {
        let mut c = self.runtime.clone();
        let request = api::PodSandboxStatusRequest {
            pod_sandbox_id: id.to_owned(),
            verbose: false,
        };
        Box::pin(async move {
            let answer = call("PodSandboxStatus", LOOK, c.pod_sandbox_status(request)).await?;
            answer.status.ok_or_else(|| empty("PodSandboxStatus"))
        })
    }

    fn list_sandboxes<'a>(&'a self, uid: Option<&'a str>) -> CriFuture<'a, Vec<api::PodSandbox>> {
        let mut c = self.runtime.clone();
        let request = api::ListPodSandboxRequest {
            filter: Some(api::PodSandboxFilter {
                id: String::new(),
                label_selector: pod_selector(uid),
            }),
        };
        Box::pin(async move {
            let answer = call("ListPodSandbox", LOOK, c.list_pod_sandbox(request)).await?;
            Ok(answer.items)
        })
    }

    fn create_container(&self, request: api::CreateContainerRequest) -> CriFuture<'_, String> {
        let mut c = self.runtime.clone();
        Box::pin(async move {
            let answer = call("CreateContainer", CHANGE, c.create_container(request)).await?;
            Ok(answer.container_id)
        })
    }

    fn start_container<'a>(&'a self, id: &'a str) -> CriFuture<'a, ()> {
        let mut c = self.runtime.clone();
        let request = api::StartContainerRequest {
            container_id: id.to_owned(),
        };
        Box::pin(async move {
            let work = c.start_container(request);
            call("StartContainer", CHANGE, work).await.map(drop)
        })
    }

    fn stop_container<'a>(&'a self, id: &'a str, grace: Duration) -> CriFuture<'a, ()> {
        let mut c = self.runtime.clone();
        let request = api::StopContainerRequest {
            container_id: id.to_owned(),
            timeout: i64::try_from(grace.as_secs()).unwrap_or(i64::MAX),
        };
        Box::pin(async move {
            let limit = grace.saturating_add(CHANGE);
            gone_is_done(call("StopContainer", limit, c.stop_container(request)).await)
        })
    }

    fn remove_container<'a>(&'a self, id: &'a str) -> CriFuture<'a, ()> {
        let mut c = self.runtime.clone();
        let request = api::RemoveContainerRequest {
            container_id: id.to_owned(),
        };
        Box::pin(async move {
            gone_is_done(call("RemoveContainer", CHANGE, c.remove_container(request)).await)
        })
    }

    fn container_status<'a>(&'a self, id: &'a str) -> CriFuture<'a, api::ContainerStatus> {
        let mut c = self.runtime.clone();
        let request = api::ContainerStatusRequest {
            container_id: id.to_owned(),
            verbose: false,
        };
        Box::pin(async move {
            let answer = call("ContainerStatus", LOOK, c.container_status(request)).await?;
            answer.status.ok_or_else(|| empty("ContainerStatus"))
        })
    }

    fn list_containers<'a>(&'a self, uid: Option<&'a str>) -> CriFuture<'a, Vec<api::Container>> {
        let mut c = self.runtime.clone();
        let request = api::ListContainersRequest {
            filter: Some(api::ContainerFilter {
                label_selector: pod_selector(uid),
                ..Default::default()
            }),
        };
        Box::pin(async move {
            let answer = call("ListContainers", LOOK, c.list_containers(request)).await?;
            Ok(answer.containers)
        })
    }

    fn update_resources(&self, request: api::UpdateContainerResourcesRequest) -> CriFuture<'_, ()> {
        let mut c = self.runtime.clone();
        Box::pin(async move {
            let work = c.update_container_resources(request);
            call("UpdateContainerResources", CHANGE, work)
                .await
                .map(drop)
        })
    }

    fn reopen_log<'a>(&'a self, id: &'a str) -> CriFuture<'a, ()> {
        let mut c = self.runtime.clone();
        let request = api::ReopenContainerLogRequest {
            container_id: id.to_owned(),
        };
        Box::pin(async move {
            let work = c.reopen_container_log(request);
            call("ReopenContainerLog", LOOK, work).await.map(drop)
        })
    }

    fn container_events(&self) -> CriFuture<'_, BoxStream<'static, Result<Changed, CriError>>> {
        let mut c = self.runtime.clone();
        Box::pin(async move {
            let work = c.get_container_events(api::GetEventsRequest {});
            // Headers may come only with the first event, so this call alone has no deadline.
            let events = work.await.map_err(|s| error("GetContainerEvents", &s))?;
            let changed = events.into_inner().map(|event| match event {
                Ok(event) => Ok(event
                    .pod_sandbox_status
                    .and_then(|s| s.metadata)
                    .map(|m| m.uid)
                    .filter(|uid| !uid.is_empty())),
                Err(status) => Err(error("GetContainerEvents", &status)),
            });
            Ok(changed.boxed())
        })
    }

    fn exec_sync<'a>(
        &'a self,
        id: &'a str,
        command: Vec<String>,
        timeout: Duration,
    ) -> CriFuture<'a, api::ExecSyncResponse> {
        let mut c = self.runtime.clone();
        let request = api::ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: command,
            timeout: i64::try_from(timeout.as_secs()).unwrap_or(0),
        };
        Box::pin(async move {
            let limit = timeout.saturating_add(LOOK);
            call("ExecSync", limit, c.exec_sync(request)).await
        })
    }

    fn exec(&self, request: api::ExecRequest) -> CriFuture<'_, String> {
        let mut c = self.runtime.clone();
        Box::pin(async move { Ok(call("Exec", LOOK, c.exec(request)).await?.url) })
    }

    fn attach(&self, request: api::AttachRequest) -> CriFuture<'_, String> {
        let mut c = self.runtime.clone();
        Box::pin(async move { Ok(call("Attach", LOOK, c.attach(request)).await?.url) })
    }

    fn port_forward(&self, request: api::PortForwardRequest) -> CriFuture<'_, String> {
        let mut c = self.runtime.clone();
        Box::pin(async move {
            Ok(call("PortForward", LOOK, c.port_forward(request))
                .await?
                .url)
        })
    }

    fn image_status<'a>(&'a self, image: &'a str) -> CriFuture<'a, Option<api::Image>> {
        let mut c = self.images.clone();
        let request = api::ImageStatusRequest {
            image: image_spec(image),
            verbose: false,
        };
        Box::pin(async move {
            let answer = call("ImageStatus", LOOK, c.image_status(request)).await?;
            Ok(answer.image)
        })
    }

    fn pull_image(&self, request: api::PullImageRequest) -> CriFuture<'_, String> {
        let mut c = self.images.clone();
        Box::pin(async move {
            let answer = call("PullImage", PULL, c.pull_image(Request::new(request))).await?;
            Ok(answer.image_ref)
        })
    }

    fn list_images(&self) -> CriFuture<'_, Vec<api::Image>> {
        let mut c = self.images.clone();
        let request = api::ListImagesRequest { filter: None };
        Box::pin(async move {
            Ok(call("ListImages", LOOK, c.list_images(request))
                .await?
                .images)
        })
    }

    fn remove_image<'a>(&'a self, image: &'a str) -> CriFuture<'a, ()> {
        let mut c = self.images.clone();
        let request = api::RemoveImageRequest {
            image: image_spec(image),
        };
        Box::pin(
            async move { gone_is_done(call("RemoveImage", CHANGE, c.remove_image(request)).await) },
        )
    }

    fn image_fs_info(&self) -> CriFuture<'_, Vec<api::FilesystemUsage>> {
        let mut c = self.images.clone();
        Box::pin(async move {
            let work = c.image_fs_info(api::ImageFsInfoRequest {});
            Ok(call("ImageFsInfo", LOOK, work).await?.image_filesystems)
        })
    }

    fn container_stats<'a>(&'a self, id: &'a str) -> CriFuture<'a, Option<api::ContainerStats>> {
        let mut c = self.runtime.clone();
        let request = api::ContainerStatsRequest {
            container_id: id.to_owned(),
        };
        Box::pin(async move {
            let answer = call("ContainerStats", LOOK, c.container_stats(request)).await?;
            Ok(answer.stats)
        })
    }

    fn list_container_stats(&self) -> CriFuture<'_, Vec<api::ContainerStats>> {
        let mut c = self.runtime.clone();
        let request = api::ListContainerStatsRequest { filter: None };
        Box::pin(async move {
            let work = c.list_container_stats(request);
            Ok(call("ListContainerStats", LOOK, work).await?.stats)
        })
    }

    fn list_sandbox_stats(&self) -> CriFuture<'_, Vec<api::PodSandboxStats>> {
        let mut c = self.runtime.clone();
        let request = api::ListPodSandboxStatsRequest { filter: None };
        Box::pin(async move {
            let work = c.list_pod_sandbox_stats(request);
            Ok(call("ListPodSandboxStats", LOOK, work).await?.stats)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_missing_socket_is_unavailable_and_a_bad_endpoint_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let endpoint = format!("unix://{}/none.sock", dir.path().display());
        let client = Client::build(&endpoint).unwrap();
        let failed = client.version().await.unwrap_err();
        assert_eq!(failed.failure, Failure::Unavailable, "{failed:?}");
        assert!(Client::build("tcp://127.0.0.1:1").is_err());
        assert!(Client::build("relative.sock").is_err());
    }
}
