//! What the node and this process use (adapter: /proc, statvfs).
//!
//! /proc and not the root cgroup: on cgroup v2 the root has no memory figures at all, and on v1 they
//! are these.

use std::fs;
use std::path::Path;

use jiff::{SignedDuration, Timestamp};

use super::{Cpu, Disk, Memory};
use crate::pods::cgroups::field;

/// A network interface; totals since it was made.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Interface {
    pub name: String,
    pub rx_bytes: u64,
    pub rx_packets: u64,
    pub rx_errors: u64,
    pub rx_dropped: u64,
    pub tx_bytes: u64,
    pub tx_packets: u64,
    pub tx_errors: u64,
    pub tx_dropped: u64,
}

/// The whole device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub booted: Timestamp,
    pub cpus: u64,
    pub memory_bytes: u64,
    pub cpu: Option<Cpu>,
    pub memory: Option<Memory>,
    /// Those that lead out of the device.
    pub interfaces: Vec<Interface>,
    /// The one that the default route leaves by; empty without one.
    pub default_interface: String,
    pub processes: u64,
    pub most_processes: u64,
}

/// This process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    pub started: Timestamp,
    pub cpu: Option<Cpu>,
    pub memory: Option<Memory>,
    pub open_files: u64,
}

const NANOS: u64 = 1_000_000_000;

pub(super) fn observe(at: Timestamp) -> Node {
    let (stat, meminfo) = (read("/proc/stat"), read("/proc/meminfo"));
    let booted = field(&stat, "btime").and_then(|s| i64::try_from(s).ok());
    let booted = booted.and_then(|s| Timestamp::from_second(s).ok());
    Node {
        booted: booted.unwrap_or(Timestamp::UNIX_EPOCH),
        cpus: std::thread::available_parallelism().map_or(1, |n| n.get() as u64),
        memory_bytes: kib(&meminfo, "MemTotal").unwrap_or(0),
        cpu: busy_ticks(&stat).map(|ticks| Cpu {
            at,
            nanos: ticks_to_nanos(ticks),
            nano_cores: None,
        }),
        memory: memory(&meminfo, &read("/proc/vmstat"), at),
        interfaces: outward(parse_interfaces(&read("/proc/net/dev"))),
        default_interface: default_interface(&read("/proc/net/route")),
        processes: tasks(&read("/proc/loadavg")),
        most_processes: read("/proc/sys/kernel/pid_max").trim().parse().unwrap_or(0),
    }
}

pub(super) fn own_process(at: Timestamp) -> Process {
    let stat = read("/proc/self/stat");
    let uptime = read("/proc/uptime");
    let parsed = parse_process(&stat, &uptime, at);
    let page = sysconf(nix::unistd::SysconfVar::PAGE_SIZE).unwrap_or(4096);
    let (ticks, started, pages) = parsed.unwrap_or((0, at, 0));
    Process {
        started,
        cpu: parsed.map(|_| Cpu {
            at,
            nanos: ticks_to_nanos(ticks),
            nano_cores: None,
        }),
        memory: parsed.map(|_| Memory {
            at,
            working_set: pages.saturating_mul(page),
            available: None,
            usage: Some(pages.saturating_mul(page)),
            rss: Some(pages.saturating_mul(page)),
            page_faults: None,
            major_page_faults: None,
        }),
        open_files: fs::read_dir("/proc/self/fd").map_or(0, |dir| dir.count() as u64),
    }
}

/// The interfaces of a process's network that lead out of it.
pub(super) fn interfaces(process: u32) -> Vec<Interface> {
    outward(parse_interfaces(&read(&format!("/proc/{process}/net/dev"))))
}

pub(super) fn disk(path: &Path) -> Option<Disk> {
    let disk = nix::sys::statvfs::statvfs(path).ok()?;
    let unit = wide(disk.fragment_size());
    Some(Disk {
        capacity: wide(disk.blocks()).saturating_mul(unit),
        available: wide(disk.blocks_available()).saturating_mul(unit),
        inodes: wide(disk.files()),
        inodes_free: wide(disk.files_available()),
    })
}

/// Counts of blocks are 32 bits wide on 32-bit boards.
fn wide(count: impl Into<u64>) -> u64 {
    count.into()
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn sysconf(what: nix::unistd::SysconfVar) -> Option<u64> {
    u64::try_from(nix::unistd::sysconf(what).ok()??).ok()
}

fn ticks_to_nanos(ticks: u64) -> u64 {
    let a_second = sysconf(nix::unistd::SysconfVar::CLK_TCK).unwrap_or(100);
    ticks.saturating_mul(NANOS / a_second.max(1))
}

/// All that is not idle or waiting. Guests' time is in users' already.
fn busy_ticks(stat: &str) -> Option<u64> {
    let all = stat.lines().find_map(|l| l.strip_prefix("cpu "))?;
    let ticks: Vec<u64> = all.split_whitespace().flat_map(str::parse).collect();
    let (user, nice, system) = (ticks.first()?, ticks.get(1)?, ticks.get(2)?);
    let interrupts: u64 = ticks.iter().skip(5).take(3).sum();
    Some(user + nice + system + interrupts)
}

fn kib(meminfo: &str, name: &str) -> Option<u64> {
    let mut pairs = meminfo.lines().filter_map(|l| l.split_once(':'));
    let (_, value) = pairs.find(|(key, _)| *key == name)?;
    let number: u64 = value.split_whitespace().next()?.parse().ok()?;
    number.checked_mul(1024)
}

fn memory(meminfo: &str, vmstat: &str, at: Timestamp) -> Option<Memory> {
    let total = kib(meminfo, "MemTotal")?;
    let usage = total.saturating_sub(kib(meminfo, "MemFree")?);
    let working_set = usage.saturating_sub(kib(meminfo, "Inactive(file)")?);
    Some(Memory {
        at,
        working_set,
        available: Some(total.saturating_sub(working_set)),
        usage: Some(usage),
        rss: kib(meminfo, "AnonPages"),
        page_faults: field(vmstat, "pgfault"),
        major_page_faults: field(vmstat, "pgmajfault"),
    })
}

/// Lines `eth0: ` with eight numbers received and eight sent.
fn parse_interfaces(dev: &str) -> Vec<Interface> {
    let lines = dev.lines().filter_map(|l| l.split_once(':'));
    let parsed = lines.filter_map(|(name, numbers)| {
        let n: Vec<u64> = numbers.split_whitespace().flat_map(str::parse).collect();
        let [rx_bytes, rx_packets, rx_errors, rx_dropped, ..] = n[..] else {
            return None;
        };
        let [tx_bytes, tx_packets, tx_errors, tx_dropped, ..] = *n.get(8..)? else {
            return None;
        };
        Some(Interface {
            name: name.trim().to_owned(),
            rx_bytes,
            rx_packets,
            rx_errors,
            rx_dropped,
            tx_bytes,
            tx_packets,
            tx_errors,
            tx_dropped,
        })
    });
    parsed.collect()
}

/// Without the loopback and the ends of Pods' own networks, whose bytes are theirs.
fn outward(interfaces: Vec<Interface>) -> Vec<Interface> {
    let inward = |name: &str| name == "lo" || name.starts_with("veth");
    let all = interfaces.into_iter();
    all.filter(|i| !inward(&i.name)).collect()
}

fn default_interface(route: &str) -> String {
    let fields = route.lines().map(|l| l.split_whitespace());
    let mut pairs = fields.filter_map(|mut f| Some((f.next()?, f.next()?)));
    let found = pairs.find(|(_, destination)| *destination == "00000000");
    found.map(|(name, _)| name.to_owned()).unwrap_or_default()
}

fn tasks(loadavg: &str) -> u64 {
    let tasks = loadavg.split_whitespace().nth(3);
    let all = tasks.and_then(|t| t.split_once('/')).map(|(_, all)| all);
    all.and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// Processor ticks, start and resident pages. The name before them may hold anything.
fn parse_process(stat: &str, uptime: &str, at: Timestamp) -> Option<(u64, Timestamp, u64)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    // proc(5) counts from the process ID, which is field 1; the state here is field 3.
    let number = |n: usize| fields.get(n - 3)?.parse::<u64>().ok();
    let (user, system, start, pages) = (number(14)?, number(15)?, number(22)?, number(24)?);
    let up: f64 = uptime.split_whitespace().next()?.parse().ok()?;
    let age = up - ticks_to_nanos(start) as f64 / 1e9;
    let age = SignedDuration::try_from_secs_f64(age.max(0.0)).ok()?;
    Some((user + system, at.checked_sub(age).ok()?, pages))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_kernel_are_read() {
        let stat = "cpu  100 20 30 4000 500 6 7 8 9 10\ncpu0 1 1 1\nbtime 1800000000\n";
        assert_eq!(busy_ticks(stat), Some(100 + 20 + 30 + 6 + 7 + 8));
        assert_eq!(field(stat, "btime"), Some(1_800_000_000));
        let meminfo =
            "MemTotal: 1000 kB\nMemFree: 300 kB\nInactive(file): 200 kB\nAnonPages: 5 kB\n";
        let memory = memory(meminfo, "pgfault 3\npgmajfault 2\n", Timestamp::UNIX_EPOCH).unwrap();
        assert_eq!(memory.working_set, 500 << 10);
        assert_eq!(memory.available, Some(500 << 10));
        assert_eq!(memory.usage, Some(700 << 10));
        assert_eq!(
            (memory.page_faults, memory.major_page_faults),
            (Some(3), Some(2))
        );
        let dev = "Inter-|   Receive  |  Transmit\n face |bytes packets\n\
            \x20   lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n\
            \x20 eth0:10 2 3 4 0 0 0 0 50 6 7 8 0 0 0 0\n vethab: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n";
        let want = Interface {
            name: "eth0".into(),
            rx_bytes: 10,
            rx_packets: 2,
            rx_errors: 3,
            rx_dropped: 4,
            tx_bytes: 50,
            tx_packets: 6,
            tx_errors: 7,
            tx_dropped: 8,
        };
        assert_eq!(outward(parse_interfaces(dev)), [want]);
        let route = "Iface\tDestination\nwlan0\t0000FEA9\neth0\t00000000\t01\n";
        assert_eq!(default_interface(route), "eth0");
    }

    #[test]
    fn a_process_is_read_behind_its_name() {
        let stat = "7 (a ) b) S 1 1 1 0 -1 0 1 2 3 4 11 22 0 0 20 0 1 0 500 6000 42 0";
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let (ticks, started, pages) = parse_process(stat, "65.00 1.0\n", now).unwrap();
        assert_eq!((ticks, pages), (33, 42));
        assert_eq!(started, now - SignedDuration::from_secs(60));
        assert_eq!(parse_process("", "", now), None);
    }

    #[test]
    fn this_device_and_this_process_have_figures() {
        let now = Timestamp::now();
        let node = observe(now);
        assert!(node.cpu.unwrap().nanos > 0 && node.memory.unwrap().working_set > 0);
        assert!(node.booted < now && node.most_processes > 0 && node.processes > 0);
        let own = own_process(now);
        assert!(
            own.memory.unwrap().working_set > 0 && own.started <= now,
            "{own:?}"
        );
        assert!(own.started > node.booted && own.open_files > 0);
        assert!(disk(Path::new("/")).unwrap().capacity > 0);
    }
}
