//! The feed of what Pods name: one read per node, one watch per object, as nodes.
//!
//! Owns a task for each read and each watch that the index ordered, and ends it when the index says
//! so or when it is dropped itself. A read is tried until the answer is no refusal, since the
//! authorizer learns of a binding some time after we do. Gives answers with the ticket of their
//! order. Never: an object of its own, a read that no order asked for.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use common::ids::{NodeName, ObjectKey};
use common::object::Content;
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{AbortHandle, JoinError, JoinSet};
use tokio::time::sleep;

use super::backoff::Backoff;
use super::feed::{chain, next_line};
use super::index::{Answer, Command, revision};
use super::metrics::Metrics;
use super::references::{reading, trimmed};
use super::source::{Access, Fault, Line, Source};

/// The answers. `Refused` is a watch's: the index may give it to another node.
pub(super) enum Told {
    Read {
        reference: ObjectKey,
        node: NodeName,
        ticket: u64,
        answer: Answer,
    },
    Observed {
        reference: ObjectKey,
        ticket: u64,
        answer: Answer,
    },
    Progress {
        reference: ObjectKey,
        ticket: u64,
        view: u64,
    },
    Refused {
        reference: ObjectKey,
        ticket: u64,
    },
    /// A read is refused for longer than an authorizer lags.
    Stuck {
        reference: ObjectKey,
        node: NodeName,
    },
}

/// Reads at one time. They share connections of at most 90 streams with each other; 30,000 of them
/// at a start of CloudCore are then done within seconds.
const READS_AT_ONCE: usize = 64;

/// The first wait after a refusal: the authorizer follows the binding within milliseconds, and a
/// Pod waits for it.
const FIRST_READ_WAIT: Duration = Duration::from_millis(10);

/// So many refusals take about five seconds: no lag explains them.
const STUCK: u32 = 10;

const FIRST_WATCH_WAIT: Duration = Duration::from_millis(500);

/// How long one watch of an object lives, up to twice as long by chance. Ten thousand objects then
/// cost four requests a second.
const LIFETIME: Duration = Duration::from_secs(1800);

pub(super) struct Configs<T> {
    access: Access,
    out: mpsc::Sender<T>,
    metrics: Arc<Metrics>,
    permits: Arc<Semaphore>,
    tasks: JoinSet<()>,
    reads: HashMap<(ObjectKey, NodeName), AbortHandle>,
    watches: HashMap<ObjectKey, AbortHandle>,
}

impl<T: From<Told> + Send + 'static> Configs<T> {
    pub(super) fn new(access: Access, out: mpsc::Sender<T>, metrics: Arc<Metrics>) -> Self {
        Self {
            access,
            out,
            metrics,
            permits: Arc::new(Semaphore::new(READS_AT_ONCE)),
            tasks: JoinSet::new(),
            reads: HashMap::new(),
            watches: HashMap::new(),
        }
    }

    pub(super) fn obey(&mut self, command: Command) {
        match command {
            Command::Read {
                reference,
                node,
                ticket,
            } => {
                let Some(one) = self.one(&reference, &node, ticket) else {
                    return;
                };
                let handle = self.tasks.spawn(one.read(self.permits.clone()));
                if let Some(old) = self.reads.insert((reference, node), handle) {
                    old.abort();
                }
            }
            Command::StopReading { reference, node } => {
                if let Some(old) = self.reads.remove(&(reference, node)) {
                    old.abort();
                }
            }
            Command::Watch {
                reference,
                node,
                ticket,
                from,
                refusals,
            } => {
                let Some(one) = self.one(&reference, &node, ticket) else {
                    return;
                };
                let handle = self.tasks.spawn(one.watch(from, refusals));
                if let Some(old) = self.watches.insert(reference, handle) {
                    old.abort();
                }
            }
            Command::Unwatch { reference } => {
                if let Some(old) = self.watches.remove(&reference) {
                    old.abort();
                }
            }
        }
    }

    /// The read is answered: its task is ending.
    pub(super) fn answered(&mut self, reference: &ObjectKey, node: &NodeName) {
        self.reads.remove(&(reference.clone(), node.clone()));
    }

    /// Collects ended tasks; gives a panic, and never anything else. Pending while nothing ends.
    pub(super) async fn reap(&mut self) -> JoinError {
        loop {
            match self.tasks.join_next().await {
                Some(Err(error)) if error.is_panic() => return error,
                Some(Ok(()) | Err(_)) => {}
                None => std::future::pending().await,
            }
        }
    }

    fn one(&self, reference: &ObjectKey, node: &NodeName, ticket: u64) -> Option<One<T>> {
        let plural = reading(reference.kind)?.plural;
        Some(One {
            source: Source::object(self.access.clone(), node.clone(), plural, reference),
            reference: reference.clone(),
            node: node.clone(),
            ticket,
            out: self.out.clone(),
            metrics: self.metrics.clone(),
        })
    }
}

/// One object, read or watched as one node.
struct One<T> {
    source: Source,
    reference: ObjectKey,
    node: NodeName,
    ticket: u64,
    out: mpsc::Sender<T>,
    metrics: Arc<Metrics>,
}

impl<T: From<Told>> One<T> {
    async fn read(self, permits: Arc<Semaphore>) {
        let mut backoff = Backoff::new(FIRST_READ_WAIT, 0);
        let mut refusals = 0_u32;
        loop {
            let Ok(permit) = permits.acquire().await else {
                return;
            };
            let answer = self.ask().await;
            drop(permit);
            match answer {
                Ok(answer) => {
                    let (reference, node, ticket) = (self.reference, self.node, self.ticket);
                    let told = Told::Read {
                        reference,
                        node,
                        ticket,
                        answer,
                    };
                    // Nobody listens any more at shutdown only.
                    let _ = self.out.send(told.into()).await;
                    return;
                }
                Err(fault) => {
                    if let Fault::Forbidden(_) = fault {
                        refusals += 1;
                    }
                    if refusals == STUCK {
                        let (reference, node) = (self.reference.clone(), self.node.clone());
                        let told = Told::Stuck { reference, node };
                        if self.out.send(told.into()).await.is_err() {
                            return;
                        }
                    }
                    self.wait(&mut backoff, &fault).await;
                }
            }
        }
    }

    async fn watch(self, from: u64, refusals: u32) {
        let mut backoff = Backoff::new(FIRST_WATCH_WAIT, refusals);
        if refusals > 0 {
            sleep(backoff.next(None, rand::random())).await;
        }
        let mut at = from;
        while let Err(fault) = self.follow(&mut at, &mut backoff).await {
            match fault {
                None => return,
                Some(Fault::Expired) => match self.ask().await {
                    Ok(answer) => {
                        at = answer.view;
                        if self.observed(answer).await.is_err() {
                            return;
                        }
                        // A server that forgets at once what it just told is not asked in a loop.
                        sleep(backoff.next(None, rand::random())).await;
                    }
                    Err(fault) => self.refused_or_wait(&mut backoff, &fault).await,
                },
                Some(fault) => self.refused_or_wait(&mut backoff, &fault).await,
            }
        }
    }

    /// One watch to its end. `Err(None)` when nobody listens any more.
    async fn follow(&self, at: &mut u64, backoff: &mut Backoff) -> Result<(), Option<Fault>> {
        loop {
            let lifetime = LIFETIME.mul_f64(1.0 + rand::random::<f64>());
            let mut lines = self.source.watch(*at, lifetime).await?;
            while let Some(line) = next_line(&mut lines).await? {
                backoff.reset();
                let (raw, deleted) = match line {
                    Line::Bookmark(view) => {
                        *at = view.max(*at);
                        let (reference, ticket) = (self.reference.clone(), self.ticket);
                        self.tell(Told::Progress {
                            reference,
                            ticket,
                            view,
                        })
                        .await?;
                        continue;
                    }
                    Line::Applied(raw) => (raw, false),
                    Line::Deleted(raw) => (raw, true),
                };
                let (mut content, revision) = self.understand(&raw)?;
                if deleted {
                    content = Content::Absent;
                }
                *at = revision.max(*at);
                self.observed(Answer {
                    content,
                    revision,
                    view: revision,
                })
                .await?;
            }
            // The end of a watch's lifetime; one that ends at once waits before the next.
            sleep(backoff.next(None, rand::random())).await;
        }
    }

    /// A consistent look at the object, and how far that look reached, also when there is none.
    async fn ask(&self) -> Result<Answer, Fault> {
        self.metrics.reads.add(1);
        let page = self.source.page(1, None).await?;
        let view = page.revision;
        let found = page.items.first().map(|raw| self.understand(raw));
        let (content, revision) = found.transpose()?.unwrap_or((Content::Absent, view));
        Ok(Answer {
            content,
            revision,
            view,
        })
    }

    /// What cannot be understood is unknown, never absent: a device would take its files away.
    fn understand(&self, raw: &RawValue) -> Result<(Content, u64), Fault> {
        self.metrics.received_bytes.add(raw.get().len() as u64);
        let unreadable = |why: &str| Fault::Unreadable(why.to_owned());
        let object: Value =
            serde_json::from_str(raw.get()).map_err(|error| unreadable(&error.to_string()))?;
        let bytes = trimmed(self.reference.kind, &object);
        let bytes = bytes.ok_or_else(|| unreadable("no ConfigMap and no Secret"))?;
        let revision = revision(&object).ok_or_else(|| unreadable("it has no resourceVersion"))?;
        Ok((Content::Present(bytes.into()), revision))
    }

    async fn refused_or_wait(&self, backoff: &mut Backoff, fault: &Fault) {
        if let Fault::Forbidden(_) = fault {
            let (reference, ticket) = (self.reference.clone(), self.ticket);
            // If another node takes the watch over, this task ends in the wait below.
            if self
                .tell(Told::Refused { reference, ticket })
                .await
                .is_err()
            {
                return;
            }
        }
        self.wait(backoff, fault).await;
    }

    async fn observed(&self, answer: Answer) -> Result<(), Option<Fault>> {
        let (reference, ticket) = (self.reference.clone(), self.ticket);
        self.tell(Told::Observed {
            reference,
            ticket,
            answer,
        })
        .await
    }

    async fn tell(&self, told: Told) -> Result<(), Option<Fault>> {
        self.out.send(told.into()).await.map_err(|_| None)
    }

    async fn wait(&self, backoff: &mut Backoff, fault: &Fault) {
        let wait = backoff.next(Some(fault), rand::random());
        let (reference, node, error) = (&self.reference, &self.node, chain(fault));
        match fault {
            // A refusal or two belong to every new Pod.
            Fault::Forbidden(_) if wait < Duration::from_secs(1) => {
                self.metrics.refused.add(1);
                tracing::debug!(%reference, %node, error, ?wait, "not yet allowed to the node");
            }
            Fault::Forbidden(_) => {
                self.metrics.refused.add(1);
                tracing::warn!(%reference, %node, error, ?wait, "not allowed to the node; its Pods wait");
            }
            _ => {
                self.metrics.faults.add(1);
                tracing::warn!(%reference, %node, error, ?wait, "cannot be read; trying again");
            }
        }
        sleep(wait).await;
    }
}
