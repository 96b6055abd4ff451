//! What a Pod on this node is born with: addresses and names that the welcome brought, persisted.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// Wrong at birth means that every sandbox is made again later: these values are the cluster's
/// real ones and are kept for offline boots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Environment {
    pub node_name: String,
    /// The device's own address, Pods' `status.hostIP`.
    pub node_ip: IpAddr,
    /// ClusterIP of the cluster's DNS Service, if there is one.
    pub cluster_dns: Option<IpAddr>,
    /// Usually `cluster.local`.
    pub cluster_domain: String,
    /// ClusterIP and port of `default/kubernetes`.
    pub api_service: Option<(IpAddr, u16)>,
    /// Allocatable, the default of `resourceFieldRef` limits: millicores and bytes.
    pub allocatable_cpu_millis: u64,
    pub allocatable_memory_bytes: u64,
    pub allocatable_ephemeral_bytes: u64,
}
