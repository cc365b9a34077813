//! Every shipped scenario forms its cluster.

use std::path::Path;

use crate::lab::{Bench, Run};

/// A run that passed, with everything a passing run owes.
#[track_caller]
fn assert_passed(bench: &Bench, run: &Run, nodes: &[&str]) {
    run.assert_exit(0);
    bench.assert_clean();
    let verdict = run.json("verdict.json");
    assert_eq!(verdict["passed"], true);
    assert_eq!(verdict["exit_code"], 0);
    // A run that did not test real k3s says so in every output.
    for text in [run.stdout(), run.json("run.json").to_string(), run.json("plan.json").to_string(), verdict.to_string()]
    {
        assert!(text.contains("NOT real k3s"), "{text}");
    }
    let events = std::fs::read_to_string(run.dir.join("events.ndjson")).unwrap();
    assert!(events.lines().last().unwrap().contains("run-finished"), "{events}");
    for node in nodes {
        let records = run.dir.join("nodes").join(node);
        for file in ["console.log", "qemu.log", "journal.log"] {
            assert!(records.join(file).exists(), "{node} has no {file}");
        }
        let journal = std::fs::read_to_string(records.join("journal.log")).unwrap();
        assert!(journal.contains("k3s"), "{node}: the journal has no k3s line");
        assert!(journal.contains("kernel: Linux version"), "{node}: the journal has no kernel line");
        assert_no_token(&records.join("journal.log"));
    }
    assert_no_token(&run.dir.join("events.ndjson"));
    assert_no_token(&run.dir.join("plan.json"));
}

#[track_caller]
fn assert_no_token(path: &Path) {
    let text = String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned();
    assert!(!text.contains("::server:"), "{} holds a token", path.display());
}

/// What was done, in the order of its end; what is done with each node at the same time, in the order of its name.
fn phases(run: &Run) -> Vec<String> {
    let mut seen: Vec<String> = Vec::new();
    for record in run.json("verdict.json")["phases"].as_array().unwrap() {
        let phase = record["phase"].as_str().unwrap().to_owned();
        if record["outcome"] != "skipped" && !seen.contains(&phase) {
            seen.push(phase);
        }
    }
    let beside = |phase: &String| matches!(phase.as_str(), "identify" | "sanitize");
    if let Some(first) = seen.iter().position(beside) {
        let also = seen.iter().skip(first).filter(|phase| beside(phase)).count();
        seen[first..first + also].sort_unstable();
    }
    seen
}

#[test]
fn smoke_forms_a_cluster_of_one() {
    let bench = Bench::new();
    let run = bench.run("smoke", &[]);
    assert_passed(&bench, &run, &["server-1"]);
}

#[test]
fn simple_forms() {
    let bench = Bench::new();
    let run = bench.run("simple", &[]);
    assert_passed(&bench, &run, &["server-1", "server-2"]);
}

#[test]
fn vlans_forms() {
    let bench = Bench::new();
    let run = bench.run("vlans", &[]);
    assert_passed(&bench, &run, &["server-1", "server-2"]);
}

/// Addresses by DHCP, from the harness's own server. Leases are so short that the guests renew theirs in the run: by unicast,
/// after they have asked for the server's hardware address.
#[test]
fn dhcp_simple_forms_on_reserved_addresses_that_are_renewed() {
    let bench = Bench::new();
    let shipped = include_str!("../../../scenarios/profiles/dhcp-simple.yaml");
    bench.write(
        "scenarios/profiles/dhcp-simple.yaml",
        &shipped.replace("addresses: dhcp", "addresses: dhcp, lease_s: 30"),
    );
    let run = bench.run("dhcp-simple", &[]);
    assert_passed(&bench, &run, &["server-1", "server-2"]);
    assert!(run.stdout().contains("eth1 192.168.1.2 by DHCP in "), "the network phase does not tell of the lease");
    let log = std::fs::read_to_string(run.dir.join("dhcp.log")).unwrap();
    for (node, address) in [("server-1", "192.168.1.1"), ("server-2", "192.168.1.2")] {
        for said in [
            "DISCOVER: OFFER of ADDRESS",
            "REQUEST of ADDRESS: ACK of ADDRESS for 30 s",
            "REQUEST to renew ADDRESS: ACK of ADDRESS for 30 s",
        ] {
            let said = said.replace("ADDRESS", address);
            let seen =
                log.lines().any(|line| line.contains(&format!(" network cluster: {node} (")) && line.ends_with(&said));
            assert!(seen, "{node}: no {said} in\n{log}");
        }
    }
    assert!(!log.contains("NAK") && !log.contains("not answered"), "{log}");
}

#[test]
fn simple_agent_joins_a_worker() {
    let bench = Bench::new();
    let run = bench.run("simple-agent", &[]);
    assert_passed(&bench, &run, &["server-1", "agent-1"]);
}

/// The joiner's cluster VLAN is not on the trunk: the run fails in the network phase, long before k3s would give up,
/// and that is what the scenario expects.
#[test]
fn vlans_broken_fails_fast_and_as_expected() {
    let bench = Bench::new();
    let run = bench.run("vlans-broken", &[]);
    run.assert_exit(0);
    bench.assert_clean();
    let verdict = run.json("verdict.json");
    assert_eq!(verdict["passed"], true);
    assert_eq!(verdict["failure"]["phase"], "network");
    assert_eq!(verdict["failure"]["blame"], "usage");
    // A missing VLAN is not a slow first connection.
    assert_eq!(verdict["verdict"]["id"], serde_json::Value::Null, "{verdict:#}");
    assert_eq!(verdict["verdict"]["look_alike"]["id"], "NET-VLAN", "{verdict:#}");
    assert_eq!(verdict["verdict"]["attribution"], "configuration");
}

#[test]
fn two_labs_at_once_share_nothing() {
    let benches = [Bench::new(), Bench::new()];
    let runs = std::thread::scope(|scope| {
        benches.each_ref().map(|bench| scope.spawn(|| bench.run("smoke", &[]))).map(|run| run.join().unwrap())
    });
    for (bench, run) in benches.iter().zip(&runs) {
        assert_passed(bench, run, &["server-1"]);
    }
    assert_ne!(runs[0].json("run.json")["lab"], runs[1].json("run.json")["lab"]);
}

#[test]
fn bonding_vlans_forms_phase_by_phase() {
    let bench = Bench::new();
    let run = bench.run("bonding-vlans", &[]);
    assert_passed(&bench, &run, &["server-1", "server-2"]);
    assert_eq!(
        phases(&run),
        [
            "preflight",
            "image",
            "network",
            "boot",
            "identify",
            "sanitize",
            "primary",
            "prewarm",
            "join",
            "settle",
            "verify",
            "teardown"
        ]
    );
    assert_verified(&run, "2 etcd members");
    println!("bonding-vlans took {:.1} s", run.elapsed.as_secs_f64());
}

#[test]
fn bonding_vlans_3_forms_one_joiner_after_the_other() {
    let bench = Bench::new();
    let run = bench.run("bonding-vlans-3", &[]);
    assert_passed(&bench, &run, &["server-1", "server-2", "server-3"]);
    assert_verified(&run, "3 etcd members");
    let phases = run.json("verdict.json")["phases"].as_array().unwrap().clone();
    let formed = phases.iter().filter(|p| matches!(p["phase"].as_str(), Some("join" | "settle")));
    let order = formed.map(|p| format!("{} {}", p["phase"], p["node"]).replace('"', "")).collect::<Vec<_>>();
    assert_eq!(order, ["join server-2", "settle server-2", "join server-3", "settle server-3"]);
}

#[track_caller]
fn assert_verified(run: &Run, what: &str) {
    let phases = run.json("verdict.json")["phases"].as_array().unwrap().clone();
    let verify = phases.iter().find(|p| p["phase"] == "verify").unwrap();
    assert!(verify["note"].as_str().unwrap().contains(what), "{verify}");
}
