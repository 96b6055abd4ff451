//! Thousands of edges in one process, on the real protocol: they join, hold a session as an idle
//! edge does, and keep nothing on disk.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use common::hub::dial::{self, DialOptions, JoinOutcome, Target};
use common::hub::lanes::Lanes;
use common::hub::proto;
use common::hub::session::Marks;
use common::hub::session::edge::{
    Commit, EdgeEvent, EdgeSession, EdgeState, HeldReport, HelloFacts, Outcome,
};
use common::hub::tls::{ClientIdentity, Clock};
use common::hub::transport::Connection;
use common::ids::{Kind, ObjectKey};
use common::object::{ContentHash, Digest, Object};
use common::pki::JoinToken;
use common::pki::csr::NodeKey;
use rustls_pki_types::CertificateDer;
use serde_json::{Value, json};

use crate::cloud::Invitation;

pub use common::hub::dial::Preference;

/// An edge that has joined.
pub struct Hollow {
    identity: ClientIdentity,
    target: Target,
    held: Rc<Held>,
}

impl Hollow {
    /// Joins as `name`.
    pub async fn join(invitation: &Invitation, name: &str) -> Result<Hollow> {
        let mut token = JoinToken::parse(&invitation.token)?;
        let address: SocketAddr = invitation.join.parse()?;
        let host = address.ip().to_string();
        token.endpoints = vec![common::pki::token::Endpoint::new(&host, address.port())];
        let key = NodeKey::generate()?;
        let mut request = proto::JoinRequest {
            version: common::hub::PROTOCOL_VERSION,
            node_name: name.to_owned(),
            csr: key.request()?,
            agent_version: "hollow".to_owned(),
            os: "linux".to_owned(),
            arch: "amd64".to_owned(),
            ..Default::default()
        };
        token.present(&mut request);
        let options = DialOptions::new(Clock::Unsynchronised(None));
        let joined = match dial::join(&Target::from_token(&token), &request, &options).await? {
            JoinOutcome::Joined(joined) => joined,
            JoinOutcome::Refused(refused) => bail!("{name} was refused: {}", refused.message),
        };
        let identity = ClientIdentity {
            chain: joined
                .chain
                .iter()
                .map(|der| CertificateDer::from(der.clone()))
                .collect(),
            key: key.private_key(),
        };
        let link = joined.link.as_ref().context("joined without a link")?;
        Ok(Hollow {
            identity,
            target: Target::from_link(link)?,
            held: Rc::new(Held::new(name)),
        })
    }

    /// Dials and serves until the session is live and the node's status was taken.
    pub async fn connect(&self, preference: Preference) -> Result<Idle> {
        let options = DialOptions {
            preference,
            ..DialOptions::new(Clock::Unsynchronised(None))
        };
        let connection = dial::dial(&self.target, &self.identity, &options).await?;
        let lanes = Lanes::open(&connection).await?;
        let mut idle = Idle {
            session: EdgeSession::new(&*self.held),
            held: self.held.clone(),
            lanes,
            _connection: connection,
        };
        while !self.held.is_settled() {
            idle.step().await?;
        }
        Ok(idle)
    }
}

/// A session that waits for something to happen.
pub struct Idle {
    session: EdgeSession,
    held: Rc<Held>,
    lanes: Lanes,
    _connection: Connection,
}

impl Idle {
    /// Serves until the session ends, and says why.
    pub async fn serve(mut self) -> anyhow::Error {
        loop {
            if let Err(error) = self.step().await {
                return error;
            }
        }
    }

    /// Sends what is due, then waits for one message.
    async fn step(&mut self) -> Result<()> {
        self.flush()?;
        let (lane, message) = self.lanes.recv().await?;
        self.session.handle(lane, *message, &*self.held)?;
        self.flush()
    }

    fn flush(&mut self) -> Result<()> {
        while let Some(event) = self.session.poll_event() {
            self.act(event)?;
        }
        while let Some((lane, message)) = self.session.poll_message() {
            self.lanes.send(lane, &message)?;
        }
        Ok(())
    }

    fn act(&mut self, event: EdgeEvent) -> Result<()> {
        match event {
            EdgeEvent::Welcomed(_) => self.session.welcome_committed(&*self.held),
            EdgeEvent::Commit(commit) => {
                let desired = self.held.commit(commit);
                self.session
                    .committed(Outcome::Committed { desired }, &*self.held)?;
            }
            EdgeEvent::ReportAcked { .. } => {
                self.held.reported.replace(true);
            }
            EdgeEvent::EventsAcked { .. } | EdgeEvent::Answered(_) => {}
            EdgeEvent::GoAway(go) => bail!("sent away ({:?}): {}", go.reason(), go.message),
        }
        Ok(())
    }
}

/// What a hollow edge holds, in memory.
struct Held {
    name: String,
    status: std::sync::Arc<[u8]>,
    objects: RefCell<BTreeMap<ObjectKey, Object>>,
    complete: RefCell<bool>,
    epoch: RefCell<Option<[u8; 16]>>,
    marks: RefCell<Marks>,
    reported: RefCell<bool>,
}

impl Held {
    fn new(name: &str) -> Held {
        Held {
            name: name.to_owned(),
            status: node_status(name).to_string().into_bytes().into(),
            objects: RefCell::default(),
            complete: RefCell::default(),
            epoch: RefCell::default(),
            marks: RefCell::default(),
            reported: RefCell::default(),
        }
    }

    fn is_settled(&self) -> bool {
        *self.complete.borrow() && *self.reported.borrow()
    }

    fn commit(&self, commit: Commit) -> Digest {
        let mut objects = self.objects.borrow_mut();
        for object in commit.puts {
            objects.insert(object.key.clone(), object);
        }
        for key in &commit.removes {
            objects.remove(key);
        }
        drop(objects);
        self.complete.replace(commit.complete);
        self.epoch.replace(Some(commit.epoch));
        self.marks.borrow_mut().extend(commit.marks);
        self.desired_digest()
    }

    fn report(&self) -> HeldReport {
        HeldReport {
            // Without a name: the session says whose Node it is.
            key: ObjectKey::named(Kind::Node, "", ""),
            sequence: 1,
            bytes: self.status.clone(),
            gone: false,
        }
    }
}

impl EdgeState for Held {
    fn hello(&self) -> HelloFacts {
        HelloFacts {
            agent_version: "hollow".to_owned(),
            incarnation: ContentHash::of(&common::object::Content::Present(
                self.name.as_bytes().into(),
            ))
            .0,
            epoch: *self.epoch.borrow(),
            marks: self.marks.borrow().clone(),
            boot_id: "hollow".to_owned(),
            clock_synchronised: true,
            ..HelloFacts::default()
        }
    }

    fn desired_digest(&self) -> Digest {
        let objects = self.objects.borrow();
        Digest::of(objects.iter().map(|(key, object)| (key, &object.hash)))
    }

    fn object(&self, key: &ObjectKey) -> Option<Object> {
        self.objects.borrow().get(key).cloned()
    }

    fn inventory(&self) -> Vec<(ObjectKey, ContentHash)> {
        let objects = self.objects.borrow();
        objects
            .iter()
            .map(|(key, object)| (key.clone(), object.hash))
            .collect()
    }

    fn pending_reports(&self) -> Vec<HeldReport> {
        match *self.reported.borrow() {
            true => Vec::new(),
            false => self.all_reports(),
        }
    }

    fn all_reports(&self) -> Vec<HeldReport> {
        vec![self.report()]
    }

    fn events_after(&self, _: u64, _: usize) -> Vec<proto::Event> {
        Vec::new()
    }
}

/// A status of the usual size: what the cloud keeps of it is part of a session's memory.
fn node_status(name: &str) -> Value {
    let condition = |kind: &str, status: &str, reason: &str| {
        json!({
            "type": kind,
            "status": status,
            "reason": reason,
            "message": format!("kubelet has {reason}"),
            "lastTransitionTime": "2026-01-01T00:00:00Z",
            "lastHeartbeatTime": "2026-01-01T00:00:00Z",
        })
    };
    let resources =
        json!({"cpu": "4", "memory": "4015432Ki", "pods": "110", "ephemeral-storage": "30Gi"});
    json!({
        "addresses": [
            {"type": "InternalIP", "address": "192.168.77.2"},
            {"type": "Hostname", "address": name},
        ],
        "capacity": resources,
        "allocatable": resources,
        "conditions": [
            condition("MemoryPressure", "False", "KubeletHasSufficientMemory"),
            condition("DiskPressure", "False", "KubeletHasNoDiskPressure"),
            condition("PIDPressure", "False", "KubeletHasSufficientPID"),
            condition("Ready", "True", "KubeletReady"),
        ],
        "nodeInfo": {
            "machineID": "0123456789abcdef0123456789abcdef",
            "systemUUID": "0123456789abcdef0123456789abcdef",
            "bootID": "01234567-89ab-cdef-0123-456789abcdef",
            "kernelVersion": "6.1.0-13-amd64",
            "osImage": "Debian GNU/Linux 12 (bookworm)",
            "containerRuntimeVersion": "containerd://1.6.20",
            "kubeletVersion": "v1.33.0+edgecore.hollow",
            "kubeProxyVersion": "",
            "operatingSystem": "linux",
            "architecture": "amd64",
        },
        "images": [
            {"names": ["docker.io/local/busybox:1"], "sizeBytes": 2_000_000},
            {"names": ["docker.io/local/pause:1"], "sizeBytes": 700_000},
        ],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_what_was_committed() {
        let held = Held::new("hollow-1");
        assert!(!held.is_settled());
        assert_eq!(held.pending_reports().len(), 1);
        let object = Object::absent(ObjectKey::named(Kind::ConfigMap, "default", "a"));
        let commit = |puts, removes| Commit {
            sequence: 1,
            epoch: [1; 16],
            marks: Marks::default(),
            puts,
            removes,
            complete: true,
        };
        let digest = held.commit(commit(vec![object.clone()], Vec::new()));
        assert_eq!(digest, Digest::of([(&object.key, &object.hash)]));
        let digest = held.commit(commit(Vec::new(), vec![object.key]));
        assert_eq!(digest, Digest::default());
        held.reported.replace(true);
        assert!(held.is_settled() && held.pending_reports().is_empty());
    }
}
