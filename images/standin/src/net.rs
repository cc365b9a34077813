//! An HTTPS client (HTTP/1.1, connections kept and reused) whose errors read like Go's
//! `net/http`, because that is what k3s prints and what log readers look for.

use std::collections::VecDeque;
use std::error::Error as _;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::host;

const MAX_BODY_BYTES: usize = 16 << 20;
const MAX_IDLE: usize = 4;

/// Why a request failed, in Go's words.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetError {
    #[error("dial tcp {addr}: {cause}")]
    Dial { addr: SocketAddr, cause: String },
    #[error("dial tcp: lookup {0}: no such host")]
    Lookup(String),
    #[error("context deadline exceeded (Client.Timeout exceeded while awaiting headers)")]
    Timeout,
    #[error("{0}")]
    Tls(String),
    #[error("EOF")]
    Eof,
    #[error("read tcp {addr}: {cause}")]
    Io { addr: SocketAddr, cause: String },
    #[error("http: response body too large")]
    TooLarge,
    #[error("net/http: invalid request: {0}")]
    Invalid(String),
    #[error("invalid URL \"{0}\"")]
    Url(String),
}

/// Go's wording of the system's connection errors.
fn go_errno(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused".to_owned(),
        io::ErrorKind::HostUnreachable => "no route to host".to_owned(),
        io::ErrorKind::NetworkUnreachable => "network is unreachable".to_owned(),
        io::ErrorKind::ConnectionReset => "connection reset by peer".to_owned(),
        io::ErrorKind::BrokenPipe => "broken pipe".to_owned(),
        io::ErrorKind::TimedOut => "connection timed out".to_owned(),
        _ => error.to_string().to_lowercase(),
    }
}

/// Where requests go: an `https://host:port` taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(crate) host: String,
    pub(crate) port: u16,
}

impl Endpoint {
    /// Takes an URL apart; a path is dropped, as k3s does.
    pub(crate) fn parse(url: &str, default_port: u16) -> Result<Self, NetError> {
        let error = || NetError::Url(url.to_owned());
        let rest = url.strip_prefix("https://").ok_or_else(error)?;
        let authority = rest.split('/').next().unwrap_or_default();
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => (host, port.parse().map_err(|_| error())?),
            _ => (authority, default_port),
        };
        let host = host.trim_matches(['[', ']']);
        if host.is_empty() {
            return Err(error());
        }
        Ok(Self { host: host.to_owned(), port })
    }

    pub(crate) fn of(ip: IpAddr, port: u16) -> Self {
        Self { host: ip.to_string(), port }
    }
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

type Sender = SendRequest<Full<Bytes>>;

/// A client of one endpoint.
pub(crate) struct Client {
    pub(crate) endpoint: Endpoint,
    tls: Arc<ClientConfig>,
    headers: Vec<(HeaderName, HeaderValue)>,
    idle: Mutex<VecDeque<Sender>>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Client({})", self.endpoint)
    }
}

/// A whole answer.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) body: Bytes,
}

impl Client {
    pub(crate) fn new(endpoint: Endpoint, tls: Arc<ClientConfig>) -> Self {
        Self { endpoint, tls, headers: Vec::new(), idle: Mutex::new(VecDeque::new()) }
    }

    /// Adds HTTP basic authentication to every request.
    pub(crate) fn basic_auth(mut self, user: &str, password: &str) -> Result<Self, NetError> {
        use base64::Engine as _;
        let text = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
        let mut value = HeaderValue::try_from(format!("Basic {text}")).map_err(|e| NetError::Invalid(e.to_string()))?;
        value.set_sensitive(true);
        self.headers.push((AUTHORIZATION, value));
        Ok(self)
    }

    /// Adds a header to every request.
    pub(crate) fn header(mut self, name: &'static str, value: &str) -> Result<Self, NetError> {
        let value = HeaderValue::try_from(value).map_err(|e| NetError::Invalid(e.to_string()))?;
        self.headers.push((HeaderName::from_static(name), value));
        Ok(self)
    }

    /// One request, its whole answer within `timeout`.
    pub(crate) async fn request(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
        timeout: Duration,
    ) -> Result<Answer, NetError> {
        tokio::time::timeout(timeout, self.exchange(method, path, Bytes::from(body)))
            .await
            .unwrap_or(Err(NetError::Timeout))
    }

    /// `GET path`.
    pub(crate) async fn get(&self, path: &str, timeout: Duration) -> Result<Answer, NetError> {
        self.request(Method::GET, path, Vec::new(), timeout).await
    }

    async fn exchange(&self, method: Method, path: &str, body: Bytes) -> Result<Answer, NetError> {
        let (response, sender) = self.send(&method, path, &body).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_BODY_BYTES)
            .collect()
            .await
            .map_err(|e| match e.downcast::<hyper::Error>() {
                Ok(e) => self.hyper_error(&e),
                Err(_) => NetError::TooLarge,
            })?
            .to_bytes();
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if !sender.is_closed() && idle.len() < MAX_IDLE {
            idle.push_back(sender);
        }
        Ok(Answer { status, body })
    }

    /// A request whose answer is read as it comes, on a connection of its own. The connection
    /// ends when the returned sender is dropped.
    pub(crate) async fn open(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<(Response<Incoming>, Sender), NetError> {
        let mut sender = self.connect().await?;
        let request = self.build(&method, path, &Bytes::from(body))?;
        let response = sender.send_request(request).await.map_err(|e| self.hyper_error(&e))?;
        Ok((response, sender))
    }

    async fn send(&self, method: &Method, path: &str, body: &Bytes) -> Result<(Response<Incoming>, Sender), NetError> {
        // A kept connection may have been closed by the other side: only then, and only while the
        // request was not sent, a new one is tried.
        for _ in 0..=MAX_IDLE {
            let kept = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            let Some(mut sender) = kept else { break };
            if sender.is_closed() || sender.ready().await.is_err() {
                continue;
            }
            match sender.send_request(self.build(method, path, body)?).await {
                Ok(response) => return Ok((response, sender)),
                Err(e) if e.is_canceled() || (method == Method::GET && e.is_incomplete_message()) => {}
                Err(e) => return Err(self.hyper_error(&e)),
            }
        }
        let mut sender = self.connect().await?;
        let response = sender.send_request(self.build(method, path, body)?).await.map_err(|e| self.hyper_error(&e))?;
        Ok((response, sender))
    }

    fn build(&self, method: &Method, path: &str, body: &Bytes) -> Result<Request<Full<Bytes>>, NetError> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, self.endpoint.to_string())
            .header(CONTENT_TYPE, "application/json");
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        request.body(Full::new(body.clone())).map_err(|e| NetError::Invalid(e.to_string()))
    }

    fn address(&self) -> Result<SocketAddr, NetError> {
        host::resolve(&self.endpoint.host)
            .map(|ip| SocketAddr::new(ip, self.endpoint.port))
            .ok_or_else(|| NetError::Lookup(self.endpoint.host.clone()))
    }

    async fn connect(&self) -> Result<Sender, NetError> {
        let addr = self.address()?;
        let tcp = TcpStream::connect(addr)
            .await
            .map_err(|e| NetError::Dial { addr, cause: format!("connect: {}", go_errno(&e)) })?;
        let _ = tcp.set_nodelay(true);
        let name =
            ServerName::try_from(self.endpoint.host.clone()).map_err(|_| NetError::Url(self.endpoint.host.clone()))?;
        let stream =
            TlsConnector::from(Arc::clone(&self.tls)).connect(name, tcp).await.map_err(|e| tls_error(addr, &e))?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(|e| self.hyper_error(&e))?;
        tokio::spawn(async move {
            // Its errors reach whoever waits for an answer.
            let _ = connection.await;
        });
        Ok(sender)
    }

    fn hyper_error(&self, error: &hyper::Error) -> NetError {
        if error.is_incomplete_message() || error.is_canceled() || error.is_closed() {
            return NetError::Eof;
        }
        let io = error.source().and_then(|s| s.downcast_ref::<io::Error>());
        match (io, self.address()) {
            (Some(io), Ok(addr)) => tls_error(addr, io),
            _ => NetError::Tls(error.to_string()),
        }
    }
}

fn tls_error(addr: SocketAddr, error: &io::Error) -> NetError {
    let inner = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
    match inner {
        Some(rustls::Error::InvalidCertificate(
            rustls::CertificateError::UnknownIssuer | rustls::CertificateError::BadSignature,
        )) => NetError::Tls("x509: certificate signed by unknown authority".to_owned()),
        Some(rustls::Error::InvalidCertificate(e)) => NetError::Tls(format!("x509: {e}")),
        Some(rustls::Error::AlertReceived(alert)) => NetError::Tls(format!("remote error: tls: {alert:?}")),
        Some(e) => NetError::Tls(format!("tls: {e}")),
        None if error.kind() == io::ErrorKind::UnexpectedEof => NetError::Eof,
        None => NetError::Io { addr, cause: format!("read: {}", go_errno(error)) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_come_apart() {
        let parse = |u: &str| Endpoint::parse(u, 6443).map(|e| e.to_string());
        assert_eq!(parse("https://192.168.1.1:6443").unwrap(), "192.168.1.1:6443");
        assert_eq!(parse("https://server-1/").unwrap(), "server-1:6443");
        assert_eq!(parse("https://[fd00::1]:7443").unwrap(), "[fd00::1]:7443");
        assert!(parse("http://x").is_err());
        assert!(parse("https://x:y").is_err());
    }

    #[test]
    fn system_errors_read_like_go() {
        let say = |kind: io::ErrorKind| go_errno(&io::Error::from(kind));
        assert_eq!(say(io::ErrorKind::ConnectionRefused), "connection refused");
        assert_eq!(say(io::ErrorKind::HostUnreachable), "no route to host");
        assert_eq!(say(io::ErrorKind::NetworkUnreachable), "network is unreachable");
    }

    #[tokio::test]
    async fn a_refused_connection_is_said_in_gos_words() {
        let client =
            Client::new(Endpoint { host: "127.0.0.1".into(), port: 1 }, crate::tls::insecure_client().unwrap());
        let error = client.get("/cacerts", Duration::from_secs(5)).await.err().unwrap();
        assert_eq!(error.to_string(), "dial tcp 127.0.0.1:1: connect: connection refused");
    }

    #[tokio::test]
    async fn a_server_that_says_nothing_is_a_timeout_in_gos_words() {
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = Endpoint { host: "127.0.0.1".into(), port: silent.local_addr().unwrap().port() };
        let client = Client::new(endpoint, crate::tls::insecure_client().unwrap());
        let error = client.get("/cacerts", Duration::from_millis(50)).await.err().unwrap();
        assert_eq!(error.to_string(), "context deadline exceeded (Client.Timeout exceeded while awaiting headers)");
    }
}
