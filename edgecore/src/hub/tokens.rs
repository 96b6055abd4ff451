//! ServiceAccount tokens: asked for over the session, kept in the store, mounted also when they
//! have expired while the cloud was away.
//!
//! A token is a lease whose length travels as a duration, since clocks are wrong: within one boot
//! its age is counted by the boot clock, over a reboot by the wall clock.

use std::time::Duration;

use common::hub::proto;
use common::ids::ObjectKey;
use common::telemetry::chain;
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

/// What this device knows of the time.
struct Clocks<'a> {
    boot_id: &'a str,
    boot_seconds: u64,
    /// `None` while nothing keeps the wall clock right: after a power cut a board without a
    /// battery believes in any year.
    wall_seconds: Option<u64>,
}

impl Clocks<'_> {
    fn read(boot_id: &str) -> Clocks<'_> {
        Clocks {
            boot_id,
            boot_seconds: clock::boot_seconds(),
            wall_seconds: clock::synchronised().then(clock::wall_seconds),
        }
    }
}

impl Kept {
    /// `None` where nobody can tell.
    fn age(&self, now: &Clocks<'_>) -> Option<u64> {
        if self.boot_id == now.boot_id {
            return Some(now.boot_seconds.saturating_sub(self.boot_seconds));
        }
        now.wall_seconds?.checked_sub(self.wall_seconds)
    }

    /// Due at 80 percent of its life, and at once where its age is unknown.
    fn refresh_in(&self, now: &Clocks<'_>) -> u64 {
        let due = self.lifetime_seconds - self.lifetime_seconds / 5;
        self.age(now).map_or(0, |age| due.saturating_sub(age))
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

    /// It mounts even where it could not be kept; only an offline restart would miss it.
    async fn keep(&self, request: &TokenRequest, fresh: &Kept) {
        let (tokens, name) = (self.store.tokens(), name_of(request));
        let kept = match serde_json::to_vec(fresh) {
            // Beside the other tasks: one sync of an SD card takes as long as many answers.
            Ok(bytes) => tokio::task::spawn_blocking(move || tokens.put(&name, &bytes)).await,
            Err(error) => {
                warn!(pod = %request.pod, %error, "a ServiceAccount token could not be written");
                return;
            }
        };
        let problem = match kept {
            Ok(Ok(())) => return,
            Ok(Err(error)) => chain(&error),
            Err(panic) => panic.to_string(),
        };
        warn!(pod = %request.pod, problem, "a ServiceAccount token could not be kept");
    }

    async fn give(&self, request: &TokenRequest) -> Result<Token, String> {
        let kept = self.kept(request);
        if let Some(kept) = &kept
            && kept.refresh_in(&Clocks::read(&self.boot_id)) > 0
        {
            return Ok(self.token(kept));
        }
        match self.ask(request).await {
            Ok(fresh) => {
                self.keep(request, &fresh).await;
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
        let refresh_in_seconds = kept.refresh_in(&Clocks::read(&self.boot_id));
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

#[cfg(test)]
mod tests {
    use super::*;

    fn kept() -> Kept {
        Kept {
            token: "t".into(),
            lifetime_seconds: 1000,
            boot_id: "one".into(),
            boot_seconds: 100,
            wall_seconds: 50_000,
        }
    }

    #[test]
    fn a_token_is_due_at_80_percent_of_its_life_and_where_nobody_knows_its_age() {
        let clocks = |boot_id, boot_seconds, wall_seconds| Clocks {
            boot_id,
            boot_seconds,
            wall_seconds,
        };
        for (now, due) in [
            (clocks("one", 100, None), 800),
            (clocks("one", 850, Some(0)), 50),
            (clocks("one", 2000, None), 0),
            (clocks("two", 5, Some(50_300)), 500),
            // Rebooted, and the clock stands where no clock can be.
            (clocks("two", 5, Some(10)), 0),
            (clocks("two", 5, None), 0),
        ] {
            assert_eq!(kept().refresh_in(&now), due);
        }
        let endless = Kept {
            lifetime_seconds: u64::MAX,
            ..kept()
        };
        assert!(endless.refresh_in(&clocks("one", 100, None)) > 1 << 60);
    }

    #[tokio::test]
    async fn a_pods_tokens_go_with_it_and_no_others() {
        let store = Store::in_memory();
        let (asks, _asked) = mpsc::channel(ASKS);
        let (_connected, connected) = watch::channel(false);
        let source = SessionTokens::new(store.clone(), asks, connected, "one".into());
        let request = |uid: &str| TokenRequest {
            pod: ObjectKey::pod("ns", "web", uid),
            service_account: "default".into(),
            audience: String::new(),
            expiration_seconds: 3600,
        };
        for uid in ["1", "11"] {
            source.keep(&request(uid), &kept()).await;
        }
        source.forget(&ObjectKey::pod("ns", "web", "1"));
        assert!(source.kept(&request("1")).is_none());
        assert!(source.kept(&request("11")).is_some());
    }
}
