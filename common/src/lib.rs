//! The vocabulary that CloudCore and EdgeCore share. Everything is pure unless its file is named
//! after an adapter (`quic`, `ws`, `tls`, `config`, `telemetry`, `signals`).

pub mod hub;
pub mod ids;
pub mod object;
pub mod pki;
