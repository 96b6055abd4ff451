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

type Body = fn(&[u8]);

const TARGETS: [(&str, Body); 8] = [
    ("frame", bodies::frame),
    ("message", bodies::message),
    ("session_ops", bodies::session_ops),
    ("mux", common::hub::fuzz::mux),
    ("token", common::hub::fuzz::token),
    ("join_request", common::hub::fuzz::join_request),
    ("request", common::hub::fuzz::request),
    ("stream_head", common::hub::fuzz::stream_head),
];

#[test]
fn what_fuzzing_kept_and_its_neighbours_still_pass() {
    if std::env::var_os("UPDATE").is_some() {
        seed();
    }
    for (target, body) in TARGETS {
        common::hub::fuzz::replay(&root().join("fuzz/corpus").join(target), body).unwrap();
    }
}
