//! Many files under one name: a folder or an archive, listed before anything of it is read.
//!
//! Files are read in the order of their paths, so that a folder, its zip and its tar give the same verdict.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;

use crate::diagnose::limits::Limits;

/// Longest path of a member, bytes; an archive could claim any.
const PATH_BYTES_MAX: usize = 1024;

/// A file of a tree.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Member {
    /// Its path below the tree, with `/`, fit to be printed.
    pub(super) path: String,
    /// Its size as the tree says, bytes.
    pub(super) bytes: u64,
    /// Where the tree finds it again.
    pub(super) key: usize,
}

/// What a member is read from.
pub(super) enum Source<'a> {
    /// A file of its own, at its start.
    File(File),
    /// Bytes that come once.
    Stream(&'a mut dyn Read),
    /// Bytes that come once out of so many compressed ones.
    Packed(&'a mut dyn Read, u64),
}

/// A folder or an archive.
pub(super) trait Tree {
    /// Its files in the order of their paths.
    fn members(&self) -> &[Member];

    /// Hands a member to `then`.
    fn open(&mut self, member: &Member, then: &mut dyn FnMut(Source<'_>)) -> io::Result<()>;
}

/// A path of an archive or folder as it can be shown: no control characters, not endless.
pub(super) fn shown(path: &str) -> String {
    let mut out: String = path.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    if out.len() > PATH_BYTES_MAX {
        let end = (0..=PATH_BYTES_MAX).rev().find(|&n| out.is_char_boundary(n)).unwrap_or(0);
        out.truncate(end);
        out.push('…');
    }
    out
}

/// A folder.
pub(super) struct Folder {
    members: Vec<Member>,
    paths: Vec<PathBuf>,
}

impl Folder {
    /// Lists a folder; what is left out is said in `notes`.
    pub(super) fn list(root: &Path, limits: &Limits, notes: &mut Vec<String>) -> io::Result<Self> {
        let mut this = Self { members: Vec::new(), paths: Vec::new() };
        let (mut links, mut special, mut deep, mut visited) = (0_u64, 0_u64, 0_u64, 0_usize);
        let mut todo = vec![(root.to_owned(), String::new(), 0_usize)];
        'folders: while let Some((folder, prefix, depth)) = todo.pop() {
            let entries = match fs::read_dir(&folder) {
                Ok(entries) => entries,
                Err(error) if depth == 0 => return Err(error),
                Err(error) => {
                    notes.push(format!("{}: not read: {error}", shown(&prefix)));
                    continue;
                }
            };
            for entry in entries {
                let entry = entry?;
                visited += 1;
                if visited > limits.files_max * 4 || this.members.len() >= limits.files_max {
                    notes.push(format!(
                        "{} has more than {} files; the rest was not read",
                        root.display(),
                        limits.files_max
                    ));
                    break 'folders;
                }
                let name = entry.file_name();
                let path = format!("{prefix}{}", name.to_string_lossy());
                let kind = entry.file_type()?;
                if kind.is_symlink() {
                    links += 1;
                } else if kind.is_dir() && depth + 1 > limits.depth_max {
                    deep += 1;
                } else if kind.is_dir() {
                    if name != ".git" {
                        todo.push((entry.path(), format!("{path}/"), depth + 1));
                    }
                } else if kind.is_file() {
                    let bytes = entry.metadata().map_or(0, |metadata| metadata.len());
                    this.members.push(Member { path: shown(&path), bytes, key: this.paths.len() });
                    this.paths.push(entry.path());
                } else {
                    special += 1;
                }
            }
        }
        let root = root.display();
        for (count, what) in [
            (links, "symbolic links were not followed"),
            (special, "pipes, sockets or devices were not read"),
            (deep, "folders are nested too deeply and were not read"),
        ] {
            if count > 0 {
                notes.push(format!("{root}: {count} {what}"));
            }
        }
        this.members.sort();
        Ok(this)
    }
}

impl Tree for Folder {
    fn members(&self) -> &[Member] {
        &self.members
    }

    fn open(&mut self, member: &Member, then: &mut dyn FnMut(Source<'_>)) -> io::Result<()> {
        let path = self.paths.get(member.key).ok_or(io::ErrorKind::NotFound)?;
        // It may have become a link or a pipe since it was listed.
        let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("no longer a file"));
        }
        then(Source::File(file));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_listed_in_order_and_links_stay_out() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("logs");
        fs::create_dir_all(root.join("server-2")).unwrap();
        fs::create_dir_all(root.join(".git")).unwrap();
        fs::write(root.join("server-2/journal.log"), "b").unwrap();
        fs::write(root.join("a\u{1b}[31m.log"), "aa").unwrap();
        fs::write(root.join(".git/HEAD"), "x").unwrap();
        fs::write(dir.path().join("secret"), "x").unwrap();
        std::os::unix::fs::symlink(dir.path().join("secret"), root.join("out.log")).unwrap();
        std::os::unix::fs::symlink(&root, root.join("loop")).unwrap();
        let mut notes = Vec::new();
        let mut folder = Folder::list(&root, &Limits::default(), &mut notes).unwrap();
        let paths: Vec<_> = folder.members().iter().map(|m| (m.path.clone(), m.bytes)).collect();
        assert_eq!(paths, [("a?[31m.log".to_owned(), 2), ("server-2/journal.log".to_owned(), 1)]);
        assert_eq!(notes.len(), 1);
        assert!(notes[0].ends_with("2 symbolic links were not followed"), "{notes:?}");
        // Swapped for a link after the listing.
        let member = folder.members()[0].clone();
        fs::remove_file(root.join("a\u{1b}[31m.log")).unwrap();
        std::os::unix::fs::symlink(dir.path().join("secret"), root.join("a\u{1b}[31m.log")).unwrap();
        assert!(folder.open(&member, &mut |_| panic!("it is a link")).is_err());
    }

    #[test]
    fn the_number_of_files_and_the_depth_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let mut deep = dir.path().to_owned();
        for n in 0..6 {
            deep = deep.join(format!("d{n}"));
            fs::create_dir(&deep).unwrap();
            fs::write(deep.join("x.log"), "x").unwrap();
        }
        let mut notes = Vec::new();
        let limits = Limits { depth_max: 3, ..Limits::default() };
        assert_eq!(Folder::list(dir.path(), &limits, &mut notes).unwrap().members().len(), 3);
        assert!(notes[0].contains("nested too deeply"), "{notes:?}");
        notes.clear();
        let limits = Limits { files_max: 2, ..Limits::default() };
        assert_eq!(Folder::list(dir.path(), &limits, &mut notes).unwrap().members().len(), 2);
        assert!(notes[0].contains("more than 2 files"), "{notes:?}");
    }
}
