//! The lock that says that a claim's owner lives: an open file description lock on the claim's file.
//!
//! fcntl(2), `F_OFD_SETLK`: as with flock(2), it belongs to the open file and not to the process, and the kernel gives it
//! back when the last one who has that open ends. But flock asks for no right to the file: whoever could read a claim could
//! keep it alive after its owner's death. A write lock of this kind needs the file open for writing, which is for the
//! claim's user (and root) alone; a read lock, which any reader can have, is not in the way of another reader's question.

use std::fs::File;
use std::io;
use std::ops::{Deref, DerefMut};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// A claim's file with its owner's lock.
#[derive(Debug)]
pub(super) struct Held(File);

impl Held {
    /// Locks a file that is open for writing.
    pub(super) fn take(file: File) -> io::Result<Self> {
        lock(&file)?;
        Ok(Self(file))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Closing is not enough: a child that is just being started may still have the file open. What cannot be unlocked
        // is once that child has become another program.
        let _ = fcntl(&self.0, FcntlArg::F_OFD_SETLK(&whole(libc::F_UNLCK)));
    }
}

impl Deref for Held {
    type Target = File;

    fn deref(&self) -> &File {
        &self.0
    }
}

impl DerefMut for Held {
    fn deref_mut(&mut self) -> &mut File {
        &mut self.0
    }
}

/// Locks a file that is open for writing, until the last one who has it open closes it.
pub(super) fn lock(file: &File) -> io::Result<()> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&whole(libc::F_WRLCK)))?;
    Ok(())
}

/// Whether somebody who may write to a file has it locked. Takes no lock.
pub(super) fn is_held(file: &File) -> io::Result<bool> {
    // What is asked is whether a read lock could be had: only a write lock says no.
    let mut lock = whole(libc::F_RDLCK);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(i32::from(lock.l_type) == libc::F_WRLCK)
}

/// Blocks while a file is locked by somebody who may write to it, whatever signals arrive meanwhile.
pub(super) fn wait_while_held(file: &File) -> io::Result<()> {
    loop {
        match fcntl(file, FcntlArg::F_OFD_SETLKW(&whole(libc::F_RDLCK))) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// A lock of some kind on all of a file. `l_pid` has to be 0 for locks of open files.
fn whole(kind: libc::c_int) -> libc::flock {
    let [kind, start] = [kind, libc::SEEK_SET].map(|value| libc::c_short::try_from(value).unwrap_or_default());
    libc::flock { l_type: kind, l_whence: start, l_start: 0, l_len: 0, l_pid: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_can_only_read_a_file_can_neither_keep_it_alive_nor_wait_for_readers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("claim");
        std::fs::write(&path, "").unwrap();
        let reader = || File::open(&path).unwrap();
        let owner = File::options().write(true).open(&path).unwrap();
        let held = Held::take(owner).unwrap();
        assert!(is_held(&reader()).unwrap());
        drop(held);
        assert!(!is_held(&reader()).unwrap());

        let foreign = reader();
        assert_eq!(Held::take(reader()).unwrap_err().raw_os_error(), Some(libc::EBADF));
        fcntl(&foreign, FcntlArg::F_OFD_SETLK(&whole(libc::F_RDLCK))).unwrap();
        let flocked = reader();
        flocked.lock().unwrap();
        assert!(!is_held(&reader()).unwrap());
        wait_while_held(&reader()).unwrap();
    }
}
