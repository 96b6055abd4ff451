//! Volumes on real mounts: these tests run as root.

use std::os::unix::fs::{MetadataExt, symlink};
use std::sync::atomic::{AtomicU64, Ordering};

use common::ids::Kind;
use serde_json::{Value, json};

use super::*;
use crate::pods::testing::{desired, environment, pod, put};
use crate::pods::tokens::{TokenFuture, TokenSource};

/// Hands out tokens that count up.
#[derive(Default)]
struct Counter(AtomicU64);

impl TokenSource for Counter {
    fn token<'a>(&'a self, request: &'a TokenRequest) -> TokenFuture<'a> {
        Box::pin(async move {
            let n = self.0.fetch_add(1, Ordering::Relaxed);
            Ok(Token {
                token: format!("{}-{n}", request.service_account),
                refresh_in_seconds: 100,
            })
        })
    }

    fn forget(&self, _pod: &ObjectKey) {}
}

struct Bench {
    volumes: Volumes,
    desired: Desired,
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "volumes are mounts: run this test as root (it mounts tmpfs in a temporary directory)"
        );
        let dir = tempfile::tempdir().unwrap();
        let desired = desired(&[
            (Kind::ConfigMap, "n", "cm", json!({"data": {"k": "one"}})),
            (Kind::Secret, "n", "sec", json!({"data": {"s": "aHVudGVy"}})),
            (
                Kind::ConfigMap,
                "n",
                "kube-root-ca.crt",
                json!({"data": {"ca.crt": "ROOT\n"}}),
            ),
        ]);
        let config = VolumesConfig {
            root: dir.path().to_owned(),
            node_ca_pem: Some("NODE\n".into()),
        };
        let volumes = Volumes::new(config, desired.clone(), Arc::new(Counter::default()));
        Self {
            volumes,
            desired,
            dir,
        }
    }

    async fn ensure(&self, pod: &Pod) -> Result<Mounted, MountError> {
        self.volumes.ensure(pod, &environment()).await
    }

    fn plans(
        &self,
        pod: &Pod,
        env: &[(String, String)],
    ) -> Result<Vec<VolumeMountPlan>, ConfigError> {
        let container = &pod.spec.as_ref().unwrap().containers[0];
        self.volumes.container_mounts(pod, container, env, None, 0)
    }

    /// The device's path behind a container's.
    fn at(&self, pod: &Pod, path: &str) -> PathBuf {
        let plans = self.plans(pod, &[]).unwrap();
        let plan = plans.iter().find(|p| p.container_path == path);
        plan.unwrap_or_else(|| panic!("{path} is not mounted"))
            .host_path
            .clone()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = mounts::unmount_all(&self.dir.path().canonicalize().unwrap());
    }
}

fn the_pod(volumes: Value, mounts: Value, context: Value) -> Pod {
    pod(json!({
        "metadata": {"name": "p", "namespace": "n", "uid": "u-1", "labels": {"a": "b"}},
        "spec": {"serviceAccountName": "sa", "securityContext": context, "volumes": volumes,
            "containers": [{"name": "c", "volumeMounts": mounts}]}
    }))
}

fn all_kinds(context: Value) -> Pod {
    the_pod(
        json!([
            {"name": "cm", "configMap": {"name": "cm"}},
            {"name": "sec", "secret": {"secretName": "sec"}},
            {"name": "down", "downwardAPI": {"items": [
                {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
            {"name": "api", "projected": {"sources": [
                {"serviceAccountToken": {"path": "token"}},
                {"configMap": {"name": "kube-root-ca.crt"}}]}},
            {"name": "disk", "emptyDir": {}},
            {"name": "mem", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
            {"name": "host", "hostPath": {"path": "/etc", "type": "Directory"}},
            {"name": "unused", "secret": {"secretName": "never-heard-of"}}
        ]),
        json!([
            {"name": "cm", "mountPath": "/cm"},
            {"name": "sec", "mountPath": "/sec"},
            {"name": "down", "mountPath": "/down"},
            {"name": "api", "mountPath": "/api"},
            {"name": "disk", "mountPath": "/disk", "mountPropagation": "HostToContainer"},
            {"name": "mem", "mountPath": "/mem"},
            {"name": "host", "mountPath": "/host", "readOnly": true,
                "recursiveReadOnly": "Enabled"}
        ]),
        context,
    )
}

fn fs_type(path: &Path) -> nix::sys::statfs::FsType {
    nix::sys::statfs::statfs(path).unwrap().filesystem_type()
}

/// Counts of blocks are 32 bits wide on 32-bit boards.
fn wide(count: impl Into<u64>) -> u64 {
    count.into()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

#[tokio::test]
async fn every_kind_is_made_updated_and_taken_away() {
    let bench = Bench::new();
    let pod = all_kinds(json!({}));
    let mounted = bench.ensure(&pod).await.unwrap();
    assert_eq!(mounted.next_refresh, Some(Duration::from_secs(100)));
    let read =
        |path: &str, name: &str| fs::read_to_string(bench.at(&pod, path).join(name)).unwrap();
    assert_eq!(read("/cm", "k"), "one");
    assert_eq!(read("/sec", "s"), "hunter");
    assert_eq!(read("/down", "labels"), "a=\"b\"");
    assert_eq!(read("/api", "token"), "sa-0");
    assert_eq!(read("/api", "ca.crt"), "ROOT\nNODE\n");
    for path in ["/sec", "/down", "/api", "/mem"] {
        let kind = fs_type(&bench.at(&pod, path));
        assert_eq!(
            kind,
            nix::sys::statfs::TMPFS_MAGIC,
            "{path} is not in memory"
        );
    }
    assert_eq!(mode(&bench.at(&pod, "/disk")), 0o777);
    assert_eq!(mode(&bench.at(&pod, "/mem")), 0o1777);
    let size = nix::sys::statvfs::statvfs(&bench.at(&pod, "/mem")).unwrap();
    assert_eq!(wide(size.blocks()) * wide(size.fragment_size()), 1 << 20);

    let plans = bench.plans(&pod, &[]).unwrap();
    let shown: Vec<_> = plans
        .iter()
        .map(|p| {
            (
                p.container_path.as_str(),
                p.readonly,
                p.recursive_readonly,
                p.propagation,
            )
        })
        .collect();
    assert_eq!(
        shown,
        [
            ("/cm", true, false, Propagation::Private),
            ("/sec", true, false, Propagation::Private),
            ("/down", true, false, Propagation::Private),
            ("/api", true, false, Propagation::Private),
            ("/disk", false, false, Propagation::HostToContainer),
            ("/mem", false, false, Propagation::Private),
            ("/host", true, true, Propagation::Private),
            ("/dev/termination-log", false, false, Propagation::Private),
        ]
    );

    fs::write(bench.at(&pod, "/disk").join("mine"), "kept").unwrap();
    fs::write(bench.at(&pod, "/mem").join("mine"), "kept").unwrap();
    put(
        &bench.desired,
        &[(
            Kind::ConfigMap,
            "n",
            "cm",
            json!({"data": {"k": "two", "l": "3"}}),
        )],
    );
    bench.ensure(&pod).await.unwrap();
    assert_eq!(read("/cm", "k"), "two");
    assert_eq!(read("/cm", "l"), "3");
    assert_eq!(read("/api", "token"), "sa-1");
    assert_eq!(
        (read("/disk", "mine"), read("/mem", "mine")),
        ("kept".into(), "kept".into())
    );

    put(&bench.desired, &[(Kind::ConfigMap, "n", "cm", Value::Null)]);
    bench.ensure(&pod).await.unwrap();
    assert_eq!(
        read("/cm", "k"),
        "two",
        "a deleted ConfigMap erased a mounted file"
    );

    assert_eq!(bench.volumes.known_uids(), ["u-1"]);
    bench.volumes.teardown("u-1").await.unwrap();
    bench.volumes.teardown("u-1").await.unwrap();
    assert!(!bench.dir.path().join("pods/u-1").exists());
    assert!(bench.volumes.known_uids().is_empty());
    assert!(
        Path::new("/etc/passwd").exists(),
        "teardown followed a hostPath"
    );
}

#[tokio::test]
async fn files_of_a_group_are_the_groups() {
    let bench = Bench::new();
    let pod = all_kinds(json!({"fsGroup": 4242}));
    bench.ensure(&pod).await.unwrap();
    let token = bench.at(&pod, "/api").join("token");
    let meta = fs::metadata(&token).unwrap();
    assert_eq!((meta.gid(), meta.mode() & 0o777), (4242, 0o640));
    let secret = fs::metadata(bench.at(&pod, "/sec").join("s")).unwrap();
    assert_eq!((secret.gid(), secret.mode() & 0o777), (4242, 0o644));
    for (path, want) in [("/disk", 0o2777), ("/mem", 0o3777)] {
        let dir = fs::metadata(bench.at(&pod, path)).unwrap();
        assert_eq!((dir.gid(), dir.mode() & 0o7777), (4242, want), "{path}");
    }
}

#[tokio::test]
async fn what_cannot_be_mounted_says_why() {
    let bench = Bench::new();
    put(&bench.desired, &[(Kind::Secret, "n", "gone", Value::Null)]);
    for (volume, want) in [
        (
            json!({"name": "v", "secret": {"secretName": "gone"}}),
            "MountVolume.SetUp failed for volume \"v\" : secret \"gone\" not found",
        ),
        (
            json!({"name": "v", "persistentVolumeClaim": {"claimName": "x"}}),
            "MountVolume.SetUp failed for volume \"v\" : volumes of type persistentVolumeClaim \
             are not supported on an edge node",
        ),
        (
            json!({"name": "v", "emptyDir": {"medium": "HugePages"}}),
            "MountVolume.SetUp failed for volume \"v\" : emptyDir medium \"HugePages\" is not \
             supported on an edge node",
        ),
        (
            json!({"name": "v", "hostPath": {"path": "/etc/passwd", "type": "Directory"}}),
            "MountVolume.SetUp failed for volume \"v\" : hostPath type check failed: /etc/passwd \
             is not a directory",
        ),
        (
            json!({"name": "../v", "emptyDir": {}}),
            "MountVolume.SetUp failed for volume \"../v\" : its name is malformed",
        ),
    ] {
        let mounts = json!([{"name": volume["name"], "mountPath": "/v"}]);
        let pod = the_pod(json!([volume]), mounts, json!({}));
        assert_eq!(bench.ensure(&pod).await.unwrap_err().to_string(), want);
    }
    let unknown = the_pod(
        json!([{"name": "v", "secret": {"secretName": "never-heard-of"}}]),
        json!([{"name": "v", "mountPath": "/v"}]),
        json!({}),
    );
    let error = bench.ensure(&unknown).await.unwrap_err();
    assert!(matches!(error, MountError::Unknown { .. }), "{error}");
    let mut odd = unknown.clone();
    odd.metadata.uid = Some("../../etc".into());
    assert!(matches!(
        bench.ensure(&odd).await,
        Err(MountError::Uid { .. })
    ));
    assert!(matches!(
        bench.volumes.teardown("../x").await,
        Err(MountError::Uid { .. })
    ));
}

#[tokio::test]
async fn a_sub_path_is_bound_and_a_restart_sees_the_newest() {
    let bench = Bench::new();
    let env = [("WHO".to_owned(), "me".to_owned())];
    let pod = the_pod(
        json!([{"name": "cm", "configMap": {"name": "cm"}}, {"name": "e", "emptyDir": {}}]),
        json!([
            {"name": "cm", "mountPath": "/app/k", "subPath": "k"},
            {"name": "e", "mountPath": "/data", "subPathExpr": "$(WHO)/x"}
        ]),
        json!({}),
    );
    bench.ensure(&pod).await.unwrap();
    let plans = bench.plans(&pod, &env).unwrap();
    assert_eq!(fs::read_to_string(&plans[0].host_path).unwrap(), "one");
    fs::write(plans[1].host_path.join("f"), "").unwrap();
    let volume = bench
        .dir
        .path()
        .join("pods/u-1/volumes/kubernetes.io~empty-dir/e");
    assert!(volume.join("me/x/f").exists());

    put(
        &bench.desired,
        &[(Kind::ConfigMap, "n", "cm", json!({"data": {"k": "two"}}))],
    );
    bench.ensure(&pod).await.unwrap();
    assert_eq!(
        fs::read_to_string(&plans[0].host_path).unwrap(),
        "one",
        "subPath never updates"
    );
    let again = bench.plans(&pod, &env).unwrap();
    assert_eq!(fs::read_to_string(&again[0].host_path).unwrap(), "two");
    assert_eq!(again, plans);

    let unresolved = bench.plans(&pod, &[]).unwrap_err();
    assert!(unresolved.to_string().contains("\"WHO\""), "{unresolved}");
    bench.volumes.teardown("u-1").await.unwrap();
    assert!(!bench.dir.path().join("pods/u-1").exists());
}

#[tokio::test]
async fn a_link_out_of_the_volume_is_not_bound() {
    let bench = Bench::new();
    let pod = the_pod(
        json!([{"name": "e", "emptyDir": {}}]),
        json!([{"name": "e", "mountPath": "/data", "subPath": "x"}]),
        json!({}),
    );
    bench.ensure(&pod).await.unwrap();
    let volume = bench
        .dir
        .path()
        .join("pods/u-1/volumes/kubernetes.io~empty-dir/e");
    symlink("/etc", volume.join("x")).unwrap();
    let error = bench.plans(&pod, &[]).unwrap_err().to_string();
    assert!(error.contains("leads out of its volume"), "{error}");
    // A data directory that stays behind a mount is never deleted.
    fs::remove_file(volume.join("x")).unwrap();
    bench.plans(&pod, &[]).unwrap();
    bench.volumes.teardown("u-1").await.unwrap();
}

#[tokio::test]
async fn a_volume_inside_a_read_only_one_has_its_mount_point() {
    let bench = Bench::new();
    let pod = the_pod(
        json!([{"name": "cm", "configMap": {"name": "cm"}}, {"name": "e", "emptyDir": {}}]),
        json!([
            {"name": "cm", "mountPath": "/etc/app"},
            {"name": "e", "mountPath": "/etc/app/cache/x"}
        ]),
        json!({}),
    );
    bench.ensure(&pod).await.unwrap();
    assert!(bench.at(&pod, "/etc/app").join("cache/x").is_dir());
    put(
        &bench.desired,
        &[(Kind::ConfigMap, "n", "cm", json!({"data": {"k": "2"}}))],
    );
    bench.ensure(&pod).await.unwrap();
    assert!(bench.at(&pod, "/etc/app").join("cache/x").is_dir());
}

#[tokio::test]
async fn hosts_and_last_words() {
    let bench = Bench::new();
    let mut pod = the_pod(json!([]), json!([]), json!({}));
    let container = &mut pod.spec.as_mut().unwrap().containers[0];
    container.termination_message_path = Some("/tmp/last".into());
    container.termination_message_policy = Some("FallbackToLogsOnError".into());
    let container = container.clone();
    let hosts = bench
        .volumes
        .write_hosts(&pod, "127.0.0.1\tlocalhost\n")
        .unwrap();
    let inode = fs::metadata(&hosts).unwrap().ino();
    bench
        .volumes
        .write_hosts(&pod, "127.0.0.1\tother\n")
        .unwrap();
    assert_eq!(
        fs::metadata(&hosts).unwrap().ino(),
        inode,
        "running containers lost the file"
    );

    let plans = bench
        .volumes
        .container_mounts(&pod, &container, &[], Some(&hosts), 2)
        .unwrap();
    let paths: Vec<_> = plans.iter().map(|p| p.container_path.as_str()).collect();
    assert_eq!(paths, ["/etc/hosts", "/tmp/last"]);
    let log = bench.dir.path().join("log");
    fs::write(&log, "2026-11-23T03:03:00Z stderr F it broke\n").unwrap();
    let read = |code| {
        bench
            .volumes
            .read_termination_message("u-1", &container, 2, code, &log)
    };
    assert_eq!((read(0).as_str(), read(1).as_str()), ("", "it broke\n"));
    fs::write(&plans[1].host_path, "bye").unwrap();
    assert_eq!((read(0).as_str(), read(1).as_str()), ("bye", "bye"));
}

#[tokio::test]
async fn the_nodes_ca_comes_and_goes_with_the_local_api_in_volumes_that_are_mounted() {
    let bench = Bench::new();
    let pod = all_kinds(json!({}));
    let agent = |pem: Option<&str>| {
        let config = VolumesConfig {
            root: bench.dir.path().to_owned(),
            node_ca_pem: pem.map(str::to_owned),
        };
        let tokens = Arc::new(Counter::default());
        Volumes::new(config, bench.desired.clone(), tokens)
    };
    for (pem, want) in [
        (None, "ROOT\n"),
        (Some("NODE\n"), "ROOT\nNODE\n"),
        (None, "ROOT\n"),
    ] {
        agent(pem).ensure(&pod, &environment()).await.unwrap();
        let file = bench.at(&pod, "/api").join("ca.crt");
        assert_eq!(fs::read_to_string(file).unwrap(), want);
    }
}
