//! How few bytes an object can cross in: the difference to what the receiver holds, else zstd with
//! a dictionary that both ends were built with, else the bytes themselves. Pure.

use crate::hub::proto::Encoding;

/// No object is larger: etcd refuses requests above 1.5 MiB, JSON of a Secret's base64 included.
pub const MAX_OBJECT: usize = 4 << 20;

/// Text that Kubernetes objects have in common. Changing a byte of it is a new version of the
/// dictionary and a new [`Encoding`].
const DICTIONARY_1: &[u8] = include_bytes!("dictionary-1.txt");

/// High enough for deltas of a few hundred bytes to come out small; objects are a few KiB, so the
/// time is microseconds.
const LEVEL: i32 = 9;

/// Why a payload could not be turned back into an object.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("says it is {size} bytes long; at most {MAX_OBJECT} are taken")]
    TooLarge { size: usize },
    #[error("is encoded as {0}, which this version does not know")]
    UnknownEncoding(i32),
    #[error("is a difference to content that is not held here")]
    NoBase,
    #[error("does not decompress")]
    Corrupt(#[source] std::io::Error),
    #[error("says it is {said} bytes long and is {is}")]
    WrongSize { said: usize, is: usize },
}

/// The smallest encoding of `bytes` for a receiver that holds `base`.
pub fn encode(base: Option<&[u8]>, bytes: &[u8]) -> (Encoding, Vec<u8>) {
    let compressed = match base {
        Some(base) => squeeze(base, bytes).map(|p| (Encoding::ZstdDelta, p)),
        None => squeeze(DICTIONARY_1, bytes).map(|p| (Encoding::ZstdDictionary1, p)),
    };
    match compressed {
        Some((encoding, payload)) if payload.len() < bytes.len() => (encoding, payload),
        Some(_) | None => (Encoding::Raw, bytes.to_vec()),
    }
}

/// Gives back what [`encode`] was given. `size` bounds what is allocated.
pub fn decode(
    encoding: i32,
    payload: &[u8],
    size: usize,
    base: Option<&[u8]>,
) -> Result<Vec<u8>, DecodeError> {
    if size > MAX_OBJECT {
        return Err(DecodeError::TooLarge { size });
    }
    let known = Encoding::try_from(encoding).map_err(|_| DecodeError::UnknownEncoding(encoding))?;
    let bytes = match known {
        Encoding::Raw => payload.to_vec(),
        Encoding::Zstd => unsqueeze(&[], payload, size)?,
        Encoding::ZstdDictionary1 => unsqueeze(DICTIONARY_1, payload, size)?,
        Encoding::ZstdDelta => unsqueeze(base.ok_or(DecodeError::NoBase)?, payload, size)?,
    };
    if bytes.len() == size {
        Ok(bytes)
    } else {
        Err(DecodeError::WrongSize {
            said: size,
            is: bytes.len(),
        })
    }
}

/// `None` when zstd cannot (out of memory): the bytes then go as they are.
fn squeeze(prefix: &[u8], bytes: &[u8]) -> Option<Vec<u8>> {
    use zstd::zstd_safe::CParameter;
    let mut z = zstd::bulk::Compressor::with_dictionary(LEVEL, prefix).ok()?;
    // Size, checksum and dictionary id would be said twice: the message carries size and hash.
    z.set_parameter(CParameter::ContentSizeFlag(false)).ok()?;
    z.set_parameter(CParameter::ChecksumFlag(false)).ok()?;
    z.set_parameter(CParameter::DictIdFlag(false)).ok()?;
    // A window that reaches back over the whole prefix.
    let reach = (prefix.len() + bytes.len()).max(1024).next_power_of_two();
    z.set_parameter(CParameter::WindowLog(reach.trailing_zeros()))
        .ok()?;
    z.compress(bytes).ok()
}

fn unsqueeze(prefix: &[u8], payload: &[u8], size: usize) -> Result<Vec<u8>, DecodeError> {
    let mut z = zstd::bulk::Decompressor::with_dictionary(prefix).map_err(DecodeError::Corrupt)?;
    z.decompress(payload, size).map_err(DecodeError::Corrupt)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config_map(value: &str) -> Vec<u8> {
        let filler: String = (0..90)
            .map(|i| format!("\"key-{i}\":\"value {}\",", i * 7919))
            .collect();
        format!("{{\"data\":{{{filler}\"edited\":\"{value}\"}}}}").into_bytes()
    }

    fn there_and_back(base: Option<&[u8]>, bytes: &[u8]) -> (Encoding, usize) {
        let (encoding, payload) = encode(base, bytes);
        let back = decode(encoding as i32, &payload, bytes.len(), base).unwrap();
        assert_eq!(back, bytes);
        (encoding, payload.len())
    }

    #[test]
    fn one_key_of_a_two_kilobyte_config_map_costs_a_few_bytes() {
        let (old, new) = (config_map("old"), config_map("new and longer"));
        assert!(old.len() > 1500);
        let (encoding, size) = there_and_back(Some(&old), &new);
        assert_eq!(encoding, Encoding::ZstdDelta);
        assert!(size < 64, "{size}");
    }

    #[test]
    fn a_delta_reaches_back_over_a_large_base() {
        // Noise does not compress by itself, so only the base can make this small.
        let mut state = 1u32;
        let mut noise = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        let old: Vec<u8> = (0..700_000).map(|_| noise()).collect();
        let mut new = old.clone();
        new[350_000] ^= 1;
        let (_, size) = there_and_back(Some(&old), &new);
        assert!(size < 2_000, "{size}");
    }

    #[test]
    fn every_length_comes_back() {
        for n in [0, 1, 2, 100, 5000] {
            there_and_back(None, &vec![b'x'; n]);
            there_and_back(Some(b"base"), &vec![b'x'; n]);
            there_and_back(Some(b""), &vec![b'x'; n]);
        }
    }

    #[test]
    fn what_is_wrong_is_refused_before_memory_is_spent() {
        let (encoding, payload) = encode(None, &[b'x'; 4096]);
        let e = encoding as i32;
        assert!(matches!(
            decode(e, &payload, MAX_OBJECT + 1, None),
            Err(DecodeError::TooLarge { .. })
        ));
        assert!(matches!(
            decode(e, &payload, 100, None),
            Err(DecodeError::Corrupt(_))
        ));
        assert!(matches!(
            decode(99, &payload, 100, None),
            Err(DecodeError::UnknownEncoding(99))
        ));
        assert!(matches!(
            decode(3, &payload, 100, None),
            Err(DecodeError::NoBase)
        ));
        assert!(matches!(
            decode(0, b"abc", 4, None),
            Err(DecodeError::WrongSize { said: 4, is: 3 })
        ));
    }
}
