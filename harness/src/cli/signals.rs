//! Signals: once is graceful, twice is at once.

use kvm::Supervisor;
use nix::sys::signal::Signal as Sig;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::error::CommandError;
use crate::event::{EventKind, EventSink};
use crate::exit::Blame;
use crate::lab::{Alarm, AlarmBell};

/// The three signals that ask a program to end.
pub(super) struct Signals {
    int: Signal,
    term: Signal,
    hup: Signal,
}

impl Signals {
    /// Listens from now on.
    ///
    /// # Errors
    /// Where the system refuses to hand out signals.
    pub(super) fn open() -> Result<Self, CommandError> {
        let open =
            |kind| signal(kind).map_err(|error| CommandError::new(Blame::Environment, "listening for signals", &error));
        Ok(Self {
            int: open(SignalKind::interrupt())?,
            term: open(SignalKind::terminate())?,
            hup: open(SignalKind::hangup())?,
        })
    }

    /// The next one. Cancel-safe.
    pub(super) async fn next(&mut self) -> Sig {
        tokio::select! {
            _ = self.int.recv() => Sig::SIGINT,
            _ = self.term.recv() => Sig::SIGTERM,
            _ = self.hup.recv() => Sig::SIGHUP,
        }
    }
}

/// Listens for SIGINT, SIGTERM and SIGHUP from now on.
///
/// The first rings the alarm; the second kills every process of the run and exits with 130.
///
/// # Errors
/// Where the system refuses to hand out signals.
pub(super) fn listen(
    bell: AlarmBell,
    sink: EventSink,
    supervisor: Supervisor,
) -> Result<tokio::task::JoinHandle<()>, CommandError> {
    let mut signals = Signals::open()?;
    Ok(tokio::spawn(async move {
        let first = signals.next().await.to_string();
        sink.emit(EventKind::Interrupted { signal: first.clone() });
        bell.ring(Alarm::Interrupted { signal: first });
        signals.next().await;
        supervisor.kill_all_now();
        std::process::exit(i32::from(Blame::Interrupted.exit_code()));
    }))
}
