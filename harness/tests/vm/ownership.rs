//! Nothing survives the harness: not after Ctrl-C, not after SIGKILL.

use std::time::Duration;

use nix::sys::signal::Signal;

use crate::lab::Bench;

/// What is promised for processes after a SIGKILL of the harness.
const GONE_WITHIN: Duration = Duration::from_secs(2);

#[test]
fn sigkill_at_five_points_leaves_no_process() {
    for phase in ["network", "boot", "sanitize", "primary", "settle"] {
        let bench = Bench::new();
        let mut run = bench.start("smoke");
        run.wait_for_phase(phase);
        run.signal(Signal::SIGKILL);
        bench.assert_gone_within(GONE_WITHIN);
        drop(run);
        let cleaned = bench.harness(&["clean"]).output().unwrap();
        assert!(
            String::from_utf8_lossy(&cleaned.stdout).contains("removed the folders of lab"),
            "{phase}: {cleaned:?}"
        );
        bench.assert_clean();
        assert!(bench.newest_run().join("run.json").exists(), "{phase}: the records are unreadable");
    }
}

#[test]
fn ctrl_c_once_tears_down_in_order() {
    let bench = Bench::new();
    let mut run = bench.start("simple");
    run.wait_for_phase("boot");
    run.signal(Signal::SIGINT);
    let (code, events) = run.finish();
    assert_eq!(code, Some(130));
    bench.assert_clean();
    let torn_down = events.iter().any(|event| {
        event["event"]["phase-finished"]["phase"] == "teardown" && event["event"]["phase-finished"]["outcome"] == "ok"
    });
    assert!(torn_down, "{events:#?}");
    let verdict = std::fs::read_to_string(bench.newest_run().join("verdict.json")).unwrap();
    assert!(verdict.contains("interrupted by SIGINT"), "{verdict}");
}

#[test]
fn a_switch_killed_from_outside_ends_the_wait_and_is_named() {
    let bench = Bench::new();
    let mut run = bench.start("smoke");
    run.wait_for_phase("boot");
    bench.kill_one("vde_switch");
    let (code, _) = run.finish();
    assert_eq!(code, Some(3));
    bench.assert_clean();
    let verdict = std::fs::read_to_string(bench.newest_run().join("verdict.json")).unwrap();
    assert!(verdict.contains("vde_switch killed by signal 9"), "{verdict}");
    let vde = std::fs::read_to_string(bench.newest_run().join("vde.log")).unwrap();
    assert!(vde.contains("vde_switch killed by signal 9"), "{vde}");
}
