//! What a node says of itself: by `kubectl proxy`, by `get --raw`, to the metrics-server.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::edge::Transport;
use testbed::wait::wait_for;
use testbed::world::SOON;

use super::{MOMENT, Place, found, place};
#[test]
fn the_node_answers_what_it_is_asked_by_way_of_the_api_server() -> Result<()> {
    for transport in [Transport::Quic, Transport::Websocket] {
        let place = place(transport)?;
        let pod = place.shell("described", "while :; do :; done")?;
        describes(&place, &pod).with_context(|| place.story())?;
        place.kubectl.ok(&["delete", "pod", &pod, "--wait=false"])?;
    }
    Ok(())
}

fn describes(place: &Place, pod: &str) -> Result<()> {
    ensure!(place.proxied("healthz")? == "ok");
    for path in ["pods", "runningpods/"] {
        let list: Value = serde_json::from_str(&place.proxied(path)?)?;
        let names = list["items"].as_array().context("a list")?.iter();
        let mut names = names.map(|pod| &pod["metadata"]["name"]);
        ensure!(names.any(|name| name == pod), "{path}: {list}");
    }
    let config: Value = serde_json::from_str(&place.proxied("configz")?)?;
    ensure!(config["kubeletconfig"].is_object(), "{config}");
    wait_for("figures of the Pod", SOON, || has_figures(place, pod))?;
    let path = format!("/api/v1/nodes/{}/proxy/no-such-thing", place.node);
    let said = place.kubectl.run(&["get", "--raw", &path])?;
    ensure!(
        said.code != 0 && said.stderr.contains("NotFound"),
        "{said:?}"
    );
    Ok(())
}

/// A Pod that works all the time has used some of both in every document.
fn has_figures(place: &Place, pod: &str) -> Result<()> {
    let summary: Value = serde_json::from_str(&place.proxied("stats/summary")?)?;
    let node = &summary["node"];
    ensure!(node["nodeName"] == place.node, "{node}");
    ensure!(
        node["cpu"]["usageCoreNanoSeconds"].as_u64() > Some(0),
        "{node}"
    );
    ensure!(
        node["memory"]["workingSetBytes"].as_u64() > Some(0),
        "{node}"
    );
    ensure!(node["fs"]["capacityBytes"].as_u64() > Some(0), "{node}");
    let pods = summary["pods"].as_array().context("pods")?;
    let found = pods.iter().find(|one| one["podRef"]["name"] == pod);
    let found = found.with_context(|| format!("not in {pods:?}"))?;
    let container = &found["containers"][0];
    ensure!(container["name"] == "main", "{found}");
    let cpu = container["cpu"]["usageCoreNanoSeconds"].as_u64();
    ensure!(cpu > Some(100_000_000), "{found}");
    ensure!(
        container["memory"]["workingSetBytes"].as_u64() > Some(0),
        "{found}"
    );

    let figures = place.proxied("metrics/resource")?;
    let own = format!("pod=\"{pod}\"");
    for (name, word) in [
        ("node_cpu_usage_seconds_total", ""),
        ("node_memory_working_set_bytes", ""),
        ("container_cpu_usage_seconds_total", &own[..]),
        ("container_memory_working_set_bytes", &own),
        ("container_start_time_seconds", &own),
        ("pod_cpu_usage_seconds_total", &own),
        ("pod_memory_working_set_bytes", &own),
    ] {
        let found = value(&figures, name, word)?;
        ensure!(found > 0.0, "{name} {word}: {found}");
    }
    let figures = place.proxied("metrics/cadvisor")?;
    for name in [
        "container_cpu_usage_seconds_total",
        "container_memory_working_set_bytes",
    ] {
        let found = value(&figures, name, &own)?;
        ensure!(found > 0.0, "{name}: {found}");
    }
    ensure!(value(&figures, "machine_cpu_cores", "")? >= 1.0);
    Ok(())
}

/// The value of the first sample of that name whose line has `word` (the text format of Prometheus:
/// name, labels, value, milliseconds).
fn value(document: &str, name: &str, word: &str) -> Result<f64> {
    let of_name = |line: &&str| {
        line.strip_prefix(name)
            .is_some_and(|rest| rest.starts_with(['{', ' ']) && rest.contains(word))
    };
    let line = document
        .lines()
        .find(of_name)
        .with_context(|| format!("no {name} with {word:?} in {document}"))?;
    let behind = line.rsplit_once('}').map_or(line, |(_, rest)| rest);
    let word = behind.trim_start_matches(name).split_whitespace().next();
    Ok(word.context("no value")?.parse()?)
}

#[test]
fn kubectl_proxy_leads_to_the_node() -> Result<()> {
    let place = place(Transport::Quic)?;
    let mut proxy = place.kubectl.start(&["proxy", "--port=0"])?;
    let said = proxy.sees("\n", MOMENT)?;
    let address = said.trim().rsplit(' ').next().context("an address")?;
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(MOMENT))?;
    write!(
        stream,
        "GET /api/v1/nodes/{}/proxy/healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        place.node
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(
        answer.starts_with("HTTP/1.1 200") && answer.trim_end().ends_with("ok"),
        "{answer}"
    );
    Ok(())
}

/// It asks with the rights of metrics-server's own manifest: `nodes/metrics`, and a token.
#[test]
fn kubectl_top_shows_nodes_and_pods() -> Result<()> {
    let stay = place(Transport::Quic)?;
    let places = [&*stay, found(Transport::Websocket)?];
    let mut server = (places[0].metrics_server)()?;
    let mut pods = Vec::new();
    for place in &places {
        pods.push(place.shell("topped", "while :; do :; done")?);
    }
    for (place, pod) in places.iter().zip(&pods) {
        // Two scrapes 10 s apart, and the first waits for the Pod.
        wait_for(
            &format!("figures of {pod}"),
            Duration::from_secs(90),
            || {
                server.ensure_running()?;
                let node = place.kubectl.ok(&["top", "node", &place.node])?;
                busy(&node, &place.node)?;
                let said = place.kubectl.ok(&["top", "pod", pod, "--containers"])?;
                busy(&said, pod)
            },
        )
        .with_context(|| server.tail(20))
        .with_context(|| place.story())?;
    }
    for (place, pod) in places.iter().zip(&pods) {
        place.kubectl.ok(&["delete", "pod", pod, "--wait=false"])?;
    }
    Ok(())
}

/// Reads a table of `kubectl top`: the row that begins with `name` has used CPU and memory.
fn busy(table: &str, name: &str) -> Result<()> {
    let mut rows = table.lines();
    let row = rows.find(|row| row.split_whitespace().next() == Some(name));
    let row = row.with_context(|| format!("no {name} in {table}"))?;
    let figure = |unit: &str| {
        let mut words = row.split_whitespace().skip(1);
        words.find_map(|word| word.strip_suffix(unit)?.parse::<u64>().ok())
    };
    ensure!(figure("m") > Some(0) && figure("Mi").is_some(), "{table}");
    Ok(())
}
