//! A certificate of signer `kubernetes.io/kubelet-serving`: asked for, approved where the role
//! allows, fetched, and the request taken away.
//!
//! The signer demands O=system:nodes, CN=system:node:NAME, usages digital signature and server
//! authentication (key encipherment for RSA keys only), and signs nothing that nobody approved.

use std::net::IpAddr;
use std::time::Duration;

use common::pki::{ServerCredentials, ServingKey};
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{
    CertificateSigningRequest, CertificateSigningRequestCondition, CertificateSigningRequestSpec,
};
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use rand::Rng;
use rustls::pki_types::UnixTime;
use tracing::{info, warn};

use super::ServingError;
use crate::kube::{KubeError, status_code};

const SIGNER: &str = "kubernetes.io/kubelet-serving";
/// What stands behind `system:node:` in its name. It is a server's certificate only: it gives nobody
/// the rights of a node of that name.
const NAME: &str = "cloudcore";

const LOOK_EVERY: Duration = Duration::from_secs(2);
/// A person has to be told and to act; a request lives for a day.
const PATIENCE: Duration = Duration::from_secs(3600);

/// See the module.
pub(super) struct Requests {
    client: Client,
    address: IpAddr,
}

impl Requests {
    /// `client` acts as CloudCore.
    pub(super) fn new(client: Client, address: IpAddr) -> Self {
        Self { client, address }
    }

    /// Asks and waits; may take as long as a person needs.
    pub(super) async fn certificate(&self) -> Result<(ServerCredentials, UnixTime), ServingError> {
        let key = ServingKey::generate()?;
        let wanted = build(&key.request(NAME, self.address)?);
        let api: Api<CertificateSigningRequest> = Api::all(self.client.clone());
        let asked = api.create(&PostParams::default(), &wanted).await;
        let asked = asked.map_err(KubeError::api("creating a CertificateSigningRequest"))?;
        let name = asked.metadata.name.clone().unwrap_or_default();
        approve(&api, &asked, &name).await;
        let waited = tokio::time::timeout(PATIENCE, issued(&api, &name)).await;
        let chain = waited.map_err(|_| ServingError::NotApproved(name.clone()))??;
        Ok(key.with_chain(&chain)?)
    }
}

async fn approve(
    api: &Api<CertificateSigningRequest>,
    asked: &CertificateSigningRequest,
    name: &str,
) {
    let (params, patch) = (PatchParams::default(), Patch::Merge(approval(asked)));
    match api.patch_approval(name, &params, &patch).await {
        Ok(_) => info!(
            request = name,
            "approved the kubelet endpoints' certificate"
        ),
        Err(error) if status_code(&error) == Some(403) => warn!(
            "the certificate of the kubelet endpoints waits for a person, since CloudCore's role does not let it approve (files/rbac-serving.yaml of the chart): kubectl certificate approve {name}"
        ),
        Err(error) => warn!(
            error = %crate::chain(&error),
            "the kubelet endpoints' certificate was not approved: kubectl certificate approve {name}"
        ),
    }
}

/// The chain, PEM, once the signer has put it there.
async fn issued(api: &Api<CertificateSigningRequest>, name: &str) -> Result<Vec<u8>, ServingError> {
    loop {
        let now = api.get(name).await;
        let now = now.map_err(KubeError::api(format!(
            "reading CertificateSigningRequest {name}"
        )))?;
        let status = now.status.unwrap_or_default();
        if let Some(ByteString(chain)) = status.certificate {
            return Ok(chain);
        }
        let conditions = status.conditions.unwrap_or_default();
        let refused = conditions
            .iter()
            .find(|c| c.type_ == "Denied" || c.type_ == "Failed");
        if let Some(refused) = refused {
            let why = refused.message.as_deref().unwrap_or_default();
            return Err(ServingError::Refused {
                name: name.to_owned(),
                what: format!("{}: {why}", refused.type_.to_lowercase()),
            });
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn build(pem: &str) -> CertificateSigningRequest {
    let number: u32 = rand::rng().random();
    let usages = ["digital signature", "server auth"];
    CertificateSigningRequest {
        metadata: ObjectMeta {
            // Replicas may ask at once.
            name: Some(format!("cloudcore-kubelet-serving-{number:08x}")),
            labels: Some([("app.kubernetes.io/part-of".into(), "cloudcore".into())].into()),
            ..ObjectMeta::default()
        },
        spec: CertificateSigningRequestSpec {
            request: ByteString(pem.as_bytes().to_vec()),
            signer_name: SIGNER.into(),
            usages: Some(usages.map(Into::into).to_vec()),
            ..CertificateSigningRequestSpec::default()
        },
        status: None,
    }
}

/// Of the very request that was just made, and no other: its UID and revision are in it.
fn approval(asked: &CertificateSigningRequest) -> serde_json::Value {
    let condition = CertificateSigningRequestCondition {
        type_: "Approved".into(),
        status: "True".into(),
        reason: Some("CloudCoreEndpoint".into()),
        message: Some("made and approved by CloudCore for its kubelet endpoints".into()),
        ..CertificateSigningRequestCondition::default()
    };
    let metadata = &asked.metadata;
    serde_json::json!({
        "metadata": {"uid": metadata.uid, "resourceVersion": metadata.resource_version},
        "status": {"conditions": [condition]},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_is_what_the_signer_takes_and_the_approval_is_of_it_alone() {
        let mut asked = build("PEM");
        assert_eq!(asked.spec.signer_name, SIGNER);
        let usages = asked.spec.usages.clone().unwrap();
        assert_eq!(usages, ["digital signature", "server auth"]);
        asked.metadata.uid = Some("u-1".into());
        asked.metadata.resource_version = Some("7".into());
        let patch = approval(&asked);
        assert_eq!(patch["metadata"]["uid"], "u-1");
        assert_eq!(patch["metadata"]["resourceVersion"], "7");
        assert_eq!(patch["status"]["conditions"][0]["type"], "Approved");
    }
}
