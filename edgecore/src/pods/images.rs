//! Whether an image must be pulled, with which credentials, and the pull itself.
//!
//! The decisions are pure; [`ensure`] asks the runtime. Never keeps a credential: imagePullSecrets
//! are read from the desired set for each pull and dropped after it.

use std::collections::BTreeMap;
use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use common::ids::{Kind, ObjectKey};
use k8s_openapi::api::core::v1::{Container, Pod, Secret};
use serde::Deserialize;

use super::plan::{self, Waiting};
use super::security::ImageUser;
use crate::cri::{Cri, CriError, Failure, api, convert};
use crate::store::desired::{Desired, Lookup};
use crate::store::events::{EventType, Events, PodEvent};

/// When the runtime is asked to fetch an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PullPolicy {
    Always,
    IfNotPresent,
    Never,
}

/// An image that is here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// What the runtime calls it.
    pub id: String,
    pub user: ImageUser,
}

/// The container's policy: its own, else Always for `:latest` and IfNotPresent for the rest.
pub fn pull_policy(container: &Container, image: &str) -> PullPolicy {
    match container.image_pull_policy.as_deref() {
        Some("Always") => PullPolicy::Always,
        Some("Never") => PullPolicy::Never,
        Some("IfNotPresent") => PullPolicy::IfNotPresent,
        Some(_) | None if image.ends_with(":latest") => PullPolicy::Always,
        Some(_) | None => PullPolicy::IfNotPresent,
    }
}

/// The image with a tag or digest; an error is why the name cannot be one.
pub fn normalise(image: &str) -> Result<String, String> {
    let bad = |why: &str| {
        let shown: String = image.chars().take(300).collect();
        Err(format!(
            "Failed to apply default image tag {shown:?}: couldn't parse image name {shown:?}: {why}"
        ))
    };
    let (name, digest) = match image.split_once('@') {
        Some((name, digest)) => (name, Some(digest)),
        None => (image, None),
    };
    // A colon after the last slash is a tag; one before it is the registry's port.
    let (path, tag) = match name.rsplit_once(':') {
        Some((path, tag)) if !tag.contains('/') => (path, Some(tag)),
        Some(_) | None => (name, None),
    };
    if path.is_empty() {
        return bad("invalid reference format");
    }
    let (host, rest) = match path.split_once('/') {
        Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => (host, rest),
        Some(_) | None => ("", path),
    };
    if rest.bytes().any(|b| b.is_ascii_uppercase()) {
        return bad("repository name must be lowercase");
    }
    let word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b);
    let segment = |s: &str| {
        let ends = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
        s.bytes().all(word) && ends(s.as_bytes().first()) && ends(s.as_bytes().last())
    };
    let host_ok = host
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b".:-[]".contains(&b));
    let tag_ok = tag.is_none_or(|t| {
        let fine = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        !t.is_empty() && t.len() <= 128 && t.bytes().all(fine)
    });
    if !rest.split('/').all(segment) || !host_ok || !tag_ok || digest.is_some_and(str::is_empty) {
        return bad("invalid reference format");
    }
    Ok(match (tag, digest) {
        (None, None) => format!("{image}:latest"),
        (Some(_), _) | (None, Some(_)) => image.to_owned(),
    })
}

/// One registry's entry of a `.dockerconfigjson` or `.dockercfg`.
#[derive(Deserialize, Clone, Default)]
#[serde(default, rename_all = "camelCase")]
struct Entry {
    username: String,
    password: String,
    auth: String,
    #[serde(alias = "identitytoken")]
    identity_token: String,
    #[serde(alias = "registrytoken")]
    registry_token: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct DockerConfig {
    auths: BTreeMap<String, Entry>,
}

/// The credentials for an image that these Secrets hold, the most specific first.
pub fn credentials(image: &str, secrets: &[Secret]) -> Vec<api::AuthConfig> {
    let mut found: Vec<((usize, bool), api::AuthConfig)> = Vec::new();
    for secret in secrets {
        let data = |key: &str| secret.data.as_ref().and_then(|d| d.get(key));
        let entries = if let Some(json) = data(".dockerconfigjson") {
            serde_json::from_slice::<DockerConfig>(&json.0).map(|c| c.auths)
        } else if let Some(json) = data(".dockercfg") {
            serde_json::from_slice::<BTreeMap<String, Entry>>(&json.0)
        } else {
            continue;
        };
        for (place, entry) in entries.unwrap_or_default() {
            if let Some(weight) = matches(&place, image) {
                found.push((weight, auth(&place, entry)));
            }
        }
    }
    found.sort_by_key(|(weight, _)| std::cmp::Reverse(*weight));
    found.into_iter().map(|(_, auth)| auth).collect()
}

fn auth(place: &str, entry: Entry) -> api::AuthConfig {
    let mut out = api::AuthConfig {
        username: entry.username,
        password: entry.password,
        server_address: place.to_owned(),
        identity_token: entry.identity_token,
        registry_token: entry.registry_token,
        ..Default::default()
    };
    let decoded = STANDARD
        .decode(entry.auth.trim())
        .ok()
        .and_then(|b| String::from_utf8(b).ok());
    if let Some((user, password)) = decoded.as_deref().and_then(|d| d.split_once(':')) {
        out.username = user.to_owned();
        out.password = password.trim_end_matches('\0').to_owned();
    }
    out
}

/// The registry and path that an image comes from, with Docker's defaults spelt out.
fn origin(image: &str) -> String {
    let name = image.split('@').next().unwrap_or(image);
    let name = match name.rsplit_once(':') {
        Some((path, tag)) if !tag.contains('/') => path,
        Some(_) | None => name,
    };
    match name.split_once('/') {
        Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => name.to_owned(),
        Some(_) => format!("docker.io/{name}"),
        None => format!("docker.io/library/{name}"),
    }
}

/// Whether an entry's key is for this image; longer keys weigh more, and of equal length those that
/// are exact. `*` stands for any part of a DNS label.
fn matches(place: &str, image: &str) -> Option<(usize, bool)> {
    let bare = place
        .trim_start_matches("https://")
        .trim_start_matches("http://");
    let bare = bare
        .trim_end_matches('/')
        .trim_end_matches("/v1")
        .trim_end_matches("/v2");
    let (host, path) = bare.split_once('/').unwrap_or((bare, ""));
    let host = match host {
        "index.docker.io" | "registry-1.docker.io" => "docker.io",
        host => host,
    };
    let origin = origin(image);
    let (image_host, image_path) = origin.split_once('/')?;
    let labels = |h: &str| h.split('.').map(str::to_owned).collect::<Vec<_>>();
    let (pattern, real) = (labels(host), labels(image_host));
    let hosts =
        pattern.len() == real.len() && pattern.iter().zip(&real).all(|(p, r)| p == r || glob(p, r));
    let paths = path.is_empty()
        || image_path == path
        || image_path
            .strip_prefix(path)
            .is_some_and(|rest| rest.starts_with('/'));
    (hosts && paths).then(|| (bare.len(), !bare.contains('*')))
}

fn glob(pattern: &str, label: &str) -> bool {
    pattern.split_once('*').is_some_and(|(start, end)| {
        label.len() >= start.len() + end.len() && label.starts_with(start) && label.ends_with(end)
    })
}

/// Why a container's image is not here, as its status and an Event say it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageTrouble {
    pub waiting: Waiting,
    /// Another try can help; without it only a change of the Pod can.
    pub pull_failed: bool,
}

/// What [`ensure`] works with.
pub struct Context<'a> {
    pub cri: &'a dyn Cri,
    pub desired: &'a Desired,
    pub events: &'a Events,
    pub key: &'a ObjectKey,
    pub pod: &'a Pod,
    pub sandbox: Option<api::PodSandboxConfig>,
}

/// Makes sure that the container's image is here, by its pull policy.
pub async fn ensure(ctx: &Context<'_>, container: &Container) -> Result<Resolved, ImageTrouble> {
    let asked = container.image.as_deref().unwrap_or_default();
    let image =
        normalise(asked).map_err(|message| trouble(ctx, container, "InvalidImageName", message))?;
    let policy = pull_policy(container, &image);
    let here = ctx
        .cri
        .image_status(&image)
        .await
        .map_err(|e| inspect_trouble(ctx, container, &image, &e))?;
    match (here, policy) {
        (Some(found), PullPolicy::IfNotPresent | PullPolicy::Never) => {
            let message = format!("Container image {asked:?} already present on machine");
            emit(ctx, container, EventType::Normal, "Pulled", message);
            Ok(resolved(&found))
        }
        (None, PullPolicy::Never) => {
            let message =
                format!("Container image {asked:?} is not present with pull policy of Never");
            Err(trouble(ctx, container, "ErrImageNeverPull", message))
        }
        (Some(_), PullPolicy::Always) | (None, PullPolicy::Always | PullPolicy::IfNotPresent) => {
            pull(ctx, container, asked, &image).await
        }
    }
}

fn resolved(image: &api::Image) -> Resolved {
    Resolved {
        id: image.id.clone(),
        user: convert::image_user(image),
    }
}

async fn pull(
    ctx: &Context<'_>,
    container: &Container,
    asked: &str,
    image: &str,
) -> Result<Resolved, ImageTrouble> {
    emit(
        ctx,
        container,
        EventType::Normal,
        "Pulling",
        format!("Pulling image {asked:?}"),
    );
    let began = Instant::now();
    let pulled = fetch(ctx, image).await;
    let reference = pulled.map_err(|e| {
        let message = format!("Failed to pull image {asked:?}: {}", e.message);
        emit(
            ctx,
            container,
            EventType::Warning,
            "Failed",
            message.clone(),
        );
        let waiting = Waiting {
            reason: "ErrImagePull".into(),
            message: e.message,
        };
        emit(
            ctx,
            container,
            EventType::Warning,
            "Failed",
            "Error: ErrImagePull".into(),
        );
        ImageTrouble {
            waiting,
            pull_failed: true,
        }
    })?;
    let took = began.elapsed();
    let message = format!(
        "Successfully pulled image {asked:?} in {} ms",
        took.as_millis()
    );
    emit(ctx, container, EventType::Normal, "Pulled", message);
    let found = ctx.cri.image_status(&reference).await;
    let found = found.map_err(|e| inspect_trouble(ctx, container, image, &e))?;
    Ok(found.map_or(
        Resolved {
            id: reference,
            user: ImageUser::Unset,
        },
        |i| resolved(&i),
    ))
}

/// Tries each of the matching credentials, and none at all where none match.
async fn fetch(ctx: &Context<'_>, image: &str) -> Result<String, CriError> {
    let request = |auth| api::PullImageRequest {
        image: Some(api::ImageSpec {
            image: image.to_owned(),
            ..Default::default()
        }),
        auth,
        sandbox_config: ctx.sandbox.clone(),
    };
    let mut last = None;
    for auth in credentials(image, &pull_secrets(ctx)) {
        match ctx.cri.pull_image(request(Some(auth))).await {
            Ok(reference) => return Ok(reference),
            Err(e) if e.failure == Failure::Refused => last = Some(e),
            Err(e) => return Err(e),
        }
    }
    match last {
        Some(e) => Err(e),
        None => ctx.cri.pull_image(request(None)).await,
    }
}

/// The Pod's imagePullSecrets that exist and parse.
fn pull_secrets(ctx: &Context<'_>) -> Vec<Secret> {
    let namespace = ctx.pod.metadata.namespace.as_deref().unwrap_or_default();
    let spec = ctx.pod.spec.iter();
    let names = spec.flat_map(|s| s.image_pull_secrets.iter().flatten());
    let found = names.filter_map(|r| {
        let key = ObjectKey::named(Kind::Secret, namespace, &r.name);
        match ctx.desired.lookup(&key) {
            Lookup::Present(bytes) => serde_json::from_slice(&bytes).ok(),
            Lookup::Absent | Lookup::Unknown => None,
        }
    });
    found.collect()
}

fn emit(ctx: &Context<'_>, c: &Container, kind: EventType, reason: &str, message: String) {
    let mut event = PodEvent::new(ctx.key, Some(&c.name), kind, reason, message);
    event.field_path = plan::field_path(ctx.pod, &c.name);
    ctx.events.emit(event);
}

fn trouble(ctx: &Context<'_>, c: &Container, reason: &str, message: String) -> ImageTrouble {
    let event = if reason == "InvalidImageName" {
        "InspectFailed"
    } else {
        reason
    };
    emit(ctx, c, EventType::Warning, event, message.clone());
    emit(
        ctx,
        c,
        EventType::Warning,
        "Failed",
        format!("Error: {reason}"),
    );
    ImageTrouble {
        waiting: Waiting {
            reason: reason.into(),
            message,
        },
        pull_failed: false,
    }
}

fn inspect_trouble(ctx: &Context<'_>, c: &Container, image: &str, e: &CriError) -> ImageTrouble {
    let message = format!("Failed to inspect image {image:?}: {}", e.message);
    trouble(ctx, c, "ImageInspectError", message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::ByteString;

    #[test]
    fn an_image_gets_its_tag_or_is_refused() {
        for (image, normal) in [
            ("busybox", Some("busybox:latest")),
            ("busybox:1.36", Some("busybox:1.36")),
            ("localhost:5000/a/b", Some("localhost:5000/a/b:latest")),
            ("r.example/a@sha256:00", Some("r.example/a@sha256:00")),
            ("r.example/a_b/c-d.e:X_1", Some("r.example/a_b/c-d.e:X_1")),
            ("", None),
            (":tag", None),
            ("Upper/case", None),
            ("a//b", None),
            ("a b", None),
            ("a:", None),
            ("a@", None),
        ] {
            assert_eq!(normalise(image).ok().as_deref(), normal, "{image}");
        }
    }

    #[test]
    fn the_pull_policy_follows_the_tag_unless_it_is_given() {
        let container = |policy: Option<&str>| Container {
            image_pull_policy: policy.map(str::to_owned),
            ..Default::default()
        };
        for (policy, image, expected) in [
            (None, "a:latest", PullPolicy::Always),
            (None, "a:1", PullPolicy::IfNotPresent),
            (Some("Never"), "a:latest", PullPolicy::Never),
            (Some("IfNotPresent"), "a:latest", PullPolicy::IfNotPresent),
            (Some("Always"), "a:1", PullPolicy::Always),
        ] {
            assert_eq!(
                pull_policy(&container(policy), image),
                expected,
                "{policy:?} {image}"
            );
        }
    }

    fn secret(key: &str, json: &str) -> Secret {
        Secret {
            data: Some([(key.to_owned(), ByteString(json.as_bytes().to_vec()))].into()),
            ..Default::default()
        }
    }

    #[test]
    fn credentials_match_by_host_and_path_the_longest_first() {
        let secrets = [
            secret(
                ".dockerconfigjson",
                r#"{"auths":{
                    "r.example":{"username":"host","password":"p"},
                    "r.example/team":{"auth":"dGVhbTpzM2NyZXQ="},
                    "*.example":{"username":"wild","password":"p"},
                    "other.example":{"username":"other","password":"p"}}}"#,
            ),
            secret(
                ".dockercfg",
                r#"{"https://index.docker.io/v1/":{"username":"hub","password":"p"}}"#,
            ),
            secret(".dockerconfigjson", "not json"),
        ];
        let users = |image: &str| -> Vec<String> {
            credentials(image, &secrets)
                .into_iter()
                .map(|a| a.username)
                .collect()
        };
        assert_eq!(users("r.example/team/app:1"), ["team", "host", "wild"]);
        assert_eq!(users("r.example/teammate/app"), ["host", "wild"]);
        assert_eq!(users("busybox"), ["hub"]);
        assert!(users("unknown.test/x").is_empty());
        assert_eq!(
            credentials("r.example/team/a", &secrets)[0].password,
            "s3cret"
        );
    }
}
