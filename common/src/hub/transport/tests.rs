//! Both transports over real sockets on the loopback: what one does, the other does.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, timeout};

use super::*;
use crate::hub::testing::{Cloud, cluster};
use crate::ids::NodeName;

const BOTH: [TransportKind; 2] = [TransportKind::Quic, TransportKind::WebSocket];
const SOON: Duration = Duration::from_secs(10);

fn head(kind: i32) -> StreamHead {
    StreamHead {
        kind,
        ..Default::default()
    }
}

fn pattern(length: usize, seed: usize) -> Bytes {
    (0..length)
        .map(|i| ((i * 31 + seed * 7) % 251) as u8)
        .collect()
}

/// Gives back all that arrives on every stream.
fn echo(connection: Connection) -> tokio::task::JoinHandle<TransportError> {
    tokio::spawn(async move {
        loop {
            let mut incoming = match connection.accept().await {
                Ok(incoming) => incoming,
                Err(end) => return end,
            };
            tokio::spawn(async move {
                while let Ok(Some(bytes)) = incoming.recv.read(64 * 1024).await {
                    if incoming.send.write_all(bytes).await.is_err() {
                        return;
                    }
                }
                incoming.send.finish();
            });
        }
    })
}

async fn read_all(recv: &mut RecvStream) -> Result<Vec<u8>, TransportError> {
    let mut all = Vec::new();
    while let Some(bytes) = recv.read(64 * 1024).await? {
        all.extend_from_slice(&bytes);
    }
    Ok(all)
}

#[tokio::test]
async fn a_stream_carries_its_head_and_its_bytes_there_and_back() {
    for kind in BOTH {
        let mut cloud = Cloud::start().await;
        let (edge, served) = cloud.pair(kind).await;
        let identity = served.identity().expect("the device's certificate");
        assert!(edge.identity().is_err(), "the cloud is no node");
        assert_eq!(identity.node, NodeName::parse("shop-7").expect("name"));
        assert_eq!(identity.cluster, cluster());
        // Either side opens.
        for (from, to) in [(&edge, &served), (&served, &edge)] {
            let (mut send, mut recv) = from.open(Class::Status, &head(7)).await.expect("open");
            let mut incoming = to.accept().await.expect("accept");
            assert_eq!((incoming.head.kind, incoming.class), (7, Class::Status));
            send.write_message(b"question").await.expect("write");
            let asked = incoming.recv.read_message(100).await.expect("read");
            assert_eq!(asked.as_deref(), Some(&b"question"[..]));
            incoming.send.write_message(b"").await.expect("write");
            incoming.send.finish();
            // Half-closed: the other direction goes on.
            assert_eq!(
                recv.read_message(100).await.expect("read").as_deref(),
                Some(&b""[..])
            );
            assert_eq!(recv.read_message(100).await.expect("end"), None);
            send.write_all(Bytes::from_static(b"more"))
                .await
                .expect("write");
            send.finish();
            assert_eq!(read_all(&mut incoming.recv).await.expect("read"), b"more");
        }
        let counters = edge.counters();
        assert_eq!(counters.sent[Class::Bulk.index()], Volume::default());
        assert!(
            counters.sent[Class::Status.index()].bytes >= 16,
            "{counters:?}"
        );
        assert!(
            counters.received[Class::Status.index()].frames > 0,
            "{counters:?}"
        );
    }
}

#[tokio::test]
async fn many_streams_at_once_keep_their_bytes_apart() {
    for kind in BOTH {
        let mut cloud = Cloud::start().await;
        let (edge, served) = cloud.pair(kind).await;
        let _echo = echo(served);
        // More streams than may be open at once: the rest waits for its turn.
        let tasks: Vec<_> = (0..200)
            .map(|i| {
                let edge = edge.clone();
                tokio::spawn(async move {
                    let class = Class::ALL[i % Class::COUNT];
                    let (mut send, mut recv) = edge.open(class, &head(1)).await.expect("open");
                    let bytes = pattern(1000 + i * 517, i);
                    let copy = bytes.clone();
                    let write = async {
                        send.write_all(copy).await.expect("write");
                        send.finish();
                    };
                    let ((), back) = tokio::join!(write, read_all(&mut recv));
                    assert!(back.expect("read") == bytes, "stream {i}");
                })
            })
            .collect();
        for task in tasks {
            timeout(3 * SOON, task)
                .await
                .expect("in time")
                .expect("no panic");
        }
    }
}

#[tokio::test]
async fn stalled_readers_block_neither_other_streams_nor_control() {
    for kind in BOTH {
        let mut cloud = Cloud::start().await;
        let (edge, served) = cloud.pair(kind).await;
        // As many as may be open but one, each written to until it stalls.
        let mut stalled = Vec::new();
        for i in 1..cloud.link.cloud_streams {
            let class = Class::ALL[usize::from(i) % Class::COUNT];
            let (mut send, recv) = served.open(class, &head(1)).await.expect("open");
            let incoming = edge.accept().await.expect("accept");
            let writer = tokio::spawn(async move {
                // Ends only when the test is over.
                let _end = send.write_all(Bytes::from(vec![0; 1 << 20])).await;
            });
            stalled.push((writer, recv, incoming));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(
            stalled.iter().all(|(writer, ..)| !writer.is_finished()),
            "all are stalled"
        );
        let (mut send, _recv) = served.open(Class::Bulk, &head(2)).await.expect("open");
        let mut incoming = timeout(SOON, edge.accept())
            .await
            .expect("in time")
            .expect("accept");
        let (one, two) = tokio::join!(
            async {
                send.write_all(pattern(1 << 20, 3)).await.expect("write");
                send.finish();
            },
            timeout(SOON, read_all(&mut incoming.recv)),
        );
        let () = one;
        assert!(
            two.expect("in time").expect("read") == pattern(1 << 20, 3),
            "{kind}"
        );
    }
}

#[tokio::test]
async fn keys_change_under_a_stream_that_runs() {
    let mut cloud = Cloud::start().await;
    let (edge, served) = cloud.pair(TransportKind::Quic).await;
    let (mut send, _recv) = edge.open(Class::Bulk, &head(1)).await.expect("open");
    let mut incoming = served.accept().await.expect("accept");
    for end in [&edge, &served, &edge, &served] {
        let Link::Quic(quic) = &end.link else {
            panic!("not QUIC");
        };
        quic.change_keys();
        send.write_all(pattern(40_000, 5)).await.expect("write");
        let came = timeout(SOON, incoming.recv.read_exact(40_000)).await;
        assert!(came.expect("in time").expect("read") == pattern(40_000, 5));
    }
}

#[tokio::test]
async fn control_overtakes_bulk() {
    for kind in BOTH {
        let mut cloud = Cloud::start().await;
        let (edge, served) = cloud.pair(kind).await;
        let (mut bulk, _bulk_recv) = edge.open(Class::Bulk, &head(1)).await.expect("open");
        let mut bulk_in = served.accept().await.expect("accept");
        let (mut control, _control_recv) = edge.open(Class::Control, &head(2)).await.expect("open");
        let mut control_in = served.accept().await.expect("accept");
        let flood = tokio::spawn(async move {
            let piece = Bytes::from(vec![0; 64 * 1024]);
            while bulk.write_all(piece.clone()).await.is_ok() {}
        });
        let drain =
            tokio::spawn(
                async move { while let Ok(Some(_)) = bulk_in.recv.read(64 * 1024).await {} },
            );
        let started = Instant::now();
        for _ in 0..100 {
            control.write_message(b"now").await.expect("write");
            control_in
                .recv
                .read_message(10)
                .await
                .expect("read")
                .expect("message");
        }
        let each = started.elapsed() / 100;
        assert!(
            each < Duration::from_millis(100),
            "{kind}: {each:?} each beside bulk"
        );
        flood.abort();
        drain.abort();
    }
}

#[tokio::test]
async fn reset_and_stop_carry_their_codes_and_a_dropped_stream_never_looks_complete() {
    for kind in BOTH {
        let mut cloud = Cloud::start().await;
        let (edge, served) = cloud.pair(kind).await;
        let (mut send, mut recv) = edge.open(Class::Bulk, &head(1)).await.expect("open");
        let mut incoming = served.accept().await.expect("accept");
        send.reset(77);
        let end = incoming.recv.read(10).await;
        assert!(
            matches!(end, Err(TransportError::Reset { code: 77 })),
            "{end:?}"
        );
        recv.stop(78);
        let refused = async {
            loop {
                if let Err(end) = incoming.send.write_all(Bytes::from_static(b"x")).await {
                    return end;
                }
                tokio::task::yield_now().await;
            }
        };
        let end = timeout(SOON, refused).await.expect("in time");
        assert!(
            matches!(end, TransportError::Stopped { code: 78 }),
            "{end:?}"
        );
        let (mut send, _recv) = edge.open(Class::Bulk, &head(1)).await.expect("open");
        let mut incoming = served.accept().await.expect("accept");
        send.write_all(Bytes::from_static(b"half"))
            .await
            .expect("write");
        drop(send);
        let end = read_all(&mut incoming.recv).await;
        assert!(
            matches!(end, Err(TransportError::Reset { code: 0 })),
            "{end:?}"
        );
    }
}

#[tokio::test]
async fn a_close_tells_the_other_end_why() {
    for kind in BOTH {
        let mut cloud = Cloud::start().await;
        let (edge, served) = cloud.pair(kind).await;
        let (_send, mut recv) = edge.open(Class::Control, &head(1)).await.expect("open");
        served.close(3, "the node was revoked");
        let end = timeout(SOON, edge.closed()).await.expect("in time");
        assert!(
            matches!(&end, TransportError::ClosedByPeer { code: 3, reason } if reason.contains("revoked")),
            "{end:?}"
        );
        assert!(matches!(
            recv.read(1).await,
            Err(TransportError::ClosedByPeer { code: 3, .. })
        ));
        let opened = edge.open(Class::Bulk, &head(1)).await.err();
        assert!(
            matches!(opened, Some(TransportError::ClosedByPeer { .. })),
            "{opened:?}"
        );
        let here = timeout(SOON, served.closed()).await.expect("in time");
        assert!(matches!(here, TransportError::ClosedHere), "{here:?}");
    }
}

#[tokio::test]
async fn dropping_the_last_handle_closes_the_connection() {
    for kind in BOTH {
        let mut cloud = Cloud::start().await;
        let (edge, served) = cloud.pair(kind).await;
        let (send, recv) = edge.open(Class::Control, &head(1)).await.expect("open");
        drop(edge);
        assert!(
            served.accept().await.is_ok(),
            "{kind}: a stream keeps it alive"
        );
        drop((send, recv));
        let end = timeout(SOON, served.closed()).await.expect("in time");
        assert!(
            matches!(end, TransportError::ClosedByPeer { code: 0, .. }),
            "{end:?}"
        );
    }
}

#[tokio::test]
async fn messages_are_bounded_before_anything_is_allocated_and_survive_cancellation() {
    for kind in BOTH {
        let mut cloud = Cloud::start().await;
        let (edge, served) = cloud.pair(kind).await;
        let (mut send, _recv) = edge.open(Class::Control, &head(1)).await.expect("open");
        let mut incoming = served.accept().await.expect("accept");
        send.write_all(Bytes::from_static(&[0, 0, 0, 4, b'a', b'b']))
            .await
            .expect("write");
        // Cancelled in the middle of a message, again and again.
        for _ in 0..20 {
            let read = incoming.recv.read_message(10);
            assert!(timeout(Duration::from_millis(5), read).await.is_err());
        }
        send.write_all(Bytes::from_static(b"cd\xff\xff\xff\xff"))
            .await
            .expect("write");
        let message = incoming.recv.read_message(10).await.expect("read");
        assert_eq!(message.as_deref(), Some(&b"abcd"[..]));
        let end = incoming.recv.read_message(10).await;
        assert!(matches!(
            end,
            Err(TransportError::TooLarge {
                size: 0xffff_ffff,
                limit: 10
            })
        ));
    }
}

/// The cloud's end of a stream to be read and written.
async fn tunnel(served: &Connection) -> Duplex {
    let opened = served.open(Class::Interactive, &head(4)).await;
    let (send, recv) = opened.expect("open");
    Duplex::new(send, recv)
}

#[tokio::test]
async fn a_stream_as_reader_and_writer_carries_much_both_ways_and_steps_back_for_others() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    for kind in BOTH {
        let mut cloud = Cloud::start().await;
        let (edge, served) = cloud.pair(kind).await;
        let near = tunnel(&served).await;
        let echo = tokio::spawn(async move {
            let incoming = edge.accept().await.expect("a stream");
            let mut far = Duplex::new(incoming.send, incoming.recv);
            let (mut read, mut write) = tokio::io::split(&mut far);
            tokio::io::copy(&mut read, &mut write).await.expect("echo");
            write.shutdown().await.expect("end");
            edge.closed().await;
        });
        let sent = pattern(3_000_000, 5);
        let (mut read, mut write) = tokio::io::split(near);
        let writing = async {
            write.write_all(&sent).await.expect("write");
            write.shutdown().await.expect("end");
        };
        let mut back = Vec::new();
        let all = async { tokio::join!(writing, read.read_to_end(&mut back)).1 };
        timeout(SOON, all).await.expect("in time").expect("read");
        assert!(back == sent, "{kind}: {} bytes came back", back.len());
        let bulk = served.counters().sent[Class::Bulk.index()].bytes;
        assert!(bulk > 2_000_000, "{kind}: {bulk} bytes went as bulk");
        served.close(0, "done");
        echo.await.expect("echo");
    }
}

#[tokio::test]
async fn a_reader_and_writer_that_is_dropped_breaks_the_other_end() {
    use tokio::io::AsyncReadExt;
    for kind in BOTH {
        let mut cloud = Cloud::start().await;
        let (edge, served) = cloud.pair(kind).await;
        let near = tunnel(&served).await;
        let incoming = edge.accept().await.expect("a stream");
        let mut far = Duplex::new(incoming.send, incoming.recv);
        drop(near);
        let read = timeout(SOON, far.read(&mut [0; 16]))
            .await
            .expect("in time");
        assert!(read.is_err(), "{kind}: {read:?} looks like a proper end");
    }
}

#[tokio::test]
async fn streams_that_have_ended_leave_nothing_in_the_connection() {
    let mut cloud = Cloud::start().await;
    let (edge, served) = cloud.pair(TransportKind::WebSocket).await;
    let done = echo(edge.clone());
    for round in 0..500 {
        let (mut send, mut recv) = served.open(Class::Interactive, &head(1)).await.unwrap();
        send.write_all(pattern(100, round)).await.unwrap();
        match round % 3 {
            // As an HTTP exchange ends.
            0 => {
                send.finish();
                read_all(&mut recv).await.unwrap();
            }
            // As an asker that has what it wanted.
            1 => drop((recv.read(100).await.unwrap(), send, recv)),
            _ => {
                send.finish();
                drop(recv);
            }
        }
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    for connection in [&served, &edge] {
        let Link::WebSocket(link) = &connection.link else {
            panic!("not a WebSocket");
        };
        assert_eq!(link.held(), (0, 0));
    }
    drop(done);
}

#[tokio::test]
async fn a_stream_that_its_reader_stopped_gives_its_place_back_when_it_is_finished() {
    for kind in BOTH {
        let mut cloud = Cloud::start().await;
        let (edge, served) = cloud.pair(kind).await;
        // More than may be open at once.
        for round in 0..cloud.link.cloud_streams + 8 {
            let opened = timeout(SOON, served.open(Class::Bulk, &head(1))).await;
            let (mut send, mut recv) = opened
                .unwrap_or_else(|_| panic!("{kind}: no place for stream {round}"))
                .expect("open");
            let mut incoming = edge.accept().await.expect("accept");
            incoming.send.finish();
            drop(incoming);
            assert!(read_all(&mut recv).await.expect("the end").is_empty());
            // That the reader is gone comes with the end, or right behind it.
            let stopped = async {
                while send.write_all(Bytes::from_static(b"more")).await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            timeout(SOON, stopped).await.expect("stopped");
            send.finish();
        }
    }
}
