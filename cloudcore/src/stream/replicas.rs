//! ConfigMap `edge-system/cloudcore-endpoints`: which replicas' addresses live, and which of their
//! ports rest. What its entries mean is pure.
//!
//! ```text
//! 10.0.0.1:            2026-01-02T00:10:00Z   said then that it lives
//! port-20001-10.0.0.1: 2026-01-02T00:07:30Z   was released then
//! ```

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, Client};
use serde_json::Value;

use super::ports::QUARANTINE;
use crate::kube::{KubeError, NAMESPACE, is_absent};

pub(super) const MAP: &str = "cloudcore-endpoints";

/// Three times what passes between two words of a replica, for clocks differ and an API server may
/// be away for a moment.
const ALIVE_FOR: Duration = Duration::from_secs(180);
/// Entries of replicas that are long gone are taken away.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(86_400);
/// Ports that one replica tells of, those released last: the whole has to fit into one object.
const MOST_RESTING: usize = 1000;

const PORT: &str = "port-";

type Data = BTreeMap<String, String>;

pub(super) fn maps(client: Client) -> Api<ConfigMap> {
    Api::namespaced(client, NAMESPACE)
}

/// The entries as they are; none while there is no such ConfigMap.
pub(super) async fn read(client: Client) -> Result<Data, KubeError> {
    let reading = KubeError::api(format!("reading ConfigMap {NAMESPACE}/{MAP}"));
    match maps(client).get(MAP).await {
        Ok(map) => Ok(map.data.unwrap_or_default()),
        Err(error) if is_absent(&error) => Ok(Data::new()),
        Err(error) => Err(reading(error)),
    }
}

pub(super) fn map(data: Data) -> ConfigMap {
    ConfigMap {
        metadata: kube::api::ObjectMeta {
            name: Some(MAP.into()),
            namespace: Some(NAMESPACE.into()),
            ..kube::api::ObjectMeta::default()
        },
        data: Some(data),
        ..ConfigMap::default()
    }
}

/// What the replica at `address` says: that it lives, and which of its ports rest for how long.
pub(super) fn told(address: IpAddr, mut resting: Vec<(u16, Duration)>, now: Timestamp) -> Data {
    resting.sort_unstable_by_key(|(_, left)| std::cmp::Reverse(*left));
    resting.truncate(MOST_RESTING);
    let released = |left| now.checked_sub(QUARANTINE.saturating_sub(left)).ok();
    let ports = resting.into_iter().filter_map(|(port, left)| {
        let key = format!("{PORT}{port}-{}", key(address));
        Some((key, released(left)?.to_string()))
    });
    ports.chain([(key(address), now.to_string())]).collect()
}

/// The ports of `address` that rest, and for how long from now on.
pub(super) fn resting(data: &Data, address: IpAddr, now: Timestamp) -> Vec<(u16, Duration)> {
    let address = key(address);
    let one = |(key, at): (&String, &String)| {
        let (port, of) = key.strip_prefix(PORT)?.split_once('-')?;
        let left = QUARANTINE.checked_sub(age(at, now)?)?;
        (*of == address).then_some((port.parse().ok()?, left))
    };
    data.iter().filter_map(one).collect()
}

/// The keys of a ConfigMap have no colons, IPv6 addresses have.
fn key(address: IpAddr) -> String {
    address.to_string().replace(':', "_")
}

fn age(entry: &str, now: Timestamp) -> Option<Duration> {
    let at: Timestamp = entry.parse().ok()?;
    let seconds = now.as_second().saturating_sub(at.as_second());
    Some(Duration::from_secs(u64::try_from(seconds).unwrap_or(0)))
}

/// The addresses whose replicas said so lately.
pub(super) fn living(data: &Data, now: Timestamp) -> Vec<String> {
    let lives = |at: &str| age(at, now).is_some_and(|age| age < ALIVE_FOR);
    data.iter()
        .filter(|(key, at)| !key.starts_with(PORT) && lives(at))
        .map(|(key, _)| key.replace('_', ":"))
        .collect()
}

/// A patch of the data that takes away what is long gone or unreadable; null when there is none.
pub(super) fn forgotten(data: &Data, now: Timestamp) -> Value {
    let gone = |key: &str, at: &str| {
        let holds = if key.starts_with(PORT) {
            QUARANTINE
        } else {
            FORGOTTEN_AFTER
        };
        age(at, now).is_none_or(|age| age > holds)
    };
    let gone: serde_json::Map<_, _> = data
        .iter()
        .filter(|(key, at)| gone(key, at))
        .map(|(key, _)| (key.clone(), Value::Null))
        .collect();
    if gone.is_empty() {
        Value::Null
    } else {
        gone.into()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn data(entries: &[(&str, &str)]) -> Data {
        let owned = |(key, at): &(&str, &str)| ((*key).to_owned(), (*at).to_owned());
        entries.iter().map(owned).collect()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn replicas_that_said_so_lately_live_and_old_entries_are_forgotten() {
        let now: Timestamp = "2026-01-02T00:10:00Z".parse().unwrap();
        let data = data(&[
            ("10.0.0.1", "2026-01-02T00:09:00Z"),
            ("fd00__1", "2026-01-02T00:10:30Z"),
            ("10.0.0.2", "2026-01-02T00:06:00Z"),
            ("10.0.0.3", "2026-01-01T00:00:00Z"),
            ("10.0.0.4", "yesterday"),
            ("port-20001-10.0.0.1", "2026-01-02T00:09:59Z"),
            ("port-20002-10.0.0.1", "2026-01-01T23:59:59Z"),
        ]);
        assert_eq!(living(&data, now), ["10.0.0.1", "fd00::1"]);
        let old = forgotten(&data, now);
        let want = json!({"10.0.0.3": null, "10.0.0.4": null, "port-20002-10.0.0.1": null});
        assert_eq!(old, want);
        assert!(forgotten(&Data::new(), now).is_null());
    }

    #[test]
    fn what_a_replica_tells_of_its_ports_it_knows_again_after_a_restart() {
        let now: Timestamp = "2026-01-02T00:10:00Z".parse().unwrap();
        let later = |s| now.checked_add(seconds(s)).unwrap();
        for address in [ip("10.0.0.1"), ip("fd00::1")] {
            let ports = vec![(20_001, seconds(600)), (20_002, seconds(60))];
            let told = told(address, ports, now);
            assert_eq!(told[&key(address)], "2026-01-02T00:10:00Z");
            let again = resting(&told, address, later(30));
            assert_eq!(again, [(20_001, seconds(570)), (20_002, seconds(30))]);
            assert_eq!(resting(&told, address, later(601)), []);
            assert_eq!(resting(&told, ip("10.0.0.9"), later(30)), []);
        }
        let odd = data(&[
            ("port-x-10.0.0.1", "2026-01-02T00:09:00Z"),
            ("port-20001-10.0.0.1", "soon"),
            ("port-1", "2026-01-02T00:09:00Z"),
        ]);
        assert_eq!(resting(&odd, ip("10.0.0.1"), now), []);
    }

    #[test]
    fn a_replica_tells_of_so_many_ports_and_no_more() {
        let all = (0..2000).map(|n| (20_000 + n, seconds(u64::from(n) / 4)));
        let told = told(ip("10.0.0.1"), all.collect(), Timestamp::now());
        assert_eq!(told.len(), MOST_RESTING + 1);
        assert!(told.contains_key("port-21999-10.0.0.1"));
    }
}
