//! Guests that misbehave: the run ends at once where nothing can come of it, says why, and shows nothing raw.

use std::time::{Duration, Instant};

use crate::lab::Bench;

/// From a guest's deed to the end of the run.
const SOON: Duration = Duration::from_secs(20);

const LONG_SETTLE: &str = "name: long\ndescription: one server, watched for long\nprofile: simple\nsettle_ms: 120000\n\
                           nodes:\n  - {name: server-1, role: server}\n";

/// A run whose guest has answered over SSH and does this a moment later; how it ended.
fn does(bench: &Bench, deed: &str) -> (Option<i32>, Duration, String) {
    bench.write("long.yaml", LONG_SETTLE);
    let mut run = bench.start("./long.yaml");
    run.wait_for_phase("network");
    run.wait_for("the guest", |event| event["phase-started"]["node"] == "server-1");
    run.wait_for("its answer", |event| event["phase-started"]["phase"] == "identify");
    let began = Instant::now();
    // The answer may be lost with the guest.
    let said = bench.exec(deed);
    println!("{deed}: {said:?}");
    let (code, _) = run.finish();
    let elapsed = began.elapsed();
    bench.assert_clean();
    (code, elapsed, bench.verdict().to_string())
}

#[test]
fn a_guest_that_panics_is_seen_by_qmp_and_ends_the_run() {
    let bench = Bench::new();
    let (code, elapsed, verdict) = does(&bench, "echo c > /proc/sysrq-trigger");
    assert_eq!(code, Some(1), "{verdict}");
    // By its console or by pvpanic, whichever is read first; the other one is in the events.
    assert!(verdict.contains("the guest's kernel panicked"), "{verdict}");
    assert!(verdict.contains("Kernel panic - not syncing: sysrq triggered crash"), "{verdict}");
    let events = std::fs::read_to_string(bench.newest_run().join("events.ndjson")).unwrap();
    assert!(events.contains("GUEST_PANICKED"), "pvpanic did not tell: {events}");
    assert!(verdict.contains("its vCPUs are stopped (guest-panicked)"), "collect asked a stopped guest: {verdict}");
    assert!(elapsed < SOON, "{elapsed:?}");
}

#[test]
fn a_guest_that_reboots_by_itself_ends_the_run() {
    let bench = Bench::new();
    let (code, elapsed, verdict) = does(&bench, "reboot -f");
    assert_eq!(code, Some(1), "{verdict}");
    assert!(verdict.contains("server-1: the guest reset itself (RESET)"), "{verdict}");
    assert!(verdict.contains("its guest has reset itself and boots again"), "collect waited for it: {verdict}");
    assert!(elapsed < SOON, "{elapsed:?}");
}

/// Reserved, not written: the host's disk stays as it is.
#[test]
fn a_guest_that_fills_its_disk_is_named() {
    let bench = Bench::new();
    let fill = "mkdir -p /var/lib/rancher; while fallocate -l 1G /var/lib/f$i; do i=x$i; done; \
                for s in 100M 10M 1M 100K 4K; do while fallocate -l $s /var/lib/f$i; do i=x$i; done; done; df / >&2";
    let (code, elapsed, verdict) = does(&bench, fill);
    println!("a full guest ended the run after {elapsed:?}: {verdict}");
    // k3s is what failed, on a machine that was too small for it.
    assert_eq!(code, Some(3), "{verdict}");
    assert_eq!(bench.verdict()["verdict"]["look_alike"]["id"], "DISK-FULL", "{verdict}");
    assert!(verdict.contains("o space left on device"), "{verdict}");
}

#[test]
fn a_seed_that_does_not_unpack_is_told_by_the_guests_first_program() {
    let bench = Bench::new();
    let mut run = bench.start("smoke");
    run.wait_for_phase("boot");
    // The guest's firmware is not through yet.
    let labs = std::fs::read_dir(bench.path().join("state/labs")).unwrap();
    let lab = labs.map(|entry| entry.unwrap().path()).next().unwrap();
    let seed = lab.join("server-1.seed");
    let bytes = std::fs::metadata(&seed).unwrap().len();
    let garbage: Vec<u8> = (0..bytes).map(|n| (n * 7 % 251) as u8).collect();
    std::fs::write(&seed, garbage).unwrap();
    let began = Instant::now();
    let (code, _) = run.finish();
    bench.assert_clean();
    let verdict = bench.verdict();
    assert_eq!(verdict["verdict"]["look_alike"]["id"], "SEED-FAILED", "{verdict:#}");
    assert!(verdict["failure"].to_string().contains("FAILED the seed does not unpack"), "{verdict:#}");
    assert_eq!(code, Some(4), "a seed is the harness's work: {verdict:#}");
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
}

#[test]
fn a_leg_without_a_carrier_is_named_with_its_node() {
    let bench = Bench::new();
    bench.write(
        "leg.yaml",
        "name: leg\ndescription: a dead leg\nprofile: bonding-vlans\nexpect: {outcome: failure, phase: network}\nnodes:\n\
         \x20 - {name: server-1, role: server, unplugged: [eth2]}\n",
    );
    let run = bench.run("./leg.yaml", &[]);
    bench.assert_clean();
    run.assert_exit(0);
    let failure = run.json("verdict.json")["failure"].clone();
    assert_eq!((&failure["phase"], &failure["node"]), (&"network".into(), &"server-1".into()), "{failure:#}");
    let chain = failure["chain"].to_string();
    assert!(chain.contains("leg eth2 of bond0 is dead: it has no carrier"), "{chain}");
    assert!(!chain.contains("eth1") && !chain.contains("bond0.200"), "what is good is blamed, too: {chain}");
}

/// Everything at once that a guest can say, and its sshd taken away under the run's connection: the run passes, and
/// nothing of it reaches a terminal or a record that a person reads as it is.
#[test]
fn a_guest_that_lies_and_drops_its_sshd_is_borne() {
    let bench = Bench::new();
    bench.write("calm.yaml", &LONG_SETTLE.replace("120000", "8000"));
    let mut run = bench.start("./calm.yaml");
    run.wait_for_phase("settle");
    let lies = r"printf '\033]0;owned\007\033[2J\302\2332K\000\377\376 lie\r\n' > /tmp/lie; \
        cat /tmp/lie > /dev/ttyS0; (cat /tmp/lie; head -c 3000000 /dev/zero | tr '\0' y; echo; cat /tmp/lie) > /dev/kmsg 2>/dev/null; \
        head -c 3000000 /dev/zero | tr '\0' y | logger -t liar; cat /tmp/lie | logger -t liar; logger -t liar < /dev/urandom & \
        sleep 1; kill $!; head -c 200000 /dev/urandom > /dev/ttyS0; echo; cat /tmp/lie; cat /tmp/lie >&2; \
        systemctl restart ssh.service; pkill -f 'sshd: root'; sleep 30";
    let exec = bench.exec(lies);
    // Its own connection went with sshd's sessions.
    assert_eq!(exec.status.code(), Some(255), "{exec:?}");
    assert!(exec.stdout.windows(4).any(|bytes| bytes == b"\x1b[2J"), "a pipe gets every byte: {exec:?}");
    let said = String::from_utf8_lossy(&exec.stderr);
    assert!(said.contains("ssh connection lost under"), "{said}");
    shown_on_a_terminal(&bench);
    let (code, events) = run.finish();
    assert_eq!(code, Some(0), "{events:#?}");
    bench.assert_clean();
    let records = bench.newest_run();
    for file in ["events.ndjson", "verdict.json", "nodes/server-1/journal.log"] {
        let text = String::from_utf8(std::fs::read(records.join(file)).unwrap()).unwrap();
        let raw = text.chars().find(|c| c.is_control() && !matches!(c, '\n' | '\t'));
        assert_eq!(raw, None, "{file}");
    }
    let journal = std::fs::read_to_string(records.join("nodes/server-1/journal.log")).unwrap();
    assert!(journal.contains("liar"), "the journal was lost with sshd");
}

/// `script` gives the commands a terminal.
fn shown_on_a_terminal(bench: &Bench) {
    for (command, shown) in
        [("console server-1", r"\x1b]0;owned\x07\x1b[2J"), ("exec server-1 -- 'cat /tmp/lie'", r"\x1b]0;owned")]
    {
        let line = format!("{} {command}", env!("CARGO_BIN_EXE_harness"));
        let harness = bench.harness(&[]);
        let mut script = std::process::Command::new("script");
        script.args(["-qec", &line, "/dev/null"]).current_dir(bench.path()).stdin(std::process::Stdio::null());
        for (name, value) in harness.get_envs() {
            script.env(name, value.unwrap());
        }
        let output = script.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{command}: {text}");
        assert!(text.contains(shown), "{command}: {text}");
        let raw = text.chars().find(|c| c.is_control() && !matches!(c, '\r' | '\n' | '\t'));
        assert_eq!(raw, None, "{command}");
    }
}

/// sshd is masked on the kernel's command line's behalf: nothing ever answers, and the run ends at its deadline.
#[test]
#[ignore = "takes the whole deadline of a boot, minutes under TCG: `ci/soak` runs it"]
fn a_guest_that_never_answers_is_quoted() {
    let bench = Bench::new();
    bench.write("images/recipes/deaf.yaml", "name: deaf\nextends: debian-k3s\nunits:\n  mask: [ssh.service]\n");
    bench.write(
        "deaf.yaml",
        "name: deaf\ndescription: no sshd\nprofile: simple\nimage: deaf\nnodes:\n  - {name: server-1, role: server}\n",
    );
    let run = bench.run("./deaf.yaml", &[]);
    bench.assert_clean();
    run.assert_exit(3);
    let verdict = run.json("verdict.json");
    let chain = verdict["failure"]["chain"].to_string();
    assert!(chain.contains("the guest did not answer over SSH"), "{chain}");
    assert!(chain.contains("the guest's network is up, its sshd is not"), "{chain}");
    assert!(chain.contains("harness-seed: ok"), "the console is not quoted: {chain}");
    assert!(run.stdout().contains("harness-seed: ok"), "{}", run.stdout());
}
