//! The verdict as a person reads it: one screen.

use std::borrow::Cow;
use std::fmt::Write as _;

use crate::verdict::build::class_word;
use crate::verdict::{EvidenceLine, Outcome, Verdict};

/// Columns of a screen.
const COLUMNS: usize = 110;
/// Evidence lines shown with their text; the rest is counted.
const LINES_SHOWN: usize = 3;
/// Rows an evidence line's text may take.
const ROWS_OF_TEXT: usize = 2;

pub(crate) fn headline(verdict: &Verdict) -> String {
    let place = verdict.node.as_deref().map_or(String::new(), |n| format!(" on {n}"));
    match (&verdict.id, verdict.outcome) {
        (Some(id), _) => format!("{id} {}{place} ({} confidence)", verdict.name, verdict.confidence),
        (None, Outcome::Failed) if verdict.look_alike.is_some() => {
            format!("{}{place} ({} confidence)", verdict.name, verdict.confidence)
        }
        (None, Outcome::Failed) => format!("{}{place}", verdict.name),
        (None, _) => verdict.name.clone(),
    }
}

pub(crate) fn human(verdict: &Verdict) -> String {
    let mut out = String::new();
    let word = match verdict.outcome {
        Outcome::Passed => "PASSED",
        Outcome::Failed => "FAILED",
        Outcome::NoFailureSeen => "NO FAILURE SEEN",
    };
    let phase = verdict.phase.map_or(String::new(), |p| format!(" in {p}"));
    match verdict.outcome {
        Outcome::Failed => {
            let _ = writeln!(out, "{word}{phase}: {}", headline(verdict));
        }
        _ => {
            let _ = writeln!(out, "{word}");
        }
    }
    block(&mut out, "", &verdict.summary);
    if verdict.outcome == Outcome::Failed {
        if let Some(look_alike) = &verdict.look_alike {
            let of = match look_alike.not.as_slice() {
                [] => String::new(),
                not => format!(", which looks like {} and is not", not.join(" or ")),
            };
            let _ = writeln!(out, "  id     none; this is {}{of}", look_alike.id);
        }
        if let Some(blame) = verdict.attribution {
            let _ = writeln!(out, "  class  {}, blame: {blame}", class_word(verdict.class));
        }
        item(&mut out, "why    ", &verdict.reason);
    } else if verdict.outcome == Outcome::NoFailureSeen && !verdict.evidence.is_empty() {
        item(&mut out, "but    ", &verdict.reason);
    }
    if !verdict.evidence.is_empty() {
        let _ = writeln!(out, "{}", if verdict.outcome == Outcome::Failed { "evidence" } else { "warnings" });
        for line in verdict.evidence.iter().take(LINES_SHOWN) {
            evidence(&mut out, line);
        }
        let more = verdict.evidence.len().saturating_sub(LINES_SHOWN);
        if more > 0 {
            let _ = writeln!(out, "  and {more} more in the verdict's JSON");
        }
    }
    list(&mut out, "what followed", &verdict.consequences, "- ");
    let contributing: Vec<String> = verdict
        .contributing
        .iter()
        .map(|c| c.id.as_ref().map_or_else(|| c.text.clone(), |id| format!("{id}: {}", c.text)))
        .collect();
    list(&mut out, "contributing", &contributing, "- ");
    list(&mut out, "what to do", &verdict.remedy, "- ");
    out
}

fn evidence(out: &mut String, line: &EvidenceLine) {
    let mut place: Vec<String> = Vec::new();
    if let Some(at) = line.at {
        place.push(clock(at));
    }
    place.push(line.node.clone().unwrap_or_else(|| "node unknown".to_owned()));
    let number = line.line.map_or(String::new(), |n| format!(":{n}"));
    let source = match (line.source, line.origin.as_str()) {
        (kind, "") => kind.to_string(),
        (crate::evidence::SourceKind::Unknown, origin) => format!("{origin}{number}"),
        (kind, origin) if origin == kind.to_string() => origin.to_owned(),
        (kind, origin) => format!("{kind}, {origin}{number}"),
    };
    place.push(source);
    let times = if line.count > 1 { format!(" ({} times)", line.count) } else { String::new() };
    let _ = writeln!(out, "  {}  {}{times}", place.join("  "), line.says);
    let columns = COLUMNS - 6;
    let letters = letters(&line.text);
    let mut rest: &[char] = &letters;
    for row in 1..=ROWS_OF_TEXT {
        let (part, after) = rest.split_at(row_end(rest, columns - 1));
        let cut = row == ROWS_OF_TEXT && !after.is_empty();
        let shown: String = part.iter().collect();
        let _ = writeln!(out, "    | {}{}", shown.trim_end(), if cut { "…" } else { "" });
        rest = after;
        if rest.is_empty() {
            break;
        }
    }
}

/// What is shown of a line. JSON's escapes may stand for what a line cannot hold, a line feed first of all.
fn letters(text: &str) -> Vec<char> {
    readable(text).chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// The message of a zap line and what else it says, without the quotes: `lost leader … at term 2  took=2s`.
fn readable(text: &str) -> Cow<'_, str> {
    let Some(from_message) = text.strip_prefix("\"msg\":\"") else { return Cow::Borrowed(text) };
    let whole = format!("{{{text}");
    let Ok(fields) = serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(&whole) else {
        // It was shortened.
        return Cow::Owned(from_message.replace("\\\"", "\""));
    };
    let message = fields.get("msg").and_then(|m| m.as_str()).unwrap_or_default();
    let others = fields.iter().filter(|(key, _)| *key != "msg" && *key != "stacktrace").map(|(key, value)| {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        format!("  {key}={value}")
    });
    Cow::Owned(std::iter::once(message.to_owned()).chain(others).collect())
}

/// Where a row of text ends: behind a space, unless the last one is far from the edge.
fn row_end(text: &[char], columns: usize) -> usize {
    if text.len() <= columns {
        return text.len();
    }
    text[..columns]
        .iter()
        .rposition(|&c| c == ' ')
        .filter(|&space| space > columns / 2)
        .map_or(columns, |space| space + 1)
}

/// Wall clock, or seconds since boot.
fn clock(at: jiff::Timestamp) -> String {
    let second = at.as_second();
    if second < 366 * 86_400 {
        return format!("+{:.1}s", at.as_duration().as_secs_f64());
    }
    at.strftime("%H:%M:%S").to_string()
}

fn list(out: &mut String, title: &str, items: &[String], mark: &str) {
    if items.is_empty() {
        return;
    }
    let _ = writeln!(out, "{title}");
    for text in items {
        item(out, mark, text);
    }
}

fn item(out: &mut String, mark: &str, text: &str) {
    let indent = " ".repeat(mark.chars().count() + 2);
    for (n, line) in wrap(text, COLUMNS - indent.len()).iter().enumerate() {
        let lead = if n == 0 { format!("  {mark}") } else { indent.clone() };
        let _ = writeln!(out, "{lead}{line}");
    }
}

fn block(out: &mut String, indent: &str, text: &str) {
    for line in wrap(text, COLUMNS - indent.len()) {
        let _ = writeln!(out, "{indent}{line}");
    }
}

fn wrap(text: &str, columns: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut line = String::new();
    for word in text.split_whitespace() {
        if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > columns {
            lines.push(std::mem::take(&mut line));
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    if !line.is_empty() {
        lines.push(line);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_escapes_of_json_stand_for_is_not_obeyed() {
        let text = r#""msg":"lost\nevidence\n  class  product","error":"\u001b[2Jx"}"#;
        assert_eq!(letters(text).iter().collect::<String>(), "lost evidence   class  product  error= [2Jx");
    }
}
