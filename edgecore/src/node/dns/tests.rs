use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::ids::Kind;
use serde_json::json;

use super::message::testing::query;
use super::*;
use crate::pods::testing::desired;

fn question(name: &str, kind: u16) -> Question {
    message::parse_query(&query(1, name, kind)).unwrap()
}

#[test]
fn cluster_names_end_here_and_others_are_forwarded() {
    let six: IpAddr = "fd00::1".parse().unwrap();
    let four: IpAddr = "10.96.7.7".parse().unwrap();
    let service = |namespace: &str, name: &str| match (namespace, name) {
        ("shop", "db") => Some(four),
        ("shop", "six") => Some(six),
        _ => None,
    };
    let none = Verdict::Answer(Code::NoSuchName, Vec::new());
    let empty = Verdict::Answer(Code::NoError, Vec::new());
    for (name, kind, want) in [
        (
            "db.shop.svc.cluster.local",
            1,
            &Verdict::Answer(Code::NoError, vec![four]),
        ),
        (
            "DB.Shop.svc.CLUSTER.local",
            1,
            &Verdict::Answer(Code::NoError, vec![four]),
        ),
        ("db.shop.svc.cluster.local", 28, &empty),
        ("db.shop.svc.cluster.local", 16, &empty),
        (
            "six.shop.svc.cluster.local",
            28,
            &Verdict::Answer(Code::NoError, vec![six]),
        ),
        ("other.shop.svc.cluster.local", 1, &none),
        ("example.com.shop.svc.cluster.local", 1, &none),
        ("example.com.cluster.local", 1, &none),
        ("cluster.local", 1, &empty),
        ("example.com", 1, &Verdict::Forward),
        ("notcluster.local", 1, &Verdict::Forward),
        ("local", 1, &Verdict::Forward),
        ("", 2, &Verdict::Forward),
    ] {
        assert_eq!(
            &judge(&question(name, kind), "cluster.local.", service),
            want,
            "{name}"
        );
    }
}

#[test]
fn it_never_asks_itself() {
    let own: SocketAddr = "10.96.0.10:53".parse().unwrap();
    let text = "nameserver 10.96.0.10\nnameserver 192.0.2.1\nnameserver odd\nnameserver ::1\n\
        nameserver 192.0.2.2\nnameserver 192.0.2.3\n";
    let found: Vec<_> = upstreams(text, 53, own)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(found, ["192.0.2.1:53", "[::1]:53", "192.0.2.2:53"]);
}

/// A resolver that answers every question with 192.0.2.99, over UDP and TCP.
async fn upstream() -> (SocketAddr, Arc<AtomicUsize>) {
    let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = udp.local_addr().unwrap();
    let tcp = TcpListener::bind(address).await.unwrap();
    let count = Arc::new(AtomicUsize::new(0));
    let reply = |query: &[u8]| {
        let question = message::parse_query(query).unwrap();
        let ip = "192.0.2.99".parse().unwrap();
        message::answer(query, &question, Code::NoError, &[ip])
    };
    let counted = count.clone();
    tokio::spawn(async move {
        let mut buffer = [0; 512];
        loop {
            let (size, client) = udp.recv_from(&mut buffer).await.unwrap();
            counted.fetch_add(1, Ordering::Relaxed);
            // Forged answers come first: another id, another question.
            let forged = message::with_id(&reply(&buffer[..size]), 0);
            udp.send_to(&forged, client).await.unwrap();
            udp.send_to(&reply(&buffer[..size]), client).await.unwrap();
        }
    });
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = tcp.accept().await.unwrap();
            let query = read_framed(&mut stream).await.unwrap();
            write_framed(&mut stream, &reply(&query)).await.unwrap();
        }
    });
    (address, count)
}

async fn forwarder(
    resolv_conf: &str,
    port: u16,
) -> (SocketAddr, CancellationToken, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("resolv.conf");
    std::fs::write(&path, resolv_conf).unwrap();
    let config = DnsConfig {
        listen: "127.0.0.1:0".parse().unwrap(),
        cluster_domain: "cluster.local".into(),
        api_service: Some("10.96.0.1".parse().unwrap()),
        resolv_conf: path,
        upstream_port: port,
    };
    let list = json!([{"name": "db", "ip": "10.96.7.7", "ports": []}]);
    let desired = desired(&[(Kind::Services, "shop", "", list)]);
    let forwarder = Forwarder::bind(config, desired).await.unwrap();
    let address = forwarder.local_addr().unwrap();
    let stop = CancellationToken::new();
    tokio::spawn(forwarder.run(stop.clone()));
    (address, stop, dir)
}

async fn ask(server: SocketAddr, query: &[u8]) -> Vec<u8> {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.send_to(query, server).await.unwrap();
    let mut buffer = [0; 512];
    let size = timeout(Duration::from_secs(10), socket.recv(&mut buffer))
        .await
        .unwrap()
        .unwrap();
    buffer[..size].to_vec()
}

fn tail(message: &[u8]) -> &[u8] {
    &message[message.len() - 4..]
}

#[tokio::test]
async fn questions_over_udp_and_tcp() {
    let (upstream, asked) = upstream().await;
    let (server, stop, _dir) = forwarder("nameserver 127.0.0.1\n", upstream.port()).await;

    let service = ask(server, &query(5, "db.shop.svc.cluster.local", 1)).await;
    assert_eq!(tail(&service), [10, 96, 7, 7]);
    let api = ask(server, &query(5, "kubernetes.default.svc.cluster.local", 1)).await;
    assert_eq!(tail(&api), [10, 96, 0, 1]);
    let none = ask(server, &query(5, "example.com.shop.svc.cluster.local", 1)).await;
    assert_eq!(none[3] & 0xf, 3, "no such name");
    assert_eq!(
        asked.load(Ordering::Relaxed),
        0,
        "cluster names left the device"
    );

    let forwarded = ask(server, &query(0x77aa, "example.com", 1)).await;
    assert_eq!(&forwarded[..2], &[0x77, 0xaa], "the client's own id");
    assert_eq!(tail(&forwarded), [192, 0, 2, 99]);

    let mut stream = TcpStream::connect(server).await.unwrap();
    for (name, want) in [
        ("example.com", [192, 0, 2, 99]),
        ("db.shop.svc.cluster.local", [10, 96, 7, 7]),
    ] {
        write_framed(&mut stream, &query(6, name, 1)).await.unwrap();
        assert_eq!(tail(&read_framed(&mut stream).await.unwrap()), want);
    }
    stop.cancel();
}

#[tokio::test]
async fn without_a_resolver_it_says_so_at_once() {
    let (server, stop, _dir) = forwarder("# none\n", 53).await;
    let answer = ask(server, &query(5, "example.com", 1)).await;
    assert_eq!(answer[3] & 0xf, 2, "server failure");
    stop.cancel();
}

#[tokio::test]
async fn a_silent_resolver_is_passed_over() {
    let (upstream, _) = upstream().await;
    // The same port at another loopback address: a socket that never answers.
    let silent = UdpSocket::bind(("127.0.0.2", upstream.port()))
        .await
        .unwrap();
    let conf = "nameserver 127.0.0.2\nnameserver 127.0.0.1\n";
    let (server, stop, _dir) = forwarder(conf, upstream.port()).await;
    let answer = ask(server, &query(5, "example.com", 1)).await;
    assert_eq!(tail(&answer), [192, 0, 2, 99]);
    drop(silent);
    stop.cancel();
}
