//! How late a Pod's status reaches the API while a copy fills a thin link.
//!
//! The copy goes the same way as the statuses, from the device to the cloud, which is the worse one.
//! It is of a file of 1 GB and runs for as long as the samples take (75 of them: about 90 s); a
//! whole GB would take a quarter of an hour on each transport and add nothing but samples.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::Flags;
use super::pods::{Turn, resting_pod};
use super::rig::{Rig, Side};
use super::table::{Row, milliseconds, p50, quantile, show_ms};
use crate::bed::progress;
use crate::relay::{Direction, Relay, Shape};
use crate::running::Running;
use crate::wait::wait_for;

/// 10 Mbit/s each way, and the delay of a mobile network.
const LINK: Direction = Direction {
    delay: Duration::from_millis(20),
    loss: 0,
    rate: Some(1_250_000),
};

/// The directory on the device where a Pod waits for its end: there and in its containers.
const ON_DEVICE: &str = "/var/lib/busy";
const IN_POD: &str = "/end";

/// Between two samples.
const PAUSE: Duration = Duration::from_secs(1);
/// Bytes of the copy that have crossed before the first sample.
const FLOWING: u64 = 3_000_000;
/// How long one status may take before the measure is given up.
const LIMIT: Duration = Duration::from_secs(60);

/// One row for each transport.
pub fn statuses(flags: &Flags, rig: &mut Rig) -> Vec<Row> {
    let bar = "<= 1 s";
    let mut rows = Vec::new();
    for side in [Side::Quic, Side::Websocket] {
        progress(&format!("    statuses beside a copy, {}", side.word()));
        let name = format!(
            "status beside a copy at 10 Mbit/s, p99 of {}, {}",
            flags.statuses,
            side.word()
        );
        let row = match beside_copy(flags, rig, side) {
            Ok(found) => {
                let late = quantile(&found.late, 0.99);
                let row = Row::new(&name, bar).beside(late, None, show_ms);
                row.judged(late, 1000.0).noted(format!(
                    "p50 {}; without the copy p50 {}; the copy had {:.1} Mbit/s meanwhile",
                    p50(&found.late).map(show_ms).unwrap_or_default(),
                    p50(&found.alone).map(show_ms).unwrap_or_default(),
                    found.rate * 8.0 / 1e6
                ))
            }
            Err(error) => Row::broken(&name, bar, &error),
        };
        rows.push(row);
    }
    rows
}

struct Found {
    /// Milliseconds, beside the copy and before it.
    late: Vec<f64>,
    alone: Vec<f64>,
    /// Bytes a second towards the cloud.
    rate: f64,
}

fn beside_copy(flags: &Flags, rig: &mut Rig, side: Side) -> Result<Found> {
    let relay = rig.slow_down(side, Shape::even(LINK))?;
    let found = measured(flags, rig, side, &relay);
    found.with_context(|| rig.story())
}

fn measured(flags: &Flags, rig: &Rig, side: Side, relay: &Relay) -> Result<Found> {
    let node = rig.node(side)?;
    let mut api = rig.api()?;
    let turn = Turn::build(&api, node)?;
    let names: Vec<String> = (0..flags.statuses + flags.statuses / 5)
        .map(|number| format!("busy-{}-{number}", node.name))
        .collect();
    for name in &names {
        turn.create(&mut api, &waiting_pod(name, node.name))?;
    }
    let big = format!("busy-{}-big", node.name);
    let script = "truncate -s 1000000000 /tmp/big; exec sleep 86400";
    let pod = resting_pod(&big, node.name, json!(["/bin/sh", "-c", script]));
    turn.create(&mut api, &pod)?;

    let (beside, before) = names.split_at(flags.statuses as usize);
    let alone = before.iter().map(|name| ends(&turn, name));
    let alone = alone.collect::<Result<_>>()?;
    let (mut copy, file) = start_copy(rig, &big)?;
    let first = relay.carried().up;
    wait_for("the copy", LIMIT, || {
        ensure!(relay.carried().up > first + FLOWING, "it has not begun");
        copy.ensure_running()
    })?;
    let (begun, first) = (Instant::now(), relay.carried().up);
    let mut late = Vec::new();
    for name in beside {
        late.push(ends(&turn, name)?);
        copy.ensure_running()?;
    }
    let rate = (relay.carried().up - first) as f64 / begun.elapsed().as_secs_f64();
    drop(copy);
    fs::remove_file(file)?;
    Ok(Found { late, alone, rate })
}

fn start_copy(rig: &Rig, pod: &str) -> Result<(Running, std::path::PathBuf)> {
    let file = rig.kubeconfig.with_file_name(format!("{pod}.copy"));
    let local = file.to_str().context("path of the copy")?;
    let words = ["cp", &format!("{pod}:/tmp/big"), local];
    Ok((rig.cluster.kubectl.start(&words)?, file))
}

/// A Pod whose container ends when something is written to its FIFO, and rests until then.
fn waiting_pod(name: &str, node: &str) -> Value {
    let script = format!("mkfifo {IN_POD}/{name} && read word <{IN_POD}/{name}");
    let mut pod = resting_pod(name, node, json!(["/bin/sh", "-c", script]));
    pod["spec"]["restartPolicy"] = json!("Never");
    pod["spec"]["volumes"] =
        json!([{"name": "end", "hostPath": {"path": ON_DEVICE, "type": "DirectoryOrCreate"}}]);
    pod["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "end", "mountPath": IN_POD}]);
    pod
}

/// Ends a Pod's container and gives the milliseconds until a watcher of the API sees it Succeeded.
fn ends(turn: &Turn<'_>, name: &str) -> Result<f64> {
    std::thread::sleep(PAUSE);
    let fifo = turn.node.machine.dir.join("var-lib/busy").join(name);
    let begun = Instant::now();
    fs::write(&fifo, "end\n").with_context(|| format!("write {}", fifo.display()))?;
    let seen = turn
        .watch
        .until(&format!("end of {name}"), LIMIT, |event| {
            event.object["metadata"]["name"] == name
                && event.object["status"]["phase"] == "Succeeded"
        })?;
    Ok(milliseconds(seen - begun))
}
