//! Becoming a member of a running cluster: the members' addresses from a server's `/db/info`, the
//! member added as a learner through one of them, promoted when it has caught up.
//! Source: k3s `pkg/etcd/etcd.go` (`join`, `manageLearners`).

use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;

use crate::etcd::client::{EtcdClient, EtcdError, Member, members};
use crate::logfmt;
use crate::net::{Client, Endpoint, NetError};

const CALL_TIMEOUT: Duration = Duration::from_secs(20);
/// How often the leader of k3s looks whether a learner can be promoted.
const PROMOTE_INTERVAL: Duration = Duration::from_secs(1);
/// A learner that has not caught up by then never will.
const PROMOTE_ATTEMPTS: u32 = 600;

/// Why a server cannot join.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JoinError {
    #[error("{url}: {status}")]
    Status { url: String, status: String },
    #[error("Get \"{url}\": {source}")]
    Net { url: String, source: NetError },
    #[error("no etcd member can be reached: {0}")]
    NoMember(String),
    #[error("duplicate node name found, please use a unique name for this node")]
    DuplicateName,
    #[error(transparent)]
    Etcd(#[from] EtcdError),
    #[error("etcd learner was not promoted: {0}")]
    NotPromoted(String),
}

/// The members as a server of the cluster sees them.
async fn db_info(server: &Client) -> Result<Vec<Member>, JoinError> {
    let url = format!("https://{}/db/info", server.endpoint);
    let answer =
        server.get("/db/info", CALL_TIMEOUT).await.map_err(|source| JoinError::Net { url: url.clone(), source })?;
    if !answer.status.is_success() {
        return Err(JoinError::Status { url, status: answer.status.to_string() });
    }
    let value = serde_json::from_slice(&answer.body).map_err(|e| EtcdError::Answer(e.to_string()))?;
    Ok(members(&value))
}

/// A voting member that answers, but not the one with `own_peer_url`.
async fn reach(
    server: &Client,
    tls: &Arc<ClientConfig>,
    own_peer_url: &str,
) -> Result<(EtcdClient, Vec<Member>), JoinError> {
    let mut last = "the cluster has no member with a client address".to_owned();
    let known = db_info(server).await?;
    let others = known.iter().filter(|m| !m.learner && !m.peer_urls.iter().any(|u| u == own_peer_url));
    for url in others.flat_map(|m| &m.client_urls) {
        let client = match Endpoint::parse(url, 2379) {
            Ok(endpoint) => EtcdClient::new(endpoint, Arc::clone(tls)),
            Err(e) => {
                last = e.to_string();
                continue;
            }
        };
        match client.member_list(CALL_TIMEOUT).await {
            Ok(list) => return Ok((client, list)),
            Err(e) => last = format!("{url}: {e}"),
        }
    }
    Err(JoinError::NoMember(last))
}

/// Adds this server to the cluster and returns the `initial-cluster` to start etcd with.
pub(crate) async fn join(
    server: &Client,
    tls: &Arc<ClientConfig>,
    node_name: &str,
    etcd_name: &str,
    peer_url: &str,
) -> Result<String, JoinError> {
    let (client, list) = reach(server, tls, peer_url).await?;
    let mut cluster = Vec::new();
    let mut add = true;
    for member in &list {
        let ours = member.peer_urls.iter().any(|u| u == peer_url);
        if ours && (member.name.is_empty() || member.name == etcd_name) {
            // Added before, never started: the place is ours.
            add = false;
            continue;
        }
        if member.name.rsplit_once('-').is_some_and(|(name, _)| name == node_name) {
            return Err(JoinError::DuplicateName);
        }
        for url in &member.peer_urls {
            cluster.push(format!("{}={url}", member.name));
        }
    }
    logfmt::info(format!("Adding {peer_url} to etcd cluster {cluster:?}"));
    if add {
        client.member_add_learner(peer_url, CALL_TIMEOUT).await?;
    }
    cluster.push(format!("{etcd_name}={peer_url}"));
    Ok(cluster.join(","))
}

/// Gives this member its vote as soon as the cluster finds it in step.
pub(crate) async fn promote(server: &Client, tls: &Arc<ClientConfig>, peer_url: &str) -> Result<(), JoinError> {
    let mut last = String::new();
    for _ in 0..PROMOTE_ATTEMPTS {
        match try_promote(server, tls, peer_url).await {
            Ok(()) => return Ok(()),
            Err(error) => {
                let text = error.to_string();
                if text != last {
                    logfmt::info(format!("Waiting for this etcd learner to be promoted: {text}"));
                }
                last = text;
            }
        }
        tokio::time::sleep(PROMOTE_INTERVAL).await;
    }
    Err(JoinError::NotPromoted(last))
}

async fn try_promote(server: &Client, tls: &Arc<ClientConfig>, peer_url: &str) -> Result<(), JoinError> {
    let (client, list) = reach(server, tls, peer_url).await?;
    let own = list
        .iter()
        .find(|m| m.peer_urls.iter().any(|u| u == peer_url))
        .ok_or_else(|| JoinError::NoMember(format!("{peer_url} is not a member")))?;
    if own.learner {
        client.member_promote(&own.id, CALL_TIMEOUT).await?;
    }
    Ok(())
}
