//! VM-based integration tests of k3s clusters on QEMU/KVM.
//!
//! The flow goes one way: scenario YAML → [`plan`] → [`lab`] → [`formation`] phases → verdict → report. A module
//! imports only from its left. See ARCHITECTURE.md for the map and the invariants.

pub mod catalogue;
pub mod cli;
pub mod cluster;
pub mod diagnose;
pub mod doctor;
pub mod error;
pub mod event;
pub mod exit;
pub mod failure;
pub mod formation;
pub mod guest;
pub mod lab;
pub mod plan;
pub mod printable;
pub mod record;
pub mod redact;
pub mod reporter;
pub mod scenario;
pub mod schema;
pub mod seedfiles;
