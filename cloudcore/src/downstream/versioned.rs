//! One object that goes down, with what is needed to send it cheaply to many nodes.
//!
//! Owns the object's bytes, the bytes of at most `HISTORY` older versions, and what encoding the
//! newest against each of them gave. Takes the encoder as a function, so that the codec stays in
//! `common::hub`. Gives an encoding, computed once however many nodes ask. Never compares
//! revisions of different objects: each carries its own.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use common::ids::Kind;
use common::object::{Content, ContentHash, Object};

/// Older versions kept per object. A connected node is one version behind when a change is sent
/// and two when it had not yet acknowledged the one before; anybody further behind gets the whole
/// object, which costs bytes and never correctness.
pub const HISTORY: usize = 2;

/// How far the view of one object reaches: the highest resourceVersion at which this content was
/// known to be the current one. Each content has its own, so that a reader who holds an older
/// version never sees it vouched for by a newer one's revision.
#[derive(Debug, Clone, Default)]
pub struct View(Arc<AtomicU64>);

impl View {
    pub fn at(revision: u64) -> Self {
        Self(Arc::new(AtomicU64::new(revision)))
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    pub fn raise(&self, revision: u64) {
        self.0.fetch_max(revision, Ordering::AcqRel);
    }

    /// To any revision: the cluster itself may have gone back in time.
    pub fn set(&self, revision: u64) {
        self.0.store(revision, Ordering::Release);
    }
}

/// A version of an object and the older ones a peer may still hold.
pub struct Versioned {
    pub object: Object,
    /// The resourceVersion at which the object took this content; outside the content's hash.
    pub revision: u64,
    /// How far this object's own watch has seen; unused for kinds whose one feed carries the mark.
    pub view: View,
    previous: Vec<Older>,
    whole: OnceLock<Arc<[u8]>>,
}

struct Older {
    hash: ContentHash,
    bytes: Arc<[u8]>,
    delta: OnceLock<Arc<[u8]>>,
}

impl std::fmt::Debug for Versioned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Versioned")
            .field("object", &self.object)
            .field("revision", &self.revision)
            .finish_non_exhaustive()
    }
}

impl Versioned {
    /// An object seen for the first time, at `revision`.
    pub fn first(object: Object, revision: u64) -> Arc<Self> {
        Arc::new(Self {
            object,
            revision,
            view: View::at(revision),
            previous: Vec::new(),
            whole: OnceLock::new(),
        })
    }

    /// The version after `old`: `old` itself when the content is the same.
    /// Its view begins at `revision`.
    pub fn after(old: &Arc<Self>, object: Object, revision: u64) -> Arc<Self> {
        if old.object.hash == object.hash {
            return old.clone();
        }
        let newest_older = old.bytes().map(|bytes| (old.object.hash, bytes.clone()));
        let older = old.previous.iter().map(|p| (p.hash, p.bytes.clone()));
        let previous = newest_older
            .into_iter()
            .chain(older)
            .filter(|(hash, _)| *hash != object.hash)
            .take(HISTORY)
            .map(|(hash, bytes)| Older {
                hash,
                bytes,
                delta: OnceLock::new(),
            })
            .collect();
        Arc::new(Self {
            object,
            revision,
            view: View::at(revision),
            previous,
            whole: OnceLock::new(),
        })
    }

    /// The content, encoded by `encode(base, bytes)` against the version that the peer says it
    /// holds (`None`: whole). `None` when that version is not known here, or when the object is
    /// absent and has no bytes.
    ///
    /// The result is kept for kinds that many nodes share, so the function must give the same for
    /// the same input. A Pod and a Node go to one node each and are not kept twice.
    pub fn encoded_from(
        &self,
        base: Option<ContentHash>,
        encode: impl Fn(Option<&[u8]>, &[u8]) -> Arc<[u8]>,
    ) -> Option<Arc<[u8]>> {
        let bytes = self.bytes()?;
        let (cache, base) = match base {
            None => (&self.whole, None),
            Some(hash) => {
                let older = self.previous.iter().find(|p| p.hash == hash)?;
                (&older.delta, Some(&older.bytes[..]))
            }
        };
        Some(if self.is_shared() {
            cache.get_or_init(|| encode(base, bytes)).clone()
        } else {
            encode(base, bytes)
        })
    }

    /// The bytes held for this object, its history included.
    pub fn weight(&self) -> usize {
        let own = self.bytes().map_or(0, |b| b.len());
        own + self.previous.iter().map(|p| p.bytes.len()).sum::<usize>()
    }

    fn bytes(&self) -> Option<&Arc<[u8]>> {
        match &self.object.content {
            Content::Absent => None,
            Content::Present(bytes) => Some(bytes),
        }
    }

    fn is_shared(&self) -> bool {
        match self.object.key.kind {
            Kind::ConfigMap | Kind::Secret | Kind::Services => true,
            Kind::Pod | Kind::Node | Kind::Unknown(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use common::ids::ObjectKey;

    use super::*;

    fn object(kind: Kind, content: &str) -> Object {
        Object::present(ObjectKey::named(kind, "n", "a"), content.as_bytes())
    }

    fn chain(kind: Kind, contents: &[&str]) -> Arc<Versioned> {
        let mut at = Versioned::first(object(kind, contents[0]), 1);
        for (content, revision) in contents[1..].iter().zip(2..) {
            at = Versioned::after(&at, object(kind, content), revision);
        }
        at
    }

    fn join(base: Option<&[u8]>, bytes: &[u8]) -> Arc<[u8]> {
        [base.unwrap_or(b"-"), b">", bytes].concat().into()
    }

    #[test]
    fn the_two_versions_before_are_bases_and_no_other() {
        let now = chain(Kind::Secret, &["a", "b", "c", "d"]);
        let from = |base: &str| now.encoded_from(Some(object(Kind::Secret, base).hash), join);
        assert_eq!(from("c").as_deref(), Some(&b"c>d"[..]));
        assert_eq!(from("b").as_deref(), Some(&b"b>d"[..]));
        assert_eq!(from("a"), None);
        assert_eq!(now.encoded_from(None, join).as_deref(), Some(&b"->d"[..]));
    }

    #[test]
    fn a_shared_object_is_encoded_once_for_all_nodes() {
        for (kind, want) in [(Kind::ConfigMap, 1), (Kind::Pod, 3)] {
            let now = chain(kind, &["a", "b"]);
            let calls = Cell::new(0);
            for _ in 0..3 {
                now.encoded_from(Some(object(kind, "a").hash), |b, x| {
                    calls.set(calls.get() + 1);
                    join(b, x)
                });
            }
            assert_eq!(calls.get(), want, "{kind:?}");
        }
    }

    #[test]
    fn the_same_content_is_the_same_version() {
        let one = chain(Kind::Secret, &["a", "b"]);
        let again = Versioned::after(&one, object(Kind::Secret, "b"), 9);
        assert!(Arc::ptr_eq(&one, &again));
    }

    #[test]
    fn a_content_that_returns_is_not_its_own_base() {
        let now = chain(Kind::Secret, &["a", "b", "a"]);
        assert_eq!(now.encoded_from(Some(now.object.hash), join), None);
        assert_eq!(now.weight(), 2);
    }

    #[test]
    fn an_absent_object_has_nothing_to_encode_but_keeps_its_history() {
        let key = ObjectKey::named(Kind::Secret, "n", "a");
        let gone = Versioned::after(&chain(Kind::Secret, &["a"]), Object::absent(key), 2);
        assert_eq!(gone.encoded_from(None, join), None);
        let back = Versioned::after(&gone, object(Kind::Secret, "b"), 3);
        let base = object(Kind::Secret, "a").hash;
        assert_eq!(
            back.encoded_from(Some(base), join).as_deref(),
            Some(&b"a>b"[..])
        );
    }
}
