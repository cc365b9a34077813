//! Finding scenarios and profiles: a path, a file in `./scenarios`, or one that is part of the binary, in this order.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};

use camino::{Utf8Path, Utf8PathBuf};
use images::yaml::{self, MAX_DOCUMENT_BYTES, YamlError};
use serde::{Deserialize, Serialize};

use super::check::{self, Document};
use super::model::Scenario;
use super::profile::Profile;

/// The folder whose files win over what is shipped.
const FOLDER: &str = "scenarios";
/// The folder of profiles in it.
const PROFILES: &str = "profiles";
/// Most files looked at in one folder.
const MAX_FILES: usize = 1000;

macro_rules! shipped {
    ($($name:literal: $path:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../../scenarios/", $path)))),*]
    };
}

const SHIPPED_SCENARIOS: &[(&str, &str)] = shipped! {
    "smoke": "smoke.yaml",
    "simple": "simple.yaml",
    "vlans": "vlans.yaml",
    "bonding-vlans": "bonding-vlans.yaml",
    "bonding-vlans-3": "bonding-vlans-3.yaml",
    "dhcp-simple": "dhcp-simple.yaml",
    "simple-agent": "simple-agent.yaml",
    "vlans-broken": "vlans-broken.yaml",
};

const SHIPPED_PROFILES: &[(&str, &str)] = shipped! {
    "simple": "profiles/simple.yaml",
    "vlans": "profiles/vlans.yaml",
    "bonding-vlans": "profiles/bonding-vlans.yaml",
    "dhcp-simple": "profiles/dhcp-simple.yaml",
};

/// Where a scenario or profile came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// It is part of the binary.
    Shipped,
    /// A file.
    File(Utf8PathBuf),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shipped => f.write_str("shipped"),
            Self::File(path) => write!(f, "{path}"),
        }
    }
}

/// A scenario with its profile, both checked, alone and together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// The scenario.
    pub scenario: Scenario,
    /// Where it came from.
    pub scenario_source: Source,
    /// Its profile.
    pub profile: Profile,
    /// Where that came from.
    pub profile_source: Source,
}

/// Why there is no scenario to work with. All of these are the user's to mend.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// No scenario has this name.
    #[error("there is no scenario `{name}`{}", suggestion.as_ref().map(|s| format!(", did you mean `{s}`?")).unwrap_or_default())]
    Unknown {
        /// The name.
        name: String,
        /// What was probably meant.
        suggestion: Option<String>,
        /// All scenarios there are.
        known: Vec<String>,
    },
    /// A file could not be read.
    #[error("could not read {path}: {source}")]
    Read {
        /// The file.
        path: Utf8PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file is wrong.
    #[error("{0}")]
    Yaml(Box<YamlError>),
}

impl From<YamlError> for LoadError {
    fn from(error: YamlError) -> Self {
        Self::Yaml(Box::new(error))
    }
}

/// A line of a list of scenarios or profiles.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// Its description, or the first line of what is wrong with its file.
    pub description: String,
    /// Where it comes from.
    pub source: Source,
    /// Whether it can be used.
    pub valid: bool,
}

/// Reads and checks the scenario `name` and its profile.
///
/// `name` is a path where it has a `/` or ends in `.yaml` or `.yml`; otherwise it is looked for as
/// `BASE/scenarios/NAME.yaml`, then among the shipped ones. The profile is looked for beside a scenario's file, in
/// `profiles/`, then in `BASE/scenarios/profiles`, then among the shipped ones. `base` is the working folder.
///
/// # Errors
/// [`LoadError`]: not there, not readable, or wrong, with the place in the file.
pub fn load(name: &str, base: &Utf8Path) -> Result<Loaded, LoadError> {
    let folder = base.join(FOLDER);
    let (scenario_source, text) = find_scenario(name, &folder)?;
    let file = file_name(&scenario_source, name, "");
    let scenario_doc = Document { text: &text, file: &file };
    let scenario: Scenario = yaml::parse(&text, &file)?;
    check::scenario(&scenario, scenario_doc)?;

    let mut folders = Vec::new();
    if let Source::File(path) = &scenario_source {
        folders.push(path.parent().unwrap_or(Utf8Path::new("")).join(PROFILES));
    }
    folders.push(folder.join(PROFILES));
    let Some((profile_source, profile_text)) = find(&scenario.profile, &folders, SHIPPED_PROFILES)? else {
        let known: Vec<String> =
            folders.iter().flat_map(|folder| stems(folder)).chain(shipped_names(SHIPPED_PROFILES)).collect();
        let known = sorted(known);
        let known: Vec<&str> = known.iter().map(String::as_str).collect();
        let error = scenario_doc
            .at(&["profile".into()], format!("there is no profile `{}`", scenario.profile))
            .did_you_mean(&scenario.profile, known.iter().copied());
        return Err(error.expected(check::one_of(&known)).into());
    };
    let profile_file = file_name(&profile_source, &scenario.profile, "profiles/");
    let profile_doc = Document { text: &profile_text, file: &profile_file };
    let profile: Profile = yaml::parse(&profile_text, &profile_file)?;
    check::profile(&profile, profile_doc)?;
    if profile.name != scenario.profile {
        let message = format!("the file of profile `{}` names itself `{}`", scenario.profile, profile.name);
        return Err(profile_doc.at(&["name".into()], message).expected(format!("`{}`", scenario.profile)).into());
    }
    check::together(&scenario, scenario_doc, &profile, profile_doc)?;
    Ok(Loaded { scenario, scenario_source, profile, profile_source })
}

/// All scenarios that can be named in the working folder `base`, by name.
#[must_use]
pub fn list_scenarios(base: &Utf8Path) -> Vec<Listed> {
    list(&base.join(FOLDER), SHIPPED_SCENARIOS, |name, _, _| load(name, base).map(|loaded| loaded.scenario.description))
}

/// All profiles that can be named in the working folder `base`, by name.
#[must_use]
pub fn list_profiles(base: &Utf8Path) -> Vec<Listed> {
    list(&base.join(FOLDER).join(PROFILES), SHIPPED_PROFILES, |_, text, file| {
        let profile: Profile = yaml::parse(text, file)?;
        check::profile(&profile, Document { text, file })?;
        Ok(profile.description)
    })
}

fn list(
    folder: &Utf8Path,
    shipped: &[(&str, &str)],
    describe: impl Fn(&str, &str, &str) -> Result<String, LoadError>,
) -> Vec<Listed> {
    let mut found = BTreeMap::new();
    for name in sorted(stems(folder).into_iter().chain(shipped_names(shipped)).collect()) {
        let (source, described) = match find(&name, &[folder.to_owned()], shipped) {
            Ok(Some((source, text))) => {
                let file = file_name(&source, &name, "");
                let described = describe(&name, &text, &file);
                (source, described)
            }
            Ok(None) => continue,
            Err(error) => (Source::File(folder.join(format!("{name}.yaml"))), Err(error)),
        };
        let valid = described.is_ok();
        let description =
            described.unwrap_or_else(|error| error.to_string().lines().next().unwrap_or_default().to_owned());
        found.insert(name.clone(), Listed { name, description, source, valid });
    }
    found.into_values().collect()
}

fn find_scenario(name: &str, folder: &Utf8Path) -> Result<(Source, String), LoadError> {
    if name.contains('/') || name.ends_with(".yaml") || name.ends_with(".yml") {
        let path = Utf8PathBuf::from(name);
        let text = read(&path)?;
        return Ok((Source::File(path), text));
    }
    if let Some(found) = find(name, &[folder.to_owned()], SHIPPED_SCENARIOS)? {
        return Ok(found);
    }
    let known = sorted(stems(folder).into_iter().chain(shipped_names(SHIPPED_SCENARIOS)).collect());
    let suggestion = yaml::closest(name, known.iter().map(String::as_str));
    Err(LoadError::Unknown { name: name.to_owned(), suggestion, known })
}

fn find(name: &str, folders: &[Utf8PathBuf], shipped: &[(&str, &str)]) -> Result<Option<(Source, String)>, LoadError> {
    for folder in folders {
        let path = folder.join(format!("{name}.yaml"));
        match read(&path) {
            Ok(text) => return Ok(Some((Source::File(path), text))),
            Err(LoadError::Read { source, .. })
                if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
            Err(error) => return Err(error),
        }
    }
    let text = shipped.iter().find(|(known, _)| *known == name).map(|(_, text)| (*text).to_owned());
    Ok(text.map(|text| (Source::Shipped, text)))
}

/// Reads a file of bounded size; one byte more than is allowed is left for the parser to refuse.
fn read(path: &Utf8Path) -> Result<String, LoadError> {
    let wrap = |source| LoadError::Read { path: path.to_owned(), source };
    // Only plain files: opening a named pipe would wait for a writer.
    if !std::fs::metadata(path).map_err(wrap)?.is_file() {
        return Err(wrap(io::Error::new(io::ErrorKind::InvalidInput, "it is no plain file")));
    }
    let mut bytes = Vec::new();
    let limit = MAX_DOCUMENT_BYTES as u64 + 1;
    File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes)).map_err(wrap)?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        wrap(io::Error::new(io::ErrorKind::InvalidData, format!("byte {at} is not UTF-8")))
    })
}

fn file_name(source: &Source, name: &str, folder: &str) -> String {
    match source {
        Source::Shipped => format!("(shipped) {FOLDER}/{folder}{name}.yaml"),
        Source::File(path) => path.to_string(),
    }
}

fn shipped_names<'a>(shipped: &'a [(&'a str, &'a str)]) -> impl Iterator<Item = String> + 'a {
    shipped.iter().map(|(name, _)| (*name).to_owned())
}

fn stems(folder: &Utf8Path) -> Vec<String> {
    let Ok(entries) = folder.read_dir_utf8() else { return Vec::new() };
    entries
        .take(MAX_FILES)
        .filter_map(Result::ok)
        .filter_map(|entry| entry.file_name().strip_suffix(".yaml").map(str::to_owned))
        .collect()
}

fn sorted(mut names: Vec<String>) -> Vec<String> {
    names.sort();
    names.dedup();
    names
}
