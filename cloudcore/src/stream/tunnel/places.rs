//! How many tunnels a node may have, and how fast they may open.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use common::ids::NodeName;
use tokio::time::Instant;

use crate::hub::pace::Pace;

/// Of one node at once: what a connection has streams for beside its session's own
/// (`LinkConfig::cloud_streams`).
pub(super) const TUNNELS: usize = 64;

/// A script that runs a command in each of a node's Pods passes; a loop gone wild is held.
const BURST: u32 = 200;
const EVERY: Duration = Duration::from_millis(10);

/// Why there is no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Full {
    Open,
    Rate(Duration),
}

/// See the module. Cheap to clone.
#[derive(Clone)]
pub(super) struct Places {
    open: Arc<Mutex<HashMap<NodeName, usize>>>,
    pace: Arc<Pace<NodeName>>,
}

/// One tunnel's place; free again when dropped.
pub(super) struct Place {
    places: Places,
    node: NodeName,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            open: Arc::default(),
            pace: Arc::new(Pace::new(BURST, EVERY)),
        }
    }
}

impl Places {
    pub(super) fn take(&self, node: &NodeName, now: Instant) -> Result<Place, Full> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let here = open.get(node).copied().unwrap_or(0);
        if here >= TUNNELS {
            return Err(Full::Open);
        }
        self.pace.take(node.clone(), now).map_err(Full::Rate)?;
        open.insert(node.clone(), here + 1);
        drop(open);
        Ok(Place {
            places: self.clone(),
            node: node.clone(),
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let open = &self.places.open;
        let mut open = open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(here) = open.get_mut(&self.node) {
            *here -= 1;
            if *here == 0 {
                open.remove(&self.node);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_has_so_many_tunnels_and_others_have_theirs() {
        let (places, now) = (Places::default(), Instant::now());
        let [a, b] = ["a", "b"].map(|name| NodeName::parse(name).unwrap());
        let mut held: Vec<_> = (0..TUNNELS)
            .map(|_| places.take(&a, now).ok().unwrap())
            .collect();
        assert_eq!(places.take(&a, now).err(), Some(Full::Open));
        assert!(places.take(&b, now).is_ok());
        held.pop();
        assert!(places.take(&a, now).is_ok());
        drop(held);
        assert!(places.open.lock().unwrap().is_empty());
    }

    #[test]
    fn tunnels_that_open_too_fast_wait() {
        let (places, now) = (Places::default(), Instant::now());
        let node = NodeName::parse("a").unwrap();
        for _ in 0..BURST {
            assert!(places.take(&node, now).is_ok());
        }
        assert_eq!(places.take(&node, now).err(), Some(Full::Rate(EVERY)));
        assert!(places.take(&node, now + EVERY).is_ok());
    }
}
