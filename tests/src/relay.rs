//! A link with faults, in user space: this kernel has no netem. Relays UDP and TCP on one port
//! number, each way with a delay, a loss and a rate of its own, and counts what it carried.
//!
//! ```text
//!  client ──► [loss] ──► [rate: departs when the link is free] ──► [delay] ──► upstream
//!         ◄── ………………………………………… the same, downwards …………………………………………  ◄──
//! ```
//!
//! A datagram that is lost or finds the link's queue full is gone. TCP never loses: a chunk that is
//! "lost" arrives one retransmission later, and a full queue stops the reader, as TCP's own window
//! would. The queue before a rate is as long as a good router's, `STANDING`: what a sender holds
//! back is then what it can still put in another order. A relay that is cut swallows everything and
//! says nothing.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use socket2::SockRef;

use crate::bed::lock;
use crate::netns::Traffic;

/// One direction of a link.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Direction {
    pub delay: Duration,
    /// Of a thousand.
    pub loss: u32,
    /// Bytes a second; absent means as fast as it goes.
    pub rate: Option<u64>,
}

/// Both directions: `up` is towards the cloud.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Shape {
    pub up: Direction,
    pub down: Direction,
}

impl Shape {
    /// The same in both directions.
    pub fn even(direction: Direction) -> Shape {
        Shape {
            up: direction,
            down: direction,
        }
    }
}

/// How often a waiting thread looks whether the relay has ended.
const LOOK: Duration = Duration::from_millis(100);

/// Chunks on their way in one direction of one flow: at 16 KiB each, more than any window here.
const QUEUE: usize = 256;

/// A UDP flow that was silent for so long is forgotten, as a NAT would.
const FORGET: Duration = Duration::from_secs(180);

/// How far ahead of its rate a link may be. Longer queues are the fault of bad routers, and whatever
/// is in them is beyond anybody's priorities.
const STANDING: Duration = Duration::from_millis(100);

/// What the kernel may hold of a connection before the relay reads it: it stands in the same queue.
const UNREAD: usize = 64 * 1024;

/// What a lost TCP segment costs: the least retransmission timeout of Linux.
const RETRANSMISSION: Duration = Duration::from_millis(200);

/// What all threads of a relay share.
struct Shared {
    shape: Mutex<Shape>,
    cut: AtomicBool,
    ended: AtomicBool,
    upstream: SocketAddr,
    up: Lane,
    down: Lane,
}

/// One direction as it goes.
#[derive(Default)]
struct Lane {
    carried: AtomicU64,
    pace: Mutex<Pace>,
}

/// When the link is free again, and the state of the dice. Pure but for the clock it is given.
struct Pace {
    free_at: Option<Instant>,
    dice: u64,
}

impl Default for Pace {
    fn default() -> Pace {
        Pace {
            free_at: None,
            // Any odd number: every run of a test loses the same packets.
            dice: 0x9e37_79b9_7f4a_7c15,
        }
    }
}

/// What becomes of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fate {
    lost: bool,
    arrives: Instant,
}

impl Pace {
    fn fate(&mut self, size: usize, now: Instant, shape: Direction) -> Fate {
        let departs = self.free_at.map_or(now, |free| free.max(now));
        let takes = match shape.rate {
            Some(rate) => Duration::from_secs_f64(size as f64 / rate.max(1) as f64),
            None => Duration::ZERO,
        };
        self.free_at = Some(departs + takes);
        Fate {
            lost: self.roll() % 1000 < u64::from(shape.loss),
            arrives: departs + takes + shape.delay,
        }
    }

    /// How long a chunk that came now would wait for those before it.
    fn standing(&self, now: Instant) -> Duration {
        self.free_at
            .map_or(Duration::ZERO, |free| free.saturating_duration_since(now))
    }

    /// xorshift64 (Marsaglia, 2003).
    fn roll(&mut self) -> u64 {
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        self.dice >> 11
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Up,
    Down,
}

impl Shared {
    fn lane(&self, way: Way) -> &Lane {
        match way {
            Way::Up => &self.up,
            Way::Down => &self.down,
        }
    }

    fn fate(&self, way: Way, size: usize) -> Fate {
        let shape = *lock(&self.shape);
        let shape = match way {
            Way::Up => shape.up,
            Way::Down => shape.down,
        };
        lock(&self.lane(way).pace).fate(size, Instant::now(), shape)
    }

    /// How much longer than it should be the queue of that direction is.
    fn excess(&self, way: Way) -> Duration {
        let standing = lock(&self.lane(way).pace).standing(Instant::now());
        standing.saturating_sub(STANDING)
    }

    fn count(&self, way: Way, size: usize) {
        self.lane(way)
            .carried
            .fetch_add(size as u64, Ordering::Relaxed);
    }

    fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Relaxed)
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }
}

/// A running relay. Dropping it ends it and all it carries.
pub struct Relay {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Relay {
    /// Listens on a free port of `host`, UDP and TCP, and relays to `upstream`.
    pub fn start(host: Ipv4Addr, upstream: SocketAddr, shape: Shape) -> Result<Relay> {
        let (tcp, udp) = both_on_one_port(host)?;
        let address = tcp.local_addr()?;
        let shared = Arc::new(Shared {
            shape: Mutex::new(shape),
            cut: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            upstream,
            up: Lane::default(),
            down: Lane::default(),
        });
        let udp = Arc::new(udp);
        udp.set_read_timeout(Some(LOOK))?;
        let (for_tcp, for_udp) = (shared.clone(), shared.clone());
        spawn("relay-tcp", move || accept(&tcp, &for_tcp))?;
        spawn("relay-udp", move || relay_datagrams(&udp, &for_udp))?;
        Ok(Relay { address, shared })
    }

    /// What an edge dials instead of the upstream.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Another shape from now on; what is on its way arrives as it was to.
    pub fn reshape(&self, shape: Shape) {
        *lock(&self.shared.shape) = shape;
    }

    /// Swallows everything from now on, or carries on.
    pub fn cut(&self, cut: bool) {
        self.shared.cut.store(cut, Ordering::Relaxed);
    }

    /// Bytes of payload that arrived at the other end: without the headers of UDP, TCP and IP.
    pub fn carried(&self) -> Traffic {
        let read = |way| self.shared.lane(way).carried.load(Ordering::Relaxed);
        Traffic {
            up: read(Way::Up),
            down: read(Way::Down),
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        // The listener waits in accept: one connection wakes it.
        let _ = TcpStream::connect_timeout(&self.address, LOOK);
    }
}

fn both_on_one_port(host: Ipv4Addr) -> Result<(TcpListener, UdpSocket)> {
    let both = || {
        let tcp = TcpListener::bind((host, 0))?;
        let udp = UdpSocket::bind(tcp.local_addr()?)?;
        Ok::<_, std::io::Error>((tcp, udp))
    };
    (0..20)
        .find_map(|_| both().ok())
        .context("no port that is free for UDP and TCP")
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)?;
    Ok(())
}

fn wait_until(when: Instant) {
    std::thread::sleep(when.saturating_duration_since(Instant::now()));
}

// Datagrams

/// One client's way through: a socket of its own towards the upstream, so that answers find back.
struct Flow {
    up: SyncSender<(Instant, Vec<u8>)>,
    seen: Instant,
}

fn relay_datagrams(socket: &Arc<UdpSocket>, shared: &Arc<Shared>) {
    let mut flows: HashMap<SocketAddr, Flow> = HashMap::new();
    let mut buffer = vec![0; 65_536];
    while !shared.has_ended() {
        flows.retain(|_, flow| flow.seen.elapsed() < FORGET);
        let Ok((size, client)) = socket.recv_from(&mut buffer) else {
            continue;
        };
        let flow = match flows.entry(client) {
            Entry::Occupied(known) => known.into_mut(),
            // A client without a way through hears nothing, as from a router without memory.
            Entry::Vacant(place) => match open_flow(client, socket, shared) {
                Ok(up) => place.insert(Flow {
                    up,
                    seen: Instant::now(),
                }),
                Err(_) => continue,
            },
        };
        flow.seen = Instant::now();
        if !offer(shared, Way::Up, &flow.up, &buffer[..size]) {
            flows.remove(&client);
        }
    }
}

type Datagrams = SyncSender<(Instant, Vec<u8>)>;

/// Queues a datagram, or drops it; false when its flow has ended.
fn offer(shared: &Shared, way: Way, queue: &Datagrams, bytes: &[u8]) -> bool {
    if shared.excess(way) > Duration::ZERO {
        return true;
    }
    let fate = shared.fate(way, bytes.len());
    if fate.lost || shared.is_cut() {
        return true;
    }
    match queue.try_send((fate.arrives, bytes.to_vec())) {
        Ok(()) | Err(TrySendError::Full(_)) => true,
        Err(TrySendError::Disconnected(_)) => false,
    }
}

/// Three threads: one that sends up, one that hears the answers, one that sends them down.
fn open_flow(client: SocketAddr, back: &Arc<UdpSocket>, shared: &Arc<Shared>) -> Result<Datagrams> {
    let out = Arc::new(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?);
    out.connect(shared.upstream)?;
    out.set_read_timeout(Some(LOOK))?;
    let (up, up_queue) = sync_channel(QUEUE);
    let (down, down_queue) = sync_channel(QUEUE);
    let open = Arc::new(AtomicBool::new(true));
    let (to_up, counted, opened) = (out.clone(), shared.clone(), open.clone());
    spawn("relay-up", move || {
        deliver(&up_queue, &counted, Way::Up, |bytes| to_up.send(bytes));
        opened.store(false, Ordering::Relaxed);
    })?;
    let (back, counted) = (back.clone(), shared.clone());
    spawn("relay-down", move || {
        deliver(&down_queue, &counted, Way::Down, |bytes| {
            back.send_to(bytes, client)
        });
    })?;
    let shared = shared.clone();
    spawn("relay-answers", move || {
        let mut buffer = vec![0; 65_536];
        while open.load(Ordering::Relaxed) && !shared.has_ended() {
            if let Ok(size) = out.recv(&mut buffer) {
                offer(&shared, Way::Down, &down, &buffer[..size]);
            }
        }
    })?;
    Ok(up)
}

/// Sends each datagram when it is due. A refusal is a datagram lost.
fn deliver(
    queue: &Receiver<(Instant, Vec<u8>)>,
    shared: &Shared,
    way: Way,
    send: impl Fn(&[u8]) -> std::io::Result<usize>,
) {
    while let Ok((due, bytes)) = queue.recv() {
        wait_until(due);
        if shared.has_ended() {
            return;
        }
        if !shared.is_cut() && send(&bytes).is_ok() {
            shared.count(way, bytes.len());
        }
    }
}

// Connections

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    while let Ok((client, _)) = listener.accept() {
        if shared.has_ended() {
            return;
        }
        let shared = shared.clone();
        // A connection that cannot be carried on is closed, as by a router that is out of memory.
        let _ = spawn("relay-connection", move || {
            let _ = connect(&client, &shared);
        });
    }
}

fn connect(client: &TcpStream, shared: &Arc<Shared>) -> Result<()> {
    let cloud = TcpStream::connect_timeout(&shared.upstream, Duration::from_secs(10))?;
    for stream in [client, &cloud] {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(LOOK))?;
        SockRef::from(stream).set_recv_buffer_size(UNREAD)?;
    }
    for (way, from, to) in [(Way::Up, client, &cloud), (Way::Down, &cloud, client)] {
        let (from, to) = (from.try_clone()?, to.try_clone()?);
        let (queue, chunks) = sync_channel::<(Instant, Vec<u8>)>(QUEUE);
        let (reading, writing) = (shared.clone(), shared.clone());
        spawn("relay-read", move || {
            read_chunks(from, &reading, way, &queue)
        })?;
        spawn("relay-write", move || {
            write_chunks(to, &writing, way, &chunks)
        })?;
    }
    Ok(())
}

fn read_chunks(
    mut from: TcpStream,
    shared: &Shared,
    way: Way,
    queue: &SyncSender<(Instant, Vec<u8>)>,
) {
    let mut buffer = vec![0; 16 * 1024];
    while !shared.has_ended() {
        // What a cut link does not deliver stays with the sender, who sends it again.
        if shared.is_cut() {
            std::thread::sleep(LOOK);
            continue;
        }
        std::thread::sleep(shared.excess(way));
        let size = match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(size) => size,
            Err(error) if is_pause(&error) => continue,
            Err(_) => return,
        };
        let fate = shared.fate(way, size);
        let late = match fate.lost {
            true => RETRANSMISSION,
            false => Duration::ZERO,
        };
        if queue
            .send((fate.arrives + late, buffer[..size].to_vec()))
            .is_err()
        {
            return;
        }
    }
}

fn is_pause(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), WouldBlock | TimedOut | Interrupted)
}

fn write_chunks(
    mut to: TcpStream,
    shared: &Shared,
    way: Way,
    chunks: &Receiver<(Instant, Vec<u8>)>,
) {
    while let Ok((due, bytes)) = chunks.recv() {
        wait_until(due);
        while shared.is_cut() && !shared.has_ended() {
            std::thread::sleep(LOOK);
        }
        if shared.has_ended() || to.write_all(&bytes).is_err() {
            let _ = to.shutdown(Shutdown::Both);
            return;
        }
        shared.count(way, bytes.len());
    }
    // The other half may still have something to say.
    let _ = to.shutdown(Shutdown::Write);
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Ipv4Addr = Ipv4Addr::LOCALHOST;
    const MS: fn(u64) -> Duration = Duration::from_millis;

    fn slow(delay: u64, rate: Option<u64>) -> Direction {
        Direction {
            delay: MS(delay),
            loss: 0,
            rate,
        }
    }

    #[test]
    fn a_rate_makes_chunks_wait_for_one_another_and_a_delay_does_not() {
        let now = Instant::now();
        let mut pace = Pace::default();
        let shape = slow(50, Some(1000));
        assert_eq!(pace.fate(100, now, shape).arrives, now + MS(150));
        assert_eq!(pace.fate(100, now, shape).arrives, now + MS(250));
        let later = now + MS(1000);
        assert_eq!(pace.fate(100, later, shape).arrives, later + MS(150));
        let mut pace = Pace::default();
        for _ in 0..3 {
            assert_eq!(pace.fate(100, now, slow(50, None)).arrives, now + MS(50));
        }
    }

    #[test]
    fn the_queue_before_a_rate_is_as_long_as_what_waits_in_it() {
        let now = Instant::now();
        let mut pace = Pace::default();
        assert_eq!(pace.standing(now), MS(0));
        pace.fate(300, now, slow(50, Some(1000)));
        assert_eq!(pace.standing(now), MS(300));
        assert_eq!(pace.standing(now + MS(400)), MS(0));
    }

    #[test]
    fn losses_are_about_as_many_as_asked_for_and_the_same_each_time() {
        let count = || {
            let (mut pace, now) = (Pace::default(), Instant::now());
            let shape = Direction {
                loss: 100,
                ..Direction::default()
            };
            (0..10_000)
                .filter(|_| pace.fate(1, now, shape).lost)
                .count()
        };
        assert!((800..1200).contains(&count()), "{}", count());
        assert_eq!(count(), count());
    }

    fn echo_datagrams() -> SocketAddr {
        let server = UdpSocket::bind((HOST, 0)).expect("a port");
        let address = server.local_addr().expect("bound");
        std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((size, from)) = server.recv_from(&mut buffer) {
                let _ = server.send_to(&buffer[..size], from);
            }
        });
        address
    }

    #[test]
    fn datagrams_go_there_and_back_late_and_counted() {
        let relay = Relay::start(HOST, echo_datagrams(), Shape::even(slow(40, None)));
        let relay = relay.expect("starts");
        let client = UdpSocket::bind((HOST, 0)).expect("a port");
        client
            .set_read_timeout(Some(Duration::from_secs(5)))
            .expect("a limit");
        let begun = Instant::now();
        client.send_to(b"ping", relay.address()).expect("sent");
        let mut buffer = [0; 16];
        let (size, _) = client.recv_from(&mut buffer).expect("answered");
        assert_eq!(&buffer[..size], b"ping");
        assert!(begun.elapsed() >= MS(80), "{:?}", begun.elapsed());
        let carried = crate::wait::wait_for("count", Duration::from_secs(5), || {
            let carried = relay.carried();
            anyhow::ensure!(carried.down == 4, "{carried:?}");
            Ok(carried)
        });
        assert_eq!(carried.expect("counted").up, 4);
    }

    #[test]
    fn a_cut_relay_is_silent_and_comes_back() {
        let relay = Relay::start(HOST, echo_datagrams(), Shape::default()).expect("starts");
        let client = UdpSocket::bind((HOST, 0)).expect("a port");
        client.set_read_timeout(Some(MS(300))).expect("a limit");
        let ask = || {
            client.send_to(b"?", relay.address()).expect("sent");
            client.recv_from(&mut [0; 16]).is_ok()
        };
        assert!(ask());
        relay.cut(true);
        assert!(!ask());
        relay.cut(false);
        assert!(ask());
    }

    #[test]
    fn a_connection_is_carried_whole_at_its_rate() {
        let server = TcpListener::bind((HOST, 0)).expect("a port");
        let upstream = server.local_addr().expect("bound");
        let echo = std::thread::spawn(move || {
            let (mut stream, _) = server.accept().expect("dialled");
            let mut all = Vec::new();
            stream.read_to_end(&mut all).expect("reads");
            stream.write_all(&all).expect("writes");
        });
        let shape = Shape {
            up: slow(0, Some(200_000)),
            down: Direction {
                loss: 500,
                ..Direction::default()
            },
        };
        let relay = Relay::start(HOST, upstream, shape).expect("starts");
        let mut client = TcpStream::connect(relay.address()).expect("accepted");
        let sent: Vec<u8> = (0..60_000u32).map(|n| (n % 251) as u8).collect();
        let begun = Instant::now();
        client.write_all(&sent).expect("writes");
        client.shutdown(Shutdown::Write).expect("half closed");
        let mut back = Vec::new();
        client.read_to_end(&mut back).expect("reads");
        assert!(back == sent, "{} of {} bytes", back.len(), sent.len());
        assert!(begun.elapsed() >= MS(290), "{:?}", begun.elapsed());
        echo.join().expect("ended");
    }
}
