//! The sessions of this replica, one a node: the newest wins. A short lock, never held over an
//! await; readers take a copy.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use common::hub::proto::GoAwayReason;
use common::hub::transport::{Connection, TransportKind};
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
    pub queued_bytes: AtomicUsize,
    pub connection: Connection,
    end: watch::Sender<Option<Ending>>,
}

impl SessionEntry {
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
}

impl Registry {
    fn sessions(&self) -> MutexGuard<'_, HashMap<NodeName, Arc<SessionEntry>>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a session; an older one of the same node is told to end.
    pub fn enter(&self, node: NodeName, connection: Connection, since_ms: u64) -> Arc<SessionEntry> {
        let entry = Arc::new(SessionEntry {
            id: self.next.fetch_add(1, Ordering::Relaxed),
            node: node.clone(),
            remote: connection.remote_address(),
            transport: connection.kind(),
            agent_version: Mutex::default(),
            epoch: AtomicU64::new(0),
            since_ms,
            in_sync: AtomicU64::new(0),
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
        let mut sessions = self.sessions();
        if sessions.get(&entry.node).is_some_and(|e| e.id == entry.id) {
            sessions.remove(&entry.node);
        }
    }

    pub fn get(&self, node: &NodeName) -> Option<Arc<SessionEntry>> {
        self.sessions().get(node).cloned()
    }

    pub fn all(&self) -> Vec<Arc<SessionEntry>> {
        self.sessions().values().cloned().collect()
    }
}
