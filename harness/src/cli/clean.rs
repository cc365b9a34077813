//! `harness clean`: removes what killed runs left, and ends labs that are kept past their time; never what lives otherwise.

use std::fmt::Write as _;
use std::time::Duration;

use jiff::Timestamp;
use nix::sys::signal::Signal;

use crate::cli::reach::lookup;
use crate::cli::{Global, print, report, stop};
use crate::error::CommandError;
use crate::exit::Blame;
use crate::lab::dirs;
use crate::lab::inventory::living;
use crate::record::RecordError;

/// How long the owner of a lab whose time is over may take to end it by itself.
const PATIENCE: Duration = Duration::from_secs(5);

/// `harness clean`
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
    harness clean

Records of runs are kept; a lab whose harness lives is not touched, unless it was kept and its time is over.")]
pub(super) struct Args {}

pub(super) fn run(global: &Global, _args: Args) -> Result<u8, CommandError> {
    let folders = global.folders()?;
    let mut out = String::new();
    let mut failed = Vec::new();
    for lab in living(&folders).into_iter().filter(|lab| lab.expired(Timestamp::now())) {
        // One that was stopped goes on, sees that the time is over, and takes its lab down in order.
        let woken = lab.signal(Signal::SIGCONT);
        let ended = match woken.and_then(|_| lab.wait_gone(PATIENCE)) {
            Ok(true) => Ok(()),
            Ok(false) => stop::end(&lab),
            Err(error) => Err(lookup(&error)),
        };
        match ended {
            Ok(()) => drop(writeln!(out, "ended lab {}: its time was over", lab.record.lab)),
            Err(error) => failed.push(error),
        }
    }
    for (lab, removed) in dirs::reap(&folders) {
        match removed {
            Ok(()) => drop(writeln!(out, "removed the folders of lab {lab}")),
            Err(error) => failed.push(left(&lab, &error)),
        }
    }
    if out.is_empty() && failed.is_empty() {
        out.push_str("nothing to clean\n");
    }
    print(&out);
    Ok(report(&failed))
}

/// What is left of a lab whose owner was killed.
pub(super) fn left(lab: &str, error: &RecordError) -> CommandError {
    CommandError::new(Blame::Environment, format!("removing the folders of lab {lab}"), error)
}
