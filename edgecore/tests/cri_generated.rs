//! The Rust for `proto/cri.proto` is checked in, so that a build needs no generator; this holds the
//! two together. `UPDATE_GENERATED=1 cargo test -p edgecore --test cri_generated` writes it anew.

use std::path::Path;

#[test]
fn the_checked_in_cri_code_is_what_the_proto_gives() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let descriptors = protox::compile([root.join("proto/cri.proto")], [root.join("proto")])
        .expect("cri.proto compiles");
    let out = tempfile::tempdir().unwrap();
    tonic_prost_build::configure()
        .build_server(false)
        .build_transport(false)
        // Environment values and registry credentials stay out of anything that is printed.
        .skip_debug([".runtime.v1.KeyValue", ".runtime.v1.AuthConfig"])
        .out_dir(out.path())
        .compile_fds(descriptors)
        .expect("Rust is generated");
    let fresh = std::fs::read_to_string(out.path().join("runtime.v1.rs")).unwrap();
    let target = root.join("src/gen/cri.rs");
    if std::env::var_os("UPDATE_GENERATED").is_some() {
        std::fs::write(&target, &fresh).unwrap();
    }
    let committed = std::fs::read_to_string(&target).unwrap_or_default();
    assert!(
        committed == fresh,
        "src/gen/cri.rs is stale: run UPDATE_GENERATED=1 cargo test -p edgecore --test cri_generated"
    );
}
