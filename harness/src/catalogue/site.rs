//! A site's own modes: a folder of YAML files beside the shipped ones, in the same form.

use std::fs;
use std::io;

use camino::{Utf8Path, Utf8PathBuf};
use images::yaml::{Segment, YamlError};
use verdict::{Catalogue, CatalogueError, Mode};

use super::Error;

/// Most files of a site's catalogue.
const FILES_MAX: usize = 256;
/// Longest id, bytes.
const ID_BYTES_MAX: usize = 64;

/// A file and the mode in it.
struct SiteFile {
    name: String,
    text: String,
    mode: Mode,
}

/// The shipped catalogue with the modes of a folder.
///
/// # Errors
/// [`Error`]; what is wrong with a file is shown with its line and column.
pub fn with_site(dir: &Utf8Path) -> Result<Catalogue, Error> {
    let files = read(dir)?;
    let shipped = super::modes()?;
    for file in &files {
        check_id(file, &shipped, &files)?;
    }
    let modes = shipped.into_iter().chain(files.iter().map(|file| file.mode.clone())).collect();
    Catalogue::from_modes(modes).map_err(|error| place(error, &files))
}

fn read(dir: &Utf8Path) -> Result<Vec<SiteFile>, Error> {
    let io = |source| Error::Io { path: dir.to_owned(), source };
    let mut paths: Vec<Utf8PathBuf> = Vec::new();
    for entry in dir.read_dir_utf8().map_err(io)? {
        let path = entry.map_err(io)?.into_path();
        if matches!(path.extension(), Some("yaml" | "yml")) {
            paths.push(path);
        }
        if paths.len() > FILES_MAX {
            return Err(io(io::Error::other(format!("more than {FILES_MAX} files"))));
        }
    }
    if paths.is_empty() {
        return Err(io(io::Error::other("no *.yaml file is in it")));
    }
    paths.sort();
    paths
        .into_iter()
        .map(|path| {
            let text = fs::read_to_string(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
            let name = path.into_string();
            let mode = images::yaml::parse(&text, &name).map_err(|error| Error::Yaml(Box::new(error)))?;
            Ok(SiteFile { name, text, mode })
        })
        .collect()
}

fn check_id(file: &SiteFile, shipped: &[Mode], files: &[SiteFile]) -> Result<(), Error> {
    let id = &file.mode.id;
    let wrong = |message: String| {
        let error = YamlError::at(&file.text, &file.name, &["id".into()], message);
        Err(Error::Yaml(Box::new(error.expected("an id of your own, such as `SITE-1`"))))
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if id.is_empty() || id.len() > ID_BYTES_MAX || !id.chars().all(plain) {
        return wrong(format!("{id:?} is no id: letters, digits, `-`, `_` and `.`, at most {ID_BYTES_MAX}"));
    }
    if shipped.iter().any(|mode| mode.id.eq_ignore_ascii_case(id)) {
        return wrong(format!("{id} is one of the harness's own modes"));
    }
    let first = files.iter().find(|other| other.mode.id.eq_ignore_ascii_case(id));
    match first.filter(|first| first.name != file.name) {
        Some(first) => wrong(format!("{id} is defined in {} too", first.name)),
        None => Ok(()),
    }
}

/// Gives an error of the catalogue its place in the site's file, where it is about one.
fn place(error: CatalogueError, files: &[SiteFile]) -> Error {
    match path_of(&error, files) {
        Some((file, path)) => Error::Yaml(Box::new(YamlError::at(&file.text, &file.name, &path, error.to_string()))),
        None => Error::Catalogue(error),
    }
}

fn path_of<'a>(error: &CatalogueError, files: &'a [SiteFile]) -> Option<(&'a SiteFile, Vec<Segment>)> {
    let file = |id: &str| files.iter().find(|file| file.mode.id == id);
    let sign = |file: &SiteFile, name: &str| file.mode.signs.iter().position(|sign| sign.name == name);
    Some(match error {
        CatalogueError::Pattern { mode, sign: name, what, .. } => {
            let file = file(mode)?;
            (file, vec!["signs".into(), sign(file, name)?.into(), (*what).into()])
        }
        CatalogueError::Sign { mode, sign: name, .. } => {
            let file = file(mode)?;
            (file, vec!["signs".into(), sign(file, name)?.into(), "name".into()])
        }
        CatalogueError::DuplicateSign { sign: name, second, .. } => {
            let file = file(second)?;
            let last = file.mode.signs.iter().rposition(|sign| sign.name == *name)?;
            (file, vec!["signs".into(), last.into(), "name".into()])
        }
        CatalogueError::Rule { mode, rule, .. } => {
            let file = file(mode)?;
            let index = file.mode.rules.iter().position(|one| one.name == *rule)?;
            (file, vec!["rules".into(), index.into(), "name".into()])
        }
        CatalogueError::UnknownMode { mode, field, .. } => (file(mode)?, vec![(*field).into()]),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "id: SITE-1\nname: the lab's switch\nsummary: The switch ate it.\nclass: configuration\nattribution: configuration\nsigns:\n  - name: switch-ate-it\n    meaning: fatal\n    says: the switch says so\n    anchors: [\"port err-disabled\"]\n    pattern: 'port err-disabled'\nrules:\n  - name: seen\n    all: [[switch-ate-it]]\n    confidence: high\n    because: the switch said so\n";

    fn load(files: &[(&str, &str)]) -> Result<Catalogue, String> {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        with_site(Utf8Path::from_path(dir.path()).unwrap())
            .map_err(|error| error.to_string().replace(dir.path().to_str().unwrap(), "DIR"))
    }

    #[test]
    fn a_site_adds_modes_to_the_shipped_ones() {
        let catalogue = load(&[("a.yaml", GOOD), ("notes.txt", "x")]).unwrap();
        assert!(catalogue.get("SITE-1").is_some() && catalogue.get("FM-7").is_some());
    }

    #[test]
    fn what_is_wrong_is_placed() {
        let cases = [
            (GOOD.replace("id: SITE-1", "id: FM-2"), "DIR/a.yaml:1:5: FM-2 is one of the harness's own modes"),
            (GOOD.replace("id: SITE-1", "id: fm-2"), "DIR/a.yaml:1:5: fm-2 is one"),
            (GOOD.replace("id: SITE-1", "id: 'a b'"), "DIR/a.yaml:1:5: \"a b\" is no id"),
            (GOOD.replace("class: configuration", "class: weather"), "DIR/a.yaml:4:8: "),
            (
                GOOD.replace("pattern: 'port", "pattern: '(port"),
                "DIR/a.yaml:11:14: sign \"switch-ate-it\" of SITE-1: pattern is not",
            ),
            (GOOD.replace("[\"port err-disabled\"]", "[abc]"), "DIR/a.yaml:7:11: sign"),
            (
                GOOD.replace("[[switch-ate-it]]", "[[nobody]]"),
                "DIR/a.yaml:13:11: rule \"seen\" of SITE-1: no sign is called",
            ),
            (GOOD.replace("switch-ate-it", "k3s-exit"), "DIR/a.yaml:7:11: sign \"k3s-exit\" is defined by SHARED"),
            (format!("{GOOD}explains: [FM-99]\n"), "DIR/a.yaml:17:11: mode SITE-1: explains names FM-99"),
        ];
        for (text, want) in cases {
            let got = load(&[("a.yaml", &text)]).unwrap_err();
            assert!(got.starts_with(want), "want {want}\ngot {got}");
        }
        let twice = load(&[("a.yaml", GOOD), ("b.yaml", &GOOD.replace("switch-ate-it", "other"))]).unwrap_err();
        assert!(twice.starts_with("DIR/b.yaml:1:5: SITE-1 is defined in DIR/a.yaml too"), "{twice}");
        assert!(load(&[]).unwrap_err().starts_with("reading the catalogue DIR"));
    }
}
