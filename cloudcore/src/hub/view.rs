//! A node's desired set and the reports held for it, as the session's state machine reads them.

use std::sync::Arc;

use common::hub::session::Marks;
use common::hub::session::cloud::CloudView;
use common::hub::{delta, proto};
use common::ids::ObjectKey;
use common::object::{Content, ContentHash, Digest};

use crate::downstream::NodeSnapshot;
use crate::upstream::NodeUpstream;

/// Made anew from the feed whenever it changed; holds no copy of an object.
pub struct SessionView<'a> {
    pub snapshot: &'a NodeSnapshot,
    pub epoch: [u8; 16],
    pub upstream: &'a NodeUpstream,
    /// The incarnation that the reports held belong to.
    pub incarnation: [u8; 16],
}

/// What `Versioned` caches: the encoding's number, then the payload.
fn pack(base: Option<&[u8]>, bytes: &[u8]) -> Arc<[u8]> {
    let (encoding, payload) = delta::encode(base, bytes);
    let number = u8::try_from(i32::from(encoding)).unwrap_or_default();
    [&[number], &payload[..]].concat().into()
}

impl CloudView for SessionView<'_> {
    fn epoch(&self) -> [u8; 16] {
        self.epoch
    }

    fn marks(&self) -> Marks {
        self.snapshot.marks.clone()
    }

    fn revision(&self, key: &ObjectKey) -> u64 {
        let object = self.snapshot.objects.get(key);
        object.map_or(0, |versioned| versioned.revision)
    }

    fn each(&self, visit: &mut dyn FnMut(&ObjectKey, &ContentHash)) {
        self.snapshot
            .objects
            .iter()
            .for_each(|(key, v)| visit(key, &v.object.hash));
    }

    fn hash(&self, key: &ObjectKey) -> Option<ContentHash> {
        self.snapshot.objects.get(key).map(|v| v.object.hash)
    }

    fn put(&self, key: &ObjectKey, base: Option<ContentHash>) -> Option<proto::Put> {
        let versioned = self.snapshot.objects.get(key)?;
        let mut put = proto::Put {
            key: key.to_string(),
            hash: versioned.object.hash.0.to_vec(),
            ..Default::default()
        };
        let Content::Present(bytes) = &versioned.object.content else {
            put.absent = true;
            return Some(put);
        };
        let delta = base.and_then(|b| versioned.encoded_from(Some(b), pack));
        let packed = match delta {
            Some(packed) => packed,
            None => versioned.encoded_from(None, pack)?,
        };
        let (number, payload) = packed.split_first()?;
        put.encoding = i32::from(*number);
        put.payload = payload.to_vec();
        put.size = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        Some(put)
    }

    fn may_remove(&self, key: &ObjectKey) -> bool {
        self.snapshot.may_remove(key)
    }

    fn complete(&self) -> bool {
        self.snapshot.complete
    }

    fn report_base(&self, key: &ObjectKey) -> Option<(ContentHash, Arc<[u8]>)> {
        self.upstream.report_bytes(key)
    }

    fn reports_held(&self, incarnation: &[u8; 16]) -> Digest {
        if *incarnation == self.incarnation {
            self.upstream.held()
        } else {
            Digest::default()
        }
    }
}
