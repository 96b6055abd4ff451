//! Events that CloudCore itself has to tell, about objects that it cannot use.

use common::ids::Kind;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};

use crate::downstream::Malformed;

const COMPONENT: &str = "cloudcore";

/// A Warning on the object; its loss is logged and costs nothing else.
pub async fn warn(client: &Client, malformed: &Malformed) {
    // Events of cluster-wide objects live in `default`.
    let namespace = match malformed.namespace.as_str() {
        "" => "default",
        namespace => namespace,
    };
    let events: Api<Event> = Api::namespaced(client.clone(), namespace);
    if let Err(error) = events
        .create(&PostParams::default(), &event(malformed, namespace))
        .await
    {
        tracing::debug!(%error, name = malformed.name, "an Event could not be written");
    }
}

fn event(malformed: &Malformed, namespace: &str) -> Event {
    let now = Time(Timestamp::now());
    Event {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}.", malformed.name)),
            namespace: Some(namespace.to_owned()),
            ..ObjectMeta::default()
        },
        involved_object: ObjectReference {
            kind: Some(kind(malformed.kind)),
            namespace: Some(malformed.namespace.clone()).filter(|n| !n.is_empty()),
            name: Some(malformed.name.clone()),
            uid: Some(malformed.uid.clone()).filter(|u| !u.is_empty()),
            api_version: Some("v1".to_owned()),
            ..ObjectReference::default()
        },
        type_: Some("Warning".to_owned()),
        reason: Some(malformed.reason.to_owned()),
        message: Some(malformed.message.clone()),
        source: Some(EventSource {
            component: Some(COMPONENT.to_owned()),
            host: None,
        }),
        reporting_component: Some(COMPONENT.to_owned()),
        count: Some(1),
        first_timestamp: Some(now.clone()),
        last_timestamp: Some(now),
        ..Event::default()
    }
}

fn kind(kind: Kind) -> String {
    match kind {
        Kind::Pod => "Pod".to_owned(),
        Kind::ConfigMap => "ConfigMap".to_owned(),
        Kind::Secret => "Secret".to_owned(),
        Kind::Node => "Node".to_owned(),
        Kind::Services => "Service".to_owned(),
        Kind::Unknown(n) => n.to_string(),
    }
}
