//! etcd, kube-apiserver, kube-controller-manager and kube-scheduler: unmodified, as processes on
//! the testbed's loopback address, with certificates of one run.
//!
//! Only cloudcore and kubectl talk to the API server; no edge can reach it.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::bed::{Bed, Proc};
use crate::kubectl::Kubectl;
use crate::pki::{Authority, Pair, signing_key};
use crate::programs::{self, ETCD, Release};
use crate::wait::wait_for;

/// Ranges that the cluster hands out. No edge's own network overlaps them.
const SERVICES: &str = "10.96.0.0/16";
const FIRST_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
const PODS: &str = "10.244.0.0/16";

/// What differs between one control plane and another.
#[derive(Debug, Clone)]
pub struct Options {
    pub release: Release,
    /// `--kubelet-preferred-address-types`; absent means the server's own default.
    pub address_types: Option<String>,
    /// `--kubelet-certificate-authority`: the cluster's CA, with which the controller manager signs
    /// for `kubernetes.io/kubelet-serving`.
    pub verify_kubelets: bool,
    /// Further flags of kube-apiserver.
    pub api_flags: Vec<String>,
    /// Further flags of kube-controller-manager.
    pub manager_flags: Vec<String>,
    /// Where the API server listens, instead of the testbed's loopback address.
    pub bind: Option<Ipv4Addr>,
}

impl Options {
    pub fn new(release: Release) -> Options {
        Options {
            release,
            address_types: None,
            verify_kubelets: false,
            api_flags: Vec::new(),
            manager_flags: Vec::new(),
            bind: None,
        }
    }

    /// A cluster without patience: the API server gives Pods five seconds on a node that is not
    /// ready, and a node 24 s without a Lease renewal. What survives here is not evicted anywhere.
    pub fn impatient(release: Release) -> Options {
        let mut options = Options::new(release);
        options.api_flags = vec![
            "--default-not-ready-toleration-seconds=5".to_owned(),
            "--default-unreachable-toleration-seconds=5".to_owned(),
        ];
        options.manager_flags = vec!["--node-monitor-grace-period=24s".to_owned()];
        options
    }
}

/// A running control plane.
pub struct Cluster {
    bed: Arc<Bed>,
    options: Options,
    address: Ipv4Addr,
    port: u16,
    etcd_port: u16,
    dir: PathBuf,
    files: Files,
    /// Of a member of system:masters.
    pub kubeconfig: PathBuf,
    pub kubectl: Kubectl,
    etcd: Option<Proc>,
    api: Option<Proc>,
    controllers: Option<Proc>,
    scheduler: Option<Proc>,
}

/// The certificates and kubeconfigs of one run.
struct Files {
    ca: Authority,
    front_ca: Authority,
    serving: Pair,
    etcd: Pair,
    kubelet_client: Pair,
    front_client: Pair,
    accounts: Pair,
}

impl Cluster {
    /// Starts all four and waits until the default ServiceAccount exists.
    pub fn start(bed: &Arc<Bed>, options: Options) -> Result<Cluster> {
        let kubectl = programs::ensure("kubectl", options.release)?;
        let dir = bed.dir.join("cluster");
        fs::create_dir_all(&dir)?;
        let address = options.bind.unwrap_or_else(|| bed.loopback());
        let port = bed.free_port()?;
        let files = Files::build(&dir, address, bed.loopback())?;
        let server = format!("https://{address}:{port}");
        let admin = ("kubernetes-admin", &["system:masters"][..]);
        let kubeconfig = files.kubeconfig(&dir, "admin", admin, &server)?;
        let mut cluster = Cluster {
            bed: bed.clone(),
            etcd_port: bed.free_port()?,
            address,
            port,
            dir,
            files,
            kubectl: Kubectl::new(&kubectl, &kubeconfig),
            kubeconfig,
            options,
            etcd: None,
            api: None,
            controllers: None,
            scheduler: None,
        };
        cluster.start_etcd()?;
        cluster.start_api()?;
        cluster.start_controllers(&server)?;
        wait_for("default ServiceAccount", Duration::from_secs(90), || {
            cluster.ensure_running()?;
            cluster
                .kubectl
                .ok(&["get", "serviceaccount", "default", "--namespace", "default"])
        })?;
        Ok(cluster)
    }

    /// The URL of the API server.
    pub fn server(&self) -> String {
        format!("https://{}:{}", self.address, self.port)
    }

    /// Where the API server listens.
    pub fn api_address(&self) -> SocketAddr {
        SocketAddr::from((self.address, self.port))
    }

    /// The cluster's CA certificate file.
    pub fn ca_file(&self) -> &Path {
        &self.files.ca.cert
    }

    /// The certificate that the API server shows to kubelets.
    pub fn kubelet_client(&self) -> &Pair {
        &self.files.kubelet_client
    }

    /// A client certificate of another user, of the cluster's CA.
    pub fn certificate(&self, name: &str, groups: &[&str]) -> Result<Pair> {
        let file = format!("client-{}", name.replace([':', '/'], "-"));
        self.files.ca.issue(&file, (name, groups), &[], &[])
    }

    /// A client certificate of the same name as the API server's, of a CA that nobody here trusts.
    pub fn forged_certificate(&self) -> Result<Pair> {
        let forger = Authority::build(&self.dir, "forger")?;
        let subject = ("kube-apiserver-kubelet-client", &["system:masters"][..]);
        forger.issue("forged-client", subject, &[], &[])
    }

    /// A kubeconfig of another user, with a certificate of the cluster's CA.
    pub fn user(&self, name: &str, groups: &[&str]) -> Result<PathBuf> {
        let file = name.replace([':', '/'], "-");
        self.files
            .kubeconfig(&self.dir, &file, (name, groups), &self.server())
    }

    /// Ends the API server at once; everything it was told is in etcd.
    pub fn kill_api(&mut self) {
        if let Some(mut api) = self.api.take() {
            api.kill();
        }
    }

    /// Starts the API server and waits until it is ready.
    pub fn start_api(&mut self) -> Result<()> {
        let program = programs::ensure("kube-apiserver", self.options.release)?;
        let mut command = self.bed.command(program);
        command.args(self.api_flags());
        self.api = Some(self.bed.spawn("kube-apiserver", &mut command)?);
        wait_for("kube-apiserver", Duration::from_secs(90), || {
            self.ensure_running()?;
            self.kubectl
                .ok(&["get", "--raw", "/readyz", "--request-timeout=5s"])
        })?;
        Ok(())
    }

    /// Fails with the log of the first part that has ended.
    pub fn ensure_running(&mut self) -> Result<()> {
        let parts = [
            &mut self.etcd,
            &mut self.api,
            &mut self.controllers,
            &mut self.scheduler,
        ];
        for part in parts.into_iter().flatten() {
            part.ensure_running()?;
        }
        Ok(())
    }

    fn start_etcd(&mut self) -> Result<()> {
        let program = programs::ensure("etcd", ETCD)?;
        let url = format!("https://{}:{}", self.bed.loopback(), self.etcd_port);
        let peer = format!("https://{}:{}", self.bed.loopback(), self.bed.free_port()?);
        let (ca, pair) = (self.files.ca.cert.display(), &self.files.etcd);
        let (cert, key) = (pair.cert.display(), pair.key.display());
        let mut command = self.bed.command(program);
        command.args([
            "--name=testbed".to_owned(),
            format!("--data-dir={}", self.dir.join("etcd").display()),
            format!("--listen-client-urls={url}"),
            format!("--advertise-client-urls={url}"),
            format!("--listen-peer-urls={peer}"),
            format!("--initial-advertise-peer-urls={peer}"),
            format!("--initial-cluster=testbed={peer}"),
            "--client-cert-auth".to_owned(),
            format!("--trusted-ca-file={ca}"),
            format!("--cert-file={cert}"),
            format!("--key-file={key}"),
            "--peer-client-cert-auth".to_owned(),
            format!("--peer-trusted-ca-file={ca}"),
            format!("--peer-cert-file={cert}"),
            format!("--peer-key-file={key}"),
            // What a test loses with its machine it does not miss.
            "--unsafe-no-fsync".to_owned(),
            "--log-level=warn".to_owned(),
        ]);
        self.etcd = Some(self.bed.spawn("etcd", &mut command)?);
        let etcd = (self.bed.loopback(), self.etcd_port);
        wait_for("etcd", Duration::from_secs(30), || {
            self.ensure_running()?;
            Ok(std::net::TcpStream::connect(etcd)?)
        })?;
        Ok(())
    }

    fn api_flags(&self) -> Vec<String> {
        let files = &self.files;
        let mut flags = vec![
            format!(
                "--etcd-servers=https://{}:{}",
                self.bed.loopback(),
                self.etcd_port
            ),
            format!("--etcd-cafile={}", files.ca.cert.display()),
            format!("--etcd-certfile={}", files.etcd.cert.display()),
            format!("--etcd-keyfile={}", files.etcd.key.display()),
            format!("--bind-address={}", self.address),
            format!("--secure-port={}", self.port),
            // Endpoints of loopback are refused; nobody in a test dials this one.
            format!("--advertise-address={}", self.bed.host_address()),
            format!("--tls-cert-file={}", files.serving.cert.display()),
            format!("--tls-private-key-file={}", files.serving.key.display()),
            format!("--client-ca-file={}", files.ca.cert.display()),
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local".to_owned(),
            format!(
                "--service-account-key-file={}",
                files.accounts.cert.display()
            ),
            format!(
                "--service-account-signing-key-file={}",
                files.accounts.key.display()
            ),
            format!("--service-cluster-ip-range={SERVICES}"),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--enable-admission-plugins=NodeRestriction".to_owned(),
            "--enable-bootstrap-token-auth".to_owned(),
            "--allow-privileged=true".to_owned(),
            format!(
                "--kubelet-client-certificate={}",
                files.kubelet_client.cert.display()
            ),
            format!(
                "--kubelet-client-key={}",
                files.kubelet_client.key.display()
            ),
            format!(
                "--requestheader-client-ca-file={}",
                files.front_ca.cert.display()
            ),
            "--requestheader-allowed-names=front-proxy-client".to_owned(),
            "--requestheader-extra-headers-prefix=X-Remote-Extra-".to_owned(),
            "--requestheader-group-headers=X-Remote-Group".to_owned(),
            "--requestheader-username-headers=X-Remote-User".to_owned(),
            format!(
                "--proxy-client-cert-file={}",
                files.front_client.cert.display()
            ),
            format!(
                "--proxy-client-key-file={}",
                files.front_client.key.display()
            ),
            "--enable-aggregator-routing=true".to_owned(),
            "--profiling=false".to_owned(),
        ];
        if let Some(types) = &self.options.address_types {
            flags.push(format!("--kubelet-preferred-address-types={types}"));
        }
        if self.options.verify_kubelets {
            let ca = files.ca.cert.display();
            flags.push(format!("--kubelet-certificate-authority={ca}"));
        }
        flags.extend(self.options.api_flags.iter().cloned());
        flags
    }

    fn start_controllers(&mut self, server: &str) -> Result<()> {
        let release = self.options.release;
        let files = &self.files;
        let config = |name: &str| {
            files.kubeconfig(&self.dir, name, (&format!("system:{name}"), &[]), server)
        };
        let manager = config("kube-controller-manager")?;
        let scheduler = config("kube-scheduler")?;
        let (address, port) = (self.bed.loopback(), self.bed.free_port()?);
        let mut command = self
            .bed
            .command(programs::ensure("kube-controller-manager", release)?);
        command.args([
            format!("--kubeconfig={}", manager.display()),
            format!("--bind-address={address}"),
            format!("--secure-port={port}"),
            format!("--cert-dir={}", self.dir.join("manager").display()),
            format!("--cluster-signing-cert-file={}", files.ca.cert.display()),
            format!("--cluster-signing-key-file={}", files.ca.key.display()),
            format!("--root-ca-file={}", files.ca.cert.display()),
            format!(
                "--service-account-private-key-file={}",
                files.accounts.key.display()
            ),
            "--use-service-account-credentials=true".to_owned(),
            "--allocate-node-cidrs=true".to_owned(),
            format!("--cluster-cidr={PODS}"),
            format!("--service-cluster-ip-range={SERVICES}"),
            "--controllers=*,bootstrapsigner,tokencleaner".to_owned(),
            "--leader-elect=false".to_owned(),
        ]);
        command.args(&self.options.manager_flags);
        self.controllers = Some(self.bed.spawn("kube-controller-manager", &mut command)?);
        let mut command = self
            .bed
            .command(programs::ensure("kube-scheduler", release)?);
        command.args([
            format!("--kubeconfig={}", scheduler.display()),
            format!("--bind-address={address}"),
            format!("--secure-port={}", self.bed.free_port()?),
            format!("--cert-dir={}", self.dir.join("scheduler").display()),
            "--leader-elect=false".to_owned(),
        ]);
        self.scheduler = Some(self.bed.spawn("kube-scheduler", &mut command)?);
        Ok(())
    }
}

impl Files {
    fn build(dir: &Path, address: Ipv4Addr, loopback: Ipv4Addr) -> Result<Files> {
        let ca = Authority::build(dir, "ca")?;
        let front_ca = Authority::build(dir, "front-proxy-ca")?;
        let hosts = [
            "localhost",
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
        ];
        let ips = [
            IpAddr::from(address),
            FIRST_SERVICE.into(),
            Ipv4Addr::LOCALHOST.into(),
        ];
        let masters = &["system:masters"][..];
        Ok(Files {
            serving: ca.issue("kube-apiserver", ("kube-apiserver", &[]), &hosts, &ips)?,
            etcd: ca.issue("etcd", ("etcd", &[]), &["localhost"], &[loopback.into()])?,
            kubelet_client: ca.issue(
                "kubelet-client",
                ("kube-apiserver-kubelet-client", masters),
                &[],
                &[],
            )?,
            front_client: front_ca.issue(
                "front-proxy-client",
                ("front-proxy-client", &[]),
                &[],
                &[],
            )?,
            accounts: signing_key(dir, "service-accounts")?,
            ca,
            front_ca,
        })
    }

    fn kubeconfig(
        &self,
        dir: &Path,
        file: &str,
        subject: (&str, &[&str]),
        server: &str,
    ) -> Result<PathBuf> {
        let pair = self.ca.issue(&format!("user-{file}"), subject, &[], &[])?;
        let path = dir.join(format!("{file}.kubeconfig"));
        let config = serde_json::json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{
                "name": "testbed",
                "cluster": {"server": server, "certificate-authority": self.ca.cert},
            }],
            "users": [{
                "name": subject.0,
                "user": {"client-certificate": pair.cert, "client-key": pair.key},
            }],
            "contexts": [{
                "name": "testbed",
                "context": {"cluster": "testbed", "user": subject.0},
            }],
            "current-context": "testbed",
        });
        fs::write(&path, serde_json::to_vec_pretty(&config)?)
            .with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }
}
