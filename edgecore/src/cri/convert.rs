//! Between Kubernetes' objects and the CRI's messages (pure).
//!
//! The labels and annotations are the kubelet's, letter by letter: log collectors, crictl and
//! cAdvisor read them, and they are all that a restarted agent has to know its containers by.

use std::collections::HashMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Container, ContainerPort, EphemeralContainer, Pod};

use super::api;
use crate::pods::cgroups::LinuxResources;
use crate::pods::dns::{DnsPlan, Hostname};
use crate::pods::security::{
    ImageUser, Namespace, Profile, SandboxSecurity, SecurityPlan, SelinuxLabels,
};
use crate::pods::seen::{ContainerSeen, Run, SandboxSeen, UserSeen};
use crate::pods::volumes::{Propagation, VolumeMountPlan};

pub const POD_NAME: &str = "io.kubernetes.pod.name";
pub const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
pub const POD_UID: &str = "io.kubernetes.pod.uid";
/// Ours: the node that made it. A runtime may be shared with an agent of somebody else's, whose
/// Pods are none of ours.
pub const NODE: &str = "edgecore.node";
pub const CONTAINER_NAME: &str = "io.kubernetes.container.name";

pub const HASH: &str = "io.kubernetes.container.hash";
pub const RESTART_COUNT: &str = "io.kubernetes.container.restartCount";
pub const MESSAGE_PATH: &str = "io.kubernetes.container.terminationMessagePath";
pub const MESSAGE_POLICY: &str = "io.kubernetes.container.terminationMessagePolicy";
pub const PRE_STOP: &str = "io.kubernetes.container.preStopHandler";
pub const PORTS: &str = "io.kubernetes.container.ports";
pub const POD_GRACE: &str = "io.kubernetes.pod.terminationGracePeriod";
pub const POD_DELETION_GRACE: &str = "io.kubernetes.pod.deletionGracePeriod";

/// Who a Pod is: namespace, name and UID, empty where the object has none.
pub fn identity(pod: &Pod) -> (&str, &str, &str) {
    let meta = &pod.metadata;
    (
        meta.namespace.as_deref().unwrap_or_default(),
        meta.name.as_deref().unwrap_or_default(),
        meta.uid.as_deref().unwrap_or_default(),
    )
}

/// The directory below the log root that all the Pod's logs are in.
pub fn log_directory_name(pod: &Pod) -> String {
    let (namespace, name, uid) = identity(pod);
    format!("{namespace}_{name}_{uid}")
}

/// A container's log below the Pod's log directory.
pub fn log_path(container: &str, attempt: u32) -> String {
    format!("{container}/{attempt}.log")
}

/// Changes when a running container no longer is what the spec asks for: its name or image.
pub fn container_hash(container: &Container) -> String {
    // FNV-1a, which needs to be stable across versions of this program and nothing else.
    let image = container.image.as_deref().unwrap_or_default();
    let bytes = container.name.bytes().chain([0]).chain(image.bytes());
    let hash = bytes.fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    format!("{hash:x}")
}

fn labels(pod: &Pod, node: &str) -> HashMap<String, String> {
    let (namespace, name, uid) = identity(pod);
    HashMap::from([
        (NODE.to_owned(), node.to_owned()),
        (POD_NAME.to_owned(), name.to_owned()),
        (POD_NAMESPACE.to_owned(), namespace.to_owned()),
        (POD_UID.to_owned(), uid.to_owned()),
    ])
}

/// What a sandbox is made from.
pub struct SandboxInput<'a> {
    pub pod: &'a Pod,
    pub node: &'a str,
    pub attempt: u32,
    pub hostname: &'a Hostname,
    pub dns: DnsPlan,
    pub log_directory: String,
    pub cgroup_parent: String,
    pub security: SandboxSecurity,
}

pub fn sandbox_config(input: SandboxInput<'_>) -> api::PodSandboxConfig {
    let (namespace, name, uid) = identity(input.pod);
    let meta = &input.pod.metadata;
    let mut all_labels: HashMap<_, _> = meta
        .labels
        .clone()
        .unwrap_or_default()
        .into_iter()
        .collect();
    all_labels.extend(labels(input.pod, input.node));
    let annotations = meta.annotations.clone().unwrap_or_default();
    let host_network = input.security.network == Namespace::Node;
    api::PodSandboxConfig {
        metadata: Some(api::PodSandboxMetadata {
            name: name.to_owned(),
            uid: uid.to_owned(),
            namespace: namespace.to_owned(),
            attempt: input.attempt,
        }),
        hostname: if host_network {
            String::new()
        } else {
            input.hostname.sandbox.clone()
        },
        log_directory: input.log_directory,
        dns_config: Some(api::DnsConfig {
            servers: input.dns.servers,
            searches: input.dns.searches,
            options: input.dns.options,
        }),
        port_mappings: if host_network {
            Vec::new()
        } else {
            host_ports(input.pod).map(port_mapping).collect()
        },
        labels: all_labels,
        annotations: annotations.into_iter().collect(),
        linux: Some(api::LinuxPodSandboxConfig {
            cgroup_parent: input.cgroup_parent,
            sysctls: input.security.sysctls.iter().cloned().collect(),
            security_context: Some(sandbox_security(&input.security)),
            overhead: None,
            resources: None,
        }),
    }
}

/// Every port of the Pod that asks for one of the device's own.
pub fn host_ports(pod: &Pod) -> impl Iterator<Item = &ContainerPort> {
    let spec = pod.spec.iter();
    let containers = spec.flat_map(|s| {
        let sidecars = s.init_containers.iter().flatten();
        s.containers.iter().chain(sidecars)
    });
    containers
        .flat_map(|c| c.ports.iter().flatten())
        .filter(|p| p.host_port.unwrap_or(0) > 0)
}

fn port_mapping(port: &ContainerPort) -> api::PortMapping {
    let protocol = match port.protocol.as_deref() {
        Some("UDP") => api::Protocol::Udp,
        Some("SCTP") => api::Protocol::Sctp,
        Some(_) | None => api::Protocol::Tcp,
    };
    api::PortMapping {
        protocol: protocol.into(),
        container_port: port.container_port,
        host_port: port.host_port.unwrap_or(0),
        host_ip: port.host_ip.clone().unwrap_or_default(),
    }
}

fn mode(namespace: Namespace) -> i32 {
    let mode = match namespace {
        Namespace::Pod => api::NamespaceMode::Pod,
        Namespace::Container => api::NamespaceMode::Container,
        Namespace::Node => api::NamespaceMode::Node,
    };
    mode.into()
}

fn namespaces(security: &SandboxSecurity) -> api::NamespaceOption {
    api::NamespaceOption {
        network: mode(security.network),
        pid: mode(security.pid),
        ipc: mode(security.ipc),
        target_id: String::new(),
        userns_options: None,
    }
}

fn number(value: Option<i64>) -> Option<api::Int64Value> {
    value.map(|value| api::Int64Value { value })
}

fn selinux(labels: Option<&SelinuxLabels>) -> Option<api::SeLinuxOption> {
    labels.map(|l| api::SeLinuxOption {
        user: l.user.clone(),
        role: l.role.clone(),
        r#type: l.kind.clone(),
        level: l.level.clone(),
    })
}

fn profile(profile: &Profile) -> api::SecurityProfile {
    use api::security_profile::ProfileType;
    let (kind, reference) = match profile {
        Profile::RuntimeDefault => (ProfileType::RuntimeDefault, ""),
        Profile::Unconfined => (ProfileType::Unconfined, ""),
        Profile::Localhost(name) => (ProfileType::Localhost, name.as_str()),
    };
    api::SecurityProfile {
        profile_type: kind.into(),
        localhost_ref: reference.to_owned(),
    }
}

fn groups_policy(strict: bool) -> i32 {
    let policy = if strict {
        api::SupplementalGroupsPolicy::Strict
    } else {
        api::SupplementalGroupsPolicy::Merge
    };
    policy.into()
}

fn sandbox_security(s: &SandboxSecurity) -> api::LinuxSandboxSecurityContext {
    api::LinuxSandboxSecurityContext {
        namespace_options: Some(namespaces(s)),
        selinux_options: selinux(s.selinux.as_ref()),
        run_as_user: number(s.run_as_user),
        run_as_group: number(s.run_as_group),
        readonly_rootfs: false,
        supplemental_groups: s.supplemental_groups.clone(),
        supplemental_groups_policy: groups_policy(s.strict_groups),
        privileged: s.privileged,
        // The pause process needs nothing that the default profile denies.
        seccomp: Some(profile(&Profile::RuntimeDefault)),
        apparmor: None,
    }
}

/// What a container is made from.
pub struct ContainerInput<'a> {
    pub pod: &'a Pod,
    pub node: &'a str,
    pub container: &'a Container,
    pub attempt: u32,
    /// What the runtime calls the image.
    pub image_ref: String,
    pub command: Vec<String>,
    pub args: Vec<String>,
    pub env: Vec<(String, String)>,
    pub mounts: Vec<VolumeMountPlan>,
    pub resources: LinuxResources,
    pub security: SecurityPlan,
    pub sandbox_security: &'a SandboxSecurity,
    /// The container whose processes an ephemeral one shares.
    pub target: Option<String>,
}

pub fn container_config(input: ContainerInput<'_>) -> api::ContainerConfig {
    let c = input.container;
    let mut all_labels = labels(input.pod, input.node);
    all_labels.insert(CONTAINER_NAME.to_owned(), c.name.clone());
    let mut namespace_options = namespaces(input.sandbox_security);
    if let Some(target) = input.target {
        namespace_options.pid = api::NamespaceMode::Target.into();
        namespace_options.target_id = target;
    }
    let env = input.env.into_iter();
    let image = c.image.clone().unwrap_or_default();
    api::ContainerConfig {
        metadata: Some(api::ContainerMetadata {
            name: c.name.clone(),
            attempt: input.attempt,
        }),
        image: Some(api::ImageSpec {
            image: input.image_ref,
            user_specified_image: image,
            ..Default::default()
        }),
        command: input.command,
        args: input.args,
        working_dir: c.working_dir.clone().unwrap_or_default(),
        envs: env
            .map(|(key, value)| api::KeyValue { key, value })
            .collect(),
        mounts: input.mounts.into_iter().map(mount).collect(),
        devices: Vec::new(),
        labels: all_labels,
        annotations: annotations(input.pod, c, input.attempt),
        log_path: log_path(&c.name, input.attempt),
        stdin: c.stdin.unwrap_or(false),
        stdin_once: c.stdin_once.unwrap_or(false),
        tty: c.tty.unwrap_or(false),
        linux: Some(api::LinuxContainerConfig {
            resources: Some(resources(input.resources)),
            security_context: Some(container_security(&input.security, namespace_options)),
        }),
    }
}

fn annotations(pod: &Pod, c: &Container, attempt: u32) -> HashMap<String, String> {
    let path = c.termination_message_path.as_deref();
    let policy = c.termination_message_policy.as_deref();
    let mut all = HashMap::from([
        (HASH.to_owned(), container_hash(c)),
        (RESTART_COUNT.to_owned(), attempt.to_string()),
        (
            MESSAGE_PATH.to_owned(),
            path.unwrap_or("/dev/termination-log").to_owned(),
        ),
        (
            MESSAGE_POLICY.to_owned(),
            policy.unwrap_or("File").to_owned(),
        ),
    ]);
    let mut json = |key: &str, value: Option<serde_json::Result<String>>| {
        if let Some(Ok(text)) = value {
            all.insert(key.to_owned(), text);
        }
    };
    let pre_stop = c.lifecycle.as_ref().and_then(|l| l.pre_stop.as_ref());
    json(PRE_STOP, pre_stop.map(serde_json::to_string));
    json(PORTS, c.ports.as_ref().map(serde_json::to_string));
    let grace = pod
        .spec
        .as_ref()
        .and_then(|s| s.termination_grace_period_seconds);
    json(POD_GRACE, grace.map(|g| Ok(g.to_string())));
    let deletion = pod.metadata.deletion_grace_period_seconds;
    json(POD_DELETION_GRACE, deletion.map(|g| Ok(g.to_string())));
    all
}

fn mount(plan: VolumeMountPlan) -> api::Mount {
    let propagation = match plan.propagation {
        Propagation::Private => api::MountPropagation::PropagationPrivate,
        Propagation::HostToContainer => api::MountPropagation::PropagationHostToContainer,
        Propagation::Bidirectional => api::MountPropagation::PropagationBidirectional,
    };
    api::Mount {
        container_path: plan.container_path,
        host_path: plan.host_path.to_string_lossy().into_owned(),
        readonly: plan.readonly,
        selinux_relabel: false,
        propagation: propagation.into(),
    }
}

fn resources(r: LinuxResources) -> api::LinuxContainerResources {
    api::LinuxContainerResources {
        cpu_period: r.cpu_period,
        cpu_quota: r.cpu_quota,
        cpu_shares: r.cpu_shares,
        memory_limit_in_bytes: r.memory_limit,
        oom_score_adj: r.oom_score_adj,
        ..Default::default()
    }
}

fn container_security(
    s: &SecurityPlan,
    namespace_options: api::NamespaceOption,
) -> api::LinuxContainerSecurityContext {
    api::LinuxContainerSecurityContext {
        capabilities: Some(api::Capability {
            add_capabilities: s.add_capabilities.clone(),
            drop_capabilities: s.drop_capabilities.clone(),
        }),
        privileged: s.privileged,
        namespace_options: Some(namespace_options),
        selinux_options: selinux(s.selinux.as_ref()),
        run_as_user: number(s.run_as_user),
        run_as_group: number(s.run_as_group),
        run_as_username: s.run_as_username.clone().unwrap_or_default(),
        readonly_rootfs: s.readonly_rootfs,
        supplemental_groups: s.supplemental_groups.clone(),
        supplemental_groups_policy: groups_policy(s.strict_groups),
        no_new_privs: s.no_new_privs,
        masked_paths: s.masked_paths.clone(),
        readonly_paths: s.readonly_paths.clone(),
        seccomp: Some(profile(&s.seccomp)),
        apparmor: s.apparmor.as_ref().map(profile),
    }
}

/// The user that the image itself names.
pub fn image_user(image: &api::Image) -> ImageUser {
    match (&image.uid, image.username.as_str()) {
        (Some(uid), _) => ImageUser::Uid(uid.value),
        (None, "") => ImageUser::Unset,
        (None, name) => ImageUser::Name(name.to_owned()),
    }
}

/// An ephemeral container is a container in all that matters here.
pub fn ephemeral(e: &EphemeralContainer) -> Container {
    let e = e.clone();
    Container {
        args: e.args,
        command: e.command,
        env: e.env,
        env_from: e.env_from,
        image: e.image,
        image_pull_policy: e.image_pull_policy,
        name: e.name,
        security_context: e.security_context,
        stdin: e.stdin,
        stdin_once: e.stdin_once,
        termination_message_path: e.termination_message_path,
        termination_message_policy: e.termination_message_policy,
        tty: e.tty,
        volume_devices: e.volume_devices,
        volume_mounts: e.volume_mounts,
        working_dir: e.working_dir,
        ..Default::default()
    }
}

/// A sandbox as a list shows it; its addresses come with its status.
pub fn sandbox_seen(item: &api::PodSandbox) -> SandboxSeen {
    SandboxSeen {
        id: item.id.clone(),
        attempt: item.metadata.as_ref().map_or(0, |m| m.attempt),
        created_at: item.created_at,
        ready: item.state == i32::from(api::PodSandboxState::SandboxReady),
        host_network: false,
        ips: Vec::new(),
    }
}

/// Adds what only a status tells.
pub fn add_sandbox_status(seen: &mut SandboxSeen, status: &api::PodSandboxStatus) {
    seen.ready = status.state == i32::from(api::PodSandboxState::SandboxReady);
    let options = status.linux.as_ref().and_then(|l| l.namespaces.as_ref());
    let network = options.and_then(|n| n.options.as_ref()).map(|o| o.network);
    seen.host_network = network == Some(api::NamespaceMode::Node.into());
    let addresses = status.network.iter().flat_map(|n| {
        let more = n.additional_ips.iter().map(|i| i.ip.as_str());
        std::iter::once(n.ip.as_str()).chain(more)
    });
    seen.ips = addresses
        .filter_map(|ip| ip.parse::<IpAddr>().ok())
        .collect();
}

pub(crate) fn run(state: i32) -> Run {
    match api::ContainerState::try_from(state) {
        Ok(api::ContainerState::ContainerCreated) => Run::Created,
        Ok(api::ContainerState::ContainerRunning) => Run::Running,
        Ok(api::ContainerState::ContainerExited) => Run::Exited,
        Ok(api::ContainerState::ContainerUnknown) | Err(_) => Run::Unknown,
    }
}

/// A container as a list shows it; the rest comes with its status.
pub fn container_seen(item: &api::Container) -> ContainerSeen {
    let annotation = |key: &str| item.annotations.get(key).cloned().unwrap_or_default();
    ContainerSeen {
        id: item.id.clone(),
        name: item.labels.get(CONTAINER_NAME).cloned().unwrap_or_default(),
        attempt: annotation(RESTART_COUNT)
            .parse()
            .unwrap_or_else(|_| item.metadata.as_ref().map_or(0, |m| m.attempt)),
        sandbox: item.pod_sandbox_id.clone(),
        run: run(item.state),
        created_at: item.created_at,
        image: item
            .image
            .as_ref()
            .map(|i| i.image.clone())
            .unwrap_or_default(),
        image_id: item.image_ref.clone(),
        hash: annotation(HASH),
        ..Default::default()
    }
}

/// Adds what only a status tells.
pub fn add_container_status(seen: &mut ContainerSeen, status: &api::ContainerStatus) {
    seen.run = run(status.state);
    seen.started_at = status.started_at;
    seen.finished_at = status.finished_at;
    seen.exit_code = status.exit_code;
    seen.reason = status.reason.clone();
    seen.message = status.message.chars().take(4096).collect();
    if let Some(image) = status.image.as_ref().filter(|i| !i.image.is_empty()) {
        seen.image = image.image.clone();
    }
    if !status.image_ref.is_empty() {
        seen.image_id = status.image_ref.clone();
    }
    let user = status.user.as_ref().and_then(|u| u.linux.as_ref());
    seen.user = user.map(|u| UserSeen {
        uid: u.uid,
        gid: u.gid,
        supplemental_groups: u.supplemental_groups.clone(),
    });
}
