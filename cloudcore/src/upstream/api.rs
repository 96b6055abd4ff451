//! The one real [`ApiWriter`]: requests over the API server's client, each marked as its node's.
//!
//! - Takes: CloudCore's client, and the function that marks a request as made for a node.
//! - Gives: the returned object, or the error read from code, `Status` and `Retry-After`.
//! - Never: retries (the patcher does), logs a body, or reads more than [`ANSWER_LIMIT`].

use std::time::Duration;

use common::ids::NodeName;
use futures::FutureExt;
use futures::future::BoxFuture;
use http::{Method, Request, header};
use http_body_util::{BodyExt, Limited};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};

use super::writer::{ApiWriter, Call, WriteError};

/// An object in etcd has at most 1.5 MiB by default, and its JSON is at most about twice its
/// protobuf: what is larger is no answer of an API server.
const ANSWER_LIMIT: usize = 4 << 20;

/// The longest that one write may take. A status write of a healthy API server takes milliseconds;
/// a dead connection must not keep a slot for longer than a Lease lives.
const DEADLINE: Duration = Duration::from_secs(10);

const STRATEGIC: &str = "application/strategic-merge-patch+json";
const MERGE: &str = "application/merge-patch+json";
const JSON: &str = "application/json";

/// Marks a request as made for this node.
pub type Mark = fn(&mut Request<Body>, &NodeName);

/// Writes through `kube::Client`.
#[derive(Clone)]
pub struct KubeWriter {
    client: Client,
    mark: Mark,
}

impl KubeWriter {
    pub fn new(client: Client, mark: Mark) -> Self {
        Self { client, mark }
    }

    async fn answer(&self, node: &NodeName, call: Call) -> Result<Value, WriteError> {
        let mut request = request(node, call)?;
        (self.mark)(&mut request, node);
        let answer = self.client.send(request).await.map_err(unavailable)?;
        let (head, body) = answer.into_parts();
        let retry_after = head
            .headers
            .get(header::RETRY_AFTER)
            .and_then(|v| v.to_str().ok()?.parse().ok())
            .map(Duration::from_secs);
        let body = Limited::new(body, ANSWER_LIMIT).collect().await;
        let body = body.map_err(unavailable)?.to_bytes();
        let parsed = serde_json::from_slice(&body);
        if head.status.is_success() {
            // Serde's error names line and column, never content.
            parsed.map_err(unavailable)
        } else {
            let status = parsed.unwrap_or(Value::Null);
            Err(WriteError::read(head.status.as_u16(), &status, retry_after))
        }
    }
}

impl ApiWriter for KubeWriter {
    fn send<'a>(
        &'a self,
        node: &'a NodeName,
        call: Call,
    ) -> BoxFuture<'a, Result<Value, WriteError>> {
        async move {
            let answer = tokio::time::timeout(DEADLINE, self.answer(node, call)).await;
            answer.unwrap_or_else(|_| {
                let late = format!("no answer within {} s", DEADLINE.as_secs());
                Err(WriteError::Unavailable(late))
            })
        }
        .boxed()
    }
}

fn unavailable(error: impl std::fmt::Display) -> WriteError {
    WriteError::Unavailable(error.to_string().chars().take(300).collect())
}

/// Names reach a path only when they are made of what Kubernetes names are made of.
fn segment(name: &str) -> Result<&str, WriteError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'.';
    if !name.is_empty() && name.len() <= 253 && name.bytes().all(plain) && !name.contains("..") {
        Ok(name)
    } else {
        Err(WriteError::Invalid(
            "a name in the request is no Kubernetes name".into(),
        ))
    }
}

fn request(node: &NodeName, call: Call) -> Result<Request<Body>, WriteError> {
    let (method, path, kind, body) = match call {
        Call::PatchPodStatus {
            namespace,
            name,
            body,
        } => {
            let (namespace, name) = (segment(&namespace)?, segment(&name)?);
            let path = format!("/api/v1/namespaces/{namespace}/pods/{name}/status");
            (Method::PATCH, path, STRATEGIC, body)
        }
        Call::DeletePod {
            namespace,
            name,
            uid,
        } => {
            let (namespace, name) = (segment(&namespace)?, segment(&name)?);
            let body = json!({
                "apiVersion": "v1",
                "kind": "DeleteOptions",
                "gracePeriodSeconds": 0,
                "preconditions": {"uid": uid},
            });
            (
                Method::DELETE,
                format!("/api/v1/namespaces/{namespace}/pods/{name}"),
                JSON,
                body,
            )
        }
        Call::PatchNodeStatus { body } => (
            Method::PATCH,
            format!("/api/v1/nodes/{node}/status"),
            STRATEGIC,
            body,
        ),
        Call::CreateEvent { namespace, body } => {
            let namespace = segment(&namespace)?;
            (
                Method::POST,
                format!("/api/v1/namespaces/{namespace}/events"),
                JSON,
                body,
            )
        }
        Call::PatchEvent {
            namespace,
            name,
            body,
        } => {
            let (namespace, name) = (segment(&namespace)?, segment(&name)?);
            (
                Method::PATCH,
                format!("/api/v1/namespaces/{namespace}/events/{name}"),
                MERGE,
                body,
            )
        }
        Call::RequestToken {
            namespace,
            service_account,
            body,
        } => {
            let (namespace, account) = (segment(&namespace)?, segment(&service_account)?);
            let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token");
            (Method::POST, path, JSON, body)
        }
    };
    Request::builder()
        .method(method)
        .uri(path)
        .header(header::CONTENT_TYPE, kind)
        .header(header::ACCEPT, JSON)
        .body(Body::from(body.to_string().into_bytes()))
        .map_err(|e| WriteError::Invalid(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{Response, StatusCode};
    use std::convert::Infallible;
    use std::sync::{Arc, Mutex};

    type Seen = Arc<Mutex<Vec<(String, String, String, String)>>>;

    /// A client whose server answers every request alike and notes what it was asked.
    fn client(code: u16, headers: &'static [(&str, &str)], body: &'static str) -> (Client, Seen) {
        let seen = Seen::default();
        let noted = seen.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let noted = noted.clone();
            async move {
                let (head, sent) = request.into_parts();
                let kind = head.headers[header::CONTENT_TYPE]
                    .to_str()
                    .unwrap()
                    .to_string();
                let sent = sent.collect().await.unwrap().to_bytes();
                noted.lock().unwrap().push((
                    format!("{} {}", head.method, head.uri),
                    kind,
                    head.extensions.get::<NodeName>().unwrap().to_string(),
                    String::from_utf8(sent.to_vec()).unwrap(),
                ));
                let mut answer = Response::builder().status(StatusCode::from_u16(code).unwrap());
                for (k, v) in headers {
                    answer = answer.header(*k, *v);
                }
                Ok::<_, Infallible>(answer.body(Body::from(body.as_bytes().to_vec())).unwrap())
            }
        });
        (Client::new(service, "default"), seen)
    }

    fn mark(request: &mut Request<Body>, node: &NodeName) {
        request.extensions_mut().insert(node.clone());
    }

    fn node() -> NodeName {
        NodeName::parse("edge-1").unwrap()
    }

    fn delete() -> Call {
        Call::DeletePod {
            namespace: "n".into(),
            name: "p".into(),
            uid: "u".into(),
        }
    }

    #[tokio::test]
    async fn a_call_becomes_the_request_it_names_made_as_the_node() {
        let (namespace, name) = (|| "n".to_string(), || "p".to_string());
        let body = || json!({"a": 1});
        let sent = r#"{"a":1}"#;
        for (call, line, kind, want) in [
            (
                Call::PatchPodStatus {
                    namespace: namespace(),
                    name: name(),
                    body: body(),
                },
                "PATCH /api/v1/namespaces/n/pods/p/status",
                STRATEGIC,
                sent,
            ),
            (
                delete(),
                "DELETE /api/v1/namespaces/n/pods/p",
                JSON,
                r#"{"apiVersion":"v1","kind":"DeleteOptions","gracePeriodSeconds":0,"preconditions":{"uid":"u"}}"#,
            ),
            (
                Call::PatchNodeStatus { body: body() },
                "PATCH /api/v1/nodes/edge-1/status",
                STRATEGIC,
                sent,
            ),
            (
                Call::CreateEvent {
                    namespace: namespace(),
                    body: body(),
                },
                "POST /api/v1/namespaces/n/events",
                JSON,
                sent,
            ),
            (
                Call::PatchEvent {
                    namespace: namespace(),
                    name: name(),
                    body: body(),
                },
                "PATCH /api/v1/namespaces/n/events/p",
                MERGE,
                sent,
            ),
            (
                Call::RequestToken {
                    namespace: namespace(),
                    service_account: "default".into(),
                    body: body(),
                },
                "POST /api/v1/namespaces/n/serviceaccounts/default/token",
                JSON,
                sent,
            ),
        ] {
            let (client, seen) = client(200, &[], r#"{"kind":"x"}"#);
            let answer = KubeWriter::new(client, mark).send(&node(), call).await;
            assert_eq!(answer, Ok(json!({"kind": "x"})));
            let seen = seen.lock().unwrap().pop().unwrap();
            assert_eq!(
                seen,
                (line.into(), kind.into(), "edge-1".into(), want.into())
            );
        }
    }

    #[tokio::test]
    async fn a_failure_is_read_with_its_retry_after() {
        let (client, _) = client(429, &[("retry-after", "7")], "{}");
        let answer = KubeWriter::new(client, mark).send(&node(), delete()).await;
        let want = WriteError::Busy {
            retry_after: Some(Duration::from_secs(7)),
        };
        assert_eq!(answer, Err(want));
    }

    #[tokio::test]
    async fn a_name_that_would_leave_its_path_is_never_sent() {
        for name in ["", "../x", "a/b", "a?b", "a%2fb"] {
            let (client, seen) = client(200, &[], "{}");
            let call = Call::DeletePod {
                namespace: "n".into(),
                name: name.into(),
                uid: "u".into(),
            };
            let answer = KubeWriter::new(client, mark).send(&node(), call).await;
            assert!(matches!(answer, Err(WriteError::Invalid(_))), "{name}");
            assert!(seen.lock().unwrap().is_empty());
        }
    }
}
