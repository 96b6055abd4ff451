//! `cloudcore token create|list|revoke`.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{bail, ensure};
use clap::Args;
use jiff::Timestamp;
use kube::Client;

use common::ids::NodeName;
use common::pki::JoinToken;
use common::pki::token::{Endpoint, TokenSecret};

use super::table::{age, table};
use super::{Kubeconfig, node_name, say, say_error};
use crate::config::{HostPort, duration};
use crate::enroll::authority::Authority;
use crate::enroll::link::read_endpoints;
use crate::enroll::record::NodeTaint;
use crate::enroll::tokens::{MOST_USES, TokenWish, Tokens};

#[derive(Debug, Args)]
pub(super) struct CreateFlags {
    #[command(flatten)]
    kubeconfig: Kubeconfig,
    /// How long it admits devices: a number and s, m, h or d.
    #[arg(long, value_name = "TIME", env = "CLOUDCORE_TTL", default_value = "24h", value_parser = duration)]
    ttl: Duration,
    /// How many devices it admits.
    #[arg(long, value_name = "N", env = "CLOUDCORE_USES", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(MOST_USES)))]
    uses: u32,
    /// The one name that it admits.
    #[arg(long, value_name = "NAME", env = "CLOUDCORE_NODE", value_parser = node_name)]
    node: Option<NodeName>,
    /// Labels of the Nodes that join with it.
    #[arg(long, value_name = "K=V,..", env = "CLOUDCORE_LABELS", default_value = "", value_parser = labels)]
    labels: Labels,
    /// Taints of the Nodes that join with it.
    #[arg(long, value_name = "K=V:EFFECT,..", env = "CLOUDCORE_TAINTS", default_value = "", value_parser = taints)]
    taints: Taints,
    /// Where devices reach the hub, if not where the running cloudcore says.
    #[arg(
        long,
        value_name = "HOST:PORT",
        env = "CLOUDCORE_ADVERTISE",
        value_delimiter = ','
    )]
    advertise: Option<Vec<HostPort>>,
}

type Labels = BTreeMap<String, String>;
// A type of one word, so that clap takes the parsed list as one value.
#[derive(Debug, Clone)]
struct Taints(Vec<NodeTaint>);

impl CreateFlags {
    pub(super) fn kubeconfig(&self) -> &Kubeconfig {
        &self.kubeconfig
    }
}

pub(super) async fn create(client: &Client, flags: &CreateFlags) -> anyhow::Result<()> {
    let endpoints = match &flags.advertise {
        Some(given) => given
            .iter()
            .map(|at| Endpoint::new(&at.host, at.port))
            .collect(),
        None => read_endpoints(client).await?.unwrap_or_default(),
    };
    let Some(first) = endpoints.first().cloned() else {
        bail!(
            "where devices dial is not known yet: start cloudcore once, or give --advertise HOST:PORT"
        );
    };
    ensure!(
        flags.uses == 1 || flags.node.is_none(),
        "a token for one --node has one use"
    );
    let authority = Authority::ensure(client).await?;
    let secret = TokenSecret::generate()?;
    let wish = TokenWish {
        ttl: flags.ttl,
        uses: flags.uses,
        node: flags.node.clone(),
        labels: flags.labels.clone(),
        taints: flags.taints.0.clone(),
    };
    let made = Tokens::build(client)
        .create(wish, &secret, Timestamp::now())
        .await?;
    let token = JoinToken {
        id: made.id.clone(),
        secret,
        pins: vec![authority.ca.pin()],
        endpoints,
        cluster: authority.cluster,
    };
    say(&format!(
        "edgecore --join {first} --token {}",
        token.to_text()
    ));
    say_error(&format!(
        "token {}: {} use(s) until {}; paste the line above on the device",
        made.id, made.uses, made.expires
    ));
    Ok(())
}

pub(super) async fn list(client: &Client) -> anyhow::Result<()> {
    let (tokens, bad) = Tokens::build(client).list().await?;
    let now = Timestamp::now();
    let rows: Vec<_> = tokens
        .iter()
        .map(|t| {
            let expires = if t.expires > now {
                age(t.expires, now)
            } else {
                format!("expired {}", age(t.expires, now))
            };
            let nodes: Vec<_> = t.used.iter().map(|u| u.node.as_str()).collect();
            vec![
                t.id.clone(),
                expires,
                format!("{}/{}", t.left(), t.uses),
                t.node.as_ref().map_or("-", NodeName::as_str).to_string(),
                if nodes.is_empty() {
                    "-".into()
                } else {
                    nodes.join(",")
                },
            ]
        })
        .collect();
    let head = ["ID", "EXPIRES", "LEFT", "NODE", "JOINED"];
    table(&head, &rows).iter().for_each(|line| say(line));
    bad.iter()
        .for_each(|error| say_error(&format!("cloudcore: {}", crate::chain(error))));
    Ok(())
}

pub(super) async fn revoke(client: &Client, id: &str) -> anyhow::Result<()> {
    if !Tokens::build(client).revoke(id).await? {
        bail!("there is no token {id}: see `cloudcore token list`");
    }
    say(&format!(
        "token {id} is ended; devices that joined with it stay enrolled"
    ));
    Ok(())
}

fn parts(text: &str) -> impl Iterator<Item = &str> {
    text.split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
}

/// `k=v,..` as the API server takes labels.
fn labels(text: &str) -> Result<Labels, String> {
    parts(text)
        .map(|part| {
            let (key, value) = part
                .split_once('=')
                .ok_or_else(|| format!("{part:?} is not KEY=VALUE"))?;
            qualified(key)?;
            label_value(value)?;
            Ok((key.to_string(), value.to_string()))
        })
        .collect()
}

/// `k=v:Effect` or `k:Effect`, with commas between.
fn taints(text: &str) -> Result<Taints, String> {
    let one = |part: &str| {
        let (what, effect) = part
            .rsplit_once(':')
            .ok_or_else(|| format!("{part:?} is not KEY=VALUE:EFFECT"))?;
        if !["NoSchedule", "PreferNoSchedule", "NoExecute"].contains(&effect) {
            return Err(format!(
                "effect {effect:?} is none of NoSchedule, PreferNoSchedule, NoExecute"
            ));
        }
        let (key, value) = what.split_once('=').unwrap_or((what, ""));
        qualified(key)?;
        label_value(value)?;
        Ok(NodeTaint {
            key: key.into(),
            value: value.into(),
            effect: effect.into(),
        })
    };
    parts(text).map(one).collect::<Result<_, _>>().map(Taints)
}

/// `[PREFIX/]NAME`, as keys of labels and taints are written.
fn qualified(key: &str) -> Result<(), String> {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    let good = prefix.is_none_or(|p| NodeName::parse(p).is_ok())
        && !name.is_empty()
        && label_value(name).is_ok();
    if good {
        Ok(())
    } else {
        Err(format!(
            "{key:?} cannot be a key: [PREFIX/]NAME, a name of at most 63 characters"
        ))
    }
}

fn label_value(value: &str) -> Result<(), String> {
    let bytes = value.as_bytes();
    let ends = |b: Option<&u8>| b.is_none_or(u8::is_ascii_alphanumeric);
    let inner = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if bytes.len() <= 63 && bytes.iter().all(inner) && ends(bytes.first()) && ends(bytes.last()) {
        Ok(())
    } else {
        Err(format!(
            "{value:?} cannot be a value: at most 63 of a-z, A-Z, 0-9, '-', '_' and '.', alphanumeric at both ends"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_what_the_api_server_takes() {
        let read = labels("topology.kubernetes.io/zone=berlin, a=,").unwrap();
        assert_eq!(read["topology.kubernetes.io/zone"], "berlin");
        assert_eq!(read["a"], "");
        assert!(labels("").unwrap().is_empty());
        for bad in ["a", "=b", "a=b c", "a/b/c=d", "A!=x", "a=-x", "-/a=b"] {
            assert!(labels(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn taints_have_an_effect() {
        let read = taints("a=b:NoSchedule,c:NoExecute").unwrap().0;
        assert_eq!(read.len(), 2);
        assert_eq!((read[0].key.as_str(), read[0].value.as_str()), ("a", "b"));
        assert_eq!(
            (read[1].value.as_str(), read[1].effect.as_str()),
            ("", "NoExecute")
        );
        for bad in ["a", "a=b", "a=b:Never", ":NoSchedule"] {
            assert!(taints(bad).is_err(), "{bad}");
        }
    }
}
