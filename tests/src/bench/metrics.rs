//! What cloudcore counts of itself, read from its admin endpoint.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// One GET over plain HTTP.
pub fn fetch(admin: SocketAddr, path: &str) -> Result<String> {
    let limit = Duration::from_secs(5);
    let mut stream = TcpStream::connect_timeout(&admin, limit)?;
    stream.set_read_timeout(Some(limit))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {admin}\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").context("not HTTP")?;
    ensure!(
        head.contains(" 200 "),
        "{path}: {}",
        head.lines().next().unwrap_or_default()
    );
    Ok(body.to_owned())
}

/// The sum of a metric's samples (Prometheus text format 0.0.4) whose labels are all of these.
/// `None` when there is none, which is not the same as zero.
pub fn sum(text: &str, metric: &str, labels: &[&str]) -> Option<f64> {
    let mut samples = text.lines().filter_map(|line| {
        let rest = line.strip_prefix(metric)?;
        let (labelled, value) = match rest.strip_prefix('{') {
            Some(rest) => rest.split_once('}')?,
            None => ("", rest.strip_prefix(' ')?),
        };
        let has = |label: &&str| labelled.split(',').any(|found| found.trim() == *label);
        let value = value.split_whitespace().next()?.parse::<f64>().ok()?;
        labels.iter().all(|label| has(&label)).then_some(value)
    });
    let first = samples.next()?;
    Some(first + samples.sum::<f64>())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# HELP b bytes\n# TYPE b counter\n\
        b{direction=\"sent\",class=\"control\"} 7\nb{direction=\"received\",class=\"bulk\"} 5\n\
        bb 9\nsessions 2\n";

    #[test]
    fn samples_are_summed_by_name_and_labels() {
        assert_eq!(sum(TEXT, "b", &[]), Some(12.0));
        assert_eq!(sum(TEXT, "b", &["direction=\"sent\""]), Some(7.0));
        assert_eq!(sum(TEXT, "sessions", &[]), Some(2.0));
        assert_eq!(sum(TEXT, "b", &["direction=\"none\""]), None);
        assert_eq!(sum(TEXT, "c", &[]), None);
    }
}
