//! What an image is made of: a YAML recipe, which may extend another.

use std::collections::{BTreeMap, BTreeSet};

use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use crate::payload::GuestBinary;
use crate::yaml::{self, Segment, YamlError};

/// Longest chain of `extends`.
const MAX_EXTENDS: usize = 8;

/// Size of the root disk where a recipe states none, in MiB. The raw base is sparse: it takes what is in it.
pub const DEFAULT_DISK_MIB: u32 = 8192;

/// Recipes that are part of the program.
const EMBEDDED: &[(&str, &str)] = &[("debian-k3s", include_str!("../recipes/debian-k3s.yaml"))];

/// A recipe with everything it extends merged in and every file's content loaded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Recipe {
    /// Its name.
    pub name: String,
    /// Debian suite, such as `bookworm`.
    pub suite: String,
    /// Packages, sorted, without repetitions.
    pub packages: BTreeSet<String>,
    /// Paths of packages that are left out of the image (dpkg's `path-exclude` patterns).
    pub exclude: BTreeSet<String>,
    /// Files laid over the tree, by path in the guest.
    pub files: BTreeMap<String, RecipeFile>,
    /// systemd units.
    pub units: Units,
    /// Binaries that whoever builds supplies: name to path in the guest.
    pub binaries: BTreeMap<String, String>,
    /// Size of the root disk in MiB.
    pub disk_mib: u32,
}

/// A file laid over the tree, owned by root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RecipeFile {
    /// Permission bits.
    pub mode: u32,
    /// Content.
    pub content: Vec<u8>,
}

/// Units to enable and to mask. No unit is in both: the recipe that extends has the last word.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Units {
    /// Units enabled by what their `[Install]` section says.
    pub enable: BTreeSet<String>,
    /// Units linked to `/dev/null`.
    pub mask: BTreeSet<String>,
}

/// Why a recipe cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// The YAML does not hold a recipe.
    #[error("{0}")]
    Yaml(#[from] YamlError),
    /// No recipe of that name.
    #[error(
        "there is no recipe {name:?}{}: shipped are {}",
        .searched.as_ref().map(|folder| format!(" in {folder}")).unwrap_or_default(),
        .shipped.join(", ")
    )]
    NotFound {
        /// The name asked for.
        name: String,
        /// The folder that was looked into.
        searched: Option<Utf8PathBuf>,
        /// The names that are part of the program.
        shipped: Vec<&'static str>,
    },
    /// A recipe extends itself, by whatever way round.
    #[error("recipes extend each other in a circle: {}", .chain.join(" -> "))]
    Cycle {
        /// The chain, its last being one of those before.
        chain: Vec<String>,
    },
    /// More recipes in a row than are followed.
    #[error("more than {MAX_EXTENDS} recipes extend one another: {}", .chain.join(" -> "))]
    TooDeep {
        /// The chain.
        chain: Vec<String>,
    },
    /// Neither the recipe nor one it extends says which suite.
    #[error("recipe {name} names no suite, and neither does one it extends")]
    NoSuite {
        /// The recipe.
        name: String,
    },
    /// A file beside the recipe, or the recipe itself, could not be read.
    #[error("could not read {path}: {source}")]
    Read {
        /// The file.
        path: Utf8PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A build was not given a binary the recipe asks for.
    #[error("recipe {recipe} asks for a guest binary {name:?} and none was given")]
    BinaryMissing {
        /// The recipe.
        recipe: String,
        /// The recipe's name for it.
        name: String,
    },
    /// A build was given a binary the recipe has no place for.
    #[error("recipe {recipe} has no place for a guest binary {name:?}")]
    BinaryUnknown {
        /// The recipe.
        recipe: String,
        /// The binary's name.
        name: String,
    },
}

/// JSON schema of a recipe as it is written.
pub fn schema(generator: schemars::SchemaGenerator) -> schemars::Schema {
    generator.into_root_schema_for::<Raw>()
}

/// Where recipes are looked up.
#[derive(Debug, Clone, Default)]
pub struct Recipes {
    folder: Option<Utf8PathBuf>,
}

impl Recipes {
    /// Recipes in `folder` (such as `images/recipes`), which win over those that are part of the program.
    pub fn new(folder: Option<Utf8PathBuf>) -> Self {
        Self { folder }
    }

    /// Loads a recipe with everything it extends. `name` with a slash or ending in `.yaml` is a path.
    ///
    /// # Errors
    /// Where it cannot be found or read, or does not hold a recipe.
    pub fn load(&self, name: &str) -> Result<Recipe, RecipeError> {
        let mut chain: Vec<String> = Vec::new();
        let mut layers: Vec<Layer> = Vec::new();
        let mut next = Some((name.to_owned(), None::<Utf8PathBuf>));
        while let Some((name, beside)) = next {
            let source = self.find(&name, beside.as_deref())?;
            let seen = chain.contains(&source.key);
            chain.push(source.key.clone());
            if seen {
                return Err(RecipeError::Cycle { chain });
            }
            if chain.len() > MAX_EXTENDS {
                return Err(RecipeError::TooDeep { chain });
            }
            let layer = Layer::read(&source)?;
            next = layer.raw.extends.clone().map(|parent| (parent, source.folder.clone()));
            layers.push(layer);
        }
        merge(layers)
    }

    /// Names of all recipes that can be loaded by name, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: BTreeSet<String> = EMBEDDED.iter().map(|(name, _)| (*name).to_owned()).collect();
        let entries = self.folder.iter().filter_map(|folder| folder.read_dir_utf8().ok()).flatten();
        for entry in entries.flatten() {
            let path = entry.path();
            if path.extension() == Some("yaml") {
                names.extend(path.file_stem().map(str::to_owned));
            }
        }
        names.into_iter().collect()
    }

    fn find(&self, name: &str, beside: Option<&Utf8Path>) -> Result<Source, RecipeError> {
        let read = |path: Utf8PathBuf| -> Result<Source, RecipeError> {
            match std::fs::read_to_string(&path) {
                Ok(text) => {
                    let folder = path.parent().map(Utf8Path::to_owned);
                    // The canonical path is the recipe's identity: a circle may go round through `..`.
                    let key = path.canonicalize_utf8().unwrap_or_else(|_| path.clone()).into_string();
                    Ok(Source { key, file: path.into_string(), text, folder })
                }
                Err(source) => Err(RecipeError::Read { path, source }),
            }
        };
        if name.contains('/') || name.ends_with(".yaml") {
            let path = match beside {
                Some(folder) => folder.join(name),
                None => Utf8PathBuf::from(name),
            };
            return read(path);
        }
        let folders = beside.into_iter().chain(self.folder.as_deref());
        for folder in folders {
            let path = folder.join(format!("{name}.yaml"));
            if path.is_file() {
                return read(path);
            }
        }
        match EMBEDDED.iter().find(|(embedded, _)| *embedded == name) {
            Some((embedded, text)) => Ok(Source {
                key: format!("<shipped>/{embedded}.yaml"),
                file: format!("<shipped>/{embedded}.yaml"),
                text: (*text).to_owned(),
                folder: None,
            }),
            None => Err(RecipeError::NotFound {
                name: name.to_owned(),
                searched: self.folder.clone(),
                shipped: EMBEDDED.iter().map(|(name, _)| *name).collect(),
            }),
        }
    }
}

impl Recipe {
    /// Pairs the binaries given with the recipe's places for them.
    pub(crate) fn place<'a>(&self, binaries: &'a [GuestBinary]) -> Result<Vec<(String, &'a GuestBinary)>, RecipeError> {
        if let Some(extra) = binaries.iter().find(|binary| !self.binaries.contains_key(&binary.name)) {
            return Err(RecipeError::BinaryUnknown { recipe: self.name.clone(), name: extra.name.clone() });
        }
        self.binaries
            .iter()
            .map(|(name, path)| {
                let given = binaries.iter().find(|binary| binary.name == *name);
                given
                    .map(|binary| (path.clone(), binary))
                    .ok_or_else(|| RecipeError::BinaryMissing { recipe: self.name.clone(), name: name.clone() })
            })
            .collect()
    }
}

struct Source {
    key: String,
    file: String,
    text: String,
    folder: Option<Utf8PathBuf>,
}

/// What an image is made of.
#[derive(Debug, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "Recipe", rename = "Recipe")]
struct Raw {
    /// Its name, also the name of its file.
    name: String,
    /// A recipe this one adds to: a name, or a path beside it.
    extends: Option<String>,
    /// Debian suite, such as `bookworm`; the extended recipe's where absent.
    suite: Option<String>,
    /// Size of the root disk in MiB.
    #[schemars(range(min = 1024, max = 262_144))]
    disk_mib: Option<u32>,
    /// Debian packages.
    #[serde(default)]
    packages: Vec<String>,
    /// Paths of packages to leave out (dpkg's `path-exclude` patterns).
    #[serde(default)]
    exclude: Vec<String>,
    /// Files laid over the tree, owned by root.
    #[serde(default)]
    files: Vec<RawFile>,
    /// systemd units.
    #[serde(default)]
    units: RawUnits,
    /// Binaries that whoever builds supplies: name to path in the guest.
    #[serde(default)]
    binaries: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "RecipeFile")]
struct RawFile {
    /// Path in the guest.
    path: String,
    /// Permission bits, octal, in quotes: `"0644"`.
    mode: Option<String>,
    /// Its content; or else `source`.
    content: Option<String>,
    /// A file beside the recipe with its content.
    source: Option<String>,
}

#[derive(Debug, Default, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Units")]
struct RawUnits {
    /// Units to enable.
    #[serde(default)]
    enable: Vec<String>,
    /// Units to mask.
    #[serde(default)]
    mask: Vec<String>,
}

/// One recipe of a chain, checked on its own.
struct Layer {
    raw: Raw,
    files: Vec<(String, RecipeFile)>,
}

impl Layer {
    fn read(source: &Source) -> Result<Self, RecipeError> {
        let raw: Raw = yaml::parse(&source.text, &source.file)?;
        let at = |path: &[Segment], message: String| YamlError::at(&source.text, &source.file, path, message);

        check_token(&raw.name, |c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
            .map_err(|reason| at(&["name".into()], format!("recipe name {:?} {reason}", raw.name)))?;
        if let Some(suite) = &raw.suite {
            check_token(suite, |c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))
                .map_err(|reason| at(&["suite".into()], format!("suite {suite:?} {reason}")))?;
        }
        if let Some(mib) = raw.disk_mib.filter(|mib| !(1024..=262_144).contains(mib)) {
            return Err(at(&["disk_mib".into()], format!("a root disk of {mib} MiB"))
                .expected("1024 to 262144 (MiB)")
                .into());
        }
        for (index, package) in raw.packages.iter().enumerate() {
            // Debian Policy 5.6.7, and `:arch`; nothing that mmdebstrap would take for another kind of argument.
            check_token(package, |c| {
                c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '+' | '-' | '.' | ':')
            })
            .map_err(|reason| at(&["packages".into(), index.into()], format!("package {package:?} {reason}")))?;
        }
        for (index, pattern) in raw.exclude.iter().enumerate() {
            if !pattern.starts_with('/') || pattern.contains(['\n', '"', ';']) {
                return Err(at(&["exclude".into(), index.into()], format!("{pattern:?} is no path pattern"))
                    .expected("an absolute path with shell wildcards, such as /usr/share/man/*")
                    .into());
            }
        }
        for (list, units) in [("enable", &raw.units.enable), ("mask", &raw.units.mask)] {
            for (index, unit) in units.iter().enumerate() {
                check_unit(unit).map_err(|reason| {
                    at(&["units".into(), list.into(), index.into()], format!("unit {unit:?} {reason}"))
                        .expected("a unit with its suffix, such as ssh.service")
                })?;
            }
        }
        if let Some((index, unit)) = raw.units.enable.iter().enumerate().find(|(_, unit)| raw.units.mask.contains(unit))
        {
            let path = ["units".into(), "enable".into(), index.into()];
            return Err(at(&path, format!("unit {unit} is to be enabled and masked")).into());
        }
        for (name, path) in &raw.binaries {
            check_guest_path(path)
                .map_err(|reason| at(&["binaries".into(), name.as_str().into()], format!("path {path:?} {reason}")))?;
        }

        let mut files = Vec::with_capacity(raw.files.len());
        let mut seen = BTreeSet::new();
        for (index, file) in raw.files.iter().enumerate() {
            let here = |field: &str| -> Vec<Segment> { vec!["files".into(), index.into(), field.into()] };
            check_guest_path(&file.path)
                .map_err(|reason| at(&here("path"), format!("path {:?} {reason}", file.path)))?;
            if !seen.insert(file.path.as_str()) {
                return Err(at(&here("path"), format!("file {} is there twice", file.path)).into());
            }
            let mode = match &file.mode {
                None => 0o644,
                Some(text) => u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o7777).ok_or_else(|| {
                    at(&here("mode"), format!("{text:?} is no file mode")).expected("octal digits in quotes: \"0644\"")
                })?,
            };
            let content = match (&file.content, &file.source) {
                (Some(content), None) => content.clone().into_bytes(),
                (None, Some(beside)) => {
                    let Some(folder) = &source.folder else {
                        return Err(
                            at(&here("source"), "a shipped recipe has no folder to read from".to_owned()).into()
                        );
                    };
                    let path = folder.join(beside);
                    std::fs::read(&path).map_err(|source| RecipeError::Read { path, source })?
                }
                _ => {
                    return Err(at(
                        &here("path"),
                        format!("file {} has both or neither of content and source", file.path),
                    )
                    .expected("exactly one of `content` (inline) and `source` (a file beside the recipe)")
                    .into());
                }
            };
            files.push((file.path.clone(), RecipeFile { mode, content }));
        }
        Ok(Self { raw, files })
    }
}

/// Merges a chain, its first being the recipe asked for and its last the one that extends none.
fn merge(layers: Vec<Layer>) -> Result<Recipe, RecipeError> {
    let name = layers.first().map(|layer| layer.raw.name.clone()).unwrap_or_default();
    let mut recipe = Recipe {
        name: name.clone(),
        suite: String::new(),
        packages: BTreeSet::new(),
        exclude: BTreeSet::new(),
        files: BTreeMap::new(),
        units: Units::default(),
        binaries: BTreeMap::new(),
        disk_mib: DEFAULT_DISK_MIB,
    };
    for layer in layers.into_iter().rev() {
        recipe.suite = layer.raw.suite.unwrap_or(recipe.suite);
        recipe.disk_mib = layer.raw.disk_mib.unwrap_or(recipe.disk_mib);
        recipe.packages.extend(layer.raw.packages);
        recipe.exclude.extend(layer.raw.exclude);
        recipe.files.extend(layer.files);
        recipe.binaries.extend(layer.raw.binaries);
        for unit in layer.raw.units.enable {
            recipe.units.mask.remove(&unit);
            recipe.units.enable.insert(unit);
        }
        for unit in layer.raw.units.mask {
            recipe.units.enable.remove(&unit);
            recipe.units.mask.insert(unit);
        }
    }
    if recipe.suite.is_empty() {
        return Err(RecipeError::NoSuite { name });
    }
    Ok(recipe)
}

fn check_token(text: &str, allowed: impl Fn(char) -> bool) -> Result<(), &'static str> {
    if text.is_empty() {
        Err("is empty")
    } else if text.len() > 128 {
        Err("is longer than 128 characters")
    } else if !text.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        Err("does not begin with a letter or a digit")
    } else if !text.chars().all(allowed) {
        Err("holds a character that is not allowed there")
    } else {
        Ok(())
    }
}

fn check_unit(unit: &str) -> Result<(), &'static str> {
    const SUFFIXES: &[&str] =
        &["service", "socket", "target", "timer", "mount", "automount", "path", "slice", "swap", "device"];
    let Some((stem, suffix)) = unit.rsplit_once('.') else { return Err("has no suffix") };
    if stem.is_empty() || !SUFFIXES.contains(&suffix) {
        return Err("has no suffix of a systemd unit");
    }
    // systemd.unit(5): names of units.
    if unit.len() > 255 || !unit.chars().all(|c| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c)) {
        return Err("is no name of a systemd unit");
    }
    Ok(())
}

fn check_guest_path(path: &str) -> Result<(), &'static str> {
    if !path.starts_with('/') || path.ends_with('/') {
        Err("is not the absolute path of a file")
    } else if path.split('/').skip(1).any(|part| matches!(part, "" | "." | "..")) {
        Err("has an empty, '.' or '..' component")
    } else if path.chars().any(char::is_control) {
        Err("holds a control character")
    } else {
        Ok(())
    }
}

#[cfg(test)]
#[path = "recipe_tests.rs"]
mod tests;
