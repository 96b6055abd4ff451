//! The device's Pods as `/pods` lists them, and which of their containers is meant.

use k8s_openapi::api::core::v1::{Pod, PodSpec};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;

use super::CtlError;
use super::client::Client;

/// What kubectl goes by.
const DEFAULT_CONTAINER: &str = "kubectl.kubernetes.io/default-container";

#[derive(Deserialize)]
struct PodList {
    items: Vec<Pod>,
}

/// Every Pod of the device.
pub(super) async fn all(client: &Client) -> Result<Vec<Pod>, CtlError> {
    let text = client.document("/pods").await?;
    let list: PodList = serde_json::from_slice(&text).map_err(CtlError::Document)?;
    Ok(list.items)
}

/// A container of the device, as it was named or as kubectl would choose it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) namespace: String,
    pub(super) pod: String,
    pub(super) container: String,
}

impl Place {
    pub(super) async fn find(
        client: &Client,
        namespace: &str,
        name: &str,
        container: Option<&str>,
    ) -> Result<Self, CtlError> {
        let all = all(client).await?;
        let named = all.iter().find(|p| {
            let meta = &p.metadata;
            meta.namespace.as_deref() == Some(namespace) && meta.name.as_deref() == Some(name)
        });
        let pod = named.ok_or_else(|| CtlError::NoPod {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        })?;
        Ok(Self {
            namespace: namespace.to_owned(),
            pod: name.to_owned(),
            container: choose(pod, container)?,
        })
    }

    /// `/VERB/NAMESPACE/POD/CONTAINER` of the node's API.
    pub(super) fn path(&self, verb: &str) -> String {
        let part = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
        let (namespace, pod) = (part(&self.namespace), part(&self.pod));
        format!("/{verb}/{namespace}/{pod}/{}", part(&self.container))
    }
}

/// The container that is named, or the Pod's default one, or its first (pure).
fn choose(pod: &Pod, named: Option<&str>) -> Result<String, CtlError> {
    let there: Vec<&str> = pod.spec.iter().flat_map(names).collect();
    let annotations = pod.metadata.annotations.as_ref();
    let annotated = annotations.and_then(|a| a.get(DEFAULT_CONTAINER));
    // An annotation that names nothing counts for nothing, as with kubectl.
    let default = annotated
        .map(String::as_str)
        .filter(|name| there.contains(name));
    let wanted = named.or(default).or_else(|| there.first().copied());
    match wanted.filter(|name| there.contains(name)) {
        Some(name) => Ok(name.to_owned()),
        None => Err(CtlError::NoContainer {
            container: wanted.unwrap_or_default().to_owned(),
            pod: pod.metadata.name.clone().unwrap_or_default(),
            there: there.join(", "),
        }),
    }
}

fn names(spec: &PodSpec) -> impl Iterator<Item = &str> {
    let regular = spec.containers.iter().map(|c| c.name.as_str());
    let inits = spec.init_containers.iter().flatten();
    let ephemeral = spec.ephemeral_containers.iter().flatten();
    regular
        .chain(inits.map(|c| c.name.as_str()))
        .chain(ephemeral.map(|c| c.name.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_container_is_the_one_kubectl_would_choose() {
        let pod = |default: Option<&str>| -> Pod {
            let annotations = default.map(|d| json!({DEFAULT_CONTAINER: d}));
            serde_json::from_value(json!({
                "metadata": {"name": "p", "annotations": annotations},
                "spec": {
                    "initContainers": [{"name": "init"}],
                    "containers": [{"name": "a"}, {"name": "b"}],
                    "ephemeralContainers": [{"name": "debugger"}],
                },
            }))
            .unwrap()
        };
        for (annotation, named, want) in [
            (None, None, "a"),
            (Some("b"), None, "b"),
            (Some("gone"), None, "a"),
            (Some("b"), Some("a"), "a"),
            (None, Some("init"), "init"),
            (None, Some("debugger"), "debugger"),
        ] {
            assert_eq!(choose(&pod(annotation), named).unwrap(), want);
        }
        let error = choose(&pod(None), Some("x")).unwrap_err().to_string();
        assert!(
            error.contains("\"x\"") && error.contains("a, b, init"),
            "{error}"
        );
    }

    #[test]
    fn a_name_that_is_none_stays_one_part_of_the_path() {
        let place = Place {
            namespace: "a/b".into(),
            pod: "p?".into(),
            container: "c d".into(),
        };
        assert_eq!(place.path("exec"), "/exec/a%2Fb/p%3F/c%20d");
    }
}
