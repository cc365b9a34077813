//! The verdict: what failed, why we think so, what to do.

pub(crate) mod build;
mod parts;

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::catalogue::{Attribution, Class};
use crate::evidence::SourceKind;
use crate::phase::Phase;

/// Version of the serialized form of [`Verdict`]; raised when a field changes its meaning or goes away.
pub const SCHEMA_VERSION: u32 = 1;

/// Most evidence lines a verdict carries.
pub const EVIDENCE_LINES_MAX: usize = 10;

/// How a run or a log ended, as the verdict sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "VerdictOutcome")]
pub enum Outcome {
    /// The run passed.
    Passed,
    /// The run failed, or the log shows a failure.
    Failed,
    /// Nothing in the log says that anything failed.
    NoFailureSeen,
}

/// How sure the verdict is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Confidence {
    /// A guess on part of the chain.
    Low,
    /// The chain is there, something about it is not certain.
    Medium,
    /// The whole chain is there.
    High,
}

impl Confidence {
    /// One level down; low stays low.
    #[must_use]
    pub fn lowered(self) -> Self {
        match self {
            Self::High => Self::Medium,
            Self::Medium | Self::Low => Self::Low,
        }
    }
}

impl fmt::Display for Confidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
        })
    }
}

/// A failure that is known, explained, and not one of the catalogue's failure modes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LookAlike {
    /// Its id, outside `FM-*`.
    pub id: String,
    /// Failure modes it could be taken for, and is not.
    pub not: Vec<String>,
}

/// A line the verdict rests on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EvidenceLine {
    /// The sign it matched.
    pub sign: String,
    /// What that sign means, one clause.
    pub says: String,
    /// The node, where known.
    pub node: Option<String>,
    /// The program, where known.
    pub source: SourceKind,
    /// The stream or file it was read from.
    pub origin: String,
    /// Line number in that file, from 1, where counted.
    pub line: Option<u64>,
    /// When it was said; the year is 1970 where the line gives seconds since boot and 2000 where it gives no year.
    pub at: Option<Timestamp>,
    /// The line without its wrappers, shortened, tokens redacted.
    pub text: String,
    /// How often the sign was seen on this node.
    pub count: u64,
}

/// Something that made the failure more likely without being it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Contribution {
    /// Mode of the catalogue, where it is one (`FM-5`).
    pub id: Option<String>,
    /// What was seen, with its figures.
    pub text: String,
    /// The figure that matters, such as vCPUs asked per CPU.
    pub ratio: Option<f64>,
}

/// What failed, why we think so, who is to blame, what to do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Verdict {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// How it ended.
    pub outcome: Outcome,
    /// The failure mode (`FM-1`, or a site's own), none where none fits.
    pub id: Option<String>,
    /// A known explanation that is not a failure mode.
    pub look_alike: Option<LookAlike>,
    /// Name of the mode or look-alike, or a plain statement where there is neither.
    pub name: String,
    /// What happened, a sentence or two.
    pub summary: String,
    /// Class of the failure.
    pub class: Option<Class>,
    /// Who is to blame.
    pub attribution: Option<Attribution>,
    /// The phase that failed.
    pub phase: Option<Phase>,
    /// The node the cause is on.
    pub node: Option<String>,
    /// How sure.
    pub confidence: Confidence,
    /// Why that sure.
    pub reason: String,
    /// The lines it rests on, causes first.
    pub evidence: Vec<EvidenceLine>,
    /// What followed from it.
    pub consequences: Vec<String>,
    /// What made it more likely.
    pub contributing: Vec<Contribution>,
    /// What to do, in order.
    pub remedy: Vec<String>,
}

impl Verdict {
    /// One screen for a person: what failed, why, the best lines, what to do. No colours, lines below 120 columns.
    #[must_use]
    pub fn render_human(&self) -> String {
        crate::render::human(self)
    }

    /// One line, such as `FM-2 stale bootstrap data … on server-2 (high confidence)`.
    #[must_use]
    pub fn headline(&self) -> String {
        crate::render::headline(self)
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render_human())
    }
}
