//! One message on a lane: its length in three bytes, big-endian, then its protobuf. Pure.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message as _;

use crate::hub::delta::MAX_OBJECT;
use crate::hub::proto::Message;

/// A frame holds at most one object, encoded, and its envelope.
pub const MAX_FRAME: usize = MAX_OBJECT + (64 << 10);

const HEAD: usize = 3;

#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error("a frame of {0} bytes was announced; at most {MAX_FRAME} are taken")]
    TooLarge(usize),
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
}

impl FrameReader {
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
        if self.held.len() < HEAD + size {
            return Ok(None);
        }
        self.held.advance(HEAD);
        let frame = self.held.split_to(size).freeze();
        if self.held.is_empty() {
            // An idle session holds no buffer.
            self.held = BytesMut::new();
        }
        Message::decode(frame)
            .map(Some)
            .map_err(FrameError::Malformed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::proto::{EventsAck, WelcomeAck, message::Body};

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
