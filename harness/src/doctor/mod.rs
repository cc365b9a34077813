//! `harness doctor`: what this machine has and lacks, what that means for a run, and what mends it.
//!
//! [`look`] asks the machine and judges nothing; [`diagnose`] judges what was seen and asks nothing, so that every
//! judgement can be tested on figures of other machines.

mod judge;
mod seen;
#[cfg(test)]
mod tests;
mod tools;

use std::fmt;

use serde::Serialize;

pub use judge::diagnose;
pub use seen::{AccelSeen, FolderSeen, KvmDevice, Need, Seen, UserNamespaces, look};
pub use tools::{Purpose, Tool, ToolSeen};

/// Version of [`Diagnosis`]'s JSON form.
pub const SCHEMA_VERSION: u32 = 1;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Runs are possible, and something about them will be worse than it has to be.
    Warning,
    /// No run is possible.
    Problem,
}

/// What a finding is about. The order of the variants is the order in a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Area {
    /// Programs every run starts.
    RunTools,
    /// Programs an image build starts.
    BuildTools,
    /// How guests are run, and how fast.
    Guests,
    /// Cores, memory, load, and who uses them.
    Host,
    /// The folders the harness works in.
    Folders,
    /// Where k3s comes from.
    K3s,
}

impl fmt::Display for Area {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::RunTools => "tools of a run",
            Self::BuildTools => "tools of an image build",
            Self::Guests => "guests",
            Self::Host => "this machine",
            Self::Folders => "folders",
            Self::K3s => "k3s",
        })
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is about.
    pub area: Area,
    /// What was looked at, in a word or two.
    pub name: String,
    /// How bad it is.
    pub level: Level,
    /// What was seen, with figures.
    pub seen: String,
    /// What that means for a run, where it is not as it should be.
    pub means: Option<String>,
    /// The command, or the change, that mends it.
    pub mend: Option<String>,
    /// The Debian package that is missing, where that is what is wrong.
    pub package: Option<String>,
}

impl Finding {
    fn ok(area: Area, name: impl Into<String>, seen: impl Into<String>) -> Self {
        Self { area, name: name.into(), level: Level::Ok, seen: seen.into(), means: None, mend: None, package: None }
    }

    fn bad(mut self, level: Level, means: impl Into<String>, mend: impl Into<String>) -> Self {
        self.level = level;
        self.means = Some(means.into());
        self.mend = Some(mend.into());
        self
    }

    fn warning(self, means: impl Into<String>, mend: impl Into<String>) -> Self {
        self.bad(Level::Warning, means, mend)
    }

    fn problem(self, means: impl Into<String>, mend: impl Into<String>) -> Self {
        self.bad(Level::Problem, means, mend)
    }
}

/// All findings, and what follows from them.
#[derive(Debug, Clone, Serialize)]
pub struct Diagnosis {
    /// Version of this form.
    pub schema_version: u32,
    /// Whether a run is possible: no finding is a problem.
    pub run_possible: bool,
    /// What was found, in the order of a report.
    pub findings: Vec<Finding>,
    /// What installs all missing packages, as one command, and whatever else mends a problem. What mends a warning is
    /// with its finding.
    pub mend: Vec<String>,
    /// The figures behind the findings.
    pub figures: Seen,
}

impl Diagnosis {
    /// How many findings are this bad.
    #[must_use]
    pub fn count(&self, level: Level) -> usize {
        self.findings.iter().filter(|finding| finding.level == level).count()
    }
}
