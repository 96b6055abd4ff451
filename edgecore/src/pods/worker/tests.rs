//! Whole lives of Pods on a runtime in memory, under paused time.

use std::sync::atomic::Ordering;

use common::ids::Kind;
use common::object::Object;
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::device::{Device, condition, deleted, ends, pod};
use super::*;
use crate::cri::Cri as _;
use crate::cri::fake::Program;
use crate::store::desired::Batch;

#[tokio::test(start_paused = true)]
async fn a_pod_runs_is_deleted_and_its_record_goes_last() {
    let d = Device::new();
    let agent = d.start();
    let key = d.put(&pod("web", "u1"));
    let took = d.until("running", || d.phase(&key) == "Running").await;
    assert!(
        took < Duration::from_millis(100),
        "no timer is on the way: {took:?}"
    );
    let status = d.status(&key);
    for kind in [
        "PodReadyToStartContainers",
        "Initialized",
        "ContainersReady",
        "Ready",
        "PodScheduled",
    ] {
        assert_eq!(condition(&status, kind), "True", "{kind}");
    }
    assert_eq!(status["hostIP"], "192.0.2.7");
    assert_eq!(status["containerStatuses"][0]["restartCount"], 0);
    let reasons: Vec<_> = d.events.drain().into_iter().map(|e| e.reason).collect();
    assert_eq!(reasons, ["Pulled", "Created", "Started"]);

    d.fake.program("main", Program::default());
    d.put(&deleted(pod("web", "u1"), 30));
    d.until("gone", || d.gone(&key)).await;
    assert!(d.fake.is_empty());
    assert_eq!(d.phase(&key), "Failed", "it ended with 143");
    assert_eq!(condition(&d.status(&key), "Ready"), "False");
    assert_eq!(
        d.desired.pods().len(),
        1,
        "the cloud still has to delete the object"
    );

    d.remove(&key);
    d.until("forgotten", || d.desired.pods().is_empty()).await;
    assert!(d.reports.pod(&key).is_none());
    assert_eq!(*d.tokens.forgotten.lock().unwrap(), [key]);
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_runtime_that_hangs_does_not_hold_the_end_of_the_agent_up() {
    let d = Device::new();
    let agent = d.start();
    let key = d.put(&pod("web", "u1"));
    d.until("running", || d.phase(&key) == "Running").await;
    d.fake.delay("ListContainers", Duration::from_secs(20));
    d.put(&deleted(pod("web", "u1"), 30));
    sleep(Duration::from_secs(1)).await;
    let began = Instant::now();
    agent.stop().await;
    assert!(
        began.elapsed() < Duration::from_secs(1),
        "{:?}",
        began.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn what_another_agent_made_in_the_same_runtime_is_left_alone() {
    let d = Device::new();
    let agent = d.start();
    let key = d.put(&pod("web", "u1"));
    d.until("running", || d.phase(&key) == "Running").await;
    agent.stop().await;
    let other = Device {
        desired: Desired::in_memory(),
        ledger: Arc::default(),
        dir: tempfile::tempdir().unwrap(),
        node: "edge-2",
        ..d
    };
    other.complete();
    let _agent = other.start();
    sleep(Duration::from_secs(600)).await;
    assert_eq!(other.fake.running(), ["main/0"]);
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_asks_for_more_than_there_is_fails_and_the_next_one_runs() {
    let d = Device::new();
    let _agent = d.start();
    let mut large = pod("large", "u1");
    large["spec"]["containers"][0]["resources"] = json!({"requests": {"memory": "2Gi"}});
    let large = d.put(&large);
    let small = d.put(&pod("small", "u2"));
    d.until("running", || d.phase(&small) == "Running").await;
    d.until("failed", || d.phase(&large) == "Failed").await;
    let status = d.status(&large);
    assert_eq!(status["reason"], "OutOfmemory");
    // `kubectl get pods` would show a container's waiting instead of the reason.
    assert_eq!(status["containerStatuses"], json!(null));
    assert_eq!(condition(&status, "Ready"), "False");
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_vanishes_from_the_cloud_is_ended_with_its_own_grace() {
    let d = Device::new();
    let _agent = d.start();
    d.fake.program(
        "main",
        Program {
            stubborn: true,
            ..Default::default()
        },
    );
    let key = d.put(&pod("web", "u1"));
    d.until("running", || d.phase(&key) == "Running").await;
    d.remove(&key);
    let took = d.until("forgotten", || d.desired.pods().is_empty()).await;
    assert!(d.fake.is_empty());
    assert!((30..32).contains(&took.as_secs()), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_shorter_grace_shortens_the_wait_and_the_pre_stop_hook_runs_once() {
    let d = Device::new();
    let _agent = d.start();
    d.fake.program(
        "main",
        Program {
            stubborn: true,
            ..Default::default()
        },
    );
    let mut spec = pod("web", "u1");
    spec["spec"]["containers"][0]["lifecycle"] = json!({"preStop": {"exec": {"command": ["bye"]}}, "postStart": {"exec": {"command": ["hi"]}}});
    let key = d.put(&spec);
    d.until("ready", || {
        d.status(&key)["containerStatuses"][0]["ready"] == true
    })
    .await;
    d.put(&deleted(spec.clone(), 30));
    sleep(Duration::from_secs(2)).await;
    d.put(&deleted(spec, 3));
    let took = d.until("gone", || d.gone(&key)).await;
    assert!(took < Duration::from_secs(4), "{took:?}");
    let hooks: Vec<_> = d
        .fake
        .calls()
        .into_iter()
        .filter(|c| c.starts_with("ExecSync"))
        .collect();
    assert_eq!(hooks, ["ExecSync main/0 hi", "ExecSync main/0 bye"]);
}

#[tokio::test(start_paused = true)]
async fn a_container_that_crashes_is_restarted_later_and_later() {
    let d = Device::new();
    let _agent = d.start();
    d.fake.program("main", ends(1, 7));
    let began = Instant::now();
    let key = d.put(&pod("web", "u1"));
    let mut at = Vec::new();
    for attempt in 0..5 {
        let label = format!("StartContainer main/{attempt}");
        d.until(&label, || d.fake.calls().contains(&label)).await;
        at.push(began.elapsed().as_secs());
    }
    // Each run takes a second and is noticed within one more; the waits are 0, 10, 20, 40.
    let gaps: Vec<_> = at.windows(2).map(|w| w[1] - w[0]).collect();
    for (gap, least) in gaps.iter().zip([1, 11, 21, 41]) {
        assert!((least..least + 3).contains(gap), "{gaps:?}");
    }
    d.until("says so", || {
        d.status(&key)["containerStatuses"][0]["state"]["waiting"]["reason"] == "CrashLoopBackOff"
    })
    .await;
    let status = d.status(&key);
    assert_eq!(
        status["containerStatuses"][0]["lastState"]["terminated"]["exitCode"],
        7
    );
    assert_eq!(status["phase"], "Running");
    assert!(d.events.drain().iter().any(|e| e.reason == "BackOff"));
}

#[tokio::test(start_paused = true)]
async fn a_new_agent_adopts_what_runs_and_restarts_nothing() {
    let d = Device::new();
    let agent = d.start();
    let key = d.put(&pod("web", "u1"));
    d.until("running", || d.phase(&key) == "Running").await;
    let before = d.status(&key);
    agent.stop().await;
    assert_eq!(d.fake.running(), ["main/0"]);
    d.fake.forget_calls();
    let _agent = d.start();
    sleep(Duration::from_secs(120)).await;
    assert!(d.fake.calls().is_empty(), "{:?}", d.fake.calls());
    assert_eq!(d.status(&key), before, "not even a time changed");
}

#[tokio::test(start_paused = true)]
async fn an_agent_finishes_what_one_before_it_began() {
    let d = Device::new();
    let agent = d.start();
    d.fake.program(
        "main",
        Program {
            stubborn: true,
            ..Default::default()
        },
    );
    let key = d.put(&pod("web", "u1"));
    d.until("running", || d.phase(&key) == "Running").await;
    d.put(&deleted(pod("web", "u1"), 30));
    sleep(Duration::from_secs(5)).await;
    agent.stop().await;
    d.remove(&key);
    let _agent = d.start();
    d.until("forgotten", || d.desired.pods().is_empty()).await;
    assert!(d.fake.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_job_that_is_done_is_never_started_again() {
    let d = Device::new();
    let agent = d.start();
    d.fake.program("main", ends(5, 0));
    let mut job = pod("job", "u1");
    job["spec"]["restartPolicy"] = json!("Never");
    let key = d.put(&job);
    d.until("done", || d.phase(&key) == "Succeeded").await;
    sleep(Duration::from_secs(5)).await;
    assert!(
        d.fake
            .calls()
            .iter()
            .any(|c| c.starts_with("StopPodSandbox"))
    );
    agent.stop().await;

    // Another agent that has neither its own report nor the dead container, only the API's word.
    job["status"] = json!({"phase": "Succeeded"});
    d.put(&job);
    d.reports.forget_pod(&key);
    let ids = d.fake.list_sandboxes(None).await.unwrap();
    for sandbox in ids {
        d.fake.remove_sandbox(&sandbox.id).await.unwrap();
    }
    d.fake.forget_calls();
    let _agent = d.start();
    sleep(Duration::from_secs(60)).await;
    assert!(d.fake.calls().is_empty(), "{:?}", d.fake.calls());
    assert_eq!(d.phase(&key), "Succeeded");
}

#[tokio::test(start_paused = true)]
async fn a_failed_init_container_fails_a_pod_that_never_restarts() {
    let d = Device::new();
    let _agent = d.start();
    d.fake.program("prepare", ends(1, 3));
    let mut spec = pod("web", "u1");
    spec["spec"]["restartPolicy"] = json!("Never");
    spec["spec"]["initContainers"] = json!([{"name": "prepare", "image": "i:1"}]);
    let key = d.put(&spec);
    d.until("failed", || d.phase(&key) == "Failed").await;
    sleep(Duration::from_secs(30)).await;
    let starts: Vec<_> = d
        .fake
        .calls()
        .into_iter()
        .filter(|c| c.starts_with("Start"))
        .collect();
    assert_eq!(starts, ["StartContainer prepare/0"]);
}

#[tokio::test(start_paused = true)]
async fn a_sandbox_that_is_lost_is_made_again() {
    let d = Device::new();
    let _agent = d.start();
    let key = d.put(&pod("web", "u1"));
    d.until("running", || d.phase(&key) == "Running").await;
    d.fake.lose_sandbox("u1");
    d.until("again", || d.fake.running() == ["main/1"]).await;
    d.until("said", || {
        d.status(&key)["containerStatuses"][0]["restartCount"] == 1
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_successor_of_the_same_name_waits_for_nothing() {
    let d = Device::new();
    let _agent = d.start();
    d.fake.program(
        "main",
        Program {
            stubborn: true,
            ..Default::default()
        },
    );
    let old = d.put(&pod("db-0", "u1"));
    d.until("running", || d.phase(&old) == "Running").await;
    d.remove(&old);
    let new = d.put(&pod("db-0", "u2"));
    let took = d.until("successor", || d.phase(&new) == "Running").await;
    assert!(took < Duration::from_secs(1));
    assert_eq!(d.fake.running().len(), 2, "the first is still ending");
    d.until("one left", || d.desired.pods().len() == 1).await;
    assert_eq!(d.phase(&new), "Running");
}

#[tokio::test(start_paused = true)]
async fn a_port_of_the_device_is_waited_for_or_refused() {
    let d = Device::new();
    let _agent = d.start();
    d.fake.program(
        "main",
        Program {
            stubborn: true,
            ..Default::default()
        },
    );
    let web = |name: &str, uid: &str| {
        let mut spec = pod(name, uid);
        spec["spec"]["containers"][0]["ports"] = json!([{"containerPort": 80, "hostPort": 80}]);
        spec
    };
    let first = d.put(&web("a", "u1"));
    d.until("running", || d.phase(&first) == "Running").await;
    let second = d.put(&web("b", "u2"));
    d.until("refused", || d.phase(&second) == "Failed").await;
    assert_eq!(d.status(&second)["reason"], "NodePorts");

    d.put(&deleted(web("a", "u1"), 10));
    sleep(Duration::from_secs(1)).await;
    let third = d.put(&web("c", "u3"));
    sleep(Duration::from_secs(2)).await;
    assert_eq!(d.phase(&third), "Pending");
    d.until("gone", || d.gone(&first)).await;
    let took = d.until("running", || d.phase(&third) == "Running").await;
    assert!(took < Duration::from_secs(1), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn nothing_starts_with_a_reference_that_has_not_come_and_all_follows_when_it_does() {
    let d = Device::new();
    let _agent = d.start();
    let mut spec = pod("web", "u1");
    spec["spec"]["containers"][0]["env"] = json!([
        {"name": "A", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "a"}}}
    ]);
    let key = d.put(&spec);
    sleep(Duration::from_secs(60)).await;
    assert!(d.fake.calls().is_empty(), "{:?}", d.fake.calls());
    assert!(d.events.drain().is_empty());

    let settings = ObjectKey::named(Kind::ConfigMap, "default", "settings");
    let absent = vec![Object::absent(settings.clone())];
    d.desired
        .commit(Batch {
            puts: absent,
            ..Default::default()
        })
        .unwrap();
    let reason = || d.status(&key)["containerStatuses"][0]["state"]["waiting"]["reason"].clone();
    d.until("said", || reason() == "CreateContainerConfigError")
        .await;
    d.put_object(settings, json!({"data": {"a": "b"}}));
    let took = d.until("running", || d.phase(&key) == "Running").await;
    assert!(took < Duration::from_secs(1), "{took:?}");
    let env = d.fake.config_of("main").unwrap().envs;
    assert!(env.iter().any(|e| e.key == "A" && e.value == "b"));
}

#[tokio::test(start_paused = true)]
async fn a_malformed_pod_marks_itself_and_the_others_go_on() {
    let d = Device::new();
    let _agent = d.start();
    let bad = ObjectKey::pod("default", "bad", "u9");
    d.put_object(bad.clone(), json!({"spec": {"containers": "none"}}));
    let good = d.put(&pod("web", "u1"));
    d.until("running", || d.phase(&good) == "Running").await;
    let events = d.events.drain();
    assert!(
        events
            .iter()
            .any(|e| e.pod.contains("bad") && e.reason == "FailedValidation")
    );
    d.remove(&bad);
    d.until("forgotten", || d.desired.pods().len() == 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_is_active_for_too_long_fails() {
    let d = Device::new();
    let _agent = d.start();
    let mut spec = pod("web", "u1");
    spec["spec"]["activeDeadlineSeconds"] = json!(20);
    let key = d.put(&spec);
    d.until("running", || d.phase(&key) == "Running").await;
    let took = d.until("failed", || d.phase(&key) == "Failed").await;
    assert!((18..23).contains(&took.as_secs()), "{took:?}");
    assert_eq!(d.status(&key)["reason"], "DeadlineExceeded");
    d.until("stopped", || d.fake.running().is_empty()).await;
    sleep(Duration::from_secs(60)).await;
    assert_eq!(d.phase(&key), "Failed");
    assert!(d.fake.running().is_empty());
}

#[tokio::test(start_paused = true)]
async fn orphans_are_removed_only_once_the_cloud_has_said_that_the_set_is_complete() {
    let d = Device::new();
    let agent = d.start();
    let key = d.put(&pod("web", "u1"));
    d.until("running", || d.phase(&key) == "Running").await;
    agent.stop().await;
    // An agent whose store was lost.
    let lost = Device {
        desired: Desired::in_memory(),
        ..d
    };
    let _agent = lost.start();
    sleep(Duration::from_secs(600)).await;
    assert_eq!(lost.fake.running(), ["main/0"]);
    lost.desired
        .commit(Batch {
            complete: true,
            ..Default::default()
        })
        .unwrap();
    lost.until("removed", || lost.fake.is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn events_are_acted_on_at_once_and_replace_the_polling_once_they_come() {
    let d = Device::new();
    d.fake.with_events();
    let _agent = d.start();
    // Between two comparisons at rest.
    d.fake.program("main", ends(92, 0));
    let key = d.put(&pod("web", "u1"));
    d.until("running", || d.phase(&key) == "Running").await;
    d.fake.program("main", ends(600, 0));
    sleep(Duration::from_millis(92_010)).await;
    d.fake.tick();
    let started = || d.fake.calls().contains(&"StartContainer main/1".to_owned());
    let took = d.until("restarted", started).await;
    assert!(took < Duration::from_millis(100), "{took:?}");
    sleep(Duration::from_secs(60)).await;
    d.fake.count_looks();
    sleep(Duration::from_secs(300)).await;
    let looks = d.fake.count_looks();
    assert!(looks < 30, "{looks} calls in five minutes");
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_is_named_again_while_it_ends_runs_again() {
    let d = Device::new();
    let _agent = d.start();
    let stubborn = Program {
        stubborn: true,
        ..Default::default()
    };
    d.fake.program("main", stubborn);
    let key = d.put(&pod("web", "u1"));
    d.until("running", || d.phase(&key) == "Running").await;
    d.remove(&key);
    sleep(Duration::from_secs(5)).await;
    // The same UID: a cluster that was restored, say.
    d.put(&pod("web", "u1"));
    sleep(Duration::from_secs(60)).await;
    assert_eq!(d.fake.running(), ["main/1"]);
    assert_eq!(d.phase(&key), "Running");
}

#[tokio::test(start_paused = true)]
async fn an_object_of_others_costs_a_pod_nothing() {
    let d = Device::new();
    let _agent = d.start();
    let keys: Vec<_> = (0..10)
        .map(|n| d.put(&pod(&format!("p{n}"), &format!("u{n}"))))
        .collect();
    d.until("running", || keys.iter().all(|k| d.phase(k) == "Running"))
        .await;
    sleep(Duration::from_secs(60)).await;
    d.fake.count_looks();
    for n in 0..100 {
        d.put_object(
            ObjectKey::named(Kind::ConfigMap, "default", "others"),
            json!({"data": {"n": n.to_string()}}),
        );
        sleep(Duration::from_millis(1)).await;
    }
    let looks = d.fake.count_looks();
    assert!(looks < 5, "{looks} calls");
}

#[tokio::test(start_paused = true)]
async fn what_was_said_to_be_gone_is_not_taken_back_by_a_new_agent() {
    let d = Device::new();
    let agent = d.start();
    let key = d.put(&pod("web", "u1"));
    d.until("running", || d.phase(&key) == "Running").await;
    d.put(&deleted(pod("web", "u1"), 1));
    d.until("gone", || d.gone(&key)).await;
    agent.stop().await;
    let mut changes = d.reports.changes();
    changes.borrow_and_update();
    let _agent = d.start();
    sleep(Duration::from_secs(60)).await;
    assert!(!changes.has_changed().unwrap(), "{:?}", d.reports.pod(&key));
}

#[tokio::test(start_paused = true)]
async fn a_device_at_rest_asks_its_runtime_rarely() {
    let d = Device::new();
    let _agent = d.start();
    let keys: Vec<_> = (0..10)
        .map(|n| d.put(&pod(&format!("p{n}"), &format!("u{n}"))))
        .collect();
    d.until("running", || keys.iter().all(|k| d.phase(k) == "Running"))
        .await;
    sleep(Duration::from_secs(60)).await;
    d.fake.count_looks();
    sleep(Duration::from_secs(60)).await;
    let looks = d.fake.count_looks();
    assert!(looks <= 30, "{looks} calls in a minute at rest");
}

#[tokio::test(start_paused = true)]
async fn a_label_that_changes_is_in_the_file_at_once_and_restarts_nothing() {
    let d = Device::new();
    let _agent = d.start();
    let mut labelled = pod("web", "u1");
    labelled["metadata"]["labels"] = json!({"tier": "front"});
    labelled["spec"]["volumes"] = json!([{"name": "down", "downwardAPI": {"items": [
        {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}},
    ]}}]);
    labelled["spec"]["containers"][0]["volumeMounts"] =
        json!([{"name": "down", "mountPath": "/down"}]);
    let key = d.put(&labelled);
    d.until("running", || d.phase(&key) == "Running").await;
    let file = "agent/pods/u1/volumes/kubernetes.io~downward-api/down/labels";
    let read = || std::fs::read_to_string(d.dir.path().join(file)).unwrap_or_default();
    assert_eq!(read(), "tier=\"front\"");

    labelled["metadata"]["labels"]["tier"] = json!("back");
    d.put(&labelled);
    let took = d.until("the new label", || read() == "tier=\"back\"").await;
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert_eq!(d.status(&key)["containerStatuses"][0]["restartCount"], 0);
}

/// The Pod with an ephemeral container, as an update through `pods/ephemeralcontainers` gives it.
fn debugged(mut pod: serde_json::Value, ephemeral: serde_json::Value) -> serde_json::Value {
    pod["spec"]["ephemeralContainers"] = json!([ephemeral]);
    pod
}

#[tokio::test(start_paused = true)]
async fn an_ephemeral_container_comes_to_a_running_pod_and_runs_once() {
    let d = Device::new();
    let agent = d.start();
    let mut web = pod("web", "u1");
    web["spec"]["volumes"] = json!([{"name": "tools", "configMap": {"name": "tools"}}]);
    d.put_object(
        ObjectKey::named(Kind::ConfigMap, "default", "tools"),
        json!({"data": {"t": "1"}}),
    );
    let key = d.put(&web);
    d.until("running", || d.phase(&key) == "Running").await;
    d.fake.program("debug", ends(60, 3));
    d.put(&debugged(
        web,
        json!({"name": "debug", "image": "i:1", "imagePullPolicy": "IfNotPresent", "stdin": true,
            "tty": true, "targetContainerName": "main",
            "securityContext": {"privileged": true},
            "env": [{"name": "A", "value": "b"}],
            "volumeMounts": [{"name": "tools", "mountPath": "/tools"}]}),
    ));
    let of = |status: &serde_json::Value| status["ephemeralContainerStatuses"][0].clone();
    let runs = || of(&d.status(&key))["state"]["running"].is_object();
    let took = d.until("the ephemeral container runs", runs).await;
    assert!(took < Duration::from_secs(1), "{took:?}");

    let config = d.fake.config_of("debug").unwrap();
    assert!(config.stdin && config.tty && !config.stdin_once);
    assert_eq!(
        config.envs.iter().find(|e| e.key == "A").unwrap().value,
        "b"
    );
    let security = config.linux.unwrap().security_context.unwrap();
    let options = security.namespace_options.unwrap();
    let main = d.status(&key)["containerStatuses"][0]["containerID"].clone();
    assert_eq!(json!(format!("fake://{}", options.target_id)), main);
    assert_eq!(
        options.pid,
        i32::from(crate::cri::api::NamespaceMode::Target)
    );
    // No other container had mounted the volume: it came with this one.
    let mount = config.mounts.iter().find(|m| m.container_path == "/tools");
    let file = std::path::Path::new(&mount.unwrap().host_path).join("t");
    assert_eq!(std::fs::read_to_string(file).unwrap(), "1");

    // A new agent adopts it, and nobody starts it again when it has ended.
    agent.stop().await;
    let agent = d.start();
    let ended = || of(&d.status(&key))["state"]["terminated"]["exitCode"] == 3;
    d.until("it has ended", ended).await;
    sleep(Duration::from_secs(600)).await;
    let starts = |d: &Device| {
        let calls = d.fake.calls();
        calls
            .iter()
            .filter(|c| *c == "StartContainer debug/0")
            .count()
    };
    assert_eq!(starts(&d), 1);
    assert_eq!(d.fake.running(), ["main/0"]);
    assert_eq!(d.phase(&key), "Running");
    assert_eq!(condition(&d.status(&key), "Ready"), "True");
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_ephemeral_container_that_cannot_have_its_target_says_what_it_waits_for() {
    let d = Device::new();
    let _agent = d.start();
    d.fake.program("main", ends(1, 7));
    let mut job = pod("job", "u1");
    job["spec"]["initContainers"] = json!([{"name": "prepare", "image": "i:1"}]);
    let ephemeral = json!({"name": "debug", "image": "i:1", "targetContainerName": "main"});
    let key = d.put(&debugged(job, ephemeral));
    let waiting = || {
        let status = d.status(&key);
        let why = status["ephemeralContainerStatuses"][0]["state"]["waiting"]["message"].clone();
        why.as_str().is_some_and(|m| m.contains("container main"))
    };
    d.until("it says so", waiting).await;
    d.fake.tick();
    assert_eq!(d.fake.running(), ["prepare/0"]);
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_is_done_takes_its_ephemeral_containers_with_it() {
    let d = Device::new();
    let _agent = d.start();
    d.fake.program("main", ends(20, 0));
    let mut job = pod("job", "u1");
    job["spec"]["restartPolicy"] = json!("Never");
    let key = d.put(&debugged(job, json!({"name": "debug", "image": "i:1"})));
    d.until("both run", || d.fake.running().len() == 2).await;
    d.until("done", || d.phase(&key) == "Succeeded").await;
    d.until("nothing runs", || d.fake.running().is_empty())
        .await;
    let ended = || {
        let status = d.status(&key);
        status["ephemeralContainerStatuses"][0]["state"]["terminated"].is_object()
    };
    d.until("its end is said", ended).await;
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_panics_is_started_again_and_the_others_go_on() {
    let d = Device::new();
    let _agent = d.start();
    let key = d.put(&pod("web", "u1"));
    d.until("running", || d.phase(&key) == "Running").await;
    d.clock_is_broken.store(true, Ordering::Relaxed);
    let unlucky = d.put(&pod("unlucky", "u2"));
    let mended = || !d.clock_is_broken.load(Ordering::Relaxed);
    d.until("a worker panicked", mended).await;
    assert_eq!(d.phase(&unlucky), "");
    let took = d.until("running", || d.phase(&unlucky) == "Running").await;
    assert!((10..12).contains(&took.as_secs()), "{took:?}");
    assert_eq!(d.fake.running(), ["main/0", "main/0"]);
}
