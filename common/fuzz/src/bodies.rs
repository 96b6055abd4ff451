//! What each fuzz target does with its bytes. The targets and the replay of their corpora
//! (`tests/corpus.rs`) share these: nothing may panic, loop or allocate without bound.
#![allow(dead_code, unreachable_pub, reason = "each target uses one of them")]

use std::collections::BTreeMap;
use std::sync::Arc;

use common::hub::session::Marks;
use common::hub::session::cloud::{CloudEvent, CloudSession, CloudView};
use common::hub::session::edge::{
    EdgeEvent, EdgeSession, EdgeState, HeldReport, HelloFacts, Outcome,
};
use common::hub::{Lane, delta, frame, proto};
use common::ids::{Kind, ObjectKey};
use common::object::{Content, ContentHash, Digest, Object};
use prost::Message as _;

/// Bytes of a lane, in pieces of every size.
pub fn frame(data: &[u8]) {
    let Some((size, data)) = data.split_first() else {
        return;
    };
    pieces(frame::FrameReader::default(), *size, data);
    pieces(frame::FrameReader::upward(), *size, data);
}

fn pieces(mut reader: frame::FrameReader, size: u8, data: &[u8]) {
    for piece in data.chunks(usize::from(size).max(1)) {
        reader.feed(piece);
        loop {
            match reader.next_message() {
                Ok(Some(message)) => drop(frame::encode(&message)),
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
}

/// One message: what was read is written and read the same.
pub fn message(data: &[u8]) {
    if let Ok(message) = proto::Message::decode(data) {
        let again = proto::Message::decode(&message.encode_to_vec()[..]);
        assert_eq!(again.as_ref(), Ok(&message));
    }
    if let Ok(request) = proto::JoinRequest::decode(data) {
        assert!(request.encoded_len() <= 2 * data.len() + 16);
    }
    if let Some((encoding, payload)) = data.split_first() {
        // Any answer will do, in bounded memory.
        let _ = delta::decode(i32::from(*encoding), payload, 4096, Some(b"a base"));
    }
}

#[derive(Default)]
struct Ends {
    objects: BTreeMap<ObjectKey, Object>,
}

impl Ends {
    fn digest(&self) -> Digest {
        Digest::of(self.objects.iter().map(|(k, o)| (k, &o.hash)))
    }
}

impl EdgeState for Ends {
    fn hello(&self) -> HelloFacts {
        HelloFacts {
            incarnation: [1; 16],
            epoch: Some([2; 16]),
            ..Default::default()
        }
    }
    fn desired_digest(&self) -> Digest {
        self.digest()
    }
    fn object(&self, key: &ObjectKey) -> Option<Object> {
        self.objects.get(key).cloned()
    }
    fn inventory(&self) -> Vec<(ObjectKey, ContentHash)> {
        self.objects
            .iter()
            .map(|(k, o)| (k.clone(), o.hash))
            .collect()
    }
    fn pending_reports(&self) -> Vec<HeldReport> {
        let report = |key: &ObjectKey| HeldReport {
            key: key.clone(),
            sequence: 1,
            bytes: Arc::from(*b"status"),
            gone: false,
        };
        self.objects.keys().map(report).collect()
    }
    fn all_reports(&self) -> Vec<HeldReport> {
        self.pending_reports()
    }
    fn events_after(&self, sequence: u64, _: usize) -> Vec<proto::Event> {
        if sequence < 3 {
            vec![proto::Event {
                sequence: sequence + 1,
                ..Default::default()
            }]
        } else {
            Vec::new()
        }
    }
}

impl CloudView for Ends {
    fn epoch(&self) -> [u8; 16] {
        [2; 16]
    }
    fn marks(&self) -> Marks {
        [(Kind::Pod, 5)].into()
    }
    fn revision(&self, _: &ObjectKey) -> u64 {
        5
    }
    fn each(&self, visit: &mut dyn FnMut(&ObjectKey, &ContentHash)) {
        self.objects.iter().for_each(|(k, o)| visit(k, &o.hash));
    }
    fn hash(&self, key: &ObjectKey) -> Option<ContentHash> {
        self.objects.get(key).map(|o| o.hash)
    }
    fn put(&self, key: &ObjectKey, _: Option<ContentHash>) -> Option<proto::Put> {
        let object = self.objects.get(key)?;
        let Content::Present(bytes) = &object.content else {
            return None;
        };
        Some(proto::Put {
            key: key.to_string(),
            hash: object.hash.0.to_vec(),
            payload: bytes.to_vec(),
            size: bytes.len() as u32,
            ..Default::default()
        })
    }
    fn may_remove(&self, _: &ObjectKey) -> bool {
        true
    }
    fn complete(&self) -> bool {
        true
    }
    fn report_base(&self, _: &ObjectKey) -> Option<(ContentHash, Arc<[u8]>)> {
        None
    }
    fn reports_held(&self, _: &[u8; 16]) -> Digest {
        Digest::default()
    }
}

/// A peer that says anything at any time, to either end. Each step is a byte that says to whom and
/// how much, then the bytes of one message.
pub fn session_ops(mut data: &[u8]) {
    let key = ObjectKey::pod("default", "web", "uid-1");
    let held = Object::present(key.clone(), *b"{\"kind\":\"Pod\"}");
    let mut edge_end = Ends {
        objects: [(key, held)].into(),
    };
    let cloud_end = Ends {
        objects: edge_end.objects.clone(),
    };
    let mut edge = EdgeSession::new(&edge_end);
    let mut cloud = CloudSession::default();
    while let [op, size, rest @ ..] = data {
        let (bytes, after) = rest.split_at(usize::from(*size).min(rest.len()));
        data = after;
        let Ok(message) = proto::Message::decode(bytes) else {
            continue;
        };
        let lane = Lane::ALL[usize::from(*op / 4) % 3];
        let fine = match op % 4 {
            0 | 1 => edge.handle(lane, message, &edge_end).is_ok(),
            2 => cloud.handle(message, &cloud_end).is_ok(),
            _ => {
                cloud.listed(&cloud_end);
                true
            }
        };
        if !fine || !act(&mut edge, &mut edge_end) {
            return;
        }
        while let Some(event) = cloud.poll_event() {
            if let CloudEvent::Greeted(_) = event {
                cloud.welcome(proto::Welcome::default());
            }
        }
        while edge.poll_message().is_some() {}
        while cloud.poll_message().is_some() {}
    }
}

fn act(edge: &mut EdgeSession, end: &mut Ends) -> bool {
    while let Some(event) = edge.poll_event() {
        match event {
            EdgeEvent::Welcomed(_) => edge.welcome_committed(end),
            EdgeEvent::Commit(commit) => {
                commit
                    .removes
                    .iter()
                    .for_each(|k| drop(end.objects.remove(k)));
                for object in commit.puts {
                    end.objects.insert(object.key.clone(), object);
                }
                let outcome = Outcome::Committed {
                    desired: end.digest(),
                };
                if edge.committed(outcome, end).is_err() {
                    return false;
                }
            }
            EdgeEvent::ReportAcked { .. }
            | EdgeEvent::EventsAcked { .. }
            | EdgeEvent::Answered(_)
            | EdgeEvent::GoAway(_) => {}
        }
    }
    true
}
