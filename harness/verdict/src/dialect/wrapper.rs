//! Text wrappers around a program's line: journald, syslog, CRI, Docker compose, BuildKit, the NixOS test driver, CI, grep.

use jiff::Timestamp;

use super::{program as own, time};
use crate::diagnose::is_node_name;

/// Most wrappers taken off one line.
const WRAPPERS_MAX: usize = 8;
/// Longest path of a file that grep names, bytes.
const PATH_BYTES_MAX: usize = 512;
/// Longest host, program or container name, bytes.
const NAME_BYTES_MAX: usize = 128;

/// What the wrappers of a line say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Head<'a> {
    /// Outermost time.
    pub at: Option<Timestamp>,
    /// Whether that time was printed with a year.
    pub has_year: bool,
    /// Whether it counts from boot.
    pub since_boot: bool,
    /// Host, VM or container.
    pub node: Option<&'a [u8]>,
    /// Program.
    pub unit: Option<&'a [u8]>,
    /// Process id.
    pub pid: Option<u32>,
    /// The line carries the kernel's time stamp and no program.
    pub kernel: bool,
    /// The line comes from a build step.
    pub build: bool,
}

/// Takes the wrappers off; gives what they say and the rest.
#[must_use]
pub fn peel(text: &[u8], year: i16) -> (Head<'_>, &[u8]) {
    let mut head = Head::default();
    let mut rest = text;
    // `systemctl status` and pasted logs are indented; an indented line without a wrapper keeps its indentation.
    if text.first() == Some(&b' ') {
        match peel_one(text.trim_ascii_start(), &mut head, year) {
            Some(tail) => rest = tail,
            None => return (Head::default(), text),
        }
    }
    for _ in 0..WRAPPERS_MAX {
        match peel_one(rest, &mut head, year) {
            Some(tail) => rest = tail,
            None => break,
        }
    }
    (head, rest)
}

fn peel_one<'a>(text: &'a [u8], head: &mut Head<'a>, year: i16) -> Option<&'a [u8]> {
    grep(text, head, year).or_else(|| peel_printed(text, head, year))
}

/// `PATH:` or `PATH:LINE:` (`grep -H`, `rg`), `PATH:LINE:COLUMN:` (`rg --vimgrep`). Many messages begin so, too: it is taken
/// off where what follows is a line that tells what it is.
fn grep<'a>(text: &'a [u8], head: &mut Head<'a>, year: i16) -> Option<&'a [u8]> {
    let end = text.iter().take(PATH_BYTES_MAX).position(|b| matches!(b, b':' | b' ' | b'\t' | b'"'))?;
    let (path, mut rest) = (&text[..end], text[end..].strip_prefix(b":")?);
    if !path.iter().any(|b| matches!(b, b'.' | b'/')) {
        return None;
    }
    for _ in 0..2 {
        rest = skip_digits(rest).and_then(|after| after.strip_prefix(b":")).unwrap_or(rest);
    }
    let known = own::read(rest, year);
    let tells = known.level.is_some()
        || known.kind.is_some()
        || [&b"panic: "[..], b"{\""].iter().any(|start| rest.starts_with(start))
        || peel_printed(rest, &mut Head::default(), year).is_some();
    if !tells {
        return None;
    }
    let folders = path.rsplit(|&b| b == b'/').skip(1);
    let of_node = |name: &&[u8]| std::str::from_utf8(name).is_ok_and(is_node_name);
    if let Some(node) = folders.into_iter().find(of_node) {
        head.node.get_or_insert(node);
    }
    Some(rest)
}

fn peel_printed<'a>(text: &'a [u8], head: &mut Head<'a>, year: i16) -> Option<&'a [u8]> {
    match text.first()? {
        b'<' => priority(text, head),
        b'[' => bracketed_time(text, head).or_else(|| pod(text, head)),
        b'#' => buildkit(text, head).or_else(|| workflow_command(text)),
        b':' => workflow_command(text),
        b'0'..=b'9' => short_unix(text, head)
            .or_else(|| dated(text, head))
            .or_else(|| syslog(text, head, year))
            .or_else(|| named(text, head)),
        b' ' | b'\t' => None,
        _ => gitlab_section(text)
            .or_else(|| short_full(text, head))
            .or_else(|| syslog(text, head, year))
            .or_else(|| named(text, head))
            .or_else(|| program_with_pid(text, head)),
    }
}

/// Syslog's `<14>`, and all of RFC 5424's head where a version follows it.
fn priority<'a>(text: &'a [u8], head: &mut Head<'a>) -> Option<&'a [u8]> {
    let end = text.iter().take(5).position(|&b| b == b'>')?;
    let rest = (end > 1 && text[1..end].iter().all(u8::is_ascii_digit)).then(|| &text[end + 1..])?;
    Some(rest.strip_prefix(b"1 ").and_then(|fields| rfc5424(fields, head)).unwrap_or(rest))
}

/// `TIME HOST PROGRAM PID ID DATA message`; what is not known is `-`.
fn rfc5424<'a>(text: &'a [u8], head: &mut Head<'a>) -> Option<&'a [u8]> {
    let stamp = time::full(text)?;
    let (host, rest) = token(stamp.rest.strip_prefix(b" ")?);
    let (name, rest) = token(rest);
    let (pid, rest) = token(rest);
    let (_, rest) = token(rest);
    // Structured data can hold spaces; its last bracket is followed by one.
    let message = match rest.first()? {
        b'[' => &rest[rest.windows(2).position(|w| w == b"] ")? + 2..],
        _ => token(rest).1,
    };
    set_time(head, &stamp);
    if host != b"-" {
        head.node.get_or_insert(host);
    }
    set_program(head, name, std::str::from_utf8(pid).ok().and_then(|pid| pid.parse().ok()));
    Some(message.strip_prefix("\u{feff}".as_bytes()).unwrap_or(message))
}

/// `[pod/NAME/CONTAINER] ` of `kubectl logs --prefix`.
fn pod<'a>(text: &'a [u8], head: &mut Head<'a>) -> Option<&'a [u8]> {
    let rest = text.strip_prefix(b"[pod/")?;
    let end = rest.iter().take(2 * NAME_BYTES_MAX).position(|&b| b == b']')?;
    let name = rest[..end].split(|&b| b == b'/').next().filter(|name| !name.is_empty())?;
    head.node.get_or_insert(name);
    rest[end + 1..].strip_prefix(b" ")
}

/// The kernel's `[   59.380000] ` and `dmesg -T`'s `[Fri Aug  2 20:05:01 2019] `.
fn bracketed_time<'a>(text: &'a [u8], head: &mut Head<'a>) -> Option<&'a [u8]> {
    let end = text.iter().take(40).position(|&b| b == b']')?;
    let inside = &text[1..end];
    // The kernel can add a caller: `[   59.38][  T123] `.
    let rest = &text[end + 1..];
    let rest = rest.strip_prefix(b" ").unwrap_or(rest);
    let is_caller = head.kernel && inside.trim_ascii_start().first().is_some_and(|b| matches!(b, b'T' | b'C'));
    if is_caller && inside.trim_ascii_start()[1..].iter().all(u8::is_ascii_digit) {
        return Some(rest);
    }
    if let Some(at) = time::since_boot(inside) {
        if head.at.is_none() {
            head.at = Some(at);
            head.since_boot = true;
        }
        head.kernel = true;
        return Some(rest);
    }
    // Jenkins: `[2026-11-21T02:44:00.123Z] `.
    if let Some(stamp) = time::full(inside).filter(|stamp| stamp.rest.is_empty()) {
        set_time(head, &stamp);
        return Some(rest);
    }
    let stamp = time::ctime(inside)?;
    set_time(head, &stamp);
    head.kernel = true;
    Some(rest)
}

/// BuildKit's `#19 0.210 `.
fn buildkit<'a>(text: &'a [u8], head: &mut Head<'a>) -> Option<&'a [u8]> {
    let rest = skip_digits(&text[1..])?.strip_prefix(b" ")?;
    let rest = skip_digits(rest)?.strip_prefix(b".")?;
    let rest = skip_digits(rest)?.strip_prefix(b" ")?;
    head.build = true;
    Some(rest)
}

/// What marks a line of a CI job: `##[error]` in what Azure Pipelines and GitHub Actions show, `::error file=x::` as the
/// job printed it.
fn workflow_command(text: &[u8]) -> Option<&[u8]> {
    const MARKS: [&[u8]; 6] = [b"error", b"warning", b"notice", b"debug", b"command", b"group"];
    let marked = |rest: &[u8]| MARKS.iter().any(|mark| rest.starts_with(mark));
    if let Some(rest) = text.strip_prefix(b"##[") {
        let end = rest.iter().take(16).position(|&b| b == b']')?;
        return marked(rest).then(|| &rest[end + 1..]);
    }
    let rest = text.strip_prefix(b"::").filter(|rest| marked(rest))?;
    let end =
        rest.iter().take(NAME_BYTES_MAX).position(|&b| b == b':').filter(|&end| rest.get(end + 1) == Some(&b':'))?;
    Some(&rest[end + 2..])
}

/// GitLab's `01O `: number of the stream, out or error, and `+` where the line goes on one before it.
fn gitlab_stream(text: &[u8]) -> Option<&[u8]> {
    let (mark, rest) = text.split_at_checked(4)?;
    let is_mark = mark[..2].iter().all(u8::is_ascii_hexdigit) && b"OE".contains(&mark[2]) && b" +".contains(&mark[3]);
    is_mark.then_some(rest)
}

/// GitLab's `section_start:1795228957:NAME\r`, which stands before the first line of a section.
fn gitlab_section(text: &[u8]) -> Option<&[u8]> {
    let rest =
        text.strip_prefix(b"section_").filter(|rest| rest.starts_with(b"start:") || rest.starts_with(b"end:"))?;
    let end = rest.iter().take(2 * NAME_BYTES_MAX).position(|&b| b == b'\r')?;
    Some(&rest[end + 1..])
}

fn skip_digits(text: &[u8]) -> Option<&[u8]> {
    let end = text.iter().position(|b| !b.is_ascii_digit()).unwrap_or(text.len());
    (end > 0).then(|| &text[end..])
}

fn set_time<'a>(head: &mut Head<'a>, stamp: &time::Stamp<'a>) {
    if head.at.is_none() {
        head.at = stamp.at;
        head.has_year = stamp.has_year && stamp.at.is_some();
    }
}

/// A line that begins with a full date: CI, CRI, journald's short-iso, RFC 5424.
fn dated<'a>(text: &'a [u8], head: &mut Head<'a>) -> Option<&'a [u8]> {
    let stamp = time::full(text)?;
    let rest = stamp.rest.strip_prefix(b" ")?;
    // etcd's own `2026-11-21 02:10:46.665123 W | ` is a program's line, not a wrapper.
    if text.get(10) == Some(&b' ') && !rest.starts_with(b"stdout ") && !rest.starts_with(b"stderr ") {
        return None;
    }
    set_time(head, &stamp);
    if let Some(rest) = gitlab_stream(rest) {
        return Some(rest);
    }
    for stream in [&b"stdout "[..], b"stderr "] {
        if let Some(tagged) = rest.strip_prefix(stream) {
            return Some(tagged.strip_prefix(b"F ").or_else(|| tagged.strip_prefix(b"P ")).unwrap_or(tagged));
        }
    }
    Some(host_and_program(rest, head, true).unwrap_or(rest))
}

/// `1795229040.123456 host unit[1]: `, journald's short-unix.
fn short_unix<'a>(text: &'a [u8], head: &mut Head<'a>) -> Option<&'a [u8]> {
    let stamp = time::unix(text)?;
    let rest = host_and_program(stamp.rest, head, false)?;
    set_time(head, &stamp);
    Some(rest)
}

/// `Sat 2026-11-21 02:44:00 UTC host unit[1]: `, journald's short-full.
fn short_full<'a>(text: &'a [u8], head: &mut Head<'a>) -> Option<&'a [u8]> {
    if text.get(3) != Some(&b' ') || !text[..3].iter().all(u8::is_ascii_alphabetic) {
        return None;
    }
    let stamp = time::full(&text[4..])?;
    let rest = stamp.rest.strip_prefix(b" ")?;
    let zone = rest.iter().take(8).position(|&b| b == b' ')?;
    set_time(head, &stamp);
    let rest = &rest[zone + 1..];
    Some(host_and_program(rest, head, false).unwrap_or(rest))
}

/// `Nov 21 02:44:00 host unit[1]: `, with or without the host.
fn syslog<'a>(text: &'a [u8], head: &mut Head<'a>, year: i16) -> Option<&'a [u8]> {
    let stamp = time::syslog(text, year)?;
    set_time(head, &stamp);
    Some(host_and_program(stamp.rest, head, false).unwrap_or(stamp.rest))
}

/// Words that stand before a colon and are no program.
const NOT_PROGRAMS: [&[u8]; 10] =
    [b"panic", b"fatal", b"error", b"warning", b"Error", b"Warning", b"Fatal", b"FATAL", b"ERROR", b"INFO"];

/// A program's name, `name[123]` or `name`, before `: `.
fn program(token: &[u8]) -> Option<(&[u8], Option<u32>)> {
    let token = token.strip_suffix(b":")?;
    if token.is_empty() || token.len() > NAME_BYTES_MAX {
        return None;
    }
    if let Some(open) = token.iter().position(|&b| b == b'[').filter(|&open| open > 0) {
        let pid = token[open + 1..].strip_suffix(b"]")?;
        let pid = std::str::from_utf8(pid).ok()?.parse().ok()?;
        return Some((&token[..open], Some(pid)));
    }
    let is_name = token.iter().all(|b| b.is_ascii_alphanumeric() || b"._-/@()+".contains(b));
    (is_name && !NOT_PROGRAMS.contains(&token)).then_some((token, None))
}

fn token(text: &[u8]) -> (&[u8], &[u8]) {
    let end = text.iter().position(|&b| b == b' ').unwrap_or(text.len());
    (&text[..end], text.get(end + 1..).unwrap_or(&[]))
}

/// `host unit[1]: ` or `unit[1]: ` after a time stamp. Strict (after a bare RFC 3339 time, which CI and CRI print too)
/// wants a pid or one of the names that never have one.
fn host_and_program<'a>(text: &'a [u8], head: &mut Head<'a>, strict: bool) -> Option<&'a [u8]> {
    let (first, after_first) = token(text);
    let plausible = |name: &[u8], pid: Option<u32>| !strict || pid.is_some() || matches!(name, b"kernel" | b"systemd");
    if let Some((name, pid)) = program(first) {
        if !plausible(name, pid) {
            return None;
        }
        set_program(head, name, pid);
        return Some(after_first);
    }
    let (second, after_second) = token(after_first);
    let (name, pid) = program(second)?;
    let host_like = !first.is_empty()
        && first.len() <= NAME_BYTES_MAX
        && first.iter().all(|b| b.is_ascii_alphanumeric() || b"._-:".contains(b) || *b >= 0x80);
    if !host_like || !plausible(name, pid) {
        return None;
    }
    head.node.get_or_insert(first);
    set_program(head, name, pid);
    Some(after_second)
}

fn set_program<'a>(head: &mut Head<'a>, name: &'a [u8], pid: Option<u32>) {
    head.unit = Some(name);
    head.pid = pid;
    head.kernel = name == b"kernel";
}

/// `name | ` (Docker compose), `name # ` and `name# [` (NixOS driver), `name> ` (Nix build), and `gh run view --log`'s
/// `job<TAB>step<TAB>`.
fn named<'a>(text: &'a [u8], head: &mut Head<'a>) -> Option<&'a [u8]> {
    if let Some(rest) = github_columns(text) {
        return Some(rest);
    }
    let end = text.iter().take(NAME_BYTES_MAX).position(|b| !(b.is_ascii_alphanumeric() || b"_.-".contains(b)))?;
    if end == 0 {
        return None;
    }
    let (name, rest) = text.split_at(end);
    let spaces = rest.iter().take(NAME_BYTES_MAX).take_while(|&&b| b == b' ').count();
    if let Some(rest) = rest[spaces..].strip_prefix(b"| ").filter(|_| spaces > 0) {
        head.node.get_or_insert(name);
        return Some(rest);
    }
    if let Some(rest) = rest.strip_prefix(b" # ") {
        head.node.get_or_insert(name);
        return Some(rest);
    }
    if rest.starts_with(b"# [") {
        head.node.get_or_insert(name);
        return Some(&rest[2..]);
    }
    if let Some(rest) = rest.strip_prefix(b"> ") {
        return Some(rest);
    }
    None
}

fn github_columns(text: &[u8]) -> Option<&[u8]> {
    let first = text.iter().take(NAME_BYTES_MAX).position(|&b| b == b'\t')?;
    let second = text[first + 1..].iter().take(NAME_BYTES_MAX).position(|&b| b == b'\t')?;
    let rest = &text[first + second + 2..];
    let rest = rest.strip_prefix("\u{feff}".as_bytes()).unwrap_or(rest);
    time::full(rest).map(|_| rest)
}

/// `k3s[632]: ` or `server-1 k3s[632]: ` without a date, as the NixOS driver shows the console and people cut journals.
fn program_with_pid<'a>(text: &'a [u8], head: &mut Head<'a>) -> Option<&'a [u8]> {
    let (first, rest) = token(text);
    if let Some((name, pid @ Some(_))) = program(first) {
        set_program(head, name, pid);
        return Some(rest);
    }
    let (second, after) = token(rest);
    let (name, pid @ Some(_)) = program(second)? else { return None };
    let host_like = !first.is_empty() && first.iter().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(b));
    host_like.then(|| {
        head.node.get_or_insert(first);
        set_program(head, name, pid);
        after
    })
}
