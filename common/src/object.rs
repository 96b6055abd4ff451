//! An object as it crosses the hub: its key, its bytes and the hash that stands for them.
//!
//! The bytes are the object's own JSON, trimmed of what an edge never needs. The hash covers the
//! bytes and whether the object exists at all, but not the revision: a change that an edge would
//! not see is no change.

use std::fmt;
use std::sync::Arc;

use ring::digest;

use crate::ids::ObjectKey;

/// The first 16 bytes of a SHA-256 over an object's content.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ContentHash(pub [u8; 16]);

impl ContentHash {
    /// Domain-separated: an absent object never equals one with empty bytes.
    pub fn of(content: &Content) -> Self {
        let mut ctx = digest::Context::new(&digest::SHA256);
        match content {
            Content::Absent => ctx.update(b"a"),
            Content::Present(bytes) => {
                ctx.update(b"p");
                ctx.update(bytes);
            }
        }
        Self::cut(ctx.finish())
    }

    fn cut(full: digest::Digest) -> Self {
        let mut out = [0; 16];
        out.copy_from_slice(&full.as_ref()[..16]);
        Self(out)
    }

    /// What stands for the number of a report in the digest over reports, at both ends.
    pub fn of_sequence(sequence: u64) -> Self {
        let mut hash = [0; 16];
        hash[8..].copy_from_slice(&sequence.to_be_bytes());
        Self(hash)
    }

    /// From the wire or the disk; `None` when the length is wrong.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        Some(Self(bytes.try_into().ok()?))
    }
}

impl fmt::Debug for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().take(4).try_for_each(|b| write!(f, "{b:02x}"))
    }
}

/// What is known of an object that somebody refers to. A third state, "unknown", is the absence of
/// a record.
#[derive(Clone, PartialEq, Eq)]
pub enum Content {
    /// The cloud looked and there is no such object: an answer, not a gap.
    Absent,
    Present(Arc<[u8]>),
}

impl fmt::Debug for Content {
    /// Never the bytes: they may be a Secret's.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Content::Absent => f.write_str("absent"),
            Content::Present(b) => write!(f, "{} bytes", b.len()),
        }
    }
}

/// One object: key, content, and the hash that stands for the content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    pub key: ObjectKey,
    pub content: Content,
    pub hash: ContentHash,
}

impl Object {
    pub fn new(key: ObjectKey, content: Content) -> Self {
        let hash = ContentHash::of(&content);
        Self { key, content, hash }
    }

    pub fn present(key: ObjectKey, bytes: impl Into<Arc<[u8]>>) -> Self {
        Self::new(key, Content::Present(bytes.into()))
    }

    pub fn absent(key: ObjectKey) -> Self {
        Self::new(key, Content::Absent)
    }
}

/// What stands for a whole set of objects: how many, and a root that does not depend on order, so
/// that one object's change updates it in constant time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Digest {
    pub count: u64,
    pub root: [u8; 16],
}

impl Digest {
    fn leaf(key: &ObjectKey, hash: &ContentHash) -> u128 {
        let mut ctx = digest::Context::new(&digest::SHA256);
        ctx.update(key.to_string().as_bytes());
        ctx.update(&[0]);
        ctx.update(&hash.0);
        u128::from_be_bytes(ContentHash::cut(ctx.finish()).0)
    }

    pub fn add(&mut self, key: &ObjectKey, hash: &ContentHash) {
        self.count = self.count.wrapping_add(1);
        let root = u128::from_be_bytes(self.root).wrapping_add(Self::leaf(key, hash));
        self.root = root.to_be_bytes();
    }

    pub fn remove(&mut self, key: &ObjectKey, hash: &ContentHash) {
        self.count = self.count.wrapping_sub(1);
        let root = u128::from_be_bytes(self.root).wrapping_sub(Self::leaf(key, hash));
        self.root = root.to_be_bytes();
    }

    pub fn of<'a>(set: impl IntoIterator<Item = (&'a ObjectKey, &'a ContentHash)>) -> Self {
        let mut digest = Self::default();
        set.into_iter().for_each(|(k, h)| digest.add(k, h));
        digest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Kind;

    #[test]
    fn absent_is_not_empty() {
        assert_ne!(
            ContentHash::of(&Content::Absent),
            ContentHash::of(&Content::Present(Vec::new().into()))
        );
    }

    #[test]
    fn a_digest_forgets_order_and_undoes_what_it_added() {
        let a = Object::present(ObjectKey::named(Kind::Secret, "n", "a"), *b"1");
        let b = Object::absent(ObjectKey::named(Kind::Secret, "n", "b"));
        let both = Digest::of([(&a.key, &a.hash), (&b.key, &b.hash)]);
        assert_eq!(both, Digest::of([(&b.key, &b.hash), (&a.key, &a.hash)]));
        let mut one = both;
        one.remove(&b.key, &b.hash);
        assert_eq!(one, Digest::of([(&a.key, &a.hash)]));
        assert_ne!(one, Digest::of([(&a.key, &b.hash)]));
    }

    #[test]
    fn a_printed_object_shows_no_bytes() {
        let o = Object::present(ObjectKey::named(Kind::Secret, "n", "a"), *b"hunter2");
        assert!(!format!("{o:?}").contains("hunter2"));
    }
}
