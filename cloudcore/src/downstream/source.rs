//! One list or one watch at the API server, as raw JSON.
//!
//! Takes the clients, a collection and a selector; gives pages and lines, or a fault that says what
//! to do next. Objects stay text until somebody needs them, so that no field is lost on the way and
//! one malformed object costs one object. Every read has a byte limit and a deadline. Never: a
//! retry (the feeds decide), content in an error or a log.

use std::borrow::Cow;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use http::{Request, Response, StatusCode, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use kube::client::Body;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::time::timeout;
use tokio_util::codec::{FramedRead, LinesCodec, LinesCodecError};
use tokio_util::io::StreamReader;

use super::Clients;
use common::ids::{NodeName, ObjectKey};

/// The most that one page of a list may take. 500 ordinary Pods are 5 MB; a page above it is asked
/// for again with fewer objects.
const PAGE_BYTES: usize = 32 << 20;

/// The most that one event of a watch may take: an object has at most 1.5 MiB in etcd, and its JSON
/// is at most a few times its binary form.
const LINE_BYTES: usize = 12 << 20;

/// The most that is read of an error's explanation.
const STATUS_BYTES: usize = 64 << 10;

/// How long the head of an answer, or a page, may take. The API server itself gives up after 60 s.
const ANSWER_DEADLINE: Duration = Duration::from_secs(70);

/// The longest pause that a server may ask for; above it we come back uninvited.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Why a list or a watch did not go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    #[error("the revision is no longer known to the API server: list again")]
    Expired,
    #[error("the API server refuses it: {0}")]
    Forbidden(String),
    #[error("the API server asks to slow down: {message}")]
    Throttled {
        message: String,
        after: Option<Duration>,
    },
    #[error("a page is larger than {PAGE_BYTES} bytes")]
    TooLarge,
    #[error("the API server answered {code}: {message}")]
    Status { code: u16, message: String },
    #[error("no answer within {} s", ANSWER_DEADLINE.as_secs())]
    Silent,
    #[error("the answer cannot be read: {0}")]
    Unreadable(String),
    #[error("the API server cannot be reached")]
    Unreachable(#[source] kube::Error),
}

/// The API server: lists and watches have connections of their own.
#[derive(Clone)]
pub(super) struct Access {
    lists: kube::Client,
    watches: kube::Client,
    mark_as_node: fn(&mut Request<Body>, &NodeName),
}

impl Access {
    pub(super) fn of<C: Clients>(clients: &C) -> Self {
        Self {
            lists: clients.own(),
            watches: clients.own_watch(),
            mark_as_node: C::mark_as_node,
        }
    }
}

/// A collection of the core API, narrowed by a field selector, read as CloudCore or as a node.
pub(super) struct Source {
    access: Access,
    principal: Option<NodeName>,
    path: String,
    selector: String,
}

/// One page of a list.
pub(super) struct Page {
    pub(super) revision: u64,
    pub(super) next: Option<String>,
    pub(super) items: Vec<Box<RawValue>>,
}

/// One event of a watch.
pub(super) enum Line {
    Applied(Box<RawValue>),
    Deleted(Box<RawValue>),
    /// Everything up to this revision was sent.
    Bookmark(u64),
}

impl Source {
    /// `plural` across the cluster.
    pub(super) fn cluster(access: Access, plural: &str, selector: &str) -> Self {
        Self {
            access,
            principal: None,
            path: format!("/api/v1/{plural}"),
            selector: selector.into(),
        }
    }

    /// One object by its name, as a node: the form that the Node authorizer grants. Namespace and
    /// name are DNS subdomains, so neither means anything in a path or a selector.
    pub(super) fn object(access: Access, node: NodeName, plural: &str, key: &ObjectKey) -> Self {
        Self {
            access,
            principal: Some(node),
            path: format!("/api/v1/namespaces/{}/{plural}", key.namespace),
            selector: format!("metadata.name={}", key.name),
        }
    }

    /// A page of a consistent list: no revision is named, so the server answers with what is
    /// committed at this moment.
    pub(super) async fn page(&self, limit: u32, token: Option<&str>) -> Result<Page, Fault> {
        let mut query = vec![("limit", limit.to_string())];
        query.extend(token.map(|t| ("continue", t.to_owned())));
        let read = async {
            let response = self.send(&self.access.lists, query).await?;
            let body = Limited::new(response.into_body(), PAGE_BYTES);
            let collected = body.collect().await.map_err(|error| {
                if error.is::<LengthLimitError>() {
                    Fault::TooLarge
                } else {
                    Fault::Unreadable(error.to_string())
                }
            })?;
            parse_page(&collected.to_bytes())
        };
        timeout(ANSWER_DEADLINE, read)
            .await
            .map_err(|_| Fault::Silent)?
    }

    /// Opens a watch that begins after `from` and ends by itself after about `lifetime`.
    pub(super) async fn watch(&self, from: u64, lifetime: Duration) -> Result<Lines, Fault> {
        let query = vec![
            ("watch", "1".to_owned()),
            ("allowWatchBookmarks", "true".to_owned()),
            ("resourceVersion", from.to_string()),
            ("timeoutSeconds", lifetime.as_secs().max(1).to_string()),
        ];
        let response = timeout(ANSWER_DEADLINE, self.send(&self.access.watches, query))
            .await
            .map_err(|_| Fault::Silent)??;
        let bytes = response.into_body().into_data_stream();
        let reader = StreamReader::new(bytes.map_err(std::io::Error::other).boxed());
        Ok(Lines(Box::pin(FramedRead::new(
            reader,
            LinesCodec::new_with_max_length(LINE_BYTES),
        ))))
    }

    async fn send(
        &self,
        client: &kube::Client,
        mut query: Vec<(&str, String)>,
    ) -> Result<Response<Body>, Fault> {
        if !self.selector.is_empty() {
            query.push(("fieldSelector", self.selector.clone()));
        }
        let mut request = Request::get(format!("{}?{}", self.path, encode(&query)))
            .header(header::ACCEPT, "application/json")
            .header(header::ACCEPT_ENCODING, "identity")
            .body(Body::empty())
            .map_err(|e| Fault::Unreadable(e.to_string()))?;
        if let Some(node) = &self.principal {
            (self.access.mark_as_node)(&mut request, node);
        }
        let response = client.send(request).await.map_err(Fault::Unreachable)?;
        if response.status().is_success() {
            return Ok(response);
        }
        Err(refusal(response).await)
    }
}

type Frames = FramedRead<
    StreamReader<futures::stream::BoxStream<'static, std::io::Result<bytes::Bytes>>, bytes::Bytes>,
    LinesCodec,
>;

/// The lines of an open watch.
pub(super) struct Lines(std::pin::Pin<Box<Frames>>);

impl Lines {
    /// The next event; `None` when the server ended the watch. A line that is no event is passed
    /// over with a warning. Cancel safe: no line is lost when the future is dropped.
    pub(super) async fn next(&mut self) -> Result<Option<Line>, Fault> {
        loop {
            let line = match self.0.next().await {
                None => return Ok(None),
                Some(Ok(line)) => line,
                Some(Err(LinesCodecError::MaxLineLengthExceeded)) => {
                    return Err(Fault::Unreadable(format!(
                        "an event is over {LINE_BYTES} bytes"
                    )));
                }
                Some(Err(LinesCodecError::Io(error))) => {
                    return Err(Fault::Unreadable(error.to_string()));
                }
            };
            match parse_line(&line) {
                Ok(Some(line)) => return Ok(Some(line)),
                Ok(None) => tracing::warn!("the API server sent a watch event that is none"),
                Err(fault) => return Err(fault),
            }
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata<'a> {
    #[serde(borrow, default)]
    resource_version: Cow<'a, str>,
    #[serde(borrow, default)]
    r#continue: Cow<'a, str>,
}

fn parse_page(bytes: &[u8]) -> Result<Page, Fault> {
    #[derive(Deserialize)]
    struct Body<'a> {
        #[serde(borrow)]
        metadata: Metadata<'a>,
        items: Option<Vec<Box<RawValue>>>,
    }
    let body: Body = serde_json::from_slice(bytes)
        .map_err(|e| Fault::Unreadable(format!("not a list ({:?})", e.classify())))?;
    let revision = body.metadata.resource_version.parse();
    let next = body.metadata.r#continue.into_owned();
    Ok(Page {
        revision: revision.map_err(|_| Fault::Unreadable("a list without a revision".into()))?,
        next: (!next.is_empty()).then_some(next),
        items: body.items.unwrap_or_default(),
    })
}

fn parse_line(line: &str) -> Result<Option<Line>, Fault> {
    #[derive(Deserialize)]
    struct Event<'a> {
        #[serde(borrow)]
        r#type: Cow<'a, str>,
        object: Box<RawValue>,
    }
    #[derive(Deserialize)]
    struct Marked<'a> {
        #[serde(borrow)]
        metadata: Metadata<'a>,
    }
    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Status {
        code: u16,
        message: String,
    }
    let Ok(event) = serde_json::from_str::<Event>(line) else {
        return Ok(None);
    };
    Ok(match event.r#type.as_ref() {
        "ADDED" | "MODIFIED" => Some(Line::Applied(event.object)),
        "DELETED" => Some(Line::Deleted(event.object)),
        "BOOKMARK" => {
            let marked = serde_json::from_str::<Marked>(event.object.get()).ok();
            let revision = marked.and_then(|m| m.metadata.resource_version.parse().ok());
            revision.map(Line::Bookmark)
        }
        "ERROR" => {
            let status: Status = serde_json::from_str(event.object.get()).unwrap_or_default();
            return Err(fault_of(status.code, status.message, None));
        }
        _ => None,
    })
}

async fn refusal(response: Response<Body>) -> Fault {
    #[derive(Deserialize)]
    struct Status {
        message: String,
    }
    let code = response.status();
    let after = response.headers().get(header::RETRY_AFTER);
    let after = after
        .and_then(|v| v.to_str().ok()?.parse().ok())
        .map(Duration::from_secs);
    let body = Limited::new(response.into_body(), STATUS_BYTES).collect();
    let status = match timeout(ANSWER_DEADLINE, body).await {
        Ok(Ok(body)) => serde_json::from_slice::<Status>(&body.to_bytes()).ok(),
        Ok(Err(_)) | Err(_) => None,
    };
    let message = status
        .map(|s| s.message)
        .unwrap_or_else(|| code.to_string());
    fault_of(code.as_u16(), message, after)
}

fn fault_of(code: u16, message: String, after: Option<Duration>) -> Fault {
    let message = message.chars().take(300).collect();
    match StatusCode::from_u16(code) {
        Ok(StatusCode::GONE) => Fault::Expired,
        Ok(StatusCode::FORBIDDEN) => Fault::Forbidden(message),
        Ok(StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) => Fault::Throttled {
            message,
            after: after.map(|a| a.min(LONGEST_PAUSE)),
        },
        _ => Fault::Status { code, message },
    }
}

/// `application/x-www-form-urlencoded`, for the few characters that selectors and tokens have.
fn encode(query: &[(&str, String)]) -> String {
    let mut out = String::new();
    for (key, value) in query {
        if !out.is_empty() {
            out.push('&');
        }
        out.push_str(key);
        out.push('=');
        for byte in value.bytes() {
            if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                out.push(char::from(byte));
            } else {
                out.push_str(&format!("%{byte:02X}"));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_encoded() {
        let query = [
            ("limit", "1".into()),
            ("fieldSelector", "spec.nodeName!=".into()),
        ];
        assert_eq!(encode(&query), "limit=1&fieldSelector=spec.nodeName%21%3D");
    }

    #[test]
    fn a_line_is_an_event_a_fault_or_passed_over() {
        let bookmark = r#"{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"7"}}}"#;
        assert!(matches!(parse_line(bookmark), Ok(Some(Line::Bookmark(7)))));
        let added = r#"{"type":"ADDED","object":{"x":1}}"#;
        assert!(matches!(parse_line(added), Ok(Some(Line::Applied(o))) if o.get() == r#"{"x":1}"#));
        let gone = r#"{"type":"ERROR","object":{"code":410,"message":"too old"}}"#;
        assert!(matches!(parse_line(gone), Err(Fault::Expired)));
        for odd in [
            "",
            "{",
            "[]",
            r#"{"type":"NEW","object":{}}"#,
            r#"{"type":"BOOKMARK","object":{}}"#,
        ] {
            assert!(matches!(parse_line(odd), Ok(None)), "{odd}");
        }
    }

    #[test]
    fn a_page_may_be_empty_but_not_without_a_revision() {
        let page =
            parse_page(br#"{"metadata":{"resourceVersion":"9","continue":"t"},"items":null}"#);
        let page = page.unwrap();
        assert_eq!(
            (page.revision, page.next.as_deref(), page.items.len()),
            (9, Some("t"), 0)
        );
        assert!(matches!(
            parse_page(br#"{"metadata":{}}"#),
            Err(Fault::Unreadable(_))
        ));
    }

    #[test]
    fn a_status_says_what_to_do() {
        assert!(matches!(
            fault_of(403, String::new(), None),
            Fault::Forbidden(_)
        ));
        let long = fault_of(429, "x".repeat(999), Some(Duration::from_secs(9999)));
        let Fault::Throttled { message, after } = long else {
            panic!()
        };
        assert_eq!((message.len(), after), (300, Some(LONGEST_PAUSE)));
        assert!(matches!(
            fault_of(0, String::new(), None),
            Fault::Status { code: 0, .. }
        ));
    }
}
