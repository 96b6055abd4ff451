//! Why a connection or a stream ended, in words for the people at either end.

use std::sync::Arc;

use super::super::mux::{StreamEnd, Violation};
use super::super::tls::TrustError;

/// Why the server did not take the client's certificate, as its TLS alert tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    Expired,
    Revoked,
    /// Not signed by a root that the cloud has, or not a certificate for this use.
    Unknown,
    /// None was shown.
    Missing,
    /// The server does not speak our protocol on this port.
    Protocol,
    /// Another TLS alert.
    Other(u8),
}

impl Refusal {
    pub(in crate::hub) fn from_alert(alert: u8) -> Self {
        match alert {
            45 => Refusal::Expired,
            44 => Refusal::Revoked,
            42 | 43 | 46 | 48 | 49 | 51 => Refusal::Unknown,
            116 => Refusal::Missing,
            120 => Refusal::Protocol,
            other => Refusal::Other(other),
        }
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Refusal::Expired => f.write_str("this device's certificate has expired"),
            Refusal::Revoked => f.write_str("this device's certificate was revoked"),
            Refusal::Unknown => f.write_str(
                "the cloud does not know this device's certificate: join again with a new token",
            ),
            Refusal::Missing => f.write_str("this device showed no certificate"),
            Refusal::Protocol => f.write_str("no CloudCore answers on this port"),
            Refusal::Other(alert) => write!(f, "TLS alert {alert}"),
        }
    }
}

#[derive(Debug, Clone, thiserror::Error)]
pub enum TransportError {
    #[error("the cloud refused the connection: {0}")]
    Refused(Refusal),
    #[error(transparent)]
    Trust(#[from] TrustError),
    #[error("no answer: {0}")]
    Timeout(&'static str),
    #[error("the peer closed the connection (code {code}): {reason}")]
    ClosedByPeer { code: u32, reason: String },
    #[error("this end closed the connection")]
    ClosedHere,
    #[error("the peer reset the stream (code {code})")]
    Reset { code: u32 },
    #[error("the peer wants no more of the stream (code {code})")]
    Stopped { code: u32 },
    #[error("the stream ended in the middle of a message")]
    CutShort,
    #[error("{size} bytes are more than the {limit} allowed")]
    TooLarge { size: usize, limit: usize },
    #[error("the peer broke the protocol: {0}")]
    Protocol(String),
    #[error("the transport failed")]
    Unusable(#[source] Arc<dyn std::error::Error + Send + Sync>),
}

impl TransportError {
    /// The error and its causes in one line.
    pub fn explain(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            text.push_str(&format!(": {cause}"));
            source = cause.source();
        }
        text
    }

    pub(in crate::hub) fn unusable(e: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        TransportError::Unusable(Arc::from(e.into()))
    }

    /// A device that was switched off, or a router that forgot it.
    pub(in crate::hub) fn gone() -> Self {
        Self::unusable("the peer went away without a word")
    }

    /// An I/O error of a TLS stream: an alert of the peer is told apart.
    pub(in crate::hub) fn from_io(error: std::io::Error) -> Self {
        let inner = error
            .get_ref()
            .and_then(|e| e.downcast_ref::<rustls::Error>());
        match inner {
            Some(rustls::Error::AlertReceived(alert)) => {
                TransportError::Refused(Refusal::from_alert(u8::from(*alert)))
            }
            // rustls would have it read a manual.
            Some(_) | None if error.kind() == std::io::ErrorKind::UnexpectedEof => Self::gone(),
            Some(_) | None => Self::unusable(error),
        }
    }
}

impl From<Violation> for TransportError {
    fn from(violation: Violation) -> Self {
        TransportError::Protocol(violation.to_string())
    }
}

impl From<StreamEnd> for TransportError {
    fn from(end: StreamEnd) -> Self {
        match end {
            StreamEnd::Reset(code) => TransportError::Reset { code },
            StreamEnd::Stopped(code) => TransportError::Stopped { code },
            StreamEnd::Gone => TransportError::Protocol("the stream was ended here before".into()),
        }
    }
}

/// The code of an end over QUIC; ours are small.
pub(in crate::hub) fn code(n: quinn_proto::VarInt) -> u32 {
    u32::try_from(n.into_inner()).unwrap_or(u32::MAX)
}

/// QUIC carries TLS alerts as 0x100 and the alert (RFC 9001, section 4.8).
fn alert(n: u64) -> Option<u8> {
    (0x100..0x200).contains(&n).then_some((n & 0xff) as u8)
}

impl From<quinn_proto::ConnectionError> for TransportError {
    fn from(error: quinn_proto::ConnectionError) -> Self {
        use quinn_proto::ConnectionError as E;
        match error {
            E::ConnectionClosed(close) => match alert(close.error_code.into()) {
                Some(alert) => TransportError::Refused(Refusal::from_alert(alert)),
                None => Self::unusable(E::ConnectionClosed(close)),
            },
            E::ApplicationClosed(close) => TransportError::ClosedByPeer {
                code: code(close.error_code),
                reason: String::from_utf8_lossy(&close.reason)
                    .chars()
                    .take(256)
                    .collect(),
            },
            E::TimedOut => TransportError::Timeout("the link is silent"),
            E::LocallyClosed => TransportError::ClosedHere,
            other @ (E::VersionMismatch | E::TransportError(_) | E::Reset | E::CidsExhausted) => {
                Self::unusable(other)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_is_gone_is_called_that_and_sends_nobody_to_a_manual() {
        let error = std::io::Error::new(
            std::io::ErrorKind::UnexpectedEof,
            "peer closed connection without sending TLS close_notify: https://example.com/manual",
        );
        let words = TransportError::from_io(error).explain();
        assert!(words.contains("went away without a word"), "{words}");
        assert!(!words.contains("https"), "{words}");
    }
}
