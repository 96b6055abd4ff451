//! The whole downstream side against a scripted API server in memory: no socket, real time, levels
//! waited for with a deadline.

mod server;

use std::sync::Arc;
use std::time::Duration;

use common::object::{Content, ContentHash};
use serde_json::{Value, json};

use self::server::Server;
use super::*;

struct Running {
    handle: Downstream,
    edges: watch::Sender<Arc<BTreeSet<NodeName>>>,
    malformed: mpsc::Receiver<Malformed>,
    stop: CancellationToken,
    ended: tokio::task::JoinHandle<Result<(), Error>>,
}

impl Running {
    fn start(server: Server, edges: &[&str]) -> Self {
        let (edges, edge_nodes) = watch::channel(names(edges));
        let (reports, malformed) = mpsc::channel(4);
        let (handle, task) = build(Config::default(), server.clone(), edge_nodes, reports);
        let stop = CancellationToken::new();
        Self {
            handle,
            edges,
            malformed,
            ended: tokio::spawn(task.run(stop.clone())),
            stop,
        }
    }

    /// The node's set, once it is complete and as wished.
    async fn wait(&self, on: &str, wish: impl Fn(&NodeSnapshot) -> bool) -> NodeSnapshot {
        let mut feed = self.handle.feed(&node(on));
        let wished = async {
            loop {
                let snapshot = feed.snapshot();
                if snapshot.complete && wish(&snapshot) {
                    return snapshot;
                }
                feed.changed().await;
            }
        };
        let found = tokio::time::timeout(Duration::from_secs(20), wished).await;
        found.unwrap_or_else(|_| panic!("{:?}", self.handle.feed(&node(on)).snapshot()))
    }

    async fn stop(self) {
        self.stop.cancel();
        self.ended.await.unwrap().unwrap();
    }
}

fn node(name: &str) -> NodeName {
    NodeName::parse(name).unwrap()
}

fn names(names: &[&str]) -> Arc<BTreeSet<NodeName>> {
    Arc::new(names.iter().map(|n| node(n)).collect())
}

fn pod(uid: &str, on: &str, secrets: &[&str]) -> Value {
    let volumes: Vec<Value> = secrets
        .iter()
        .map(|s| json!({"name": s, "secret": {"secretName": s}}))
        .collect();
    json!({
        "metadata": {"name": format!("p-{uid}"), "namespace": "ns", "uid": uid},
        "spec": {"nodeName": on, "volumes": volumes}, "status": {"phase": "Pending"},
    })
}

fn secret(name: &str, data: &str) -> Value {
    json!({"metadata": {"name": name, "namespace": "ns"}, "type": "Opaque", "data": {"k": data}})
}

fn pod_key(uid: &str) -> ObjectKey {
    ObjectKey::pod("ns", &format!("p-{uid}"), uid)
}

fn secret_key(name: &str) -> ObjectKey {
    ObjectKey::named(Kind::Secret, "ns", name)
}

fn has_pod(uid: &str) -> impl Fn(&NodeSnapshot) -> bool {
    let key = pod_key(uid);
    move |snapshot| snapshot.objects.contains_key(&key)
}

fn has_secret(name: &str, data: &str) -> impl Fn(&NodeSnapshot) -> bool {
    let (key, data) = (secret_key(name), format!(r#""k":"{data}""#));
    move |snapshot| {
        snapshot
            .objects
            .get(&key)
            .is_some_and(|v| match &v.object.content {
                Content::Present(bytes) => String::from_utf8_lossy(bytes).contains(&data),
                Content::Absent => false,
            })
    }
}

#[tokio::test]
async fn a_pod_comes_down_with_what_it_names_once_the_authorizer_knows() {
    let server = Server::new();
    server.put("secrets", secret("s", "MQ=="));
    server.put("secrets", secret("unnamed", "Mg=="));
    server.forbid("a", "s", 3);
    let running = Running::start(server.clone(), &["a"]);
    running.wait("a", |_| true).await;
    server.put("pods", pod("u", "a", &["s", "missing"]));
    let snapshot = running.wait("a", has_pod("u")).await;
    assert!(has_secret("s", "MQ==")(&snapshot));
    assert_eq!(
        snapshot.objects[&secret_key("missing")].object.content,
        Content::Absent
    );
    assert!(running.handle.metrics().refused.get() >= 3);

    let log = server.log();
    let secrets: Vec<&String> = log.iter().filter(|l| l.contains("secrets")).collect();
    assert!(
        secrets.iter().all(|l| l.starts_with("a ")),
        "only as the node: {secrets:?}"
    );
    assert!(
        secrets
            .iter()
            .all(|l| l.contains("/ns") && l.contains("metadata.name="))
    );
    assert!(
        !secrets.iter().any(|l| l.contains("unnamed")),
        "nothing else is read"
    );
    running.stop().await;
}

#[tokio::test]
async fn a_shared_secret_is_watched_once_and_its_change_reaches_every_node() {
    let server = Server::new();
    server.put("secrets", secret("s", "MQ=="));
    server.put("pods", pod("u", "a", &["s"]));
    server.put("pods", pod("v", "b", &["s"]));
    let running = Running::start(server.clone(), &["a", "b"]);
    let old = running.wait("a", has_pod("u")).await.objects[&secret_key("s")]
        .object
        .hash;
    running.wait("b", has_pod("v")).await;
    server.wait_for_watches("secrets", 1).await;

    server.put("secrets", secret("s", "Mg=="));
    let on_a = running.wait("a", has_secret("s", "Mg==")).await;
    let on_b = running.wait("b", has_secret("s", "Mg==")).await;
    let (on_a, on_b) = (
        &on_a.objects[&secret_key("s")],
        &on_b.objects[&secret_key("s")],
    );
    assert!(Arc::ptr_eq(on_a, on_b));
    let delta = |base: Option<ContentHash>| on_a.encoded_from(base, |_, bytes| bytes.into());
    assert!(delta(Some(old)).is_some(), "the version before is a base");

    // The watch leaves the node that no longer names the Secret, and goes on delivering.
    let carrier = server.watchers("secrets").remove(0);
    let (gone, stays) = if carrier == "a" {
        ("u", "b")
    } else {
        ("v", "a")
    };
    server.delete("pods", &format!("p-{gone}"));
    server
        .wait_until("the watch moved", |s| s.watchers("secrets") == [stays])
        .await;
    server.put("secrets", secret("s", "Mw=="));
    running.wait(stays, has_secret("s", "Mw==")).await;
    server.delete("pods", if gone == "u" { "p-v" } else { "p-u" });
    server
        .wait_until("the watch ended", |s| s.watchers("secrets").is_empty())
        .await;
    running.stop().await;
}

#[tokio::test]
async fn a_server_that_fails_restarts_and_forgets_loses_nothing() {
    let server = Server::new();
    server.fail("pods", &[500, 429, 503]);
    server.fail("services", &[500]);
    server.put("pods", pod("u", "a", &["s"]));
    server.put("secrets", secret("s", "MQ=="));
    let running = Running::start(server.clone(), &["a"]);
    running.wait("a", has_pod("u")).await;
    running.handle.listed().await;
    server.wait_for_watches("secrets", 1).await;

    server.hang_up();
    server.fail("pods", &[500]);
    server.put("pods", pod("v", "a", &[]));
    server.put("secrets", secret("s", "Mg=="));
    running
        .wait("a", |s| has_pod("v")(s) && has_secret("s", "Mg==")(s))
        .await;

    server.wait_for_watches("secrets", 1).await;
    server.hang_up();
    server.put("pods", pod("w", "a", &[]));
    server.delete("pods", "p-v");
    server.put("secrets", secret("s", "Mw=="));
    server.compact();
    let wish = |s: &NodeSnapshot| has_pod("w")(s) && !has_pod("v")(s) && has_secret("s", "Mw==")(s);
    running.wait("a", wish).await;
    running.stop().await;
}

#[tokio::test]
async fn a_node_that_becomes_an_edge_s_gets_the_pods_it_has() {
    let server = Server::new();
    server.put("pods", pod("u", "a", &[]));
    server.put("pods", pod("v", "b", &[]));
    let running = Running::start(server.clone(), &["a"]);
    running.wait("a", has_pod("u")).await;
    assert!(!running.handle.feed(&node("b")).snapshot().complete);
    assert!(
        running.handle.pod("v").is_none(),
        "nothing of other nodes is kept"
    );
    let on_a = running.handle.feed(&node("a"));
    running.edges.send_replace(names(&["b"]));
    let snapshot = running.wait("b", has_pod("v")).await;
    assert!(!has_pod("u")(&snapshot));
    // Nobody removed the Pod of the node that left: whoever still follows it must not think so.
    assert!(has_pod("u")(&on_a.snapshot()) && !on_a.snapshot().complete);
    assert!(running.handle.pod("u").is_none());

    server.delete("pods", "p-u");
    running.edges.send_replace(names(&["a", "b"]));
    running.wait("a", |s| !has_pod("u")(s)).await;
    running.stop().await;
}

#[tokio::test]
async fn a_consistent_list_sees_what_a_deaf_watch_missed() {
    let server = Server::new();
    server.put("pods", pod("u", "a", &["s"]));
    server.put("secrets", secret("s", "MQ=="));
    let running = Running::start(server.clone(), &["a"]);
    running.wait("a", has_pod("u")).await;
    server.wait_for_watches("secrets", 1).await;
    server.deafen();
    server.put("pods", pod("v", "a", &[]));
    server.put("secrets", secret("s", "Mg=="));
    let at = server.revision();
    let before = running.handle.feed(&node("a")).snapshot().marks;
    assert!(
        before[&Kind::Secret] < at && before[&Kind::Pod] < at,
        "it does not claim to know"
    );

    let on_a = node("a");
    let both = tokio::join!(
        running.handle.consistent(&on_a),
        running.handle.consistent(&on_a)
    );
    let marks = both.0.unwrap();
    for kind in [
        Kind::Pod,
        Kind::Node,
        Kind::Services,
        Kind::Secret,
        Kind::ConfigMap,
    ] {
        assert!(marks[&kind] >= at, "{kind:?}");
    }
    assert!(both.1.is_ok());
    let snapshot = running.handle.feed(&node("a")).snapshot();
    assert!(snapshot.complete && has_pod("v")(&snapshot) && has_secret("s", "Mg==")(&snapshot));
    let log = server.log();
    let of_all = log
        .iter()
        .filter(|l| l.contains("list pods") && l.contains("nodeName!= 500"));
    assert_eq!(
        of_all.count(),
        1,
        "the cluster's Pods are not listed again for one node"
    );
    running.stop().await;
}

#[tokio::test]
async fn a_restored_cluster_is_noticed_and_taken_over() {
    let server = Server::new();
    server.put("secrets", secret("s", "MQ=="));
    server.put("pods", pod("u", "a", &["s"]));
    let backup = server.backup();
    (0..20).for_each(|_| server.put("secrets", secret("s", "Mg==")));
    server.put("pods", pod("v", "a", &["s"]));
    let running = Running::start(server.clone(), &["a"]);
    running
        .wait("a", |s| has_pod("v")(s) && has_secret("s", "Mg==")(s))
        .await;
    server.wait_for_watches("secrets", 1).await;

    server.restore(backup);
    let wish = |s: &NodeSnapshot| !has_pod("v")(s) && has_secret("s", "MQ==")(s);
    let snapshot = running.wait("a", wish).await;
    assert!(has_pod("u")(&snapshot));
    assert_eq!(running.handle.metrics().rewinds.get(), 1);
    server.wait_for_watches("secrets", 1).await;
    server.put("secrets", secret("s", "Mw=="));
    running.wait("a", has_secret("s", "Mw==")).await;
    running.stop().await;
}

#[tokio::test]
async fn a_long_list_comes_in_pages() {
    let server = Server::new();
    (0..1201).for_each(|n| server.put("pods", pod(&format!("u{n}"), "a", &[])));
    let running = Running::start(server.clone(), &["a"]);
    let snapshot = running.wait("a", |_| true).await;
    let pods = snapshot
        .objects
        .keys()
        .filter(|k| k.kind == Kind::Pod)
        .count();
    assert_eq!(pods, 1201);
    let pages = server
        .log()
        .into_iter()
        .filter(|l| l.contains("list pods") && l.contains("500"));
    assert_eq!(pages.count(), 3);
    running.stop().await;
}

#[tokio::test]
async fn the_live_status_is_there_for_who_writes_it_and_wakes_no_session() {
    let server = Server::new();
    server.put("pods", pod("u", "a", &[]));
    let running = Running::start(server.clone(), &["a"]);
    running.wait("a", has_pod("u")).await;
    let mut views = running.handle.pod_views(&node("a"));
    let feed = running.handle.feed(&node("a"));
    let before = feed.snapshot();

    let mut ready = pod("u", "a", &[]);
    ready["status"] =
        json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]});
    server.put("pods", ready.clone());
    tokio::time::timeout(Duration::from_secs(20), views.changed())
        .await
        .unwrap();
    let view = views.snapshot()["u"].clone();
    assert_eq!(view.status(), ready["status"]);
    assert_eq!(running.handle.pod("u"), Some(view));
    assert!(Arc::ptr_eq(&before.objects, &feed.snapshot().objects));

    let named = |name: &str| {
        json!({"metadata": {"name": name, "uid": "n"}, "spec": {},
               "status": {"conditions": [{"type": "Ready", "status": "True"}]}})
    };
    server.put("nodes", named("b"));
    server.put("nodes", named("a"));
    tokio::time::timeout(Duration::from_secs(20), views.changed())
        .await
        .unwrap();
    let live = running.handle.node(&node("a")).unwrap();
    let status: Value = serde_json::from_slice(&live.status).unwrap();
    assert_eq!(status, named("a")["status"]);
    assert!(running.handle.node(&node("b")).is_none());
    running.edges.send_replace(names(&["a", "b"]));
    let mut on_b = running.handle.pod_views(&node("b"));
    while running.handle.node(&node("b")).is_none() {
        tokio::time::timeout(Duration::from_secs(20), on_b.changed())
            .await
            .unwrap();
    }

    server.delete("pods", "p-u");
    tokio::time::timeout(Duration::from_secs(20), views.changed())
        .await
        .unwrap();
    assert!(views.snapshot().is_empty() && running.handle.pod("u").is_none());
    running.stop().await;
}

#[tokio::test]
async fn a_malformed_object_is_reported_and_the_loop_goes_on() {
    let server = Server::new();
    let mut running = Running::start(server.clone(), &["a"]);
    running.wait("a", |_| true).await;
    let mut odd = pod("odd", "a", &[]);
    odd["metadata"]["uid"] = json!("not/a/uid");
    server.put("pods", odd);
    server.say("pods", "this is no JSON\n");
    server.put("pods", pod("u", "a", &[]));
    running.wait("a", has_pod("u")).await;
    let report = running.malformed.recv().await.unwrap();
    assert_eq!(
        (report.name.as_str(), report.namespace.as_str()),
        ("p-odd", "ns")
    );

    // A Secret that cannot be understood is unknown: it stays what it was, and is asked for again.
    server.put("secrets", secret("odd", "MQ=="));
    server.put("pods", pod("w", "a", &["odd"]));
    running.wait("a", has_secret("odd", "MQ==")).await;
    server.wait_for_watches("secrets", 1).await;
    let before = running.handle.metrics().faults.get();
    let unversioned = json!({"type": "MODIFIED", "object": {"kind": "Secret", "data": {}}});
    server.say("secrets", &format!("{unversioned}\n"));
    let faults = || running.handle.metrics().faults.get();
    server.wait_until("a fault", |_| faults() > before).await;
    let snapshot = running.handle.feed(&node("a")).snapshot();
    assert!(has_secret("odd", "MQ==")(&snapshot));
    server.put("secrets", secret("odd", "Mg=="));
    running.wait("a", has_secret("odd", "Mg==")).await;

    server.forbid("a", "s", u32::MAX);
    server.put("pods", pod("v", "a", &["s"]));
    let report = running.malformed.recv().await.unwrap();
    assert_eq!(
        (report.uid.as_str(), report.reason),
        ("v", "ReferenceRefused")
    );
    let snapshot = running.handle.feed(&node("a")).snapshot();
    assert!(!snapshot.complete && has_pod("u")(&snapshot) && !has_pod("v")(&snapshot));
    let removable = |key: &ObjectKey| snapshot.may_remove(key);
    assert!(removable(&pod_key("gone")) && removable(&secret_key("gone")));
    assert!(!removable(&pod_key("u")), "the node has it");
    assert!(
        !removable(&pod_key("v")) && !removable(&secret_key("s")),
        "held back"
    );
    let nothing_known = running.handle.feed(&node("b")).snapshot();
    assert!(!nothing_known.may_remove(&pod_key("gone")));
    running.stop().await;
}
