//! What this node tells the cloud about its Pods and itself: the latest value of each, durable,
//! kept until the Pod it speaks of is forgotten.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use common::ids::ObjectKey;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// What the node says of one Pod.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PodReport {
    /// The Pod's status as the node sees it (`PodStatus` of core/v1, only fields the node owns).
    pub status: serde_json::Value,
    /// Containers, volumes and cgroups are gone: the API object may be deleted.
    pub gone: bool,
}

/// A shared handle; cheap to clone. Equal reports are not written twice.
#[derive(Clone)]
pub struct Reports {
    inner: Arc<Inner>,
}

struct Inner {
    pods: Mutex<BTreeMap<ObjectKey, PodReport>>,
    changed: watch::Sender<u64>,
}

impl Reports {
    pub fn in_memory() -> Self {
        let inner = Inner {
            pods: Mutex::default(),
            changed: watch::Sender::new(0),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// Replaces what is said of this Pod.
    pub fn put_pod(&self, key: &ObjectKey, report: PodReport) {
        let mut pods = self
            .inner
            .pods
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if pods.get(key) != Some(&report) {
            pods.insert(key.clone(), report);
            self.inner.changed.send_modify(|n| *n += 1);
        }
    }

    /// What was last said of this Pod, also before a restart.
    pub fn pod(&self, key: &ObjectKey) -> Option<PodReport> {
        let pods = self
            .inner
            .pods
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        pods.get(key).cloned()
    }

    pub fn forget_pod(&self, key: &ObjectKey) {
        let mut pods = self
            .inner
            .pods
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        pods.remove(key);
    }

    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changed.subscribe()
    }
}
