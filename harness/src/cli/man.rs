//! `harness man`: the manual pages, made of what `--help` says.

use std::fmt::Write as _;

use camino::Utf8PathBuf;
use clap::CommandFactory as _;

use crate::cli::{Cli, print};
use crate::error::CommandError;
use crate::exit::Blame;

/// `harness man`
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n    harness man ~/.local/share/man/man1 && man harness-run")]
pub(super) struct Args {
    /// The folder to write them to; made where it is missing
    dir: Utf8PathBuf,
}

pub(super) fn run(args: Args) -> Result<u8, CommandError> {
    let failed = |error: std::io::Error| {
        CommandError::new(Blame::Environment, format!("writing manual pages to {}", args.dir), &error)
    };
    std::fs::create_dir_all(&args.dir).map_err(failed)?;
    let mut out = String::new();
    for (name, page) in pages(Cli::command()).map_err(failed)? {
        let path = args.dir.join(name);
        std::fs::write(&path, page).map_err(failed)?;
        let _ = writeln!(out, "{path}");
    }
    print(&out);
    Ok(0)
}

/// One page per command: file name and text. A command within a command is called `harness-image-build`.
fn pages(command: clap::Command) -> std::io::Result<Vec<(String, Vec<u8>)>> {
    let mut command = command.disable_help_subcommand(true);
    command.build();
    let mut pages = Vec::new();
    let mut left = vec![command];
    while let Some(command) = left.pop() {
        let display_name = command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned();
        left.extend(command.get_subcommands().filter(|sub| !sub.is_hide_set()).cloned());
        let man = clap_mangen::Man::new(command).source(format!("harness {}", env!("CARGO_PKG_VERSION")));
        let mut page = Vec::new();
        man.render(&mut page)?;
        pages.push((format!("{display_name}.1"), page));
    }
    pages.sort();
    Ok(pages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page_with_its_example() {
        let pages = pages(Cli::command()).unwrap();
        let names: Vec<&str> = pages.iter().map(|(name, _)| name.as_str()).collect();
        for name in ["harness.1", "harness-run.1", "harness-doctor.1", "harness-image-build.1"] {
            assert!(names.contains(&name), "{names:?}");
        }
        let (_, run) = pages.iter().find(|(name, _)| name == "harness-run.1").unwrap();
        let run = String::from_utf8_lossy(run);
        assert!(run.contains(".TH harness-run 1") && run.contains("bonding") && run.contains("Examples:"), "{run}");
    }
}
