//! The node's kubelet API: one HTTP service, for tunnels of the cloud and for whoever is at the
//! device.
//!
//! ```text
//! tunnel (a stream of the hub's connection) ─┐               ┌─ exec ──► the runtime's own server
//!                                            ├─► NodeApi ────┼─ documents: /pods, /configz, …
//! admin socket (root only) ──────────────────┘   containers  └─ what else the kubelet serves
//! ```
//!
//! Takes one request at a time as [`Target`] names it; gives the kubelet's answers and, in errors,
//! its words. An upgraded connection is spliced, and decoded only where the runtime does not speak
//! what the client does (`translate`). Who may ask what was judged before:
//! by the cloud for a tunnel, by the socket's mode for the device. Nothing is allocated for a
//! tunnel before one opens.

pub mod containers;
pub mod documents;
pub mod exec;
pub mod fuzz;
pub mod leftover;
pub mod logs;
pub mod metrics;
pub mod runtime;
pub mod serve;
mod spdy;
pub mod stats;
pub mod translate;
pub mod tunnels;
mod websocket;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use common::stream::request::{BadParameter, LogOptions, Metrics, PodName, Target, pairs};
use futures::TryStreamExt as _;
use futures::future::BoxFuture;
use http::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use jiff::Timestamp;
use tokio::sync::watch;
use tracing::debug;

use crate::cri::{CriError, Failure, Runtime};
use crate::node::environment::Environment;
use crate::pods::manager::RuntimeState;
use crate::store::desired::Desired;
use crate::store::reports::Reports;

/// An answer's body: a document, or a stream that ends when it ends or its reader leaves.
pub type Body = UnsyncBoxBody<Bytes, io::Error>;

/// What a request gets.
pub struct Answer {
    pub response: Response<Body>,
    /// After `101`: what joins the two connections, until both have ended.
    pub after: Option<BoxFuture<'static, ()>>,
}

impl From<Response<Body>> for Answer {
    fn from(response: Response<Body>) -> Self {
        let after = None;
        Self { response, after }
    }
}

/// What the service reads.
pub struct Deps {
    pub cri: Runtime,
    pub desired: Desired,
    pub reports: Reports,
    pub runtime: watch::Receiver<RuntimeState>,
    pub environment: watch::Receiver<Option<Environment>>,
    pub leftovers: leftover::Leftovers,
    pub stats: stats::Gatherer,
    pub settings: Settings,
}

/// What `/configz` shows of the configuration, and where logs are.
#[derive(Debug, Clone)]
pub struct Settings {
    pub node: String,
    /// The runtime's socket, as configured.
    pub cri: String,
    pub pod_logs: PathBuf,
    pub most_pods: usize,
}

/// The service; cheap to clone.
#[derive(Clone)]
pub struct NodeApi {
    deps: Arc<Deps>,
}

/// Why a request is not served: the status, and a sentence that kubectl shows as it is.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error("404 page not found")]
    NoSuchPath,
    #[error("{0} is not allowed here; use {1}")]
    Method(Method, &'static str),
    #[error(transparent)]
    Parameter(#[from] BadParameter),
    #[error("Upgrade request required")]
    UpgradeRequired,
    #[error(transparent)]
    Handshake(#[from] translate::Incomplete),
    #[error("pod {name:?} does not exist in namespace {namespace:?} on this node", name = .0.name, namespace = .0.namespace)]
    NoPod(PodName),
    /// It is not in the Pod's spec.
    #[error("container {container:?} not found in pod {pod:?}")]
    NoContainer { container: String, pod: String },
    /// It is in the spec and does not run.
    #[error("container not found ({0:?})")]
    NotRunning(String),
    #[error("failed to find sandbox for pod {0:?}")]
    NoSandbox(String),
    /// There is no such log, and why; the kubelet's own text.
    #[error("{0}")]
    NoLog(String),
    #[error("command '{command}' exited with {code}: {said}")]
    Exited {
        command: String,
        code: i32,
        said: String,
    },
    #[error("the container runtime refused: {0}")]
    Runtime(#[from] CriError),
    #[error(transparent)]
    Streaming(#[from] runtime::StreamingError),
    #[error(transparent)]
    Since(#[from] logs::BadSince),
    #[error("the Pod manager of this node has ended")]
    Unwell,
}

impl Refusal {
    fn status(&self) -> StatusCode {
        match self {
            Refusal::NoSuchPath
            | Refusal::NoPod(_)
            | Refusal::NoContainer { .. }
            | Refusal::NotRunning(_)
            | Refusal::NoSandbox(_) => StatusCode::NOT_FOUND,
            Refusal::Method(..) => StatusCode::METHOD_NOT_ALLOWED,
            Refusal::Parameter(_)
            | Refusal::Since(_)
            | Refusal::UpgradeRequired
            | Refusal::Handshake(_)
            | Refusal::NoLog(_) => StatusCode::BAD_REQUEST,
            Refusal::Runtime(error) => match error.failure {
                Failure::NotFound => StatusCode::NOT_FOUND,
                Failure::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
                Failure::Unimplemented => StatusCode::NOT_IMPLEMENTED,
                Failure::Deadline => StatusCode::GATEWAY_TIMEOUT,
                Failure::Refused => StatusCode::INTERNAL_SERVER_ERROR,
            },
            Refusal::Streaming(_) => StatusCode::BAD_GATEWAY,
            Refusal::Exited { .. } | Refusal::Unwell => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    fn answer(&self) -> Response<Body> {
        let text = format!("{}\n", common::telemetry::chain(self));
        let mut response = document(TEXT, text);
        *response.status_mut() = self.status();
        if let Refusal::Method(_, allowed) = self {
            let allowed = HeaderValue::from_static(allowed);
            response.headers_mut().insert(ALLOW, allowed);
        }
        response
    }
}

pub(crate) const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
/// The text format of Prometheus.
const PROMETHEUS: HeaderValue =
    HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
pub(crate) const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// A whole answer.
pub(crate) fn document(kind: HeaderValue, body: impl Into<Bytes>) -> Response<Body> {
    let body = Full::new(body.into()).map_err(|never| match never {});
    let mut response = Response::new(body.boxed_unsync());
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

impl NodeApi {
    pub fn build(deps: Deps) -> Self {
        Self {
            deps: Arc::new(deps),
        }
    }

    /// The answer to one request. Dropped before it is done, it takes its work with it.
    pub async fn answer(&self, request: Request<Incoming>) -> Answer {
        match self.dispatch(request).await {
            Ok(answer) => answer,
            Err(refusal) => {
                debug!(%refusal, "refused");
                refusal.answer().into()
            }
        }
    }

    async fn dispatch(&self, request: Request<Incoming>) -> Result<Answer, Refusal> {
        let target = Target::parse(request.uri().path()).ok_or(Refusal::NoSuchPath)?;
        allow(&target, request.method())?;
        let response = match &target {
            Target::Exec { .. } | Target::Attach { .. } | Target::PortForward { .. } => {
                return exec::upgrade(&self.deps, &target, request).await;
            }
            Target::Run { pod, container } => {
                exec::run(&self.deps, pod, container, request.uri().query()).await?
            }
            Target::Logs { pod, container } => {
                let query = request.uri().query().unwrap_or_default();
                self.logs(pod, container, LogOptions::parse(query)?).await?
            }
            Target::Pods => document(JSON, documents::pods(&self.deps)),
            Target::RunningPods => document(JSON, documents::running_pods(&self.deps).await?),
            Target::Configz => document(JSON, documents::configz(&self.deps)),
            Target::Healthz => document(TEXT, documents::healthz(&self.deps)?),
            Target::StatsSummary => {
                let terse = only_cpu_and_memory(request.uri().query());
                document(JSON, self.deps.stats.summary(terse).await.to_string())
            }
            Target::Metrics(kind) => document(PROMETHEUS, self.metrics(*kind).await),
        };
        Ok(response.into())
    }

    /// A log, once it is known that there is one.
    async fn logs(
        &self,
        pod: &PodName,
        container: &str,
        options: LogOptions,
    ) -> Result<Response<Body>, Refusal> {
        let (log, id) = containers::log(&self.deps, pod, container, options.previous).await?;
        let part = logs::Part::new(&options, Timestamp::now())?;
        let ended = logs::container_ended(self.deps.cri.clone(), id);
        let unreadable = |error: io::Error| {
            let path = log.path();
            Refusal::NoLog(format!("{} cannot be read: {error}", path.display()))
        };
        let lines = logs::read(&log, part, ended).await.map_err(unreadable)?;
        let body = StreamBody::new(lines.map_ok(Frame::data)).boxed_unsync();
        let mut response = Response::new(body);
        response.headers_mut().insert(CONTENT_TYPE, TEXT);
        Ok(response)
    }

    async fn metrics(&self, kind: Metrics) -> String {
        match kind {
            Metrics::Agent => self.deps.stats.agent().await,
            Metrics::Cadvisor => self.deps.stats.cadvisor().await,
            Metrics::Resource => self.deps.stats.resource().await,
            Metrics::Probes => metrics::PROBES.into(),
        }
    }
}

/// The kubelet's parameter of `/stats/summary`.
fn only_cpu_and_memory(query: Option<&str>) -> bool {
    let mut asked = pairs(query.unwrap_or_default());
    asked.any(|(name, value)| name == "only_cpu_and_memory" && value == "true")
}

/// The methods that the kubelet registers for a path.
fn allow(target: &Target, method: &Method) -> Result<(), Refusal> {
    let allowed = match target {
        Target::Exec { .. } | Target::Attach { .. } | Target::PortForward { .. } => "GET, POST",
        Target::Run { .. } => "POST",
        Target::Logs { .. }
        | Target::Pods
        | Target::RunningPods
        | Target::StatsSummary
        | Target::Metrics(_)
        | Target::Healthz
        | Target::Configz => "GET, HEAD",
    };
    if allowed.split(", ").any(|name| name == method.as_str()) {
        Ok(())
    } else {
        Err(Refusal::Method(method.clone(), allowed))
    }
}
