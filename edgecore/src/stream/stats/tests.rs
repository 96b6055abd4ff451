use common::ids::ObjectKey;
use common::object::Object;
use serde_json::json;

use super::testing::snapshot;
use super::*;
use crate::cri::Cri as _;
use crate::cri::fake::{Fake, Usage};
use crate::store::desired::Batch;

#[test]
fn a_summary_is_the_kubelets() {
    let got = summary::render(&snapshot(), false);
    let now = "2027-01-15T08:00:00Z";
    let network = json!({
        "time": now, "name": "eth0", "rxBytes": 11, "rxErrors": 13, "txBytes": 15, "txErrors": 17,
        "interfaces": [{"name": "eth0", "rxBytes": 11, "rxErrors": 13, "txBytes": 15, "txErrors": 17}],
    });
    let disk = |used: u64, inodes: u64| {
        json!({
            "time": now, "availableBytes": 400, "capacityBytes": 1000, "usedBytes": used,
            "inodesFree": 20, "inodes": 50, "inodesUsed": inodes,
        })
    };
    let cpu = |nanos: u64| json!({"time": now, "usageCoreNanoSeconds": nanos});
    let memory = |bytes: u64| json!({"time": now, "workingSetBytes": bytes});
    let want = json!({
        "node": {
            "nodeName": "edge-1",
            "systemContainers": [
                {
                    "name": "kubelet", "startTime": "2027-01-15T07:43:20Z",
                    "cpu": cpu(3_000_000_000),
                    "memory": {"time": now, "workingSetBytes": 8000, "rssBytes": 8000},
                },
                {
                    "name": "pods", "startTime": "2027-01-15T07:58:20Z",
                    "cpu": cpu(2_000_000_000), "memory": memory(5000),
                },
            ],
            "startTime": "2027-01-15T07:58:20Z",
            "cpu": cpu(90_000_000_000),
            "memory": {"time": now, "availableBytes": 3_000_000, "workingSetBytes": 1_000_000},
            "network": network,
            "fs": disk(600, 30),
            "runtime": {"imageFs": disk(300, 3)},
            "rlimit": {"time": now, "maxpid": 32768, "curproc": 120},
        },
        "pods": [{
            "podRef": {"name": "web-0", "namespace": "default", "uid": "u-1"},
            "startTime": "2027-01-15T07:59:50Z",
            "containers": [{
                "name": "main", "startTime": "2027-01-15T07:59:50Z",
                "cpu": cpu(1_500_000_000), "memory": memory(4096),
                "rootfs": disk(700, 7), "logs": disk(30, 1),
            }],
            "cpu": cpu(2_000_000_000),
            "memory": {
                "time": now, "usageBytes": 6000, "workingSetBytes": 5000, "rssBytes": 3000,
            },
            "network": network,
            "ephemeral-storage": disk(730, 8),
            "process_stats": {"process_count": 3},
        }],
    });
    assert_eq!(got, want, "{got:#}");
}

#[test]
fn a_summary_of_cpu_and_memory_has_nothing_else() {
    let got = summary::render(&snapshot(), true);
    let keys =
        |value: &Value| -> Vec<String> { value.as_object().unwrap().keys().cloned().collect() };
    let node = ["nodeName", "systemContainers", "startTime", "cpu", "memory"];
    assert_eq!(keys(&got["node"]), node);
    let pod = ["podRef", "startTime", "containers", "cpu", "memory"];
    assert_eq!(keys(&got["pods"][0]), pod);
    let container = ["name", "startTime", "cpu", "memory"];
    assert_eq!(keys(&got["pods"][0]["containers"][0]), container);
}

struct Rig {
    fake: Arc<Fake>,
    gatherer: Gatherer,
    _dir: tempfile::TempDir,
}

impl Rig {
    /// One container of this node's, and one of another agent's on the same runtime.
    async fn new() -> Self {
        let fake = Arc::new(Fake::new(Timestamp::now()));
        for (node, name) in [("edge-1", "web-0"), ("edge-2", "not-ours")] {
            run(&fake, node, name).await;
        }
        let desired = Desired::in_memory();
        let pod = json!({
            "metadata": {"name": "web-0", "namespace": "default", "uid": "web-0"},
            "spec": {"containers": [{
                "name": "main", "resources": {"limits": {"memory": "8Ki"}},
            }]},
        });
        let key = ObjectKey::pod("default", "web-0", "web-0");
        let puts = vec![Object::present(key, pod.to_string().into_bytes())];
        let batch = Batch {
            puts,
            ..Default::default()
        };
        desired.commit(batch).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let logs = dir.path().join("default_web-0_web-0/main");
        std::fs::create_dir_all(&logs).unwrap();
        std::fs::write(logs.join("0.log"), "twelve bytes").unwrap();
        let gatherer = Gatherer::new(Deps {
            cri: fake.clone(),
            cgroups: Arc::default(),
            desired,
            paths: Paths {
                pod_logs: dir.path().into(),
                ..Paths::default()
            },
            data_dir: dir.path().into(),
            node: "edge-1".into(),
        });
        Self {
            fake,
            gatherer,
            _dir: dir,
        }
    }
}

async fn run(fake: &Fake, node: &str, name: &str) {
    let labels = [
        (convert::NODE, node),
        (convert::POD_UID, name),
        (convert::CONTAINER_NAME, "main"),
    ];
    let labels: std::collections::HashMap<_, _> = labels
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into_iter()
        .collect();
    let sandbox = api::PodSandboxConfig {
        metadata: Some(api::PodSandboxMetadata {
            name: name.into(),
            uid: name.into(),
            namespace: "default".into(),
            attempt: 0,
        }),
        labels: labels.clone(),
        ..Default::default()
    };
    let sandbox = fake.run_sandbox(sandbox, String::new()).await.unwrap();
    let request = api::CreateContainerRequest {
        pod_sandbox_id: sandbox,
        config: Some(api::ContainerConfig {
            metadata: Some(api::ContainerMetadata {
                name: "main".into(),
                attempt: 0,
            }),
            labels,
            ..Default::default()
        }),
        ..Default::default()
    };
    let id = fake.create_container(request).await.unwrap();
    fake.start_container(&id).await.unwrap();
}

fn uses(cpu_nanos: u64) -> Usage {
    Usage {
        cpu_nanos,
        working_set_bytes: 4096,
        written_bytes: 0,
    }
}

#[tokio::test(start_paused = true)]
async fn rates_come_from_the_time_between_two_askings() {
    let rig = Rig::new().await;
    rig.fake.uses("main", uses(1_000_000_000));
    let first = rig.gatherer.summary(false).await;
    let pods = first["pods"].as_array().unwrap();
    assert_eq!(pods.len(), 1, "another agent's are not ours: {first:#}");
    let main = &pods[0]["containers"][0];
    assert_eq!(main["cpu"]["usageCoreNanoSeconds"], 1_000_000_000);
    assert_eq!(main["cpu"].get("usageNanoCores"), None);
    assert_eq!(main["logs"]["usedBytes"], 12);
    // Without a cgroup the Pod is what its containers are.
    assert_eq!(pods[0]["memory"]["workingSetBytes"], 4096);

    tokio::time::advance(Duration::from_secs(10)).await;
    rig.fake.uses("main", uses(3_000_000_000));
    let second = rig.gatherer.summary(true).await;
    let main = &second["pods"][0]["containers"][0];
    assert_eq!(main["cpu"]["usageNanoCores"], 200_000_000);
    assert_eq!(second["pods"][0]["cpu"]["usageNanoCores"], 200_000_000);
    let limit = rig.gatherer.cadvisor().await;
    assert!(limit.contains("container_spec_memory_limit_bytes{container=\"main\""));
    assert!(limit.contains(" 8192 "));
}

#[tokio::test(start_paused = true)]
async fn those_who_ask_within_a_second_share_one_gathering() {
    let rig = Rig::new().await;
    rig.fake.count_looks();
    rig.fake.delay("ListContainers", Duration::from_millis(100));
    let g = &rig.gatherer;
    tokio::join!(g.summary(true), g.resource(), g.cadvisor(), g.agent());
    let one = rig.fake.count_looks();
    // `ImageFsInfo` is not in this runtime.
    assert_eq!(one, 3, "two lists and the figures");
    tokio::time::advance(Duration::from_secs(2)).await;
    g.resource().await;
    assert_eq!(rig.fake.count_looks(), one);
}

#[tokio::test]
async fn a_node_without_its_runtime_has_figures_of_its_own() {
    let rig = Rig::new().await;
    rig.fake.set_down(true);
    let text = rig.gatherer.resource().await;
    assert!(
        text.contains("\nscrape_error 1\n") && text.contains("\nnode_cpu_usage_seconds_total ")
    );
    let summary = rig.gatherer.summary(false).await;
    assert_eq!(summary["pods"], json!([]));
    assert!(
        summary["node"]["memory"]["workingSetBytes"]
            .as_u64()
            .unwrap()
            > 0
    );
}
