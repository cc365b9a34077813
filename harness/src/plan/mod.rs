//! The plan: everything a run would do, as plain data, from a scenario, a profile and what is known of the host.
//!
//! Pure: no file, process, clock or random number is touched, so that the same inputs give the same plan, `harness plan`
//! works anywhere, and the rest of the harness only carries out what is written here.

mod dhcp;
mod k3s;
mod model;
mod network;
mod nodes;
mod phases;
mod render;
#[cfg(test)]
pub(crate) mod tests;
mod vcpus;

use camino::Utf8PathBuf;
use kvm::{Calibration, HostFacts, SpecError};

pub use crate::scenario::Phase;
pub use k3s::{API_PORT, TOKEN_PLACEHOLDER};
pub use model::{
    AddressPlan, BondPlan, DhcpPlan, GuestCheck, HostPlan, LinkEnd, LinkPlan, MgmtPlan, NicPlan, NodePlan,
    Oversubscription, PhasePlan, PhaseScope, Plan, PrewarmPlan, ReservationPlan,
};
pub use vcpus::auto_vcpus;

use crate::scenario::{Profile, Scenario, Vcpus};

/// Version of the plan's JSON form.
pub const SCHEMA_VERSION: u32 = 1;

/// What a plan depends on besides scenario and profile.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// The lab's id: part of MACs, machine ids and paths.
    pub lab: String,
    /// Which k3s, as every output names it.
    pub k3s: String,
    /// What the host has.
    pub host: HostFacts,
    /// How fast guests run on it, and under what acceleration.
    pub calibration: Calibration,
    /// Where things are.
    pub paths: Paths,
}

/// Where a lab's files are.
#[derive(Debug, Clone)]
pub struct Paths {
    /// The run's records: consoles and QEMU logs, below `nodes/NODE`.
    pub run: Utf8PathBuf,
    /// Overlays and seeds.
    pub disks: Utf8PathBuf,
    /// Sockets. Short: a unix socket's path has at most 107 bytes.
    pub sockets: Utf8PathBuf,
    /// The image's kernel.
    pub kernel: Utf8PathBuf,
    /// The image's initial RAM file system.
    pub initrd: Utf8PathBuf,
}

impl Paths {
    /// Stand-ins for a plan that is only shown: `<run>/…`, `<image>/vmlinuz`.
    #[must_use]
    pub fn placeholders() -> Self {
        Self {
            run: "<run>".into(),
            disks: "<disks>".into(),
            sockets: "<sockets>".into(),
            kernel: "<image>/vmlinuz".into(),
            initrd: "<image>/initrd".into(),
        }
    }
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The scenario has no node.
    #[error("scenario {0:?} has no node")]
    NoNodes(String),
    /// The scenario names a network its profile does not have.
    #[error("profile {profile:?} has no network {network:?}")]
    NoNetwork {
        /// The profile.
        profile: String,
        /// The network.
        network: String,
    },
    /// A subnet has fewer addresses than the scenario has nodes.
    #[error("network {network:?} has no address for node number {node}")]
    NoAddress {
        /// The network.
        network: String,
        /// The node, from 1.
        node: u32,
    },
    /// The profile plugs a NIC into a switch it does not have.
    #[error("profile {profile:?} has no switch {switch:?}")]
    NoSwitch {
        /// The profile.
        profile: String,
        /// The switch.
        switch: String,
    },
    /// MAC addresses could not be given out.
    #[error(transparent)]
    Mac(#[from] kvm::MacError),
    /// A VM that QEMU would not take, usually because a socket's path is too long.
    #[error("node {node:?}: {source}")]
    Vm {
        /// The node.
        node: String,
        /// What is wrong.
        source: SpecError,
    },
    /// A switch whose sockets' paths are too long.
    #[error("switch {switch:?}: {source}")]
    Switch {
        /// The switch.
        switch: String,
        /// What is wrong.
        source: SpecError,
    },
}

/// Makes the plan. Scenario and profile are expected to be checked (see [`crate::scenario::load`]).
///
/// # Errors
/// [`PlanError`] where they were not, or where the paths are too long for sockets.
pub fn plan(scenario: &Scenario, profile: &Profile, inputs: &Inputs) -> Result<Plan, PlanError> {
    let count = u32::try_from(scenario.nodes.len()).unwrap_or(u32::MAX);
    let vcpus: Vec<u32> = (scenario.nodes.iter())
        .map(|node| match node.vcpus {
            Vcpus::Auto => auto_vcpus(inputs.host.cores, count),
            Vcpus::Count(count) => count,
        })
        .collect();
    let oversubscription = {
        let total = vcpus.iter().sum();
        let all_auto = scenario.nodes.iter().all(|node| node.vcpus == Vcpus::Auto);
        vcpus::oversubscription(total, inputs.host.cores, all_auto)
    };
    let mut layout = network::layout(scenario, profile, inputs)?;
    let mut dhcp = dhcp::servers(profile, &mut layout)?;
    let nodes = nodes::nodes(scenario, profile, inputs, &vcpus, &layout)?;
    dhcp::reserve(&mut dhcp, &nodes);
    let phases = phases::phases(scenario, &nodes, inputs, &oversubscription);
    let mut warnings = network::warnings(scenario, profile);
    warnings.extend(oversubscription.warning.clone());
    for phase in &scenario.without {
        warnings.push(format!("the scenario goes without {phase}: what it prevents may happen"));
    }
    let memory_mib: u64 = nodes.iter().map(|node| u64::from(node.memory_mib)).sum();
    let available_mib = inputs.host.memory_available_mib;
    if available_mib > 0 && memory_mib > available_mib {
        warnings
            .push(format!("the nodes ask for {memory_mib} MiB of memory, the host has {available_mib} MiB to give"));
    }
    Ok(Plan {
        schema_version: SCHEMA_VERSION,
        lab: inputs.lab.clone(),
        scenario: scenario.name.clone(),
        description: scenario.description.clone(),
        profile: profile.name.clone(),
        k3s: inputs.k3s.clone(),
        airgap_images: scenario.airgap_images.clone(),
        image: scenario.image.clone(),
        expect: scenario.expect.clone(),
        host: HostPlan {
            accel: inputs.calibration.accel,
            slowdown: inputs.calibration.slowdown,
            measured: inputs.calibration.measured,
            cores: inputs.host.cores,
            memory_total_mib: inputs.host.memory_total_mib,
            memory_available_mib: available_mib,
        },
        oversubscription,
        switches: layout.switches,
        links: layout.links,
        dhcp,
        nodes,
        settle_ms: scenario.settle_ms,
        prewarm: PrewarmPlan::default(),
        without: scenario.without.clone(),
        phases,
        warnings,
    })
}
