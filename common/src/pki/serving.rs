//! Certificates of the cluster's own signers: what the kubelet endpoint asks of them, and whom their
//! client certificates name.

use std::fmt;
use std::net::IpAddr;

use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PublicKeyData, SanType};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, UnixTime};

use super::identity::ORGANIZATION;
use super::{PkiError, ServerCredentials, limit, parse, validity_of};

/// A chain of a cluster's signer: a leaf and a few intermediates.
const CHAIN_LIMIT: usize = 64 * 1024;

/// Whom a client certificate names: Kubernetes takes the common name for the user and the
/// organizations for the groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    pub common_name: String,
    pub organizations: Vec<String>,
}

impl Subject {
    /// Reads a certificate whose chain has been verified.
    pub fn of(der: &CertificateDer<'_>) -> Result<Self, PkiError> {
        let certificate = parse(der, "the client's certificate")?;
        let subject = certificate.subject();
        let name = subject.iter_common_name().next();
        let name = name.and_then(|a| a.as_str().ok()).filter(|n| !n.is_empty());
        let organizations = subject.iter_organization();
        Ok(Self {
            common_name: name
                .ok_or_else(|| PkiError::Malformed {
                    what: "the client's certificate",
                    why: "it has no common name".into(),
                })?
                .to_owned(),
            organizations: organizations
                .filter_map(|a| a.as_str().ok().map(str::to_owned))
                .collect(),
        })
    }
}

/// The key of the kubelet endpoint, for which the cluster's signer `kubernetes.io/kubelet-serving`
/// is asked for a certificate.
pub struct ServingKey(KeyPair);

impl fmt::Debug for ServingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServingKey")
    }
}

impl ServingKey {
    pub fn generate() -> Result<Self, PkiError> {
        KeyPair::generate()
            .map(Self)
            .map_err(sign("make the endpoint's key"))
    }

    /// A PKCS#10 request in PEM, in the only form that the signer takes: O=system:nodes,
    /// CN=system:node:NAME, addresses and no other alternative names.
    pub fn request(&self, name: &str, address: IpAddr) -> Result<String, PkiError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::OrganizationName, ORGANIZATION);
        params
            .distinguished_name
            .push(DnType::CommonName, format!("system:node:{name}"));
        params.subject_alt_names = vec![SanType::IpAddress(address)];
        let request = params
            .serialize_request(&self.0)
            .map_err(sign("sign the endpoint's request"))?;
        request.pem().map_err(sign("write the endpoint's request"))
    }

    /// The key with the chain that was issued for it (PEM, leaf first), and until when it holds.
    pub fn with_chain(&self, pem: &[u8]) -> Result<(ServerCredentials, UnixTime), PkiError> {
        let what = "the certificate that was issued";
        limit(pem, what, CHAIN_LIMIT)?;
        let malformed = |why: String| PkiError::Malformed { what, why };
        let chain = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
        let chain = chain.map_err(|e| malformed(e.to_string()))?;
        let leaf = chain.first();
        let leaf = leaf.ok_or_else(|| malformed("there is none in it".into()))?;
        let held = parse(leaf, what)?.public_key().raw == self.0.subject_public_key_info();
        if !held {
            return Err(PkiError::KeyMismatch);
        }
        let until = validity_of(leaf)?.not_after;
        let key = PrivatePkcs8KeyDer::from(self.0.serialize_der()).into();
        Ok((ServerCredentials { chain, key }, until))
    }
}

fn sign(what: &'static str) -> impl Fn(rcgen::Error) -> PkiError {
    move |source| PkiError::Sign { what, source }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use x509_parser::certification_request::X509CertificationRequest;
    use x509_parser::extensions::{GeneralName, ParsedExtension};
    use x509_parser::prelude::FromDer;

    use super::*;
    use crate::pki::{Ca, ClusterId, Validity};

    #[test]
    fn the_request_has_the_form_that_the_signer_demands() {
        let address: IpAddr = "10.244.0.9".parse().expect("address");
        let key = ServingKey::generate().expect("key");
        let pem = key.request("cloudcore", address).expect("request");
        let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).expect("PEM");
        let (_, request) = X509CertificationRequest::from_der(&pem.contents).expect("PKCS#10");
        let info = &request.certification_request_info;
        assert_eq!(
            info.subject.to_string(),
            "O=system:nodes, CN=system:node:cloudcore"
        );
        let mut extensions = request.requested_extensions().expect("extensions");
        let names = extensions.find_map(|e| match e {
            ParsedExtension::SubjectAlternativeName(san) => Some(san.general_names.clone()),
            _ => None,
        });
        assert_eq!(names, Some(vec![GeneralName::IPAddress(&[10, 244, 0, 9])]));
    }

    #[test]
    fn a_chain_for_another_key_is_not_taken() {
        let cluster = ClusterId::parse("c1").expect("label");
        let now = Validity::starting(UnixTime::now(), Duration::from_secs(3600));
        let ca = Ca::generate(&cluster, now).expect("root");
        let key = ServingKey::generate().expect("key");
        let other = ca.to_pem().certificate;
        assert!(matches!(
            key.with_chain(other.as_bytes()),
            Err(PkiError::KeyMismatch)
        ));
        assert!(key.with_chain(b"nothing").is_err());
    }

    #[test]
    fn an_endpoints_certificate_is_for_its_address() {
        let cluster = ClusterId::parse("c1").expect("label");
        let now = Validity::starting(UnixTime::now(), Duration::from_secs(3600));
        let ca = Ca::generate(&cluster, now).expect("root");
        let address: IpAddr = "2001:db8::9".parse().expect("address");
        let issued = ca.issue_endpoint(&cluster, address, now).expect("issued");
        let leaf = parse(&issued.chain[0], "the leaf").expect("certificate");
        let names = leaf.subject_alternative_name().expect("read").expect("one");
        let IpAddr::V6(v6) = address else {
            panic!("an IPv6 address")
        };
        assert_eq!(
            names.value.general_names,
            [GeneralName::IPAddress(&v6.octets())]
        );
        assert_eq!(
            Subject::of(&issued.chain[0]).expect("subject").common_name,
            "cloudcore.c1"
        );
    }
}
