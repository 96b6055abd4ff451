//! Join tokens as the cluster keeps them: Secrets that hold a hash of the secret, never it.
//!
//! A use is recorded as (key, node) by compare-and-swap before the device is enrolled. The same key
//! may repeat its use for the same name, because the answer can be lost.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{DeleteParams, ListParams, ObjectMeta, PostParams};
use kube::{Api, Client};
use rand::Rng;
use serde::{Deserialize, Serialize};

use common::ids::NodeName;
use common::pki::KeyId;
use common::pki::token::{TokenSecret, secret_matches};

use super::record::NodeTaint;
use super::refusal::Refusal;
use crate::kube::{KubeError, NAMESPACE, is_absent, is_conflict};

const PREFIX: &str = "cloudcore-token-";
/// The label by which tokens are found; its value is the id.
pub const LABEL: &str = "fleet.cloudcore.io/token";
const KIND: &str = "fleet.cloudcore.io/join-token";
const ID_LENGTH: usize = 8;

/// A Secret takes 1 MiB; a recorded use takes up to 200 bytes of it.
pub const MOST_USES: u32 = 4000;

/// What a token admits. The secret's hash is in it, the secret is not.
#[derive(Clone, PartialEq, Eq)]
pub struct TokenRecord {
    pub id: String,
    secret_hash: Vec<u8>,
    pub expires: Timestamp,
    /// By the API server's clock.
    pub created: Option<Timestamp>,
    pub uses: u32,
    pub node: Option<NodeName>,
    pub labels: BTreeMap<String, String>,
    pub taints: Vec<NodeTaint>,
    pub used: Vec<Use>,
    revision: Option<String>,
}

/// One recorded use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Use {
    /// The key's id, hexadecimal.
    pub key: String,
    pub node: NodeName,
    /// RFC 3339.
    pub at: String,
    /// The enrolment that this use is for was written. From then on the use is repeated only while
    /// that record is there: whoever deletes the record has ended it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub enrolled: bool,
}

impl Use {
    fn is_of(&self, key: KeyId, node: &NodeName) -> bool {
        self.key == key.to_string() && self.node == *node
    }
}

/// Expired tokens are kept so long, to be seen in `cloudcore token list` and to tell a device that
/// comes late what is wrong.
const KEPT_EXPIRED: Duration = Duration::from_secs(7 * 86_400);

/// What an operator asks for.
#[derive(Debug, Clone)]
pub struct TokenWish {
    pub ttl: Duration,
    pub uses: u32,
    pub node: Option<NodeName>,
    pub labels: BTreeMap<String, String>,
    pub taints: Vec<NodeTaint>,
}

/// A token's answer to a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admitted {
    pub node: NodeName,
    /// The use is recorded already: this is the same device asking again.
    pub repeated: bool,
    /// And it was enrolled by it.
    pub enrolled: bool,
}

impl TokenRecord {
    /// Whether this token admits that key under that name, now.
    pub fn admit(
        &self,
        secret: &[u8],
        key: KeyId,
        asked: &NodeName,
        now: Timestamp,
    ) -> Result<Admitted, Refusal> {
        if !self.is_secret(secret) {
            return Err(Refusal::TokenUnknown);
        }
        if let Some(bound) = self.node.as_ref().filter(|bound| *bound != asked) {
            return Err(Refusal::TokenOtherNode {
                id: self.id.clone(),
                bound: bound.to_string(),
                asked: asked.to_string(),
            });
        }
        let node = asked.clone();
        if let Some(used) = self.used.iter().find(|u| u.is_of(key, asked)) {
            return Ok(Admitted {
                node,
                repeated: true,
                enrolled: used.enrolled,
            });
        }
        if now >= self.expires {
            return Err(Refusal::TokenExpired {
                id: self.id.clone(),
                at: self.expires.to_string(),
            });
        }
        if self.left() == 0 {
            return Err(Refusal::TokenUsed {
                id: self.id.clone(),
                uses: self.uses,
            });
        }
        Ok(Admitted {
            node,
            repeated: false,
            enrolled: false,
        })
    }

    /// Whether the secret is this token's. Takes the same time for every wrong one.
    pub fn is_secret(&self, shown: &[u8]) -> bool {
        secret_matches(&self.secret_hash, shown)
    }

    /// Uses that are left.
    pub fn left(&self) -> u32 {
        let used = u32::try_from(self.used.len()).unwrap_or(u32::MAX);
        self.uses.saturating_sub(used)
    }

    fn to_secret(&self) -> Secret {
        let mut data = BTreeMap::from([
            (
                "secret-sha256".to_string(),
                text(&crate::hex(&self.secret_hash)),
            ),
            ("expires".into(), text(&self.expires.to_string())),
            ("uses".into(), text(&self.uses.to_string())),
            ("labels".into(), json(&self.labels)),
            ("taints".into(), json(&self.taints)),
            ("used".into(), json(&self.used)),
        ]);
        if let Some(node) = &self.node {
            data.insert("node".into(), text(node.as_str()));
        }
        Secret {
            metadata: ObjectMeta {
                name: Some(format!("{PREFIX}{}", self.id)),
                namespace: Some(NAMESPACE.into()),
                labels: Some(BTreeMap::from([(LABEL.into(), self.id.clone())])),
                resource_version: self.revision.clone(),
                ..ObjectMeta::default()
            },
            data: Some(data),
            type_: Some(KIND.into()),
            ..Secret::default()
        }
    }

    fn from_secret(secret: &Secret) -> Result<Self, KubeError> {
        let name = secret.metadata.name.as_deref().unwrap_or_default();
        let bad = |key: &str| KubeError::Malformed {
            what: format!("token Secret {NAMESPACE}/{name}"),
            why: format!("its key {key:?} is missing or malformed; delete it"),
        };
        let bytes = |key: &str| secret.data.as_ref()?.get(key).map(|b| b.0.as_slice());
        let text = |key: &str| {
            let found = bytes(key).and_then(|b| std::str::from_utf8(b).ok());
            found.ok_or_else(|| bad(key))
        };
        Ok(Self {
            id: name
                .strip_prefix(PREFIX)
                .ok_or_else(|| bad("name"))?
                .to_string(),
            secret_hash: crate::unhex(text("secret-sha256")?)
                .ok_or_else(|| bad("secret-sha256"))?,
            expires: text("expires")?.parse().map_err(|_| bad("expires"))?,
            created: secret.metadata.creation_timestamp.as_ref().map(|t| t.0),
            uses: text("uses")?.parse().map_err(|_| bad("uses"))?,
            node: match bytes("node") {
                Some(_) => Some(NodeName::parse(text("node")?).map_err(|_| bad("node"))?),
                None => None,
            },
            labels: serde_json::from_str(text("labels")?).map_err(|_| bad("labels"))?,
            taints: serde_json::from_str(text("taints")?).map_err(|_| bad("taints"))?,
            used: serde_json::from_str(text("used")?).map_err(|_| bad("used"))?,
            revision: secret.metadata.resource_version.clone(),
        })
    }
}

fn text(text: &str) -> ByteString {
    ByteString(text.as_bytes().to_vec())
}

/// Maps and lists of strings, as JSON.
fn json<T: Serialize>(value: &T) -> ByteString {
    ByteString(serde_json::to_vec(value).expect("maps and lists of strings are JSON"))
}

/// The tokens of one cluster.
#[derive(Clone)]
pub struct Tokens {
    secrets: Api<Secret>,
}

impl Tokens {
    pub fn build(client: &Client) -> Self {
        Self {
            secrets: Api::namespaced(client.clone(), NAMESPACE),
        }
    }

    /// Makes a token; the secret is given here and nowhere else.
    pub async fn create(
        &self,
        wish: TokenWish,
        secret: &TokenSecret,
        now: Timestamp,
    ) -> Result<TokenRecord, KubeError> {
        let mut rng = rand::rng();
        let id = (0..ID_LENGTH)
            .map(|_| crate::BASE32[rng.random_range(0..32)])
            .collect();
        let record = TokenRecord {
            id,
            secret_hash: secret.hash().to_vec(),
            expires: now.saturating_add(wish.ttl).unwrap_or(Timestamp::MAX),
            created: None,
            uses: wish.uses,
            node: wish.node,
            labels: wish.labels,
            taints: wish.taints,
            used: Vec::new(),
            revision: None,
        };
        let made = self
            .secrets
            .create(&PostParams::default(), &record.to_secret())
            .await
            .map_err(KubeError::api("making a token"))?;
        TokenRecord::from_secret(&made)
    }

    /// A token, if there is one of that id. What a stranger sends as an id costs no request unless
    /// it could be one.
    pub async fn find(&self, id: &str) -> Result<Option<TokenRecord>, KubeError> {
        let plausible = id.len() == ID_LENGTH && id.chars().all(|c| crate::BASE32.contains(&c));
        if !plausible {
            return Ok(None);
        }
        match self.secrets.get(&format!("{PREFIX}{id}")).await {
            Ok(secret) => TokenRecord::from_secret(&secret).map(Some),
            Err(e) if is_absent(&e) => Ok(None),
            Err(e) => Err(KubeError::api(format!("reading token {id}"))(e)),
        }
    }

    /// All tokens, and the Secrets that carry the label and are none.
    pub async fn list(&self) -> Result<(Vec<TokenRecord>, Vec<KubeError>), KubeError> {
        let found = self
            .secrets
            .list(&ListParams::default().labels(LABEL))
            .await
            .map_err(KubeError::api("listing tokens"))?;
        let (mut good, mut bad) = (Vec::new(), Vec::new());
        for secret in &found.items {
            match TokenRecord::from_secret(secret) {
                Ok(record) => good.push(record),
                Err(error) => bad.push(error),
            }
        }
        Ok((good, bad))
    }

    /// Ends a token; false when there is none of that id.
    pub async fn revoke(&self, id: &str) -> Result<bool, KubeError> {
        let name = format!("{PREFIX}{id}");
        match self.secrets.delete(&name, &DeleteParams::default()).await {
            Ok(_) => Ok(true),
            Err(e) if is_absent(&e) => Ok(false),
            Err(e) => Err(KubeError::api(format!("ending token {id}"))(e)),
        }
    }

    /// Records a use, unless the token changed since it was read: `None` then, and the caller reads
    /// and decides again.
    pub async fn record_use(
        &self,
        token: &TokenRecord,
        key: KeyId,
        node: &NodeName,
        now: Timestamp,
    ) -> Result<Option<TokenRecord>, KubeError> {
        let mut next = token.clone();
        next.used.push(Use {
            key: key.to_string(),
            node: node.clone(),
            at: now.to_string(),
            enrolled: false,
        });
        self.write(token, &next).await
    }

    /// Records that the enrolment of a use was written; false as for [`Self::record_use`].
    pub async fn record_enrolled(
        &self,
        token: &TokenRecord,
        key: KeyId,
        node: &NodeName,
    ) -> Result<bool, KubeError> {
        let mut next = token.clone();
        let uses = next.used.iter_mut().filter(|u| u.is_of(key, node));
        uses.for_each(|u| u.enrolled = true);
        Ok(next == *token || self.write(token, &next).await?.is_some())
    }

    /// Deletes the tokens that expired long ago; gives how many. Tokens that cannot be read stay.
    pub async fn sweep(&self, now: Timestamp) -> Result<usize, KubeError> {
        let (tokens, _unreadable) = self.list().await?;
        let mut swept = 0;
        for token in tokens {
            let until = token.expires.saturating_add(KEPT_EXPIRED);
            // A token that never expires overflows.
            if until.is_ok_and(|until| until < now) && self.revoke(&token.id).await? {
                swept += 1;
            }
        }
        Ok(swept)
    }

    async fn write(
        &self,
        token: &TokenRecord,
        next: &TokenRecord,
    ) -> Result<Option<TokenRecord>, KubeError> {
        let secret = next.to_secret();
        let name = format!("{PREFIX}{}", token.id);
        match self
            .secrets
            .replace(&name, &PostParams::default(), &secret)
            .await
        {
            Ok(written) => TokenRecord::from_secret(&written).map(Some),
            Err(e) if is_conflict(&e) || is_absent(&e) => Ok(None),
            Err(e) => Err(KubeError::api(format!(
                "recording a use of token {}",
                token.id
            ))(e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube::fake::FakeApi;

    fn name(n: &str) -> NodeName {
        NodeName::parse(n).unwrap()
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn token(secret: &TokenSecret) -> TokenRecord {
        TokenRecord {
            id: "abcdefgh".into(),
            secret_hash: secret.hash().to_vec(),
            expires: at(100),
            created: None,
            uses: 2,
            node: None,
            labels: BTreeMap::new(),
            taints: Vec::new(),
            used: vec![Use {
                key: KeyId([1; 32]).to_string(),
                node: name("a"),
                at: String::new(),
                enrolled: false,
            }],
            revision: None,
        }
    }

    #[test]
    fn a_token_admits_what_it_was_made_for() {
        let secret = TokenSecret::generate().unwrap();
        let wrong = TokenSecret::generate().unwrap();
        let open = token(&secret);
        let bound = TokenRecord {
            node: Some(name("b")),
            ..open.clone()
        };
        let full = TokenRecord {
            uses: 1,
            ..open.clone()
        };
        let (k1, k2) = (KeyId([1; 32]), KeyId([2; 32]));
        let ok = |n: &str, repeated| {
            Ok(Admitted {
                node: name(n),
                repeated,
                enrolled: false,
            })
        };
        let id = || "abcdefgh".to_string();
        let used = Err(Refusal::TokenUsed { id: id(), uses: 1 });
        let expired = Err(Refusal::TokenExpired {
            id: id(),
            at: at(100).to_string(),
        });
        let other = Err(Refusal::TokenOtherNode {
            id: id(),
            bound: "b".into(),
            asked: "a".into(),
        });
        let unknown = Err(Refusal::TokenUnknown);
        for (what, token, secret, key, node, now, want) in [
            ("a new device", &open, &secret, k2, "b", 0, ok("b", false)),
            (
                "its last second",
                &open,
                &secret,
                k2,
                "b",
                99,
                ok("b", false),
            ),
            ("expired", &open, &secret, k2, "b", 100, expired),
            (
                "repeated after expiry",
                &open,
                &secret,
                k1,
                "a",
                500,
                ok("a", true),
            ),
            (
                "the same key, another name",
                &full,
                &secret,
                k1,
                "b",
                0,
                used.clone(),
            ),
            (
                "another key, the same name",
                &full,
                &secret,
                k2,
                "a",
                0,
                used,
            ),
            (
                "bound to its node",
                &bound,
                &secret,
                k2,
                "b",
                0,
                ok("b", false),
            ),
            ("bound to another", &bound, &secret, k2, "a", 0, other),
            (
                "a wrong secret, repeated",
                &open,
                &wrong,
                k1,
                "a",
                0,
                unknown.clone(),
            ),
            (
                "a wrong secret tells nothing",
                &bound,
                &wrong,
                k2,
                "a",
                500,
                unknown,
            ),
        ] {
            assert_eq!(
                token.admit(secret.bytes(), key, &name(node), at(now)),
                want,
                "{what}"
            );
        }
    }

    #[tokio::test]
    async fn the_cluster_keeps_the_hash_and_not_the_secret() {
        let fake = FakeApi::new();
        let secret = TokenSecret::generate().unwrap();
        let wish = TokenWish {
            ttl: Duration::from_secs(60),
            uses: 3,
            node: Some(name("a")),
            labels: BTreeMap::from([("site".into(), "x".into())]),
            taints: vec![NodeTaint {
                key: "k".into(),
                value: "v".into(),
                effect: "NoSchedule".into(),
            }],
        };
        let tokens = Tokens::build(&fake.client());
        let made = tokens.create(wish, &secret, at(0)).await.unwrap();
        let found = tokens.find(&made.id).await.unwrap().unwrap();
        assert!(found == made);
        assert_eq!(
            (found.uses, found.left(), &found.node),
            (3, 3, &Some(name("a")))
        );
        let path = format!(
            "/api/v1/namespaces/edge-system/secrets/cloudcore-token-{}",
            made.id
        );
        let kept = fake.get(&path).unwrap();
        let data = kept["data"].as_object().unwrap().values();
        use base64::Engine;
        for value in data {
            let value = base64::engine::general_purpose::STANDARD
                .decode(value.as_str().unwrap())
                .unwrap();
            assert!(!value.windows(32).any(|w| w == secret.bytes()));
            assert_ne!(value, crate::hex(secret.bytes()).as_bytes());
        }
    }

    #[tokio::test]
    async fn of_two_uses_of_one_reading_only_one_is_recorded() {
        let fake = FakeApi::new();
        let secret = TokenSecret::generate().unwrap();
        let wish = TokenWish {
            ttl: Duration::from_secs(60),
            uses: 1,
            node: None,
            labels: BTreeMap::new(),
            taints: Vec::new(),
        };
        let tokens = Tokens::build(&fake.client());
        let read = tokens.create(wish, &secret, at(0)).await.unwrap();
        let record = async |n: u8, node: &str| {
            tokens
                .record_use(&read, KeyId([n; 32]), &name(node), at(1))
                .await
                .unwrap()
                .is_some()
        };
        assert!(record(1, "a").await);
        assert!(!record(2, "b").await);
        assert_eq!(tokens.find(&read.id).await.unwrap().unwrap().left(), 0);
    }

    #[tokio::test]
    async fn a_token_that_expired_long_ago_is_swept_and_no_other() {
        let fake = FakeApi::new();
        let tokens = Tokens::build(&fake.client());
        let mut ids = Vec::new();
        for hours in [1, 24, 100 * 365 * 24] {
            let wish = TokenWish {
                ttl: Duration::from_secs(hours * 3600),
                uses: 1,
                node: None,
                labels: BTreeMap::new(),
                taints: Vec::new(),
            };
            let secret = TokenSecret::generate().unwrap();
            ids.push(tokens.create(wish, &secret, at(0)).await.unwrap().id);
        }
        let day = 86_400;
        let left = async |now| {
            tokens.sweep(at(now)).await.unwrap();
            let mut left = Vec::new();
            for id in &ids {
                left.push(tokens.find(id).await.unwrap().is_some());
            }
            left
        };
        assert_eq!(left(7 * day + 3599).await, [true, true, true]);
        assert_eq!(left(7 * day + 3601).await, [false, true, true]);
        assert_eq!(left(9 * day).await, [false, false, true]);
    }

    #[tokio::test]
    async fn an_id_that_cannot_be_one_costs_no_request() {
        let fake = FakeApi::new();
        let tokens = Tokens::build(&fake.client());
        for id in ["", "../../x", "abcdefghi", "ABCDEFGH", "abcdefg/"] {
            assert!(tokens.find(id).await.unwrap().is_none(), "{id}");
        }
        assert!(fake.requests().is_empty());
    }
}
