//! The command line as a new user meets it: no VM, no network, no privileges.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use assert_cmd::Command;
use predicates::prelude::*;

/// A harness in an empty folder, with nothing of the host's configuration.
fn harness(dir: &tempfile::TempDir) -> Command {
    let mut command = Command::cargo_bin("harness").unwrap();
    command.current_dir(dir.path()).env_clear().env("PATH", std::env::var_os("PATH").unwrap()).env("HOME", dir.path());
    command
}

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn list_shows_every_shipped_scenario_and_profile() {
    let dir = dir();
    let mut out = harness(&dir).arg("list").assert().success();
    for name in ["smoke", "simple", "dhcp-simple", "vlans", "bonding-vlans"] {
        out = out.stdout(predicate::str::contains(name));
    }
    // Where a file comes from is told of those that are not part of the binary, from where the reader stands.
    let smoke = include_str!("../../scenarios/smoke.yaml");
    std::fs::create_dir(dir.path().join("scenarios")).unwrap();
    std::fs::write(dir.path().join("scenarios/smoke.yaml"), smoke).unwrap();
    let listed = harness(&dir).arg("list").output().unwrap().stdout;
    let listed = String::from_utf8(listed).unwrap();
    let lines: Vec<_> = listed.lines().filter(|line| line.ends_with(')')).collect();
    let [line] = lines[..] else { panic!("{listed}") };
    assert!(line.starts_with("  smoke ") && line.ends_with(" (./scenarios/smoke.yaml)"), "{line}");
}

#[test]
fn a_plan_needs_no_tool_no_image_and_no_root() {
    let dir = dir();
    harness(&dir)
        .env("PATH", "/nonexistent")
        .args(["plan", "bonding-vlans"])
        .assert()
        .success()
        .stdout(predicate::str::contains("bond0.200").and(predicate::str::contains("qemu-system-x86_64")));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "a plan writes nothing");
}

#[test]
fn a_plan_is_json_on_request() {
    let dir = dir();
    let out = harness(&dir).args(["plan", "vlans", "--json", "--no-measure"]).assert().success();
    let plan: serde_json::Value = serde_json::from_slice(&out.get_output().stdout).unwrap();
    assert_eq!(plan["nodes"].as_array().unwrap().len(), 2);
    assert_eq!(plan["host"]["measured"], false);
}

#[test]
fn an_unknown_scenario_is_a_usage_error_with_a_suggestion() {
    let dir = dir();
    harness(&dir)
        .args(["run", "bondig-vlans", "--k3s", "standin"])
        .assert()
        .code(2)
        .stderr(predicate::str::contains("did you mean `bonding-vlans`?"));
}

#[test]
fn a_broken_scenario_is_placed_before_anything_is_made() {
    let dir = dir();
    let text = "name: mine\ndescription: d\nprofile: simple\nnodes:\n  - {name: server-1, role: server, vcpu: 2}\n";
    std::fs::write(dir.path().join("mine.yaml"), text).unwrap();
    harness(&dir)
        .args(["run", "./mine.yaml", "--k3s", "standin"])
        .assert()
        .code(2)
        .stderr(predicate::str::contains("mine.yaml:5:").and(predicate::str::contains("vcpus")));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing was made");
}

#[test]
fn wrong_flags_and_sources_are_usage_errors() {
    let dir = dir();
    harness(&dir).args(["run", "smoke", "--k3z", "standin"]).assert().code(2);
    harness(&dir)
        .args(["run", "smoke", "--k3s", "http://x"])
        .assert()
        .code(2)
        .stderr(predicate::str::contains("release:VERSION"));
    harness(&dir).args(["run", "smoke", "--accel", "hvf"]).assert().code(2);
}

#[test]
fn a_k3s_that_cannot_be_had_is_an_error_never_something_else_instead() {
    let dir = dir();
    harness(&dir)
        .args(["run", "smoke", "--k3s", "file:/nonexistent/k3s"])
        .assert()
        .code(3)
        .stderr(predicate::str::contains("/nonexistent/k3s"));
    let script = dir.path().join("k3s");
    std::fs::write(&script, "#!/bin/sh\n").unwrap();
    harness(&dir).args(["run", "smoke", "--k3s", &format!("file:{}", script.display())]).assert().code(3);
}

#[test]
fn a_binary_of_another_architecture_is_refused_before_boot() {
    let dir = dir();
    // The head of an ELF file for AArch64 (e_machine 183).
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 183, 0, 1, 0, 0, 0];
    elf.resize(128, 0);
    let path = dir.path().join("k3s-arm64");
    std::fs::write(&path, elf).unwrap();
    harness(&dir)
        .args(["run", "smoke", "--k3s", &format!("file:{}", path.display())])
        .assert()
        .code(3)
        .stderr(predicate::str::contains("AArch64").or(predicate::str::contains("aarch64")));
    assert!(!dir.path().join(".local/state/harness/runs").exists(), "nothing was started");
}

#[test]
fn missing_tools_are_named_with_the_command_that_mends_it() {
    let dir = dir();
    let standin = dir.path().join("k3s-standin");
    std::fs::copy(assert_cmd::cargo::cargo_bin("harness"), &standin).unwrap();
    harness(&dir)
        .env("PATH", "/nonexistent")
        .env("HARNESS_STANDIN", &standin)
        .args(["run", "smoke", "--k3s", "standin", "--format", "plain"])
        .assert()
        .code(3)
        .stderr(predicate::str::contains("qemu-system-x86_64").and(predicate::str::contains("apt-get install")));
}

#[test]
fn help_lists_the_exit_codes() {
    let dir = dir();
    harness(&dir).arg("--help").assert().success().stdout(predicate::str::contains("130  interrupted"));
}

#[test]
fn a_file_in_the_working_folder_wins_over_what_is_shipped() {
    let dir = dir();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    let plan = || {
        let out = harness(&dir).args(["plan", "smoke", "--json", "--no-measure"]).assert().success();
        serde_json::from_slice::<serde_json::Value>(&out.get_output().stdout).unwrap()
    };
    let shipped = plan();
    write(
        "scenarios/smoke.yaml",
        "name: smoke\ndescription: my own\nprofile: simple\nnodes:\n  - {name: mine, role: server}\n",
    );
    let own_scenario = plan();
    assert_eq!((&own_scenario["description"], &own_scenario["nodes"][0]["name"]), (&"my own".into(), &"mine".into()));
    assert_eq!(own_scenario["nodes"][0]["addresses"], shipped["nodes"][0]["addresses"], "the profile is shipped");
    write(
        "scenarios/profiles/simple.yaml",
        "name: simple\ndescription: my own\nswitches: [mine]\nnics: [{name: eth1, switch: mine}]\n\
         networks: [{name: cluster, parent: eth1, subnet: 10.9.0.0/24}]\ncluster_network: cluster\n",
    );
    assert_eq!(plan()["nodes"][0]["cluster_ip"], "10.9.0.1");
    // The recipe is read before anything is made; its place is that of the file.
    write("images/recipes/debian-k3s.yaml", "name: debian-k3s\nsuite: [mine]\n");
    harness(&dir)
        .args(["run", "smoke", "--k3s", "standin"])
        .assert()
        .code(2)
        .stderr(predicate::str::contains("images/recipes/debian-k3s.yaml:2:8"));
}

/// The owner of a lab that is nothing but a record.
struct Owner(std::process::Child);

impl Owner {
    /// Of a kept lab past its time, whose lock cannot be waited for: it is a folder.
    fn of_a_broken_lab(dir: &tempfile::TempDir, id: &str) -> Self {
        let child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
        let start_ticks: u64 = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap().parse().unwrap();
        let lab = dir.path().join("state/labs").join(id);
        std::fs::create_dir_all(lab.join("lock")).unwrap();
        let record = serde_json::json!({
            "schema_version": 1, "lab": id, "run": format!("run-{id}"), "scenario": "smoke", "k3s": "k3s stand-in",
            "run_dir": dir.path(), "owner": {"pid": child.id(), "start_ticks": start_ticks}, "state": "kept",
            "started": "2026-01-01T00:00:00Z", "expires": "2026-01-01T01:00:00Z", "slowdown": 1.0, "nodes": [],
        });
        std::fs::write(lab.join("lab.json"), record.to_string()).unwrap();
        Self(child)
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn every_lab_that_would_not_end_is_reported() {
    for command in [&["clean"][..], &["stop", "--all"]] {
        let dir = dir();
        let _owners = ["aaaaaa", "bbbbbb"].map(|id| Owner::of_a_broken_lab(&dir, id));
        // One whose owner is gone, and whose folders cannot go: in the place of one stands a file.
        std::fs::create_dir_all(dir.path().join("state/labs/cccccc")).unwrap();
        std::fs::write(dir.path().join("state/labs/cccccc/lock"), "").unwrap();
        std::fs::create_dir_all(dir.path().join("run/harness")).unwrap();
        std::fs::write(dir.path().join("run/harness/cccccc"), "").unwrap();
        let said = |id: &str| predicate::str::contains(format!("state/labs/{id}/lock"));
        harness(&dir)
            .env("HARNESS_STATE_DIR", dir.path().join("state"))
            .env("XDG_RUNTIME_DIR", dir.path().join("run"))
            .args(command)
            .assert()
            .code(3)
            .stdout("")
            .stderr(said("aaaaaa").and(said("bbbbbb")).and(predicate::str::contains("the folders of lab cccccc")));
    }
}
