//! What a Pod's resolv.conf and host name are (pure).

use k8s_openapi::api::core::v1::Pod;

use crate::node::environment::Environment;

/// A Pod's resolver configuration, as CRI's `DNSConfig` wants it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DnsPlan {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
    /// For an Event: reason (`DNSConfigForming`, `MissingClusterDNS`) and message.
    pub warning: Option<(&'static str, String)>,
}

/// A Pod's name in its own network namespace.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Hostname {
    /// The first label: `spec.hostname`, or the Pod's name cut to 63 characters.
    pub hostname: String,
    /// `HOST.SUBDOMAIN.NS.svc.DOMAIN` where the Pod has a subdomain.
    pub fqdn: Option<String>,
    /// What the sandbox is given: empty on the host's network, the FQDN with setHostnameAsFQDN.
    pub sandbox: String,
    /// Why no sandbox can be made with this name.
    pub problem: Option<String>,
}

/// The Pod's resolver configuration; `host_resolv_conf` is the device's own file.
pub fn dns_config(_pod: &Pod, _environment: &Environment, host_resolv_conf: &str) -> DnsPlan {
    let servers = host_resolv_conf.lines();
    let servers = servers.filter_map(|l| l.strip_prefix("nameserver "));
    DnsPlan {
        servers: servers.map(|s| s.trim().to_owned()).collect(),
        ..DnsPlan::default()
    }
}

/// The Pod's host name.
pub fn hostname(pod: &Pod, _environment: &Environment) -> Hostname {
    let name = pod.metadata.name.clone().unwrap_or_default();
    Hostname {
        sandbox: name.clone(),
        hostname: name,
        ..Hostname::default()
    }
}
