//! A testbed's number, its state directory, its processes, and the promise that nothing outlives it.
//!
//! Owns: `/run/edge-testbed/<N>` (a symbolic link to the state directory: creating it claims N),
//! the state directory, every process with [`MARK`] in its environment, the host link `etb<N>`,
//! the cgroups `etb<N>`. All mounts live in namespaces that end with their last process.
//!
//! ```text
//!  claim ──► in use ──┬─ Drop ───────────────────────► torn down
//!                     ├─ owner dies: the guard sees its pipe close ─► torn down
//!                     └─ guard dies too: the next claim sweeps ─────► torn down
//! ```
//!
//! A kept testbed (the quickstart's) has no owner: it ends by [`teardown`] only.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::net::Ipv4Addr;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wait::{Ended, wait_every, wait_for};

/// Environment variable that every process of a testbed carries; its value is the state directory.
pub const MARK: &str = "EDGE_TESTBED";

/// Where the numbers are claimed. Volatile on purpose: a reboot ends every process anyway.
const CLAIMS: &str = "/run/edge-testbed";

/// What the owner file of a kept testbed says.
const KEPT: &str = "kept";

/// One claimed number with its state directory.
pub struct Bed {
    pub number: u8,
    pub dir: PathBuf,
    kept: bool,
    guard: Mutex<Option<(Child, Option<ChildStdin>)>>,
}

impl Bed {
    /// A testbed that ends with this process, in a directory of its own below the system's
    /// temporary one. Sweeps what killed owners left behind first.
    pub fn scratch() -> Result<Bed> {
        let base = std::env::temp_dir().join("edge-testbed");
        fs::create_dir_all(&base)?;
        // Never the name of one before: its guard may still be removing what is there.
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let dir = std::iter::repeat_with(|| NEXT.fetch_add(1, Ordering::Relaxed))
            .map(|n| base.join(format!("{}-{n}", std::process::id())))
            .find(|dir| fs::create_dir(dir).is_ok())
            .context("no free directory")?;
        let me = Pid::this().as_raw();
        let bed = Bed::claim(
            &dir,
            &format!("{me} {}", start_time(me).unwrap_or_default()),
        )?;
        let mut guard = Command::new(testbed_program()?)
            .args(["guard", "--number", &bed.number.to_string(), "--state"])
            .arg(&bed.dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .process_group(0)
            .spawn()
            .context("start the guard")?;
        let pipe = guard.stdin.take();
        *lock(&bed.guard) = Some((guard, pipe));
        Ok(bed)
    }

    /// A testbed that outlives this process, or the one that `dir` already holds.
    pub fn kept(dir: &Path) -> Result<Bed> {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let dir = dir.canonicalize()?;
        match claims().into_iter().find(|(_, claimed)| *claimed == dir) {
            Some((number, dir)) => Ok(Bed {
                number,
                dir,
                kept: true,
                guard: Mutex::new(None),
            }),
            None => Bed::claim(&dir, KEPT),
        }
    }

    fn claim(dir: &Path, owner: &str) -> Result<Bed> {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "a testbed makes network namespaces, mounts and cgroups: run it as root"
        );
        fs::create_dir_all(CLAIMS)?;
        let turn = File::create(Path::new(CLAIMS).join("lock"))?;
        turn.lock()?;
        sweep();
        let dir = dir.canonicalize()?;
        fs::create_dir_all(dir.join("log"))?;
        fs::write(dir.join("owner"), owner)?;
        let number = (1..=250u8)
            .find(|n| symlink(&dir, Path::new(CLAIMS).join(n.to_string())).is_ok())
            .context("all 250 testbed numbers are taken: see /run/edge-testbed")?;
        Ok(Bed {
            number,
            dir,
            kept: owner == KEPT,
            guard: Mutex::new(None),
        })
    }

    /// The address of the control plane, on loopback: nothing outside this machine's own
    /// namespace reaches it, edges included.
    pub fn loopback(&self) -> Ipv4Addr {
        Ipv4Addr::new(127, 77, self.number, 1)
    }

    /// The host's address on the backbone: where edges find cloudcore.
    pub fn host_address(&self) -> Ipv4Addr {
        Ipv4Addr::new(198, 18, self.number, 1)
    }

    /// The host's end of the backbone.
    pub fn link(&self) -> String {
        link_name(self.number)
    }

    /// A port that is free on the testbed's loopback address.
    pub fn free_port(&self) -> Result<u16> {
        let probe = std::net::TcpListener::bind((self.loopback(), 0))?;
        Ok(probe.local_addr()?.port())
    }

    /// A command that carries the mark, so that it ends with the testbed.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .env(MARK, &self.dir)
            .stdin(Stdio::null())
            .process_group(0);
        // A test must not depend on what the developer's shell happens to point at.
        command.env_remove("KUBECONFIG");
        command
    }

    /// Starts a long-lived process whose output goes to `log/<name>.log`, appended.
    pub fn spawn(&self, name: &str, command: &mut Command) -> Result<Proc> {
        let log = self.dir.join("log").join(format!("{name}.log"));
        let out = File::options().create(true).append(true).open(&log)?;
        let child = command
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .with_context(|| format!("start {name} ({})", command.get_program().display()))?;
        Ok(Proc {
            name: name.to_owned(),
            log,
            child,
        })
    }

    /// This very binary's command line tool, with the mark.
    pub fn testbed(&self) -> Result<Command> {
        Ok(self.command(testbed_program()?))
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Err(error) = teardown(self.number, &self.dir) {
            eprintln!("testbed {}: {error:#}", self.number);
        }
        if let Some((mut guard, pipe)) = lock(&self.guard).take() {
            drop(pipe);
            let _ = guard.wait();
        }
    }
}

/// A process of the testbed. Dropping it leaves it running; the testbed's end is its end.
pub struct Proc {
    pub name: String,
    pub log: PathBuf,
    child: Child,
}

impl Proc {
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Ends it at once and waits until it is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Asks it to end.
    pub fn terminate(&self) {
        let _ = kill(Pid::from_raw(self.pid()), Signal::SIGTERM);
    }

    /// The exit status, if it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits for its end.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("end of {}", self.name);
        wait_for(&what, limit, || {
            self.ended().ok_or_else(|| anyhow!("still running"))
        })
    }

    /// Fails with the end of its log if it has ended.
    pub fn ensure_running(&mut self) -> Result<()> {
        if let Some(status) = self.ended() {
            let told = format!("{} ended ({status}):\n{}", self.name, self.tail(30));
            return Err(Ended(told).into());
        }
        Ok(())
    }

    /// Everything it has written.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// The last lines of its log.
    pub fn tail(&self, lines: usize) -> String {
        let text = self.text();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}

/// Ends everything that belongs to the testbed, its state directory included.
pub fn teardown(number: u8, dir: &Path) -> Result<()> {
    wait_every(
        "end of all processes",
        Duration::from_secs(20),
        Duration::from_millis(20),
        || {
            let left = marked(dir);
            for pid in &left {
                let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
            }
            ensure!(left.is_empty(), "{left:?} still run");
            Ok(())
        },
    )?;
    let _ = Command::new("ip")
        .args(["link", "delete", &link_name(number)])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    for root in crate::holder::cgroup_roots() {
        let top = root.join(link_name(number));
        wait_for("end of the cgroups", Duration::from_secs(20), || {
            remove_cgroup(&top)
        })?;
    }
    wait_for(
        "removal of the state",
        Duration::from_secs(10),
        || match fs::remove_dir_all(dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        },
    )?;
    let _ = fs::remove_file(Path::new(CLAIMS).join(number.to_string()));
    Ok(())
}

/// Stands beside an owner and tears its testbed down when the owner's end of the pipe closes.
pub fn guard(number: u8, dir: &Path) -> Result<()> {
    let mut sink = Vec::new();
    let _ = std::io::Read::read_to_end(&mut std::io::stdin(), &mut sink);
    match claims().contains(&(number, dir.to_owned())) {
        true => teardown(number, dir),
        false => Ok(()),
    }
}

/// The testbed that was kept in `dir`, if there is one.
pub fn find_kept(dir: &Path) -> Option<(u8, PathBuf)> {
    let dir = dir.canonicalize().ok()?;
    claims().into_iter().find(|(_, claimed)| *claimed == dir)
}

/// Whether the current process id still means the process that started at `start`.
pub fn start_time(pid: i32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; the start time is the 20th field behind it.
    stat.rsplit_once(')')?
        .1
        .split_whitespace()
        .nth(19)
        .map(str::to_owned)
}

/// The command line tool that belongs to this program: itself, or its neighbour in the target
/// directory when this is a test.
pub fn testbed_program() -> Result<PathBuf> {
    let me = std::env::current_exe()?;
    if me.file_name() == Some(OsStr::new("testbed")) {
        return Ok(me);
    }
    me.ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join("testbed"))
        .find(|path| path.is_file())
        .context("no testbed program beside this test: cargo build --workspace")
}

/// `Mutex::lock` without poisoning: a failed test must still be able to clean up.
pub fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn link_name(number: u8) -> String {
    format!("etb{number}")
}

/// Tears down the testbeds whose owner is gone.
fn sweep() {
    for (number, dir) in claims() {
        let owner = fs::read_to_string(dir.join("owner")).unwrap_or_default();
        let mut words = owner.split_whitespace();
        let alive = match (words.next(), words.next()) {
            (Some(KEPT), _) => true,
            (Some(pid), Some(start)) => {
                pid.parse().ok().and_then(start_time).as_deref() == Some(start)
            }
            _ => false,
        };
        if !alive {
            eprintln!("testbed {number}: its owner is gone; removing what it left");
            if let Err(error) = teardown(number, &dir) {
                eprintln!("testbed {number}: {error:#}");
            }
        }
    }
}

fn claims() -> Vec<(u8, PathBuf)> {
    let entries = fs::read_dir(CLAIMS).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.parse().ok()?;
            Some((number, fs::read_link(entry.path()).ok()?))
        })
        .collect()
}

/// Processes that carry the mark of `dir`, this one excepted.
fn marked(dir: &Path) -> Vec<i32> {
    let mark = format!("{MARK}={}", dir.display()).into_bytes();
    let me = Pid::this().as_raw();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| *pid != me)
        .filter(|pid| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment
                .split(|byte| *byte == 0)
                .any(|entry| entry == mark)
        })
        .collect()
}

/// Removes a cgroup and those below it, killing what still runs there.
fn remove_cgroup(dir: &Path) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(dir)?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path())?;
        }
    }
    for pid in fs::read_to_string(dir.join("cgroup.procs"))
        .unwrap_or_default()
        .lines()
    {
        if let Ok(pid) = pid.parse() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
    fs::remove_dir(dir).with_context(|| format!("remove {}", dir.display()))
}

/// Runs a command to its end and gives its standard output, or fails with all it said.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start {}", command.get_program().display()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "{:?} failed ({}): {}{}",
        command,
        output.status,
        text,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(text)
}

/// Says on standard error what takes long, so that nobody looks at a silent terminal.
pub fn progress(text: &str) {
    let _ = writeln!(std::io::stderr(), "==> {text}");
}
