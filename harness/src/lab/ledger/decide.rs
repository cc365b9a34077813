//! Whether a claim is admitted. Pure.

use std::fmt;

use super::{Claim, Entry, Host, Policy};

/// What becomes of a claim.
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// It is admitted.
    Admit,
    /// It waits for other labs to end.
    Wait(Obstacle),
    /// It cannot be admitted even if all other labs end.
    Refuse(Obstacle),
}

/// What is in the way of a claim.
#[derive(Debug, Clone, PartialEq)]
pub enum Obstacle {
    /// The machine has less memory to give than is asked for, whoever ends.
    TooLittleMemory {
        /// What is asked for.
        asked_mib: u64,
        /// What could be had if all labs ended.
        to_be_had_mib: u64,
    },
    /// Other labs have been promised the memory.
    MemoryPromised {
        /// What is asked for.
        asked_mib: u64,
        /// What is available and promised to nobody.
        left_mib: u64,
        /// The labs that live, or wait before this one.
        labs: Vec<Entry>,
    },
    /// Other labs have the cores.
    CoresTaken {
        /// The vCPUs asked for.
        asked: u32,
        /// The vCPUs of the labs that live.
        taken: u32,
        /// The vCPUs that are admitted on this machine in all.
        admitted: u32,
        /// The labs that live, or wait before this one.
        labs: Vec<Entry>,
    },
    /// A lab that came earlier waits, too; there would be room for this one if it were not for that.
    Queue {
        /// The labs that live, and, last, the one that came first.
        labs: Vec<Entry>,
    },
}

impl Obstacle {
    /// The labs whose end is waited for.
    #[must_use]
    pub fn labs(&self) -> &[Entry] {
        match self {
            Self::TooLittleMemory { .. } => &[],
            Self::MemoryPromised { labs, .. } | Self::CoresTaken { labs, .. } | Self::Queue { labs } => labs,
        }
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |labs: &[Entry]| labs.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        match self {
            Self::TooLittleMemory { asked_mib, to_be_had_mib } => {
                write!(f, "the nodes ask for {asked_mib} MiB of memory, {to_be_had_mib} MiB are to be had")
            }
            Self::MemoryPromised { asked_mib, left_mib, labs } => {
                write!(f, "the nodes ask for {asked_mib} MiB of memory, {left_mib} MiB are left beside {}", list(labs))
            }
            Self::CoresTaken { asked, taken, admitted, labs } => write!(
                f,
                "the nodes ask for {asked} vCPUs, {taken} of the {admitted} admitted on this machine are taken by {}",
                list(labs)
            ),
            Self::Queue { labs } => write!(f, "it is not this lab's turn: {}", list(labs)),
        }
    }
}

/// Decides on `claim`, with `before` the claims that came before it, in their order.
///
/// - Alone on the machine it is admitted whatever its vCPUs: that the plan warns of.
/// - With other labs it waits until all vCPUs together are no more than [`Policy::vcpus_per_core`] of the cores.
/// - Memory has to be there: what is available, less what living labs were promised and have not taken yet. It waits
///   for it where it would be there once the others have ended, and is refused where it would not.
/// - One that waits before it and could go now goes first; one that could not holds up those behind it.
#[must_use]
pub fn decide(claim: &Claim, before: &[Entry], host: Host, policy: Policy) -> Decision {
    let mut living: Vec<&Entry> = before.iter().filter(|entry| entry.admitted).collect();
    for waiting in before.iter().filter(|entry| !entry.admitted) {
        match one(&waiting.claim, &living, host, policy) {
            Decision::Admit => living.push(waiting),
            // It is about to find that out by itself.
            Decision::Refuse(_) => {}
            Decision::Wait(_) => {
                // Behind one that waits: what would be in the way of this claim if that one had gone.
                living.push(waiting);
                return match one(claim, &living, host, policy) {
                    refused @ Decision::Refuse(_) => refused,
                    waits @ Decision::Wait(_) => waits,
                    Decision::Admit => Decision::Wait(Obstacle::Queue { labs: owned(&living) }),
                };
            }
        }
    }
    one(claim, &living, host, policy)
}

/// Decides with everybody else who counts admitted.
fn one(claim: &Claim, living: &[&Entry], host: Host, policy: Policy) -> Decision {
    let asked_mib = claim.memory_mib;
    let used = |entry: &Entry| entry.memory_used_mib.unwrap_or(0);
    let promised: u64 = living.iter().map(|entry| entry.claim.memory_mib.saturating_sub(used(entry))).sum();
    if host.memory_available_mib > 0 {
        // One whose processes cannot be seen may have taken nothing yet, or all of it.
        let freed =
            |entry: &&Entry| entry.memory_used_mib.unwrap_or(if entry.admitted { entry.claim.memory_mib } else { 0 });
        let to_be_had_mib = host.memory_available_mib + living.iter().map(freed).sum::<u64>();
        if asked_mib > to_be_had_mib {
            return Decision::Refuse(Obstacle::TooLittleMemory { asked_mib, to_be_had_mib });
        }
        let left_mib = host.memory_available_mib.saturating_sub(promised);
        if asked_mib > left_mib {
            return Decision::Wait(Obstacle::MemoryPromised { asked_mib, left_mib, labs: owned(living) });
        }
    }
    let taken: u32 = living.iter().fold(0, |sum, entry| sum.saturating_add(entry.claim.vcpus));
    let admitted = admitted_vcpus(host, policy);
    if !living.is_empty() && taken.saturating_add(claim.vcpus) > admitted {
        return Decision::Wait(Obstacle::CoresTaken { asked: claim.vcpus, taken, admitted, labs: owned(living) });
    }
    Decision::Admit
}

fn owned(living: &[&Entry]) -> Vec<Entry> {
    living.iter().map(|&entry| entry.clone()).collect()
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float outside the range of u32 becomes its nearest end, which is what is meant"
)]
fn admitted_vcpus(host: Host, policy: Policy) -> u32 {
    (f64::from(host.cores) * policy.vcpus_per_core).floor() as u32
}
