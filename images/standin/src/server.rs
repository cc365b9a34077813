//! `k3s server`: from the command line to a running member of the cluster, in k3s's order.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::access::{self, Access, AccessError};
use crate::api::{self, App, NodePassword};
use crate::bootstrap::{self, BootstrapError};
use crate::certs::{self, Authorities, CertsError};
use crate::cli::Settings;
use crate::etcd::client::EtcdClient;
use crate::etcd::join::{self, JoinError};
use crate::etcd::process::{EtcdProcess, EtcdSpec, EtcdStartError, peer_url};
use crate::exit::{Exit, Stop};
use crate::kubelet::{Kubelet, NodeApi};
use crate::layout::{self, FileError};
use crate::leader::Elector;
use crate::net::Endpoint;
use crate::tls::{self, TlsError};
use crate::token::{self, Token, TokenError};
use crate::{host, logfmt, notify, version_line};

const WAIT_REPORT: Duration = Duration::from_secs(10);
const SAVE_RETRY: Duration = Duration::from_secs(2);
const SAVE_ATTEMPTS: u32 = 30;
const PASSWORD_RETRY: Duration = Duration::from_secs(5);

/// Why a server cannot start.
#[derive(Debug, thiserror::Error)]
enum ServerError {
    #[error("K3S_TOKEN is required to join a cluster")]
    TokenRequired,
    #[error("the stand-in has no SQLite datastore: give --cluster-init or --server")]
    NoDatastore,
    #[error("listen tcp :{port}: bind: {source}")]
    Listen { port: u16, source: std::io::Error },
    #[error(transparent)]
    Access(#[from] AccessError),
    #[error(transparent)]
    Bootstrap(#[from] BootstrapError),
    #[error(transparent)]
    Certs(#[from] CertsError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error("etcd cluster join failed: {0}")]
    Join(#[from] JoinError),
    #[error(transparent)]
    Etcd(#[from] EtcdStartError),
}

impl From<access::GetError> for ServerError {
    fn from(error: access::GetError) -> Self {
        Self::Access(error.into())
    }
}

/// What is known before etcd starts.
struct Prepared {
    app: Arc<App>,
    etcd_name: String,
    /// `initial-cluster` and whether it is there already; `None` where a datastore exists.
    initial: Option<(String, bool)>,
    /// The server that was joined, for a learner's promotion.
    joined: Option<Access>,
}

/// Runs a server until it is stopped or fails.
pub(crate) async fn run(settings: Arc<Settings>, stop: &mut Stop) -> Exit {
    logfmt::info(format!("Starting k3s {}", version_line()));
    for flag in &settings.without_effect {
        logfmt::warn(format!("flag --{flag} has no effect in the stand-in"));
    }
    let prepared = tokio::select! {
        prepared = prepare(&settings) => prepared,
        () = stop.wait() => return Exit::Clean,
    };
    let started = prepared.and_then(|p| {
        let spec = EtcdSpec {
            layout: &settings.layout,
            name: &p.etcd_name,
            node_ip: settings.node_ip,
            loopback: settings.loopback,
            initial: p.initial.clone(),
        };
        Ok((EtcdProcess::start(&spec)?, p))
    });
    let (mut etcd, prepared) = match started {
        Ok(started) => started,
        Err(error) => return Exit::Fatal(format!("starting kubernetes: preparing server: {error}")),
    };
    let exit = tokio::select! {
        exit = serve(&settings, prepared, &mut etcd) => exit,
        () = stop.wait() => Exit::Clean,
    };
    if matches!(exit, Exit::Clean) {
        notify::notify("STOPPING=1");
        etcd.stop().await;
    } else {
        // Real k3s takes its etcd along without a farewell.
        etcd.kill().await;
    }
    exit
}

/// The token's password: the one given, the one of before, a new one.
fn password(settings: &Settings) -> Result<String, ServerError> {
    if let Some(text) = &settings.token {
        return Ok(Token::parse(text, "server")?.password);
    }
    match certs::stored_password(&settings.layout)? {
        Some(password) => Ok(password),
        None => Ok(token::random_hex(16)?),
    }
}

async fn prepare(settings: &Arc<Settings>) -> Result<Prepared, ServerError> {
    let layout = &settings.layout;
    let initialised = layout.datastore_exists();
    layout.make_server_dirs()?;
    let (mut void, mut joined) = (false, None);
    match (&settings.server_url, initialised) {
        (_, true) => logfmt::info("Managed etcd cluster bootstrap already complete and initialized"),
        (Some(url), false) => {
            let text = settings.token.as_ref().ok_or(ServerError::TokenRequired)?;
            let access = access::open(url, &Token::parse(text, "server")?).await?;
            logfmt::info("Managed etcd cluster not yet initialized");
            let data = access::get(&access.client, "/v1-k3s/server-bootstrap").await?;
            void = bootstrap::write(layout, &data)?;
            joined = Some(access);
        }
        (None, false) if settings.cluster_init => logfmt::info("Managed etcd cluster initializing"),
        (None, false) => return Err(ServerError::NoDatastore),
    }
    let password = password(settings)?;
    let authorities = certs::ensure(settings, void)?;
    certs::write_secrets(layout, &password, initialised)?;
    certs::serving(settings, &authorities)?;
    let etcd_name = etcd_name(settings)?;
    let initial = match &joined {
        _ if initialised => None,
        None => Some((format!("{etcd_name}={}", peer_url(settings.node_ip)), false)),
        Some(access) => {
            let tls = etcd_tls(settings)?;
            let url = peer_url(settings.node_ip);
            Some((join::join(&access.client, &tls, &settings.node_name, &etcd_name, &url).await?, true))
        }
    };
    let app = app(settings, authorities, password)?;
    Ok(Prepared { app, etcd_name, initial, joined })
}

/// `NODE-<8 hex>`, kept in `db/etcd/name`.
fn etcd_name(settings: &Settings) -> Result<String, ServerError> {
    let path = settings.layout.etcd("name");
    if let Some(name) = layout::read_if_there(&path)?.filter(|n| !n.trim().is_empty()) {
        return Ok(name.trim().to_owned());
    }
    let name = format!("{}-{}", settings.node_name, token::random_hex(4)?);
    layout::write(&path, 0o600, name.as_bytes())?;
    Ok(name)
}

/// How etcd's clients prove themselves.
fn etcd_tls(settings: &Settings) -> Result<Arc<rustls::ClientConfig>, ServerError> {
    let layout = &settings.layout;
    let identity = tls::identity(&layout.tls("etcd/client.crt"), &layout.tls("etcd/client.key"))?;
    Ok(tls::client(layout::read(&layout.tls("etcd/server-ca.crt"))?.as_bytes(), Some(identity))?)
}

fn app(settings: &Arc<Settings>, authorities: Authorities, password: String) -> Result<Arc<App>, ServerError> {
    let etcd = EtcdClient::new(Endpoint::of(settings.loopback, 2379), etcd_tls(settings)?);
    Ok(Arc::new(App {
        settings: Arc::clone(settings),
        authorities,
        password,
        etcd: Arc::new(etcd),
        up: AtomicBool::new(false),
    }))
}

/// Everything after etcd's start. Its future may be dropped at any time.
async fn serve(settings: &Arc<Settings>, prepared: Prepared, etcd: &mut EtcdProcess) -> Exit {
    match bring_up(settings, prepared, etcd).await {
        Ok(Up { leader, registered }) => {
            let tell = async {
                if registered.await.is_ok() {
                    logfmt::info("k3s is up and running");
                    notify::notify("READY=1");
                }
                std::future::pending::<()>().await;
            };
            tokio::select! {
                _ = leader => Exit::Fatal("leaderelection lost for k3s".to_owned()),
                status = etcd.exited() => Exit::Fatal(format!("etcd exited: {status}")),
                () = tell => Exit::Clean,
            }
        }
        Err(ServerError::Bootstrap(error @ BootstrapError::DifferentToken)) => Exit::Panic(error.to_string()),
        Err(error) => Exit::Fatal(format!("starting kubernetes: preparing server: {error}")),
    }
}

struct Up {
    leader: tokio::task::JoinHandle<()>,
    registered: oneshot::Receiver<()>,
}

async fn bring_up(settings: &Arc<Settings>, prepared: Prepared, etcd: &mut EtcdProcess) -> Result<Up, ServerError> {
    let Prepared { app, etcd_name, joined, .. } = prepared;
    let layout = &settings.layout;
    let port = settings.https_port;
    let listener = api::listen(settings.bind, port).await.map_err(|source| ServerError::Listen { port, source })?;
    let identity = tls::identity(&layout.tls("serving-kube-apiserver.crt"), &layout.tls("serving-kube-apiserver.key"))?;
    let server_tls = tls::server(identity, Some(app.authorities.client.pem.as_bytes()))?;
    tokio::spawn(api::serve(listener, server_tls, Arc::clone(&app)));

    wait_for_etcd(etcd).await?;
    save_bootstrap(settings, &app, joined).await?;

    let token = format!("{}\n", token::format(app.authorities.server.pem.as_bytes(), "server", &app.password));
    layout::write(&layout.server("token"), 0o600, token.as_bytes())?;
    layout::symlink(&layout.server("token"), &layout.server("node-token"))?;
    certs::write_admin_kubeconfig(settings)?;
    logfmt::info(format!(
        "Running kube-apiserver --advertise-address={} --anonymous-auth=false --etcd-servers=https://127.0.0.1:2379 --secure-port={port}",
        settings.advertise
    ));
    app.up.store(true, Ordering::Release);
    logfmt::info(format!("Node token is available at {}", layout.server("token").display()));
    logfmt::info(format!(
        "To join node to cluster: k3s agent -s https://{}:{port} -t ${{NODE_TOKEN}}",
        settings.advertise
    ));
    logfmt::info(format!("Wrote kubeconfig {}", settings.kubeconfig.display()));
    logfmt::info(format!("Run: k3s kubectl --kubeconfig {}", settings.kubeconfig.display()));

    kubelet_port(settings, &app).await?;
    let identity = format!("{}_{}", settings.node_name, token::random_hex(16)?);
    let elector = Elector::new(Arc::clone(&app.etcd), identity, settings.cluster_cidr.clone());
    let leader = tokio::spawn(elector.run());
    let (tell, registered) = oneshot::channel();
    let kubelet = Kubelet::new(Arc::clone(settings), true, Some(etcd_name), NodeApi::Local(Arc::clone(&app.etcd)));
    let (settings, etcd) = (Arc::clone(settings), Arc::clone(&app.etcd));
    let node_password = certs::node_password(&settings.layout)?;
    tokio::spawn(async move {
        if !settings.keep_host {
            host::prepare().await;
        }
        prove_node(&etcd, &settings.node_name, &node_password).await;
        kubelet.run(tell).await;
    });
    Ok(Up { leader, registered })
}

async fn wait_for_etcd(etcd: &mut EtcdProcess) -> Result<(), ServerError> {
    let mut report = tokio::time::interval(WAIT_REPORT);
    report.tick().await;
    loop {
        tokio::select! {
            ready = etcd.ready() => return Ok(ready?),
            _ = report.tick() => logfmt::info("Waiting for etcd server to become available"),
        }
    }
}

/// Stores or checks the bootstrap data; a learner is promoted first.
async fn save_bootstrap(settings: &Settings, app: &App, mut joined: Option<Access>) -> Result<(), ServerError> {
    let mut last = None;
    for _ in 0..SAVE_ATTEMPTS {
        match bootstrap::save(&app.etcd, &settings.layout, &app.password).await {
            Ok(()) => return Ok(()),
            Err(BootstrapError::Etcd(error)) if error.is_learner() => {
                if joined.is_none() {
                    let url = settings.server_url.as_ref().ok_or(ServerError::NoDatastore)?;
                    let text = settings.token.clone().unwrap_or_else(|| app.password.clone());
                    joined = Some(access::open(url, &Token::parse(&text, "server")?).await?);
                }
                if let Some(access) = &joined {
                    join::promote(&access.client, &etcd_tls(settings)?, &peer_url(settings.node_ip)).await?;
                }
            }
            // No leader at this moment, a slow disk: k3s tests its datastore until it answers.
            Err(BootstrapError::Etcd(error)) => {
                logfmt::info(format!("Failed to test data store connection: {error}"));
                last = Some(error);
                tokio::time::sleep(SAVE_RETRY).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Err(match last {
        Some(error) => BootstrapError::Etcd(error).into(),
        None => JoinError::NotPromoted("still a learner".to_owned()).into(),
    })
}

/// The kubelet's port, with a certificate of the cluster.
async fn kubelet_port(settings: &Settings, app: &App) -> Result<(), ServerError> {
    let layout = &settings.layout;
    let ips = [settings.node_ip.to_string()];
    let pem = certs::kubelet_pair(layout, &app.authorities.server, true, &settings.node_name, &ips)?;
    start_kubelet_port(settings, &pem).await
}

/// Serves port 10250 with the certificate and key in `pem`, and keeps them in `agent/`.
async fn start_kubelet_port(settings: &Settings, pem: &str) -> Result<(), ServerError> {
    let layout = &settings.layout;
    let (crt, key) = certs::split_pair(pem);
    layout::write(&layout.agent("serving-kubelet.crt"), 0o644, crt.as_bytes())?;
    layout::write(&layout.agent("serving-kubelet.key"), 0o600, key.as_bytes())?;
    let tls = tls::server(tls::identity_pem(crt.as_bytes(), key.as_bytes())?, None)?;
    let port = 10250;
    let bind = settings.bind.or((settings.loopback != std::net::Ipv4Addr::LOCALHOST).then_some(settings.node_ip));
    let listener = api::listen(bind, port).await.map_err(|source| ServerError::Listen { port, source })?;
    tokio::spawn(api::serve_kubelet(listener, tls));
    Ok(())
}

/// The agent's way to the same port.
pub(crate) async fn agent_kubelet_port(settings: &Settings, pem: &str) -> Result<(), String> {
    start_kubelet_port(settings, pem).await.map_err(|e| e.to_string())
}

/// Shows the node's password until it is accepted; a rejected node waits, as k3s's does.
async fn prove_node(etcd: &EtcdClient, name: &str, password: &str) {
    loop {
        let why = match api::check_node_password(etcd, name, password).await {
            Ok(NodePassword::Accepted) => return,
            Ok(NodePassword::Rejected) => NodePassword::rejection().to_owned(),
            Err(error) => error.to_string(),
        };
        logfmt::info(format!("Waiting to retrieve agent configuration; server is not ready: {why}"));
        tokio::time::sleep(PASSWORD_RETRY).await;
    }
}
