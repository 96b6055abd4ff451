//! DNS messages as far as a forwarder needs them (RFC 1035; pure).
//!
//! Reads the header and the one question of a query; writes answers of addresses. Anything else of
//! a message is passed on as it is.

use std::net::IpAddr;

/// Header: id, flags, four counts.
const HEADER: usize = 12;
const CLASS_IN: u16 = 1;
/// How long a Service's address may be kept; Services change seldom, but they do.
const TTL: u32 = 5;

const FLAG_RESPONSE: u8 = 0x80;
const FLAG_AUTHORITATIVE: u8 = 0x04;
const FLAG_RECURSION_DESIRED: u8 = 0x01;
const FLAG_RECURSION_AVAILABLE: u8 = 0x80;
const OPCODE: u8 = 0x78;

/// The type of record that is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Type {
    A,
    Aaaa,
    Other(u16),
}

/// How a question ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Code {
    NoError,
    FormatError,
    ServerFailure,
    NoSuchName,
    NotImplemented,
}

impl Code {
    fn number(self) -> u8 {
        match self {
            Code::NoError => 0,
            Code::FormatError => 1,
            Code::ServerFailure => 2,
            Code::NoSuchName => 3,
            Code::NotImplemented => 4,
        }
    }
}

/// The question of a query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Question {
    /// Without the last dot, as it was written.
    pub(super) name: String,
    pub(super) kind: Type,
    /// Where it ends in the query.
    end: usize,
}

/// What is no query that we can pass on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Malformed {
    /// Not even a header, or an answer: two forwarders must not talk to each other for ever.
    Silent,
    Told(Code),
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let pair = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes(pair.try_into().ok()?))
}

/// The one question of a query.
pub(super) fn parse_query(query: &[u8]) -> Result<Question, Malformed> {
    let flags = query
        .get(2)
        .filter(|_| query.len() >= HEADER)
        .ok_or(Malformed::Silent)?;
    if flags & FLAG_RESPONSE != 0 {
        return Err(Malformed::Silent);
    }
    if flags & OPCODE != 0 {
        return Err(Malformed::Told(Code::NotImplemented));
    }
    if u16_at(query, 4) != Some(1) {
        return Err(Malformed::Told(Code::FormatError));
    }
    question(query).ok_or(Malformed::Told(Code::FormatError))
}

fn question(message: &[u8]) -> Option<Question> {
    let mut name = String::new();
    let mut at = HEADER;
    loop {
        let length = usize::from(*message.get(at)?);
        at += 1;
        match length {
            0 => break,
            // A question's name is never compressed.
            1..=63 => {
                let label = message.get(at..at + length)?;
                at += length;
                if !name.is_empty() {
                    name.push('.');
                }
                // A byte that is no ASCII matches no name of ours; it is passed on as it came.
                name.extend(label.iter().map(|b| char::from(*b)));
            }
            _ => return None,
        }
        if at - HEADER > 255 {
            return None;
        }
    }
    let kind = match u16_at(message, at)? {
        1 => Type::A,
        28 => Type::Aaaa,
        other => Type::Other(other),
    };
    u16_at(message, at + 2)?;
    Some(Question {
        name,
        kind,
        end: at + 4,
    })
}

/// The header of an answer to this query.
fn header(query: &[u8], code: Code, questions: u16, answers: u16, authoritative: u8) -> Vec<u8> {
    let mut out = query[..2].to_vec();
    out.push(FLAG_RESPONSE | authoritative | (query[2] & FLAG_RECURSION_DESIRED));
    out.push(FLAG_RECURSION_AVAILABLE | code.number());
    out.extend(questions.to_be_bytes());
    out.extend(answers.to_be_bytes());
    out.extend([0; 4]);
    out
}

/// An answer of our own, with an address a record.
pub(super) fn answer(
    query: &[u8],
    question: &Question,
    code: Code,
    addresses: &[IpAddr],
) -> Vec<u8> {
    let count = u16::try_from(addresses.len()).unwrap_or_default();
    let mut out = header(query, code, 1, count, FLAG_AUTHORITATIVE);
    out.extend(&query[HEADER..question.end]);
    for address in addresses {
        let (kind, data) = match address {
            IpAddr::V4(ip) => (1_u16, ip.octets().to_vec()),
            IpAddr::V6(ip) => (28, ip.octets().to_vec()),
        };
        // The name is the question's, by a pointer to it.
        out.extend([0xc0, 0x0c]);
        out.extend(kind.to_be_bytes());
        out.extend(CLASS_IN.to_be_bytes());
        out.extend(TTL.to_be_bytes());
        out.extend(u16::try_from(data.len()).unwrap_or_default().to_be_bytes());
        out.extend(data);
    }
    out
}

/// An answer that says only how it failed; `None` where there is no header to answer.
pub(super) fn error(query: &[u8], code: Code) -> Option<Vec<u8>> {
    if query.len() < HEADER {
        return None;
    }
    let asked = question(query).filter(|_| u16_at(query, 4) == Some(1));
    let mut out = header(query, code, u16::from(asked.is_some()), 0, 0);
    if let Some(asked) = asked {
        out.extend(&query[HEADER..asked.end]);
    }
    Some(out)
}

/// The message under another id.
pub(super) fn with_id(message: &[u8], id: u16) -> Vec<u8> {
    let mut out = message.to_vec();
    if let Some(old) = out.get_mut(..2) {
        old.copy_from_slice(&id.to_be_bytes());
    }
    out
}

/// The answer under the id of the query that it is for.
pub(super) fn with_id_of(answer: &[u8], query: &[u8]) -> Vec<u8> {
    with_id(answer, u16_at(query, 0).unwrap_or_default())
}

/// Whether the message answers what was sent: same id, an answer, same question.
pub(super) fn answers(message: &[u8], sent: &[u8]) -> bool {
    let flags = message.get(2).copied().unwrap_or_default();
    let same_question = match (question(message), question(sent)) {
        (Some(a), Some(b)) => a.kind == b.kind && a.name.eq_ignore_ascii_case(&b.name),
        // Some resolvers leave the question out of an error.
        (None, Some(_)) => u16_at(message, 4) == Some(0),
        (Some(_) | None, None) => false,
    };
    message.len() >= HEADER
        && flags & FLAG_RESPONSE != 0
        && u16_at(message, 0) == u16_at(sent, 0)
        && same_question
}

#[cfg(test)]
pub(super) mod testing {
    use super::CLASS_IN;

    /// A query as a resolver sends it.
    pub(in super::super) fn query(id: u16, name: &str, kind: u16) -> Vec<u8> {
        let mut out = id.to_be_bytes().to_vec();
        out.extend([0x01, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        for label in name.split('.').filter(|l| !l.is_empty()) {
            out.push(u8::try_from(label.len()).unwrap());
            out.extend(label.as_bytes());
        }
        out.push(0);
        out.extend(kind.to_be_bytes());
        out.extend(CLASS_IN.to_be_bytes());
        out
    }
}

#[cfg(test)]
mod tests {
    use super::testing::query;
    use super::*;

    #[test]
    fn a_query_is_read() {
        let parsed = parse_query(&query(7, "Web.example.com", 28)).unwrap();
        assert_eq!(
            (parsed.name.as_str(), parsed.kind),
            ("Web.example.com", Type::Aaaa)
        );
        assert_eq!(parse_query(&query(7, "", 2)).unwrap().kind, Type::Other(2));
    }

    #[test]
    fn what_is_no_query_is_refused_or_ignored() {
        let good = query(7, "a.b", 1);
        let changed = |at: usize, byte: u8| {
            let mut q = good.clone();
            q[at] = byte;
            q
        };
        for (bytes, want) in [
            (Vec::new(), Malformed::Silent),
            (good[..11].to_vec(), Malformed::Silent),
            (changed(2, 0x81), Malformed::Silent),
            (changed(2, 0x28), Malformed::Told(Code::NotImplemented)),
            (changed(5, 0), Malformed::Told(Code::FormatError)),
            (changed(5, 2), Malformed::Told(Code::FormatError)),
            (
                good[..good.len() - 1].to_vec(),
                Malformed::Told(Code::FormatError),
            ),
            (changed(12, 0xc0), Malformed::Told(Code::FormatError)),
            (changed(12, 60), Malformed::Told(Code::FormatError)),
            (
                query(7, &"abcdefghi.".repeat(30), 1),
                Malformed::Told(Code::FormatError),
            ),
        ] {
            assert_eq!(parse_query(&bytes), Err(want), "{bytes:?}");
            if let Some(answer) = error(&bytes, Code::FormatError) {
                assert_eq!(&answer[..2], &bytes[..2]);
            }
        }
    }

    #[test]
    fn any_cut_or_changed_byte_is_survived() {
        let good = query(7, "web.shop.svc.cluster.local", 1);
        for cut in 0..good.len() {
            let _ = parse_query(&good[..cut]);
            let _ = error(&good[..cut], Code::ServerFailure);
            for byte in [0, 1, 63, 64, 192, 255] {
                let mut odd = good.clone();
                odd[cut] = byte;
                if let Ok(q) = parse_query(&odd) {
                    answer(&odd, &q, Code::NoError, &[]);
                }
                answers(&odd, &good);
            }
        }
    }

    #[test]
    fn an_answer_holds_the_address() {
        let q = query(0x1234, "a.b", 1);
        let parsed = parse_query(&q).unwrap();
        let ip = "10.96.0.1".parse().unwrap();
        let out = answer(&q, &parsed, Code::NoError, &[ip]);
        assert_eq!(
            out,
            [
                &[
                    0x12, 0x34, 0x85, 0x80, 0, 1, 0, 1, 0, 0, 0, 0, 1, b'a', 1, b'b', 0, 0, 1, 0, 1
                ][..],
                &[0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, 10, 96, 0, 1],
            ]
            .concat()
        );
    }

    #[test]
    fn only_the_answer_to_the_question_counts() {
        let sent = query(9, "a.b", 1);
        let mut good = sent.clone();
        good[2] |= 0x80;
        assert!(answers(&good, &sent));
        assert!(!answers(&sent, &sent), "a query is no answer");
        assert!(!answers(&with_id(&good, 8), &sent));
        let mut other = query(9, "a.c", 1);
        other[2] |= 0x80;
        assert!(!answers(&other, &sent));
        assert!(!answers(&good[..5], &sent));
    }
}
