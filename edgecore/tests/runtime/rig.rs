//! A private containerd with one image, and a Pod manager on it. Needs root, containerd, runc,
//! the CNI plugins and a static busybox, as Debian packages them; takes all away again.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::ids::{Kind, ObjectKey};
use common::object::Object;
use edgecore::cri::Runtime;
use edgecore::cri::client::Client;
use edgecore::node::environment::Environment;
use edgecore::pods::cgroups::{Cgroups, Qos};
use edgecore::pods::jobs::Paths;
use edgecore::pods::ledger::InMemory;
use edgecore::pods::manager::{Config, Deps, Handle, PodManager};
use edgecore::pods::rotate;
use edgecore::pods::tokens::{Token, TokenFuture, TokenRequest, TokenSource};
use edgecore::pods::volumes::{Volumes, VolumesConfig};
use edgecore::store::desired::{Batch, Desired};
use edgecore::store::events::Events;
use edgecore::store::reports::{PodReport, Reports};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub(crate) const IMAGE: &str = "docker.io/local/busybox:1";

/// A daemon of the test's own, killed with it.
pub(crate) struct Containerd {
    pub(crate) dir: PathBuf,
    process: Child,
    _tmp: tempfile::TempDir,
}

/// Set in the process that the namespaces are for.
const INSIDE: &str = "EDGECORE_TEST_INSIDE";

/// Whether this process has namespaces of its own (network, mounts, processes). If not, it runs the
/// calling test once more in such, and fails as that fails: whatever becomes of the test, also when
/// it is killed, the kernel takes interfaces, mounts, names of networks and processes away with it.
pub(crate) fn in_namespaces() -> bool {
    if std::env::var_os(INSIDE).is_some() {
        // The names of Pods' networks are kept here.
        fs::create_dir_all("/run/netns").unwrap();
        run(Command::new("mount").args(["-t", "tmpfs", "tmpfs", "/run/netns"]));
        run(Command::new("ip").args(["link", "set", "lo", "up"]));
        return true;
    }
    let test = std::thread::current();
    let test = test.name().expect("the harness names a test's thread");
    let mut again = Command::new("setpriv");
    again.args(["--pdeathsig", "KILL", "unshare", "--net", "--mount"]);
    again.args(["--pid", "--mount-proc", "--fork", "--kill-child"]);
    again.arg(std::env::current_exe().unwrap());
    again
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1");
    let status = again.status().expect("util-linux is installed");
    assert!(status.success(), "in namespaces of its own: {status}");
    false
}

/// Shows the agent's log where `RUST_LOG` asks for it.
pub(crate) fn log() {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_test_writer()
        .try_init();
}

fn run(command: &mut Command) {
    let output = command
        .output()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn sha256(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_whitespace().next().unwrap().to_owned()
}

/// A docker archive with the distribution's busybox as its only layer.
fn archive(dir: &Path) -> PathBuf {
    let root = dir.join("rootfs");
    for sub in ["bin", "etc", "proc", "sys", "dev", "tmp"] {
        fs::create_dir_all(root.join(sub)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static is installed");
    for applet in [
        "sh", "test", "grep", "sleep", "cat", "echo", "true", "false", "kill", "touch", "env",
    ] {
        let _ = std::os::unix::fs::symlink("busybox", root.join("bin").join(applet));
    }
    let layer = dir.join("layer.tar");
    run(Command::new("tar")
        .arg("-C")
        .arg(&root)
        .arg("-cf")
        .arg(&layer)
        .arg("."));
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": {"Cmd": ["/bin/sleep", "1000000"], "Env": ["PATH=/bin"], "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", sha256(&layer))]},
    });
    let manifest = json!([{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]);
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    fs::write(dir.join("manifest.json"), manifest.to_string()).unwrap();
    let image = dir.join("image.tar");
    let parts = ["manifest.json", "config.json", "layer.tar"];
    run(Command::new("tar")
        .arg("-C")
        .arg(dir)
        .arg("-cf")
        .arg(&image)
        .args(parts));
    image
}

impl Containerd {
    pub(crate) fn start() -> Self {
        let tmp = tempfile::Builder::new()
            .prefix("edgecore-rt-")
            .tempdir()
            .unwrap();
        let dir = tmp.path().to_owned();
        fs::create_dir_all(dir.join("cni")).unwrap();
        let network = json!({
            "cniVersion": "0.4.0", "name": "edgecore-test",
            "plugins": [{"type": "ptp", "ipam": {
                "type": "host-local", "dataDir": dir.join("cni-state"),
                "ranges": [[{"subnet": "10.213.77.0/24"}]]
            }}]
        });
        fs::write(dir.join("cni/10-test.conflist"), network.to_string()).unwrap();
        let bin = if Path::new("/usr/lib/cni").exists() {
            "/usr/lib/cni"
        } else {
            "/opt/cni/bin"
        };
        let d = dir.display();
        let config = format!(
            r#"version = 2
root = "{d}/root"
state = "{d}/state"
[grpc]
  address = "{d}/c.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{IMAGE}"
  restrict_oom_score_adj = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "{bin}"
  conf_dir = "{d}/cni"
"#
        );
        fs::write(dir.join("config.toml"), config).unwrap();
        let process = daemon(&dir);
        let mut rig = Self {
            dir,
            process,
            _tmp: tmp,
        };
        rig.await_socket();
        let image = archive(&rig.dir);
        run(rig.ctr().args(["images", "import"]).arg(image));
        rig
    }

    fn await_socket(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !self
            .ctr()
            .arg("version")
            .output()
            .is_ok_and(|o| o.status.success())
        {
            assert!(Instant::now() < deadline, "containerd: {}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn ctr(&self) -> Command {
        let mut command = Command::new("ctr");
        command
            .arg("--address")
            .arg(self.dir.join("c.sock"))
            .args(["-n", "k8s.io"]);
        command
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.join("containerd.log")).unwrap_or_default()
    }

    /// Containers go on under their shims.
    pub(crate) fn kill(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    pub(crate) fn restart(&mut self) {
        self.process = daemon(&self.dir);
        self.await_socket();
    }

    pub(crate) fn client(&self) -> Runtime {
        Arc::new(Client::build(&format!("unix://{}/c.sock", self.dir.display())).unwrap())
    }
}

fn daemon(dir: &Path) -> Child {
    let log = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(dir.join("containerd.log"));
    let log = log.unwrap();
    let usual = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    // Directories of another containerd and its shim, to run these tests on.
    let own = std::env::var("EDGECORE_TEST_CONTAINERD").unwrap_or_default();
    Command::new("containerd")
        .arg("--config")
        .arg(dir.join("config.toml"))
        .env("PATH", format!("{own}:{usual}"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::from(log))
        .spawn()
        .expect("containerd is installed")
}

/// What the tests call their Pods: a test that failed leaves cgroups under these names.
pub(crate) const UIDS: [&str; 10] = [
    "11111111-aaaa",
    "22222222-aaaa",
    "22222222-bbbb",
    "33333333-aaaa",
    "33333333-bbbb",
    "44444444-aaaa",
    "44444444-bbbb",
    "44444444-cccc",
    "44444444-dddd",
    "55555555-aaaa",
];

impl Drop for Containerd {
    fn drop(&mut self) {
        // What a failed test left: the sandboxes' first, their containers end with them.
        let tasks = self.ctr().args(["tasks", "ls", "-q"]).output();
        for id in tasks
            .iter()
            .flat_map(|o| std::str::from_utf8(&o.stdout))
            .flat_map(str::lines)
        {
            let _ = self.ctr().args(["tasks", "rm", "-f", id]).output();
        }
        self.kill();
        for uid in UIDS {
            let _ = Cgroups::detect(None).remove(uid, Qos::BestEffort);
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let own = mounts.lines().filter_map(|l| l.split(' ').nth(1));
        let dir = self.dir.display().to_string();
        for mount in own
            .filter(|m| m.starts_with(&dir))
            .collect::<Vec<_>>()
            .into_iter()
            .rev()
        {
            let _ = Command::new("umount").args(["-l", mount]).output();
        }
    }
}

struct NoTokens;

impl TokenSource for NoTokens {
    fn token<'a>(&'a self, _: &'a TokenRequest) -> TokenFuture<'a> {
        Box::pin(async {
            Ok(Token {
                token: "test".into(),
                refresh_in_seconds: 3600,
            })
        })
    }
    fn forget(&self, _: &ObjectKey) {}
}

/// The parts of an agent that outlive it: the store's.
#[derive(Clone)]
pub(crate) struct Kept {
    pub(crate) desired: Desired,
    pub(crate) reports: Reports,
    pub(crate) events: Events,
    ledger: Arc<InMemory>,
}

impl Kept {
    pub(crate) fn new() -> Self {
        let kept = Self {
            desired: Desired::in_memory(),
            reports: Reports::in_memory(),
            events: Events::in_memory(),
            ledger: Arc::default(),
        };
        let services = [ObjectKey::named(Kind::Services, "default", "")];
        kept.desired
            .commit(Batch {
                puts: services
                    .into_iter()
                    .map(|k| Object::present(k, *b"[]"))
                    .collect(),
                ..Default::default()
            })
            .unwrap();
        kept
    }

    pub(crate) fn put_object(&self, key: ObjectKey, json: &Value) {
        let object = Object::present(key, json.to_string().into_bytes());
        self.desired
            .commit(Batch {
                puts: vec![object],
                ..Default::default()
            })
            .unwrap();
    }

    /// Waits until no Pod is left, not even one that is being removed.
    pub(crate) async fn until_empty(&self) {
        let mut changes = self.desired.changes();
        while !self.desired.pods().is_empty() {
            let changed = tokio::time::timeout(Duration::from_secs(30), changes.changed());
            changed.await.expect("the last Pod goes").unwrap();
        }
    }

    pub(crate) fn put(&self, pod: &Value) -> ObjectKey {
        let meta = &pod["metadata"];
        let text = |key: &str| meta[key].as_str().unwrap().to_owned();
        let key = ObjectKey::pod(&text("namespace"), &text("name"), &text("uid"));
        let object = Object::present(key.clone(), pod.to_string().into_bytes());
        self.desired
            .commit(Batch {
                puts: vec![object],
                ..Default::default()
            })
            .unwrap();
        key
    }

    pub(crate) fn remove(&self, key: &ObjectKey) {
        self.desired
            .commit(Batch {
                removes: vec![key.clone()],
                ..Default::default()
            })
            .unwrap();
    }

    /// Waits for a report that satisfies, and gives how long it took.
    pub(crate) async fn until(
        &self,
        what: &str,
        key: &ObjectKey,
        good: impl Fn(&PodReport) -> bool,
    ) -> (PodReport, Duration) {
        let began = Instant::now();
        let mut changes = self.reports.changes();
        loop {
            changes.borrow_and_update();
            if let Some(report) = self.reports.pod(key).filter(|r| good(r)) {
                return (report, began.elapsed());
            }
            let left = Duration::from_secs(30).saturating_sub(began.elapsed());
            if tokio::time::timeout(left, changes.changed()).await.is_err() {
                panic!(
                    "{what}: not within 30 s; {:#?}\n{:#?}",
                    self.reports.pod(key),
                    self.events.drain()
                );
            }
        }
    }
}

/// One life of the agent.
pub(crate) struct Agent {
    pub(crate) handle: Handle,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Agent {
    pub(crate) fn start(runtime: Runtime, dir: &Path, kept: &Kept) -> Self {
        let config = VolumesConfig {
            root: dir.join("agent"),
            node_ca_pem: None,
        };
        let volumes = Volumes::new(config, kept.desired.clone(), Arc::new(NoTokens));
        let environment = Environment {
            node_name: "edge-1".into(),
            node_ip: "192.0.2.7".parse().unwrap(),
            cluster_dns: None,
            cluster_domain: "cluster.local".into(),
            api_service: None,
            allocatable_cpu_millis: 2000,
            allocatable_memory_bytes: 1 << 30,
            allocatable_ephemeral_bytes: 1 << 30,
        };
        let paths = Paths {
            pod_logs: dir.join("log/pods"),
            container_logs: dir.join("log/containers"),
            ..Paths::default()
        };
        let logs = rotate::Config {
            most_bytes: 4096,
            ..rotate::Config::default()
        };
        let config = Config {
            paths,
            logs,
            ..Config::default()
        };
        let (handle, task) = PodManager::build(
            config,
            Deps {
                cri: runtime,
                desired: kept.desired.clone(),
                reports: kept.reports.clone(),
                events: kept.events.clone(),
                volumes: Arc::new(volumes),
                environment: watch::channel(Some(environment)).1,
                ledger: kept.ledger.clone(),
                clock: None,
            },
        );
        let stop = CancellationToken::new();
        let task = tokio::spawn(task.run(stop.clone()));
        Self { handle, stop, task }
    }

    pub(crate) async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
}

/// A Pod of one container that runs a shell line.
pub(crate) fn pod(name: &str, uid: &str, line: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "uid": uid},
        "spec": {
            "restartPolicy": "Always", "terminationGracePeriodSeconds": 1,
            "enableServiceLinks": false,
            "containers": [{
                "name": "main", "image": IMAGE, "imagePullPolicy": "IfNotPresent",
                "command": ["/bin/sh", "-c", line]
            }]
        }
    })
}

pub(crate) fn phase(report: &PodReport) -> &str {
    report.status["phase"].as_str().unwrap_or_default()
}
