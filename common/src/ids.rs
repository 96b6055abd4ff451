//! Names of things, each its own type, so that a node can never be passed as a Pod.
//!
//! The only places that split or join these names are the `parse`/`Display` pairs here.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error(
        "node name {0:?} is not a DNS subdomain of at most 253 characters (RFC 1123: a-z, 0-9, '-', '.')"
    )]
    Node(String),
    #[error("object key {0:?} is malformed: expected KIND/NAMESPACE/NAME[/UID]")]
    Key(String),
}

/// The name of a Kubernetes Node: an RFC 1123 subdomain.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeName(Arc<str>);

impl NodeName {
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let label = |l: &str| {
            let edge = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
            !l.is_empty()
                && l.bytes().all(|b| edge(&b) || b == b'-')
                && l.as_bytes().first().is_some_and(edge)
                && l.as_bytes().last().is_some_and(edge)
        };
        if text.len() <= 253 && text.split('.').all(label) {
            Ok(Self(text.into()))
        } else {
            Err(NameError::Node(text.chars().take(300).collect()))
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The user name that the API server's Node authorizer knows this node by.
    pub fn user(&self) -> String {
        format!("system:node:{}", self.0)
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for NodeName {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        Self::parse(&text)
    }
}

impl From<NodeName> for String {
    fn from(name: NodeName) -> Self {
        name.0.to_string()
    }
}

/// What an object that crosses the hub is. The number is the wire's and the store's: it only grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A Pod bound to the node; keyed by UID.
    Pod,
    ConfigMap,
    Secret,
    /// The node's own Node object.
    Node,
    /// The Services of one namespace as a Pod's environment needs them: a JSON list of
    /// `{"name","ip","ports":[{"name","port","protocol"}]}`; the name in the key is empty.
    Services,
    /// A kind that this version does not know: kept, never interpreted.
    Unknown(u8),
}

impl Kind {
    pub fn number(self) -> u8 {
        match self {
            Kind::Pod => 1,
            Kind::ConfigMap => 2,
            Kind::Secret => 3,
            Kind::Node => 4,
            Kind::Services => 5,
            Kind::Unknown(n) => n,
        }
    }

    pub fn from_number(n: u8) -> Self {
        match n {
            1 => Kind::Pod,
            2 => Kind::ConfigMap,
            3 => Kind::Secret,
            4 => Kind::Node,
            5 => Kind::Services,
            n => Kind::Unknown(n),
        }
    }

    fn word(self) -> String {
        match self {
            Kind::Pod => "Pod".into(),
            Kind::ConfigMap => "ConfigMap".into(),
            Kind::Secret => "Secret".into(),
            Kind::Node => "Node".into(),
            Kind::Services => "Services".into(),
            Kind::Unknown(n) => n.to_string(),
        }
    }

    fn from_word(word: &str) -> Option<Self> {
        Some(match word {
            "Pod" => Kind::Pod,
            "ConfigMap" => Kind::ConfigMap,
            "Secret" => Kind::Secret,
            "Node" => Kind::Node,
            "Services" => Kind::Services,
            n => Kind::from_number(n.parse().ok()?),
        })
    }
}

/// The identity of one object on the wire and on disk: `KIND/NAMESPACE/NAME[/UID]`.
///
/// A Pod carries its UID, so that a Pod and its successor of the same name are two objects; what
/// Pods refer to by name carries none.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    pub kind: Kind,
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub uid: Arc<str>,
}

impl ObjectKey {
    pub fn pod(namespace: &str, name: &str, uid: &str) -> Self {
        Self::build(Kind::Pod, namespace, name, uid)
    }

    pub fn named(kind: Kind, namespace: &str, name: &str) -> Self {
        Self::build(kind, namespace, name, "")
    }

    /// The key of a node's report on itself. It carries no name: who sends it is in the certificate.
    pub fn own_node() -> Self {
        Self::build(Kind::Node, "", "", "")
    }

    fn build(kind: Kind, namespace: &str, name: &str, uid: &str) -> Self {
        Self {
            kind,
            namespace: namespace.into(),
            name: name.into(),
            uid: uid.into(),
        }
    }

    pub fn parse(text: &str) -> Result<Self, NameError> {
        let bad = || NameError::Key(text.chars().take(300).collect());
        let mut parts = text.split('/');
        let kind = parts.next().and_then(Kind::from_word).ok_or_else(bad)?;
        let namespace = parts.next().ok_or_else(bad)?;
        let name = parts.next().ok_or_else(bad)?;
        let uid = parts.next().unwrap_or("");
        // What is printed in logs must not be able to forge a line of them.
        let plain = !text.bytes().any(|b| b.is_ascii_control());
        if parts.next().is_some() || text.len() > 1024 || !plain {
            return Err(bad());
        }
        Ok(Self::build(kind, namespace, name, uid))
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.kind.word(), self.namespace, self.name)?;
        if !self.uid.is_empty() {
            write!(f, "/{}", self.uid)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_name_is_a_dns_subdomain() {
        for good in ["a", "edge-1", "shop.berlin.example", "0x"] {
            assert!(NodeName::parse(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a..b", "a/b", "a b", &"a".repeat(254)] {
            assert!(NodeName::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_key_survives_its_text() {
        for key in [
            ObjectKey::pod("default", "web-0", "1b4e-77"),
            ObjectKey::named(Kind::Secret, "a", "b"),
            ObjectKey::named(Kind::Services, "a", ""),
            ObjectKey::named(Kind::Unknown(77), "", "x"),
        ] {
            assert_eq!(ObjectKey::parse(&key.to_string()), Ok(key));
        }
        for bad in [
            "",
            "Pod",
            "Pod/a",
            "Pods/a/b",
            "Pod/a/b/c/d",
            "Pod/a/b\nERROR c",
            "Pod/a/b\u{1b}[31m",
        ] {
            assert!(ObjectKey::parse(bad).is_err(), "{bad}");
        }
    }
}
