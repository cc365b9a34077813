//! Which acceleration guests get, found by running a guest, not by looking at a path: there are hosts where `/dev/kvm` opens, VMs and vCPUs can be made, and no guest gets anywhere.

mod probe;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error as ThisError;

use crate::error::Error;

/// What the user asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccelChoice {
    /// KVM where it is usable, else TCG.
    #[default]
    Auto,
    /// KVM; an error where it is not usable.
    Kvm,
    /// QEMU's own translator.
    Tcg,
}

/// What guests run under.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// The kernel's hypervisor.
    Kvm,
    /// QEMU's own translator.
    Tcg,
}

/// A text that names no acceleration.
#[derive(Debug, Clone, PartialEq, Eq, ThisError)]
#[error("unknown acceleration {0:?} (auto, kvm or tcg)")]
pub struct UnknownAccel(pub String);

impl FromStr for AccelChoice {
    type Err = UnknownAccel;

    fn from_str(text: &str) -> Result<Self, UnknownAccel> {
        match text {
            "auto" => Ok(Self::Auto),
            "kvm" => Ok(Self::Kvm),
            "tcg" => Ok(Self::Tcg),
            other => Err(UnknownAccel(other.to_owned())),
        }
    }
}

impl fmt::Display for AccelChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// What trying KVM showed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvmProbe {
    /// Whether guests can run under it at speed.
    pub usable: bool,
    /// Why, with figures.
    pub reason: String,
    /// `KVM_GET_API_VERSION`, where `/dev/kvm` could be opened.
    pub api_version: Option<i32>,
    /// Loop iterations of the last measured run; 0 where none ended.
    pub loop_iterations: u64,
    /// How long they took.
    pub loop_elapsed_us: Option<u64>,
}

/// The acceleration that was settled on, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccelReport {
    /// What guests run under.
    pub accel: Accel,
    /// What was asked for.
    pub choice: AccelChoice,
    /// Why it is so, in one line.
    pub reason: String,
    /// What trying KVM showed.
    pub kvm: KvmProbe,
}

/// Settles the acceleration. Ends within some 3 s, whatever `/dev/kvm` does.
///
/// # Errors
/// [`Error::KvmUnusable`], with the figures, where KVM was asked for and is not usable.
pub async fn resolve(choice: AccelChoice) -> Result<AccelReport, Error> {
    let kvm = match choice {
        AccelChoice::Tcg => KvmProbe::failed("not tried, since tcg was asked for".to_owned(), None),
        AccelChoice::Auto | AccelChoice::Kvm => probe::probe().await,
    };
    settle(choice, kvm)
}

fn settle(choice: AccelChoice, kvm: KvmProbe) -> Result<AccelReport, Error> {
    let (accel, reason) = match (choice, kvm.usable) {
        (AccelChoice::Tcg, _) => (Accel::Tcg, "tcg was asked for".to_owned()),
        (_, true) => (Accel::Kvm, format!("KVM is usable: {}", kvm.reason)),
        (AccelChoice::Auto, false) => (Accel::Tcg, format!("KVM is not usable: {}", kvm.reason)),
        (AccelChoice::Kvm, false) => return Err(Error::KvmUnusable { probe: Box::new(kvm) }),
    };
    Ok(AccelReport { accel, choice, reason, kvm })
}

impl KvmProbe {
    fn failed(reason: String, api_version: Option<i32>) -> Self {
        Self { usable: false, reason, api_version, loop_iterations: 0, loop_elapsed_us: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_choice_and_the_probe_settle_it() {
        let slow = || KvmProbe::failed("too slow".into(), Some(12));
        let fast = || KvmProbe { usable: true, ..slow() };
        assert_eq!(settle(AccelChoice::Auto, slow()).unwrap().accel, Accel::Tcg);
        assert_eq!(settle(AccelChoice::Auto, slow()).unwrap().reason, "KVM is not usable: too slow");
        assert_eq!(settle(AccelChoice::Auto, fast()).unwrap().accel, Accel::Kvm);
        assert_eq!(settle(AccelChoice::Kvm, fast()).unwrap().accel, Accel::Kvm);
        assert_eq!(settle(AccelChoice::Tcg, fast()).unwrap().accel, Accel::Tcg);
        let error = settle(AccelChoice::Kvm, slow()).unwrap_err();
        assert_eq!(error.to_string(), "KVM is not usable on this host: too slow");
    }

    #[test]
    fn names_round_trip() {
        for choice in [AccelChoice::Auto, AccelChoice::Kvm, AccelChoice::Tcg] {
            assert_eq!(choice.to_string().parse(), Ok(choice));
            assert_eq!(serde_json::to_value(choice).unwrap(), choice.to_string());
        }
        assert!("KVM".parse::<AccelChoice>().is_err());
    }
}
