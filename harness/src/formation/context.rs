//! What every phase is given: the plan, the guard, the sink, and the one way to run a phase.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::NO_SPACE_HINT;
use crate::event::{EventKind, EventSink, PhaseOutcome};
use crate::exit::Blame;
use crate::failure::Failure;
use crate::formation::preflight::DISK_MIB_PER_NODE;
use crate::lab::Guard;
use crate::lab::ledger::Ticket;
use crate::plan::{NodePlan, Phase, Plan};
use crate::record::RunDir;

/// How one phase, or one node's part of it, went.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
pub struct PhaseRecord {
    /// The phase.
    pub phase: Phase,
    /// The node, where the phase runs per node.
    pub node: Option<String>,
    /// How it ended.
    pub outcome: PhaseOutcome,
    /// How long it took.
    pub elapsed_ms: u64,
    /// How many attempts it took.
    pub attempts: u32,
    /// The outcome in words.
    pub note: String,
}

/// What a phase hands back: a value for the phases after it, a note for people, and how often it tried.
#[derive(Debug)]
pub struct Done<T> {
    value: T,
    note: String,
    attempts: u32,
}

impl<T> Done<T> {
    /// Done at the first attempt.
    pub fn new(value: T, note: impl Into<String>) -> Self {
        Self { value, note: note.into(), attempts: 1 }
    }

    /// Done after some attempts.
    #[must_use]
    pub fn after(mut self, attempts: u32) -> Self {
        self.attempts = attempts;
        self
    }
}

/// The surroundings of a run's phases.
pub struct Context {
    /// The plan.
    pub plan: Plan,
    /// Where events go.
    pub sink: EventSink,
    /// Races every wait.
    pub guard: Guard,
    /// The run folder.
    pub record: RunDir,
    /// Factor on the time limits of single commands in a guest: how much slower than the reference it is.
    pub slowdown: f64,
    /// The lab's claim on this machine, held until everything is taken down.
    pub ticket: Option<Ticket>,
    records: Mutex<Vec<PhaseRecord>>,
    last_seen: Mutex<BTreeMap<Place, String>>,
}

/// A phase, or one node's part of it.
type Place = (Phase, Option<String>);

impl Context {
    /// Surroundings for a plan.
    #[must_use]
    pub fn new(plan: Plan, sink: EventSink, guard: Guard, record: RunDir) -> Self {
        let slowdown = plan.host.slowdown.clamp(1.0, 20.0);
        Self {
            plan,
            sink,
            guard,
            record,
            slowdown,
            ticket: None,
            records: Mutex::new(Vec::new()),
            last_seen: Mutex::new(BTreeMap::new()),
        }
    }

    /// The first server.
    ///
    /// # Errors
    /// A bug in the harness: a plan without nodes is refused long before.
    pub fn first_server(&self) -> Result<&NodePlan, Failure> {
        self.plan.nodes.first().ok_or_else(|| Failure::new(Blame::Harness, "the plan has no nodes"))
    }

    /// The deadline of a phase.
    #[must_use]
    pub fn deadline(&self, phase: Phase) -> Duration {
        let ms = self
            .plan
            .phases
            .iter()
            .find(|planned| planned.phase == phase)
            .map_or(60_000, |planned| planned.deadline_ms);
        Duration::from_millis(ms)
    }

    /// A limit for one command in a guest, scaled by the host's speed.
    #[must_use]
    pub fn limit(&self, on_reference: Duration) -> Duration {
        on_reference.mul_f64(self.slowdown)
    }

    /// Runs a phase, or a node's part of one: announces it, races it against the alarm and its deadline, and
    /// records how it went.
    ///
    /// # Errors
    /// Whatever ended it, with the phase (and node) named.
    pub async fn phase<T>(
        &self,
        phase: Phase,
        node: Option<&str>,
        waits_for: impl Into<String>,
        work: impl Future<Output = Result<Done<T>, Failure>>,
    ) -> Result<T, Failure> {
        let deadline = self.deadline(phase);
        let waits_for = waits_for.into();
        self.sink.emit(EventKind::PhaseStarted {
            phase,
            node: node.map(str::to_owned),
            deadline_ms: millis(deadline),
            waits_for: waits_for.clone(),
        });
        let began = Instant::now();
        let mut open = OpenPhase { cx: self, phase, node, began, closed: false };
        let result = self.guard.race(&waits_for, deadline, work).await;
        open.closed = true;
        let result = result.map_err(|failure| {
            let failure = self.with_figures(self.judge_deadline(failure.in_phase(phase), node));
            match node {
                Some(node) => failure.on(node),
                None => failure,
            }
        });
        match &result {
            Ok(done) => self.close(phase, node, PhaseOutcome::Ok, began.elapsed(), done.attempts, done.note.clone()),
            Err(failure) => {
                let interrupted = failure.blame == Blame::Interrupted;
                let outcome = if interrupted { PhaseOutcome::Interrupted } else { PhaseOutcome::Failed };
                self.close(phase, node, outcome, began.elapsed(), 1, failure.one_line());
            }
        }
        result.map(|done| done.value)
    }

    /// Says what a phase sees on its way; what it saw last explains a deadline that passes.
    pub fn progress(&self, phase: Phase, node: Option<&str>, message: impl Into<String>) {
        let message = message.into();
        self.sink.progress(phase, node, message.clone());
        let place = (phase, node.map(str::to_owned));
        self.last_seen.lock().unwrap_or_else(PoisonError::into_inner).insert(place, message);
    }

    /// A deadline that passed names what was last seen. Where k3s had answered by then and would not come good, that
    /// is the product's failure, unless the evidence knows better.
    fn judge_deadline(&self, mut failure: Failure, node: Option<&str>) -> Failure {
        let Some(phase) = failure.phase.filter(|_| failure.timed_out) else { return failure };
        let place = (phase, node.map(str::to_owned));
        let last = self.last_seen.lock().unwrap_or_else(PoisonError::into_inner).get(&place).cloned();
        let Some(last) = last else { return failure };
        if matches!(phase, Phase::Primary | Phase::Join | Phase::Settle | Phase::Verify) {
            failure.blame = Blame::Product;
        }
        failure.because(format!("last seen: {last}"))
    }

    /// A full disk is told with what is free and what the lab may need; the host's, for a guest may speak of its own.
    fn with_figures(&self, failure: Failure) -> Failure {
        let Some(disks) = self.plan.nodes.first().and_then(|node| node.vm.disks.first()?.path.parent()) else {
            return failure;
        };
        if !failure.is_no_space() {
            return failure;
        }
        let Ok(free_mib) = images::fs::free_mib(disks) else { return failure };
        let wanted_mib = self.plan.nodes.len() as u64 * DISK_MIB_PER_NODE;
        if free_mib >= wanted_mib {
            return failure;
        }
        let failure =
            failure.because(format!("{free_mib} MiB are free in {disks}, the lab may need {wanted_mib} MiB there"));
        if failure.hint.is_some() { failure } else { failure.hint(NO_SPACE_HINT) }
    }

    /// Announces a phase that runs after the alarm may have been raised, and so cannot be raced against it.
    pub fn begin(&self, phase: Phase, waits_for: &str) -> Instant {
        self.sink.emit(EventKind::PhaseStarted {
            phase,
            node: None,
            deadline_ms: millis(self.deadline(phase)),
            waits_for: waits_for.to_owned(),
        });
        Instant::now()
    }

    /// Records the end of a phase announced by [`Context::begin`].
    pub fn end(&self, phase: Phase, began: Instant, good: bool, note: impl Into<String>) {
        let outcome = if good { PhaseOutcome::Ok } else { PhaseOutcome::Failed };
        self.close(phase, None, outcome, began.elapsed(), 1, note.into());
    }

    /// Whether the scenario goes without a phase; if so, it is recorded as skipped.
    pub fn goes_without(&self, phase: Phase) -> bool {
        let without = self.plan.without.contains(&phase);
        if without {
            self.skip(phase, "the scenario goes without it");
        }
        without
    }

    /// Records a phase there is nothing to do in.
    pub fn skip(&self, phase: Phase, why: &str) {
        self.close(phase, None, PhaseOutcome::Skipped, Duration::ZERO, 0, why.to_owned());
    }

    fn close(
        &self,
        phase: Phase,
        node: Option<&str>,
        outcome: PhaseOutcome,
        elapsed: Duration,
        attempts: u32,
        note: String,
    ) {
        let elapsed_ms = millis(elapsed);
        let node = node.map(str::to_owned);
        self.sink.emit(EventKind::PhaseFinished {
            phase,
            node: node.clone(),
            outcome,
            phase_elapsed_ms: elapsed_ms,
            attempts,
            note: note.clone(),
        });
        let record = PhaseRecord { phase, node, outcome, elapsed_ms, attempts, note };
        self.records.lock().unwrap_or_else(PoisonError::into_inner).push(record);
    }

    /// How all phases went so far.
    #[must_use]
    pub fn records(&self) -> Vec<PhaseRecord> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Closes a phase whose future was dropped because another node's part of it had failed: no phase stays open.
struct OpenPhase<'a> {
    cx: &'a Context,
    phase: Phase,
    node: Option<&'a str>,
    began: Instant,
    closed: bool,
}

impl Drop for OpenPhase<'_> {
    fn drop(&mut self) {
        if !self.closed {
            let note = "given up: another part of the run has failed".to_owned();
            self.cx.close(self.phase, self.node, PhaseOutcome::Interrupted, self.began.elapsed(), 1, note);
        }
    }
}

/// Whole milliseconds of a duration.
#[must_use]
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
