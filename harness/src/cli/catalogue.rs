//! `harness catalogue`: the failure modes, as data.

use std::fmt::Write as _;

use camino::Utf8PathBuf;
use verdict::{Catalogue, Kind, Mode};

use crate::cli::diagnose::load_catalogue;
use crate::cli::{print, print_json};
use crate::error::CommandError;
use crate::exit::Blame;

/// `harness catalogue`
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n    harness catalogue show FM-2")]
pub(super) struct Args {
    #[command(subcommand)]
    command: CatalogueCommand,
}

/// Options of every subcommand.
#[derive(Debug, clap::Args)]
struct Shared {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Folder of YAML files with a site's own failure modes, besides the shipped ones
    #[arg(long, value_name = "DIR")]
    catalogue: Option<Utf8PathBuf>,
}

#[derive(Debug, clap::Subcommand)]
enum CatalogueCommand {
    /// List the failure modes and their look-alikes
    #[command(after_help = "Example:\n    harness catalogue list --json")]
    List {
        #[command(flatten)]
        shared: Shared,
    },
    /// Show a mode: its signs, what is sufficient for it, what to do
    #[command(after_help = "Example:\n    harness catalogue show FM-2")]
    Show {
        /// The mode's id
        id: String,
        #[command(flatten)]
        shared: Shared,
    },
    /// Print the patterns of all signs, one a line
    #[command(
        after_help = "Example:\n    harness catalogue patterns | grep -Ef - server-1.log\n    harness catalogue patterns --anchors | grep -Ff - server-1.log"
    )]
    Patterns {
        /// The literal texts of which every match has one, instead of the regular expressions
        #[arg(long)]
        anchors: bool,
        #[command(flatten)]
        shared: Shared,
    },
}

pub(super) fn run(args: Args) -> Result<u8, CommandError> {
    match args.command {
        CatalogueCommand::List { shared } => {
            let catalogue = load_catalogue(shared.catalogue.as_deref())?;
            if shared.json {
                json(&catalogue.modes())?;
            } else {
                print(&table(catalogue.modes()));
            }
        }
        CatalogueCommand::Show { id, shared } => {
            let catalogue = load_catalogue(shared.catalogue.as_deref())?;
            let mode = catalogue.get(&id).ok_or_else(|| unknown(&id, &catalogue))?;
            if shared.json {
                json(mode)?;
            } else {
                print(&page(mode));
            }
        }
        CatalogueCommand::Patterns { anchors, shared } => {
            let catalogue = load_catalogue(shared.catalogue.as_deref())?;
            let lines: Vec<String> = if anchors {
                catalogue.anchors().into_iter().map(str::to_owned).collect()
            } else {
                catalogue.patterns().into_iter().map(extended).collect()
            };
            if shared.json {
                json(&lines)?;
            } else {
                print(&format!("{}\n", lines.join("\n")));
            }
        }
    }
    Ok(0)
}

fn json<T: serde::Serialize + ?Sized>(value: &T) -> Result<(), CommandError> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| CommandError::new(Blame::Harness, "encoding the catalogue", &error))?;
    print_json(&format!("{text}\n"));
    Ok(())
}

fn unknown(id: &str, catalogue: &Catalogue) -> CommandError {
    let ids = catalogue.modes().iter().map(|mode| mode.id.as_str());
    let error = CommandError::plain(Blame::Usage, format!("the catalogue has no mode {id:?}"));
    match images::yaml::closest(&id.to_ascii_uppercase(), ids) {
        Some(near) => error.hint(format!("did you mean `{near}`?")),
        None => error.hint("`harness catalogue list` shows all"),
    }
}

/// A pattern as `grep -E` (GNU) takes it: groups have no names, no repetition is lazy.
fn extended(pattern: &str) -> String {
    let mut out = String::with_capacity(pattern.len());
    let mut rest = pattern;
    while let Some(c) = rest.chars().next() {
        if let Some(group) = rest.strip_prefix("(?") {
            let name = group
                .strip_prefix("P<")
                .or(group.strip_prefix('<'))
                .and_then(|named| named.find('>').map(|end| &named[end + 1..]));
            if let Some(after) = name.or(group.strip_prefix(':')) {
                out.push('(');
                rest = after;
                continue;
            }
        }
        rest = &rest[c.len_utf8()..];
        match c {
            '\\' => {
                let escaped = rest.chars().next().unwrap_or('\\');
                rest = rest.get(escaped.len_utf8()..).unwrap_or_default();
                match escaped {
                    'd' => out.push_str("[0-9]"),
                    't' => out.push('\t'),
                    _ => out.extend(['\\', escaped]),
                }
            }
            '[' => {
                // Within brackets grep knows no escapes.
                let end = class_end(rest);
                out.push('[');
                out.push_str(&class(&rest[..end]));
                rest = &rest[end..];
            }
            '?' if out.ends_with(['*', '+', '?', '}']) => {}
            _ => out.push(c),
        }
    }
    out
}

/// Where the bracket expression that was opened just before `text` ends.
fn class_end(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            ']' if at > 0 && text[..at] != *"^" => return at,
            _ => {}
        }
    }
    text.len()
}

/// The inside of a bracket expression without escapes: `]` goes first, `-` last.
fn class(inside: &str) -> String {
    let (negated, inside) = inside.strip_prefix('^').map_or(("", inside), |rest| ("^", rest));
    let (mut first, mut middle, mut last) = (String::new(), String::new(), String::new());
    let mut chars = inside.chars();
    while let Some(c) = chars.next() {
        match (c, if c == '\\' { chars.next() } else { None }) {
            (_, Some('w')) => middle.push_str("[:alnum:]_"),
            (_, Some('d')) => middle.push_str("0-9"),
            (_, Some('s')) => middle.push_str("[:space:]"),
            (_, Some('t')) => middle.push('\t'),
            (_, Some(']')) => first.push(']'),
            (_, Some('-')) => last.push('-'),
            (_, Some(other)) => middle.push(other),
            (c, None) => middle.push(c),
        }
    }
    format!("{negated}{first}{middle}{last}")
}

fn kind(mode: &Mode) -> &'static str {
    match mode.kind {
        Kind::Failure => "failure mode",
        Kind::LookAlike => "look-alike",
        Kind::Shared => "shared signs",
    }
}

fn table(modes: &[Mode]) -> String {
    let shown: Vec<&Mode> = modes.iter().filter(|mode| mode.kind != Kind::Shared).collect();
    let id = shown.iter().map(|mode| mode.id.len()).max().unwrap_or(0);
    let mut out = String::new();
    for mode in shown {
        let (class, blame) = (mode.class.to_string(), mode.attribution.to_string());
        let _ = writeln!(out, "{:id$}  {:12}  {class:13}  {blame:13}  {}", mode.id, kind(mode), mode.name);
    }
    out
}

fn page(mode: &Mode) -> String {
    let mut out =
        format!("{} {}\n{}, class {}, blame: {}\n\n", mode.id, mode.name, kind(mode), mode.class, mode.attribution);
    for line in textwrap(&mode.summary) {
        let _ = writeln!(out, "{line}");
    }
    let phases: Vec<String> = mode.phases.iter().map(ToString::to_string).collect();
    let names = |title: &str, names: &[String]| {
        if names.is_empty() { String::new() } else { format!("{title}: {}\n", names.join(", ")) }
    };
    let related = [
        names("phases", &phases),
        names("explains", &mode.explains),
        names("made likelier by", &mode.contributing),
        names("could be taken for", &mode.looks_like),
    ]
    .concat();
    if !related.is_empty() {
        let _ = write!(out, "\n{related}");
    }
    if !mode.rules.is_empty() {
        out.push_str("\nsufficient is one of\n");
    }
    for rule in &mode.rules {
        let groups: Vec<String> = rule.all.iter().map(|group| group.join(" or ")).collect();
        let joint = if rule.ordered { ", then " } else { ", and " };
        let within = rule.within_s.map_or_else(String::new, |seconds| format!(" within {seconds} s"));
        list(&mut out, &format!("{} ({} confidence): {}{within}", rule.name, rule.confidence, groups.join(joint)));
        let none: Vec<&str> = rule
            .none
            .iter()
            .map(|one| one.sign.as_str())
            .chain(rule.unless_recovered_by.iter().map(String::as_str))
            .collect();
        if !none.is_empty() {
            let _ = writeln!(out, "      unless {}", none.join(", "));
        }
    }
    if !mode.signs.is_empty() {
        out.push_str("\nsigns\n");
    }
    for sign in &mode.signs {
        let _ = writeln!(out, "  {}: {}", sign.name, sign.says);
        let _ = writeln!(out, "      /{}/", sign.pattern);
    }
    for (title, items) in [
        ("what to do", &mode.remedy),
        ("what this harness does against it", &mode.prevention),
        ("references", &mode.references),
    ] {
        if !items.is_empty() {
            let _ = writeln!(out, "\n{title}");
        }
        for item in items {
            list(&mut out, item);
        }
    }
    out
}

fn list(out: &mut String, text: &str) {
    for (n, line) in textwrap(text).iter().enumerate() {
        let _ = writeln!(out, "  {} {line}", if n == 0 { "-" } else { " " });
    }
}

/// Lines of at most 100 columns.
fn textwrap(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= 100 => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::extended;

    #[test]
    fn patterns_become_what_grep_takes() {
        assert_eq!(extended(r"cpus \((?P<asked>[0-9]+)\)"), r"cpus \(([0-9]+)\)");
        assert_eq!(extended(r".*?(?:a|b)\d+"), ".*(a|b)[0-9]+");
        assert_eq!(extended(r"k3s[\w@.-]*\.service"), r"k3s[[:alnum:]_@.-]*\.service");
        assert_eq!(extended(r"(^|[ \]])level="), "(^|[] ])level=");
        assert_eq!(extended(r"[^\s]x{2,}"), "[^[:space:]]x{2,}");
    }
}
