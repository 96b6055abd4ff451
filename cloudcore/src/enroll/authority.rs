//! The cluster's own CA, kept in Secret `edge-system/cloudcore-ca`.
//!
//! Whoever installs or first runs makes it; the API server's refusal to create a Secret twice
//! settles who that was. The cluster id is part of it, since the two only make sense together.

use std::collections::BTreeMap;
use std::time::Duration;

use common::pki::{Ca, CaPem, ClusterId, PkiError, Validity};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use rand::Rng;
use rustls::pki_types::UnixTime;

use crate::kube::{KubeError, NAMESPACE, is_absent, is_conflict};

const NAME: &str = "cloudcore-ca";
const CERTIFICATE: &str = "ca.crt";
const KEY: &str = "ca.key";
const CLUSTER: &str = "cluster-id";

/// Ten years: a device may sleep for one and must find a root that it can verify.
const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 86_400);

/// Why there is no CA.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("the cluster's CA is out of reach")]
    Kube(#[from] KubeError),
    #[error(
        "Secret {NAMESPACE}/{NAME} holds no usable CA; restore it from a backup (a new one would cut off every device)"
    )]
    Unusable(#[source] PkiError),
    #[error("the cluster's CA cannot be made")]
    Make(#[source] PkiError),
}

/// The CA and the name of the cluster that it is of.
pub struct Authority {
    pub ca: Ca,
    pub cluster: ClusterId,
}

impl Authority {
    /// Reads the CA; the first caller in a cluster makes it.
    pub async fn ensure(client: &Client) -> Result<Self, AuthorityError> {
        loop {
            if let Some(found) = Self::find(client).await? {
                return Ok(found);
            }
            let made = build().map_err(AuthorityError::Make)?;
            match secrets(client).create(&PostParams::default(), &made).await {
                Ok(made) => return parse(&made),
                // Somebody else made it in between: theirs counts.
                Err(e) if is_conflict(&e) => {}
                Err(e) => return Err(KubeError::api("making the cluster's CA")(e).into()),
            }
        }
    }

    /// Reads the CA, if there is one.
    pub async fn find(client: &Client) -> Result<Option<Self>, AuthorityError> {
        match secrets(client).get(NAME).await {
            Ok(secret) => parse(&secret).map(Some),
            Err(e) if is_absent(&e) => Ok(None),
            Err(e) => Err(KubeError::api("reading the cluster's CA")(e).into()),
        }
    }
}

fn secrets(client: &Client) -> Api<Secret> {
    Api::namespaced(client.clone(), NAMESPACE)
}

fn build() -> Result<Secret, PkiError> {
    let mut rng = rand::rng();
    let cluster: String = (0..12)
        .map(|_| crate::BASE32[rng.random_range(0..32)])
        .collect();
    let cluster = ClusterId::parse(&cluster)?;
    let ca = Ca::generate(&cluster, Validity::starting(UnixTime::now(), ROOT_LIFETIME))?;
    let pem = ca.to_pem();
    let entry = |key: &str, text: &str| (key.to_string(), ByteString(text.as_bytes().to_vec()));
    Ok(Secret {
        metadata: ObjectMeta {
            name: Some(NAME.into()),
            namespace: Some(NAMESPACE.into()),
            ..ObjectMeta::default()
        },
        data: Some(BTreeMap::from([
            entry(CERTIFICATE, &pem.certificate),
            entry(KEY, &pem.key),
            entry(CLUSTER, cluster.as_str()),
        ])),
        type_: Some("fleet.cloudcore.io/ca".into()),
        ..Secret::default()
    })
}

fn parse(secret: &Secret) -> Result<Authority, AuthorityError> {
    let text = |key: &str| {
        let bytes = secret.data.as_ref().and_then(|data| data.get(key));
        bytes
            .and_then(|b| String::from_utf8(b.0.clone()).ok())
            .ok_or_else(|| KubeError::Malformed {
                what: format!("Secret {NAMESPACE}/{NAME}"),
                why: format!("its key {key:?} is missing or no text"),
            })
    };
    let pem = CaPem {
        certificate: text(CERTIFICATE)?,
        key: text(KEY)?,
    };
    Ok(Authority {
        ca: Ca::from_pem(&pem).map_err(AuthorityError::Unusable)?,
        cluster: ClusterId::parse(&text(CLUSTER)?).map_err(AuthorityError::Unusable)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube::fake::FakeApi;

    #[tokio::test]
    async fn everybody_gets_the_ca_that_one_of_them_made() {
        let fake = FakeApi::new();
        let client = fake.client();
        let (a, b) = futures::join!(Authority::ensure(&client), Authority::ensure(&client));
        let (a, b) = (a.unwrap(), b.unwrap());
        assert_eq!(a.ca.pin(), b.ca.pin());
        assert_eq!(a.cluster, b.cluster);
    }

    #[tokio::test]
    async fn a_spoilt_ca_is_an_error_and_never_made_anew() {
        let fake = FakeApi::new();
        Authority::ensure(&fake.client()).await.unwrap();
        let path = "/api/v1/namespaces/edge-system/secrets/cloudcore-ca";
        let mut secret = fake.get(path).unwrap();
        secret["data"]["ca.key"] = "bm9uc2Vuc2U=".into();
        fake.put(path, secret);
        assert!(matches!(
            Authority::ensure(&fake.client()).await,
            Err(AuthorityError::Unusable(_))
        ));
    }
}
