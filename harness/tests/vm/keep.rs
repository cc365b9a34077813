//! A lab that is kept: looked into, ended by command, by its expiry, and by the death of its owner.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::Value;

use crate::lab::Bench;

/// Within which an end that was asked for, or is due, has come about.
const SOON: Duration = Duration::from_secs(15);
/// What is promised for processes after a SIGKILL of their owner.
const GONE_WITHIN: Duration = Duration::from_secs(2);

fn harness(bench: &Bench, args: &[&str]) -> Output {
    bench.harness(args).output().unwrap()
}

#[track_caller]
fn stdout(output: &Output, code: i32) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn labs(bench: &Bench) -> Vec<Value> {
    let json: Value = serde_json::from_str(&stdout(&harness(bench, &["ps", "--json"]), 0)).unwrap();
    json["labs"].as_array().unwrap().clone()
}

fn with_input(mut command: Command, input: &str) -> Output {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn kill(pid: u64, signal: Signal) {
    nix::sys::signal::kill(Pid::from_raw(pid.try_into().unwrap()), signal).unwrap();
}

#[test]
fn a_kept_lab_is_looked_into_and_stopped() {
    let bench = Bench::new();
    bench.write("own images.tar", "what a registry would give");
    // That this returns at all says that the owner has let go of the pipes.
    let run = bench.run("smoke", &["--keep", "--keep-for", "10m", "--airgap-images", "file:own images.tar"]);
    run.assert_exit(0);
    assert_eq!(run.json("verdict.json")["passed"], true);
    assert!(run.stdout().contains("  kept: lab "), "{}", run.stdout());

    let journal = std::fs::read_to_string(run.dir.join("nodes/server-1/journal.log")).unwrap();
    let end = journal.lines().last().unwrap();
    assert!(end.starts_with("-- The run is over and this journal with it; the lab is kept: `harness logs"), "{end}");

    let labs = labs(&bench);
    assert_eq!(labs.len(), 1);
    let lab = labs[0]["lab"].as_str().unwrap();
    assert_eq!((&labs[0]["state"], &labs[0]["nodes"][0]["name"]), (&"kept".into(), &"server-1".into()));
    assert!(labs[0]["expires_in_ms"].as_u64().unwrap() > 500_000, "{}", labs[0]);
    let table = stdout(&harness(&bench, &["ps"]), 0);
    assert!(table.contains(lab) && table.contains("NOT real k3s"), "{table}");

    let exec = harness(&bench, &["exec", "server-1", "--", "hostname; echo said >&2; exit 7"]);
    assert_eq!(stdout(&exec, 7), "server-1\n");
    assert_eq!(exec.stderr, b"said\n");
    let words = harness(&bench, &["exec", "server-1", "--lab", lab, "--", "printf", "%s|", "a b", "$HOME"]);
    assert_eq!(stdout(&words, 0), "a b|$HOME|");
    let fed = with_input(bench.harness(&["exec", "server-1", "-i", "--", "wc", "-c"]), "12345");
    assert_eq!(stdout(&fed, 0).trim(), "5");
    let unknown = harness(&bench, &["exec", "server-9", "--", "true"]);
    stdout(&unknown, 255);
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("there are: server-1"), "{unknown:?}");

    let shell = with_input(bench.harness(&["shell", "server-1"]), "cat /proc/sys/kernel/hostname; exit 5\n");
    assert_eq!(stdout(&shell, 5), "server-1\n");

    let mut without_ssh = bench.harness(&["shell", "server-1"]);
    let without_ssh = without_ssh.env("PATH", "/nonexistent").output().unwrap();
    stdout(&without_ssh, 3);
    let said = String::from_utf8_lossy(&without_ssh.stderr);
    assert!(said.contains("ssh") && said.contains("openssh-client") && said.contains("`harness exec`"), "{said}");

    // Neither the image's builder nor the cleaning of the node has lost it.
    let images = "cat '/var/lib/rancher/k3s/agent/images/own images.tar'";
    assert_eq!(stdout(&harness(&bench, &["exec", "server-1", "--", images]), 0), "what a registry would give");
    assert!(labs[0]["k3s"].as_str().unwrap().contains("own images.tar"), "{}", labs[0]["k3s"]);

    let base = tempfile::tempdir().unwrap();
    let (file, back) = (base.path().join("file"), base.path().join("back"));
    std::fs::write(&file, vec![0xA5; 700_000]).unwrap();
    stdout(&harness(&bench, &["cp", file.to_str().unwrap(), "server-1:/root/"]), 0);
    stdout(&harness(&bench, &["cp", "server-1:/root/file", back.to_str().unwrap()]), 0);
    assert!(std::fs::read(&back).unwrap() == std::fs::read(&file).unwrap());
    stdout(&harness(&bench, &["cp", "server-1:/etc/ssh", base.path().join("ssh").to_str().unwrap()]), 0);
    assert!(base.path().join("ssh/sshd_config").exists());

    let logs = stdout(&harness(&bench, &["logs", "server-1", "--unit", "k3s-server"]), 0);
    assert!(logs.contains("k3s") && !logs.contains("::server:"), "{logs}");
    let console = stdout(&harness(&bench, &["console", "server-1"]), 0);
    assert!(console.contains("harness-seed: ok"), "{console}");

    let (mut ended_by_hand, mut logs) =
        (Followed::start(&bench, &["logs", "server-1", "-f"]), Followed::start(&bench, &["logs", "server-1", "-f"]));
    let mut console = Followed::start(&bench, &["console", "server-1", "-f"]);
    // What was said before comes first; then these, said while they are followed.
    logs.until("Linux version");
    console.until("harness-seed: ok");
    let say = "echo said to the journal | systemd-cat; echo said on the console >/dev/console";
    stdout(&harness(&bench, &["exec", "server-1", "--", say]), 0);
    logs.until("said to the journal");
    console.until("said on the console");
    ended_by_hand.until("said to the journal");
    kill(ended_by_hand.child.id().into(), Signal::SIGINT);
    assert_eq!(ended_by_hand.end(), Some(0));

    assert_eq!(stdout(&harness(&bench, &["stop"]), 0), format!("lab {lab} is gone\n"));
    assert_eq!((logs.end(), console.end()), (Some(0), Some(0)), "the end of a lab is that of what is followed");
    bench.assert_clean();
    let owner = labs[0]["owner"]["pid"].as_u64().unwrap();
    until("the owner has ended", SOON, || !Path::new(&format!("/proc/{owner}")).exists());
    assert_eq!(stdout(&harness(&bench, &["ps"]), 0), "no lab lives\n");
    stdout(&harness(&bench, &["stop"]), 2);
    let recorded = harness(&bench, &["logs", "server-1"]);
    assert!(stdout(&recorded, 0).contains("k3s"));
    assert!(String::from_utf8_lossy(&recorded.stderr).contains("no lab with it lives"), "{recorded:?}");
}

#[test]
fn a_lab_kept_for_seconds_expires_by_itself() {
    let bench = Bench::new();
    let (lab, run) = failed_early(&bench, "5s");
    assert_eq!(lab["state"], "kept");
    let console = stdout(&harness(&bench, &["console", "server-1"]), 0);
    assert!(bench.processes().iter().any(|line| line.contains("qemu")), "its VM has not been kept: {console}");
    until("it has expired", SOON, || labs(&bench).is_empty());
    // The owner lets go of the folder last.
    until("its folder is gone", SOON, || !Path::new(lab["client_key"].as_str().unwrap()).parent().unwrap().exists());
    bench.assert_clean();
    let log = std::fs::read_to_string(run.join("owner.log")).unwrap();
    assert!(log.contains("it has expired") && log.contains("nothing of it is left"), "{log}");
}

#[test]
fn a_lab_past_its_expiry_whose_owner_hangs_is_cleaned_away() {
    let bench = Bench::new();
    let (lab, run) = failed_early(&bench, "3s");
    let owner = lab["owner"]["pid"].as_u64().unwrap();
    kill(owner, Signal::SIGSTOP);
    let id = lab["lab"].as_str().unwrap();
    until("its time is over", SOON, || labs(&bench)[0]["expires_in_ms"] == 0);
    assert!(bench.processes().iter().any(|line| line.contains("qemu")), "nobody has ended it");
    assert_eq!(stdout(&harness(&bench, &["clean"]), 0), format!("ended lab {id}: its time was over\n"));
    bench.assert_clean();
    until("the owner has ended", SOON, || !Path::new(&format!("/proc/{owner}")).exists());
    let log = std::fs::read_to_string(run.join("owner.log")).unwrap();
    assert!(log.contains("nothing of it is left"), "{log}");
}

#[test]
fn sigkill_of_the_owner_leaves_no_process() {
    let bench = Bench::new();
    let (lab, _) = failed_early(&bench, "10m");
    kill(lab["owner"]["pid"].as_u64().unwrap(), Signal::SIGKILL);
    bench.assert_gone_within(GONE_WITHIN);
    assert!(labs(&bench).is_empty());
    let id = lab["lab"].as_str().unwrap();
    assert_eq!(stdout(&harness(&bench, &["clean"]), 0), format!("removed the folders of lab {id}\n"));
    bench.assert_clean();
}

#[test]
fn a_lab_whose_run_lost_its_command_is_taken_down() {
    let bench = Bench::new();
    let (mut relay, lab) = booting(&bench, "10m");
    relay.kill().unwrap();
    relay.wait().unwrap();
    until("it is gone", SOON, || labs(&bench).is_empty());
    let key = Path::new(lab["client_key"].as_str().unwrap()).to_owned();
    until("its folder is gone", SOON, || !key.parent().unwrap().exists());
    bench.assert_clean();
    let owner = lab["owner"]["pid"].as_u64().unwrap();
    until("the owner has ended", SOON, || !Path::new(&format!("/proc/{owner}")).exists());
    let verdict = std::fs::read_to_string(bench.newest_run().join("verdict.json")).unwrap();
    assert!(verdict.contains("the death of the command that started it"), "{verdict}");
}

/// A run that is to be kept where it fails, in its boot phase; and its lab as `ps` shows it.
fn booting(bench: &Bench, keep_for: &str) -> (Child, Value) {
    let args = ["run", "smoke", "--k3s", "standin", "--format", "json", "--keep-on-failure", "--keep-for", keep_for];
    let mut relay = bench.harness(&args).stdout(Stdio::piped()).spawn().unwrap();
    let mut events = BufReader::new(relay.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains(r#""phase-started":{"phase":"boot""#) {
        line.clear();
        assert!(events.read_line(&mut line).unwrap() > 0, "it ended before its boot");
    }
    // Somebody has to read on, as a terminal would.
    std::thread::spawn(move || std::io::copy(&mut events, &mut std::io::sink()));
    let mut listed = Vec::new();
    until("it is listed", SOON, || {
        listed = labs(bench);
        !listed.is_empty()
    });
    assert_eq!(listed[0]["state"], "forming");
    (relay, listed.remove(0))
}

/// A lab that is kept because its switch was killed while its guest booted, and the run's folder.
fn failed_early(bench: &Bench, keep_for: &str) -> (Value, std::path::PathBuf) {
    let (mut relay, lab) = booting(bench, keep_for);
    kill(switch_of(lab["lab"].as_str().unwrap()), Signal::SIGKILL);
    assert_eq!(relay.wait().unwrap().code(), Some(3), "a killed switch is the environment's fault");
    let run = bench.newest_run();
    let verdict = std::fs::read_to_string(run.join("verdict.json")).unwrap();
    assert!(verdict.contains("vde_switch killed by signal 9"), "{verdict}");
    (labs(bench).remove(0), run)
}

/// A command that goes on saying things.
struct Followed {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Followed {
    fn start(bench: &Bench, args: &[&str]) -> Self {
        let mut child = bench.harness(args).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    /// Reads until it has said this.
    #[track_caller]
    fn until(&mut self, text: &str) {
        assert!(self.lines.any(|line| line.unwrap().contains(text)), "it ended without {text:?}");
    }

    /// Reads to its end; its exit code.
    fn end(&mut self) -> Option<i32> {
        self.lines.by_ref().for_each(drop);
        self.child.wait().unwrap().code()
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        // A failed assertion must not leave it behind.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn switch_of(lab: &str) -> u64 {
    let mark = format!("/{lab}/");
    for entry in std::fs::read_dir("/proc").unwrap().filter_map(Result::ok) {
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else { continue };
        let line = String::from_utf8_lossy(&line);
        if line.split('\0').next().is_some_and(|program| program.ends_with("vde_switch")) && line.contains(&mark) {
            return entry.file_name().to_str().unwrap().parse().unwrap();
        }
    }
    panic!("lab {lab} has no switch");
}

#[track_caller]
fn until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + limit;
    while !condition() {
        assert!(Instant::now() < until, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
