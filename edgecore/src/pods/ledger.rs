//! What the node has only once, and which Pod holds it: written down before anything is made.
//!
//! Owns the grants of all Pods by UID. A grant outlives a restart, so that a Pod that ran is never
//! refused because another was admitted first. Never judges: `admit` does.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch;

use super::admit::{self, Grant, Refusal, Room};

/// Where the ledger is kept between restarts; one value, replaced whole.
pub trait LedgerStore: Send + Sync {
    fn load(&self) -> Option<Vec<u8>>;
    /// When this returns, it is durable. An error is a sentence for the log.
    fn save(&self, bytes: &[u8]) -> Result<(), String>;
}

/// A ledger that lives in memory only, for tests.
#[derive(Default)]
pub struct InMemory(Mutex<Option<Vec<u8>>>);

impl LedgerStore for InMemory {
    fn load(&self) -> Option<Vec<u8>> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn save(&self, bytes: &[u8]) -> Result<(), String> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(bytes.to_vec());
        Ok(())
    }
}

/// Why no grant was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoGrant {
    Refused(Refusal),
    /// It could not be written down, so it does not exist.
    NotStored(String),
}

/// The ledger of one node.
pub struct Ledger {
    store: Arc<dyn LedgerStore>,
    grants: Mutex<BTreeMap<String, Grant>>,
    /// Held while the disk is written, so that what is written last is what holds; who reads
    /// `grants` never waits for it.
    writing: Mutex<()>,
    released: watch::Sender<u64>,
}

impl Ledger {
    /// Reads what an earlier run granted; a record that cannot be read is as none, and each Pod
    /// asks again.
    pub fn open(store: Arc<dyn LedgerStore>) -> Self {
        let read = store.load().map(|b| serde_json::from_slice(&b));
        let grants = match read {
            Some(Ok(grants)) => grants,
            Some(Err(error)) => {
                tracing::warn!(%error, "the ledger of grants cannot be read: every Pod asks again");
                BTreeMap::new()
            }
            None => BTreeMap::new(),
        };
        Self {
            store,
            grants: Mutex::new(grants),
            writing: Mutex::default(),
            released: watch::Sender::new(0),
        }
    }

    fn grants(&self) -> MutexGuard<'_, BTreeMap<String, Grant>> {
        self.grants.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn writing(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the Pod what it needs of the node; a Pod that has it already keeps it. Waits for the
    /// disk.
    pub fn grant(&self, uid: &str, pod: &Pod, room: Room) -> Result<(), NoGrant> {
        let _writing = self.writing();
        {
            let mut grants = self.grants();
            if grants.contains_key(uid) {
                return Ok(());
            }
            let grant = admit::admit(pod, &grants, room).map_err(NoGrant::Refused)?;
            grants.insert(uid.to_owned(), grant);
        }
        self.save().map_err(|error| {
            self.grants().remove(uid);
            NoGrant::NotStored(error)
        })
    }

    pub fn holds(&self, uid: &str) -> bool {
        self.grants().contains_key(uid)
    }

    /// The Pod is being ended: a successor may wait for what it holds.
    pub fn ending(&self, uid: &str) {
        if let Some(grant) = self.grants().get_mut(uid) {
            grant.ending = true;
        }
    }

    /// The Pod holds nothing any more. Waits for the disk.
    pub fn release(&self, uid: &str) {
        let _writing = self.writing();
        if self.grants().remove(uid).is_none() {
            return;
        }
        if let Err(error) = self.save() {
            // It holds too much after a restart, until the same Pod is found gone again.
            tracing::warn!(uid, error, "a released grant could not be written down");
        }
        self.released.send_modify(|n| *n += 1);
    }

    /// Every UID that holds something.
    pub fn holders(&self) -> Vec<String> {
        self.grants().keys().cloned().collect()
    }

    /// Wakes after every release.
    pub fn releases(&self) -> watch::Receiver<u64> {
        self.released.subscribe()
    }

    /// The caller is writing.
    fn save(&self) -> Result<(), String> {
        let bytes = serde_json::to_vec(&*self.grants()).map_err(|e| e.to_string())?;
        self.store.save(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: Room = Room {
        pods: 10,
        cpu_millis: 0,
        memory_bytes: 0,
    };

    fn web() -> Pod {
        serde_json::from_value(serde_json::json!({"spec": {"containers": [
            {"name": "c", "ports": [{"containerPort": 80, "hostPort": 80}]}
        ]}}))
        .unwrap()
    }

    #[test]
    fn a_grant_outlives_a_restart_and_its_release_wakes_the_successor() {
        let store = Arc::new(InMemory::default());
        let ledger = Ledger::open(store.clone());
        ledger.grant("a", &web(), ROOM).unwrap();
        ledger.grant("a", &web(), ROOM).unwrap();

        let ledger = Ledger::open(store);
        assert!(matches!(
            ledger.grant("b", &web(), ROOM),
            Err(NoGrant::Refused(Refusal::Never(_)))
        ));
        ledger.ending("a");
        let refused = ledger.grant("b", &web(), ROOM);
        assert_eq!(refused, Err(NoGrant::Refused(Refusal::WaitFor("a".into()))));
        let releases = ledger.releases();
        ledger.release("a");
        assert!(releases.has_changed().unwrap());
        ledger.grant("b", &web(), ROOM).unwrap();
        assert_eq!(ledger.holders(), ["b"]);
    }

    /// A disk that takes its time.
    struct Slow(std::sync::Barrier);

    impl LedgerStore for Slow {
        fn load(&self) -> Option<Vec<u8>> {
            None
        }
        fn save(&self, _: &[u8]) -> Result<(), String> {
            self.0.wait();
            self.0.wait();
            Ok(())
        }
    }

    #[test]
    fn who_only_reads_does_not_wait_for_the_disk() {
        let store = Arc::new(Slow(std::sync::Barrier::new(2)));
        let ledger = Arc::new(Ledger::open(store.clone()));
        let writer = std::thread::spawn({
            let ledger = ledger.clone();
            move || ledger.grant("a", &web(), ROOM)
        });
        store.0.wait();
        let reader = std::thread::spawn({
            let ledger = ledger.clone();
            move || {
                ledger.ending("a");
                ledger.holds("a")
            }
        });
        let limit = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !reader.is_finished() {
            assert!(std::time::Instant::now() < limit, "it waits for the disk");
            std::thread::yield_now();
        }
        assert!(reader.join().unwrap());
        store.0.wait();
        writer.join().unwrap().unwrap();
    }

    struct Full;

    impl LedgerStore for Full {
        fn load(&self) -> Option<Vec<u8>> {
            None
        }
        fn save(&self, _: &[u8]) -> Result<(), String> {
            Err("no space left".into())
        }
    }

    #[test]
    fn what_could_not_be_written_down_was_not_granted() {
        let ledger = Ledger::open(Arc::new(Full));
        assert!(matches!(
            ledger.grant("a", &web(), ROOM),
            Err(NoGrant::NotStored(_))
        ));
        assert!(ledger.holders().is_empty());
    }
}
