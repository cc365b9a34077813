//! `harness stop`: ends labs that live.

use std::io::Write as _;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::cli::reach::lookup;
use crate::cli::{Global, print};
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
    // All of them are asked before one is waited for. One that cannot be asked is reported when it is its turn.
    for lab in &labs[..labs.len().saturating_sub(1)] {
        let _ = lab.signal(Signal::SIGTERM);
    }
    let several = labs.len() > 1;
    let mut failed = None;
    for (n, lab) in labs.iter().enumerate() {
        let asked = several && n + 1 < labs.len();
        match end(lab, asked) {
            Ok(()) => print(&format!("lab {} is gone\n", lab.record.lab)),
            Err(error) => failed = Some(error),
        }
    }
    // What a killed owner could not remove.
    let _ = dirs::reap(&folders);
    failed.map_or(Ok(0), Err)
}

fn end(lab: &LivingLab, asked: bool) -> Result<(), CommandError> {
    for (n, (signal, limit)) in STEPS.into_iter().enumerate() {
        let sent = if n == 0 && asked { Ok(true) } else { lab.signal(signal) };
        let sent = sent.map_err(|error| lookup(&error))?;
        if lab.wait_gone(limit).map_err(|error| lookup(&error))? {
            return Ok(());
        }
        if !sent {
            break;
        }
        // Standard error may be closed.
        let _ = writeln!(
            std::io::stderr(),
            "lab {} is still there {} s after {signal} to its owner (pid {})",
            lab.record.lab,
            limit.as_secs(),
            lab.record.owner.pid
        );
    }
    let message = format!("lab {} would not end: its owner is process {}", lab.record.lab, lab.record.owner.pid);
    Err(CommandError::plain(Blame::Environment, message))
}
