//! TLS for the hub: who shows what to whom, and how each end judges the other.
//!
//! Owns the rustls configurations. TLS 1.3 only; tickets, resumption and early data are off,
//! because a resumed session skips the verification of the client. The server is known by a fixed
//! name, whatever host was dialled, and judged by the clock that the caller hands in. Revocation is
//! not checked here: it needs I/O, so whoever accepts the connection asks.

use std::sync::{Arc, Mutex, PoisonError};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig,
    SignatureScheme,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

use crate::pki::{ClusterId, KeyId, ServerCredentials, validity_of};

/// A session: the client's certificate is mandatory.
pub const ALPN_HUB: &[u8] = b"edge-hub/1";
/// Joining: the client has no certificate yet.
pub const ALPN_JOIN: &[u8] = b"edge-join/1";

/// The keys and roots given do not make a usable configuration.
#[derive(Debug, thiserror::Error)]
#[error("cannot build the TLS configuration of {what}")]
pub struct TlsError {
    what: &'static str,
    #[source]
    source: Box<dyn std::error::Error + Send + Sync>,
}

fn tls_error<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
    what: &'static str,
) -> impl Fn(E) -> TlsError {
    move |e| TlsError {
        what,
        source: e.into(),
    }
}

/// Why the server is not believed to be our cloud.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TrustError {
    #[error(
        "the cloud shows another CA than the token pins (shown: {}): \
         the token is of another cluster or of an earlier installation; make a new one",
        join(.shown)
    )]
    PinMismatch { shown: Vec<KeyId> },
    #[error(
        "the cloud's certificate is not signed by a root that this device trusts: \
         the cluster was installed anew; join again with a new token"
    )]
    OtherRoot,
    #[error(
        "who answers is not {expected}: a TLS-inspecting proxy or another server stands between; \
         let this address pass uninspected"
    )]
    Intercepted { expected: String },
    #[error("the certificate is signed by our root, but for another name than {expected}")]
    OtherName { expected: String },
    #[error(
        "the cloud's certificate ended at {not_after} and this device's clock says {now} \
         (seconds since 1970): check the device's clock, then the cloud's certificate"
    )]
    Expired { not_after: u64, now: u64 },
    #[error(
        "the cloud's certificate begins at {not_before} and this device's clock says {now} \
         (seconds since 1970): check the device's clock"
    )]
    NotYetValid { not_before: u64, now: u64 },
    #[error("the cloud's certificate is unusable: {0}")]
    Bad(String),
}

fn join(ids: &[KeyId]) -> String {
    let text: Vec<String> = ids.iter().map(KeyId::to_string).collect();
    if text.is_empty() {
        "none".into()
    } else {
        text.join(", ")
    }
}

/// What the device knows of the time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    Synchronised(UnixTime),
    /// The kernel's clock is not synchronised: it is at least the last authenticated time, if one
    /// is known.
    Unsynchronised(Option<UnixTime>),
}

/// What a dialler accepts as the end of the server's chain.
#[derive(Debug, Clone)]
pub enum Trust {
    /// Trust anchors, DER: two or more while the CA changes.
    Roots(Vec<CertificateDer<'static>>),
    /// Hashes of root keys, from a token. The root itself is in the chain that the server shows.
    Pins(Vec<KeyId>),
}

/// The device's certificate (leaf first) and key.
pub struct ClientIdentity {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
}

impl Clone for ClientIdentity {
    fn clone(&self) -> Self {
        Self {
            chain: self.chain.clone(),
            key: self.key.clone_key(),
        }
    }
}

impl std::fmt::Debug for ClientIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientIdentity").finish_non_exhaustive()
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn store(roots: &[CertificateDer<'static>]) -> Result<RootCertStore, rustls::Error> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone())?;
    }
    Ok(store)
}

/// The two faces of the listener. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ServerTls {
    pub(super) hub: Arc<ServerConfig>,
    pub(super) join: Arc<ServerConfig>,
}

impl ServerTls {
    /// `client_roots` are the roots that may have signed the nodes: two while the CA changes.
    pub fn new(
        credentials: &ServerCredentials,
        client_roots: &[CertificateDer<'static>],
    ) -> Result<Self, TlsError> {
        let roots = store(client_roots).map_err(tls_error("the hub (its roots)"))?;
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
            .clear_root_hint_subjects()
            .build()
            .map_err(tls_error("the hub (its roots)"))?;
        let builder = || {
            ServerConfig::builder_with_provider(provider())
                .with_protocol_versions(&[&TLS13])
                .map_err(tls_error("the hub"))
        };
        let finish = |config: Result<ServerConfig, rustls::Error>, alpn: &[u8]| {
            let mut config = config.map_err(tls_error("the hub (its certificate)"))?;
            config.alpn_protocols = vec![alpn.to_vec()];
            config.send_tls13_tickets = 0;
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.max_early_data_size = 0;
            Ok(Arc::new(config))
        };
        let (chain, key) = (&credentials.chain, &credentials.key);
        let hub = builder()?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key.clone_key());
        let join = builder()?
            .with_no_client_auth()
            .with_single_cert(chain.clone(), key.clone_key());
        Ok(Self {
            hub: finish(hub, ALPN_HUB)?,
            join: finish(join, ALPN_JOIN)?,
        })
    }
}

/// One dial's configuration, and what it found out about the server.
#[derive(Debug, Clone)]
pub(super) struct ClientTls {
    pub(super) config: Arc<ClientConfig>,
    pub(super) name: ServerName<'static>,
    judge: Arc<Judge>,
}

impl ClientTls {
    /// With an identity for a session, without for joining.
    pub(super) fn new(
        trust: Trust,
        cluster: &ClusterId,
        clock: Clock,
        identity: Option<ClientIdentity>,
    ) -> Result<Self, TlsError> {
        if let Trust::Roots(roots) = &trust {
            store(roots).map_err(tls_error("the device (its trust anchors)"))?;
        }
        let judge = Arc::new(Judge {
            trust,
            name: cluster.tls_name(),
            clock,
            provider: provider(),
            verdict: Mutex::new(None),
        });
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(tls_error("the device"))?
            .dangerous()
            .with_custom_certificate_verifier(judge.clone());
        let mut config = match identity {
            Some(id) => {
                let mut config = builder
                    .with_client_auth_cert(id.chain, id.key)
                    .map_err(tls_error("the device (its certificate)"))?;
                config.alpn_protocols = vec![ALPN_HUB.to_vec()];
                config
            }
            None => {
                let mut config = builder.with_no_client_auth();
                config.alpn_protocols = vec![ALPN_JOIN.to_vec()];
                config
            }
        };
        config.resumption = Resumption::disabled();
        config.enable_early_data = false;
        Ok(Self {
            config: Arc::new(config),
            name: cluster.tls_name(),
            judge,
        })
    }

    /// Why the server was not believed, if that is what ended the handshake.
    pub(super) fn verdict(&self) -> Option<TrustError> {
        self.judge
            .verdict
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// Judges the server: chain, name, time.
#[derive(Debug)]
struct Judge {
    trust: Trust,
    name: ServerName<'static>,
    clock: Clock,
    provider: Arc<CryptoProvider>,
    /// Kept here because QUIC turns a verifier's error into a number on its way out.
    verdict: Mutex<Option<TrustError>>,
}

impl Judge {
    fn judge(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
    ) -> Result<(), TrustError> {
        let parsed = ParsedCertificate::try_from(leaf).map_err(bad)?;
        let named = verify_server_name(&parsed, &self.name).is_ok();
        let expected = self.name.to_str().into_owned();
        let roots = self.anchors(others, named)?;
        let now = self.moment(leaf, others)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &roots, others, now, algorithms)
            .map_err(|e| match e {
                rustls::Error::InvalidCertificate(why) => self.explain(&why, leaf, now, named),
                other => bad(other),
            })?;
        if named {
            Ok(())
        } else {
            Err(TrustError::OtherName { expected })
        }
    }

    fn anchors(
        &self,
        shown: &[CertificateDer<'_>],
        named: bool,
    ) -> Result<RootCertStore, TrustError> {
        let pins = match &self.trust {
            Trust::Roots(roots) => return store(roots).map_err(bad),
            Trust::Pins(pins) => pins,
        };
        let mut roots = RootCertStore::empty();
        let mut keys = Vec::new();
        for certificate in shown {
            let Ok(key) = KeyId::of_certificate(certificate) else {
                continue;
            };
            if pins.contains(&key) {
                roots.add(certificate.clone().into_owned()).map_err(bad)?;
            }
            keys.push(key);
        }
        if !roots.is_empty() {
            Ok(roots)
        } else if named {
            Err(TrustError::PinMismatch { shown: keys })
        } else {
            Err(self.intercepted())
        }
    }

    /// The time by which to judge. Without a clock the true time is unknown but not before the
    /// last authenticated one; a certificate issued since then is taken as proof of later time.
    fn moment(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
    ) -> Result<UnixTime, TrustError> {
        let floor = match self.clock {
            Clock::Synchronised(now) => return Ok(now),
            Clock::Unsynchronised(last) => last,
        };
        let mut moment = validity_of(leaf).map_err(bad)?.not_before;
        for other in others {
            moment = moment.max(validity_of(other).map_err(bad)?.not_before);
        }
        Ok(floor.map_or(moment, |f| f.max(moment)))
    }

    fn explain(
        &self,
        why: &CertificateError,
        leaf: &CertificateDer<'_>,
        now: UnixTime,
        named: bool,
    ) -> TrustError {
        let validity = validity_of(leaf).ok();
        let (from, to) =
            validity.map_or((0, 0), |v| (v.not_before.as_secs(), v.not_after.as_secs()));
        let now = now.as_secs();
        match why {
            CertificateError::UnknownIssuer if named => TrustError::OtherRoot,
            CertificateError::UnknownIssuer => self.intercepted(),
            // A root of ours with the same name and another key.
            CertificateError::BadSignature if named => TrustError::OtherRoot,
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                TrustError::Expired { not_after: to, now }
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                TrustError::NotYetValid {
                    not_before: from,
                    now,
                }
            }
            other => bad(rustls::Error::InvalidCertificate(other.clone())),
        }
    }

    fn intercepted(&self) -> TrustError {
        TrustError::Intercepted {
            expected: self.name.to_str().into_owned(),
        }
    }
}

fn bad(e: impl std::fmt::Display) -> TrustError {
    TrustError::Bad(e.to_string())
}

impl ServerCertVerifier for Judge {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.judge(end_entity, intermediates).map_err(|error| {
            let alert = match &error {
                TrustError::Expired { .. } => CertificateError::Expired,
                TrustError::NotYetValid { .. } => CertificateError::NotValidYet,
                TrustError::OtherName { .. } => CertificateError::NotValidForName,
                TrustError::Bad(_) => CertificateError::BadEncoding,
                TrustError::PinMismatch { .. }
                | TrustError::OtherRoot
                | TrustError::Intercepted { .. } => CertificateError::UnknownIssuer,
            };
            *self.verdict.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            rustls::Error::InvalidCertificate(alert)
        })?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

#[cfg(test)]
#[path = "tls/tests.rs"]
mod tests;
