//! Where the ledger lies: one folder for all users of a host, in which each has one of their own.
//!
//! ```text
//! /tmp/harness-ledger/          anybody's to add to (mode 1777)
//! /tmp/harness-ledger/lock      held, for milliseconds, by whoever reads and changes the ledger
//! /tmp/harness-ledger/UID/      one user's claims; others read them
//! ```
//!
//! Nobody has to trust anybody: what another user has is read and never written, only where it belongs to whom it says,
//! through no link, within bounds. The common lock keeps two claims made at once from missing each other; one who never
//! gives it back holds up others for [`COMMON_LOCK_MAX`] and no longer.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::sync::mpsc;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use nix::fcntl::{Flock, FlockArg, OFlag};

use super::LedgerError;
use super::book::{io_error, lock_blocking};

/// Environment variable that names another folder than [`DEFAULT`].
pub const LEDGER_ENV: &str = "HARNESS_LEDGER_DIR";

/// Where the ledger lies unless somebody says otherwise: there is no other folder that every user of every host may write
/// to and that does not outlive the host's boot for long.
pub const DEFAULT: &str = "/tmp/harness-ledger";

/// How long another user's process may keep the common lock before it is gone on without.
const COMMON_LOCK_MAX: Duration = Duration::from_secs(2);

/// Most users whose claims are read.
const MAX_USERS: usize = 64;

/// The ledger's folder: what the environment says, else the default.
#[must_use]
pub(super) fn host_wide() -> Utf8PathBuf {
    let named = std::env::var(LEDGER_ENV).ok().filter(|path| !path.is_empty());
    Utf8PathBuf::from(named.unwrap_or_else(|| DEFAULT.to_owned()))
}

/// Makes the folder of all users and, in it, this user's own, or sees that they are what they should be.
pub(super) fn prepare(root: &Utf8Path, own: &Utf8Path) -> Result<(), LedgerError> {
    make(root, 0o1777)?;
    make(own, 0o755)?;
    let meta = fs::symlink_metadata(own).map_err(|source| io_error("looking at", own, source))?;
    if !meta.is_dir() || meta.uid() != nix::unistd::geteuid().as_raw() {
        let why = format!("it belongs to user {} (another folder: {LEDGER_ENV})", meta.uid());
        return Err(io_error("taking into use", own, io::Error::new(io::ErrorKind::PermissionDenied, why)));
    }
    Ok(())
}

/// Makes a folder of this mode, whatever the umask; one that is there must be a folder and no link.
fn make(path: &Utf8Path, mode: u32) -> Result<(), LedgerError> {
    match DirBuilder::new().mode(mode & 0o755).create(path) {
        // By the open folder and not by its name, which the owner of the folder above it may give to something else.
        Ok(()) => OpenOptions::new()
            .read(true)
            .custom_flags((OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW).bits())
            .open(path)
            .and_then(|folder| folder.set_permissions(Permissions::from_mode(mode)))
            .map_err(|source| io_error("setting the mode of", path, source)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let meta = fs::symlink_metadata(path).map_err(|source| io_error("looking at", path, source))?;
            if meta.is_dir() {
                return Ok(());
            }
            let why = io::Error::new(io::ErrorKind::NotADirectory, format!("it is no folder (another: {LEDGER_ENV})"));
            Err(io_error("taking into use", path, why))
        }
        Err(source) => Err(io_error("making the folder", path, source)),
    }
}

/// The lock of all users; `None`, with a warning, where it cannot be had. A lock needs no right to write.
pub(super) fn common_lock(root: &Utf8Path) -> Option<Flock<File>> {
    let path = root.join("lock");
    let given_up = |why: String| {
        tracing::warn!(%path, why, "labs of other users that start at this moment may not be seen");
        None
    };
    let made = OpenOptions::new().read(true).write(true).create_new(true).mode(0o644).open(&path);
    let file = match made {
        // Whatever the umask: others have to be able to open it.
        Ok(file) => file.set_permissions(Permissions::from_mode(0o644)).map(|()| file),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => open_plain(&path),
        Err(error) => Err(error),
    };
    let file = match file {
        Ok(file) => file,
        Err(error) => return given_up(error.to_string()),
    };
    let (sender, receiver) = mpsc::channel();
    // A lock that is waited for cannot be given up: where it comes too late, it is given back.
    let waiter = std::thread::Builder::new().name("ledger lock".to_owned());
    let started = waiter.spawn(move || drop(sender.send(lock_blocking(file, FlockArg::LockExclusive))));
    match started.map(|_| receiver.recv_timeout(COMMON_LOCK_MAX)) {
        Ok(Ok(Ok(lock))) => Some(lock),
        Ok(Ok(Err(error))) | Err(error) => given_up(error.to_string()),
        Ok(Err(_)) => given_up(format!("another process has kept it for {} s", COMMON_LOCK_MAX.as_secs())),
    }
}

/// Opens a plain file for reading, which no link may stand for, and waits for nobody.
fn open_plain(path: &Utf8Path) -> io::Result<File> {
    let flags = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no file"))
    }
}

/// The folders of other users, by user id: those that belong to whom their name says.
pub(super) fn others(root: &Utf8Path, own: &Utf8Path) -> Vec<(u32, Utf8PathBuf)> {
    let entries = root.read_dir_utf8().into_iter().flatten().filter_map(Result::ok);
    let folders = entries.filter(|entry| entry.path() != own).filter_map(|entry| {
        let user: u32 = entry.file_name().parse().ok()?;
        // `01000` would be a second voice of user 1000.
        if user.to_string() != entry.file_name() {
            return None;
        }
        let meta = fs::symlink_metadata(entry.path()).ok()?;
        if meta.is_dir() && meta.uid() == user {
            return Some((user, entry.into_path()));
        }
        tracing::warn!(path = %entry.path(), owner = meta.uid(), "what is no folder of that user's is ignored");
        None
    });
    folders.take(MAX_USERS).collect()
}

/// Another user's file, if it belongs to that user.
pub(super) fn open_of(user: u32, path: &Utf8Path) -> io::Result<File> {
    let file = open_plain(path)?;
    let owner = file.metadata()?.uid();
    if owner == user {
        return Ok(file);
    }
    Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("it belongs to user {owner}")))
}
