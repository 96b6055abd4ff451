#!/bin/sh
# From a fresh Debian 12 machine to a Pod that runs on an edge node behind NAT:
#
#   ./deploy/quickstart.sh          make it, or show it when it is there
#   ./deploy/quickstart.sh --down   remove everything that it made
#
# With KUBECONFIG set it uses that cluster, else it builds and starts a control plane of its own.
# Run it as root. Packages that it installs stay installed; nothing else outlives --down but the
# caches of cargo, go and the built programs (${XDG_CACHE_HOME:-~/.cache}/edge-testbed).
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
state=${EDGE_QUICKSTART_STATE:-/var/lib/edge-quickstart}
bin=${CARGO_TARGET_DIR:-$root/target}/debug

say() { printf '==> %s\n' "$*" >&2; }
fail() { printf 'quickstart: %s\n' "$*" >&2; exit 1; }

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; }

case "${1:-}" in
    '' | --down) ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; fail "unknown argument: $1" ;;
esac

[ "$(id -u)" = 0 ] || fail "this makes network namespaces and mounts: run it as root"

if [ "${1:-}" = --down ]; then
    [ -x "$bin/testbed" ] || fail "$bin/testbed is not there: was it ever up from this directory?"
    "$bin/testbed" down --state "$state"
    say "removed"
    exit 0
fi

# What the distribution provides: the runtime, its plugins, the tools of the test network.
install_packages() {
    missing=
    while read -r file package; do
        [ -n "$file" ] || continue
        # A program may lie in any directory of programs; every other file is where it says:
        # /usr/sbin/bridge is iproute2's, no plugin.
        case "$file" in
            */bin/* | */sbin/*) command -v "${file##*/}" >/dev/null || missing="$missing $package" ;;
            *) [ -e "$file" ] || missing="$missing $package" ;;
        esac
    done <<'LIST'
/usr/bin/containerd containerd
/usr/bin/runc runc
/usr/lib/cni/bridge containernetworking-plugins
/usr/bin/ip iproute2
/usr/sbin/iptables iptables
/bin/busybox busybox-static
/usr/bin/nsenter util-linux
/usr/bin/cc gcc
/usr/include/stdlib.h libc6-dev
/etc/ssl/certs/ca-certificates.crt ca-certificates
LIST
    [ -n "$missing" ] || return 0
    command -v apt-get >/dev/null || fail "please install:$missing"
    say "installing$missing"
    # The tests and the quickstart start containerd themselves, in namespaces of their own.
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    # shellcheck disable=SC2086
    apt-get install -y -qq --no-install-recommends $missing >/dev/null
}

install_packages

for dir in "$HOME/.cargo/bin" /usr/local/go/bin; do
    if [ -d "$dir" ]; then PATH=$PATH:$dir; fi
done
export PATH
command -v cargo >/dev/null ||
    fail "there is no cargo: install Rust 1.95 or newer (rustup is the usual way) and run this again"
# Looked for before the build, not after it. A cluster of KUBECONFIG and programs in KUBEBUILDER_ASSETS
# need no Go.
[ -n "${KUBECONFIG:-}${KUBEBUILDER_ASSETS:-}" ] || command -v go >/dev/null ||
    fail "there is no go, to build a control plane: install Go 1.26 or newer, or name a cluster by KUBECONFIG"

say "building cloudcore, edgecore and testbed (some minutes the first time)"
(cd "$root" && cargo build --workspace --bins)

"$bin/testbed" up --state "$state"
printf 'Stop and remove everything:\n  %s --down\n' "$0"
