//! Where a projected ServiceAccount token comes from.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use common::ids::ObjectKey;

/// What a token is asked for; also the key it is cached under.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TokenRequest {
    /// The Pod the token is bound to.
    pub pod: ObjectKey,
    pub service_account: String,
    /// Empty means the API server's default audience.
    pub audience: String,
    /// At least 600.
    pub expiration_seconds: i64,
}

/// A token that may be mounted. It may have expired while the cloud was away: it still mounts.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    pub token: String,
    /// When it is due to be asked for again, at 80 percent of its life, in seconds from now;
    /// 0 when it is overdue.
    pub refresh_in_seconds: u64,
}

pub type TokenFuture<'a> = Pin<Box<dyn Future<Output = Result<Token, String>> + Send + 'a>>;

/// The seam between volumes and the session: answers from the store's cache when the cloud is
/// away. An error is a sentence for the Pod's FailedMount Event.
pub trait TokenSource: Send + Sync {
    fn token<'a>(&'a self, request: &'a TokenRequest) -> TokenFuture<'a>;
    /// The Pod is gone: its tokens are forgotten. May wait for the disk.
    fn forget(&self, pod: &ObjectKey);
}

pub type Tokens = Arc<dyn TokenSource>;
