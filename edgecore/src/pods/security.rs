//! The security context that a container really gets (pure).

use k8s_openapi::api::core::v1::{Container, Pod};

use super::env::ConfigError;

/// The user that the image names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageUser {
    /// The image names none: root.
    Unset,
    Uid(i64),
    /// A name, which only the image's own /etc/passwd can resolve.
    Name(String),
}

/// A seccomp or AppArmor profile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Profile {
    RuntimeDefault,
    Unconfined,
    /// For seccomp a path below the seccomp root, for AppArmor a loaded profile's name.
    Localhost(String),
}

/// SELinux labels, empty where unset.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SelinuxLabels {
    pub user: String,
    pub role: String,
    pub kind: String,
    pub level: String,
}

/// What the container's process runs as and may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecurityPlan {
    pub run_as_user: Option<i64>,
    /// Set only where `run_as_user` is not: the image's named user.
    pub run_as_username: Option<String>,
    pub run_as_group: Option<i64>,
    /// Includes the Pod's fsGroup.
    pub supplemental_groups: Vec<i64>,
    /// `supplementalGroupsPolicy: Strict`.
    pub strict_groups: bool,
    pub privileged: bool,
    pub add_capabilities: Vec<String>,
    pub drop_capabilities: Vec<String>,
    pub readonly_rootfs: bool,
    pub no_new_privs: bool,
    pub selinux: Option<SelinuxLabels>,
    pub seccomp: Profile,
    /// `None` where nothing is said: the runtime's own default.
    pub apparmor: Option<Profile>,
    pub masked_paths: Vec<String>,
    pub readonly_paths: Vec<String>,
}

/// Whose namespace a container shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Namespace {
    Pod,
    Container,
    Node,
}

/// What the Pod's sandbox gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxSecurity {
    pub run_as_user: Option<i64>,
    pub run_as_group: Option<i64>,
    pub supplemental_groups: Vec<i64>,
    pub strict_groups: bool,
    /// Any container is privileged.
    pub privileged: bool,
    pub selinux: Option<SelinuxLabels>,
    pub network: Namespace,
    pub pid: Namespace,
    pub ipc: Namespace,
    pub sysctls: Vec<(String, String)>,
}

/// The container's effective security context: its own over the Pod's.
pub fn effective(
    _pod: &Pod,
    _container: &Container,
    _image_user: ImageUser,
) -> Result<SecurityPlan, ConfigError> {
    Ok(SecurityPlan {
        run_as_user: None,
        run_as_username: None,
        run_as_group: None,
        supplemental_groups: Vec::new(),
        strict_groups: false,
        privileged: false,
        add_capabilities: Vec::new(),
        drop_capabilities: Vec::new(),
        readonly_rootfs: false,
        no_new_privs: false,
        selinux: None,
        seccomp: Profile::Unconfined,
        apparmor: None,
        masked_paths: Vec::new(),
        readonly_paths: Vec::new(),
    })
}

/// The sandbox's security context.
pub fn sandbox(_pod: &Pod) -> SandboxSecurity {
    SandboxSecurity {
        run_as_user: None,
        run_as_group: None,
        supplemental_groups: Vec::new(),
        strict_groups: false,
        privileged: false,
        selinux: None,
        network: Namespace::Pod,
        pid: Namespace::Container,
        ipc: Namespace::Pod,
        sysctls: Vec::new(),
    }
}

/// The message of a Pod that must be refused with reason `SysctlForbidden`, if it asks for a
/// sysctl that is not namespaced and safe.
pub fn forbidden_sysctl(_pod: &Pod) -> Option<String> {
    None
}
