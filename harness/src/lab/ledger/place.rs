//! Where the ledger lies: one folder for all users of a host, in which each has one of their own.
//!
//! ```text
//! /tmp/harness-ledger/          anybody's to add to (mode 1777)
//! /tmp/harness-ledger/lock      held, for milliseconds, by whoever changes the ledger
//! /tmp/harness-ledger/UID/      one user's claims; others read them
//! ```
//!
//! What another user has is read and never written, only where it belongs to whom it says, through no link, within bounds.
//! So nobody can lose a file, or find another's claims to be their own. What users can do to each other is this:
//!
//! - claim what a lab can ask for, and have others wait for it, for as long as these are willing to;
//! - keep the common lock, which two claims made at once see each other by: others wait [`COMMON_LOCK_MAX`] at every
//!   look, and go on without it;
//! - who made the folder of all users can, as its owner, move others' folders out of it: their labs are not seen then.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, Flock, FlockArg, OFlag, RenameFlags, renameat2};

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
///
/// It gets its name once it has its mode: whoever is killed in between, or comes meanwhile, leaves and finds no folder that
/// others cannot use.
fn make(path: &Utf8Path, mode: u32) -> Result<(), LedgerError> {
    if is_folder(path)? {
        return Ok(());
    }
    let (Some(above), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io_error("making the folder", path, io::ErrorKind::InvalidInput.into()));
    };
    let making = |source| io_error("making the folder", path, source);
    let staged = tempfile::Builder::new().prefix(&format!(".{name}.")).tempdir_in(above).map_err(making)?;
    // By the open folder and not by its name, which the owner of the folder above it may give to something else.
    OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW).bits())
        .open(staged.path())
        .and_then(|folder| folder.set_permissions(Permissions::from_mode(mode)))
        .map_err(|source| io_error("setting the mode of", path, source))?;
    match rename_where_nothing_is(staged.path(), path.as_std_path()) {
        Ok(()) => {
            // It is no longer there to be removed.
            let _ = staged.keep();
            Ok(())
        }
        // Somebody was quicker.
        Err(_) if is_folder(path)? => Ok(()),
        Err(source) => Err(making(source)),
    }
}

fn rename_where_nothing_is(from: &Path, to: &Path) -> io::Result<()> {
    match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
        // Not every file system can do that (rename(2)); without it, what is replaced can be nothing but an empty folder.
        Err(Errno::EINVAL) => fs::rename(from, to),
        renamed => Ok(renamed?),
    }
}

/// Whether there is a folder of that name.
///
/// # Errors
/// Where there is something else.
fn is_folder(path: &Utf8Path) -> Result<bool, LedgerError> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => Ok(true),
        Ok(_) => {
            let why = io::Error::new(io::ErrorKind::NotADirectory, format!("it is no folder (another: {LEDGER_ENV})"));
            Err(io_error("taking into use", path, why))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(io_error("looking at", path, source)),
    }
}

/// The lock of all users; `None`, with a warning, where it cannot be had. flock(2), as it is nobody's more than another's:
/// it needs no right to write.
pub(super) fn common_lock(root: &Utf8Path) -> Option<Flock<File>> {
    let path = root.join("lock");
    let given_up = |why: String| {
        tracing::warn!(%path, why, "labs of other users that start at this moment may not be seen");
        None
    };
    let file = match open_plain(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            make_lock(root, &path).and_then(|()| open_plain(&path))
        }
        opened => opened,
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

/// Makes the file of the lock of all users. As with [`make`], it has its name once everybody can open it.
fn make_lock(root: &Utf8Path, path: &Utf8Path) -> io::Result<()> {
    let staged = tempfile::Builder::new().prefix(".lock.").tempfile_in(root)?;
    staged.as_file().set_permissions(Permissions::from_mode(0o644))?;
    match staged.persist_noclobber(path) {
        Err(failed) if failed.error.kind() != io::ErrorKind::AlreadyExists => Err(failed.error),
        _ => Ok(()),
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
