//! Looks at the runtime: all of one Pod for its worker, and who changed for the manager.
//!
//! [`look`] reads what the runtime holds of one Pod; what cannot change (a container that ended, the
//! address of a sandbox that is up) is read once. [`Watcher`] wakes the worker of a Pod whose
//! containers changed: from the runtime's own events where it has them, else by comparing lists,
//! every second while something is expected to change and every five at rest. A lost wake costs
//! time, never correctness: a slow comparison runs beside the events too.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use tokio::sync::{Notify, watch};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::seen::{ContainerSeen, Observed, Run, SandboxSeen};
use crate::cri::{Cri, CriError, Failure, Runtime, api, convert};

/// Between two comparisons while a container is expected to start or end.
const LIVELY: Duration = Duration::from_secs(1);
/// Between two comparisons at rest. One costs well under a millisecond of processor time.
const AT_REST: Duration = Duration::from_secs(5);
/// Between two comparisons beside events, which may be lost when the runtime restarts.
const BESIDE_EVENTS: Duration = Duration::from_secs(60);

/// What one worker need not ask for again.
#[derive(Debug, Default)]
pub struct Cache {
    containers: BTreeMap<String, ContainerSeen>,
    sandboxes: BTreeMap<String, SandboxSeen>,
}

/// Reads all that the runtime holds of one Pod. `last_words` is asked once for each container that
/// ended, for its termination message.
pub async fn look(
    cri: &dyn Cri,
    uid: &str,
    cache: &mut Cache,
    last_words: impl Fn(&ContainerSeen) -> String,
) -> Result<Observed, CriError> {
    let (sandboxes, containers) = futures::future::try_join(
        cri.list_sandboxes(Some(uid)),
        cri.list_containers(Some(uid)),
    )
    .await?;
    let mut out = Observed::default();
    for item in &sandboxes {
        if let Some(seen) = look_at_sandbox(cri, item, cache).await? {
            out.sandboxes.push(seen);
        }
    }
    for item in &containers {
        if let Some(seen) = look_at_container(cri, item, cache, &last_words).await? {
            out.containers.push(seen);
        }
    }
    let sandbox_ids: BTreeSet<_> = out.sandboxes.iter().map(|s| &s.id).collect();
    cache.sandboxes.retain(|id, _| sandbox_ids.contains(id));
    let container_ids: BTreeSet<_> = out.containers.iter().map(|c| &c.id).collect();
    cache.containers.retain(|id, _| container_ids.contains(id));
    out.sort();
    Ok(out)
}

/// `None` when it vanished between the list and the look.
fn unless_gone<T>(result: Result<T, CriError>) -> Result<Option<T>, CriError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(e) if e.not_found() => Ok(None),
        Err(e) => Err(e),
    }
}

async fn look_at_sandbox(
    cri: &dyn Cri,
    item: &api::PodSandbox,
    cache: &mut Cache,
) -> Result<Option<SandboxSeen>, CriError> {
    let mut seen = convert::sandbox_seen(item);
    if !seen.ready {
        return Ok(Some(seen));
    }
    if let Some(known) = cache.sandboxes.get(&seen.id) {
        return Ok(Some(known.clone()));
    }
    let Some(status) = unless_gone(cri.sandbox_status(&item.id).await)? else {
        return Ok(None);
    };
    convert::add_sandbox_status(&mut seen, &status);
    if seen.ready && (seen.host_network || !seen.ips.is_empty()) {
        cache.sandboxes.insert(seen.id.clone(), seen.clone());
    }
    Ok(Some(seen))
}

async fn look_at_container(
    cri: &dyn Cri,
    item: &api::Container,
    cache: &mut Cache,
    last_words: &impl Fn(&ContainerSeen) -> String,
) -> Result<Option<ContainerSeen>, CriError> {
    let mut seen = convert::container_seen(item);
    let known = cache.containers.get(&seen.id).filter(|k| k.run == seen.run);
    if let Some(known) = known {
        return Ok(Some(known.clone()));
    }
    let Some(status) = unless_gone(cri.container_status(&item.id).await)? else {
        return Ok(None);
    };
    convert::add_container_status(&mut seen, &status);
    if seen.run == Run::Exited {
        let words = last_words(&seen);
        if !words.is_empty() {
            seen.message = words;
        }
    }
    if matches!(seen.run, Run::Exited | Run::Running) {
        cache.containers.insert(seen.id.clone(), seen.clone());
    }
    Ok(Some(seen))
}

/// One worker as those who wake it know it.
#[derive(Debug, Default)]
pub struct Waker {
    /// The runtime holds something else of the Pod than it did.
    pub wake: Notify,
    /// Some object of the desired set changed; whether the Pod refers to it is for its worker to see.
    pub objects: Notify,
    /// Something of the Pod is expected to change by itself.
    pub lively: AtomicBool,
}

/// The workers by Pod UID; a shared handle.
#[derive(Clone, Default)]
pub struct Wakers {
    inner: Arc<WakersInner>,
}

#[derive(Default)]
struct WakersInner {
    map: Mutex<BTreeMap<String, Arc<Waker>>>,
    livened: Notify,
    doubted: Notify,
}

impl Wakers {
    fn map(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Waker>>> {
        self.inner
            .map
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub fn add(&self, uid: &str) -> Arc<Waker> {
        self.map().entry(uid.to_owned()).or_default().clone()
    }

    pub fn remove(&self, uid: &str) {
        self.map().remove(uid);
    }

    /// False when nobody works on this Pod.
    pub fn wake(&self, uid: &str) -> bool {
        let found = self.map().get(uid).cloned();
        if let Some(waker) = &found {
            waker.wake.notify_one();
        }
        found.is_some()
    }

    /// Tells every worker that the desired set changed.
    pub fn objects_changed(&self) {
        for waker in self.map().values() {
            waker.objects.notify_one();
        }
    }

    /// A worker says whether its Pod is at rest.
    pub fn set_lively(&self, waker: &Waker, lively: bool) {
        if waker.lively.swap(lively, Ordering::Relaxed) != lively && lively {
            self.inner.livened.notify_one();
        }
    }

    /// Somebody got no answer from the runtime: its health must be looked at now.
    pub fn doubt(&self) {
        self.inner.doubted.notify_one();
    }

    /// Waits for a doubt.
    pub async fn doubted(&self) {
        self.inner.doubted.notified().await;
    }

    fn any_lively(&self) -> bool {
        self.map()
            .values()
            .any(|w| w.lively.load(Ordering::Relaxed))
    }
}

/// Wakes workers when the runtime changed under them.
pub struct Watcher {
    pub cri: Runtime,
    pub wakers: Wakers,
    /// Bumped when something was seen that no worker works on.
    pub strangers: watch::Sender<u64>,
}

/// State and owner of everything in the runtime, by ID.
type Picture = BTreeMap<String, (i32, String)>;

impl Watcher {
    pub async fn run(self, shutdown: CancellationToken) {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {}
            () = self.watch() => {}
        }
    }

    async fn watch(&self) {
        let mut picture = Picture::new();
        let mut events_known = true;
        loop {
            self.compare(&mut picture).await;
            if events_known {
                events_known = self.follow(&mut picture).await;
            }
            self.pause().await;
        }
    }

    /// Waits until the next comparison is due, no longer than the liveliest Pod wants.
    async fn pause(&self) {
        let wait = if self.wakers.any_lively() {
            LIVELY
        } else {
            AT_REST
        };
        tokio::select! {
            () = sleep(wait) => {}
            () = self.wakers.inner.livened.notified() => sleep(LIVELY).await,
        }
    }

    /// Follows the runtime's events until they end; false when it has none.
    ///
    /// Events are relied on from the first one: before it the answer may just be a runtime that
    /// accepts the call and never says anything.
    async fn follow(&self, picture: &mut Picture) -> bool {
        let opening = self.cri.container_events();
        tokio::pin!(opening);
        let opened = loop {
            tokio::select! {
                biased;
                opened = &mut opening => break opened,
                () = self.pause() => self.compare(picture).await,
            }
        };
        let mut events = match opened {
            Ok(events) => events,
            Err(e) => return e.failure != Failure::Unimplemented,
        };
        let mut proven = false;
        loop {
            tokio::select! {
                biased;
                event = events.next() => match event {
                    Some(Ok(Some(uid))) => self.changed(&uid),
                    Some(Ok(None)) => self.compare(picture).await,
                    Some(Err(e)) => return e.failure != Failure::Unimplemented,
                    None => return true,
                },
                () = self.pause(), if !proven => {
                    self.compare(picture).await;
                    continue;
                }
                () = sleep(BESIDE_EVENTS), if proven => {
                    self.compare(picture).await;
                    continue;
                }
            }
            proven = true;
        }
    }

    fn changed(&self, uid: &str) {
        if !self.wakers.wake(uid) {
            self.strangers.send_modify(|n| *n += 1);
        }
    }

    async fn compare(&self, picture: &mut Picture) {
        let lists = futures::future::try_join(
            self.cri.list_sandboxes(None),
            self.cri.list_containers(None),
        );
        let (sandboxes, containers) = match lists.await {
            Ok(lists) => lists,
            Err(_) => return self.wakers.doubt(),
        };
        let uid = |labels: &std::collections::HashMap<String, String>| {
            labels.get(convert::POD_UID).cloned().unwrap_or_default()
        };
        let sandboxes = sandboxes
            .into_iter()
            .map(|s| (s.id, (s.state, uid(&s.labels))));
        let containers = containers
            .into_iter()
            .map(|c| (c.id, (c.state, uid(&c.labels))));
        let fresh: Picture = sandboxes.chain(containers).collect();
        for uid in differences(picture, &fresh) {
            self.changed(uid);
        }
        *picture = fresh;
    }
}

/// The Pods of which anything appeared, changed or went.
fn differences<'a>(old: &'a Picture, new: &'a Picture) -> BTreeSet<&'a str> {
    let changed = new.iter().filter(|(id, what)| old.get(*id) != Some(what));
    let went = old.iter().filter(|(id, _)| !new.contains_key(*id));
    let uids = changed.chain(went).map(|(_, (_, uid))| uid.as_str());
    uids.filter(|uid| !uid.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pods_whose_containers_changed_are_named() {
        let picture = |list: &[(&str, i32, &str)]| -> Picture {
            let entries = list.iter();
            entries
                .map(|(id, state, uid)| ((*id).to_owned(), (*state, (*uid).to_owned())))
                .collect()
        };
        let old = picture(&[
            ("a", 1, "pod-a"),
            ("b", 1, "pod-b"),
            ("c", 1, "pod-c"),
            ("x", 0, ""),
        ]);
        let new = picture(&[("a", 1, "pod-a"), ("b", 2, "pod-b"), ("d", 0, "pod-d")]);
        let named: Vec<_> = differences(&old, &new).into_iter().collect();
        assert_eq!(named, ["pod-b", "pod-c", "pod-d"]);
        assert!(differences(&new, &new).is_empty());
    }
}
