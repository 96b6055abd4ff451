//! Against quinn's own driver, which others wrote, at either end.

use std::net::UdpSocket;

use quinn_proto::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn_proto::{ClientConfig, ServerConfig};
use tokio::time::timeout;

use super::*;
use crate::hub::mux::Side;
use crate::hub::proto::StreamHead;
use crate::hub::quic::{dial, transport};
use crate::hub::testing::{Cloud, HOUR, client_tls, identity, new_ca, now_for, server_tls};
use crate::hub::transport::{Connection, Link, LinkConfig};

const SOON: Duration = Duration::from_secs(20);

fn loopback() -> UdpSocket {
    UdpSocket::bind(("127.0.0.1", 0)).unwrap()
}

/// A device by quinn's driver, with its session at our listener.
async fn foreign_device(cloud: &mut Cloud) -> (quinn::Endpoint, quinn::Connection, Connection) {
    let tls = client_tls(&cloud.ca, identity(&cloud.ca, now_for(HOUR)));
    let crypto = QuicClientConfig::try_from(tls.config.clone()).unwrap();
    let mut config = ClientConfig::new(Arc::new(crypto));
    config.transport_config(transport(&cloud.link, Side::Dialler));
    let runtime = Arc::new(quinn::TokioRuntime);
    let endpoint =
        quinn::Endpoint::new(quinn::EndpointConfig::default(), None, loopback(), runtime).unwrap();
    let connecting = endpoint
        .connect_with(config, cloud.address(), &tls.name.to_str())
        .unwrap();
    let (device, session) = tokio::join!(connecting, cloud.next_session());
    let device = device.unwrap();
    let mut word = device.accept_uni().await.unwrap();
    assert_eq!(
        word.read(&mut [0]).await.unwrap(),
        None,
        "the word is empty"
    );
    (endpoint, device, session)
}

/// A megabyte there and back through one stream.
async fn echo(device: &quinn::Connection, session: &Connection) {
    let bytes: Vec<u8> = (0..1_000_000u32).map(|n| (n % 251) as u8).collect();
    let (mut send, mut recv) = device.open_bi().await.unwrap();
    // The class, and a head that says nothing.
    send.write_all(&[3, 0, 0]).await.unwrap();
    let there = async {
        send.write_all(&bytes).await.unwrap();
        send.finish().unwrap();
    };
    let back = async {
        let incoming = session.accept().await.unwrap();
        let (mut send, mut recv) = (incoming.send, incoming.recv);
        while let Some(bytes) = recv.read(64 * 1024).await.unwrap() {
            send.write_all(bytes).await.unwrap();
        }
        send.finish();
    };
    let all = recv.read_to_end(bytes.len() + 1);
    let ((), (), all) = tokio::join!(there, back, all);
    assert!(all.unwrap() == bytes, "it came back changed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_others_wrote_talks_to_our_listener_and_may_change_its_address() {
    let mut cloud = Cloud::start().await;
    let (endpoint, device, session) = foreign_device(&mut cloud).await;
    timeout(SOON, echo(&device, &session))
        .await
        .expect("an echo");

    let before = session.remote_address();
    endpoint.rebind(loopback()).unwrap();
    timeout(SOON, echo(&device, &session))
        .await
        .expect("an echo from elsewhere");
    assert_ne!(session.remote_address(), before);
    assert_eq!(session.remote_address(), endpoint.local_addr().unwrap());

    device.close(7u32.into(), b"enough");
    match timeout(SOON, session.closed()).await.expect("an end") {
        TransportError::ClosedByPeer { code: 7, reason } => assert_eq!(reason, "enough"),
        other => panic!("{other:?}"),
    }
    let gone = cloud.listener.drain(SOON);
    timeout(SOON / 2, gone)
        .await
        .expect("the listener has nothing left of it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_device_talks_to_a_listener_that_others_wrote() {
    let ca = new_ca();
    let link = LinkConfig::default();
    let crypto = QuicServerConfig::try_from(server_tls(&ca).hub).unwrap();
    let mut config = ServerConfig::with_crypto(Arc::new(crypto));
    config.transport_config(transport(&link, Side::Listener));
    let runtime = Arc::new(quinn::TokioRuntime);
    let of_endpoint = quinn::EndpointConfig::default();
    let endpoint = quinn::Endpoint::new(of_endpoint, Some(config), loopback(), runtime).unwrap();

    let tls = client_tls(&ca, identity(&ca, now_for(HOUR)));
    let cloud = async {
        let connection = endpoint.accept().await.unwrap().await.unwrap();
        connection.open_uni().await.unwrap().finish().unwrap();
        connection
    };
    let dialled = dial(endpoint.local_addr().unwrap(), &tls, &link);
    let (ours, theirs) = tokio::join!(dialled, cloud);
    let ours = ours.unwrap();
    let head = StreamHead::default();
    let (mut send, mut recv) = ours.open(Class::Bulk, &head).await.unwrap();
    let bytes = Bytes::from(vec![7; 1_000_000]);
    let there = async {
        send.write_all(bytes.clone()).await.unwrap();
        send.finish();
        let mut back = 0;
        while let Some(bytes) = recv.read(usize::MAX).await.unwrap() {
            back += bytes.len();
        }
        back
    };
    let back = async {
        let (mut send, mut recv) = theirs.accept_bi().await.unwrap();
        let all = recv.read_to_end(2_000_000).await.unwrap();
        send.write_all(&all).await.unwrap();
        send.finish().unwrap();
        all.len()
    };
    let (came_back, went) = timeout(SOON, async { tokio::join!(there, back) })
        .await
        .unwrap();
    assert_eq!(came_back, went);
    assert!(went > bytes.len() && went < bytes.len() + 100);

    drop((ours, send, recv));
    let end = timeout(SOON, theirs.closed())
        .await
        .expect("the last handle is gone");
    assert!(
        matches!(end, quinn::ConnectionError::ApplicationClosed(_)),
        "{end:?}"
    );
}

#[tokio::test]
async fn the_end_of_a_connection_leaves_the_one_alone_that_has_its_number_now() {
    let mut cloud = Cloud::start().await;
    let (endpoint, device, session) = foreign_device(&mut cloud).await;
    let Link::Quic(link) = session.link() else {
        panic!("another transport");
    };
    let shared = &link.0;
    let another = Arc::<Mailbox>::default();
    shared.endpoint.forget(shared.handle, &another);
    timeout(SOON, echo(&device, &session))
        .await
        .expect("it still hears");
    drop(endpoint);
}
