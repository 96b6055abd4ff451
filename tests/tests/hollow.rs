//! A hollow edge behaves as an edge: it joins, and settles against the cloud's half of the
//! protocol over both transports. What the benchmark weighs is then a session like any other.
#![expect(
    clippy::unwrap_used,
    reason = "a test ends where it finds something wrong"
)]

use std::sync::Arc;
use std::time::Duration;

use common::hub::lanes::Lanes;
use common::hub::listen::{Accepted, JoinStream, Limits, ListenConfig, Listener, bind};
use common::hub::proto;
use common::hub::session::Marks;
use common::hub::session::cloud::{CloudEvent, CloudSession, CloudView};
use common::hub::tls::ServerTls;
use common::hub::transport::{Connection, LinkConfig, TransportKind};
use common::ids::{Kind, NodeName, ObjectKey};
use common::object::{Content, ContentHash, Digest};
use common::pki::token::{Endpoint, TokenSecret};
use common::pki::{Ca, ClusterId, JoinToken, Validity};
use rustls_pki_types::UnixTime;
use testbed::bench::hollow::{Hollow, Preference};
use testbed::cloud::Invitation;
use tokio_util::sync::CancellationToken;

const HOUR: Duration = Duration::from_secs(3600);

fn cluster() -> ClusterId {
    ClusterId::parse("c1").unwrap()
}

fn validity() -> Validity {
    Validity::starting(UnixTime::now(), HOUR)
}

/// One ConfigMap that is known not to exist: the smallest desired set.
struct View;

impl View {
    fn only() -> (ObjectKey, ContentHash) {
        let key = ObjectKey::named(Kind::ConfigMap, "default", "a");
        (key, ContentHash::of(&Content::Absent))
    }
}

impl CloudView for View {
    fn epoch(&self) -> [u8; 16] {
        [7; 16]
    }
    fn marks(&self) -> Marks {
        Marks::from([(Kind::Pod, 5)])
    }
    fn revision(&self, _: &ObjectKey) -> u64 {
        5
    }
    fn each(&self, visit: &mut dyn FnMut(&ObjectKey, &ContentHash)) {
        let (key, hash) = View::only();
        visit(&key, &hash);
    }
    fn hash(&self, key: &ObjectKey) -> Option<ContentHash> {
        let (only, hash) = View::only();
        (*key == only).then_some(hash)
    }
    fn put(&self, key: &ObjectKey, _: Option<ContentHash>) -> Option<proto::Put> {
        let hash = self.hash(key)?.0.to_vec();
        Some(proto::Put {
            key: key.to_string(),
            hash,
            absent: true,
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

/// What the cloud saw of one session.
#[derive(Debug, Default, PartialEq, Eq)]
struct Saw {
    in_sync: bool,
    reports: usize,
}

const SETTLED: Saw = Saw {
    in_sync: true,
    reports: 1,
};

/// Serves one session until the edge is in sync and has reported.
async fn serve(connection: &Connection) -> Saw {
    let mut lanes = Lanes::accept(connection).await.unwrap();
    let mut session = CloudSession::default();
    let mut saw = Saw::default();
    loop {
        while let Some(event) = session.poll_event() {
            match event {
                CloudEvent::Greeted(_) => session.welcome(proto::Welcome {
                    version: common::hub::PROTOCOL_VERSION,
                    cluster_epoch: vec![7; 16],
                    ..Default::default()
                }),
                CloudEvent::InSync => saw.in_sync = true,
                CloudEvent::Report { key, sequence, .. } => {
                    assert_eq!(key.kind, Kind::Node);
                    saw.reports += 1;
                    session.ack_reports([(key, sequence, false)]);
                }
                CloudEvent::Live => session.pump(&View),
                // The first session of an epoch: this view is as good as a new list.
                CloudEvent::Behind { .. } => session.listed(&View),
                other => panic!("an idle edge caused {other:?}"),
            }
        }
        while let Some((lane, message)) = session.poll_message() {
            lanes.send(lane, &message).unwrap();
        }
        if saw == SETTLED {
            return saw;
        }
        let (_, message) = lanes.recv().await.unwrap();
        session.handle(*message, &View).unwrap();
    }
}

async fn let_in(stream: JoinStream, ca: &Ca, endpoint: Endpoint) {
    let request = stream.request().clone();
    let node = NodeName::parse(&request.node_name).unwrap();
    let chain = ca
        .sign_node_csr(&request.csr, &node, &cluster(), validity())
        .unwrap();
    let link = proto::Link {
        roots: vec![ca.certificate().to_vec()],
        endpoints: vec![endpoint.to_proto()],
        cluster_id: cluster().as_str().to_owned(),
        ..Default::default()
    };
    let joined = proto::Joined {
        chain: chain.iter().map(|der| der.to_vec()).collect(),
        link: Some(link),
        node_name: request.node_name,
        ..Default::default()
    };
    let answer = Some(proto::join_answer::Answer::Joined(joined));
    stream.answer(&proto::JoinAnswer { answer }).await.unwrap();
}

async fn listen(ca: &Ca) -> Listener {
    let credentials = ca.issue_server(&cluster(), validity(), &[]).unwrap();
    let tls = ServerTls::new(&credentials, &[ca.certificate().clone()]).unwrap();
    let config = ListenConfig {
        address: ([127, 0, 0, 1], 0).into(),
        link: LinkConfig::default(),
        reset_key: [7; 32],
        limits: Limits::default(),
    };
    let (listener, task) = bind(config, tls).await.unwrap();
    tokio::spawn(task.run(CancellationToken::new()));
    listener
}

fn invitation(ca: &Ca, listener: &Listener) -> (Invitation, Endpoint) {
    let address = listener.address();
    let endpoint = Endpoint::new("127.0.0.1", address.port());
    let token = JoinToken {
        id: "abc".to_owned(),
        secret: TokenSecret::generate().unwrap(),
        pins: vec![ca.pin()],
        endpoints: vec![endpoint.clone()],
        cluster: cluster(),
    };
    let invitation = Invitation {
        line: String::new(),
        join: address.to_string(),
        token: token.to_text(),
    };
    (invitation, endpoint)
}

async fn settles(preference: Preference, kind: TransportKind) {
    let ca = Ca::generate(&cluster(), validity()).unwrap();
    let mut listener = listen(&ca).await;
    let (invitation, endpoint) = invitation(&ca, &listener);
    let door = async {
        match listener.accept().await.unwrap() {
            Accepted::Join(stream) => let_in(stream, &ca, endpoint).await,
            Accepted::Session(_) => panic!("a session before the join"),
        }
    };
    let (hollow, ()) = tokio::join!(Hollow::join(&invitation, "hollow-1"), door);
    let hollow = hollow.unwrap();
    let cloud = async {
        match listener.accept().await.unwrap() {
            Accepted::Session(connection) => {
                assert_eq!(connection.kind(), kind);
                serve(&connection).await
            }
            Accepted::Join(_) => panic!("a second join"),
        }
    };
    let edge = async { hollow.connect(preference).await.unwrap().serve().await };
    let saw = tokio::time::timeout(Duration::from_secs(20), async {
        tokio::select! {
            saw = cloud => saw,
            error = edge => panic!("the hollow edge gave up: {error:#}"),
        }
    });
    assert_eq!(saw.await.unwrap(), SETTLED);
}

#[tokio::test]
async fn a_hollow_edge_settles_over_quic() {
    settles(Preference::Quic, TransportKind::Quic).await;
}

#[tokio::test]
async fn a_hollow_edge_settles_over_websocket() {
    settles(Preference::WebSocket, TransportKind::WebSocket).await;
}
