//! What is asked of a node's kubelet API: paths and parameters as the kubelet takes them
//! (`pkg/kubelet/server` of Kubernetes), parsed once into enums.
//!
//! The cloud judges by [`Target`] and passes the request on; the edge answers by it. Unknown paths
//! are `None`: 404 at both.

use percent_encoding::percent_decode_str;

/// A request's command line has at most this many words; the API server's own limit on a URL comes
/// before it.
const MOST_WORDS: usize = 4096;

/// Whose containers are meant.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PodName {
    pub namespace: String,
    pub name: String,
    /// Given in the path's longer form; another UID under that name is then not meant.
    pub uid: Option<String>,
}

/// What a request is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    Exec {
        pod: PodName,
        container: String,
    },
    Attach {
        pod: PodName,
        container: String,
    },
    /// A command whose output is the answer's body.
    Run {
        pod: PodName,
        container: String,
    },
    PortForward {
        pod: PodName,
    },
    Logs {
        pod: PodName,
        container: String,
    },
    /// `/pods`: what should run here.
    Pods,
    /// `/runningpods/`: what does.
    RunningPods,
    /// `/stats/summary`.
    StatsSummary,
    Metrics(Metrics),
    /// `/healthz` and its parts.
    Healthz,
    /// `/configz`.
    Configz,
}

/// The documents below `/metrics`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metrics {
    Agent,
    Cadvisor,
    Resource,
    Probes,
}

impl Target {
    /// What a path means.
    pub fn parse(path: &str) -> Option<Self> {
        let parts: Vec<String> = path
            .strip_prefix('/')?
            .trim_end_matches('/')
            .split('/')
            .map(|part| percent_decode_str(part).decode_utf8().ok().map(Into::into))
            .collect::<Option<_>>()?;
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        // Names with a slash or none at all are nobody's.
        if parts
            .iter()
            .any(|p| p.is_empty() || p.contains(['/', '\0']))
        {
            return None;
        }
        let pod = |namespace: &str, name: &str, uid: Option<&str>| PodName {
            namespace: namespace.into(),
            name: name.into(),
            uid: uid.map(Into::into),
        };
        let of = |ns: &str, name: &str, uid: Option<&str>, c: &str| (pod(ns, name, uid), c.into());
        Some(match parts[..] {
            ["exec", ns, name, c] => exec(of(ns, name, None, c)),
            ["exec", ns, name, uid, c] => exec(of(ns, name, Some(uid), c)),
            ["attach", ns, name, c] => attach(of(ns, name, None, c)),
            ["attach", ns, name, uid, c] => attach(of(ns, name, Some(uid), c)),
            ["run", ns, name, c] => run(of(ns, name, None, c)),
            ["run", ns, name, uid, c] => run(of(ns, name, Some(uid), c)),
            ["portForward", ns, name] => Target::PortForward {
                pod: pod(ns, name, None),
            },
            ["portForward", ns, name, uid] => Target::PortForward {
                pod: pod(ns, name, Some(uid)),
            },
            ["containerLogs", ns, name, c] => {
                let (pod, container) = of(ns, name, None, c);
                Target::Logs { pod, container }
            }
            ["pods"] => Target::Pods,
            ["runningpods"] => Target::RunningPods,
            ["stats", "summary"] => Target::StatsSummary,
            ["metrics"] => Target::Metrics(Metrics::Agent),
            ["metrics", "cadvisor"] => Target::Metrics(Metrics::Cadvisor),
            ["metrics", "resource"] => Target::Metrics(Metrics::Resource),
            ["metrics", "probes"] => Target::Metrics(Metrics::Probes),
            ["healthz"] | ["healthz", "ping" | "log" | "syncloop"] => Target::Healthz,
            ["configz"] => Target::Configz,
            _ => return None,
        })
    }

    /// Whose containers it is about, if about any.
    pub fn pod(&self) -> Option<&PodName> {
        match self {
            Target::Exec { pod, .. }
            | Target::Attach { pod, .. }
            | Target::Run { pod, .. }
            | Target::PortForward { pod }
            | Target::Logs { pod, .. } => Some(pod),
            Target::Pods
            | Target::RunningPods
            | Target::StatsSummary
            | Target::Metrics(_)
            | Target::Healthz
            | Target::Configz => None,
        }
    }

    /// Which container of the Pod, where one is meant.
    pub fn container(&self) -> Option<&str> {
        match self {
            Target::Exec { container, .. }
            | Target::Attach { container, .. }
            | Target::Run { container, .. }
            | Target::Logs { container, .. } => Some(container),
            Target::PortForward { .. }
            | Target::Pods
            | Target::RunningPods
            | Target::StatsSummary
            | Target::Metrics(_)
            | Target::Healthz
            | Target::Configz => None,
        }
    }

    /// It can change what runs on the node, whatever its method says: a WebSocket client opens an
    /// exec with GET.
    pub fn acts(&self) -> bool {
        match self {
            Target::Exec { .. }
            | Target::Attach { .. }
            | Target::Run { .. }
            | Target::PortForward { .. } => true,
            Target::Logs { .. }
            | Target::Pods
            | Target::RunningPods
            | Target::StatsSummary
            | Target::Metrics(_)
            | Target::Healthz
            | Target::Configz => false,
        }
    }

    /// Its answer may be `101`: bytes that nobody looks into.
    pub fn switches(&self) -> bool {
        self.acts() && !matches!(self, Target::Run { .. })
    }

    /// One word for audit lines and metrics.
    pub fn verb(&self) -> &'static str {
        match self {
            Target::Exec { .. } => "exec",
            Target::Attach { .. } => "attach",
            Target::Run { .. } => "run",
            Target::PortForward { .. } => "portforward",
            Target::Logs { .. } => "logs",
            Target::Pods => "pods",
            Target::RunningPods => "runningpods",
            Target::StatsSummary => "stats",
            Target::Metrics(_) => "metrics",
            Target::Healthz => "healthz",
            Target::Configz => "configz",
        }
    }
}

fn exec((pod, container): (PodName, String)) -> Target {
    Target::Exec { pod, container }
}

fn attach((pod, container): (PodName, String)) -> Target {
    Target::Attach { pod, container }
}

fn run((pod, container): (PodName, String)) -> Target {
    Target::Run { pod, container }
}

/// A parameter that makes no sense; answered with 400.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadParameter {
    #[error("parameter {0} is not {1}")]
    Value(&'static str, &'static str),
    #[error("you must specify at least 1 of stdin, stdout, stderr")]
    NoStream,
    #[error("a command has to be given")]
    NoCommand,
    #[error("only one of sinceTime or sinceSeconds may be provided")]
    TwoSinces,
}

/// Which streams an exec or attach joins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Streams {
    pub command: Vec<String>,
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

impl Streams {
    /// The kubelet's `command`, `input`, `output`, `error`, `tty`.
    pub fn parse(query: &str) -> Result<Self, BadParameter> {
        let mut streams = Self {
            command: Vec::new(),
            stdin: false,
            stdout: false,
            stderr: false,
            tty: false,
        };
        for (name, value) in pairs(query) {
            match &*name {
                "command" if streams.command.len() < MOST_WORDS => streams.command.push(value),
                "input" | "stdin" => streams.stdin = yes(&value),
                "output" | "stdout" => streams.stdout = yes(&value),
                "error" | "stderr" => streams.stderr = yes(&value),
                "tty" => streams.tty = yes(&value),
                _ => {}
            }
        }
        // A terminal has one stream.
        streams.stderr &= !streams.tty;
        if !(streams.stdin || streams.stdout || streams.stderr) {
            return Err(BadParameter::NoStream);
        }
        Ok(streams)
    }
}

/// From when on log lines are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Since {
    Seconds(u64),
    /// RFC 3339, as it came.
    Time(String),
}

/// Which stream of a container's output is wanted (`stream`, Kubernetes 1.32 and newer).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogStream {
    #[default]
    All,
    Stdout,
    Stderr,
}

/// Which part of a log is wanted, and how: `PodLogOptions` of core/v1.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LogOptions {
    pub follow: bool,
    pub previous: bool,
    pub timestamps: bool,
    pub since: Option<Since>,
    pub tail: Option<u64>,
    pub limit: Option<u64>,
    pub stream: LogStream,
}

impl LogOptions {
    pub fn parse(query: &str) -> Result<Self, BadParameter> {
        let mut options = Self::default();
        for (name, value) in pairs(query) {
            // An empty value is as good as none.
            if value.is_empty() {
                continue;
            }
            match &*name {
                "follow" => options.follow = yes(&value),
                "previous" => options.previous = yes(&value),
                "timestamps" => options.timestamps = yes(&value),
                "tailLines" => options.tail = Some(number("tailLines", &value)?),
                "limitBytes" => options.limit = Some(at_least_one("limitBytes", &value)?),
                "sinceSeconds" => {
                    let seconds = at_least_one("sinceSeconds", &value)?;
                    options.one_since(Since::Seconds(seconds))?;
                }
                "sinceTime" => options.one_since(Since::Time(value))?,
                "stream" => {
                    options.stream = match &*value {
                        "All" => LogStream::All,
                        "Stdout" => LogStream::Stdout,
                        "Stderr" => LogStream::Stderr,
                        _ => return Err(BadParameter::Value("stream", "All, Stdout or Stderr")),
                    }
                }
                _ => {}
            }
        }
        Ok(options)
    }

    fn one_since(&mut self, since: Since) -> Result<(), BadParameter> {
        match self.since.replace(since) {
            None => Ok(()),
            Some(_) => Err(BadParameter::TwoSinces),
        }
    }
}

/// What the kubelet takes for true.
fn yes(value: &str) -> bool {
    matches!(value, "1" | "true" | "True" | "TRUE" | "t" | "T")
}

fn number(name: &'static str, value: &str) -> Result<u64, BadParameter> {
    let number: Option<u64> = value.parse().ok().filter(|n| *n <= i64::MAX as u64);
    number.ok_or(BadParameter::Value(name, "a whole number"))
}

fn at_least_one(name: &'static str, value: &str) -> Result<u64, BadParameter> {
    number(name, value)
        .ok()
        .filter(|n| *n > 0)
        .ok_or(BadParameter::Value(name, "a whole number above 0"))
}

/// The parameters of a query, decoded (`application/x-www-form-urlencoded`). Bytes that are no text
/// are replaced: a command with them names no file that could be meant.
pub fn pairs(query: &str) -> impl Iterator<Item = (String, String)> + '_ {
    let decode = |text: &str| {
        let spaced = text.replace('+', " ");
        percent_decode_str(&spaced).decode_utf8_lossy().into_owned()
    };
    query.split('&').filter(|p| !p.is_empty()).map(move |pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decode(name), decode(value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: Option<&str>) -> PodName {
        PodName {
            namespace: "default".into(),
            name: "web-0".into(),
            uid: uid.map(Into::into),
        }
    }

    #[test]
    fn paths_are_the_kubelets() {
        let container = || "main".to_owned();
        for (path, want) in [
            (
                "/exec/default/web-0/main",
                Target::Exec {
                    pod: pod(None),
                    container: container(),
                },
            ),
            (
                "/exec/default/web-0/u-1/main",
                Target::Exec {
                    pod: pod(Some("u-1")),
                    container: container(),
                },
            ),
            (
                "/attach/default/web-0/main",
                Target::Attach {
                    pod: pod(None),
                    container: container(),
                },
            ),
            (
                "/run/default/web-0/main",
                Target::Run {
                    pod: pod(None),
                    container: container(),
                },
            ),
            (
                "/portForward/default/web-0",
                Target::PortForward { pod: pod(None) },
            ),
            (
                "/portForward/default/web-0/u-1",
                Target::PortForward {
                    pod: pod(Some("u-1")),
                },
            ),
            (
                "/containerLogs/default/web-0/main",
                Target::Logs {
                    pod: pod(None),
                    container: container(),
                },
            ),
            ("/pods", Target::Pods),
            ("/runningpods/", Target::RunningPods),
            ("/stats/summary", Target::StatsSummary),
            ("/metrics", Target::Metrics(Metrics::Agent)),
            ("/metrics/cadvisor", Target::Metrics(Metrics::Cadvisor)),
            ("/metrics/resource", Target::Metrics(Metrics::Resource)),
            ("/metrics/probes", Target::Metrics(Metrics::Probes)),
            ("/healthz", Target::Healthz),
            ("/healthz/ping", Target::Healthz),
            ("/configz", Target::Configz),
        ] {
            assert_eq!(Target::parse(path).as_ref(), Some(&want), "{path}");
        }
    }

    #[test]
    fn other_paths_are_nothing() {
        for path in [
            "",
            "/",
            "pods",
            "//pods",
            "/exec",
            "/exec/default/web-0",
            "/exec/default//main",
            "/exec/a/b/c/d/e",
            "/exec/default/web-0%2fmain/x",
            "/exec/default/web%00/main",
            "/exec/default/web%ff/main",
            "/healthz/../pods",
            "/debug/pprof/",
            "/Pods",
        ] {
            assert_eq!(Target::parse(path), None, "{path}");
        }
    }

    #[test]
    fn whatever_acts_on_a_pod_is_known_to() {
        for (path, acts) in [
            ("/exec/a/b/c", true),
            ("/attach/a/b/c", true),
            ("/run/a/b/c", true),
            ("/portForward/a/b", true),
            ("/containerLogs/a/b/c", false),
            ("/pods", false),
            ("/metrics/resource", false),
        ] {
            assert_eq!(Target::parse(path).unwrap().acts(), acts, "{path}");
        }
    }

    #[test]
    fn a_command_comes_with_its_words_and_streams() {
        let query = "command=sh&command=-c&command=echo+a%26b%3D%22c%22&error=1&input=1&output=1";
        let streams = Streams::parse(query).unwrap();
        assert_eq!(streams.command, ["sh", "-c", "echo a&b=\"c\""]);
        assert!(streams.stdin && streams.stdout && streams.stderr && !streams.tty);
        let terminal = Streams::parse("command=sh&output=true&error=true&tty=true").unwrap();
        assert!(terminal.tty && terminal.stdout && !terminal.stderr);
        assert_eq!(Streams::parse("command=sh"), Err(BadParameter::NoStream));
    }

    #[test]
    fn a_log_is_asked_for_in_parts() {
        let query =
            "follow=true&tailLines=0&limitBytes=5&sinceSeconds=60&timestamps=true&previous=";
        let options = LogOptions::parse(query).unwrap();
        let want = LogOptions {
            follow: true,
            timestamps: true,
            since: Some(Since::Seconds(60)),
            tail: Some(0),
            limit: Some(5),
            ..LogOptions::default()
        };
        assert_eq!(options, want);
        for (query, name) in [
            ("tailLines=-1", "tailLines"),
            ("limitBytes=0", "limitBytes"),
            ("sinceSeconds=x", "sinceSeconds"),
            ("stream=both", "stream"),
            ("sinceSeconds=1&sinceTime=2026-01-01T00:00:00Z", "sinceTime"),
        ] {
            let error = LogOptions::parse(query).unwrap_err().to_string();
            assert!(error.contains(name), "{query}: {error}");
        }
    }
}
