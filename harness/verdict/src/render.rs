//! The verdict as a person reads it: one screen.

use std::fmt::Write as _;

use crate::verdict::build::class_word;
use crate::verdict::{EvidenceLine, Outcome, Verdict};

/// Columns of a screen.
const COLUMNS: usize = 110;
/// Evidence lines shown with their text; the rest is counted.
const LINES_SHOWN: usize = 4;
/// Rows an evidence line's text may take.
const ROWS_OF_TEXT: usize = 2;

pub(crate) fn headline(verdict: &Verdict) -> String {
    let place = verdict.node.as_deref().map_or(String::new(), |n| format!(" on {n}"));
    match (&verdict.id, verdict.outcome) {
        (Some(id), _) => format!("{id} {}{place} ({} confidence)", verdict.name, verdict.confidence),
        (None, Outcome::Failed) if verdict.look_alike.is_some() => {
            format!("{}{place} ({} confidence)", verdict.name, verdict.confidence)
        }
        (None, Outcome::Failed) => format!("failed, {}{place}", verdict.name),
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
            let not = if look_alike.not.is_empty() {
                String::new()
            } else {
                format!(", not {}", look_alike.not.join(" or "))
            };
            let _ = writeln!(out, "  id     none: {} is not a failure mode of the catalogue{not}", look_alike.id);
        } else if verdict.id.is_none() {
            let _ = writeln!(out, "  id     none");
        }
        if let Some(blame) = verdict.attribution {
            let _ = writeln!(out, "  class  {}, blame: {blame}", class_word(verdict.class));
        }
        item(&mut out, "why    ", &verdict.reason);
    }
    if !verdict.evidence.is_empty() {
        let _ = writeln!(out, "evidence");
        for line in verdict.evidence.iter().take(LINES_SHOWN) {
            evidence(&mut out, line);
        }
        let more = verdict.evidence.len().saturating_sub(LINES_SHOWN);
        if more > 0 {
            let _ = writeln!(out, "  and {more} more in verdict.json");
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
    let letters: Vec<char> = line.text.chars().collect();
    for (row, part) in letters.chunks(columns).take(ROWS_OF_TEXT).enumerate() {
        let cut = row + 1 == ROWS_OF_TEXT && letters.len() > columns * ROWS_OF_TEXT;
        let kept = if cut { &part[..columns - 1] } else { part };
        let shown: String = kept.iter().collect();
        let _ = writeln!(out, "    | {shown}{}", if cut { "…" } else { "" });
    }
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
