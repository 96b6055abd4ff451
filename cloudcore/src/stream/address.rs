//! Where the API server reaches this replica: the address that Nodes report.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use serde_json::{Value, json};
use tokio::net::UdpSocket;

/// How a Node reports the address. The API server tries the types in an order of its own
/// (`--kubelet-preferred-address-types`: Hostname before InternalIP by default), so a Node has one
/// address and no entry of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AddressType {
    #[default]
    InternalIp,
    /// The IP address as a `Hostname`: for k3s, which sends what goes to an InternalIP through a
    /// tunnel of its own.
    Hostname,
}

impl AddressType {
    pub fn as_str(self) -> &'static str {
        match self {
            AddressType::InternalIp => "InternalIP",
            AddressType::Hostname => "Hostname",
        }
    }

    /// One entry of `status.addresses`.
    pub fn entry(self, address: IpAddr) -> Value {
        json!({"type": self.as_str(), "address": address.to_string()})
    }
}

impl fmt::Display for AddressType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for AddressType {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [AddressType::InternalIp, AddressType::Hostname]
            .into_iter()
            .find(|kind| kind.as_str() == text)
            .ok_or_else(|| format!("{text:?} is none of InternalIP, Hostname"))
    }
}

/// There is no address that another machine could dial.
#[derive(Debug, thiserror::Error)]
#[error(
    "this machine has no address that the API server could reach: give --kubelet-address IP, the one under which it reaches this CloudCore"
)]
pub struct NoAddress;

/// What is known of this replica's addresses.
#[derive(Debug, Clone, Default)]
pub(super) struct Known {
    /// `--kubelet-address`.
    pub told: Option<IpAddr>,
    /// `POD_IP`, which the chart sets by the downward API.
    pub pod: Option<IpAddr>,
    /// Of the hub.
    pub listen: Option<IpAddr>,
    /// What the kernel would send from towards the API server.
    pub outgoing: Option<IpAddr>,
    /// Of all interfaces.
    pub interfaces: Vec<IpAddr>,
}

impl Known {
    /// Asks the environment and the kernel; connecting a UDP socket sends nothing.
    pub(super) async fn find(told: Option<IpAddr>, listen: IpAddr, server: &http::Uri) -> Self {
        Self {
            told,
            pod: std::env::var("POD_IP").ok().and_then(|ip| ip.parse().ok()),
            listen: Some(listen),
            outgoing: outgoing(server).await,
            interfaces: interfaces(),
        }
    }

    /// The first that holds: told, the Pod's, the hub's own, the one towards the API server, any.
    pub(super) fn choose(&self) -> Result<IpAddr, NoAddress> {
        let specific = |ip: &IpAddr| !ip.is_unspecified() && !ip.is_loopback();
        let given = self.told.or(self.pod);
        let found = given.or(self.listen.filter(specific));
        let found = found.or(self.outgoing.filter(is_global));
        let found = found.or_else(|| self.interfaces.iter().copied().find(is_global));
        found.ok_or(NoAddress)
    }
}

/// Another machine can dial it: neither loopback nor of one link only. The API server's proxy
/// refuses the others.
fn is_global(ip: &IpAddr) -> bool {
    let of_a_link = match ip {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    !(ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || of_a_link)
}

async fn outgoing(server: &http::Uri) -> Option<IpAddr> {
    let host = server.host()?.trim_matches(['[', ']']);
    let port = server.port_u16().unwrap_or(443);
    let target = tokio::net::lookup_host((host, port)).await.ok()?.next()?;
    let any: SocketAddr = if target.is_ipv4() {
        ([0, 0, 0, 0], 0).into()
    } else {
        ([0_u16; 8], 0).into()
    };
    let socket = UdpSocket::bind(any).await.ok()?;
    socket.connect(target).await.ok()?;
    Some(socket.local_addr().ok()?.ip())
}

fn interfaces() -> Vec<IpAddr> {
    let Ok(all) = nix::ifaddrs::getifaddrs() else {
        return Vec::new();
    };
    let ip = |storage: nix::sys::socket::SockaddrStorage| {
        let v4 = storage.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
        v4.or_else(|| storage.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
    };
    all.filter_map(|one| ip(one.address?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_first_source_that_holds_is_taken() {
        let all = Known {
            told: Some(ip("192.0.2.1")),
            pod: Some(ip("10.244.0.9")),
            listen: Some(ip("192.0.2.2")),
            outgoing: Some(ip("192.0.2.3")),
            interfaces: vec![ip("127.0.0.1"), ip("fe80::1"), ip("192.0.2.4")],
        };
        let choice = |known: &Known| known.choose().unwrap().to_string();
        let mut known = all.clone();
        assert_eq!(choice(&known), "192.0.2.1");
        known.told = None;
        assert_eq!(choice(&known), "10.244.0.9");
        known.pod = None;
        assert_eq!(choice(&known), "192.0.2.2");
        for unspecific in ["0.0.0.0", "::", "127.0.0.1"] {
            known.listen = Some(ip(unspecific));
            assert_eq!(choice(&known), "192.0.2.3", "{unspecific}");
        }
        for own in ["127.0.0.1", "169.254.1.1", "fe80::1", "::1"] {
            known.outgoing = Some(ip(own));
            assert_eq!(choice(&known), "192.0.2.4", "{own}");
        }
        known.interfaces = vec![ip("127.0.0.1")];
        assert!(known.choose().is_err());
        // Whoever tells it knows why.
        known.told = Some(ip("127.0.0.1"));
        assert_eq!(choice(&known), "127.0.0.1");
    }

    #[test]
    fn an_address_is_reported_as_one_entry_and_never_by_name() {
        let entry = AddressType::Hostname.entry(ip("10.244.0.9"));
        assert_eq!(entry, json!({"type": "Hostname", "address": "10.244.0.9"}));
        assert_eq!("InternalIP".parse(), Ok(AddressType::InternalIp));
        assert!("ExternalIP".parse::<AddressType>().is_err());
    }
}
