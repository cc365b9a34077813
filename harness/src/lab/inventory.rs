//! `lab.json`: what a living lab is and how its guests are reached, for the commands that look inside.
//!
//! Lies in the lab's folder with the client's private key beside it, both 0600, from the moment the first
//! guest boots until the lab is gone. A record whose owner has died is no living lab: the owner is known by
//! its process id *and* its start time, so that a number the system gave away again is never taken for it.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use jiff::Timestamp;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::plan::{NodePlan, Plan};
use crate::record::{Folders, private_file};
use crate::scenario::Role;

/// Version of `lab.json`.
pub const SCHEMA_VERSION: u32 = 1;

/// The record's name in the lab's folder.
const RECORD: &str = "lab.json";
/// The client's private key in the lab's folder.
const CLIENT_KEY: &str = "client_key";
/// The guests' host keys in the lab's folder, in the form `ssh` reads.
const KNOWN_HOSTS: &str = "known_hosts";

/// Why a lab could not be found, read or written down.
#[derive(Debug, Error)]
pub enum InventoryError {
    /// A file could not be read or written.
    #[error("{action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: Utf8PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No lab lives.
    #[error("no lab lives under {state}")]
    NoLab {
        /// The state folder.
        state: Utf8PathBuf,
    },
    /// No lab of that id lives.
    #[error("no lab {lab} lives; living: {living}")]
    UnknownLab {
        /// What was asked for.
        lab: String,
        /// The ids that could have been.
        living: String,
    },
    /// Several labs live and none was named.
    #[error("{} labs live and none was named: {}", .labs.len(), .labs.join(", "))]
    SeveralLabs {
        /// Their ids.
        labs: Vec<String>,
    },
    /// No node of that name.
    #[error("no node {node}; there are: {}", .choices.join(", "))]
    UnknownNode {
        /// What was asked for.
        node: String,
        /// `LAB: NODE` of all there are.
        choices: Vec<String>,
    },
    /// Several labs have a node of that name.
    #[error("several labs have a node {node}: {}", .labs.join(", "))]
    SeveralNodes {
        /// What was asked for.
        node: String,
        /// The labs.
        labs: Vec<String>,
    },
    /// The owner could not be signalled.
    #[error("signalling process {pid}, the owner of lab {lab}")]
    Signal {
        /// The lab.
        lab: String,
        /// Its owner.
        pid: u32,
        /// What the system said.
        source: nix::Error,
    },
}

impl InventoryError {
    fn io(action: &'static str, path: &Utf8Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}

/// What a lab is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LabState {
    /// Its run is going on.
    Forming,
    /// Its run is over and the lab is kept to be looked at.
    Kept,
}

impl std::fmt::Display for LabState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Forming => "forming",
            Self::Kept => "kept",
        })
    }
}

/// The process a lab lives and dies with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Its process id.
    pub pid: u32,
    /// Its start, in clock ticks since the system's boot: field 22 of `/proc/PID/stat`, proc(5).
    pub start_ticks: u64,
}

impl Owner {
    /// This process.
    ///
    /// # Errors
    /// [`InventoryError::Io`] where `/proc` cannot be read.
    pub fn this_process() -> Result<Self, InventoryError> {
        let path = Utf8Path::new("/proc/self/stat");
        let stat = fs::read_to_string(path).map_err(InventoryError::io("reading", path))?;
        let start_ticks = start_ticks(&stat).ok_or_else(|| {
            InventoryError::io("reading", path)(io::Error::new(io::ErrorKind::InvalidData, "no start time in it"))
        })?;
        Ok(Self { pid: std::process::id(), start_ticks })
    }

    /// Whether it still runs: the process of that id is there, is no zombie, and began when the owner did.
    #[must_use]
    pub fn lives(&self) -> bool {
        fs::read_to_string(format!("/proc/{}/stat", self.pid))
            .is_ok_and(|stat| start_ticks(&stat) == Some(self.start_ticks) && !is_zombie(&stat))
    }
}

/// Field 22 of a line of `/proc/PID/stat`. The second field is the program's name in parentheses and may hold anything.
fn start_ticks(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

fn is_zombie(stat: &str) -> bool {
    stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().next()).is_some_and(|state| state == "Z")
}

/// One guest, and the way to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeEntry {
    /// Its name.
    pub name: String,
    /// What it is in the cluster.
    pub role: Role,
    /// The port on 127.0.0.1 that leads to its sshd.
    pub ssh_port: u16,
    /// The login name.
    pub user: String,
    /// The only host key that is its own: `ssh-ed25519 AAAA… comment`.
    pub host_key: String,
    /// The file its serial console is written to.
    pub console_log: Utf8PathBuf,
    /// Its address on the cluster network.
    pub cluster_ip: std::net::Ipv4Addr,
}

/// `lab.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LabRecord {
    /// Version of this document's form.
    pub schema_version: u32,
    /// The lab's id.
    pub lab: String,
    /// The run it was made by.
    pub run: String,
    /// The scenario.
    pub scenario: String,
    /// Which k3s runs in it, in words that say whether it is real k3s.
    pub k3s: String,
    /// Folder of the run's records.
    pub run_dir: Utf8PathBuf,
    /// The process it lives and dies with.
    pub owner: Owner,
    /// What it is doing.
    pub state: LabState,
    /// When its first guest was started.
    pub started: Timestamp,
    /// When it will be taken down, where it is kept.
    pub expires: Option<Timestamp>,
    /// How much slower than under hardware virtualization its guests are.
    pub slowdown: f64,
    /// Its guests, in the order they came up.
    pub nodes: Vec<NodeEntry>,
}

/// Keeps `lab.json` while the guests of a run come up.
#[derive(Debug)]
pub struct Inventory {
    dir: Utf8PathBuf,
    record: Mutex<LabRecord>,
}

impl Inventory {
    /// Lays the client's key into the lab's folder and begins the record; it is written with the first guest.
    ///
    /// # Errors
    /// [`InventoryError::Io`].
    pub fn begin(dir: &Utf8Path, plan: &Plan, run_dir: &Utf8Path, client_key: &str) -> Result<Self, InventoryError> {
        let key = dir.join(CLIENT_KEY);
        private_file(&key)
            .and_then(|mut file| file.write_all(client_key.as_bytes()))
            .map_err(InventoryError::io("writing", &key))?;
        let record = LabRecord {
            schema_version: SCHEMA_VERSION,
            lab: plan.lab.clone(),
            run: run_dir.file_name().unwrap_or_default().to_owned(),
            scenario: plan.scenario.clone(),
            k3s: plan.k3s.clone(),
            run_dir: run_dir.to_owned(),
            owner: Owner::this_process()?,
            state: LabState::Forming,
            started: Timestamp::now(),
            expires: None,
            slowdown: plan.host.slowdown,
            nodes: Vec::new(),
        };
        Ok(Self { dir: dir.to_owned(), record: Mutex::new(record) })
    }

    /// Adds a guest that was started.
    ///
    /// # Errors
    /// [`InventoryError::Io`].
    pub fn add(&self, node: &NodePlan, ssh_port: u16, user: &str, host_key: &str) -> Result<(), InventoryError> {
        // Held while the files are written: two guests that come up at once must not write half each.
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        record.nodes.retain(|entry| entry.name != node.name);
        record.nodes.push(NodeEntry {
            name: node.name.clone(),
            role: node.role,
            ssh_port,
            user: user.to_owned(),
            host_key: host_key.trim().to_owned(),
            console_log: node.vm.console_log.clone(),
            cluster_ip: node.cluster_ip,
        });
        replace(&self.dir.join(KNOWN_HOSTS), known_hosts(&record).as_bytes())?;
        write_record(&self.dir, &record)
    }
}

/// Says in the record of a lab that it is kept, and until when.
///
/// # Errors
/// [`InventoryError::Io`], also where the lab has no record.
pub fn mark_kept(dir: &Utf8Path, expires: Timestamp) -> Result<LabRecord, InventoryError> {
    let mut record = read_record(dir)?;
    record.state = LabState::Kept;
    record.expires = Some(expires);
    write_record(dir, &record)?;
    Ok(record)
}

/// A lab that lives.
#[derive(Debug, Clone)]
pub struct LivingLab {
    /// Its folder.
    pub dir: Utf8PathBuf,
    /// Its record.
    pub record: LabRecord,
}

impl LivingLab {
    /// The file with the client's private key.
    #[must_use]
    pub fn client_key(&self) -> Utf8PathBuf {
        self.dir.join(CLIENT_KEY)
    }

    /// The file with the guests' host keys; each under [`host_alias`].
    #[must_use]
    pub fn known_hosts(&self) -> Utf8PathBuf {
        self.dir.join(KNOWN_HOSTS)
    }

    /// Whether its time is over: it is kept, and its expiry has passed.
    #[must_use]
    pub fn expired(&self, now: Timestamp) -> bool {
        self.record.state == LabState::Kept && self.record.expires.is_some_and(|expires| expires <= now)
    }

    /// Ends it: each signal in turn goes to the owner, which has so long to let go of the lab. `told` hears of every one
    /// that did not do. `false` where none did. What a killed owner leaves is for [`crate::lab::dirs::reap`].
    ///
    /// # Errors
    /// [`InventoryError`] where the owner cannot be signalled or waited for.
    pub fn end(
        &self,
        steps: &[(Signal, Duration)],
        mut told: impl FnMut(Signal, Duration),
    ) -> Result<bool, InventoryError> {
        for (signal, limit) in steps {
            let sent = self.signal(*signal)?;
            if self.wait_gone(*limit)? {
                return Ok(true);
            }
            if !sent {
                break;
            }
            told(*signal, *limit);
        }
        Ok(false)
    }

    /// Sends a signal to the owner, and lets it go on where it was stopped: a stopped process hears only SIGKILL. `false`
    /// where it has already gone.
    ///
    /// # Errors
    /// [`InventoryError::Signal`] where the system refuses.
    pub fn signal(&self, signal: Signal) -> Result<bool, InventoryError> {
        let owner = self.record.owner;
        let Ok(pid) = i32::try_from(owner.pid) else { return Ok(false) };
        if !owner.lives() {
            return Ok(false);
        }
        let pid = Pid::from_raw(pid);
        match nix::sys::signal::kill(pid, signal).and_then(|()| nix::sys::signal::kill(pid, Signal::SIGCONT)) {
            Ok(()) => Ok(true),
            Err(nix::Error::ESRCH) => Ok(false),
            Err(source) => Err(InventoryError::Signal { lab: self.record.lab.clone(), pid: owner.pid, source }),
        }
    }

    /// Waits for the owner to let go of the lab, which it does last of all, or by dying. `false` at the limit.
    ///
    /// # Errors
    /// [`InventoryError::Io`] where the lock cannot be waited for.
    pub fn wait_gone(&self, limit: Duration) -> Result<bool, InventoryError> {
        let path = self.dir.join("lock");
        let file = match fs::OpenOptions::new().write(true).open(&path) {
            Ok(file) => file,
            // The folder goes a moment before the lock does.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
            Err(error) => return Err(InventoryError::io("opening", &path)(error)),
        };
        let (gone, told) = std::sync::mpsc::channel();
        // A lock that is waited for cannot be given up: the thread ends with it, or with this process.
        std::thread::spawn(move || {
            let locked = Flock::lock(file, FlockArg::LockExclusive);
            // Whoever waited no longer needs to be told.
            let _ = gone.send(locked.map(drop).map_err(|(_, errno)| errno));
        });
        match told.recv_timeout(limit) {
            Ok(Ok(())) => Ok(true),
            Ok(Err(errno)) => Err(InventoryError::io("waiting for", &path)(errno.into())),
            Err(_) => Ok(false),
        }
    }
}

/// The name a node's host key is known by to `ssh` (`HostKeyAlias`).
#[must_use]
pub fn host_alias(lab: &str, node: &str) -> String {
    format!("harness-{lab}-{node}")
}

/// All labs that live, oldest first.
#[must_use]
pub fn living(folders: &Folders) -> Vec<LivingLab> {
    let Ok(entries) = folders.state.join("labs").read_dir_utf8() else { return Vec::new() };
    let mut labs: Vec<LivingLab> = entries
        .filter_map(Result::ok)
        .filter_map(|entry| {
            // Without a record no guest of it has been started yet; one that cannot be read is half gone.
            let record = read_record(entry.path()).ok()?;
            record.owner.lives().then(|| LivingLab { dir: entry.path().to_owned(), record })
        })
        .collect();
    labs.sort_by(|a, b| (a.record.started, &a.record.lab).cmp(&(b.record.started, &b.record.lab)));
    labs
}

/// The lab that is meant: the one named, or the only one.
///
/// # Errors
/// [`InventoryError`] with the choices.
pub fn pick_lab(labs: Vec<LivingLab>, lab: Option<&str>, state: &Utf8Path) -> Result<LivingLab, InventoryError> {
    let ids: Vec<String> = labs.iter().map(|one| one.record.lab.clone()).collect();
    let mut fitting: Vec<LivingLab> =
        labs.into_iter().filter(|one| lab.is_none_or(|lab| one.record.lab == lab)).collect();
    match (fitting.len(), lab) {
        (1, _) => fitting.pop().ok_or_else(|| InventoryError::NoLab { state: state.to_owned() }),
        (0, Some(lab)) if !ids.is_empty() => {
            Err(InventoryError::UnknownLab { lab: lab.to_owned(), living: ids.join(", ") })
        }
        (0, _) => Err(InventoryError::NoLab { state: state.to_owned() }),
        _ => Err(InventoryError::SeveralLabs { labs: ids }),
    }
}

/// The node that is meant, of the lab that is named or of the only one that has it.
///
/// # Errors
/// [`InventoryError`] with the choices.
pub fn pick_node(
    labs: Vec<LivingLab>,
    lab: Option<&str>,
    node: &str,
    state: &Utf8Path,
) -> Result<(LivingLab, NodeEntry), InventoryError> {
    let labs = match lab {
        Some(_) => vec![pick_lab(labs, lab, state)?],
        None if labs.is_empty() => return Err(InventoryError::NoLab { state: state.to_owned() }),
        None => labs,
    };
    let choices = labs
        .iter()
        .flat_map(|one| one.record.nodes.iter().map(|node| format!("{} in lab {}", node.name, one.record.lab)))
        .collect();
    let mut fitting: Vec<(LivingLab, NodeEntry)> = labs
        .into_iter()
        .filter_map(|one| {
            let entry = one.record.nodes.iter().find(|entry| entry.name == node)?.clone();
            Some((one, entry))
        })
        .collect();
    if fitting.len() > 1 {
        let labs = fitting.iter().map(|(one, _)| one.record.lab.clone()).collect();
        return Err(InventoryError::SeveralNodes { node: node.to_owned(), labs });
    }
    fitting.pop().ok_or_else(|| InventoryError::UnknownNode { node: node.to_owned(), choices })
}

/// `ALIAS ssh-ed25519 AAAA…`, one line per guest: sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT".
fn known_hosts(record: &LabRecord) -> String {
    record.nodes.iter().map(|node| format!("{} {}\n", host_alias(&record.lab, &node.name), node.host_key)).collect()
}

fn read_record(dir: &Utf8Path) -> Result<LabRecord, InventoryError> {
    let path = dir.join(RECORD);
    let bytes = fs::read(&path).map_err(InventoryError::io("reading", &path))?;
    serde_json::from_slice(&bytes).map_err(|error| InventoryError::io("reading", &path)(error.into()))
}

fn write_record(dir: &Utf8Path, record: &LabRecord) -> Result<(), InventoryError> {
    let path = dir.join(RECORD);
    let mut bytes =
        serde_json::to_vec_pretty(record).map_err(|error| InventoryError::io("encoding", &path)(error.into()))?;
    bytes.push(b'\n');
    replace(&path, &bytes)
}

/// A reader sees the old content or the new, never a part of it.
fn replace(path: &Utf8Path, bytes: &[u8]) -> Result<(), InventoryError> {
    let staged = Utf8PathBuf::from(format!("{path}.part"));
    fs::OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&staged)
        .and_then(|mut file| file.write_all(bytes))
        .and_then(|()| fs::rename(&staged, path))
        .map_err(InventoryError::io("writing", path))
}

#[cfg(test)]
mod tests;
