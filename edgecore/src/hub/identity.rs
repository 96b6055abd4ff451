//! Who this device is to its cloud: a key that never leaves it, a certificate, and where the cloud
//! is found. Owns these records of the store.
//!
//! A key is committed before anything is asked for it, so that a lost answer can be asked for
//! again; the old key stays in force until the new certificate is committed.

use std::time::Duration;

use common::hub::dial::Target;
use common::hub::proto;
use common::hub::tls::Clock;
use common::ids::NodeName;
use common::pki::token::Endpoint;
use common::pki::{NodeIdentity, NodeKey, PkiError, Validity, rotation_due};
use common::tasks::beside;
use common::telemetry::chain;
use prost::Message as _;
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::time::Instant;
use tracing::{info, warn};

use super::clock;
use super::session::kept;
use crate::store::{Store, StoreError};

mod names {
    pub(super) const KEY: &str = "identity.key";
    pub(super) const CHAIN: &str = "identity.chain";
    pub(super) const NODE: &str = "identity.node";
    pub(super) const TOKEN: &str = "identity.token";
    pub(super) const NEXT_KEY: &str = "identity.next-key";
    pub(super) const TIME: &str = "identity.authenticated-ms";
    pub(super) const BEFORE: &str = "identity.endpoints-before";
}

/// Former endpoints that are still tried, the latest first: a load balancer or two, and where the
/// device once joined.
const MOST_BEFORE: usize = 4;

/// After a failed renewal: there are weeks left.
const RENEW_AGAIN: Duration = Duration::from_secs(600);

/// A device sleeps between looks at a date that is weeks away.
const LOOK_AGAIN: Duration = Duration::from_secs(6 * 3600);

#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("the device's identity cannot be read from its data directory")]
    Store(#[from] StoreError),
    #[error("the device's {0} in its data directory is damaged; join again with a new token")]
    Damaged(
        &'static str,
        #[source] Box<dyn std::error::Error + Send + Sync>,
    ),
    #[error("the device's certificate or key was refused")]
    Pki(#[from] PkiError),
}

fn damaged(
    what: &'static str,
) -> impl FnOnce(Box<dyn std::error::Error + Send + Sync>) -> IdentityError {
    move |e| IdentityError::Damaged(what, e)
}

/// A device that has joined.
pub struct Identity {
    pub node: NodeName,
    pub key: NodeKey,
    /// Leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    pub says: NodeIdentity,
    pub link: proto::Link,
    /// Where the cloud was found before this link, tried behind the link's own: a link with a
    /// mistyped endpoint must not cut a device off for ever.
    pub before: Vec<proto::Endpoint>,
}

impl Identity {
    /// What a former start left; `None` on a device that never joined.
    pub fn load(store: &Store) -> Result<Option<Self>, IdentityError> {
        let meta = store.meta();
        let (Some(key), Some(chain), Some(link)) = (
            meta.get(names::KEY)?,
            meta.get(names::CHAIN)?,
            meta.get(kept::LINK)?,
        ) else {
            return Ok(None);
        };
        let key = NodeKey::from_pkcs8(&key)?;
        let chain = proto::RenewGiven::decode(&chain[..])
            .map_err(|e| damaged("certificate")(e.into()))?
            .chain;
        let link = proto::Link::decode(&link[..]).map_err(|e| damaged("link record")(e.into()))?;
        let leaf = chain
            .first()
            .ok_or_else(|| damaged("certificate")("it is empty".into()))?;
        let says = NodeIdentity::from_certificate(leaf)?;
        Ok(Some(Self {
            node: says.node.clone(),
            key,
            chain: chain.into_iter().map(CertificateDer::from).collect(),
            says,
            link,
            before: endpoints_before(store)?,
        }))
    }

    /// Where to dial: the link's endpoints, then the former ones.
    pub fn target(&self) -> Result<Target, PkiError> {
        let mut target = Target::from_link(&self.link)?;
        for endpoint in self.before.iter().filter_map(Endpoint::from_proto) {
            let known = |e: &Endpoint| (&e.host, e.port) == (&endpoint.host, endpoint.port);
            if !target.endpoints.iter().any(known) {
                target.endpoints.push(endpoint);
            }
        }
        Ok(target)
    }

    /// The least time between two renewals: a device whose clock is years ahead finds each new
    /// certificate due, and must not make the cloud sign one in each session.
    pub fn renewal_pause(&self) -> Duration {
        let life = self.says.not_after.as_secs();
        let life = life.saturating_sub(self.says.not_before.as_secs());
        RENEW_AGAIN.min(Duration::from_secs(life / 2))
    }

    /// Whether the certificate has run out, as far as this device can tell the time.
    pub fn expired(&self, store: &Store) -> bool {
        u128::from(self.says.not_after.as_secs()) * 1000 < u128::from(now_ms(store))
    }
}

/// The key of this device, made and committed at the first call.
pub fn ensure_key(store: &Store) -> Result<NodeKey, IdentityError> {
    let meta = store.meta();
    if let Some(key) = meta.get(names::KEY)? {
        return Ok(NodeKey::from_pkcs8(&key)?);
    }
    let key = NodeKey::generate()?;
    meta.put(names::KEY, &key.to_pkcs8())?;
    Ok(key)
}

/// The id of the token that this device joined with.
pub fn joined_with(store: &Store) -> Result<Option<String>, IdentityError> {
    let id = store.meta().get(names::TOKEN)?;
    Ok(id.map(|id| String::from_utf8_lossy(&id).into_owned()))
}

fn endpoints_before(store: &Store) -> Result<Vec<proto::Endpoint>, IdentityError> {
    let kept = store.meta().get(names::BEFORE)?.unwrap_or_default();
    let kept = proto::Link::decode(&kept[..]).map_err(|e| damaged("link record")(e.into()))?;
    Ok(kept.endpoints)
}

/// What to keep of former endpoints when `latest` are replaced.
fn remember(latest: &[proto::Endpoint], before: &[proto::Endpoint]) -> Vec<u8> {
    let mut endpoints: Vec<proto::Endpoint> = Vec::new();
    for endpoint in latest.iter().chain(before) {
        if !endpoints.contains(endpoint) && endpoints.len() < MOST_BEFORE {
            endpoints.push(endpoint.clone());
        }
    }
    let list = proto::Link {
        endpoints,
        ..Default::default()
    };
    list.encode_to_vec()
}

/// The records that a new link becomes; nothing where the device could not find or believe its
/// cloud by it.
pub fn new_link(
    link: &proto::Link,
    old: &Identity,
) -> Result<Vec<(&'static str, Vec<u8>)>, PkiError> {
    let target = Target::from_link(link)?;
    let why = if target.cluster != old.says.cluster {
        Some("it is of another cluster")
    } else if target.endpoints.is_empty() {
        Some("it names no endpoint")
    } else if link.roots.is_empty() {
        Some("it has no trust anchor")
    } else {
        None
    };
    if let Some(why) = why {
        let (what, why) = ("the link", why.to_owned());
        return Err(PkiError::Malformed { what, why });
    }
    Ok(vec![
        (kept::LINK, link.encode_to_vec()),
        (names::BEFORE, remember(&old.link.endpoints, &old.before)),
    ])
}

/// The cloud let this device in: all of it in one commit. `found` is where it was found.
pub fn keep_joined(
    store: &Store,
    token: Option<&str>,
    found: Option<&proto::Endpoint>,
    joined: &proto::Joined,
) -> Result<(), IdentityError> {
    let chain = proto::RenewGiven {
        chain: joined.chain.clone(),
    }
    .encode_to_vec();
    let link = joined.link.clone().unwrap_or_default().encode_to_vec();
    let (_, time) = time_record(joined.now_ms);
    let mut values: Vec<(&str, &[u8])> = vec![
        (names::CHAIN, &chain),
        (names::NODE, joined.node_name.as_bytes()),
        (names::TIME, &time),
        (kept::LINK, &link),
    ];
    if let Some(token) = token {
        values.push((names::TOKEN, token.as_bytes()));
    }
    let before = found.map(|found| remember(std::slice::from_ref(found), &[]));
    if let Some(before) = &before {
        values.push((names::BEFORE, before));
    }
    Ok(store.meta().put_all(&values)?)
}

/// The record of the cloud's clock, as an authenticated session showed it.
pub fn time_record(now_ms: u64) -> (&'static str, Vec<u8>) {
    let told = Told {
        ms: now_ms,
        boot_seconds: clock::boot_seconds(),
        boot_id: clock::boot_id(),
    };
    (names::TIME, told.encode())
}

/// A time that the cloud told, and when in this device's life that was.
#[derive(Debug, PartialEq, Eq)]
struct Told {
    ms: u64,
    boot_seconds: u64,
    boot_id: String,
}

impl Told {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = self.ms.to_be_bytes().to_vec();
        bytes.extend(self.boot_seconds.to_be_bytes());
        bytes.extend(self.boot_id.as_bytes());
        bytes
    }

    /// `None` of a record that is cut short.
    fn decode(bytes: &[u8]) -> Option<Self> {
        let (ms, rest) = bytes.split_first_chunk()?;
        let (boot_seconds, boot_id) = rest.split_first_chunk()?;
        Some(Self {
            ms: u64::from_be_bytes(*ms),
            boot_seconds: u64::from_be_bytes(*boot_seconds),
            boot_id: String::from_utf8_lossy(boot_id).into_owned(),
        })
    }

    /// The time has passed since, and within one boot this device knows how much.
    fn advanced(&self, boot_id: &str, boot_seconds: u64) -> u64 {
        let same = !boot_id.is_empty() && self.boot_id == boot_id;
        let passed = boot_seconds.saturating_sub(self.boot_seconds);
        let passed = if same { passed } else { 0 };
        self.ms.saturating_add(passed.saturating_mul(1000))
    }
}

/// The latest time that the cloud told, and what has passed of this boot since, milliseconds since
/// 1970; 0 when it never did.
pub fn authenticated_ms(store: &Store) -> u64 {
    let kept = store.meta().get(names::TIME).ok().flatten();
    kept.and_then(|b| Told::decode(&b)).map_or(0, |told| {
        told.advanced(&clock::boot_id(), clock::boot_seconds())
    })
}

/// The best this device knows of the time: its clock where that is kept right, else the latest
/// time that the cloud told.
pub fn now_ms(store: &Store) -> u64 {
    if clock::synchronised() {
        clock::wall_seconds() * 1000
    } else {
        authenticated_ms(store)
    }
}

/// What this device's clock is worth when it judges the cloud's certificate.
pub fn dial_clock(store: &Store) -> Clock {
    if clock::synchronised() {
        Clock::Synchronised(UnixTime::since_unix_epoch(Duration::from_secs(
            clock::wall_seconds(),
        )))
    } else {
        let told = authenticated_ms(store);
        let time = UnixTime::since_unix_epoch(Duration::from_millis(told));
        Clock::Unsynchronised((told > 0).then_some(time))
    }
}

/// When and how the certificate is renewed over the session.
pub struct Renewal {
    store: Store,
    due_ms: u64,
    not_before: Instant,
}

impl Renewal {
    /// Asks at `not_before` at the earliest, whatever the dates say.
    pub fn new(store: Store, identity: &Identity, not_before: Instant) -> Self {
        let validity = Validity {
            not_before: identity.says.not_before,
            not_after: identity.says.not_after,
        };
        let due_ms = rotation_due(validity, rand::random()).as_secs() * 1000;
        Self {
            store,
            due_ms,
            not_before,
        }
    }

    /// Waits until the certificate is between 70 and 80 percent of its life, then gives what to
    /// ask. Cancel safe.
    pub async fn due(&mut self) -> proto::RenewAsk {
        loop {
            tokio::time::sleep_until(self.not_before).await;
            let left = Duration::from_millis(self.due_ms.saturating_sub(now_ms(&self.store)));
            if !left.is_zero() {
                self.not_before = Instant::now() + left.min(LOOK_AGAIN);
                continue;
            }
            let store = self.store.clone();
            let asked = tokio::task::spawn_blocking(move || request(&store)).await;
            // Not before the answer: a call that was dropped meanwhile is made again at once, and
            // finds the key that this one kept.
            self.not_before = Instant::now() + RENEW_AGAIN;
            match asked {
                Ok(Ok(csr)) => return proto::RenewAsk { csr },
                Ok(Err(error)) => {
                    warn!(error = %chain(&error), "the certificate could not be renewed");
                }
                Err(error) => warn!(%error, "the certificate could not be renewed"),
            }
        }
    }

    /// Takes the answer; true when a new certificate is in force.
    pub async fn answered(&mut self, response: proto::Response) -> Result<bool, StoreError> {
        let given = match response.body {
            Some(proto::response::Body::Renew(given)) => given,
            Some(proto::response::Body::Failure(failure)) => {
                warn!(
                    problem = failure.message,
                    "the cloud did not renew the certificate"
                );
                return Ok(false);
            }
            Some(proto::response::Body::Token(_)) | None => return Ok(false),
        };
        let meta = self.store.meta();
        let Some(key) = meta.get(names::NEXT_KEY)? else {
            return Ok(false);
        };
        let fits = NodeKey::from_pkcs8(&key)
            .ok()
            .zip(given.chain.first())
            .is_some_and(|(k, c)| {
                NodeIdentity::from_certificate(c).is_ok_and(|says| says.key_id == k.id())
            });
        if !fits {
            warn!("the cloud's new certificate is not for this device's key; it is not used");
            return Ok(false);
        }
        beside(move || {
            let chain = given.encode_to_vec();
            meta.replace(
                &[(names::KEY, &key), (names::CHAIN, &chain)],
                &[names::NEXT_KEY],
            )
        })
        .await?;
        info!("the certificate was renewed");
        Ok(true)
    }
}

/// The request for a new certificate; its key is committed before it is asked for. Waits for the
/// disk.
fn request(store: &Store) -> Result<Vec<u8>, IdentityError> {
    let meta = store.meta();
    let key = match meta.get(names::NEXT_KEY)? {
        Some(key) => NodeKey::from_pkcs8(&key)?,
        None => {
            let key = NodeKey::generate()?;
            meta.put(names::NEXT_KEY, &key.to_pkcs8())?;
            key
        }
    };
    Ok(key.request()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::hub::tls::Clock;
    use common::pki::ClusterId;
    use common::pki::ca::Ca;

    #[test]
    fn the_time_that_was_told_goes_on_within_a_boot_and_stands_after_it() {
        let told = Told {
            ms: 5_000,
            boot_seconds: 100,
            boot_id: "a".into(),
        };
        assert_eq!(Told::decode(&told.encode()).as_ref(), Some(&told));
        assert_eq!(Told::decode(&[1, 2, 3]), None);
        for (boot, seconds, expected) in [
            ("a", 100, 5_000),
            ("a", 160, 65_000),
            ("a", 40, 5_000),
            ("b", 160, 5_000),
            ("", 160, 5_000),
        ] {
            assert_eq!(told.advanced(boot, seconds), expected, "{boot} {seconds}");
        }
    }

    fn endpoint(host: &str) -> proto::Endpoint {
        proto::Endpoint {
            host: host.into(),
            port: 10000,
            transports: Vec::new(),
        }
    }

    #[test]
    fn former_endpoints_are_few_and_the_latest_come_first() {
        let hosts = |bytes: Vec<u8>| -> Vec<String> {
            let list = proto::Link::decode(&bytes[..]).unwrap();
            list.endpoints.into_iter().map(|e| e.host).collect()
        };
        let before = ["b", "c", "d", "e"].map(endpoint);
        assert_eq!(
            hosts(remember(&[endpoint("a")], &before)),
            ["a", "b", "c", "d"]
        );
        assert_eq!(
            hosts(remember(&[endpoint("c")], &before)),
            ["c", "b", "d", "e"]
        );
        assert_eq!(hosts(remember(&[endpoint("a")], &[])), ["a"]);
    }

    fn joined(store: &Store) -> Identity {
        let cluster = ClusterId::parse("c1").unwrap();
        let year = Duration::from_secs(365 * 24 * 3600);
        let validity = Validity::starting(UnixTime::now(), year);
        let ca = Ca::generate(&cluster, validity).unwrap();
        let csr = ensure_key(store).unwrap().request().unwrap();
        let name = NodeName::parse("edge-1").unwrap();
        let chain = ca.sign_node_csr(&csr, &name, &cluster, validity).unwrap();
        let answer = proto::Joined {
            node_name: name.to_string(),
            chain: chain.iter().map(|c| c.to_vec()).collect(),
            link: Some(proto::Link {
                version: 1,
                roots: vec![ca.certificate().to_vec()],
                endpoints: vec![endpoint("advertised")],
                cluster_id: cluster.to_string(),
            }),
            now_ms: 1,
        };
        keep_joined(store, Some("t"), Some(&endpoint("found")), &answer).unwrap();
        Identity::load(store).unwrap().unwrap()
    }

    fn hosts(identity: &Identity) -> Vec<String> {
        let target = identity.target().unwrap();
        target.endpoints.into_iter().map(|e| e.host).collect()
    }

    #[test]
    fn a_device_tries_where_its_cloud_once_was_behind_where_it_says_it_is() {
        let store = Store::in_memory();
        let old = joined(&store);
        assert_eq!(hosts(&old), ["advertised", "found"]);
        let link = proto::Link {
            version: 2,
            endpoints: vec![endpoint("mistyped")],
            ..old.link.clone()
        };
        let records = new_link(&link, &old).unwrap();
        let records: Vec<(&str, &[u8])> = records.iter().map(|(n, v)| (*n, &v[..])).collect();
        store.meta().put_all(&records).unwrap();
        let new = Identity::load(&store).unwrap().unwrap();
        assert_eq!(new.link.version, 2);
        assert_eq!(hosts(&new), ["mistyped", "advertised", "found"]);
    }

    #[test]
    fn a_link_by_which_no_cloud_can_be_found_is_not_taken() {
        let store = Store::in_memory();
        let old = joined(&store);
        let link = |change: fn(&mut proto::Link)| {
            let mut link = old.link.clone();
            change(&mut link);
            new_link(&link, &old).map(drop).map_err(|e| e.to_string())
        };
        assert_eq!(link(|_| ()), Ok(()));
        for (bad, why) in [
            (link(|l| l.endpoints.clear()), "no endpoint"),
            (link(|l| l.endpoints = vec![endpoint("")]), "no endpoint"),
            (link(|l| l.roots.clear()), "no trust anchor"),
            (link(|l| l.cluster_id = "other".into()), "another cluster"),
            (link(|l| l.cluster_id.clear()), "cluster id"),
        ] {
            let said = bad.unwrap_err();
            assert!(said.contains(why), "{said}");
        }
    }

    #[test]
    fn what_the_cloud_told_of_the_time_is_what_a_device_without_a_clock_knows() {
        let store = Store::in_memory();
        assert_eq!(authenticated_ms(&store), 0);
        let (name, value) = time_record(1_800_000_000_123);
        store.meta().put(name, &value).unwrap();
        // A second of the boot may pass on the way.
        let told = 1_800_000_000_123..1_800_000_060_123;
        assert!(told.contains(&authenticated_ms(&store)));
        if let Clock::Unsynchronised(seen) = dial_clock(&store) {
            let seen = seen.map(|t| t.as_secs() * 1000 + 123);
            assert!(seen.is_some_and(|ms| told.contains(&ms)), "{seen:?}");
        }
    }
}
