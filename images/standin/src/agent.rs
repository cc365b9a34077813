//! `k3s agent`: joins by token through a server, gets its certificates there, and keeps its node
//! object through the server's API. Waits and retries for ever, as k3s's agent does.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::access::{self, Access, AccessError};
use crate::certs::{self, CertsError};
use crate::cli::Settings;
use crate::exit::{Exit, Stop};
use crate::kubelet::{Kubelet, NodeApi};
use crate::layout::{self, FileError};
use crate::net::{Client, NetError};
use crate::tls::{self, TlsError};
use crate::token::Token;
use crate::{host, logfmt, notify, server, version_line};

const RETRY: Duration = Duration::from_secs(2);
const CONFIG_RETRY: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
enum AgentError {
    #[error(transparent)]
    Access(#[from] AccessError),
    #[error(transparent)]
    Get(#[from] access::GetError),
    #[error(transparent)]
    Certs(#[from] CertsError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Net(#[from] NetError),
}

/// Runs an agent until it is stopped or cannot start.
pub(crate) async fn run(settings: Arc<Settings>, stop: &mut Stop) -> Exit {
    tokio::select! {
        exit = work(settings) => exit,
        () = stop.wait() => {
            notify::notify("STOPPING=1");
            Exit::Clean
        }
    }
}

async fn work(settings: Arc<Settings>) -> Exit {
    let Some(url) = settings.server_url.clone() else {
        return Exit::Fatal("--server is required".to_owned());
    };
    let Some(text) = settings.token.clone() else {
        return Exit::Fatal("--token is required".to_owned());
    };
    let token = match Token::parse(&text, "node") {
        Ok(token) => Token { user: "node".to_owned(), ..token },
        Err(error) => return Exit::Fatal(error.to_string()),
    };
    logfmt::info(format!("Starting k3s agent {}", version_line()));
    for flag in &settings.without_effect {
        logfmt::warn(format!("flag --{flag} has no effect in the stand-in"));
    }
    if !settings.keep_host {
        host::prepare().await;
    }
    let access = loop {
        match access::open(&url, &token).await {
            Ok(access) => break access,
            Err(error) => logfmt::error(error.to_string()),
        }
        tokio::time::sleep(RETRY).await;
    };
    let (client, serving) = loop {
        match configure(&settings, &access, &token).await {
            Ok(configured) => break configured,
            Err(error) => {
                logfmt::info(format!("Waiting to retrieve agent configuration; server is not ready: {error}"));
            }
        }
        tokio::time::sleep(CONFIG_RETRY).await;
    };
    if let Err(error) = server::agent_kubelet_port(&settings, &serving).await {
        return Exit::Fatal(error);
    }
    let (tell, registered) = oneshot::channel();
    let kubelet = Kubelet::new(settings, false, None, NodeApi::Remote(client));
    let ready = async {
        if registered.await.is_ok() {
            logfmt::info("k3s agent is up and running");
            notify::notify("READY=1");
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = kubelet.run(tell) => Exit::Fatal("kubelet exited".to_owned()),
        () = ready => Exit::Clean,
    }
}

/// Fetches the certificates and returns a client of the API with the node's identity, and the
/// kubelet's serving certificate and key.
async fn configure(settings: &Settings, access: &Access, token: &Token) -> Result<(Client, String), AgentError> {
    let layout = &settings.layout;
    layout::make_dir(&layout.agent(""), 0o755)?;
    let node_password = certs::node_password(layout)?;
    let client = Client::new(access.endpoint.clone(), tls::client(&access.ca_pem, None)?)
        .basic_auth(&token.user, &token.password)?
        .header("k3s-node-name", &settings.node_name)?
        .header("k3s-node-password", &node_password)?
        .header("k3s-node-ip", &settings.node_ip.to_string())?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    access::get(&client, "/v1-k3s/config").await?;
    let serving = text(&access::get(&client, "/v1-k3s/serving-kubelet.crt").await?);
    let own = text(&access::get(&client, "/v1-k3s/client-kubelet.crt").await?);
    let client_ca = access::get(&client, "/v1-k3s/client-ca.crt").await?;
    layout::write(&layout.agent("server-ca.crt"), 0o644, &access.ca_pem)?;
    layout::write(&layout.agent("client-ca.crt"), 0o644, &client_ca)?;
    let (crt, key) = certs::split_pair(&own);
    layout::write(&layout.agent("client-kubelet.crt"), 0o644, crt.as_bytes())?;
    layout::write(&layout.agent("client-kubelet.key"), 0o600, key.as_bytes())?;
    let identity = tls::identity_pem(crt.as_bytes(), key.as_bytes())?;
    let api = Client::new(access.endpoint.clone(), tls::client(&access.ca_pem, Some(identity))?);
    Ok((api, serving))
}
