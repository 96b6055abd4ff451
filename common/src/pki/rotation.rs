//! When a certificate is renewed: between 70 and 80 percent of its life, so that a fleet that was
//! enrolled in one hour does not renew in one second.

use std::time::Duration;

use rustls_pki_types::UnixTime;

use super::Validity;

/// The moment at which to renew. `random` is any number, drawn once for each certificate.
pub fn rotation_due(validity: Validity, random: u32) -> UnixTime {
    let start = validity.not_before.as_secs();
    let life = validity.not_after.as_secs().saturating_sub(start);
    // Thousandths of life, in 128 bits so that no lifetime overflows.
    let part = 700 * u128::from(u32::MAX) + 100 * u128::from(random);
    let whole = 1000 * u128::from(u32::MAX);
    let passed = u64::try_from(u128::from(life) * part / whole).unwrap_or(life);
    UnixTime::since_unix_epoch(Duration::from_secs(start.saturating_add(passed)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn validity(from: u64, to: u64) -> Validity {
        let at = |s| UnixTime::since_unix_epoch(Duration::from_secs(s));
        Validity {
            not_before: at(from),
            not_after: at(to),
        }
    }

    #[test]
    fn renewal_lies_between_seventy_and_eighty_percent_of_life() {
        let table = [
            (0, 1000, 0, 700),
            (0, 1000, u32::MAX, 800),
            (500, 1500, u32::MAX / 2, 1249),
            (10, 10, 7, 10),
            (20, 10, 7, 20),
        ];
        for (from, to, random, due) in table {
            assert_eq!(
                rotation_due(validity(from, to), random).as_secs(),
                due,
                "{from}..{to}"
            );
        }
        assert!(rotation_due(validity(0, u64::MAX), u32::MAX).as_secs() > u64::MAX / 2);
    }
}
