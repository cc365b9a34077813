//! The Kubernetes API of the cluster, reached through a port forwarded into a server.
//!
//! Sources: the Kubernetes API conventions for list and watch
//! (<https://kubernetes.io/docs/reference/using-api/api-concepts/>), the health endpoints
//! (<https://kubernetes.io/docs/reference/using-api/health-checks/>).

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use http_body_util::{BodyExt, Limited};
use hyper::{Request, StatusCode};
use k8s_openapi::api::core::v1::Node;
use kube::api::{ListParams, WatchEvent, WatchParams};
use kube::client::Body;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use tokio::time::Instant;

/// Time for one request that is not a watch.
const REQUEST_LIMIT: Duration = Duration::from_secs(15);
/// Seconds after which a watch is asked to end; it is then taken up again with a new list.
const WATCH_SECONDS: u32 = 60;
/// How long a watch may outlive that before it is taken for dead.
const WATCH_GRACE: Duration = Duration::from_secs(5);
/// Pause after an API error: doubled up to the maximum, reset by a success.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// The longest `/readyz` answer that is read.
const READYZ_MAX_BYTES: usize = 256 * 1024;

/// A request to the Kubernetes API failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClusterError {
    /// The kubeconfig cannot be used.
    #[error("{node}: kubeconfig: {reason}")]
    Kubeconfig {
        /// The node it came from.
        node: String,
        /// Why.
        reason: String,
    },
    /// No answer that is one: refused, reset, a broken handshake, a body that ends early.
    #[error("{node}: kubernetes api: {reason}")]
    Unavailable {
        /// The node whose API was asked.
        node: String,
        /// What happened, with its causes.
        reason: String,
    },
    /// The API answered with an error.
    #[error("{node}: kubernetes api answered {code}: {message}")]
    Answered {
        /// The node whose API was asked.
        node: String,
        /// HTTP status.
        code: u16,
        /// The API's message.
        message: String,
    },
    /// No answer in time.
    #[error("{node}: kubernetes api did not answer within {:.0} s", limit.as_secs_f64())]
    TimedOut {
        /// The node whose API was asked.
        node: String,
        /// The time it had.
        limit: Duration,
    },
}

/// A node object, as far as a formation looks at it.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct NodeState {
    /// The object's name.
    pub name: String,
    /// Whether the condition `Ready` is `True`.
    pub ready: bool,
    /// The condition's reason and message when it is not, or that there is none yet.
    pub reason: String,
    /// Names after `node-role.kubernetes.io/` among the labels.
    pub roles: BTreeSet<String>,
    /// The address of type `InternalIP`.
    pub internal_ip: Option<String>,
    /// `nodeInfo.kubeletVersion`.
    pub version: Option<String>,
}

impl NodeState {
    fn of(node: &Node) -> NodeState {
        const ROLE: &str = "node-role.kubernetes.io/";
        let status = node.status.as_ref();
        let condition = status.and_then(|s| s.conditions.iter().flatten().find(|c| c.type_ == "Ready"));
        let ready = condition.is_some_and(|c| c.status == "True");
        let reason = match condition {
            Some(_) if ready => String::new(),
            Some(c) => [c.reason.as_deref(), c.message.as_deref()]
                .into_iter()
                .flatten()
                .filter(|text| !text.is_empty())
                .collect::<Vec<_>>()
                .join(": "),
            None => "no Ready condition yet".into(),
        };
        let labels = node.metadata.labels.iter().flatten();
        NodeState {
            name: node.metadata.name.clone().unwrap_or_default(),
            ready,
            reason,
            roles: labels.filter_map(|(key, _)| key.strip_prefix(ROLE)).map(str::to_owned).collect(),
            internal_ip: status
                .and_then(|s| s.addresses.iter().flatten().find(|a| a.type_ == "InternalIP"))
                .map(|a| a.address.clone()),
            version: status.and_then(|s| s.node_info.as_ref()).map(|i| i.kubelet_version.clone()),
        }
    }
}

/// A node that has to become Ready, and the roles it must have then. Further roles are no fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpectedNode {
    /// The object's name.
    pub name: String,
    /// Roles, such as `control-plane` and `etcd`.
    pub roles: BTreeSet<String>,
}

impl ExpectedNode {
    /// Whether `node` is the expected one, Ready, with all roles.
    pub fn met_by(&self, node: &NodeState) -> bool {
        node.name == self.name && node.ready && self.roles.is_subset(&node.roles)
    }
}

/// What [`ClusterApi::wait_nodes_ready`] tells on its way.
#[derive(Debug)]
pub enum WatchNote<'a> {
    /// The nodes, sorted by name, each time something that [`NodeState`] shows has changed.
    Nodes(&'a [NodeState]),
    /// The API failed; it is asked again after a pause. Told once per row of equal failures.
    Flap(&'a ClusterError),
}

/// The answer of `/readyz?verbose`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Readyz {
    /// Whether the whole check passed (HTTP 200).
    pub ok: bool,
    /// Whether the check named `etcd` passed; `None` when the answer has no such line.
    pub etcd_ok: Option<bool>,
    /// Names of the checks that failed.
    pub failing: Vec<String>,
    /// The answer itself.
    pub raw: String,
}

impl Readyz {
    /// Reads an answer: lines `[+]NAME ok` and `[-]NAME failed: reason withheld`.
    pub fn parse(ok: bool, raw: &str) -> Readyz {
        let checks = |sign: &str| -> Vec<&str> {
            raw.lines()
                .filter_map(|line| line.trim().strip_prefix(sign))
                .filter_map(|rest| rest.split_whitespace().next())
                .collect()
        };
        let (passed, failing) = (checks("[+]"), checks("[-]"));
        let etcd_ok = match (passed.contains(&"etcd"), failing.contains(&"etcd")) {
            (_, true) => Some(false),
            (true, false) => Some(true),
            (false, false) => None,
        };
        Readyz { ok, etcd_ok, failing: failing.into_iter().map(str::to_owned).collect(), raw: raw.to_owned() }
    }
}

/// The API of one server.
#[derive(Clone)]
pub struct ClusterApi {
    node: String,
    client: Client,
}

impl std::fmt::Debug for ClusterApi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClusterApi").field("node", &self.node).finish_non_exhaustive()
    }
}

impl ClusterApi {
    /// A client for the API of `node`, with the identity of its kubeconfig (`k3s.yaml`), reached at `via`.
    ///
    /// The server's address in the kubeconfig is replaced by `https://127.0.0.1:PORT`, or whatever
    /// `via` is: the certificate has to be valid for that address (k3s's is valid for 127.0.0.1).
    pub async fn new(node: &str, kubeconfig: &str, via: SocketAddr) -> Result<ClusterApi, ClusterError> {
        let unusable = |reason: String| ClusterError::Kubeconfig { node: node.to_owned(), reason };
        // The first installation in a process counts; another one by the same crates is the same provider.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let kubeconfig = Kubeconfig::from_yaml(kubeconfig).map_err(|e| unusable(chain(&e)))?;
        let mut config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
            .await
            .map_err(|e| unusable(chain(&e)))?;
        config.cluster_url = format!("https://{via}").parse().map_err(|e| unusable(format!("{via}: {e}")))?;
        config.proxy_url = None;
        config.connect_timeout = Some(REQUEST_LIMIT);
        // Retries are ours: they have to be seen.
        config.default_retry = false;
        let client = Client::try_from(config).map_err(|e| unusable(chain(&e)))?;
        Ok(ClusterApi { node: node.to_owned(), client })
    }

    /// The server's name.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// All nodes, sorted by name.
    pub async fn nodes(&self) -> Result<Vec<NodeState>, ClusterError> {
        let (nodes, _) = self.list().await?;
        Ok(nodes.into_values().collect())
    }

    /// `GET /readyz?verbose`. An API that answers that it is not ready is an `Ok` that says so.
    pub async fn readyz(&self) -> Result<Readyz, ClusterError> {
        let ask = async {
            let request =
                Request::get("/readyz?verbose").body(Body::empty()).map_err(|e| self.unavailable(e.to_string()))?;
            let response = self.client.send(request).await.map_err(|e| self.error(&e))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), READYZ_MAX_BYTES)
                .collect()
                .await
                .map_err(|e| self.unavailable(e.to_string()))?
                .to_bytes();
            let raw = String::from_utf8_lossy(&body).into_owned();
            let readyz = Readyz::parse(status == StatusCode::OK, &raw);
            // 401, 403 and the like are not a statement about readiness; a check list with 500 is.
            if readyz.ok || !readyz.failing.is_empty() {
                return Ok(readyz);
            }
            Err(ClusterError::Answered {
                node: self.node.clone(),
                code: status.as_u16(),
                message: raw.trim().chars().take(256).collect(),
            })
        };
        tokio::time::timeout(REQUEST_LIMIT, ask).await.unwrap_or_else(|_| Err(self.timed_out()))
    }

    /// Waits until every expected node is Ready with its roles, by list and watch, and returns all nodes then.
    ///
    /// Never gives up: an API that is refused, restarts, answers 5xx or ends a watch is asked again after a
    /// short pause. Callers race it with their deadline and with what else may happen. Cancel-safe.
    pub async fn wait_nodes_ready(
        &self,
        expected: &[ExpectedNode],
        mut on_note: impl FnMut(WatchNote<'_>) + Send,
    ) -> Vec<NodeState> {
        let mut pause = PAUSE_MIN;
        let mut shown: Option<Vec<NodeState>> = None;
        let mut flap = String::new();
        loop {
            let error = match self.watch().await {
                Ok(mut watched) => loop {
                    pause = PAUSE_MIN;
                    flap.clear();
                    let nodes: Vec<NodeState> = watched.nodes.values().cloned().collect();
                    let done = expected.iter().all(|e| nodes.iter().any(|n| e.met_by(n)));
                    if shown.as_ref() != Some(&nodes) {
                        on_note(WatchNote::Nodes(&nodes));
                        shown = Some(nodes.clone());
                    }
                    if done {
                        return nodes;
                    }
                    match watched.changed(self).await {
                        Ok(true) => {}
                        Ok(false) => break None,
                        Err(e) => break Some(e),
                    }
                },
                Err(e) => Some(e),
            };
            let Some(error) = error else {
                // The watch ended in order, or what it starts from is too old: list again.
                tokio::time::sleep(PAUSE_MIN).await;
                continue;
            };
            let text = error.to_string();
            if text != flap {
                tracing::debug!(node = self.node, error = text, "kubernetes api flap");
                on_note(WatchNote::Flap(&error));
                flap = text;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    async fn list(&self) -> Result<(BTreeMap<String, NodeState>, String), ClusterError> {
        let api: Api<Node> = Api::all(self.client.clone());
        let params = ListParams::default();
        let list = tokio::time::timeout(REQUEST_LIMIT, api.list(&params))
            .await
            .map_err(|_| self.timed_out())?
            .map_err(|e| self.error(&e))?;
        let version = list.metadata.resource_version.unwrap_or_default();
        let nodes = list.items.iter().map(NodeState::of).map(|n| (n.name.clone(), n)).collect();
        Ok((nodes, version))
    }

    /// Lists, and gets ready to watch from there.
    async fn watch(&self) -> Result<Watched, ClusterError> {
        let (nodes, version) = self.list().await?;
        Ok(Watched { nodes, version, events: None, end: Instant::now() })
    }

    fn error(&self, error: &kube::Error) -> ClusterError {
        match error {
            kube::Error::Api(status) => {
                ClusterError::Answered { node: self.node.clone(), code: status.code, message: status.message.clone() }
            }
            other => self.unavailable(chain(other)),
        }
    }

    fn unavailable(&self, reason: String) -> ClusterError {
        ClusterError::Unavailable { node: self.node.clone(), reason }
    }

    fn timed_out(&self) -> ClusterError {
        ClusterError::TimedOut { node: self.node.clone(), limit: REQUEST_LIMIT }
    }
}

/// The nodes, kept up to date by a watch.
struct Watched {
    nodes: BTreeMap<String, NodeState>,
    /// Where the watch starts.
    version: String,
    /// Opened when first asked for a change: a list that is good enough needs no watch.
    events: Option<BoxStream<'static, Result<WatchEvent<Node>, kube::Error>>>,
    end: Instant,
}

impl Watched {
    /// Takes in the next change. `false`: the watch has ended and has to begin again with a list.
    async fn changed(&mut self, api: &ClusterApi) -> Result<bool, ClusterError> {
        let events = match &mut self.events {
            Some(events) => events,
            none => {
                let nodes: Api<Node> = Api::all(api.client.clone());
                let params = WatchParams::default().timeout(WATCH_SECONDS);
                let opened = tokio::time::timeout(REQUEST_LIMIT, nodes.watch(&params, &self.version))
                    .await
                    .map_err(|_| api.timed_out())?
                    .map_err(|e| api.error(&e))?;
                self.end = Instant::now() + Duration::from_secs(u64::from(WATCH_SECONDS)) + WATCH_GRACE;
                none.insert(opened.boxed())
            }
        };
        loop {
            let Ok(event) = tokio::time::timeout_at(self.end, events.next()).await else { return Ok(false) };
            match event {
                None => return Ok(false),
                Some(Ok(WatchEvent::Added(node) | WatchEvent::Modified(node))) => {
                    let node = NodeState::of(&node);
                    self.nodes.insert(node.name.clone(), node);
                    return Ok(true);
                }
                Some(Ok(WatchEvent::Deleted(node))) => {
                    self.nodes.remove(&node.metadata.name.unwrap_or_default());
                    return Ok(true);
                }
                Some(Ok(WatchEvent::Bookmark(_))) => {}
                Some(Ok(WatchEvent::Error(status))) if status.code == 410 => return Ok(false),
                Some(Ok(WatchEvent::Error(status))) => {
                    return Err(ClusterError::Answered {
                        node: api.node.clone(),
                        code: status.code,
                        message: status.message,
                    });
                }
                Some(Err(e)) => return Err(api.error(&e)),
            }
        }
    }
}

/// An error with its causes, each only where the text before does not hold it already.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    for _ in 0..8 {
        let Some(next) = cause else { break };
        let more = next.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = next.source();
    }
    text
}
