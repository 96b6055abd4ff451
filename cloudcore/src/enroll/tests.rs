use std::collections::BTreeMap;

use super::*;
use crate::enroll::record::NodeTaint;
use crate::enroll::tokens::TokenWish;
use crate::kube::fake::FakeApi;
use common::hub::proto::RefusalCode::{self, *};
use common::pki::NodeKey;
use common::pki::token::TokenSecret;
use serde_json::json;

const DAY: u64 = 86_400;
const NODE: &str = "/api/v1/nodes/a";

struct Bed {
    fake: FakeApi,
    enroller: Enroller,
}

struct Token {
    id: String,
    secret: TokenSecret,
}

fn peer() -> SocketAddr {
    "192.0.2.7:1234".parse().unwrap()
}

impl Bed {
    async fn new() -> Self {
        let fake = FakeApi::new();
        let authority = Arc::new(Authority::ensure(&fake.client()).await.unwrap());
        let config = EnrollConfig {
            certificate_lifetime: Duration::from_secs(90 * DAY),
            grace: Duration::from_secs(180 * DAY),
            taint_nodes: true,
        };
        let enroller = Enroller::build(fake.client(), authority, Link::default(), config);
        Self { fake, enroller }
    }

    async fn token(&self, change: impl FnOnce(&mut TokenWish)) -> Token {
        let mut wish = TokenWish {
            ttl: Duration::from_secs(3600),
            uses: 1,
            node: None,
            labels: BTreeMap::from([("topology.kubernetes.io/zone".into(), "berlin".into())]),
            taints: Vec::new(),
        };
        change(&mut wish);
        let secret = TokenSecret::generate().unwrap();
        let made = self
            .enroller
            .tokens
            .create(wish, &secret, Timestamp::now())
            .await
            .unwrap();
        Token {
            id: made.id,
            secret,
        }
    }

    async fn join(&self, request: &JoinRequest) -> Result<Joined, Refused> {
        self.enroller.join(request, peer()).await
    }

    async fn refused(&self, request: &JoinRequest) -> RefusalCode {
        let refused = self.join(request).await.expect_err("must be refused");
        assert!(
            refused.message.len() > 20 && !refused.message.contains('\n'),
            "{}",
            refused.message
        );
        refused.code()
    }

    fn identity(&self, joined: &Joined) -> NodeIdentity {
        NodeIdentity::from_certificate(&joined.chain[0]).unwrap()
    }
}

fn request(token: &Token, name: &str, key: &NodeKey) -> JoinRequest {
    JoinRequest {
        version: 1,
        token_id: token.id.clone(),
        token_secret: token.secret.bytes().to_vec(),
        node_name: name.into(),
        csr: key.request().unwrap(),
        agent_version: "0.1.0".into(),
        os: "linux".into(),
        arch: "aarch64".into(),
        expired_certificate: Vec::new(),
    }
}

fn key() -> NodeKey {
    NodeKey::generate().unwrap()
}

#[tokio::test]
async fn a_device_joins_and_its_node_is_born_whole() {
    let bed = Bed::new().await;
    let taint = NodeTaint {
        key: "k".into(),
        value: "v".into(),
        effect: "NoExecute".into(),
    };
    let token = bed.token(|wish| wish.taints = vec![taint]).await;
    let key = key();
    let joined = bed.join(&request(&token, "a", &key)).await.unwrap();
    let identity = bed.identity(&joined);
    assert_eq!((identity.node.as_str(), identity.key_id), ("a", key.id()));
    assert_eq!(joined.node_name, "a");
    assert!(joined.now_ms > 1_700_000_000_000);
    let node = bed.fake.get(NODE).unwrap();
    assert_eq!(
        node["metadata"]["labels"]["topology.kubernetes.io/zone"],
        "berlin"
    );
    assert_eq!(node["metadata"]["labels"]["kubernetes.io/arch"], "arm64");
    let taints: Vec<_> = node["spec"]["taints"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t["key"].clone())
        .collect();
    assert_eq!(taints, ["k", "node-role.kubernetes.io/edge"]);
    let cluster = &bed.enroller.authority.cluster;
    assert_eq!(node["spec"]["providerID"], format!("edge://{cluster}/a"));
}

#[tokio::test]
async fn the_same_key_may_ask_again_because_an_answer_can_be_lost() {
    let bed = Bed::new().await;
    let token = bed.token(|_| {}).await;
    let key = key();
    // The process or the API server dies after each step in turn: the device asks again.
    for dies_at in 1..12 {
        let mut n = 0;
        bed.fake.intercept(move |_, _| {
            n += 1;
            (n == dies_at).then_some(500)
        });
        let _ = bed.join(&request(&token, "a", &key)).await;
    }
    bed.fake.intercept(|_, _| None);
    let joined = bed.join(&request(&token, "a", &key)).await.unwrap();
    assert_eq!(bed.identity(&joined).key_id, key.id());
    let left = bed.enroller.tokens.find(&token.id).await.unwrap().unwrap();
    assert_eq!(left.used.len(), 1, "one device, one use");
    assert!(bed.fake.get(NODE).is_some());
}

#[tokio::test]
async fn every_refusal_has_its_own_code() {
    let bed = Bed::new().await;
    let token = bed.token(|wish| wish.uses = 9).await;
    let base = request(&token, "a", &key());
    let with = |change: &dyn Fn(&mut JoinRequest)| {
        let mut changed = base.clone();
        change(&mut changed);
        changed
    };
    let bound = bed
        .token(|wish| wish.node = NodeName::parse("b").ok())
        .await;
    let expired = bed.token(|wish| wish.ttl = Duration::ZERO).await;
    let used = bed.token(|_| {}).await;
    bed.join(&request(&used, "used", &key())).await.unwrap();
    bed.join(&request(&token, "taken", &key())).await.unwrap();
    bed.fake.put(
        "/api/v1/nodes/foreign",
        json!({"metadata": {}, "spec": {"providerID": "aws:///i-1"}}),
    );
    for (what, request, want) in [
        (
            "an unknown token",
            with(&|r| r.token_id = "zzzzzzzz".into()),
            RefusalTokenUnknown,
        ),
        (
            "a hostile id",
            with(&|r| r.token_id = "../cloudcore-ca".into()),
            RefusalTokenUnknown,
        ),
        (
            "a wrong secret",
            with(&|r| r.token_secret[0] ^= 1),
            RefusalTokenUnknown,
        ),
        (
            "no secret",
            with(&|r| r.token_secret.clear()),
            RefusalTokenUnknown,
        ),
        (
            "an expired token",
            request(&expired, "a", &key()),
            RefusalTokenExpired,
        ),
        (
            "a used token",
            request(&used, "a", &key()),
            RefusalTokenUsed,
        ),
        (
            "another's token",
            request(&bound, "a", &key()),
            RefusalTokenOtherNode,
        ),
        (
            "a taken name",
            request(&token, "taken", &key()),
            RefusalNameTaken,
        ),
        (
            "a foreign Node",
            request(&token, "foreign", &key()),
            RefusalNameForeign,
        ),
        (
            "no name",
            with(&|r| r.node_name.clear()),
            RefusalNameInvalid,
        ),
        (
            "a bad name",
            with(&|r| r.node_name = "A_b".into()),
            RefusalNameInvalid,
        ),
        (
            "a long name",
            with(&|r| r.node_name = "a".repeat(64)),
            RefusalNameInvalid,
        ),
        ("no request", with(&|r| r.csr.clear()), RefusalBadRequest),
        (
            "a spoilt request",
            with(&|r| *r.csr.last_mut().unwrap() ^= 1),
            RefusalBadRequest,
        ),
        (
            "a later version",
            with(&|r| r.version = 2),
            RefusalBadRequest,
        ),
        (
            "an odd platform",
            with(&|r| r.arch = "a b".into()),
            RefusalBadRequest,
        ),
        (
            "a strange certificate",
            with(&|r| r.expired_certificate = vec![1, 2, 3]),
            RefusalBadRequest,
        ),
    ] {
        assert_eq!(bed.refused(&request).await, want, "{what}");
    }
    let open = bed.enroller.tokens.find(&token.id).await.unwrap().unwrap();
    assert_eq!(open.used.len(), 1, "a refusal uses up nothing");
    bed.fake.intercept(|_, _| Some(503));
    assert_eq!(bed.refused(&base).await, RefusalUnavailable);
}

#[tokio::test]
async fn a_token_for_one_node_names_a_device_that_has_no_name() {
    let bed = Bed::new().await;
    let token = bed
        .token(|wish| wish.node = NodeName::parse("b").ok())
        .await;
    let joined = bed.join(&request(&token, "", &key())).await.unwrap();
    assert_eq!(joined.node_name, "b");
}

#[tokio::test]
async fn of_two_devices_with_one_use_one_joins() {
    let bed = Bed::new().await;
    let token = bed.token(|_| {}).await;
    let (a, b) = (request(&token, "a", &key()), request(&token, "b", &key()));
    let (a, b) = futures::join!(bed.join(&a), bed.join(&b));
    assert_eq!(usize::from(a.is_ok()) + usize::from(b.is_ok()), 1);
    assert_eq!(a.err().or(b.err()).unwrap().code(), RefusalTokenUsed);
}

#[tokio::test]
async fn of_two_devices_with_one_name_one_joins() {
    let bed = Bed::new().await;
    let token = bed.token(|wish| wish.uses = 2).await;
    let (a, b) = (request(&token, "a", &key()), request(&token, "a", &key()));
    let (a, b) = futures::join!(bed.join(&a), bed.join(&b));
    assert_eq!(usize::from(a.is_ok()) + usize::from(b.is_ok()), 1);
    assert_eq!(a.err().or(b.err()).unwrap().code(), RefusalNameTaken);
}

#[tokio::test]
async fn an_ended_enrolment_needs_a_new_token() {
    let bed = Bed::new().await;
    let old = bed.token(|wish| wish.uses = 5).await;
    let key = key();
    let joined = bed.join(&request(&old, "a", &key)).await.unwrap();
    let outcome = bed
        .enroller
        .revoke(&NodeName::parse("a").unwrap())
        .await
        .unwrap();
    assert_eq!(
        outcome,
        revoke::Outcome::Ended {
            token_left: Some((old.id.clone(), 4))
        }
    );
    assert!(bed.fake.get(NODE).is_none(), "the Node goes at once");
    // The use is recorded: without the mark of the revocation this key could repeat it for ever.
    assert_eq!(bed.refused(&request(&old, "a", &key)).await, RefusalRevoked);
    assert_eq!(
        bed.refused(&request(&old, "a", &self::key())).await,
        RefusalRevoked
    );
    let mut again = request(&old, "a", &key);
    again.expired_certificate = joined.chain[0].clone();
    assert_eq!(bed.refused(&again).await, RefusalRevoked);
    let identity = bed.identity(&joined);
    let renewal = bed.enroller.renew(&identity, &key.request().unwrap()).await;
    assert!(matches!(renewal, Err(RenewError::NotEnrolled(_))));
    // Made in the very second of the revocation: the recorded use still does not come again.
    let path = "/apis/fleet.cloudcore.io/v1alpha1/namespaces/edge-system/enrolments/a";
    let mut ended = bed.fake.get(path).unwrap();
    ended["spec"]["revoked"] = json!("2026-01-01T00:00:00Z");
    bed.fake.put(path, ended);
    assert_eq!(bed.refused(&request(&old, "a", &key)).await, RefusalRevoked);
    // A token of later: the fake's clock stands still, so the record is set back.
    let mut ended = bed.fake.get(path).unwrap();
    ended["spec"]["revoked"] = json!("2025-12-31T00:00:00Z");
    bed.fake.put(path, ended);
    let new = bed.token(|_| {}).await;
    bed.join(&request(&new, "a", &key)).await.unwrap();
    assert!(bed.fake.get(NODE).is_some());
}

#[tokio::test]
async fn an_expired_certificate_of_a_known_key_gets_a_new_one() {
    let bed = Bed::new().await;
    let token = bed.token(|_| {}).await;
    let key = key();
    bed.join(&request(&token, "a", &key)).await.unwrap();
    let Authority { ca, cluster } = &*bed.enroller.authority;
    let node = NodeName::parse("a").unwrap();
    let ended = |days_ago: u64| {
        let end = UnixTime::now().as_secs() - days_ago * DAY;
        let begin = UnixTime::since_unix_epoch(Duration::from_secs(end - 90 * DAY));
        let validity = Validity::starting(begin, Duration::from_secs(90 * DAY));
        ca.sign_node_csr(&key.request().unwrap(), &node, cluster, validity)
            .unwrap()[0]
            .to_vec()
    };
    let again = |certificate: Vec<u8>, key: &NodeKey| JoinRequest {
        token_id: String::new(),
        token_secret: Vec::new(),
        expired_certificate: certificate,
        ..request(&token, "a", key)
    };
    let joined = bed.join(&again(ended(100), &key)).await.unwrap();
    assert_eq!(bed.identity(&joined).key_id, key.id());
    assert_eq!(
        bed.refused(&again(ended(181), &key)).await,
        RefusalExpiredTooLong
    );
    assert_eq!(
        bed.refused(&again(ended(100), &self::key())).await,
        RefusalBadRequest
    );
}

#[tokio::test]
async fn a_renewed_key_holds_beside_the_old_one_until_its_first_session() {
    let bed = Bed::new().await;
    let token = bed.token(|_| {}).await;
    let (old, new) = (key(), key());
    let first = bed.identity(&bed.join(&request(&token, "a", &old)).await.unwrap());
    let chain = bed
        .enroller
        .renew(&first, &new.request().unwrap())
        .await
        .unwrap();
    let second = NodeIdentity::from_certificate(&chain[0]).unwrap();
    let holds = async |identity: &NodeIdentity| {
        let found = records(&bed.fake.client()).get("a").await.unwrap();
        found.spec.knows(identity.key_id)
    };
    bed.enroller.first_session(&first).await.unwrap();
    assert!(holds(&first).await && holds(&second).await);
    bed.enroller.first_session(&second).await.unwrap();
    assert!(!holds(&first).await && holds(&second).await);
    assert!(
        bed.enroller
            .renew(&first, &key().request().unwrap())
            .await
            .is_err()
    );
}

#[tokio::test]
async fn a_deleted_enrolment_does_not_come_back_by_its_used_token() {
    let bed = Bed::new().await;
    let token = bed.token(|_| {}).await;
    let key = key();
    bed.join(&request(&token, "a", &key)).await.unwrap();
    // While the record is there the answer may be repeated.
    bed.join(&request(&token, "a", &key)).await.unwrap();
    let records = records(&bed.fake.client());
    records.delete("a", &Default::default()).await.unwrap();
    assert_eq!(
        bed.refused(&request(&token, "a", &key)).await,
        RefusalRevoked
    );
    let new = bed.token(|_| {}).await;
    bed.join(&request(&new, "a", &key)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn more_devices_at_once_than_are_decided_are_told_to_come_again() {
    let bed = Bed::new().await;
    let token = bed.token(|_| {}).await;
    let _all = bed.enroller.at_once.acquire_many(16).await.unwrap();
    assert_eq!(
        bed.refused(&request(&token, "a", &key())).await,
        RefusalUnavailable
    );
}
