//! The ledger of what living labs have taken of this machine: vCPUs and memory (FM-5, and what follows from it, FM-1).
//!
//! Every lab, before it starts anything, claims what its plan asks for. A claim is admitted, waits for other labs to
//! end, or is refused where waiting cannot help. It is one file in the ledger's folder, locked (`lock.rs`) for as long
//! as its owner lives: however an owner ends, its claim ends with it, and those that wait for it are woken by the kernel.
//! Whoever changes the ledger holds its locks, for milliseconds. All users of a host share it; see `place.rs` for what one
//! user's claims are to another.
//!
//! Claims are admitted in the order they came: a small lab does not pass a large one that waits, or the large one would
//! wait for ever. What cannot be foreseen is left to the plan's warning: a lab that is alone is never made to wait for
//! cores.

mod book;
mod decide;
mod lock;
mod place;
#[cfg(test)]
mod tests;
mod wait;

use std::fmt;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use jiff::Timestamp;
use kvm::HostFacts;
use serde::{Deserialize, Serialize};

pub use book::Ticket;
pub use decide::{Decision, Obstacle, decide};
pub use place::{DEFAULT, LEDGER_ENV};

use crate::failure::Failure;
use crate::reporter::human_ms;

/// Most claims a ledger is read for.
const MAX_CLAIMS: usize = 256;

/// What a lab takes of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The lab's id.
    pub lab: String,
    /// What it is for: the scenario.
    pub scenario: String,
    /// vCPUs over all its nodes.
    pub vcpus: u32,
    /// Memory over all its nodes.
    pub memory_mib: u64,
}

/// A claim of a living harness, as it stands in the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The claim.
    #[serde(flatten)]
    pub claim: Claim,
    /// Whether it was admitted; otherwise it waits.
    pub admitted: bool,
    /// Process id of its harness, whose children the VMs are.
    pub pid: u32,
    /// When it was entered.
    pub since: Timestamp,
    /// How much of its memory its VMs have already taken; none where its processes cannot be seen, as another user's under
    /// `hidepid` (proc(5)) or in another PID namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_used_mib: Option<u64>,
    /// The other user it is of; none where it is this user's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<u32>,
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Claim { lab, scenario, vcpus, memory_mib } = &self.claim;
        let waits = if self.admitted { "" } else { ", waiting" };
        let user = self.user.map_or_else(String::new, |user| format!(" of user {user}"));
        write!(f, "lab {lab}{user} ({scenario}, {vcpus} vCPUs, {memory_mib} MiB, pid {}{waits})", self.pid)
    }
}

/// What the machine can give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host {
    /// Cores the harness may use.
    pub cores: u32,
    /// Memory to be had without swapping; 0 where that is not known, and then it is not asked about.
    pub memory_available_mib: u64,
}

impl From<&HostFacts> for Host {
    fn from(facts: &HostFacts) -> Self {
        Self { cores: facts.cores, memory_available_mib: facts.memory_available_mib }
    }
}

/// How full the machine may get, and how long a claim waits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Policy {
    /// vCPUs per core, over all labs, that are admitted while more than one lab lives.
    pub vcpus_per_core: f64,
    /// How long a claim waits for other labs to end.
    pub wait_max: Duration,
}

impl Policy {
    /// How long a claim waits where nobody says otherwise.
    pub const WAIT_MAX: Duration = Duration::from_secs(600);
}

impl Default for Policy {
    fn default() -> Self {
        Self { vcpus_per_core: 2.0, wait_max: Self::WAIT_MAX }
    }
}

/// A ledger, and the policy claims are admitted by.
#[derive(Debug, Clone)]
pub struct Admission {
    /// The ledger.
    pub ledger: Ledger,
    /// The policy.
    pub policy: Policy,
}

/// Why a claim was not admitted.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The ledger could not be read or written.
    #[error("{action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: Utf8PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The machine cannot give it, even if all other labs end.
    #[error("{0}")]
    Refused(Obstacle),
    /// Other labs did not end in time.
    #[error("{obstacle}, and no room was made within {}", human_ms(u64::try_from(waited.as_millis()).unwrap_or(u64::MAX)))]
    InTheWay {
        /// What was in the way last.
        obstacle: Obstacle,
        /// How long it was waited for.
        waited: Duration,
    },
}

impl LedgerError {
    /// The error as the failure of a run, with what to do about it.
    #[must_use]
    pub fn to_failure(&self) -> Failure {
        let (context, hint) = match self {
            Self::Io { .. } => (
                "reading the ledger of labs",
                "see that the folder can be used, or name another by HARNESS_LEDGER_DIR: `harness doctor`",
            ),
            Self::Refused(_) => {
                ("this machine has no room for the lab", "end what else runs, or lower memory_mib in the scenario")
            }
            Self::InTheWay { .. } => (
                "other labs are in the way",
                "wait for them, end those that are yours (`harness doctor` lists labs, users and pids), or give --wait-for-host more time",
            ),
        };
        Failure::from_error(crate::exit::Blame::Environment, context, self).hint(hint)
    }
}

/// The ledger's folders.
#[derive(Debug, Clone)]
pub struct Ledger {
    /// That of all users.
    root: Utf8PathBuf,
    /// This user's.
    own: Utf8PathBuf,
}

impl Ledger {
    /// The ledger all harnesses of a host share: [`DEFAULT`], or what [`LEDGER_ENV`] names. Touches nothing.
    #[must_use]
    pub fn host_wide() -> Self {
        Self::at(&place::host_wide())
    }

    /// The ledger in the folder `root`. Touches nothing.
    #[must_use]
    pub fn at(root: &Utf8Path) -> Self {
        Self { root: root.to_owned(), own: root.join(nix::unistd::geteuid().to_string()) }
    }

    /// All claims of living harnesses, in the order they came, and how much memory their VMs have taken. A ledger that
    /// nobody has made yet is empty.
    ///
    /// # Errors
    /// [`LedgerError::Io`].
    pub fn living(&self) -> Result<Vec<Entry>, LedgerError> {
        if !self.root.is_dir() {
            return Ok(Vec::new());
        }
        // Who has claimed nothing yet leaves nothing by looking.
        let living = if self.own.exists() {
            book::Book::open(self)?.living()?
        } else {
            book::with_others(Vec::new(), &self.root, &self.own)
        };
        Ok(living.into_iter().map(|claimed| claimed.entry).collect())
    }

    /// As [`Ledger::living`], for callers that must not block: whoever holds the ledger's lock may have been stopped.
    ///
    /// # Errors
    /// [`LedgerError::Io`], also where the ledger could not be read within `deadline`.
    pub async fn living_within(&self, deadline: Duration) -> Result<Vec<Entry>, LedgerError> {
        let ledger = self.clone();
        let read = wait::in_thread(&self.root, move || ledger.living());
        match tokio::time::timeout(deadline, read).await {
            Ok(living) => living?,
            Err(_) => {
                let source = std::io::Error::new(std::io::ErrorKind::TimedOut, "another process keeps it locked");
                Err(book::io_error("reading", &self.root, source))
            }
        }
    }

    /// Claims a part of the machine; waits, for as long as `policy` says, where other labs are in the way. `waiting` is
    /// told what is in the way, at first and whenever that changes.
    ///
    /// The claim ends with the [`Ticket`], or with this process. A call that is cancelled leaves no claim.
    ///
    /// # Errors
    /// [`LedgerError`]: refused, given up, or the ledger cannot be used.
    pub async fn admit(
        &self,
        claim: Claim,
        policy: Policy,
        host: impl Fn() -> Host + Send + Clone + 'static,
        waiting: impl FnMut(&Obstacle) + Send,
    ) -> Result<Ticket, LedgerError> {
        wait::admit(self, claim, policy, host, waiting).await
    }
}
