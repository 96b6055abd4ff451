//! The node's own CA: what will prove the local API to this device's Pods.
//!
//! Owns `node-ca.key` (0600) and `node-ca.crt` in the data directory. The key never leaves the
//! device and is never logged. Pods come to trust it because the certificate is appended to each
//! `kube-root-ca.crt` that they mount, unless `nodeCa: false` says otherwise.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose};

/// Why there is no node CA.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    #[error("cannot {what} {path}")]
    Io {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{path} holds no usable key: move it away, and restart every Pod that trusts it")]
    Key { path: PathBuf, source: rcgen::Error },
    #[error("cannot make the node's CA")]
    Make(#[source] rcgen::Error),
}

/// The PEM of the node's CA certificate; made on first use.
///
/// The certificate is made again from the same key where it is missing, so that a crash between
/// the two files costs nothing.
pub fn ensure(data_dir: &Path, node_name: &str) -> Result<String, CaError> {
    let (key_path, cert_path) = (data_dir.join("node-ca.key"), data_dir.join("node-ca.crt"));
    let key = match fs::read_to_string(&key_path) {
        Ok(pem) => KeyPair::from_pem(&pem).map_err(|source| CaError::Key {
            path: key_path,
            source,
        })?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let key = KeyPair::generate().map_err(CaError::Make)?;
            put(&key_path, key.serialize_pem().as_bytes(), 0o600)?;
            key
        }
        Err(source) => {
            return Err(CaError::Io {
                what: "read",
                path: key_path,
                source,
            });
        }
    };
    if let Ok(pem) = fs::read_to_string(&cert_path)
        && pem.starts_with("-----BEGIN CERTIFICATE-----")
    {
        return Ok(pem);
    }
    let pem = certificate(&key, node_name).map_err(CaError::Make)?;
    put(&cert_path, pem.as_bytes(), 0o644)?;
    Ok(pem)
}

/// Valid at any time that a device without a clock may believe it is.
fn certificate(key: &KeyPair, node_name: &str) -> Result<String, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.not_before = rcgen::date_time_ymd(1970, 1, 1);
    params.not_after = rcgen::date_time_ymd(2099, 12, 31);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    params
        .distinguished_name
        .push(DnType::CommonName, format!("edge node {node_name}"));
    Ok(params.self_signed(key)?.pem())
}

/// Writes a file so that it is whole or not there, and survives a power cut.
fn put(path: &Path, content: &[u8], mode: u32) -> Result<(), CaError> {
    let new = path.with_extension("new");
    let write = || {
        match fs::remove_file(&new) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&new)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        fs::File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
    };
    write().map_err(|source| CaError::Io {
        what: "write",
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn the_key_is_private_and_the_certificate_stays() {
        let dir = tempfile::tempdir().unwrap();
        let first = ensure(dir.path(), "edge-1").unwrap();
        assert!(first.starts_with("-----BEGIN CERTIFICATE-----"));
        let mode = fs::metadata(dir.path().join("node-ca.key")).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(ensure(dir.path(), "edge-1").unwrap(), first);
    }

    #[test]
    fn a_lost_certificate_is_made_from_the_same_key_and_a_broken_key_is_told() {
        let dir = tempfile::tempdir().unwrap();
        ensure(dir.path(), "edge-1").unwrap();
        let key = fs::read(dir.path().join("node-ca.key")).unwrap();
        fs::remove_file(dir.path().join("node-ca.crt")).unwrap();
        ensure(dir.path(), "edge-1").unwrap();
        assert_eq!(fs::read(dir.path().join("node-ca.key")).unwrap(), key);
        fs::write(dir.path().join("node-ca.key"), "rubbish").unwrap();
        assert!(matches!(
            ensure(dir.path(), "edge-1"),
            Err(CaError::Key { .. })
        ));
    }
}
