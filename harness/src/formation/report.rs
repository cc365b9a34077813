//! How a run ended, for `verdict.json` and for the one short summary a person gets.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use verdict::{Classifier, UnitRestarts, Verdict};

use crate::error::CommandError;
use crate::event::PhaseOutcome;
use crate::exit::Blame;
use crate::failure::Failure;
use crate::formation::context::PhaseRecord;
use crate::lab::evidence::{attribution_of, blame_of};
use crate::lab::sampler::HostSeen;
use crate::plan::{Phase, Plan};
use crate::record::{RunDir, RunHeader};
use crate::reporter::human_ms;
use crate::scenario::Outcome;

/// Version of `verdict.json`.
pub const SCHEMA_VERSION: u32 = 1;

/// A run that is over and taken down, not yet judged.
pub struct Ended {
    /// The first thing that went wrong.
    pub failure: Option<Failure>,
    /// What would not go.
    pub leftovers: Vec<String>,
    /// Restarts of units.
    pub restarts: Vec<UnitRestarts>,
    /// What was seen of the host meanwhile.
    pub host: HostSeen,
    /// Has seen all evidence.
    pub classifier: Classifier,
    /// The phases.
    pub phases: Vec<PhaseRecord>,
    /// The plan.
    pub plan: Plan,
    /// The run folder.
    pub record: RunDir,
}

/// `verdict.json`.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
pub struct RunReport {
    /// Version of this document's form.
    pub schema_version: u32,
    /// The run's id.
    pub run: String,
    /// The scenario.
    pub scenario: String,
    /// Which k3s was under test, in words that say whether it was real k3s.
    pub k3s: String,
    /// Whether the run passed, an expected failure included.
    pub passed: bool,
    /// Whether a failure was expected.
    pub failure_expected: bool,
    /// The exit code of the process.
    pub exit_code: u8,
    /// Who is to blame where the run did not pass.
    pub blame: Option<Blame>,
    /// The first thing that went wrong.
    pub failure: Option<Failure>,
    /// The classifier's verdict over all evidence.
    pub verdict: Verdict,
    /// What else the classifier was told: the host, the restarts.
    pub context: verdict::Context,
    /// Restarts of units, also of a run that passed.
    pub restarts: Vec<UnitRestarts>,
    /// What would not go at teardown; a bug.
    pub leftovers: Vec<String>,
    /// The phases with their times.
    pub phases: Vec<PhaseRecord>,
    /// How long the run took.
    pub elapsed_ms: u64,
    /// Folder of the records.
    pub run_dir: String,
}

impl RunReport {
    /// Judges a run.
    #[must_use]
    pub fn judge(ended: &Ended, run: &str, elapsed_ms: u64) -> Self {
        let plan = &ended.plan;
        let failure_expected = plan.expect.outcome == Outcome::Failure;
        let context = context(ended);
        let verdict = ended.classifier.conclude(&context);
        let blame = judge_blame(ended, &verdict);
        let passed = blame.is_none();
        Self {
            schema_version: SCHEMA_VERSION,
            run: run.to_owned(),
            scenario: plan.scenario.clone(),
            k3s: plan.k3s.clone(),
            passed,
            failure_expected,
            exit_code: blame.map_or(0, Blame::exit_code),
            blame,
            failure: ended.failure.clone(),
            verdict,
            context,
            restarts: ended.restarts.clone(),
            leftovers: ended.leftovers.clone(),
            phases: ended.phases.clone(),
            elapsed_ms,
            run_dir: ended.record.path().to_string(),
        }
    }

    /// The report of a run that ended before it had a plan.
    #[must_use]
    pub fn before_plan(
        header: &RunHeader,
        error: &CommandError,
        run_dir: &str,
        classifier: &Classifier,
        elapsed_ms: u64,
    ) -> Self {
        let failure = Failure {
            blame: error.blame,
            phase: Some(Phase::Preflight),
            node: None,
            chain: error.chain.clone(),
            hint: error.hint.clone(),
            timed_out: false,
        };
        let context = verdict::Context {
            health: verdict::Health::Failed,
            phase: failure.phase,
            blame: attribution_of(failure.blame),
            errors: failure.chain.clone(),
            ..verdict::Context::default()
        };
        Self {
            schema_version: SCHEMA_VERSION,
            run: header.run.clone(),
            scenario: header.scenario.clone(),
            k3s: header.k3s.clone(),
            passed: false,
            failure_expected: false,
            exit_code: error.blame.exit_code(),
            blame: Some(error.blame),
            failure: Some(failure),
            verdict: classifier.conclude(&context),
            context,
            restarts: Vec::new(),
            leftovers: Vec::new(),
            phases: Vec::new(),
            elapsed_ms,
            run_dir: run_dir.to_owned(),
        }
    }

    /// The report of a run that was told twice to end: nothing was collected and nothing is judged.
    #[must_use]
    pub fn ended_at_once(
        header: &RunHeader,
        (first, second): (&str, &str),
        run_dir: &str,
        classifier: &Classifier,
        elapsed_ms: u64,
    ) -> Self {
        let chain = vec![
            format!("interrupted by {first}"),
            format!("and again by {second}: ended at once, nothing was collected"),
        ];
        let error = CommandError { blame: Blame::Interrupted, chain, hint: None };
        let mut report = Self::before_plan(header, &error, run_dir, classifier, elapsed_ms);
        // Which phase it was is in the events.
        report.context.phase = None;
        report.verdict.phase = None;
        if let Some(failure) = &mut report.failure {
            failure.phase = None;
        }
        report
    }

    /// One line.
    #[must_use]
    pub fn headline(&self) -> String {
        let time = human_ms(self.elapsed_ms);
        match (self.passed, &self.failure) {
            (true, None) => format!("PASS {} in {time}", self.scenario),
            (true, Some(_)) => format!("PASS {} in {time}: it failed as the scenario expects", self.scenario),
            (false, None) if self.failure_expected && self.leftovers.is_empty() => {
                format!("FAIL {} in {time}: it passed where the scenario expects a failure", self.scenario)
            }
            (false, Some(failure)) if failure.blame == Blame::Interrupted => {
                format!("INTERRUPTED {} after {time}", self.scenario)
            }
            (false, _) => {
                let blame = self.blame.map_or("", Blame::as_str);
                format!("FAIL {} in {time}: to blame is the {blame}", self.scenario)
            }
        }
    }

    /// The summary a run ends with: verdict, time per phase, where the records are.
    #[must_use]
    pub fn render(&self) -> String {
        let mut out = format!("\n{}\n  k3s: {}\n", self.headline(), self.k3s);
        if self.failure_expected && !self.passed {
            let _ = writeln!(out, "  the scenario expects a failure, but not this one");
        }
        if let Some(failure) = &self.failure {
            let place = match (failure.phase, &failure.node) {
                (Some(phase), Some(node)) => format!(" in {phase} on {node}"),
                (Some(phase), None) => format!(" in {phase}"),
                (None, Some(node)) => format!(" on {node}"),
                (None, None) => String::new(),
            };
            let _ = writeln!(out, "  failed{place}: {}", first_line(failure.chain.first()));
            for cause in failure.chain.iter().skip(1).take(8) {
                for (n, line) in cause.lines().take(12).enumerate() {
                    let _ = writeln!(out, "  {} {line}", if n == 0 { "  because:" } else { "          " });
                }
            }
            if let Some(hint) = &failure.hint {
                let _ = writeln!(out, "  hint: {hint}");
            }
        }
        let known = self.verdict.id.is_some() || self.verdict.look_alike.is_some();
        let failed = self.failure.as_ref().is_some_and(|failure| failure.blame != Blame::Interrupted);
        if failed && known {
            for line in self.verdict.to_string().lines() {
                let _ = writeln!(out, "  {line}");
            }
        } else {
            if failed {
                let _ = writeln!(out, "  no known failure mode: {}", self.verdict.reason);
            }
            for line in self.verdict.evidence.iter().filter(|_| failed).take(3) {
                let node = line.node.as_deref().unwrap_or("?");
                let _ = writeln!(out, "  worth reading: {node} {}: {}", line.origin, line.text);
            }
            for factor in &self.verdict.contributing {
                let id = factor.id.as_deref().map_or_else(String::new, |id| format!("{id} "));
                let _ = writeln!(out, "  noticed: {id}{}", factor.text);
            }
        }
        for restart in &self.restarts {
            let _ = writeln!(
                out,
                "  restarts: {} on {} was started again {} times by systemd",
                restart.unit, restart.node, restart.restarts
            );
        }
        for leftover in &self.leftovers {
            let _ = writeln!(out, "  left behind: {leftover}");
        }
        let _ = writeln!(out, "  {}", self.times());
        let _ = writeln!(out, "  records: {}", self.run_dir);
        out
    }

    /// `time per phase: boot 21.0 s, …`: the longest part where a phase ran on several nodes at once.
    fn times(&self) -> String {
        let mut parts: Vec<(Phase, u64)> = Vec::new();
        for record in self.phases.iter().filter(|record| record.outcome != PhaseOutcome::Skipped) {
            let at_once = matches!(record.phase, Phase::Boot | Phase::Identify | Phase::Sanitize);
            match parts.iter_mut().find(|(phase, _)| *phase == record.phase) {
                Some((_, ms)) if at_once => *ms = record.elapsed_ms.max(*ms),
                Some((_, ms)) => *ms += record.elapsed_ms,
                None => parts.push((record.phase, record.elapsed_ms)),
            }
        }
        let parts = parts.iter().map(|(phase, ms)| format!("{phase} {}", human_ms(*ms))).collect::<Vec<_>>();
        format!("time per phase: {}", parts.join(", "))
    }
}

fn first_line(text: Option<&String>) -> &str {
    text.and_then(|text| text.lines().next()).unwrap_or_default()
}

/// Who is to blame, `None` where the run passed.
fn judge_blame(ended: &Ended, verdict: &Verdict) -> Option<Blame> {
    let expected = &ended.plan.expect;
    match &ended.failure {
        Some(failure) if failure.blame == Blame::Interrupted => Some(Blame::Interrupted),
        // A process that outlives the run is the harness's fault, whatever else the run was.
        _ if !ended.leftovers.is_empty() => Some(Blame::Harness),
        None if expected.outcome == Outcome::Failure => Some(Blame::Product),
        None => None,
        Some(failure) => {
            // The verdict was told what the step points to, and has weighed it.
            let blame = verdict.attribution.map_or(failure.blame, blame_of);
            let expected_here = expected.outcome == Outcome::Failure
                && expected.phase.is_none_or(|phase| failure.phase == Some(phase))
                // A switch that dies or a starved host is never what a scenario expects.
                && matches!(blame, Blame::Product | Blame::Usage);
            (!expected_here).then_some(blame)
        }
    }
}

fn context(ended: &Ended) -> verdict::Context {
    let plan = &ended.plan;
    let failure = ended.failure.as_ref();
    verdict::Context {
        health: if failure.is_some() { verdict::Health::Failed } else { verdict::Health::Passed },
        phase: failure.and_then(|failure| failure.phase),
        node: failure.and_then(|failure| failure.node.clone()),
        blame: failure.and_then(|failure| attribution_of(failure.blame)),
        errors: failure.map_or_else(Vec::new, |failure| failure.chain.clone()),
        host: Some(verdict::HostFacts {
            cores: Some(plan.host.cores),
            vcpus_asked: Some(plan.oversubscription.vcpus),
            cpu_pressure_some_avg10: ended.host.cpu_pressure_some_avg10,
            load_1m: ended.host.load_1m,
            memory_available_mib: ended.host.memory_available_mib.or(Some(plan.host.memory_available_mib)),
            accel: Some(plan.host.accel.to_string()),
        }),
        vms: ended.host.vms.clone(),
        restarts: ended.restarts.clone(),
    }
}
