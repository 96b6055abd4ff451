//! Nodes whose address leads nowhere, or soon to somebody else: once a minute they are pointed here.
//!
//! - Owns: this replica's entry in ConfigMap `edge-system/cloudcore-endpoints`, by which the others
//!   know that its address is alive.
//! - Takes: what Nodes report, as the watch saw it; which sessions are here; Leases.
//! - Gives: Nodes of lost replicas to this one; the word to `upstream` where a session's Node reports
//!   something else; ports back of nodes that are served elsewhere or enrolled no more.
//! - Never: touches a Node whose Lease is live or whose address a living replica has; writes without
//!   the resourceVersion that it decided by.

use std::collections::BTreeMap;
use std::time::Duration;

use common::ids::NodeName;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use kube::api::{Patch, PatchParams, PostParams};
use kube::core::params::GetParams;
use kube::core::request::Request;
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::endpoint::{NodeEndpoints, Reported};
use crate::downstream::Downstream;
use crate::enroll::cache::Enrolments;
use crate::hub::registry::Registry;
use crate::kube::{KubeClients, KubeError, NAMESPACE, is_absent, is_conflict};
use crate::nodes::claim::{Held, NAMESPACE as LEASES};
use crate::upstream::Upstream;

const EVERY: Duration = Duration::from_secs(60);
/// Three times [`EVERY`], for clocks differ and an API server may be away for a moment.
const ALIVE_FOR: Duration = Duration::from_secs(180);
/// Entries of replicas that are long gone are taken away.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(86_400);
/// Nodes pointed here in one sweep: those of a lost replica have all lapsed at once, and each is a
/// write that every watcher of Nodes sees.
const AT_ONCE: usize = 50;
const BETWEEN: Duration = Duration::from_millis(100);

const MAP: &str = "cloudcore-endpoints";

/// What is to be done about a node, as far as the watches tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Nothing,
    /// Its session is here and its Node says something else: upstream compares again.
    Compare,
    /// It reports another address: its Lease decides.
    AskLease,
}

fn next_step(right: bool, reports: bool, session: bool) -> Step {
    match (right, session) {
        (true, true | false) => Step::Nothing,
        (false, true) => Step::Compare,
        (false, false) if reports => Step::AskLease,
        // Nobody was ever led anywhere.
        (false, false) => Step::Nothing,
    }
}

/// What is to be done about a node that reports another address and has no session here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// Another replica serves it, or keeps its address: a port here is given back.
    Elsewhere,
    Repoint,
}

fn verdict(lease_lives: bool, address_lives: bool) -> Verdict {
    if lease_lives || address_lives {
        Verdict::Elsewhere
    } else {
        Verdict::Repoint
    }
}

/// See the module.
pub(super) struct Sweep {
    pub(super) endpoints: NodeEndpoints,
    pub(super) client: Client,
    pub(super) registry: Registry,
    pub(super) enrolments: Enrolments,
    pub(super) downstream: Downstream,
    pub(super) upstream: Upstream,
}

impl Sweep {
    /// Ends with the token.
    pub(super) async fn run(self, shutdown: CancellationToken) {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {}
            () = self.sweep() => {}
        }
    }

    async fn sweep(self) {
        self.enrolments.synced().await;
        self.downstream.listed().await;
        self.keep_ours();
        let mut tick = tokio::time::interval(EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // The first says that we live; sessions that come back and other replicas get their turn.
        let mut first = true;
        loop {
            tick.tick().await;
            self.let_go();
            let alive = match self.alive().await {
                Ok(alive) => alive,
                Err(error) => {
                    warn!(error = %crate::chain(&error), "it is not known which replicas live; no Node is pointed here");
                    continue;
                }
            };
            if !std::mem::take(&mut first) {
                self.look(&alive).await;
            }
        }
    }

    /// Nodes that report this replica keep their listener: who asks is told that the node is not
    /// connected, and reaches nobody else.
    fn keep_ours(&self) {
        let names = self.enrolments.names().borrow().clone();
        for node in self.endpoints.nodes() {
            if names.contains(&node) {
                self.endpoints.ensure(&node);
            }
        }
    }

    /// Ports of nodes whose enrolment has ended rest. A session that is here may be newer than
    /// what the watch of enrolments has shown.
    pub(super) fn let_go(&self) {
        let names = self.enrolments.names().borrow().clone();
        for node in self.endpoints.nodes() {
            if !names.contains(&node) && self.registry.get(&node).is_none() {
                self.endpoints.release(&node);
            }
        }
    }

    async fn look(&self, alive: &[String]) {
        let names = self.enrolments.names().borrow().clone();
        let mut repointed = 0;
        for node in names.iter() {
            let Some(live) = self.downstream.node(node) else {
                continue;
            };
            let reported = Reported::read(&live.status);
            let session = self.registry.get(node).is_some();
            let right = reported.as_ref().is_some_and(|r| self.is_ours(node, r));
            match (next_step(right, reported.is_some(), session), reported) {
                (Step::Nothing, _) | (Step::AskLease, None) => {}
                (Step::Compare, _) => self.upstream.endpoint_changed(node),
                (Step::AskLease, Some(reported)) if repointed < AT_ONCE => {
                    let version = (&*live.uid, &*live.resource_version);
                    match self.judge(node, &reported, alive, version).await {
                        Ok(true) => repointed += 1,
                        Ok(false) => {}
                        Err(error) => warn!(
                            %node,
                            error = %crate::chain(&error),
                            "the Node's address leads nowhere, and it cannot be pointed here; trying again in a minute"
                        ),
                    }
                    tokio::time::sleep(BETWEEN).await;
                }
                (Step::AskLease, Some(_)) => {}
            }
        }
    }

    fn is_ours(&self, node: &NodeName, reported: &Reported) -> bool {
        let (kind, address) = (self.endpoints.kind(), self.endpoints.address());
        reported.is(kind, address, self.endpoints.port(node))
    }

    /// True when the Node was pointed here.
    async fn judge(
        &self,
        node: &NodeName,
        reported: &Reported,
        alive: &[String],
        version: (&str, &str),
    ) -> Result<bool, KubeError> {
        let ours = self.endpoints.address();
        let kept = |(_, address): &(String, String)| alive.contains(address);
        let address_lives = !reported.names(ours) && reported.addresses.iter().any(kept);
        match verdict(self.lease_lives(node).await?, address_lives) {
            Verdict::Elsewhere => {
                self.endpoints.release(node);
                Ok(false)
            }
            Verdict::Repoint => self.repoint(node, version).await,
        }
    }

    async fn lease_lives(&self, node: &NodeName) -> Result<bool, KubeError> {
        let path = format!("/apis/coordination.k8s.io/v1/namespaces/{LEASES}/leases");
        let request = Request::new(path).get(node.as_str(), &GetParams::default());
        let reading = KubeError::api(format!("reading the Lease of {node}"));
        let mut request = match request {
            Ok(request) => request,
            Err(error) => return Err(reading(kube::Error::BuildRequest(error))),
        };
        KubeClients::mark_as_node(&mut request, node);
        match self.client.request::<Lease>(request).await {
            Ok(lease) => Ok(Held::read(&lease, Timestamp::now()).is_some_and(|held| held.live)),
            Err(error) if is_absent(&error) => Ok(false),
            Err(error) => Err(reading(error)),
        }
    }

    async fn repoint(&self, node: &NodeName, version: (&str, &str)) -> Result<bool, KubeError> {
        let Some(port) = self.endpoints.ensure(node) else {
            return Ok(false);
        };
        let entry = self.endpoints.kind().entry(self.endpoints.address());
        let patch = Patch::Strategic(repointing(version, &entry, port));
        let request = Request::new("/api/v1/nodes").patch_subresource(
            "status",
            node.as_str(),
            &PatchParams::default(),
            &patch,
        );
        let writing = KubeError::api(format!("pointing Node {node} here"));
        let mut request = match request {
            Ok(request) => request,
            Err(error) => return Err(writing(kube::Error::BuildRequest(error))),
        };
        KubeClients::mark_as_node(&mut request, node);
        match self.client.request::<Node>(request).await {
            Ok(_) => {
                info!(%node, port, "the Node's address led nowhere; it leads here from now on");
                Ok(true)
            }
            // Somebody else wrote: a session elsewhere, or another replica's sweep.
            Err(error) if is_conflict(&error) || is_absent(&error) => Ok(false),
            Err(error) => Err(writing(error)),
        }
    }

    /// Says that this replica's address lives, and gives all that do.
    async fn alive(&self) -> Result<Vec<String>, KubeError> {
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), NAMESPACE);
        let (now, ours) = (Timestamp::now(), self.endpoints.address().to_string());
        let patch = Patch::Merge(json!({"data": {key(&ours): now.to_string()}}));
        let telling = || KubeError::api(format!("writing ConfigMap {NAMESPACE}/{MAP}"));
        let written = match maps.patch(MAP, &PatchParams::default(), &patch).await {
            Err(error) if is_absent(&error) => {
                let map = map(BTreeMap::from([(key(&ours), now.to_string())]));
                maps.create(&PostParams::default(), &map).await
            }
            other => other,
        };
        let data = written.map_err(telling())?.data.unwrap_or_default();
        let old = forgotten(&data, now);
        if !old.is_null() {
            let patch = Patch::Merge(json!({"data": old}));
            let taken = maps.patch(MAP, &PatchParams::default(), &patch).await;
            taken.map_err(telling())?;
        }
        Ok(living(&data, now))
    }
}

/// The keys of a ConfigMap have no colons, IPv6 addresses have.
fn key(address: &str) -> String {
    address.replace(':', "_")
}

fn age(entry: &str, now: Timestamp) -> Option<Duration> {
    let at: Timestamp = entry.parse().ok()?;
    let seconds = now.as_second().saturating_sub(at.as_second());
    Some(Duration::from_secs(u64::try_from(seconds).unwrap_or(0)))
}

fn living(data: &BTreeMap<String, String>, now: Timestamp) -> Vec<String> {
    let lives = |at: &str| age(at, now).is_some_and(|age| age < ALIVE_FOR);
    data.iter()
        .filter(|(_, at)| lives(at))
        .map(|(key, _)| key.replace('_', ":"))
        .collect()
}

/// A patch of the data that takes away what is long gone or unreadable; null when there is none.
fn forgotten(data: &BTreeMap<String, String>, now: Timestamp) -> Value {
    let gone = |at: &str| age(at, now).is_none_or(|age| age > FORGOTTEN_AFTER);
    let gone: serde_json::Map<_, _> = data
        .iter()
        .filter(|(_, at)| gone(at))
        .map(|(key, _)| (key.clone(), Value::Null))
        .collect();
    if gone.is_empty() {
        Value::Null
    } else {
        gone.into()
    }
}

fn map(data: BTreeMap<String, String>) -> ConfigMap {
    ConfigMap {
        metadata: kube::api::ObjectMeta {
            name: Some(MAP.into()),
            namespace: Some(NAMESPACE.into()),
            ..kube::api::ObjectMeta::default()
        },
        data: Some(data),
        ..ConfigMap::default()
    }
}

fn repointing((uid, version): (&str, &str), entry: &Value, port: u16) -> Value {
    json!({
        "metadata": {"uid": uid, "resourceVersion": version},
        "status": {
            "addresses": [{"$patch": "replace"}, entry],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": port}},
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_looked_at_by_what_it_reports_and_where_its_session_is() {
        for (right, reports, session, want) in [
            (true, true, true, Step::Nothing),
            (true, true, false, Step::Nothing),
            (false, true, true, Step::Compare),
            (false, false, true, Step::Compare),
            (false, true, false, Step::AskLease),
            (false, false, false, Step::Nothing),
        ] {
            assert_eq!(next_step(right, reports, session), want);
        }
        for (lease, address, want) in [
            (true, true, Verdict::Elsewhere),
            (true, false, Verdict::Elsewhere),
            (false, true, Verdict::Elsewhere),
            (false, false, Verdict::Repoint),
        ] {
            assert_eq!(verdict(lease, address), want);
        }
    }

    #[test]
    fn replicas_that_said_so_lately_live_and_old_ones_are_forgotten() {
        let now: Timestamp = "2026-01-02T00:10:00Z".parse().unwrap();
        let data: BTreeMap<String, String> = [
            ("10.0.0.1", "2026-01-02T00:09:00Z"),
            ("fd00__1", "2026-01-02T00:10:30Z"),
            ("10.0.0.2", "2026-01-02T00:06:00Z"),
            ("10.0.0.3", "2026-01-01T00:00:00Z"),
            ("10.0.0.4", "yesterday"),
        ]
        .map(|(key, at)| (key.to_owned(), at.to_owned()))
        .into();
        assert_eq!(living(&data, now), ["10.0.0.1", "fd00::1"]);
        let old = forgotten(&data, now);
        assert_eq!(old, json!({"10.0.0.3": null, "10.0.0.4": null}));
        assert!(forgotten(&BTreeMap::new(), now).is_null());
        assert_eq!(key("fd00::1"), "fd00__1");
    }

    #[test]
    fn a_node_is_pointed_here_only_as_it_was_seen() {
        let entry = json!({"type": "InternalIP", "address": "10.0.0.9"});
        let patch = repointing(("u-1", "7"), &entry, 20_001);
        assert_eq!(
            patch,
            json!({
                "metadata": {"uid": "u-1", "resourceVersion": "7"},
                "status": {
                    "addresses": [{"$patch": "replace"}, entry],
                    "daemonEndpoints": {"kubeletEndpoint": {"Port": 20_001}},
                },
            })
        );
    }
}
