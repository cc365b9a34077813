//! VDE switches with real 802.1Q trunks, and the links between them.
//!
//! A port belongs to the VLANs its [`PortSpec`] names and to no others: frames with another tag are dropped by the switch, and untagged ones too unless the port has a native VLAN.

mod link;
mod mgmt;
mod port;
mod switch;
mod table;

use std::collections::BTreeSet;
use std::fmt;

use camino::Utf8PathBuf;
use serde::{Deserialize, Serialize};
use thiserror::Error as ThisError;

use crate::process::ExitInfo;
use crate::spec::SpecError;
use crate::{UNIX_PATH_MAX_BYTES, socket_path_fits};

pub use link::Link;
pub use port::{FRAME_MAX_BYTES, Port};
pub use switch::Switch;

/// The highest VLAN `vde_switch` 2.3.2 takes; it refuses 4094, which 802.1Q would allow, and uses 4095 for "none".
pub const VLAN_MAX: u16 = 4093;

/// The highest port number; above any lab, and far below what the switch's tables could hold.
pub const PORT_MAX: u16 = 1000;

/// What libvdeplug appends to a switch's directory for each client's own socket: `/.PID-NUMBER`, the process id with up to 7 digits, the number with 5.
const CLIENT_SOCKET_BYTES: usize = "/.4194304-00000".len();

/// A switch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SwitchSpec {
    /// Its name.
    pub name: String,
    /// The directory of its data sockets, made by the switch (at most 92 bytes).
    #[schemars(with = "String")]
    pub socket_dir: Utf8PathBuf,
    /// Its management socket (at most 107 bytes).
    #[schemars(with = "String")]
    pub mgmt_socket: Utf8PathBuf,
    /// Its ports.
    pub ports: Vec<PortSpec>,
}

/// A port of a switch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PortSpec {
    /// Its number, from 1.
    pub port: u16,
    /// Who is plugged in, for people.
    pub label: String,
    /// The VLAN of untagged frames, 0 for the switch's default one; `None`: untagged frames go nowhere.
    pub native_vlan: Option<u16>,
    /// The VLANs whose frames pass with their tag.
    pub tagged_vlans: Vec<u16>,
}

/// What is wrong with a [`SwitchSpec`].
#[derive(Debug, Clone, PartialEq, Eq, ThisError)]
pub enum SwitchSpecError {
    /// A port number out of range.
    #[error("port {0} is out of range (1 to {PORT_MAX})")]
    Port(u16),
    /// One number for two ports.
    #[error("port {0} is there twice")]
    PortTwice(u16),
    /// A VLAN that the switch cannot carry.
    #[error("VLAN {vlan} on port {port} is out of range (1 to {VLAN_MAX} with vde_switch)")]
    Vlan {
        /// The port.
        port: u16,
        /// The VLAN.
        vlan: u16,
    },
    /// One VLAN twice on a port, with a tag and without, or twice with one.
    #[error("VLAN {vlan} is on port {port} twice")]
    VlanTwice {
        /// The port.
        port: u16,
        /// The VLAN.
        vlan: u16,
    },
    /// The directory's path leaves no room for the sockets in it.
    #[error("switch directory is {bytes} bytes, at most {max} leave room for the socket names in it: {path}", max = UNIX_PATH_MAX_BYTES - CLIENT_SOCKET_BYTES)]
    DirectoryTooLong {
        /// The directory.
        path: Utf8PathBuf,
        /// Its length.
        bytes: usize,
    },
    /// A path that VDE would read as something else.
    #[error("switch directory has a character that VDE gives a meaning to ([ ] {{ }} or white space): {0}")]
    DirectoryCharacters(Utf8PathBuf),
    /// A management socket's path that is too long.
    #[error(transparent)]
    Socket(#[from] SpecError),
}

impl SwitchSpec {
    /// Checks what the switch would refuse, or accept and get wrong.
    ///
    /// # Errors
    /// The first thing found to be wrong.
    pub fn validate(&self) -> Result<(), SwitchSpecError> {
        let bytes = self.socket_dir.as_str().len();
        if bytes + CLIENT_SOCKET_BYTES > UNIX_PATH_MAX_BYTES {
            return Err(SwitchSpecError::DirectoryTooLong { path: self.socket_dir.clone(), bytes });
        }
        if self.socket_dir.as_str().contains(|c: char| "[]{}".contains(c) || c.is_whitespace() || c.is_control()) {
            return Err(SwitchSpecError::DirectoryCharacters(self.socket_dir.clone()));
        }
        socket_path_fits(&self.mgmt_socket)?;
        let mut ports = BTreeSet::new();
        for spec in &self.ports {
            let port = spec.port;
            if !(1..=PORT_MAX).contains(&port) {
                return Err(SwitchSpecError::Port(port));
            }
            if !ports.insert(port) {
                return Err(SwitchSpecError::PortTwice(port));
            }
            let mut vlans = BTreeSet::new();
            let tagged = spec.tagged_vlans.iter().map(|&vlan| (vlan, 1));
            for (vlan, lowest) in spec.native_vlan.map(|vlan| (vlan, 0)).into_iter().chain(tagged) {
                if !(lowest..=VLAN_MAX).contains(&vlan) {
                    return Err(SwitchSpecError::Vlan { port, vlan });
                }
                if !vlans.insert(vlan) {
                    return Err(SwitchSpecError::VlanTwice { port, vlan });
                }
            }
        }
        Ok(())
    }
}

/// How a switch ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwitchExit {
    /// The switch's name.
    pub name: String,
    /// How the process ended.
    pub exit: ExitInfo,
    /// The end of what it printed.
    pub output_tail: String,
}

/// How a link ended. A link exits with status 0 by itself when one of its switches does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkExit {
    /// The link's name.
    pub name: String,
    /// How the process ended.
    pub exit: ExitInfo,
    /// The end of what it printed.
    pub output_tail: String,
}

fn write_exit(f: &mut fmt::Formatter<'_>, what: &str, name: &str, exit: ExitInfo, output: &str) -> fmt::Result {
    write!(f, "{what} {name} {exit}")?;
    let said = output.trim();
    if said.is_empty() { Ok(()) } else { write!(f, ": {said}") }
}

impl fmt::Display for SwitchExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_exit(f, "switch", &self.name, self.exit, &self.output_tail)
    }
}

impl fmt::Display for LinkExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_exit(f, "link", &self.name, self.exit, &self.output_tail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(ports: Vec<PortSpec>) -> SwitchSpec {
        SwitchSpec {
            name: "sw".into(),
            socket_dir: "/run/lab/sw".into(),
            mgmt_socket: "/run/lab/sw.mgmt".into(),
            ports,
        }
    }

    fn port(port: u16, native_vlan: Option<u16>, tagged: &[u16]) -> PortSpec {
        PortSpec { port, label: "n".into(), native_vlan, tagged_vlans: tagged.to_vec() }
    }

    #[test]
    fn what_the_switch_would_refuse_is_refused_before() {
        let refused = |ports| spec(ports).validate().unwrap_err();
        assert_eq!(
            spec(vec![port(1, None, &[1, 4093]), port(2, Some(0), &[]), port(1000, Some(7), &[8])]).validate(),
            Ok(())
        );
        assert_eq!(refused(vec![port(0, None, &[])]), SwitchSpecError::Port(0));
        assert_eq!(refused(vec![port(1001, None, &[])]), SwitchSpecError::Port(1001));
        assert_eq!(refused(vec![port(1, None, &[]), port(1, None, &[])]), SwitchSpecError::PortTwice(1));
        assert_eq!(refused(vec![port(1, None, &[4094])]), SwitchSpecError::Vlan { port: 1, vlan: 4094 });
        assert_eq!(refused(vec![port(1, None, &[0])]), SwitchSpecError::Vlan { port: 1, vlan: 0 });
        assert_eq!(refused(vec![port(1, Some(200), &[200])]), SwitchSpecError::VlanTwice { port: 1, vlan: 200 });
        assert_eq!(refused(vec![port(1, None, &[5, 5])]), SwitchSpecError::VlanTwice { port: 1, vlan: 5 });
    }

    #[test]
    fn paths_without_room_for_sockets_are_refused_with_their_length() {
        let long = |n: usize| format!("/{}", "d".repeat(n - 1));
        let mut with_dir = spec(vec![]);
        with_dir.socket_dir = long(92).into();
        assert_eq!(with_dir.validate(), Ok(()));
        with_dir.socket_dir = long(93).into();
        let said = with_dir.validate().unwrap_err().to_string();
        assert!(said.contains("is 93 bytes, at most 92 "), "{said}");
        let mut with_mgmt = spec(vec![]);
        with_mgmt.mgmt_socket = long(108).into();
        let said = with_mgmt.validate().unwrap_err().to_string();
        assert!(said.contains("is 108 bytes, at most 107 fit"), "{said}");
        let mut odd = spec(vec![]);
        odd.socket_dir = "/run/a[1]".into();
        assert!(matches!(odd.validate(), Err(SwitchSpecError::DirectoryCharacters(_))));
    }
}
