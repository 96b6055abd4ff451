//! `edgecore ctl`: the device's Pods for somebody who is at the device, with the cloud or without.
//!
//! Asks a running edgecore over its admin socket, in the kubelet's own API; knows nothing that a
//! `curl --unix-socket` could not find out. Everything waits on one thread and ends with the
//! process.

pub mod client;
pub mod exec;
pub mod get;
pub mod logs;
pub mod pods;
pub mod terminal;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use crate::cli::{CtlArgs, CtlCommand};
use client::Client;

/// Why a command at the device failed.
#[derive(Debug, thiserror::Error)]
pub enum CtlError {
    #[error("no edgecore answers at {0}: is it running? (only root may ask it)")]
    Connect(PathBuf, #[source] io::Error),
    #[error("cannot start the runtime of tasks")]
    Tokio(#[source] io::Error),
    #[error("edgecore broke off")]
    Http(#[from] hyper::Error),
    #[error("edgecore gave no answer in time")]
    Deadline,
    /// What edgecore said.
    #[error("{0}")]
    Refused(String),
    #[error("edgecore's answer is not the document that it should be")]
    Document(#[source] serde_json::Error),
    #[error("edgecore's answer is longer than {0} bytes")]
    TooLong(usize),
    #[error("pod {name:?} not found in namespace {namespace:?} on this node")]
    NoPod { namespace: String, name: String },
    #[error("container {container:?} not found in pod {pod:?}; it has: {there}")]
    NoContainer {
        container: String,
        pod: String,
        there: String,
    },
    #[error("cannot write the output")]
    Output(#[source] io::Error),
    #[error("cannot use the terminal")]
    Terminal(#[source] io::Error),
    #[error("the connection into the container broke")]
    WebSocket(#[source] Box<tokio_tungstenite::tungstenite::Error>),
    #[error("{0}")]
    Exec(String),
}

impl From<tokio_tungstenite::tungstenite::Error> for CtlError {
    fn from(error: tokio_tungstenite::tungstenite::Error) -> Self {
        CtlError::WebSocket(Box::new(error))
    }
}

/// Runs one command to its end.
pub fn start(args: CtlArgs) -> Result<ExitCode, CtlError> {
    let client = Client::new(&args.admin);
    run(async {
        match args.command {
            CtlCommand::Get(args) => get::run(&client, &args).await,
            CtlCommand::Logs(args) => logs::run(&client, &args).await,
            CtlCommand::Exec(args) => exec::run(&client, &args).await,
        }
    })
}

/// Waits for a command on this thread. A read of the standard input that nobody waits for any more
/// is left to the process's end.
pub(crate) fn run<T>(work: impl Future<Output = Result<T, CtlError>>) -> Result<T, CtlError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(CtlError::Tokio)?;
    let result = runtime.block_on(work);
    runtime.shutdown_background();
    result
}
