//! `harness console`: what a guest has said on its serial console.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::time::Duration;

use camino::Utf8Path;

use crate::cli::reach::{self, Which};
use crate::cli::signals::Signals;
use crate::cli::{Global, logs};
use crate::error::CommandError;
use crate::exit::Blame;
use crate::lab::inventory::Owner;

/// How often a followed console is looked at: a `read` on the host, as the run itself follows it.
const POLL: Duration = Duration::from_millis(100);

/// `harness console`
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
    harness console server-1 -f
    harness console server-1 --run 20260101T120000Z-smoke-abc234

Output only: QEMU writes the console to a file, from the kernel's first line to the last.")]
pub(super) struct Args {
    /// The node
    node: String,
    #[command(flatten)]
    which: Which,
    /// Go on with what is said from now on, until Ctrl-C or the lab's end
    #[arg(short, long, conflicts_with = "run")]
    follow: bool,
    /// The records of this run, also while a lab lives
    #[arg(long, value_name = "ID", conflicts_with = "lab")]
    run: Option<String>,
}

pub(super) fn run(global: &Global, args: Args) -> Result<u8, CommandError> {
    let folders = global.folders()?;
    if args.run.is_none()
        && let Some((lab, node)) = args.which.node_if_living(&folders, &args.node)?
    {
        return if args.follow {
            reach::block_on(follow(&node.console_log, lab.record.owner))
        } else {
            logs::print_file(&node.console_log)
        };
    }
    let dir = reach::recorded(&folders, args.run.as_deref(), &args.node)?;
    if args.follow {
        return Err(CommandError::plain(
            Blame::Usage,
            format!("no lab with a node {} lives to be followed", args.node),
        ));
    }
    if args.run.is_none() {
        // Standard error may be closed.
        let _ = writeln!(
            io::stderr(),
            "no lab with it lives: the console is of run {}",
            dir.file_name().unwrap_or_default()
        );
    }
    logs::print_file(&dir.join("nodes").join(&args.node).join("console.log"))
}

async fn follow(path: &Utf8Path, owner: Owner) -> Result<u8, CommandError> {
    let reading = |error: &io::Error| CommandError::new(Blame::Environment, format!("reading {path}"), error);
    let mut signals = Signals::open()?;
    let mut file = File::open(path).map_err(|error| reading(&error))?;
    loop {
        // Asked before the read: what was written until the end is then read.
        let over = !owner.lives();
        match copy_rest(&mut file, &mut io::stdout().lock()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(0),
            copied => copied.map_err(|error| reading(&error))?,
        }
        if over {
            return Ok(0);
        }
        tokio::select! {
            _ = signals.next() => return Ok(0),
            () = tokio::time::sleep(POLL) => {}
        }
    }
}

/// Copies what has been added since the last time.
fn copy_rest(file: &mut File, to: &mut impl io::Write) -> io::Result<()> {
    let mut chunk = [0; 16 * 1024];
    loop {
        let n = file.read(&mut chunk)?;
        if n == 0 {
            return to.flush();
        }
        to.write_all(&chunk[..n])?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_added_is_copied_once() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("console.log");
        std::fs::write(&path, "one\n").unwrap();
        let (mut file, mut out) = (File::open(&path).unwrap(), Vec::new());
        copy_rest(&mut file, &mut out).unwrap();
        File::options().append(true).open(&path).unwrap().write_all(b"two\n").unwrap();
        copy_rest(&mut file, &mut out).unwrap();
        copy_rest(&mut file, &mut out).unwrap();
        assert_eq!(out, b"one\ntwo\n");
    }
}
