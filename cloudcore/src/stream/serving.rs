//! The certificate that kubelet endpoints show: the project's own, or one of the cluster's signer.
//!
//! - Owns: the TLS configuration that new connections get, and its renewal.
//! - Takes: this replica's address; word that a peer did not believe the certificate.
//! - Gives: a certificate for that address, always a valid one.
//! - Never: approves a request of anybody else; keeps a key outside this process.
//!
//! ```text
//! auto: own ──a peer mistrusts──► asks kubernetes.io/kubelet-serving ──issued──► the cluster's
//!                                     └─ approved by CloudCore, else by a person
//! ```
//!
//! An API server believes any certificate unless it runs with `--kubelet-certificate-authority`.

mod request;

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use common::pki::{PkiError, ServerCredentials, Validity};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme,
    SupportedProtocolVersion,
};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::enroll::authority::Authority;
use request::Requests;

/// Renewed long before its end while the process lives.
const OWN_LIFETIME: Duration = Duration::from_secs(365 * 86_400);
/// After the cluster gave no certificate.
const AGAIN: Duration = Duration::from_secs(300);

const VERSIONS: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13, &rustls::version::TLS12];

/// Who signs the certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Serving {
    /// The project's CA, until a peer does not believe it; then the cluster's signer.
    #[default]
    Auto,
    Own,
    Cluster,
}

impl Serving {
    const ALL: [(Serving, &'static str); 3] = [
        (Serving::Auto, "auto"),
        (Serving::Own, "own"),
        (Serving::Cluster, "cluster"),
    ];
}

impl FromStr for Serving {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|(_, name)| *name == text);
        found
            .map(|(serving, _)| *serving)
            .ok_or_else(|| format!("{text:?} is none of auto, own, cluster"))
    }
}

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum ServingError {
    #[error("the certificate of the kubelet endpoints cannot be made")]
    Pki(#[from] PkiError),
    #[error("the certificate of the kubelet endpoints is unusable")]
    Tls(#[from] rustls::Error),
    #[error("signer kubernetes.io/kubelet-serving was not asked")]
    Kube(#[from] crate::kube::KubeError),
    #[error("CertificateSigningRequest {name} was {what}")]
    Refused { name: String, what: String },
    #[error("nobody approved CertificateSigningRequest {0}: kubectl certificate approve {0}")]
    NotApproved(String),
}

/// What the listeners take their configuration from. Cheap to clone.
#[derive(Clone)]
pub(super) struct ServingTls {
    config: watch::Receiver<Arc<ServerConfig>>,
    mistrusted: Arc<Notify>,
}

impl ServingTls {
    /// For a new connection.
    pub(super) fn config(&self) -> Arc<ServerConfig> {
        self.config.borrow().clone()
    }

    /// A peer said that it does not believe the certificate.
    pub(super) fn mistrusted(&self) {
        self.mistrusted.notify_one();
    }

    #[cfg(test)]
    pub(super) fn fixed(credentials: &ServerCredentials) -> (Self, Arc<Notify>) {
        let sender = watch::Sender::new(config(credentials).unwrap());
        let mistrusted = Arc::new(Notify::new());
        let tls = Self {
            config: sender.subscribe(),
            mistrusted: mistrusted.clone(),
        };
        (tls, mistrusted)
    }
}

/// Keeps the certificate valid.
pub(super) struct ServingTask {
    authority: Arc<Authority>,
    address: IpAddr,
    serving: Serving,
    requests: Requests,
    config: watch::Sender<Arc<ServerConfig>>,
    mistrusted: Arc<Notify>,
    renew_at: UnixTime,
}

/// Begins with the own certificate in any case: the endpoints never wait for a signer.
pub(super) fn build(
    authority: Arc<Authority>,
    address: IpAddr,
    serving: Serving,
    client: kube::Client,
) -> Result<(ServingTls, ServingTask), ServingError> {
    let (first, until) = own(&authority, address)?;
    let sender = watch::Sender::new(config(&first)?);
    let mistrusted = Arc::new(Notify::new());
    let tls = ServingTls {
        config: sender.subscribe(),
        mistrusted: mistrusted.clone(),
    };
    let task = ServingTask {
        requests: Requests::new(client, address),
        authority,
        address,
        serving,
        config: sender,
        mistrusted,
        renew_at: renewal(UnixTime::now(), until),
    };
    Ok((tls, task))
}

impl ServingTask {
    /// Ends with the token.
    pub(super) async fn run(mut self, shutdown: CancellationToken) {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {}
            () = self.keep() => {}
        }
    }

    async fn keep(&mut self) {
        let mut of_the_cluster = self.serving == Serving::Cluster;
        let mut due = of_the_cluster;
        loop {
            if due {
                let wait = match self.renew(of_the_cluster).await {
                    Ok(()) => Duration::ZERO,
                    Err(error) => {
                        warn!(
                            error = %crate::chain(&error),
                            "the kubelet endpoints keep the certificate that they have; trying again"
                        );
                        AGAIN
                    }
                };
                tokio::time::sleep(wait).await;
            }
            tokio::select! {
                () = until(self.renew_at) => due = true,
                () = self.mistrusted.notified() => {
                    due = self.serving == Serving::Auto && !of_the_cluster;
                    if due {
                        info!("a client does not believe the project's certificate (an API server with --kubelet-certificate-authority does so): asking signer kubernetes.io/kubelet-serving for one");
                        of_the_cluster = true;
                    } else {
                        tracing::debug!("a client does not believe the kubelet endpoints' certificate");
                    }
                }
            }
        }
    }

    async fn renew(&mut self, of_the_cluster: bool) -> Result<(), ServingError> {
        let (credentials, until) = if of_the_cluster {
            // Until it is renewed the next try is due at once.
            self.renew_at = UnixTime::now();
            self.requests.certificate().await?
        } else {
            own(&self.authority, self.address)?
        };
        self.config.send_replace(config(&credentials)?);
        self.renew_at = renewal(UnixTime::now(), until);
        let signer = if of_the_cluster { "the cluster" } else { "own" };
        info!(address = %self.address, signer, until = until.as_secs(), "the kubelet endpoints have a new certificate");
        Ok(())
    }
}

fn own(
    authority: &Authority,
    address: IpAddr,
) -> Result<(ServerCredentials, UnixTime), ServingError> {
    let validity = Validity::starting(UnixTime::now(), OWN_LIFETIME);
    let issued = authority
        .ca
        .issue_endpoint(&authority.cluster, address, validity)?;
    Ok((issued, validity.not_after))
}

/// At 80 percent of what is left of its life.
fn renewal(now: UnixTime, until: UnixTime) -> UnixTime {
    let left = until.as_secs().saturating_sub(now.as_secs());
    UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs() + left / 5 * 4))
}

/// In steps, since a machine may sleep and its clock may jump.
async fn until(time: UnixTime) {
    const STEP: u64 = 3600;
    loop {
        let left = time.as_secs().saturating_sub(UnixTime::now().as_secs());
        if left == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_secs(left.min(STEP))).await;
    }
}

fn config(credentials: &ServerCredentials) -> Result<Arc<ServerConfig>, rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(VERSIONS)?
        .with_client_cert_verifier(Arc::new(Possession(provider)))
        .with_single_cert(credentials.chain.clone(), credentials.key.clone_key())?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(Arc::new(config))
}

/// The client holds the key of the certificate that it shows; whether that is anybody's is judged
/// by `auth`, which answers with words.
struct Possession(Arc<CryptoProvider>);

impl fmt::Debug for Possession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Possession")
    }
}

impl ClientCertVerifier for Possession {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_renewed_at_four_fifths_of_what_is_left() {
        let at = |s| UnixTime::since_unix_epoch(Duration::from_secs(s));
        assert_eq!(renewal(at(1000), at(2000)), at(1800));
        assert_eq!(renewal(at(2000), at(1000)), at(2000));
    }

    #[test]
    fn signers_have_their_names() {
        for (serving, name) in Serving::ALL {
            assert_eq!(name.parse(), Ok(serving));
        }
        assert!("Own".parse::<Serving>().is_err());
    }
}
