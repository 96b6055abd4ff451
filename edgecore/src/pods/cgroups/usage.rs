//! What the processes of a cgroup have used, on cgroup v1 and v2.

use std::fs;
use std::path::{Path, PathBuf};

use super::{CgroupDriver, Cgroups, Qos, Version, cgroupfs_path, checked, slice_path};

/// The use of a cgroup with all below it; a figure that the kernel does not give is `None`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Usage {
    /// From the tree's root, with a slash before it.
    pub path: String,
    /// Of all processors together, since the cgroup was made.
    pub cpu_nanos: Option<u64>,
    pub memory_bytes: Option<u64>,
    /// What the kernel can take back without writing it anywhere.
    pub inactive_file_bytes: Option<u64>,
    pub rss_bytes: Option<u64>,
    pub page_faults: Option<u64>,
    pub major_page_faults: Option<u64>,
    pub processes: Option<u64>,
}

impl Usage {
    /// As Kubernetes counts it: what is used less what could be taken back at once.
    pub fn working_set_bytes(&self) -> Option<u64> {
        let inactive = self.inactive_file_bytes.unwrap_or(0);
        self.memory_bytes.map(|used| used.saturating_sub(inactive))
    }
}

impl Cgroups {
    /// What a Pod uses; all figures are `None` when its cgroup is gone.
    pub fn pod_usage(&self, uid: &str, qos: Qos) -> Usage {
        self.pod_path(uid, qos)
            .map(|path| self.usage(&path))
            .unwrap_or_default()
    }

    /// What all Pods use together.
    pub fn all_pods_usage(&self) -> Usage {
        self.usage(Path::new(match self.driver {
            CgroupDriver::Cgroupfs => "kubepods",
            CgroupDriver::Systemd => "kubepods.slice",
        }))
    }

    /// A process of the Pod, to look at its network by. Every cgroup below the Pod's is of one of
    /// its containers, and they share the network.
    pub fn a_process(&self, uid: &str, qos: Qos) -> Option<u32> {
        let dir = self.hierarchy("memory").join(self.pod_path(uid, qos)?);
        let inside = fs::read_dir(dir).ok()?.flatten();
        let mut processes = inside.filter_map(|entry| {
            let list = fs::read_to_string(entry.path().join("cgroup.procs")).ok()?;
            list.lines().next()?.parse().ok()
        });
        processes.next()
    }

    fn pod_path(&self, uid: &str, qos: Qos) -> Option<PathBuf> {
        let uid = checked(uid).ok()?;
        Some(match self.driver {
            CgroupDriver::Cgroupfs => cgroupfs_path(uid, qos),
            CgroupDriver::Systemd => slice_path(uid, qos),
        })
    }

    fn hierarchy(&self, controller: &str) -> PathBuf {
        match self.version {
            Version::V1 => self.root.join(controller),
            Version::Unified => self.root.clone(),
        }
    }

    fn usage(&self, path: &Path) -> Usage {
        let text = |controller: &str, file: &str| {
            let file = self.hierarchy(controller).join(path).join(file);
            fs::read_to_string(file).unwrap_or_default()
        };
        let number = |controller, file| text(controller, file).trim().parse().ok();
        let usage = Usage {
            path: format!("/{}", path.display()),
            processes: number("pids", "pids.current"),
            ..Usage::default()
        };
        let memory = text("memory", "memory.stat");
        match self.version {
            Version::V1 => Usage {
                cpu_nanos: number("cpuacct", "cpuacct.usage"),
                memory_bytes: number("memory", "memory.usage_in_bytes"),
                inactive_file_bytes: field(&memory, "total_inactive_file"),
                rss_bytes: field(&memory, "total_rss"),
                page_faults: field(&memory, "total_pgfault"),
                major_page_faults: field(&memory, "total_pgmajfault"),
                ..usage
            },
            Version::Unified => Usage {
                cpu_nanos: field(&text("cpu", "cpu.stat"), "usage_usec")
                    .map(|micros| micros.saturating_mul(1000)),
                memory_bytes: number("memory", "memory.current"),
                inactive_file_bytes: field(&memory, "inactive_file"),
                rss_bytes: field(&memory, "anon"),
                page_faults: field(&memory, "pgfault"),
                major_page_faults: field(&memory, "pgmajfault"),
                ..usage
            },
        }
    }
}

/// A value of a file with a name and a number on each line.
pub fn field(text: &str, name: &str) -> Option<u64> {
    let mut pairs = text.lines().filter_map(|line| line.split_once(' '));
    let (_, value) = pairs.find(|(key, _)| *key == name)?;
    value.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    #[test]
    fn both_generations_tell_the_same() {
        let old = tree(&[
            ("cpuacct/kubepods/podu/cpuacct.usage", "5000\n"),
            ("memory/kubepods/podu/memory.usage_in_bytes", "900\n"),
            (
                "memory/kubepods/podu/memory.stat",
                "inactive_file 1\ntotal_inactive_file 200\ntotal_rss 300\ntotal_pgfault 7\ntotal_pgmajfault 2\n",
            ),
            ("pids/kubepods/podu/pids.current", "3\n"),
            ("memory/kubepods/podu/container/cgroup.procs", "41\n42\n"),
        ]);
        let pod = "kubepods.slice/kubepods-podu.slice";
        let new = tree(&[
            ("cgroup.controllers", "cpu memory"),
            (&format!("{pod}/cpu.stat"), "usage_usec 5\nuser_usec 4\n"),
            (&format!("{pod}/memory.current"), "900\n"),
            (
                &format!("{pod}/memory.stat"),
                "anon 300\ninactive_file 200\npgfault 7\npgmajfault 2\n",
            ),
            (&format!("{pod}/pids.current"), "3\n"),
            (&format!("{pod}/container/cgroup.procs"), "41\n"),
        ]);
        let old = Cgroups::at(CgroupDriver::Cgroupfs, old.path().into());
        let new = Cgroups::at(CgroupDriver::Systemd, new.path().into());
        for (cgroups, path) in [(old, "/kubepods/podu"), (new, &*format!("/{pod}"))] {
            let usage = cgroups.pod_usage("u", Qos::Guaranteed);
            assert_eq!(usage.working_set_bytes(), Some(700));
            let want = Usage {
                path: path.into(),
                cpu_nanos: Some(5000),
                memory_bytes: Some(900),
                inactive_file_bytes: Some(200),
                rss_bytes: Some(300),
                page_faults: Some(7),
                major_page_faults: Some(2),
                processes: Some(3),
            };
            assert_eq!(usage, want);
            assert_eq!(cgroups.a_process("u", Qos::Guaranteed), Some(41));
            let gone = cgroups.pod_usage("x", Qos::BestEffort);
            assert_eq!((gone.cpu_nanos, gone.working_set_bytes()), (None, None));
            assert_eq!(cgroups.pod_usage("../u", Qos::Guaranteed), Usage::default());
        }
    }
}
