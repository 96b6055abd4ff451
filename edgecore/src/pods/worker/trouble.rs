//! Lives of Pods on a runtime that is away, slow or refuses.

use common::ids::Kind;
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::device::{Device, deleted, pod};
use super::*;

#[tokio::test(start_paused = true)]
async fn a_missing_runtime_is_reported_and_waited_for() {
    let d = Device::new();
    d.fake.set_down(true);
    let agent = d.start();
    let key = d.put(&pod("web", "u1"));
    sleep(Duration::from_secs(30)).await;
    let mut runtime = agent.handle.runtime.clone();
    assert!(!runtime.borrow_and_update().ready);
    assert!(
        runtime
            .borrow()
            .message
            .contains("container runtime is down")
    );
    d.fake.set_down(false);
    let took = d.until("running", || d.phase(&key) == "Running").await;
    assert!(took < Duration::from_secs(2), "{took:?}");
    assert!(runtime.borrow().ready && runtime.borrow().name == "fake");

    d.fake.set_down(true);
    let began = Instant::now();
    let second = d.put(&pod("next", "u2"));
    runtime.wait_for(|r| !r.ready).await.unwrap();
    assert!(
        began.elapsed() < Duration::from_secs(1),
        "whoever gets no answer raises the alarm"
    );
    assert_eq!(
        d.phase(&key),
        "Running",
        "a runtime that is away says nothing about its Pods"
    );
    d.fake.set_down(false);
    let took = d
        .until("the second runs", || d.phase(&second) == "Running")
        .await;
    assert!(took < Duration::from_secs(2), "{took:?}");
    assert_eq!(d.fake.running(), ["main/0", "main/0"]);
}

#[tokio::test(start_paused = true)]
async fn a_runtime_that_was_away_for_a_moment_holds_nobody_up() {
    let d = Device::new();
    let agent = d.start();
    let mut runtime = agent.handle.runtime.clone();
    runtime.wait_for(|r| r.ready).await.unwrap();
    d.fake.set_down(true);
    let key = d.put(&pod("web", "u1"));
    sleep(Duration::from_millis(300)).await;
    d.fake.set_down(false);
    let took = d.until("running", || d.phase(&key) == "Running").await;
    assert!(took < Duration::from_secs(2), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn an_image_that_cannot_be_pulled_backs_off_and_is_tried_again() {
    let d = Device::new();
    let _agent = d.start();
    let mut spec = pod("web", "u1");
    spec["spec"]["containers"][0]["image"] = json!("r.example/private:1");
    spec["spec"]["imagePullSecrets"] = json!([{"name": "login"}]);
    d.put_object(
        ObjectKey::named(Kind::Secret, "default", "login"),
        // {"auths":{"r.example":{"username":"edge","password":"x"}}}
        json!({"data": {".dockerconfigjson":
            "eyJhdXRocyI6eyJyLmV4YW1wbGUiOnsidXNlcm5hbWUiOiJlZGdlIiwicGFzc3dvcmQiOiJ4In19fQ=="}}),
    );
    let key = d.put(&spec);
    let reason = || d.status(&key)["containerStatuses"][0]["state"]["waiting"]["reason"].clone();
    d.until("error", || reason() == "ErrImagePull").await;
    d.until("back-off", || reason() == "ImagePullBackOff").await;
    assert_eq!(d.phase(&key), "Pending");
    d.fake.publish("r.example/private:1", Some("edge"));
    let took = d.until("running", || d.phase(&key) == "Running").await;
    assert!(took < Duration::from_secs(11), "{took:?}");
    assert!(
        d.fake
            .calls()
            .contains(&"PullImage r.example/private:1 edge".to_owned())
    );
    let reasons = d.reasons().join("\n");
    for word in [
        "Pulling image",
        "Failed to pull image",
        "Error: ErrImagePull",
        "Successfully pulled",
    ] {
        assert!(reasons.contains(word), "{word} in {reasons}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_pod_deleted_while_its_image_comes_does_not_wait_for_it() {
    let d = Device::new();
    let _agent = d.start();
    d.fake.publish("big:1", None);
    d.fake.delay("PullImage", Duration::from_secs(600));
    let mut spec = pod("web", "u1");
    spec["spec"]["containers"][0]["image"] = json!("big:1");
    let key = d.put(&spec);
    d.until("pending", || d.phase(&key) == "Pending").await;
    sleep(Duration::from_secs(5)).await;
    d.put(&deleted(spec, 30));
    let took = d.until("gone", || d.gone(&key)).await;
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert!(d.fake.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_call_that_fails_is_made_again_and_said() {
    for (call, reason) in [
        ("RunPodSandbox", "FailedCreatePodSandBox"),
        ("CreateContainer", "Failed"),
        ("StartContainer", "Failed"),
    ] {
        let d = Device::new();
        let _agent = d.start();
        d.fake.fail_next(call, Failure::Refused, "no luck");
        let key = d.put(&pod("web", "u1"));
        let took = d.until(call, || d.phase(&key) == "Running").await;
        assert!(took < Duration::from_secs(20), "{call}: {took:?}");
        assert!(
            d.events
                .drain()
                .iter()
                .any(|e| e.reason == reason && e.message.contains("no luck"))
        );
    }
    for call in [
        "StopContainer",
        "StopPodSandbox",
        "RemoveContainer",
        "RemovePodSandbox",
    ] {
        let d = Device::new();
        let _agent = d.start();
        let key = d.put(&pod("web", "u1"));
        d.until("running", || d.phase(&key) == "Running").await;
        d.fake.fail_next(call, Failure::Refused, "no luck");
        d.put(&deleted(pod("web", "u1"), 5));
        let took = d.until(call, || d.gone(&key)).await;
        assert!(took < Duration::from_secs(20), "{call}: {took:?}");
        assert!(d.fake.is_empty());
    }
}
