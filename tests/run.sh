#!/bin/sh
# All checks and all tests: format, lints, documentation, then every test of the workspace, the
# whole-system ones on a real control plane included. Stops at the first failure. Needs root.
#
#   ./tests/run.sh [words for cargo test, such as a test's name]
set -eu

cd "$(dirname "$0")/.."
for dir in "$HOME/.cargo/bin" /usr/local/go/bin; do
    if [ -d "$dir" ]; then PATH=$PATH:$dir; fi
done
export PATH

step() { printf '==> %s\n' "$*" >&2; }

[ "$(id -u)" = 0 ] || {
    echo "tests/run.sh: the whole-system tests make namespaces and mounts: run it as root" >&2
    exit 1
}

step "format"
cargo fmt --all --check
step "lints"
cargo clippy --workspace --all-targets --quiet -- -D warnings
step "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --quiet
step "programs"
cargo build --workspace --bins
step "control planes (built once, then kept)"
target=${CARGO_TARGET_DIR:-target}
"$target/debug/testbed" build --k8s 1.37 --streams
"$target/debug/testbed" build --k8s 1.33
step "examples in the documentation"
cargo test --workspace --doc --quiet
# The whole-system tests come last, so that their summary ends the run.
step "tests"
cargo test --workspace --all-targets "$@"
