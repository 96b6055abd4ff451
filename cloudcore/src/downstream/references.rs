//! What an object may name, how each kind is read, and as whom: two tables and a walker.
//!
//! Pure. A new kind of reference (a claim, its volume, the volume's Secret) is a row here; a kind
//! without a row is never read from the API server.

use std::collections::BTreeSet;

use common::ids::{Kind, ObjectKey};
use common::trim;
use serde_json::Value;

/// In whose name the API server is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Principal {
    /// CloudCore's own account, under its own small role.
    Cloud,
    /// The node for which the object is read: the Node authorizer decides.
    Node,
}

/// How much of a kind one watch covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// One watch for the cluster.
    Cluster,
    /// One watch an object, by `metadata.name`: all that the Node authorizer grants.
    Object,
}

/// How a kind of object is read.
#[derive(Debug)]
pub struct Reading {
    pub kind: Kind,
    pub plural: &'static str,
    pub scope: Scope,
    pub principal: Principal,
    /// Narrows the list and the watch at the server; empty for all.
    pub field_selector: &'static str,
}

/// Every kind that is read from Kubernetes on the way down.
pub const READINGS: &[Reading] = &[
    Reading {
        kind: Kind::Pod,
        plural: "pods",
        scope: Scope::Cluster,
        principal: Principal::Cloud,
        field_selector: "spec.nodeName!=",
    },
    Reading {
        kind: Kind::Node,
        plural: "nodes",
        scope: Scope::Cluster,
        principal: Principal::Cloud,
        field_selector: "",
    },
    Reading {
        kind: Kind::Services,
        plural: "services",
        scope: Scope::Cluster,
        principal: Principal::Cloud,
        field_selector: "",
    },
    Reading {
        kind: Kind::ConfigMap,
        plural: "configmaps",
        scope: Scope::Object,
        principal: Principal::Node,
        field_selector: "",
    },
    Reading {
        kind: Kind::Secret,
        plural: "secrets",
        scope: Scope::Object,
        principal: Principal::Node,
        field_selector: "",
    },
];

/// How `kind` is read, or `None` for a kind that this version does not read.
pub fn reading(kind: Kind) -> Option<&'static Reading> {
    READINGS.iter().find(|r| r.kind == kind)
}

/// The bytes of a referenced object as they go down.
pub fn trimmed(kind: Kind, object: &Value) -> Option<Vec<u8>> {
    match kind {
        Kind::ConfigMap => Some(trim::config_map(object)),
        Kind::Secret => Some(trim::secret(object)),
        Kind::Pod | Kind::Node | Kind::Services | Kind::Unknown(_) => None,
    }
}

/// A place in an object that names another of the same namespace. `*` is each element of a list.
struct Place {
    from: Kind,
    to: Kind,
    path: &'static [&'static str],
}

const fn place(to: Kind, path: &'static [&'static str]) -> Place {
    Place {
        from: Kind::Pod,
        to,
        path,
    }
}

/// The container lists of a Pod share their rows.
macro_rules! of_containers {
    ($list:literal) => {
        [
            place(
                Kind::ConfigMap,
                &[
                    "spec",
                    $list,
                    "*",
                    "env",
                    "*",
                    "valueFrom",
                    "configMapKeyRef",
                    "name",
                ],
            ),
            place(
                Kind::Secret,
                &[
                    "spec",
                    $list,
                    "*",
                    "env",
                    "*",
                    "valueFrom",
                    "secretKeyRef",
                    "name",
                ],
            ),
            place(
                Kind::ConfigMap,
                &["spec", $list, "*", "envFrom", "*", "configMapRef", "name"],
            ),
            place(
                Kind::Secret,
                &["spec", $list, "*", "envFrom", "*", "secretRef", "name"],
            ),
        ]
    };
}

const VOLUMES: [Place; 5] = [
    place(
        Kind::ConfigMap,
        &["spec", "volumes", "*", "configMap", "name"],
    ),
    place(
        Kind::Secret,
        &["spec", "volumes", "*", "secret", "secretName"],
    ),
    place(
        Kind::ConfigMap,
        &[
            "spec",
            "volumes",
            "*",
            "projected",
            "sources",
            "*",
            "configMap",
            "name",
        ],
    ),
    place(
        Kind::Secret,
        &[
            "spec",
            "volumes",
            "*",
            "projected",
            "sources",
            "*",
            "secret",
            "name",
        ],
    ),
    place(Kind::Secret, &["spec", "imagePullSecrets", "*", "name"]),
];
const CONTAINERS: [Place; 4] = of_containers!("containers");
const INIT_CONTAINERS: [Place; 4] = of_containers!("initContainers");
const EPHEMERAL_CONTAINERS: [Place; 4] = of_containers!("ephemeralContainers");

const PLACES: [&[Place]; 4] = [
    &VOLUMES,
    &CONTAINERS,
    &INIT_CONTAINERS,
    &EPHEMERAL_CONTAINERS,
];

/// What an object names.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Named {
    pub references: BTreeSet<ObjectKey>,
    /// Names that no object can have. They are not asked for: the answer is known, and inside a
    /// field selector or a key they would mean something else.
    pub impossible: BTreeSet<String>,
}

/// Everything that `object`, of kind `from` in `namespace`, names.
pub fn named(from: Kind, namespace: &str, object: &Value) -> Named {
    let mut named = Named::default();
    for place in PLACES.iter().copied().flatten().filter(|p| p.from == from) {
        walk(object, place.path, &mut |name| {
            if is_subdomain(name) {
                let key = ObjectKey::named(place.to, namespace, name);
                named.references.insert(key);
            } else if !name.is_empty() {
                let shown: String = name.chars().take(100).collect();
                named.impossible.insert(shown);
            }
        });
    }
    named
}

fn walk(value: &Value, path: &[&str], found: &mut impl FnMut(&str)) {
    match path {
        [] => {
            if let Some(text) = value.as_str() {
                found(text);
            }
        }
        ["*", rest @ ..] => {
            for element in value.as_array().into_iter().flatten() {
                walk(element, rest, found);
            }
        }
        [field, rest @ ..] => {
            if let Some(inner) = value.get(field) {
                walk(inner, rest, found);
            }
        }
    }
}

/// RFC 1123 subdomain: the only names that Secrets and ConfigMaps have.
pub fn is_subdomain(name: &str) -> bool {
    common::ids::NodeName::parse(name).is_ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_place_of_a_pod_is_found() {
        let config = |n: &str| ObjectKey::named(Kind::ConfigMap, "ns", n);
        let secret = |n: &str| ObjectKey::named(Kind::Secret, "ns", n);
        let env = |key: &str| json!([{"name": "c", "env": [{"name": "V"}, {"valueFrom": {key: {"name": "x", "key": "k"}}}]}]);
        let from =
            |key: &str| json!([{"name": "c", "envFrom": [{"prefix": "p"}, {key: {"name": "x"}}]}]);
        let projected = |key: &str| json!([{"projected": {"sources": [{"serviceAccountToken": {}}, {key: {"name": "x"}}]}}]);
        let mut cases = vec![
            (
                "volumes",
                json!([{"configMap": {"name": "x"}}]),
                config("x"),
            ),
            (
                "volumes",
                json!([{"secret": {"secretName": "x"}}]),
                secret("x"),
            ),
            ("volumes", projected("configMap"), config("x")),
            ("volumes", projected("secret"), secret("x")),
            ("imagePullSecrets", json!([{"name": "x"}]), secret("x")),
        ];
        for list in ["containers", "initContainers", "ephemeralContainers"] {
            cases.push((list, env("configMapKeyRef"), config("x")));
            cases.push((list, env("secretKeyRef"), secret("x")));
            cases.push((list, from("configMapRef"), config("x")));
            cases.push((list, from("secretRef"), secret("x")));
        }
        for (field, value, want) in cases {
            let named = named(Kind::Pod, "ns", &json!({"spec": {field: value}}));
            assert_eq!(
                named.references,
                BTreeSet::from([want.clone()]),
                "{field} {want}"
            );
        }
    }

    #[test]
    fn what_is_not_a_reference_is_not_read() {
        for spec in [
            json!({"volumes": [{"emptyDir": {}}, {"hostPath": {"path": "/x"}}, {"configMap": {}}]}),
            json!({"containers": [{"env": [{"name": "A", "value": "secret"}]}]}),
            json!({"serviceAccountName": "default", "volumes": "odd", "containers": {"env": 1}}),
            json!({"imagePullSecrets": [{"name": ""}]}),
        ] {
            assert_eq!(
                named(Kind::Pod, "ns", &json!({"spec": spec})),
                Named::default()
            );
        }
        let secret = json!({"spec": {"imagePullSecrets": [{"name": "x"}]}});
        assert_eq!(named(Kind::Secret, "ns", &secret), Named::default());
    }

    #[test]
    fn a_name_that_no_object_has_is_never_asked_for() {
        let pod = json!({"spec": {"imagePullSecrets": [{"name": "a,metadata.name!=a"}, {"name": "b/c"}]}});
        let found = named(Kind::Pod, "ns", &pod);
        assert!(found.references.is_empty());
        assert_eq!(found.impossible.len(), 2);
    }

    #[test]
    fn what_pods_name_is_read_as_the_node_and_object_by_object() {
        for place in PLACES.iter().copied().flatten() {
            let how = reading(place.to).unwrap();
            assert_eq!((how.principal, how.scope), (Principal::Node, Scope::Object));
        }
        for kind in [Kind::Pod, Kind::Node, Kind::Services] {
            assert_eq!(reading(kind).unwrap().scope, Scope::Cluster);
        }
    }
}
