//! The security context that a container really gets (pure): its own over its Pod's.
//!
//! Takes the Pod, the container and the user that the image names; gives what CRI's security
//! context wants, or the message of a container that must not start.

use k8s_openapi::api::core::v1::{
    AppArmorProfile, Container, Pod, PodSecurityContext, SELinuxOptions, SeccompProfile,
    SecurityContext,
};

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
    /// `supplementalGroupsPolicy: Strict`: the image's own /etc/group adds none.
    pub strict_groups: bool,
    pub privileged: bool,
    /// Names without `CAP_`.
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

/// What the Pod's sandbox gets. Its seccomp profile is always the runtime's default.
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

/// What of /proc and /sys an unprivileged container must not see, as runtimes hide it by default.
const MASKED_PATHS: &[&str] = &[
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
const READONLY_PATHS: &[&str] = &[
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// Sysctls that are the Pod's own and can harm nobody else.
const SAFE_SYSCTLS: &[&str] = &[
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
];

/// The annotation that named a container's AppArmor profile before Kubernetes 1.30.
const APPARMOR_ANNOTATION: &str = "container.apparmor.security.beta.kubernetes.io/";

fn of_pod(pod: &Pod) -> Option<&PodSecurityContext> {
    pod.spec.as_ref()?.security_context.as_ref()
}

/// The container's effective security context: its own over the Pod's.
pub fn effective(
    pod: &Pod,
    container: &Container,
    image_user: ImageUser,
) -> Result<SecurityPlan, ConfigError> {
    let outer = of_pod(pod);
    let own = container.security_context.as_ref();
    let non_root = own
        .and_then(|c| c.run_as_non_root)
        .or(outer.and_then(|c| c.run_as_non_root));
    let asked_user = own
        .and_then(|c| c.run_as_user)
        .or(outer.and_then(|c| c.run_as_user));
    if non_root == Some(true) {
        refuse_root(container, asked_user, &image_user)?;
    }
    let (image_uid, image_name) = match image_user {
        ImageUser::Unset => (None, None),
        ImageUser::Uid(uid) => (Some(uid), None),
        ImageUser::Name(name) => (None, Some(name)),
    };
    let privileged = own.and_then(|c| c.privileged) == Some(true);
    let unmasked = privileged || own.and_then(|c| c.proc_mount.as_deref()) == Some("Unmasked");
    let paths = |list: &[&str]| {
        let shown = list.iter().filter(|_| !unmasked);
        shown.map(|p| (*p).to_owned()).collect()
    };
    Ok(SecurityPlan {
        run_as_user: asked_user.or(image_uid),
        run_as_username: image_name.filter(|_| asked_user.is_none()),
        run_as_group: own
            .and_then(|c| c.run_as_group)
            .or(outer.and_then(|c| c.run_as_group)),
        supplemental_groups: groups(outer),
        strict_groups: strict(outer),
        privileged,
        add_capabilities: capabilities(own, |c| c.add.as_deref()),
        drop_capabilities: capabilities(own, |c| c.drop.as_deref()),
        readonly_rootfs: own.and_then(|c| c.read_only_root_filesystem) == Some(true),
        no_new_privs: no_new_privs(own),
        selinux: own
            .and_then(|c| c.se_linux_options.as_ref())
            .or(outer.and_then(|c| c.se_linux_options.as_ref()))
            .map(selinux),
        seccomp: seccomp(pod, own)?,
        apparmor: apparmor(pod, container)?,
        masked_paths: paths(MASKED_PATHS),
        readonly_paths: paths(READONLY_PATHS),
    })
}

/// `runAsNonRoot`: only a number that is not 0 proves it.
fn refuse_root(
    container: &Container,
    asked: Option<i64>,
    image: &ImageUser,
) -> Result<(), ConfigError> {
    let name = &container.name;
    let message = match (asked, image) {
        (Some(0), _) => {
            format!("container's runAsUser breaks non-root policy (container: {name})")
        }
        (Some(_), _) => return Ok(()),
        (None, ImageUser::Uid(0) | ImageUser::Unset) => {
            format!("container has runAsNonRoot and image will run as root (container: {name})")
        }
        (None, ImageUser::Uid(_)) => return Ok(()),
        (None, ImageUser::Name(user)) => format!(
            "container has runAsNonRoot and image has non-numeric user ({user}), cannot verify \
             user is non-root (container: {name})"
        ),
    };
    Err(ConfigError::Missing { message })
}

fn groups(outer: Option<&PodSecurityContext>) -> Vec<i64> {
    let supplemental = outer.and_then(|c| c.supplemental_groups.as_ref());
    let fs_group = outer.and_then(|c| c.fs_group);
    supplemental
        .into_iter()
        .flatten()
        .copied()
        .chain(fs_group)
        .collect()
}

fn strict(outer: Option<&PodSecurityContext>) -> bool {
    outer.and_then(|c| c.supplemental_groups_policy.as_deref()) == Some("Strict")
}

fn capabilities(
    own: Option<&SecurityContext>,
    which: fn(&k8s_openapi::api::core::v1::Capabilities) -> Option<&[String]>,
) -> Vec<String> {
    let list = own.and_then(|c| c.capabilities.as_ref()).and_then(which);
    let bare = |name: &String| {
        let upper = name.to_uppercase();
        upper.strip_prefix("CAP_").unwrap_or(&upper).to_owned()
    };
    list.unwrap_or_default().iter().map(bare).collect()
}

/// Set by `allowPrivilegeEscalation: false`, which privileged containers and those with
/// CAP_SYS_ADMIN cannot have (the API refuses it).
fn no_new_privs(own: Option<&SecurityContext>) -> bool {
    own.and_then(|c| c.allow_privilege_escalation) == Some(false)
}

fn selinux(options: &SELinuxOptions) -> SelinuxLabels {
    let text = |t: &Option<String>| t.clone().unwrap_or_default();
    SelinuxLabels {
        user: text(&options.user),
        role: text(&options.role),
        kind: text(&options.type_),
        level: text(&options.level),
    }
}

fn profile(kind: &str, localhost: Option<&String>, what: &str) -> Result<Profile, ConfigError> {
    let invalid = |why: String| ConfigError::Invalid {
        message: format!("{what} profile: {why}"),
    };
    match (kind, localhost) {
        ("RuntimeDefault", _) => Ok(Profile::RuntimeDefault),
        ("Unconfined", _) => Ok(Profile::Unconfined),
        ("Localhost", Some(name)) => {
            let leaves = name.starts_with('/') || name.split('/').any(|p| p == "..");
            if name.is_empty() || (what == "seccomp" && leaves) {
                return Err(invalid(format!(
                    "{name:?} is not a path below the profiles' directory"
                )));
            }
            Ok(Profile::Localhost(name.clone()))
        }
        ("Localhost", None) => Err(invalid("localhostProfile must name one".into())),
        (other, _) => Err(invalid(format!("the type {other:?} is unknown"))),
    }
}

fn seccomp(pod: &Pod, own: Option<&SecurityContext>) -> Result<Profile, ConfigError> {
    let own = own.and_then(|c| c.seccomp_profile.as_ref());
    let asked: Option<&SeccompProfile> =
        own.or_else(|| of_pod(pod).and_then(|c| c.seccomp_profile.as_ref()));
    asked.map_or(Ok(Profile::Unconfined), |p| {
        profile(&p.type_, p.localhost_profile.as_ref(), "seccomp")
    })
}

fn apparmor(pod: &Pod, container: &Container) -> Result<Option<Profile>, ConfigError> {
    let own = container.security_context.as_ref();
    let own = own.and_then(|c| c.app_armor_profile.as_ref());
    let asked: Option<&AppArmorProfile> =
        own.or_else(|| of_pod(pod).and_then(|c| c.app_armor_profile.as_ref()));
    if let Some(p) = asked {
        return profile(&p.type_, p.localhost_profile.as_ref(), "AppArmor").map(Some);
    }
    let annotations = pod.metadata.annotations.as_ref();
    let key = format!("{APPARMOR_ANNOTATION}{}", container.name);
    match annotations.and_then(|a| a.get(&key)).map(String::as_str) {
        None | Some("") => Ok(None),
        Some("runtime/default") => Ok(Some(Profile::RuntimeDefault)),
        Some("unconfined") => Ok(Some(Profile::Unconfined)),
        Some(other) => match other.strip_prefix("localhost/") {
            Some(name) if !name.is_empty() => Ok(Some(Profile::Localhost(name.to_owned()))),
            _ => Err(ConfigError::Invalid {
                message: format!("AppArmor profile: the annotation {key} says {other:?}"),
            }),
        },
    }
}

/// The sandbox's security context.
pub fn sandbox(pod: &Pod) -> SandboxSecurity {
    let spec = pod.spec.as_ref();
    let outer = of_pod(pod);
    let init = spec.iter().flat_map(|s| s.init_containers.iter().flatten());
    let regular = spec.iter().flat_map(|s| s.containers.iter()).chain(init);
    let ephemeral = spec
        .iter()
        .flat_map(|s| s.ephemeral_containers.iter().flatten());
    // A runtime takes a privileged container only where the sandbox is said to be, as it is when
    // the container is made: an ephemeral one may come to a sandbox that was made without.
    let mut all = regular
        .map(|c| &c.security_context)
        .chain(ephemeral.map(|e| &e.security_context));
    let privileged = all.any(|own| own.as_ref().and_then(|c| c.privileged) == Some(true));
    let flag = |f: fn(&k8s_openapi::api::core::v1::PodSpec) -> Option<bool>| {
        spec.and_then(f) == Some(true)
    };
    let sysctls = outer.and_then(|c| c.sysctls.as_ref()).into_iter().flatten();
    SandboxSecurity {
        run_as_user: outer.and_then(|c| c.run_as_user),
        run_as_group: outer.and_then(|c| c.run_as_group),
        supplemental_groups: groups(outer),
        strict_groups: strict(outer),
        privileged,
        selinux: outer.and_then(|c| c.se_linux_options.as_ref()).map(selinux),
        network: if flag(|s| s.host_network) {
            Namespace::Node
        } else {
            Namespace::Pod
        },
        pid: if flag(|s| s.host_pid) {
            Namespace::Node
        } else if flag(|s| s.share_process_namespace) {
            Namespace::Pod
        } else {
            Namespace::Container
        },
        ipc: if flag(|s| s.host_ipc) {
            Namespace::Node
        } else {
            Namespace::Pod
        },
        sysctls: sysctls
            .map(|s| (dotted(&s.name), s.value.clone()))
            .collect(),
    }
}

/// sysctl(8) takes slashes as separators too, when the first separator is one.
fn dotted(name: &str) -> String {
    match name.find(['.', '/']) {
        Some(at) if name.as_bytes()[at] == b'/' => {
            let swap = |c| match c {
                '/' => '.',
                '.' => '/',
                c => c,
            };
            name.chars().map(swap).collect()
        }
        Some(_) | None => name.to_owned(),
    }
}

/// The message of a Pod that must be refused with reason `SysctlForbidden`, if it asks for a
/// sysctl that is not the Pod's own and safe.
pub fn forbidden_sysctl(pod: &Pod) -> Option<String> {
    let asked = sandbox(pod);
    let unsafe_one = asked
        .sysctls
        .iter()
        .find(|(name, _)| !SAFE_SYSCTLS.contains(&name.as_str()));
    if let Some((name, _)) = unsafe_one {
        return Some(format!("forbidden sysctl: {name:?} not allowlisted"));
    }
    let shared = asked.sysctls.iter().find(|(name, _)| {
        let net = name.starts_with("net.");
        (net && asked.network == Namespace::Node) || (!net && asked.ipc == Namespace::Node)
    });
    shared.map(|(name, _)| {
        format!("forbidden sysctl: {name:?} not allowed with host net or host ipc enabled")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::testing::pod;
    use serde_json::{Value, json};

    fn plan(outer: Value, own: Value, image: ImageUser) -> Result<SecurityPlan, ConfigError> {
        let pod = pod(json!({
            "metadata": {"annotations": {
                "container.apparmor.security.beta.kubernetes.io/old": "localhost/mine"}},
            "spec": {"securityContext": outer,
                "containers": [{"name": "c", "securityContext": own}]}
        }));
        let container = pod.spec.as_ref().unwrap().containers[0].clone();
        effective(&pod, &container, image)
    }

    #[test]
    fn the_containers_own_word_is_over_the_pods() {
        let outer = json!({"runAsUser": 1, "runAsGroup": 2, "fsGroup": 9,
            "supplementalGroups": [7, 8], "supplementalGroupsPolicy": "Strict",
            "seLinuxOptions": {"level": "s0"}, "seccompProfile": {"type": "RuntimeDefault"}});
        let inherited = plan(outer.clone(), json!({}), ImageUser::Uid(5)).unwrap();
        assert_eq!(
            (inherited.run_as_user, inherited.run_as_group),
            (Some(1), Some(2))
        );
        assert_eq!(inherited.supplemental_groups, [7, 8, 9]);
        assert!(inherited.strict_groups);
        assert_eq!(inherited.selinux.as_ref().unwrap().level, "s0");
        assert_eq!(inherited.seccomp, Profile::RuntimeDefault);
        let own = json!({"runAsUser": 0, "runAsGroup": 0, "readOnlyRootFilesystem": true,
            "allowPrivilegeEscalation": false, "seLinuxOptions": {"type": "t"},
            "seccompProfile": {"type": "Localhost", "localhostProfile": "p/x.json"},
            "capabilities": {"add": ["NET_ADMIN", "cap_sys_time"], "drop": ["ALL"]}});
        let got = plan(outer, own, ImageUser::Uid(5)).unwrap();
        assert_eq!((got.run_as_user, got.run_as_group), (Some(0), Some(0)));
        assert_eq!(got.add_capabilities, ["NET_ADMIN", "SYS_TIME"]);
        assert_eq!(got.drop_capabilities, ["ALL"]);
        assert!(got.readonly_rootfs && got.no_new_privs && !got.privileged);
        assert_eq!(got.selinux.unwrap().kind, "t");
        assert_eq!(got.seccomp, Profile::Localhost("p/x.json".into()));
        assert!(got.masked_paths.contains(&"/proc/kcore".into()));
        assert!(got.readonly_paths.contains(&"/proc/sys".into()));
    }

    #[test]
    fn the_images_user_counts_where_none_is_asked() {
        for (image, user, name) in [
            (ImageUser::Unset, None, None),
            (ImageUser::Uid(7), Some(7), None),
            (ImageUser::Name("www".into()), None, Some("www")),
        ] {
            let got = plan(json!({}), json!({}), image).unwrap();
            assert_eq!(
                (got.run_as_user, got.run_as_username.as_deref()),
                (user, name)
            );
        }
        let asked = plan(
            json!({"runAsUser": 3}),
            json!({}),
            ImageUser::Name("www".into()),
        )
        .unwrap();
        assert_eq!((asked.run_as_user, asked.run_as_username), (Some(3), None));
    }

    #[test]
    fn root_is_refused_where_it_must_not_be() {
        let non_root = json!({"runAsNonRoot": true});
        for (own, image, problem) in [
            (json!({}), ImageUser::Unset, Some("image will run as root")),
            (json!({}), ImageUser::Uid(0), Some("image will run as root")),
            (json!({}), ImageUser::Uid(1), None),
            (
                json!({}),
                ImageUser::Name("www".into()),
                Some("cannot verify user is non-root"),
            ),
            (json!({"runAsUser": 5}), ImageUser::Name("www".into()), None),
            (
                json!({"runAsUser": 0}),
                ImageUser::Uid(1),
                Some("breaks non-root policy"),
            ),
            (json!({"runAsNonRoot": false}), ImageUser::Unset, None),
        ] {
            let got = plan(non_root.clone(), own.clone(), image.clone()).err();
            match problem {
                None => assert_eq!(got, None, "{own} {image:?}"),
                Some(p) => {
                    let got = got.unwrap();
                    assert!(got.to_string().contains(p), "{got}");
                    assert!(matches!(got, ConfigError::Missing { .. }));
                }
            }
        }
    }

    #[test]
    fn a_privileged_container_sees_everything() {
        let got = plan(json!({}), json!({"privileged": true}), ImageUser::Unset).unwrap();
        assert!(got.privileged && got.masked_paths.is_empty() && got.readonly_paths.is_empty());
        let got = plan(
            json!({}),
            json!({"procMount": "Unmasked"}),
            ImageUser::Unset,
        )
        .unwrap();
        assert!(!got.privileged && got.masked_paths.is_empty());
        assert_eq!(got.seccomp, Profile::Unconfined);
        assert_eq!(got.apparmor, None);
    }

    #[test]
    fn profiles_that_cannot_be_are_refused() {
        for own in [
            json!({"seccompProfile": {"type": "Localhost", "localhostProfile": "../x"}}),
            json!({"seccompProfile": {"type": "Localhost", "localhostProfile": "/x"}}),
            json!({"seccompProfile": {"type": "Localhost"}}),
            json!({"seccompProfile": {"type": "Odd"}}),
            json!({"appArmorProfile": {"type": "Localhost"}}),
        ] {
            assert!(
                plan(json!({}), own.clone(), ImageUser::Unset).is_err(),
                "{own}"
            );
        }
    }

    #[test]
    fn apparmor_by_field_and_by_annotation() {
        let own = json!({"appArmorProfile": {"type": "Localhost", "localhostProfile": "x"}});
        let got = plan(json!({}), own, ImageUser::Unset).unwrap();
        assert_eq!(got.apparmor, Some(Profile::Localhost("x".into())));
        let key = "container.apparmor.security.beta.kubernetes.io/c";
        for (said, want) in [
            ("runtime/default", Some(Profile::RuntimeDefault)),
            ("unconfined", Some(Profile::Unconfined)),
            ("localhost/mine", Some(Profile::Localhost("mine".into()))),
        ] {
            let pod = pod(json!({"metadata": {"annotations": {key: said}},
                "spec": {"containers": [{"name": "c"}]}}));
            let container = &pod.spec.as_ref().unwrap().containers[0];
            let got = effective(&pod, container, ImageUser::Unset).unwrap();
            assert_eq!(got.apparmor, want);
        }
    }

    #[test]
    fn the_sandbox_shares_what_the_pod_says() {
        for (spec, network, pid, ipc) in [
            (
                json!({}),
                Namespace::Pod,
                Namespace::Container,
                Namespace::Pod,
            ),
            (
                json!({"hostNetwork": true, "hostPID": true, "hostIPC": true}),
                Namespace::Node,
                Namespace::Node,
                Namespace::Node,
            ),
            (
                json!({"shareProcessNamespace": true}),
                Namespace::Pod,
                Namespace::Pod,
                Namespace::Pod,
            ),
        ] {
            let mut spec = spec;
            spec["containers"] = json!([{"name": "a"}]);
            spec["initContainers"] =
                json!([{"name": "i", "securityContext": {"privileged": true}}]);
            let got = sandbox(&pod(json!({"spec": spec})));
            assert_eq!((got.network, got.pid, got.ipc), (network, pid, ipc));
            assert!(got.privileged);
        }
    }

    #[test]
    fn a_privileged_ephemeral_container_makes_the_sandbox_s_configuration_privileged() {
        let mut debugged = pod(json!({"spec": {"containers": [{"name": "a"}],
            "ephemeralContainers": [{"name": "e"}]}}));
        assert!(!sandbox(&debugged).privileged);
        let ephemeral = debugged
            .spec
            .as_mut()
            .unwrap()
            .ephemeral_containers
            .as_mut();
        ephemeral.unwrap()[0].security_context =
            serde_json::from_value(json!({"privileged": true})).unwrap();
        assert!(sandbox(&debugged).privileged);
    }

    #[test]
    fn only_safe_sysctls_of_the_pods_own_are_allowed() {
        for (name, host, problem) in [
            ("kernel.shm_rmid_forced", false, None),
            ("net/ipv4/tcp_syncookies", false, None),
            ("net.ipv4.tcp_syncookies", true, Some("host net")),
            ("kernel.msgmax", false, Some("not allowlisted")),
            ("vm.swappiness", false, Some("not allowlisted")),
        ] {
            let pod = pod(json!({"spec": {"containers": [], "hostNetwork": host,
                "securityContext": {"sysctls": [{"name": name, "value": "1"}]}}}));
            let got = forbidden_sysctl(&pod);
            assert_eq!(got.is_some(), problem.is_some(), "{name}");
            assert!(
                got.unwrap_or_default()
                    .contains(problem.unwrap_or_default())
            );
        }
    }
}
