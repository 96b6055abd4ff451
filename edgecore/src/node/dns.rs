//! DNS for Pods on the cluster's DNS address, with and without the cloud.
//!
//! A name below the cluster's domain is answered here: with the ClusterIP of a Service that this
//! node knows, else "no such name" at once, so that a resolver's search list costs no waiting. Any
//! other name is forwarded to the device's own resolvers, read again when their file changes.
//!
//! Owns one UDP and one TCP socket. Bounded: see the constants. Never asks itself, never caches.

mod message;

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::pods::dns::parse_resolv_conf;
use crate::pods::sources::{ServiceEntry, services};
use crate::store::desired::Desired;
use message::{Code, Question, Type};

/// Questions under way at once; ten Pods that each look up several names stay below it. Beyond it
/// UDP questions are dropped: resolvers ask again.
const MAX_QUESTIONS: usize = 64;
/// TCP connections at once: resolvers use them for the few answers that UDP cannot hold.
const MAX_CONNECTIONS: usize = 16;
/// A question is small; an answer over UDP is at most what EDNS clients announce in practice.
const MAX_UDP: usize = 4096;
const MAX_TCP: usize = 65_535;
/// For each of the device's resolvers; less than the 5 s after which clients ask again.
const UPSTREAM_TIME: Duration = Duration::from_secs(2);
/// A TCP client says something in this time or is closed.
const CLIENT_TIME: Duration = Duration::from_secs(10);
/// Resolvers beyond this are not asked (resolv.conf(5) has three).
const MAX_UPSTREAMS: usize = 3;
/// No resolv.conf is longer.
const MAX_RESOLV_CONF: u64 = 64 * 1024;

/// What the forwarder answers from.
#[derive(Clone, PartialEq, Eq)]
pub struct DnsConfig {
    /// The cluster's DNS address, held by this device.
    pub listen: SocketAddr,
    /// Such as `cluster.local`.
    pub cluster_domain: String,
    /// `default/kubernetes`, where no list of Services names it.
    pub api_service: Option<IpAddr>,
    /// The device's resolv.conf.
    pub resolv_conf: PathBuf,
    /// Where the device's resolvers listen: 53.
    pub upstream_port: u16,
}

/// A bound forwarder.
pub struct Forwarder {
    udp: Arc<UdpSocket>,
    tcp: TcpListener,
    shared: Arc<Shared>,
}

struct Shared {
    config: DnsConfig,
    desired: Desired,
    questions: Semaphore,
}

impl Forwarder {
    /// Listens; fails while the address is not held.
    pub async fn bind(config: DnsConfig, desired: Desired) -> io::Result<Self> {
        let udp = UdpSocket::bind(config.listen).await?;
        // Port 0, in tests: both sockets take the one that was free for UDP.
        let tcp = TcpListener::bind(udp.local_addr()?).await?;
        let shared = Shared {
            config,
            desired,
            questions: Semaphore::new(MAX_QUESTIONS),
        };
        Ok(Self {
            udp: Arc::new(udp),
            tcp,
            shared: Arc::new(shared),
        })
    }

    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.udp.local_addr()
    }

    /// Answers until shutdown.
    pub async fn run(self, shutdown: CancellationToken) {
        let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut buffer = vec![0; MAX_UDP];
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                received = self.udp.recv_from(&mut buffer) => match received {
                    Ok((size, client)) => self.spawn_udp(buffer[..size].to_vec(), client, &shutdown),
                    Err(error) => pause("receive", &error).await,
                },
                accepted = self.tcp.accept() => match accepted {
                    Ok((stream, _)) => {
                        // Full: the client sees its connection closed and asks again.
                        let Ok(permit) = connections.clone().try_acquire_owned() else { continue };
                        let (shared, stop) = (self.shared.clone(), shutdown.clone());
                        tokio::spawn(async move {
                            let _permit = permit;
                            let _ = stop.run_until_cancelled(shared.serve(stream)).await;
                        });
                    }
                    Err(error) => pause("accept", &error).await,
                },
            }
        }
    }

    fn spawn_udp(&self, query: Vec<u8>, client: SocketAddr, shutdown: &CancellationToken) {
        let (shared, socket, stop) = (self.shared.clone(), self.udp.clone(), shutdown.clone());
        tokio::spawn(async move {
            // Full: dropped.
            let Ok(_permit) = shared.questions.try_acquire() else {
                return;
            };
            let answer = stop
                .run_until_cancelled(shared.answer(&query, false))
                .await
                .flatten();
            if let Some(answer) = answer {
                let _ = socket.send_to(&answer, client).await;
            }
        });
    }
}

/// A socket error is the kernel's momentary lack of something: never a busy loop.
async fn pause(what: &str, error: &io::Error) {
    tracing::debug!(%error, "the DNS forwarder could not {what}");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

/// What is answered without asking anybody.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Forward,
    Answer(Code, Vec<IpAddr>),
}

impl Shared {
    /// Questions on one TCP connection, one after the other.
    async fn serve(&self, mut stream: TcpStream) -> io::Result<()> {
        loop {
            let query = timeout(CLIENT_TIME, read_framed(&mut stream)).await??;
            let answer = {
                let permit = timeout(CLIENT_TIME, self.questions.acquire()).await?;
                let _permit = permit.map_err(io::Error::other)?;
                self.answer(&query, true).await
            };
            let Some(answer) = answer else { return Ok(()) };
            timeout(CLIENT_TIME, write_framed(&mut stream, &answer)).await??;
        }
    }

    /// The answer to a query; `None` for what is no query.
    async fn answer(&self, query: &[u8], tcp: bool) -> Option<Vec<u8>> {
        let question = match message::parse_query(query) {
            Ok(question) => question,
            Err(message::Malformed::Silent) => return None,
            Err(message::Malformed::Told(code)) => return message::error(query, code),
        };
        match self.judge(&question) {
            Verdict::Answer(code, addresses) => {
                Some(message::answer(query, &question, code, &addresses))
            }
            Verdict::Forward => match self.forward(query, tcp).await {
                Some(answer) => Some(answer),
                None => message::error(query, Code::ServerFailure),
            },
        }
    }

    fn judge(&self, question: &Question) -> Verdict {
        let config = &self.config;
        let service = |namespace: &str, name: &str| {
            let list = services(&self.desired, namespace).unwrap_or_default();
            let listed = list.iter().find(|s| s.name == name);
            let listed = listed.and_then(ServiceEntry::address);
            listed.or(config
                .api_service
                .filter(|_| (namespace, name) == ("default", "kubernetes")))
        };
        judge(question, &config.cluster_domain, service)
    }

    /// Asks the device's resolvers in their order.
    async fn forward(&self, query: &[u8], tcp: bool) -> Option<Vec<u8>> {
        for upstream in self.upstreams().await {
            let asked = async {
                if tcp {
                    ask_tcp(upstream, query).await
                } else {
                    ask_udp(upstream, query).await
                }
            };
            match timeout(UPSTREAM_TIME, asked).await {
                Ok(Ok(answer)) => return Some(answer),
                Ok(Err(error)) => tracing::trace!(%upstream, %error, "resolver failed"),
                Err(_) => tracing::trace!(%upstream, "resolver did not answer"),
            }
        }
        None
    }

    /// Read each time: the file is small and in memory, and networks change under a device.
    async fn upstreams(&self) -> Vec<SocketAddr> {
        let mut text = String::new();
        if let Ok(file) = tokio::fs::File::open(&self.config.resolv_conf).await {
            let _ = file.take(MAX_RESOLV_CONF).read_to_string(&mut text).await;
        }
        upstreams(&text, self.config.upstream_port, self.config.listen)
    }
}

/// The resolvers that the device names, but never this forwarder.
fn upstreams(resolv_conf: &str, port: u16, own: SocketAddr) -> Vec<SocketAddr> {
    let servers = parse_resolv_conf(resolv_conf).servers;
    let addresses = servers.iter().filter_map(|s| s.parse::<IpAddr>().ok());
    let addresses = addresses.map(|ip| SocketAddr::new(ip, port));
    let others = addresses.filter(|a| a.ip() != own.ip() || port != own.port());
    others.take(MAX_UPSTREAMS).collect()
}

/// Names below the cluster's domain end here: `NAME.NAMESPACE.svc.DOMAIN` is a Service's address.
fn judge(
    question: &Question,
    domain: &str,
    service: impl Fn(&str, &str) -> Option<IpAddr>,
) -> Verdict {
    let name = question.name.to_ascii_lowercase();
    let domain = domain.trim_end_matches('.').to_ascii_lowercase();
    let below = match name.strip_suffix(&domain) {
        Some("") => return Verdict::Answer(Code::NoError, Vec::new()),
        Some(rest) if rest.ends_with('.') => &rest[..rest.len() - 1],
        Some(_) | None => return Verdict::Forward,
    };
    let labels: Vec<_> = below.split('.').collect();
    let found = match labels.as_slice() {
        [name, namespace, "svc"] => service(namespace, name),
        _ => None,
    };
    match (found, question.kind) {
        (None, _) => Verdict::Answer(Code::NoSuchName, Vec::new()),
        (Some(ip @ IpAddr::V4(_)), Type::A) | (Some(ip @ IpAddr::V6(_)), Type::Aaaa) => {
            Verdict::Answer(Code::NoError, vec![ip])
        }
        (Some(_), Type::A | Type::Aaaa | Type::Other(_)) => {
            Verdict::Answer(Code::NoError, Vec::new())
        }
    }
}

/// One question over a socket of its own: a fresh port and a fresh id, against forged answers.
async fn ask_udp(upstream: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let any: IpAddr = match upstream {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(upstream).await?;
    let sent = message::with_id(query, rand::random());
    socket.send(&sent).await?;
    let mut buffer = vec![0; MAX_UDP];
    loop {
        let size = socket.recv(&mut buffer).await?;
        if message::answers(&buffer[..size], &sent) {
            return Ok(message::with_id_of(&buffer[..size], query));
        }
    }
}

async fn ask_tcp(upstream: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(upstream).await?;
    let sent = message::with_id(query, rand::random());
    write_framed(&mut stream, &sent).await?;
    let answer = read_framed(&mut stream).await?;
    if message::answers(&answer, &sent) {
        return Ok(message::with_id_of(&answer, query));
    }
    Err(io::Error::other("the answer is to another question"))
}

/// Two bytes of length, then the message (RFC 1035 4.2.2).
async fn read_framed(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let size = usize::from(stream.read_u16().await?);
    let mut bytes = Vec::new();
    let limited = u64::try_from(size.min(MAX_TCP)).unwrap_or_default();
    stream.take(limited).read_to_end(&mut bytes).await?;
    if bytes.len() == size {
        Ok(bytes)
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

async fn write_framed(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
    let size = u16::try_from(bytes.len()).map_err(io::Error::other)?;
    let framed = [&size.to_be_bytes(), bytes].concat();
    stream.write_all(&framed).await
}

/// The addresses that [`super::addresses::hold`] holds for a cluster.
pub fn held_addresses(api: Option<IpAddr>, dns: Option<IpAddr>) -> Vec<IpAddr> {
    let set: BTreeSet<_> = api.into_iter().chain(dns).collect();
    set.into_iter().collect()
}

#[cfg(test)]
mod tests;
