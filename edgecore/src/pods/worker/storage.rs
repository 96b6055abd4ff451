//! Lives of Pods that keep more on the disk than they may.

use std::fs;

use serde_json::json;
use tokio::time::sleep;

use super::device::{Device, pod};
use super::*;
use crate::cri::fake::Usage;

const MIB: usize = 1 << 20;

fn limited() -> serde_json::Value {
    let mut pod = pod("web", "u1");
    pod["spec"]["volumes"] = json!([{"name": "cache", "emptyDir": {"sizeLimit": "1Mi"}}]);
    let main = &mut pod["spec"]["containers"][0];
    main["volumeMounts"] = json!([{"name": "cache", "mountPath": "/cache"}]);
    main["resources"] = json!({"limits": {"ephemeral-storage": "4Mi"}});
    pod
}

fn writes(device: &Device, bytes: usize) {
    let pod = device.dir.path().join("agent/pods/u1");
    let cache = pod.join("volumes/kubernetes.io~empty-dir/cache");
    fs::write(cache.join("file"), vec![1; bytes]).unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_pod_whose_volume_outgrows_its_limit_is_evicted_for_good() {
    let d = Device::new();
    let agent = d.start();
    let key = d.put(&limited());
    d.until("running", || d.phase(&key) == "Running").await;
    writes(&d, MIB / 2);
    sleep(Duration::from_secs(120)).await;
    assert_eq!(d.phase(&key), "Running");
    writes(&d, 2 * MIB);
    let took = d.until("failed", || d.phase(&key) == "Failed").await;
    // A count; the container is not given its 30 seconds.
    assert!(took.as_secs() <= 15, "{took:?}");
    let status = d.status(&key);
    assert_eq!(status["reason"], "Evicted");
    let message = status["message"].as_str().unwrap();
    assert!(message.contains("\"cache\" holds 2.0 MiB"), "{message}");
    let conditions = status["conditions"].as_array().unwrap();
    // It is the Pod's own doing.
    assert!(conditions.iter().all(|c| c["type"] != "DisruptionTarget"));
    let events = d.events.drain();
    assert!(events.iter().any(|e| e.reason == "Evicted"));
    agent.stop().await;
    let _agent = d.start();
    sleep(Duration::from_secs(60)).await;
    let status = d.status(&key);
    assert_eq!(status["reason"], "Evicted");
    let ended = &status["containerStatuses"][0]["state"]["terminated"];
    assert_eq!(ended["reason"], "Error", "{status}");
    // What it kept is gone: it was evicted for that.
    assert!(d.fake.is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_a_container_writes_into_its_own_layer_counts() {
    let d = Device::new();
    let _agent = d.start();
    let key = d.put(&limited());
    d.until("running", || d.phase(&key) == "Running").await;
    let uses = |written_bytes| Usage {
        cpu_nanos: 0,
        working_set_bytes: 0,
        written_bytes,
    };
    d.fake.uses("main", uses(4 << 20));
    sleep(Duration::from_secs(60)).await;
    // Alone not more than it may, and with its volume's directory more than all may.
    d.fake.uses("main", uses((4 << 20) + 1));
    d.until("failed", || d.phase(&key) == "Failed").await;
    let status = d.status(&key);
    let message = status["message"].as_str().unwrap();
    assert!(message.contains("\"main\" keeps 4.0 MiB"), "{message}");
}
