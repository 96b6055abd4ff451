//! Where the programs of a control plane come from: `KUBEBUILDER_ASSETS`, then `PATH`, then a build
//! from the Go modules in `controlplane/`, kept in `${XDG_CACHE_HOME:-~/.cache}/edge-testbed/bin`.
//!
//! A program that is found must say the wanted minor version; a distribution's `kubectl` of another
//! age is passed over. Builds are pinned by the committed go.sum, stamped with their version
//! (an unstamped one calls itself v0.0.0-master) and serialized between processes by a file lock.
//! The one program that is not built is Debian's own old kubectl: it is taken out of its package.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::bed::{progress, run};

/// A release of a Go module that programs are built from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Release {
    /// `1.37.2`, without the `v` of the tag.
    pub version: &'static str,
    /// Its directory below `controlplane/`.
    module: &'static str,
    /// The import path of a program, with `*` for its name.
    package: &'static str,
    /// What the minor version is stamped into; empty where the source says it itself.
    stamped: &'static [&'static str],
}

pub const K8S_1_37: Release = Release {
    version: "1.37.2",
    module: "v1.37",
    package: "k8s.io/kubernetes/cmd/*",
    stamped: &[
        "k8s.io/component-base/version",
        "k8s.io/client-go/pkg/version",
    ],
};
pub const K8S_1_33: Release = Release {
    version: "1.33.13",
    module: "v1.33",
    ..K8S_1_37
};
pub const ETCD: Release = Release {
    version: "3.6.16",
    module: "etcd",
    package: "go.etcd.io/etcd/server/v3",
    stamped: &[],
};
pub const CONTAINERD: Release = Release {
    version: "2.4.2",
    module: "containerd",
    package: "github.com/containerd/containerd/v2/cmd/*",
    stamped: &["github.com/containerd/containerd/v2/version"],
};

/// What serves `kubectl top`. Its version is stamped into packages of its libraries by its own
/// Makefile; nothing asks for it here.
pub const METRICS_SERVER: Release = Release {
    version: "0.9.0",
    module: "metrics-server",
    package: "sigs.k8s.io/metrics-server/cmd/*",
    stamped: &[],
};

/// The upstream end-to-end suite, `e2e.test`, of the newest release.
pub const E2E: Release = Release {
    module: "e2e",
    package: "k8s.io/kubernetes/test/*",
    ..K8S_1_37
};
/// What most of its cases run in their containers.
pub const AGNHOST: Release = Release {
    package: "k8s.io/kubernetes/test/images/*",
    stamped: &[],
    ..E2E
};
/// What runs its cases several at a time.
pub const GINKGO: Release = Release {
    version: "2.32.0",
    module: "e2e",
    package: "github.com/onsi/ginkgo/v2/*",
    stamped: &[],
};

/// Debian's package with a kubectl of 1.20, the last that many a distribution ships: it speaks SPDY
/// only.
const DEBIAN_KUBECTL: &str = "kubernetes-client";

/// The Go that `controlplane/*/go.mod` ask for.
const GO: (u32, u32) = (1, 26);

impl Release {
    /// Major and minor: `1.37`.
    pub fn minor(&self) -> &'static str {
        self.version
            .rsplit_once('.')
            .map_or(self.version, |(minor, _)| minor)
    }

    fn linker_flags(&self) -> String {
        let mut flags = String::from("-s -w");
        let (_, minor) = self.minor().split_once('.').unwrap_or_default();
        for package in self.stamped {
            if package.ends_with("/v2/version") {
                flags += &format!(" -X {package}.Version=v{}", self.version);
                continue;
            }
            flags += &format!(" -X {package}.gitVersion=v{}", self.version);
            flags += &format!(" -X {package}.gitMajor=1 -X {package}.gitMinor={minor}");
            flags += &format!(" -X {package}.gitTreeState=clean");
        }
        flags
    }
}

/// The path of a program of that release, built if need be.
pub fn ensure(name: &str, release: Release) -> Result<PathBuf> {
    if let Some(found) = installed(name, release) {
        return Ok(found);
    }
    let dir = cache()?.join(format!("{name}-{}", release.version));
    let path = dir.join(name);
    if path.is_file() {
        return Ok(path);
    }
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    // One build at a time: two would only fight for the cores, and the second finds the first's.
    let turn = File::create(cache()?.join("lock"))?;
    turn.lock()?;
    if !path.is_file() {
        build(name, release, &path)?;
    }
    Ok(path)
}

/// Debian's own kubectl, taken out of its package and kept in the cache: the machine may have a
/// `kubectl` of somebody else's, and is not changed.
pub fn ensure_debian_kubectl() -> Result<PathBuf> {
    let dir = cache()?.join(DEBIAN_KUBECTL);
    let path = dir.join("usr/bin/kubectl");
    if path.is_file() {
        return Ok(path);
    }
    let turn = File::create(cache()?.join("lock"))?;
    turn.lock()?;
    if path.is_file() {
        return Ok(path);
    }
    progress(&format!(
        "fetching Debian's {DEBIAN_KUBECTL} (once; it is kept)"
    ));
    let unfinished = dir.with_extension("unfinished");
    let _ = fs::remove_dir_all(&unfinished);
    fs::create_dir_all(&unfinished)?;
    let package = download(&unfinished)
        .context("the tests need the kubectl of Debian's package kubernetes-client")?;
    run(Command::new("dpkg-deb")
        .arg("-x")
        .arg(&package)
        .arg(&unfinished))?;
    fs::remove_file(package)?;
    fs::rename(&unfinished, &dir)?;
    ensure!(path.is_file(), "{DEBIAN_KUBECTL} has no usr/bin/kubectl");
    Ok(path)
}

/// The package's file. A new machine has no lists of packages yet.
fn download(dir: &Path) -> Result<PathBuf> {
    let fetch = || {
        run(Command::new("apt-get")
            .current_dir(dir)
            .args(["download", "-qq", DEBIAN_KUBECTL]))
    };
    if fetch().is_err() {
        run(Command::new("apt-get").args(["update", "-qq"]))?;
        fetch()?;
    }
    let mut files = fs::read_dir(dir)?.flatten().map(|entry| entry.path());
    files
        .find(|path| path.extension().is_some_and(|kind| kind == "deb"))
        .context("apt-get download left no file")
}

/// A program that the distribution installed.
pub fn on_path(name: &str) -> Result<PathBuf> {
    search(name)
        .next()
        .with_context(|| format!("{name} is not installed"))
}

fn installed(name: &str, release: Release) -> Option<PathBuf> {
    let assets = std::env::var_os("KUBEBUILDER_ASSETS").map(|dir| PathBuf::from(dir).join(name));
    assets
        .into_iter()
        .chain(search(name))
        .find(|path| matches_release(path, name, release))
}

fn search(name: &str) -> impl Iterator<Item = PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut dirs: Vec<PathBuf> = std::env::split_paths(&path).collect();
    dirs.extend(["/usr/sbin".into(), "/sbin".into()]);
    dirs.into_iter()
        .map(move |dir| dir.join(name))
        .filter(|path| path.is_file())
}

/// Whether the program says that it is of the wanted release (etcd: any 3.5 or newer serves).
fn matches_release(path: &Path, name: &str, release: Release) -> bool {
    let words: &[&str] = if name == "kubectl" {
        &["version", "--client"]
    } else {
        &["--version"]
    };
    let Ok(output) = Command::new(path).args(words).stdin(Stdio::null()).output() else {
        return false;
    };
    let said = String::from_utf8_lossy(&output.stdout);
    match release.module {
        "etcd" => ["3.5.", "3.6.", "3.7."]
            .iter()
            .any(|v| said.contains(&format!("Version: {v}"))),
        "containerd" => said.contains(&format!(" v{} ", release.version)),
        _ => said.contains(&format!("v{}.", release.minor())),
    }
}

fn cache() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME") {
        Some(dir) if !dir.is_empty() => PathBuf::from(dir),
        _ => {
            PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache")
        }
    };
    let dir = base.join("edge-testbed/bin");
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    Ok(dir)
}

fn build(name: &str, release: Release, path: &Path) -> Result<()> {
    let go = go()?;
    let module = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("controlplane")
        .join(release.module);
    let unfinished = path.with_extension("unfinished");
    let begun = Instant::now();
    progress(&format!(
        "building {name} {} from source (once; it is kept)",
        release.version
    ));
    // A suite of tests is a program too, of the package that its name says.
    let (word, package): (&[&str], _) = match name.strip_suffix(".test") {
        Some(package) => (&["test", "-c", "-vet=off"], package),
        None => (&["build"], name),
    };
    let mut child = Command::new(go)
        .current_dir(&module)
        .env("CGO_ENABLED", "0")
        .env("GOFLAGS", "-mod=readonly")
        .env("GOTOOLCHAIN", "local")
        .args(word)
        .args([
            "-v",
            "-trimpath",
            "-buildvcs=false",
            "-ldflags",
            &release.linker_flags(),
        ])
        .arg("-o")
        .arg(&unfinished)
        .arg(release.package.replace('*', package))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("start go")?;
    let last = child
        .stderr
        .take()
        .map(|err| report(name, begun, BufReader::new(err)));
    ensure!(
        child.wait()?.success(),
        "building {name} {} failed:\n{}",
        release.version,
        last.unwrap_or_default()
    );
    fs::rename(&unfinished, path)?;
    progress(&format!(
        "built {name} {} in {} s",
        release.version,
        begun.elapsed().as_secs()
    ));
    Ok(())
}

/// Go names every package as it compiles it: a count of them every ten seconds is the progress.
/// Gives the last lines, which hold the error if there was one.
fn report(name: &str, begun: Instant, lines: impl BufRead) -> String {
    let (mut count, mut shown) = (0u32, Instant::now());
    let mut last = std::collections::VecDeque::new();
    for line in lines.lines().map_while(Result::ok) {
        count += 1;
        if shown.elapsed() >= Duration::from_secs(10) {
            shown = Instant::now();
            let seconds = begun.elapsed().as_secs();
            progress(&format!(
                "    {name}: {seconds} s, {count} packages compiled"
            ));
        }
        if last.len() == 20 {
            last.pop_front();
        }
        last.push_back(line);
    }
    Vec::from(last).join("\n")
}

fn go() -> Result<PathBuf> {
    let usual = PathBuf::from("/usr/local/go/bin/go");
    let Some(go) = search("go").next().or(usual.is_file().then_some(usual)) else {
        bail!("{}", missing_go("there is no Go on this machine"));
    };
    let said = Command::new(&go)
        .args(["env", "GOVERSION"])
        .env("GOTOOLCHAIN", "local")
        .output()?;
    let said = String::from_utf8_lossy(&said.stdout).trim().to_owned();
    ensure!(
        new_enough(&said),
        "{}",
        missing_go(&format!("{} is {said}", go.display()))
    );
    Ok(go)
}

fn missing_go(why: &str) -> String {
    format!(
        "a Kubernetes control plane is built from source here, and {why}: install Go {}.{} or \
         newer, or put kube-apiserver, kube-controller-manager, kube-scheduler, kubectl and etcd \
         on the PATH (or in KUBEBUILDER_ASSETS), or let KUBECONFIG name an existing cluster for \
         the quickstart",
        GO.0, GO.1
    )
}

/// Reads `go1.26.8`.
fn new_enough(said: &str) -> bool {
    let mut numbers = said
        .trim_start_matches("go")
        .split('.')
        .map(|n| n.parse::<u32>().ok());
    match (numbers.next().flatten(), numbers.next().flatten()) {
        (Some(major), Some(minor)) => (major, minor) >= GO,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_go_is_told_from_a_newer_one() {
        for (said, want) in [
            ("go1.26.8", true),
            ("go1.30", true),
            ("go1.25.9", false),
            ("", false),
            ("devel", false),
        ] {
            assert_eq!(new_enough(said), want, "{said}");
        }
    }

    #[test]
    fn a_release_knows_its_minor_version_and_stamps_it() {
        assert_eq!(K8S_1_33.minor(), "1.33");
        assert!(K8S_1_33.linker_flags().contains("gitVersion=v1.33.13"));
        assert!(K8S_1_33.linker_flags().contains("gitMinor=33"));
    }
}
