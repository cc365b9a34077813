//! Where the images come from that k3s imports at its start, for guests without a registry.

use std::fmt;
use std::str::FromStr;

use camino::{Utf8Path, Utf8PathBuf};

use crate::download::{OnEvent, Options};
use crate::downloads::Lease;
use crate::k3s::{K3sError, K3sSource, host_release};
use crate::payload::GuestFile;
use crate::release::is_version;
use crate::scalar::{scalar, version_pattern};

/// Where k3s looks for images to import before it asks a registry (k3s documentation, "Air-Gap Install").
pub const GUEST_IMAGES_DIR: &str = "/var/lib/rancher/k3s/agent/images";

/// What a file in [`GUEST_IMAGES_DIR`] has to end in for k3s to import it (`tarfile.SupportedExtensions` of
/// rancher/wharfie, by which k3s unpacks them).
const SUFFIXES: [&str; 8] = [".tar", ".tar.lz4", ".tar.bz2", ".tbz", ".tar.gz", ".tgz", ".tar.zst", ".tzst"];

/// A source of the tarball of images that is laid into every guest.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub enum AirgapImages {
    /// No tarball: k3s pulls what it needs.
    #[default]
    None,
    /// The one published with the release of k3s that is under test: `release`.
    Release,
    /// The one published with another release: `release:v1.35.0+k3s1`.
    Version(String),
    /// A file on this host: `file:/path/to/images.tar.zst`. It keeps its name in the guest.
    File(Utf8PathBuf),
}

impl AirgapImages {
    /// Whether nothing is asked for.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::None
    }

    /// The release whose tarball is meant beside `k3s`, where one is.
    ///
    /// # Errors
    /// Where that of the release under test is asked for, and what is under test is no release.
    pub fn version<'a>(&'a self, k3s: &'a K3sSource) -> Result<Option<&'a str>, K3sError> {
        match (self, k3s) {
            (Self::None | Self::File(_), _) => Ok(None),
            (Self::Version(version), _) | (Self::Release, K3sSource::Release(version)) => Ok(Some(version)),
            (Self::Release, other) => Err(K3sError::AirgapNoRelease { k3s: other.to_string() }),
        }
    }

    /// Finds the tarball, or takes a release's from the cache below `cache`, fetching it into it first where it is not there;
    /// with what keeps it there.
    ///
    /// # Errors
    /// As [`AirgapImages::version`], and where it cannot be read, cannot be had or is not what was published.
    pub async fn resolve(
        &self,
        k3s: &K3sSource,
        cache: &Utf8Path,
        options: &Options,
        on_event: OnEvent<'_>,
    ) -> Result<Option<(GuestFile, Option<Lease>)>, K3sError> {
        if let Self::File(path) = self {
            return local(path).await.map(|file| Some((file, None)));
        }
        let Some(version) = self.version(k3s)? else { return Ok(None) };
        let release = host_release(version)?;
        let file = release.airgap_images(cache, options, on_event).await.map_err(|source| K3sError::Airgap {
            version: version.to_owned(),
            url: release.airgap_url(options),
            source: Box::new(source),
        })?;
        let lease = file.lease.clone();
        Ok(Some((GuestFile::from(file), Some(lease))))
    }
}

async fn local(path: &Utf8Path) -> Result<GuestFile, K3sError> {
    let owned = path.to_owned();
    let digest = tokio::task::spawn_blocking(move || crate::fs::sha256_file(&owned));
    let sha256 = digest
        .await
        .map_err(|_| K3sError::Interrupted)?
        .map_err(|source| K3sError::Read { path: path.to_owned(), source })?;
    let name = path.file_name().unwrap_or_default();
    Ok(GuestFile { path: path.to_owned(), sha256, guest_path: format!("{GUEST_IMAGES_DIR}/{name}"), mode: 0o644 })
}

impl FromStr for AirgapImages {
    type Err = K3sError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            None if text == "none" => Ok(Self::None),
            None if text == "release" => Ok(Self::Release),
            Some(("release", version)) if is_version(version) => Ok(Self::Version(version.to_owned())),
            Some(("release", version)) => Err(K3sError::Version { version: version.to_owned() }),
            Some(("file", path)) => {
                let path = Utf8PathBuf::from(path);
                let name = path.file_name().unwrap_or_default();
                if SUFFIXES.iter().any(|suffix| name.len() > suffix.len() && name.ends_with(suffix)) {
                    Ok(Self::File(path))
                } else {
                    Err(K3sError::AirgapName { name: name.to_owned(), suffixes: SUFFIXES.join(", ") })
                }
            }
            _ => Err(K3sError::AirgapSyntax { text: text.to_owned() }),
        }
    }
}

impl fmt::Display for AirgapImages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Release => f.write_str("release"),
            Self::Version(version) => write!(f, "release:{version}"),
            Self::File(path) => write!(f, "file:{path}"),
        }
    }
}

scalar!(
    AirgapImages,
    "The tarball of images laid into every guest for k3s to import: `release` (the one of the k3s release under test), \
     release:VERSION, file:/path/to/images.tar.zst or none.",
    concat!("^(none|release(:", version_pattern!(), ")?|file:.+\\.(tar|tbz|tgz|tzst|tar\\.(lz4|bz2|gz|zst)))$")
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_read_as_they_are_shown() {
        for text in ["none", "release", "release:v1.35.0+k3s1", "file:images.tar", "file:/x/images.tar.zst"] {
            assert_eq!(text.parse::<AirgapImages>().unwrap().to_string(), text);
        }
        for text in ["", "yes", "true", "releases", "images.tar.zst"] {
            assert!(matches!(text.parse::<AirgapImages>(), Err(K3sError::AirgapSyntax { .. })), "{text}");
        }
        for text in ["file:", "file:.tar", "file:/x/images.zip", "file:/x/images.tar.xz", "file:/x.tar/.."] {
            assert!(matches!(text.parse::<AirgapImages>(), Err(K3sError::AirgapName { .. })), "{text}");
        }
        assert!(matches!("release:1.35".parse::<AirgapImages>(), Err(K3sError::Version { .. })));
    }

    #[test]
    fn the_release_under_test_has_to_be_one() {
        let release = K3sSource::Release("v1.35.0+k3s1".to_owned());
        assert_eq!(AirgapImages::Release.version(&release).unwrap(), Some("v1.35.0+k3s1"));
        let other = AirgapImages::Version("v1.34.1+k3s1".to_owned());
        assert_eq!(other.version(&K3sSource::Standin).unwrap(), Some("v1.34.1+k3s1"));
        assert_eq!(AirgapImages::None.version(&K3sSource::Standin).unwrap(), None);
        let error = AirgapImages::Release.version(&K3sSource::Standin).unwrap_err();
        assert!(error.to_string().contains("standin is no release"), "{error}");
        assert!(error.hint().unwrap().contains("--airgap-images file:"), "{error:?}");
    }
}
