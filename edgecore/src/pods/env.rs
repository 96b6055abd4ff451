//! A container's environment (pure).
//!
//! Takes the Pod, the committed objects and what the node is; gives variables in the order of
//! precedence: Services, then `envFrom`, then `env`, a later one replacing an earlier. `$(VAR)` in
//! a value sees what stands before it. Never waits, never asks the cloud: an unknown reference is
//! an error of its own.

use std::collections::HashMap;
use std::net::IpAddr;

use common::ids::{Kind, ObjectKey};
use k8s_openapi::api::core::v1::{Container, EnvFromSource, EnvVar, EnvVarSource, Pod};

use super::fields;
use super::sources::{self, Entries, ServiceEntry, ServicePort};
use crate::node::environment::Environment;
use crate::store::desired::{Desired, Lookup};

/// What a container's environment is made from besides its own spec.
pub struct EnvContext<'a> {
    pub environment: &'a Environment,
    pub desired: &'a Desired,
    /// The Pod's addresses; empty while there is no sandbox.
    pub pod_ips: &'a [IpAddr],
}

/// A container's environment, ready for the runtime. Not `Debug`: values may be Secrets'.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct ContainerEnv {
    /// In order; no name twice.
    pub vars: Vec<(String, String)>,
    /// Keys of `envFrom` sources that cannot be variable names: an Event names them.
    pub invalid_names: Vec<String>,
}

/// Why a container's configuration cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Whether the object exists is not known yet: wait for the cloud, without an Event.
    #[error("{key} has not arrived from the cloud yet")]
    Unknown { key: ObjectKey },
    /// `CreateContainerConfigError` with this message; retried when the object appears.
    #[error("{message}")]
    Missing { message: String },
    /// The spec asks for what cannot be; the message is for people.
    #[error("{message}")]
    Invalid { message: String },
}

fn missing(message: String) -> ConfigError {
    ConfigError::Missing { message }
}

/// Variables with their order and the last value of each name.
#[derive(Default)]
struct Vars {
    list: Vec<(String, String)>,
    index: HashMap<String, usize>,
}

impl Vars {
    fn set(&mut self, name: String, value: String) {
        match self.index.get(&name) {
            Some(&at) => self.list[at].1 = value,
            None => {
                self.index.insert(name.clone(), self.list.len());
                self.list.push((name, value));
            }
        }
    }

    fn find(&self, name: &str) -> Option<&str> {
        self.index.get(name).map(|&at| self.list[at].1.as_str())
    }
}

/// The environment of one container.
pub fn container_env(
    pod: &Pod,
    container: &Container,
    ctx: &EnvContext<'_>,
) -> Result<ContainerEnv, ConfigError> {
    let mut vars = Vars::default();
    let mut invalid_names = Vec::new();
    for (name, value) in service_vars(pod, ctx)? {
        vars.set(name, value);
    }
    for source in container.env_from.iter().flatten() {
        let prefix = source.prefix.as_deref().unwrap_or_default();
        for (key, value) in env_from(pod, source, ctx)? {
            let name = format!("{prefix}{key}");
            if is_variable_name(&name) {
                vars.set(name, String::from_utf8_lossy(&value).into_owned());
            } else {
                invalid_names.push(name);
            }
        }
    }
    for var in container.env.iter().flatten() {
        if let Some(value) = env_value(pod, container, var, ctx, &vars)? {
            vars.set(var.name.clone(), value);
        }
    }
    Ok(ContainerEnv {
        vars: vars.list,
        invalid_names,
    })
}

/// Since Kubernetes 1.34 any printable ASCII but `=`.
fn is_variable_name(name: &str) -> bool {
    !name.is_empty()
        && name
            .bytes()
            .all(|b| (b' '..=b'~').contains(&b) && b != b'=')
}

/// The entries of an `envFrom` source; none where it is optional and absent.
fn env_from(
    pod: &Pod,
    source: &EnvFromSource,
    ctx: &EnvContext<'_>,
) -> Result<Entries, ConfigError> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let (kind, name, optional, found) = if let Some(r) = &source.config_map_ref {
        let found = sources::config_map(ctx.desired, namespace, &r.name)?;
        ("configmap", &r.name, r.optional, found)
    } else if let Some(r) = &source.secret_ref {
        let found = sources::secret(ctx.desired, namespace, &r.name)?;
        ("secret", &r.name, r.optional, found)
    } else {
        return Ok(Entries::new());
    };
    match found {
        Some(entries) => Ok(entries),
        None if optional == Some(true) => Ok(Entries::new()),
        None => Err(missing(format!("{kind} {name:?} not found"))),
    }
}

/// The value of one `env` entry; `None` leaves the variable out.
fn env_value(
    pod: &Pod,
    container: &Container,
    var: &EnvVar,
    ctx: &EnvContext<'_>,
    vars: &Vars,
) -> Result<Option<String>, ConfigError> {
    let Some(source) = &var.value_from else {
        let text = var.value.as_deref().unwrap_or_default();
        return Ok(Some(expand_with(text, |name| vars.find(name))));
    };
    if let Some(field) = &source.field_ref {
        return fields::env_field(pod, &field.field_path, ctx.environment, ctx.pod_ips).map(Some);
    }
    if let Some(resource) = &source.resource_field_ref {
        let value = fields::resource_field(pod, Some(container), resource, ctx.environment);
        return value.map(Some);
    }
    key_value(pod, var, source, ctx)
}

/// A `configMapKeyRef` or `secretKeyRef`.
fn key_value(
    pod: &Pod,
    var: &EnvVar,
    source: &EnvVarSource,
    ctx: &EnvContext<'_>,
) -> Result<Option<String>, ConfigError> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let (kind, name, key, optional, found) = if let Some(r) = &source.config_map_key_ref {
        let found = sources::config_map(ctx.desired, namespace, &r.name)?;
        ("ConfigMap", &r.name, &r.key, r.optional, found)
    } else if let Some(r) = &source.secret_key_ref {
        let found = sources::secret(ctx.desired, namespace, &r.name)?;
        ("Secret", &r.name, &r.key, r.optional, found)
    } else {
        let message = format!(
            "the valueFrom of variable {} is of an unsupported kind",
            var.name
        );
        return Err(ConfigError::Invalid { message });
    };
    let optional = optional == Some(true);
    let Some(mut entries) = found else {
        let message = format!("{} {name:?} not found", kind.to_lowercase());
        return if optional {
            Ok(None)
        } else {
            Err(missing(message))
        };
    };
    match entries.remove(key) {
        Some(value) => Ok(Some(String::from_utf8_lossy(&value).into_owned())),
        None if optional => Ok(None),
        None => Err(missing(format!(
            "couldn't find key {key} in {kind} {namespace}/{name}"
        ))),
    }
}

/// The variables of Services: `default/kubernetes` always, those of the Pod's namespace unless
/// `enableServiceLinks` is false.
fn service_vars(pod: &Pod, ctx: &EnvContext<'_>) -> Result<Vec<(String, String)>, ConfigError> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let links = pod.spec.as_ref().and_then(|s| s.enable_service_links) != Some(false);
    let mut services = if links {
        sources::services(ctx.desired, namespace)?
    } else {
        Vec::new()
    };
    if !services
        .iter()
        .any(|s| s.name == "kubernetes" && s.address().is_some())
    {
        let masters = sources::services(ctx.desired, "default")?;
        let listed = masters.into_iter().find(|s| s.name == "kubernetes");
        services.extend(listed.or_else(|| welcomed_api(ctx.environment)));
    }
    let with_address = services.iter().filter_map(|s| Some((s, s.address()?)));
    Ok(with_address
        .flat_map(|(s, ip)| one_service(s, ip))
        .collect())
}

/// `default/kubernetes` as the welcome told it.
fn welcomed_api(environment: &Environment) -> Option<ServiceEntry> {
    let (ip, port) = environment.api_service?;
    Some(ServiceEntry {
        name: "kubernetes".into(),
        ip: ip.to_string(),
        ports: vec![ServicePort {
            name: Some("https".into()),
            port,
            protocol: None,
        }],
    })
}

fn one_service(service: &ServiceEntry, ip: IpAddr) -> Vec<(String, String)> {
    let upper = |text: &str| text.to_uppercase().replace('-', "_");
    let prefix = upper(&service.name);
    let mut vars = vec![(format!("{prefix}_SERVICE_HOST"), ip.to_string())];
    let host = match ip {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    };
    for (i, port) in service.ports.iter().enumerate() {
        let number = port.port.to_string();
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        let url = format!("{}://{host}:{number}", protocol.to_lowercase());
        if i == 0 {
            vars.push((format!("{prefix}_SERVICE_PORT"), number.clone()));
            vars.push((format!("{prefix}_PORT"), url.clone()));
        }
        if let Some(name) = port.name.as_deref().filter(|n| !n.is_empty()) {
            vars.push((
                format!("{prefix}_SERVICE_PORT_{}", upper(name)),
                number.clone(),
            ));
        }
        let link = format!("{prefix}_PORT_{number}_{}", protocol.to_uppercase());
        vars.push((link.clone(), url));
        vars.push((format!("{link}_PROTO"), protocol.to_lowercase()));
        vars.push((format!("{link}_PORT"), number));
        vars.push((format!("{link}_ADDR"), ip.to_string()));
    }
    vars
}

/// Replaces `$(VAR)`; `$$` is one dollar; an unknown variable stays as it is written.
pub fn expand(text: &str, vars: &[(String, String)]) -> String {
    expand_with(text, |name| {
        let found = vars.iter().rev().find(|(n, _)| n == name);
        found.map(|(_, v)| v.as_str())
    })
}

/// As [`expand`], but an unknown variable is an error that names it (`subPathExpr`).
pub(crate) fn expand_strictly(
    text: &str,
    vars: &[(String, String)],
) -> Result<String, ConfigError> {
    let mut unknown = None;
    let out = expand_with(text, |name| {
        let found = vars.iter().rev().find(|(n, _)| n == name);
        if found.is_none() {
            unknown.get_or_insert_with(|| name.to_owned());
        }
        found.map(|(_, v)| v.as_str())
    });
    match unknown {
        None => Ok(out),
        Some(name) => Err(ConfigError::Invalid {
            message: format!(
                "{text:?} refers to the variable {name:?}, which the container has not"
            ),
        }),
    }
}

fn expand_with<'v>(text: &str, mut find: impl FnMut(&str) -> Option<&'v str>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some((name, after)) = rest.strip_prefix('(').and_then(|r| r.split_once(')')) {
            match find(name) {
                Some(value) => out.push_str(value),
                None => out.extend(["$(", name, ")"]),
            }
            rest = after;
        } else {
            out.push('$');
        }
    }
    out.push_str(rest);
    out
}

/// Every object that the Pod needs is present or absent; the error names the unknown ones.
pub fn references_known(pod: &Pod, desired: &Desired) -> Result<(), Vec<ObjectKey>> {
    let unknown = |key: &ObjectKey| desired.lookup(key) == Lookup::Unknown;
    let mut keys: Vec<_> = references(pod).into_iter().filter(unknown).collect();
    keys.sort();
    keys.dedup();
    if keys.is_empty() { Ok(()) } else { Err(keys) }
}

/// Every object that the Pod's start depends on.
pub fn references(pod: &Pod) -> Vec<ObjectKey> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let config_map = |name: &str| ObjectKey::named(Kind::ConfigMap, namespace, name);
    let secret = |name: &str| ObjectKey::named(Kind::Secret, namespace, name);
    let mut keys = vec![sources::services_key("default")];
    let Some(spec) = &pod.spec else { return keys };
    if spec.enable_service_links != Some(false) {
        keys.push(sources::services_key(namespace));
    }
    for pull in spec.image_pull_secrets.iter().flatten() {
        keys.extend((!pull.name.is_empty()).then(|| secret(&pull.name)));
    }
    let init = spec.init_containers.iter().flatten();
    let own = init.chain(&spec.containers).map(|c| (&c.env, &c.env_from));
    let ephemeral = spec.ephemeral_containers.iter().flatten();
    for (env, env_from) in own.chain(ephemeral.map(|c| (&c.env, &c.env_from))) {
        for source in env_from.iter().flatten() {
            keys.extend(source.config_map_ref.iter().map(|r| config_map(&r.name)));
            keys.extend(source.secret_ref.iter().map(|r| secret(&r.name)));
        }
        for source in env.iter().flatten().filter_map(|v| v.value_from.as_ref()) {
            keys.extend(
                source
                    .config_map_key_ref
                    .iter()
                    .map(|r| config_map(&r.name)),
            );
            keys.extend(source.secret_key_ref.iter().map(|r| secret(&r.name)));
        }
    }
    for volume in spec.volumes.iter().flatten() {
        keys.extend(volume.config_map.iter().map(|v| config_map(&v.name)));
        let names = volume
            .secret
            .iter()
            .filter_map(|v| v.secret_name.as_deref());
        keys.extend(names.map(secret));
        let projected = volume
            .projected
            .iter()
            .flat_map(|p| p.sources.iter().flatten());
        for source in projected {
            keys.extend(source.config_map.iter().map(|v| config_map(&v.name)));
            keys.extend(source.secret.iter().map(|v| secret(&v.name)));
        }
    }
    keys
}
