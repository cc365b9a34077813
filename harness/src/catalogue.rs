//! The shipped catalogue of failure modes: data, embedded in the binary.

mod site;

use std::io;

use camino::Utf8PathBuf;
use verdict::{Catalogue, CatalogueError, Mode};

pub use site::with_site;

/// The files of `harness/catalogue/`.
const FILES: &[(&str, &str)] = &[
    ("fm-1.yaml", include_str!("../catalogue/fm-1.yaml")),
    ("fm-2.yaml", include_str!("../catalogue/fm-2.yaml")),
    ("fm-3.yaml", include_str!("../catalogue/fm-3.yaml")),
    ("fm-4.yaml", include_str!("../catalogue/fm-4.yaml")),
    ("fm-5.yaml", include_str!("../catalogue/fm-5.yaml")),
    ("fm-6.yaml", include_str!("../catalogue/fm-6.yaml")),
    ("fm-7.yaml", include_str!("../catalogue/fm-7.yaml")),
    ("config-mismatch.yaml", include_str!("../catalogue/config-mismatch.yaml")),
    ("datastore-corrupt.yaml", include_str!("../catalogue/datastore-corrupt.yaml")),
    ("disk-full.yaml", include_str!("../catalogue/disk-full.yaml")),
    ("duplicate-node.yaml", include_str!("../catalogue/duplicate-node.yaml")),
    ("etcd-half-made.yaml", include_str!("../catalogue/etcd-half-made.yaml")),
    ("etcd-membership.yaml", include_str!("../catalogue/etcd-membership.yaml")),
    ("exec-missing.yaml", include_str!("../catalogue/exec-missing.yaml")),
    ("firewall.yaml", include_str!("../catalogue/firewall.yaml")),
    ("guest-panic.yaml", include_str!("../catalogue/guest-panic.yaml")),
    ("hung-io.yaml", include_str!("../catalogue/hung-io.yaml")),
    ("name-resolution.yaml", include_str!("../catalogue/name-resolution.yaml")),
    ("net-vlan.yaml", include_str!("../catalogue/net-vlan.yaml")),
    ("no-lease.yaml", include_str!("../catalogue/no-lease.yaml")),
    ("not-ready-yet.yaml", include_str!("../catalogue/not-ready-yet.yaml")),
    ("oom-killed.yaml", include_str!("../catalogue/oom-killed.yaml")),
    ("port-in-use.yaml", include_str!("../catalogue/port-in-use.yaml")),
    ("qemu-failed.yaml", include_str!("../catalogue/qemu-failed.yaml")),
    ("seed-failed.yaml", include_str!("../catalogue/seed-failed.yaml")),
    ("shared.yaml", include_str!("../catalogue/shared.yaml")),
    ("slow-datastore.yaml", include_str!("../catalogue/slow-datastore.yaml")),
    ("tls-trust.yaml", include_str!("../catalogue/tls-trust.yaml")),
    ("token-rejected.yaml", include_str!("../catalogue/token-rejected.yaml")),
];

/// Why a catalogue cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file is not a mode.
    #[error("{0}")]
    Yaml(Box<images::yaml::YamlError>),
    /// A site's folder or file cannot be read.
    #[error("reading the catalogue {path}")]
    Io {
        /// The folder or file.
        path: Utf8PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The modes do not fit together.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
}

/// The shipped modes.
///
/// # Errors
/// [`Error`]; a test holds that there is none.
pub fn modes() -> Result<Vec<Mode>, Error> {
    FILES
        .iter()
        .map(|(file, text)| images::yaml::parse(text, file).map_err(|error| Error::Yaml(Box::new(error))))
        .collect()
}

/// The shipped catalogue, ready to classify by.
///
/// # Errors
/// [`Error`]; a test holds that there is none.
pub fn shipped() -> Result<Catalogue, Error> {
    Ok(Catalogue::from_modes(modes()?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_catalogue_is_whole() {
        let modes = modes().unwrap();
        for n in 1..=7 {
            assert!(modes.iter().any(|mode| mode.id == format!("FM-{n}")), "FM-{n} is missing");
        }
        shipped().unwrap();
    }

    #[test]
    fn every_file_is_embedded() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/catalogue");
        let mut there: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.ends_with(".yaml"))
            .collect();
        let mut embedded: Vec<&str> = FILES.iter().map(|(name, _)| *name).collect();
        there.sort();
        embedded.sort_unstable();
        assert_eq!(there, embedded);
    }
}
