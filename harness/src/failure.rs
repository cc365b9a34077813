//! How a run goes wrong: who, where, why, and what to do.

use serde::{Deserialize, Serialize};

use crate::exit::Blame;
use crate::plan::Phase;

/// What is said of a VM that QEMU has stopped because its disk took no more.
pub const DISK_NOT_WRITTEN: &str = "its disk could not be written";

/// The first thing that ended a run before it was done.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Failure {
    /// Who is to blame as far as the failing step can tell; the classifier may know better.
    pub blame: Blame,
    /// The phase that failed.
    pub phase: Option<Phase>,
    /// The node it failed on, where it was one.
    pub node: Option<String>,
    /// Outermost first, each a lowercase fragment.
    pub chain: Vec<String>,
    /// What to do about it.
    pub hint: Option<String>,
    /// Whether it is a deadline that passed.
    #[serde(default)]
    pub timed_out: bool,
}

impl Failure {
    /// A failure that stands for itself.
    pub fn new(blame: Blame, message: impl Into<String>) -> Self {
        Self { blame, phase: None, node: None, chain: vec![message.into()], hint: None, timed_out: false }
    }

    /// A failure with an error's chain of causes below it.
    pub fn from_error(blame: Blame, context: impl Into<String>, error: &(dyn std::error::Error + 'static)) -> Self {
        let mut chain = vec![context.into()];
        chain.extend(crate::error::chain_of(error));
        let hint = crate::error::storage_hint(error).map(str::to_owned);
        Self { blame, phase: None, node: None, chain, hint, timed_out: false }
    }

    /// Whether it is a disk of the host that is full.
    #[must_use]
    pub fn is_no_space(&self) -> bool {
        self.chain.iter().any(|part| part.contains("o space left on device") || part.contains(DISK_NOT_WRITTEN))
    }

    /// The environment's fault.
    pub fn environment(message: impl Into<String>) -> Self {
        Self::new(Blame::Environment, message)
    }

    /// The product's fault.
    pub fn product(message: impl Into<String>) -> Self {
        Self::new(Blame::Product, message)
    }

    /// Names the node.
    #[must_use]
    pub fn on(mut self, node: &str) -> Self {
        self.node.get_or_insert_with(|| node.to_owned());
        self
    }

    /// Adds a cause below the last one.
    #[must_use]
    pub fn because(mut self, cause: impl Into<String>) -> Self {
        self.chain.push(cause.into());
        self
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Names the phase, unless a deeper step already has.
    #[must_use]
    pub fn in_phase(mut self, phase: Phase) -> Self {
        self.phase.get_or_insert(phase);
        self
    }

    /// The chain in one line.
    #[must_use]
    pub fn one_line(&self) -> String {
        self.chain.iter().map(|part| part.lines().next().unwrap_or_default()).collect::<Vec<_>>().join(": ")
    }
}
