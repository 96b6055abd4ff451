//! The sessions of this replica, one a node: the newest wins; and the few places of those that are
//! on their way in. A short lock, never held over an await; readers take a copy.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use common::hub::proto::GoAwayReason;
use common::hub::transport::{Connection, Counters, TransportKind};
use common::ids::NodeName;
use common::pki::KeyId;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Connections of one key that have not been admitted yet: an edge tries two transports at a time
/// and may come back before its last try is given up. One more, and the oldest ends.
const ARRIVING: usize = 4;

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
    sessions: Arc<Mutex<Sessions>>,
    arriving: Arc<Mutex<Arriving>>,
    next: Arc<AtomicU64>,
    resumes: Arc<(AtomicU64, AtomicU64)>,
    /// The store incarnation that each node's reports belong to: bounded by the enrolled nodes.
    incarnations: Arc<Mutex<HashMap<NodeName, [u8; 16]>>>,
}

/// The places taken of each key, oldest first.
type Arriving = HashMap<KeyId, VecDeque<(u64, CancellationToken)>>;

#[derive(Default)]
struct Sessions {
    newest: HashMap<NodeName, Arc<SessionEntry>>,
    /// Every session that has not left, those that were replaced as well: so that what they carry
    /// is counted once at each moment, and a counter never goes back.
    present: HashMap<u64, Arc<SessionEntry>>,
    /// What sessions that left carried.
    ended: Counters,
}

/// A connection on its way in; it has its place until this is dropped.
pub struct Arrival {
    registry: Registry,
    key: KeyId,
    id: u64,
    overtaken: CancellationToken,
}

impl Arrival {
    /// Cancelled when newer connections of the same key have taken all places.
    pub fn overtaken(&self) -> &CancellationToken {
        &self.overtaken
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        let mut arriving = self.registry.arriving();
        if let Some(places) = arriving.get_mut(&self.key) {
            places.retain(|(id, _)| *id != self.id);
            if places.is_empty() {
                arriving.remove(&self.key);
            }
        }
    }
}

impl Registry {
    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn arriving(&self) -> MutexGuard<'_, Arriving> {
        self.arriving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a connection a place while it is admitted. By key and not by name, so that a device
    /// whose enrolment was ended takes none from its successor.
    pub fn arrive(&self, key: KeyId) -> Arrival {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let overtaken = CancellationToken::new();
        let mut arriving = self.arriving();
        let places = arriving.entry(key).or_default();
        if places.len() >= ARRIVING
            && let Some((_, oldest)) = places.pop_front()
        {
            oldest.cancel();
        }
        places.push_back((id, overtaken.clone()));
        drop(arriving);
        Arrival {
            registry: self.clone(),
            key,
            id,
            overtaken,
        }
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
        let mut sessions = self.sessions();
        sessions.present.insert(entry.id, entry.clone());
        let older = sessions.newest.insert(node, entry.clone());
        drop(sessions);
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
        let sessions = &mut *sessions;
        if sessions.present.remove(&entry.id).is_some() {
            crate::admin::add(&mut sessions.ended, &entry.connection.counters());
        }
        let newest = sessions.newest.get(&entry.node);
        if newest.is_some_and(|e| e.id == entry.id) {
            sessions.newest.remove(&entry.node);
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

    /// What all sessions carried since the start, ended and living.
    pub fn carried(&self) -> Counters {
        let sessions = self.sessions();
        let mut sum = sessions.ended;
        for entry in sessions.present.values() {
            crate::admin::add(&mut sum, &entry.connection.counters());
        }
        sum
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
        self.sessions().newest.get(node).cloned()
    }

    pub fn all(&self) -> Vec<Arc<SessionEntry>> {
        self.sessions().newest.values().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_a_few_places_and_the_newest_keep_theirs() {
        let registry = Registry::default();
        let (one, other) = (KeyId([1; 32]), KeyId([2; 32]));
        let mut arrivals: Vec<_> = (0..ARRIVING).map(|_| registry.arrive(one)).collect();
        let stranger = registry.arrive(other);
        assert!(arrivals.iter().all(|a| !a.overtaken().is_cancelled()));
        arrivals.push(registry.arrive(one));
        let ended: Vec<_> = arrivals
            .iter()
            .map(|a| a.overtaken().is_cancelled())
            .collect();
        assert_eq!(ended, [true, false, false, false, false]);
        assert!(!stranger.overtaken().is_cancelled());
        // Whoever was admitted or has left makes room.
        drop(arrivals.remove(1));
        arrivals.push(registry.arrive(one));
        let ended = arrivals.iter().filter(|a| a.overtaken().is_cancelled());
        assert_eq!(ended.count(), 1);
        drop((arrivals, stranger));
        assert!(registry.arriving().is_empty());
    }
}
