//! The one task of a WebSocket connection: moves messages between socket and mux, pings, and
//! notices when the link is dead.
//!
//! A message is handed to the socket only when the one before has left: what is urgent then waits
//! behind one message and the kernel's low-water mark, not behind a buffer. Where messages leave in
//! no time, a few go together: on a fast link what they cost is the calls, and a few wait no longer.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::{Sink, Stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_tungstenite::tungstenite::Message;

use super::{Core, TOGETHER, Wire, wire_error};
use crate::hub::mux::{MAX_MESSAGE, Side};
use crate::hub::transport::{LinkConfig, TransportError};

/// Messages in one turn, so that a busy connection leaves room for the others on its thread.
const TURN: usize = 32;
/// Messages that go together on a fast link.
const MOST: usize = TOGETHER / MAX_MESSAGE;
/// A link is fast while what was handed over leaves within this, and slow from the other on.
const FAST: Duration = Duration::from_millis(1);
const SLOW: Duration = Duration::from_millis(5);
/// How long the last words may take to leave.
const LAST_WORDS: Duration = Duration::from_secs(1);

pub(super) struct Driver {
    ws: Wire,
    core: Arc<Core>,
    /// The dialling side's rhythm.
    ping_every: Option<Duration>,
    dead_after: Duration,
    heard: Instant,
    /// When the ping that is not answered yet was sent.
    pinged: Option<Instant>,
    next_ping: Option<Instant>,
    ping_id: u32,
    /// Since when messages have been waiting to leave.
    writing: Option<Instant>,
    /// How many of them may go together.
    together: usize,
    closing: Option<Instant>,
    timer: Pin<Box<Sleep>>,
}

impl Drop for Driver {
    /// The first end counts: this one is for a driver that did not come to its own.
    fn drop(&mut self) {
        self.core.end(TransportError::gone());
    }
}

impl Driver {
    pub(super) fn new(ws: Wire, core: Arc<Core>, side: Side, link: &LinkConfig) -> Self {
        let now = Instant::now();
        let ping_every = match side {
            Side::Dialler => Some(link.ping_every),
            Side::Listener => None,
        };
        let first = now + ping_every.unwrap_or(link.dead_after);
        Self {
            ws,
            core,
            ping_every,
            dead_after: link.dead_after,
            heard: now,
            pinged: None,
            next_ping: ping_every.map(|every| now + every),
            ping_id: 0,
            writing: None,
            together: 1,
            closing: None,
            timer: Box::pin(sleep_until(first)),
        }
    }

    /// Boxed, since a future holds what it was given and what it works on.
    pub(super) async fn run(mut self: Box<Self>) {
        let end = std::future::poll_fn(|cx| self.poll(cx)).await;
        tracing::debug!(reason = %end, "websocket connection ended");
        let ours = matches!(end, TransportError::ClosedHere);
        self.core.end(end);
        if ours {
            // Reading on until the peer hangs up: a socket closed over unread bytes is reset, and
            // the reset would overtake the last words.
            let tls = self.ws.get_mut();
            let goodbye = Box::pin(async {
                tls.shutdown().await?;
                let mut sink = [0; 1024];
                while tls.read(&mut sink).await? > 0 {}
                Ok::<_, std::io::Error>(())
            });
            // Whatever comes of it, the connection is over.
            drop(tokio::time::timeout(LAST_WORDS, goodbye).await);
        }
    }

    /// Ready when the connection is over.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<TransportError> {
        self.core.driver.register(cx.waker());
        if let Poll::Ready(end) = self.poll_read(cx) {
            return Poll::Ready(end);
        }
        if let Poll::Ready(end) = self.poll_write(cx) {
            return Poll::Ready(end);
        }
        self.poll_time(cx)
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<TransportError> {
        for _ in 0..TURN {
            let message = match ready!(Pin::new(&mut self.ws).poll_next(cx)) {
                Some(Ok(message)) => message,
                Some(Err(e)) => return Poll::Ready(wire_error(e)),
                None => return Poll::Ready(TransportError::gone()),
            };
            self.heard = Instant::now();
            match message {
                Message::Binary(bytes) => {
                    if let Some(end) = self.take(bytes) {
                        return Poll::Ready(end);
                    }
                }
                // Answered by the library; middleboxes send them.
                Message::Ping(_) | Message::Pong(_) => {}
                Message::Close(_) => return Poll::Ready(TransportError::gone()),
                Message::Text(_) | Message::Frame(_) => {
                    let what = "a WebSocket message is not binary".to_owned();
                    return Poll::Ready(TransportError::Protocol(what));
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn take(&mut self, bytes: bytes::Bytes) -> Option<TransportError> {
        let (received, closed, ponged) = self.core.with(|state| {
            let received = state.mux.receive(bytes);
            (received, state.mux.closed_by_peer().cloned(), state.ponged)
        });
        if let Err(violation) = received {
            return Some(violation.into());
        }
        if ponged || self.core.with(|state| std::mem::take(&mut state.ponged)) {
            self.pinged = None;
        }
        closed.map(|(code, reason)| TransportError::ClosedByPeer { code, reason })
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<TransportError> {
        for _ in 0..TURN {
            if let Some(since) = self.writing {
                match ready!(Pin::new(&mut self.ws).poll_flush(cx)) {
                    Ok(()) => self.left(since),
                    Err(e) => return Poll::Ready(wire_error(e)),
                }
            }
            for _ in 0..self.together {
                let (message, closing) = self
                    .core
                    .with(|state| (state.mux.transmit(), state.mux.is_closing()));
                match message {
                    Some(message) => {
                        self.writing.get_or_insert_with(Instant::now);
                        // The flush that follows tells when it has left.
                        let sent = Pin::new(&mut self.ws).start_send(Message::Binary(message));
                        if let Err(e) = sent {
                            return Poll::Ready(wire_error(e));
                        }
                    }
                    None if self.writing.is_some() => break,
                    None if closing => return Poll::Ready(TransportError::ClosedHere),
                    None => return Poll::Pending,
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// What was handed over has left.
    fn left(&mut self, since: Instant) {
        self.writing = None;
        let took = since.elapsed();
        let before = self.together;
        if took >= SLOW {
            self.together = 1;
        } else if took < FAST {
            self.together = (self.together * 2).min(MOST);
        }
        let fast = self.together == MOST;
        if fast != (before == MOST) {
            self.ws.get_mut().get_mut().0.set_fast(fast);
        }
    }

    fn poll_time(&mut self, cx: &mut Context<'_>) -> Poll<TransportError> {
        if self.closing.is_none() && self.core.lock().mux.is_closing() {
            let latest = Instant::now() + LAST_WORDS;
            self.closing = Some(latest);
            self.timer.as_mut().reset(latest);
        }
        loop {
            ready!(self.timer.as_mut().poll(cx));
            let now = Instant::now();
            if self.closing.is_some_and(|latest| now >= latest) {
                return Poll::Ready(TransportError::ClosedHere);
            }
            let silent = |since: Instant| now >= since + self.dead_after;
            if silent(self.heard) || self.pinged.is_some_and(silent) {
                return Poll::Ready(TransportError::Timeout("the link is silent"));
            }
            if self.writing.is_some_and(silent) {
                return Poll::Ready(TransportError::Timeout("the peer takes nothing any more"));
            }
            self.ping_if_due(now, cx);
            let next = self.next_deadline();
            self.timer.as_mut().reset(next);
        }
    }

    fn ping_if_due(&mut self, now: Instant, cx: &Context<'_>) {
        let (Some(every), Some(due)) = (self.ping_every, self.next_ping) else {
            return;
        };
        if now < due {
            return;
        }
        self.next_ping = Some(now + every);
        self.ping_id = self.ping_id.wrapping_add(1);
        self.pinged.get_or_insert(now);
        let id = self.ping_id;
        self.core.with(|state| state.mux.ping(id));
        cx.waker().wake_by_ref();
    }

    /// All of these only move away while the timer runs, so a timer that fires early looks again.
    fn next_deadline(&self) -> Instant {
        let dead = |since: Instant| since + self.dead_after;
        let mut next = dead(self.heard);
        for other in [
            self.pinged.map(dead),
            self.writing.map(dead),
            self.next_ping,
            self.closing,
        ] {
            next = other.map_or(next, |o| next.min(o));
        }
        next
    }
}
