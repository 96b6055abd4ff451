//! A ServiceAccount token that ran out is mounted all the same while the cloud is away: a Pod that
//! starts again offline must not fail for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::hub::proto::{Response, TokenGiven, request, response};
use common::ids::ObjectKey;
use edgecore::hub::clock;
use edgecore::hub::tokens::{ASKS, Ask, SessionTokens};
use edgecore::pods::tokens::{TokenRequest, TokenSource};
use edgecore::store::Store;
use tokio::sync::{mpsc, watch};

/// A cloud that gives each asker a token of one second, and counts them.
fn cloud(mut asked: mpsc::Receiver<Ask>) -> Arc<AtomicUsize> {
    let given = Arc::new(AtomicUsize::new(0));
    let count = given.clone();
    tokio::spawn(async move {
        while let Some(ask) = asked.recv().await {
            assert!(matches!(ask.body, request::Body::Token(_)));
            let n = count.fetch_add(1, Ordering::Relaxed);
            let token = TokenGiven {
                token: format!("token-{n}"),
                lifetime_seconds: 1,
            };
            let body = Some(response::Body::Token(token));
            let _ = ask.answer.send(Response { id: 0, body });
        }
    });
    given
}

#[tokio::test]
async fn a_token_that_ran_out_is_mounted_while_the_cloud_is_away() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = Store::open(&dir.path().join("store")).unwrap();
    let (asks, asked) = mpsc::channel(ASKS);
    let given = cloud(asked);
    let connected = watch::Sender::new(true);
    let start = || {
        let connected = connected.subscribe();
        SessionTokens::new(store.clone(), asks.clone(), connected, clock::boot_id())
    };
    let request = TokenRequest {
        pod: ObjectKey::pod("default", "web", "u1"),
        service_account: "default".into(),
        audience: String::new(),
        expiration_seconds: 600,
    };
    let first = start().token(&request).await.unwrap();
    assert_eq!(first.token, "token-0");

    // It has run out, the agent was started again, and nobody can be asked.
    tokio::time::sleep(Duration::from_millis(2100)).await;
    connected.send_replace(false);
    let offline = start();
    let old = offline.token(&request).await.unwrap();
    assert_eq!(old.token, "token-0");
    assert!(
        old.refresh_in_seconds > 0,
        "or it would be asked for at once"
    );
    assert_eq!(given.load(Ordering::Relaxed), 1);

    // Another Pod's token was never given: its mount waits.
    let other = TokenRequest {
        pod: ObjectKey::pod("default", "other", "u2"),
        ..request.clone()
    };
    let problem = offline.token(&other).await.map(drop).unwrap_err();
    assert!(problem.contains("not connected"), "{problem}");

    // The link is back: the next look brings a fresh one.
    connected.send_replace(true);
    assert_eq!(offline.token(&request).await.unwrap().token, "token-1");
}
