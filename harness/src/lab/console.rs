//! A guest's serial console: what it said last, and an end to what it may say.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::sync::Arc;
use std::time::Duration;

use camino::Utf8Path;
use kvm::Vm;

use crate::event::EventSink;
use crate::printable::printable;
use crate::redact::redact;

/// The largest console that is kept: a boot says some ten KiB, a kernel that reports everything a few MiB.
const CONSOLE_MAX_BYTES: u64 = 64 * 1024 * 1024;
/// How often its size is looked at, on the host. An emulated serial port passes a few MiB in that time at most.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How much of its end is looked through for the last words.
const TAIL_BYTES: u64 = 16 * 1024;
/// The longest line that is quoted, in characters.
const LINE_CHARS: usize = 200;

/// The last lines of a console's file that say anything, safe to be shown; none where there is no such file.
#[must_use]
pub fn last_words(path: &Utf8Path, lines: usize) -> Vec<String> {
    let mut tail = Vec::new();
    let read = File::open(path).and_then(|mut file| {
        let from = file.metadata()?.len().saturating_sub(TAIL_BYTES);
        file.seek(SeekFrom::Start(from))?;
        file.take(TAIL_BYTES).read_to_end(&mut tail)
    });
    if read.is_err() {
        return Vec::new();
    }
    let text = String::from_utf8_lossy(&tail);
    let said = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).map(quotable).collect::<Vec<_>>();
    said[said.len().saturating_sub(lines)..].to_vec()
}

fn quotable(line: &str) -> String {
    let line = redact(line);
    let line = printable(&line);
    match line.char_indices().nth(LINE_CHARS) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.into_owned(),
    }
}

/// Unplugs a console that floods: QEMU appends whatever the guest says, and the host's disk is not the guest's to fill.
pub(super) async fn bound(vm: Arc<Vm>, sink: EventSink) {
    let path = &vm.spec().console_log;
    let mut tick = tokio::time::interval(LOOK_EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        if std::fs::metadata(path).is_ok_and(|meta| meta.len() > CONSOLE_MAX_BYTES) {
            break;
        }
    }
    let name = vm.name();
    let mib = CONSOLE_MAX_BYTES / (1024 * 1024);
    match vm.unplug_console().await {
        Ok(()) => sink.warn(format!("{name} floods its console: what it says after the first {mib} MiB is not kept")),
        Err(error) => sink.warn(format!("{name} floods its console, which cannot be unplugged: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_words_are_few_short_and_safe() {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(dir.path()).unwrap().join("console.log");
        assert!(last_words(&path, 3).is_empty());
        let endless = "x".repeat(100_000);
        let text = format!(
            "{endless}\r\n[ 1.0] one\r\n\r\n\x1b[31m[ 2.0] two\x1b[0m\r\n\0\u{9b}2Jthree K3S_TOKEN=secret \u{fffd}"
        );
        std::fs::write(&path, text.as_bytes()).unwrap();
        assert_eq!(
            last_words(&path, 3),
            ["[ 1.0] one", "\\x1b[31m[ 2.0] two\\x1b[0m", "\\x00\\x9b2Jthree K3S_TOKEN=<token redacted> \u{fffd}"]
        );
        let all = last_words(&path, 10);
        assert_eq!((all.len(), all[0].chars().count()), (4, LINE_CHARS + 1));
        std::fs::write(&path, b"\xff\xfe binary \xf0").unwrap();
        assert_eq!(last_words(&path, 3), ["\u{fffd}\u{fffd} binary \u{fffd}"]);
    }
}
