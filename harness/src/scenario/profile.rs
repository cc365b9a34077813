//! The profile: how the nodes of a lab are wired, as data.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// How every node of a lab is wired. All nodes are wired alike; node number `i` (from 1) gets host `i` of every subnet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Its name, also the name of its file.
    pub name: String,
    /// One line for lists.
    pub description: String,
    /// The lab's switches.
    pub switches: Vec<String>,
    /// Whether the switches are joined, each to the next, by a trunk that carries all of the profile's VLANs.
    #[serde(default)]
    pub joined: bool,
    /// Every node's NICs besides the management NIC `eth0`.
    pub nics: Vec<Nic>,
    /// The bond over some of the NICs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bond: Option<Bond>,
    /// The IP networks.
    pub networks: Vec<Network>,
    /// The network nodes know each other by: node IPs, API, etcd, flannel.
    pub cluster_network: String,
}

/// A NIC every node has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// Its name in the guest.
    pub name: String,
    /// The switch it is plugged into.
    pub switch: String,
}

/// A bond over NICs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Bond {
    /// Its name in the guest.
    pub name: String,
    /// The NICs it is made of; the first is the leg preferred when all are up.
    pub members: Vec<String>,
    /// How it uses them.
    #[serde(default)]
    pub mode: BondMode,
    /// How often a leg's link is looked at.
    #[serde(default = "default_miimon_ms")]
    pub miimon_ms: u32,
}

/// How a bond uses its members.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum BondMode {
    /// One leg carries everything, the others stand by.
    #[default]
    ActiveBackup,
}

impl fmt::Display for BondMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ActiveBackup => f.pad("active-backup"),
        }
    }
}

/// An IP network all nodes are on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// Its name.
    pub name: String,
    /// The NIC or bond that carries it.
    pub parent: String,
    /// Its 802.1Q VLAN; none means untagged, on the parent itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
    /// Its subnet.
    pub subnet: Subnet,
    /// How the nodes get their addresses on it.
    #[serde(default, skip_serializing_if = "Addressing::is_static")]
    pub addresses: Addressing,
    /// How long a DHCP lease lasts; clients renew it after half of that. None means longer than any run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 10, max = 604_800))]
    pub lease_s: Option<u32>,
}

/// How the nodes of a network get their addresses; which address is whose is the plan's either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Addressing {
    /// Each node is configured with its own.
    #[default]
    Static,
    /// Each node asks the lab's DHCP server, which has the last address of the subnet and a reservation for every node's MAC.
    Dhcp,
}

impl Addressing {
    /// Whether nodes are configured with their addresses.
    #[must_use]
    pub const fn is_static(&self) -> bool {
        matches!(self, Self::Static)
    }
}

impl Network {
    /// The address of its DHCP server, where it has one: the last one of its subnet.
    #[must_use]
    pub fn dhcp_server(&self) -> Option<Ipv4Addr> {
        (self.addresses == Addressing::Dhcp).then(|| self.subnet.host(self.subnet.hosts())).flatten()
    }

    /// The interface that has the address when `vlan` is in use: the parent, or `PARENT.VLAN`.
    #[must_use]
    pub fn interface(&self, vlan: Option<u16>) -> String {
        vlan.map_or_else(|| self.parent.clone(), |vlan| format!("{}.{vlan}", self.parent))
    }
}

/// An IPv4 subnet, written `192.168.1.0/24`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Subnet {
    network: Ipv4Addr,
    prefix: u8,
}

impl Subnet {
    /// The first address.
    #[must_use]
    pub const fn network(self) -> Ipv4Addr {
        self.network
    }

    /// The prefix length in bits.
    #[must_use]
    pub const fn prefix(self) -> u8 {
        self.prefix
    }

    /// How many hosts have room, the broadcast address left out.
    #[must_use]
    pub fn hosts(self) -> u32 {
        (1_u32 << (32 - u32::from(self.prefix))).saturating_sub(2)
    }

    /// The address of host `number`, from 1.
    #[must_use]
    pub fn host(self, number: u32) -> Option<Ipv4Addr> {
        (1..=self.hosts()).contains(&number).then(|| Ipv4Addr::from_bits(self.network.to_bits() + number))
    }

    /// Whether the two have an address in common.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        let prefix = self.prefix.min(other.prefix);
        let mask = u32::MAX << (32 - u32::from(prefix));
        self.network.to_bits() & mask == other.network.to_bits() & mask
    }
}

/// Why a text is no subnet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubnetError {
    /// Not `a.b.c.d/n`.
    #[error("{0:?} is no IPv4 subnet, expected one like 192.168.1.0/24")]
    Syntax(String),
    /// A prefix no lab network can have.
    #[error("prefix /{0} leaves no lab network, expected /8 to /30")]
    Prefix(u8),
    /// An address inside the subnet.
    #[error("{given} is not the first address of its subnet, expected {network}/{prefix}")]
    HostBits {
        /// The address given.
        given: Ipv4Addr,
        /// The subnet's first address.
        network: Ipv4Addr,
        /// The prefix given.
        prefix: u8,
    },
}

impl FromStr for Subnet {
    type Err = SubnetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let syntax = || SubnetError::Syntax(text.to_owned());
        let (address, prefix) = text.split_once('/').ok_or_else(syntax)?;
        let given: Ipv4Addr = address.parse().map_err(|_| syntax())?;
        let prefix: u8 = prefix.parse().map_err(|_| syntax())?;
        if !(8..=30).contains(&prefix) {
            return Err(SubnetError::Prefix(prefix));
        }
        let mask = u32::MAX << (32 - u32::from(prefix));
        let network = Ipv4Addr::from_bits(given.to_bits() & mask);
        if network != given {
            return Err(SubnetError::HostBits { given, network, prefix });
        }
        Ok(Self { network, prefix })
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

impl schemars::JsonSchema for Subnet {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Subnet".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "description": "An IPv4 subnet by its first address, such as 192.168.1.0/24; /8 to /30.",
            "type": "string",
            "pattern": "^[0-9]{1,3}(\\.[0-9]{1,3}){3}/([89]|[12][0-9]|30)$",
        })
    }
}

impl Serialize for Subnet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Subnet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

const fn default_miimon_ms() -> u32 {
    100
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet(text: &str) -> Subnet {
        text.parse().unwrap()
    }

    #[test]
    fn subnets_have_room() {
        assert_eq!(subnet("192.168.1.0/24").hosts(), 254);
        assert_eq!(subnet("192.168.1.0/24").host(2), Some(Ipv4Addr::new(192, 168, 1, 2)));
        assert_eq!(subnet("10.9.8.4/30").host(2), Some(Ipv4Addr::new(10, 9, 8, 6)));
        assert_eq!(subnet("10.9.8.4/30").host(3), None);
        assert_eq!(subnet("10.9.8.4/30").host(0), None);
    }

    #[test]
    fn subnets_overlap_or_do_not() {
        assert!(subnet("10.0.0.0/8").overlaps(subnet("10.42.0.0/16")));
        assert!(!subnet("192.168.1.0/24").overlaps(subnet("192.168.2.0/24")));
        assert!(subnet("192.168.1.0/24").overlaps(subnet("192.168.1.128/25")));
    }

    #[test]
    fn what_is_no_subnet() {
        for (text, error) in [
            ("192.168.1.0", SubnetError::Syntax("192.168.1.0".into())),
            ("192.168.1.256/24", SubnetError::Syntax("192.168.1.256/24".into())),
            ("192.168.1.0/33", SubnetError::Prefix(33)),
            (
                "192.168.1.7/24",
                SubnetError::HostBits {
                    given: Ipv4Addr::new(192, 168, 1, 7),
                    network: Ipv4Addr::new(192, 168, 1, 0),
                    prefix: 24,
                },
            ),
        ] {
            assert_eq!(text.parse::<Subnet>(), Err(error));
        }
    }
}
