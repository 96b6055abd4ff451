//! Logs: one line an event on standard error, human by default, JSON on request.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// A log filter that cannot be.
#[derive(Debug, thiserror::Error)]
#[error(
    "{0:?} is no log filter: a level (error, warn, info, debug, trace, off) or TARGET=LEVEL, with commas between"
)]
pub struct BadFilter(String);

/// Levels, and levels of targets.
pub fn filter(text: &str) -> Result<EnvFilter, BadFilter> {
    // A mistyped level alone would be taken for a target, and everything else would be silent.
    let is_level = |part: &str| !part.is_empty() && part.parse::<LevelFilter>().is_ok();
    let mut parts = text.split(',').map(str::trim);
    let all = parts.all(|part| part.contains(['=', ':', '[']) || is_level(part));
    let filter = EnvFilter::try_new(text).ok().filter(|_| all);
    filter.ok_or_else(|| BadFilter(text.to_owned()))
}

/// From now on what is logged is seen.
pub fn start(filter: EnvFilter, json: bool) {
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    // A second start in one process (tests) keeps the first.
    let started = if json {
        log.json().flatten_event(true).try_init()
    } else {
        log.with_ansi(false).try_init()
    };
    if started.is_ok() {
        // Wherever it happens, in a task or on a thread: it is in the log where everything else is
        // looked for.
        std::panic::set_hook(Box::new(|panic| {
            let thread = std::thread::current();
            tracing::error!(thread = thread.name(), "{panic}");
            if !has_tasks() {
                std::process::abort();
            }
        }));
    }
}

/// Whether this thread runs tasks or their blocking work: then the task's owner sees its panic. A
/// thread that does not (a store's, its engine's) has nobody, and who waits for it waits for ever.
fn has_tasks() -> bool {
    tokio::runtime::Handle::try_current().is_ok()
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

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::{Command, ExitStatus};

    const SIGABRT: i32 = 6;
    const PLACE: &str = "TELEMETRY_TEST_PANICS_IN";

    #[test]
    fn a_mistyped_level_is_refused() {
        for good in ["info", "warn,edgecore=debug", "common::hub=trace", "OFF"] {
            assert!(super::filter(good).is_ok(), "{good}");
        }
        for bad in ["inof", "info,dbug", "edgecore=loud", ""] {
            let error = super::filter(bad).unwrap_err().to_string();
            assert!(error.contains("TARGET=LEVEL"), "{bad}: {error}");
        }
    }

    fn panic_in(place: &str) {
        super::start(super::filter("error").unwrap(), false);
        let fault = || panic!("for a test");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let ended = match place {
            "task" => runtime.block_on(async { tokio::spawn(async move { fault() }).await }),
            "blocking" => runtime.block_on(async { tokio::task::spawn_blocking(fault).await }),
            _ => return drop(std::thread::spawn(fault).join()),
        };
        assert!(ended.unwrap_err().is_panic());
    }

    fn in_a_process_of_its_own(place: &str) -> ExitStatus {
        let name = "telemetry::tests::a_panic_ends_the_process_only_where_no_task_has_it";
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", name]).env(PLACE, place);
        command.output().unwrap().status
    }

    #[test]
    fn a_panic_ends_the_process_only_where_no_task_has_it() {
        if let Ok(place) = std::env::var(PLACE) {
            return panic_in(&place);
        }
        assert!(in_a_process_of_its_own("task").success());
        assert!(in_a_process_of_its_own("blocking").success());
        let thread = in_a_process_of_its_own("thread");
        assert_eq!(thread.signal(), Some(SIGABRT), "{thread}");
    }
}
