//! Exec, attach and port-forward: what the runtime's streaming server does, joined to whoever
//! asked. And `run`, an exec whose asker is here: its output is an answer.
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
use futures::{FutureExt as _, StreamExt as _};
use http::header::UPGRADE;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::DuplexStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tracing::{info, warn};

use super::leftover::{Claim, Leftovers};
use super::runtime::{self, Answered};
use super::translate::Translation;
use super::{Answer, Body, Deps, Refusal, TEXT, containers, document};
use crate::cri::{Cri, CriError, Failure, api};

/// A command of `run` has no other end; the kubelet gives it none.
const RUN_DEADLINE: Duration = Duration::from_secs(3600);
/// Of the output of `run`, which is held until the exit code is known: with the splice's buffers it
/// is less than any tunnel may hold.
const LONGEST_OUTPUT: usize = 64 * 1024;
/// What is read of the runtime's messages at once.
const PIECE: usize = 8 * 1024;
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
            let begun = begin(&*deps.cri, &deps.leftovers, exec_request(id, streams)).await;
            let (url, claim) = begun.map_err(|e| stopped(e, container))?;
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

/// The URL of an exec, and the claim on the process that begins once it is dialled.
async fn begin(
    cri: &dyn Cri,
    leftovers: &Leftovers,
    request: api::ExecRequest,
) -> Result<(String, Claim), CriError> {
    let claim = leftovers.claim(&request.container_id, &request.cmd);
    match cri.exec(request).await {
        Ok(url) => Ok((url, claim)),
        Err(error) => {
            // Nothing was started.
            claim.settle();
            Err(error)
        }
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

/// The output of a command that nobody talks to. The runtime would answer a synchronous exec with
/// 16 MiB at once, so it is a streamed one.
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
    let streams = Streams {
        command: command.clone(),
        stdin: false,
        stdout: true,
        stderr: true,
        tty: false,
    };
    let translation = Translation::of_command(&streams);
    let begun = begin(&*deps.cri, &deps.leftovers, exec_request(id, streams)).await;
    let (url, claim) = begun.map_err(|e| stopped(e, container))?;
    let answerer = match runtime::ask(&url, Method::POST, &translation.asks()).await? {
        Answered::Refused(status, headers, body) => {
            claim.settle();
            return Ok(refused(status, &headers, body));
        }
        Answered::Joined(_, answerer) => answerer,
    };
    let (asker, here) = tokio::io::duplex(PIECE);
    let joined = splice(translation.join(here), answerer).then(|_| std::future::pending());
    let heard = async {
        tokio::select! {
            biased;
            said = listen(asker) => said,
            never = joined => never,
        }
    };
    let heard = tokio::time::timeout(RUN_DEADLINE, heard).await;
    match heard.unwrap_or(Err(Cut::Deadline)) {
        Ok(said) => {
            claim.settle();
            answer_of_run(said, &command)
        }
        // The claim is dropped, and the process ended.
        Err(cut) => {
            let mut response = document(TEXT, format!("{cut}\n"));
            *response.status_mut() = cut.status();
            Ok(response)
        }
    }
}

/// What a command of `run` said, and the status with which it ended.
#[derive(Debug, Default)]
struct Said {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    end: Vec<u8>,
}

/// Why there is no answer to a `run`.
#[derive(Debug, thiserror::Error)]
enum Cut {
    #[error(
        "the command's output is longer than the {} KiB that run can answer with, and the command was \
         ended; use exec, which passes any output on",
        LONGEST_OUTPUT / 1024
    )]
    TooLong,
    #[error("the command did not end within {} s and was ended; use exec, which has no limit", RUN_DEADLINE.as_secs())]
    Deadline,
    #[error("the container runtime broke off before the command's end; try again or use exec")]
    Broken,
}

impl Cut {
    fn status(&self) -> StatusCode {
        match self {
            Cut::TooLong => StatusCode::INTERNAL_SERVER_ERROR,
            Cut::Deadline => StatusCode::GATEWAY_TIMEOUT,
            Cut::Broken => StatusCode::BAD_GATEWAY,
        }
    }
}

/// Takes a command's output until the connection's end.
async fn listen(io: DuplexStream) -> Result<Said, Cut> {
    let config = WebSocketConfig::default()
        .read_buffer_size(PIECE)
        .write_buffer_size(0);
    let mut socket = WebSocketStream::from_raw_socket(io, Role::Client, Some(config)).await;
    let mut said = Said::default();
    while let Some(Ok(message)) = socket.next().await {
        let Message::Binary(message) = message else {
            continue;
        };
        let length = said.stdout.len() + said.stderr.len() + said.end.len();
        if length + message.len() > LONGEST_OUTPUT {
            return Err(Cut::TooLong);
        }
        match message.split_first() {
            Some((1, bytes)) => said.stdout.extend_from_slice(bytes),
            Some((2, bytes)) => said.stderr.extend_from_slice(bytes),
            Some((3, bytes)) => said.end.extend_from_slice(bytes),
            Some(_) | None => {}
        }
    }
    if said.end.is_empty() {
        return Err(Cut::Broken);
    }
    Ok(said)
}

/// The output, or how else the command ended (pure).
fn answer_of_run(mut said: Said, command: &[String]) -> Result<Response<Body>, Refusal> {
    let status: Value = serde_json::from_slice(&said.end).unwrap_or_default();
    if status["status"] == "Success" {
        said.stdout.append(&mut said.stderr);
        return Ok(document(TEXT, said.stdout));
    }
    let causes = status["details"]["causes"].as_array();
    let mut codes = causes.into_iter().flatten();
    let code = codes.find(|c| c["reason"] == "ExitCode");
    let code = code.and_then(|c| c["message"].as_str()?.parse().ok());
    let Some(code) = code else {
        let why = status["message"].as_str().unwrap_or("it says not why");
        return Err(Refusal::Runtime(CriError {
            call: "Exec",
            failure: Failure::Refused,
            message: why.to_owned(),
        }));
    };
    Err(Refusal::Exited {
        command: command.join(" "),
        code,
        said: String::from_utf8_lossy(&said.stderr)
            .chars()
            .take(4096)
            .collect(),
    })
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
    use tokio::io::AsyncWriteExt as _;

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

    #[tokio::test]
    async fn an_exec_that_the_runtime_refuses_leaves_no_claim() {
        // This one knows no exec.
        let runtime = crate::cri::fake::Fake::new(jiff::Timestamp::UNIX_EPOCH);
        let (leftovers, _task) = Leftovers::build();
        let streams = Streams::parse("command=true&output=1").unwrap();
        let begun = begin(&runtime, &leftovers, exec_request("c".into(), streams)).await;
        assert!(begun.is_err());
        assert_eq!(leftovers.count_claims(), 0);
    }

    /// What a runtime says, as pieces on channels; then its end.
    async fn ran(said: &[(u8, &[u8])]) -> Result<Said, Cut> {
        let mut frames = bytes::BytesMut::new();
        for (channel, bytes) in said {
            crate::stream::websocket::message(&mut frames, &[*channel], bytes);
        }
        let (asker, mut there) = tokio::io::duplex(1024);
        let speak = async move {
            // One that is not heard to its end.
            let _ = there.write_all(&frames).await;
        };
        tokio::join!(listen(asker), speak).0
    }

    const SUCCESS: &[u8] = br#"{"status":"Success"}"#;

    #[tokio::test]
    async fn of_a_run_no_more_is_held_than_a_tunnel_may() {
        let half = vec![b'x'; LONGEST_OUTPUT / 2];
        let whole = ran(&[(1, &half), (2, b"oh"), (3, SUCCESS)]).await.unwrap();
        assert_eq!((whole.stdout, whole.stderr), (half.clone(), b"oh".to_vec()));
        let cut = ran(&[(1, &half), (2, &half), (3, SUCCESS)]).await;
        let cut = cut.unwrap_err();
        assert_eq!(cut.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert!(cut.to_string().contains("64 KiB"), "{cut}");
        assert!(cut.to_string().contains("use exec"), "{cut}");
        let broken = ran(&[(1, b"half of it")]).await.unwrap_err();
        assert!(matches!(broken, Cut::Broken), "{broken}");
    }

    #[test]
    fn a_run_is_answered_by_its_output_or_by_why_there_is_none() {
        let answer = |end: &[u8]| {
            let said = Said {
                stdout: b"out".to_vec(),
                stderr: b"err".to_vec(),
                end: end.to_vec(),
            };
            answer_of_run(said, &["do".into(), "it".into()])
        };
        let body = answer(SUCCESS).unwrap().into_body().collect();
        let body = body.now_or_never().unwrap().unwrap().to_bytes();
        assert_eq!(body, "outerr");
        for (end, want) in [
            (
                r#"{"status":"Failure","details":{"causes":[{"reason":"ExitCode","message":"7"}]}}"#,
                "command 'do it' exited with 7: err",
            ),
            (
                r#"{"status":"Failure","message":"no such file"}"#,
                "no such file",
            ),
            ("nonsense", "says not why"),
        ] {
            let why = answer(end.as_bytes()).unwrap_err();
            let why = common::telemetry::chain(&why).to_string();
            assert!(why.contains(want), "{end}: {why}");
        }
    }

    #[test]
    fn a_command_of_run_is_words() {
        assert_eq!(run_command("cmd=ls+-l+/"), ["ls", "-l", "/"]);
        assert_eq!(run_command("command=echo&command=a+b"), ["echo", "a b"]);
    }
}
