//! One request to the API server: where it goes, whose it is, how long it may take.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use http::header::{AUTHORIZATION, HeaderName, USER_AGENT};
use http::uri::PathAndQuery;
use http::{HeaderValue, Request, Response, StatusCode, Uri};
use kube::client::Body;
use tower::{BoxError, Service};

use common::ids::NodeName;

use super::pool::{HeldBody, Lane};
use super::{Mode, Shared};

const IMPERSONATE_USER: HeaderName = HeaderName::from_static("impersonate-user");
const AGENT: HeaderValue =
    HeaderValue::from_static(concat!("cloudcore/", env!("CARGO_PKG_VERSION")));

/// Until the answer's head. The API server ends what is no watch after 60 s by itself.
const ANSWER_WITHIN: Duration = Duration::from_secs(65);

/// Marks one request as made for this node (see [`super::KubeClients::mark_as_node`]).
#[derive(Clone)]
pub(super) struct AsNode(pub(super) NodeName);

/// Marks the one request that proves the mode: it impersonates whatever the mode is.
#[derive(Clone)]
pub(super) struct AlwaysAsNode(pub(super) NodeName);

#[derive(Debug, thiserror::Error)]
enum SendError {
    #[error("the API server's address {0} and the request {1:?} make no URL")]
    Url(Uri, String),
    #[error("CloudCore has no token for the API server at present")]
    NoToken,
    #[error("the API server did not answer within {} s", ANSWER_WITHIN.as_secs())]
    Silent,
}

/// What [`kube::Client`] sends its requests into.
#[derive(Clone)]
pub(crate) struct ApiService {
    shared: Arc<Shared>,
    lane: Lane,
    node: Option<NodeName>,
}

impl ApiService {
    pub(crate) fn own(shared: Arc<Shared>, lane: Lane) -> Self {
        Self {
            shared,
            lane,
            node: None,
        }
    }

    pub(crate) fn node(shared: Arc<Shared>, lane: Lane, node: NodeName) -> Self {
        Self {
            shared,
            lane,
            node: Some(node),
        }
    }

    async fn send(self, mut request: Request<Body>) -> Result<Response<HeldBody>, BoxError> {
        let probe = request.extensions_mut().remove::<AlwaysAsNode>();
        let marked = request.extensions_mut().remove::<AsNode>();
        let node = marked.map(|AsNode(node)| node).or(self.node.clone());
        *request.uri_mut() = url(&self.shared.base, request.uri())?;
        let token = self.shared.token.current().ok_or(SendError::NoToken)?;
        let headers = request.headers_mut();
        headers.insert(AUTHORIZATION, token);
        headers.insert(USER_AGENT, AGENT);
        let for_node = node.is_some();
        let user = match (probe, node, *self.shared.mode.borrow()) {
            (Some(AlwaysAsNode(node)), _, _) => Some(node.user()),
            (None, Some(node), Mode::Constrained | Mode::Unproven) => Some(node.user()),
            (None, Some(_), Mode::Direct) | (None, None, _) => None,
        };
        if let Some(user) = user {
            // No group header: with one the server falls back to plain impersonation.
            headers.insert(IMPERSONATE_USER, HeaderValue::try_from(user)?);
        }
        let pool = match self.lane {
            Lane::Work => &self.shared.work,
            Lane::Watch => &self.shared.watches,
        };
        let stream = pool.stream().await;
        let answer = tokio::time::timeout(ANSWER_WITHIN, stream.client.request(request)).await;
        let answer = answer.map_err(|_| SendError::Silent)??;
        match answer.status() {
            StatusCode::UNAUTHORIZED => self.shared.token.refused(),
            StatusCode::FORBIDDEN if for_node => self.shared.doubted.notify_one(),
            _ => {}
        }
        Ok(answer.map(|body| stream.hold(body)))
    }
}

impl Service<Request<Body>> for ApiService {
    type Response = Response<HeldBody>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        self.clone().send(request).boxed()
    }
}

/// The request's path behind the server's address, which may have a path of its own.
fn url(base: &Uri, request: &Uri) -> Result<Uri, SendError> {
    let path = request.path_and_query().map_or("/", PathAndQuery::as_str);
    let joined = format!("{}{path}", base.path().trim_end_matches('/'));
    let bad = || SendError::Url(base.clone(), path.to_string());
    let mut parts = base.clone().into_parts();
    parts.path_and_query = Some(joined.parse().map_err(|_| bad())?);
    Uri::from_parts(parts).map_err(|_| bad())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_goes_behind_the_servers_own_path() {
        for (base, request, want) in [
            (
                "https://h:6443",
                "/api/v1/nodes?watch=1",
                "https://h:6443/api/v1/nodes?watch=1",
            ),
            ("https://h:6443/", "/api/v1", "https://h:6443/api/v1"),
            ("https://h/k8s/c1/", "/apis/x", "https://h/k8s/c1/apis/x"),
        ] {
            let got = url(&base.parse().unwrap(), &request.parse().unwrap()).unwrap();
            assert_eq!(got, want.parse::<Uri>().unwrap());
        }
    }
}
