//! Pure classification of failures: evidence in, verdict out.
//!
//! The crate knows how etcd, k3s, systemd, the kernel, QEMU and curl print ([`mod@line`], [`dialect`]), what the failure modes
//! of the catalogue look like ([`catalogue`]), and how to weigh one against the other ([`classify`]). It starts nothing,
//! opens nothing and never waits: callers hand it [`Evidence`] while a run goes on, or a reader over a log that came from
//! somewhere else ([`diagnose`]), and get a [`Verdict`] that says why it thinks so.
//!
//! Architecture invariant: no I/O besides `std::io::Read`/`BufRead` inputs, no clock, no async. The same evidence in the
//! same order gives the same verdict.

mod broken;
pub mod catalogue;
pub mod classify;
pub mod context;
pub mod diagnose;
pub mod dialect;
pub mod error;
pub mod evidence;
pub mod line;
pub mod phase;
mod redact;
mod render;
mod rules;
mod tally;
mod utf16;
pub mod verdict;

pub use catalogue::{Attribution, Catalogue, Class, Kind, Meaning, Mode};
pub use classify::{Classifier, Fatal, Pending};
pub use context::{Context, Health, HostFacts, UnitRestarts, VmFacts};
pub use diagnose::{Scan, diagnose_reader};
pub use error::CatalogueError;
pub use evidence::{Evidence, Source, SourceKind};
pub use phase::Phase;
pub use verdict::{Confidence, Contribution, EvidenceLine, LookAlike, Outcome, SCHEMA_VERSION, Verdict};
