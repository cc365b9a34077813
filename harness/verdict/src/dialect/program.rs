//! What a program's own line tells about itself: its kind, its level, its time.

use jiff::Timestamp;

use super::time;
use crate::evidence::SourceKind;
use crate::line::Level;

/// What a line says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Own {
    /// The program, where the form of the line gives it away.
    pub kind: Option<SourceKind>,
    /// The level.
    pub level: Option<Level>,
    /// The time it prints.
    pub at: Option<Timestamp>,
    /// Whether that time has a year.
    pub has_year: bool,
}

/// Reads a program's line.
#[must_use]
pub fn read(message: &[u8], year: i16) -> Own {
    match message.first() {
        Some(b'{') => zap(message),
        Some(b't' | b'l') => logrus(message).unwrap_or_else(|| named(message)),
        Some(b'I' | b'W' | b'E' | b'F' | b'D' | b'P') => {
            klog(message, year).or_else(|| terminal(message)).unwrap_or_else(|| named(message))
        }
        Some(b'0'..=b'9') => etcd_plain(message).unwrap_or_else(|| named(message)),
        Some(b'r') => etcd_raft(message).unwrap_or_else(|| named(message)),
        _ => named(message),
    }
}

/// Program of a syslog identifier or process name.
#[must_use]
pub fn of_unit(unit: &str) -> Option<SourceKind> {
    let name = unit.rsplit('/').next().unwrap_or(unit).trim_matches(|c| c == '(' || c == ')');
    if name.starts_with("qemu") {
        return Some(SourceKind::Qemu);
    }
    match name {
        "k3s" | "k3s-server" | "k3s-agent" | "rke2" | "rke2-server" | "rke2-agent" => Some(SourceKind::K3s),
        "etcd" => Some(SourceKind::Etcd),
        "systemd" => Some(SourceKind::Systemd),
        "kernel" => Some(SourceKind::Kernel),
        "curl" => Some(SourceKind::Curl),
        "sshd" | "ssh" => Some(SourceKind::Ssh),
        "vde_switch" | "vde_plug" | "wirefilter" => Some(SourceKind::Vde),
        "harness" => Some(SourceKind::Harness),
        "kubelet" | "kube-apiserver" | "kube-controller-manager" | "kube-controller" | "kube-scheduler" => {
            Some(SourceKind::Klog)
        }
        _ => None,
    }
}

/// Text of a `"key":"value"` pair near the start of a zap line, escapes left as they are.
fn json_value<'a>(line: &'a [u8], key: &[u8]) -> Option<&'a [u8]> {
    let window = &line[..line.len().min(512)];
    let at = window.windows(key.len()).position(|w| w == key)?;
    let value = &line[at + key.len()..];
    let end = value.iter().take(64).position(|&b| b == b'"')?;
    Some(&value[..end])
}

fn zap(message: &[u8]) -> Own {
    let Some(level) = json_value(message, b"\"level\":\"") else { return Own::default() };
    let at = json_value(message, b"\"ts\":\"").and_then(time::full).and_then(|s| s.at);
    // RKE2 and others print zap too; etcd's lines carry the caller.
    let kind = message.windows(10).take(512).any(|w| w == b"\"caller\":\"").then_some(SourceKind::Etcd);
    Own { kind, level: Level::from_word(level), at, has_year: at.is_some() }
}

fn logrus(message: &[u8]) -> Option<Own> {
    let (at, rest) = if let Some(rest) = message.strip_prefix(b"time=") {
        let rest = rest.strip_prefix(b"\"").unwrap_or(rest);
        let stamp = time::full(rest)?;
        let rest = stamp.rest.strip_prefix(b"\"").unwrap_or(stamp.rest);
        (stamp.at, rest.trim_ascii_start())
    } else {
        (None, message)
    };
    let level = rest.strip_prefix(b"level=")?;
    let end = level.iter().position(|b| !b.is_ascii_alphabetic()).unwrap_or(level.len());
    Some(Own { kind: Some(SourceKind::K3s), level: Level::from_word(&level[..end]), at, has_year: at.is_some() })
}

/// `FATA[0000] …`, logrus on a terminal.
fn terminal(message: &[u8]) -> Option<Own> {
    let word = message.get(..4)?;
    let level = Level::from_word(word)?;
    (message.get(4) == Some(&b'[') && word.iter().all(u8::is_ascii_uppercase)).then_some(Own {
        kind: Some(SourceKind::K3s),
        level: Some(level),
        at: None,
        has_year: false,
    })
}

fn klog(message: &[u8], year: i16) -> Option<Own> {
    let level = match message.first()? {
        b'I' => Level::Info,
        b'W' => Level::Warning,
        b'E' => Level::Error,
        b'F' => Level::Fatal,
        _ => return None,
    };
    let stamp = time::klog(&message[1..], year)?;
    Some(Own { kind: Some(SourceKind::Klog), level: Some(level), at: stamp.at, has_year: false })
}

/// `2026-11-21 02:10:46.665123 W | raft: …`
fn etcd_plain(message: &[u8]) -> Option<Own> {
    let stamp = time::full(message)?;
    let level = match stamp.rest.get(..5)? {
        b" D | " => Level::Debug,
        b" I | " | b" N | " => Level::Info,
        b" W | " => Level::Warning,
        b" E | " => Level::Error,
        b" C | " => Level::Fatal,
        _ => return Some(Own { at: stamp.at, has_year: true, ..Own::default() }),
    };
    Some(Own { kind: Some(SourceKind::Etcd), level: Some(level), at: stamp.at, has_year: true })
}

/// `raft2026/11/21 02:10:47 INFO: …`
fn etcd_raft(message: &[u8]) -> Option<Own> {
    let stamp = time::full(message.strip_prefix(b"raft")?)?;
    let word = stamp.rest.trim_ascii_start();
    let end = word.iter().position(|&b| b == b':')?;
    Some(Own { kind: Some(SourceKind::Etcd), level: Level::from_word(&word[..end]), at: stamp.at, has_year: true })
}

/// Lines that begin with the program's name.
fn named(message: &[u8]) -> Own {
    let kind = if message.starts_with(b"qemu-system-") || message.starts_with(b"qemu-kvm") {
        Some(SourceKind::Qemu)
    } else if message.starts_with(b"curl: (") {
        Some(SourceKind::Curl)
    } else if message.starts_with(b"INFO: task ") || message.starts_with(b"rcu: ") || message.starts_with(b"watchdog: ")
    {
        Some(SourceKind::Kernel)
    } else {
        let end = message.iter().take(80).position(|&b| b == b' ').unwrap_or(0);
        message[..end].ends_with(b".service:").then_some(SourceKind::Systemd)
    };
    Own { kind, ..Own::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_tell_themselves() {
        let cases: [(&str, Option<SourceKind>, Option<Level>, bool); 10] = [
            (
                "F1121 02:44:00.872970       1 server.go:205] leaderelection lost",
                Some(SourceKind::Klog),
                Some(Level::Fatal),
                true,
            ),
            ("time=\"2026-11-21T02:44:00Z\" level=fatal msg=\"x\"", Some(SourceKind::K3s), Some(Level::Fatal), true),
            ("level=error msg=\"x\"", Some(SourceKind::K3s), Some(Level::Error), false),
            ("FATA[0012] starting kubernetes", Some(SourceKind::K3s), Some(Level::Fatal), false),
            ("2026-11-21 02:10:46.665 W | raft: x", Some(SourceKind::Etcd), Some(Level::Warning), true),
            ("raft2026/11/21 02:10:47 INFO: x", Some(SourceKind::Etcd), Some(Level::Info), true),
            (
                r#"{"level":"warn","ts":"2026-11-21T02:32:38.512Z","caller":"auth/store.go:1366","msg":"x"}"#,
                Some(SourceKind::Etcd),
                Some(Level::Warning),
                true,
            ),
            ("qemu-system-x86_64: warning: x", Some(SourceKind::Qemu), None, false),
            ("k3s-server.service: Main process exited", Some(SourceKind::Systemd), None, false),
            ("Ein Satz.", None, None, false),
        ];
        for (line, kind, level, timed) in cases {
            let own = read(line.as_bytes(), 2026);
            assert_eq!((own.kind, own.level, own.at.is_some()), (kind, level, timed), "{line}");
        }
    }
}
