//! preflight: can this host do what the plan asks for? Nothing has been started yet.

use std::time::Duration;

use camino::Utf8Path;

use crate::error::NO_SPACE_HINT;
use crate::exit::Blame;
use crate::failure::Failure;
use crate::formation::context::{Context, Done, millis};
use crate::lab::OwnedTools;
use crate::lab::ledger::{Admission, Claim, Host, Ticket};
use crate::plan::{Phase, Plan};
use crate::reporter::human_ms;

/// Tools every run needs, and the Debian package each is in.
pub const RUN_TOOLS: [(&str, &str); 4] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("qemu-img", "qemu-utils"),
    ("vde_switch", "vde2"),
    ("vde_plug", "vde2"),
];

/// Disk space a node's overlay, seed and records may come to need.
pub const DISK_MIB_PER_NODE: u64 = 1024;

/// How long the host's part of the checks may take; what is left of the phase's deadline is for waiting for other labs.
const CHECKS_DEADLINE: Duration = Duration::from_secs(30);

/// Checks tools, folders and disk, then claims the lab's part of the machine; says which warnings the plan came with.
///
/// # Errors
/// What is missing and how to get it; what is in the way.
pub async fn preflight(
    cx: &Context,
    tools: &OwnedTools,
    disks: &Utf8Path,
    cache: &Utf8Path,
    admission: &Admission,
) -> Result<Ticket, Failure> {
    for warning in &cx.plan.warnings {
        cx.sink.warn(warning.clone());
    }
    cx.phase(Phase::Preflight, None, "tools, folders, disk space, and room beside other labs", async {
        let checks = host_checks(&cx.plan, tools, disks, cache);
        let free_mib = cx.guard.race("tools, folders and disk space", CHECKS_DEADLINE, checks).await?;
        let ticket = claim(cx, admission).await?;
        let claimed = ticket.claim();
        let note =
            format!("{free_mib} MiB of disk; {} vCPUs and {} MiB of memory claimed", claimed.vcpus, claimed.memory_mib);
        Ok(Done::new(ticket, note))
    })
    .await
}

async fn host_checks(plan: &Plan, tools: &OwnedTools, disks: &Utf8Path, cache: &Utf8Path) -> Result<u64, Failure> {
    missing_tools(&RUN_TOOLS)?;
    for folder in [disks, cache] {
        images::fs::probe_folder(folder, tools)
            .await
            .map_err(|error| Failure::from_error(Blame::Environment, format!("using the folder {folder}"), &error))?;
    }
    let nodes = plan.nodes.len() as u64;
    let free_mib = free_mib(disks)?;
    let wanted_mib = nodes * DISK_MIB_PER_NODE;
    if free_mib < wanted_mib {
        let nodes = if nodes == 1 { "a node".to_owned() } else { format!("{nodes} nodes") };
        return Err(Failure::environment(format!(
            "no space left for the lab: {free_mib} MiB are free in {disks}, {nodes} may need {wanted_mib} MiB"
        ))
        .hint(NO_SPACE_HINT));
    }
    Ok(free_mib)
}

/// Claims the lab's vCPUs and memory in the ledger all harnesses share, and says which labs it waits for.
async fn claim(cx: &Context, admission: &Admission) -> Result<Ticket, Failure> {
    let plan = &cx.plan;
    let claim = Claim {
        lab: plan.lab.clone(),
        scenario: plan.scenario.clone(),
        vcpus: plan.oversubscription.vcpus,
        memory_mib: plan.nodes.iter().map(|node| u64::from(node.memory_mib)).sum(),
    };
    let policy = admission.policy;
    let wait_max = human_ms(millis(policy.wait_max));
    let host = || Host::from(&kvm::host_facts());
    let waiting = |obstacle: &_| {
        cx.sink.progress(Phase::Preflight, None, format!("waiting for room, {wait_max} at most: {obstacle}"));
    };
    admission.ledger.admit(claim, policy, host, waiting).await.map_err(|error| error.to_failure())
}

/// The tools must be there.
///
/// # Errors
/// All that are missing, with the command that installs them.
pub fn missing_tools(tools: &[(&str, &str)]) -> Result<(), Failure> {
    let missing = tools.iter().filter(|(tool, _)| which::which(tool).is_err()).collect::<Vec<_>>();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.iter().map(|(tool, _)| *tool).collect::<Vec<_>>().join(", ");
    let mut packages = missing.iter().map(|(_, package)| *package).collect::<Vec<_>>();
    packages.sort_unstable();
    packages.dedup();
    Err(Failure::environment(format!("missing on this machine: {names}"))
        .hint(format!("apt-get install {}", packages.join(" "))))
}

fn free_mib(path: &Utf8Path) -> Result<u64, Failure> {
    images::fs::free_mib(path).map_err(|error| {
        Failure::from_error(Blame::Environment, format!("asking for the free space of {path}"), &error)
    })
}
