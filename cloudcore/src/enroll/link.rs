//! Where devices find this cloud: kept in ConfigMap `edge-system/cloudcore-link`.
//!
//! The running CloudCore knows its endpoints and writes them down, so that `token create` works
//! from any machine. The version grows with each change and never goes back; all replicas must be
//! given the same endpoints, else they take turns.

use std::collections::BTreeMap;

use common::hub::proto;
use common::pki::token::Endpoint;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};

use super::authority::Authority;
use crate::config::HostPort;
use crate::kube::{KubeError, NAMESPACE, is_conflict};

const NAME: &str = "cloudcore-link";
const VERSION: &str = "version";
const ENDPOINTS: &str = "endpoints";
const ROOTS: &str = "roots";

/// The endpoints as the running CloudCore wrote them; `None` before it ever ran.
pub async fn read_endpoints(client: &Client) -> Result<Option<Vec<Endpoint>>, KubeError> {
    let map = maps(client)
        .get_opt(NAME)
        .await
        .map_err(KubeError::api("reading the cluster's link"))?;
    map.as_ref().map(endpoints_of).transpose()
}

/// Writes the endpoints down, if they or the roots changed, and gives the link for devices.
pub async fn ensure_link(
    client: &Client,
    authority: &Authority,
    advertise: &[HostPort],
) -> Result<proto::Link, KubeError> {
    let endpoints: Vec<_> = advertise
        .iter()
        .map(|a| Endpoint::new(&a.host, a.port))
        .collect();
    let root = authority.ca.certificate();
    let link = |version| proto::Link {
        version,
        roots: vec![root.to_vec()],
        endpoints: endpoints.iter().map(Endpoint::to_proto).collect(),
        cluster_id: authority.cluster.as_str().to_string(),
    };
    let content = BTreeMap::from([
        (ENDPOINTS.to_string(), lines(&endpoints)),
        (ROOTS.to_string(), authority.ca.pin().to_string()),
    ]);
    loop {
        let present = maps(client)
            .get_opt(NAME)
            .await
            .map_err(KubeError::api("reading the cluster's link"))?;
        let version = present.as_ref().map_or(Ok(0), version_of)?;
        let data = present.as_ref().and_then(|map| map.data.as_ref());
        if content
            .iter()
            .all(|(k, v)| data.is_some_and(|data| data.get(k) == Some(v)))
        {
            return Ok(link(version));
        }
        let next = build(version + 1, content.clone(), present.as_ref());
        let written = match present {
            Some(_) => {
                maps(client)
                    .replace(NAME, &PostParams::default(), &next)
                    .await
            }
            None => maps(client).create(&PostParams::default(), &next).await,
        };
        match written {
            Ok(_) => return Ok(link(version + 1)),
            Err(e) if is_conflict(&e) => {}
            Err(e) => return Err(KubeError::api("writing the cluster's link")(e)),
        }
    }
}

fn maps(client: &Client) -> Api<ConfigMap> {
    Api::namespaced(client.clone(), NAMESPACE)
}

fn lines(endpoints: &[Endpoint]) -> String {
    let lines: Vec<_> = endpoints.iter().map(Endpoint::to_string).collect();
    lines.join("\n")
}

fn build(version: u64, mut data: BTreeMap<String, String>, over: Option<&ConfigMap>) -> ConfigMap {
    data.insert(VERSION.into(), version.to_string());
    ConfigMap {
        metadata: ObjectMeta {
            name: Some(NAME.into()),
            namespace: Some(NAMESPACE.into()),
            resource_version: over.and_then(|map| map.metadata.resource_version.clone()),
            ..ObjectMeta::default()
        },
        data: Some(data),
        ..ConfigMap::default()
    }
}

fn malformed(key: &str) -> KubeError {
    KubeError::Malformed {
        what: format!("ConfigMap {NAMESPACE}/{NAME}"),
        why: format!("its key {key:?} is missing or malformed"),
    }
}

fn version_of(map: &ConfigMap) -> Result<u64, KubeError> {
    let version = map
        .data
        .as_ref()
        .and_then(|data| data.get(VERSION)?.parse().ok());
    version.ok_or_else(|| malformed(VERSION))
}

fn endpoints_of(map: &ConfigMap) -> Result<Vec<Endpoint>, KubeError> {
    let text = map.data.as_ref().and_then(|data| data.get(ENDPOINTS));
    let text = text.ok_or_else(|| malformed(ENDPOINTS))?;
    text.lines()
        .map(|line| {
            let at: HostPort = line.parse().map_err(|_| malformed(ENDPOINTS))?;
            Ok(Endpoint::new(&at.host, at.port))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube::fake::FakeApi;

    #[tokio::test]
    async fn a_links_version_grows_when_and_only_when_it_changes() {
        let fake = FakeApi::new();
        let client = fake.client();
        let authority = Authority::ensure(&client).await.unwrap();
        let ensure = async |at: &str| {
            ensure_link(&client, &authority, &[at.parse().unwrap()])
                .await
                .unwrap()
                .version
        };
        assert_eq!(ensure("cloud.example:10000").await, 1);
        assert_eq!(ensure("cloud.example:10000").await, 1);
        assert_eq!(ensure("[2001:db8::1]:443").await, 2);
        let read = read_endpoints(&client).await.unwrap().unwrap();
        assert_eq!(read, [Endpoint::new("2001:db8::1", 443)]);
    }

    #[tokio::test]
    async fn before_cloudcore_ran_there_is_no_link() {
        assert!(
            read_endpoints(&FakeApi::new().client())
                .await
                .unwrap()
                .is_none()
        );
    }
}
