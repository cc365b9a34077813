//! Lines of k3s that a mail or a terminal has broken in several.
//!
//! `time="…" level=fatal msg="…"` (logrus) keeps a message in quotes and never prints a line end within them, so that a
//! quote which is not closed at a line's end tells of a break, and where it is closed the end of it. Nothing else is put
//! together: two messages taken for one would be evidence of something that nobody said.

use std::ops::Range;

use crate::dialect::{program, time, wrapper};
use crate::line::Level;

/// Most lines that one was broken into.
const LINES_MAX: usize = 8;
/// Longest line that is put together, bytes.
const BYTES_MAX: usize = 4096;
/// Shortest width of a terminal, bytes.
const WIDTH_MIN: usize = 40;

/// The line that the one at `line` of `block` is a part of, where it was broken: its place, which does not begin before
/// `from`, and its text. `None` for a line that is whole.
pub(crate) fn mend(block: &[u8], from: usize, line: Range<usize>) -> Option<(Range<usize>, Vec<u8>)> {
    let first = first(block, from, line.clone())?;
    let mut pieces = vec![piece(&block[first.clone()])];
    let mut last = first.clone();
    while pieces.len() < LINES_MAX {
        last = line_behind(block, &last)?;
        let text = piece(&block[last.clone()]);
        if text.is_empty() || (has_head(text) && !(pieces.len() == 1 && is_stamp(pieces[0]))) {
            return None;
        }
        pieces.push(text);
        let whole = join(&pieces);
        if whole.len() > BYTES_MAX {
            return None;
        }
        match message(&whole)? {
            Message::Open => {}
            Message::Closed => {
                return (last.end >= line.end && is_weighty(&whole)).then_some((first.start..last.end, whole));
            }
        }
    }
    None
}

/// The line in which the broken one begins: this one, or one of those before it.
fn first(block: &[u8], from: usize, line: Range<usize>) -> Option<Range<usize>> {
    if line.len() > BYTES_MAX {
        return None;
    }
    let asked = piece(&block[line.clone()]);
    // Nearly all lines are whole and tell so: they cost one look.
    if level(asked).is_none() && has_head(asked) {
        return None;
    }
    let mut at = line;
    for _ in 1..LINES_MAX {
        let text = piece(&block[at.clone()]);
        if level(text).is_some() {
            let Some(Message::Open) = message(text) else { return None };
            let (_, own) = wrapper::peel(text, time::YEAR_UNKNOWN);
            if own.starts_with(b"time=\"") {
                return Some(at);
            }
            // Broken before its level.
            let stamp = line_before(block, from, &at).filter(|before| is_stamp(&block[before.clone()]));
            return own.starts_with(b"level=").then(|| stamp.unwrap_or(at));
        }
        if text.is_empty() {
            return None;
        }
        at = line_before(block, from, &at)?;
    }
    None
}

/// Whether a line has nothing but its time.
fn is_stamp(line: &[u8]) -> bool {
    let (_, own) = wrapper::peel(piece(line), time::YEAR_UNKNOWN);
    own.starts_with(b"time=\"") && own.ends_with(b"\"") && !own.contains(&b' ')
}

/// `None` also where it is too long to be a part of a broken one.
fn line_before(block: &[u8], from: usize, line: &Range<usize>) -> Option<Range<usize>> {
    let end = line.start.checked_sub(1).filter(|&end| end >= from)?;
    let low = from.max(end.saturating_sub(BYTES_MAX));
    let start = block[low..end].iter().rposition(|&b| b == b'\n').map(|n| low + n + 1);
    Some(start.or((low == from).then_some(from))?..end)
}

/// `None` also where it is too long to be a part of a broken one.
fn line_behind(block: &[u8], line: &Range<usize>) -> Option<Range<usize>> {
    let start = line.end + 1;
    let rest = block.get(start..)?;
    let end =
        rest.iter().take(BYTES_MAX).position(|&b| b == b'\n').or((rest.len() <= BYTES_MAX).then_some(rest.len()))?;
    Some(start..start + end)
}

/// What a line holds of a broken one: mails and terminals add blanks at either end.
fn piece(line: &[u8]) -> &[u8] {
    line.trim_ascii()
}

/// Whether a line begins something of its own.
fn has_head(line: &[u8]) -> bool {
    let own = program::read(line, time::YEAR_UNKNOWN);
    let peeled = wrapper::peel(line, time::YEAR_UNKNOWN).1.len() < line.len();
    peeled || own.level.is_some() || own.kind.is_some() || line.starts_with(b"{")
}

/// How far the quoted message of a line got.
enum Message {
    Open,
    Closed,
}

/// Whether a line says for itself how things stand: what ended k3s, and what became good. An error or a warning is weighed
/// against what else is in the log, and that may be broken, too, and not seen.
fn is_weighty(line: &[u8]) -> bool {
    let said = level(line).and_then(|at| line[at + 6..].split(|b| !b.is_ascii_alphabetic()).next());
    said.and_then(Level::from_word).is_some_and(|level| !matches!(level, Level::Error | Level::Warning))
}

/// Where a line says its level.
fn level(line: &[u8]) -> Option<usize> {
    line.windows(6).position(|w| w == b"level=")
}

/// `None` where a line's message is in no quotes, or something stands behind it that is no other field.
fn message(line: &[u8]) -> Option<Message> {
    let fields = &line[level(line)?..];
    let Some(at) = fields.windows(5).position(|w| w == b" msg=") else {
        // Broken before its message.
        return (!fields.contains(&b' ')).then_some(Message::Open);
    };
    let text = fields[at + 5..].strip_prefix(b"\"")?;
    let mut escaped = false;
    let end = text.iter().position(|&b| {
        let quote = b == b'"' && !escaped;
        escaped = b == b'\\' && !escaped;
        quote
    });
    let Some(end) = end else { return Some(Message::Open) };
    let rest = &text[end + 1..];
    (rest.is_empty() || (rest.starts_with(b" ") && rest.contains(&b'='))).then_some(Message::Closed)
}

/// Puts pieces together: a terminal breaks at its width and in the middle of words, a mail between them.
fn join(pieces: &[&[u8]]) -> Vec<u8> {
    let full = &pieces[..pieces.len() - 1];
    let width = full[0].len();
    let terminal = full.len() > 1 && width >= WIDTH_MIN && full.iter().all(|piece| piece.len() == width);
    pieces.join(if terminal { &b""[..] } else { b" " })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FM4: &str = r#"Nov 21 02:44:00 server-2 k3s[532]: time="2026-11-21T02:44:00Z" level=fatal msg="starting kubernetes: preparing server: failed to get CA certs: Get \"https://192.168.200.1:6443/cacerts\": context deadline exceeded (Client.Timeout exceeded while awaiting headers)""#;

    /// What the line that holds `what` is a part of.
    fn mended(text: &str, what: &str) -> Option<String> {
        let at = text.find(what).unwrap();
        let start = text[..at].rfind('\n').map_or(0, |n| n + 1);
        let end = text[at..].find('\n').map_or(text.len(), |n| at + n);
        mend(text.as_bytes(), 0, start..end).map(|(range, line)| {
            assert!(range.start <= start && end <= range.end && range.end <= text.len());
            String::from_utf8(line).unwrap()
        })
    }

    fn wrapped_by_mail(text: &str, width: usize) -> String {
        let mut lines = vec![String::new()];
        for word in text.split(' ') {
            let last = lines.last_mut().unwrap();
            if !last.is_empty() && last.len() + 1 + word.len() > width {
                lines.push(word.to_owned());
            } else {
                *last = if last.is_empty() { word.to_owned() } else { format!("{last} {word}") };
            }
        }
        lines.join("\n")
    }

    #[test]
    fn a_broken_line_is_whole_again_whichever_part_is_asked_about() {
        for width in [72, 80, 100, 132] {
            let mail = wrapped_by_mail(FM4, width);
            let within =
                format!("Nov 21 02:43:59 server-2 systemd[1]: Starting k3s\n{mail}\nNov 21 02:44:01 server-2 x\n");
            for part in ["preparing", "cacerts", "deadline", "awaiting"] {
                assert_eq!(mended(&within, part).as_deref(), Some(FM4), "{width} {part}\n{mail}");
            }
        }
        let terminal = FM4.as_bytes().chunks(90).map(|part| std::str::from_utf8(part).unwrap()).collect::<Vec<_>>();
        assert_eq!(mended(&terminal.join("\n"), "awaiting").as_deref(), Some(FM4));
        assert_eq!(mended(&terminal.join("\r\n    "), "awaiting").as_deref(), Some(FM4), "indented");
        let early = "level=fatal\nmsg=\"failed to get CA certs:\ntimed out\" a=b\n";
        let whole = "level=fatal msg=\"failed to get CA certs: timed out\" a=b";
        assert_eq!(mended(early, "timed out").as_deref(), Some(whole));
    }

    #[test]
    fn long_lines_are_no_parts() {
        let long = format!("{} {}\" x=\ny\"\n", FM4.trim_end_matches('"'), "x".repeat(BYTES_MAX));
        assert_eq!(mended(&long, "cacerts"), None);
        let behind = format!("{}\n{}\"\n", FM4.trim_end_matches('"'), "x".repeat(BYTES_MAX));
        assert_eq!(mended(&behind, "cacerts"), None);
        let before =
            format!("{}\ntimed out\"\n", FM4.replace("starting", &"x".repeat(BYTES_MAX)).trim_end_matches('"'));
        assert_eq!(mended(&before, "timed out"), None);
        assert_eq!(mended(FM4.trim_end_matches('"'), "cacerts"), None, "the end of what is read");
    }

    #[test]
    fn whole_lines_and_other_messages_are_left_alone() {
        let open = "time=\"2026-11-21T02:44:00Z\" level=fatal msg=\"failed to get CA certs: Get \\\"https://10";
        for (what, text) in [
            ("weighed", FM4.replace("fatal", "error").replace("context", "timed out\ncontext")),
            ("whole", format!("{FM4}\ntimed out\n")),
            ("cut, and another message behind it", format!("{open}\nlevel=info msg=\"timed out\"\n")),
            ("cut, and another program", format!("{open}\nE1121 02:44:00.1 1 a.go:1] \"timed out\"\n")),
            ("cut, and a journal's line", format!("{open}\nNov 21 02:44:01 h k3s[1]: \"timed out\"\n")),
            ("cut, and an empty line", format!("{open}\n\ntimed out\"\n")),
            ("never closed", format!("{open}\ntimed out\nand so on\n")),
            ("closed in the middle of something", format!("{open}\nhe said \"timed out\" to me\n")),
            ("closed before it", format!("{open}\nx\"\ntimed out\n")),
            ("too long", format!("{open}\n{}timed out\"\n", "x\n".repeat(LINES_MAX))),
            ("no message", "level=error foo\n\"timed out\"\n".to_owned()),
        ] {
            assert_eq!(mended(&text, "timed out"), None, "{what}");
        }
    }
}
