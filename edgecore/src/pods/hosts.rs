//! A Pod's /etc/hosts (pure).

use std::fmt::Write as _;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::Pod;

use crate::node::environment::Environment;

/// The content of the file that all containers of the Pod see; `host_file` is the device's own.
pub fn hosts_file_content(
    pod: &Pod,
    pod_ips: &[IpAddr],
    _host_file: &str,
    _environment: &Environment,
) -> String {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let mut out = String::from("# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n");
    for ip in pod_ips {
        let _ = writeln!(out, "{ip}\t{name}");
    }
    out
}
