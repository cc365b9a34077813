//! Journals over SSH: into the run folder, to the classifier and to the waits, on the host's clock.

use std::sync::Arc;
use std::time::Duration;

use camino::Utf8PathBuf;
use jiff::Timestamp;
use verdict::dialect::ansi;
use verdict::{Evidence, Source};

use super::clock::ClockBook;
use super::log::EvidenceLog;
use super::{Measure, NodeEntry, Shared, lock};
use crate::event::EventKind;
use crate::guest::{Guest, Journal, JournalEntry};
use crate::redact::redact;

/// Largest journal of a node kept in the run folder; the classifier sees the rest all the same.
const JOURNAL_MAX_BYTES: u64 = 256 * 1024 * 1024;
/// Longest message that waits get: they look at an entry's fields.
const WAITS_MESSAGE_BYTES: usize = 1024;

/// How long a journal may wait for a guest that has something better to do.
const BUSY_MAX: Duration = Duration::from_secs(1);

pub(super) async fn follow(guest: Guest, path: Utf8PathBuf, busy: impl Future<Output = ()>, shared: Arc<Shared>) {
    let node = guest.node().to_owned();
    let mut file = EvidenceLog::create(&path, "the journal", JOURNAL_MAX_BYTES, &shared.sink);
    let _ = tokio::time::timeout(BUSY_MAX, busy).await;
    let mut clock = ClockBook::new(guest.clone(), Arc::clone(&shared));
    // Nothing is lost meanwhile: the journal is read from the guest's boot on.
    clock.measure().await;
    let mut journal = Journal::follow(guest);
    let mut opened = 1;
    let mut measure = shared.measure.subscribe();
    loop {
        tokio::select! {
            entry = journal.next() => {
                let Some(entry) = entry else { return };
                let mut set = take_entry(&node, entry, &mut file, &mut clock, &shared);
                while let Some(entry) = journal.try_next() {
                    set |= take_entry(&node, entry, &mut file, &mut clock, &shared);
                }
                file.flush();
                // Another connection may lead to a guest that has slept in between.
                if set || journal.opened() > opened {
                    opened = journal.opened();
                    clock.measure_again().await;
                }
            }
            wanted = measure.changed() => match wanted {
                // The collection follows, and the end of this.
                Ok(()) if *measure.borrow_and_update() == Measure::Last => clock.measure().await,
                Ok(()) => clock.measure_again().await,
                Err(_) => return,
            },
            () = clock.due() => clock.measure().await,
        }
    }
}

/// Takes one entry in; says whether the guest's clock was set before it.
fn take_entry(
    node: &str,
    mut entry: JournalEntry,
    file: &mut EvidenceLog,
    clock: &mut ClockBook,
    shared: &Shared,
) -> bool {
    let (at, set) = clock.place(entry.realtime_us, entry.monotonic_us);
    let who = entry.identifier.as_deref().unwrap_or("?");
    let pid = entry.pid.map_or_else(String::new, |pid| format!("[{pid}]"));
    let message = redact(&entry.message);
    let stamp = at.unwrap_or_else(Timestamp::now).strftime("%Y-%m-%dT%H:%M:%S%.6f+0000").to_string();
    let mut take = |line: &str| {
        let text = format!("{who}{pid}: {line}");
        // journald's short-iso-precise form; colours come off as they do in the classifier, so that a later diagnosis of
        // the file sees the same.
        let plain = ansi::strip(text.as_bytes());
        file.line(&format!("{stamp} {node} {}", String::from_utf8_lossy(&plain)));
        shared.observe(&Evidence::new(Some(node), Source::journal(), at, text));
    };
    message.lines().for_each(&mut take);
    if entry.message_cut {
        take("(the message before this was longer and is cut here)");
    }
    if let Some(unit) = entry.unit.clone().filter(|unit| unit.starts_with("k3s"))
        && entry.restart_scheduled(&unit)
    {
        let restarts = {
            let mut all = lock(&shared.restarts);
            let count = all.entry((node.to_owned(), unit.clone())).or_default();
            *count = entry.restarts.unwrap_or(count.saturating_add(1)).max(*count);
            *count
        };
        let detail = redact(&entry.message).into_owned();
        shared.sink.emit(EventKind::UnitRestarted { node: node.to_owned(), unit, restarts, detail });
    }
    if entry.message.len() > WAITS_MESSAGE_BYTES {
        let end = (0..=WAITS_MESSAGE_BYTES).rev().find(|&at| entry.message.is_char_boundary(at)).unwrap_or(0);
        entry.message.truncate(end);
        entry.message_cut = true;
    }
    // Nobody waiting is no error.
    let _ = shared.entries.send(Arc::new(NodeEntry { node: node.to_owned(), entry }));
    set
}

#[cfg(test)]
mod tests {
    use camino::Utf8Path;

    use super::super::testing;
    use super::*;
    use crate::guest::testing::Sshd;
    use crate::lab::Alarm;

    fn entry(message: &str) -> JournalEntry {
        JournalEntry {
            realtime_us: 1_795_228_350_000_000,
            monotonic_us: 8_000_000,
            identifier: Some("k3s".to_owned()),
            pid: Some(7),
            message: message.to_owned(),
            ..JournalEntry::default()
        }
    }

    #[tokio::test]
    async fn a_journal_that_cannot_be_kept_is_classified_all_the_same() {
        let mut bench = testing::Bench::new();
        let shared = Arc::clone(&bench.pump.shared);
        let sshd = Sshd::start();
        let mut clock = ClockBook::new(sshd.guest().await, Arc::clone(&shared));
        let mut file = EvidenceLog::create(Utf8Path::new("/dev/full"), "the journal", 1 << 20, &shared.sink);
        let long = format!("level=info msg=\"{}\"", "x".repeat(20_000));
        take_entry("server-2", entry(&long), &mut file, &mut clock, &shared);
        file.flush();
        let panic = "panic: bootstrap data already found and encrypted with different token";
        take_entry("server-2", entry(panic), &mut file, &mut clock, &shared);
        file.flush();
        assert!(
            matches!(bench.guard.alarm(), Some(Alarm::Fatal { meaning, .. }) if meaning.starts_with("FM-2")),
            "{:?}",
            bench.guard.alarm()
        );
        let warnings = bench.warnings();
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(warnings[0].contains("No space left on device"), "{warnings:?}");
    }

    #[tokio::test]
    async fn colours_come_off_and_what_else_a_terminal_acts_on_is_escaped() {
        let bench = testing::Bench::new();
        let shared = Arc::clone(&bench.pump.shared);
        let sshd = Sshd::start();
        let mut clock = ClockBook::new(sshd.guest().await, Arc::clone(&shared));
        let path = bench.record.path().join("journal.log");
        let mut file = EvidenceLog::create(&path, "the journal", 1 << 20, &shared.sink);
        take_entry("server-1", entry("\x1b[31mFATA\x1b[0m[0000] \x07 \u{9b}2J"), &mut file, &mut clock, &shared);
        file.flush();
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.ends_with(" server-1 k3s[7]: FATA[0000] \\x07 \\x9b2J\n"), "{text}");
    }

    #[tokio::test]
    async fn what_waits_get_is_bounded_and_the_file_has_all_of_it() {
        let bench = testing::Bench::new();
        let shared = Arc::clone(&bench.pump.shared);
        let mut entries = bench.pump.subscribe();
        let sshd = Sshd::start();
        let mut clock = ClockBook::new(sshd.guest().await, Arc::clone(&shared));
        let path = bench.record.path().join("journal.log");
        let mut file = EvidenceLog::create(&path, "the journal", 1 << 20, &shared.sink);
        let mut long = entry(&"y".repeat(16_000));
        long.message_cut = true;
        take_entry("server-1", long, &mut file, &mut clock, &shared);
        file.flush();
        assert_eq!(entries.try_recv().unwrap().entry.message.len(), WAITS_MESSAGE_BYTES);
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.starts_with("2026-11-21T02:32:30.000000+0000 server-1 k3s[7]: yyyy"), "{}", &text[..80]);
        assert!(text.ends_with("k3s[7]: (the message before this was longer and is cut here)\n"));
        assert!(text.len() > 16_000);
    }
}
