//! Published releases of k3s: which files they have, and a cache of them.
//!
//! The cache is `k3s/VERSION/ARCHITECTURE/FILE` in the harness's cache folder: a version and an architecture are in every
//! path, so that no file can be taken for another's. Beside each file lies a record of its digest, length and time of last
//! change, made when every byte had been compared with the release's list of digests. At use length and time are compared,
//! and all bytes again if the time differs.

use std::fmt;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::time::SystemTime;

use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use crate::airgap::GUEST_IMAGES_DIR;
use crate::download::{Client, DownloadError, DownloadEvent, OnEvent, Options, Wanted, fetch, fetch_sums};
use crate::downloads::Lease;
use crate::elf::{self, Machine};
use crate::lock;
use crate::payload::GuestFile;

/// The cache's folder of releases.
pub(crate) const FOLDER: &str = "k3s";

/// The file of a release's folder that is locked by whoever fetches into it.
pub(crate) const LOCK: &str = "lock";

/// More than any k3s binary has: in 2025 they have 75 MB.
const MAX_BINARY_BYTES: u64 = 512 * 1024 * 1024;

/// More than any tarball of images has: uncompressed ones have 800 MB.
const MAX_IMAGES_BYTES: u64 = 3 * 1024 * 1024 * 1024;

/// An architecture k3s is released for and guests can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arch {
    /// x86_64.
    Amd64,
    /// aarch64.
    Arm64,
}

impl Arch {
    /// The architecture of this host's guests.
    #[must_use]
    pub fn host() -> Option<Self> {
        match std::env::consts::ARCH {
            "x86_64" => Some(Self::Amd64),
            "aarch64" => Some(Self::Arm64),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    fn machine(self) -> Machine {
        match self {
            Self::Amd64 => Machine::X86_64,
            Self::Arm64 => Machine::AARCH64,
        }
    }

    /// The binary's name in a release.
    fn binary(self) -> &'static str {
        match self {
            Self::Amd64 => "k3s",
            Self::Arm64 => "k3s-arm64",
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A release for one architecture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    version: String,
    arch: Arch,
}

/// A file of a release in the cache, whole and compared with what was published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReleaseFile {
    /// The file on this host.
    pub path: Utf8PathBuf,
    /// Its SHA-256, hexadecimal.
    pub sha256: String,
    /// Its length.
    pub bytes: u64,
    /// The absolute path it has in a guest.
    pub guest_path: String,
    /// What keeps it in the cache.
    pub lease: Lease,
}

/// What is known of a file in the cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    pub(crate) version: String,
    pub(crate) arch: Arch,
    file: String,
    pub(crate) url: String,
    pub(crate) sha256: String,
    bytes: u64,
    /// Time of the last change since the epoch, in nanoseconds.
    modified_ns: u64,
    fetched: jiff::Timestamp,
}

/// What makes a kind of file usable.
#[derive(Clone, Copy)]
enum Kind {
    Binary,
    Images,
}

impl Kind {
    fn mode(self) -> u32 {
        match self {
            Self::Binary => 0o755,
            Self::Images => 0o644,
        }
    }

    fn max_bytes(self) -> u64 {
        match self {
            Self::Binary => MAX_BINARY_BYTES,
            Self::Images => MAX_IMAGES_BYTES,
        }
    }
}

impl From<ReleaseFile> for GuestFile {
    fn from(file: ReleaseFile) -> Self {
        Self { path: file.path, sha256: file.sha256, guest_path: file.guest_path, mode: 0o644 }
    }
}

enum Found {
    Usable(ReleaseFile),
    Absent,
    Damaged(String),
}

impl Release {
    /// The release `version`, such as `v1.35.0+k3s1`; `None` where no release can be called that.
    #[must_use]
    pub fn new(version: &str, arch: Arch) -> Option<Self> {
        is_version(version).then(|| Self { version: version.to_owned(), arch })
    }

    /// The URL of its binary, as messages show it; as it is configured where it is no URL.
    #[must_use]
    pub fn binary_url(&self, options: &Options) -> String {
        self.shown_url(self.arch.binary(), options)
    }

    /// The URL of the tarball of its images, in the same way; of several kinds the one a release of today has.
    #[must_use]
    pub fn airgap_url(&self, options: &Options) -> String {
        self.shown_url(&self.airgap_names()[0], options)
    }

    fn shown_url(&self, name: &str, options: &Options) -> String {
        let url = options.url(&self.version, name);
        url.map_or_else(|error| error.to_string(), |url| crate::download::shown(&url))
    }

    fn airgap_names(&self) -> [String; 2] {
        ["tar.zst", "tar.gz"].map(|kind| format!("k3s-airgap-images-{}.{kind}", self.arch))
    }

    /// The k3s binary: from the cache below `cache`, or fetched into it.
    ///
    /// # Errors
    /// Where it cannot be had, is not what was published, or is for another machine.
    pub async fn binary(
        &self,
        cache: &Utf8Path,
        options: &Options,
        on_event: OnEvent<'_>,
    ) -> Result<ReleaseFile, DownloadError> {
        self.ensure(cache, &[self.arch.binary().to_owned()], Kind::Binary, options, on_event).await
    }

    /// The tarball of the images k3s would otherwise pull, for guests without a registry: zstd, or gzip where the release
    /// is older than that. It belongs into [`GUEST_IMAGES_DIR`].
    ///
    /// # Errors
    /// Where it cannot be had or is not what was published.
    pub async fn airgap_images(
        &self,
        cache: &Utf8Path,
        options: &Options,
        on_event: OnEvent<'_>,
    ) -> Result<ReleaseFile, DownloadError> {
        self.ensure(cache, &self.airgap_names(), Kind::Images, options, on_event).await
    }

    fn folder(&self, cache: &Utf8Path) -> Utf8PathBuf {
        cache.join(FOLDER).join(&self.version).join(self.arch.name())
    }

    /// The first of `names` that is cached, else the first the release has.
    async fn ensure(
        &self,
        cache: &Utf8Path,
        names: &[String],
        kind: Kind,
        options: &Options,
        on_event: OnEvent<'_>,
    ) -> Result<ReleaseFile, DownloadError> {
        let folder = self.folder(cache);
        for name in names {
            if let Found::Usable(file) = self.look(&folder, name, kind).await? {
                on_event(DownloadEvent::Cached { path: file.path.clone() });
                return Ok(file);
            }
        }
        std::fs::create_dir_all(&folder).map_err(DownloadError::io("make", folder.as_path()))?;
        crate::fs::check_folder_kind(&folder)?;
        let lock_path = folder.join(LOCK);
        let held = lock::exclusive(&lock_path, || on_event(DownloadEvent::Waiting { lock: lock_path.clone() }));
        let held = Arc::new(held.await.map_err(|error| DownloadError::Lock { reason: error.to_string() })?);
        // Whoever had the lock may have fetched it.
        for name in names {
            let path = folder.join(name);
            match self.look(&folder, name, kind).await? {
                Found::Usable(file) => {
                    on_event(DownloadEvent::Cached { path: file.path.clone() });
                    return Ok(file);
                }
                Found::Absent => {}
                Found::Damaged(reason) => {
                    std::fs::remove_file(&path).map_err(DownloadError::io("remove", path.as_path()))?;
                    on_event(DownloadEvent::Damaged { path, reason });
                }
            }
        }
        let client = Client::new(options.clone())?;
        let sums_url = options.url(&self.version, &format!("sha256sum-{}.txt", self.arch))?;
        let sums = fetch_sums(&client, &sums_url, on_event).await?;
        let listed = names.iter().find_map(|name| sums.get(name).map(|sha256| (name, sha256)));
        let (name, sha256) = listed.ok_or_else(|| DownloadError::NotListed {
            url: crate::download::shown(&sums_url),
            name: names.join(" or "),
        })?;
        let wanted = Wanted {
            url: options.url(&self.version, name)?,
            sha256: sha256.to_owned(),
            part: folder.join(format!("{name}.part")),
            max_bytes: kind.max_bytes(),
            lock: held,
        };
        let bytes = fetch(&client, &wanted, on_event).await?;
        let file = self.adopt(&wanted, &folder, name, kind, bytes)?;
        on_event(DownloadEvent::Finished { path: file.path.clone(), bytes });
        Ok(file)
    }

    /// Makes a whole part the file of the cache. The record comes first: a file is never there without it.
    fn adopt(
        &self,
        wanted: &Wanted,
        folder: &Utf8Path,
        name: &str,
        kind: Kind,
        bytes: u64,
    ) -> Result<ReleaseFile, DownloadError> {
        let url = crate::download::shown(&wanted.url);
        if matches!(kind, Kind::Binary)
            && let Err(source) = elf::check(&wanted.part, self.arch.machine())
        {
            wanted.discard()?;
            return Err(DownloadError::Elf { url, source });
        }
        let part = wanted.part.as_path();
        std::fs::set_permissions(part, std::fs::Permissions::from_mode(kind.mode()))
            .map_err(DownloadError::io("set the mode of", part))?;
        let metadata = std::fs::metadata(part).map_err(DownloadError::io("look at", part))?;
        let record = Record {
            version: self.version.clone(),
            arch: self.arch,
            file: name.to_owned(),
            url,
            sha256: wanted.sha256.clone(),
            bytes,
            modified_ns: modified_ns(&metadata),
            fetched: jiff::Timestamp::now(),
        };
        write_record(folder, &record)?;
        let path = folder.join(name);
        std::fs::rename(part, &path).map_err(DownloadError::io("rename", part))?;
        wanted.forget();
        // Nobody removes what lies in a folder whose lock is held.
        let lease = lease(folder, name)?.ok_or_else(|| {
            DownloadError::io("take", path.as_path())(std::io::Error::other("it is gone as soon as it was there"))
        })?;
        Ok(file_of(path, &record, lease))
    }

    /// What the cache has under `name`.
    async fn look(&self, folder: &Utf8Path, name: &str, kind: Kind) -> Result<Found, DownloadError> {
        let path = folder.join(name);
        let Some(lease) = lease(folder, name)? else { return Ok(Found::Absent) };
        let metadata = match std::fs::metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Found::Absent),
            Err(error) => return Err(DownloadError::io("look at", path)(error)),
        };
        let Some(mut record) = read_record(folder, name) else {
            return Ok(Found::Damaged("there is no record of its digest".to_owned()));
        };
        if (&record.version, record.arch, record.file.as_str()) != (&self.version, self.arch, name) {
            let what = format!("its record is of {} {} {}", record.file, record.version, record.arch);
            return Ok(Found::Damaged(what));
        }
        if record.sha256.len() != 64 || !record.sha256.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Ok(Found::Damaged("its record holds no digest".to_owned()));
        }
        if metadata.len() != record.bytes {
            let what = format!("it has {} bytes, {} were recorded", metadata.len(), record.bytes);
            return Ok(Found::Damaged(what));
        }
        if matches!(kind, Kind::Binary)
            && let Err(error) = elf::check(&path, self.arch.machine())
        {
            return Ok(Found::Damaged(error.to_string()));
        }
        if modified_ns(&metadata) != record.modified_ns {
            let to_hash = path.clone();
            let digest = tokio::task::spawn_blocking(move || crate::fs::sha256_file(&to_hash)).await;
            let digest =
                digest.map_err(|_| DownloadError::Interrupted)?.map_err(DownloadError::io("read", path.as_path()))?;
            if digest != record.sha256 {
                return Ok(Found::Damaged(format!("its sha256 is {digest}, {} was recorded", record.sha256)));
            }
            record.modified_ns = modified_ns(&metadata);
            if let Err(error) = write_record(folder, &record) {
                // A cache that cannot be written to is still one that can be read.
                tracing::warn!(%error, "the cached file is read as a whole at every use");
            }
        }
        Ok(Found::Usable(file_of(path, &record, lease)))
    }
}

/// `vMAJOR.MINOR.PATCH`, then any of `-rc1`, `+k3s1`: what names a release, and nothing that could leave a URL's or a
/// cache's folder.
pub(crate) fn is_version(text: &str) -> bool {
    let Some(rest) = text.strip_prefix('v') else { return false };
    let core: &str = rest.split(['-', '+']).next().unwrap_or_default();
    let numbers: Vec<&str> = core.split('.').collect();
    numbers.len() == 3
        && numbers.iter().all(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
        && text.len() <= 64
        && rest.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'+'))
}

fn file_of(path: Utf8PathBuf, record: &Record, lease: Lease) -> ReleaseFile {
    let guest_path = if record.file == record.arch.binary() {
        "/usr/local/bin/k3s".to_owned()
    } else {
        format!("{GUEST_IMAGES_DIR}/{}", record.file)
    };
    ReleaseFile { path, sha256: record.sha256.clone(), bytes: record.bytes, guest_path, lease }
}

fn lease(folder: &Utf8Path, name: &str) -> Result<Option<Lease>, DownloadError> {
    Lease::take(&folder.join(name), &record_path(folder, name))
        .map_err(|error| DownloadError::Lock { reason: error.to_string() })
}

/// What is recorded of a file; `None` where nothing is, or nothing that can be read.
pub(crate) fn read_record(folder: &Utf8Path, name: &str) -> Option<Record> {
    std::fs::read(record_path(folder, name)).ok().and_then(|text| serde_json::from_slice(&text).ok())
}

pub(crate) fn record_path(folder: &Utf8Path, name: &str) -> Utf8PathBuf {
    folder.join(format!("{name}.json"))
}

fn write_record(folder: &Utf8Path, record: &Record) -> Result<(), DownloadError> {
    let path = record_path(folder, &record.file);
    let result = (|| {
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        serde_json::to_writer_pretty(&mut file, record)?;
        file.as_file().sync_all()?;
        file.persist(&path).map_err(|error| error.error)?;
        Ok(())
    })();
    result.map_err(DownloadError::io("write", path.as_path()))
}

fn modified_ns(metadata: &std::fs::Metadata) -> u64 {
    let since = metadata.modified().ok().and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
    // Until the year 2554.
    since.and_then(|since| u64::try_from(since.as_nanos()).ok()).unwrap_or_default()
}
