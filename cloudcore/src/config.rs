//! What `cloudcore run` is told: flags, then environment, then the file, then defaults.
//!
//! The file is one flat YAML map whose keys are the flags' names in camelCase. An unknown key or a
//! value of the wrong kind is refused with its path and, for a key, the nearest valid name.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use common::hub::transport::LinkConfig;
use serde_json::{Map, Value};

use crate::kube::Impersonation;
use crate::stream::{AddressType, PortRange, Serving};

/// The port of the hub, UDP and TCP.
pub const DEFAULT_PORT: u16 = 10000;

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error(transparent)]
    File(#[from] common::config::ConfigError),
    #[error("configuration file {path}: {key}: {why}")]
    BadValue {
        path: String,
        key: &'static str,
        why: String,
    },
}

/// A host and a port to be dialled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPort {
    pub host: String,
    pub port: u16,
}

impl FromStr for HostPort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not HOST:PORT (an IPv6 address stands in brackets)");
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let port = port.parse().ok().filter(|p| *p != 0).ok_or_else(wrong)?;
        let host = match host.strip_prefix('[') {
            Some(rest) => {
                let v6 = rest.strip_suffix(']').ok_or_else(wrong)?;
                v6.parse::<Ipv6Addr>().map_err(|_| wrong())?;
                v6
            }
            None => host,
        };
        let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-');
        let v6 = host.contains(':') && text.starts_with('[');
        if host.is_empty() || host.len() > 253 || !(v6 || host.bytes().all(good)) {
            return Err(wrong());
        }
        Ok(Self {
            host: host.to_string(),
            port,
        })
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// Settings as one source gives them; what is absent, another source or the default decides.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Settings {
    pub kubeconfig: Option<PathBuf>,
    pub listen: Option<SocketAddr>,
    pub advertise: Option<Vec<HostPort>>,
    pub admin: Option<SocketAddr>,
    pub impersonation: Option<Impersonation>,
    pub taint_nodes: Option<bool>,
    pub dead_after: Option<Duration>,
    pub certificate_lifetime: Option<Duration>,
    pub reenrol_grace: Option<Duration>,
    pub cluster_domain: Option<String>,
    pub cluster_dns: Option<IpAddr>,
    pub cluster_ranges: Option<Vec<String>>,
    pub kubelet_address: Option<IpAddr>,
    pub kubelet_address_type: Option<AddressType>,
    pub kubelet_ports: Option<PortRange>,
    pub kubelet_serving_certificate: Option<Serving>,
    pub log: Option<String>,
}

/// The settings that `cloudcore run` works with.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub kubeconfig: Option<PathBuf>,
    /// Of the hub, UDP and TCP.
    pub listen: SocketAddr,
    /// Where devices dial; every replica is given the same.
    pub advertise: Vec<HostPort>,
    /// Of health, metrics and the session dump.
    pub admin: SocketAddr,
    pub impersonation: Impersonation,
    /// Whether new Nodes get the taint `node-role.kubernetes.io/edge:NoSchedule`.
    pub taint_nodes: bool,
    /// The longest silence before an end takes the link for dead.
    pub dead_after: Duration,
    pub certificate_lifetime: Duration,
    pub reenrol_grace: Duration,
    pub cluster_domain: String,
    /// Of Pods; asked from Service `kube-system/kube-dns` when not set.
    pub cluster_dns: Option<IpAddr>,
    /// CIDRs that a node's own Pod range must not overlap.
    pub cluster_ranges: Vec<String>,
    /// Where the API server reaches this replica's kubelet endpoints; found out when not set.
    pub kubelet_address: Option<IpAddr>,
    pub kubelet_address_type: AddressType,
    /// One for each node.
    pub kubelet_ports: PortRange,
    pub kubelet_serving_certificate: Serving,
    /// A `tracing` filter.
    pub log: String,
}

impl Settings {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        Self::parse(&common::config::text(path)?, path)
    }

    /// Parses a file's text; `path` is for the errors.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let map: Map<String, Value> = common::config::parse(path, text)?;
        let mut settings = Self::default();
        for (key, value) in &map {
            settings.set(key, value, path)?;
        }
        Ok(settings)
    }

    fn set(&mut self, key: &str, value: &Value, path: &Path) -> Result<(), ConfigError> {
        let Some((known, setter)) = KEYS.iter().find(|(known, _)| *known == key) else {
            let known: Vec<_> = KEYS.iter().map(|(known, _)| *known).collect();
            return Err(common::config::unknown_key(path, key, &known).into());
        };
        setter(self, value).map_err(|why| ConfigError::BadValue {
            path: path.display().to_string(),
            key: known,
            why,
        })
    }

    /// What is absent here is taken from `other`.
    pub fn or(self, other: Self) -> Self {
        Self {
            kubeconfig: self.kubeconfig.or(other.kubeconfig),
            listen: self.listen.or(other.listen),
            advertise: self.advertise.or(other.advertise),
            admin: self.admin.or(other.admin),
            impersonation: self.impersonation.or(other.impersonation),
            taint_nodes: self.taint_nodes.or(other.taint_nodes),
            dead_after: self.dead_after.or(other.dead_after),
            certificate_lifetime: self.certificate_lifetime.or(other.certificate_lifetime),
            reenrol_grace: self.reenrol_grace.or(other.reenrol_grace),
            cluster_domain: self.cluster_domain.or(other.cluster_domain),
            cluster_dns: self.cluster_dns.or(other.cluster_dns),
            cluster_ranges: self.cluster_ranges.or(other.cluster_ranges),
            kubelet_address: self.kubelet_address.or(other.kubelet_address),
            kubelet_address_type: self.kubelet_address_type.or(other.kubelet_address_type),
            kubelet_ports: self.kubelet_ports.or(other.kubelet_ports),
            kubelet_serving_certificate: self
                .kubelet_serving_certificate
                .or(other.kubelet_serving_certificate),
            log: self.log.or(other.log),
        }
    }

    /// Fills in the defaults.
    pub fn complete(self) -> Config {
        let days = |n: u64| Duration::from_secs(n * 86_400);
        let listen = self
            .listen
            .unwrap_or((Ipv4Addr::UNSPECIFIED, DEFAULT_PORT).into());
        Config {
            kubeconfig: self.kubeconfig,
            listen,
            advertise: self.advertise.unwrap_or_else(|| vec![own_address(listen)]),
            admin: self.admin.unwrap_or((Ipv4Addr::LOCALHOST, 10080).into()),
            impersonation: self.impersonation.unwrap_or_default(),
            taint_nodes: self.taint_nodes.unwrap_or(true),
            dead_after: self.dead_after.unwrap_or(Duration::from_secs(45)),
            certificate_lifetime: self.certificate_lifetime.unwrap_or(days(90)),
            reenrol_grace: self.reenrol_grace.unwrap_or(days(180)),
            cluster_domain: self
                .cluster_domain
                .unwrap_or_else(|| "cluster.local".into()),
            cluster_dns: self.cluster_dns,
            cluster_ranges: self.cluster_ranges.unwrap_or_default(),
            kubelet_address: self.kubelet_address,
            kubelet_address_type: self.kubelet_address_type.unwrap_or_default(),
            kubelet_ports: self.kubelet_ports.unwrap_or_default(),
            kubelet_serving_certificate: self.kubelet_serving_certificate.unwrap_or_default(),
            log: self.log.unwrap_or_else(|| "info".into()),
        }
    }
}

/// The address that other machines most likely reach this one by. Connecting a UDP socket sends
/// nothing: it asks the kernel which address would be used.
fn own_address(listen: SocketAddr) -> HostPort {
    let ip = if listen.ip().is_unspecified() {
        let outgoing = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).and_then(|socket| {
            socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9))?;
            socket.local_addr()
        });
        outgoing.map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |address| address.ip())
    } else {
        listen.ip()
    };
    HostPort {
        host: ip.to_string(),
        port: listen.port(),
    }
}

type Setter = fn(&mut Settings, &Value) -> Result<(), String>;

/// Every key of the file.
const KEYS: &[(&str, Setter)] = &[
    ("kubeconfig", |s, v| {
        put(&mut s.kubeconfig, v, |t| Ok(t.into()))
    }),
    ("listen", |s, v| put(&mut s.listen, v, address)),
    ("advertise", |s, v| put(&mut s.advertise, v, advertised)),
    ("admin", |s, v| put(&mut s.admin, v, address)),
    ("impersonation", |s, v| {
        put(&mut s.impersonation, v, str::parse)
    }),
    ("taintNodes", |s, v| {
        s.taint_nodes = Some(v.as_bool().ok_or_else(|| wrong_kind("true or false", v))?);
        Ok(())
    }),
    ("deadAfter", |s, v| put(&mut s.dead_after, v, dead_after)),
    ("certificateLifetime", |s, v| {
        put(&mut s.certificate_lifetime, v, duration)
    }),
    ("reenrolGrace", |s, v| {
        put(&mut s.reenrol_grace, v, duration)
    }),
    ("clusterDomain", |s, v| {
        put(&mut s.cluster_domain, v, |t| Ok(t.into()))
    }),
    ("clusterDns", |s, v| put(&mut s.cluster_dns, v, ip)),
    ("clusterRanges", |s, v| {
        put(&mut s.cluster_ranges, v, ranges)
    }),
    ("kubeletAddress", |s, v| put(&mut s.kubelet_address, v, ip)),
    ("kubeletAddressType", |s, v| {
        put(&mut s.kubelet_address_type, v, str::parse)
    }),
    ("kubeletPorts", |s, v| {
        put(&mut s.kubelet_ports, v, str::parse)
    }),
    ("kubeletServingCertificate", |s, v| {
        put(&mut s.kubelet_serving_certificate, v, str::parse)
    }),
    ("log", |s, v| put(&mut s.log, v, |t| Ok(t.into()))),
];

fn put<T>(
    place: &mut Option<T>,
    value: &Value,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<(), String> {
    let list: Option<Vec<_>> = value
        .as_array()
        .map(|all| all.iter().filter_map(Value::as_str).collect());
    let text = match (value.as_str(), list) {
        (Some(text), _) => text.to_string(),
        (None, Some(list)) if list.len() == value.as_array().map_or(0, Vec::len) => list.join(","),
        (None, _) => return Err(wrong_kind("a text", value)),
    };
    *place = Some(parse(&text)?);
    Ok(())
}

fn wrong_kind(want: &str, value: &Value) -> String {
    let found = match value {
        Value::Null => "nothing",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "a map",
    };
    format!("{want} belongs here, not {found}")
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| format!("{text:?} is not ADDRESS:PORT, as in 0.0.0.0:{DEFAULT_PORT}"))
}

fn ip(text: &str) -> Result<IpAddr, String> {
    text.parse()
        .map_err(|_| format!("{text:?} is not an IP address"))
}

/// `HOST:PORT`, or several with commas between.
pub fn advertised(text: &str) -> Result<Vec<HostPort>, String> {
    text.split(',').map(|one| one.trim().parse()).collect()
}

/// CIDRs with commas between.
pub fn ranges(text: &str) -> Result<Vec<String>, String> {
    let cidr = |one: &str| {
        let (ip, bits) = one.split_once('/')?;
        let ip: IpAddr = ip.parse().ok()?;
        let most = if ip.is_ipv4() { 32 } else { 128 };
        bits.parse::<u8>().ok().filter(|b| *b <= most)?;
        Some(one.to_string())
    };
    let parts = text.split(',').map(str::trim).filter(|one| !one.is_empty());
    parts
        .map(|one| cidr(one).ok_or_else(|| format!("{one:?} is not a range like 10.42.0.0/16")))
        .collect()
}

/// As devices take it.
pub fn dead_after(text: &str) -> Result<Duration, String> {
    let time = duration(text)?;
    match LinkConfig::DEAD_AFTER.contains(&time.as_secs()) {
        true => Ok(time),
        false => Err(format!("{text:?} is not between 5s and 1h")),
    }
}

/// A number and one of the units s, m, h, d.
pub fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a duration like 45s, 30m, 24h or 90d");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    let unit = match &text[digits.len()..] {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(wrong()),
    };
    // A century: everything longer is a slip, and would overflow a certificate's dates.
    let seconds = number
        .checked_mul(unit)
        .filter(|s| (1..=100 * 365 * 86_400).contains(s));
    seconds.map(Duration::from_secs).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        Settings::parse(text, Path::new("c.yaml"))
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn a_mistake_is_told_with_its_path_and_the_way_out() {
        for (text, want) in [
            (
                "lisen: 1",
                "c.yaml: there is no key \"lisen\"; did you mean \"listen\"?",
            ),
            (
                "taint-nodes: true",
                "there is no key \"taint-nodes\"; did you mean \"taintNodes\"?",
            ),
            ("reenrollGrace: 3d", "did you mean \"reenrolGrace\"?"),
            (
                "listen: 10000",
                "c.yaml: listen: a text belongs here, not a number",
            ),
            ("listen: here", "listen: \"here\" is not ADDRESS:PORT"),
            (
                "taintNodes: 'yes'",
                "taintNodes: true or false belongs here, not a text",
            ),
            (
                "advertise: [a:1, 2]",
                "advertise: a text belongs here, not a list",
            ),
            ("advertise: host", "\"host\" is not HOST:PORT"),
            (
                "deadAfter: 45",
                "deadAfter: a text belongs here, not a number",
            ),
            ("deadAfter: 45 parsecs", "is not a duration like 45s"),
            ("deadAfter: 4s", "\"4s\" is not between 5s and 1h"),
            ("deadAfter: 2h", "\"2h\" is not between 5s and 1h"),
            (
                "impersonation: maybe",
                "\"maybe\" is none of auto, constrained, direct",
            ),
            ("clusterRanges: 10.0.0.0/33", "is not a range like"),
            ("kubeletPorts: 20000", "kubeletPorts: a text belongs here"),
            ("kubeletPorts: 5-4", "\"5-4\" is no range of ports"),
            (
                "kubeletAddressType: ExternalIP",
                "\"ExternalIP\" is none of InternalIP, Hostname",
            ),
            (
                "kubeletServingCertificate: mine",
                "\"mine\" is none of auto, own, cluster",
            ),
            ("clusterDns: ten", "\"ten\" is not an IP address"),
            ("[1]", "configuration file c.yaml: "),
            ("a: [", "configuration file c.yaml: "),
        ] {
            assert!(error(text).contains(want), "{text}: {}", error(text));
        }
    }

    #[test]
    fn a_full_file_is_read_whole() {
        let text = "
kubeconfig: /etc/k
listen: 127.0.0.1:1
advertise: [a.example:443, '[2001:db8::1]:444']
admin: '[::1]:2'
impersonation: direct
taintNodes: false
deadAfter: 30s
certificateLifetime: 24h
reenrolGrace: 2d
clusterDomain: edge.local
clusterDns: 10.96.0.10
clusterRanges: [10.96.0.0/12, fd00::/64]
kubeletAddress: 10.244.0.9
kubeletAddressType: Hostname
kubeletPorts: 21000-21999
kubeletServingCertificate: cluster
log: debug
";
        let config = Settings::parse(text, Path::new("c")).unwrap().complete();
        assert_eq!(config.listen.to_string(), "127.0.0.1:1");
        let advertise: Vec<_> = config.advertise.iter().map(HostPort::to_string).collect();
        assert_eq!(advertise, ["a.example:443", "[2001:db8::1]:444"]);
        assert_eq!(config.admin.to_string(), "[::1]:2");
        assert_eq!(config.impersonation, Impersonation::Direct);
        assert!(!config.taint_nodes);
        assert_eq!(config.dead_after, Duration::from_secs(30));
        assert_eq!(config.certificate_lifetime, Duration::from_secs(86_400));
        assert_eq!(config.reenrol_grace, Duration::from_secs(2 * 86_400));
        assert_eq!(config.cluster_domain, "edge.local");
        assert_eq!(config.cluster_dns.unwrap().to_string(), "10.96.0.10");
        assert_eq!(config.cluster_ranges, ["10.96.0.0/12", "fd00::/64"]);
        assert_eq!(config.kubelet_address.unwrap().to_string(), "10.244.0.9");
        assert_eq!(config.kubelet_address_type, AddressType::Hostname);
        assert_eq!(config.kubelet_ports.to_string(), "21000-21999");
        assert_eq!(config.kubelet_serving_certificate, Serving::Cluster);
        assert_eq!(config.log, "debug");
        assert_eq!(config.kubeconfig.unwrap(), PathBuf::from("/etc/k"));
    }

    #[test]
    fn a_flag_goes_before_the_file_and_the_file_before_the_default() {
        let flags = Settings {
            log: Some("flag".into()),
            ..Settings::default()
        };
        let file = Settings::parse("{log: file, clusterDomain: file}", Path::new("c")).unwrap();
        let config = flags.or(file).complete();
        assert_eq!(config.log, "flag");
        assert_eq!(config.cluster_domain, "file");
        assert_eq!(config.listen.port(), DEFAULT_PORT);
        assert_eq!(config.advertise.len(), 1);
        assert_eq!(
            Settings::parse("", Path::new("c")).unwrap(),
            Settings::default()
        );
    }

    #[test]
    fn every_key_can_be_set_and_every_flag_has_its_key() {
        assert_eq!(KEYS.len(), 17);
        for (key, _) in KEYS {
            let shouted = format!("{}: x", key.to_uppercase());
            let meant = format!("did you mean {key:?}?");
            assert!(error(&shouted).ends_with(&meant), "{}", error(&shouted));
        }
    }

    #[test]
    fn a_place_to_dial_has_a_host_and_a_port() {
        for good in ["a:1", "a.example:65535", "10.0.0.1:10000", "[::1]:1"] {
            assert_eq!(good.parse::<HostPort>().unwrap().to_string(), good);
        }
        for bad in [
            "a", "a:0", ":1", "::1:1", "[a]:1", "[::1", "a b:1", "a:99999", "a/b:1",
        ] {
            assert!(bad.parse::<HostPort>().is_err(), "{bad}");
        }
    }
}
