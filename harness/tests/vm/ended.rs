//! A run that is ended from outside: its QEMU killed in each phase it lives in, and the signals that ask it to end.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::lab::Bench;

/// From the death of a QEMU to the end of the run: evidence is looked for, the rest of the lab taken down.
const SOON: Duration = Duration::from_secs(15);
/// What is promised for processes after a second signal.
const GONE_WITHIN: Duration = Duration::from_secs(2);

const ONE: &str = "name: one\ndescription: one server\nprofile: simple\nsettle_ms: 2000\nnodes:\n\
                   \x20 - {name: server-1, role: server}\n";
const TWO: &str = "name: two\ndescription: two servers\nprofile: simple\nsettle_ms: 1000\nnodes:\n\
                   \x20 - {name: server-1, role: server}\n  - {name: server-2, role: server}\n";

/// Kills a QEMU as soon as the phase has begun.
fn killed_in(scenario: &str, phase: &str) {
    let bench = Bench::new();
    bench.write("scenario.yaml", scenario);
    let mut run = bench.start("./scenario.yaml");
    run.wait_for(phase, |event| {
        let started = &event["phase-started"];
        // Of boot and network, the part in the guests.
        started["phase"] == phase && (started["node"].is_string() || phase == "verify")
    });
    bench.kill_one("qemu-system-x86_64");
    let began = Instant::now();
    let (code, events) = run.finish();
    assert_eq!(code, Some(3), "{phase}: a killed QEMU is the environment's doing: {events:#?}");
    assert!(began.elapsed() < SOON, "{phase}: the run went on for {:?}", began.elapsed());
    bench.assert_clean();
    let verdict = bench.verdict();
    let failure = &verdict["failure"];
    let chain = failure["chain"][0].as_str().unwrap();
    assert!(chain.contains(": QEMU killed by signal 9"), "{phase}: {failure:#}");
    assert!(failure["node"].is_string(), "{phase}: {failure:#}");
    let seen = |node: &Value| {
        let log = bench.newest_run().join("nodes").join(node.as_str().unwrap()).join("qmp.log");
        std::fs::read_to_string(log).unwrap()
    };
    assert!(seen(&failure["node"]).contains("Z QEMU killed by signal 9"), "{phase}: not in qmp.log");
    let open = unfinished(&bench);
    assert!(open.is_empty(), "{phase}: begun and never ended: {open:?}");
    println!("{phase}: failed in {} after {:.1} s", failure["phase"], began.elapsed().as_secs_f64());
}

/// Phases that the recorded events show to have begun and not to have ended.
fn unfinished(bench: &Bench) -> Vec<String> {
    let events = std::fs::read_to_string(bench.newest_run().join("events.ndjson")).unwrap();
    let mut open = Vec::new();
    for line in events.lines() {
        let event: Value = serde_json::from_str(line).expect("a line of events.ndjson is no document");
        let place = |of: &Value| format!("{} {}", of["phase"], of["node"]);
        if event["event"]["phase-started"].is_object() {
            open.push(place(&event["event"]["phase-started"]));
        } else if event["event"]["phase-finished"].is_object() {
            let ended = place(&event["event"]["phase-finished"]);
            open.retain(|place| *place != ended);
        }
    }
    assert!(events.lines().last().unwrap().contains("run-finished"), "{events}");
    open
}

#[test]
fn a_qemu_killed_in_each_phase_ends_the_wait_and_is_named() {
    for phase in ["boot", "network", "primary", "settle"] {
        killed_in(ONE, phase);
    }
    killed_in(TWO, "join");
}

#[test]
#[ignore = "two minutes: `ci/soak` runs it"]
fn a_qemu_killed_in_the_other_phases_ends_the_wait_and_is_named() {
    for phase in ["identify", "sanitize", "verify"] {
        killed_in(ONE, phase);
    }
    killed_in(TWO, "prewarm");
}

#[test]
fn signals_once_end_in_order_and_twice_at_once() {
    let table = [
        (Signal::SIGTERM, None),
        (Signal::SIGHUP, None),
        (Signal::SIGINT, Some(Signal::SIGTERM)),
        (Signal::SIGTERM, Some(Signal::SIGHUP)),
        (Signal::SIGHUP, Some(Signal::SIGINT)),
    ];
    for (first, second) in table {
        let bench = Bench::new();
        let mut run = bench.start("simple");
        run.wait_for_phase("boot");
        run.signal(first);
        if let Some(second) = second {
            run.signal(second);
        }
        let (code, events) = run.finish();
        assert_eq!(code, Some(130), "{first} {second:?}");
        bench.assert_gone_within(GONE_WITHIN);
        let verdict = bench.verdict();
        if second.is_some() {
            assert_eq!((&verdict["exit_code"], &verdict["passed"]), (&130.into(), &false.into()));
            // Two signals of one moment may be heard in either order.
            assert!(verdict["failure"]["chain"].to_string().contains("and again by "), "{verdict:#}");
        } else {
            bench.assert_clean();
            assert_eq!(verdict["failure"]["chain"][0], format!("interrupted by {first}"));
            assert_eq!(verdict["exit_code"], 130);
            let torn_down = events.iter().any(|event| {
                let finished = &event["event"]["phase-finished"];
                finished["phase"] == "teardown" && finished["outcome"] == "ok"
            });
            assert!(torn_down, "{first}: {events:#?}");
        }
        let header = std::fs::read(bench.newest_run().join("run.json")).unwrap();
        assert!(serde_json::from_slice::<Value>(&header).is_ok(), "{first} {second:?}");
    }
}
