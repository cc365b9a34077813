//! The one contract between a run and everything that shows or records it.
//!
//! The runner emits [`Event`]s; the terminal, the plain log, NDJSON and the run folder's
//! `events.ndjson` are fed from the same stream, so they cannot disagree. Nothing here prints.

use std::time::Instant;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::plan::Phase;

/// Something that happened in a run, with the time it happened at.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Event {
    /// Wall clock of the host.
    pub at: Timestamp,
    /// Milliseconds since the run began, from a monotonic clock.
    pub elapsed_ms: u64,
    /// What happened.
    pub event: EventKind,
}

/// How a phase or a step of it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PhaseOutcome {
    /// It did what it is for.
    Ok,
    /// It did not; the verdict says why.
    Failed,
    /// The run was interrupted while it was going on.
    Interrupted,
    /// There was nothing to do (for example no joiner in a one-node scenario).
    Skipped,
}

/// What happened.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case", rename_all_fields = "snake_case")]
pub enum EventKind {
    /// A run begins. Its folder exists and `run.json` is written.
    RunStarted {
        /// The run's id, also the name of its folder.
        run: String,
        /// The scenario's name.
        scenario: String,
        /// The profile's name.
        profile: String,
        /// Which k3s is under test, in words that say whether it is real k3s.
        k3s: String,
        /// Names of the nodes, in plan order.
        nodes: Vec<String>,
        /// Folder of the run's records.
        run_dir: String,
    },
    /// The acceleration was chosen and the host's speed measured.
    HostMeasured {
        /// `kvm` or `tcg`.
        accel: String,
        /// Why this acceleration.
        reason: String,
        /// How many times slower than the reference a guest runs here.
        slowdown: f64,
        /// Processor cores of the host.
        cores: u32,
        /// vCPUs asked for by the plan, over all nodes.
        vcpus: u32,
    },
    /// Something a person should know which does not decide the run.
    Warning {
        /// The warning.
        message: String,
    },
    /// A phase began; with a node, that node's part of it.
    PhaseStarted {
        /// The phase.
        phase: Phase,
        /// The node, where the phase runs per node.
        node: Option<String>,
        /// When it will be given up.
        deadline_ms: u64,
        /// What it waits for.
        waits_for: String,
    },
    /// A phase moved on, in a way worth a word to somebody watching.
    PhaseProgress {
        /// The phase.
        phase: Phase,
        /// The node, where the phase runs per node.
        node: Option<String>,
        /// The news.
        message: String,
    },
    /// A phase ended.
    PhaseFinished {
        /// The phase.
        phase: Phase,
        /// The node, where the phase runs per node.
        node: Option<String>,
        /// How it ended.
        outcome: PhaseOutcome,
        /// How long it took.
        phase_elapsed_ms: u64,
        /// How many attempts it took (1 where nothing was retried).
        attempts: u32,
        /// The outcome in words.
        note: String,
    },
    /// The first and later latencies of a joiner's path to the first server.
    PrewarmMeasured {
        /// The joiner.
        node: String,
        /// One entry per attempt: handshake of TCP, then of TLS, in milliseconds; `null` where it failed.
        tcp_ms: Vec<Option<f64>>,
        /// See `tcp_ms`.
        tls_ms: Vec<Option<f64>>,
    },
    /// A systemd unit exited and was started again.
    UnitRestarted {
        /// The node.
        node: String,
        /// The unit.
        unit: String,
        /// Restarts of it seen so far in this run.
        restarts: u32,
        /// Exit status as systemd words it.
        detail: String,
    },
    /// The evidence is sufficient: whatever waits ends now.
    ///
    /// From `printed_at` to the `at` of the next `phase-finished` that failed is what the end of a wait took.
    FatalSign {
        /// The node.
        node: Option<String>,
        /// The failure mode; none for a look-alike.
        id: Option<String>,
        /// Name of the mode or look-alike.
        name: String,
        /// The rule that holds.
        rule: String,
        /// When the last line it rests on was printed, on the host's clock.
        printed_at: Option<Timestamp>,
        /// That line.
        line: String,
    },
    /// A guest's clock was measured against the host's.
    ClockMeasured {
        /// The node.
        node: String,
        /// The guest's clock minus the host's, microseconds.
        offset_us: i64,
        /// The offset is wrong by at most this much, microseconds.
        uncertainty_us: u64,
        /// When the guest's time since boot was zero, on the host's clock.
        booted_at: Timestamp,
    },
    /// QEMU or a switch reported something: STOP, RESET, GUEST_PANICKED, an exit.
    MachineEvent {
        /// The node or switch.
        machine: String,
        /// The event in words.
        message: String,
    },
    /// The user or the system asked the run to end.
    Interrupted {
        /// Name of the signal.
        signal: String,
    },
    /// The run ended. Always the last event.
    RunFinished {
        /// Whether it passed.
        passed: bool,
        /// The exit code of the process.
        exit_code: u8,
        /// One line.
        summary: String,
    },
}

/// Where the runner puts its events. Cheap to clone; never blocks the run.
#[derive(Debug, Clone)]
pub struct EventSink {
    tx: mpsc::UnboundedSender<Event>,
    began: Instant,
}

impl EventSink {
    /// A sink and the stream of what is put into it.
    ///
    /// The stream is unbounded because the number of events of a run is bounded by its plan and by the
    /// unit restarts it can see before a deadline; evidence (logs) never travels through it.
    #[must_use]
    pub fn new() -> (Self, mpsc::UnboundedReceiver<Event>) {
        let (tx, rx) = mpsc::unbounded_channel();
        (Self { tx, began: Instant::now() }, rx)
    }

    /// Emits an event stamped with the present time.
    pub fn emit(&self, event: EventKind) {
        let event = Event { at: Timestamp::now(), elapsed_ms: self.elapsed_ms(), event };
        // The receiver goes away only when the run is over and reported.
        let _ = self.tx.send(event);
    }

    /// Milliseconds since the run began.
    #[must_use]
    pub fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Emits a [`EventKind::Warning`].
    pub fn warn(&self, message: impl Into<String>) {
        self.emit(EventKind::Warning { message: message.into() });
    }

    /// Emits a [`EventKind::PhaseProgress`].
    pub fn progress(&self, phase: Phase, node: Option<&str>, message: impl Into<String>) {
        self.emit(EventKind::PhaseProgress { phase, node: node.map(str::to_owned), message: message.into() });
    }
}
