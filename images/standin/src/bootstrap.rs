//! Bootstrap data: the authorities and secrets all servers share. As JSON (name → base64) over
//! `/v1-k3s/server-bootstrap`, and in etcd below `/bootstrap/`, encrypted with the token.
//! Source: k3s `pkg/cluster/{encrypt,storage}.go`: key name = first 12 hex digits of
//! SHA-256(token password); PBKDF2-HMAC-SHA1, 4096 rounds, 32 bytes; AES-256-GCM; `salt:base64(nonce ‖ box)`.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::digest::{SHA256, digest};
use ring::pbkdf2;
use ring::rand::{SecureRandom as _, SystemRandom};

use crate::etcd::client::{EtcdClient, EtcdError, Expect};
use crate::layout::{self, FileError, Layout};
use crate::token::{TokenError, hex, random_hex};

const PREFIX: &str = "/bootstrap";
const ROUNDS: NonZeroU32 = NonZeroU32::MIN.saturating_add(4095);
const CALL_TIMEOUT: Duration = Duration::from_secs(20);

/// What goes wrong with bootstrap data.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootstrapError {
    #[error(transparent)]
    Etcd(#[from] EtcdError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Token(#[from] TokenError),
    /// k3s panics with this.
    #[error("bootstrap data already found and encrypted with different token")]
    DifferentToken,
    #[error("cipher: message authentication failed")]
    Cipher,
    #[error("bootstrap data: {0}")]
    Format(String),
}

/// The files of the bootstrap data under their names in k3s's `ControlRuntimeBootstrap`.
fn files(layout: &Layout) -> Vec<(&'static str, PathBuf)> {
    vec![
        ("ServerCA", layout.tls("server-ca.crt")),
        ("ServerCAKey", layout.tls("server-ca.key")),
        ("ClientCA", layout.tls("client-ca.crt")),
        ("ClientCAKey", layout.tls("client-ca.key")),
        ("RequestHeaderCA", layout.tls("request-header-ca.crt")),
        ("RequestHeaderCAKey", layout.tls("request-header-ca.key")),
        ("ETCDServerCA", layout.tls("etcd/server-ca.crt")),
        ("ETCDServerCAKey", layout.tls("etcd/server-ca.key")),
        ("ETCDPeerCA", layout.tls("etcd/peer-ca.crt")),
        ("ETCDPeerCAKey", layout.tls("etcd/peer-ca.key")),
        ("ServiceKey", layout.tls("service.key")),
        ("PasswdFile", layout.cred("passwd")),
        ("IPSECKey", layout.cred("ipsec.psk")),
    ]
}

/// The bootstrap data of this server, as JSON.
pub(crate) fn read(layout: &Layout) -> Result<Vec<u8>, BootstrapError> {
    let mut data = BTreeMap::new();
    for (name, path) in files(layout) {
        data.insert(name, STANDARD.encode(layout::read(&path)?));
    }
    serde_json::to_vec(&data).map_err(|e| BootstrapError::Format(e.to_string()))
}

/// Writes another server's bootstrap data to disk. Returns whether an authority was replaced: what
/// the former one signed is void then.
pub(crate) fn write(layout: &Layout, json: &[u8]) -> Result<bool, BootstrapError> {
    let format = |e: &dyn std::fmt::Display| BootstrapError::Format(e.to_string());
    let data: BTreeMap<String, String> = serde_json::from_slice(json).map_err(|e| format(&e))?;
    let mut replaced = false;
    for (name, path) in files(layout) {
        let content = data.get(name).ok_or_else(|| format(&format!("{name} is missing")))?;
        let content = STANDARD.decode(content).map_err(|e| format(&e))?;
        let before = layout::read_if_there(&path)?;
        if before.as_ref().is_none_or(|b| b.as_bytes() != content) {
            replaced |= path.extension().is_some_and(|e| e == "crt");
            let mode = if path.extension().is_some_and(|e| e == "crt") { 0o644 } else { 0o600 };
            layout::write(&path, mode, &content)?;
        }
    }
    Ok(replaced)
}

fn storage_key(password: &str) -> String {
    format!("{PREFIX}/{}", &hex(digest(&SHA256, password.as_bytes()).as_ref())[..12])
}

fn cipher(password: &str, salt: &str) -> Result<LessSafeKey, BootstrapError> {
    let mut key = [0_u8; 32];
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA1, ROUNDS, salt.as_bytes(), password.as_bytes(), &mut key);
    UnboundKey::new(&AES_256_GCM, &key).map(LessSafeKey::new).map_err(|_| BootstrapError::Cipher)
}

fn encrypt(password: &str, plain: &[u8]) -> Result<Vec<u8>, BootstrapError> {
    let salt = random_hex(8)?;
    let mut nonce = [0_u8; NONCE_LEN];
    SystemRandom::new().fill(&mut nonce).map_err(|_| TokenError::Random)?;
    let mut sealed = plain.to_vec();
    cipher(password, &salt)?
        .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::empty(), &mut sealed)
        .map_err(|_| BootstrapError::Cipher)?;
    let mut boxed = nonce.to_vec();
    boxed.append(&mut sealed);
    Ok(format!("{salt}:{}", STANDARD.encode(boxed)).into_bytes())
}

fn decrypt(password: &str, text: &[u8]) -> Result<Vec<u8>, BootstrapError> {
    let text = std::str::from_utf8(text).map_err(|_| BootstrapError::Cipher)?;
    let (salt, boxed) = text
        .split_once(':')
        .ok_or_else(|| BootstrapError::Format("invalid cipher text, not : delimited".to_owned()))?;
    let mut boxed = STANDARD.decode(boxed).map_err(|_| BootstrapError::Cipher)?;
    if boxed.len() < NONCE_LEN {
        return Err(BootstrapError::Cipher);
    }
    let mut sealed = boxed.split_off(NONCE_LEN);
    let nonce = Nonce::try_assume_unique_for_key(&boxed).map_err(|_| BootstrapError::Cipher)?;
    let plain =
        cipher(password, salt)?.open_in_place(nonce, Aad::empty(), &mut sealed).map_err(|_| BootstrapError::Cipher)?;
    Ok(plain.to_vec())
}

/// Stores the bootstrap data under the token, or checks that what is stored is under the same
/// token and holds the same authorities.
pub(crate) async fn save(etcd: &EtcdClient, layout: &Layout, password: &str) -> Result<(), BootstrapError> {
    let key = storage_key(password);
    // Bounded: the second round only follows a lost race with another server.
    for _ in 0..2 {
        let (stored, _) = etcd.list(PREFIX, CALL_TIMEOUT).await?;
        if let Some(ours) = stored.iter().find(|kv| kv.key == key) {
            let plain = decrypt(password, &ours.value)?;
            let data: BTreeMap<String, String> =
                serde_json::from_slice(&plain).map_err(|e| BootstrapError::Format(e.to_string()))?;
            let ca = layout::read(&layout.tls("server-ca.crt"))?;
            if data.get("ServerCA").is_none_or(|stored| *stored != STANDARD.encode(&ca)) {
                return Err(BootstrapError::Format(
                    "the cluster CA on disk is not the one in the datastore".to_owned(),
                ));
            }
            return Ok(());
        }
        if !stored.is_empty() {
            return Err(BootstrapError::DifferentToken);
        }
        let sealed = encrypt(password, &read(layout)?)?;
        if etcd.put_if(&key, &sealed, Expect::Absent, CALL_TIMEOUT).await?.is_some() {
            return Ok(());
        }
    }
    Err(BootstrapError::Format("bootstrap key exists".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_token_seals_another_does_not_open() {
        let sealed = encrypt("secret", b"data").unwrap();
        assert_eq!(decrypt("secret", &sealed).unwrap(), b"data");
        assert!(matches!(decrypt("other", &sealed), Err(BootstrapError::Cipher)));
        assert!(decrypt("secret", b"nonsense").is_err());
    }

    #[test]
    fn the_storage_key_is_twelve_digits_of_the_tokens_hash() {
        // printf %s secret | sha256sum
        assert_eq!(storage_key("secret"), "/bootstrap/2bb80d537b1d");
        assert_eq!(ROUNDS.get(), 4096);
    }
}
