//! The node's Lease as an object: what a session writes into it, and what it says of one. Pure.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, OwnerReference};
use kube::api::ObjectMeta;

use common::ids::NodeName;

/// Where Kubernetes keeps the Leases of nodes.
pub const NAMESPACE: &str = "kube-node-lease";
/// Which replica and session holds the node: `REPLICA/SESSION`.
const SESSION: &str = "fleet.cloudcore.io/session";
/// As the kubelet's, so that the node lifecycle controller treats both alike.
const LEASE_SECONDS: i32 = 40;

/// What a Lease says of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    pub replica: String,
    /// `REPLICA/SESSION`.
    pub session: String,
    pub epoch: i32,
    pub renewed: Option<Timestamp>,
    /// The Lease has not lapsed.
    pub live: bool,
}

impl Held {
    /// `None` when no CloudCore ever held the node.
    pub fn read(lease: &Lease, now: Timestamp) -> Option<Self> {
        let session = lease.metadata.annotations.as_ref()?.get(SESSION)?.clone();
        let spec = lease.spec.clone().unwrap_or_default();
        let renewed = spec.renew_time.map(|t| t.0);
        let valid = i64::from(spec.lease_duration_seconds.unwrap_or(LEASE_SECONDS));
        let live = renewed.is_some_and(|at| now.as_second() - at.as_second() < valid);
        Some(Self {
            replica: session
                .rsplit_once('/')
                .map_or(session.as_str(), |(r, _)| r)
                .to_string(),
            session,
            epoch: spec.lease_transitions.unwrap_or(0),
            renewed,
            live,
        })
    }
}

/// The epoch of the next session: never one that was given before.
///
/// A Lease that CloudCore did not write says nothing; then only the floor counts.
pub(super) fn next_epoch(held: Option<&Held>, floor: i32) -> i32 {
    let last = held.map_or(floor, |held| held.epoch);
    last.max(0).saturating_add(1)
}

/// What a session writes; `uid` is the Node's, which the Lease belongs to.
pub(super) fn build(
    node: &NodeName,
    session: &str,
    epoch: i32,
    (acquired, now): (Timestamp, Timestamp),
    uid: Option<String>,
) -> Lease {
    let owner = uid.map(|uid| OwnerReference {
        api_version: "v1".into(),
        kind: "Node".into(),
        name: node.as_str().into(),
        uid,
        ..OwnerReference::default()
    });
    Lease {
        metadata: ObjectMeta {
            name: Some(node.as_str().into()),
            namespace: Some(NAMESPACE.into()),
            annotations: Some(BTreeMap::from([(SESSION.into(), session.into())])),
            owner_references: owner.map(|owner| vec![owner]),
            ..ObjectMeta::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some(node.as_str().into()),
            lease_duration_seconds: Some(LEASE_SECONDS),
            lease_transitions: Some(epoch),
            acquire_time: Some(MicroTime(acquired)),
            renew_time: Some(MicroTime(now)),
            ..LeaseSpec::default()
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(epoch: i32) -> Held {
        Held {
            replica: "r".into(),
            session: "r/1".into(),
            epoch,
            renewed: None,
            live: true,
        }
    }

    #[test]
    fn an_epoch_follows_the_lease_and_without_one_the_floor() {
        for (held, floor, want) in [
            (None, 0, 1),
            (None, 64, 65),
            (Some(held(3)), 64, 4),
            (Some(held(70)), 64, 71),
            (Some(held(-5)), 0, 1),
        ] {
            assert_eq!(next_epoch(held.as_ref(), floor), want);
        }
    }

    #[test]
    fn a_lease_without_a_session_holds_nothing() {
        assert_eq!(Held::read(&Lease::default(), Timestamp::UNIX_EPOCH), None);
    }
}
