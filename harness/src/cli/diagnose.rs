//! `harness diagnose`: a verdict over logs from elsewhere.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Instant;

use camino::Utf8PathBuf;
use verdict::{Catalogue, Outcome};

use crate::cli::{print, print_json};
use crate::diagnose::{Diagnosis, Error, Input, Limits, diagnose};
use crate::error::CommandError;
use crate::exit::Blame;
use crate::printable::printable;

/// A failure was seen and the catalogue does not know it.
const EXIT_UNKNOWN_FAILURE: u8 = 5;
/// Logs and notes shown to a person.
const LISTED_MAX: usize = 8;

const HELP: &str = "PATH is a log, plain or compressed (gzip, zstd), in any dialect: k3s, etcd, systemd, kernel, QEMU, curl, as journald
(short, cat, json, export), Docker, containerd or a CI system wraps it; a run folder; a folder or an archive (zip, tar,
tar.gz, tar.zst) of a CI job's artifacts, archives in it included; or - for standard input. What a file is, is told by
its content. Nodes are told by folder and file names and by the lines; otherwise they are called unknown.

Exit codes:
    0  a verdict: a failure mode, an explained failure that is none, or nothing failed
    2  usage: a flag, a catalogue
    3  an input cannot be read, or there is no log in it
    5  no verdict: something failed that is not in the catalogue

Examples:
    harness diagnose server-1.log server-2.log.gz
    harness diagnose job-artifacts.zip --json
    journalctl -D ./journal -o export | harness diagnose -";

/// `harness diagnose`
#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub(super) struct Args {
    /// What to read; - is standard input
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// Print the verdict as JSON
    #[arg(long)]
    json: bool,
    /// Folder of YAML files with a site's own failure modes, besides the shipped ones
    #[arg(long, value_name = "DIR")]
    catalogue: Option<Utf8PathBuf>,
}

pub(super) fn run(args: Args) -> Result<u8, CommandError> {
    let catalogue = load_catalogue(args.catalogue.as_deref())?;
    let input = |path: PathBuf| if path.as_os_str() == "-" { Input::Stdin } else { Input::Path(path) };
    let inputs: Vec<Input> = args.paths.into_iter().map(input).collect();
    if inputs.iter().filter(|input| **input == Input::Stdin).count() > 1 {
        return Err(CommandError::plain(Blame::Usage, "standard input (-) can be read only once"));
    }
    let began = Instant::now();
    let diagnosis = diagnose(&inputs, &catalogue, &Limits::default()).map_err(|error| unreadable(&error))?;
    let bytes: u64 = diagnosis.logs.iter().map(|log| log.bytes).sum();
    tracing::info!(
        bytes,
        elapsed_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        peak_rss_kib = peak_rss_kib(),
        "read"
    );
    if args.json {
        let text = serde_json::to_string_pretty(&diagnosis.verdict)
            .map_err(|error| CommandError::new(Blame::Harness, "encoding the verdict", &error))?;
        for note in &diagnosis.notes {
            // Standard error may be closed; the verdict is what counts.
            let _ = std::io::Write::write_all(&mut std::io::stderr(), printable(&format!("note: {note}\n")).as_bytes());
        }
        print_json(&format!("{text}\n"));
    } else {
        print(&screen(&diagnosis));
    }
    Ok(exit_code(&diagnosis))
}

/// The shipped catalogue, with a site's own modes where a folder is named.
pub(super) fn load_catalogue(site: Option<&camino::Utf8Path>) -> Result<Catalogue, CommandError> {
    match site {
        Some(dir) => crate::catalogue::with_site(dir)
            .map_err(|error| CommandError::new(Blame::Usage, "loading the catalogue", &error)),
        None => crate::catalogue::shipped()
            .map_err(|error| CommandError::new(Blame::Harness, "reading the shipped catalogue", &error)),
    }
}

fn unreadable(error: &Error) -> CommandError {
    CommandError::new(Blame::Environment, "diagnosing", error)
}

fn exit_code(diagnosis: &Diagnosis) -> u8 {
    let verdict = &diagnosis.verdict;
    let explained = verdict.id.is_some() || verdict.look_alike.is_some();
    if verdict.outcome == Outcome::Failed && !explained { EXIT_UNKNOWN_FAILURE } else { 0 }
}

/// The verdict as `run` prints it, and what it was reached on.
fn screen(diagnosis: &Diagnosis) -> String {
    let mut out = diagnosis.verdict.render_human();
    let bytes = diagnosis.logs.iter().map(|log| log.bytes).sum();
    let lines: u64 = diagnosis.logs.iter().map(|log| log.lines).sum();
    let _ = writeln!(out, "read: {}, {}, {lines} lines", count(diagnosis.logs.len(), "log"), size(bytes));
    for log in diagnosis.logs.iter().take(LISTED_MAX) {
        let node =
            log.node.as_deref().map_or_else(|| "node as its lines say".to_owned(), |node| format!("node {node}"));
        let source = match log.source {
            verdict::SourceKind::Unknown => String::new(),
            known => format!(", {known}"),
        };
        let _ = writeln!(out, "  {}  {node}{source}, {}", log.name, size(log.bytes));
    }
    more(&mut out, diagnosis.logs.len());
    if !diagnosis.notes.is_empty() {
        out.push_str("notes\n");
    }
    for note in diagnosis.notes.iter().take(LISTED_MAX) {
        let _ = writeln!(out, "  {note}");
    }
    more(&mut out, diagnosis.notes.len());
    out
}

fn more(out: &mut String, total: usize) {
    if total > LISTED_MAX {
        let _ = writeln!(out, "  and {} more", total - LISTED_MAX);
    }
}

fn count(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

/// A size for a person.
fn size(bytes: u64) -> String {
    match bytes {
        0..=9_999 => format!("{bytes} bytes"),
        10_000..=9_999_999 => format!("{} KB", bytes / 1000),
        _ => format!("{} MB", bytes / 1_000_000),
    }
}

/// Most memory the process has held at once, KiB; 0 where the kernel does not say.
fn peak_rss_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()).and_then(|kib| kib.parse().ok()).unwrap_or(0)
}
