//! The plan's types. Their JSON form is `plan.json`.

use std::net::Ipv4Addr;

use images::airgap::AirgapImages;
use kvm::{Accel, Mac, SwitchSpec, VmSpec};
use serde::{Deserialize, Serialize};

use crate::scenario::{Addressing, BondMode, Expect, Phase, Role};

/// Everything a run would do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Plan {
    /// Version of this form.
    pub schema_version: u32,
    /// The lab's id.
    pub lab: String,
    /// The scenario's name.
    pub scenario: String,
    /// The scenario in one line.
    pub description: String,
    /// The profile's name.
    pub profile: String,
    /// Which k3s, as every output names it.
    pub k3s: String,
    /// The tarball of images laid into every node for k3s to import.
    #[serde(default, skip_serializing_if = "AirgapImages::is_none")]
    pub airgap_images: AirgapImages,
    /// The recipe of the guest image.
    pub image: String,
    /// How the run is expected to end.
    pub expect: Expect,
    /// What is known of the host.
    pub host: HostPlan,
    /// vCPUs asked for against cores there are.
    pub oversubscription: Oversubscription,
    /// The switches, with the VLANs of every port.
    pub switches: Vec<SwitchSpec>,
    /// What joins them.
    pub links: Vec<LinkPlan>,
    /// The harness's own DHCP servers, one per network that has its addresses from one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dhcp: Vec<DhcpPlan>,
    /// The nodes; the first is the server the others join.
    pub nodes: Vec<NodePlan>,
    /// How long etcd and the API have to stay good after each join.
    pub settle_ms: u64,
    /// How the joiners' paths to the first server are tried.
    pub prewarm: PrewarmPlan,
    /// Preventions the scenario goes without.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub without: Vec<Phase>,
    /// The phases in their order.
    pub phases: Vec<PhasePlan>,
    /// What a person should know before the run.
    pub warnings: Vec<String>,
}

impl Plan {
    /// The node of this name.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<&NodePlan> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// The nodes that join the first one, in the order they do.
    pub fn joiners(&self) -> impl Iterator<Item = &NodePlan> {
        self.nodes.iter().skip(1)
    }

    /// The servers, which are the etcd members.
    pub fn servers(&self) -> impl Iterator<Item = &NodePlan> {
        self.nodes.iter().filter(|node| node.role == Role::Server)
    }

    /// The plan of a phase.
    #[must_use]
    pub fn phase(&self, phase: Phase) -> Option<&PhasePlan> {
        self.phases.iter().find(|plan| plan.phase == phase)
    }
}

/// What is known of the host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct HostPlan {
    /// What guests run under.
    pub accel: Accel,
    /// How many times slower than hardware KVM.
    pub slowdown: f64,
    /// Whether that was measured on this host, or assumed.
    pub measured: bool,
    /// Cores the harness may use.
    pub cores: u32,
    /// All memory; 0 where not known.
    pub memory_total_mib: u64,
    /// Memory to be had; 0 where not known.
    pub memory_available_mib: u64,
}

/// vCPUs asked for against cores there are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Oversubscription {
    /// vCPUs over all nodes.
    pub vcpus: u32,
    /// Cores of the host.
    pub cores: u32,
    /// The one by the other.
    pub ratio: f64,
    /// The warning, where the ratio is above 1 (FM-5).
    pub warning: Option<String>,
}

/// Two switches joined.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct LinkPlan {
    /// One end.
    pub a: LinkEnd,
    /// The other.
    pub b: LinkEnd,
}

/// A link's end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct LinkEnd {
    /// The switch.
    pub switch: String,
    /// Its port.
    pub port: u16,
}

/// A DHCP server of the harness, on a port of a switch like any machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct DhcpPlan {
    /// The network it serves.
    pub network: String,
    /// The switch it is plugged into.
    pub switch: String,
    /// The port of it; it carries the network untagged.
    pub port: u16,
    /// Its MAC.
    pub mac: Mac,
    /// Its address.
    pub address: Ipv4Addr,
    /// Prefix length.
    pub prefix: u8,
    /// How long a lease lasts; clients renew it after half of that.
    pub lease_s: u32,
    /// Who gets which address. Nobody else gets one.
    pub reservations: Vec<ReservationPlan>,
}

/// An address kept for one MAC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct ReservationPlan {
    /// The node.
    pub node: String,
    /// The MAC it asks with.
    pub mac: Mac,
    /// The address it gets.
    pub address: Ipv4Addr,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct NodePlan {
    /// Its name.
    pub name: String,
    /// What it is in the cluster.
    pub role: Role,
    /// Its number, from 1.
    pub index: u32,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory.
    pub memory_mib: u32,
    /// Its hostname, also its name in the cluster.
    pub hostname: String,
    /// systemd's machine id: 32 hexadecimal digits.
    pub machine_id: String,
    /// The management NIC.
    pub mgmt: MgmtPlan,
    /// The NICs on the lab's switches.
    pub nics: Vec<NicPlan>,
    /// The bond over some of them.
    pub bond: Option<BondPlan>,
    /// Its addresses, one per network.
    pub addresses: Vec<AddressPlan>,
    /// Its address on the cluster network.
    pub cluster_ip: Ipv4Addr,
    /// The interface that has it.
    pub flannel_iface: String,
    /// The systemd unit that runs k3s here.
    pub k3s_unit: String,
    /// k3s's arguments behind `k3s server` or `k3s agent`; the token is [`super::TOKEN_PLACEHOLDER`].
    pub k3s_args: Vec<String>,
    /// The node whose seed it is given, where the scenario mixes them up on purpose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed_of: Option<String>,
    /// What has to hold in the guest before k3s is started.
    pub checks: Vec<GuestCheck>,
    /// The VM.
    pub vm: VmSpec,
    /// The command line that follows from it.
    pub argv: Vec<String>,
}

impl NodePlan {
    /// The MAC of a NIC or bond of this node.
    #[must_use]
    pub fn mac_of(&self, interface: &str) -> Option<Mac> {
        let bond = self.bond.iter().find(|bond| bond.name == interface).map(|bond| bond.mac);
        bond.or_else(|| self.nics.iter().find(|nic| nic.name == interface).map(|nic| nic.mac))
    }
}

/// The management NIC: user-mode network, SSH only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct MgmtPlan {
    /// Its name in the guest.
    pub interface: String,
    /// Its MAC.
    pub mac: Mac,
    /// Its address, the same in every guest.
    pub address: Ipv4Addr,
    /// Prefix length.
    pub prefix: u8,
    /// The default route.
    pub gateway: Ipv4Addr,
}

/// A NIC on one of the lab's switches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct NicPlan {
    /// Its name in the guest.
    pub name: String,
    /// Its MAC.
    pub mac: Mac,
    /// The switch.
    pub switch: String,
    /// The port of it.
    pub port: u16,
}

/// A bond.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct BondPlan {
    /// Its name in the guest.
    pub name: String,
    /// Its members.
    pub members: Vec<String>,
    /// How it uses them.
    pub mode: BondMode,
    /// How often links are looked at.
    pub miimon_ms: u32,
    /// The member preferred when all are up.
    pub primary: String,
    /// The bond's MAC: the primary's.
    pub mac: Mac,
}

/// An address on a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct AddressPlan {
    /// The network.
    pub network: String,
    /// The interface that has the address.
    pub interface: String,
    /// The NIC or bond that carries it; the interface itself where there is no VLAN.
    pub parent: String,
    /// The VLAN.
    pub vlan: Option<u16>,
    /// The address.
    pub address: Ipv4Addr,
    /// Prefix length.
    pub prefix: u8,
    /// How the node gets it.
    #[serde(default, skip_serializing_if = "Addressing::is_static")]
    pub by: Addressing,
}

/// Something that has to hold in a guest's network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case", rename_all_fields = "snake_case")]
pub enum GuestCheck {
    /// The interface has this (permanent) MAC.
    Nic {
        /// The interface.
        interface: String,
        /// Its MAC.
        mac: Mac,
    },
    /// The bond's MII status is up, in this mode, with these members and one of them active.
    Bond {
        /// The bond.
        interface: String,
        /// Its mode.
        mode: BondMode,
        /// Its members.
        members: Vec<String>,
    },
    /// The VLAN link exists on this parent with this id.
    Vlan {
        /// The link.
        interface: String,
        /// What it lies on.
        parent: String,
        /// The VLAN.
        vlan: u16,
    },
    /// The interface is up and has the address.
    Address {
        /// The interface.
        interface: String,
        /// The address.
        address: Ipv4Addr,
        /// Prefix length.
        prefix: u8,
    },
    /// Another node answers on a network.
    Reach {
        /// The network.
        network: String,
        /// The interface the way leads through.
        interface: String,
        /// The other node.
        node: String,
        /// Its address.
        address: Ipv4Addr,
    },
}

/// How a joiner's path to the first server is tried before k3s is started (FM-4).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct PrewarmPlan {
    /// Attempts at most.
    pub attempts: u32,
    /// Each one's deadline.
    pub attempt_timeout_ms: u64,
    /// The pause between two.
    pub pause_ms: u64,
}

impl Default for PrewarmPlan {
    fn default() -> Self {
        Self { attempts: 3, attempt_timeout_ms: 15_000, pause_ms: 2_000 }
    }
}

/// What a phase's deadline holds for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PhaseScope {
    /// The whole lab at once.
    Lab,
    /// Each node; all at once.
    EachNode,
    /// Each node named; one after the other.
    OneByOne,
}

/// A phase with its deadline.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct PhasePlan {
    /// The phase.
    pub phase: Phase,
    /// What the deadline holds for.
    pub scope: PhaseScope,
    /// The nodes it works on; none means there is nothing to do.
    pub nodes: Vec<String>,
    /// When it is given up.
    pub deadline_ms: u64,
    /// What hardware KVM with a core per vCPU would get.
    pub base_ms: u64,
    /// What made the one of the other.
    pub scaled_by: String,
}
