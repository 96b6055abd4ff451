//! The shared body of the cluster-wide feeds: list, then watch, for ever.
//!
//! Owns one watch. Takes a row of the table of readings and CloudCore's own access; gives what
//! it sees, in order, to the index. Survives 410 (lists again), 429, 5xx and an API server that is
//! away (back-off with jitter), and a cluster that was restored from a backup: such a server
//! answers a watch at a revision of the future with 200 and silence, so each time the watch is
//! opened again a one-object list says how far the cluster really is. Never: an object kept, a
//! list taken for whole before its last page.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use common::ids::{Kind, NodeName};
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::backoff::Backoff;
use super::index::{Covered, Origin, revision};
use super::metrics::Metrics;
use super::references::Reading;
use super::source::{Access, Fault, Line, Lines, Page, Source};

/// What the feeds tell the index.
pub(super) enum Seen {
    EdgeNodes(Arc<BTreeSet<NodeName>>),
    ListBegins {
        kind: Kind,
        covered: Covered,
        revision: u64,
    },
    Object {
        kind: Kind,
        origin: Origin,
        object: Value,
    },
    Deleted {
        kind: Kind,
        object: Value,
    },
    ListEnds {
        kind: Kind,
        covered: Covered,
        revision: u64,
        /// Who asked for this list.
        done: Vec<oneshot::Sender<()>>,
    },
    Progress {
        kind: Kind,
        revision: u64,
    },
}

/// The first wait after a failure.
const FIRST_WAIT: Duration = Duration::from_millis(100);

/// Lists of everything begin at least this far apart, so that a fleet that asks for one each does
/// not turn the feed into a loop of lists; whoever asks meanwhile shares the next.
const LIST_SPACING: Duration = Duration::from_millis(500);

/// Objects a page. A page of Pods is then about 5 MB.
const PAGE: u32 = 500;

/// A watch without a word for so long is given up. Bookmarks come about every minute.
const SILENCE: Duration = Duration::from_secs(300);

/// Up to so many nodes are listed one by one; above it one list of everything is cheaper.
const LISTED_SINGLY: usize = 16;

/// Somebody wants what concerns `node` as the cluster is at this moment. `done` is told once that
/// is published.
pub(super) struct Ask {
    pub(super) node: NodeName,
    pub(super) done: oneshot::Sender<()>,
}

/// The feed is told to stop by dropping it; it ends by itself when nobody listens any more.
pub(super) struct Feed<T> {
    pub(super) reading: &'static Reading,
    pub(super) access: Access,
    pub(super) out: mpsc::Sender<T>,
    pub(super) asks: mpsc::Receiver<Ask>,
    /// Changes when everything must be listed again.
    pub(super) list_again: watch::Receiver<u64>,
    /// Whose Pods and live state matter; not for Services.
    pub(super) edges: Option<watch::Receiver<Arc<BTreeSet<NodeName>>>>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) state: State,
}

/// Where a feed stands.
#[derive(Default)]
pub(super) struct State {
    /// The revision up to which everything was passed on.
    at: u64,
    /// The edge nodes that the index was told of.
    known: BTreeSet<NodeName>,
    /// Asks taken and not yet answered; one a session that waits.
    owed: Vec<Ask>,
}

/// Why the watch of a feed ended.
enum Ended {
    /// By itself, or for a reason that a new watch at the same place may mend.
    Early(Option<Fault>),
    ListAgain,
    NobodyListens,
}

struct Closed;

/// An object as far as it matters, and the revision of its event all the same.
#[derive(Default)]
struct Parsed {
    object: Option<Value>,
    revision: u64,
}

/// Nobody listens; or what the API server said.
type Listed = Result<Result<u64, Fault>, Closed>;

impl<T: From<Seen> + Send + 'static> Feed<T> {
    pub(super) async fn run(mut self) {
        let mut backoff = Backoff::new(FIRST_WAIT, 0);
        let mut not_before = Instant::now();
        let source = self.source(self.reading.field_selector);
        loop {
            sleep_until(not_before).await;
            not_before = Instant::now() + LIST_SPACING;
            self.list_again.mark_unchanged();
            self.take_asks();
            if self.tell_edges().await.is_err() {
                return;
            }
            self.state.at = match self.list(&source, Covered::All).await {
                Ok(Ok(revision)) => revision,
                Ok(Err(fault)) => {
                    self.wait(&mut backoff, Some(fault), "list").await;
                    continue;
                }
                Err(Closed) => return,
            };
            loop {
                match self.follow(&source, &mut backoff).await {
                    Ended::NobodyListens => return,
                    Ended::ListAgain => break,
                    Ended::Early(Some(Fault::Expired)) => break,
                    Ended::Early(fault) => self.wait(&mut backoff, fault, "watch").await,
                }
                match source.page(1, None).await {
                    Ok(page) if page.revision < self.state.at => break,
                    Ok(_) => {}
                    Err(fault) => self.wait(&mut backoff, Some(fault), "probe").await,
                }
            }
        }
    }

    fn source(&self, selector: &str) -> Source {
        Source::cluster(self.access.clone(), self.reading.plural, selector)
    }

    /// What concerns one node only, if this kind can be asked so.
    fn source_of(&self, node: &NodeName) -> Option<Source> {
        match self.reading.kind {
            Kind::Pod => Some(self.source(&format!("spec.nodeName={node}"))),
            Kind::Node => Some(self.source(&format!("metadata.name={node}"))),
            Kind::Services | Kind::ConfigMap | Kind::Secret | Kind::Unknown(_) => None,
        }
    }

    /// One watch, from where the feed stands to the watch's end.
    async fn follow(&mut self, source: &Source, backoff: &mut Backoff) -> Ended {
        let lifetime = Duration::from_secs(300).mul_f64(1.0 + rand::random::<f64>());
        let mut lines = match source.watch(self.state.at, lifetime).await {
            Ok(lines) => lines,
            Err(fault) => return Ended::Early(Some(fault)),
        };
        loop {
            // Each branch is cancel safe: a line that was not taken stays in the reader.
            let line = tokio::select! {
                biased;
                () = self.out.closed() => return Ended::NobodyListens,
                Ok(()) = self.list_again.changed() => return Ended::ListAgain,
                () = edges_changed(&mut self.edges) => Err(self.list_new().await),
                Some(ask) = self.asks.recv() => Err(self.list_asked(ask).await),
                line = next_line(&mut lines) => Ok(line),
            };
            match line {
                Ok(Ok(Some(line))) => {
                    backoff.reset();
                    match self.pass(line).await {
                        Ok(revision) => self.state.at = revision.max(self.state.at),
                        Err(Closed) => return Ended::NobodyListens,
                    }
                }
                Ok(Ok(None)) => return Ended::Early(None),
                Ok(Err(fault)) => return Ended::Early(Some(fault)),
                Err(Ok(true)) => {}
                Err(Ok(false)) => return Ended::ListAgain,
                Err(Err(Closed)) => return Ended::NobodyListens,
            }
        }
    }

    /// Passes one event on. Gives the revision that it reached.
    async fn pass(&self, line: Line) -> Result<u64, Closed> {
        let kind = self.reading.kind;
        let (raw, deleted) = match line {
            Line::Bookmark(revision) => {
                self.tell(Seen::Progress { kind, revision }).await?;
                return Ok(revision);
            }
            Line::Applied(raw) => (raw, false),
            Line::Deleted(raw) => (raw, true),
        };
        let Parsed { object, revision } = self.parse(&raw);
        if let Some(object) = object {
            let origin = Origin::Watch;
            self.tell(if deleted {
                Seen::Deleted { kind, object }
            } else {
                Seen::Object {
                    kind,
                    origin,
                    object,
                }
            })
            .await?;
        }
        self.tell(Seen::Progress { kind, revision }).await?;
        Ok(revision)
    }

    /// One whole list, page by page, at one revision.
    async fn list(&mut self, source: &Source, covered: Covered) -> Listed {
        let kind = self.reading.kind;
        self.metrics.lists.add(1);
        let (mut limit, mut token, mut at) = (PAGE, None::<String>, None);
        loop {
            let Page {
                revision,
                next,
                items,
            } = match source.page(limit, token.as_deref()).await {
                Ok(page) => page,
                // Objects of the cluster's largest size fit in pages of a few.
                Err(Fault::TooLarge) if limit > 1 => {
                    limit = (limit / 8).max(1);
                    continue;
                }
                Err(fault) => return Ok(Err(fault)),
            };
            if at.is_none() {
                // A list of one node cannot take the whole cluster back in time.
                if covered != Covered::All && revision < self.state.at {
                    return Ok(Err(Fault::Expired));
                }
                at = Some(revision);
                let covered = covered.clone();
                self.tell(Seen::ListBegins {
                    kind,
                    covered,
                    revision,
                })
                .await?;
            }
            for raw in items {
                if let Some(object) = self.parse(&raw).object {
                    let origin = Origin::List;
                    self.tell(Seen::Object {
                        kind,
                        origin,
                        object,
                    })
                    .await?;
                }
            }
            token = next;
            if token.is_none() {
                let revision = at.unwrap_or(revision);
                let done = self.answered_by(&covered);
                self.tell(Seen::ListEnds {
                    kind,
                    covered,
                    revision,
                    done,
                })
                .await?;
                return Ok(Ok(revision));
            }
        }
    }

    /// Tells which nodes are edge nodes, and gives those that were not before.
    async fn tell_edges(&mut self) -> Result<BTreeSet<NodeName>, Closed> {
        let Some(edges) = &mut self.edges else {
            return Ok(BTreeSet::new());
        };
        let names = edges.borrow_and_update().clone();
        let known = std::mem::replace(&mut self.state.known, names.as_ref().clone());
        let new = names.difference(&known).cloned().collect();
        // One of the feeds tells the index, so that it hears each change before what follows from it.
        if self.reading.kind == Kind::Pod {
            self.tell(Seen::EdgeNodes(names)).await?;
        }
        Ok(new)
    }

    /// Lists what concerns nodes that became edge nodes while the watch was open.
    async fn list_new(&mut self) -> Result<bool, Closed> {
        let new = self.tell_edges().await?;
        self.list_nodes(new).await
    }

    /// Lists what was asked for, in this ask and in those that wait behind it.
    async fn list_asked(&mut self, ask: Ask) -> Result<bool, Closed> {
        self.state.owed.push(ask);
        self.take_asks();
        let nodes = self.state.owed.iter().map(|ask| ask.node.clone());
        self.list_nodes(nodes.collect()).await
    }

    /// Lists these nodes one by one; false when everything must be listed. It stands between two
    /// events, so each event that follows is either newer than the list or known to be older.
    async fn list_nodes(&mut self, nodes: BTreeSet<NodeName>) -> Result<bool, Closed> {
        if nodes.len() > LISTED_SINGLY {
            return Ok(false);
        }
        for node in nodes {
            let Some(source) = self.source_of(&node) else {
                return Ok(false);
            };
            let covered = Covered::Nodes(BTreeSet::from([node]));
            if let Err(fault) = self.list(&source, covered).await? {
                let (error, kind) = (chain(&fault), self.reading.plural);
                tracing::warn!(kind, error, "one node could not be listed; listing all");
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Takes the asks that wait, and forgets those that nobody waits for any more.
    fn take_asks(&mut self) {
        self.state.owed.retain(|ask| !ask.done.is_closed());
        while let Ok(ask) = self.asks.try_recv() {
            self.state.owed.push(ask);
        }
    }

    fn answered_by(&mut self, covered: &Covered) -> Vec<oneshot::Sender<()>> {
        let covers = |ask: &mut Ask| match covered {
            Covered::All => true,
            Covered::Nodes(nodes) => nodes.contains(&ask.node),
        };
        let answered = self.state.owed.extract_if(.., covers);
        answered.map(|ask| ask.done).collect()
    }

    /// Reads an object and drops what is nothing to us before it costs a place in the queue: Pods
    /// of nodes that are no edge's, and the status of such Nodes.
    fn parse(&self, raw: &RawValue) -> Parsed {
        self.metrics.received_bytes.add(raw.get().len() as u64);
        let Ok(mut object) = serde_json::from_str::<Value>(raw.get()) else {
            return Parsed::default();
        };
        let revision = revision(&object).unwrap_or_default();
        let is_edge = |path| {
            let name = object.pointer(path).and_then(Value::as_str);
            let name = name.and_then(|n| NodeName::parse(n).ok());
            name.is_some_and(|n| self.state.known.contains(&n))
        };
        let concerns = match self.reading.kind {
            Kind::Pod => is_edge("/spec/nodeName"),
            Kind::Node => {
                if !is_edge("/metadata/name")
                    && let Some(fields) = object.as_object_mut()
                {
                    fields.remove("status");
                }
                true
            }
            Kind::Services | Kind::ConfigMap | Kind::Secret | Kind::Unknown(_) => true,
        };
        Parsed {
            object: concerns.then_some(object),
            revision,
        }
    }

    async fn tell(&self, seen: Seen) -> Result<(), Closed> {
        self.out.send(seen.into()).await.map_err(|_| Closed)
    }

    async fn wait(&self, backoff: &mut Backoff, fault: Option<Fault>, what: &str) {
        let wait = backoff.next(fault.as_ref(), rand::random());
        if let Some(fault) = fault {
            self.metrics.faults.add(1);
            let (error, kind) = (chain(&fault), self.reading.plural);
            tracing::warn!(
                kind,
                what,
                error,
                ?wait,
                "the API server did not answer; trying again"
            );
        }
        sleep(wait).await;
    }
}

/// The next event, or `Silent` when even bookmarks stay away.
pub(super) async fn next_line(lines: &mut Lines) -> Result<Option<Line>, Fault> {
    timeout(SILENCE, lines.next())
        .await
        .unwrap_or(Err(Fault::Silent))
}

/// An error and its sources on one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

async fn edges_changed(edges: &mut Option<watch::Receiver<Arc<BTreeSet<NodeName>>>>) {
    let changed = match edges {
        Some(edges) => edges.changed().await.is_ok(),
        None => false,
    };
    if !changed {
        std::future::pending::<()>().await;
    }
}
