//! Builds all components of CloudCore, spawns all tasks, fixes the stop order: read this first.
//!
//! ```text
//! API server ──watch──► downstream ──desired──► hub (listener, sessions) ◄──dial── edges
//!     ▲                     │ live state            │ reports, events, requests
//!     └──── upstream ◄──────┴───────────────────────┘
//!     ├──────────────────────────── stream ──tunnels──► sessions (kubectl logs, exec, ...)
//!     └──── enroll (tokens, CA, records) · nodes (Node objects, Leases, tolerations)
//! ```
//!
//! It keeps nothing that Kubernetes and the edges cannot give back: any replica serves any node.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use common::hub::listen::{self, Limits, ListenConfig};
use common::hub::proto;
use common::hub::tls::ServerTls;
use common::hub::transport::LinkConfig;
use common::ids::NodeName;
use common::pki::Validity;
use common::signals::stop_on_signals;
use common::tasks::Tasks;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::Api;
use kube::api::ListParams;
use rustls::pki_types::UnixTime;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::admin::{self, Admin};
use crate::config::{Config, HostPort};
use crate::downstream;
use crate::enroll::authority::Authority;
use crate::enroll::cache::Enrolments;
use crate::enroll::link::ensure_link;
use crate::enroll::tokens::Tokens;
use crate::enroll::{EnrollConfig, Enroller};
use crate::hub::registry::Registry;
use crate::hub::{Hub, HubDeps, Paces};
use crate::kube::epoch::read_epoch;
use crate::kube::{Access, KubeClients, KubeError};
use crate::nodes::claim::Claims;
use crate::nodes::keeper;
use crate::nodes::tolerations::Tolerations;
use crate::stream::{self, NodeEndpoints};
use crate::upstream::{self, KubeWriter};
use crate::views::{self, LiveState};

/// A server certificate outlives every process: it is made at each start.
const SERVER_CERTIFICATE: Duration = Duration::from_secs(5 * 365 * 86_400);

/// Malformed objects that wait for their Event; more at once are counted only.
const MALFORMED: usize = 64;

/// The part that ends before what it writes through.
const HUB: &str = "the hub";

/// The last sessions' writes get this long after the hub has ended.
const LAST_WRITES: Duration = Duration::from_secs(2);

/// Serves until the process is told to stop.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    stop_on_signals(stop.clone()).context("listening for signals")?;
    let access = Access::find(config.kubeconfig.as_deref()).await?;
    let (kube, kube_task) = KubeClients::build(&access, config.impersonation).await?;
    let authority = Arc::new(Authority::ensure(&kube.own()).await?);
    let link = ensure_link(&kube.own(), &authority, &config.advertise).await?;
    let cluster = authority.cluster.clone();
    let epoch = watch::Sender::new(read_epoch(&kube.own()).await?);
    let environment = watch::Sender::new(environment(&kube, &config).await?);

    let (enrolments, enrolments_task) =
        Enrolments::build(kube.own(), kube.own_watch(), cluster.clone());
    let (claims, claims_task) = Claims::build(kube.own(), replica());
    let (edge_nodes, keeper_task) = keeper::build(
        kube.own(),
        kube.own_watch(),
        enrolments.clone(),
        cluster.clone(),
        claims.clone(),
    );
    let registry = Registry::default();
    let sessions = registry.clone();
    let is_here = Box::new(move |node: &NodeName| sessions.get(node).is_some());
    let (tolerations, tolerations_task) = Tolerations::build(kube.own(), is_here);
    let (malformed, malformed_seen) = mpsc::channel(MALFORMED);
    let (downstream, downstream_task) = downstream::build(
        downstream::Config::default(),
        views::Clients(kube.clone()),
        enrolments.names(),
        malformed,
    );
    let serving = stream::Config {
        address: config.kubelet_address,
        listen: config.listen.ip(),
        kind: config.kubelet_address_type,
        ports: config.kubelet_ports,
        serving: config.kubelet_serving_certificate,
    };
    let endpoints = NodeEndpoints::find(&serving, access.server(), &kube.own()).await?;
    let (upstream, upstream_task) = upstream::build(
        &upstream::Config::default(),
        upstream::Deps {
            writer: Arc::new(KubeWriter::new(kube.own(), KubeClients::mark_as_node)),
            pods: Arc::new(LiveState(downstream.clone())),
            nodes: Arc::new(LiveState(downstream.clone())),
            endpoints: Some(Arc::new(endpoints.clone())),
            clock: Arc::new(jiff::Timestamp::now),
        },
    );

    let tls = server_tls(&authority)?;
    let listening = ListenConfig {
        address: config.listen,
        link: LinkConfig {
            dead_after: config.dead_after,
            ..LinkConfig::default()
        },
        limits: Limits::default(),
        reset_key: authority.ca.derive("quic stateless reset"),
    };
    let (listener, listen_task) = listen::bind(listening, tls).await?;
    let streams = stream::Deps {
        kube: kube.clone(),
        authority: authority.clone(),
        registry: registry.clone(),
        enrolments: enrolments.clone(),
        downstream: downstream.clone(),
        upstream: upstream.clone(),
    };
    let (tunnels, stream_task) = stream::build(&serving, endpoints, streams)?;
    let deps = Arc::new(HubDeps {
        paces: Paces::default(),
        registry: registry.clone(),
        downstream: downstream.clone(),
        upstream: upstream.clone(),
        claims,
        enroller: Enroller::build(
            kube.own(),
            authority,
            link.clone(),
            EnrollConfig {
                certificate_lifetime: config.certificate_lifetime,
                grace: config.reenrol_grace,
                taint_nodes: config.taint_nodes,
            },
        ),
        enrolments: enrolments.clone(),
        epoch,
        kube: kube.clone(),
        environment: environment.subscribe(),
        link,
        dead_after: config.dead_after,
    });
    let ready = watch::Sender::new(false);
    let shown = admin::Shown {
        registry,
        upstream: upstream.clone(),
        downstream: downstream.clone(),
        tunnels,
        ready: ready.subscribe(),
    };
    let admin = Admin::bind(config.admin, shown).await?;
    let address = listener.address();
    let advertise: Vec<_> = config.advertise.iter().map(HostPort::to_string).collect();
    info!(
        %cluster,
        mode = ?*kube.mode().borrow(),
        listen = %address,
        advertise = advertise.join(","),
        admin = %config.admin,
        "cloudcore runs"
    );

    // Sessions end before what they write through; the watches end last.
    let (hub_stop, rest_stop) = (stop.clone(), CancellationToken::new());
    let mut tasks = Tasks::default();
    tasks.spawn("the API server's client", kube_task.run(rest_stop.clone()));
    tasks.spawn("the enrolments", enrolments_task.run(rest_stop.clone()));
    tasks.spawn(
        "the sweep of tokens",
        Enroller::sweep_tokens(Tokens::build(&kube.own()), rest_stop.clone()),
    );
    tasks.spawn("the Leases", claims_task.run(rest_stop.clone()));
    tasks.spawn("the Nodes", keeper_task.run(rest_stop.clone()));
    tasks.spawn("the tolerations", tolerations_task.run(rest_stop.clone()));
    let down = downstream_task.run(rest_stop.clone());
    tasks.spawn("the downstream watches", async move {
        if let Err(error) = down.await {
            error!(error = %common::telemetry::chain(&error), "the downstream side ended");
        }
    });
    tasks.spawn("the upstream writer", upstream_task.run(rest_stop.clone()));
    tasks.spawn("the listener", listen_task.run(hub_stop.clone()));
    tasks.spawn(HUB, Hub::build(listener, deps).run(hub_stop.clone()));
    tasks.spawn("the kubelet endpoints", stream_task.run(hub_stop.clone()));
    tasks.spawn("the admin endpoint", admin.run(rest_stop.clone()));
    let seen = views::Watchers {
        downstream,
        upstream,
        names: enrolments.names(),
        edge_nodes,
        tolerations,
        ready,
        kube,
        malformed: malformed_seen,
    };
    tasks.spawn("the views", seen.run(rest_stop.clone()));
    tasks
        .supervise(stop, |ended| {
            if ended == HUB {
                stop_later(rest_stop.clone());
            }
        })
        .await
        .context("cloudcore stops")
}

fn stop_later(rest: CancellationToken) {
    tokio::spawn(async move {
        tokio::time::sleep(LAST_WRITES).await;
        rest.cancel();
    });
}

/// What a Pod is born with: read once, the ranges and DNS of a cluster do not move.
async fn environment(
    kube: &KubeClients,
    config: &Config,
) -> anyhow::Result<proto::NodeEnvironment> {
    let cluster_ip = async |namespace: &str, name: &str| -> Result<Option<Service>, KubeError> {
        let services: Api<Service> = Api::namespaced(kube.own(), namespace);
        let found = services.get_opt(name).await;
        found.map_err(KubeError::api(format!(
            "reading Service {namespace}/{name}"
        )))
    };
    let api = cluster_ip("default", "kubernetes")
        .await?
        .and_then(|s| s.spec);
    let api = api.context("Service default/kubernetes is missing: is this a whole cluster?")?;
    let dns = match config.cluster_dns {
        Some(ip) => Some(ip.to_string()),
        None => cluster_ip("kube-system", "kube-dns")
            .await?
            .and_then(|s| s.spec?.cluster_ip),
    };
    if dns.is_none() {
        warn!("the cluster has no Service kube-system/kube-dns: Pods get their device's resolvers");
    }
    let port = api
        .ports
        .as_ref()
        .and_then(|p| p.first())
        .map_or(443, |p| p.port);
    Ok(proto::NodeEnvironment {
        cluster_dns: dns.unwrap_or_default(),
        cluster_domain: config.cluster_domain.clone(),
        api_host: api.cluster_ip.unwrap_or_default(),
        api_port: u32::try_from(port).unwrap_or(443),
        provider_id: String::new(),
        cluster_ranges: cluster_ranges(kube, &config.cluster_ranges).await,
    })
}

/// The configured ranges, and those of Services where the cluster tells them (1.33 and newer).
async fn cluster_ranges(kube: &KubeClients, configured: &[String]) -> Vec<String> {
    let all: Api<ServiceCIDR> = Api::all(kube.own());
    let told = match all.list(&ListParams::default()).await {
        Ok(found) => service_ranges(&found.items),
        Err(error) => {
            debug!(%error, "the cluster does not tell the ranges of its Services");
            Vec::new()
        }
    };
    let mut ranges = configured.to_vec();
    for range in told {
        if !ranges.contains(&range) {
            ranges.push(range);
        }
    }
    ranges
}

fn service_ranges(found: &[ServiceCIDR]) -> Vec<String> {
    let specs = found.iter().filter_map(|one| one.spec.as_ref());
    specs
        .filter_map(|spec| spec.cidrs.clone())
        .flatten()
        .collect()
}

fn server_tls(authority: &Authority) -> anyhow::Result<ServerTls> {
    let now = UnixTime::now();
    let validity = Validity {
        not_before: now,
        not_after: UnixTime::since_unix_epoch(
            Duration::from_secs(now.as_secs()) + SERVER_CERTIFICATE,
        ),
    };
    let credentials = authority
        .ca
        .issue_server(&authority.cluster, validity, &[])?;
    Ok(ServerTls::new(
        &credentials,
        &[authority.ca.certificate().clone()],
    )?)
}

/// This CloudCore's name among its peers: the Pod's in a cluster, else the machine's and process's.
fn replica() -> String {
    let host = std::env::var("HOSTNAME").unwrap_or_else(|_| "cloudcore".into());
    format!("{host}-{}", std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ranges_of_services_are_those_of_all_their_objects() {
        let found = serde_json::json!([
            {"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/12", "fd00::/108"]}},
            {"metadata": {"name": "more"}, "spec": {"cidrs": ["10.200.0.0/16"]}},
            {"metadata": {"name": "empty"}},
        ]);
        let found: Vec<ServiceCIDR> = serde_json::from_value(found).unwrap();
        let want = ["10.96.0.0/12", "fd00::/108", "10.200.0.0/16"];
        assert_eq!(service_ranges(&found), want);
    }
}
