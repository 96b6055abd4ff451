//! The real metrics-server beside the control plane, under the rights of its own manifest: what
//! `kubectl top` asks.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use anyhow::Result;
use serde_json::{Value, json};

use crate::bed::{Bed, Proc};
use crate::cluster::Cluster;
use crate::programs::{self, METRICS_SERVER};

const NAME: &str = "metrics-server";
const NAMESPACE: &str = "kube-system";

/// A running metrics-server that the API server asks for `metrics.k8s.io`.
pub struct MetricsServer {
    process: Proc,
}

impl MetricsServer {
    /// Registers and starts it. Its first figures come two scrapes later.
    pub fn start(bed: &Arc<Bed>, cluster: &Cluster) -> Result<MetricsServer> {
        let program = programs::ensure(NAME, METRICS_SERVER)?;
        // Endpoints of loopback are refused.
        let probe = TcpListener::bind((bed.host_address(), 0))?;
        let address = probe.local_addr()?;
        drop(probe);
        cluster.kubectl.apply(&manifest(address).to_string())?;
        let words = ["create", "token", NAME, "-n", NAMESPACE, "--duration=2h"];
        let token = cluster.kubectl.ok(&words)?;
        let dir = bed.dir.join(NAME);
        fs::create_dir_all(&dir)?;
        let kubeconfig = dir.join("kubeconfig");
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{
                "name": "testbed",
                "cluster": {
                    "server": cluster.server(),
                    "certificate-authority": cluster.ca_file(),
                },
            }],
            "users": [{"name": NAME, "user": {"token": token.trim()}}],
            "contexts": [{"name": "testbed", "context": {"cluster": "testbed", "user": NAME}}],
            "current-context": "testbed",
        });
        fs::write(&kubeconfig, serde_json::to_vec_pretty(&config)?)?;
        let kubeconfig = kubeconfig.display();
        let mut command = bed.command(program);
        command.args([
            format!("--kubeconfig={kubeconfig}"),
            format!("--authentication-kubeconfig={kubeconfig}"),
            format!("--authorization-kubeconfig={kubeconfig}"),
            format!("--bind-address={}", address.ip()),
            format!("--secure-port={}", address.port()),
            format!("--cert-dir={}", dir.display()),
            // As in the manifest of its project.
            "--kubelet-use-node-status-port".to_owned(),
            "--kubelet-preferred-address-types=InternalIP,ExternalIP,Hostname".to_owned(),
            "--kubelet-insecure-tls".to_owned(),
            // The shortest that it takes, and a request must be shorter.
            "--metric-resolution=10s".to_owned(),
            "--kubelet-request-timeout=5s".to_owned(),
        ]);
        let process = bed.spawn(NAME, &mut command)?;
        Ok(MetricsServer { process })
    }

    pub fn ensure_running(&mut self) -> Result<()> {
        self.process.ensure_running()
    }

    /// Its log, for a failed test.
    pub fn tail(&self, lines: usize) -> String {
        self.process.tail(lines)
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        self.process.kill();
    }
}

fn manifest(address: SocketAddr) -> Value {
    let meta = json!({"name": NAME, "namespace": NAMESPACE});
    let subject = json!([{"kind": "ServiceAccount", "name": NAME, "namespace": NAMESPACE}]);
    let binding = |name: &str, role: &str| {
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
            "subjects": subject,
        })
    };
    let items = json!([
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": "system:metrics-server"},
            "rules": [
                {"apiGroups": [""], "resources": ["nodes/metrics"], "verbs": ["get"]},
                {"apiGroups": [""], "resources": ["pods", "nodes"], "verbs": ["get", "list", "watch"]},
            ],
        },
        binding("system:metrics-server", "system:metrics-server"),
        binding("metrics-server:auth-delegator", "system:auth-delegator"),
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": {"name": "metrics-server-auth-reader", "namespace": NAMESPACE},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "Role",
                "name": "extension-apiserver-authentication-reader",
            },
            "subjects": subject,
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": meta,
            "spec": {"ports": [{"name": "https", "port": 443, "targetPort": address.port()}]},
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": NAME,
                "namespace": NAMESPACE,
                "labels": {"kubernetes.io/service-name": NAME},
            },
            "addressType": "IPv4",
            "ports": [{"name": "https", "port": address.port()}],
            "endpoints": [{"addresses": [address.ip()], "conditions": {"ready": true}}],
        },
        {
            "apiVersion": "apiregistration.k8s.io/v1",
            "kind": "APIService",
            "metadata": {"name": "v1beta1.metrics.k8s.io"},
            "spec": {
                "group": "metrics.k8s.io",
                "version": "v1beta1",
                "groupPriorityMinimum": 100,
                "versionPriority": 100,
                "insecureSkipTLSVerify": true,
                "service": {"name": NAME, "namespace": NAMESPACE},
            },
        },
    ]);
    json!({"apiVersion": "v1", "kind": "List", "items": items})
}
