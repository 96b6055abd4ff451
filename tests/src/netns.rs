//! The network between cloudcore and the edges, and the machines at its far end.
//!
//! Every edge sits behind a router of its own that translates addresses and lets nothing in that
//! was not asked for; all edges have the same private address, as devices in the field do. The
//! faults of a link are rules in that router: packets vanish, nothing answers.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::bed::{Bed, Proc, run};
use crate::wait::wait_for;

/// The address that every edge has in its own network.
pub const EDGE_ADDRESS: &str = "192.168.77.2";
const ROUTER_ADDRESS: &str = "192.168.77.1";

/// A held network namespace.
struct Space {
    holder: Child,
    pid: i32,
}

impl Space {
    /// Starts a holder and reads the process id that it prints once its namespaces are up.
    fn build(mut command: Command, log: &Path) -> Result<Space> {
        let out = fs::File::options().create(true).append(true).open(log)?;
        let mut holder = command.stdout(Stdio::piped()).stderr(out).spawn()?;
        let mut line = String::new();
        if let Some(out) = holder.stdout.take() {
            BufReader::new(out).read_line(&mut line)?;
        }
        let said = || fs::read_to_string(log).unwrap_or_default();
        let pid = line
            .trim()
            .parse()
            .with_context(|| format!("no namespaces: {}", said()))?;
        Ok(Space { holder, pid })
    }

    /// A command of the host in this network.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.pid.to_string(), "-n", "--", program]);
        command
    }

    fn ip(&self, words: &str) -> Result<()> {
        run(self.command("ip").args(words.split_whitespace())).map(drop)
    }

    fn iptables(&self, words: &str) -> Result<()> {
        run(self
            .command("iptables")
            .arg("-w")
            .args(words.split_whitespace()))
        .map(drop)
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        let _ = self.holder.wait();
    }
}

/// The network in the middle: a bridge that the host and all routers are plugged into.
pub struct Backbone {
    bed: Arc<Bed>,
    space: Space,
    next: AtomicU8,
}

impl Backbone {
    pub fn build(bed: &Arc<Bed>) -> Result<Backbone> {
        let mut hold = bed.testbed()?;
        hold.args(["hold", "--network"]);
        let space = Space::build(hold, &bed.dir.join("log/network.log"))?;
        let (link, pid) = (bed.link(), space.pid.to_string());
        host_ip(&format!(
            "link add {link} type veth peer name host netns {pid}"
        ))?;
        host_ip(&format!("address add {}/24 dev {link}", bed.host_address()))?;
        host_ip(&format!("link set {link} up"))?;
        space.ip("link set lo up")?;
        space.ip("link add br0 type bridge")?;
        space.ip("link set br0 up")?;
        space.ip("link set host master br0")?;
        space.ip("link set host up")?;
        Ok(Backbone {
            bed: bed.clone(),
            space,
            next: AtomicU8::new(1),
        })
    }

    /// A new machine behind a router of its own.
    pub fn machine(&self, name: &str) -> Result<Machine> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        ensure!(number < 240, "a backbone has addresses for 239 machines");
        let dir = self.bed.dir.join("machines").join(name);
        fs::create_dir_all(&dir)?;
        let router = self.router(number)?;
        let outside = Ipv4Addr::new(198, 18, self.bed.number, 10 + number);
        let cgroup = format!("{}/{name}", self.bed.link());
        let name = name.to_owned();
        let space = plug_in(&self.bed, &name, &dir, &cgroup, &router)?;
        Ok(Machine {
            name,
            dir,
            bed: self.bed.clone(),
            cgroup,
            outside,
            space: Some(space),
            router,
        })
    }

    fn router(&self, number: u8) -> Result<Space> {
        let mut hold = self.bed.testbed()?;
        hold.args(["hold", "--network"]);
        let router = Space::build(hold, &self.bed.dir.join("log/network.log"))?;
        let address = format!("198.18.{}.{}/24", self.bed.number, 10 + u16::from(number));
        self.space.ip(&format!(
            "link add r{number} type veth peer name wan netns {}",
            router.pid
        ))?;
        self.space.ip(&format!("link set r{number} master br0"))?;
        self.space.ip(&format!("link set r{number} up"))?;
        router.ip("link set lo up")?;
        router.ip(&format!("address add {address} dev wan"))?;
        router.ip("link set wan up")?;
        router.ip(&format!(
            "route add default via {}",
            self.bed.host_address()
        ))?;
        run(router
            .command("sh")
            .args(["-c", "echo 1 >/proc/sys/net/ipv4/ip_forward"]))?;
        for rule in [
            "-N FAULT",
            "-A FORWARD -j FAULT",
            "-A FORWARD -i lan -o wan -j ACCEPT",
            "-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
            "-P FORWARD DROP",
            "-t nat -A POSTROUTING -o wan -j MASQUERADE",
            // Without a target they only count: see `Machine::forwarded`.
            "-t mangle -A POSTROUTING -o wan",
            "-t mangle -A POSTROUTING -o lan",
        ] {
            router.iptables(rule)?;
        }
        Ok(router)
    }
}

/// Starts a machine on what `dir` holds and connects it to its router.
fn plug_in(bed: &Bed, name: &str, dir: &Path, cgroup: &str, router: &Space) -> Result<Space> {
    let mut hold = bed.testbed()?;
    hold.args(["hold", "--name", name, "--cgroup", cgroup]);
    hold.arg("--dir").arg(dir).arg("--state").arg(&bed.dir);
    let space = Space::build(hold, &bed.dir.join("log").join(format!("{name}.log")))?;
    router.ip(&format!(
        "link add lan type veth peer name eth0 netns {}",
        space.pid
    ))?;
    router.ip(&format!("address add {ROUTER_ADDRESS}/24 dev lan"))?;
    router.ip("link set lan up")?;
    space.ip("link set lo up")?;
    space.ip(&format!("address add {EDGE_ADDRESS}/24 dev eth0"))?;
    space.ip("link set eth0 up")?;
    space.ip(&format!("route add default via {ROUTER_ADDRESS}"))?;
    Ok(space)
}

/// Bytes and packets that went through a router's outside, as its interface counts them:
/// whole Ethernet frames without preamble and checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traffic {
    /// From the edge to the cloud.
    pub up: u64,
    /// From the cloud to the edge.
    pub down: u64,
}

/// An edge machine. Dropping it pulls its plug.
pub struct Machine {
    pub name: String,
    /// What belongs to it alone, on the host's disk: `var-log`, `etc`, and what its parts add.
    pub dir: PathBuf,
    bed: Arc<Bed>,
    cgroup: String,
    outside: Ipv4Addr,
    /// Absent only while it is switched off.
    space: Option<Space>,
    router: Space,
}

impl Machine {
    /// Power fails and comes back: every process ends at once, mounts and `/run` are gone, what
    /// is on disk stays. Nothing is started.
    pub fn reboot(&mut self) -> Result<()> {
        self.space = None;
        // The kernel takes the machine's end of the cable away some time after its last process.
        wait_for("end of the old machine", Duration::from_secs(10), || {
            let left = run(self.router.command("ip").args(["link", "show", "lan"]));
            ensure!(left.is_err(), "its cable is still there");
            Ok(())
        })?;
        let space = plug_in(&self.bed, &self.name, &self.dir, &self.cgroup, &self.router)?;
        self.space = Some(space);
        Ok(())
    }

    /// A command that runs inside the machine.
    pub fn command(&self, program: &str) -> Result<Command> {
        self.enter(program, None)
    }

    /// Starts a long-lived program inside. The second value is its process id on the host.
    pub fn spawn(&self, program: &str, shape: impl FnOnce(&mut Command)) -> Result<Inside> {
        let name = Path::new(program)
            .file_name()
            .unwrap_or_default()
            .to_string_lossy();
        let pid_file = self.dir.join(format!("{name}.pid"));
        let _ = fs::remove_file(&pid_file);
        let mut command = self.enter(program, Some(&pid_file))?;
        shape(&mut command);
        let mut outer = self
            .bed
            .spawn(&format!("{}-{name}", self.name), &mut command)?;
        let what = format!("start of {name} in {}", self.name);
        let pid = wait_for(&what, Duration::from_secs(10), || {
            let ended = outer.ensure_running();
            match fs::read_to_string(&pid_file).map(|text| text.parse()) {
                Ok(Ok(pid)) => Ok(pid),
                _ => ended.and(Err(anyhow::anyhow!("no process id yet"))),
            }
        })?;
        Ok(Inside { outer, pid })
    }

    fn enter(&self, program: &str, pid_file: Option<&Path>) -> Result<Command> {
        let mut command = self.bed.testbed()?;
        let space = self.space.as_ref().context("the machine is switched off")?;
        command.args(["enter", "--target", &space.pid.to_string()]);
        command.args(["--cgroup", &self.cgroup]);
        if let Some(path) = pid_file {
            command.arg("--pid-file").arg(path);
        }
        command.args(["--", program]);
        Ok(command)
    }

    /// Runs a command inside and gives all it said.
    pub fn output(&self, argv: &[&str]) -> Result<Output> {
        let (program, rest) = argv.split_first().context("no command")?;
        Ok(self.command(program)?.args(rest).output()?)
    }

    /// Runs a command inside that must succeed, and gives its standard output.
    pub fn exec(&self, argv: &[&str]) -> Result<String> {
        let (program, rest) = argv.split_first().context("no command")?;
        run(self.command(program)?.args(rest))
    }

    /// The link goes silent: every packet vanishes, in both directions, and nothing says so.
    pub fn cut(&self) -> Result<()> {
        self.router.iptables("-A FAULT -j DROP")
    }

    /// UDP vanishes, TCP goes on: a network that knows no QUIC.
    pub fn drop_udp(&self) -> Result<()> {
        self.router.iptables("-A FAULT -p udp -j DROP")
    }

    /// Ends all faults.
    pub fn restore(&self) -> Result<()> {
        self.router.iptables("-F FAULT")
    }

    /// The router forgets its connections and has another address outside, as after a new dial-in.
    pub fn change_address(&self, last_octet: u8) -> Result<()> {
        self.router.ip("address flush dev wan")?;
        self.router.ip(&format!(
            "address add 198.18.{}.{last_octet}/24 dev wan",
            self.bed.number
        ))?;
        self.router.ip(&format!(
            "route add default via {}",
            self.bed.host_address()
        ))
    }

    /// Lets the host dial a TCP port of the machine at its router's outside address, which it gives:
    /// what a node of a data centre has and an edge has not. The machine owns the address too, so
    /// that its kubelet may report it.
    pub fn expose(&self, port: u16) -> Result<Ipv4Addr> {
        let address = self.outside;
        for rule in [
            format!(
                "-t nat -A PREROUTING -i wan -p tcp --dport {port} -j DNAT --to-destination {EDGE_ADDRESS}:{port}"
            ),
            format!("-A FORWARD -i wan -o lan -p tcp --dport {port} -j ACCEPT"),
        ] {
            self.router.iptables(&rule)?;
        }
        let space = self.space.as_ref().context("the machine is switched off")?;
        space.ip(&format!("address add {address}/32 dev lo"))?;
        Ok(address)
    }

    /// Leads what the machine sends to one port, UDP and TCP, to another: new flows only. A relay
    /// between a device and its cloud is not seen by either.
    pub fn divert(&self, from: SocketAddr, to: SocketAddr) -> Result<()> {
        self.diversion("-A", from, to)
    }

    /// Ends a diversion: for new flows.
    pub fn lead_back(&self, from: SocketAddr, to: SocketAddr) -> Result<()> {
        self.diversion("-D", from, to)
    }

    fn diversion(&self, change: &str, from: SocketAddr, to: SocketAddr) -> Result<()> {
        for protocol in ["udp", "tcp"] {
            self.router.iptables(&format!(
                "-t nat {change} PREROUTING -i lan -p {protocol} -d {} --dport {} -j DNAT --to-destination {to}",
                from.ip(),
                from.port()
            ))?;
        }
        Ok(())
    }

    /// What has crossed the router's outside so far.
    pub fn traffic(&self) -> Result<Traffic> {
        let table = run(self.router.command("cat").arg("/proc/net/dev"))?;
        let line = table
            .lines()
            .find_map(|line| line.trim().strip_prefix("wan:"))
            .context("no outside interface")?;
        let numbers: Vec<u64> = line
            .split_whitespace()
            .map_while(|n| n.parse().ok())
            .collect();
        ensure!(numbers.len() >= 16, "unexpected /proc/net/dev");
        Ok(Traffic {
            up: numbers[8],
            down: numbers[0],
        })
    }

    /// Bytes of IP packets that the router let through so far, their headers included: what a
    /// metered link is billed by. Packets that a fault swallowed are not in it, nor is what the
    /// Ethernet on both sides adds (its headers, ARP).
    pub fn forwarded(&self) -> Result<Traffic> {
        let words = ["-w", "-t", "mangle", "-L", "POSTROUTING", "-v", "-x", "-n"];
        counted(&run(self.router.command("iptables").args(words))?)
    }
}

/// Reads `iptables -L -v -x`: the byte counts of the rules for each outgoing interface.
fn counted(table: &str) -> Result<Traffic> {
    let bytes = |interface: &str| {
        let mut rows = table
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>());
        rows.find(|row| row.contains(&interface))
            .and_then(|row| row.get(1)?.parse().ok())
            .with_context(|| format!("no counter for {interface} in {table:?}"))
    };
    Ok(Traffic {
        up: bytes("wan")?,
        down: bytes("lan")?,
    })
}

/// A program inside a machine.
pub struct Inside {
    outer: Proc,
    /// Its process id as the host sees it.
    pub pid: i32,
}

impl Inside {
    /// `kill -9`, and waits until it is gone. What it started inside goes on.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        let _ = self.outer.wait(Duration::from_secs(10));
    }

    pub fn signal(&self, signal: Signal) {
        let _ = kill(Pid::from_raw(self.pid), signal);
    }

    /// Waits for its end; the status is its exit code, or 128 and the number of its signal.
    pub fn wait(&mut self, limit: Duration) -> Result<i32> {
        Ok(self.outer.wait(limit)?.code().unwrap_or(-1))
    }

    pub fn ensure_running(&mut self) -> Result<()> {
        self.outer.ensure_running()
    }

    /// Everything it has written since the machine was made.
    pub fn text(&self) -> String {
        self.outer.text()
    }

    pub fn tail(&self, lines: usize) -> String {
        self.outer.tail(lines)
    }
}

fn host_ip(words: &str) -> Result<()> {
    run(Command::new("ip").args(words.split_whitespace())).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_told_apart_by_their_outgoing_interface() {
        let table = "Chain POSTROUTING (policy ACCEPT 9 packets, 99 bytes)\n\
            pkts bytes target prot opt in out source destination\n\
            3 180 all -- * wan 0.0.0.0/0 0.0.0.0/0\n\
            2 1200 all -- * lan 0.0.0.0/0 0.0.0.0/0\n";
        let found = counted(table).expect("both are there");
        assert_eq!((found.up, found.down), (180, 1200));
        assert!(counted("").is_err());
    }
}
