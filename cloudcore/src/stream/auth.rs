//! Who asks, and whether they may: the kubelet's authentication and authorization, on its behalf.
//!
//! - Owns: the caches of reviews, bounded and short.
//! - Takes: the client's chain (TLS proved that it holds the key), its bearer token, the request.
//! - Gives: the user, or a refusal with its status.
//! - Never: decides by itself who may; lets anybody in when the API server is out of reach; keeps a
//!   token (its SHA-256 is the key).
//!
//! ```text
//! certificate ─ by the cluster's client CA ─┐
//! token ─ TokenReview (2 min) ──────────────┴► user ─ SubjectAccessReview ─► leave, or 403
//! ```
//!
//! There is no switch that opens it.

mod cache;
mod client_ca;
mod reviews;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::ids::NodeName;
use common::stream::request::Target;
use http::header::AUTHORIZATION;
use http::{HeaderMap, Method, StatusCode};
use rustls::pki_types::{CertificateDer, UnixTime};

pub(super) use client_ca::{ClientCa, ClientCaTask};
pub(super) use reviews::Reviews;

/// Longer ones are no ServiceAccount's: those of many groups are below 4 KiB.
const LONGEST_TOKEN: usize = 16 * 1024;

/// Everybody who was authenticated is in it.
const AUTHENTICATED: &str = "system:authenticated";

/// Who asks, as Kubernetes knows them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct User {
    pub name: String,
    pub uid: Option<String>,
    pub groups: Vec<String>,
    pub extra: BTreeMap<String, Vec<String>>,
}

/// Why somebody is not let in.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    /// The caller learns no more than the kubelet's word; the log may.
    #[error("Unauthorized")]
    NoCredentials,
    #[error("Unauthorized")]
    BadCredentials(#[source] Bad),
    #[error(
        "Forbidden (user={user}, verb={verb}, resource=nodes, subresource(s)=[{subresources}])"
    )]
    Forbidden {
        user: String,
        verb: &'static str,
        subresources: String,
    },
    #[error("{0} is no method of a kubelet's API")]
    Method(Method),
    #[error(
        "Authorization error (user={user}, verb={verb}, resource=nodes, subresource={subresource}): the API server could not be asked"
    )]
    NotJudged {
        user: String,
        verb: &'static str,
        subresource: &'static str,
        #[source]
        source: Box<crate::kube::KubeError>,
    },
    #[error("Authentication error: the API server could not be asked")]
    NotAuthenticated(#[source] Box<crate::kube::KubeError>),
    #[error(
        "Authentication error: the cluster's client CA is not known (ConfigMap kube-system/extension-apiserver-authentication)"
    )]
    NoClientCa,
}

/// What is wrong with credentials.
#[derive(Debug, thiserror::Error)]
pub(super) enum Bad {
    #[error("the client certificate is not of the cluster's client CA")]
    Certificate(#[source] rustls::Error),
    #[error("the client certificate names nobody")]
    Subject(#[source] common::pki::PkiError),
    #[error("the token is longer than {LONGEST_TOKEN} bytes")]
    LongToken,
    #[error("the API server does not know the token")]
    Token,
}

impl Refused {
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Refused::NoCredentials | Refused::BadCredentials(_) => StatusCode::UNAUTHORIZED,
            Refused::Forbidden { .. } => StatusCode::FORBIDDEN,
            Refused::Method(_) => StatusCode::METHOD_NOT_ALLOWED,
            Refused::NotJudged { .. } | Refused::NotAuthenticated(_) | Refused::NoClientCa => {
                StatusCode::INTERNAL_SERVER_ERROR
            }
        }
    }

    /// It is not known who asks.
    pub(super) fn is_stranger(&self) -> bool {
        match self {
            Refused::NoCredentials
            | Refused::BadCredentials(_)
            | Refused::NotAuthenticated(_)
            | Refused::NoClientCa => true,
            Refused::Forbidden { .. } | Refused::Method(_) | Refused::NotJudged { .. } => false,
        }
    }
}

/// What must be allowed: `verb` on one of the subresources of the Node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Attributes {
    pub verb: &'static str,
    /// The finer one first, where there is one; either suffices.
    pub subresources: &'static [&'static str],
}

/// As `NodeAuthorizerAttributesGetter` of the kubelet, but that what acts on a Pod needs `create`
/// also when a WebSocket opens it with GET. `None` is an unknown path: nobody answers it, but only
/// those who may use the proxy are told so.
pub(super) fn attributes(method: &Method, target: Option<&Target>) -> Result<Attributes, Refused> {
    let acts = target.is_some_and(Target::acts);
    let verb = match *method {
        _ if acts => "create",
        Method::GET | Method::HEAD => "get",
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => return Err(Refused::Method(method.clone())),
    };
    let subresources: &[&str] = match target {
        Some(Target::StatsSummary) => &["stats"],
        Some(Target::Metrics(_)) => &["metrics"],
        Some(Target::Healthz) => &["healthz", "proxy"],
        Some(Target::Pods | Target::RunningPods) => &["pods", "proxy"],
        Some(Target::Configz) => &["configz", "proxy"],
        Some(
            Target::Exec { .. }
            | Target::Attach { .. }
            | Target::Run { .. }
            | Target::PortForward { .. }
            | Target::Logs { .. },
        )
        | None => &["proxy"],
    };
    Ok(Attributes { verb, subresources })
}

/// The token of `Authorization: Bearer TOKEN`.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.trim().split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

/// See the module. Cheap to clone.
#[derive(Clone)]
pub(super) struct Auth {
    client_ca: ClientCa,
    reviews: Arc<Reviews>,
}

impl Auth {
    pub(super) fn new(client_ca: ClientCa, reviews: Reviews) -> Self {
        Self {
            client_ca,
            reviews: Arc::new(reviews),
        }
    }

    /// A certificate goes first; one that is not the cluster's leaves the token to be tried.
    pub(super) async fn authenticate(
        &self,
        chain: &[CertificateDer<'static>],
        headers: &HeaderMap,
    ) -> Result<Arc<User>, Refused> {
        let judged = |(leaf, intermediates): (&CertificateDer<'static>, &[_])| {
            self.client_ca.user(leaf, intermediates, UnixTime::now())
        };
        let by_certificate = chain.split_first().map(judged);
        match (by_certificate, bearer(headers)) {
            (Some(Ok(user)), _) => Ok(Arc::new(user)),
            (Some(Err(refused)), None) => Err(refused),
            (None, None) => Err(Refused::NoCredentials),
            (Some(Err(_)) | None, Some(token)) if token.len() > LONGEST_TOKEN => {
                Err(Refused::BadCredentials(Bad::LongToken))
            }
            (Some(Err(_)) | None, Some(token)) => self.reviews.token(token).await,
        }
    }

    /// Whether the user may do this on the node.
    pub(super) async fn authorize(
        &self,
        user: &Arc<User>,
        node: &NodeName,
        asked: Attributes,
    ) -> Result<(), Refused> {
        for subresource in asked.subresources {
            if self
                .reviews
                .access(user, node, asked.verb, subresource)
                .await?
            {
                return Ok(());
            }
        }
        Err(Refused::Forbidden {
            user: user.name.clone(),
            verb: asked.verb,
            subresources: asked.subresources.join(" "),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_needs_what_the_kubelet_demands_for_it() {
        for (method, path, verb, subresources) in [
            (Method::GET, "/stats/summary", "get", &["stats"][..]),
            (Method::GET, "/metrics", "get", &["metrics"]),
            (Method::HEAD, "/metrics/resource", "get", &["metrics"]),
            (Method::GET, "/healthz", "get", &["healthz", "proxy"]),
            (Method::GET, "/healthz/ping", "get", &["healthz", "proxy"]),
            (Method::GET, "/pods", "get", &["pods", "proxy"]),
            (Method::GET, "/runningpods/", "get", &["pods", "proxy"]),
            (Method::GET, "/configz", "get", &["configz", "proxy"]),
            (Method::GET, "/containerLogs/a/b/c", "get", &["proxy"]),
            (Method::POST, "/exec/a/b/c", "create", &["proxy"]),
            (Method::GET, "/exec/a/b/c", "create", &["proxy"]),
            (Method::GET, "/exec/a/b/u/c", "create", &["proxy"]),
            (Method::GET, "/attach/a/b/c", "create", &["proxy"]),
            (Method::GET, "/run/a/b/c", "create", &["proxy"]),
            (Method::GET, "/portForward/a/b", "create", &["proxy"]),
            (Method::PUT, "/portForward/a/b", "create", &["proxy"]),
            (Method::GET, "/debug/pprof", "get", &["proxy"]),
            (Method::GET, "/logs/", "get", &["proxy"]),
            (Method::PUT, "/pods", "update", &["pods", "proxy"]),
            (Method::PATCH, "/x", "patch", &["proxy"]),
            (Method::DELETE, "/x", "delete", &["proxy"]),
        ] {
            let asked = attributes(&method, Target::parse(path).as_ref()).unwrap();
            assert_eq!(asked, Attributes { verb, subresources }, "{method} {path}");
        }
        let odd = attributes(&Method::TRACE, None).unwrap_err();
        assert_eq!(odd.status(), StatusCode::METHOD_NOT_ALLOWED);
    }

    #[test]
    fn a_token_stands_behind_its_scheme() {
        for (value, want) in [
            ("Bearer abc", Some("abc")),
            ("bearer  abc ", Some("abc")),
            ("Bearer", None),
            ("Bearer ", None),
            ("Basic abc", None),
            ("abc", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(AUTHORIZATION, value.parse().unwrap());
            assert_eq!(bearer(&headers), want, "{value:?}");
        }
    }

    #[test]
    fn a_refusal_speaks_as_a_kubelet_does() {
        let refused = Refused::Forbidden {
            user: "jane".into(),
            verb: "create",
            subresources: "proxy".into(),
        };
        assert_eq!(
            refused.to_string(),
            "Forbidden (user=jane, verb=create, resource=nodes, subresource(s)=[proxy])"
        );
    }
}
