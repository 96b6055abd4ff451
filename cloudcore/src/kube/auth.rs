//! The token that CloudCore shows the API server: where it comes from and when it is renewed.
//!
//! In a cluster the kubelet renews the file and we read it again. Outside, the kubeconfig's user
//! asks for a token of the ServiceAccount and asks again when 80 % of its life is over.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http::HeaderValue;
use jiff::Timestamp;
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::{Notify, watch};

use super::{Access, Fault, KubeError, NAMESPACE, SERVICE_ACCOUNT, is_absent};

/// The shortest that most servers give, and the longest that a stolen one should work.
const LIFETIME: Duration = Duration::from_secs(3600);
/// The kubelet renews the file at 80 % of at least an hour.
const FILE_AGAIN: Duration = Duration::from_secs(60);
/// Between two tries while the API server refuses or is away.
const RETRY: Duration = Duration::from_secs(5);

enum Origin {
    File(PathBuf),
    Request(Client),
}

pub(crate) struct TokenSource {
    origin: Origin,
    current: watch::Sender<Option<HeaderValue>>,
    renew_in: watch::Sender<Duration>,
    refused: Notify,
}

impl TokenSource {
    /// Fetches the first token, so that a missing ServiceAccount is an error at the start.
    pub(crate) async fn build(access: &Access) -> Result<Self, KubeError> {
        let origin = match access.token_file() {
            Some(path) => Origin::File(path.to_path_buf()),
            None => Origin::Request(access.user()?),
        };
        let source = Self {
            origin,
            current: watch::Sender::new(None),
            renew_in: watch::Sender::new(RETRY),
            refused: Notify::new(),
        };
        source.renew().await?;
        Ok(source)
    }

    pub(crate) fn current(&self) -> Option<HeaderValue> {
        self.current.borrow().clone()
    }

    /// The API server answered 401: the token is asked for again before its time.
    pub(crate) fn refused(&self) {
        self.refused.notify_one();
    }

    /// Never returns.
    pub(crate) async fn keep_fresh(&self) {
        loop {
            // A server that refuses every token must not be asked in a circle.
            tokio::time::sleep(RETRY).await;
            let wait = self.renew_in.borrow().saturating_sub(RETRY);
            // Either the time has come, or the server refused the token before it.
            let _ = tokio::time::timeout(wait, self.refused.notified()).await;
            if let Err(error) = self.renew().await {
                self.renew_in.send_replace(RETRY);
                tracing::warn!(error = %crate::chain(&error), "CloudCore's token was not renewed");
            }
        }
    }

    async fn renew(&self) -> Result<(), KubeError> {
        let (token, renew_in) = match &self.origin {
            Origin::File(path) => (read_token(path).await?, FILE_AGAIN),
            Origin::Request(client) => request_token(client).await?,
        };
        self.current.send_replace(Some(token));
        self.renew_in.send_replace(renew_in);
        Ok(())
    }
}

async fn read_token(path: &Path) -> Result<HeaderValue, KubeError> {
    let failed = |source| KubeError::TokenFile {
        path: path.display().to_string(),
        source,
    };
    let text = tokio::fs::read_to_string(path).await.map_err(failed)?;
    bearer(text.trim()).map_err(|_| failed(std::io::ErrorKind::InvalidData.into()))
}

async fn request_token(client: &Client) -> Result<(HeaderValue, Duration), KubeError> {
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), NAMESPACE);
    let ask = TokenRequest {
        spec: TokenRequestSpec {
            expiration_seconds: Some(i64::try_from(LIFETIME.as_secs()).unwrap_or(i64::MAX)),
            ..TokenRequestSpec::default()
        },
        ..TokenRequest::default()
    };
    let given: TokenRequest = accounts
        .create_subresource("token", SERVICE_ACCOUNT, &PostParams::default(), &ask)
        .await
        .map_err(|e| {
            if is_absent(&e) {
                KubeError::NotInstalled
            } else {
                KubeError::TokenRequest(Fault(e))
            }
        })?;
    let malformed = |why: &str| KubeError::Malformed {
        what: "the answer to a TokenRequest".into(),
        why: why.into(),
    };
    let status = given.status.ok_or_else(|| malformed("it has no status"))?;
    let token = bearer(&status.token).map_err(|_| malformed("the token is no header value"))?;
    let life = status
        .expiration_timestamp
        .0
        .duration_since(Timestamp::now());
    let life = Duration::try_from(life).unwrap_or(LIFETIME);
    Ok((token, renewal(life)))
}

/// When a token of this remaining life is renewed: at 80 %, and at most after 80 % of an hour,
/// should our clock differ from the server's.
fn renewal(life: Duration) -> Duration {
    life.min(LIFETIME).mul_f64(0.8).max(RETRY)
}

fn bearer(token: &str) -> Result<HeaderValue, http::header::InvalidHeaderValue> {
    let mut value = HeaderValue::try_from(format!("Bearer {token}"))?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_renewed_at_four_fifths_of_its_life() {
        let s = Duration::from_secs;
        for (life, want) in [
            (s(3600), s(2880)),
            (s(86_400), s(2880)),
            (s(600), s(480)),
            (s(0), RETRY),
        ] {
            assert_eq!(renewal(life), want);
        }
    }

    #[test]
    fn a_printed_token_shows_nothing() {
        assert!(!format!("{:?}", bearer("hunter2").unwrap()).contains("hunter2"));
    }
}
