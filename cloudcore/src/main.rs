//! CloudCore: runs beside the Kubernetes API and serves the edge nodes. `app` wires everything.

use std::process::ExitCode;

fn main() -> ExitCode {
    cloudcore::cli::main()
}
