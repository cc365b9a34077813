//! Advisory locks (flock(2)): they end with the process that holds them, however it ends.

use std::fs::{File, OpenOptions};

use camino::{Utf8Path, Utf8PathBuf};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use tokio::sync::oneshot;

use crate::error::Error;

/// A lock that is held.
#[derive(Debug)]
pub(crate) struct Held {
    lock: Flock<File>,
}

impl Held {
    /// The file that is locked.
    pub(crate) fn file(&self) -> &File {
        &self.lock
    }
}

fn open(path: &Utf8Path) -> Result<File, Error> {
    OpenOptions::new().create(true).truncate(false).write(true).open(path).map_err(Error::io("open lock", path))
}

fn attempt(path: &Utf8Path, file: File, arg: FlockArg) -> Result<Result<Held, File>, Error> {
    match Flock::lock(file, arg) {
        Ok(lock) => Ok(Ok(Held { lock })),
        Err((file, Errno::EWOULDBLOCK)) => Ok(Err(file)),
        Err((_, error)) => Err(Error::io("lock", path)(error.into())),
    }
}

/// Takes the lock `path` for itself alone; `busy` is called if somebody has it, before waiting for it.
pub(crate) async fn exclusive(path: &Utf8Path, busy: impl FnOnce()) -> Result<Held, Error> {
    let file = match attempt(path, open(path)?, FlockArg::LockExclusiveNonblock)? {
        Ok(held) => return Ok(held),
        Err(file) => file,
    };
    busy();
    // A thread that waits can be left behind: where nobody wants the lock any more it is given back as soon as it is had.
    let (sender, receiver) = oneshot::channel();
    let owned: Utf8PathBuf = path.to_owned();
    std::thread::Builder::new()
        .name("lock wait".to_owned())
        .spawn(move || {
            let mut file = file;
            let result = loop {
                match Flock::lock(file, FlockArg::LockExclusive) {
                    Ok(lock) => break Ok(Held { lock }),
                    Err((again, Errno::EINTR)) => file = again,
                    Err((_, error)) => break Err(Error::io("lock", owned)(error.into())),
                }
            };
            // A receiver that is gone drops the lock, which is what is wanted.
            drop(sender.send(result));
        })
        .map_err(Error::io("wait for lock", path))?;
    receiver.await.unwrap_or(Err(Error::Interrupted))
}

/// Takes the lock `path`, which must be there, together with others; `None` where somebody has it alone.
pub(crate) fn shared(path: &Utf8Path) -> Result<Option<Held>, Error> {
    let file = File::open(path).map_err(Error::io("open lock", path))?;
    Ok(attempt(path, file, FlockArg::LockSharedNonblock)?.ok())
}

/// Takes the lock `path`, which must be there, alone; `None` where anybody else has it.
pub(crate) fn try_exclusive(path: &Utf8Path) -> Result<Option<Held>, Error> {
    let file = File::open(path).map_err(Error::io("open lock", path))?;
    Ok(attempt(path, file, FlockArg::LockExclusiveNonblock)?.ok())
}
