//! Enrolment: from a join token to a certificate, and what follows it.
//!
//! - Owns: the decision who may join, and the records of it (tokens, enrolments, the CA).
//! - Takes: a [`JoinRequest`] from a listener that asks for no client certificate; a CSR over an
//!   existing session for a renewal.
//! - Gives: a certificate chain and the link, or one sentence of refusal.
//! - Never: takes anything from a CSR but its public key; writes a secret into a log; decides from
//!   a cache.
//!
//! ```text
//!  request ─► token admits? ─► name free? ─► use recorded ─► enrolment written ─► Node made ─► signed
//!             (each step may be repeated by the same key: the answer can be lost)
//! ```

pub mod authority;
pub mod cache;
pub mod link;
pub mod record;
pub mod refusal;
pub mod revoke;
pub mod tokens;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::Client;
use kube::api::PostParams;
use rustls::pki_types::{CertificateDer, UnixTime};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use common::hub::proto::{JoinRequest, Joined, Link, Refused};
use common::ids::NodeName;
use common::pki::csr::{VerifiedCsr, verify_csr};
use common::pki::identity::ReenrolError;
use common::pki::{KeyId, NodeIdentity, Validity, check_reenrolment};

use crate::hub::pace::Pace;
use crate::kube::{KubeError, is_conflict};
use crate::nodes::{self, birth};

use authority::Authority;
use record::{Enrolment, EnrolmentSpec, Key, record, records};
use refusal::Refusal;
use tokens::{Admitted, TokenRecord, Tokens};

/// The version of the join conversation that this CloudCore speaks.
const VERSION: u32 = 1;

/// A name becomes the value of label `kubernetes.io/hostname`, which takes 63 characters.
const NAME_LIMIT: usize = 63;

/// Joins decided at once: each costs the API server up to ten requests, and a fleet that joins in
/// one moment must not crowd out the sessions of those that are in.
const AT_ONCE: usize = 16;

/// How long a device waits for its turn; it gives up after 10 s.
const TURN: Duration = Duration::from_secs(4);

/// Between two looks for tokens that expired long ago.
const SWEEP_EVERY: Duration = Duration::from_secs(6 * 3600);
/// And before the first: whoever starts cloudcore again and again does not list each time.
const SWEEP_FIRST: Duration = Duration::from_secs(300);

/// Lines about refusals: strangers cause them.
const REFUSALS_LOGGED: (u32, Duration) = (20, Duration::from_secs(3));

/// How often a decision that another writer overtook is taken anew.
const TRIES: usize = 16;

/// How long certificates hold and how new Nodes are made.
#[derive(Debug, Clone)]
pub struct EnrollConfig {
    pub certificate_lifetime: Duration,
    /// How long after its end a certificate still gets its holder a new one.
    pub grace: Duration,
    /// Whether new Nodes get the taint `node-role.kubernetes.io/edge:NoSchedule`.
    pub taint_nodes: bool,
}

/// Why a certificate was not renewed.
#[derive(Debug, thiserror::Error)]
pub enum RenewError {
    #[error("the request of {0} cannot be used")]
    Request(NodeName, #[source] common::pki::PkiError),
    #[error("{0} has no enrolment for the key of this session")]
    NotEnrolled(NodeName),
    #[error("the renewal for {0} was not recorded")]
    Kube(NodeName, #[source] KubeError),
}

/// Decides who joins. Cheap to share behind an `Arc`.
pub struct Enroller {
    client: Client,
    tokens: Tokens,
    authority: Arc<Authority>,
    link: Link,
    config: EnrollConfig,
    at_once: Semaphore,
    refusals: Pace<()>,
}

/// A request whose form is right.
struct Asked<'a> {
    request: &'a JoinRequest,
    csr: VerifiedCsr,
    node: NodeName,
    now: Timestamp,
}

impl Enroller {
    /// `client` acts as CloudCore itself ([`crate::kube::KubeClients::own`]).
    pub fn build(
        client: Client,
        authority: Arc<Authority>,
        link: Link,
        config: EnrollConfig,
    ) -> Self {
        Self {
            tokens: Tokens::build(&client),
            client,
            authority,
            link,
            config,
            at_once: Semaphore::new(AT_ONCE),
            refusals: Pace::new(REFUSALS_LOGGED.0, REFUSALS_LOGGED.1),
        }
    }

    /// Answers a device. Idempotent: the same key asking again for the same name gets the same
    /// answer, with a fresh certificate.
    pub async fn join(&self, request: &JoinRequest, peer: SocketAddr) -> Result<Joined, Refused> {
        // In turn: strangers with wrong tokens, who can be many, only make the others wait.
        let decided = match tokio::time::timeout(TURN, self.at_once.acquire()).await {
            Ok(Ok(_place)) => self.decide(request).await,
            Ok(Err(_)) | Err(_) => Err(Refusal::Unavailable {
                why: "too many devices join at this moment",
            }),
        };
        match decided {
            Ok((node, chain)) => {
                tracing::info!(%peer, %node, token = request.token_id, "a device joined");
                Ok(self.joined(&node, chain))
            }
            Err(refusal) => {
                let (name, token) = (printable(&request.node_name), printable(&request.token_id));
                let code = refusal.code().as_str_name();
                if self.refusals.take((), tokio::time::Instant::now()).is_ok() {
                    tracing::warn!(%peer, name, token, code, %refusal, "a device was refused");
                } else {
                    tracing::debug!(%peer, name, token, code, %refusal, "a device was refused");
                }
                Err((&refusal).into())
            }
        }
    }

    fn joined(&self, node: &NodeName, chain: Vec<CertificateDer<'static>>) -> Joined {
        Joined {
            chain: chain.iter().map(|c| c.to_vec()).collect(),
            link: Some(self.link.clone()),
            now_ms: UnixTime::now().as_secs().saturating_mul(1000),
            node_name: node.to_string(),
        }
    }

    async fn decide(
        &self,
        request: &JoinRequest,
    ) -> Result<(NodeName, Vec<CertificateDer<'static>>), Refusal> {
        let now = Timestamp::now();
        if request.version != VERSION {
            let why = format!("version {} is not {VERSION}", request.version);
            return Err(Refusal::BadRequest { why });
        }
        let csr =
            verify_csr(&request.csr).map_err(|e| Refusal::BadRequest { why: e.to_string() })?;
        check_platform(request)?;
        let by_token = request.expired_certificate.is_empty();
        let node = if by_token {
            let node = self.name_asked(request).await?;
            let asked = Asked {
                request,
                csr,
                node,
                now,
            };
            self.join_by_token(&asked).await?;
            asked.node
        } else {
            self.join_again(request, csr.key_id()).await?
        };
        let chain = self
            .sign(&request.csr, &node)
            .map_err(|e| Refusal::BadRequest { why: e.to_string() })?;
        Ok((node, chain))
    }

    /// The name in the request; a token that is bound to a name gives it to a device without one.
    async fn name_asked(&self, request: &JoinRequest) -> Result<NodeName, Refusal> {
        let mut name = request.node_name.clone();
        if name.is_empty() {
            let token = self.token(request).await?;
            name = token.node.map(String::from).unwrap_or_default();
        }
        let invalid = || Refusal::NameInvalid {
            name: printable(&name),
        };
        if name.len() > NAME_LIMIT {
            return Err(invalid());
        }
        NodeName::parse(&name).map_err(|_| invalid())
    }

    async fn token(&self, request: &JoinRequest) -> Result<TokenRecord, Refusal> {
        let found = self
            .tokens
            .find(&request.token_id)
            .await
            .map_err(unavailable)?;
        found
            .filter(|token| token.is_secret(&request.token_secret))
            .ok_or(Refusal::TokenUnknown)
    }

    /// Records the use and writes the enrolment; each loss of a race begins the decision anew.
    async fn join_by_token(&self, asked: &Asked<'_>) -> Result<(), Refusal> {
        for _ in 0..TRIES {
            let mut token = self.token(asked.request).await?;
            let secret = &asked.request.token_secret;
            let admitted = token.admit(secret, asked.csr.key_id(), &asked.node, asked.now)?;
            let present = records(&self.client)
                .get_opt(asked.node.as_str())
                .await
                .map_err(|e| unavailable(KubeError::api("reading an enrolment")(e)))?;
            check_name(present.as_ref(), asked, &token, &admitted)?;
            self.check_node(&asked.node).await?;
            let (key, node) = (asked.csr.key_id(), &asked.node);
            if !admitted.repeated {
                let recorded = self.tokens.record_use(&token, key, node, asked.now);
                match recorded.await.map_err(unavailable)? {
                    Some(written) => token = written,
                    None => continue,
                }
            }
            if !self.write(asked, &token, present.as_ref()).await? {
                continue;
            }
            let recorded = self.tokens.record_enrolled(&token, key, node);
            if recorded.await.map_err(unavailable)? {
                return Ok(());
            }
        }
        Err(Refusal::Unavailable {
            why: "the enrolment changed all the time",
        })
    }

    /// Refuses a name whose Node CloudCore did not make.
    async fn check_node(&self, node: &NodeName) -> Result<(), Refusal> {
        match nodes::find(&self.client, node).await.map_err(unavailable)? {
            Some(found) if !birth::is_ours(&found, &self.authority.cluster) => {
                Err(Refusal::NameForeign {
                    node: node.to_string(),
                })
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Writes the enrolment and makes the Node. False when somebody else wrote in between.
    async fn write(
        &self,
        asked: &Asked<'_>,
        token: &TokenRecord,
        present: Option<&Enrolment>,
    ) -> Result<bool, Refusal> {
        let known = present.filter(|p| p.spec.is_active() && p.spec.knows(asked.csr.key_id()));
        let spec = match known {
            Some(known) => known.spec.clone(),
            None => {
                let spec = self.fresh(asked, token, present);
                let next = record(&asked.node, spec.clone(), present);
                let params = PostParams::default();
                let written = match present {
                    Some(_) => {
                        records(&self.client)
                            .replace(asked.node.as_str(), &params, &next)
                            .await
                    }
                    None => records(&self.client).create(&params, &next).await,
                };
                match written {
                    Ok(_) => spec,
                    Err(e) if is_conflict(&e) => return Ok(false),
                    Err(e) => return Err(unavailable(KubeError::api("writing an enrolment")(e))),
                }
            }
        };
        let made = nodes::ensure(&self.client, &asked.node, &spec, &self.authority.cluster).await;
        made.map_err(unavailable)?;
        Ok(true)
    }

    fn fresh(
        &self,
        asked: &Asked<'_>,
        token: &TokenRecord,
        replaced: Option<&Enrolment>,
    ) -> EnrolmentSpec {
        let mut taints = token.taints.clone();
        let edge = birth::edge_taint();
        if self.config.taint_nodes && !taints.iter().any(|t| t.key == edge.key) {
            taints.push(edge);
        }
        EnrolmentSpec {
            keys: vec![Key::build(asked.csr.key_id(), asked.now)],
            enrolled: Some(Time(asked.now)),
            revoked: None,
            token: token.id.clone(),
            os: asked.request.os.clone(),
            arch: birth::kubernetes_arch(&asked.request.arch).to_string(),
            agent_version: asked.request.agent_version.clone(),
            labels: token.labels.clone(),
            annotations: Default::default(),
            taints,
            unschedulable: false,
            // An epoch must not come again, also under a new enrolment of the name.
            session_epoch_floor: replaced.map_or(0, |r| r.spec.session_epoch_floor),
        }
    }

    /// A device that was off for longer than its certificate holds.
    async fn join_again(&self, request: &JoinRequest, key: KeyId) -> Result<NodeName, Refusal> {
        let shown = self.check_expired(&request.expired_certificate, key)?;
        let found = records(&self.client)
            .get_opt(shown.node.as_str())
            .await
            .map_err(|e| unavailable(KubeError::api("reading an enrolment")(e)))?;
        match found {
            Some(found) if found.spec.is_active() && found.spec.knows(key) => Ok(shown.node),
            Some(_) | None => Err(Refusal::Revoked {
                node: shown.node.to_string(),
            }),
        }
    }

    fn check_expired(&self, certificate: &[u8], key: KeyId) -> Result<NodeIdentity, Refusal> {
        let roots = [self.authority.ca.certificate().clone()];
        let (cluster, grace) = (&self.authority.cluster, self.config.grace);
        check_reenrolment(certificate, key, &roots, cluster, UnixTime::now(), grace).map_err(|e| {
            match e {
                ReenrolError::TooLong { node, days } => Refusal::ExpiredTooLong {
                    node: node.to_string(),
                    days,
                    grace: grace.as_secs() / 86_400,
                },
                other @ (ReenrolError::Untrusted(_)
                | ReenrolError::OtherCluster { .. }
                | ReenrolError::OtherKey) => Refusal::BadRequest {
                    why: other.to_string(),
                },
            }
        })
    }

    fn sign(
        &self,
        csr: &[u8],
        node: &NodeName,
    ) -> Result<Vec<CertificateDer<'static>>, common::pki::PkiError> {
        let validity = Validity::starting(UnixTime::now(), self.config.certificate_lifetime);
        self.authority
            .ca
            .sign_node_csr(csr, node, &self.authority.cluster, validity)
    }

    /// A new certificate over an existing session. The request may be for a new key; both hold
    /// until the new one's first session.
    pub async fn renew(
        &self,
        identity: &NodeIdentity,
        csr: &[u8],
    ) -> Result<Vec<CertificateDer<'static>>, RenewError> {
        let node = &identity.node;
        let request = verify_csr(csr).map_err(|e| RenewError::Request(node.clone(), e))?;
        let chain = self
            .sign(csr, node)
            .map_err(|e| RenewError::Request(node.clone(), e))?;
        let now = Timestamp::now();
        let mut holds = false;
        let changed = record::change(&self.client, node, |spec| {
            holds = spec.is_active() && spec.knows(identity.key_id);
            let rotates = holds && !spec.knows(request.key_id());
            if rotates {
                spec.rotate(identity.key_id, request.key_id(), now);
            }
            rotates
        });
        changed
            .await
            .map_err(|e| RenewError::Kube(node.clone(), e))?;
        if !holds {
            return Err(RenewError::NotEnrolled(node.clone()));
        }
        tracing::info!(%node, key = %request.key_id(), "a certificate was renewed");
        Ok(chain)
    }

    /// Tells that a session over this identity has begun: keys older than its own end here.
    pub async fn first_session(&self, identity: &NodeIdentity) -> Result<(), KubeError> {
        record::change(&self.client, &identity.node, |spec| {
            spec.settle(identity.key_id)
        })
        .await?;
        Ok(())
    }

    /// Until shutdown: deletes tokens that expired long ago. Several replicas may; it is idempotent.
    pub async fn sweep_tokens(tokens: Tokens, shutdown: CancellationToken) {
        let mut wait = SWEEP_FIRST;
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(wait) => wait = SWEEP_EVERY,
            }
            match tokens.sweep(Timestamp::now()).await {
                Ok(0) => {}
                Ok(swept) => tracing::info!(swept, "deleted tokens that expired long ago"),
                Err(error) => {
                    tracing::warn!(error = %crate::chain(&error), "expired tokens were not swept");
                }
            }
        }
    }

    /// Ends an enrolment (see [`revoke::revoke`]).
    pub async fn revoke(&self, node: &NodeName) -> Result<revoke::Outcome, KubeError> {
        revoke::revoke(&self.client, node).await
    }
}

/// Whether this key may have this name.
fn check_name(
    present: Option<&Enrolment>,
    asked: &Asked<'_>,
    token: &TokenRecord,
    admitted: &Admitted,
) -> Result<(), Refusal> {
    let node = || asked.node.to_string();
    let Some(present) = present.map(|p| &p.spec) else {
        // Somebody deleted the record: that ended the enrolment, and what was used stays used.
        return match admitted.enrolled {
            true => Err(Refusal::Revoked { node: node() }),
            false => Ok(()),
        };
    };
    match &present.revoked {
        None if present.knows(asked.csr.key_id()) => Ok(()),
        None => Err(Refusal::NameTaken { node: node() }),
        Some(revoked) => {
            let older = token.created.is_some_and(|created| created < revoked.0);
            let same_use = admitted.repeated && present.knows(asked.csr.key_id());
            if older || same_use {
                return Err(Refusal::Revoked { node: node() });
            }
            Ok(())
        }
    }
}

/// What becomes a label's value, or is kept in the record, is short and plain.
fn check_platform(request: &JoinRequest) -> Result<(), Refusal> {
    let plain = |text: &str| {
        let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b'+');
        text.len() <= 63 && text.bytes().all(good)
    };
    let label = |text: &str| {
        let ends = |b: Option<&u8>| b.is_none_or(u8::is_ascii_alphanumeric);
        let bytes = text.as_bytes();
        plain(text) && !text.contains('+') && ends(bytes.first()) && ends(bytes.last())
    };
    for (what, good) in [
        ("os", label(&request.os)),
        ("arch", label(&request.arch)),
        ("agent version", plain(&request.agent_version)),
    ] {
        if !good {
            let why = format!("its {what} is not a plain word of at most 63 characters");
            return Err(Refusal::BadRequest { why });
        }
    }
    Ok(())
}

fn unavailable(error: KubeError) -> Refusal {
    tracing::warn!(error = %crate::chain(&error), "a join cannot be decided");
    Refusal::Unavailable {
        why: "the API server did not answer cloudcore as it must",
    }
}

/// What a stranger sent, for a log: short, and nothing that a terminal would act on.
fn printable(text: &str) -> String {
    text.chars()
        .filter(|c| c.is_ascii_graphic())
        .take(80)
        .collect()
}

#[cfg(test)]
mod tests;
