//! Rates from totals: what was used between two samples.

use std::collections::BTreeMap;

use jiff::Timestamp;

use super::{Cpu, Snapshot};

/// An older sample says nothing about now.
const OLDEST_SECONDS: i64 = 600;

/// The totals of the last sample, by what they are of. Some kilobytes for as many Pods as a node
/// may have.
#[derive(Debug, Default)]
pub(super) struct Rates {
    totals: BTreeMap<String, (Timestamp, u64)>,
}

impl Rates {
    /// Fills in the rates that the sample before this one allows, and keeps this one's totals.
    pub(super) fn add(&mut self, snapshot: &mut Snapshot) {
        let mut fresh = BTreeMap::new();
        let mut rate = |key: &str, cpu: Option<&mut Cpu>| {
            let Some(cpu) = cpu else { return };
            let before = self.totals.get(key);
            cpu.nano_cores = cpu
                .nano_cores
                .or_else(|| before.and_then(|before| between(*before, (cpu.at, cpu.nanos))));
            fresh.insert(key.to_owned(), (cpu.at, cpu.nanos));
        };
        // Neither an ID nor a UID has a slash.
        rate("/node", snapshot.node.cpu.as_mut());
        rate("/pods", snapshot.all_pods.0.as_mut());
        rate("/agent", snapshot.agent.cpu.as_mut());
        for pod in &mut snapshot.pods {
            rate(&pod.uid, pod.cpu.as_mut());
            for container in &mut pod.containers {
                rate(&container.id, container.cpu.as_mut());
            }
        }
        self.totals = fresh;
    }
}

fn between(before: (Timestamp, u64), now: (Timestamp, u64)) -> Option<u64> {
    let took = now.0.duration_since(before.0);
    // Totals that fell are another process's under the same name.
    let used = now.1.checked_sub(before.1)?;
    let nanos = u128::try_from(took.as_nanos()).ok().filter(|n| *n > 0)?;
    if took.as_secs() > OLDEST_SECONDS {
        return None;
    }
    u64::try_from(u128::from(used) * 1_000_000_000 / nanos).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_what_was_used_in_the_time_between() {
        let at = |ms: i64| Timestamp::from_millisecond(1_800_000_000_000 + ms).unwrap();
        let second = 1_000_000_000;
        for (before, now, want) in [
            ((at(0), 0), (at(2000), second), Some(second / 2)),
            ((at(0), 5), (at(100), 5), Some(0)),
            ((at(0), 5), (at(100), 4), None),
            ((at(5), 5), (at(5), 6), None),
            ((at(5), 5), (at(0), 6), None),
            ((at(0), 5), (at(700_000), 6), None),
        ] {
            assert_eq!(between(before, now), want);
        }
    }
}
