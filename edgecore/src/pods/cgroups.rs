//! QoS, resources and the cgroups above a Pod's containers.
//!
//! The functions are pure; [`Cgroups`] is the adapter that makes and removes the Pod's own cgroup,
//! on cgroup v1 and v2. With the systemd driver systemd makes the slices that a sandbox names, so
//! only the removal of what is left is done here.
//!
//! ```text
//! cgroupfs  /kubepods/{burstable/,besteffort/,}podUID/CONTAINER
//! systemd   kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podUID_WITH_UNDERSCORES.slice
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::quantity::{millis, units};
use crate::node::environment::Environment;

/// Who makes cgroups: the runtime and the agent must agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CgroupDriver {
    Cgroupfs,
    Systemd,
}

/// A Pod's quality of service class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Qos {
    Guaranteed,
    Burstable,
    BestEffort,
}

impl Qos {
    /// The word of `status.qosClass`.
    pub fn as_str(self) -> &'static str {
        match self {
            Qos::Guaranteed => "Guaranteed",
            Qos::Burstable => "Burstable",
            Qos::BestEffort => "BestEffort",
        }
    }

    /// The cgroup between kubepods and the Pod's; Guaranteed has none.
    fn tier(self) -> Option<&'static str> {
        match self {
            Qos::Guaranteed => None,
            Qos::Burstable => Some("burstable"),
            Qos::BestEffort => Some("besteffort"),
        }
    }
}

/// A container's share of the device, in the units of CRI's `LinuxContainerResources`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LinuxResources {
    pub cpu_shares: i64,
    /// Microseconds a period; 0 is no limit.
    pub cpu_quota: i64,
    pub cpu_period: i64,
    /// Bytes; 0 is no limit.
    pub memory_limit: i64,
    pub oom_score_adj: i64,
}

const CPU_PERIOD: i64 = 100_000;
const MIN_SHARES: i64 = 2;
const MAX_SHARES: i64 = 262_144;
/// The kernel refuses a smaller quota.
const MIN_QUOTA: i64 = 1000;
/// Priorities from here on are the system's own (system-node-critical and its kin).
const CRITICAL_PRIORITY: i32 = 2_000_000_000;

fn shares(cpu_millis: i64) -> i64 {
    (cpu_millis.saturating_mul(1024) / 1000).clamp(MIN_SHARES, MAX_SHARES)
}

fn quota(cpu_millis: i64) -> i64 {
    if cpu_millis <= 0 {
        return 0;
    }
    (cpu_millis.saturating_mul(CPU_PERIOD) / 1000).max(MIN_QUOTA)
}

/// cgroup v2's weight for v1's shares, by the mapping that Kubernetes documents.
fn weight(shares: i64) -> i64 {
    1 + ((shares - MIN_SHARES) * 9999) / (MAX_SHARES - MIN_SHARES)
}

type Amounts = BTreeMap<String, Quantity>;

fn side(list: Option<&Amounts>, name: &str) -> Option<i64> {
    let quantity = list?.get(name)?;
    let amount = if name == "cpu" {
        millis(quantity)
    } else {
        units(quantity)
    };
    amount.filter(|a| *a > 0)
}

fn limit(r: Option<&ResourceRequirements>, name: &str) -> Option<i64> {
    side(r?.limits.as_ref(), name)
}

fn request(r: Option<&ResourceRequirements>, name: &str) -> Option<i64> {
    side(r?.requests.as_ref(), name)
}

/// The Pod's quality of service class.
pub fn qos(pod: &Pod) -> Qos {
    let Some(spec) = &pod.spec else {
        return Qos::BestEffort;
    };
    let init = spec.init_containers.iter().flatten();
    let containers = spec.containers.iter().chain(init);
    let all: Vec<_> = match &spec.resources {
        // Resources of the Pod as a whole decide alone.
        Some(pod) => vec![Some(pod)],
        None => containers.map(|c| c.resources.as_ref()).collect(),
    };
    let named = ["cpu", "memory"];
    let says = |r: &Option<&ResourceRequirements>| {
        named
            .iter()
            .any(|n| limit(*r, n).or(request(*r, n)).is_some())
    };
    let bounded = |r: &Option<&ResourceRequirements>| {
        named.iter().all(|n| match (limit(*r, n), request(*r, n)) {
            (Some(limit), Some(request)) => limit == request,
            (Some(_), None) => true,
            (None, _) => false,
        })
    };
    if !all.iter().any(says) {
        Qos::BestEffort
    } else if all.iter().all(bounded) {
        Qos::Guaranteed
    } else {
        Qos::Burstable
    }
}

/// What the runtime is told to hold the container to.
pub fn linux_resources(
    pod: &Pod,
    container: &Container,
    environment: &Environment,
) -> LinuxResources {
    let own = container.resources.as_ref();
    let cpu_limit = limit(own, "cpu");
    let cpu = request(own, "cpu").or(cpu_limit);
    LinuxResources {
        cpu_shares: shares(cpu.unwrap_or(0)),
        cpu_quota: quota(cpu_limit.unwrap_or(0)),
        cpu_period: CPU_PERIOD,
        memory_limit: limit(own, "memory").unwrap_or(0),
        oom_score_adj: oom_score_adj(pod, container, environment),
    }
}

/// The less memory a container asked for, the sooner the kernel ends it.
fn oom_score_adj(pod: &Pod, container: &Container, environment: &Environment) -> i64 {
    let spec = pod.spec.as_ref();
    let critical = spec
        .and_then(|s| s.priority)
        .is_some_and(|p| p >= CRITICAL_PRIORITY);
    match qos(pod) {
        _ if critical => -997,
        Qos::Guaranteed => -997,
        Qos::BestEffort => 1000,
        Qos::Burstable => {
            let own = burstable_score(container, environment);
            let sidecar = container.restart_policy.as_deref() == Some("Always");
            // A sidecar goes no sooner than the containers that it serves.
            let served = spec.iter().flat_map(|s| s.containers.iter());
            let served = served.map(|c| burstable_score(c, environment)).min();
            served.filter(|_| sidecar).map_or(own, |s| s.min(own))
        }
    }
}

fn burstable_score(container: &Container, environment: &Environment) -> i64 {
    let own = container.resources.as_ref();
    let asked = request(own, "memory").or(limit(own, "memory")).unwrap_or(0);
    let capacity = i64::try_from(environment.allocatable_memory_bytes).unwrap_or(i64::MAX);
    let part = asked.saturating_mul(1000) / capacity.max(1);
    (1000 - part).clamp(3, 999)
}

/// What the Pod's own cgroup is held to: sums, and limits only where every container has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct PodLimits {
    shares: i64,
    quota: i64,
    memory: i64,
}

fn pod_limits(pod: &Pod) -> PodLimits {
    let Some(spec) = &pod.spec else {
        return PodLimits {
            shares: MIN_SHARES,
            quota: 0,
            memory: 0,
        };
    };
    let is_sidecar = |c: &&Container| c.restart_policy.as_deref() == Some("Always");
    let init: Vec<&Container> = spec.init_containers.iter().flatten().collect();
    let sidecars = init.iter().copied().filter(is_sidecar);
    let steady: Vec<_> = spec.containers.iter().chain(sidecars).collect();
    let overhead = |name: &str| side(spec.overhead.as_ref(), name).unwrap_or(0);
    let of_pod = spec.resources.as_ref();
    let cpu = |c: &Container| {
        let r = c.resources.as_ref();
        request(r, "cpu").or(limit(r, "cpu")).unwrap_or(0)
    };
    let asked: i64 = steady.iter().map(|c| cpu(c)).sum();
    let asked = init.iter().map(|c| cpu(c)).fold(asked, i64::max);
    let asked = request(of_pod, "cpu").unwrap_or(asked) + overhead("cpu");
    let bound = |name: &str| {
        let whole = limit(of_pod, name);
        let of = |c: &&Container| limit(c.resources.as_ref(), name);
        let steady: Option<i64> = steady.iter().map(of).sum();
        let first: Option<i64> = init
            .iter()
            .map(of)
            .try_fold(0, |most, l| Some(l?.max(most)));
        let parts = steady.zip(first).map(|(sum, most)| sum.max(most));
        whole.or(parts).map_or(0, |l| l + overhead(name))
    };
    PodLimits {
        shares: shares(asked),
        quota: quota(bound("cpu")),
        memory: bound("memory"),
    }
}

/// Which generation of the kernel's interface the device has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    /// A hierarchy for each controller.
    V1,
    Unified,
}

/// The device's cgroup tree.
#[derive(Debug, Clone)]
pub struct Cgroups {
    driver: CgroupDriver,
    version: Version,
    root: PathBuf,
}

/// The controllers whose limits are set on a Pod as a whole (v1), or are handed down (v2).
const V1_CONTROLLERS: &[&str] = &["cpu", "memory", "pids"];
const UNIFIED_CONTROLLERS: &[&str] = &["cpu", "memory", "pids", "io", "cpuset"];

impl Cgroups {
    /// Looks at the device; without a driver from the runtime, cgroupfs.
    pub fn detect(driver: Option<CgroupDriver>) -> Self {
        Self::at(
            driver.unwrap_or(CgroupDriver::Cgroupfs),
            "/sys/fs/cgroup".into(),
        )
    }

    /// A tree at another place; the unified one has `cgroup.controllers` at its root.
    pub(crate) fn at(driver: CgroupDriver, root: PathBuf) -> Self {
        let unified = root.join("cgroup.controllers").exists();
        Self {
            driver,
            version: if unified {
                Version::Unified
            } else {
                Version::V1
            },
            root,
        }
    }

    /// The `cgroup_parent` of the Pod's sandbox.
    pub fn parent(&self, pod: &Pod) -> String {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        match self.driver {
            CgroupDriver::Cgroupfs => format!("/{}", cgroupfs_path(uid, qos(pod)).display()),
            CgroupDriver::Systemd => slice(uid, qos(pod)),
        }
    }

    /// Makes the Pod's cgroup with its limits; idempotent.
    pub fn ensure(&self, pod: &Pod) -> io::Result<()> {
        let uid = checked(pod.metadata.uid.as_deref().unwrap_or_default())?;
        match self.driver {
            CgroupDriver::Systemd => return Ok(()),
            CgroupDriver::Cgroupfs => {}
        }
        let path = cgroupfs_path(uid, qos(pod));
        let limits = pod_limits(pod);
        match self.version {
            Version::V1 => self.ensure_v1(&path, limits),
            Version::Unified => self.ensure_unified(&path, limits),
        }
    }

    fn ensure_v1(&self, path: &Path, limits: PodLimits) -> io::Result<()> {
        let unlimited = |value: i64| if value > 0 { value } else { -1 };
        for controller in V1_CONTROLLERS {
            let hierarchy = self.root.join(controller);
            if !hierarchy.exists() {
                continue;
            }
            let dir = hierarchy.join(path);
            fs::create_dir_all(&dir)?;
            match *controller {
                "cpu" => {
                    set(&dir, "cpu.shares", &limits.shares.to_string())?;
                    set(&dir, "cpu.cfs_period_us", &CPU_PERIOD.to_string())?;
                    set(
                        &dir,
                        "cpu.cfs_quota_us",
                        &unlimited(limits.quota).to_string(),
                    )?;
                    share_tiers(
                        &hierarchy,
                        "cpu.shares",
                        MIN_SHARES,
                        all_shares(),
                        MAX_SHARES,
                    )?;
                }
                "memory" => {
                    set(
                        &dir,
                        "memory.limit_in_bytes",
                        &unlimited(limits.memory).to_string(),
                    )?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn ensure_unified(&self, path: &Path, limits: PodLimits) -> io::Result<()> {
        let text = |value: i64| {
            if value > 0 {
                value.to_string()
            } else {
                "max".into()
            }
        };
        let mut dir = self.root.clone();
        for part in path.components() {
            hand_down(&dir)?;
            dir.push(part);
            match fs::create_dir(&dir) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
                _ => {}
            }
        }
        hand_down(&dir)?;
        set(&dir, "cpu.weight", &weight(limits.shares).to_string())?;
        share_tiers(&self.root, "cpu.weight", 1, weight(all_shares()), 10_000)?;
        set(
            &dir,
            "cpu.max",
            &format!("{} {CPU_PERIOD}", text(limits.quota)),
        )?;
        set(&dir, "memory.max", &text(limits.memory))
    }

    /// Removes the Pod's cgroup with what the runtime left in it; idempotent. Fails while a
    /// process is in it.
    pub fn remove(&self, uid: &str, qos: Qos) -> io::Result<()> {
        let uid = checked(uid)?;
        let path = match self.driver {
            CgroupDriver::Cgroupfs => cgroupfs_path(uid, qos),
            CgroupDriver::Systemd => slice_path(uid, qos),
        };
        match self.version {
            Version::Unified => remove_tree(&self.root.join(path)),
            Version::V1 => {
                // The runtime made the same path in every hierarchy, also in those not used here.
                for hierarchy in fs::read_dir(&self.root)? {
                    let hierarchy = hierarchy?;
                    if hierarchy.file_type()?.is_dir() {
                        remove_tree(&hierarchy.path().join(&path))?;
                    }
                }
                Ok(())
            }
        }
    }
}

/// A UID becomes a directory's name here.
fn checked(uid: &str) -> io::Result<&str> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    if !uid.is_empty() && uid.bytes().all(plain) {
        return Ok(uid);
    }
    let message = format!("the Pod's uid {uid:?} is malformed");
    Err(io::Error::new(io::ErrorKind::InvalidInput, message))
}

fn cgroupfs_path(uid: &str, qos: Qos) -> PathBuf {
    let mut path = PathBuf::from("kubepods");
    path.extend(qos.tier());
    path.push(format!("pod{uid}"));
    path
}

fn slice(uid: &str, qos: Qos) -> String {
    let tier = qos.tier().map(|t| format!("-{t}")).unwrap_or_default();
    // A dash in a slice's name stands for a level of the tree.
    format!("kubepods{tier}-pod{}.slice", uid.replace('-', "_"))
}

fn slice_path(uid: &str, qos: Qos) -> PathBuf {
    let mut path = PathBuf::from("kubepods.slice");
    path.extend(qos.tier().map(|t| format!("kubepods-{t}.slice")));
    path.push(slice(uid, qos));
    path
}

/// Lets the cgroups below this one have controllers. One that is missing in the kernel or not
/// given to us costs its limit, not the Pod.
fn hand_down(dir: &Path) -> io::Result<()> {
    let there = fs::read_to_string(dir.join("cgroup.controllers"))?;
    for name in there
        .split_whitespace()
        .filter(|c| UNIFIED_CONTROLLERS.contains(c))
    {
        if let Err(error) = set(dir, "cgroup.subtree_control", &format!("+{name}")) {
            tracing::debug!(controller = name, dir = %dir.display(), %error, "not handed down");
        }
    }
    Ok(())
}

/// Divides the CPU between the tiers, which the kernel weighs before the Pods in them: all Pods
/// together as many as there are CPUs, Burstable ones what they asked for, BestEffort the rest.
fn share_tiers(cpu: &Path, file: &str, least: i64, all: i64, most: i64) -> io::Result<()> {
    let kubepods = cpu.join("kubepods");
    set(&kubepods, file, &all.to_string())?;
    set(&kubepods.join("besteffort"), file, &least.to_string())?;
    let burstable = kubepods.join("burstable");
    let Ok(pods) = fs::read_dir(&burstable) else {
        return Ok(());
    };
    let own = |dir: PathBuf| -> Option<i64> {
        fs::read_to_string(dir.join(file)).ok()?.trim().parse().ok()
    };
    let asked: i64 = pods.flatten().filter_map(|e| own(e.path())).sum();
    set(&burstable, file, &asked.clamp(least, most).to_string())
}

/// The shares of all the device's CPUs.
fn all_shares() -> i64 {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    shares(i64::try_from(cpus).unwrap_or(1).saturating_mul(1000))
}

/// Writes a control file if it says something else; a controller that is not there has no files.
fn set(dir: &Path, file: &str, value: &str) -> io::Result<()> {
    let path = dir.join(file);
    match fs::read_to_string(&path) {
        Ok(old) if old.trim() == value => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => fs::write(path, value),
    }
}

/// Removes a cgroup and those below it; their files go with them.
fn remove_tree(dir: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::testing::{environment, pod};
    use serde_json::{Value, json};

    fn the_pod(containers: Value) -> Pod {
        pod(json!({"metadata": {"uid": "a-b"}, "spec": {"containers": containers}}))
    }

    fn resources(requests: Value, limits: Value) -> Value {
        json!({"name": "c", "resources": {"requests": requests, "limits": limits}})
    }

    #[test]
    fn quality_of_service() {
        let both = json!({"cpu": "1", "memory": "1Mi"});
        let full = resources(both.clone(), both.clone());
        for (containers, want) in [
            (json!([{"name": "c"}]), Qos::BestEffort),
            (
                json!([resources(json!({"cpu": "0"}), json!({}))]),
                Qos::BestEffort,
            ),
            (
                json!([resources(json!({"ephemeral-storage": "1Gi"}), json!({}))]),
                Qos::BestEffort,
            ),
            (json!([full]), Qos::Guaranteed),
            (json!([resources(json!({}), both.clone())]), Qos::Guaranteed),
            (
                json!([resources(
                    json!({"cpu": "1000m", "memory": "1Mi"}),
                    both.clone()
                )]),
                Qos::Guaranteed,
            ),
            (
                json!([resources(json!({"cpu": "500m"}), both.clone())]),
                Qos::Burstable,
            ),
            (json!([resources(both.clone(), json!({}))]), Qos::Burstable),
            (
                json!([resources(json!({}), json!({"cpu": "1"}))]),
                Qos::Burstable,
            ),
            (json!([full, {"name": "d"}]), Qos::Burstable),
        ] {
            assert_eq!(qos(&the_pod(containers.clone())), want, "{containers}");
        }
        let mut with_init = the_pod(json!([full]));
        let bare: Container = serde_json::from_value(json!({"name": "i"})).unwrap();
        with_init.spec.as_mut().unwrap().init_containers = Some(vec![bare]);
        assert_eq!(qos(&with_init), Qos::Burstable);
    }

    #[test]
    fn what_a_container_is_held_to() {
        let row = |cpu_shares, cpu_quota, memory_limit, oom_score_adj| LinuxResources {
            cpu_shares,
            cpu_quota,
            cpu_period: 100_000,
            memory_limit,
            oom_score_adj,
        };
        for (container, want) in [
            (json!({"name": "c"}), row(2, 0, 0, 1000)),
            (
                resources(json!({"cpu": "250m"}), json!({"cpu": "500m"})),
                row(256, 50_000, 0, 999),
            ),
            (
                resources(json!({}), json!({"cpu": "5m"})),
                row(5, 1000, 0, 999),
            ),
            (
                resources(json!({"cpu": "1m"}), json!({})),
                row(2, 0, 0, 999),
            ),
            (
                resources(json!({"memory": "1G"}), json!({})),
                row(2, 0, 0, 750),
            ),
            (
                resources(json!({"memory": "4G"}), json!({})),
                row(2, 0, 0, 3),
            ),
            (
                resources(json!({}), json!({"cpu": "2", "memory": "64Mi"})),
                row(2048, 200_000, 67_108_864, -997),
            ),
        ] {
            let pod = the_pod(json!([container]));
            let c = &pod.spec.as_ref().unwrap().containers[0];
            assert_eq!(
                linux_resources(&pod, c, &environment()),
                want,
                "{container}"
            );
        }
        let mut critical = the_pod(json!([{"name": "c"}]));
        critical.spec.as_mut().unwrap().priority = Some(2_000_001_000);
        let c = critical.spec.as_ref().unwrap().containers[0].clone();
        assert_eq!(
            linux_resources(&critical, &c, &environment()).oom_score_adj,
            -997
        );
    }

    #[test]
    fn a_sidecar_goes_no_sooner_than_what_it_serves() {
        let mut pod = the_pod(json!([resources(json!({"memory": "1G"}), json!({}))]));
        let sidecar: Container =
            serde_json::from_value(json!({"name": "s", "restartPolicy": "Always"})).unwrap();
        pod.spec.as_mut().unwrap().init_containers = Some(vec![sidecar.clone()]);
        assert_eq!(
            linux_resources(&pod, &sidecar, &environment()).oom_score_adj,
            750
        );
    }

    #[test]
    fn the_pods_limits_are_sums() {
        let a = resources(
            json!({"cpu": "100m"}),
            json!({"cpu": "200m", "memory": "1Mi"}),
        );
        let b = resources(json!({"cpu": "300m"}), json!({"memory": "2Mi"}));
        let limits = pod_limits(&the_pod(json!([a, b])));
        assert_eq!(
            (limits.shares, limits.quota, limits.memory),
            (409, 0, 3 << 20)
        );
        let mut with_init = the_pod(json!([a]));
        let init: Container = serde_json::from_value(resources(
            json!({"cpu": "1"}),
            json!({"cpu": "2", "memory": "9Mi"}),
        ))
        .unwrap();
        with_init.spec.as_mut().unwrap().init_containers = Some(vec![init]);
        let limits = pod_limits(&with_init);
        assert_eq!(
            (limits.shares, limits.quota, limits.memory),
            (1024, 200_000, 9 << 20)
        );
    }

    #[test]
    fn names_of_both_drivers() {
        let full = json!({"cpu": "1", "memory": "1Mi"});
        let dir = tempfile::tempdir().unwrap();
        for (containers, fs, systemd) in [
            (
                json!([{"name": "c"}]),
                "/kubepods/besteffort/poda-b",
                "kubepods-besteffort-poda_b.slice",
            ),
            (
                json!([resources(json!({"cpu": "1"}), json!({}))]),
                "/kubepods/burstable/poda-b",
                "kubepods-burstable-poda_b.slice",
            ),
            (
                json!([resources(json!({}), full)]),
                "/kubepods/poda-b",
                "kubepods-poda_b.slice",
            ),
        ] {
            let pod = the_pod(containers);
            let of = |driver| Cgroups::at(driver, dir.path().into()).parent(&pod);
            assert_eq!(of(CgroupDriver::Cgroupfs), fs);
            assert_eq!(of(CgroupDriver::Systemd), systemd);
        }
    }

    fn file(dir: &Path, name: &str, text: &str) {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join(name), text).unwrap();
    }

    fn read(path: PathBuf) -> String {
        fs::read_to_string(path).unwrap()
    }

    /// A tree as a device with cgroup v2 shows it. The kernel fills a new cgroup with files by
    /// itself, so they are put there first.
    #[test]
    fn a_unified_tree_gets_its_controllers_and_limits() {
        let root = tempfile::tempdir().unwrap();
        let pod_dir = root.path().join("kubepods/poda-b");
        for dir in [
            root.path().to_owned(),
            root.path().join("kubepods"),
            pod_dir.clone(),
        ] {
            file(
                &dir,
                "cgroup.controllers",
                "cpuset cpu io memory hugetlb pids rdma misc\n",
            );
            file(&dir, "cgroup.subtree_control", "");
        }
        for (name, text) in [
            ("cpu.weight", "100"),
            ("cpu.max", "max 100000"),
            ("memory.max", "max"),
        ] {
            file(&pod_dir, name, text);
        }
        let cgroups = Cgroups::at(CgroupDriver::Cgroupfs, root.path().into());
        let pod = the_pod(json!([resources(
            json!({}),
            json!({"cpu": "1500m", "memory": "64Mi"})
        )]));
        cgroups.ensure(&pod).unwrap();
        assert_eq!(read(pod_dir.join("cpu.weight")), "59");
        assert_eq!(read(pod_dir.join("cpu.max")), "150000 100000");
        assert_eq!(read(pod_dir.join("memory.max")), "67108864");
        for dir in ["", "kubepods", "kubepods/poda-b"] {
            // Each controller is asked for by itself: the last write is what a plain file keeps.
            let asked = read(root.path().join(dir).join("cgroup.subtree_control"));
            assert_eq!(asked, "+pids", "{dir}");
        }
    }

    #[test]
    fn hierarchies_of_v1_get_their_limits_and_only_the_mounted_ones() {
        let root = tempfile::tempdir().unwrap();
        let cpu = root.path().join("cpu/kubepods/burstable/poda-b");
        let memory = root.path().join("memory/kubepods/burstable/poda-b");
        file(&cpu, "cpu.shares", "1024");
        file(&cpu, "cpu.cfs_period_us", "100000");
        file(&cpu, "cpu.cfs_quota_us", "-1");
        file(&memory, "memory.limit_in_bytes", "9223372036854771712");
        let cgroups = Cgroups::at(CgroupDriver::Cgroupfs, root.path().into());
        let pod = the_pod(json!([resources(
            json!({"cpu": "250m"}),
            json!({"memory": "64Mi"})
        )]));
        cgroups.ensure(&pod).unwrap();
        assert_eq!(read(cpu.join("cpu.shares")), "256");
        assert_eq!(read(cpu.join("cpu.cfs_quota_us")), "-1");
        assert_eq!(read(memory.join("memory.limit_in_bytes")), "67108864");
        assert!(!root.path().join("pids").exists());
    }

    #[test]
    fn tiers_share_the_cpu_by_what_their_pods_asked_for() {
        let root = tempfile::tempdir().unwrap();
        let kubepods = root.path().join("cpu/kubepods");
        for dir in [
            "",
            "burstable",
            "burstable/poda-b",
            "burstable/podother",
            "besteffort",
        ] {
            file(&kubepods.join(dir), "cpu.shares", "1024");
        }
        let cgroups = Cgroups::at(CgroupDriver::Cgroupfs, root.path().into());
        let pod = the_pod(json!([resources(json!({"cpu": "250m"}), json!({}))]));
        cgroups.ensure(&pod).unwrap();
        let shares = |dir: &str| read(kubepods.join(dir).join("cpu.shares"));
        assert_eq!(shares("burstable"), (256 + 1024).to_string());
        assert_eq!(shares("besteffort"), "2");
        assert_eq!(shares(""), all_shares().to_string());
        assert_eq!(shares("burstable/podother"), "1024");
    }

    /// On the device's own tree, whichever version it has.
    #[test]
    fn the_kernel_takes_the_limits() {
        assert!(
            nix::unistd::geteuid().is_root(),
            "cgroups are the kernel's: run this test as root, with /sys/fs/cgroup writable"
        );
        let uid = format!("test-{}", std::process::id());
        let container = resources(
            json!({"cpu": "100m"}),
            json!({"cpu": "500m", "memory": "64Mi"}),
        );
        let pod = pod(json!({"metadata": {"uid": uid}, "spec": {"containers": [container]}}));
        let cgroups = Cgroups::detect(None);
        cgroups.ensure(&pod).unwrap();
        cgroups.ensure(&pod).unwrap();
        let path = cgroupfs_path(&uid, Qos::Burstable);
        let (cpu, memory) = match cgroups.version {
            Version::V1 => ("cpu", "memory/"),
            Version::Unified => ("", ""),
        };
        let cpu = cgroups.root.join(cpu).join(&path);
        let memory = cgroups.root.join(memory).join(&path);
        let (quota, limit) = match cgroups.version {
            Version::V1 => ("cpu.cfs_quota_us", "memory.limit_in_bytes"),
            Version::Unified => ("cpu.max", "memory.max"),
        };
        let (quota, limit) = (read(cpu.join(quota)), read(memory.join(limit)));
        cgroups.remove(&uid, Qos::Burstable).unwrap();
        assert!(quota.starts_with("50000"), "{quota}");
        assert_eq!(limit.trim(), "67108864");
        assert!(!cpu.exists() && !memory.exists());
    }

    #[test]
    fn removal_takes_what_is_below_and_is_idempotent() {
        for (driver, path) in [
            (CgroupDriver::Cgroupfs, "kubepods/burstable/poda-b"),
            (
                CgroupDriver::Systemd,
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-poda_b.slice",
            ),
        ] {
            let root = tempfile::tempdir().unwrap();
            for hierarchy in ["cpu", "blkio"] {
                fs::create_dir_all(
                    root.path()
                        .join(hierarchy)
                        .join(path)
                        .join("container/inner"),
                )
                .unwrap();
            }
            let cgroups = Cgroups::at(driver, root.path().into());
            cgroups.remove("a-b", Qos::Burstable).unwrap();
            cgroups.remove("a-b", Qos::Burstable).unwrap();
            for hierarchy in ["cpu", "blkio"] {
                assert!(!root.path().join(hierarchy).join(path).exists(), "{path}");
            }
            assert!(cgroups.remove("../x", Qos::Burstable).is_err());
        }
    }
}
