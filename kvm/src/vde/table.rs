//! What a switch shows of its VLANs and ports, read and held against what was asked for.

use std::collections::{BTreeMap, BTreeSet};

use super::PortSpec;

/// `vde_switch`'s number for "no VLAN" in `port/setvlan`.
pub(super) const NO_VLAN: u16 = 4095;

/// VLAN → its ports, each with whether it is tagged there.
pub(super) type VlanTable = BTreeMap<u16, BTreeSet<(u16, bool)>>;

/// Reads `vlan/allprint`: lines `VLAN 0200`, and below each ` -- Port 0001 tagged=1 active=0 status=Learning`.
pub(super) fn parse_vlans(lines: &[String]) -> Option<VlanTable> {
    let mut table = VlanTable::new();
    let mut current = None;
    for line in lines {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["VLAN", vlan, ..] => {
                let vlan = vlan.parse().ok()?;
                table.entry(vlan).or_default();
                current = Some(vlan);
            }
            ["--", "Port", port, tagged, ..] => {
                let tagged = match *tagged {
                    "tagged=1" => true,
                    "tagged=0" => false,
                    _ => return None,
                };
                table.entry(current?).or_default().insert((port.parse().ok()?, tagged));
            }
            _ => {}
        }
    }
    Some(table)
}

/// The table that a switch with these ports should show, the default VLAN 0 included.
pub(super) fn expected_vlans(ports: &[PortSpec]) -> VlanTable {
    let mut table = VlanTable::from([(0, BTreeSet::new())]);
    for spec in ports {
        if let Some(native) = spec.native_vlan {
            table.entry(native).or_default().insert((spec.port, false));
        }
        for &vlan in &spec.tagged_vlans {
            table.entry(vlan).or_default().insert((spec.port, true));
        }
    }
    table
}

/// Reads `port/allprint`: lines `Port 0001 untagged_vlan=4095 INACTIVE - …`. Port → its untagged VLAN.
pub(super) fn parse_ports(lines: &[String]) -> BTreeMap<u16, u16> {
    lines
        .iter()
        .filter_map(|line| {
            let rest = line.strip_prefix("Port ")?;
            let mut words = rest.split_whitespace();
            let port = words.next()?.parse().ok()?;
            Some((port, words.next()?.strip_prefix("untagged_vlan=")?.parse().ok()?))
        })
        .collect()
}

/// Port → its untagged VLAN, as it should be.
pub(super) fn expected_ports(ports: &[PortSpec]) -> BTreeMap<u16, u16> {
    ports.iter().map(|spec| (spec.port, spec.native_vlan.unwrap_or(NO_VLAN))).collect()
}

/// The process ids behind a port, from `port/allprint N` (`port/print` refuses a port that nobody is plugged into): ` -- endpoint ID 0006 module unix prog   : vdeplug: user=root pid=14280`.
pub(super) fn parse_endpoints(lines: &[String]) -> Vec<u32> {
    lines
        .iter()
        .filter(|line| line.contains("endpoint ID"))
        .filter_map(|line| line.split_whitespace().find_map(|word| word.strip_prefix("pid="))?.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<String> {
        text.lines().map(String::from).collect()
    }

    #[test]
    fn reads_what_the_switch_prints() {
        let table = parse_vlans(&lines("VLAN 0000\nVLAN 0200\n -- Port 0001 tagged=1 active=0 status=Learning\n -- Port 0002 tagged=0 active=1 status=Forwarding")).unwrap();
        assert_eq!(table, VlanTable::from([(0, BTreeSet::new()), (200, BTreeSet::from([(1, true), (2, false)]))]));
        assert_eq!(parse_vlans(&lines(" -- Port 0001 tagged=1 active=0")), None, "a port below no VLAN");
        assert_eq!(parse_vlans(&lines("VLAN 0001\n -- Port 0001 tagged=maybe")), None);
        let ports =
            parse_ports(&lines("Port 0001 untagged_vlan=4095 INACTIVE - NOT Unnamed Allocatable\n Current User: NONE"));
        assert_eq!(ports, BTreeMap::from([(1, NO_VLAN)]));
        let print = lines(
            "Port 0007 untagged_vlan=4095 ACTIVE\n  -- endpoint ID 0009 module unix prog   : vdeplug: user=root pid=14279",
        );
        assert_eq!(parse_endpoints(&print), [14279]);
    }

    #[test]
    fn expects_members_of_the_named_vlans_and_of_no_others() {
        let port = |port, native_vlan, tagged: &[u16]| PortSpec {
            port,
            label: String::new(),
            native_vlan,
            tagged_vlans: tagged.to_vec(),
        };
        let ports = [port(1, None, &[100, 200]), port(2, Some(100), &[200])];
        let table = expected_vlans(&ports);
        assert_eq!(table[&0], BTreeSet::new());
        assert_eq!(table[&100], BTreeSet::from([(1, true), (2, false)]));
        assert_eq!(table[&200], BTreeSet::from([(1, true), (2, true)]));
        assert_eq!(expected_ports(&ports), BTreeMap::from([(1, NO_VLAN), (2, 100)]));
    }
}
