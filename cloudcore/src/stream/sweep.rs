//! Nodes whose address leads nowhere, or soon to somebody else: once a minute they are pointed here.
//!
//! - Owns: this replica's entries in ConfigMap `edge-system/cloudcore-endpoints`, by which the others
//!   know that its address is alive, and itself after a restart which of its ports rest.
//! - Takes: what Nodes report, as the watch saw it; which sessions are here; Leases.
//! - Gives: Nodes of lost replicas to this one; the word to `upstream` where a session's Node reports
//!   something else; ports back of nodes that are served elsewhere or enrolled no more.
//! - Never: touches a Node whose Lease is live or whose address a living replica has; writes without
//!   the resourceVersion that it decided by.

use std::time::Duration;

use common::ids::NodeName;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use kube::Client;
use kube::api::{Patch, PatchParams, PostParams};
use kube::core::params::GetParams;
use kube::core::request::Request;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::endpoint::{NodeEndpoints, Reported};
use super::replicas::{self, MAP};
use crate::downstream::Downstream;
use crate::enroll::cache::Enrolments;
use crate::hub::registry::Registry;
use crate::kube::{KubeClients, KubeError, NAMESPACE, is_absent, is_conflict};
use crate::nodes::claim::{Held, NAMESPACE as LEASES};
use crate::upstream::Upstream;

const EVERY: Duration = Duration::from_secs(60);
/// Nodes pointed here in one sweep: those of a lost replica have all lapsed at once, and each is a
/// write that every watcher of Nodes sees.
const AT_ONCE: usize = 50;
const BETWEEN: Duration = Duration::from_millis(100);

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

    /// Says that this replica's address lives and which of its ports rest, and gives all addresses
    /// that live.
    async fn alive(&self) -> Result<Vec<String>, KubeError> {
        let (maps, now) = (replicas::maps(self.client.clone()), Timestamp::now());
        let told = replicas::told(self.endpoints.address(), self.endpoints.resting(), now);
        let patch = Patch::Merge(json!({"data": told}));
        let telling = || KubeError::api(format!("writing ConfigMap {NAMESPACE}/{MAP}"));
        let written = match maps.patch(MAP, &PatchParams::default(), &patch).await {
            Err(error) if is_absent(&error) => {
                let map = replicas::map(told);
                maps.create(&PostParams::default(), &map).await
            }
            other => other,
        };
        let data = written.map_err(telling())?.data.unwrap_or_default();
        let old = replicas::forgotten(&data, now);
        if !old.is_null() {
            let patch = Patch::Merge(json!({"data": old}));
            let taken = maps.patch(MAP, &PatchParams::default(), &patch).await;
            taken.map_err(telling())?;
        }
        Ok(replicas::living(&data, now))
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
    use std::net::{IpAddr, Ipv4Addr};
    use std::sync::Arc;

    use common::pki::{ClusterId, KeyId};
    use tokio::sync::mpsc;
    use tokio_util::task::AbortOnDropHandle;

    use super::*;
    use crate::downstream::{self, Clients};
    use crate::enroll::record::{EnrolmentSpec, Key, record};
    use crate::kube::fake::FakeApi;
    use crate::nodes::birth::EDGE_LABEL;
    use crate::stream::AddressType;
    use crate::stream::testing::watching;
    use crate::upstream::{self, KubeWriter};
    use crate::views::LiveState;

    const NODE: &str = "/api/v1/nodes/shop-7";
    const LEASE: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/shop-7";
    const LOST: &str = "192.0.2.7";

    #[derive(Clone)]
    struct Watched(Client);

    impl Clients for Watched {
        fn own(&self) -> Client {
            self.0.clone()
        }

        fn own_watch(&self) -> Client {
            self.0.clone()
        }

        fn mark_as_node(request: &mut http::Request<kube::client::Body>, node: &NodeName) {
            KubeClients::mark_as_node(request, node);
        }
    }

    struct Bed {
        fake: FakeApi,
        sweep: Sweep,
        _tasks: [AbortOnDropHandle<()>; 2],
    }

    impl Bed {
        /// A replica at 127.0.0.1, and the Node of an enrolled device that is away, which leads to
        /// [`LOST`].
        async fn start(ports: &str) -> Self {
            let (fake, node) = (FakeApi::new(), NodeName::parse("shop-7").unwrap());
            let reported = json!({
                "metadata": {"labels": {EDGE_LABEL: ""}},
                "status": {"addresses": [{"type": "InternalIP", "address": LOST}],
                    "daemonEndpoints": {"kubeletEndpoint": {"Port": 20_003}}},
            });
            fake.put(NODE, reported);
            let spec = EnrolmentSpec {
                keys: vec![Key::build(KeyId([1; 32]), Timestamp::UNIX_EPOCH)],
                ..EnrolmentSpec::default()
            };
            let enrolment = serde_json::to_value(record(&node, spec, None)).unwrap();
            let enrolments = "/apis/fleet.cloudcore.io/v1alpha1/namespaces/edge-system/enrolments";
            fake.put(&format!("{enrolments}/shop-7"), enrolment);
            // Of watches nothing comes: what is written here is not seen.
            let client = watching(&fake, mpsc::unbounded_channel().1);
            let cluster = ClusterId::parse("c1").unwrap();
            let (enrolments, enrolling) =
                Enrolments::build(client.clone(), client.clone(), cluster);
            let (downstream, feeding) = downstream::build(
                downstream::Config::default(),
                Watched(client.clone()),
                enrolments.names(),
                mpsc::channel(1).0,
            );
            let deps = upstream::Deps {
                writer: Arc::new(KubeWriter::new(client.clone(), KubeClients::mark_as_node)),
                pods: Arc::new(LiveState(downstream.clone())),
                nodes: Arc::new(LiveState(downstream.clone())),
                endpoints: None,
                clock: Arc::new(Timestamp::now),
            };
            let (upstream, _) = upstream::build(&upstream::Config::default(), deps);
            let enrolling = tokio::spawn(enrolling.run(CancellationToken::new()));
            let feeding = tokio::spawn(async move {
                feeding.run(CancellationToken::new()).await.unwrap();
            });
            let here = IpAddr::V4(Ipv4Addr::LOCALHOST);
            let endpoints = NodeEndpoints::at(here, AddressType::default(), ports.parse().unwrap());
            let seen = async {
                enrolments.synced().await;
                while downstream.node(&node).is_none() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            let seen = tokio::time::timeout(Duration::from_secs(10), seen).await;
            seen.expect("the Node is seen");
            Self {
                fake,
                sweep: Sweep {
                    endpoints,
                    client,
                    registry: Registry::default(),
                    enrolments,
                    downstream,
                    upstream,
                },
                _tasks: [enrolling, feeding].map(AbortOnDropHandle::new),
            }
        }

        async fn look(&self, alive: &[&str]) {
            let alive: Vec<_> = alive.iter().map(|a| (*a).to_owned()).collect();
            self.sweep.look(&alive).await;
        }

        /// Port and address that the Node reports.
        fn leads_to(&self) -> (Value, Value) {
            let status = &self.fake.get(NODE).unwrap()["status"];
            let address = status["addresses"].as_array().unwrap().last().unwrap();
            let port = &status["daemonEndpoints"]["kubeletEndpoint"]["Port"];
            (address["address"].clone(), port.clone())
        }
    }

    #[tokio::test]
    async fn the_node_of_a_lost_replica_is_pointed_here_while_its_device_is_away() {
        let bed = Bed::start("28451-28451").await;
        let lost = (json!(LOST), json!(20_003));
        bed.look(&["127.0.0.1", LOST]).await;
        assert_eq!(bed.leads_to(), lost, "its replica lives");
        bed.fake.put(
            LEASE,
            json!({"spec": {"holderIdentity": "shop-7", "leaseTransitions": 1,
                "leaseDurationSeconds": 40, "renewTime": Timestamp::now().to_string()},
                "metadata": {"annotations": {"fleet.cloudcore.io/session": "r/s"}}}),
        );
        bed.look(&["127.0.0.1"]).await;
        assert_eq!(bed.leads_to(), lost, "its session is elsewhere");
        bed.fake.put(LEASE, json!({"spec": {}}));
        bed.look(&["127.0.0.1"]).await;
        assert_eq!(bed.leads_to(), (json!("127.0.0.1"), json!(28_451)));
        // And somebody listens there, who says that the node is away.
        assert!(std::net::TcpStream::connect("127.0.0.1:28451").is_ok());
    }

    #[tokio::test]
    async fn what_somebody_else_wrote_meanwhile_stays() {
        let bed = Bed::start("28452-28452").await;
        let mut node = bed.fake.get(NODE).unwrap();
        node["status"]["addresses"] = json!([{"type": "InternalIP", "address": "192.0.2.9"}]);
        bed.fake.put(NODE, node);
        bed.look(&["127.0.0.1"]).await;
        assert_eq!(bed.leads_to().0, "192.0.2.9");
    }

    #[tokio::test]
    async fn ports_that_rest_are_told_beside_the_address() {
        let bed = Bed::start("28453-28453").await;
        let node = NodeName::parse("shop-8").unwrap();
        bed.sweep.endpoints.ensure(&node).unwrap();
        // Nobody has enrolled it.
        bed.sweep.let_go();
        for _ in 0..2 {
            assert_eq!(bed.sweep.alive().await.unwrap(), ["127.0.0.1"]);
            let path = format!("/api/v1/namespaces/{NAMESPACE}/configmaps/{MAP}");
            let data = bed.fake.get(&path).unwrap()["data"].clone();
            let told: Vec<_> = data.as_object().unwrap().keys().collect();
            assert_eq!(told, ["127.0.0.1", "port-28453-127.0.0.1"]);
        }
    }

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
