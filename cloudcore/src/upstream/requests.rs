//! What a node asks for and the API server answers at once: ServiceAccount tokens.
//!
//! - Takes: a question of an edge, the Pod that it names as the watch knows it.
//! - Gives: a token bound to that Pod with its lifetime as a duration, since clocks are wrong; or
//!   a failure that says what is wrong and whether to ask again.
//! - Never: logs or keeps a token; asks the API server for a Pod that is not this node's or for an
//!   account that is not this Pod's (the API server would refuse it again).

use common::hub::proto::response::Body;
use common::hub::proto::{Failure, TokenAsk, TokenGiven};
use common::ids::{Kind, NodeName, ObjectKey};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::shared::{Counter, Shared};
use super::views::{Fresh, PodView};
use super::writer::{Call, WriteError};

/// Why there is no token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum TokenError {
    #[error("the question names {0:?}, which is no Pod with its UID")]
    NotAPod(String),
    #[error("Pod {0} is not known here yet")]
    Unknown(ObjectKey),
    #[error("Pod {0} is not a Pod of this node")]
    NotOurs(ObjectKey),
    #[error("Pod {pod} runs as ServiceAccount {has:?}, not as {asked:?}")]
    OtherAccount {
        pod: ObjectKey,
        has: String,
        asked: String,
    },
    #[error("CloudCore is not sure that it still holds this node")]
    NotFresh,
    #[error("ServiceAccount {0} does not exist")]
    NoAccount(String),
    #[error("no token for Pod {pod}: {why}")]
    Refused { pod: ObjectKey, why: WriteError },
    #[error("the API server's answer to the token request holds no token")]
    Empty,
}

impl TokenError {
    /// Whether asking again later may succeed.
    fn retry(&self) -> bool {
        match self {
            Self::Unknown(_) | Self::NotFresh | Self::NoAccount(_) | Self::Empty => true,
            Self::NotAPod(_) | Self::NotOurs(_) | Self::OtherAccount { .. } => false,
            Self::Refused { why, .. } => match why {
                WriteError::Forbidden(_)
                | WriteError::Busy { .. }
                | WriteError::Unavailable(_)
                | WriteError::Conflict
                | WriteError::Missing => true,
                WriteError::Exists
                | WriteError::AnotherObject
                | WriteError::NamespaceEnding
                | WriteError::Invalid(_) => false,
            },
        }
    }
}

/// The call that answers a question, if the node may ask it.
fn call(node: &NodeName, ask: &TokenAsk, view: Option<&PodView>) -> Result<Call, TokenError> {
    let not_a_pod = || TokenError::NotAPod(ask.pod.chars().take(300).collect());
    let key = ObjectKey::parse(&ask.pod).map_err(|_| not_a_pod())?;
    if key.kind != Kind::Pod || key.uid.is_empty() {
        return Err(not_a_pod());
    }
    let Some(view) = view else {
        return Err(TokenError::Unknown(key));
    };
    let same = view.uid == key.uid && view.namespace == key.namespace && view.name == key.name;
    if view.node != *node || !same {
        return Err(TokenError::NotOurs(key));
    }
    if *view.service_account != *ask.service_account {
        let (has, asked) = (
            view.service_account.to_string(),
            ask.service_account.clone(),
        );
        return Err(TokenError::OtherAccount {
            pod: key,
            has,
            asked,
        });
    }
    // An empty list of audiences is the API server's own.
    let audiences: Vec<&str> = Some(ask.audience.as_str())
        .filter(|a| !a.is_empty())
        .into_iter()
        .collect();
    let body = json!({
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenRequest",
        "metadata": {"name": ask.service_account, "namespace": key.namespace},
        "spec": {
            "audiences": audiences,
            "expirationSeconds": ask.expiration_seconds,
            "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": key.name, "uid": key.uid},
        },
    });
    Ok(Call::RequestToken {
        namespace: key.namespace.to_string(),
        service_account: ask.service_account.clone(),
        body,
    })
}

/// The token of an answer. Its lifetime is what the server granted; a server that does not say so
/// gives the time when it ends.
fn given(answer: &Value, now: Timestamp) -> Option<TokenGiven> {
    let token = answer
        .pointer("/status/token")?
        .as_str()
        .filter(|t| !t.is_empty())?;
    let granted = answer
        .pointer("/spec/expirationSeconds")
        .and_then(Value::as_i64);
    let ends = || -> Option<i64> {
        let at: Timestamp = answer
            .pointer("/status/expirationTimestamp")?
            .as_str()?
            .parse()
            .ok()?;
        Some(at.as_second() - now.as_second())
    };
    let lifetime_seconds = granted.filter(|g| *g > 0).or_else(ends)?;
    Some(TokenGiven {
        token: token.to_string(),
        lifetime_seconds,
    })
}

async fn ask(
    shared: &Shared,
    node: &NodeName,
    claim: &dyn Fresh,
    ask: &TokenAsk,
) -> Result<TokenGiven, TokenError> {
    let key = ObjectKey::parse(&ask.pod);
    let view = key.as_ref().ok().and_then(|key| shared.pods.pod(&key.uid));
    let call = call(node, ask, view.as_ref())?;
    if !claim.fresh() {
        return Err(TokenError::NotFresh);
    }
    let Ok(_permit) = shared.aside.acquire().await else {
        return Err(TokenError::NotFresh);
    };
    let answer = shared
        .writer
        .send(node, call)
        .await
        .map_err(|why| match (why, key) {
            (WriteError::Missing, Ok(key)) => {
                TokenError::NoAccount(format!("{}/{}", key.namespace, ask.service_account))
            }
            (why, Ok(pod)) => TokenError::Refused { pod, why },
            (_, Err(_)) => TokenError::Empty,
        })?;
    given(&answer, shared.now()).ok_or(TokenError::Empty)
}

/// Answers a question for a token.
pub(super) async fn token(
    shared: &Shared,
    node: &NodeName,
    claim: &dyn Fresh,
    question: &TokenAsk,
) -> Body {
    match ask(shared, node, claim, question).await {
        Ok(given) => {
            shared.count(Counter::TokensGiven);
            Body::Token(given)
        }
        Err(error) => {
            tracing::debug!(%node, %error, "a token is not given");
            shared.count(Counter::TokensRefused);
            let retry = error.retry();
            Body::Failure(Failure {
                message: error.to_string(),
                retry,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn node() -> NodeName {
        NodeName::parse("edge-1").unwrap()
    }

    fn view(node: &str) -> PodView {
        PodView {
            namespace: "shop".into(),
            name: "web-0".into(),
            uid: "u-1".into(),
            resource_version: 1,
            node: NodeName::parse(node).unwrap(),
            deleting: false,
            service_account: "web".into(),
            status: Arc::from(*b"{}"),
        }
    }

    fn question(pod: &str, account: &str) -> TokenAsk {
        TokenAsk {
            pod: pod.into(),
            service_account: account.into(),
            audience: String::new(),
            expiration_seconds: 3607,
        }
    }

    const POD: &str = "Pod/shop/web-0/u-1";

    #[test]
    fn a_token_is_bound_to_the_pod() {
        let got = call(&node(), &question(POD, "web"), Some(&view("edge-1")));
        let Ok(Call::RequestToken {
            namespace,
            service_account,
            body,
        }) = got
        else {
            panic!("refused");
        };
        assert_eq!(
            (namespace.as_str(), service_account.as_str()),
            ("shop", "web")
        );
        let want = json!({"audiences": [], "expirationSeconds": 3607, "boundObjectRef":
            {"apiVersion": "v1", "kind": "Pod", "name": "web-0", "uid": "u-1"}});
        assert_eq!(body["spec"], want);
        let vault = TokenAsk {
            audience: "vault".into(),
            ..question(POD, "web")
        };
        let Ok(Call::RequestToken { body, .. }) = call(&node(), &vault, Some(&view("edge-1")))
        else {
            panic!("refused");
        };
        assert_eq!(body["spec"]["audiences"], json!(["vault"]));
    }

    #[test]
    fn only_for_a_pod_of_this_node_and_its_own_account() {
        let ours = || Some(view("edge-1"));
        for (pod, account, view, retry) in [
            (POD, "web", None, true),
            (POD, "web", Some(view("edge-2")), false),
            (POD, "admin", ours(), false),
            ("Pod/shop/web-1/u-1", "web", ours(), false),
            ("Pod/other/web-0/u-1", "web", ours(), false),
            ("Pod/shop/web-0", "web", ours(), false),
            ("Secret/shop/web-0/u-1", "web", ours(), false),
            ("nonsense", "web", ours(), false),
        ] {
            let error = call(&node(), &question(pod, account), view.as_ref()).unwrap_err();
            assert_eq!(error.retry(), retry, "{pod} {account}: {error}");
        }
    }

    #[test]
    fn the_lifetime_is_a_duration() {
        let now: Timestamp = "2026-11-23T12:00:00Z".parse().unwrap();
        let life = |answer: Value| given(&answer, now).map(|g| g.lifetime_seconds);
        let ends = "2026-11-23T12:10:00Z";
        for (answer, want) in [
            (
                json!({"spec": {"expirationSeconds": 3607}, "status": {"token": "t"}}),
                Some(3607),
            ),
            (
                json!({"status": {"token": "t", "expirationTimestamp": ends}}),
                Some(600),
            ),
            (
                json!({"spec": {"expirationSeconds": 3607}, "status": {"token": ""}}),
                None,
            ),
            (json!({"status": {"token": "t"}}), None),
        ] {
            assert_eq!(life(answer.clone()), want, "{answer}");
        }
    }

    #[test]
    fn each_refusal_says_whether_to_ask_again() {
        let pod = || ObjectKey::pod("shop", "web-0", "u-1");
        for (why, retry) in [
            (WriteError::Forbidden("the graph lags".into()), true),
            (WriteError::Unavailable("down".into()), true),
            (WriteError::Busy { retry_after: None }, true),
            (WriteError::Invalid("expirationSeconds".into()), false),
            (WriteError::AnotherObject, false),
        ] {
            assert_eq!(TokenError::Refused { pod: pod(), why }.retry(), retry);
        }
    }
}
