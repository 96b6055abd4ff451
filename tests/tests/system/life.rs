//! What happens to a Pod between its birth and its end, and what the operator is told of it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use testbed::edge::Edge;
use testbed::images::{BUSYBOX, PAUSE};
use testbed::wait::{holds_for, wait_for};
use testbed::world::{SOON, World, container_id, restarts, shell_pod};

use crate::world;

#[test]
fn the_restart_policy_decides_over_a_container_that_ended() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let edge = world.edge("policy")?;
    // The first time it fails, from then on it ends well; the volume remembers.
    let once = "[ -e /data/x ] && exit 0; touch /data/x; exit 1";
    for (name, policy, script) in [
        ("policy-once", "OnFailure", once),
        ("policy-well", "OnFailure", "exit 0"),
        ("policy-never", "Never", once),
        ("policy-always", "Always", "exit 0"),
    ] {
        let mut pod = shell_pod(name, "policy", script);
        pod["spec"]["restartPolicy"] = json!(policy);
        pod["spec"]["volumes"] = json!([{"name": "data", "emptyDir": {}}]);
        pod["spec"]["containers"][0]["volumeMounts"] =
            json!([{"name": "data", "mountPath": "/data"}]);
        world.kubectl.apply(&pod.to_string())?;
    }
    for (name, phase, count) in [
        ("policy-once", "Succeeded", 1),
        ("policy-well", "Succeeded", 0),
        ("policy-never", "Failed", 0),
    ] {
        let look = || {
            let pod = world.kubectl.json(&["get", "pod", name])?;
            ensure!(pod["status"]["phase"] == phase, "{}", pod["status"]);
            ensure!(restarts(&pod) == Some(count), "{}", pod["status"]);
            Ok(())
        };
        wait_for(name, SOON, look).with_context(|| world.story(&edge))?;
    }
    wait_for("another start of a container that ended well", SOON, || {
        let pod = world.kubectl.json(&["get", "pod", "policy-always"])?;
        ensure!(pod["status"]["phase"] == "Running", "{}", pod["status"]);
        ensure!(restarts(&pod) >= Some(1), "{}", pod["status"]);
        let last = &pod["status"]["containerStatuses"][0]["lastState"]["terminated"];
        ensure!(last["exitCode"] == 0, "{}", pod["status"]);
        Ok(())
    })
    .with_context(|| world.story(&edge))
}

#[test]
fn each_step_of_a_pods_life_is_an_event_of_it() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let edge = world.edge("events")?;
    world.sleeper("event-pod", "events")?;
    let object = world.pod_running(&edge, "event-pod")?;
    world
        .kubectl
        .ok(&["delete", "pod", "event-pod", "--wait=false"])?;
    world.pod_gone(&edge, "event-pod")?;
    for reason in ["Pulled", "Created", "Started", "Killing"] {
        let event = event_of(world, &edge, "event-pod", reason)?;
        ensure!(event["type"] == "Normal", "{event}");
        let about = &event["involvedObject"];
        ensure!(about["uid"] == object["metadata"]["uid"], "{event}");
        ensure!(about["fieldPath"] == "spec.containers{main}", "{event}");
        ensure!(event["source"]["host"] == "events", "{event}");
    }

    // An image that nobody serves: asked for, failed, and asked for again after a pause.
    let mut pod = shell_pod("event-pull", "events", "true");
    pod["spec"]["containers"][0]["image"] = json!("127.0.0.1:9/nothing:1");
    world.kubectl.apply(&pod.to_string())?;
    for (reason, kind, word) in [
        ("Pulling", "Normal", "127.0.0.1:9/nothing:1"),
        ("Failed", "Warning", ""),
        ("BackOff", "Normal", "127.0.0.1:9/nothing:1"),
    ] {
        let event = event_of(world, &edge, "event-pull", reason)?;
        ensure!(event["type"] == kind, "{event}");
        let message = event["message"].as_str().unwrap_or_default();
        ensure!(message.contains(word), "{event}");
    }
    let status = world.kubectl.json(&["get", "pod", "event-pull"])?["status"].clone();
    let reason = status["containerStatuses"][0]["state"]["waiting"]["reason"].clone();
    ensure!(
        reason == "ImagePullBackOff" || reason == "ErrImagePull",
        "{status}"
    );

    // A program that is not in the image, again and again.
    let mut pod = shell_pod("event-crash", "events", "true");
    pod["spec"]["containers"][0]["command"] = json!(["/not/there"]);
    world.kubectl.apply(&pod.to_string())?;
    for reason in ["Failed", "BackOff"] {
        let event = event_of(world, &edge, "event-crash", reason)?;
        ensure!(event["type"] == "Warning", "{event}");
    }
    Ok(())
}

#[test]
fn an_object_that_cannot_be_served_is_marked_and_the_others_go_on() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let edge = world.edge("odd")?;
    let with_volume = |name: &str, volume: Value| {
        let mut pod = shell_pod(name, "odd", "sleep 1000");
        pod["spec"]["volumes"] = json!([volume]);
        pod["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "v", "mountPath": "/v"}]);
        pod
    };
    let mut unknown_user = shell_pod("odd-user", "odd", "sleep 1000");
    unknown_user["spec"]["containers"][0]["securityContext"] = json!({"runAsNonRoot": true});
    let mut image = shell_pod("odd-image", "odd", "sleep 1000");
    image["spec"]["containers"][0]["image"] = json!("Not An Image");
    let odd = [
        // The API server takes a name that no Secret can have.
        (
            with_volume(
                "odd-name",
                json!({"name": "v", "secret": {"secretName": "No/Such Name"}}),
            ),
            "Malformed",
            "No/Such Name",
        ),
        (
            with_volume(
                "odd-kind",
                json!({"name": "v", "nfs": {"server": "192.0.2.1", "path": "/"}}),
            ),
            "FailedMount",
            "nfs",
        ),
        (
            with_volume(
                "odd-path",
                json!({"name": "v", "hostPath": {"path": "/not/there", "type": "Directory"}}),
            ),
            "FailedMount",
            "/not/there",
        ),
        (unknown_user, "Failed", "runAsNonRoot"),
        (image, "InspectFailed", "Not An Image"),
    ];
    for (pod, _, _) in &odd {
        world.kubectl.apply(&pod.to_string())?;
    }
    for (pod, reason, word) in &odd {
        let name = pod["metadata"]["name"].as_str().context("a name")?;
        let event = event_of(world, &edge, name, reason)?;
        let message = event["message"].as_str().unwrap_or_default();
        ensure!(message.contains(word), "{event}");
    }
    world.sleeper("odd-not", "odd")?;
    world.pod_running(&edge, "odd-not")?;
    for (pod, _, _) in &odd {
        let name = pod["metadata"]["name"].as_str().context("a name")?;
        let phase = world.kubectl.json(&["get", "pod", name])?["status"]["phase"].clone();
        ensure!(phase == "Pending", "{name} is {phase}");
        world.kubectl.ok(&["delete", "pod", name, "--wait=false"])?;
    }
    for (pod, _, _) in &odd {
        world.pod_gone(&edge, pod["metadata"]["name"].as_str().context("a name")?)?;
    }
    Ok(())
}

#[test]
fn a_pod_that_is_deleted_by_force_gives_way_to_the_next_of_its_name() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let edge = world.edge("force")?;
    let set = json!({
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": "force"},
        "spec": {
            "serviceName": "force",
            "selector": {"matchLabels": {"app": "force"}},
            "template": {
                "metadata": {"labels": {"app": "force"}},
                "spec": {
                    "nodeSelector": {"kubernetes.io/hostname": "force"},
                    "tolerations": [{"operator": "Exists"}],
                    "terminationGracePeriodSeconds": 2,
                    "containers": [{
                        "name": "main",
                        "image": BUSYBOX,
                        "command": ["/bin/sh", "-c",
                            "trap 'exit 0' TERM; while :; do sleep 0.1; done"],
                    }],
                },
            },
        },
    });
    world.kubectl.apply(&set.to_string())?;
    wait_for("the first", SOON, || {
        world.kubectl.ok(&["get", "pod", "force-0"])
    })?;
    let old = world.pod_running(&edge, "force-0")?;
    world.kubectl.ok(&[
        "delete",
        "pod",
        "force-0",
        "--force",
        "--grace-period=0",
        "--wait=false",
    ])?;
    let new = wait_for("the next of its name", SOON, || {
        let pod = world.kubectl.json(&["get", "pod", "force-0"])?;
        ensure!(pod["metadata"]["uid"] != old["metadata"]["uid"], "the old");
        Ok(pod)
    })?;
    let now = world.pod_running(&edge, "force-0")?;
    ensure!(
        now["metadata"]["uid"] == new["metadata"]["uid"],
        "made a third time"
    );
    let runtime = edge.containerd.as_ref().context("a runtime")?;
    wait_for("end of the old container", SOON, || {
        let left = runtime.ctr(&edge.machine, &["containers", "ls", "-q"])?;
        ensure!(!left.contains(&container_id(&old)?), "{left}");
        Ok(())
    })
    .with_context(|| world.story(&edge))?;
    holds_for("the new one", Duration::from_secs(5), || {
        let pod = world.kubectl.json(&["get", "pod", "force-0"])?;
        ensure!(
            container_id(&pod)? == container_id(&now)?,
            "it was replaced"
        );
        Ok(())
    })?;
    world.kubectl.ok(&["delete", "statefulset", "force"])?;
    world.pod_gone(&edge, "force-0")
}

#[test]
fn a_pod_that_gets_another_image_gets_another_container() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let edge = world.edge("image")?;
    let mut pod = shell_pod("image-pod", "image", "");
    let container = &mut pod["spec"]["containers"][0];
    container["command"].take();
    container["image"] = json!(PAUSE);
    world.kubectl.apply(&pod.to_string())?;
    let before = world.pod_running(&edge, "image-pod")?;
    world
        .kubectl
        .ok(&["set", "image", "pod/image-pod", &format!("main={BUSYBOX}")])?;
    wait_for("another container", SOON, || {
        let pod = world.kubectl.json(&["get", "pod", "image-pod"])?;
        let status = &pod["status"]["containerStatuses"][0];
        ensure!(status["image"] == BUSYBOX, "{status}");
        ensure!(container_id(&pod)? != container_id(&before)?, "{status}");
        ensure!(restarts(&pod) >= Some(1), "{status}");
        ensure!(
            pod["metadata"]["uid"] == before["metadata"]["uid"],
            "a new Pod"
        );
        Ok(())
    })
    .with_context(|| world.story(&edge))
}

/// Waits for an Event of a Pod.
fn event_of(world: &World, edge: &Edge, pod: &str, reason: &str) -> Result<Value> {
    let selector = format!("involvedObject.name={pod},reason={reason}");
    wait_for(&format!("Event {reason} of {pod}"), SOON, || {
        let events = world
            .kubectl
            .json(&["get", "events", "--field-selector", &selector])?;
        events["items"].get(0).cloned().context("there is none")
    })
    .with_context(|| world.story(edge))
}

#[test]
fn a_pod_that_keeps_more_on_the_disk_than_it_may_is_evicted() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let edge = world.edge("full")?;
    let fill = |to: &str| {
        format!("dd if=/dev/zero of={to}/file bs=1M count=8 2>/dev/null; exec sleep 86400")
    };
    let mut volume = shell_pod("full-volume", "full", &fill("/cache"));
    volume["spec"]["volumes"] = json!([{"name": "cache", "emptyDir": {"sizeLimit": "2Mi"}}]);
    volume["spec"]["containers"][0]["volumeMounts"] =
        json!([{"name": "cache", "mountPath": "/cache"}]);
    let mut layer = shell_pod("full-layer", "full", &fill("/tmp"));
    layer["spec"]["containers"][0]["resources"] = json!({"limits": {"ephemeral-storage": "2Mi"}});
    for (pod, named) in [
        (volume, "\"cache\" holds 8.0 MiB"),
        (layer, "\"main\" keeps 8.0 MiB"),
    ] {
        world.kubectl.apply(&pod.to_string())?;
        let name = pod["metadata"]["name"].as_str().unwrap_or_default();
        let status = wait_for("an evicted Pod", Duration::from_secs(90), || {
            let pod = world.kubectl.json(&["get", "pod", name])?;
            ensure!(pod["status"]["phase"] == "Failed", "{}", pod["status"]);
            Ok(pod["status"].clone())
        })
        .with_context(|| world.story(&edge))?;
        ensure!(status["reason"] == "Evicted", "{status}");
        let message = status["message"].as_str().unwrap_or_default();
        ensure!(message.contains(named), "{status}");
        let of_pod = format!("involvedObject.name={name},reason=Evicted");
        wait_for("its Event", SOON, || {
            let events = ["get", "events", "--field-selector", &of_pod, "-o", "name"];
            ensure!(!world.kubectl.ok(&events)?.is_empty(), "there is none");
            Ok(())
        })
        .with_context(|| world.story(&edge))?;
    }
    Ok(())
}
