//! What the downward API tells a Pod of itself: `fieldRef` and `resourceFieldRef` (pure).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, ResourceFieldSelector};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::env::ConfigError;
use super::quantity::{millis, units};
use crate::node::environment::Environment;

fn invalid(message: String) -> ConfigError {
    ConfigError::Invalid { message }
}

/// The value of a field that variables and files may both show.
fn common_field(pod: &Pod, path: &str) -> Option<String> {
    let meta = &pod.metadata;
    let subscript = |name: &str| {
        let key = path.strip_prefix(name)?.strip_prefix("['")?;
        key.strip_suffix("']")
    };
    let entry = |map: &Option<BTreeMap<String, String>>, key: &str| {
        let value = map.as_ref().and_then(|m| m.get(key));
        Some(value.cloned().unwrap_or_default())
    };
    match path {
        "metadata.name" => Some(meta.name.clone().unwrap_or_default()),
        "metadata.namespace" => Some(meta.namespace.clone().unwrap_or_default()),
        "metadata.uid" => Some(meta.uid.clone().unwrap_or_default()),
        path if path.starts_with("metadata.labels[") => {
            entry(&meta.labels, subscript("metadata.labels")?)
        }
        path if path.starts_with("metadata.annotations[") => {
            entry(&meta.annotations, subscript("metadata.annotations")?)
        }
        _ => None,
    }
}

/// A `fieldRef` of an environment variable.
pub(crate) fn env_field(
    pod: &Pod,
    path: &str,
    environment: &Environment,
    pod_ips: &[IpAddr],
) -> Result<String, ConfigError> {
    let spec = pod.spec.as_ref();
    let join = |ips: &[IpAddr]| {
        let text: Vec<_> = ips.iter().map(IpAddr::to_string).collect();
        text.join(",")
    };
    match path {
        "spec.nodeName" => Ok(spec
            .and_then(|s| s.node_name.clone())
            .unwrap_or_else(|| environment.node_name.clone())),
        "spec.serviceAccountName" => Ok(spec
            .and_then(|s| s.service_account_name.clone())
            .unwrap_or_default()),
        "status.hostIP" | "status.hostIPs" => Ok(environment.node_ip.to_string()),
        "status.podIP" => Ok(join(pod_ips.get(..1).unwrap_or_default())),
        "status.podIPs" => Ok(join(pod_ips)),
        path => {
            common_field(pod, path).ok_or_else(|| invalid(format!("unsupported fieldPath: {path}")))
        }
    }
}

/// A `fieldRef` of a downwardAPI file.
pub(crate) fn file_field(pod: &Pod, path: &str) -> Result<String, ConfigError> {
    let lines = |map: &Option<BTreeMap<String, String>>| {
        let pairs = map.iter().flatten();
        let lines: Vec<_> = pairs.map(|(k, v)| format!("{k}={}", quoted(v))).collect();
        lines.join("\n")
    };
    match path {
        "metadata.labels" => Ok(lines(&pod.metadata.labels)),
        "metadata.annotations" => Ok(lines(&pod.metadata.annotations)),
        path => {
            common_field(pod, path).ok_or_else(|| invalid(format!("unsupported fieldPath: {path}")))
        }
    }
}

/// A value in double quotes with the escapes that readers of these files know (Go's `%q`).
fn quoted(value: &str) -> String {
    let mut out = String::with_capacity(value.len() + 2);
    out.push('"');
    for c in value.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{7}' => out.push_str("\\a"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{b}' => out.push_str("\\v"),
            c if c.is_ascii_control() => {
                let _ = write!(out, "\\x{:02x}", u32::from(c));
            }
            c if c.is_control() => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// A container of the Pod by its name, init containers too.
pub(crate) fn container_named<'a>(spec: &'a PodSpec, name: &str) -> Option<&'a Container> {
    let init = spec.init_containers.iter().flatten();
    spec.containers.iter().chain(init).find(|c| c.name == name)
}

/// A `resourceFieldRef`: the container's own request or limit, divided and rounded up. A limit
/// that is not set is the Pod's, then the node's allocatable.
pub(crate) fn resource_field(
    pod: &Pod,
    own: Option<&Container>,
    selector: &ResourceFieldSelector,
    environment: &Environment,
) -> Result<String, ConfigError> {
    let spec = pod.spec.as_ref();
    let named = selector.container_name.as_deref().filter(|n| !n.is_empty());
    let container = match named {
        Some(name) => spec
            .and_then(|s| container_named(s, name))
            .or_else(|| own.filter(|c| c.name == name)),
        None => own,
    };
    let container = container.ok_or_else(|| {
        invalid(format!(
            "container {} not found",
            named.unwrap_or("(unnamed)")
        ))
    })?;
    let unsupported = || {
        invalid(format!(
            "unsupported container resource: {}",
            selector.resource
        ))
    };
    let (side, resource) = selector.resource.split_once('.').ok_or_else(unsupported)?;
    let known = matches!(resource, "cpu" | "memory" | "ephemeral-storage")
        || resource.starts_with("hugepages-");
    let of = |resources: Option<&k8s_openapi::api::core::v1::ResourceRequirements>| {
        let side = match side {
            "limits" => resources?.limits.as_ref(),
            "requests" => resources?.requests.as_ref(),
            _ => None,
        };
        side?.get(resource).filter(|q| units(q) != Some(0)).cloned()
    };
    if !known || !matches!(side, "limits" | "requests") {
        return Err(unsupported());
    }
    let own = of(container.resources.as_ref());
    let quantity = own.or_else(|| {
        (side == "limits")
            .then(|| of(spec.and_then(|s| s.resources.as_ref())))
            .flatten()
    });
    let allocatable = || match (side, resource) {
        ("limits", "cpu") => Quantity(format!("{}m", environment.allocatable_cpu_millis)),
        ("limits", "memory") => Quantity(environment.allocatable_memory_bytes.to_string()),
        ("limits", "ephemeral-storage") => {
            Quantity(environment.allocatable_ephemeral_bytes.to_string())
        }
        _ => Quantity("0".into()),
    };
    divided(&quantity.unwrap_or_else(allocatable), resource, selector)
}

fn divided(
    quantity: &Quantity,
    resource: &str,
    selector: &ResourceFieldSelector,
) -> Result<String, ConfigError> {
    let measure = if resource == "cpu" { millis } else { units };
    let one = if resource == "cpu" { 1000 } else { 1 };
    // The API server writes an unset divisor as "0".
    let divisor = match &selector.divisor {
        Some(q) => measure(q).map(|d| if d == 0 { one } else { d }),
        None => Some(one),
    };
    match (measure(quantity), divisor) {
        (Some(amount), Some(divisor)) if amount >= 0 && divisor > 0 => Ok(amount
            .checked_add(divisor - 1)
            .map_or(amount / divisor, |up| up / divisor)
            .to_string()),
        _ => Err(invalid(format!(
            "{} cannot be divided by {}",
            selector.resource,
            selector.divisor.as_ref().map_or("1", |d| d.0.as_str())
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::testing::{environment, pod};
    use serde_json::json;

    #[test]
    fn fields_of_a_variable() {
        let pod = pod(json!({
            "metadata": {"name": "web", "namespace": "shop", "uid": "u1",
                "labels": {"app": "a"}, "annotations": {"example.com/x": "y"}},
            "spec": {"serviceAccountName": "sa", "containers": []}
        }));
        let ips = ["10.1.0.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        for (path, value) in [
            ("metadata.name", "web"),
            ("metadata.namespace", "shop"),
            ("metadata.uid", "u1"),
            ("metadata.labels['app']", "a"),
            ("metadata.labels['none']", ""),
            ("metadata.annotations['example.com/x']", "y"),
            ("spec.nodeName", "edge-1"),
            ("spec.serviceAccountName", "sa"),
            ("status.hostIP", "192.0.2.7"),
            ("status.hostIPs", "192.0.2.7"),
            ("status.podIP", "10.1.0.2"),
            ("status.podIPs", "10.1.0.2,fd00::2"),
        ] {
            let got = env_field(&pod, path, &environment(), &ips);
            assert_eq!(got.as_deref(), Ok(value), "{path}");
        }
        for path in [
            "metadata.labels",
            "spec.priority",
            "metadata.labels[app]",
            "",
        ] {
            assert!(
                env_field(&pod, path, &environment(), &ips).is_err(),
                "{path}"
            );
        }
    }

    #[test]
    fn labels_as_a_file_are_sorted_and_quoted() {
        let pod = pod(json!({"metadata": {
            "labels": {"b": "2", "a": "1"},
            "annotations": {"k": "say \"hi\"\n\\\u{1}é"}
        }}));
        assert_eq!(
            file_field(&pod, "metadata.labels").unwrap(),
            "a=\"1\"\nb=\"2\""
        );
        assert_eq!(
            file_field(&pod, "metadata.annotations").unwrap(),
            r#"k="say \"hi\"\n\\\x01é""#
        );
        assert!(file_field(&pod, "status.podIP").is_err());
    }

    #[test]
    fn resources_are_divided_and_rounded_up() {
        let pod = pod(json!({"spec": {"containers": [
            {"name": "a", "resources": {
                "limits": {"cpu": "1500m", "memory": "65Mi"},
                "requests": {"cpu": "250m", "memory": "1Mi"}}},
            {"name": "bare"}
        ]}}));
        for (container, resource, divisor, value) in [
            ("a", "limits.cpu", "0", "2"),
            ("a", "limits.cpu", "1m", "1500"),
            ("a", "requests.cpu", "1m", "250"),
            ("a", "requests.cpu", "1", "1"),
            ("a", "limits.memory", "1Mi", "65"),
            ("a", "limits.memory", "0", "68157440"),
            ("a", "limits.memory", "1Gi", "1"),
            ("bare", "limits.cpu", "1m", "3900"),
            ("bare", "limits.memory", "0", "4000000000"),
            ("bare", "limits.ephemeral-storage", "0", "50000000000"),
            ("bare", "requests.cpu", "0", "0"),
            ("a", "limits.hugepages-2Mi", "0", "0"),
        ] {
            let selector = ResourceFieldSelector {
                container_name: Some(container.into()),
                resource: resource.into(),
                divisor: Some(Quantity(divisor.into())),
            };
            let got = resource_field(&pod, None, &selector, &environment());
            assert_eq!(
                got.as_deref(),
                Ok(value),
                "{container} {resource}/{divisor}"
            );
        }
        let selector = |container: &str, resource: &str| ResourceFieldSelector {
            container_name: Some(container.into()),
            resource: resource.into(),
            divisor: None,
        };
        for bad in [
            selector("none", "limits.cpu"),
            selector("a", "limits.disk"),
            selector("a", "cpu"),
        ] {
            assert!(resource_field(&pod, None, &bad, &environment()).is_err());
        }
    }
}
