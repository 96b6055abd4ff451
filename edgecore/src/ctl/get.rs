//! `edgecore ctl get`: tables as kubectl prints them.

use std::io::Write as _;
use std::process::ExitCode;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, Pod};
use serde_json::json;

use super::client::Client;
use super::{CtlError, pods};
use crate::cli::{GetArgs, Output, Resource};

/// Prints what the device has of a kind.
pub(super) async fn run(client: &Client, args: &GetArgs) -> Result<ExitCode, CtlError> {
    let mut all = match args.resource {
        Resource::Pods => pods::all(client).await?,
        // This version manages no devices, and says so as kubectl does of a kind with no objects.
        Resource::Devices => Vec::new(),
    };
    let namespace = &args.namespace.namespace;
    all.retain(|p| args.all_namespaces || p.metadata.namespace.as_ref() == Some(namespace));
    if args.output == Some(Output::Json) {
        let list = json!({"apiVersion": "v1", "kind": "List", "metadata": {}, "items": all});
        let text = serde_json::to_string_pretty(&list).map_err(CtlError::Document)?;
        return print(&format!("{text}\n"));
    }
    if all.is_empty() {
        return none(args);
    }
    let now = Timestamp::now();
    let rows = all.iter().map(|p| row(p, args, now));
    print(&table(
        &std::iter::once(heading(args))
            .chain(rows)
            .collect::<Vec<_>>(),
    ))
}

#[expect(
    clippy::print_stderr,
    reason = "a remark of a command line program, beside its output"
)]
fn none(args: &GetArgs) -> Result<ExitCode, CtlError> {
    if args.all_namespaces {
        eprintln!("No resources found");
    } else {
        eprintln!(
            "No resources found in {} namespace.",
            args.namespace.namespace
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn print(text: &str) -> Result<ExitCode, CtlError> {
    let written = std::io::stdout().write_all(text.as_bytes());
    written.map_err(CtlError::Output)?;
    Ok(ExitCode::SUCCESS)
}

fn heading(args: &GetArgs) -> Vec<String> {
    let mut words = Vec::new();
    words.extend(args.all_namespaces.then_some("NAMESPACE"));
    words.extend(["NAME", "READY", "STATUS", "RESTARTS", "AGE"]);
    if args.output == Some(Output::Wide) {
        words.extend(["IP", "NODE"]);
    }
    words.into_iter().map(str::to_owned).collect()
}

fn row(pod: &Pod, args: &GetArgs, now: Timestamp) -> Vec<String> {
    let meta = &pod.metadata;
    let status = pod.status.as_ref();
    let containers = status.and_then(|s| s.container_statuses.as_deref());
    let containers = containers.unwrap_or_default();
    let of_spec = pod.spec.as_ref().map_or(0, |s| s.containers.len());
    let ready = containers.iter().filter(|c| c.ready).count();
    let restarts: i32 = containers.iter().map(|c| c.restart_count).sum();
    let created = meta.creation_timestamp.as_ref().map(|t| t.0);
    let none = || "<none>".to_owned();
    let mut row = Vec::new();
    if args.all_namespaces {
        row.push(meta.namespace.clone().unwrap_or_default());
    }
    row.push(meta.name.clone().unwrap_or_default());
    row.push(format!("{ready}/{of_spec}"));
    row.push(word(pod));
    row.push(restarts.to_string());
    row.push(created.map_or_else(|| "<unknown>".to_owned(), |t| age(t, now)));
    if args.output == Some(Output::Wide) {
        let ip = status.and_then(|s| s.pod_ip.clone());
        row.push(ip.filter(|ip| !ip.is_empty()).unwrap_or_else(none));
        let node = pod.spec.as_ref().and_then(|s| s.node_name.clone());
        row.push(node.unwrap_or_else(none));
    }
    row
}

/// kubectl's STATUS: what keeps the Pod from running, or its phase.
fn word(pod: &Pod) -> String {
    if pod.metadata.deletion_timestamp.is_some() {
        return "Terminating".into();
    }
    let status = pod.status.as_ref();
    let phase = status.and_then(|s| s.phase.clone());
    let phase = phase.unwrap_or_else(|| "Pending".into());
    if let Some(reason) = status
        .and_then(|s| s.reason.clone())
        .filter(|r| !r.is_empty())
    {
        return reason;
    }
    let list = |pick: fn(&_) -> &Option<Vec<ContainerStatus>>| {
        let list: Option<&Vec<ContainerStatus>> = status.and_then(|s| pick(s).as_ref());
        list.map(Vec::as_slice).unwrap_or_default()
    };
    let inits = list(|s: &k8s_openapi::api::core::v1::PodStatus| &s.init_container_statuses);
    for (index, init) in inits.iter().enumerate() {
        let state = init.state.as_ref();
        let done = state
            .and_then(|s| s.terminated.as_ref())
            .is_some_and(|t| t.exit_code == 0);
        if done || init.started == Some(true) {
            continue;
        }
        return match why(state).filter(|w| w != "PodInitializing") {
            Some(why) => format!("Init:{why}"),
            None => format!("Init:{index}/{}", inits.len()),
        };
    }
    let containers = list(|s: &k8s_openapi::api::core::v1::PodStatus| &s.container_statuses);
    let reason = containers.iter().find_map(|c| why(c.state.as_ref()));
    match reason {
        // One that ended beside one that runs says nothing of the Pod.
        Some(reason) if reason == "Completed" && phase == "Running" => {
            let ready = containers.iter().any(|c| c.ready);
            if ready { "Running" } else { "NotReady" }.into()
        }
        Some(reason) => reason,
        None => phase,
    }
}

/// Why a container does not run.
fn why(state: Option<&ContainerState>) -> Option<String> {
    let state = state?;
    if let Some(waiting) = &state.waiting {
        return waiting.reason.clone().filter(|r| !r.is_empty());
    }
    let terminated = state.terminated.as_ref()?;
    let reason = terminated.reason.clone().filter(|r| !r.is_empty());
    Some(reason.unwrap_or_else(|| match terminated.signal {
        Some(signal) if signal != 0 => format!("Signal:{signal}"),
        Some(_) | None => format!("ExitCode:{}", terminated.exit_code),
    }))
}

/// `HumanDuration` of apimachinery: two units while the larger is small.
fn age(from: Timestamp, now: Timestamp) -> String {
    let seconds = now.as_second().saturating_sub(from.as_second()).max(0);
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    let both = |major: i64, unit: &str, minor: i64, small: &str| match minor {
        0 => format!("{major}{unit}"),
        minor => format!("{major}{unit}{minor}{small}"),
    };
    match seconds {
        0..120 => format!("{seconds}s"),
        120..600 => both(minutes, "m", seconds % 60, "s"),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 => both(hours, "h", minutes % 60, "m"),
        28_800..172_800 => format!("{hours}h"),
        172_800..691_200 => both(days, "d", hours % 24, "h"),
        691_200..63_072_000 => format!("{days}d"),
        _ => both(days / 365, "y", days % 365, "d"),
    }
}

/// Columns as wide as their longest word, three spaces apart.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|r| r[column].chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|c| width(c).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let padded = row
            .iter()
            .zip(&widths)
            .map(|(word, w)| format!("{word:w$}"));
        text.push_str(padded.collect::<Vec<_>>().join("   ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(status: serde_json::Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "web-0", "namespace": "default"},
            "spec": {"containers": [{"name": "a"}], "nodeName": "edge-1"},
            "status": status,
        }))
        .unwrap()
    }

    fn container(state: serde_json::Value) -> serde_json::Value {
        json!({"name": "a", "image": "", "imageID": "", "ready": false, "restartCount": 3,
            "state": state})
    }

    #[test]
    fn the_status_is_what_keeps_a_pod_from_running() {
        let waiting = |reason: &str| container(json!({"waiting": {"reason": reason}}));
        let done = || container(json!({"terminated": {"exitCode": 0, "reason": "Completed"}}));
        for (status, want) in [
            (json!({"phase": "Running"}), "Running"),
            (json!({"phase": "Failed", "reason": "Evicted"}), "Evicted"),
            (
                json!({"phase": "Running", "containerStatuses": [waiting("CrashLoopBackOff")]}),
                "CrashLoopBackOff",
            ),
            (
                json!({"phase": "Succeeded", "containerStatuses": [done()]}),
                "Completed",
            ),
            (
                json!({"phase": "Pending", "initContainerStatuses":
                    [done(), container(json!({"running": {}}))]}),
                "Init:1/2",
            ),
            (
                json!({"phase": "Pending", "initContainerStatuses": [waiting("ErrImagePull")],
                    "containerStatuses": [waiting("PodInitializing")]}),
                "Init:ErrImagePull",
            ),
        ] {
            assert_eq!(word(&pod(status.clone())), want, "{status}");
        }
    }

    #[test]
    fn a_row_has_what_kubectl_shows() {
        let args = GetArgs {
            resource: Resource::Pods,
            namespace: crate::cli::Namespace {
                namespace: "default".into(),
            },
            all_namespaces: false,
            output: Some(Output::Wide),
        };
        let status = json!({"phase": "Running", "podIP": "10.0.0.2",
            "containerStatuses": [container(json!({"running": {}}))]});
        let row = row(&pod(status), &args, Timestamp::UNIX_EPOCH);
        let want = [
            "web-0",
            "0/1",
            "Running",
            "3",
            "<unknown>",
            "10.0.0.2",
            "edge-1",
        ];
        assert_eq!(row, want);
        let text = table(&[heading(&args), row]);
        assert!(text.starts_with("NAME    READY   STATUS"), "{text}");
    }

    #[test]
    fn ages_are_kubectls() {
        let at = |s: i64| Timestamp::from_second(s).unwrap();
        for (seconds, want) in [
            (5, "5s"),
            (119, "119s"),
            (150, "2m30s"),
            (700, "11m"),
            (3 * 3600 + 300, "3h5m"),
            (30 * 3600, "30h"),
            (3 * 86400 + 3600, "3d1h"),
            (100 * 86400, "100d"),
            (800 * 86400, "2y70d"),
            (-5, "0s"),
        ] {
            assert_eq!(age(at(1000), at(1000 + seconds)), want);
        }
    }
}
