//! CloudCore's API side against a real API server on which `cloudcore install` has run.
//!
//! Ignored unless asked for, since it needs one: `CLOUDCORE_TEST_KUBECONFIG` names its kubeconfig.
//! A controller manager should run too; no `cloudcore` may.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test stops at the first surprise and says how long things took"
)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use cloudcore::enroll::authority::Authority;
use cloudcore::enroll::cache::{Enrolments, NotAllowed};
use cloudcore::enroll::link::ensure_link;
use cloudcore::enroll::tokens::{TokenWish, Tokens};
use cloudcore::enroll::{EnrollConfig, Enroller};
use cloudcore::kube::epoch::{begin_epoch, read_epoch};
use cloudcore::kube::{Access, Impersonation, KubeClients, Mode, status_code};
use cloudcore::nodes::claim::Claims;
use cloudcore::nodes::keeper;
use cloudcore::nodes::tolerations::{BoundPod, Tolerations};
use common::hub::proto::{JoinRequest, RefusalCode};
use common::ids::NodeName;
use common::pki::token::TokenSecret;
use common::pki::{NodeIdentity, NodeKey};
use futures::StreamExt;
use futures::future::join_all;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod, Secret};
use kube::api::{
    DeleteParams, ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams,
};
use kube::{Api, Client};
use serde_json::json;
use tokio_util::sync::CancellationToken;

const DAY: Duration = Duration::from_secs(86_400);

async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let started = tokio::time::Instant::now();
    loop {
        if let Some(found) = look().await {
            println!("{what}: {} ms", started.elapsed().as_millis());
            return found;
        }
        assert!(
            started.elapsed() < Duration::from_secs(30),
            "{what} never came"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn pod(name: &str, node: &NodeName, secret: &str) -> Pod {
    serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"nodeName": node, "containers": [{"name": "c", "image": "x",
            "envFrom": [{"secretRef": {"name": secret}}]}]},
    }))
    .unwrap()
}

async fn join(
    enroller: &Enroller,
    tokens: &Tokens,
    name: &NodeName,
    key: &NodeKey,
) -> NodeIdentity {
    let secret = TokenSecret::generate().unwrap();
    let wish = TokenWish {
        ttl: DAY,
        uses: 1,
        node: None,
        labels: BTreeMap::from([("topology.kubernetes.io/zone".into(), "berlin".into())]),
        taints: Vec::new(),
    };
    let token = tokens
        .create(wish, &secret, jiff::Timestamp::now())
        .await
        .unwrap();
    let request = JoinRequest {
        version: 1,
        token_id: token.id,
        token_secret: secret.bytes().to_vec(),
        node_name: name.to_string(),
        csr: key.request().unwrap(),
        agent_version: "test".into(),
        os: "linux".into(),
        arch: "x86_64".into(),
        expired_certificate: Vec::new(),
    };
    let peer = "192.0.2.1:1".parse().unwrap();
    let joined = enroller.join(&request, peer).await.unwrap();
    let again = enroller.join(&request, peer).await.unwrap();
    assert_eq!(joined.node_name, again.node_name);
    let other = JoinRequest {
        csr: NodeKey::generate().unwrap().request().unwrap(),
        ..request
    };
    assert_eq!(
        enroller.join(&other, peer).await.unwrap_err().code(),
        RefusalCode::RefusalTokenUsed
    );
    NodeIdentity::from_certificate(&joined.chain[0]).unwrap()
}

async fn code_of<T>(answer: impl Future<Output = Result<T, kube::Error>>) -> u16 {
    match answer.await {
        Ok(_) => 200,
        Err(e) => status_code(&e).unwrap_or(0),
    }
}

/// What the API server itself refuses when CloudCore acts as a node.
async fn check_fences(clients: &KubeClients, admin: &Client, a: &NodeName, b: &NodeName) {
    let secrets = |client: Client| Api::<Secret>::namespaced(client, "default");
    for name in ["of-a", "of-nobody"] {
        let secret: Secret = serde_json::from_value(json!({"metadata": {"name": name}})).unwrap();
        let _ = secrets(admin.clone())
            .create(&PostParams::default(), &secret)
            .await;
    }
    let pods: Api<Pod> = Api::namespaced(admin.clone(), "default");
    pods.create(&PostParams::default(), &pod("on-a", a, "of-a"))
        .await
        .unwrap();
    let own = secrets(clients.own());
    let constrained = *clients.mode().borrow() == Mode::Constrained;
    let reads = |client: Client, name: &'static str| async move {
        code_of(secrets(client).get(name)).await
    };
    eventually("the node reads its Pod's Secret", async || {
        (reads(clients.as_node(a), "of-a").await == 200).then_some(())
    })
    .await;
    if constrained {
        assert_eq!(
            code_of(own.get("of-a")).await,
            403,
            "CloudCore itself reads no Secret"
        );
        assert_eq!(code_of(own.list(&ListParams::default())).await, 403);
        assert_eq!(reads(clients.as_node(b), "of-a").await, 403);
        assert_eq!(reads(clients.as_node(a), "of-nobody").await, 403);
        let other: Api<Node> = Api::all(clients.as_node(b));
        let patch = Patch::Merge(json!({"metadata": {"labels": {"x": "y"}}}));
        assert_eq!(
            code_of(other.patch(a.as_str(), &PatchParams::default(), &patch)).await,
            403
        );
        let all: Api<Pod> = Api::all(clients.as_node_watch(a));
        assert_eq!(
            code_of(all.list(&ListParams::default())).await,
            403,
            "not without the selector"
        );
    }
    let mine = ListParams::default().fields(&format!("spec.nodeName={a}"));
    let listed = Api::<Pod>::all(clients.as_node_watch(a))
        .list(&mine)
        .await
        .unwrap();
    assert_eq!(listed.items.len(), 1);
    let status =
        Patch::Strategic(json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}}));
    let node: Api<Node> = Api::all(clients.as_node(a));
    node.patch_status(a.as_str(), &PatchParams::default(), &status)
        .await
        .unwrap();
}

async fn check_tolerations(clients: &KubeClients, admin: &Client, stop: &CancellationToken) {
    let (handle, task) = Tolerations::build(clients.own());
    tokio::spawn(task.run(stop.clone()));
    let pods: Api<Pod> = Api::namespaced(admin.clone(), "default");
    eventually("the default tolerations have no end", async || {
        let pod = pods.get("on-a").await.unwrap();
        handle.observe(&BoundPod::read(&pod).unwrap());
        let tolerations = pod.spec.unwrap().tolerations.unwrap();
        assert!(tolerations.len() >= 2);
        tolerations
            .iter()
            .all(|t| t.toleration_seconds.is_none())
            .then_some(())
    })
    .await;
    pods.delete("on-a", &DeleteParams::default().grace_period(0))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a real API server with CloudCore's roles: CLOUDCORE_TEST_KUBECONFIG"]
async fn a_device_on_a_real_api_server_from_join_to_revocation() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let kubeconfig = std::env::var("CLOUDCORE_TEST_KUBECONFIG").expect("the variable names a file");
    let access = Access::find(Some(kubeconfig.as_ref())).await.unwrap();
    let admin = access.user().unwrap();
    let (clients, kube_task) = KubeClients::build(&access, Impersonation::Auto)
        .await
        .unwrap();
    println!("mode {:?}", *clients.mode().borrow());
    let stop = CancellationToken::new();
    tokio::spawn(kube_task.run(stop.clone()));
    let epoch = read_epoch(&clients.own()).await.unwrap();
    assert_ne!(begin_epoch(&clients.own(), &epoch).await.unwrap(), epoch);

    let authority = Arc::new(Authority::ensure(&clients.own()).await.unwrap());
    let cluster = authority.cluster.clone();
    let at = ["127.0.0.1:1".parse().unwrap()];
    let link = ensure_link(&clients.own(), &authority, &at).await.unwrap();
    let config = EnrollConfig {
        certificate_lifetime: DAY,
        grace: DAY,
        taint_nodes: false,
    };
    let enroller = Enroller::build(clients.own(), authority, link, config);
    let (enrolments, task) = Enrolments::build(clients.own(), clients.own_watch(), cluster.clone());
    tokio::spawn(task.run(stop.clone()));
    let (claims, task) = Claims::build(clients.own(), "test".into());
    tokio::spawn(task.run(stop.clone()));
    let (_, task) = keeper::build(
        clients.own(),
        clients.own_watch(),
        enrolments.clone(),
        cluster,
        claims.clone(),
    );
    tokio::spawn(task.run(stop.clone()));

    let run: u32 = rand::random();
    let (a, b) = (format!("a-{run:x}"), format!("b-{run:x}"));
    let (a, b) = (NodeName::parse(&a).unwrap(), NodeName::parse(&b).unwrap());
    let key = NodeKey::generate().unwrap();
    let tokens = Tokens::build(&admin);
    let identity = join(&enroller, &tokens, &a, &key).await;
    join(&enroller, &tokens, &b, &NodeKey::generate().unwrap()).await;
    enrolments.allowed(&identity).await.unwrap();
    check_fences(&clients, &admin, &a, &b).await;
    check_tolerations(&clients, &admin, &stop).await;

    let claim = claims.claim(&a).await.unwrap();
    let leases: Api<Lease> = Api::namespaced(admin.clone(), "kube-node-lease");
    let nodes: Api<Node> = Api::all(admin.clone());
    let first = nodes.get(a.as_str()).await.unwrap().metadata.uid;
    let note = Patch::Merge(
        json!({"metadata": {"labels": {"people": "wrote"}}, "spec": {"unschedulable": true}}),
    );
    nodes
        .patch(a.as_str(), &PatchParams::default(), &note)
        .await
        .unwrap();
    nodes
        .delete(a.as_str(), &DeleteParams::default())
        .await
        .unwrap();
    let again = eventually("the deleted Node is back", async || {
        let node = nodes.get_opt(a.as_str()).await.unwrap()?;
        (node.metadata.uid != first).then_some(node)
    })
    .await;
    assert_eq!(again.metadata.labels.unwrap()["people"], "wrote");
    assert_eq!(again.spec.unwrap().unschedulable, Some(true));
    eventually("the Lease follows the Node", async || {
        // The garbage collector may be quicker than the renewal: the Lease is made again then.
        let lease = leases.get_opt(a.as_str()).await.unwrap()?;
        let owner = lease.metadata.owner_references.unwrap()[0].uid.clone();
        (Some(owner) == again.metadata.uid).then_some(())
    })
    .await;
    assert!(claim.fresh() && !claim.lost().is_cancelled());
    let next = claims.claim(&a).await.unwrap();
    assert_eq!(next.epoch(), claim.epoch() + 1);
    assert!(claim.lost().is_cancelled());

    let mut revoked = enrolments.revocations();
    for node in [&a, &b] {
        enroller.revoke(node).await.unwrap();
    }
    assert_eq!(revoked.recv().await.unwrap(), a);
    assert!(matches!(
        enrolments.allowed(&identity).await,
        Err(NotAllowed::Revoked(_))
    ));
    eventually("the revoked Nodes are gone", async || {
        let gone = nodes.get_opt(a.as_str()).await.unwrap().is_none();
        (gone && nodes.get_opt(b.as_str()).await.unwrap().is_none()).then_some(())
    })
    .await;
    let maps: Api<ConfigMap> = Api::namespaced(clients.own(), "kube-system");
    println!(
        "own ConfigMap read elsewhere: {}",
        code_of(maps.list(&ListParams::default())).await
    );
    stop.cancel();
}

/// Streams of this process to the API server, over how many connections.
fn connections(port: u16) -> usize {
    let open = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
    let mine: Vec<_> = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok())
        .filter_map(|to| {
            Some(
                to.to_str()?
                    .strip_prefix("socket:[")?
                    .strip_suffix(']')?
                    .to_string(),
            )
        })
        .collect();
    let to = format!(":{port:04X}");
    let fields = |line: &str| {
        line.split_whitespace()
            .map(str::to_string)
            .collect::<Vec<_>>()
    };
    let lines = open.lines().skip(1).map(fields);
    lines
        .filter(|f| f[2].ends_with(&to) && f[3] == "01" && mine.contains(&f[9]))
        .count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a real API server with CloudCore's roles: CLOUDCORE_TEST_KUBECONFIG"]
async fn three_hundred_watches_take_four_connections_and_all_are_served() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let kubeconfig = std::env::var("CLOUDCORE_TEST_KUBECONFIG").expect("the variable names a file");
    let access = Access::find(Some(kubeconfig.as_ref())).await.unwrap();
    let port = access.server().port_u16().unwrap();
    let (clients, _task) = KubeClients::build(&access, Impersonation::Auto)
        .await
        .unwrap();
    let before = connections(port);
    let nodes: Api<Node> = Api::all(clients.own_watch());
    let params = WatchParams::default().timeout(60);
    let watches = (0..300).map(|_| async { nodes.watch(&params, "0").await.unwrap().boxed() });
    let mut watches = join_all(watches).await;
    println!(
        "connections for 300 watches: {}",
        connections(port) - before
    );
    assert_eq!(connections(port) - before, 4);
    let name = format!("w-{:x}", rand::random::<u32>());
    let own: Api<Node> = Api::all(clients.own());
    let node: Node = serde_json::from_value(json!({"metadata": {"name": name}})).unwrap();
    own.create(&PostParams::default(), &node).await.unwrap();
    let seen = watches.iter_mut().map(async |watch| {
        while let Some(event) = watch.next().await {
            if let WatchEvent::Added(node) = event.unwrap()
                && node.metadata.name.as_deref() == Some(name.as_str())
            {
                return true;
            }
        }
        false
    });
    let seen = tokio::time::timeout(Duration::from_secs(20), join_all(seen))
        .await
        .unwrap();
    assert!(seen.into_iter().all(|seen| seen));
    own.delete(&name, &DeleteParams::default()).await.unwrap();
}
