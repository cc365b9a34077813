//! `harness stop`: ends labs that live.

use std::io::Write as _;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::cli::reach::lookup;
use crate::cli::{Global, clean, print, report};
use crate::error::CommandError;
use crate::exit::Blame;
use crate::lab::dirs;
use crate::lab::inventory::{LivingLab, living, pick_lab};

/// What the owner is sent, and how long the lab may take to be gone after it. The first takes it down in order, the
/// second at once; what the third leaves is removed here.
const STEPS: [(Signal, Duration); 3] = [
    (Signal::SIGTERM, Duration::from_secs(20)),
    (Signal::SIGTERM, Duration::from_secs(5)),
    (Signal::SIGKILL, Duration::from_secs(5)),
];

/// `harness stop`
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
    harness stop
    harness stop abc234
    harness stop --all

Without an id, the only lab that lives. A lab whose run is still going on is interrupted. Returns when the lab
is gone.")]
pub(super) struct Args {
    /// The lab (`harness ps` lists them)
    #[arg(conflicts_with = "all")]
    lab: Option<String>,
    /// Every lab that lives under this state folder, those whose runs are going on included
    #[arg(long)]
    all: bool,
}

pub(super) fn run(global: &Global, args: Args) -> Result<u8, CommandError> {
    let folders = global.folders()?;
    let mut labs = living(&folders);
    if args.all {
        if labs.is_empty() {
            print("no lab lives\n");
        }
    } else {
        labs = vec![pick_lab(labs, args.lab.as_deref(), &folders.state).map_err(|error| lookup(&error))?];
    }
    // All at once: one that takes its time holds up no other.
    let mut failed = Vec::new();
    std::thread::scope(|scope| {
        let ends: Vec<_> = labs.iter().map(|lab| (lab, scope.spawn(|| end(lab)))).collect();
        for (lab, ended) in ends {
            match ended.join() {
                Ok(Ok(())) => print(&format!("lab {} is gone\n", lab.record.lab)),
                Ok(Err(error)) => failed.push(error),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    });
    // What a killed owner could not remove. Another lab's folder is `clean`'s business, unless all are meant.
    let asked = |lab: &str| args.all || labs.iter().any(|asked| asked.record.lab == lab);
    let reaped = dirs::reap(&folders).into_iter().filter(|(lab, _)| asked(lab));
    failed.extend(reaped.filter_map(|(lab, removed)| Some(clean::left(&lab, &removed.err()?))));
    Ok(report(&failed))
}

/// Ends one lab.
///
/// # Errors
/// Where it would not end.
pub(super) fn end(lab: &LivingLab) -> Result<(), CommandError> {
    let (id, pid) = (&lab.record.lab, lab.record.owner.pid);
    let told = |signal: Signal, limit: Duration| {
        // Standard error may be closed.
        let _ = writeln!(
            std::io::stderr(),
            "lab {id} is still there {} s after {signal} to its owner (pid {pid})",
            limit.as_secs()
        );
    };
    if lab.end(&STEPS, told).map_err(|error| lookup(&error))? {
        return Ok(());
    }
    Err(CommandError::plain(Blame::Environment, format!("lab {id} would not end: its owner is process {pid}")))
}
