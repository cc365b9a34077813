//! What etcd says of itself, asked through the guest it runs in.
//!
//! - `GET https://NODE_IP:2380/members` on the peer port, with the peer certificate: the member list as JSON
//!   (etcd 3.3–3.5, `server/etcdserver/api/etcdhttp/peer.go`; k3s's embedded etcd has no gRPC gateway).
//! - `GET http://127.0.0.1:2381/health`: `{"health":"true","reason":""}` (`etcdhttp/health.go`; k3s sets
//!   `listen-metrics-urls` to that address).
//! - Certificates: `/var/lib/rancher/k3s/server/tls/etcd/peer-{ca,server-client}.{crt,key}`.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::StatusCode;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::TlsConnector;

use crate::cluster::http::get;
use crate::guest::{Guest, GuestError};

const TLS_DIR: &str = "/var/lib/rancher/k3s/server/tls/etcd";
const PEER_PORT: u16 = 2380;
const METRICS_PORT: u16 = 2381;

/// etcd could not be asked, or did not answer as etcd does.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EtcdError {
    /// The guest could not be asked.
    #[error("etcd: {0}")]
    Guest(#[from] GuestError),
    /// The guest's peer certificates cannot be used.
    #[error("{node}: etcd peer certificates: {reason}")]
    Certificates {
        /// The node.
        node: String,
        /// Why.
        reason: String,
    },
    /// No answer that is one.
    #[error("{node}: etcd {url}: {reason}")]
    Unavailable {
        /// The node.
        node: String,
        /// What was asked.
        url: String,
        /// What happened.
        reason: String,
    },
    /// No answer in time.
    #[error("{node}: etcd {url}: no answer within {:.0} s", limit.as_secs_f64())]
    TimedOut {
        /// The node.
        node: String,
        /// What was asked.
        url: String,
        /// The time it had.
        limit: Duration,
    },
}

/// A member of the etcd cluster, as another member lists it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct EtcdMember {
    /// The member's id.
    pub id: u64,
    /// Its name; empty until it has started.
    #[serde(default)]
    pub name: String,
    /// Where its peers reach it.
    #[serde(default, rename = "peerURLs")]
    pub peer_urls: Vec<String>,
    /// Where clients reach it; empty until it has started.
    #[serde(default, rename = "clientURLs")]
    pub client_urls: Vec<String>,
    /// Whether it takes part in elections not yet.
    #[serde(default, rename = "isLearner")]
    pub is_learner: bool,
}

/// etcd's statement on its own health.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct EtcdHealth {
    /// Whether it is healthy: it has a leader, no alarm is raised, and a read went through.
    pub healthy: bool,
    /// Its reason when it is not.
    pub reason: String,
}

impl EtcdHealth {
    /// Reads `{"health":"true","reason":""}`; older releases have no reason and newer ones may write a boolean.
    pub fn parse(body: &[u8]) -> Result<EtcdHealth, String> {
        let value: serde_json::Value = serde_json::from_slice(body).map_err(|e| e.to_string())?;
        let healthy = match value.get("health") {
            Some(serde_json::Value::String(text)) => text == "true",
            Some(serde_json::Value::Bool(healthy)) => *healthy,
            _ => return Err("no field `health`".into()),
        };
        let reason = value.get("reason").and_then(serde_json::Value::as_str).unwrap_or_default().to_owned();
        Ok(EtcdHealth { healthy, reason })
    }
}

/// The peer identity of one node's etcd, read once from its guest.
#[derive(Clone)]
pub struct EtcdPeer {
    guest: Guest,
    connector: TlsConnector,
}

impl std::fmt::Debug for EtcdPeer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdPeer").field("node", &self.guest.node()).finish_non_exhaustive()
    }
}

impl EtcdPeer {
    /// Reads the peer certificates of a server that has been started.
    pub async fn load(guest: &Guest, deadline: Duration) -> Result<EtcdPeer, EtcdError> {
        EtcdPeer::load_from(guest, TLS_DIR, deadline).await
    }

    pub(super) async fn load_from(guest: &Guest, dir: &str, deadline: Duration) -> Result<EtcdPeer, EtcdError> {
        let paths =
            ["peer-ca.crt", "peer-server-client.crt", "peer-server-client.key"].map(|name| format!("{dir}/{name}"));
        let [ca, certificate, key] = guest.read_texts(&paths, deadline).await?;
        let connector = connector(ca.as_bytes(), certificate.as_bytes(), key.as_bytes())
            .map_err(|reason| EtcdError::Certificates { node: guest.node().to_owned(), reason })?;
        Ok(EtcdPeer { guest: guest.clone(), connector })
    }

    /// The members, by this node's etcd, sorted by name. `node_ip` is the address its peer port listens on.
    pub async fn members(&self, node_ip: IpAddr, deadline: Duration) -> Result<Vec<EtcdMember>, EtcdError> {
        self.members_at(node_ip, PEER_PORT, deadline).await
    }

    pub(super) async fn members_at(
        &self,
        node_ip: IpAddr,
        port: u16,
        deadline: Duration,
    ) -> Result<Vec<EtcdMember>, EtcdError> {
        let asked = Asked { node: self.guest.node(), url: format!("https://{node_ip}:{port}/members"), deadline };
        asked
            .within(async {
                let channel = self.guest.direct_tcpip(&node_ip.to_string(), port).await?;
                let stream = self
                    .connector
                    .connect(ServerName::IpAddress(node_ip.into()), channel)
                    .await
                    .map_err(|e| asked.unavailable(format!("tls: {e}")))?;
                let host = format!("{node_ip}:{port}");
                let (status, body) = get(stream, &host, "/members").await.map_err(|e| asked.unavailable(e))?;
                if status != StatusCode::OK {
                    return Err(asked.unavailable(format!("answered {status}")));
                }
                let mut members: Vec<EtcdMember> =
                    serde_json::from_slice(&body).map_err(|e| asked.unavailable(e.to_string()))?;
                members.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
                Ok(members)
            })
            .await
    }
}

/// The health of a node's etcd. An etcd that answers that it is not healthy is an `Ok` that says so.
pub async fn health(guest: &Guest, deadline: Duration) -> Result<EtcdHealth, EtcdError> {
    health_at(guest, METRICS_PORT, deadline).await
}

pub(super) async fn health_at(guest: &Guest, port: u16, deadline: Duration) -> Result<EtcdHealth, EtcdError> {
    let asked = Asked { node: guest.node(), url: format!("http://127.0.0.1:{port}/health"), deadline };
    asked
        .within(async {
            let channel = guest.direct_tcpip("127.0.0.1", port).await?;
            let host = format!("127.0.0.1:{port}");
            // Unhealthy is 503 with the same body.
            let (_, body) = get(channel, &host, "/health").await.map_err(|e| asked.unavailable(e))?;
            EtcdHealth::parse(&body).map_err(|e| asked.unavailable(e))
        })
        .await
}

struct Asked<'a> {
    node: &'a str,
    url: String,
    deadline: Duration,
}

impl Asked<'_> {
    fn unavailable(&self, reason: String) -> EtcdError {
        EtcdError::Unavailable { node: self.node.to_owned(), url: self.url.clone(), reason }
    }

    async fn within<T>(&self, answer: impl Future<Output = Result<T, EtcdError>>) -> Result<T, EtcdError> {
        tokio::time::timeout(self.deadline, answer).await.unwrap_or_else(|_| {
            Err(EtcdError::TimedOut { node: self.node.to_owned(), url: self.url.clone(), limit: self.deadline })
        })
    }
}

fn connector(ca: &[u8], certificate: &[u8], key: &[u8]) -> Result<TlsConnector, String> {
    let certificates = |pem: &[u8], what: &str| -> Result<Vec<CertificateDer<'static>>, String> {
        let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
        match found {
            Ok(list) if list.is_empty() => Err(format!("{what}: no certificate in it")),
            Ok(list) => Ok(list),
            Err(e) => Err(format!("{what}: {e}")),
        }
    };
    let mut roots = rustls::RootCertStore::empty();
    for root in certificates(ca, "peer-ca.crt")? {
        roots.add(root).map_err(|e| format!("peer-ca.crt: {e}"))?;
    }
    let identity = certificates(certificate, "peer-server-client.crt")?;
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|e| format!("peer-server-client.key: {e}"))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .with_root_certificates(roots)
        .with_client_auth_cert(identity, key)
        .map_err(|e| e.to_string())?;
    Ok(TlsConnector::from(Arc::new(config)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_as_etcd_writes_them() {
        let body = br#"[{"id":9372538179322589801,"peerURLs":["https://192.168.200.1:2380"],"name":"server-1-0ca5ed10","clientURLs":["https://192.168.200.1:2379"]},
            {"id":7,"peerURLs":["https://192.168.200.2:2380"],"name":"","isLearner":true}]"#;
        let members: Vec<EtcdMember> = serde_json::from_slice(body).unwrap();
        assert_eq!(members[0].id, 9_372_538_179_322_589_801);
        assert_eq!(members[0].client_urls, ["https://192.168.200.1:2379"]);
        assert!(!members[0].is_learner);
        assert!(members[1].is_learner && members[1].name.is_empty() && members[1].client_urls.is_empty());
    }

    #[test]
    fn health_in_all_its_spellings() {
        let read = |body: &str| EtcdHealth::parse(body.as_bytes());
        assert!(read(r#"{"health":"true"}"#).unwrap().healthy);
        assert!(read(r#"{"health":true}"#).unwrap().healthy);
        let no = read(r#"{"health":"false","reason":"RAFT NO LEADER"}"#).unwrap();
        assert_eq!((no.healthy, no.reason.as_str()), (false, "RAFT NO LEADER"));
        assert!(read("starting").is_err());
        assert!(read("{}").is_err());
    }

    #[test]
    fn unusable_certificates_name_their_file() {
        let made = |ca: &[u8], certificate: &[u8], key: &[u8]| connector(ca, certificate, key).map(drop).unwrap_err();
        assert!(made(b"", b"", b"").contains("peer-ca.crt"));
        let ca = rcgen::generate_simple_self_signed(["x".to_owned()]).unwrap();
        assert!(made(ca.cert.pem().as_bytes(), b"", b"").contains("peer-server-client.crt"));
        assert!(made(ca.cert.pem().as_bytes(), ca.cert.pem().as_bytes(), b"").contains("peer-server-client.key"));
    }
}
