//! An API server as far as lists and watches go: resourceVersions, pages, selectors, events, 410,
//! refusals by node, and faults on order.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::super::Clients;
use super::NodeName;

type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

#[derive(Clone, Default)]
pub(super) struct Server(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    revision: u64,
    compacted: u64,
    objects: BTreeMap<(String, String), Value>,
    /// Revision, type, plural, object.
    events: Vec<(u64, &'static str, String, Value)>,
    watchers: Vec<Watcher>,
    /// Refusals left, by user and object.
    forbidden: HashMap<(String, String), u32>,
    faults: HashMap<String, VecDeque<u16>>,
    deaf: bool,
    log: Vec<String>,
}

struct Watcher {
    user: String,
    plural: String,
    selector: String,
    lines: mpsc::UnboundedSender<Bytes>,
}

/// What a backup holds.
pub(super) struct Backup {
    revision: u64,
    objects: BTreeMap<(String, String), Value>,
}

/// The mark of a request that is made for a node.
#[derive(Clone)]
struct AsNode(NodeName);

impl Clients for Server {
    fn own(&self) -> kube::Client {
        self.client()
    }

    fn own_watch(&self) -> kube::Client {
        self.client()
    }

    fn mark_as_node(request: &mut Request<Body>, node: &NodeName) {
        request.extensions_mut().insert(AsNode(node.clone()));
    }
}

impl Server {
    pub(super) fn new() -> Self {
        let server = Self::default();
        server.state().revision = 10;
        server
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn client(&self) -> kube::Client {
        let server = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let node = request.extensions().get::<AsNode>();
            let user = node.map_or("cloudcore", |n| n.0.as_str());
            let answer = server.state().answer(user, &request);
            async move { Ok::<_, Infallible>(answer) }
        });
        kube::Client::new(service, "default")
    }

    /// Creates or changes an object.
    pub(super) fn put(&self, plural: &str, mut object: Value) {
        let mut state = self.state();
        state.revision += 1;
        object["metadata"]["resourceVersion"] = json!(state.revision.to_string());
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        let key = (plural.to_owned(), name);
        let known = state.objects.insert(key, object.clone()).is_some();
        state.event(if known { "MODIFIED" } else { "ADDED" }, plural, object);
    }

    pub(super) fn delete(&self, plural: &str, name: &str) {
        let mut state = self.state();
        state.revision += 1;
        let mut object = state.objects.remove(&(plural.into(), name.into())).unwrap();
        object["metadata"]["resourceVersion"] = json!(state.revision.to_string());
        state.event("DELETED", plural, object);
    }

    /// Refuses the object to the node, so often.
    pub(super) fn forbid(&self, node: &str, name: &str, times: u32) {
        self.state()
            .forbidden
            .insert((node.into(), name.into()), times);
    }

    /// Answers the next requests for a collection with these codes.
    pub(super) fn fail(&self, plural: &str, codes: &[u16]) {
        self.state()
            .faults
            .insert(plural.into(), codes.iter().copied().collect());
    }

    /// Ends every watch, as a restart does.
    pub(super) fn hang_up(&self) {
        self.state().watchers.clear();
    }

    /// From now on no watch hears anything.
    pub(super) fn deafen(&self) {
        self.state().deaf = true;
    }

    /// Forgets all events, so that older watches get 410.
    pub(super) fn compact(&self) {
        let mut state = self.state();
        state.compacted = state.revision;
    }

    pub(super) fn backup(&self) -> Backup {
        let state = self.state();
        Backup {
            revision: state.revision,
            objects: state.objects.clone(),
        }
    }

    /// The cluster as of the backup; every watch ends.
    pub(super) fn restore(&self, backup: Backup) {
        let mut state = self.state();
        state.revision = backup.revision;
        state.objects = backup.objects;
        state.events.clear();
        state.watchers.clear();
    }

    /// Sends any text to the watches of a collection.
    pub(super) fn say(&self, plural: &str, line: &str) {
        for watcher in self.state().watchers.iter().filter(|w| w.plural == plural) {
            watcher
                .lines
                .send(Bytes::copy_from_slice(line.as_bytes()))
                .unwrap();
        }
    }

    pub(super) fn revision(&self) -> u64 {
        self.state().revision
    }

    pub(super) fn log(&self) -> Vec<String> {
        self.state().log.clone()
    }

    /// Who watches this collection.
    pub(super) fn watchers(&self, plural: &str) -> Vec<String> {
        let mut state = self.state();
        state.watchers.retain(|w| !w.lines.is_closed());
        let of = state.watchers.iter().filter(|w| w.plural == plural);
        of.map(|w| w.user.clone()).collect()
    }

    pub(super) async fn wait_for_watches(&self, plural: &str, count: usize) {
        self.wait_until("watches open", |s| s.watchers(plural).len() == count)
            .await;
    }

    pub(super) async fn wait_until(&self, what: &str, wish: impl Fn(&Self) -> bool) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        while !wish(self) {
            assert!(
                tokio::time::Instant::now() < deadline,
                "{what}: {:?}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl State {
    fn event(&mut self, kind: &'static str, plural: &str, object: Value) {
        self.events
            .push((self.revision, kind, plural.into(), object.clone()));
        if self.deaf {
            return;
        }
        for watcher in &self.watchers {
            if watcher.plural == plural && selected(&watcher.selector, &object) {
                // A watcher that went away.
                let _ = watcher.lines.send(line(kind, &object));
            }
        }
    }

    fn answer(&mut self, user: &str, request: &Request<Body>) -> Answer {
        let path = request.uri().path();
        let plural = path.rsplit('/').next().unwrap().to_owned();
        let query: HashMap<String, String> = request
            .uri()
            .query()
            .unwrap_or_default()
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .map(|(k, v)| (k.into(), v.replace("%21", "!").replace("%3D", "=")))
            .collect();
        let watches = query.contains_key("watch");
        let selector = query.get("fieldSelector").cloned().unwrap_or_default();
        let verb = if watches { "watch" } else { "list" };
        let limit = query.get("limit").cloned().unwrap_or_default();
        self.log
            .push(format!("{user} {verb} {plural} {path} {selector} {limit}"));

        if let Some(code) = self.faults.get_mut(&plural).and_then(VecDeque::pop_front) {
            return status(code);
        }
        if let Some(name) = selector.strip_prefix("metadata.name=")
            && let Some(left) = self.forbidden.get_mut(&(user.into(), name.into()))
            && *left > 0
        {
            *left -= 1;
            return status(403);
        }
        if watches {
            let from = query["resourceVersion"].parse().unwrap();
            self.watch(user, plural, selector, from)
        } else {
            let from = query.get("continue").map_or(0, |c| c.parse().unwrap());
            self.list(&plural, &selector, limit.parse().unwrap(), from)
        }
    }

    fn list(&self, plural: &str, selector: &str, limit: usize, from: usize) -> Answer {
        let of = |((p, _), object): &(&(String, String), &Value)| {
            p == plural && selected(selector, object)
        };
        let all: Vec<&Value> = self.objects.iter().filter(of).map(|(_, o)| o).collect();
        let to = (from + limit).min(all.len());
        let next = if to < all.len() {
            to.to_string()
        } else {
            String::new()
        };
        let list = json!({
            "metadata": {"resourceVersion": self.revision.to_string(), "continue": next},
            "items": all[from..to],
        });
        Response::new(Full::from(list.to_string()).boxed_unsync())
    }

    fn watch(&mut self, user: &str, plural: String, selector: String, from: u64) -> Answer {
        if from < self.compacted {
            return status(410);
        }
        let (lines, sent) = mpsc::unbounded_channel();
        for (at, kind, p, object) in &self.events {
            if *at > from && *p == plural && selected(&selector, object) {
                lines.send(line(kind, object)).unwrap();
            }
        }
        self.watchers.push(Watcher {
            user: user.into(),
            plural,
            selector,
            lines,
        });
        let frames =
            futures::stream::unfold(sent, |mut sent| async { Some((sent.recv().await?, sent)) });
        let body = StreamBody::new(frames.map(|line| Ok(Frame::data(line))));
        Response::new(BodyExt::boxed_unsync(body))
    }
}

fn selected(selector: &str, object: &Value) -> bool {
    let node = object["spec"]["nodeName"].as_str().unwrap_or_default();
    match selector.split_once('=') {
        None => true,
        Some(("spec.nodeName!", "")) => !node.is_empty(),
        Some(("spec.nodeName", wanted)) => node == wanted,
        Some(("metadata.name", wanted)) => object["metadata"]["name"] == wanted,
        Some(other) => panic!("no such selector: {other:?}"),
    }
}

fn line(kind: &str, object: &Value) -> Bytes {
    let mut object = object.clone();
    object["apiVersion"] = json!("v1");
    Bytes::from(format!("{}\n", json!({"type": kind, "object": object})))
}

fn status(code: u16) -> Answer {
    let body = json!({"kind": "Status", "code": code, "message": "on order"}).to_string();
    let body = Full::from(body).boxed_unsync();
    Response::builder().status(code).body(body).unwrap()
}
