//! Files and folders: digests, locks, and which file systems work folders may lie on.

use std::fs::File;
use std::io::Read;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use nix::sys::statfs::{FsType, statfs};
use sha2::{Digest, Sha256};

use crate::hex;
use crate::tool::{ToolCommand, ToolError, ToolRunner};

/// Magic of 9p (linux/magic.h, `V9FS_MAGIC`). WSL's drvfs mounts of Windows drives are 9p as well.
const V9FS_MAGIC: i64 = 0x0102_1997;

/// Magic WSL 1's drvfs gives itself (lxfs and drvfs report `0x53464846`, "SFHF").
const WSL1_MAGIC: i64 = 0x5346_4846;

/// How long a `syncfs` of a work folder may take before the folder is refused.
pub const SYNC_PROBE_DEADLINE: Duration = Duration::from_secs(20);

/// Why a folder cannot hold images or a lab's disks.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// The folder is on a file system that loses or blocks a virtual disk's writes.
    #[error(
        "{path} lies on {kind}, where syncfs can hang for good and locks do not hold: \
         choose a folder on a local disk (ext4, xfs, btrfs, tmpfs)"
    )]
    Unsuitable {
        /// The folder.
        path: Utf8PathBuf,
        /// The file system's name.
        kind: &'static str,
    },
    /// `syncfs` did not come back, or failed.
    #[error("the file system of {path} does not complete a sync: {reason}")]
    SyncFails {
        /// The folder.
        path: Utf8PathBuf,
        /// What was seen.
        reason: String,
    },
    /// What is to be made will not fit.
    #[error("no space left for it: {free_mib} MiB are free in {path}, about {wanted_mib} MiB are needed")]
    Full {
        /// The folder.
        path: Utf8PathBuf,
        /// What is free there.
        free_mib: u64,
        /// What is needed.
        wanted_mib: u64,
    },
    /// The folder could not be looked at.
    #[error("could not look at the file system of {path}: {source}")]
    Statfs {
        /// The folder.
        path: Utf8PathBuf,
        /// What the system said.
        source: nix::Error,
    },
}

/// Refuses a folder that lies on 9p or drvfs. The folder must exist.
///
/// # Errors
/// Where the folder cannot hold disks, or cannot be looked at.
pub fn check_folder_kind(path: &Utf8Path) -> Result<(), FolderError> {
    let found = statfs(path.as_std_path()).map_err(|source| FolderError::Statfs { path: path.to_owned(), source })?;
    match unsuitable(found.filesystem_type()) {
        Some(kind) => Err(FolderError::Unsuitable { path: path.to_owned(), kind }),
        None => Ok(()),
    }
}

/// Refuses a folder whose file system does not complete a `syncfs`, tried in a child process with a deadline.
///
/// # Errors
/// Where the probe fails or does not end in time, and where [`check_folder_kind`] refuses.
pub async fn probe_folder(path: &Utf8Path, runner: &dyn ToolRunner) -> Result<(), FolderError> {
    check_folder_kind(path)?;
    let command = ToolCommand::new("sync probe", "sync").args(["-f", path.as_str()]).deadline(SYNC_PROBE_DEADLINE);
    let reason = match runner.run(command).await {
        Ok(exit) if exit.success() => return Ok(()),
        Ok(exit) => format!("sync -f {exit}: {}", exit.output_tail.trim()),
        Err(ToolError::DeadlineExceeded { deadline, .. }) => {
            format!("sync -f was not back after {} s", deadline.as_secs())
        }
        Err(error) => error.to_string(),
    };
    Err(FolderError::SyncFails { path: path.to_owned(), reason })
}

fn unsuitable(kind: FsType) -> Option<&'static str> {
    #[expect(clippy::unnecessary_cast, reason = "the width of f_type differs between C libraries")]
    match kind.0 as i64 {
        V9FS_MAGIC => Some("9p (as a WSL drvfs or a shared folder)"),
        WSL1_MAGIC => Some("drvfs"),
        _ => None,
    }
}

/// What an unprivileged user can still write in a folder's file system, in MiB.
///
/// # Errors
/// Where the folder cannot be looked at.
pub fn free_mib(path: &Utf8Path) -> Result<u64, FolderError> {
    let stat = nix::sys::statvfs::statvfs(path.as_std_path())
        .map_err(|source| FolderError::Statfs { path: path.to_owned(), source })?;
    Ok(stat.blocks_available() * stat.fragment_size() / (1024 * 1024))
}

/// Refuses a folder in which less than this is free.
///
/// # Errors
/// With both figures.
pub fn require_free(path: &Utf8Path, wanted_mib: u64) -> Result<(), FolderError> {
    let free_mib = free_mib(path)?;
    if free_mib < wanted_mib {
        return Err(FolderError::Full { path: path.to_owned(), free_mib, wanted_mib });
    }
    Ok(())
}

/// SHA-256 of a file's content, hexadecimal.
pub fn sha256_file(path: &Utf8Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0u8; 256 * 1024];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&buffer[..read]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_that_lose_writes_are_refused() {
        assert!(unsuitable(FsType(V9FS_MAGIC)).is_some());
        assert!(unsuitable(FsType(WSL1_MAGIC)).is_some());
        assert!(unsuitable(nix::sys::statfs::EXT4_SUPER_MAGIC).is_none());
        assert!(unsuitable(nix::sys::statfs::TMPFS_MAGIC).is_none());
    }

    #[test]
    fn a_local_folder_is_fine_and_a_missing_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        check_folder_kind(Utf8Path::from_path(dir.path()).unwrap()).unwrap();
        let error = check_folder_kind(Utf8Path::new("/nonexistent")).unwrap_err().to_string();
        assert!(error.contains("/nonexistent"), "{error}");
    }

    #[test]
    fn a_folder_without_room_is_refused_with_both_figures() {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(dir.path()).unwrap();
        require_free(path, 0).unwrap();
        let error = require_free(path, 1 << 40).unwrap_err().to_string();
        assert!(
            error.starts_with("no space left for it: ") && error.contains("1099511627776 MiB are needed"),
            "{error}"
        );
    }

    struct Sync(Result<i32, Duration>);

    impl ToolRunner for Sync {
        fn run<'a>(&'a self, command: ToolCommand) -> crate::tool::ToolFuture<'a> {
            assert_eq!((command.program.as_str(), command.args[0].as_str()), ("sync", "-f"));
            assert_eq!(command.deadline, Some(SYNC_PROBE_DEADLINE));
            let output_tail = "Input/output error".to_owned();
            let answer = match self.0 {
                Ok(code) => Ok(crate::tool::ToolExit { code: Some(code), signal: None, output_tail }),
                Err(deadline) => Err(ToolError::DeadlineExceeded { name: command.name, deadline, output_tail }),
            };
            Box::pin(std::future::ready(answer))
        }
    }

    #[test]
    fn a_sync_that_fails_or_hangs_refuses_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(dir.path()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(probe_folder(path, &Sync(Ok(0)))).unwrap();
        let failed = runtime.block_on(probe_folder(path, &Sync(Ok(1)))).unwrap_err().to_string();
        assert!(failed.contains("exited 1: Input/output error"), "{failed}");
        let hung = runtime.block_on(probe_folder(path, &Sync(Err(Duration::from_secs(20))))).unwrap_err().to_string();
        assert!(hung.contains("sync -f was not back after 20 s"), "{hung}");
    }

    #[test]
    fn the_digest_is_sha256() {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(dir.path()).unwrap().join("abc");
        std::fs::write(&path, "abc").unwrap();
        // FIPS 180-2, appendix B.1.
        assert_eq!(sha256_file(&path).unwrap(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
