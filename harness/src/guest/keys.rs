//! Key pairs: one per guest as its host key, one per lab as the harness's identity.

use russh::keys::ssh_key::LineEnding;
use russh::keys::{Algorithm, HashAlg, PrivateKey, PublicKey};

use super::error::GuestError;

/// An ed25519 key pair in OpenSSH's file formats.
#[derive(Clone)]
pub struct KeyPair {
    /// `-----BEGIN OPENSSH PRIVATE KEY-----` …, unencrypted, with a final newline.
    pub private_openssh: String,
    /// `ssh-ed25519 AAAA… comment`, without a newline.
    pub public_openssh: String,
}

/// Names the public half only: a key pair in a log must not be a leak.
impl std::fmt::Debug for KeyPair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeyPair").field("public_openssh", &self.public_openssh).finish_non_exhaustive()
    }
}

impl KeyPair {
    /// The private half, ready for a [`super::SshTarget`].
    pub fn private(&self) -> Result<PrivateKey, GuestError> {
        parse_private(&self.private_openssh)
    }

    /// The public half, ready to be pinned in a [`super::SshTarget`].
    pub fn public(&self) -> Result<PublicKey, GuestError> {
        parse_public(&self.public_openssh)
    }
}

/// A host key's fingerprint as messages show it: `SHA256:…`.
#[must_use]
pub fn fingerprint(key: &PublicKey) -> String {
    key.fingerprint(HashAlg::Sha256).to_string()
}

/// Makes a new ed25519 key pair from the operating system's randomness.
pub fn generate_ed25519(comment: &str) -> Result<KeyPair, GuestError> {
    let failed = |e: russh::keys::ssh_key::Error| GuestError::Key(e.to_string());
    let mut key = PrivateKey::random(&mut russh::keys::key::safe_rng(), Algorithm::Ed25519).map_err(failed)?;
    key.set_comment(comment);
    Ok(KeyPair {
        private_openssh: key.to_openssh(LineEnding::LF).map_err(failed)?.to_string(),
        public_openssh: key.public_key().to_openssh().map_err(failed)?,
    })
}

/// Reads a private key in OpenSSH's format.
pub fn parse_private(openssh: &str) -> Result<PrivateKey, GuestError> {
    PrivateKey::from_openssh(openssh).map_err(|e| GuestError::Key(format!("private key: {e}")))
}

/// Reads a public key in the one-line format of `authorized_keys`.
pub fn parse_public(openssh: &str) -> Result<PublicKey, GuestError> {
    PublicKey::from_openssh(openssh).map_err(|e| GuestError::Key(format!("public key: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_survives_its_text_form_and_is_never_the_same_twice() {
        let a = generate_ed25519("server-1 host key").unwrap();
        let b = generate_ed25519("server-1 host key").unwrap();
        assert_ne!(a.public_openssh, b.public_openssh);
        assert!(a.public_openssh.starts_with("ssh-ed25519 "));
        assert!(a.public_openssh.ends_with(" server-1 host key"));
        assert!(a.private_openssh.ends_with("-----END OPENSSH PRIVATE KEY-----\n"));
        assert_eq!(a.private().unwrap().public_key().key_data(), a.public().unwrap().key_data());
    }

    #[test]
    fn debug_output_keeps_the_private_half_to_itself() {
        let pair = generate_ed25519("x").unwrap();
        let shown = format!("{pair:?}");
        assert!(shown.contains("ssh-ed25519"), "{shown}");
        assert!(!shown.contains("PRIVATE"), "{shown}");
    }

    #[test]
    fn a_broken_key_is_an_error() {
        assert!(matches!(parse_public("ssh-ed25519 AAAA"), Err(GuestError::Key(_))));
        assert!(matches!(parse_private("hello"), Err(GuestError::Key(_))));
    }
}
