//! Ending an enrolment: for `cloudcore node revoke` and whoever else decides it.
//!
//! The record stays and says when it was ended. Every CloudCore sees that through its watch, ends
//! the session and refuses the keys; the Node goes at once.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::DeleteParams;
use kube::client::Body;
use kube::{Api, Client};

use common::ids::NodeName;

use super::record;
use super::tokens::Tokens;
use crate::kube::{KubeError, is_absent};
use crate::nodes;

/// What ending an enrolment found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// No enrolment of that name.
    Unknown,
    /// It had been ended before.
    Already,
    Ended {
        /// The token that the device joined with still has uses: whoever holds it can join under
        /// another name.
        token_left: Option<(String, u32)>,
    },
}

/// Ends the enrolment of a node and deletes its Node. Doing it again repairs what was cut off.
pub async fn revoke(client: &Client, node: &NodeName) -> Result<Outcome, KubeError> {
    let now = server_time(client).await?;
    let mut ended = false;
    let changed = record::change(client, node, |spec| {
        ended = spec.is_active();
        if ended {
            spec.revoked = Some(Time(now));
        }
        ended
    })
    .await?;
    let Some(enrolment) = changed else {
        return Ok(Outcome::Unknown);
    };
    remove_node(client, node).await?;
    if !ended {
        return Ok(Outcome::Already);
    }
    let token = Tokens::build(client).find(&enrolment.spec.token).await?;
    let open = token.filter(|t| t.left() > 0 && t.expires > now);
    Ok(Outcome::Ended {
        token_left: open.map(|t| (t.id.clone(), t.left())),
    })
}

/// Deletes the Node if CloudCore made it, and lets it go.
async fn remove_node(client: &Client, node: &NodeName) -> Result<(), KubeError> {
    let Some(found) = nodes::find(client, node).await? else {
        return Ok(());
    };
    if !nodes::carries_finalizer(&found) {
        return Ok(());
    }
    let nodes: Api<Node> = Api::all(client.clone());
    match nodes.delete(node.as_str(), &DeleteParams::default()).await {
        Ok(_) => {}
        Err(e) if is_absent(&e) => return Ok(()),
        Err(e) => return Err(KubeError::api(format!("deleting Node {node}"))(e)),
    }
    nodes::release(client, node).await
}

/// The API server's clock, which also stamps when a token was made. Whole seconds, as there.
async fn server_time(client: &Client) -> Result<Timestamp, KubeError> {
    let asking = || KubeError::api("asking the API server for its time");
    let request = http::Request::get("/version").body(Body::empty());
    let request = request.map_err(|e| asking()(kube::Error::HttpError(e)))?;
    let answer = client.send(request).await.map_err(asking())?;
    let date = answer
        .headers()
        .get(http::header::DATE)
        .and_then(|d| d.to_str().ok());
    let time = date.and_then(|d| jiff::fmt::rfc2822::parse(d).ok());
    Ok(time.map_or_else(Timestamp::now, |t| t.timestamp()))
}
