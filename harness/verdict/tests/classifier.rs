//! The classifier while a run goes on, and what it says at the end.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so")]

mod common;

use jiff::{SignedDuration, Timestamp};
use verdict::{
    Attribution, Classifier, Confidence, Context, Evidence, Fatal, Health, HostFacts, Outcome, Phase, Source,
    UnitRestarts, Verdict, VmFacts,
};

const PANIC: &str = "panic: bootstrap data already found and encrypted with different token";
const LEADER_LOST: &str = r#"{"level":"info","ts":"2026-11-21T02:44:00.123456Z","logger":"raft","caller":"etcdserver/zap_raft.go:77","msg":"raft.node: 8e9e05c52164694d lost leader 91bc3c398fb3c146 at term 4"}"#;
const EXIT: &str = "k3s-server.service: Main process exited, code=exited, status=255/EXCEPTION";
const UP: &str = r#"time="2026-11-21T02:44:30Z" level=info msg="k3s is up and running""#;
const NO_ROUTE: &str = r#"time="2026-11-21T02:44:00Z" level=fatal msg="starting kubernetes: preparing server: failed to get CA certs: Get \"https://192.168.200.1:6443/cacerts\": dial tcp 192.168.200.1:6443: connect: no route to host""#;

struct Run {
    classifier: Classifier,
    start: Timestamp,
}

impl Run {
    fn new() -> Self {
        Self { classifier: Classifier::new(&common::catalogue()), start: "2026-11-21T02:44:00Z".parse().unwrap() }
    }

    fn at(&self, second: i64) -> Timestamp {
        self.start + SignedDuration::from_secs(second)
    }

    fn say(&mut self, second: i64, node: &str, text: &str) -> Option<Fatal> {
        let at = self.at(second);
        self.classifier.observe(&Evidence::new(Some(node), Source::journal(), Some(at), text))
    }

    fn failed(&self) -> Verdict {
        self.classifier.conclude(&Context { health: Health::Failed, ..Context::default() })
    }
}

fn id(verdict: &Verdict) -> Option<&str> {
    verdict.id.as_deref()
}

#[test]
fn a_fatal_line_ends_the_wait_at_once_and_once() {
    let mut run = Run::new();
    let fatal = run.say(0, "server-2", PANIC).unwrap();
    assert_eq!((fatal.id.as_deref(), fatal.node.as_deref()), (Some("FM-2"), Some("server-2")));
    assert_eq!(fatal.evidence.len(), 1);
    assert!(run.say(5, "server-2", PANIC).is_none(), "said once, not after every restart");
}

#[test]
fn lines_that_count_from_boot_are_placed_by_the_boot_where_it_is_known() {
    let console = "[   12.500000] Kernel panic - not syncing: VFS: Unable to mount root fs\n";
    let at = |booted_at: Option<Timestamp>| {
        let mut run = Run::new();
        run.classifier.booted_at(booted_at);
        verdict::diagnose_reader("nodes/server-1/console.log", console.as_bytes(), &mut run.classifier).unwrap();
        run.failed().evidence[0].at.unwrap().to_string()
    };
    assert_eq!(at(None), "1970-01-01T00:00:12.5Z");
    assert_eq!(at(Some("2026-11-21T02:44:00Z".parse().unwrap())), "2026-11-21T02:44:12.5Z");
}

#[test]
fn what_may_recover_does_not_end_the_wait_before_its_allowance() {
    let mut run = Run::new();
    assert!(run.say(0, "server-1", LEADER_LOST).is_none());
    assert!(run.say(3, "server-1", EXIT).is_none());
    assert_eq!(run.classifier.pending().len(), 1);
    assert!(run.classifier.poll(run.at(40)).is_none());
    let fatal = run.classifier.poll(run.at(65)).unwrap();
    assert_eq!(fatal.id.as_deref(), Some("FM-1"));
    assert!(run.classifier.poll(run.at(66)).is_none(), "reported once");
}

#[test]
fn recovery_ends_the_allowance() {
    let mut run = Run::new();
    run.say(0, "server-1", LEADER_LOST);
    run.say(3, "server-1", EXIT);
    run.say(20, "server-1", UP);
    assert!(run.classifier.pending().is_empty());
    assert!(run.classifier.poll(run.at(600)).is_none());
    // The same again starts a new allowance.
    run.say(700, "server-1", LEADER_LOST);
    run.say(701, "server-1", EXIT);
    assert!(run.classifier.poll(run.at(765)).is_some());
}

#[test]
fn a_slow_guest_gets_more_time() {
    let mut run = Run::new();
    run.classifier = run.classifier.with_slowdown(3.0);
    run.say(0, "server-1", LEADER_LOST);
    run.say(3, "server-1", EXIT);
    assert!(run.classifier.poll(run.at(150)).is_none());
    assert!(run.classifier.poll(run.at(190)).is_some());
}

#[test]
fn silence_is_polled_and_lines_of_other_nodes_move_the_clock() {
    let mut run = Run::new();
    run.say(0, "server-2", NO_ROUTE);
    let fatal = run.say(90, "server-1", "nothing of interest").unwrap();
    assert_eq!(
        (fatal.id, fatal.name.as_str()),
        (None, "network configuration (a VLAN or bond does not carry the traffic)")
    );
}

#[test]
fn the_cause_wins_over_its_consequences_on_another_node() {
    let mut run = Run::new();
    run.say(0, "server-2", PANIC);
    run.say(30, "server-1", LEADER_LOST);
    run.say(33, "server-1", EXIT);
    let verdict = run.failed();
    assert_eq!((id(&verdict), verdict.node.as_deref()), (Some("FM-2"), Some("server-2")));
    assert!(verdict.consequences.iter().any(|c| c.starts_with("FM-1")), "{:?}", verdict.consequences);
}

#[test]
fn what_came_long_before_the_supposed_cause_is_the_cause() {
    let mut run = Run::new();
    run.say(0, "server-1", LEADER_LOST);
    run.say(3, "server-1", EXIT);
    run.say(900, "server-2", PANIC);
    assert_eq!(id(&run.failed()), Some("FM-1"));
}

#[test]
fn a_missing_vlan_explains_the_failed_fetch() {
    let mut run = Run::new();
    run.say(0, "server-2", &NO_ROUTE.replace("connect: no route to host", "i/o timeout"));
    run.say(9, "server-2", NO_ROUTE);
    let verdict = run.failed();
    assert_eq!(id(&verdict), None);
    assert_eq!(verdict.look_alike.unwrap().id, "NET-VLAN");
    assert_eq!(verdict.attribution, Some(Attribution::Configuration));
}

#[test]
fn the_hosts_figures_decide_who_is_to_blame() {
    let mut run = Run::new();
    run.say(0, "server-1", r#"I1121 02:43:59.900000     532 leaderelection.go:278] failed to renew lease kube-system/kube-scheduler: timed out waiting for the condition"#);
    run.say(1, "server-1", "F1121 02:44:00.872970       1 server.go:205] leaderelection lost");
    run.say(2, "server-1", EXIT);
    let context = |wait: f64, pressure: f64| Context {
        health: Health::Failed,
        phase: Some(Phase::Join),
        host: Some(HostFacts { cores: Some(2), cpu_pressure_some_avg10: Some(pressure), ..HostFacts::default() }),
        vms: vec![VmFacts { name: "server-1".into(), vcpus: 8, cpu_wait_pct: Some(wait), cpu_got_pct: None }],
        restarts: vec![UnitRestarts { node: "server-1".into(), unit: "k3s-server.service".into(), restarts: 2 }],
        ..Context::default()
    };
    let busy = run.classifier.conclude(&context(61.0, 80.0));
    assert_eq!(
        (id(&busy), busy.confidence, busy.attribution),
        (Some("FM-1"), Confidence::High, Some(Attribution::Environment))
    );
    let factor = busy.contributing.iter().find(|c| c.id.as_deref() == Some("FM-5")).unwrap();
    assert_eq!(factor.ratio, Some(4.0));
    assert!(busy.contributing.iter().any(|c| c.text.contains("restarted 2 times")));
    let idle = run.classifier.conclude(&context(0.4, 1.0));
    assert_eq!(
        (id(&idle), idle.confidence, idle.attribution),
        (Some("FM-1"), Confidence::Medium, Some(Attribution::Product))
    );
    assert!(idle.reason.contains("not short of CPU"), "{}", idle.reason);
}

#[test]
fn a_guess_neither_accuses_nor_clears_anybody() {
    let timeouts = |context: Context| {
        let mut run = Run::new();
        for second in 0..6 {
            run.say(second * 5, "server-1", "etcdserver: publish error: etcdserver: request timed out");
        }
        let verdict = run.classifier.conclude(&Context { health: Health::Failed, ..context });
        assert_eq!((id(&verdict), verdict.confidence), (Some("FM-1"), Confidence::Low), "{verdict}");
        (verdict.attribution, verdict.reason.contains("too unsure to say who is to blame"))
    };
    let calm = HostFacts { cpu_pressure_some_avg10: Some(1.0), ..HostFacts::default() };
    let on_a_calm_host = |blame| timeouts(Context { host: Some(calm.clone()), blame, ..Context::default() });
    assert_eq!(on_a_calm_host(None), (Some(Attribution::Product), false));
    assert_eq!(on_a_calm_host(Some(Attribution::Environment)), (Some(Attribution::Environment), true));
    let step = |blame| timeouts(Context { blame: Some(blame), ..Context::default() });
    assert_eq!(step(Attribution::Product), (Some(Attribution::Product), true));
    assert_eq!(step(Attribution::Environment), (Some(Attribution::Environment), false), "they agree");

    let mut run = Run::new();
    run.say(0, "server-2", NO_ROUTE);
    let known =
        |blame| run.classifier.conclude(&Context { health: Health::Failed, blame: Some(blame), ..Context::default() });
    assert_eq!(
        known(Attribution::Product).attribution,
        Some(Attribution::Configuration),
        "evidence beats a step's guess"
    );
    assert_eq!(known(Attribution::Harness).attribution, Some(Attribution::Harness), "but for its own faults");
}

#[test]
fn a_run_that_passed_has_no_id_whatever_was_seen() {
    let mut run = Run::new();
    run.say(0, "server-1", LEADER_LOST);
    run.say(3, "server-1", EXIT);
    run.say(20, "server-1", UP);
    let host = HostFacts { cores: Some(2), vcpus_asked: Some(16), ..HostFacts::default() };
    let verdict = run.classifier.conclude(&Context { health: Health::Passed, host: Some(host), ..Context::default() });
    assert_eq!((verdict.outcome, id(&verdict)), (Outcome::Passed, None));
    assert_eq!(verdict.contributing[0].id.as_deref(), Some("FM-5"));
    assert!(verdict.consequences[0].contains("FM-1"), "{:?}", verdict.consequences);
}

#[test]
fn the_harness_errors_are_evidence_too() {
    let run = Run::new();
    let verdict = run.classifier.conclude(&Context {
        health: Health::Failed,
        phase: Some(Phase::Identify),
        node: Some("server-2".into()),
        errors: vec![r#"identify: server-2: hostname is "server-1", plan says "server-2""#.into()],
        ..Context::default()
    });
    assert_eq!((id(&verdict), verdict.node.as_deref()), (Some("FM-3"), Some("server-2")));
    let prewarm = |why: &str| {
        run.classifier.conclude(&Context {
            health: Health::Failed,
            phase: Some(Phase::Prewarm),
            node: Some("server-2".into()),
            errors: vec![
                "server-2 does not get TCP and TLS to https://192.168.200.1:6443/cacerts in 3 attempts".into(),
                why.into(),
            ],
            ..Context::default()
        })
    };
    let no_route = prewarm(
        "Failed to connect to 192.168.200.1 port 6443 after 3066 ms: Couldn't connect to server: No route to host",
    );
    assert_eq!(no_route.look_alike.map(|l| l.id).as_deref(), Some("NET-VLAN"));
    assert_eq!(id(&prewarm("Connection timed out after 15001 milliseconds")), Some("FM-4"));
    let refused = prewarm(
        "Failed to connect to 192.168.200.1 port 6443 after 1 ms: Couldn't connect to server: Connection refused",
    );
    assert_eq!(id(&refused), None);
    let unknown = run.classifier.conclude(&Context {
        health: Health::Failed,
        errors: vec!["boot of server-1 did not finish in 300 s".into()],
        ..Context::default()
    });
    assert_eq!((unknown.outcome, id(&unknown)), (Outcome::Failed, None));
    assert!(unknown.summary.contains("boot of server-1"), "{}", unknown.summary);
}

#[test]
fn verdicts_survive_json_and_hold_no_tokens() {
    let mut run = Run::new();
    let token = format!("K10{}::server:53c9e67a622ef81491bd70196aafc222", "a1".repeat(32));
    run.say(0, "server-2", &format!("time=\"2026-11-21T02:44:00Z\" level=fatal msg=\"{token}: bootstrap data already found and encrypted with different token\""));
    let verdict = run.failed();
    let json = serde_json::to_string(&verdict).unwrap();
    assert!(!json.contains("53c9e67a") && !json.contains("a1a1a1a1"), "{json}");
    assert_eq!(serde_json::from_str::<Verdict>(&json).unwrap(), verdict);
}

#[test]
fn the_same_evidence_gives_the_same_verdict() {
    let once = || {
        let mut run = Run::new();
        run.say(0, "server-2", PANIC);
        run.say(30, "server-1", LEADER_LOST);
        run.say(33, "server-1", EXIT);
        run.failed()
    };
    assert_eq!(once(), once());
}
