//! A Pod that keeps more on the device's disk than it may: counted now and then, and told.
//!
//! Counts what its emptyDirs, its containers' own layers and their logs take; a Pod that has no
//! limit is not counted. Where something cannot be counted, the next count is waited for: a Pod is
//! ended for what was seen, never for what is not known.

mod tree;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use common::tasks::beside;
use k8s_openapi::api::core::v1::{Container, Pod};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep};

use super::plan::{self, is_sidecar};
use super::quantity::units;
use crate::cri::{CriError, Runtime, api};

const EVERY: Duration = Duration::from_secs(10);
/// Of the time at most one part in so many is spent on counting, however large a tree is.
const REST: u32 = 30;

const STORAGE: &str = "ephemeral-storage";

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Volume(String),
    Container(String),
    /// Everything together, with the sum of the containers' limits.
    Whole,
}

/// What the parts of a Pod may keep.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Limits(Vec<(Part, u64)>);

/// Bytes of the parts of a Pod.
type Kept = BTreeMap<Part, u64>;

fn bytes(quantity: &Quantity) -> Option<u64> {
    u64::try_from(units(quantity)?).ok().filter(|b| *b > 0)
}

fn limit(container: &Container) -> Option<u64> {
    let limits = container.resources.as_ref()?.limits.as_ref()?;
    bytes(limits.get(STORAGE)?)
}

/// The emptyDirs that are on the disk: those in memory cannot outgrow their file system.
fn on_disk(pod: &Pod) -> impl Iterator<Item = (&str, Option<u64>)> {
    let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
    volumes.filter_map(|volume| {
        let source = volume.empty_dir.as_ref()?;
        let disk = source.medium.as_deref().unwrap_or_default().is_empty();
        let limit = source.size_limit.as_ref().and_then(bytes);
        disk.then_some((volume.name.as_str(), limit))
    })
}

impl Limits {
    pub fn of(pod: &Pod) -> Self {
        let mut limits = Vec::new();
        for (name, limit) in on_disk(pod) {
            limits.extend(limit.map(|limit| (Part::Volume(name.to_owned()), limit)));
        }
        let (mut steady, mut first) = (0_u64, 0_u64);
        let inits = plan::inits(pod).iter();
        for container in inits.chain(plan::mains(pod)) {
            let Some(limit) = limit(container) else {
                continue;
            };
            limits.push((Part::Container(container.name.clone()), limit));
            let is_init = plan::inits(pod).iter().any(|c| c.name == container.name);
            if is_init && !is_sidecar(container) {
                first = first.max(limit);
            } else {
                steady = steady.saturating_add(limit);
            }
        }
        let whole = steady.max(first);
        if whole > 0 {
            limits.push((Part::Whole, whole));
        }
        Self(limits)
    }

    /// Of the Pod's emptyDirs those that count.
    pub fn on_disk(pod: &Pod, mut all: Vec<(String, PathBuf)>) -> Vec<(String, PathBuf)> {
        all.retain(|(name, _)| on_disk(pod).any(|(counts, _)| counts == name));
        all
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A sentence for whoever looks at the Pod, once it keeps too much.
    fn exceeded(&self, kept: &Kept) -> Option<String> {
        let all = kept.values().fold(0, |sum: u64, b| sum.saturating_add(*b));
        let mut over = self.0.iter().filter_map(|(part, limit)| {
            let kept = match part {
                Part::Whole => Some(all),
                Part::Volume(_) | Part::Container(_) => kept.get(part).copied(),
            };
            Some((part, kept?, limit)).filter(|(_, kept, limit)| kept > limit)
        });
        let (part, kept, limit) = over.next()?;
        let (kept, limit) = (mebibytes(kept), mebibytes(*limit));
        Some(match part {
            Part::Volume(name) => {
                format!("emptyDir volume {name:?} holds {kept}, more than its sizeLimit of {limit}")
            }
            Part::Container(name) => format!(
                "container {name:?} keeps {kept} in its file system and logs, more than its {STORAGE} limit of {limit}"
            ),
            Part::Whole => format!(
                "the Pod keeps {kept} on the disk, more than its containers' {STORAGE} limits of {limit} together"
            ),
        })
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// Where the parts of a Pod are.
pub struct Disk {
    pub cri: Runtime,
    pub uid: String,
    /// Of its emptyDirs.
    pub volumes: Vec<(String, PathBuf)>,
    /// The Pod's log directory.
    pub logs: PathBuf,
    /// One Pod is counted at a time.
    pub turn: Arc<Semaphore>,
}

impl Disk {
    /// Counts until the Pod keeps more than it may; says what.
    pub async fn watch(self, limits: Limits) -> String {
        let mut pause = EVERY;
        loop {
            sleep(pause).await;
            let Ok(_turn) = self.turn.acquire().await else {
                return std::future::pending().await;
            };
            let begun = Instant::now();
            match self.count().await {
                Ok(kept) => {
                    if let Some(message) = limits.exceeded(&kept) {
                        return message;
                    }
                }
                Err(error) => {
                    tracing::debug!(uid = %self.uid, %error, "what a Pod keeps on the disk could not be counted");
                }
            }
            pause = EVERY.max(begun.elapsed() * REST);
        }
    }

    async fn count(&self) -> Result<Kept, CriError> {
        let mut kept = Kept::new();
        for container in self.cri.list_containers(Some(&self.uid)).await? {
            let name = container.metadata.map(|m| m.name).unwrap_or_default();
            if container.state != api::ContainerState::ContainerRunning as i32 {
                continue;
            }
            let stats = match self.cri.container_stats(&container.id).await {
                Ok(stats) => stats,
                Err(error) if error.not_found() => continue,
                Err(error) => return Err(error),
            };
            let layer = stats.and_then(|s| s.writable_layer?.used_bytes);
            let logs = self.tree(self.logs.join(&name)).await;
            let bytes = layer.map_or(0, |l| l.value).saturating_add(logs);
            kept.insert(Part::Container(name), bytes);
        }
        for (name, place) in &self.volumes {
            let bytes = self.tree(place.clone()).await;
            kept.insert(Part::Volume(name.clone()), bytes);
        }
        Ok(kept)
    }

    async fn tree(&self, root: PathBuf) -> u64 {
        // What is not there yet keeps nothing.
        beside(move || tree::bytes(&root).unwrap_or(0)).await
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::pods::testing::pod;

    const MIB: u64 = 1 << 20;

    fn limited(limit: &str) -> serde_json::Value {
        json!({"limits": {STORAGE: limit}})
    }

    fn the_pod() -> Pod {
        pod(json!({"spec": {
            "volumes": [
                {"name": "small", "emptyDir": {"sizeLimit": "1Mi"}},
                {"name": "free", "emptyDir": {}},
                {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
                {"name": "map", "configMap": {"name": "m"}}],
            "initContainers": [
                {"name": "first", "resources": limited("4Mi")},
                {"name": "side", "restartPolicy": "Always", "resources": limited("1Mi")}],
            "containers": [
                {"name": "a", "resources": limited("2Mi")},
                {"name": "b"}]}}))
    }

    #[test]
    fn limits_are_of_volumes_on_the_disk_of_containers_and_of_all() {
        let volume = |name: &str, mib| (Part::Volume(name.into()), mib * MIB);
        let container = |name: &str, mib| (Part::Container(name.into()), mib * MIB);
        assert_eq!(
            Limits::of(&the_pod()).0,
            [
                volume("small", 1),
                container("first", 4),
                container("side", 1),
                container("a", 2),
                (Part::Whole, 4 * MIB)
            ]
        );
        let none = pod(json!({"spec": {
            "volumes": [{"name": "free", "emptyDir": {}}], "containers": [{"name": "a"}]}}));
        assert!(Limits::of(&none).is_empty());
    }

    #[test]
    fn what_keeps_too_much_is_named() {
        let limits = Limits::of(&the_pod());
        let volume = |name: &str| Part::Volume(name.into());
        let container = |name: &str| Part::Container(name.into());
        for (kept, said) in [
            (vec![], None),
            (vec![(volume("small"), MIB)], None),
            (vec![(volume("small"), MIB + 1)], Some("\"small\" holds")),
            (vec![(container("a"), 3 * MIB)], Some("container \"a\"")),
            (vec![(container("b"), 4 * MIB)], None),
            (vec![(volume("free"), 3 * MIB)], None),
            (
                vec![(volume("free"), 3 * MIB), (container("b"), 2 * MIB)],
                Some("the Pod keeps 5.0 MiB"),
            ),
        ] {
            let found = limits.exceeded(&kept.into_iter().collect());
            match said {
                None => assert_eq!(found, None),
                Some(said) => assert!(
                    found.as_ref().is_some_and(|f| f.contains(said)),
                    "{found:?}"
                ),
            }
        }
    }
}
