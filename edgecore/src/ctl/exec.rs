//! `edgecore ctl exec`: a command in a container, over the WebSocket that the runtime speaks.
//!
//! ```text
//! binary message = channel, bytes     0 stdin  1 stdout  2 stderr  3 the end  4 the window's size
//! v5 only: 255, channel               that channel is closed
//! ```
//!
//! The protocol is `channel.k8s.io` (KEP 4006). Version 4 cannot close the standard input.

use std::process::ExitCode;
use std::time::Duration;

use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt as _, StreamExt as _};
use http::HeaderValue;
use http::header::SEC_WEBSOCKET_PROTOCOL;
use serde::Deserialize;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_tungstenite::{WebSocketStream, client_async_with_config};

use super::CtlError;
use super::client::Client;
use super::pods::Place;
use super::terminal::{self, Raw};
use crate::cli::ExecArgs;

const V5: &str = "v5.channel.k8s.io";
const V4: &str = "v4.channel.k8s.io";
const OFFERED: HeaderValue = HeaderValue::from_static("v5.channel.k8s.io, v4.channel.k8s.io");

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const END: u8 = 3;
const SIZE: u8 = 4;
const CLOSE: u8 = 255;
/// What a terminal's user types to end the input.
const END_OF_TRANSMISSION: u8 = 4;

/// The runtime sends pieces of 32 KiB.
const LONGEST_MESSAGE: usize = 1 << 20;
/// What is read of the input before it is passed on.
const PIECE: usize = 16 * 1024;
/// The end is a small JSON document.
const LONGEST_END: usize = 64 * 1024;
/// The runtime prepares the process meanwhile.
const HANDSHAKE: Duration = Duration::from_secs(45);
/// From the command's end to the connection's.
const CLOSING: Duration = Duration::from_secs(2);

type Socket = WebSocketStream<UnixStream>;

/// Ends with the command's exit code.
pub(super) async fn run(client: &Client, args: &ExecArgs) -> Result<ExitCode, CtlError> {
    let (namespace, container) = (&args.namespace.namespace, args.container.as_deref());
    let place = Place::find(client, namespace, &args.pod, container).await?;
    let tty = args.tty && (terminal::is_here() || !args.stdin);
    if args.tty && !tty {
        remark("no terminal for the command: the standard input is none");
    }
    let path = format!("{}?{}", place.path("exec"), query(args, tty));
    let opened = tokio::time::timeout(HANDSHAKE, open(client, &path)).await;
    let (socket, closes) = opened.map_err(|_| CtlError::Deadline)??;
    let raw = (tty && args.stdin).then(Raw::enter).transpose()?;
    let ended = converse(socket, args.stdin, tty, closes).await;
    drop(raw);
    ended
}

#[expect(
    clippy::print_stderr,
    reason = "a remark of a command line program, beside the command's output"
)]
fn remark(text: &str) {
    // A raw terminal does not go back to the line's start by itself.
    eprint!("edgecore: {text}\r\n");
}

fn query(args: &ExecArgs, tty: bool) -> String {
    let encode = |word: &String| {
        let word = percent_encoding::utf8_percent_encode(word, percent_encoding::NON_ALPHANUMERIC);
        format!("command={word}")
    };
    let mut query: Vec<String> = args.command.iter().map(encode).collect();
    query.push("output=1".into());
    query.extend(args.stdin.then(|| "input=1".into()));
    query.push(if tty { "tty=1" } else { "error=1" }.into());
    query.join("&")
}

/// The connection, and whether its protocol can close the input.
async fn open(client: &Client, path: &str) -> Result<(Socket, bool), CtlError> {
    let mut request = format!("ws://edgecore{path}").into_client_request()?;
    request
        .headers_mut()
        .insert(SEC_WEBSOCKET_PROTOCOL, OFFERED);
    let config = WebSocketConfig::default()
        .max_message_size(Some(LONGEST_MESSAGE))
        .max_frame_size(Some(LONGEST_MESSAGE))
        .read_buffer_size(PIECE)
        .write_buffer_size(0)
        .max_write_buffer_size(4 * PIECE);
    let stream = client.connect().await?;
    let (socket, response) = client_async_with_config(request, stream, Some(config))
        .await
        .map_err(refused)?;
    let chosen = response.headers().get(SEC_WEBSOCKET_PROTOCOL);
    match chosen.and_then(|v| v.to_str().ok()) {
        Some(V5) => Ok((socket, true)),
        Some(V4) => Ok((socket, false)),
        other => Err(CtlError::Exec(format!(
            "the container runtime speaks {other:?}, neither {V5} nor {V4}"
        ))),
    }
}

/// What edgecore or the runtime said in place of an upgrade.
fn refused(error: tungstenite::Error) -> CtlError {
    let tungstenite::Error::Http(response) = error else {
        return error.into();
    };
    let body = response.body().as_deref().unwrap_or_default();
    let text = String::from_utf8_lossy(body).trim().to_owned();
    if text.is_empty() {
        return CtlError::Refused(format!("edgecore answered {}", response.status()));
    }
    CtlError::Refused(text)
}

/// Both directions at once, or a command that fills its output before it reads on would wait for
/// one that fills its input.
async fn converse(
    socket: Socket,
    stdin: bool,
    tty: bool,
    closes: bool,
) -> Result<ExitCode, CtlError> {
    let (sink, stream) = socket.split();
    let mut terminate = signal(SignalKind::terminate()).map_err(CtlError::Tokio)?;
    let mut hang_up = signal(SignalKind::hangup()).map_err(CtlError::Tokio)?;
    tokio::select! {
        biased;
        _ = terminate.recv() => Ok(ExitCode::from(143)),
        _ = hang_up.recv() => Ok(ExitCode::from(129)),
        ended = listen(stream) => ended,
        failed = speak(sink, stdin, tty, closes) => Err(failed),
    }
}

/// Passes input and sizes on; ends only by an error of this end.
async fn speak(
    mut sink: SplitSink<Socket, Message>,
    stdin: bool,
    tty: bool,
    closes: bool,
) -> CtlError {
    let mut resized = match signal(SignalKind::window_change()) {
        Ok(resized) => resized,
        Err(error) => return CtlError::Terminal(error),
    };
    let mut input = tokio::io::stdin();
    let mut open = stdin;
    let mut piece = vec![0; PIECE];
    let mut size = tty.then(terminal::size).flatten();
    loop {
        if let Some((width, height)) = size.take() {
            let text = json!({"Width": width, "Height": height}).to_string();
            if send(&mut sink, SIZE, text.as_bytes()).await.is_err() {
                break;
            }
        }
        tokio::select! {
            biased;
            _ = resized.recv() => size = tty.then(terminal::size).flatten(),
            read = input.read(&mut piece), if open => match read {
                Ok(length) if length > 0 => {
                    if send(&mut sink, STDIN, &piece[..length]).await.is_err() {
                        break;
                    }
                }
                Ok(_) => {
                    open = false;
                    if end_of_input(&mut sink, tty, closes).await.is_err() {
                        break;
                    }
                }
                Err(error) => return CtlError::Terminal(error),
            },
        }
    }
    // The connection has ended: what is left of it is the listener's to tell.
    std::future::pending().await
}

async fn end_of_input(
    sink: &mut SplitSink<Socket, Message>,
    tty: bool,
    closes: bool,
) -> Result<(), tungstenite::Error> {
    match (closes, tty) {
        (true, _) => send(sink, CLOSE, &[STDIN]).await,
        (false, true) => send(sink, STDIN, &[END_OF_TRANSMISSION]).await,
        (false, false) => {
            remark(
                "the input has ended, but the container runtime speaks v4.channel.k8s.io, which \
                 cannot say so: a command that reads to the end waits on; Ctrl-C ends it",
            );
            Ok(())
        }
    }
}

async fn send(
    sink: &mut SplitSink<Socket, Message>,
    channel: u8,
    bytes: &[u8],
) -> Result<(), tungstenite::Error> {
    let mut message = Vec::with_capacity(1 + bytes.len());
    message.push(channel);
    message.extend_from_slice(bytes);
    sink.send(Message::binary(message)).await
}

/// Writes the output down until the end is told.
async fn listen(mut stream: SplitStream<Socket>) -> Result<ExitCode, CtlError> {
    let (mut out, mut err) = (tokio::io::stdout(), tokio::io::stderr());
    let mut end = Vec::new();
    loop {
        let next = if end.is_empty() {
            stream.next().await
        } else {
            // All has been said; who does not hang up then is not waited for.
            let closed = tokio::time::timeout(CLOSING, stream.next()).await;
            closed.unwrap_or(None)
        };
        let message = match next {
            Some(Ok(Message::Binary(message))) => message,
            Some(Ok(Message::Close(_))) | None => break,
            Some(Ok(_)) => continue,
            // A runtime may end the connection without the WebSocket's own farewell.
            Some(Err(_)) if !end.is_empty() => break,
            Some(Err(error)) => return Err(error.into()),
        };
        let written = match message.split_first() {
            Some((&STDOUT, bytes)) => write(&mut out, bytes).await,
            Some((&STDERR, bytes)) => write(&mut err, bytes).await,
            Some((&END, bytes)) if end.len() + bytes.len() <= LONGEST_END => {
                end.extend_from_slice(bytes);
                Ok(())
            }
            // Channels that a newer version may have.
            Some(_) | None => Ok(()),
        };
        written.map_err(CtlError::Output)?;
    }
    outcome(&end)
}

async fn write(to: &mut (impl tokio::io::AsyncWrite + Unpin), bytes: &[u8]) -> std::io::Result<()> {
    to.write_all(bytes).await?;
    to.flush().await
}

/// `Status` of meta/v1, as far as it says how a command ended.
#[derive(Deserialize)]
struct Status {
    #[serde(default)]
    status: String,
    #[serde(default)]
    message: String,
    #[serde(default)]
    details: Details,
}

#[derive(Default, Deserialize)]
struct Details {
    #[serde(default)]
    causes: Vec<Cause>,
}

#[derive(Deserialize)]
struct Cause {
    #[serde(default)]
    reason: String,
    #[serde(default)]
    message: String,
}

/// How the command ended (pure).
fn outcome(end: &[u8]) -> Result<ExitCode, CtlError> {
    if end.is_empty() {
        let text = "the connection ended before the command did";
        return Err(CtlError::Exec(text.into()));
    }
    let status: Status = serde_json::from_slice(end).map_err(CtlError::Document)?;
    if status.status == "Success" {
        return Ok(ExitCode::SUCCESS);
    }
    let causes = status.details.causes.iter();
    let code = causes
        .filter(|c| c.reason == "ExitCode")
        .find_map(|c| c.message.parse::<u8>().ok());
    code.map(ExitCode::from)
        .ok_or(CtlError::Exec(status.message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_ends_as_the_runtime_says() {
        let code = |text: &str| outcome(text.as_bytes()).map(|c| format!("{c:?}"));
        let of = |n: u8| format!("{:?}", ExitCode::from(n));
        assert_eq!(code(r#"{"status":"Success"}"#).unwrap(), of(0));
        let failure = r#"{"status":"Failure","reason":"NonZeroExitCode","message":"x",
            "details":{"causes":[{"reason":"ExitCode","message":"42"}]}}"#;
        assert_eq!(code(failure).unwrap(), of(42));
        let broken = r#"{"status":"Failure","message":"no such file"}"#;
        let error = code(broken).unwrap_err().to_string();
        assert_eq!(error, "no such file");
        assert!(code("").unwrap_err().to_string().contains("before"));
        assert!(code("nonsense").is_err());
    }

    #[test]
    fn every_word_of_a_command_arrives_as_it_is() {
        let args = ExecArgs {
            pod: "p".into(),
            namespace: crate::cli::Namespace {
                namespace: "default".into(),
            },
            container: None,
            stdin: true,
            tty: false,
            command: ["sh", "-c", "echo a&b=\"ü +\""].map(str::to_owned).to_vec(),
        };
        let streams = common::stream::request::Streams::parse(&query(&args, false)).unwrap();
        assert_eq!(streams.command, args.command);
        assert!(streams.stdin && streams.stdout && streams.stderr && !streams.tty);
        let terminal = common::stream::request::Streams::parse(&query(&args, true)).unwrap();
        assert!(terminal.tty && !terminal.stderr);
    }
}
