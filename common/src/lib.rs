//! The vocabulary that CloudCore and EdgeCore share. Everything is pure unless its file is named
//! after an adapter (`quic`, `ws`, `tls`, `lanes`, `dial`, `listen`, `ahead`, `config`, `signals`, `tasks`,
//! `telemetry`).

pub mod ahead;
pub mod backoff;
pub mod config;
pub mod hub;
pub mod ids;
pub mod object;
pub mod pki;
pub mod signals;
pub mod stream;
pub mod tasks;
pub mod telemetry;
pub mod trim;
