//! boot: overlays and seeds are laid, the VMs start, and each answers over SSH with the host key of its seed.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use camino::Utf8Path;
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use images::guest::SEED_FAILED_MARK;
use images::seed::SeedFile;
use kvm::Vm;
use tokio::sync::oneshot;
use tokio::time::MissedTickBehavior;

use crate::exit::Blame;
use crate::failure::Failure;
use crate::formation::context::{Context, Done};
use crate::guest::{
    Guest, GuestError, KeyPair, NewsSink, Sightings, SshTarget, fingerprint as fingerprint_of, generate_ed25519,
};
use crate::lab::evidence::EvidencePump;
use crate::lab::inventory::{Inventory, InventoryError};
use crate::lab::sampler::VcpuThreads;
use crate::lab::{Lab, OwnedTools, console};
use crate::plan::{NodePlan, Phase};
use crate::seedfiles::{self, NodeKeys};

/// How much of its console a guest that did not answer is quoted with.
const CONSOLE_LINES: usize = 8;

/// Who the harness is in a guest.
const USER: &str = "root";
/// How often QEMU is asked whether the guest has taken a connection: a look at a table, on the host.
const CONNECTIONS_POLL: Duration = Duration::from_millis(100);

/// A node's keys and the id of the seed they are in.
pub(super) struct NodeSeed {
    /// The key the guest's sshd will show.
    pub(super) host_key: KeyPair,
    /// The seed's id.
    pub(super) id: String,
    files: Vec<SeedFile>,
}

/// The run's own key and every node's seed.
pub(super) struct Seeds {
    client_key: KeyPair,
    nodes: BTreeMap<String, NodeSeed>,
}

impl Seeds {
    /// Makes the keys of a run and what goes into each node's seed.
    ///
    /// # Errors
    /// A bug in the harness, or no entropy.
    pub(super) fn make(cx: &Context) -> Result<Self, Failure> {
        let key = |comment: &str| {
            generate_ed25519(comment).map_err(|error| Failure::from_error(Blame::Harness, "making an SSH key", &error))
        };
        let client_key = key(&format!("harness-{}", cx.plan.lab))?;
        let mut nodes = BTreeMap::new();
        for node in &cx.plan.nodes {
            let host_key = key(&node.name)?;
            let keys = NodeKeys {
                host_private: host_key.private_openssh.clone(),
                host_public: host_key.public_openssh.clone(),
                authorized: client_key.public_openssh.clone(),
            };
            let files = seedfiles::seed_files(&cx.plan, node, &keys);
            nodes.insert(node.name.clone(), NodeSeed { host_key, id: images::seed::id(&files), files });
        }
        Ok(Self { client_key, nodes })
    }

    /// The node whose seed has the host key of this fingerprint.
    fn owner_of(&self, fingerprint: &str) -> Option<&str> {
        let shows = |seed: &NodeSeed| seed.host_key.public().is_ok_and(|key| fingerprint_of(&key) == fingerprint);
        self.nodes.iter().find(|(_, seed)| shows(seed)).map(|(name, _)| name.as_str())
    }

    /// A node's seed.
    ///
    /// # Errors
    /// A bug in the harness.
    pub(super) fn node(&self, name: &str) -> Result<&NodeSeed, Failure> {
        self.nodes.get(name).ok_or_else(|| Failure::new(Blame::Harness, format!("no seed was made for {name}")))
    }

    /// Begins the record by which the lab's guests are reached from outside this process. A run goes on without one.
    pub(super) fn inventory(&self, cx: &Context, disks: &Utf8Path) -> Option<Inventory> {
        Inventory::begin(disks, &cx.plan, cx.record.path(), &self.client_key.private_openssh)
            .map_err(|error| not_listed(cx, &error))
            .ok()
    }
}

/// Lays every node's overlay on the base image, and its seed beside it.
///
/// # Errors
/// The environment's failure.
pub(super) async fn lay_disks(
    cx: &Context,
    tools: &OwnedTools,
    seeds: &Seeds,
    base: &Utf8Path,
    disks: &Utf8Path,
) -> Result<(), Failure> {
    cx.phase(Phase::Boot, None, "seeds written and overlays laid", async {
        for node in &cx.plan.nodes {
            let seed = seeds.node(node.seed_of.as_deref().unwrap_or(&node.name))?;
            let path = disks.join(format!("{}.seed", node.name));
            images::seed::write(&seed.files, &seed.id, &path)
                .map_err(|error| Failure::from_error(Blame::Environment, "writing a seed", &error).on(&node.name))?;
            let overlay = disks.join(format!("{}.qcow2", node.name));
            images::overlay::create(base, &overlay, tools)
                .await
                .map_err(|error| Failure::from_error(Blame::Environment, "making an overlay", &error).on(&node.name))?;
        }
        Ok(Done::new((), "a disk and a seed for each node"))
    })
    .await
}

/// Starts all VMs and waits until each answers over SSH. A guest is in `guests` from the moment it answers, whatever becomes
/// of the others; `prepare` is what is done with it at once. Its journal is followed, from its boot on, when that is over, or
/// a second later.
///
/// # Errors
/// The environment's failure; a host key that is not the seed's is never retried. The failure of a preparation, at once.
pub(super) async fn boot<P>(
    cx: &Context,
    lab: &mut Lab,
    pump: &mut EvidencePump,
    seeds: &Seeds,
    inventory: Option<&Inventory>,
    guests: &mut BTreeMap<String, Guest>,
    prepare: impl Fn(Guest, Arc<Vm>) -> P,
) -> Result<(), Failure>
where
    P: Future<Output = Result<(), Failure>>,
{
    let machines = cx
        .phase(Phase::Boot, None, "QEMU to start", async {
            for node in &cx.plan.nodes {
                // QEMU writes its console and its own words there.
                cx.record.node(&node.name).map_err(|error| {
                    Failure::from_error(Blame::Environment, "making the folder of a node's records", &error)
                })?;
            }
            let vms = lab.add_vms(cx.plan.nodes.iter().map(|node| node.vm.clone()).collect()).await?;
            let mut machines = Vec::new();
            for (node, vm) in cx.plan.nodes.iter().zip(vms) {
                watch_vcpus(pump, &node.name, &vm).await;
                pump.follow_console(node.name.clone(), node.vm.console_log.clone(), SEED_FAILED_MARK);
                pump.follow_qemu(node.name.clone(), node.vm.stderr_log.clone());
                machines.push((node, vm));
            }
            let note = format!("{} machines", machines.len());
            Ok(Done::new(machines, note))
        })
        .await?;
    let recorder = pump.recorder();
    let mut booting: FuturesUnordered<_> = machines
        .into_iter()
        .map(|(node, vm)| async {
            let guest = boot_one(cx, node, &vm, seeds, inventory, recorder.ssh_news(&node.name)).await?;
            Ok::<_, Failure>((guest, vm))
        })
        .collect();
    let mut preparing = FuturesUnordered::new();
    let mut failures = Vec::new();
    loop {
        let booted = tokio::select! {
            Some(prepared) = preparing.next() => {
                prepared?;
                continue;
            }
            Some(booted) = booting.next() => booted,
            else => break,
        };
        match booted {
            Err(failure) => failures.push(failure),
            Ok((guest, vm)) => {
                // Whatever becomes of it, the preparation's end drops its half.
                let (under_way, over) = oneshot::channel::<Infallible>();
                match cx.record.node(guest.node()) {
                    Ok(dir) => pump.follow_journal(guest.clone(), dir.join("journal.log"), over.map(drop)),
                    Err(error) => cx.sink.warn(format!("the journal of {} is not kept: {error}", guest.node())),
                }
                let prepared = prepare(guest.clone(), vm);
                preparing.push(async move {
                    let _under_way = under_way;
                    prepared.await
                });
                guests.insert(guest.node().to_owned(), guest);
            }
        }
    }
    failures.into_iter().next().map_or(Ok(()), Err)
}

/// A guest that shows another node's host key was given that node's seed: it is identified before it is let in.
fn not_the_node(node: &str, other: &str) -> Failure {
    Failure::new(Blame::Environment, format!("{node} is not the node the plan says (FM-3)"))
        .because(format!("identify: {node}: the SSH host key is that of {other:?}, plan says {node:?}"))
        .hint("a seed was mixed up between nodes: look at the seeds in plan.json")
        .in_phase(Phase::Identify)
}

/// Has the VM's vCPU threads sampled; that they cannot be is no reason to end a run.
async fn watch_vcpus(pump: &EvidencePump, node: &str, vm: &Vm) {
    match vm.execute("query-cpus-fast", serde_json::Value::Null).await {
        Err(error) => tracing::warn!(node, %error, "what the VM gets of the host's CPUs is not sampled"),
        Ok(cpus) => {
            let threads = cpus.as_array().into_iter().flatten().filter_map(|cpu| cpu["thread-id"].as_u64()).collect();
            pump.watch_vcpus(VcpuThreads { node: node.to_owned(), pid: vm.pid(), threads });
        }
    }
}

async fn boot_one(
    cx: &Context,
    node: &NodePlan,
    vm: &Vm,
    seeds: &Seeds,
    inventory: Option<&Inventory>,
    news: NewsSink,
) -> Result<Guest, Failure> {
    cx.phase(Phase::Boot, Some(&node.name), "the guest to answer over SSH with its own host key", async {
        let port = vm.ssh_port().await.map_err(|error| {
            Failure::from_error(Blame::Environment, "finding the guest's forwarded SSH port", &error)
        })?;
        let seed = seeds.node(&node.name)?;
        if let Some(inventory) = inventory {
            let added = inventory.add(node, port, USER, &seed.host_key.public_openssh);
            added.unwrap_or_else(|error| not_listed(cx, &error));
        }
        let key_error = |error: GuestError| Failure::from_error(Blame::Harness, "reading an SSH key", &error);
        let target = SshTarget {
            node: node.name.clone(),
            addr: SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            user: USER.to_owned(),
            host_key: seed.host_key.public().map_err(key_error)?,
            identity: Arc::new(seeds.client_key.private().map_err(key_error)?),
            patience: cx.slowdown,
            news,
        };
        // Given up a little before the phase is: this end knows how often the guest was tried, and what came of it.
        let limit = cx.deadline(Phase::Boot).mul_f64(0.99);
        let seen = Sightings::default();
        let connected = tokio::select! {
            connected = Guest::connect_seen(target, limit, &seen) => connected,
            never = watch_from_outside(vm, &node.mgmt.interface, &seen) => match never {},
        };
        let guest = connected.map_err(|error| match &error {
            GuestError::HostKeyMismatch { offered, .. } => match seeds.owner_of(offered) {
                Some(other) => not_the_node(&node.name, other),
                None => Failure::from_error(Blame::Environment, "another host key than the seed's", &error)
                    .hint("whoever answers on the forwarded port is not the guest this run has seeded"),
            },
            _ => unanswered(node, &error),
        })?;
        Ok(Done::new(guest, "answers over SSH"))
    })
    .await
}

/// Tells who looks for the guest how far it is, as QEMU sees from outside: its network is up; it has taken a connection. Has
/// no end of its own.
async fn watch_from_outside(vm: &Vm, mgmt: &str, seen: &Sightings) -> Infallible {
    match vm.interface_up(mgmt).await {
        Ok(()) => seen.up(),
        Err(error) => {
            tracing::debug!(%error, "QEMU does not tell when the guest's network is up");
            seen.look();
        }
    }
    let mut tick = tokio::time::interval(CONNECTIONS_POLL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        match vm.ssh_connections_taken().await {
            Ok(0) => {}
            Ok(_) => break seen.taken(),
            // The search goes on without it, with one connection at a time; a QEMU that is gone is the alarm's.
            Err(error) => {
                tracing::debug!(%error, "QEMU does not tell of connections");
                break seen.taken();
            }
        }
    }
    std::future::pending().await
}

/// A guest that did not answer: what was tried, and what it was last heard to say.
fn unanswered(node: &NodePlan, error: &GuestError) -> Failure {
    let mut failure = Failure::from_error(Blame::Environment, "the guest did not answer over SSH", error);
    let said = console::last_words(&node.vm.console_log, CONSOLE_LINES);
    failure = failure.because(if said.is_empty() {
        "it has said nothing on its console".to_owned()
    } else {
        format!("the last it said on its console:\n{}", said.join("\n"))
    });
    failure.timed_out = matches!(error, GuestError::Unreachable { .. });
    failure.hint(format!("nodes/{}/console.log in the run folder shows how far the guest came", node.name))
}

fn not_listed(cx: &Context, error: &InventoryError) {
    let why = crate::error::chain_of(error).join(": ");
    cx.sink.warn(format!("`harness ps` and the commands that look inside will not know this lab: {why}"));
}
