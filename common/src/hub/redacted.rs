//! How messages that carry secrets or objects are printed: who and how much, never what.
//!
//! The generator is told to leave their `Debug` out (`tests/generated.rs`), so a new field shows
//! nowhere until it is named here.

use std::fmt::{Debug, Formatter, Result};

use crate::hub::proto::{JoinRequest, Put, Report, Token, TokenGiven};

/// Stands for bytes that are not shown.
struct Hidden(usize);

impl Debug for Hidden {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        write!(f, "<{} bytes>", self.0)
    }
}

impl Debug for Token {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.debug_struct("Token")
            .field("id", &self.id)
            .field("secret", &Hidden(self.secret.len()))
            .field("endpoints", &self.endpoints)
            .field("cluster_id", &self.cluster_id)
            .finish_non_exhaustive()
    }
}

impl Debug for JoinRequest {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.debug_struct("JoinRequest")
            .field("version", &self.version)
            .field("token_id", &self.token_id)
            .field("token_secret", &Hidden(self.token_secret.len()))
            .field("node_name", &self.node_name)
            .field("agent_version", &self.agent_version)
            .field("os", &self.os)
            .field("arch", &self.arch)
            .finish_non_exhaustive()
    }
}

impl Debug for TokenGiven {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.debug_struct("TokenGiven")
            .field("token", &Hidden(self.token.len()))
            .field("lifetime_seconds", &self.lifetime_seconds)
            .finish()
    }
}

impl Debug for Put {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.debug_struct("Put")
            .field("key", &self.key)
            .field("encoding", &self.encoding)
            .field("payload", &Hidden(self.payload.len()))
            .field("size", &self.size)
            .field("absent", &self.absent)
            .finish_non_exhaustive()
    }
}

impl Debug for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.debug_struct("Report")
            .field("key", &self.key)
            .field("sequence", &self.sequence)
            .field("encoding", &self.encoding)
            .field("payload", &Hidden(self.payload.len()))
            .field("size", &self.size)
            .field("gone", &self.gone)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::proto::{self, message::Body};

    #[test]
    fn no_secret_is_printed_however_deep_it_lies() {
        let secret = "s3cr3t-s3cr3t";
        let bytes = secret.as_bytes().to_vec();
        let as_list = format!("{bytes:?}");
        let in_message = |body| {
            let message = proto::Message { body: Some(body) };
            [format!("{message:?}"), format!("{message:#?}")]
        };
        let put = Put {
            key: "Secret/a/b".into(),
            payload: bytes.clone(),
            ..Default::default()
        };
        let report = Report {
            payload: bytes.clone(),
            ..Default::default()
        };
        let given = TokenGiven {
            token: secret.into(),
            lifetime_seconds: 7,
        };
        let mut shown = vec![
            format!(
                "{:?}",
                Token {
                    id: "id".into(),
                    secret: bytes.clone(),
                    ..Default::default()
                }
            ),
            format!(
                "{:?}",
                JoinRequest {
                    token_secret: bytes,
                    ..Default::default()
                }
            ),
        ];
        shown.extend(in_message(Body::Batch(proto::Batch {
            puts: vec![put],
            ..Default::default()
        })));
        shown.extend(in_message(Body::Reports(proto::Reports {
            reports: vec![report],
        })));
        shown.extend(in_message(Body::Response(proto::Response {
            id: 1,
            body: Some(proto::response::Body::Token(given)),
        })));
        for text in shown {
            assert!(text.contains("<13 bytes>"), "{text}");
            let plain = text.replace(char::is_whitespace, "");
            let list = as_list.replace(char::is_whitespace, "");
            assert!(!plain.contains(secret) && !plain.contains(&list), "{text}");
            assert!(!plain.contains(list.trim_matches(['[', ']'])), "{text}");
        }
    }
}
