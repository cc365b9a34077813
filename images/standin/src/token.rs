//! Join tokens: `K10<sha256 of the CA file>::<user>:<password>`, or a bare password.
//! Source: k3s `pkg/clientaccess/token.go`; the hash of a single certificate is that of the PEM
//! file's literal bytes.

use std::fmt::Write as _;

use ring::digest::{SHA256, digest};
use ring::rand::{SecureRandom, SystemRandom};

const PREFIX: &str = "K10";
const HASH_HEX_LEN: usize = 64;

/// A token that cannot be used. The wording is k3s's.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum TokenError {
    #[error("token must not be empty")]
    Empty,
    #[error("invalid token CA hash length")]
    HashLength,
    #[error("invalid token format")]
    Format,
    #[error("token CA hash does not match the Cluster CA certificate hash: {token} != {cluster}")]
    HashMismatch { token: String, cluster: String },
    #[error("failed to read random bytes")]
    Random,
}

/// The parts of a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) ca_hash: Option<String>,
    pub(crate) user: String,
    pub(crate) password: String,
}

impl Token {
    /// Takes a token apart; `default_user` stands for the user of a bare password.
    pub(crate) fn parse(text: &str, default_user: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        if text.is_empty() {
            return Err(TokenError::Empty);
        }
        let Some(rest) = text.strip_prefix(PREFIX) else {
            return Ok(Self { ca_hash: None, user: default_user.to_owned(), password: text.to_owned() });
        };
        let (ca_hash, credentials) = match rest.split_once("::") {
            Some((hash, credentials)) => {
                if !hash.is_empty() && hash.len() != HASH_HEX_LEN {
                    return Err(TokenError::HashLength);
                }
                ((!hash.is_empty()).then(|| hash.to_owned()), credentials)
            }
            None => (None, rest),
        };
        match credentials.split_once(':') {
            Some((user, password)) if !password.is_empty() => Ok(Self {
                ca_hash,
                user: if user.is_empty() { default_user } else { user }.to_owned(),
                password: password.to_owned(),
            }),
            _ => Err(TokenError::Format),
        }
    }

    /// Compares the token's CA hash, where it has one, with the CA file a server handed out.
    pub(crate) fn check_ca(&self, ca_pem: &[u8]) -> Result<(), TokenError> {
        let cluster = ca_hash(ca_pem);
        match &self.ca_hash {
            Some(token) if *token != cluster => Err(TokenError::HashMismatch { token: token.clone(), cluster }),
            _ => Ok(()),
        }
    }
}

/// Hex SHA-256 of the CA file's bytes.
pub(crate) fn ca_hash(ca_pem: &[u8]) -> String {
    hex(digest(&SHA256, ca_pem).as_ref())
}

/// The full token of a server.
pub(crate) fn format(ca_pem: &[u8], user: &str, password: &str) -> String {
    format!("{PREFIX}{}::{user}:{password}", ca_hash(ca_pem))
}

/// Lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, b| {
        let _ = write!(out, "{b:02x}");
        out
    })
}

/// `bytes` random bytes from the kernel, as hex.
pub(crate) fn random_hex(bytes: usize) -> Result<String, TokenError> {
    let mut buffer = vec![0_u8; bytes];
    SystemRandom::new().fill(&mut buffer).map_err(|_| TokenError::Random)?;
    Ok(hex(&buffer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_token_comes_apart_and_together() {
        let text = format(b"pem", "server", "53c9e67a622ef81491bd70196aafc222");
        assert_eq!(text.len(), 108);
        let token = Token::parse(&format!("{text}\n"), "node").unwrap();
        assert_eq!(token.user, "server");
        assert_eq!(token.password, "53c9e67a622ef81491bd70196aafc222");
        token.check_ca(b"pem").unwrap();
        let error = token.check_ca(b"other").unwrap_err().to_string();
        assert!(error.starts_with("token CA hash does not match the Cluster CA certificate hash: "), "{error}");
        assert!(error.ends_with(&ca_hash(b"other")));
    }

    #[test]
    fn a_bare_password_has_no_hash() {
        let token = Token::parse("secret", "server").unwrap();
        assert_eq!((token.user.as_str(), token.ca_hash), ("server", None));
    }

    #[test]
    fn broken_tokens_are_refused_in_k3s_words() {
        assert_eq!(Token::parse("", "server"), Err(TokenError::Empty));
        assert_eq!(Token::parse("K10abc::server:x", "server"), Err(TokenError::HashLength));
        assert_eq!(Token::parse("K10::x", "server"), Err(TokenError::Format));
    }
}
