//! The frames of SPDY/3.1 that a runtime's streaming server needs of its client.
//!
//! Sans-IO. Streams are opened by us alone; of the other end's frames those that move bytes, answer
//! or ask count. There is no flow control: neither the kubelet nor a runtime speaks it here.

use bytes::{BufMut, BytesMut};

/// A control frame of version 3.
const CONTROL: u16 = 0x8003;
const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const FIN: u8 = 1;

/// Begins the compressed headers of a connection: deflate, and the checksum of the dictionary that
/// SPDY/3 presets. What follows is stored, so that the dictionary itself is never needed.
const ZLIB: [u8; 6] = [0x78, 0x20, 0xe3, 0xc6, 0xa7, 0xc2];
/// An empty stored block: what was compressed so far can be read.
const FLUSHED: [u8; 5] = [0, 0, 0, 0xff, 0xff];

/// The other end broke the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the runtime's streaming server broke the protocol: {0}")]
pub(super) struct Malformed(&'static str);

/// What came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event<'a> {
    Data {
        stream: u32,
        bytes: &'a [u8],
    },
    /// A stream that was opened may be used.
    Replied,
    /// A stream takes nothing more.
    Reset(u32),
    Ping(u32),
}

const HEAD: usize = 8;
/// Of a control frame: a stream or a number.
const WORD: usize = 4;

/// Takes bytes as they come, gives what they mean. Holds a head and a word.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    head: [u8; HEAD],
    /// Bytes of the head that are there.
    known: usize,
    word: [u8; WORD],
    /// Bytes of the frame behind its head that are there, and that are to come.
    had: usize,
    left: usize,
}

impl Decoder {
    /// Takes from the front of `bytes` up to what means something, or all.
    pub(super) fn next<'a>(
        &mut self,
        bytes: &mut &'a [u8],
    ) -> Result<Option<Event<'a>>, Malformed> {
        loop {
            if self.known < HEAD {
                let taken = take(bytes, HEAD - self.known);
                self.head[self.known..self.known + taken.len()].copy_from_slice(taken);
                self.known += taken.len();
                if self.known < HEAD {
                    return Ok(None);
                }
                let [_, _, _, _, _, length @ ..] = self.head;
                let length = u32::from_be_bytes([0, length[0], length[1], length[2]]);
                (self.had, self.left) = (0, usize::try_from(length).unwrap_or(usize::MAX));
                if self.is_control() && u16::from_be_bytes([self.head[0], self.head[1]]) != CONTROL
                {
                    return Err(Malformed("a frame is of another version"));
                }
            }
            if !self.is_control() {
                if self.left == 0 {
                    self.known = 0;
                    continue;
                }
                if bytes.is_empty() {
                    return Ok(None);
                }
                let bytes = take(bytes, self.left);
                self.left -= bytes.len();
                let stream = word(self.head) & 0x7fff_ffff;
                return Ok(Some(Event::Data { stream, bytes }));
            }
            let taken = take(bytes, self.left);
            for byte in taken {
                if let Some(place) = self.word.get_mut(self.had) {
                    *place = *byte;
                    self.had += 1;
                }
            }
            self.left -= taken.len();
            if self.left > 0 {
                return Ok(None);
            }
            self.known = 0;
            if let Some(event) = self.control()? {
                return Ok(Some(event));
            }
        }
    }

    fn is_control(&self) -> bool {
        self.head[0] & 0x80 != 0
    }

    fn control(&self) -> Result<Option<Event<'static>>, Malformed> {
        let whole = self.had == WORD;
        let word = u32::from_be_bytes(self.word);
        match u16::from_be_bytes([self.head[2], self.head[3]]) {
            SYN_REPLY | RST_STREAM | PING if !whole => Err(Malformed("a frame is cut short")),
            SYN_REPLY => Ok(Some(Event::Replied)),
            RST_STREAM => Ok(Some(Event::Reset(word & 0x7fff_ffff))),
            PING => Ok(Some(Event::Ping(word))),
            // Settings, windows, a goodbye: its end is the connection's.
            _ => Ok(None),
        }
    }
}

fn word(head: [u8; HEAD]) -> u32 {
    u32::from_be_bytes([head[0], head[1], head[2], head[3]])
}

/// At most `most` bytes off the front.
fn take<'a>(bytes: &mut &'a [u8], most: usize) -> &'a [u8] {
    let (taken, rest) = bytes.split_at(bytes.len().min(most));
    *bytes = rest;
    taken
}

fn control(out: &mut BytesMut, kind: u16, body: &[u8]) {
    out.put_u16(CONTROL);
    out.put_u16(kind);
    // No flags; a body is short.
    out.put_u32(u32::try_from(body.len()).unwrap_or(u32::MAX));
    out.put_slice(body);
}

/// Opens a stream with one header. The first of a connection says so: headers are one compressed
/// stream.
pub(super) fn open(out: &mut BytesMut, stream: u32, first: bool, header: (&str, &str)) {
    let mut block = BytesMut::new();
    block.put_u32(1);
    for text in [header.0, header.1] {
        block.put_u32(u32::try_from(text.len()).unwrap_or(u32::MAX));
        block.put_slice(text.as_bytes());
    }
    let mut body = BytesMut::new();
    body.put_u32(stream);
    // Associated with no other, of the highest priority, in no slot.
    body.put_u32(0);
    body.put_u16(0);
    if first {
        body.put_slice(&ZLIB);
    }
    let length = u16::try_from(block.len()).unwrap_or(u16::MAX);
    body.put_u8(0);
    body.put_u16_le(length);
    body.put_u16_le(!length);
    body.put_slice(&block);
    body.put_slice(&FLUSHED);
    control(out, SYN_STREAM, &body);
}

pub(super) fn data(out: &mut BytesMut, stream: u32, bytes: &[u8]) {
    out.reserve(HEAD + bytes.len());
    out.put_u32(stream);
    // No flags; a piece is far shorter than the 24 bits that a length has.
    out.put_u32(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
    out.put_slice(bytes);
}

/// Nothing more comes on this stream.
pub(super) fn finish(out: &mut BytesMut, stream: u32) {
    out.put_u32(stream);
    out.put_u32(u32::from(FIN) << 24);
}

/// A ping is answered with itself.
pub(super) fn pong(out: &mut BytesMut, number: u32) {
    control(out, PING, &number.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_in_whatever_pieces_they_come() {
        let mut sent = BytesMut::new();
        control(&mut sent, SYN_REPLY, &[0, 0, 0, 1, 9, 9, 9]);
        data(&mut sent, 3, b"some bytes");
        data(&mut sent, 3, b"");
        control(&mut sent, 4, &[0, 0, 0, 0]);
        finish(&mut sent, 3);
        pong(&mut sent, 8);
        control(&mut sent, RST_STREAM, &[0, 0, 0, 5, 0, 0, 0, 1]);
        control(&mut sent, 7, &[0; 8]);
        for size in [1, 3, 8, sent.len()] {
            let mut decoder = Decoder::default();
            let (mut bytes, mut others) = (Vec::new(), Vec::new());
            for mut piece in sent.chunks(size) {
                while let Some(event) = decoder.next(&mut piece).unwrap() {
                    match event {
                        Event::Data {
                            stream: 3,
                            bytes: b,
                        } => bytes.extend_from_slice(b),
                        Event::Data { .. } => panic!("{event:?}"),
                        Event::Replied => others.push("replied".to_owned()),
                        Event::Reset(stream) => others.push(format!("reset {stream}")),
                        Event::Ping(number) => others.push(format!("ping {number}")),
                    }
                }
                assert!(piece.is_empty());
            }
            assert_eq!(bytes, b"some bytes", "pieces of {size}");
            assert_eq!(others, ["replied", "ping 8", "reset 5"]);
        }
    }

    #[test]
    fn another_version_and_a_short_frame_are_refused() {
        let mut decoder = Decoder::default();
        let http = b"HTTP/1.1 400 Bad Request";
        let mut other = &[[0x80, 2, 0, 1].as_slice(), http].concat()[..];
        assert!(decoder.next(&mut other).is_err());
        let mut short = BytesMut::new();
        control(&mut short, PING, &[0, 0]);
        assert!(Decoder::default().next(&mut &short[..]).is_err());
    }

    #[test]
    fn a_stream_opens_as_on_the_wire() {
        let mut out = BytesMut::new();
        open(&mut out, 1, true, ("streamtype", "error"));
        let hex: String = out.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            hex,
            "8003000100000035000000010000000000007820e3c6a7c200\
             1b00e4ff000000010000000a73747265616d74797065000000056572726f72000000ffff"
        );
    }
}
