//! Tables: what containers did, and what is said of the Pod.

use serde_json::{Value, json};

use super::*;
use crate::pods::seen::SandboxSeen;

const EPOCH: i64 = 1_800_000_000;

fn pod(policy: &str, inits: Value, mains: &[&str]) -> Pod {
    let mains: Vec<_> = mains
        .iter()
        .map(|n| json!({"name": n, "image": "i:1"}))
        .collect();
    serde_json::from_value(json!({
        "metadata": {"name": "p", "namespace": "n", "uid": "u", "generation": 3},
        "spec": {"restartPolicy": policy, "initContainers": inits, "containers": mains}
    }))
    .unwrap()
}

fn regular(name: &str) -> Value {
    json!({"name": name, "image": "i:1"})
}

fn sidecar(name: &str) -> Value {
    json!({"name": name, "image": "i:1", "restartPolicy": "Always"})
}

/// `NAME=run`, `NAME=made` or `NAME=EXITCODE`; the attempt is how many of the name came before.
fn observed(containers: &[&str]) -> Observed {
    let mut out = Observed {
        sandboxes: vec![SandboxSeen {
            id: "s".into(),
            ready: true,
            ips: vec!["10.0.0.1".parse().unwrap()],
            ..Default::default()
        }],
        runtime_name: "containerd".into(),
        ..Default::default()
    };
    for text in containers {
        let (name, state) = text.split_once('=').unwrap();
        let attempt = u32::try_from(out.instances(name).count()).unwrap();
        let (run, exit_code) = match state {
            "run" => (Run::Running, 0),
            "made" => (Run::Created, 0),
            code => (Run::Exited, code.parse().unwrap()),
        };
        out.containers.push(ContainerSeen {
            id: format!("{name}{attempt}"),
            name: name.into(),
            attempt,
            sandbox: "s".into(),
            run,
            exit_code,
            started_at: EPOCH * 1_000_000_000 + 999_999_999,
            finished_at: if run == Run::Exited {
                (EPOCH + 5) * 1_000_000_000
            } else {
                0
            },
            image_id: "i@sha256:1".into(),
            ..Default::default()
        });
    }
    out.sort();
    out
}

struct Case<'a> {
    pod: &'a Pod,
    observed: Observed,
    previous: Option<PodStatus>,
    waiting: BTreeMap<String, Waiting>,
    intent: Intent,
    failed: Option<Failed>,
}

fn case<'a>(pod: &'a Pod, containers: &[&str]) -> Case<'a> {
    Case {
        pod,
        observed: observed(containers),
        previous: None,
        waiting: BTreeMap::new(),
        intent: Intent::Run,
        failed: None,
    }
}

impl Case<'_> {
    fn at(&self, second: i64) -> PodStatus {
        pod_status(&Input {
            pod: self.pod,
            observed: &self.observed,
            previous: self.previous.as_ref(),
            waiting: &self.waiting,
            hooked: &BTreeSet::new(),
            intent: self.intent,
            failed: self.failed.as_ref(),
            node_ip: Some("192.0.2.7".parse().unwrap()),
            now: Timestamp::from_second(EPOCH + second).unwrap(),
        })
    }

    fn phase(&self) -> String {
        self.at(10).phase.unwrap()
    }

    fn then(mut self, containers: &[&str]) -> Self {
        self.previous = Some(self.at(10));
        self.observed = observed(containers);
        self
    }
}

fn waits(name: &str, reason: &str) -> BTreeMap<String, Waiting> {
    let waiting = Waiting {
        reason: reason.into(),
        message: "because".into(),
    };
    BTreeMap::from([(name.to_owned(), waiting)])
}

fn condition<'a>(status: &'a PodStatus, kind: &str) -> &'a PodCondition {
    status
        .conditions
        .as_ref()
        .unwrap()
        .iter()
        .find(|c| c.type_ == kind)
        .unwrap()
}

#[test]
fn the_phase_follows_from_the_containers_and_the_policy() {
    for (policy, containers, expected) in [
        ("Always", &[][..], "Pending"),
        ("Always", &["a=run"], "Pending"),
        ("Always", &["a=run", "b=made"], "Pending"),
        ("Always", &["a=run", "b=run"], "Running"),
        ("Always", &["a=run", "b=1"], "Running"),
        ("Always", &["a=0", "b=0"], "Running"),
        ("OnFailure", &["a=0", "b=0"], "Succeeded"),
        ("OnFailure", &["a=0", "b=1"], "Running"),
        ("Never", &["a=0", "b=0"], "Succeeded"),
        ("Never", &["a=0", "b=1"], "Failed"),
        ("Never", &["a=run", "b=1"], "Running"),
    ] {
        let pod = pod(policy, json!([]), &["a", "b"]);
        assert_eq!(
            case(&pod, containers).phase(),
            expected,
            "{policy} {containers:?}"
        );
    }
}

#[test]
fn init_containers_keep_a_pod_pending_or_fail_it() {
    for (policy, containers, expected) in [
        ("Always", &["i=run"][..], "Pending"),
        ("Always", &["i=1"], "Pending"),
        ("Always", &["i=0"], "Pending"),
        ("Always", &["i=0", "m=run"], "Running"),
        ("Never", &["i=1"], "Failed"),
        ("Never", &["i=0"], "Pending"),
    ] {
        let pod = pod(policy, json!([regular("i")]), &["m"]);
        assert_eq!(
            case(&pod, containers).phase(),
            expected,
            "{policy} {containers:?}"
        );
    }
}

#[test]
fn sidecars_do_not_decide_how_a_pod_ended() {
    for (policy, containers, expected) in [
        ("Never", &["s=run"][..], "Pending"),
        ("Never", &["s=run", "m=run"], "Running"),
        ("Never", &["s=run", "m=0"], "Succeeded"),
        ("Never", &["s=137", "m=0"], "Succeeded"),
        ("Never", &["s=run", "m=2"], "Failed"),
    ] {
        let pod = pod(policy, json!([sidecar("s")]), &["m"]);
        assert_eq!(case(&pod, containers).phase(), expected, "{containers:?}");
    }
}

#[test]
fn an_ended_pod_has_an_outcome_whatever_its_policy() {
    for (containers, expected) in [
        (&["m=0"][..], "Succeeded"),
        (&["m=143"], "Failed"),
        (&[], "Failed"),
        (&["m=run"], "Running"),
    ] {
        let pod = pod("Always", json!([]), &["m"]);
        let case = Case {
            intent: Intent::Delete,
            ..case(&pod, containers)
        };
        assert_eq!(case.phase(), expected, "{containers:?}");
    }
}

#[test]
fn a_final_phase_stays_whatever_is_seen_after_it() {
    let job = pod("Never", json!([]), &["m"]);
    let done = case(&job, &["m=0"]);
    assert_eq!(done.then(&[]).phase(), "Succeeded");
    let mut told = job.clone();
    told.status = serde_json::from_value(json!({"phase": "Failed"})).unwrap();
    assert_eq!(case(&told, &["m=run"]).phase(), "Failed");
}

#[test]
fn the_nodes_own_verdict_overrides_and_stays() {
    let pod = pod("Always", json!([]), &["m"]);
    let failed = Failed {
        reason: "DeadlineExceeded".into(),
        message: "too long".into(),
    };
    let mut case = Case {
        failed: Some(failed),
        ..case(&pod, &["m=run"])
    };
    case.previous = Some(case.at(1));
    case.failed = None;
    let status = case.at(2);
    assert_eq!(status.phase.as_deref(), Some("Failed"));
    assert_eq!(status.reason.as_deref(), Some("DeadlineExceeded"));
    assert_eq!(status.message.as_deref(), Some("too long"));
}

#[test]
fn a_crash_is_shown_as_waiting_with_its_last_end() {
    let pod = pod("Always", json!([]), &["m"]);
    let case = Case {
        waiting: waits("m", "CrashLoopBackOff"),
        ..case(&pod, &["m=1"])
    };
    let status = case.at(10);
    assert_eq!(
        status.phase.as_deref(),
        Some("Running"),
        "it ran, so it is not pending"
    );
    let container = &status.container_statuses.unwrap()[0];
    let state = container.state.as_ref().unwrap().waiting.as_ref().unwrap();
    assert_eq!(state.reason.as_deref(), Some("CrashLoopBackOff"));
    let last = container
        .last_state
        .as_ref()
        .unwrap()
        .terminated
        .as_ref()
        .unwrap();
    assert_eq!((last.exit_code, last.reason.as_deref()), (1, Some("Error")));
}

#[test]
fn a_container_that_was_made_again_is_shown_as_before_until_it_runs() {
    let pod = pod("Always", json!([]), &["m"]);
    for (waiting, state) in [
        (waits("m", "CrashLoopBackOff"), "CrashLoopBackOff"),
        (BTreeMap::new(), "Error"),
    ] {
        let case = Case {
            waiting,
            ..case(&pod, &["m=1", "m=made"])
        };
        let container = &case.at(10).container_statuses.unwrap()[0];
        assert_eq!(container.restart_count, 0, "{state}");
        assert_eq!(container.container_id.as_deref(), Some("containerd://m0"));
        let now = container.state.clone().unwrap();
        let held = now.waiting.and_then(|w| w.reason);
        let ended = now.terminated.and_then(|t| t.reason);
        assert_eq!(held.or(ended).as_deref(), Some(state));
    }
    let first = &case(&pod, &["m=made"]).at(10).container_statuses.unwrap()[0];
    assert!(first.state.as_ref().unwrap().waiting.is_some());
}

#[test]
fn a_pod_that_was_deleted_before_it_ran_failed_and_still_names_its_containers() {
    let pod = pod("Always", json!([regular("i")]), &["m"]);
    let case = Case {
        intent: Intent::Delete,
        ..case(&pod, &[])
    };
    let status = case.at(10);
    assert_eq!(status.phase.as_deref(), Some("Failed"));
    for statuses in [status.init_container_statuses, status.container_statuses] {
        let state = statuses.unwrap()[0].state.clone().unwrap();
        assert!(state.waiting.is_some(), "{state:?}");
    }
}

#[test]
fn a_running_container_shows_how_the_one_before_it_ended() {
    let pod = pod("Always", json!([]), &["m"]);
    let status = case(&pod, &["m=3", "m=run"]).at(10);
    let container = &status.container_statuses.unwrap()[0];
    assert_eq!(container.restart_count, 1);
    assert_eq!(container.container_id.as_deref(), Some("containerd://m1"));
    assert_eq!(container.image_id, "i@sha256:1");
    let last = container
        .last_state
        .as_ref()
        .unwrap()
        .terminated
        .as_ref()
        .unwrap();
    assert_eq!(last.exit_code, 3);
    let running = container.state.as_ref().unwrap().running.as_ref().unwrap();
    let started = running.started_at.as_ref().unwrap().0;
    assert_eq!(
        started.as_nanosecond() % 1_000_000_000,
        0,
        "whole seconds, as the API keeps them"
    );
}

#[test]
fn an_init_container_that_was_removed_is_still_said_to_have_ended() {
    let pod = pod("Always", json!([regular("i")]), &["m"]);
    let status = case(&pod, &["i=0", "m=run"]).then(&["m=run"]).at(20);
    let init = &status.init_container_statuses.as_ref().unwrap()[0];
    assert!(init.ready && init.state.as_ref().unwrap().terminated.is_some());
    assert_eq!(condition(&status, "Initialized").status, "True");
    assert_eq!(condition(&status, "Ready").status, "True");
}

#[test]
fn a_container_that_vanished_is_said_to_be_lost() {
    let pod = pod("Always", json!([]), &["m"]);
    let mut case = case(&pod, &["m=run"]).then(&[]);
    let before = case.at(20);
    let last = before.container_statuses.as_ref().unwrap()[0]
        .last_state
        .clone()
        .unwrap();
    assert_eq!(last.terminated.unwrap().exit_code, 137);
    case.intent = Intent::Delete;
    let status = case.at(20);
    let state = status.container_statuses.unwrap()[0].state.clone().unwrap();
    assert_eq!(
        state.terminated.unwrap().reason.as_deref(),
        Some("ContainerStatusUnknown")
    );
}

#[test]
fn what_waits_says_why() {
    for (inits, containers, waiting, expected) in [
        (json!([]), &[][..], BTreeMap::new(), "ContainerCreating"),
        (
            json!([regular("i")]),
            &["i=run"][..],
            BTreeMap::new(),
            "PodInitializing",
        ),
        (
            json!([regular("i")]),
            &["i=0"][..],
            BTreeMap::new(),
            "ContainerCreating",
        ),
        (
            json!([]),
            &[][..],
            waits("m", "ErrImagePull"),
            "ErrImagePull",
        ),
        (
            json!([]),
            &["m=made"][..],
            waits("m", "RunContainerError"),
            "RunContainerError",
        ),
    ] {
        let pod = pod("Always", inits, &["m"]);
        let status = Case {
            waiting,
            ..case(&pod, containers)
        }
        .at(1);
        let state = status.container_statuses.unwrap()[0].state.clone().unwrap();
        assert_eq!(
            state.waiting.unwrap().reason.as_deref(),
            Some(expected),
            "{containers:?}"
        );
    }
}

#[test]
fn conditions_name_who_is_missing() {
    let pod = pod("Always", json!([regular("i"), sidecar("s")]), &["b", "a"]);
    let status = case(&pod, &["i=run"]).at(1);
    let initialized = condition(&status, "Initialized");
    assert_eq!(
        initialized.reason.as_deref(),
        Some("ContainersNotInitialized")
    );
    let message = initialized.message.as_deref();
    assert_eq!(message, Some("containers with incomplete status: [i s]"));
    let ready = condition(&status, "Ready");
    assert_eq!(ready.reason.as_deref(), Some("ContainersNotReady"));
    assert_eq!(
        ready.message.as_deref(),
        Some("containers with unready status: [s a b]")
    );
    assert_eq!(condition(&status, "PodScheduled").status, "True");
    assert_eq!(
        condition(&status, "PodReadyToStartContainers").observed_generation,
        Some(3)
    );
}

#[test]
fn a_conditions_time_changes_only_with_its_status() {
    let pod = pod("Always", json!([]), &["m"]);
    let second = |case: &Case<'_>, kind: &str, at: i64| {
        let status = case.at(at);
        let time = condition(&status, kind)
            .last_transition_time
            .clone()
            .unwrap();
        time.0.as_second() - EPOCH
    };
    let waiting = case(&pod, &[]);
    assert_eq!(second(&waiting, "Ready", 10), 10);
    let still = waiting.then(&["m=made"]);
    assert_eq!(second(&still, "Ready", 20), 10);
    let running = still.then(&["m=run"]);
    assert_eq!(second(&running, "Ready", 30), 30);
    assert_eq!(second(&running, "PodScheduled", 30), 10);
    assert_eq!(running.at(30).start_time.unwrap().0.as_second() - EPOCH, 10);
}

#[test]
fn a_readiness_gate_of_others_holds_ready_back() {
    let mut pod = pod("Always", json!([]), &["m"]);
    pod.spec.as_mut().unwrap().readiness_gates =
        serde_json::from_value(json!([{"conditionType": "lb"}])).unwrap();
    let status = case(&pod, &["m=run"]).at(1);
    assert_eq!(condition(&status, "ContainersReady").status, "True");
    assert_eq!(
        condition(&status, "Ready").reason.as_deref(),
        Some("ReadinessGatesNotReady")
    );
    pod.status =
        serde_json::from_value(json!({"conditions": [{"type": "lb", "status": "True"}]})).unwrap();
    assert_eq!(
        condition(&case(&pod, &["m=run"]).at(1), "Ready").status,
        "True"
    );
}

#[test]
fn a_pod_that_ends_is_not_ready_while_it_still_runs() {
    let pod = pod("Always", json!([]), &["m"]);
    let status = Case {
        intent: Intent::Delete,
        ..case(&pod, &["m=run"])
    }
    .at(1);
    assert_eq!(condition(&status, "Ready").status, "False");
    assert_eq!(status.phase.as_deref(), Some("Running"));
}

#[test]
fn addresses_are_kept_when_the_sandbox_is_gone_and_are_the_nodes_on_its_network() {
    let mut pod = pod("Always", json!([]), &["m"]);
    let mut case = case(&pod, &["m=run"]);
    assert_eq!(case.at(1).pod_ip.as_deref(), Some("10.0.0.1"));
    case.previous = Some(case.at(1));
    case.observed = Observed::default();
    assert_eq!(case.at(2).pod_ip.as_deref(), Some("10.0.0.1"));
    assert_eq!(case.at(2).host_ip.as_deref(), Some("192.0.2.7"));
    pod.spec.as_mut().unwrap().host_network = Some(true);
    let mut case = self::case(&pod, &["m=run"]);
    case.observed.sandboxes[0].ips.clear();
    case.observed.sandboxes[0].host_network = true;
    assert_eq!(case.at(1).pod_ip.as_deref(), Some("192.0.2.7"));
}

/// A regular container `m` and an ephemeral one, `debug`.
fn debugged(policy: &str) -> Pod {
    let mut pod = pod(policy, json!([]), &["m"]);
    pod.spec.as_mut().unwrap().ephemeral_containers =
        serde_json::from_value(json!([{"name": "debug", "image": "i:1"}])).unwrap();
    pod
}

fn ephemeral(status: &PodStatus) -> &ContainerStatus {
    &status.ephemeral_container_statuses.as_ref().unwrap()[0]
}

#[test]
fn an_ephemeral_container_counts_neither_for_the_phase_nor_for_readiness() {
    for (policy, containers, phase, ready) in [
        ("Always", &["m=run"][..], "Running", "True"),
        ("Always", &["m=run", "debug=run"][..], "Running", "True"),
        ("Always", &["m=run", "debug=1"][..], "Running", "True"),
        ("Always", &["debug=run"][..], "Pending", "False"),
        ("Never", &["m=0", "debug=run"][..], "Succeeded", "False"),
        ("Never", &["m=0", "debug=1"][..], "Succeeded", "False"),
    ] {
        let pod = debugged(policy);
        let status = case(&pod, containers).at(10);
        assert_eq!(status.phase.as_deref(), Some(phase), "{containers:?}");
        let said = &condition(&status, "Ready").status;
        assert_eq!(said, ready, "{containers:?}");
        let names: Vec<_> = status
            .container_statuses
            .iter()
            .flatten()
            .map(|s| &*s.name)
            .collect();
        assert_eq!(names, ["m"]);
    }
}

#[test]
fn an_ephemeral_container_says_what_it_does_and_that_it_will_not_come_back() {
    let pod = debugged("Always");
    let waiting = Case {
        waiting: waits("debug", "ErrImagePull"),
        ..case(&pod, &["m=run"])
    };
    let status = waiting.at(1);
    let why = ephemeral(&status).state.clone().unwrap().waiting.unwrap();
    assert_eq!(why.reason.as_deref(), Some("ErrImagePull"));

    let status = case(&pod, &["m=run", "debug=run"]).at(1);
    let running = ephemeral(&status);
    assert!(running.state.as_ref().unwrap().running.is_some());
    assert_eq!(running.container_id.as_deref(), Some("containerd://debug0"));
    assert_eq!((running.ready, running.started), (false, None));

    // A start that failed is its end.
    let failed = Case {
        waiting: waits("debug", "RunContainerError"),
        ..case(&pod, &["m=run", "debug=128"])
    };
    let status = failed.at(1);
    let state = ephemeral(&status).state.clone().unwrap();
    assert_eq!(state.terminated.unwrap().exit_code, 128);

    let lost = case(&pod, &["m=run", "debug=run"]).then(&["m=run"]).at(20);
    let state = ephemeral(&lost).state.clone().unwrap();
    let reason = state.terminated.unwrap().reason;
    assert_eq!(reason.as_deref(), Some("ContainerStatusUnknown"));
}

#[test]
fn a_container_says_how_its_volumes_are_mounted() {
    let mut pod = pod("Always", json!([]), &["m"]);
    let mounts = json!([
        {"name": "a", "mountPath": "/a", "readOnly": true},
        {"name": "b", "mountPath": "/b", "readOnly": false},
    ]);
    pod.spec.as_mut().unwrap().containers[0].volume_mounts =
        serde_json::from_value(mounts).unwrap();
    let status = case(&pod, &["m=run"]).at(1);
    let said = serde_json::to_value(&status.container_statuses.unwrap()[0].volume_mounts).unwrap();
    let want = json!([
        {"name": "a", "mountPath": "/a", "readOnly": true, "recursiveReadOnly": "Disabled"},
        {"name": "b", "mountPath": "/b"},
    ]);
    assert_eq!(said, want);
}

#[test]
fn a_container_says_as_whom_it_runs_where_the_runtime_tells() {
    let pod = pod("Always", json!([]), &["m"]);
    let mut case = case(&pod, &["m=run"]);
    let user = |case: &Case<'_>| case.at(1).container_statuses.unwrap()[0].user.clone();
    assert_eq!(user(&case), None);
    case.observed.containers[0].user = Some(UserSeen {
        uid: 1000,
        gid: 3000,
        supplemental_groups: vec![3000, 4000],
    });
    let said = serde_json::to_value(user(&case)).unwrap();
    let want = json!({"linux": {"uid": 1000, "gid": 3000, "supplementalGroups": [3000, 4000]}});
    assert_eq!(said, want);
}

#[test]
fn a_container_says_what_it_was_given_and_not_what_it_would_get_now() {
    let sized = |cpu: &str| {
        let mut pod = pod("Always", json!([]), &["m"]);
        let resources = json!({"requests": {"cpu": cpu}, "limits": {"memory": "64Mi"}});
        pod.spec.as_mut().unwrap().containers[0].resources =
            serde_json::from_value(resources).unwrap();
        pod
    };
    let said = |status: &PodStatus| {
        let one = &status.container_statuses.as_ref().unwrap()[0];
        serde_json::to_value((&one.resources, &one.allocated_resources)).unwrap()
    };
    let given =
        |cpu: &str| json!([{"requests": {"cpu": cpu}, "limits": {"memory": "64Mi"}}, {"cpu": cpu}]);
    let (small, large) = (sized("1"), sized("2"));
    let first = case(&small, &["m=run"]).at(1);
    assert_eq!(said(&first), given("1"));
    // Resized in the spec: what runs was not, and what is started after it is.
    let mut resized = case(&large, &["m=run"]);
    resized.previous = Some(first);
    let second = resized.at(2);
    assert_eq!(said(&second), given("1"));
    let mut restarted = case(&large, &["m=1", "m=run"]);
    restarted.previous = Some(second);
    assert_eq!(said(&restarted.at(3)), given("2"));

    let bare = pod("Always", json!([]), &["m"]);
    assert_eq!(said(&case(&bare, &["m=run"]).at(1)), json!([{}, null]));
}

#[test]
fn a_final_phase_is_not_said_while_anything_of_the_pod_runs() {
    let pod = debugged("Never");
    let failed = Failed {
        reason: "DeadlineExceeded".into(),
        message: "too long".into(),
    };
    for (failed, last) in [(None, "Succeeded"), (Some(failed), "Failed")] {
        let mut case = Case {
            failed,
            ..case(&pod, &["m=run", "debug=run"])
        };
        let mut before = case.at(1);
        before.phase = Some("Running".into());
        case.previous = Some(before);
        case.intent = Intent::Finish;
        case.observed = observed(&["m=0", "debug=run"]);
        let status = case.at(2);
        assert_eq!(status.phase.as_deref(), Some("Running"));
        assert_eq!(status.reason, None);
        case.observed = observed(&["m=0", "debug=137"]);
        let status = case.at(3);
        assert_eq!(status.phase.as_deref(), Some(last));
        assert_eq!(status.reason.is_some(), last == "Failed");
    }
}
