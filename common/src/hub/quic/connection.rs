//! A connection: what its task does, and what its handles ask of it.
//!
//! ```text
//!  mailbox ──► handle_event ─┐
//!  alarm ────► handle_timeout ┼─ quinn's protocol ─► datagrams ──► socket
//!  streams ──► read, write ──┘                    └► events ─────► who waits
//! ```
//!
//! The lock is not held while the kernel takes datagrams: streams go on meanwhile.

use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::BoxFuture;
use quinn_proto::{
    ConnectionError, ConnectionHandle, Dir, Event, StreamEvent, StreamId, Transmit,
    TransportErrorCode,
};
use rustls_pki_types::CertificateDer;
use tokio::sync::Notify;
use tokio::time::Sleep;

use super::endpoint::{Endpoint, Mailbox, now};
use super::socket::with_buffer;
use super::stream::{RecvStream, SendStream};
use crate::hub::transport::{Class, TransportError};

/// Datagrams that a connection sends before others have their turn.
const TURN: usize = 64;
/// An alarm that is not set.
const NEVER: Duration = Duration::from_secs(365 * 24 * 3600);
/// What a peer may be told about an end.
const REASON: usize = 256;

/// A handle. The last of these and of the streams closes the connection.
#[derive(Clone)]
pub(in crate::hub) struct QuicLink(Arc<Handle>);

pub(super) struct Handle(Arc<Shared>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.close(0, b"");
    }
}

impl std::ops::Deref for Handle {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

pub(super) struct Shared {
    state: Mutex<State>,
    mail: Arc<Mailbox>,
    /// Of the connection: it is established or has ended, a stream came, or one may be opened.
    news: Notify,
    endpoint: Arc<Endpoint>,
    handle: ConnectionHandle,
}

pub(super) struct State {
    pub(super) proto: quinn_proto::Connection,
    established: bool,
    pub(super) ended: Option<ConnectionError>,
    pub(super) readers: Waiting,
    pub(super) writers: Waiting,
}

/// Who waits for which stream: few at a time.
#[derive(Default)]
pub(super) struct Waiting(Vec<(StreamId, Waker)>);

impl Waiting {
    pub(super) fn add(&mut self, stream: StreamId, waker: &Waker) {
        match self.0.iter_mut().find(|(one, _)| *one == stream) {
            Some((_, place)) => place.clone_from(waker),
            None => self.0.push((stream, waker.clone())),
        }
    }

    pub(super) fn remove(&mut self, stream: StreamId) -> Option<Waker> {
        let place = self.0.iter().position(|(one, _)| *one == stream)?;
        Some(self.0.swap_remove(place).1)
    }

    /// False when nobody waits for it.
    fn wake(&mut self, stream: StreamId) -> bool {
        let waker = self.remove(stream);
        let waits = waker.is_some();
        waker.into_iter().for_each(Waker::wake);
        waits
    }

    fn wake_all(&mut self) {
        self.0.drain(..).for_each(|(_, waker)| waker.wake());
    }
}

impl QuicLink {
    pub(super) fn start(
        endpoint: Arc<Endpoint>,
        handle: ConnectionHandle,
        proto: quinn_proto::Connection,
        mail: Arc<Mailbox>,
    ) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                proto,
                established: false,
                ended: None,
                readers: Waiting::default(),
                writers: Waiting::default(),
            }),
            mail,
            news: Notify::new(),
            endpoint,
            handle,
        });
        tokio::spawn(drive(End(shared.clone())));
        Self(Arc::new(Handle(shared)))
    }

    /// Waits until `ready` has an answer, or the connection's end.
    async fn until<T>(
        &self,
        mut ready: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T, ConnectionError> {
        loop {
            // Hears of what happens from here on.
            let news = self.0.news.notified();
            {
                let mut state = self.0.lock();
                if let Some(answer) = ready(&mut state) {
                    return Ok(answer);
                }
                if let Some(error) = &state.ended {
                    return Err(error.clone());
                }
            }
            news.await;
        }
    }

    /// Waits until the handshake is complete at this end.
    pub(super) async fn established(&self) -> Result<(), ConnectionError> {
        self.until(|state| state.established.then_some(())).await
    }

    /// The peer's certificates, once.
    pub(super) fn peer(&self) -> Vec<CertificateDer<'static>> {
        let state = self.0.lock();
        let any = state.proto.crypto_session().peer_identity();
        let chain = any.and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
        chain.map(|chain| *chain).unwrap_or_default()
    }

    async fn open_stream(&self, dir: Dir) -> Result<SendStream, ConnectionError> {
        let open = |state: &mut State| match &state.ended {
            // One that has ended opens streams that lead nowhere.
            Some(_) => None,
            None => state.proto.streams().open(dir),
        };
        Ok(SendStream::new(self.0.clone(), self.until(open).await?))
    }

    async fn accept_stream(&self, dir: Dir) -> Result<RecvStream, ConnectionError> {
        let accepted = self
            .until(|state| state.proto.streams().accept(dir))
            .await?;
        // The peer may be told that it may open more.
        self.0.wake();
        Ok(RecvStream::new(self.0.clone(), accepted))
    }

    pub(in crate::hub) async fn open(
        &self,
        class: Class,
    ) -> Result<(SendStream, RecvStream), TransportError> {
        let send = self.open_stream(Dir::Bi).await?;
        send.prioritise(class);
        let recv = RecvStream::new(self.0.clone(), send.id());
        Ok((send, recv))
    }

    pub(in crate::hub) async fn accept(&self) -> Result<(SendStream, RecvStream), TransportError> {
        let recv = self.accept_stream(Dir::Bi).await?;
        Ok((SendStream::new(self.0.clone(), recv.id()), recv))
    }

    /// Says an empty word: one stream, which ends at once.
    pub(super) async fn say_word(&self) -> Result<(), TransportError> {
        self.open_stream(Dir::Uni).await?.finish();
        Ok(())
    }

    /// Waits for the peer's word.
    pub(super) async fn hear_word(&self) -> Result<(), ConnectionError> {
        self.accept_stream(Dir::Uni).await.map(drop)
    }

    pub(in crate::hub) fn close(&self, code: u32, reason: &str) {
        let bytes = reason.as_bytes();
        self.0.close(code, &bytes[..bytes.len().min(REASON)]);
    }

    pub(in crate::hub) async fn closed(&self) -> TransportError {
        let ended = self.until(|state| state.ended.clone()).await;
        ended.unwrap_or_else(|error| error).into()
    }

    pub(in crate::hub) fn remote_address(&self) -> SocketAddr {
        self.0.lock().proto.remote_address()
    }

    #[cfg(test)]
    pub(in crate::hub) fn change_keys(&self) {
        self.0.lock().proto.force_key_update();
        self.0.wake();
    }
}

impl State {
    fn end(&mut self, error: ConnectionError) {
        self.ended.get_or_insert(error);
        self.readers.wake_all();
        self.writers.wake_all();
    }

    /// Wakes who waits for what happened; true when readers did.
    fn tell(&mut self, of_connection: &Notify) -> bool {
        let (mut news, mut readers) = (false, false);
        while let Some(event) = self.proto.poll() {
            match event {
                Event::Connected => {
                    self.established = true;
                    news = true;
                }
                Event::ConnectionLost { reason } => {
                    self.end(reason);
                    news = true;
                }
                Event::Stream(StreamEvent::Opened { .. } | StreamEvent::Available { .. }) => {
                    news = true;
                }
                Event::Stream(StreamEvent::Readable { id }) => {
                    readers |= self.readers.wake(id);
                }
                Event::Stream(StreamEvent::Writable { id } | StreamEvent::Stopped { id, .. }) => {
                    self.writers.wake(id);
                }
                Event::Stream(StreamEvent::Finished { .. })
                | Event::HandshakeDataReady
                | Event::DatagramReceived
                | Event::DatagramsUnblocked => {}
            }
        }
        if news {
            of_connection.notify_waiters();
        }
        readers
    }
}

/// What a connection's task keeps between its turns.
struct Desk<'a> {
    alarm: Pin<&'a mut Sleep>,
    /// Datagrams that found no room, and the wait for it.
    held: Option<(Transmit, Vec<u8>, BoxFuture<'static, ()>)>,
    /// Readers had their turn since mail came.
    waited: bool,
}

impl Desk<'_> {
    fn set_alarm(&mut self, cx: &mut Context<'_>, next: Option<Instant>) {
        use tokio::time::Instant;
        let next = next.map_or_else(|| Instant::now() + NEVER, Instant::from_std);
        // One that is set for earlier stays: most are moved on before they are due.
        if next < self.alarm.deadline() || self.alarm.is_elapsed() {
            self.alarm.as_mut().reset(next);
        }
        if self.alarm.as_mut().poll(cx).is_ready() {
            cx.waker().wake_by_ref();
        }
    }
}

/// How far sending went.
enum Sent {
    All,
    /// There is no room.
    Full,
    /// Others go first.
    Turn,
}

/// A connection's task: until its last words are said and nobody asks any more.
async fn drive(end: End) {
    let mut desk = Desk {
        alarm: pin!(tokio::time::sleep(NEVER)),
        held: None,
        waited: false,
    };
    std::future::poll_fn(|cx| end.0.poll(cx, &mut desk)).await;
}

/// Tells of the task's end, also when it panicked or the runtime ends.
struct End(Arc<Shared>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.endpoint.forget(self.0.handle, &self.0.mail);
        let error = quinn_proto::TransportError {
            code: TransportErrorCode::INTERNAL_ERROR,
            frame: None,
            reason: "the connection's task ended".to_owned(),
        };
        self.0.lock().end(error.into());
        self.0.news.notify_waiters();
    }
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There may be something to send.
    pub(super) fn wake(&self) {
        self.mail.wake();
    }

    fn close(&self, code: u32, reason: &[u8]) {
        let mut state = self.lock();
        // Of one that the peer has closed the task is about to tell.
        if state.ended.is_none() && !state.proto.is_closed() {
            let reason = Bytes::copy_from_slice(reason);
            state.proto.close(now(), code.into(), reason);
            state.end(ConnectionError::LocallyClosed);
        }
        drop(state);
        self.news.notify_waiters();
        self.wake();
    }

    fn poll(&self, cx: &mut Context<'_>, desk: &mut Desk<'_>) -> Poll<()> {
        self.mail.register(cx.waker());
        if self.open_mail() && !desk.waited {
            // What readers take lets the peer send more: one datagram says that and what came. Both
            // leave when a reader has read, or when all others here had their turn.
            desk.waited = pin!(tokio::task::yield_now()).poll(cx).is_pending();
            if desk.waited {
                return Poll::Pending;
            }
        }
        desk.waited = false;
        loop {
            // First, as the protocol has it: after a change of address a timer of the way before may
            // be due, and would find nothing under way on the new one.
            let sent = self.send(cx, desk);
            let mut state = self.lock();
            let now = now();
            let due = state.proto.poll_timeout().is_some_and(|at| at <= now);
            if due {
                state.proto.handle_timeout(now);
            }
            let answered = self.endpoint.hear(self.handle, &mut state.proto);
            state.tell(&self.news);
            let next = state.proto.poll_timeout();
            let over = state.proto.is_drained();
            drop(state);
            if over {
                return Poll::Ready(());
            }
            match sent {
                Sent::Turn => cx.waker().wake_by_ref(),
                Sent::All if answered || due => continue,
                Sent::All | Sent::Full => {}
            }
            desk.set_alarm(cx, next);
            return Poll::Pending;
        }
    }

    /// Takes what came; true when somebody reads it.
    fn open_mail(&self) -> bool {
        let mail = self.mail.take();
        if mail.is_empty() {
            return false;
        }
        let mut state = self.lock();
        for (event, _) in mail {
            state.proto.handle_event(event);
        }
        state.tell(&self.news)
    }

    fn send(&self, cx: &mut Context<'_>, desk: &mut Desk<'_>) -> Sent {
        loop {
            while let Some((transmit, bytes, room)) = &mut desk.held {
                if room.as_mut().poll(cx).is_pending() {
                    return Sent::Full;
                }
                if self.endpoint.socket.send(transmit, bytes) {
                    desk.held = None;
                } else {
                    *room = self.room();
                }
            }
            match self.send_a_turn(desk) {
                // Perhaps there is room by now; else it asks to be woken.
                Sent::Full => {}
                done => return done,
            }
        }
    }

    /// What finds no room is held.
    fn send_a_turn(&self, desk: &mut Desk<'_>) -> Sent {
        let socket = &self.endpoint.socket;
        with_buffer(|buffer| {
            let mut sent = 0;
            while sent < TURN {
                buffer.clear();
                let mut state = self.lock();
                let most = socket.at_once(state.proto.current_mtu());
                let datagrams = state.proto.poll_transmit(now(), most, buffer);
                drop(state);
                let Some(transmit) = datagrams else {
                    return Sent::All;
                };
                if !socket.send(&transmit, buffer) {
                    let bytes = buffer[..transmit.size].to_vec();
                    desk.held = Some((transmit, bytes, self.room()));
                    return Sent::Full;
                }
                sent += match transmit.segment_size {
                    Some(each) => transmit.size.div_ceil(each),
                    None => 1,
                };
            }
            Sent::Turn
        })
    }

    fn room(&self) -> BoxFuture<'static, ()> {
        let socket = self.endpoint.socket.clone();
        Box::pin(async move { socket.room().await })
    }
}

#[cfg(test)]
#[path = "connection/tests.rs"]
mod tests;
