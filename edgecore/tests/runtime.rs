//! The Pod manager on a real containerd: what no fake can prove.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "runtime/rig.rs"]
mod rig;
#[path = "runtime/streams.rs"]
mod streams;

use std::time::Duration;

use common::stream::request::LogOptions;
use edgecore::pods::jobs::Paths;
use edgecore::stream::logs::{self, Log, Part};
use edgecore::stream::stats::{self, Gatherer};
use futures::StreamExt as _;
use rig::{Agent, Containerd, Kept, phase, pod};
use serde_json::json;

#[tokio::test]
async fn a_pod_runs_with_an_address_and_a_log_and_leaves_nothing_behind() {
    if !rig::in_namespaces() {
        return;
    }
    rig::log();
    let containerd = Containerd::start();
    let kept = Kept::new();
    let agent = Agent::start(containerd.client(), &containerd.dir, &kept);
    let mut runtime = agent.handle.runtime.clone();
    runtime
        .wait_for(|r| r.ready && r.network_ready)
        .await
        .unwrap();
    assert_eq!(runtime.borrow().name, "containerd");

    let mut spec = pod(
        "web",
        "11111111-aaaa",
        "trap 'exit 0' TERM; echo hello; sleep 1000 & wait",
    );
    let key = kept.put(&spec);
    let (report, took) = kept.until("running", &key, |r| phase(r) == "Running").await;
    eprintln!("create to Running: {took:?}");
    let status = &report.status;
    assert_eq!(status["hostIP"], "192.0.2.7");
    assert!(
        status["podIP"].as_str().unwrap().starts_with("10.213.77."),
        "{status:#}"
    );
    let container = &status["containerStatuses"][0];
    assert_eq!(container["ready"], true);
    assert!(
        container["containerID"]
            .as_str()
            .unwrap()
            .starts_with("containerd://")
    );
    let log = containerd
        .dir
        .join("log/pods/default_web_11111111-aaaa/main/0.log");
    // A shell that has not come to its trap yet ends by the signal, and that is another outcome.
    let said = || std::fs::read_to_string(&log).is_ok_and(|l| l.contains("stdout F hello"));
    while !said() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    spec["metadata"]["deletionTimestamp"] = json!("2026-11-23T00:00:00Z");
    spec["metadata"]["deletionGracePeriodSeconds"] = json!(1);
    kept.put(&spec);
    let (report, took) = kept.until("gone", &key, |r| r.gone).await;
    eprintln!("delete to gone: {took:?}");
    assert_eq!(phase(&report), "Succeeded");
    assert!(took < Duration::from_secs(10));
    let cri = containerd.client();
    assert!(cri.list_sandboxes(None).await.unwrap().is_empty());
    assert!(cri.list_containers(None).await.unwrap().is_empty());
    assert!(log.exists(), "logs stay until the object is gone");

    kept.remove(&key);
    let mut changes = kept.desired.changes();
    while !kept.desired.pods().is_empty() {
        tokio::time::timeout(Duration::from_secs(10), changes.changed())
            .await
            .unwrap()
            .unwrap();
    }
    assert!(!log.exists());
    agent.stop().await;
}

#[tokio::test]
async fn containers_outlive_the_agent_and_the_runtime_and_are_not_restarted() {
    if !rig::in_namespaces() {
        return;
    }
    rig::log();
    let mut containerd = Containerd::start();
    let kept = Kept::new();
    let agent = Agent::start(containerd.client(), &containerd.dir, &kept);
    let key = kept.put(&pod(
        "web",
        "22222222-aaaa",
        "trap 'exit 0' TERM; sleep 1000 & wait",
    ));
    let (before, _) = kept.until("running", &key, |r| phase(r) == "Running").await;
    agent.stop().await;

    let agent = Agent::start(containerd.client(), &containerd.dir, &kept);
    let mut runtime = agent.handle.runtime.clone();
    runtime.wait_for(|r| r.ready).await.unwrap();
    containerd.kill();
    // At rest nobody asks for half a minute: the Pod's own questions find out at once.
    kept.put(&pod("other", "22222222-bbbb", "sleep 1000"));
    tokio::time::sleep(Duration::from_secs(2)).await;
    containerd.restart();
    let other = common::ids::ObjectKey::pod("default", "other", "22222222-bbbb");
    kept.until("the second runs", &other, |r| phase(r) == "Running")
        .await;
    let after = kept.reports.pod(&key).unwrap();
    assert_eq!(after, before, "neither its container nor a time changed");

    for key in [key, other] {
        kept.remove(&key);
    }
    kept.until_empty().await;
    agent.stop().await;
}

#[tokio::test]
async fn init_containers_environment_files_and_last_words_are_real() {
    if !rig::in_namespaces() {
        return;
    }
    rig::log();
    let containerd = Containerd::start();
    let kept = Kept::new();
    let agent = Agent::start(containerd.client(), &containerd.dir, &kept);
    let settings =
        common::ids::ObjectKey::named(common::ids::Kind::ConfigMap, "default", "settings");
    kept.put_object(settings.clone(), &json!({"data": {"greeting": "hello"}}));
    let mut spec = pod(
        "job",
        "33333333-aaaa",
        "test -e /share/made && test \"$GREETING\" = hello && cat /settings/greeting \
         && grep -q $(MY_NAME) /etc/hosts \
         && echo done by $(MY_NAME) > /dev/termination-log",
    );
    spec["spec"]["restartPolicy"] = json!("Never");
    spec["spec"]["volumes"] = json!([
        {"name": "share", "emptyDir": {}},
        {"name": "settings", "configMap": {"name": "settings"}}
    ]);
    let mounts = json!([
        {"name": "share", "mountPath": "/share"},
        {"name": "settings", "mountPath": "/settings"}
    ]);
    spec["spec"]["initContainers"] = json!([{
        "name": "prepare", "image": rig::IMAGE, "imagePullPolicy": "Never",
        "command": ["/bin/touch", "/share/made"], "volumeMounts": [{"name": "share", "mountPath": "/share"}]
    }]);
    spec["spec"]["containers"][0]["volumeMounts"] = mounts;
    spec["spec"]["containers"][0]["env"] = json!([
        {"name": "MY_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "GREETING", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "greeting"}}}
    ]);
    let key = kept.put(&spec);
    let ended =
        |r: &edgecore::store::reports::PodReport| ["Succeeded", "Failed"].contains(&phase(r));
    let (report, _) = kept.until("ended", &key, ended).await;
    let status = &report.status;
    assert_eq!(phase(&report), "Succeeded", "{status:#}");
    assert_eq!(status["initContainerStatuses"][0]["ready"], true);
    let end = &status["containerStatuses"][0]["state"]["terminated"];
    assert_eq!(end["message"], "done by job\n");
    assert_eq!(end["reason"], "Completed");
    kept.remove(&key);
    kept.until_empty().await;

    // A ConfigMap's change reaches the file in a container that runs.
    let mut spec = pod(
        "web",
        "33333333-bbbb",
        "trap 'exit 0' TERM; sleep 1000 & wait",
    );
    spec["spec"]["volumes"] = json!([{"name": "settings", "configMap": {"name": "settings"}}]);
    spec["spec"]["containers"][0]["volumeMounts"] =
        json!([{"name": "settings", "mountPath": "/settings"}]);
    let key = kept.put(&spec);
    let (report, _) = kept.until("running", &key, |r| phase(r) == "Running").await;
    let id = report.status["containerStatuses"][0]["containerID"]
        .as_str()
        .unwrap()
        .to_owned();
    let id = id.trim_start_matches("containerd://");
    kept.put_object(settings, &json!({"data": {"greeting": "changed"}}));
    let cri = containerd.client();
    let began = std::time::Instant::now();
    loop {
        let command = ["/bin/cat", "/settings/greeting"]
            .map(str::to_owned)
            .to_vec();
        let answer = cri
            .exec_sync(id, command, Duration::from_secs(10))
            .await
            .unwrap();
        if answer.stdout == b"changed" {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "{answer:?}");
    }
    kept.remove(&key);
    kept.until_empty().await;
    agent.stop().await;
}

#[tokio::test]
async fn a_log_is_followed_across_a_rotation_and_the_container_is_measured() {
    const LINES: usize = 1300;
    rig::log();
    let containerd = Containerd::start();
    let kept = Kept::new();
    let agent = Agent::start(containerd.client(), &containerd.dir, &kept);
    let mut spec = pod(
        "talker",
        "55555555-aaaa",
        &format!("n=0; while test $n -lt {LINES}; do n=$((n+1)); echo line $n; sleep 0.01; done"),
    );
    spec["spec"]["restartPolicy"] = json!("Never");
    let key = kept.put(&spec);
    let (report, _) = kept.until("running", &key, |r| phase(r) == "Running").await;

    let id = report.status["containerStatuses"][0]["containerID"]
        .as_str()
        .unwrap();
    let id = id.strip_prefix("containerd://").unwrap().to_owned();
    let paths = Paths {
        pod_logs: containerd.dir.join("log/pods"),
        ..Paths::default()
    };
    let cri = containerd.client();
    let log = Log {
        dir: paths
            .pod_logs
            .join("default_talker_55555555-aaaa")
            .join("main"),
        attempt: 0,
    };
    let options = LogOptions {
        follow: true,
        ..LogOptions::default()
    };
    let part = Part::new(&options, jiff::Timestamp::now()).unwrap();
    let ended = logs::container_ended(cri.clone(), id.clone());
    let stream = logs::read(&log, part, ended).await.unwrap();
    let following = stream.map(Result::unwrap).collect::<Vec<_>>();

    let gatherer = Gatherer::new(stats::Deps {
        cri: cri.clone(),
        cgroups: agent.handle.cgroups(),
        desired: kept.desired.clone(),
        paths,
        data_dir: containerd.dir.clone(),
        node: "edge-1".into(),
    });
    let measuring = async { (gatherer.resource().await, gatherer.summary(false).await) };
    let followed = async { tokio::join!(following, measuring) };
    let (chunks, (resource, summary)) = tokio::time::timeout(Duration::from_secs(120), followed)
        .await
        .expect("the log ends with its container");
    let text = String::from_utf8(chunks.concat()).unwrap();
    let want: String = (1..=LINES).map(|n| format!("line {n}\n")).collect();
    assert!(text == want, "{} of {} bytes", text.len(), want.len());
    let files = std::fs::read_dir(&log.dir).unwrap().count();
    assert!(files > 1, "the log was rotated meanwhile");

    let series =
        r#"container_cpu_usage_seconds_total{container="main",namespace="default",pod="talker"} "#;
    assert!(resource.contains(series), "{resource}");
    assert!(
        resource.contains("\npod_memory_working_set_bytes{")
            && resource.contains("\nscrape_error 0\n")
    );
    let measured = &summary["pods"][0];
    assert_eq!(measured["podRef"]["uid"], "55555555-aaaa");
    assert!(
        measured["memory"]["workingSetBytes"].as_u64().unwrap() > 0,
        "{summary:#}"
    );
    assert_eq!(measured["network"]["name"], "eth0", "{summary:#}");
    assert!(
        summary["node"]["runtime"]["imageFs"]["capacityBytes"]
            .as_u64()
            .unwrap()
            > 0
    );

    kept.remove(&key);
    kept.until_empty().await;
    agent.stop().await;
}
