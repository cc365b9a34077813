//! One probe of the path from a joiner to its server: TCP from inside the joiner, TLS and HTTP over it from here.
//!
//! It is what a joining k3s does first (`GET /cacerts`, certificate unchecked), less the cost of a program and its list of
//! authorities on an emulated CPU: the joiner's sshd makes the connection. How often and at what spacing a path is probed is the caller's policy.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;

use crate::cluster::http::get;
use crate::guest::{Guest, GuestError};

/// Why a probe failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PrewarmError {
    /// No answer in time.
    Timeout,
    /// No way to the address: a missing link, VLAN or route.
    NoRoute,
    /// The host is there and nothing listens.
    Refused,
    /// TCP came about, TLS did not.
    Tls,
    /// Anything else; see [`PrewarmSample::message`].
    Other,
}

/// The outcome of one probe.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct PrewarmSample {
    /// Whether an HTTP answer came, whatever its status.
    pub ok: bool,
    /// HTTP status; 0 when there was none.
    pub http_code: u16,
    /// From the start until TCP was connected.
    pub connect_ms: f64,
    /// From the start until TLS was negotiated; 0 when it was not.
    pub tls_ms: f64,
    /// From the start until the end.
    pub total_ms: f64,
    /// What failed.
    pub error: Option<PrewarmError>,
    /// What went wrong, in the guest's words where it was the connection.
    pub message: String,
}

/// Asks `https://SERVER/PATH` over a connection made by the guest, once, for at most `limit`.
///
/// A path that does not work is an `Ok` that says how; an `Err` is a guest that could not be asked.
pub async fn prewarm(
    guest: &Guest,
    server: SocketAddr,
    path: &str,
    limit: Duration,
) -> Result<PrewarmSample, GuestError> {
    let began = Instant::now();
    let end = began + limit;
    let elapsed_ms = || began.elapsed().as_secs_f64() * 1e3;
    let mut sample = PrewarmSample {
        ok: false,
        http_code: 0,
        connect_ms: 0.0,
        tls_ms: 0.0,
        total_ms: 0.0,
        error: None,
        message: String::new(),
    };
    let probed = timeout_at(end, async {
        let refused = |error| match error {
            GuestError::ChannelRefused { reason, .. } => Missed::Path(kind(&reason), reason),
            error => Missed::Guest(error),
        };
        let channel = guest.direct_tcpip(&server.ip().to_string(), server.port()).await.map_err(refused)?;
        sample.connect_ms = elapsed_ms();
        let tls = connector().connect(ServerName::IpAddress(server.ip().into()), channel).await;
        let stream = tls.map_err(|error| Missed::Path(PrewarmError::Tls, format!("tls: {error}")))?;
        sample.tls_ms = elapsed_ms();
        get(stream, &server.to_string(), path).await.map_err(|reason| Missed::Path(PrewarmError::Other, reason))
    })
    .await
    .unwrap_or_else(|_| {
        Err(Missed::Path(PrewarmError::Timeout, format!("timed out after {:.0} s", limit.as_secs_f64())))
    });
    sample.total_ms = elapsed_ms();
    match probed {
        Ok((status, _)) => (sample.ok, sample.http_code) = (true, status.as_u16()),
        Err(Missed::Path(kind, message)) => (sample.error, sample.message) = (Some(kind), message),
        Err(Missed::Guest(error)) => return Err(error),
    }
    Ok(sample)
}

/// Why there was no answer: the path does not work, or the guest could not be asked.
enum Missed {
    Path(PrewarmError, String),
    Guest(GuestError),
}

/// What the words of `strerror(3)` in a refusal of the guest's sshd say of the path.
fn kind(reason: &str) -> PrewarmError {
    let reason = reason.to_ascii_lowercase();
    let says = |words: &str| reason.contains(words);
    // sshd has no words for what fails at once, without a packet: there is no route.
    if says("no route") || says("unreachable") || says("could not connect: open failed") {
        PrewarmError::NoRoute
    } else if says("refused") {
        PrewarmError::Refused
    } else if says("timed out") || says("no answer") {
        PrewarmError::Timeout
    } else {
        PrewarmError::Other
    }
}

fn connector() -> TlsConnector {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .expect("ring's provider knows the default versions")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone(provider)))
        .with_no_client_auth();
    TlsConnector::from(Arc::new(config))
}

/// Takes any certificate, as a joiner that does not know the cluster's authorities yet has to.
#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_told_apart_by_the_words_of_the_guests_system() {
        let kinds = [
            ("it could not connect: Connection refused", PrewarmError::Refused),
            ("it could not connect: No route to host", PrewarmError::NoRoute),
            ("it could not connect: open failed", PrewarmError::NoRoute),
            ("it could not connect: Connection timed out", PrewarmError::Timeout),
            ("no answer within 20 s", PrewarmError::Timeout),
            ("it is not allowed to", PrewarmError::Other),
        ];
        for (reason, expected) in kinds {
            assert_eq!(kind(reason), expected, "{reason}");
        }
    }
}
