//! The first start: a token and a name become an identity. Idempotent: the key is committed before
//! the cloud is asked, and the same key may ask again with the same token.

use common::hub::dial::{DialError, DialOptions, JoinOutcome, Target, join as ask};
use common::hub::proto::{self, RefusalCode};
use common::hub::tls::Clock;
use common::hub::transport::TransportError;
use common::ids::{NameError, NodeName};
use common::pki::token::Endpoint;
use common::pki::{JoinToken, NodeKey, PkiError, TokenError};
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
            | JoinError::Link(_) => false,
        }
    }

    /// What the process exits with, so that scripts can tell the refusals apart. The table is in
    /// `docs/operations/join.md`.
    pub fn exit_code(&self) -> u8 {
        match self {
            JoinError::NeverJoined | JoinError::NoToken => 2,
            JoinError::Address(_) | JoinError::Name(_) | JoinError::HostName(_) => 3,
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

/// Enrols a device that has not joined. One that has needs nothing of the cloud to start: what a
/// token that it has not used asks for is given back, to be done beside its Pods.
pub async fn ensure(store: &Store, join: Option<Join<'_>>) -> Result<Option<Enrolment>, JoinError> {
    let Some(joined) = identity::Identity::load(store)? else {
        let join = join.ok_or(JoinError::NeverJoined)?;
        let token = JoinToken::parse(join.token.ok_or(JoinError::NoToken)?)?;
        let asked = join.name.map(NodeName::parse).transpose()?;
        let name = asked.map_or_else(host_name, Ok)?;
        Enrolment::new(join.address, token, name)?
            .carry_out(store)
            .await?;
        return Ok(None);
    };
    let Some((address, text)) = join.and_then(|join| Some((join.address, join.token?))) else {
        return Ok(None);
    };
    let wanted = JoinToken::parse(text).map_err(JoinError::from);
    match wanted.and_then(|token| Enrolment::new(address, token, joined.node.clone())) {
        Ok(wanted) if identity::joined_with(store)?.as_ref() == Some(&wanted.token.id) => Ok(None),
        Ok(wanted) => Ok(Some(wanted)),
        Err(error) => {
            not_used(&error);
            Ok(None)
        }
    }
}

fn not_used(error: &JoinError) {
    warn!(
        error = %chain(error),
        "the new token was not used; this device goes on with what it has"
    );
}

/// What a token asks of the cloud: to let this device in.
#[derive(Debug)]
pub struct Enrolment {
    /// The address that was given goes first; the token may know others.
    token: JoinToken,
    name: NodeName,
}

impl Enrolment {
    fn new(address: &str, mut token: JoinToken, name: NodeName) -> Result<Self, JoinError> {
        token.endpoints.insert(0, endpoint(address)?);
        Ok(Self { token, name })
    }

    /// The token may be meant to mend an enrolment that has ended. Gives itself back where the same
    /// try may succeed later.
    pub async fn mend(self, store: &Store) -> Option<Self> {
        let error = self.carry_out(store).await.err()?;
        not_used(&error);
        error.may_pass().then_some(self)
    }

    async fn carry_out(&self, store: &Store) -> Result<(), JoinError> {
        let Self { token, name } = self;
        let found = token.endpoints.first().map(Endpoint::to_proto);
        let key = identity::ensure_key(store)?;
        let request = proto::JoinRequest {
            token_id: token.id.clone(),
            token_secret: token.secret.bytes().to_vec(),
            ..request(name, &key)?
        };
        // A device without a clock can join: chain, pin and name decide alone.
        let options = DialOptions::new(Clock::Unsynchronised(None));
        let joined = take(ask(&Target::from_token(token), &request, &options).await?)?;
        let node = joined.node_name.clone();
        let (store, id) = (store.clone(), token.id.clone());
        let kept = move || identity::keep_joined(&store, Some(&id), found.as_ref(), &joined);
        beside(kept).await?;
        info!(node, "this device has joined");
        Ok(())
    }
}

/// What this device says of itself, whatever it shows.
fn request(name: &NodeName, key: &NodeKey) -> Result<proto::JoinRequest, IdentityError> {
    Ok(proto::JoinRequest {
        version: common::hub::PROTOCOL_VERSION,
        node_name: name.to_string(),
        csr: key.request()?,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        os: std::env::consts::OS.to_owned(),
        arch: architecture(std::env::consts::ARCH).to_owned(),
        ..Default::default()
    })
}

/// Asks for a new certificate for the same key after the last one ran out: no token is needed
/// within the cloud's grace.
pub async fn again(store: &Store, identity: &identity::Identity) -> Result<(), JoinError> {
    let expired = identity.chain.first();
    let request = proto::JoinRequest {
        expired_certificate: expired.map(|c| c.to_vec()).unwrap_or_default(),
        ..request(&identity.node, &identity.key)?
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
