//! The DHCP servers: where each is plugged in, and which address it keeps for whom.

use kvm::PortSpec;

use super::PlanError;
use super::model::{DhcpPlan, NodePlan, ReservationPlan};
use super::network::{Layout, next_port};
use crate::scenario::{Network, Profile};

/// The lease of a network that names none: longer than any run or kept lab, so that nothing depends on a renewal.
const LEASE_S: u32 = 24 * 60 * 60;

/// Gives each network with a DHCP server a port for it, on which the network is untagged. Reservations come with the nodes.
pub(super) fn servers(profile: &Profile, layout: &mut Layout) -> Result<Vec<DhcpPlan>, PlanError> {
    let networks = profile.networks.iter().filter_map(|network| Some((network, network.dhcp_server()?)));
    let mut servers = Vec::new();
    for ((network, address), mac) in networks.zip(layout.dhcp_macs.clone()) {
        let name = switch_of(profile, network);
        let no_switch = || PlanError::NoSwitch { profile: profile.name.clone(), switch: name.to_owned() };
        let switch = layout.switches.iter_mut().find(|switch| switch.name == name).ok_or_else(no_switch)?;
        let port = next_port(switch);
        let label = format!("DHCP server of {}", network.name);
        let native_vlan = Some(network.vlan.unwrap_or(0));
        switch.ports.push(PortSpec { port, label, native_vlan, tagged_vlans: Vec::new() });
        servers.push(DhcpPlan {
            network: network.name.clone(),
            switch: name.to_owned(),
            port,
            mac,
            address,
            prefix: network.subnet.prefix(),
            lease_s: network.lease_s.unwrap_or(LEASE_S),
            reservations: Vec::new(),
        });
    }
    Ok(servers)
}

/// The switch of the NIC that carries the network; of a bond, that of the preferred leg.
fn switch_of<'a>(profile: &'a Profile, network: &'a Network) -> &'a str {
    let bond = profile.bond.as_ref().filter(|bond| bond.name == network.parent);
    let nic = bond.and_then(|bond| bond.members.first()).unwrap_or(&network.parent);
    profile.nics.iter().find(|one| one.name == *nic).map_or("", |nic| nic.switch.as_str())
}

/// Keeps every node's address for the MAC it asks with: its bond's or its NIC's, which a VLAN on it shares.
pub(super) fn reserve(servers: &mut [DhcpPlan], nodes: &[NodePlan]) {
    for server in servers {
        server.reservations = (nodes.iter())
            .filter_map(|node| {
                let address = node.addresses.iter().find(|address| address.network == server.network)?;
                Some(ReservationPlan {
                    node: node.name.clone(),
                    mac: node.mac_of(&address.parent)?,
                    address: address.address,
                })
            })
            .collect();
    }
}
