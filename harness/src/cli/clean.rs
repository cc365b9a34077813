//! `harness clean`: removes what killed runs left, never what lives.

use std::fmt::Write as _;

use crate::cli::{Global, print};
use crate::error::CommandError;
use crate::lab::dirs;

/// `harness clean`
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n    harness clean\n\nRecords of runs are kept; a lab whose harness lives is not touched."
)]
pub(super) struct Args {}

pub(super) fn run(global: &Global, _args: Args) -> Result<u8, CommandError> {
    let reaped = dirs::reap(&global.folders()?);
    let mut out = String::new();
    for lab in &reaped {
        let _ = writeln!(out, "removed the folders of lab {lab}");
    }
    if reaped.is_empty() {
        out.push_str("nothing to clean\n");
    }
    print(&out);
    Ok(0)
}
