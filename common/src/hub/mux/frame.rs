//! The frames that carry streams over a WebSocket. One binary message holds one or more.
//!
//! ```text
//! type (1 byte), then varints (LEB128, at most 5 bytes each) and bytes:
//! 01 open    stream class            05 stop    stream code
//! 02 data    stream length bytes     06 window  stream credit
//! 03 fin     stream                  07 ping    id
//! 04 reset   stream code             08 pong    id
//!                                    09 close   code length reason
//! ```

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::hub::transport::Class;

/// The longest binary message: long enough to carry bulk, short enough that what is urgent never
/// waits long behind it on a thin link.
pub const MAX_MESSAGE: usize = 4096;
/// What a data frame spends beside its bytes: type, stream and length.
pub(super) const DATA_OVERHEAD: usize = 1 + 5 + 2;
/// A close says why in a sentence.
pub(super) const MAX_REASON: usize = 256;

/// What went wrong while reading a frame. The peer is broken or hostile: the connection ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("a frame is cut short")]
    Short,
    #[error("a number is longer than 32 bits")]
    Varint,
    #[error("frame type {0} is unknown")]
    Type(u8),
    #[error("a message of {0} bytes is longer than {MAX_MESSAGE}")]
    Long(usize),
    #[error("a close reason is too long or not text")]
    Reason,
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    Open {
        stream: u32,
        class: Class,
    },
    Data {
        stream: u32,
        bytes: Bytes,
    },
    Fin {
        stream: u32,
    },
    Reset {
        stream: u32,
        code: u32,
    },
    Stop {
        stream: u32,
        code: u32,
    },
    /// The peer may send this many bytes more on the stream.
    Window {
        stream: u32,
        credit: u32,
    },
    Ping {
        id: u32,
    },
    Pong {
        id: u32,
    },
    Close {
        code: u32,
        reason: String,
    },
}

impl Frame {
    /// Appends the frame.
    pub fn encode(&self, out: &mut BytesMut) {
        match self {
            Frame::Open { stream, class } => numbers(out, 1, &[*stream, class.number().into()]),
            Frame::Data { stream, bytes } => {
                let length = u32::try_from(bytes.len()).expect("the mux cuts data to one message");
                numbers(out, 2, &[*stream, length]);
                out.put_slice(bytes);
            }
            Frame::Fin { stream } => numbers(out, 3, &[*stream]),
            Frame::Reset { stream, code } => numbers(out, 4, &[*stream, *code]),
            Frame::Stop { stream, code } => numbers(out, 5, &[*stream, *code]),
            Frame::Window { stream, credit } => numbers(out, 6, &[*stream, *credit]),
            Frame::Ping { id } => numbers(out, 7, &[*id]),
            Frame::Pong { id } => numbers(out, 8, &[*id]),
            Frame::Close { code, reason } => {
                let mut end = reason.len().min(MAX_REASON);
                while !reason.is_char_boundary(end) {
                    end -= 1;
                }
                let length = u32::try_from(end).expect("at most MAX_REASON");
                numbers(out, 9, &[*code, length]);
                out.put_slice(&reason.as_bytes()[..end]);
            }
        }
    }

    /// Takes the first frame off a message.
    pub fn decode(input: &mut Bytes) -> Result<Self, FrameError> {
        if input.len() > MAX_MESSAGE {
            return Err(FrameError::Long(input.len()));
        }
        if input.is_empty() {
            return Err(FrameError::Short);
        }
        let kind = input.get_u8();
        if !(1..=9).contains(&kind) {
            return Err(FrameError::Type(kind));
        }
        let first = varint(input)?;
        let stream = first;
        Ok(match kind {
            1 => Frame::Open {
                stream,
                class: Class::from_number(varint(input)?),
            },
            2 => {
                let length = varint(input)?;
                Frame::Data {
                    stream,
                    bytes: take(input, length)?,
                }
            }
            3 => Frame::Fin { stream },
            4 => Frame::Reset {
                stream,
                code: varint(input)?,
            },
            5 => Frame::Stop {
                stream,
                code: varint(input)?,
            },
            6 => Frame::Window {
                stream,
                credit: varint(input)?,
            },
            7 => Frame::Ping { id: first },
            8 => Frame::Pong { id: first },
            _close => {
                let length = varint(input)?;
                let bytes = take(input, length)?;
                let reason = String::from_utf8(bytes.to_vec()).map_err(|_| FrameError::Reason)?;
                if reason.len() > MAX_REASON {
                    return Err(FrameError::Reason);
                }
                Frame::Close {
                    code: first,
                    reason,
                }
            }
        })
    }
}

fn numbers(out: &mut BytesMut, kind: u8, values: &[u32]) {
    out.put_u8(kind);
    for value in values {
        let mut rest = *value;
        while rest >= 0x80 {
            out.put_u8((rest & 0x7f) as u8 | 0x80);
            rest >>= 7;
        }
        out.put_u8(rest as u8);
    }
}

fn varint(input: &mut Bytes) -> Result<u32, FrameError> {
    let mut value = 0u64;
    for shift in [0, 7, 14, 21, 28] {
        if input.is_empty() {
            return Err(FrameError::Short);
        }
        let byte = input.get_u8();
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return u32::try_from(value).map_err(|_| FrameError::Varint);
        }
    }
    Err(FrameError::Varint)
}

fn take(input: &mut Bytes, length: u32) -> Result<Bytes, FrameError> {
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if length > input.len() {
        return Err(FrameError::Short);
    }
    Ok(input.split_to(length))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Vec<(Frame, &'static str)> {
        vec![
            (
                Frame::Open {
                    stream: 1,
                    class: Class::Control,
                },
                "01 01 00",
            ),
            (
                Frame::Open {
                    stream: 300,
                    class: Class::Bulk,
                },
                "01 ac02 03",
            ),
            (
                Frame::Data {
                    stream: 2,
                    bytes: Bytes::from_static(b"hub"),
                },
                "02 02 03 687562",
            ),
            (Frame::Fin { stream: 2 }, "03 02"),
            (Frame::Reset { stream: 5, code: 7 }, "04 05 07"),
            (
                Frame::Stop {
                    stream: 5,
                    code: 128,
                },
                "05 05 8001",
            ),
            (
                Frame::Window {
                    stream: 9,
                    credit: 65536,
                },
                "06 09 808004",
            ),
            (Frame::Ping { id: 3 }, "07 03"),
            (Frame::Pong { id: u32::MAX }, "08 ffffffff0f"),
            (
                Frame::Close {
                    code: 2,
                    reason: "bye".into(),
                },
                "09 02 03 627965",
            ),
        ]
    }

    fn bytes(hex: &str) -> Bytes {
        let digits: String = hex.split_whitespace().collect();
        let pairs = digits.as_bytes().chunks(2);
        pairs
            .map(|p| u8::from_str_radix(std::str::from_utf8(p).expect("hex"), 16).expect("hex"))
            .collect()
    }

    #[test]
    fn frames_keep_their_bytes() {
        for (frame, hex) in samples() {
            let mut out = BytesMut::new();
            frame.encode(&mut out);
            assert_eq!(out.freeze(), bytes(hex), "{frame:?}");
            assert_eq!(Frame::decode(&mut bytes(hex)), Ok(frame));
        }
    }

    #[test]
    fn a_cut_frame_is_short_and_nothing_is_read_twice() {
        for (frame, hex) in samples() {
            let whole = bytes(hex);
            for end in 0..whole.len() {
                let cut = Frame::decode(&mut whole.slice(..end));
                assert_eq!(cut, Err(FrameError::Short), "{frame:?} at {end}");
            }
            let mut two = bytes(&format!("{hex} 07 01"));
            assert_eq!(Frame::decode(&mut two), Ok(frame));
            assert_eq!(Frame::decode(&mut two), Ok(Frame::Ping { id: 1 }));
            assert!(two.is_empty());
        }
    }

    #[test]
    fn what_no_peer_of_ours_writes_is_an_error() {
        let table = [
            ("00 01", FrameError::Type(0)),
            ("0a 01", FrameError::Type(10)),
            ("07 ffffffff1f", FrameError::Varint),
            ("07 8080808080", FrameError::Varint),
            ("02 01 ffffffff0f 00", FrameError::Short),
            ("09 01 01 ff", FrameError::Reason),
        ];
        for (hex, error) in table {
            assert_eq!(Frame::decode(&mut bytes(hex)), Err(error), "{hex}");
        }
        let mut long = Bytes::from(vec![2; MAX_MESSAGE + 1]);
        assert_eq!(
            Frame::decode(&mut long),
            Err(FrameError::Long(MAX_MESSAGE + 1))
        );
    }

    #[test]
    fn a_reason_is_cut_at_a_character() {
        let mut out = BytesMut::new();
        let reason = format!("{}é", "a".repeat(MAX_REASON - 1));
        Frame::Close { code: 1, reason }.encode(&mut out);
        let read = Frame::decode(&mut out.freeze());
        assert_eq!(
            read,
            Ok(Frame::Close {
                code: 1,
                reason: "a".repeat(MAX_REASON - 1)
            })
        );
    }
}
