//! What the program says and does when it is started on a device that has joined, and something is
//! not as it should be. No cloud and no container runtime are there.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use common::hub::proto;
use common::ids::NodeName;
use common::pki::ca::Ca;
use common::pki::token::{Endpoint, TokenSecret};
use common::pki::{ClusterId, JoinToken, Validity};
use edgecore::hub::identity;
use edgecore::store::Store;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustls_pki_types::UnixTime;

const LIMIT: Duration = Duration::from_secs(30);

struct Device {
    dir: tempfile::TempDir,
    ca: Ca,
}

fn cluster() -> ClusterId {
    ClusterId::parse("c1").unwrap()
}

fn year() -> Validity {
    Validity::starting(UnixTime::now(), Duration::from_secs(365 * 24 * 3600))
}

impl Device {
    /// That joined a cloud which is not there any more.
    fn joined() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca = Ca::generate(&cluster(), year()).unwrap();
        let (store, _) = Store::open(&dir.path().join("data/store")).unwrap();
        let key = identity::ensure_key(&store).unwrap();
        let name = NodeName::parse("edge-1").unwrap();
        let csr = key.request().unwrap();
        let chain = ca.sign_node_csr(&csr, &name, &cluster(), year()).unwrap();
        let link = proto::Link {
            version: 1,
            roots: vec![ca.certificate().to_vec()],
            endpoints: vec![Endpoint::new("127.0.0.1", 1).to_proto()],
            cluster_id: cluster().to_string(),
        };
        let joined = proto::Joined {
            node_name: name.to_string(),
            chain: chain.iter().map(|c| c.to_vec()).collect(),
            link: Some(link),
            now_ms: UnixTime::now().as_secs() * 1000,
        };
        identity::keep_joined(&store, Some("first"), None, &joined).unwrap();
        store.close().unwrap();
        Self { dir, ca }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A token that this device has not joined with.
    fn token(&self) -> String {
        let token = JoinToken {
            id: "second".into(),
            secret: TokenSecret::generate().unwrap(),
            pins: vec![self.ca.pin()],
            endpoints: vec![Endpoint::new("127.0.0.1", 1)],
            cluster: cluster(),
        };
        token.to_text()
    }

    fn start(&self, more: &[&str]) -> Running {
        let config = self.path("edge.yaml");
        let text = format!(
            "dataDir: {0}/data\ncniConfigDir: {0}/net.d\npodLogsDir: {0}/logs\n",
            self.dir.path().display()
        );
        std::fs::write(&config, text).unwrap();
        let socket = format!("unix://{}", self.path("none.sock").display());
        let mut command = Command::new(env!("CARGO_BIN_EXE_edgecore"));
        command.arg("--config").arg(config);
        if !more.contains(&"--cri") {
            command.args(["--cri", &socket]);
        }
        let log = tempfile::NamedTempFile::new_in(self.dir.path()).unwrap();
        command.args(more).env_remove("RUST_LOG");
        let output = log.reopen().unwrap();
        let child = command.stdout(Stdio::null()).stderr(output).spawn();
        Running {
            child: child.unwrap(),
            log,
        }
    }
}

struct Running {
    child: Child,
    log: tempfile::NamedTempFile,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Running {
    fn text(&self) -> String {
        let mut text = String::new();
        let mut log = self.log.reopen().unwrap();
        log.read_to_string(&mut text).unwrap();
        text
    }

    fn says(&self, words: &str) {
        let began = Instant::now();
        while !self.text().contains(words) {
            assert!(began.elapsed() < LIMIT, "never {words:?}:\n{}", self.text());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn end(&mut self) -> ExitStatus {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(began.elapsed() < LIMIT, "it goes on:\n{}", self.text());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends with this exit code; gives its last line.
    fn refused(mut self, code: i32) -> String {
        let status = self.end();
        let text = self.text();
        assert_eq!(status.code(), Some(code), "{text}");
        text.lines().last().unwrap_or_default().to_owned()
    }

    fn stops(mut self) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        kill(pid, Signal::SIGTERM).unwrap();
        let began = Instant::now();
        assert!(self.end().success(), "{}", self.text());
        assert!(began.elapsed() < Duration::from_secs(5), "{}", self.text());
    }
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

#[test]
fn a_missing_runtime_is_told_by_its_socket_and_waited_for() {
    let device = Device::joined();
    let running = device.start(&[]);
    running.says(&format!(
        "cannot connect to {}",
        shown(&device.path("none.sock"))
    ));
    running.says("no session with the cloud");
    let status = Command::new(env!("CARGO_BIN_EXE_edgecore"))
        .args(["status", "--admin", &shown(&device.path("data/admin.sock"))])
        .output()
        .unwrap();
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(status["node"], "edge-1");
    assert_eq!(status["runtime"]["ready"], false);
    let why = status["runtime"]["message"].as_str().unwrap();
    assert!(why.contains("none.sock"), "{why}");
    running.stops();
}

#[test]
fn a_runtime_that_accepts_and_never_answers_holds_nothing_up() {
    let device = Device::joined();
    let socket = device.path("mute.sock");
    let _mute = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let running = device.start(&["--cri", &format!("unix://{}", shown(&socket))]);
    running.says("no session with the cloud");
    running.stops();
}

#[test]
fn a_second_agent_on_one_data_directory_is_refused_by_name() {
    let device = Device::joined();
    let first = device.start(&[]);
    first.says("edgecore starts");
    let said = device.start(&[]).refused(5);
    assert!(said.contains("in use by another edgecore"), "{said}");
    assert!(said.contains(&shown(&device.path("data"))), "{said}");
    first.stops();
}

#[test]
fn what_cannot_be_is_refused_before_anything_is_touched() {
    let device = Device::joined();
    for (args, code, words) in [
        (
            vec!["--cri", "tcp://127.0.0.1:1"],
            3,
            "is not a Unix socket",
        ),
        (vec!["--name", "edge-2"], 3, "belongs to node edge-1"),
        (
            vec![
                "--name",
                "edge-2",
                "--join",
                "127.0.0.1:1",
                "--token",
                &device.token(),
            ],
            3,
            "belongs to node edge-1",
        ),
    ] {
        let said = device.start(&args).refused(code);
        assert!(said.contains(words), "{args:?}: {said}");
    }
}

#[test]
fn a_new_token_never_keeps_a_device_that_joined_from_its_pods() {
    let device = Device::joined();
    let token = device.token();
    // An absent cloud, a token that was cut, an address that is none.
    for (address, token) in [
        ("127.0.0.1:1", &*token),
        ("127.0.0.1:1", &token[..20]),
        ("nowhere", &token),
    ] {
        let running = device.start(&["--join", address, "--token", token]);
        running.says("goes on with what it has");
        running.says("Pods cannot be started");
        assert!(!running.text().contains(token));
        running.stops();
    }
}

#[test]
fn a_device_that_never_joined_says_how() {
    let device = Device::joined();
    let fresh = shown(&device.path("fresh"));
    let said = device.start(&["--data-dir", &fresh]).refused(2);
    assert!(said.contains("--join HOST:PORT --token TOKEN"), "{said}");
}
