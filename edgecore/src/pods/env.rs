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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::testing::{desired, environment, pod};
    use serde_json::{Value, json};

    fn objects() -> Desired {
        desired(&[
            (
                Kind::ConfigMap,
                "shop",
                "cm",
                json!({"data": {"a": "1", "b=c": "2", "d-e": "3"}}),
            ),
            (
                Kind::Secret,
                "shop",
                "sec",
                json!({"data": {"p": "aHVudGVy"}}),
            ),
            (Kind::ConfigMap, "shop", "gone", Value::Null),
            (
                Kind::Services,
                "shop",
                "",
                json!([
                    {"name": "my-db", "ip": "10.96.7.7", "ports": [
                        {"name": "sql-x", "port": 5432, "protocol": "TCP"},
                        {"name": "stat", "port": 9, "protocol": "UDP"}]},
                    {"name": "headless", "ip": "None", "ports": [{"port": 1}]},
                    {"name": "six", "ip": "fd00::1", "ports": [{"port": 80}]}
                ]),
            ),
            (
                Kind::Services,
                "default",
                "",
                json!([
                    {"name": "kubernetes", "ip": "10.96.0.1", "ports": [{"name": "https", "port": 443}]},
                    {"name": "other", "ip": "10.96.0.9", "ports": [{"port": 1}]}
                ]),
            ),
        ])
    }

    fn env_of(links: bool, container: Value) -> Result<ContainerEnv, ConfigError> {
        let pod = pod(json!({
            "metadata": {"name": "web", "namespace": "shop", "uid": "u"},
            "spec": {"enableServiceLinks": links, "containers": [container]}
        }));
        let container = &pod.spec.as_ref().unwrap().containers[0];
        let ctx = EnvContext {
            environment: &environment(),
            desired: &objects(),
            pod_ips: &["10.1.0.2".parse().unwrap()],
        };
        container_env(&pod, container, &ctx)
    }

    fn error(container: Value) -> ConfigError {
        match env_of(false, container) {
            Err(e) => e,
            Ok(_) => panic!("it was made"),
        }
    }

    #[test]
    fn services_as_variables() {
        let vars = env_of(true, json!({"name": "c"})).ok().unwrap().vars;
        let find = |n: &str| vars.iter().find(|(k, _)| k == n).map(|(_, v)| v.as_str());
        for (name, value) in [
            ("MY_DB_SERVICE_HOST", Some("10.96.7.7")),
            ("MY_DB_SERVICE_PORT", Some("5432")),
            ("MY_DB_SERVICE_PORT_SQL_X", Some("5432")),
            ("MY_DB_SERVICE_PORT_STAT", Some("9")),
            ("MY_DB_PORT", Some("tcp://10.96.7.7:5432")),
            ("MY_DB_PORT_5432_TCP", Some("tcp://10.96.7.7:5432")),
            ("MY_DB_PORT_5432_TCP_PROTO", Some("tcp")),
            ("MY_DB_PORT_5432_TCP_PORT", Some("5432")),
            ("MY_DB_PORT_5432_TCP_ADDR", Some("10.96.7.7")),
            ("MY_DB_PORT_9_UDP", Some("udp://10.96.7.7:9")),
            ("SIX_PORT", Some("tcp://[fd00::1]:80")),
            ("SIX_SERVICE_HOST", Some("fd00::1")),
            ("HEADLESS_SERVICE_HOST", None),
            ("OTHER_SERVICE_HOST", None),
            ("KUBERNETES_SERVICE_HOST", Some("10.96.0.1")),
            ("KUBERNETES_SERVICE_PORT_HTTPS", Some("443")),
        ] {
            assert_eq!(find(name), value, "{name}");
        }
    }

    #[test]
    fn without_links_only_the_api_is_named() {
        let vars = env_of(false, json!({"name": "c"})).ok().unwrap().vars;
        assert!(
            vars.iter().all(|(k, _)| k.starts_with("KUBERNETES_")),
            "{vars:?}"
        );
        assert!(
            vars.iter()
                .any(|(k, v)| k == "KUBERNETES_SERVICE_HOST" && v == "10.96.0.1")
        );
    }

    #[test]
    fn the_welcomes_api_address_stands_in() {
        let bare = desired(&[
            (Kind::Services, "shop", "", json!([])),
            (Kind::Services, "default", "", Value::Null),
        ]);
        let pod = pod(
            json!({"metadata": {"namespace": "shop"}, "spec": {"containers": [{"name": "c"}]}}),
        );
        let ctx = EnvContext {
            environment: &environment(),
            desired: &bare,
            pod_ips: &[],
        };
        let container = &pod.spec.as_ref().unwrap().containers[0];
        let vars = container_env(&pod, container, &ctx).ok().unwrap().vars;
        assert!(vars.contains(&("KUBERNETES_SERVICE_PORT".into(), "443".into())));
    }

    #[test]
    fn later_sources_win_and_variables_see_earlier_ones() {
        let container = json!({"name": "c",
        "envFrom": [
            {"configMapRef": {"name": "cm"}},
            {"prefix": "S_", "secretRef": {"name": "sec"}},
            {"configMapRef": {"name": "gone", "optional": true}}
        ],
        "env": [
            {"name": "a", "value": "own"},
            {"name": "X", "value": "$(a)-$(S_p)-$(KUBERNETES_SERVICE_HOST)"},
            {"name": "Y", "value": "$(LATER) $$(a) $(Y)"},
            {"name": "LATER", "value": "z"},
            {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "CPU", "valueFrom": {"resourceFieldRef":
                {"resource": "limits.cpu", "divisor": "1m"}}},
            {"name": "CM", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "d-e"}}},
            {"name": "SEC", "valueFrom": {"secretKeyRef": {"name": "sec", "key": "p"}}},
            {"name": "NONE", "valueFrom": {"configMapKeyRef":
                {"name": "gone", "key": "x", "optional": true}}},
            {"name": "NOKEY", "valueFrom": {"secretKeyRef":
                {"name": "sec", "key": "x", "optional": true}}}
        ]});
        let env = env_of(false, container).ok().unwrap();
        let mut vars = env.vars;
        vars.retain(|(k, _)| !k.starts_with("KUBERNETES_"));
        let want = [
            ("a", "own"),
            ("d-e", "3"),
            ("S_p", "hunter"),
            ("X", "own-hunter-10.96.0.1"),
            ("Y", "$(LATER) $(a) $(Y)"),
            ("LATER", "z"),
            ("IP", "10.1.0.2"),
            ("CPU", "3900"),
            ("CM", "3"),
            ("SEC", "hunter"),
        ];
        assert_eq!(vars, want.map(|(k, v)| (k.to_owned(), v.to_owned())));
        assert_eq!(env.invalid_names, ["b=c"]);
    }

    #[test]
    fn what_is_missing_says_so_and_what_is_unknown_waits() {
        let key = |kind: &str, name: &str, key: &str| json!({"name": "c", "env": [{"name": "X", "valueFrom": {kind: {"name": name, "key": key}}}]});
        for (container, message) in [
            (
                key("configMapKeyRef", "gone", "k"),
                "configmap \"gone\" not found",
            ),
            (
                key("configMapKeyRef", "cm", "k"),
                "couldn't find key k in ConfigMap shop/cm",
            ),
            (
                key("secretKeyRef", "sec", "k"),
                "couldn't find key k in Secret shop/sec",
            ),
            (
                json!({"name": "c", "envFrom": [{"configMapRef": {"name": "gone"}}]}),
                "configmap \"gone\" not found",
            ),
        ] {
            assert_eq!(error(container), missing(message.into()));
        }
        let unknown = error(key("secretKeyRef", "never-heard-of", "k"));
        assert!(matches!(unknown, ConfigError::Unknown { .. }), "{unknown}");
        let odd = json!({"name": "c", "env": [{"name": "X", "valueFrom": {"fileKeyRef": {}}}]});
        assert!(matches!(error(odd), ConfigError::Invalid { .. }));
    }

    #[test]
    fn expansion() {
        let vars = [
            ("A".to_owned(), "1".to_owned()),
            ("B".to_owned(), "$(A)".to_owned()),
        ];
        for (text, want) in [
            ("", ""),
            ("plain", "plain"),
            ("$(A)", "1"),
            ("x$(A)y$(A)", "x1y1"),
            ("$(B)", "$(A)"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$1"),
            ("$$$$(A)", "$$(A)"),
            ("$(NONE)", "$(NONE)"),
            ("$A", "$A"),
            ("$(A", "$(A"),
            ("$", "$"),
            ("a$", "a$"),
            ("$$", "$"),
            ("$()", "$()"),
            ("é$(A)é", "é1é"),
        ] {
            assert_eq!(expand(text, &vars), want, "{text}");
        }
        assert_eq!(expand_strictly("$(A)/x", &vars).as_deref(), Ok("1/x"));
        assert!(expand_strictly("$(NONE)/x", &vars).is_err());
    }

    #[test]
    fn every_reference_must_be_known() {
        let pod = pod(json!({
            "metadata": {"name": "p", "namespace": "n"},
            "spec": {
                "imagePullSecrets": [{"name": "pull"}],
                "volumes": [
                    {"name": "1", "configMap": {"name": "vol-cm", "optional": true}},
                    {"name": "2", "secret": {"secretName": "vol-sec"}},
                    {"name": "3", "projected": {"sources": [
                        {"configMap": {"name": "pro-cm"}}, {"secret": {"name": "pro-sec"}}]}}],
                "initContainers": [{"name": "i", "envFrom": [{"secretRef": {"name": "from-sec"}}]}],
                "containers": [{"name": "c",
                    "envFrom": [{"configMapRef": {"name": "from-cm"}}],
                    "env": [
                        {"name": "A", "valueFrom": {"configMapKeyRef": {"name": "key-cm", "key": "k"}}},
                        {"name": "B", "valueFrom": {"secretKeyRef": {"name": "key-sec", "key": "k"}}}]}],
                "ephemeralContainers": [{"name": "e",
                    "envFrom": [{"configMapRef": {"name": "eph-cm"}}]}]
            }
        }));
        let desired = Desired::in_memory();
        let unknown = references_known(&pod, &desired).unwrap_err();
        let shown: Vec<_> = unknown.iter().map(ToString::to_string).collect();
        assert_eq!(
            shown,
            [
                "ConfigMap/n/eph-cm",
                "ConfigMap/n/from-cm",
                "ConfigMap/n/key-cm",
                "ConfigMap/n/pro-cm",
                "ConfigMap/n/vol-cm",
                "Secret/n/from-sec",
                "Secret/n/key-sec",
                "Secret/n/pro-sec",
                "Secret/n/pull",
                "Secret/n/vol-sec",
                "Services/default/",
                "Services/n/",
            ]
        );
        for (n, key) in unknown.iter().enumerate() {
            let object = if n % 2 == 0 {
                common::object::Object::absent(key.clone())
            } else {
                common::object::Object::present(key.clone(), *b"{}")
            };
            assert!(references_known(&pod, &desired).is_err());
            desired
                .commit(crate::store::desired::Batch {
                    puts: vec![object],
                    ..Default::default()
                })
                .unwrap();
        }
        assert_eq!(references_known(&pod, &desired), Ok(()));
    }
}
