//! Where k3s keeps what: paths below the data directory and below `/etc/rancher`, and the
//! writing of files with their modes.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// A file operation that failed, with its path.
#[derive(Debug, thiserror::Error)]
#[error("{action} {}: {source}", path.display())]
pub(crate) struct FileError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// The directories of one installation.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    /// `/var/lib/rancher/k3s`
    pub(crate) data: PathBuf,
    /// `/etc/rancher`
    pub(crate) etc: PathBuf,
}

impl Layout {
    pub(crate) fn server(&self, rest: &str) -> PathBuf {
        self.data.join("server").join(rest)
    }
    pub(crate) fn tls(&self, file: &str) -> PathBuf {
        self.data.join("server/tls").join(file)
    }
    pub(crate) fn cred(&self, file: &str) -> PathBuf {
        self.data.join("server/cred").join(file)
    }
    pub(crate) fn etcd(&self, file: &str) -> PathBuf {
        self.data.join("server/db/etcd").join(file)
    }
    pub(crate) fn agent(&self, file: &str) -> PathBuf {
        self.data.join("agent").join(file)
    }
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.etc.join("k3s/k3s.yaml")
    }
    pub(crate) fn node_password(&self) -> PathBuf {
        self.etc.join("node/password")
    }

    /// Whether a datastore is there already: k3s looks for the write-ahead log.
    pub(crate) fn datastore_exists(&self) -> bool {
        self.etcd("member/wal").is_dir()
    }

    /// Makes the server's directories with the modes measured on real k3s.
    pub(crate) fn make_server_dirs(&self) -> Result<(), FileError> {
        for dir in ["cred", "db/etcd", "db/snapshots", "manifests", "static/charts", "tls/temporary-certs"] {
            make_dir(&self.server(dir), 0o700)?;
        }
        make_dir(&self.tls("etcd"), 0o755)
    }
}

/// `mkdir -p` with a mode for what is created.
pub(crate) fn make_dir(path: &Path, mode: u32) -> Result<(), FileError> {
    fs::DirBuilder::new().recursive(true).mode(mode).create(path).map_err(|source| FileError {
        action: "mkdir",
        path: path.to_owned(),
        source,
    })
}

/// Writes a file so that a reader sees the old or the new content, never half of it.
pub(crate) fn write(path: &Path, mode: u32, content: &[u8]) -> Result<(), FileError> {
    let error = |action| move |source| FileError { action, path: path.to_owned(), source };
    if let Some(parent) = path.parent() {
        make_dir(parent, 0o755)?;
    }
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let new = PathBuf::from(name);
    match fs::remove_file(&new) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(error("unlink")(e)),
        _ => {}
    }
    fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&new)
        .and_then(|mut file| {
            file.write_all(content)?;
            file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(mode))
        })
        .map_err(error("write"))?;
    fs::rename(&new, path).map_err(error("rename"))
}

/// A file's text.
pub(crate) fn read(path: &Path) -> Result<String, FileError> {
    fs::read_to_string(path).map_err(|source| FileError { action: "open", path: path.to_owned(), source })
}

/// A file's text, or nothing where there is no such file.
pub(crate) fn read_if_there(path: &Path) -> Result<Option<String>, FileError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(FileError { action: "open", path: path.to_owned(), source }),
    }
}

/// Removes a file that may not be there.
pub(crate) fn remove(path: &Path) -> Result<(), FileError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(FileError { action: "unlink", path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

/// Points `link` at `target`, replacing what was there.
pub(crate) fn symlink(target: &Path, link: &Path) -> Result<(), FileError> {
    remove(link)?;
    std::os::unix::fs::symlink(target, link).map_err(|source| FileError {
        action: "symlink",
        path: link.to_owned(),
        source,
    })
}
