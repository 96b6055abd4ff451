//! What a node's certificate says, read strictly: the identity behind every session.

use std::sync::Arc;
use std::time::Duration;

use rustls::RootCertStore;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::{CertificateDer, UnixTime};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;

use super::{ClusterId, KeyId, PkiError, parse, validity_of};
use crate::ids::NodeName;

/// The organization that the API server's Node authorizer knows nodes by.
pub(super) const ORGANIZATION: &str = "system:nodes";

/// A node as its certificate names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeIdentity {
    pub node: NodeName,
    pub cluster: ClusterId,
    pub key_id: KeyId,
    pub not_before: UnixTime,
    pub not_after: UnixTime,
    /// As in the certificate, big-endian.
    pub serial: Vec<u8>,
}

impl NodeIdentity {
    /// Reads a certificate whose chain has been verified. Anything but the exact form that
    /// CloudCore issues is refused: one common name, one organization, one URI, client
    /// authentication only.
    pub fn from_certificate(der: &[u8]) -> Result<Self, PkiError> {
        let certificate = parse(der, "the node's certificate")?;
        let node = subject_node(&certificate)?;
        let cluster = uri_cluster(&certificate, &node)?;
        check_usages(&certificate)?;
        let validity = validity_of(&CertificateDer::from(der))?;
        Ok(Self {
            node,
            cluster,
            key_id: KeyId::of_spki(certificate.public_key().raw),
            not_before: validity.not_before,
            not_after: validity.not_after,
            serial: certificate.raw_serial().to_vec(),
        })
    }
}

/// `edge://CLUSTER/NAME`: the alternative name of a node's certificate.
pub(super) fn node_uri(cluster: &ClusterId, node: &NodeName) -> String {
    format!("edge://{cluster}/{node}")
}

fn subject_node(certificate: &X509Certificate<'_>) -> Result<NodeName, PkiError> {
    let subject = certificate.subject();
    let one = |values: Vec<&str>| match values.as_slice() {
        [value] => Some((*value).to_owned()),
        [] | [_, ..] => None,
    };
    let names = subject
        .iter_common_name()
        .filter_map(|a| a.as_str().ok())
        .collect();
    let organizations = subject
        .iter_organization()
        .filter_map(|a| a.as_str().ok())
        .collect();
    if subject.iter_attributes().count() != 2 {
        return Err(PkiError::NotANode("its subject is not one CN and one O"));
    }
    if one(organizations).as_deref() != Some(ORGANIZATION) {
        return Err(PkiError::NotANode("its organization is not system:nodes"));
    }
    one(names)
        .and_then(|cn| NodeName::parse(cn.strip_prefix("system:node:")?).ok())
        .ok_or(PkiError::NotANode(
            "its common name is not system:node:NAME",
        ))
}

fn uri_cluster(certificate: &X509Certificate<'_>, node: &NodeName) -> Result<ClusterId, PkiError> {
    let wrong = PkiError::NotANode("its alternative name is not one edge://CLUSTER/NAME");
    let Ok(Some(extension)) = certificate.subject_alternative_name() else {
        return Err(wrong);
    };
    let [GeneralName::URI(uri)] = extension.value.general_names.as_slice() else {
        return Err(wrong);
    };
    let parts = uri
        .strip_prefix("edge://")
        .and_then(|rest| rest.split_once('/'));
    match parts {
        Some((cluster, name)) if name == node.as_str() => ClusterId::parse(cluster),
        Some(_) | None => Err(wrong),
    }
}

fn check_usages(certificate: &X509Certificate<'_>) -> Result<(), PkiError> {
    if certificate.is_ca() {
        return Err(PkiError::NotANode("it is a CA certificate"));
    }
    let Ok(Some(usage)) = certificate.extended_key_usage() else {
        return Err(PkiError::NotANode("it has no extended key usage"));
    };
    let u = usage.value;
    let more = u.any || u.server_auth || u.code_signing || u.email_protection;
    if !u.client_auth || more || u.time_stamping || u.ocsp_signing || !u.other.is_empty() {
        return Err(PkiError::NotANode(
            "it is not for client authentication only",
        ));
    }
    Ok(())
}

/// Why an expired certificate does not get its holder a new one.
#[derive(Debug, thiserror::Error)]
pub enum ReenrolError {
    #[error("the certificate shown is not one that this cluster issued to a node")]
    Untrusted(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the certificate is of cluster {shown}, not of {ours}")]
    OtherCluster { shown: ClusterId, ours: ClusterId },
    #[error("the request is for another key than the certificate's")]
    OtherKey,
    #[error("the certificate of node {node} expired {days} days ago, longer than the grace")]
    TooLong { node: NodeName, days: u64 },
}

/// Whether the holder of an expired certificate may have a new one for the same key.
///
/// The chain is verified as of the certificate's own last second, so that only `now` and `grace`
/// decide about time. A certificate that has not expired passes as well. Whether the key is still
/// the enrolled one, and not revoked, is the caller's question to the enrolment record.
pub fn check_reenrolment(
    certificate: &[u8],
    requested: KeyId,
    roots: &[CertificateDer<'_>],
    ours: &ClusterId,
    now: UnixTime,
    grace: Duration,
) -> Result<NodeIdentity, ReenrolError> {
    let untrusted = |e: Box<dyn std::error::Error + Send + Sync>| ReenrolError::Untrusted(e);
    let identity =
        NodeIdentity::from_certificate(certificate).map_err(|e| untrusted(Box::new(e)))?;
    verify_client(certificate, roots, identity.not_after).map_err(untrusted)?;
    if identity.cluster != *ours {
        return Err(ReenrolError::OtherCluster {
            shown: identity.cluster,
            ours: ours.clone(),
        });
    }
    if identity.key_id != requested {
        return Err(ReenrolError::OtherKey);
    }
    let expired = now.as_secs().saturating_sub(identity.not_after.as_secs());
    if expired > grace.as_secs() {
        return Err(ReenrolError::TooLong {
            node: identity.node,
            days: expired / 86_400,
        });
    }
    Ok(identity)
}

fn verify_client(
    certificate: &[u8],
    roots: &[CertificateDer<'_>],
    at: UnixTime,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone().into_owned())?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(store), provider).build()?;
    verifier.verify_client_cert(&CertificateDer::from(certificate), &[], at)?;
    Ok(())
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
