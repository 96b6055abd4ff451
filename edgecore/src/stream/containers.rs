//! Which container, sandbox or log a request means.
//!
//! A Pod is known by the store, also one whose removal is under way; a running container by the
//! runtime's labels; a log by what was last reported of the Pod, so that it can be read while the
//! runtime is down.

use common::ids::Kind;
use common::stream::request::PodName;
use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, Pod, PodStatus};

use super::logs::Log;
use super::{Deps, Refusal};
use crate::cri::{api, convert};
use crate::store::desired::DesiredPod;

/// The Pod that is meant: of two under one name the one that stays.
pub(super) fn desired(deps: &Deps, name: &PodName) -> Result<DesiredPod, Refusal> {
    let mut all = deps.desired.pods();
    all.retain(|p| {
        p.key.kind == Kind::Pod
            && *p.key.namespace == *name.namespace
            && *p.key.name == *name.name
            && name.uid.as_deref().is_none_or(|uid| *p.key.uid == *uid)
    });
    let found = all.into_iter().min_by_key(|p| p.removed);
    found.ok_or_else(|| Refusal::NoPod(name.clone()))
}

/// A running container of the Pod, by the runtime's ID: a regular, init or ephemeral one.
pub(super) async fn running(
    deps: &Deps,
    pod: &PodName,
    container: &str,
) -> Result<String, Refusal> {
    let pod = desired(deps, pod)?;
    let all = deps.cri.list_containers(Some(&pod.key.uid)).await?;
    let named = all.into_iter().filter(|c| {
        let name = c.labels.get(convert::CONTAINER_NAME);
        name.is_some_and(|n| n == container)
            && c.state == i32::from(api::ContainerState::ContainerRunning)
    });
    let newest = named.max_by_key(|c| c.created_at);
    newest
        .map(|c| c.id)
        .ok_or_else(|| Refusal::NotRunning(container.to_owned()))
}

/// The Pod's newest sandbox that is up.
pub(super) async fn sandbox(deps: &Deps, pod: &PodName) -> Result<String, Refusal> {
    let desired = desired(deps, pod)?;
    let all = deps.cri.list_sandboxes(Some(&desired.key.uid)).await?;
    let ready = i32::from(api::PodSandboxState::SandboxReady);
    let up = all.into_iter().filter(|s| s.state == ready);
    up.max_by_key(|s| s.created_at)
        .map(|s| s.id)
        .ok_or_else(|| Refusal::NoSandbox(pod.name.clone()))
}

/// The log that is meant and the runtime's ID of the run that writes it, with the kubelet's reasons
/// where there is none.
pub(super) async fn log(
    deps: &Deps,
    name: &PodName,
    container: &str,
    previous: bool,
) -> Result<(Log, String), Refusal> {
    let desired = desired(deps, name)?;
    let pod: Pod = serde_json::from_slice(&desired.json).map_err(|e| {
        let text = format!(
            "the stored object of pod {:?} cannot be read: {e}",
            name.name
        );
        Refusal::NoLog(text)
    })?;
    if !names(&pod).any(|n| n == container) {
        let (container, pod) = (container.to_owned(), name.name.clone());
        return Err(Refusal::NoContainer { container, pod });
    }
    let report = deps.reports.pod(&desired.key);
    let status: PodStatus = report
        .and_then(|r| serde_json::from_value(r.status).ok())
        .unwrap_or_default();
    let run = run_of_log(&status, &name.name, container, previous).map_err(Refusal::NoLog)?;
    let attempt = match deps.cri.list_containers(Some(&desired.key.uid)).await {
        Ok(all) => all.iter().find(|c| c.id == run.id).map(attempt_of),
        // The files are there without the runtime too.
        Err(_) => None,
    };
    let of_pod = deps
        .settings
        .pod_logs
        .join(convert::log_directory_name(&pod));
    let log = Log {
        dir: of_pod.join(container),
        attempt: attempt.unwrap_or(run.attempt),
    };
    Ok((log, run.id))
}

fn attempt_of(container: &api::Container) -> u32 {
    convert::container_seen(container).attempt
}

/// Every container that the spec names.
fn names(pod: &Pod) -> impl Iterator<Item = &str> {
    let spec = pod.spec.iter();
    spec.flat_map(|s| {
        let inits = s.init_containers.iter().flatten();
        let regular = s.containers.iter().chain(inits).map(|c| c.name.as_str());
        let ephemeral = s.ephemeral_containers.iter().flatten();
        regular.chain(ephemeral.map(|c| c.name.as_str()))
    })
}

fn statuses(status: &PodStatus) -> impl Iterator<Item = &ContainerStatus> {
    let regular = status.container_statuses.iter().flatten();
    let inits = status.init_container_statuses.iter().flatten();
    let ephemeral = status.ephemeral_container_statuses.iter().flatten();
    regular.chain(inits).chain(ephemeral)
}

/// `ID` of `containerd://ID`.
fn bare_id(id: Option<&str>) -> &str {
    let id = id.unwrap_or_default();
    id.split_once("://").map_or(id, |(_, bare)| bare)
}

/// One run of a container that has a log.
#[derive(Debug, PartialEq, Eq)]
struct RunOfLog {
    id: String,
    /// By the restart count alone, for when the runtime does not know the ID any more.
    attempt: u32,
}

/// Which run's log is meant (pure): `validateContainerLogStatus` of the kubelet, with its words.
fn run_of_log(
    status: &PodStatus,
    pod: &str,
    container: &str,
    previous: bool,
) -> Result<RunOfLog, String> {
    let about = format!("container {container:?} in pod {pod:?}");
    let found = statuses(status).find(|s| s.name == container);
    let found = found.ok_or_else(|| format!("{about} is not available"))?;
    let restarts = u32::try_from(found.restart_count).unwrap_or(0);
    let run = |id: &str, attempt: u32| RunOfLog {
        id: id.to_owned(),
        attempt,
    };
    let ended = |state: Option<&ContainerState>| {
        let terminated = state.and_then(|s| s.terminated.as_ref());
        terminated.map(|t| bare_id(t.container_id.as_deref()).to_owned())
    };
    let last = ended(found.last_state.as_ref());
    let last_id = last.as_deref().filter(|id| !id.is_empty());
    let current = bare_id(found.container_id.as_deref());
    // While it waits for its next run, the last one has the highest number.
    let last_attempt = match last_id {
        Some(id) if id != current => restarts.saturating_sub(1),
        Some(_) | None => restarts,
    };
    if previous {
        let none = || format!("previous terminated {about} not found");
        return Ok(run(last_id.ok_or_else(none)?, last_attempt));
    }
    let state = found.state.as_ref();
    if state.is_some_and(|s| s.running.is_some()) {
        return Ok(run(current, restarts));
    }
    if let Some(id) = ended(state) {
        return match (id.is_empty(), last_id) {
            (false, _) => Ok(run(&id, restarts)),
            (true, Some(last)) => Ok(run(last, last_attempt)),
            (true, None) => Err(format!("{about} is terminated")),
        };
    }
    match (&last, last_id) {
        (_, Some(id)) => return Ok(run(id, last_attempt)),
        (Some(_), None) => return Err(format!("{about} is terminated")),
        (None, None) => {}
    }
    let waiting = state.and_then(|s| s.waiting.as_ref());
    Err(
        match waiting.map(|w| w.reason.as_deref().unwrap_or_default()) {
            Some("ErrImagePull") => format!("{about} is waiting to start: image can't be pulled"),
            Some("ImagePullBackOff") => {
                format!("{about} is waiting to start: trying and failing to pull image")
            }
            Some(reason) => format!("{about} is waiting to start: {reason}"),
            None => format!("{about} is waiting to start - no logs yet"),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(status: serde_json::Value, previous: bool) -> Result<(String, u32), String> {
        let mut status = status;
        status["name"] = json!("c");
        for key in ["image", "imageID"] {
            status[key] = json!("");
        }
        status["ready"] = json!(false);
        let status = serde_json::from_value(json!({"containerStatuses": [status]})).unwrap();
        run_of_log(&status, "p", "c", previous).map(|r| (r.id, r.attempt))
    }

    #[test]
    fn the_log_of_the_run_that_is_meant() {
        let running = json!({"restartCount": 2, "containerID": "containerd://r2",
            "state": {"running": {}},
            "lastState": {"terminated": {"exitCode": 1, "containerID": "containerd://r1"}}});
        let crashed = json!({"restartCount": 2, "containerID": "containerd://r2",
            "state": {"waiting": {"reason": "CrashLoopBackOff"}},
            "lastState": {"terminated": {"exitCode": 1, "containerID": "containerd://r2"}}});
        let done = json!({"restartCount": 0, "containerID": "containerd://r0",
            "state": {"terminated": {"exitCode": 0, "containerID": "containerd://r0"}}});
        for (status, previous, id, attempt) in [
            (running.clone(), false, "r2", 2),
            (running, true, "r1", 1),
            (crashed.clone(), false, "r2", 2),
            (crashed, true, "r2", 2),
            (done, false, "r0", 0),
        ] {
            let got = of(status.clone(), previous);
            assert_eq!(
                got,
                Ok((id.into(), attempt)),
                "{status} previous={previous}"
            );
        }
    }

    #[test]
    fn why_there_is_no_log_is_said_in_the_kubelets_words() {
        let waiting =
            |reason: &str| json!({"restartCount": 0, "state": {"waiting": {"reason": reason}}});
        for (status, previous, want) in [
            (
                waiting("ContainerCreating"),
                false,
                "container \"c\" in pod \"p\" is waiting to start: ContainerCreating",
            ),
            (
                waiting("ImagePullBackOff"),
                false,
                "container \"c\" in pod \"p\" is waiting to start: trying and failing to pull image",
            ),
            (
                waiting("ErrImagePull"),
                false,
                "container \"c\" in pod \"p\" is waiting to start: image can't be pulled",
            ),
            (
                json!({"restartCount": 0, "containerID": "x://a", "state": {"running": {}}}),
                true,
                "previous terminated container \"c\" in pod \"p\" not found",
            ),
            (
                json!({"restartCount": 0, "state": {"terminated": {"exitCode": 1}}}),
                false,
                "container \"c\" in pod \"p\" is terminated",
            ),
        ] {
            assert_eq!(of(status, previous), Err(want.into()));
        }
        let missing = run_of_log(&PodStatus::default(), "p", "c", false).unwrap_err();
        assert_eq!(missing, "container \"c\" in pod \"p\" is not available");
    }
}
