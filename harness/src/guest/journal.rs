//! The journal of a guest, followed from its boot on, without loss or repetition.
//!
//! Field names, message ids and JSON form are those of systemd: `systemd.journal-fields(7)`,
//! `sd-messages.h` / `systemd.catalog`, `journalctl(1)` (`-o json`: text fields are strings, fields that
//! are not UTF-8 arrays of bytes, fields over 4096 bytes null but for `--all`, fields set more than once arrays of these).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::SendTimeoutError;

use super::error::GuestError;
use super::news::SshNews;
use super::quote::quote;
use super::ssh::Guest;
use super::stream::{Lines, Source, Step, StreamEnd};

/// Entries waiting for a reader.
const QUEUE_ENTRIES: usize = 1_024;
/// The longest line of journalctl that is read: six bytes of JSON for one of a message at worst, and some.
const LINE_MAX_BYTES: usize = 1024 * 1024;
/// The longest message that is kept; with the queue and the limits of the other fields, this bounds the memory of a node's journal.
pub(super) const MESSAGE_MAX_BYTES: usize = 16 * 1024;
/// The longest of any other field that is kept. Programs choose their identifier themselves.
const FIELD_MAX_BYTES: usize = 256;
/// Longer than any cursor (systemd's have some 200 bytes); one is not of use in parts.
const CURSOR_MAX_BYTES: usize = 1024;
/// How long a full queue is waited for before the journal is closed and, later, taken up at its cursor.
const FULL_WAIT: Duration = Duration::from_millis(200);
/// Pause before the journal is opened again: doubled up to the maximum, reset by an entry.
const REOPEN_PAUSE_MIN: Duration = Duration::from_millis(100);
const REOPEN_PAUSE_MAX: Duration = Duration::from_secs(2);

const FIELDS: &str = "MESSAGE,MESSAGE_ID,PRIORITY,SYSLOG_IDENTIFIER,UNIT,_SYSTEMD_UNIT,_PID,_TRANSPORT,\
EXIT_CODE,EXIT_STATUS,COMMAND,N_RESTARTS,JOB_RESULT,UNIT_RESULT";

/// Message ids of the manager's own messages (`sd-messages.h`; the same in `systemd.catalog` of systemd 252).
pub mod message_id {
    /// A start job has begun.
    pub const UNIT_STARTING: &str = "7d4958e842da4a758f6c1cdc7b36dcc5";
    /// A start job has finished successfully.
    pub const UNIT_STARTED: &str = "39f53479d3a045ac8e11786248231fbf";
    /// A start job has failed.
    pub const UNIT_FAILED: &str = "be02cf6855d2428ba40df7e9d022f03d";
    /// A stop job has finished.
    pub const UNIT_STOPPED: &str = "9d1aaa27d60140bd96365438aad20286";
    /// A unit has entered the failed state, by itself.
    pub const UNIT_FAILURE_RESULT: &str = "d9b373ed55a64feb8242e02dbe79a49c";
    /// A process of a unit has exited (`EXIT_CODE`, `EXIT_STATUS`).
    pub const UNIT_PROCESS_EXIT: &str = "98e322203f7a4ed290d09fe03c09fe15";
    /// An automatic restart has been scheduled (`N_RESTARTS`).
    pub const UNIT_RESTART_SCHEDULED: &str = "5eb03494b6584870a536b337290809b3";
    /// A process of a unit was killed for want of memory.
    pub const UNIT_OUT_OF_MEMORY: &str = "fe6faa94e7774663a0da52717891d8ef";
}

/// One entry of a guest's journal.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct JournalEntry {
    /// Microseconds since the epoch, by the guest's clock.
    pub realtime_us: u64,
    /// Microseconds since the guest's boot.
    pub monotonic_us: u64,
    /// The unit it is about (`UNIT`), or else the unit that wrote it (`_SYSTEMD_UNIT`).
    pub unit: Option<String>,
    /// `SYSLOG_IDENTIFIER`.
    pub identifier: Option<String>,
    /// The process that wrote it.
    pub pid: Option<u32>,
    /// 0 (emergency) to 7 (debug).
    pub priority: Option<u8>,
    /// `MESSAGE_ID`, 32 hex digits: see [`message_id`].
    pub message_id: Option<String>,
    /// The text, with replacement characters where it is not UTF-8; at most 16 KiB of it.
    pub message: String,
    /// Whether the text was longer, or missing for its length.
    pub message_cut: bool,
    /// `exited`, `killed` or `dumped`, of a process of the unit.
    pub exit_code: Option<String>,
    /// Exit status or signal, of a process of the unit. systemd writes a number, or a name for a signal.
    pub exit_status: Option<String>,
    /// `N_RESTARTS`: how often the unit has been restarted.
    pub restarts: Option<u32>,
    /// `JOB_RESULT`: `done`, `failed`, `timeout`, ….
    pub job_result: Option<String>,
    /// `kernel`, `journal`, `stdout`, `syslog`, ….
    pub transport: Option<String>,
    /// The entry's place in the journal.
    pub cursor: String,
}

impl JournalEntry {
    /// Reads one line of `journalctl -o json`.
    pub fn parse(line: &[u8]) -> Result<JournalEntry, String> {
        let value: Value = serde_json::from_slice(line).map_err(|e| e.to_string())?;
        let Value::Object(fields) = value else { return Err("not a JSON object".into()) };
        let field = |name: &str| fields.get(name).and_then(text);
        let short = |name: &str| field(name).map(shortened);
        let number = |name: &str| field(name).and_then(|t| t.parse::<u64>().ok());
        let cursor = field("__CURSOR").filter(|cursor| cursor.len() <= CURSOR_MAX_BYTES).ok_or("no __CURSOR")?;
        let realtime_us = number("__REALTIME_TIMESTAMP").ok_or("no __REALTIME_TIMESTAMP")?;
        let mut message = field("MESSAGE").unwrap_or_default();
        let mut message_cut = fields.get("MESSAGE").is_some_and(Value::is_null);
        if message.len() > MESSAGE_MAX_BYTES {
            let end = (0..=MESSAGE_MAX_BYTES).rev().find(|&at| message.is_char_boundary(at)).unwrap_or(0);
            message.truncate(end);
            message_cut = true;
        }
        Ok(JournalEntry {
            realtime_us,
            monotonic_us: number("__MONOTONIC_TIMESTAMP").unwrap_or_default(),
            unit: short("UNIT").or_else(|| short("_SYSTEMD_UNIT")),
            identifier: short("SYSLOG_IDENTIFIER"),
            pid: number("_PID").and_then(|n| u32::try_from(n).ok()),
            priority: number("PRIORITY").and_then(|n| u8::try_from(n).ok()),
            message_id: short("MESSAGE_ID"),
            message,
            message_cut,
            exit_code: short("EXIT_CODE"),
            exit_status: short("EXIT_STATUS"),
            restarts: number("N_RESTARTS").and_then(|n| u32::try_from(n).ok()),
            job_result: short("JOB_RESULT"),
            transport: short("_TRANSPORT"),
            cursor,
        })
    }

    /// What is left of an entry whose line was too long to be read: where and when it was.
    fn of_cut_line(line: &[u8]) -> Option<JournalEntry> {
        let head = String::from_utf8_lossy(line);
        let value = |name: &str| {
            let rest = head.split_once(&format!("\"{name}\":\""))?.1;
            rest.split_once('"').map(|(value, _)| value.to_owned())
        };
        let number = |name: &str| value(name).and_then(|text| text.parse::<u64>().ok());
        Some(JournalEntry {
            cursor: value("__CURSOR").filter(|cursor| cursor.len() <= CURSOR_MAX_BYTES)?,
            realtime_us: number("__REALTIME_TIMESTAMP")?,
            monotonic_us: number("__MONOTONIC_TIMESTAMP").unwrap_or_default(),
            message_cut: true,
            ..JournalEntry::default()
        })
    }

    fn about(&self, id: &str, unit: &str) -> bool {
        self.message_id.as_deref() == Some(id) && self.unit.as_deref() == Some(unit)
    }

    /// Whether it says that `unit` has started.
    pub fn unit_started(&self, unit: &str) -> bool {
        self.about(message_id::UNIT_STARTED, unit)
    }

    /// Whether it says that a start of `unit` failed, or that `unit` failed by itself.
    pub fn unit_failed(&self, unit: &str) -> bool {
        self.about(message_id::UNIT_FAILED, unit) || self.about(message_id::UNIT_FAILURE_RESULT, unit)
    }

    /// Whether it says that a process of `unit` exited: see [`JournalEntry::exit_status`].
    pub fn process_exited(&self, unit: &str) -> bool {
        self.about(message_id::UNIT_PROCESS_EXIT, unit)
    }

    /// Whether it says that `unit` will be restarted: see [`JournalEntry::restarts`].
    pub fn restart_scheduled(&self, unit: &str) -> bool {
        self.about(message_id::UNIT_RESTART_SCHEDULED, unit)
    }
}

/// A field's text: a string, an array of bytes, or the first of several values.
/// A field that is shown beside a message: one line, and not endless.
fn shortened(mut text: String) -> String {
    let end = (0..=text.len().min(FIELD_MAX_BYTES)).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
    text.truncate(end);
    text.replace(['\n', '\r'], " ")
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Array(items) if items.iter().all(Value::is_number) && !items.is_empty() => {
            let bytes: Vec<u8> = items.iter().filter_map(|n| n.as_u64().and_then(|n| u8::try_from(n).ok())).collect();
            Some(String::from_utf8_lossy(&bytes).into_owned())
        }
        Value::Array(items) => items.first().and_then(text),
        _ => None,
    }
}

#[derive(Debug, Default)]
struct Counters {
    opened: AtomicU64,
    malformed: AtomicU64,
}

/// A guest's journal as a sequence of entries, from boot on.
///
/// It survives the loss of the connection, a restarted sshd and a slow reader: it goes on after the last
/// entry that was taken into its queue. It ends when it is dropped, or when the guest can never be reached
/// again (another host key, a refused login, [`Guest::disconnect`]).
#[derive(Debug)]
pub struct Journal {
    entries: mpsc::Receiver<JournalEntry>,
    counters: Arc<Counters>,
    task: tokio::task::JoinHandle<()>,
}

impl Journal {
    /// Starts to follow.
    pub fn follow(guest: Guest) -> Journal {
        Journal::follow_with(guest, "journalctl", QUEUE_ENTRIES)
    }

    /// As [`Journal::follow`], with another program and queue length.
    pub(super) fn follow_with(guest: Guest, program: &str, queue: usize) -> Journal {
        let (sender, entries) = mpsc::channel(queue);
        let counters = Arc::new(Counters::default());
        let task = tokio::spawn(follow(guest, program.to_owned(), sender, Arc::clone(&counters)));
        Journal { entries, counters, task }
    }

    /// The next entry. Cancel-safe. `None`: see [`Journal`] for when it ends.
    pub async fn next(&mut self) -> Option<JournalEntry> {
        self.entries.recv().await
    }

    /// An entry that is there already.
    pub fn try_next(&mut self) -> Option<JournalEntry> {
        self.entries.try_recv().ok()
    }

    /// How often journalctl was started in the guest: 1 means that it was never interrupted.
    pub fn opened(&self) -> u64 {
        self.counters.opened.load(Ordering::Relaxed)
    }

    /// Lines that were no entries and were left out.
    pub fn malformed(&self) -> u64 {
        self.counters.malformed.load(Ordering::Relaxed)
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn follow(guest: Guest, program: String, sender: mpsc::Sender<JournalEntry>, counters: Arc<Counters>) {
    let mut cursor: Option<String> = None;
    let mut pause = REOPEN_PAUSE_MIN;
    let interrupted = |reason: String| guest.target().news.tell(SshNews::JournalInterrupted { reason });
    while !sender.is_closed() {
        let before = cursor.clone();
        let ended = follow_once(&guest, &program, &sender, &counters, &mut cursor).await;
        match ended {
            Ok(Ended::ReaderGone) => return,
            Ok(Ended::ReaderSlow) => {
                // Nothing is read from the guest until there is room again.
                if sender.reserve().await.is_err() {
                    return;
                }
                continue;
            }
            Ok(Ended::Channel(end)) => interrupted(end.to_string()),
            Err(e) if e.is_permanent() => {
                interrupted(format!("for good: {e}"));
                return;
            }
            Err(e) => interrupted(e.to_string()),
        }
        pause = if cursor == before { (pause * 2).min(REOPEN_PAUSE_MAX) } else { REOPEN_PAUSE_MIN };
        tokio::time::sleep(pause).await;
    }
}

enum Ended {
    Channel(StreamEnd),
    ReaderGone,
    ReaderSlow,
}

/// The command that continues after `cursor`. A whole journal, not the last ten lines, is what `-f` shows with `--lines=all`.
fn command(program: &str, cursor: Option<&str>) -> String {
    // Without --all, fields of more than 4096 bytes are left out.
    let mut command = format!(
        "exec {program} --quiet --no-pager --boot --follow --lines=all --all --output=json --output-fields={FIELDS}"
    );
    if let Some(cursor) = cursor {
        command.push_str(" --after-cursor=");
        command.push_str(&quote(cursor));
    }
    command
}

async fn follow_once(
    guest: &Guest,
    program: &str,
    sender: &mpsc::Sender<JournalEntry>,
    counters: &Counters,
    cursor: &mut Option<String>,
) -> Result<Ended, GuestError> {
    let session = guest.start_within_limit(&command(program, cursor.as_deref())).await?;
    counters.opened.fetch_add(1, Ordering::Relaxed);
    let mut lines = Lines::with_limit(session, LINE_MAX_BYTES);
    loop {
        let (bytes, cut) = match lines.next().await {
            // Half an entry, with the connection lost in its middle: it comes again, whole.
            Step::Line { whole: false, .. } => continue,
            Step::Line { source: Source::Stdout, bytes, cut, .. } => (bytes, cut),
            Step::Line { source: Source::Stderr, bytes, .. } => {
                tracing::debug!(node = guest.node(), line = %String::from_utf8_lossy(&bytes), "journalctl");
                continue;
            }
            Step::End(end) => return Ok(Ended::Channel(end)),
        };
        let entry = match JournalEntry::parse(&bytes) {
            Ok(entry) if cursor.as_deref() == Some(entry.cursor.as_str()) => continue,
            Ok(entry) => entry,
            Err(reason) => match JournalEntry::of_cut_line(&bytes).filter(|_| cut) {
                Some(entry) => entry,
                None => {
                    counters.malformed.fetch_add(1, Ordering::Relaxed);
                    tracing::debug!(node = guest.node(), reason, cut, "journal line left out");
                    continue;
                }
            },
        };
        let place = entry.cursor.clone();
        match sender.send_timeout(entry, FULL_WAIT).await {
            Ok(()) => *cursor = Some(place),
            Err(SendTimeoutError::Timeout(_)) => return Ok(Ended::ReaderSlow),
            Err(SendTimeoutError::Closed(_)) => return Ok(Ended::ReaderGone),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXIT: &str = r#"{"__CURSOR":"s=1;i=2","__REALTIME_TIMESTAMP":"1795228350123456","__MONOTONIC_TIMESTAMP":"8123456","_BOOT_ID":"b","MESSAGE":"k3s-server.service: Main process exited, code=exited, status=255/EXCEPTION","MESSAGE_ID":"98e322203f7a4ed290d09fe03c09fe15","UNIT":"k3s-server.service","_SYSTEMD_UNIT":"init.scope","_PID":"1","PRIORITY":"5","SYSLOG_IDENTIFIER":"systemd","_TRANSPORT":"journal","EXIT_CODE":"exited","EXIT_STATUS":"255"}"#;

    #[test]
    fn an_entry_of_the_manager_is_about_the_unit_it_names() {
        let entry = JournalEntry::parse(EXIT.as_bytes()).unwrap();
        assert_eq!(entry.realtime_us, 1_795_228_350_123_456);
        assert_eq!(entry.monotonic_us, 8_123_456);
        assert_eq!(entry.pid, Some(1));
        assert_eq!(entry.priority, Some(5));
        assert_eq!(entry.exit_status.as_deref(), Some("255"));
        assert!(entry.process_exited("k3s-server.service"));
        assert!(!entry.process_exited("k3s-agent.service"));
        assert!(!entry.unit_failed("k3s-server.service"));
        assert_eq!(entry.cursor, "s=1;i=2");
    }

    #[test]
    fn messages_in_all_forms_of_journalctl() {
        let with = |message: &str| {
            let line = format!(
                r#"{{"__CURSOR":"c","__REALTIME_TIMESTAMP":"1","_SYSTEMD_UNIT":"a.service","MESSAGE":{message}}}"#
            );
            JournalEntry::parse(line.as_bytes()).unwrap()
        };
        assert_eq!(with(r#""plain""#).message, "plain");
        assert_eq!(with("[104,105,255]").message, "hi\u{fffd}");
        assert_eq!(with(r#"["first","second"]"#).message, "first");
        assert_eq!(with("[[104,105],[1]]").message, "hi");
        let long = with("null");
        assert!(long.message.is_empty() && long.message_cut);
        let cut = with(&format!("\"{}\"", "ä".repeat(MESSAGE_MAX_BYTES)));
        assert!(cut.message_cut && cut.message.len() == MESSAGE_MAX_BYTES, "{}", cut.message.len());
        assert!(!with(&format!("\"{}\"", "x".repeat(MESSAGE_MAX_BYTES))).message_cut);
        assert_eq!(with(r#""x""#).unit.as_deref(), Some("a.service"));
        assert_eq!(with("[]").message, "");
    }

    #[test]
    fn what_programs_choose_themselves_is_one_short_line() {
        let line = |identifier: &str, cursor: &str| {
            let entry = serde_json::json!({
                "__CURSOR": cursor, "__REALTIME_TIMESTAMP": "1", "SYSLOG_IDENTIFIER": identifier, "MESSAGE": "x",
            });
            JournalEntry::parse(entry.to_string().as_bytes())
        };
        assert_eq!(line("a\nserver-2 k3s: forged", "c").unwrap().identifier.unwrap(), "a server-2 k3s: forged");
        let long = line(&"\u{e4}".repeat(100_000), "c").unwrap().identifier.unwrap();
        assert_eq!(long.len(), FIELD_MAX_BYTES);
        assert!(line("a", &"c".repeat(5_000)).is_err());
    }

    #[test]
    fn what_is_no_entry_is_an_error() {
        for line in ["", "{", "[]", "null", r#"{"MESSAGE":"x"}"#, r#"{"__CURSOR":"c"}"#, "\u{1b}[31mred"] {
            assert!(JournalEntry::parse(line.as_bytes()).is_err(), "{line}");
        }
        assert!(JournalEntry::parse(&[0xff, 0xfe]).is_err());
    }

    #[test]
    fn the_cursor_is_quoted() {
        let line = command("journalctl", Some("s=a;i=1;b='x"));
        assert!(line.ends_with(r" --after-cursor='s=a;i=1;b='\''x'"), "{line}");
        assert!(!command("journalctl", None).contains("cursor"));
    }
}
