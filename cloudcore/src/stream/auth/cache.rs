//! Answers that hold for a while, so many and no more. Pure.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};

use tokio::time::Instant;

/// See the module. Full, it drops what has lapsed, and without that any one entry: the worst that
/// comes of it is that the API server is asked once more.
pub(super) struct Cache<K, V> {
    most: usize,
    entries: Mutex<HashMap<K, (V, Instant)>>,
}

impl<K: Hash + Eq + Clone, V: Clone> Cache<K, V> {
    pub(super) fn new(most: usize) -> Self {
        Self {
            most,
            entries: Mutex::default(),
        }
    }

    pub(super) fn find(&self, key: &K, now: Instant) -> Option<V> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let (value, until) = entries.get(key)?;
        (*until > now).then(|| value.clone())
    }

    pub(super) fn keep(&self, key: K, value: V, now: Instant, until: Instant) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.len() >= self.most && !entries.contains_key(&key) {
            entries.retain(|_, (_, until)| *until > now);
            let any = entries.keys().next().cloned();
            if let Some(any) = any.filter(|_| entries.len() >= self.most) {
                entries.remove(&any);
            }
        }
        entries.insert(key, (value, until));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn an_answer_holds_for_its_time_and_there_are_never_more_than_so_many() {
        let (cache, now) = (Cache::new(3), Instant::now());
        let later = |s| now + Duration::from_secs(s);
        cache.keep("short", 1, now, later(1));
        cache.keep("long", 2, now, later(9));
        assert_eq!(cache.find(&"short", now), Some(1));
        assert_eq!(cache.find(&"short", later(1)), None);
        cache.keep("third", 3, later(2), later(9));
        cache.keep("fourth", 4, later(2), later(9));
        // The lapsed one made room.
        assert_eq!(cache.find(&"long", later(2)), Some(2));
        for n in 0..50 {
            cache.keep("more", n, later(2), later(9));
            let key: &'static str = ["a", "b", "c", "d", "e"][n as usize % 5];
            cache.keep(key, n, later(2), later(9));
            assert_eq!(cache.find(&key, later(2)), Some(n));
        }
        assert!(cache.entries.lock().unwrap().len() <= 3);
    }
}
