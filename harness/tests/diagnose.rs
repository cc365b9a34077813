//! `harness diagnose` and `harness catalogue` as a person or a script meets them. The forms of one evidence (folder,
//! files, compressed, archives, standard input, a run folder) have to give one verdict.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use predicates::prelude::*;
use serde_json::Value;

fn harness(dir: &Path) -> Command {
    let mut command = Command::cargo_bin("harness").unwrap();
    command.current_dir(dir).env_clear().env("HOME", dir).env("TMPDIR", dir);
    command
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("verdict/tests/fixtures").join(name)
}

/// The verdict without what depends on how the evidence was packed.
fn verdict(command: &mut Command, code: i32) -> Value {
    let out = command.arg("--json").assert().code(code);
    let mut verdict: Value = serde_json::from_slice(&out.get_output().stdout).unwrap();
    for line in verdict["evidence"].as_array_mut().unwrap() {
        let line = line.as_object_mut().unwrap();
        line.remove("origin");
    }
    verdict
}

/// The files of a two-node fixture, as name below the fixture and content.
fn two_nodes() -> Vec<(&'static str, Vec<u8>)> {
    ["server-1/journal.log", "server-2/journal.log"]
        .map(|name| (name, fs::read(fixture("fm2-two-nodes").join(name)).unwrap()))
        .into()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

fn tar_of(files: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut out = tar::Builder::new(Vec::new());
    // The order in an archive is nobody's choice.
    for (name, bytes) in files.iter().rev() {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        out.append_data(&mut header, name, bytes.as_slice()).unwrap();
    }
    out.into_inner().unwrap()
}

fn zip_file(path: &Path, files: &[(&str, Vec<u8>)]) {
    let mut out = zip::ZipWriter::new(File::create(path).unwrap());
    for (name, bytes) in files.iter().rev() {
        let options = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Zstd);
        out.start_file(*name, options).unwrap();
        out.write_all(bytes).unwrap();
    }
    out.finish().unwrap();
}

fn put(root: &Path, files: &[(&str, Vec<u8>)]) {
    for (name, bytes) in files {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

#[test]
fn one_evidence_in_every_form_gives_one_verdict() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let files = two_nodes();
    put(&dir.join("logs"), &files);
    let want = verdict(harness(dir).args(["diagnose", "logs"]), 0);
    assert_eq!(want["id"], "FM-2");
    assert_eq!(want["node"], "server-2");

    let packed: Vec<(&str, Vec<u8>)> = vec![
        ("server-1/journal.log.gz", gzip(&files[0].1)),
        ("server-2/journal.log.zst", zstd::encode_all(files[1].1.as_slice(), 3).unwrap()),
    ];
    put(&dir.join("packed"), &packed);
    fs::write(dir.join("job.tar"), tar_of(&files)).unwrap();
    fs::write(dir.join("job.tar.gz"), gzip(&tar_of(&packed))).unwrap();
    fs::write(dir.join("job.tar.zst"), zstd::encode_all(tar_of(&files).as_slice(), 3).unwrap()).unwrap();
    zip_file(&dir.join("job.zip"), &files);
    zip_file(
        &dir.join("artifacts.zip"),
        &[("job/logs.tgz", gzip(&tar_of(&files))), ("job/readme.txt", b"hello\n".to_vec())],
    );
    for input in ["packed", "job.tar", "job.tar.gz", "job.tar.zst", "job.zip", "artifacts.zip"] {
        assert_eq!(verdict(harness(dir).args(["diagnose", input]), 0), want, "{input}");
        let piped = fs::read(dir.join(input)).unwrap_or_default();
        if !piped.is_empty() {
            assert_eq!(
                verdict(harness(dir).args(["diagnose", "-"]).write_stdin(piped), 0),
                want,
                "{input} on standard input"
            );
        }
    }
    let named = ["diagnose", "logs/server-1/journal.log", "packed/server-2/journal.log.zst"];
    assert_eq!(verdict(harness(dir).args(named), 0), want);
    let left: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 7, "nothing is left behind: {left:?}");
}

#[test]
fn lines_tell_their_node_where_no_name_does() {
    let dir = tempfile::tempdir().unwrap();
    let all: Vec<u8> = two_nodes().into_iter().flat_map(|(_, bytes)| bytes).collect();
    let got = verdict(harness(dir.path()).args(["diagnose", "-"]).write_stdin(all), 0);
    assert_eq!((&got["id"], &got["node"]), (&Value::from("FM-2"), &Value::from("server-2")));
    let bare = "panic: bootstrap data already found and encrypted with different token\n";
    harness(dir.path())
        .args(["diagnose", "-"])
        .write_stdin(bare)
        .assert()
        .code(0)
        .stdout(predicate::str::contains("node unknown").and(predicate::str::contains("node as its lines say")));
}

#[test]
fn the_journal_as_export_and_as_json_gives_one_verdict() {
    let dir = tempfile::tempdir().unwrap();
    let text = String::from_utf8(two_nodes().remove(1).1).unwrap();
    let (mut export, mut json) = (String::new(), String::new());
    for (n, line) in text.lines().enumerate() {
        // `Nov 21 02:44:00 server-2 k3s[532]: message` or its ISO form: the message is what the fields hold.
        let (head, message) = line.split_once(": ").unwrap_or(("", line));
        let unit = head.rsplit(' ').next().unwrap_or("k3s").split('[').next().unwrap();
        let at = 1_795_228_957_000_000_u64 + n as u64 * 1_000_000;
        export += &format!(
            "__CURSOR=s=1;i={n}\n__REALTIME_TIMESTAMP={at}\n_HOSTNAME=server-2\nSYSLOG_IDENTIFIER={unit}\nMESSAGE={message}\n\n"
        );
        let fields = serde_json::json!({
            "MESSAGE": message, "_HOSTNAME": "server-2", "SYSLOG_IDENTIFIER": unit, "__REALTIME_TIMESTAMP": at.to_string(),
        });
        json += &format!("{fields}\n");
    }
    for form in [export, json] {
        let got = verdict(harness(dir.path()).args(["diagnose", "-"]).write_stdin(form), 0);
        assert_eq!(
            (&got["id"], &got["node"], &got["confidence"]),
            (&"FM-2".into(), &"server-2".into(), &"high".into())
        );
    }
}

/// A run folder as `harness run` leaves it.
fn run_folder(root: &Path, id: &str, failed: bool, files: &[(&str, Vec<u8>)]) {
    let run = root.join(id);
    fs::create_dir_all(&run).unwrap();
    let failure = serde_json::json!({
        "blame": "product", "phase": "join", "node": "server-2", "hint": null,
        "chain": ["joining server-2", "k3s-server.service on server-2 ended"],
    });
    let report = serde_json::json!({
        "schema_version": 1, "run": id, "scenario": "simple", "passed": !failed,
        "failure": if failed { failure } else { Value::Null },
        "verdict": { "evidence": [{ "text": "leaderelection lost" }] },
        "restarts": [{ "node": "server-2", "unit": "k3s-server.service", "restarts": 3 }],
    });
    let plan = serde_json::json!({
        "host": { "cores": 2, "accel": "tcg", "memory_available_mib": 2048, "slowdown": 6.0 },
        "oversubscription": { "vcpus": 8, "cores": 2, "ratio": 4.0, "warning": null },
        "nodes": [{ "name": "server-1", "vm": { "vcpus": 4 } }, { "name": "server-2", "vm": { "vcpus": 4 } }],
    });
    fs::write(run.join("run.json"), serde_json::json!({ "run": id, "lab": "abc", "schema_version": 1 }).to_string())
        .unwrap();
    fs::write(run.join("verdict.json"), report.to_string()).unwrap();
    fs::write(run.join("plan.json"), plan.to_string()).unwrap();
    fs::write(run.join("events.ndjson"), "{\"event\":\"F1121 02:44:00.8 1 server.go:205] leaderelection lost\"}\n")
        .unwrap();
    put(&run.join("nodes"), files);
    fs::write(run.join("nodes/server-1/qemu.log"), "").unwrap();
}

#[test]
fn a_run_folder_brings_its_phase_its_host_and_its_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    run_folder(dir, "r1", true, &two_nodes());
    let got = verdict(harness(dir).args(["diagnose", "r1"]), 0);
    assert_eq!((&got["id"], &got["phase"], &got["outcome"]), (&"FM-2".into(), &"join".into(), &"failed".into()));
    let contributing = got["contributing"].to_string();
    assert!(contributing.contains("FM-5") && contributing.contains("4.0"), "8 vCPUs on 2 cores: {contributing}");
    assert!(contributing.contains("k3s-server.service"), "three restarts: {contributing}");
    // What the harness wrote about the run is no evidence.
    assert!(!got.to_string().contains("leaderelection lost"), "{got}");
    // The same folder within a job's artifacts.
    let whole: Vec<(String, Vec<u8>)> = [
        "run.json",
        "verdict.json",
        "plan.json",
        "events.ndjson",
        "nodes/server-1/journal.log",
        "nodes/server-2/journal.log",
    ]
    .iter()
    .map(|name| (format!("job/runs/r1/{name}"), fs::read(dir.join("r1").join(name)).unwrap()))
    .collect();
    let whole: Vec<(&str, Vec<u8>)> = whole.iter().map(|(name, bytes)| (name.as_str(), bytes.clone())).collect();
    fs::write(dir.join("art.tar.gz"), gzip(&tar_of(&whole))).unwrap();
    assert_eq!(verdict(harness(dir).args(["diagnose", "art.tar.gz"]), 0), got);
}

#[test]
fn a_run_that_passed_is_healthy_whatever_its_logs_say_and_a_failed_one_beside_it_counts() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    run_folder(&dir.join("runs"), "20260101T000000Z-ok", false, &two_nodes());
    let got = verdict(harness(dir).args(["diagnose", "runs"]), 0);
    assert_eq!((&got["outcome"], &got["id"]), (&"passed".into(), &Value::Null));
    let other = vec![("server-1/journal.log", fs::read(fixture("unknown-cgroup.log")).unwrap())];
    run_folder(&dir.join("runs"), "20260102T000000Z-bad", true, &other);
    let got = verdict(harness(dir).args(["diagnose", "runs"]), 5);
    assert_eq!((&got["outcome"], &got["id"]), (&"failed".into(), &Value::Null));
    harness(dir)
        .args(["diagnose", "runs"])
        .assert()
        .code(5)
        .stdout(predicate::str::contains("1 of 2 runs passed and were not read"));
    fs::remove_file(dir.join("runs/20260102T000000Z-bad/verdict.json")).unwrap();
    harness(dir)
        .args(["diagnose", "runs/20260102T000000Z-bad"])
        .assert()
        .stdout(predicate::str::contains("no verdict.json"));
}

#[test]
fn exit_codes_tell_a_verdict_from_none() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for (name, code) in [
        ("healthy-slow-applies.log", 0),
        ("look-oom.log", 0),
        ("fm1-etcd34-docker-compose.log", 0),
        ("unknown-cgroup.log", 5),
    ] {
        harness(dir).arg("diagnose").arg(fixture(name)).assert().code(code);
    }
    let stderr = |command: &mut Command, code: i32, text: &str| {
        command.assert().code(code).stdout("").stderr(predicate::str::contains(text.to_owned()));
    };
    stderr(harness(dir).args(["diagnose", "missing.log"]), 3, "opening missing.log");
    stderr(harness(dir).args(["diagnose", "-"]).write_stdin(""), 3, "the input is empty");
    stderr(harness(dir).args(["diagnose", "."]), 3, "there is no file");
    stderr(harness(dir).args(["diagnose", "/dev/null"]), 3, "neither a file nor a folder nor a pipe");
    stderr(harness(dir).args(["diagnose", "-", "-"]), 2, "only once");
    stderr(harness(dir).arg("diagnose"), 2, "PATH");
    fs::write(dir.join("cut.gz"), &gzip(b"hello\n")[..9]).unwrap();
    stderr(harness(dir).args(["diagnose", "cut.gz"]), 3, "cut.gz: ends early");
    fs::write(dir.join("prog.log"), b"\x7fELF\x02\x01\x01\0leaderelection lost").unwrap();
    stderr(harness(dir).args(["diagnose", "prog.log"]), 3, "prog.log: not read: it is a program");
}

#[test]
fn a_folder_is_not_left_through_a_link() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    put(dir, &[("outside/server-2.log", two_nodes().remove(1).1), ("inside/ok.log", b"all is well\n".to_vec())]);
    std::os::unix::fs::symlink(dir.join("outside"), dir.join("inside/more")).unwrap();
    std::os::unix::fs::symlink(dir.join("outside/server-2.log"), dir.join("inside/x.log")).unwrap();
    harness(dir).args(["diagnose", "inside"]).assert().code(0).stdout(
        predicate::str::contains("NO FAILURE SEEN").and(predicate::str::contains("2 symbolic links were not followed")),
    );
    // A link that is named is meant.
    assert_eq!(verdict(harness(dir).args(["diagnose", "inside/x.log"]), 0)["id"], "FM-2");
}

const SITE: &str = "id: SITE-1\nname: the switch's port is down\nsummary: The switch shut the port.\nclass: configuration\nattribution: configuration\nsigns:\n  - name: port-down\n    meaning: fatal\n    says: the switch shut the port\n    anchors: [err-disabled]\n    pattern: 'port \\S+ err-disabled'\nrules:\n  - name: seen\n    all: [[port-down]]\n    confidence: high\n    because: the switch says so\nremedy: [ask the network's people]\n";

#[test]
fn a_site_has_modes_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    put(dir, &[("site/port.yaml", SITE.as_bytes().to_vec()), ("x.log", b"switch: port gi0/7 err-disabled\n".to_vec())]);
    assert_eq!(verdict(harness(dir).args(["diagnose", "x.log"]), 0)["id"], Value::Null);
    assert_eq!(verdict(harness(dir).args(["diagnose", "x.log", "--catalogue", "site"]), 0)["id"], "SITE-1");
    harness(dir)
        .args(["catalogue", "show", "site-1", "--catalogue", "site"])
        .assert()
        .code(0)
        .stdout(predicate::str::contains("ask the network's people"));
    fs::write(dir.join("site/port.yaml"), SITE.replace("SITE-1", "FM-3")).unwrap();
    for command in [["diagnose", "x.log"], ["catalogue", "list"]] {
        harness(dir)
            .args(command)
            .args(["--catalogue", "site"])
            .assert()
            .code(2)
            .stderr(predicate::str::contains("site/port.yaml:1:5: FM-3 is one of the harness's own modes"));
    }
    harness(dir)
        .args(["catalogue", "list", "--catalogue", "nowhere"])
        .assert()
        .code(2)
        .stderr(predicate::str::contains("reading the catalogue nowhere"));
}

#[test]
fn the_catalogue_is_listed_and_shown() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut list = harness(dir).args(["catalogue", "list"]).assert().code(0);
    for n in 1..=7 {
        list = list.stdout(predicate::str::contains(format!("FM-{n} ")));
    }
    harness(dir).args(["catalogue", "show", "fm-2"]).assert().code(0).stdout(
        predicate::str::contains("FM-2 stale bootstrap data")
            .and(predicate::str::contains("what to do"))
            .and(predicate::str::contains("/")),
    );
    let json = harness(dir).args(["catalogue", "show", "FM-2", "--json"]).assert().code(0);
    let mode: Value = serde_json::from_slice(&json.get_output().stdout).unwrap();
    assert_eq!((&mode["id"], &mode["class"]), (&"FM-2".into(), &"state".into()));
    let json = harness(dir).args(["catalogue", "list", "--json"]).assert().code(0);
    let modes: Value = serde_json::from_slice(&json.get_output().stdout).unwrap();
    assert!(modes.as_array().unwrap().len() > 7);
    harness(dir)
        .args(["catalogue", "show", "FM-22"])
        .assert()
        .code(2)
        .stderr(predicate::str::contains("did you mean `FM-2`?"));
}

/// The patterns that are printed for `grep -E` are taken by it and find what the classifier finds.
#[test]
fn grep_takes_the_patterns() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let out = harness(dir).args(["catalogue", "patterns"]).assert().code(0);
    fs::write(dir.join("patterns"), &out.get_output().stdout).unwrap();
    let list = harness(dir).args(["catalogue", "list", "--json"]).assert().code(0);
    let modes: Value = serde_json::from_slice(&list.get_output().stdout).unwrap();
    let examples: Vec<&str> = modes
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|mode| mode["signs"].as_array().unwrap())
        .flat_map(|sign| sign["examples"].as_array().into_iter().flatten())
        .map(|example| example.as_str().unwrap())
        .filter(|example| !example.contains('\n'))
        .collect();
    assert!(examples.len() > 50);
    fs::write(dir.join("examples"), examples.join("\n") + "\n").unwrap();
    let grep = std::process::Command::new("grep")
        .args(["-cEf", "patterns", "examples"])
        .env("LC_ALL", "C")
        .current_dir(dir)
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&grep.stderr), "", "grep complains of no pattern");
    let found: usize = String::from_utf8(grep.stdout).unwrap().trim().parse().unwrap();
    assert!(found * 100 >= examples.len() * 95, "{found} of {} examples are found", examples.len());
}

#[test]
fn help_documents_the_exit_codes() {
    let dir = tempfile::tempdir().unwrap();
    harness(dir.path()).args(["diagnose", "--help"]).assert().code(0).stdout(
        predicate::str::contains("no verdict: something failed that is not in the catalogue")
            .and(predicate::str::contains("journalctl -D")),
    );
}
