//! What this device is and how it does (adapter: /proc, /sys, /etc/os-release, statvfs).
//!
//! Gives numbers and names; judges nothing. A fact that cannot be read is empty or zero: the Node
//! says what is missing rather than not coming up. Every read is bounded.

use std::fs;
use std::io::Read as _;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;

use crate::hub::clock;

/// Huge pages of one size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HugePages {
    pub page_kib: u64,
    pub total_bytes: u64,
}

impl HugePages {
    /// The resource's name, such as `hugepages-2Mi`.
    pub fn resource(&self) -> String {
        match self.page_kib {
            k if k >= 1 << 20 && k % (1 << 20) == 0 => format!("hugepages-{}Gi", k >> 20),
            k if k >= 1 << 10 && k % (1 << 10) == 0 => format!("hugepages-{}Mi", k >> 10),
            k => format!("hugepages-{k}Ki"),
        }
    }
}

/// What is known of the device. Sizes are bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Facts {
    /// The address that others on the device's network reach it by.
    pub node_ip: Option<IpAddr>,
    pub cpus: u32,
    pub memory_bytes: u64,
    pub memory_available_bytes: u64,
    pub swap_bytes: u64,
    pub hugepages: Vec<HugePages>,
    /// The file system of the data directory.
    pub disk_bytes: u64,
    pub disk_available_bytes: u64,
    pub disk_inodes: u64,
    pub disk_inodes_available: u64,
    pub pids: u64,
    pub pids_max: u64,
    pub machine_id: String,
    pub system_uuid: String,
    pub boot_id: String,
    pub kernel_version: String,
    pub os_image: String,
    /// As Go names it: amd64, arm64, arm, …
    pub architecture: String,
}

/// No file that is read here is longer.
const MAX_FILE: u64 = 256 * 1024;

/// Looks at the device; cheap enough for every minute.
pub fn observe(data_dir: &Path) -> Facts {
    let meminfo = read("/proc/meminfo");
    let kib = |field| meminfo_kib(&meminfo, field) * 1024;
    let mut facts = Facts {
        node_ip: default_address(),
        cpus: cpus(),
        memory_bytes: kib("MemTotal"),
        memory_available_bytes: kib("MemAvailable"),
        swap_bytes: kib("SwapTotal"),
        hugepages: hugepages(Path::new("/sys/kernel/mm/hugepages")),
        pids: pids(&read("/proc/loadavg")),
        pids_max: number("/proc/sys/kernel/pid_max"),
        machine_id: line("/etc/machine-id"),
        system_uuid: line("/sys/class/dmi/id/product_uuid").to_lowercase(),
        boot_id: clock::boot_id(),
        kernel_version: line("/proc/sys/kernel/osrelease"),
        os_image: os_image(&read("/etc/os-release")),
        architecture: architecture(std::env::consts::ARCH).to_owned(),
        ..Facts::default()
    };
    if facts.system_uuid.is_empty() {
        // Boards without DMI.
        facts.system_uuid = facts.machine_id.clone();
    }
    if let Ok(disk) = nix::sys::statvfs::statvfs(data_dir) {
        let unit = wide(disk.fragment_size());
        facts.disk_bytes = wide(disk.blocks()) * unit;
        facts.disk_available_bytes = wide(disk.blocks_available()) * unit;
        facts.disk_inodes = wide(disk.files());
        facts.disk_inodes_available = wide(disk.files_available());
    }
    facts
}

/// Counts of blocks are 32 bits wide on 32-bit boards.
fn wide(count: impl Into<u64>) -> u64 {
    count.into()
}

fn read(path: impl AsRef<Path>) -> String {
    let mut text = String::new();
    let file = fs::File::open(path);
    let done = file.and_then(|f| f.take(MAX_FILE).read_to_string(&mut text));
    done.map(|_| text).unwrap_or_default()
}

fn line(path: &str) -> String {
    read(path).trim().to_owned()
}

fn number(path: &str) -> u64 {
    line(path).parse().unwrap_or(0)
}

fn cpus() -> u32 {
    let count = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// A field of /proc/meminfo, in KiB.
fn meminfo_kib(meminfo: &str, field: &str) -> u64 {
    let mut lines = meminfo.lines().filter_map(|l| l.split_once(':'));
    let value = lines.find(|(name, _)| *name == field).map(|(_, v)| v);
    let number = value.and_then(|v| v.split_whitespace().next());
    number.and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// Directories `hugepages-2048kB` with a file `nr_hugepages`.
fn hugepages(dir: &Path) -> Vec<HugePages> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let pages = entries.filter_map(|e| {
        let name = e.file_name().into_string().ok()?;
        let size = name.strip_prefix("hugepages-")?.strip_suffix("kB")?;
        let page_kib: u64 = size.parse().ok()?;
        let count: u64 = read(e.path().join("nr_hugepages")).trim().parse().ok()?;
        Some(HugePages {
            page_kib,
            total_bytes: page_kib.checked_mul(1024)?.checked_mul(count)?,
        })
    });
    let mut pages: Vec<_> = pages.collect();
    pages.sort_by_key(|p| p.page_kib);
    pages
}

/// The number after the slash of loadavg's fourth field: all tasks that there are.
fn pids(loadavg: &str) -> u64 {
    let tasks = loadavg.split_whitespace().nth(3);
    let all = tasks.and_then(|t| t.split_once('/')).map(|(_, all)| all);
    all.and_then(|n| n.parse().ok()).unwrap_or(0)
}

fn os_image(os_release: &str) -> String {
    let field = |name: &str| {
        let mut lines = os_release.lines().filter_map(|l| l.split_once('='));
        let value = lines.find(|(n, _)| *n == name).map(|(_, v)| v)?;
        Some(value.trim().trim_matches(['"', '\'']).to_owned())
    };
    let name = field("PRETTY_NAME").or_else(|| field("NAME"));
    name.unwrap_or_else(|| "Linux".into())
}

/// Kubernetes uses Go's names of architectures.
pub fn architecture(rust: &str) -> &str {
    match rust {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" => "ppc64le",
        other => other,
    }
}

/// The address that the device would use towards the internet, else the first that is not its
/// loopback's: a device may start before its link is up.
fn default_address() -> Option<IpAddr> {
    routed_address().or_else(first_address)
}

fn first_address() -> Option<IpAddr> {
    let all = nix::ifaddrs::getifaddrs().ok()?;
    let ips = all.filter_map(|i| {
        let address = i.address?;
        let four = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
        four.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
    });
    let link_local = |ip: &IpAddr| match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    let mut found: Vec<_> = ips
        .filter(|ip| !ip.is_loopback() && !link_local(ip))
        .collect();
    found.sort();
    found.into_iter().next()
}

/// Nothing is sent: connecting a datagram socket only looks at the routes. The targets are
/// documentation addresses.
fn routed_address() -> Option<IpAddr> {
    let pairs = [("0.0.0.0:0", "192.0.2.1:9"), ("[::]:0", "[2001:db8::1]:9")];
    pairs.iter().find_map(|(from, to)| {
        let (from, to): (SocketAddr, SocketAddr) = (from.parse().ok()?, to.parse().ok()?);
        let socket = UdpSocket::bind(from).ok()?;
        socket.connect(to).ok()?;
        let ip = socket.local_addr().ok()?.ip();
        (!ip.is_unspecified() && !ip.is_loopback()).then_some(ip)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_kernel_are_read() {
        let meminfo = "MemTotal:        4028932 kB\nMemFree: 1 kB\nMemAvailable:    3028932 kB\n";
        assert_eq!(meminfo_kib(meminfo, "MemAvailable"), 3_028_932);
        assert_eq!(meminfo_kib(meminfo, "Mem"), 0);
        assert_eq!(pids("0.00 0.01 0.05 2/345 6789\n"), 345);
        assert_eq!(pids("rubbish"), 0);
        let release = "NAME=\"Debian\"\nPRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\n";
        assert_eq!(os_image(release), "Debian GNU/Linux 12 (bookworm)");
        assert_eq!(os_image("NAME=Yocto\n"), "Yocto");
        assert_eq!(os_image(""), "Linux");
        for (kib, name) in [
            (2048, "hugepages-2Mi"),
            (1 << 20, "hugepages-1Gi"),
            (64, "hugepages-64Ki"),
        ] {
            let pages = HugePages {
                page_kib: kib,
                total_bytes: 0,
            };
            assert_eq!(pages.resource(), name);
        }
    }

    #[test]
    fn huge_pages_of_a_recorded_tree() {
        let dir = tempfile::tempdir().unwrap();
        for (name, count) in [("hugepages-2048kB", "3\n"), ("hugepages-1048576kB", "0\n")] {
            fs::create_dir(dir.path().join(name)).unwrap();
            fs::write(dir.path().join(name).join("nr_hugepages"), count).unwrap();
        }
        let pages = hugepages(dir.path());
        let shown: Vec<_> = pages
            .iter()
            .map(|p| (p.resource(), p.total_bytes))
            .collect();
        assert_eq!(
            shown,
            [
                ("hugepages-2Mi".into(), 6 << 20),
                ("hugepages-1Gi".into(), 0)
            ]
        );
    }

    #[test]
    fn this_device_has_facts() {
        let facts = observe(Path::new("/"));
        assert!(facts.cpus > 0 && facts.memory_bytes > 1 << 20, "{facts:?}");
        assert!(facts.memory_available_bytes <= facts.memory_bytes);
        assert!(
            facts.disk_bytes > 0 && facts.pids_max > 0 && facts.pids > 0,
            "{facts:?}"
        );
        assert!(!facts.kernel_version.is_empty() && !facts.boot_id.is_empty());
    }
}
