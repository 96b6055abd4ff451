//! What a user waits for: a Pod until it runs, until it is gone, a ConfigMap until it is there.
//!
//! Both sides take turns, sample by sample, so that whatever else the computer does meets both.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::api::{Api, Event, Watch};
use super::rig::{Node, Rig, Side};
use super::table::{Row, milliseconds, p50, quantile, show_ms};
use super::{Flags, Measure};
use crate::bed::progress;
use crate::images::BUSYBOX;
use crate::wait::wait_every;

const PODS: &str = "/api/v1/namespaces/default/pods";
const CONFIG_MAPS: &str = "/api/v1/namespaces/default/configmaps";

/// How long one Pod may take to run or to end.
const LIMIT: Duration = Duration::from_secs(60);

/// Between Running and the delete call: a shell needs a moment to set its trap.
const BREATH: Duration = Duration::from_millis(500);

/// How a container takes SIGTERM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manners {
    /// Not at all: the first process of a container has no default action.
    Deaf,
    /// It ends at once.
    Polite,
}

impl Manners {
    fn command(self) -> Value {
        match self {
            Manners::Deaf => json!(["sleep", "86400"]),
            Manners::Polite => json!([
                "/bin/sh",
                "-c",
                "trap 'exit 0' TERM; while :; do sleep 86400 & wait $!; done"
            ]),
        }
    }
}

/// A Pod that does nothing, on a certain node.
pub fn resting_pod(name: &str, node: &str, command: Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "main", "image": BUSYBOX, "command": command}],
        },
    })
}

/// The Pods of one node, watched.
pub struct Turn<'a> {
    pub node: Node<'a>,
    pub watch: Watch,
}

impl Turn<'_> {
    pub fn build<'a>(api: &Api, node: Node<'a>) -> Result<Turn<'a>> {
        let path = format!("/api/v1/pods?fieldSelector=spec.nodeName%3D{}", node.name);
        let watch = api.watch(&path)?;
        Ok(Turn { node, watch })
    }

    /// Creates a Pod and gives the time from the call to Running as a watcher sees it.
    pub fn create(&self, api: &mut Api, pod: &Value) -> Result<Duration> {
        api.warm()?;
        let begun = Instant::now();
        api.call("POST", PODS, Some(pod))?;
        let name = pod["metadata"]["name"].as_str().unwrap_or_default();
        let seen = self
            .watch
            .until(&format!("Pod {name} Running"), LIMIT, |event| {
                is(event, name) && event.object["status"]["phase"] == "Running"
            })?;
        Ok(seen - begun)
    }

    /// Deletes a Pod and gives the time from the call to its object's end.
    pub fn delete(&self, api: &mut Api, name: &str) -> Result<Duration> {
        api.warm()?;
        let begun = Instant::now();
        api.call("DELETE", &format!("{PODS}/{name}"), None)?;
        let seen = self
            .watch
            .until(&format!("end of Pod {name}"), LIMIT, |event| {
                is(event, name) && event.kind == "DELETED"
            })?;
        Ok(seen - begun)
    }
}

fn is(event: &Event, name: &str) -> bool {
    event.object["metadata"]["name"] == name
}

/// Milliseconds, sample by sample.
#[derive(Debug, Default)]
struct Churn {
    create: Vec<f64>,
    deaf: Vec<f64>,
    polite: Vec<f64>,
}

/// Creates and deletes Pods on both sides in turn.
pub fn churn(flags: &Flags, rig: &Rig) -> Vec<Row> {
    let found = churned(flags, rig).with_context(|| rig.story());
    let [ours, peer] = match found {
        Ok(found) => found,
        Err(error) => {
            return vec![Row::broken(
                "create to Running, delete to gone",
                "-",
                &error,
            )];
        }
    };
    let mut rows = Vec::new();
    if flags.wants(Measure::Running) {
        for (name, part, limit) in [("p50", 0.5, 0.9), ("p99", 0.99, 1.0)] {
            let ours = quantile(&ours.create, part);
            let peer = quantile(&peer.create, part);
            let row = Row::new(
                &format!("create to Running, {name} of {}", flags.rounds),
                &format!("<= {limit:.1} x the peer's"),
            );
            let ratio = ours.zip(peer).map(|(ours, peer)| ours / peer);
            rows.push(row.beside(ours, peer, show_ms).judged(ratio, limit));
        }
    }
    if flags.wants(Measure::Delete) {
        let kinds = [
            ("SIGTERM ignored", &ours.deaf, &peer.deaf),
            ("SIGTERM obeyed", &ours.polite, &peer.polite),
        ];
        for (name, ours, peer) in kinds {
            let (ours, peer) = (p50(ours), p50(peer));
            let row = Row::new(
                &format!("delete (grace 1 s) to gone, p50, {name}"),
                "<= 1.6 s",
            );
            rows.push(row.beside(ours, peer, show_ms).judged(ours, 1600.0));
        }
    }
    rows
}

fn churned(flags: &Flags, rig: &Rig) -> Result<[Churn; 2]> {
    let mut api = rig.api()?;
    let nodes = rig.pair();
    let turns: Vec<Turn<'_>> = nodes
        .into_iter()
        .map(|node| Turn::build(&api, node))
        .collect::<Result<_>>()?;
    let mut found = [Churn::default(), Churn::default()];
    // The first round fills caches on both sides and is not counted.
    for round in 0..=flags.rounds {
        for turn in &turns {
            let manners = match round % 2 {
                0 => Manners::Deaf,
                _ => Manners::Polite,
            };
            let name = format!("turn-{}-{round}", turn.node.name);
            let pod = resting_pod(&name, turn.node.name, manners.command());
            let created = turn.create(&mut api, &pod)?;
            std::thread::sleep(BREATH);
            let deleted = turn.delete(&mut api, &name)?;
            let churn = &mut found[usize::from(turn.node.side == Side::Peer)];
            if round == 0 {
                continue;
            }
            churn.create.push(milliseconds(created));
            match manners {
                Manners::Deaf => churn.deaf.push(milliseconds(deleted)),
                Manners::Polite => churn.polite.push(milliseconds(deleted)),
            }
        }
        if round % 10 == 0 {
            progress(&format!(
                "    {round} of {} Pods on each side",
                flags.rounds
            ));
        }
    }
    Ok(found)
}

/// A ConfigMap of about 2 KB whose `key` has a certain value.
pub fn config_map(name: &str, value: &str) -> Value {
    let mut data = serde_json::Map::new();
    for n in 0..19 {
        let digest = ring::digest::digest(&ring::digest::SHA256, &[n]);
        let hex: String = digest
            .as_ref()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        data.insert(
            format!("setting-{n:02}"),
            json!(format!("{hex} of the site's defaults, {n:02}")),
        );
    }
    data.insert("key".to_owned(), json!(value));
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data})
}

/// A value that no earlier one helps to compress.
pub fn fresh_value(seed: &str) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, seed.as_bytes());
    digest.as_ref()[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// A running Pod that has a ConfigMap mounted.
pub struct Reader {
    pub config: String,
    file: PathBuf,
}

impl Reader {
    pub fn start(api: &mut Api, turn: &Turn<'_>) -> Result<Reader> {
        // A number of its own: one that a failed measure left behind is in nobody's way.
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("reader-{}-{number}", turn.node.name);
        let first = fresh_value(&name);
        api.call("POST", CONFIG_MAPS, Some(&config_map(&name, &first)))?;
        // A time that no other process sleeps, to find the container by.
        let marker = format!("7{:07}{number:03}", std::process::id());
        let mut pod = resting_pod(&name, turn.node.name, json!(["sleep", marker]));
        pod["spec"]["containers"][0]["volumeMounts"] =
            json!([{"name": "config", "mountPath": "/etc/bench"}]);
        pod["spec"]["volumes"] = json!([{"name": "config", "configMap": {"name": name}}]);
        turn.create(api, &pod)?;
        let what = format!("the process of Pod {name}");
        let pause = Duration::from_millis(50);
        let root = wait_every(&what, Duration::from_secs(10), pause, || root_of(&marker))?;
        let reader = Reader {
            config: name,
            file: root.join("etc/bench/key"),
        };
        reader.shows(&first, LIMIT)?;
        Ok(reader)
    }

    /// Changes the key and gives the time from the call to the file's new content.
    pub fn edit(&self, api: &mut Api, seed: u32, limit: Duration) -> Result<Duration> {
        let value = fresh_value(&format!("{}{seed}", self.config));
        api.warm()?;
        let begun = Instant::now();
        self.patch(api, &value)?;
        Ok(self.shows(&value, limit)? - begun)
    }

    /// Changes the key alone.
    pub fn patch(&self, api: &mut Api, value: &str) -> Result<()> {
        let path = format!("{CONFIG_MAPS}/{}", self.config);
        api.call("PATCH", &path, Some(&json!({"data": {"key": value}})))
            .map(drop)
    }

    /// Looks every millisecond: a bind-mounted directory that is swapped tells no watcher.
    fn shows(&self, value: &str, limit: Duration) -> Result<Instant> {
        let what = format!("the new {}", self.file.display());
        wait_every(&what, limit, Duration::from_millis(1), || {
            ensure!(
                fs::read_to_string(&self.file)? == value,
                "still the old value"
            );
            Ok(Instant::now())
        })
    }

    pub fn end(self, api: &mut Api, turn: &Turn<'_>) -> Result<()> {
        turn.delete(api, &self.config)?;
        api.call("DELETE", &format!("{CONFIG_MAPS}/{}", self.config), None)
            .map(drop)
    }
}

/// The root directory of the process that was started as `sleep MARKER`, whatever its namespaces.
fn root_of(marker: &str) -> Result<PathBuf> {
    let wanted = format!("sleep\0{marker}\0").into_bytes();
    let entries = fs::read_dir("/proc")?.flatten();
    let mut dirs = entries.map(|entry| entry.path());
    let found = dirs.find(|dir| fs::read(dir.join("cmdline")).is_ok_and(|line| line == wanted));
    Ok(found.context("it does not run yet")?.join("root"))
}

/// Edits a mounted ConfigMap on both sides.
pub fn edits(flags: &Flags, rig: &Rig) -> Vec<Row> {
    let (measure, bar) = (
        "ConfigMap edit to file changed in the Pod, p50",
        "<= 200 ms",
    );
    match edited(flags, rig).with_context(|| rig.story()) {
        Ok([ours, peer]) => {
            let note = format!("{} edits of ours, {} of the peer's", ours.len(), peer.len());
            let (ours, peer) = (p50(&ours), p50(&peer));
            let row = Row::new(measure, bar).beside(ours, peer, show_ms);
            vec![row.judged(ours, 200.0).noted(note)]
        }
        Err(error) => vec![Row::broken(measure, bar, &error)],
    }
}

fn edited(flags: &Flags, rig: &Rig) -> Result<[Vec<f64>; 2]> {
    let mut api = rig.api()?;
    let mut found = [Vec::new(), Vec::new()];
    for node in rig.pair() {
        let peer = node.side == Side::Peer;
        let count = match peer {
            true => flags.peer_edits,
            false => flags.edits,
        };
        if count == 0 {
            continue;
        }
        progress(&format!(
            "    {count} ConfigMap edits, {}",
            node.side.word()
        ));
        let turn = Turn::build(&api, node)?;
        let reader = Reader::start(&mut api, &turn)?;
        for seed in 0..count {
            // Away from the start and from one another, at no fixed distance.
            std::thread::sleep(Duration::from_millis(1000 + u64::from(seed * 37 % 100)));
            let took = reader.edit(&mut api, seed, Duration::from_secs(180))?;
            found[usize::from(peer)].push(milliseconds(took));
        }
        reader.end(&mut api, &turn)?;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_config_map_is_of_the_size_that_the_promise_names() {
        let size = config_map("c", &fresh_value("a"))["data"].to_string().len();
        assert!((1900..=2200).contains(&size), "{size}");
    }

    #[test]
    fn values_are_fresh_and_of_one_length() {
        let (one, other) = (fresh_value("a"), fresh_value("b"));
        assert_ne!(one, other);
        assert_eq!((one.len(), other.len()), (32, 32));
    }

    #[test]
    fn a_process_is_found_by_its_whole_command_line() {
        let mut child = std::process::Command::new("sleep")
            .arg("71234567")
            .spawn()
            .expect("starts");
        let found = wait_every("process", LIMIT, Duration::from_millis(5), || {
            root_of("71234567")
        });
        let _ = child.kill();
        let _ = child.wait();
        let want = PathBuf::from(format!("/proc/{}/root", child.id()));
        assert_eq!(found.expect("found"), want);
        assert!(root_of("7123456").is_err());
    }
}
