//! What the tests of this module share: Pods from JSON, a known environment.

use common::ids::{Kind, ObjectKey};
use common::object::Object;
use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;

use crate::node::environment::Environment;
use crate::store::desired::{Batch, Desired};

pub(crate) fn environment() -> Environment {
    Environment {
        node_name: "edge-1".into(),
        node_ip: "192.0.2.7".parse().unwrap(),
        cluster_dns: Some("10.96.0.10".parse().unwrap()),
        cluster_domain: "cluster.local".into(),
        api_service: Some(("10.96.0.1".parse().unwrap(), 443)),
        allocatable_cpu_millis: 3900,
        allocatable_memory_bytes: 4_000_000_000,
        allocatable_ephemeral_bytes: 50_000_000_000,
    }
}

pub(crate) fn pod(json: Value) -> Pod {
    serde_json::from_value(json).unwrap()
}

/// A desired set of present objects (with JSON) and absent ones (`null`).
pub(crate) fn desired(objects: &[(Kind, &str, &str, Value)]) -> Desired {
    let desired = Desired::in_memory();
    put(&desired, objects);
    desired
}

pub(crate) fn put(desired: &Desired, objects: &[(Kind, &str, &str, Value)]) {
    let object = |(kind, namespace, name, json): &(Kind, &str, &str, Value)| {
        let key = ObjectKey::named(*kind, namespace, name);
        match json {
            Value::Null => Object::absent(key),
            json => Object::present(key, serde_json::to_vec(json).unwrap()),
        }
    };
    desired
        .commit(Batch {
            puts: objects.iter().map(object).collect(),
            ..Batch::default()
        })
        .unwrap();
}
