//! Logs from elsewhere, of any form, shown to the classifier of a run: `harness diagnose`.
//!
//! Memory is constant whatever the input: streams go through one buffer, archives are listed within a bound and read in
//! place, and what comes out of compressed files is limited in ratio and amount ([`Limits`]).
//!
//! zstd is read by the `zstd` crate (bindings to the reference library: the fastest, fuzzed by its authors for years, and
//! a C compiler is needed for `ring` anyway), gzip by `flate2`, which `images` uses as well.

mod archive;
mod ci;
mod detect;
mod limits;
mod run_folder;
mod tree;

use std::cell::Cell;
use std::collections::HashMap;
use std::collections::hash_map::{DefaultHasher, Entry};
use std::fs::{self, File};
use std::hash::{Hash as _, Hasher as _};
use std::io::{self, BufReader, Cursor, Read};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _};
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

use verdict::{Catalogue, Classifier, Context, SourceKind, Verdict};

pub use limits::Limits;

use detect::{Form, HEAD_BYTES};
use limits::{Bound, Tap};
use tree::{Folder, Source, Tree, shown};

/// Archives within archives that are opened: a CI job's artifacts, and an archive among them.
const ARCHIVES_MAX: u8 = 2;
/// Compressions around one file that are taken off.
const COMPRESSIONS_MAX: u8 = 2;
/// Most notes kept.
const NOTES_MAX: usize = 100;
/// Buffer in front of a decoder or a log, bytes.
const BUFFER_BYTES: usize = 64 << 10;

/// What to diagnose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A file, a folder, or a pipe with a name.
    Path(PathBuf),
    /// Standard input.
    Stdin,
}

/// A log that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogRead {
    /// Its name, below the input it was found in.
    pub name: String,
    /// Node told by the name; the lines may tell another.
    pub node: Option<String>,
    /// Program told by the name; [`SourceKind::Unknown`] where each line has to tell.
    pub source: SourceKind,
    /// Its size, decompressed, bytes.
    pub bytes: u64,
    /// Its lines.
    pub lines: u64,
}

/// A verdict and what it was reached on.
#[derive(Debug, Clone, PartialEq)]
pub struct Diagnosis {
    /// The verdict.
    pub verdict: Verdict,
    /// The logs that were read, in that order.
    pub logs: Vec<LogRead>,
    /// What was left out, and why.
    pub notes: Vec<String>,
}

/// Why there is no verdict.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something that was named cannot be opened.
    #[error("opening {}", path.display())]
    Open {
        /// What was named.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Nothing that was named is a log with something in it.
    #[error("{why}")]
    NothingRead {
        /// Why not.
        why: String,
    },
}

/// Reads everything that is named and concludes.
///
/// # Errors
///
/// [`Error::Open`] before anything is read, [`Error::NothingRead`] where no log was found.
pub fn diagnose(inputs: &[Input], catalogue: &Catalogue, limits: &Limits) -> Result<Diagnosis, Error> {
    let opened = inputs.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    let mut session = Session::new(catalogue, limits);
    for input in opened {
        match input {
            Opened::Stdin => {
                session.member("standard input", Source::Stream(&mut io::stdin().lock()), Nesting::default())
            }
            Opened::File(name, file) => session.member(&name, Source::File(file), Nesting::default()),
            Opened::Pipe(name, mut file) => session.member(&name, Source::Stream(&mut file), Nesting::default()),
            Opened::Folder(name, path) => {
                let mut notes = Vec::new();
                let listed = Folder::list(&path, limits, &mut notes);
                session.notes(notes);
                let mut folder = listed.map_err(|source| Error::Open { path, source })?;
                session.tree(&name, &mut folder, Nesting::default());
            }
        }
    }
    session.conclude()
}

/// Reads one log of unknown form that is held in memory: what the fuzz target drives.
///
/// # Errors
///
/// [`Error::NothingRead`] where it is no log.
pub fn diagnose_bytes(name: &str, bytes: &[u8], catalogue: &Catalogue, limits: &Limits) -> Result<Diagnosis, Error> {
    let mut session = Session::new(catalogue, limits);
    session.member(name, Source::Stream(&mut &*bytes), Nesting::default());
    session.conclude()
}

enum Opened {
    Stdin,
    File(String, File),
    Pipe(String, File),
    Folder(String, PathBuf),
}

fn open(input: &Input) -> Result<Opened, Error> {
    let Input::Path(path) = input else { return Ok(Opened::Stdin) };
    let failed = |source| Error::Open { path: path.clone(), source };
    let kind = fs::metadata(path).map_err(failed)?.file_type();
    if kind.is_dir() {
        let whole = fs::canonicalize(path).map_err(failed)?;
        let name = whole.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        return Ok(Opened::Folder(shown(&name), path.clone()));
    }
    if !kind.is_file() && !kind.is_fifo() {
        return Err(failed(io::Error::other("neither a file nor a folder nor a pipe")));
    }
    let name = file_name(path);
    let file = File::open(path).map_err(failed)?;
    Ok(if kind.is_file() { Opened::File(name, file) } else { Opened::Pipe(name, file) })
}

/// A file's name with as much of its path as may tell a node: folders far above it are somebody else's.
fn file_name(path: &Path) -> String {
    let parts: Vec<_> = path
        .components()
        .filter_map(|part| if let Component::Normal(part) = part { Some(part.to_string_lossy()) } else { None })
        .collect();
    shown(&parts[parts.len().saturating_sub(3)..].join("/"))
}

/// How far inside archives and compressions a log is.
#[derive(Debug, Clone, Copy, Default)]
struct Nesting {
    archives: u8,
    compressions: u8,
}

struct Session {
    classifier: Classifier,
    limits: Limits,
    budget: Rc<Cell<u64>>,
    logs: Vec<LogRead>,
    notes: Vec<String>,
    notes_more: u64,
    empty: u64,
    runs: Vec<run_folder::Run>,
    /// Size and beginning of the larger files read so far, as a hash, with their names.
    seen: HashMap<u64, String>,
}

impl Session {
    fn new(catalogue: &Catalogue, limits: &Limits) -> Self {
        Self {
            classifier: Classifier::new(catalogue),
            limits: *limits,
            budget: Rc::new(Cell::new(limits.expanded_bytes_max)),
            logs: Vec::new(),
            notes: Vec::new(),
            notes_more: 0,
            empty: 0,
            runs: Vec::new(),
            seen: HashMap::new(),
        }
    }

    fn note(&mut self, note: String) {
        if self.notes.len() < NOTES_MAX {
            self.notes.push(note);
        } else {
            self.notes_more += 1;
        }
    }

    fn notes(&mut self, notes: Vec<String>) {
        for note in notes {
            self.note(note);
        }
    }

    /// Reads a folder or an archive.
    fn tree(&mut self, name: &str, tree: &mut dyn Tree, nesting: Nesting) {
        let runs = run_folder::find(tree);
        let failed = runs.iter().any(|run| !run.passed());
        for line in runs.iter().filter(|run| !failed || !run.passed()).flat_map(run_folder::Run::clocks_off) {
            let _ = self.classifier.observe(&line);
        }
        let passed = runs.iter().filter(|run| run.passed()).count();
        if failed && passed > 0 {
            self.note(format!("{name}: {passed} of {} runs passed and were not read", runs.len()));
        }
        let members = tree.members().to_vec();
        let steps = ci::steps_told_twice(&members);
        if !steps.is_empty() {
            self.note(format!("{name}: the logs of single steps were not read, the jobs' logs have them too"));
        }
        let filled =
            |path: &str| members.binary_search_by(|m| m.path.as_str().cmp(path)).is_ok_and(|n| members[n].bytes > 0);
        for member in &members {
            let of_passed = runs.iter().any(|run| failed && run.passed() && member.path.starts_with(&run.root));
            if of_passed
                || steps.contains(&member.key)
                || !runs.iter().all(|run| run.is_evidence(&member.path, &filled))
            {
                continue;
            }
            let label = format!("{name}/{}", member.path);
            if self.logs.len() >= self.limits.files_max {
                self.note(format!("{label}: {} files were read; the rest was not", self.limits.files_max));
                break;
            }
            self.classifier.booted_at(runs.iter().find_map(|run| run.booted_at(&member.path)));
            let opened = tree.open(member, &mut |source| self.member(&label, source, nesting));
            self.classifier.booted_at(None);
            if let Err(error) = opened {
                self.note(format!("{label}: not read: {error}"));
            }
        }
        self.runs.extend(runs);
    }

    /// Reads a file of whatever form.
    fn member(&mut self, name: &str, source: Source<'_>, nesting: Nesting) {
        match source {
            Source::File(file) => {
                let head = match head_of_file(&file) {
                    Ok(head) => head,
                    Err(error) => return self.note(format!("{name}: not read: {error}")),
                };
                if let Some(first) = self.seen_before(name, &file, &head) {
                    return self.note(format!("{name}: the same as {first}; read once"));
                }
                let form = detect::form(&head);
                match form {
                    // An archive in a file of its own is read where it is.
                    Form::Zip | Form::Tar if nesting.archives < ARCHIVES_MAX => self.archive(name, form, file, nesting),
                    _ => self.stream(name, form, &mut { file }, nesting),
                }
            }
            Source::Stream(stream) => self.unknown(name, &mut Tap::new(stream), nesting),
            Source::Packed(stream, compressed) => {
                let bound = self.bound(Rc::new(Cell::new(compressed)));
                self.unknown(name, &mut Tap::bounded(stream, bound), nesting);
            }
        }
    }

    /// The file that is the same as this one, where one was read. What is seen twice would count twice. Small files are
    /// left alone: two nodes may well say the same few lines.
    fn seen_before(&mut self, name: &str, file: &File, head: &[u8]) -> Option<String> {
        let bytes = file.metadata().map_or(0, |metadata| metadata.len());
        if bytes <= HEAD_BYTES as u64 || self.seen.len() >= self.limits.files_max {
            return None;
        }
        let mut hasher = DefaultHasher::new();
        (bytes, head).hash(&mut hasher);
        match self.seen.entry(hasher.finish()) {
            Entry::Occupied(first) => Some(first.get().clone()),
            Entry::Vacant(free) => {
                free.insert(name.to_owned());
                None
            }
        }
    }

    fn bound(&self, compressed: Rc<Cell<u64>>) -> Bound {
        Bound { compressed, budget: Rc::clone(&self.budget), limits: self.limits }
    }

    /// Reads a stream of which nothing is known yet.
    fn unknown<R: Read>(&mut self, name: &str, tap: &mut Tap<R>, nesting: Nesting) {
        let fault = tap.fault();
        let mut head = Vec::new();
        // A tap does not fail, it ends.
        let _ = tap.by_ref().take(HEAD_BYTES as u64).read_to_end(&mut head);
        let form = detect::form(&head);
        let broken_at_once = form == Form::Empty && fault.borrow().is_some();
        if !broken_at_once {
            self.stream(name, form, &mut Cursor::new(head).chain(tap), nesting);
        }
        if let Some(why) = fault.take() {
            self.note(format!("{name}: {why}"));
        }
    }

    fn stream(&mut self, name: &str, form: Form, stream: &mut dyn Read, nesting: Nesting) {
        match form {
            Form::Empty => self.empty += 1,
            Form::Text => self.log(name, stream),
            Form::BareUtf16(little) => {
                let mark: &[u8] = if little { b"\xff\xfe" } else { b"\xfe\xff" };
                self.log(name, &mut mark.chain(stream));
            }
            Form::Gzip | Form::Zstd => self.compressed(name, form, stream, nesting),
            Form::Zip | Form::Tar if nesting.archives >= ARCHIVES_MAX => {
                self.note(format!("{name}: not read: an archive within an archive within an archive"));
            }
            Form::Zip | Form::Tar => match archive::spool(stream, &self.limits) {
                Ok(file) => self.archive(name, form, file, nesting),
                Err(error) => self.note(format!("{name}: not read: {error}")),
            },
            Form::Other(what, hint) => {
                let hint = hint.map_or_else(String::new, |hint| format!("; try: {hint}"));
                self.note(format!("{name}: not read: it is {what}{hint}"));
            }
        }
    }

    fn compressed(&mut self, name: &str, form: Form, stream: &mut dyn Read, nesting: Nesting) {
        if nesting.compressions >= COMPRESSIONS_MAX {
            return self.note(format!("{name}: not read: compressed more than {COMPRESSIONS_MAX} times"));
        }
        let inner = Nesting { compressions: nesting.compressions + 1, ..nesting };
        let raw = Tap::new(stream);
        let bound = self.bound(raw.count());
        let raw = BufReader::with_capacity(BUFFER_BYTES, raw);
        if form == Form::Gzip {
            let decoder = flate2::bufread::MultiGzDecoder::new(raw);
            return self.unknown(name, &mut Tap::bounded(decoder, bound), inner);
        }
        match zstd::stream::read::Decoder::with_buffer(raw) {
            Ok(decoder) => self.unknown(name, &mut Tap::bounded(decoder, bound), inner),
            Err(error) => self.note(format!("{name}: not read: {error}")),
        }
    }

    fn archive(&mut self, name: &str, form: Form, file: File, nesting: Nesting) {
        let inner = Nesting { archives: nesting.archives + 1, compressions: 0 };
        let mut notes = Vec::new();
        let listed: io::Result<Box<dyn Tree>> = if form == Form::Zip {
            archive::Zip::list(file, name, &self.limits, &mut notes).map(|tree| Box::new(tree) as Box<dyn Tree>)
        } else {
            archive::Tar::list(file, name, &self.limits, &mut notes).map(|tree| Box::new(tree) as Box<dyn Tree>)
        };
        self.notes(notes);
        match listed {
            Ok(mut tree) => self.tree(name, &mut *tree, inner),
            Err(error) => self.note(format!("{name}: not read: {error}")),
        }
    }

    /// Shows a log to the classifier.
    fn log(&mut self, name: &str, stream: &mut dyn Read) {
        let tap = Tap::new(stream);
        let fault = tap.fault();
        let reader = BufReader::with_capacity(BUFFER_BYTES, tap);
        match verdict::diagnose_reader(name, reader, &mut self.classifier) {
            Ok(scan) if scan.bytes == 0 => self.empty += 1,
            Ok(scan) => {
                if scan.binary {
                    self.note(format!("{name}: some of it is no text"));
                }
                let log = LogRead {
                    name: name.to_owned(),
                    node: scan.node,
                    source: scan.source,
                    bytes: scan.bytes,
                    lines: scan.lines,
                };
                self.logs.push(log);
            }
            Err(error) => self.note(format!("{name}: ends early: {error}")),
        }
        if let Some(why) = fault.take() {
            self.note(format!("{name}: {why}"));
        }
    }

    fn conclude(mut self) -> Result<Diagnosis, Error> {
        let context = self.context();
        if self.notes_more > 0 {
            self.notes.push(format!("and {} notes more", self.notes_more));
        }
        if self.logs.is_empty() && self.runs.is_empty() {
            let why = match (self.notes.is_empty(), self.empty) {
                (false, _) => format!("nothing to read:\n{}", self.notes.join("\n")),
                (true, 0) => "nothing to read: there is no file".to_owned(),
                (true, 1) => "nothing to read: the input is empty".to_owned(),
                (true, n) => format!("nothing to read: all {n} files are empty"),
            };
            return Err(Error::NothingRead { why });
        }
        match self.empty {
            0 => {}
            1 => self.notes.push("one file is empty".to_owned()),
            n => self.notes.push(format!("{n} files are empty")),
        }
        let verdict = self.classifier.conclude(&context);
        Ok(Diagnosis { verdict, logs: self.logs, notes: self.notes })
    }

    /// What the run folders among the inputs know: that of the first run that did not pass.
    fn context(&mut self) -> Context {
        let Some(chosen) = self.runs.iter().find(|run| !run.passed()).or(self.runs.first()).cloned() else {
            return Context::default();
        };
        let others: Vec<_> =
            self.runs.iter().filter(|run| !run.passed() && run.id != chosen.id).map(|run| run.id.clone()).collect();
        if !others.is_empty() {
            self.note(format!(
                "several runs failed; the host, the phase and the errors are those of {}. Diagnose them one by one: {}",
                chosen.id,
                others.join(", ")
            ));
        }
        if chosen.unfinished {
            self.note(format!("run {} has no verdict.json: it was killed, or it still goes on", chosen.id));
        }
        chosen.context
    }
}

/// The first bytes of a file; its position stays at the start.
fn head_of_file(file: &File) -> io::Result<Vec<u8>> {
    let mut head = vec![0; HEAD_BYTES];
    let mut held = 0;
    while held < head.len() {
        match file.read_at(&mut head[held..], held as u64) {
            Ok(0) => break,
            Ok(count) => held += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    head.truncate(held);
    Ok(head)
}

#[cfg(test)]
mod tests;
