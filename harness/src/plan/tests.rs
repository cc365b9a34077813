//! The plans of the shipped scenarios, held by snapshots, and what they must never contain.

use std::collections::BTreeSet;

use camino::Utf8Path;
use kvm::{Accel, Calibration, HostFacts};

use super::*;
use crate::scenario::{Addressing, Loaded, Role, ScenarioNode, load};

const SHIPPED: [&str; 5] = ["smoke", "simple", "dhcp-simple", "vlans", "bonding-vlans"];

pub(crate) fn inputs() -> Inputs {
    Inputs {
        lab: "k7m2xq".to_owned(),
        k3s: "release:v1.35.0+k3s1".to_owned(),
        host: HostFacts {
            cores: 2,
            memory_total_mib: 24_000,
            memory_available_mib: 20_000,
            load_1m: 0.5,
            cpu_pressure_some_avg10: Some(1.5),
        },
        calibration: Calibration { accel: Accel::Tcg, iterations_per_s: 3.0e8, slowdown: 9.8, measured: true },
        paths: Paths::placeholders(),
    }
}

pub(crate) fn shipped(name: &str) -> Loaded {
    load(name, Utf8Path::new("/nonexistent")).unwrap()
}

pub(crate) fn plan_of(name: &str) -> Plan {
    let loaded = shipped(name);
    plan(&loaded.scenario, &loaded.profile, &inputs()).unwrap()
}

#[test]
fn text() {
    for name in SHIPPED {
        insta::assert_snapshot!(format!("text_{name}"), plan_of(name).render_text());
    }
}

#[test]
fn json() {
    for name in SHIPPED {
        let plan = plan_of(name);
        insta::assert_json_snapshot!(format!("json_{name}"), plan);
        // What is written can be read again.
        let text = serde_json::to_string(&plan).unwrap();
        assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), plan);
    }
}

#[test]
fn the_same_inputs_give_the_same_plan_and_other_labs_other_macs() {
    let loaded = shipped("bonding-vlans");
    let make = |inputs: &Inputs| plan(&loaded.scenario, &loaded.profile, inputs).unwrap();
    assert_eq!(make(&inputs()), make(&inputs()));
    let other = make(&Inputs { lab: "other2".to_owned(), ..inputs() });
    let macs =
        |plan: &Plan| -> BTreeSet<_> { plan.nodes.iter().flat_map(|n| n.vm.nics.iter().map(|nic| nic.mac)).collect() };
    assert_eq!(macs(&other).len(), 6);
    assert!(macs(&other).is_disjoint(&macs(&make(&inputs()))));
    assert_ne!(other.nodes[0].machine_id, make(&inputs()).nodes[0].machine_id);
}

#[test]
fn nine_nodes_share_nothing() {
    let mut loaded = shipped("bonding-vlans");
    let template = loaded.scenario.nodes[1].clone();
    loaded.scenario.nodes = (1..=9).map(|n| ScenarioNode { name: format!("s{n}"), ..template.clone() }).collect();
    let plan = plan(&loaded.scenario, &loaded.profile, &inputs()).unwrap();
    let all = |of: &dyn Fn(&NodePlan) -> Vec<String>| -> (usize, usize) {
        let values: Vec<String> = plan.nodes.iter().flat_map(of).collect();
        (values.iter().collect::<BTreeSet<_>>().len(), values.len())
    };
    for (unique, asked) in [
        all(&|n| n.vm.nics.iter().map(|nic| nic.mac.to_string()).collect()),
        all(&|n| n.addresses.iter().map(|a| a.address.to_string()).collect()),
        all(&|n| n.nics.iter().map(|nic| format!("{} {}", nic.switch, nic.port)).collect()),
        all(&|n| {
            vec![
                n.machine_id.clone(),
                n.vm.qmp_socket.to_string(),
                n.vm.console_log.to_string(),
                n.vm.stderr_log.to_string(),
            ]
        }),
        all(&|n| n.vm.disks.iter().map(|disk| disk.path.to_string()).collect()),
    ] {
        assert_eq!(unique, asked);
    }
    for switch in &plan.switches {
        let ports: Vec<u16> = switch.ports.iter().map(|port| port.port).collect();
        assert_eq!(ports, (1..=10).collect::<Vec<u16>>(), "nine NICs and the link");
        for port in &switch.ports {
            assert_eq!((port.native_vlan, port.tagged_vlans.as_slice()), (None, [100, 200].as_slice()), "{port:?}");
        }
    }
    assert!(plan.warnings.iter().any(|warning| warning.contains("FM-5")), "{:?}", plan.warnings);
    // 2 cores for 9 vCPUs: as far as oversubscription scales, and never beyond the bound.
    let boot = plan.phase(Phase::Boot).unwrap();
    assert_eq!(boot.deadline_ms, 30_000 * 392 / 10);
}

#[test]
fn deadlines_follow_the_host() {
    let loaded = shipped("bonding-vlans");
    let deadline = |accel, slowdown, cores| {
        let mut inputs = inputs();
        inputs.calibration = Calibration { accel, iterations_per_s: 1.0, slowdown, measured: true };
        inputs.host.cores = cores;
        let plan = plan(&loaded.scenario, &loaded.profile, &inputs).unwrap();
        [Phase::Primary, Phase::Prewarm, Phase::Settle].map(|phase| plan.phase(phase).unwrap().deadline_ms)
    };
    assert_eq!(deadline(Accel::Kvm, 1.0, 8), [120_000, 49_000, 70_000]);
    assert_eq!(deadline(Accel::Tcg, 10.0, 2), [1_200_000, 49_000, 610_000]);
    assert_eq!(deadline(Accel::Tcg, 10.0, 1), [2_400_000, 49_000, 1_210_000]);
    // A calibration gone wild does not make a run last for ever.
    assert_eq!(deadline(Accel::Tcg, 1e9, 2), [2_400_000, 49_000, 1_210_000]);
    assert_eq!(deadline(Accel::Tcg, f64::NAN, 2), [2_400_000, 49_000, 1_210_000]);
}

#[test]
fn an_agent_gets_an_agents_flags() {
    let mut loaded = shipped("simple");
    loaded.scenario.nodes[1].role = Role::Agent;
    let plan = plan(&loaded.scenario, &loaded.profile, &inputs()).unwrap();
    let agent = &plan.nodes[1];
    assert_eq!(agent.k3s_unit, "k3s-agent.service");
    assert_eq!(
        agent.k3s_args.join(" "),
        "--server https://192.168.1.1:6443 --token ${TOKEN} --node-name server-2 --node-ip 192.168.1.2 --flannel-iface eth1"
    );
    assert_eq!(plan.servers().count(), 1);
    assert_eq!(plan.joiners().count(), 1);
}

#[test]
fn a_wrong_vlan_is_the_guests_alone() {
    let mut loaded = shipped("vlans");
    loaded.scenario.nodes[1].vlans.insert("cluster".to_owned(), 201);
    let plan = plan(&loaded.scenario, &loaded.profile, &inputs()).unwrap();
    assert_eq!(plan.nodes[1].flannel_iface, "eth1.201");
    assert!(plan.switches[0].ports.iter().all(|port| port.tagged_vlans == [100, 200]));
    assert!(plan.warnings.iter().any(|warning| warning.contains("VLAN 201")), "{:?}", plan.warnings);
}

#[test]
fn a_bond_over_switches_that_are_not_joined_is_warned_of() {
    let mut loaded = shipped("bonding-vlans");
    loaded.profile.joined = false;
    let plan = plan(&loaded.scenario, &loaded.profile, &inputs()).unwrap();
    assert!(plan.links.is_empty());
    assert!(plan.warnings.iter().any(|warning| warning.contains("not joined")), "{:?}", plan.warnings);
}

#[test]
fn a_dhcp_server_is_on_its_networks_vlan_and_reserves_by_the_mac_that_asks() {
    let mut loaded = shipped("bonding-vlans");
    let static_macs = plan_of("bonding-vlans").nodes.iter().map(|node| node.vm.nics.clone()).collect::<Vec<_>>();
    for network in &mut loaded.profile.networks {
        (network.addresses, network.lease_s) = (Addressing::Dhcp, Some(60));
    }
    let plan = plan(&loaded.scenario, &loaded.profile, &inputs()).unwrap();
    assert_eq!(plan.nodes.iter().map(|node| node.vm.nics.clone()).collect::<Vec<_>>(), static_macs);
    let [cluster, storage] = plan.dhcp.as_slice() else { panic!("{:?}", plan.dhcp) };
    assert_eq!(
        (cluster.network.as_str(), cluster.address.to_string(), cluster.lease_s),
        ("cluster", "192.168.200.254".to_owned(), 60)
    );
    assert_ne!(cluster.mac, storage.mac);
    // The preferred leg's switch, untagged in the network's VLAN and in no other.
    let port = |server: &DhcpPlan| {
        let switch = plan.switches.iter().find(|switch| switch.name == server.switch).unwrap();
        let port = switch.ports.iter().find(|port| port.port == server.port).unwrap();
        (switch.name.clone(), port.native_vlan, port.tagged_vlans.len())
    };
    assert_eq!(
        [cluster, storage].map(port),
        [("access-a".to_owned(), Some(200), 0), ("access-a".to_owned(), Some(100), 0)]
    );
    for (node, held) in plan.nodes.iter().zip(&cluster.reservations) {
        let bond = node.bond.as_ref().unwrap();
        assert_eq!((&held.node, held.mac, held.address), (&node.name, bond.mac, node.cluster_ip));
        assert!(node.k3s_args.windows(2).any(|pair| pair == ["--node-ip", &held.address.to_string()]));
    }
    let seed = crate::seedfiles::tests::page_of(&plan, &plan.nodes[1]);
    assert!(!seed.contains("192.168.200.2/24") && seed.matches("DHCP=ipv4\n").count() == 2, "{seed}");
}

#[test]
fn too_little_memory_is_warned_of() {
    let loaded = shipped("simple");
    let mut inputs = inputs();
    inputs.host.memory_available_mib = 3000;
    let plan = plan(&loaded.scenario, &loaded.profile, &inputs).unwrap();
    assert!(plan.warnings.iter().any(|warning| warning.contains("4096 MiB")), "{:?}", plan.warnings);
}

#[test]
fn paths_too_long_for_sockets_are_refused() {
    let loaded = shipped("simple");
    for (length, fits) in [(60, true), (90, false), (200, false)] {
        let mut inputs = inputs();
        inputs.paths.sockets = format!("/{}", "x".repeat(length)).into();
        assert_eq!(plan(&loaded.scenario, &loaded.profile, &inputs).is_ok(), fits, "{length}");
    }
}

#[test]
fn what_no_loader_would_let_pass_is_an_error_not_a_panic() {
    let mut loaded = shipped("simple");
    loaded.profile.cluster_network = "nowhere".to_owned();
    assert!(matches!(plan(&loaded.scenario, &loaded.profile, &inputs()), Err(PlanError::NoNetwork { .. })));
    let mut loaded = shipped("simple");
    loaded.profile.nics[0].switch = "nowhere".to_owned();
    assert!(matches!(plan(&loaded.scenario, &loaded.profile, &inputs()), Err(PlanError::NoSwitch { .. })));
    let mut loaded = shipped("simple");
    loaded.scenario.nodes.clear();
    assert!(matches!(plan(&loaded.scenario, &loaded.profile, &inputs()), Err(PlanError::NoNodes(_))));
}
