//! A real Kubernetes control plane and real edge machines on one computer, for the whole-system
//! tests and for the quickstart. Nothing here ships.
//!
//! ```text
//!  host                                  │ backbone         │ router k (NAT)     │ node k
//!  etcd  kube-apiserver  …  127.77.N.1   │                  │                    │
//!  cloudcore  198.18.N.1 ── etbN ────────┼── br0 ── r<k> ───┼── wan        lan ──┼── eth0 192.168.77.2
//!                                        │  (a bridge)      │ 198.18.N.(10+k)    │ containerd, edgecore
//! ```
//!
//! Each testbed owns a number N: its loopback address, its host link, its cgroups and its subnet
//! are derived from it, so several testbeds run side by side and a killed one can be swept away
//! without a record of its own. See `bed.rs` for who cleans up what.
//!
//! Needs root. Blocking code throughout: tests are threads, and a test reads best from the top.

pub mod bed;
pub mod bench;
pub mod cloud;
pub mod cluster;
pub mod containerd;
pub mod e2e;
pub mod edge;
pub mod forward;
pub mod holder;
pub mod images;
pub mod kubectl;
pub mod kubelet;
pub mod metrics;
pub mod netns;
pub mod peer;
pub mod pki;
pub mod programs;
pub mod quickstart;
pub mod relay;
pub mod running;
pub mod wait;
pub mod world;
