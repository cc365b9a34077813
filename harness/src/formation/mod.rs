//! The formation: one run from the first check to the last cleaning-up, phase by phase.

mod boot;
mod collect;
pub mod context;
mod identify;
pub mod image;
mod join;
mod network;
pub mod preflight;
mod prewarm;
mod primary;
pub mod report;
mod sanitize;
mod standing;
mod unit;

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::future::join_all;
use images::k3s::K3sBinary;
use images::recipe::Recipe;
use images::store::Image;
use kvm::{Supervisor, Vm};
use verdict::Classifier;

use crate::event::EventSink;
use crate::exit::Blame;
use crate::failure::Failure;
use crate::guest::Guest;
use crate::lab::dhcp::Leases;
use crate::lab::evidence::EvidencePump;
use crate::lab::ledger::Admission;
use crate::lab::sampler::HostSampler;
use crate::lab::{AlarmBell, Guard, Lab, LabDirs, OwnedTools};
use crate::plan::{NodePlan, Phase, Plan};
use crate::record::{Folders, RunDir};
use context::Context;
use report::Ended;
pub use standing::Standing;

/// Everything a run stands on; all of it is there before anything is started.
pub struct Ingredients {
    /// The plan, still with stand-ins for the image's paths.
    pub plan: Plan,
    /// The recipe of the guest image.
    pub recipe: Recipe,
    /// The k3s under test.
    pub k3s: K3sBinary,
    /// Where things are kept.
    pub folders: Folders,
    /// The lab's own folders.
    pub dirs: LabDirs,
    /// The run folder.
    pub record: RunDir,
    /// Starts and ends processes.
    pub supervisor: Supervisor,
    /// Raises the alarm.
    pub bell: AlarmBell,
    /// Hears it.
    pub guard: Guard,
    /// Where events go.
    pub sink: EventSink,
    /// Classifies evidence while it happens.
    pub classifier: Classifier,
    /// Admits the lab to this machine.
    pub admission: Admission,
}

/// Runs a formation to its end, whichever it is, and takes everything down again, unless machines of it run and `keep` wants
/// to keep them.
pub async fn run(ingredients: Ingredients, keep: impl FnOnce(&Ended) -> bool) -> (Ended, Option<Standing>) {
    let Ingredients { plan, recipe, k3s, folders, dirs, record, supervisor, bell, guard, sink, classifier, admission } =
        ingredients;
    let tools = OwnedTools::new(supervisor.clone());
    let mut cx = Context::new(plan, sink.clone(), guard, record);
    let sampler = HostSampler::new(&cx.record.path().join("host.ndjson"), sink.clone());
    let mut pump = EvidencePump::new(classifier, sampler, bell.clone(), sink.clone(), cx.record.clone());
    let recorder = pump.recorder();
    let mut lab = Lab::new(supervisor.clone(), bell, sink, recorder.clone());
    let mut guests = BTreeMap::new();

    let prepared = prepare(&mut cx, &tools, &recipe, &k3s, &folders, &dirs, &admission).await;
    let mut failure = match &prepared {
        Ok(image) => form(&cx, &tools, &dirs, image, &mut lab, &mut pump, &mut guests).await.err(),
        Err(failure) => Some(failure.clone()),
    };
    if failure.is_none()
        && let Some(alarm) = cx.guard.alarm()
    {
        // Between the last look and here: a machine that died makes no passing run.
        failure = Some(alarm.to_failure().in_phase(Phase::Verify));
    }

    match &failure {
        None => cx.skip(Phase::Collect, "nothing failed"),
        Some(failure) if failure.blame == Blame::Interrupted => cx.skip(Phase::Collect, "interrupted"),
        Some(_) => {
            recorder.measure_clocks_last();
            collect::collect(&cx, &lab, &guests).await;
        }
    }
    let (classifier, restarts, host) = pump.finish().await;
    let standing = Standing { lab, guests, supervisor, dirs, ticket: cx.ticket.take() };
    let mut ended = Ended {
        failure,
        leftovers: Vec::new(),
        restarts,
        host,
        classifier,
        phases: cx.records(),
        plan: cx.plan.clone(),
        record: cx.record.clone(),
    };
    let kept = if standing.lab.has_machines() && keep(&ended) {
        cx.skip(Phase::Teardown, "the lab is kept");
        journals_end_here(&cx, standing.guests.keys());
        Some(standing)
    } else {
        ended.leftovers = teardown(&cx, standing).await;
        None
    };
    ended.phases = cx.records();
    (ended, kept)
}

/// A kept lab's guests go on talking; their journals in the run folder are the run's, and say so where they end.
fn journals_end_here<'a>(cx: &Context, nodes: impl Iterator<Item = &'a String>) {
    for node in nodes {
        let line = format!(
            "-- The run is over and this journal with it; the lab is kept: `harness logs {node} --lab {}` shows the rest. --",
            cx.plan.lab
        );
        if let Err(error) = cx.record.append_line(&format!("nodes/{node}/journal.log"), &line) {
            cx.sink.warn(crate::error::chain_of(&error).join(": "));
        }
    }
}

/// Up to the point where something long-lived is started: the image, held so that nobody removes it.
async fn prepare(
    cx: &mut Context,
    tools: &OwnedTools,
    recipe: &Recipe,
    k3s: &K3sBinary,
    folders: &Folders,
    dirs: &LabDirs,
    admission: &Admission,
) -> Result<Image, Failure> {
    keep_plan(cx);
    let store = image::open_store(folders)?;
    cx.ticket = Some(preflight::preflight(cx, tools, dirs.disks(), &folders.cache, admission).await?);
    let image = image::image(cx, &store, tools, recipe, k3s).await?;
    for node in &mut cx.plan.nodes {
        node.vm.kernel.clone_from(&image.kernel);
        node.vm.initrd.clone_from(&image.initrd);
        node.argv = kvm::argv(&node.vm);
    }
    keep_plan(cx);
    Ok(image)
}

/// Written before the first phase, and again when the image's paths are known.
fn keep_plan(cx: &Context) {
    if let Err(error) = cx.record.write_json("plan.json", &cx.plan) {
        cx.sink.warn(format!("the plan is not kept: {error}"));
    }
}

/// From the switches to the verified cluster.
async fn form(
    cx: &Context,
    tools: &OwnedTools,
    dirs: &LabDirs,
    image: &Image,
    lab: &mut Lab,
    pump: &mut EvidencePump,
    guests: &mut BTreeMap<String, Guest>,
) -> Result<(), Failure> {
    let leases = network::start_switches(cx, lab).await?;
    let seeds = boot::Seeds::make(cx)?;
    boot::lay_disks(cx, tools, &seeds, &image.root, dirs.disks()).await?;
    let inventory = seeds.inventory(cx, dirs.disks());
    // Each node by itself: what is done on one while another still boots costs no time.
    let prepare = |guest, vm| prepare_node(cx, guest, vm, &seeds, &image.id, &leases);
    boot::boot(cx, lab, pump, &seeds, inventory.as_ref(), guests, prepare).await?;
    let guests = &*guests;
    cx.goes_without(Phase::Sanitize);
    network::check_paths(cx, guests).await?;

    let guest = |node: &NodePlan| {
        guests
            .get(&node.name)
            .cloned()
            .ok_or_else(|| Failure::new(Blame::Harness, format!("{} was never reached", node.name)))
    };
    let first = cx.first_server()?;
    let mut cluster = primary::primary(cx, &guest(first)?, pump.subscribe()).await?;
    if cx.plan.nodes.len() == 1 {
        cx.skip(Phase::Prewarm, "a cluster of one");
        cx.skip(Phase::Join, "a cluster of one");
        join::settle(cx, &cluster, &first.name).await?;
    }
    for node in cx.plan.joiners() {
        let joiner = guest(node)?;
        if !cx.goes_without(Phase::Prewarm) {
            prewarm::prewarm(cx, &joiner).await?;
        }
        cluster.servers.extend(join::join(cx, &joiner, node, &cluster, pump.subscribe()).await?);
        if !cx.goes_without(Phase::Settle) {
            join::settle(cx, &cluster, &node.name).await?;
        }
    }
    join::verify(cx, &cluster).await
}

/// A node that has answered: its interfaces, that it is who it should be, and that nothing of an earlier k3s is on it. The
/// last at the same time: who shows the host key of its seed is one of this lab's, and a k3s started by its image is best
/// stopped at once.
async fn prepare_node(
    cx: &Context,
    guest: Guest,
    vm: Arc<Vm>,
    seeds: &boot::Seeds,
    image: &str,
    leases: &[Leases],
) -> Result<(), Failure> {
    let name = guest.node();
    let node =
        cx.plan.node(name).ok_or_else(|| Failure::new(Blame::Harness, format!("the plan has no node {name}")))?;
    let expected = identify::Identity { seed: seeds.node(name)?.id.clone(), image: image.to_owned() };
    let known = async {
        let said = network::check_interfaces(cx, &guest, node, leases, nics_up(&vm, node)).await?;
        identify::identify(cx, &said, node, &expected).await
    };
    let clean = async {
        if cx.plan.without.contains(&Phase::Sanitize) { Ok(()) } else { sanitize::sanitize(cx, &guest).await }
    };
    tokio::try_join!(known, clean).map(drop)
}

/// Completes when the guest has brought up each of its NICs that has a cable.
async fn nics_up(vm: &Vm, node: &NodePlan) {
    let plugged = node.vm.nics.iter().filter(|nic| !nic.unplugged);
    // A VM that does not tell is no reason to wait.
    join_all(plugged.map(|nic| vm.interface_up(&nic.id))).await;
}

/// Takes everything down; what would not go is returned in words.
async fn teardown(cx: &Context, standing: Standing) -> Vec<String> {
    let began = cx.begin(Phase::Teardown, "every process and file of the lab to be gone");
    let leftovers = standing.teardown().await;
    let note = if leftovers.is_empty() { "nothing is left".to_owned() } else { leftovers.join("; ") };
    cx.end(Phase::Teardown, began, leftovers.is_empty(), note);
    leftovers
}
