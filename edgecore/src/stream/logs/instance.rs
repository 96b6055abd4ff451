//! Which instance of a container is meant by a name, and where its log is.

use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, Pod, PodStatus};

use crate::cri::{Cri, CriError, Runtime, api, convert};
use crate::pods::jobs::Paths;
use crate::pods::plan;
use crate::pods::seen::Run;

/// Between two questions whether a container that somebody follows still runs.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// There is no log of such a container; answered with 400, in the kubelet's words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoLog {
    #[error("container {container} is not valid for pod {pod}")]
    NotValid { container: String, pod: String },
    #[error("previous terminated container {container:?} in pod {pod:?} not found")]
    NoPrevious { container: String, pod: String },
    #[error("container {container:?} in pod {pod:?} is waiting to start: {why}")]
    Waiting {
        container: String,
        pod: String,
        why: String,
    },
    #[error("container {container:?} in pod {pod:?} is terminated")]
    Terminated { container: String, pod: String },
}

/// The runtime's ID of the instance whose log is wanted: the one that runs or ran last, or the one
/// before it that ended.
pub fn instance(
    pod: &Pod,
    status: &PodStatus,
    container: &str,
    previous: bool,
) -> Result<String, NoLog> {
    let name = pod.metadata.name.clone().unwrap_or_default();
    let container = container.to_owned();
    let known = plan::inits(pod).iter().chain(plan::mains(pod));
    let ephemeral = plan::ephemerals(pod);
    if !known.chain(&ephemeral).any(|known| known.name == container) {
        return Err(NoLog::NotValid {
            container,
            pod: name,
        });
    }
    let status = status_of(status, &container);
    let state = status.and_then(|s| s.state.clone()).unwrap_or_default();
    let last = status.and_then(|s| s.last_state.as_ref()).and_then(ended);
    if previous {
        return last.ok_or(NoLog::NoPrevious {
            container,
            pod: name,
        });
    }
    let running = state
        .running
        .as_ref()
        .and_then(|_| bare(status?.container_id.as_deref()?));
    if let Some(id) = running.or_else(|| ended(&state)).or(last) {
        return Ok(id);
    }
    Err(match state.terminated {
        Some(_) => NoLog::Terminated {
            container,
            pod: name,
        },
        None => NoLog::Waiting {
            container,
            pod: name,
            why: waits_for(&state),
        },
    })
}

fn status_of<'a>(status: &'a PodStatus, name: &str) -> Option<&'a ContainerStatus> {
    let lists = [
        &status.container_statuses,
        &status.init_container_statuses,
        &status.ephemeral_container_statuses,
    ];
    let mut all = lists.into_iter().flatten().flatten();
    all.find(|status| status.name == name)
}

fn ended(state: &ContainerState) -> Option<String> {
    bare(state.terminated.as_ref()?.container_id.as_deref()?)
}

/// Without the runtime's name before it.
fn bare(id: &str) -> Option<String> {
    let bare = id.split_once("://").map_or(id, |(_, bare)| bare);
    (!bare.is_empty()).then(|| bare.to_owned())
}

fn waits_for(state: &ContainerState) -> String {
    let reason = state.waiting.as_ref().and_then(|w| w.reason.as_deref());
    match reason {
        Some("ErrImagePull") => "image can't be pulled".into(),
        Some("ImagePullBackOff") => "trying and failing to pull image".into(),
        Some(reason) if !reason.is_empty() => reason.into(),
        // Its Pod is so new that nothing has been said of it yet.
        Some(_) | None => "ContainerCreating".into(),
    }
}

/// The log of one instance of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// The container's own directory.
    pub dir: PathBuf,
    /// The instance's number, which is its file's name.
    pub attempt: u32,
}

impl Log {
    pub fn path(&self) -> PathBuf {
        self.dir.join(format!("{}.log", self.attempt))
    }
}

/// Asks the runtime what the instance is, and with that where it logs.
pub async fn locate(cri: &dyn Cri, paths: &Paths, id: &str) -> Result<Log, CriError> {
    Ok(place(paths, &cri.container_status(id).await?))
}

fn place(paths: &Paths, status: &api::ContainerStatus) -> Log {
    let label = |key: &str| status.labels.get(key).map_or("", String::as_str);
    let (namespace, name) = (label(convert::POD_NAMESPACE), label(convert::POD_NAME));
    let pod = format!("{namespace}_{name}_{}", label(convert::POD_UID));
    let counted = status.annotations.get(convert::RESTART_COUNT);
    let attempt = counted.and_then(|count| count.parse().ok());
    Log {
        dir: paths
            .pod_logs
            .join(pod)
            .join(label(convert::CONTAINER_NAME)),
        attempt: attempt.unwrap_or_else(|| status.metadata.as_ref().map_or(0, |m| m.attempt)),
    }
}

/// Returns when the container has ended or is gone. It asks once a second, for as long as somebody
/// follows; a runtime that does not answer has not said that the container ended.
pub async fn container_ended(cri: Runtime, id: String) {
    loop {
        match cri
            .container_status(&id)
            .await
            .map(|s| convert::run(s.state))
        {
            Ok(Run::Exited) => return,
            Err(e) if e.not_found() => return,
            Ok(Run::Created | Run::Running | Run::Unknown) | Err(_) => {}
        }
        tokio::time::sleep(ASK_AGAIN).await;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use serde_json::{Value, json};

    use super::*;
    use crate::pods::testing::pod;

    fn asked(container: Value, previous: bool) -> Result<String, String> {
        let pod = pod(json!({
            "metadata": {"name": "web-0"},
            "spec": {"containers": [{"name": "main"}], "initContainers": [{"name": "init"}]},
        }));
        let status = json!({ "containerStatuses": [container] });
        let status = serde_json::from_value(status).unwrap();
        instance(&pod, &status, "main", previous).map_err(|e| e.to_string())
    }

    fn status(state: Value, last: Value) -> Value {
        json!({
            "name": "main", "containerID": "containerd://now", "state": state, "lastState": last,
            "ready": false, "restartCount": 1, "image": "i", "imageID": "i",
        })
    }

    #[test]
    fn the_instance_is_the_kubelets_choice() {
        let ended = |id: &str| json!({"terminated": {"containerID": id, "exitCode": 1}});
        let running = || json!({"running": {}});
        let waiting = || json!({"waiting": {"reason": "CrashLoopBackOff"}});
        for (state, last, previous, want) in [
            (running(), json!({}), false, "now"),
            (running(), ended("containerd://before"), false, "now"),
            (running(), ended("containerd://before"), true, "before"),
            (ended("containerd://e"), json!({}), false, "e"),
            (waiting(), ended("containerd://before"), false, "before"),
            (waiting(), ended("containerd://before"), true, "before"),
        ] {
            assert_eq!(asked(status(state, last), previous).unwrap(), want);
        }
    }

    #[test]
    fn what_has_no_log_says_so_in_the_kubelets_words() {
        let waiting = |reason: &str| json!({"waiting": {"reason": reason}});
        for (state, previous, want) in [
            (
                waiting("ContainerCreating"),
                false,
                r#"container "main" in pod "web-0" is waiting to start: ContainerCreating"#,
            ),
            (
                waiting("ImagePullBackOff"),
                false,
                r#"container "main" in pod "web-0" is waiting to start: trying and failing to pull image"#,
            ),
            (
                waiting("ErrImagePull"),
                false,
                r#"container "main" in pod "web-0" is waiting to start: image can't be pulled"#,
            ),
            (
                json!({}),
                false,
                r#"container "main" in pod "web-0" is waiting to start: ContainerCreating"#,
            ),
            (
                json!({"running": {}}),
                true,
                r#"previous terminated container "main" in pod "web-0" not found"#,
            ),
            (
                json!({"terminated": {"exitCode": 1}}),
                false,
                r#"container "main" in pod "web-0" is terminated"#,
            ),
        ] {
            assert_eq!(asked(status(state, json!({})), previous).unwrap_err(), want);
        }
        let pod = pod(json!({
            "metadata": {"name": "web-0"}, "spec": {"containers": [{"name": "main"}]},
        }));
        let error = instance(&pod, &PodStatus::default(), "c", false).unwrap_err();
        assert_eq!(error.to_string(), "container c is not valid for pod web-0");
    }

    #[test]
    fn a_log_is_where_the_agent_let_the_runtime_write_it() {
        let labels = [
            (convert::POD_NAMESPACE, "default"),
            (convert::POD_NAME, "web-0"),
            (convert::POD_UID, "u-1"),
            (convert::CONTAINER_NAME, "main"),
        ];
        let own = |(key, value): (&str, &str)| (key.to_owned(), value.to_owned());
        let status = api::ContainerStatus {
            labels: labels.map(own).into_iter().collect(),
            annotations: HashMap::from([own((convert::RESTART_COUNT, "3"))]),
            ..Default::default()
        };
        let log = place(&Paths::default(), &status);
        let want = "/var/log/pods/default_web-0_u-1/main/3.log";
        assert_eq!(log.path(), PathBuf::from(want));
    }
}
