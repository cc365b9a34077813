//! The digest of a disk image that is mostly holes.
//!
//! A SHA-256 of an 8 GiB image would mostly hash zeros. This digest is one over what is not zero: for every 64 KiB block
//! that holds anything else than zeros its offset (8 bytes, little endian) and its bytes, then the image's size (8 bytes).
//! It depends on the content alone: not on which zeros are holes, so a copy has the same digest.

use std::fs::File;
use std::os::unix::fs::FileExt;

use camino::Utf8Path;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use sha2::{Digest, Sha256};

use crate::hex;

/// Bytes that are looked at together.
const BLOCK: usize = 64 * 1024;

/// The digest of the image at `path`, hexadecimal.
pub(crate) fn digest(path: &Utf8Path) -> std::io::Result<String> {
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    let mut hash = Sha256::new();
    let mut block = vec![0u8; BLOCK];
    let mut offset = 0;
    while offset < size {
        let Some(data) = next_data(&file, offset)? else { break };
        // A run of data may begin within a block: the block is what counts.
        offset = data - data % BLOCK as u64;
        let len = BLOCK.min((size - offset) as usize);
        file.read_exact_at(&mut block[..len], offset)?;
        if block[..len].iter().any(|byte| *byte != 0) {
            hash.update(offset.to_le_bytes());
            hash.update(&block[..len]);
        }
        offset += len as u64;
    }
    hash.update(size.to_le_bytes());
    Ok(hex(&hash.finalize()))
}

/// Where data begins at or after `offset`; `None` where only a hole is left.
fn next_data(file: &File, offset: u64) -> std::io::Result<Option<u64>> {
    let from = i64::try_from(offset).map_err(|_| std::io::Error::from(std::io::ErrorKind::FileTooLarge))?;
    match lseek(file, from, Whence::SeekData) {
        Ok(at) => Ok(Some(at.unsigned_abs())),
        Err(Errno::ENXIO) => Ok(None),
        // A file system that knows no holes: all of it is data.
        Err(Errno::EINVAL) => Ok(Some(offset)),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use camino::Utf8PathBuf;

    fn image(dir: &tempfile::TempDir, name: &str, size: u64, parts: &[(u64, &[u8])]) -> Utf8PathBuf {
        let path = Utf8Path::from_path(dir.path()).unwrap().join(name);
        let file = File::create(&path).unwrap();
        file.set_len(size).unwrap();
        for (offset, bytes) in parts {
            file.write_all_at(bytes, *offset).unwrap();
        }
        path
    }

    #[test]
    fn holes_and_zeros_are_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let size = 10 * BLOCK as u64 + 5;
        let zeros = vec![0u8; 3 * BLOCK];
        let holes = image(&dir, "a", size, &[(7 * BLOCK as u64 + 9, b"x")]);
        let written = image(&dir, "b", size, &[(BLOCK as u64, &zeros), (7 * BLOCK as u64 + 9, b"x")]);
        assert_eq!(digest(&holes).unwrap(), digest(&written).unwrap());
    }

    #[test]
    fn place_content_and_size_all_count() {
        let dir = tempfile::tempdir().unwrap();
        let size = 10 * BLOCK as u64;
        let base = digest(&image(&dir, "a", size, &[(9, b"x")])).unwrap();
        assert_ne!(base, digest(&image(&dir, "b", size, &[(10, b"x")])).unwrap());
        assert_ne!(base, digest(&image(&dir, "c", size, &[(9, b"y")])).unwrap());
        assert_ne!(base, digest(&image(&dir, "d", size + 1, &[(9, b"x")])).unwrap());
        assert_ne!(base, digest(&image(&dir, "e", size, &[(9, b"x"), (size - 1, b"x")])).unwrap());
    }
}
