//! YAML in, typed values out, with errors a person can act on.
//!
//! The only file of the workspace that knows which YAML package is used. Every document passes three gates:
//!
//! 1. a scan of the raw text (size, flow nesting), because the parser itself is quadratic in nesting depth;
//! 2. a walk over the whole document that knows no types: duplicate keys (in free-form maps too), depth, aliases that
//!    expand to too much, tags, keys that are not scalars;
//! 3. the typed deserialisation, whose errors are given the field's path, what was expected and a did-you-mean.
//!
//! Semantic checks made later by the caller point at the text through [`YamlError::at`], which finds the line and column
//! of a path by walking the document again (the success path pays nothing for positions).

use std::cell::RefCell;
use std::fmt;

use serde::de::{DeserializeOwned, DeserializeSeed};

mod visit;

use visit::{Seeker, WalkState, Walker};

/// Largest document accepted, in bytes.
pub const MAX_DOCUMENT_BYTES: usize = 128 * 1024;
/// Deepest nesting of mappings and lists accepted.
pub const MAX_DEPTH: usize = 32;
/// Most keys, scalars, lists and mappings a document may hold once its aliases are expanded.
pub const MAX_NODES: usize = 20_000;
/// Most steps the parser may need for flow nesting: it looks at every open `[` and `{` for every token, so an upper bound
/// of its work is openers times separators, whichever of them are in quotes or comments. Files people write need thousands.
const MAX_FLOW_STEPS: usize = 2_000_000;
/// Widest part of a source line shown in an error, in characters.
const MAX_SHOWN_CHARS: usize = 120;
const PLAIN_KEY: &str = "a plain key";

/// One step of a path into a document.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Segment {
    /// The value under this key of a mapping.
    Key(String),
    /// This element of a list, counted from 0.
    Index(usize),
}

impl From<&str> for Segment {
    fn from(key: &str) -> Self {
        Segment::Key(key.to_owned())
    }
}

impl From<usize> for Segment {
    fn from(index: usize) -> Self {
        Segment::Index(index)
    }
}

/// A path as people write it: `nodes[1].vcpus`; empty for the document itself.
#[must_use]
pub fn show_path(path: &[Segment]) -> String {
    let mut shown = String::new();
    for segment in path {
        match segment {
            Segment::Key(key) => {
                if !shown.is_empty() {
                    shown.push('.');
                }
                shown.push_str(key);
            }
            Segment::Index(index) => shown.push_str(&format!("[{index}]")),
        }
    }
    shown
}

/// What is wrong with a document, and where. Its `Display` is a block of several lines without a final newline.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct YamlError {
    /// The file's name as the caller gave it.
    pub file: Box<str>,
    /// Line, counted from 1.
    pub line: usize,
    /// Column in characters, counted from 1.
    pub column: usize,
    /// The field's path, `nodes[0].role`; empty where the fault has none (syntax) or is the whole document.
    pub path: Box<str>,
    /// What is wrong: a lowercase fragment.
    pub message: Box<str>,
    /// What would have been right.
    pub expected: Option<Box<str>>,
    /// The name that was probably meant.
    pub suggestion: Option<Box<str>>,
    /// The offending line, empty if the fault has no line of its own.
    pub source_line: Box<str>,
}

impl YamlError {
    /// An error found by the caller in a document that parsed: `path` is looked up in `text` for its position. A path that
    /// is not in the text (a field left to its default) points at the nearest parent that is.
    #[must_use]
    pub fn at(text: &str, file: &str, path: &[Segment], message: impl Into<String>) -> Self {
        let text = without_bom(text);
        let (line, column) = locate(text, path).unwrap_or((1, 1));
        Self::new(text, file, line, column, show_path(path), message.into())
    }

    /// Adds what would have been right.
    #[must_use]
    pub fn expected(mut self, expected: impl Into<String>) -> Self {
        self.expected = Some(expected.into().into_boxed_str());
        self
    }

    /// Adds a did-you-mean where one of `candidates` is close to `given`.
    #[must_use]
    pub fn did_you_mean<'a>(mut self, given: &str, candidates: impl IntoIterator<Item = &'a str>) -> Self {
        self.suggestion = closest(given, candidates).map(String::into_boxed_str);
        self
    }

    fn new(text: &str, file: &str, line: usize, column: usize, path: String, message: String) -> Self {
        let source_line = text.lines().nth(line.saturating_sub(1)).unwrap_or_default();
        Self {
            file: file.into(),
            line,
            column,
            path: path.into(),
            message: message.into(),
            expected: None,
            suggestion: None,
            source_line: source_line.into(),
        }
    }
}

impl fmt::Display for YamlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: {}", self.file, self.line, self.column, self.message)?;
        let gutter = self.line.to_string();
        let pad = " ".repeat(gutter.len());
        if !self.source_line.trim().is_empty() {
            let (shown, caret_at, caret_len) = window(&self.source_line, self.column);
            write!(f, "\n{pad} |\n{gutter} | {shown}\n{pad} | {}{}", " ".repeat(caret_at), "^".repeat(caret_len))?;
        }
        if !self.path.is_empty() {
            let skipped = self.path.chars().count().saturating_sub(MAX_SHOWN_CHARS / 2);
            let tail: String = self.path.chars().skip(skipped).collect();
            let cut = if skipped > 0 { "…" } else { "" };
            write!(f, "\n{pad} = in {cut}{tail}")?;
        }
        if let Some(expected) = &self.expected {
            write!(f, "\n{pad} = expected {expected}")?;
        }
        if let Some(suggestion) = &self.suggestion {
            write!(f, "\n{pad} = did you mean `{suggestion}`?")?;
        }
        Ok(())
    }
}

/// The part of a line around a column, free of control characters, with the caret's offset and length in it.
fn window(line: &str, column: usize) -> (String, usize, usize) {
    let chars: Vec<char> = line.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let at = column.saturating_sub(1).min(chars.len());
    let token = |c: &char| c.is_alphanumeric() || "_-./:+@%".contains(*c);
    let mut len = chars[at..].iter().take_while(|c| token(c)).count();
    // A key's or flow entry's colon is not part of the name.
    if len > 1 && chars[at + len - 1] == ':' {
        len -= 1;
    }
    let len = len.max(1);
    let start = if chars.len() <= MAX_SHOWN_CHARS { 0 } else { at.saturating_sub(MAX_SHOWN_CHARS / 2) };
    let end = chars.len().min(start + MAX_SHOWN_CHARS);
    let mut shown = String::new();
    if start > 0 {
        shown.push('…');
    }
    shown.extend(&chars[start..end]);
    if end < chars.len() {
        shown.push('…');
    }
    let caret_at = at - start + usize::from(start > 0);
    (shown, caret_at, len.min((end + 1).saturating_sub(at)).max(1))
}

/// Reads exactly one YAML document of type `T`.
///
/// `file` is only a name for messages. The caller has already turned the bytes into UTF-8; a leading byte order mark is
/// skipped.
///
/// # Errors
/// Anything that is not exactly one well-formed document of `T`; see the module's page for what else is refused.
pub fn parse<T: DeserializeOwned>(text: &str, file: &str) -> Result<T, YamlError> {
    let text = without_bom(text);
    scan(text, file)?;
    walk(text, file)?;
    let document = serde_yaml::Deserializer::from_str(text);
    serde_path_to_error::deserialize(document)
        .map_err(|error| typed_error(text, file, &segments(error.path()), error.inner()))
}

/// Finds line and column (both from 1) of the value at `path`, or of the deepest parent that is in the text.
#[must_use]
pub fn locate(text: &str, path: &[Segment]) -> Option<(usize, usize)> {
    let text = without_bom(text);
    (0..=path.len()).rev().find_map(|depth| locate_exactly(text, &path[..depth]))
}

fn locate_exactly(text: &str, path: &[Segment]) -> Option<(usize, usize)> {
    // The marker error raised at the wanted node carries the node's position; any other error means "not there".
    let found = RefCell::new(false);
    let error = Seeker { path, found: &found }.deserialize(serde_yaml::Deserializer::from_str(text)).err()?;
    let location = error.location()?;
    found.borrow().then_some((location.line(), location.column()))
}

fn segments(path: &serde_path_to_error::Path) -> Vec<Segment> {
    use serde_path_to_error::Segment as Step;
    path.iter()
        .filter_map(|step| match step {
            Step::Seq { index } => Some(Segment::Index(*index)),
            Step::Map { key } => Some(Segment::Key(key.clone())),
            Step::Enum { variant } => Some(Segment::Key(variant.clone())),
            Step::Unknown => None,
        })
        .collect()
}

/// The candidate closest to what was given, if it is close enough to be a slip of the fingers.
#[must_use]
pub fn closest<'a>(given: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let given_lower = given.to_lowercase();
    candidates
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(&given_lower, &candidate.to_lowercase()), candidate))
        .filter(|(score, _)| *score >= 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate.to_owned())
}

fn without_bom(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

/// Gate 1: the raw text.
fn scan(text: &str, file: &str) -> Result<(), YamlError> {
    let fail = |line, column, message: String| YamlError::new(text, file, line, column, String::new(), message);
    if text.len() > MAX_DOCUMENT_BYTES {
        let mut error = fail(1, 1, format!("the file is too large ({} bytes)", text.len()));
        error.source_line = Box::default();
        return Err(error.expected(format!("at most {MAX_DOCUMENT_BYTES} bytes")));
    }
    if text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#') || line.trim() == "---") {
        let mut error = fail(1, 1, "the file is empty".to_owned());
        error.source_line = Box::default();
        return Err(error.expected("one YAML document"));
    }
    let mut openers = 0_usize;
    let mut separators = 0_usize;
    for (number, line) in text.lines().enumerate() {
        for (column, character) in line.chars().enumerate() {
            match character {
                '[' | '{' => {
                    openers += 1;
                    separators += 1;
                }
                ']' | '}' | ',' | ':' | '?' => separators += 1,
                '\t' | '\r' => {}
                c if c.is_control() && c != '\u{85}' => {
                    let message = format!("control character U+{:04X}", u32::from(c));
                    return Err(fail(number + 1, column + 1, message).expected("printable text"));
                }
                _ => {}
            }
            if openers.saturating_mul(separators) > MAX_FLOW_STEPS {
                let message = "too many `[` and `{` in one file".to_owned();
                return Err(fail(number + 1, column + 1, message).expected("lists and mappings written in lines"));
            }
        }
    }
    Ok(())
}

/// Gate 2: the document without its types.
fn walk(text: &str, file: &str) -> Result<(), YamlError> {
    let state = RefCell::new(WalkState::default());
    let mut documents = serde_yaml::Deserializer::from_str(text);
    if let Some(document) = documents.next()
        && let Err(error) = (Walker { state: &state }).deserialize(document)
    {
        return Err(walk_error(text, file, &state, &error));
    }
    if let Some(second) = documents.next() {
        // Raised at the second document's first node: its position is the only thing wanted.
        let found = RefCell::new(false);
        let position = Seeker { path: &[], found: &found }.deserialize(second).err().and_then(|e| e.location());
        let (line, column) = position.map_or((1, 1), |l| (l.line(), l.column()));
        let message = "a second document starts here".to_owned();
        return Err(YamlError::new(text, file, line, column, String::new(), message).expected("exactly one document"));
    }
    Ok(())
}

fn walk_error(text: &str, file: &str, state: &RefCell<WalkState>, error: &serde_yaml::Error) -> YamlError {
    let (line, column) = position(error);
    let state = state.borrow();
    match &state.problem {
        Some((message, expected)) => {
            let made = YamlError::new(text, file, line, column, show_path(&state.path), message.clone());
            match expected {
                Some(expected) => made.expected(expected.clone()),
                None => made,
            }
        }
        None => {
            let raw = error.to_string();
            if raw.contains(PLAIN_KEY) {
                let message = "a list or mapping used as a key".to_owned();
                return YamlError::new(text, file, line, column, show_path(&state.path), message).expected(PLAIN_KEY);
            }
            // An opener that is never closed is noticed at the end of the file: its start is the useful place.
            let (line, column) = if line > text.lines().count() {
                last_position(&raw).unwrap_or((line, column))
            } else {
                (line, column)
            };
            syntax_error(text, file, line, column, &raw)
        }
    }
}

/// An error of the YAML parser itself.
fn syntax_error(text: &str, file: &str, line: usize, column: usize, raw: &str) -> YamlError {
    let source = text.lines().nth(line.saturating_sub(1)).unwrap_or_default();
    let indent: String = source.chars().take_while(|c| c.is_whitespace()).collect();
    let tab = indent.chars().position(|c| c == '\t');
    match tab {
        Some(tab) => {
            let message = "a tab cannot indent YAML".to_owned();
            YamlError::new(text, file, line, tab + 1, String::new(), message).expected("spaces")
        }
        None => {
            let message = format!("not valid YAML: {}", without_positions(raw));
            YamlError::new(text, file, line, column, String::new(), message)
        }
    }
}

fn position(error: &serde_yaml::Error) -> (usize, usize) {
    error.location().map_or((1, 1), |location| (location.line(), location.column()))
}

/// The last ` at line 3 column 5` in an error of the parser: where the construct it was reading began.
fn last_position(raw: &str) -> Option<(usize, usize)> {
    let (_, tail) = raw.rsplit_once(" at line ")?;
    let (line, column) = tail.split_once(" column ")?;
    Some((line.parse().ok()?, column.parse().ok()?))
}

/// Drops the parser's ` at line 3 column 5` notes: the error's own head says it better.
fn without_positions(raw: &str) -> String {
    let mut out = String::new();
    let mut rest = raw;
    while let Some(start) = rest.find(" at line ") {
        let tail = &rest[start + " at line ".len()..];
        let after_line = tail.trim_start_matches(|c: char| c.is_ascii_digit());
        let Some(after) = after_line.strip_prefix(" column ") else {
            out.push_str(&rest[..start + " at line ".len()]);
            rest = tail;
            continue;
        };
        out.push_str(&rest[..start]);
        rest = after.trim_start_matches(|c: char| c.is_ascii_digit());
    }
    out.push_str(rest);
    out
}

/// Gate 3's errors: split serde's sentence into message, expectation and did-you-mean.
fn typed_error(text: &str, file: &str, path: &[Segment], error: &serde_yaml::Error) -> YamlError {
    let (mut line, mut column) = position(error);
    let segments = path;
    let path = show_path(path);
    let raw = without_positions(&error.to_string());
    // The parser prefixes its own spelling of the path, which names at most as much as ours.
    let message = match raw.split_once(": ") {
        Some((prefix, rest)) if !prefix.is_empty() && path.starts_with(prefix) => rest.to_owned(),
        _ => raw,
    };
    // A value refused after it was read (`try_from`, `from_str`) is reported where its mapping begins. Fields that are
    // unknown or missing are not looked up: the parser's position is the key or the mapping, as it should be.
    if !message.starts_with("unknown field") && !message.starts_with("missing field") {
        (line, column) = locate_exactly(text, segments).unwrap_or((line, column));
    }
    let names = |expected: &str| -> Vec<String> { expected.split('`').skip(1).step_by(2).map(str::to_owned).collect() };
    match message.split_once(", expected ") {
        Some((head, expected)) => {
            let given = head.split('`').nth(1).unwrap_or_default().to_owned();
            let candidates = names(expected);
            let made = YamlError::new(text, file, line, column, path, plain_type(head)).expected(plain_type(expected));
            made.did_you_mean(&given, candidates.iter().map(String::as_str))
        }
        None => YamlError::new(text, file, line, column, path, message),
    }
}

/// Rust's names of types in the words of a person who writes YAML.
fn plain_type(words: &str) -> String {
    match words {
        "u8" => format!("a whole number from 0 to {}", u8::MAX),
        "u16" => format!("a whole number from 0 to {}", u16::MAX),
        "u32" => format!("a whole number from 0 to {}", u32::MAX),
        "u64" | "usize" => "a whole number, 0 or more".to_owned(),
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number".to_owned(),
        "f32" | "f64" => "a number".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "a sequence" => "a list".to_owned(),
        "a map" => "a mapping".to_owned(),
        _ if words.starts_with("struct ") => "a mapping".to_owned(),
        _ => words.replace("sequence", "list").replace("unit value", "nothing").replace(": map", ": mapping"),
    }
}
