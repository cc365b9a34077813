//! `harness completions`: what a shell needs to complete the command line.

use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::cli::{Cli, print};
use crate::error::CommandError;

/// `harness completions`
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
    harness completions bash > ~/.local/share/bash-completion/completions/harness
    harness completions fish > ~/.config/fish/completions/harness.fish")]
pub(super) struct Args {
    /// The shell
    shell: Shell,
}

#[expect(clippy::unnecessary_wraps, reason = "every command answers alike")]
pub(super) fn run(args: Args) -> Result<u8, CommandError> {
    // Into memory first: the generator panics where its output is closed early.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "harness", &mut script);
    print(&String::from_utf8_lossy(&script));
    Ok(0)
}
