//! What differs from node to node, as a plain tar on a read-only disk.

use std::io::Write;

use camino::{Utf8Path, Utf8PathBuf};
use sha2::{Digest, Sha256};

use crate::guest::SEED_ID_PATH;
use crate::hex;

/// Length of a seed's identifier in hexadecimal digits.
const ID_LEN: usize = 16;

/// Upper bound of a seed's content in bytes; a seed is configuration, not payload.
const MAX_CONTENT_BYTES: usize = 16 * 1024 * 1024;

/// One file of a seed. Owner and group are root; links are not supported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeedFile {
    /// Absolute path in the guest.
    pub path: String,
    /// Permission bits, such as `0o600`.
    pub mode: u32,
    /// Content.
    pub content: Vec<u8>,
}

/// Why a seed was not written.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// A path that cannot be laid over a root.
    #[error("seed file path {path:?} {reason}")]
    Path {
        /// The path.
        path: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// More than a seed may hold.
    #[error("seed holds {bytes} bytes, more than the {MAX_CONTENT_BYTES} a seed may hold")]
    TooLarge {
        /// The content's size in bytes.
        bytes: usize,
    },
    /// The file could not be written.
    #[error("could not write seed {path}: {source}")]
    Write {
        /// The seed's path on the host.
        path: Utf8PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// Identifier of a seed: the first 16 hexadecimal digits of a SHA-256 over path, mode and content of every file, in the
/// order of their paths (so the order of `files` does not matter).
pub fn id(files: &[SeedFile]) -> String {
    let mut sorted: Vec<&SeedFile> = files.iter().collect();
    sorted.sort_by(|a, b| a.path.cmp(&b.path));
    let mut hash = Sha256::new();
    for file in sorted {
        // Lengths go in front, so that no two different lists feed the same bytes.
        hash.update((file.path.len() as u64).to_le_bytes());
        hash.update(file.path.as_bytes());
        hash.update(file.mode.to_le_bytes());
        hash.update((file.content.len() as u64).to_le_bytes());
        hash.update(&file.content);
    }
    let mut digits = hex(&hash.finalize());
    digits.truncate(ID_LEN);
    digits
}

/// Writes `files` as a tar to `path`, with [`SEED_ID_PATH`] holding `id` as its last file: where that file is in the
/// guest, all the others are.
///
/// The size is a multiple of 512, as a disk's must be. Modification times are 0: the same files give the same bytes.
pub fn write(files: &[SeedFile], id: &str, path: &Utf8Path) -> Result<(), SeedError> {
    check(files)?;
    let wrap = |source| SeedError::Write { path: path.to_owned(), source };
    let mut tar = tar::Builder::new(std::io::BufWriter::new(std::fs::File::create(path).map_err(wrap)?));
    let mark = SeedFile { path: SEED_ID_PATH.to_owned(), mode: 0o644, content: format!("{id}\n").into_bytes() };
    for file in files.iter().chain(std::iter::once(&mark)) {
        let mut header = tar::Header::new_gnu();
        header.set_size(file.content.len() as u64);
        header.set_mode(file.mode & 0o7777);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_entry_type(tar::EntryType::Regular);
        tar.append_data(&mut header, file.path.trim_start_matches('/'), file.content.as_slice()).map_err(wrap)?;
    }
    // Two zero blocks end the archive, so its size is a multiple of 512 by construction.
    let mut out = tar.into_inner().map_err(wrap)?;
    out.flush().map_err(wrap)
}

fn check(files: &[SeedFile]) -> Result<(), SeedError> {
    let bytes = files.iter().map(|file| file.content.len()).sum();
    if bytes > MAX_CONTENT_BYTES {
        return Err(SeedError::TooLarge { bytes });
    }
    let mut seen = std::collections::BTreeSet::new();
    for file in files {
        let reason = if !file.path.starts_with('/') || file.path.ends_with('/') {
            Some("is not the absolute path of a file")
        } else if file.path.split('/').skip(1).any(|part| matches!(part, "" | "." | "..")) {
            Some("has an empty, '.' or '..' component")
        } else if file.path == SEED_ID_PATH {
            Some("is where the seed's identifier goes")
        } else if !seen.insert(file.path.as_str()) {
            Some("occurs twice")
        } else {
            None
        };
        if let Some(reason) = reason {
            return Err(SeedError::Path { path: file.path.clone(), reason });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn file(path: &str, mode: u32, content: &str) -> SeedFile {
        SeedFile { path: path.to_owned(), mode, content: content.as_bytes().to_vec() }
    }

    #[test]
    fn the_id_depends_on_everything_but_the_order() {
        let a = file("/etc/hostname", 0o644, "server-1\n");
        let b = file("/etc/machine-id", 0o444, "0123\n");
        let base = id(&[a.clone(), b.clone()]);
        assert_eq!(base.len(), 16);
        assert_eq!(base, id(&[b.clone(), a.clone()]));
        assert_ne!(base, id(&[a.clone(), file("/etc/machine-id", 0o444, "0124\n")]));
        assert_ne!(base, id(&[a.clone(), file("/etc/machine-id", 0o644, "0123\n")]));
        assert_ne!(base, id(&[a, file("/etc/machine-ie", 0o444, "0123\n")]));
    }

    #[test]
    fn what_goes_in_comes_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(dir.path()).unwrap().join("seed.tar");
        let long = format!("/etc/{}/{}", "d".repeat(90), "f".repeat(90));
        let files =
            vec![file("/etc/hostname", 0o644, "server-1\n"), file(&long, 0o600, "x"), file("/root/empty", 0o640, "")];
        write(&files, "0123456789abcdef", &path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len() % 512, 0);

        let mut found = Vec::new();
        let mut archive = tar::Archive::new(std::fs::File::open(&path).unwrap());
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            assert_eq!((entry.header().uid().unwrap(), entry.header().gid().unwrap()), (0, 0));
            let path = format!("/{}", entry.path().unwrap().display());
            found.push(SeedFile { path, mode: entry.header().mode().unwrap(), content });
        }
        let mut expected = files;
        expected.push(file(SEED_ID_PATH, 0o644, "0123456789abcdef\n"));
        assert_eq!(found, expected);
    }

    #[test]
    fn the_same_files_give_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let dir = Utf8Path::from_path(dir.path()).unwrap();
        let files = [file("/etc/hostname", 0o644, "a")];
        write(&files, "1", &dir.join("a")).unwrap();
        write(&files, "1", &dir.join("b")).unwrap();
        assert_eq!(std::fs::read(dir.join("a")).unwrap(), std::fs::read(dir.join("b")).unwrap());
    }

    #[test]
    fn paths_that_leave_the_root_are_refused() {
        for path in ["etc/hostname", "/etc/../etc/x", "/etc//x", "/etc/", "/", "/etc/harness/seed"] {
            let error = check(&[file(path, 0o644, "")]).unwrap_err();
            assert!(matches!(error, SeedError::Path { .. }), "{path}: {error}");
        }
        let twice = [file("/a", 0o644, ""), file("/a", 0o600, "")];
        assert!(check(&twice).unwrap_err().to_string().contains("occurs twice"));
    }

    #[test]
    fn a_path_that_cannot_be_written_is_named() {
        let error = write(&[], "1", Utf8Path::new("/nonexistent/seed.tar")).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/seed.tar"), "{error}");
    }
}
