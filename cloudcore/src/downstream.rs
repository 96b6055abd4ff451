//! Downstream: watches of Kubernetes in, one desired set per edge node out.
//!
//! Owns the feeds (Pods, Nodes, Services; Secrets and ConfigMaps object by object), the index that
//! they fill, and what is published from it. Takes CloudCore's clients and the set of edge nodes;
//! gives sessions a `NodeFeed` of levels, and the writer of statuses the live state of each Pod.
//!
//! ```text
//!  pods   ─┐                                         ┌─▶ NodeFeed  (a session each)
//!  nodes  ─┼─ bounded queue ─▶ index ─▶ published ───┤
//!  services┘        ▲            │                   └─▶ PodViews, pod(uid), node(name)
//!                   └─ configs ◀─┘ read, watch
//! ```
//!
//! One task writes; it awaits nothing but its queue. Never: an object that no Pod of the node
//! names, a status written, state that Kubernetes could not rebuild.

mod backoff;
mod configs;
mod feed;
pub mod index;
pub mod metrics;
pub mod published;
pub mod references;
mod source;
pub mod versioned;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use common::ids::{Kind, NodeName, ObjectKey};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use self::configs::{Configs, Told};
use self::feed::{Ask, Feed, Seen};
pub use self::index::Malformed;
pub use self::index::live::{NodeLive, PodView};
use self::index::{Changes, Index};
pub use self::metrics::Metrics;
use self::published::Published;
pub use self::published::{NodeFeed, NodeSnapshot, PodViews};
use self::source::Access;
pub use self::versioned::Versioned;

/// What feeds tell the index before it looks. Each place holds one object; the API server's own
/// flow control does the rest when the index is slower than all feeds together.
const QUEUE: usize = 256;

/// Between two looks for marks of a cluster that went back in time.
const SEEN_AGAIN: Duration = Duration::from_millis(20);

/// Asks for a consistent list that wait for a feed; a session that finds no place waits in line.
const ASKS: usize = 64;

/// Feeds with one watch for the cluster.
const CLUSTER_KINDS: [Kind; 3] = [Kind::Pod, Kind::Node, Kind::Services];

/// The API server as this module needs it.
pub trait Clients: Clone + Send + Sync + 'static {
    /// CloudCore's own account: lists.
    fn own(&self) -> kube::Client;
    /// The same on connections of their own, for what stays open: watches.
    fn own_watch(&self) -> kube::Client;
    /// Marks a request of either client as made for the node, so that the API server judges it as
    /// the node's, where it can. One client then serves all nodes: a client each would cost a task
    /// for every Secret of the fleet.
    fn mark_as_node(request: &mut http::Request<kube::client::Body>, node: &NodeName);
}

#[derive(Debug, Clone)]
pub struct Config {
    /// How long `Downstream::consistent` waits for the API server.
    pub consistent_deadline: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            consistent_deadline: Duration::from_secs(30),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A defect: the process must stop and be started again.
    #[error("a feed of the API server panicked")]
    Panicked(#[source] JoinError),
    #[error("a feed of the API server ended by itself")]
    Ended,
}

/// Why there is no consistent view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    #[error("the API server gave no consistent list in time; the node keeps what it has")]
    Deadline,
    #[error("CloudCore is stopping")]
    Stopping,
}

/// What sessions and the writer of statuses hold.
#[derive(Clone)]
pub struct Downstream {
    published: Arc<Published>,
    metrics: Arc<Metrics>,
    asks: [mpsc::Sender<Ask>; 3],
    inbox: mpsc::Sender<Input>,
    deadline: Duration,
}

impl Downstream {
    /// The node's desired set; empty and incomplete for a node that is none of ours (yet).
    pub fn feed(&self, node: &NodeName) -> NodeFeed {
        self.published.feed(node)
    }

    /// The live state of a Pod of an edge node, by UID.
    pub fn pod(&self, uid: &str) -> Option<Arc<PodView>> {
        self.published.pod(uid)
    }

    /// The live state of an edge node's Node.
    pub fn node(&self, node: &NodeName) -> Option<Arc<NodeLive>> {
        self.published.node(node)
    }

    /// The live state of all of a node's Pods. It also says when the node's Node changed.
    pub fn pod_views(&self, node: &NodeName) -> PodViews {
        self.published.pod_views(node)
    }

    /// Waits until Pods, Nodes and Services have been listed once. Cancel safe.
    pub async fn listed(&self) {
        let mut listed = self.published.listed();
        if listed.wait_for(|listed| *listed).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Reads everything that the node's set is made of once more, consistently, and gives the
    /// marks of the result. For a replica whose cache is behind what the edge already saw: marks
    /// that are still below the edge's mean that the cluster itself went back in time.
    ///
    /// Calls that come together share their lists. Cancel safe.
    pub async fn consistent(&self, node: &NodeName) -> Result<BTreeMap<Kind, u64>, Unavailable> {
        let all = async {
            let mut answers = Vec::new();
            for asks in &self.asks {
                let (done, answer) = oneshot::channel();
                let node = node.clone();
                let asked = asks.send(Ask { node, done }).await;
                asked.map_err(|_| Unavailable::Stopping)?;
                answers.push(answer);
            }
            let (done, answer) = oneshot::channel();
            let of = node.clone();
            let asked = self.inbox.send(Input::ReadAgain { node: of, done }).await;
            asked.map_err(|_| Unavailable::Stopping)?;
            answers.push(answer);
            let answered = futures::future::try_join_all(answers).await;
            answered.map_err(|_| Unavailable::Stopping)?;
            Ok(self.seen(&self.feed(node)).await)
        };
        let marks = tokio::time::timeout(self.deadline, all).await;
        marks.map_err(|_| Unavailable::Deadline)?
    }

    /// The node's marks, once each is one: after the cluster went back there are none for the
    /// moment that it takes to see it again.
    async fn seen(&self, feed: &NodeFeed) -> BTreeMap<Kind, u64> {
        loop {
            let marks = feed.snapshot().marks;
            if marks.values().all(|mark| *mark > 0) {
                return marks;
            }
            // Marks wake nobody, and this lasts a few round trips.
            tokio::time::sleep(SEEN_AGAIN).await;
        }
    }
}

/// What the one writer takes in.
enum Input {
    Seen(Seen),
    Told(Told),
    ReadAgain {
        node: NodeName,
        done: oneshot::Sender<()>,
    },
}

impl From<Seen> for Input {
    fn from(seen: Seen) -> Self {
        Self::Seen(seen)
    }
}

impl From<Told> for Input {
    fn from(told: Told) -> Self {
        Self::Told(told)
    }
}

/// The writer, until it runs.
pub struct Task<C> {
    index: Index,
    published: Arc<Published>,
    metrics: Arc<Metrics>,
    clients: C,
    edge_nodes: watch::Receiver<Arc<BTreeSet<NodeName>>>,
    /// What each feed takes; gone once they run.
    asks: [Option<mpsc::Receiver<Ask>>; 3],
    list_again: watch::Sender<u64>,
    inbox: mpsc::Receiver<Input>,
    inbox_sender: mpsc::Sender<Input>,
    malformed: mpsc::Sender<Malformed>,
    /// Who waits for reads of which node's references. As many as there are calls of `consistent`,
    /// one a session.
    waiting: Vec<Waiting>,
    /// Who asked for lists that are applied, to be told once they are published.
    listed: Vec<oneshot::Sender<()>>,
    /// The edge nodes changed: cells of those that left go once their last set is published.
    prune: Option<Arc<BTreeSet<NodeName>>>,
}

struct Waiting {
    node: NodeName,
    references: BTreeSet<ObjectKey>,
    done: oneshot::Sender<()>,
}

/// Builds the downstream side. `malformed` takes what cannot be understood, for an Event on it; when
/// it is full such a report is dropped and counted.
pub fn build<C: Clients>(
    config: Config,
    clients: C,
    edge_nodes: watch::Receiver<Arc<BTreeSet<NodeName>>>,
    malformed: mpsc::Sender<Malformed>,
) -> (Downstream, Task<C>) {
    let (inbox_sender, inbox) = mpsc::channel(QUEUE);
    let asks = CLUSTER_KINDS.map(|_| mpsc::channel(ASKS));
    let published = Arc::new(Published::default());
    let metrics = Arc::new(Metrics::default());
    let handle = Downstream {
        published: published.clone(),
        metrics: metrics.clone(),
        asks: asks.each_ref().map(|(sender, _)| sender.clone()),
        inbox: inbox_sender.clone(),
        deadline: config.consistent_deadline,
    };
    let task = Task {
        index: Index::default(),
        published,
        metrics,
        clients,
        edge_nodes,
        asks: asks.map(|(_, receiver)| Some(receiver)),
        list_again: watch::Sender::new(0),
        inbox,
        inbox_sender,
        malformed,
        waiting: Vec::new(),
        listed: Vec::new(),
        prune: None,
    };
    (handle, task)
}

impl<C: Clients> Task<C> {
    /// Runs until `shutdown`, or until a defect ends a feed.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), Error> {
        let access = Access::of(&self.clients);
        let mut feeds = self.start_feeds(&access);
        let out = self.inbox_sender.clone();
        let mut configs = Configs::new(access, out, self.metrics.clone());
        let mut batch = Vec::with_capacity(QUEUE);
        loop {
            // Cancel safe: `recv_many` takes nothing unless it is the branch that returns.
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return Ok(()),
                ended = feeds.join_next() => return Err(match ended {
                    Some(Err(error)) => Error::Panicked(error),
                    Some(Ok(())) | None => Error::Ended,
                }),
                error = configs.reap() => return Err(Error::Panicked(error)),
                _ = self.inbox.recv_many(&mut batch, QUEUE) => {}
            }
            for input in batch.drain(..) {
                self.take(input, &mut configs);
            }
            self.publish(&mut configs);
        }
    }

    fn start_feeds(&mut self, access: &Access) -> JoinSet<()> {
        let mut feeds = JoinSet::new();
        for (kind, asks) in CLUSTER_KINDS.into_iter().zip(&mut self.asks) {
            let (Some(reading), Some(asks)) = (references::reading(kind), asks.take()) else {
                continue;
            };
            let feed = Feed {
                reading,
                access: access.clone(),
                out: self.inbox_sender.clone(),
                asks,
                list_again: self.list_again.subscribe(),
                edges: (kind != Kind::Services).then(|| self.edge_nodes.clone()),
                metrics: self.metrics.clone(),
                state: Default::default(),
            };
            feeds.spawn(feed.run());
        }
        feeds
    }

    fn take(&mut self, input: Input, configs: &mut Configs<Input>) {
        match input {
            Input::Seen(seen) => self.take_seen(seen),
            Input::Told(told) => self.take_told(told, configs),
            Input::ReadAgain { node, done } => {
                let references = self.index.read_again(&node).into_iter().collect();
                self.waiting.push(Waiting {
                    node,
                    references,
                    done,
                });
            }
        }
    }

    fn take_seen(&mut self, seen: Seen) {
        let index = &mut self.index;
        match seen {
            Seen::EdgeNodes(names) => {
                index.edge_nodes(&names);
                self.prune = Some(names);
            }
            Seen::ListBegins {
                kind,
                covered,
                revision,
            } => match kind {
                Kind::Pod => index.pod_list_begins(&covered, revision),
                Kind::Node => index.node_list_begins(),
                Kind::Services => index.service_list_begins(),
                Kind::ConfigMap | Kind::Secret | Kind::Unknown(_) => {}
            },
            Seen::Object {
                kind,
                origin,
                object,
            } => match kind {
                Kind::Pod => index.apply_pod(&object, origin),
                Kind::Node => index.apply_node(&object, origin),
                Kind::Services => index.apply_service(&object, origin),
                Kind::ConfigMap | Kind::Secret | Kind::Unknown(_) => {}
            },
            Seen::Deleted { kind, object } => match kind {
                Kind::Pod => index.remove_pod(&object),
                Kind::Node => index.remove_node(&object),
                Kind::Services => index.remove_service(&object),
                Kind::ConfigMap | Kind::Secret | Kind::Unknown(_) => {}
            },
            Seen::ListEnds {
                kind,
                covered,
                revision,
                done,
            } => {
                match kind {
                    Kind::Pod => index.pod_list_ends(&covered, revision),
                    Kind::Node => index.node_list_ends(&covered, revision),
                    Kind::Services => index.service_list_ends(revision),
                    Kind::ConfigMap | Kind::Secret | Kind::Unknown(_) => {}
                }
                self.listed.extend(done);
            }
            Seen::Progress { kind, revision } => match kind {
                Kind::Pod => index.pod_progress(revision),
                Kind::Node => index.node_progress(revision),
                Kind::Services => index.service_progress(revision),
                Kind::ConfigMap | Kind::Secret | Kind::Unknown(_) => {}
            },
        }
    }

    fn take_told(&mut self, told: Told, configs: &mut Configs<Input>) {
        match told {
            Told::Read {
                reference,
                node,
                ticket,
                answer,
            } => {
                if self.index.read(&reference, &node, ticket, &answer) {
                    configs.answered(&reference, &node);
                    self.answered(&reference, &node);
                }
            }
            Told::Observed {
                reference,
                ticket,
                answer,
            } => {
                self.index.observe(&reference, ticket, &answer);
            }
            Told::Progress {
                reference,
                ticket,
                view,
            } => {
                self.index.progress(&reference, ticket, view);
            }
            Told::Refused { reference, ticket } => self.index.refuse(&reference, ticket),
            Told::Stuck { reference, node } => self.index.stuck(&reference, &node),
        }
    }

    /// Acts on what the batch changed: reads first, then live states and sets, then the marks that vouch for
    /// them.
    fn publish(&mut self, configs: &mut Configs<Input>) {
        let Changes {
            nodes,
            live,
            commands,
            malformed,
            rewound,
            list_again,
        } = self.index.take();
        commands
            .into_iter()
            .for_each(|command| configs.obey(command));
        for node in live {
            self.published.set_live(&node, self.index.live(&node));
        }
        for node in nodes {
            if self.published.set(&node, self.index.desired(&node)) {
                self.metrics.published.add(1);
            }
        }
        self.published.set_marks(self.index.marks());
        self.tell_waiting();
        self.metrics.pods.set(self.index.pods_held() as u64);
        self.metrics
            .references
            .set(self.index.references_held() as u64);
        malformed.into_iter().for_each(|report| self.report(report));
        if rewound {
            self.metrics.rewinds.add(1);
            tracing::warn!("the cluster went back in time (restored from a backup?): listing all");
        }
        if list_again {
            self.list_again.send_modify(|n| *n += 1);
        }
        if let Some(edges) = self.prune.take() {
            self.published.prune(&edges);
        }
    }

    fn report(&self, malformed: Malformed) {
        self.metrics.malformed.add(1);
        let (namespace, name) = (&malformed.namespace, &malformed.name);
        tracing::warn!(?namespace, ?name, "{}", malformed.message);
        if self.malformed.try_send(malformed).is_err() {
            self.metrics.malformed_dropped.add(1);
        }
    }

    /// One answer came: nobody waits for it any more.
    fn answered(&mut self, reference: &ObjectKey, node: &NodeName) {
        for waiting in self.waiting.iter_mut().filter(|w| w.node == *node) {
            waiting.references.remove(reference);
        }
    }

    /// Tells those who wait for nothing any more, once the sets with their answers are published. A
    /// reference that no Pod of the node names any more is not waited for.
    fn tell_waiting(&mut self) {
        for done in self.listed.drain(..) {
            // Whoever asked may have gone.
            let _ = done.send(());
        }
        let Self { waiting, index, .. } = self;
        let rest = std::mem::take(waiting).into_iter().filter_map(|mut one| {
            one.references.retain(|r| index.is_wanted(r, &one.node));
            if one.done.is_closed() {
                return None;
            }
            if !one.references.is_empty() {
                return Some(one);
            }
            // Whoever asked may have gone.
            let _ = one.done.send(());
            None
        });
        *waiting = rest.collect();
    }
}

#[cfg(test)]
mod tests;
