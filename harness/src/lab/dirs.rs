//! The two folders of a lab and the lock that says it lives.
//!
//! Disks and seeds lie under the state folder, sockets under the (short) runtime folder; both are named
//! after the lab. The owner holds a lock on `lock` for as long as it lives: a folder whose lock is free
//! was left by a killed run and is removed by the next one.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};

use camino::{Utf8Path, Utf8PathBuf};
use nix::fcntl::{Flock, FlockArg};

use crate::record::{Folders, RecordError, make_private_dir};

/// The folders of a living lab. Removed by [`LabDirs::remove`]; dropping it is only the backstop.
#[derive(Debug)]
pub struct LabDirs {
    id: String,
    disks: Utf8PathBuf,
    sockets: Utf8PathBuf,
    lock: Option<Flock<fs::File>>,
}

impl LabDirs {
    /// Claims an id nobody else has and makes its folders.
    ///
    /// # Errors
    /// [`RecordError`] where the folders cannot be made.
    pub fn claim(folders: &Folders) -> Result<Self, RecordError> {
        let labs = folders.state.join("labs");
        make_private_dir(&labs)?;
        make_private_dir(&folders.runtime)?;
        let owner_ok = fs::symlink_metadata(&folders.runtime).is_ok_and(|meta| {
            use std::os::unix::fs::MetadataExt as _;
            meta.is_dir() && meta.uid() == nix::unistd::getuid().as_raw()
        });
        if !owner_ok {
            return Err(RecordError::Io {
                action: "taking into use",
                path: folders.runtime.clone(),
                source: io::Error::new(io::ErrorKind::PermissionDenied, "it belongs to somebody else"),
            });
        }
        // 2^30 ids: a clash is not an error, only another round.
        for _ in 0..64 {
            let id = random_id();
            let disks = labs.join(&id);
            let made = fs::DirBuilder::new().mode(0o700).create(&disks);
            match made {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(source) => return Err(RecordError::Io { action: "making the lab folder", path: disks, source }),
                Ok(()) => {
                    if let Some(claimed) = Self::occupy(id, disks, folders)? {
                        return Ok(claimed);
                    }
                }
            }
        }
        Err(RecordError::Io {
            action: "finding a free lab id in",
            path: labs,
            source: io::Error::from(io::ErrorKind::AlreadyExists),
        })
    }

    /// Locks a folder just made; `None` where another harness took it for a dead one in the instant before.
    fn occupy(id: String, disks: Utf8PathBuf, folders: &Folders) -> Result<Option<Self>, RecordError> {
        let io_error = |action, path: &Utf8Path, source| RecordError::Io { action, path: path.to_owned(), source };
        let lock_path = disks.join("lock");
        let opened = fs::OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&lock_path);
        let file = match opened {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(io_error("making", &lock_path, source)),
        };
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => return Ok(None),
            Err((_, errno)) => return Err(io_error("locking", &lock_path, errno.into())),
        };
        if !is_at(&lock, &lock_path) {
            return Ok(None);
        }
        let sockets = folders.runtime.join(&id);
        make_private_dir(&sockets)?;
        Ok(Some(Self { id, disks, sockets, lock: Some(lock) }))
    }

    /// The lab's id: six characters, lower case.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where disks and seeds lie.
    #[must_use]
    pub fn disks(&self) -> &Utf8Path {
        &self.disks
    }

    /// Where sockets lie.
    #[must_use]
    pub fn sockets(&self) -> &Utf8Path {
        &self.sockets
    }

    /// Removes both folders.
    ///
    /// # Errors
    /// What the system says of the first one that could not be removed.
    pub fn remove(mut self) -> Result<(), RecordError> {
        self.remove_now()
    }

    fn remove_now(&mut self) -> Result<(), RecordError> {
        // The lock goes last: a folder without a living owner is anybody's to remove.
        let Some(lock) = self.lock.take() else { return Ok(()) };
        let removed = [&self.sockets, &self.disks].map(|path| remove_tree(path));
        drop(lock);
        removed.into_iter().collect()
    }
}

impl Drop for LabDirs {
    fn drop(&mut self) {
        if let Err(error) = self.remove_now() {
            tracing::warn!(%error, "a lab's folder is left behind");
        }
    }
}

/// Whether a lock's file is still the one at its path, and not one that was removed meanwhile.
fn is_at(lock: &fs::File, path: &Utf8Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    match (lock.metadata(), fs::metadata(path)) {
        (Ok(held), Ok(there)) => (held.dev(), held.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

fn remove_tree(path: &Utf8Path) -> Result<(), RecordError> {
    match fs::remove_dir_all(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(RecordError::Io { action: "removing", path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

/// A lab whose owner was killed: its id, and whether its folders could be removed.
pub type Reaped = (String, Result<(), RecordError>);

/// Removes what killed runs left: lab folders whose lock nobody holds.
#[must_use]
pub fn reap(folders: &Folders) -> Vec<Reaped> {
    let mut reaped = Vec::new();
    let labs = folders.state.join("labs");
    let Ok(entries) = labs.read_dir_utf8() else { return reaped };
    for entry in entries.filter_map(Result::ok) {
        let path = entry.path();
        let Ok(file) = fs::OpenOptions::new().write(true).open(path.join("lock")) else {
            // No lock file: either just being made, or not a lab. An hour tells.
            let old = entry
                .metadata()
                .ok()
                .and_then(|meta| meta.modified().ok())
                .and_then(|at| at.elapsed().ok())
                .is_some_and(|age| age.as_secs() > 3600);
            if old {
                reaped.push((entry.file_name().to_owned(), remove_tree(path)));
            }
            continue;
        };
        if let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            && is_at(&lock, &path.join("lock"))
        {
            let sockets = folders.runtime.join(entry.file_name());
            let removed = remove_tree(&sockets).and_then(|()| remove_tree(path));
            reaped.push((entry.file_name().to_owned(), removed));
            drop(lock);
        }
    }
    reaped
}

fn random_id() -> String {
    use std::hash::{BuildHasher as _, Hasher as _};
    // RandomState is seeded by the system; an id needs to be unlikely, not secret.
    let mut n = std::collections::hash_map::RandomState::new().build_hasher().finish();
    let alphabet = b"abcdefghijkmnpqrstuvwxyz23456789";
    (0..6)
        .map(|_| {
            let c = alphabet[(n % 32) as usize];
            n /= 32;
            char::from(c)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folders(base: &tempfile::TempDir) -> Folders {
        let base = Utf8Path::from_path(base.path()).unwrap();
        Folders { state: base.join("state"), cache: base.join("cache"), runtime: base.join("run") }
    }

    #[test]
    fn two_labs_share_nothing_and_leave_nothing() {
        let base = tempfile::tempdir().unwrap();
        let folders = folders(&base);
        let (a, b) = (LabDirs::claim(&folders).unwrap(), LabDirs::claim(&folders).unwrap());
        assert_ne!(a.id(), b.id());
        assert_ne!(a.sockets(), b.sockets());
        let paths = [a.disks().to_owned(), a.sockets().to_owned()];
        a.remove().unwrap();
        assert!(paths.iter().all(|path| !path.exists()));
        drop(b);
        assert_eq!(fs::read_dir(folders.state.join("labs")).unwrap().count(), 0);
    }

    #[test]
    fn claims_and_reaping_at_once_never_meet() {
        let base = tempfile::tempdir().unwrap();
        let folders = folders(&base);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        let lab = LabDirs::claim(&folders).unwrap();
                        let _ = reap(&folders);
                        assert!(lab.disks().join("lock").exists() && lab.sockets().exists());
                        lab.remove().unwrap();
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(folders.state.join("labs")).unwrap().count(), 0);
    }

    #[test]
    fn reaping_spares_the_living() {
        let base = tempfile::tempdir().unwrap();
        let folders = folders(&base);
        let living = LabDirs::claim(&folders).unwrap();
        let dead = folders.state.join("labs/zzzzzz");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join("lock"), "").unwrap();
        fs::create_dir_all(folders.runtime.join("zzzzzz")).unwrap();
        let reaped = reap(&folders);
        assert!(matches!(&reaped[..], [(id, Ok(()))] if id == "zzzzzz"), "{reaped:?}");
        assert!(living.disks().exists());
        assert!(!dead.exists() && !folders.runtime.join("zzzzzz").exists());
    }
}
