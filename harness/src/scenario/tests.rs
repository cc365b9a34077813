//! What a person sees when a scenario or a profile is wrong.

use camino::{Utf8Path, Utf8PathBuf};

use super::*;

/// A working folder with `scenarios/lab.yaml` and, where given, `scenarios/profiles/net.yaml`.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new(scenario: &str, profile: Option<&str>) -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        std::fs::create_dir_all(folder.path().join("scenarios/profiles")).unwrap();
        std::fs::write(folder.path().join("scenarios/lab.yaml"), scenario).unwrap();
        if let Some(profile) = profile {
            std::fs::write(folder.path().join("scenarios/profiles/net.yaml"), profile).unwrap();
        }
        folder
    }

    fn path(&self) -> Utf8PathBuf {
        Utf8Path::from_path(self.0.path()).unwrap().to_owned()
    }

    fn load(&self) -> Result<Loaded, LoadError> {
        load("lab", &self.path())
    }

    fn refusal(&self) -> String {
        let error = self.load().expect_err("must be refused").to_string();
        error.replace(self.path().as_str(), ".")
    }
}

const SCENARIO: &str = "\
name: lab
description: a lab
profile: simple
nodes:
  - {name: server-1, role: server}
  - {name: server-2, role: server, vcpus: 2, memory_mib: 1024}
settle_ms: 5000
";

const PROFILE: &str = "\
name: net
description: a network
switches: [left, right]
joined: true
nics:
  - {name: eth1, switch: left}
  - {name: eth2, switch: right}
bond: {name: bond0, members: [eth1, eth2]}
networks:
  - {name: cluster, parent: bond0, vlan: 200, subnet: 192.168.200.0/24}
  - {name: storage, parent: bond0, vlan: 100, subnet: 192.168.100.0/24}
cluster_network: cluster
";

/// The refusals of a scenario after one replacement each, in one page.
fn scenario_refusals(changes: &[(&str, &str)]) -> String {
    let refuse = |(from, to): &(&str, &str)| {
        assert!(SCENARIO.contains(from), "{from:?} is not in the scenario");
        Folder::new(&SCENARIO.replacen(from, to, 1), None).refusal()
    };
    changes.iter().map(refuse).collect::<Vec<_>>().join("\n\n")
}

fn profile_refusals(changes: &[(&str, &str)]) -> String {
    let scenario = SCENARIO.replace("profile: simple", "profile: net");
    let refuse = |(from, to): &(&str, &str)| {
        assert!(PROFILE.contains(from), "{from:?} is not in the profile");
        Folder::new(&scenario, Some(&PROFILE.replacen(from, to, 1))).refusal()
    };
    changes.iter().map(refuse).collect::<Vec<_>>().join("\n\n")
}

#[test]
fn what_is_shipped_is_right() {
    let nowhere = tempfile::tempdir().unwrap();
    let base = Utf8Path::from_path(nowhere.path()).unwrap();
    let scenarios = list_scenarios(base);
    assert_eq!(
        scenarios.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(),
        ["bonding-vlans", "bonding-vlans-3", "dhcp-simple", "simple", "simple-agent", "smoke", "vlans", "vlans-broken"]
    );
    for listed in scenarios.iter().chain(&list_profiles(base)) {
        assert!(listed.valid, "{listed:?}");
        assert_eq!(listed.source, Source::Shipped);
    }
    for listed in scenarios {
        let loaded = load(&listed.name, base).unwrap();
        assert_eq!(loaded.scenario.name, listed.name);
        assert_eq!(loaded.scenario.k3s.to_string(), DEFAULT_K3S, "every shipped scenario names the default k3s");
        let broken = listed.name.ends_with("-broken");
        assert_eq!(loaded.scenario.expect.outcome == Outcome::Failure, broken, "{}", listed.name);
    }
}

#[test]
fn a_file_wins_over_what_is_shipped() {
    let folder = Folder::new(SCENARIO, None);
    let own = folder.path().join("scenarios/smoke.yaml");
    std::fs::write(&own, SCENARIO.replace("name: lab", "name: smoke")).unwrap();
    let loaded = load("smoke", &folder.path()).unwrap();
    assert_eq!(loaded.scenario_source, Source::File(own.clone()));
    assert_eq!(loaded.scenario.nodes.len(), 2);
    assert_eq!(loaded.profile_source, Source::Shipped);
    // By path, from anywhere, with a profile beside it.
    std::fs::write(folder.path().join("scenarios/profiles/simple.yaml"), PROFILE.replace("name: net", "name: simple"))
        .unwrap();
    let loaded = load(own.as_str(), Utf8Path::new("/nonexistent")).unwrap();
    assert_eq!(loaded.scenario_source, Source::File(own));
    assert_eq!(loaded.profile_source, Source::File(folder.path().join("scenarios/profiles/simple.yaml")));
    assert_eq!(loaded.profile.switches, ["left", "right"]);
}

#[test]
fn defaults() {
    let loaded = Folder::new(SCENARIO, None).load().unwrap();
    let node = &loaded.scenario.nodes[0];
    assert_eq!((node.vcpus, node.memory_mib), (Vcpus::Auto, 2048));
    assert_eq!(loaded.scenario.image, "debian-k3s");
    assert_eq!(loaded.scenario.k3s.to_string(), DEFAULT_K3S);
}

#[test]
fn nodes_of_other_kinds_are_understood() {
    let scenario = SCENARIO
        .replace("profile: simple", "profile: vlans")
        .replace("server-2, role: server", "agent-1, role: agent, vlans: {cluster: 201}")
        + "expect: {outcome: failure, phase: network}\n";
    let scenario = Folder::new(&scenario, None).load().unwrap().scenario;
    assert_eq!(scenario.nodes[1].role, Role::Agent);
    assert_eq!(scenario.nodes[1].vlans["cluster"], 201);
    assert_eq!(scenario.expect, Expect { outcome: Outcome::Failure, phase: Some(Phase::Network) });
}

#[test]
fn no_such_scenario() {
    let folder = Folder::new(SCENARIO, None);
    let error = load("bonding-vlan", &folder.path()).unwrap_err();
    insta::assert_snapshot!(error);
    let LoadError::Unknown { known, .. } = error else { panic!("{error}") };
    assert_eq!(
        known,
        [
            "bonding-vlans",
            "bonding-vlans-3",
            "dhcp-simple",
            "lab",
            "simple",
            "simple-agent",
            "smoke",
            "vlans",
            "vlans-broken"
        ]
    );
    let error = load("./nowhere.yaml", &folder.path()).unwrap_err();
    assert!(matches!(error, LoadError::Read { .. }), "{error}");
    // A file that is there and cannot be read is no reason to fall back to what is shipped.
    std::fs::create_dir(folder.path().join("scenarios/smoke.yaml")).unwrap();
    assert!(matches!(load("smoke", &folder.path()), Err(LoadError::Read { .. })));
    std::fs::write(folder.path().join("scenarios/lab.yaml"), b"name: \xff").unwrap();
    insta::assert_snapshot!(folder.refusal());
}

#[test]
fn wrong_scenarios() {
    let seen = scenario_refusals(&[
        ("name: lab", "name: Lab"),
        ("description: a lab", "description: ''"),
        ("profile: simple", "profile: simpel"),
        ("profile: simple", "profile: ../simple"),
        ("settle_ms: 5000", "settle_ms: 5000000"),
        ("settle_ms: 5000", "settle_ms: 5s"),
        ("settle_ms: 5000", "k3s: relaese:v1.35.0+k3s1"),
        ("settle_ms: 5000", "k3s: release:latest"),
        ("settle_ms: 5000", "airgap_images: true"),
        ("settle_ms: 5000", "airgap_images: file:./images.zip"),
        ("settle_ms: 5000", "airgap_images: release\nk3s: file:./k3s"),
        ("settle_ms: 5000", "disable: [traefik, traefik]"),
        ("settle_ms: 5000", "expect: {outcome: fial}"),
        ("settle_ms: 5000", "expect: {outcome: pass, phase: join}"),
        ("settle_ms: 5000", "setle_ms: 5000"),
    ]);
    insta::assert_snapshot!(seen);
}

#[test]
fn wrong_nodes() {
    let ten: String = (1..=10).map(|n| format!("  - {{name: n{n}, role: server}}\n")).collect();
    let nodes = "  - {name: server-1, role: server}\n  - {name: server-2, role: server, vcpus: 2, memory_mib: 1024}\n";
    let seen = scenario_refusals(&[
        (nodes, &ten),
        (nodes, "  []\n"),
        ("{name: server-1, role: server}", "{name: agent-1, role: agent}"),
        ("{name: server-1, role: server}", "{name: server-2, role: server}"),
        ("{name: server-1, role: server}", "{name: server_1, role: server}"),
        ("{name: server-1, role: server}", "{name: server-1, role: master}"),
        ("{name: server-1, role: server}", "{role: server}"),
        ("vcpus: 2", "vcpus: 0"),
        ("vcpus: 2", "vcpus: many"),
        ("vcpus: 2", "vcpu: 2"),
        ("memory_mib: 1024", "memory_mib: 128"),
        ("memory_mib: 1024", "memory_mib: 2GiB"),
        ("vcpus: 2", "vlans: {cluster: 4095}"),
        ("vcpus: 2", "vlans: {cluster: 200}"),
    ]);
    insta::assert_snapshot!(seen);
}

#[test]
fn wrong_profiles() {
    let seen = profile_refusals(&[
        ("name: net", "name: nett"),
        ("[left, right]", "[left, left]"),
        ("[left, right]", "[left, right, spare]"),
        ("[left, right]", "[]"),
        ("{name: eth2, switch: right}", "{name: eth2, switch: rigth}"),
        ("{name: eth2, switch: right}", "{name: eth1, switch: right}"),
        ("{name: eth2, switch: right}", "{name: eth0, switch: right}"),
        ("{name: eth2, switch: right}", "{name: 'eth2;', switch: right}"),
        ("members: [eth1, eth2]", "members: [eth1]"),
        ("members: [eth1, eth2]", "members: [eth1, eth1]"),
        ("members: [eth1, eth2]", "members: [eth1, eth3]"),
        ("members: [eth1, eth2]", "members: [eth1, eth2], mode: 802.3ad"),
        ("members: [eth1, eth2]", "members: [eth1, eth2], miimon_ms: 5"),
        ("vlan: 200", "vlan: 4095"),
        ("vlan: 200", "vlan: 0"),
        ("vlan: 200", "vlan: 100"),
        ("parent: bond0, vlan: 200", "parent: eth1, vlan: 200"),
        ("parent: bond0, vlan: 200", "parent: bond1, vlan: 200"),
        ("name: storage", "name: cluster"),
        ("192.168.200.0/24", "192.168.200.7/24"),
        ("192.168.200.0/24", "192.168.200.0"),
        ("192.168.200.0/24", "10.42.8.0/24"),
        ("192.168.200.0/24", "192.168.100.128/25"),
        ("192.168.200.0/24", "224.0.0.0/24"),
        ("cluster_network: cluster", "cluster_network: clusters"),
        ("subnet: 192.168.200.0/24", "subnet: 192.168.200.0/24, addresses: dhpc"),
        ("subnet: 192.168.200.0/24", "subnet: 192.168.200.0/24, lease_s: 60"),
        ("subnet: 192.168.200.0/24", "subnet: 192.168.200.0/24, addresses: dhcp, lease_s: 5"),
    ]);
    insta::assert_snapshot!(seen);
}

#[test]
fn a_subnet_without_room_for_the_nodes() {
    let nodes: String = (1..=3).map(|n| format!("  - {{name: n{n}, role: server}}\n")).collect();
    let scenario = format!("name: lab\ndescription: d\nprofile: net\nnodes:\n{nodes}");
    let folder = Folder::new(&scenario, Some(&PROFILE.replace("192.168.100.0/24", "192.168.100.0/30")));
    insta::assert_snapshot!(folder.refusal());
}

#[test]
fn a_dhcp_server_takes_an_address_of_its_subnet() {
    let scenario = SCENARIO.replace("profile: simple", "profile: net");
    let profile = |dhcp: &str| PROFILE.replace("192.168.100.0/24", &format!("192.168.100.0/30{dhcp}"));
    Folder::new(&scenario, Some(&profile(""))).load().unwrap();
    insta::assert_snapshot!(Folder::new(&scenario, Some(&profile(", addresses: dhcp"))).refusal());
}

#[test]
fn wrong_faults() {
    let scenario = SCENARIO.replace("profile: simple", "profile: net");
    let refuse = |vlans: &str| Folder::new(&scenario.replace("vcpus: 2", vlans), Some(PROFILE)).refusal();
    let seen = [refuse("vlans: {clutser: 201}"), refuse("vlans: {cluster: 100}"), refuse("unplugged: [eht1]")];
    insta::assert_snapshot!(seen.join("\n\n"));
}
