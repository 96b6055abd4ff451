//! What the fuzzers drive and the corpus test replays: each takes any bytes and must not panic,
//! hang or hold more than its bounds. Beside the parsers, so that both callers check the same.

use std::io;
use std::path::Path;

use bytes::{Bytes, BytesMut};
use prost::Message as _;
use rustls_pki_types::UnixTime;

use super::listen::decode_request;
use super::mux::{Frame, MAX_MESSAGE, Mux, Read, Side};
use super::proto::StreamHead;
use super::transport::Class;
use crate::pki::{ClusterId, JoinToken, KeyId, NodeIdentity, check_reenrolment, csr};
use crate::stream::request::{LogOptions, Streams, Target};

/// Runs what fuzzing kept in a directory, and, for want of a fuzzer, its neighbours: each cut short
/// at every byte, and with every byte changed a little.
pub fn replay(corpus: &Path, body: fn(&[u8])) -> io::Result<()> {
    let mut count = 0;
    for entry in std::fs::read_dir(corpus)? {
        let bytes = std::fs::read(entry?.path())?;
        body(&bytes);
        count += 1;
        for at in 0..bytes.len() {
            for change in [1, 0x80, 0xff] {
                let mut changed = bytes.clone();
                changed[at] ^= change;
                body(&changed);
            }
            body(&bytes[..at]);
        }
    }
    assert!(count >= 5, "{}: only {count} inputs", corpus.display());
    Ok(())
}

/// Any bytes as messages of a peer: each message is a length byte times 16 and that many bytes.
/// What can be read as a frame is written back as the same bytes' meaning.
pub fn mux(data: &[u8]) {
    let mut mux = Mux::new(Side::Listener, 4, 4);
    // A stream of our own, so that the peer's answers to it are reached.
    if let Some(id) = mux.open(Class::Interactive) {
        let written = mux.write(id, &mut Bytes::from_static(&[7; 5000]));
        assert_eq!(written, Ok(()), "a stream that was just opened takes bytes");
    }
    let mut rest = data;
    while let [length, tail @ ..] = rest {
        let (message, next) = tail.split_at((usize::from(*length) * 16).min(tail.len()));
        rest = next;
        round_trip(message);
        if mux.receive(Bytes::copy_from_slice(message)).is_err() {
            return;
        }
        while let Some((id, _)) = mux.accept() {
            if let Ok(Read::Bytes(bytes)) = mux.read(id, 100) {
                assert!(bytes.len() <= 100, "more than was asked for");
            }
            mux.finish(id);
        }
        while mux.next_event().is_some() {}
        if let Some(out) = mux.transmit() {
            assert!(out.len() <= MAX_MESSAGE, "a message over its bound");
        }
        assert!(mux.open_streams() <= 12, "more streams than the limits");
    }
}

fn round_trip(message: &[u8]) {
    let mut input = Bytes::copy_from_slice(message);
    while let Ok(frame) = Frame::decode(&mut input) {
        let mut out = BytesMut::new();
        frame.encode(&mut out);
        let again = Frame::decode(&mut out.freeze());
        assert_eq!(again, Ok(frame), "written and read back");
    }
}

/// Any text as a pasted token.
pub fn token(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(token) = JoinToken::parse(text) {
        assert_eq!(
            JoinToken::parse(&token.to_text()),
            Ok(token),
            "written and read back"
        );
    }
}

/// Any bytes as a join request, with the request's certificate request and old certificate.
pub fn join_request(data: &[u8]) {
    let request = decode_request(data).unwrap_or_default();
    let shown = [
        request.csr.as_slice(),
        request.expired_certificate.as_slice(),
        data,
    ];
    for bytes in shown {
        // Any result is right as long as there is one.
        drop(csr::verify_csr(bytes));
        drop(NodeIdentity::from_certificate(bytes));
        let Ok(cluster) = ClusterId::parse("c1") else {
            continue;
        };
        let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(1));
        let key = KeyId([0; 32]);
        drop(check_reenrolment(
            bytes,
            key,
            &[],
            &cluster,
            now,
            std::time::Duration::MAX,
        ));
    }
}

/// Any text as the path and the query of a request to a node, each as the cloud and the edge read
/// it.
pub fn request(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let (path, query) = text.split_once('?').unwrap_or((&text, ""));
    if let Some(target) = Target::parse(path) {
        let parts = target.pod().map(|pod| [&pod.namespace, &pod.name]);
        for part in parts.into_iter().flatten() {
            assert!(!part.is_empty() && !part.contains('/'), "{path}");
        }
    }
    // Any result is right as long as there is one.
    drop(Streams::parse(query));
    drop(LogOptions::parse(query));
}

/// Any bytes as the head of a stream.
pub fn stream_head(data: &[u8]) {
    if let Ok(head) = StreamHead::decode(data) {
        let again = StreamHead::decode(&head.encode_to_vec()[..]);
        assert_eq!(again, Ok(head), "written and read back");
    }
}
