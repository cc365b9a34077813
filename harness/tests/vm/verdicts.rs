//! Known failure modes, brought about in real VMs and named by the verdict.

use crate::lab::Bench;

/// An image that enables k3s at boot with a token baked into it.
const BAKED_RECIPE: &str = include_str!("baked.yaml");

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
    assert_collected(&run);
    assert_ended_soon_after_the_panic(&run);
}

/// From the moment the panic is printed in the guest to the end of the phase: at most 2 s are promised.
#[track_caller]
fn assert_ended_soon_after_the_panic(run: &crate::lab::Run) {
    let journal = std::fs::read_to_string(run.dir.join("nodes/server-2/journal.log")).unwrap();
    let line =
        journal.lines().find(|line| line.contains("encrypted with different token")).expect("no panic in the journal");
    let printed: jiff::Timestamp = line.split(' ').next().unwrap().replace("+0000", "Z").parse().unwrap();
    let events = events(run);
    let sign = events.iter().find(|event| event["event"]["fatal-sign"]["id"] == "FM-2").expect("no sign");
    let sign: jiff::Timestamp = sign["event"]["fatal-sign"]["printed_at"].as_str().unwrap().parse().unwrap();
    assert!((sign - printed).total(jiff::Unit::Millisecond).unwrap().abs() < 1.0, "{sign} {printed}");
    let lag_ms = ended_after_ms(&events);
    println!("from the panic to the end of the phase: {lag_ms:.0} ms");
    assert!((0.0..2_000.0).contains(&lag_ms), "{lag_ms} ms");
}

/// What a person would look at next is there, readable, and without tokens.
#[track_caller]
fn assert_collected(run: &crate::lab::Run) {
    for (file, has) in [
        ("dmesg.log", "Linux version"),
        ("ip.txt", "link/ether"),
        ("units.txt", "NRestarts="),
        ("sockets.txt", ":22"),
        ("resources.txt", "Mem:"),
        ("k3s.txt", "K3S_ARGS="),
        ("etcd.txt", "\"peerURLs\""),
        ("journal-tail.txt", "k3s"),
    ] {
        let text = std::fs::read_to_string(run.dir.join("nodes/server-1").join(file)).unwrap();
        assert!(text.contains(has), "{file}: {text}");
    }
    let mut folders = vec![run.dir.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() {
                folders.push(entry);
                continue;
            }
            let text = String::from_utf8_lossy(&std::fs::read(&entry).unwrap()).into_owned();
            let full = text
                .match_indices("K10")
                .any(|(at, _)| text[at..].chars().skip(3).take(32).all(|c| c.is_ascii_hexdigit()));
            assert!(!full && !text.contains("baked-on-server"), "a token is in {}", entry.display());
        }
    }
}

fn events(run: &crate::lab::Run) -> Vec<serde_json::Value> {
    let events = std::fs::read_to_string(run.dir.join("events.ndjson")).unwrap();
    events.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// From the moment the fatal line was printed in the guest, on the host's clock, to the end of the phase it ended.
#[track_caller]
fn ended_after_ms(events: &[serde_json::Value]) -> f64 {
    let at = |value: &serde_json::Value| value.as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
    let sign = events.iter().find(|event| event["event"]["fatal-sign"].is_object()).expect("no fatal sign");
    let failed = |event: &&serde_json::Value| event["event"]["phase-finished"]["outcome"] == "failed";
    let ended = events.iter().find(failed).expect("no phase failed");
    (at(&ended["at"]) - at(&sign["event"]["fatal-sign"]["printed_at"])).total(jiff::Unit::Millisecond).unwrap()
}

/// An image whose nodes go wrong by their names: on `foreign`, the machine in the ELF header of k3s becomes that of aarch64
/// once the guest runs; on `late`, the clock is an hour behind before sshd starts, and sshd with all its sessions is killed while
/// k3s starts, in the middle of lines that are numbered, with a line of 9,000 bytes at their end.
const FLAWED_RECIPE: &str = r#"name: flawed
extends: debian-k3s
files:
  - path: /etc/systemd/system/foreign.service
    content: |
      [Unit]
      ConditionHost=foreign
      Before=ssh.service
      [Service]
      Type=oneshot
      RemainAfterExit=yes
      ExecStart=/bin/sh -c "printf '\267\000' | dd of=/usr/local/bin/k3s bs=1 seek=18 conv=notrunc"
  - path: /etc/systemd/system/late.service
    content: |
      [Unit]
      ConditionHost=late
      Before=ssh.service
      [Service]
      Type=oneshot
      RemainAfterExit=yes
      ExecStart=/bin/date --set "1 hour ago"
  - path: /etc/systemd/system/ssh.service.d/10-flaws.conf
    content: |
      [Unit]
      Wants=foreign.service late.service
  - path: /etc/systemd/system/restless.service
    content: |
      [Unit]
      ConditionHost=late
      [Service]
      Type=oneshot
      RemainAfterExit=yes
      ExecStart=/bin/sh -c "sleep 2; seq -f 'numbered %%g' 1 300; systemctl kill --kill-who=all --signal=KILL ssh.service; seq -f 'numbered %%g' 301 600; head -c 9000 /dev/zero | tr '\000' x"
  - path: /etc/systemd/system/k3s-server.service.d/30-restless.conf
    content: |
      [Service]
      ExecStartPre=/bin/systemctl start --no-block restless.service
"#;

fn flawed(bench: &Bench, node: &str) -> crate::lab::Run {
    bench.write("images/recipes/flawed.yaml", FLAWED_RECIPE);
    bench.write(
        "flawed.yaml",
        &format!(
            "name: flawed\ndescription: one node that goes wrong\nprofile: simple\nimage: flawed\nsettle_ms: 2000\n\
             nodes:\n  - {{name: {node}, role: server}}\n"
        ),
    );
    bench.run("./flawed.yaml", &[])
}

#[test]
fn a_binary_of_another_machine_that_got_in_all_the_same_is_fm_7_at_once() {
    let bench = Bench::new();
    let run = flawed(&bench, "foreign");
    bench.assert_clean();
    let verdict = run.json("verdict.json");
    assert_eq!(verdict["verdict"]["id"], "FM-7", "{verdict:#}");
    assert_eq!(verdict["failure"]["phase"], "primary");
    assert_ne!(run.output.status.code(), Some(0));
    // The run's folder alone leads to the same verdict.
    let diagnosed = bench.harness(&["diagnose", "--json", run.dir.to_str().unwrap()]).output().unwrap();
    let diagnosed: serde_json::Value = serde_json::from_slice(&diagnosed.stdout).unwrap();
    assert_eq!(diagnosed["id"], "FM-7", "{diagnosed:#}");
    // Not after systemd's restarts are used up: no restart mends a binary.
    let lag_ms = ended_after_ms(&events(&run));
    println!("from the refused exec to the end of the phase: {lag_ms:.0} ms");
    assert!((0.0..2_000.0).contains(&lag_ms), "{lag_ms} ms");
}

#[test]
fn a_wrong_clock_is_noticed_and_no_line_is_lost_or_misplaced_when_sshd_dies() {
    let bench = Bench::new();
    let began = jiff::Timestamp::now();
    let run = flawed(&bench, "late");
    let ended = jiff::Timestamp::now();
    run.assert_exit(0);
    bench.assert_clean();
    let clock = run.json("nodes/late/clock.json");
    let off_s = clock["offset_us"].as_f64().unwrap() / 1e6;
    assert!((off_s + 3600.0).abs() < 5.0, "{clock}");
    assert!(clock["uncertainty_us"].as_u64().unwrap() < 1_000_000, "{clock}");
    // A starved guest's clock is some seconds late by itself: 3599.4 s is as good.
    let stdout = run.stdout();
    let told = stdout.split_once("the guest's clock is ").and_then(|(_, rest)| rest.split_once(" s behind"));
    let told_s: f64 = told.expect("no warning").0.parse().unwrap();
    assert!((told_s - 3600.0).abs() < 5.0, "{told_s} s");
    let contributing = run.json("verdict.json")["verdict"]["contributing"].to_string();
    assert!(contributing.contains("clock was off"), "{contributing}");
    let journal = std::fs::read_to_string(run.dir.join("nodes/late/journal.log")).unwrap();
    let mut lines = 0;
    for line in journal.lines() {
        let at: jiff::Timestamp = line.split(' ').next().unwrap().replace("+0000", "Z").parse().unwrap();
        assert!(began <= at && at <= ended, "not within the run: {line}");
        lines += 1;
    }
    assert!(lines > 50, "{lines} lines");
    // Nothing is lost and nothing comes twice across the death of sshd.
    let numbers: Vec<u32> = journal
        .lines()
        .filter_map(|line| line.split_once(": numbered ").map(|(_, number)| number.parse().unwrap()))
        .collect();
    assert_eq!(numbers, (1..=600).collect::<Vec<_>>());
    assert!(journal.contains(&"x".repeat(9000)), "the long line is not whole");
    // What the host saw of it is there too.
    let ssh = std::fs::read_to_string(run.dir.join("nodes/late/ssh.log")).unwrap();
    assert_eq!(ssh.matches("connected after").count(), 2, "{ssh}");
    assert!(ssh.contains("journal interrupted, taken up at its cursor"), "{ssh}");
    assert!(run.dir.join("nodes/late/qemu.log").exists());
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
