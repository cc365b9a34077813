//! What lies in the cache of releases ([`crate::release`]), and what is removed from it.
//!
//! A file is in use while somebody has a shared lock on it (flock(2)), as everybody has who was given it, and it was last
//! used when its record was last touched. Whoever fetches into a folder holds the folder's own lock, which stays: to
//! remove it under somebody who waits for it would let two of them fetch at once.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use camino::{Utf8Path, Utf8PathBuf};
use serde::Serialize;

use crate::build::blocking;
use crate::error::Error;
use crate::lock::{self, Held};
use crate::release::{Arch, FOLDER, LOCK, read_record, record_path};
use crate::store::{GcReport, rfc3339};

/// Keeps a file of the cache from being removed while it (or a clone) lives.
#[derive(Debug, Clone)]
pub struct Lease(
    #[expect(dead_code, reason = "held, not used: dropping the last clone lets a gc remove the file")] Arc<Held>,
);

/// A lease says nothing about the file it is for.
impl PartialEq for Lease {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Lease {}

impl Lease {
    /// Takes the file at `path`, and notes the use in its record; `None` where it is gone or just being removed.
    pub(crate) fn take(path: &Utf8Path, record: &Utf8Path) -> Result<Option<Self>, Error> {
        use std::os::unix::fs::MetadataExt as _;
        let held = match lock::shared(path) {
            Ok(Some(held)) => held,
            Ok(None) => return Ok(None),
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        // It may have been removed between the two: then what is held has no name any more.
        let number = |meta: std::fs::Metadata| (meta.dev(), meta.ino());
        let locked = held.file().metadata().map(number).map_err(Error::io("look at", path))?;
        if std::fs::metadata(path).map(number).ok() != Some(locked) {
            return Ok(None);
        }
        // When it was last used decides what a gc removes; where that cannot be noted the file is as good.
        if let Err(error) = std::fs::File::open(record).and_then(|file| file.set_modified(SystemTime::now())) {
            tracing::debug!(%record, %error, "could not note the use");
        }
        Ok(Some(Self(Arc::new(held))))
    }
}

/// A file of a release in the cache.
#[derive(Debug, Clone, Serialize)]
pub struct DownloadInfo {
    /// The release.
    pub version: String,
    /// What it is for.
    pub arch: Arch,
    /// Its name, as it was published.
    pub file: String,
    /// Its SHA-256, hexadecimal.
    pub sha256: String,
    /// What it takes on disk, in bytes.
    pub disk_bytes: u64,
    /// Where it was fetched from.
    pub url: String,
    /// When it was last asked for, RFC 3339.
    pub last_used: String,
}

/// All files of releases in the cache below `cache`, by version, architecture and name.
///
/// # Errors
/// Where the cache cannot be read. What has no record of its own is no usable file and is left out.
pub fn list(cache: &Utf8Path) -> Result<Vec<DownloadInfo>, Error> {
    let mut found = Vec::new();
    for folder in folders(cache)? {
        for name in names(&folder)? {
            let Some(record) = read_record(&folder, &name) else { continue };
            found.push(DownloadInfo {
                last_used: jiff::Timestamp::try_from(modified(&record_path(&folder, &name)))
                    .map(rfc3339)
                    .unwrap_or_default(),
                disk_bytes: disk_bytes(&folder.join(&name)),
                version: record.version,
                arch: record.arch,
                file: name,
                sha256: record.sha256,
                url: record.url,
            });
        }
    }
    found.sort_by(|a, b| (&a.version, a.arch.to_string(), &a.file).cmp(&(&b.version, b.arch.to_string(), &b.file)));
    Ok(found)
}

/// Removes files of releases that nobody uses and nobody asked for within `unused_for`, parts of downloads that were not
/// gone on with for as long, and what has no record and so cannot be used.
///
/// # Errors
/// Where the cache cannot be read or something cannot be removed.
pub async fn gc(cache: &Utf8Path, unused_for: Duration) -> Result<GcReport, Error> {
    let cache = cache.to_owned();
    blocking(move || {
        let mut report = GcReport::default();
        for folder in folders(&cache)? {
            let shown = folder.strip_prefix(&cache).unwrap_or(&folder).to_owned();
            // Made where it is missing, so that nobody can begin to fetch into the folder meanwhile.
            let lock = folder.join(LOCK);
            std::fs::OpenOptions::new().create(true).append(true).open(&lock).map_err(Error::io("open lock", &lock))?;
            match lock::try_exclusive(&lock)? {
                Some(_held) => collect(&folder, &shown, unused_for, &mut report)?,
                None => report.in_use.push(format!("{shown}: being fetched into")),
            }
        }
        Ok(report)
    })
    .await
}

fn collect(folder: &Utf8Path, shown: &Utf8Path, unused_for: Duration, report: &mut GcReport) -> Result<(), Error> {
    let names = names(folder)?;
    let mut remove = |name: &str| {
        let path = folder.join(name);
        let bytes = disk_bytes(&path);
        std::fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        report.freed_bytes += bytes;
        Ok::<_, Error>(())
    };
    // A clock that was set back makes "last used" lie ahead: such a file counts as used just now.
    let unused =
        |path: Utf8PathBuf| SystemTime::now().duration_since(modified(&path)).unwrap_or_default() >= unused_for;
    let of = |name: &str| name.strip_suffix(".json").map(str::to_owned);
    for name in &names {
        // A record goes with its file; one without is what a killed download left.
        if let Some(file) = of(name) {
            if !names.contains(&file) {
                remove(name)?;
            }
            continue;
        }
        let recorded = read_record(folder, name).is_some();
        let stale = if recorded {
            unused(record_path(folder, name))
        } else {
            !name.ends_with(".part") || unused(folder.join(name))
        };
        if !stale {
            continue;
        }
        let _alone = match lock::try_exclusive(&folder.join(name)) {
            // A record on its way to its name.
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => continue,
            tried => match tried? {
                Some(alone) => alone,
                None => {
                    report.in_use.push(format!("{shown}/{name}"));
                    continue;
                }
            },
        };
        remove(name)?;
        if names.contains(&format!("{name}.json")) {
            remove(&format!("{name}.json"))?;
        }
        report.removed.push(format!("{shown}/{name}"));
    }
    Ok(())
}

/// `k3s/VERSION/ARCHITECTURE` of all there are.
fn folders(cache: &Utf8Path) -> Result<Vec<Utf8PathBuf>, Error> {
    let mut found = vec![cache.join(FOLDER)];
    for _ in ["version", "architecture"] {
        let mut below = Vec::new();
        for folder in found {
            let entries = match folder.read_dir_utf8() {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                entries => entries.map_err(Error::io("read folder", &folder))?,
            };
            for entry in entries {
                let entry = entry.map_err(Error::io("read folder", &folder))?;
                if entry.path().is_dir() {
                    below.push(entry.into_path());
                }
            }
        }
        found = below;
    }
    found.sort();
    Ok(found)
}

/// The files of a folder, but its lock.
fn names(folder: &Utf8Path) -> Result<BTreeSet<String>, Error> {
    let entries = folder.read_dir_utf8().map_err(Error::io("read folder", folder))?;
    let name = |entry: std::io::Result<camino::Utf8DirEntry>| entry.map(|entry| entry.file_name().to_owned());
    let names: Result<BTreeSet<String>, _> = entries.map(name).collect();
    let mut names = names.map_err(Error::io("read folder", folder))?;
    names.remove(LOCK);
    Ok(names)
}

/// When a file was last changed; the epoch where that cannot be told.
fn modified(path: &Utf8Path) -> SystemTime {
    std::fs::metadata(path).and_then(|meta| meta.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
}

fn disk_bytes(path: &Utf8Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata(path).map_or(0, |meta| meta.blocks() * 512)
}
