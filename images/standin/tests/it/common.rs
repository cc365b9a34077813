//! One node for a test: the stand-in on loopback addresses of the test's own /24, its directories,
//! its log, its sd_notify socket. Everything ends with it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt as _, Empty};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};

pub(crate) const BIN: &str = env!("CARGO_BIN_EXE_k3s-standin");

/// Starting takes an etcd election (up to 5.5 s) on a busy machine.
pub(crate) const START_TIMEOUT: Duration = Duration::from_secs(40);

/// A node's place; the process runs between `start` and `stop`.
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) ip: String,
    loopback: String,
    dir: tempfile::TempDir,
    child: Option<Child>,
    notify: UnixDatagram,
}

impl Node {
    /// `net` is the third number of the test's addresses, `host` the node's.
    pub(crate) fn new(net: u8, host: u8) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let notify = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        notify.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        Self {
            name: format!("node-{host}"),
            ip: format!("127.77.{net}.{host}"),
            loopback: format!("127.77.{net}.{}", host + 100),
            dir,
            child: None,
            notify,
        }
    }

    pub(crate) fn path(&self, rest: &str) -> PathBuf {
        self.dir.path().join(rest)
    }
    pub(crate) fn server(&self, rest: &str) -> PathBuf {
        self.path("data/server").join(rest)
    }
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.path("etc/k3s/k3s.yaml")
    }
    pub(crate) fn url(&self) -> String {
        format!("https://{}:6443", self.ip)
    }
    pub(crate) fn token(&self) -> String {
        fs::read_to_string(self.server("token")).unwrap().trim().to_owned()
    }
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }
    pub(crate) fn mode(&self, rest: &str) -> u32 {
        fs::metadata(self.path(rest)).unwrap().permissions().mode() & 0o777
    }

    /// Starts the stand-in with `args` after the sub-command.
    pub(crate) fn start(&mut self, command: &str, args: &[&str]) {
        assert!(self.child.is_none(), "runs already");
        let log = fs::OpenOptions::new().create(true).append(true).open(self.path("log")).unwrap();
        let mut c = Command::new(BIN);
        c.arg(command).args(args).args(["--node-name", &self.name, "--node-ip", &self.ip, "--flannel-iface", "lo"]);
        if command == "server" {
            c.args(["--bind-address", &self.ip]);
        }
        c.args(["--standin-loopback", &self.loopback, "--standin-keep-host", "--data-dir"]).arg(self.path("data"));
        c.arg("--standin-etc-dir").arg(self.path("etc"));
        c.env_remove("K3S_TOKEN").env_remove("K3S_URL").env("NOTIFY_SOCKET", self.path("notify"));
        c.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.child = Some(c.spawn().unwrap());
    }

    /// Waits for systemd's READY=1.
    pub(crate) fn wait_ready(&mut self) {
        let deadline = Instant::now() + START_TIMEOUT;
        let mut buffer = [0; 256];
        while Instant::now() < deadline {
            if let Ok(n) = self.notify.recv(&mut buffer)
                && &buffer[..n] == b"READY=1"
            {
                return;
            }
            if let Some(status) = self.child.as_mut().unwrap().try_wait().unwrap() {
                panic!("{} ended ({status}) before it was ready:\n{}", self.name, self.log());
            }
        }
        panic!("{} was not ready in time:\n{}", self.name, self.log());
    }

    /// The pid of the etcd child.
    pub(crate) fn etcd_pid(&self) -> u32 {
        let pid = self.child.as_ref().unwrap().id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        children.split_whitespace().next().unwrap().parse().unwrap()
    }

    /// Waits for the end of the process.
    pub(crate) fn wait_exit(&mut self, timeout: Duration) -> ExitStatus {
        let mut child = self.child.take().unwrap();
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status;
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                panic!("{} did not end in {timeout:?}:\n{}", self.name, self.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = i32::try_from(self.child.as_ref().unwrap().id()).unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).unwrap();
    }

    /// SIGTERM and the exit status.
    pub(crate) fn stop(&mut self) -> ExitStatus {
        self.signal(nix::sys::signal::Signal::SIGTERM);
        self.wait_exit(Duration::from_secs(10))
    }

    /// One HTTPS request; nothing is verified but that there is an answer.
    pub(crate) async fn request(
        &self,
        path: &str,
        basic: Option<(&str, &str)>,
        certificate: Option<&str>,
    ) -> (u16, String) {
        let identity = certificate.map(|name| {
            let pem = |ext: &str| fs::read(self.server(&format!("tls/{name}.{ext}"))).unwrap();
            let chain = CertificateDer::pem_slice_iter(&pem("crt")).collect::<Result<Vec<_>, _>>().unwrap();
            (chain, PrivateKeyDer::from_pem_slice(&pem("key")).unwrap())
        });
        https(&self.ip, 6443, &self.server("tls/server-ca.crt"), identity, path, basic).await
    }

    /// etcd's members as its peer port tells them.
    pub(crate) async fn members(&self) -> serde_json::Value {
        let pem = |name: &str| fs::read(self.server(&format!("tls/etcd/{name}"))).unwrap();
        let chain =
            CertificateDer::pem_slice_iter(&pem("peer-server-client.crt")).collect::<Result<Vec<_>, _>>().unwrap();
        let key = PrivateKeyDer::from_pem_slice(&pem("peer-server-client.key")).unwrap();
        let ca = self.server("tls/etcd/peer-ca.crt");
        let (status, body) = https(&self.ip, 2380, &ca, Some((chain, key)), "/members", None).await;
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    }

    /// A plain request to etcd's metrics address.
    pub(crate) async fn etcd_health(&self) -> String {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut s = tokio::net::TcpStream::connect(format!("{}:2381", self.loopback)).await.unwrap();
        s.write_all(b"GET /health HTTP/1.0\r\nHost: x\r\n\r\n").await.unwrap();
        let mut text = String::new();
        s.read_to_string(&mut text).await.unwrap();
        text
    }

    pub(crate) async fn kube(&self) -> kube::Client {
        let config = kube::config::Kubeconfig::read_from(self.kubeconfig()).unwrap();
        let config = kube::Config::from_custom_kubeconfig(config, &Default::default()).await.unwrap();
        kube::Client::try_from(config).unwrap()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

async fn https(
    ip: &str,
    port: u16,
    ca: &Path,
    identity: Option<Identity>,
    path: &str,
    basic: Option<(&str, &str)>,
) -> (u16, String) {
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&fs::read(ca).unwrap()) {
        roots.add(certificate.unwrap()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = match identity {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key).unwrap(),
        None => builder.with_no_client_auth(),
    };
    let tcp = tokio::net::TcpStream::connect((ip, port)).await.unwrap();
    let name = ServerName::try_from(ip.to_owned()).unwrap();
    let tls = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, tcp).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(tls)).await.unwrap();
    tokio::spawn(connection);
    let mut request = Request::builder().method(Method::GET).uri(path).header("host", ip);
    if let Some((user, password)) = basic {
        use base64::Engine as _;
        let text = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
        request = request.header("authorization", format!("Basic {text}"));
    }
    let response = sender.send_request(request.body(Empty::<Bytes>::new()).unwrap()).await.unwrap();
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8_lossy(&body).into_owned())
}

/// Whether a process is gone (a zombie is).
pub(crate) fn gone(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .map_or(true, |stat| stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with(['Z', 'X'])))
}

/// Waits until `done` or fails.
pub(crate) fn wait_until(what: &str, timeout: Duration, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + timeout;
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not within {timeout:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
