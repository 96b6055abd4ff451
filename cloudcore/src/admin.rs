//! The admin endpoint: health, readiness, Prometheus metrics and one read-only look at all
//! sessions. Plain HTTP on an address of the operator's choice, loopback by default; nothing here
//! changes anything, and nothing shows an object's content.

use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;

use common::hub::transport::{Class, Counters, TransportKind};
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
use crate::stream;
use crate::upstream::{self, Upstream};

/// Scrapers and probes; more at once wait.
const CONNECTIONS: usize = 32;

/// Of a connection, from its first byte to its last: a scrape takes a moment.
const LIFE: std::time::Duration = std::time::Duration::from_secs(10);

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
    pub tunnels: stream::Metrics,
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
            let Ok((stream, _)) = stream else {
                // Out of file descriptors, most likely: without a pause this would spin.
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            };
            let shown = self.shown.clone();
            connections.spawn(async move {
                let service = service_fn(move |request| answer(shown.clone(), request));
                // One question each, and an end to it whatever the other side does: nobody who asks
                // and does not read keeps a probe of the kubelet out.
                let served = hyper::server::conn::http1::Builder::new()
                    .keep_alive(false)
                    .serve_connection(TokioIo::new(stream), service);
                match tokio::time::timeout(LIFE, served).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => debug!(%error, "an admin connection ended early"),
                    Err(_) => debug!("an admin connection took too long"),
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
            "/metrics" => (StatusCode::OK, METRICS, shown.metrics().to_string()),
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

/// What `/metrics` says, as plain values: so that its text is made and tested without sessions.
struct Exposed {
    quic: usize,
    websocket: usize,
    carried: Counters,
    resumes: (u64, u64),
    queued: usize,
    up: upstream::Metrics,
    pods: u64,
    references: u64,
    lists: u64,
    faults: u64,
    malformed: u64,
    tunnels: stream::Numbers,
}

impl Shown {
    fn metrics(&self) -> Exposed {
        let all = self.registry.all();
        let of = |kind| all.iter().filter(|s| s.transport == kind).count();
        let queued = all.iter().map(|s| s.queued_bytes.load(Ordering::Relaxed));
        let down = self.downstream.metrics();
        Exposed {
            quic: of(TransportKind::Quic),
            websocket: of(TransportKind::WebSocket),
            carried: self.registry.carried(),
            resumes: self.registry.resumes(),
            queued: queued.sum(),
            up: self.upstream.metrics(),
            pods: down.pods.get(),
            references: down.references.get(),
            lists: down.lists.get(),
            faults: down.faults.get(),
            malformed: down.malformed.get(),
            tunnels: self.tunnels.numbers(),
        }
    }
}

impl fmt::Display for Exposed {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        head(
            out,
            "cloudcore_sessions",
            "gauge",
            "Edges with a session, by transport.",
        )?;
        for (kind, count) in [("quic", self.quic), ("websocket", self.websocket)] {
            writeln!(out, "cloudcore_sessions{{transport=\"{kind}\"}} {count}")?;
        }
        self.volumes(out)?;
        self.tunnels(out)?;
        head(
            out,
            "cloudcore_resume_bytes",
            "summary",
            "Frame bytes of both directions from a Hello until the edge held all it should.",
        )?;
        let (count, sum) = self.resumes;
        writeln!(out, "cloudcore_resume_bytes_sum {sum}")?;
        writeln!(out, "cloudcore_resume_bytes_count {count}")?;
        for (name, help, value) in self.gauges() {
            head(out, name, "gauge", help)?;
            writeln!(out, "{name} {value}")?;
        }
        for (name, help, value) in self.counters() {
            head(out, name, "counter", help)?;
            writeln!(out, "{name} {value}")?;
        }
        Ok(())
    }
}

fn head(out: &mut fmt::Formatter<'_>, name: &str, kind: &str, help: &str) -> fmt::Result {
    writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}")
}

type Rows<const N: usize> = [(&'static str, &'static str, u64); N];

impl Exposed {
    /// Bytes and frames by direction and class: of the sessions that ended, and of those that live.
    fn volumes(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
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
            head(out, name, "counter", help)?;
            let directions = [
                ("sent", &self.carried.sent),
                ("received", &self.carried.received),
            ];
            for (direction, volumes) in directions {
                for class in [
                    Class::Control,
                    Class::Status,
                    Class::Interactive,
                    Class::Bulk,
                ] {
                    let volume = volumes[class.index()];
                    let value = if frames { volume.frames } else { volume.bytes };
                    let class = format!("{class:?}").to_lowercase();
                    writeln!(
                        out,
                        "{name}{{direction=\"{direction}\",class=\"{class}\"}} {value}"
                    )?;
                }
            }
        }
        Ok(())
    }

    /// Tunnels by verb, refusals by reason, bytes of closed tunnels by direction.
    fn tunnels(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers = &self.tunnels;
        let opened = numbers.opened.iter().map(|(verb, n)| (*verb, *n));
        let refused = numbers.refused.iter().map(|(why, n)| (why.as_str(), *n));
        let bytes = [("sent", numbers.there), ("received", numbers.back)];
        for (name, help, label, rows) in [
            (
                "cloudcore_tunnels_opened_total",
                "Tunnels to nodes that were opened, by verb.",
                "verb",
                opened.collect::<Vec<_>>(),
            ),
            (
                "cloudcore_tunnels_refused_total",
                "Connections and requests that became no tunnel, by reason.",
                "reason",
                refused.collect(),
            ),
            (
                "cloudcore_tunnel_bytes_total",
                "Bytes that closed tunnels carried, by direction.",
                "direction",
                bytes.to_vec(),
            ),
        ] {
            head(out, name, "counter", help)?;
            for (value, count) in rows {
                writeln!(out, "{name}{{{label}=\"{value}\"}} {count}")?;
            }
        }
        Ok(())
    }

    fn gauges(&self) -> Rows<7> {
        [
            (
                "cloudcore_hub_queued_bytes",
                "Bytes that wait to be written to edges.",
                self.queued as u64,
            ),
            (
                "cloudcore_upstream_queued",
                "Objects whose status waits to be written.",
                self.up.waiting,
            ),
            (
                "cloudcore_upstream_in_flight",
                "Writes to the API server under way.",
                self.up.in_flight,
            ),
            (
                "cloudcore_pods",
                "Pods of edge nodes that are held.",
                self.pods,
            ),
            (
                "cloudcore_watched_references",
                "ConfigMaps and Secrets that are watched.",
                self.references,
            ),
            (
                "cloudcore_kubelet_endpoints",
                "Nodes whose kubelet endpoint listens here.",
                self.tunnels.endpoints,
            ),
            (
                "cloudcore_tunnels_open",
                "Tunnels to nodes that are open.",
                self.tunnels.open,
            ),
        ]
    }

    fn counters(&self) -> Rows<13> {
        let up = &self.up;
        [
            (
                "cloudcore_upstream_reports_total",
                "Reports that edges sent.",
                up.reports,
            ),
            (
                "cloudcore_upstream_patches_total",
                "Statuses written.",
                up.patches,
            ),
            (
                "cloudcore_upstream_deletes_total",
                "Pods deleted.",
                up.deletes,
            ),
            (
                "cloudcore_upstream_retries_total",
                "Writes tried again.",
                up.retries,
            ),
            (
                "cloudcore_upstream_refused_total",
                "Reports of other nodes' Pods, and statuses that the API server refused for good.",
                up.refused,
            ),
            (
                "cloudcore_upstream_held_back_total",
                "Writes held back because the node's Lease was not renewed lately.",
                up.not_fresh,
            ),
            (
                "cloudcore_events_written_total",
                "Events written for edges.",
                up.events_written,
            ),
            (
                "cloudcore_events_dropped_total",
                "Events of edges that were too many or refused.",
                up.events_dropped,
            ),
            (
                "cloudcore_tokens_given_total",
                "ServiceAccount tokens given.",
                up.tokens_given,
            ),
            (
                "cloudcore_tokens_refused_total",
                "ServiceAccount tokens refused.",
                up.tokens_refused,
            ),
            (
                "cloudcore_downstream_lists_total",
                "Lists of a whole collection.",
                self.lists,
            ),
            (
                "cloudcore_downstream_faults_total",
                "Lists and watches that failed.",
                self.faults,
            ),
            (
                "cloudcore_downstream_malformed_total",
                "Objects that could not be understood.",
                self.malformed,
            ),
        ]
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

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    fn exposed() -> Exposed {
        let mut carried = Counters::default();
        carried.sent[Class::Bulk.index()].bytes = 77;
        carried.received[Class::Status.index()].frames = 5;
        Exposed {
            quic: 3,
            websocket: 1,
            carried,
            resumes: (2, 900),
            queued: 12,
            up: upstream::Metrics {
                waiting: 4,
                patches: 6,
                ..Default::default()
            },
            pods: 10,
            references: 11,
            lists: 1,
            faults: 0,
            malformed: 0,
            tunnels: stream::Numbers {
                open: 2,
                endpoints: 4,
                opened: [("exec", 9)].into(),
                refused: [(stream::Reason::Limit, 3)].into(),
                there: 21,
                back: 22,
            },
        }
    }

    /// The text format of Prometheus, as far as it is used: families by name, and the samples.
    fn parsed(text: &str) -> (BTreeMap<String, String>, BTreeMap<String, u64>) {
        let (mut types, mut samples) = (BTreeMap::new(), BTreeMap::new());
        let (mut helped, mut current) = (BTreeSet::new(), String::new());
        for line in text.lines() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, words) = help.split_once(' ').unwrap();
                assert!(words.ends_with('.'), "{line}");
                assert!(helped.insert(name.to_owned()), "two HELP of {name}");
                current = name.to_owned();
            } else if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').unwrap();
                assert_eq!(name, current, "TYPE follows its HELP");
                let second = types.insert(name.to_owned(), kind.to_owned());
                assert!(second.is_none(), "two TYPE of {name}");
            } else {
                let (sample, value) = line.rsplit_once(' ').unwrap();
                let name = sample.split('{').next().unwrap();
                let family = name
                    .strip_suffix("_sum")
                    .or(name.strip_suffix("_count"))
                    .unwrap_or(name);
                assert_eq!(family, current, "a sample stands below its TYPE");
                let second = samples.insert(sample.to_owned(), value.parse().unwrap());
                assert!(second.is_none(), "two samples {sample}");
            }
        }
        assert!(text.ends_with('\n'));
        (types, samples)
    }

    #[test]
    fn metrics_are_what_a_scraper_reads() {
        let (types, samples) = parsed(&exposed().to_string());
        for (name, kind) in &types {
            let counts = kind == "counter";
            assert_eq!(name.ends_with("_total"), counts, "{name} is a {kind}");
            let good = |c: char| c.is_ascii_lowercase() || c == '_';
            assert!(name.starts_with("cloudcore_") && name.chars().all(good));
            let sampled = samples.keys().any(|s| s.starts_with(name.as_str()));
            assert!(sampled, "{name} has no sample");
        }
        for (sample, value) in [
            ("cloudcore_sessions{transport=\"quic\"}", 3),
            (
                "cloudcore_hub_bytes_total{direction=\"sent\",class=\"bulk\"}",
                77,
            ),
            (
                "cloudcore_hub_frames_total{direction=\"received\",class=\"status\"}",
                5,
            ),
            ("cloudcore_resume_bytes_sum", 900),
            ("cloudcore_resume_bytes_count", 2),
            ("cloudcore_hub_queued_bytes", 12),
            ("cloudcore_upstream_queued", 4),
            ("cloudcore_upstream_patches_total", 6),
            ("cloudcore_tunnels_open", 2),
            ("cloudcore_tunnels_opened_total{verb=\"exec\"}", 9),
            ("cloudcore_tunnels_refused_total{reason=\"limit\"}", 3),
            ("cloudcore_tunnel_bytes_total{direction=\"sent\"}", 21),
            ("cloudcore_tunnel_bytes_total{direction=\"received\"}", 22),
        ] {
            assert_eq!(samples.get(sample), Some(&value), "{sample}");
        }
    }
}
