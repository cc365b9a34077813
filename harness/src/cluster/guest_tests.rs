//! etcd facts and path probes through a real sshd on loopback.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::etcd::{EtcdError, EtcdPeer, health_at};
use super::prewarm::{PrewarmError, prewarm};
use super::testing::{Pki, closed_port, request_path};
use crate::guest::testing::Sshd;

const LONG: Duration = Duration::from_secs(20);
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Serves one body over mutual TLS, and names the paths it was asked for.
async fn tls_server(pki: &Pki, status: u16, body: &'static str) -> (u16, tokio::sync::mpsc::Receiver<String>) {
    let acceptor = pki.acceptor();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (sender, paths) = tokio::sync::mpsc::channel(16);
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let Ok(mut stream) = acceptor.accept(tcp).await else { continue };
            let Some(path) = request_path(&mut stream).await else { continue };
            let answer = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            let _ = stream.write_all(answer.as_bytes()).await;
            let _ = stream.shutdown().await;
            let _ = sender.send(path).await;
        }
    });
    (port, paths)
}

fn write_certificates(sshd: &Sshd, pki: &Pki) -> String {
    for (name, text) in [
        ("peer-ca.crt", &pki.ca_pem),
        ("peer-server-client.crt", &pki.leaf_pem),
        ("peer-server-client.key", &pki.key_pem),
    ] {
        std::fs::write(sshd.dir.path().join(name), text).unwrap();
    }
    sshd.dir.path().display().to_string()
}

#[tokio::test]
async fn the_member_list_over_mutual_tls() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let pki = Pki::new();
    let dir = write_certificates(&sshd, &pki);
    let peer = EtcdPeer::load_from(&guest, &dir, LONG).await.unwrap();
    let body = r#"[{"id":9,"peerURLs":["https://192.168.200.2:2380"],"name":"server-2","clientURLs":["https://192.168.200.2:2379"]},
        {"id":18446744073709551615,"peerURLs":["https://192.168.200.1:2380"],"name":"server-1","clientURLs":[]}]"#;
    let (port, mut paths) = tls_server(&pki, 200, body).await;
    let members = peer.members_at(LOOPBACK, port, LONG).await.unwrap();
    assert_eq!(members.iter().map(|m| m.name.as_str()).collect::<Vec<_>>(), ["server-1", "server-2"]);
    assert_eq!(members[0].id, u64::MAX);
    assert_eq!(paths.recv().await.as_deref(), Some("/members"));

    let (port, _paths) = tls_server(&Pki::new(), 200, body).await;
    let error = peer.members_at(LOOPBACK, port, LONG).await.unwrap_err();
    assert!(matches!(&error, EtcdError::Unavailable { reason, .. } if reason.starts_with("tls: ")), "{error}");
    let (port, _paths) = tls_server(&pki, 503, "no").await;
    let error = peer.members_at(LOOPBACK, port, LONG).await.unwrap_err();
    assert!(error.to_string().contains("answered 503"), "{error}");
    let error = peer.members_at(LOOPBACK, closed_port().port(), LONG).await.unwrap_err();
    assert!(matches!(error, EtcdError::Guest(_)), "{error}");
}

#[tokio::test]
async fn a_member_that_takes_the_connection_and_says_nothing_is_timed_out() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let dir = write_certificates(&sshd, &Pki::new());
    let peer = EtcdPeer::load_from(&guest, &dir, LONG).await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let started = Instant::now();
    let limit = Duration::from_millis(300);
    assert!(matches!(peer.members_at(LOOPBACK, port, limit).await, Err(EtcdError::TimedOut { .. })));
    assert!(matches!(health_at(&guest, port, limit).await, Err(EtcdError::TimedOut { .. })));
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

#[tokio::test]
async fn missing_certificates_name_the_file() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let error = EtcdPeer::load_from(&guest, &sshd.dir.path().display().to_string(), LONG).await.unwrap_err();
    assert!(error.to_string().contains("peer-"), "{error}");
}

#[tokio::test]
async fn health_healthy_or_not() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        for answer in [
            "HTTP/1.1 200 OK\r\ncontent-length: 29\r\n\r\n{\"health\":\"true\",\"reason\":\"\"}",
            "HTTP/1.1 503 X\r\ncontent-length: 44\r\n\r\n{\"health\":\"false\",\"reason\":\"RAFT NO LEADER\"}",
            "starting\n",
        ] {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 1024]).await;
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    assert!(health_at(&guest, port, LONG).await.unwrap().healthy);
    let sick = health_at(&guest, port, LONG).await.unwrap();
    assert_eq!((sick.healthy, sick.reason.as_str()), (false, "RAFT NO LEADER"));
    assert!(matches!(health_at(&guest, port, LONG).await, Err(EtcdError::Unavailable { .. })));
}

#[tokio::test]
async fn a_path_is_probed_from_inside_the_guest() {
    let sshd = Sshd::start();
    let guest = sshd.guest().await;
    let probe = async |port: u16, limit_s: u64| {
        prewarm(&guest, (LOOPBACK, port).into(), "/cacerts", Duration::from_secs(limit_s)).await.unwrap()
    };

    // The probe brings no client certificate: TLS 1.3 connects, and the server's refusal follows.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let pki = Pki::new();
    let config =
        rustls::ServerConfig::builder_with_provider(std::sync::Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![rustls::pki_types::pem::PemObject::from_pem_slice(pki.leaf_pem.as_bytes()).unwrap()],
                rustls::pki_types::pem::PemObject::from_pem_slice(pki.key_pem.as_bytes()).unwrap(),
            )
            .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(config));
    tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        let mut stream = acceptor.accept(tcp).await.unwrap();
        assert_eq!(request_path(&mut stream).await.as_deref(), Some("/cacerts"));
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
        let _ = stream.shutdown().await;
    });
    let sample = probe(port, 10).await;
    assert!(sample.ok && sample.http_code == 200 && sample.error.is_none(), "{sample:?}");
    assert!(
        sample.connect_ms > 0.0 && sample.tls_ms >= sample.connect_ms && sample.total_ms >= sample.tls_ms,
        "{sample:?}"
    );

    let sample = probe(closed_port().port(), 5).await;
    assert_eq!((sample.ok, sample.http_code, sample.error), (false, 0, Some(PrewarmError::Refused)), "{sample:?}");

    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = silent.local_addr().unwrap().port();
    let sample = probe(port, 1).await;
    assert_eq!(sample.error, Some(PrewarmError::Timeout), "{sample:?}");
    drop(silent);

    let plain = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = plain.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut stream, _) = plain.accept().await.unwrap();
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
    });
    let sample = probe(port, 5).await;
    assert_eq!(sample.error, Some(PrewarmError::Tls), "{sample:?}");
}
