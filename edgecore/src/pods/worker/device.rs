//! A device in memory for the tests of whole lives: a runtime, a store, and agents that come and go.

use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use common::ids::Kind;
use common::object::Object;
use jiff::Timestamp;

use super::*;
use crate::cri::fake::{Fake, Program};
use crate::pods::cgroups::CgroupDriver;
use crate::pods::ledger::InMemory;
use crate::pods::manager::{Config, Deps, Handle, PodManager};
use crate::pods::rotate;
use crate::pods::tokens::{Token, TokenFuture, TokenRequest, TokenSource};
use crate::pods::volumes::VolumesConfig;
use crate::store::desired::Batch;

/// Gives the same token to all, and notes whose are forgotten.
#[derive(Default)]
pub(super) struct SomeTokens {
    pub(super) forgotten: std::sync::Mutex<Vec<ObjectKey>>,
}

impl TokenSource for SomeTokens {
    fn token<'a>(&'a self, _: &'a TokenRequest) -> TokenFuture<'a> {
        Box::pin(async {
            Ok(Token {
                token: "t".into(),
                refresh_in_seconds: 3600,
            })
        })
    }
    fn forget(&self, pod: &ObjectKey) {
        self.forgotten.lock().unwrap().push(pod.clone());
    }
}

/// A device: what survives the agent, and the runtime under it.
pub(super) struct Device {
    pub(super) fake: Arc<Fake>,
    pub(super) desired: Desired,
    pub(super) reports: Reports,
    pub(super) events: Events,
    pub(super) ledger: Arc<InMemory>,
    pub(super) tokens: Arc<SomeTokens>,
    pub(super) dir: tempfile::TempDir,
    pub(super) node: &'static str,
    /// The next who asks for the time panics.
    pub(super) clock_is_broken: Arc<AtomicBool>,
}

pub(super) struct Agent {
    pub(super) handle: Handle,
    pub(super) stop: CancellationToken,
    pub(super) task: JoinHandle<()>,
}

impl Agent {
    pub(super) async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
}

impl Device {
    pub(super) fn new() -> Self {
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let device = Self {
            fake: Arc::new(Fake::new(now)),
            desired: Desired::in_memory(),
            reports: Reports::in_memory(),
            events: Events::in_memory(),
            ledger: Arc::default(),
            tokens: Arc::default(),
            dir: tempfile::tempdir().unwrap(),
            node: "edge-1",
            clock_is_broken: Arc::default(),
        };
        device.fake.add_image("i:1");
        device.put_object(ObjectKey::named(Kind::Services, "default", ""), json!([]));
        device
    }

    pub(super) fn start(&self) -> Agent {
        let path = |sub: &str| self.dir.path().join(sub);
        std::fs::create_dir_all(path("cgroup")).unwrap();
        let volumes = Volumes::new(
            VolumesConfig {
                root: path("agent"),
                node_ca_pem: None,
            },
            self.desired.clone(),
            self.tokens.clone(),
        );
        let environment = Environment {
            node_name: self.node.into(),
            node_ip: "192.0.2.7".parse().unwrap(),
            cluster_dns: Some("10.96.0.10".parse().unwrap()),
            cluster_domain: "cluster.local".into(),
            api_service: None,
            allocatable_cpu_millis: 2000,
            allocatable_memory_bytes: 1 << 30,
            allocatable_ephemeral_bytes: 1 << 30,
        };
        let config = Config {
            most_pods: 110,
            paths: Paths {
                pod_logs: path("log/pods"),
                container_logs: path("log/containers"),
                ..Paths::default()
            },
            logs: rotate::Config::default(),
            cgroups: Some(Cgroups::at(CgroupDriver::Systemd, path("cgroup"))),
        };
        let fake = self.fake.clone();
        let start = Instant::now();
        let broken = self.clock_is_broken.clone();
        let clock: Clock = Arc::new(move || {
            assert!(
                !broken.swap(false, Ordering::Relaxed),
                "the clock is broken"
            );
            Now {
                wall: fake.now(),
                mono: start.elapsed(),
            }
        });
        let (handle, task) = PodManager::build(
            config,
            Deps {
                cri: self.fake.clone(),
                desired: self.desired.clone(),
                reports: self.reports.clone(),
                events: self.events.clone(),
                volumes: Arc::new(volumes),
                environment: watch::channel(Some(environment)).1,
                ledger: self.ledger.clone(),
                clock: Some(clock),
            },
        );
        let stop = CancellationToken::new();
        let task = tokio::spawn(task.run(stop.clone()));
        Agent { handle, stop, task }
    }

    pub(super) fn put_object(&self, key: ObjectKey, json: Value) {
        let object = Object::present(key, json.to_string().into_bytes());
        self.desired
            .commit(Batch {
                puts: vec![object],
                ..Default::default()
            })
            .unwrap();
    }

    pub(super) fn put(&self, pod: &Value) -> ObjectKey {
        let text = |key: &str| pod["metadata"][key].as_str().unwrap();
        let key = ObjectKey::pod(text("namespace"), text("name"), text("uid"));
        self.put_object(key.clone(), pod.clone());
        key
    }

    pub(super) fn remove(&self, key: &ObjectKey) {
        self.desired
            .commit(Batch {
                removes: vec![key.clone()],
                ..Default::default()
            })
            .unwrap();
    }

    /// The cloud says that it has named every Pod.
    pub(super) fn complete(&self) {
        let batch = Batch {
            complete: true,
            ..Default::default()
        };
        self.desired.commit(batch).unwrap();
    }

    pub(super) fn status(&self, key: &ObjectKey) -> Value {
        self.reports.pod(key).map(|r| r.status).unwrap_or_default()
    }

    pub(super) fn phase(&self, key: &ObjectKey) -> String {
        self.status(key)["phase"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }

    pub(super) fn gone(&self, key: &ObjectKey) -> bool {
        self.reports.pod(key).is_some_and(|r| r.gone)
    }

    /// Waits for a level, in the tests' own time.
    pub(super) async fn until(&self, what: &str, good: impl Fn() -> bool) -> Duration {
        let began = Instant::now();
        let polled = timeout(Duration::from_secs(3600), async {
            while !good() {
                sleep(Duration::from_millis(5)).await;
            }
        });
        assert!(
            polled.await.is_ok(),
            "{what}: never; {:?}\n{:#?}",
            self.fake.calls(),
            self.reasons()
        );
        began.elapsed()
    }

    pub(super) fn reasons(&self) -> Vec<String> {
        self.events
            .drain()
            .into_iter()
            .map(|e| format!("{} {}", e.reason, e.message))
            .collect()
    }
}

pub(super) fn pod(name: &str, uid: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "default", "uid": uid},
        "spec": {
            "restartPolicy": "Always", "enableServiceLinks": false,
            "terminationGracePeriodSeconds": 30,
            "containers": [{"name": "main", "image": "i:1", "imagePullPolicy": "IfNotPresent"}]
        }
    })
}

pub(super) fn deleted(mut pod: Value, grace: i64) -> Value {
    pod["metadata"]["deletionTimestamp"] = json!("2027-01-15T08:00:00Z");
    pod["metadata"]["deletionGracePeriodSeconds"] = json!(grace);
    pod
}

pub(super) fn ends(after: u64, code: i32) -> Program {
    Program {
        ends: Some((Duration::from_secs(after), code)),
        stubborn: false,
    }
}

pub(super) fn condition<'a>(status: &'a Value, kind: &str) -> &'a str {
    let all = status["conditions"].as_array().unwrap();
    let found = all.iter().find(|c| c["type"] == kind).unwrap();
    found["status"].as_str().unwrap()
}
