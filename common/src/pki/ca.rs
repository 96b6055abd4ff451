//! CloudCore's certificate authority: one P-256 root, kept as PEM in a Secret of the cluster.
//!
//! Owns what every issued certificate says. A request gives nothing but its public key.

use std::fmt;
use std::net::IpAddr;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber, SubjectPublicKeyInfo,
    date_time_ymd,
};
use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime};

use super::csr::verify_csr;
use super::identity::node_uri;
use super::{ClusterId, KeyId, PkiError, Validity, limit, parse};
use crate::ids::NodeName;

/// A root certificate and its key.
pub struct Ca {
    key: KeyPair,
    certificate: CertificateDer<'static>,
}

/// A root as a Secret keeps it.
#[derive(Clone)]
pub struct CaPem {
    pub certificate: String,
    /// PKCS#8. Never in a log.
    pub key: String,
}

impl fmt::Debug for CaPem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CaPem")
            .field("certificate", &self.certificate)
            .finish_non_exhaustive()
    }
}

/// What the listener shows: the leaf, cross-signed roots if any, and the root itself.
pub struct ServerCredentials {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
}

impl Clone for ServerCredentials {
    fn clone(&self) -> Self {
        Self {
            chain: self.chain.clone(),
            key: self.key.clone_key(),
        }
    }
}

impl fmt::Debug for ServerCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerCredentials")
            .field("certificates", &self.chain.len())
            .finish_non_exhaustive()
    }
}

impl Ca {
    /// A new root for a cluster. The subject carries the key's id, so that an old and a new root of
    /// one cluster have different names and a chain finds the right one.
    pub fn generate(cluster: &ClusterId, validity: Validity) -> Result<Self, PkiError> {
        let key = KeyPair::generate().map_err(sign("make the root's key"))?;
        let id = KeyId::of_spki(&key.subject_public_key_info()).to_string();
        let mut params = params(validity)?;
        params.distinguished_name.push(
            DnType::CommonName,
            format!("edge root {cluster} {}", &id[..8]),
        );
        root_usages(&mut params);
        let certificate = params
            .self_signed(&key)
            .map_err(sign("sign the root"))?
            .der()
            .clone();
        Ok(Self { key, certificate })
    }

    /// Reads back what [`Ca::to_pem`] wrote, and checks that key and certificate belong together.
    pub fn from_pem(pem: &CaPem) -> Result<Self, PkiError> {
        limit(pem.certificate.as_bytes(), "the root's PEM", 64 * 1024)?;
        limit(pem.key.as_bytes(), "the root key's PEM", 64 * 1024)?;
        let certificate = CertificateDer::from_pem_slice(pem.certificate.as_bytes())
            .map_err(|e| malformed("the root's PEM", e))?;
        // The parser's message could quote the key: only the fact is told.
        let key = KeyPair::from_pem(&pem.key)
            .map_err(|_| malformed("the root key's PEM", "not a PKCS#8 private key"))?;
        let parsed = parse(&certificate, "the root's certificate")?;
        if parsed.public_key().raw != key.subject_public_key_info() {
            return Err(PkiError::KeyMismatch);
        }
        if !parsed.is_ca() {
            return Err(malformed("the root's certificate", "not a CA certificate"));
        }
        drop(parsed);
        Ok(Self { key, certificate })
    }

    /// A secret that every holder of this CA's key has in common, one for each purpose.
    pub fn derive(&self, purpose: &str) -> [u8; 32] {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &self.key.serialize_der());
        let mut secret = [0; 32];
        secret.copy_from_slice(hmac::sign(&key, purpose.as_bytes()).as_ref());
        secret
    }

    pub fn to_pem(&self) -> CaPem {
        CaPem {
            certificate: pem(&self.certificate),
            key: self.key.serialize_pem(),
        }
    }

    /// The root itself, DER: a trust anchor.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// What a token pins: SHA-256 of the root's SubjectPublicKeyInfo.
    pub fn pin(&self) -> KeyId {
        KeyId::of_spki(&self.key.subject_public_key_info())
    }

    /// The new root's name and key, signed by this one: a device that trusts only this root can
    /// then verify what the new one signs.
    pub fn cross_sign(
        &self,
        new: &Ca,
        validity: Validity,
    ) -> Result<CertificateDer<'static>, PkiError> {
        let subject = Issuer::from_ca_cert_der(&new.certificate, &new.key)
            .map_err(sign("read the new root's name"))?;
        let mut params = params(validity)?;
        params.distinguished_name = subject_of(&new.certificate)?;
        root_usages(&mut params);
        let spki = SubjectPublicKeyInfo::from_der(&subject.key().subject_public_key_info())
            .map_err(sign("read the new root's key"))?;
        self.sign(&params, &spki, "cross-sign the new root")
    }

    /// A key and certificate for the listener, under the cluster's fixed name. `cross` are
    /// certificates of this root by older ones, shown to devices that know only those.
    pub fn issue_server(
        &self,
        cluster: &ClusterId,
        validity: Validity,
        cross: &[CertificateDer<'static>],
    ) -> Result<ServerCredentials, PkiError> {
        let name = cluster.server_name();
        let alternative =
            SanType::DnsName(name.as_str().try_into().map_err(sign("name the server"))?);
        let mut credentials = self.server(&name, alternative, validity)?;
        // The root stays last: devices that know it stop there, others go on to an older one.
        let root = credentials.chain.len() - 1;
        credentials.chain.splice(root..root, cross.iter().cloned());
        Ok(credentials)
    }

    /// A key and certificate for the kubelet endpoint at this address.
    pub fn issue_endpoint(
        &self,
        cluster: &ClusterId,
        address: IpAddr,
        validity: Validity,
    ) -> Result<ServerCredentials, PkiError> {
        let name = cluster.server_name();
        self.server(&name, SanType::IpAddress(address), validity)
    }

    /// The leaf and the root.
    fn server(
        &self,
        common_name: &str,
        alternative: SanType,
        validity: Validity,
    ) -> Result<ServerCredentials, PkiError> {
        let key = KeyPair::generate().map_err(sign("make the server's key"))?;
        let mut params = params(validity)?;
        params
            .distinguished_name
            .push(DnType::CommonName, common_name);
        params.subject_alt_names = vec![alternative];
        leaf_usages(&mut params, ExtendedKeyUsagePurpose::ServerAuth);
        let leaf = self.sign(&params, &key, "sign the server's certificate")?;
        Ok(ServerCredentials {
            chain: vec![leaf, self.certificate.clone()],
            key: PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
        })
    }

    /// Signs a node's request: leaf first, without the root.
    ///
    /// Takes the public key from the request and nothing else; subject, alternative name, usages
    /// and lifetime are ours.
    pub fn sign_node_csr(
        &self,
        csr: &[u8],
        node: &NodeName,
        cluster: &ClusterId,
        validity: Validity,
    ) -> Result<Vec<CertificateDer<'static>>, PkiError> {
        let request = verify_csr(csr)?;
        let spki = SubjectPublicKeyInfo::from_der(request.spki())
            .map_err(sign("read the request's key"))?;
        let mut params = params(validity)?;
        params
            .distinguished_name
            .push(DnType::OrganizationName, super::identity::ORGANIZATION);
        params
            .distinguished_name
            .push(DnType::CommonName, node.user());
        params.subject_alt_names = vec![SanType::URI(
            node_uri(cluster, node)
                .try_into()
                .map_err(sign("name the node"))?,
        )];
        leaf_usages(&mut params, ExtendedKeyUsagePurpose::ClientAuth);
        Ok(vec![self.sign(
            &params,
            &spki,
            "sign the node's certificate",
        )?])
    }

    fn sign(
        &self,
        params: &CertificateParams,
        key: &impl PublicKeyData,
        what: &'static str,
    ) -> Result<CertificateDer<'static>, PkiError> {
        let issuer = Issuer::from_ca_cert_der(&self.certificate, &self.key)
            .map_err(sign("read the root"))?;
        let certificate = params.signed_by(key, &issuer).map_err(sign(what))?;
        Ok(certificate.der().clone())
    }
}

impl fmt::Debug for Ca {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ca")
            .field("pin", &self.pin())
            .finish_non_exhaustive()
    }
}

fn params(validity: Validity) -> Result<CertificateParams, PkiError> {
    // The last second that X.509 can write.
    const YEAR_10000: u64 = 253_402_300_799;
    let at = |t: UnixTime| {
        date_time_ymd(1970, 1, 1) + std::time::Duration::from_secs(t.as_secs().min(YEAR_10000))
    };
    // 16 random bytes, positive and never zero: unique whatever the key, so that a renewal over
    // one key is another certificate.
    let mut serial = [0; 16];
    SystemRandom::new()
        .fill(&mut serial)
        .map_err(|_| PkiError::Random)?;
    serial[0] = (serial[0] & 0x7f) | 0x40;
    let mut params = CertificateParams::default();
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.distinguished_name = DistinguishedName::new();
    params.not_before = at(validity.not_before);
    params.not_after = at(validity.not_after);
    Ok(params)
}

fn root_usages(params: &mut CertificateParams) {
    // Roots sign roots (when they change) and leaves, nothing in between.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
}

fn leaf_usages(params: &mut CertificateParams, purpose: ExtendedKeyUsagePurpose) {
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![purpose];
    params.use_authority_key_identifier_extension = true;
}

fn subject_of(certificate: &CertificateDer<'_>) -> Result<DistinguishedName, PkiError> {
    let parsed = parse(certificate, "the new root's certificate")?;
    let common_name = parsed
        .subject()
        .iter_common_name()
        .next()
        .and_then(|cn| cn.as_str().ok())
        .ok_or_else(|| malformed("the new root's certificate", "no common name"))?;
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    Ok(name)
}

fn pem(der: &CertificateDer<'_>) -> String {
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut out = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(64) {
        out.push_str(std::str::from_utf8(line).expect("base64 is ASCII"));
        out.push('\n');
    }
    out.push_str("-----END CERTIFICATE-----\n");
    out
}

fn sign(what: &'static str) -> impl Fn(rcgen::Error) -> PkiError {
    move |source| PkiError::Sign { what, source }
}

fn malformed(what: &'static str, why: impl ToString) -> PkiError {
    PkiError::Malformed {
        what,
        why: why.to_string(),
    }
}
