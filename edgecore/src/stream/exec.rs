//! Exec, attach and port-forward: what the runtime's streaming server does, joined to whoever
//! asked. And `run`, whose output is an answer.
//!
//! ```text
//! asker ── head ──► here ── CRI Exec ──► URL ── head ──► runtime
//!       ◄─ 101 ───       ◄─────────────────────── 101 ──
//!       ◄══════ bytes, untouched or translated ═══════►
//! ```

use std::time::{Duration, Instant};

use common::stream::carried;
use common::stream::request::{PodName, Streams, Target, pairs};
use common::stream::splice::{Outcome, splice};
use futures::FutureExt as _;
use http::header::UPGRADE;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tracing::{info, warn};

use super::leftover::Claim;
use super::runtime::{self, Answered};
use super::translate::Translation;
use super::{Answer, Body, Deps, Refusal, TEXT, containers, document};
use crate::cri::{CriError, api};

/// A command of `run` has no other end; the kubelet gives it none.
const RUN_DEADLINE: Duration = Duration::from_secs(3600);
/// Between an answer of `101` and the connection that it frees.
const UPGRADE_DEADLINE: Duration = Duration::from_secs(10);
/// A port-forward names its ports in its streams; these are a hint of older clients.
const MOST_PORTS: usize = 64;

/// Joins the asker to the runtime, if the runtime agrees.
pub(super) async fn upgrade(
    deps: &Deps,
    target: &Target,
    mut request: Request<Incoming>,
) -> Result<Answer, Refusal> {
    let query = request.uri().query().unwrap_or_default().to_owned();
    if !request.headers().contains_key(UPGRADE) {
        return Err(Refusal::UpgradeRequired);
    }
    let translation = Translation::of(target, request.headers(), &query)?;
    let (url, claim) = url(deps, target, &query).await?;
    let asker = hyper::upgrade::on(&mut request);
    let asked = match &translation {
        Some(translation) => runtime::ask(&url, Method::POST, &translation.asks()).await?,
        None => runtime::ask(&url, request.method().clone(), request.headers()).await?,
    };
    match asked {
        Answered::Refused(status, headers, body) => {
            // Nothing was started.
            claim.into_iter().for_each(Claim::settle);
            Ok(refused(status, &headers, body).into())
        }
        Answered::Joined(headers, answerer) => {
            let mut response = Response::new(Empty::new().map_err(|e| match e {}).boxed_unsync());
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            *response.headers_mut() = match &translation {
                Some(translation) => translation.answers(),
                None => headers,
            };
            let joined = Joined {
                verb: target.verb(),
                pod: target.pod().cloned(),
                began: Instant::now(),
                claim,
                translation,
            };
            let after = Some(joined.run(asker, answerer).boxed());
            Ok(Answer { response, after })
        }
    }
}

fn refused(status: StatusCode, headers: &http::HeaderMap, body: bytes::Bytes) -> Response<Body> {
    let mut response = document(TEXT, body);
    *response.status_mut() = status;
    response.headers_mut().extend(carried(headers));
    response
}

/// The runtime's URL for what is asked, and for an exec the claim on the process it will start.
async fn url(
    deps: &Deps,
    target: &Target,
    query: &str,
) -> Result<(String, Option<Claim>), Refusal> {
    match target {
        Target::Exec { pod, container } => {
            let streams = Streams::parse(query)?;
            if streams.command.is_empty() {
                return Err(common::stream::request::BadParameter::NoCommand.into());
            }
            let id = containers::running(deps, pod, container).await?;
            let claim = deps.leftovers.claim(&id, &streams.command);
            let asked = deps.cri.exec(exec_request(id, streams)).await;
            let url = asked.map_err(|e| stopped(e, container))?;
            Ok((url, Some(claim)))
        }
        Target::Attach { pod, container } => {
            let streams = Streams::parse(query)?;
            let id = containers::running(deps, pod, container).await?;
            let request = api::AttachRequest {
                container_id: id,
                stdin: streams.stdin,
                tty: streams.tty,
                stdout: streams.stdout,
                stderr: streams.stderr,
            };
            let asked = deps.cri.attach(request).await;
            Ok((asked.map_err(|e| stopped(e, container))?, None))
        }
        Target::PortForward { pod } => {
            let request = api::PortForwardRequest {
                pod_sandbox_id: containers::sandbox(deps, pod).await?,
                port: ports(query)?,
            };
            Ok((deps.cri.port_forward(request).await?, None))
        }
        Target::Run { .. }
        | Target::Logs { .. }
        | Target::Pods
        | Target::RunningPods
        | Target::StatsSummary
        | Target::Metrics(_)
        | Target::Healthz
        | Target::Configz => Err(Refusal::NoSuchPath),
    }
}

fn exec_request(container_id: String, streams: Streams) -> api::ExecRequest {
    api::ExecRequest {
        container_id,
        cmd: streams.command,
        tty: streams.tty,
        stdin: streams.stdin,
        stdout: streams.stdout,
        stderr: streams.stderr,
    }
}

/// A container that ended between the look and the call.
fn stopped(error: CriError, container: &str) -> Refusal {
    let gone = error.not_found() || error.message.contains("is not running");
    if gone
        || error
            .message
            .contains("container is in CONTAINER_EXITED state")
    {
        return Refusal::NotRunning(container.to_owned());
    }
    error.into()
}

fn ports(query: &str) -> Result<Vec<i32>, Refusal> {
    use common::stream::request::BadParameter;
    let wrong = || BadParameter::Value("port", "a list of at most 64 ports from 1 to 65535");
    let mut ports = Vec::new();
    for (_, value) in pairs(query).filter(|(name, _)| name == "port") {
        for port in value.split(',') {
            let number: Option<u16> = port.trim().parse().ok().filter(|p| *p > 0);
            ports.push(number.ok_or_else(wrong)?.into());
        }
    }
    if ports.len() > MOST_PORTS {
        return Err(wrong().into());
    }
    Ok(ports)
}

/// What follows the upgrade.
struct Joined {
    verb: &'static str,
    pod: Option<PodName>,
    began: Instant,
    claim: Option<Claim>,
    translation: Option<Translation>,
}

impl Joined {
    async fn run(mut self, asker: OnUpgrade, answerer: TokioIo<hyper::upgrade::Upgraded>) {
        let outcome = match tokio::time::timeout(UPGRADE_DEADLINE, asker).await {
            Ok(Ok(asker)) => {
                let asker = TokioIo::new(asker);
                match self.translation.take() {
                    Some(translation) => splice(translation.join(asker), answerer).await,
                    None => splice(asker, answerer).await,
                }
            }
            Ok(Err(_)) | Err(_) => Outcome {
                asker_first: true,
                left: true,
                ..Outcome::default()
            },
        };
        self.closed(&outcome);
        // Where the runtime ended first, the process did; else the claim's end sees to it. A runtime
        // also ends because its asker did, and the process of an exec is then left running.
        if !outcome.asker_first && outcome.error.is_none() {
            self.claim.into_iter().for_each(Claim::settle);
        }
    }

    fn closed(&self, outcome: &Outcome) {
        let pod = self.pod.as_ref();
        let (namespace, name) = pod.map_or(("", ""), |p| (&p.namespace, &p.name));
        let took = self.began.elapsed();
        let Outcome {
            there, back, left, ..
        } = outcome;
        info!(
            verb = self.verb,
            namespace,
            pod = name,
            sent = back,
            received = there,
            asker_left = left,
            ?took,
            "a tunnel ended"
        );
        if let Some(error) = &outcome.error {
            warn!(verb = self.verb, namespace, pod = name, %error, "a tunnel broke");
        }
    }
}

/// The output of a command that nobody talks to; the runtime bounds it.
pub(super) async fn run(
    deps: &Deps,
    pod: &PodName,
    container: &str,
    query: Option<&str>,
) -> Result<Response<Body>, Refusal> {
    let command = run_command(query.unwrap_or_default());
    if command.is_empty() {
        return Err(common::stream::request::BadParameter::NoCommand.into());
    }
    let id = containers::running(deps, pod, container).await?;
    let asked = deps.cri.exec_sync(&id, command.clone(), RUN_DEADLINE).await;
    let mut answer = asked.map_err(|e| stopped(e, container))?;
    if answer.exit_code != 0 {
        return Err(Refusal::Exited {
            command: command.join(" "),
            code: answer.exit_code,
            said: String::from_utf8_lossy(&answer.stderr)
                .chars()
                .take(4096)
                .collect(),
        });
    }
    answer.stdout.append(&mut answer.stderr);
    Ok(document(TEXT, answer.stdout))
}

/// The kubelet's `cmd`, split at spaces; or the words of `command`, which may hold some.
fn run_command(query: &str) -> Vec<String> {
    let mut words = Vec::new();
    for (name, value) in pairs(query) {
        match &*name {
            "command" => words.push(value),
            "cmd" => words.extend(
                value
                    .split(' ')
                    .filter(|w| !w.is_empty())
                    .map(str::to_owned),
            ),
            _ => {}
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_numbers_of_ports() {
        assert_eq!(ports("port=80&port=443,8080").unwrap(), [80, 443, 8080]);
        assert_eq!(ports("").unwrap(), [0; 0]);
        for query in ["port=0", "port=65536", "port=x", "port="] {
            assert!(ports(query).is_err(), "{query}");
        }
        assert!(ports(&"port=1&".repeat(65)).is_err());
    }

    #[test]
    fn a_command_of_run_is_words() {
        assert_eq!(run_command("cmd=ls+-l+/"), ["ls", "-l", "/"]);
        assert_eq!(run_command("command=echo&command=a+b"), ["echo", "a b"]);
    }
}
