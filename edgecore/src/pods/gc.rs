//! Takes away what belongs to no Pod: sandboxes, directories, logs and grants that an agent which
//! died, or a cluster that was restored, left behind.
//!
//! Looks only where nobody else writes: the runtime, the agent's own directory and its ledger; log
//! directories may be another agent's. Never touches a running container before the cloud has said
//! once that the desired set is complete, and never anything that does not carry this node's own
//! label: a runtime may be shared.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::cgroups::Qos;
use super::jobs::remove_log_of;
use super::manager::recorded;
use super::worker::Shared;
use crate::cri::convert;

/// Between two rounds; the first is one round after the start, so that it delays no Pod.
const EVERY: Duration = Duration::from_secs(60);
/// Containers of an unknown Pod get the grace that a Pod has by default.
const GRACE: Duration = Duration::from_secs(30);

/// Goes round until shutdown.
pub async fn run(shared: Arc<Shared>, shutdown: CancellationToken) {
    let mut suspects = BTreeSet::new();
    loop {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
        if shared.desired.complete() && shared.runtime.borrow().ready {
            suspects = round(&shared, &suspects).await;
        }
    }
}

/// Removes what was without a Pod in the last round and still is; gives the suspects of this one.
pub async fn round(shared: &Shared, before: &BTreeSet<String>) -> BTreeSet<String> {
    let owners = owners(shared).await;
    // Looked up after the lists: a Pod that came meanwhile is not an orphan.
    let records = recorded(&shared.desired);
    let orphans: BTreeMap<_, _> = owners
        .into_iter()
        .filter(|(uid, _)| !records.contains(uid))
        .collect();
    for (uid, found) in &orphans {
        if before.contains(uid) && shared.desired.complete() {
            remove(shared, uid, found).await;
        }
    }
    orphans.into_keys().collect()
}

#[derive(Default)]
struct Found {
    sandboxes: Vec<String>,
    containers: Vec<(String, Duration)>,
}

async fn owners(shared: &Shared) -> BTreeMap<String, Found> {
    let mut all: BTreeMap<String, Found> = BTreeMap::new();
    let node = shared
        .environment
        .borrow()
        .as_ref()
        .map(|e| e.node_name.clone());
    let Some(node) = node else { return all };
    let owner = |labels: &HashMap<String, String>| {
        let mine = labels.get(convert::NODE) == Some(&node);
        labels.get(convert::POD_UID).filter(|_| mine).cloned()
    };
    if let Ok(sandboxes) = shared.cri.list_sandboxes(None).await {
        for s in sandboxes {
            if let Some(uid) = owner(&s.labels) {
                all.entry(uid).or_default().sandboxes.push(s.id);
            }
        }
    }
    if let Ok(containers) = shared.cri.list_containers(None).await {
        for c in containers {
            let Some(uid) = owner(&c.labels) else {
                continue;
            };
            let grace = c
                .annotations
                .get(convert::POD_GRACE)
                .and_then(|g| g.parse().ok());
            let grace = grace.map_or(GRACE, Duration::from_secs);
            all.entry(uid).or_default().containers.push((c.id, grace));
        }
    }
    let on_disk = shared.volumes.known_uids().into_iter();
    for uid in on_disk.chain(shared.ledger.holders()) {
        all.entry(uid).or_default();
    }
    all
}

async fn remove(shared: &Shared, uid: &str, found: &Found) {
    tracing::info!(uid, "removing what belongs to no Pod");
    for (id, grace) in &found.containers {
        if let Err(error) = shared.cri.stop_container(id, *grace).await {
            tracing::warn!(uid, %error, "an orphaned container was not stopped");
            return;
        }
        if shared.cri.remove_container(id).await.is_err() {
            return;
        }
    }
    for id in &found.sandboxes {
        if shared.cri.stop_sandbox(id).await.is_err()
            || shared.cri.remove_sandbox(id).await.is_err()
        {
            return;
        }
    }
    if let Err(error) = shared.volumes.teardown(uid).await {
        tracing::warn!(uid, %error, "an orphaned Pod directory was not removed");
        return;
    }
    if let Some(cgroups) = shared.cgroups.get() {
        for qos in [Qos::Guaranteed, Qos::Burstable, Qos::BestEffort] {
            // Absent in all but one of them.
            let _ = cgroups.remove(uid, qos);
        }
    }
    let (paths, ledger) = (shared.paths.clone(), shared.ledger.clone());
    let uid = uid.to_owned();
    let containers: Vec<_> = found.containers.iter().map(|(id, _)| id.clone()).collect();
    let done = tokio::task::spawn_blocking(move || {
        for id in containers {
            remove_log_of(&paths.container_logs, &id);
        }
        let end = format!("_{uid}");
        for entry in std::fs::read_dir(&paths.pod_logs)
            .into_iter()
            .flatten()
            .flatten()
        {
            if entry.file_name().to_string_lossy().ends_with(&end) {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
        ledger.release(&uid);
    });
    if let Err(error) = done.await {
        tracing::error!(%error, "what belongs to no Pod was not removed");
    }
}
