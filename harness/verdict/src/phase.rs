//! The phases of a formation, in their order: the one vocabulary of plans, events and verdicts.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A phase of a formation. The order of the variants is the order of the phases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The host can do it: tools, acceleration, speed, memory.
    Preflight,
    /// The base image is in the store; overlays and seeds are made.
    Image,
    /// The switches are up with their VLANs; and, once the guests answer, the network in them is as planned.
    Network,
    /// The VMs run, their seeds are unpacked, SSH answers.
    Boot,
    /// Each guest is the one the plan says: seed, hostname, addresses, image.
    Identify,
    /// Nothing of an earlier k3s is left in any guest.
    Sanitize,
    /// The first server forms the cluster and is Ready.
    Primary,
    /// The path from each joiner to the first server has carried TCP and TLS.
    Prewarm,
    /// The joiners join, one at a time.
    Join,
    /// etcd and the API stay good for a whole settle period after each join.
    Settle,
    /// The cluster is what the scenario asks for.
    Verify,
    /// Evidence is gathered.
    Collect,
    /// Everything the run started is gone.
    Teardown,
}

impl Phase {
    /// All phases in their order.
    pub const ALL: [Self; 13] = [
        Self::Preflight,
        Self::Image,
        Self::Network,
        Self::Boot,
        Self::Identify,
        Self::Sanitize,
        Self::Primary,
        Self::Prewarm,
        Self::Join,
        Self::Settle,
        Self::Verify,
        Self::Collect,
        Self::Teardown,
    ];

    /// The phase's name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Preflight => "preflight",
            Self::Image => "image",
            Self::Network => "network",
            Self::Boot => "boot",
            Self::Identify => "identify",
            Self::Sanitize => "sanitize",
            Self::Primary => "primary",
            Self::Prewarm => "prewarm",
            Self::Join => "join",
            Self::Settle => "settle",
            Self::Verify => "verify",
            Self::Collect => "collect",
            Self::Teardown => "teardown",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
