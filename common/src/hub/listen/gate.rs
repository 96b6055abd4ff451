//! Counts strangers, turns away those over the limit, and says so without filling the log.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::hub::transport::TransportError;

/// Those who were turned away since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Refused {
    /// Too many handshakes were under way.
    pub crowded: u64,
    /// The handshake failed or took too long.
    pub failed: u64,
}

pub(super) struct Gate {
    all: usize,
    per_source: usize,
    inside: Mutex<Inside>,
    crowded: AtomicU64,
    failed: AtomicU64,
    logged: Mutex<Option<Instant>>,
}

const LOG_EVERY: Duration = Duration::from_secs(1);

/// At most `all` entries.
#[derive(Default)]
struct Inside {
    count: usize,
    sources: BTreeMap<IpAddr, usize>,
}

/// One stranger inside; leaves when dropped.
pub(super) struct Pass {
    gate: Arc<Gate>,
    source: IpAddr,
}

impl Gate {
    pub(super) fn new(all: usize, per_source: usize) -> Self {
        Self {
            all,
            per_source,
            inside: Mutex::default(),
            crowded: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            logged: Mutex::new(None),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn enter(self: &Arc<Self>, address: IpAddr) -> Option<Pass> {
        let source = source(address);
        let mut inside = self.lock();
        let here = inside.sources.get(&source).copied().unwrap_or(0);
        if inside.count >= self.all || here >= self.per_source {
            drop(inside);
            let before = self.crowded.fetch_add(1, Ordering::Relaxed);
            // The counter tells how many; the log only that, at 1, 2, 4, 8, ...
            if (before + 1).is_power_of_two() {
                tracing::warn!(%source, total = before + 1, "too many handshakes under way");
            }
            return None;
        }
        inside.count += 1;
        *inside.sources.entry(source).or_default() += 1;
        Some(Pass {
            gate: self.clone(),
            source,
        })
    }

    /// Half full: from here on strangers over UDP prove their address first.
    pub(super) fn is_crowded(&self) -> bool {
        self.lock().count * 2 >= self.all
    }

    /// Counts and logs a handshake that led to nothing. One line a second at most for operators:
    /// anybody on the internet can cause these.
    pub(super) fn failed(&self, remote: SocketAddr, error: &TransportError) {
        let total = self.failed.fetch_add(1, Ordering::Relaxed) + 1;
        let reason = match error {
            // Worded for the device's end; here the device is the one that refused.
            TransportError::Refused(_) => {
                "the device does not accept what this cloud shows (TLS alert): it was sent here by the \
                 token or the record of another cloud; make it a token here with `cloudcore token create`"
                    .to_owned()
            }
            other => other.explain(),
        };
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if logged.is_none_or(|at| now >= at + LOG_EVERY) {
            *logged = Some(now);
            tracing::info!(%remote, reason, total, "handshake refused");
        } else {
            tracing::debug!(%remote, reason, total, "handshake refused");
        }
    }

    pub(super) fn refused(&self) -> Refused {
        Refused {
            crowded: self.crowded.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut inside = self.gate.lock();
        inside.count -= 1;
        if let Some(here) = inside.sources.get_mut(&self.source) {
            *here -= 1;
            if *here == 0 {
                inside.sources.remove(&self.source);
            }
        }
    }
}

/// An IPv6 customer has at least a /64.
fn source(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        v4 @ IpAddr::V4(_) => v4,
        IpAddr::V6(v6) => {
            let prefix = v6.to_bits() >> 64 << 64;
            Ipv6Addr::from_bits(prefix).into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_source_and_all_together_are_limited_and_places_become_free() {
        let gate = Arc::new(Gate::new(3, 2));
        let ip = |text: &str| text.parse::<IpAddr>().expect("address");
        let one = gate.enter(ip("192.0.2.1")).expect("first");
        let _two = gate
            .enter(ip("::ffff:192.0.2.1"))
            .expect("second of the same");
        assert!(gate.enter(ip("192.0.2.1")).is_none(), "third of the same");
        let _other = gate.enter(ip("2001:db8::1")).expect("another source");
        assert!(gate.enter(ip("192.0.2.9")).is_none(), "full");
        assert!(gate.is_crowded());
        drop(one);
        assert!(gate.enter(ip("192.0.2.1")).is_some(), "a place became free");
        assert_eq!(gate.refused().crowded, 2);
    }

    #[test]
    fn an_ipv6_network_counts_as_one_source() {
        let ip = |text: &str| source(text.parse().expect("address"));
        assert_eq!(ip("2001:db8::1"), ip("2001:db8::ffff:1"));
        assert_ne!(ip("2001:db8::1"), ip("2001:db8:0:1::1"));
    }
}
