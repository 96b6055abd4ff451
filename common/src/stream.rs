//! Tunnels: how a request to a node's kubelet API crosses the hub.
//!
//! A tunnel is one stream of the node's connection, opened by the cloud. Behind its head it carries
//! plain HTTP/1.1: one request, its answer, and after `101 Switching Protocols` the bytes of both
//! directions untouched. So the cloud needs to know of a request only what it takes to judge it
//! ([`request`]), and an edge may lag it by years.
//!
//! Owns what both ends must agree on: the grammar of requests, which headers cross, and how the two
//! directions of an upgraded connection end.

pub mod gate;
pub mod request;
pub mod splice;

use http::header::{HeaderMap, HeaderName};

/// What a tunnel may hold ahead of its reader at one end, besides the stream's window.
pub const BUFFER: usize = 32 * 1024;

/// A request's head with a long command line is well below it; hyper grows its buffer towards it
/// only when a head needs it.
pub const LONGEST_HEAD: usize = 128 * 1024;

/// What the two ends of an upgrade say to one another. Nothing else crosses: not who asked
/// (`Authorization`, cookies), nor through whom (`X-Forwarded-*`), which are no business of a device.
const CARRIED: &[&str] = &[
    "accept",
    "connection",
    "content-length",
    "content-type",
    "sec-websocket-accept",
    "sec-websocket-extensions",
    "sec-websocket-key",
    "sec-websocket-protocol",
    "sec-websocket-version",
    "upgrade",
    "x-stream-protocol-version",
];

/// The headers of a request or an answer that cross.
pub fn carried(headers: &HeaderMap) -> HeaderMap {
    let crosses = |name: &HeaderName| CARRIED.contains(&name.as_str());
    let kept = headers.iter().filter(|(name, _)| crosses(name));
    let mut result = HeaderMap::with_capacity(CARRIED.len());
    for (name, value) in kept {
        result.append(name.clone(), value.clone());
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asked_stays_in_the_cloud() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("authorization", "Bearer hunter2"),
            ("cookie", "a=b"),
            ("x-forwarded-for", "192.0.2.1"),
            ("upgrade", "SPDY/3.1"),
            ("x-stream-protocol-version", "v4.channel.k8s.io"),
            ("x-stream-protocol-version", "v5.channel.k8s.io"),
        ] {
            headers.append(HeaderName::from_static(name), value.parse().unwrap());
        }
        let kept = carried(&headers);
        assert_eq!(kept.len(), 3);
        let versions = kept.get_all("x-stream-protocol-version").iter();
        assert_eq!(versions.count(), 2, "every line of it");
    }
}
