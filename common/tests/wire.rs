//! The wire, byte for byte: one frame of each message, as annotated hex in `tests/wire/`. A change
//! here is a change of what old and new ends say to one another: field numbers only grow.
//! `UPDATE=1 cargo test -p common --test wire` writes the files.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::fmt::Write as _;
use std::path::Path;

use common::hub::frame;
use common::hub::proto::{self, message::Body};
use prost::Message as _;

fn samples() -> Vec<(&'static str, Body)> {
    let digest = || {
        Some(proto::SetDigest {
            count: 3,
            root: vec![0xd1; 16],
        })
    };
    let marks = || {
        vec![proto::Mark {
            kind: 1,
            revision: 1_000_000,
        }]
    };
    vec![
        (
            "hello",
            Body::Hello(proto::Hello {
                version: 1,
                agent_version: "0.1.0".into(),
                incarnation: vec![0x11; 16],
                continuation: vec![0x22; 16],
                epoch: vec![0x33; 16],
                marks: marks(),
                desired: digest(),
                reports: digest(),
                link_version: 1,
                boot_id: "b".into(),
                clock_synchronised: true,
                environment_hash: "e".into(),
            }),
        ),
        (
            "welcome",
            Body::Welcome(proto::Welcome {
                version: 1,
                session_epoch: 7,
                cluster_epoch: vec![0x33; 16],
                now_ms: 1_795_453_200_000,
                continuation: vec![0x44; 16],
                link: Some(proto::Link {
                    version: 2,
                    roots: vec![vec![0x30, 0x82]],
                    endpoints: vec![proto::Endpoint {
                        host: "cloud.example".into(),
                        port: 10_000,
                        transports: vec!["quic".into()],
                    }],
                    cluster_id: "c1".into(),
                }),
                environment: Some(proto::NodeEnvironment {
                    cluster_dns: "10.96.0.10".into(),
                    cluster_domain: "cluster.local".into(),
                    api_host: "10.96.0.1".into(),
                    api_port: 443,
                    provider_id: "edge://c1/n".into(),
                    cluster_ranges: vec!["10.96.0.0/12".into()],
                }),
                dead_after_ms: 45_000,
                max_frame: 4_259_840,
            }),
        ),
        ("welcome-ack", Body::WelcomeAck(proto::WelcomeAck {})),
        (
            "batch",
            Body::Batch(proto::Batch {
                sequence: 5,
                epoch: vec![0x33; 16],
                marks: marks(),
                puts: vec![
                    proto::Put {
                        key: "ConfigMap/default/app".into(),
                        hash: vec![0x55; 16],
                        encoding: 3,
                        payload: vec![0x28, 0xb5],
                        size: 2048,
                        absent: false,
                    },
                    proto::Put {
                        key: "Secret/default/none".into(),
                        hash: vec![0x77; 16],
                        absent: true,
                        ..Default::default()
                    },
                ],
                removes: vec!["Pod/default/web/uid-1".into()],
                complete: digest(),
            }),
        ),
        (
            "batch-ack",
            Body::BatchAck(proto::BatchAck {
                sequence: 5,
                outcome: 1,
                desired: digest(),
                unusable: vec!["ConfigMap/default/app".into()],
                marks: marks(),
            }),
        ),
        (
            "want-inventory",
            Body::WantInventory(proto::WantInventory {}),
        ),
        (
            "inventory",
            Body::Inventory(proto::Inventory {
                keys: vec!["Secret/a/b".into()],
                hashes: vec![0x88; 16],
                last: true,
            }),
        ),
        (
            "reports",
            Body::Reports(proto::Reports {
                reports: vec![proto::Report {
                    key: "Pod/default/web/uid-1".into(),
                    sequence: 9,
                    hash: vec![0x99; 16],
                    encoding: 2,
                    payload: vec![0x28, 0xb5],
                    size: 900,
                    gone: true,
                }],
            }),
        ),
        (
            "report-acks",
            Body::ReportAcks(proto::ReportAcks {
                acks: vec![proto::ReportAck {
                    key: "Pod/default/web/uid-1".into(),
                    sequence: 9,
                    want_full: true,
                }],
            }),
        ),
        ("want-reports", Body::WantReports(proto::WantReports {})),
        (
            "events",
            Body::Events(proto::Events {
                events: vec![proto::Event {
                    sequence: 4,
                    pod: "Pod/default/web/uid-1".into(),
                    field_path: "spec.containers{web}".into(),
                    warning: true,
                    reason: "BackOff".into(),
                    message: "m".into(),
                    count: 2,
                    first_ms: 1,
                    last_ms: 2,
                }],
            }),
        ),
        (
            "events-ack",
            Body::EventsAck(proto::EventsAck { sequence: 4 }),
        ),
        (
            "request-token",
            Body::Request(proto::Request {
                id: 1,
                body: Some(proto::request::Body::Token(proto::TokenAsk {
                    pod: "Pod/default/web/uid-1".into(),
                    service_account: "default".into(),
                    audience: "a".into(),
                    expiration_seconds: 3607,
                })),
            }),
        ),
        (
            "request-renew",
            Body::Request(proto::Request {
                id: 2,
                body: Some(proto::request::Body::Renew(proto::RenewAsk {
                    csr: vec![0x30],
                })),
            }),
        ),
        (
            "response-token",
            Body::Response(proto::Response {
                id: 1,
                body: Some(proto::response::Body::Token(proto::TokenGiven {
                    token: "t".into(),
                    lifetime_seconds: 3607,
                })),
            }),
        ),
        (
            "response-renew",
            Body::Response(proto::Response {
                id: 2,
                body: Some(proto::response::Body::Renew(proto::RenewGiven {
                    chain: vec![vec![0x30]],
                })),
            }),
        ),
        (
            "response-failure",
            Body::Response(proto::Response {
                id: 3,
                body: Some(proto::response::Body::Failure(proto::Failure {
                    message: "no".into(),
                    retry: true,
                })),
            }),
        ),
        (
            "go-away",
            Body::GoAway(proto::GoAway {
                reason: 1,
                message: "drains".into(),
                retry_after_ms: 1500,
            }),
        ),
    ]
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect::<Vec<_>>()
        .join(" ")
}

/// Protobuf, a field a line, nested messages indented.
fn annotate(bytes: &[u8], depth: usize, out: &mut String) -> bool {
    let varint = |at: usize| -> Option<(u64, usize)> {
        let mut value = 0;
        for (i, byte) in bytes.get(at..)?.iter().take(10).enumerate() {
            value |= u64::from(byte & 0x7f) << (7 * i);
            if byte & 0x80 == 0 {
                return Some((value, at + i + 1));
            }
        }
        None
    };
    let mut at = 0;
    while at < bytes.len() {
        let Some((tag, after)) = varint(at) else {
            return false;
        };
        let pad = "  ".repeat(depth);
        match tag & 7 {
            0 => {
                let Some((value, end)) = varint(after) else {
                    return false;
                };
                let _ = writeln!(
                    out,
                    "{pad}{}  # field {} = {value}",
                    hex(&bytes[at..end]),
                    tag >> 3
                );
                at = end;
            }
            2 => {
                let Some((size, start)) = varint(after) else {
                    return false;
                };
                let end = start + size as usize;
                let Some(inner) = bytes.get(start..end) else {
                    return false;
                };
                let head = hex(&bytes[at..start]);
                let mut nested = String::new();
                let text = inner.iter().all(|b| (0x20..0x7f).contains(b)) && !inner.is_empty();
                if text {
                    let shown = String::from_utf8_lossy(inner);
                    let _ = writeln!(
                        out,
                        "{pad}{head}  # field {}, {size} bytes: {shown:?}",
                        tag >> 3
                    );
                    let _ = writeln!(out, "{pad}  {}", hex(inner));
                } else if annotate(inner, depth + 1, &mut nested) {
                    let _ = writeln!(out, "{pad}{head}  # field {}, {size} bytes", tag >> 3);
                    out.push_str(&nested);
                } else {
                    let _ = writeln!(
                        out,
                        "{pad}{head}  # field {}, {size} bytes, opaque",
                        tag >> 3
                    );
                    let _ = writeln!(out, "{pad}  {}", hex(inner));
                }
                at = end;
            }
            _ => return false,
        }
    }
    true
}

fn page(name: &str, wire: &[u8]) -> String {
    let mut text = format!(
        "# {name}\n{}  # length {}\n",
        hex(&wire[..3]),
        wire.len() - 3
    );
    assert!(annotate(&wire[3..], 0, &mut text), "{name} is not protobuf");
    text
}

fn bytes_of(page: &str) -> Vec<u8> {
    let code = page
        .lines()
        .map(|l| l.split('#').next().unwrap_or_default());
    let digits = code.flat_map(str::split_whitespace);
    digits.map(|d| u8::from_str_radix(d, 16).unwrap()).collect()
}

#[test]
fn every_message_has_the_bytes_that_are_kept() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/wire");
    for (name, body) in samples() {
        let message = proto::Message { body: Some(body) };
        let wire = frame::encode(&message);
        let file = dir.join(format!("{name}.hex"));
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&file, page(name, &wire)).unwrap();
        }
        let kept = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(
            hex(&bytes_of(&kept)),
            hex(&wire),
            "{name} has changed on the wire"
        );
        // What was written by this version once is still read.
        let back = proto::Message::decode(&bytes_of(&kept)[3..]).unwrap();
        assert_eq!(back, message, "{name}");
    }
}

#[test]
fn a_field_of_a_later_version_is_passed_over() {
    let ack = proto::EventsAck { sequence: 4 };
    let mut wire = ack.encode_to_vec();
    // Field 200, varint 1.
    wire.extend([0xc0, 0x0c, 0x01]);
    assert_eq!(proto::EventsAck::decode(&wire[..]).unwrap(), ack);
}
