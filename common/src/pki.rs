//! Trust: who signs whom, what a certificate says, and what an operator pastes on a device.
//!
//! Owns the shape of every certificate of the system and the text of a join token. Takes keys,
//! requests and the time as arguments; gives DER, PEM and typed identities. Never reads a clock,
//! a file or a socket. Randomness (keys, serial numbers) comes from the system.
//!
//! ```text
//! root (P-256, "edge root CLUSTER") ── server "cloudcore.CLUSTER"        (serverAuth)
//!    │                              └─ node   CN=system:node:NAME        (clientAuth)
//!    └─ cross-signs the next root          O=system:nodes, edge://CLUSTER/NAME
//! ```

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use ring::digest::{SHA256, digest};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use x509_parser::prelude::{FromDer, X509Certificate};

pub mod ca;
pub mod csr;
pub mod identity;
pub mod rotation;
pub mod serving;
pub mod token;

pub use ca::{Ca, CaPem, ServerCredentials};
pub use csr::{NodeKey, VerifiedCsr};
pub use identity::{NodeIdentity, check_reenrolment};
pub use rotation::rotation_due;
pub use serving::{ServingKey, Subject};
pub use token::{JoinToken, TokenError};

/// A device's clock and CloudCore's may differ by this much before a fresh certificate is "not
/// valid yet".
const BACKDATE: Duration = Duration::from_secs(5 * 60);

/// Why a key, a certificate or a request was refused.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    #[error(
        "cluster id {0:?} is not a DNS label (1 to 63 characters of a-z, 0-9 and '-', no '-' at the ends)"
    )]
    ClusterId(String),
    #[error("{what} is {size} bytes, more than the {limit} allowed")]
    TooLarge {
        what: &'static str,
        size: usize,
        limit: usize,
    },
    #[error("{what} cannot be read: {why}")]
    Malformed { what: &'static str, why: String },
    #[error("the certificate request is not signed by its own key")]
    CsrSignature,
    #[error("the key of {what} is not an ECDSA P-256 key, the only kind in use")]
    KeyKind { what: &'static str },
    #[error("the certificate does not name an edge node: {0}")]
    NotANode(&'static str),
    #[error("the private key does not belong to the certificate")]
    KeyMismatch,
    #[error("cannot {what}")]
    Sign {
        what: &'static str,
        #[source]
        source: rcgen::Error,
    },
    #[error("the system gives no random numbers")]
    Random,
}

/// SHA-256 of a SubjectPublicKeyInfo (DER): names a key whatever certificate carries it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub [u8; 32]);

impl KeyId {
    /// The id of a SubjectPublicKeyInfo in DER.
    pub fn of_spki(spki: &[u8]) -> Self {
        Self(sha256(spki))
    }

    /// The id of the key that a certificate is for.
    pub fn of_certificate(der: &[u8]) -> Result<Self, PkiError> {
        Ok(Self::of_spki(
            parse(der, "the certificate")?.public_key().raw,
        ))
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Names one cluster for ever. A DNS label, because the server's fixed name contains it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterId(Arc<str>);

impl ClusterId {
    /// # Errors
    /// When the text is not a DNS label.
    pub fn parse(text: &str) -> Result<Self, PkiError> {
        let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let good = (1..=63).contains(&text.len())
            && text.bytes().all(inner)
            && !text.starts_with('-')
            && !text.ends_with('-');
        if good {
            Ok(Self(text.into()))
        } else {
            Err(PkiError::ClusterId(text.chars().take(80).collect()))
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name in CloudCore's certificate, whatever host was dialled.
    pub fn server_name(&self) -> String {
        format!("cloudcore.{}", self.0)
    }

    /// [`ClusterId::server_name`] as TLS wants it.
    pub fn tls_name(&self) -> ServerName<'static> {
        ServerName::try_from(self.server_name())
            .expect("a label behind 'cloudcore.' is a DNS name of at most 73 characters")
    }
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// From when to when a certificate holds, in seconds of Unix time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    pub not_before: UnixTime,
    pub not_after: UnixTime,
}

impl Validity {
    /// Holds for `lifetime` from `now`, and a little before, since clocks differ: never so much
    /// that a new certificate is already due for renewal.
    pub fn starting(now: UnixTime, lifetime: Duration) -> Self {
        let at = |s: u64| UnixTime::since_unix_epoch(Duration::from_secs(s));
        let before = BACKDATE.min(lifetime / 10);
        Self {
            not_before: at(now.as_secs().saturating_sub(before.as_secs())),
            not_after: at(now.as_secs().saturating_add(lifetime.as_secs())),
        }
    }
}

/// SHA-256 of some bytes.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest(&SHA256, bytes).as_ref());
    out
}

/// When a certificate begins and ends to hold.
pub fn validity_of(der: &CertificateDer<'_>) -> Result<Validity, PkiError> {
    let certificate = parse(der, "the certificate")?;
    let at = |t: i64| {
        UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(t).unwrap_or_default()))
    };
    Ok(Validity {
        not_before: at(certificate.validity().not_before.timestamp()),
        not_after: at(certificate.validity().not_after.timestamp()),
    })
}

/// Certificates of this system are below 1 KiB; anything far above is not ours.
const CERTIFICATE_LIMIT: usize = 16 * 1024;

fn parse<'a>(der: &'a [u8], what: &'static str) -> Result<X509Certificate<'a>, PkiError> {
    limit(der, what, CERTIFICATE_LIMIT)?;
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok(_) => Err(PkiError::Malformed {
            what,
            why: "bytes follow the certificate".into(),
        }),
        Err(e) => Err(PkiError::Malformed {
            what,
            why: e.to_string(),
        }),
    }
}

fn limit(bytes: &[u8], what: &'static str, limit: usize) -> Result<(), PkiError> {
    if bytes.len() > limit {
        return Err(PkiError::TooLarge {
            what,
            size: bytes.len(),
            limit,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_id_is_a_dns_label() {
        for good in ["a", "0b4f-11", "5f3c1c1e-3d6f-4a8e-9c59-000000000000"] {
            assert_eq!(ClusterId::parse(good).expect(good).as_str(), good);
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a_b", &"a".repeat(64)] {
            assert!(ClusterId::parse(bad).is_err(), "{bad}");
        }
        let id = ClusterId::parse("c1").expect("good");
        assert_eq!(id.server_name(), "cloudcore.c1");
    }

    #[test]
    fn a_validity_starts_a_little_early_and_never_overflows() {
        let now = UnixTime::since_unix_epoch(Duration::from_secs(1_000_000));
        for (life, before) in [(86_400, 300), (100, 10), (5, 0)] {
            let v = Validity::starting(now, Duration::from_secs(life));
            assert_eq!(v.not_before.as_secs(), 1_000_000 - before);
            assert_eq!(v.not_after.as_secs(), 1_000_000 + life);
            assert!(
                rotation_due(v, 0) > now || life < 10,
                "{life} s are due at once"
            );
        }
        let start = UnixTime::since_unix_epoch(Duration::ZERO);
        assert_eq!(
            Validity::starting(start, Duration::MAX)
                .not_before
                .as_secs(),
            0
        );
    }
}
