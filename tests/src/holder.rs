//! The processes that hold namespaces open, and the way into them.
//!
//! `testbed hold` makes a set of namespaces and stays as their init: a bare network namespace for
//! routers, or a whole machine (mount, network, host name, IPC, processes, cgroups). Killing a
//! machine's init is pulling its plug: the kernel ends every process in it, containers included,
//! and every mount goes with them. `testbed enter` runs a command inside.
//!
//! What is private in a machine: `/run` (sockets, shims, network namespaces), `/etc` (CNI
//! configuration, resolv.conf), `/var/log` (pods, containers), `/var/lib` (cni, kubelet),
//! `/proc`, the cgroup tree. Everything else is the host's.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

/// What a machine needs to know to set itself up.
pub struct MachineSpec {
    /// The host name.
    pub name: String,
    /// Where its private parts of the file system are kept.
    pub dir: PathBuf,
    /// The testbed's state directory, which stays visible at its path.
    pub state: PathBuf,
    /// Its cgroup below each hierarchy's root, such as `etb3/edge-1`.
    pub cgroup: String,
}

const MACHINE: CloneFlags = CloneFlags::CLONE_NEWNS
    .union(CloneFlags::CLONE_NEWNET)
    .union(CloneFlags::CLONE_NEWUTS)
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWPID)
    .union(CloneFlags::CLONE_NEWCGROUP);

/// Holds a network namespace and nothing else. Prints its process id, then stays.
pub fn hold_network() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace")?;
    announce(std::process::id())?;
    reap_for_ever()
}

/// Makes a machine: prints the host's id of its init, then stays as that one's parent.
pub fn hold_machine(spec: &MachineSpec) -> Result<()> {
    join_cgroup(&spec.cgroup)?;
    unshare(MACHINE).context("make the namespaces of a machine")?;
    let mut init = Command::new(std::env::current_exe()?)
        .args([
            "machine-init",
            "--name",
            &spec.name,
            "--cgroup",
            &spec.cgroup,
        ])
        .arg("--dir")
        .arg(&spec.dir)
        .arg("--state")
        .arg(&spec.state)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    if let Some(out) = init.stdout.take() {
        BufReader::new(out).read_line(&mut line)?;
    }
    if line.trim() != "ready" {
        bail!("a machine's init did not come up: {:?}", init.wait()?);
    }
    announce(init.id())?;
    init.wait()?;
    Ok(())
}

/// The first process inside a machine.
pub fn machine_init(spec: &MachineSpec) -> Result<()> {
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).context("make / private")?;
    mount_fresh("proc", Path::new("/proc"), "proc", "")?;
    mount_private_etc(&spec.dir)?;
    mount_private_var(spec)?;
    mount_fresh("run", Path::new("/run"), "tmpfs", "mode=755")?;
    mount_cgroups()?;
    nix::unistd::sethostname(&spec.name)?;
    write_names(&spec.name)?;
    println_ready()?;
    reap_for_ever()
}

/// Runs a command inside a machine (or, with `cgroup` absent, in a bare network namespace) and
/// ends with its status. `pid_file` receives the command's process id as the host sees it.
pub fn enter(
    target: i32,
    cgroup: Option<&str>,
    pid_file: Option<&Path>,
    argv: &[String],
) -> Result<i32> {
    let Some((program, rest)) = argv.split_first() else {
        bail!("no command to run")
    };
    let kinds: &[&str] = match cgroup {
        Some(path) => {
            join_cgroup(path)?;
            &["cgroup", "uts", "ipc", "net", "pid", "mnt"]
        }
        None => &["net"],
    };
    let open = |kind: &&str| fs::File::open(format!("/proc/{target}/ns/{kind}"));
    let spaces: Vec<fs::File> = kinds
        .iter()
        .map(open)
        .collect::<Result<_, _>>()
        .context("open the namespaces")?;
    for space in &spaces {
        setns(space, CloneFlags::empty()).context("enter a namespace")?;
    }
    drop(spaces);
    let mut command = Command::new(program);
    command.args(rest);
    if cgroup.is_none() {
        return Err(command.exec()).with_context(|| format!("run {program}"));
    }
    let mut child = command.spawn().with_context(|| format!("run {program}"))?;
    if let Some(path) = pid_file {
        fs::write(path, child.id().to_string())?;
    }
    let status = child.wait()?;
    Ok(status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or_default()))
}

/// The mounted cgroup hierarchies, as this process sees them: one for each controller in
/// version 1, a single one in version 2, both kinds on a mixed machine.
pub fn cgroup_roots() -> Vec<PathBuf> {
    hierarchies()
        .into_iter()
        .map(|hierarchy| hierarchy.path)
        .collect()
}

struct Hierarchy {
    path: PathBuf,
    version: &'static str,
    /// The controllers of a version 1 hierarchy, or its name: the mount's data.
    data: String,
}

fn hierarchies() -> Vec<Hierarchy> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table.lines().filter_map(parse_hierarchy).collect()
}

/// Reads one line of mountinfo (proc_pid_mountinfo(5)); `None` for what is no cgroup mount.
fn parse_hierarchy(line: &str) -> Option<Hierarchy> {
    let (left, right) = line.split_once(" - ")?;
    let path = PathBuf::from(left.split(' ').nth(4)?);
    let mut right = right.split(' ');
    let version = match right.next()? {
        "cgroup" => "cgroup",
        "cgroup2" => "cgroup2",
        _ => return None,
    };
    let options = right.nth(1).unwrap_or_default();
    let plain = |option: &&str| !matches!(*option, "rw" | "ro" | "xattr" | "clone_children");
    let mut data: Vec<&str> = match version {
        "cgroup" => options.split(',').filter(plain).collect(),
        _ => Vec::new(),
    };
    data.retain(|option| !option.starts_with("release_agent="));
    if data.iter().any(|option| option.starts_with("name=")) {
        data.insert(0, "none");
    }
    Some(Hierarchy {
        path,
        version,
        data: data.join(","),
    })
}

/// Puts this process into `path` of every hierarchy, making it where it is missing.
fn join_cgroup(path: &str) -> Result<()> {
    for hierarchy in hierarchies() {
        let mut dir = hierarchy.path.clone();
        for part in path.split('/') {
            let above = dir.clone();
            dir.push(part);
            fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
            inherit(&above, &dir);
        }
        // With controllers on, version 2 allows processes in leaves only: see `delegate`.
        let leaf = dir.join(LEAF);
        let home = if leaf.exists() { leaf } else { dir };
        fs::write(home.join("cgroup.procs"), std::process::id().to_string())
            .with_context(|| format!("join {}", home.display()))?;
    }
    Ok(())
}

/// The cgroup of a version 2 machine's own processes, beside those of its Pods.
const LEAF: &str = "machine";

/// A new cpuset has neither CPUs nor memory, and version 2 hands controllers down one level at a
/// time. Best effort: what a machine lacks shows when a container asks for it.
fn inherit(above: &Path, dir: &Path) {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let empty = fs::read_to_string(dir.join(file)).is_ok_and(|text| text.trim().is_empty());
        if empty && let Ok(value) = fs::read_to_string(above.join(file)) {
            let _ = fs::write(dir.join(file), value.trim());
        }
    }
    hand_down(above);
}

fn hand_down(dir: &Path) {
    let names = fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
    for name in names.split_whitespace() {
        let _ = fs::write(dir.join("cgroup.subtree_control"), format!("+{name}"));
    }
}

/// The machine's own view of the cgroups: the same hierarchies, rooted at the machine's own.
fn mount_cgroups() -> Result<()> {
    let base = Path::new("/sys/fs/cgroup");
    let found = hierarchies();
    let links: Vec<(PathBuf, PathBuf)> = fs::read_dir(base)?
        .flatten()
        .filter_map(|entry| Some((entry.path(), fs::read_link(entry.path()).ok()?)))
        .collect();
    if found.iter().any(|hierarchy| hierarchy.path != base) {
        mount_fresh("cgroups", base, "tmpfs", "mode=755")?;
    }
    for hierarchy in found {
        fs::create_dir_all(&hierarchy.path)?;
        mount_fresh(
            "cgroup",
            &hierarchy.path,
            hierarchy.version,
            &hierarchy.data,
        )?;
        if hierarchy.version == "cgroup2" && hierarchy.path == base {
            delegate(base)?;
        }
    }
    for (link, target) in links {
        let _ = std::os::unix::fs::symlink(target, link);
    }
    Ok(())
}

/// Moves this process out of the way, so that the machine's root may hand controllers down.
fn delegate(root: &Path) -> Result<()> {
    let leaf = root.join(LEAF);
    fs::create_dir_all(&leaf)?;
    let there = fs::read_to_string(root.join("cgroup.procs"))?;
    for pid in there.split_whitespace() {
        let _ = fs::write(leaf.join("cgroup.procs"), pid);
    }
    hand_down(root);
    Ok(())
}

/// `/etc` shows the host's files and keeps its changes to itself, over a reboot too. The host's
/// own CNI configuration is none of the machine's.
fn mount_private_etc(dir: &Path) -> Result<()> {
    let (upper, work) = (dir.join("etc"), dir.join("etc.work"));
    let first_boot = !upper.exists();
    fs::create_dir_all(&upper)?;
    fs::create_dir_all(&work)?;
    let data = format!(
        "lowerdir=/etc,upperdir={},workdir={}",
        upper.display(),
        work.display()
    );
    mount_fresh("etc", Path::new("/etc"), "overlay", &data)?;
    if first_boot {
        let _ = fs::remove_dir_all("/etc/cni/net.d");
    }
    fs::create_dir_all("/etc/cni/net.d")?;
    Ok(())
}

fn mount_private_var(spec: &MachineSpec) -> Result<()> {
    let lib = spec.dir.join("var-lib");
    fs::create_dir_all(&lib)?;
    if let Ok(below) = spec.state.strip_prefix("/var/lib") {
        let window = lib.join(below);
        fs::create_dir_all(&window)?;
        bind(&spec.state, &window)?;
    }
    bind(&lib, Path::new("/var/lib"))?;
    let log = spec.dir.join("var-log");
    fs::create_dir_all(log.join("pods"))?;
    fs::create_dir_all(log.join("containers"))?;
    bind(&log, Path::new("/var/log"))
}

fn bind(from: &Path, to: &Path) -> Result<()> {
    mount(
        Some(from),
        to,
        None::<&str>,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        None::<&str>,
    )
    .with_context(|| format!("bind {} to {}", from.display(), to.display()))
}

fn mount_fresh(source: &str, target: &Path, kind: &str, data: &str) -> Result<()> {
    mount(
        Some(source),
        target,
        Some(kind),
        MsFlags::empty(),
        Some(data),
    )
    .with_context(|| format!("mount {kind} ({data}) at {}", target.display()))
}

/// No resolver answers in a machine: what looks a name up must live with that.
fn write_names(name: &str) -> Result<()> {
    let _ = fs::remove_file("/etc/resolv.conf");
    fs::write("/etc/resolv.conf", "nameserver 192.168.77.1\n")?;
    fs::write("/etc/hostname", format!("{name}\n"))?;
    fs::write(
        "/etc/hosts",
        format!("127.0.0.1 localhost\n127.0.1.1 {name}\n"),
    )?;
    Ok(())
}

fn announce(pid: u32) -> Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "{pid}")?;
    Ok(out.flush()?)
}

fn println_ready() -> Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "ready")?;
    Ok(out.flush()?)
}

/// What an init does: collect the dead. Ends only by being killed.
fn reap_for_ever() -> Result<()> {
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    children.thread_block()?;
    loop {
        while matches!(
            waitpid(None, Some(WaitPidFlag::WNOHANG)),
            Ok(status) if status != WaitStatus::StillAlive
        ) {}
        children.wait()?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Option<(PathBuf, &'static str, String)> {
        parse_hierarchy(line).map(|found| (found.path, found.version, found.data))
    }

    #[test]
    fn a_version_1_hierarchy_is_mounted_again_by_its_controllers() {
        let line = "33 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:11 - cgroup cgroup rw,cpu,cpuacct";
        let want = (
            "/sys/fs/cgroup/cpu,cpuacct".into(),
            "cgroup",
            "cpu,cpuacct".to_owned(),
        );
        assert_eq!(parsed(line), Some(want));
    }

    #[test]
    fn a_named_hierarchy_is_mounted_again_by_its_name() {
        let line = "31 30 0:26 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,release_agent=/lib/x,name=systemd";
        let want = (
            "/sys/fs/cgroup/systemd".into(),
            "cgroup",
            "none,name=systemd".to_owned(),
        );
        assert_eq!(parsed(line), Some(want));
    }

    #[test]
    fn version_2_has_no_data_and_other_mounts_are_passed_over() {
        let line = "30 23 0:25 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate";
        assert_eq!(
            parsed(line),
            Some(("/sys/fs/cgroup".into(), "cgroup2", String::new()))
        );
        assert_eq!(parsed("30 23 0:25 / /sys rw - sysfs sysfs rw"), None);
    }
}
