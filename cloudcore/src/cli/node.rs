//! `cloudcore node list|revoke`.

use std::collections::HashMap;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use kube::api::ListParams;
use kube::{Api, Client};

use common::ids::NodeName;

use super::say;
use super::table::{age, table};
use crate::enroll::record::{Enrolment, records};
use crate::enroll::revoke::{Outcome, revoke as end};
use crate::kube::KubeError;
use crate::nodes::{birth, claim};

pub(super) async fn list(client: &Client) -> anyhow::Result<()> {
    let all = records(client).list(&ListParams::default()).await;
    let all = all.map_err(KubeError::api("listing enrolments"))?;
    let edge = ListParams::default().labels(birth::EDGE_LABEL);
    let nodes = Api::<Node>::all(client.clone()).list(&edge).await;
    let nodes = by_name(
        nodes.map_err(KubeError::api("listing edge Nodes"))?.items,
        |n| n.metadata.name.clone(),
    );
    let leases: Api<Lease> = Api::namespaced(client.clone(), claim::NAMESPACE);
    let leases = leases.list(&ListParams::default()).await;
    let leases = by_name(
        leases.map_err(KubeError::api("listing Leases"))?.items,
        |l| l.metadata.name.clone(),
    );
    let now = Timestamp::now();
    let row = |record: &Enrolment| {
        let name = record.metadata.name.clone().unwrap_or_default();
        row(record, nodes.get(&name), leases.get(&name), now)
    };
    let rows: Vec<_> = all.items.iter().map(row).collect();
    let head = [
        "NAME",
        "ENROLLED",
        "KEY",
        "SESSION",
        "READY",
        "LAST RENEWAL",
    ];
    table(&head, &rows).iter().for_each(|line| say(line));
    Ok(())
}

fn by_name<T>(items: Vec<T>, name: impl Fn(&T) -> Option<String>) -> HashMap<String, T> {
    items
        .into_iter()
        .filter_map(|item| Some((name(&item)?, item)))
        .collect()
}

fn row(
    record: &Enrolment,
    node: Option<&Node>,
    lease: Option<&Lease>,
    now: Timestamp,
) -> Vec<String> {
    let spec = &record.spec;
    let since = |at: Option<Timestamp>| at.map_or_else(|| "-".to_string(), |at| age(at, now));
    let enrolled = match &spec.revoked {
        Some(at) => format!("ended {}", age(at.0, now)),
        None => since(spec.enrolled.as_ref().map(|t| t.0)),
    };
    let keys: Vec<_> = spec
        .keys
        .iter()
        .map(|k| k.id.chars().take(12).collect::<String>())
        .collect();
    let held = lease.and_then(|lease| claim::Held::read(lease, now));
    vec![
        record.metadata.name.clone().unwrap_or_default(),
        enrolled,
        keys.join(","),
        held.as_ref()
            .filter(|h| h.live)
            .map_or_else(|| "-".into(), |h| h.replica.clone()),
        node.map_or("no Node", ready).to_string(),
        since(held.and_then(|h| h.renewed)),
    ]
}

fn ready(node: &Node) -> &str {
    let conditions = node.status.as_ref().and_then(|s| s.conditions.as_ref());
    let ready = conditions
        .into_iter()
        .flatten()
        .find(|c| c.type_ == "Ready");
    ready.map_or("Unknown", |c| c.status.as_str())
}

pub(super) async fn revoke(client: &Client, name: &NodeName) -> anyhow::Result<()> {
    match end(client, name).await? {
        Outcome::Unknown => {
            anyhow::bail!("no device is enrolled as {name}: see `cloudcore node list`")
        }
        Outcome::Already => say(&format!("the enrolment of {name} had been ended before")),
        Outcome::Ended { token_left } => {
            say(&format!(
                "the enrolment of {name} is ended; joining again needs a new token"
            ));
            if let Some((id, left)) = token_left {
                say(&format!(
                    "token {id}, with which it joined, has {left} uses left under other names: `cloudcore token revoke {id}` ends it"
                ));
            }
        }
    }
    Ok(())
}
