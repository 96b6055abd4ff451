//! The whole upstream side over an API server in memory, in paused time.

use std::sync::Arc;
use std::time::Duration;

use common::hub::proto;
use common::hub::proto::response::Body;
use common::ids::{NodeName, ObjectKey};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::fake::{FakeApi, FakeClaim, NODE};
use super::writer::{Call, WriteError};
use super::*;

struct Rig {
    api: Arc<FakeApi>,
    claim: Arc<FakeClaim>,
    upstream: Upstream,
    session: NodeUpstream,
    shutdown: CancellationToken,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

fn node() -> NodeName {
    NodeName::parse(NODE).unwrap()
}

fn key(name: &str) -> ObjectKey {
    ObjectKey::pod("shop", name, &format!("u-{name}"))
}

fn status(value: &Value) -> Arc<[u8]> {
    value.to_string().into_bytes().into()
}

fn phase(phase: &str) -> Value {
    json!({"phase": phase})
}

impl Rig {
    fn new() -> Self {
        let api = FakeApi::new();
        let claim = FakeClaim::new(true);
        let clock: WallClock = Arc::new(|| "2026-11-23T12:00:00Z".parse().unwrap());
        let deps = Deps {
            writer: api.clone(),
            pods: api.clone(),
            nodes: api.clone(),
            endpoints: None,
            clock,
        };
        let (upstream, task) = build(&Config::default(), deps);
        let session = upstream.node(node(), claim.clone());
        let shutdown = CancellationToken::new();
        tokio::spawn(task.run(shutdown.clone()));
        Self {
            api,
            claim,
            upstream,
            session,
            shutdown,
        }
    }

    /// With Pods `p0`, `p1`, … of this node, Pending, as the watch knows them.
    fn with_pods(n: usize) -> Self {
        let rig = Self::new();
        for i in 0..n {
            rig.api
                .put_pod(&format!("p{i}"), &format!("u-p{i}"), NODE, phase("Pending"));
        }
        rig.api.sync();
        rig
    }

    fn report(&self, name: &str, sequence: u64, value: &Value, gone: bool) {
        self.session
            .pod_report(&key(name), sequence, status(value), gone)
            .unwrap();
    }

    async fn acked(&mut self) -> Vec<(String, u64)> {
        let acked = timeout(Duration::from_secs(120), self.session.acked()).await;
        let acked = acked.expect("acknowledged in time");
        acked
            .iter()
            .map(|a| (a.key.name.to_string(), a.sequence))
            .collect()
    }

    /// Nothing is acknowledged for a long time.
    async fn silent(&mut self) {
        assert!(
            timeout(Duration::from_secs(20), self.session.acked())
                .await
                .is_err()
        );
    }

    async fn settle(&self) {
        sleep(Duration::from_millis(50)).await;
    }
}

/// The key of a node's report on itself carries no name.
const OWN: &str = "";

fn one(name: &str, sequence: u64) -> Vec<(String, u64)> {
    vec![(name.to_string(), sequence)]
}

#[tokio::test(start_paused = true)]
async fn a_report_is_written_with_uid_and_revision_then_acknowledged() {
    let mut rig = Rig::with_pods(1);
    rig.report("p0", 7, &phase("Running"), false);
    assert_eq!(rig.acked().await, one("p0", 7));
    assert_eq!(rig.api.pod_status("p0"), phase("Running"));
    let Call::PatchPodStatus {
        namespace,
        name,
        body,
    } = rig.api.calls().pop().unwrap()
    else {
        panic!("no patch");
    };
    assert_eq!((namespace.as_str(), name.as_str()), ("shop", "p0"));
    assert_eq!(
        body["metadata"],
        json!({"uid": "u-p0", "resourceVersion": "1"})
    );
    assert_eq!(rig.api.verbs(), ["patch"]);
}

#[tokio::test(start_paused = true)]
async fn the_latest_wins_while_a_write_is_in_flight() {
    let mut rig = Rig::with_pods(1);
    rig.api.open.send_replace(false);
    rig.report("p0", 1, &json!({"phase": "Running", "message": "1"}), false);
    rig.settle().await;
    for n in 2..=50 {
        rig.report(
            "p0",
            n,
            &json!({"phase": "Running", "message": n.to_string()}),
            false,
        );
    }
    rig.settle().await;
    rig.api.open.send_replace(true);
    while rig.acked().await != one("p0", 50) {}
    assert_eq!(rig.api.verbs(), ["patch", "patch"]);
    assert_eq!(rig.api.pod_status("p0")["message"], "50");
    assert!(rig.upstream.metrics().coalesced >= 48);
}

#[tokio::test(start_paused = true)]
async fn an_equal_report_is_acknowledged_without_a_write() {
    let mut rig = Rig::with_pods(1);
    rig.report("p0", 1, &phase("Pending"), false);
    assert_eq!(rig.acked().await, one("p0", 1));
    rig.report("p0", 1, &phase("Pending"), false);
    assert_eq!(
        rig.acked().await,
        one("p0", 1),
        "sent again: acknowledged again"
    );
    assert!(rig.api.verbs().is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_somebody_else_flips_is_repaired_at_the_watch_event() {
    let mut rig = Rig::with_pods(1);
    let ready = json!({"phase": "Running", "conditions": [
        {"type": "Ready", "status": "True", "lastTransitionTime": "2026-11-23T11:00:00Z"}]});
    rig.report("p0", 1, &ready, false);
    rig.acked().await;
    rig.api.edit("p0", |pod| {
        pod["status"]["conditions"][0]["status"] = "False".into();
        let gate = json!({"type": "example.com/gate", "status": "True"});
        pod["status"]["conditions"]
            .as_array_mut()
            .unwrap()
            .push(gate);
    });
    rig.api.sync();
    rig.upstream.changed(&node());
    rig.settle().await;
    let conditions = rig.api.pod_status("p0")["conditions"].clone();
    assert_eq!(conditions[0]["status"], "True");
    assert_eq!(conditions[0]["lastTransitionTime"], "2026-11-23T12:00:00Z");
    assert_eq!(conditions[1]["type"], "example.com/gate");
    rig.api.verbs();
    rig.api.sync();
    rig.upstream.changed(&node());
    rig.settle().await;
    assert!(
        rig.api.verbs().is_empty(),
        "its own write shows in the watch: nothing to do"
    );
}

#[tokio::test(start_paused = true)]
async fn a_field_that_the_server_drops_makes_no_loop() {
    let mut rig = Rig::with_pods(1);
    rig.api.drop_field("observedGeneration");
    rig.report(
        "p0",
        1,
        &json!({"phase": "Running", "observedGeneration": 3}),
        false,
    );
    assert_eq!(rig.acked().await, one("p0", 1));
    for _ in 0..3 {
        rig.api
            .edit("p0", |pod| pod["metadata"]["labels"] = json!({"a": "b"}));
        rig.api.sync();
        rig.upstream.changed(&node());
        rig.settle().await;
    }
    assert_eq!(rig.api.verbs(), ["patch"]);
    rig.report(
        "p0",
        2,
        &json!({"phase": "Succeeded", "observedGeneration": 3}),
        false,
    );
    assert_eq!(rig.acked().await, one("p0", 2));
    assert_eq!(rig.api.pod_status("p0"), phase("Succeeded"));
}

#[tokio::test(start_paused = true)]
async fn what_an_older_server_does_not_know_of_a_container_makes_no_loop() {
    let mut rig = Rig::with_pods(1);
    let newer = ["user", "resources", "allocatedResources", "volumeMounts"];
    rig.api.drop_field("containerStatuses/user");
    rig.api.drop_field("containerStatuses/resources");
    rig.api.drop_field("containerStatuses/allocatedResources");
    rig.api.drop_field("containerStatuses/volumeMounts");
    let report = |phase: &str| {
        json!({"phase": phase, "containerStatuses": [{"name": "m", "ready": true,
            "user": {"linux": {"uid": 0, "gid": 0, "supplementalGroups": [0]}},
            "resources": {"requests": {"cpu": "1"}}, "allocatedResources": {"cpu": "1"},
            "volumeMounts": [{"name": "a", "mountPath": "/a", "readOnly": true,
                "recursiveReadOnly": "Disabled"}]}]})
    };
    rig.report("p0", 1, &report("Pending"), false);
    assert_eq!(rig.acked().await, one("p0", 1));
    for _ in 0..3 {
        rig.api
            .edit("p0", |pod| pod["metadata"]["labels"] = json!({"a": "b"}));
        rig.api.sync();
        rig.upstream.changed(&node());
        rig.settle().await;
    }
    rig.report("p0", 2, &report("Running"), false);
    assert_eq!(rig.acked().await, one("p0", 2));
    assert_eq!(rig.api.verbs(), ["patch", "patch"], "one a report");
    let kept = rig.api.pod_status("p0")["containerStatuses"][0].clone();
    assert_eq!(kept["ready"], true);
    assert!(newer.iter().all(|field| kept.get(field).is_none()));
}

#[tokio::test(start_paused = true)]
async fn a_conflict_is_read_again_and_computed_again() {
    let mut rig = Rig::with_pods(1);
    // The watch lags: somebody else has ended the Pod meanwhile.
    rig.api.edit("p0", |pod| {
        pod["status"] = json!({"phase": "Failed", "reason": "Evicted"})
    });
    rig.report("p0", 1, &phase("Running"), false);
    assert_eq!(rig.acked().await, one("p0", 1));
    assert_eq!(rig.api.verbs(), ["patch", "ask"]);
    assert_eq!(
        rig.api.pod_status("p0")["phase"],
        "Failed",
        "never moved back"
    );
    assert_eq!(rig.upstream.metrics().conflicts, 1);
    let doubts = rig.claim.doubts.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(doubts, 1, "the Lease is worth a look");
}

#[tokio::test(start_paused = true)]
async fn each_error_has_its_way() {
    for (error, least_ms, most_ms) in [
        (WriteError::Forbidden("graph".into()), 100, 250),
        (WriteError::Unavailable("500".into()), 100, 250),
        (
            WriteError::Busy {
                retry_after: Some(Duration::from_secs(9)),
            },
            9_000,
            11_300,
        ),
    ] {
        let mut rig = Rig::with_pods(1);
        rig.api.fail([error.clone()]);
        let began = Instant::now();
        rig.report("p0", 1, &phase("Running"), false);
        assert_eq!(rig.acked().await, one("p0", 1));
        let took = began.elapsed().as_millis();
        assert!((least_ms..=most_ms).contains(&took), "{error}: {took} ms");
        assert_eq!(rig.api.verbs(), ["patch", "patch"], "{error}");
    }
    for error in [WriteError::Missing, WriteError::AnotherObject] {
        let mut rig = Rig::with_pods(1);
        rig.api.fail([error.clone()]);
        rig.report("p0", 1, &phase("Running"), false);
        assert_eq!(rig.acked().await, one("p0", 1), "{error}");
        assert_eq!(rig.api.verbs(), ["patch"], "{error}");
        assert_eq!(rig.session.held(), Digest::default(), "{error}");
    }
    let mut rig = Rig::with_pods(1);
    rig.api.fail([WriteError::Invalid("status.podIPs".into())]);
    rig.report("p0", 1, &phase("Running"), false);
    assert_eq!(rig.acked().await, one("p0", 1), "refused for good");
    rig.upstream.changed(&node());
    rig.settle().await;
    assert_eq!(rig.api.verbs(), ["patch"], "and not sent again");
    rig.report("p0", 2, &phase("Succeeded"), false);
    assert_eq!(rig.acked().await, one("p0", 2), "another report is");
    assert_eq!(rig.api.pod_status("p0"), phase("Succeeded"));
}

#[tokio::test(start_paused = true)]
async fn nothing_is_sent_while_the_claim_is_not_fresh() {
    let mut rig = Rig::with_pods(1);
    rig.api.put_node("n-1", json!({}));
    rig.api.sync();
    rig.claim.set(false);
    rig.report("p0", 1, &phase("Running"), false);
    rig.session
        .node_report(1, status(&json!({"capacity": {"cpu": "1"}})))
        .unwrap();
    rig.silent().await;
    assert!(rig.api.calls().is_empty());
    rig.claim.set(true);
    assert!(!rig.acked().await.is_empty());
    assert_eq!(rig.api.pod_status("p0"), phase("Running"));
}

#[tokio::test(start_paused = true)]
async fn an_api_server_restart_is_survived_and_soon_over() {
    let mut rig = Rig::with_pods(40);
    rig.api
        .down(Some(WriteError::Unavailable("connection refused".into())));
    for i in 0..40 {
        rig.report(&format!("p{i}"), 1, &phase("Running"), false);
    }
    rig.silent().await;
    let tries = rig.api.verbs().len();
    assert!(tries < 40 * 12, "{tries} tries in 20 s");
    rig.api.down(None);
    let began = Instant::now();
    let mut acked = 0;
    while acked < 40 {
        acked += rig.acked().await.len();
    }
    assert!(
        began.elapsed() <= Duration::from_secs(5),
        "{:?}",
        began.elapsed()
    );
    assert!((0..40).all(|i| rig.api.pod_status(&format!("p{i}")) == phase("Running")));
}

fn deleting(rig: &Rig, finalizer: bool) {
    rig.api.edit("p0", |pod| {
        pod["metadata"]["deletionTimestamp"] = "2026-11-23T12:00:00Z".into();
        if finalizer {
            pod["metadata"]["finalizers"] = json!(["example.com/hold"]);
        }
    });
    rig.api.sync();
    rig.upstream.changed(&node());
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_left_nothing_gets_its_last_status_and_is_deleted() {
    let mut rig = Rig::with_pods(1);
    deleting(&rig, false);
    rig.report("p0", 5, &phase("Running"), false);
    assert_eq!(rig.acked().await, one("p0", 5));
    rig.report("p0", 6, &phase("Succeeded"), true);
    assert_eq!(rig.acked().await, one("p0", 6));
    assert_eq!(rig.api.verbs(), ["patch", "patch", "delete"]);
    assert!(!rig.api.has("p0"));
    assert_eq!(rig.session.held(), Digest::default());
}

#[tokio::test(start_paused = true)]
async fn with_a_finalizer_it_is_deleted_once_and_left_alone() {
    let mut rig = Rig::with_pods(1);
    deleting(&rig, true);
    rig.report("p0", 6, &phase("Succeeded"), true);
    assert_eq!(rig.acked().await, one("p0", 6));
    rig.api.sync();
    rig.upstream.changed(&node());
    rig.settle().await;
    assert_eq!(rig.api.verbs(), ["patch", "delete"]);
    assert!(rig.api.has("p0"));
}

#[tokio::test(start_paused = true)]
async fn gone_is_acknowledged_only_when_the_deletion_shows() {
    let mut rig = Rig::with_pods(1);
    rig.report("p0", 6, &phase("Succeeded"), true);
    rig.silent().await;
    assert_eq!(rig.api.verbs(), ["patch"]);
    deleting(&rig, false);
    assert_eq!(rig.acked().await, one("p0", 6));
    assert_eq!(rig.api.verbs(), ["delete"]);
}

#[tokio::test(start_paused = true)]
async fn a_force_deleted_pod_and_its_successor_never_meet() {
    let mut rig = Rig::with_pods(1);
    rig.report("p0", 1, &phase("Running"), false);
    rig.acked().await;
    rig.api.put_pod("p0", "u-second", NODE, phase("Pending"));
    rig.api.sync();
    rig.upstream.changed(&node());
    assert_eq!(rig.acked().await, one("p0", 1), "gone");
    rig.report("p0", 2, &phase("Failed"), true);
    assert_eq!(rig.acked().await, one("p0", 2));
    assert_eq!(rig.api.verbs(), ["patch", "ask", "ask"]);
    assert_eq!(rig.api.pod_status("p0"), phase("Pending"));
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_the_watch_does_not_know_is_asked_for() {
    let mut rig = Rig::new();
    rig.api.put_pod("p0", "u-p0", NODE, phase("Pending"));
    rig.report("p0", 1, &phase("Running"), false);
    assert_eq!(rig.acked().await, one("p0", 1));
    assert_eq!(rig.api.verbs(), ["ask", "patch"]);
    rig.api.remove_pod("p0");
    rig.report("p0", 2, &phase("Failed"), true);
    assert_eq!(rig.acked().await, one("p0", 2));
    assert_eq!(rig.api.verbs(), ["ask"]);
}

#[tokio::test(start_paused = true)]
async fn a_report_of_another_nodes_pod_is_refused() {
    for known in [true, false] {
        let mut rig = Rig::new();
        rig.api.put_pod("p0", "u-p0", "edge-2", phase("Pending"));
        if known {
            rig.api.sync();
        }
        rig.report("p0", 1, &phase("Failed"), true);
        assert_eq!(
            rig.acked().await,
            one("p0", 1),
            "so that it is not sent for ever"
        );
        assert_eq!(rig.api.pod_status("p0"), phase("Pending"));
        assert_eq!(rig.upstream.metrics().refused, 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_reconnect_keeps_the_reports_and_a_takeover_ends_the_old_session() {
    let mut rig = Rig::with_pods(1);
    rig.api.open.send_replace(false);
    rig.report("p0", 3, &phase("Running"), false);
    rig.settle().await;
    let held = rig.session.held();
    let second = rig.upstream.node(node(), rig.claim.clone());
    let first = std::mem::replace(&mut rig.session, second);
    assert_eq!(rig.session.held(), held);
    let late = first.pod_report(&key("p0"), 4, status(&phase("Failed")), false);
    assert_eq!(late, Err(ReportError::Ended));
    let (hash, bytes) = rig.session.report_bytes(&key("p0")).unwrap();
    assert_eq!(*bytes, *status(&phase("Running")));
    assert_eq!(hash, ContentHash::of(&Content::Present(bytes)));
    drop(first);
    assert_eq!(
        rig.session.held(),
        held,
        "the end of the old one changes nothing"
    );
    rig.api.open.send_replace(true);
    assert_eq!(rig.acked().await, one("p0", 3));
    rig.session.forget();
    assert_eq!(rig.session.held(), Digest::default());
}

#[tokio::test(start_paused = true)]
async fn a_session_that_ends_abandons_its_writes_and_its_reports_are_kept_for_a_while() {
    let mut rig = Rig::with_pods(1);
    rig.claim.set(false);
    rig.report("p0", 1, &phase("Running"), false);
    let held = rig.session.held();
    let other = NodeName::parse("edge-9").unwrap();
    // The node's only session goes.
    rig.session = rig.upstream.node(other, FakeClaim::new(false));
    rig.claim.set(true);
    sleep(Duration::from_secs(300)).await;
    assert!(rig.api.calls().is_empty(), "abandoned");
    let again = rig.upstream.node(node(), rig.claim.clone());
    assert_eq!(again.held(), held, "kept");
    drop(again);
    sleep(Duration::from_secs(800)).await;
    let second = rig.upstream.node(node(), rig.claim.clone()).held();
    assert_eq!(second, Digest::default(), "forgotten");
}

#[tokio::test(start_paused = true)]
async fn a_nodes_status_is_written_repaired_and_written_again_for_a_new_node() {
    let mut rig = Rig::new();
    rig.api.put_node(
        "n-1",
        json!({"conditions": [{"type": "NetworkUnavailable", "status": "False"}]}),
    );
    rig.api.sync();
    let report = json!({"capacity": {"cpu": "4"}, "addresses": [{"type": "Hostname", "address": "a"}],
        "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}]});
    rig.session.node_report(1, status(&report)).unwrap();
    assert_eq!(rig.acked().await, one(OWN, 1));
    assert_eq!(rig.api.node_status()["addresses"], report["addresses"]);
    assert_eq!(
        rig.api.node_status()["conditions"][1]["lastHeartbeatTime"],
        "2026-11-23T12:00:00Z"
    );
    assert_eq!(rig.api.verbs(), ["patch-node"]);

    sleep(Duration::from_secs(600)).await;
    rig.session.node_report(2, status(&report)).unwrap();
    assert_eq!(rig.acked().await, one(OWN, 2));
    assert!(rig.api.verbs().is_empty(), "no heartbeats");

    rig.api
        .edit_node(|node| node["status"]["conditions"][1]["status"] = "Unknown".into());
    rig.api.sync();
    rig.upstream.changed(&node());
    rig.settle().await;
    assert_eq!(rig.api.node_status()["conditions"][1]["status"], "True");
    rig.api.verbs();

    rig.api.remove_node();
    rig.api.sync();
    rig.upstream.changed(&node());
    rig.settle().await;
    assert_eq!(rig.api.verbs(), ["ask-node"]);
    rig.api.put_node("n-2", json!({}));
    rig.api.sync();
    rig.upstream.changed(&node());
    rig.settle().await;
    assert_eq!(rig.api.node_status()["capacity"], report["capacity"]);
    assert_eq!(rig.api.verbs(), ["patch-node"]);
}

fn event(sequence: u64, name: &str, message: &str) -> proto::Event {
    proto::Event {
        sequence,
        pod: key(name).to_string(),
        field_path: String::new(),
        warning: false,
        reason: "Pulled".into(),
        message: message.into(),
        count: 1,
        // Each an occurrence of its own: a count with the same beginning is the same one, told again.
        first_ms: 1_700_000_000_000 + sequence as i64,
        last_ms: 1_700_000_000_000 + sequence as i64,
    }
}

#[tokio::test(start_paused = true)]
async fn events_are_written_in_order_counted_and_acknowledged() {
    let rig = Rig::with_pods(1);
    let batch = vec![
        event(1, "p0", "a"),
        event(2, "p0", "b"),
        event(3, "p0", "a"),
    ];
    assert_eq!(rig.session.events(batch).await, 3);
    assert_eq!(rig.api.verbs(), ["event", "event", "count"]);
    let counts: Vec<_> = rig
        .api
        .events()
        .iter()
        .map(|e| e["count"].clone())
        .collect();
    assert!(
        counts.contains(&json!(2)) && counts.contains(&json!(1)),
        "{counts:?}"
    );
    rig.api.forget_events();
    assert_eq!(rig.session.events(vec![event(4, "p0", "a")]).await, 4);
    assert_eq!(
        rig.api.verbs(),
        ["count", "event"],
        "the Event was gone: a new one"
    );
    assert_eq!(rig.session.events(Vec::new()).await, 0);
}

#[tokio::test(start_paused = true)]
async fn an_event_is_dropped_where_nothing_can_come_of_it() {
    for (error, verbs) in [
        (WriteError::NamespaceEnding, 1),
        (WriteError::Missing, 1),
        (WriteError::Invalid("reason".into()), 1),
    ] {
        let rig = Rig::with_pods(1);
        rig.api.fail([error.clone()]);
        assert_eq!(
            rig.session.events(vec![event(1, "p0", "a")]).await,
            1,
            "{error}"
        );
        assert_eq!(rig.api.verbs().len(), verbs, "{error}");
        assert_eq!(rig.upstream.metrics().events_dropped, 1, "{error}");
    }
    let rig = Rig::with_pods(1);
    rig.api.down(Some(WriteError::Forbidden("role".into())));
    assert_eq!(rig.session.events(vec![event(1, "p0", "a")]).await, 1);
    assert_eq!(rig.api.verbs().len(), 6);
    assert_eq!(
        rig.session.events(vec![event(2, "other", "a")]).await,
        2,
        "no Pod of the node"
    );
    assert!(rig.api.verbs().is_empty());
}

#[tokio::test(start_paused = true)]
async fn events_wait_for_the_api_server_and_end_with_the_session() {
    let mut rig = Rig::with_pods(1);
    rig.api.down(Some(WriteError::Unavailable("down".into())));
    let written = tokio::spawn(rig.session.events(vec![event(1, "p0", "a")]));
    sleep(Duration::from_secs(600)).await;
    assert!(!written.is_finished());
    rig.api.down(None);
    assert_eq!(written.await.unwrap(), 1);
    rig.api.down(Some(WriteError::Unavailable("down".into())));
    let written = tokio::spawn(rig.session.events(vec![event(2, "p0", "b")]));
    sleep(Duration::from_secs(60)).await;
    rig.session = rig.upstream.node(node(), rig.claim.clone());
    assert_eq!(written.await.unwrap(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_token_comes_as_a_duration_and_only_while_the_claim_is_fresh() {
    let rig = Rig::with_pods(1);
    let ask = |account: &str| proto::TokenAsk {
        pod: key("p0").to_string(),
        service_account: account.into(),
        audience: String::new(),
        expiration_seconds: 3607,
    };
    let Body::Token(given) = rig.session.token(ask("web")).await else {
        panic!("refused")
    };
    assert_eq!(
        (given.token.as_str(), given.lifetime_seconds),
        ("the-secret", 3607)
    );
    let Body::Failure(failure) = rig.session.token(ask("admin")).await else {
        panic!("given")
    };
    assert!(
        !failure.retry && failure.message.contains("admin"),
        "{failure:?}"
    );
    rig.api
        .fail([WriteError::Forbidden("the graph lags".into())]);
    let Body::Failure(failure) = rig.session.token(ask("web")).await else {
        panic!("given")
    };
    assert!(failure.retry);
    rig.claim.set(false);
    let Body::Failure(failure) = rig.session.token(ask("web")).await else {
        panic!("given")
    };
    assert!(failure.retry);
    assert_eq!(
        rig.api.verbs(),
        ["token", "token"],
        "no call for what is refused here"
    );
}
