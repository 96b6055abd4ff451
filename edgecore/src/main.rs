//! The `edgecore` program.

use std::process::ExitCode;

use clap::Parser;
use edgecore::cli::{Cli, Command};
use edgecore::config::Config;
use edgecore::ctl::{self, CtlError};
use edgecore::{admin, app};

fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.command {
        Some(Command::Status { admin: socket }) => {
            report(admin::print_status(&socket).map(|()| ExitCode::SUCCESS))
        }
        Some(Command::Ctl(args)) => report(ctl::start(args)),
        Some(Command::Run(args)) => run(args),
        None => run(cli.run),
    }
}

fn run(args: edgecore::cli::RunArgs) -> ExitCode {
    let config = match Config::resolve(args) {
        Ok(config) => config,
        Err(error) => return fail(&error, 3),
    };
    match common::telemetry::filter(&config.log) {
        Ok(filter) => common::telemetry::start(filter, config.log_json),
        Err(error) => return fail(&error, 3),
    }
    match app::start(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error, error.exit_code()),
    }
}

fn report(result: Result<ExitCode, CtlError>) -> ExitCode {
    match result {
        Ok(code) => code,
        Err(error) => fail(&error, 1),
    }
}

#[expect(
    clippy::print_stderr,
    reason = "the last words of a command line program"
)]
fn fail(error: &dyn std::error::Error, code: u8) -> ExitCode {
    eprintln!("edgecore: {}", common::telemetry::chain(error));
    ExitCode::from(code)
}
