//! The two log dialects of k3s on standard error: logrus (`time="…" level=info msg="…"`, nine
//! digits of a second as k3s 1.21 prints them) and klog (`I1121 02:37:28.993769     641 file.go:1] …`).

use std::fmt::Write as _;
use std::io::Write as _;

use jiff::Timestamp;
use jiff::tz::TimeZone;

/// Levels of a logrus line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    Info,
    Warning,
    Error,
    Fatal,
}

impl Level {
    fn word(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
            Self::Fatal => "fatal",
        }
    }
}

/// Writes one whole line at once, so that lines of etcd and ours never mix. A standard error
/// that is gone cannot be reported anywhere: the failure is dropped.
pub(crate) fn raw_line(line: &str) {
    let mut buffer = Vec::with_capacity(line.len() + 1);
    buffer.extend_from_slice(line.as_bytes());
    buffer.push(b'\n');
    let _ = std::io::stderr().lock().write_all(&buffer);
}

/// Quotes as Go's `%q` does for what log lines hold.
fn quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c.is_control() => {
                let _ = write!(out, "\\x{:02x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

fn bare(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._/@^+".contains(&b))
}

fn format_logrus(at: Timestamp, level: Level, msg: &str) -> String {
    let msg = if bare(msg) { msg.to_owned() } else { quote(msg) };
    format!("time=\"{at:.9}\" level={} msg={msg}", level.word())
}

fn format_klog(at: Timestamp, severity: char, pid: u32, place: &str, msg: &str) -> String {
    let t = TimeZone::UTC.to_datetime(at);
    format!(
        "{severity}{:02}{:02} {:02}:{:02}:{:02}.{:06} {pid:7} {place}] {msg}",
        t.month(),
        t.day(),
        t.hour(),
        t.minute(),
        t.second(),
        t.subsec_nanosecond() / 1000,
    )
}

/// One logrus line.
pub(crate) fn logrus(level: Level, msg: &str) {
    raw_line(&format_logrus(Timestamp::now(), level, msg));
}

/// `level=info`.
pub(crate) fn info(msg: impl AsRef<str>) {
    logrus(Level::Info, msg.as_ref());
}

/// `level=warning`.
pub(crate) fn warn(msg: impl AsRef<str>) {
    logrus(Level::Warning, msg.as_ref());
}

/// `level=error`.
pub(crate) fn error(msg: impl AsRef<str>) {
    logrus(Level::Error, msg.as_ref());
}

/// One klog line; `severity` is `I`, `W`, `E` or `F`, `place` is `file.go:LINE`.
pub(crate) fn klog(severity: char, place: &str, msg: &str) {
    raw_line(&format_klog(Timestamp::now(), severity, std::process::id(), place, msg));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at() -> Timestamp {
        Timestamp::new(1_795_228_349, 432_668_020).unwrap()
    }

    #[test]
    fn logrus_line_is_as_k3s_prints_it() {
        assert_eq!(
            format_logrus(at(), Level::Info, "Managed etcd cluster initializing"),
            "time=\"2026-11-21T02:32:29.432668020Z\" level=info msg=\"Managed etcd cluster initializing\""
        );
        assert_eq!(
            format_logrus(at(), Level::Fatal, "Get \"https://x\": EOF"),
            "time=\"2026-11-21T02:32:29.432668020Z\" level=fatal msg=\"Get \\\"https://x\\\": EOF\""
        );
        assert!(format_logrus(at(), Level::Error, "word").ends_with("msg=word"));
    }

    #[test]
    fn klog_line_is_as_k3s_prints_it() {
        assert_eq!(
            format_klog(at(), 'I', 641, "shared_informer.go:240", "Waiting"),
            "I1121 02:32:29.432668     641 shared_informer.go:240] Waiting"
        );
    }
}
