//! An API server in memory, for unit tests: objects by path, resourceVersions, compare-and-swap,
//! finalizers. It checks no schema and no right, and serves no watch.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use http::{Method, Request, Response};
use http_body_util::BodyExt;
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};

type Hook = Box<dyn FnMut(&Method, &str) -> Option<u16> + Send>;

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Value>,
    revision: u64,
    requests: Vec<String>,
    hook: Option<Hook>,
}

#[derive(Clone, Default)]
pub(crate) struct FakeApi {
    state: Arc<Mutex<State>>,
}

impl FakeApi {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn client(&self) -> Client {
        let state = self.state.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let state = state.clone();
            async move { Ok::<_, Infallible>(serve(&state, request).await) }
        });
        Client::new(service, "default")
    }

    /// Answers a request with this status before it is served, when the hook gives one.
    pub(crate) fn intercept(
        &self,
        hook: impl FnMut(&Method, &str) -> Option<u16> + Send + 'static,
    ) {
        self.state.lock().unwrap().hook = Some(Box::new(hook));
    }

    pub(crate) fn put(&self, path: &str, object: Value) {
        let mut state = self.state.lock().unwrap();
        let name = path.rsplit('/').next().unwrap().to_string();
        let mut object = object;
        object["metadata"]["name"] = json!(name);
        state.store(path, object, true);
    }

    pub(crate) fn get(&self, path: &str) -> Option<Value> {
        self.state.lock().unwrap().objects.get(path).cloned()
    }

    /// `METHOD path`, in order.
    pub(crate) fn requests(&self) -> Vec<String> {
        self.state.lock().unwrap().requests.clone()
    }
}

impl State {
    fn store(&mut self, path: &str, mut object: Value, new: bool) -> Value {
        self.revision += 1;
        let meta = &mut object["metadata"];
        meta["resourceVersion"] = json!(self.revision.to_string());
        if new {
            meta["uid"] = json!(format!("uid-{}", self.revision));
            meta["creationTimestamp"] = json!("2026-01-01T00:00:00Z");
        }
        let released = meta.get("deletionTimestamp").is_some()
            && meta["finalizers"].as_array().is_none_or(Vec::is_empty);
        if released {
            self.objects.remove(path);
        } else {
            self.objects.insert(path.to_string(), object.clone());
        }
        object
    }

    fn delete(&mut self, path: &str) -> (u16, Value) {
        let Some(mut object) = self.objects.get(path).cloned() else {
            return failure(404, "NotFound");
        };
        if object["metadata"]["finalizers"]
            .as_array()
            .is_some_and(|f| !f.is_empty())
        {
            object["metadata"]["deletionTimestamp"] = json!("2026-01-02T00:00:00Z");
            return (200, self.store(path, object, false));
        }
        self.objects.remove(path);
        self.revision += 1;
        (
            200,
            json!({"kind": "Status", "status": "Success", "metadata": {}}),
        )
    }

    fn list(&self, path: &str, query: &str) -> Value {
        let label = query
            .split('&')
            .find_map(|p| p.strip_prefix("labelSelector="))
            .map(|s| s.replace("%2F", "/").replace("%3D", "="));
        let wanted = |object: &Value| {
            label
                .as_deref()
                .is_none_or(|selector| match selector.split_once('=') {
                    Some((k, v)) => object["metadata"]["labels"][k] == json!(v),
                    None => object["metadata"]["labels"].get(selector).is_some(),
                })
        };
        let prefix = format!("{path}/");
        let below = |p: &&String| {
            p.strip_prefix(&prefix)
                .is_some_and(|rest| !rest.contains('/'))
        };
        let items: Vec<_> = self
            .objects
            .iter()
            .filter(|(p, o)| below(p) && wanted(o))
            .map(|(_, o)| o.clone())
            .collect();
        json!({"metadata": {"resourceVersion": self.revision.to_string()}, "items": items})
    }
}

fn failure(code: u16, reason: &str) -> (u16, Value) {
    (
        code,
        json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
               "message": reason, "reason": reason, "code": code}),
    )
}

async fn serve(state: &Mutex<State>, request: Request<Body>) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path().to_string();
    let query = parts.uri.query().unwrap_or("").to_string();
    let bytes = body.collect().await.unwrap().to_bytes();
    let sent: Value = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
    let mut state = state.lock().unwrap();
    state.requests.push(format!("{} {path}", parts.method));
    let mut hook = state.hook.take();
    let intercepted = hook.as_mut().and_then(|hook| hook(&parts.method, &path));
    state.hook = hook;
    let (code, answer) = match intercepted {
        Some(code) => failure(code, "Intercepted"),
        None => route(&mut state, &parts.method, &path, &query, sent),
    };
    Response::builder()
        .status(code)
        .header("date", "Fri, 02 Jan 2026 00:00:00 GMT")
        .body(Body::from(serde_json::to_vec(&answer).unwrap()))
        .unwrap()
}

fn route(state: &mut State, method: &Method, path: &str, query: &str, sent: Value) -> (u16, Value) {
    match *method {
        Method::GET => match state.objects.get(path) {
            Some(object) => (200, object.clone()),
            // A plural without a name behind it is a list.
            None if path == "/version" => (200, json!({})),
            None if is_collection(path) => (200, state.list(path, query)),
            None => failure(404, "NotFound"),
        },
        Method::POST => {
            let path = format!("{path}/{}", sent["metadata"]["name"].as_str().unwrap());
            if state.objects.contains_key(&path) {
                return failure(409, "AlreadyExists");
            }
            (201, state.store(&path, sent, true))
        }
        Method::PUT => {
            let Some(present) = state.objects.get(path) else {
                return failure(404, "NotFound");
            };
            let (held, given) = (&present["metadata"], &sent["metadata"]);
            if given["resourceVersion"].is_string()
                && given["resourceVersion"] != held["resourceVersion"]
            {
                return failure(409, "Conflict");
            }
            let mut sent = sent;
            for kept in ["uid", "creationTimestamp", "deletionTimestamp"] {
                if let Some(value) = present["metadata"].get(kept) {
                    sent["metadata"][kept] = value.clone();
                }
            }
            (200, state.store(path, sent, false))
        }
        Method::PATCH => {
            let Some(mut object) = state.objects.get(path).cloned() else {
                return failure(404, "NotFound");
            };
            for checked in ["uid", "resourceVersion"] {
                let given = &sent["metadata"][checked];
                if given.is_string() && *given != object["metadata"][checked] {
                    return failure(409, "Conflict");
                }
            }
            merge(&mut object, &sent);
            (200, state.store(path, object, false))
        }
        Method::DELETE => state.delete(path),
        _ => failure(405, "MethodNotAllowed"),
    }
}

fn is_collection(path: &str) -> bool {
    [
        "nodes",
        "secrets",
        "configmaps",
        "enrolments",
        "leases",
        "pods",
    ]
    .iter()
    .any(|plural| path.ends_with(&format!("/{plural}")))
}

/// RFC 7386.
fn merge(target: &mut Value, patch: &Value) {
    match patch.as_object() {
        Some(fields) => {
            if !target.is_object() {
                *target = json!({});
            }
            for (key, value) in fields {
                if value.is_null() {
                    if let Some(map) = target.as_object_mut() {
                        map.remove(key);
                    }
                } else {
                    merge(&mut target[key], value);
                }
            }
        }
        None => *target = patch.clone(),
    }
}
