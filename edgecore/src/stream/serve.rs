//! One connection of the node's API: one request, its answer, and what follows an upgrade.
//!
//! Everything that a request causes is part of this one future: whoever drops it ends all of it.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use common::stream::LONGEST_HEAD;
use futures::future::BoxFuture;
use http::header::{CONNECTION, HeaderValue};
use http::{Request, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tracing::debug;

use super::Answer;

/// A head is sent at once; over a thin link a long command takes a while.
const HEAD_DEADLINE: Duration = Duration::from_secs(20);

/// Serves until both the answer and what follows it have ended.
pub async fn serve<I, F>(io: I, answer: impl Fn(Request<Incoming>) -> F)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Future<Output = Answer>,
{
    let after: Arc<Mutex<Option<BoxFuture<'static, ()>>>> = Arc::default();
    let service = service_fn(|request| {
        let answered = answer(request);
        let slot = after.clone();
        async move {
            let mut answer = answered.await;
            if answer.response.status() != StatusCode::SWITCHING_PROTOCOLS {
                let close = HeaderValue::from_static("close");
                answer.response.headers_mut().insert(CONNECTION, close);
            }
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = answer.after;
            Ok::<_, Infallible>(answer.response)
        }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_DEADLINE)
        .max_buf_size(LONGEST_HEAD)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(io), service)
        .with_upgrades()
        .await;
    if let Err(error) = served {
        debug!(%error, "a connection of the node's API ended early");
    }
    let after = after.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(after) = after {
        after.await;
    }
}
