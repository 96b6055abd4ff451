//! Replays the fuzzers' corpora in every normal test run.

use std::path::Path;

fn replay(target: &str, run: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target);
    let mut count = 0;
    for entry in std::fs::read_dir(&folder).expect("the corpus is checked in") {
        let path = entry.expect("an entry").path();
        let input = std::fs::read(&path).expect("readable");
        let result = std::panic::catch_unwind(|| {
            run(&input);
            // And everything near a small one: each cut, and each byte changed.
            let near = if input.len() <= 2048 { input.len() } else { 0 };
            for end in 0..near {
                run(&input[..end]);
                let mut changed = input.clone();
                changed[end] ^= 0x55;
                run(&changed);
            }
        });
        assert!(result.is_ok(), "{target}: {}", path.display());
        count += 1;
    }
    assert!(count >= 3, "{target}: only {count} inputs");
}

#[test]
fn frames() {
    replay("frame", common::hub::fuzz::frame);
}

#[test]
fn tokens() {
    replay("token", common::hub::fuzz::token);
}

#[test]
fn join_requests() {
    replay("join_request", common::hub::fuzz::join_request);
}
