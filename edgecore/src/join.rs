//! The first start: a token and a name become an identity. Idempotent: the key is committed before
//! the cloud is asked, and the same key may ask again with the same token.

use common::hub::dial::{DialError, DialOptions, JoinOutcome, Target, join as ask};
use common::hub::proto::{self, RefusalCode};
use common::hub::tls::Clock;
use common::hub::transport::TransportError;
use common::ids::{NameError, NodeName};
use common::pki::token::Endpoint;
use common::pki::{JoinToken, PkiError, TokenError};
use common::tasks::beside;
use common::telemetry::chain;
use tracing::{info, warn};

use crate::hub::identity::{self, IdentityError};
use crate::node::facts::architecture;
use crate::store::Store;

/// Why a device could not join; each with its own exit code.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    #[error(
        "this device has not joined a cloud: start it with --join HOST:PORT --token TOKEN, as `cloudcore token create` prints it"
    )]
    NeverJoined,
    #[error("--join {0:?} is not HOST:PORT")]
    Address(String),
    #[error("--join needs --token: make one with `cloudcore token create`")]
    NoToken,
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error(transparent)]
    Name(#[from] NameError),
    #[error("the name of this device, {0:?}, cannot be a node's: give one with --name")]
    HostName(String),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(
        "--name {asked} was given, but the data directory belongs to node {is}: give it another --data-dir"
    )]
    OtherNode { asked: NodeName, is: NodeName },
    #[error("this device has not joined")]
    Dial(#[from] DialError),
    #[error("the link record of this device is damaged; join again with a new token")]
    Link(#[source] PkiError),
    #[error("the cloud refused: {message}")]
    Refused { code: RefusalCode, message: String },
}

impl JoinError {
    /// Whether the same try may succeed later: the cloud was not there, or could not decide.
    fn may_pass(&self) -> bool {
        match self {
            JoinError::Dial(_) => true,
            JoinError::Refused { code, .. } => *code == RefusalCode::RefusalUnavailable,
            JoinError::NeverJoined
            | JoinError::Address(_)
            | JoinError::NoToken
            | JoinError::Token(_)
            | JoinError::Name(_)
            | JoinError::HostName(_)
            | JoinError::Identity(_)
            | JoinError::OtherNode { .. }
            | JoinError::Link(_) => false,
        }
    }

    /// What the process exits with, so that scripts can tell the refusals apart. The table is in
    /// `docs/operations/join.md`.
    pub fn exit_code(&self) -> u8 {
        match self {
            JoinError::NeverJoined | JoinError::NoToken => 2,
            JoinError::Address(_)
            | JoinError::Name(_)
            | JoinError::HostName(_)
            | JoinError::OtherNode { .. } => 3,
            JoinError::Token(_) => 4,
            JoinError::Identity(_) | JoinError::Link(_) => 5,
            JoinError::Dial(error) => match error.most_telling() {
                Some(TransportError::Trust(_)) => 7,
                Some(_) | None => 6,
            },
            JoinError::Refused { code, .. } => {
                20 + u8::try_from(i32::from(*code)).unwrap_or_default()
            }
        }
    }
}

/// What the command line asks for.
pub struct Join<'a> {
    pub address: &'a str,
    pub token: Option<&'a str>,
    pub name: Option<&'a str>,
}

/// Enrols this device if it has not joined with this token yet.
pub async fn ensure(store: &Store, join: Option<Join<'_>>) -> Result<(), JoinError> {
    let joined = identity::Identity::load(store)?;
    let Some(join) = join else {
        return joined.map(drop).ok_or(JoinError::NeverJoined);
    };
    let token = match (join.token, &joined) {
        (Some(text), _) => JoinToken::parse(text)?,
        (None, Some(_)) => return Ok(()),
        (None, None) => return Err(JoinError::NoToken),
    };
    if joined.is_some() && identity::joined_with(store)?.as_deref() == Some(&token.id) {
        return Ok(());
    }
    let asked = join.name.map(NodeName::parse).transpose()?;
    let name = match (asked, &joined) {
        // What the data directory holds is the first node's: its Pods must not become another's.
        (Some(asked), Some(joined)) if asked != joined.node => {
            let is = joined.node.clone();
            return Err(JoinError::OtherNode { asked, is });
        }
        (Some(name), _) => name,
        (None, Some(joined)) => joined.node.clone(),
        (None, None) => host_name()?,
    };
    match (enrol(store, join.address, token, &name).await, joined) {
        // The token may be meant to mend an enrolment that has ended. Pods never wait for that.
        (Err(error), Some(joined)) if error.may_pass() => {
            warn!(
                error = %chain(&error), node = %joined.node,
                "the new token was not used; this device goes on with what it has"
            );
            Ok(())
        }
        (result, _) => result,
    }
}

async fn enrol(
    store: &Store,
    address: &str,
    mut token: JoinToken,
    name: &NodeName,
) -> Result<(), JoinError> {
    // The address given is tried first; the token may know others.
    token.endpoints.insert(0, endpoint(address)?);
    let found = token.endpoints[0].to_proto();
    let key = identity::ensure_key(store)?;
    let request = proto::JoinRequest {
        version: common::hub::PROTOCOL_VERSION,
        token_id: token.id.clone(),
        token_secret: token.secret.bytes().to_vec(),
        node_name: name.to_string(),
        csr: key.request().map_err(IdentityError::from)?,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        os: std::env::consts::OS.to_owned(),
        arch: architecture(std::env::consts::ARCH).to_owned(),
        expired_certificate: Vec::new(),
    };
    // A device without a clock can join: chain, pin and name decide alone.
    let options = DialOptions::new(Clock::Unsynchronised(None));
    let joined = take(ask(&Target::from_token(&token), &request, &options).await?)?;
    identity::keep_joined(store, Some(&token.id), Some(&found), &joined)?;
    info!(node = joined.node_name, "this device has joined");
    Ok(())
}

/// Asks for a new certificate for the same key after the last one ran out: no token is needed
/// within the cloud's grace.
pub async fn again(store: &Store, identity: &identity::Identity) -> Result<(), JoinError> {
    let request = proto::JoinRequest {
        version: common::hub::PROTOCOL_VERSION,
        node_name: identity.node.to_string(),
        csr: identity.key.request().map_err(IdentityError::from)?,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        os: std::env::consts::OS.to_owned(),
        arch: architecture(std::env::consts::ARCH).to_owned(),
        expired_certificate: identity
            .chain
            .first()
            .map(|c| c.to_vec())
            .unwrap_or_default(),
        ..Default::default()
    };
    let target = identity.target().map_err(JoinError::Link)?;
    let options = DialOptions::new(identity::dial_clock(store));
    let joined = take(ask(&target, &request, &options).await?)?;
    let store = store.clone();
    let kept = move || identity::keep_joined(&store, None, None, &joined);
    beside(kept).await?;
    info!("the expired certificate was replaced");
    Ok(())
}

fn take(outcome: JoinOutcome) -> Result<proto::Joined, JoinError> {
    match outcome {
        JoinOutcome::Joined(joined) => Ok(joined),
        JoinOutcome::Refused(refused) => Err(JoinError::Refused {
            code: refused.code(),
            message: refused.message,
        }),
    }
}

fn endpoint(address: &str) -> Result<Endpoint, JoinError> {
    let bad = || JoinError::Address(address.to_owned());
    let (host, port) = address.rsplit_once(':').ok_or_else(bad)?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let wire = proto::Endpoint {
        host: host.to_owned(),
        port: port.parse::<u16>().map_err(|_| bad())?.into(),
        transports: Vec::new(),
    };
    Endpoint::from_proto(&wire).ok_or_else(bad)
}

/// The host's name, as the kubelet takes it: lower case.
fn host_name() -> Result<NodeName, JoinError> {
    let name = nix::unistd::gethostname().unwrap_or_default();
    let name = name.to_string_lossy().to_lowercase();
    NodeName::parse(&name).map_err(|_| JoinError::HostName(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_final_and_an_absent_cloud_is_not() {
        let refused = |code| JoinError::Refused {
            code,
            message: String::new(),
        };
        assert!(JoinError::Dial(DialError::NoEndpoint).may_pass());
        assert!(refused(RefusalCode::RefusalUnavailable).may_pass());
        assert!(!refused(RefusalCode::RefusalTokenUsed).may_pass());
        assert_eq!(refused(RefusalCode::RefusalTokenUsed).exit_code(), 23);
        assert!(!JoinError::NoToken.may_pass());
    }
}
