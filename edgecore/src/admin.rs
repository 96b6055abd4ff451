//! The local socket: what this edgecore is doing, as one JSON document, for `edgecore status` and
//! for a human with `socat`. Only root can open it.

use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::ids::Kind;
use serde_json::json;
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::pods::manager::RuntimeState;
use crate::store::desired::Desired;
use crate::store::reports::Reports;

/// A status document is some KiB.
const MAX_STATUS: u64 = 4 << 20;

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
pub async fn run(path: PathBuf, shown: Shown, shutdown: CancellationToken) {
    let listener = match bind(&path) {
        Ok(listener) => listener,
        Err(error) => {
            warn!(socket = %path.display(), %error, "no admin socket: `edgecore status` will not work");
            return;
        }
    };
    loop {
        let stream = tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match stream {
            Ok((mut stream, _)) => {
                let text = shown.document().to_string();
                // A reader that went away, or does not read, costs a second.
                let written = stream.write_all(text.as_bytes());
                let _ = tokio::time::timeout(Duration::from_secs(1), written).await;
            }
            Err(error) => {
                // No descriptor is free, most likely: asking at once again would only spin.
                warn!(%error, "the admin socket takes nobody for a moment");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
    // The next start removes it as well.
    let _ = std::fs::remove_file(&path);
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
pub fn print_status(socket: &Path) -> io::Result<()> {
    let explain = |e: io::Error| {
        let text = format!(
            "no edgecore answers at {}: {e}; is it running?",
            socket.display()
        );
        io::Error::new(e.kind(), text)
    };
    let stream = UnixStream::connect(socket).map_err(explain)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut text = String::new();
    stream.take(MAX_STATUS).read_to_string(&mut text)?;
    let document: serde_json::Value = serde_json::from_str(&text).map_err(io::Error::other)?;
    let pretty = serde_json::to_string_pretty(&document).map_err(io::Error::other)?;
    io::stdout().write_all(pretty.as_bytes())?;
    io::stdout().write_all(b"\n")
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
