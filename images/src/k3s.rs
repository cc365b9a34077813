//! Where the k3s of a run comes from: named by whoever asks, never guessed, and said in every output.

use std::fmt;
use std::str::FromStr;

use camino::{Utf8Path, Utf8PathBuf};

use crate::airgap::AirgapImages;
use crate::download::{BASE_URL_ENV, DownloadError, OnEvent, Options};
use crate::downloads::Lease;
use crate::elf::{self, ElfError};
use crate::payload::{GuestBinary, GuestFile};
use crate::release::{Arch, Release, is_version};
use crate::scalar::{scalar, version_pattern};

/// Environment variable that names the stand-in's binary.
pub const STANDIN_ENV: &str = "HARNESS_STANDIN";

/// File name of the stand-in's binary beside the harness.
pub const STANDIN_NAME: &str = "k3s-standin";

/// Version the stand-in gives itself.
pub const STANDIN_VERSION: &str = "v0.0.0-standin";

/// A source of the k3s binary.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum K3sSource {
    /// A binary on this host: `file:/path/to/k3s`.
    File(Utf8PathBuf),
    /// The stand-in that is built with this workspace: `standin`.
    Standin,
    /// A published release: `release:v1.35.0+k3s1`.
    Release(String),
}

/// A k3s binary that is there and is for the guests' machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct K3sBinary {
    /// The binary on this host.
    pub path: Utf8PathBuf,
    /// SHA-256 of its content, hexadecimal.
    pub sha256: String,
    /// What every output calls it.
    pub label: String,
    /// Whether it is k3s itself, for labelling only.
    pub real: bool,
    /// Debian packages it needs in the image besides the recipe's.
    pub extra_packages: Vec<String>,
    /// The tarball of images that is laid into the guests with it.
    pub airgap_images: Option<GuestFile>,
    /// What keeps them in the cache of downloads, where they come from there.
    pub leases: Vec<Lease>,
}

impl K3sBinary {
    /// The binary as the recipe's guest binary `k3s`.
    pub fn guest_binary(&self) -> GuestBinary {
        GuestBinary {
            name: "k3s".to_owned(),
            path: self.path.clone(),
            sha256: self.sha256.clone(),
            label: self.label.clone(),
            extra_packages: self.extra_packages.clone(),
            files: self.airgap_images.iter().cloned().collect(),
        }
    }
}

/// Why a k3s source gave no binary.
#[derive(Debug, thiserror::Error)]
pub enum K3sError {
    /// The text names no source.
    #[error("{text:?} names no k3s source: expected file:/path/to/k3s, standin or release:VERSION")]
    Syntax {
        /// The text.
        text: String,
    },
    /// The version is not one a release can have.
    #[error("{version:?} is no k3s version: expected one like v1.35.0+k3s1")]
    Version {
        /// The text after `release:`.
        version: String,
    },
    /// The binary is no program for the guests.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// The binary could not be read.
    #[error("could not read {path}: {source}")]
    Read {
        /// The binary.
        path: Utf8PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The stand-in has not been built.
    #[error(
        "the k3s stand-in is not at {looked} and {STANDIN_ENV} is not set: build it with ci/build, \
         or name a k3s binary by --k3s file:/path/to/k3s"
    )]
    StandinMissing {
        /// Where it was looked for.
        looked: String,
    },
    /// The release is not in the cache and could not be fetched.
    #[error("k3s {version} could not be had from {url}")]
    Release {
        /// The version asked for.
        version: String,
        /// Where the binary is published.
        url: String,
        /// Why not.
        source: Box<DownloadError>,
    },
    /// The text names no source of images.
    #[error(
        "{text:?} names no air-gap images: expected release, release:VERSION, file:/path/to/images.tar.zst or none"
    )]
    AirgapSyntax {
        /// The text.
        text: String,
    },
    /// k3s would not import a file of this name.
    #[error("k3s imports no images from a file called {name:?}: its name has to end in one of {suffixes}")]
    AirgapName {
        /// The file's name.
        name: String,
        /// What k3s imports.
        suffixes: String,
    },
    /// The images of the release under test were asked for, and there is none.
    #[error("the air-gap images of the k3s release are asked for, and {k3s} is no release")]
    AirgapNoRelease {
        /// What is under test.
        k3s: String,
    },
    /// The tarball of a release's images is not in the cache and could not be fetched.
    #[error("the air-gap images of k3s {version} could not be had from {url}")]
    Airgap {
        /// The version asked for.
        version: String,
        /// Where they are published.
        url: String,
        /// Why not.
        source: Box<DownloadError>,
    },
    /// A release was asked for where only this host's files are looked at.
    #[error("k3s {version} is a release, which only a cache or a download can give")]
    NotLocal {
        /// The version asked for.
        version: String,
    },
    /// The program is shutting down.
    #[error("interrupted")]
    Interrupted,
}

impl K3sError {
    /// What to do about it, where that is more than the message says.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Release { url, .. } => Some(format!(
                "fetch {url} elsewhere and say --k3s file:/path/to/k3s, or run on the stand-in by --k3s standin; \
                 --k3s-base-url or {BASE_URL_ENV} names a mirror"
            )),
            Self::Airgap { url, .. } => Some(format!(
                "fetch {url} elsewhere and say --airgap-images file:/path/to/it, or let k3s pull its images by \
                 --airgap-images none; --k3s-base-url or {BASE_URL_ENV} names a mirror"
            )),
            Self::AirgapNoRelease { .. } => Some(
                "say --airgap-images file:/path/to/images.tar.zst, --airgap-images release:VERSION or --airgap-images none"
                    .to_owned(),
            ),
            _ => None,
        }
    }
}

impl FromStr for K3sSource {
    type Err = K3sError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let syntax = || K3sError::Syntax { text: text.to_owned() };
        match text.split_once(':') {
            None if text == "standin" => Ok(Self::Standin),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("release", version)) if !version.is_empty() => {
                if is_version(version) {
                    Ok(Self::Release(version.to_owned()))
                } else {
                    Err(K3sError::Version { version: version.to_owned() })
                }
            }
            _ => Err(syntax()),
        }
    }
}

impl fmt::Display for K3sSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file:{path}"),
            Self::Standin => f.write_str("standin"),
            Self::Release(version) => write!(f, "release:{version}"),
        }
    }
}

scalar!(
    K3sSource,
    "A source of the k3s binary: file:/path/to/k3s, release:VERSION or standin.",
    concat!("^(standin|file:.+|release:", version_pattern!(), ")$")
);

impl K3sSource {
    /// Finds the binary, checks that it is a program for the guests and takes its digest.
    ///
    /// # Errors
    /// Where there is no such binary, or it is for another machine. Nothing falls back to another source. A release is
    /// not on this host: [`K3sSource::resolve_with`] gives it.
    pub fn resolve(&self) -> Result<K3sBinary, K3sError> {
        match self {
            Self::File(path) => {
                let sha256 = check_and_hash(path)?;
                let label = format!("k3s from {path} (sha256 {})", &sha256[..12]);
                Ok(K3sBinary {
                    path: path.clone(),
                    sha256,
                    label,
                    real: true,
                    extra_packages: Vec::new(),
                    airgap_images: None,
                    leases: Vec::new(),
                })
            }
            Self::Standin => {
                let path = find_standin(std::env::var(STANDIN_ENV).ok(), std::env::current_exe().ok())?;
                let sha256 = check_and_hash(&path)?;
                let label = format!("stand-in {STANDIN_VERSION} (NOT real k3s)");
                let extra_packages = vec!["etcd-server".to_owned()];
                Ok(K3sBinary {
                    path,
                    sha256,
                    label,
                    real: false,
                    extra_packages,
                    airgap_images: None,
                    leases: Vec::new(),
                })
            }
            Self::Release(version) => Err(K3sError::NotLocal { version: version.clone() }),
        }
    }

    /// Finds the binary as [`K3sSource::resolve`] does, or takes a release from the cache below `cache`, fetching it into
    /// it first where it is not there; with it the images for guests without a registry, where they are asked for.
    ///
    /// Dropping the future ends a download at once; the next one goes on where it stopped.
    ///
    /// # Errors
    /// As for [`K3sSource::resolve`], and where a release cannot be had or is not what was published.
    pub async fn resolve_with(
        &self,
        airgap_images: &AirgapImages,
        cache: &Utf8Path,
        options: &Options,
        on_event: OnEvent<'_>,
    ) -> Result<K3sBinary, K3sError> {
        // Asked before anything is fetched.
        airgap_images.version(self)?;
        let mut binary = self.binary(cache, options, on_event).await?;
        if let Some((images, lease)) = airgap_images.resolve(self, cache, options, on_event).await? {
            let name = images.path.file_name().unwrap_or_default();
            let digest = images.sha256.get(..12).unwrap_or_default();
            let but = if binary.real { "" } else { ", which it does not import" };
            binary.label = format!("{} with {name} (sha256 {digest}){but}", binary.label);
            binary.airgap_images = Some(images);
            binary.leases.extend(lease);
        }
        Ok(binary)
    }

    async fn binary(&self, cache: &Utf8Path, options: &Options, on_event: OnEvent<'_>) -> Result<K3sBinary, K3sError> {
        let Self::Release(version) = self else {
            // Reading a binary whole takes its time, in which a run can be interrupted.
            let source = self.clone();
            return tokio::task::spawn_blocking(move || source.resolve()).await.map_err(|_| K3sError::Interrupted)?;
        };
        let release = host_release(version)?;
        let file = release.binary(cache, options, on_event).await.map_err(|source| K3sError::Release {
            version: version.clone(),
            url: release.binary_url(options),
            source: Box::new(source),
        })?;
        let label = format!("k3s {version} (release, sha256 {})", file.sha256.get(..12).unwrap_or_default());
        let (path, sha256, leases) = (file.path, file.sha256, vec![file.lease]);
        Ok(K3sBinary { path, sha256, label, real: true, extra_packages: Vec::new(), airgap_images: None, leases })
    }

    /// As a plan names it: a release with where it would be fetched from.
    #[must_use]
    pub fn planned(&self, options: &Options) -> String {
        let Self::Release(version) = self else { return self.to_string() };
        match host_release(version) {
            Ok(release) => format!("{self} from {}", release.binary_url(options)),
            Err(_) => self.to_string(),
        }
    }
}

/// The release `version` for this host's guests.
pub(crate) fn host_release(version: &str) -> Result<Release, K3sError> {
    let arch = Arch::host().ok_or_else(|| ElfError::UnsupportedHost { arch: std::env::consts::ARCH.to_owned() })?;
    Release::new(version, arch).ok_or_else(|| K3sError::Version { version: version.to_owned() })
}

fn check_and_hash(path: &Utf8Path) -> Result<String, K3sError> {
    elf::check_for_guest(path)?;
    crate::fs::sha256_file(path).map_err(|source| K3sError::Read { path: path.to_owned(), source })
}

fn find_standin(env: Option<String>, exe: Option<std::path::PathBuf>) -> Result<Utf8PathBuf, K3sError> {
    // A path that is named and wrong is an error of its own, said by whoever reads it: it is not looked for elsewhere.
    if let Some(path) = env.filter(|path| !path.is_empty()) {
        return Ok(path.into());
    }
    let beside = exe
        .and_then(|exe| Utf8PathBuf::from_path_buf(exe).ok())
        .and_then(|exe| exe.parent().map(|folder| folder.join(STANDIN_NAME)));
    match beside {
        Some(path) if path.is_file() => Ok(path),
        Some(path) => Err(K3sError::StandinMissing { looked: path.into_string() }),
        None => Err(K3sError::StandinMissing { looked: format!("{STANDIN_NAME} beside the harness") }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_read_as_they_are_shown() {
        for text in ["standin", "file:/x/k3s", "file:k3s", "release:v1.35.0+k3s1", "release:v1.21.2-rc1+k3s1"] {
            assert_eq!(text.parse::<K3sSource>().unwrap().to_string(), text);
        }
        for text in ["", "stand-in", "file:", "release:", "v1.35.0+k3s1", "release"] {
            assert!(matches!(text.parse::<K3sSource>(), Err(K3sError::Syntax { .. })), "{text}");
        }
        for text in ["release:1.35.0", "release:v1.35", "release:v1.2.3/../..", "release:latest"] {
            assert!(matches!(text.parse::<K3sSource>(), Err(K3sError::Version { .. })), "{text}");
        }
    }

    #[test]
    fn serde_uses_the_text() {
        let source = K3sSource::File("/x/k3s".into());
        assert_eq!(serde_json::to_string(&source).unwrap(), "\"file:/x/k3s\"");
        assert_eq!(serde_json::from_str::<K3sSource>("\"file:/x/k3s\"").unwrap(), source);
        assert!(serde_json::from_str::<K3sSource>("\"nonsense\"").is_err());
    }

    #[test]
    fn a_release_is_not_looked_for_among_files() {
        let error = K3sSource::Release("v1.35.0+k3s1".to_owned()).resolve().unwrap_err();
        assert!(matches!(error, K3sError::NotLocal { .. }), "{error}");
    }

    #[test]
    fn the_stand_in_is_looked_for_in_two_places_only() {
        let named = find_standin(Some("/named/standin".to_owned()), None).unwrap();
        assert_eq!(named, "/named/standin");

        let dir = tempfile::tempdir().unwrap();
        let exe = dir.path().join("harness");
        let error = find_standin(Some(String::new()), Some(exe.clone())).unwrap_err().to_string();
        assert!(error.contains("ci/build") && error.contains("k3s-standin"), "{error}");

        std::fs::write(dir.path().join(STANDIN_NAME), "x").unwrap();
        assert!(find_standin(None, Some(exe)).unwrap().ends_with(STANDIN_NAME));
    }

    #[test]
    fn a_file_that_is_no_program_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(dir.path()).unwrap().join("k3s");
        std::fs::write(&path, "#!/bin/sh\n").unwrap();
        let error = K3sSource::File(path).resolve().unwrap_err().to_string();
        assert!(error.contains("is not an ELF program: a script"), "{error}");
        let missing = K3sSource::File("/nonexistent/k3s".into()).resolve().unwrap_err().to_string();
        assert!(missing.contains("could not read /nonexistent/k3s"), "{missing}");
    }
}
