//! Certificate authorities and certificates: P-256, names as k3s 1.21 writes them, issued through
//! rcgen. A leaf file holds the leaf and its CA, as k3s's do.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, date_time_ymd,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;

use crate::layout::{self, FileError};
use crate::{der, logfmt};

const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
const CLOCK_SKEW: Duration = Duration::from_secs(300);

/// A certificate that cannot be made or read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PkiError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{what}: {source}")]
    Rcgen { what: String, source: rcgen::Error },
    #[error("{}: not a certificate", .0.display())]
    NotACertificate(PathBuf),
}

fn rcgen_error(what: &str) -> impl FnOnce(rcgen::Error) -> PkiError + '_ {
    move |source| PkiError::Rcgen { what: what.to_owned(), source }
}

/// A certificate authority on disk, ready to sign.
pub(crate) struct Ca {
    pub(crate) name: String,
    pub(crate) pem: String,
    issuer: Issuer<'static, KeyPair>,
    /// Made (or replaced) in this start: what it signed before is void.
    pub(crate) fresh: bool,
}

/// What a leaf certificate says.
pub(crate) struct Leaf<'a> {
    pub(crate) cn: &'a str,
    pub(crate) org: Option<&'a str>,
    pub(crate) sans: &'a [String],
    pub(crate) server: bool,
    pub(crate) client: bool,
}

/// Sets the validity from now on and returns the text k3s logs of it.
fn set_validity(params: &mut CertificateParams, years: u32) -> String {
    let now = Timestamp::now();
    let day = TimeZone::UTC.to_datetime(now);
    let midnight = date_time_ymd(i32::from(day.year()), day.month().unsigned_abs(), day.day().unsigned_abs());
    let since_midnight = u64::try_from(now.as_second().rem_euclid(24 * 3600)).unwrap_or_default();
    // Nodes whose clocks differ a little must accept each other's certificates.
    params.not_before = midnight + Duration::from_secs(since_midnight) - CLOCK_SKEW;
    params.not_after = params.not_before + YEAR * years;
    format!(
        "notBefore={} notAfter={}",
        go_time(params.not_before.unix_timestamp()),
        go_time(params.not_after.unix_timestamp())
    )
}

fn go_time(second: i64) -> String {
    Timestamp::from_second(second)
        .map(|t| TimeZone::UTC.to_datetime(t).strftime("%Y-%m-%d %H:%M:%S +0000 UTC").to_string())
        .unwrap_or_default()
}

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages =
        vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment, KeyUsagePurpose::KeyCertSign];
    params
}

impl Ca {
    /// Loads the authority from `crt` and `key`, or makes one named `prefix@UNIXTIME`.
    pub(crate) fn load_or_create(crt: &Path, key: &Path, prefix: &str) -> Result<Self, PkiError> {
        if let (Some(pem), Some(key_pem)) = (layout::read_if_there(crt)?, layout::read_if_there(key)?) {
            let key = KeyPair::from_pem(&key_pem).map_err(rcgen_error("CA key"))?;
            let certificate = CertificateDer::from_pem_slice(pem.as_bytes())
                .map_err(|_| PkiError::NotACertificate(crt.to_owned()))?;
            let name = der::subject(&certificate).ok_or_else(|| PkiError::NotACertificate(crt.to_owned()))?.cn;
            return Ok(Self { issuer: Issuer::new(ca_params(&name), key), name, pem, fresh: false });
        }
        let name = format!("{prefix}@{}", Timestamp::now().as_second());
        let pair = KeyPair::generate().map_err(rcgen_error("CA key"))?;
        let mut params = ca_params(&name);
        set_validity(&mut params, 10);
        let pem = params.self_signed(&pair).map_err(rcgen_error("CA certificate"))?.pem();
        layout::write(key, 0o600, pair.serialize_pem().as_bytes())?;
        layout::write(crt, 0o644, pem.as_bytes())?;
        Ok(Self { issuer: Issuer::new(params, pair), name, pem, fresh: true })
    }

    /// Signs a leaf for `key`; the PEM holds the leaf and this authority.
    pub(crate) fn sign(&self, leaf: &Leaf<'_>, key: &KeyPair) -> Result<String, PkiError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        if let Some(org) = leaf.org {
            params.distinguished_name.push(DnType::OrganizationName, org);
        }
        params.distinguished_name.push(DnType::CommonName, leaf.cn);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.use_authority_key_identifier_extension = true;
        if leaf.server {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        if leaf.client {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth);
        }
        for san in leaf.sans {
            params.subject_alt_names.push(match san.parse::<IpAddr>() {
                Ok(ip) => SanType::IpAddress(ip),
                Err(_) => SanType::DnsName(san.as_str().try_into().map_err(rcgen_error("subject alternative name"))?),
            });
        }
        let times = set_validity(&mut params, 1);
        let certificate = params.signed_by(key, &self.issuer).map_err(rcgen_error(leaf.cn))?;
        let org = leaf.org.map(|o| format!(",O={o}")).unwrap_or_default();
        logfmt::info(format!("certificate CN={}{org} signed by CN={}: {times}", leaf.cn, self.name));
        Ok(certificate.pem() + &self.pem)
    }

    /// Keeps the leaf on disk if this authority (still) stands behind it, else issues it.
    pub(crate) fn ensure(&self, crt: &Path, key: &Path, leaf: &Leaf<'_>) -> Result<(), PkiError> {
        if !self.fresh && crt.exists() && key.exists() {
            return Ok(());
        }
        self.issue(crt, key, leaf)
    }

    /// Issues the leaf with a key of its own (an existing key is kept).
    pub(crate) fn issue(&self, crt: &Path, key: &Path, leaf: &Leaf<'_>) -> Result<(), PkiError> {
        let pair = load_or_create_key(key)?;
        Ok(layout::write(crt, 0o644, self.sign(leaf, &pair)?.as_bytes())?)
    }
}

/// A private key on disk, made if missing.
pub(crate) fn load_or_create_key(path: &Path) -> Result<KeyPair, PkiError> {
    if let Some(pem) = layout::read_if_there(path)? {
        return KeyPair::from_pem(&pem).map_err(rcgen_error("private key"));
    }
    let pair = KeyPair::generate().map_err(rcgen_error("private key"))?;
    layout::write(path, 0o600, pair.serialize_pem().as_bytes())?;
    Ok(pair)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ca_is_made_once_and_signs_after_a_reload() {
        let dir = tempfile::tempdir().unwrap();
        let (crt, key) = (dir.path().join("ca.crt"), dir.path().join("ca.key"));
        let first = Ca::load_or_create(&crt, &key, "k3s-server-ca").unwrap();
        assert!(first.fresh);
        assert!(first.pem.starts_with("-----BEGIN CERTIFICATE-----\n"));
        let again = Ca::load_or_create(&crt, &key, "k3s-server-ca").unwrap();
        assert!(!again.fresh);
        assert_eq!(again.name, first.name);
        let sans = ["127.0.0.1".to_owned(), "localhost".to_owned()];
        let leaf = Leaf { cn: "kube-apiserver", org: None, sans: &sans, server: true, client: false };
        let (leaf_crt, leaf_key) = (dir.path().join("l.crt"), dir.path().join("l.key"));
        again.ensure(&leaf_crt, &leaf_key, &leaf).unwrap();
        let pem = std::fs::read_to_string(&leaf_crt).unwrap();
        assert_eq!(pem.matches("BEGIN CERTIFICATE").count(), 2);
        again.ensure(&leaf_crt, &leaf_key, &leaf).unwrap();
        assert_eq!(std::fs::read_to_string(&leaf_crt).unwrap(), pem);
    }
}
