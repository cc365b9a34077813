//! The files of a node's seed: everything that makes one base image this node.
//!
//! Pure: from the plan and the node's keys. Networks are systemd-networkd's; every interface does without a carrier, router
//! advertisements and link-local addresses, because waiting for any of them delays the addresses that are known here.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use images::seed::SeedFile;

use crate::plan::{AddressPlan, BondPlan, NodePlan, Plan};
use crate::scenario::Addressing;

/// What asks for an address in a `[Network]` section.
const DHCP: &str = "DHCP=ipv4";

/// By the MAC, which is what the reservation goes by; and nothing but the address is taken from the server: routes, names
/// and the hostname are known here.
const DHCP_OPTIONS: &str = "\n[DHCPv4]\nClientIdentifier=mac\nUseDNS=no\nUseNTP=no\nUseSIP=no\nUseDomains=no\nUseHostname=no\n\
                            UseMTU=no\nUseTimezone=no\nUseRoutes=no\nUseGateway=no\n";

/// A node's SSH keys in OpenSSH's formats.
#[derive(Clone)]
pub struct NodeKeys {
    /// The guest's private ed25519 host key (`-----BEGIN OPENSSH PRIVATE KEY-----` …).
    pub host_private: String,
    /// Its public half, one line; what the harness pins.
    pub host_public: String,
    /// The harness's public key, one line; root's only authorised key.
    pub authorized: String,
}

impl std::fmt::Debug for NodeKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NodeKeys").field("host_public", &self.host_public).finish_non_exhaustive()
    }
}

/// The seed of one node, in the order of the paths.
#[must_use]
pub fn seed_files(plan: &Plan, node: &NodePlan, keys: &NodeKeys) -> Vec<SeedFile> {
    let mut files = Files(Vec::new());
    files.add("/etc/hostname", 0o644, &line(&node.hostname));
    files.add("/etc/hosts", 0o644, &hosts(plan));
    files.add("/etc/machine-id", 0o444, &line(&node.machine_id));
    files.add("/etc/ssh/ssh_host_ed25519_key", 0o600, &line(&keys.host_private));
    files.add("/etc/ssh/ssh_host_ed25519_key.pub", 0o644, &line(&keys.host_public));
    files.add("/root/.ssh/authorized_keys", 0o600, &line(&keys.authorized));
    // FM-1: a k3s that loses its leases exits and has to come back by itself.
    let drop_in = format!("/etc/systemd/system/{}.d/10-harness.conf", node.k3s_unit);
    files.add(&drop_in, 0o644, "[Service]\nRestart=on-failure\nRestartSec=5\n");
    management(node, &mut files);
    nics(node, &mut files);
    if let Some(bond) = &node.bond {
        bond_files(node, bond, &mut files);
    }
    for address in &node.addresses {
        vlan(address, &mut files);
    }
    files.0.sort_by(|a, b| a.path.cmp(&b.path));
    files.0
}

fn hosts(plan: &Plan) -> String {
    let mut text = "127.0.0.1 localhost\n".to_owned();
    for node in &plan.nodes {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{} {}", node.cluster_ip, node.hostname);
    }
    text
}

fn management(node: &NodePlan, files: &mut Files) {
    let mgmt = &node.mgmt;
    let mask = Ipv4Addr::from(u32::MAX.checked_shl(32 - u32::from(mgmt.prefix)).unwrap_or(0));
    let early = format!("{} {} {} {mask}\n", mgmt.interface, mgmt.mac, mgmt.address);
    files.add(images::guest::EARLY_NETWORK_PATH, 0o644, &early);
    files.link(&mgmt.interface, mgmt.mac);
    files.network(
        10,
        &mgmt.interface,
        &[
            format!("Address={}/{}", mgmt.address, mgmt.prefix),
            // k3s looks for a default route to find its addresses by.
            format!("Gateway={}", mgmt.gateway),
            // The initrd has configured it and sshd answers on it: networkd would take the address away for a moment, and a
            // packet that meets it then is sent again a second later.
            "KeepConfiguration=static".to_owned(),
        ],
    );
}

fn nics(node: &NodePlan, files: &mut Files) {
    for nic in &node.nics {
        files.link(&nic.name, nic.mac);
        match node.bond.as_ref().filter(|bond| bond.members.contains(&nic.name)) {
            Some(bond) => {
                let mut lines = vec![format!("Bond={}", bond.name)];
                if bond.primary == nic.name {
                    lines.push("PrimarySlave=yes".to_owned());
                }
                files.network(10, &nic.name, &lines);
            }
            None => files.network(10, &nic.name, &carried(node, &nic.name)),
        }
    }
}

fn bond_files(node: &NodePlan, bond: &BondPlan, files: &mut Files) {
    // The module would make a bond0 of its own, in another mode, the moment it is loaded.
    files.add("/etc/modprobe.d/harness-bonding.conf", 0o644, "options bonding max_bonds=0\n");
    let netdev = format!(
        "[NetDev]\nName={}\nKind=bond\nMACAddress={}\n\n\
         [Bond]\nMode={}\nMIIMonitorSec={}ms\nPrimaryReselectPolicy=always\nFailOverMACPolicy=none\n",
        bond.name, bond.mac, bond.mode, bond.miimon_ms
    );
    files.add(&format!("/etc/systemd/network/20-{}.netdev", bond.name), 0o644, &netdev);
    files.network(20, &bond.name, &carried(node, &bond.name));
}

/// What lies on an interface: its VLANs, and its address where it carries an untagged network.
fn carried(node: &NodePlan, interface: &str) -> Vec<String> {
    (node.addresses.iter())
        .filter(|address| address.parent == interface)
        .map(|address| match address.vlan {
            Some(_) => format!("VLAN={}", address.interface),
            None => addressed(address),
        })
        .collect()
}

/// How an interface comes by its address.
fn addressed(address: &AddressPlan) -> String {
    match address.by {
        Addressing::Static => format!("Address={}/{}", address.address, address.prefix),
        Addressing::Dhcp => DHCP.to_owned(),
    }
}

fn vlan(address: &AddressPlan, files: &mut Files) {
    let Some(vlan) = address.vlan else { return };
    let name = &address.interface;
    let netdev = format!("[NetDev]\nName={name}\nKind=vlan\n\n[VLAN]\nId={vlan}\n");
    files.add(&format!("/etc/systemd/network/30-{name}.netdev"), 0o644, &netdev);
    files.network(30, name, &[addressed(address)]);
}

fn line(text: &str) -> String {
    format!("{}\n", text.trim_end())
}

struct Files(Vec<SeedFile>);

impl Files {
    fn add(&mut self, path: &str, mode: u32, content: &str) {
        self.0.push(SeedFile { path: path.to_owned(), mode, content: content.as_bytes().to_vec() });
    }

    /// Binds a name to a MAC. By the permanent address: the legs of a bond share their current one, as do its VLANs.
    fn link(&mut self, name: &str, mac: kvm::Mac) {
        let text = format!("[Match]\nPermanentMACAddress={mac}\n\n[Link]\nNamePolicy=\nName={name}\n");
        self.add(&format!("/etc/systemd/network/10-{name}.link"), 0o644, &text);
    }

    fn network(&mut self, order: u32, name: &str, lines: &[String]) {
        let mut text = format!("[Match]\nName={name}\n\n[Link]\nRequiredForOnline=no\n\n[Network]\n");
        text.push_str("LinkLocalAddressing=no\nIPv6AcceptRA=no\nLLMNR=no\nLLDP=no\n");
        // A leg follows its bond; everything else is set up at once and keeps its addresses when a link goes.
        if !lines.iter().any(|line| line.starts_with("Bond=")) {
            text.push_str("ConfigureWithoutCarrier=yes\n");
        }
        for line in lines {
            text.push_str(line);
            text.push('\n');
        }
        if lines.iter().any(|line| line == DHCP) {
            text.push_str(DHCP_OPTIONS);
        }
        self.add(&format!("/etc/systemd/network/{order}-{name}.network"), 0o644, &text);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::plan::tests::plan_of;

    fn keys() -> NodeKeys {
        NodeKeys {
            host_private: "-----BEGIN OPENSSH PRIVATE KEY-----\n(private)\n-----END OPENSSH PRIVATE KEY-----\n"
                .to_owned(),
            host_public: "ssh-ed25519 AAAA(host)".to_owned(),
            authorized: "ssh-ed25519 AAAA(harness)".to_owned(),
        }
    }

    /// A seed as one page.
    fn page(files: &[SeedFile]) -> String {
        let show = |file: &SeedFile| {
            format!("=== {} {:04o}\n{}", file.path, file.mode, String::from_utf8(file.content.clone()).unwrap())
        };
        files.iter().map(show).collect::<Vec<_>>().join("\n")
    }

    pub(crate) fn page_of(plan: &Plan, node: &NodePlan) -> String {
        page(&seed_files(plan, node, &keys()))
    }

    #[test]
    fn seeds_of_the_shipped_scenarios() {
        for name in ["smoke", "simple", "dhcp-simple", "vlans", "bonding-vlans"] {
            let plan = plan_of(name);
            let last = plan.nodes.last().unwrap();
            insta::assert_snapshot!(format!("seed_{name}"), page(&seed_files(&plan, last, &keys())));
        }
    }

    #[test]
    fn two_nodes_never_share_a_seed() {
        let plan = plan_of("bonding-vlans");
        let ids: Vec<String> =
            plan.nodes.iter().map(|node| images::seed::id(&seed_files(&plan, node, &keys()))).collect();
        assert_ne!(ids[0], ids[1]);
        assert_eq!(ids[0], images::seed::id(&seed_files(&plan, &plan.nodes[0], &keys())));
    }

    #[test]
    fn private_keys_are_private_and_never_shown() {
        let plan = plan_of("smoke");
        let files = seed_files(&plan, &plan.nodes[0], &keys());
        for file in &files {
            let secret = String::from_utf8_lossy(&file.content).contains("(private)");
            assert_eq!(secret, file.path == "/etc/ssh/ssh_host_ed25519_key", "{}", file.path);
            assert!(!secret || file.mode == 0o600);
        }
        assert!(!format!("{:?}", keys()).contains("(private)"));
    }
}
