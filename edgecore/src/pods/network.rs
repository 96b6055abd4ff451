//! The device's Pod network: a CNI configuration where there is none.
//!
//! Owns one file of the CNI directory. Takes where things are, what the Node and the device's
//! routes say; gives the range that Pods are in. Never touches a configuration that somebody else
//! put there, never gives Pods another range than before, and never waits for the cloud.

use std::fmt;
use std::fs;
use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde_json::json;

/// A range of IPv4 addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    base: u32,
    length: u32,
}

impl Range {
    /// The range of `length` leading bits that holds the address.
    pub fn around(address: Ipv4Addr, length: u32) -> Self {
        let length = length.min(32);
        let base = u32::from(address) & mask(length);
        Self { base, length }
    }

    pub fn overlaps(self, other: Self) -> bool {
        let common = mask(self.length.min(other.length));
        self.base & common == other.base & common
    }
}

fn mask(length: u32) -> u32 {
    u32::MAX.checked_shl(32 - length).unwrap_or(0)
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from(self.base), self.length)
    }
}

impl FromStr for Range {
    type Err = NetworkError;
    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let bad = || NetworkError::Range(text.chars().take(64).collect());
        let (address, length) = text.split_once('/').ok_or_else(bad)?;
        let length: u32 = length.parse().map_err(|_| bad())?;
        let address: Ipv4Addr = address.parse().map_err(|_| bad())?;
        if length > 32 {
            Err(bad())
        } else {
            Ok(Self::around(address, length))
        }
    }
}

/// Why the device has no Pod network of ours.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("{0:?} is not an IPv4 range such as 10.231.0.0/24")]
    Range(String),
    #[error(
        "no default range for Pods is free of the device's routes and the cluster's addresses: \
         configure one"
    )]
    NoneFree,
    #[error(
        "CNI plugins {missing:?} are in none of {dirs:?}: install them (Debian: the package \
         containernetworking-plugins) or give the directory that has them"
    )]
    Plugins {
        missing: Vec<String>,
        dirs: Vec<PathBuf>,
    },
    #[error(
        "{} is for the bridge {bridge:?} of another edgecore: give this one a cniConfigDir of its \
         own, or remove the file if there is no other", path.display()
    )]
    Another { path: PathBuf, bridge: String },
    #[error("cannot keep the range of Pods: {0}")]
    Keep(String),
    #[error("cannot {what} {path}")]
    Io {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

/// Where the container runtime looks for its network, and what ours is called.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    pub conf_dir: PathBuf,
    /// Where plugins may be; the runtime's own configuration says which of them it uses.
    pub bin_dirs: Vec<PathBuf>,
    /// The bridge; two agents on one device need two names (at most 15 characters).
    pub bridge: String,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            conf_dir: "/etc/cni/net.d".into(),
            // Upstream's, Debian's and Fedora's.
            bin_dirs: ["/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"]
                .map(PathBuf::from)
                .into(),
            bridge: "edge0".into(),
        }
    }
}

/// What the choice of a range depends on.
#[derive(Debug, Clone, Default)]
pub struct RangeInputs {
    /// The operator's word.
    pub configured: Option<Range>,
    /// The Node's `spec.podCIDR`, where the cluster gives one and it is known already.
    pub pod_cidr: Option<Range>,
    /// What the device routes elsewhere than to its default gateway ([`device_routes`]).
    pub routes: Vec<Range>,
    /// What the cluster uses, as far as known ([`cluster_ranges`]).
    pub cluster: Vec<Range>,
}

/// What the device's Pod network is.
#[derive(Debug, PartialEq, Eq)]
pub enum Network {
    /// Somebody else's configuration is there and stays; the runtime takes it, not ours.
    Foreign { file: PathBuf },
    /// Ours; `written` when it was not there as it should be.
    Own { range: Range, written: bool },
}

/// Where a range is kept: the store's business, not ours.
pub trait RangeKeeper {
    /// The range that Pods were given before, if any.
    fn kept(&self) -> Option<String>;
    /// Keeps it; durable when this returns.
    fn keep(&self, range: &str) -> Result<(), String>;
}

const FILE: &str = "10-edgecore.conflist";
const PLUGINS: [&str; 3] = ["bridge", "host-local", "portmap"];

/// Private ranges that few sites, tunnels and clusters use; enough addresses for the 110 Pods of a
/// node. Every device may use the same one: they are behind the device's own address.
const DEFAULTS: [&str; 5] = [
    "10.231.0.0/24",
    "172.27.231.0/24",
    "192.168.231.0/24",
    "10.87.231.0/24",
    "198.18.231.0/24",
];

/// Makes the configuration if the device has none. Call it before the runtime is asked for a
/// sandbox; idempotent.
pub fn ensure(
    config: &NetworkConfig,
    inputs: &RangeInputs,
    keeper: &dyn RangeKeeper,
) -> Result<Network, NetworkError> {
    if let Some(file) = foreign(&config.conf_dir)? {
        return Ok(Network::Foreign { file });
    }
    let kept = keeper.kept().map(|text| text.parse()).transpose()?;
    let range = match kept {
        // Pods have addresses in it: another word of the operator waits until it is forgotten.
        Some(range) => range,
        None => {
            let range = choose(inputs, &config.bridge)?;
            keeper
                .keep(&range.to_string())
                .map_err(NetworkError::Keep)?;
            range
        }
    };
    let there = |plugin: &str| config.bin_dirs.iter().any(|d| d.join(plugin).exists());
    let missing = PLUGINS.iter().filter(|p| !there(p));
    let missing: Vec<_> = missing.map(|p| (*p).to_owned()).collect();
    if !missing.is_empty() {
        let dirs = config.bin_dirs.clone();
        return Err(NetworkError::Plugins { missing, dirs });
    }
    let path = config.conf_dir.join(FILE);
    if let Some(bridge) = bridge_of(&path).filter(|b| *b != config.bridge) {
        return Err(NetworkError::Another { path, bridge });
    }
    let written = write(&config.conf_dir, &content(&config.bridge, range))?;
    Ok(Network::Own { range, written })
}

/// Configured, else the Node's range if the device routes none of it elsewhere, else a default.
fn choose(inputs: &RangeInputs, bridge: &str) -> Result<Range, NetworkError> {
    let free = |range: Range, taken: &[Range]| !taken.iter().any(|t| t.overlaps(range));
    if let Some(range) = inputs.configured {
        return Ok(range);
    }
    if let Some(range) = inputs.pod_cidr.filter(|r| free(*r, &inputs.routes)) {
        return Ok(range);
    }
    // An agent beside another has routed nothing before its first Pod, so the routes alone do not
    // keep the two apart: `edge1` begins with another default than `edge0`.
    let (behind, ahead) = DEFAULTS.split_at(number_of(bridge) % DEFAULTS.len());
    let defaults = ahead.iter().chain(behind);
    let defaults = defaults.filter_map(|text| text.parse().ok());
    let mut fit = defaults.filter(|r| free(*r, &inputs.routes) && free(*r, &inputs.cluster));
    fit.next().ok_or(NetworkError::NoneFree)
}

/// The number that the name of an interface ends with; 0 without one.
fn number_of(interface: &str) -> usize {
    let name = interface.trim_end_matches(|c: char| c.is_ascii_digit());
    interface[name.len()..].parse().unwrap_or(0)
}

/// The configuration that is not ours and that the runtime takes: it reads the first by name, so
/// one that came later and stands behind ours changes nothing.
fn foreign(dir: &Path) -> Result<Option<PathBuf>, NetworkError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(NetworkError::Io {
                what: "list",
                path: dir.into(),
                source,
            });
        }
    };
    let is_conf = |p: &PathBuf| {
        let extension = p.extension().and_then(|e| e.to_str());
        matches!(extension, Some("conf" | "conflist" | "json"))
    };
    let paths = entries.flatten().map(|e| e.path()).filter(is_conf);
    Ok(paths
        .min()
        .filter(|p| p.file_name().is_some_and(|n| n != FILE)))
}

/// The bridge of a configuration that an edgecore wrote.
fn bridge_of(path: &Path) -> Option<String> {
    let conf: serde_json::Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    Some(conf.pointer("/plugins/0/bridge")?.as_str()?.to_owned())
}

fn content(bridge: &str, range: Range) -> String {
    let conf = json!({
        // The newest that the plugins of the oldest supported distributions know.
        "cniVersion": "0.4.0",
        "name": "edgecore",
        "plugins": [
            {
                "type": "bridge",
                "bridge": bridge,
                "isGateway": true,
                "ipMasq": true,
                // A Pod reaches itself through its own host port or Service.
                "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": range.to_string()}]],
                    "routes": [{"dst": "0.0.0.0/0"}]
                }
            },
            {"type": "portmap", "capabilities": {"portMappings": true}}
        ]
    });
    format!("{conf:#}\n")
}

/// Puts the file in place in one step, for the runtime watches the directory; false when it says
/// this already.
fn write(dir: &Path, content: &str) -> Result<bool, NetworkError> {
    let path = dir.join(FILE);
    if fs::read(&path).ok().as_deref() == Some(content.as_bytes()) {
        return Ok(false);
    }
    // An extension that no runtime reads.
    let temporary = dir.join(format!("{FILE}.new"));
    let put = || {
        fs::create_dir_all(dir)?;
        let mut file = fs::File::create(&temporary)?;
        file.write_all(content.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, &path)
    };
    put().map(|()| true).map_err(|source| NetworkError::Io {
        what: "write",
        path: path.clone(),
        source,
    })
}

/// The device's routes but the default ones and those of our own bridge, from the text of
/// /proc/net/route.
pub fn device_routes(proc_net_route: &str, bridge: &str) -> Vec<Range> {
    let route = |line: &str| {
        let mut fields = line.split_whitespace();
        let interface = fields.next()?;
        let hex = |text: Option<&str>| u32::from_str_radix(text?, 16).ok().map(u32::from_be);
        let base = hex(fields.next())?;
        let mask = hex(fields.nth(5))?;
        let range = Range {
            base,
            length: mask.leading_ones(),
        };
        (interface != bridge && range.length > 0).then_some(range)
    };
    proc_net_route.lines().skip(1).filter_map(route).collect()
}

/// What can be told of the cluster's ranges by its Services' addresses: service ranges are seldom
/// larger than a /12.
pub fn cluster_ranges(addresses: impl IntoIterator<Item = IpAddr>) -> Vec<Range> {
    let range = |address| match address {
        IpAddr::V4(address) => Some(Range::around(address, 12)),
        IpAddr::V6(_) => None,
    };
    addresses.into_iter().filter_map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[derive(Default)]
    struct Kept(RefCell<Option<String>>);

    impl RangeKeeper for Kept {
        fn kept(&self) -> Option<String> {
            self.0.borrow().clone()
        }
        fn keep(&self, range: &str) -> Result<(), String> {
            *self.0.borrow_mut() = Some(range.into());
            Ok(())
        }
    }

    fn range(text: &str) -> Range {
        text.parse().unwrap()
    }

    fn bench() -> (tempfile::TempDir, NetworkConfig) {
        let dir = tempfile::tempdir().unwrap();
        let config = NetworkConfig {
            conf_dir: dir.path().join("net.d"),
            bin_dirs: vec![dir.path().join("none"), dir.path().join("bin")],
            bridge: "edge0".into(),
        };
        fs::create_dir(&config.bin_dirs[1]).unwrap();
        for plugin in PLUGINS {
            fs::write(config.bin_dirs[1].join(plugin), "").unwrap();
        }
        (dir, config)
    }

    #[test]
    fn ranges() {
        assert_eq!(range("10.1.2.3/16").to_string(), "10.1.0.0/16");
        for bad in [
            "",
            "10.0.0.0",
            "10.0.0.0/33",
            "fd00::/64",
            "a/8",
            "10.0.0.0/-1",
        ] {
            assert!(bad.parse::<Range>().is_err(), "{bad}");
        }
        for (a, b, overlap) in [
            ("10.0.0.0/8", "10.231.0.0/24", true),
            ("10.231.0.0/24", "10.0.0.0/8", true),
            ("10.231.1.0/24", "10.231.0.0/24", false),
            ("0.0.0.0/0", "10.231.0.0/24", true),
            ("10.231.0.7/32", "10.231.0.0/24", true),
        ] {
            assert_eq!(range(a).overlaps(range(b)), overlap, "{a} {b}");
        }
    }

    #[test]
    fn the_range_is_chosen_by_who_may_say_it() {
        let inputs =
            |configured: Option<&str>, cidr: Option<&str>, routes: &[&str], cluster: &[&str]| {
                let ranges = |list: &[&str]| list.iter().map(|t| range(t)).collect();
                RangeInputs {
                    configured: configured.map(range),
                    pod_cidr: cidr.map(range),
                    routes: ranges(routes),
                    cluster: ranges(cluster),
                }
            };
        for (inputs, want) in [
            (
                inputs(
                    Some("10.9.0.0/24"),
                    Some("10.8.0.0/24"),
                    &["10.9.0.0/16"],
                    &[],
                ),
                "10.9.0.0/24",
            ),
            (
                inputs(
                    None,
                    Some("10.8.0.0/24"),
                    &["192.168.1.0/24"],
                    &["10.8.0.0/16"],
                ),
                "10.8.0.0/24",
            ),
            (
                inputs(None, Some("10.8.0.0/24"), &["10.8.0.0/16"], &[]),
                "10.231.0.0/24",
            ),
            (inputs(None, None, &["10.0.0.0/8"], &[]), "172.27.231.0/24"),
            (
                inputs(None, None, &["10.0.0.0/8"], &["172.16.0.0/12"]),
                "192.168.231.0/24",
            ),
        ] {
            assert_eq!(choose(&inputs, "edge0").unwrap().to_string(), want);
        }
        let none = inputs(None, None, &["0.0.0.0/1", "128.0.0.0/1"], &[]);
        assert!(matches!(
            choose(&none, "edge0"),
            Err(NetworkError::NoneFree)
        ));
    }

    #[test]
    fn agents_side_by_side_choose_different_defaults() {
        let nothing = RangeInputs::default();
        let chosen = |bridge: &str| choose(&nothing, bridge).unwrap().to_string();
        let numbered = ["edge0", "edge1", "edge2", "edge3", "edge4"];
        assert_eq!(numbered.map(chosen), DEFAULTS);
        assert_eq!([chosen("br-shop"), chosen("edge5")], [DEFAULTS[0]; 2]);
        // The last of the list is followed by its beginning.
        let taken = RangeInputs {
            routes: vec![range(DEFAULTS[4])],
            ..RangeInputs::default()
        };
        let next = choose(&taken, "edge4").unwrap().to_string();
        assert_eq!(next, DEFAULTS[0]);
    }

    #[test]
    fn a_range_is_never_changed_under_pods() {
        let (_dir, config) = bench();
        let kept = Kept::default();
        let mut inputs = RangeInputs::default();
        let first = ensure(&config, &inputs, &kept).unwrap();
        assert_eq!(
            first,
            Network::Own {
                range: range("10.231.0.0/24"),
                written: true
            }
        );
        inputs.configured = Some(range("10.5.0.0/24"));
        inputs.pod_cidr = Some(range("10.6.0.0/24"));
        inputs.routes = vec![range("10.231.0.0/24")];
        let again = ensure(&config, &inputs, &kept).unwrap();
        assert_eq!(
            again,
            Network::Own {
                range: range("10.231.0.0/24"),
                written: false
            }
        );
        let text = fs::read_to_string(config.conf_dir.join(FILE)).unwrap();
        let conf: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            conf["plugins"][0]["ipam"]["ranges"][0][0]["subnet"],
            "10.231.0.0/24"
        );
        assert_eq!(conf["plugins"][1]["type"], "portmap");
        assert_eq!(fs::read_dir(&config.conf_dir).unwrap().count(), 1);
    }

    #[test]
    fn a_foreign_configuration_is_left_alone() {
        let (_dir, config) = bench();
        fs::create_dir(&config.conf_dir).unwrap();
        let file = config.conf_dir.join("05-cilium.conflist");
        fs::write(&file, "{}").unwrap();
        let kept = Kept::default();
        let got = ensure(&config, &RangeInputs::default(), &kept).unwrap();
        assert_eq!(got, Network::Foreign { file: file.clone() });
        assert_eq!(kept.kept(), None);
        assert_eq!(fs::read_to_string(file).unwrap(), "{}");
        assert_eq!(fs::read_dir(&config.conf_dir).unwrap().count(), 1);
    }

    #[test]
    fn the_runtime_takes_the_first_by_name() {
        let (_dir, config) = bench();
        let kept = Kept::default();
        ensure(&config, &RangeInputs::default(), &kept).unwrap();
        fs::write(config.conf_dir.join("99-late.conf"), "{}").unwrap();
        let got = ensure(&config, &RangeInputs::default(), &kept).unwrap();
        assert!(
            matches!(got, Network::Own { written: false, .. }),
            "{got:?}"
        );
        let early = config.conf_dir.join("00-multus.conf");
        fs::write(&early, "{}").unwrap();
        let got = ensure(&config, &RangeInputs::default(), &kept).unwrap();
        assert_eq!(got, Network::Foreign { file: early });
    }

    #[test]
    fn missing_plugins_are_named_before_anything_is_written() {
        let (_dir, config) = bench();
        fs::remove_file(config.bin_dirs[1].join("portmap")).unwrap();
        let error = ensure(&config, &RangeInputs::default(), &Kept::default()).unwrap_err();
        assert!(error.to_string().contains("portmap"), "{error}");
        assert!(!config.conf_dir.exists());
    }

    #[test]
    fn routes_of_the_device() {
        let text = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n\
            eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
            eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
            edge0\t0000E70A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
            wg0\t0000080A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n";
        let routes = device_routes(text, "edge0");
        assert_eq!(routes, [range("192.0.2.0/24"), range("10.8.0.0/16")]);
        let cluster = cluster_ranges(["10.96.0.1".parse().unwrap(), "fd00::1".parse().unwrap()]);
        assert_eq!(cluster, [range("10.96.0.0/12")]);
    }
}
