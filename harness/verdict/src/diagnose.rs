//! Logs from elsewhere, streamed in constant memory.
//!
//! Speed comes from searching whole buffers for the anchors of all signs at once; only lines that hold one are unwrapped
//! and matched. That also is how goroutine dumps of 20,000 lines cost next to nothing.

use std::borrow::Cow;
use std::io::{self, BufRead, Read};

use jiff::Timestamp;

use crate::broken;
use crate::classify::{Classifier, Fatal, Place};
use crate::dialect::time;
use crate::evidence::SourceKind;
use crate::utf16;

/// Bytes searched at a time.
const BUFFER_BYTES: usize = 1 << 20;
/// Without a line end in so many bytes, a buffer is taken as a line of its own, its end repeated in the next one.
const OVERLAP_BYTES: usize = 512;
/// Farthest a journal export's entry is followed around its message, bytes.
const ENTRY_BYTES_MAX: usize = 16 << 10;

/// Texts that send a line to the slow path besides the signs' anchors: messages journald prints as byte arrays, and lines
/// that say which host this is.
pub(crate) const EXTRA_ANCHORS: [&str; 5] =
    ["\"MESSAGE\":[", "\"MESSAGE\": [", "\"MESSAGE\" : [", "Hostname set to", " login: "];

/// What was read of a log.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Scan {
    /// Bytes read.
    pub bytes: u64,
    /// Lines read.
    pub lines: u64,
    /// Lines that were looked at closely.
    pub examined: u64,
    /// Some of it was no text (NUL bytes).
    pub binary: bool,
    /// Node told by the file's folder or name.
    pub node: Option<String>,
    /// Program told by the file's name.
    pub source: SourceKind,
}

/// Node and program a file's path gives away: `run-7/server-1/journal.log` is a journal of `server-1`.
#[must_use]
pub fn infer(name: &str) -> (Option<String>, SourceKind) {
    let (folder, file, source) = infer_parts(name);
    (folder.or(file), source)
}

/// Node of the folder (certain), node in the file's name (a guess that lines may overrule), program.
fn infer_parts(name: &str) -> (Option<String>, Option<String>, SourceKind) {
    let mut parts: Vec<&str> = name.split(['/', '\\']).filter(|p| !p.is_empty()).collect();
    let file = parts.pop().unwrap_or("");
    let stem = file.split('.').next().unwrap_or(file);
    let source = match stem {
        "qemu" | "qemu-stderr" | "qmp" => SourceKind::Qemu,
        "vde" | "switch" => SourceKind::Vde,
        "dhcp" => SourceKind::Dhcp,
        "harness" | "events" => SourceKind::Harness,
        "ssh" => SourceKind::Ssh,
        "dmesg" | "kernel" => SourceKind::Kernel,
        "etcd" => SourceKind::Etcd,
        _ => SourceKind::Unknown,
    };
    // A run folder of the harness has `nodes/NAME/`, whatever the scenario calls its nodes.
    let of_run = parts.iter().rev().take(2).collect::<Vec<_>>();
    let of_run = matches!(of_run[..], [_, &"nodes"]).then(|| (*of_run[0]).to_owned());
    let folder = of_run.or_else(|| parts.iter().rev().find(|p| is_node_name(p)).map(|p| (*p).to_owned()));
    // `server-1-journal.log`, `server-1.log`, `console-server-1.txt`
    let in_file = || {
        let words: Vec<&str> = stem.split(['-', '_']).collect();
        words
            .windows(2)
            .find_map(|w| is_node_name(&format!("{}-{}", w[0], w[1])).then(|| format!("{}-{}", w[0], w[1])))
            .or_else(|| words.iter().find(|w| is_node_name(w)).map(|w| (*w).to_owned()))
    };
    (folder, in_file(), source)
}

/// `server-1`, `agent2`, `node_3`: a role and a number of at most three digits.
#[must_use]
pub fn is_node_name(name: &str) -> bool {
    let role = name.trim_end_matches(|c: char| c.is_ascii_digit());
    let role_word = role.trim_end_matches(['-', '_']);
    (1..=3).contains(&(name.len() - role.len()))
        && ["server", "agent", "node", "worker", "master", "control", "controlplane", "machine"].contains(&role_word)
}

/// Reads a log to its end and shows it to the classifier. `name` is the file's path as the user knows it.
///
/// Memory is constant. Bytes that are no text, lines of any length and UTF-16 are read as well as they can be.
///
/// # Errors
///
/// Only what `reader` gives; what was read until then has been observed.
pub fn diagnose_reader(name: &str, mut reader: impl BufRead, classifier: &mut Classifier) -> io::Result<Scan> {
    let start = reader.fill_buf()?;
    match utf16::order(start) {
        Some(order) => scan(name, utf16::Decoder::new(reader, order), classifier),
        None => scan(name, reader, classifier),
    }
}

fn scan(name: &str, mut reader: impl Read, classifier: &mut Classifier) -> io::Result<Scan> {
    let (folder, file, source) = infer_parts(name);
    let mut scanner = Scanner {
        name,
        classifier,
        folder: folder.clone(),
        file: file.clone(),
        scan: Scan { node: folder.or(file), source, ..Scan::default() },
        hostnames: Vec::new(),
    };
    scanner.classifier.begin_log();
    let mut first = true;
    let mut buffer = vec![0u8; BUFFER_BYTES];
    let mut held = 0;
    loop {
        let count = match reader.read(&mut buffer[held..]) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                scanner.block(&buffer[..held]);
                return Err(error);
            }
        };
        held += count;
        scanner.scan.bytes += count as u64;
        if first && (count == 0 || held == buffer.len()) {
            scanner.classifier.find_year(&buffer[..held]);
            first = false;
        }
        if count == 0 {
            scanner.block(&buffer[..held]);
            // The last line may lack its end.
            scanner.scan.lines += u64::from(held > 0 && buffer[held - 1] != b'\n');
            break;
        }
        if held < buffer.len() {
            continue;
        }
        let (end, keep_from) = match buffer.iter().rposition(|&b| b == b'\n') {
            Some(newline) => (newline + 1, newline + 1),
            None => (held, held - OVERLAP_BYTES),
        };
        scanner.block(&buffer[..end]);
        buffer.copy_within(keep_from..held, 0);
        held -= keep_from;
    }
    scanner.finish();
    Ok(scanner.scan)
}

struct Scanner<'a> {
    name: &'a str,
    classifier: &'a mut Classifier,
    folder: Option<String>,
    file: Option<String>,
    scan: Scan,
    /// (node by file name or driver, host name the node gives itself), bounded by the number of nodes.
    hostnames: Vec<(String, String)>,
}

/// Most pairs of node and host name looked at.
const HOSTNAMES_MAX: usize = 64;

impl Scanner<'_> {
    /// Searches whole lines.
    fn block(&mut self, block: &[u8]) {
        let prefilter = std::sync::Arc::clone(&self.classifier.compiled);
        self.scan.binary |= block.iter().take(4096).any(|&b| b == 0);
        let mut counted = 0;
        let mut at = 0;
        while let Some(found) = prefilter.prefilter.find_at(block, at) {
            let start = block[..found.start()].iter().rposition(|&b| b == b'\n').map_or(0, |n| n + 1);
            let end = block[found.end()..].iter().position(|&b| b == b'\n').map_or(block.len(), |n| found.end() + n);
            let broken = broken::mend(block, at, start.max(at)..end);
            let begin = broken.as_ref().map_or(start, |(range, _)| range.start);
            self.scan.lines += count_lines(&block[counted..begin]);
            counted = begin;
            at = match broken {
                Some((range, text)) => {
                    let _ = self.text(&text, None);
                    range.end
                }
                None => {
                    let _ = self.line(block, start.max(at), end);
                    end
                }
            };
            if at >= block.len() {
                break;
            }
        }
        self.scan.lines += count_lines(&block[counted..]);
    }

    fn line(&mut self, block: &[u8], start: usize, end: usize) -> Option<Fatal> {
        let entry = export_entry(block, start, end);
        let text = entry.as_ref().map_or(&block[start..end], |e| e.message);
        self.text(text, entry.as_ref())
    }

    fn text(&mut self, text: &[u8], entry: Option<&Entry<'_>>) -> Option<Fatal> {
        self.scan.examined += 1;
        if is_echoed_script(text) {
            return None;
        }
        let entry_node = entry.and_then(|e| e.node.clone());
        let node = self.folder.clone().or_else(|| entry_node.map(Cow::into_owned));
        let file = self.file.clone();
        let place = Place {
            node: node.as_deref(),
            fallback_node: file.as_deref(),
            kind: self.scan.source,
            origin: self.name,
            line: Some(self.scan.lines + 1),
            at: entry.and_then(|e| e.at),
        };
        self.hostname(text, node.as_deref().or(file.as_deref()));
        self.classifier.take(text, &place)
    }

    /// Notes which host name a node gives itself.
    fn hostname(&mut self, raw: &[u8], node: Option<&str>) {
        let Some(host) = own_hostname(raw) else { return };
        let line = crate::line::LineReader::new().read(raw);
        // The node must come from outside the guest: the file's name or the driver's prefix, not the journal's host field.
        let outside =
            node.map(str::to_owned).or_else(|| line.node.as_deref().filter(|n| *n != host).map(str::to_owned));
        let Some(node) = outside else { return };
        let pair = (node, host);
        if self.hostnames.len() < HOSTNAMES_MAX && !self.hostnames.contains(&pair) {
            self.hostnames.push(pair);
        }
    }

    /// Nodes that call themselves by another node's name become evidence.
    fn finish(&mut self) {
        let same = |a: &str, b: &str| a.replace(['-', '_'], "").eq_ignore_ascii_case(&b.replace(['-', '_'], ""));
        let pairs = std::mem::take(&mut self.hostnames);
        for (node, host) in &pairs {
            let own_too = pairs.iter().any(|(n, h)| n == node && same(n, h));
            let role =
                |name: &str| name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '-' || c == '_').to_owned();
            // `worker-3` can be a CI machine's folder; only two names of one role contradict each other.
            if own_too || same(node, host) || !is_node_name(node) || !is_node_name(host) || role(node) != role(host) {
                continue;
            }
            let text = format!("identify: {node}: hostname is \"{host}\", plan says \"{node}\"");
            let place = Place { node: Some(node), kind: SourceKind::Harness, origin: self.name, ..Place::default() };
            let _ = self.classifier.take(text.as_bytes(), &place);
        }
    }
}

fn count_lines(text: &[u8]) -> u64 {
    text.iter().map(|&b| u64::from(b == b'\n')).sum()
}

/// GitHub Actions shows the script of a step before it runs it, each line in cyan; the Nix test driver's build lists its
/// script with line numbers. Neither happened.
fn is_echoed_script(raw: &[u8]) -> bool {
    let head = &raw[..raw.len().min(160)];
    let cyan = head.windows(7).position(|w| w == b"\x1b[36;1m");
    let before_is_stamp = |at: usize| {
        at <= 120 && head[..at].iter().all(|b| b.is_ascii_graphic() || matches!(b, b' ' | b'\t') || *b >= 0x80)
    };
    let echoed = cyan.is_some_and(|at| before_is_stamp(at) && head[..at].ends_with(b"Z "));
    echoed || head.starts_with(b"nixos-test-driver")
}

/// `Hostname set to <server-1>.` or `server-1 login: `.
fn own_hostname(raw: &[u8]) -> Option<String> {
    let text = &raw[..raw.len().min(512)];
    let find = |needle: &[u8]| text.windows(needle.len()).position(|w| w == needle);
    let name = if let Some(at) = find(b"Hostname set to ") {
        let rest = text[at + 16..].trim_ascii_start();
        let rest = rest.strip_prefix(b"<").unwrap_or(rest);
        let end = rest.iter().position(|b| !(b.is_ascii_alphanumeric() || b"-_".contains(b))).unwrap_or(rest.len());
        &rest[..end]
    } else {
        let end = find(b" login: ")?;
        let start =
            text[..end].iter().rposition(|b| !(b.is_ascii_alphanumeric() || b"-_".contains(b))).map_or(0, |n| n + 1);
        &text[start..end]
    };
    std::str::from_utf8(name).ok().filter(|n| is_node_name(n)).map(str::to_owned)
}

/// An entry of `journalctl -o export` around its message.
struct Entry<'a> {
    message: &'a [u8],
    node: Option<Cow<'a, str>>,
    at: Option<Timestamp>,
}

fn export_entry(block: &[u8], start: usize, end: usize) -> Option<Entry<'_>> {
    let message = block[start..end].strip_prefix(b"MESSAGE=").or_else(|| export_binary(block, start, end))?;
    let low = start.saturating_sub(ENTRY_BYTES_MAX);
    let from = block[low..start].windows(2).rposition(|w| w == b"\n\n").map_or(low, |n| low + n + 2);
    let high = (end + ENTRY_BYTES_MAX).min(block.len());
    let to = block[end..high].windows(2).position(|w| w == b"\n\n").map_or(high, |n| end + n);
    let field = |key: &[u8]| block[from..to].split(|&b| b == b'\n').find_map(|l| l.strip_prefix(key));
    let node = field(b"_HOSTNAME=").map(String::from_utf8_lossy);
    let at = field(b"_SOURCE_REALTIME_TIMESTAMP=")
        .or_else(|| field(b"__REALTIME_TIMESTAMP="))
        .and_then(|t| std::str::from_utf8(t).ok())
        .and_then(time::realtime_us);
    Some(Entry { message, node, at })
}

/// First line of a message that is not one printable line: `MESSAGE`, a line end, its length in eight bytes (little-endian),
/// its bytes (systemd, Journal Export Formats).
fn export_binary(block: &[u8], start: usize, end: usize) -> Option<&[u8]> {
    block[..start].strip_suffix(b"MESSAGE\n").filter(|before| before.is_empty() || before.ends_with(b"\n"))?;
    let (length, message) = block[start..end].split_first_chunk::<8>()?;
    (message.len() as u64 <= u64::from_le_bytes(*length)).then_some(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_export_entry_is_read_with_a_message_of_either_form() {
        let show = |block: &[u8], what: &[u8]| {
            let at = block.windows(what.len()).position(|w| w == what).unwrap();
            let start = block[..at].iter().rposition(|&b| b == b'\n').map_or(0, |n| n + 1);
            let end = block[at..].iter().position(|&b| b == b'\n').map_or(block.len(), |n| at + n);
            export_entry(block, start, end).map(|e| {
                format!("{} {} {}", String::from_utf8_lossy(e.message), e.node.unwrap_or_default(), e.at.is_some())
            })
        };
        let plain = b"__REALTIME_TIMESTAMP=1795228957000000\n_HOSTNAME=h\nMESSAGE=panic: x\n\n";
        assert_eq!(show(plain, b"panic").as_deref(), Some("panic: x h true"));
        let binary = b"_HOSTNAME=h\nMESSAGE\n\x0d\0\0\0\0\0\0\0panic: x\nmore\n_PID=1\n\n";
        assert_eq!(show(binary, b"panic").as_deref(), Some("panic: x h false"));
        assert_eq!(show(b"MESSAGE\nshort\n", b"short"), None);
        assert_eq!(show(b"THE MESSAGE\n\x0d\0\0\0\0\0\0\0panic: x\n", b"panic"), None);
    }

    #[test]
    fn names_give_nodes_and_programs_away() {
        let show = |name: &str| {
            let (node, source) = infer(name);
            format!("{} {source}", node.as_deref().unwrap_or("-"))
        };
        assert_eq!(show("run-7/server-1/journal.log"), "server-1 unknown");
        assert_eq!(show("server-2/qemu.log"), "server-2 qemu");
        assert_eq!(show("runs/r1/nodes/alpha/qmp.log"), "alpha qemu");
        assert_eq!(show("runs/r1/nodes/alpha/ssh.log"), "alpha ssh");
        assert_eq!(show("runs/r1/vde.log"), "- vde");
        assert_eq!(show("runs/r1/dhcp.log"), "- dhcp");
        assert_eq!(show("runs/r1/nodes/alpha/console.log"), "alpha unknown");
        assert_eq!(show("server-1/nodes/console.log"), "server-1 unknown");
        assert_eq!(show("server-1-journal.log.gz"), "server-1 unknown");
        assert_eq!(show("logs/console_agent1.txt"), "agent1 unknown");
        assert_eq!(show("k3s.log"), "- unknown");
        assert_eq!(show(""), "- unknown");
    }

    #[test]
    fn hostnames_are_read_from_the_console() {
        assert_eq!(own_hostname(b"[    1.2] systemd[1]: Hostname set to <server-2>."), Some("server-2".to_owned()));
        assert_eq!(own_hostname(b"server_1 # server-2 login: "), Some("server-2".to_owned()));
        assert_eq!(own_hostname(b"debian login: "), None);
    }
}
