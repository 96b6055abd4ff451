//! What an operator does with plain kubectl.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use testbed::images::BUSYBOX;
use testbed::wait::wait_for;
use testbed::world::{SOON, World, container_id, restarts, shell_pod};

use crate::world;

#[test]
fn a_deployment_runs_where_the_scheduler_puts_it() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    deployment_comes_and_goes(world, "deploy")
}

/// Shared with the test on the oldest control plane.
pub(crate) fn deployment_comes_and_goes(world: &World, node: &str) -> Result<()> {
    let edge = world.edge(node)?;
    let app = format!("web-{node}");
    let deployment = json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": app},
        "spec": {
            "replicas": 2,
            "selector": {"matchLabels": {"app": app}},
            "template": {
                "metadata": {"labels": {"app": app}},
                "spec": {
                    "nodeSelector": {"kubernetes.io/hostname": node},
                    "tolerations": [{"key": "node-role.kubernetes.io/edge", "operator": "Exists"}],
                    "terminationGracePeriodSeconds": 1,
                    "containers": [{
                        "name": "web",
                        "image": BUSYBOX,
                        "command": ["/bin/httpd", "-f", "-p", "8080", "-h", "/etc"],
                    }],
                },
            },
        },
    });
    world.kubectl.apply(&deployment.to_string())?;
    let target = format!("deployment/{app}");
    world
        .kubectl
        .ok(&["rollout", "status", &target, "--timeout=60s"])
        .with_context(|| world.story(&edge))?;

    let selector = format!("app={app}");
    let pods = world.kubectl.json(&["get", "pods", "-l", &selector])?;
    let pods = pods["items"].as_array().context("a list")?;
    ensure!(pods.len() == 2, "{pods:?}");
    for pod in pods {
        let ip = pod["status"]["podIP"].as_str().context("a Pod's address")?;
        let url = format!("http://{ip}:8080/passwd");
        let page = edge
            .machine
            .exec(&["busybox", "wget", "-q", "-O", "-", &url])?;
        ensure!(page.contains("root:"), "{page}");
    }
    world.kubectl.ok(&["scale", &target, "--replicas=0"])?;
    wait_for("end of the Pods", SOON, || {
        let left = world
            .kubectl
            .ok(&["get", "pods", "-l", &selector, "-o", "name"])?;
        ensure!(left.is_empty(), "{left}");
        Ok(())
    })
    .with_context(|| world.story(&edge))?;
    world.kubectl.ok(&["delete", &target])?;
    no_containers(&edge)
}

#[test]
fn a_configmap_edit_reaches_the_file_without_a_restart() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    configmap_reaches_the_file(world, "config")
}

/// Shared with the test on the oldest control plane.
pub(crate) fn configmap_reaches_the_file(world: &World, node: &str) -> Result<()> {
    let edge = world.edge(node)?;
    let name = format!("settings-{node}");
    world
        .kubectl
        .ok(&["create", "configmap", &name, "--from-literal=level=low"])?;
    let mut pod = shell_pod(&name, node, "sleep 1000");
    pod["spec"]["volumes"] = json!([{"name": "settings", "configMap": {"name": name}}]);
    pod["spec"]["containers"][0]["volumeMounts"] =
        json!([{"name": "settings", "mountPath": "/settings"}]);
    pod["spec"]["containers"][0]["env"] = json!([{"name": "LEVEL", "valueFrom": {"configMapKeyRef": {"name": name, "key": "level"}}}]);
    world.kubectl.apply(&pod.to_string())?;
    let before = world.pod_running(&edge, &name)?;
    let read = || world.in_pod(&edge, &name, &["/bin/cat", "/settings/level"]);
    ensure!(read()? == "low");

    let begun = Instant::now();
    world.kubectl.ok(&[
        "patch",
        "configmap",
        &name,
        "-p",
        r#"{"data":{"level":"high"}}"#,
    ])?;
    wait_for("the new value in the file", Duration::from_secs(15), || {
        let value = read()?;
        ensure!(value == "high", "{value}");
        Ok(())
    })
    .with_context(|| world.story(&edge))?;
    println!(
        "ConfigMap edit to file, kubectl and ctr included: {:?}",
        begun.elapsed()
    );
    let after = world.kubectl.json(&["get", "pod", &name])?;
    ensure!(
        container_id(&before)? == container_id(&after)?,
        "the container was replaced"
    );
    ensure!(restarts(&after) == Some(0), "{}", after["status"]);
    world
        .kubectl
        .ok(&["delete", "pod", &name, "--wait=false"])?;
    world.pod_gone(&edge, &name)
}

#[test]
fn a_secret_is_mounted_and_a_missing_one_is_waited_for() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    secret_is_mounted(world, "secret")
}

/// CloudCore acts as the node for it where the API server lets it, and else by its narrow role.
pub(crate) fn secret_is_mounted(world: &World, node: &str) -> Result<()> {
    let edge = world.edge(node)?;
    let mut pod = shell_pod("secret-pod", node, "sleep 1000");
    pod["spec"]["volumes"] = json!([{"name": "key", "secret": {"secretName": "the-key"}}]);
    pod["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "key", "mountPath": "/key"}]);
    world.kubectl.apply(&pod.to_string())?;
    wait_for("an Event of the missing Secret", SOON, || {
        let selector = "involvedObject.name=secret-pod,reason=FailedMount";
        let events = world
            .kubectl
            .ok(&["get", "events", "--field-selector", selector])?;
        ensure!(events.contains("the-key"), "{events}");
        Ok(())
    })
    .with_context(|| world.story(&edge))?;
    world.kubectl.ok(&[
        "create",
        "secret",
        "generic",
        "the-key",
        "--from-literal=word=sesame",
    ])?;
    world.pod_running(&edge, "secret-pod")?;
    ensure!(world.in_pod(&edge, "secret-pod", &["/bin/cat", "/key/word"])? == "sesame");
    let account = "system:serviceaccount:edge-system:cloudcore";
    let may = |verb, what| {
        let asked = ["auth", "can-i", verb, what, "--as", account];
        let said = world.kubectl.run(&asked)?;
        Ok::<_, anyhow::Error>(said.stdout.trim() == "yes")
    };
    // As a node it may what a Pod that names the Secret entitles that to, and nothing itself.
    let direct = world.cloud().text().contains("mode=Direct");
    ensure!(may("get", "secret/the-key")? == direct, "get");
    for (verb, what) in [
        ("update", "secrets"),
        ("delete", "secrets"),
        ("create", "pods"),
        ("create", "pods/exec"),
        ("delete", "deployments"),
    ] {
        ensure!(!may(verb, what)?, "CloudCore itself may {verb} {what}");
    }
    ensure!(
        !world.cloud().text().contains("sesame") && !edge.text().contains("sesame"),
        "a Secret's value is in a log"
    );
    Ok(())
}

#[test]
fn a_deleted_pod_goes_when_its_containers_have_ended_and_not_before() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let edge = world.edge("delete")?;
    // It takes three seconds to end, and says so on the way out.
    let script = "trap 'sleep 3; echo bye >/data/end; exit 0' TERM; touch /data/up; \
                  while :; do sleep 0.1; done";
    let mut pod = shell_pod("slow-end", "delete", script);
    pod["spec"]["terminationGracePeriodSeconds"] = json!(20);
    pod["spec"]["volumes"] = json!([
        {"name": "data", "hostPath": {"path": "/var/lib/slow-end", "type": "DirectoryOrCreate"}}
    ]);
    pod["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "data", "mountPath": "/data"}]);
    world.kubectl.apply(&pod.to_string())?;
    world.pod_running(&edge, "slow-end")?;
    wait_for("trap", SOON, || {
        edge.machine.exec(&["ls", "/var/lib/slow-end/up"])
    })?;

    let begun = Instant::now();
    world
        .kubectl
        .ok(&["delete", "pod", "slow-end", "--wait=false"])?;
    world.pod_gone(&edge, "slow-end")?;
    let took = begun.elapsed();
    ensure!(
        took > Duration::from_secs(3),
        "gone after {took:?}, before its end"
    );
    ensure!(took < Duration::from_secs(15), "gone after {took:?}");
    let said = edge.machine.exec(&["cat", "/var/lib/slow-end/end"])?;
    ensure!(said.trim() == "bye", "{said}");
    no_containers(&edge)
}

#[test]
fn a_pod_that_ends_says_how() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let edge = world.edge("ends")?;
    for (name, script, phase, code) in [
        ("ends-well", "exit 0", "Succeeded", 0),
        ("ends-badly", "exit 3", "Failed", 3),
    ] {
        let mut pod = shell_pod(name, "ends", script);
        pod["spec"]["restartPolicy"] = json!("Never");
        world.kubectl.apply(&pod.to_string())?;
        let status = wait_for(&format!("{name} {phase}"), SOON, || {
            let object = world.kubectl.json(&["get", "pod", name])?;
            ensure!(object["status"]["phase"] == phase, "{}", object["status"]);
            Ok(object["status"].clone())
        })
        .with_context(|| world.story(&edge))?;
        let end = &status["containerStatuses"][0]["state"]["terminated"];
        ensure!(end["exitCode"] == code, "{status}");
    }
    Ok(())
}

#[test]
fn a_container_that_crashes_is_started_again_with_growing_pauses() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let edge = world.edge("crash")?;
    world
        .kubectl
        .apply(&shell_pod("crasher", "crash", "exit 1").to_string())?;
    wait_for("CrashLoopBackOff", Duration::from_secs(90), || {
        let pod = world.kubectl.json(&["get", "pod", "crasher"])?;
        let status = &pod["status"]["containerStatuses"][0];
        ensure!(status["restartCount"].as_u64() >= Some(1), "{status}");
        ensure!(
            status["state"]["waiting"]["reason"] == "CrashLoopBackOff",
            "{status}"
        );
        Ok(())
    })
    .with_context(|| world.story(&edge))
}

/// Nothing is left in the node's runtime: neither a container nor a sandbox.
fn no_containers(edge: &testbed::edge::Edge) -> Result<()> {
    let runtime = edge
        .containerd
        .as_ref()
        .context("the edge has no containerd")?;
    wait_for("end of the containers", SOON, || {
        let left = runtime.ctr(&edge.machine, &["containers", "ls", "-q"])?;
        ensure!(left.trim().is_empty(), "{left}");
        Ok(())
    })
    .with_context(|| edge.tail(40))
}
