//! One piece of evidence: who said what, where and when.

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Which program a line comes from, as far as it can be told.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Default, schemars::JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum SourceKind {
    /// k3s or RKE2 itself (logrus lines).
    K3s,
    /// etcd, embedded or alone (plain 3.3/3.4 lines or zap JSON).
    Etcd,
    /// A Kubernetes component (klog lines).
    Klog,
    /// PID 1 of a guest.
    Systemd,
    /// A kernel, through its console or the journal.
    Kernel,
    /// QEMU's own messages on the host.
    Qemu,
    /// curl's messages.
    Curl,
    /// A virtual switch.
    Vde,
    /// The lab's DHCP server.
    Dhcp,
    /// SSH, seen from the host.
    Ssh,
    /// An image or CI build step.
    Build,
    /// This harness.
    Harness,
    /// Anything else, or not known.
    #[default]
    Unknown,
}

impl fmt::Display for SourceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::K3s => "k3s",
            Self::Etcd => "etcd",
            Self::Klog => "klog",
            Self::Systemd => "systemd",
            Self::Kernel => "kernel",
            Self::Qemu => "qemu",
            Self::Curl => "curl",
            Self::Vde => "vde",
            Self::Dhcp => "dhcp",
            Self::Ssh => "ssh",
            Self::Build => "build",
            Self::Harness => "harness",
            Self::Unknown => "unknown",
        })
    }
}

/// Where a piece of evidence was read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// The program, [`SourceKind::Unknown`] to let the line itself tell.
    pub kind: SourceKind,
    /// The stream as a person would look it up: `journal`, `console`, `server-1/journal.log`.
    pub origin: String,
}

impl Source {
    /// A source of a known kind.
    pub fn new(kind: SourceKind, origin: impl Into<String>) -> Self {
        Self { kind, origin: origin.into() }
    }

    /// The journal of a guest; the kind is told by each line.
    pub fn journal() -> Self {
        Self::new(SourceKind::Unknown, "journal")
    }

    /// The serial console of a guest; the kind is told by each line.
    pub fn console() -> Self {
        Self::new(SourceKind::Unknown, "console")
    }

    /// QEMU's stderr.
    pub fn qemu() -> Self {
        Self::new(SourceKind::Qemu, "qemu")
    }

    /// QEMU's events, told through QMP.
    pub fn qmp() -> Self {
        Self::new(SourceKind::Qemu, "qmp")
    }

    /// The connections to a guest, seen from the host.
    pub fn ssh() -> Self {
        Self::new(SourceKind::Ssh, "ssh")
    }

    /// The virtual switches and the links between them.
    pub fn vde() -> Self {
        Self::new(SourceKind::Vde, "vde")
    }

    /// The lab's DHCP servers.
    pub fn dhcp() -> Self {
        Self::new(SourceKind::Dhcp, "dhcp")
    }

    /// A statement of the harness about its own run, such as a failed identity check.
    pub fn harness() -> Self {
        Self::new(SourceKind::Harness, "harness")
    }
}

/// One line of evidence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evidence {
    /// The node it is about, `None` where not known.
    pub node: Option<String>,
    /// Where it was read.
    pub source: Source,
    /// When it was said, on the caller's clock; `None` lets the line tell.
    pub at: Option<Timestamp>,
    /// The line, with or without the wrappers of journald and its like.
    pub text: String,
}

impl Evidence {
    /// A line about a node.
    pub fn new(node: Option<&str>, source: Source, at: Option<Timestamp>, text: impl Into<String>) -> Self {
        Self { node: node.map(str::to_owned), source, at, text: text.into() }
    }
}
