//! Reading single files out of a root file system's tar without unpacking it.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use camino::{Utf8Path, Utf8PathBuf};

use crate::error::Error;

/// Files of a tar, at most; Debian trees of this kind have about fifteen thousand.
const MAX_FILES: usize = 500_000;

/// Largest file that is read into memory, in bytes.
const MAX_READ_BYTES: u64 = 128 * 1024 * 1024;

/// An index of the regular files of an uncompressed tar.
#[derive(Debug)]
pub(crate) struct Tree {
    path: Utf8PathBuf,
    file: File,
    /// Path without leading `./` or `/` to offset and size.
    files: BTreeMap<String, (u64, u64)>,
}

impl Tree {
    /// Reads the headers of the tar at `path`.
    pub(crate) fn open(path: &Utf8Path) -> Result<Self, Error> {
        let read = || Error::io("read", path);
        let file = File::open(path).map_err(read())?;
        let mut archive = tar::Archive::new(file.try_clone().map_err(read())?);
        let mut files = BTreeMap::new();
        for entry in archive.entries_with_seek().map_err(read())? {
            let entry = entry.map_err(read())?;
            if entry.header().entry_type() != tar::EntryType::Regular || files.len() >= MAX_FILES {
                continue;
            }
            let bytes = entry.path_bytes();
            let name = String::from_utf8_lossy(&bytes);
            let name = name.trim_start_matches("./").trim_start_matches('/').to_owned();
            files.insert(name, (entry.raw_file_position(), entry.size()));
        }
        Ok(Self { path: path.to_owned(), file, files })
    }

    /// Paths below `folder` (no slashes around it), sorted.
    pub(crate) fn below<'a>(&'a self, folder: &'a str) -> impl Iterator<Item = &'a str> {
        let names = self.files.keys().map(String::as_str);
        names.filter(move |name| name.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/')))
    }

    /// The content of the first of `names` that is there, and which one it is.
    pub(crate) fn read_any<'a>(&self, names: &[&'a str]) -> Result<Option<(&'a str, Vec<u8>)>, Error> {
        for name in names {
            if let Some(content) = self.read(name)? {
                return Ok(Some((name, content)));
            }
        }
        Ok(None)
    }

    /// A file's content, if it is there.
    pub(crate) fn read(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        let Some((offset, size)) = self.files.get(name.trim_start_matches('/')) else { return Ok(None) };
        if *size > MAX_READ_BYTES {
            return Err(Error::io("read", self.path.join(name))(std::io::ErrorKind::FileTooLarge.into()));
        }
        let mut content = vec![0; *size as usize];
        self.file.read_exact_at(&mut content, *offset).map_err(Error::io("read", &self.path))?;
        Ok(Some(content))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_by_their_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(dir.path()).unwrap().join("t.tar");
        let mut tar = tar::Builder::new(File::create(&path).unwrap());
        let long = format!("./usr/lib/{}/x.ko", "d".repeat(120));
        for (name, content) in [("./boot/vmlinuz-6.1", "kernel"), (long.as_str(), "module"), ("./etc/empty", "")] {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, name, content.as_bytes()).unwrap();
        }
        tar.finish().unwrap();

        let tree = Tree::open(&path).unwrap();
        assert_eq!(tree.read("/boot/vmlinuz-6.1").unwrap().unwrap(), b"kernel");
        assert_eq!(tree.read(&long[2..]).unwrap().unwrap(), b"module");
        assert_eq!(tree.read("etc/empty").unwrap().unwrap(), b"");
        assert!(tree.read("etc/none").unwrap().is_none());
        assert_eq!(tree.below("boot").collect::<Vec<_>>(), ["boot/vmlinuz-6.1"]);
        assert_eq!(tree.below("boo").count(), 0);
        let (name, _) = tree.read_any(&["lib/x", "boot/vmlinuz-6.1"]).unwrap().unwrap();
        assert_eq!(name, "boot/vmlinuz-6.1");
    }
}
