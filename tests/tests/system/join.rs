//! A device becomes a Node, or is told in one line why not.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use testbed::edge::Edge;
use testbed::wait::wait_for;
use testbed::world::SOON;

use crate::world;

/// The fields of a token's message (common/proto/hub.proto, `Token`).
const SECRET: u64 = 2;
const PIN: u64 = 3;

#[test]
fn a_device_joins_and_its_node_has_the_right_labels() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let mut edge = world.machine("join-1")?;
    let node = world.join(
        &mut edge,
        &["--labels", "topology.kubernetes.io/zone=shop-7"],
    )?;

    let labels = &node["metadata"]["labels"];
    for (label, value) in [
        ("node-role.kubernetes.io/edge", ""),
        ("node-role.kubernetes.io/agent", ""),
        ("kubernetes.io/hostname", "join-1"),
        ("kubernetes.io/os", "linux"),
        (
            "kubernetes.io/arch",
            if cfg!(target_arch = "x86_64") {
                "amd64"
            } else {
                "arm64"
            },
        ),
        ("topology.kubernetes.io/zone", "shop-7"),
    ] {
        ensure!(labels[label] == value, "label {label}: {labels}");
    }
    let info = &node["status"]["nodeInfo"];
    ensure!(
        info["containerRuntimeVersion"]
            .as_str()
            .is_some_and(|v| v.starts_with("containerd://")),
        "{info}"
    );
    ensure!(
        node["status"]["allocatable"]["pods"].is_string(),
        "{}",
        node["status"]
    );
    ensure!(
        node["spec"]["providerID"]
            .as_str()
            .is_some_and(|id| id.starts_with("edge://")),
        "{}",
        node["spec"]
    );
    Ok(())
}

#[test]
fn the_same_line_may_be_pasted_again() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let mut edge = world.machine("join-2")?;
    let invitation = world.cloud().invite(&[])?;
    edge.join(&invitation)?;
    world.node_ready(&mut edge)?;
    edge.stop()?;
    edge.join(&invitation)?;
    wait_for("session", Duration::from_secs(30), || {
        edge.ensure_running()?;
        let list = world.cloud().command(&["node", "list"])?;
        ensure!(list.contains("join-2"), "{list}");
        Ok(())
    })?;
    world.node_ready(&mut edge)?;

    // Nor does a token that is of no use any more keep it from its Pods.
    let other = world.cloud().invite(&["--ttl", "1s"])?;
    std::thread::sleep(Duration::from_millis(1500));
    edge.stop()?;
    edge.join(&other)?;
    wait_for("the refusal", SOON, || {
        edge.ensure_running()?;
        let said = edge.text();
        ensure!(said.contains("goes on with what it has"), "{said}");
        Ok(())
    })?;
    world.sleeper("after-refusal", "join-2")?;
    world.pod_running(&edge, "after-refusal")?;
    Ok(())
}

#[test]
fn each_refusal_has_its_own_line_and_its_own_exit_code() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let mut first = world.machine("taken")?;
    let used = world.cloud().invite(&[])?;
    first.join(&used)?;
    world.node_ready(&mut first)?;
    let foreign = r#"{"apiVersion":"v1","kind":"Node","metadata":{"name":"foreign"}}"#;
    world.kubectl.apply(foreign)?;

    let mut edge = Edge::bare(&world.backbone, "refused")?;
    let fresh = world.cloud().invite(&[])?;
    let expired = world.cloud().invite(&["--ttl", "1s"])?;
    // The token's own second has to pass on the cloud's clock.
    std::thread::sleep(Duration::from_millis(1500));
    let wrong = (altered(&fresh.token, SECRET)?, altered(&fresh.token, PIN)?);
    let (taken, foreign) = (fresh.token.clone(), fresh.token.clone());
    // What the device ends with and is told to do, and what the cloud calls it.
    let trials = [
        ("wrong-token", wrong.0, 21, "token create", "TOKEN_UNKNOWN"),
        ("wrong-ca", wrong.1, 7, "make a new one", "token create"),
        ("late", expired.token, 22, "token create", "TOKEN_EXPIRED"),
        ("second", used.token, 23, "token create", "TOKEN_USED"),
        ("taken", taken, 25, "--name", "NAME_TAKEN"),
        ("foreign", foreign, 26, "--name", "NAME_FOREIGN"),
    ];
    let mut lines = HashMap::new();
    for (name, token, wanted, remedy, called) in trials {
        edge.name = name.to_owned();
        let (code, said) = edge.join_refused(&fresh.join, &token)?;
        let line = said
            .lines()
            .rfind(|line| !line.trim().is_empty())
            .unwrap_or_default();
        println!("{name}: exit code {code}: {line}");
        ensure!(code == wanted, "{name}: exit code {code}: {said}");
        ensure!(line.contains(remedy), "{name}: {line}");
        if let Some(other) = lines.insert(line.to_owned(), name) {
            panic!("{name} and {other} are told the same: {line}");
        }
        // A device that pins another CA never gets as far as saying a name.
        let named = match name {
            "wrong-ca" => "handshake refused".to_owned(),
            _ => format!("name=\"{name}\""),
        };
        wait_for("cloudcore's line", SOON, || {
            let log = world.cloud().text();
            let mut lines = log.lines();
            lines
                .find(|line| line.contains(&named) && line.contains(called))
                .map(drop)
                .with_context(|| format!("nothing of {named} and {called}"))
        })?;
    }
    ensure!(
        !world.cloud().text().contains(&fresh.token),
        "a token is in cloudcore's log"
    );
    world.kubectl.ok(&["delete", "node", "foreign"])?;

    // None of it used the token up: the device can still join with it.
    edge.name = "welcome-at-last".to_owned();
    edge.join(&fresh)?;
    wait_for("Node", Duration::from_secs(30), || {
        edge.ensure_running()?;
        world.kubectl.json(&["get", "node", "welcome-at-last"])
    })
    .with_context(|| world.story(&edge))?;
    Ok(())
}

#[test]
fn a_token_for_one_name_serves_no_other() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let mut edge = Edge::bare(&world.backbone, "other-name")?;
    let invitation = world.cloud().invite(&["--node", "this-name"])?;
    let (code, said) = edge.join_refused(&invitation.join, &invitation.token)?;
    ensure!(
        code > 0 && said.contains("this-name"),
        "exit code {code}: {said}"
    );
    Ok(())
}

#[test]
fn a_token_admits_as_many_devices_as_it_says_and_gives_their_nodes_its_taints() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let flags = ["--uses", "2", "--taints", "shop=7:NoExecute"];
    let invitation = world.cloud().invite(&flags)?;
    let mut edges = [world.machine("uses-1")?, world.machine("uses-2")?];
    for edge in &mut edges {
        edge.join(&invitation)?;
        let node = world.node_ready(edge)?;
        let taints = node["spec"]["taints"].to_string();
        ensure!(
            taints.contains(r#""effect":"NoExecute","key":"shop""#),
            "{taints}"
        );
    }
    let mut third = Edge::bare(&world.backbone, "uses-3")?;
    let (_, said) = third.join_refused(&invitation.join, &invitation.token)?;
    ensure!(said.contains("2 of 2"), "{said}");

    // A token that was ended admits nobody, and who joined with it stays.
    let id = said
        .split_whitespace()
        .skip_while(|word| *word != "token")
        .nth(1)
        .context("the token's id")?
        .to_owned();
    world.cloud().command(&["token", "revoke", &id])?;
    let list = world.cloud().command(&["token", "list"])?;
    ensure!(!list.contains(&id), "{list}");
    for edge in &mut edges {
        edge.kill();
        edge.start()?;
        world.node_ready(edge)?;
    }
    Ok(())
}

#[test]
fn a_node_deleted_by_somebody_else_is_made_again_and_its_pods_go_on() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let mut edge = world.edge("remade")?;
    world
        .kubectl
        .apply(&testbed::world::shell_pod("remade-pod", "remade", "sleep 1000").to_string())?;
    let pod = world.pod_running(&edge, "remade-pod")?;
    // What an operator has said of the Node is not forgotten with it.
    world
        .kubectl
        .ok(&["label", "node", "remade", "team=blue"])?;
    world
        .kubectl
        .ok(&["taint", "node", "remade", "keep=out:NoSchedule"])?;
    world.kubectl.ok(&["cordon", "remade"])?;
    let old = world.kubectl.json(&["get", "node", "remade"])?;
    world
        .kubectl
        .ok(&["delete", "node", "remade", "--wait=false"])?;
    wait_for("new Node", Duration::from_secs(30), || {
        let node = world.kubectl.json(&["get", "node", "remade"])?;
        ensure!(
            node["metadata"]["uid"] != old["metadata"]["uid"],
            "it is the old one"
        );
        Ok(())
    })
    .with_context(|| world.story(&edge))?;
    let node = world.node_ready(&mut edge)?;
    ensure!(node["metadata"]["labels"]["team"] == "blue", "{node}");
    ensure!(node["spec"]["unschedulable"] == true, "{}", node["spec"]);
    let taints = node["spec"]["taints"].to_string();
    ensure!(taints.contains("\"keep\""), "{taints}");
    ensure!(
        node["spec"]["providerID"] == old["spec"]["providerID"],
        "{}",
        node["spec"]
    );
    let after = world.pod_running(&edge, "remade-pod")?;
    ensure!(
        after["metadata"]["uid"] == pod["metadata"]["uid"],
        "the Pod was replaced"
    );
    ensure!(
        testbed::world::container_id(&after)? == testbed::world::container_id(&pod)?,
        "the container was replaced"
    );
    Ok(())
}

/// The token with one bit of one field turned: everything else stays as it was.
fn altered(token: &str, field: u64) -> Result<String> {
    let (kind, body) = token
        .split_once('.')
        .context("a token has a kind and a body")?;
    let mut bytes = URL_SAFE_NO_PAD.decode(body)?;
    let mut at = 0;
    while at < bytes.len() {
        // Numbers and lengths in a token are below 128: one byte each.
        let (number, wire) = (u64::from(bytes[at] >> 3), bytes[at] & 7);
        ensure!(
            wire == 2,
            "a token has only length-delimited fields at its top"
        );
        let length = usize::from(*bytes.get(at + 1).context("truncated")?);
        ensure!(length < 128 && at + 2 + length <= bytes.len(), "truncated");
        if number == field {
            bytes[at + 2 + length / 2] ^= 1;
            return Ok(format!("{kind}.{}", URL_SAFE_NO_PAD.encode(bytes)));
        }
        at += 2 + length;
    }
    anyhow::bail!("the token has no field {field}")
}
