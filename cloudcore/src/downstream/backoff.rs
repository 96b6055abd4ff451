//! How long a feed waits before it asks the API server again. Pure but for the jitter it is given.

use std::time::Duration;

use super::source::Fault;

/// The longest wait between two attempts.
pub(super) const CEILING: Duration = Duration::from_secs(30);

/// Doubling waits with jitter, back to the first only when the server proved itself.
#[derive(Debug, Clone)]
pub(super) struct Backoff {
    first: Duration,
    attempt: u32,
}

impl Backoff {
    /// `attempt` waits lie behind already.
    pub(super) fn new(first: Duration, attempt: u32) -> Self {
        Self { first, attempt }
    }

    pub(super) fn reset(&mut self) {
        self.attempt = 0;
    }

    /// The next wait: between half and all of the doubled value, or what the server asked for and
    /// a little more. `random` is in 0..1.
    pub(super) fn next(&mut self, fault: Option<&Fault>, random: f64) -> Duration {
        let doubled = self
            .first
            .saturating_mul(1 << self.attempt.min(16))
            .min(CEILING);
        self.attempt = self.attempt.saturating_add(1);
        let own = doubled.mul_f64(0.5 + random.clamp(0.0, 1.0) / 2.0);
        match fault {
            Some(Fault::Throttled {
                after: Some(after), ..
            }) => *after + own,
            _ => own,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_doubles_to_the_ceiling_and_starts_again() {
        let mut backoff = Backoff::new(Duration::from_millis(10), 0);
        assert_eq!(backoff.next(None, 1.0), Duration::from_millis(10));
        assert_eq!(backoff.next(None, 0.0), Duration::from_millis(10));
        assert_eq!(backoff.next(None, 1.0), Duration::from_millis(40));
        for _ in 0..100 {
            backoff.next(None, 1.0);
        }
        assert_eq!(backoff.next(None, 1.0), CEILING);
        backoff.reset();
        assert_eq!(backoff.next(None, 1.0), Duration::from_millis(10));
    }

    #[test]
    fn a_server_that_names_a_pause_gets_it() {
        let fault = Fault::Throttled {
            message: String::new(),
            after: Some(Duration::from_secs(7)),
        };
        let wait = Backoff::new(Duration::from_millis(10), 0).next(Some(&fault), 1.0);
        assert!(wait > Duration::from_secs(7));
    }
}
