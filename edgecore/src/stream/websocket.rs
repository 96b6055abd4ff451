//! The frames of a WebSocket (RFC 6455) at the server's end.
//!
//! Sans-IO, and piece by piece: clients make messages of any length, and a tunnel holds little of
//! one, where tungstenite, whose heads these are, holds it whole. Extensions are never agreed on, so
//! every reserved bit is an error.

use std::io::Cursor;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio_tungstenite::tungstenite::protocol::frame::FrameHeader;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Control, Data, OpCode};

/// A control frame's payload.
const MOST_CONTROL: u64 = 125;

/// The client broke the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the WebSocket client broke the protocol: {0}")]
pub(super) struct Malformed(&'static str);

/// What came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Event {
    /// Bytes of a message; `first` where they begin it.
    Data {
        first: bool,
        bytes: Bytes,
    },
    Ping(Bytes),
    /// The client's last words.
    Close,
}

#[derive(Debug)]
struct Frame {
    operation: OpCode,
    left: u64,
    mask: [u8; 4],
}

/// Takes bytes as they come, gives what they mean.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    held: BytesMut,
    frame: Option<Frame>,
    /// A message goes on in the next frame.
    within: bool,
    /// Nothing of the message has come yet.
    fresh: bool,
}

impl Decoder {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.held.extend_from_slice(bytes);
    }

    pub(super) fn next(&mut self) -> Result<Option<Event>, Malformed> {
        loop {
            let Some(frame) = &mut self.frame else {
                if !self.begin()? {
                    return Ok(None);
                }
                continue;
            };
            let here = self.held.len();
            let left = usize::try_from(frame.left).unwrap_or(usize::MAX);
            if let OpCode::Control(kind) = frame.operation {
                if here < left {
                    return Ok(None);
                }
                let mut bytes = self.held.split_to(left);
                unmask(&mut bytes, &mut frame.mask);
                self.frame = None;
                match kind {
                    Control::Ping => return Ok(Some(Event::Ping(bytes.freeze()))),
                    Control::Close => return Ok(Some(Event::Close)),
                    Control::Pong | Control::Reserved(_) => continue,
                }
            }
            if left == 0 {
                self.frame = None;
                continue;
            }
            if here == 0 {
                return Ok(None);
            }
            let mut bytes = self.held.split_to(left.min(here));
            unmask(&mut bytes, &mut frame.mask);
            frame.left -= bytes.len() as u64;
            let first = std::mem::take(&mut self.fresh);
            let bytes = bytes.freeze();
            return Ok(Some(Event::Data { first, bytes }));
        }
    }

    /// Reads a frame's head; false while it is not whole.
    fn begin(&mut self) -> Result<bool, Malformed> {
        let mut held = Cursor::new(&self.held[..]);
        let parsed = FrameHeader::parse(&mut held);
        let parsed = parsed.map_err(|_| Malformed("a frame is of an unknown kind"))?;
        let Some((head, left)) = parsed else {
            return Ok(false);
        };
        let length = self.held.len() - held.remaining();
        if head.rsv1 || head.rsv2 || head.rsv3 {
            return Err(Malformed("a reserved bit is set"));
        }
        let mask = head.mask.ok_or(Malformed("a frame is not masked"))?;
        if left >> 63 != 0 {
            return Err(Malformed("a frame is longer than any may be"));
        }
        match head.opcode {
            OpCode::Control(_) if head.is_final && left <= MOST_CONTROL => {}
            OpCode::Control(_) => return Err(Malformed("a control frame is long or in parts")),
            OpCode::Data(kind) => {
                match (kind == Data::Continue, self.within) {
                    (true, true) => {}
                    (false, false) => self.fresh = true,
                    (true, false) => {
                        return Err(Malformed("a message goes on that was not begun"));
                    }
                    (false, true) => return Err(Malformed("a message begins within another")),
                }
                self.within = !head.is_final;
            }
        }
        self.held.advance(length);
        self.frame = Some(Frame {
            operation: head.opcode,
            left,
            mask,
        });
        Ok(true)
    }
}

/// Takes the mask off; it is turned so that it fits the next piece.
fn unmask(bytes: &mut [u8], mask: &mut [u8; 4]) {
    let twice = u64::from_ne_bytes([
        mask[0], mask[1], mask[2], mask[3], mask[0], mask[1], mask[2], mask[3],
    ]);
    let mut words = bytes.chunks_exact_mut(8);
    for word in &mut words {
        let mut value = [0; 8];
        value.copy_from_slice(word);
        word.copy_from_slice(&(u64::from_ne_bytes(value) ^ twice).to_ne_bytes());
    }
    let rest = words.into_remainder();
    for (byte, key) in rest.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= key;
    }
    mask.rotate_left(rest.len() % 4);
}

fn head(out: &mut BytesMut, opcode: OpCode, length: usize) {
    let header = FrameHeader {
        opcode,
        ..FrameHeader::default()
    };
    // Memory takes it.
    drop(header.format(length as u64, &mut out.writer()));
}

/// One binary message of two parts.
pub(super) fn message(out: &mut BytesMut, before: &[u8], bytes: &[u8]) {
    head(out, OpCode::Data(Data::Binary), before.len() + bytes.len());
    out.reserve(before.len() + bytes.len());
    out.put_slice(before);
    out.put_slice(bytes);
}

pub(super) fn pong(out: &mut BytesMut, bytes: &[u8]) {
    head(out, OpCode::Control(Control::Pong), bytes.len());
    out.put_slice(bytes);
}

/// The last words: all went well.
pub(super) fn close(out: &mut BytesMut) {
    const NORMAL: u16 = 1000;
    head(out, OpCode::Control(Control::Close), 2);
    out.put_u16(NORMAL);
}

/// A frame as a client sends it, with its first byte.
#[cfg(test)]
pub(super) fn masked(first: u8, payload: &[u8]) -> Vec<u8> {
    const MASK: [u8; 4] = [1, 2, 3, 4];
    let mut out = BytesMut::new();
    head(&mut out, OpCode::Data(Data::Binary), payload.len());
    out[0] = first;
    out[1] |= 0x80;
    out.put_slice(&MASK);
    let from = out.len();
    out.put_slice(payload);
    unmask(&mut out[from..], &mut MASK.clone());
    out.to_vec()
}

#[cfg(test)]
mod tests {
    use super::masked as frame;
    use super::*;

    /// What comes of `bytes` in pieces of `size`: messages put together, and the rest.
    fn decoded(bytes: &[u8], size: usize) -> Result<(Vec<Vec<u8>>, Vec<Event>), Malformed> {
        let mut decoder = Decoder::default();
        let (mut messages, mut others) = (Vec::new(), Vec::new());
        for piece in bytes.chunks(size) {
            decoder.push(piece);
            while let Some(event) = decoder.next()? {
                match event {
                    Event::Data { first, bytes } => {
                        if first {
                            messages.push(Vec::new());
                        }
                        messages.last_mut().unwrap().extend_from_slice(&bytes);
                    }
                    other => others.push(other),
                }
            }
        }
        Ok((messages, others))
    }

    #[test]
    fn messages_are_read_in_whatever_pieces_they_come() {
        let long: Vec<u8> = (0..70_000).map(|n| (n % 251) as u8).collect();
        let mut bytes = frame(0x82, b"one");
        bytes.extend(frame(0x02, b"t"));
        bytes.extend(frame(0x89, b"are you there"));
        bytes.extend(frame(0x00, b""));
        bytes.extend(frame(0x80, b"wo"));
        bytes.extend(frame(0x82, b""));
        bytes.extend(frame(0x01, b""));
        bytes.extend(frame(0x80, b"three"));
        bytes.extend(frame(0x8a, b"unasked"));
        bytes.extend(frame(0x82, &long[..300]));
        bytes.extend(frame(0x82, &long));
        bytes.extend(frame(0x88, &[3, 232]));
        for size in [1, 2, 3, 7, 1000, bytes.len()] {
            let (messages, others) = decoded(&bytes, size).unwrap();
            let want: [&[u8]; 5] = [b"one", b"two", b"three", &long[..300], &long];
            assert_eq!(messages, want, "pieces of {size}");
            let ping = Event::Ping(Bytes::from_static(b"are you there"));
            assert_eq!(others, [ping, Event::Close]);
        }
    }

    #[test]
    fn what_no_client_may_send_is_refused() {
        let unmasked = vec![0x82, 1, b'x'];
        let mut endless = vec![0x82, 0xff];
        endless.extend([0xff; 12]);
        for (bytes, why) in [
            (unmasked, "not masked"),
            (endless, "longer"),
            (frame(0xc2, b"x"), "reserved"),
            (frame(0x80, b"x"), "not begun"),
            ([frame(0x02, b"x"), frame(0x82, b"y")].concat(), "within"),
            (frame(0x09, b"x"), "control"),
            (frame(0x89, &[0; 126]), "control"),
            (frame(0x83, b"x"), "unknown"),
        ] {
            let error = decoded(&bytes, 1).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn what_is_written_has_a_head_of_its_length() {
        for (length, head) in [
            (0, vec![0x82, 1]),
            (124, vec![0x82, 125]),
            (125, vec![0x82, 126, 0, 126]),
            (65_535, vec![0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0]),
        ] {
            let mut out = BytesMut::new();
            message(&mut out, &[1], &vec![7; length]);
            assert_eq!(out[..head.len()], head);
            assert_eq!(out.len(), head.len() + 1 + length);
        }
        let mut out = BytesMut::new();
        close(&mut out);
        pong(&mut out, b"x");
        assert_eq!(&out[..], [0x88, 2, 3, 232, 0x8a, 1, b'x']);
    }
}
