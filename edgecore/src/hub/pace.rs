//! When to dial again, and after what silence a link is dead.
//!
//! Pure. Takes: how a session or a dial ended, what is set here, what the cloud said. Gives: the
//! wait before the next dial, and the deadlines of the next connection.

use std::time::Duration;

use common::backoff::Backoff;
use common::hub::proto::GoAwayReason;
use common::hub::transport::LinkConfig;

use super::session::SessionEnd;

/// The first wait after a lost link: a router that restarts is back within a minute, a dropped
/// connection at once.
const FIRST_WAIT: Duration = Duration::from_millis(400);

/// A device that was out for days is back within half a minute of its link.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// A cloud that says that it does not want this device is asked this often.
pub const UNWANTED_WAIT: Duration = Duration::from_secs(300);

/// Waits that double, are jittered, and begin anew once the cloud has proved itself: it welcomed
/// this device, and what it sent was committed.
#[derive(Debug)]
pub struct Pace {
    backoff: Backoff,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            backoff: Backoff::new(FIRST_WAIT, LONGEST_WAIT),
        }
    }
}

impl Pace {
    /// Something did not succeed.
    pub fn wait(&mut self) -> Duration {
        self.backoff.next_wait(rand::random())
    }

    /// A session has ended.
    pub fn after(&mut self, end: &SessionEnd, proved: bool) -> Duration {
        if proved {
            self.backoff.reset();
        }
        match end {
            SessionEnd::Stopping | SessionEnd::Renewed | SessionEnd::Deadlines => Duration::ZERO,
            SessionEnd::GoAway {
                reason,
                retry_after,
                ..
            } => {
                let least = match reason {
                    GoAwayReason::GoAwayRevoked | GoAwayReason::GoAwayQuarantined => UNWANTED_WAIT,
                    GoAwayReason::GoAwayUnspecified
                    | GoAwayReason::GoAwayDraining
                    | GoAwayReason::GoAwayReplaced
                    | GoAwayReason::GoAwayProtocolError
                    | GoAwayReason::GoAwayLostClaim => Duration::ZERO,
                };
                least.max(*retry_after).max(self.wait())
            }
            SessionEnd::Lanes(_) | SessionEnd::Protocol(_) | SessionEnd::Store(_) => self.wait(),
        }
    }
}

/// The silence after which each end takes the link for dead: the cloud's, unless this device was
/// given its own. Who speaks first is always the device, so it must keep to the shorter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    own: Option<Duration>,
    clouds: Duration,
}

impl Deadlines {
    /// With what is set here, if it is, and what the cloud said last.
    pub fn new(own: Option<Duration>, said: Option<Duration>) -> Self {
        let (least, most) = LinkConfig::DEAD_AFTER.into_inner();
        let (least, most) = (Duration::from_secs(least), Duration::from_secs(most));
        let said = said.filter(|said| !said.is_zero());
        Self {
            own,
            clouds: said.map_or(LinkConfig::default().dead_after, |s| s.clamp(least, most)),
        }
    }

    /// The same with what the cloud says now; a cloud of before says nothing.
    pub fn told(self, said: Duration) -> Self {
        match said.is_zero() {
            true => self,
            false => Self::new(self.own, Some(said)),
        }
    }

    /// Keep-alives that both ends hear in time, with room for one that is lost.
    pub fn link(self) -> LinkConfig {
        let usual = LinkConfig::default();
        let dead_after = self.own.unwrap_or(self.clouds);
        let heard = dead_after.min(self.clouds);
        LinkConfig {
            keep_alive: usual.keep_alive.min(heard / 3),
            ping_every: usual.ping_every.min(heard.mul_f64(0.45)),
            dead_after,
            ..usual
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost() -> SessionEnd {
        SessionEnd::Protocol(common::hub::session::ProtocolError::Version(9))
    }

    fn told(reason: GoAwayReason, retry_after: u64) -> SessionEnd {
        SessionEnd::GoAway {
            reason,
            message: String::new(),
            retry_after: Duration::from_secs(retry_after),
        }
    }

    #[test]
    fn the_first_wait_is_below_a_second_and_only_a_proof_brings_it_back() {
        for _ in 0..100 {
            let mut pace = Pace::default();
            assert!(pace.after(&lost(), false) < Duration::from_secs(1));
            for _ in 0..10 {
                pace.after(&lost(), false);
            }
            let unproved = pace.after(&lost(), false);
            assert!(unproved > Duration::from_secs(5), "{unproved:?}");
            assert!(unproved <= LONGEST_WAIT, "{unproved:?}");
            let proved = pace.after(&lost(), true);
            assert!(proved < Duration::from_secs(1), "{proved:?}");
        }
    }

    #[test]
    fn who_is_not_wanted_asks_seldom_and_nobody_asks_before_it_is_told_to() {
        let mut pace = Pace::default();
        for reason in [GoAwayReason::GoAwayRevoked, GoAwayReason::GoAwayQuarantined] {
            assert!(pace.after(&told(reason, 0), true) >= UNWANTED_WAIT);
        }
        let draining = pace.after(&told(GoAwayReason::GoAwayDraining, 7), true);
        assert_eq!(draining, Duration::from_secs(7));
        for end in [
            SessionEnd::Stopping,
            SessionEnd::Renewed,
            SessionEnd::Deadlines,
        ] {
            assert_eq!(pace.after(&end, true), Duration::ZERO);
        }
    }

    #[test]
    fn both_ends_hear_a_device_at_rest_in_time() {
        let seconds = Duration::from_secs;
        // Set here, said by the cloud, and the silence that this end bears.
        for (own, said, dead_after) in [
            (None, None, 45),
            (None, Some(10), 10),
            (None, Some(120), 120),
            (None, Some(1), 5),
            (None, Some(0), 45),
            (Some(30), Some(120), 30),
            (Some(90), Some(10), 90),
        ] {
            let deadlines = Deadlines::new(own.map(seconds), said.map(seconds));
            let link = deadlines.link();
            assert_eq!(link.dead_after, seconds(dead_after), "{deadlines:?}");
            let shorter = link.dead_after.min(deadlines.clouds);
            assert!(2 * link.keep_alive < shorter, "{deadlines:?}: {link:?}");
            assert!(2 * link.ping_every < shorter, "{deadlines:?}: {link:?}");
        }
        let before = Deadlines::new(None, None);
        assert_eq!(before.told(seconds(45)), before);
        assert_eq!(before.told(Duration::ZERO), before);
        assert_ne!(before.told(seconds(60)), before);
    }
}
