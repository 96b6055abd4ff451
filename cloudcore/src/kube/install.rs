//! `cloudcore install`: what CloudCore needs in the cluster, applied without Helm.
//!
//! The YAML is the chart's own, embedded from `deploy/charts/cloudcore/files`, with no template in
//! it. Server-side apply makes it idempotent. Whether the direct role is bound is not a matter of
//! taste but of the server: it is asked, as the ServiceAccount, and the binding follows the answer.

use std::time::Duration;

use kube::api::{ApiResource, DeleteParams, DynamicObject, Patch, PatchParams};
use kube::core::GroupVersionKind;
use kube::{Api, Client};
use serde_json::Value;

use super::auth::TokenSource;
use super::mode::{self, Impersonation, Mode};
use super::{Access, FIELD_MANAGER, KubeClients, KubeError, is_absent};

const NAMESPACE_YAML: &str = include_str!("../../../deploy/charts/cloudcore/files/namespace.yaml");
const ACCOUNT: &str = include_str!("../../../deploy/charts/cloudcore/files/serviceaccount.yaml");
const CRDS: &str = include_str!("../../../deploy/charts/cloudcore/files/enrolments.crd.yaml");
const RBAC: &str = include_str!("../../../deploy/charts/cloudcore/files/rbac.yaml");
const CONSTRAINED: &str =
    include_str!("../../../deploy/charts/cloudcore/files/rbac-constrained.yaml");
const SERVING: &str = include_str!("../../../deploy/charts/cloudcore/files/rbac-serving.yaml");
const DIRECT: &str = include_str!("../../../deploy/charts/cloudcore/files/rbac-direct.yaml");

/// A server takes about a second to serve a new definition.
const ESTABLISHED_WITHIN: Duration = Duration::from_secs(30);

/// What became of one object: `KIND/NAME created`.
pub type Line = String;

/// Applies everything; each object's outcome goes to `say` as it is known.
pub async fn install(
    access: &Access,
    choice: Impersonation,
    say: &mut (dyn FnMut(Line) + Send),
) -> Result<Mode, KubeError> {
    let client = access.user()?;
    for text in [NAMESPACE_YAML, ACCOUNT, CRDS, RBAC, CONSTRAINED, SERVING] {
        for object in documents(text)? {
            say(apply(&client, object).await?);
        }
    }
    established(&client, "enrolments.fleet.cloudcore.io").await?;
    let mode = find_mode(access, choice).await?;
    for object in documents(DIRECT)? {
        match mode {
            Mode::Direct => say(apply(&client, object).await?),
            Mode::Constrained | Mode::Unproven => {
                if let Some(line) = remove(&client, &object).await? {
                    say(line);
                }
            }
        }
    }
    Ok(mode)
}

async fn find_mode(access: &Access, choice: Impersonation) -> Result<Mode, KubeError> {
    let token = TokenSource::build(access).await?;
    let clients = KubeClients::connect(access, choice, token)?;
    mode::settle(&clients).await
}

/// The objects of a YAML text.
fn documents(text: &str) -> Result<Vec<Value>, KubeError> {
    let found: Result<Vec<Value>, _> = serde_saphyr::from_multiple(text);
    let found = found.map_err(|e| KubeError::Malformed {
        what: "the embedded YAML".into(),
        why: e.to_string(),
    })?;
    Ok(found.into_iter().filter(|v| !v.is_null()).collect())
}

fn field<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or("")
}

fn describe(object: &Value) -> String {
    let kind = field(object, "/kind").to_lowercase();
    let name = field(object, "/metadata/name");
    match field(object, "/metadata/namespace") {
        "" => format!("{kind}/{name}"),
        namespace => format!("{kind}/{name} in {namespace}"),
    }
}

/// Where objects like this one live. The plurals of the embedded kinds are regular.
fn api(client: &Client, object: &Value) -> Api<DynamicObject> {
    let version = field(object, "/apiVersion");
    let (group, version) = version.split_once('/').unwrap_or(("", version));
    let gvk = GroupVersionKind::gvk(group, version, field(object, "/kind"));
    let resource = ApiResource::from_gvk(&gvk);
    match field(object, "/metadata/namespace") {
        "" => Api::all_with(client.clone(), &resource),
        namespace => Api::namespaced_with(client.clone(), namespace, &resource),
    }
}

async fn apply(client: &Client, object: Value) -> Result<Line, KubeError> {
    let (what, name) = (describe(&object), field(&object, "/metadata/name"));
    let api = api(client, &object);
    let revision = |o: &DynamicObject| o.metadata.resource_version.clone();
    let before = api
        .get_opt(name)
        .await
        .map_err(KubeError::api(format!("reading {what}")))?;
    let after = api
        .patch(
            name,
            &PatchParams::apply(FIELD_MANAGER).force(),
            &Patch::Apply(&object),
        )
        .await
        .map_err(KubeError::api(format!("applying {what}")))?;
    let outcome = match before {
        None => "created",
        Some(before) if revision(&before) == revision(&after) => "unchanged",
        Some(_) => "configured",
    };
    Ok(format!("{what} {outcome}"))
}

async fn remove(client: &Client, object: &Value) -> Result<Option<Line>, KubeError> {
    let (what, name) = (describe(object), field(object, "/metadata/name"));
    match api(client, object)
        .delete(name, &DeleteParams::default())
        .await
    {
        Ok(_) => Ok(Some(format!(
            "{what} removed: this API server has constrained impersonation"
        ))),
        Err(e) if is_absent(&e) => Ok(None),
        Err(e) => Err(KubeError::api(format!("removing {what}"))(e)),
    }
}

async fn established(client: &Client, name: &str) -> Result<(), KubeError> {
    let gvk = GroupVersionKind::gvk("apiextensions.k8s.io", "v1", "CustomResourceDefinition");
    let api: Api<DynamicObject> = Api::all_with(client.clone(), &ApiResource::from_gvk(&gvk));
    let reading = || KubeError::api(format!("reading definition {name}"));
    let wait = async {
        while !is_established(&api.get(name).await.map_err(reading())?.data) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(())
    };
    tokio::time::timeout(ESTABLISHED_WITHIN, wait)
        .await
        .unwrap_or_else(|_| {
            Err(KubeError::Malformed {
                what: format!("definition {name}"),
                why: format!(
                    "the API server did not establish it within {} s; see `kubectl describe crd {name}`",
                    ESTABLISHED_WITHIN.as_secs()
                ),
            })
        })
}

fn is_established(definition: &Value) -> bool {
    let conditions = definition
        .pointer("/status/conditions")
        .and_then(Value::as_array);
    conditions.is_some_and(|all| {
        all.iter()
            .any(|c| c["type"] == "Established" && c["status"] == "True")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXTS: [&str; 7] = [
        NAMESPACE_YAML,
        ACCOUNT,
        CRDS,
        RBAC,
        CONSTRAINED,
        SERVING,
        DIRECT,
    ];

    fn all() -> Vec<Value> {
        TEXTS
            .iter()
            .flat_map(|text| documents(text).unwrap())
            .collect()
    }

    fn rules(kind: &str, name: &str) -> Vec<Value> {
        let roles = all();
        let role = roles
            .iter()
            .find(|o| o["kind"] == kind && o["metadata"]["name"] == name);
        role.unwrap()["rules"].as_array().unwrap().clone()
    }

    fn verbs(rule: &Value) -> Vec<&str> {
        rule["verbs"]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_str().unwrap())
            .collect()
    }

    #[test]
    fn every_object_has_a_place_and_says_whose_it_is() {
        let objects = all();
        assert_eq!(objects.len(), 16);
        for object in &objects {
            assert!(!field(object, "/apiVersion").is_empty(), "{object}");
            assert!(!field(object, "/metadata/name").is_empty(), "{object}");
            let part_of = &object["metadata"]["labels"]["app.kubernetes.io/part-of"];
            assert_eq!(part_of, "cloudcore", "{object}");
        }
    }

    #[test]
    fn the_chart_takes_the_same_files() {
        let chart = include_str!("../../../deploy/charts/cloudcore/templates/cluster.yaml");
        for file in [
            "serviceaccount.yaml",
            "enrolments.crd.yaml",
            "rbac.yaml",
            "rbac-constrained.yaml",
            "rbac-serving.yaml",
            "rbac-direct.yaml",
        ] {
            assert!(
                chart.contains(&format!(".Files.Get \"files/{file}\"")),
                "{file}"
            );
        }
        // `install` uses the files as they are: what is a template to Helm would be noise to it.
        for text in TEXTS {
            assert!(!text.contains("{{"));
        }
    }

    #[test]
    fn cloudcore_itself_reads_secrets_in_its_own_namespace_only() {
        for rule in rules("ClusterRole", "cloudcore") {
            let resources = rule["resources"].to_string();
            assert!(
                !resources.contains("secrets") && !resources.contains('*'),
                "{rule}"
            );
            assert!(
                !verbs(&rule).iter().any(|v| v.contains("impersonate")),
                "{rule}"
            );
        }
    }

    #[test]
    fn certificates_are_approved_for_one_signer_only() {
        for object in all() {
            for rule in object["rules"].as_array().into_iter().flatten() {
                if verbs(rule).contains(&"approve") {
                    assert_eq!(
                        rule["resourceNames"],
                        serde_json::json!(["kubernetes.io/kubelet-serving"])
                    );
                }
            }
        }
    }

    #[test]
    fn acting_as_a_node_gives_no_right_of_ones_own_and_no_plain_impersonation() {
        for rule in rules("ClusterRole", "cloudcore-as-node") {
            for verb in verbs(&rule) {
                let constrained = verb.starts_with("impersonate-on:arbitrary-node:")
                    || verb == "impersonate:arbitrary-node";
                assert!(constrained, "{verb}");
            }
        }
    }

    #[test]
    fn an_established_definition_is_told_from_a_named_one() {
        let named = serde_json::json!({"status": {"conditions": [
            {"type": "NamesAccepted", "status": "True"}, {"type": "Established", "status": "False"}]}});
        assert!(!is_established(&named));
        let done = serde_json::json!({"status": {"conditions": [
            {"type": "Established", "status": "True"}]}});
        assert!(is_established(&done));
    }
}
