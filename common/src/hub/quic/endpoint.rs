//! One socket and all its connections: who gets which datagram, and who is let in.
//!
//! quinn's protocol decides; this gives it a socket and a clock. A connection that rests costs a
//! table's entry and a mailbox here: quinn's own driver sets aside room for 32 datagrams, 6.7 KB,
//! for each.
//!
//! ```text
//! socket ── receive ──┬── known ──► mailbox ──► the connection's task
//!                     ├── new ────► strangers ─► admit, retry or refuse
//!                     └── neither: a reset, or nothing
//! ```

use std::collections::{HashMap, VecDeque};
use std::mem;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use futures::task::AtomicWaker;
use quinn_proto::{
    ClientConfig, ConnectError, ConnectionError, ConnectionEvent, ConnectionHandle, DatagramEvent,
    EndpointConfig, Incoming, ServerConfig, Transmit,
};
use tokio::sync::{Notify, mpsc};
use tokio_util::task::AbortOnDropHandle;

use super::connection::QuicLink;
use super::socket::{Datagram, Received, Socket, with_buffer};

/// Bytes that may wait for a connection's task; more is lost, as datagrams may be. Far more than
/// comes in a turn: only a flood gets there.
const MAIL: usize = 2 << 20;

/// Datagrams after which those have their turn who were woken by them.
const TURN: usize = 256;

/// A socket that cannot be read is tried again after this.
const PAUSE: Duration = Duration::from_millis(100);

/// What a connection has not yet taken.
#[derive(Default)]
pub(super) struct Mailbox {
    letters: Mutex<Letters>,
    /// The connection's task.
    task: AtomicWaker,
}

#[derive(Default)]
struct Letters {
    /// With the bytes of each.
    events: VecDeque<(ConnectionEvent, usize)>,
    bytes: usize,
}

impl Mailbox {
    fn lock(&self) -> MutexGuard<'_, Letters> {
        self.letters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A datagram of so many bytes.
    fn put(&self, event: ConnectionEvent, bytes: usize) {
        let mut letters = self.lock();
        if letters.bytes >= MAIL {
            return;
        }
        letters.bytes += bytes;
        letters.events.push_back((event, bytes));
        let first = letters.events.len() == 1;
        drop(letters);
        // Else it was woken already.
        if first {
            self.wake();
        }
    }

    /// At most [`TURN`]; whoever takes them is woken again for the rest.
    pub(super) fn take(&self) -> VecDeque<(ConnectionEvent, usize)> {
        let mut letters = self.lock();
        let rest = match letters.events.len() {
            0..=TURN => VecDeque::new(),
            _more => letters.events.split_off(TURN),
        };
        let taken = mem::replace(&mut letters.events, rest);
        letters.bytes -= taken.iter().map(|(_, bytes)| bytes).sum::<usize>();
        if !letters.events.is_empty() {
            self.wake();
        }
        taken
    }

    /// Whom to wake; before the mail is taken, so that none is missed.
    pub(super) fn register(&self, task: &Waker) {
        self.task.register(task);
    }

    /// Something changed for the connection's task.
    pub(super) fn wake(&self) {
        self.task.wake();
    }
}

/// Lives as long as a handle or a connection does.
pub(in crate::hub) struct Endpoint {
    state: Mutex<State>,
    pub(super) socket: Arc<Socket>,
    /// The last connection is gone.
    idle: Notify,
    receiver: OnceLock<AbortOnDropHandle<()>>,
}

struct State {
    proto: quinn_proto::Endpoint,
    mail: HashMap<ConnectionHandle, Arc<Mailbox>>,
}

/// Those who knock, as many as the configuration lets wait: each must be given back to
/// [`Endpoint::admit`], [`Endpoint::retry`] or [`Endpoint::refuse`]. Ends with the endpoint, and when
/// its socket is not read any more.
pub(in crate::hub) type Strangers = mpsc::UnboundedReceiver<Incoming>;

impl Endpoint {
    /// Within a runtime.
    pub(super) fn new(
        socket: std::net::UdpSocket,
        config: EndpointConfig,
        server: Option<ServerConfig>,
    ) -> std::io::Result<(Arc<Self>, Strangers)> {
        let socket = Arc::new(Socket::new(socket)?);
        let (strangers, knocking) = mpsc::unbounded_channel();
        let probes = !socket.may_fragment();
        let server = server.map(Arc::new);
        let state = State {
            proto: quinn_proto::Endpoint::new(Arc::new(config), server, probes, None),
            mail: HashMap::new(),
        };
        let endpoint = Arc::new(Self {
            state: Mutex::new(state),
            socket,
            idle: Notify::new(),
            receiver: OnceLock::new(),
        });
        let receiver = Receiver {
            socket: endpoint.socket.clone(),
            endpoint: Arc::downgrade(&endpoint),
            strangers,
        };
        let receiver = AbortOnDropHandle::new(tokio::spawn(receiver.run()));
        // It is the first.
        let _ = endpoint.receiver.set(receiver);
        Ok((endpoint, knocking))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn connect(
        self: &Arc<Self>,
        config: ClientConfig,
        address: SocketAddr,
        name: &str,
    ) -> Result<QuicLink, ConnectError> {
        let mut state = self.lock();
        let (handle, proto) = state.proto.connect(now(), config, address, name)?;
        let mail = state.enter(handle);
        drop(state);
        Ok(QuicLink::start(self.clone(), handle, proto, mail))
    }

    /// Goes on with the handshake.
    pub(in crate::hub) fn admit(
        self: &Arc<Self>,
        stranger: Incoming,
    ) -> Result<QuicLink, ConnectionError> {
        with_buffer(|buffer| {
            let mut state = self.lock();
            match state.proto.accept(stranger, now(), buffer, None) {
                Ok((handle, proto)) => {
                    let mail = state.enter(handle);
                    drop(state);
                    Ok(QuicLink::start(self.clone(), handle, proto, mail))
                }
                Err(error) => {
                    drop(state);
                    self.respond(error.response, buffer);
                    Err(error.cause)
                }
            }
        })
    }

    /// Asks the stranger to knock again, so that its address is known to be its own.
    pub(in crate::hub) fn retry(&self, stranger: Incoming) {
        with_buffer(|buffer| {
            let asked = self.lock().proto.retry(stranger, buffer);
            match asked {
                Ok(transmit) => self.respond(Some(transmit), buffer),
                // It has done so before.
                Err(error) => self.lock().proto.ignore(error.into_incoming()),
            }
        });
    }

    pub(in crate::hub) fn refuse(&self, stranger: Incoming) {
        with_buffer(|buffer| {
            let transmit = self.lock().proto.refuse(stranger, buffer);
            self.respond(Some(transmit), buffer);
        });
    }

    /// For those who knock from now on; without one they are not heard.
    pub(in crate::hub) fn set_server_config(&self, server: Option<ServerConfig>) {
        self.lock().proto.set_server_config(server.map(Arc::new));
    }

    /// Waits until no connection is left, their last words said.
    pub(in crate::hub) async fn idle(&self) {
        loop {
            let idle = self.idle.notified();
            if self.lock().mail.is_empty() {
                return;
            }
            idle.await;
        }
    }

    /// An answer to one who is no connection; without room it is lost, and asked for again.
    fn respond(&self, transmit: Option<Transmit>, bytes: &[u8]) {
        if let Some(transmit) = transmit {
            let _sent = self.socket.send(&transmit, bytes);
        }
    }

    /// What a connection tells its endpoint; true when that told something back.
    pub(super) fn hear(
        &self,
        handle: ConnectionHandle,
        connection: &mut quinn_proto::Connection,
    ) -> bool {
        let mut answered = false;
        while let Some(event) = connection.poll_endpoint_events() {
            let mut state = self.lock();
            if event.is_drained() {
                state.mail.remove(&handle);
                if state.mail.is_empty() {
                    self.idle.notify_waiters();
                }
            }
            let answer = state.proto.handle_event(handle, event);
            drop(state);
            if let Some(answer) = answer {
                connection.handle_event(answer);
                answered = true;
            }
        }
        answered
    }

    /// A connection is gone, perhaps without having said so. Its handle may be another's by now; its
    /// mailbox is its own.
    pub(super) fn forget(&self, handle: ConnectionHandle, mail: &Arc<Mailbox>) {
        let mut state = self.lock();
        let place = state.mail.get(&handle);
        if place.is_some_and(|place| Arc::ptr_eq(place, mail)) {
            state.mail.remove(&handle);
            let gone = quinn_proto::EndpointEvent::drained();
            state.proto.handle_event(handle, gone);
        }
        if state.mail.is_empty() {
            self.idle.notify_waiters();
        }
    }

    /// Gives a datagram to whom it is for. The lock is held for one at a time: there may be many.
    fn take(
        &self,
        now: Instant,
        (meta, ecn, bytes): Datagram<'_>,
        strangers: &mpsc::UnboundedSender<Incoming>,
    ) {
        with_buffer(|buffer| {
            let length = bytes.len();
            let bytes = BytesMut::from(bytes);
            let mut state = self.lock();
            let event = state
                .proto
                .handle(now, meta.addr, meta.dst_ip, ecn, bytes, buffer);
            match event {
                Some(DatagramEvent::ConnectionEvent(handle, event)) => {
                    if let Some(mail) = state.mail.get(&handle) {
                        mail.put(event, length);
                    }
                }
                Some(DatagramEvent::NewConnection(stranger)) => {
                    if let Err(unheard) = strangers.send(stranger) {
                        state.proto.ignore(unheard.0);
                    }
                }
                Some(DatagramEvent::Response(transmit)) => {
                    drop(state);
                    self.respond(Some(transmit), buffer);
                }
                None => {}
            }
        });
    }
}

impl State {
    fn enter(&mut self, handle: ConnectionHandle) -> Arc<Mailbox> {
        let mail = Arc::<Mailbox>::default();
        self.mail.insert(handle, mail.clone());
        mail
    }
}

/// The runtime's time, which tests may stop.
pub(super) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// The task that reads the socket.
struct Receiver {
    socket: Arc<Socket>,
    endpoint: Weak<Endpoint>,
    /// Here, so that a listener hears of this task's end.
    strangers: mpsc::UnboundedSender<Incoming>,
}

impl Receiver {
    async fn run(self) {
        let mut received = Received::default();
        let (mut taken, mut failed) = (0, 0_u64);
        loop {
            if let Err(error) = self.socket.receive(&mut received).await {
                failed += 1;
                // At 1, 2, 4, 8, ...
                if failed.is_power_of_two() {
                    tracing::warn!(%error, failed, "cannot read from the UDP socket");
                }
                tokio::time::sleep(PAUSE).await;
                continue;
            }
            let Some(endpoint) = self.endpoint.upgrade() else {
                return;
            };
            let now = now();
            for datagram in received.datagrams() {
                endpoint.take(now, datagram, &self.strangers);
                taken += 1;
            }
            drop(endpoint);
            if taken >= TURN {
                taken = 0;
                turn().await;
            }
        }
    }
}

/// Lets those go first who were woken meanwhile.
async fn turn() {
    let mut mine = false;
    std::future::poll_fn(|cx| {
        if mem::replace(&mut mine, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use quinn_proto::crypto::rustls::QuicClientConfig;

    use crate::hub::testing::{HOUR, client_tls, identity, new_ca, now_for};

    /// Datagrams as a connection gets them: to its id, and of nothing.
    fn events(number: usize) -> Vec<ConnectionEvent> {
        let ca = new_ca();
        let tls = client_tls(&ca, identity(&ca, now_for(HOUR)));
        let crypto = QuicClientConfig::try_from(tls.config.clone()).unwrap();
        let config = ClientConfig::new(Arc::new(crypto));
        let to = ([127, 0, 0, 1], 1).into();
        let mut here = quinn_proto::Endpoint::new(Arc::default(), None, false, None);
        let (_, mut connection) = here.connect(now(), config, to, "cloud").unwrap();
        let mut first = Vec::new();
        let _ = connection.poll_transmit(now(), 1, &mut first).unwrap();
        // The connection's own id, which its first datagram names.
        let own = first[6 + usize::from(first[5])..][..9].to_vec();
        assert_eq!(own[0], 8, "an id of eight bytes");
        let mut datagram = [0x40; 40];
        datagram[1..9].copy_from_slice(&own[1..]);
        let mut given = Vec::new();
        for _ in 0..number {
            let bytes = BytesMut::from(&datagram[..]);
            match here.handle(now(), to, None, None, bytes, &mut Vec::new()) {
                Some(DatagramEvent::ConnectionEvent(_, event)) => given.push(event),
                _ => panic!("it is not for the connection"),
            }
        }
        given
    }

    #[tokio::test]
    async fn mail_is_taken_in_turns_and_what_floods_it_is_lost() {
        let mail = Mailbox::default();
        let all = 2 * TURN + 7;
        events(all).into_iter().for_each(|event| mail.put(event, 1));
        let turns: Vec<_> = std::iter::repeat_with(|| mail.take().len())
            .take_while(|taken| *taken > 0)
            .collect();
        assert_eq!(turns, [TURN, TURN, 7]);

        let half = MAIL / 2;
        events(3)
            .into_iter()
            .for_each(|event| mail.put(event, half));
        assert_eq!(mail.take().len(), 2, "the third is beyond the bound");
        events(1)
            .into_iter()
            .for_each(|event| mail.put(event, half));
        assert_eq!(mail.take().len(), 1, "what was taken does not count");
    }
}
