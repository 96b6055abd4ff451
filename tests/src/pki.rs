//! Certificates for one control plane: made in memory, written as PEM files, gone with the testbed.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

/// An authority that signs, with its files beside it.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// The certificate in PEM.
    pub pem: String,
    /// `<name>.crt`.
    pub cert: PathBuf,
    /// `<name>.key`.
    pub key: PathBuf,
    dir: PathBuf,
}

/// The two files of one certificate.
#[derive(Clone)]
pub struct Pair {
    pub cert: PathBuf,
    pub key: PathBuf,
}

impl Authority {
    /// Makes a self-signed authority and writes it to `dir`.
    pub fn build(dir: &Path, name: &str) -> Result<Authority> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::CrlSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        let key = KeyPair::generate()?;
        let pem = params.self_signed(&key)?.pem();
        let (cert_file, key_file) = write_pair(dir, name, &pem, &key.serialize_pem())?;
        Ok(Authority {
            issuer: Issuer::new(params, key),
            pem,
            cert: cert_file,
            key: key_file,
            dir: dir.to_owned(),
        })
    }

    /// A certificate for `subject` (common name, organizations) that serves at `hosts` and `ips`
    /// and may act as a client too.
    pub fn issue(
        &self,
        file: &str,
        (name, groups): (&str, &[&str]),
        hosts: &[&str],
        ips: &[IpAddr],
    ) -> Result<Pair> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        for group in groups {
            params
                .distinguished_name
                .push(DnType::OrganizationName, *group);
        }
        for host in hosts {
            params
                .subject_alt_names
                .push(SanType::DnsName((*host).try_into()?));
        }
        for ip in ips {
            params.subject_alt_names.push(SanType::IpAddress(*ip));
        }
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
        ];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let key = KeyPair::generate()?;
        let pem = params.signed_by(&key, &self.issuer)?.pem();
        let (cert, key) = write_pair(&self.dir, file, &pem, &key.serialize_pem())?;
        Ok(Pair { cert, key })
    }
}

/// Writes a bare key pair, for the signature of ServiceAccount tokens: `cert` is the public half.
pub fn signing_key(dir: &Path, name: &str) -> Result<Pair> {
    let pair = Pair {
        cert: dir.join(format!("{name}.pub")),
        key: dir.join(format!("{name}.key")),
    };
    let key = KeyPair::generate()?;
    fs::write(&pair.cert, key.public_key_pem())?;
    write_private(&pair.key, &key.serialize_pem())?;
    Ok(pair)
}

fn write_pair(dir: &Path, name: &str, cert: &str, key: &str) -> Result<(PathBuf, PathBuf)> {
    let (cert_file, key_file) = (
        dir.join(format!("{name}.crt")),
        dir.join(format!("{name}.key")),
    );
    fs::write(&cert_file, cert).with_context(|| format!("write {}", cert_file.display()))?;
    write_private(&key_file, key)?;
    Ok((cert_file, key_file))
}

fn write_private(path: &Path, text: &str) -> Result<()> {
    use std::io::Write;
    let mut options = fs::OpenOptions::new();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("write {}", path.display()))?;
    file.write_all(text.as_bytes())?;
    Ok(())
}
