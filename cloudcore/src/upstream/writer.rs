//! The seam to the API server: what is written for a node, and what an answer means.
//!
//! - Owns: the list of calls, the reading of an HTTP answer as one of our errors, and for each
//!   error the rule by which it is tried again.
//! - Takes: HTTP status, `Status` object and `Retry-After` header of an answer.
//! - Gives: [`ApiWriter`], implemented over `kube::Client` in [`super::api`] and scripted in tests.
//! - Never: waits, retries or decides what to write.

use std::fmt;
use std::time::Duration;

use common::ids::NodeName;
use futures::future::BoxFuture;
use serde_json::Value;

/// One request to the API server, made as a node.
#[derive(Clone, PartialEq)]
pub enum Call {
    /// Strategic merge patch of `pods/status`.
    PatchPodStatus {
        namespace: String,
        name: String,
        body: Value,
    },
    /// DELETE with `gracePeriodSeconds=0` and the UID as precondition.
    DeletePod {
        namespace: String,
        name: String,
        uid: String,
    },
    /// Strategic merge patch of the node's own `nodes/status`.
    PatchNodeStatus {
        body: Value,
    },
    CreateEvent {
        namespace: String,
        body: Value,
    },
    /// Merge patch of an Event.
    PatchEvent {
        namespace: String,
        name: String,
        body: Value,
    },
    /// `serviceaccounts/token`.
    RequestToken {
        namespace: String,
        service_account: String,
        body: Value,
    },
}

impl fmt::Debug for Call {
    /// Verb and object, never the body.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PatchPodStatus {
                namespace, name, ..
            } => {
                write!(f, "patch status of Pod {namespace}/{name}")
            }
            Self::DeletePod {
                namespace, name, ..
            } => write!(f, "delete Pod {namespace}/{name}"),
            Self::PatchNodeStatus { .. } => f.write_str("patch status of its Node"),
            Self::CreateEvent { namespace, .. } => write!(f, "create an Event in {namespace}"),
            Self::PatchEvent {
                namespace, name, ..
            } => {
                write!(f, "patch Event {namespace}/{name}")
            }
            Self::RequestToken {
                namespace,
                service_account,
                ..
            } => {
                write!(
                    f,
                    "request a token of ServiceAccount {namespace}/{service_account}"
                )
            }
        }
    }
}

/// Makes calls as nodes. The answer is the object that the API server returned; for
/// [`Call::RequestToken`] it holds a secret and is never printed.
pub trait ApiWriter: Send + Sync + 'static {
    fn send<'a>(
        &'a self,
        node: &'a NodeName,
        call: Call,
    ) -> BoxFuture<'a, Result<Value, WriteError>>;
}

/// Why the API server did not do it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    #[error("somebody else wrote the object in between (409)")]
    Conflict,
    #[error("an object of that name exists already (409)")]
    Exists,
    #[error("another object has that name now: the UID differs")]
    AnotherObject,
    #[error("the object does not exist (404)")]
    Missing,
    #[error("its namespace is being deleted (403)")]
    NamespaceEnding,
    #[error("the API server does not let the node do this (403): {0}")]
    Forbidden(String),
    #[error("the API server refused the content (422 or 400): {0}")]
    Invalid(String),
    #[error("the API server is busy (429)")]
    Busy { retry_after: Option<Duration> },
    #[error("the API server cannot be used at present: {0}")]
    Unavailable(String),
}

/// What to do about an error: the rule beside the error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// Read the object again and decide again, at once.
    Reread,
    /// The same again after a back-off; the API server itself is in doubt, so all writes slow down.
    SlowDown { at_least: Option<Duration> },
    /// The same again after a back-off of this object's own.
    Later,
    /// The API server has answered for good.
    Never,
}

impl WriteError {
    pub fn retry(&self) -> Retry {
        match self {
            Self::Conflict => Retry::Reread,
            // The authorizer's graph lags the binding of a Pod, and roles may be on their way.
            Self::Forbidden(_) => Retry::Later,
            Self::Busy { retry_after } => Retry::SlowDown {
                at_least: *retry_after,
            },
            Self::Unavailable(_) => Retry::SlowDown { at_least: None },
            Self::Exists
            | Self::AnotherObject
            | Self::Missing
            | Self::NamespaceEnding
            | Self::Invalid(_) => Retry::Never,
        }
    }

    /// Reads a failed answer. `status` is the body as a `Status` object, or null.
    pub fn read(code: u16, status: &Value, retry_after: Option<Duration>) -> Self {
        let reason = status
            .get("reason")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let said: String = status
            .get("message")
            .and_then(Value::as_str)
            .unwrap_or("no message")
            .chars()
            .take(300)
            .collect();
        let causes = status.pointer("/details/causes").and_then(Value::as_array);
        let cause = |key: &str, value: &str| {
            let is = |c: &Value| c.get(key).and_then(Value::as_str) == Some(value);
            causes.is_some_and(|all| all.iter().any(is))
        };
        match code {
            404 | 410 => Self::Missing,
            409 if reason == "AlreadyExists" => Self::Exists,
            // The precondition of a DELETE; it has no cause of its own, only this sentence.
            409 if said.contains("UID in precondition") => Self::AnotherObject,
            409 => Self::Conflict,
            422 if cause("field", "metadata.uid") => Self::AnotherObject,
            403 if cause("reason", "NamespaceTerminating") => Self::NamespaceEnding,
            403 => Self::Forbidden(said),
            429 => Self::Busy { retry_after },
            // An expired token of CloudCore's own: it is renewed beside us.
            401 | 408 => Self::Unavailable(said),
            400..=499 => Self::Invalid(said),
            _ if retry_after.is_some() => Self::Busy { retry_after },
            _ => Self::Unavailable(format!("{code}: {said}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn each_answer_is_read_as_its_error() {
        let cause =
            |key: &str, value: &str| json!({"details": {"causes": [{key: value}]}, "message": "m"});
        let two = Some(Duration::from_secs(2));
        let table = [
            (404, Value::Null, None, WriteError::Missing),
            (
                409,
                json!({"reason": "Conflict"}),
                None,
                WriteError::Conflict,
            ),
            (
                409,
                json!({"reason": "AlreadyExists"}),
                None,
                WriteError::Exists,
            ),
            (
                409,
                json!({"reason": "Conflict", "message": "Precondition failed: UID in precondition: a, UID in object meta: b"}),
                None,
                WriteError::AnotherObject,
            ),
            (
                422,
                cause("field", "metadata.uid"),
                None,
                WriteError::AnotherObject,
            ),
            (
                422,
                cause("field", "status.podIPs"),
                None,
                WriteError::Invalid("m".into()),
            ),
            (
                403,
                cause("reason", "NamespaceTerminating"),
                None,
                WriteError::NamespaceEnding,
            ),
            (
                403,
                cause("reason", "Other"),
                None,
                WriteError::Forbidden("m".into()),
            ),
            (429, Value::Null, two, WriteError::Busy { retry_after: two }),
            (503, Value::Null, two, WriteError::Busy { retry_after: two }),
            (
                500,
                Value::Null,
                None,
                WriteError::Unavailable("500: no message".into()),
            ),
            (
                401,
                Value::Null,
                None,
                WriteError::Unavailable("no message".into()),
            ),
            (
                400,
                Value::Null,
                None,
                WriteError::Invalid("no message".into()),
            ),
        ];
        for (code, status, after, want) in table {
            assert_eq!(
                WriteError::read(code, &status, after),
                want,
                "{code} {status}"
            );
        }
    }

    #[test]
    fn each_error_has_its_rule() {
        let slow = |at_least| Retry::SlowDown { at_least };
        let second = Some(Duration::from_secs(1));
        for (error, want) in [
            (WriteError::Conflict, Retry::Reread),
            (WriteError::Forbidden(String::new()), Retry::Later),
            (
                WriteError::Busy {
                    retry_after: second,
                },
                slow(second),
            ),
            (WriteError::Unavailable(String::new()), slow(None)),
            (WriteError::Missing, Retry::Never),
            (WriteError::AnotherObject, Retry::Never),
            (WriteError::Invalid(String::new()), Retry::Never),
            (WriteError::NamespaceEnding, Retry::Never),
        ] {
            assert_eq!(error.retry(), want, "{error}");
        }
    }

    #[test]
    fn a_printed_call_shows_no_body() {
        let call = Call::CreateEvent {
            namespace: "n".into(),
            body: json!({"message": "hunter2"}),
        };
        assert!(!format!("{call:?}").contains("hunter2"));
    }
}
