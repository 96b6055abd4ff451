//! What an idle session costs the cloud. A measurement, not run by default:
//! `cargo test --release -p common --test idle_memory -- --ignored --nocapture`
//!
//! The listener runs in a process of its own (this test binary again), on one thread; the devices
//! run here. Each session has three lanes open and is then left alone.

#![expect(clippy::print_stdout, reason = "it prints what it measured")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::hub::dial::{DialOptions, Preference, Target, dial};
use common::hub::listen::{Accepted, Limits, ListenConfig, bind};
use common::hub::proto::StreamHead;
use common::hub::tls::{ClientIdentity, Clock, ServerTls, Trust};
use common::hub::transport::{Class, LinkConfig};
use common::ids::NodeName;
use common::pki::token::Endpoint;
use common::pki::{Ca, CaPem, ClusterId, NodeKey, Validity};
use rustls_pki_types::UnixTime;

const SESSIONS: usize = 400;
const CERTIFICATE: &str = "IDLE_MEMORY_CERTIFICATE";
const KEY: &str = "IDLE_MEMORY_KEY";

fn cluster() -> ClusterId {
    ClusterId::parse("c1").expect("label")
}

fn day() -> Validity {
    Validity::starting(UnixTime::now(), Duration::from_secs(86_400))
}

#[test]
#[ignore = "a measurement, with its command above"]
fn an_idle_session_costs_little() {
    let limits = [(Preference::WebSocket, 25), (Preference::Quic, 40)];
    for (preference, bar) in limits {
        let each = measure(preference);
        println!("{preference:?}: {each} bytes resident for each of {SESSIONS} idle sessions");
        assert!(
            each <= bar * 1000,
            "{preference:?}: {each} bytes, the bar is {bar} KB"
        );
    }
}

fn measure(preference: Preference) -> usize {
    let ca = Ca::generate(&cluster(), day()).expect("root");
    let mut cloud = start_cloud(&ca);
    let mut lines = BufReader::new(cloud.stdout.take().expect("piped"));
    let address = loop {
        let mut line = String::new();
        assert_ne!(
            lines.read_line(&mut line).expect("output"),
            0,
            "the listener ended early"
        );
        if let Some((_, address)) = line.split_once("listening ") {
            break address.trim().parse::<SocketAddr>().expect("address");
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.expect("runtime");
    let each = runtime.block_on(async {
        // The first ones pay for what is shared.
        let first = connect(&ca, address, preference, 20).await;
        let before = resident(&cloud);
        let rest = connect(&ca, address, preference, SESSIONS).await;
        let after = resident(&cloud);
        drop((first, rest));
        after.saturating_sub(before) / SESSIONS
    });
    drop(cloud.stdin.take());
    cloud.wait().expect("the listener ends with its input");
    each
}

async fn connect(
    ca: &Ca,
    address: SocketAddr,
    preference: Preference,
    count: usize,
) -> Vec<impl Sized> {
    let target = Target {
        endpoints: vec![Endpoint::new(&address.ip().to_string(), address.port())],
        cluster: cluster(),
        trust: Trust::Roots(vec![ca.certificate().clone()]),
    };
    let key = NodeKey::generate().expect("key");
    let node = NodeName::parse("n").expect("name");
    let request = key.request().expect("request");
    let chain = ca
        .sign_node_csr(&request, &node, &cluster(), day())
        .expect("signed");
    let identity = ClientIdentity {
        chain,
        key: key.private_key(),
    };
    let options = DialOptions {
        preference,
        ..DialOptions::new(Clock::Synchronised(UnixTime::now()))
    };
    let mut held = Vec::new();
    for _ in 0..count {
        let connection = dial(&target, &identity, &options).await.expect("dial");
        let mut lanes = Vec::new();
        for class in [Class::Control, Class::Status, Class::Bulk] {
            let (mut send, mut recv) = connection
                .open(class, &StreamHead::default())
                .await
                .expect("open");
            send.write_message(b"hello").await.expect("write");
            recv.read_message(100).await.expect("echo");
            lanes.push((send, recv));
        }
        held.push((connection, lanes));
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    held
}

fn resident(child: &Child) -> usize {
    let path = format!("/proc/{}/smaps_rollup", child.id());
    let text = std::fs::read_to_string(path).expect("readable");
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix("Rss:"))
        .expect("Rss");
    let kib: usize = line.trim().trim_end_matches(" kB").parse().expect("number");
    kib * 1024
}

fn start_cloud(ca: &Ca) -> Child {
    let pem = ca.to_pem();
    Command::new(std::env::current_exe().expect("this binary"))
        .args(["--exact", "the_listener", "--ignored", "--nocapture"])
        .env(CERTIFICATE, pem.certificate)
        .env(KEY, pem.key)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("started")
}

/// The other process; does nothing when started by hand.
#[test]
#[ignore = "the other half of the measurement"]
fn the_listener() {
    let (Ok(certificate), Ok(key)) = (std::env::var(CERTIFICATE), std::env::var(KEY)) else {
        return;
    };
    let ca = Ca::from_pem(&CaPem { certificate, key }).expect("root");
    std::thread::spawn(|| {
        let mut rest = Vec::new();
        // The parent closes our input when it is done, or has died.
        drop(std::io::stdin().read_to_end(&mut rest));
        std::process::exit(0);
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.expect("runtime").block_on(serve(&ca));
}

async fn serve(ca: &Ca) {
    let credentials = ca.issue_server(&cluster(), day(), &[]).expect("server");
    let tls = ServerTls::new(&credentials, &[ca.certificate().clone()]).expect("tls");
    let config = ListenConfig {
        address: ([127, 0, 0, 1], 0).into(),
        link: LinkConfig::default(),
        reset_key: [7; 32],
        limits: Limits::default(),
    };
    let (mut listener, task) = bind(config, tls).await.expect("bind");
    tokio::spawn(task.run(tokio_util::sync::CancellationToken::new()));
    let mut out = std::io::stdout();
    writeln!(out, "listening {}", listener.address()).expect("the parent reads");
    out.flush().expect("the parent reads");
    while let Some(Accepted::Session(connection)) = listener.accept().await {
        // One actor a session, as CloudCore has; it owns all lanes.
        tokio::spawn(async move {
            let mut lanes = Vec::new();
            while let Ok(mut lane) = connection.accept().await {
                if let Ok(Some(hello)) = lane.recv.read_message(100).await {
                    lane.send
                        .write_message(&hello)
                        .await
                        .expect("the device waits");
                }
                lanes.push(lane);
            }
        });
    }
}
