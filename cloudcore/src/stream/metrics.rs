//! What the kubelet endpoints count, for the admin endpoint.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Why a request did not become a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    Unauthenticated,
    Forbidden,
    /// The API server could not be asked.
    NotJudged,
    UnknownPath,
    NotConnected,
    /// More tunnels of a node at once, or sooner, than allowed.
    Limit,
    /// The edge did not answer, or broke off before it had.
    NoAnswer,
    /// A connection that found no place, or whose handshake failed.
    Handshake,
}

impl Reason {
    pub const ALL: [Reason; 8] = [
        Reason::Unauthenticated,
        Reason::Forbidden,
        Reason::NotJudged,
        Reason::UnknownPath,
        Reason::NotConnected,
        Reason::Limit,
        Reason::NoAnswer,
        Reason::Handshake,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Reason::Unauthenticated => "unauthenticated",
            Reason::Forbidden => "forbidden",
            Reason::NotJudged => "not_judged",
            Reason::UnknownPath => "unknown_path",
            Reason::NotConnected => "not_connected",
            Reason::Limit => "limit",
            Reason::NoAnswer => "no_answer",
            Reason::Handshake => "handshake",
        }
    }
}

/// A look at the counters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Numbers {
    pub open: u64,
    /// Nodes whose endpoint listens here.
    pub endpoints: u64,
    pub opened: BTreeMap<&'static str, u64>,
    pub refused: BTreeMap<Reason, u64>,
    /// To the edges.
    pub there: u64,
    /// From the edges.
    pub back: u64,
}

#[derive(Default)]
struct Inner {
    open: AtomicU64,
    endpoints: AtomicU64,
    there: AtomicU64,
    back: AtomicU64,
    /// By verb: a handful of words, each from [`common::stream::request::Target::verb`].
    opened: Mutex<BTreeMap<&'static str, u64>>,
    refused: [AtomicU64; Reason::ALL.len()],
}

/// Cheap to clone.
#[derive(Clone, Default)]
pub struct Metrics(Arc<Inner>);

impl Metrics {
    pub(super) fn opened(&self, verb: &'static str) {
        self.0.open.fetch_add(1, Ordering::Relaxed);
        let mut opened = self.0.opened.lock().unwrap_or_else(PoisonError::into_inner);
        *opened.entry(verb).or_default() += 1;
    }

    pub(super) fn closed(&self, there: u64, back: u64) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
        self.0.there.fetch_add(there, Ordering::Relaxed);
        self.0.back.fetch_add(back, Ordering::Relaxed);
    }

    pub(super) fn refused(&self, reason: Reason) {
        self.0.refused[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn endpoints(&self, count: usize) {
        self.0.endpoints.store(count as u64, Ordering::Relaxed);
    }

    /// As last told.
    pub(super) fn endpoints_now(&self) -> usize {
        let count = self.0.endpoints.load(Ordering::Relaxed);
        usize::try_from(count).unwrap_or(usize::MAX)
    }

    pub fn numbers(&self) -> Numbers {
        let inner = &self.0;
        let opened = inner.opened.lock().unwrap_or_else(PoisonError::into_inner);
        let refused = Reason::ALL.into_iter().zip(&inner.refused);
        Numbers {
            open: inner.open.load(Ordering::Relaxed),
            endpoints: inner.endpoints.load(Ordering::Relaxed),
            opened: opened.clone(),
            refused: refused
                .map(|(reason, count)| (reason, count.load(Ordering::Relaxed)))
                .collect(),
            there: inner.there.load(Ordering::Relaxed),
            back: inner.back.load(Ordering::Relaxed),
        }
    }
}
