//! Why a device may not join: a sentence for each reason that says what to do, on both sides.

use common::hub::proto::{RefusalCode, Refused};

/// A refusal. What it prints goes to the device and to the log: it holds no secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error(
        "the token is not known to this cluster: make a new one with `cloudcore token create` and paste its whole line"
    )]
    TokenUnknown,
    #[error("token {id} expired at {at}: make a new one with `cloudcore token create`")]
    TokenExpired { id: String, at: String },
    #[error(
        "token {id} has been used {uses} of {uses} times: make a new one with `cloudcore token create`"
    )]
    TokenUsed { id: String, uses: u32 },
    #[error(
        "token {id} is for node {bound}, not for {asked}: start edgecore with --name {bound}, or make a token for {asked}"
    )]
    TokenOtherNode {
        id: String,
        bound: String,
        asked: String,
    },
    #[error(
        "node name {node} is enrolled with another key: choose another --name, or end that enrolment with `cloudcore node revoke {node}` first"
    )]
    NameTaken { node: String },
    #[error(
        "a Node named {node} exists that CloudCore did not make: choose another --name, or delete that Node if it is a leftover"
    )]
    NameForeign { node: String },
    #[error(
        "{name:?} cannot be a node's name: start edgecore with a --name of at most 63 characters of a-z, 0-9, '-' and '.'"
    )]
    NameInvalid { name: String },
    #[error(
        "the join request is malformed ({why}): use an edgecore of the same release as cloudcore"
    )]
    BadRequest { why: String },
    #[error(
        "the enrolment of {node} was ended: make a new token with `cloudcore token create` and join again"
    )]
    Revoked { node: String },
    #[error(
        "the certificate of {node} expired {days} days ago, longer than the grace of {grace} days: join again with a new token from `cloudcore token create`"
    )]
    ExpiredTooLong { node: String, days: u64, grace: u64 },
    #[error("the cluster cannot decide at present; edgecore tries again by itself ({why})")]
    Unavailable { why: &'static str },
}

impl Refusal {
    pub fn code(&self) -> RefusalCode {
        match self {
            Refusal::TokenUnknown => RefusalCode::RefusalTokenUnknown,
            Refusal::TokenExpired { .. } => RefusalCode::RefusalTokenExpired,
            Refusal::TokenUsed { .. } => RefusalCode::RefusalTokenUsed,
            Refusal::TokenOtherNode { .. } => RefusalCode::RefusalTokenOtherNode,
            Refusal::NameTaken { .. } => RefusalCode::RefusalNameTaken,
            Refusal::NameForeign { .. } => RefusalCode::RefusalNameForeign,
            Refusal::NameInvalid { .. } => RefusalCode::RefusalNameInvalid,
            Refusal::BadRequest { .. } => RefusalCode::RefusalBadRequest,
            Refusal::Revoked { .. } => RefusalCode::RefusalRevoked,
            Refusal::ExpiredTooLong { .. } => RefusalCode::RefusalExpiredTooLong,
            Refusal::Unavailable { .. } => RefusalCode::RefusalUnavailable,
        }
    }
}

impl From<&Refusal> for Refused {
    fn from(refusal: &Refusal) -> Self {
        Self {
            code: refusal.code().into(),
            message: refusal.to_string(),
        }
    }
}
