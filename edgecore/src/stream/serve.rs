//! One connection of the node's API: one request, its answer, and what follows an upgrade.
//!
//! Everything that a request causes is part of this one future: whoever drops it ends all of it.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use common::stream::{LONGEST_HEAD, gate::gate};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use http::header::{CONNECTION, HeaderValue};
use http::{Request, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
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
    let (io, gate) = gate(io);
    let service = service_fn(|request: Request<Incoming>| {
        let refused = request.extensions().get::<OnUpgrade>().cloned();
        let answered = answer(request);
        let (slot, gate) = (after.clone(), gate.clone());
        async move {
            let mut answer = answered.await;
            if answer.response.status() != StatusCode::SWITCHING_PROTOCOLS {
                let close = HeaderValue::from_static("close");
                answer.response.headers_mut().insert(CONNECTION, close);
                answer.after = refused.map(|asker| shut(asker).boxed());
            }
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = answer.after;
            Ok::<_, Infallible>(answer.response.map(|body| gate.before(body)))
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

/// hyper leaves a connection on which an upgrade was asked for to whoever takes it, also when it was
/// refused. A stream that is dropped then breaks off, and the refusal may be lost on its way.
async fn shut(asker: OnUpgrade) {
    // An error means that hyper has shut it down itself.
    if let Ok(io) = asker.await {
        let _ = TokioIo::new(io).shutdown().await;
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::pin::Pin;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::task::{Context, Poll};

    use bytes::Bytes;
    use http_body_util::{BodyExt, StreamBody};
    use hyper::body::Frame;
    use tokio::io::{AsyncReadExt as _, DuplexStream, ReadBuf};

    use super::*;
    use crate::stream::{TEXT, document};

    /// Remembers whether it was shut down before it was dropped.
    struct Watched(DuplexStream, Arc<AtomicBool>);

    impl AsyncRead for Watched {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buffer: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_read(cx, buffer)
        }
    }

    impl AsyncWrite for Watched {
        fn poll_write(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.0).poll_write(cx, bytes)
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.1.store(true, Ordering::Relaxed);
            Pin::new(&mut self.0).poll_shutdown(cx)
        }
    }

    async fn refusal_of(head: &str) -> (String, bool) {
        let (mut asker, io) = tokio::io::duplex(4096);
        let shut = Arc::new(AtomicBool::new(false));
        asker.write_all(head.as_bytes()).await.unwrap();
        let answer = |_| async {
            let mut response = document(TEXT, "no such pod");
            *response.status_mut() = StatusCode::NOT_FOUND;
            Answer::from(response)
        };
        serve(Watched(io, shut.clone()), answer).await;
        let mut said = String::new();
        asker.read_to_string(&mut said).await.unwrap();
        (said, shut.load(Ordering::Relaxed))
    }

    #[tokio::test]
    async fn a_refused_upgrade_ends_its_stream_properly_as_a_plain_answer_does() {
        for head in [
            "GET /pods HTTP/1.1\r\nHost: n\r\n\r\n",
            "POST /exec/a/b/c HTTP/1.1\r\nHost: n\r\nContent-Length: 0\r\n\
             Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n",
        ] {
            let (said, shut) = refusal_of(head).await;
            assert!(said.starts_with("HTTP/1.1 404 "), "{said}");
            assert!(said.ends_with("no such pod"), "{said}");
            assert!(shut, "broken off: {head}");
        }
    }

    #[tokio::test]
    async fn of_an_answer_that_nobody_reads_little_is_made() {
        const PIECE: usize = 8 << 10;
        let (mut asker, io) = tokio::io::duplex(4096);
        let made = Arc::new(AtomicUsize::new(0));
        let counter = made.clone();
        let answer = move |_| {
            let counter = counter.clone();
            async move {
                let pieces = futures::stream::repeat_with(move || {
                    counter.fetch_add(1, Ordering::Relaxed);
                    Ok(Frame::data(Bytes::from_static(&[7; PIECE])))
                });
                Answer::from(http::Response::new(BodyExt::boxed_unsync(StreamBody::new(
                    pieces,
                ))))
            }
        };
        let served = tokio::spawn(serve(io, answer));
        asker
            .write_all(b"GET /containerLogs/a/b/c HTTP/1.1\r\nHost: n\r\n\r\n")
            .await
            .unwrap();
        asker.read_exact(&mut [0; PIECE]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        let before = made.load(Ordering::Relaxed);
        assert!(before * PIECE <= 64 << 10, "{before} pieces");
        asker.read_exact(&mut vec![0; 32 * PIECE]).await.unwrap();
        assert!(made.load(Ordering::Relaxed) >= 32, "it goes on");
        served.abort();
    }
}
