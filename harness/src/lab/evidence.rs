//! Evidence while it happens: journals over SSH, consoles from the files QEMU writes.
//!
//! Every line goes to the run folder, to the classifier (which may ring the alarm) and, for journals, to
//! the waits that are interested. Losing evidence warns and never changes a verdict.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use jiff::Timestamp;
use tokio::sync::{Notify, broadcast};
use tokio::task::JoinSet;
use verdict::{Attribution, Classifier, Evidence, Fatal, Source, UnitRestarts};

use crate::event::{EventKind, EventSink};
use crate::exit::Blame;
use crate::guest::Guest;
use crate::guest::{Journal, JournalEntry};
use crate::lab::alarm::{Alarm, AlarmBell};
use crate::lab::sampler::{HostSampler, HostSeen, VcpuThreads};
use crate::record::private_file;
use crate::redact::redact;

/// How many journal entries a wait may lag behind before it has to look at the unit itself.
const JOURNAL_QUEUE: usize = 4096;
/// How often the consoles' files are looked at: a `read` on the host, nothing in the guest.
const CONSOLE_POLL: Duration = Duration::from_millis(100);
/// How often the host is sampled, and how often it is seen whether a fatal sign's allowance is used up in silence.
const SAMPLE_EVERY: Duration = Duration::from_secs(1);
/// Most bytes of one console taken per look.
const CONSOLE_CHUNK_BYTES: usize = 64 * 1024;
/// Longest console line kept; a console that never ends its line is cut here.
const CONSOLE_LINE_BYTES: usize = 8 * 1024;
/// Largest journal of a node kept in the run folder; the classifier sees the rest all the same.
const JOURNAL_MAX_BYTES: u64 = 256 * 1024 * 1024;

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
}

/// Collects evidence from the moment a source is added until [`EvidencePump::finish`].
pub struct EvidencePump {
    shared: Arc<Shared>,
    tasks: JoinSet<()>,
}

impl EvidencePump {
    /// A pump that classifies by `classifier` and rings `bell`.
    #[must_use]
    pub fn new(classifier: Classifier, sampler: HostSampler, bell: AlarmBell, sink: EventSink) -> Self {
        let (entries, _) = broadcast::channel(JOURNAL_QUEUE);
        let shared = Arc::new(Shared {
            classifier: Mutex::new(classifier),
            restarts: Mutex::new(BTreeMap::new()),
            entries,
            sampler: Mutex::new(sampler),
            bell,
            sink,
        });
        let mut tasks = JoinSet::new();
        let polled = Arc::clone(&shared);
        tasks.spawn(async move {
            let mut tick = tokio::time::interval(SAMPLE_EVERY);
            loop {
                tick.tick().await;
                polled.poll();
                lock(&polled.sampler).sample();
            }
        });
        Self { shared, tasks }
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

    /// Follows the journal of a guest, from its boot on, into `file`.
    pub fn follow_journal(&mut self, guest: Guest, file: Utf8PathBuf) {
        self.tasks.spawn(follow_journal(guest, file, Arc::clone(&self.shared)));
    }

    /// Follows a console's file. `ssh_hint` is notified when the console says something new, since a guest that
    /// speaks there may soon answer elsewhere.
    pub fn follow_console(
        &mut self,
        node: String,
        file: Utf8PathBuf,
        seed_failed_mark: &'static str,
        ssh_hint: Arc<Notify>,
    ) {
        self.tasks.spawn(follow_console(node, file, seed_failed_mark, ssh_hint, Arc::clone(&self.shared)));
    }

    /// Ends all following and hands back what was learnt.
    pub async fn finish(mut self) -> (Classifier, Vec<UnitRestarts>, HostSeen) {
        let restarts = self.restarts();
        let seen = lock(&self.shared.sampler).seen();
        self.tasks.shutdown().await;
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

// A panic while a lock was held ends the run anyway; its evidence is still worth having.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn follow_journal(guest: Guest, path: Utf8PathBuf, shared: Arc<Shared>) {
    let node = guest.node().to_owned();
    let mut file = JournalFile::create(&path, &shared.sink);
    let mut journal = Journal::follow(guest);
    while let Some(entry) = journal.next().await {
        take_entry(&node, entry, &mut file, &shared);
        while let Some(entry) = journal.try_next() {
            take_entry(&node, entry, &mut file, &shared);
        }
        file.flush();
    }
}

fn take_entry(node: &str, entry: JournalEntry, file: &mut JournalFile, shared: &Shared) {
    let at = i64::try_from(entry.realtime_us).ok().and_then(|us| Timestamp::from_microsecond(us).ok());
    let who = entry.identifier.as_deref().unwrap_or("?");
    let pid = entry.pid.map_or_else(String::new, |pid| format!("[{pid}]"));
    let message = redact(&entry.message);
    let message =
        if entry.message_oversize { "(a message too long to be followed is not here)".into() } else { message };
    for line in message.lines() {
        let text = format!("{who}{pid}: {line}");
        file.line(at, node, &text);
        shared.observe(&Evidence::new(Some(node), Source::journal(), at, text));
    }
    if let Some(unit) = entry.unit.clone().filter(|unit| unit.starts_with("k3s"))
        && entry.restart_scheduled(&unit)
    {
        let restarts = {
            let mut all = lock(&shared.restarts);
            let count = all.entry((node.to_owned(), unit.clone())).or_default();
            *count = entry.restarts.unwrap_or(*count + 1).max(*count);
            *count
        };
        let detail = redact(&entry.message).into_owned();
        shared.sink.emit(EventKind::UnitRestarted { node: node.to_owned(), unit, restarts, detail });
    }
    // Nobody waiting is no error.
    let _ = shared.entries.send(Arc::new(NodeEntry { node: node.to_owned(), entry }));
}

/// A node's journal in the run folder, bounded, in journald's short-iso-precise form.
struct JournalFile {
    out: Option<io::BufWriter<fs::File>>,
    written_bytes: u64,
    sink: EventSink,
    path: Utf8PathBuf,
}

impl JournalFile {
    fn create(path: &Utf8Path, sink: &EventSink) -> Self {
        let mut this = Self { out: None, written_bytes: 0, sink: sink.clone(), path: path.to_owned() };
        match private_file(path) {
            Ok(file) => this.out = Some(io::BufWriter::new(file)),
            Err(error) => this.give_up(&error.to_string()),
        }
        this
    }

    fn line(&mut self, at: Option<Timestamp>, node: &str, text: &str) {
        let Some(out) = self.out.as_mut() else { return };
        let at = at.unwrap_or_else(Timestamp::now).strftime("%Y-%m-%dT%H:%M:%S%.6f+0000");
        self.written_bytes += text.len() as u64 + 48;
        if self.written_bytes > JOURNAL_MAX_BYTES {
            self.give_up("it has reached its largest size");
        } else if let Err(error) = writeln!(out, "{at} {node} {text}") {
            self.give_up(&error.to_string());
        }
    }

    fn flush(&mut self) {
        if let Some(Err(error)) = self.out.as_mut().map(io::Write::flush) {
            self.give_up(&error.to_string());
        }
    }

    fn give_up(&mut self, why: &str) {
        self.out = None;
        self.sink.warn(format!("the journal is no longer written to {}: {why}", self.path));
    }
}

async fn follow_console(
    node: String,
    path: Utf8PathBuf,
    seed_failed_mark: &'static str,
    ssh_hint: Arc<Notify>,
    shared: Arc<Shared>,
) {
    let mut tail = ConsoleTail::new(path);
    let mut tick = tokio::time::interval(CONSOLE_POLL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let lines = tail.more();
        if !lines.is_empty() {
            ssh_hint.notify_waiters();
        }
        for line in lines {
            if let Some(at) = line.find(seed_failed_mark) {
                shared.bell.ring(Alarm::Machine {
                    machine: node.clone(),
                    is_node: true,
                    what: "the guest could not unpack its seed".to_owned(),
                    tail: line[at..].to_owned(),
                    blame: Blame::Environment,
                });
            }
            let line = redact(&line).into_owned();
            shared.observe(&Evidence::new(Some(&node), Source::console(), Some(Timestamp::now()), line));
        }
    }
}

/// Reads what was added to a console's file, line by line.
struct ConsoleTail {
    path: Utf8PathBuf,
    offset: u64,
    partial: Vec<u8>,
}

impl ConsoleTail {
    fn new(path: Utf8PathBuf) -> Self {
        Self { path, offset: 0, partial: Vec::new() }
    }

    fn more(&mut self) -> Vec<String> {
        let Ok(mut file) = fs::File::open(&self.path) else { return Vec::new() };
        let mut chunk = Vec::new();
        let read = file
            .seek(SeekFrom::Start(self.offset))
            .and_then(|_| file.take(CONSOLE_CHUNK_BYTES as u64).read_to_end(&mut chunk));
        let Ok(bytes) = read else { return Vec::new() };
        self.offset += bytes as u64;
        let mut lines = Vec::new();
        for byte in chunk {
            if byte != b'\n' && self.partial.len() < CONSOLE_LINE_BYTES {
                self.partial.push(byte);
                continue;
            }
            let line = String::from_utf8_lossy(&self.partial).trim_end_matches('\r').to_owned();
            if !line.is_empty() {
                lines.push(line);
            }
            self.partial.clear();
            if byte != b'\n' {
                self.partial.push(byte);
            }
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_is_read_as_it_grows_and_endless_lines_are_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(dir.path()).unwrap().join("console.log");
        let mut tail = ConsoleTail::new(path.clone());
        assert!(tail.more().is_empty());
        fs::write(&path, "one\r\ntw").unwrap();
        assert_eq!(tail.more(), ["one"]);
        let mut file = fs::OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"o\n\xff\xfe\n").unwrap();
        assert_eq!(tail.more(), ["two", "\u{fffd}\u{fffd}"]);
        file.write_all(&vec![b'x'; CONSOLE_LINE_BYTES + 10]).unwrap();
        file.write_all(b"\n").unwrap();
        let lines = tail.more();
        assert_eq!(lines.iter().map(String::len).collect::<Vec<_>>(), [CONSOLE_LINE_BYTES, 10]);
    }
}
