//! ConfigMaps, Secrets and Services as a Pod sees them: a committed object's bytes become entries.
//!
//! Gives `None` for an object that is known to be absent, and an error that says "wait" for one
//! that is unknown. Never holds what it parsed, and never prints a value.

use std::collections::BTreeMap;
use std::net::IpAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use common::ids::{Kind, ObjectKey};
use serde::Deserialize;

use super::env::ConfigError;
use crate::store::desired::{Desired, Lookup};

/// An object's entries by key.
pub(crate) type Entries = BTreeMap<String, Vec<u8>>;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawConfigMap {
    #[serde(default)]
    data: Option<BTreeMap<String, String>>,
    #[serde(default)]
    binary_data: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
struct RawSecret {
    #[serde(default)]
    data: Option<BTreeMap<String, String>>,
}

/// One Service of a namespace's list.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct ServiceEntry {
    pub(crate) name: String,
    /// Empty or `None` for a headless Service.
    #[serde(default)]
    pub(crate) ip: String,
    #[serde(default)]
    pub(crate) ports: Vec<ServicePort>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct ServicePort {
    #[serde(default)]
    pub(crate) name: Option<String>,
    pub(crate) port: u16,
    #[serde(default)]
    pub(crate) protocol: Option<String>,
}

impl ServiceEntry {
    /// The ClusterIP, if it has one.
    pub(crate) fn address(&self) -> Option<IpAddr> {
        self.ip.parse().ok()
    }
}

fn malformed(key: &ObjectKey, why: impl std::fmt::Display) -> ConfigError {
    ConfigError::Invalid {
        message: format!("{key} as stored on this node cannot be read: {why}"),
    }
}

/// Decodes one entry; the error names the key and never the value.
fn decode(key: &ObjectKey, name: &str, value: &str) -> Result<Vec<u8>, ConfigError> {
    STANDARD
        .decode(value)
        .map_err(|_| malformed(key, format_args!("the value of {name:?} is not base64")))
}

fn parse<T: for<'a> Deserialize<'a>>(key: &ObjectKey, bytes: &[u8]) -> Result<T, ConfigError> {
    // serde_json's message can quote the input, which may be a Secret's: only the place is told.
    serde_json::from_slice(bytes)
        .map_err(|e| malformed(key, format_args!("line {} column {}", e.line(), e.column())))
}

fn find(desired: &Desired, key: &ObjectKey) -> Result<Option<std::sync::Arc<[u8]>>, ConfigError> {
    match desired.lookup(key) {
        Lookup::Unknown => Err(ConfigError::Unknown { key: key.clone() }),
        Lookup::Absent => Ok(None),
        Lookup::Present(bytes) => Ok(Some(bytes)),
    }
}

/// `data` and `binaryData` of a ConfigMap.
pub(crate) fn config_map(
    desired: &Desired,
    namespace: &str,
    name: &str,
) -> Result<Option<Entries>, ConfigError> {
    let key = ObjectKey::named(Kind::ConfigMap, namespace, name);
    let Some(bytes) = find(desired, &key)? else {
        return Ok(None);
    };
    let raw: RawConfigMap = parse(&key, &bytes)?;
    let text = raw.data.into_iter().flatten();
    let mut entries: Entries = text.map(|(k, v)| (k, v.into_bytes())).collect();
    for (k, v) in raw.binary_data.into_iter().flatten() {
        let value = decode(&key, &k, &v)?;
        entries.insert(k, value);
    }
    Ok(Some(entries))
}

/// `data` of a Secret.
pub(crate) fn secret(
    desired: &Desired,
    namespace: &str,
    name: &str,
) -> Result<Option<Entries>, ConfigError> {
    let key = ObjectKey::named(Kind::Secret, namespace, name);
    let Some(bytes) = find(desired, &key)? else {
        return Ok(None);
    };
    let raw: RawSecret = parse(&key, &bytes)?;
    let pairs = raw.data.into_iter().flatten();
    let decoded = pairs.map(|(k, v)| Ok((k.clone(), decode(&key, &k, &v)?)));
    Ok(Some(decoded.collect::<Result<_, ConfigError>>()?))
}

/// The Services of a namespace; an absent list is an empty one.
pub(crate) fn services(
    desired: &Desired,
    namespace: &str,
) -> Result<Vec<ServiceEntry>, ConfigError> {
    let key = services_key(namespace);
    let found = find(desired, &key)?;
    found.map_or_else(|| Ok(Vec::new()), |bytes| parse(&key, &bytes))
}

pub(crate) fn services_key(namespace: &str) -> ObjectKey {
    ObjectKey::named(Kind::Services, namespace, "")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::desired::Batch;
    use common::object::Object;

    fn desired(key: ObjectKey, json: &str) -> Desired {
        let desired = Desired::in_memory();
        desired
            .commit(Batch {
                puts: vec![Object::present(key, json.as_bytes().to_vec())],
                ..Batch::default()
            })
            .unwrap();
        desired
    }

    #[test]
    fn a_config_map_has_text_and_binary_entries() {
        let key = ObjectKey::named(Kind::ConfigMap, "n", "c");
        let json = r#"{"metadata":{"name":"c"},"data":{"a":"x"},"binaryData":{"b":"AP8="}}"#;
        let entries = config_map(&desired(key, json), "n", "c").unwrap().unwrap();
        assert_eq!(entries["a"], b"x");
        assert_eq!(entries["b"], [0, 255]);
    }

    #[test]
    fn an_error_about_a_secret_shows_no_value() {
        let key = ObjectKey::named(Kind::Secret, "n", "s");
        for json in [r#"{"data":{"p":"hunter2!"}}"#, r#"{"data":"hunter2!"}"#] {
            let error = secret(&desired(key.clone(), json), "n", "s").unwrap_err();
            assert!(!format!("{error} {error:?}").contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn unknown_waits_and_absent_answers() {
        let nothing = Desired::in_memory();
        let key = ObjectKey::named(Kind::Secret, "n", "s");
        assert_eq!(
            secret(&nothing, "n", "s"),
            Err(ConfigError::Unknown { key: key.clone() })
        );
        nothing
            .commit(Batch {
                puts: vec![Object::absent(key)],
                ..Batch::default()
            })
            .unwrap();
        assert_eq!(secret(&nothing, "n", "s"), Ok(None));
    }
}
