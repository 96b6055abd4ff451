//! The sessions of this replica, one a node: the newest wins. A short lock, never held over an
//! await; readers take a copy.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use common::hub::proto::GoAwayReason;
use common::hub::transport::{Connection, Counters, TransportKind};
use common::ids::NodeName;
use tokio::sync::watch;

/// Why a session should end, told to its actor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    pub reason: GoAwayReason,
    pub message: String,
}

/// What one session shows of itself.
pub struct SessionEntry {
    id: u64,
    pub node: NodeName,
    pub remote: SocketAddr,
    pub transport: TransportKind,
    pub agent_version: Mutex<String>,
    pub epoch: AtomicU64,
    pub since_ms: u64,
    /// The edge said that it holds exactly what it should.
    pub in_sync: AtomicU64,
    /// Frame bytes of both directions when the edge first held all it should.
    pub resume_bytes: AtomicU64,
    pub queued_bytes: AtomicUsize,
    pub connection: Connection,
    end: watch::Sender<Option<Ending>>,
}

impl SessionEntry {
    /// The edge holds all it should: the first time tells what the resume cost.
    pub fn in_sync(&self, now_ms: u64) -> Option<u64> {
        let first = self.in_sync.swap(now_ms, Ordering::Relaxed) == 0;
        let counters = self.connection.counters();
        let bytes = counters
            .sent
            .iter()
            .chain(&counters.received)
            .map(|v| v.bytes)
            .sum();
        if first {
            self.resume_bytes.store(bytes, Ordering::Relaxed);
        }
        first.then_some(bytes)
    }

    /// Asks the actor to end; the first reason counts.
    pub fn end(&self, ending: Ending) {
        self.end.send_if_modified(|e| {
            let first = e.is_none();
            if first {
                *e = Some(ending);
            }
            first
        });
    }

    pub fn ending(&self) -> watch::Receiver<Option<Ending>> {
        self.end.subscribe()
    }
}

/// See the module. Cheap to clone.
#[derive(Clone, Default)]
pub struct Registry {
    sessions: Arc<Mutex<HashMap<NodeName, Arc<SessionEntry>>>>,
    next: Arc<AtomicU64>,
    /// What sessions that ended carried.
    ended: Arc<Mutex<Counters>>,
    resumes: Arc<(AtomicU64, AtomicU64)>,
    /// The store incarnation that each node's reports belong to: bounded by the enrolled nodes.
    incarnations: Arc<Mutex<HashMap<NodeName, [u8; 16]>>>,
}

impl Registry {
    fn sessions(&self) -> MutexGuard<'_, HashMap<NodeName, Arc<SessionEntry>>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a session; an older one of the same node is told to end.
    pub fn enter(
        &self,
        node: NodeName,
        connection: Connection,
        since_ms: u64,
    ) -> Arc<SessionEntry> {
        let entry = Arc::new(SessionEntry {
            id: self.next.fetch_add(1, Ordering::Relaxed),
            node: node.clone(),
            remote: connection.remote_address(),
            transport: connection.kind(),
            agent_version: Mutex::default(),
            epoch: AtomicU64::new(0),
            since_ms,
            in_sync: AtomicU64::new(0),
            resume_bytes: AtomicU64::new(0),
            queued_bytes: AtomicUsize::new(0),
            connection,
            end: watch::Sender::new(None),
        });
        let older = self.sessions().insert(node, entry.clone());
        if let Some(older) = older {
            older.end(Ending {
                reason: GoAwayReason::GoAwayReplaced,
                message: "a newer session of this node has taken over".to_owned(),
            });
        }
        entry
    }

    /// Takes a session out, unless a newer one has its place.
    pub fn leave(&self, entry: &SessionEntry) {
        crate::admin::add(
            &mut self.ended.lock().unwrap_or_else(PoisonError::into_inner),
            &entry.connection.counters(),
        );
        let mut sessions = self.sessions();
        if sessions.get(&entry.node).is_some_and(|e| e.id == entry.id) {
            sessions.remove(&entry.node);
        }
    }

    /// Counts one resume and what it cost.
    pub fn resumed(&self, bytes: u64) {
        self.resumes.0.fetch_add(1, Ordering::Relaxed);
        self.resumes.1.fetch_add(bytes, Ordering::Relaxed);
    }

    /// How many resumes there were, and their bytes.
    pub fn resumes(&self) -> (u64, u64) {
        (
            self.resumes.0.load(Ordering::Relaxed),
            self.resumes.1.load(Ordering::Relaxed),
        )
    }

    /// What sessions that ended carried.
    pub fn ended(&self) -> Counters {
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers the node's store incarnation; true when it is another than before.
    pub fn is_new_incarnation(&self, node: &NodeName, incarnation: [u8; 16]) -> bool {
        let mut known = self
            .incarnations
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        known
            .insert(node.clone(), incarnation)
            .is_some_and(|old| old != incarnation)
    }

    pub fn get(&self, node: &NodeName) -> Option<Arc<SessionEntry>> {
        self.sessions().get(node).cloned()
    }

    pub fn all(&self) -> Vec<Arc<SessionEntry>> {
        self.sessions().values().cloned().collect()
    }
}
