//! Random kills: a run ended at any moment leaves nothing, and the next one passes. `ci/soak` is the long campaign.

use std::fmt;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use harness::lab::ledger::Ledger;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::Value;

use crate::lab::Bench;

/// What is promised for processes after a SIGKILL of the harness, and after a second signal.
const GONE_WITHIN: Duration = Duration::from_secs(2);
/// Within which a run that was asked to end once has ended.
const ENDED_WITHIN: Duration = Duration::from_secs(20);
/// `smoke` but for the settle period: a moment of the run is then a moment at which something starts, changes or ends.
const SCENARIO: &str = "name: soak\ndescription: smoke with a short settle period\nprofile: simple\nsettle_ms: 1000\n\
                        nodes:\n  - {name: server-1, role: server, vcpus: auto, memory_mib: 2048}\n\
                        disable: [traefik, servicelb, metrics-server]\n";

#[test]
fn a_few_random_kills_leave_nothing() {
    let seed = u64::from(std::process::id()) ^ jiff::Timestamp::now().as_millisecond().unsigned_abs();
    Campaign { seed, kills: 3, only: None, span: None, check_every: 3, labs: Vec::new() }.run();
}

/// Its options are in the environment, as `ci/soak` puts them there.
#[test]
#[ignore = "takes half an hour: ci/soak runs it"]
fn campaign() {
    let number = |name: &str| {
        let text = std::env::var(format!("SOAK_{name}")).ok()?;
        Some(text.parse::<u64>().unwrap_or_else(|_| panic!("SOAK_{name}={text} is not a number")))
    };
    let labs = std::env::var("SOAK_LABS").unwrap_or_default();
    Campaign {
        seed: number("SEED").expect("SOAK_SEED is missing: use ci/soak"),
        kills: number("KILLS").unwrap_or(40),
        only: number("ONLY"),
        span: number("SPAN_MS").map(Duration::from_millis),
        check_every: number("CHECK_EVERY").unwrap_or(1).max(1),
        labs: labs.split(',').filter(|text| !text.is_empty()).map(|text| text.parse().unwrap()).collect(),
    }
    .run();
}

struct Campaign {
    seed: u64,
    kills: u64,
    /// The number of the one kill to repeat.
    only: Option<u64>,
    /// The time kills are spread over; that of a run that passes where it is not given.
    span: Option<Duration>,
    /// After every how many kills a run is made to its end.
    check_every: u64,
    /// How many labs are run at once, one after the other.
    labs: Vec<usize>,
}

/// One way to end a run from outside.
struct Blow {
    number: u64,
    after: Duration,
    signal: Signal,
    /// When a second signal follows the first, if one does.
    again: Option<(Duration, Signal)>,
}

impl fmt::Display for Blow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.signal)?;
        match self.again {
            Some((pause, signal)) => write!(f, ", {signal} {} ms later", pause.as_millis()),
            None => Ok(()),
        }
    }
}

/// The numbers of one blow depend on the seed and its own number alone, so that it can be repeated alone.
struct Dice(u64);

impl Dice {
    /// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % bound
    }
}

impl Blow {
    /// Six in ten are SIGKILL; of the others half get a second signal.
    fn draw(seed: u64, number: u64, span: Duration) -> Self {
        const ASKING: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];
        let mut dice = Dice(seed.wrapping_mul(0x2545_F491_4F6C_DD1D) ^ number);
        let after = span.mul_f64(dice.below(10_000) as f64 / 10_000.0);
        let kind = dice.below(10);
        let mut asking = || ASKING[dice.below(3) as usize];
        let signal = if kind < 6 { Signal::SIGKILL } else { asking() };
        let second = asking();
        let again = (kind >= 8).then(|| (Duration::from_millis(dice.below(400)), second));
        Self { number, after, signal, again }
    }
}

/// What became of one blow.
struct Outcome {
    phase: String,
    ended: String,
    gone: Duration,
    trouble: Vec<String>,
}

impl Campaign {
    fn run(&self) {
        // Whatever outlives its parent becomes this process's child, and is found however it is named.
        nix::sys::prctl::set_child_subreaper(true).unwrap();
        let ground = Ground::new();
        let mut failures = Vec::new();
        let mut fail = |what: String, repeat: String| {
            println!("  FAILED: {what}\n  repeat with: {repeat}");
            failures.push(format!("{what} ({repeat})"));
        };
        let first = ground.pass();
        let span = self.span.unwrap_or(first.elapsed);
        let span_ms = span.as_millis();
        println!("seed {}, kills spread over the {span_ms} ms of a run\n", self.seed);
        first.trouble.into_iter().for_each(|what| fail(what, format!("ci/soak --kills 0 --seed {}", self.seed)));

        println!("| {:>4} | {:>8} | {:<10} | {:<34} | {:<12} | {:>7} |", "kill", "at", "phase", "by", "ended", "gone");
        println!("|-----:|---------:|------------|------------------------------------|--------------|--------:|");
        let (mut done, mut slowest) = (0, Duration::ZERO);
        for number in (1..=self.kills).filter(|number| self.only.is_none_or(|only| only == *number)) {
            let blow = Blow::draw(self.seed, number, span);
            let outcome = ground.strike(&blow);
            println!(
                "| {:>4} | {:>5} ms | {:<10} | {:<34} | {:<12} | {:>4} ms |",
                blow.number,
                blow.after.as_millis(),
                outcome.phase,
                blow.to_string(),
                outcome.ended,
                outcome.gone.as_millis(),
            );
            (done, slowest) = (done + 1, slowest.max(outcome.gone));
            let mut trouble = outcome.trouble;
            if number % self.check_every == 0 || number == self.kills || self.only.is_some() {
                trouble.extend(ground.pass().trouble.into_iter().map(|what| format!("the next run: {what}")));
            }
            let repeat = format!("ci/soak --seed {} --span-ms {span_ms} --only {number}", self.seed);
            trouble.into_iter().for_each(|what| fail(format!("kill {number}: {what}"), repeat.clone()));
        }
        println!(
            "\n{done} kills; the last process was gone {} ms after the harness at the latest",
            slowest.as_millis()
        );
        for &labs in &self.labs {
            let repeat = format!("ci/soak --kills 0 --labs {labs} --seed {}", self.seed);
            let began = Instant::now();
            ground
                .at_once(labs)
                .into_iter()
                .for_each(|what| fail(format!("{labs} labs at once: {what}"), repeat.clone()));
            println!("{labs} labs at once: {:.1} s", began.elapsed().as_secs_f64());
        }
        assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    }
}

/// Folders of a campaign's own, and the runs in them.
struct Ground {
    bench: Bench,
    runtime: tempfile::TempDir,
}

struct Passed {
    elapsed: Duration,
    trouble: Vec<String>,
}

impl Ground {
    fn new() -> Self {
        let bench = Bench::new();
        bench.write("soak.yaml", SCENARIO);
        // A socket's path has a hundred bytes: this one is short.
        Self { bench, runtime: tempfile::Builder::new().prefix("soak").tempdir_in("/tmp").unwrap() }
    }

    fn harness(&self, args: &[&str]) -> std::process::Command {
        let mut command = self.bench.harness(args);
        command
            .env("XDG_RUNTIME_DIR", self.runtime.path())
            .env("HARNESS_LEDGER_DIR", self.runtime.path().join("ledger"));
        command
    }

    fn start(&self) -> Child {
        let args = ["run", "./soak.yaml", "--k3s", "standin", "--format", "plain"];
        self.harness(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    /// A run to its end: passed, and nothing is left.
    fn pass(&self) -> Passed {
        let began = Instant::now();
        let status = self.start().wait().unwrap();
        let elapsed = began.elapsed();
        let mut trouble = Vec::new();
        if !status.success() {
            let verdict = fs::read_to_string(self.bench.newest_run().join("verdict.json")).unwrap_or_default();
            trouble.push(format!("did not pass ({status}): {verdict}"));
        }
        trouble.extend(self.left());
        trouble.extend(self.remains());
        Passed { elapsed, trouble }
    }

    /// Runs that start together, each to its end.
    fn at_once(&self, labs: usize) -> Vec<String> {
        let mut runs: Vec<Child> = (0..labs).map(|_| self.start()).collect();
        let ended: Vec<ExitStatus> = runs.iter_mut().map(|run| run.wait().unwrap()).collect();
        let mut trouble: Vec<String> = ended
            .iter()
            .filter(|status| !status.success())
            .map(|status| format!("one did not pass ({status})"))
            .collect();
        trouble.extend(self.left());
        trouble.extend(self.remains());
        trouble
    }

    /// One run, ended by one blow; then everything that is owed.
    fn strike(&self, blow: &Blow) -> Outcome {
        let before = self.runs();
        let mut run = self.start();
        let pid = Pid::from_raw(run.id().try_into().unwrap());
        std::thread::sleep(blow.after);
        let send = |signal| nix::sys::signal::kill(pid, signal).unwrap();
        send(blow.signal);
        if let Some((pause, signal)) = blow.again {
            std::thread::sleep(pause);
            // Not waited for yet: where it has ended, its process id is still its own.
            send(signal);
        }
        let mut trouble = Vec::new();
        let struck = Instant::now();
        let at_once = blow.signal == Signal::SIGKILL || blow.again.is_some();
        let limit = if at_once { GONE_WITHIN } else { ENDED_WITHIN };
        let status = loop {
            match run.try_wait().unwrap() {
                Some(status) => break status,
                None if struck.elapsed() > limit => {
                    trouble.push(format!("still running {limit:?} after the signal"));
                    send(Signal::SIGKILL);
                    break run.wait().unwrap();
                }
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        let ended_at = Instant::now();
        while !self.survivors().is_empty() && ended_at.elapsed() < GONE_WITHIN {
            std::thread::sleep(Duration::from_millis(5));
        }
        let gone = ended_at.elapsed();
        trouble.extend(self.left());
        let dir = self.runs().into_iter().find(|dir| !before.contains(dir));
        let (phase, records) = dir.as_deref().map_or_else(|| ("none yet".to_owned(), Vec::new()), read_records);
        trouble.extend(records);
        if let Some(wrong) = wrong_end(blow, status, dir.as_deref()) {
            trouble.push(wrong);
        }
        let cleaned = self.harness(&["clean"]).output().unwrap();
        if !cleaned.status.success() {
            trouble.push(format!("harness clean: {cleaned:?}"));
        }
        trouble.extend(self.remains());
        let ended = match (status.code(), status.signal()) {
            (Some(code), _) => format!("exit {code}"),
            (None, signal) => format!("by signal {}", signal.unwrap_or_default()),
        };
        Outcome { phase, ended, gone, trouble }
    }

    fn runs(&self) -> Vec<PathBuf> {
        entries(&self.bench.path().join("state/runs"))
    }

    /// Processes of this campaign that run, whoever started them and however they are named.
    fn survivors(&self) -> Vec<String> {
        let marks = [self.bench.path(), self.runtime.path()].map(|path| path.to_str().unwrap().to_owned());
        let me = std::process::id().to_string();
        let mut found = Vec::new();
        for process in entries(Path::new("/proc")) {
            let Ok(stat) = fs::read_to_string(process.join("stat")) else { continue };
            // After the name in parentheses: state, parent.
            let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
            let (state, parent) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
            let text = |name: &str| {
                let raw = fs::read(process.join(name)).unwrap_or_default();
                String::from_utf8_lossy(&raw).replace('\0', " ")
            };
            let (command, environment) = (text("cmdline"), text("environ"));
            let ours = marks.iter().any(|mark| command.contains(mark) || environment.contains(mark));
            if !matches!(state, "Z" | "X") && (ours || parent == me) {
                found.push(format!("{} {command}", process.file_name().unwrap_or_default().display()));
            }
        }
        found
    }

    fn left(&self) -> Option<String> {
        let survivors = self.survivors();
        (!survivors.is_empty()).then(|| format!("processes are left: {survivors:#?}"))
    }

    /// Folders, sockets and claims that should not be there any more.
    fn remains(&self) -> Vec<String> {
        let mut left = entries(&self.bench.path().join("state/labs"));
        left.extend(entries(&self.runtime.path().join("harness")));
        let mut trouble: Vec<String> = left.iter().map(|path| format!("{} is left", path.display())).collect();
        let ledger = Ledger::at(camino::Utf8Path::from_path(&self.runtime.path().join("ledger")).unwrap());
        trouble.extend(ledger.living().unwrap().iter().map(|claim| format!("in the ledger, {claim} still lives")));
        trouble
    }
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).map(|dir| dir.filter_map(|entry| Some(entry.ok()?.path())).collect()).unwrap_or_default()
}

/// The phase a run had come to by its records when it was hit, and what of them cannot be read.
fn read_records(dir: &Path) -> (String, Vec<String>) {
    let (mut phase, mut hit, mut trouble) = ("start".to_owned(), false, Vec::new());
    for file in entries(dir).into_iter().filter(|path| path.extension().is_some_and(|ext| ext == "json")) {
        if let Err(error) = serde_json::from_slice::<Value>(&fs::read(&file).unwrap()) {
            trouble.push(format!("{} is no JSON: {error}", file.display()));
        }
    }
    if !dir.join("run.json").exists() {
        trouble.push(format!("{} has no run.json", dir.display()));
    }
    for line in fs::read_to_string(dir.join("events.ndjson")).unwrap_or_default().lines() {
        match serde_json::from_str::<Value>(line) {
            // What follows an interruption is the run's orderly end.
            Ok(_) if hit => {}
            Ok(event) => {
                let [started, finished] = ["phase-started", "phase-finished"].map(|kind| &event["event"][kind]);
                hit = finished["outcome"] == "interrupted";
                if let Some(of) = started["phase"].as_str().or(finished["phase"].as_str().filter(|_| hit)) {
                    phase = of.to_owned();
                } else if event["event"]["run-finished"].is_object() {
                    phase = "over".to_owned();
                }
            }
            Err(error) => trouble.push(format!("a line of events.ndjson is no JSON: {error}: {line}")),
        }
    }
    (phase, trouble)
}

/// What is wrong with how a run ended that was asked to: 130 is due, with a verdict after one signal.
fn wrong_end(blow: &Blow, status: ExitStatus, dir: Option<&Path>) -> Option<String> {
    if blow.signal == Signal::SIGKILL {
        return None;
    }
    let events = dir.map(|dir| fs::read_to_string(dir.join("events.ndjson")).unwrap_or_default()).unwrap_or_default();
    let listening = events.contains("run-started");
    let over = events.contains("run-finished");
    let verdict = dir.is_some_and(|dir| dir.join("verdict.json").exists());
    match (status.code(), status.signal()) {
        (Some(130), _) if blow.again.is_some() || verdict => None,
        (Some(130), _) => Some("exit 130 without a verdict".to_owned()),
        (Some(0), _) if over && verdict => None,
        // Before it listens, a signal ends it as it ends any program.
        (None, Some(_)) if !listening => None,
        // After the last event it closes its records, and a signal may cut that short.
        (None, Some(_)) if over && verdict => None,
        _ => {
            Some(format!("ended {status}, and had {} signals", if listening { "listened to" } else { "not heard of" }))
        }
    }
}
