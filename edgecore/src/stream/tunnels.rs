//! The tunnels of the cloud: streams that it opens on the hub's connection, each with one request
//! to the node's API.
//!
//! Owns every tunnel's task. A tunnel ends with its stream, and so with its connection; it then has
//! the time it takes to leave nothing behind, while the next connection is dialled. Never more than
//! `MOST` at once, those that are ending included.

use common::hub::proto::{StreamKind, Tunnel};
use common::hub::transport::{Connection, Duplex, Incoming};
use tokio::task::JoinSet;
use tracing::{Instrument as _, debug, info_span, warn};

use super::{NodeApi, serve};

/// What the connection lets the cloud open; see `LinkConfig::cloud_streams`.
const MOST: usize = 72;
/// The code of a stream of a kind that this version does not take.
const CODE_UNKNOWN_KIND: u32 = 3;
/// The code of a tunnel beyond [`MOST`].
const CODE_TOO_MANY: u32 = 4;

/// See the module.
pub struct Tunnels {
    api: NodeApi,
    tasks: JoinSet<()>,
}

impl Tunnels {
    pub fn build(api: NodeApi) -> Self {
        let tasks = JoinSet::new();
        Self { api, tasks }
    }

    /// Takes the streams of one connection until that ends. Cancel-safe.
    pub async fn serve(&mut self, connection: &Connection) {
        loop {
            tokio::select! {
                biased;
                Some(ended) = self.tasks.join_next(), if !self.tasks.is_empty() => {
                    if let Err(panic) = ended {
                        warn!(%panic, "a tunnel panicked");
                    }
                }
                accepted = connection.accept() => match accepted {
                    Ok(incoming) => self.open(incoming),
                    // The session says why.
                    Err(_) => return,
                },
            }
        }
    }

    fn open(&mut self, mut incoming: Incoming) {
        let code = match incoming.head.kind() {
            StreamKind::StreamTunnel if self.tasks.len() < MOST => {
                let tunnel = incoming.head.tunnel.take().unwrap_or_default();
                self.tasks
                    .spawn(serve_tunnel(incoming, tunnel, self.api.clone()));
                return;
            }
            StreamKind::StreamTunnel => CODE_TOO_MANY,
            StreamKind::StreamUnspecified
            | StreamKind::StreamControl
            | StreamKind::StreamStatus
            | StreamKind::StreamBulk => CODE_UNKNOWN_KIND,
        };
        warn!(
            kind = incoming.head.kind,
            code, "a stream of the cloud's is not taken"
        );
        incoming.send.reset(code);
        incoming.recv.stop(code);
    }
}

/// Serves one tunnel to its end.
fn serve_tunnel(incoming: Incoming, tunnel: Tunnel, api: NodeApi) -> impl Future<Output = ()> {
    let span = info_span!("tunnel", id = tunnel.id, principal = tunnel.principal);
    let io = Duplex::new(incoming.send, incoming.recv);
    async move {
        debug!("opened");
        serve::serve(io, |request| {
            let api = api.clone();
            async move { api.answer(request).await }
        })
        .await;
        debug!("closed");
    }
    .instrument(span)
}
