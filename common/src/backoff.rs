//! How long to wait before the next try. Pure: randomness comes in.

use std::time::Duration;

/// Doubles from `first` to `limit`; each wait is drawn between half and all of it, so that a fleet
/// that lost its cloud at once does not come back at once.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    limit: Duration,
    step: u32,
}

impl Backoff {
    pub fn new(first: Duration, limit: Duration) -> Self {
        Self {
            first,
            limit,
            step: 0,
        }
    }

    /// The next wait; `random` is uniform.
    pub fn next_wait(&mut self, random: u32) -> Duration {
        let full = self
            .first
            .saturating_mul(1 << self.step.min(20))
            .min(self.limit);
        self.step = self.step.saturating_add(1);
        full.mul_f64(0.5 + f64::from(random) / f64::from(u32::MAX) / 2.0)
    }

    /// The peer proved itself.
    pub fn reset(&mut self) {
        self.step = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_to_the_limit_and_are_spread() {
        let mut b = Backoff::new(Duration::from_millis(400), Duration::from_secs(30));
        let waits: Vec<_> = (0..9).map(|_| b.next_wait(u32::MAX).as_millis()).collect();
        assert_eq!(
            waits,
            [400, 800, 1600, 3200, 6400, 12800, 25600, 30000, 30000]
        );
        b.reset();
        assert_eq!(b.next_wait(0), Duration::from_millis(200));
        for _ in 0..200 {
            assert!(b.next_wait(u32::MAX) <= Duration::from_secs(30));
        }
    }
}
