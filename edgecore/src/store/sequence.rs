//! Numbers that never repeat within an incarnation, at the price of one small write per thousand.
//!
//! A number is handed out before its report is durable, so that a status need not wait for the
//! disk. What is durable is how far numbers may have been handed out: a start goes on behind that.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::schema::{Table, Write};
use super::{Store, StoreError};

/// Asked for again when half is used: 512 reports then have the time of one sync.
const BLOCK: u64 = 1024;

pub(super) struct Sequence {
    name: &'static str,
    next: u64,
    asked: u64,
    durable: Arc<AtomicU64>,
}

impl Sequence {
    /// Blocks for one sync.
    pub(super) fn load(store: &Store, name: &'static str) -> Result<Self, StoreError> {
        let stored = store.get(Table::State, name.as_bytes())?;
        let used = stored.as_deref().and_then(|b| b.first_chunk()).copied();
        // A full disk may have kept the last block from being reserved while it was in use already.
        let next = used.map_or(0, |b| u64::from_be_bytes(b) + BLOCK) + 1;
        let mut new = Self {
            name,
            next,
            asked: next - 1,
            durable: Arc::new(AtomicU64::new(0)),
        };
        store.commit(vec![new.reserve()])?;
        new.durable.store(new.asked, Ordering::SeqCst);
        Ok(new)
    }

    fn reserve(&mut self) -> Write {
        self.asked += BLOCK;
        Write::put(Table::State, self.name, self.asked.to_be_bytes())
    }

    pub(super) fn take(&mut self, store: &Store) -> u64 {
        if self.next + BLOCK / 2 > self.asked {
            let write = self.reserve();
            let (durable, upto) = (self.durable.clone(), self.asked);
            let then = move || {
                durable.fetch_max(upto, Ordering::SeqCst);
            };
            store.soon(vec![write], Box::new(then));
        }
        if self.next > self.durable.load(Ordering::SeqCst) + BLOCK {
            tracing::warn!(
                name = self.name,
                "sequence numbers are used that may repeat"
            );
        }
        self.next += 1;
        self.next - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_number_repeats_whether_or_not_the_store_was_closed() {
        let dir = tempfile::tempdir().unwrap();
        let mut last = 0;
        for round in 0..4 {
            let (store, _) = Store::open(dir.path()).unwrap();
            let mut sequence = Sequence::load(&store, "x").unwrap();
            for _ in 0..3000 {
                let n = sequence.take(&store);
                assert!(n > last, "round {round}: {n} after {last}");
                last = n;
            }
        }
        assert!(last < 4 * 3000 + 4 * 3 * BLOCK);
    }

    #[test]
    fn an_unclean_start_goes_on_behind_all_that_was_handed_out() {
        let store = Store::in_memory();
        let mut first = Sequence::load(&store, "x").unwrap();
        let used = (0..700).map(|_| first.take(&store)).max();
        let mut second = Sequence::load(&store, "x").unwrap();
        assert!(Some(second.take(&store)) > used);
    }
}
