//! QUIC by quinn's protocol, tuned for thousands of idle devices that must not freeze one another.
//!
//! Owns the configuration and both ends of a handshake. What quinn-proto decides is driven here and
//! not by quinn, for what a resting session costs and how bulk leaves: docs/decisions/0009-quic-driver.md.

use std::net::SocketAddr;
use std::sync::Arc;

use quinn_proto::crypto::rustls::QuicClientConfig;
use quinn_proto::{
    AckFrequencyConfig, ClientConfig, ConnectionError, EndpointConfig, HashedConnectionIdGenerator,
    IdleTimeout, MtuDiscoveryConfig, ServerConfig, TransportConfig, VarInt,
};

use super::mux::Side;
use super::tls::ClientTls;
use super::transport::{Connection, Link, LinkConfig, Tally, TransportError};

mod connection;
mod endpoint;
mod handshake;
mod socket;
mod stream;

pub(super) use connection::QuicLink;
pub(super) use endpoint::{Endpoint, Strangers};
use handshake::Credentials;
pub(super) use stream::{RecvStream, SendStream};

/// Bytes that peers who have not proved their address may make us keep: one first packet each.
const INCOMING_BUFFER: u64 = 8 * 1024;
const INCOMING_BUFFERS: u64 = 1024 * 1024;
const MAX_INCOMING: usize = 512;

/// Packets that may come before one answer to all: as many as a connection sends before it has
/// heard anything.
const UNANSWERED: u32 = 9;

/// How an endpoint answers datagrams of connections that it does not know: with a reset that only
/// a holder of `reset_key` can make. The replicas of one cloud share it, and it outlives their
/// processes, so that a device whose cloud was killed hears so at its next datagram instead of
/// waiting for silence. Connection ids that name a replica come in here.
fn listening_config(reset_key: &[u8; 32]) -> EndpointConfig {
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, reset_key);
    // The generator tells its own ids from noise, and only those are answered.
    let tag = ring::hmac::sign(&key, b"connection ids");
    let mut id_key = [0; 8];
    id_key.copy_from_slice(&tag.as_ref()[..8]);
    let id_key = u64::from_be_bytes(id_key);
    let mut config = EndpointConfig::new(Arc::new(key));
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(id_key)));
    config
}

/// The listener's endpoint on a bound socket, and who knocks at it.
pub(super) fn listen(
    socket: std::net::UdpSocket,
    reset_key: &[u8; 32],
    server: ServerConfig,
) -> std::io::Result<(Arc<Endpoint>, Strangers)> {
    Endpoint::new(socket, listening_config(reset_key), Some(server))
}

/// Asks the peer to acknowledge seldom while much comes: an answer to each two packets costs all on
/// the way as much as a packet. Fewer are answered within 25 ms, which one that comes alone always
/// was.
fn seldom() -> AckFrequencyConfig {
    let mut config = AckFrequencyConfig::default();
    config.ack_eliciting_threshold(UNANSWERED.into());
    config
}

fn transport(config: &LinkConfig, side: Side) -> Arc<TransportConfig> {
    let (ours, theirs) = config.streams(side);
    let both = u64::from(ours) + u64::from(theirs);
    // With less, stalled streams use up the connection's window and freeze the rest. A quarter more,
    // since quinn grants anew only when an eighth of the window was read: what stalled streams leave
    // must be more than that.
    let of_all = |window: u32| (both + both / 4) * u64::from(window);
    let (stream_window, peers_window) = config.windows(side);
    let window = of_all(stream_window);
    let window_varint = VarInt::from_u64(window).unwrap_or(VarInt::MAX);
    // The first keep-alive after the last answer starts the wait anew.
    let silence = match side {
        Side::Dialler => config.dead_after.saturating_sub(config.keep_alive),
        Side::Listener => config.dead_after,
    };
    let idle = IdleTimeout::try_from(silence).unwrap_or(VarInt::from_u32(45_000).into());
    let mut t = TransportConfig::default();
    t.max_concurrent_bidi_streams(u32::from(theirs).into())
        .max_concurrent_uni_streams(match side {
            // The listener's one word that the handshake is complete.
            Side::Dialler => 1u32.into(),
            Side::Listener => 0u32.into(),
        })
        .stream_receive_window(stream_window.into())
        .receive_window(window_varint)
        // As large as the peer's window, so that bulk under way never keeps control from being
        // queued; each stream is bounded by its own window.
        .send_window(of_all(peers_window))
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(match side {
            Side::Dialler => Some(config.keep_alive),
            Side::Listener => None,
        })
        .mtu_discovery_config(config.mtu_discovery.then(MtuDiscoveryConfig::default))
        .datagram_receive_buffer_size(None)
        .datagram_send_buffer_size(0)
        .allow_spin(false)
        .ack_frequency_config(Some(seldom()));
    Arc::new(t)
}

/// For a listener. Address changes of a device are followed.
pub(super) fn server_config(
    tls: Arc<rustls::ServerConfig>,
    config: &LinkConfig,
) -> Result<ServerConfig, TransportError> {
    let mut server = ServerConfig::with_crypto(Arc::new(Credentials::new(tls)?));
    server
        .transport_config(transport(config, Side::Listener))
        .migration(true)
        .max_incoming(MAX_INCOMING)
        .incoming_buffer_size(INCOMING_BUFFER)
        .incoming_buffer_size_total(INCOMING_BUFFERS);
    Ok(server)
}

/// Dials one address and waits until the server has taken our certificate.
///
/// In TLS 1.3 the client's handshake is complete before the server has judged its certificate, so
/// the listener says with an empty stream that it did.
pub(super) async fn dial(
    address: SocketAddr,
    tls: &ClientTls,
    config: &LinkConfig,
) -> Result<Connection, TransportError> {
    let any: SocketAddr = match address {
        SocketAddr::V4(_) => ([0, 0, 0, 0], 0).into(),
        SocketAddr::V6(_) => ([0u16; 8], 0).into(),
    };
    let socket = std::net::UdpSocket::bind(any).map_err(TransportError::unusable)?;
    let (endpoint, _nobody) =
        Endpoint::new(socket, EndpointConfig::default(), None).map_err(TransportError::unusable)?;
    let crypto =
        QuicClientConfig::try_from(tls.config.clone()).map_err(TransportError::unusable)?;
    let mut client = ClientConfig::new(Arc::new(crypto));
    client.transport_config(transport(config, Side::Dialler));
    let link = endpoint
        .connect(client, address, &tls.name.to_str())
        .map_err(TransportError::unusable)?;
    let untrusted = |e: ConnectionError| match tls.verdict() {
        Some(verdict) => TransportError::Trust(verdict),
        None => e.into(),
    };
    link.established().await.map_err(untrusted)?;
    link.hear_word().await.map_err(untrusted)?;
    Ok(wrap(link))
}

/// Completes a handshake that a listener let in.
pub(super) async fn accept(link: QuicLink) -> Result<Connection, TransportError> {
    link.established().await?;
    link.say_word().await?;
    Ok(wrap(link))
}

fn wrap(link: QuicLink) -> Connection {
    let peer = link.peer();
    Connection::new(Link::Quic(link), peer, Arc::new(Tally::default()))
}
