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

/// Reviews of each kind under way: strangers must not take the API server's time from the rest, nor
/// with their tokens the places of those who are known.
const AT_ONCE: usize = 32;
const DEADLINE: Duration = Duration::from_secs(10);

type Decision = (Arc<User>, NodeName, &'static str, &'static str);

/// See the module.
pub(in crate::stream) struct Reviews {
    client: Client,
    tokens: Cache<[u8; 32], Option<Arc<User>>>,
    decisions: Cache<Decision, bool>,
    token_places: Semaphore,
    access_places: Semaphore,
}

impl Reviews {
    /// `client` acts as CloudCore.
    pub(in crate::stream) fn new(client: Client) -> Self {
        Self {
            client,
            tokens: Cache::new(MOST_TOKENS),
            decisions: Cache::new(MOST_DECISIONS),
            token_places: Semaphore::new(AT_ONCE),
            access_places: Semaphore::new(AT_ONCE),
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
        let reviewed = self.create(&self.token_places, "reviewing a token", review);
        let status = reviewed.await?.status;
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
        let reviewed = self.create(&self.access_places, "reviewing an access", review);
        let status = reviewed.await?.status;
        Ok(status.is_some_and(|s| s.allowed && s.denied != Some(true)))
    }

    async fn create<K>(
        &self,
        places: &Semaphore,
        what: &'static str,
        review: K,
    ) -> Result<K, KubeError>
    where
        K: kube::Resource<DynamicType = (), Scope = kube::core::ClusterResourceScope>
            + serde::Serialize
            + serde::de::DeserializeOwned
            + Clone
            + std::fmt::Debug,
    {
        let (api, params) = (Api::all(self.client.clone()), PostParams::default());
        let asked = async {
            let _place = places.acquire().await;
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

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::Mutex;

    use http::{Request, Response};
    use http_body_util::BodyExt;
    use kube::client::Body;
    use serde_json::{Value, json};
    use tokio::time::{advance, timeout};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Counts what it is asked. Token `good` is jane's, who may `get`; with `silent` it never
    /// answers about tokens.
    fn reviews(silent: bool) -> (Reviews, Arc<Mutex<usize>>) {
        let asked = Arc::new(Mutex::new(0));
        let count = asked.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let count = count.clone();
            async move {
                let body = request.into_body().collect().await.unwrap().to_bytes();
                let mut review: Value = serde_json::from_slice(&body).unwrap();
                *count.lock().unwrap() += 1;
                let token = &review["spec"]["token"];
                if silent && token.is_string() {
                    std::future::pending::<()>().await;
                }
                review["status"] = if token.is_string() {
                    json!({"authenticated": token == "good", "user": {"username": "jane"}})
                } else {
                    json!({"allowed": review["spec"]["resourceAttributes"]["verb"] == "get"})
                };
                let body = Body::from(review.to_string().into_bytes());
                Ok::<_, Infallible>(Response::new(body))
            }
        });
        (Reviews::new(Client::new(service, "default")), asked)
    }

    fn jane() -> Arc<User> {
        Arc::new(User {
            name: "jane".into(),
            uid: None,
            groups: Vec::new(),
            extra: BTreeMap::new(),
        })
    }

    fn node() -> NodeName {
        NodeName::parse("shop-7").unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn answers_hold_for_the_kubelets_times() {
        let (reviews, asked) = reviews(false);
        let (jane, node) = (jane(), node());
        for (what, holds) in [
            ("good", 120 * SECOND),
            ("bad", 10 * SECOND),
            ("get", 300 * SECOND),
            ("create", 30 * SECOND),
        ] {
            let ask = async || match what {
                "good" | "bad" => assert_eq!(reviews.token(what).await.is_ok(), what == "good"),
                verb => {
                    let allowed = reviews.access(&jane, &node, verb, "proxy").await;
                    assert_eq!(allowed.unwrap(), verb == "get");
                }
            };
            let before = *asked.lock().unwrap();
            let asked = || *asked.lock().unwrap() - before;
            ask().await;
            assert_eq!(asked(), 1, "{what}");
            advance(holds - SECOND).await;
            ask().await;
            assert_eq!(asked(), 1, "{what} still holds");
            advance(SECOND).await;
            ask().await;
            assert_eq!(asked(), 2, "{what} holds no longer");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn strangers_tokens_leave_places_for_those_who_are_known() {
        let (reviews, asked) = reviews(true);
        let reviews = Arc::new(reviews);
        for n in 0..2 * AT_ONCE {
            let reviews = reviews.clone();
            tokio::spawn(async move { reviews.token(&n.to_string()).await });
        }
        while *asked.lock().unwrap() < AT_ONCE {
            tokio::task::yield_now().await;
        }
        let (jane, node) = (jane(), node());
        let access = reviews.access(&jane, &node, "get", "metrics");
        let allowed = timeout(SECOND, access).await;
        assert!(allowed.expect("a place at once").unwrap());
    }
}
