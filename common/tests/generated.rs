//! The generated protocol code is checked in, so that a build needs no generator; this test makes
//! it again and compares. `UPDATE=1 cargo test -p common --test generated` writes it.

use std::path::Path;

#[test]
fn hub_proto_is_what_is_checked_in() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = tempfile::tempdir().unwrap();
    let files = protox::compile(["hub.proto"], [root.join("proto")]).unwrap();
    prost_build::Config::new()
        .out_dir(out.path())
        // Their Debug is written by hand: it shows no secret and no object's content.
        .skip_debug(
            ["Token", "JoinRequest", "TokenGiven", "Put", "Report"]
                .map(|message| format!(".edge.hub.v1.{message}")),
        )
        .compile_fds(files)
        .unwrap();
    let fresh = std::fs::read_to_string(out.path().join("edge.hub.v1.rs")).unwrap();
    let kept = root.join("src/gen/hub.rs");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&kept, &fresh).unwrap();
    }
    assert!(
        std::fs::read_to_string(&kept).unwrap_or_default() == fresh,
        "src/gen/hub.rs is not what proto/hub.proto generates: run with UPDATE=1"
    );
}
