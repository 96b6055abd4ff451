//! Which port is which node's. Pure: whether a port can be had is asked of the caller.
//!
//! - Owns: the ports of this replica's address, and which of them rest.
//! - Takes: what edge Nodes reported before, names, the time.
//! - Gives: one port a node, the same for as long as this lives.
//! - Never: gives a port to another node within [`QUARANTINE`] of its last use; gives a kubelet's,
//!   but where it was told this one port.
//!
//! ```text
//!   free ──assign──► a node's ──release──► in quarantine ──10 min──► free
//! ```

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use common::ids::NodeName;
use tokio::time::Instant;

/// Whoever still holds the old Node object (an API server's cache, a scraper's list of targets)
/// asks again well within this.
pub(super) const QUARANTINE: Duration = Duration::from_secs(600);

/// The kubelet's own ports and cAdvisor's old one: with the host's network a kubelet has them, and
/// tools that know them by number would take many nodes for one.
const NEVER: &[u16] = &[4194, 10250, 10255];

/// Ports in a row that somebody else has: then something else is wrong, such as no file descriptors.
const TRIES: usize = 64;

/// First and last port of the endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl PortRange {
    fn contains(self, port: u16) -> bool {
        // One port is one node's: whoever gives it means that node.
        let may = !NEVER.contains(&port) || self.first == self.last;
        may && (self.first..=self.last).contains(&port)
    }

    fn len(self) -> usize {
        usize::from(self.last - self.first) + 1
    }

    /// The port at a place, counted around.
    fn at(self, place: usize) -> u16 {
        self.first + u16::try_from(place % self.len()).unwrap_or(0)
    }
}

impl Default for PortRange {
    /// Below NodePorts (30000 and up) and the ports of outgoing connections (32768 and up).
    fn default() -> Self {
        Self {
            first: 20_000,
            last: 29_999,
        }
    }
}

impl FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no range of ports like 20000-29999, from 1024 up");
        let (first, last) = text.split_once('-').ok_or_else(wrong)?;
        let port = |text: &str| text.trim().parse::<u16>().map_err(|_| wrong());
        let (first, last) = (port(first)?, port(last)?);
        if first < 1024 || first > last {
            return Err(wrong());
        }
        Ok(Self { first, last })
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Ports {
    range: PortRange,
    of: HashMap<NodeName, u16>,
    taken: BTreeMap<u16, NodeName>,
    resting: BTreeMap<u16, Instant>,
}

impl Ports {
    pub(super) fn new(range: PortRange) -> Self {
        Self {
            range,
            of: HashMap::new(),
            taken: BTreeMap::new(),
            resting: BTreeMap::new(),
        }
    }

    /// A Node reports this port of our address: it stays the node's. Of two that report one, the
    /// first keeps it.
    pub(super) fn adopt(&mut self, node: &NodeName, port: u16) -> bool {
        let free = self.range.contains(port)
            && !self.taken.contains_key(&port)
            && !self.of.contains_key(node);
        if free {
            self.take(node, port);
        }
        free
    }

    pub(super) fn port(&self, node: &NodeName) -> Option<u16> {
        self.of.get(node).copied()
    }

    pub(super) fn nodes(&self) -> impl Iterator<Item = &NodeName> {
        self.of.keys()
    }

    /// The node's port, opened by `open`; a new one when it has none or somebody else has taken
    /// it. `None` when there is none left.
    pub(super) fn assign<T>(
        &mut self,
        node: &NodeName,
        now: Instant,
        mut open: impl FnMut(u16) -> Option<T>,
    ) -> Option<(u16, T)> {
        if let Some(port) = self.port(node) {
            if let Some(opened) = open(port) {
                return Some((port, opened));
            }
            self.release(node, now);
        }
        self.resting.retain(|_, until| *until > now);
        let start = place_of(node);
        let ports = (0..self.range.len()).map(|step| self.range.at(start.wrapping_add(step)));
        let free = ports.filter(|port| {
            self.range.contains(*port)
                && !self.taken.contains_key(port)
                && !self.resting.contains_key(port)
        });
        let (port, opened) = free
            .take(TRIES)
            .find_map(|port| open(port).map(|opened| (port, opened)))?;
        self.take(node, port);
        Some((port, opened))
    }

    /// The node has no endpoint here any more.
    pub(super) fn release(&mut self, node: &NodeName, now: Instant) -> Option<u16> {
        let port = self.of.remove(node)?;
        self.taken.remove(&port);
        self.resting.insert(port, now + QUARANTINE);
        Some(port)
    }

    /// A port was released before this process began, and rests for so long from now on.
    pub(super) fn rest(&mut self, port: u16, now: Instant, left: Duration) {
        if self.range.contains(port) && !self.taken.contains_key(&port) {
            self.resting.insert(port, now + left.min(QUARANTINE));
        }
    }

    /// The ports that rest, and for how long from now on.
    pub(super) fn resting(&self, now: Instant) -> impl Iterator<Item = (u16, Duration)> {
        let left = move |until: &Instant| until.saturating_duration_since(now);
        let resting = self
            .resting
            .iter()
            .map(move |(port, until)| (*port, left(until)));
        resting.filter(|(_, left)| !left.is_zero())
    }

    fn take(&mut self, node: &NodeName, port: u16) {
        self.of.insert(node.clone(), port);
        self.taken.insert(port, node.clone());
    }
}

/// Where the search for a node's port begins: a name tends to find the same port again (FNV-1a).
fn place_of(node: &NodeName) -> usize {
    let hash = node.as_str().bytes().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    hash as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str) -> NodeName {
        NodeName::parse(name).unwrap()
    }

    fn ports(range: &str) -> Ports {
        Ports::new(range.parse().unwrap())
    }

    fn any(port: u16) -> Option<u16> {
        Some(port)
    }

    #[test]
    fn a_node_keeps_its_port() {
        let (mut ports, now) = (ports("20000-20009"), Instant::now());
        let (first, _) = ports.assign(&node("a"), now, any).unwrap();
        let (other, _) = ports.assign(&node("b"), now, any).unwrap();
        assert_ne!(first, other);
        assert_eq!(ports.assign(&node("a"), now, any), Some((first, first)));
    }

    #[test]
    fn what_a_node_reported_before_is_its_own_and_nobody_elses() {
        let (mut ports, now) = (ports("20000-20003"), Instant::now());
        assert!(ports.adopt(&node("a"), 20_002));
        for (name, port, why) in [
            ("b", 20_002, "another's"),
            ("a", 20_003, "it has one"),
            ("c", 19_999, "outside"),
            ("c", 10_250, "a kubelet's"),
        ] {
            assert!(!ports.adopt(&node(name), port), "{port}: {why}");
        }
        let mut seen = vec![20_002];
        for name in ["b", "c", "d"] {
            seen.push(ports.assign(&node(name), now, any).unwrap().0);
        }
        seen.sort_unstable();
        assert_eq!(seen, [20_000, 20_001, 20_002, 20_003]);
        assert_eq!(ports.assign(&node("e"), now, any), None, "none is left");
    }

    #[test]
    fn a_freed_port_rests_before_another_node_gets_it() {
        let (mut ports, now) = (ports("20000-20000"), Instant::now());
        ports.assign(&node("a"), now, any).unwrap();
        assert_eq!(ports.release(&node("a"), now), Some(20_000));
        let almost = now + QUARANTINE - Duration::from_secs(1);
        assert_eq!(ports.assign(&node("b"), almost, any), None);
        let after = now + QUARANTINE;
        assert_eq!(ports.assign(&node("b"), after, any), Some((20_000, 20_000)));
    }

    #[test]
    fn a_port_that_another_process_has_is_passed_over() {
        let (mut ports, now) = (ports("20000-20001"), Instant::now());
        ports.adopt(&node("a"), 20_000);
        let only = |port| (port == 20_001).then_some(());
        assert_eq!(ports.assign(&node("a"), now, only), Some((20_001, ())));
        let mut asked = 0;
        let mut wide = Ports::new(PortRange::default());
        let none = wide.assign(&node("a"), now, |_| {
            asked += 1;
            None::<()>
        });
        assert_eq!((none, asked), (None, TRIES));
    }

    #[test]
    fn a_kubelets_ports_are_never_given() {
        let (mut ports, now) = (ports("10250-10256"), Instant::now());
        let names = ["a", "b", "c", "d", "e", "f", "g"];
        let given: Vec<_> = names
            .iter()
            .filter_map(|name| ports.assign(&node(name), now, any))
            .collect();
        assert_eq!(given.len(), 5);
        assert!(given.iter().all(|(port, _)| !NEVER.contains(port)));
    }

    #[test]
    fn a_kubelets_port_is_given_where_it_is_the_only_one() {
        let now = Instant::now();
        for never in NEVER {
            let mut ports = ports(&format!("{never}-{never}"));
            assert_eq!(ports.assign(&node("a"), now, any), Some((*never, *never)));
            assert_eq!(ports.assign(&node("b"), now, any), None);
        }
        let mut again = ports("10250-10250");
        assert!(again.adopt(&node("a"), 10_250));
        let mut two = ports("10250-10251");
        assert_eq!(two.assign(&node("a"), now, any), Some((10_251, 10_251)));
    }

    #[test]
    fn a_port_that_was_released_before_this_process_began_rests_for_what_is_left() {
        let (mut ports, now) = (ports("20000-20001"), Instant::now());
        ports.adopt(&node("a"), 20_000);
        ports.rest(20_000, now, QUARANTINE);
        ports.rest(20_001, now, Duration::from_secs(60));
        ports.rest(20_002, now, QUARANTINE);
        let resting: Vec<_> = ports.resting(now).collect();
        assert_eq!(resting, [(20_001, Duration::from_secs(60))]);
        assert_eq!(ports.assign(&node("b"), now, any), None);
        let after = now + Duration::from_secs(60);
        assert_eq!(ports.resting(after).count(), 0);
        assert_eq!(ports.assign(&node("b"), after, any), Some((20_001, 20_001)));
    }

    #[test]
    fn a_range_is_two_ports_in_order() {
        assert_eq!("1024-1024".parse::<PortRange>().unwrap().len(), 1);
        for bad in ["", "20000", "2-1", "80-90", "1-70000", "a-b", "30000-20000"] {
            assert!(bad.parse::<PortRange>().is_err(), "{bad}");
        }
        assert_eq!(PortRange::default().to_string(), "20000-29999");
    }
}
