//! The door: who comes in by which face, who is turned away, and what a stranger may cost.

use std::time::Duration;

use rustls_pki_types::UnixTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use super::*;
use crate::hub::dial::{JoinOutcome, Target, dial, join};
use crate::hub::proto::join_answer::Answer;
use crate::hub::proto::{Joined, RefusalCode};
use crate::hub::testing::{Cloud, HOUR, cluster, identity, new_ca, now_for, server_tls};
use crate::hub::tls::{ClientTls, Clock, Trust, TrustError};
use crate::hub::transport::{Refusal, TransportKind};
use crate::pki::token::{Endpoint, TokenSecret};
use crate::pki::{JoinToken, KeyId, Validity};

const SOON: Duration = Duration::from_secs(10);
const BOTH: [TransportKind; 2] = [TransportKind::Quic, TransportKind::WebSocket];

fn token(cloud: &Cloud, pin: KeyId) -> JoinToken {
    JoinToken {
        id: "t1".into(),
        secret: TokenSecret::generate().expect("random"),
        pins: vec![pin],
        endpoints: vec![Endpoint::new("127.0.0.1", cloud.address().port())],
        cluster: cluster(),
    }
}

async fn next_join(cloud: &mut Cloud) -> JoinStream {
    match timeout(SOON, cloud.listener.accept())
        .await
        .expect("in time")
        .expect("running")
    {
        Accepted::Join(join) => join,
        Accepted::Session(_) => panic!("a session came instead of a join"),
    }
}

fn telling(error: crate::hub::dial::DialError) -> TransportError {
    error
        .most_telling()
        .cloned()
        .unwrap_or_else(|| panic!("{error}"))
}

#[tokio::test]
async fn a_device_without_a_certificate_or_a_clock_can_join() {
    let mut cloud = Cloud::start().await;
    let token = token(&cloud, cloud.ca.pin());
    let mut request = JoinRequest {
        node_name: "shop-7".into(),
        ..JoinRequest::default()
    };
    token.present(&mut request);
    // It believes to have a clock, and is wrong by half a century.
    let wrong = Clock::Synchronised(UnixTime::since_unix_epoch(HOUR));
    let options = crate::hub::dial::DialOptions::new(wrong);
    let serve = async {
        let stream = next_join(&mut cloud).await;
        assert_eq!(stream.request().node_name, "shop-7");
        assert_eq!(stream.request().token_secret, token.secret.bytes());
        assert!(!format!("{stream:?}").contains("secret"));
        let joined = Joined {
            node_name: "shop-7".into(),
            ..Joined::default()
        };
        stream
            .answer(&JoinAnswer {
                answer: Some(Answer::Joined(joined)),
            })
            .await
            .expect("answer");
        let stream = next_join(&mut cloud).await;
        let refused = crate::hub::proto::Refused {
            code: RefusalCode::RefusalTokenUsed.into(),
            message: "the token was used".into(),
        };
        stream
            .answer(&JoinAnswer {
                answer: Some(Answer::Refused(refused)),
            })
            .await
            .expect("answer");
    };
    let target = Target::from_token(&token);
    let ask = async {
        let first = join(&target, &request, &options).await.expect("answered");
        assert!(matches!(first, JoinOutcome::Joined(j) if j.node_name == "shop-7"));
        let second = join(&target, &request, &options).await.expect("answered");
        assert!(
            matches!(second, JoinOutcome::Refused(r) if r.code() == RefusalCode::RefusalTokenUsed)
        );
    };
    timeout(SOON, async { tokio::join!(serve, ask) })
        .await
        .expect("in time");
}

#[tokio::test]
async fn a_token_of_another_ca_ends_the_join_before_the_secret_is_sent() {
    let cloud = Cloud::start().await;
    let token = token(&cloud, new_ca().pin());
    let options = crate::hub::dial::DialOptions::new(Clock::Unsynchronised(None));
    let request = JoinRequest::default();
    let result = join(&Target::from_token(&token), &request, &options).await;
    let error = telling(result.expect_err("not believed"));
    let TransportError::Trust(TrustError::PinMismatch { shown }) = error else {
        panic!("{error:?}");
    };
    assert!(
        shown.contains(&cloud.ca.pin()),
        "says what is shown instead"
    );
}

#[tokio::test]
async fn each_end_refuses_the_wrong_certificate_with_its_own_reason() {
    let mut cloud = Cloud::start().await;
    let hour = now_for(HOUR);
    let past = Validity::starting(
        UnixTime::since_unix_epoch(Duration::from_secs(1_000_000_000)),
        HOUR,
    );
    let stranger = new_ca();
    for kind in BOTH {
        let options = cloud.options(kind);
        let expired = dial(&cloud.target(), &identity(&cloud.ca, past), &options).await;
        let error = telling(expired.expect_err("expired"));
        assert!(
            matches!(error, TransportError::Refused(Refusal::Expired)),
            "{kind}: {error:?}"
        );
        let unknown = dial(&cloud.target(), &identity(&stranger, hour), &options).await;
        let error = telling(unknown.expect_err("unknown"));
        assert!(
            matches!(error, TransportError::Refused(Refusal::Unknown)),
            "{kind}: {error:?}"
        );
        let mut target = cloud.target();
        target.trust = Trust::Roots(vec![stranger.certificate().clone()]);
        let other = dial(&target, &identity(&cloud.ca, hour), &options).await;
        let error = telling(other.expect_err("another CA"));
        assert!(
            matches!(error, TransportError::Trust(TrustError::OtherRoot)),
            "{kind}: {error:?}"
        );
        let mut options = cloud.options(kind);
        options.clock = Clock::Synchronised(UnixTime::since_unix_epoch(HOUR));
        let early = dial(&cloud.target(), &identity(&cloud.ca, hour), &options).await;
        let error = telling(early.expect_err("the clock is wrong"));
        assert!(
            matches!(error, TransportError::Trust(TrustError::NotYetValid { .. })),
            "{kind}: {error:?}"
        );
        // The same wrong clock, known to be wrong, does no harm.
        options.clock = Clock::Unsynchronised(Some(UnixTime::since_unix_epoch(HOUR)));
        let (target, device) = (cloud.target(), identity(&cloud.ca, hour));
        let (edge, _served) = tokio::join!(dial(&target, &device, &options), cloud.next_session());
        edge.expect("connects");
    }
}

#[tokio::test]
async fn a_session_without_a_client_certificate_is_refused() {
    let cloud = Cloud::start().await;
    let roots = Trust::Roots(vec![cloud.ca.certificate().clone()]);
    let mut tls = ClientTls::new(roots, &cluster(), Clock::Unsynchronised(None), None)
        .expect("configuration");
    let mut config = (*tls.config).clone();
    config.alpn_protocols = vec![ALPN_HUB.to_vec()];
    tls.config = Arc::new(config);
    let link = LinkConfig::default();
    let websocket = ws::dial(cloud.address(), &tls, &link)
        .await
        .expect_err("refused");
    assert!(
        matches!(websocket, TransportError::Refused(Refusal::Missing)),
        "{websocket:?}"
    );
    let quic = quic::dial(cloud.address(), &tls, &link)
        .await
        .expect_err("refused");
    assert!(
        matches!(quic, TransportError::Refused(Refusal::Missing)),
        "{quic:?}"
    );
    // And joining does not exist over QUIC.
    let mut config = (*tls.config).clone();
    config.alpn_protocols = vec![ALPN_JOIN.to_vec()];
    tls.config = Arc::new(config);
    let join = quic::dial(cloud.address(), &tls, &link)
        .await
        .expect_err("refused");
    assert!(
        matches!(join, TransportError::Refused(Refusal::Protocol)),
        "{join:?}"
    );
}

#[tokio::test]
async fn new_credentials_are_shown_without_a_restart() {
    let mut cloud = Cloud::start().await;
    let fresh = new_ca();
    cloud
        .listener
        .replace_tls(server_tls(&fresh))
        .expect("replaced");
    cloud.ca = fresh;
    for kind in BOTH {
        cloud.pair(kind).await;
    }
}

fn tight() -> Limits {
    Limits {
        handshakes: 4,
        per_source: 4,
        deadline: Duration::from_millis(700),
    }
}

/// Whether the door still opens for an honest device.
async fn still_open(cloud: &mut Cloud) {
    for kind in BOTH {
        timeout(SOON, cloud.pair(kind))
            .await
            .expect("the door still opens");
    }
}

async fn cut_off(mut tcp: TcpStream) {
    let mut rest = [0; 1024];
    let end = async { while tcp.read(&mut rest).await.is_ok_and(|n| n > 0) {} };
    timeout(SOON, end).await.expect("cut off");
}

#[tokio::test]
async fn garbage_is_cut_off_and_harms_nobody() {
    let mut cloud = Cloud::with(LinkConfig::default(), tight()).await;
    let floods: [&[u8]; 4] = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        &[0; 5000],
        &[0x16, 0x03, 0x01, 0xff, 0xff, 0x01],
        b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00",
    ];
    for bytes in floods {
        let mut tcp = TcpStream::connect(cloud.address()).await.expect("connect");
        tcp.write_all(bytes).await.expect("write");
        cut_off(tcp).await;
    }
    let udp = tokio::net::UdpSocket::bind("127.0.0.1:0")
        .await
        .expect("bind");
    for length in [1, 20, 1200, 1400] {
        udp.send_to(&vec![0xc3; length], cloud.address())
            .await
            .expect("send");
    }
    still_open(&mut cloud).await;
    assert!(
        cloud.listener.refused().failed >= 4,
        "{:?}",
        cloud.listener.refused()
    );
}

#[tokio::test]
async fn a_handshake_byte_by_byte_is_cut_at_the_deadline() {
    let mut cloud = Cloud::with(LinkConfig::default(), tight()).await;
    let mut tcp = TcpStream::connect(cloud.address()).await.expect("connect");
    let started = Instant::now();
    // A record of 512 bytes that never comes to its end.
    let hello = [
        &[0x16, 0x03, 0x01, 0x02, 0x00, 0x01, 0x00, 0x01, 0xfc][..],
        &[0; 200],
    ]
    .concat();
    for byte in hello {
        if tcp.write_all(&[byte]).await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        if started.elapsed() > Duration::from_secs(2) {
            break;
        }
    }
    cut_off(tcp).await;
    assert!(
        started.elapsed() < Duration::from_secs(4),
        "{:?}",
        started.elapsed()
    );
    still_open(&mut cloud).await;
}

#[tokio::test]
async fn too_many_handshakes_are_turned_away_and_places_become_free() {
    let mut cloud = Cloud::with(LinkConfig::default(), tight()).await;
    let mut idle = Vec::new();
    for _ in 0..4 {
        idle.push(TcpStream::connect(cloud.address()).await.expect("connect"));
    }
    // Only once all four are inside is the door shut.
    while cloud.listener.refused().crowded == 0 {
        let tcp = TcpStream::connect(cloud.address()).await.expect("connect");
        idle.push(tcp);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let device = identity(&cloud.ca, now_for(HOUR));
    let mut options = cloud.options(TransportKind::Quic);
    options.deadline = Duration::from_millis(300);
    assert!(
        dial(&cloud.target(), &device, &options).await.is_err(),
        "full for QUIC too"
    );
    for tcp in idle {
        cut_off(tcp).await;
    }
    still_open(&mut cloud).await;
}

#[tokio::test]
async fn a_join_request_that_is_too_long_or_nonsense_never_reaches_the_taker() {
    let mut cloud = Cloud::with(LinkConfig::default(), tight()).await;
    let link = LinkConfig::default();
    let trust = Trust::Pins(vec![cloud.ca.pin()]);
    let tls = ClientTls::new(trust, &cluster(), Clock::Unsynchronised(None), None).expect("tls");
    let too_long = u32::try_from(JOIN_REQUEST_LIMIT + 1)
        .expect("small")
        .to_be_bytes();
    let nonsense = [&[0, 0, 0, 4][..], &[0xff; 4]].concat();
    let half = [&[0, 0, 1, 0][..], &[1; 10]].concat();
    for bytes in [&too_long[..], &nonsense, &half] {
        let mut stream = ws::connect(cloud.address(), &tls, &link)
            .await
            .expect("handshake");
        stream.write_all(bytes).await.expect("write");
        let mut rest = [0; 64];
        let end = async { while stream.read(&mut rest).await.is_ok_and(|n| n > 0) {} };
        timeout(SOON, end).await.expect("cut off");
    }
    // The next that comes in is an honest one.
    still_open(&mut cloud).await;
}

#[tokio::test]
async fn a_taken_port_is_named() {
    let cloud = Cloud::start().await;
    let config = ListenConfig {
        address: cloud.address(),
        link: LinkConfig::default(),
        limits: Limits::default(),
    };
    let error = bind(config, server_tls(&cloud.ca))
        .await
        .err()
        .expect("taken");
    assert!(
        error.to_string().contains(&cloud.address().to_string()),
        "{error}"
    );
}
