//! The runtime's own streaming server: where an exec, attach or port-forward really happens.
//!
//! CRI gives a URL for each; the request's head is sent there as it came, and after `101` the two
//! connections are one. Only loopback is dialled: a URL comes from another process.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use common::stream::{LONGEST_HEAD, carried};
use futures::FutureExt as _;
use http::header::{CONTENT_LENGTH, HOST, HeaderValue};
use http::uri::Scheme;
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// It listens on this device.
const DIAL_DEADLINE: Duration = Duration::from_secs(5);
/// From the request to the answer's head; the runtime may be busy with a start.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);
/// What a runtime says when it refuses is a sentence.
const LONGEST_REFUSAL: usize = 64 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum StreamingError {
    #[error("the container runtime's streaming server is at {0:?}, which is no http:// address")]
    Scheme(String),
    #[error(
        "the container runtime's streaming server is at {0}: only a loopback address is dialled; set \
         the runtime's stream server address to 127.0.0.1"
    )]
    NotLocal(String),
    #[error("the container runtime's streaming server does not answer at {0}")]
    Dial(SocketAddr, #[source] io::Error),
    #[error("the container runtime's streaming server broke off")]
    Http(#[from] hyper::Error),
    #[error("the container runtime's streaming server gave no answer within {} s", .0.as_secs())]
    Deadline(Duration),
    #[error("the container runtime's streaming server said more than can be passed on")]
    Refusal(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// What the runtime answered.
#[derive(Debug)]
pub(super) enum Answered {
    /// `101`, and the connection behind it.
    Joined(HeaderMap, TokioIo<Upgraded>),
    /// Anything else, whole.
    Refused(StatusCode, HeaderMap, Bytes),
}

/// Where a URL leads to (pure).
fn address(url: &Uri) -> Result<SocketAddr, StreamingError> {
    if url.scheme() != Some(&Scheme::HTTP) {
        // Without the path: a token is in it.
        let start = url.scheme_str().unwrap_or("none");
        return Err(StreamingError::Scheme(format!("{start}://…")));
    }
    let host = url.host().unwrap_or_default();
    let ip: Option<IpAddr> = match host.trim_start_matches('[').trim_end_matches(']') {
        "localhost" => Some(Ipv4Addr::LOCALHOST.into()),
        text => text.parse().ok(),
    };
    let ip = ip.filter(IpAddr::is_loopback);
    let ip = ip.ok_or_else(|| StreamingError::NotLocal(host.to_owned()))?;
    Ok(SocketAddr::new(ip, url.port_u16().unwrap_or(80)))
}

/// Sends a request's head to the URL and waits for the answer.
pub(super) async fn ask(
    url: &str,
    method: Method,
    headers: &HeaderMap,
) -> Result<Answered, StreamingError> {
    let url: Uri = url
        .parse()
        .map_err(|_| StreamingError::Scheme("…".to_owned()))?;
    let address = address(&url)?;
    let dialled = tokio::time::timeout(DIAL_DEADLINE, TcpStream::connect(address));
    let stream = match dialled.await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(StreamingError::Dial(address, error)),
        Err(_) => return Err(StreamingError::Deadline(DIAL_DEADLINE)),
    };
    // A keystroke waits for no other.
    stream
        .set_nodelay(true)
        .map_err(|e| StreamingError::Dial(address, e))?;
    let asked = exchange(stream, request(&url, address, method, headers));
    match tokio::time::timeout(ANSWER_DEADLINE, asked).await {
        Ok(answered) => answered,
        Err(_) => Err(StreamingError::Deadline(ANSWER_DEADLINE)),
    }
}

fn request(
    url: &Uri,
    address: SocketAddr,
    method: Method,
    headers: &HeaderMap,
) -> Request<Empty<Bytes>> {
    let path = url.path_and_query().map_or("/", |p| p.as_str());
    let mut request = Request::new(Empty::new());
    *request.method_mut() = method;
    // A path of a URI that was parsed is one.
    *request.uri_mut() = Uri::try_from(path).unwrap_or_default();
    *request.headers_mut() = carried(headers);
    // There is no body: what the asker sends before the upgrade goes nowhere.
    request.headers_mut().remove(CONTENT_LENGTH);
    let host = HeaderValue::try_from(address.to_string());
    let host = host.unwrap_or(HeaderValue::from_static("localhost"));
    request.headers_mut().insert(HOST, host);
    request
}

async fn exchange(
    stream: TcpStream,
    request: Request<Empty<Bytes>>,
) -> Result<Answered, StreamingError> {
    let (mut sender, connection) = http1::Builder::new()
        .max_buf_size(LONGEST_HEAD)
        .handshake(TokioIo::new(stream))
        .await?;
    let mut connection = std::pin::pin!(connection.with_upgrades().fuse());
    let work = async {
        let response = sender.send_request(request).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return refused(response).await;
        }
        let headers = carried(response.headers());
        let upgraded = hyper::upgrade::on(response).await?;
        Ok(Answered::Joined(headers, TokioIo::new(upgraded)))
    };
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            biased;
            answered = &mut work => return answered,
            // Its end is told to `work`, which then ends too.
            _ = &mut connection => {}
        }
    }
}

async fn refused(response: Response<Incoming>) -> Result<Answered, StreamingError> {
    let (parts, body) = response.into_parts();
    let body = Limited::new(body, LONGEST_REFUSAL).collect().await;
    let body = body.map_err(StreamingError::Refusal)?.to_bytes();
    let mut headers = carried(&parts.headers);
    headers.remove(CONTENT_LENGTH);
    Ok(Answered::Refused(parts.status, headers, body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_over_plain_http_is_dialled() {
        let parsed = |url: &str| address(&url.parse().unwrap());
        for (url, want) in [
            ("http://127.0.0.1:4001/exec/t", "127.0.0.1:4001"),
            ("http://[::1]:4001/exec/t", "[::1]:4001"),
            ("http://localhost:4001/exec/t", "127.0.0.1:4001"),
            ("http://127.0.0.1/exec/t", "127.0.0.1:80"),
        ] {
            assert_eq!(parsed(url).unwrap().to_string(), want, "{url}");
        }
        for (url, word) in [
            ("http://192.0.2.1:4001/exec/secret", "only a loopback"),
            ("http://example.org:4001/exec/secret", "only a loopback"),
            ("https://127.0.0.1:4001/exec/secret", "no http://"),
            ("/exec/secret", "no http://"),
        ] {
            let error = parsed(url).unwrap_err().to_string();
            assert!(error.contains(word), "{url}: {error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }
}
