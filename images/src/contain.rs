//! Tools that fork and mount, kept in namespaces of their own.
//!
//! mmdebstrap starts dozens of processes and mounts `/proc` in what it builds. In namespaces for processes and mounts,
//! whose first process dies with `unshare`, all of it is gone with one SIGKILL: processes, mounts, and the scratch folder,
//! which is a tmpfs seen in there only. An unprivileged user gets the same as root of a user namespace (`newuidmap`).

use std::time::Duration;

use camino::Utf8Path;

use crate::tool::ToolCommand;

/// How long entering the namespaces may take.
const PROBE_DEADLINE: Duration = Duration::from_secs(20);

/// A command that succeeds where this user can build images: it enters the builder's namespaces, mounts its scratch
/// tmpfs over the folder `scratch` in there, and ends.
pub fn probe_command(scratch: &Utf8Path) -> ToolCommand {
    ToolCommand::new("namespace probe", "unshare")
        .args(unshare_args(Builder::current(), scratch, "exit 0", &[]))
        .deadline(PROBE_DEADLINE)
}

/// Who builds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Builder {
    /// Root itself.
    Root,
    /// Somebody who is root in a user namespace, with subordinate ids for the other users of the image.
    User,
}

impl Builder {
    /// Who runs this program.
    pub(crate) fn current() -> Self {
        if nix::unistd::geteuid().is_root() { Self::Root } else { Self::User }
    }
}

/// Largest size of the scratch folder, as tmpfs takes it. It is no reservation: memory is taken as files are written.
const SCRATCH_SIZE: &str = "size=6g,mode=0755";

/// What a script can rely on: it ends at the first failure, files get the modes they are given, and the file system tools
/// are found where an unprivileged user's `PATH` has no `/sbin`.
const PROLOGUE: &str = "set -eu\numask 022\nPATH=$PATH:/usr/sbin:/sbin\n";

/// Arguments of `unshare` that run `script` (POSIX shell, its `$1` being the scratch folder) contained.
pub(crate) fn unshare_args(builder: Builder, scratch: &Utf8Path, script: &str, args: &[String]) -> Vec<String> {
    let mut argv: Vec<String> = Vec::new();
    if builder == Builder::User {
        argv.extend(["--user", "--map-root-user", "--map-auto"].map(str::to_owned));
    }
    argv.extend(
        ["--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--", "/bin/sh", "-c"].map(str::to_owned),
    );
    argv.push(format!("{PROLOGUE}mount -t tmpfs -o {SCRATCH_SIZE} harness \"$1\"\n{script}"));
    argv.push("sh".to_owned());
    argv.push(scratch.to_string());
    argv.extend_from_slice(args);
    argv
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_needs_no_user_namespace() {
        let argv = unshare_args(Builder::Root, Utf8Path::new("/s"), "exec \"$2\"", &["true".to_owned()]);
        assert_eq!(
            argv[..8],
            ["--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--", "/bin/sh", "-c"]
        );
        assert!(argv[8].ends_with("\nexec \"$2\""));
        assert_eq!(argv[9..], ["sh", "/s", "true"]);
        let user = unshare_args(Builder::User, Utf8Path::new("/s"), "", &[]);
        assert_eq!(user[..3], ["--user", "--map-root-user", "--map-auto"]);
    }
}
