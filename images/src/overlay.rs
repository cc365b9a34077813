//! A node's root disk: a qcow2 overlay on the raw base all nodes share.

use std::time::Duration;

use camino::Utf8Path;

use crate::error::Error;
use crate::tool::{ToolCommand, ToolRunner};

/// How long `qemu-img create` may take; it writes a few hundred KiB.
const DEADLINE: Duration = Duration::from_secs(30);

/// Creates the overlay `path` on the raw image `base`. An existing file is an error, never overwritten.
///
/// The base is recorded by its absolute path and is not written to.
///
/// # Errors
/// Where `path` exists, or `qemu-img` is missing or fails.
pub async fn create(base: &Utf8Path, path: &Utf8Path, runner: &dyn ToolRunner) -> Result<(), Error> {
    let base = base.canonicalize_utf8().map_err(Error::io("find base image", base))?;
    // qemu-img overwrites without a word.
    std::fs::File::create_new(path).map_err(Error::io("create overlay", path))?;
    let doing = format!("create overlay {path}");
    let error = match runner.run(command(&base, path)).await {
        Ok(exit) if exit.success() => return Ok(()),
        Ok(exit) => Error::ToolFailed { doing, program: "qemu-img".to_owned(), exit },
        Err(source) => Error::Tool { doing, source },
    };
    // The error at hand says more than one about the empty file would.
    let _ = std::fs::remove_file(path);
    Err(error)
}

fn command(base: &Utf8Path, path: &Utf8Path) -> ToolCommand {
    ToolCommand::new("overlay", "qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", base.as_str(), path.as_str()])
        .deadline(DEADLINE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_names_both_formats() {
        let command = command(Utf8Path::new("/s/root.raw"), Utf8Path::new("/r/a.qcow2"));
        assert_eq!(command.program, "qemu-img");
        assert_eq!(command.args.join(" "), "create -q -f qcow2 -F raw -b /s/root.raw /r/a.qcow2");
    }
}
