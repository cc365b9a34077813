//! What whoever builds supplies to an image, besides its recipe.

use camino::Utf8PathBuf;

/// A binary supplied to a build for one of the recipe's `binaries`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestBinary {
    /// The recipe's name for it, such as `k3s`.
    pub name: String,
    /// The file on this host.
    pub path: Utf8PathBuf,
    /// SHA-256 of its content, hexadecimal.
    pub sha256: String,
    /// What every output calls it.
    pub label: String,
    /// Debian packages it needs besides the recipe's.
    pub extra_packages: Vec<String>,
    /// Files that are laid into the image with it.
    pub files: Vec<GuestFile>,
}

/// A file of this host that is laid into an image, owned by root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestFile {
    /// The file on this host.
    pub path: Utf8PathBuf,
    /// SHA-256 of its content, hexadecimal.
    pub sha256: String,
    /// Its absolute path in the guest.
    pub guest_path: String,
    /// Permission bits.
    pub mode: u32,
}
