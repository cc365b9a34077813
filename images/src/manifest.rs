//! What was registered with an artifact: its files with size, time and digest.

use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use camino::Utf8Path;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::{fs, sparse};

/// Name of the manifest within an artifact's folder.
pub(crate) const MANIFEST: &str = "manifest.json";

/// Name of the file whose locks say that an artifact is in use, and whose modification time says when it last was.
pub(crate) const LEASE: &str = "lease";

/// Version of the manifest's form.
const VERSION: u32 = 1;

/// An artifact as it was registered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) version: u32,
    pub(crate) id: String,
    pub(crate) name: String,
    /// What k3s is in it; empty for a root file system.
    pub(crate) k3s: String,
    /// Key of the root file system an image was made from; absent for a root file system itself.
    pub(crate) rootfs: Option<String>,
    pub(crate) created: String,
    pub(crate) files: Vec<FileEntry>,
}

/// One file of an artifact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileEntry {
    pub(crate) name: String,
    pub(crate) size: u64,
    /// Modification time in nanoseconds since 1970: a file touched since is not taken for what was registered.
    pub(crate) mtime_ns: i128,
    pub(crate) sha256: String,
    /// Whether `sha256` is the digest for images with holes.
    pub(crate) sparse: bool,
}

fn mtime_ns(meta: &std::fs::Metadata) -> i128 {
    i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec())
}

fn digest(path: &Utf8Path, is_sparse: bool) -> std::io::Result<String> {
    if is_sparse { sparse::digest(path) } else { fs::sha256_file(path) }
}

impl FileEntry {
    /// Takes the file `name` of `folder` as it is now; it is made read-only and brought to the disk.
    pub(crate) fn seal(folder: &Utf8Path, name: &str, sparse: bool) -> Result<Self, Error> {
        let path = folder.join(name);
        let file = std::fs::File::open(&path).map_err(Error::io("open", &path))?;
        file.set_permissions(std::fs::Permissions::from_mode(0o444)).map_err(Error::io("make read-only", &path))?;
        file.sync_all().map_err(Error::io("sync", &path))?;
        let meta = file.metadata().map_err(Error::io("look at", &path))?;
        let sha256 = digest(&path, sparse).map_err(Error::io("read", &path))?;
        Ok(Self { name: name.to_owned(), size: meta.len(), mtime_ns: mtime_ns(&meta), sha256, sparse })
    }

    /// What differs in size or time, if anything: cheap.
    fn glance(&self, folder: &Utf8Path) -> Option<String> {
        match std::fs::metadata(folder.join(&self.name)) {
            Err(error) => Some(format!("{}: {error}", self.name)),
            Ok(meta) if meta.len() != self.size => {
                Some(format!("{} has {} bytes instead of {}", self.name, meta.len(), self.size))
            }
            Ok(meta) if mtime_ns(&meta) != self.mtime_ns => {
                Some(format!("{} was written to after it was registered", self.name))
            }
            Ok(_) => None,
        }
    }

    /// What differs in content, if anything: reads all of it.
    fn study(&self, folder: &Utf8Path) -> Option<String> {
        match digest(&folder.join(&self.name), self.sparse) {
            Err(error) => Some(format!("{}: {error}", self.name)),
            Ok(found) if found != self.sha256 => {
                Some(format!("{} has digest {found} instead of {}", self.name, self.sha256))
            }
            Ok(_) => None,
        }
    }
}

impl Manifest {
    pub(crate) fn new(id: &str, name: &str, k3s: &str, rootfs: Option<String>, files: Vec<FileEntry>) -> Self {
        Self {
            version: VERSION,
            id: id.to_owned(),
            name: name.to_owned(),
            k3s: k3s.to_owned(),
            rootfs,
            created: jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            files,
        }
    }

    /// Reads the manifest of the artifact in `folder`; `None` where there is no such folder.
    pub(crate) fn load(folder: &Utf8Path) -> Result<Option<Self>, Error> {
        let path = folder.join(MANIFEST);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !folder.exists() => return Ok(None),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::Corrupt { path: folder.to_owned(), reason: "it has no manifest".to_owned() });
            }
            Err(error) => return Err(Error::io("read", path)(error)),
        };
        let corrupt = |reason: String| Error::Corrupt { path: path.clone(), reason };
        let manifest: Self = serde_json::from_slice(&text).map_err(|error| corrupt(error.to_string()))?;
        if manifest.version != VERSION {
            return Err(corrupt(format!("its form is version {}, not {VERSION}", manifest.version)));
        }
        if folder.file_name() != Some(&manifest.id) {
            return Err(corrupt(format!("it names {}", manifest.id)));
        }
        Ok(Some(manifest))
    }

    /// Writes the manifest and the lease file into `folder` and brings both to the disk.
    pub(crate) fn store(&self, folder: &Utf8Path) -> Result<(), Error> {
        let lease = folder.join(LEASE);
        std::fs::File::create_new(&lease).map_err(Error::io("create", &lease))?;
        let path = folder.join(MANIFEST);
        let text = serde_json::to_vec_pretty(self)
            .map_err(|error| Error::Corrupt { path: path.clone(), reason: error.to_string() })?;
        let mut file = std::fs::File::create_new(&path).map_err(Error::io("create", &path))?;
        file.write_all(&text).and_then(|()| file.sync_all()).map_err(Error::io("write", &path))?;
        sync_folder(folder)
    }

    /// The first thing in `folder` that is not as registered, by sizes and times.
    pub(crate) fn glance(&self, folder: &Utf8Path) -> Option<String> {
        self.files.iter().find_map(|file| file.glance(folder))
    }

    /// Everything in `folder` that is not as registered, by content.
    pub(crate) fn study(&self, folder: &Utf8Path) -> Vec<String> {
        let faults = self.files.iter().filter_map(|file| file.glance(folder).or_else(|| file.study(folder)));
        faults.collect()
    }

    pub(crate) fn digest_of(&self, name: &str) -> Option<&str> {
        self.files.iter().find(|file| file.name == name).map(|file| file.sha256.as_str())
    }
}

/// Brings a folder's entries to the disk.
pub(crate) fn sync_folder(folder: &Utf8Path) -> Result<(), Error> {
    std::fs::File::open(folder).and_then(|file| file.sync_all()).map_err(Error::io("sync", folder))
}
