//! The dictionary that both ends were built with. Edges in the field may be years old, and one
//! changed byte makes every first send undecodable there: what is pinned here never changes.
//! Another text is another dictionary, with an encoding of its own.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::fmt::Write as _;

use common::hub::delta;
use common::hub::proto::Encoding;
use ring::digest::{SHA256, digest};

const DICTIONARY_1: &[u8] = include_bytes!("../src/hub/dictionary-1.txt");
const DICTIONARY_1_SHA256: &str =
    "14a5165860a575f913a3e21b3759547c76662521da41885b88cd7d439b78578a";

/// A Pod of a Deployment, as the API server gives it less what never goes down.
const POD: &str = include_str!("dictionary/pod.json");
/// What `delta::encode` once made of it. Written once, by the first version; another zstd may
/// make other bytes of the same Pod, but must read these.
const POD_1: &str = include_str!("dictionary/pod-1.hex");
/// The number by which edges in the field know it.
const ENCODING_1: i32 = 2;
/// Of 3,061 bytes; 401 when this was written. Without the dictionary zstd makes 1,339 of them.
const POD_AT_MOST: usize = 440;

fn pod() -> &'static [u8] {
    POD.trim_end().as_bytes()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    let byte = |two: &[u8]| u8::from_str_radix(std::str::from_utf8(two).unwrap(), 16).unwrap();
    digits.chunks(2).map(byte).collect()
}

#[test]
fn no_byte_of_the_dictionary_changes() {
    let is = hex(digest(&SHA256, DICTIONARY_1).as_ref());
    assert_eq!(is, DICTIONARY_1_SHA256, "make a dictionary-2.txt instead");
}

#[test]
fn what_the_first_version_sent_still_decodes() {
    let payload = unhex(POD_1);
    let back = delta::decode(ENCODING_1, &payload, pod().len(), None).unwrap();
    assert_eq!(String::from_utf8_lossy(&back), POD.trim_end());
}

#[test]
fn a_first_send_of_a_pod_uses_the_dictionary_and_is_small() {
    let (encoding, payload) = delta::encode(None, pod());
    assert_eq!(encoding, Encoding::ZstdDictionary1);
    assert_eq!(i32::from(encoding), ENCODING_1);
    assert!(payload.len() <= POD_AT_MOST, "{} bytes", payload.len());
}
