//! The HTTPS API on port 6443: k3s's supervisor paths and the part of Kubernetes' API that deals
//! with nodes and health.

pub(crate) mod auth;
mod health;
mod kube;
mod respond;
mod selector;
mod supervisor;
mod watch;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

use crate::certs::Authorities;
use crate::cli::Settings;
use crate::der;
use crate::etcd::client::EtcdClient;
use crate::logfmt;

pub(crate) use respond::Body;
pub(crate) use supervisor::{NodePassword, check_node_password};

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
const MAX_CONNECTIONS: usize = 256;

/// What the handlers work with.
pub(crate) struct App {
    pub(crate) settings: Arc<Settings>,
    pub(crate) authorities: Authorities,
    pub(crate) password: String,
    pub(crate) etcd: Arc<EtcdClient>,
    /// Until the datastore is there, everything is answered with `starting`.
    pub(crate) up: AtomicBool,
}

/// Listens on all addresses (IPv6 sockets take IPv4 too), or on one.
pub(crate) async fn listen(bind: Option<IpAddr>, port: u16) -> std::io::Result<TcpListener> {
    match bind {
        Some(ip) => TcpListener::bind(SocketAddr::new(ip, port)).await,
        None => match TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))).await {
            Ok(listener) => Ok(listener),
            // A kernel without IPv6.
            Err(e) if e.kind() != std::io::ErrorKind::AddrInUse => {
                TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))).await
            }
            Err(e) => Err(e),
        },
    }
}

/// Serves the API for ever.
pub(crate) async fn serve(listener: TcpListener, tls: Arc<ServerConfig>, app: Arc<App>) {
    accept_loop(listener, tls, move |request, subject| {
        let app = Arc::clone(&app);
        async move { route(&app, request, subject).await }
    })
    .await;
}

/// Serves the kubelet's port 10250: nobody is authorised there, which is what a client without a
/// certificate sees of a real one.
pub(crate) async fn serve_kubelet(listener: TcpListener, tls: Arc<ServerConfig>) {
    accept_loop(listener, tls, |_, _| async { respond::text(401, "Unauthorized") }).await;
}

async fn accept_loop<H, F>(listener: TcpListener, tls: Arc<ServerConfig>, handler: H)
where
    H: Fn(Request<Incoming>, Option<der::Subject>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let acceptor = TlsAcceptor::from(tls);
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let (tcp, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                logfmt::error(format!("accept: {error}"));
                // Out of descriptors: accepting again at once would spin.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let _ = tcp.set_nodelay(true);
        let (acceptor, handler) = (acceptor.clone(), handler.clone());
        tokio::spawn(async move {
            let _slot = slot;
            let stream = match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(tcp)).await {
                Ok(Ok(stream)) => stream,
                Ok(Err(error)) => {
                    logfmt::info(format!("Cluster-Http-Server http: TLS handshake error from {peer}: {error}"));
                    return;
                }
                Err(_) => return,
            };
            let chain = stream.get_ref().1.peer_certificates();
            let subject = chain.and_then(|c| c.first()).and_then(|c| der::subject(c));
            let service = service_fn(move |request| {
                let answer = handler(request, subject.clone());
                async move { Ok::<_, std::convert::Infallible>(answer.await) }
            });
            // A connection's errors are its client's.
            let _ = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn route(app: &Arc<App>, request: Request<Incoming>, subject: Option<der::Subject>) -> Response<Body> {
    if !app.up.load(Ordering::Acquire) {
        return respond::text(503, "starting");
    }
    let (parts, body) = request.into_parts();
    let path = parts.uri.path().to_owned();
    let query = selector::Query::parse(parts.uri.query().unwrap_or_default());
    let get = parts.method == Method::GET || parts.method == Method::HEAD;
    match path.as_str() {
        "/ping" if get => return respond::text(200, "pong"),
        "/cacerts" if get => return respond::text(200, &app.authorities.server.pem),
        _ => {}
    }
    let identity = auth::identify(app, &parts.headers, subject);
    if path.starts_with("/v1-k3s/") || path.starts_with("/db/") {
        return supervisor::route(app, &identity, &path, &parts.headers).await;
    }
    if !identity.authenticated() {
        return respond::unauthorized();
    }
    if let Some(kind) = health::Kind::of(&path) {
        return health::route(app, kind, &path, &query).await;
    }
    kube::route(app, &parts.method, &path, &query, body).await
}
