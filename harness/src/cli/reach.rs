//! What the commands that look inside a lab have in common: finding it, reaching its guests, streams.

use std::io::{IsTerminal, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};

use crate::cli::Global;
use crate::error::CommandError;
use crate::exit::Blame;
use crate::guest::{Guest, GuestError, NewsSink, SshTarget, StreamEnd, parse_private, parse_public};
use crate::lab::inventory::{self, InventoryError, LivingLab, NodeEntry};
use crate::printable::{Shown, ShownSync};
use crate::record::Folders;

/// How long a guest of a living lab may take to answer, before its slowness: it may still be booting.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Which of several living labs is meant.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Which {
    /// The lab, where several live (`harness ps` lists them)
    #[arg(long, value_name = "ID")]
    lab: Option<String>,
}

impl Which {
    /// The lab and its node of that name.
    ///
    /// # Errors
    /// With the choices, where it is not clear which is meant.
    pub(super) fn node(&self, global: &Global, node: &str) -> Result<(LivingLab, NodeEntry), CommandError> {
        let folders = global.folders()?;
        inventory::pick_node(inventory::living(&folders), self.lab.as_deref(), node, &folders.state)
            .map_err(|error| lookup(&error))
    }

    /// The node if it lives; `None` where it does not, and its records may still be there.
    ///
    /// # Errors
    /// Where a lab was named, or several have such a node.
    fn node_if_living(&self, folders: &Folders, node: &str) -> Result<Option<(LivingLab, NodeEntry)>, CommandError> {
        match inventory::pick_node(inventory::living(folders), self.lab.as_deref(), node, &folders.state) {
            Ok(found) => Ok(Some(found)),
            Err(InventoryError::NoLab { .. } | InventoryError::UnknownNode { .. }) if self.lab.is_none() => Ok(None),
            Err(error) => Err(lookup(&error)),
        }
    }
}

/// Whose words are asked for, from where: a guest that lives, else the records of a run.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Said {
    /// The node
    pub(super) node: String,
    #[command(flatten)]
    which: Which,
    /// Go on with what is said from now on, until Ctrl-C or the lab's end
    #[arg(short, long, conflicts_with = "run")]
    pub(super) follow: bool,
    /// The records of this run, also while a lab lives
    #[arg(long, value_name = "ID", conflicts_with = "lab")]
    run: Option<String>,
}

/// Where they are found.
pub(super) enum Found {
    /// A lab that lives, and its node.
    Living(Box<(LivingLab, NodeEntry)>),
    /// The node's folder in the records of a run.
    Records(Utf8PathBuf),
}

impl Said {
    /// Finds them; where that is in the records of a run nobody named, it is said whose `what` (a journal, a console) it is.
    ///
    /// # Errors
    /// Where there are none, or they cannot be followed.
    pub(super) fn find(&self, global: &Global, what: &str) -> Result<Found, CommandError> {
        let folders = global.folders()?;
        if self.run.is_none()
            && let Some((lab, node)) = self.which.node_if_living(&folders, &self.node)?
        {
            return Ok(Found::Living(Box::new((lab, node))));
        }
        let dir = recorded(&folders, self.run.as_deref(), &self.node)?;
        if self.follow {
            let message = format!("no lab with a node {} lives to be followed", self.node);
            return Err(CommandError::plain(Blame::Usage, message));
        }
        if self.run.is_none() {
            let run = dir.file_name().unwrap_or_default();
            // Standard error may be closed.
            let _ = writeln!(std::io::stderr(), "no lab with it lives: the {what} is of run {run}");
        }
        Ok(Found::Records(dir.join("nodes").join(&self.node)))
    }
}

/// Copies a file of records to standard output.
///
/// # Errors
/// Where it cannot be read.
pub(super) fn print_file(path: &Utf8Path) -> Result<u8, CommandError> {
    let reading = |error: &(dyn std::error::Error + 'static)| {
        CommandError::new(Blame::Environment, format!("reading {path}"), error)
    };
    let mut file = std::fs::File::open(path).map_err(|error| reading(&error))?;
    let mut out = ShownSync::new(std::io::stdout().lock());
    match std::io::copy(&mut file, &mut out).and_then(|_| out.finish()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(reading(&error)),
        _ => Ok(0),
    }
}

/// A lab or a node that could not be found, with what to do about it.
pub(super) fn lookup(error: &InventoryError) -> CommandError {
    let (blame, hint) = match error {
        InventoryError::SeveralLabs { .. } | InventoryError::SeveralNodes { .. } => {
            (Blame::Usage, Some("name one with --lab ID; `harness ps` lists them"))
        }
        InventoryError::NoLab { .. } => (Blame::Usage, Some("`harness run SCENARIO --keep` leaves one to look into")),
        InventoryError::UnknownLab { .. } | InventoryError::UnknownNode { .. } => (Blame::Usage, None),
        InventoryError::Io { .. } | InventoryError::Signal { .. } => (Blame::Environment, None),
    };
    let mut parts = crate::error::chain_of(error).into_iter();
    let mut command_error = CommandError::plain(blame, parts.next().unwrap_or_default());
    command_error.chain.extend(parts);
    command_error.hint = hint.map(str::to_owned);
    command_error
}

/// A connection of its own to a guest of a living lab.
///
/// # Errors
/// The environment's, where the guest does not answer as the lab's record says.
pub(super) async fn connect(lab: &LivingLab, node: &NodeEntry) -> Result<Guest, CommandError> {
    let reaching = |error: &(dyn std::error::Error + 'static)| {
        CommandError::new(Blame::Environment, format!("reaching {} of lab {}", node.name, lab.record.lab), error)
    };
    let key = std::fs::read_to_string(lab.client_key()).map_err(|error| reaching(&error))?;
    let target = SshTarget {
        node: node.name.clone(),
        addr: SocketAddr::from((Ipv4Addr::LOCALHOST, node.ssh_port)),
        user: node.user.clone(),
        host_key: parse_public(&node.host_key).map_err(|error| reaching(&error))?,
        identity: Arc::new(parse_private(&key).map_err(|error| reaching(&error))?),
        patience: lab.record.slowdown,
        news: NewsSink::none(),
    };
    let limit = CONNECT_LIMIT.mul_f64(lab.record.slowdown.clamp(1.0, 6.0));
    Guest::connect(target, limit).await.map_err(|error| reaching(&error))
}

/// How a joined command ended, as an exit code: its own, or 128 and the number of the signal that killed it.
pub(super) fn exit_code(end: &StreamEnd) -> u8 {
    match end {
        StreamEnd::Exited { status: Some(status), .. } => u8::try_from(*status).unwrap_or(u8::MAX),
        StreamEnd::Exited { status: None, signal: Some(signal) } => format!("SIG{signal}")
            .parse::<nix::sys::signal::Signal>()
            .map_or(u8::MAX, |signal| 128_u8.saturating_add(u8::try_from(signal as i32).unwrap_or(127))),
        StreamEnd::Exited { status: None, signal: None } | StreamEnd::Lost { .. } => u8::MAX,
    }
}

/// Whether a command ended because whoever read its output went away (`| head`).
pub(super) fn reader_went(error: &GuestError) -> bool {
    matches!(error, GuestError::Local { source, .. } if source.kind() == std::io::ErrorKind::BrokenPipe)
}

/// One of this process's standard streams, unbuffered.
///
/// # Errors
/// The system's.
pub(super) fn stream(of: &impl AsFd) -> Result<tokio::fs::File, CommandError> {
    fn duplicate(fd: BorrowedFd<'_>) -> std::io::Result<tokio::fs::File> {
        Ok(tokio::fs::File::from_std(std::fs::File::from(fd.try_clone_to_owned()?)))
    }
    duplicate(of.as_fd())
        .map_err(|error| CommandError::new(Blame::Environment, "using a standard stream of this process", &error))
}

/// One of this process's standard streams for what a guest says: filtered where it is a terminal.
///
/// # Errors
/// The system's.
pub(super) fn shown(of: &(impl AsFd + IsTerminal)) -> Result<Shown<tokio::fs::File>, CommandError> {
    Ok(Shown::new(stream(of)?, of.is_terminal()))
}

/// Runs to the end on a runtime that leaves nothing to be waited for, a read of standard input in particular.
///
/// # Errors
/// Those of `work`.
pub(super) fn block_on<T>(work: impl Future<Output = Result<T, CommandError>>) -> Result<T, CommandError> {
    let runtime = super::runtime()?;
    let result = runtime.block_on(work);
    runtime.shutdown_background();
    result
}

/// The folder of a run's records that has this node in it: the one named, or the newest.
///
/// # Errors
/// Where there is none.
fn recorded(folders: &Folders, run: Option<&str>, node: &str) -> Result<Utf8PathBuf, CommandError> {
    let none = |message: String| CommandError::plain(Blame::Usage, message);
    let plain = |name: &str| !name.is_empty() && !name.contains('/') && !name.starts_with('.');
    if !plain(node) {
        return Err(none(format!("{node:?} is no name of a node")));
    }
    let runs = folders.state.join("runs");
    let has_node = |run: &Utf8Path| run.join("nodes").join(node).is_dir();
    if let Some(run) = run {
        let dir = runs.join(run);
        if !plain(run) || !dir.is_dir() {
            return Err(none(format!("no run {run} under {runs}")));
        }
        return if has_node(&dir) { Ok(dir) } else { Err(none(format!("run {run} has no records of a node {node}"))) };
    }
    let entries = runs.read_dir_utf8().into_iter().flatten().filter_map(Result::ok);
    // A run's id begins with its time.
    entries
        .map(|entry| entry.into_path())
        .filter(|dir| has_node(dir))
        .max()
        .ok_or_else(|| none(format!("no lab with a node {node} lives, and no run under {runs} has records of one")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_the_commands_own() {
        let exited =
            |status, signal: Option<&str>| exit_code(&StreamEnd::Exited { status, signal: signal.map(str::to_owned) });
        assert_eq!((exited(Some(0), None), exited(Some(7), None)), (0, 7));
        assert_eq!(exited(None, Some("KILL")), 137);
        assert_eq!(exited(None, Some("odd")), 255);
        assert_eq!(exit_code(&StreamEnd::Lost { reason: "x".to_owned() }), 255);
    }

    #[test]
    fn the_newest_run_that_knows_the_node_is_shown() {
        let base = tempfile::tempdir().unwrap();
        let state = Utf8Path::from_path(base.path()).unwrap();
        let folders = Folders { state: state.to_owned(), cache: state.join("c"), runtime: state.join("r") };
        assert!(recorded(&folders, None, "server-1").is_err());
        for run in ["20260101T000000Z-a-x", "20260102T000000Z-b-y"] {
            std::fs::create_dir_all(state.join("runs").join(run).join("nodes/server-1")).unwrap();
        }
        std::fs::create_dir_all(state.join("runs/20260103T000000Z-c-z")).unwrap();
        let name = |run, node| recorded(&folders, run, node).map(|dir| dir.file_name().unwrap().to_owned());
        assert_eq!(name(None, "server-1").unwrap(), "20260102T000000Z-b-y");
        assert_eq!(name(Some("20260101T000000Z-a-x"), "server-1").unwrap(), "20260101T000000Z-a-x");
        for (run, node) in
            [(Some("../runs"), "server-1"), (None, "../nodes"), (Some("20260103T000000Z-c-z"), "server-1")]
        {
            assert!(name(run, node).is_err(), "{run:?} {node}");
        }
    }
}
