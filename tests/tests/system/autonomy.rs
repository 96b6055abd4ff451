//! The device keeps doing its job: when the agent restarts, when the link is cut, when the cloud
//! is away at boot.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use testbed::edge::Edge;
use testbed::wait::{holds_for, wait_for};
use testbed::world::{SOON, condition, container_id, restarts, shell_pod};

use crate::world;

#[test]
fn killing_edgecore_restarts_no_container() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let mut edge = world.edge("adopt")?;
    world.sleeper("adopted", "adopt")?;
    let before = world.pod_running(&edge, "adopted")?;
    let started = before["status"]["containerStatuses"][0]["state"]["running"].clone();

    edge.kill();
    ensure!(
        running(&edge)?.contains(&container_id(&before)?),
        "the container ended with edgecore"
    );
    edge.start()?;
    // A second Pod comes up: by then the agent has looked at everything that it found.
    world.sleeper("adopted-2", "adopt")?;
    world.pod_running(&edge, "adopted-2")?;
    let after = world.same_container(&edge, &before)?;
    ensure!(restarts(&after) == Some(0), "{}", after["status"]);
    ensure!(after["status"]["containerStatuses"][0]["state"]["running"] == started);

    // And one that ended while nobody looked is started again.
    edge.kill();
    let runtime = edge
        .containerd
        .as_ref()
        .context("the edge has no containerd")?;
    runtime.ctr(
        &edge.machine,
        &["tasks", "kill", "-s", "SIGKILL", &container_id(&after)?],
    )?;
    edge.start()?;
    wait_for("a restart", SOON, || {
        let pod = world.kubectl.json(&["get", "pod", "adopted"])?;
        ensure!(restarts(&pod) == Some(1), "{}", pod["status"]);
        ensure!(
            condition(&pod, "Ready") == Some("True"),
            "{}",
            pod["status"]
        );
        Ok(())
    })
    .with_context(|| world.story(&edge))
}

#[test]
fn a_cut_link_evicts_nothing_and_what_changed_meanwhile_arrives_after_it() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let mut edge = world.edge("cut")?;
    world.kubectl.ok(&[
        "create",
        "configmap",
        "cut-config",
        "--from-literal=level=low",
    ])?;
    let mut stays = shell_pod("cut-stays", "cut", "sleep 1000");
    stays["spec"]["volumes"] = json!([{"name": "c", "configMap": {"name": "cut-config"}}]);
    stays["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "c", "mountPath": "/c"}]);
    world.kubectl.apply(&stays.to_string())?;
    world.sleeper("cut-goes", "cut")?;
    let before = world.pod_running(&edge, "cut-stays")?;
    let doomed = container_id(&world.pod_running(&edge, "cut-goes")?)?;

    edge.machine.cut()?;
    world.kubectl.ok(&[
        "patch",
        "configmap",
        "cut-config",
        "-p",
        r#"{"data":{"level":"high"}}"#,
    ])?;
    world.sleeper("cut-comes", "cut")?;
    world
        .kubectl
        .ok(&["delete", "pod", "cut-goes", "--wait=false"])?;
    // The half-dead link is noticed within 45 s; the cluster gives the node another 24 s.
    wait_for("the node to be missed", Duration::from_secs(120), || {
        let node = world.kubectl.json(&["get", "node", "cut"])?;
        match condition(&node, "Ready") {
            Some("True") | None => bail!("{}", node["status"]["conditions"]),
            Some(_) => Ok(()),
        }
    })
    .with_context(|| world.story(&edge))?;
    // Without autonomy the Pods would now have five seconds.
    holds_for("no eviction", Duration::from_secs(12), || {
        let pod = world.kubectl.json(&["get", "pod", "cut-stays"])?;
        ensure!(
            pod["metadata"]["deletionTimestamp"].is_null(),
            "{}",
            pod["status"]
        );
        Ok(())
    })?;
    let there = running(&edge)?;
    ensure!(
        there.contains(&container_id(&before)?) && there.contains(&doomed),
        "{there:?}"
    );

    let begun = Instant::now();
    edge.machine.restore()?;
    world.node_ready(&mut edge)?;
    println!("link back to node Ready: {:?}", begun.elapsed());
    world.pod_gone(&edge, "cut-goes")?;
    world.pod_running(&edge, "cut-comes")?;
    wait_for("the new value in the file", SOON, || {
        let value = world.in_pod(&edge, "cut-stays", &["/bin/cat", "/c/level"])?;
        ensure!(value == "high", "{value}");
        Ok(())
    })
    .with_context(|| world.story(&edge))?;
    println!("link back to all changes applied: {:?}", begun.elapsed());
    let after = world.same_container(&edge, &before)?;
    ensure!(restarts(&after) == Some(0), "{}", after["status"]);
    Ok(())
}

#[test]
fn a_device_that_boots_without_the_cloud_starts_its_pods() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let mut edge = world.edge("offline")?;
    world.kubectl.ok(&[
        "create",
        "configmap",
        "offline-config",
        "--from-literal=level=low",
    ])?;
    let mut pod = shell_pod("offline-pod", "offline", "sleep 1000");
    pod["spec"]["volumes"] = json!([{"name": "c", "configMap": {"name": "offline-config"}}]);
    pod["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "c", "mountPath": "/c"}]);
    world.kubectl.apply(&pod.to_string())?;
    world.pod_running(&edge, "offline-pod")?;

    edge.machine.cut()?;
    edge.power_cycle()?;
    ensure!(
        running(&edge)?.is_empty(),
        "a container outlived the power cut"
    );
    let begun = Instant::now();
    edge.start()?;
    wait_for("the Pod's container", Duration::from_secs(30), || {
        edge.ensure_running()?;
        // The sandbox and the container.
        let there = running(&edge)?;
        ensure!(there.len() == 2, "{there:?}");
        Ok(())
    })
    .with_context(|| edge.tail(40))?;
    println!(
        "offline boot, start of the agent to the Pod running: {:?}",
        begun.elapsed()
    );

    edge.machine.restore()?;
    world.node_ready(&mut edge)?;
    wait_for("the restart in the API", SOON, || {
        let pod = world.kubectl.json(&["get", "pod", "offline-pod"])?;
        ensure!(
            condition(&pod, "Ready") == Some("True"),
            "{}",
            pod["status"]
        );
        ensure!(
            running(&edge)?.contains(&container_id(&pod)?),
            "{}",
            pod["status"]
        );
        Ok(())
    })
    .with_context(|| world.story(&edge))?;
    ensure!(world.in_pod(&edge, "offline-pod", &["/bin/cat", "/c/level"])? == "low");
    Ok(())
}

/// The ids of what runs in the node's runtime: sandboxes and containers.
fn running(edge: &Edge) -> Result<Vec<String>> {
    let runtime = edge
        .containerd
        .as_ref()
        .context("the edge has no containerd")?;
    let table = runtime.ctr(&edge.machine, &["tasks", "ls"])?;
    let rows = table.lines().filter(|row| row.contains("RUNNING"));
    Ok(rows
        .filter_map(|row| row.split_whitespace().next())
        .map(str::to_owned)
        .collect())
}
