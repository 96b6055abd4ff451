//! The shared body of the cluster-wide feeds: list, then watch, for ever.
//!
//! Owns one watch. Takes a row of the table of readings and a client of CloudCore's own; gives what
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
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::backoff::Backoff;
use super::index::{Covered, Origin, revision};
use super::metrics::Metrics;
use super::references::Reading;
use super::source::{Fault, Line, Lines, Page, Source};

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
        /// The newest request for a list that this one answers.
        request: u64,
    },
    Progress {
        kind: Kind,
        revision: u64,
    },
}

/// The first wait after a failure.
const FIRST_WAIT: Duration = Duration::from_millis(100);

/// Lists begin at least this far apart, so that a fleet that asks for one each does not turn the
/// feed into a loop of lists; whoever asks meanwhile shares the next.
const LIST_SPACING: Duration = Duration::from_millis(500);

/// Objects a page. A page of Pods is then about 5 MB.
const PAGE: u32 = 500;

/// A watch without a word for so long is given up. Bookmarks come about every minute.
const SILENCE: Duration = Duration::from_secs(300);

/// Up to so many new nodes are listed one by one; above it one list of everything is cheaper.
const LISTED_SINGLY: usize = 16;

/// The feed is told to stop by dropping it; it ends by itself when nobody listens any more.
pub(super) struct Feed<T> {
    pub(super) reading: &'static Reading,
    pub(super) client: kube::Client,
    pub(super) out: mpsc::Sender<T>,
    /// Counts the requests for a list.
    pub(super) requests: watch::Receiver<u64>,
    /// Whose Pods matter; only for the feed of Pods.
    pub(super) edges: Option<watch::Receiver<Arc<BTreeSet<NodeName>>>>,
    pub(super) metrics: Arc<Metrics>,
}

/// Why the watch of a feed ended.
enum Ended {
    /// By itself, or for a reason that a new watch at the same place may mend.
    Early(Option<Fault>),
    ListAgain,
    NobodyListens,
}

struct Closed;

impl<T: From<Seen> + Send + 'static> Feed<T> {
    pub(super) async fn run(mut self) {
        let mut backoff = Backoff::new(FIRST_WAIT, 0);
        let mut known = BTreeSet::new();
        let mut not_before = Instant::now();
        loop {
            sleep_until(not_before).await;
            not_before = Instant::now() + LIST_SPACING;
            if self.tell_edges(&mut known).await.is_err() {
                return;
            }
            let source = self.source(self.reading.field_selector);
            let mut at = match self.list(&source, Covered::All, &known).await {
                Ok(Ok(revision)) => revision,
                Ok(Err(fault)) => {
                    self.wait(&mut backoff, Some(fault), "list").await;
                    continue;
                }
                Err(Closed) => return,
            };
            loop {
                match self
                    .follow(&source, &mut at, &mut known, &mut backoff)
                    .await
                {
                    Ended::NobodyListens => return,
                    Ended::ListAgain => break,
                    Ended::Early(Some(Fault::Expired)) => break,
                    Ended::Early(fault) => self.wait(&mut backoff, fault, "watch").await,
                }
                match source.page(1, None).await {
                    Ok(page) if page.revision < at => break,
                    Ok(_) => {}
                    Err(fault) => self.wait(&mut backoff, Some(fault), "probe").await,
                }
            }
        }
    }

    fn source(&self, selector: &str) -> Source {
        Source::cluster(self.client.clone(), self.reading.plural, selector)
    }

    /// One watch, from `at` to its end.
    async fn follow(
        &mut self,
        source: &Source,
        at: &mut u64,
        known: &mut BTreeSet<NodeName>,
        backoff: &mut Backoff,
    ) -> Ended {
        let lifetime = Duration::from_secs(300).mul_f64(1.0 + rand::random::<f64>());
        let mut lines = match source.watch(*at, lifetime).await {
            Ok(lines) => lines,
            Err(fault) => return Ended::Early(Some(fault)),
        };
        loop {
            // Each branch is cancel safe: a line that was not taken stays in the reader.
            let line = tokio::select! {
                biased;
                () = self.out.closed() => return Ended::NobodyListens,
                Ok(()) = self.requests.changed() => return Ended::ListAgain,
                () = edges_changed(&mut self.edges) => {
                    match self.list_new(known).await {
                        Ok(Ok(())) => continue,
                        Ok(Err(_)) => return Ended::ListAgain,
                        Err(Closed) => return Ended::NobodyListens,
                    }
                }
                line = next_line(&mut lines) => line,
            };
            match line {
                Ok(Some(line)) => {
                    backoff.reset();
                    match self.pass(line, known).await {
                        Ok(revision) => *at = revision.max(*at),
                        Err(Closed) => return Ended::NobodyListens,
                    }
                }
                Ok(None) => return Ended::Early(None),
                Err(fault) => return Ended::Early(Some(fault)),
            }
        }
    }

    /// Passes one event on. Gives the revision that it reached.
    async fn pass(&self, line: Line, known: &BTreeSet<NodeName>) -> Result<u64, Closed> {
        let kind = self.reading.kind;
        let (raw, deleted) = match line {
            Line::Bookmark(revision) => {
                self.tell(Seen::Progress { kind, revision }).await?;
                return Ok(revision);
            }
            Line::Applied(raw) => (raw, false),
            Line::Deleted(raw) => (raw, true),
        };
        let Some(object) = self.parse(&raw) else {
            return Ok(0);
        };
        let at = revision(&object).unwrap_or_default();
        if self.concerns(&object, known) {
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
        self.tell(Seen::Progress { kind, revision: at }).await?;
        Ok(at)
    }

    /// One whole list, page by page, at one revision.
    async fn list(
        &mut self,
        source: &Source,
        covered: Covered,
        known: &BTreeSet<NodeName>,
    ) -> Result<Result<u64, Fault>, Closed> {
        let kind = self.reading.kind;
        // A list of some nodes answers no request.
        let request = match covered {
            Covered::All => *self.requests.borrow_and_update(),
            Covered::Nodes(_) => 0,
        };
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
                if let Some(object) = self.parse(&raw).filter(|o| self.concerns(o, known)) {
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
                self.tell(Seen::ListEnds {
                    kind,
                    covered,
                    revision,
                    request,
                })
                .await?;
                return Ok(Ok(revision));
            }
        }
    }

    /// Tells which nodes are edge nodes, and gives those that were not before.
    async fn tell_edges(
        &mut self,
        known: &mut BTreeSet<NodeName>,
    ) -> Result<BTreeSet<NodeName>, Closed> {
        let Some(edges) = &mut self.edges else {
            return Ok(BTreeSet::new());
        };
        let names = edges.borrow_and_update().clone();
        let new = names.difference(known).cloned().collect();
        *known = names.as_ref().clone();
        self.tell(Seen::EdgeNodes(names)).await?;
        Ok(new)
    }

    /// Lists the Pods of nodes that became edge nodes while the watch was open. It stands between
    /// two events, so each event that follows is either newer than the list or known to be older.
    async fn list_new(&mut self, known: &mut BTreeSet<NodeName>) -> Result<Result<(), ()>, Closed> {
        let new = self.tell_edges(known).await?;
        if new.len() > LISTED_SINGLY {
            return Ok(Err(()));
        }
        for node in new {
            let source = self.source(&format!("spec.nodeName={node}"));
            let covered = Covered::Nodes(BTreeSet::from([node]));
            if let Err(fault) = self.list(&source, covered, known).await? {
                tracing::warn!(%fault, "the Pods of a new edge node could not be listed");
                return Ok(Err(()));
            }
        }
        Ok(Ok(()))
    }

    /// Whether an object is anything to us: a Pod of a node that is not an edge's is dropped here,
    /// before it costs a place in the queue.
    fn concerns(&self, object: &Value, known: &BTreeSet<NodeName>) -> bool {
        if self.reading.kind != Kind::Pod {
            return true;
        }
        let node = object.pointer("/spec/nodeName").and_then(Value::as_str);
        node.and_then(|n| NodeName::parse(n).ok())
            .is_some_and(|n| known.contains(&n))
    }

    fn parse(&self, raw: &RawValue) -> Option<Value> {
        self.metrics.received_bytes.add(raw.get().len() as u64);
        serde_json::from_str(raw.get()).ok()
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
