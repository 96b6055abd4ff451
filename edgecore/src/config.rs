//! What an operator sets: flags over environment variables over the file over defaults.

use std::path::PathBuf;
use std::time::Duration;

use common::hub::dial::Preference;
use common::hub::transport::LinkConfig;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use serde::Deserialize;

use crate::cli::RunArgs;
use crate::pods::network::{NetworkError, Range};
use crate::pods::quantity::units;
use crate::pods::rotate;

/// The file's keys, one for each flag and a few that have none.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "camelCase")]
pub struct File {
    pub join: Option<String>,
    pub token: Option<String>,
    pub name: Option<String>,
    pub cri: Option<String>,
    pub data_dir: Option<PathBuf>,
    pub transport: Option<String>,
    pub admin: Option<PathBuf>,
    pub log: Option<String>,
    pub log_json: Option<bool>,
    /// Whether Pods are given this node's CA beside the cluster's.
    pub node_ca: Option<bool>,
    /// The range of this node's Pods, CIDR.
    pub pod_cidr: Option<String>,
    /// Where a CNI configuration is looked for and written. Two edgecores on one device need two
    /// directories, each that of its own container runtime, and two bridges.
    pub cni_config_dir: Option<PathBuf>,
    pub cni_bin_dir: Option<PathBuf>,
    /// The bridge of this node's Pods.
    pub bridge: Option<String>,
    /// Seconds of silence after which the link counts as dead; what the cloud says where it is not
    /// given.
    pub dead_after_seconds: Option<u64>,
    /// Where the runtime writes container logs.
    pub pod_logs_dir: Option<PathBuf>,
    /// A container's log is rotated when it is larger, such as `10Mi`.
    pub container_log_max_size: Option<String>,
    /// Files that are kept of a container's log, with the one that is written to.
    pub container_log_max_files: Option<usize>,
}

/// Everything decided.
#[derive(Debug)]
pub struct Config {
    pub join: Option<String>,
    pub token: Option<String>,
    pub name: Option<String>,
    /// unix:///path
    pub cri: String,
    pub data_dir: PathBuf,
    pub transport: Preference,
    pub admin: PathBuf,
    pub log: String,
    pub log_json: bool,
    pub node_ca: bool,
    pub pod_cidr: Option<String>,
    pub cni_config_dir: PathBuf,
    pub cni_bin_dir: Option<PathBuf>,
    pub bridge: String,
    pub dead_after: Option<Duration>,
    pub pod_logs_dir: PathBuf,
    pub log_rotation: rotate::Config,
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error(transparent)]
    File(#[from] common::config::ConfigError),
    #[error("--cri {0:?} is not a Unix socket: give it as unix:///run/containerd/containerd.sock")]
    Cri(String),
    #[error("--transport {0:?} is not one of auto, quic, websocket")]
    Transport(String),
    #[error("podCidr: {0}")]
    PodCidr(#[source] NetworkError),
    #[error(
        "bridge {0:?} cannot be the name of an interface: 1 to 15 letters, digits, '-', '_' or '.'"
    )]
    Bridge(String),
    #[error("containerLogMaxSize {0:?} is not a size of at least 64Ki, such as 10Mi")]
    LogSize(String),
    #[error("containerLogMaxFiles is {0}; it must be between 2 and 100")]
    LogFiles(usize),
    #[error("deadAfterSeconds is {0}; it must be between 5 and 3600")]
    DeadAfter(u64),
}

impl Config {
    pub fn resolve(args: RunArgs) -> Result<Self, ConfigError> {
        let file = match &args.config {
            Some(path) => common::config::load::<File>(path)?,
            None => File::default(),
        };
        let data_dir = args
            .data_dir
            .or(file.data_dir)
            .unwrap_or_else(|| PathBuf::from("/var/lib/edgecore"));
        let cri = args
            .cri
            .or(file.cri)
            .unwrap_or_else(|| "unix:///run/containerd/containerd.sock".to_owned());
        let transport = args
            .transport
            .or(file.transport)
            .unwrap_or_else(|| "auto".to_owned());
        let dead_after = file.dead_after_seconds;
        if let Some(seconds) = dead_after.filter(|s| !LinkConfig::DEAD_AFTER.contains(s)) {
            return Err(ConfigError::DeadAfter(seconds));
        }
        if let Some(text) = &file.pod_cidr {
            text.parse::<Range>().map_err(ConfigError::PodCidr)?;
        }
        let bridge = file.bridge.unwrap_or_else(|| "edge0".to_owned());
        if !is_interface(&bridge) {
            return Err(ConfigError::Bridge(bridge));
        }
        let log_rotation = log_rotation(file.container_log_max_size, file.container_log_max_files)?;
        Ok(Self {
            join: args.join.or(file.join),
            token: args.token.or(file.token),
            name: args.name.or(file.name),
            cri: endpoint(cri)?,
            transport: choice(&transport)?,
            admin: args
                .admin
                .or(file.admin)
                .unwrap_or_else(|| data_dir.join("admin.sock")),
            log: args.log.or(file.log).unwrap_or_else(|| "info".to_owned()),
            log_json: file.log_json.unwrap_or(false),
            node_ca: file.node_ca.unwrap_or(true),
            pod_cidr: file.pod_cidr,
            cni_config_dir: file
                .cni_config_dir
                .unwrap_or_else(|| "/etc/cni/net.d".into()),
            cni_bin_dir: file.cni_bin_dir,
            bridge,
            dead_after: dead_after.map(Duration::from_secs),
            pod_logs_dir: file.pod_logs_dir.unwrap_or_else(|| "/var/log/pods".into()),
            log_rotation,
            data_dir,
        })
    }
}

/// A smaller log would be rotated for ever.
const LEAST_LOG: i64 = 64 << 10;

fn log_rotation(size: Option<String>, files: Option<usize>) -> Result<rotate::Config, ConfigError> {
    let mut config = rotate::Config::default();
    if let Some(text) = size {
        let bytes = units(&Quantity(text.clone())).filter(|bytes| *bytes >= LEAST_LOG);
        let bytes = bytes.and_then(|bytes| u64::try_from(bytes).ok());
        config.most_bytes = bytes.ok_or(ConfigError::LogSize(text))?;
    }
    if let Some(files) = files {
        config.most_files = files;
    }
    if !(2..=100).contains(&config.most_files) {
        return Err(ConfigError::LogFiles(config.most_files));
    }
    Ok(config)
}

fn is_interface(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    (1..=15).contains(&name.len()) && name.bytes().all(plain) && name != "." && name != ".."
}

fn endpoint(text: String) -> Result<String, ConfigError> {
    match text.strip_prefix("unix://") {
        Some(path) if path.starts_with('/') => Ok(text),
        Some(_) => Err(ConfigError::Cri(text)),
        None if text.starts_with('/') => Ok(format!("unix://{text}")),
        None => Err(ConfigError::Cri(text)),
    }
}

fn choice(text: &str) -> Result<Preference, ConfigError> {
    match text {
        "auto" => Ok(Preference::Auto),
        "quic" => Ok(Preference::Quic),
        "websocket" => Ok(Preference::WebSocket),
        other => Err(ConfigError::Transport(other.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("edge.yaml");
        std::fs::write(
            &path,
            "name: from-file\ncri: unix:///run/x.sock\ntransport: quic\nnodeCa: false\n",
        )
        .unwrap();
        let args = RunArgs {
            config: Some(path),
            name: Some("from-flag".into()),
            ..Default::default()
        };
        let config = Config::resolve(args).unwrap();
        assert_eq!(config.name.as_deref(), Some("from-flag"));
        assert_eq!(config.cri, "unix:///run/x.sock");
        assert_eq!(config.transport, Preference::Quic);
        assert_eq!(config.data_dir, PathBuf::from("/var/lib/edgecore"));
        assert!(!config.node_ca);
        let usual = Config::resolve(RunArgs::default()).unwrap();
        assert!(usual.node_ca && usual.dead_after.is_none());
    }

    #[test]
    fn what_cannot_be_is_refused_with_a_sentence() {
        let bad = |args: RunArgs| Config::resolve(args).unwrap_err().to_string();
        let cri = RunArgs {
            cri: Some("tcp://1.2.3.4".into()),
            ..Default::default()
        };
        assert!(bad(cri).contains("is not a Unix socket"));
        let dir = tempfile::tempdir().unwrap();
        let file = |text: &str| {
            let path = dir.path().join("edge.yaml");
            std::fs::write(&path, text).unwrap();
            RunArgs {
                config: Some(path),
                ..Default::default()
            }
        };
        for (text, complaint) in [
            ("podCidr: 10.0.0.0", "podCidr"),
            ("bridge: a-name-that-is-too-long", "1 to 15"),
            ("bridge: ../x", "1 to 15"),
            ("deadAfterSeconds: 1", "between 5 and 3600"),
            ("containerLogMaxSize: ten", "such as 10Mi"),
            ("containerLogMaxSize: 1Ki", "at least 64Ki"),
            ("containerLogMaxFiles: 1", "between 2 and 100"),
        ] {
            let said = bad(file(text));
            assert!(said.contains(complaint), "{text}: {said}");
        }
        assert_eq!(
            Config::resolve(file("bridge: edge1")).unwrap().bridge,
            "edge1"
        );
        let logs = file("containerLogMaxSize: 1.5Mi\ncontainerLogMaxFiles: 3");
        let want = rotate::Config {
            most_bytes: 3 << 19,
            most_files: 3,
        };
        assert_eq!(Config::resolve(logs).unwrap().log_rotation, want);
        let transport = RunArgs {
            transport: Some("pigeon".into()),
            ..Default::default()
        };
        assert!(bad(transport).contains("auto, quic, websocket"));
    }
}
