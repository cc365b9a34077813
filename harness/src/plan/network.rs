//! Who is plugged into which port, and which VLANs the port carries.

use std::collections::BTreeMap;

use kvm::{Mac, PortSpec, SwitchSpec, socket_path_fits};

use super::model::{LinkEnd, LinkPlan, NicPlan};
use super::{Inputs, PlanError};
use crate::scenario::{Profile, Scenario};

/// The management NIC's name in every guest.
pub(super) const MGMT_INTERFACE: &str = "eth0";

/// What programs add to a switch's socket folder for their own sockets there (`/.` and two numbers in vde2's libvdeplug).
const PLUG_SUFFIX: &str = "/.0000000-00000";

pub(super) struct Layout {
    pub(super) switches: Vec<SwitchSpec>,
    pub(super) links: Vec<LinkPlan>,
    /// Per node, in the scenario's order.
    pub(super) ports: Vec<NodePorts>,
    /// Per network with a DHCP server, in the profile's order.
    pub(super) dhcp_macs: Vec<Mac>,
}

pub(super) struct NodePorts {
    pub(super) mgmt: Mac,
    pub(super) nics: Vec<NicPlan>,
}

/// What a port carries.
#[derive(Clone)]
struct Carried {
    native_vlan: Option<u16>,
    tagged_vlans: Vec<u16>,
}

impl Carried {
    /// The VLANs of the networks that satisfy `wanted`.
    fn by(profile: &Profile, wanted: impl Fn(&str) -> bool) -> Self {
        let networks: Vec<_> = profile.networks.iter().filter(|network| wanted(&network.parent)).collect();
        let mut tagged_vlans: Vec<u16> = networks.iter().filter_map(|network| network.vlan).collect();
        tagged_vlans.sort_unstable();
        tagged_vlans.dedup();
        // A port that carries no untagged network drops untagged frames, as a trunk should.
        let native_vlan = networks.iter().any(|network| network.vlan.is_none()).then_some(0);
        Self { native_vlan, tagged_vlans }
    }

    fn port(&self, port: u16, label: String) -> PortSpec {
        PortSpec { port, label, native_vlan: self.native_vlan, tagged_vlans: self.tagged_vlans.clone() }
    }
}

pub(super) fn layout(scenario: &Scenario, profile: &Profile, inputs: &Inputs) -> Result<Layout, PlanError> {
    let sockets = &inputs.paths.sockets;
    let mut switches: Vec<SwitchSpec> = (profile.switches.iter())
        .map(|name| SwitchSpec {
            name: name.clone(),
            socket_dir: sockets.join(name),
            mgmt_socket: sockets.join(format!("{name}.mgmt")),
            ports: Vec::new(),
        })
        .collect();
    for switch in &switches {
        let plug = format!("{}{PLUG_SUFFIX}", switch.socket_dir);
        for path in [plug.as_str().into(), switch.mgmt_socket.as_path()] {
            socket_path_fits(path).map_err(|source| PlanError::Switch { switch: switch.name.clone(), source })?;
        }
    }
    let (ports, dhcp_macs) = ports(scenario, profile, inputs, &mut switches)?;
    let links = if profile.joined { join(profile, &mut switches) } else { Vec::new() };
    Ok(Layout { switches, links, ports, dhcp_macs })
}

fn ports(
    scenario: &Scenario,
    profile: &Profile,
    inputs: &Inputs,
    switches: &mut [SwitchSpec],
) -> Result<(Vec<NodePorts>, Vec<Mac>), PlanError> {
    let carried: BTreeMap<&str, Carried> = (profile.nics.iter())
        .map(|nic| {
            let bond = profile.bond.as_ref().filter(|bond| bond.members.contains(&nic.name));
            let carried =
                Carried::by(profile, |parent| parent == nic.name || bond.is_some_and(|bond| bond.name == parent));
            (nic.name.as_str(), carried)
        })
        .collect();
    let names = |node| {
        std::iter::once(MGMT_INTERFACE)
            .chain(profile.nics.iter().map(|nic| nic.name.as_str()))
            .map(move |nic| (inputs.lab.as_str(), node, nic))
    };
    let servers: Vec<_> = (profile.networks.iter().filter(|network| network.dhcp_server().is_some()))
        .map(|network| (inputs.lab.as_str(), "dhcp", network.name.as_str()))
        .collect();
    let nics = scenario.nodes.iter().flat_map(|node| names(node.name.as_str()));
    let mut macs = Mac::derive_unique(nics.chain(servers))?.into_iter();
    // One address per name asked for, so the iterator cannot run dry before the names do.
    let mut next_mac = || macs.next().ok_or(kvm::MacError::TooMany { asked: 0 });
    let mut nodes = Vec::new();
    for node in &scenario.nodes {
        let mgmt = next_mac()?;
        let mut nics = Vec::new();
        for nic in &profile.nics {
            let no_switch = || PlanError::NoSwitch { profile: profile.name.clone(), switch: nic.switch.clone() };
            let switch = switches.iter_mut().find(|switch| switch.name == nic.switch).ok_or_else(no_switch)?;
            let port = next_port(switch);
            if let Some(carried) = carried.get(nic.name.as_str()) {
                switch.ports.push(carried.port(port, format!("{} {}", node.name, nic.name)));
            }
            nics.push(NicPlan { name: nic.name.clone(), mac: next_mac()?, switch: nic.switch.clone(), port });
        }
        nodes.push(NodePorts { mgmt, nics });
    }
    // What is left belongs to the servers.
    Ok((nodes, macs.collect()))
}

/// Joins each switch to the next: a chain has no loop, and VDE switches run no spanning tree by default.
fn join(profile: &Profile, switches: &mut [SwitchSpec]) -> Vec<LinkPlan> {
    let carried = Carried::by(profile, |_| true);
    let mut links = Vec::new();
    for second in 1..switches.len() {
        let [a, b] = [second - 1, second].map(|at| (switches[at].name.clone(), next_port(&switches[at])));
        switches[second - 1].ports.push(carried.port(a.1, format!("link to {}", b.0)));
        switches[second].ports.push(carried.port(b.1, format!("link to {}", a.0)));
        let end = |(switch, port)| LinkEnd { switch, port };
        links.push(LinkPlan { a: end(a), b: end(b) });
    }
    links
}

/// Ports are numbered from 1 in the order they are given out.
pub(super) fn next_port(switch: &SwitchSpec) -> u16 {
    u16::try_from(switch.ports.len()).unwrap_or(u16::MAX).saturating_add(1)
}

pub(super) fn warnings(scenario: &Scenario, profile: &Profile) -> Vec<String> {
    let mut warnings = Vec::new();
    if let Some(bond) = &profile.bond
        && !profile.joined
    {
        let mut switches: Vec<&str> = (profile.nics.iter())
            .filter(|nic| bond.members.contains(&nic.name))
            .map(|nic| nic.switch.as_str())
            .collect();
        switches.dedup();
        if switches.len() > 1 {
            warnings.push(format!(
                "the legs of {} are on switches that are not joined: nodes reach each other only while all use the same leg",
                bond.name
            ));
        }
    }
    for node in &scenario.nodes {
        if let Some(other) = &node.seed_of {
            warnings.push(format!("{} is given the seed of {other} on purpose", node.name));
        }
        for nic in &node.unplugged {
            warnings.push(format!("fault by the scenario: {nic} of {} is unplugged", node.name));
        }
        for (network, vlan) in &node.vlans {
            warnings.push(format!(
                "fault by the scenario: {} uses VLAN {vlan} for network {network}; no switch carries it",
                node.name
            ));
        }
    }
    warnings
}
