//! The join token: `edge1.` and a protobuf message in base64url, one line to paste on a device.
//!
//! Owns its text, its limits and its errors. The secret shows in no log and no `Debug`.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use prost::Message;
use ring::rand::{SecureRandom, SystemRandom};

use super::{ClusterId, KeyId, PkiError, sha256};
use crate::hub::proto;

const PREFIX: &str = "edge1.";
/// A token with the most pins and the longest host names stays below this.
const TEXT_LIMIT: usize = 8 * 1024;
const MAX_PINS: usize = 4;
const MAX_ENDPOINTS: usize = 8;

/// Why a token cannot be used. Each says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error("the token is empty: paste the text that `cloudcore token create` printed")]
    Empty,
    #[error("this is not a join token: it must begin with \"{PREFIX}\"")]
    Prefix,
    #[error("the token is of a newer kind (\"{0}\"): install a newer edgecore on this device")]
    Newer(String),
    #[error("the token contains a space or a line break: paste it as one line")]
    Spaces,
    #[error("the token is cut off or altered ({0}): copy the whole line again")]
    Damaged(&'static str),
    #[error("the token is longer than {TEXT_LIMIT} characters: this is not a join token")]
    TooLong,
    #[error(
        "the token's {0} is outside what is allowed: make a new one with `cloudcore token create`"
    )]
    Invalid(&'static str),
}

/// The secret half of a token; the cloud keeps only its [`TokenSecret::hash`].
#[derive(Clone, PartialEq, Eq)]
pub struct TokenSecret([u8; 32]);

impl TokenSecret {
    pub fn generate() -> Result<Self, PkiError> {
        let mut bytes = [0; 32];
        SystemRandom::new()
            .fill(&mut bytes)
            .map_err(|_| PkiError::Random)?;
        Ok(Self(bytes))
    }

    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    pub fn hash(&self) -> [u8; 32] {
        secret_hash(&self.0)
    }
}

impl fmt::Debug for TokenSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenSecret(hidden)")
    }
}

/// What the cloud keeps of a secret. 32 random bytes need no salt and no slow hash.
pub fn secret_hash(secret: &[u8]) -> [u8; 32] {
    sha256(secret)
}

/// Whether a shown secret is the one whose hash is kept. Compares hashes of equal length, which
/// an attacker cannot steer, so that time tells nothing.
pub fn secret_matches(hash: &[u8], shown: &[u8]) -> bool {
    shown.len() == 32 && secret_hash(shown) == hash
}

/// What a token says, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinToken {
    pub id: String,
    pub secret: TokenSecret,
    /// Roots that may sign the server.
    pub pins: Vec<KeyId>,
    pub endpoints: Vec<Endpoint>,
    pub cluster: ClusterId,
}

/// Where a cloud listens.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint {
    pub host: String,
    pub port: u16,
    pub quic: bool,
    pub websocket: bool,
}

impl Endpoint {
    /// Both transports at one host and port.
    pub fn new(host: &str, port: u16) -> Self {
        Self {
            host: host.to_owned(),
            port,
            quic: true,
            websocket: true,
        }
    }

    /// Nothing when host or port cannot be dialled. Unknown transports are passed over; an
    /// endpoint with only such is not for this version.
    pub fn from_proto(e: &proto::Endpoint) -> Option<Self> {
        let host_char = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b':' | b'_');
        let good = (1..=253).contains(&e.host.len()) && e.host.bytes().all(host_char);
        let port = u16::try_from(e.port).ok().filter(|p| *p != 0)?;
        let has = |name: &str| e.transports.is_empty() || e.transports.iter().any(|t| t == name);
        let (quic, websocket) = (has("quic"), has("websocket"));
        (good && (quic || websocket)).then(|| Self {
            host: e.host.clone(),
            port,
            quic,
            websocket,
        })
    }

    pub fn to_proto(&self) -> proto::Endpoint {
        let transports = match (self.quic, self.websocket) {
            (true, false) => vec!["quic".to_owned()],
            (false, true) => vec!["websocket".to_owned()],
            (true, true) | (false, false) => Vec::new(),
        };
        proto::Endpoint {
            host: self.host.clone(),
            port: self.port.into(),
            transports,
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl JoinToken {
    /// The line to paste. It holds the secret: print it once, log it never.
    pub fn to_text(&self) -> String {
        let message = proto::Token {
            id: self.id.clone(),
            secret: self.secret.0.to_vec(),
            pins: self.pins.iter().map(|p| p.0.to_vec()).collect(),
            endpoints: self.endpoints.iter().map(Endpoint::to_proto).collect(),
            cluster_id: self.cluster.as_str().to_owned(),
        };
        format!(
            "{PREFIX}{}",
            URL_SAFE_NO_PAD.encode(message.encode_to_vec())
        )
    }

    /// Reads a pasted line; white space around it is dropped.
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        if text.len() > TEXT_LIMIT {
            return Err(TokenError::TooLong);
        }
        let text = text.trim();
        let body = body(text)?;
        let bytes = URL_SAFE_NO_PAD
            .decode(body)
            .map_err(|_| TokenError::Damaged("a character is wrong or missing"))?;
        let message = proto::Token::decode(bytes.as_slice())
            .map_err(|_| TokenError::Damaged("its fields do not add up"))?;
        Self::from_message(&message)
    }

    /// Puts id and secret into a join request.
    pub fn present(&self, request: &mut proto::JoinRequest) {
        request.token_id.clone_from(&self.id);
        request.token_secret = self.secret.0.to_vec();
    }

    fn from_message(m: &proto::Token) -> Result<Self, TokenError> {
        // The cluster is the last field written, so that whatever is cut off, it is missing.
        if m.cluster_id.is_empty() {
            return Err(TokenError::Damaged("its end is missing"));
        }
        let id_char = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        if !(1..=64).contains(&m.id.len()) || !m.id.bytes().all(id_char) {
            return Err(TokenError::Invalid("id"));
        }
        let secret: [u8; 32] = fixed(&m.secret).ok_or(TokenError::Invalid("secret"))?;
        if !(1..=MAX_PINS).contains(&m.pins.len()) {
            return Err(TokenError::Invalid("list of pins"));
        }
        let pins: Option<Vec<KeyId>> = m.pins.iter().map(|p| fixed(p).map(KeyId)).collect();
        if !(1..=MAX_ENDPOINTS).contains(&m.endpoints.len()) {
            return Err(TokenError::Invalid("list of endpoints"));
        }
        let endpoints: Vec<_> = m
            .endpoints
            .iter()
            .filter_map(Endpoint::from_proto)
            .collect();
        if endpoints.is_empty() {
            return Err(TokenError::Invalid("list of endpoints"));
        }
        Ok(Self {
            id: m.id.clone(),
            secret: TokenSecret(secret),
            pins: pins.ok_or(TokenError::Invalid("list of pins"))?,
            endpoints,
            cluster: ClusterId::parse(&m.cluster_id)
                .map_err(|_| TokenError::Invalid("cluster id"))?,
        })
    }
}

fn body(text: &str) -> Result<&str, TokenError> {
    if text.is_empty() {
        return Err(TokenError::Empty);
    }
    if text.contains(char::is_whitespace) {
        return Err(TokenError::Spaces);
    }
    if let Some(body) = text.strip_prefix(PREFIX) {
        return Ok(body);
    }
    let kind = text.split('.').next().unwrap_or_default();
    let version = kind.strip_prefix("edge").unwrap_or_default();
    let number = !version.is_empty() && version.bytes().all(|b| b.is_ascii_digit());
    if number && version.len() <= 4 && version != "1" && text.len() > kind.len() {
        return Err(TokenError::Newer(kind.to_owned()));
    }
    Err(TokenError::Prefix)
}

fn fixed(bytes: &[u8]) -> Option<[u8; 32]> {
    bytes.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> JoinToken {
        JoinToken {
            id: "t-4f2a".into(),
            secret: TokenSecret([7; 32]),
            pins: vec![KeyId([1; 32]), KeyId([2; 32])],
            endpoints: vec![
                Endpoint::new("cloud.example.com", 10000),
                Endpoint {
                    quic: false,
                    ..Endpoint::new("2001:db8::1", 443)
                },
            ],
            cluster: ClusterId::parse("c0ffee").expect("label"),
        }
    }

    fn text_of(change: impl FnOnce(&mut proto::Token)) -> String {
        let bytes = URL_SAFE_NO_PAD
            .decode(&sample().to_text()[6..])
            .expect("base64");
        let mut message = proto::Token::decode(bytes.as_slice()).expect("token");
        change(&mut message);
        format!("edge1.{}", URL_SAFE_NO_PAD.encode(message.encode_to_vec()))
    }

    #[test]
    fn a_token_survives_its_text() {
        let text = sample().to_text();
        assert_eq!(JoinToken::parse(&text), Ok(sample()));
        assert_eq!(JoinToken::parse(&format!("  {text}\n")), Ok(sample()));
        // The contract with devices in the field.
        assert!(text.starts_with("edge1.CgZ0LTRmMmESIAcHBwcHBwcH"), "{text}");
    }

    #[test]
    fn every_cut_of_a_token_is_noticed() {
        let text = sample().to_text();
        for end in 0..text.len() {
            let error = JoinToken::parse(&text[..end]).expect_err("cut");
            let expected = match end {
                0 => error == TokenError::Empty,
                1..6 => error == TokenError::Prefix,
                _ => !matches!(error, TokenError::Empty | TokenError::Prefix),
            };
            assert!(expected, "{end}: {error}");
        }
    }

    #[test]
    fn each_mistake_has_its_sentence() {
        let text = sample().to_text();
        let (a, b) = text.split_at(40);
        let table = [
            (" \n".to_owned(), TokenError::Empty),
            ("hello".into(), TokenError::Prefix),
            ("edge.abc".into(), TokenError::Prefix),
            ("edge2.abc".into(), TokenError::Newer("edge2".into())),
            (format!("{a}\n{b}"), TokenError::Spaces),
            (
                "edge1.!!".into(),
                TokenError::Damaged("a character is wrong or missing"),
            ),
            (format!("edge1.{}", "A".repeat(9000)), TokenError::TooLong),
            (
                text_of(|m| m.secret = vec![1; 31]),
                TokenError::Invalid("secret"),
            ),
            (text_of(|m| m.id = "a b".into()), TokenError::Invalid("id")),
            (
                text_of(|m| m.pins.clear()),
                TokenError::Invalid("list of pins"),
            ),
            (
                text_of(|m| m.pins[0].truncate(5)),
                TokenError::Invalid("list of pins"),
            ),
            (
                text_of(|m| m.pins = vec![vec![1; 32]; 5]),
                TokenError::Invalid("list of pins"),
            ),
            (
                text_of(|m| m.endpoints.clear()),
                TokenError::Invalid("list of endpoints"),
            ),
            (
                text_of(|m| m.endpoints.iter_mut().for_each(|e| e.port = 70_000)),
                TokenError::Invalid("list of endpoints"),
            ),
            (
                text_of(|m| m.cluster_id = "A".into()),
                TokenError::Invalid("cluster id"),
            ),
        ];
        for (text, error) in table {
            assert_eq!(JoinToken::parse(&text), Err(error), "{text}");
        }
    }

    #[test]
    fn what_a_later_version_adds_is_passed_over() {
        let text = text_of(|m| m.endpoints[0].transports = vec!["carrier-pigeon".into()]);
        let token = JoinToken::parse(&text).expect("the other endpoint is left");
        assert_eq!(token.endpoints.len(), 1);
        assert!(!token.endpoints[0].quic);
    }

    #[test]
    fn the_secret_shows_in_no_debug_output_and_only_its_hash_matches() {
        let token = sample();
        let debug = format!("{token:?}");
        assert!(
            debug.contains("hidden") && !debug.contains("7, 7"),
            "{debug}"
        );
        assert!(secret_matches(&token.secret.hash(), &[7; 32]));
        assert!(!secret_matches(&token.secret.hash(), &[8; 32]));
        assert!(!secret_matches(&token.secret.hash(), &[]));
        assert_ne!(TokenSecret::generate().expect("random"), token.secret);
    }
}
