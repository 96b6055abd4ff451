//! The cluster epoch: 16 random bytes that say which history of the cluster revisions belong to.
//!
//! Revisions only compare within one epoch. When a consistent list is below what an edge has
//! committed, the cluster was restored from a backup, and whoever finds it begins a new epoch. It
//! is kept in ConfigMap `edge-system/cloudcore-epoch`, read from the quorum each time.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use rand::RngCore;

use super::{KubeError, NAMESPACE, is_absent, is_conflict};

const NAME: &str = "cloudcore-epoch";
const KEY: &str = "epoch";

/// An epoch's identity; it has no order.
pub type ClusterEpoch = [u8; 16];

/// The present epoch; the first reader of a cluster makes the first one.
pub async fn read_epoch(client: &Client) -> Result<ClusterEpoch, KubeError> {
    let maps = maps(client);
    loop {
        match maps.get(NAME).await {
            Ok(map) => return parse(&map),
            Err(e) if is_absent(&e) => {}
            Err(e) => return Err(KubeError::api("reading the cluster epoch")(e)),
        }
        match maps.create(&PostParams::default(), &build(&fresh())).await {
            Ok(map) => return parse(&map),
            // Another replica made it in between.
            Err(e) if is_conflict(&e) => {}
            Err(e) => return Err(KubeError::api("making the first cluster epoch")(e)),
        }
    }
}

/// Begins a new epoch if the present one still is `expected`; else gives the one that another
/// replica began. Either way the result is the epoch to go on with.
pub async fn begin_epoch(
    client: &Client,
    expected: &ClusterEpoch,
) -> Result<ClusterEpoch, KubeError> {
    let maps = maps(client);
    loop {
        let present = match maps.get(NAME).await {
            Ok(map) => map,
            Err(e) if is_absent(&e) => return read_epoch(client).await,
            Err(e) => return Err(KubeError::api("reading the cluster epoch")(e)),
        };
        let epoch = parse(&present)?;
        if epoch != *expected {
            return Ok(epoch);
        }
        let mut next = build(&fresh());
        next.metadata.resource_version = present.metadata.resource_version;
        match maps.replace(NAME, &PostParams::default(), &next).await {
            Ok(map) => return parse(&map),
            Err(e) if is_conflict(&e) => {}
            Err(e) => return Err(KubeError::api("beginning a cluster epoch")(e)),
        }
    }
}

fn maps(client: &Client) -> Api<ConfigMap> {
    Api::namespaced(client.clone(), NAMESPACE)
}

fn fresh() -> ClusterEpoch {
    let mut epoch = [0; 16];
    rand::rng().fill_bytes(&mut epoch);
    epoch
}

fn build(epoch: &ClusterEpoch) -> ConfigMap {
    ConfigMap {
        metadata: ObjectMeta {
            name: Some(NAME.into()),
            namespace: Some(NAMESPACE.into()),
            ..ObjectMeta::default()
        },
        data: Some(BTreeMap::from([(KEY.into(), crate::hex(epoch))])),
        ..ConfigMap::default()
    }
}

fn parse(map: &ConfigMap) -> Result<ClusterEpoch, KubeError> {
    map.data
        .as_ref()
        .and_then(|data| crate::unhex(data.get(KEY)?)?.try_into().ok())
        .ok_or_else(|| KubeError::Malformed {
            what: format!("ConfigMap {NAMESPACE}/{NAME}"),
            why: format!("its key {KEY:?} is not 32 hexadecimal digits; delete it to begin anew"),
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube::fake::FakeApi;

    #[tokio::test]
    async fn all_readers_see_the_epoch_that_one_of_them_made() {
        let fake = FakeApi::new();
        let first = read_epoch(&fake.client()).await.unwrap();
        assert_eq!(read_epoch(&fake.client()).await.unwrap(), first);
    }

    #[tokio::test]
    async fn a_new_epoch_begins_once_however_many_ask_for_it() {
        let fake = FakeApi::new();
        let old = read_epoch(&fake.client()).await.unwrap();
        let new = begin_epoch(&fake.client(), &old).await.unwrap();
        assert_ne!(new, old);
        assert_eq!(begin_epoch(&fake.client(), &old).await.unwrap(), new);
        assert_eq!(read_epoch(&fake.client()).await.unwrap(), new);
    }

    #[tokio::test]
    async fn a_spoilt_epoch_is_an_error_that_names_it() {
        let fake = FakeApi::new();
        let mut map = build(&[0; 16]);
        map.data = Some(BTreeMap::from([(KEY.into(), "zz".into())]));
        maps(&fake.client())
            .create(&PostParams::default(), &map)
            .await
            .unwrap();
        let error = read_epoch(&fake.client()).await.unwrap_err();
        assert!(error.to_string().contains("cloudcore-epoch"), "{error}");
    }
}
