//! ServiceAccount tokens: asked for over the session, kept in the store, mounted also when they
//! have expired while the cloud was away.
//!
//! A token is a lease whose length travels as a duration, since clocks are wrong: within one boot
//! its age is counted by the boot clock, over a reboot by the wall clock.

use std::time::Duration;

use common::hub::proto;
use common::ids::ObjectKey;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::warn;

use crate::hub::clock;
use crate::pods::tokens::{Token, TokenFuture, TokenRequest, TokenSource};
use crate::store::Store;

/// How long a mount waits for the cloud's answer.
const ANSWER: Duration = Duration::from_secs(15);

/// When a refresh failed, the next try.
const TRY_AGAIN_SECONDS: u64 = 30;

/// A question to the cloud and where its answer goes.
pub struct Ask {
    pub body: proto::request::Body,
    pub answer: oneshot::Sender<proto::Response>,
}

/// Pods that start at once ask at once: a node's Pods, each with one token.
pub const ASKS: usize = 128;

/// See the module.
pub struct SessionTokens {
    store: Store,
    asks: mpsc::Sender<Ask>,
    connected: watch::Receiver<bool>,
    boot_id: String,
}

#[derive(Serialize, Deserialize)]
struct Kept {
    token: String,
    lifetime_seconds: u64,
    boot_id: String,
    boot_seconds: u64,
    wall_seconds: u64,
}

impl Kept {
    fn age(&self, boot_id: &str) -> u64 {
        if self.boot_id == boot_id {
            clock::boot_seconds().saturating_sub(self.boot_seconds)
        } else {
            clock::wall_seconds().saturating_sub(self.wall_seconds)
        }
    }

    /// Due at 80 percent of its life.
    fn refresh_in(&self, boot_id: &str) -> u64 {
        (self.lifetime_seconds * 4 / 5).saturating_sub(self.age(boot_id))
    }
}

fn name_of(request: &TokenRequest) -> String {
    format!(
        "{}|{}|{}|{}",
        request.pod, request.service_account, request.audience, request.expiration_seconds
    )
}

impl SessionTokens {
    pub fn new(
        store: Store,
        asks: mpsc::Sender<Ask>,
        connected: watch::Receiver<bool>,
        boot_id: String,
    ) -> Self {
        Self {
            store,
            asks,
            connected,
            boot_id,
        }
    }

    fn kept(&self, request: &TokenRequest) -> Option<Kept> {
        let bytes = self.store.tokens().get(&name_of(request)).ok().flatten()?;
        serde_json::from_slice(&bytes).ok()
    }

    async fn ask(&self, request: &TokenRequest) -> Result<Kept, String> {
        if !*self.connected.borrow() {
            return Err("the cloud is not connected".to_owned());
        }
        let (answer, answered) = oneshot::channel();
        let body = proto::request::Body::Token(proto::TokenAsk {
            pod: request.pod.to_string(),
            service_account: request.service_account.clone(),
            audience: request.audience.clone(),
            expiration_seconds: request.expiration_seconds,
        });
        let busy = |_| "too many tokens are being asked for at once".to_owned();
        self.asks.try_send(Ask { body, answer }).map_err(busy)?;
        let response = tokio::time::timeout(ANSWER, answered).await;
        match response.ok().and_then(Result::ok).and_then(|r| r.body) {
            Some(proto::response::Body::Token(given)) => Ok(Kept {
                token: given.token,
                lifetime_seconds: given.lifetime_seconds.max(0).cast_unsigned(),
                boot_id: self.boot_id.clone(),
                boot_seconds: clock::boot_seconds(),
                wall_seconds: clock::wall_seconds(),
            }),
            Some(proto::response::Body::Failure(failure)) => Err(failure.message),
            Some(proto::response::Body::Renew(_)) | None => Err(format!(
                "the cloud gave no answer within {} s",
                ANSWER.as_secs()
            )),
        }
    }

    async fn give(&self, request: &TokenRequest) -> Result<Token, String> {
        let kept = self.kept(request);
        if let Some(kept) = &kept
            && kept.refresh_in(&self.boot_id) > 0
        {
            return Ok(self.token(kept));
        }
        match self.ask(request).await {
            Ok(fresh) => {
                let bytes = serde_json::to_vec(&fresh).map_err(|e| e.to_string())?;
                if let Err(error) = self.store.tokens().put(&name_of(request), &bytes) {
                    // It mounts all the same; only an offline restart would miss it.
                    warn!(pod = %request.pod, %error, "a ServiceAccount token could not be kept");
                }
                Ok(self.token(&fresh))
            }
            Err(problem) => match kept {
                Some(old) => Ok(Token {
                    token: old.token,
                    refresh_in_seconds: TRY_AGAIN_SECONDS,
                }),
                None => Err(format!(
                    "no token for service account {:?}: {problem}",
                    request.service_account
                )),
            },
        }
    }

    fn token(&self, kept: &Kept) -> Token {
        let refresh_in_seconds = kept.refresh_in(&self.boot_id);
        Token {
            token: kept.token.clone(),
            refresh_in_seconds,
        }
    }
}

impl TokenSource for SessionTokens {
    fn token<'a>(&'a self, request: &'a TokenRequest) -> TokenFuture<'a> {
        Box::pin(self.give(request))
    }

    fn forget(&self, pod: &ObjectKey) {
        if let Err(error) = self.store.tokens().remove_by_prefix(&format!("{pod}|")) {
            warn!(%pod, %error, "the tokens of a Pod that is gone could not be removed");
        }
    }
}
