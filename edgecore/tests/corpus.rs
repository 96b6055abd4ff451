//! Every input that fuzzing kept runs in the normal tests, through the same bodies.

use std::path::Path;

use edgecore::stream::fuzz;

#[test]
fn what_fuzzing_kept_and_its_neighbours_still_pass() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    for (target, body) in [
        ("websocket", fuzz::websocket as fn(&[u8])),
        ("spdy", fuzz::spdy),
    ] {
        common::hub::fuzz::replay(&corpus.join(target), body).unwrap();
    }
}
