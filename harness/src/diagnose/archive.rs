//! Archives as trees. The `zip` and `tar` crates read the formats: both are maintained, both are what the ecosystem uses,
//! and neither unpacks anything unless asked to. Nothing is ever unpacked to a path an archive names.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::rc::Rc;

use zip::ZipArchive;

use crate::diagnose::limits::{Limits, mib};
use crate::diagnose::tree::{Member, Source, Tree, shown};

/// Longest name record (GNU long name, PAX header) looked at, bytes.
const NAME_BYTES_MAX: u64 = 64 << 10;

/// Puts a stream into a temporary file without a name, because an archive's files are not read in the order they are in.
pub(super) fn spool(stream: &mut dyn Read, limits: &Limits) -> io::Result<File> {
    let mut file = tempfile::tempfile()?;
    let copied = io::copy(&mut stream.take(limits.spool_bytes_max + 1), &mut file)?;
    if copied > limits.spool_bytes_max {
        let max = mib(limits.spool_bytes_max);
        return Err(io::Error::other(format!("the archive is larger than {max}; unpack it and name the folder")));
    }
    file.seek(SeekFrom::Start(0))?;
    Ok(file)
}

/// A file of which only so much is read: a table of contents is held in memory.
struct Metered {
    file: BufReader<File>,
    left: Rc<Cell<u64>>,
}

impl Read for Metered {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        match self.left.get().checked_sub(count as u64) {
            Some(left) => self.left.set(left),
            None => return Err(io::Error::other("the archive's table of contents is too large")),
        }
        Ok(count)
    }
}

impl Seek for Metered {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

/// What was found in an archive and is no file to read.
#[derive(Default)]
struct LeftOut {
    links: u64,
    locked: u64,
    odd: u64,
}

impl LeftOut {
    fn say(&self, notes: &mut Vec<String>, label: &str) {
        for (count, what) in [
            (self.links, "links were not followed"),
            (self.locked, "encrypted files were not read"),
            (self.odd, "files were not read: sparse, or of another kind than a file"),
        ] {
            if count > 0 {
                notes.push(format!("{label}: {count} {what}"));
            }
        }
    }
}

/// A zip archive.
pub(super) struct Zip {
    archive: ZipArchive<Metered>,
    members: Vec<Member>,
}

impl Zip {
    /// Reads the table of contents.
    pub(super) fn list(file: File, label: &str, limits: &Limits, notes: &mut Vec<String>) -> io::Result<Self> {
        let left = Rc::new(Cell::new(limits.index_bytes_max));
        let metered = Metered { file: BufReader::new(file), left: Rc::clone(&left) };
        let mut archive = ZipArchive::new(metered)?;
        left.set(u64::MAX);
        let mut members = Vec::new();
        let mut out = LeftOut::default();
        for key in 0..archive.len() {
            if members.len() >= limits.files_max {
                notes.push(format!("{label} has more than {} files; the rest was not read", limits.files_max));
                break;
            }
            let Ok(entry) = archive.by_index_raw(key) else {
                out.odd += 1;
                continue;
            };
            if entry.is_dir() {
                continue;
            }
            if entry.is_symlink() {
                out.links += 1;
            } else if entry.encrypted() {
                out.locked += 1;
            } else {
                let path = shown(&String::from_utf8_lossy(entry.name_raw()).replace('\\', "/"));
                members.push(Member { path, bytes: entry.size(), key });
            }
        }
        out.say(notes, label);
        members.sort();
        Ok(Self { archive, members })
    }
}

impl Tree for Zip {
    fn members(&self) -> &[Member] {
        &self.members
    }

    fn open(&mut self, member: &Member, then: &mut dyn FnMut(Source<'_>)) -> io::Result<()> {
        let mut entry = self.archive.by_index(member.key)?;
        let packed = entry.compressed_size();
        then(Source::Packed(&mut entry, packed));
        Ok(())
    }
}

/// A tar archive.
pub(super) struct Tar {
    file: File,
    members: Vec<Member>,
    /// Where each member's bytes begin.
    offsets: Vec<u64>,
}

impl Tar {
    /// Reads all headers, and none of the contents.
    pub(super) fn list(file: File, label: &str, limits: &Limits, notes: &mut Vec<String>) -> io::Result<Self> {
        let mut archive = tar::Archive::new(BufReader::new(file.try_clone()?));
        let (mut members, mut offsets) = (Vec::new(), Vec::new());
        let mut out = LeftOut::default();
        let mut long_name: Option<String> = None;
        // Raw: the crate would read name records of any size into memory.
        for entry in archive.entries_with_seek()?.raw(true) {
            if members.len() >= limits.files_max {
                notes.push(format!("{label} has more than {} files; the rest was not read", limits.files_max));
                break;
            }
            let mut entry = match entry {
                Ok(entry) => entry,
                Err(error) => {
                    notes.push(format!("{label}: ends early: {error}"));
                    break;
                }
            };
            let kind = entry.header().entry_type();
            if kind.is_gnu_longname() || kind.is_pax_local_extensions() {
                let mut bytes = Vec::new();
                (&mut entry).take(NAME_BYTES_MAX).read_to_end(&mut bytes)?;
                long_name =
                    if kind.is_gnu_longname() { Some(gnu_name(&bytes)) } else { pax_name(&bytes).or(long_name) };
                continue;
            }
            if kind.is_gnu_longlink() || kind.is_pax_global_extensions() {
                continue;
            }
            let name =
                long_name.take().unwrap_or_else(|| String::from_utf8_lossy(&entry.header().path_bytes()).into_owned());
            if kind.is_file() {
                let path = shown(name.trim_start_matches("./"));
                members.push(Member { path, bytes: entry.header().entry_size().unwrap_or(0), key: offsets.len() });
                offsets.push(entry.raw_file_position());
            } else if kind.is_symlink() || kind.is_hard_link() {
                out.links += 1;
            } else if !kind.is_dir() {
                out.odd += 1;
            }
        }
        out.say(notes, label);
        members.sort();
        Ok(Self { file, members, offsets })
    }
}

fn gnu_name(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.split(|&byte| byte == 0).next().unwrap_or_default()).into_owned()
}

fn pax_name(bytes: &[u8]) -> Option<String> {
    let found = tar::PaxExtensions::new(bytes).filter_map(Result::ok).find(|one| one.key_bytes() == b"path")?;
    Some(String::from_utf8_lossy(found.value_bytes()).into_owned())
}

impl Tree for Tar {
    fn members(&self) -> &[Member] {
        &self.members
    }

    fn open(&mut self, member: &Member, then: &mut dyn FnMut(Source<'_>)) -> io::Result<()> {
        let offset = *self.offsets.get(member.key).ok_or(io::ErrorKind::NotFound)?;
        self.file.seek(SeekFrom::Start(offset))?;
        let mut bytes = (&self.file).take(member.bytes);
        then(Source::Stream(&mut bytes));
        Ok(())
    }
}
