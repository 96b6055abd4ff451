//! `testbed up` and `testbed down`: what `deploy/quickstart.sh` shows to somebody new.
//!
//! Up is a ladder of steps, each of which looks first whether it is done: a second run passes over
//! all of them in a moment, and a run after a failure goes on where that one ended.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::bed::{self, Bed, progress};
use crate::cloud::Cloud;
use crate::cluster::{Cluster, Options};
use crate::containerd::Flavour;
use crate::edge::Edge;
use crate::kubectl::Kubectl;
use crate::netns::Backbone;
use crate::programs::{self, K8S_1_37};
use crate::wait::wait_for;
use crate::world::condition;

/// The name of the one node.
const NODE: &str = "edge-1";

/// The kubectl and the kubeconfig of the cluster that was asked, a line each: written before anything
/// is put into it.
const REACHED: &str = "reached";
/// There once everything runs.
const DONE: &str = "done";
/// CloudCore's, in the cluster.
const NAMESPACE: &str = "edge-system";

/// Makes sure that the demonstration runs, and prints it.
pub fn up(dir: &Path, example: &Path) -> Result<()> {
    if let Some(kubectl) = finished(dir) {
        if shown(&kubectl).is_ok() {
            return epilogue(dir, &kubectl);
        }
        progress("the last run is no longer whole; starting over");
        down(dir, example)?;
    } else if dir.join("owner").exists() || bed::find_kept(dir).is_some() {
        progress("the last run did not finish; starting over");
        down(dir, example)?;
    }
    let foreign = std::env::var_os("KUBECONFIG")
        .filter(|path| !path.is_empty())
        .map(PathBuf::from);
    let bed = Arc::new(Bed::kept(dir)?);
    let backbone = Backbone::build(&bed)?;
    let ours = foreign.is_none();
    let kubectl = control_plane(&bed, foreign)?;
    progress("cloudcore: install, run");
    let mut cloud = Cloud::prepared(&bed, &kubectl.kubeconfig)?;
    let lines = [
        kubectl.program.display().to_string(),
        kubectl.kubeconfig.display().to_string(),
    ];
    fs::write(bed.dir.join(REACHED), lines.join("\n"))?;
    if ours {
        // There is no other node: what somebody tries next must land on this one.
        cloud.set_flags(&["--taint-nodes=false"]);
    }
    cloud.command(&["install"])?;
    cloud.resume()?;
    progress(&format!(
        "edge machine {NODE} behind NAT: containerd, edgecore --join"
    ));
    let mut edge = Edge::prepare(&backbone, NODE, Flavour::Packaged)?;
    edge.join(&cloud.invite(&[])?)?;
    let ready = wait_for("Node Ready", Duration::from_secs(90), || {
        edge.ensure_running()?;
        let node = kubectl.json(&["get", "node", NODE])?;
        ensure!(
            condition(&node, "Ready") == Some("True"),
            "{}",
            node["status"]["conditions"]
        );
        Ok(())
    });
    ready.with_context(|| format!("{}\n{}", cloud.tail(20), edge.tail(20)))?;
    progress("example Deployment");
    let file = example.to_str().context("path of the example")?;
    kubectl.ok(&["apply", "-f", file])?;
    let rolled = ["rollout", "status", "deployment/hello", "--timeout=120s"];
    kubectl
        .ok(&rolled)
        .with_context(|| format!("{}\n{}", cloud.tail(20), edge.tail(20)))?;
    fs::write(bed.dir.join(DONE), "")?;
    // Their ends are the testbed's end, not this function's.
    std::mem::forget((edge, backbone));
    epilogue(dir, &kubectl)
}

/// Removes everything that [`up`] made, in an existing cluster too.
pub fn down(dir: &Path, example: &Path) -> Result<()> {
    let reached = dir.join(REACHED);
    let own = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    if let Some(kubectl) = reached_by(dir).filter(|k| !k.kubeconfig.starts_with(&own)) {
        progress("removing the example and CloudCore from the cluster");
        leave(&kubectl, &Arc::new(Bed::kept(dir)?), example).with_context(|| {
            format!(
                "the cluster of {} was not cleaned: run this again when it answers, or remove {} to give it up",
                kubectl.kubeconfig.display(),
                reached.display()
            )
        })?;
        fs::remove_file(&reached)?;
    }
    match bed::find_kept(dir) {
        Some((number, dir)) => bed::teardown(number, &dir)?,
        None if dir.join("owner").exists() => fs::remove_dir_all(dir)?,
        None => progress("nothing runs there"),
    }
    Ok(())
}

fn control_plane(bed: &Arc<Bed>, foreign: Option<PathBuf>) -> Result<Kubectl> {
    if let Some(kubeconfig) = foreign {
        progress(&format!(
            "using the cluster of KUBECONFIG={}",
            kubeconfig.display()
        ));
        let program =
            programs::on_path("kubectl").or_else(|_| programs::ensure("kubectl", K8S_1_37))?;
        let kubectl = Kubectl::new(&program, &kubeconfig.canonicalize()?);
        kubectl.ok(&["get", "--raw", "/readyz", "--request-timeout=10s"])?;
        ensure!(
            !has_cloudcore(&kubectl)?,
            "this cluster has CloudCore already (namespace {NAMESPACE}), and the quickstart would take its \
             place: join a device to it with the line that `cloudcore token create` prints"
        );
        return Ok(kubectl);
    }
    build(Options::new(K8S_1_37), false)?;
    progress("Kubernetes: etcd, kube-apiserver, kube-controller-manager, kube-scheduler");
    Ok(Cluster::start(bed, Options::new(K8S_1_37))?.kubectl.clone())
}

/// Builds the programs of a control plane that are not in the cache, and with `peers` those that
/// the benchmark compares with.
pub fn build(options: Options, peers: bool) -> Result<()> {
    let parts = [
        "kube-apiserver",
        "kube-controller-manager",
        "kube-scheduler",
        "kubectl",
    ];
    for part in parts {
        programs::ensure(part, options.release)?;
    }
    programs::ensure("etcd", programs::ETCD)?;
    if peers {
        programs::ensure("kubelet", options.release)?;
        for part in ["containerd", "containerd-shim-runc-v2", "ctr"] {
            programs::ensure(part, programs::CONTAINERD)?;
        }
    }
    Ok(())
}

fn has_cloudcore(kubectl: &Kubectl) -> Result<bool> {
    let found = kubectl.ok(&["get", "namespace", NAMESPACE, "--ignore-not-found"])?;
    Ok(!found.trim().is_empty())
}

fn finished(dir: &Path) -> Option<Kubectl> {
    dir.join(DONE).exists().then(|| reached_by(dir)).flatten()
}

fn reached_by(dir: &Path) -> Option<Kubectl> {
    let text = fs::read_to_string(dir.join(REACHED)).ok()?;
    let (program, kubeconfig) = text.split_once('\n')?;
    Some(Kubectl::new(Path::new(program), Path::new(kubeconfig)))
}

/// What `kubectl get` shows, if the node is there and Ready and the example runs.
fn shown(kubectl: &Kubectl) -> Result<String> {
    let node = kubectl.json(&["get", "node", NODE, "--request-timeout=10s"])?;
    ensure!(
        condition(&node, "Ready") == Some("True"),
        "{NODE} is not Ready"
    );
    let table = kubectl.ok(&["get", "nodes,pods", "-o", "wide"])?;
    match table.contains("Running") {
        true => Ok(table),
        false => bail!("no Pod is Running:\n{table}"),
    }
}

fn epilogue(dir: &Path, kubectl: &Kubectl) -> Result<()> {
    let table = wait_for("Pod Running", Duration::from_secs(30), || shown(kubectl))?;
    let (program, config) = (kubectl.program.display(), kubectl.kubeconfig.display());
    let logs = dir.join("log");
    writeln!(
        std::io::stdout(),
        "\n{table}\nGo on:\n  export KUBECONFIG={config}\n  alias kubectl={program}\n  \
         kubectl create deployment more --image={image} -- sleep 3600\n  \
         less {logs}/cloudcore.log {logs}/{NODE}-edgecore.log\n",
        image = crate::images::BUSYBOX,
        logs = logs.display(),
    )?;
    Ok(())
}

/// Takes out of a foreign cluster what was put into it.
fn leave(kubectl: &Kubectl, bed: &Arc<Bed>, example: &Path) -> Result<()> {
    let file = example.to_str().context("path of the example")?;
    kubectl.ok(&["delete", "-f", file, "--ignore-not-found", "--timeout=60s"])?;
    if !has_cloudcore(kubectl)? {
        return Ok(());
    }
    let cloud = Cloud::prepared(bed, &kubectl.kubeconfig)?;
    if cloud.command(&["node", "list"])?.contains(NODE) {
        cloud.revoke(NODE)?;
    }
    let label = ["-l", "app.kubernetes.io/part-of=cloudcore"];
    let kinds = "clusterroles,clusterrolebindings,validatingadmissionpolicies,\
                 validatingadmissionpolicybindings,customresourcedefinitions";
    kubectl.ok(&[&["delete", kinds, "--ignore-not-found"], &label[..]].concat())?;
    kubectl.ok(&["delete", "namespace", NAMESPACE, "--ignore-not-found"])?;
    Ok(())
}
