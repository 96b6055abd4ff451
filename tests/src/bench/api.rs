//! The API server over one blocking HTTPS connection a caller: what `kubectl` does, without the
//! time that starting a process takes, and a watch that stamps each event as it arrives.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::Value;

/// How long one request may take.
const REQUEST: Duration = Duration::from_secs(30);

/// The server closes an idle connection after a minute or two: one that rested longer than this
/// is made anew, before anything is timed.
const FRESH: Duration = Duration::from_secs(20);

/// Events that a watch may be ahead of its reader: a benchmark looks at one Pod at a time, and the
/// reader drops what it does not wait for.
const AHEAD: usize = 4096;

type Tls = BufReader<StreamOwned<ClientConnection, TcpStream>>;

/// A client with the certificate of a kubeconfig.
pub struct Api {
    config: Arc<ClientConfig>,
    address: SocketAddr,
    open: Option<(Tls, Instant)>,
}

impl Api {
    /// Reads a kubeconfig as the testbed writes it: JSON, with files for the certificates.
    pub fn new(kubeconfig: &Path) -> Result<Api> {
        let text = std::fs::read(kubeconfig)?;
        let config: Value = serde_json::from_slice(&text).context("kubeconfig")?;
        let text = |value: &Value| value.as_str().map(str::to_owned).context("kubeconfig");
        let cluster = &config["clusters"][0]["cluster"];
        let user = &config["users"][0]["user"];
        let server = text(&cluster["server"])?;
        let address = server
            .strip_prefix("https://")
            .context("not an https server")?
            .parse()?;
        let mut roots = RootCertStore::empty();
        for root in CertificateDer::pem_file_iter(text(&cluster["certificate-authority"])?)? {
            roots.add(root?)?;
        }
        let chain: Vec<_> = CertificateDer::pem_file_iter(text(&user["client-certificate"])?)?
            .collect::<Result<_, _>>()?;
        let key = PrivateKeyDer::from_pem_file(text(&user["client-key"])?)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)?;
        Ok(Api {
            config: Arc::new(config),
            address,
            open: None,
        })
    }

    fn dial(&self) -> Result<(Tls, TcpStream)> {
        let socket = TcpStream::connect_timeout(&self.address, REQUEST)?;
        socket.set_nodelay(true)?;
        let handle = socket.try_clone()?;
        let name = ServerName::from(self.address.ip());
        let session = ClientConnection::new(self.config.clone(), name)?;
        let mut stream = StreamOwned::new(session, socket);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        Ok((BufReader::new(stream), handle))
    }

    /// Makes sure that the next request does not pay for a connection.
    pub fn warm(&mut self) -> Result<()> {
        let fresh = |(_, last): &(Tls, Instant)| last.elapsed() < FRESH;
        if !self.open.as_ref().is_some_and(fresh) {
            let (stream, socket) = self.dial()?;
            socket.set_read_timeout(Some(REQUEST))?;
            self.open = Some((stream, Instant::now()));
        }
        Ok(())
    }

    /// One request; fails unless the answer is a success.
    pub fn call(&mut self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        let (status, value) = self.ask(method, path, body)?;
        ensure!(
            (200..300).contains(&status),
            "{method} {path}: {status}: {}",
            value["message"]
        );
        Ok(value)
    }

    /// One request and its status.
    pub fn ask(&mut self, method: &str, path: &str, body: Option<&Value>) -> Result<(u16, Value)> {
        self.warm()?;
        let (mut stream, _) = self.open.take().context("a connection was just made")?;
        send(&mut stream, self.address, method, path, body)?;
        let head = Head::read(&mut stream)?;
        let mut text = Vec::new();
        match head.length {
            Some(length) => drop((&mut stream).take(length).read_to_end(&mut text)?),
            None if head.chunked => drop(Chunks::new(&mut stream).read_to_end(&mut text)?),
            None => {}
        }
        self.open = Some((stream, Instant::now()));
        let value = serde_json::from_slice(&text).unwrap_or(Value::Null);
        Ok((head.status, value))
    }

    /// Watches a collection; the first events are what is there already.
    pub fn watch(&self, path: &str) -> Result<Watch> {
        let (mut stream, socket) = self.dial()?;
        let path = match path.contains('?') {
            true => format!("{path}&watch=true&timeoutSeconds=14400"),
            false => format!("{path}?watch=true&timeoutSeconds=14400"),
        };
        send(&mut stream, self.address, "GET", &path, None)?;
        let head = Head::read(&mut stream)?;
        ensure!(
            head.status == 200 && head.chunked,
            "watch {path}: status {}",
            head.status
        );
        let (sender, events) = sync_channel(AHEAD);
        let reader = std::thread::Builder::new().name("watch".to_owned());
        reader.spawn(move || read_events(stream, &sender))?;
        Ok(Watch { events, socket })
    }
}

fn send(
    stream: &mut Tls,
    host: SocketAddr,
    method: &str,
    path: &str,
    body: Option<&Value>,
) -> Result<()> {
    let kind = match method {
        "PATCH" => "application/merge-patch+json",
        _ => "application/json",
    };
    let body = body
        .map(serde_json::to_vec)
        .transpose()?
        .unwrap_or_default();
    let mut text = format!(
        "{method} {path} HTTP/1.1\r\nHost: {host}\r\nAccept: application/json\r\n\
         Content-Type: {kind}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    )
    .into_bytes();
    text.extend_from_slice(&body);
    let stream = stream.get_mut();
    stream.write_all(&text)?;
    Ok(stream.flush()?)
}

/// What an answer's header says of its body.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) status: u16,
    pub(crate) length: Option<u64>,
    pub(crate) chunked: bool,
}

impl Head {
    pub(crate) fn read(stream: &mut impl BufRead) -> Result<Head> {
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let status = line.split(' ').nth(1).and_then(|word| word.parse().ok());
        let mut head = Head {
            status: status.with_context(|| format!("not HTTP: {line:?}"))?,
            length: None,
            chunked: false,
        };
        loop {
            line.clear();
            ensure!(
                stream.read_line(&mut line)? > 0,
                "the answer ends in its header"
            );
            let Some((name, value)) = line.trim().split_once(':') else {
                return Ok(head);
            };
            match name.to_ascii_lowercase().as_str() {
                "content-length" => head.length = Some(value.trim().parse()?),
                "transfer-encoding" => head.chunked = value.trim() == "chunked",
                _ => {}
            }
        }
    }
}

/// A body in chunks (RFC 9112, section 7.1) as plain bytes.
pub(crate) struct Chunks<R> {
    stream: R,
    left: u64,
    ended: bool,
}

impl<R: BufRead> Chunks<R> {
    pub(crate) fn new(stream: R) -> Chunks<R> {
        Chunks {
            stream,
            left: 0,
            ended: false,
        }
    }

    fn next_chunk(&mut self) -> std::io::Result<()> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        let size = u64::from_str_radix(line.trim(), 16);
        self.left = size.map_err(|_| std::io::Error::other("a chunk without a size"))?;
        if self.left == 0 {
            self.ended = true;
            self.stream.read_line(&mut line)?;
        }
        Ok(())
    }
}

impl<R: BufRead> Read for Chunks<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.left == 0 && !self.ended {
            self.next_chunk()?;
        }
        if self.ended {
            return Ok(0);
        }
        let most = usize::try_from(self.left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let got = self.stream.read(&mut buffer[..most])?;
        self.left -= got as u64;
        if self.left == 0 && got > 0 {
            // The line end behind each chunk.
            self.stream.read_line(&mut String::new())?;
        }
        Ok(got)
    }
}

/// An event and when it arrived.
pub struct Event {
    pub at: Instant,
    /// `ADDED`, `MODIFIED`, `DELETED`.
    pub kind: String,
    pub object: Value,
}

fn read_events(stream: Tls, sender: &SyncSender<Event>) {
    let mut lines = BufReader::new(Chunks::new(stream)).lines();
    while let Some(Ok(line)) = lines.next() {
        let at = Instant::now();
        let Ok(mut value) = serde_json::from_str::<Value>(&line) else {
            return;
        };
        let event = Event {
            at,
            kind: value["type"].as_str().unwrap_or_default().to_owned(),
            object: value["object"].take(),
        };
        if sender.send(event).is_err() {
            return;
        }
    }
}

/// An open watch. Dropping it ends it.
pub struct Watch {
    events: Receiver<Event>,
    socket: TcpStream,
}

impl Watch {
    /// Waits for the first event that `wanted` says yes to, and gives when it arrived.
    pub fn until(
        &self,
        what: &str,
        limit: Duration,
        mut wanted: impl FnMut(&Event) -> bool,
    ) -> Result<Instant> {
        let end = Instant::now() + limit;
        let mut last = Value::Null;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(event) if wanted(&event) => return Ok(event.at),
                Ok(mut event) => last = event.object["status"].take(),
                Err(RecvTimeoutError::Timeout) => {
                    bail!("{what}: not within {limit:?}; last status: {last}")
                }
                Err(RecvTimeoutError::Disconnected) => bail!("{what}: the watch ended"),
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_says_how_its_body_is_framed() {
        let mut text = &b"HTTP/1.1 201 Created\r\nContent-Length: 7\r\nX: y\r\n\r\nrest"[..];
        let head = Head::read(&mut text).expect("parses");
        let want = Head {
            status: 201,
            length: Some(7),
            chunked: false,
        };
        assert_eq!(head, want);
        assert_eq!(text, b"rest");
        assert!(Head::read(&mut &b"HTTP/1.1 200 OK\r\n"[..]).is_err());
        assert!(Head::read(&mut &b"nonsense\r\n\r\n"[..]).is_err());
    }

    #[test]
    fn chunks_become_one_body_and_leave_what_follows() {
        let mut text = &b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\nnext"[..];
        let mut body = String::new();
        Chunks::new(&mut text)
            .read_to_string(&mut body)
            .expect("reads");
        assert_eq!((body.as_str(), text), ("abcde", &b"next"[..]));
    }
}
