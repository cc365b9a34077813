//! `harness exec`: a command in a guest, its streams joined to ours.

use std::io::Write as _;
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;

use crate::cli::Global;
use crate::cli::reach::{self, Which};
use crate::cli::signals::Signals;
use crate::error::CommandError;
use crate::exit::Blame;
use crate::guest::quote;
use crate::printable::printable;

/// `harness exec`
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
    harness exec server-1 -- k3s --version
    harness exec server-1 -- 'journalctl -u k3s-server | tail -n 5'
    tar -c . | harness exec server-1 --stdin -- tar -xC /root

What goes to a terminal is shown with its control characters as escapes; a pipe or a file gets every byte as it is.
One argument is a command line for the guest's shell; several are taken word by word.
Exit code: the command's own; 128 and the signal's number where a signal killed it;
255 where the guest could not be reached, as with ssh; 130 on Ctrl-C, which kills the command.")]
pub(super) struct Args {
    /// The node
    node: String,
    #[command(flatten)]
    which: Which,
    /// Give the command our standard input; it is empty otherwise
    #[arg(short = 'i', long)]
    stdin: bool,
    /// The command
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// What every failure to run the command ends with, so that 0 to 254 are the command's own.
const NOT_RUN: u8 = 255;

/// How long the last bytes of an output may take.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

pub(super) fn run(global: &Global, args: Args) -> Result<u8, CommandError> {
    Ok(reach::block_on(joined(global, args)).unwrap_or_else(|error| {
        // Standard error may be closed; the exit code still says it.
        let _ = std::io::stderr().write_all(printable(&error.render()).as_bytes());
        NOT_RUN
    }))
}

async fn joined(global: &Global, args: Args) -> Result<u8, CommandError> {
    let (lab, node) = args.which.node(global, &args.node)?;
    let guest = reach::connect(&lab, &node).await?;
    let mut signals = Signals::open()?;
    let (mut stdout, mut stderr) = (reach::shown(&std::io::stdout())?, reach::shown(&std::io::stderr())?);
    let stdin = if args.stdin { Some(reach::stream(&std::io::stdin())?) } else { None };
    let stop = async {
        signals.next().await;
    };
    let ended = guest.pipe(&command_line(&args.command), stdin, &mut stdout, &mut stderr, stop).await;
    // What a filter held back; a stream that is closed has nothing to be told, one that is blocked is not waited for.
    let flushed = async { (stdout.shutdown().await, stderr.shutdown().await) };
    let _ = tokio::time::timeout(FLUSH_LIMIT, flushed).await;
    match ended {
        Ok(Some(end)) => Ok(reach::exit_code(&end)),
        Ok(None) => Ok(Blame::Interrupted.exit_code()),
        // What a shell says of a program that a closed pipe has ended: 128 and SIGPIPE.
        Err(error) if reach::reader_went(&error) => Ok(141),
        Err(error) => Err(CommandError::new(Blame::Environment, format!("running it on {}", node.name), &error)),
    }
}

/// One argument as it is, several as words.
fn command_line(command: &[String]) -> String {
    match command {
        [line] => line.clone(),
        words => words.iter().map(|word| quote(word)).collect::<Vec<_>>().join(" "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_argument_is_a_line_and_several_are_words() {
        let words = |words: &[&str]| command_line(&words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>());
        assert_eq!(words(&["echo $HOME; id"]), "echo $HOME; id");
        assert_eq!(words(&["echo", "$HOME; id", "it's"]), r"echo '$HOME; id' 'it'\''s'");
    }
}
