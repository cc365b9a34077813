//! What can go wrong while an image is made, kept or used.

use camino::Utf8PathBuf;

use crate::elf::ElfError;
use crate::fs::FolderError;
use crate::k3s::K3sError;
use crate::recipe::RecipeError;
use crate::seed::SeedError;
use crate::tool::{ToolError, ToolExit, tail_block};

/// An error of this crate; the message reads after "failed to …".
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A recipe that cannot be used.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// A guest binary that is not for the guests' machine.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// A k3s source without a binary.
    #[error(transparent)]
    K3s(#[from] K3sError),
    /// A seed that could not be written.
    #[error(transparent)]
    Seed(#[from] SeedError),
    /// A folder that images cannot live in.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// A tool that could not be run to its end.
    #[error("{doing}: {source}")]
    Tool {
        /// What was being done.
        doing: String,
        /// What the runner said.
        source: ToolError,
    },
    /// A tool that ran and failed.
    #[error("{doing}: {program} {exit}{}", tail_block(&.exit.output_tail))]
    ToolFailed {
        /// What was being done.
        doing: String,
        /// The tool.
        program: String,
        /// How it ended; the end of its log is shown with the message.
        exit: ToolExit,
    },
    /// A file operation failed.
    #[error("could not {doing} {path}: {source}")]
    Io {
        /// The operation.
        doing: &'static str,
        /// The file.
        path: Utf8PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The root file system a build made lacks something an image needs.
    #[error("the root file system of {recipe} has no {what}: {hint}")]
    RootfsLacks {
        /// The recipe.
        recipe: String,
        /// What is missing.
        what: String,
        /// What to do about it.
        hint: &'static str,
    },
    /// An artifact of the store is not what was registered.
    #[error("{path} is not what was registered: {reason}")]
    Corrupt {
        /// The file or folder.
        path: Utf8PathBuf,
        /// What differs.
        reason: String,
    },
    /// The program is shutting down.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// An adapter for `map_err` on file operations.
    pub(crate) fn io(doing: &'static str, path: impl Into<Utf8PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { doing, path, source }
    }
}
