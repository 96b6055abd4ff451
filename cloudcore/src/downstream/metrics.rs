//! What the downstream side counts. Plain atomics: whoever serves metrics reads them.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows, or a level that is set.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    pub(super) fn set(&self, level: u64) {
        self.0.store(level, Ordering::Relaxed);
    }
}

/// Levels are of this moment, all else counts from the start of the process.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Level: Pods of edge nodes that are held.
    pub pods: Count,
    /// Level: Secrets and ConfigMaps that are held, each with a watch or on the way to one.
    pub references: Count,
    /// Bytes of objects that the API server sent.
    pub received_bytes: Count,
    /// Lists of a whole collection.
    pub lists: Count,
    /// Lists and watches that failed.
    pub faults: Count,
    /// Reads of a Secret or ConfigMap as a node.
    pub reads: Count,
    /// Such reads that were refused and tried again.
    pub refused: Count,
    /// Desired sets that changed.
    pub published: Count,
    /// Objects that could not be understood.
    pub malformed: Count,
    /// Reports of such objects that nobody took in time.
    pub malformed_dropped: Count,
    /// Times that the cluster went back in time.
    pub rewinds: Count,
}
