//! etcd as a child process: its configuration file as k3s writes it, its start through
//! `setpriv --pdeathsig KILL` (real k3s embeds etcd, so etcd must never outlive us, not even our
//! SIGKILL), its zap lines copied to our standard error, its readiness read from them.

use std::net::IpAddr;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::watch;

use crate::layout::{self, FileError, Layout};
use crate::logfmt;

/// Printed by etcd 3.3 to 3.5 once the member is part of a cluster that has a leader.
const READY: &str = "serving client traffic";
const STOP_GRACE: Duration = Duration::from_secs(3);
const MAX_LINE_BYTES: usize = 64 << 10;

/// etcd's timing, as k3s sets it.
const HEARTBEAT_MS: u32 = 500;
const ELECTION_MS: u32 = 5000;

/// etcd that does not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EtcdStartError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("starting etcd (through setpriv): {0}")]
    Spawn(#[from] std::io::Error),
    #[error("etcd exited before it was ready: {0}")]
    Exited(String),
}

/// What etcd's configuration depends on.
#[derive(Debug)]
pub(crate) struct EtcdSpec<'a> {
    pub(crate) layout: &'a Layout,
    pub(crate) name: &'a str,
    pub(crate) node_ip: IpAddr,
    pub(crate) loopback: IpAddr,
    /// `name=peer URL` list and whether the cluster is there already; `None` on a restart.
    pub(crate) initial: Option<(String, bool)>,
}

/// A running etcd.
#[derive(Debug)]
pub(crate) struct EtcdProcess {
    child: Child,
    ready: watch::Receiver<bool>,
}

fn url(ip: IpAddr, port: u16) -> String {
    format!("https://{}", std::net::SocketAddr::new(ip, port))
}

/// The URL other members reach this one by.
pub(crate) fn peer_url(node_ip: IpAddr) -> String {
    url(node_ip, 2380)
}

/// `server/db/etcd/config`: etcd reads the keys of its flags from it.
fn config_text(spec: &EtcdSpec<'_>) -> String {
    let (tls, ip) = (spec.layout.tls("etcd"), spec.node_ip);
    let tls = tls.display();
    let mut text = format!(
        "advertise-client-urls: {client}\n\
         client-transport-security:\n  cert-file: {tls}/server-client.crt\n  client-cert-auth: true\n  key-file: {tls}/server-client.key\n  trusted-ca-file: {tls}/server-ca.crt\n\
         data-dir: {data}\n\
         election-timeout: {ELECTION_MS}\n\
         enable-grpc-gateway: true\n\
         heartbeat-interval: {HEARTBEAT_MS}\n\
         listen-client-urls: {local},{client}\n\
         listen-metrics-urls: http://{metrics}\n\
         listen-peer-urls: {peer}\n\
         log-outputs:\n- stderr\n\
         logger: zap\n\
         name: {name}\n\
         peer-transport-security:\n  cert-file: {tls}/peer-server-client.crt\n  client-cert-auth: true\n  key-file: {tls}/peer-server-client.key\n  trusted-ca-file: {tls}/peer-ca.crt\n",
        client = url(ip, 2379),
        local = url(spec.loopback, 2379),
        metrics = std::net::SocketAddr::new(spec.loopback, 2381),
        peer = peer_url(ip),
        data = spec.layout.etcd("").display().to_string().trim_end_matches('/'),
        name = spec.name,
    );
    if let Some((cluster, existing)) = &spec.initial {
        let state = if *existing { "existing" } else { "new" };
        text.push_str(&format!(
            "initial-advertise-peer-urls: {}\ninitial-cluster: {cluster}\ninitial-cluster-state: {state}\n",
            peer_url(ip)
        ));
    }
    text
}

impl EtcdProcess {
    /// Writes the configuration and starts etcd.
    pub(crate) fn start(spec: &EtcdSpec<'_>) -> Result<Self, EtcdStartError> {
        let config = spec.layout.etcd("config");
        layout::write(&config, 0o600, config_text(spec).as_bytes())?;
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", "etcd", "--config-file"])
            .arg(&config)
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let (sender, ready) = watch::channel(false);
        if let Some(stderr) = child.stderr.take() {
            tokio::spawn(copy_lines(stderr, sender));
        }
        Ok(Self { child, ready })
    }

    /// Waits until etcd serves clients: a member that joins does so once it has caught up.
    pub(crate) async fn ready(&mut self) -> Result<(), EtcdStartError> {
        let mut ready = self.ready.clone();
        tokio::select! {
            biased;
            seen = ready.wait_for(|r| *r) => {
                if seen.is_ok() {
                    return Ok(());
                }
            }
            status = self.child.wait() => return Err(EtcdStartError::Exited(describe(status))),
        }
        // Its standard error is closed: it is ending.
        Err(EtcdStartError::Exited(describe(self.child.wait().await)))
    }

    /// How etcd ended. Cancel-safe.
    pub(crate) async fn exited(&mut self) -> String {
        describe(self.child.wait().await)
    }

    /// SIGKILL.
    pub(crate) async fn kill(mut self) {
        // Fails only where it is gone already.
        let _ = self.child.kill().await;
    }

    /// SIGTERM, a moment, SIGKILL.
    pub(crate) async fn stop(mut self) {
        if let Some(pid) = self.child.id().and_then(|p| i32::try_from(p).ok()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        if tokio::time::timeout(STOP_GRACE, self.child.wait()).await.is_err() {
            let _ = self.child.kill().await;
        }
    }
}

fn describe(status: std::io::Result<ExitStatus>) -> String {
    status.map_or_else(|e| e.to_string(), |s| s.to_string())
}

/// Copies whole lines (the longest cut) to our standard error.
async fn copy_lines(stderr: tokio::process::ChildStderr, ready: watch::Sender<bool>) {
    let mut reader = BufReader::new(stderr);
    let mut line = Vec::new();
    loop {
        let chunk = match reader.fill_buf().await {
            Ok(chunk) if !chunk.is_empty() => chunk,
            _ => return,
        };
        let (take, ends) = match chunk.iter().position(|b| *b == b'\n') {
            Some(at) => (at + 1, true),
            None => (chunk.len(), false),
        };
        let room = MAX_LINE_BYTES.saturating_sub(line.len());
        line.extend_from_slice(&chunk[..take.min(room)]);
        reader.consume(take);
        if ends {
            let text = String::from_utf8_lossy(&line);
            let text = text.trim_end();
            if !text.is_empty() {
                logfmt::raw_line(text);
            }
            if text.contains(READY) {
                let _ = ready.send(true);
            }
            line.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_names_ports_and_files_as_k3s_does() {
        let layout = Layout { data: "/var/lib/rancher/k3s".into(), etc: "/etc/rancher".into() };
        let spec = EtcdSpec {
            layout: &layout,
            name: "server-1-68c493ea",
            node_ip: "192.168.200.1".parse().unwrap(),
            loopback: "127.0.0.1".parse().unwrap(),
            initial: Some(("server-1-68c493ea=https://192.168.200.1:2380".to_owned(), false)),
        };
        let text = config_text(&spec);
        for line in [
            "listen-client-urls: https://127.0.0.1:2379,https://192.168.200.1:2379",
            "listen-metrics-urls: http://127.0.0.1:2381",
            "listen-peer-urls: https://192.168.200.1:2380",
            "  cert-file: /var/lib/rancher/k3s/server/tls/etcd/peer-server-client.crt",
            "data-dir: /var/lib/rancher/k3s/server/db/etcd",
            "heartbeat-interval: 500",
            "election-timeout: 5000",
            "initial-cluster-state: new",
            "logger: zap",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} not in\n{text}");
        }
    }
}
