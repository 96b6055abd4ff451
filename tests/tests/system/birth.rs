//! What a Pod is born with: its environment, its files, its order of containers, its token.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use testbed::edge::Edge;
use testbed::images::BUSYBOX;
use testbed::kubectl::{Kubectl, Said};
use testbed::wait::wait_for;
use testbed::world::{SOON, World, condition, container_id, shell_pod};

use crate::world;

/// Where a Pod finds its ServiceAccount.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

#[test]
fn the_environment_holds_every_kind_of_value() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let edge = world.edge("env")?;
    world
        .kubectl
        .ok(&["create", "configmap", "env-cm", "--from-literal=level=low"])?;
    let secret = ["create", "secret", "generic", "env-key"];
    world
        .kubectl
        .ok(&[&secret[..], &["--from-literal=word=sesame"]].concat())?;
    // Two Services of the Pod's namespace: one that it has variables of, and a headless one.
    world
        .kubectl
        .ok(&["create", "service", "clusterip", "env-web", "--tcp=81:8080"])?;

    let mut pod = shell_pod("env-pod", "env", "env > /tmp/env; sleep 1000");
    pod["metadata"]["labels"]["tier"] = json!("front");
    pod["metadata"]["annotations"] = json!({"note": "a note"});
    let container = &mut pod["spec"]["containers"][0];
    container["args"] = json!(["$(WHO)", "$$(WHO)"]);
    container["command"] = json!([
        "/bin/sh",
        "-c",
        "env > /tmp/env; printf '%s|%s' \"$0\" \"$1\" > /tmp/args; sleep 1000",
    ]);
    container["resources"] =
        json!({"limits": {"memory": "64Mi", "cpu": "500m"}, "requests": {"cpu": "100m"}});
    container["envFrom"] = json!([
        {"prefix": "CM_", "configMapRef": {"name": "env-cm"}},
        {"prefix": "KEY_", "secretRef": {"name": "env-key"}},
        {"configMapRef": {"name": "env-absent", "optional": true}},
    ]);
    let field = |path: &str| json!({"fieldRef": {"fieldPath": path}});
    container["env"] = json!([
        {"name": "WHO", "value": "world"},
        {"name": "GREETING", "value": "hello $(WHO), $$(WHO) and $(NOBODY)"},
        {"name": "POD_NAME", "valueFrom": field("metadata.name")},
        {"name": "POD_NAMESPACE", "valueFrom": field("metadata.namespace")},
        {"name": "POD_UID", "valueFrom": field("metadata.uid")},
        {"name": "POD_TIER", "valueFrom": field("metadata.labels['tier']")},
        {"name": "POD_NOTE", "valueFrom": field("metadata.annotations['note']")},
        {"name": "POD_IP", "valueFrom": field("status.podIP")},
        {"name": "HOST_IP", "valueFrom": field("status.hostIP")},
        {"name": "NODE", "valueFrom": field("spec.nodeName")},
        {"name": "ACCOUNT", "valueFrom": field("spec.serviceAccountName")},
        {"name": "MEMORY", "valueFrom": {"resourceFieldRef":
            {"resource": "limits.memory", "divisor": "1Mi"}}},
        {"name": "CPU", "valueFrom": {"resourceFieldRef":
            {"resource": "requests.cpu", "divisor": "1m"}}},
        {"name": "LEVEL", "valueFrom": {"configMapKeyRef": {"name": "env-cm", "key": "level"}}},
        {"name": "WORD", "valueFrom": {"secretKeyRef": {"name": "env-key", "key": "word"}}},
        {"name": "ABSENT", "valueFrom": {"configMapKeyRef":
            {"name": "env-absent", "key": "x", "optional": true}}},
    ]);
    world.kubectl.apply(&pod.to_string())?;
    let object = world.pod_running(&edge, "env-pod")?;

    let text = wait_for("the script's output", SOON, || {
        let args = world.in_pod(&edge, "env-pod", &["/bin/cat", "/tmp/args"])?;
        ensure!(args == "world|$(WHO)", "{args}");
        world.in_pod(&edge, "env-pod", &["/bin/cat", "/tmp/env"])
    })
    .with_context(|| world.story(&edge))?;
    let told = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
    };
    let of = |path: &str| object.pointer(path).and_then(Value::as_str);
    for (name, expected) in [
        ("WHO", Some("world")),
        ("GREETING", Some("hello world, $(WHO) and $(NOBODY)")),
        ("CM_level", Some("low")),
        ("KEY_word", Some("sesame")),
        ("POD_NAME", Some("env-pod")),
        ("POD_NAMESPACE", Some("default")),
        ("POD_UID", of("/metadata/uid")),
        ("POD_TIER", Some("front")),
        ("POD_NOTE", Some("a note")),
        ("POD_IP", of("/status/podIP")),
        ("HOST_IP", of("/status/hostIP")),
        ("NODE", Some("env")),
        ("ACCOUNT", Some("default")),
        ("MEMORY", Some("64")),
        ("CPU", Some("100")),
        ("LEVEL", Some("low")),
        ("WORD", Some("sesame")),
        ("ABSENT", None),
        ("HOSTNAME", Some("env-pod")),
        ("KUBERNETES_SERVICE_HOST", Some("10.96.0.1")),
        ("KUBERNETES_SERVICE_PORT", Some("443")),
        ("ENV_WEB_SERVICE_PORT", Some("81")),
    ] {
        ensure!(told(name) == expected, "{name} is not {expected:?}: {text}");
    }
    Ok(())
}

#[test]
fn each_kind_of_volume_holds_what_it_should_and_follows_its_source() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let edge = world.edge("volumes")?;
    let literals = ["--from-literal=a=1", "--from-literal=page=hello"];
    world
        .kubectl
        .ok(&[&["create", "configmap", "vol-cm"], &literals[..]].concat())?;
    let secret = ["create", "secret", "generic", "vol-key"];
    world
        .kubectl
        .ok(&[&secret[..], &["--from-literal=word=sesame"]].concat())?;
    let mut pod = shell_pod("vol-pod", "volumes", "sleep 1000");
    pod["metadata"]["labels"]["tier"] = json!("front");
    let labels =
        json!({"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]});
    pod["spec"]["volumes"] = json!([
        {"name": "cm", "configMap": {"name": "vol-cm",
            "items": [{"key": "page", "path": "sub/page.txt", "mode": 0o400}]}},
        {"name": "key", "secret": {"secretName": "vol-key", "defaultMode": 0o440}},
        {"name": "disk", "emptyDir": {}},
        {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "8Mi"}},
        {"name": "host", "hostPath": {"path": "/var/lib/vol-pod", "type": "DirectoryOrCreate"}},
        {"name": "down", "downwardAPI": labels.clone()},
        {"name": "all", "projected": {"sources": [
            {"configMap": {"name": "vol-cm", "items": [{"key": "a", "path": "cm/a"}]}},
            {"secret": {"name": "vol-key"}},
            {"downwardAPI": labels},
            {"serviceAccountToken": {"path": "token", "audience": "vault", "expirationSeconds": 700}},
        ]}},
    ]);
    let mount = |name: &str| json!({"name": name, "mountPath": format!("/{name}")});
    pod["spec"]["containers"][0]["volumeMounts"] = json!([
        mount("cm"), mount("key"), mount("disk"), mount("memory"), mount("host"), mount("down"),
        mount("all"),
        {"name": "cm", "mountPath": "/one-file", "subPath": "sub/page.txt"},
    ]);
    world.kubectl.apply(&pod.to_string())?;
    let before = world.pod_running(&edge, "vol-pod")?;
    let shell = |script: &str| world.in_pod(&edge, "vol-pod", &["/bin/sh", "-c", script]);
    for (script, expected) in [
        (
            "cat /cm/sub/page.txt; stat -Lc %a /cm/sub/page.txt",
            "hello400",
        ),
        ("ls /cm", "sub"),
        ("cat /one-file", "hello"),
        ("cat /key/word; stat -Lc %a /key/word", "sesame440"),
        ("echo kept > /disk/x && cat /disk/x", "kept"),
        ("grep ' /memory ' /proc/mounts | cut -d ' ' -f 3", "tmpfs"),
        ("df -k /memory | tail -n 1 | awk '{print $2}'", "8192"),
        ("echo kept > /host/x && cat /host/x", "kept"),
        ("grep -c '^tier=\"front\"$' /down/labels", "1"),
        (
            "cat /all/cm/a; cat /all/word; grep -c tier /all/labels",
            "1sesame1",
        ),
        // A JSON Web Token for the audience that was asked for.
        (
            "cut -d . -f 2 /all/token | base64 -d 2>/dev/null | grep -c '\"aud\":\\[\"vault\"\\]'",
            "1",
        ),
    ] {
        let said = shell(script).with_context(|| world.story(&edge))?;
        ensure!(said.trim() == expected, "{script}: {said:?}");
    }
    let on_host = edge.machine.exec(&["cat", "/var/lib/vol-pod/x"])?;
    ensure!(on_host.trim() == "kept", "{on_host}");

    // What changes in the cluster changes in the files, under a running container.
    let patch = ["patch", "configmap", "vol-cm", "-p"];
    world
        .kubectl
        .ok(&[&patch[..], &[r#"{"data":{"a":"2","page":"bye"}}"#]].concat())?;
    let patch = ["patch", "secret", "vol-key", "-p"];
    world
        .kubectl
        .ok(&[&patch[..], &[r#"{"stringData":{"word":"open"}}"#]].concat())?;
    world
        .kubectl
        .ok(&["label", "pod", "vol-pod", "--overwrite", "tier=back"])?;
    wait_for("all new values", SOON, || {
        let said = shell(
            "cat /cm/sub/page.txt /key/word /all/cm/a /all/word; grep -h tier /down/labels /all/labels",
        )?;
        let expected = "byeopen2opentier=\"back\"tier=\"back\"";
        ensure!(said.replace('\n', "") == expected, "{said}");
        Ok(())
    })
    .with_context(|| world.story(&edge))?;
    let after = world.kubectl.json(&["get", "pod", "vol-pod"])?;
    ensure!(
        container_id(&before)? == container_id(&after)?,
        "the container was replaced"
    );

    // What belongs to the Pod goes with it; what belongs to the device stays.
    let dir = edge.data_dir().join("pods");
    let uid = before["metadata"]["uid"].as_str().context("a UID")?;
    ensure!(dir.join(uid).exists(), "the Pod has no directory");
    world
        .kubectl
        .ok(&["delete", "pod", "vol-pod", "--wait=false"])?;
    world.pod_gone(&edge, "vol-pod")?;
    wait_for("end of the Pod's directory", SOON, || {
        ensure!(!dir.join(uid).exists(), "it is there");
        Ok(())
    })?;
    edge.machine.exec(&["cat", "/var/lib/vol-pod/x"]).map(drop)
}

#[test]
fn init_containers_run_in_order_and_a_sidecar_stays() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let edge = world.edge("init")?;
    let part = |name: &str, script: &str| {
        json!({
            "name": name,
            "image": BUSYBOX,
            "command": ["/bin/sh", "-c", format!("echo {name} >> /shared/order; {script}")],
            "volumeMounts": [{"name": "shared", "mountPath": "/shared"}],
        })
    };
    let mut sidecar = part("sidecar", "trap 'exit 0' TERM; while :; do sleep 0.1; done");
    sidecar["restartPolicy"] = json!("Always");
    let mut pod = shell_pod("init-pod", "init", "");
    pod["spec"]["restartPolicy"] = json!("Never");
    pod["spec"]["volumes"] = json!([{"name": "shared", "emptyDir": {}}]);
    pod["spec"]["initContainers"] =
        json!([part("first", "sleep 1"), sidecar, part("second", "true")]);
    pod["spec"]["containers"] = json!([part(
        "main",
        "while [ ! -e /shared/end ]; do sleep 0.1; done; exit 0"
    )]);
    world.kubectl.apply(&pod.to_string())?;
    let object = world.pod_running(&edge, "init-pod")?;
    let order = world.in_pod(&edge, "init-pod", &["/bin/cat", "/shared/order"])?;
    let order: Vec<&str> = order.lines().collect();
    ensure!(order[..1] == ["first"], "{order:?}");
    ensure!(order.ends_with(&["main"]), "{order:?}");
    ensure!(order.len() == 4, "{order:?}");
    let inits = &object["status"]["initContainerStatuses"];
    ensure!(inits[0]["state"]["terminated"]["exitCode"] == 0, "{inits}");
    ensure!(inits[1]["state"]["running"].is_object(), "{inits}");
    ensure!(inits[1]["started"] == true, "{inits}");
    ensure!(inits[2]["state"]["terminated"]["exitCode"] == 0, "{inits}");
    for kind in [
        "PodReadyToStartContainers",
        "Initialized",
        "ContainersReady",
        "Ready",
        "PodScheduled",
    ] {
        ensure!(
            condition(&object, kind) == Some("True"),
            "{kind}: {}",
            object["status"]
        );
    }

    // The sidecar does not keep a Pod alive whose work is done.
    world.in_pod(&edge, "init-pod", &["/bin/touch", "/shared/end"])?;
    wait_for("the end of the Pod", SOON, || {
        let pod = world.kubectl.json(&["get", "pod", "init-pod"])?;
        ensure!(pod["status"]["phase"] == "Succeeded", "{}", pod["status"]);
        Ok(())
    })
    .with_context(|| world.story(&edge))?;

    // One that fails keeps the others from starting, and says so.
    let mut pod = shell_pod("init-fails", "init", "sleep 1000");
    pod["spec"]["restartPolicy"] = json!("Never");
    pod["spec"]["initContainers"] = json!([
        {"name": "broken", "image": BUSYBOX, "command": ["/bin/sh", "-c", "exit 4"]},
    ]);
    world.kubectl.apply(&pod.to_string())?;
    wait_for("a Pod that failed", SOON, || {
        let status = world.kubectl.json(&["get", "pod", "init-fails"])?["status"].clone();
        ensure!(status["phase"] == "Failed", "{status}");
        let end = &status["initContainerStatuses"][0]["state"]["terminated"];
        ensure!(end["exitCode"] == 4, "{status}");
        let main = &status["containerStatuses"][0]["state"]["waiting"];
        ensure!(main["reason"] == "PodInitializing", "{status}");
        Ok(())
    })
    .with_context(|| world.story(&edge))
}

#[test]
fn a_pods_token_is_good_at_the_api_server_as_long_as_the_pod_lives() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let edge = world.edge("token")?;
    world.kubectl.ok(&["create", "serviceaccount", "worker"])?;
    let mut pod = shell_pod("token-pod", "token", "sleep 1000");
    pod["spec"]["serviceAccountName"] = json!("worker");
    world.kubectl.apply(&pod.to_string())?;
    let object = world.pod_running(&edge, "token-pod")?;
    let read = |file: &str| {
        let path = format!("{ACCOUNT}/{file}");
        world.in_pod(&edge, "token-pod", &["/bin/cat", &path])
    };
    ensure!(read("namespace")? == "default");
    let (token, authorities) = (read("token")?, read("ca.crt")?);
    // The cluster's own, and behind it the device's.
    let root = world
        .kubectl
        .json(&["get", "configmap", "kube-root-ca.crt"])?;
    let root = root["data"]["ca.crt"]
        .as_str()
        .context("the cluster's root")?;
    let device = authorities
        .strip_prefix(root)
        .context("the cluster's first")?;
    ensure!(
        device.matches("BEGIN CERTIFICATE").count() == 1,
        "{authorities}"
    );

    let said = ask_as(world, &edge, &token, &authorities)?;
    let answer: Value = serde_json::from_str(&said.stdout)
        .with_context(|| format!("{}{}", said.stdout, said.stderr))?;
    let user = &answer["status"]["userInfo"];
    ensure!(
        user["username"] == "system:serviceaccount:default:worker",
        "{user}"
    );
    let bound = |key: &str| user["extra"][format!("authentication.kubernetes.io/{key}")][0].clone();
    ensure!(bound("pod-name") == "token-pod", "{user}");
    ensure!(bound("pod-uid") == object["metadata"]["uid"], "{user}");
    ensure!(bound("node-name") == "token", "{user}");

    world
        .kubectl
        .ok(&["delete", "pod", "token-pod", "--wait=false"])?;
    world.pod_gone(&edge, "token-pod")?;
    // The API server remembers for some seconds what it found.
    wait_for("end of the token", SOON, || {
        let said = ask_as(world, &edge, &token, &authorities)?;
        ensure!(said.code != 0, "it is still good: {}", said.stdout);
        ensure!(said.stderr.contains("Unauthorized"), "{}", said.stderr);
        Ok(())
    })
}

/// `kubectl auth whoami` with nothing but what a Pod has.
fn ask_as(world: &World, edge: &Edge, token: &str, authorities: &str) -> Result<Said> {
    let server = world.kubectl.ok(&[
        "config",
        "view",
        "--minify",
        "-o",
        "jsonpath={.clusters[0].cluster.server}",
    ])?;
    let (empty, file) = (
        edge.machine.dir.join("empty-kubeconfig"),
        edge.machine.dir.join("ca.crt"),
    );
    fs::write(&empty, "")?;
    fs::write(&file, authorities)?;
    let file = file.to_str().context("path of the roots")?;
    Kubectl::new(&world.kubectl.program, &empty).run(&[
        "--server",
        &server,
        "--certificate-authority",
        file,
        "--token",
        token,
        "auth",
        "whoami",
        "-o",
        "json",
    ])
}

#[test]
fn a_hosts_file_a_hostname_and_a_port_of_the_device() -> Result<()> {
    let world = world()?;
    let _peace = world.in_peace();
    let edge = world.edge("host")?;
    let mut pod = shell_pod("host-pod", "host", "exec /bin/httpd -f -p 8080 -h /etc");
    pod["spec"]["hostname"] = json!("front");
    pod["spec"]["subdomain"] = json!("web");
    pod["spec"]["hostAliases"] = json!([{"ip": "192.0.2.7", "hostnames": ["printer"]}]);
    pod["spec"]["dnsPolicy"] = json!("None");
    pod["spec"]["dnsConfig"] = json!({"nameservers": ["192.0.2.53"], "searches": ["shop.example"],
        "options": [{"name": "ndots", "value": "3"}]});
    pod["spec"]["containers"][0]["ports"] = json!([{"containerPort": 8080, "hostPort": 18080}]);
    world.kubectl.apply(&pod.to_string())?;
    let object = world.pod_running(&edge, "host-pod")?;
    let shell = |script: &str| world.in_pod(&edge, "host-pod", &["/bin/sh", "-c", script]);

    ensure!(shell("hostname")?.trim() == "front");
    let hosts = shell("cat /etc/hosts")?;
    let ip = object["status"]["podIP"].as_str().context("an address")?;
    ensure!(
        hosts.contains(&format!("{ip}\tfront.web.default.svc.cluster.local\tfront")),
        "{hosts}"
    );
    ensure!(hosts.contains("192.0.2.7\tprinter"), "{hosts}");
    let resolv = shell("cat /etc/resolv.conf")?;
    for line in [
        "nameserver 192.0.2.53",
        "search shop.example",
        "options ndots:3",
    ] {
        ensure!(resolv.contains(line), "no {line:?}: {resolv}");
    }

    let fetch = |url: &str| {
        let words = ["busybox", "wget", "-q", "-O", "-", url];
        edge.machine.exec(&words)
    };
    let at_host = "http://127.0.0.1:18080/passwd";
    ensure!(fetch(at_host)?.contains("root:"));
    // A second one for the same port is told that it is taken, and why.
    let mut second = shell_pod("host-pod-2", "host", "sleep 1000");
    second["spec"]["containers"][0]["ports"] = json!([{"containerPort": 80, "hostPort": 18080}]);
    world.kubectl.apply(&second.to_string())?;
    wait_for("the refusal of the second", SOON, || {
        let status = world.kubectl.json(&["get", "pod", "host-pod-2"])?["status"].clone();
        ensure!(status["phase"] == "Failed", "{status}");
        ensure!(status["reason"] == "NodePorts", "{status}");
        Ok(())
    })
    .with_context(|| world.story(&edge))?;

    world
        .kubectl
        .ok(&["delete", "pod", "host-pod", "--wait=false"])?;
    world.pod_gone(&edge, "host-pod")?;
    wait_for("the port is free again", SOON, || {
        ensure!(fetch(at_host).is_err(), "something answers");
        Ok(())
    })
}
