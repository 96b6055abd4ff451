//! Every input that fuzzing kept runs in the normal tests, through the same bodies.
//!
//! `UPDATE=1` writes the seeds: each frame of `tests/wire` alone, and as a step of a session.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "../fuzz/src/bodies.rs"]
mod bodies;

use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).into()
}

/// The frames of `tests/wire`, without their length.
fn messages() -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(root().join("tests/wire")).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let code = text
            .lines()
            .map(|l| l.split('#').next().unwrap_or_default());
        let bytes: Vec<u8> = code
            .flat_map(str::split_whitespace)
            .map(|d| u8::from_str_radix(d, 16).unwrap())
            .collect();
        all.push((
            path.file_stem().unwrap().to_string_lossy().into_owned(),
            bytes,
        ));
    }
    all.sort();
    all
}

fn seed() {
    let corpus = root().join("fuzz/corpus");
    let write = |target: &str, name: &str, bytes: &[u8]| {
        std::fs::write(corpus.join(target).join(name), bytes).unwrap();
    };
    let mut to_edge = Vec::new();
    let mut to_cloud = Vec::new();
    for (name, frame) in messages() {
        let message = &frame[3..];
        write("frame", &name, &[&[7], &frame[..]].concat());
        write("message", &name, message);
        let Ok(size) = u8::try_from(message.len()) else {
            continue;
        };
        let from_cloud = [
            "welcome", "batch", "go-away", "want", "acks", "ack", "response",
        ]
        .iter()
        .any(|w| name.contains(w) && !["welcome-ack", "batch-ack"].contains(&name.as_str()));
        let (op, script) = if from_cloud {
            (0, &mut to_edge)
        } else {
            (2, &mut to_cloud)
        };
        let step = [&[op, size], message].concat();
        write("session_ops", &name, &step);
        // A Welcome must come first at the edge, a Hello at the cloud.
        if ["welcome", "hello"].contains(&name.as_str()) {
            script.splice(0..0, step);
        } else {
            script.extend(step);
        }
    }
    write("session_ops", "to-edge", &to_edge);
    write("session_ops", "to-cloud", &to_cloud);
}

fn replay(target: &str, body: fn(&[u8])) {
    let dir = root().join("fuzz/corpus").join(target);
    let mut count = 0;
    for entry in std::fs::read_dir(&dir).unwrap() {
        body(&std::fs::read(entry.unwrap().path()).unwrap());
        count += 1;
    }
    assert!(
        count >= 5,
        "{target}: only {count} inputs; run with UPDATE=1"
    );
}

#[test]
fn what_fuzzing_kept_still_passes() {
    if std::env::var_os("UPDATE").is_some() {
        seed();
    }
    replay("frame", bodies::frame);
    replay("message", bodies::message);
    replay("session_ops", bodies::session_ops);
    replay("mux", common::hub::fuzz::mux);
    replay("token", common::hub::fuzz::token);
    replay("join_request", common::hub::fuzz::join_request);
    replay("request", common::hub::fuzz::request);
    replay("stream_head", common::hub::fuzz::stream_head);
}

/// Without a fuzzer at hand: each kept input with each byte changed a little.
#[test]
fn neighbours_of_what_fuzzing_kept_do_not_panic() {
    for (target, body) in [
        ("frame", bodies::frame as fn(&[u8])),
        ("message", bodies::message),
        ("session_ops", bodies::session_ops),
        ("mux", common::hub::fuzz::mux),
        ("token", common::hub::fuzz::token),
        ("join_request", common::hub::fuzz::join_request),
        ("request", common::hub::fuzz::request),
        ("stream_head", common::hub::fuzz::stream_head),
    ] {
        for entry in std::fs::read_dir(root().join("fuzz/corpus").join(target)).unwrap() {
            let bytes = std::fs::read(entry.unwrap().path()).unwrap();
            for at in 0..bytes.len() {
                for change in [1, 0x80, 0xff] {
                    let mut changed = bytes.clone();
                    changed[at] ^= change;
                    body(&changed);
                }
                body(&bytes[..at]);
            }
        }
    }
}
