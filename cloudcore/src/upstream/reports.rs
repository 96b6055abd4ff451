//! What the nodes said last: one report for each Pod UID and for the Node, and how far each has
//! come on its way to the API server.
//!
//! - Owns: the bytes of the reports (never parsed trees: a fleet of idle nodes holds nothing else),
//!   and what the API server returned last, until the watch has caught up with it.
//! - Takes: reports of a session, answers of the API server.
//! - Gives: the digest over all held, and the bytes that a delta starts from.
//! - Never: does I/O. After a session ends its node's reports stay for a while, so that a
//!   reconnect sends nothing again.

use std::collections::BTreeMap;
use std::sync::Arc;

use common::hub::session::MAX_REPORT;
use common::ids::{Kind, NodeName, ObjectKey};
use common::object::{ContentHash, Digest};

use super::queue::Moment;

/// A kubelet has 110 Pods by default and 500 in the densest clusters; twice that leaves room for
/// Pods that end while their successors start.
const MAX_REPORTS: usize = 1024;
/// Of one node: what 1024 usual reports take, and what a node that lies may cost.
const MAX_BYTES: usize = 4 << 20;

/// Why a report was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReportError {
    #[error(
        "a report of {0} is none of a Pod with its UID: the edge must send Pod/NAMESPACE/NAME/UID"
    )]
    NotAPod(ObjectKey),
    #[error("the report of {0} is no JSON object")]
    Malformed(ObjectKey),
    #[error("the report of {key} has {bytes} bytes; at most {MAX_REPORT} are taken")]
    TooLarge { key: ObjectKey, bytes: usize },
    #[error("the node reports more than {MAX_REPORTS} Pods or {MAX_BYTES} bytes: {0} was refused")]
    TooMany(ObjectKey),
    #[error("another session of this node has taken over")]
    Ended,
}

/// What the API server returned to a write, newer than the watch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Returned {
    pub(super) resource_version: u64,
    pub(super) deleting: bool,
    pub(super) status: Arc<[u8]>,
}

/// One report and its way.
#[derive(Debug, Clone)]
pub(super) struct Held {
    pub(super) sequence: u64,
    pub(super) status: Arc<[u8]>,
    pub(super) gone: bool,
    pub(super) acknowledged: bool,
    pub(super) returned: Option<Returned>,
    /// A write against this resourceVersion was a conflict: what is known must be newer.
    pub(super) stale: u64,
    /// See [`super::difference::fingerprint`].
    pub(super) residue: Option<ContentHash>,
    /// The resourceVersion and sequence that were found equal last.
    pub(super) compared: Option<(u64, u64)>,
    /// The DELETE was answered.
    pub(super) deleted: bool,
}

/// The reports of one node.
#[derive(Debug, Default)]
pub(super) struct NodeReports {
    /// Boxed: a map's node has room for eleven, and most nodes of a fleet have few.
    pub(super) held: BTreeMap<ObjectKey, Box<Held>>,
    bytes: usize,
}

impl NodeReports {
    /// Takes a report: the latest wins, what is known of the API object stays.
    pub(super) fn accept(
        &mut self,
        key: &ObjectKey,
        sequence: u64,
        status: Arc<[u8]>,
        gone: bool,
    ) -> Result<(), ReportError> {
        if status.len() > MAX_REPORT {
            return Err(ReportError::TooLarge {
                key: key.clone(),
                bytes: status.len(),
            });
        }
        let old = self.held.get_mut(key);
        let bytes = self.bytes - old.as_ref().map_or(0, |h| h.status.len()) + status.len();
        if bytes > MAX_BYTES || (old.is_none() && self.held.len() >= MAX_REPORTS) {
            return Err(ReportError::TooMany(key.clone()));
        }
        self.bytes = bytes;
        match self.held.get_mut(key) {
            Some(held) => {
                held.sequence = sequence;
                held.status = status;
                held.gone = gone;
                held.acknowledged = false;
                held.compared = None;
            }
            None => {
                let held = Held {
                    sequence,
                    status,
                    gone,
                    acknowledged: false,
                    returned: None,
                    stale: 0,
                    residue: None,
                    compared: None,
                    deleted: false,
                };
                self.held.insert(key.clone(), Box::new(held));
            }
        }
        Ok(())
    }

    pub(super) fn remove(&mut self, key: &ObjectKey) {
        if let Some(held) = self.held.remove(key) {
            self.bytes -= held.status.len();
        }
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Over (key, sequence), as the edge's store computes it.
    pub(super) fn digest(&self) -> Digest {
        let mut digest = Digest::default();
        for (key, held) in &self.held {
            digest.add(key, &ContentHash::of_sequence(held.sequence));
        }
        digest
    }
}

/// The key of a Pod's report, if it is one.
pub(super) fn checked_pod(key: &ObjectKey, status: &[u8]) -> Result<(), ReportError> {
    if key.kind != Kind::Pod || key.uid.is_empty() || key.name.is_empty() {
        return Err(ReportError::NotAPod(key.clone()));
    }
    checked(key, status)
}

/// Whether the bytes are a JSON object, without building it.
pub(super) fn checked(key: &ObjectKey, status: &[u8]) -> Result<(), ReportError> {
    let object = status.trim_ascii_start().first() == Some(&b'{');
    let whole = serde_json::from_slice::<serde::de::IgnoredAny>(status).is_ok();
    if object && whole {
        Ok(())
    } else {
        Err(ReportError::Malformed(key.clone()))
    }
}

/// The key of a Node's own report.
pub(super) fn node_key() -> ObjectKey {
    ObjectKey::own_node()
}

/// Which nodes without a session are forgotten: those that ended before `oldest`, and of the rest
/// the oldest beyond `most`.
pub(super) fn to_forget(
    ended: impl Iterator<Item = (NodeName, Moment)>,
    oldest: Moment,
    most: usize,
) -> Vec<NodeName> {
    let mut ended: Vec<_> = ended.collect();
    ended.sort_by_key(|(_, at)| std::cmp::Reverse(*at));
    let keep = ended
        .iter()
        .take(most)
        .take_while(|(_, at)| *at >= oldest)
        .count();
    ended.into_iter().skip(keep).map(|(node, _)| node).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn pod(n: usize) -> ObjectKey {
        ObjectKey::pod("d", &format!("p{n}"), &format!("u{n}"))
    }

    fn bytes(n: usize) -> Arc<[u8]> {
        vec![b' '; n].into()
    }

    #[test]
    fn the_digest_is_over_keys_and_sequences() {
        let mut reports = NodeReports::default();
        assert_eq!(reports.digest(), Digest::default());
        for n in 0..3 {
            reports
                .accept(&pod(n), n as u64 + 7, bytes(2), false)
                .unwrap();
        }
        reports.accept(&pod(2), 99, bytes(5), true).unwrap();
        reports.remove(&pod(0));
        let hash = ContentHash::of_sequence;
        let want = Digest::of([(&pod(1), &hash(8)), (&pod(2), &hash(99))]);
        assert_eq!(reports.digest(), want);
    }

    #[test]
    fn a_node_cannot_fill_the_memory() {
        let mut reports = NodeReports::default();
        let refused = reports.accept(&pod(0), 1, bytes(MAX_REPORT + 1), false);
        assert!(matches!(refused, Err(ReportError::TooLarge { .. })));
        for n in 0..MAX_BYTES / MAX_REPORT {
            reports
                .accept(&pod(n), 1, bytes(MAX_REPORT), false)
                .unwrap();
        }
        assert!(matches!(
            reports.accept(&pod(77), 1, bytes(1), false),
            Err(ReportError::TooMany(_))
        ));
        reports.accept(&pod(0), 2, bytes(2), false).unwrap();
        reports.accept(&pod(77), 1, bytes(1), false).unwrap();
        reports.clear();
        for n in 0..MAX_REPORTS {
            reports.accept(&pod(n), 1, bytes(2), false).unwrap();
        }
        let one_more = reports.accept(&pod(MAX_REPORTS), 1, bytes(2), false);
        assert!(matches!(one_more, Err(ReportError::TooMany(_))));
        reports.accept(&pod(0), 2, bytes(2), false).unwrap();
    }

    #[test]
    fn only_a_pod_with_its_uid_and_an_object_is_a_report() {
        for (key, status, good) in [
            (ObjectKey::pod("d", "p", "u"), "{}", true),
            (ObjectKey::pod("d", "p", "u"), " {\"a\": [1]}", true),
            (ObjectKey::pod("d", "p", ""), "{}", false),
            (ObjectKey::named(Kind::Secret, "d", "p"), "{}", false),
            (ObjectKey::pod("d", "p", "u"), "[]", false),
            (ObjectKey::pod("d", "p", "u"), "{", false),
            (ObjectKey::pod("d", "p", "u"), "", false),
        ] {
            assert_eq!(
                checked_pod(&key, status.as_bytes()).is_ok(),
                good,
                "{key} {status}"
            );
        }
    }

    #[test]
    fn the_oldest_of_the_absent_are_forgotten_first() {
        let at = |name: &str, s| (NodeName::parse(name).unwrap(), Duration::from_secs(s));
        let ended = || [at("a", 10), at("b", 30), at("c", 20)].into_iter();
        let names = |all: Vec<NodeName>| all.iter().map(|n| n.to_string()).collect::<Vec<_>>();
        assert_eq!(names(to_forget(ended(), Duration::from_secs(15), 9)), ["a"]);
        assert_eq!(names(to_forget(ended(), Duration::ZERO, 1)), ["c", "a"]);
        assert!(to_forget(ended(), Duration::ZERO, 3).is_empty());
    }
}
