//! One message on a lane: its length in three bytes, big-endian, then its protobuf. Pure.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message as _;

use crate::hub::delta::MAX_OBJECT;
use crate::hub::proto::Message;

/// A frame holds at most one object, encoded, and its envelope.
pub const MAX_FRAME: usize = MAX_OBJECT + (64 << 10);

/// The largest frame that a cloud takes of an edge: a page of an inventory with keys of the greatest
/// length is half of it, a window of reports a quarter.
pub const MAX_UPWARD: usize = 1 << 20;

/// Reports, Events, keys of one message of an edge. A page of an inventory has 512, a node has at
/// most 1024 reports. Two bytes on the wire can be 200 in memory, so bytes alone bound nothing.
const MAX_UPWARD_PARTS: usize = 4096;

/// The bodies that only a cloud sends.
const CLOUDS: [u32; 7] = [2, 4, 6, 9, 10, 12, 14];

const HEAD: usize = 3;

#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error("a frame of {0} bytes was announced; at most {MAX_FRAME} are taken")]
    TooLarge(usize),
    #[error("a frame of {0} bytes was announced; an edge's are at most {MAX_UPWARD}")]
    TooLargeUpward(usize),
    #[error("a message of more than {MAX_UPWARD_PARTS} parts")]
    TooManyParts,
    #[error("an edge sent what only a cloud says")]
    NotAnEdges,
    #[error("a part of a message is longer than its frame")]
    Cut,
    #[error("a frame is not a message of this protocol")]
    Malformed(#[source] prost::DecodeError),
}

pub fn encode(message: &Message) -> Bytes {
    let size = message.encoded_len();
    let mut out = BytesMut::with_capacity(HEAD + size);
    out.put_uint(size as u64, HEAD);
    // A BytesMut grows, so encoding into it cannot fail.
    let _ = message.encode(&mut out);
    out.freeze()
}

/// Puts frames together again from whatever pieces the transport delivers.
#[derive(Default)]
pub struct FrameReader {
    held: BytesMut,
    upward: bool,
}

impl FrameReader {
    /// Reads what an edge sends: nothing that it says costs much more memory than its bytes.
    pub fn upward() -> Self {
        Self {
            upward: true,
            ..Self::default()
        }
    }

    pub fn feed(&mut self, bytes: &[u8]) {
        self.held.extend_from_slice(bytes);
    }

    /// The next whole message. After an error the lane is lost.
    pub fn next_message(&mut self) -> Result<Option<Message>, FrameError> {
        if self.held.len() < HEAD {
            return Ok(None);
        }
        let size = (&self.held[..HEAD]).get_uint(HEAD) as usize;
        if size > MAX_FRAME {
            return Err(FrameError::TooLarge(size));
        }
        if self.upward && size > MAX_UPWARD {
            return Err(FrameError::TooLargeUpward(size));
        }
        if self.held.len() < HEAD + size {
            return Ok(None);
        }
        self.held.advance(HEAD);
        let frame = self.held.split_to(size).freeze();
        if self.held.is_empty() {
            // An idle session holds no buffer.
            self.held = BytesMut::new();
        }
        if self.upward {
            check_upward(&frame)?;
        }
        Message::decode(frame)
            .map(Some)
            .map_err(FrameError::Malformed)
    }
}

/// Looks at a message before anything is made of it: who may say it, and of how many parts it is.
fn check_upward(mut message: &[u8]) -> Result<(), FrameError> {
    let mut parts = 0;
    while !message.is_empty() {
        let (tag, body) = field(&mut message)?;
        if CLOUDS.contains(&tag) {
            return Err(FrameError::NotAnEdges);
        }
        let mut body = body.unwrap_or_default();
        while !body.is_empty() {
            field(&mut body)?;
            parts += 1;
            if parts > MAX_UPWARD_PARTS {
                return Err(FrameError::TooManyParts);
            }
        }
    }
    Ok(())
}

/// Takes one field off: its number, and its bytes if it has a length.
fn field<'a>(rest: &mut &'a [u8]) -> Result<(u32, Option<&'a [u8]>), FrameError> {
    use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};
    let (tag, wire) = decode_key(rest).map_err(FrameError::Malformed)?;
    if wire != WireType::LengthDelimited {
        skip_field(wire, tag, rest, DecodeContext::default()).map_err(FrameError::Malformed)?;
        return Ok((tag, None));
    }
    let size = decode_varint(rest).map_err(FrameError::Malformed)?;
    let whole = usize::try_from(size)
        .ok()
        .and_then(|s| rest.split_at_checked(s));
    match whole {
        Some((body, after)) => {
            *rest = after;
            Ok((tag, Some(body)))
        }
        None => Err(FrameError::Cut),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::proto::{
        Batch, Event, Events, EventsAck, Inventory, Report, Reports, WelcomeAck, message::Body,
    };

    fn upward(body: Body) -> Result<Option<Message>, FrameError> {
        let mut reader = FrameReader::upward();
        reader.feed(&encode(&Message { body: Some(body) }));
        reader.next_message()
    }

    #[test]
    fn an_edge_cannot_make_much_of_little() {
        // Two bytes each on the wire.
        let reports = |n| {
            Body::Reports(Reports {
                reports: vec![Report::default(); n],
            })
        };
        let events = |n| {
            Body::Events(Events {
                events: vec![Event::default(); n],
            })
        };
        let inventory = |n| {
            Body::Inventory(Inventory {
                keys: vec![String::new(); n],
                hashes: vec![0; 16],
                last: false,
            })
        };
        for many in [reports(4097), events(4097), inventory(5000)] {
            assert!(matches!(upward(many), Err(FrameError::TooManyParts)));
        }
        for few in [reports(1024), events(32), inventory(512)] {
            assert!(upward(few).unwrap().is_some());
        }
        let batch = Body::Batch(Batch::default());
        assert!(matches!(upward(batch), Err(FrameError::NotAnEdges)));
        let mut reader = FrameReader::upward();
        reader.feed(&[0x20, 0, 0]);
        assert!(matches!(
            reader.next_message(),
            Err(FrameError::TooLargeUpward(0x20_0000))
        ));
        // A length that reaches behind the end.
        let mut reader = FrameReader::upward();
        reader.feed(&[0, 0, 2, 0x0a, 0x7f]);
        assert!(matches!(reader.next_message(), Err(FrameError::Cut)));
    }

    fn ack(sequence: u64) -> Message {
        Message {
            body: Some(Body::EventsAck(EventsAck { sequence })),
        }
    }

    #[test]
    fn frames_come_back_whole_from_single_bytes() {
        let wire = [encode(&ack(7)), encode(&ack(300))].concat();
        let mut reader = FrameReader::default();
        let mut seen = Vec::new();
        for byte in wire {
            reader.feed(&[byte]);
            seen.extend(reader.next_message().unwrap());
        }
        assert_eq!(seen, [ack(7), ack(300)]);
    }

    #[test]
    fn a_large_length_is_refused_before_its_bytes_come() {
        let mut reader = FrameReader::default();
        reader.feed(&[0xff, 0xff, 0xff]);
        assert!(matches!(
            reader.next_message(),
            Err(FrameError::TooLarge(0xff_ffff))
        ));
    }

    #[test]
    fn noise_is_an_error_and_an_unknown_message_is_not() {
        let mut reader = FrameReader::default();
        reader.feed(&[0, 0, 2, 0xff, 0xff]);
        assert!(matches!(
            reader.next_message(),
            Err(FrameError::Malformed(_))
        ));
        // Field 99, empty: a message of a later version.
        let mut reader = FrameReader::default();
        reader.feed(&[0, 0, 3, 0x9a, 0x06, 0x00]);
        assert_eq!(reader.next_message().unwrap(), Some(Message { body: None }));
    }

    #[test]
    fn the_wire_is_byte_exact() {
        let welcome = Message {
            body: Some(Body::WelcomeAck(WelcomeAck {})),
        };
        // length 2 | field 3, length-delimited | empty
        assert_eq!(encode(&welcome)[..], [0x00, 0x00, 0x02, 0x1a, 0x00]);
        // length 4 | field 12 | two bytes | field 1 varint 7
        assert_eq!(
            encode(&ack(7))[..],
            [0x00, 0x00, 0x04, 0x62, 0x02, 0x08, 0x07]
        );
    }
}
