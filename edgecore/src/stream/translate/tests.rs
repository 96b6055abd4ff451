//! Both dialects between an asker and a runtime that are scripts.

use common::stream::splice::splice;
use http::HeaderValue;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

use super::*;
use crate::stream::websocket::masked;

const BINARY: u8 = 0x82;

fn exec() -> Target {
    Target::parse("/exec/default/web/main").unwrap()
}

fn headers(protocols: &str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("connection", "Upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ("sec-websocket-protocol", protocols),
    ] {
        headers.insert(name, HeaderValue::from_str(value).unwrap());
    }
    headers
}

fn translation(target: &Target, protocols: &str, query: &str) -> Translation {
    let found = Translation::of(target, &headers(protocols), query);
    found.unwrap().expect("it is for the runtime")
}

/// The asker's end, the runtime's end, and what joins them.
fn joined(translation: Translation) -> (DuplexStream, DuplexStream) {
    let (asker, here) = duplex(64 * 1024);
    let (there, runtime) = duplex(64 * 1024);
    tokio::spawn(splice(translation.join(here), there));
    (asker, runtime)
}

async fn reads(io: &mut DuplexStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    io.read_exact(&mut bytes).await.unwrap();
    bytes
}

/// Streams 1, 3, … as they are opened.
fn opened(names: &[&str]) -> BytesMut {
    let mut out = BytesMut::new();
    for (name, number) in names.iter().zip((1..).step_by(2)) {
        spdy::open(&mut out, number, number == 1, ("streamtype", name));
    }
    out
}

fn replied(stream: u8) -> [u8; 12] {
    [0x80, 3, 0, 2, 0, 0, 0, 4, 0, 0, 0, stream]
}

#[test]
fn what_a_runtime_can_answer_itself_is_left_to_it() {
    let forward = Target::parse("/portForward/default/web").unwrap();
    let logs = Target::parse("/containerLogs/default/web/main").unwrap();
    for (target, protocols, ours) in [
        (exec(), "v5.channel.k8s.io", Some(COMMAND)),
        (
            exec(),
            "v4.channel.k8s.io, v5.channel.k8s.io",
            Some(COMMAND),
        ),
        (exec(), "v4.channel.k8s.io", None),
        (exec(), TUNNEL, None),
        (forward.clone(), TUNNEL, Some(TUNNEL)),
        (forward, "v4.channel.k8s.io", None),
        (logs, "v5.channel.k8s.io", None),
    ] {
        let found = Translation::of(&target, &headers(protocols), "output=1").unwrap();
        assert_eq!(found.map(|t| t.protocol), ours, "{protocols}");
    }
    let mut spdy = headers("v5.channel.k8s.io");
    spdy.insert(UPGRADE, HeaderValue::from_static(SPDY));
    assert!(
        Translation::of(&exec(), &spdy, "output=1")
            .unwrap()
            .is_none()
    );
}

#[test]
fn the_handshake_is_that_of_rfc_6455() {
    let translation = translation(&exec(), COMMAND, "output=1");
    let answer = translation.answers();
    assert_eq!(answer[SEC_WEBSOCKET_ACCEPT], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    assert_eq!(answer[SEC_WEBSOCKET_PROTOCOL], COMMAND);
    assert_eq!(translation.asks()[STREAM_PROTOCOL], RUNTIME_COMMAND);
    for missing in [SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION] {
        let mut headers = headers(COMMAND);
        headers.remove(missing);
        let refused = Translation::of(&exec(), &headers, "output=1").unwrap_err();
        assert!(refused.to_string().contains("handshake"), "{refused}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_command_is_spoken_to_once_the_runtime_is_ready_and_its_stream_can_end() {
    let query = "command=cat&input=1&output=1&error=1";
    let (mut asker, mut runtime) = joined(translation(&exec(), COMMAND, query));
    let open = opened(&["error", "stdin", "stdout", "stderr"]);
    assert_eq!(reads(&mut runtime, open.len()).await, open);
    // Said too early for the runtime, which would throw it away.
    let early = masked(BINARY, b"\0early");
    asker.write_all(&early).await.unwrap();
    for stream in [1, 3, 5] {
        runtime.write_all(&replied(stream)).await.unwrap();
    }
    let mut nothing = [0; 1];
    let waits = tokio::time::timeout(
        std::time::Duration::from_secs(1),
        runtime.read(&mut nothing),
    );
    assert!(waits.await.is_err());
    runtime.write_all(&replied(7)).await.unwrap();
    let mut want = BytesMut::new();
    spdy::data(&mut want, 3, b"early");
    assert_eq!(reads(&mut runtime, want.len()).await, want);
    // A message in two frames, the stream's end, and what comes after it.
    asker.write_all(&masked(0x02, b"\0la")).await.unwrap();
    asker.write_all(&masked(0x80, b"te")).await.unwrap();
    asker
        .write_all(&masked(BINARY, &[END, STDIN]))
        .await
        .unwrap();
    asker.write_all(&masked(BINARY, b"\0never")).await.unwrap();
    asker.write_all(&masked(0x88, &[3, 232])).await.unwrap();
    let mut rest = Vec::new();
    runtime.read_to_end(&mut rest).await.unwrap();
    let (mut rest, mut frames) = (&rest[..], spdy::Decoder::default());
    let mut said = Vec::new();
    while let Some(event) = frames.next(&mut rest).unwrap() {
        let spdy::Event::Data { stream: 3, bytes } = event else {
            panic!("{event:?}");
        };
        said.extend_from_slice(bytes);
    }
    assert_eq!(said, b"late");
}

#[tokio::test(start_paused = true)]
async fn what_a_command_says_comes_by_channel_and_pings_are_answered_on_both_sides() {
    let query = "command=ls&output=1&tty=1";
    let (mut asker, mut runtime) = joined(translation(&exec(), COMMAND, query));
    let open = opened(&["error", "stdout", "resize"]);
    assert_eq!(reads(&mut runtime, open.len()).await, open);
    for stream in [1, 3] {
        runtime.write_all(&replied(stream)).await.unwrap();
    }
    let second = std::time::Duration::from_secs(1);
    let early = tokio::time::timeout(second, asker.read_u8()).await;
    assert!(early.is_err(), "greeted before its streams are there");
    runtime.write_all(&replied(5)).await.unwrap();
    assert_eq!(reads(&mut asker, 3).await, [BINARY, 1, STDOUT]);
    asker.write_all(&masked(0x89, b"?")).await.unwrap();
    assert_eq!(reads(&mut asker, 3).await, [0x8a, 1, b'?']);
    let mut ping = BytesMut::new();
    spdy::pong(&mut ping, 2);
    runtime.write_all(&ping).await.unwrap();
    assert_eq!(reads(&mut runtime, ping.len()).await, ping);
    asker.write_all(&masked(BINARY, b"\x04{}")).await.unwrap();
    let mut size = BytesMut::new();
    spdy::data(&mut size, 5, b"{}");
    assert_eq!(reads(&mut runtime, size.len()).await, size);
    let mut says = BytesMut::new();
    spdy::data(&mut says, 3, b"out");
    spdy::data(&mut says, 99, b"of no stream");
    spdy::data(&mut says, 1, b"{\"status\":\"Success\"}");
    runtime.write_all(&says).await.unwrap();
    drop(runtime);
    let mut heard = Vec::new();
    asker.read_to_end(&mut heard).await.unwrap();
    let mut want = BytesMut::new();
    websocket::message(&mut want, &[STDOUT], b"out");
    websocket::message(&mut want, &[ERROR], b"{\"status\":\"Success\"}");
    websocket::close(&mut want);
    assert_eq!(heard, want);
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_carries_bytes_as_they_are_and_ends_with_either_end() {
    let forward = Target::parse("/portForward/default/web").unwrap();
    let (mut asker, mut runtime) = joined(translation(&forward, TUNNEL, ""));
    let much: Vec<u8> = (0..200_000).map(|n| (n % 251) as u8).collect();
    let sent = masked(BINARY, &much);
    let (_, there) = tokio::join!(
        async { asker.write_all(&sent).await.unwrap() },
        reads(&mut runtime, much.len())
    );
    assert!(there == much, "the bytes are others");
    let mut back = Vec::new();
    tokio::join!(
        async {
            runtime.write_all(&much).await.unwrap();
            drop(runtime);
        },
        async {
            asker.read_to_end(&mut back).await.unwrap();
        }
    );
    // From a server: without a mask, and a close at last.
    let mut got = Vec::new();
    let mut rest = &back[..];
    while rest[0] == BINARY {
        assert_eq!(rest[1], 126);
        let length = usize::from(u16::from_be_bytes([rest[2], rest[3]]));
        got.extend_from_slice(&rest[4..4 + length]);
        rest = &rest[4 + length..];
    }
    assert_eq!(rest, [0x88, 2, 3, 232]);
    assert!(got == much, "the bytes are others");
}

#[tokio::test(start_paused = true)]
async fn an_asker_that_breaks_the_protocol_is_left() {
    let forward = Target::parse("/portForward/default/web").unwrap();
    let (mut asker, mut runtime) = joined(translation(&forward, TUNNEL, ""));
    asker.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut nothing = Vec::new();
    runtime.read_to_end(&mut nothing).await.unwrap();
    assert!(nothing.is_empty());
    let mut last = Vec::new();
    asker.read_to_end(&mut last).await.unwrap();
    assert_eq!(last, [0x88, 2, 3, 232]);
}
