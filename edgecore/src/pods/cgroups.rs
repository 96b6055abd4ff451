//! The cgroups above a Pod's containers.
//!
//! [`Cgroups`] is the adapter that makes and removes the Pod's own cgroup, on cgroup v1 and v2;
//! what it is held to comes from `resources`, which is pure. With the systemd driver systemd makes
//! the slices that a sandbox names, so only the removal of what is left is done here.
//!
//! ```text
//! cgroupfs  /kubepods/{burstable/,besteffort/,}podUID/CONTAINER
//! systemd   kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podUID_WITH_UNDERSCORES.slice
//! ```

mod resources;
mod usage;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::Pod;

use resources::{CPU_PERIOD, MAX_SHARES, MIN_SHARES, PodLimits, pod_limits, shares, weight};
pub use resources::{LinuxResources, Qos, limit_of, limited, linux_resources, qos, requested};
pub use usage::{Usage, field};

/// Who makes cgroups: the runtime and the agent must agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CgroupDriver {
    Cgroupfs,
    Systemd,
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
    use super::resources::testing::{resources, the_pod};
    use super::*;
    use crate::pods::testing::pod;
    use serde_json::json;

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
