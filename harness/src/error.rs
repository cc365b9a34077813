//! Errors at the edge of the binary: a cause chain, a hint, and who is to blame.

use crate::exit::Blame;
use crate::record::RecordError;

/// An error a command ends with.
#[derive(Debug)]
pub struct CommandError {
    /// Who is to blame; decides the exit code.
    pub blame: Blame,
    /// Outermost first, each a lowercase fragment.
    pub chain: Vec<String>,
    /// What to do about it.
    pub hint: Option<String>,
}

impl CommandError {
    /// An error with its chain of causes taken from `source()`.
    pub fn new(blame: Blame, context: impl Into<String>, error: &(dyn std::error::Error + 'static)) -> Self {
        let mut chain = vec![context.into()];
        chain.extend(chain_of(error));
        Self { blame, chain, hint: storage_hint(error).map(str::to_owned) }
    }

    /// An error that stands for itself.
    pub fn plain(blame: Blame, message: impl Into<String>) -> Self {
        Self { blame, chain: vec![message.into()], hint: None }
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The error as it is printed to a person.
    #[must_use]
    pub fn render(&self) -> String {
        let mut out = String::new();
        for (depth, part) in self.chain.iter().enumerate() {
            let lead = if depth == 0 { "error: " } else { "  caused by: " };
            for (n, line) in part.lines().enumerate() {
                if n == 0 {
                    out.push_str(lead);
                } else {
                    out.push_str("    ");
                }
                out.push_str(line);
                out.push('\n');
            }
        }
        if let Some(hint) = &self.hint {
            out.push_str("hint: ");
            out.push_str(hint);
            out.push('\n');
        }
        out
    }
}

/// What to do about a folder in which there is no space.
pub const NO_SPACE_HINT: &str = "make room (`df -h`, `harness clean`, `harness image gc`), or choose other folders with --state-dir and --cache-dir";

/// What to do about a folder that cannot be written.
const NOT_WRITABLE_HINT: &str = "choose folders that can be written with --state-dir and --cache-dir";

/// What to do about a folder that cannot be used, where that is at the bottom of an error.
#[must_use]
pub fn storage_hint(error: &(dyn std::error::Error + 'static)) -> Option<&'static str> {
    use std::io::ErrorKind;
    let sources = || std::iter::successors(Some(error), |error| error.source()).take(16);
    let kind = sources().filter_map(|error| error.downcast_ref::<std::io::Error>()).last()?.kind();
    // A device or a program may be denied, too.
    let of_a_folder = || sources().any(|error| error.is::<RecordError>() || error.is::<images::Error>());
    match kind {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Some(NO_SPACE_HINT),
        ErrorKind::ReadOnlyFilesystem => Some(NOT_WRITABLE_HINT),
        ErrorKind::PermissionDenied if of_a_folder() => Some(NOT_WRITABLE_HINT),
        _ => None,
    }
}

/// The messages of an error and its sources, outermost first, without repeating what a message already quotes.
#[must_use]
pub fn chain_of(error: &(dyn std::error::Error + 'static)) -> Vec<String> {
    let mut chain: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let message = error.to_string();
        if !chain.last().is_some_and(|last| last.contains(&message)) {
            chain.push(message);
        }
        next = error.source();
        if chain.len() >= 16 {
            break;
        }
    }
    chain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_without_space_or_rights_come_with_a_way_out_and_devices_do_not() {
        let folder = |errno: i32| RecordError::Io {
            action: "making the folder",
            path: "/x".into(),
            source: std::io::Error::from_raw_os_error(errno),
        };
        let (enoent, eacces, enospc, erofs) = (2, 13, 28, 30);
        assert_eq!(storage_hint(&folder(enospc)), Some(NO_SPACE_HINT));
        assert_eq!(storage_hint(&folder(erofs)), Some(NOT_WRITABLE_HINT));
        assert_eq!(storage_hint(&folder(eacces)), Some(NOT_WRITABLE_HINT));
        assert_eq!(storage_hint(&folder(enoent)), None);
        assert_eq!(storage_hint(&std::io::Error::from_raw_os_error(eacces)), None);
        let shown = CommandError::new(Blame::Environment, "making the lab's folders", &folder(enospc)).render();
        assert_eq!(
            shown,
            format!(
                "error: making the lab's folders\n  caused by: making the folder /x\n  \
                 caused by: No space left on device (os error 28)\nhint: {NO_SPACE_HINT}\n"
            )
        );
    }
}
