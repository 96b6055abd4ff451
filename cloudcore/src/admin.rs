//! The admin endpoint: health, readiness, Prometheus metrics and one read-only look at all
//! sessions. Plain HTTP on an address of the operator's choice, loopback by default; nothing here
//! changes anything, and nothing shows an object's content.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;

use common::hub::transport::{Class, Counters};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::downstream::Downstream;
use crate::hub::registry::{Registry, SessionEntry};
use crate::upstream::Upstream;

/// Scrapers and probes; more at once wait.
const CONNECTIONS: usize = 32;

#[derive(Debug, thiserror::Error)]
#[error("cannot listen for admin requests on {address}: is another process using the port?")]
pub struct AdminError {
    address: SocketAddr,
    #[source]
    source: std::io::Error,
}

/// What is shown.
#[derive(Clone)]
pub struct Shown {
    pub registry: Registry,
    pub upstream: Upstream,
    pub downstream: Downstream,
    /// The watches are complete: sessions get what they need.
    pub ready: watch::Receiver<bool>,
}

/// See the module.
pub struct Admin {
    listener: TcpListener,
    shown: Shown,
}

impl Admin {
    pub async fn bind(address: SocketAddr, shown: Shown) -> Result<Self, AdminError> {
        let listener = TcpListener::bind(address)
            .await
            .map_err(|source| AdminError { address, source })?;
        Ok(Self { listener, shown })
    }

    /// Until shutdown.
    pub async fn run(self, shutdown: CancellationToken) {
        let places = std::sync::Arc::new(Semaphore::new(CONNECTIONS));
        let mut connections = JoinSet::new();
        loop {
            let (stream, place) = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                Some(_) = connections.join_next(), if !connections.is_empty() => continue,
                next = async {
                    let place = places.clone().acquire_owned().await.ok();
                    (self.listener.accept().await, place)
                } => next,
            };
            let Ok((stream, _)) = stream else { continue };
            let shown = self.shown.clone();
            connections.spawn(async move {
                let service = service_fn(move |request| answer(shown.clone(), request));
                let served = hyper::server::conn::http1::Builder::new()
                    .timer(hyper_util::rt::TokioTimer::new())
                    .header_read_timeout(std::time::Duration::from_secs(10))
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
                if let Err(error) = served {
                    debug!(%error, "an admin connection ended early");
                }
                drop(place);
            });
        }
    }
}

type Answer = Result<Response<Full<Bytes>>, std::convert::Infallible>;

async fn answer(shown: Shown, request: Request<Incoming>) -> Answer {
    let (status, kind, body) = if request.method() != Method::GET {
        (
            StatusCode::METHOD_NOT_ALLOWED,
            TEXT,
            "only GET\n".to_owned(),
        )
    } else {
        match request.uri().path() {
            "/healthz" => (StatusCode::OK, TEXT, "ok\n".to_owned()),
            "/readyz" if *shown.ready.borrow() => (StatusCode::OK, TEXT, "ok\n".to_owned()),
            "/readyz" => (
                StatusCode::SERVICE_UNAVAILABLE,
                TEXT,
                "the watches are not complete yet\n".to_owned(),
            ),
            "/metrics" => (StatusCode::OK, METRICS, metrics(&shown)),
            "/sessions" => (StatusCode::OK, JSON, sessions(&shown).to_string()),
            _ => (
                StatusCode::NOT_FOUND,
                TEXT,
                "there are /healthz, /readyz, /metrics and /sessions\n".to_owned(),
            ),
        }
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(http::header::CONTENT_TYPE, kind);
    Ok(response)
}

const TEXT: http::HeaderValue = http::HeaderValue::from_static("text/plain; charset=utf-8");
const JSON: http::HeaderValue = http::HeaderValue::from_static("application/json");
const METRICS: http::HeaderValue =
    http::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");

fn sessions(shown: &Shown) -> serde_json::Value {
    let mut all = shown.registry.all();
    all.sort_by(|a, b| a.node.cmp(&b.node));
    all.iter().map(|s| session(s)).collect()
}

fn session(entry: &SessionEntry) -> serde_json::Value {
    let counters = entry.connection.counters();
    let total = |volumes: &[common::hub::transport::Volume]| {
        json!({
            "bytes": volumes.iter().map(|v| v.bytes).sum::<u64>(),
            "frames": volumes.iter().map(|v| v.frames).sum::<u64>(),
        })
    };
    json!({
        "node": entry.node.as_str(),
        "remote": entry.remote.to_string(),
        "transport": entry.transport.to_string(),
        "agentVersion": *entry.agent_version.lock().unwrap_or_else(std::sync::PoisonError::into_inner),
        "epoch": entry.epoch.load(Ordering::Relaxed),
        "sinceMs": entry.since_ms,
        "inSyncMs": entry.in_sync.load(Ordering::Relaxed),
        "resumeBytes": entry.resume_bytes.load(Ordering::Relaxed),
        "queuedBytes": entry.queued_bytes.load(Ordering::Relaxed),
        "sent": total(&counters.sent),
        "received": total(&counters.received),
    })
}

fn metrics(shown: &Shown) -> String {
    let all = shown.registry.all();
    let mut out = String::new();
    head(
        &mut out,
        "cloudcore_sessions",
        "gauge",
        "Edges with a session, by transport.",
    );
    for kind in ["quic", "websocket"] {
        let count = all
            .iter()
            .filter(|s| s.transport.to_string() == kind)
            .count();
        let _ = writeln!(out, "cloudcore_sessions{{transport=\"{kind}\"}} {count}");
    }
    volumes(&mut out, shown, &all);
    head(
        &mut out,
        "cloudcore_resume_bytes",
        "summary",
        "Frame bytes of both directions from a Hello until the edge held all it should.",
    );
    let (count, sum) = shown.registry.resumes();
    let _ = writeln!(
        out,
        "cloudcore_resume_bytes_count {count}\ncloudcore_resume_bytes_sum {sum}"
    );
    head(
        &mut out,
        "cloudcore_queued_bytes",
        "gauge",
        "Bytes that wait to be written to edges.",
    );
    let queued: usize = all
        .iter()
        .map(|s| s.queued_bytes.load(Ordering::Relaxed))
        .sum();
    let _ = writeln!(out, "cloudcore_queued_bytes {queued}");
    for (name, help, value) in shown.gauges() {
        head(&mut out, name, "gauge", help);
        let _ = writeln!(out, "{name} {value}");
    }
    out
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// Bytes and frames by direction and class: of the sessions that ended, and of those that live.
fn volumes(out: &mut String, shown: &Shown, all: &[std::sync::Arc<SessionEntry>]) {
    let mut sum = shown.registry.ended();
    for entry in all {
        add(&mut sum, &entry.connection.counters());
    }
    for (name, help, frames) in [
        (
            "cloudcore_hub_bytes_total",
            "Bytes of streams, by direction and class.",
            false,
        ),
        (
            "cloudcore_hub_frames_total",
            "Writes and reads of streams, by direction and class.",
            true,
        ),
    ] {
        head(out, name, "counter", help);
        for (direction, volumes) in [("sent", &sum.sent), ("received", &sum.received)] {
            for class in [
                Class::Control,
                Class::Status,
                Class::Interactive,
                Class::Bulk,
            ] {
                let volume = volumes[class.index()];
                let value = if frames { volume.frames } else { volume.bytes };
                let class = format!("{class:?}").to_lowercase();
                let _ = writeln!(
                    out,
                    "{name}{{direction=\"{direction}\",class=\"{class}\"}} {value}"
                );
            }
        }
    }
}

/// Adds one connection's volumes to a sum.
pub fn add(sum: &mut Counters, more: &Counters) {
    let pairs = sum.sent.iter_mut().zip(&more.sent);
    for (into, from) in pairs.chain(sum.received.iter_mut().zip(&more.received)) {
        into.bytes += from.bytes;
        into.frames += from.frames;
    }
}

impl Shown {
    fn gauges(&self) -> Vec<(&'static str, &'static str, u64)> {
        let up = self.upstream.metrics();
        let down = self.downstream.metrics();
        vec![
            (
                "cloudcore_upstream_waiting",
                "Objects whose status waits to be written.",
                up.waiting,
            ),
            (
                "cloudcore_upstream_in_flight",
                "Writes to the API server under way.",
                up.in_flight,
            ),
            (
                "cloudcore_upstream_patches",
                "Statuses written since the start.",
                up.patches,
            ),
            (
                "cloudcore_upstream_deletes",
                "Pods deleted since the start.",
                up.deletes,
            ),
            (
                "cloudcore_upstream_retries",
                "Writes tried again since the start.",
                up.retries,
            ),
            (
                "cloudcore_tokens_given",
                "ServiceAccount tokens given since the start.",
                up.tokens_given,
            ),
            (
                "cloudcore_pods",
                "Pods of edge nodes that are held.",
                down.pods.get(),
            ),
            (
                "cloudcore_watched_references",
                "ConfigMaps and Secrets that are watched.",
                down.references.get(),
            ),
        ]
    }
}
