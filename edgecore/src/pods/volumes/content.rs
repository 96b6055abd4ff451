//! Which files a volume consists of (pure): configMap, secret, downwardAPI and projected.
//!
//! Takes the volume's spec, the committed objects and the tokens that were asked for; gives a
//! payload for the atomic writer. An absent object gives no files; where the Pod needs it that is
//! said, so that what is mounted stays. An unknown one is an error that waits.

use std::collections::BTreeMap;

use common::ids::ObjectKey;
use k8s_openapi::api::core::v1::{DownwardAPIVolumeFile, KeyToPath, Pod, Volume, VolumeProjection};

use super::atomic::{FileEntry, Payload, invalid_path};
use crate::node::environment::Environment;
use crate::pods::env::ConfigError;
use crate::pods::fields;
use crate::pods::sources::{self, Entries};
use crate::pods::tokens::{Token, TokenRequest};
use crate::store::desired::Desired;

/// What [`files`] reads.
pub(super) struct Inputs<'a> {
    pub(super) pod: &'a Pod,
    pub(super) environment: &'a Environment,
    pub(super) desired: &'a Desired,
    /// What the token source answered, for each request of [`token_requests`].
    pub(super) tokens: &'a BTreeMap<TokenRequest, Result<Token, String>>,
    pub(super) node_ca_pem: Option<&'a str>,
    /// Files are there from before: a needed object that is absent leaves them as they are.
    pub(super) populated: bool,
}

/// A volume's files.
#[derive(Default)]
pub(super) struct Content {
    pub(super) payload: Payload,
    /// A source that is needed is absent: files that are mounted and not in the payload stay.
    pub(super) keep_old: bool,
    /// A token could not be had and an old one stays: try again soon.
    pub(super) token_overdue: bool,
}

const DEFAULT_MODE: i32 = 0o644;
/// The API's default and least life of a projected token, in seconds.
const TOKEN_SECONDS: i64 = 3600;
const TOKEN_MIN_SECONDS: i64 = 600;

impl Content {
    fn put(&mut self, path: &str, mode: i32, data: Vec<u8>, owner: Option<u32>) {
        let mode = mode.cast_unsigned() & 0o777;
        self.payload
            .insert(path.to_owned(), FileEntry { mode, owner, data });
    }
}

fn namespace(pod: &Pod) -> &str {
    pod.metadata.namespace.as_deref().unwrap_or_default()
}

/// The tokens that a volume needs.
pub(super) fn token_requests(pod: &Pod, volume: &Volume) -> Vec<TokenRequest> {
    let sources = volume
        .projected
        .iter()
        .flat_map(|p| p.sources.iter().flatten());
    sources.filter_map(|s| token_request(pod, s)).collect()
}

fn token_request(pod: &Pod, source: &VolumeProjection) -> Option<TokenRequest> {
    let token = source.service_account_token.as_ref()?;
    let meta = &pod.metadata;
    let account = pod
        .spec
        .as_ref()
        .and_then(|s| s.service_account_name.as_deref());
    let seconds = token.expiration_seconds.unwrap_or(TOKEN_SECONDS);
    Some(TokenRequest {
        pod: ObjectKey::pod(
            namespace(pod),
            meta.name.as_deref().unwrap_or_default(),
            meta.uid.as_deref().unwrap_or_default(),
        ),
        service_account: account
            .filter(|a| !a.is_empty())
            .unwrap_or("default")
            .to_owned(),
        audience: token.audience.clone().unwrap_or_default(),
        expiration_seconds: seconds.max(TOKEN_MIN_SECONDS),
    })
}

/// The files of a volume; `None` for a volume of another kind.
pub(super) fn files(volume: &Volume, inputs: &Inputs<'_>) -> Result<Option<Content>, ConfigError> {
    let mut content = Content::default();
    if let Some(v) = &volume.config_map {
        let mode = v.default_mode.unwrap_or(DEFAULT_MODE);
        let source = Source::config_map(&v.name, v.items.as_deref(), v.optional);
        source.add(mode, inputs, &mut content)?;
    } else if let Some(v) = &volume.secret {
        let mode = v.default_mode.unwrap_or(DEFAULT_MODE);
        let name = v.secret_name.as_deref().unwrap_or_default();
        Source::secret(name, v.items.as_deref(), v.optional).add(mode, inputs, &mut content)?;
    } else if let Some(v) = &volume.downward_api {
        let mode = v.default_mode.unwrap_or(DEFAULT_MODE);
        downward(v.items.as_deref(), mode, inputs, &mut content)?;
    } else if let Some(v) = &volume.projected {
        let mode = v.default_mode.unwrap_or(DEFAULT_MODE);
        for source in v.sources.iter().flatten() {
            projection(source, mode, inputs, &mut content)?;
        }
    } else {
        return Ok(None);
    }
    match invalid_path(&content.payload) {
        None => Ok(Some(content)),
        Some(message) => Err(ConfigError::Invalid { message }),
    }
}

fn projection(
    source: &VolumeProjection,
    mode: i32,
    inputs: &Inputs<'_>,
    content: &mut Content,
) -> Result<(), ConfigError> {
    if let Some(v) = &source.config_map {
        Source::config_map(&v.name, v.items.as_deref(), v.optional).add(mode, inputs, content)
    } else if let Some(v) = &source.secret {
        Source::secret(&v.name, v.items.as_deref(), v.optional).add(mode, inputs, content)
    } else if let Some(v) = &source.downward_api {
        downward(v.items.as_deref(), mode, inputs, content)
    } else if let Some(v) = &source.service_account_token {
        token(source, &v.path, mode, inputs, content)
    } else {
        let what = match &source.cluster_trust_bundle {
            Some(_) => "clusterTrustBundle",
            None => "of a kind newer than this edgecore",
        };
        let message = format!("a projected source is {what}, which edge nodes do not support");
        Err(ConfigError::Invalid { message })
    }
}

/// A ConfigMap or a Secret as a source of files.
struct Source<'a> {
    kind: &'static str,
    name: &'a str,
    items: &'a [KeyToPath],
    optional: bool,
}

impl<'a> Source<'a> {
    fn config_map(name: &'a str, items: Option<&'a [KeyToPath]>, optional: Option<bool>) -> Self {
        Self {
            kind: "configmap",
            name,
            items: items.unwrap_or_default(),
            optional: optional == Some(true),
        }
    }

    fn secret(name: &'a str, items: Option<&'a [KeyToPath]>, optional: Option<bool>) -> Self {
        Self {
            kind: "secret",
            ..Self::config_map(name, items, optional)
        }
    }

    fn entries(&self, inputs: &Inputs<'_>) -> Result<Option<Entries>, ConfigError> {
        let namespace = namespace(inputs.pod);
        if self.kind == "secret" {
            return sources::secret(inputs.desired, namespace, self.name);
        }
        let mut found = sources::config_map(inputs.desired, namespace, self.name)?;
        let overlaid = found.as_mut().filter(|_| self.name == "kube-root-ca.crt");
        if let (Some(entries), Some(pem)) = (overlaid, inputs.node_ca_pem)
            && let Some(bundle) = entries.get_mut("ca.crt")
        {
            if bundle.last().is_some_and(|b| *b != b'\n') {
                bundle.push(b'\n');
            }
            bundle.extend_from_slice(pem.as_bytes());
        }
        Ok(found)
    }

    fn add(
        &self,
        mode: i32,
        inputs: &Inputs<'_>,
        content: &mut Content,
    ) -> Result<(), ConfigError> {
        let Some(mut entries) = self.entries(inputs)? else {
            // An optional object that is deleted takes its files with it, as upstream's volumes do
            // and test for; one that is needed leaves them.
            if self.optional {
                return Ok(());
            }
            if !inputs.populated {
                let message = format!("{} {:?} not found", self.kind, self.name);
                return Err(ConfigError::Missing { message });
            }
            content.keep_old = true;
            return Ok(());
        };
        if self.items.is_empty() {
            for (key, data) in entries {
                content.put(&key, mode, data, None);
            }
            return Ok(());
        }
        for item in self.items {
            // A key may be given to several paths: only the last may take it.
            match entries.get_mut(&item.key) {
                Some(data) => {
                    content.put(&item.path, item.mode.unwrap_or(mode), data.clone(), None);
                }
                None if self.optional => {}
                None => {
                    let (kind, name, key) = (self.kind, self.name, &item.key);
                    let message =
                        format!("{kind} {name:?} references non-existent config key: {key}");
                    return Err(ConfigError::Missing { message });
                }
            }
        }
        Ok(())
    }
}

fn downward(
    items: Option<&[DownwardAPIVolumeFile]>,
    mode: i32,
    inputs: &Inputs<'_>,
    content: &mut Content,
) -> Result<(), ConfigError> {
    for item in items.unwrap_or_default() {
        let value = if let Some(field) = &item.field_ref {
            fields::file_field(inputs.pod, &field.field_path)?
        } else if let Some(resource) = &item.resource_field_ref {
            fields::resource_field(inputs.pod, None, resource, inputs.environment)?
        } else {
            let message = format!("the downwardAPI file {:?} has no source", item.path);
            return Err(ConfigError::Invalid { message });
        };
        content.put(
            &item.path,
            item.mode.unwrap_or(mode),
            value.into_bytes(),
            None,
        );
    }
    Ok(())
}

fn token(
    source: &VolumeProjection,
    path: &str,
    mode: i32,
    inputs: &Inputs<'_>,
    content: &mut Content,
) -> Result<(), ConfigError> {
    let asked = token_request(inputs.pod, source);
    let answer = asked.as_ref().and_then(|r| inputs.tokens.get(r));
    match answer {
        Some(Ok(token)) => {
            let (mode, owner) = token_access(inputs.pod, mode);
            content.put(path, mode, token.token.clone().into_bytes(), owner);
            Ok(())
        }
        // An old token is better than none: the file stays until a new one can be had.
        _ if inputs.populated => {
            content.keep_old = true;
            content.token_overdue = true;
            Ok(())
        }
        Some(Err(why)) => Err(ConfigError::Missing {
            message: format!("failed to fetch token: {why}"),
        }),
        None => Err(ConfigError::Missing {
            message: "failed to fetch token: it was not asked for".into(),
        }),
    }
}

/// Who may read the token: only its user where one is known, else as the volume says.
fn token_access(pod: &Pod, mode: i32) -> (i32, Option<u32>) {
    let owner = common_user(pod);
    let context = pod.spec.as_ref().and_then(|s| s.security_context.as_ref());
    let group = context.and_then(|c| c.fs_group);
    let mode = if owner.is_some() || group.is_some() {
        0o600
    } else {
        mode
    };
    (mode, owner)
}

/// The user that all containers run as, where the spec says so.
fn common_user(pod: &Pod) -> Option<u32> {
    let spec = pod.spec.as_ref()?;
    let of_pod = spec.security_context.as_ref().and_then(|c| c.run_as_user);
    let init = spec.init_containers.iter().flatten();
    let mut users = init.chain(&spec.containers).map(|c| {
        let own = c.security_context.as_ref().and_then(|s| s.run_as_user);
        own.or(of_pod)
    });
    let first = users.next()??;
    users.all(|u| u == Some(first)).then_some(())?;
    u32::try_from(first).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::testing::{desired, environment, pod};
    use common::ids::Kind;
    use serde_json::{Value, json};

    fn volume(json: Value) -> Volume {
        serde_json::from_value(json).unwrap()
    }

    fn the_pod(spec: Value) -> Pod {
        pod(
            json!({"metadata": {"name": "p", "namespace": "n", "uid": "u",
            "labels": {"a": "b"}}, "spec": spec}),
        )
    }

    struct Case {
        desired: Desired,
        pod: Pod,
        populated: bool,
        tokens: BTreeMap<TokenRequest, Result<Token, String>>,
    }

    impl Case {
        fn new() -> Self {
            let data = json!({"data": {"k1": "v1", "k2": "v2"}});
            let secret = json!({"data": {"s": "aHVudGVy"}});
            Self {
                desired: desired(&[
                    (Kind::ConfigMap, "n", "cm", data),
                    (Kind::Secret, "n", "sec", secret),
                    (Kind::ConfigMap, "n", "gone", Value::Null),
                    (
                        Kind::ConfigMap,
                        "n",
                        "kube-root-ca.crt",
                        json!({"data": {"ca.crt": "ROOT"}}),
                    ),
                ]),
                pod: the_pod(json!({"containers": [{"name": "c"}]})),
                populated: false,
                tokens: BTreeMap::new(),
            }
        }

        fn files(&self, json: Value) -> Result<Content, ConfigError> {
            let inputs = Inputs {
                pod: &self.pod,
                environment: &environment(),
                desired: &self.desired,
                tokens: &self.tokens,
                node_ca_pem: Some("NODE-CA\n"),
                populated: self.populated,
            };
            files(&volume(json), &inputs).map(Option::unwrap)
        }
    }

    fn shown(content: &Content) -> Vec<(String, u32, String)> {
        let files = content.payload.iter();
        let show = |(p, f): (&String, &FileEntry)| {
            (
                p.clone(),
                f.mode,
                String::from_utf8_lossy(&f.data).into_owned(),
            )
        };
        files.map(show).collect()
    }

    fn rows(rows: &[(&str, u32, &str)]) -> Vec<(String, u32, String)> {
        rows.iter()
            .map(|(p, m, d)| ((*p).into(), *m, (*d).into()))
            .collect()
    }

    #[test]
    fn files_of_each_kind() {
        let case = Case::new();
        for (name, json, want) in [
            (
                "all keys of a ConfigMap",
                json!({"name": "v", "configMap": {"name": "cm"}}),
                rows(&[("k1", 0o644, "v1"), ("k2", 0o644, "v2")]),
            ),
            (
                "items with paths and modes",
                json!({"name": "v", "configMap": {"name": "cm", "defaultMode": 256, "items": [
                    {"key": "k1", "path": "d/x"}, {"key": "k1", "path": "y", "mode": 511}]}}),
                rows(&[("d/x", 0o400, "v1"), ("y", 0o777, "v1")]),
            ),
            (
                "a Secret",
                json!({"name": "v", "secret": {"secretName": "sec", "defaultMode": 420}}),
                rows(&[("s", 0o644, "hunter")]),
            ),
            (
                "downwardAPI",
                json!({"name": "v", "downwardAPI": {"items": [
                    {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}},
                    {"path": "cpu", "mode": 256, "resourceFieldRef":
                        {"containerName": "c", "resource": "limits.cpu", "divisor": "1m"}}]}}),
                rows(&[("cpu", 0o400, "3900"), ("labels", 0o644, "a=\"b\"")]),
            ),
            (
                "projected: the last of one path wins",
                json!({"name": "v", "projected": {"sources": [
                    {"configMap": {"name": "cm", "items": [{"key": "k1", "path": "x"}]}},
                    {"secret": {"name": "sec", "items": [{"key": "s", "path": "x"}]}},
                    {"configMap": {"name": "none", "optional": true}}]}}),
                rows(&[("x", 0o644, "hunter")]),
            ),
            (
                "the node's CA is appended to the cluster's",
                json!({"name": "v", "projected": {"sources": [
                    {"configMap": {"name": "kube-root-ca.crt",
                        "items": [{"key": "ca.crt", "path": "ca.crt"}]}}]}}),
                rows(&[("ca.crt", 0o644, "ROOT\nNODE-CA\n")]),
            ),
        ] {
            crate::pods::testing::put(
                &case.desired,
                &[(Kind::ConfigMap, "n", "none", Value::Null)],
            );
            let content = case.files(json).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(shown(&content), want, "{name}");
        }
    }

    #[test]
    fn what_is_missing_says_so_and_what_is_unknown_waits() {
        let case = Case::new();
        for (json, want) in [
            (
                json!({"name": "v", "configMap": {"name": "gone"}}),
                "configmap \"gone\" not found",
            ),
            (
                json!({"name": "v", "configMap": {"name": "cm", "items": [{"key": "z", "path": "z"}]}}),
                "configmap \"cm\" references non-existent config key: z",
            ),
            (
                json!({"name": "v", "projected": {"sources": [{"clusterTrustBundle": {"path": "x"}}]}}),
                "a projected source is clusterTrustBundle, which edge nodes do not support",
            ),
            (
                json!({"name": "v", "configMap": {"name": "cm", "items": [{"key": "k1", "path": "../z"}]}}),
                "\"../z\" must be a relative path without \"..\"",
            ),
        ] {
            assert_eq!(case.files(json).err().unwrap().to_string(), want);
        }
        let unknown = case.files(json!({"name": "v", "secret": {"secretName": "never-heard"}}));
        assert!(matches!(
            unknown.err().unwrap(),
            ConfigError::Unknown { .. }
        ));
    }

    #[test]
    fn an_object_that_is_deleted_takes_its_files_only_where_it_is_optional() {
        let mut case = Case::new();
        case.populated = true;
        for (optional, keeps) in [(false, true), (true, false)] {
            let source = json!({"name": "gone", "optional": optional});
            for volume in [
                json!({"name": "v", "configMap": source}),
                json!({"name": "v", "projected": {"sources": [{"configMap": source}]}}),
            ] {
                let content = case.files(volume).unwrap();
                assert_eq!((content.keep_old, content.payload.len()), (keeps, 0));
            }
        }
    }

    #[test]
    fn a_token_is_for_its_user_only() {
        let source = json!({"name": "v", "projected": {"sources": [
            {"serviceAccountToken": {"path": "token", "audience": "vault", "expirationSeconds": 60}}]}});
        for (spec, mode, owner) in [
            (
                json!({"serviceAccountName": "sa", "containers": [{"name": "c"}]}),
                0o644,
                None,
            ),
            (
                json!({"serviceAccountName": "sa", "securityContext": {"fsGroup": 7},
                    "containers": [{"name": "c"}]}),
                0o600,
                None,
            ),
            (
                json!({"serviceAccountName": "sa", "containers": [
                    {"name": "c", "securityContext": {"runAsUser": 1000}}]}),
                0o600,
                Some(1000),
            ),
            (
                json!({"serviceAccountName": "sa", "containers": [
                    {"name": "c", "securityContext": {"runAsUser": 1000}}, {"name": "d"}]}),
                0o644,
                None,
            ),
        ] {
            let mut case = Case::new();
            case.pod = the_pod(spec);
            let asked = token_requests(&case.pod, &volume(source.clone()));
            let [request] = &asked[..] else {
                panic!("one token")
            };
            assert_eq!(request.audience, "vault");
            assert_eq!(request.service_account, "sa");
            assert_eq!(request.expiration_seconds, 600, "the API's least");
            assert_eq!(request.pod.to_string(), "Pod/n/p/u");
            let token = Token {
                token: "t0ken".into(),
                refresh_in_seconds: 9,
            };
            case.tokens.insert(request.clone(), Ok(token));
            let content = case.files(source.clone()).unwrap();
            let file = &content.payload["token"];
            assert_eq!((file.mode, file.owner), (mode, owner));
        }
    }

    #[test]
    fn without_a_new_token_the_old_one_stays() {
        let source = json!({"name": "v", "projected": {"sources": [
            {"serviceAccountToken": {"path": "token"}}]}});
        let mut case = Case::new();
        let request = token_requests(&case.pod, &volume(source.clone())).remove(0);
        case.tokens.insert(request, Err("the cloud is away".into()));
        assert_eq!(
            case.files(source.clone()).err().unwrap().to_string(),
            "failed to fetch token: the cloud is away"
        );
        case.populated = true;
        let content = case.files(source).unwrap();
        assert!(content.keep_old && content.token_overdue);
    }
}
