//! `harness doctor`, and the ledger of labs, as a user meets them: no VM, no network, no privileges.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::time::Duration;

use assert_cmd::Command;
use camino::{Utf8Path, Utf8PathBuf};
use harness::lab::ledger::{Claim, Host, LEDGER_ENV, Ledger, Policy};
use predicates::prelude::*;

/// A harness in an empty folder, with nothing of the host's configuration.
fn harness(dir: &tempfile::TempDir) -> Command {
    let mut command = Command::cargo_bin("harness").unwrap();
    command
        .current_dir(dir.path())
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap())
        .env("HOME", dir.path())
        .env("XDG_RUNTIME_DIR", dir.path())
        .env(LEDGER_ENV, ledger_of(dir));
    command
}

/// The ledger these harnesses share with the test and with nobody else.
fn ledger_of(dir: &tempfile::TempDir) -> Utf8PathBuf {
    Utf8Path::from_path(dir.path()).unwrap().join("ledger")
}

#[test]
fn a_machine_without_tools_is_told_the_packages() {
    let dir = tempfile::tempdir().unwrap();
    let out = harness(&dir).env("PATH", "/nonexistent").arg("doctor").assert().code(3);
    let out = out.stdout(predicate::str::contains("No run is possible here"));
    let text = String::from_utf8(out.get_output().stdout.clone()).unwrap();
    for word in ["qemu-system-x86", "qemu-utils", "vde2", "mmdebstrap", "apt-get install", "PROBLEM"] {
        assert!(text.contains(word), "{word} is not in:\n{text}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "looking changes nothing");
}

#[test]
fn the_answer_and_the_exit_code_agree() {
    let dir = tempfile::tempdir().unwrap();
    let out = harness(&dir).args(["doctor", "--json"]).output().unwrap();
    let diagnosis: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let problems: Vec<&serde_json::Value> =
        diagnosis["findings"].as_array().unwrap().iter().filter(|finding| finding["level"] == "problem").collect();
    assert_eq!(diagnosis["run_possible"], problems.is_empty());
    assert_eq!(out.status.code(), Some(if problems.is_empty() { 0 } else { 3 }), "{problems:?}");
    // What a machine that runs VM tests must have; elsewhere it is among the problems.
    let calibration = &diagnosis["figures"]["accel"]["calibration"];
    assert!(calibration["iterations_per_s"].as_f64().is_some_and(|speed| speed > 0.0) || !problems.is_empty());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "looking changes nothing");
}

#[test]
fn a_folder_that_cannot_be_used_is_a_problem_with_its_remedy() {
    let dir = tempfile::tempdir().unwrap();
    // /proc can be written to by nobody, and is no file system for disks.
    harness(&dir)
        .args(["doctor", "--state-dir", "/proc/harness"])
        .assert()
        .code(3)
        .stdout(predicate::str::contains("/proc/harness").and(predicate::str::contains("--state-dir")));
}

/// A lab that takes the whole machine, as another harness would have it.
#[test]
fn a_run_beside_a_lab_that_takes_the_machine_says_which_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let claim = Claim { lab: "k3v9xa".into(), scenario: "vlans".into(), vcpus: 1000, memory_mib: 0 };
    let runtime_of_test = tokio::runtime::Runtime::new().unwrap();
    let ledger = Ledger::at(&ledger_of(&dir));
    let host = || Host { cores: 2, memory_available_mib: 0 };
    let ticket = runtime_of_test.block_on(ledger.admit(claim, Policy::default(), host, |_| ())).unwrap();

    harness(&dir).arg("doctor").assert().stdout(predicate::str::contains("lab k3v9xa (vlans, 1000 vCPUs"));
    // A program that is as good as k3s for as long as nothing is built or booted.
    let k3s = dir.path().join("k3s");
    std::fs::copy(assert_cmd::cargo::cargo_bin("harness"), &k3s).unwrap();
    let source = format!("file:{}", k3s.display());
    let out = harness(&dir)
        .args(["run", "smoke", "--accel", "tcg", "--format", "plain", "--wait-for-host", "1s", "--k3s", &source])
        .timeout(Duration::from_secs(120))
        .assert()
        .code(3);
    let output = out.get_output();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    for words in ["waiting for room, 1.00 s at most", "lab k3v9xa (vlans, 1000 vCPUs", "--wait-for-host"] {
        assert!(text.contains(words), "{words} is not in:\n{text}");
    }
    drop(ticket);
    assert!(ledger.living().unwrap().is_empty());
}

/// The same, where the other lab ends: the run that waits is woken by that and goes on.
#[test]
fn a_run_that_waits_goes_on_when_the_other_lab_ends() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = Ledger::at(&ledger_of(&dir));
    let claim = Claim { lab: "k3v9xa".into(), scenario: "vlans".into(), vcpus: 1000, memory_mib: 0 };
    let host = || Host { cores: 2, memory_available_mib: 0 };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut ticket = Some(runtime.block_on(ledger.admit(claim, Policy::default(), host, |_| ())).unwrap());

    let k3s = dir.path().join("k3s");
    std::fs::copy(assert_cmd::cargo::cargo_bin("harness"), &k3s).unwrap();
    let mut run = std::process::Command::new(assert_cmd::cargo::cargo_bin("harness"))
        .args(["run", "smoke", "--accel", "tcg", "--format", "json", "--wait-for-host", "10m", "--k3s"])
        .arg(format!("file:{}", k3s.display()))
        .current_dir(dir.path())
        .env("HOME", dir.path())
        .env("XDG_RUNTIME_DIR", dir.path())
        .env(LEDGER_ENV, ledger_of(&dir))
        .env_remove("XDG_STATE_HOME")
        .env_remove("XDG_CACHE_HOME")
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let pid = nix::unistd::Pid::from_raw(i32::try_from(run.id()).unwrap());
    let mut preflight = None;
    let lines = std::io::BufRead::lines(std::io::BufReader::new(run.stdout.take().unwrap()));
    for line in lines.map(Result::unwrap) {
        let event: serde_json::Value = serde_json::from_str(&line).unwrap();
        let message = event["event"]["phase-progress"]["message"].as_str().unwrap_or_default();
        if message.starts_with("waiting for room") {
            let labs = ledger.living().unwrap();
            assert_eq!(labs.iter().map(|entry| entry.admitted).collect::<Vec<_>>(), [true, false]);
            drop(ticket.take());
        }
        let finished = &event["event"]["phase-finished"];
        if finished["phase"] == "preflight" {
            preflight = Some(finished["outcome"].clone());
            // What would follow is building an image.
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
        }
    }
    assert_eq!(run.wait().unwrap().code(), Some(130));
    assert!(ticket.is_none(), "it did not wait");
    assert_eq!(preflight.unwrap(), "ok");
    assert!(ledger.living().unwrap().is_empty());
}
