//! The shipped catalogue, for the tests.

use std::path::Path;

use verdict::{Catalogue, Mode};

/// Reads `harness/catalogue/*.yaml`.
#[expect(clippy::unwrap_used, reason = "a test that cannot go on says so")]
pub(crate) fn catalogue() -> Catalogue {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../catalogue");
    let mut files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "yaml"));
    files.sort();
    let modes: Vec<Mode> = files
        .iter()
        .map(|file| {
            let text = std::fs::read_to_string(file).unwrap();
            images::yaml::parse(&text, &file.display().to_string()).unwrap_or_else(|e| panic!("{e}"))
        })
        .collect();
    Catalogue::from_modes(modes).unwrap_or_else(|e| panic!("{e}"))
}
