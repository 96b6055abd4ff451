//! Logs: one line an event on standard error, human by default, JSON on request.

use tracing_subscriber::EnvFilter;

/// `filter` as of `RUST_LOG`; the environment variable wins.
pub fn start(filter: &str, json: bool) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(filter));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    // A second start in one process (tests) keeps the first.
    let _ = if json {
        log.json().flatten_event(true).try_init()
    } else {
        log.with_ansi(false).try_init()
    };
}

/// An error and what caused it, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        // Some libraries repeat their source's words in their own.
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        next = cause.source();
    }
    text
}
