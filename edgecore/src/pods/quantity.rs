//! Kubernetes quantities (`resource.Quantity`) as exact numbers (pure).
//!
//! Owns the notation: decimal (`m`, `k`, `M`, ...), binary (`Ki`, ...) and exponent (`1e3`)
//! suffixes. Never rounds down: what does not fit a unit counts as the next whole one, as the API
//! server does.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// Billionths, the finest unit that the notation has.
const NANO: i128 = 1_000_000_000;

/// The amount in billionths; `None` for what is not a quantity or past any device's size.
fn nano(text: &str) -> Option<i128> {
    let text = text.trim();
    let end = text
        .find(|c: char| !(c.is_ascii_digit() || c == '.' || c == '+' || c == '-'))
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (negative, number) = match number.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, number.strip_prefix('+').unwrap_or(number)),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    // 18 digits after the point hold any finer part than the unit that survives.
    let fraction = fraction.get(..18).unwrap_or(fraction);
    let digits: i128 = format!("0{whole}{fraction}").parse().ok()?;
    let scale = 10_i128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let (up, down) = unit(suffix)?;
    let amount = digits.checked_mul(up)?;
    let divisor = scale.checked_mul(down)?;
    let rounded = amount.checked_add(divisor - 1)? / divisor;
    Some(if negative { -rounded } else { rounded })
}

/// A suffix as billionths: a factor and a divisor.
fn unit(suffix: &str) -> Option<(i128, i128)> {
    let binary = |power: u32| Some((NANO.checked_mul(1024_i128.checked_pow(power)?)?, 1));
    let decimal = |power: i32| match u32::try_from(power) {
        Ok(up) => Some((NANO.checked_mul(10_i128.checked_pow(up)?)?, 1)),
        Err(_) => Some((NANO, 10_i128.checked_pow(power.unsigned_abs())?)),
    };
    match suffix {
        "" => decimal(0),
        "n" => decimal(-9),
        "u" => decimal(-6),
        "m" => decimal(-3),
        "k" => decimal(3),
        "M" => decimal(6),
        "G" => decimal(9),
        "T" => decimal(12),
        "P" => decimal(15),
        "E" => decimal(18),
        "Ki" => binary(1),
        "Mi" => binary(2),
        "Gi" => binary(3),
        "Ti" => binary(4),
        "Pi" => binary(5),
        "Ei" => binary(6),
        exponent => {
            let power = exponent.strip_prefix(['e', 'E'])?;
            decimal(power.parse().ok()?)
        }
    }
}

fn in_units(quantity: &Quantity, per_unit: i128) -> Option<i64> {
    let nano = nano(&quantity.0)?;
    let up = nano.checked_add(if nano > 0 { per_unit - 1 } else { 0 })? / per_unit;
    i64::try_from(up).ok()
}

/// Whole units (bytes, for memory), rounded up; `None` when it is no quantity.
pub fn units(quantity: &Quantity) -> Option<i64> {
    in_units(quantity, NANO)
}

/// Thousandths (millicores, for CPU), rounded up; `None` when it is no quantity.
pub fn millis(quantity: &Quantity) -> Option<i64> {
    in_units(quantity, NANO / 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_notation_is_read_and_rounded_up() {
        for (text, in_units, in_millis) in [
            ("0", Some(0), Some(0)),
            ("1", Some(1), Some(1000)),
            ("250m", Some(1), Some(250)),
            ("0.5", Some(1), Some(500)),
            ("1.0005", Some(2), Some(1001)),
            ("100n", Some(1), Some(1)),
            ("1k", Some(1000), Some(1_000_000)),
            ("64Mi", Some(67_108_864), Some(67_108_864_000)),
            ("1.5Gi", Some(1_610_612_736), Some(1_610_612_736_000)),
            ("1e3", Some(1000), Some(1_000_000)),
            ("12E-1", Some(2), Some(1200)),
            ("1E", Some(1_000_000_000_000_000_000), None),
            ("-1", Some(-1), Some(-1000)),
            ("+2", Some(2), Some(2000)),
            ("", None, None),
            (".", None, None),
            ("1Xi", None, None),
            ("one", None, None),
            ("1-2", None, None),
            ("9999999999999999999999999999999999999999", None, None),
            ("1e99", None, None),
        ] {
            let q = Quantity(text.into());
            assert_eq!(units(&q), in_units, "{text} in units");
            assert_eq!(millis(&q), in_millis, "{text} in millis");
        }
    }
}
