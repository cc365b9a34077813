//! `harness list`: scenarios and profiles, one line each.

use std::fmt::Write as _;

use crate::cli::{base, print, print_json};
use crate::error::CommandError;
use crate::scenario::{Listed, Source, list_profiles, list_scenarios};

/// `harness list`
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n    harness list --json")]
pub(super) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: Args) -> Result<u8, CommandError> {
    let (scenarios, profiles) = (list_scenarios(&base()), list_profiles(&base()));
    if args.json {
        let all = serde_json::json!({ "scenarios": scenarios, "profiles": profiles });
        print_json(&format!("{all:#}\n"));
    } else {
        print(&format!("scenarios:\n{}\nprofiles:\n{}", table(&scenarios), table(&profiles)));
    }
    Ok(0)
}

fn table(listed: &[Listed]) -> String {
    let width = listed.iter().map(|one| one.name.len()).max().unwrap_or(0);
    let mut out = String::new();
    for one in listed {
        let flag = if one.valid { "" } else { "INVALID: " };
        let source = match &one.source {
            Source::Shipped => String::new(),
            // Below the working folder, as a person there would write it.
            Source::File(path) => match path.strip_prefix(base()) {
                Ok(below) => format!(" (./{below})"),
                Err(_) => format!(" ({path})"),
            },
        };
        let _ = writeln!(out, "  {:width$}  {flag}{}{source}", one.name, one.description);
    }
    out
}
