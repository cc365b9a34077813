//! join: one joiner at a time; settle: the cluster stays good for a whole period after each.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::join_all;
use tokio::sync::broadcast;

use crate::cluster::{self, NodeState};
use crate::failure::Failure;
use crate::formation::context::{Context, Done, millis};
use crate::formation::primary::{Cluster, Server, describe, expected, restarts_note, wait_ready};
use crate::formation::unit;
use crate::guest::Guest;
use crate::lab::evidence::NodeEntry;
use crate::plan::{NodePlan, Phase};
use crate::reporter::human_ms;
use crate::scenario::Role;

/// How often the cluster is looked at while it settles, from the host.
const LOOK_EVERY: Duration = Duration::from_millis(1000);

/// Starts k3s on a joiner and waits until its node is Ready with its roles, as the first server sees it. `None` for an agent.
///
/// # Errors
/// The product's or the environment's failure.
pub(super) async fn join<'a>(
    cx: &Context,
    guest: &Guest,
    node: &'a NodePlan,
    cluster: &Cluster<'_>,
    entries: broadcast::Receiver<Arc<NodeEntry>>,
) -> Result<Option<Server<'a>>, Failure> {
    cx.phase(Phase::Join, Some(&node.name), format!("{} up and the node Ready", node.k3s_unit), async {
        let mut watch = unit::start(cx, guest, node, Some(&cluster.token), entries).await?;
        watch.started().await?;
        cx.progress(Phase::Join, Some(&node.name), "k3s says it is up; waiting for the node to be Ready");
        let wanted = [expected(node)];
        let ready = async { Ok(wait_ready(cx, Phase::Join, cluster.api(), &wanted).await) };
        // While its kubelet gets ready there is time to open what settle and verify need.
        let opened = async {
            match node.role {
                Role::Server => Server::open(cx, guest, node, &cluster.kubeconfig).await.map(Some),
                Role::Agent => Ok(None),
            }
        };
        let (nodes, server) = tokio::select! {
            both = async { tokio::try_join!(ready, opened) } => both?,
            failure = watch.broken() => return Err(failure),
        };
        Ok(Done::new(server, format!("{}{}", describe(&nodes), restarts_note(watch.exits))))
    })
    .await
}

/// Watches etcd and `/readyz` of every server until they were good for a whole settle period in a row.
///
/// # Errors
/// What was last wrong, when the deadline is over.
pub(super) async fn settle(cx: &Context, cluster: &Cluster<'_>, after: &str) -> Result<(), Failure> {
    let period = Duration::from_millis(cx.plan.settle_ms);
    let waits_for = format!("etcd and /readyz good for {} in a row", human_ms(millis(period)));
    cx.phase(Phase::Settle, Some(after), waits_for, async {
        let mut good_since: Option<Instant> = None;
        let mut disturbances = 0_u32;
        let mut next = Instant::now();
        loop {
            tokio::time::sleep_until(next.into()).await;
            let mut trouble = None;
            for server in &cluster.servers {
                if let Err(why) = look(cx, server).await {
                    trouble = Some(format!("{}: {why}", server.node.name));
                    break;
                }
            }
            next = Instant::now() + LOOK_EVERY;
            match trouble {
                None => {
                    let since = *good_since.get_or_insert_with(Instant::now);
                    if since.elapsed() >= period {
                        let note =
                            format!("good on {} for {}", names(&cluster.servers), human_ms(millis(since.elapsed())));
                        return Ok(Done::new((), note).after(disturbances + 1));
                    }
                    // The last look is at the end of the period, not a second later.
                    next = next.min(since + period);
                }
                Some(why) => {
                    if good_since.take().is_some() || disturbances == 0 {
                        disturbances += 1;
                    }
                    cx.progress(Phase::Settle, Some(after), format!("not settled: {why}"));
                }
            }
        }
    })
    .await
}

fn names(servers: &[Server<'_>]) -> String {
    servers.iter().map(|server| server.node.name.as_str()).collect::<Vec<_>>().join(", ")
}

/// One look at one server.
async fn look(cx: &Context, server: &Server<'_>) -> Result<(), String> {
    let limit = cx.limit(Duration::from_secs(3));
    let health = async { cluster::health(&server.guest, limit).await.map_err(|error| error.to_string()) };
    let readyz = async { server.api.readyz().await.map_err(|error| error.to_string()) };
    let (health, readyz) = tokio::try_join!(health, readyz)?;
    if !health.healthy {
        return Err(format!("etcd is unhealthy: {}", health.reason));
    }
    if !readyz.ok {
        return Err(format!("/readyz fails {}", readyz.failing.join(", ")));
    }
    Ok(())
}

/// verify: all nodes Ready with the expected roles, etcd members as planned, `/readyz` good on every server.
///
/// # Errors
/// What is not as planned.
pub(super) async fn verify(cx: &Context, cluster: &Cluster<'_>) -> Result<(), Failure> {
    cx.phase(Phase::Verify, None, "all nodes Ready, etcd members as planned, /readyz good on every server", async {
        // The nodes first: however long they take, the servers are good at the end of it.
        let nodes = verify_nodes(cx, cluster).await?;
        join_all(cluster.servers.iter().map(|server| verify_server(cx, server))).await;
        let members = match cluster.servers.len() {
            1 => "1 etcd member".to_owned(),
            many => format!("{many} etcd members"),
        };
        Ok(Done::new((), format!("{}; {members}", describe(&nodes))))
    })
    .await
}

/// The nodes of the cluster are those of the plan, Ready, with their roles and addresses.
async fn verify_nodes(cx: &Context, cluster: &Cluster<'_>) -> Result<Vec<NodeState>, Failure> {
    let wanted = cx.plan.nodes.iter().map(expected).collect::<Vec<_>>();
    let nodes = wait_ready(cx, Phase::Verify, cluster.api(), &wanted).await;
    if let Some(stranger) = nodes.iter().find(|node| cx.plan.node(&node.name).is_none()) {
        return Err(Failure::product(format!("the cluster has a node the plan does not know: {}", stranger.name)));
    }
    for node in &cx.plan.nodes {
        let seen = nodes.iter().find(|seen| seen.name == node.name).and_then(|seen| seen.internal_ip.clone());
        if seen.as_deref() != Some(node.cluster_ip.to_string().as_str()) {
            let seen = seen.unwrap_or_else(|| "none".to_owned());
            return Err(Failure::product(format!(
                "InternalIP of {} is {seen}, plan says {}",
                node.name, node.cluster_ip
            )));
        }
    }
    Ok(nodes)
}

/// One server is in order: by its own API, and by its own etcd. One hiccup after minutes of success decides nothing; what is
/// wrong at the deadline does.
async fn verify_server(cx: &Context, server: &Server<'_>) {
    let mut tick = tokio::time::interval(LOOK_EVERY);
    loop {
        tick.tick().await;
        match tokio::try_join!(look(cx, server), check_members(cx, server)) {
            Ok(_) => return,
            Err(why) => cx.progress(Phase::Verify, None, format!("{}: {why}", server.node.name)),
        }
    }
}

/// The etcd members one server knows are the plan's servers, all voting.
async fn check_members(cx: &Context, server: &Server<'_>) -> Result<(), String> {
    let node = server.node;
    let limit = cx.limit(Duration::from_secs(5));
    let members = server
        .etcd
        .members(IpAddr::from(node.cluster_ip), limit)
        .await
        .map_err(|error| format!("listing the etcd members: {error}"))?;
    let mut seen = members.iter().map(|member| (member.peer_urls.join(","), member.is_learner)).collect::<Vec<_>>();
    seen.sort();
    let mut planned =
        cx.plan.servers().map(|server| (format!("https://{}:2380", server.cluster_ip), false)).collect::<Vec<_>>();
    planned.sort();
    if seen == planned {
        return Ok(());
    }
    let show = |members: &[(String, bool)]| {
        members
            .iter()
            .map(|(url, learner)| format!("{url}{}", if *learner { " (learner)" } else { "" }))
            .collect::<Vec<_>>()
            .join(", ")
    };
    Err(format!("etcd members of {} are {}, plan says {}", node.name, show(&seen), show(&planned)))
}
