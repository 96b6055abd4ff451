//! TLS of the connections that a listener takes: of a handshake that is over, only the keys stay.
//!
//! quinn's own keeps rustls' whole state for as long as a connection lives, five kilobytes that an
//! idle device never needs again: nothing follows a handshake, since no tickets are given, there is
//! no early data, and QUIC changes its keys without TLS (RFC 9001, section 6).
//!
//! ```text
//! shaking ──the client's Finished was taken, all was said──► over
//!  rustls' state                                             secrets of the keys to come,
//!                                                            and the peer's chain until it is asked for
//! ```

use std::any::Any;
use std::mem;
use std::sync::{Arc, Mutex, PoisonError};

use quinn_proto::crypto::rustls::QuicServerConfig;
use quinn_proto::crypto::{
    ExportKeyingMaterialError, HeaderKey, KeyPair, Keys, PacketKey, ServerConfig, Session,
    UnsupportedVersion,
};
use quinn_proto::transport_parameters::TransportParameters;
use quinn_proto::{ConnectionId, Side, TransportError, TransportErrorCode};
use rustls::quic::{KeyChange, Secrets, ServerConnection, Version};
use rustls_pki_types::CertificateDer;

use crate::hub::transport;

/// The only version that devices speak.
const VERSION_1: u32 = 1;

/// What devices are shown, and by what they are judged.
pub(super) struct Credentials {
    tls: Arc<rustls::ServerConfig>,
    /// What of QUIC's cryptography comes before any handshake.
    before: Arc<QuicServerConfig>,
}

impl Credentials {
    pub(super) fn new(tls: Arc<rustls::ServerConfig>) -> Result<Self, transport::TransportError> {
        let before =
            QuicServerConfig::try_from(tls.clone()).map_err(transport::TransportError::unusable)?;
        // What rustls has against a configuration, it says here rather than to the first device.
        ServerConnection::new(tls.clone(), Version::V1, Vec::new())
            .map_err(transport::TransportError::unusable)?;
        Ok(Self {
            tls,
            before: Arc::new(before),
        })
    }
}

impl ServerConfig for Credentials {
    fn initial_keys(
        &self,
        version: u32,
        destination: &ConnectionId,
    ) -> Result<Keys, UnsupportedVersion> {
        if version != VERSION_1 {
            return Err(UnsupportedVersion);
        }
        self.before.initial_keys(version, destination)
    }

    fn retry_tag(&self, version: u32, destination: &ConnectionId, packet: &[u8]) -> [u8; 16] {
        self.before.retry_tag(version, destination, packet)
    }

    fn start_session(
        self: Arc<Self>,
        _version_1: u32,
        parameters: &TransportParameters,
    ) -> Box<dyn Session> {
        let mut encoded = Vec::new();
        parameters.write(&mut encoded);
        Box::new(Handshake::new(self, encoded))
    }
}

/// See the module.
struct Handshake {
    /// Until it is over.
    shaking: Option<Box<ServerConnection>>,
    credentials: Arc<Credentials>,
    secrets: Option<Secrets>,
    /// Given once.
    peer: Mutex<Vec<CertificateDer<'static>>>,
}

impl Handshake {
    fn new(credentials: Arc<Credentials>, parameters: Vec<u8>) -> Self {
        // That it can be made was seen when the credentials were.
        let shaking = ServerConnection::new(credentials.tls.clone(), Version::V1, parameters);
        Self {
            shaking: shaking.ok().map(Box::new),
            credentials,
            secrets: None,
            peer: Mutex::default(),
        }
    }

    /// Nothing was left to say: forgets what is not needed again.
    fn said_all(&mut self) {
        let Some(over) = self.shaking.take_if(|shaking| !shaking.is_handshaking()) else {
            return;
        };
        *self.peer.get_mut().unwrap_or_else(PoisonError::into_inner) = chain_of(&over);
    }
}

fn chain_of(shaking: &ServerConnection) -> Vec<CertificateDer<'static>> {
    let chain = shaking.peer_certificates().unwrap_or_default();
    chain.iter().map(|one| one.clone().into_owned()).collect()
}

fn violation(reason: String) -> TransportError {
    TransportError {
        code: TransportErrorCode::PROTOCOL_VIOLATION,
        frame: None,
        reason,
    }
}

impl Session for Handshake {
    fn initial_keys(&self, destination: &ConnectionId, _server: Side) -> Keys {
        match self.credentials.initial_keys(VERSION_1, destination) {
            Ok(keys) => keys,
            Err(UnsupportedVersion) => unreachable!("every QUIC has version 1"),
        }
    }

    fn handshake_data(&self) -> Option<Box<dyn Any>> {
        None
    }

    fn peer_identity(&self) -> Option<Box<dyn Any>> {
        let chain = match &self.shaking {
            Some(shaking) => chain_of(shaking),
            None => mem::take(&mut *self.peer.lock().unwrap_or_else(PoisonError::into_inner)),
        };
        Some(Box::new(chain))
    }

    fn early_crypto(&self) -> Option<(Box<dyn HeaderKey>, Box<dyn PacketKey>)> {
        None
    }

    fn early_data_accepted(&self) -> Option<bool> {
        None
    }

    fn is_handshaking(&self) -> bool {
        self.shaking.as_ref().is_some_and(|s| s.is_handshaking())
    }

    fn read_handshake(&mut self, bytes: &[u8]) -> Result<bool, TransportError> {
        let Some(shaking) = &mut self.shaking else {
            return Err(violation("a handshake that is over goes on".to_owned()));
        };
        match (shaking.read_hs(bytes), shaking.alert()) {
            (Ok(()), _) => Ok(false),
            (Err(error), Some(alert)) => Err(TransportError {
                code: TransportErrorCode::crypto(alert.into()),
                frame: None,
                reason: error.to_string(),
            }),
            (Err(error), None) => Err(violation(error.to_string())),
        }
    }

    fn transport_parameters(&self) -> Result<Option<TransportParameters>, TransportError> {
        let shaking = self.shaking.as_ref();
        let said = shaking.and_then(|s| s.quic_transport_parameters());
        said.map(|mut bytes| TransportParameters::read(Side::Server, &mut bytes))
            .transpose()
            .map_err(TransportError::from)
    }

    fn write_handshake(&mut self, out: &mut Vec<u8>) -> Option<Keys> {
        let keys = match self.shaking.as_mut()?.write_hs(out) {
            Some(KeyChange::Handshake { keys }) => keys,
            Some(KeyChange::OneRtt { keys, next }) => {
                self.secrets = Some(next);
                keys
            }
            None => {
                if out.is_empty() {
                    self.said_all();
                }
                return None;
            }
        };
        Some(Keys {
            header: KeyPair {
                local: Box::new(keys.local.header),
                remote: Box::new(keys.remote.header),
            },
            packet: KeyPair {
                local: Box::new(keys.local.packet),
                remote: Box::new(keys.remote.packet),
            },
        })
    }

    fn next_1rtt_keys(&mut self) -> Option<KeyPair<Box<dyn PacketKey>>> {
        let keys = self.secrets.as_mut()?.next_packet_keys();
        Some(KeyPair {
            local: Box::new(keys.local),
            remote: Box::new(keys.remote),
        })
    }

    fn is_valid_retry(&self, _: &ConnectionId, _: &[u8], _: &[u8]) -> bool {
        // A client's question.
        false
    }

    fn export_keying_material(
        &self,
        _: &mut [u8],
        _: &[u8],
        _: &[u8],
    ) -> Result<(), ExportKeyingMaterialError> {
        Err(ExportKeyingMaterialError)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::testing::{HOUR, client_tls, identity, new_ca, now_for, server_tls};
    use rustls::quic::ClientConnection;

    /// Both ends of a handshake, until neither has anything to say.
    fn shaken() -> (Handshake, ClientConnection, Vec<CertificateDer<'static>>) {
        let ca = new_ca();
        let device = identity(&ca, now_for(HOUR));
        let chain = device.chain.clone();
        let tls = client_tls(&ca, device);
        let mut client =
            ClientConnection::new(tls.config.clone(), Version::V1, tls.name.clone(), vec![])
                .unwrap();
        let credentials = Credentials::new(server_tls(&ca).hub).unwrap();
        let mut server = Handshake::new(Arc::new(credentials), Vec::new());
        assert!(server.is_handshaking());
        loop {
            // The client takes what comes under one key by itself.
            let (mut there, mut back) = (Vec::new(), Vec::new());
            while client.write_hs(&mut there).is_some() {}
            if !there.is_empty() {
                server.read_handshake(&there).unwrap();
            }
            // As quinn asks: anew until nothing comes.
            let mut said = 1;
            while said > 0 {
                let mut some = Vec::new();
                let keys = server.write_handshake(&mut some).is_some();
                said = some.len() + usize::from(keys);
                back.push(some);
            }
            back.retain(|some| !some.is_empty());
            if there.is_empty() && back.is_empty() {
                return (server, client, chain);
            }
            for some in back {
                client.read_hs(&some).unwrap();
            }
        }
    }

    #[test]
    fn of_a_handshake_that_is_over_the_keys_stay_and_the_peer_is_told_once() {
        let (mut server, client, chain) = shaken();
        assert!(!client.is_handshaking() && !server.is_handshaking());
        assert!(server.shaking.is_none(), "rustls' state is kept");
        let told = |server: &Handshake| {
            let any = server.peer_identity().unwrap();
            *any.downcast::<Vec<CertificateDer<'static>>>().unwrap()
        };
        assert_eq!(told(&server), chain);
        assert!(told(&server).is_empty(), "the chain is kept");
        assert!(server.next_1rtt_keys().is_some());
        assert!(server.next_1rtt_keys().is_some());
    }

    #[test]
    fn a_handshake_that_is_over_is_not_begun_again() {
        let (mut server, _, _) = shaken();
        let refused = server.read_handshake(b"\x01\x00\x00\x00").unwrap_err();
        assert_eq!(refused.code, TransportErrorCode::PROTOCOL_VIOLATION);
        assert!(server.write_handshake(&mut Vec::new()).is_none());
        assert!(matches!(server.transport_parameters(), Ok(None)));
    }

    #[test]
    fn only_version_1_is_spoken() {
        let credentials = Credentials::new(server_tls(&new_ca()).hub).unwrap();
        let destination = ConnectionId::new(&[7; 8]);
        assert!(credentials.initial_keys(VERSION_1, &destination).is_ok());
        assert!(credentials.initial_keys(0xff00_001d, &destination).is_err());
    }
}
