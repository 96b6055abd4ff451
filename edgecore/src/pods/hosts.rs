//! A Pod's /etc/hosts (pure).
//!
//! Gives the file's content, in the layout that the kubelet's has and that tests and tools look
//! for. Never reads or writes a file.

use std::fmt::Write as _;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::Pod;

use super::dns;
use crate::node::environment::Environment;

/// What every Pod's file names besides the Pod.
const LOCAL_NAMES: &[(&str, &str)] = &[
    ("127.0.0.1", "localhost"),
    ("::1", "localhost ip6-localhost ip6-loopback"),
    ("fe00::0", "ip6-localnet"),
    ("fe00::0", "ip6-mcastprefix"),
    ("fe00::1", "ip6-allnodes"),
    ("fe00::2", "ip6-allrouters"),
];

/// The content of the file that all containers of the Pod see; `host_file` is the device's own,
/// which a Pod on the host's network sees instead.
pub fn hosts_file_content(
    pod: &Pod,
    pod_ips: &[IpAddr],
    host_file: &str,
    environment: &Environment,
) -> String {
    let on_host = pod.spec.as_ref().and_then(|s| s.host_network) == Some(true);
    let mut out = if on_host {
        format!("# Kubernetes-managed hosts file (host network).\n{host_file}")
    } else {
        own_names(pod, pod_ips, environment)
    };
    if !out.ends_with('\n') {
        out.push('\n');
    }
    let aliases = pod
        .spec
        .iter()
        .flat_map(|s| s.host_aliases.iter().flatten());
    let mut header = "\n# Entries added by HostAliases.\n";
    for alias in aliases {
        let names = alias.hostnames.as_deref().unwrap_or_default().join("\t");
        let _ = writeln!(out, "{header}{}\t{names}", alias.ip);
        header = "";
    }
    out
}

fn own_names(pod: &Pod, pod_ips: &[IpAddr], environment: &Environment) -> String {
    let mut out = String::from("# Kubernetes-managed hosts file.\n");
    for (ip, names) in LOCAL_NAMES {
        let _ = writeln!(out, "{ip}\t{names}");
    }
    let name = dns::hostname(pod, environment);
    for ip in pod_ips {
        let _ = match &name.fqdn {
            Some(fqdn) => writeln!(out, "{ip}\t{fqdn}\t{}", name.hostname),
            None => writeln!(out, "{ip}\t{}", name.hostname),
        };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::testing::{environment, pod};
    use serde_json::json;

    const LOCAL: &str = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
        fe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\n\
        fe00::2\tip6-allrouters\n";

    #[test]
    fn the_file_of_each_kind_of_pod() {
        let ips = ["10.1.0.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        for (name, spec, want) in [
            (
                "plain",
                json!({"containers": []}),
                format!("# Kubernetes-managed hosts file.\n{LOCAL}10.1.0.2\tweb\nfd00::2\tweb\n"),
            ),
            (
                "with a domain and aliases",
                json!({"containers": [], "hostname": "h", "subdomain": "s", "hostAliases": [
                    {"ip": "1.2.3.4", "hostnames": ["a", "b"]}, {"ip": "5.6.7.8", "hostnames": ["c"]}]}),
                format!(
                    "# Kubernetes-managed hosts file.\n{LOCAL}\
                     10.1.0.2\th.s.n.svc.cluster.local\th\nfd00::2\th.s.n.svc.cluster.local\th\n\
                     \n# Entries added by HostAliases.\n1.2.3.4\ta\tb\n5.6.7.8\tc\n"
                ),
            ),
            (
                "on the host's network",
                json!({"containers": [], "hostNetwork": true,
                    "hostAliases": [{"ip": "1.2.3.4", "hostnames": ["a"]}]}),
                "# Kubernetes-managed hosts file (host network).\n127.0.0.1 dev\n\
                 \n# Entries added by HostAliases.\n1.2.3.4\ta\n"
                    .into(),
            ),
        ] {
            let pod = pod(json!({"metadata": {"name": "web", "namespace": "n"}, "spec": spec}));
            let got = hosts_file_content(&pod, &ips, "127.0.0.1 dev", &environment());
            assert_eq!(got, want, "{name}");
        }
    }
}
