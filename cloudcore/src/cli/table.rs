//! Columns for people, as kubectl prints them.

use jiff::Timestamp;

/// Rows under a head, columns three spaces apart.
pub(super) fn table(head: &[&str], rows: &[Vec<String>]) -> Vec<String> {
    let head: Vec<String> = head.iter().map(|h| (*h).to_string()).collect();
    let all = || std::iter::once(&head).chain(rows);
    let width = |column: usize| {
        let widths = all().map(|row| row.get(column).map_or(0, |cell| cell.chars().count()));
        widths.max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..head.len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("   ").trim_end().to_string()
    };
    all().map(line).collect()
}

/// How long ago, in the largest fitting unit; the future is told with a sign.
pub(super) fn age(then: Timestamp, now: Timestamp) -> String {
    let seconds = now.as_second() - then.as_second();
    let sign = if seconds < 0 { "in " } else { "" };
    let n = seconds.unsigned_abs();
    match n {
        0..120 => format!("{sign}{n}s"),
        120..7200 => format!("{sign}{}m", n / 60),
        7200..172_800 => format!("{sign}{}h", n / 3600),
        _ => format!("{sign}{}d", n / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = vec![
            vec!["long-name".into(), "x".into()],
            vec!["a".into(), String::new()],
        ];
        assert_eq!(
            table(&["NAME", "KEY"], &rows),
            ["NAME        KEY", "long-name   x", "a"]
        );
    }

    #[test]
    fn an_age_has_one_unit() {
        let at = |s| Timestamp::from_second(s).unwrap();
        for (then, want) in [
            (100, "0s"),
            (0, "100s"),
            (-500, "10m"),
            (-9_900, "2h"),
            (-999_900, "11d"),
            (160, "in 60s"),
        ] {
            assert_eq!(age(at(then), at(100)), want);
        }
    }
}
