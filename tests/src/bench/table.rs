//! The table that the benchmark prints, and the few statistics in it. Pure.

use std::fmt::Write as _;
use std::time::Duration;

/// What became of a promise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Pass,
    Fail,
    /// Measured, but there is nothing to judge it by: a peer's own figure, a debug build.
    Seen,
    /// It could not be measured.
    Broken(String),
}

impl Verdict {
    pub fn of(pass: bool) -> Verdict {
        match pass {
            true => Verdict::Pass,
            false => Verdict::Fail,
        }
    }

    fn word(&self) -> &str {
        match self {
            Verdict::Pass => "pass",
            Verdict::Fail => "FAIL",
            Verdict::Seen => "-",
            Verdict::Broken(_) => "BROKEN",
        }
    }
}

/// One line: a measure, its bar, what was seen.
#[derive(Debug, Clone)]
pub struct Row {
    pub measure: String,
    pub bar: String,
    pub ours: String,
    pub peer: String,
    pub ratio: String,
    pub verdict: Verdict,
    /// How it was counted, where a reader would ask.
    pub note: String,
}

impl Row {
    pub fn new(measure: &str, bar: &str) -> Row {
        Row {
            measure: measure.to_owned(),
            bar: bar.to_owned(),
            ours: "-".to_owned(),
            peer: "-".to_owned(),
            ratio: "-".to_owned(),
            verdict: Verdict::Seen,
            note: String::new(),
        }
    }

    pub fn broken(measure: &str, bar: &str, why: &anyhow::Error) -> Row {
        Row {
            verdict: Verdict::Broken(format!("{why:#}")),
            ..Row::new(measure, bar)
        }
    }

    /// Fills in both sides of a figure, and their ratio.
    pub fn beside(mut self, ours: Option<f64>, peer: Option<f64>, show: fn(f64) -> String) -> Row {
        let text = |value: Option<f64>| value.map_or("-".to_owned(), show);
        (self.ours, self.peer) = (text(ours), text(peer));
        if let (Some(ours), Some(peer)) = (ours, peer)
            && peer > 0.0
        {
            self.ratio = format!("{:.3}", ours / peer);
        }
        self
    }

    /// Judges our figure by a limit of its own.
    pub fn judged(mut self, ours: Option<f64>, limit: f64) -> Row {
        if let Some(ours) = ours {
            self.verdict = Verdict::of(ours <= limit);
        }
        self
    }

    /// Fills in both sides of a rate in bytes a second, better when larger, and judges ours: it is
    /// at least `limit`, or at least that part of the peer's.
    pub fn rated(self, ours: Option<f64>, peer: Option<f64>, limit: f64, part: f64) -> Row {
        let mut row = self.beside(ours, peer, show_rate);
        if let Some(ours) = ours {
            let beside_peer = peer.is_some_and(|peer| ours >= part * peer);
            row.verdict = Verdict::of(ours >= limit || beside_peer);
        }
        row
    }

    /// The row alone.
    pub fn line(&self) -> String {
        let Row {
            measure,
            bar,
            ours,
            peer,
            verdict,
            ..
        } = self;
        match verdict {
            Verdict::Broken(why) => format!("{measure}: {}: {why}", verdict.word()),
            _ => format!(
                "{measure}: ours {ours}, peer {peer}, bar {bar}: {}",
                verdict.word()
            ),
        }
    }

    pub fn noted(mut self, note: impl Into<String>) -> Row {
        self.note = note.into();
        self
    }
}

/// The rows in columns, and below them the notes.
pub fn render(rows: &[Row]) -> String {
    let head = [
        "measure",
        "bar",
        "ours",
        "stock kubelet",
        "ratio",
        "verdict",
    ];
    let cells: Vec<[&str; 6]> = rows
        .iter()
        .map(|row| {
            [
                &row.measure[..],
                &row.bar,
                &row.ours,
                &row.peer,
                &row.ratio,
                row.verdict.word(),
            ]
        })
        .collect();
    let width = |column: usize| {
        let all = cells
            .iter()
            .chain([&head])
            .map(|row| row[column].chars().count());
        all.max().unwrap_or_default()
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut out = String::new();
    let rule: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
    let rule: Vec<&str> = rule.iter().map(String::as_str).collect();
    for row in [&head[..], &rule]
        .into_iter()
        .chain(cells.iter().map(|row| &row[..]))
    {
        let padded: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        let _ = writeln!(out, "| {} |", padded.join(" | "));
    }
    // An empty line ends a table in Markdown, so that the whole can be pasted into a document.
    out.push('\n');
    for row in rows {
        if let Verdict::Broken(why) = &row.verdict {
            let _ = writeln!(out, "- {}: not measured: {why}", row.measure);
        } else if !row.note.is_empty() {
            let _ = writeln!(out, "- {}: {}", row.measure, row.note);
        }
    }
    out
}

/// The value below which a part of the samples lies (nearest rank); `None` without samples.
pub fn quantile(samples: &[f64], part: f64) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (part * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}

pub fn p50(samples: &[f64]) -> Option<f64> {
    quantile(samples, 0.5)
}

pub fn milliseconds(span: Duration) -> f64 {
    span.as_secs_f64() * 1000.0
}

pub fn show_ms(value: f64) -> String {
    match value < 10_000.0 {
        true => format!("{value:.0} ms"),
        false => format!("{:.1} s", value / 1000.0),
    }
}

/// Decimal units throughout, as the promises have them.
pub fn show_bytes(value: f64) -> String {
    match value.abs() {
        v if v < 10_000.0 => format!("{value:.0} B"),
        v if v < 1e6 => format!("{:.1} KB", value / 1e3),
        _ => format!("{:.2} MB", value / 1e6),
    }
}

pub fn show_rate(value: f64) -> String {
    format!("{:.0} MB/s", value / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_good_by_itself_or_beside_the_peers() {
        for (ours, peer, want) in [
            (160e6, Some(900e6), Verdict::Pass),
            (80e6, Some(100e6), Verdict::Pass),
            (60e6, Some(100e6), Verdict::Fail),
            (149e6, None, Verdict::Fail),
        ] {
            let row = Row::new("m", "b").rated(Some(ours), peer, 150e6, 0.7);
            assert_eq!(row.verdict, want, "{ours} {peer:?}");
        }
    }

    #[test]
    fn quantiles_are_samples_by_nearest_rank() {
        let samples: Vec<f64> = (1..=30).rev().map(f64::from).collect();
        assert_eq!(p50(&samples), Some(15.0));
        assert_eq!(quantile(&samples, 0.99), Some(30.0));
        assert_eq!(quantile(&[7.0], 0.5), Some(7.0));
        assert_eq!(p50(&[]), None);
    }

    #[test]
    fn a_row_says_what_it_was_judged_by() {
        let row = Row::new("m", "<= 5 B").beside(Some(4.0), Some(8.0), show_bytes);
        let row = row.judged(Some(4.0), 5.0);
        let text = render(&[row, Row::new("n", "x").judged(Some(6.0), 5.0)]);
        assert!(
            text.contains("| m       | <= 5 B | 4 B  | 8 B           | 0.500 | pass    |"),
            "{text}"
        );
        assert!(text.contains("FAIL"), "{text}");
    }

    #[test]
    fn a_measure_that_broke_says_why_and_is_no_pass() {
        let row = Row::broken("m", "b", &anyhow::anyhow!("no link"));
        let text = render(&[row]);
        assert!(
            text.contains("BROKEN") && text.contains("m: not measured: no link"),
            "{text}"
        );
    }

    #[test]
    fn figures_are_readable_at_every_size() {
        for (value, want) in [
            (499.0, "499 B"),
            (12_345.0, "12.3 KB"),
            (12.5e6, "12.50 MB"),
        ] {
            assert_eq!(show_bytes(value), want);
        }
        assert_eq!(show_ms(275.4), "275 ms");
        assert_eq!(show_ms(55_800.0), "55.8 s");
    }
}
