use std::collections::VecDeque;
use std::sync::Mutex;

use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;

#[test]
fn an_error_is_told_in_the_api_servers_own_words() {
    let status = kube::core::Status::failure("no such thing", "NotFound").with_code(404);
    let error = KubeError::api("reading Node a")(kube::Error::Api(Box::new(status)));
    assert_eq!(
        crate::chain(&error),
        "reading Node a failed: the API server answered 404: no such thing"
    );
}

#[test]
fn a_watch_that_breaks_again_waits_longer_and_one_that_holds_starts_afresh() {
    use kube::runtime::utils::Backoff;
    let mut waits = WatchBackoff::default();
    let all: Vec<_> = waits.by_ref().take(8).map(|w| w.as_millis()).collect();
    assert!(
        all[0] <= 500 && all[1] > all[0] && all[7] >= 3500,
        "{all:?}"
    );
    assert!(all.iter().all(|w| *w <= 5000), "{all:?}");
    waits.reset();
    assert!(
        waits
            .next()
            .is_some_and(|w| w <= Duration::from_millis(500))
    );
}

/// An API server that answers each path from a script and keeps the heads of what it was asked.
/// The last answer of a script stays; code 0 hangs up instead of answering.
#[derive(Clone, Default)]
struct Scripted {
    heads: Arc<Mutex<Vec<String>>>,
    proofs: Arc<Mutex<VecDeque<(u16, Value)>>>,
    roles: Arc<Mutex<VecDeque<(u16, Value)>>>,
    secrets: Arc<Mutex<VecDeque<u16>>>,
}

impl Scripted {
    async fn start(&self) -> Access {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let this = self.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(this.clone().serve(stream));
            }
        });
        let dir = tempfile::tempdir().unwrap();
        let file = json!({"apiVersion": "v1", "kind": "Config", "current-context": "x",
            "clusters": [{"name": "c", "cluster": {"server": format!("http://127.0.0.1:{port}")}}],
            "users": [{"name": "u", "user": {"token": "the-operators-own"}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}]});
        let path = dir.path().join("k");
        std::fs::write(&path, file.to_string()).unwrap();
        Access::find(Some(&path)).await.unwrap()
    }

    async fn serve(self, mut stream: TcpStream) {
        let mut read = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            while let Some(end) = read.windows(4).position(|w| w == b"\r\n\r\n") {
                let head = String::from_utf8_lossy(&read[..end]).to_lowercase();
                let length = head
                    .lines()
                    .find_map(|l| l.strip_prefix("content-length: "));
                let whole = end + 4 + length.map_or(0, |l| l.parse().unwrap());
                if read.len() < whole {
                    break;
                }
                read.drain(..whole);
                let (code, body) = self.answer(&head);
                self.heads.lock().unwrap().push(head);
                if code == 0 {
                    return;
                }
                let body = body.to_string();
                let answer = format!(
                    "HTTP/1.1 {code} x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
                    body.len()
                );
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
            match stream.read(&mut buffer).await {
                Ok(n) if n > 0 => read.extend_from_slice(&buffer[..n]),
                _ => return,
            }
        }
    }

    fn answer(&self, head: &str) -> (u16, Value) {
        let path = head.split_whitespace().nth(1).unwrap();
        if path.contains("/serviceaccounts/cloudcore/token") {
            let n = self.asked("/serviceaccounts/cloudcore/token").len();
            let status = json!({"token": format!("account-{n}"), "expirationTimestamp": "2999-01-01T00:00:00Z"});
            return (201, json!({"spec": {"audiences": []}, "status": status}));
        }
        if path.contains("selfsubjectaccessreviews") {
            return next(&self.roles).unwrap_or_else(|| role(true));
        }
        if path.contains("selfsubjectreviews") {
            return next(&self.proofs).unwrap();
        }
        match self.secrets.lock().unwrap().pop_front().unwrap_or(200) {
            200 => (200, json!({"metadata": {"name": "s"}})),
            code => failed(code),
        }
    }

    /// The heads of the requests for this path so far.
    fn asked(&self, part: &str) -> Vec<String> {
        let heads = self.heads.lock().unwrap();
        heads.iter().filter(|h| h.contains(part)).cloned().collect()
    }
}

fn next(script: &Mutex<VecDeque<(u16, Value)>>) -> Option<(u16, Value)> {
    let mut script = script.lock().unwrap();
    match script.len() {
        0 | 1 => script.front().cloned(),
        _ => script.pop_front(),
    }
}

fn role(allowed: bool) -> (u16, Value) {
    (201, json!({"spec": {}, "status": {"allowed": allowed}}))
}

fn proven() -> (u16, Value) {
    let user = "system:node:cloudcore-probe.invalid";
    (
        201,
        json!({"status": {"userInfo": {"username": user, "groups": ["system:nodes"]}}}),
    )
}

fn refused() -> (u16, Value) {
    failed(403)
}

fn failed(code: u16) -> (u16, Value) {
    (
        code,
        json!({"kind": "Status", "code": code, "status": "Failure"}),
    )
}

async fn read_as_node(clients: &KubeClients) -> Option<u16> {
    let node = NodeName::parse("a").unwrap();
    let secrets: Api<Secret> = Api::namespaced(clients.as_node(&node), "default");
    secrets.get("s").await.err().and_then(|e| status_code(&e))
}

#[tokio::test]
async fn cloudcore_works_as_its_own_account_and_as_nodes_without_a_group() {
    let server = Scripted::default();
    server.proofs.lock().unwrap().push_back(proven());
    let access = server.start().await;
    let (clients, _) = KubeClients::build(&access, Impersonation::Auto)
        .await
        .unwrap();
    assert_eq!(*clients.mode().borrow(), Mode::Constrained);
    assert_eq!(read_as_node(&clients).await, None);
    let own: Api<Secret> = Api::namespaced(clients.own_watch(), "default");
    own.get("s").await.unwrap();
    let asked = server.asked("/secrets/s");
    assert!(
        asked[0].contains("impersonate-user: system:node:a"),
        "{}",
        asked[0]
    );
    assert!(!asked[1].contains("impersonate-user"), "{}", asked[1]);
    let all = server.asked("");
    assert!(!all.iter().any(|head| head.contains("impersonate-group")));
    let as_operator = all
        .iter()
        .filter(|h| h.contains("bearer the-operators-own"));
    assert_eq!(
        as_operator.count(),
        1,
        "the kubeconfig's user asks for the token and does no more"
    );
    assert!(asked.iter().all(|head| head.contains("bearer account-0")));
}

#[tokio::test]
async fn without_constrained_impersonation_no_header_is_sent() {
    let server = Scripted::default();
    server.proofs.lock().unwrap().push_back(refused());
    let access = server.start().await;
    let (clients, _) = KubeClients::build(&access, Impersonation::Auto)
        .await
        .unwrap();
    assert_eq!(*clients.mode().borrow(), Mode::Direct);
    assert_eq!(read_as_node(&clients).await, None);
    assert!(!server.asked("/secrets/s")[0].contains("impersonate"));
    server.proofs.lock().unwrap().push_back(refused());
    let forced = KubeClients::build(&access, Impersonation::Constrained).await;
    assert!(matches!(
        forced.err(),
        Some(KubeError::NoConstrainedImpersonation)
    ));
}

/// A CloudCore that has proven a mode, and whose next request for a node is forbidden.
async fn doubting(server: &Scripted) -> KubeClients {
    let access = server.start().await;
    let (clients, task) = KubeClients::build(&access, Impersonation::Auto)
        .await
        .unwrap();
    tokio::spawn(task.run(CancellationToken::new()));
    server.secrets.lock().unwrap().push_back(403);
    assert_eq!(read_as_node(&clients).await, Some(403));
    clients
}

#[tokio::test]
async fn a_refusal_for_a_node_has_the_mode_proven_again_in_either_mode() {
    let refusal = [refused(), refused()];
    let changes = [
        (vec![proven(), refused()], Mode::Direct),
        ([&refusal[..], &[proven()]].concat(), Mode::Constrained),
    ];
    for (script, becomes) in changes {
        let server = Scripted::default();
        server.proofs.lock().unwrap().extend(script);
        let clients = doubting(&server).await;
        let mut mode = clients.mode();
        assert_ne!(*mode.borrow(), becomes);
        let changed = mode.wait_for(|mode| *mode == becomes);
        let changed = tokio::time::timeout(Duration::from_secs(10), changed).await;
        changed.unwrap().unwrap();
    }
}

/// Whether the mode stayed while the server went through this script and was proven at its end.
async fn stays_through(proofs: Vec<(u16, Value)>, roles: Vec<(u16, Value)>) -> bool {
    let server = Scripted::default();
    let count = proofs.len();
    server.proofs.lock().unwrap().push_back(proven());
    let access_roles = [role(true), role(true)];
    server
        .roles
        .lock()
        .unwrap()
        .extend(access_roles.into_iter().chain(roles));
    server.proofs.lock().unwrap().extend(proofs);
    server.proofs.lock().unwrap().push_back(proven());
    let clients = doubting(&server).await;
    let mode = clients.mode();
    let all_asked = async {
        // The first and the last are this script's own.
        while server.asked("/selfsubjectreviews").len() < count + 2 {
            assert_eq!(*mode.borrow(), Mode::Constrained);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let asked = tokio::time::timeout(Duration::from_secs(20), all_asked).await;
    asked.is_ok() && *mode.borrow() == Mode::Constrained
}

#[tokio::test]
async fn a_server_that_is_half_up_changes_nothing_and_is_asked_again_within_seconds() {
    let doubtful = [
        ("RBAC not loaded", refused(), vec![role(false), role(true)]),
        ("rights forbidden", refused(), vec![refused(), role(true)]),
        ("rights failing", refused(), vec![failed(500), role(true)]),
        ("token not taken", failed(401), vec![]),
        ("failing", failed(500), vec![]),
        ("stopping", failed(503), vec![]),
        ("gone", (0, Value::Null), vec![]),
    ];
    let cases = doubtful.map(async |(what, proof, roles)| {
        assert!(stays_through(vec![proof], roles).await, "{what}");
    });
    futures::future::join_all(cases).await;
}

#[tokio::test]
async fn a_single_contradiction_changes_nothing() {
    assert!(stays_through(vec![refused(), refused()], vec![]).await);
}

#[tokio::test]
async fn a_token_that_is_refused_is_asked_for_again() {
    let server = Scripted::default();
    server.proofs.lock().unwrap().push_back(proven());
    let access = server.start().await;
    let (clients, task) = KubeClients::build(&access, Impersonation::Auto)
        .await
        .unwrap();
    tokio::spawn(task.run(CancellationToken::new()));
    server.secrets.lock().unwrap().push_back(401);
    assert_eq!(read_as_node(&clients).await, Some(401));
    let renewed = async {
        while clients
            .shared
            .token
            .current()
            .is_none_or(|t| !t.to_str().unwrap().contains("account-1"))
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), renewed)
        .await
        .unwrap();
}
