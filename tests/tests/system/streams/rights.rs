//! Who may do what at a node's kubelet endpoint, asked there directly, and what is written of it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::json;
use testbed::edge::{Edge, Transport};
use testbed::kubelet::{Kubelet, Protocol, endpoint};
use testbed::pki::Pair;
use testbed::wait::wait_for;
use testbed::world::SOON;

use super::own_edge;
use crate::world;

/// Two edges with the same private address, and a Pod on each.
type Two = [(Edge, String); 2];

fn two() -> Result<&'static Two> {
    static TWO: OnceLock<Result<Two, String>> = OnceLock::new();
    let build = || {
        let two = [
            own_edge("rights-1", Transport::Quic)?,
            own_edge("rights-2", Transport::Websocket)?,
        ];
        Ok(two)
    };
    TWO.get_or_init(|| build().map_err(|error: anyhow::Error| format!("{error:#}")))
        .as_ref()
        .map_err(|reason| anyhow!("{reason}"))
}

/// The endpoint of a node, for who holds that certificate; it answers.
fn kubelet(edge: &Edge, certificate: Option<&Pair>) -> Result<Kubelet> {
    let world = world()?;
    let pair = world.cluster().kubelet_client().clone();
    wait_for("the node's endpoint", SOON, || {
        let node = world.kubectl.json(&["get", "node", &edge.name])?;
        let address = endpoint(&node)?;
        let answer = Kubelet::new(address, Some(&pair))?.ask("GET", "/healthz")?;
        ensure!(answer.status == 200, "{answer:?}");
        Kubelet::new(address, certificate)
    })
    .with_context(|| world.story(edge))
}

/// Waits for a right that was just given: an API server learns of it by a watch.
fn answers(kubelet: &Kubelet, path: &str, status: u16) -> Result<()> {
    wait_for(&format!("{status} for {path}"), SOON, || {
        let answer = kubelet.ask("GET", path)?;
        ensure!(answer.status == status, "{answer:?}");
        Ok(())
    })
}

/// A ClusterRole of that name with one rule, for one subject.
fn allow(name: &str, resource: &str, verbs: &[&str], subject: serde_json::Value) -> Result<()> {
    let api = "rbac.authorization.k8s.io";
    let version = format!("{api}/v1");
    let list = json!({"apiVersion": "v1", "kind": "List", "items": [
        {
            "apiVersion": version,
            "kind": "ClusterRole",
            "metadata": {"name": name},
            "rules": [{"apiGroups": [""], "resources": [resource], "verbs": verbs}],
        },
        {
            "apiVersion": version,
            "kind": "ClusterRoleBinding",
            "metadata": {"name": name},
            "roleRef": {"apiGroup": api, "kind": "ClusterRole", "name": name},
            "subjects": [subject],
        },
    ]});
    world()?.kubectl.apply(&list.to_string())
}

fn exec_path(pod: &str) -> String {
    format!("/exec/default/{pod}/main?command=true&output=1&error=1")
}

/// What can be asked of any node, and who has nothing to say at all.
#[test]
fn a_stranger_gets_401_and_a_user_without_rights_403() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let (edge, pod) = &two()?[0];
    let forged = world.cluster().forged_certificate()?;
    let user = world.cluster().certificate("streams-nobody", &[])?;
    let logs = format!("/containerLogs/default/{pod}/main");
    let exec = exec_path(pod);
    for (who, kubelet, status) in [
        ("nobody", kubelet(edge, None)?, 401),
        ("a forger", kubelet(edge, Some(&forged))?, 401),
        (
            "a false token",
            kubelet(edge, None)?.with_token("abc.def.ghi"),
            401,
        ),
        ("a user without rights", kubelet(edge, Some(&user))?, 403),
    ] {
        for path in [
            "/healthz", "/pods", "/metrics", "/configz", "/no/such", &logs,
        ] {
            let answer = kubelet.ask("GET", path)?;
            ensure!(answer.status == status, "{who}, {path}: {answer:?}");
        }
        for (method, protocol) in [("POST", Protocol::Spdy), ("GET", Protocol::Websocket)] {
            let Err(answer) = kubelet.upgrade(method, &exec, protocol)? else {
                anyhow::bail!("{who} opened an exec by {method}");
            };
            ensure!(answer.status == status, "{who}, {method}: {answer:?}");
        }
    }
    Ok(())
}

/// With a kubelet the WebSocket's GET is enough for an exec.
#[test]
fn the_right_to_look_opens_no_exec_by_whatever_method() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let (edge, pod) = &two()?[0];
    let user = world.cluster().certificate("streams-reader", &[])?;
    let kubelet = kubelet(edge, Some(&user))?;
    let subject = json!({"kind": "User", "name": "streams-reader"});
    allow("streams-reader", "nodes/proxy", &["get"], subject.clone())?;
    answers(&kubelet, &format!("/containerLogs/default/{pod}/main"), 200)?;
    for path in [
        exec_path(pod),
        format!("/attach/default/{pod}/main?output=1"),
        format!("/portForward/default/{pod}"),
        format!("/run/default/{pod}/main?cmd=true"),
    ] {
        for (method, protocol) in [("POST", Protocol::Spdy), ("GET", Protocol::Websocket)] {
            let Err(answer) = kubelet.upgrade(method, &path, protocol)? else {
                anyhow::bail!("{method} {path} was opened");
            };
            ensure!(answer.status == 403, "{method} {path}: {answer:?}");
        }
    }
    // And with the right to create there it does.
    let user = world.cluster().certificate("streams-writer", &[])?;
    let subject = json!({"kind": "User", "name": "streams-writer"});
    allow("streams-writer", "nodes/proxy", &["create"], subject)?;
    let writer = Kubelet::new(kubelet.address, Some(&user))?;
    wait_for("an exec of the writer's", SOON, || {
        let path = exec_path(pod);
        let opened = writer.upgrade("GET", &path, Protocol::Websocket)?;
        opened.map(drop).map_err(|answer| anyhow!("{answer:?}"))
    })
}

#[test]
fn a_port_opens_the_pods_of_its_own_node_alone() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let [one, other] = two()?;
    let pair = world.cluster().kubelet_client().clone();
    let (first, second) = (
        kubelet(&one.0, Some(&pair))?,
        kubelet(&other.0, Some(&pair))?,
    );
    ensure!(first.address != second.address, "{}", first.address);
    for (kubelet, own, foreign) in [(&first, &one.1, &other.1), (&second, &other.1, &one.1)] {
        let logs = |pod: &str| kubelet.ask("GET", &format!("/containerLogs/default/{pod}/main"));
        ensure!(logs(own)?.status == 200, "{:?}", logs(own)?);
        ensure!(logs(foreign)?.status == 404, "{:?}", logs(foreign)?);
        for path in [
            exec_path(foreign),
            format!("/attach/default/{foreign}/main?output=1"),
            format!("/portForward/default/{foreign}"),
        ] {
            let Err(answer) = kubelet.upgrade("POST", &path, Protocol::Spdy)? else {
                anyhow::bail!("{path} was opened at {}", kubelet.address);
            };
            ensure!(answer.status == 404, "{path}: {answer:?}");
        }
    }
    // And kubectl lands where the Pod is.
    for (edge, pod) in [one, other] {
        let said = world.kubectl.ok(&["exec", pod, "--", "hostname"])?;
        ensure!(said.trim() == pod, "{said}");
        let path = format!("/api/v1/nodes/{}/proxy/pods", edge.name);
        let list = world.kubectl.ok(&["get", "--raw", &path])?;
        let foreign = [one, other].into_iter().find(|(e, _)| e.name != edge.name);
        let (_, foreign) = foreign.context("there are two")?;
        ensure!(list.contains(pod) && !list.contains(foreign), "{list}");
    }
    Ok(())
}

#[test]
fn a_token_opens_what_its_account_may_see_and_stays_in_the_cloud() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let (edge, _) = &two()?[0];
    world
        .kubectl
        .ok(&["create", "serviceaccount", "streams-scraper"])?;
    let subject =
        json!({"kind": "ServiceAccount", "name": "streams-scraper", "namespace": "default"});
    allow("streams-scraper", "nodes/metrics", &["get"], subject)?;
    let token = world.kubectl.ok(&["create", "token", "streams-scraper"])?;
    let token = token.trim();
    let kubelet = kubelet(edge, None)?.with_token(token);
    for path in ["/metrics/resource", "/metrics/cadvisor", "/metrics"] {
        answers(&kubelet, path, 200)?;
    }
    for path in [
        "/stats/summary",
        "/pods",
        "/configz",
        "/containerLogs/default/a/b",
    ] {
        answers(&kubelet, path, 403)?;
    }
    // Its signature alone is a secret that no text nearby resembles.
    let (_, signature) = token.rsplit_once('.').context("a token has three parts")?;
    ensure!(!edge.text().contains(signature), "it is in edgecore's log");
    ensure!(
        !world.cloud().text().contains(signature),
        "it is in cloudcore's log"
    );
    let pid = edge.pid().context("edgecore does not run")?;
    ensure!(
        in_memory(pid, edge.name.as_bytes())?,
        "the search finds not even the node's name"
    );
    ensure!(
        !in_memory(pid, signature.as_bytes())?,
        "the token reached the device"
    );
    Ok(())
}

/// Whether the writable memory of a process holds these bytes.
fn in_memory(pid: i32, needle: &[u8]) -> Result<bool> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    for line in maps.lines() {
        let mut words = line.split(' ');
        let (Some(range), Some(rights)) = (words.next(), words.next()) else {
            continue;
        };
        let ends = range.split_once('-').context("a range")?;
        let from = u64::from_str_radix(ends.0, 16)?;
        let size = usize::try_from(u64::from_str_radix(ends.1, 16)? - from)?;
        // What is reserved and never touched is larger than any heap here.
        if !rights.starts_with("rw") || size > 256 << 20 {
            continue;
        }
        let mut bytes = vec![0; size];
        let found = memory.read_at(&mut bytes, from).unwrap_or(0);
        if bytes[..found]
            .windows(needle.len())
            .any(|part| part == needle)
        {
            return Ok(true);
        }
    }
    Ok(false)
}

#[test]
fn every_tunnel_leaves_a_line_when_it_opens_and_one_when_it_closes() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let (edge, pod) = &two()?[1];
    kubelet(edge, None)?;
    let said = world.kubectl.ok(&["exec", pod, "--", "echo", "unspoken"])?;
    ensure!(said == "unspoken\n", "{said}");
    wait_for("both lines", SOON, || {
        let log = world.cloud().text();
        // Other cases ask for the same Pod as others, or at another node's port.
        let here = format!("node={} ", edge.name);
        let principal = "kube-apiserver-kubelet-client";
        // By GET as a WebSocket, by POST as SPDY.
        let wanted = ["a tunnel opened", principal, "exec", "method=", &here];
        let opened = log
            .lines()
            .find(|line| line.contains(pod) && wanted.iter().all(|word| line.contains(word)))
            .context("no line of its opening")?;
        ensure!(opened.contains("namespace=\"default\""), "{opened}");
        let mut words = opened.split(' ');
        let id = words.find(|word| word.starts_with("tunnel="));
        let id = id.with_context(|| format!("no number: {opened}"))?;
        let closed = log
            .lines()
            .find(|line| line.contains("a tunnel closed") && line.split(' ').any(|word| word == id))
            .with_context(|| format!("{id} was never closed"))?;
        for word in ["exec", &edge.name, "bytes_there=", "bytes_back=", "ms="] {
            ensure!(closed.contains(word), "no {word}: {closed}");
        }
        ensure!(!log.contains("unspoken"), "what was said is in the log");
        Ok(())
    })
    .with_context(|| world.story(edge))
}
