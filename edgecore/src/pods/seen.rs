//! What a runtime was seen to hold of one Pod (pure types).
//!
//! Everything here was read back from the runtime, so it is as true after a restart of the agent
//! as before it.

use std::net::IpAddr;

/// A sandbox of the Pod.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SandboxSeen {
    pub id: String,
    pub attempt: u32,
    /// Nanoseconds since 1970.
    pub created_at: i64,
    pub ready: bool,
    pub host_network: bool,
    /// Empty on the host's network, and when the network is gone.
    pub ips: Vec<IpAddr>,
}

/// What a container is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Run {
    #[default]
    Created,
    Running,
    Exited,
    /// The runtime has lost it: neither running nor ended as far as it can tell.
    Unknown,
}

/// One instance of a container of the Pod.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ContainerSeen {
    pub id: String,
    pub name: String,
    /// How often a container of this name was started before: the restart count.
    pub attempt: u32,
    pub sandbox: String,
    pub run: Run,
    /// Nanoseconds since 1970, as the two after it; 0 when it has not happened.
    pub created_at: i64,
    pub started_at: i64,
    pub finished_at: i64,
    pub exit_code: i32,
    pub reason: String,
    /// The termination message, or why it could not run.
    pub message: String,
    pub image: String,
    pub image_id: String,
    /// Of the spec it was made from; see `convert::container_hash`.
    pub hash: String,
    /// As whom its first process runs, where the runtime tells.
    pub user: Option<UserSeen>,
}

/// As whom a process runs, with the groups of the image and of the Pod.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct UserSeen {
    pub uid: i64,
    pub gid: i64,
    pub supplemental_groups: Vec<i64>,
}

/// All of one Pod, newest first.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Observed {
    pub sandboxes: Vec<SandboxSeen>,
    pub containers: Vec<ContainerSeen>,
    /// Before container IDs in a Pod's status: `containerd` in `containerd://ID`.
    pub runtime_name: String,
}

impl Observed {
    /// Puts the newest first, whatever order the runtime answered in.
    pub fn sort(&mut self) {
        self.sandboxes
            .sort_by_key(|s| std::cmp::Reverse((s.attempt, s.created_at)));
        self.containers
            .sort_by_key(|c| std::cmp::Reverse((c.attempt, c.created_at)));
    }

    /// The sandbox that containers may be started in: the newest, if it is up and has its network.
    pub fn sandbox(&self) -> Option<&SandboxSeen> {
        let newest = self.sandboxes.first()?;
        (newest.ready && (newest.host_network || !newest.ips.is_empty())).then_some(newest)
    }

    /// All instances of a container, newest first.
    pub fn instances<'a>(
        &'a self,
        name: &'a str,
    ) -> impl Iterator<Item = &'a ContainerSeen> + use<'a> {
        self.containers.iter().filter(move |c| c.name == name)
    }

    pub fn newest(&self, name: &str) -> Option<&ContainerSeen> {
        self.containers.iter().find(|c| c.name == name)
    }

    /// The newest instance in this sandbox.
    pub fn within<'a>(
        &'a self,
        sandbox: Option<&SandboxSeen>,
        name: &str,
    ) -> Option<&'a ContainerSeen> {
        let sandbox = sandbox?;
        let mut all = self.containers.iter();
        all.find(|c| c.name == name && c.sandbox == sandbox.id)
    }

    pub fn any_running(&self) -> bool {
        self.containers.iter().any(ContainerSeen::may_run)
    }
}

impl ContainerSeen {
    /// Whether a process of it may exist.
    pub fn may_run(&self) -> bool {
        matches!(self.run, Run::Running | Run::Unknown)
    }
}
