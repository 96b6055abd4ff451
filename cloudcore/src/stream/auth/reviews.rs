//! What the API server is asked about a caller: TokenReview and SubjectAccessReview, and for how
//! long its answers hold (the kubelet's own times).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use common::ids::NodeName;
use common::pki::sha256;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
};
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::cache::Cache;
use super::{AUTHENTICATED, Bad, Refused, User};
use crate::kube::KubeError;

/// `authentication.webhook.cacheTTL` of a kubelet's configuration.
const TOKEN_FOR: Duration = Duration::from_secs(120);
/// A stranger that repeats itself costs the API server one review in this time.
const BAD_TOKEN_FOR: Duration = Duration::from_secs(10);
/// `authorization.webhook.cacheAuthorizedTTL` and `cacheUnauthorizedTTL`.
const ALLOWED_FOR: Duration = Duration::from_secs(300);
const DENIED_FOR: Duration = Duration::from_secs(30);

/// A scraper and an API server for each of thousands of nodes; some hundred bytes each.
const MOST_DECISIONS: usize = 16_384;
const MOST_TOKENS: usize = 1024;

/// Reviews under way: strangers with tokens must not take the API server's time from the rest.
const AT_ONCE: usize = 32;
const DEADLINE: Duration = Duration::from_secs(10);

type Decision = (Arc<User>, NodeName, &'static str, &'static str);

/// See the module.
pub(in crate::stream) struct Reviews {
    client: Client,
    tokens: Cache<[u8; 32], Option<Arc<User>>>,
    decisions: Cache<Decision, bool>,
    places: Semaphore,
}

impl Reviews {
    /// `client` acts as CloudCore.
    pub(in crate::stream) fn new(client: Client) -> Self {
        Self {
            client,
            tokens: Cache::new(MOST_TOKENS),
            decisions: Cache::new(MOST_DECISIONS),
            places: Semaphore::new(AT_ONCE),
        }
    }

    /// Whose token it is.
    pub(super) async fn token(&self, token: &str) -> Result<Arc<User>, Refused> {
        let (key, now) = (sha256(token.as_bytes()), Instant::now());
        let bad = || Refused::BadCredentials(Bad::Token);
        if let Some(known) = self.tokens.find(&key, now) {
            return known.ok_or_else(bad);
        }
        let reviewed = self.review_token(token).await;
        let user = reviewed
            .map_err(|e| Refused::NotAuthenticated(Box::new(e)))?
            .map(Arc::new);
        let for_so_long = if user.is_some() {
            TOKEN_FOR
        } else {
            BAD_TOKEN_FOR
        };
        self.tokens.keep(key, user.clone(), now, now + for_so_long);
        user.ok_or_else(bad)
    }

    /// Whether the user may do `verb` on `nodes/SUBRESOURCE` of this node.
    pub(super) async fn access(
        &self,
        user: &Arc<User>,
        node: &NodeName,
        verb: &'static str,
        subresource: &'static str,
    ) -> Result<bool, Refused> {
        let (key, now) = (
            (user.clone(), node.clone(), verb, subresource),
            Instant::now(),
        );
        if let Some(known) = self.decisions.find(&key, now) {
            return Ok(known);
        }
        let reviewed = self.review_access(user, node, verb, subresource).await;
        let allowed = reviewed.map_err(|source| Refused::NotJudged {
            user: user.name.clone(),
            verb,
            subresource,
            source: Box::new(source),
        })?;
        let for_so_long = if allowed { ALLOWED_FOR } else { DENIED_FOR };
        self.decisions.keep(key, allowed, now, now + for_so_long);
        Ok(allowed)
    }

    async fn review_token(&self, token: &str) -> Result<Option<User>, KubeError> {
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: Some(token.to_owned()),
                audiences: None,
            },
            ..TokenReview::default()
        };
        let status = self.create("reviewing a token", review).await?.status;
        let status = status.filter(|s| s.authenticated == Some(true));
        Ok(status.and_then(|s| s.user).and_then(known))
    }

    async fn review_access(
        &self,
        user: &User,
        node: &NodeName,
        verb: &str,
        subresource: &str,
    ) -> Result<bool, KubeError> {
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: Some(user.name.clone()),
                uid: user.uid.clone(),
                groups: Some(user.groups.clone()),
                extra: Some(user.extra.clone()).filter(|e| !e.is_empty()),
                resource_attributes: Some(ResourceAttributes {
                    verb: Some(verb.to_owned()),
                    version: Some("v1".to_owned()),
                    resource: Some("nodes".to_owned()),
                    subresource: Some(subresource.to_owned()),
                    name: Some(node.as_str().to_owned()),
                    ..ResourceAttributes::default()
                }),
                ..SubjectAccessReviewSpec::default()
            },
            ..SubjectAccessReview::default()
        };
        let status = self.create("reviewing an access", review).await?.status;
        Ok(status.is_some_and(|s| s.allowed && s.denied != Some(true)))
    }

    async fn create<K>(&self, what: &'static str, review: K) -> Result<K, KubeError>
    where
        K: kube::Resource<DynamicType = (), Scope = kube::core::ClusterResourceScope>
            + serde::Serialize
            + serde::de::DeserializeOwned
            + Clone
            + std::fmt::Debug,
    {
        let (api, params) = (Api::all(self.client.clone()), PostParams::default());
        let asked = async {
            let _place = self.places.acquire().await;
            api.create(&params, &review).await
        };
        match tokio::time::timeout(DEADLINE, asked).await {
            Ok(answer) => answer.map_err(KubeError::api(what)),
            Err(_) => Err(KubeError::Silent {
                what: what.to_owned(),
                after: DEADLINE,
            }),
        }
    }
}

fn known(user: UserInfo) -> Option<User> {
    let mut groups = user.groups.unwrap_or_default();
    if !groups.iter().any(|g| g == AUTHENTICATED) {
        groups.push(AUTHENTICATED.to_owned());
    }
    let extra: BTreeMap<_, _> = user.extra.unwrap_or_default();
    Some(User {
        name: user.username.filter(|name| !name.is_empty())?,
        uid: user.uid.filter(|uid| !uid.is_empty()),
        groups,
        extra,
    })
}
