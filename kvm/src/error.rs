//! What can go wrong in the machine layer.

use std::io;

use camino::Utf8PathBuf;
use thiserror::Error;

use crate::accel::KvmProbe;
use crate::mac::MacError;
use crate::process::Survivor;
use crate::qmp::QmpError;
use crate::spec::SpecError;
use crate::vde::{LinkExit, SwitchExit, SwitchSpecError};
use crate::vm::VmExit;

/// A failure of the machine layer. Its text is a fragment that reads after "failed to …: ".
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// KVM was asked for and cannot run a guest at speed here.
    #[error("KVM is not usable on this host: {}", .probe.reason)]
    KvmUnusable {
        /// What was tried and measured.
        probe: Box<KvmProbe>,
    },
    /// A program is not installed.
    #[error("program {program:?} not found")]
    ProgramNotFound {
        /// As it was looked for: a name in PATH, or a path.
        program: String,
    },
    /// A program could not be started.
    #[error("could not start {name} ({program}): {source}")]
    Spawn {
        /// The process's name in the lab.
        name: String,
        /// The program.
        program: String,
        /// What the system said.
        source: io::Error,
    },
    /// No child is started any more: the supervisor is shutting down or its thread is gone.
    #[error("could not start {name}: the supervisor no longer starts processes")]
    ShuttingDown {
        /// The process that was to be started.
        name: String,
    },
    /// A process outlived SIGTERM, its grace and SIGKILL.
    #[error("{0}")]
    Survived(#[from] Survivor),
    /// A file, socket or pipe could not be used.
    #[error("could not {action} {path}: {source}")]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On what.
        path: Utf8PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A specification that cannot work.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A switch's specification that cannot work.
    #[error(transparent)]
    SwitchSpec(#[from] SwitchSpecError),
    /// MAC addresses could not be given out.
    #[error(transparent)]
    Mac(#[from] MacError),
    /// QEMU's control channel failed.
    #[error("VM {vm}: {source}")]
    Qmp {
        /// The VM's name.
        vm: String,
        /// What failed.
        source: QmpError,
    },
    /// QEMU ended where it should not have.
    #[error("{0}")]
    VmExited(Box<VmExit>),
    /// QEMU is there, and its answer does not hold what was asked for.
    #[error("VM {vm}: no SSH forward in QEMU's answer to `info usernet`: {answer:?}")]
    NoSshForward {
        /// The VM's name.
        vm: String,
        /// QEMU's answer, cut.
        answer: String,
    },
    /// A switch ended where it should not have.
    #[error("{0}")]
    SwitchExited(Box<SwitchExit>),
    /// A link ended where it should not have.
    #[error("{0}")]
    LinkExited(Box<LinkExit>),
    /// A switch did not carry out a management command.
    #[error("switch {switch} refused `{command}`: {answer}")]
    SwitchRefused {
        /// The switch's name.
        switch: String,
        /// The command.
        command: String,
        /// Its answer: a code and a text.
        answer: String,
    },
    /// A switch's management socket did not answer, or not in its protocol.
    #[error("switch {switch}: {what}")]
    SwitchProtocol {
        /// The switch's name.
        switch: String,
        /// What happened.
        what: String,
    },
    /// A switch that took all commands is not set up as they say.
    #[error("switch {switch}: {what}: expected {expected}, found {found}")]
    SwitchMismatch {
        /// The switch's name.
        switch: String,
        /// What differs.
        what: String,
        /// What was asked for.
        expected: String,
        /// What the switch shows.
        found: String,
    },
    /// A switch has ended a port that this process held.
    #[error("switch port {port} is closed: {why}")]
    PortClosed {
        /// `SWITCH:PORT`.
        port: String,
        /// How that was seen.
        why: String,
    },
    /// The speed of a guest could not be measured.
    #[error("calibration under {accel}: {what}")]
    Calibration {
        /// The acceleration measured.
        accel: crate::accel::Accel,
        /// What happened.
        what: String,
    },
}
