//! `harness console`: what a guest has said on its serial console.

use std::fs::File;
use std::io::{self, Read as _};
use std::time::Duration;

use camino::Utf8Path;

use crate::cli::Global;
use crate::cli::reach::{self, Found, Said};
use crate::cli::signals::Signals;
use crate::error::CommandError;
use crate::exit::Blame;
use crate::lab::inventory::Owner;
use crate::printable::ShownSync;

/// How often a followed console is looked at: a `read` on the host, as the run itself follows it.
const POLL: Duration = Duration::from_millis(100);

/// `harness console`
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
    harness console server-1 -f
    harness console server-1 --run 20260101T120000Z-smoke-abc234

Output only: QEMU writes the console to a file, from the kernel's first line to the last.")]
pub(super) struct Args {
    #[command(flatten)]
    said: Said,
}

pub(super) fn run(global: &Global, args: Args) -> Result<u8, CommandError> {
    match args.said.find(global, "console")? {
        Found::Living(found) => {
            let (lab, node) = *found;
            if args.said.follow {
                reach::block_on(follow(&node.console_log, lab.record.owner))
            } else {
                reach::print_file(&node.console_log)
            }
        }
        Found::Records(dir) => reach::print_file(&dir.join("console.log")),
    }
}

async fn follow(path: &Utf8Path, owner: Owner) -> Result<u8, CommandError> {
    let reading = |error: &io::Error| CommandError::new(Blame::Environment, format!("reading {path}"), error);
    let mut signals = Signals::open()?;
    let mut file = File::open(path).map_err(|error| reading(&error))?;
    let mut out = ShownSync::new(io::stdout());
    loop {
        // Asked before the read: what was written until the end is then read.
        let over = !owner.lives();
        match copy_rest(&mut file, &mut out) {
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
    use std::io::Write as _;

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
