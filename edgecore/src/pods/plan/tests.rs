//! Tables: a Pod, what runs, and what must happen next.

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
        "metadata": {"name": "p", "namespace": "n", "uid": "u"},
        "spec": {"restartPolicy": policy, "initContainers": inits, "containers": mains,
                 "terminationGracePeriodSeconds": 30}
    }))
    .unwrap()
}

fn init(name: &str) -> Value {
    json!({"name": name, "image": "i:1"})
}

fn sidecar(name: &str) -> Value {
    json!({"name": name, "image": "i:1", "restartPolicy": "Always"})
}

/// `NAME/ATTEMPT=STATE[@SANDBOX]`, where a number is the exit code of one that ended at second 0.
fn container(pod: &Pod, text: &str) -> ContainerSeen {
    let (label, state) = text.split_once('=').unwrap();
    let (name, attempt) = label.split_once('/').unwrap();
    let (state, sandbox) = state.split_once('@').unwrap_or((state, "s1"));
    let spec = inits(pod).iter().chain(mains(pod)).find(|c| c.name == name);
    let ns = |s: i64| (EPOCH + s) * 1_000_000_000;
    let (run, exit_code) = match state {
        "run" => (Run::Running, 0),
        "made" => (Run::Created, 0),
        "lost" => (Run::Unknown, 0),
        code => (Run::Exited, code.parse().unwrap()),
    };
    let attempt: u32 = attempt.parse().unwrap();
    ContainerSeen {
        id: format!("id-{name}-{attempt}"),
        name: name.into(),
        attempt,
        sandbox: sandbox.into(),
        run,
        exit_code,
        created_at: ns(-5) + i64::from(attempt),
        started_at: ns(-5),
        finished_at: if run == Run::Exited { ns(0) } else { 0 },
        hash: spec.map(convert::container_hash).unwrap_or_default(),
        ..Default::default()
    }
}

fn sandbox(id: &str, attempt: u32, ready: bool) -> SandboxSeen {
    SandboxSeen {
        id: id.into(),
        attempt,
        ready,
        ips: if ready {
            vec!["10.0.0.1".parse().unwrap()]
        } else {
            Vec::new()
        },
        ..Default::default()
    }
}

fn seen(pod: &Pod, sandboxes: &[SandboxSeen], containers: &[&str]) -> Observed {
    let mut observed = Observed {
        sandboxes: sandboxes.to_vec(),
        containers: containers.iter().map(|c| container(pod, c)).collect(),
        runtime_name: "fake".into(),
    };
    observed.sort();
    observed
}

/// Volumes are there, images too.
fn ready(pod: &Pod) -> Memory {
    let all = inits(pod).iter().chain(mains(pod));
    Memory {
        granted: true,
        volumes: true,
        images: all.map(|c| c.name.clone()).collect(),
        ..Default::default()
    }
}

fn decide(pod: &Pod, intent: Intent, observed: &Observed, memory: &Memory, second: i64) -> Plan {
    next_steps(&Input {
        pod,
        intent,
        observed,
        previous: None,
        memory,
        now: Now {
            wall: Timestamp::from_second(EPOCH + second).unwrap(),
            mono: Duration::from_secs(1000 + u64::try_from(second).unwrap_or(0)),
        },
    })
}

fn words(plan: &Plan) -> Vec<String> {
    let word = |s: &Step| match s {
        Step::Grant => "grant".into(),
        Step::Volumes => "volumes".into(),
        Step::Image { container } => format!("image {container}"),
        Step::RunSandbox { attempt } => format!("sandbox {attempt}"),
        Step::Start {
            container, attempt, ..
        } => format!("start {container}/{attempt}"),
        Step::PostStart { container, .. } => format!("hook {container}"),
        Step::Stop {
            container,
            deadline,
            ..
        } => {
            format!("stop {container} {}", deadline.as_secs() - 1000)
        }
        Step::RemoveContainer { id } => format!("remove {id}"),
        Step::StopSandbox { id } => format!("stop-sandbox {id}"),
        Step::RemoveSandbox { id } => format!("remove-sandbox {id}"),
        Step::Cleanup => "cleanup".into(),
        Step::RemoveLogs => "logs".into(),
    };
    plan.steps.iter().map(word).collect()
}

fn run_words(pod: &Pod, containers: &[&str]) -> Vec<String> {
    let observed = seen(pod, &[sandbox("s1", 0, true)], containers);
    words(&decide(pod, Intent::Run, &observed, &ready(pod), 0))
}

#[test]
fn a_new_pod_is_granted_first_and_then_all_is_prepared_at_once() {
    let pod = pod("Always", json!([]), &["a", "b"]);
    let nothing = Observed::default();
    let mut memory = Memory::default();
    assert_eq!(
        words(&decide(&pod, Intent::Run, &nothing, &memory, 0)),
        ["grant"]
    );
    memory.granted = true;
    let plan = decide(&pod, Intent::Run, &nothing, &memory, 0);
    assert_eq!(words(&plan), ["volumes", "image a", "image b", "sandbox 0"]);
    memory.underway.extend(plan.steps);
    assert!(words(&decide(&pod, Intent::Run, &nothing, &memory, 0)).is_empty());
}

#[test]
fn init_containers_run_one_by_one_and_only_their_images_are_fetched() {
    let pod = pod("Always", json!([init("i1"), init("i2")]), &["m"]);
    let memory = Memory {
        granted: true,
        ..Default::default()
    };
    let plan = decide(&pod, Intent::Run, &Observed::default(), &memory, 0);
    assert_eq!(words(&plan), ["volumes", "image i1", "sandbox 0"]);
    for (containers, expected) in [
        (&[][..], &["start i1/0"][..]),
        (&["i1/0=run"], &[]),
        (&["i1/0=0"], &["start i2/0"]),
        // The first failure is tried again at once.
        (&["i1/0=1"], &["start i1/1"]),
        (&["i1/0=0", "i2/0=0"], &["start m/0"]),
        // An init container whose instance was removed had ended well.
        (&["i2/0=0"], &["start m/0"]),
        (&["i2/0=0", "m/0=run"], &[]),
        (&["m/0=1"], &["start m/1"]),
    ] {
        assert_eq!(run_words(&pod, containers), expected, "{containers:?}");
    }
}

#[test]
fn sidecars_start_in_order_and_are_restarted_whatever_the_policy() {
    let pod = pod("Never", json!([init("i"), sidecar("s"), init("j")]), &["m"]);
    for (containers, expected) in [
        (&["i/0=0"][..], &["start s/0"][..]),
        (&["i/0=0", "s/0=run"], &["start j/0"]),
        (&["i/0=0", "s/0=run", "j/0=0"], &["start m/0"]),
        (&["i/0=0", "s/0=0", "j/0=0", "m/0=run"], &["start s/1"]),
        (&["i/0=0", "s/0=run", "j/0=0", "m/0=run"], &[]),
    ] {
        assert_eq!(run_words(&pod, containers), expected, "{containers:?}");
    }
}

#[test]
fn containers_are_restarted_by_the_policy() {
    for (policy, state, expected) in [
        ("Always", "m/0=0", vec!["start m/1"]),
        ("Always", "m/0=1", vec!["start m/1"]),
        ("OnFailure", "m/0=0", vec![]),
        ("OnFailure", "m/0=1", vec!["start m/1"]),
        ("Never", "m/0=1", vec![]),
        ("Always", "m/0=made", vec!["start m/1"]),
        ("Always", "m/0=run", vec![]),
        ("Always", "m/0=lost", vec!["stop m 30"]),
    ] {
        let pod = pod(policy, json!([]), &["m"]);
        assert_eq!(run_words(&pod, &[state]), expected, "{policy} {state}");
    }
}

#[test]
fn a_container_that_crashes_again_waits_and_says_so() {
    let pod = pod("Always", json!([]), &["m"]);
    let observed = seen(&pod, &[sandbox("s1", 0, true)], &["m/2=1"]);
    // Not remembered: assumed from the restart count, 20 s.
    let plan = decide(&pod, Intent::Run, &observed, &ready(&pod), 5);
    assert!(plan.steps.is_empty());
    assert_eq!(plan.retry_in, Some(Duration::from_secs(15)));
    assert_eq!(plan.crash_looping["m"], Duration::from_secs(20));
    let plan = decide(&pod, Intent::Run, &observed, &ready(&pod), 20);
    assert_eq!(words(&plan), ["start m/3"]);
    assert_eq!(plan.crashes["m"].delay, Duration::from_secs(40));
}

#[test]
fn a_changed_image_restarts_whatever_the_policy() {
    let old = pod("OnFailure", json!([]), &["m"]);
    let mut new = old.clone();
    new.spec.as_mut().unwrap().containers[0].image = Some("i:2".into());
    let step = |state: &str| {
        let observed = seen(&old, &[sandbox("s1", 0, true)], &[state]);
        words(&decide(&new, Intent::Run, &observed, &ready(&new), 0))
    };
    assert_eq!(step("m/0=run"), ["stop m 30"]);
    assert_eq!(step("m/0=0"), ["start m/1"]);
}

#[test]
fn a_lost_sandbox_is_made_again_and_all_begins_anew() {
    let pod = pod("Always", json!([init("i")]), &["m"]);
    let dead = [sandbox("s1", 0, false)];
    let observed = seen(&pod, &dead, &["i/0=0", "m/0=run"]);
    assert_eq!(
        words(&decide(&pod, Intent::Run, &observed, &ready(&pod), 0)),
        ["stop m 30"]
    );
    let observed = seen(&pod, &dead, &["i/0=0", "m/0=137"]);
    assert_eq!(
        words(&decide(&pod, Intent::Run, &observed, &ready(&pod), 0)),
        ["sandbox 1"]
    );
    let both = [sandbox("s1", 0, false), sandbox("s2", 1, true)];
    let observed = seen(&pod, &both, &["i/0=0", "m/0=137"]);
    assert_eq!(
        words(&decide(&pod, Intent::Run, &observed, &ready(&pod), 0)),
        ["start i/1"]
    );
    let observed = seen(&pod, &both, &["i/0=0", "m/0=137", "i/1=0@s2"]);
    assert_eq!(
        words(&decide(&pod, Intent::Run, &observed, &ready(&pod), 0)),
        ["start m/1"]
    );
}

#[test]
fn what_ended_well_is_not_repeated_in_a_new_sandbox() {
    let pod = pod("OnFailure", json!([]), &["a", "b"]);
    let both = [sandbox("s1", 0, false), sandbox("s2", 1, true)];
    let observed = seen(&pod, &both, &["a/0=0", "b/0=137"]);
    assert_eq!(
        words(&decide(&pod, Intent::Run, &observed, &ready(&pod), 0)),
        ["start b/1"]
    );
}

#[test]
fn containers_start_one_after_the_other_and_a_hook_holds_the_next_back() {
    let mut pod = pod("Always", json!([]), &["a", "b"]);
    assert_eq!(run_words(&pod, &[]), ["start a/0"]);
    assert_eq!(run_words(&pod, &["a/0=run"]), ["start b/0"]);
    pod.spec.as_mut().unwrap().containers[0].lifecycle =
        serde_json::from_value(json!({"postStart": {"exec": {"command": ["x"]}}})).unwrap();
    assert_eq!(run_words(&pod, &["a/0=run"]), ["hook a"]);
    let mut memory = ready(&pod);
    memory.hooked.insert("id-a-0".into());
    let observed = seen(&pod, &[sandbox("s1", 0, true)], &["a/0=run"]);
    assert_eq!(
        words(&decide(&pod, Intent::Run, &observed, &memory, 0)),
        ["start b/0"]
    );
}

#[test]
fn a_missing_image_holds_back_only_its_own_container() {
    let pod = pod("Always", json!([]), &["a", "b"]);
    let mut memory = ready(&pod);
    memory.images.remove("a");
    memory.underway.insert(Step::Image {
        container: "a".into(),
    });
    let observed = seen(&pod, &[sandbox("s1", 0, true)], &[]);
    assert_eq!(
        words(&decide(&pod, Intent::Run, &observed, &memory, 0)),
        ["start b/0"]
    );
}

#[test]
fn a_step_that_failed_waits_for_its_retry() {
    let pod = pod("Always", json!([]), &["m"]);
    let mut memory = Memory {
        granted: true,
        volumes: true,
        ..ready(&pod)
    };
    let retry = Retry {
        not_before: Duration::from_secs(1007),
        delay: Duration::from_secs(8),
    };
    memory
        .retries
        .insert(Step::RunSandbox { attempt: 0 }, retry);
    let plan = decide(&pod, Intent::Run, &Observed::default(), &memory, 0);
    assert!(plan.steps.is_empty());
    assert_eq!(plan.retry_in, Some(Duration::from_secs(7)));
    let plan = decide(&pod, Intent::Run, &Observed::default(), &memory, 7);
    assert_eq!(words(&plan), ["sandbox 0"]);
}

#[test]
fn old_instances_and_dead_sandboxes_are_tidied_away() {
    let pod = pod("Always", json!([]), &["m"]);
    let both = [sandbox("s1", 0, false), sandbox("s2", 1, true)];
    let containers = ["m/0=1@s2", "m/1=1@s2", "m/2=1@s2", "m/3=run@s2"];
    let observed = seen(&pod, &both, &containers);
    assert_eq!(
        words(&decide(&pod, Intent::Run, &observed, &ready(&pod), 0)),
        ["remove id-m-1", "remove id-m-0", "remove-sandbox s1"]
    );
}

/// The Pod with an ephemeral container `debug`, and the memory of a worker that has its image.
fn debugged(mut pod: Pod, ephemeral: Value) -> (Pod, Memory) {
    pod.spec.as_mut().unwrap().ephemeral_containers =
        Some(vec![serde_json::from_value(ephemeral).unwrap()]);
    let mut memory = ready(&pod);
    memory.images.insert("debug".into());
    (pod, memory)
}

#[test]
fn an_ephemeral_container_starts_once_even_while_init_containers_run() {
    let spec = pod("Always", json!([init("i")]), &["m"]);
    let (pod, memory) = debugged(spec, json!({"name": "debug", "image": "i:1"}));
    let step = |containers: &[&str]| {
        let observed = seen(&pod, &[sandbox("s1", 0, true)], containers);
        words(&decide(&pod, Intent::Run, &observed, &memory, 0))
    };
    assert_eq!(step(&["i/0=run"]), ["start debug/0"]);
    for ended in ["debug/0=run", "debug/0=1", "debug/0=0", "debug/0=1@s0"] {
        assert!(step(&["i/0=run", ended]).is_empty(), "{ended}");
    }
    // The agent died between making and starting it.
    assert_eq!(step(&["i/0=run", "debug/0=made"]), ["remove id-debug-0"]);
    let nothing = seen(&pod, &[], &[]);
    let plan = decide(&pod, Intent::Run, &nothing, &memory, 0);
    assert_eq!(words(&plan), ["sandbox 0"], "first a sandbox");
}

#[test]
fn an_ephemeral_container_that_the_runtime_lost_is_not_started_again() {
    let spec = pod("Always", json!([]), &["m"]);
    let (pod, memory) = debugged(spec, json!({"name": "debug", "image": "i:1"}));
    let observed = seen(&pod, &[sandbox("s1", 0, true)], &["m/0=run"]);
    for (state, steps) in [
        (json!({"waiting": {"reason": "ErrImagePull"}}), 1),
        (json!({"running": {}}), 0),
        (json!({"terminated": {"exitCode": 0}}), 0),
    ] {
        let previous: PodStatus = serde_json::from_value(json!({"ephemeralContainerStatuses": [
            {"name": "debug", "state": state, "ready": false, "restartCount": 0,
             "image": "i:1", "imageID": ""}]}))
        .unwrap();
        let plan = next_steps(&Input {
            pod: &pod,
            intent: Intent::Run,
            observed: &observed,
            previous: Some(&previous),
            memory: &memory,
            now: Now {
                wall: Timestamp::from_second(EPOCH).unwrap(),
                mono: Duration::from_secs(1000),
            },
        });
        assert_eq!(plan.steps.len(), steps, "{state}");
    }
}

#[test]
fn an_ephemeral_container_waits_for_the_one_whose_processes_it_shares_and_for_no_hook() {
    let mut spec = pod("Always", json!([]), &["m", "n"]);
    let hook = json!({"postStart": {"exec": {"command": ["x"]}}});
    spec.spec.as_mut().unwrap().containers[0].lifecycle = serde_json::from_value(hook).unwrap();
    let asks = json!({"name": "debug", "image": "i:1", "targetContainerName": "m"});
    let (mut pod, mut memory) = debugged(spec, asks);
    let plan = |pod: &Pod, memory: &Memory, containers: &[&str]| {
        let observed = seen(pod, &[sandbox("s1", 0, true)], containers);
        decide(pod, Intent::Run, &observed, memory, 0)
    };
    memory.images.remove("debug");
    let early = plan(&pod, &memory, &[]);
    assert_eq!(words(&early), ["image debug", "start m/0"]);
    assert_eq!(early.untargeted["debug"], "m");
    memory.images.insert("debug".into());
    let running = plan(&pod, &memory, &["m/0=run"]);
    assert_eq!(words(&running), ["hook m", "start debug/0"]);
    assert!(running.untargeted.is_empty());
    let ended = plan(&pod, &memory, &["m/0=1", "n/0=run"]);
    assert!(ended.untargeted.contains_key("debug"));
    // Where all share their processes there is nothing to wait for.
    pod.spec.as_mut().unwrap().share_process_namespace = Some(true);
    let shared = plan(&pod, &memory, &[]);
    assert_eq!(words(&shared), ["start debug/0"]);
    assert_eq!(target(&pod, "debug"), None);
}

#[test]
fn an_ephemeral_container_ends_with_its_pod() {
    let spec = pod("Never", json!([]), &["m"]);
    let (pod, memory) = debugged(spec, json!({"name": "debug", "image": "i:1"}));
    let observed = seen(&pod, &[sandbox("s1", 0, true)], &["m/0=0", "debug/0=run"]);
    for intent in [Intent::Finish, Intent::Delete, Intent::Remove] {
        let plan = decide(&pod, intent, &observed, &memory, 0);
        assert!(
            words(&plan).contains(&"stop debug 30".to_owned()),
            "{intent:?}"
        );
    }
}

#[test]
fn a_changed_image_forgets_the_crashes_of_the_one_before() {
    let mut pod = pod("Always", json!([]), &["m"]);
    let observed = seen(&pod, &[sandbox("s1", 0, true)], &["m/3=1"]);
    pod.spec.as_mut().unwrap().containers[0].image = Some("i:2".into());
    let mut memory = ready(&pod);
    let wall = Timestamp::from_second(EPOCH).unwrap();
    let waits = Crashes {
        delay: Duration::from_secs(300),
        since: wall,
    };
    memory.crashes.insert("m".into(), waits);
    let plan = decide(&pod, Intent::Run, &observed, &memory, 0);
    assert_eq!(words(&plan), ["start m/4"]);
    assert_eq!(plan.crashes["m"], Crashes::none(wall));
}

/// Feeds an ending from step to step until nothing is left.
#[test]
fn ending_takes_containers_then_sandbox_then_the_rest() {
    let pod = pod("Always", json!([sidecar("s1c"), sidecar("s2c")]), &["m"]);
    let up = [sandbox("s1", 0, true)];
    let down = [sandbox("s1", 0, false)];
    let mut memory = ready(&pod);
    memory.ending_since = Some(Duration::from_secs(1000));
    for (sandboxes, containers, expected) in [
        (
            &up[..],
            &["m/0=run", "s1c/0=run", "s2c/0=run"][..],
            &["stop m 30"][..],
        ),
        (&up, &["m/0=0", "s1c/0=run", "s2c/0=run"], &["stop s2c 30"]),
        (&up, &["m/0=0", "s1c/0=run", "s2c/0=0"], &["stop s1c 30"]),
        (&up, &["m/0=0"], &["stop-sandbox s1", "remove id-m-0"]),
        (&down, &["m/0=0"], &["remove id-m-0", "cleanup"]),
        (&down, &[], &["remove-sandbox s1", "cleanup"]),
    ] {
        let observed = seen(&pod, sandboxes, containers);
        let plan = decide(&pod, Intent::Delete, &observed, &memory, 0);
        assert_eq!(words(&plan), expected, "{containers:?}");
        assert!(!plan.gone);
    }
    let nothing = Observed::default();
    assert!(
        !decide(&pod, Intent::Delete, &nothing, &memory, 0).gone,
        "volumes are still there"
    );
    memory.cleaned = true;
    assert!(decide(&pod, Intent::Delete, &nothing, &memory, 0).gone);
    let plan = decide(&pod, Intent::Remove, &nothing, &memory, 0);
    assert_eq!((words(&plan), plan.gone), (vec!["logs".to_owned()], false));
    memory.logs_removed = true;
    assert!(decide(&pod, Intent::Remove, &nothing, &memory, 0).gone);
}

#[test]
fn a_sandbox_that_is_being_stopped_is_not_removed_under_it() {
    let pod = pod("Always", json!([]), &["m"]);
    let mut memory = ready(&pod);
    memory
        .underway
        .insert(Step::StopSandbox { id: "s1".into() });
    let observed = seen(&pod, &[sandbox("s1", 0, false)], &[]);
    assert!(
        decide(&pod, Intent::Delete, &observed, &memory, 0)
            .steps
            .is_empty()
    );
    let observed = seen(
        &pod,
        &[sandbox("s1", 0, false), sandbox("s2", 1, true)],
        &["m/0=run@s2"],
    );
    assert!(
        decide(&pod, Intent::Run, &observed, &memory, 0)
            .steps
            .is_empty()
    );
}

#[test]
fn a_finished_pod_keeps_its_dead_containers_for_their_logs() {
    let pod = pod("Never", json!([sidecar("s")]), &["m"]);
    let mut memory = ready(&pod);
    let observed = seen(&pod, &[sandbox("s1", 0, true)], &["m/0=0", "s/0=run"]);
    let plan = decide(&pod, Intent::Finish, &observed, &memory, 0);
    assert_eq!(words(&plan), ["stop s 30"]);
    let observed = seen(&pod, &[sandbox("s1", 0, false)], &["m/0=0", "s/0=0"]);
    let plan = decide(&pod, Intent::Finish, &observed, &memory, 0);
    assert_eq!(words(&plan), ["cleanup"]);
    memory.cleaned = true;
    let plan = decide(&pod, Intent::Finish, &observed, &memory, 0);
    assert!(plan.steps.is_empty() && plan.gone);
}

#[test]
fn when_the_grace_is_over_sidecars_are_stopped_with_the_rest() {
    let pod = pod("Always", json!([sidecar("s")]), &["m"]);
    let mut memory = ready(&pod);
    memory.ending_since = Some(Duration::from_secs(1000));
    let observed = seen(&pod, &[sandbox("s1", 0, true)], &["m/0=run", "s/0=run"]);
    let plan = decide(&pod, Intent::Delete, &observed, &memory, 10);
    assert_eq!(plan.retry_in, Some(Duration::from_secs(20)));
    let plan = decide(&pod, Intent::Delete, &observed, &memory, 30);
    assert_eq!(words(&plan), ["stop m 30", "stop s 30"]);
}

#[test]
fn a_shorter_grace_shortens_a_stop_under_way_and_a_longer_one_does_not() {
    let mut pod = pod("Always", json!([]), &["m"]);
    let observed = seen(&pod, &[sandbox("s1", 0, true)], &["m/0=run"]);
    let mut memory = ready(&pod);
    memory.ending_since = Some(Duration::from_secs(1000));
    let stop = |seconds: u64| Step::Stop {
        container: "m".into(),
        id: "id-m-0".into(),
        deadline: Duration::from_secs(1000 + seconds),
    };
    memory.underway.insert(stop(30));
    assert!(
        decide(&pod, Intent::Delete, &observed, &memory, 1)
            .steps
            .is_empty()
    );
    for (grace, expected) in [(5, vec!["stop m 5"]), (60, vec![])] {
        pod.metadata.deletion_grace_period_seconds = Some(grace);
        let plan = decide(&pod, Intent::Delete, &observed, &memory, 1);
        assert_eq!(words(&plan), expected, "{grace}");
    }
}

#[test]
fn ending_waits_for_what_is_being_made() {
    let pod = pod("Always", json!([]), &["m"]);
    let mut memory = ready(&pod);
    memory.underway.insert(Step::RunSandbox { attempt: 0 });
    let plan = decide(&pod, Intent::Delete, &Observed::default(), &memory, 0);
    assert!(plan.steps.is_empty() && !plan.gone);
}

#[test]
fn a_grace_is_the_deletions_own_and_never_nothing() {
    let mut pod = pod("Always", json!([]), &["m"]);
    pod.metadata.deletion_grace_period_seconds = Some(5);
    assert_eq!(grace(&pod, Intent::Run).as_secs(), 30);
    assert_eq!(grace(&pod, Intent::Delete).as_secs(), 5);
    pod.metadata.deletion_grace_period_seconds = Some(0);
    assert_eq!(grace(&pod, Intent::Remove).as_secs(), 1);
    pod.metadata.deletion_grace_period_seconds = None;
    assert_eq!(grace(&pod, Intent::Remove).as_secs(), 30);
}
