//! A Pod that keeps more on the device's disk than it may: counted now and then, and told.
//!
//! Counts what its emptyDirs, its containers' own layers and their logs take, as the kubelet does; a
//! Pod that has no limit is not counted, nor one without which a node is none. Where something
//! cannot be counted, the next count is waited for: a Pod is ended for what was seen, never for what
//! is not known. Only who nests directories too deep to be counted is ended for that.

mod tree;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use common::tasks::beside;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::cgroups::{limit_of, limited};
use super::plan::{self, is_sidecar};
use super::quantity::units;
use super::volumes::is_on_disk;
use crate::cri::{CriError, Runtime, api};
use tree::Uncounted;

const EVERY: Duration = Duration::from_secs(10);
/// Of the time one part in so many is spent on counting a large tree, but it is counted at least
/// every two minutes.
const REST: u32 = 30;
const SELDOM: Duration = Duration::from_secs(120);

const STORAGE: &str = "ephemeral-storage";

/// The least priority of a Pod without which a node is none (`system-cluster-critical`).
const CRITICAL: i32 = 2_000_000_000;

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

/// What the parts of a Pod keep.
#[derive(Default)]
struct Kept {
    bytes: BTreeMap<Part, u64>,
    /// Why something could not be counted: of the whole nothing is known.
    unknown: Option<String>,
}

fn positive(bytes: i64) -> Option<u64> {
    u64::try_from(bytes).ok().filter(|b| *b > 0)
}

impl Limits {
    pub fn of(pod: &Pod) -> Self {
        let priority = pod.spec.as_ref().and_then(|s| s.priority);
        if priority.is_some_and(|p| p >= CRITICAL) {
            return Self::default();
        }
        let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
        let volumes = volumes.filter_map(|v| {
            let source = v.empty_dir.as_ref().filter(|e| is_on_disk(e))?;
            let limit = positive(units(source.size_limit.as_ref()?)?)?;
            Some((Part::Volume(v.name.clone()), limit))
        });
        let sidecars = plan::inits(pod).iter().filter(|c| is_sidecar(c));
        let containers = sidecars.chain(plan::mains(pod)).filter_map(|c| {
            let limit = positive(limit_of(c, STORAGE)?)?;
            Some((Part::Container(c.name.clone()), limit))
        });
        let whole = limited(pod, STORAGE).and_then(positive);
        let whole = whole.map(|limit| (Part::Whole, limit));
        Self(volumes.chain(containers).chain(whole).collect())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A sentence for whoever looks at the Pod, once it keeps too much.
    fn exceeded(&self, kept: &Kept) -> Option<String> {
        let sum = |sum: u64, b: &u64| sum.saturating_add(*b);
        let known = kept.unknown.is_none();
        let all = known.then(|| kept.bytes.values().fold(0, sum));
        let mut over = self.0.iter().filter_map(|(part, limit)| {
            let kept = match part {
                Part::Whole => all,
                Part::Volume(_) | Part::Container(_) => kept.bytes.get(part).copied(),
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
        let (mut pause, mut complained) = (EVERY, false);
        loop {
            sleep(pause).await;
            let begun = Instant::now();
            let counted = self.volumes().await;
            let took = begun.elapsed();
            pause = (took * REST).clamp(EVERY, SELDOM);
            let mut kept = match counted {
                Ok(kept) => kept,
                Err(message) => return message,
            };
            if let Err(error) = self.containers(&mut kept).await {
                kept.unknown = Some(error.to_string());
            }
            if let Some(message) = limits.exceeded(&kept) {
                return message;
            }
            if let Some(error) = kept.unknown
                && !std::mem::replace(&mut complained, true)
            {
                tracing::warn!(
                    uid = %self.uid,
                    error,
                    "not all that a Pod keeps on the disk can be counted: its limits are not kept"
                );
            }
        }
    }

    /// The emptyDirs. An error is a sentence about a Pod that cannot be counted on purpose.
    async fn volumes(&self) -> Result<Kept, String> {
        let mut kept = Kept::default();
        for (name, place) in &self.volumes {
            match self.tree(place.clone()).await {
                Ok(bytes) => {
                    kept.bytes.insert(Part::Volume(name.clone()), bytes);
                }
                Err(Uncounted::Deep) => {
                    return Err(format!(
                        "emptyDir volume {name:?} has directories nested deeper than {}, which cannot be counted against the Pod's limits",
                        tree::DEPTH
                    ));
                }
                Err(error @ (Uncounted::Stopped | Uncounted::Io(_))) => {
                    kept.unknown = Some(error.to_string());
                }
            }
        }
        Ok(kept)
    }

    async fn containers(&self, kept: &mut Kept) -> Result<(), CriError> {
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
            let layer = layer.map_or(0, |l| l.value);
            // The runtime makes the directory of logs, and no container reaches it.
            let logs = match self.tree(self.logs.join(&name)).await {
                Ok(bytes) => bytes,
                Err(error) => {
                    kept.unknown = Some(error.to_string());
                    0
                }
            };
            let bytes = layer.saturating_add(logs);
            kept.bytes.insert(Part::Container(name), bytes);
        }
        Ok(())
    }

    /// The permit stays with the thread, which may outlive this future.
    async fn tree(&self, root: PathBuf) -> Result<u64, Uncounted> {
        let Ok(turn) = self.turn.clone().acquire_owned().await else {
            return Err(Uncounted::Stopped);
        };
        let stop = CancellationToken::new();
        let _ends_with_this = stop.clone().drop_guard();
        beside(move || {
            let _turn = turn;
            tree::bytes(&root, &stop)
        })
        .await
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
            "overhead": {STORAGE: "1Mi"},
            "initContainers": [
                {"name": "side", "restartPolicy": "Always", "resources": limited("1Mi")},
                {"name": "first", "resources": limited("3Mi")}],
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
                container("side", 1),
                container("a", 2),
                (Part::Whole, 5 * MIB)
            ]
        );
        let none = pod(json!({"spec": {
            "volumes": [{"name": "free", "emptyDir": {}}], "containers": [{"name": "a"}]}}));
        assert!(Limits::of(&none).is_empty());
        let mut critical = the_pod();
        critical.spec.as_mut().unwrap().priority = Some(CRITICAL);
        assert!(Limits::of(&critical).is_empty());
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
            (vec![(container("b"), 5 * MIB)], None),
            (vec![(volume("free"), 3 * MIB)], None),
            (
                vec![(volume("free"), 3 * MIB), (container("b"), 3 * MIB)],
                Some("the Pod keeps 6.0 MiB"),
            ),
        ] {
            let mut kept = Kept {
                bytes: kept.into_iter().collect(),
                unknown: None,
            };
            let found = limits.exceeded(&kept);
            kept.unknown = Some("the disk is broken".into());
            let of_all = found.as_ref().is_some_and(|f| f.contains("the Pod"));
            assert_eq!(limits.exceeded(&kept).is_none(), found.is_none() || of_all);
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
