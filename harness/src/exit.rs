//! Exit codes: the documented contract with whoever runs the harness.

use serde::{Deserialize, Serialize};

/// Who is to blame for how a run or a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Blame {
    /// k3s, or what was put into the image with it.
    Product,
    /// The command line, a scenario, a profile or a recipe.
    Usage,
    /// The machine the harness runs on: missing tools, starved CPUs, a full disk, killed processes.
    Environment,
    /// A bug in the harness.
    Harness,
    /// Nobody: somebody asked it to stop.
    Interrupted,
}

impl Blame {
    /// The exit code of the process: 1 product, 2 usage, 3 environment, 4 harness, 130 interrupted.
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Product => 1,
            Self::Usage => 2,
            Self::Environment => 3,
            Self::Harness => 4,
            Self::Interrupted => 130,
        }
    }

    /// The word a report uses.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Product => "product",
            Self::Usage => "configuration",
            Self::Environment => "environment",
            Self::Harness => "harness",
            Self::Interrupted => "interrupted",
        }
    }
}
