//! When a container that ended is started again (pure).
//!
//! The first restart is immediate; then 10 s, doubling to 300 s, counted from the last end; a run
//! that outlasts twice the longest wait starts over. The wait survives a restart of the agent: it
//! is estimated from the restart count when it is not remembered.

use std::time::Duration;

use jiff::Timestamp;

const FIRST: Duration = Duration::from_secs(10);
const LONGEST: Duration = Duration::from_secs(300);
/// A run of this length proves the container well again.
const FORGIVEN: Duration = Duration::from_secs(600);

/// A Pod's or container's restart policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    Always,
    OnFailure,
    Never,
}

impl Policy {
    /// The API's default is Always.
    pub fn parse(word: Option<&str>) -> Self {
        match word {
            Some("Never") => Policy::Never,
            Some("OnFailure") => Policy::OnFailure,
            Some(_) | None => Policy::Always,
        }
    }

    pub fn restarts(self, exit_code: i32) -> bool {
        match self {
            Policy::Always => true,
            Policy::OnFailure => exit_code != 0,
            Policy::Never => false,
        }
    }
}

/// What is remembered of one container's crashes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Crashes {
    /// The wait after the next end.
    pub delay: Duration,
    /// When the container was last started again.
    pub since: Timestamp,
}

/// Whether the container may start now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Start it, and remember this.
    Start(Crashes),
    /// Not before `left` has passed; the whole wait is `delay`.
    Wait { left: Duration, delay: Duration },
}

fn since(earlier: Timestamp, later: Timestamp) -> Duration {
    // A clock that was set back makes differences negative: no time has passed then.
    Duration::try_from(later.duration_since(earlier)).unwrap_or_default()
}

/// What an agent that remembers nothing assumes of a container with this many restarts.
pub fn assumed(restarts: u32, started: Timestamp) -> Option<Crashes> {
    let doublings = restarts.checked_sub(1)?.min(8);
    Some(Crashes {
        delay: (FIRST * 2_u32.pow(doublings)).min(LONGEST),
        since: started,
    })
}

impl Crashes {
    /// What is remembered of a container that starts with a clean record.
    pub fn none(now: Timestamp) -> Self {
        Self {
            delay: FIRST,
            since: now,
        }
    }
}

/// Decides over a container that ended at `finished`.
pub fn decide(remembered: Option<Crashes>, finished: Timestamp, now: Timestamp) -> Verdict {
    let fresh = Verdict::Start(Crashes::none(now));
    let Some(crashes) = remembered else {
        return fresh;
    };
    if since(crashes.since, finished) > FORGIVEN {
        return fresh;
    }
    // An end in the future is a clock that was set back: it counts as now, so no wait is endless.
    let waited = since(finished, now);
    if waited < crashes.delay {
        return Verdict::Wait {
            left: crashes.delay - waited,
            delay: crashes.delay,
        };
    }
    Verdict::Start(Crashes {
        delay: (crashes.delay * 2).min(LONGEST),
        since: now,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn policies_restart_what_they_should() {
        for (word, ok, failed) in [
            (Some("Always"), true, true),
            (None, true, true),
            (Some("OnFailure"), false, true),
            (Some("Never"), false, false),
        ] {
            let policy = Policy::parse(word);
            assert_eq!(policy.restarts(0), ok, "{word:?}");
            assert_eq!(policy.restarts(1), failed, "{word:?}");
        }
    }

    #[test]
    fn a_container_that_ends_at_once_waits_longer_each_time_up_to_five_minutes() {
        let mut now = 0;
        let mut remembered = None;
        let mut waits = Vec::new();
        for _ in 0..9 {
            let finished = at(now);
            if let Verdict::Wait { left, delay } = decide(remembered, finished, at(now)) {
                assert_eq!(left, delay);
                waits.push(delay.as_secs());
                now += i64::try_from(delay.as_secs()).unwrap();
            }
            let Verdict::Start(crashes) = decide(remembered, finished, at(now)) else {
                panic!("the wait is over");
            };
            remembered = Some(crashes);
            now += 1;
        }
        assert_eq!(waits, [10, 20, 40, 80, 160, 300, 300, 300]);
    }

    #[test]
    fn a_long_clean_run_starts_over() {
        let crashes = Crashes {
            delay: secs(300),
            since: at(0),
        };
        assert!(matches!(
            decide(Some(crashes), at(601), at(601)),
            Verdict::Start(Crashes { delay, .. }) if delay == secs(10)
        ));
        assert!(matches!(
            decide(Some(crashes), at(599), at(599)),
            Verdict::Wait { .. }
        ));
    }

    #[test]
    fn the_wait_counts_from_the_end_and_a_clock_set_back_does_not_extend_it() {
        let crashes = Crashes {
            delay: secs(20),
            since: at(0),
        };
        assert_eq!(
            decide(Some(crashes), at(5), at(12)),
            Verdict::Wait {
                left: secs(13),
                delay: secs(20)
            }
        );
        assert_eq!(
            decide(Some(crashes), at(500), at(12)),
            Verdict::Wait {
                left: secs(20),
                delay: secs(20)
            }
        );
    }

    #[test]
    fn an_agent_that_forgot_assumes_the_wait_from_the_restart_count() {
        assert_eq!(assumed(0, at(0)), None);
        for (restarts, delay) in [(1, 10), (2, 20), (5, 160), (6, 300), (4000, 300)] {
            assert_eq!(
                assumed(restarts, at(0)).unwrap().delay,
                secs(delay),
                "{restarts}"
            );
        }
    }
}
