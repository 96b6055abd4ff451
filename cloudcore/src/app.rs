//! Builds all components, spawns all tasks, fixes the stop order: read this first.

use std::sync::Arc;

use anyhow::Context;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::{Config, HostPort};
use crate::enroll::authority::Authority;
use crate::enroll::cache::Enrolments;
use crate::enroll::link::ensure_link;
use crate::enroll::{EnrollConfig, Enroller};
use crate::kube::{Access, KubeClients};
use crate::nodes::claim::Claims;
use crate::nodes::keeper;
use crate::nodes::tolerations::Tolerations;

/// Serves until the process is told to stop.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let access = Access::find(config.kubeconfig.as_deref()).await?;
    let (kube, kube_task) = KubeClients::build(&access, config.impersonation).await?;
    let authority = Arc::new(Authority::ensure(&kube.own()).await?);
    let link = ensure_link(&kube.own(), &authority, &config.advertise).await?;
    let cluster = authority.cluster.clone();
    let advertise: Vec<_> = config.advertise.iter().map(HostPort::to_string).collect();
    tracing::info!(%cluster, mode = ?*kube.mode().borrow(), advertise = advertise.join(","), "cloudcore runs");

    let enroll = EnrollConfig {
        certificate_lifetime: config.certificate_lifetime,
        grace: config.reenrol_grace,
        taint_nodes: config.taint_nodes,
    };
    let _enroller = Enroller::build(kube.own(), authority, link, enroll);
    let (enrolments, enrolments_task) =
        Enrolments::build(kube.own(), kube.own_watch(), cluster.clone());
    let (claims, claims_task) = Claims::build(kube.own(), replica());
    let (_nodes, keeper_task) =
        keeper::build(kube.own(), kube.own_watch(), enrolments, cluster, claims);
    let (_tolerations, tolerations_task) = Tolerations::build(kube.own());

    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    tasks.spawn(kube_task.run(stop.clone()));
    tasks.spawn(enrolments_task.run(stop.clone()));
    tasks.spawn(claims_task.run(stop.clone()));
    tasks.spawn(keeper_task.run(stop.clone()));
    tasks.spawn(tolerations_task.run(stop.clone()));
    tasks.close();
    tokio::signal::ctrl_c()
        .await
        .context("waiting for a signal")?;
    stop.cancel();
    tasks.wait().await;
    Ok(())
}

/// This CloudCore's name among its peers: the Pod's in a cluster, else the machine's and process's.
fn replica() -> String {
    let host = std::env::var("HOSTNAME").unwrap_or_else(|_| "cloudcore".into());
    format!("{host}-{}", std::process::id())
}
