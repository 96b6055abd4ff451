//! `edgecore ctl logs`.

use std::io::Write as _;
use std::process::ExitCode;

use super::CtlError;
use super::client::Client;
use super::pods::Place;
use crate::cli::LogsArgs;

/// Prints a log until its end, or until interrupted where it is followed.
pub(super) async fn run(client: &Client, args: &LogsArgs) -> Result<ExitCode, CtlError> {
    let (namespace, container) = (&args.namespace.namespace, args.container.as_deref());
    let place = Place::find(client, namespace, &args.pod, container).await?;
    let path = format!("{}?{}", place.path("containerLogs"), query(args));
    let mut out = std::io::stdout();
    client
        .read(&path, |piece| {
            let written = out.write_all(&piece).and_then(|()| out.flush());
            written.map_err(CtlError::Output)
        })
        .await?;
    Ok(ExitCode::SUCCESS)
}

fn query(args: &LogsArgs) -> String {
    let mut query = Vec::new();
    for (name, wanted) in [
        ("follow", args.follow),
        ("previous", args.previous),
        ("timestamps", args.timestamps),
    ] {
        query.extend(wanted.then(|| format!("{name}=true")));
    }
    query.extend(args.tail.map(|n| format!("tailLines={n}")));
    query.extend(args.since.map(|n| format!("sinceSeconds={n}")));
    query.join("&")
}

/// The seconds of a duration as kubectl writes it: `90s`, `10m`, `1h30m`.
pub fn seconds(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no duration such as 90s, 10m or 1h30m");
    let mut total: u64 = 0;
    let mut number = String::new();
    for c in text.chars() {
        let unit = match c {
            '0'..='9' => {
                number.push(c);
                continue;
            }
            's' => 1,
            'm' => 60,
            'h' => 3600,
            'd' => 86400,
            _ => return Err(wrong()),
        };
        let count: u64 = number.parse().map_err(|_| wrong())?;
        number.clear();
        let more = count.checked_mul(unit).and_then(|n| n.checked_add(total));
        total = more.ok_or_else(wrong)?;
    }
    if number.is_empty() && total > 0 {
        Ok(total)
    } else {
        Err(wrong())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_kubectls() {
        for (text, want) in [("90s", 90), ("10m", 600), ("1h30m", 5400), ("2d", 172_800)] {
            assert_eq!(seconds(text), Ok(want));
        }
        for text in ["", "10", "m", "-1s", "1.5h", "0s", "99999999999999999999h"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }
}
