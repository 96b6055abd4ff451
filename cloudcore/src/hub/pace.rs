//! How often somebody may do something: some at once, then one at a time. Pure.
//!
//! - Owns: for each name that was seen lately, when its allowance is whole again.
//! - Takes: the time with each question.
//! - Gives: leave, or how long to wait.
//! - Never: grows with names that were seen long ago.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Names above which those whose allowance is whole again are dropped before another is added.
const SWEEP_ABOVE: usize = 256;

/// See the module.
pub struct Pace<K> {
    burst: u32,
    every: Duration,
    whole: Mutex<Table<K>>,
}

struct Table<K> {
    at: HashMap<K, Instant>,
    /// With so many names the table is swept next: twice what the last sweep left, so that a
    /// sweep costs little for each name.
    sweep_at: usize,
}

impl<K: Hash + Eq> Pace<K> {
    /// `burst` at once, then one in each `every`.
    pub fn new(burst: u32, every: Duration) -> Self {
        let table = Table {
            at: HashMap::new(),
            sweep_at: SWEEP_ABOVE,
        };
        Self {
            burst,
            every,
            whole: Mutex::new(table),
        }
    }

    /// Takes one now, or says how long it is until there is one.
    pub fn take(&self, key: K, now: Instant) -> Result<(), Duration> {
        let wait = self.ask(key, now, false);
        if wait.is_zero() { Ok(()) } else { Err(wait) }
    }

    /// Takes one in any case: it may be used after this time.
    pub fn reserve(&self, key: K, now: Instant) -> Duration {
        self.ask(key, now, true)
    }

    fn ask(&self, key: K, now: Instant, in_any_case: bool) -> Duration {
        let mut table = self.whole.lock().unwrap_or_else(PoisonError::into_inner);
        if table.at.len() >= table.sweep_at {
            table.at.retain(|_, whole| *whole > now);
            table.sweep_at = SWEEP_ABOVE.max(2 * table.at.len());
        }
        let whole = table.at.get(&key).copied().unwrap_or(now).max(now);
        let next = whole + self.every;
        let wait = next.saturating_duration_since(now + self.every * self.burst);
        if wait.is_zero() || in_any_case {
            table.at.insert(key, next);
        }
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn some_at_once_and_then_one_at_a_time() {
        let pace = Pace::new(3, SECOND);
        let now = Instant::now();
        for _ in 0..3 {
            assert_eq!(pace.take("a", now), Ok(()));
        }
        assert_eq!(pace.take("a", now), Err(SECOND));
        assert_eq!(pace.take("a", now), Err(SECOND), "asking costs nothing");
        assert_eq!(pace.take("b", now), Ok(()), "each name has its own");
        assert_eq!(pace.take("a", now + SECOND), Ok(()));
        assert_eq!(pace.take("a", now + SECOND), Err(SECOND));
        assert_eq!(pace.take("a", now + SECOND * 9), Ok(()));
        assert_eq!(pace.reserve("c", now), Duration::ZERO);
        pace.reserve("c", now);
        pace.reserve("c", now);
        assert_eq!(pace.reserve("c", now), SECOND);
        assert_eq!(pace.reserve("c", now), SECOND * 2);
    }

    #[test]
    fn names_of_long_ago_are_dropped() {
        let pace = Pace::new(1, SECOND);
        let start = Instant::now();
        for n in 0..10_000_u32 {
            pace.reserve(n, start + SECOND * n);
        }
        assert!(pace.whole.lock().unwrap().at.len() <= SWEEP_ABOVE);
    }
}
