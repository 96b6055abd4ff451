//! Connections to the API server: HTTP/2 where it is spoken, at most so many streams on each.
//!
//! A Go server allows 100 (some 250) streams on a connection and closes or stalls what goes past.
//! A slot is one HTTP/2 connection that remakes itself; a stream holds its permit until the body of
//! its answer is dropped, so that a watch counts for as long as it lasts.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper_rustls::{FixedServerNameResolver, HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use kube::client::Body;
use rustls::pki_types::ServerName;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{Access, KubeError};

/// Below the 100 streams that a Go server allows by default on one connection, with room for those
/// that the server has not yet counted as closed.
const STREAMS_EACH: usize = 90;

/// Which of the two sets of connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lane {
    Work,
    Watch,
}

impl Lane {
    /// Work: 360 requests at once are more than an API server's fairness gives one client. Watches:
    /// 11,520, a ConfigMap and a Secret for each of five thousand nodes.
    fn connections(self) -> usize {
        match self {
            Lane::Work => 4,
            Lane::Watch => 128,
        }
    }
}

type HttpClient = legacy::Client<HttpsConnector<HttpConnector>, Body>;

struct Slot {
    client: HttpClient,
    streams: Arc<Semaphore>,
}

pub(crate) struct Pool {
    connector: HttpsConnector<HttpConnector>,
    slots: Mutex<Vec<Slot>>,
    /// One permit for each stream that the pool may have: whoever holds one finds a slot.
    room: Arc<Semaphore>,
}

impl Pool {
    pub(crate) fn build(access: &Access, lane: Lane) -> Result<Self, KubeError> {
        let mut http = HttpConnector::new();
        http.enforce_http(false);
        http.set_nodelay(true);
        http.set_connect_timeout(Some(Duration::from_secs(10)));
        let mut builder = HttpsConnectorBuilder::new()
            .with_tls_config(access.anonymous_tls()?)
            .https_or_http();
        if let Some(name) = access.tls_server_name() {
            let name =
                ServerName::try_from(name.to_string()).map_err(|e| KubeError::Kubeconfig {
                    path: "tls-server-name".into(),
                    source: Box::new(e),
                })?;
            builder = builder.with_server_name_resolver(FixedServerNameResolver::new(name));
        }
        Ok(Self {
            connector: builder.enable_all_versions().wrap_connector(http),
            slots: Mutex::new(Vec::new()),
            room: Arc::new(Semaphore::new(lane.connections() * STREAMS_EACH)),
        })
    }

    /// A connection with room for one more stream, waiting while all are full.
    pub(crate) async fn stream(&self) -> Stream {
        let room = self.room.clone().acquire_owned().await;
        let room = room.expect("the pool's semaphore is never closed");
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let free = slots.iter().find_map(|slot| {
            let permit = slot.streams.clone().try_acquire_owned().ok()?;
            Some((slot.client.clone(), permit))
        });
        let (client, permit) = free.unwrap_or_else(|| {
            let slot = Slot {
                client: self.connection(),
                streams: Arc::new(Semaphore::new(STREAMS_EACH)),
            };
            let permit = slot.streams.clone().try_acquire_owned();
            let permit = permit.expect("a new slot has room");
            let client = slot.client.clone();
            slots.push(slot);
            (client, permit)
        });
        Stream {
            client,
            permits: (permit, room),
        }
    }

    fn connection(&self) -> HttpClient {
        legacy::Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(90))
            // A server that vanished without a word is noticed within 25 s, also under a watch.
            .http2_keep_alive_interval(Duration::from_secs(15))
            .http2_keep_alive_timeout(Duration::from_secs(10))
            .http2_adaptive_window(true)
            .build(self.connector.clone())
    }
}

/// The right to one stream on one connection.
pub(crate) struct Stream {
    pub(crate) client: HttpClient,
    permits: (OwnedSemaphorePermit, OwnedSemaphorePermit),
}

impl Stream {
    /// The answer's body keeps the stream's place until it is dropped.
    pub(crate) fn hold(self, body: Incoming) -> HeldBody {
        HeldBody {
            body,
            _permits: self.permits,
        }
    }
}

/// A body that counts as an open stream.
pub(crate) struct HeldBody {
    body: Incoming,
    _permits: (OwnedSemaphorePermit, OwnedSemaphorePermit),
}

impl HttpBody for HeldBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(connections: usize) -> Pool {
        let tls = rustls::ClientConfig::builder_with_provider(Arc::new(
            rustls::crypto::ring::default_provider(),
        ))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
        Pool {
            connector: HttpsConnectorBuilder::new()
                .with_tls_config(tls)
                .https_or_http()
                .enable_all_versions()
                .build(),
            slots: Mutex::new(Vec::new()),
            room: Arc::new(Semaphore::new(connections * STREAMS_EACH)),
        }
    }

    #[tokio::test]
    async fn a_connection_carries_ninety_streams_and_the_next_goes_on_another() {
        let pool = pool(2);
        let mut held = Vec::new();
        for _ in 0..STREAMS_EACH {
            held.push(pool.stream().await);
        }
        assert_eq!(pool.slots.lock().unwrap().len(), 1);
        held.push(pool.stream().await);
        assert_eq!(pool.slots.lock().unwrap().len(), 2);
    }

    #[tokio::test]
    async fn a_full_pool_waits_for_a_stream_to_end() {
        let pool = pool(1);
        let mut held = Vec::new();
        for _ in 0..STREAMS_EACH {
            held.push(pool.stream().await);
        }
        let mut next = Box::pin(pool.stream());
        assert!(futures::poll!(&mut next).is_pending());
        held.pop();
        assert!(futures::poll!(&mut next).is_ready());
    }
}
