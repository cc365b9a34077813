//! What a scenario or profile must be beyond its types, each finding with its place in the file.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use images::yaml::{Segment, YamlError};

use super::Phase;
use super::model::{Outcome, Role, Scenario, Vcpus};
use super::profile::{Addressing, Profile, Subnet};
use super::{MANAGEMENT_CIDR, MAX_NODES, POD_CIDR, SERVICE_CIDR};

/// Longest name of a network interface: `IFNAMSIZ` of `linux/if.h` is 16 bytes, one of which ends the text.
const MAX_INTERFACE_BYTES: usize = 15;
/// Longest settle period.
const MAX_SETTLE_MS: u64 = 600_000;
/// Shortest and longest DHCP lease: time enough to renew it on a busy host, and a week.
const LEASE_S: RangeInclusive<u32> = 10..=604_800;

/// Phases whose only work is to prevent failures.
const PREVENTIONS: [Phase; 3] = [Phase::Sanitize, Phase::Prewarm, Phase::Settle];

/// A parsed document with its text, to say where things are.
#[derive(Clone, Copy)]
pub(super) struct Document<'a> {
    pub(super) text: &'a str,
    pub(super) file: &'a str,
}

impl Document<'_> {
    pub(super) fn at(self, path: &[Segment], message: impl Into<String>) -> YamlError {
        YamlError::at(self.text, self.file, path, message)
    }
}

macro_rules! path {
    ($($segment:expr),* $(,)?) => { [$(Segment::from($segment)),*] };
}

pub(super) fn scenario(scenario: &Scenario, doc: Document<'_>) -> Result<(), YamlError> {
    label(&scenario.name, &path!["name"], doc)?;
    one_line(&scenario.description, &path!["description"], doc)?;
    label(&scenario.profile, &path!["profile"], doc)?;
    label(&scenario.image, &path!["image"], doc)?;
    if let Err(error) = scenario.airgap_images.version(&scenario.k3s) {
        let expected = "`release:VERSION`, `file:/path/to/images.tar.zst` or `none`";
        return Err(doc.at(&path!["airgap_images"], error.to_string()).expected(expected));
    }
    if !(1..=MAX_NODES).contains(&scenario.nodes.len()) {
        let message = format!("{} nodes", scenario.nodes.len());
        return Err(doc.at(&path!["nodes"], message).expected(format!("1 to {MAX_NODES}")));
    }
    if scenario.settle_ms > MAX_SETTLE_MS {
        let message = format!("a settle period of {} ms", scenario.settle_ms);
        return Err(doc.at(&path!["settle_ms"], message).expected(format!("0 to {MAX_SETTLE_MS}")));
    }
    let mut names = BTreeSet::new();
    for (index, node) in scenario.nodes.iter().enumerate() {
        label(&node.name, &path!["nodes", index, "name"], doc)?;
        if node.name == "localhost" {
            let message = "a node cannot be called localhost";
            return Err(doc.at(&path!["nodes", index, "name"], message).expected("a name of its own"));
        }
        if !names.insert(&node.name) {
            let message = format!("two nodes are called `{}`", node.name);
            return Err(doc.at(&path!["nodes", index, "name"], message).expected("a name per node"));
        }
        if index == 0 && node.role != Role::Server {
            let message = "the first node is no server";
            return Err(doc
                .at(&path!["nodes", 0, "role"], message)
                .expected("`server`: the others join the first node"));
        }
        // Also caught while parsing; here for scenarios that were made by a program.
        if let Vcpus::Count(count) = node.vcpus
            && !(1..=64).contains(&count)
        {
            let message = format!("{count} vCPUs");
            return Err(doc.at(&path!["nodes", index, "vcpus"], message).expected("`auto` or 1 to 64"));
        }
        if !(256..=65_536).contains(&node.memory_mib) {
            let message = format!("{} MiB of memory", node.memory_mib);
            return Err(doc.at(&path!["nodes", index, "memory_mib"], message).expected("256 to 65536"));
        }
        if let Some(other) = &node.seed_of
            && (other == &node.name || !scenario.nodes.iter().any(|one| &one.name == other))
        {
            let message = format!("`{other}` is no other node of this scenario");
            return Err(doc.at(&path!["nodes", index, "seed_of"], message).expected("the name of another node"));
        }
        for (network, vlan) in &node.vlans {
            vlan_id(*vlan, &path!["nodes", index, "vlans", network.as_str()], doc)?;
        }
    }
    let mut disabled = BTreeSet::new();
    for (index, component) in scenario.disable.iter().enumerate() {
        label(component, &path!["disable", index], doc)?;
        if !disabled.insert(component) {
            let message = format!("`{component}` is disabled twice");
            return Err(doc.at(&path!["disable", index], message).expected("each component once"));
        }
    }
    for (index, phase) in scenario.without.iter().enumerate() {
        if !PREVENTIONS.contains(phase) {
            let message = format!("a run cannot go without `{phase}`");
            return Err(doc.at(&path!["without", index], message).expected("`sanitize`, `prewarm` or `settle`"));
        }
    }
    if scenario.expect.outcome == Outcome::Pass && scenario.expect.phase.is_some() {
        let message = "a pass ends in no particular phase";
        return Err(doc.at(&path!["expect", "phase"], message).expected("a phase only with `outcome: failure`"));
    }
    Ok(())
}

pub(super) fn profile(profile: &Profile, doc: Document<'_>) -> Result<(), YamlError> {
    label(&profile.name, &path!["name"], doc)?;
    one_line(&profile.description, &path!["description"], doc)?;
    count(profile.switches.len(), 4, "switches", doc)?;
    let mut switches = BTreeSet::new();
    for (index, switch) in profile.switches.iter().enumerate() {
        label(switch, &path!["switches", index], doc)?;
        // Names become parts of socket paths, which are short.
        if switch.len() > 16 {
            return Err(doc
                .at(&path!["switches", index], "the switch's name is too long")
                .expected("up to 16 letters"));
        }
        if !switches.insert(switch.as_str()) {
            let message = format!("two switches are called `{switch}`");
            return Err(doc.at(&path!["switches", index], message).expected("a name per switch"));
        }
        if !profile.nics.iter().any(|nic| nic.switch == *switch) {
            let message = format!("no NIC is plugged into switch `{switch}`");
            return Err(doc.at(&path!["switches", index], message).expected("every switch in use"));
        }
    }
    if profile.joined && profile.switches.len() < 2 {
        let message = "one switch cannot be joined to another";
        return Err(doc.at(&path!["joined"], message).expected("two switches or more, or `joined: false`"));
    }
    count(profile.nics.len(), 8, "nics", doc)?;
    let mut interfaces = BTreeSet::from(["eth0", "lo"]);
    for (index, nic) in profile.nics.iter().enumerate() {
        interface(&nic.name, &path!["nics", index, "name"], doc)?;
        if !interfaces.insert(&nic.name) {
            let message = format!("the interface `{}` is taken", nic.name);
            return Err(doc
                .at(&path!["nics", index, "name"], message)
                .expected("a name of its own; eth0 is the management NIC"));
        }
        known(&nic.switch, "switch", &profile.switches, &path!["nics", index, "switch"], doc)?;
    }
    let nics: Vec<&str> = profile.nics.iter().map(|nic| nic.name.as_str()).collect();
    if let Some(bond) = &profile.bond {
        interface(&bond.name, &path!["bond", "name"], doc)?;
        if !interfaces.insert(&bond.name) {
            let message = format!("the interface `{}` is taken", bond.name);
            return Err(doc.at(&path!["bond", "name"], message).expected("a name of its own"));
        }
        if bond.members.len() < 2 {
            return Err(doc
                .at(&path!["bond", "members"], "a bond of fewer than two NICs")
                .expected("two members or more"));
        }
        let mut members = BTreeSet::new();
        for (index, member) in bond.members.iter().enumerate() {
            known(member, "NIC", &nics, &path!["bond", "members", index], doc)?;
            if !members.insert(member) {
                let message = format!("`{member}` is a member twice");
                return Err(doc.at(&path!["bond", "members", index], message).expected("each NIC once"));
            }
        }
        if !(10..=1000).contains(&bond.miimon_ms) {
            let message = format!("a link check every {} ms", bond.miimon_ms);
            return Err(doc.at(&path!["bond", "miimon_ms"], message).expected("10 to 1000"));
        }
    }
    networks(profile, &nics, doc)
}

fn networks(profile: &Profile, nics: &[&str], doc: Document<'_>) -> Result<(), YamlError> {
    count(profile.networks.len(), 8, "networks", doc)?;
    let members: &[String] = profile.bond.as_ref().map_or(&[], |bond| &bond.members);
    let parents: Vec<&str> = (nics.iter().copied())
        .filter(|nic| !members.iter().any(|member| member == nic))
        .chain(profile.bond.as_ref().map(|bond| bond.name.as_str()))
        .collect();
    let mut names = BTreeSet::new();
    let mut carried = BTreeSet::new();
    let mut subnets: Vec<(String, Subnet)> = Vec::new();
    for (what, cidr) in
        [("the pods'", POD_CIDR), ("the services'", SERVICE_CIDR), ("the management NIC's", MANAGEMENT_CIDR)]
    {
        if let Ok(subnet) = cidr.parse() {
            subnets.push((format!("{what} {cidr}"), subnet));
        }
    }
    for (index, network) in profile.networks.iter().enumerate() {
        label(&network.name, &path!["networks", index, "name"], doc)?;
        if !names.insert(network.name.as_str()) {
            let message = format!("two networks are called `{}`", network.name);
            return Err(doc.at(&path!["networks", index, "name"], message).expected("a name per network"));
        }
        let parent = &path!["networks", index, "parent"];
        if members.contains(&network.parent) {
            let message = format!("`{}` is a bond's member and carries no network of its own", network.parent);
            return Err(doc.at(parent, message).expected(one_of(&parents)));
        }
        known(&network.parent, "interface", &parents, parent, doc)?;
        if let Some(vlan) = network.vlan {
            vlan_id(vlan, &path!["networks", index, "vlan"], doc)?;
            let name = network.interface(Some(vlan));
            if name.len() > MAX_INTERFACE_BYTES {
                let message = format!("the interface would be called `{name}`");
                return Err(doc.at(parent, message).expected(format!("at most {MAX_INTERFACE_BYTES} letters")));
            }
        }
        if !carried.insert((network.parent.as_str(), network.vlan)) {
            let what = network.vlan.map_or_else(|| "untagged traffic".to_owned(), |vlan| format!("VLAN {vlan}"));
            let message = format!("two networks use {what} on `{}`", network.parent);
            let field = if network.vlan.is_some() { "vlan" } else { "parent" };
            return Err(doc.at(&path!["networks", index, field], message).expected("a VLAN per network"));
        }
        let place = &path!["networks", index, "subnet"];
        let first = network.subnet.network();
        if first.is_loopback()
            || first.is_multicast()
            || first.is_unspecified()
            || first.is_link_local()
            || first.octets()[0] >= 240
        {
            return Err(doc
                .at(place, format!("{} is no subnet for hosts", network.subnet))
                .expected("a unicast subnet"));
        }
        if let Some((other, _)) = subnets.iter().find(|(_, other)| other.overlaps(network.subnet)) {
            let message = format!("{} overlaps {other}", network.subnet);
            return Err(doc.at(place, message).expected("a subnet of its own"));
        }
        subnets.push((format!("network `{}`", network.name), network.subnet));
    }
    for (index, network) in profile.networks.iter().enumerate() {
        let Some(lease_s) = network.lease_s else { continue };
        let place = &path!["networks", index, "lease_s"];
        if network.addresses != Addressing::Dhcp {
            return Err(doc.at(place, "a lease without DHCP").expected("`lease_s` only with `addresses: dhcp`"));
        }
        if !LEASE_S.contains(&lease_s) {
            let message = format!("a lease of {lease_s} s");
            return Err(doc.at(place, message).expected(format!("{} to {}", LEASE_S.start(), LEASE_S.end())));
        }
    }
    let names: Vec<&str> = profile.networks.iter().map(|network| network.name.as_str()).collect();
    known(&profile.cluster_network, "network", &names, &path!["cluster_network"], doc)
}

/// What only the two together show.
pub(super) fn together(
    scenario: &Scenario,
    scenario_doc: Document<'_>,
    profile: &Profile,
    profile_doc: Document<'_>,
) -> Result<(), YamlError> {
    for (index, network) in profile.networks.iter().enumerate() {
        let server = u32::from(network.dhcp_server().is_some());
        let room = network.subnet.hosts() - server;
        if (room as usize) < scenario.nodes.len() {
            let message = format!(
                "{} has room for {room} node{}{}, scenario `{}` has {}",
                network.subnet,
                if room == 1 { "" } else { "s" },
                if server > 0 { " besides its DHCP server" } else { "" },
                scenario.name,
                scenario.nodes.len()
            );
            return Err(profile_doc.at(&path!["networks", index, "subnet"], message).expected("a larger subnet"));
        }
    }
    let tagged: Vec<&str> =
        profile.networks.iter().filter(|n| n.vlan.is_some()).map(|network| network.name.as_str()).collect();
    let nics: Vec<&str> = profile.nics.iter().map(|nic| nic.name.as_str()).collect();
    for (index, node) in scenario.nodes.iter().enumerate() {
        for (n, nic) in node.unplugged.iter().enumerate() {
            known(nic, "NIC", &nics, &path!["nodes", index, "unplugged", n], scenario_doc)?;
        }
        for (network, vlan) in &node.vlans {
            let place = &path!["nodes", index, "vlans", network.as_str()];
            known(network, "tagged network", &tagged, place, scenario_doc)?;
            let clash = profile.networks.iter().find(|other| {
                other.name != *network
                    && node.vlans.get(&other.name).copied().or(other.vlan) == Some(*vlan)
                    && profile.networks.iter().any(|this| this.name == *network && this.parent == other.parent)
            });
            if let Some(other) = clash {
                let message = format!("VLAN {vlan} is network `{}`'s on the same interface", other.name);
                return Err(scenario_doc.at(place, message).expected("a VLAN nothing else uses"));
            }
        }
    }
    Ok(())
}

fn count(have: usize, most: usize, field: &str, doc: Document<'_>) -> Result<(), YamlError> {
    if (1..=most).contains(&have) {
        return Ok(());
    }
    Err(doc.at(&path![field], format!("{have} {field}")).expected(format!("1 to {most}")))
}

fn vlan_id(vlan: u16, path: &[Segment], doc: Document<'_>) -> Result<(), YamlError> {
    // IEEE 802.1Q: 0 means "priority only", 4095 is reserved.
    if (1..=4094).contains(&vlan) {
        return Ok(());
    }
    Err(doc.at(path, format!("VLAN {vlan} does not exist")).expected("1 to 4094"))
}

/// A host name label by RFC 1123, section 2.1, in lower case.
fn label(name: &str, path: &[Segment], doc: Document<'_>) -> Result<(), YamlError> {
    let ok = (1..=63).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-');
    if ok {
        return Ok(());
    }
    let expected = "1 to 63 of a-z, 0-9 and `-`, neither first nor last a `-` (RFC 1123)";
    Err(doc.at(path, format!("{name:?} is no usable name")).expected(expected))
}

fn interface(name: &str, path: &[Segment], doc: Document<'_>) -> Result<(), YamlError> {
    let ok = (1..=MAX_INTERFACE_BYTES).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    if ok {
        return Ok(());
    }
    let expected = format!("a letter, then letters and digits, at most {MAX_INTERFACE_BYTES}, such as eth1");
    Err(doc.at(path, format!("{name:?} is no name for an interface")).expected(expected))
}

fn one_line(text: &str, path: &[Segment], doc: Document<'_>) -> Result<(), YamlError> {
    let length = text.chars().count();
    if (1..=200).contains(&length) && !text.chars().any(char::is_control) {
        return Ok(());
    }
    Err(doc.at(path, "not one line of text").expected("1 to 200 characters"))
}

fn known<S: AsRef<str>>(
    name: &str,
    what: &str,
    all: &[S],
    path: &[Segment],
    doc: Document<'_>,
) -> Result<(), YamlError> {
    if all.iter().any(|known| known.as_ref() == name) {
        return Ok(());
    }
    let all: Vec<&str> = all.iter().map(AsRef::as_ref).collect();
    let error = doc.at(path, format!("there is no {what} `{name}`")).did_you_mean(name, all.iter().copied());
    Err(error.expected(one_of(&all)))
}

pub(super) fn one_of(all: &[&str]) -> String {
    match all {
        [] => "nothing here: there are none".to_owned(),
        [one] => format!("`{one}`"),
        many => format!("one of {}", many.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")),
    }
}
