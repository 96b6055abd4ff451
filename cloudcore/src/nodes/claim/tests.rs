use super::*;
use crate::enroll::record::{EnrolmentSpec, record};
use crate::kube::fake::FakeApi;
use serde_json::json;

const LEASE: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/a";
const RECORD: &str = "/apis/fleet.cloudcore.io/v1alpha1/namespaces/edge-system/enrolments/a";

fn a() -> NodeName {
    NodeName::parse("a").unwrap()
}

fn cluster() -> FakeApi {
    let fake = FakeApi::new();
    let spec = EnrolmentSpec::default();
    fake.put(
        RECORD,
        serde_json::to_value(record(&a(), spec, None)).unwrap(),
    );
    fake.put("/api/v1/nodes/a", json!({"metadata": {}}));
    fake
}

fn claims(fake: &FakeApi, replica: &str) -> Claims {
    Claims::build(fake.client(), replica.into()).0
}

async fn renew(claims: &Claims, claim: &Claim) {
    claims.inner.renew(claim.live.clone()).await;
}

#[tokio::test]
async fn a_lease_says_who_holds_the_node_and_belongs_to_it() {
    let fake = cluster();
    let claim = claims(&fake, "one").claim(&a()).await.unwrap();
    let lease = fake.get(LEASE).unwrap();
    assert_eq!(lease["spec"]["holderIdentity"], "a");
    assert_eq!(lease["spec"]["leaseDurationSeconds"], 40);
    assert_eq!(lease["spec"]["leaseTransitions"], 1);
    let uid = &fake.get("/api/v1/nodes/a").unwrap()["metadata"]["uid"];
    assert_eq!(lease["metadata"]["ownerReferences"][0]["uid"], *uid);
    let read: Lease = serde_json::from_value(lease).unwrap();
    let held = Held::read(&read, Timestamp::now()).unwrap();
    assert_eq!(
        (held.replica.as_str(), held.epoch, held.live),
        ("one", 1, true)
    );
    let later = Timestamp::now() + Duration::from_secs(41);
    assert!(!Held::read(&read, later).unwrap().live);
    assert_eq!(claim.epoch(), 1);
}

#[tokio::test]
async fn the_newest_session_wins_and_the_older_one_finds_out() {
    let fake = cluster();
    let (one, two) = (claims(&fake, "one"), claims(&fake, "two"));
    let older = one.claim(&a()).await.unwrap();
    let newer = two.claim(&a()).await.unwrap();
    assert!(newer.epoch() > older.epoch());
    renew(&one, &older).await;
    assert!(older.lost().is_cancelled() && !older.fresh());
    renew(&two, &newer).await;
    assert!(!newer.lost().is_cancelled() && newer.fresh());
    assert!(one.inner.table().queue.is_empty());
}

#[tokio::test]
async fn a_second_session_in_the_same_replica_ends_the_first_at_once() {
    let fake = cluster();
    let one = claims(&fake, "one");
    let older = one.claim(&a()).await.unwrap();
    let newer = one.claim(&a()).await.unwrap();
    assert!(older.lost().is_cancelled());
    drop(older);
    assert!(!newer.lost().is_cancelled());
    assert_eq!(
        one.inner.table().queue.len(),
        1,
        "the older one's drop must not end the newer's renewals"
    );
}

#[tokio::test]
async fn of_two_claims_at_once_both_get_an_epoch_and_one_keeps_the_node() {
    let fake = cluster();
    let (one, two) = (claims(&fake, "one"), claims(&fake, "two"));
    let name = a();
    let (x, y) = futures::join!(one.claim(&name), two.claim(&name));
    let (x, y) = (x.unwrap(), y.unwrap());
    assert_ne!(x.epoch(), y.epoch());
    renew(&one, &x).await;
    renew(&two, &y).await;
    let lost = [x.lost().is_cancelled(), y.lost().is_cancelled()];
    assert_eq!(lost.iter().filter(|l| **l).count(), 1, "{lost:?}");
}

#[tokio::test]
async fn an_epoch_never_comes_again_when_the_lease_is_gone() {
    let fake = cluster();
    let one = claims(&fake, "one");
    let mut last = 0;
    for _ in 0..3 {
        last = one.claim(&a()).await.unwrap().epoch();
    }
    assert_eq!(last, 3);
    kube::Api::<Lease>::namespaced(fake.client(), NAMESPACE)
        .delete("a", &Default::default())
        .await
        .unwrap();
    let after = one.claim(&a()).await.unwrap().epoch();
    assert!(after > last, "{after}");
    // A Lease that somebody else wrote says nothing about epochs.
    fake.put(
        LEASE,
        json!({"metadata": {}, "spec": {"leaseTransitions": 0}}),
    );
    assert!(one.claim(&a()).await.unwrap().epoch() > after);
}

#[tokio::test]
async fn many_sessions_write_the_record_seldom() {
    let fake = cluster();
    let one = claims(&fake, "one");
    for _ in 0..60 {
        one.claim(&a()).await.unwrap();
    }
    let writes = fake
        .requests()
        .iter()
        .filter(|r| r.starts_with("PUT") && r.contains("enrolments"))
        .count();
    assert_eq!(writes, 1);
}

#[tokio::test]
async fn a_lease_that_the_garbage_collector_took_is_made_again_under_the_same_epoch() {
    let fake = cluster();
    let one = claims(&fake, "one");
    let claim = one.claim(&a()).await.unwrap();
    kube::Api::<Lease>::namespaced(fake.client(), NAMESPACE)
        .delete("a", &Default::default())
        .await
        .unwrap();
    renew(&one, &claim).await;
    assert!(!claim.lost().is_cancelled());
    assert_eq!(fake.get(LEASE).unwrap()["spec"]["leaseTransitions"], 1);
}

#[tokio::test]
async fn somebody_who_touches_the_lease_and_claims_nothing_takes_nothing() {
    let fake = cluster();
    let one = claims(&fake, "one");
    let claim = one.claim(&a()).await.unwrap();
    let mut lease = fake.get(LEASE).unwrap();
    lease["metadata"]["labels"] = json!({"kubectl": "label"});
    fake.put(LEASE, lease);
    renew(&one, &claim).await;
    assert!(!claim.lost().is_cancelled() && claim.fresh());
}

#[tokio::test(start_paused = true)]
async fn a_silent_api_server_makes_a_claim_stale_and_not_lost() {
    let fake = cluster();
    let (one, task) = Claims::build(fake.client(), "one".into());
    let claim = one.claim(&a()).await.unwrap();
    let stop = CancellationToken::new();
    let running = tokio::spawn(task.run(stop.clone()));
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(claim.fresh(), "the task renews");
    fake.intercept(|_, _| Some(500));
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert!(!claim.fresh() && !claim.lost().is_cancelled());
    fake.intercept(|_, _| None);
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(claim.fresh());
    stop.cancel();
    running.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_dropped_claim_is_not_renewed() {
    let fake = cluster();
    let (one, task) = Claims::build(fake.client(), "one".into());
    drop(one.claim(&a()).await.unwrap());
    let before = fake.requests().len();
    let stop = CancellationToken::new();
    let running = tokio::spawn(task.run(stop.clone()));
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(fake.requests().len(), before);
    stop.cancel();
    running.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_lease_follows_a_node_that_was_made_again_at_once() {
    let fake = cluster();
    let (one, task) = Claims::build(fake.client(), "one".into());
    one.owner(&a(), "first");
    let _claim = one.claim(&a()).await.unwrap();
    let stop = CancellationToken::new();
    let running = tokio::spawn(task.run(stop.clone()));
    one.no_owner(&a());
    one.owner(&a(), "second");
    tokio::time::sleep(Duration::from_millis(100)).await;
    let owner = fake.get(LEASE).unwrap()["metadata"]["ownerReferences"][0]["uid"].clone();
    assert_eq!(owner, "second");
    stop.cancel();
    running.await.unwrap();
}

#[tokio::test]
async fn who_is_not_enrolled_gets_no_claim() {
    let fake = cluster();
    let stranger = NodeName::parse("b").unwrap();
    let refused = claims(&fake, "one").claim(&stranger).await;
    assert!(matches!(refused.err(), Some(ClaimError::NotEnrolled(_))));
}
