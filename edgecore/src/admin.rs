//! The local socket: the node's API, and what this edgecore is doing as one JSON document at
//! `/status`. For `edgecore status`, `edgecore ctl` and a human with `curl --unix-socket`. Only root
//! can open it.

use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::ids::Kind;
use http::{Method, Request};
use hyper::body::Incoming;
use serde_json::json;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::ctl::client::Client;
use crate::ctl::{self, CtlError};
use crate::pods::manager::RuntimeState;
use crate::store::desired::Desired;
use crate::store::reports::Reports;
use crate::stream::{self, Answer, NodeApi, serve};

/// The document of `edgecore status`.
const STATUS: &str = "/status";
/// People at the device and their scripts; more at once wait.
const CONNECTIONS: usize = 32;

/// What it shows.
pub struct Shown {
    pub node: String,
    pub desired: Desired,
    pub reports: Reports,
    pub connected: watch::Receiver<bool>,
    pub runtime: watch::Receiver<RuntimeState>,
}

impl Shown {
    fn document(&self) -> serde_json::Value {
        let pod = |p: crate::store::desired::DesiredPod| {
            let phase = self.reports.pod(&p.key).and_then(|r| {
                r.status
                    .get("phase")
                    .and_then(|v| v.as_str())
                    .map(str::to_owned)
            });
            json!({
                "namespace": &*p.key.namespace,
                "name": &*p.key.name,
                "uid": &*p.key.uid,
                "phase": phase,
                "ending": p.removed,
            })
        };
        let runtime = self.runtime.borrow();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "node": self.node,
            "connected": *self.connected.borrow(),
            "runtime": {
                "ready": runtime.ready,
                "networkReady": runtime.network_ready,
                "message": runtime.message,
                "name": runtime.name,
                "version": runtime.version,
            },
            "objects": self.desired.digest().count,
            "reportsWaiting": self.reports.pending().len(),
            "pods": self.desired.pods().into_iter()
                .filter(|p| p.key.kind == Kind::Pod).map(pod).collect::<Vec<_>>(),
        })
    }
}

/// Serves the socket until shutdown. Its failure is told and costs nothing else.
pub async fn run(path: PathBuf, shown: Shown, api: NodeApi, shutdown: CancellationToken) {
    let listener = match bind(&path) {
        Ok(listener) => listener,
        Err(error) => {
            warn!(
                socket = %path.display(), %error,
                "no admin socket: `edgecore status` and `edgecore ctl` will not work"
            );
            return;
        }
    };
    let shown = Arc::new(shown);
    let mut connections = JoinSet::new();
    loop {
        let full = connections.len() >= CONNECTIONS;
        tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            accepted = listener.accept(), if !full => match accepted {
                Ok((stream, _)) => {
                    let (shown, api) = (shown.clone(), api.clone());
                    connections.spawn(serve::serve(stream, move |request| {
                        answer(shown.clone(), api.clone(), request)
                    }));
                }
                Err(error) => {
                    // No descriptor is free, most likely: asking at once again would only spin.
                    warn!(%error, "the admin socket takes nobody for a moment");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            },
        }
    }
    // The next start removes it as well.
    let _ = std::fs::remove_file(&path);
}

async fn answer(shown: Arc<Shown>, api: NodeApi, request: Request<Incoming>) -> Answer {
    if request.uri().path() == STATUS && request.method() == Method::GET {
        return stream::document(stream::JSON, shown.document().to_string()).into();
    }
    api.answer(request).await
}

/// Takes the place of a socket that nobody listens on any more, and of nothing else.
fn bind(path: &Path) -> io::Result<UnixListener> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(io::Error::other("there is a file that is not a socket"));
        }
        Ok(_) if UnixStream::connect(path).is_ok() => {
            return Err(io::Error::other("another process listens there"));
        }
        Ok(_) => std::fs::remove_file(path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// `edgecore status`: the document, indented.
pub fn print_status(socket: &Path) -> Result<(), CtlError> {
    let document: serde_json::Value = ctl::run(async {
        let text = Client::new(socket).document(STATUS).await?;
        serde_json::from_slice(&text).map_err(CtlError::Document)
    })?;
    let pretty = serde_json::to_string_pretty(&document).map_err(CtlError::Document)?;
    let mut out = io::stdout();
    let written = out.write_all(pretty.as_bytes());
    written
        .and_then(|()| out.write_all(b"\n"))
        .map_err(CtlError::Output)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_a_socket_that_nobody_uses_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        let first = bind(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let refused = bind(&path).unwrap_err().to_string();
        assert!(refused.contains("another process"), "{refused}");
        drop(first);
        bind(&path).unwrap();
        let file = dir.path().join("passwd");
        std::fs::write(&file, "root").unwrap();
        assert!(bind(&file).is_err());
        assert_eq!(std::fs::read(&file).unwrap(), b"root");
    }
}
