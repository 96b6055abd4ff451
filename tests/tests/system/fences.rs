//! What somebody with CloudCore's own token can do: little, and the API server itself says so.

use anyhow::{Context, Result, ensure};
use testbed::kubectl::{Kubectl, Said};
use testbed::wait::wait_for;
use testbed::world::{SOON, World, shell_pod};

use crate::world;

/// CloudCore's ServiceAccount with nothing but its token, as one that stole it has it.
struct Account<'a> {
    kubectl: Kubectl,
    server: String,
    authority: String,
    token: &'a str,
}

impl<'a> Account<'a> {
    fn new(world: &World, token: &'a str) -> Result<Self> {
        let cluster = world.cluster();
        let authority = cluster.ca_file().to_str().context("a path in UTF-8")?;
        Ok(Self {
            // The administrator's certificate would be sent beside the token, and be preferred.
            kubectl: Kubectl::new(&world.kubectl.program, "/dev/null".as_ref()),
            server: cluster.server(),
            authority: authority.to_owned(),
            token,
        })
    }

    /// Reads a path, as a user of another name where one is given.
    fn read(&self, path: &str, user: Option<&str>) -> Result<Said> {
        let mut words = vec!["--server", &self.server, "--token", self.token];
        words.extend(["--certificate-authority", &self.authority]);
        words.extend(user.into_iter().flat_map(|user| ["--as", user]));
        words.extend(["get", "--raw", path]);
        self.kubectl.run(&words)
    }
}

#[test]
fn cloudcores_account_reads_for_a_node_what_its_pods_name_and_nothing_else() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let edge = world.edge("fenced")?;
    for name in ["of-fenced", "of-nobody"] {
        let words = ["create", "secret", "generic", name, "--from-literal=a=b"];
        world.kubectl.ok(&words)?;
    }
    let mut pod = shell_pod("fenced-pod", "fenced", "sleep 1000");
    pod["spec"]["containers"][0]["envFrom"] =
        serde_json::json!([{"secretRef": {"name": "of-fenced"}}]);
    world.kubectl.apply(&pod.to_string())?;
    world.pod_running(&edge, "fenced-pod")?;

    let words = ["-n", "edge-system", "create", "token", "cloudcore"];
    let token = world.kubectl.ok(&words)?;
    let account = Account::new(world, token.trim())?;
    let mine = "/api/v1/namespaces/default/secrets/of-fenced";
    let node = Some("system:node:fenced");
    wait_for("the Secret that a Pod of the node names", SOON, || {
        let said = account.read(mine, node)?;
        ensure!(said.code == 0, "{}", said.stderr);
        Ok(())
    })?;
    let all_pods = "/api/v1/pods";
    let of_node = "/api/v1/pods?fieldSelector=spec.nodeName%3Dfenced";
    let said = account.read(of_node, node)?;
    ensure!(said.code == 0, "{}", said.stderr);
    for (path, user) in [
        (mine, None),
        ("/api/v1/secrets", None),
        (mine, Some("system:node:somebody-else")),
        ("/api/v1/namespaces/default/secrets/of-nobody", node),
        ("/api/v1/namespaces/default/secrets", node),
        (all_pods, node),
        (all_pods, Some("system:kube-scheduler")),
        (all_pods, Some("kubernetes-admin")),
    ] {
        let said = account.read(path, user)?;
        let refused = said.code != 0 && said.stderr.contains("orbidden");
        ensure!(
            refused,
            "{path} as {user:?}: {}{}",
            said.stdout,
            said.stderr
        );
    }
    Ok(())
}
