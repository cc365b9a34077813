//! The ledger's files. Whoever has a [`Book`] has this user's lock, and the one of all users where that could be had.
//!
//! In a user's folder `lock` is that user's own; `NUMBER-LAB` is a claim, NUMBER being one more than those of all living
//! claims that were seen when it was made.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};

use camino::{Utf8Path, Utf8PathBuf};
use jiff::Timestamp;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::lock::{Held, is_held};
use super::{Claim, Entry, Ledger, LedgerError, MAX_CLAIMS, place};

/// Largest file that can be a claim.
const MAX_CLAIM_BYTES: u64 = 64 * 1024;

/// Largest number another user's claim can have: nobody makes the next one overflow.
const MAX_NUMBER: u64 = 1 << 48;
/// Most vCPUs a lab can ask for: nodes of a scenario times vCPUs of a node.
const MAX_VCPUS: u32 = 9 * 64;
/// Most memory a lab can ask for, in MiB: nodes of a scenario times memory of a node.
const MAX_MEMORY_MIB: u64 = 9 * 65_536;

/// A claim in the ledger, of a living owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Claimed {
    pub(super) number: u64,
    pub(super) path: Utf8PathBuf,
    pub(super) entry: Entry,
    /// Whose it is.
    pub(super) user: u32,
}

impl Claimed {
    /// Its place in the order of all claims. Where two could not see each other, the user's number decides.
    pub(super) fn order(&self) -> (u64, u32) {
        (self.number, self.user)
    }

    /// Its file.
    pub(super) fn open(&self) -> io::Result<File> {
        if self.entry.user.is_some() { place::open_of(self.user, &self.path) } else { open_claim(&self.path, false) }
    }
}

/// A claim that is in force for as long as this value lives.
#[derive(Debug)]
pub struct Ticket {
    number: u64,
    path: Utf8PathBuf,
    entry: Entry,
    file: Held,
}

impl Ticket {
    /// What was claimed.
    #[must_use]
    pub fn claim(&self) -> &Claim {
        &self.entry.claim
    }

    pub(super) fn number(&self) -> u64 {
        self.number
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // First the name, then, with the file, its lock: whoever is woken by the lock finds the claim gone.
        if let Err(error) = fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path, %error, "a claim is left in the ledger; it is void without its lock");
        }
    }
}

/// The ledger, locked against this user's other processes, and as a rule against everybody's ([`place::common_lock`]).
pub(super) struct Book {
    root: Utf8PathBuf,
    dir: Utf8PathBuf,
    user: u32,
    // Given back first.
    _common: Option<Flock<File>>,
    _lock: Flock<File>,
}

impl Book {
    /// Takes the ledger's locks. Blocks while another process of this user has them, which is for milliseconds, and while
    /// one of another user has, for no longer than that is waited for.
    pub(super) fn open(ledger: &Ledger) -> Result<Self, LedgerError> {
        let Ledger { root, own: dir } = ledger;
        place::prepare(root, dir)?;
        let path = dir.join("lock");
        let file = open_claim(&path, true).map_err(|source| io_error("opening", &path, source))?;
        let lock = lock_blocking(file, FlockArg::LockExclusive).map_err(|source| io_error("locking", &path, source))?;
        let common = place::common_lock(root);
        let user = nix::unistd::geteuid().as_raw();
        Ok(Self { root: root.clone(), dir: dir.clone(), user, _common: common, _lock: lock })
    }

    /// Whose book it is.
    pub(super) fn user(&self) -> u32 {
        self.user
    }

    /// The claims of the living, in their order.
    pub(super) fn living(&self) -> Result<Vec<Claimed>, LedgerError> {
        Ok(with_others(self.own_living()?, &self.root, &self.dir))
    }

    /// This user's claims of the living. Those of the dead are removed.
    fn own_living(&self) -> Result<Vec<Claimed>, LedgerError> {
        let entries = self.dir.read_dir_utf8().map_err(|source| io_error("reading", &self.dir, source))?;
        let mut living = Vec::new();
        let named = entries.filter_map(|entry| {
            let entry = entry.ok()?;
            Some((number_of(entry.file_name())?, entry.into_path()))
        });
        for (number, path) in named.take(MAX_CLAIMS) {
            let mut file = match open_claim(&path, false) {
                Ok(file) => file,
                // Its owner has just ended.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => return Err(io_error("opening", &path, source)),
            };
            let mut text = String::new();
            let read = (&mut file).take(MAX_CLAIM_BYTES).read_to_string(&mut text);
            if !is_held(&file).map_err(|source| io_error("asking for the lock of", &path, source))? {
                // Whoever made it is gone. Nothing but a claim is ever removed, whatever folder stands here.
                if read.is_ok() && is_claim(&path, &text) {
                    remove(&path)?;
                }
                continue;
            }
            read.map_err(|source| io_error("reading", &path, source))?;
            let mut entry: Entry = serde_json::from_str(&text)
                .map_err(|error| io_error("understanding", &path, io::Error::other(error)))?;
            entry.user = None;
            living.push(Claimed { number, path, entry, user: self.user });
        }
        Ok(living)
    }

    /// Enters a claim, behind all others.
    pub(super) fn enter(&self, claim: Claim, admitted: bool) -> Result<Ticket, LedgerError> {
        // A number that another user has run up is not gone on from: nobody would believe ours.
        let believed = |claimed: &Claimed| claimed.entry.user.is_none() || claimed.number < MAX_NUMBER / 2;
        let last = self.living()?.iter().filter(|claimed| believed(claimed)).map(|claimed| claimed.number).max();
        let number = last.unwrap_or(0) + 1;
        let path = self.dir.join(format!("{number:010}-{}", claim.lab));
        let file = open_claim(&path, true).map_err(|source| io_error("making", &path, source))?;
        let file = Held::take(file).map_err(|source| io_error("locking", &path, source))?;
        // Whatever the umask: other users have to be able to read it.
        file.set_permissions(fs::Permissions::from_mode(0o644))
            .map_err(|source| io_error("setting the mode of", &path, source))?;
        let (pid, since) = (std::process::id(), Timestamp::now());
        let entry = Entry { claim, admitted, pid, since, memory_used_mib: None, user: None };
        let mut ticket = Ticket { number, path, entry, file };
        self.write(&mut ticket)?;
        Ok(ticket)
    }

    /// Makes a claim that waits one that is admitted.
    pub(super) fn admit(&self, ticket: &mut Ticket) -> Result<(), LedgerError> {
        ticket.entry.admitted = true;
        self.write(ticket)
    }

    /// In place: a new file would have to be locked anew. Who reads without the ledger's locks (who has claimed nothing, who
    /// has waited for the common one in vain) may see half of it, and ignores it this once.
    fn write(&self, ticket: &mut Ticket) -> Result<(), LedgerError> {
        let io = |source| io_error("writing", &ticket.path, source);
        let bytes = serde_json::to_vec(&ticket.entry).map_err(|error| io(io::Error::other(error)))?;
        let file: &mut File = &mut ticket.file;
        file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(&bytes)).map_err(io)
    }
}

/// A user's own claims with those of all others, in their order, and with the memory their VMs have taken.
pub(super) fn with_others(mut living: Vec<Claimed>, root: &Utf8Path, own: &Utf8Path) -> Vec<Claimed> {
    for (user, folder) in place::others(root, own) {
        living.extend(living_of(user, &folder));
    }
    living.sort_by_key(Claimed::order);
    if !living.is_empty() {
        let taken = rss_mib_by_parent();
        for claimed in &mut living {
            let pid = claimed.entry.pid;
            claimed.entry.memory_used_mib = user_of(pid).map(|_| taken.get(&pid).copied().unwrap_or(0));
        }
    }
    living
}

/// Another user's claims of the living. What is not as it should be is ignored with a warning: what can be claimed is what
/// a lab can ask for, and makes others wait for no longer than they are willing to.
fn living_of(user: u32, folder: &Utf8Path) -> Vec<Claimed> {
    let entries = folder.read_dir_utf8().into_iter().flatten().filter_map(Result::ok);
    let named = entries.filter_map(|entry| Some((number_of(entry.file_name())?, entry.into_path())));
    let one = |(number, path): (u64, Utf8PathBuf)| match foreign(user, number, &path) {
        Ok(entry) => entry.map(|entry| Claimed { number, path, entry, user }),
        // Its owner has just ended.
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            tracing::warn!(%path, user, %error, "another user's claim is ignored");
            None
        }
    };
    named.take(MAX_CLAIMS).filter_map(one).collect()
}

/// Another user's claim; `None` where its owner does not live.
fn foreign(user: u32, number: u64, path: &Utf8Path) -> io::Result<Option<Entry>> {
    let wrong = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidData, what.to_owned()));
    let mut file = place::open_of(user, path)?;
    let mut text = String::new();
    let read = (&mut file).take(MAX_CLAIM_BYTES).read_to_string(&mut text);
    if !is_held(&file)? {
        // It is the owner's to remove.
        return Ok(None);
    }
    read?;
    let mut entry: Entry = serde_json::from_str(&text)?;
    if number > MAX_NUMBER || entry.claim.vcpus > MAX_VCPUS || entry.claim.memory_mib > MAX_MEMORY_MIB {
        return wrong("no lab asks for that much");
    }
    if !plain(&entry.claim.lab) || !plain(&entry.claim.scenario) {
        return wrong("no lab has that name");
    }
    // A process that is not seen may be in another PID namespace; one that is has to be that user's.
    if user_of(entry.pid).is_some_and(|of| of != user) {
        return wrong("the process it names is not that user's");
    }
    entry.user = Some(user);
    Ok(Some(entry))
}

pub(super) fn io_error(action: &'static str, path: &Utf8Path, source: io::Error) -> LedgerError {
    LedgerError::Io { action, path: path.to_owned(), source }
}

/// Opens a file of the ledger, which no link may stand for. Closed in every program this one starts (std's O_CLOEXEC),
/// so that a lock ends with its owner and not with the owner's children.
pub(super) fn open_claim(path: &Utf8Path, make: bool) -> io::Result<File> {
    fs::OpenOptions::new()
        .create(make)
        .truncate(false)
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(nix::fcntl::OFlag::O_NOFOLLOW.bits())
        .open(path)
}

/// Waits for a lock, whatever signals arrive meanwhile.
pub(super) fn lock_blocking(mut file: File, arg: FlockArg) -> io::Result<Flock<File>> {
    loop {
        match Flock::lock(file, arg) {
            Ok(lock) => return Ok(lock),
            Err((back, Errno::EINTR)) => file = back,
            Err((_, errno)) => return Err(errno.into()),
        }
    }
}

/// The user a process runs as: `Uid` of proc_pid_status(5); none where it is not seen.
fn user_of(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().next()?.parse().ok()
}

/// The number of a claim; none where a name is not a claim's.
fn number_of(name: &str) -> Option<u64> {
    let (number, lab) = name.split_once('-')?;
    if plain(lab) { number.parse().ok() } else { None }
}

/// Whether it is the name of a lab or a scenario.
fn plain(name: &str) -> bool {
    name.len() <= 63 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

/// Whether a file holds the claim that its name says, or, its owner killed in between, nothing yet.
fn is_claim(path: &Utf8Path, text: &str) -> bool {
    let of_lab = |entry: Entry| path.file_name().is_some_and(|name| name.ends_with(&format!("-{}", entry.claim.lab)));
    text.is_empty() || serde_json::from_str(text).is_ok_and(of_lab)
}

fn remove(path: &Utf8Path) -> Result<(), LedgerError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(io_error("removing", path, source)),
        _ => Ok(()),
    }
}

/// Memory that the children of each process have taken: the sum of their `VmRSS` (proc_pid_status(5)), by parent. QEMU
/// is a direct child of its harness and a guest's memory is nobody else's, so this is what a lab has taken of what it was
/// promised.
fn rss_mib_by_parent() -> BTreeMap<u32, u64> {
    let mut kib_by_parent: BTreeMap<u32, u64> = BTreeMap::new();
    let processes = fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    for process in processes {
        if !process.file_name().to_string_lossy().starts_with(|c: char| c.is_ascii_digit()) {
            continue;
        }
        // It may have ended meanwhile.
        let Ok(status) = fs::read_to_string(process.path().join("status")) else { continue };
        let field = |name: &str| -> Option<u64> {
            status.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
        };
        let parent = field("PPid:").and_then(|pid| u32::try_from(pid).ok());
        if let (Some(parent), Some(kib)) = (parent, field("VmRSS:")) {
            *kib_by_parent.entry(parent).or_default() += kib;
        }
    }
    kib_by_parent.into_iter().map(|(parent, kib)| (parent, kib / 1024)).collect()
}
