//! How this API server lets CloudCore act as a node: proven by asking it, never by its version.
//!
//! A SelfSubjectReview as a node, without a group header, is answered with the node's own user in
//! `system:nodes` where the server has constrained impersonation, and refused where it has not,
//! since CloudCore has no plain `impersonate`.
//!
//! Only a definite answer changes the mode. A server that just started answers 403 to everything
//! until its RBAC is loaded, one that ends answers 5xx or nothing: such a proof is doubtful, keeps
//! the mode that was proven last, and is made again within seconds.
//!
//! ```text
//!   at rest ──403 for a node──► proving ──the same mode, or the other one twice──► at rest
//!                               ▲     │ doubtful, or the other one for the first time
//!                               └─────┘ backoff
//! ```

use std::time::Duration;

use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use kube::api::PostParams;
use kube::{Api, Client};

use common::backoff::Backoff;
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
/// Between two definite proofs: a 403 may be about the one object and come in numbers.
const PROVE_EVERY: Duration = Duration::from_secs(30);
/// After a proof that showed nothing, or contradicts the last one: doubled up to [`PROVE_EVERY`].
const PROVE_AGAIN: Duration = Duration::from_secs(1);
/// A server that is upgraded refuses nothing that the direct role allows: it is asked now and then.
const LOOK_FOR_MORE: Duration = Duration::from_secs(600);

/// The mode that was proven last, and whether the proof after it showed another.
struct Belief {
    proven: Mode,
    contradicted: bool,
}

/// What follows a proof.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// The mode is known.
    Rest,
    AskAgain,
}

impl Belief {
    fn new(proven: Mode) -> Self {
        Self {
            proven,
            contradicted: false,
        }
    }

    /// Takes one proof; none is a doubtful one. Another mode counts when it is shown twice in a
    /// row: of several API servers behind one address, one may be a step behind.
    fn weigh(&mut self, proof: Option<Mode>) -> Next {
        let contradicts = proof.is_some_and(|mode| mode != self.proven);
        let (mode, known) = match proof {
            Some(mode) if !contradicts || self.contradicted => (mode, true),
            Some(_) | None => (self.proven, false),
        };
        self.proven = mode;
        self.contradicted = contradicts && !known;
        if known { Next::Rest } else { Next::AskAgain }
    }
}

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
        Err(Some(403)) => Some(Mode::Direct),
        // A token that is not taken says nothing about what it may do.
        Err(_) => None,
    }
}

/// Proves which mode the server has; an error proves nothing. A refusal counts where the server
/// refuses again once it has shown that it knows CloudCore's rights.
async fn prove(clients: &KubeClients) -> Result<Mode, KubeError> {
    match review_as_node(clients).await? {
        Mode::Direct if !has_role(clients.own()).await? => Err(KubeError::NoRole),
        Mode::Direct => review_as_node(clients).await,
        mode @ (Mode::Constrained | Mode::Unproven) => Ok(mode),
    }
}

async fn review_as_node(clients: &KubeClients) -> Result<Mode, KubeError> {
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

/// Whether RBAC knows what CloudCore needs for the proof: until then a refusal says nothing.
async fn has_role(client: Client) -> Result<bool, KubeError> {
    let needed = [
        ("nodes", "impersonate:arbitrary-node"),
        ("selfsubjectreviews", "impersonate-on:arbitrary-node:create"),
    ];
    for (resource, verb) in needed {
        if !may(client.clone(), resource, verb).await? {
            return Ok(false);
        }
    }
    Ok(true)
}

async fn may(client: Client, resource: &str, verb: &str) -> Result<bool, KubeError> {
    let review = SelfSubjectAccessReview {
        spec: SelfSubjectAccessReviewSpec {
            resource_attributes: Some(ResourceAttributes {
                group: Some("authentication.k8s.io".into()),
                resource: Some(resource.into()),
                verb: Some(verb.into()),
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
            let mode = prove(clients).await?;
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

/// Proves the mode again after a 403 for a node. Never returns.
pub(crate) async fn keep_true(clients: &KubeClients) {
    if clients.shared.choice != Impersonation::Auto {
        std::future::pending::<()>().await;
    }
    let mut belief = Belief::new(*clients.shared.mode.borrow());
    loop {
        wait_for_doubt(clients, belief.proven).await;
        prove_until_known(clients, &mut belief).await;
        let mode = belief.proven;
        let before = clients.shared.mode.send_replace(mode);
        if before != mode {
            tracing::warn!(
                ?before,
                ?mode,
                "the API server changed how nodes are acted for"
            );
        }
        tokio::time::sleep(PROVE_EVERY).await;
    }
}

async fn wait_for_doubt(clients: &KubeClients, proven: Mode) {
    let doubted = clients.shared.doubted.notified();
    match proven {
        Mode::Direct => {
            let _ = tokio::time::timeout(LOOK_FOR_MORE, doubted).await;
        }
        Mode::Constrained | Mode::Unproven => doubted.await,
    }
}

async fn prove_until_known(clients: &KubeClients, belief: &mut Belief) {
    let mut waits = Backoff::new(PROVE_AGAIN, PROVE_EVERY);
    loop {
        let proof = prove(clients).await;
        if let Err(error) = &proof {
            let (error, mode) = (crate::chain(error), belief.proven);
            tracing::warn!(%error, ?mode, "how nodes are acted for is not proven; it stays as it was");
        }
        if belief.weigh(proof.ok()) == Next::Rest {
            return;
        }
        tokio::time::sleep(waits.next_wait(rand::random())).await;
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
            (Err(Some(401)), None),
            (Err(Some(500)), None),
            (Err(None), None),
        ] {
            assert_eq!(judge(answer, "system:node:a"), want);
        }
    }

    #[test]
    fn another_mode_counts_when_it_is_shown_twice_in_a_row() {
        use Mode::{Constrained, Direct};
        use Next::{AskAgain, Rest};
        let histories: [(&[Option<Mode>], Next, Mode); 6] = [
            (&[Some(Constrained)], Rest, Constrained),
            (&[None, None], AskAgain, Constrained),
            (&[Some(Direct)], AskAgain, Constrained),
            (&[Some(Direct), None, Some(Direct)], AskAgain, Constrained),
            (&[Some(Direct), Some(Constrained)], Rest, Constrained),
            (&[None, Some(Direct), Some(Direct)], Rest, Direct),
        ];
        for (proofs, next, mode) in histories {
            let mut belief = Belief::new(Constrained);
            let last = proofs.iter().map(|proof| belief.weigh(*proof)).last();
            assert_eq!((last, belief.proven), (Some(next), mode), "{proofs:?}");
        }
    }
}
