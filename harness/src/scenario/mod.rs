//! Scenarios and profiles: what a person writes down about a lab, read, checked, and nothing more.
//!
//! A [`Scenario`] says which nodes form a cluster and how the run is judged; the [`Profile`] it names says how their
//! network is built. Both are YAML files. Those shipped with the harness are part of the binary; a file in `./scenarios`
//! of the same name wins, and so does a path given instead of a name.
//!
//! Nothing here knows the host or the lab: that is the plan's business.

mod check;
mod load;
mod model;
mod profile;
#[cfg(test)]
mod tests;

pub use load::{Listed, LoadError, Loaded, Source, list_profiles, list_scenarios, load};
pub use model::{DEFAULT_K3S, Expect, Outcome, Role, Scenario, ScenarioNode, Vcpus};
pub use profile::{Addressing, Bond, BondMode, Network, Nic, Profile, Subnet};
pub use verdict::Phase;

/// Most nodes in one scenario.
pub const MAX_NODES: usize = 9;
/// Pod addresses of every cluster, k3s's default.
pub const POD_CIDR: &str = "10.42.0.0/16";
/// Service addresses of every cluster, k3s's default.
pub const SERVICE_CIDR: &str = "10.43.0.0/16";
/// The subnet of every node's management NIC, QEMU's user-mode default.
pub const MANAGEMENT_CIDR: &str = "10.0.2.0/24";
