//! The CA of the cluster's client certificates, as the API server publishes it: `client-ca-file` in
//! ConfigMap `kube-system/extension-apiserver-authentication`, followed while it changes.

use std::sync::Arc;

use futures::StreamExt;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use common::pki::Subject;

use super::{AUTHENTICATED, Bad, Refused, User};
use crate::kube::WatchBackoff;

const NAMESPACE: &str = "kube-system";
const NAME: &str = "extension-apiserver-authentication";
const KEY: &str = "client-ca-file";

type Verifier = Arc<dyn ClientCertVerifier>;

/// Judges client certificates. Cheap to clone.
#[derive(Clone)]
pub(in crate::stream) struct ClientCa {
    verifier: watch::Receiver<Option<Verifier>>,
}

/// Follows the ConfigMap.
pub(in crate::stream) struct ClientCaTask {
    client: Client,
    verifier: watch::Sender<Option<Verifier>>,
}

impl ClientCa {
    /// `client` acts as CloudCore and carries a watch.
    pub(in crate::stream) fn build(client: Client) -> (Self, ClientCaTask) {
        let sender = watch::Sender::new(None);
        let ca = Self {
            verifier: sender.subscribe(),
        };
        let task = ClientCaTask {
            client,
            verifier: sender,
        };
        (ca, task)
    }

    #[cfg(test)]
    pub(in crate::stream) fn fixed(pem: &str) -> Self {
        let sender = watch::Sender::new(Some(verifier(pem).unwrap()));
        Self {
            verifier: sender.subscribe(),
        }
    }

    /// Whom the certificate names. That the client holds its key is TLS's word.
    pub(super) fn user(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<User, Refused> {
        let verifier = self.verifier.borrow().clone();
        let verifier = verifier.ok_or(Refused::NoClientCa)?;
        verifier
            .verify_client_cert(leaf, intermediates, now)
            .map_err(|e| Refused::BadCredentials(Bad::Certificate(e)))?;
        let subject = Subject::of(leaf).map_err(|e| Refused::BadCredentials(Bad::Subject(e)))?;
        let mut groups = subject.organizations;
        groups.push(AUTHENTICATED.to_owned());
        Ok(User {
            name: subject.common_name,
            uid: None,
            groups,
            extra: Default::default(),
        })
    }
}

impl ClientCaTask {
    /// Ends with the token.
    pub(in crate::stream) async fn run(self, shutdown: CancellationToken) {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {}
            () = self.follow() => {}
        }
    }

    async fn follow(self) {
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), NAMESPACE);
        let config = watcher::Config::default().fields(&format!("metadata.name={NAME}"));
        let mut events = watcher(api, config)
            .backoff(WatchBackoff::default())
            .boxed();
        while let Some(event) = events.next().await {
            match event {
                Ok(watcher::Event::Apply(map) | watcher::Event::InitApply(map)) => self.see(&map),
                // What was good a moment ago is good until something else is told.
                Ok(watcher::Event::Init | watcher::Event::InitDone | watcher::Event::Delete(_)) => {
                }
                Err(error) => tracing::warn!(
                    error = %crate::chain(&error),
                    "the cluster's client CA cannot be read; while none is known, kubelet endpoints answer 500 to client certificates. Run `cloudcore install` if the role is missing"
                ),
            }
        }
    }

    fn see(&self, map: &ConfigMap) {
        let pem = map.data.as_ref().and_then(|data| data.get(KEY));
        match pem.map(|pem| verifier(pem)) {
            Some(Ok(new)) => {
                self.verifier.send_replace(Some(new));
            }
            Some(Err(error)) => tracing::warn!(
                error = %crate::chain(&error),
                "{KEY} of ConfigMap {NAMESPACE}/{NAME} cannot be used; the one before stays"
            ),
            None => tracing::warn!(
                "ConfigMap {NAMESPACE}/{NAME} has no {KEY}: the API server has no --client-ca-file, and kubelet endpoints take bearer tokens only"
            ),
        }
    }
}

/// Why a bundle cannot be used.
#[derive(Debug, thiserror::Error)]
enum Unusable {
    #[error("it is no PEM")]
    Pem(#[source] rustls::pki_types::pem::Error),
    #[error("a certificate in it is none of a CA")]
    Root(#[source] rustls::Error),
    #[error("there is no certificate in it")]
    Empty(#[source] rustls::server::VerifierBuilderError),
}

fn verifier(pem: &str) -> Result<Verifier, Unusable> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
        roots
            .add(certificate.map_err(Unusable::Pem)?)
            .map_err(Unusable::Root)?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let built = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
    let built: Verifier = built.map_err(Unusable::Empty)?;
    Ok(built)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use serde_json::json;
    use tokio::sync::mpsc;
    use tokio::time::timeout;

    use super::*;
    use crate::kube::fake::FakeApi;
    use crate::stream::testing::{ClientRoot, watching};

    fn map(pem: &str) -> ConfigMap {
        ConfigMap {
            data: Some(BTreeMap::from([(KEY.to_owned(), pem.to_owned())])),
            ..ConfigMap::default()
        }
    }

    #[tokio::test]
    async fn another_bundle_takes_the_place_of_the_one_before_and_a_spoilt_one_does_not() {
        let (old, new) = (ClientRoot::new(), ClientRoot::new());
        let (ca, task) = ClientCa::build(FakeApi::new().client());
        let (jane, _) = old.client("jane", &["dev"]);
        let (joe, _) = new.client("joe", &[]);
        let look = |leaf: &CertificateDer<'_>| ca.user(leaf, &[], UnixTime::now());
        assert!(matches!(look(&jane), Err(Refused::NoClientCa)));
        task.see(&map(&old.pem()));
        let user = look(&jane).unwrap();
        assert_eq!(user.name, "jane");
        assert_eq!(user.groups, ["dev", AUTHENTICATED]);
        assert!(matches!(look(&joe), Err(Refused::BadCredentials(_))));
        for spoilt in ["", "nonsense", "-----BEGIN CERTIFICATE-----\nAA==\n"] {
            task.see(&map(spoilt));
            assert!(look(&jane).is_ok(), "{spoilt:?}");
        }
        // While a CA changes there are two.
        task.see(&map(&format!("{}{}", old.pem(), new.pem())));
        assert!(look(&jane).is_ok() && look(&joe).is_ok());
        task.see(&map(&new.pem()));
        assert!(look(&jane).is_err() && look(&joe).is_ok());
    }

    #[tokio::test]
    async fn the_configmap_is_followed_while_it_changes() {
        let (old, new) = (ClientRoot::new(), ClientRoot::new());
        let (fake, (say, said)) = (FakeApi::new(), mpsc::unbounded_channel());
        let path = format!("/api/v1/namespaces/{NAMESPACE}/configmaps/{NAME}");
        fake.put(&path, json!({"data": {KEY: old.pem()}}));
        let (ca, task) = ClientCa::build(watching(&fake, said));
        let mut verifier = ca.verifier.clone();
        let mut another = async || {
            let changed = timeout(Duration::from_secs(10), verifier.changed()).await;
            changed.expect("no other CA was taken").unwrap();
        };
        let stop = CancellationToken::new();
        let running = tokio::spawn(task.run(stop.clone()));
        let (jane, _) = old.client("jane", &[]);
        let (joe, _) = new.client("joe", &[]);
        let known = |leaf: &CertificateDer<'_>| ca.user(leaf, &[], UnixTime::now()).is_ok();
        another().await;
        assert!(known(&jane) && !known(&joe));
        let mut object = fake.get(&path).unwrap();
        object["data"][KEY] = json!(new.pem());
        object["metadata"]["resourceVersion"] = json!("100");
        // What is taken away leaves what was good.
        for kind in ["MODIFIED", "DELETED"] {
            say.send(json!({"type": kind, "object": object})).unwrap();
        }
        another().await;
        assert!(!known(&jane) && known(&joe));
        object["data"][KEY] = json!(old.pem());
        say.send(json!({"type": "ADDED", "object": object}))
            .unwrap();
        another().await;
        assert!(known(&jane) && !known(&joe));
        stop.cancel();
        running.await.unwrap();
    }

    #[test]
    fn a_certificate_that_has_ended_or_is_a_servers_is_not_taken() {
        let root = ClientRoot::new();
        let ca = ClientCa::fixed(&root.pem());
        let (jane, _) = root.client("jane", &[]);
        let late = UnixTime::since_unix_epoch(std::time::Duration::from_secs(1 << 37));
        assert!(ca.user(&jane, &[], late).is_err());
        let (server, _) = root.server("jane");
        assert!(ca.user(&server, &[], UnixTime::now()).is_err());
    }
}
