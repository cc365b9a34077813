//! Each node: its addresses, its k3s, its VM, and what has to hold in it.

use std::net::Ipv4Addr;

use images::guest;
use kvm::{DiskFormat, DiskSpec, NicBackend, NicSpec, VmSpec};
use sha2::{Digest as _, Sha256};

use super::k3s::{self, Place};
use super::model::{AddressPlan, BondPlan, GuestCheck, MgmtPlan, NicPlan, NodePlan};
use super::network::{Layout, MGMT_INTERFACE, NodePorts};
use super::{Inputs, PlanError};
use crate::scenario::{Profile, Role, Scenario, ScenarioNode};

/// Every guest's address on its own user-mode network, and the gateway there: QEMU's defaults.
const MGMT_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const MGMT_GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const MGMT_PREFIX: u8 = 24;

pub(super) fn nodes(
    scenario: &Scenario,
    profile: &Profile,
    inputs: &Inputs,
    vcpus: &[u32],
    layout: &Layout,
) -> Result<Vec<NodePlan>, PlanError> {
    let mut nodes = Vec::new();
    let mut first: Option<Ipv4Addr> = None;
    for (((node, ports), vcpus), index) in scenario.nodes.iter().zip(&layout.ports).zip(vcpus).zip(1..) {
        let addresses = addresses(node, index, profile)?;
        let no_network =
            || PlanError::NoNetwork { profile: profile.name.clone(), network: profile.cluster_network.clone() };
        let cluster = addresses.iter().find(|a| a.network == profile.cluster_network).ok_or_else(no_network)?.clone();
        let place = Place { node, ip: cluster.address, interface: &cluster.interface, join: first };
        let k3s_args = k3s::args(scenario, &place);
        first.get_or_insert(cluster.address);
        let vm = vm(node, *vcpus, inputs, ports, layout);
        vm.validate().map_err(|source| PlanError::Vm { node: node.name.clone(), source })?;
        nodes.push(NodePlan {
            name: node.name.clone(),
            role: node.role,
            index,
            vcpus: *vcpus,
            memory_mib: node.memory_mib,
            hostname: node.name.clone(),
            machine_id: machine_id(&inputs.lab, &node.name),
            mgmt: MgmtPlan {
                interface: MGMT_INTERFACE.to_owned(),
                mac: ports.mgmt,
                address: MGMT_ADDRESS,
                prefix: MGMT_PREFIX,
                gateway: MGMT_GATEWAY,
            },
            nics: ports.nics.clone(),
            bond: bond(profile, &ports.nics),
            addresses,
            cluster_ip: cluster.address,
            flannel_iface: cluster.interface.clone(),
            k3s_unit: match node.role {
                Role::Server => guest::SERVER_UNIT.to_owned(),
                Role::Agent => guest::AGENT_UNIT.to_owned(),
            },
            k3s_args,
            seed_of: node.seed_of.clone(),
            checks: Vec::new(),
            argv: kvm::argv(&vm),
            vm,
        });
    }
    if nodes.is_empty() {
        return Err(PlanError::NoNodes(scenario.name.clone()));
    }
    let checks: Vec<_> = nodes.iter().map(|node| checks(node, &nodes)).collect();
    for (node, checks) in nodes.iter_mut().zip(checks) {
        node.checks = checks;
    }
    Ok(nodes)
}

fn addresses(node: &ScenarioNode, index: u32, profile: &Profile) -> Result<Vec<AddressPlan>, PlanError> {
    (profile.networks.iter())
        .map(|network| {
            let vlan = network.vlan.map(|vlan| node.vlans.get(&network.name).copied().unwrap_or(vlan));
            let no_address = || PlanError::NoAddress { network: network.name.clone(), node: index };
            Ok(AddressPlan {
                network: network.name.clone(),
                interface: network.interface(vlan),
                parent: network.parent.clone(),
                vlan,
                address: network.subnet.host(index).ok_or_else(no_address)?,
                prefix: network.subnet.prefix(),
                by: network.addresses,
            })
        })
        .collect()
}

fn bond(profile: &Profile, nics: &[NicPlan]) -> Option<BondPlan> {
    let bond = profile.bond.as_ref()?;
    let primary = nics.iter().find(|nic| bond.members.first() == Some(&nic.name))?;
    Some(BondPlan {
        name: bond.name.clone(),
        members: bond.members.clone(),
        mode: bond.mode,
        miimon_ms: bond.miimon_ms,
        primary: primary.name.clone(),
        mac: primary.mac,
    })
}

fn vm(node: &ScenarioNode, vcpus: u32, inputs: &Inputs, ports: &NodePorts, layout: &Layout) -> VmSpec {
    let paths = &inputs.paths;
    let records = paths.run.join("nodes").join(&node.name);
    let disk = |name: &str, format, read_only, serial: &str| DiskSpec {
        path: paths.disks.join(name),
        format,
        read_only,
        serial: serial.to_owned(),
    };
    let mut nics = vec![NicSpec {
        id: MGMT_INTERFACE.to_owned(),
        mac: ports.mgmt,
        backend: NicBackend::User { ssh_forward: true },
        unplugged: false,
    }];
    for nic in &ports.nics {
        if let Some(switch) = layout.switches.iter().find(|switch| switch.name == nic.switch) {
            let backend = NicBackend::Vde { socket_dir: switch.socket_dir.clone(), port: nic.port };
            let unplugged = node.unplugged.contains(&nic.name);
            nics.push(NicSpec { id: nic.name.clone(), mac: nic.mac, backend, unplugged });
        }
    }
    VmSpec {
        name: node.name.clone(),
        accel: inputs.calibration.accel,
        vcpus,
        memory_mib: node.memory_mib,
        kernel: paths.kernel.clone(),
        initrd: paths.initrd.clone(),
        cmdline: guest::CMDLINE.to_owned(),
        disks: vec![
            disk(&format!("{}.qcow2", node.name), DiskFormat::Qcow2, false, guest::ROOT_SERIAL),
            disk(&format!("{}.seed", node.name), DiskFormat::Raw, true, guest::SEED_SERIAL),
        ],
        nics,
        console_log: records.join("console.log"),
        qmp_socket: paths.sockets.join(format!("{}.qmp", node.name)),
        stderr_log: records.join("qemu.log"),
    }
}

/// The same for the same lab and node, never for another: 128 bits of a SHA-256, as machine-id(5) wants them.
fn machine_id(lab: &str, node: &str) -> String {
    let digest = Sha256::digest(format!("machine-id {lab} {node}"));
    digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

fn checks(node: &NodePlan, nodes: &[NodePlan]) -> Vec<GuestCheck> {
    let mut checks = vec![GuestCheck::Nic { interface: node.mgmt.interface.clone(), mac: node.mgmt.mac }];
    checks.extend(node.nics.iter().map(|nic| GuestCheck::Nic { interface: nic.name.clone(), mac: nic.mac }));
    checks.extend(node.bond.iter().map(|bond| GuestCheck::Bond {
        interface: bond.name.clone(),
        mode: bond.mode,
        members: bond.members.clone(),
    }));
    for own in &node.addresses {
        if let Some(vlan) = own.vlan {
            checks.push(GuestCheck::Vlan { interface: own.interface.clone(), parent: own.parent.clone(), vlan });
        }
        let (interface, address, prefix) = (own.interface.clone(), own.address, own.prefix);
        checks.push(GuestCheck::Address { interface, address, prefix });
    }
    for own in &node.addresses {
        for other in nodes.iter().filter(|other| other.name != node.name) {
            for theirs in other.addresses.iter().filter(|theirs| theirs.network == own.network) {
                checks.push(GuestCheck::Reach {
                    network: own.network.clone(),
                    interface: own.interface.clone(),
                    node: other.name.clone(),
                    address: theirs.address,
                });
            }
        }
    }
    checks
}
