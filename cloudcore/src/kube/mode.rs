//! How this API server lets CloudCore act as a node: proven by asking it, never by its version.
//!
//! A SelfSubjectReview as a node, without a group header, is answered with the node's own user in
//! `system:nodes` where the server has constrained impersonation, and refused where it has not,
//! since CloudCore has no plain `impersonate`.

use std::time::Duration;

use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use kube::api::PostParams;
use kube::{Api, Client};

use common::ids::NodeName;

use super::{KubeClients, KubeError, status_code};

/// What the operator wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Impersonation {
    /// What the server has.
    #[default]
    Auto,
    /// Constrained impersonation, or refuse to start.
    Constrained,
    /// CloudCore's own narrow role.
    Direct,
}

impl std::str::FromStr for Impersonation {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "constrained" => Ok(Self::Constrained),
            "direct" => Ok(Self::Direct),
            other => Err(format!("{other:?} is none of auto, constrained, direct")),
        }
    }
}

/// How requests for a node are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Not asked yet: impersonates.
    Unproven,
    /// As `system:node:NAME`: the API server's Node authorizer and NodeRestriction decide.
    Constrained,
    /// As CloudCore under its direct role.
    Direct,
}

/// The name that is asked for: no device can have it, since it never gets an enrolment.
const PROBE: &str = "cloudcore-probe.invalid";
/// RBAC reaches the authorizer through a watch: what `install` wrote counts within moments.
const ROLE_WITHIN: Duration = Duration::from_secs(10);
/// Between two proofs: a 403 may be about the one object and come in numbers.
const PROVE_EVERY: Duration = Duration::from_secs(30);

/// What the answer to a SelfSubjectReview as a node shows.
fn judge(answer: Result<&SelfSubjectReview, Option<u16>>, user: &str) -> Option<Mode> {
    match answer {
        Ok(review) => {
            let info = review.status.as_ref()?.user_info.as_ref()?;
            let groups = info.groups.as_deref().unwrap_or_default();
            let as_node = info.username.as_deref() == Some(user);
            // The node's user without its group is a plain impersonation: it is not a node there.
            let proven = as_node && groups.iter().any(|g| g == "system:nodes");
            Some(if proven {
                Mode::Constrained
            } else {
                Mode::Direct
            })
        }
        Err(Some(401 | 403)) => Some(Mode::Direct),
        Err(_) => None,
    }
}

/// Asks the server once which mode it has.
pub(crate) async fn ask(clients: &KubeClients) -> Result<Mode, KubeError> {
    let node = NodeName::parse(PROBE).expect("the probe's name is a node name");
    let mut request = kube::core::Request::new("/apis/authentication.k8s.io/v1/selfsubjectreviews")
        .create(
            &PostParams::default(),
            br#"{"apiVersion":"authentication.k8s.io/v1","kind":"SelfSubjectReview"}"#.to_vec(),
        )
        .map_err(|e| KubeError::api("a SelfSubjectReview")(kube::Error::BuildRequest(e)))?;
    request
        .extensions_mut()
        .insert(super::service::AlwaysAsNode(node.clone()));
    let answer = clients.own().request::<SelfSubjectReview>(request).await;
    let judged = judge(answer.as_ref().map_err(status_code), &node.user());
    match (judged, answer) {
        (Some(mode), _) => Ok(mode),
        (None, Err(e)) => Err(KubeError::api("a SelfSubjectReview as a node")(e)),
        (None, Ok(_)) => Err(KubeError::Malformed {
            what: "the answer to a SelfSubjectReview".into(),
            why: "it names no user".into(),
        }),
    }
}

/// Whether RBAC knows CloudCore's right to act as nodes: until then a refusal says nothing.
async fn has_role(client: Client) -> Result<bool, KubeError> {
    let review = SelfSubjectAccessReview {
        spec: SelfSubjectAccessReviewSpec {
            resource_attributes: Some(ResourceAttributes {
                group: Some("authentication.k8s.io".into()),
                resource: Some("nodes".into()),
                verb: Some("impersonate:arbitrary-node".into()),
                ..ResourceAttributes::default()
            }),
            non_resource_attributes: None,
        },
        ..SelfSubjectAccessReview::default()
    };
    let answer = Api::<SelfSubjectAccessReview>::all(client)
        .create(&PostParams::default(), &review)
        .await
        .map_err(KubeError::api("a SelfSubjectAccessReview"))?;
    Ok(answer.status.is_some_and(|s| s.allowed))
}

/// Proves the mode at the start, giving RBAC the time to arrive.
pub(crate) async fn settle(clients: &KubeClients) -> Result<Mode, KubeError> {
    let mode = match clients.shared.choice {
        Impersonation::Direct => Mode::Direct,
        choice @ (Impersonation::Auto | Impersonation::Constrained) => {
            wait_for_role(clients).await?;
            let mode = ask(clients).await?;
            if choice == Impersonation::Constrained && mode != Mode::Constrained {
                return Err(KubeError::NoConstrainedImpersonation);
            }
            mode
        }
    };
    clients.shared.mode.send_replace(mode);
    Ok(mode)
}

async fn wait_for_role(clients: &KubeClients) -> Result<(), KubeError> {
    let arrived = async {
        while !has_role(clients.own()).await? {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        Ok(())
    };
    tokio::time::timeout(ROLE_WITHIN, arrived)
        .await
        .unwrap_or(Err(KubeError::NoRole))
}

/// Asks again after a 403 as a node. Never returns.
pub(crate) async fn keep_true(clients: &KubeClients) {
    loop {
        clients.shared.doubted.notified().await;
        if clients.shared.choice == Impersonation::Auto {
            match ask(clients).await {
                Ok(mode) => {
                    let before = clients.shared.mode.send_replace(mode);
                    if before != mode {
                        tracing::warn!(
                            ?before,
                            ?mode,
                            "the API server changed how nodes are acted for"
                        );
                    }
                }
                Err(error) => {
                    tracing::warn!(error = %crate::chain(&error), "the mode of acting as a node is not proven");
                }
            }
        }
        tokio::time::sleep(PROVE_EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn review(user: &str, groups: &[&str]) -> SelfSubjectReview {
        serde_json::from_value(serde_json::json!({
            "status": {"userInfo": {"username": user, "groups": groups}}
        }))
        .unwrap()
    }

    #[test]
    fn only_the_nodes_own_user_in_its_group_proves_constrained_impersonation() {
        let node = review("system:node:a", &["system:nodes", "system:authenticated"]);
        let groupless = review("system:node:a", &["system:authenticated"]);
        let ignored = review(
            "system:serviceaccount:edge-system:cloudcore",
            &["system:nodes"],
        );
        for (answer, want) in [
            (Ok(&node), Some(Mode::Constrained)),
            (Ok(&groupless), Some(Mode::Direct)),
            (Ok(&ignored), Some(Mode::Direct)),
            (Err(Some(403)), Some(Mode::Direct)),
            (Err(Some(500)), None),
            (Err(None), None),
        ] {
            assert_eq!(judge(answer, "system:node:a"), want);
        }
    }
}
