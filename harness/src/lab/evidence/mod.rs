//! Evidence while it happens: what the guests say, what QEMU and the switches do, and how the guests are reached.
//!
//! Every line goes to the run folder, to the classifier (which may ring the alarm) and, for journals, to
//! the waits that are interested; all of them on the host's clock. Losing evidence warns and never changes a verdict.
//!
//! | in the run folder | what |
//! |---|---|
//! | `nodes/NAME/journal.log` | the guest's journal, followed over SSH |
//! | `nodes/NAME/console.log` | its serial console, written by QEMU |
//! | `nodes/NAME/qemu.log` | QEMU's standard error, written by QEMU's owner |
//! | `nodes/NAME/qmp.log` | QEMU's events |
//! | `nodes/NAME/ssh.log` | connections to the guest: made, failed, lost |
//! | `nodes/NAME/clock.json` | the guest's clock against the host's |
//! | `vde.log` | the switches and links: what they say, their ends |
//! | `host.ndjson` | the host, each second |

mod clock;
mod journal;
mod log;
mod tail;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use camino::Utf8PathBuf;
use jiff::Timestamp;
use tokio::sync::{broadcast, watch};
use tokio::task::JoinSet;
use verdict::{Attribution, Classifier, Evidence, Fatal, Source, UnitRestarts};

pub use clock::GuestClock;
use log::{Bursts, EvidenceLog};

use crate::event::{EventKind, EventSink};
use crate::exit::Blame;
use crate::guest::{Guest, JournalEntry, NewsSink};
use crate::lab::alarm::{Alarm, AlarmBell};
use crate::lab::sampler::{HostSampler, HostSeen, VcpuThreads};
use crate::record::RunDir;
use crate::redact::redact;

/// How many journal entries a wait may lag behind before it has to look at the unit itself.
const JOURNAL_QUEUE: usize = 4096;
/// How often the host is sampled, and how often it is seen whether a fatal sign's allowance is used up in silence.
const SAMPLE_EVERY: Duration = Duration::from_secs(1);
/// Largest log of what was seen from the host.
const SEEN_MAX_BYTES: u64 = 4 * 1024 * 1024;
/// How long the followers may take to read what was written last.
const CLOSING: Duration = Duration::from_secs(1);

/// A journal entry and the node it is from.
#[derive(Debug, Clone)]
pub struct NodeEntry {
    /// The node.
    pub node: String,
    /// The entry.
    pub entry: JournalEntry,
}

struct Shared {
    classifier: Mutex<Classifier>,
    restarts: Mutex<BTreeMap<(String, String), u32>>,
    entries: broadcast::Sender<Arc<NodeEntry>>,
    sampler: Mutex<HostSampler>,
    bell: AlarmBell,
    sink: EventSink,
    record: RunDir,
    /// What was seen from the host, by file.
    seen: Mutex<BTreeMap<String, SeenLog>>,
    /// Asks for the guests' clocks to be measured again.
    measure: watch::Sender<Measure>,
    /// Whether the evidence is being closed.
    closing: watch::Sender<bool>,
}

/// How the guests' clocks are to be measured again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Measure {
    /// As soon as that was not just done.
    Again,
    /// Now or never: the run is about to end.
    Last,
}

struct SeenLog {
    log: EvidenceLog,
    bursts: Bursts,
    stream: Stream,
}

/// Something the host sees, and the file it is kept in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stream {
    node: Option<String>,
    source: Source,
}

impl Stream {
    /// QEMU's events.
    #[must_use]
    pub fn qmp(node: &str) -> Self {
        Self { node: Some(node.to_owned()), source: Source::qmp() }
    }

    /// The connections to a guest.
    #[must_use]
    pub fn ssh(node: &str) -> Self {
        Self { node: Some(node.to_owned()), source: Source::ssh() }
    }

    /// The switches and links.
    #[must_use]
    pub fn vde() -> Self {
        Self { node: None, source: Source::vde() }
    }

    /// The DHCP servers.
    #[must_use]
    pub fn dhcp() -> Self {
        Self { node: None, source: Source::dhcp() }
    }

    /// Its file below the run folder.
    fn file(&self) -> String {
        match &self.node {
            Some(node) => format!("nodes/{node}/{}.log", self.source.origin),
            None => format!("{}.log", self.source.origin),
        }
    }
}

/// Takes down what is seen from the host. Cheap to clone; goes on after the verdict, for a lab that is kept.
#[derive(Clone)]
pub struct Recorder {
    shared: Arc<Shared>,
}

impl Recorder {
    /// Takes a line of some kind (`RESET`, `lost`) into the evidence. Of a burst of one kind, the first ten lines are kept
    /// and the rest are counted.
    pub fn note(&self, stream: &Stream, kind: &str, text: &str) {
        self.shared.note(stream, kind, text);
    }

    /// Listens to what becomes of the connection to a guest.
    #[must_use]
    pub fn ssh_news(&self, node: &str) -> NewsSink {
        let (this, stream) = (self.clone(), Stream::ssh(node));
        NewsSink::new(move |news| this.note(&stream, news.kind(), &news.to_string()))
    }

    /// Has the guests' clocks measured again: a VM was stopped for a while. Waits for nothing.
    pub fn measure_clocks(&self) {
        // What asks for the last time stays what is asked for.
        self.shared.measure.send_modify(|_| ());
    }

    /// Has the guests' clocks measured at once, for the run is about to end. Waits for nothing.
    pub fn measure_clocks_last(&self) {
        self.shared.measure.send_replace(Measure::Last);
    }
}

/// Collects evidence from the moment a source is added until [`EvidencePump::finish`].
pub struct EvidencePump {
    shared: Arc<Shared>,
    /// Files that are followed: these end when the evidence is closed.
    files: JoinSet<()>,
    /// Journals and samples: these are ended.
    tasks: JoinSet<()>,
}

impl EvidencePump {
    /// A pump that classifies by `classifier` and rings `bell`.
    #[must_use]
    pub fn new(classifier: Classifier, sampler: HostSampler, bell: AlarmBell, sink: EventSink, record: RunDir) -> Self {
        let (entries, _) = broadcast::channel(JOURNAL_QUEUE);
        let shared = Arc::new(Shared {
            classifier: Mutex::new(classifier),
            restarts: Mutex::new(BTreeMap::new()),
            entries,
            sampler: Mutex::new(sampler),
            bell,
            sink,
            record,
            seen: Mutex::new(BTreeMap::new()),
            measure: watch::Sender::new(Measure::Again),
            closing: watch::Sender::new(false),
        });
        let mut tasks = JoinSet::new();
        let polled = Arc::clone(&shared);
        tasks.spawn(async move {
            let mut tick = tokio::time::interval(SAMPLE_EVERY);
            loop {
                tick.tick().await;
                polled.poll();
                lock(&polled.sampler).sample();
                polled.bursts(false);
            }
        });
        Self { shared, files: JoinSet::new(), tasks }
    }

    /// Journal entries of all nodes from now on.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<Arc<NodeEntry>> {
        self.shared.entries.subscribe()
    }

    /// Takes one line into the evidence, for what the harness itself has seen.
    pub fn observe(&self, evidence: &Evidence) {
        self.shared.observe(evidence);
    }

    /// Watches what a VM gets of the host's CPUs.
    pub fn watch_vcpus(&self, vm: VcpuThreads) {
        lock(&self.shared.sampler).watch(vm);
    }

    /// How often units were restarted so far.
    #[must_use]
    pub fn restarts(&self) -> Vec<UnitRestarts> {
        lock(&self.shared.restarts)
            .iter()
            .map(|((node, unit), restarts)| UnitRestarts {
                node: node.clone(),
                unit: unit.clone(),
                restarts: *restarts,
            })
            .collect()
    }

    /// Takes down what is seen from the host.
    #[must_use]
    pub fn recorder(&self) -> Recorder {
        Recorder { shared: Arc::clone(&self.shared) }
    }

    /// Follows the journal of a guest, from its boot on, into `file`, once `busy` has completed, but after a second at the
    /// latest, and its clock was measured: to read what a boot has left costs an emulated CPU most of a second.
    pub fn follow_journal(&mut self, guest: Guest, file: Utf8PathBuf, busy: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(journal::follow(guest, file, busy, Arc::clone(&self.shared)));
    }

    /// Follows a console's file. A line with `seed_failed_mark` is the guest's end.
    pub fn follow_console(&mut self, node: String, file: Utf8PathBuf, seed_failed_mark: &'static str) {
        let shared = Arc::clone(&self.shared);
        self.files.spawn(tail::follow(node, file, Source::console(), Some(seed_failed_mark), shared));
    }

    /// Follows QEMU's standard error.
    pub fn follow_qemu(&mut self, node: String, file: Utf8PathBuf) {
        self.files.spawn(tail::follow(node, file, Source::qemu(), None, Arc::clone(&self.shared)));
    }

    /// Ends all following and hands back what was learnt.
    pub async fn finish(mut self) -> (Classifier, Vec<UnitRestarts>, HostSeen) {
        let restarts = self.restarts();
        let seen = lock(&self.shared.sampler).seen();
        self.shared.closing.send_replace(true);
        let _ = tokio::time::timeout(CLOSING, async { while self.files.join_next().await.is_some() {} }).await;
        self.files.shutdown().await;
        self.tasks.shutdown().await;
        self.shared.bursts(true);
        let classifier = lock(&self.shared.classifier).clone();
        (classifier, restarts, seen)
    }
}

impl Shared {
    fn observe(&self, evidence: &Evidence) {
        let fatal = lock(&self.classifier).observe(evidence);
        if let Some(fatal) = fatal {
            self.ring(&fatal);
        }
    }

    fn note(&self, stream: &Stream, kind: &str, text: &str) {
        let text = redact(text);
        let mut seen = lock(&self.seen);
        let log = seen.entry(stream.file()).or_insert_with(|| self.seen_log(stream));
        // Here too, and not by the clock alone: that of a kept lab ends with the verdict.
        for line in log.bursts.due(false) {
            self.keep(log, &line);
        }
        if log.bursts.admit(kind, &text) {
            self.keep(log, &text);
        }
    }

    /// Tells of the bursts that are over, or of all.
    fn bursts(&self, all: bool) {
        for log in lock(&self.seen).values_mut() {
            for line in log.bursts.due(all) {
                self.keep(log, &line);
            }
        }
    }

    fn seen_log(&self, stream: &Stream) -> SeenLog {
        if let Some(node) = &stream.node
            && let Err(error) = self.record.node(node)
        {
            self.sink.warn(format!("the folder of {node} could not be made: {error}"));
        }
        let path = self.record.path().join(stream.file());
        let log = EvidenceLog::create(&path, "what was seen from the host", SEEN_MAX_BYTES, &self.sink);
        SeenLog { log, bursts: Bursts::default(), stream: stream.clone() }
    }

    fn keep(&self, seen: &mut SeenLog, text: &str) {
        let now = Timestamp::now();
        for line in text.lines() {
            seen.log.line(&format!("{} {line}", now.strftime("%Y-%m-%dT%H:%M:%S%.6fZ")));
            self.observe(&Evidence::new(seen.stream.node.as_deref(), seen.stream.source.clone(), Some(now), line));
        }
        seen.log.flush();
    }

    /// A node that fell silent may have used up its allowance.
    fn poll(&self) {
        let fatal = lock(&self.classifier).poll(Timestamp::now());
        if let Some(fatal) = fatal {
            self.ring(&fatal);
        }
    }

    fn ring(&self, fatal: &Fatal) {
        let line = fatal.evidence.first().map(|line| redact(&line.text).into_owned()).unwrap_or_default();
        let blame = blame_of(fatal.attribution);
        self.sink.emit(EventKind::FatalSign {
            node: fatal.node.clone(),
            id: fatal.id.clone(),
            name: fatal.name.clone(),
            rule: fatal.rule.clone(),
            printed_at: fatal.evidence.iter().filter_map(|line| line.at).max(),
            line: line.clone(),
        });
        self.bell.ring(Alarm::Fatal { node: fatal.node.clone(), meaning: meaning(fatal), line, blame });
    }
}

/// `FM-2 stale bootstrap data: why it is sufficient`.
fn meaning(fatal: &Fatal) -> String {
    let id = fatal.id.as_deref().map_or_else(String::new, |id| format!("{id} "));
    format!("{id}{}: {}", fatal.name, fatal.because)
}

/// Who is to blame, in the exit code's terms.
#[must_use]
pub fn blame_of(attribution: Attribution) -> Blame {
    match attribution {
        Attribution::Environment => Blame::Environment,
        Attribution::Product => Blame::Product,
        Attribution::Harness => Blame::Harness,
        Attribution::Configuration => Blame::Usage,
    }
}

/// The same the other way, `None` for a run that somebody asked to end.
#[must_use]
pub const fn attribution_of(blame: Blame) -> Option<Attribution> {
    match blame {
        Blame::Environment => Some(Attribution::Environment),
        Blame::Product => Some(Attribution::Product),
        Blame::Harness => Some(Attribution::Harness),
        Blame::Usage => Some(Attribution::Configuration),
        Blame::Interrupted => None,
    }
}

// A panic while a lock was held ends the run anyway; its evidence is still worth having.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
pub(in crate::lab) mod testing;
#[cfg(test)]
mod tests;
