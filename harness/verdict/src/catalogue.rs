//! The catalogue: failure modes as data.
//!
//! A mode names its signs (what programs print) and its rules (which signs together are sufficient). The types are plain
//! serde data; [`Catalogue::from_modes`] checks and compiles them.

mod compile;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use regex::bytes::RegexSetBuilder;
use serde::{Deserialize, Serialize};

pub(crate) use self::compile::{Compiled, CompiledRule};
use self::compile::{compile_rules, compile_signs, prefilter};
use crate::error::CatalogueError;
use crate::evidence::SourceKind;
use crate::phase::Phase;
use crate::verdict::Confidence;

/// Most signs a catalogue may hold.
pub const SIGNS_MAX: usize = 1024;
/// Shortest anchor: shorter ones would send most lines to the slow path.
pub const ANCHOR_BYTES_MIN: usize = 4;
/// Largest compiled size of all signs together, bytes.
const REGEX_SIZE_MAX: usize = 64 << 20;

/// What kind of failure it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// Passes on retry; something was too slow.
    Timing,
    /// Left-over or contradictory state.
    State,
    /// CPU, memory, disk or I/O ran out.
    Resource,
    /// The wrong file.
    Artifact,
    /// The scenario or the site is set up wrongly.
    Configuration,
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Timing => "timing",
            Self::State => "state",
            Self::Resource => "resource",
            Self::Artifact => "artifact",
            Self::Configuration => "configuration",
        })
    }
}

/// Who is to blame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Attribution {
    /// The host, the runner, the hypervisor.
    Environment,
    /// The software under test.
    Product,
    /// The harness or the image it uses.
    Harness,
    /// The scenario or the site's settings.
    Configuration,
}

impl fmt::Display for Attribution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Environment => "environment",
            Self::Product => "product",
            Self::Harness => "harness",
            Self::Configuration => "configuration",
        })
    }
}

/// What a mode is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A failure mode: its id becomes the verdict's id.
    #[default]
    Failure,
    /// A failure that is not in the catalogue and could be taken for one: explained, without an id.
    LookAlike,
    /// Signs other modes use; never a verdict.
    Shared,
}

/// What a sign means by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Meaning {
    /// Nothing gets better from here.
    Fatal,
    /// Ends the run unless the unit recovers within its allowance.
    FatalUnlessRecovered,
    /// Seen when something is wrong, not a cause.
    Symptom,
    /// Makes a failure more likely.
    Contributing,
    /// Says that things are well (again).
    Recovery,
    /// Says that somebody wanted it: a stop, a shutdown.
    Deliberate,
    /// Neither good nor bad; for rules that name it.
    Neutral,
}

/// A count within a time window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counts {
    /// Times the sign has to be seen.
    pub at_least: u32,
    /// Within this time, seconds; lines without a time count as within.
    pub within_s: u64,
}

/// A line that programs print.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sign {
    /// Name, unique over the whole catalogue.
    pub name: String,
    /// What it means.
    pub meaning: Meaning,
    /// One clause for the reader of a verdict.
    pub says: String,
    /// Literal texts of which every match contains one: the fast filter before the pattern is tried. Free of quotes,
    /// backslashes and `<>&`, so that they survive JSON wrapping.
    pub anchors: Vec<String>,
    /// Regular expression over the unwrapped line.
    pub pattern: String,
    /// Regular expression that voids the match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unless: Option<String>,
    /// Programs it can come from; empty means any. Lines of an unknown program always qualify.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<SourceKind>,
    /// Counts as seen only after so many sightings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counts: Option<Counts>,
    /// Lines it must match, for the tests of the catalogue.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub examples: Vec<String>,
    /// For a sign of failure that many modes share: the signs that say, on the same node and later, that it passed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub recovered_by: Vec<String>,
    /// Lines that contain an anchor and must not match.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_examples: Vec<String>,
}

/// Which nodes the signs of a rule have to be on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    /// All on one node (lines of unknown nodes count as one node).
    #[default]
    Node,
    /// Anywhere in the lab.
    Lab,
}

/// On which side of a rule's last sign an exclusion has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum When {
    /// Before it.
    Before,
    /// Before or after it.
    #[default]
    Any,
}

/// A sign that voids a rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exclude {
    /// The sign.
    pub sign: String,
    /// On which side.
    #[serde(default)]
    pub when: When,
    /// How near, seconds; any distance where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub within_s: Option<u64>,
}

/// When a rule that holds ends a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum EndsWait {
    /// At once.
    AtOnce,
    /// Unless one of `unless_recovered_by` or `recovered_by` is seen within `allowance_s`.
    AfterAllowance,
    /// Never; it only names the failure afterwards.
    #[default]
    Never,
}

/// Signs that together are sufficient for a mode.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Name, unique within the mode.
    pub name: String,
    /// Groups of signs: of every group one must have been seen.
    pub all: Vec<Vec<String>>,
    /// Groups must be seen in the order given.
    #[serde(default)]
    pub ordered: bool,
    /// From the first group's sign to the last one's, seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub within_s: Option<u64>,
    /// On one node or anywhere.
    #[serde(default)]
    pub scope: Scope,
    /// Signs that void the rule.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub none: Vec<Exclude>,
    /// Signs that void the rule when seen as often as the signs of its first group, or oftener.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub outnumbered_by: Vec<String>,
    /// Signs that void the rule when seen on the same node after its last sign.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unless_recovered_by: Vec<String>,
    /// Signs that end the allowance of a wait; the rule still names the failure afterwards.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub recovered_by: Vec<String>,
    /// Holds only where nothing else explains a failure.
    #[serde(default)]
    pub last_resort: bool,
    /// Whether it ends a wait.
    #[serde(default)]
    pub ends_wait: EndsWait,
    /// Time to recover before it ends a wait, seconds on an unslowed guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowance_s: Option<u64>,
    /// How sure it makes us.
    pub confidence: Confidence,
    /// Why.
    pub because: String,
}

/// A failure mode, a look-alike, or a set of shared signs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mode {
    /// `FM-1`…`FM-7`, another id for everything else.
    pub id: String,
    /// What it is for.
    #[serde(default)]
    pub kind: Kind,
    /// Short name.
    pub name: String,
    /// What happens, a sentence or two.
    pub summary: String,
    /// Class.
    pub class: Class,
    /// Who is to blame.
    pub attribution: Attribution,
    /// Phases it can come from; empty means any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub phases: Vec<Phase>,
    /// What its signs are.
    #[serde(default)]
    pub signs: Vec<Sign>,
    /// What is sufficient.
    #[serde(default)]
    pub rules: Vec<Rule>,
    /// Modes whose signs are its consequences.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub explains: Vec<String>,
    /// Modes that make it more likely.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub contributing: Vec<String>,
    /// Failure modes a look-alike could be taken for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub looks_like: Vec<String>,
    /// What to do, in order.
    #[serde(default)]
    pub remedy: Vec<String>,
    /// What this harness does against it.
    #[serde(default)]
    pub prevention: Vec<String>,
    /// Where to read more.
    #[serde(default)]
    pub references: Vec<String>,
}

/// A checked and compiled catalogue; cheap to clone.
#[derive(Debug, Clone)]
pub struct Catalogue {
    pub(crate) inner: Arc<Compiled>,
}

impl Catalogue {
    /// Checks and compiles modes.
    ///
    /// # Errors
    ///
    /// [`CatalogueError`] for ids or sign names that clash, patterns that do not compile, references to nothing.
    pub fn from_modes(modes: Vec<Mode>) -> Result<Self, CatalogueError> {
        let mut mode_index: HashMap<String, usize> = HashMap::new();
        for (index, mode) in modes.iter().enumerate() {
            if mode_index.insert(mode.id.clone(), index).is_some() {
                return Err(CatalogueError::DuplicateMode { id: mode.id.clone() });
            }
        }
        for mode in &modes {
            let fields =
                [("explains", &mode.explains), ("contributing", &mode.contributing), ("looks_like", &mode.looks_like)];
            for (field, targets) in fields {
                if let Some(target) = targets.iter().find(|t| !mode_index.contains_key(*t)) {
                    return Err(CatalogueError::UnknownMode { mode: mode.id.clone(), field, target: target.clone() });
                }
            }
        }
        let (signs, sign_index) = compile_signs(&modes)?;
        let rules = compile_rules(&modes, &sign_index)?;
        let mut rules_of_sign = vec![Vec::new(); signs.len()];
        for (index, rule) in rules.iter().enumerate() {
            for &sign in rule.all.iter().flatten() {
                if !rules_of_sign[sign].contains(&index) {
                    rules_of_sign[sign].push(index);
                }
            }
        }
        let prefilter = prefilter(&signs)?;
        let set = RegexSetBuilder::new(signs.iter().map(|s| s.sign.pattern.as_str()))
            .unicode(false)
            .size_limit(REGEX_SIZE_MAX)
            .dfa_size_limit(REGEX_SIZE_MAX)
            .build()
            .map_err(|source| CatalogueError::Set { source: Box::new(source) })?;
        Ok(Self { inner: Arc::new(Compiled { modes, signs, rules, rules_of_sign, prefilter, set }) })
    }

    /// All modes, in the order given.
    #[must_use]
    pub fn modes(&self) -> &[Mode] {
        &self.inner.modes
    }

    /// The mode with that id; case does not matter.
    #[must_use]
    pub fn get(&self, id: &str) -> Option<&Mode> {
        self.inner.modes.iter().find(|m| m.id.eq_ignore_ascii_case(id))
    }

    /// Every literal the fast filter looks for, for comparison with `grep -F`.
    #[must_use]
    pub fn anchors(&self) -> Vec<&str> {
        let mut all: Vec<&str> =
            self.inner.signs.iter().flat_map(|s| s.sign.anchors.iter().map(String::as_str)).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Every pattern, for comparison with `grep -E`.
    #[must_use]
    pub fn patterns(&self) -> Vec<&str> {
        self.inner.signs.iter().map(|s| s.sign.pattern.as_str()).collect()
    }
}
