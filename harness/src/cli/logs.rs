//! `harness logs`: a guest's journal, from the guest while it lives and from the run's records afterwards.

use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader};

use crate::cli::Global;
use crate::cli::reach::{self, Found, Said};
use crate::cli::signals::Signals;
use crate::error::CommandError;
use crate::exit::Blame;
use crate::guest::{GuestError, StreamEnd, quote};
use crate::lab::inventory::{LivingLab, NodeEntry};
use crate::redact::redact;

/// The longest piece of a line that is looked at as one.
const LINE_MAX_BYTES: u64 = 64 * 1024;

/// Within which a lab is gone once its first guest is.
const TEARDOWN_MAX: Duration = Duration::from_secs(10);

/// `harness logs`
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
    harness logs server-1 -f
    harness logs server-1 --unit k3s-server
    harness logs server-1 --run 20260101T120000Z-smoke-abc234

Of a lab that lives, the guest's journal since its boot; otherwise the journal in the records of the newest
run that had such a node. Join tokens are blotted out.")]
pub(super) struct Args {
    #[command(flatten)]
    said: Said,
    /// Only this systemd unit
    #[arg(short, long, conflicts_with = "run")]
    unit: Option<String>,
}

pub(super) fn run(global: &Global, args: Args) -> Result<u8, CommandError> {
    match args.said.find(global, "journal")? {
        Found::Living(found) => reach::block_on(from_guest(&args, *found)),
        Found::Records(_) if args.unit.is_some() => {
            let message = format!("no lab with a node {} lives, and records cannot be filtered", args.said.node);
            Err(CommandError::plain(Blame::Usage, message))
        }
        Found::Records(dir) => reach::print_file(&dir.join("journal.log")),
    }
}

async fn from_guest(args: &Args, (lab, node): (LivingLab, NodeEntry)) -> Result<u8, CommandError> {
    let guest = reach::connect(&lab, &node).await?;
    let mut signals = Signals::open()?;
    let mut stdout = reach::shown(&std::io::stdout())?;
    let mut stderr = reach::shown(&std::io::stderr())?;
    let (mut journal, raw) = tokio::io::duplex(64 * 1024);
    let stop = async {
        signals.next().await;
    };
    let command = command_line(args.said.follow, args.unit.as_deref());
    let piped = async {
        let ended = guest.pipe(&command, None::<tokio::io::Empty>, &mut journal, &mut stderr, stop).await;
        drop(journal);
        ended
    };
    // Where the reader of our output goes away, `raw` is dropped, and the command ends by a closed pipe.
    let (ended, _) = tokio::join!(piped, copy_redacted(raw, &mut stdout));
    // What a filter held back; a stream that is closed has nothing to be told.
    let _ = (stdout.shutdown().await, stderr.shutdown().await);
    match ended {
        Ok(Some(StreamEnd::Exited { status: Some(0), .. })) => Ok(0),
        Ok(None) => Ok(if args.said.follow { 0 } else { Blame::Interrupted.exit_code() }),
        Err(error) if reach::reader_went(&error) => Ok(0),
        Ok(Some(end)) => {
            let what = format!("journalctl on {} ended with {}", node.name, reach::exit_code(&end));
            Err(CommandError::plain(Blame::Environment, what))
        }
        Err(error) => {
            // The end of a lab is the natural end of its log; its guests go a moment before its owner does.
            if args.said.follow && matches!(error, GuestError::ConnectionLost { .. }) && is_ending(lab).await? {
                return Ok(0);
            }
            Err(CommandError::new(Blame::Environment, format!("reading the journal of {}", node.name), &error))
        }
    }
}

/// Whether the lab is gone, or is within its time for that.
async fn is_ending(lab: LivingLab) -> Result<bool, CommandError> {
    match tokio::task::spawn_blocking(move || lab.wait_gone(TEARDOWN_MAX)).await {
        Ok(gone) => gone.map_err(|error| reach::lookup(&error)),
        Err(error) => Err(CommandError::new(Blame::Harness, "waiting for the end of the lab", &error)),
    }
}

/// journalctl(1).
fn command_line(follow: bool, unit: Option<&str>) -> String {
    let mut line = "exec journalctl --no-pager --boot --output=short-iso-precise".to_owned();
    if follow {
        line.push_str(" --follow --lines=all");
    }
    if let Some(unit) = unit {
        line.push_str(" --unit=");
        line.push_str(&quote(unit));
    }
    line
}

/// Copies line by line, with the tokens taken out; a line longer than the limit goes in pieces.
async fn copy_redacted(from: impl AsyncRead + Unpin, to: &mut (impl AsyncWrite + Unpin)) -> std::io::Result<()> {
    let mut from = BufReader::with_capacity(64 * 1024, from);
    let mut line = Vec::new();
    loop {
        line.clear();
        if (&mut from).take(LINE_MAX_BYTES).read_until(b'\n', &mut line).await? == 0 {
            return to.flush().await;
        }
        to.write_all(redact(&String::from_utf8_lossy(&line)).as_bytes()).await?;
        // What is there already is taken first: one write for many lines.
        if from.buffer().is_empty() {
            to.flush().await?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_cannot_be_more_than_a_word() {
        assert!(command_line(true, None).ends_with("--follow --lines=all"));
        assert!(command_line(false, Some("a; reboot")).ends_with(" --unit='a; reboot'"));
    }

    #[tokio::test]
    async fn tokens_are_taken_out_and_nothing_else_changes() {
        let token = format!("K10{}::server:{}", "a1".repeat(32), "0f".repeat(16));
        let text = format!("one\ntoken {token} here\nlast without an end");
        let mut out = Vec::new();
        copy_redacted(text.as_bytes(), &mut out).await.unwrap();
        let out = String::from_utf8(out).unwrap();
        assert!(out.starts_with("one\ntoken ") && out.ends_with(" here\nlast without an end"), "{out}");
        assert!(!out.contains("::server:"));
    }
}
