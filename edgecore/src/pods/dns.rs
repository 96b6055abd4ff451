//! What a Pod's resolv.conf and host name are (pure).
//!
//! Takes the Pod, what the node is, and the text of the device's own resolv.conf; gives what CRI's
//! sandbox wants and the Event where something had to be cut or replaced.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Pod, PodDNSConfig};

use crate::node::environment::Environment;
use crate::store::events::EventType;

/// A Pod's resolver configuration, as CRI's `DNSConfig` wants it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DnsPlan {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
    /// For an Event: reason (`DNSConfigForming`, `MissingClusterDNS`) and message.
    pub remark: Option<(EventType, &'static str, String)>,
}

/// A Pod's name in its own network namespace.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Hostname {
    /// The first label: `spec.hostname`, or the Pod's name cut to 63 characters.
    pub hostname: String,
    /// `HOST.SUBDOMAIN.NS.svc.DOMAIN` where the Pod has a subdomain.
    pub fqdn: Option<String>,
    /// What the sandbox is given: empty on the host's network (runtimes refuse any other), the FQDN
    /// with `setHostnameAsFQDN`.
    pub sandbox: String,
    /// Why no sandbox can be made with this name.
    pub problem: Option<String>,
}

/// The limits that the resolvers of common C libraries have (resolv.conf(5)), since Kubernetes
/// 1.28 for the searches.
const MAX_SERVERS: usize = 3;
const MAX_SEARCHES: usize = 32;
const MAX_SEARCH_CHARS: usize = 2048;
/// A label of a name (RFC 1035), and the kernel's limit on a host name.
const MAX_LABEL: usize = 63;
const MAX_HOSTNAME: usize = 64;

/// What a resolv.conf(5) says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ResolvConf {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

/// Reads a resolv.conf: of `search` and `options` the last line counts.
pub fn parse_resolv_conf(text: &str) -> ResolvConf {
    let mut conf = ResolvConf::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let keyword = words.next();
        let rest = words.map(str::to_owned);
        match keyword {
            // A scope ("%eth0") means nothing in a Pod.
            Some("nameserver") => conf.servers.extend(
                rest.take(1)
                    .filter_map(|s| s.split('%').next().map(str::to_owned)),
            ),
            Some("search" | "domain") => {
                let searches = rest.map(|s| s.trim_end_matches('.').to_owned());
                conf.searches = searches.filter(|s| !s.is_empty()).collect();
            }
            Some("options") => conf.options = rest.collect(),
            _ => {}
        }
    }
    conf
}

/// Whose resolver a Pod uses.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Policy {
    Cluster,
    Host,
    Own,
}

/// The Pod's resolver configuration; `host_resolv_conf` is the text of the device's own.
pub fn dns_config(pod: &Pod, environment: &Environment, host_resolv_conf: &str) -> DnsPlan {
    let spec = pod.spec.as_ref();
    let on_host = spec.and_then(|s| s.host_network) == Some(true);
    let asked = spec
        .and_then(|s| s.dns_policy.as_deref())
        .unwrap_or("ClusterFirst");
    let policy = match asked {
        "None" => Policy::Own,
        "Default" => Policy::Host,
        "ClusterFirst" if on_host => Policy::Host,
        _ => Policy::Cluster,
    };
    let host = parse_resolv_conf(host_resolv_conf);
    let mut plan = match (policy, environment.cluster_dns) {
        (Policy::Own, _) => DnsPlan::default(),
        (Policy::Cluster, Some(ip)) => cluster(pod, environment, ip, host),
        (Policy::Cluster, None) => DnsPlan {
            // A cluster without DNS is one that an edge can do without: no fault of the Pod's.
            remark: Some((
                EventType::Normal,
                "MissingClusterDNS",
                format!(
                    "the cluster has no DNS Service that this node knows of, so the Pod's DNS \
                     policy {asked:?} falls back to \"Default\""
                ),
            )),
            ..of_host(host, on_host, None)
        },
        (Policy::Host, dns) => of_host(host, on_host, dns),
    };
    if let Some(own) = spec.and_then(|s| s.dns_config.as_ref()) {
        merge(&mut plan, own);
    }
    let cut = bound(&mut plan);
    plan.remark = plan.remark.or(cut);
    plan
}

fn cluster(pod: &Pod, environment: &Environment, dns: IpAddr, host: ResolvConf) -> DnsPlan {
    let domain = &environment.cluster_domain;
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let mut searches = vec![
        format!("{namespace}.svc.{domain}"),
        format!("svc.{domain}"),
        domain.clone(),
    ];
    append_new(&mut searches, host.searches);
    DnsPlan {
        servers: vec![dns.to_string()],
        searches,
        options: vec!["ndots:5".into()],
        remark: None,
    }
}

/// The device's own resolvers. A stub on the device's loopback is not reachable from a Pod's
/// network: the node's forwarder, which asks that stub, stands in for it.
fn of_host(host: ResolvConf, on_host: bool, dns: Option<IpAddr>) -> DnsPlan {
    let loopback = |s: &String| s.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    let mut servers = host.servers;
    if !on_host {
        servers.retain(|s| !loopback(s));
        if servers.is_empty() {
            servers.extend(dns.map(|ip| ip.to_string()));
        }
    }
    DnsPlan {
        servers,
        searches: host.searches,
        options: host.options,
        remark: None,
    }
}

fn append_new(list: &mut Vec<String>, more: impl IntoIterator<Item = String>) {
    for item in more {
        if !list.contains(&item) {
            list.push(item);
        }
    }
}

/// The Pod's own `dnsConfig` on top: options of the same name replace.
fn merge(plan: &mut DnsPlan, own: &PodDNSConfig) {
    append_new(&mut plan.servers, own.nameservers.iter().flatten().cloned());
    append_new(&mut plan.searches, own.searches.iter().flatten().cloned());
    for option in own.options.iter().flatten() {
        let Some(name) = &option.name else { continue };
        plan.options.retain(|o| o.split(':').next() != Some(name));
        plan.options.push(match option.value.as_deref() {
            Some(value) if !value.is_empty() => format!("{name}:{value}"),
            _ => name.clone(),
        });
    }
}

/// Cuts the plan to what resolvers take; tells what was left out.
fn bound(plan: &mut DnsPlan) -> Option<(EventType, &'static str, String)> {
    let mut cut = Vec::new();
    if plan.servers.len() > MAX_SERVERS {
        plan.servers.truncate(MAX_SERVERS);
        cut.push(format!(
            "the applied nameserver line is: {}",
            plan.servers.join(" ")
        ));
    }
    let mut chars = 0;
    let before = plan.searches.len();
    let mut fits = |s: &String| {
        chars += s.len() + 1;
        chars <= MAX_SEARCH_CHARS + 1
    };
    let kept = plan
        .searches
        .iter()
        .take(MAX_SEARCHES)
        .take_while(|s| fits(s))
        .count();
    plan.searches.truncate(kept);
    if kept < before {
        cut.push(format!(
            "the applied search line is: {}",
            plan.searches.join(" ")
        ));
    }
    if cut.is_empty() {
        return None;
    }
    let message = format!(
        "DNS limits were exceeded, some entries were omitted; {}",
        cut.join("; ")
    );
    Some((EventType::Warning, "DNSConfigForming", message))
}

/// The Pod's host name.
pub fn hostname(pod: &Pod, environment: &Environment) -> Hostname {
    let spec = pod.spec.as_ref();
    let set = |name: Option<&String>| name.filter(|n| !n.is_empty()).cloned();
    let own = set(spec.and_then(|s| s.hostname.as_ref()));
    let hostname = own.unwrap_or_else(|| cut(pod.metadata.name.as_deref().unwrap_or_default()));
    let subdomain = set(spec.and_then(|s| s.subdomain.as_ref()));
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let domain = &environment.cluster_domain;
    let fqdn = subdomain.map(|s| format!("{hostname}.{s}.{namespace}.svc.{domain}"));
    let as_fqdn = spec.and_then(|s| s.set_hostname_as_fqdn) == Some(true);
    let on_host = spec.and_then(|s| s.host_network) == Some(true);
    let sandbox = match &fqdn {
        _ if on_host => String::new(),
        Some(fqdn) if as_fqdn => fqdn.clone(),
        Some(_) | None => hostname.clone(),
    };
    let problem = (sandbox.len() > MAX_HOSTNAME).then(|| {
        format!(
            "failed to construct FQDN from pod hostname and cluster domain, FQDN {sandbox} is too \
             long ({MAX_HOSTNAME} characters is the max, {} characters requested): shorten the \
             Pod's hostname or subdomain, or unset setHostnameAsFQDN",
            sandbox.len()
        )
    });
    Hostname {
        hostname,
        fqdn,
        sandbox,
        problem,
    }
}

/// A Pod's name as one label.
fn cut(name: &str) -> String {
    let short = name.get(..MAX_LABEL).unwrap_or(name);
    if short.len() == name.len() {
        return short.to_owned();
    }
    short.trim_end_matches(['-', '.']).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::testing::{environment, pod};
    use serde_json::{Value, json};

    const HOST: &str = "# made by hand\nnameserver 192.0.2.53\nnameserver fe80::1%eth0\n\
        search old.example\nsearch lan.example. \noptions edns0 timeout:1\nsortlist 1.2.3.4\n";

    fn plan(spec: Value, host: &str) -> DnsPlan {
        let pod = pod(json!({"metadata": {"name": "web", "namespace": "shop"}, "spec": spec}));
        dns_config(&pod, &environment(), host)
    }

    fn shown(plan: &DnsPlan) -> [String; 3] {
        [&plan.servers, &plan.searches, &plan.options].map(|l| l.join(" "))
    }

    #[test]
    fn each_policy_has_its_resolvers() {
        let cluster = [
            "10.96.0.10",
            "shop.svc.cluster.local svc.cluster.local cluster.local lan.example",
            "ndots:5",
        ];
        let host = ["192.0.2.53 fe80::1", "lan.example", "edns0 timeout:1"];
        let own = json!({"nameservers": ["1.1.1.1"], "searches": ["a.b"],
            "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}]});
        for (spec, want) in [
            (json!({"containers": []}), cluster),
            (
                json!({"containers": [], "dnsPolicy": "ClusterFirst"}),
                cluster,
            ),
            (
                json!({"containers": [], "dnsPolicy": "ClusterFirst", "hostNetwork": true}),
                host,
            ),
            (
                json!({"containers": [], "dnsPolicy": "ClusterFirstWithHostNet", "hostNetwork": true}),
                cluster,
            ),
            (json!({"containers": [], "dnsPolicy": "Default"}), host),
            (
                json!({"containers": [], "dnsPolicy": "None", "dnsConfig": own}),
                ["1.1.1.1", "a.b", "ndots:2 edns0"],
            ),
            (
                json!({"containers": [], "dnsPolicy": "ClusterFirst", "dnsConfig": own}),
                [
                    "10.96.0.10 1.1.1.1",
                    "shop.svc.cluster.local svc.cluster.local cluster.local lan.example a.b",
                    "ndots:2 edns0",
                ],
            ),
        ] {
            let plan = plan(spec.clone(), HOST);
            assert_eq!(shown(&plan), want, "{spec}");
            assert_eq!(plan.remark, None);
        }
    }

    #[test]
    fn a_stub_on_loopback_is_replaced_for_pods_but_not_on_the_hosts_network() {
        let stub = "nameserver 127.0.0.53\n";
        let default = plan(json!({"containers": [], "dnsPolicy": "Default"}), stub);
        assert_eq!(default.servers, ["10.96.0.10"]);
        let on_host = plan(json!({"containers": [], "hostNetwork": true}), stub);
        assert_eq!(on_host.servers, ["127.0.0.53"]);
    }

    #[test]
    fn without_cluster_dns_the_devices_resolvers_serve() {
        let mut environment = environment();
        environment.cluster_dns = None;
        let pod = pod(json!({"metadata": {"name": "p"}, "spec": {"containers": []}}));
        let plan = dns_config(&pod, &environment, HOST);
        assert_eq!(plan.servers, ["192.0.2.53", "fe80::1"]);
        let (kind, reason, _) = plan.remark.unwrap();
        assert_eq!((kind, reason), (EventType::Normal, "MissingClusterDNS"));
    }

    #[test]
    fn what_resolvers_do_not_take_is_cut_and_told() {
        let many = json!({"nameservers": ["1.1.1.1", "2.2.2.2", "3.3.3.3"],
            "searches": (0..40).map(|n| format!("d{n}")).collect::<Vec<_>>()});
        let cut = plan(json!({"containers": [], "dnsConfig": many}), "");
        assert_eq!(cut.servers, ["10.96.0.10", "1.1.1.1", "2.2.2.2"]);
        assert_eq!(cut.searches.len(), 32);
        let (kind, reason, message) = cut.remark.unwrap();
        assert_eq!((kind, reason), (EventType::Warning, "DNSConfigForming"));
        assert!(message.contains("10.96.0.10 1.1.1.1 2.2.2.2"), "{message}");
        let long: Vec<_> = (0..20).map(|n| format!("{n}{}", "x".repeat(200))).collect();
        let cut = plan(
            json!({"containers": [], "dnsPolicy": "None", "dnsConfig": {"searches": long}}),
            "",
        );
        assert_eq!(cut.searches.len(), 10);
        assert!(cut.searches.join(" ").len() <= MAX_SEARCH_CHARS);
    }

    #[test]
    fn host_names() {
        let long = format!("{}.{}", "a".repeat(62), "b".repeat(20));
        for (name, spec, host, fqdn, sandbox, problem) in [
            ("web", json!({}), "web", None, "web", false),
            ("web", json!({"hostname": "h"}), "h", None, "h", false),
            (&long, json!({}), &long[..62], None, &long[..62], false),
            ("web", json!({"hostNetwork": true}), "web", None, "", false),
            (
                "web",
                json!({"subdomain": "s"}),
                "web",
                Some("web.s.shop.svc.cluster.local"),
                "web",
                false,
            ),
            (
                "web",
                json!({"subdomain": "s", "setHostnameAsFQDN": true}),
                "web",
                Some("web.s.shop.svc.cluster.local"),
                "web.s.shop.svc.cluster.local",
                false,
            ),
            (
                "web",
                json!({"setHostnameAsFQDN": true}),
                "web",
                None,
                "web",
                false,
            ),
        ] {
            let mut spec = spec;
            spec["containers"] = json!([]);
            let pod = pod(json!({"metadata": {"name": name, "namespace": "shop"}, "spec": spec}));
            let got = hostname(&pod, &environment());
            assert_eq!(got.hostname, host);
            assert_eq!(got.fqdn.as_deref(), fqdn);
            assert_eq!(got.sandbox, sandbox);
            assert_eq!(got.problem.is_some(), problem);
        }
        let pod = pod(
            json!({"metadata": {"name": "w".repeat(60), "namespace": "shop"},
            "spec": {"containers": [], "subdomain": "s", "setHostnameAsFQDN": true}}),
        );
        assert!(
            hostname(&pod, &environment())
                .problem
                .unwrap()
                .contains("is too long (64 characters is the max, ")
        );
    }
}
