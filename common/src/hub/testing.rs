//! A cloud and a device on the loopback, for the tests of the transports.

use std::net::SocketAddr;
use std::time::Duration;

use rustls_pki_types::UnixTime;
use tokio_util::sync::CancellationToken;

use super::dial::{DialOptions, Preference, Target, dial};
use super::listen::{Accepted, Limits, ListenConfig, Listener, bind};
use super::tls::{ClientIdentity, ClientTls, Clock, ServerTls, Trust};
use super::transport::{Connection, LinkConfig, TransportKind};
use crate::ids::NodeName;
use crate::pki::token::Endpoint;
use crate::pki::{Ca, ClusterId, NodeKey, Validity};

pub(super) const HOUR: Duration = Duration::from_secs(3600);

pub(super) struct Cloud {
    pub(super) ca: Ca,
    pub(super) listener: Listener,
    pub(super) link: LinkConfig,
    shutdown: CancellationToken,
}

impl Drop for Cloud {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

pub(super) fn cluster() -> ClusterId {
    ClusterId::parse("c1").expect("label")
}

pub(super) fn now_for(lifetime: Duration) -> Validity {
    Validity::starting(UnixTime::now(), lifetime)
}

pub(super) fn new_ca() -> Ca {
    Ca::generate(&cluster(), now_for(100 * HOUR)).expect("root")
}

pub(super) fn server_tls(ca: &Ca) -> ServerTls {
    let credentials = ca
        .issue_server(&cluster(), now_for(HOUR), &[])
        .expect("server");
    ServerTls::new(&credentials, &[ca.certificate().clone()]).expect("configuration")
}

/// What a device shows and believes.
pub(super) fn client_tls(ca: &Ca, device: ClientIdentity) -> ClientTls {
    let trust = Trust::Roots(vec![ca.certificate().clone()]);
    let clock = Clock::Synchronised(UnixTime::now());
    ClientTls::new(trust, &cluster(), clock, Some(device)).expect("configuration")
}

impl Cloud {
    pub(super) async fn start() -> Self {
        Self::with(LinkConfig::default(), Limits::default()).await
    }

    pub(super) async fn with(link: LinkConfig, limits: Limits) -> Self {
        let ca = new_ca();
        let tls = server_tls(&ca);
        let config = ListenConfig {
            address: ([127, 0, 0, 1], 0).into(),
            link: link.clone(),
            reset_key: [7; 32],
            limits,
        };
        let (listener, task) = bind(config, tls).await.expect("bind");
        let shutdown = CancellationToken::new();
        tokio::spawn(task.run(shutdown.clone()));
        Self {
            ca,
            listener,
            link,
            shutdown,
        }
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.listener.address()
    }

    pub(super) fn target_at(&self, address: SocketAddr) -> Target {
        Target {
            endpoints: vec![Endpoint::new(&address.ip().to_string(), address.port())],
            cluster: cluster(),
            trust: Trust::Roots(vec![self.ca.certificate().clone()]),
        }
    }

    pub(super) fn target(&self) -> Target {
        self.target_at(self.address())
    }

    pub(super) fn options(&self, kind: TransportKind) -> DialOptions {
        DialOptions {
            preference: match kind {
                TransportKind::Quic => Preference::Quic,
                TransportKind::WebSocket => Preference::WebSocket,
            },
            link: self.link.clone(),
            ..DialOptions::new(Clock::Synchronised(UnixTime::now()))
        }
    }

    /// A device's connection and the cloud's end of it.
    pub(super) async fn pair(&mut self, kind: TransportKind) -> (Connection, Connection) {
        self.pair_at(kind, self.address()).await
    }

    pub(super) async fn pair_at(
        &mut self,
        kind: TransportKind,
        address: SocketAddr,
    ) -> (Connection, Connection) {
        let (target, options) = (self.target_at(address), self.options(kind));
        let identity = identity(&self.ca, now_for(HOUR));
        let (edge, cloud) = tokio::join!(dial(&target, &identity, &options), self.next_session());
        let edge = edge.expect("dial");
        assert_eq!((edge.kind(), cloud.kind()), (kind, kind));
        (edge, cloud)
    }

    pub(super) async fn next_session(&mut self) -> Connection {
        match self.listener.accept().await.expect("the listener runs") {
            Accepted::Session(connection) => connection,
            Accepted::Join(_) => panic!("a join came instead of a session"),
        }
    }
}

pub(super) fn identity(ca: &Ca, validity: Validity) -> ClientIdentity {
    let key = NodeKey::generate().expect("key");
    let node = NodeName::parse("shop-7").expect("name");
    let request = key.request().expect("request");
    let chain = ca
        .sign_node_csr(&request, &node, &cluster(), validity)
        .expect("signed");
    ClientIdentity {
        chain,
        key: key.private_key(),
    }
}
