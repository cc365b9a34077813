//! `harness doctor`: what this machine has and lacks.

use std::fmt::Write as _;

use crate::cli::{Global, base, print, print_json, runtime};
use crate::doctor::{Diagnosis, Level, diagnose, look};
use crate::error::CommandError;
use crate::exit::Blame;

/// `harness doctor`
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
    harness doctor
    harness doctor --json | jq -r '.mend[]'

Exits with 0 where a run is possible, warnings or not, and with 3 where it is not. Changes nothing.")]
pub(super) struct Args {
    /// Print JSON, with all figures
    #[arg(long)]
    json: bool,
}

pub(super) fn run(global: &Global, args: Args) -> Result<u8, CommandError> {
    let folders = global.folders()?;
    let seen = runtime()?
        .block_on(look(&folders, &base()))
        .map_err(|error| CommandError::new(Blame::Environment, "looking at this machine", &error))?;
    let diagnosis = diagnose(seen);
    if args.json {
        let text = serde_json::to_string_pretty(&diagnosis)
            .map_err(|error| CommandError::new(Blame::Harness, "encoding the diagnosis", &error))?;
        print_json(&format!("{text}\n"));
    } else {
        print(&render(&diagnosis));
    }
    Ok(if diagnosis.run_possible { 0 } else { Blame::Environment.exit_code() })
}

/// The report for a person: the answer first, then what was found, then what to do.
#[must_use]
pub(crate) fn render(diagnosis: &Diagnosis) -> String {
    let (problems, warnings) = (diagnosis.count(Level::Problem), diagnosis.count(Level::Warning));
    let mut out = if diagnosis.run_possible { "A run is possible here" } else { "No run is possible here" }.to_owned();
    let counted = [counted(problems, "problem"), counted(warnings, "warning")];
    let counted: Vec<String> = counted.into_iter().flatten().collect();
    if counted.is_empty() {
        out.push_str(".\n");
    } else {
        let _ = writeln!(out, ": {}.", counted.join(", "));
    }
    let width = diagnosis.findings.iter().map(|finding| finding.name.chars().count()).max().unwrap_or(0);
    let mut area = None;
    for finding in &diagnosis.findings {
        if area != Some(finding.area) {
            area = Some(finding.area);
            let _ = writeln!(out, "\n{}", finding.area);
        }
        let level = match finding.level {
            Level::Ok => "ok",
            Level::Warning => "warning",
            Level::Problem => "PROBLEM",
        };
        let _ = writeln!(out, "  {level:7}  {:width$}  {}", finding.name, finding.seen);
        for (lead, text) in [("means", &finding.means), ("mend", &finding.mend)] {
            if let Some(text) = text {
                let _ = writeln!(out, "  {:7}  {:width$}  {lead}: {text}", "", "");
            }
        }
    }
    if !diagnosis.mend.is_empty() {
        out.push_str("\nTo mend it\n");
        for mend in &diagnosis.mend {
            let _ = writeln!(out, "  {mend}");
        }
    }
    out
}

fn counted(n: usize, what: &str) -> Option<String> {
    match n {
        0 => None,
        1 => Some(format!("1 {what}")),
        _ => Some(format!("{n} {what}s")),
    }
}
