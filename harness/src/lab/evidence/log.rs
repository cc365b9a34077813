//! Files of evidence in the run folder: bounded, and given up with a warning where they cannot be written.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write as _};
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use jiff::Timestamp;
use tokio::time::Instant;

use crate::event::EventSink;
use crate::printable::printable;
use crate::record::private_file;

/// How many lines of one kind pass one by one within a window; the rest are counted.
const BURST_LINES: u32 = 10;
/// Length of that window.
const BURST_WINDOW: Duration = Duration::from_secs(10);
/// Kinds counted apart.
const KINDS_MAX: usize = 256;

/// One file of lines.
pub(super) struct EvidenceLog {
    out: Option<io::BufWriter<fs::File>>,
    written_bytes: u64,
    max_bytes: u64,
    sink: EventSink,
    path: Utf8PathBuf,
    what: &'static str,
}

impl EvidenceLog {
    /// A log of `what` (`the journal`), at most so large.
    pub(super) fn create(path: &Utf8Path, what: &'static str, max_bytes: u64, sink: &EventSink) -> Self {
        let mut this = Self { out: None, written_bytes: 0, max_bytes, sink: sink.clone(), path: path.to_owned(), what };
        match private_file(path) {
            Ok(file) => this.out = Some(io::BufWriter::new(file)),
            Err(error) => this.give_up(&error.to_string()),
        }
        this
    }

    /// Adds a line.
    pub(super) fn line(&mut self, text: &str) {
        let Some(out) = self.out.as_mut() else { return };
        let text = printable(text);
        self.written_bytes += text.len() as u64 + 1;
        if self.written_bytes > self.max_bytes {
            self.flush();
            self.give_up("it has reached its largest size");
        } else if let Err(error) = writeln!(out, "{text}") {
            self.give_up(&error.to_string());
        }
    }

    /// Hands what was added to the system.
    pub(super) fn flush(&mut self) {
        if let Some(Err(error)) = self.out.as_mut().map(io::Write::flush) {
            self.give_up(&error.to_string());
        }
    }

    fn give_up(&mut self, why: &str) {
        if let Some(out) = self.out.take() {
            // What is still in the buffer could not be written; dropping it would try again.
            drop(out.into_parts());
        }
        self.sink.warn(format!("{} is no longer written to {}: {why}", self.what, self.path));
    }
}

/// Counts lines of one kind that come in bursts.
#[derive(Debug, Default)]
pub(super) struct Bursts {
    kinds: BTreeMap<String, Burst>,
}

#[derive(Debug)]
struct Burst {
    began: Instant,
    began_at: Timestamp,
    passed: u32,
    held: u64,
    last: String,
}

impl Bursts {
    /// Whether a line passes; otherwise it is counted.
    pub(super) fn admit(&mut self, kind: &str, text: &str) -> bool {
        let kind = if self.kinds.len() >= KINDS_MAX && !self.kinds.contains_key(kind) { "" } else { kind };
        let burst = self.kinds.entry(kind.to_owned()).or_insert_with(|| Burst {
            began: Instant::now(),
            began_at: Timestamp::now(),
            passed: 0,
            held: 0,
            last: String::new(),
        });
        if burst.passed < BURST_LINES {
            burst.passed += 1;
            return true;
        }
        burst.held += 1;
        text.clone_into(&mut burst.last);
        false
    }

    /// One line for each kind whose window is over and that had more than passed; all of them at the end.
    pub(super) fn due(&mut self, all: bool) -> Vec<String> {
        let mut lines = Vec::new();
        self.kinds.retain(|kind, burst| {
            if !all && burst.began.elapsed() < BURST_WINDOW {
                return true;
            }
            if burst.held > 0 {
                let kind = if kind.is_empty() { "other lines" } else { kind };
                lines.push(format!(
                    "{kind}: {} more since {}, the last: {}",
                    burst.held,
                    burst.began_at.strftime("%H:%M:%S"),
                    burst.last
                ));
            }
            false
        });
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::EventKind;

    fn warnings(events: &mut tokio::sync::mpsc::UnboundedReceiver<crate::event::Event>) -> Vec<String> {
        std::iter::from_fn(|| events.try_recv().ok())
            .filter_map(|event| match event.event {
                EventKind::Warning { message } => Some(message),
                _ => None,
            })
            .collect()
    }

    #[test]
    fn a_full_disk_warns_once_and_is_written_to_no_more() {
        let (sink, mut events) = EventSink::new();
        let mut log = EvidenceLog::create(Utf8Path::new("/dev/full"), "the journal", 1 << 20, &sink);
        for _ in 0..3 {
            log.line("x");
            log.flush();
        }
        let warnings = warnings(&mut events);
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(
            warnings[0].starts_with("the journal is no longer written to /dev/full: No space left"),
            "{warnings:?}"
        );
    }

    #[test]
    fn a_log_that_reaches_its_size_keeps_what_it_has() {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(dir.path()).unwrap().join("log");
        let (sink, mut events) = EventSink::new();
        let mut log = EvidenceLog::create(&path, "the log", 8, &sink);
        for line in ["one", "two", "three", "four"] {
            log.line(line);
        }
        log.flush();
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntwo\n");
        assert_eq!(warnings(&mut events).len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_is_ten_lines_and_a_count() {
        let mut bursts = Bursts::default();
        let passed = (0..1000).filter(|n| bursts.admit("BLOCK_IO_ERROR", &format!("error {n}"))).count();
        assert_eq!(passed, 10);
        assert!(bursts.admit("RESET", "reset"), "another kind is not held up");
        assert!(bursts.due(false).is_empty());
        tokio::time::advance(BURST_WINDOW).await;
        let due = bursts.due(false);
        assert_eq!(due.len(), 1);
        assert!(due[0].starts_with("BLOCK_IO_ERROR: 990 more since "), "{due:?}");
        assert!(due[0].ends_with(", the last: error 999"), "{due:?}");
        assert!(bursts.admit("BLOCK_IO_ERROR", "again"));
        assert!(bursts.due(true).is_empty());
    }
}
