//! `kubectl exec`, `attach`, `run -i` and `debug`, by every kubectl.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use testbed::edge::Transport;
use testbed::images::BUSYBOX;
use testbed::kubectl::Kubectl;
use testbed::running::{Ended, Running};
use testbed::world::SOON;

use super::{MOMENT, Place, clients, noise, place};

#[test]
fn exec_brings_back_outputs_and_exit_code_to_every_kubectl() -> Result<()> {
    let place = place(Transport::Quic)?;
    let pod = place.shell("codes", "sleep 1000")?;
    for (name, kubectl) in clients(&place.kubectl)? {
        says_and_ends(&kubectl, &pod).with_context(|| format!("kubectl {name}"))?;
    }
    // The newest one's WebSocket came to the node as it was.
    let metrics = place.kubectl.ok(&["get", "--raw", "/metrics"])?;
    let mut handed_on = metrics.lines().filter(|l| l.contains("proxied_to_kubelet"));
    ensure!(
        handed_on.any(|l| l.contains("exec")),
        "the API server handed no WebSocket of an exec on"
    );
    Ok(())
}

#[test]
fn exec_brings_back_outputs_and_exit_code_over_a_websocket_link() -> Result<()> {
    let place = place(Transport::Websocket)?;
    let pod = place.shell("codes", "sleep 1000")?;
    says_and_ends(&place.kubectl, &pod)
}

fn says_and_ends(kubectl: &Kubectl, pod: &str) -> Result<()> {
    for code in [0, 1, 7, 255] {
        let script = format!("echo out; echo err >&2; exit {code}");
        let said = kubectl.run(&["exec", pod, "--", "sh", "-c", &script])?;
        ensure!(said.code == code, "{code}: {said:?}");
        ensure!(said.stdout == "out\n", "{said:?}");
        // A kubectl 1.33 that has just been answered may not know its streams yet, and says so of the
        // empty message that tells it of them. Nothing is lost.
        let own = |line: &&str| line.contains("websocket.go") && line.contains("Unknown stream id");
        let first = said.stderr.lines().find(|line| !own(line));
        ensure!(first == Some("err"), "{said:?}");
    }
    let said = kubectl.run(&["exec", pod, "--", "no-such-program"])?;
    ensure!(
        said.code != 0 && said.stderr.contains("no-such-program"),
        "{said:?}"
    );
    let said = kubectl.run(&["exec", pod, "-c", "nobody", "--", "true"])?;
    ensure!(said.code != 0 && said.stderr.contains("nobody"), "{said:?}");
    Ok(())
}

#[test]
fn bytes_of_every_kind_go_through_exec_both_ways_at_once() -> Result<()> {
    let place = place(Transport::Quic)?;
    let pod = place.shell("binary", "sleep 1000")?;
    for (name, kubectl) in clients(&place.kubectl)? {
        echoes(&kubectl, &pod, 8 << 20).with_context(|| format!("kubectl {name}"))?;
    }
    Ok(())
}

#[test]
fn bytes_of_every_kind_go_through_exec_over_a_websocket_link() -> Result<()> {
    let place = place(Transport::Websocket)?;
    let pod = place.shell("binary", "sleep 1000")?;
    echoes(&place.kubectl, &pod, 8 << 20)
}

/// What goes in comes out: the whole of it, in order, and then the end.
fn echoes(kubectl: &Kubectl, pod: &str, size: usize) -> Result<()> {
    let bytes = noise(size, 1);
    let back = kubectl.pipe(&["exec", "-i", pod, "--", "cat"], bytes.clone(), SOON)?;
    let back = back.ok()?.stdout;
    ensure!(
        back.len() == size,
        "{} of {size} bytes came back",
        back.len()
    );
    ensure!(back == bytes, "the bytes are not the same");
    Ok(())
}

#[test]
fn a_terminal_has_the_size_of_its_window_and_follows_it() -> Result<()> {
    for transport in [Transport::Quic, Transport::Websocket] {
        let place = place(transport)?;
        let pod = place.shell("terminal", "sleep 1000")?;
        for (name, kubectl) in clients(&place.kubectl)? {
            resizes(&kubectl, &pod).with_context(|| format!("kubectl {name}"))?;
            if transport == Transport::Websocket {
                break;
            }
        }
    }
    Ok(())
}

/// Waits in a terminal until it has one size and then another, and for a word.
const SIZES: &str = "test -t 0 && test -t 1 || exit 9; \
                     until [ \"$(stty size)\" = '33 77' ]; do sleep 0.05; done; echo small; \
                     until [ \"$(stty size)\" = '44 99' ]; do sleep 0.05; done; echo large; \
                     read word; echo \"heard $word\"; exit 5";

fn resizes(kubectl: &Kubectl, pod: &str) -> Result<()> {
    let ended = in_terminal(kubectl, &["exec", "-it", pod, "--", "sh", "-c", SIZES])?;
    ensure!(ended.code == 5, "{ended}");
    Ok(())
}

/// Runs kubectl, behind which [`SIZES`] runs, in a terminal of its own, made by util-linux's
/// `script`, whose window grows once the inner shell has seen the first size.
fn in_terminal(kubectl: &Kubectl, words: &[&str]) -> Result<Ended> {
    let dir = tempfile::tempdir()?;
    let flag = dir.path().join("grow");
    let outer = dir.path().join("outer.sh");
    let inner = kubectl.command(words);
    let mut words = vec![quoted(&inner.get_program().to_string_lossy())];
    words.extend(inner.get_args().map(|word| quoted(&word.to_string_lossy())));
    let script = format!(
        "stty rows 33 cols 77\n(until [ -e {flag} ]; do sleep 0.05; done; \
         stty rows 44 cols 99 </dev/tty) &\n{line}\n",
        flag = quoted(&flag.to_string_lossy()),
        line = words.join(" "),
    );
    fs::write(&outer, script)?;
    let line = format!("sh {}", quoted(&outer.to_string_lossy()));
    let mut command = Command::new("script");
    command.args(["-q", "-e", "-c", &line, "/dev/null"]);
    command.envs(kubectl.variables.iter().copied());
    let mut terminal = Running::start(&mut command)?;
    terminal.sees("small", MOMENT)?;
    fs::write(&flag, "")?;
    terminal.sees("large", MOMENT)?;
    terminal.say("hello\n")?;
    terminal.sees("heard hello", MOMENT)?;
    terminal.end(MOMENT)
}

/// A word as a shell takes it whole.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[test]
fn attach_speaks_with_the_first_process_and_ends_with_it() -> Result<()> {
    for transport in [Transport::Quic, Transport::Websocket] {
        let place = place(transport)?;
        for (name, kubectl) in clients(&place.kubectl)? {
            attaches(&place, &kubectl).with_context(|| format!("kubectl {name}"))?;
            if transport == Transport::Websocket {
                break;
            }
        }
    }
    Ok(())
}

fn attaches(place: &Place, kubectl: &Kubectl) -> Result<()> {
    // A runtime may drop what is written in the moment of the end.
    let script = "while read word; do echo got $word; [ $word = end ] && sleep 1 && exit 0; done";
    let mut pod = place.pod("attached", script);
    pod["spec"]["restartPolicy"] = json!("Never");
    pod["spec"]["containers"][0]["stdin"] = json!(true);
    let pod = place.start(&pod)?;
    let mut attached = kubectl.start(&["attach", "-i", &pod])?;
    attached.say("one\n")?;
    attached.sees("got one\n", MOMENT)?;
    // The container ends while kubectl is attached, and its standard input open.
    attached.say("end\n")?;
    let ended = attached.end(Duration::from_secs(10))?.ok()?;
    ensure!(ended.text().contains("got end\n"), "{ended}");

    let mut pod = place.pod("attached-terminal", SIZES);
    pod["spec"]["restartPolicy"] = json!("Never");
    pod["spec"]["containers"][0]["stdin"] = json!(true);
    pod["spec"]["containers"][0]["tty"] = json!(true);
    let pod = place.start(&pod)?;
    in_terminal(kubectl, &["attach", "-it", &pod]).map(drop)
}

#[test]
fn a_pod_of_the_moment_takes_input_and_is_removed() -> Result<()> {
    let place = place(Transport::Quic)?;
    let name = format!("moment-{}", place.node);
    let overrides = json!({"apiVersion": "v1", "spec": {"nodeName": place.node}}).to_string();
    let words = [
        "run",
        &name,
        "--rm",
        "-i",
        "--quiet",
        "--restart=Never",
        "--image",
        BUSYBOX,
        "--overrides",
        &overrides,
        "--command",
        "--",
        "sh",
        "-c",
        "read word; echo took $word; sleep 1; exit 4",
    ];
    let ended = place
        .kubectl
        .pipe(&words, b"this\n".to_vec(), SOON)
        .with_context(|| place.story())?;
    ensure!(ended.text().contains("took this"), "{ended}");
    ensure!(ended.code == 4, "{ended}");
    place.kubectl.ensure_gone("pod", &name)
}

#[test]
fn debug_adds_a_container_that_sees_the_processes_of_another() -> Result<()> {
    let place = place(Transport::Quic)?;
    let pod = place.shell("debugged", "sleep 1017")?;
    let words = [
        "debug",
        &pod,
        "-i",
        "--quiet",
        "--image",
        BUSYBOX,
        "--target=main",
        "--container=looks",
        "--",
        "sh",
        "-c",
        "read word; echo $word; ps; sleep 1",
    ];
    // Its input stays open: a runtime takes its end for the attached one's leave.
    let mut debug = place.kubectl.start(&words)?;
    debug.say("look\n")?;
    debug
        .sees("sleep 1017", SOON)
        .with_context(|| place.story())?;
    let ended = debug.end(MOMENT)?.ok()?;
    ensure!(ended.text().starts_with("look\n"), "{ended}");
    let object = place.kubectl.json(&["get", "pod", &pod])?;
    let status = &object["status"]["ephemeralContainerStatuses"][0];
    ensure!(status["name"] == "looks", "{}", object["status"]);
    // And its log is read like any other's.
    let said = place.kubectl.ok(&["logs", &pod, "-c", "looks"])?;
    ensure!(said.contains("sleep 1017"), "{said}");
    Ok(())
}

/// Tunnels to one node that are open at the same time.
const MANY: usize = 50;

#[test]
fn fifty_execs_at_once_do_not_mix() -> Result<()> {
    for transport in [Transport::Quic, Transport::Websocket] {
        let place = place(transport)?;
        let pod = place.shell("many", "sleep 1000")?;
        let start = |number: usize| {
            let script = format!("echo ready-{number}; read word; echo $word-{number}; exit 0");
            let words = ["exec", "-i", &pod, "--", "sh", "-c", &script];
            place.kubectl.start(&words)
        };
        let mut all: Vec<Running> = (0..MANY).map(start).collect::<Result<_>>()?;
        for (number, one) in all.iter_mut().enumerate() {
            one.sees(&format!("ready-{number}\n"), SOON)
                .with_context(|| place.story())?;
        }
        // Every one of them is open.
        for one in &mut all {
            one.say("word\n")?;
        }
        for (number, mut one) in all.into_iter().enumerate() {
            let ended = one.end(SOON)?.ok()?;
            let want = format!("ready-{number}\nword-{number}\n");
            ensure!(ended.text() == want, "{ended}");
        }
    }
    Ok(())
}
