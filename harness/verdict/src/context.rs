//! What is known about a run besides its log lines.

use serde::{Deserialize, Serialize};

use crate::catalogue::Attribution;
use crate::phase::Phase;

/// Whether the thing under test worked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// Every phase passed.
    Passed,
    /// A phase failed.
    Failed,
    /// Nobody said; a log from elsewhere.
    #[default]
    Unknown,
}

/// The host, as measured during the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HostFacts {
    /// CPUs the host has.
    pub cores: Option<u32>,
    /// vCPUs all VMs of all labs on the host asked for together.
    pub vcpus_asked: Option<u32>,
    /// Highest `/proc/pressure/cpu` `some avg10` seen, percent.
    pub cpu_pressure_some_avg10: Option<f64>,
    /// Highest 1-minute load seen.
    pub load_1m: Option<f64>,
    /// Lowest available memory seen, MiB.
    pub memory_available_mib: Option<u64>,
    /// How the guests were run: `kvm` or `tcg`.
    pub accel: Option<String>,
}

/// One VM, as measured from the host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct VmFacts {
    /// The node.
    pub name: String,
    /// vCPUs it asked for.
    pub vcpus: u32,
    /// Share of its runnable time its vCPU threads waited for a host CPU, 0–100 (schedstat: wait / (run + wait)).
    pub cpu_wait_pct: Option<f64>,
    /// Share of host CPU time it got, percent of one CPU.
    pub cpu_got_pct: Option<f64>,
}

/// How often systemd restarted a unit on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct UnitRestarts {
    /// The node.
    pub node: String,
    /// The unit, such as `k3s-server.service`.
    pub unit: String,
    /// `NRestarts`.
    pub restarts: u32,
}

/// What is known when a verdict is asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Context {
    /// Did it work?
    pub health: Health,
    /// The phase that failed.
    pub phase: Option<Phase>,
    /// The node it failed on.
    pub node: Option<String>,
    /// Who the step that failed points to, without having looked at the evidence.
    pub blame: Option<Attribution>,
    /// What the harness says itself, outermost first ("join of server-2 did not finish in 300 s").
    pub errors: Vec<String>,
    /// The host.
    pub host: Option<HostFacts>,
    /// The VMs.
    pub vms: Vec<VmFacts>,
    /// Unit restarts.
    pub restarts: Vec<UnitRestarts>,
}
