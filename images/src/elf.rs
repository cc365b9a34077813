//! Just enough of the ELF header to know which machine a program is for.
//!
//! Layout: System V ABI, "ELF Header": `e_ident[16]`, `e_type` (2 bytes), `e_machine` (2 bytes); `e_ident[5]` says the
//! byte order of what follows.

use std::fmt;
use std::io::Read;

use camino::{Utf8Path, Utf8PathBuf};

/// Bytes of the header that are read.
const HEADER_LEN: usize = 20;

/// A processor architecture as an ELF header names it (`e_machine`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Machine(u16);

impl Machine {
    /// `EM_X86_64`.
    pub const X86_64: Self = Self(62);
    /// `EM_AARCH64`.
    pub const AARCH64: Self = Self(183);

    /// The machine this program runs on, which is the one its guests have.
    pub fn host() -> Option<Self> {
        match std::env::consts::ARCH {
            "x86_64" => Some(Self::X86_64),
            "aarch64" => Some(Self::AARCH64),
            _ => None,
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Numbers: the ELF registry's e_machine table.
        match self.0 {
            3 => f.write_str("x86 (32-bit)"),
            20 => f.write_str("ppc"),
            21 => f.write_str("ppc64"),
            22 => f.write_str("s390x"),
            40 => f.write_str("arm (32-bit)"),
            62 => f.write_str("x86_64"),
            183 => f.write_str("aarch64"),
            243 => f.write_str("riscv"),
            other => write!(f, "machine {other}"),
        }
    }
}

/// Why a file is not a program for the guest.
#[derive(Debug, thiserror::Error)]
pub enum ElfError {
    /// The file could not be read.
    #[error("could not read {path}: {source}")]
    Read {
        /// The file.
        path: Utf8PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is no ELF program.
    #[error("{path} is not an ELF program: {found}")]
    NotElf {
        /// The file.
        path: Utf8PathBuf,
        /// What it looks like instead.
        found: String,
    },
    /// The program is for another machine than the guests'.
    #[error("{path} is built for {found}, the guests of this host are {expected}")]
    WrongMachine {
        /// The file.
        path: Utf8PathBuf,
        /// The machine the file is for.
        found: Machine,
        /// The machine of the guests.
        expected: Machine,
    },
    /// The host itself is of a kind that no guest is built for.
    #[error("no guests can be built on a {arch} host")]
    UnsupportedHost {
        /// The host's architecture.
        arch: String,
    },
}

/// Reads which machine the program at `path` is for.
pub fn machine(path: &Utf8Path) -> Result<Machine, ElfError> {
    let mut header = Vec::with_capacity(HEADER_LEN);
    std::fs::File::open(path)
        .and_then(|file| {
            if file.metadata()?.is_dir() {
                return Err(std::io::Error::from(std::io::ErrorKind::IsADirectory));
            }
            file.take(HEADER_LEN as u64).read_to_end(&mut header)
        })
        .map_err(|source| ElfError::Read { path: path.to_owned(), source })?;
    parse(&header).map_err(|found| ElfError::NotElf { path: path.to_owned(), found })
}

/// Checks that the program at `path` is for `expected`.
pub fn check(path: &Utf8Path, expected: Machine) -> Result<(), ElfError> {
    let found = machine(path)?;
    if found == expected { Ok(()) } else { Err(ElfError::WrongMachine { path: path.to_owned(), found, expected }) }
}

/// Checks that the program at `path` runs in a guest of this host.
pub fn check_for_guest(path: &Utf8Path) -> Result<(), ElfError> {
    let expected =
        Machine::host().ok_or_else(|| ElfError::UnsupportedHost { arch: std::env::consts::ARCH.to_owned() })?;
    check(path, expected)
}

fn parse(header: &[u8]) -> Result<Machine, String> {
    if header.is_empty() {
        return Err("the file is empty".to_owned());
    }
    if header.starts_with(b"#!") {
        return Err("a script".to_owned());
    }
    if !header.starts_with(b"\x7fELF") {
        let first: Vec<String> = header.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
        return Err(format!("it starts with {}", first.join(" ")));
    }
    if header.len() < HEADER_LEN {
        return Err(format!("the header ends after {} bytes", header.len()));
    }
    let raw = [header[18], header[19]];
    match header[5] {
        1 => Ok(Machine(u16::from_le_bytes(raw))),
        2 => Ok(Machine(u16::from_be_bytes(raw))),
        other => Err(format!("unknown byte order {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(order: u8, machine: [u8; 2]) -> Vec<u8> {
        let mut bytes = vec![0x7f, b'E', b'L', b'F', 2, order, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0];
        bytes.extend(machine);
        bytes
    }

    #[test]
    fn both_byte_orders_are_read() {
        assert_eq!(parse(&header(1, [62, 0])), Ok(Machine::X86_64));
        assert_eq!(parse(&header(1, [183, 0])), Ok(Machine::AARCH64));
        assert_eq!(parse(&header(2, [0, 22])).unwrap().to_string(), "s390x");
    }

    #[test]
    fn what_is_no_program_is_named() {
        assert_eq!(parse(b""), Err("the file is empty".to_owned()));
        assert_eq!(parse(b"#!/bin/sh\n"), Err("a script".to_owned()));
        assert_eq!(parse(b"PK\x03\x04"), Err("it starts with 50 4b 03 04".to_owned()));
        assert_eq!(parse(b"\x7fELF\x02"), Err("the header ends after 5 bytes".to_owned()));
    }

    #[test]
    fn the_wrong_machine_names_both() {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(dir.path()).unwrap().join("k3s");
        std::fs::write(&path, header(1, [183, 0])).unwrap();
        let error = check(&path, Machine::X86_64).unwrap_err().to_string();
        assert!(error.ends_with("k3s is built for aarch64, the guests of this host are x86_64"), "{error}");
    }

    #[test]
    fn the_running_program_is_for_this_host() {
        let exe = Utf8PathBuf::from_path_buf(std::env::current_exe().unwrap()).unwrap();
        check_for_guest(&exe).unwrap();
    }
}
