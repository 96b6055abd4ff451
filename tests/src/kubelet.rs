//! A node's kubelet endpoint, asked directly: as the API server asks it, or as somebody who should
//! be refused. Blocking, one connection for each request, as the API server does it.
//!
//! The server's certificate is not verified here: an API server with
//! `--kubelet-certificate-authority` does that (`Options::verify_kubelets`).

use std::io::{BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme, StreamOwned};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use serde_json::Value;

use crate::bench::api::{Chunks, Head};
use crate::pki::Pair;

/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(30);

type Tls = StreamOwned<ClientConnection, TcpStream>;

/// A connection whose head was read and whose body was not.
pub type Body = BufReader<Tls>;

/// A connection whose handshake is done and which was not asked anything.
pub struct Fresh(Tls);

/// An endpoint, and who asks.
#[derive(Clone)]
pub struct Kubelet {
    pub address: SocketAddr,
    config: Arc<ClientConfig>,
    token: Option<String>,
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub body: String,
}

/// How the two ends of an upgraded connection talk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    Spdy,
    Websocket,
    /// As a new kubectl speaks with an API server.
    WebsocketV5,
}

impl Protocol {
    fn headers(self) -> &'static str {
        // The key is an example's (RFC 6455, section 1.2): nobody here checks the answer's.
        match self {
            Protocol::Spdy => {
                "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\
                 X-Stream-Protocol-Version: v4.channel.k8s.io\r\n"
            }
            Protocol::Websocket => {
                "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                 Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
                 Sec-WebSocket-Protocol: v4.channel.k8s.io\r\n"
            }
            Protocol::WebsocketV5 => {
                "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                 Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
                 Sec-WebSocket-Protocol: v5.channel.k8s.io\r\n"
            }
        }
    }
}

/// Where a Node says that its kubelet is found: the address that the API server takes first by its
/// own defaults, and the port.
pub fn endpoint(node: &Value) -> Result<SocketAddr> {
    let addresses = node["status"]["addresses"].as_array();
    let of = |kind: &str| {
        let mut all = addresses.into_iter().flatten();
        let found = all.find(|address| address["type"] == kind)?;
        found["address"].as_str()?.parse::<IpAddr>().ok()
    };
    let address = of("Hostname")
        .or_else(|| of("InternalIP"))
        .with_context(|| format!("no address to dial in {}", node["status"]["addresses"]))?;
    let port = node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"]
        .as_u64()
        .with_context(|| format!("no port in {}", node["status"]["daemonEndpoints"]))?;
    Ok(SocketAddr::new(address, u16::try_from(port)?))
}

impl Kubelet {
    /// Asks with that client certificate, or without any.
    pub fn new(address: SocketAddr, certificate: Option<&Pair>) -> Result<Kubelet> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anybody(provider)));
        let config = match certificate {
            Some(pair) => {
                let chain = CertificateDer::pem_file_iter(&pair.cert)?;
                let chain = chain.collect::<Result<Vec<_>, _>>()?;
                builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(&pair.key)?)?
            }
            None => builder.with_no_client_auth(),
        };
        Ok(Kubelet {
            address,
            config: Arc::new(config),
            token: None,
        })
    }

    /// Asks with a bearer token too.
    pub fn with_token(mut self, token: &str) -> Kubelet {
        self.token = Some(token.to_owned());
        self
    }

    /// One request without a body.
    pub fn ask(&self, method: &str, path: &str) -> Result<Answer> {
        let (head, body) = self.begin(method, path, "Connection: close\r\n")?;
        finish(head, body)
    }

    /// One request for an upgrade. `Ok` is the open connection, `Err` the answer that refuses it.
    pub fn upgrade(
        &self,
        method: &str,
        path: &str,
        protocol: Protocol,
    ) -> Result<Result<Body, Answer>> {
        self.upgrade_on(self.connect()?, method, path, protocol)
    }

    /// As [`Kubelet::upgrade`], on a connection that was made before.
    pub fn upgrade_on(
        &self,
        fresh: Fresh,
        method: &str,
        path: &str,
        protocol: Protocol,
    ) -> Result<Result<Body, Answer>> {
        let (head, body) = self.begin_on(fresh, method, path, protocol.headers())?;
        match head.status {
            101 => Ok(Ok(body)),
            _ => finish(head, body).map(Err),
        }
    }

    /// One GET of which the head alone is read; a refusal is `Err`.
    pub fn open(&self, path: &str) -> Result<Result<Body, Answer>> {
        let (head, body) = self.begin("GET", path, "")?;
        match head.status {
            200 => Ok(Ok(body)),
            _ => finish(head, body).map(Err),
        }
    }

    fn begin(&self, method: &str, path: &str, headers: &str) -> Result<(Head, Body)> {
        self.begin_on(self.connect()?, method, path, headers)
    }

    fn begin_on(
        &self,
        Fresh(mut stream): Fresh,
        method: &str,
        path: &str,
        headers: &str,
    ) -> Result<(Head, Body)> {
        let token = match &self.token {
            Some(token) => format!("Authorization: Bearer {token}\r\n"),
            None => String::new(),
        };
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nContent-Length: 0\r\n{token}{headers}\r\n",
            self.address
        )?;
        stream.flush()?;
        let mut body = BufReader::new(stream);
        let head = Head::read(&mut body).with_context(|| format!("{method} {path}"))?;
        Ok((head, body))
    }

    /// Dials and does the handshake.
    pub fn connect(&self) -> Result<Fresh> {
        let socket = TcpStream::connect_timeout(&self.address, ANSWER)
            .with_context(|| format!("dial {}", self.address))?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(ANSWER))?;
        socket.set_write_timeout(Some(ANSWER))?;
        let name = ServerName::from(self.address.ip());
        let session = ClientConnection::new(self.config.clone(), name)?;
        let mut stream = StreamOwned::new(session, socket);
        while stream.conn.is_handshaking() {
            stream
                .conn
                .complete_io(&mut stream.sock)
                .with_context(|| format!("the handshake with {}", self.address))?;
        }
        Ok(Fresh(stream))
    }
}

fn finish(head: Head, mut stream: Body) -> Result<Answer> {
    let mut bytes = Vec::new();
    match head.length {
        Some(length) => (&mut stream).take(length).read_to_end(&mut bytes)?,
        None if head.chunked => Chunks::new(&mut stream).read_to_end(&mut bytes)?,
        None => stream.read_to_end(&mut bytes)?,
    };
    Ok(Answer {
        status: head.status,
        body: String::from_utf8_lossy(&bytes).into_owned(),
    })
}

/// Takes any server for the right one.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            cert,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            cert,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_endpoint_is_what_an_api_server_would_dial_by_its_defaults() {
        let node = |addresses: Value| {
            json!({"status": {
                "addresses": addresses,
                "daemonEndpoints": {"kubeletEndpoint": {"Port": 10301}},
            }})
        };
        let internal = json!({"type": "InternalIP", "address": "198.18.1.1"});
        let host = json!({"type": "Hostname", "address": "198.18.1.2"});
        let named = json!({"type": "Hostname", "address": "edge-1"});
        for (addresses, want) in [
            (json!([internal, host]), Some("198.18.1.2:10301")),
            (json!([internal]), Some("198.18.1.1:10301")),
            (json!([named, internal]), Some("198.18.1.1:10301")),
            (json!([named]), None),
        ] {
            let found = endpoint(&node(addresses.clone())).ok();
            assert_eq!(
                found,
                want.map(|a| a.parse().expect("an address")),
                "{addresses}"
            );
        }
    }
}
