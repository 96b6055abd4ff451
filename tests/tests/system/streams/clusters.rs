//! Control planes of other kinds: nothing has to be set on them or for them.

use anyhow::{Context, Result, ensure};
use testbed::cluster::Options;
use testbed::programs::K8S_1_37;
use testbed::wait::wait_for;
use testbed::world::{SOON, World, shell_pod};

/// What an operator does first: look at a log, and into a container.
pub(crate) fn logs_and_exec(world: &World, node: &str) -> Result<()> {
    let edge = world.edge(node)?;
    let pod = format!("{node}-pod");
    let script = "echo from inside; sleep 1000";
    world
        .kubectl
        .apply(&shell_pod(&pod, node, script).to_string())?;
    world.pod_running(&edge, &pod)?;
    // The first call may be what shows that the certificate is not believed.
    wait_for("the log", SOON, || {
        let said = world.kubectl.ok(&["logs", &pod])?;
        ensure!(said == "from inside\n", "{said}");
        Ok(())
    })
    .with_context(|| world.story(&edge))?;
    let words = ["exec", "-i", &pod, "--", "sh", "-c", "cat; exit 6"];
    let said = world
        .kubectl
        .run_with(&words, "to the other side")
        .with_context(|| world.story(&edge))?;
    ensure!(
        said.code == 6 && said.stdout == "to the other side",
        "{said:?}"
    );
    let path = format!("/api/v1/nodes/{node}/proxy/healthz");
    let said = world.kubectl.ok(&["get", "--raw", &path])?;
    ensure!(said.trim() == "ok", "{said}");
    Ok(())
}

/// As kubeadm sets up a cluster whose administrator wants kubelets verified.
#[test]
fn an_api_server_that_verifies_kubelets_and_dials_their_ip_first_reaches_a_node() -> Result<()> {
    let mut options = Options::impatient(K8S_1_37);
    options.verify_kubelets = true;
    let types = "InternalIP,ExternalIP,Hostname";
    options.address_types = Some(types.to_owned());
    let world = World::start(options)?;
    logs_and_exec(&world, "verified")
}
