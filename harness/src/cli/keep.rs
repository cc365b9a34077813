//! A lab that outlives the command that made it: the owner, and the relay that stands in the terminal for it.
//!
//! VMs end with the process that has started them, so a lab that is kept is owned by the process that ran its
//! formation. `harness run --keep` therefore starts itself a second time, in a session of its own, as the
//! *owner*; what the user started stays as the *relay*: it passes signals on, and returns with the run's exit
//! code when the owner reports that the run is over. They are joined by a socket pair, the owner's standard
//! input. Its end tells each of the other's death: an owner that loses its relay before it has reported takes
//! the lab down.

use std::fmt::Write as _;
use std::io::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::time::Duration;

use camino::Utf8Path;
use jiff::Timestamp;
use nix::sys::signal::Signal as Sig;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::task::JoinHandle;

use crate::cli::signals::Signals;
use crate::error::CommandError;
use crate::event::{EventKind, EventSink};
use crate::exit::Blame;
use crate::formation::Standing;
use crate::lab::{Alarm, AlarmBell, inventory};
use crate::record::private_file;
use crate::reporter::human_ms;

/// Set in the owner's environment, for nobody else to set.
const OWNER_ENV: &str = "HARNESS_LAB_OWNER";
/// The longest report the relay reads.
const REPORT_MAX_BYTES: u64 = 4096;

/// Whether a lab is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Keep {
    /// Never: it is taken down with its run.
    Never,
    /// Whatever the run's outcome.
    Always,
    /// Where the run did not pass.
    OnFailure,
}

impl Keep {
    /// Whether it is wanted for a run of this outcome; one that was interrupted is never kept.
    pub(super) fn wanted(self, passed: bool, interrupted: bool) -> bool {
        match self {
            Self::Never => false,
            Self::Always => !interrupted,
            Self::OnFailure => !passed && !interrupted,
        }
    }
}

/// What the owner tells the relay when the run is over and the lab is kept.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Report {
    exit_code: u8,
}

/// Whether this process was started as an owner.
pub(super) fn is_owner() -> bool {
    std::env::var_os(OWNER_ENV).is_some()
}

/// Starts this very command again as the owner of its lab, and stands in for it until the run is over.
///
/// # Errors
/// Where the owner cannot be started or is killed.
pub(super) fn relay() -> Result<u8, CommandError> {
    let runtime = super::runtime()?;
    let code = runtime.block_on(relayed());
    // Nothing of it is waited for.
    runtime.shutdown_background();
    code
}

async fn relayed() -> Result<u8, CommandError> {
    let failed = |what: &str, error: &(dyn std::error::Error + 'static)| {
        CommandError::new(Blame::Environment, format!("starting the owner of the lab: {what}"), error)
    };
    let mut signals = Signals::open()?;
    let (ours, theirs) = StdUnixStream::pair().map_err(|error| failed("a socket pair", &error))?;
    ours.set_nonblocking(true).map_err(|error| failed("the socket", &error))?;
    let ours = UnixStream::from_std(ours).map_err(|error| failed("the socket", &error))?;
    let mut args = std::env::args_os();
    let name = args.next().unwrap_or_else(|| "harness".into());
    // Not by the supervisor, whose children end with this process: this one is to outlive it. The link leads to
    // this very program even where its file has been replaced.
    let mut command = tokio::process::Command::new("/proc/self/exe");
    command.arg0(name).args(args).env(OWNER_ENV, "1").stdin(OwnedFd::from(theirs));
    let mut owner = command.spawn().map_err(|error| failed("this program", &error))?;
    // It holds the owner's end of the socket.
    drop(command);
    let pid = owner.id();
    let mut reports = BufReader::new(ours.take(REPORT_MAX_BYTES));
    let mut line = String::new();
    let mut reporting = true;
    loop {
        tokio::select! {
            biased;
            read = reports.read_line(&mut line), if reporting => {
                if read.is_ok() && line.ends_with('\n') {
                    let report: Report = serde_json::from_str(&line)
                        .map_err(|error| CommandError::new(Blame::Harness, "reading the report of the lab's owner", &error))?;
                    return Ok(report.exit_code);
                }
                // Nothing is kept: its exit says how the run went.
                reporting = false;
            }
            status = owner.wait(), if !reporting => {
                return status.map_err(|error| failed("waiting for it", &error)).and_then(owner_ended);
            }
            signal = signals.next() => {
                // It is our child and has not been waited for: the number is its own.
                if let Some(pid) = pid.and_then(|pid| i32::try_from(pid).ok()) {
                    let _ = nix::sys::signal::kill(Pid::from_raw(pid), signal);
                }
            }
        }
    }
}

/// The exit code of a relay whose owner ended without a report.
fn owner_ended(status: ExitStatus) -> Result<u8, CommandError> {
    if let Some(code) = status.code() {
        return u8::try_from(code)
            .map_err(|_| CommandError::plain(Blame::Harness, format!("the owner of the lab ended with {status}")));
    }
    match status.signal().and_then(|signal| Sig::try_from(signal).ok()) {
        // Before it listens for them, signals that were passed on end it.
        Some(Sig::SIGINT | Sig::SIGTERM | Sig::SIGHUP) => Ok(Blame::Interrupted.exit_code()),
        _ => Err(CommandError::plain(
            Blame::Environment,
            format!("the owner of the lab was killed ({status}); its VMs ended with it"),
        )
        .hint("`harness clean` removes what it left")),
    }
}

/// The owner's end of what joins it to its relay.
pub(super) struct Leash {
    to_relay: OwnedWriteHalf,
    watch: JoinHandle<()>,
}

impl Leash {
    /// Makes this process an owner: it leaves its relay's session, and the alarm is rung when the relay dies.
    ///
    /// # Errors
    /// Where standard input is not the relay's socket.
    pub(super) fn take(bell: AlarmBell, sink: EventSink) -> Result<Self, CommandError> {
        let failed = |what: &str, error: &(dyn std::error::Error + 'static)| {
            CommandError::new(Blame::Usage, format!("owning a lab for another process: {what}"), error)
                .hint(format!("{OWNER_ENV} is set by `harness run --keep` for itself; unset it"))
        };
        let socket = std::io::stdin().as_fd().try_clone_to_owned().map_err(|error| failed("standard input", &error))?;
        let socket = StdUnixStream::from(socket);
        // Anything but a socket says so here.
        socket.peer_addr().map_err(|error| failed("standard input", &error))?;
        socket.set_nonblocking(true).map_err(|error| failed("standard input", &error))?;
        let (from_relay, to_relay) =
            UnixStream::from_std(socket).map_err(|error| failed("standard input", &error))?.into_split();
        let null = std::fs::File::open("/dev/null").map_err(|error| failed("/dev/null", &error))?;
        nix::unistd::dup2_stdin(&null).map_err(|error| failed("standard input", &error))?;
        // The terminal's signals go to the relay, which passes them on; the terminal's end is not the lab's.
        nix::unistd::setsid().map_err(|error| failed("a session of its own", &error))?;
        let watch = tokio::spawn(watch_relay(from_relay, bell, sink));
        Ok(Self { to_relay, watch })
    }

    /// Tells the relay that the run is over. `false` where nobody is left to be told.
    async fn report(mut self, exit_code: u8) -> bool {
        self.watch.abort();
        let Ok(mut line) = serde_json::to_string(&Report { exit_code }) else { return false };
        line.push('\n');
        self.to_relay.write_all(line.as_bytes()).await.is_ok()
    }
}

async fn watch_relay(mut from_relay: OwnedReadHalf, bell: AlarmBell, sink: EventSink) {
    let mut byte = [0];
    // The relay never writes: whatever ends this is its end.
    let _ = from_relay.read(&mut byte).await;
    let signal = "the death of the command that started it".to_owned();
    sink.emit(EventKind::Interrupted { signal: signal.clone() });
    bell.ring(Alarm::Interrupted { signal });
}

/// What a run has to say when it is over.
pub(super) struct Closing<'a> {
    /// The summary for a person; empty where the output is for programs.
    pub(super) summary: &'a str,
    /// The run's exit code.
    pub(super) exit_code: u8,
    /// Folder of the run's records.
    pub(super) run_dir: &'a Utf8Path,
}

/// Says how the run went, lets the relay go, and keeps the lab until its expiry, a signal, or the end of its last machine.
///
/// # Errors
/// What would not go at the end.
pub(super) async fn hold(
    mut lab: Standing,
    leash: Leash,
    keep_for: Duration,
    mut signals: Signals,
    closing: Closing<'_>,
) -> Result<(), CommandError> {
    lab.disconnect().await;
    let expires = Timestamp::now() + keep_for;
    let record = match inventory::mark_kept(lab.dir(), expires) {
        Ok(record) => record,
        Err(error) => {
            super::print(closing.summary);
            let _ = lab.teardown().await;
            return Err(CommandError::new(Blame::Environment, "keeping the lab", &error));
        }
    };
    if !closing.summary.is_empty() {
        super::print(&format!("{}{}", closing.summary, notice(&record, keep_for)));
    }
    // From here on the terminal, or the pipe, belongs to others.
    let log = private_file(&closing.run_dir.join("owner.log")).and_then(|log| {
        nix::unistd::dup2_stdout(&log)?;
        nix::unistd::dup2_stderr(&log)?;
        Ok(log)
    });
    let mut log = match log {
        Ok(log) => log,
        Err(error) => {
            let _ = lab.teardown().await;
            return Err(CommandError::new(Blame::Environment, "leaving the terminal", &error));
        }
    };
    // What cannot be logged must not end the lab.
    let mut say = |text: String| drop(writeln!(log, "{} {text}", Timestamp::now()));
    say(format!("lab {} is kept until {expires}", lab.id()));
    if leash.report(closing.exit_code).await {
        let why = tokio::select! {
            () = tokio::time::sleep(keep_for) => "it has expired".to_owned(),
            signal = signals.next() => format!("{signal}: it is to end"),
            () = lab.emptied() => "none of its machines runs any more".to_owned(),
        };
        say(why);
    } else {
        say("the command that started it died before it could be told how the run went".to_owned());
    }
    let supervisor = lab.supervisor().clone();
    let leftovers = tokio::select! {
        leftovers = lab.teardown() => leftovers,
        signal = signals.next() => {
            say(format!("{signal}: it is to end at once"));
            supervisor.kill_all_now();
            std::process::exit(i32::from(Blame::Interrupted.exit_code()));
        }
    };
    if leftovers.is_empty() {
        say("nothing of it is left".to_owned());
        return Ok(());
    }
    say(format!("left behind: {}", leftovers.join("; ")));
    Err(CommandError::plain(Blame::Harness, format!("left behind: {}", leftovers.join("; "))))
}

/// What a person can do with the lab now.
fn notice(record: &inventory::LabRecord, keep_for: Duration) -> String {
    let lab = &record.lab;
    let node = record.nodes.first().map_or("NODE", |node| node.name.as_str());
    let time = human_ms(u64::try_from(keep_for.as_millis()).unwrap_or(u64::MAX));
    let mut out = format!("  kept: lab {lab}, for {time}\n");
    let _ = writeln!(out, "    harness shell {node} --lab {lab}");
    let _ = writeln!(out, "    harness stop {lab}");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_and_what_never() {
        assert!(Keep::Always.wanted(true, false) && Keep::Always.wanted(false, false));
        assert!(Keep::OnFailure.wanted(false, false) && !Keep::OnFailure.wanted(true, false));
        for keep in [Keep::Never, Keep::Always, Keep::OnFailure] {
            assert!(!keep.wanted(true, true) && !keep.wanted(false, true));
        }
        assert!(!Keep::Never.wanted(false, false));
    }

    #[test]
    fn an_owner_that_is_killed_is_never_a_pass() {
        assert_eq!(owner_ended(ExitStatus::from_raw(3 << 8)).unwrap(), 3);
        assert_eq!(owner_ended(ExitStatus::from_raw(Sig::SIGINT as i32)).unwrap(), 130);
        let error = owner_ended(ExitStatus::from_raw(Sig::SIGKILL as i32)).unwrap_err();
        assert_eq!(error.blame, Blame::Environment);
        assert!(error.render().contains("harness clean"), "{}", error.render());
    }

    fn leash() -> (Leash, UnixStream, crate::lab::Guard) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (bell, guard) = crate::lab::alarm::alarm();
        let (from_relay, to_relay) = theirs.into_split();
        let (sink, _events) = EventSink::new();
        (Leash { to_relay, watch: tokio::spawn(watch_relay(from_relay, bell, sink)) }, ours, guard)
    }

    #[tokio::test]
    async fn a_relay_that_dies_before_the_report_ends_the_run() {
        let (leash, relay, guard) = leash();
        assert!(guard.alarm().is_none());
        drop(relay);
        let alarm = guard.rung().await;
        assert!(matches!(&alarm, Alarm::Interrupted { signal } if signal.contains("death")), "{alarm:?}");
        assert!(!leash.report(0).await, "nobody was there to be told");
    }

    #[tokio::test]
    async fn a_relay_that_was_told_may_go() {
        let (leash, mut relay, guard) = leash();
        assert!(leash.report(1).await);
        let mut said = String::new();
        relay.read_to_string(&mut said).await.unwrap();
        assert_eq!(serde_json::from_str::<Report>(&said).unwrap(), Report { exit_code: 1 });
        drop(relay);
        assert!(guard.alarm().is_none());
    }
}
