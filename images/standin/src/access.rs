//! The way from a join token to a server one may trust: fetch the CA bundle, hold it against the
//! token's hash, then speak to that CA's server only. Source: k3s `pkg/clientaccess/token.go`.

use std::time::Duration;

use hyper::body::Bytes;

use crate::logfmt;
use crate::net::{Answer, Client, Endpoint, NetError};
use crate::tls::{self, TlsError};
use crate::token::{Token, TokenError};

/// k3s's client time-out.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Why a server is not to be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AccessError {
    #[error("only https:// URLs are supported, invalid scheme: {0}")]
    Scheme(String),
    #[error("failed to get CA certs: {0}")]
    CaCerts(GetError),
    #[error("CA cert validation failed: {0}")]
    CaValidation(GetError),
    #[error(transparent)]
    Get(#[from] GetError),
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Net(#[from] NetError),
}

/// A GET that failed, as Go prints it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GetError {
    #[error("Get \"{url}\": {source}")]
    Net { url: String, source: NetError },
    #[error("{url}: {status}{detail}")]
    Status { url: String, status: String, detail: String },
}

/// A server that proved to be of the token's cluster.
pub(crate) struct Access {
    pub(crate) endpoint: Endpoint,
    pub(crate) ca_pem: Vec<u8>,
    /// Authenticates with the token.
    pub(crate) client: Client,
}

/// One GET; anything but 2xx is an error.
pub(crate) async fn get(client: &Client, path: &str) -> Result<Bytes, GetError> {
    let url = format!("https://{}{path}", client.endpoint);
    let Answer { status, body } =
        client.get(path, TIMEOUT).await.map_err(|source| GetError::Net { url: url.clone(), source })?;
    if status.is_success() {
        return Ok(body);
    }
    let text = String::from_utf8_lossy(&body);
    let text = text.trim();
    let detail =
        if text.is_empty() { String::new() } else { format!(": {}", text.chars().take(300).collect::<String>()) };
    Err(GetError::Status { url, status: status.to_string(), detail })
}

/// Fetches and checks the CA of `server_url`, then prepares a client for it.
pub(crate) async fn open(server_url: &str, token: &Token) -> Result<Access, AccessError> {
    if !server_url.starts_with("https://") {
        return Err(AccessError::Scheme(server_url.to_owned()));
    }
    let endpoint = Endpoint::parse(server_url, 6443)?;
    let insecure = Client::new(endpoint.clone(), tls::insecure_client()?);
    let ca_pem = get(&insecure, "/cacerts").await.map_err(AccessError::CaCerts)?.to_vec();
    let trusting = Client::new(endpoint.clone(), tls::client(&ca_pem, None)?);
    get(&trusting, "/cacerts").await.map_err(AccessError::CaValidation)?;
    if token.ca_hash.is_none() {
        logfmt::warn(
            "Cluster CA certificate is not trusted by the host CA bundle, but the token does not include a CA hash. \
             Use the full token from the server's node-token file to enable Cluster CA validation.",
        );
    }
    token.check_ca(&ca_pem)?;
    let client = trusting.basic_auth(&token.user, &token.password)?;
    Ok(Access { endpoint, ca_pem, client })
}
