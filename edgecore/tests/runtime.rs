//! The Pod manager on a real containerd: what no fake can prove.

#[path = "runtime/rig.rs"]
mod rig;

use std::time::Duration;

use rig::{Agent, Containerd, Kept, phase, pod};
use serde_json::json;

#[tokio::test]
async fn a_pod_runs_with_an_address_and_a_log_and_leaves_nothing_behind() {
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
    println!("create to Running: {took:?}");
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
    assert!(log.exists());

    spec["metadata"]["deletionTimestamp"] = json!("2026-11-23T00:00:00Z");
    spec["metadata"]["deletionGracePeriodSeconds"] = json!(1);
    kept.put(&spec);
    let (report, took) = kept.until("gone", &key, |r| r.gone).await;
    println!("delete to gone: {took:?}");
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
