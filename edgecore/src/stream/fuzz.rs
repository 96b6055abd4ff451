//! What the fuzzers drive and the corpus test replays: each takes any bytes and must not panic or
//! hang, and must not depend on how the bytes were cut on their way.

use super::{spdy, websocket};

/// Any bytes of a WebSocket client; the first says how long the pieces are.
pub fn websocket(data: &[u8]) {
    in_pieces(data, messages);
}

/// What is read of pieces, as long as the first byte says, is what is read of the whole.
fn in_pieces<T: std::fmt::Debug + PartialEq>(data: &[u8], read: fn(&[u8], usize) -> T) {
    let Some((size, data)) = data.split_first() else {
        return;
    };
    let whole = read(data, data.len());
    assert_eq!(read(data, usize::from(*size)), whole, "in pieces");
}

/// What a client said: messages put together, and the rest; how it broke the protocol, if it did.
#[derive(Debug, Default, PartialEq, Eq)]
struct Said {
    messages: Vec<Vec<u8>>,
    others: Vec<websocket::Event>,
    broken: Option<websocket::Malformed>,
}

fn messages(data: &[u8], size: usize) -> Said {
    let mut decoder = websocket::Decoder::default();
    let mut said = Said::default();
    for piece in data.chunks(size.max(1)) {
        decoder.push(piece);
        loop {
            match decoder.next() {
                Ok(Some(websocket::Event::Data { first, bytes })) => {
                    if first {
                        said.messages.push(Vec::new());
                    }
                    let message = said.messages.last_mut();
                    assert!(message.is_some(), "bytes without a message");
                    message
                        .into_iter()
                        .for_each(|m| m.extend_from_slice(&bytes));
                }
                Ok(Some(other)) => said.others.push(other),
                Ok(None) => break,
                Err(broken) => {
                    said.broken = Some(broken);
                    return said;
                }
            }
        }
    }
    said
}

/// Any bytes of a runtime's streaming server; the first says how long the pieces are.
pub fn spdy(data: &[u8]) {
    in_pieces(data, frames);
}

/// What a server said: the bytes of its streams in their order, and the rest.
#[derive(Debug, Default, PartialEq, Eq)]
struct Told {
    bytes: Vec<(u32, u8)>,
    others: Vec<String>,
    broken: Option<spdy::Malformed>,
}

fn frames(data: &[u8], size: usize) -> Told {
    let mut decoder = spdy::Decoder::default();
    let mut told = Told::default();
    for mut piece in data.chunks(size.max(1)) {
        loop {
            match decoder.next(&mut piece) {
                Ok(Some(spdy::Event::Data { stream, bytes })) => {
                    told.bytes.extend(bytes.iter().map(|byte| (stream, *byte)));
                }
                Ok(Some(other)) => told.others.push(format!("{other:?}")),
                Ok(None) => break,
                Err(broken) => {
                    told.broken = Some(broken);
                    return told;
                }
            }
        }
        assert!(piece.is_empty(), "a piece was left");
    }
    told
}
