//! Known failure modes, brought about in real VMs and named by the verdict.

use crate::lab::Bench;

/// An image that enables k3s at boot with a token baked into it, another one on each node: the race behind FM-2.
const BAKED_RECIPE: &str = r#"name: baked
extends: debian-k3s
files:
  - path: /etc/systemd/system/k3s-server.service.d/20-baked.conf
    content: |
      [Service]
      Environment=K3S_TOKEN=baked-on-%H
  - path: /etc/default/k3s-server
    content: |
      K3S_ARGS="--cluster-init"
units:
  enable: [k3s-server.service]
"#;

#[test]
fn an_auto_start_race_is_prevented_by_sanitize_and_is_fm_2_without_it() {
    let bench = Bench::new();
    bench.write("images/recipes/baked.yaml", BAKED_RECIPE);
    let scenario = |name: &str, more: &str| {
        format!(
            "name: {name}\ndescription: k3s starts at boot\nprofile: simple\nimage: baked\nsettle_ms: 2000\nnodes:\n\
             \x20 - {{name: server-1, role: server}}\n  - {{name: server-2, role: server}}\n{more}"
        )
    };
    bench.write("prevented.yaml", &scenario("prevented", ""));
    let run = bench.run("./prevented.yaml", &[]);
    run.assert_exit(0);
    assert!(run.stdout().contains("an auto-start race prevented"), "the image did not start k3s at boot");

    bench.write("raced.yaml", &scenario("raced", "without: [sanitize]\n"));
    let run = bench.run("./raced.yaml", &[]);
    bench.assert_clean();
    let verdict = run.json("verdict.json");
    assert_eq!(verdict["verdict"]["id"], "FM-2", "{verdict:#}");
    assert_eq!(verdict["failure"]["phase"], "join");
    assert_eq!(verdict["failure"]["node"], "server-2");
    assert_ne!(run.output.status.code(), Some(0));
    assert!(run.stdout().contains("FM-2"));
    assert_ended_soon_after_the_panic(&run);
}

/// From the moment the panic is printed in the guest to the end of the phase: at most 2 s are promised. The guest's
/// clock is its emulated one, set from the host's when it booted.
#[track_caller]
fn assert_ended_soon_after_the_panic(run: &crate::lab::Run) {
    let journal = std::fs::read_to_string(run.dir.join("nodes/server-2/journal.log")).unwrap();
    let line =
        journal.lines().find(|line| line.contains("encrypted with different token")).expect("no panic in the journal");
    let printed: jiff::Timestamp = line.split(' ').next().unwrap().replace("+0000", "Z").parse().unwrap();
    let events = std::fs::read_to_string(run.dir.join("events.ndjson")).unwrap();
    let ended = events
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .find(|event| event["event"]["phase-finished"]["outcome"] == "failed")
        .expect("no phase failed");
    let ended: jiff::Timestamp = ended["at"].as_str().unwrap().parse().unwrap();
    let lag_ms = (ended - printed).total(jiff::Unit::Millisecond).unwrap();
    println!("from the panic to the end of the phase: {lag_ms:.0} ms");
    assert!(lag_ms < 2_000.0, "{lag_ms} ms");
}

#[test]
fn a_node_with_another_nodes_seed_is_fm_3_in_identify() {
    let bench = Bench::new();
    bench.write(
        "mixed.yaml",
        "name: mixed\ndescription: seeds mixed up\nprofile: simple\nnodes:\n  - {name: server-1, role: server}\n\
         \x20 - {name: server-2, role: server, seed_of: server-1}\n",
    );
    let run = bench.run("./mixed.yaml", &[]);
    bench.assert_clean();
    assert_ne!(run.output.status.code(), Some(0));
    let verdict = run.json("verdict.json");
    assert_eq!(verdict["verdict"]["id"], "FM-3", "{verdict:#}");
    assert_eq!(verdict["failure"]["phase"], "identify");
    assert_eq!(verdict["failure"]["node"], "server-2");
    // The node that did answer is not lost.
    assert!(run.dir.join("nodes/server-1/journal.log").exists());
}

#[test]
fn eight_vcpus_on_few_cores_pass_with_fm_5_as_a_contributing_factor() {
    let cores = std::thread::available_parallelism().unwrap().get();
    let bench = Bench::new();
    let vcpus = 4 * cores;
    bench.write(
        "crowded.yaml",
        &format!(
            "name: crowded\ndescription: more vCPUs than cores\nprofile: simple\nsettle_ms: 2000\nnodes:\n\
             \x20 - {{name: server-1, role: server, vcpus: {vcpus}}}\n"
        ),
    );
    let run = bench.run("./crowded.yaml", &[]);
    run.assert_exit(0);
    bench.assert_clean();
    let verdict = run.json("verdict.json");
    assert_eq!(verdict["verdict"]["id"], serde_json::Value::Null);
    let contributing = verdict["verdict"]["contributing"].as_array().unwrap();
    let fm5 =
        contributing.iter().find(|factor| factor["id"] == "FM-5").expect("no FM-5 among the contributing factors");
    assert_eq!(fm5["ratio"], 4.0, "{fm5}");
    assert!(run.stdout().contains("FM-5"), "the summary does not name it");
}
