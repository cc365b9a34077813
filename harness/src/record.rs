//! The run folder: `$XDG_STATE_HOME/harness/runs/ID`, mode 0700.
//!
//! `run.json` is written before anything is started; a failure to record later on warns and never
//! changes a verdict.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};

use camino::{Utf8Path, Utf8PathBuf};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::printable::printable_json;

/// Why the records of a run could not be kept.
#[derive(Debug, Error)]
pub enum RecordError {
    /// A folder or file could not be made or written.
    #[error("{action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: Utf8PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No folder is known to keep something in.
    #[error("no folder for {what}: neither {flag} nor {variable} nor HOME is set")]
    NoHome {
        /// What it is for.
        what: &'static str,
        /// The flag that names one.
        flag: &'static str,
        /// The variable that names one.
        variable: &'static str,
    },
}

/// `run.json`: what a run was asked to do, known before it does anything.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunHeader {
    /// Version of this document's form.
    pub schema_version: u32,
    /// The run's id.
    pub run: String,
    /// The lab's id: prefix of every name the run gives to a process, socket or file.
    pub lab: String,
    /// The scenario.
    pub scenario: String,
    /// Which k3s is under test, in words.
    pub k3s: String,
    /// When the run began.
    pub started: Timestamp,
    /// The command line.
    pub command: Vec<String>,
    /// Version of the harness.
    pub harness_version: String,
    /// Process id of the harness.
    pub pid: u32,
}

/// The folder of one run.
#[derive(Debug, Clone)]
pub struct RunDir {
    path: Utf8PathBuf,
}

impl RunDir {
    /// Makes the folder and writes `run.json` into it.
    ///
    /// # Errors
    /// [`RecordError::Io`] where the state folder cannot be written.
    pub fn create(state: &Utf8Path, header: &RunHeader) -> Result<Self, RecordError> {
        let runs = state.join("runs");
        make_private_dir(&runs)?;
        let path = runs.join(&header.run);
        fs::DirBuilder::new().mode(0o700).create(&path).map_err(|source| RecordError::Io {
            action: "making the run folder",
            path: path.clone(),
            source,
        })?;
        let run = Self { path };
        run.write_json("run.json", header)?;
        Ok(run)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Utf8Path {
        &self.path
    }

    /// The folder of one node's records, made on first use.
    ///
    /// # Errors
    /// [`RecordError::Io`].
    pub fn node(&self, node: &str) -> Result<Utf8PathBuf, RecordError> {
        let dir = self.path.join("nodes").join(node);
        make_private_dir(&dir)?;
        Ok(dir)
    }

    /// Writes a JSON document in one step: a reader sees the old one, the new one or none.
    ///
    /// # Errors
    /// [`RecordError::Io`].
    pub fn write_json<T: Serialize>(&self, name: &str, value: &T) -> Result<(), RecordError> {
        let mut text = serde_json::to_string_pretty(value).map_err(|error| RecordError::Io {
            action: "encoding",
            path: self.path.join(name),
            source: io::Error::other(error),
        })?;
        text.push('\n');
        self.write(name, printable_json(&text).as_bytes())
    }

    /// As [`RunDir::write_json`], unless the document is there already.
    ///
    /// # Errors
    /// [`RecordError::Io`].
    pub fn write_json_once<T: Serialize>(&self, name: &str, value: &T) -> Result<(), RecordError> {
        if self.path.join(name).exists() { Ok(()) } else { self.write_json(name, value) }
    }

    /// Adds a line to a node's log.
    ///
    /// # Errors
    /// [`RecordError::Io`], also where there is no such log.
    pub fn append_line(&self, name: &str, line: &str) -> Result<(), RecordError> {
        let path = self.path.join(name);
        let opened = fs::OpenOptions::new().append(true).open(&path);
        opened.and_then(|mut file| writeln!(file, "{line}")).map_err(|source| RecordError::Io {
            action: "adding to",
            path,
            source,
        })
    }

    /// Writes a file in one step.
    ///
    /// # Errors
    /// [`RecordError::Io`].
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), RecordError> {
        let path = self.path.join(name);
        let staged = self.path.join(format!(".{}.part", name.replace('/', "_")));
        let io = |action| {
            let path = path.clone();
            move |source| RecordError::Io { action, path, source }
        };
        let mut file = private_file(&staged).map_err(io("writing"))?;
        let written = file.write_all(bytes).and_then(|()| fs::rename(&staged, &path));
        if written.is_err() {
            let _ = fs::remove_file(&staged);
        }
        written.map_err(io("writing"))
    }
}

/// A new file only its owner can read.
///
/// # Errors
/// What the system says.
pub fn private_file(path: &Utf8Path) -> io::Result<fs::File> {
    fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path)
}

/// Makes a folder and its parents, readable by the owner only.
///
/// # Errors
/// [`RecordError::Io`].
pub fn make_private_dir(path: &Utf8Path) -> Result<(), RecordError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|source| RecordError::Io {
        action: "making the folder",
        path: path.to_owned(),
        source,
    })
}

/// Folders the harness keeps things in.
#[derive(Debug, Clone)]
pub struct Folders {
    /// Records of runs and live labs: `$XDG_STATE_HOME/harness`.
    pub state: Utf8PathBuf,
    /// Images and downloads: `$XDG_CACHE_HOME/harness`.
    pub cache: Utf8PathBuf,
    /// Sockets; short, as a socket's path has at most 107 bytes: `$XDG_RUNTIME_DIR/harness` or `/tmp/harness-UID`.
    pub runtime: Utf8PathBuf,
}

impl Folders {
    /// The folders by the XDG base directory rules, each overridden by what is given.
    ///
    /// # Errors
    /// [`RecordError::NoHome`].
    pub fn find(state: Option<Utf8PathBuf>, cache: Option<Utf8PathBuf>) -> Result<Self, RecordError> {
        let absolute = |name: &str| -> Option<Utf8PathBuf> {
            let path = Utf8PathBuf::from(std::env::var(name).ok()?);
            path.is_absolute().then_some(path)
        };
        let home = absolute("HOME");
        let pick = |given: Option<Utf8PathBuf>, xdg: &'static str, below_home: &str, what, flag| {
            given
                .or_else(|| absolute(xdg).map(|base| base.join("harness")))
                .or_else(|| home.as_ref().map(|home| home.join(below_home).join("harness")))
                .ok_or(RecordError::NoHome { what, flag, variable: xdg })
        };
        let state = pick(state, "XDG_STATE_HOME", ".local/state", "the records", "--state-dir")?;
        let cache = pick(cache, "XDG_CACHE_HOME", ".cache", "images and downloads", "--cache-dir")?;
        let runtime = absolute("XDG_RUNTIME_DIR").filter(|dir| dir.as_str().len() <= 40 && dir.is_dir()).map_or_else(
            || Utf8PathBuf::from(format!("/tmp/harness-{}", nix::unistd::getuid())),
            |dir| dir.join("harness"),
        );
        Ok(Self { state: absolute_path(state), cache: absolute_path(cache), runtime })
    }
}

fn absolute_path(path: Utf8PathBuf) -> Utf8PathBuf {
    camino::absolute_utf8(&path).unwrap_or(path)
}

/// A run folder for the tests of what writes into one.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    pub(crate) fn header() -> RunHeader {
        RunHeader {
            schema_version: 1,
            run: "20260101T000000Z-smoke-abc".to_owned(),
            lab: "abc".to_owned(),
            scenario: "smoke".to_owned(),
            k3s: "release v1".to_owned(),
            started: Timestamp::UNIX_EPOCH,
            command: vec!["harness".to_owned()],
            harness_version: "0".to_owned(),
            pid: 1,
        }
    }

    pub(crate) fn run_dir(state: &tempfile::TempDir) -> RunDir {
        RunDir::create(Utf8Path::from_path(state.path()).unwrap(), &header()).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::testing::header;
    use super::*;

    #[test]
    fn a_run_folder_is_private_and_holds_its_header_at_once() {
        let state = tempfile::tempdir().unwrap();
        let state = Utf8Path::from_path(state.path()).unwrap();
        let run = RunDir::create(state, &header()).unwrap();
        assert_eq!(fs::metadata(run.path()).unwrap().permissions().mode() & 0o777, 0o700);
        let text = fs::read_to_string(run.path().join("run.json")).unwrap();
        let back: RunHeader = serde_json::from_str(&text).unwrap();
        assert_eq!(back.lab, "abc");
    }

    #[test]
    fn two_runs_never_share_a_folder() {
        let state = tempfile::tempdir().unwrap();
        let state = Utf8Path::from_path(state.path()).unwrap();
        RunDir::create(state, &header()).unwrap();
        let again = RunDir::create(state, &header()).unwrap_err();
        assert!(again.to_string().starts_with("making the run folder"), "{again}");
    }

    #[test]
    fn a_failed_write_leaves_no_part_behind() {
        let state = tempfile::tempdir().unwrap();
        let state = Utf8Path::from_path(state.path()).unwrap();
        let run = RunDir::create(state, &header()).unwrap();
        fs::create_dir(run.path().join("plan.json")).unwrap();
        fs::write(run.path().join("plan.json/x"), "").unwrap();
        assert!(run.write("plan.json", b"{}").is_err());
        let left: Vec<_> = fs::read_dir(run.path()).unwrap().filter_map(Result::ok).map(|e| e.file_name()).collect();
        assert!(!left.iter().any(|name| name.to_string_lossy().ends_with(".part")), "{left:?}");
    }
}
