//! The node's API on a real containerd: bytes both ways, ends, and nothing left behind.

use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use edgecore::admin::{self, Shown};
use edgecore::pods::jobs::Paths;
use edgecore::stream::leftover::Leftovers;
use edgecore::stream::stats::{self, Gatherer};
use edgecore::stream::{self, NodeApi, serve};
use futures::{SinkExt as _, StreamExt as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::{WebSocketStream, client_async};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::rig::{self, Agent, Containerd, Kept, phase, pod};

/// The API of one agent, with the Pod `web` running.
struct Api {
    api: NodeApi,
    tasks: JoinSet<()>,
    /// Of the Pod `web`.
    key: common::ids::ObjectKey,
    kept: Kept,
    agent: Agent,
    containerd: Containerd,
    _stop: DropGuard,
}

impl Api {
    async fn start(uid: &str, line: &str) -> Self {
        rig::log();
        let containerd = Containerd::start();
        let kept = Kept::new();
        let agent = Agent::start(containerd.client(), &containerd.dir, &kept);
        let (leftovers, reaper) = Leftovers::build();
        let stats = Gatherer::new(stats::Deps {
            cri: containerd.client(),
            cgroups: agent.handle.cgroups(),
            desired: kept.desired.clone(),
            paths: Paths::default(),
            data_dir: containerd.dir.clone(),
            node: "edge-1".into(),
        });
        let api = NodeApi::build(stream::Deps {
            stats,
            cri: containerd.client(),
            desired: kept.desired.clone(),
            reports: kept.reports.clone(),
            runtime: agent.handle.runtime.clone(),
            environment: watch::channel(None).1,
            leftovers,
            settings: stream::Settings {
                node: "edge-1".into(),
                cri: "unix:///c.sock".into(),
                pod_logs: containerd.dir.join("log/pods"),
                most_pods: 110,
            },
        });
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(reaper.run(stop.clone()));
        let key = kept.put(&pod("web", uid, line));
        kept.until("running", &key, |r| phase(r) == "Running").await;
        Self {
            api,
            tasks,
            key,
            kept,
            agent,
            containerd,
            _stop: stop.drop_guard(),
        }
    }

    /// One end of a connection of which the API has the other.
    fn connect(&mut self) -> DuplexStream {
        let (mine, theirs) = tokio::io::duplex(64 * 1024);
        let api = self.api.clone();
        self.tasks.spawn(serve::serve(theirs, move |request| {
            let api = api.clone();
            async move { api.answer(request).await }
        }));
        mine
    }

    async fn http(&mut self, request: &str) -> String {
        let mut io = self.connect();
        io.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        io.read_to_string(&mut text).await.unwrap();
        text
    }

    async fn get(&mut self, path: &str) -> String {
        let text = self
            .http(&format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n"))
            .await;
        text.split_once("\r\n\r\n").unwrap().1.to_owned()
    }

    async fn socket(&mut self, path: &str) -> WebSocketStream<DuplexStream> {
        let mut request = format!("ws://x{path}").into_client_request().unwrap();
        let protocols = "v5.channel.k8s.io, v4.channel.k8s.io".parse().unwrap();
        request
            .headers_mut()
            .insert("sec-websocket-protocol", protocols);
        let (socket, _) = client_async(request, self.connect()).await.unwrap();
        socket
    }

    async fn stop(self) {
        self.kept.remove(&self.key);
        self.kept.until_empty().await;
        self.agent.stop().await;
        drop(self.containerd);
    }
}

/// What came on each channel until the end.
#[derive(Default)]
struct Heard {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    end: String,
}

async fn hear(socket: &mut WebSocketStream<DuplexStream>) -> Heard {
    let mut heard = Heard::default();
    while let Some(Ok(message)) = socket.next().await {
        let Message::Binary(message) = message else {
            continue;
        };
        match message.split_first() {
            Some((1, bytes)) => heard.stdout.extend_from_slice(bytes),
            Some((2, bytes)) => heard.stderr.extend_from_slice(bytes),
            Some((3, bytes)) => heard.end.push_str(&String::from_utf8_lossy(bytes)),
            _ => {}
        }
    }
    heard
}

fn sha256(bytes: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    digest.as_ref().iter().map(|b| format!("{b:02x}")).collect()
}

/// The processes of this device with a command line.
fn running(command: &str) -> Vec<PathBuf> {
    let wanted = command.replace(' ', "\0") + "\0";
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    all.map(|e| e.path())
        .filter(|p| std::fs::read(p.join("cmdline")).is_ok_and(|c| c == wanted.as_bytes()))
        .collect()
}

async fn until(what: &str, limit: Duration, good: impl Fn() -> bool) {
    let began = Instant::now();
    while !good() {
        assert!(began.elapsed() < limit, "{what}: not within {limit:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

const WAITS: &str = "trap 'exit 0' TERM; sleep 1000 & wait";

#[tokio::test]
async fn exec_carries_bytes_both_ways_and_the_exit_code() {
    let mut api = Api::start("44444444-aaaa", WAITS).await;
    let line = "command=sh&command=-c&command=/bin/busybox+head+-c+300000+%7C+/bin/busybox+sha256sum%3B+echo+oh+%3E%262%3B+exit+7";
    let path = format!("/exec/default/web/main?{line}&input=1&output=1&error=1");
    let mut socket = api.socket(&path).await;
    let sent: Vec<u8> = (0..300_000_u32)
        .map(|n| (n.wrapping_mul(n) >> 7) as u8)
        .collect();
    for piece in sent.chunks(10_000) {
        let message = [&[0][..], piece].concat();
        socket.send(Message::binary(message)).await.unwrap();
    }
    let heard = hear(&mut socket).await;
    let said = String::from_utf8(heard.stdout).unwrap();
    assert!(said.starts_with(&sha256(&sent)), "{said} {}", heard.end);
    assert_eq!(heard.stderr, b"oh\n");
    let end: serde_json::Value = serde_json::from_str(&heard.end).unwrap();
    assert_eq!(end["details"]["causes"][0]["message"], "7", "{end}");

    let path = "/exec/default/web/44444444-aaaa/main?command=cat&command=/bin/busybox&output=1";
    let heard = hear(&mut api.socket(path).await).await;
    let file = std::fs::read("/bin/busybox").unwrap();
    assert_eq!(sha256(&heard.stdout), sha256(&file));
    assert!(heard.end.contains("Success"), "{}", heard.end);

    let run = "POST /run/default/web/main?cmd=echo+hello HTTP/1.1\r\nHost: x\r\n\r\n";
    let answer = api.http(run).await;
    assert!(answer.ends_with("\r\n\r\nhello\n"), "{answer}");
    api.stop().await;
}

#[tokio::test]
async fn a_run_answers_with_little_output_and_ends_what_says_more() {
    let mut api = Api::start("44444444-eeee", WAITS).await;
    let run =
        |query: &str| format!("POST /run/default/web/main?{query} HTTP/1.1\r\nHost: x\r\n\r\n");
    let line = "command=sh&command=-c&command=echo+out%3B+echo+err+%3E%262";
    let answer = api.http(&run(line)).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(answer.ends_with("\r\n\r\nout\nerr\n"), "{answer}");
    let answer = api.http(&run(&format!("{line}%3B+exit+7"))).await;
    assert!(answer.starts_with("HTTP/1.1 500 "), "{answer}");
    assert!(answer.contains("exited with 7: err"), "{answer}");
    let answer = api.http(&run("cmd=no-such-program")).await;
    assert!(answer.starts_with("HTTP/1.1 500 "), "{answer}");
    assert!(answer.contains("no-such-program"), "{answer}");
    let answer = api.http(&run("cmd=/bin/busybox+yes+45461")).await;
    assert!(answer.starts_with("HTTP/1.1 500 "), "{answer}");
    assert!(answer.contains("use exec"), "{answer}");
    until("it is ended", Duration::from_secs(3), || {
        running("/bin/busybox yes 45461").is_empty()
    })
    .await;
    let mut leaves = api.connect();
    let asked = run("cmd=sleep+45462");
    leaves.write_all(asked.as_bytes()).await.unwrap();
    until("it runs", Duration::from_secs(5), || {
        running("sleep 45462").len() == 1
    })
    .await;
    drop(leaves);
    until("its asker left", Duration::from_secs(3), || {
        running("sleep 45462").is_empty()
    })
    .await;
    api.stop().await;
}

#[tokio::test]
async fn what_begins_and_leaves_together_is_all_ended() {
    let mut api = Api::start("44444444-ffff", WAITS).await;
    let path = |line: &str| {
        let line = line.replace(' ', "+");
        format!("/exec/default/web/main?command=sh&command=-c&command={line}&output=1")
    };
    let equal = "/exec/default/web/main?command=sleep&command=45463&output=1";
    let first = api.socket(equal).await;
    let second = api.socket(equal).await;
    let shells = [
        api.socket(&path("exec sleep 45464")).await,
        api.socket(&path("exec sleep 45465")).await,
    ];
    until("all run", Duration::from_secs(5), || {
        let count = |seconds| running(&format!("sleep {seconds}")).len();
        (count(45_463), count(45_464), count(45_465)) == (2, 1, 1)
    })
    .await;
    drop(first);
    tokio::time::sleep(Duration::from_millis(20)).await;
    drop((second, shells));
    for seconds in 45_463..45_466 {
        let command = format!("sleep {seconds}");
        until(&command, Duration::from_secs(4), || {
            running(&command).is_empty()
        })
        .await;
    }
    api.stop().await;
}

#[tokio::test]
async fn no_process_is_left_of_an_exec_whose_asker_left_and_nobody_elses_is_touched() {
    let line = "trap 'exit 0' TERM; sleep 45453 & wait";
    let mut api = Api::start("44444444-bbbb", line).await;
    let exec = |seconds: u32| {
        format!("/exec/default/web/main?command=sleep&command={seconds}&input=1&output=1")
    };
    let mut stays = api.socket(&exec(45_454)).await;
    let leaves = api.socket(&exec(45_455)).await;
    // A shell that takes another command line, and a child that listens to no request to end.
    let line = "trap+%27%27+TERM+HUP%3B+sleep+45456+%26+exec+sleep+45457";
    let path = format!("/exec/default/web/main?command=sh&command=-c&command={line}&output=1");
    let shell = api.socket(&path).await;
    let all = ["sleep 45454", "sleep 45455", "sleep 45456", "sleep 45457"];
    until("all run", Duration::from_secs(5), || {
        all.iter().all(|c| running(c).len() == 1)
    })
    .await;
    drop((leaves, shell));
    for gone in &all[1..] {
        until(gone, Duration::from_secs(2), || running(gone).is_empty()).await;
    }
    assert_eq!(running("sleep 45454").len(), 1, "its asker is still there");
    assert_eq!(
        running("sleep 45453").len(),
        1,
        "the container's own process"
    );
    stays.close(None).await.unwrap();
    drop(stays);
    until("the last", Duration::from_secs(2), || {
        running("sleep 45454").is_empty()
    })
    .await;
    api.stop().await;
}

#[tokio::test]
async fn attach_and_port_forward_reach_the_runtime_and_refusals_are_the_kubelets() {
    let line = "trap 'exit 0' TERM; while true; do echo tick; sleep 0.1; done";
    let mut api = Api::start("44444444-cccc", line).await;
    let mut socket = api.socket("/attach/default/web/main?output=1").await;
    let heard = tokio::time::timeout(Duration::from_secs(5), async {
        let mut stdout = Vec::new();
        while !stdout.ends_with(b"tick\n") {
            if let Some(Ok(Message::Binary(message))) = socket.next().await {
                stdout.extend_from_slice(&message[1..]);
            }
        }
    });
    heard.await.expect("the container's output");
    drop(socket);

    let upgrade = "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\n";
    let request = format!(
        "POST /portForward/default/web HTTP/1.1\r\nHost: x\r\n{upgrade}\
         X-Stream-Protocol-Version: portforward.k8s.io\r\n\r\n"
    );
    let mut io = api.connect();
    io.write_all(request.as_bytes()).await.unwrap();
    let mut head = vec![0; 4096];
    let length = io.read(&mut head).await.unwrap();
    let head = String::from_utf8_lossy(&head[..length]).to_lowercase();
    assert!(head.starts_with("http/1.1 101"), "{head}");
    assert!(head.contains("upgrade: spdy/3.1"), "{head}");
    drop(io);

    for (head, code, words) in [
        (
            "GET /exec/default/web/main?command=true&output=1",
            400,
            "Upgrade request required",
        ),
        (
            "DELETE /exec/default/web/main?command=true&output=1",
            405,
            "GET, POST",
        ),
        ("GET /nothing", 404, "404 page not found"),
        (
            "GET /containerLogs/default/gone/main",
            404,
            "\"gone\" does not exist",
        ),
        (
            "GET /containerLogs/default/web/other",
            404,
            "container \"other\" not found in pod \"web\"",
        ),
        (
            "GET /containerLogs/default/web/main?previous=true",
            400,
            "previous terminated container \"main\" in pod \"web\" not found",
        ),
    ] {
        let text = api
            .http(&format!("{head} HTTP/1.1\r\nHost: x\r\n\r\n"))
            .await;
        assert!(
            text.starts_with(&format!("HTTP/1.1 {code} ")),
            "{head}: {text}"
        );
        assert!(text.contains(words), "{head}: {text}");
    }
    for (path, words) in [
        (
            "/exec/default/gone/main?command=true&output=1",
            "does not exist",
        ),
        (
            "/exec/default/web/other?command=true&output=1",
            "container not found (\"other\")",
        ),
        (
            "/exec/default/web/main?output=1",
            "a command has to be given",
        ),
        ("/attach/default/web/main", "at least 1 of"),
    ] {
        let text = api
            .http(&format!("GET {path} HTTP/1.1\r\nHost: x\r\n{upgrade}\r\n"))
            .await;
        assert!(text.contains(words), "{path}: {text}");
    }

    let pods: serde_json::Value = serde_json::from_str(&api.get("/pods").await).unwrap();
    assert_eq!(pods["kind"], "PodList");
    assert_eq!(pods["items"][0]["metadata"]["name"], "web");
    assert_eq!(pods["items"][0]["status"]["phase"], "Running");
    let running: serde_json::Value = serde_json::from_str(&api.get("/runningpods/").await).unwrap();
    let item = &running["items"][0];
    assert_eq!(item["metadata"]["uid"], "44444444-cccc");
    assert_eq!(item["spec"]["containers"][0]["name"], "main");
    assert_eq!(api.get("/healthz").await, "ok");
    let phase_now = |kept: &Kept, key| phase(&kept.reports.pod(key).unwrap()).to_owned();
    assert_eq!(
        phase_now(&api.kept, &api.key),
        "Running",
        "attach ended nothing"
    );
    api.stop().await;
}

#[tokio::test]
async fn ctl_works_at_the_device_with_nothing_but_the_socket() {
    let mut api = Api::start("44444444-dddd", WAITS).await;
    let path = api.containerd.dir.join("admin.sock");
    let shown = Shown {
        node: "edge-1".into(),
        desired: api.kept.desired.clone(),
        reports: api.kept.reports.clone(),
        connected: watch::channel(false).1,
        runtime: api.agent.handle.runtime.clone(),
    };
    let stop = CancellationToken::new();
    let served = admin::run(path.clone(), shown, api.api.clone(), stop.clone());
    api.tasks.spawn(served);
    until("the socket", Duration::from_secs(5), || path.exists()).await;
    let run = async |words: &[&str], input: &'static [u8]| -> Output {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_edgecore"));
        command.args(words).env("EDGECORE_ADMIN", &path);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(input).await.unwrap();
        drop(stdin);
        let output = child.wait_with_output();
        let output = tokio::time::timeout(Duration::from_secs(20), output).await;
        output.expect("ctl ends").unwrap()
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();

    let got = run(&["status"], b"").await;
    let document: serde_json::Value = serde_json::from_slice(&got.stdout).unwrap();
    assert_eq!(document["pods"][0]["phase"], "Running");

    let got = run(&["ctl", "get", "pods"], b"").await;
    let table = text(&got.stdout);
    assert!(table.contains("web    1/1     Running   0"), "{table}");
    let got = run(&["ctl", "get", "devices"], b"").await;
    assert!(text(&got.stderr).starts_with("No resources found"));

    let line = "read it; echo got $it; exit 9";
    let words = ["ctl", "exec", "web", "-i", "--", "sh", "-c", line];
    let got = run(&words, b"this\n").await;
    assert_eq!(text(&got.stdout), "got this\n", "{}", text(&got.stderr));
    assert_eq!(got.status.code(), Some(9));
    let got = run(&["ctl", "exec", "web", "--", "cat", "/bin/busybox"], b"").await;
    let file = std::fs::read("/bin/busybox").unwrap();
    assert_eq!(sha256(&got.stdout), sha256(&file));
    assert_eq!(got.status.code(), Some(0), "{}", text(&got.stderr));

    for (words, said) in [
        (
            &["ctl", "exec", "gone", "--", "true"][..],
            "pod \"gone\" not found",
        ),
        (
            &["ctl", "exec", "web", "-c", "x", "--", "true"],
            "it has: main",
        ),
        (&["ctl", "logs", "web", "--previous"], "previous terminated"),
    ] {
        let got = run(words, b"").await;
        assert_eq!(got.status.code(), Some(1), "{words:?}");
        assert!(text(&got.stderr).contains(said), "{}", text(&got.stderr));
    }
    stop.cancel();
    api.stop().await;
}
