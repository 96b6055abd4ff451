//! Which transport wins, how long silence costs, and how a dead link is noticed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use rustls_pki_types::UnixTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::*;
use crate::hub::listen::Limits;
use crate::hub::proto::StreamHead;
use crate::hub::testing::{Cloud, HOUR, identity, now_for};
use crate::hub::transport::Class;

const SOON: Duration = Duration::from_secs(10);
const BOTH: [TransportKind; 2] = [TransportKind::Quic, TransportKind::WebSocket];

/// A middlebox in front of the cloud that can drop everything from one moment on.
struct Middlebox {
    address: SocketAddr,
    silent: Arc<AtomicBool>,
    /// UDP leaves by another port from then on, as after a change of network.
    moved: Arc<Notify>,
}

impl Middlebox {
    /// `udp`: whether UDP passes at all.
    async fn start(cloud: SocketAddr, udp: bool) -> Self {
        let tcp = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = tcp.local_addr().expect("address");
        let socket = UdpSocket::bind(address).await.expect("bind");
        let silent = Arc::new(AtomicBool::new(false));
        let quiet = silent.clone();
        tokio::spawn(async move {
            loop {
                let (near, _) = tcp.accept().await.expect("accept");
                let far = TcpStream::connect(cloud).await.expect("connect");
                let (near_read, near_write) = near.into_split();
                let (far_read, far_write) = far.into_split();
                tokio::spawn(pass(near_read, far_write, quiet.clone()));
                tokio::spawn(pass(far_read, near_write, quiet.clone()));
            }
        });
        let moved = Arc::new(Notify::new());
        tokio::spawn(relay(socket, cloud, udp, silent.clone(), moved.clone()));
        Self {
            address,
            silent,
            moved,
        }
    }
}

/// Goes on reading when silent, as a black hole does.
async fn pass(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    silent: Arc<AtomicBool>,
) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(n) = from.read(&mut buffer).await {
        if silent.load(Ordering::Relaxed) {
            // Neither bytes nor the end get through, and the sockets stay.
            std::future::pending::<()>().await;
        }
        if n == 0 || to.write_all(&buffer[..n]).await.is_err() {
            return;
        }
    }
}

async fn relay(
    near: UdpSocket,
    cloud: SocketAddr,
    passes: bool,
    silent: Arc<AtomicBool>,
    moved: Arc<Notify>,
) {
    let mut far = UdpSocket::bind("127.0.0.1:0").await.expect("bind");
    let mut device = None;
    let (mut out, mut back) = (vec![0; 2000], vec![0; 2000]);
    loop {
        tokio::select! {
            () = moved.notified() => far = UdpSocket::bind("127.0.0.1:0").await.expect("bind"),
            Ok((n, from)) = near.recv_from(&mut out) => {
                device = Some(from);
                if passes && !silent.load(Ordering::Relaxed) {
                    far.send_to(&out[..n], cloud).await.expect("send");
                }
            }
            Ok((n, _)) = far.recv_from(&mut back) => {
                if let Some(device) = device && !silent.load(Ordering::Relaxed) {
                    near.send_to(&back[..n], device).await.expect("send");
                }
            }
        }
    }
}

fn auto(cloud: &Cloud) -> DialOptions {
    DialOptions {
        link: cloud.link.clone(),
        ..DialOptions::new(Clock::Synchronised(UnixTime::now()))
    }
}

#[tokio::test]
async fn quic_is_preferred_and_the_remembered_transport_goes_first() {
    let mut cloud = Cloud::start().await;
    let device = identity(&cloud.ca, now_for(HOUR));
    for (remembered, expected) in [
        (None, TransportKind::Quic),
        (Some(TransportKind::Quic), TransportKind::Quic),
        (Some(TransportKind::WebSocket), TransportKind::WebSocket),
    ] {
        let mut options = auto(&cloud);
        options.remembered = remembered;
        let target = cloud.target();
        let (edge, _served) = tokio::join!(dial(&target, &device, &options), cloud.next_session());
        assert_eq!(edge.expect("dial").kind(), expected);
    }
}

#[tokio::test]
async fn where_udp_is_silent_a_session_stands_within_three_seconds() {
    let mut cloud = Cloud::start().await;
    let middle = Middlebox::start(cloud.address(), false).await;
    let device = identity(&cloud.ca, now_for(HOUR));
    let (target, options) = (cloud.target_at(middle.address), auto(&cloud));
    let started = Instant::now();
    let (edge, _served) = tokio::join!(dial(&target, &device, &options), cloud.next_session());
    assert_eq!(edge.expect("dial").kind(), TransportKind::WebSocket);
    assert!(
        started.elapsed() < Duration::from_secs(3),
        "{:?}",
        started.elapsed()
    );
}

#[tokio::test]
async fn nothing_there_is_told_for_each_transport_and_the_next_endpoint_is_tried() {
    let mut cloud = Cloud::start().await;
    let device = identity(&cloud.ca, now_for(HOUR));
    let closed = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let nowhere = closed.local_addr().expect("address");
    drop(closed);
    let mut options = auto(&cloud);
    options.deadline = Duration::from_millis(500);
    options.head_start = Duration::from_millis(50);
    let mut target = cloud.target_at(nowhere);
    let error = dial(&target, &device, &options)
        .await
        .expect_err("nothing there");
    let text = error.to_string();
    assert!(
        text.contains("by quic") && text.contains("by websocket"),
        "{text}"
    );
    target
        .endpoints
        .insert(0, Endpoint::new("no-such-host.invalid", 1));
    target.endpoints.extend(cloud.target().endpoints);
    let (edge, _served) = tokio::join!(dial(&target, &device, &options), cloud.next_session());
    edge.expect("the last endpoint answers");
    target.endpoints.clear();
    let none = dial(&target, &device, &options).await;
    assert!(matches!(none, Err(DialError::NoEndpoint)));
}

#[tokio::test]
async fn a_link_that_falls_silent_is_noticed_at_both_ends() {
    let link = LinkConfig {
        keep_alive: Duration::from_millis(300),
        ping_every: Duration::from_millis(300),
        dead_after: Duration::from_millis(1200),
        ..LinkConfig::default()
    };
    for kind in BOTH {
        let mut cloud = Cloud::with(link.clone(), Limits::default()).await;
        let middle = Middlebox::start(cloud.address(), true).await;
        let (edge, served) = cloud.pair_at(kind, middle.address).await;
        // Idle but alive: pings keep it so for longer than the deadline.
        let alive = tokio::time::timeout(Duration::from_millis(2500), edge.closed()).await;
        assert!(alive.is_err(), "{kind}: {alive:?}");
        middle.silent.store(true, Ordering::Relaxed);
        let started = Instant::now();
        let (here, there) = tokio::join!(
            tokio::time::timeout(SOON, edge.closed()),
            tokio::time::timeout(SOON, served.closed()),
        );
        assert!(
            matches!(here, Ok(TransportError::Timeout(_))),
            "{kind}: {here:?}"
        );
        assert!(
            matches!(there, Ok(TransportError::Timeout(_))),
            "{kind}: {there:?}"
        );
        let took = started.elapsed();
        assert!(took < Duration::from_secs(3), "{kind}: {took:?}");
    }
}

#[tokio::test]
async fn a_write_on_a_silent_link_ends_as_well() {
    let link = LinkConfig {
        keep_alive: Duration::from_millis(300),
        ping_every: Duration::from_millis(300),
        dead_after: Duration::from_millis(1200),
        ..LinkConfig::default()
    };
    for kind in BOTH {
        let mut cloud = Cloud::with(link.clone(), Limits::default()).await;
        let middle = Middlebox::start(cloud.address(), true).await;
        let (edge, served) = cloud.pair_at(kind, middle.address).await;
        let (_send, mut recv) = edge
            .open(
                Class::Bulk,
                &StreamHead {
                    kind: 1,
                    ..Default::default()
                },
            )
            .await
            .expect("open");
        let mut incoming = served.accept().await.expect("accept");
        middle.silent.store(true, Ordering::Relaxed);
        let write = async {
            while incoming
                .send
                .write_all(Bytes::from(vec![0; 100_000]))
                .await
                .is_ok()
            {}
        };
        let (written, read) = tokio::join!(
            tokio::time::timeout(SOON, write),
            tokio::time::timeout(SOON, recv.read(1))
        );
        assert!(written.is_ok(), "{kind}: the writer is set free");
        assert!(
            matches!(read, Ok(Err(TransportError::Timeout(_)))),
            "{kind}: {read:?}"
        );
    }
}

#[tokio::test]
async fn a_quic_stream_survives_a_change_of_address() {
    let mut cloud = Cloud::start().await;
    let middle = Middlebox::start(cloud.address(), true).await;
    let (edge, served) = cloud.pair_at(TransportKind::Quic, middle.address).await;
    let (mut send, _recv) = edge
        .open(
            Class::Control,
            &StreamHead {
                kind: 1,
                ..Default::default()
            },
        )
        .await
        .expect("open");
    let mut incoming = served.accept().await.expect("accept");
    let before = served.remote_address();
    middle.moved.notify_one();
    for word in [b"one", b"two"] {
        send.write_message(word).await.expect("write");
        let read = tokio::time::timeout(SOON, incoming.recv.read_message(10)).await;
        assert_eq!(
            read.expect("in time").expect("read").as_deref(),
            Some(&word[..])
        );
    }
    assert_ne!(served.remote_address(), before, "the cloud follows");
}
