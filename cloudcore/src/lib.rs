//! CloudCore: runs beside the Kubernetes API and serves the edge nodes. `app` wires everything;
//! `main` is the command line.

pub mod admin;
pub mod app;
pub mod cli;
pub mod config;
pub mod downstream;
pub mod enroll;
pub mod hub;
pub mod kube;
pub mod nodes;
pub mod stream;
pub mod upstream;
pub mod views;

pub use common::telemetry::chain;

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The bytes that hexadecimal digits stand for; `None` for anything else.
pub(crate) fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    let digit = |b: u8| char::from(b).to_digit(16);
    digits
        .chunks_exact(2)
        .map(|pair| u8::try_from(digit(pair[0])? * 16 + digit(pair[1])?).ok())
        .collect()
}

/// The letters and digits that identities are made of: lower case, none that look alike.
pub(crate) const BASE32: [char; 32] = [
    'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', 'j', 'k', 'm', 'n', 'p', 'q', 'r', 's', 't', 'u', 'v',
    'w', 'x', 'y', 'z', '2', '3', '4', '5', '6', '7', '8', '9', '0',
];
