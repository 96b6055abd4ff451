//! The device's key and its certificate requests, and the cloud's check of one.
//!
//! The key never leaves the device; its bytes are given to the caller to keep with mode 0600.

use std::fmt;

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PublicKeyData};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use x509_parser::oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY};
use x509_parser::prelude::{FromDer, X509CertificationRequest};
use x509_parser::x509::SubjectPublicKeyInfo;

use super::{KeyId, PkiError, limit};

/// A request of ours is about 200 bytes; one with every field filled stays far below this.
pub const CSR_LIMIT: usize = 4 * 1024;

/// A node's private key.
pub struct NodeKey {
    pair: KeyPair,
}

impl NodeKey {
    pub fn generate() -> Result<Self, PkiError> {
        let pair = KeyPair::generate().map_err(|source| PkiError::Sign {
            what: "make the node's key",
            source,
        })?;
        Ok(Self { pair })
    }

    /// Reads back [`NodeKey::to_pkcs8`].
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, PkiError> {
        limit(der, "the node's key", CSR_LIMIT)?;
        // The parser's message could quote the key: only the fact is told.
        let pair = KeyPair::try_from(der).map_err(|_| PkiError::Malformed {
            what: "the node's key",
            why: "not a PKCS#8 private key".into(),
        })?;
        let spki = pair.subject_public_key_info();
        p256(&spki, "the node's key file")?;
        Ok(Self { pair })
    }

    /// PKCS#8 DER, for a file with mode 0600.
    pub fn to_pkcs8(&self) -> Vec<u8> {
        self.pair.serialize_der()
    }

    /// The key as TLS wants it.
    pub fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.to_pkcs8()).into()
    }

    pub fn id(&self) -> KeyId {
        KeyId::of_spki(&self.pair.subject_public_key_info())
    }

    /// A PKCS#10 request, DER, for the first certificate and for each renewal over this key. It
    /// names nothing: the cloud decides what the certificate says.
    pub fn request(&self) -> Result<Vec<u8>, PkiError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let request = params
            .serialize_request(&self.pair)
            .map_err(|source| PkiError::Sign {
                what: "sign the certificate request",
                source,
            })?;
        Ok(request.der().to_vec())
    }
}

impl fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeKey")
            .field("id", &self.id())
            .finish_non_exhaustive()
    }
}

/// A request whose signature was checked: the sender holds the key.
#[derive(Debug, Clone)]
pub struct VerifiedCsr {
    spki: Vec<u8>,
}

impl VerifiedCsr {
    /// The SubjectPublicKeyInfo, DER.
    pub fn spki(&self) -> &[u8] {
        &self.spki
    }

    pub fn key_id(&self) -> KeyId {
        KeyId::of_spki(&self.spki)
    }
}

/// Checks a request's size, shape, kind of key and signature.
pub fn verify_csr(der: &[u8]) -> Result<VerifiedCsr, PkiError> {
    let what = "the certificate request";
    limit(der, what, CSR_LIMIT)?;
    let request = match X509CertificationRequest::from_der(der) {
        Ok(([], request)) => request,
        Ok(_) => {
            return Err(PkiError::Malformed {
                what,
                why: "bytes follow it".into(),
            });
        }
        Err(e) => {
            return Err(PkiError::Malformed {
                what,
                why: e.to_string(),
            });
        }
    };
    let spki = request.certification_request_info.subject_pki.raw;
    p256(spki, what)?;
    request
        .verify_signature()
        .map_err(|_| PkiError::CsrSignature)?;
    Ok(VerifiedCsr {
        spki: spki.to_vec(),
    })
}

fn p256(spki: &[u8], what: &'static str) -> Result<(), PkiError> {
    let kind = || PkiError::KeyKind { what };
    let (_, info) = SubjectPublicKeyInfo::from_der(spki).map_err(|_| kind())?;
    let curve = info
        .algorithm
        .parameters
        .as_ref()
        .and_then(|p| p.as_oid().ok());
    // An uncompressed point: 0x04 and two coordinates.
    let point = info.subject_public_key.data.len() == 65;
    if info.algorithm.algorithm == OID_KEY_TYPE_EC_PUBLIC_KEY && curve == Some(OID_EC_P256) && point
    {
        Ok(())
    } else {
        Err(kind())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_survives_its_file_and_asks_again_with_the_same_key() {
        let key = NodeKey::generate().expect("key");
        let again = NodeKey::from_pkcs8(&key.to_pkcs8()).expect("read back");
        let first = verify_csr(&key.request().expect("request")).expect("valid");
        let renewal = verify_csr(&again.request().expect("request")).expect("valid");
        assert_eq!(first.key_id(), key.id());
        assert_eq!(renewal.key_id(), key.id());
        assert!(NodeKey::from_pkcs8(b"nothing").is_err());
    }

    #[test]
    fn a_request_with_a_broken_signature_a_tail_or_a_wrong_key_is_refused() {
        let good = NodeKey::generate()
            .expect("key")
            .request()
            .expect("request");
        let mut flipped = good.clone();
        let last = flipped.len() - 1;
        flipped[last] ^= 1;
        assert!(matches!(
            verify_csr(&flipped),
            Err(PkiError::CsrSignature | PkiError::Malformed { .. })
        ));
        let mut tail = good.clone();
        tail.push(0);
        assert!(matches!(verify_csr(&tail), Err(PkiError::Malformed { .. })));
        assert!(matches!(
            verify_csr(&vec![0x30; CSR_LIMIT + 1]),
            Err(PkiError::TooLarge { .. })
        ));
        let other = KeyPair::generate_for(&rcgen::PKCS_ED25519).expect("key");
        let request = CertificateParams::default()
            .serialize_request(&other)
            .expect("request");
        assert!(matches!(
            verify_csr(request.der()),
            Err(PkiError::KeyKind { .. })
        ));
    }

    #[test]
    fn no_signed_byte_of_a_request_can_be_changed() {
        let good = NodeKey::generate()
            .expect("key")
            .request()
            .expect("request");
        // The signed part is the first element of the outer sequence; both are short here.
        assert_eq!((good[0], good[1], good[3]), (0x30, 0x81, 0x30));
        let end = 5 + usize::from(good[4]);
        for i in 3..end {
            let mut bad = good.clone();
            bad[i] ^= 0x11;
            assert!(verify_csr(&bad).is_err(), "byte {i} of {end}");
        }
    }
}
