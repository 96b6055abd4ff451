//! The enrolment record: who may hold a session under which name, and what that Node is made with.
//!
//! A custom resource of CloudCore's own namespace, named as the Node. It is not the Node: an outage
//! or a cloud controller that deletes Nodes must not un-enrol a fleet.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Taint;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::CustomResource;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use serde::{Deserialize, Serialize};

use common::ids::NodeName;
use common::pki::KeyId;

use crate::kube::{KubeError, NAMESPACE};

/// One device's enrolment; see the definition's own descriptions.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "fleet.cloudcore.io",
    version = "v1alpha1",
    kind = "Enrolment",
    plural = "enrolments",
    namespaced,
    schema = "disabled"
)]
#[serde(rename_all = "camelCase")]
pub struct EnrolmentSpec {
    /// The keys that may hold a session, oldest first; two while a rotation waits for the new
    /// key's first session.
    pub keys: Vec<Key>,
    pub enrolled: Option<Time>,
    /// When the enrolment was ended. The record stays, so that a token made before then admits the
    /// name no more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked: Option<Time>,
    /// The id of the token that the device joined with.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub token: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub os: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub arch: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub agent_version: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub taints: Vec<NodeTaint>,
    #[serde(default)]
    pub unschedulable: bool,
    /// No session has an epoch above this one, whatever became of the Lease.
    #[serde(default)]
    pub session_epoch_floor: i32,
}

/// A key that may hold a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// SHA-256 of the SubjectPublicKeyInfo, hexadecimal.
    pub id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,
}

/// A taint that the Node is made with.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NodeTaint {
    pub key: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub value: String,
    pub effect: String,
}

impl From<&Taint> for NodeTaint {
    fn from(taint: &Taint) -> Self {
        Self {
            key: taint.key.clone(),
            value: taint.value.clone().unwrap_or_default(),
            effect: taint.effect.clone(),
        }
    }
}

impl From<&NodeTaint> for Taint {
    fn from(taint: &NodeTaint) -> Self {
        Self {
            key: taint.key.clone(),
            value: Some(taint.value.clone()).filter(|v| !v.is_empty()),
            effect: taint.effect.clone(),
            time_added: None,
        }
    }
}

impl Key {
    pub fn build(id: KeyId, since: Timestamp) -> Self {
        Self {
            id: id.to_string(),
            since: Some(Time(since)),
        }
    }
}

impl EnrolmentSpec {
    pub fn is_active(&self) -> bool {
        self.revoked.is_none()
    }

    pub fn knows(&self, key: KeyId) -> bool {
        let id = key.to_string();
        self.keys.iter().any(|k| k.id == id)
    }

    /// Adds a key that waits for its first session beside the one that asked for it. A third,
    /// which never had its session, is dropped: its device asked again.
    pub fn rotate(&mut self, from: KeyId, to: KeyId, now: Timestamp) {
        if from == to {
            return;
        }
        let from = from.to_string();
        self.keys.retain(|k| k.id == from);
        self.keys.push(Key::build(to, now));
    }

    /// The newest key had a session: the older ones end. True when that changed anything.
    pub fn settle(&mut self, used: KeyId) -> bool {
        let newest = self.keys.last().is_some_and(|k| k.id == used.to_string());
        if newest && self.keys.len() > 1 {
            self.keys.drain(..self.keys.len() - 1);
            return true;
        }
        false
    }
}

/// The records of one cluster.
pub fn records(client: &Client) -> Api<Enrolment> {
    Api::namespaced(client.clone(), NAMESPACE)
}

/// A record to be created, or to replace the given one if nobody wrote it in between.
pub fn record(node: &NodeName, spec: EnrolmentSpec, replaces: Option<&Enrolment>) -> Enrolment {
    let mut record = Enrolment::new(node.as_str(), spec);
    record.metadata = match replaces {
        Some(present) => present.metadata.clone(),
        None => ObjectMeta {
            name: Some(node.as_str().into()),
            namespace: Some(NAMESPACE.into()),
            ..ObjectMeta::default()
        },
    };
    record
}

/// How often a compare-and-swap that loses is tried: each loss means that another writer made
/// progress, and no record has many.
const TRIES: usize = 16;

/// Changes a record by compare-and-swap. `change` sees the newest content and says whether it
/// changed anything; it may be called several times. `None` when there is no record.
pub async fn change(
    client: &Client,
    node: &NodeName,
    mut change: impl FnMut(&mut EnrolmentSpec) -> bool,
) -> Result<Option<Enrolment>, KubeError> {
    let records = records(client);
    let writing = || KubeError::api(format!("writing the enrolment of {node}"));
    for _ in 1..TRIES {
        let present = records
            .get_opt(node.as_str())
            .await
            .map_err(KubeError::api(format!("reading the enrolment of {node}")))?;
        let Some(present) = present else {
            return Ok(None);
        };
        let mut spec = present.spec.clone();
        if !change(&mut spec) {
            return Ok(Some(present));
        }
        let next = record(node, spec, Some(&present));
        match records
            .replace(node.as_str(), &PostParams::default(), &next)
            .await
        {
            Ok(written) => return Ok(Some(written)),
            Err(e) if crate::kube::is_conflict(&e) => {}
            Err(e) if crate::kube::is_absent(&e) => return Ok(None),
            Err(e) => return Err(writing()(e)),
        }
    }
    Err(KubeError::Malformed {
        what: format!("the enrolment of {node}"),
        why: format!("it changed {TRIES} times while it was written"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> KeyId {
        KeyId([n; 32])
    }

    fn spec(keys: &[u8]) -> EnrolmentSpec {
        let now = Timestamp::UNIX_EPOCH;
        EnrolmentSpec {
            keys: keys.iter().map(|n| Key::build(key(*n), now)).collect(),
            enrolled: Some(Time(now)),
            ..EnrolmentSpec::default()
        }
    }

    #[test]
    fn both_keys_hold_until_the_new_ones_first_session() {
        let mut spec = spec(&[1]);
        spec.rotate(key(1), key(2), Timestamp::UNIX_EPOCH);
        assert!(spec.knows(key(1)) && spec.knows(key(2)));
        assert!(
            !spec.settle(key(1)),
            "a session over the old key ends nothing"
        );
        assert!(spec.settle(key(2)));
        assert!(!spec.knows(key(1)) && spec.knows(key(2)));
        assert!(!spec.settle(key(2)), "the second session changes nothing");
    }

    #[test]
    fn a_rotation_that_is_asked_for_again_replaces_the_key_that_had_no_session() {
        let mut spec = spec(&[1, 2]);
        spec.rotate(key(1), key(3), Timestamp::UNIX_EPOCH);
        assert!(spec.knows(key(1)) && spec.knows(key(3)) && !spec.knows(key(2)));
    }

    #[test]
    fn renewing_over_the_same_key_changes_no_key() {
        let mut spec = spec(&[1]);
        spec.rotate(key(1), key(1), Timestamp::UNIX_EPOCH);
        assert_eq!(spec.keys.len(), 1);
    }

    #[test]
    fn the_definition_names_every_field_that_is_written() {
        let yaml = include_str!("../../../deploy/charts/cloudcore/files/enrolments.crd.yaml");
        let crd: serde_json::Value = serde_saphyr::from_str(yaml).unwrap();
        let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        let named = schema["properties"]["spec"]["properties"]
            .as_object()
            .unwrap();
        let text = || "x".to_string();
        let full = EnrolmentSpec {
            revoked: Some(Time(Timestamp::UNIX_EPOCH)),
            token: text(),
            os: text(),
            arch: text(),
            agent_version: text(),
            labels: BTreeMap::from([(text(), text())]),
            annotations: BTreeMap::from([(text(), text())]),
            taints: vec![NodeTaint {
                key: text(),
                value: text(),
                effect: text(),
            }],
            ..spec(&[1])
        };
        let written = serde_json::to_value(full).unwrap();
        let written: Vec<_> = written.as_object().unwrap().keys().cloned().collect();
        for field in &written {
            assert!(
                named.contains_key(field),
                "{field} is not in the definition"
            );
        }
        assert_eq!(named.len(), written.len());
    }
}
