//! One line of a log without its wrappers.

use std::borrow::Cow;

use jiff::Timestamp;

use crate::dialect::{ansi, json, program, time, trace, wrapper};
use crate::evidence::SourceKind;

/// JSON inside a wrapper inside JSON …: how deep a line is followed.
const NESTING_MAX: usize = 4;

/// Lines searched for a year.
const YEAR_LINES_MAX: usize = 2_000;
/// Part of such a line that is looked at, bytes.
const YEAR_LINE_BYTES_MAX: usize = 1_024;

/// A level, whoever printed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// `debug`, `trace`.
    Debug,
    /// `info`, `notice`.
    Info,
    /// `warn`, `warning`.
    Warning,
    /// `error`.
    Error,
    /// `fatal`, `panic`, `critical`.
    Fatal,
}

impl Level {
    /// Level of a word as logrus, zap and etcd spell it.
    #[must_use]
    pub fn from_word(word: &[u8]) -> Option<Self> {
        Some(match word {
            b"debug" | b"trace" | b"DEBU" | b"TRAC" | b"DEBUG" => Self::Debug,
            b"info" | b"INFO" | b"notice" => Self::Info,
            b"warn" | b"warning" | b"WARN" | b"WARNING" => Self::Warning,
            b"error" | b"ERRO" | b"ERROR" => Self::Error,
            b"fatal" | b"panic" | b"dpanic" | b"FATA" | b"PANI" | b"critical" => Self::Fatal,
            _ => return None,
        })
    }
}

/// A line and what it tells about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line<'a> {
    /// When it was said: the outermost wrapper's time, else the program's own.
    pub at: Option<Timestamp>,
    /// The time counts from boot, not from 1970.
    pub since_boot: bool,
    /// Host, VM or container.
    pub node: Option<Cow<'a, str>>,
    /// Program or syslog identifier.
    pub unit: Option<Cow<'a, str>>,
    /// Process id.
    pub pid: Option<u32>,
    /// Best guess at the program.
    pub kind: SourceKind,
    /// Level.
    pub level: Option<Level>,
    /// A frame of a goroutine dump; nothing to learn from it.
    pub trace: bool,
    /// The program's own line, its level and time still in it.
    pub message: Cow<'a, [u8]>,
}

impl Line<'_> {
    /// The message as text; bytes that are no UTF-8 are replaced.
    #[must_use]
    pub fn text(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.message)
    }
}

/// Reads lines of one log. It remembers the year once a line has printed one.
#[derive(Debug, Clone)]
pub struct LineReader {
    year: i16,
}

impl Default for LineReader {
    fn default() -> Self {
        Self { year: time::YEAR_UNKNOWN }
    }
}

impl LineReader {
    /// A reader that knows no year yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A reader for a log whose lines without a year are from `year`.
    #[must_use]
    pub fn with_year(year: i16) -> Self {
        Self { year }
    }

    /// Takes the wrappers off a line. Never fails: what fits no dialect is its own message.
    pub fn read<'a>(&mut self, raw: &'a [u8]) -> Line<'a> {
        let raw = raw.strip_suffix(b"\n").unwrap_or(raw);
        let raw = raw.strip_suffix(b"\r").unwrap_or(raw);
        let raw = raw.strip_prefix("\u{feff}".as_bytes()).unwrap_or(raw);
        match ansi::strip(raw) {
            Cow::Borrowed(text) => self.borrowed(text, NESTING_MAX),
            Cow::Owned(text) => into_owned(self.borrowed(&text, NESTING_MAX)),
        }
    }

    fn borrowed<'a>(&mut self, text: &'a [u8], depth: usize) -> Line<'a> {
        let year = self.year;
        let line = self.unwrapped(text, depth);
        // A year that stands inside the line is the year of its wrapper too.
        if self.year == year { line } else { self.unwrapped(text, depth) }
    }

    fn unwrapped<'a>(&mut self, text: &'a [u8], depth: usize) -> Line<'a> {
        let (head, message) = wrapper::peel(text, self.year);
        let mut line = Line {
            at: head.at,
            since_boot: head.since_boot,
            node: head.node.map(String::from_utf8_lossy),
            unit: head.unit.map(String::from_utf8_lossy),
            pid: head.pid,
            kind: SourceKind::Unknown,
            level: None,
            trace: false,
            message: Cow::Borrowed(message),
        };
        if head.has_year {
            self.learn(head.at);
        }
        if let Some(inner) = (depth > 0).then(|| json::unwrap(message)).flatten() {
            self.learn(inner.at);
            let text = ansi::strip(&inner.message).into_owned();
            let nested = into_owned(self.borrowed(&text, depth - 1));
            line.at = line.at.filter(|_| !line.since_boot).or(inner.at).or(nested.at);
            line.since_boot = nested.since_boot && inner.at.is_none();
            line.node = line.node.or(inner.node.map(Cow::Owned)).or(nested.node);
            line.unit = inner.unit.map(Cow::Owned).or(nested.unit).or(line.unit);
            line.pid = inner.pid.or(nested.pid).or(line.pid);
            line.level = nested.level;
            line.trace = nested.trace;
            line.kind = kind(nested.kind, line.unit.as_deref(), false, head.build);
            line.message = nested.message;
            return line;
        }
        let own = program::read(message, self.year);
        if own.has_year {
            self.learn(own.at);
        }
        line.level = own.level;
        if line.at.is_none() || (line.since_boot && own.has_year && own.at.is_some()) {
            line.at = own.at.or(line.at);
            line.since_boot = line.since_boot && own.at.is_none();
        }
        line.trace = trace::is_goroutine_dump(message);
        line.kind = kind(own.kind.unwrap_or_default(), line.unit.as_deref(), head.kernel, head.build);
        line
    }

    /// Looks for a line that prints its year in the beginning of a log, for the lines that come before it.
    pub fn find_year(&mut self, start: &[u8]) {
        for line in start.split(|&b| b == b'\n').take(YEAR_LINES_MAX) {
            if self.year != time::YEAR_UNKNOWN {
                break;
            }
            let _ = self.read(&line[..line.len().min(YEAR_LINE_BYTES_MAX)]);
        }
    }

    fn learn(&mut self, at: Option<Timestamp>) {
        if let Some(at) = at.filter(|at| self.year == time::YEAR_UNKNOWN && at.as_second() > 0) {
            self.year = at.to_zoned(jiff::tz::TimeZone::UTC).year();
        }
    }
}

/// The line's own form says more than the unit's name: etcd and klog lines come out of k3s.
fn kind(own: SourceKind, unit: Option<&str>, kernel: bool, build: bool) -> SourceKind {
    if own != SourceKind::Unknown {
        return own;
    }
    match unit.and_then(program::of_unit) {
        Some(kind) => kind,
        None if kernel => SourceKind::Kernel,
        None if build => SourceKind::Build,
        None => SourceKind::Unknown,
    }
}

/// A line that outlives its text.
#[must_use]
pub fn into_owned(line: Line<'_>) -> Line<'static> {
    Line {
        at: line.at,
        since_boot: line.since_boot,
        node: line.node.map(|n| Cow::Owned(n.into_owned())),
        unit: line.unit.map(|u| Cow::Owned(u.into_owned())),
        pid: line.pid,
        kind: line.kind,
        level: line.level,
        trace: line.trace,
        message: Cow::Owned(line.message.into_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn show(raw: &str) -> String {
        let line = LineReader::with_year(2026).read(raw.as_bytes());
        format!(
            "{} {}/{}[{}] {} {}",
            line.at.map_or("-".to_owned(), |t| t.to_string()),
            line.node.as_deref().unwrap_or("-"),
            line.unit.as_deref().unwrap_or("-"),
            line.pid.map_or("-".to_owned(), |p| p.to_string()),
            line.kind,
            line.text()
        )
    }

    #[test]
    fn one_line_in_every_wrapper() {
        let f = "F1121 02:44:00.872970       1 server.go:205] leaderelection lost";
        let t = "2026-11-21T02:44:00";
        let cases = [
            (f.to_owned(), format!("{t}.87297Z -/-[-] klog {f}")),
            (format!("Nov 21 02:44:00 server-1 k3s[532]: {f}"), format!("{t}Z server-1/k3s[532] klog {f}")),
            (
                format!("Nov 21 02:44:00.872990 server-1 k3s[532]: {f}"),
                format!("{t}.87299Z server-1/k3s[532] klog {f}"),
            ),
            (format!("11月 21 02:44:00 server-1 k3s[532]: {f}"), format!("{t}Z server-1/k3s[532] klog {f}")),
            (format!("1795229040.872990 server-1 k3s[532]: {f}"), format!("{t}.87299Z server-1/k3s[532] klog {f}")),
            (format!("k3s.log:{f}"), format!("{t}.87297Z -/-[-] klog {f}")),
            (format!("./k3s.log:17:{f}"), format!("{t}.87297Z -/-[-] klog {f}")),
            (format!("/tmp/k3s:17:3:{f}"), format!("{t}.87297Z -/-[-] klog {f}")),
            (
                format!("run/server-2/journal.log:17:Nov 21 02:44:00 debian k3s[532]: {f}"),
                format!("{t}Z server-2/k3s[532] klog {f}"),
            ),
            (
                format!("a.log:17:1795229040.872990 server-1 k3s[532]: {f}"),
                format!("{t}.87299Z server-1/k3s[532] klog {f}"),
            ),
            (format!("{t}Z a.log:17:{f}"), format!("{t}Z -/-[-] klog {f}")),
            (format!("server-1 k3s[532]: {f}"), format!("{t}.87297Z server-1/k3s[532] klog {f}")),
            (format!("Nov 21 02:44:00 k3s[532]: {f}"), format!("{t}Z -/k3s[532] klog {f}")),
            (format!("Sat 2026-11-21 02:44:00 UTC server-1 k3s[532]: {f}"), format!("{t}Z server-1/k3s[532] klog {f}")),
            (format!("<30>1 {t}.5Z server-1 k3s 532 - - {f}"), format!("{t}.5Z server-1/k3s[532] klog {f}")),
            (format!("<30>1 {t}Z - k3s - x [a b=\"c d\"] {f}"), format!("{t}Z -/k3s[-] klog {f}")),
            (format!("{t}.123456Z 01E {f}"), format!("{t}.123456Z -/-[-] klog {f}")),
            (format!("{t}.123456Z 0aO+{f}"), format!("{t}.123456Z -/-[-] klog {f}")),
            (format!("section_start:1795229040:job\r\x1b[0K{f}"), format!("{t}.87297Z -/-[-] klog {f}")),
            (format!("[{t}.123Z] {f}"), format!("{t}.123Z -/-[-] klog {f}")),
            (format!("[pod/etcd-0/etcd] {t}.5Z {f}"), format!("{t}.5Z etcd-0/-[-] klog {f}")),
            (format!("{t}.1234567Z ##[error]{f}"), format!("{t}.1234567Z -/-[-] klog {f}")),
            (format!("::error file=a.c,line=1::{f}"), format!("{t}.87297Z -/-[-] klog {f}")),
            (format!("2026-11-21T02:44:00+0000 server-1 k3s[532]: {f}"), format!("{t}Z server-1/k3s[532] klog {f}")),
            (format!("2026-11-21T02:44:00.8729701Z {f}"), format!("{t}.8729701Z -/-[-] klog {f}")),
            (format!("2026-11-21T02:44:00.8Z stderr F {f}"), format!("{t}.8Z -/-[-] klog {f}")),
            (format!("build\tRun tests\t2026-11-21T02:44:00.8Z {f}"), format!("{t}.8Z -/-[-] klog {f}")),
            (format!("k3s-1  | {f}"), format!("{t}.87297Z k3s-1/-[-] klog {f}")),
            (format!("#19 0.210 {f}"), format!("{t}.87297Z -/-[-] klog {f}")),
            (
                format!("vm-test-run-k3s> agent # [   59.380000] k3s[632]: {f}"),
                format!("1970-01-01T00:00:59.38Z agent/k3s[632] klog {f}"),
            ),
            (
                format!("\u{1b}[31magent# [   59.38] k3s[632]: {f}\u{1b}[0m"),
                format!("1970-01-01T00:00:59.38Z agent/k3s[632] klog {f}"),
            ),
            (
                format!(r#"{{"log":"{f}\n","stream":"stderr","time":"2026-11-21T02:44:00.5Z"}}"#),
                format!("{t}.5Z -/-[-] klog {f}"),
            ),
            (
                format!(r#"{{"MESSAGE":"{f}","_HOSTNAME":"server-1","SYSLOG_IDENTIFIER":"k3s","_PID":"532"}}"#),
                format!("{t}.87297Z server-1/k3s[532] klog {f}"),
            ),
        ];
        for (raw, want) in cases {
            assert_eq!(show(&raw), want, "{raw}");
        }
    }

    #[test]
    fn messages_are_not_taken_for_wrappers() {
        for raw in [
            "panic: bootstrap data already found and encrypted with different token",
            "2026-11-21 02:10:46.665 W | raft: x",
            "curl: (7) Failed to connect to 192.168.1.1 port 6443",
            "k3s-server.service: Main process exited, code=exited, status=1/FAILURE",
            "qemu-system-x86_64: warning: Number of SMP cpus requested (4) exceeds the recommended cpus supported by KVM (2)",
            "[<0>] p9_client_rpc+0x12e/0x510",
            "server.go:205] leaderelection lost",
            "main.go:12: panic: x",
            "10.0.0.1:6443: connect: connection refused",
            "/bin/sh: 1: k3s: Exec format error",
            "./ci/test.sh: line 3: /usr/local/bin/k3s: Exec format error",
            "ci/test.sh:12:echo 'failed to get CA certs: context deadline exceeded'",
            "src/server.rs:7:    \"bootstrap data already found and encrypted with different token\"",
            "https://192.168.200.1:6443/cacerts\": context deadline exceeded",
            "1795229040.872990 is no time of a journal",
        ] {
            assert_eq!(LineReader::new().read(raw.as_bytes()).text(), raw);
        }
        let endless = "a.b:".repeat(100_000);
        assert_eq!(LineReader::new().read(endless.as_bytes()).text(), endless);
        let ci = LineReader::new().read(b"2026-11-21T02:44:00.1Z panic: bootstrap data").text().into_owned();
        assert_eq!(ci, "panic: bootstrap data");
        let kernel = LineReader::new()
            .read(b"Nov 21 02:44:00 h kernel: [  363.1] INFO: task sync:1 blocked for more than 120 seconds.")
            .into_kind();
        assert_eq!(kernel, SourceKind::Kernel);
    }

    impl Line<'_> {
        fn into_kind(self) -> SourceKind {
            self.kind
        }
    }

    #[test]
    fn a_year_once_seen_is_kept() {
        let mut reader = LineReader::new();
        let _ = reader.read(b"time=\"2024-02-02T08:45:29Z\" level=info msg=\"x\"");
        let line = reader.read(b"Feb 02 08:45:30 host k3s[1]: x");
        assert_eq!(line.at.unwrap().to_string(), "2024-02-02T08:45:30Z");
        let both = LineReader::new().read(b"Feb 02 08:45:31 host k3s[1]: time=\"2024-02-02T08:45:29Z\" level=info").at;
        assert_eq!(both.unwrap().to_string(), "2024-02-02T08:45:31Z");
        let mut early = LineReader::new();
        early.find_year(b"Feb 02 08:45:29 host systemd[1]: x\nFeb 02 08:45:30 host k3s[1]: time=\"2024-02-02T08:45:29Z\" level=info\n");
        assert_eq!(early.read(b"Feb 02 08:45:29 host systemd[1]: x").at.unwrap().to_string(), "2024-02-02T08:45:29Z");
    }

    #[test]
    fn any_bytes_are_read_without_a_panic() {
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let seeds: [&[u8]; 8] = [
            b"Nov 21 02:44:00 server-1 k3s[532]: time=\"2026-11-21T02:44:00Z\" level=fatal msg=\"x\"",
            b"{\"MESSAGE\":[1,2,3],\"_PID\":\"7\"}",
            b"{\"log\":\"\\u00",
            b"agent # [   59.380000] k3s[632]: F1121 02:44:00.872970 1 a.go:1] x",
            b"2026-11-21T02:44:00.1Z stderr P \x1b[31m",
            b"#19 0.210 exec /bin/sh: exec format error",
            b"raft2026/11/21 02:10:47 INFO: x",
            b"[Fri Aug  2 20:05:01 2019] INFO: task",
        ];
        let mut reader = LineReader::new();
        for _ in 0..20_000 {
            let mut bytes = seeds[usize::try_from(next() % 8).unwrap()].to_vec();
            for _ in 0..next() % 6 {
                let at = usize::try_from(next()).unwrap_or(0) % bytes.len().max(1);
                match next() % 3 {
                    0 => bytes[at] = (next() & 0xff) as u8,
                    1 => bytes.truncate(at.max(1)),
                    _ => bytes.insert(at, (next() & 0xff) as u8),
                }
            }
            let line = reader.read(&bytes);
            assert!(line.message.len() <= bytes.len() * 2);
        }
    }
}
