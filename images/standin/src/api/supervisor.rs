//! k3s's own paths: what servers (`/v1-k3s/server-bootstrap`, `/db/info`) and agents
//! (`/v1-k3s/config`, certificates) fetch with the token.
//! Statuses as measured: 403 for the anonymous, 401 for wrong credentials.

use std::time::Duration;

use hyper::{HeaderMap, Response};
use ring::digest::{SHA256, digest};
use serde_json::{Value, json};

use crate::api::auth::Identity;
use crate::api::{App, Body, respond};
use crate::etcd::client::{EtcdClient, EtcdError, Expect};
use crate::token::hex;
use crate::{bootstrap, certs, logfmt, nodes};

const CALL_TIMEOUT: Duration = Duration::from_secs(10);
const REJECTED: &str = "Node password rejected, duplicate hostname or contents of '/etc/rancher/node/password' may not match server node-passwd entry, try enabling a unique node name with the --with-node-id flag";

pub(super) async fn route(app: &App, identity: &Identity, path: &str, headers: &HeaderMap) -> Response<Body> {
    let server = match identity {
        Identity::Token { server } => *server,
        Identity::Rejected => {
            logfmt::error("Failed to authenticate request: invalid username/password combination");
            return respond::empty(401);
        }
        Identity::Anonymous | Identity::Certificate(_) => return respond::empty(403),
    };
    match path {
        "/v1-k3s/server-bootstrap" | "/db/info" if !server => respond::empty(403),
        "/v1-k3s/server-bootstrap" => match bootstrap::read(&app.settings.layout) {
            Ok(data) => respond::bytes(data),
            Err(error) => respond::text(500, &error.to_string()),
        },
        "/db/info" => match app.etcd.call("/v3/cluster/member/list", &json!({}), CALL_TIMEOUT).await {
            Ok(members) => respond::json(200, &members),
            Err(error) => respond::text(500, &error.to_string()),
        },
        "/v1-k3s/config" => respond::json(200, &config(app)),
        "/v1-k3s/client-ca.crt" => respond::text(200, &app.authorities.client.pem),
        "/v1-k3s/server-ca.crt" => respond::text(200, &app.authorities.server.pem),
        "/v1-k3s/client-kubelet.crt" | "/v1-k3s/serving-kubelet.crt" => kubelet(app, path, headers).await,
        _ => respond::text(404, "404 page not found\n"),
    }
}

fn config(app: &App) -> Value {
    json!({
        "AdvertiseIP": app.settings.advertise.to_string(),
        "HTTPSPort": app.settings.https_port,
        "ClusterIPRange": app.settings.cluster_cidr,
        "ServiceIPRange": app.settings.service_cidr,
    })
}

async fn kubelet(app: &App, path: &str, headers: &HeaderMap) -> Response<Body> {
    let header = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().trim().to_owned();
    let (name, password) = (header("k3s-node-name").to_lowercase(), header("k3s-node-password"));
    if !nodes::valid_name(&name) || password.is_empty() {
        return respond::text(400, "node name or password not set\n");
    }
    match check_node_password(&app.etcd, &name, &password).await {
        Ok(NodePassword::Accepted) => {}
        Ok(NodePassword::Rejected) => return respond::text(403, REJECTED),
        Err(error) => return respond::text(500, &error.to_string()),
    }
    let serving = path == "/v1-k3s/serving-kubelet.crt";
    let ca = if serving { &app.authorities.server } else { &app.authorities.client };
    let ips: Vec<String> = header("k3s-node-ip").split(',').map(str::to_owned).collect();
    match certs::kubelet_pair(&app.settings.layout, ca, serving, &name, &ips) {
        Ok(pem) => respond::text(200, &pem),
        Err(error) => respond::text(500, &error.to_string()),
    }
}

/// Whether a node is who its name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NodePassword {
    Accepted,
    Rejected,
}

impl NodePassword {
    /// k3s's text for the rejected.
    pub(crate) fn rejection() -> &'static str {
        REJECTED
    }
}

/// The first node of a name leaves (a hash of) its password; later ones must show the same.
pub(crate) async fn check_node_password(
    etcd: &EtcdClient,
    name: &str,
    password: &str,
) -> Result<NodePassword, EtcdError> {
    let key = format!("/registry/secrets/kube-system/{name}.node-password.k3s");
    let hash = hex(digest(&SHA256, password.as_bytes()).as_ref()).into_bytes();
    if etcd.put_if(&key, &hash, Expect::Absent, CALL_TIMEOUT).await?.is_some() {
        return Ok(NodePassword::Accepted);
    }
    let stored = etcd.get(&key, CALL_TIMEOUT).await?;
    Ok(if stored.is_some_and(|kv| kv.value == hash) { NodePassword::Accepted } else { NodePassword::Rejected })
}
