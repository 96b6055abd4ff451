//! Waiting for a level with a deadline. Nothing in the tests sleeps for a time that was guessed.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Why further waiting is useless: a process that should answer has ended. An error of this kind
/// ends a wait at once.
#[derive(Debug)]
pub struct Ended(pub String);

impl std::fmt::Display for Ended {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(&self.0)
    }
}

impl std::error::Error for Ended {}

/// How long to pause between two looks: short against what is waited for, long against the cost
/// of starting a `kubectl`.
const PAUSE: Duration = Duration::from_millis(100);

/// Looks until `look` answers with a value, and fails with `what` and the last reason after
/// `limit`. An `Err` from `look` is a reason to look again, not an end, unless it is [`Ended`].
pub fn wait_for<T>(what: &str, limit: Duration, look: impl FnMut() -> Result<T>) -> Result<T> {
    wait_every(what, limit, PAUSE, look)
}

/// As [`wait_for`], with a pause of the caller's choice.
pub fn wait_every<T>(
    what: &str,
    limit: Duration,
    pause: Duration,
    mut look: impl FnMut() -> Result<T>,
) -> Result<T> {
    let end = Instant::now() + limit;
    loop {
        match look() {
            Ok(value) => return Ok(value),
            Err(reason) if reason.is::<Ended>() => return Err(reason.context(what.to_owned())),
            Err(reason) if Instant::now() >= end => {
                bail!("{what}: not within {limit:?}; last seen: {reason:#}")
            }
            Err(_) => std::thread::sleep(pause),
        }
    }
}

/// Fails as soon as `holds` does not, and succeeds after `span`.
pub fn holds_for(what: &str, span: Duration, mut holds: impl FnMut() -> Result<()>) -> Result<()> {
    let end = Instant::now() + span;
    while Instant::now() < end {
        if let Err(reason) = holds() {
            bail!("{what}: did not hold: {reason:#}");
        }
        std::thread::sleep(PAUSE);
    }
    Ok(())
}
