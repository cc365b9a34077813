//! primary: the first server initialises the cluster and is Ready.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast;

use crate::cluster::{ClusterApi, EtcdError, EtcdPeer, ExpectedNode, NodeState, WatchNote};
use crate::exit::Blame;
use crate::failure::Failure;
use crate::formation::context::{Context, Done};
use crate::formation::unit;
use crate::guest::{Forward, Guest, GuestError};
use crate::lab::evidence::NodeEntry;
use crate::plan::{NodePlan, Phase};
use crate::redact::redact;
use crate::scenario::Role;

/// Where k3s leaves the token others join with.
const TOKEN: &str = "/var/lib/rancher/k3s/server/token";
/// Where k3s leaves the administrator's kubeconfig.
const KUBECONFIG: &str = "/etc/rancher/k3s/k3s.yaml";

/// Pause before a guest that was away is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// The way into a cluster that has been initialised.
pub(super) struct Cluster<'a> {
    /// The token further nodes join with. Never in a record.
    pub(super) token: String,
    /// The administrator's kubeconfig, valid for every server: they share their authorities.
    pub(super) kubeconfig: String,
    /// The servers that run, the first of them first.
    pub(super) servers: Vec<Server<'a>>,
}

impl Cluster<'_> {
    /// The first server's API.
    pub(super) fn api(&self) -> &ClusterApi {
        &self.servers[0].api
    }
}

/// What is open on a server that runs.
pub(super) struct Server<'a> {
    pub(super) node: &'a NodePlan,
    pub(super) guest: Guest,
    /// Its own API.
    pub(super) api: ClusterApi,
    /// Its etcd, asked as itself: etcd compares the addresses in a peer's certificate with where it is asked from.
    pub(super) etcd: EtcdPeer,
    _forward: Forward,
}

impl<'a> Server<'a> {
    /// Opens the ways to a server of which k3s says that it is up.
    ///
    /// # Errors
    /// The environment's failure, or the product's where it left no certificates or none that can be used.
    pub(super) async fn open(
        cx: &Context,
        guest: &Guest,
        node: &'a NodePlan,
        kubeconfig: &str,
    ) -> Result<Self, Failure> {
        let etcd = loop {
            match EtcdPeer::load(guest, cx.limit(Duration::from_secs(10))).await {
                Ok(etcd) => break etcd,
                // One hiccup decides nothing while a kubelet gets ready; the phase's deadline ends it.
                Err(error @ EtcdError::Guest(GuestError::Deadline { .. } | GuestError::ConnectionLost { .. })) => {
                    tracing::debug!(node = guest.node(), %error, "the certificates of etcd are asked for again");
                    tokio::time::sleep(ASK_AGAIN).await;
                }
                Err(error) => {
                    return Err(Failure::from_error(Blame::Product, "reading the certificates of etcd", &error));
                }
            }
        };
        // Its own loopback is what the API's certificate is valid for.
        let forward = Forward::open(guest.clone(), "127.0.0.1", 6443)
            .await
            .map_err(|error| Failure::from_error(Blame::Environment, "opening the way to the API", &error))?;
        let api = ClusterApi::new(guest.node(), kubeconfig, forward.local_addr())
            .await
            .map_err(|error| Failure::from_error(Blame::Product, "using the kubeconfig k3s wrote", &error))?;
        Ok(Server { node, guest: guest.clone(), api, etcd, _forward: forward })
    }
}

/// Starts the first server and waits until its node is Ready with its roles.
///
/// # Errors
/// The product's or the environment's failure.
pub(super) async fn primary<'a>(
    cx: &'a Context,
    guest: &Guest,
    entries: broadcast::Receiver<Arc<NodeEntry>>,
) -> Result<Cluster<'a>, Failure> {
    let node = cx.first_server()?;
    cx.phase(Phase::Primary, Some(&node.name), format!("{} up and the node Ready", node.k3s_unit), async {
        let mut watch = unit::start(cx, guest, node, None, entries).await?;
        watch.started().await?;
        cx.progress(Phase::Primary, Some(&node.name), "k3s says it is up; waiting for the node to be Ready");
        let wanted = [expected(node)];
        let ready = async {
            let [token, kubeconfig] = guest
                .read_texts(&[TOKEN.to_owned(), KUBECONFIG.to_owned()], cx.limit(Duration::from_secs(10)))
                .await
                .map_err(|error| Failure::from_error(Blame::Product, "reading what k3s leaves for joiners", &error))?;
            let token = token.trim().to_owned();
            if token.is_empty() {
                return Err(Failure::product(format!("{TOKEN} is empty")));
            }
            let server = Server::open(cx, guest, node, &kubeconfig).await?;
            let nodes = wait_ready(cx, Phase::Primary, &server.api, &wanted).await;
            Ok((Cluster { token, kubeconfig, servers: vec![server] }, nodes))
        };
        let (cluster, nodes) = tokio::select! {
            ready = ready => ready?,
            failure = watch.broken() => return Err(failure),
        };
        Ok(Done::new(cluster, format!("{}{}", describe(&nodes), restarts_note(watch.exits))))
    })
    .await
}

/// Waits by list and watch until the nodes are Ready with their roles, saying on the way what is missing.
pub(super) async fn wait_ready(
    cx: &Context,
    phase: Phase,
    api: &ClusterApi,
    wanted: &[ExpectedNode],
) -> Vec<NodeState> {
    api.wait_nodes_ready(wanted, |note| {
        let message = match note {
            WatchNote::Nodes(nodes) => describe(nodes),
            WatchNote::Flap(error) => format!("the API is away and asked again: {error}"),
        };
        let node = match wanted {
            [one] => Some(one.name.as_str()),
            _ => None,
        };
        cx.progress(phase, node, redact(&message));
    })
    .await
}

/// The node object a plan's node must become.
#[must_use]
pub(super) fn expected(node: &NodePlan) -> ExpectedNode {
    let roles = if node.role == Role::Server { &["control-plane", "etcd"][..] } else { &[] };
    ExpectedNode { name: node.name.clone(), roles: roles.iter().map(|&role| role.to_owned()).collect() }
}

/// Nodes in a few words: `server-1 Ready (control-plane, etcd), server-2 NotReady: …`.
#[must_use]
pub(super) fn describe(nodes: &[NodeState]) -> String {
    if nodes.is_empty() {
        return "no node has registered yet".to_owned();
    }
    let one = |node: &NodeState| {
        let roles = node.roles.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        if node.ready && roles.is_empty() {
            format!("{} Ready", node.name)
        } else if node.ready {
            format!("{} Ready ({roles})", node.name)
        } else {
            format!("{} NotReady: {}", node.name, node.reason)
        }
    };
    nodes.iter().map(one).collect::<Vec<_>>().join("; ")
}

/// `; k3s exited N times on the way` where it did.
#[must_use]
pub(super) fn restarts_note(exits: u32) -> String {
    match exits {
        0 => String::new(),
        1 => "; k3s exited once on the way and recovered".to_owned(),
        n => format!("; k3s exited {n} times on the way and recovered"),
    }
}
