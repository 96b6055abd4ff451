//! In a network namespace of its own, which ends with the thread.

use std::net::{Ipv4Addr, UdpSocket};

use nix::sched::{CloneFlags, unshare};
use serde_json::Value;

use super::*;

const PLUGINS: [&str; 3] = ["bridge", "host-local", "portmap"];

struct Bench {
    dir: tempfile::TempDir,
    store: Store,
    from_cloud: watch::Sender<Option<NodeEnvironment>>,
    environment: watch::Sender<Option<Environment>>,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("bin")).unwrap();
        for plugin in PLUGINS {
            std::fs::write(dir.path().join("bin").join(plugin), "").unwrap();
        }
        Self {
            dir,
            store: Store::in_memory(),
            from_cloud: watch::Sender::new(None),
            environment: watch::Sender::new(None),
        }
    }

    fn task(&self, bridge: &str) -> Task {
        Task::build(Deps {
            store: self.store.clone(),
            desired: Desired::in_memory(),
            node_name: "edge-1".into(),
            pod_cidr: None,
            cni_config_dir: self.dir.path().join("net.d"),
            cni_bin_dir: Some(self.dir.path().join("bin")),
            bridge: bridge.into(),
            from_cloud: self.from_cloud.subscribe(),
            environment: self.environment.subscribe(),
        })
    }

    fn conf(&self) -> Value {
        let found = std::fs::read(self.dir.path().join("net.d/10-edgecore.conflist"));
        found.map_or(Value::Null, |bytes| serde_json::from_slice(&bytes).unwrap())
    }

    fn cluster(&self, api: &str, domain: &str) {
        self.from_cloud.send_replace(Some(NodeEnvironment {
            api_host: api.into(),
            cluster_dns: "10.231.7.10".into(),
            ..Default::default()
        }));
        self.environment.send_replace(Some(Environment {
            cluster_dns: Some("10.231.7.10".parse().unwrap()),
            cluster_domain: domain.into(),
            api_service: Some((api.parse().unwrap(), 443)),
            ..crate::pods::testing::environment()
        }));
    }
}

fn apart(test: impl Future<Output = ()> + Send + 'static) {
    let thread = std::thread::spawn(move || {
        assert!(
            nix::unistd::geteuid().is_root(),
            "addresses are the kernel's: run this test as root"
        );
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let up = std::process::Command::new("ip")
            .args(["link", "set", "lo", "up"])
            .status();
        assert!(up.unwrap().success());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.unwrap().block_on(test);
    });
    thread.join().unwrap();
}

/// Whether the forwarder says that this name has this address.
async fn resolves(name: &str, address: Ipv4Addr) -> bool {
    let mut query = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        query.push(u8::try_from(label.len()).unwrap());
        query.extend(label.bytes());
    }
    query.extend([0, 0, 1, 0, 1]);
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.send_to(&query, "10.231.7.10:53").await.unwrap();
    let mut answer = [0; 512];
    let limit = Duration::from_secs(5);
    let size = tokio::time::timeout(limit, socket.recv(&mut answer)).await;
    let size = size.expect("no answer").unwrap();
    answer[..size].ends_with(&address.octets())
}

#[test]
fn the_range_waits_for_the_cloud_once_and_is_kept() {
    apart(async {
        let bench = Bench::new();
        bench.task("edge5").pod_network().await;
        assert_eq!(bench.conf(), Value::Null, "nothing is known of the cluster");
        bench.cluster("10.231.7.1", "cluster.local");
        bench.task("edge5").pod_network().await;
        let conf = bench.conf();
        assert_eq!(conf["plugins"][0]["bridge"], "edge5");
        // The first default is one of the cluster's.
        let subnet = &conf["plugins"][0]["ipam"]["ranges"][0][0]["subnet"];
        assert_eq!(subnet, "172.27.231.0/24");
        bench.from_cloud.send_replace(None);
        std::fs::remove_dir_all(bench.dir.path().join("net.d")).unwrap();
        bench.task("edge5").pod_network().await;
        assert_eq!(bench.conf(), conf, "an offline start needs no cloud");
    });
}

#[test]
fn two_agents_do_not_write_one_anothers_configuration() {
    apart(async {
        let bench = Bench::new();
        bench.cluster("10.96.0.1", "cluster.local");
        bench.task("edge0").pod_network().await;
        let conf = bench.conf();
        let mut second = bench.task("edge1");
        second.pod_network().await;
        assert_eq!(bench.conf(), conf);
        let told = &second.told.network;
        assert!(
            told.contains("edge0") && told.contains("cniConfigDir"),
            "{told}"
        );
    });
}

#[test]
fn the_clusters_addresses_are_held_and_its_names_answered() {
    apart(async {
        let bench = Bench::new();
        let mut task = bench.task("edge0");
        let stop = CancellationToken::new();
        task.cluster_addresses(&stop).await;
        assert!(UdpSocket::bind(("10.231.7.10", 0)).is_err());
        bench.cluster("10.231.7.1", "cluster.local");
        for _ in 0..2 {
            task.cluster_addresses(&stop).await;
            let api = Ipv4Addr::new(10, 231, 7, 1);
            assert!(resolves("kubernetes.default.svc.cluster.local", api).await);
        }
        // Another cluster: what was held goes, and names are the new one's.
        bench.cluster("10.231.7.2", "other.local");
        task.cluster_addresses(&stop).await;
        assert!(
            UdpSocket::bind(("10.231.7.1", 0)).is_err(),
            "it is still held"
        );
        let api = Ipv4Addr::new(10, 231, 7, 2);
        assert!(resolves("kubernetes.default.svc.other.local", api).await);
        // A later start knows what an earlier one held.
        bench.cluster("10.231.7.3", "other.local");
        if let Some((_, dns)) = task.dns.take() {
            dns.abort();
        }
        bench.task("edge0").cluster_addresses(&stop).await;
        assert!(
            UdpSocket::bind(("10.231.7.2", 0)).is_err(),
            "it is still held"
        );
    });
}

#[test]
fn a_taken_port_is_told_once_and_waited_for() {
    apart(async {
        let bench = Bench::new();
        bench.cluster("10.231.7.1", "cluster.local");
        let (mut first, mut second) = (bench.task("edge0"), bench.task("edge1"));
        let stop = CancellationToken::new();
        first.cluster_addresses(&stop).await;
        second.cluster_addresses(&stop).await;
        assert!(second.dns.is_none() && !second.told.dns.is_empty());
        let (_, serving) = first.dns.take().unwrap();
        serving.abort();
        let _ = serving.await;
        second.cluster_addresses(&stop).await;
        assert!(second.dns.is_some() && second.told.dns.is_empty());
    });
}
